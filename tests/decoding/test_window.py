"""Cache "window": tokens, passes and order of commits of WeDLM's published loop, which permutes its rows and
keeps nothing; in batches, engines, recorded passes, and with any rule."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.cli import app
from server_here import serving
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from typer.testing import CliRunner
from wedlm import EOS, MASK, VOCABULARY, Published, ids, ours, published, theirs

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.models import Model

pytest_plugins = ["taping"]

CASES = [(5, 40, 16), (1, 7, 16), (23, 33, 4), (70, 20, 1), (130, 50, 8), (3, 17, 64), (9, 70, 40)]
"""Lengths of prompt, response and window."""
PROMPTS = [ids(n, seed=n) for n in (5, 1, 23, 70)]
LENGTHS = [40, 7, 33, 20]
RULE = "distance:2.2,0.05"


def check(out: dx.DecodeOutput, expected: Published, b: int = 0, eos: int | None = None) -> None:
    """The same tokens, in the same passes."""
    assert out.trajectory is not None
    kept = len(expected.tokens)
    assert out.responses[b][:kept].tolist() == expected.tokens
    assert int(out.nfe[b]) == expected.passes - 1
    # Theirs has a pass over the prompt, and one in which the last tokens leave.
    assert int(out.nfe_published[b]) == expected.passes + 1
    steps = out.trajectory.step[b].tolist()
    assert all(steps[:kept])
    for number, places in enumerate(expected.filled, 1):
        # Padding has replaced some of what passes filled behind an end, and has no record.
        assert [i for i, step in enumerate(steps) if step == number] == sorted(i for i in places if steps[i])


@pytest.mark.parametrize(("prompt", "gen_length", "size"), CASES)
@pytest.mark.parametrize(
    ("kind", "tau", "penalty"),
    [*(("qwen3", *way) for way in ((0.4, 0.02), (2.0, 0.02), (2.5, 0.2), (None, 0.0))), ("qwen2", 2.0, 0.02)],
)
def test_the_published_loop(
    kind: str, tau: float | None, penalty: float, prompt: int, gen_length: int, size: int
) -> None:
    x = ids(prompt, seed=prompt)
    expected = published(theirs(kind), x, gen_length, size, tau, penalty)
    settings: dict[str, Any] = {"gen_length": gen_length, "block_length": size, "record": True}
    out = dx.decode(ours(kind), x, rule=f"distance:{tau or 0},{penalty}", **settings)
    check(out, expected)
    assert out.responses[0].shape == (gen_length,)


def test_the_cases_tell() -> None:
    """Tokens are filled out of order, several in a pass, and across the ends of blocks."""
    passes = [published(theirs(), x, n, 16, 2.2, 0.05) for x, n in zip(PROMPTS, LENGTHS, strict=True)]
    filled = [places for each in passes for places in each.filled]
    assert any(len(places) > 1 for places in filled)
    assert any(b < a for each in passes for (a, *_), (b, *_) in itertools.pairwise(each.filled[:-1]))
    assert any(places and places[0] < 16 <= places[-1] for places in filled)


def test_a_ragged_batch_is_what_each_is_alone() -> None:
    settings: dict[str, Any] = {"rule": RULE, "record": True}
    out = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, **settings)
    for b, (x, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        check(out, published(theirs(), x, n, 16, 2.2, 0.05), b)
    alone = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, batch_invariant=True, **settings)
    assert torch.equal(alone.sequences, out.sequences)
    assert alone.forwards == int(out.nfe.sum()) > out.forwards


@pytest.mark.parametrize("at", [0, 3, 15, 16, 20, 39])
def test_an_end_token_ends_it(at: int) -> None:
    """Once no mask is in front of it; where blocks end does not matter."""
    whole = published(theirs(), PROMPTS[0], 40, 16, 2.2, 0.05)
    eos = whole.tokens[at]
    expected = published(theirs(), PROMPTS[0], 40, 16, 2.2, 0.05, eos)
    out = dx.decode(ours(), PROMPTS[0], gen_length=40, rule=RULE, eos_id=eos, record=True)
    check(out, expected)
    assert int(out.kept) == len(expected.tokens) - 1 == whole.tokens.index(eos)
    assert set(out.responses[0][int(out.kept) :].tolist()) <= {eos, *whole.tokens}
    assert MASK not in out.responses[0].tolist()


def test_a_stop_sequence_ends_it() -> None:
    whole = dx.decode(ours(), PROMPTS[0], gen_length=40, rule=RULE)
    response = whole.responses[0].tolist()
    out = dx.decode(ours(), PROMPTS[0], gen_length=40, rule=RULE, stop=[response[14:18]])
    first = next(i for i in range(40) if response[i : i + 4] == response[14:18])
    assert int(out.kept) == first
    assert out.responses[0][: first + 4].tolist() == response[: first + 4]


@pytest.mark.parametrize(
    "way",
    [
        *({}, {"threshold": 2.0}, {"rule": "quota:3"}, {"rule": "credit+entropy:2"}),
        {"rule": lambda stats, masked, step: masked & (stats.confidence > 0.4)},
        {"rule": RULE, "temperature": 0.8, "seed": 3, "top_p": 0.9},
        {"threshold": 3.0, "suppress": [5, 9, 12], "max_commit": 2},
    ],
)
def test_other_rules(way: dict[str, Any]) -> None:
    """Each token is what a call with the text so far predicts, in the window from the first mask on."""
    out = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, block_length=8, record=True, **way)
    again = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, block_length=8, **way)
    assert torch.equal(again.sequences, out.sequences)
    assert out.trajectory is not None
    if not way:  # a token a pass
        assert out.nfe.tolist() == LENGTHS
    for b, (x, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        steps, known = out.trajectory.step[b, :n], len(x)
        assert steps.min() == 1
        assert steps.max() == out.nfe[b]
        for step in range(1, int(steps.max()) + 1):
            now = out.sequences[b, : known + n].clone()
            now[known:][steps >= step] = MASK
            chosen = known + (steps == step).nonzero()[:, 0]
            first = int((now == MASK).int().argmax())
            end = min(first + 8, known + n)
            assert first <= int(chosen.min()) <= int(chosen.max()) < end
            if "temperature" not in way and "suppress" not in way and "credit" not in str(way):
                logits = ours()(now[None, :end]).logits[0, chosen]
                logits[:, MASK] = -torch.inf
                assert logits.argmax(1).tolist() == out.sequences[b, chosen].tolist()


def test_a_mask_token_of_the_prompt_is_a_token() -> None:
    """As published, where the prompt's pass is causal whatever it holds."""
    x = ids(9, seed=4)
    x[[2, 5, 8]] = MASK
    expected = published(theirs(), x, 20, 16, 2.2, 0.05)
    check(dx.decode(ours(), x, gen_length=20, rule=RULE, record=True), expected)


