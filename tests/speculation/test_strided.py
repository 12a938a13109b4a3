"""I-DLM: the published strided decoding, written again in plain torch on transformers' Qwen3."""

from __future__ import annotations

import copy
import functools
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import Noted
from safetensors.torch import save_file
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models, speculation
from dparallel_ext.models import IDLM, SDAR, Qwen3
from dparallel_ext.speculation import Draft, SelfDrafter, StridedDrafter
from dparallel_ext.speculation.adapter import Adapter, LowRank
from dparallel_ext.speculation.checkpoint import DraftCheckpoint

pytest_plugins = ["taping"]

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

MASK = 12
SIZES = {
    **{"vocab_size": 13, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 512, "rope_theta": 500.0, "eos_token_id": 2, "tie_word_embeddings": False},
}
CONFIG = {
    **{"model_type": "sdar", "architectures": ["SDARForCausalLM"], "use_regular_causal": True},
    **{"block_size": 3, "mask_token_id": MASK, "attention_bias": False, "hidden_act": "silu", **SIZES},
}
PROMPTS = [torch.randint(3, 12, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 23)]


@functools.cache
def theirs() -> Any:
    """transformers' Qwen3 with random weights, by which guesses of masks are right now and then."""
    torch.manual_seed(1)
    of = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, pad_token_id=None))
    with torch.no_grad():
        for p in of.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.35)
    return of.eval()


@functools.cache
def ours() -> models.Model:
    model = IDLM(CONFIG)
    model.load_state_dict(theirs().state_dict())
    return model.eval()


def base() -> models.Model:
    """The same weights in Qwen3, which knows of no mask."""
    model = Qwen3({"model_type": "qwen3", **SIZES})
    model.load_state_dict(theirs().state_dict())
    return model.eval()


class Published:
    """The published loop at temperature 0: its text, its passes and what each verifies.

    Its first pass computes the prompt alone; ours has masks behind it. masks: the model of the masks' rows,
    whose other rows are those of `theirs`, as with a gated adapter.
    """

    def __init__(self, prompt: Tensor, gen_length: int, stride: int, masks: Any = None) -> None:
        text, end = prompt.tolist(), len(prompt) + gen_length
        self.drafts: list[tuple[int, ...]] = []
        specs: list[int] = []
        self.passes = 1
        while len(text) < end:
            found = self.likeliest(text, specs, stride - 1, masks)
            chosen, guesses = found[: 1 + len(specs)], found[1 + len(specs) :]
            wrong = [a != b for a, b in zip(specs, chosen, strict=False)]
            taken = [*wrong, True].index(True)
            text += chosen[: taken + 1]
            self.drafts.append(tuple(specs))
            specs = guesses if taken == len(specs) else []
            specs = specs[: max(0, end - len(text) - 1)]
            self.passes += 1
        self.text = text[:end]

    @torch.no_grad()
    def likeliest(self, text: list[int], specs: list[int], masks: int, of: Any) -> list[int]:
        """The argmax at the last known token, at each guess, and at each mask."""
        known = torch.tensor([text + specs])
        cache = theirs()(known, use_cache=True)
        behind = (of or theirs())(torch.tensor([[MASK] * masks]), past_key_values=cache.past_key_values)
        rows = torch.cat((cache.logits[0, len(text) - 1 :], behind.logits[0]))
        return rows.argmax(-1).tolist()


class Heard(Noted, StridedDrafter):
    """The drafter, whose drafts are noted."""


def drafts_of(heard: Any) -> list[tuple[int, ...]]:
    return [each[0].tokens for each in heard.drafts]


# --- the model ----------------------------------------------------------------------------------


