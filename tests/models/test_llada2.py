"""LLaDA2: its layers and its loop, written again in plain torch from the published code."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import LLaDA2, fused_weights
from dparallel_ext.models.fp8 import Fp8Linear

MASK, EOS, BLOCK = 96, 2, 8
CONFIG: dict[str, Any] = {
    **{"model_type": "llada2_moe", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"num_experts": 16, "num_experts_per_tok": 3, "num_shared_experts": 2, "moe_intermediate_size": 24},
    **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
    **{"partial_rotary_factor": 0.5, "rope_theta": 600.0, "use_bias": False, "score_function": "sigmoid"},
    **{"mask_token_id": MASK, "eos_token_id": EOS, "block_length": BLOCK},
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_bias": True, "use_qkv_bias": True, "num_shared_experts": 0, "tie_word_embeddings": True},
    {"use_qk_norm": False, "partial_rotary_factor": 1.0, "num_key_value_heads": 0, "num_experts_per_tok": 1},
    {"use_qk_norm": False, "partial_rotary_factor": 0.25, "topk_group": 4, "num_experts_per_tok": 16},
    {"expert_capacity": 5, "block_size": BLOCK},
    {"expert_capacity": 4, "block_size": BLOCK // 2, "use_bias": True},
]


def model_of(**changes: Any) -> LLaDA2:
    torch.manual_seed(0)
    model = LLaDA2({**CONFIG, **changes}).eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def stored(model: LLaDA2, folder: Path) -> dict[str, Tensor]:
    models.save(model, folder)
    return load_file(folder / "model.safetensors")


def plain(
    w: dict[str, Tensor], x: Tensor, block: int = BLOCK, soft: Tensor | None = None, **changes: Any
) -> Tensor:
    """The logits (L, V) of one sequence x (L,), from the tensors of a file in float64.

    soft: embeddings (S, D) of its last S tokens, in place of theirs.
    """
    c = {**CONFIG, **changes}
    heads, size = c["num_attention_heads"], c["head_dim"]
    kv_heads, turned = c["num_key_value_heads"] or heads, int(size * c["partial_rotary_factor"])

    def norm(y: Tensor, name: str) -> Tensor:
        return y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[name + ".weight"]

    def product(y: Tensor, name: str) -> Tensor:
        return F.linear(y, w[name + ".weight"], w.get(name + ".bias"))

    def mlp(y: Tensor, name: str) -> Tensor:
        hidden = F.silu(product(y, name + ".gate_proj")) * product(y, name + ".up_proj")
        return product(hidden, name + ".down_proj")

    at = torch.arange(len(x))
    angles = at[:, None] / c["rope_theta"] ** (torch.arange(0, turned, 2) / turned)
    cos, sin = angles.cos().double().repeat(1, 2)[:, None], angles.sin().double().repeat(1, 2)[:, None]

    def rotated(y: Tensor) -> Tensor:
        first, rest = y[..., :turned], y[..., turned:]
        a, b = first.chunk(2, -1)
        return torch.cat((first * cos + torch.cat((-b, a), -1) * sin, rest), -1)

    def among(chosen: Tensor, row: int) -> list[int]:
        if "expert_capacity" in c:  # LLaDA 2.2: of all tokens of the block
            first = row // c["block_size"] * c["block_size"]
            highest = chosen[first : first + c["block_size"]].max(0).values
            return [int(expert) for expert in highest.argsort(descending=True)[: c["expert_capacity"]]]
        groups = chosen[row].view(c["n_group"], -1)
        best = groups.sort(descending=True).values[:, :2].sum(1).argsort(descending=True)
        of_best = sorted(best[: c["topk_group"]].tolist())
        return [g * groups.shape[1] + i for g in of_best for i in range(groups.shape[1])]

    def mixture(y: Tensor, name: str) -> Tensor:
        scores = product(y, name + ".gate").sigmoid()
        experts = torch.stack([mlp(y, f"{name}.experts.{e}") for e in range(scores.shape[1])], 1)  # (L, E, D)
        mixed, chosen = torch.zeros_like(y), scores + w[name + ".gate.expert_bias"]
        for row, each in enumerate(scores):
            best = sorted(among(chosen, row), key=lambda expert: -float(chosen[row, expert]))
            taken = best[: c["num_experts_per_tok"]]
            share = each[taken]
            if len(taken) > 1:
                share = share / (share.sum() + 1e-20)
            mixed[row] = c["routed_scaling_factor"] * share @ experts[row, taken]
        return mixed + mlp(y, name + ".shared_experts") if c["num_shared_experts"] else mixed

    y = w["model.word_embeddings.weight"][x]
    if soft is not None:
        y = torch.cat((y[: len(y) - len(soft)], soft))
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        z = product(norm(y, name + "input_layernorm"), name + "attention.query_key_value")
        q, k, v = z.view(len(x), -1, size).split([heads, kv_heads, kv_heads], 1)
        if c.get("use_qk_norm", True):
            q = norm(q, name + "attention.query_layernorm")
            k = norm(k, name + "attention.key_layernorm")
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        unseen = at[:, None] // block < at // block
        scores = scores.masked_fill(unseen, -torch.inf)
        z = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        y = y + product(z, name + "attention.dense")
        z = norm(y, name + "post_attention_layernorm")
        dense = layer < c["first_k_dense_replace"]
        y = y + (mlp(z, name + "mlp") if dense else mixture(z, name + "mlp"))
    head = "model.word_embeddings" if c.get("tie_word_embeddings") else "lm_head"
    return norm(y, "model.norm") @ w[head + ".weight"].T


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_plain_form(changes: dict[str, Any], tmp_path: Path) -> None:
    model, x = model_of(**changes), ids(2, 21)
    weights = stored(model, tmp_path)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    expected = torch.stack([plain(exact, row, **changes) for row in x])
    assert expected.std() > 0.5
    torch.testing.assert_close(model(x).logits.double(), expected, rtol=0, atol=2e-4)
    plainly, cached = (dx.decode(model, x[:, :11], gen_length=13, cache=cache) for cache in ("none", "block"))
    assert torch.equal(plainly.sequences, cached.sequences)
    again = models.load(tmp_path)
    assert type(again) is LLaDA2
    assert torch.equal(again(x).logits, model(x).logits)
    assert (again.block_length, again.mask_id, again.eos_ids, again.shift) == (BLOCK, MASK, (EOS,), False)


@torch.no_grad()
def test_fused_layers_of_experts(tmp_path: Path) -> None:
    """The shared expert's gate and up lie side by side, as a dense layer's."""
    model, x = model_of(), ids(2, 21)
    models.save(model, tmp_path)
    for fused in (models.load(tmp_path, fuse=True), copy.deepcopy(model).fuse()):
        groups = list(fused.groups())
        assert [[p.shape[0] for p in group] for group in groups] == [[48, 48]] * 3
        assert all(fused_weights.joined_view(group) is not None for group in groups)
        torch.testing.assert_close(fused(x).logits, model(x).logits)
        fused.train()
        assert all(fused_weights.joined_view(group) is None for group in groups)


def published(
    w: dict[str, Tensor], prompt: Tensor, gen_length: int, threshold: float, editing: float | None, steps: int
) -> tuple[list[int], int]:
    """The published `generate` for one sequence: its tokens, and passes. editing: None: LLaDA2.0's loop.

    steps: a divisor of BLOCK; a pass commits at least the block's share.
    """
    length, passes = len(prompt), 0
    end = -(-(length + gen_length) // BLOCK) * BLOCK
    x = torch.cat((prompt, torch.full((end - length,), MASK)))
    for first in range(length // BLOCK * BLOCK, end, BLOCK):
        block, post = x[first : first + BLOCK], 0
        given = torch.arange(first, first + BLOCK) < length
        while True:
            masked = block == MASK
            if not masked.any():
                post += 1
                if editing is None or post > 16:
                    break
            logits = plain(w, x[: first + BLOCK])[first:]
            passes += 1
            share = logits.softmax(-1)
            logits[:, MASK] = -torch.inf
            token = logits.argmax(-1)
            sure = share.gather(1, token[:, None])[:, 0]
            commit = masked & (sure > threshold)
            if commit.sum() < (least := min(BLOCK // steps, int(masked.sum()))):
                commit[torch.where(masked, sure, -1.0).topk(least).indices] = True
            change = torch.zeros_like(masked)
            if editing is not None:
                change = ~masked & ~given & (sure > editing) & (token != block)
            block[commit | change] = token[commit | change]
            if not masked.any() and not change.any():
                break
    return x[length:].tolist(), passes


@torch.no_grad()
def test_tokens_and_passes_are_those_of_the_published_loop(tmp_path: Path) -> None:
    """LLaDA2.0's, by a threshold, and 2.1's, which edits."""
    model, changed = model_of(), 0
    weights = {name: tensor.double() for name, tensor in stored(model, tmp_path).items()}
    for case in range(4):
        prompt = ids(3 + 7 * case, seed=case)
        unedited = []
        for threshold, editing, steps in (
            (0.3, None, BLOCK // 4),
            (0.3, None, BLOCK),
            (0.3, 0.2, BLOCK),
            (0.15, 0.25, BLOCK),
        ):
            tokens, passes = published(weights, prompt, 14, threshold, editing, steps)
            rule: dict[str, Any] = {"rule": f"edit:{threshold},{editing}"}
            if editing is None:
                rule = {"threshold": threshold, "selector": "confidence", "min_commit": BLOCK // steps}
                unedited = tokens
            for cache in ("none", "block"):
                out = dx.decode(model, prompt, gen_length=14, cache=cache, **rule)
                assert out.responses[0].tolist() == tokens, (case, threshold, editing, cache)
                assert int(out.nfe) == passes
            changed += threshold == 0.3 and tokens != unedited
    assert changed > 2


def published_soft(
    w: dict[str, Tensor], prompt: Tensor, gen_length: int, threshold: float, accept: float
) -> tuple[list[int], int]:
    """DMax's loop for one sequence, `decode_uniform` in its dInfer: its tokens, and passes over blocks.

    As ever here, the mask token is not decoded.
    """
    embeddings, length, passes = w["model.word_embeddings.weight"], len(prompt), 0
    end = -(-(length + gen_length) // BLOCK) * BLOCK
    x = torch.cat((prompt, torch.full((end - length,), MASK)))
    for first in range(length // BLOCK * BLOCK, end, BLOCK):
        block = x[first : first + BLOCK]
        active, soft = block == MASK, embeddings[block]
        for _ in range(BLOCK):
            logits = plain(w, x[: first + BLOCK], soft=soft)[first:]
            passes += 1
            share = logits.softmax(-1)
            logits[:, MASK] = -torch.inf
            token = logits.argmax(-1)
            sure = share.gather(1, token[:, None])[:, 0]
            masked, before = block == MASK, block.clone()
            for at in range(BLOCK):
                if active[at] and not masked[at]:
                    block[at] = token[at]
            for at in masked.nonzero()[:, 0].tolist():
                leftmost = at == masked.nonzero()[0, 0]
                if sure[at] < threshold and not leftmost:
                    break
                block[at] = token[at]
                if sure[at] < threshold:
                    break
            if (sure[active] >= accept).all() or torch.equal(block, before):
                break
            for at in (active & (block != MASK)).nonzero()[:, 0].tolist():
                p, of_token, of_mask = sure[at], embeddings[token[at]], embeddings[MASK]
                mixed = p * of_token + (1 - p) * of_mask
                norm = p * of_token.norm() + (1 - p) * of_mask.norm()
                soft[at] = mixed * norm / (mixed.norm() + 1e-6)
    return x[length:].tolist(), passes


@torch.no_grad()
def test_soft_tokens_are_those_of_the_published_loop(tmp_path: Path) -> None:
    model, changed = model_of(), 0
    weights = {name: tensor.double() for name, tensor in stored(model, tmp_path).items()}
    for case in range(4):
        prompt = ids(3 + 7 * case, seed=case)
        for threshold, accept in ((0.15, 0.2), (0.3, 0.3), (0.0, 0.9)):
            tokens, passes = published_soft(weights, prompt, 14, threshold, accept)
            rule = f"soft:{threshold},{accept},{BLOCK}"
            for cache in ("none", "block"):
                out = dx.decode(model, prompt, gen_length=14, cache=cache, rule=rule)
                assert out.responses[0].tolist() == tokens, (case, threshold, accept, cache)
                assert int(out.nfe) == passes
            plainly = dx.decode(model, prompt, gen_length=14, cache="block", threshold=threshold)
            changed += plainly.responses[0].tolist() != tokens
    assert changed > 4


@torch.no_grad()
def test_an_engine_serves_it() -> None:
    model = model_of()
    prompts = [ids(n, seed=n) for n in (3, 9, 17)]
    with dx.Engine(model, lanes=2, max_length=64) as engine:
        handles = [engine.submit(prompt, gen_length=16, threshold=0.3, eos_id=EOS) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            alone = dx.decode(model, prompt, gen_length=16, threshold=0.3, eos_id=EOS, cache="block")
            kept = min(int(alone.kept), 16)
            assert handle.result(60).tokens == alone.responses[0][:kept].tolist()


@torch.no_grad()
def test_the_router_s_bias_stays_in_float32(tmp_path: Path) -> None:
    """In a file of bfloat16, in a conversion, and in what is saved; the choice of experts depends on it."""
    model = model_of().to(torch.bfloat16)
    name = "model.layers.1.mlp.gate.expert_bias"
    assert (model.dtype, model.get_buffer(name).dtype) == (torch.bfloat16, torch.float32)
    weights = stored(model, tmp_path)
    biases = [key for key in weights if key.endswith("expert_bias")]
    assert [weights[key].dtype for key in biases] == [torch.float32] * 2
    assert {tensor.dtype for key, tensor in weights.items() if key not in biases} == {torch.bfloat16}
    for dtype in (None, torch.float16):
        again = models.load(tmp_path, dtype=dtype)
        assert torch.equal(again.get_buffer(name), weights[name])
        assert again.dtype == (dtype or torch.bfloat16)
    save_file({**weights, name: weights[name].bfloat16()}, tmp_path / "model.safetensors")
    assert models.load(tmp_path).get_buffer(name).dtype == torch.float32
    there = model_of().to("meta").to_empty(device="cpu").get_buffer(name)
    assert (there.device.type, there.dtype) == ("cpu", torch.float32)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        models.load(tmp_path)


@torch.no_grad()
def test_the_router_s_bias_moves_with_the_model() -> None:
    model, x = model_of(), ids(1, 9)
    with torch.device("meta"):
        empty = LLaDA2(CONFIG).half()
    assert empty(x.to("meta")).logits.shape == (1, 9, 97)
    empty.to_empty(device="cpu").float().load_state_dict(model.state_dict())
    assert torch.equal(empty(x).logits, model(x).logits)
    assert all(tensor.is_shared() for tensor in empty.share_memory().state_dict().values())


@pytest.mark.parametrize("gradient", [True, False])
def test_wrap_takes_experts_one_by_one(gradient: bool, tmp_path: Path) -> None:
    """As remote code holds them; all else is shared."""
    model, root = model_of(), nn.Module()
    root.config = dict(CONFIG)  # type: ignore[assignment]
    for name, tensor in stored(model, tmp_path).items():
        at, (*path, leaf) = root, name.split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        if leaf == "expert_bias":
            at.register_buffer(leaf, tensor)
        else:
            setattr(at, leaf, nn.Parameter(tensor))
    with torch.set_grad_enabled(gradient):
        ours, x = models.wrap(root), ids(1, 9)
    assert torch.equal(ours(x).logits, model(x).logits)
    shared, theirs = dict(ours.named_parameters()), dict(root.named_parameters())
    assert all(shared[name] is theirs[name] for name in shared if ".experts." not in name)
    root.get_submodule("model.norm").double()  # types may be mixed
    assert models.wrap(root).norm.weight.dtype == torch.float64
    name = "model.layers.1.mlp.experts.5.up_proj"  # but not in one tensor, where they were rounded
    root.get_submodule(name).bfloat16()
    with pytest.raises(ValueError, match=rf"{name}\.weight BF16 and .* F32, expected tensors of one type"):
        models.wrap(root)


@torch.no_grad()
def test_it_is_quantised_without_experts() -> None:
    """Queries, keys and values are one layer."""
    model, x = model_of(first_k_dense_replace=3), ids(1, 19)
    full = copy.deepcopy(model)
    layers = [layer for layer in full.blocks.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        weight, scale = dx.quantize_fp8(layer.weight)
        layer.weight.copy_(weight.float() * scale[:, None])
    assert sum(isinstance(part, Fp8Linear) for part in model.quantize().modules()) == len(layers) == 15
    torch.testing.assert_close(model(x).logits, full(x).logits, rtol=1e-4, atol=1e-4)
    a, b = (dx.decode(each, x, gen_length=16, cache="block").sequences for each in (model, full))
    assert torch.equal(a, b)


def test_it_trains_and_a_state_dict_resumes() -> None:
    model = model_of().train()
    model(ids(0, 9)).logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model(ids(2, 9)).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    fresh = LLaDA2(CONFIG)
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_function": "softmax"}, "score_function='softmax' is not supported, only 'sigmoid'"),
        ({"n_group": 3}, "expected groups of two experts or more, got 16 in 3"),
        ({"n_group": 16}, "expected groups of two experts or more, got 16 in 16"),
        ({"topk_group": 5}, "5 groups for a token, and there are 4"),
        ({"num_experts_per_tok": 9}, "9 experts for a token, and there are 8"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor=0.1 rotates 1 of 16 dimensions, expected an"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5, expected a number >= 0 and <= 1"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor=0.5, and that of rope_parameters is 0.25",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": "0.5"}},
            "rope_parameters: partial_rotary_factor='0.5', expected a number",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling of type 'yarn' is not supported"),
        (
            {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 64},
            "use_sliding_window=True is not supported",
        ),
        ({"num_experts": None}, "'num_experts' is null"),
        ({"expert_capacity": 6}, "'block_size' is missing"),
        ({"expert_capacity": 2, "block_size": BLOCK}, "3 experts for a token, and there are 2"),
        ({"expert_capacity": 17, "block_size": BLOCK}, "17 experts for a block, and there are 16"),
        ({"expert_capacity": 6, "block_size": 3}, "block_length=8, expected a multiple of block_size=3"),
    ],
)
def test_a_config_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"config: {message}"):
        LLaDA2({**CONFIG, **changes})


def test_a_config_that_transformers_5_has_written() -> None:
    rope = {"rope_type": "default", "rope_theta": 600.0, "partial_rotary_factor": 0.5}
    plain = LLaDA2.shape_of(CONFIG)
    assert LLaDA2.shape_of({**CONFIG, "rope_parameters": rope}) == plain
    assert LLaDA2.shape_of({**CONFIG, "rope_parameters": rope, "partial_rotary_factor": None}) == plain
    quarter = {**CONFIG, "rope_parameters": {**rope, "partial_rotary_factor": 0.25}}
    assert LLaDA2.shape_of({**quarter, "partial_rotary_factor": None}).rotary_dim == 4


def test_the_releases_mask(tmp_path: Path) -> None:
    """Of a config that names none, in a vocabulary of the releases' size."""
    config = {**CONFIG, "vocab_size": 157184, "mask_token_id": None}
    assert models.FAMILIES["llada2_moe"].released_mask_id(157184) == 156895
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.config_of(tmp_path)[1].block_length == BLOCK
