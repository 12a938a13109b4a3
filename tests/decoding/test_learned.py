"""The rule of a learned filter: against a plain form, in batches, recorded, and where it is wrong."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel import registry
from dparallel.configs import parse_policy
from drafters import fast_dllm
from safetensors.torch import load_file, save_file
from test_rules import MASK, PROMPTS, Sharp, argmax, best, plain
from torch import Tensor, nn

import dparallel_ext as dx
from dparallel_ext import models, rules
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.rules import Decision, Learned, Rule, Where
from dparallel_ext.rules.learned import by_place, linear

pytest_plugins = ["taping"]

BLOCK = 16


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


def net_of(file: Path) -> nn.Sequential:
    state = load_file(file)
    hidden, size = state["0.weight"].shape
    net = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size))
    net.load_state_dict(state)
    return net


def made(file: Path, size: int = BLOCK, hidden: int = 24, seed: int = 0, **metadata: str) -> Path:
    """A filter of random weights, whose answers hang on every confidence."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (hidden, size), "0.bias": (hidden,), "2.weight": (size, hidden), "2.bias": (size,)}
    tensors = {name: 2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, file, {"tau": "0.7", **metadata})
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a directory whose name has all that parts the text of a rule."""
    directory = tmp_path_factory.mktemp("a,b:c+d,0.5")
    return made(directory / "filter+x.safetensors")


@pytest.mark.parametrize("row", ["quota:1", "steps:9", "confidence:0.2"])
@pytest.mark.parametrize("by", [0.6, 1.5])
def test_learned_is_its_formula(llada: models.Model, file: Path, row: str, by: float) -> None:
    """In float64; the last of three blocks is short."""
    model, net, total = Sharp(llada, by), net_of(file).double(), 2 * BLOCK + 8
    accepted = 0
    for prompt in PROMPTS:
        turns: dict[int, int] = {}

        def decide(
            z: Tensor, x: Tensor, masked: Tensor, step: int, first: int = len(prompt), turns: Any = turns
        ) -> tuple[Tensor, Tensor]:
            nonlocal accepted
            token = argmax(z)
            p = z.softmax(1).gather(1, token[:, None])[:, 0]
            start = first + (int(masked.nonzero()[0]) - first) // BLOCK * BLOCK
            block = p[start : start + BLOCK]
            seen = torch.cat((block, torch.ones(BLOCK - len(block))))
            right = net(seen).sigmoid()[: len(block)] > 0.7
            commit = torch.zeros_like(masked)
            commit[start : start + BLOCK] = right
            accepted += int((commit & masked).sum())
            turn = turns[start] = turns.get(start, -1) + 1
            if row == "confidence:0.2":
                by_row = masked & (p >= 0.2)
                by_row |= best(p, masked) & ~by_row.any()
            else:
                count = 1 if row == "quota:1" else len(block) // 3 + (turn < len(block) % 3)
                by_row = torch.zeros_like(masked)
                by_row[p.masked_fill(~masked, -math.inf).topk(min(count, int(masked.sum()))).indices] = True
            return masked & (commit | by_row), token

        expected, passes = plain(model, prompt, total, BLOCK, decide)
        rule = f"learned:{file}" if row == "quota:1" else f"learned:{file}+{row}"
        out = dx.decode(model, prompt, gen_length=total, block_length=BLOCK, rule=rule, mask_id=MASK)
        assert torch.equal(out.sequences[0], expected)
        assert int(out.nfe) == passes
        assert 3 <= passes < total
    assert accepted


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_sequence_does_not_depend_on_the_batch(llada: models.Model, file: Path, cache: str) -> None:
    settings: dict[str, Any] = {
        "block_length": BLOCK, "cache": cache, "rule": Learned(file), "batch_invariant": True
    }  # fmt: skip
    lengths = [40, 20, 5]
    together = dx.decode(llada, PROMPTS, gen_length=lengths, **settings)
    for b, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        alone = dx.decode(llada, prompt, gen_length=length, **settings)
        assert torch.equal(alone.responses[0], together.responses[b])
        assert int(alone.nfe) == int(together.nfe[b])


@pytest.mark.parametrize("size", [1, 16, 31, 32, 48])
def test_a_layer_rounds_alike_in_every_batch(size: int) -> None:
    x, weight, bias = torch.rand(67, size), torch.randn(size, size), torch.randn(size)
    together = linear(x, weight, bias)
    torch.testing.assert_close(together, nn.functional.linear(x, weight, bias))
    for rows in (slice(0, 1), slice(5, 8), slice(66, 67), slice(3, 36)):
        assert torch.equal(linear(x[rows], weight, bias), together[rows])


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llada_tiny_a", "none"),
        ("llada_tiny_a", "dual"),
        ("dream_tiny_a", "prefix"),
        ("sdar_tiny_a", "block"),
    ],
)
def test_recorded_passes_give_the_same(
    taped: list[Graphs],
    file: Path,
    name: str,
    cache: str,
) -> None:
    model = golden.model(name)
    settings: dict[str, Any] = {"gen_length": 40, "block_length": BLOCK, "cache": cache, "record": True}
    expected = dx.decode(model, PROMPTS, graphs=False, rule=Learned(file, 0.6), **settings)
    assert not taped
    for tau in (0.6, 0.9, 0.6):  # equal rules share one recording, rules of another tau have their own
        out = dx.decode(model, PROMPTS, rule=Learned(file, tau), **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    graphs = taped[0]
    assert graphs.recorder is not None, "a recording failed"
    assert graphs.replays >= 2


def test_in_an_engine(llada: models.Model, file: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"rule": f"learned:{file}"},
        {"rule": f"learned:{file},0.2+steps:9"},
        {"threshold": 2.0},
        {"rule": Learned(file, 0.9)},
        {"rule": "edit:0.03,0.04,5"},
    ]
    with dx.Engine(llada, cache="dual", block_length=BLOCK, lanes=3) as engine:
        handles = [engine.submit(PROMPTS[i % 3], gen_length=40, **way) for i, way in enumerate(ways)]
        for i, (way, handle) in enumerate(zip(ways, handles, strict=True)):
            alone = dx.decode(llada, PROMPTS[i % 3], gen_length=40, cache="dual", block_length=BLOCK, **way)
            assert handle.result(30).tokens == alone.responses[0].tolist()
            assert handle.result(30).nfe == int(alone.nfe)


class Places(Rule):
    """Notes the confidences by their places in the block, and commits nothing of its own."""

    reads = "block"
    recorded = False

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        self.seen.append(by_place(stats.confidence, where, BLOCK, 1.0)[0])
        return Decision()


@pytest.mark.parametrize("cache", ["none", "block"])
def test_a_block_that_the_prompt_ends_in(cache: str) -> None:
    """Of a block-causal model: columns count from where the block begins, the prompt's are sure."""
    model, places = golden.model("sdar_tiny_a"), Places()
    dx.decode(model, PROMPTS[0], gen_length=10, block_length=BLOCK, cache=cache, rule=places)
    tail = len(PROMPTS[0])
    assert bool((places.seen[0][:tail] == 1).all())
    assert bool((places.seen[0][tail:] < 1).all())
    assert bool((places.seen[-1] < 1).all())  # the second block, all of it decoded


