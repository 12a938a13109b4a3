"""The trainer of adapters of masks: its rows against PEFT's on transformers' Qwen3, its files, refusals."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import cli, registry
from dparallel.serving import runner
from dparallel.toy import tasks, train
from dparallel.training import drafters
from dparallel.training.drafters import answers, riders
from dparallel.training.drafters.common import Target
from dparallel.training.drafters.riders import StridedSettings, StridedTrainee
from drafters import model_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.speculation import StridedDrafter, drafter_of

MASK = 12
SIZES = {
    **{"vocab_size": 13, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 512, "rope_theta": 500.0, "eos_token_id": 2, "tie_word_embeddings": False},
}
SETTINGS = StridedSettings(rank=4, mask_id=MASK, batch=3, anchors=4, soften=2.0)
TEXTS = [
    (torch.randint(3, 12, (n,), generator=torch.Generator().manual_seed(n)), prompt)
    for n, prompt in ((14, 3), (9, 6), (20, 2))
]


@functools.cache
def ours() -> models.Model:
    """Random weights, large enough that every token tells."""
    torch.manual_seed(1)
    model = models.Qwen3({"model_type": "qwen3", **SIZES})
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.35)
    return model.eval().requires_grad_(False)


def trainee_of(settings: StridedSettings = SETTINGS, std: float = 0.1) -> StridedTrainee:
    """With an adapter as if it were trained."""
    trainee = StridedTrainee(Target("it", ours(), None, False), settings)
    torch.manual_seed(8)
    trainee.module = trainee.build()
    with torch.no_grad():
        for up in trainee.module[1::2]:
            up.normal_(0.0, std)
    return trainee


@pytest.mark.parametrize("target_modules", [None, ("o_proj", "up")])
def test_the_loss_is_that_of_pefts_adapter_in_the_rows_of_masks(
    tmp_path: Path, target_modules: tuple[str, ...] | None
) -> None:
    """KL to what the model says at the true tokens; keys and values of the text are the model's own."""
    transformers, peft = map(pytest.importorskip, ("transformers", "peft"))
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, pad_token_id=None)).eval()
    theirs.load_state_dict(ours().state_dict())
    trainee = trainee_of(replace(SETTINGS, target_modules=target_modules))
    trainee.drafter("it", TEXTS).save(tmp_path, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), str(tmp_path)).eval()
    inside = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(inside) == 2 * 2 * (7 if target_modules is None else 2)

    @torch.no_grad()
    def expected_of(text: Tensor) -> Tensor:
        cache = theirs(text[None], use_cache=True).past_key_values
        return adapted(torch.full((1, 3), MASK), past_key_values=cache).logits[0]

    generator = torch.Generator().manual_seed(5)
    some = torch.randint(3, (3,), generator=generator).tolist()
    placed = riders.place([TEXTS[i] for i in some], 3, 4, generator)
    student, teacher, _ = (t.detach() for t in riders.logits_of(trainee.riders, ours(), placed))
    own = []
    for b, a, i in placed.asked.nonzero().tolist():
        text, at = TEXTS[some[b]][0], int(placed.places[b, a])
        own.append(expected_of(text[: at + 1])[i])
    torch.testing.assert_close(student, torch.stack(own), rtol=0, atol=1e-3)
    p, q = teacher.double().softmax(-1), (torch.stack(own).double() / 2).softmax(-1)
    weight = 0.8 ** placed.asked.nonzero()[:, 2]
    expected = ((p * (p / q).log()).sum(-1) * weight).sum() / weight.sum()
    loss = trainee.loss_of(TEXTS, 5)
    assert loss.item() == pytest.approx(float(expected), rel=1e-3)
    loss.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in trainee.module)
    assert all(p.grad is None for p in ours().parameters())


