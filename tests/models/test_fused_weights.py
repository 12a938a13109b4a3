"""Weights side by side: one product for q, k and v and one for gate and up, and nothing else changed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drafters
import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import Model, fused_weights

NAMES = ["llada_tiny_a", "dream_tiny_a"]  # without and with biases of q, k and v
both = pytest.mark.parametrize("name", NAMES)
PRODUCTS = {True: 4, False: 7}  # of a layer: qkv, o, gate and up, down; each by itself


def stepped(model: Model, x: Tensor) -> Tensor:
    cache = model.new_cache(1, len(x))
    return model.step(x, cache, cache.metadata(model.spans(0, 0, len(x), len(x))))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::mm", "aten::addmm", "dparallel::linear")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def products(model: Model) -> float:
    """Matrix products of a layer in a step, counted."""
    with Products() as products:
        stepped(model, torch.arange(5))
    return products.count / model.shape.layers


def joined(model: Model) -> bool:
    found = {fused_weights.joined_view(group) is not None for group in model.groups()}
    assert len(found) == 1  # all or none
    return found.pop()


@torch.no_grad()
def test_a_compiled_model_is_one_graph() -> None:
    model = golden.model("llada_tiny_a", fuse=True)
    run = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.arange(5)[None]
    torch.testing.assert_close(run(x).logits, model(x).logits)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_the_numbers_stay(name: str, dtype: torch.dtype) -> None:
    plain = golden.model(name, dtype=dtype)
    assert not joined(plain)  # on a CPU the file stays mapped
    x = torch.randint(0, 510, (37,))
    for model in (golden.model(name, dtype=dtype, fuse=True), copy.deepcopy(plain).fuse()):
        assert joined(model)
        assert (products(plain), products(model)) == (PRODUCTS[False], PRODUCTS[True])
        torch.testing.assert_close(stepped(model, x), stepped(plain, x))
        torch.testing.assert_close(model.hidden(x[None]), plain.hidden(x[None]))


@both
def test_the_tokens_stay(name: str) -> None:
    prompt = torch.randint(2, 510, (2, 9))
    for dtype in (torch.float32, torch.bfloat16):
        plain, fused = (golden.model(name, dtype=dtype, fuse=fuse) for fuse in (False, True))
        for cache in ("none", "prefix", "dual"):
            ours, theirs = (
                dx.decode(m, prompt, gen_length=24, block_length=8, cache=cache).sequences
                for m in (fused, plain)
            )
            assert torch.equal(ours, theirs)


@both
def test_no_weight_is_held_twice_and_none_is_renamed(name: str, tmp_path: Path) -> None:
    model, stored = golden.model(name, fuse=True), golden.tensors(name)
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[n], t) for n, t in stored.items())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    assert all(p.is_leaf and type(p) is nn.Parameter for p in model.parameters())
    models.save(model, tmp_path / "ours")
    save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    for written in (
        load_file(tmp_path / "ours" / "model.safetensors"),
        load_file(tmp_path / "state.safetensors"),
        torch.load(tmp_path / "state.pt"),
    ):
        assert all(torch.equal(written[n], t) for n, t in stored.items())
    fresh = type(model)(model.config).fuse()
    assert fresh.load_state_dict(stored) == ([], [])
    assert joined(fresh)
    assert torch.equal(fresh.blocks[1].k.weight, model.blocks[1].k.weight)


@both
def test_moving_keeps_them_together(name: str) -> None:
    model = golden.model(name, fuse=True)
    parameters = dict(model.named_parameters())
    assert joined(model.to(torch.bfloat16))
    assert joined(model.half().float())
    assert dict(model.named_parameters()) == parameters  # the same objects
    assert model.dtype == torch.float32
    assert not joined(golden.model(name).to(torch.bfloat16))  # never asked to
    duplicate = copy.deepcopy(model)
    assert not joined(duplicate)
    assert joined(duplicate.fuse())
    with torch.no_grad():
        duplicate.blocks[0].q.weight.zero_()
    assert model.blocks[0].q.weight.any()
    assert duplicate.blocks[0].k.weight.any()


@both
def test_training_takes_them_apart(name: str) -> None:
    """So that nothing that saves in training takes slices of one storage for one tensor."""
    model, plain = (golden.model(name, fuse=fuse) for fuse in (True, False))
    parameters = dict(model.named_parameters())
    assert not joined(model.train())
    assert dict(model.named_parameters()) == parameters
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    x = torch.randint(0, 510, (2, 7))
    for m in (model, plain.train()):
        F.cross_entropy(m(x).logits.flatten(0, 1), x.flatten()).backward()
        torch.optim.SGD(m.parameters(), 0.1).step()
    for n, p in plain.named_parameters():
        assert torch.equal(p, parameters[n])
    assert products(model.eval()) == PRODUCTS[False]
    assert products(model.fuse()) == PRODUCTS[True]


def test_gradients_reach_each_while_together() -> None:
    """In evaluation mode too, as where all but an input is frozen."""
    model, plain = (golden.model("dream_tiny_a", fuse=fuse) for fuse in (True, False))
    x = torch.randint(0, 510, (2, 7))
    for m in (model, plain):
        m(x).logits.square().mean().backward()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), n


def replace_weight(model: Model) -> None:
    model.blocks[0].k.weight = nn.Parameter(model.blocks[0].k.weight.detach().clone())


def replace_data(model: Model) -> None:
    model.blocks[0].v.weight.data = model.blocks[0].v.weight.data.clone()


def replace_layer(model: Model) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    old = model.blocks[0].k
    model.blocks[0].k = Doubled(old.in_features, old.out_features, old.bias is not None)
    model.blocks[0].k.load_state_dict(old.state_dict())


def drop_a_bias(model: Model) -> None:
    model.blocks[0].v.bias = None


def hook(model: Model) -> None:
    model.blocks[0].q.register_forward_hook(lambda _m, _i, out: 2 * out)


def patch_forward(model: Model) -> None:
    layer = model.blocks[0].q
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2


CHANGES = [replace_weight, replace_data, replace_layer, hook, patch_forward]


@pytest.mark.parametrize(
    ("name", "change"), [*itertools.product(NAMES, CHANGES), ("dream_tiny_a", drop_a_bias)]
)
@torch.no_grad()
def test_what_stands_in_their_place_is_used(name: str, change: Callable[[Model], None]) -> None:
    changed, plain = (golden.model(name, fuse=fuse) for fuse in (True, False))
    before = products(changed)
    for model in (changed, plain):
        change(model)
    assert products(changed) == before + 2 / changed.shape.layers  # the first layer's q, k and v
    x = torch.arange(11)
    torch.testing.assert_close(stepped(changed, x), stepped(plain, x))


@torch.no_grad()
def test_hooks_of_blocks_and_norms_see_every_step() -> None:
    model = golden.model("llada_tiny_a", fuse=True)
    x, seen = torch.arange(11), []
    expected = stepped(model, x)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: streams.append(out.clone()))
    model.blocks[1].norm2.register_forward_hook(lambda _m, _i, out: seen.append(out))
    torch.testing.assert_close(stepped(model, x), expected)
    assert (len(streams), len(seen)) == (model.shape.layers, 1)
    torch.testing.assert_close(model.norm(streams[-1]), expected)


def test_wrap_leaves_the_weights_where_they_are() -> None:
    tensors = golden.tensors("llada_tiny_a")

    class Theirs(nn.Module):
        config = golden.json("llada_tiny_a", "config")

        def named_parameters(self, *_args: object, **_settings: object):  # type: ignore[override]
            yield from ((n, nn.Parameter(t)) for n, t in tensors.items())

    model = models.wrap(Theirs())
    assert {n: p.data_ptr() for n, p in model.state_dict().items()} == {
        n: t.data_ptr() for n, t in tensors.items()
    }
    assert products(model) == PRODUCTS[False]


def test_mixed_dtypes_are_left_apart() -> None:
    tensors = golden.tensors("llada_tiny_a")
    name = "model.transformer.blocks.0.k_proj.weight"
    tensors[name] = tensors[name].double()
    model = golden.model("llada_tiny_a")
    model.blocks[0].k.double()
    model.fuse()
    assert [fused_weights.joined_view(group) is not None for group in model.blocks[0].groups()] == [
        False,
        True,
    ]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in tensors.items())
    model.fuse()  # nor does asking again
    assert model.blocks[0].k.weight.dtype == torch.float64


def test_adapters_are_used_and_the_rest_stays_together() -> None:
    peft = pytest.importorskip("peft")
    model = golden.model("llada_tiny_a", fuse=True)
    x = torch.arange(11)
    with torch.no_grad():
        expected = stepped(model, x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj"]))
    with torch.no_grad():
        torch.testing.assert_close(stepped(model, x), expected)  # a fresh adapter adds zero
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.normal_()
        changed = stepped(model, x)
        assert (changed - expected).abs().max() > 0.01
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(stepped(merged, x), changed, rtol=1e-4, atol=1e-4)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a hook": lambda part: part.register_forward_hook(lambda *_: None),
    "a hook in front": lambda part: part.register_forward_pre_hook(lambda *_: None),
    "a method in its place": lambda part: setattr(part, "forward", part.forward),
    "compiled": lambda part: part.compile(),
    "another class": lambda part: setattr(part, "__class__", type("Other", (type(part),), {})),
    "another kind of part": lambda part: part.add_module("beside", nn.Dropout()),
}


@pytest.mark.parametrize("name", [*NAMES, "llada2_moe"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_addresses_tell_of_every_change_to_any_part(name: str, change: str) -> None:
    """In any module, experts among them, the model itself excepted where it is of another class."""
    model = golden.model(name) if name in NAMES else drafters.model_of(name)
    addresses = model.addresses()
    assert addresses is not None
    assert set(addresses) == {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    for path, _ in list(model.named_modules()):
        changed = copy.deepcopy(model)
        assert changed.addresses() is not None
        CHANGES[change](changed.get_submodule(path))
        assert (changed.addresses() is None) == (path != "" or change != "another class"), path


@pytest.mark.parametrize("name", [*NAMES, "llada2_moe"])
def test_the_addresses_tell_of_every_tensor_that_moves(name: str) -> None:
    model = golden.model(name) if name in NAMES else drafters.model_of(name)
    model.blocks[1].register_buffer("beside", torch.zeros(3))
    before = model.addresses()
    assert model.addresses() == before
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.clone()
        after = model.addresses()
        assert after != before
        before = after
    for block in model.blocks[:2] if name in NAMES else ():
        block.quantize()
        after = model.addresses()
        assert after is not None
        assert after != before
        before = after


@both
def test_a_weight_that_is_elsewhere_is_named(name: str) -> None:
    model = golden.model(name)
    for path, parameter in list(model.named_parameters()):
        module, _, leaf = path.rpartition(".")
        for away, said in ((parameter.to("meta"), "on the meta device"), (parameter[:0], "sharded")):
            setattr(model.get_submodule(module), leaf, nn.Parameter(away.detach()))
            with pytest.raises(ValueError, match=f"{path} is {said}"):
                models.for_decoding(model)
        setattr(model.get_submodule(module), leaf, parameter)
        assert models.for_decoding(model) is model