def test_an_exact_cache_changes_nothing_where_logits_are_shifted(file: Path) -> None:
    """A block's first column has its logits from the block before, which passes over the block lack."""
    model = fast_dllm()
    for tau in (0.3, 0.6):
        settings: dict[str, Any] = {"sub_block_length": BLOCK, "rule": Learned(file, tau), "gen_length": 60}
        none, block = (dx.decode(model, PROMPTS, cache=cache, **settings) for cache in ("none", "block"))
        assert torch.equal(none.sequences, block.sequences)
        assert torch.equal(none.nfe, block.nfe)
        assert int(none.nfe.sum()) < int(none.generated.sum())


def test_committed_columns_are_seen(llada: models.Model) -> None:
    places = Places()
    out = dx.decode(llada, PROMPTS[0], gen_length=20, block_length=BLOCK, rule=places)
    first, last = places.seen[0], places.seen[-1]
    logits = llada(torch.cat((PROMPTS[0], torch.full((20,), MASK)))[None]).logits[0, len(PROMPTS[0]) :]
    confidence = logits.softmax(1).index_fill(1, torch.tensor([MASK]), 0).amax(1)
    torch.testing.assert_close(first, confidence[:BLOCK], rtol=1e-4, atol=1e-6)
    assert bool((last[4:] == 1).all())  # what the last block lacks
    assert bool((last[:4] < 1).all())
    assert len(places.seen) == int(out.nfe)


def test_nan_beside_the_masks_is_named(llada: models.Model, file: Path) -> None:
    """A row that the rule reads and the policy would not: of a committed column."""

    class Bad:
        config = None

        def __call__(self, input_ids: Tensor) -> SimpleNamespace:
            logits = llada(input_ids).logits
            logits[input_ids != MASK] = math.nan
            return SimpleNamespace(logits=logits)

    settings: dict[str, Any] = {"gen_length": BLOCK, "block_length": BLOCK, "mask_id": MASK}
    dx.decode(Bad(), PROMPTS[0], **settings)
    with pytest.raises(ValueError, match=r"logits: sequence 0 at position .* holds NaN"):
        dx.decode(Bad(), PROMPTS[0], rule=Learned(file), **settings)


def test_names(file: Path) -> None:
    quota = {"selector": "quota", "threshold": 1.0}
    assert rules.parse(f"learned:{file}") == (Learned(file, 0.7), quota)
    assert rules.parse(f"learned:{file},0.25") == (Learned(file, 0.25), quota)
    assert rules.parse(f"learned:{file},1e-1+one") == (Learned(file, 0.1), {})
    assert rules.parse(f"learned:{file}+steps:4") == (Learned(file), {"steps": 4})
    assert rules.file_of(f"learned:{file},0.5+one") == str(file)
    assert rules.file_of("credit+entropy:0.5") is None
    assert dx.DecodeConfig(rule=Learned(file, 0.2)).to_dict()["rule"] == f"learned:{file},0.2"
    assert str(Learned(str(file))) == f"Learned(file={str(file)!r}, tau=0.7)"


