"""The trainer of drafters: its blocks and weights against loops, resuming, the command, and its refusals."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import cli, registry
from dparallel.toy import tasks, train
from dparallel.training import drafters
from dparallel.training.drafters import adadecode, answers, blocks
from dparallel.training.drafters.adadecode import ExitSettings
from dparallel.training.drafters.blocks import BlockSettings
from dparallel.training.drafters.common import DrafterSettings, Target
from dparallel.training.drafters.riders import PromptSettings, StridedSettings, TransferSettings
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.ops import errors
from dparallel_ext.speculation.adadecode import ExitHeads
from dparallel_ext.speculation.checkpoint import Origin
from dparallel_ext.speculation.dflash import DFlashOptions

EXITS = ExitSettings(steps=6, batch=4, anchors=3, gen_length=12, warmup=2)
TINY = BlockSettings(steps=6, batch=4, anchors=3, layers=1, mlp_width=24, gen_length=12, warmup=2)
OF_KIND: dict[str, Any] = {
    **{kind: replace(TINY, kind=kind) for kind in blocks.KINDS},
    "ppd": PromptSettings(steps=6, batch=4, anchors=3, gen_length=12, warmup=2),
    "hidden_transfer": TransferSettings(steps=6, batch=4, anchors=3, gen_length=12, warmup=2),
    "strided": StridedSettings(steps=6, batch=4, anchors=3, gen_length=12, warmup=2, rank=4),
    "adadecode": EXITS,
}
MASK = tasks.vocabulary().index(tasks.MASK)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("target")
    settings = train.ToySettings(steps=1, batch=2, width=32, layers=2, heads=2, mlp_width=32, causal=True)
    return train.train(out, settings, progress=False, evaluate=0)


def run(target: Path, out: Path, settings: DrafterSettings = TINY, **more: Any) -> dict[str, Tensor]:
    given = {"data": "builtin:40", "evaluate": 0, "save_every": 2, "progress": False, **more}
    drafters.run(str(target), out, settings=settings, **given)
    return load_file(out / drafters.KINDS[settings.kind].file)


@pytest.mark.parametrize("kind", drafters.KINDS)
def test_same_settings_same_drafter_and_a_stopped_run_goes_on_as_if_it_had_not(
    target: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = OF_KIND[kind]
    expected = run(target, tmp_path / "whole", settings)
    original, calls = drafters.KINDS[kind].loss_of, itertools.count()

    def stopping(*args: Any) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(drafters.KINDS[kind], "loss_of", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(target, tmp_path / "part", settings)
    assert torch.load(tmp_path / "part" / "state.pt", weights_only=True)["step"] == 4
    file = drafters.KINDS[kind].file
    assert not (tmp_path / "part" / file).exists()
    with monkeypatch.context() as patch:  # the answers are there
        patch.setattr(answers, "answer_all", None)
        resumed = run(target, tmp_path / "part", settings)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"out: .* holds a run with other settings: \{'seed': 0\}"):
        run(target, tmp_path / "part", replace(settings, seed=1))
    with pytest.raises(ValueError, match=r"steps: .* holds a run of 6 steps, expected at least .*, got 5"):
        run(target, tmp_path / "part", replace(settings, steps=5))
    with pytest.raises(ValueError, match=r"out: .*answers-00000.* holds answers of another run"):
        run(target, tmp_path / "part", settings, data="builtin:41")
    (tmp_path / "part" / "state.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not the state of a run"):
        run(target, tmp_path / "part", settings)
    after = load_file(tmp_path / "part" / file)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_what_it_writes_drafts(target: Path, tmp_path: Path) -> None:
    """By the command, on prompts of a file, some of which it is judged by."""
    out, data = tmp_path / "out", tmp_path / "prompts.jsonl"
    problems = itertools.islice(tasks.problems("train"), 30)
    data.write_text("".join(json.dumps({"question": p.prompt}) + "\n" for p in problems))
    options = {"data": data, "prompt-field": "question", "evaluate": 5, "steps": 3, "batch": 2, "anchors": 2}
    options |= {"layers": 2, "block": 5, "taps": "-1,1", "gen-length": 10, "loss": "exp", "kind": "dflash"}
    args = [str(each) for key, value in options.items() for each in (f"--{key}", value)]
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(out), *args])
    assert found.exit_code == 0, found.output
    assert "5 held out" in found.output
    report = json.loads((out / "training.json").read_text())
    held = report["held_out"]
    assert 20 < report["answers"] <= 25  # some begin with the mask token
    assert held["prompts"] == 5
    assert len(held["accepted"]) == 4
    assert held["tokens"] / held["passes"] == pytest.approx(held["tokens_per_pass"])
    assert report["bytes"] == (out / "model.safetensors").stat().st_size
    drafter = dx.speculation.load(out)
    model, _ = registry.load(str(target))
    fingerprint = models.fingerprint(model)
    assert drafter.options[1:] == ("dflash", (-1, 1), 5, False, MASK, 2, Origin("dflash", fingerprint))
    prompts = [torch.tensor([3, 4, 5])]
    expected = dx.speculate(model, prompts, gen_length=12)
    assert torch.equal(dx.speculate(model, prompts, gen_length=12, drafter=out).sequences, expected.sequences)


def test_the_target_is_loaded_in_the_dtype(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in another dtype is another; runs of older versions, which name none, were in "auto"."""
    loaded: list[torch.dtype] = []

    def load(*args: Any, **keywords: Any) -> Any:
        model, tokenizer = real(*args, **keywords)
        loaded.append(model.dtype)
        return model, tokenizer

    real = registry.load
    monkeypatch.setattr(registry, "load", load)
    half, plain = tmp_path / "half", tmp_path / "plain"
    options = ["--dtype", "float16", "--data", "builtin:9", "--steps", "1", "--batch", "2", "--evaluate", "0"]
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(half), *options, "--gen-length", "12"])
    assert found.exit_code == 0, found.output
    assert loaded == [torch.float16]
    expected = run(target, plain)
    with pytest.raises(ValueError, match=r"out: .* holds answers of another run: .*, expected .*float16"):
        run(target, plain, replace(TINY, dtype="float16"))
    state = torch.load(plain / "state.pt")
    del state["settings"]["dtype"]
    torch.save(state, plain / "state.pt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run(target, plain).items())


@pytest.mark.parametrize("kind", [*blocks.KINDS, "hidden_transfer"])
def test_it_learns_what_can_be_known(tmp_path: Path, kind: str) -> None:
    """The target says a token after its last one alone, round and round."""
    torch.manual_seed(0)
    sizes = train.ToySettings(width=32, heads=2, layers=2, mlp_width=32)
    model = models.Qwen3(train.causal_config(sizes)).eval()
    with torch.no_grad():
        model.embed.weight.normal_()
        model.lm_head.weight.zero_()
        for token in range(8):
            model.lm_head.weight[10 + (token + 1) % 8] = model.embed.weight[10 + token]
        for block in model.blocks:
            block.o.weight.zero_()
            block.down.weight.zero_()
    settings = replace(OF_KIND[kind], steps=50, batch=8, gen_length=16, muon_lr=1e-2, adam_lr=1e-2, ema=0.9)
    if kind in blocks.KINDS:
        settings = replace(settings, block=5, mask_id=MASK)
    loaded = model, train.tokenizer()
    report = drafters.run(
        "ring", tmp_path, "builtin:40", settings, evaluate=20, loaded=loaded, progress=False
    )
    held = report["held_out"]
    assert held["tau"] > 3, held
    assert held["tokens"] == 16
    assert held["passes"] < 8
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_heads_of_first_layers_learn_what_the_whole_model_says(target: Path, tmp_path: Path) -> None:
    """At the places of the answers, by KL."""
    model = registry.load(str(target))[0].float().requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.o, block.down):
                part.weight.normal_(std=0.3)
    texts = [(torch.randint(3, 90, (n,)), prompt) for n, prompt in ((12, 3), (9, 7), (20, 2))]
    ids, places = adadecode.flat_places_of(texts, 4, torch.Generator().manual_seed(0))
    assert len(places) == 4 + 2 + 4
    for b, (text, prompt) in enumerate(texts):
        own = [int(at) - b * 20 for at in places if b * 20 <= at < (b + 1) * 20]
        assert all(prompt - 1 <= at <= len(text) - 2 for at in own)
        assert len(set(own)) == min(4, len(text) - prompt)
    trainee = adadecode.ExitHeadsTrainee(Target("tiny", model, None, False), replace(EXITS, batch=3))
    assert trainee.options.layers == (1,)
    heads = trainee.module = trainee.build()
    with torch.no_grad():
        streams = models.Taps((0,))
        p = model.head(model.hidden(ids, taps=streams)).double().softmax(-1).flatten(0, 1)[places]
        q = model.head(model.norm(streams[0])).double().softmax(-1).flatten(0, 1)[places]
    expected = (p * (p / q).log()).sum(-1).mean()  # each matrix is the identity at first
    assert adadecode.loss_of(heads, model, ids, places).item() == pytest.approx(float(expected), rel=1e-4)
    run(target, tmp_path, EXITS)
    with pytest.raises(
        ValueError, match=r"exits: expected ascending numbers of layers of \[1, 2\), got \(2,\)"
    ):
        run(target, tmp_path / "none", replace(EXITS, exits=(2,)))
    assert not (tmp_path / "none").exists()
    for name, value, message in (
        ("gamma", 1.5, "gamma: expected a number from 0 to 1, got 1.5"),
        ("most", 0, "most: expected a whole number >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(EXITS, **{name: value})
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for step in range(60):
        loss = trainee.loss_of(texts, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5 * expected.item()


def test_what_a_gpu_finds_bad_ends_the_run_by_its_name(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a loss does not look; the run does after each step, before it saves."""
    monkeypatch.setattr(errors, "waits", lambda device: True)
    monkeypatch.setattr(errors, "pending", {})
    forward = ExitHeads.forward
    monkeypatch.setattr(ExitHeads, "forward", lambda *given: torch.nan * forward(*given))
    with pytest.raises(ValueError, match="student: row 0 holds NaN"):
        run(target, tmp_path, EXITS)
    assert not (tmp_path / "state.pt").exists()


def test_heads_are_trained_by_the_command(target: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"kind": "adadecode", "exits": "1", "gamma": 0.2, "most": 5, "steps": 3, "gen-length": 10}
    options |= {"data": "builtin:30", "evaluate": 5, "batch": 2}
    args = [str(each) for key, value in options.items() for each in (f"--{key}", value)]
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(out), *args])
    assert found.exit_code == 0, found.output
    assert "of the model's layers for a token" in found.output
    held = json.loads((out / "training.json").read_text())["held_out"]
    assert 0 <= held["accepted_share"] <= 1
    assert held["layers"] >= 0.5
    drafter = dx.speculation.load(out)
    assert drafter.options[3:6] == ((1,), 0.2, 5)
    prompts = [torch.tensor([3, 4, 5])]
    model, _ = registry.load(str(target))
    expected = dx.speculate(model, prompts, gen_length=12)
    assert torch.equal(dx.speculate(model, prompts, gen_length=12, drafter=out).sequences, expected.sequences)
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(out), "--exits", "a"])
    assert found.exit_code != 0
    assert 'exits: expected numbers as "1,9,17", got' in found.output
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(out), "--exits", "1"])
    assert "exits: belongs to adadecode, not to dflash" in found.output


@pytest.mark.parametrize(("kind", "more"), [("ppd", {}), ("hidden_transfer", {"layer": 1})])
def test_riders_are_trained_by_the_command(
    target: Path, tmp_path: Path, kind: str, more: dict[str, int]
) -> None:
    out = tmp_path / "out"
    options = {"kind": kind, "riders": 2, "soften": 1.5, "steps": 3, "gen-length": 10, **more}
    options |= {"data": "builtin:30", "evaluate": 5, "batch": 2}
    args = [str(each) for key, value in options.items() for each in (f"--{key}", value)]
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(out), *args])
    assert found.exit_code == 0, found.output
    report = json.loads((out / "training.json").read_text())
    assert report["parameters"] == {"ppd": 2 * 32, "hidden_transfer": 2 * 32 * 32}[kind]
    assert len(report["held_out"]["accepted"]) <= 2
    assert report["settings"]["soften"] == 1.5
    drafter = dx.speculation.load(out)
    assert (drafter.model.KIND, drafter.model.most, drafter.model.layer) == (kind, 2, len(more))
    assert [len(row) for row in drafter.ranks] == [10, 10]
    prompts = [torch.tensor([3, 4, 5])]
    model, _ = registry.load(str(target))
    expected = dx.speculate(model, prompts, gen_length=12)
    assert torch.equal(dx.speculate(model, prompts, gen_length=12, drafter=out).sequences, expected.sequences)


def test_what_riders_cannot_be_trained_by_is_named(target: Path, tmp_path: Path) -> None:
    riders, transfer = OF_KIND["ppd"], OF_KIND["hidden_transfer"]
    for change, message in (
        ({"riders": 0}, "riders: expected a whole number >= 1"),
        ({"riders": 17}, "riders: expected a whole number"),
        ({"soften": 0}, "soften: expected a number above 0 and at most 100, got 0"),
        ({"soften": "1"}, "soften: expected a finite number >= 0, got '1'"),
        ({"kind": "hidden_transfer"}, r"kind: expected one of \['ppd'\], got 'hidden_transfer'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(riders, **change)
    with pytest.raises(ValueError, match=r"layer: expected one of \[1, 2\), got 2"):
        run(target, tmp_path / "out", replace(transfer, layer=2))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="data: expected at least 10 answers, of which a tenth measures"):
        run(target, tmp_path / "out", riders, data="builtin:9")
    for kind, option, owners in (
        ("ppd", "layer", "hidden_transfer, not to ppd"),
        ("dflash", "riders", "ppd, hidden_transfer, strided, not to dflash"),
    ):
        args = ["drafter", str(target), str(tmp_path / "none"), "--kind", kind, f"--{option}", "1"]
        found = CliRunner().invoke(cli.app, args)
        assert found.exit_code != 0
        assert f"{option}: belongs to {owners}" in found.output


def test_answers_are_the_targets_own(target: Path, tmp_path: Path) -> None:
    """Greedy or sampled, whatever they are computed beside."""
    model = registry.load(str(target))[0].float()
    prompts = [torch.arange(3, 3 + n) for n in (4, 9, 1)]
    for temperature in (0.0, 1.0):
        settings = replace(TINY, temperature=temperature, seed=2)
        found = answers.answer_all(model, prompts, settings, 7)
        for number, (prompt, (ids, length)) in enumerate(zip(prompts, found, strict=True)):
            (alone,) = answers.answer_all(model, [prompt], settings, 7 + number)
            assert torch.equal(ids, alone[0])
            assert length == len(prompt)
            assert torch.equal(ids[:length], prompt)
            ended = (ids[length:] == model.eos_id).nonzero()[:, 0].tolist()
            assert ended == [len(ids) - length - 1] or (not ended and len(ids) - length == 12)
    run(target, tmp_path / "a", replace(TINY, temperature=1.0))
    with pytest.raises(ValueError, match="holds answers of another run"):
        run(target, tmp_path / "a")


def test_blocks_are_packed_as_a_loop_would() -> None:
    texts = [(torch.arange(100, 100 + n), p) for n, p in ((12, 3), (9, 7), (20, 2))]
    config = blocks.block_config(
        models.Qwen3(train.causal_config(train.ToySettings(width=32, heads=2, layers=2))),
        TINY,
        MASK,
        Origin("dflash", None, None),
    )
    for kind in blocks.KINDS:
        options = DFlashOptions.of(config | {"dparallel": {"kind": kind}, "block_size": 5})
        packed = blocks.pack_blocks(texts, options, 4, torch.Generator().manual_seed(0))
        count, length = 4 * 5, packed.ids.shape[1]
        assert packed.labels.shape == (3, 4, 4)
        for b, (ids, prompt) in enumerate(texts):
            there = [a for a in range(4) if bool((packed.labels[b, a] >= 0).any())]
            places = [int(packed.positions[b, a * 5]) for a in there]
            assert len(set(places)) == len(places) == min(4, len(ids) - prompt - 1)
            assert all(prompt <= place <= len(ids) - 2 for place in places)
            for a, place in zip(there, places, strict=True):
                assert packed.rows[b, a * 5 : a * 5 + 5].tolist() == [int(ids[place]), *[MASK] * 4]
                assert packed.positions[b, a * 5 : a * 5 + 5].tolist() == [*range(place, place + 5)]
                after = ids[place + 1 : place + 5].tolist()
                assert packed.labels[b, a].tolist() == after + [-1] * (4 - len(after))
                for row in range(5):
                    seen = packed.visible[b, a * 5 + row]
                    last = row if kind == "parallelspec" else 4
                    assert seen.nonzero()[:, 0].tolist() == [
                        *range(place),
                        *range(length + a * 5, length + a * 5 + last + 1),
                    ]
        assert packed.visible.shape == (3, count, length + count)


def test_weights_of_rows() -> None:
    nll = torch.tensor([[[0.1, 2.0, 0.5], [0.0, 1.0, 9.0]]])
    asked = torch.tensor([[[True, True, True], [True, True, False]]])
    found = blocks.weights(nll, asked, "d-pace")
    for block in range(2):
        s = [0.5 * math.exp(-x) + 0.5 for x in nll[0, block].tolist()]
        count = int(asked[0, block].sum())
        expected = [sum(math.prod(s[: j + 1]) for j in range(k, count)) for k in range(count)]
        assert found[0, block].tolist() == pytest.approx(expected + [0.0] * (3 - count))
    for size, fall in ((8, 4.0), (10, 5.0), (16, 7.0)):
        found = blocks.weights(torch.zeros(1, size - 1), torch.ones(1, size - 1, dtype=torch.bool), "exp")
        assert found[0].tolist() == pytest.approx([math.exp(-k / fall) for k in range(size - 1)])


def test_taps_where_none_are_named() -> None:
    for layers, kind, taps in (
        (4, "dflash", [0, 1, 2, 3]),
        (36, "dflash", [1, 9, 17, 25, 33]),
        (4, "parallelspec", [-1, 3]),
    ):
        with torch.device("meta"):
            model = models.Qwen3(train.causal_config(train.ToySettings(width=32, heads=2, layers=layers)))
        model.norm.weight, model.lm_head.weight = (torch.nn.Parameter(torch.ones(32)) for _ in range(2))
        config = blocks.block_config(model, BlockSettings(kind=kind), MASK, Origin(kind, None, None))
        assert config["dflash_config"]["target_layer_ids"] == taps


def test_what_does_not_fit_is_named_and_nothing_is_written(target: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"kind": "medusa"}, {}, r"kind: expected one of \['dflash', 'parallelspec'\], got 'medusa'"),
        ({"loss": "kl"}, {}, "loss: expected one of"),
        ({"block": 1}, {}, "block: expected a whole number >= 2, got 1"),
        ({"block": 513}, {}, "block: expected a whole number <= 512, got 513"),
        ({"layers": 1001}, {}, "layers: expected a whole number <= 1000"),
        ({"mlp_width": 2**25}, {}, "mlp_width: expected a whole number <= 16777216"),
        *(
            ({name: value}, {}, f"{name}: expected a (finite )?number")
            for name in ("temperature", "muon_lr", "adam_lr", "weight_decay", "decay", "ema")
            for value in ("a", None, math.nan, [1], -1)
        ),
        ({"ema": 1.0}, {}, "ema: expected a number between 0 and 1"),
        ({"taps": (0, 2)}, {}, r"taps: expected ascending numbers of layers of \[-1, 2\), got \(0, 2\)"),
        ({"mask_id": 999}, {}, "mask_id: expected one of the model's 202 token ids, got 999"),
        ({"steps": 0}, {}, "steps: expected a whole number >= 1, got 0"),
        ({}, {"evaluate": -1}, "evaluate: expected a whole number >= 0"),
        ({}, {"save_every": 0}, "save_every: expected a whole number >= 1"),
        ({}, {"data": "builtin:0"}, "data: expected builtin:N"),
        ({}, {"chat": True}, "chat: the checkpoint .* has no chat template"),
    ]
    for change, more, message in cases:
        with pytest.raises(ValueError, match=message):
            run(target, tmp_path / "out", replace(TINY, **change), **more)
    with pytest.raises(FileNotFoundError, match="data: no file nowhere"):
        run(target, tmp_path / "out", data="nowhere")
    with pytest.raises(ValueError, match="is a diffusion model"):
        run("builtin:teacher", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gen_length: .* tokens, but builtin:causal was trained on 256"):
        run("builtin:causal", tmp_path / "out", replace(TINY, gen_length=250))  # type: ignore[arg-type]
    model = registry.load(str(target))
    with pytest.raises(ValueError, match=r"mask_id: .* has no mask token; name an id .*--mask-id"):
        run(target, tmp_path / "out", loaded=model)
    assert not list(tmp_path.iterdir())


def test_nothing_is_learned_from_a_mask_token_in_an_answer(target: Path) -> None:
    """It is never drafted: the loss of its row would be infinite."""
    model = registry.load(str(target))[0].float()
    trainee = blocks.BlockTrainee(Target("tiny", model, None, False), replace(TINY, mask_id=7))
    trainee.module = trainee.build()
    texts = [
        (torch.tensor(ids), 2)
        for ids in ([7, 3, 4, 5, 7, 6, 8], [3, 4, 7, 5, 6], [3, 4, 5, 7], [3, 4, 5, 6], [3, 7, 7])
    ]
    found = [(ids.tolist(), length) for ids, length in trainee.learnable(texts)]
    assert found == [([7, 3, 4, 5], 2), ([3, 4, 5, 6], 2)]
    for step in range(4):
        assert math.isfinite(trainee.loss_of(trainee.learnable(texts), step).item())
    with pytest.raises(ValueError, match=r"mask_id: .* answers do not have, got 7, which all of them have"):
        trainee.learnable(texts[1:3])


def test_too_few_prompts_are_refused_before_anything_is_written(target: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "few.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"Tom has {i}"}) + "\n" for i in range(10)))
    for settings, held, said in (
        (
            TINY,
            500,
            r"evaluate: expected a number that leaves prompts of .*, got 500 of 10, 10 of them different",
        ),
        (OF_KIND["ppd"], 3, r"data: expected at least 10 answers, .* of kind ppd, got 7"),
    ):
        with pytest.raises(ValueError, match=said):
            run(target, out, settings, data=str(data), evaluate=held)
        assert not out.exists()


def test_a_checkpoint_of_ones_own_needs_data(target: Path, tmp_path: Path) -> None:
    """It would learn from the built-in task's problems without a word."""
    with pytest.raises(ValueError, match=r"data: expected a file with prompts such as .*target.* got none"):
        drafters.run(str(target), tmp_path, settings=TINY, progress=False)
    assert not [*tmp_path.iterdir()]