def test_a_checkpoint_in_the_published_layout_is_read(tmp_path: Path) -> None:
    """Published under SDAR's name; what SDAR itself has not tells them apart."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({k: v.contiguous() for k, v in theirs().state_dict().items()}, tmp_path / "model.safetensors")
    model = models.load(tmp_path)
    assert type(model) is IDLM
    x = torch.randint(3, 12, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, theirs()(x).logits, rtol=0, atol=1e-4)
    assert (models.traits(model).causal, model.mask_id, model.block_length) == (True, MASK, None)
    models.save(model, tmp_path / "again")
    assert type(models.load(tmp_path / "again")) is IDLM
    for flag in (False, None):
        assert models.family_of({**CONFIG, "use_regular_causal": flag}) is SDAR
    assert models.family_of({**CONFIG, "model_type": "idlm", "use_regular_causal": None}) is IDLM
    named = type("SDARConfig", (transformers.PretrainedConfig,), {"model_type": "sdar"}).from_dict(CONFIG)
    published = torch.nn.Linear(1, 1)
    published.config = named
    assert models.traits(published).causal
    with pytest.raises(ValueError, match="model: IDLM is autoregressive"):
        dx.decode(model, PROMPTS[0], gen_length=8, selector="confidence", threshold=0.9)


# --- the published loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_drafts_and_passes_are_those_of_the_published_loop(prompt: Tensor, stride: int) -> None:
    expected, heard = Published(prompt, 60, stride), Heard(stride)
    out = dx.speculate(ours(), prompt, gen_length=60, eos_id=-1, drafter=heard, draft_size=2 * (stride - 1))
    plain = dx.speculate(ours(), prompt, gen_length=60, eos_id=-1)
    assert out.sequences[0].tolist() == expected.text == plain.sequences[0].tolist()
    assert [d for d in drafts_of(heard) if d] == [d for d in expected.drafts if d]
    assert out.nfe.tolist() == [expected.passes - 1]
    assert expected.passes < 60


def test_masks_behind_every_guess_save_passes() -> None:
    """None is wasted behind a wrong guess: with rows to spare there are guesses in every pass."""
    few, many = (
        dx.speculate(ours(), PROMPTS, gen_length=60, eos_id=-1, drafter="strided", draft_size=size)
        for size in (6, 15)
    )
    assert torch.equal(few.sequences, many.sequences)
    assert many.nfe.sum() < few.nfe.sum()
    heard = Heard()
    dx.speculate(ours(), PROMPTS[0], gen_length=60, eos_id=-1, drafter=heard, draft_size=15)
    first = [each[0] for each in heard.drafts[:20]]
    assert first[0] == Draft(riders=(3,), parents=())
    assert all((len(d.tokens), d.riders) == (3, (3, 3, 3, 3)) for d in first[1:])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_in_batches_and_engines(temperature: float) -> None:
    """The text is that without a drafter; masks leave nothing behind in the pages that others share."""
    model = ours()
    settings: dict[str, Any] = {"temperature": temperature, "seed": 4, "eos_id": -1}
    lengths = [40, 3, 17]
    expected = dx.speculate(model, PROMPTS, gen_length=lengths, **settings)
    for size in (1, 4, 6, 15):
        found = dx.speculate(
            model, PROMPTS, gen_length=lengths, drafter="strided", draft_size=size, **settings
        )
        assert torch.equal(found.sequences, expected.sequences)
        assert size == 1 or found.nfe.sum() < expected.nfe.sum()
    long = [torch.cat((PROMPTS[2], PROMPTS[0][:n])) for n in (0, 2, 5)]
    alone = [dx.speculate(model, p, gen_length=30, **settings).responses[0] for p in long]
    with dx.Engine(model, lanes=2, max_length=80, page_size=8, drafter="strided") as engine:
        for _ in range(2):  # the second time from shared pages
            handles = [engine.submit(p, gen_length=30, **settings) for p in long]
            for handle, text in zip(handles, alone, strict=True):
                assert torch.equal(torch.tensor(handle.result(60).tokens), text)


# --- the adapter of the masks' rows ---------------------------------------------------------------


@functools.cache
def adapted(*targets: str) -> Any:
    """Their model with a LoRA adapter, of all linear layers but the head unless `targets` are others."""
    torch.manual_seed(8)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*targets] or "all-linear")
    of = peft.get_peft_model(copy.deepcopy(theirs()), config)
    with torch.no_grad():
        for name, p in of.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1)
    return of.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(path, save_embedding_layers=False)
    return path


def adapter_at(path: Path) -> Adapter:
    with_adapter = speculation.load(path)
    assert isinstance(with_adapter, SelfDrafter)
    assert with_adapter.adapter is not None
    return with_adapter.adapter


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_takes_part_in_the_rows_of_masks_alone(adapter: Path, fused: bool) -> None:
    """With Qwen3 itself, whose own text it leaves as it is, bit for bit."""
    model = base().fuse() if fused else base()
    expected, bare = Published(PROMPTS[0], 60, 4, adapted()), Published(PROMPTS[0], 60, 4)
    heard = Heard(adapter=adapter_at(adapter), mask_id=MASK)
    settings: dict[str, Any] = {"gen_length": 60, "eos_id": -1}
    out = dx.speculate(model, PROMPTS[0], drafter=heard, draft_size=6, **settings)
    assert out.sequences[0].tolist() == expected.text == bare.text
    assert [d for d in drafts_of(heard) if d] == [d for d in expected.drafts if d]
    assert out.nfe.tolist() == [expected.passes - 1]
    assert expected.drafts != bare.drafts
    by_path = dx.speculate(ours(), PROMPTS[0], drafter=f"strided:{adapter}", draft_size=6, **settings)
    assert torch.equal(by_path.nfe, out.nfe)


def test_no_other_row_is_touched() -> None:
    """Even where the adapter overflows."""
    torch.manual_seed(0)
    base, x = torch.nn.Linear(8, 8, dtype=torch.float16), torch.randn(5, 8, dtype=torch.float16)
    part = LowRank(base, torch.full((2, 8), 6e4).half(), torch.ones(8, 2).half())
    part.only = torch.tensor([False, True, False, False, True])[:, None]
    with torch.no_grad():
        found, expected = part(10 * x), base(10 * x)
    assert torch.equal(found[~part.only[:, 0]], expected[~part.only[:, 0]])
    assert not found[part.only[:, 0]].isfinite().all()


def test_the_mask_of_the_released_adapter_is_known(adapter: Path) -> None:
    """Qwen3's vocabulary has room for it, and its config does not name it."""
    with torch.device("meta"):
        model = Qwen3({"model_type": "qwen3", **SIZES, "vocab_size": 151936})
    StridedDrafter(adapter=adapter_at(adapter)).check(model)
    with pytest.raises(ValueError, match=r'drafter: "strided" is for models that guess ahead .* this Qwen3'):
        StridedDrafter().check(model)
    with pytest.raises(ValueError, match="mask_id: expected an id of the model's 151936, got 151936"):
        StridedDrafter(mask_id=151936).check(model)


