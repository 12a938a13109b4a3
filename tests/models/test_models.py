"""Native models: published logits, caches, and what a checkpoint may get wrong."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dparallel_ext import models
from dparallel_ext.cache import KVCache
from dparallel_ext.models import Dream, LLaDA, Model, fused_weights, rope

NAMES = ["llada_tiny_a", "dream_tiny_a"]
both = pytest.mark.parametrize("name", NAMES)


def stepped(model: Model, x: Tensor, cache: KVCache, start: int = 0) -> Tensor:
    """Hidden states (B, Q, width) of positions start .. start + Q - 1 of every sequence, by one `step`."""
    end = start + x.shape[1]
    spans = [span for b in range(len(x)) for span in model.spans(b, start, end, cache.length)]
    return model.step(x.flatten(), cache, cache.metadata(spans)).view(*x.shape, model.shape.width)


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**golden.json(name, "config"), **changes}


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 510, (batch, length))


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


class HuggingFaceLike(nn.Module):
    """Parameters under the checkpoint's names, and a config with `to_dict`."""

    class Config:
        def __init__(self, content: dict[str, Any]) -> None:
            self.content = content

        def to_dict(self) -> dict[str, Any]:
            return self.content

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = self.Config(config)
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(tensor))


@both
def test_golden_logits(name: str) -> None:
    published = golden.tensors(name, "logits")
    model = golden.model(name)
    with torch.no_grad():
        logits = model(published["input_ids"]).logits
    torch.testing.assert_close(logits, published["logits"], rtol=0, atol=1e-4)
    assert not model.training
    assert (model.mask_id, model.eos_id, model.vocab_size) == (511, 1, 512)
    assert model.shift is ("entropy" in model.strict) is (name == "dream_tiny_a")


