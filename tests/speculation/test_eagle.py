"""EAGLE-3 and P-EAGLE: files as published, their drafts in plain torch, the text with them."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from drafters import Knowing, eagle_tensors, model_of
from safetensors.torch import load_file, save_file
from test_dflash import Heard, attended, layer, norm, turned
from test_speculate import PROMPTS, plain
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.models import Model
from dparallel_ext.speculation import Drafter, EagleDrafter, TreeDrafter, drafter_of

pytest_plugins = ["taping"]

TARGET = model_of(num_hidden_layers=8, eos_token_id=[5, 9])
VOCABULARY, WIDTH, LAYERS = 61, 32, 8
THETA = 5000.0


class Head(NamedTuple):
    """A drafter as it is published."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    taps: tuple[int, ...]
    """The layers whose outputs are tapped, -1: the embedding."""
    parallel: bool

    def write(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        save_file({name: t.clone() for name, t in self.tensors.items()}, path / "model.safetensors")
        return path


def layers_config(**changes: Any) -> dict[str, Any]:
    return {
        **{"model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40},
        **{"rms_norm_eps": 1e-6, "rope_theta": THETA, "hidden_act": "silu", "rope_scaling": None},
        **{"max_position_embeddings": 16, "attention_bias": False, "sliding_window": None},
        **changes,
    }


def first(kind: str) -> Head:
    """The head of a kind."""
    if kind == "eagle3":  # SafeAILab's, and SpecForge's with another architecture
        t = eagle_tensors()
        for name in ("embed_tokens.weight", "mask_hidden"):
            del t[name]
        t = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in t.items()}
        config = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 40, **layers_config()}
        return Head(config, t, (1, 3, 4), False)
    if kind == "p-eagle":  # NeMo's, narrower than its target
        t = eagle_tensors(width=24, layers=3)
        t["mask_hidden"] = t["mask_hidden"].view(1, 1, -1)
        t = {name if "lm_head" in name else f"model.{name}": tensor for name, tensor in t.items()}
        config = layers_config(hidden_size=24, num_hidden_layers=3, draft_vocab_size=40, mask_token_id=60)
        config |= {"target_hidden_size": WIDTH, "parallel_drafting": True, "num_depths": 6}
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 3, 6], "use_aux_hidden_state": True}
        return Head(config, t, (1, 3, 6), True)
    parallel = kind == "speculators-p-eagle"
    size = {"layers": 2, "taps": 4} if parallel else {"qk_norm": True, "vocabulary": VOCABULARY}
    t = eagle_tensors(**size)  # type: ignore[arg-type]
    ids = [2, 4, 6, 8] if parallel else [0, 3, 8]
    config = {
        **{"speculators_model_type": "peagle" if parallel else "eagle3", "norm_before_residual": True},
        **{"draft_vocab_size": 40 if parallel else VOCABULARY, "eagle_aux_hidden_state_layer_ids": ids},
        "transformer_layer_config": layers_config(
            model_type="llama" if parallel else "qwen3", num_hidden_layers=2 if parallel else 1
        ),
        **{"norm_before_fc": False, "target_hidden_size": None},
    }
    if parallel:
        config["mask_token_id"] = 60
    else:
        del t["mask_hidden"]
    return Head(config, t, tuple(id_ - 1 for id_ in ids), parallel)


KINDS = {kind: first(kind) for kind in ("eagle3", "speculators-eagle3", "p-eagle", "speculators-p-eagle")}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: head.write(tmp_path_factory.mktemp(kind)) for kind, head in KINDS.items()}


# --- the whole computation in plain torch ---------------------------------------------------------


@functools.cache
def doubles(target: Model) -> dict[str, Tensor]:
    return {name: p.double() for name, p in target.state_dict().items()}


def streams(target: Model, tokens: Tensor) -> dict[int, Tensor]:
    """The target's embeddings, -1, and the output of each of its layers, (n, width) in float64."""
    t = doubles(target)
    x = t["model.embed_tokens.weight"][tokens]
    found, places = {-1: x}, torch.arange(len(tokens))
    for i in range(target.shape.layers):
        x = layer(t, f"model.layers.{i}.", x, places, places[:, None] >= places, 1000.0, 1e-5)
        found[i] = x
    return found