def test_ranks_are_the_shares_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all places where a rider has a token to guess; rounding makes no sum larger than 1."""
    monkeypatch.setattr(riders, "GUESSES", 20)  # more than there are tokens
    of = trainee_of().riders
    ranks = riders.ranks_of(of, ours(), TEXTS, batch=2)
    placed = riders.place(TEXTS, 3, None)
    student, _, true = riders.logits_of(of, ours(), placed)
    better = (student > student.gather(1, true[:, None])).sum(1)
    for distance, row in enumerate(ranks):
        found = better[placed.asked.nonzero()[:, 2] == distance]
        assert row == pytest.approx((found.bincount(minlength=13) / len(found)).tolist(), abs=1.01e-5)
        assert sum(row) <= 1


def test_it_begins_as_the_model_and_learns() -> None:
    """In a few steps it guesses better, and takes fewer passes."""
    model = registry.load("builtin:causal", dtype=torch.float32)[0].requires_grad_(False)
    prompts = [
        torch.tensor(train.tokenizer().encode(problem.prompt).ids)
        for problem in itertools.islice(tasks.problems("train"), 30)
    ]
    mask = tasks.vocabulary().index(tasks.MASK)
    settings = StridedSettings(rank=8, batch=4, anchors=16, gen_length=64, mask_id=mask)
    texts = answers.answer_all(model, prompts[:20], settings)
    trainee = StridedTrainee(Target("it", model, None, False), settings)
    torch.manual_seed(0)
    trainee.module = trainee.build()
    assert all(0.9 < down.abs().max() * down.shape[1] ** 0.5 <= 1 for down in trainee.module[::2])
    placed = riders.place(texts[:4], 3, 4, torch.Generator().manual_seed(0))
    plain = dx.speculation.strided.MaskRiders(model, mask, 3, {})
    first, bare = (riders.logits_of(of, model, placed)[0] for of in (trainee.riders, plain))
    assert torch.equal(first, bare)
    before = trainee.loss_of(texts, 0).item()
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=5e-3)
    for step in range(15):
        trainee.loss_of(texts[:18], step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trainee.loss_of(texts, 0).item() < 0.8 * before
    assert all(p.grad is None for p in model.parameters())
    trained = trainee.drafter("it", texts[18:])
    few, many = (
        drafters.judge(model, drafter, prompts[20:], 64)
        for drafter in (trained, StridedDrafter(mask_id=mask))
    )
    assert few["tokens"] == many["tokens"]
    assert few["passes"] < 0.9 * many["passes"], (few, many)


def test_by_the_command(tmp_path: Path) -> None:
    """Its path is a drafter, of trees of the guesses that were measured, with "strided:" before it or not."""
    settings = train.ToySettings(steps=1, batch=2, width=32, layers=2, heads=2, mlp_width=32, causal=True)
    target, out = train.train(tmp_path / "target", settings, progress=False, evaluate=0), tmp_path / "out"
    options = {"kind": "strided", "riders": 2, "rank": 5, "target-modules": "q_proj,down", "mask-id": 7}
    options |= {
        "data": "builtin:30",
        "evaluate": 5,
        "batch": 2,
        "steps": 3,
        "gen-length": 10,
        "dtype": "bfloat16",
    }
    args = [str(each) for key, value in options.items() for each in (f"--{key}", value)]
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(out), *args])
    assert found.exit_code == 0, found.output
    tensors = load_file(out / "adapter_model.safetensors")
    report = json.loads((out / "training.json").read_text())
    assert report["parameters"] == sum(t.numel() for t in tensors.values())
    assert report["parameters"] == 2 * 5 * (32 + 32 + 32 + 32)
    assert report["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (5, ["down_proj", "q_proj"])
    assert config["base_model_name_or_path"] == str(target)
    model, _ = registry.load(str(target))
    prompts = [torch.tensor([3, 4, 5]), torch.arange(3, 30)]
    expected = dx.speculate(model, prompts, gen_length=12)
    for drafter in (drafter_of(str(out)), drafter_of(f"strided:{out}")):
        assert isinstance(drafter, StridedDrafter)
        assert (drafter.stride, drafter.mask_id, drafter.most) == (3, 7, 63)
        assert [len(row) for row in drafter.ranks] == [10, 10]
        for size in (2, 8, 63):
            found = dx.speculate(model, prompts, gen_length=12, drafter=drafter, draft_size=size)
            assert torch.equal(found.sequences, expected.sequences)
    found = CliRunner().invoke(cli.app, ["merge", str(out), str(tmp_path / "merged")])
    assert found.exit_code == 2
    assert "is a drafter, whose weights take part in drafts alone; --drafter takes it" in found.output
    assert not (tmp_path / "merged").exists()
    other = registry.load("builtin:causal")[0]
    with pytest.raises(ValueError, match=r"drafter: .*out was trained for another model"):
        dx.speculate(other, prompts, gen_length=4, drafter=f"strided:{out}")
    found = CliRunner().invoke(cli.app, ["drafter", str(target), str(tmp_path / "no"), "--rank", "4"])
    assert "rank: belongs to strided, not to dflash" in found.output


def test_the_mask_of_an_adapter_from_elsewhere_is_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command, and beside a drafter alone; a model without a mask token is read with it."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": torch.ones(1, 192), f"{layer}.lora_B.weight": torch.ones(192, 1)}
    adapter = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    masks: list[int | None] = []

    def serve(self: runner.Server, sockets: Any = None) -> None:
        masks.extend(model.engine.model.mask_id for model in self.service.models.values())

    monkeypatch.setattr(runner.Server, "run", serve)
    tuned, rows = tmp_path / "tuned.json", tmp_path / "rows.json"
    few = ("--problems", "1", "--draft-size", "2")
    for command in (
        ("decode", "sam has 4 cups now"),
        ("evaluate", *few, "--json", str(rows)),
        ("tune", str(tuned), *few, "--repeats", "1"),
        ("serve", "--port", "0"),
    ):
        asked = [*command, "--model", "builtin:causal"]
        drafter, mask = ("--drafter", f"strided:{tmp_path}"), ("--mask-id", "9")
        found = CliRunner().invoke(cli.app, [*asked, *drafter])
        assert found.exit_code == 2
        assert "has no mask token, which its config, --mask-id or models.load(mask_id=) names" in found.output
        found = CliRunner().invoke(cli.app, [*asked, *drafter, *mask])
        assert found.exit_code == 0, found.output
        found = CliRunner().invoke(cli.app, [*asked, *mask])
        assert "mask_id: belongs to masked diffusion" in found.output
    assert masks == [9]
    assert json.loads(rows.read_text())[0]["mask_id"] == json.loads(tuned.read_text())["mask_id"] == 9


def test_one_file_holds_it_too(tmp_path: Path) -> None:
    drafter = trainee_of().drafter("it", TEXTS)
    drafter.save(tmp_path / "one.safetensors")
    drafter.save(tmp_path / "many")
    one, many = (drafter_of(str(tmp_path / name)) for name in ("one.safetensors", "many"))
    assert isinstance(one, StridedDrafter)
    assert isinstance(many, StridedDrafter)
    assert one.adapter is not None
    assert many.adapter is not None
    assert (one.ranks, one.mask_id, one.stride) == (many.ranks, many.mask_id, many.stride)
    assert one.ranks == drafter.ranks
    for name, pair in one.adapter.pairs.items():
        assert all(map(torch.equal, pair, many.adapter.pairs[name]))
    with pytest.raises(ValueError, match="adapter: expected one to write, got None"):
        StridedDrafter().save(tmp_path / "none")


def test_the_mask_is_the_models_own_or_that_of_the_releases() -> None:
    def mask_of(**changes: Any) -> int:
        with torch.device("meta"):
            model = models.Qwen3({"model_type": "qwen3", **SIZES, **changes})
        model.norm.weight, model.lm_head.weight = (
            torch.nn.Parameter(torch.ones(n)) for n in ((32,), (model.shape.embedding_size, 32))
        )
        trainee = StridedTrainee(Target("it", model, None, False), replace(SETTINGS, mask_id=None))
        return trainee.mask_id

    assert mask_of(vocab_size=151936) == 151669
    assert mask_of(mask_token_id=3) == mask_of(mask_token_id=3, vocab_size=151936) == 3
    with pytest.raises(ValueError, match=r"mask_id: it has no mask token; name an id .*--mask-id"):
        mask_of()


def test_what_it_cannot_be_trained_by_is_named(tmp_path: Path) -> None:
    layers = (
        r"expected some of \['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'\]"
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "rank: expected a whole number >= 1, got 0"),
        ({"rank": 2**14 + 1}, "rank: expected a whole number <= 16384"),
        ({"riders": 17}, "riders: expected a whole number <= 16"),
        ({"mask_id": 13}, "mask_id: expected one of the model's 13 token ids, got 13"),
        ({"target_modules": ("q", "lm_head")}, rf"target_modules: {layers}, got \('q', 'lm_head'\)"),
        ({"target_modules": ()}, rf"target_modules: {layers}, got \(\)"),
        ({"kind": "ppd"}, r"kind: expected one of \['strided'\], got 'ppd'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            StridedTrainee(Target("it", ours(), None, False), replace(SETTINGS, **change))
    experts = model_of("qwen3_moe", mlp_only_layers=[])
    with pytest.raises(ValueError, match=r"expected some of \['q_proj', 'k_proj', 'v_proj', 'o_proj'\]"):
        StridedTrainee(Target("it", experts, None, False), replace(SETTINGS, target_modules=("down",)))


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    drafter = trainee_of().drafter("it", TEXTS)
    assert drafter.adapter is not None
    ours = {"kind": "strided", "num_riders": 3, "mask_token_id": MASK, "ranks": [[0.5]] * 3}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_riders": None}, "dparallel: 'num_riders' is null"),
        ({"num_riders": 17}, "dparallel: num_riders=17, expected a whole number >= 1 and <= 16"),
        ({"mask_token_id": -1}, "dparallel: mask_token_id=-1, expected a whole number >= 0"),
        ({"ranks": None}, "dparallel: ranks: expected for each of 3 riders .*, got None"),
        ({"ranks": [[0.5]] * 2}, "dparallel: ranks: expected for each of 3 riders"),
        ({"ranks": [[1.5]] * 3}, "dparallel: ranks: expected for each of 3 riders"),
    ]
    for change, message in cases:
        drafter.adapter.save(tmp_path, {**ours, **change}, torch.float32)
        with pytest.raises(ValueError, match=f"path: .*{message}"):
            dx.speculation.load(tmp_path)
    drafter.adapter.save(tmp_path, ours, torch.float32)
    assert dx.speculation.load(tmp_path).ranks == ((0.5,),) * 3