def test_rules_of_equal_content_are_equal(file: Path, tmp_path: Path) -> None:
    copy, other = made(tmp_path / "copy"), made(tmp_path / "other", seed=1)
    assert Learned(copy) == Learned(str(file), 0.7)
    assert hash(Learned(copy)) == hash(Learned(file))
    assert len({Learned(file), Learned(file, 0.9), Learned(other)}) == 3
    before = Learned(copy)
    made(copy, hidden=8)
    assert Learned(copy) != before  # it is read again


def test_what_is_no_filter_is_named(llada: models.Model, file: Path, tmp_path: Path) -> None:
    good = load_file(file)

    def refused(said: str, content: Any = None, metadata: Any = None) -> None:
        bad = tmp_path / "bad.safetensors"
        bad.unlink(missing_ok=True)
        if isinstance(content, bytes):
            bad.write_bytes(content)
        elif content is not None:
            save_file(content, bad, metadata)
        with pytest.raises(ValueError, match=said) as found:
            dx.decode(llada, PROMPTS, gen_length=8, block_length=BLOCK, rule=f"learned:{bad}")
        assert str(bad) in str(found.value)

    tau = {"tau": "0.9"}
    refused(r"rule: expected learned:FILE\[,TAU\].*not a readable safetensors file: No such file")
    refused("not a readable safetensors file", file.read_bytes()[:-100])
    refused("not a readable safetensors file", b"")
    refused(r"is no filter: expected \['0.weight'", {"0.weight": good["0.weight"]}, tau)
    refused(r"is no filter: expected \(H, N\)", {**good, "2.weight": good["2.weight"][:, :5].clone()}, tau)
    refused(r"is no filter: expected \(H, N\)", {**good, "0.weight": torch.zeros(5)}, tau)
    refused("holds NaN or infinite", {**good, "2.bias": good["2.bias"] * math.nan}, tau)
    refused("tau: expected a number from 0 to 1, got None", good, {"format": "pt"})
    refused("tau: expected a number from 0 to 1, got 'high'", good, {"tau": "high"})
    refused("tau: expected a number from 0 to 1, got 1.5", good, {"tau": "1.5"})
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Learned(tmp_path)
    with pytest.raises(ValueError, match=r"tau: expected a number from 0 to 1, got -0\.1"):
        Learned(file, -0.1)
    with pytest.raises(ValueError, match="tau: expected a number from 0 to 1, got 'x'"):
        Learned(file, "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"file: expected a path or one of the names .*, got 5"):
        Learned(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"No such file .*; filters with a name: \['builtin:teacher'\]"):
        rules.parse("learned:builtin:no")


def test_a_filter_is_for_its_blocks_and_says_what_it_was_trained_for(
    llada: models.Model, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"rule: .* is for a block_length of 16, got 8"):
        dx.decode(llada, PROMPTS, gen_length=8, block_length=8, rule=Learned(file))
    with dx.Engine(llada, block_length=8) as engine, pytest.raises(ValueError, match="block_length of 16"):
        engine.submit(PROMPTS[0], gen_length=8, rule=Learned(file))
    own = Learned(made(tmp_path / "own", model=models.fingerprint(llada) or ""))
    other = Learned(made(tmp_path / "other", model="0123456789abcdef"))
    settings: dict[str, Any] = {"gen_length": 8, "block_length": BLOCK, "mask_id": MASK}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx.decode(llada, PROMPTS, rule=own, **settings)
        dx.decode(Sharp(llada, 1.0), PROMPTS[0], rule=other, **settings)  # of no model can be told
    with pytest.warns(UserWarning, match="other was trained for another model"):
        dx.decode(llada, PROMPTS, rule=other, **settings)


def test_fingerprints_do_not_hang_on_dtype_or_layout() -> None:
    plain_one = golden.model("llada_tiny_a")
    found = models.fingerprint(plain_one)
    assert found == models.fingerprint(golden.model("llada_tiny_a", dtype=torch.bfloat16, fuse=True))
    assert found == models.fingerprint(golden.model("llada_tiny_a", dtype=torch.float16))
    assert found == models.fingerprint(golden.model("llada_tiny_a").quantize())
    assert found != models.fingerprint(golden.model("dream_tiny_a"))
    assert models.fingerprint(Sharp(plain_one, 1.0)) is None


def test_filters_that_ship_have_a_name() -> None:
    shipped = registry.BUILTIN / "teacher" / registry.FILTER
    assert Learned("builtin:teacher") == Learned(shipped)
    assert parse_policy("learned:builtin:teacher,0.5+one")["rule"].startswith("learned:builtin")


def test_a_request_names_no_file_of_the_server(file: Path) -> None:
    parse_policy("learned:builtin:teacher,0.9", files=False)
    for text in (f"learned:{file}", "learned:/etc/passwd", "learned:/etc/nowhere+one"):
        with pytest.raises(ValueError, match="expected a file that ships, learned:builtin:NAME"):
            parse_policy(text, files=False)