def test_recorded_passes_are_the_same(adapter: Path, request: pytest.FixtureRequest) -> None:
    """Also those of trees of riders; the next call replays the recordings, with the layers of now."""
    model = base()
    drafter = StridedDrafter(adapter=adapter_at(adapter), mask_id=MASK)
    settings: dict[str, Any] = {"gen_length": 40, "eos_id": -1, "draft_size": 15, "drafter": drafter}
    expected = dx.speculate(model, PROMPTS, **settings)
    taped = request.getfixturevalue("taped")
    for again in (False, True):
        taped.clear()
        found = dx.speculate(model, PROMPTS, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.nfe, expected.nfe)
        assert len(taped) == (0 if again else 1)
        assert all(graphs.replays > 5 for graphs in taped)
    model.quantize()
    found = dx.speculate(model, PROMPTS, **settings)
    fresh = copy.deepcopy(model)
    assert torch.equal(
        found.sequences, dx.speculate(fresh, PROMPTS, **{**settings, "drafter": None}).sequences
    )
    assert torch.equal(found.nfe, dx.speculate(fresh, PROMPTS, **settings).nfe)


def test_a_drafter_keeps_no_model_alive(adapter: Path) -> None:
    model = base()
    drafter = StridedDrafter(adapter=adapter_at(adapter), mask_id=MASK)
    dx.speculate(model, PROMPTS[0], gen_length=20, drafter=drafter)
    gone = weakref.ref(model.get_submodule("model.layers.0.self_attn.o_proj"))
    del model
    gc.collect()
    assert gone() is None


# --- what is refused ------------------------------------------------------------------------------


