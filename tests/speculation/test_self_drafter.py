"""Nemotron-Labs-Diffusion: logits of transformers' Ministral 3, and the published self-speculation, written
again in plain torch on transformers' layers."""

from __future__ import annotations

import copy
import functools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import Noted, model_of
from nemotron import CONFIG, MASK, PROMPTS, ROPE, chosen_behind, guesses, names, ours, theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models, speculation
from dparallel_ext.models import NemotronDiffusion
from dparallel_ext.speculation import SelfDrafter
from dparallel_ext.speculation.adapter import LowRank

pytest_plugins = ["taping"]

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture
def model() -> models.Model:
    return ours()


class Reference:
    """The published `linear_spec_generate` at temperature 0: its text, and its passes over prompt and blocks.

    At the end, a block has the rows that the response has room for; the published code computes and drops
    more.
    """

    def __init__(self, prompt: Tensor, gen_length: int, block: int, drafts_with: Any = None) -> None:
        text, end = prompt.tolist(), len(prompt) + gen_length
        self.drafts: list[tuple[int, ...]] = []
        self.passes = 0
        if len(text) > 1:  # a single token needs no pass before the first draft
            text.append(chosen_behind(text)[-1])
            self.passes = 1
        while len(text) < end:
            room = end - len(text)
            masks = [MASK] * min(block - 1, room)
            _, found = guesses(drafts_with or theirs(), text[:-1], [text[-1], *masks])
            draft = found[1:][: room - 1]
            chosen = chosen_behind(text + draft)[len(text) - 1 :]
            wrong = [a != b for a, b in zip(draft, chosen, strict=False)]
            text += chosen[: [*wrong, True].index(True) + 1]
            self.drafts.append(tuple(draft))
            self.passes += 1
        self.text = text


class Heard(Noted, SelfDrafter):
    """The drafter, whose drafts are noted."""


def test_a_checkpoint_in_the_published_layout_is_read(tmp_path: Path, model: models.Model) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: tensor.contiguous() for name, tensor in names(theirs().state_dict()).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = models.load(tmp_path)
    assert type(found) is NemotronDiffusion
    assert torch.equal(found(PROMPTS[0][None]).logits, model(PROMPTS[0][None]).logits)


def test_logits_are_those_of_ministral_3(model: models.Model) -> None:
    """Over three original contexts, each of which scales the queries otherwise."""
    assert (model.mask_id, model.eos_ids, models.traits(model).onward) == (MASK, (2,), True)
    x = torch.randint(3, 12, (2, 50))
    with torch.no_grad():
        expected, found = theirs()(x).logits, model(x).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    unscaled = type(model)({**CONFIG, "rope_parameters": {**ROPE, "llama_4_scaling_beta": None}})
    unscaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        apart = (unscaled(x).logits - expected).abs().amax((0, 2)) > 1e-3
    assert apart.tolist() == [False] * 16 + [True] * 34


@pytest.mark.parametrize("block", [32, 7])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_drafts_and_passes_are_those_of_the_published_loop(
    model: models.Model, prompt: Tensor, block: int
) -> None:
    expected, drafter = Reference(prompt, 40, block), Heard(block)
    out = dx.speculate(model, prompt, gen_length=40, eos_id=-1, drafter=drafter, draft_size=block - 1)
    assert out.sequences[0].tolist() == expected.text
    assert [each[0].tokens for each in drafter.drafts if each[0].tokens] == [d for d in expected.drafts if d]
    assert out.nfe.tolist() == [expected.passes]
    assert expected.passes < 40  # some guesses are right
    plain = dx.speculate(model, prompt, gen_length=40, eos_id=-1)
    assert torch.equal(plain.sequences, out.sequences)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_in_batches_and_engines(model: models.Model, temperature: float) -> None:
    """The text is that without a drafter; masks leave nothing behind in the pages that others share."""
    settings: dict[str, Any] = {
        "gen_length": [40, 3, 17],
        "temperature": temperature,
        "seed": 4,
        "eos_id": -1,
    }
    expected = dx.speculate(model, PROMPTS, **settings)
    found = dx.speculate(model, PROMPTS, drafter="self", **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.nfe.sum() < expected.nfe.sum()
    trees = dx.speculate(model, PROMPTS, drafter="tree:self", draft_size=64, **settings)
    assert torch.equal(trees.sequences, expected.sequences)
    assert trees.nfe.sum() < found.nfe.sum()
    long = [torch.cat((PROMPTS[2], PROMPTS[0][:n])) for n in (0, 2, 5)]
    alone = [dx.speculate(model, p, gen_length=30, eos_id=-1).responses[0] for p in long]
    with dx.Engine(model, lanes=2, max_length=80, page_size=8, drafter="self") as engine:
        for _ in range(2):  # the second time from shared pages
            handles = [engine.submit(p, gen_length=30, eos_id=-1) for p in long]
            for handle, text in zip(handles, alone, strict=True):
                assert torch.equal(torch.tensor(handle.result(60).tokens), text)


# --- the adapter of the draft -------------------------------------------------------------------


@functools.cache
def adapted(*targets: str) -> Any:
    """Their model with a LoRA adapter of some layers, by default output projections, as the published one."""
    torch.manual_seed(8)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=[*targets] or ["o_proj"])
    of = peft.get_peft_model(copy.deepcopy(theirs()), config)
    with torch.no_grad():
        for name, p in of.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.3)
    return of.eval()