def behind(head: Head, embedded: Tensor, feature: Tensor) -> Tensor:
    """The output (n, width) of the layers of a head for pairs (n, width) at positions 0, 1, ..."""
    w = {name.removeprefix("model.").replace("midlayer", "layers.0"): t for name, t in head.tensors.items()}
    w = {name: t.double() for name, t in w.items()}
    config = head.config.get("transformer_layer_config", head.config)
    x, places = feature, torch.arange(len(feature))
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        if i:
            y = norm(x, w[f"{at}input_layernorm.weight"])
        else:
            normed = norm(x, w[f"{at}hidden_norm.weight"])
            y = torch.cat((norm(embedded, w[f"{at}input_layernorm.weight"]), normed), -1)
            x = normed if head.config.get("norm_before_residual") else x
        q, k, v = ((y @ w[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, 8)) for n in "qkv")
        if f"{at}self_attn.q_norm.weight" in w:
            q, k = norm(q, w[f"{at}self_attn.q_norm.weight"]), norm(k, w[f"{at}self_attn.k_norm.weight"])
        y = attended(turned(q, places, THETA), turned(k, places, THETA), v, places[:, None] >= places)
        x = x + y @ w[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return x


def guessed(head: Head, target: Model, tokens: Tensor, draft: tuple[int, ...]) -> Tensor:
    """Logits (len(draft), V) of the target's tokens at each guess, behind tokens (n,) whose last is the root,
    and behind the guesses of the draft so far; -inf for tokens that the head does not have."""
    w = {name.removeprefix("model."): t.double() for name, t in head.tensors.items()}
    tapped, count = streams(target, tokens[:-1]), len(draft)
    feature = torch.cat([tapped[tap] for tap in head.taps], -1) @ w["fc.weight"].T
    table = w.get("embed_tokens.weight", target.state_dict()["model.embed_tokens.weight"].double())
    if head.parallel:
        mask = w["mask_hidden"].view(1, -1) @ w["fc.weight"].T
        ids = torch.tensor([*tokens[1:].tolist(), *[60] * (count - 1)])
        rows = behind(head, table[ids], torch.cat((feature, mask.expand(count - 1, -1))))[-count:]
    else:
        ids, rows = tokens[1:], feature[:0]
        for step in range(count):
            rows = torch.cat((rows, behind(head, table[ids], torch.cat((feature, rows)))[-1:]))
            ids = torch.cat((ids, torch.tensor(draft[step : step + 1])))
    own = norm(rows, w["norm.weight"]) @ w["lm_head.weight"].T
    places = torch.arange(own.shape[1]) + head.tensors.get(
        "d2t", head.tensors.get("model.d2t", torch.tensor(0))
    )
    return torch.full((count, VOCABULARY), -math.inf, dtype=torch.float64).index_copy_(1, places, own)


class HeardHead(Heard):
    """Compares with the head's computation."""

    def __init__(self, path: Path, head: Head, instead: Knowing | None = None) -> None:
        super().__init__(dx.speculation.load(path), instead)  # type: ignore[arg-type]
        self.head = head

    def compare(self, target: Model) -> int:
        """Tokens that are what the plain computation says."""
        count = 0
        for tokens, size, _, draft in self.heard:
            if len(tokens) == 1:
                assert not draft.tokens
                continue
            assert len(draft.tokens) == min(size, self.most)
            logits = guessed(self.head, target, tokens, draft.tokens)
            chosen = logits.gather(1, torch.tensor(draft.tokens)[:, None])[:, 0]
            assert bool((chosen >= logits.max(1).values - 1e-3).all()), (tokens, draft)
            count += int((logits.argmax(1) == torch.tensor(draft.tokens)).sum())
        return count


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_is_its_computation_in_plain_torch(paths: dict[str, Path], kind: str, tree: bool) -> None:
    """Whatever was refused, and wherever a tree's accepted tokens were."""
    expected = plain(TARGET)
    heard = HeardHead(paths[kind], KINDS[kind], Knowing(list(expected.sequences), tree=tree, right=0.7))
    found = plain(TARGET, drafter=heard, draft_size=4)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.nfe.sum() < expected.nfe.sum()
    tokens = sum(len(draft.tokens) for *_, draft in heard.heard)
    assert tokens > 80
    assert heard.compare(TARGET) >= tokens - 1  # but for a tie


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_is_made_twice_is_the_same(paths: dict[str, Path], kind: str) -> None:
    """An engine makes it again, sequence by sequence, behind a pass that has raised."""

    class Twice(EagleDrafter):
        def session(self, *args: Any, **settings: Any) -> Any:
            made = super().session(*args, **settings)
            propose = made.propose

            def twice(lanes: Any, sizes: Any) -> Any:
                first = propose(lanes, sizes)
                pairs = zip(lanes, sizes, strict=True)
                again = [propose([lane], [size])[0] for lane, size in pairs]
                compared.extend(zip(first, again, strict=True))
                return again

            made.propose = twice
            return made

    compared: list[tuple[Any, Any]] = []
    drafter = dx.speculation.load(paths[kind])
    assert isinstance(drafter, EagleDrafter)
    expected = plain(TARGET, drafter=drafter, draft_size=4)
    found = plain(TARGET, drafter=Twice(drafter.model), draft_size=4)
    assert all(a == b for a, b in compared)
    assert len(compared) > 50
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.nfe, expected.nfe)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engines_shared_pages_hold_its_features_too(paths: dict[str, Path], kind: str) -> None:
    """And few pages, evicted and used again; texts part in the middle of a page and at its end."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(10, 60, (24,), generator=generator)
    prompts = [torch.cat((common, torch.randint(10, 60, (n,), generator=generator))) for n in range(1, 7)]
    expected = plain(TARGET, prompts=prompts, gen_length=12)
    heard = HeardHead(paths[kind], KINDS[kind], Knowing(list(expected.sequences), right=0.7))
    settings: dict[str, Any] = {"lanes": 2, "max_length": 48, "page_size": 8, "pages": 12, "draft_size": 3}
    with dx.Engine(TARGET, drafter=heard, **settings) as engine:
        results = [h.result(60) for h in [engine.submit(p, gen_length=12, eos_id=-1) for p in prompts]]
    assert [result.tokens for result in results] == [response.tolist() for response in expected.responses]
    assert [result.reused for result in results[2:]] == [24] * 4
    assert heard.compare(TARGET) > 60


@functools.cache
def without(temperature: float) -> list[tuple[dict[str, Any], dict[str, Any], dx.SpeculateOutput]]:
    """Settings, more of them for a drafter, and the text without one."""
    settings: dict[str, Any] = {"temperature": temperature, "seed": 7, "gen_length": [24, 30, 1, 11]}
    stop = plain(TARGET, **settings).responses[0][6:8].tolist()
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({}, {"draft_size": 99}),
        ({"suppress": [3, 17]}, {"draft_size": 3}),
        ({"eos_id": None}, {"draft_size": 2, "batch_invariant": True}),
        ({"stop": [stop]}, {"draft_size": 4}),
    ]
    texts = [plain(TARGET, **{**settings, **ending}) for ending, _ in ways]
    return [({**settings, **ending}, more, text) for (ending, more), text in zip(ways, texts, strict=True)]


def loaded(paths: dict[str, Path], kind: str) -> Drafter:
    drafter = drafter_of(f"tree:{paths['eagle3']}" if kind == "tree" else str(paths[kind]))
    assert drafter is not None
    return drafter


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [*KINDS, "tree"])
def test_it_changes_no_token(paths: dict[str, Path], kind: str, temperature: float) -> None:
    drafter = loaded(paths, kind)
    for settings, more, expected in without(temperature):
        found = plain(TARGET, drafter=drafter, **settings, **more)
        assert torch.equal(found.sequences, expected.sequences), (settings, more)
    assert int(found.draft_forwards) > 0


@pytest.mark.parametrize("kind", ["p-eagle", "speculators-p-eagle"])
def test_trees_of_p_eagle_change_no_token(paths: dict[str, Path], kind: str) -> None:
    expected = plain(TARGET)
    drafter = drafter_of(f"tree:{paths[kind]}")
    assert isinstance(drafter, TreeDrafter)
    found = plain(TARGET, drafter=drafter, draft_size=20)
    assert torch.equal(found.sequences, expected.sequences)
    chain = plain(TARGET, drafter=str(paths[kind]), draft_size=8)
    assert found.accepted.sum() > chain.accepted.sum()


def test_what_the_model_never_chooses_is_not_drafted(paths: dict[str, Path]) -> None:
    for kind in ("eagle3", "p-eagle"):
        heard = HeardHead(paths[kind], KINDS[kind])
        plain(TARGET, drafter=heard, draft_size=4)
        every = [token for *_, draft in heard.heard for token in draft.tokens]
        often = sorted({*every}, key=every.count)[-3:]
        heard.heard.clear()
        plain(TARGET, drafter=heard, draft_size=4, suppress=often)
        every = [token for *_, draft in heard.heard for token in draft.tokens]
        assert len(every) > 80
        assert not {*often}.intersection(every)
        # Nor is anything, where that is all that the head can guess.
        heard.heard.clear()
        d2t = next(t for name, t in KINDS[kind].tensors.items() if name.endswith("d2t"))
        plain(TARGET, drafter=heard, draft_size=4, suppress=(torch.arange(40) + d2t).tolist())
        assert {draft.tokens for *_, draft in heard.heard} == {()}


def test_other_families_and_16_bits(paths: dict[str, Path]) -> None:
    for family, dtype in (("llama", torch.float32), ("qwen2", torch.bfloat16)):
        model = model_of(family, dtype=dtype, num_hidden_layers=8)
        for kind in ("eagle3", "p-eagle", "tree"):
            found = plain(model, drafter=loaded(paths, kind), draft_size=4)
            same = [torch.equal(a, b) for a, b in zip(found.responses, plain(model).responses, strict=True)]
            assert sum(same) >= (4 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("kind", [*KINDS, "tree"])
def test_recorded_drafts_are_the_same(
    paths: dict[str, Path], kind: str, request: pytest.FixtureRequest
) -> None:
    """On a tape in place of a GPU: drafts wait for nothing, and read nothing from the host."""
    settings: dict[str, Any] = {
        "drafter": loaded(paths, kind),
        "draft_size": 4,
        "gen_length": 40,
    }
    prompts = [PROMPTS[0], PROMPTS[2]]
    expected = plain(TARGET, prompts=prompts, suppress=[3], **settings)
    taped = request.getfixturevalue("taped")
    found = plain(TARGET, prompts=prompts, suppress=[3], **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.accepted, expected.accepted)
    assert len(taped) == 2
    assert all(graphs.replays > 5 for graphs in taped)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_file_is_read_again(paths: dict[str, Path], kind: str, tmp_path: Path) -> None:
    drafter = drafter_of(str(paths[kind]))
    assert isinstance(drafter, EagleDrafter)
    name = "P-EAGLE" if KINDS[kind].parallel else "EAGLE-3"
    assert repr(drafter) == f"EagleDrafter({name}, most={6 if kind == 'p-eagle' else 8})"
    drafter.save(tmp_path / "saved", torch.float32)
    again = dx.speculation.load(tmp_path / "saved")
    assert isinstance(again, EagleDrafter)
    assert again.options == drafter.options
    state = drafter.model.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in again.model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("eagle3", {"hidden_size": None}, "'hidden_size' is null"),
        (
            "eagle3",
            {"model_type": "gemma"},
            r"model_type='gemma' is not supported, only \['llama', 'qwen3'\]",
        ),
        ("eagle3", {"model_type": []}, r"model_type=\[\] is not supported"),
        ("eagle3", {"fc_norm": True}, "fc_norm=True is not supported"),
        ("eagle3", {"norm_output": True}, "norm_output=True is not supported"),
        ("eagle3", {"norm_before_fc": True}, "norm_before_fc=True is not supported"),
        ("eagle3", {"draft_vocab_size": 0}, "draft_vocab_size=0, expected a whole number >= 1"),
        (
            "eagle3",
            {"eagle_config": {"use_aux_hidden_state": False}},
            "use_aux_hidden_state=False is not supp",
        ),
        ("eagle3", {"sliding_window": 8}, "sliding_window=8 is not supported"),
        (
            "eagle3",
            {"eagle_aux_hidden_state_layer_ids": [2, 1]},
            r"eagle_aux_hidden_state_layer_ids: expected ascending numbers of layers of \[0, 1000\), got",
        ),
        (
            "eagle3",
            {"parallel_drafting": True},
            "expected the mask's id as one of pard_token, ptd_token_id, mask",
        ),
        ("p-eagle", {"mask_token_id": None}, "expected the mask's id as one of"),
        ("p-eagle", {"pard_token": 3}, r"expected the mask's id as one of .*, got \[3, 60\]"),
        ("p-eagle", {"para_depths": 5}, r"expected num_depths and para_depths alike, got \[5, 6\]"),
        ("p-eagle", {"mask_token_id": 61}, "mask_token_id=61, expected an id below 61"),
        (
            "speculators-eagle3",
            {"speculators_model_type": "dflash"},
            "speculators_model_type='dflash' is not sup",
        ),
        ("speculators-eagle3", {"transformer_layer_config": None}, "'transformer_layer_config' is null"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    head = KINDS[kind]
    head._replace(config=head.config | change).write(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        dx.speculation.load(tmp_path)
    assert str(raised.value).startswith(f"path: {tmp_path}: ")


def test_a_default_that_libraries_disagree_about_is_not_taken(tmp_path: Path) -> None:
    head = KINDS["speculators-eagle3"]
    del (config := dict(head.config))["norm_before_residual"]
    head._replace(config=config).write(tmp_path)
    with pytest.raises(ValueError, match="'norm_before_residual' is missing"):
        dx.speculation.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("eagle3", {"d2t": None}, "d2t is missing"),
        ("eagle3", {"d2t": torch.zeros(40)}, "d2t is torch.float32, expected torch.int64"),
        ("eagle3", {"d2t": torch.zeros(40, dtype=torch.bool)}, "d2t is torch.bool, expected torch.int64"),
        (
            "eagle3",
            {"model.fc.weight": torch.zeros(32, 96)},
            "fc.weight: expected fc.weight once, got it by two",
        ),
        ("eagle3", {"d2t": torch.full((40,), 22)}, "d2t: expected the target's ids below 61, got 22 to 61"),
        ("eagle3", {"d2t": torch.full((40,), -1)}, "got -1 to 38"),
        ("eagle3", {"fc.weight": torch.zeros(32, 128)}, r"fc.weight is \(32, 128\), expected \(32, 96\)"),
        ("eagle3", {"fc.bias": torch.zeros(32)}, "fc.bias is unexpected"),
        ("eagle3", {"lm_head.weight": None}, "lm_head.weight is missing"),
        ("eagle3", {"mask_hidden": torch.zeros(1, 96)}, "expected the mask's id as one of"),
        ("p-eagle", {"model.mask_hidden": None}, "mask_hidden is missing"),
        ("p-eagle", {"model.mask_hidden": torch.zeros(1, 32)}, r"mask_hidden is \(32,\), expected \(96,\)"),
        ("p-eagle", {"model.embed_tokens.weight": None}, "embed_tokens.weight is missing"),
        (
            "speculators-p-eagle",
            {"layers.1.hidden_norm.weight": torch.zeros(32)},
            "hidden_norm.weight is unexpec",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, kind: str, change: dict[str, Tensor | None], message: str
) -> None:
    head = KINDS[kind]
    tensors = {name: t for name, t in {**head.tensors, **change}.items() if t is not None}
    head._replace(tensors=tensors).write(tmp_path)
    with pytest.raises(ValueError, match=message):
        dx.speculation.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_two_dtypes_is_read(tmp_path: Path, kind: str) -> None:
    """As of norms in float32 beside weights in bfloat16."""
    head = KINDS[kind]
    mixed = {name: t.half() if "norm" in name else t for name, t in head.tensors.items()}
    guesses = []
    for tensors in (mixed, {name: t if t.dtype == torch.int64 else t.float() for name, t in mixed.items()}):
        drafter = dx.speculation.load(head._replace(tensors=tensors).write(tmp_path))
        dtypes = {p.dtype for p in drafter.on(torch.device("cpu"), torch.float32).parameters()}  # type: ignore[attr-defined]
        assert dtypes == {torch.float32}
        found = plain(model_of(num_hidden_layers=8), drafter=drafter, draft_size=4, record=True)
        guesses.append(found.passes)
    assert guesses[0] == guesses[1]


def test_older_files_are_not_read(tmp_path: Path) -> None:
    head = KINDS["eagle3"]
    head.write(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    said = r"no file .*model\.safetensors; pytorch_model\.bin is not read, safetensors\.torch\.save_file"
    with pytest.raises(FileNotFoundError, match=said):
        dx.speculation.load(tmp_path)


def test_another_model_is_refused_before_anything_runs(paths: dict[str, Path]) -> None:
    for kind, target, message in (
        (
            "eagle3",
            model_of(vocab_size=62, num_hidden_layers=8),
            "a vocabulary of 61 tokens, and the model has 62",
        ),
        (
            "p-eagle",
            model_of(hidden_size=40, num_hidden_layers=8),
            "a model of width 32, and the model has 40",
        ),
        ("eagle3", model_of(num_hidden_layers=6), r"of layers of \[-1, 6\), got \(1, 2, 2\)"),
        ("speculators-eagle3", model_of(num_hidden_layers=7), r"of layers of \[-1, 7\), got \(-1, 2, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(target, drafter=str(paths[kind]))