def test_what_a_pass_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not stored up to the first mask and the window, and logits of the window's masks alone."""
    rows: list[tuple[int, int]] = []
    step, head = Model.step, Model.head
    monkeypatch.setattr(Model, "step", lambda self, x, *a: rows.append((len(x), 0)) or step(self, x, *a))

    def counted(self: Model, x: Tensor) -> Tensor:
        rows[-1] = rows[-1][0], len(x)
        return head(self, x)

    monkeypatch.setattr(Model, "head", counted)
    out = dx.decode(ours(), PROMPTS[3], gen_length=40, rule="quota:4", record=True)
    assert out.trajectory is not None
    steps, stored = out.trajectory.step[0].tolist(), -70
    for number, found in enumerate(rows, 1):
        masked = [i for i, at in enumerate(steps) if at >= number]
        end = min(masked[0] + 16, 40)
        assert found == (end - stored, len([i for i in masked if i < end]))
        stored = masked[0]
    assert len(rows) == int(out.nfe)
    assert max(computed for computed, _ in rows[1:]) <= 32


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.7, "seed": 5, "top_p": 0.9}], ids=["0", "0.7"])
def test_an_engine_gives_the_same_in_shared_pages(sampled: dict[str, Any]) -> None:
    prompts = [torch.cat((PROMPTS[2], PROMPTS[0][:n])) for n in (0, 1, 3, 5)]
    lengths, settings = (9, 40, 16, 17), {"rule": RULE, **sampled}
    expected = [dx.decode(ours(), p, gen_length=n, **settings) for p, n in zip(prompts, lengths, strict=True)]
    with dx.Engine(ours(), lanes=2, max_length=72, page_size=5, **settings) as engine:
        assert (engine.config.cache, engine.config.block_length) == ("window", 16)
        for _ in range(2):
            handles = [engine.submit(p, gen_length=n) for p, n in zip(prompts, lengths, strict=True)]
            streamed = [[token for part in handle for token in part] for handle in handles]
            found = [handle.result(60) for handle in handles]
            assert [each.tokens for each in found] == [out.responses[0].tolist() for out in expected]
            assert streamed == [each.tokens for each in found]
            assert [each.nfe for each in found] == [int(out.nfe[0]) for out in expected]
        assert all(each.reused >= 20 for each in found)
        # A response is shared, too, as far as it is stored.
        text = torch.cat((prompts[1], expected[1].responses[0]))
        assert engine.submit(text[:60], gen_length=4).result(60).reused >= 50
    with dx.Engine(ours(), share=False, max_length=72, **settings) as engine:
        assert engine.submit(prompts[1], gen_length=40).result(60).tokens == found[1].tokens