def saved(of: Any, path: Path) -> Path:
    """An adapter's directory, by the names that PEFT gives it on the published class."""
    of.save_pretrained(path, save_embedding_layers=False)
    file = path / "adapter_model.safetensors"
    theirs = {"model.model.model.": "model.model.encoder.", "model.lm_head.": "model.diffusion_head."}
    tensors = load_file(file)
    for name, published in theirs.items():
        assert not any(published in k for k in tensors)
        tensors = {k.replace(name, published): v for k, v in tensors.items()}
    save_file(tensors, file)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(adapted(), tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "gate_proj", "down_proj")], ids=str)
def test_adapters_of_other_layers(model: models.Model, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Of the head too, and where layers with the same input have none."""
    adapter = speculation.load(saved(adapted(*targets), tmp_path))
    assert isinstance(adapter, SelfDrafter)
    for each in (model, copy.deepcopy(model).fuse()):
        heard = Heard(32, adapter.adapter)
        out = dx.speculate(each, PROMPTS[0], gen_length=40, eos_id=-1, drafter=heard, draft_size=31)
        expected, bare = Reference(PROMPTS[0], 40, 32, adapted(*targets)), Reference(PROMPTS[0], 40, 32)
        assert out.sequences[0].tolist() == expected.text
        drafts = [each[0].tokens for each in heard.drafts if each[0].tokens]
        assert drafts == [d for d in expected.drafts if d]
        assert expected.drafts != bare.drafts


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_takes_part_in_drafts_alone(model: models.Model, adapter: Path, fused: bool) -> None:
    drafter, prompt = speculation.load(adapter), PROMPTS[0]
    assert isinstance(drafter, SelfDrafter)
    if fused:
        model = models.wrap(model).fuse()
    heard = Heard(32, drafter.adapter)
    out = dx.speculate(model, prompt, gen_length=40, eos_id=-1, drafter=heard, draft_size=31)
    expected, bare = Reference(prompt, 40, 32, adapted()), Reference(prompt, 40, 32)
    assert out.sequences[0].tolist() == expected.text == bare.text
    assert [each[0].tokens for each in heard.drafts if each[0].tokens] == [d for d in expected.drafts if d]
    assert expected.drafts != bare.drafts
    by_path = dx.speculate(model, prompt, gen_length=40, eos_id=-1, drafter=str(adapter), draft_size=31)
    assert torch.equal(by_path.nfe, out.nfe)
    assert not any(type(part) is LowRank for part in model.modules())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"rank_pattern": {"o_proj": 2}}, "rank_pattern=.* is not supported"),
        ({"r": None}, "'r' is null"),
    ],
)
def test_other_adapters_are_refused(
    adapter: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=said):
        speculation.load(tmp_path)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_lacks_a_file(adapter: Path, tmp_path: Path, missing: str) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((adapter / file).read_bytes())
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        speculation.load(tmp_path)


def test_an_adapter_of_another_model_is_refused(model: models.Model, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    first = min(tensors)

    def refused(said: str, content: dict[str, Tensor]) -> None:
        save_file(content, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            dx.speculate(model, PROMPTS[0], gen_length=4, drafter=tmp_path)

    refused("LAYER.lora_A.weight and lora_B, got base_model", {first: tensors[first]})
    refused("LAYER.lora_A.weight and lora_B, got none", {})
    bare = {k.removeprefix("base_model.model."): v.clone() for k, v in tensors.items()}
    refused("o_proj is named twice", tensors | bare)
    thin = {k: v[:3] if "lora_A" in k else v[:, :3].contiguous() for k, v in tensors.items()}
    refused(r"expected \(4, in\), and \(out, 4\) of lora_B, .* got \[\(3, 64, ", thin)
    refused("expected finite weights, got inf or NaN", tensors | {first: tensors[first] * torch.nan})
    refused("lora_B, .* torch.int8", {k: v.to(torch.int8) for k, v in tensors.items()})
    beyond = {k.replace("layers.1.", "layers.7."): v for k, v in tensors.items()}
    refused("adapts encoder.layers.7.self_attn.o_proj, which the model does not have", beyond)
    wide = {k: torch.zeros(4, 24) if "lora_A" in k else v for k, v in tensors.items()}
    refused(r"o_proj of \(32, 24\), and the model has \(32, 64\)", wide)


# --- what else is refused -----------------------------------------------------------------------


def test_an_adapter_is_no_path() -> None:
    with pytest.raises(ValueError, match="adapter: expected Adapter, got str"):
        SelfDrafter(adapter="path/to/linear_spec_lora")  # type: ignore[arg-type]


def test_models_without_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r'drafter: "self" is for models that predict masks .* got Qwen3'):
        dx.speculate(model_of(), PROMPTS[0], gen_length=4, drafter="self")
    bare = NemotronDiffusion({k: v for k, v in CONFIG.items() if k != "mask_token_id"}).eval()
    with pytest.raises(ValueError, match='"self" needs a mask token'):
        dx.speculate(bare, PROMPTS[0], gen_length=4, drafter="self")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dlm_type": "dream"}, "dlm_type='dream' is not supported, only 'llada'"),
        ({"rope_parameters": None}, "'rope_parameters' is missing or null"),
        ({"sliding_window": 64}, "sliding_window=64 is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        (
            {"rope_parameters": {**ROPE, "llama_4_scaling_beta": "x"}},
            "rope_parameters: llama_4_scaling_beta='x'",
        ),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NemotronDiffusion({**CONFIG, **changes})


def test_the_base_of_rotary_embeddings_that_a_config_lacks() -> None:
    """The published config class has its own default, wherever the rest of rope_parameters comes from."""
    without = {key: value for key, value in ROPE.items() if key != "rope_theta"}
    assert NemotronDiffusion({**CONFIG, "rope_parameters": without}).shape.rope_theta == 1e6
    for key in ("rope_parameters", "rope_scaling"):
        config = {**CONFIG, "rope_parameters": None, "rope_theta": 7.0, key: without}
        assert NemotronDiffusion(config).shape.rope_theta == 7
    assert NemotronDiffusion(CONFIG).shape.rope_theta == ROPE["rope_theta"]


def test_the_published_class_is_wrapped(model: models.Model) -> None:
    """By its names: the layers are `encoder`, the head is `diffusion_head`."""

    class PublishedConfig(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
        model_type = CONFIG["model_type"]

    class Published(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PublishedConfig.from_dict(CONFIG)
            self.encoder, self.diffusion_head = theirs().model, theirs().lm_head

    wrapped = models.wrap(Published())
    assert type(wrapped) is NemotronDiffusion
    assert wrapped.lm_head.weight is theirs().lm_head.weight
    found, expected = (
        dx.speculate(each, PROMPTS[0], gen_length=20, eos_id=-1, drafter="self") for each in (wrapped, model)
    )
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_recorded_drafts_are_the_same(
    model: models.Model, adapter: Path, with_adapter: bool, request: pytest.FixtureRequest
) -> None:
    """Also over an original context, behind which queries are scaled, and of trees; the next call replays the
    recordings."""
    drafter = dx.speculation.drafter_of(f"tree:{adapter}") if with_adapter else SelfDrafter()
    settings: dict[str, Any] = {"gen_length": 40, "eos_id": -1, "draft_size": 9, "drafter": drafter}
    expected = dx.speculate(model, PROMPTS, **settings)
    taped = request.getfixturevalue("taped")
    for again in (False, True):
        taped.clear()
        found = dx.speculate(model, PROMPTS, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.nfe, expected.nfe)
        assert len(taped) == (0 if again else 2)
        assert all(graphs.replays > 5 for graphs in taped)


def test_a_kept_drafter_drafts_with_the_layers_of_now(taped: list[Any], adapter: Path) -> None:
    """Not with those that the model had when an earlier call recorded its drafts."""
    model, drafter = copy.deepcopy(ours()), speculation.load(adapter)
    settings: dict[str, Any] = {"gen_length": 40, "eos_id": -1, "draft_size": 9, "drafter": drafter}
    before = dx.speculate(model, PROMPTS, **settings)
    assert len(taped) == 2
    old = weakref.ref(model.get_submodule("encoder.layers.0.self_attn.o_proj"))
    model.quantize()
    expected = dx.speculate(model, PROMPTS, graphs=False, **settings)
    found = dx.speculate(model, PROMPTS, **settings)
    assert len(taped) == 2  # those of the first call
    assert torch.equal(found.nfe, expected.nfe)
    assert not torch.equal(found.nfe, before.nfe)
    assert old() is None