def plain_llada(config: dict[str, Any], w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """LLaDA's formulas over a checkpoint's tensors in float64, without a module in sight."""
    w = {n.removeprefix("model.transformer."): t.double() for n, t in w.items()}
    width, heads = config["d_model"], config["n_heads"]
    size, kv_heads = width // heads, config["n_kv_heads"] or heads

    def norm(x: Tensor, name: str) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.tensor(0.0))

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def rope(x: Tensor) -> Tensor:  # (B, H, L, D): the pair (j, j + D/2) turned by l theta^(-2j/D)
        j = torch.arange(size // 2).double()
        angle = torch.arange(x.shape[2])[:, None] * config["rope_theta"] ** (-2 * j / size)
        z = torch.complex(x[..., : size // 2], x[..., size // 2 :])
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    x = w["wte.weight"][tokens]
    for layer in range(config["n_layers"]):
        b = f"blocks.{layer}."
        y = norm(x, b + "attn_norm")
        q, k, v = (
            linear(y, b + p).unflatten(-1, (-1, size)).transpose(1, 2) for p in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (rope(k), v))
        attention = (rope(q) @ k.mT / size**0.5).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), b + "attn_out")
        y = norm(x, b + "ff_norm")
        x = x + linear(F.silu(linear(y, b + "ff_proj")) * linear(y, b + "up_proj"), b + "ff_out")
    head = "wte" if config["weight_tying"] else "ff_out"
    logits = F.linear(norm(x, "ln_f"), w[f"{head}.weight"], w.get(f"{head}.bias"))
    return logits / width**0.5 if config["scale_logits"] else logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": None, "multi_query_attention": None},
        {"include_bias": True},
        {"include_bias": True, "bias_for_layer_norm": None, "weight_tying": True},
        {"include_qkv_bias": True, "scale_logits": True},
        {"weight_tying": True, "embedding_size": 640},
        {"mlp_hidden_size": None, "mlp_ratio": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_llada_config(changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_of("llada_tiny_a", **changes)
    model = LLaDA(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    tokens = ids(2, 9)
    expected = plain_llada(config, tensors, tokens)
    with torch.no_grad():
        for m in (model, models.load(write(tmp_path / "a", config, tensors))):
            torch.testing.assert_close(m(tokens).logits.double(), expected, rtol=1e-4, atol=1e-4)
    held, untied = (
        {n.removeprefix("model.transformer.") for n in tensors},
        not config["weight_tying"],
    )
    assert ("ff_out.weight" in held) is untied
    assert ("ff_out.bias" in held) is (untied and config["include_bias"])
    for linear in ("attn_out", "ff_proj", "up_proj", "ff_out"):
        assert (f"blocks.0.{linear}.bias" in held) is config["include_bias"]
    qkv_bias = config["include_bias"] or config["include_qkv_bias"]
    assert ("blocks.0.q_proj.bias" in held) is qkv_bias
    norm_bias = config["include_bias"] and config["bias_for_layer_norm"] is None
    assert ("ln_f.bias" in held) is norm_bias


@both
def test_state_dict_has_the_names_of_the_checkpoint(name: str) -> None:
    stored = golden.tensors(name)
    model = golden.model(name)
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[n], stored[n]) for n in stored)
    fresh = type(model)(model.config)
    assert fresh.load_state_dict(stored) == ([], [])
    x = ids(1, 5)
    assert torch.equal(fresh(x).logits, model(x).logits)
    by_our_names = type(model)(model.config)
    assert by_our_names.load_state_dict(dict(model.named_parameters())) == ([], [])
    assert torch.equal(by_our_names(x).logits, model(x).logits)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bogus"):
        fresh.load_state_dict({**stored, "bogus": torch.zeros(1)})
    assert nn.ModuleDict({"m": model}).state_dict().keys() == {f"m.{n}" for n in stored}


@both
@torch.no_grad()
def test_full_pass_with_cache_equals_without(name: str) -> None:
    model, x = golden.model(name), ids(3, 21)
    cache = model.new_cache(3, 21)
    assert cache.slots.shape[:2] == (3, 2)
    assert (cache.batch, cache.length) == (3, 21)
    torch.testing.assert_close(stepped(model, x, cache), model.hidden(x))


@both
@pytest.mark.parametrize("span", [(13, 21), (6, 13), (20, 21), (0, 4)])
@torch.no_grad()
def test_partial_pass_over_unchanged_tokens_changes_nothing(name: str, span: tuple[int, int]) -> None:
    model, x, (s, e) = golden.model(name), ids(2, 21), span
    cache = model.new_cache(2, 21)
    full = stepped(model, x, cache)
    before = cache.slots.clone()
    torch.testing.assert_close(stepped(model, x[:, s:e], cache, s), full[:, s:e])
    torch.testing.assert_close(cache.slots, before)


@both
@torch.no_grad()
def test_partial_pass_overwrites_its_slots_alone(name: str) -> None:
    model, x = golden.model(name), ids(2, 21)
    cache = model.new_cache(2, 21)
    stepped(model, x, cache)
    before = cache.slots.clone()
    changed = (x[:, 6:13] + 1) % 510
    partial = stepped(model, changed, cache, 6)
    new = cache.slots
    assert torch.equal(new[..., :6, :], before[..., :6, :])
    assert torch.equal(new[..., 13:, :], before[..., 13:, :])
    assert not torch.isclose(new[..., 6:13, :], before[..., 6:13, :]).all()
    # A single layer's prefix and suffix do not depend on the change, so there the pass is exact.
    config = dict(model.config)
    config["num_hidden_layers" if name == "dream_tiny_a" else "n_layers"] = 1
    single = type(model)(config)
    cache = single.new_cache(2, 21)
    stepped(single, x, cache)
    y = torch.cat((x[:, :6], changed, x[:, 13:]), 1)
    torch.testing.assert_close(stepped(single, changed, cache, 6), single.hidden(y)[:, 6:13])
    assert partial.shape == (2, 7, 64)


@both
@torch.no_grad()
def test_head_on_chosen_rows(name: str) -> None:
    model, x = golden.model(name), ids(2, 11)
    hidden = model.hidden(x)
    rows = torch.tensor([3, 4, 20])
    expected = model(x).logits.flatten(0, 1)[rows]
    torch.testing.assert_close(model.head(hidden.flatten(0, 1)[rows]), expected)


@both
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_batch(name: str) -> None:
    model, x = golden.model(name), ids(5, 17)
    together = model(x).logits
    for b in range(5):
        torch.testing.assert_close(model(x[b : b + 1]).logits[0], together[b], rtol=0, atol=1e-4)


@both
@torch.no_grad()
def test_every_position_sees_every_other(name: str) -> None:
    model, x = golden.model(name), ids(1, 9)
    y = x.clone()
    y[0, 8] = (y[0, 8] + 1) % 510
    assert (model(x).logits != model(y).logits).any(-1).all()


@both
@pytest.mark.parametrize("shape", [(0, 7), (2, 0), (0, 0), (1, 1)])
@torch.no_grad()
def test_empty_and_smallest(name: str, shape: tuple[int, int]) -> None:
    model = golden.model(name)
    assert model(ids(*shape)).logits.shape == (*shape, 512)
    cache = model.new_cache(*shape)
    assert stepped(model, ids(*shape), cache).shape == (*shape, 64)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_load_in_another_dtype(name: str, dtype: torch.dtype) -> None:
    model, x = golden.model(name, dtype=dtype), ids(2, 13)
    assert model.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    logits = model(x).logits
    assert logits.dtype == model.new_cache(1, 1).slots.dtype == dtype
    reference = golden.model(name)(x).logits
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-4}[dtype]
    assert (logits - reference).abs().max() < tolerance * reference.abs().max()


@both
@torch.no_grad()
def test_bfloat16_rounds_where_the_published_code_does(name: str) -> None:
    model, x = golden.model(name, dtype=torch.bfloat16), ids(2, 300)
    block, embedded = model.blocks[0], model.embed(x)
    block.norm1.weight.mul_(torch.rand(64) + 0.5)
    y = embedded.float()
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + model.shape.eps)).bfloat16()
    assert torch.equal(block.norm1(embedded), y * block.norm1.weight)
    cache = model.new_cache(2, 300)
    stepped(model, x, cache)
    # Cached keys are turned in float32 and rounded once; published Dream rounds each product.
    dtype = torch.float32
    k = fused_weights.apply(block.k, y * block.norm1.weight).unflatten(-1, (-1, 16)).transpose(1, 2).to(dtype)
    theta = model.config["rope_theta"]
    angle = torch.outer(torch.arange(300.0), 1 / theta ** (torch.arange(0, 16, 2) / 16))
    cos, sin = (t.repeat(1, 2).to(dtype) for t in (angle.cos(), angle.sin()))
    turned = k * cos + torch.cat((-k[..., 8:], k[..., :8]), -1) * sin
    assert torch.equal(cache.slots[0, 0], turned.bfloat16())


