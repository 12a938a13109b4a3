"""Fast-dLLM v2: logits, and the tokens of its published `generate`, written again in plain torch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import FastDLLM

MASK, SIZE, PART = 510, 32, 8
CONFIG = {
    "model_type": "Fast_dLLM_Qwen",
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "bd_size": SIZE,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "mask_token_id": MASK,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "layer_types": ["full_attention"] * 3,
}
LENGTHS = [1, 5, 8, 31, 33, 40, 61, 64, 100]
"""Of prompts: within a block, at the end of a sub-block, at the end of a block, longer."""


@pytest.fixture(scope="module")
def model() -> FastDLLM:
    return made()


def made(**changes: Any) -> FastDLLM:
    """Random weights, sure enough of themselves for thresholds to matter."""
    torch.manual_seed(0)
    model = FastDLLM({**CONFIG, **changes}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(std=1.0 if name == "embed.weight" else p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
        model.lm_head.weight *= 8
        model.lm_head.weight[MASK] = 0  # the published loop might commit it; here it never leads
    return model


def prompt_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(seed + length))


Layers = list[tuple[Tensor, Tensor]]


class Plain:
    """Qwen2's formulas over a checkpoint's tensors in float64, and attention to whole blocks."""

    def __init__(self, model: FastDLLM) -> None:
        self.w = {name: t.double() for name, t in model.state_dict().items()}
        self.passes = 0

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def __call__(
        self, ids: list[int], past: Layers, inside: Layers | None = None, at: int = 0
    ) -> tuple[Tensor, Layers]:
        """Logits (N, V) of ids, which come after the positions of `past`, and their keys and values.

        With `inside`, the keys and values of a whole block, ids are `at` in it, and replace theirs.
        """
        self.passes += 1
        before = past[0][0].shape[1] if past else 0
        position = torch.arange(len(ids)) + before + at
        x, own = self.w["model.embed_tokens.weight"][torch.tensor(ids)], []
        for layer in range(3):
            name = f"model.layers.{layer}."
            y = self.norm(x, name + "input_layernorm")
            q, k, v = (
                self.linear(y, f"{name}self_attn.{p}_proj").unflatten(-1, (-1, 16)).transpose(0, 1)
                for p in "qkv"
            )
            q, k = self.turned(q, position), self.turned(k, position)
            if inside is not None:
                whole_k, whole_v = inside[layer]
                whole_k[:, at : at + len(ids)], whole_v[:, at : at + len(ids)] = k, v
                k, v = whole_k, whole_v
            own.append((k, v))
            if past:
                k, v = (torch.cat((old, new), 1) for old, new in zip(past[layer], (k, v), strict=True))
            seen = position[:, None] // SIZE >= torch.arange(k.shape[1]) // SIZE
            scores = q @ k.repeat_interleave(2, 0).mT / 4
            y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)
            x = x + self.linear(y.transpose(0, 1).flatten(1), name + "self_attn.o_proj")
            y = self.norm(x, name + "post_attention_layernorm")
            gated = F.silu(self.linear(y, name + "mlp.gate_proj")) * self.linear(y, name + "mlp.up_proj")
            x = x + self.linear(gated, name + "mlp.down_proj")
        return self.linear(self.norm(x, "model.norm"), "lm_head"), own

    def turned(self, x: Tensor, position: Tensor) -> Tensor:  # (H, N, D)
        angle = position[:, None] * 1e6 ** (-torch.arange(8).double() / 8)
        z = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    def generate(
        self, prompt: list[int], blocks: int, threshold: float, reuse: bool, longest_unseen: int = SIZE
    ) -> list[int]:
        """The published loop: one sequence, temperature 0, no stop token.

        A prompt of at most `longest_unseen` tokens is not stored before its last block.
        """

        def join(past: Layers, new: Layers) -> Layers:
            if not past:
                return new
            return [
                (torch.cat((a, c), 1), torch.cat((b, d), 1)) for (a, b), (c, d) in zip(past, new, strict=True)
            ]

        x, past, self.passes = list(prompt), [], 0
        if len(x) > longest_unseen:
            whole = len(x) // SIZE * SIZE
            logits, past = self(x[:whole], [])
            if whole == len(x):
                x.append(int(logits[-1].argmax()))
        for _ in range(blocks):
            x += [MASK] * (SIZE - len(x) % SIZE)
            first, inside = len(x) - SIZE, None
            for low in range(0, SIZE, PART):
                a, b = first + low, first + low + PART
                while MASK in x[a:b]:
                    if reuse and inside is not None and x[a] != MASK:
                        logits, _ = self(x[a:b], past, inside, low)
                        logits = torch.cat((logits[:1], logits[:-1]))
                    else:
                        logits, inside = self(x[first:], past)
                        logits = torch.cat((logits[:1], logits[:-1]))[low : low + PART]
                    p, token = logits.softmax(-1).max(-1)
                    p[torch.tensor(x[a:b]) != MASK] = -1
                    for j in range(PART):
                        if p[j] > threshold or j == int(p.argmax()):
                            x[a + j] = int(token[j]) if x[a + j] == MASK else x[a + j]
            logits, new = self(x[first:], past)
            past = join(past, new)
            x.append(int(logits[-1].argmax()))
        return x


@torch.no_grad()
def test_logits_are_those_of_the_formulas_and_of_qwen2(model: FastDLLM) -> None:
    x = prompt_of(75)
    logits = model(x[None]).logits[0]
    expected, _ = Plain(model)(x.tolist(), [])
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    block = torch.arange(75) // SIZE
    unseen = torch.zeros(1, 1, 75, 75).masked_fill(block[:, None] < block, -torch.inf)
    torch.testing.assert_close(theirs(x[None], attention_mask=unseen).logits[0], logits, rtol=1e-4, atol=1e-4)


@cache
def published(length: int, threshold: float, reuse: bool) -> tuple[list[int], int]:
    """Tokens and passes of the published loop over two blocks, on `made()`."""
    plain = Plain(made())
    return plain.generate(prompt_of(length).tolist(), 2, threshold, reuse), plain.passes


@pytest.mark.parametrize("threshold", [0.8, 0.5])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("cache", ["block", "none", "dual"])
def test_decodes_the_published_tokens(model: FastDLLM, cache: str, length: int, threshold: float) -> None:
    expected, passes = published(length, threshold, reuse=cache == "dual")
    prompt, end = prompt_of(length), (length // SIZE + 2) * SIZE
    out = dx.decode(
        model, prompt, gen_length=end - length, selector="confidence", threshold=threshold, cache=cache
    )
    assert out.sequences[0].tolist() == expected[:end]
    assert out.forwards == int(out.nfe)
    if cache != "none":
        assert int(out.nfe_published) == passes
        # Not run: the pass that stores the last block, and a prefill that the first block's pass takes along.
        assert out.forwards == passes - 1 - (length > SIZE and length % SIZE > 0)
    assert out.forwards < end - length


def test_a_prompt_of_exactly_one_block_is_seen(model: FastDLLM) -> None:
    """The published loop stores only longer ones, so its first pass over the next block would not see it."""
    prompt = prompt_of(SIZE)
    plain = Plain(model)
    expected = plain.generate(prompt.tolist(), 2, 0.9, reuse=False, longest_unseen=SIZE - 1)
    out = dx.decode(model, prompt, gen_length=64, selector="confidence", threshold=0.9, cache="block")
    assert out.sequences[0].tolist() == expected[:96]
    assert int(out.nfe_published) == plain.passes


def test_the_sub_block_cache_is_not_exact_but_can_be_renewed(model: FastDLLM, monkeypatch) -> None:
    """With a pass over the whole block each time it is exact; without, most passes are over 8 positions."""
    widths = []
    step = FastDLLM.step
    monkeypatch.setattr(
        FastDLLM, "step", lambda self, ids, *a: widths.append(len(ids)) or step(self, ids, *a)
    )
    settings = {"gen_length": 64, "selector": "confidence", "threshold": 0.9, "graphs": False}
    prompts = [prompt_of(64, seed) for seed in range(3)]
    exact = dx.decode(model, prompts, cache="block", **settings)
    assert torch.equal(
        dx.decode(model, prompts, cache="dual", refresh=1, **settings).sequences, exact.sequences
    )
    widths.clear()
    alone = dx.decode(model, prompts[0], cache="dual", **settings)
    assert set(widths) == {2 * SIZE, SIZE, PART}
    assert widths.count(PART) > alone.forwards / 3
    stale = dx.decode(model, prompts, cache="dual", **settings)
    assert not torch.equal(stale.sequences, exact.sequences)


def filled(plain: Plain, x: list[int], threshold: float, reuse: bool) -> tuple[list[int], int]:
    """The published loop over a sequence whose masks lie anywhere: blocks with masks are filled as by
    `generate`, and every block is stored. Tokens, and passes that fill something.
    """
    x, past, said, passes = list(x), [], None, 0
    for first in range(0, len(x), SIZE):
        end, inside = min(first + SIZE, len(x)), None
        if said is not None and x[first] == MASK:
            x[first] = int(said[-1].argmax())
            passes += 1
        for a in range(first, end, PART):
            b = min(a + PART, end)
            while MASK in x[a:b]:
                if reuse and inside is not None and x[a] != MASK:
                    logits, _ = plain(x[a:b], past, inside, a - first)
                    logits = torch.cat((logits[:1], logits[:-1]))
                else:
                    logits, inside = plain(x[first:end], past)
                    logits = torch.cat((logits[:1], logits[:-1]))[a - first : b - first]
                passes += 1
                p, token = logits.softmax(-1).max(-1)
                p[torch.tensor(x[a:b]) != MASK] = -1
                for j in range(b - a):
                    if x[a + j] == MASK and (p[j] > threshold or j == int(p.argmax())):
                        x[a + j] = int(token[j])
        said, new = plain(x[first:end], past)
        past = (
            new
            if not past
            else [
                (torch.cat((k, own_k), 1), torch.cat((v, own_v), 1))
                for (k, v), (own_k, own_v) in zip(past, new, strict=True)
            ]
        )
    return x, passes


@pytest.mark.parametrize("cache", ["block", "none", "dual"])
def test_infills_as_the_published_loop_does(model: FastDLLM, cache: str) -> None:
    """With the sub-block cache too: gaps over sub-blocks and blocks, a first token given and not."""
    prompts = [prompt_of(96, seed) for seed in (3, 4)] + [prompt_of(75, 5)]
    for prompt, gaps in zip(
        prompts, [[(10, 30)], [(32, 50), (90, 96)], [(5, 9), (20, 45), (66, 75)]], strict=True
    ):
        for start, end in gaps:
            prompt[start:end] = MASK
    settings: dict[str, Any] = {"selector": "confidence", "threshold": 0.5, "cache": cache}
    out = dx.decode(model, prompts, gen_length=0, infill=True, **settings)
    for b, prompt in enumerate(prompts):
        tokens, passes = filled(Plain(model), prompt.tolist(), 0.5, reuse=cache == "dual")
        assert out.sequences[b, : len(prompt)].tolist() == tokens
        assert int(out.nfe[b]) == passes < int(out.generated[b])


@pytest.mark.parametrize("cache", ["block", "dual", "none"])
def test_prompts_of_any_lengths_together(model: FastDLLM, cache: str) -> None:
    prompts = [prompt_of(length) for length in (*LENGTHS, SIZE)]
    own = {
        "gen_length": [7 * i for i in range(len(prompts))],
        "threshold": torch.linspace(0.2, 0.9, len(prompts)),
    }
    together = dx.decode(model, prompts, **own, selector="confidence", cache=cache, record=True)
    for b, prompt in enumerate(prompts):
        alone = dx.decode(
            model,
            prompt,
            gen_length=own["gen_length"][b],
            threshold=float(own["threshold"][b]),
            selector="confidence",
            cache=cache,
            record=True,
        )
        assert torch.equal(alone.responses[0], together.responses[b])
        for field in ("nfe", "nfe_published", "generated"):
            assert getattr(alone, field)[0] == getattr(together, field)[b]
        width = len(alone.responses[0])
        assert torch.equal(alone.trajectory.step[0], together.trajectory.step[b, :width])


def test_sub_blocks_are_filled_from_left_to_right(model: FastDLLM) -> None:
    out = dx.decode(model, prompt_of(37), gen_length=59, threshold=0.2, selector="confidence", record=True)
    steps = torch.cat((torch.zeros(5), out.trajectory.step[0])).view(
        -1, PART
    )  # by sub-block, from position 32
    assert (steps.amax(1)[:-1] < steps.amin(1)[1:]).all()
    first = int(out.trajectory.step[0, 64 - 37])  # a block's first token has a pass of its own
    counts = out.trajectory.step[0].bincount()
    assert counts[first] == 1 < counts.max()


def test_foreign_models_are_decoded_alike(model: FastDLLM) -> None:
    """Anything that returns logits and has such a config; without a mask id there, the published one."""

    class Foreign:
        config = SimpleNamespace(model_type="Fast_dLLM_Qwen", mask_token_id=MASK, bd_size=SIZE)

        def __call__(self, input_ids: Tensor) -> Any:
            return model(input_ids)

    settings = {"gen_length": 40, "selector": "confidence", "threshold": 0.6}
    expected = dx.decode(model, prompt_of(64), cache="block", **settings)
    out = dx.decode(Foreign(), prompt_of(64), **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.forwards == expected.forwards
    with pytest.raises(ValueError, match="block_length: expected 32, by which this model attends, got 16"):
        dx.decode(Foreign(), prompt_of(64), block_length=16)
    Foreign.config = SimpleNamespace(model_type="Fast_dLLM_Qwen")
    assert models.traits(Foreign()) == models.Traits(151665, True, frozenset({"confidence"}), 32, 8)


def test_eos_and_a_policy_of_ones_own(model: FastDLLM) -> None:
    settings = {"gen_length": 96, "cache": "block"}

    def all_of_them(stats: Any, eligible: Tensor, step: Tensor) -> Tensor:
        assert eligible.shape[1] in (1, PART)
        return eligible

    prompt = prompt_of(64)
    out = dx.decode(model, prompt, policy=all_of_them, **settings)
    assert out.forwards == 3 * (1 + SIZE // PART)
    eos = int(out.sequences[0, 64])
    ended = dx.decode(model, prompt, policy=all_of_them, eos_id=eos, **settings)
    held = 64 + int(ended.generated)  # by then all in front of it was decoded
    assert 64 < held < 64 + SIZE
    assert torch.equal(ended.sequences[0, :held], out.sequences[0, :held])
    assert (ended.sequences[0, held:] == eos).all()
    assert int(ended.nfe) < int(out.nfe)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_are_read_and_written(tied: bool, tmp_path: Path) -> None:
    model = made(tie_word_embeddings=tied)
    models.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert "model.layers.2.self_attn.k_proj.bias" in stored
    assert not any("q_norm" in name for name in stored)
    again = models.load(tmp_path)
    assert isinstance(again, FastDLLM)
    assert (again.block_length, again.mask_id, again.eos_id, again.shift) == (SIZE, MASK, 1, True)
    x = prompt_of(40)[None]
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "Fast_dLLM_Qwen"


def test_a_config_without_mask_or_block(tmp_path: Path) -> None:
    """The published code's own numbers, in the vocabulary of the 1.5B model."""
    left_out = ("mask_token_id", "bd_size")
    config = {k: v for k, v in CONFIG.items() if k not in left_out} | {"vocab_size": 151936, "hidden_size": 8}
    config |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
    }
    model = FastDLLM(config)
    assert (model.mask_id, model.block_length, model.sub_block_length) == (151665, 32, 8)
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = dx.decode(models.load(tmp_path), torch.arange(40), gen_length=24, cache="dual", threshold=0.5)
    assert 151665 not in out.sequences
    assert out.sequences.shape == (1, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bd_size": 0}, "config: bd_size=0, expected a whole number >= 1"),
        ({"mask_token_id": 512}, "config: mask_token_id=512, expected an id below 512"),
        ({"use_sliding_window": True}, "config: use_sliding_window=True is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "config: rope_scaling of type 'yarn'"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastDLLM({**CONFIG, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_length": 12}, "sub_block_length: expected a divisor of block_length 12, got 8"),
        ({"cache": "prefix"}, 'cache: expected "block" or "none" for a block-causal model, or "dual"'),
        ({"cache": "dual", "sub_block_length": 32}, "cache: expected"),
        ({"threshold": None, "steps": 64}, "steps: the fixed schedule is for whole blocks"),
        (
            {"threshold": None, "steps": 64, "sub_block_length": 32},
            "steps: .* here the block before begins each block",
        ),
        ({"sub_block_length": 12}, "sub_block_length: expected a divisor of block_length 32, got 12"),
        ({"sub_block_length": 0}, "sub_block_length: expected a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(model: FastDLLM, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.decode(model, prompt_of(5), **{"gen_length": 32, "threshold": 0.5, "cache": "block", **change})