@pytest.mark.parametrize(
    "way",
    [{"rule": RULE}, {"threshold": 2.0, "block_length": 5}, {"rule": RULE, "temperature": 0.7, "seed": 5}],
    ids=str,
)
def test_passes_are_replayed(taped: list[Graphs], way: dict[str, Any]) -> None:
    """Where windows are, and what is known in them, are numbers of a pass and not part of its form."""
    model = models.wrap(theirs())  # without recordings
    settings: dict[str, Any] = {"gen_length": LENGTHS, "record": True, **way}
    expected = dx.decode(model, PROMPTS, graphs=False, **settings)
    out = dx.decode(model, PROMPTS, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert taped[0].recorder is not None, "a recording failed"
    assert taped[0].replays >= 5
    alone = dx.decode(model, PROMPTS[0], gen_length=40, **way)
    assert torch.equal(
        alone.responses[0], dx.decode(ours(), PROMPTS[0], gen_length=40, graphs=False, **way).responses[0]
    )


def test_a_streamer_gets_blocks() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []

        def put(self, tokens: Tensor) -> None:
            self.parts.append(tokens.flatten().tolist())

        def end(self) -> None:
            self.parts.append([])

    streamer = Streamer()
    out = dx.decode(ours(), PROMPTS[2], gen_length=33, block_length=4, rule=RULE, streamer=streamer)
    assert [*itertools.chain(*streamer.parts)] == out.sequences[0].tolist()
    assert {len(part) % 4 for part in streamer.parts[1:-2]} == {0}
    assert len(streamer.parts) > 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": "dual"}, 'cache: expected "window", by which WeDLM fills masks, got .dual.'),
        ({"cache": "none"}, 'cache: expected "window"'),
        ({"infill": True}, "infill: does not go with WeDLM, whose masks are a window behind the text"),
        ({"steps": 16}, "steps: the fixed schedule is for whole blocks, and here a window slides over them"),
        ({"active_blocks": 2, "threshold": 0.5}, "active_blocks: expected 1, got 2: .* a window slides"),
        ({"rule": "edit:0.03,0.05,4"}, "rule: Edit reads more than the masks of its window, .* WeDLM"),
        ({"rule": "eot:2"}, "rule: EndOfText reads more than the masks"),
        ({"draft_size": 2, "rule": RULE}, "draft_size: goes with policy rows .* got the rule Distance"),
        ({"block_length": 65}, "block_length: expected a window of at most 64 masks, got 65"),
        ({"block_length": 16, "sub_block_length": 8}, "sub_block_length: a window is filled as a whole"),
        ({"refresh": 2}, "refresh: belongs to cache"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dx.decode(ours(), PROMPTS[0], gen_length=16, **settings)
    with pytest.raises(ValueError, match=said), dx.Engine(ours(), max_length=64, **settings):
        pass


def test_a_form_is_refused() -> None:
    pytest.importorskip("outlines_core")
    from forms import a_form

    with pytest.raises(ValueError, match="automaton: does not go with WeDLM"):
        dx.decode(ours(), PROMPTS[0], gen_length=16, automaton=a_form(1))


def test_other_models_have_no_window() -> None:
    from conftest import golden

    with pytest.raises(ValueError, match=r'cache: expected "none", "prefix" or "dual", .* got .window.'):
        dx.decode(golden.model("llada_tiny_a"), PROMPTS[0], cache="window")
    with pytest.raises(ValueError, match=r'cache: expected "block" or "none" .* got .window.'):
        dx.decode(golden.model("sdar_tiny_a"), PROMPTS[0], cache="window")


def test_no_tokens() -> None:
    out = dx.decode(ours(), PROMPTS, gen_length=[0, 3, 0, 1])
    assert [len(response) for response in out.responses] == [0, 3, 0, 1]
    assert out.nfe_published.tolist() == [0, 5, 0, 3]
    without = dx.decode(ours(), [[]], gen_length=5, record=True, rule=RULE)
    assert int(without.nfe_published) == int(without.nfe) + 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wedlm")
    theirs().save_pretrained(directory)
    words = {"?": 0, "[MASK]": MASK} | {f"w{i}": i for i in range(1, VOCABULARY - 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_the_server(checkpoint: Path) -> None:
    model, tokenizer = registry.load(str(checkpoint))
    asked = {"model": "wedlm", "prompt": "w5 w7 w9", "max_tokens": 24, "policy": RULE}
    engine = {"cache": "window", "block_length": 16}
    with serving((model, tokenizer), name="wedlm", max_length=64, engine=engine) as here:
        status, answer = here.ask(asked)
        out = dx.decode(ours(), [[5, 7, 9]], gen_length=24, rule=RULE, eos_id=EOS)
        assert (status, answer["usage"]["forward_passes"]) == (200, int(out.nfe))
        assert answer["choices"][0]["text"] == tokenizer.decode(out.responses[0][: int(out.kept)].tolist())
        for name, value in (
            ("structured_outputs", {"choice": ["w5"]}),
            ("suffix", "w3"),
            ("policy", "eot:2"),
        ):
            status, answer = here.ask({**asked, name: value})
            assert (status, answer["error"]["param"]) == (400, name)
            assert "does not go with WeDLM" in answer["error"]["message"]


def test_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    shared = ("--model", str(checkpoint), "--gen-length", "24", "--policy", RULE)

    def run(*command: str) -> str:
        result = CliRunner().invoke(app, [command[0], *shared, *command[1:]])
        assert result.exit_code == 0, result.output
        return result.output

    out = dx.decode(ours(), [[5, 7, 9]], gen_length=24, rule=RULE, eos_id=EOS)
    row = json.loads(run("decode", "--json", "w5 w7 w9"))
    assert row["response"] == tokenizer.decode(out.responses[0][: int(out.kept)].tolist())
    assert row["forwards"] == int(out.nfe)
    result = CliRunner().invoke(app, ["decode", *shared, "w5", "--suffix", "w7"])
    assert (result.exit_code, result.output[:26]) == (2, "error: suffix: does not go")
    (tmp_path / "prompts.jsonl").write_text("w5 w7 w9\n")
    given = ("--prompts", str(tmp_path / "prompts.jsonl"), "--repeats", "1")
    run("tune", str(tmp_path / "tuned.json"), *given)
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert (content["rule"], content["cache"], content["block_length"]) == (RULE, "window", 16)
    output = run("evaluate", "--data", str(tmp_path / "prompts.jsonl"), "--checker", "none")
    assert float(output.splitlines()[-1].split()[1]) <= int(out.nfe)
