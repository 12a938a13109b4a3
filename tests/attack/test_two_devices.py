"""Prompts and masks on the CPU beside a model on another device, or some of them there: the result is that of
one device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import drafters
import pytest
import torch
from conftest import golden
from dparallel import likelihood
from second_device import DEVICE, SecondDevice, There, moved
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import compat
from dparallel_ext.ops import inputs

PROMPT = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
Place = Callable[[Tensor], Tensor]


VERIFIER = drafters.model_of()


def verifier_beside(model: Any) -> Any:
    """With its own copy of the weights, since they move."""
    verifier = copy.deepcopy(VERIFIER)
    return verifier if model.device.type == "cpu" else moved(verifier)


CALLS: dict[str, tuple[str, Callable[..., Any]]] = {
    "decode": ("llada", lambda m, p, a: dx.decode(m, p, attention_mask=a, gen_length=8).sequences),
    "decode, dual": (
        "llada",
        lambda m, p, a: dx.decode(
            m, p, attention_mask=a, gen_length=8, cache="dual", block_length=4, temperature=1.0, seed=3,
            suppress=[3], infill=True, record=True, eos_id=9,
        ).sequences,
    ),
    "speculate": (
        "llama",
        lambda m, p, a: dx.speculate(m, p, attention_mask=a, gen_length=8, drafter="ngram").sequences,
    ),
    "adaptive": (
        "llada",
        lambda m, p, a: dx.adaptive_decode(
            m, p, attention_mask=a, gen_length=8, verifier=verifier_beside(m)
        ).sequences,
    ),
    "generate": ("llada", lambda m, p, a: compat.generate(m, p, 8, 8, 8, attention_mask=a)[0]),
    "generate, guided": (
        "llada",
        lambda m, p, a: compat.generate(m, p, 8, 8, 8, attention_mask=a, cfg_scale=0.5)[0],
    ),
    "generate, without a mask": ("llada", lambda m, p, a: compat.generate(m, p, 8, 8, 8)[0]),
    "generate, guided, without a mask": (
        "llada",
        lambda m, p, a: compat.generate(m, p, 8, 8, 8, cfg_scale=0.5)[0],
    ),
    "prefix": ("llada", lambda m, p, a: compat.generate_with_prefix_cache(m, p, 8, 8, 8)[0]),
    "dual": ("llada", lambda m, p, a: compat.generate_with_dual_cache(m, p, 8, 8, 8)[0]),
    "diffusion_generate": (
        "dream",
        lambda m, p, a: compat.diffusion_generate(m, p, attention_mask=a, steps=4, max_new_tokens=8),
    ),
    "diffusion_generate, entropy": (
        "dream",
        lambda m, p, a: compat.diffusion_generate(m, p, steps=4, max_new_tokens=8, alg="entropy", top_k=4),
    ),
    "likelihood": (
        "llada",
        lambda m, p, a: torch.tensor(
            [one.logprob for one in likelihood.log_likelihoods(m, [*p], [*p[:, 1:3]], samples=2)]
        ),
    ),
    "forward": ("llada", lambda m, p, a: m(p.to(m.device), attention_mask=a).logits),
    "forward, causal": ("llama", lambda m, p, a: m(p.to(m.device), attention_mask=a).logits),
    "masks": (
        "llada",
        lambda m, p, a: dx.semi_autoregressive_masks(
            p.to(m.device), a.sum(1), mask_id=9, lengths=a.sum(1), mask_ratio=a[:, 1] / 2,
            generator=torch.Generator().manual_seed(3),
        ).input_ids,
    ),
}  # fmt: skip


def model_of(kind: str) -> Any:
    return drafters.model_of() if kind == "llama" else golden.model(f"{kind}_tiny_a")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inputs, "DEVICES", {"cpu", DEVICE.type})
    with SecondDevice():
        yield


def here(tensor: Tensor) -> Tensor:
    return tensor.clone()


@pytest.mark.parametrize("places", [(here, here), (here, There), (There, here)], ids=["both", "ids", "mask"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_on_another_device_than_the_model(name: str, places: tuple[Place, Place]) -> None:
    kind, call = CALLS[name]

    def result(model: Any, *arguments: Tensor) -> Tensor:
        torch.manual_seed(3)
        found: Tensor = call(model, *arguments)
        return found.cpu()

    expected = result(model_of(kind), PROMPT.clone(), MASK.clone())
    found = result(moved(model_of(kind)), places[0](PROMPT), places[1](MASK))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_second_device_does_not_mix() -> None:
    with pytest.raises(RuntimeError, match="expected tensors on one device"):
        There(torch.ones(3)) + torch.ones(3)
    with pytest.raises(RuntimeError, match="expected tensors on one device"):
        torch.cat([There(torch.ones(3)), torch.ones(3)])
    assert (There(torch.ones(3)) + torch.ones(())).device == DEVICE
    assert torch.zeros(3, device=DEVICE).device == DEVICE == torch.zeros(3).to(DEVICE)[:2].device