@both
def test_gradients_reach_every_parameter_even_after_inference(name: str) -> None:
    model, x = golden.model(name), ids(2, 13)
    with torch.inference_mode():
        model(x)
    loss = F.cross_entropy(model(x).logits.flatten(0, 1), x.flatten())
    loss.backward()
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        assert p.grad.abs().max() > 0, n


def test_training_from_scratch_learns() -> None:
    model, x = LLaDA(config_of("llada_tiny_a")), ids(4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 7.5  # ln 512 = 6.2
    assert losses[-1] < losses[0] - 2


def test_copy_is_independent() -> None:
    model = golden.model("llada_tiny_a")
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        duplicate.embed.weight.zero_()
    assert model.embed.weight.abs().max() > 0
    assert duplicate.state_dict().keys() == model.state_dict().keys()
    assert duplicate.state_dict()["model.transformer.wte.weight"].abs().max() == 0


@both
def test_sharded(name: str, tmp_path: Path) -> None:
    tensors = golden.tensors(name)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({n: tensors[n] for n in held}, tmp_path / file)
    index = {"weight_map": {n: file for file, held in shards.items() for n in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(golden.home / name / "config.json", tmp_path)
    x = ids(1, 9)
    assert torch.equal(models.load(tmp_path)(x).logits, golden.model(name)(x).logits)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 'b\.safetensors'"):
        models.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        models.load(tmp_path)


@pytest.mark.parametrize("key", ["weight_tying", "tie_word_embeddings"])
def test_tied(key: str, tmp_path: Path) -> None:
    name, head = {
        "weight_tying": ("llada_tiny_a", "model.transformer.ff_out.weight"),
        "tie_word_embeddings": ("dream_tiny_a", "lm_head.weight"),
    }[key]
    tensors, config = golden.tensors(name), config_of(name, **{key: True})
    with pytest.raises(ValueError, match=f"{key} says that {head} is the embedding, and it is stored with"):
        models.load(write(tmp_path, config, tensors))
    embed = "model.transformer.wte.weight" if key == "weight_tying" else "model.embed_tokens.weight"
    tensors[head] = tensors[embed].clone()
    stored_too = models.load(write(tmp_path, config, tensors))
    del tensors[head]
    model = models.load(write(tmp_path, config, tensors))
    for m in (stored_too, model):
        assert m.lm_head.weight is m.embed.weight
    x = ids(1, 5)
    assert torch.equal(model(x).logits, stored_too(x).logits)
    models.save(model, tmp_path / "again")
    assert head not in load_file(tmp_path / "again" / "model.safetensors")
    fresh = type(model)(config)
    assert fresh.load_state_dict(tensors) == ([], [])
    assert fresh.lm_head.weight is fresh.embed.weight
    assert torch.equal(fresh(x).logits, model(x).logits)


@both
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = golden.model(name)
    models.save(model, tmp_path / "deep" / "er", dtype=torch.bfloat16)
    again = models.load(tmp_path / "deep" / "er")
    assert again.dtype == torch.bfloat16
    assert sorted(f.name for f in (tmp_path / "deep" / "er").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    written = json.loads((tmp_path / "deep" / "er" / "config.json").read_text())
    assert written == {**model.config, "torch_dtype": "bfloat16"}
    for n, p in again.state_dict().items():
        assert torch.equal(p, model.state_dict()[n].bfloat16()), n
    models.save(model, tmp_path / "deep" / "er")  # over the file that `again` still maps
    assert torch.equal(again.embed.weight, model.embed.weight.bfloat16())


@both
def test_wrap_shares_the_weights(name: str) -> None:
    tensors = golden.tensors(name)
    theirs = HuggingFaceLike(config_of(name), tensors)
    model = models.wrap(theirs)
    published = golden.tensors(name, "logits")
    logits = model(published["input_ids"]).logits
    torch.testing.assert_close(logits, published["logits"], rtol=0, atol=1e-4)
    ours = {n: p.data_ptr() for n, p in model.state_dict().items()}
    assert ours == {n: p.data_ptr() for n, p in theirs.named_parameters()}
    theirs.config = theirs.config.to_dict()  # type: ignore[assignment]
    assert type(models.wrap(theirs)) is type(model)


def test_wrap_says_what_does_not_fit() -> None:
    config, tensors = config_of("llada_tiny_a"), golden.tensors(NAMES[0])
    name = "model.transformer.blocks.1.up_proj.weight"
    with pytest.raises(ValueError, match=r"hf_model: Linear has no \.config"):
        models.wrap(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"hf_model.*blocks\.1\.up_proj\.weight is missing"):
        models.wrap(HuggingFaceLike(config, {n: t for n, t in tensors.items() if n != name}))
    with pytest.raises(ValueError, match=r"up_proj\.weight is \(3, 2\), expected \(176, 64\)"):
        models.wrap(HuggingFaceLike(config, {**tensors, name: torch.zeros(3, 2)}))
    with pytest.raises(ValueError, match=r"weights on one device, got \['cpu', 'meta'\]"):
        models.wrap(HuggingFaceLike(config, {**tensors, name: tensors[name].to("meta")}))


def test_rope_parameters_as_transformers_5_writes_them() -> None:
    config = config_of("dream_tiny_a")
    theta = config.pop("rope_theta")
    del config["rope_scaling"]
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    assert Dream(config).shape.rope_theta == theta == 1e6


@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a"])
def test_padding_is_not_seen(name: str) -> None:
    """A padded row's states are those of the row alone, whatever the padding holds."""
    model = golden.model(name, dtype=torch.float64)
    tokens = ids(3, 12)
    lengths = (12, 7, 1)
    mask = torch.tensor([[i < n for i in range(12)] for n in lengths])
    padded = model.hidden(tokens, attention_mask=mask)
    for row, n in enumerate(lengths):
        alone = model.hidden(tokens[row : row + 1, :n])
        torch.testing.assert_close(padded[row : row + 1, :n], alone, rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_runs_the_layers_again_and_changes_nothing() -> None:
    model = golden.model("llada_tiny_a", dtype=torch.float32).train()
    tokens, grads, calls = ids(2, 6), [], [0]
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
    for expected in (1, 3):
        model.zero_grad()
        model(tokens).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        assert calls == [expected]
        model.gradient_checkpointing_enable()
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)
    model.gradient_checkpointing_disable()
    model(tokens).logits.square().mean().backward()
    assert calls == [4]


def test_two_threads_that_need_tables_of_different_lengths() -> None:
    """The longer one's is set first, and its cache is made with it all the same."""
    short_begins, long_set = threading.Event(), threading.Event()
    table = rope.table

    def waits(rows: int, *rest: Any) -> Any:
        if rows == 64:
            short_begins.set()
            long_set.wait()
        return table(rows, *rest)

    class Watched(models.LLaDA):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_rope" and value is not None and len(value[0]) > 64:
                long_set.set()
                short.join()

    model = Watched(config_of("llada_tiny_a"))
    short = threading.Thread(target=model.new_cache, args=(1, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope, "table", waits)
        short.start()
        short_begins.wait()
        assert len(model.new_cache(1, 200).rope[0]) >= 200