def test_what_is_refused(adapter: Path, tmp_path: Path) -> None:
    def refused(said: str, drafter: Any, model: Any = None) -> None:
        with pytest.raises(ValueError, match=said):
            dx.speculate(model or base(), PROMPTS[0], gen_length=4, drafter=drafter)

    refused('drafter: "strided" is for models that guess ahead at masks', "strided")
    refused('behind "strided:", got .self.', "strided:self", ours())
    refused('behind "strided:", got .ngram.', "strided:ngram", ours())
    refused("drafter: .*nowhere", f"strided:{tmp_path}/nowhere", ours())
    adapted("lm_head").save_pretrained(tmp_path, save_embedding_layers=False)
    refused("adapts lm_head, and all rows have one head", f"strided:{tmp_path}", ours())
    for arguments, said in (
        ({"stride": 1}, "stride: expected a whole number >= 2, got 1"),
        ({"stride": 18}, "stride: expected a whole number <= 17"),
        ({"chance": 1.5}, "chance: expected a number from 0 to 1, got 1.5"),
        ({"chance": ((0.5,),) * 2}, "chance: expected for each of 3 riders up to 10 shares"),
        ({"chance": ((0.5, 0.6),) * 3}, "chance: expected for each of 3 riders .* of sum at most 1"),
        ({"mask_id": -1}, "mask_id: expected a whole number >= 0"),
        ({"adapter": str(adapter)}, "adapter: expected Adapter, got str"),
    ):
        with pytest.raises(ValueError, match=said):
            StridedDrafter(**arguments)


def test_measured_ranks_make_trees() -> None:
    """Of the tokens that masks rank first; of a chain's ranks, chains."""
    assert StridedDrafter(chance=((0.9,),) * 3).most == StridedDrafter().most == 15
    heard = Heard(chance=((0.4, 0.3), (0.3, 0.2), (0.3, 0.2)))
    assert heard.most == 59
    settings: dict[str, Any] = {"gen_length": 60, "eos_id": -1}
    expected, chains = (
        dx.speculate(ours(), PROMPTS[0], drafter=drafter, draft_size=15, **settings)
        for drafter in (None, StridedDrafter(chance=0.4))
    )
    trees = dx.speculate(ours(), PROMPTS[0], drafter=heard, draft_size=15, **settings)
    assert torch.equal(trees.sequences, expected.sequences)
    assert trees.nfe.sum() < chains.nfe.sum() < expected.nfe.sum()
    tree = heard.drafts[1][0]
    assert tree.parents[:2] == (0, 0)
    assert len({*tree.tokens[:2]}) == 2
    uneven = StridedDrafter(chance=((0.4,), (0.3, 0.2), (0.3, 0.2)))
    trees = dx.speculate(ours(), PROMPTS[0], drafter=uneven, draft_size=15, **settings)
    assert torch.equal(trees.sequences, expected.sequences)


def test_no_suppressed_token_is_guessed() -> None:
    settings: dict[str, Any] = {"gen_length": 40, "eos_id": -1, "draft_size": 15}
    free, bound = Heard(), Heard()
    dx.speculate(ours(), PROMPTS[0], drafter=free, **settings)
    guessed = [token for draft in drafts_of(free) for token in draft]
    often = max(guessed, key=guessed.count)
    dx.speculate(ours(), PROMPTS[0], drafter=bound, suppress=[often], **settings)
    assert not any(often in draft for draft in drafts_of(bound))


def test_an_adapter_is_written_with_its_factor_in_the_weights(tmp_path: Path) -> None:
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": True}
    tensors = {"x.lora_A.weight": down, "x.lora_B.weight": up}
    drafter = StridedDrafter(adapter=Adapter(DraftCheckpoint("it", config, tensors)))
    drafter.save(tmp_path, torch.float32)
    again = speculation.load(tmp_path)
    assert isinstance(again, StridedDrafter)
    assert again.adapter is not None
    torch.testing.assert_close(again.adapter.pairs["x"], (down, up * 6 / 2**0.5))


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_chances_at_the_ends(chance: float) -> None:
    expected = dx.speculate(ours(), PROMPTS, gen_length=20, eos_id=-1)
    for size in (3, 6, 15):
        drafter = StridedDrafter(chance=chance)
        found = dx.speculate(ours(), PROMPTS, gen_length=20, eos_id=-1, drafter=drafter, draft_size=size)
        assert torch.equal(found.sequences, expected.sequences)
        assert (found.nfe.sum() < expected.nfe.sum()) == (chance > 0)
