"""Whole decodes: the published loop in plain torch, and ours.

On a CPU: the model that ships, batch 1, with the same weights and threshold; tokens are compared in float32.
No floor is claimed, since the matrix products are torch's. On a GPU: models of random weights in LLaDA-8B's
and Dream-7B's shapes; the floor is what each pass must read and compute.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.toy import tasks
from torch import Tensor

import dparallel_ext as dx

from . import baselines
from .harness import OURS, Case, Work

PROBLEMS = 20
BLOCK, PROMPT, NEW, TAKEN = 32, 256, 256, 8
"""The decodes on a GPU: 256 new tokens after a prompt of 256, 8 tokens a pass: 32 passes (40 for Dream with a
dual cache)."""

LLADA = {
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 500000.0,
    "include_bias": False,
    "weight_tying": False,
    "mask_token_id": 126336,
}
DREAM = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "mask_token_id": 151666,
}
MODELS = {"LLaDA-8B": (dx.models.LLaDA, LLADA), "Dream-7B": (dx.models.Dream, DREAM)}
SMALL_MODEL = {
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "mlp_hidden_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 1003,
    "mask_token_id": 1000,
}


# --- on a CPU ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return registry.load()[0]


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    tokenizer = registry.load()[1]
    problems = itertools.islice(tasks.problems("held_out", seed=2), PROBLEMS)
    return [torch.tensor([tokenizer.encode(p.prompt).ids]) for p in problems]


def of_ours(cache: str) -> Callable[..., Any]:
    def run(model: Any, prompt: Tensor) -> Tensor:
        return dx.decode(
            model, prompt, gen_length=tasks.GEN_LENGTH, block_length=32, threshold=0.5, cache=cache
        ).sequences

    return run


def of_published(cache: str) -> Callable[..., Any]:
    commit = functools.partial(baselines.published, threshold=0.5)

    def run(model: Any, prompt: Tensor) -> Tensor:
        return baselines.published_decode(
            baselines.Plain(model), prompt, model.mask_id, tasks.GEN_LENGTH, 32, commit, cache
        )[0]

    return run


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_decode(benchmark: Any, model: Any, prompts: list[Tensor], cache: str) -> None:
    """20 problems a round; before each round the published loop is timed on them, with the same cache."""
    run, baseline = of_ours(cache), of_published(cache)
    exact = copy.deepcopy(model).float()  # in bfloat16, rounding decides between some tokens
    same = sum(torch.equal(run(exact, p), baseline(exact, p)) for p in prompts)
    seconds = []

    def time_baseline() -> None:
        began = time.perf_counter()
        for prompt in prompts:
            baseline(model, prompt)
        seconds.append(time.perf_counter() - began)

    benchmark.group = f"decode 20 problems, cache {cache}"
    benchmark.pedantic(
        lambda: [run(model, p) for p in prompts], setup=time_baseline, rounds=11, warmup_rounds=1
    )
    benchmark.extra_info.update(
        contender=f"{OURS} ({same}/{PROBLEMS} with the same tokens in float32)",
        baselines={"published": statistics.median(seconds)},
    )


# --- on a GPU ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def model_of(name: str, device: torch.device, small: bool) -> dx.models.Model:
    """A model of random bfloat16 weights, made on the device and fused."""
    family, config = MODELS[name]
    if small:
        config = {k: SMALL_MODEL.get(k, v) for k, v in config.items()}
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return family(config).eval().requires_grad_(False).fuse()  # as `load` does on a GPU
    finally:
        torch.set_default_dtype(usual)


def decoders(
    model: dx.models.Model, prompts: Tensor, new: int, cache: str
) -> dict[str, Callable[..., Tensor]]:
    """Contender -> a function that decodes `prompts`, given the tokens to commit a pass."""
    quantised = copy.deepcopy(model).quantize()

    def ours(taken: int, model: dx.models.Model = model, graphs: bool = True) -> Tensor:
        settings = {"gen_length": new, "block_length": BLOCK, "selector": "quota", "threshold": taken}
        return dx.decode(model, prompts, cache=cache, graphs=graphs, **settings).sequences

    def loop(compiled: bool, commit: Callable[..., None]) -> Callable[[int], Tensor]:
        forward = baselines.Plain(model, compiled)

        def run(taken: int) -> Tensor:
            by = functools.partial(commit, quota=taken)
            return baselines.published_decode(forward, prompts, model.mask_id, new, BLOCK, by, cache)[0]

        return run

    return {
        "published": loop(False, baselines.published_quota),
        OURS: ours,
        f"{OURS}, graphs=False": functools.partial(ours, graphs=False),
        f"{OURS}, 8-bit weights": functools.partial(ours, model=quantised),
        "compiled": loop(True, baselines.compiled_quota),
    }


def weights_of(model: dx.models.Model) -> tuple[int, int]:
    """The bytes of the weights that a pass reads (without the embedding), and the count of the layers'
    parameters.
    """
    layers = sum(p.numel() for p in model.blocks.parameters())
    return 2 * (layers + model.lm_head.weight.numel()), layers


def decode(
    device: torch.device, small: bool, model: str, cache: str, batch: int, prompt: int, new: int
) -> Work:
    net = model_of(model, device, small)
    prompts = torch.randint(0, net.mask_id, (batch, prompt), device=device)
    s, length = net.shape, prompt + new
    weights, layers = weights_of(net)
    kept = 4 * batch * length * s.kv_heads * s.head_dim * s.layers  # keys and values, bytes

    def a_pass(width: int) -> tuple[float, float]:
        attention = 4 * width * length * s.heads * s.head_dim * s.layers
        return weights + kept, batch * (2 * layers * width + attention)

    blocks, passes = new // BLOCK, BLOCK // TAKEN
    if cache == "dual" and net.shift:  # the full pass fills one position only
        passes += 1
    full = blocks if cache == "dual" else blocks * passes
    phases = [(*a_pass(length), full), (*a_pass(BLOCK), blocks * passes - full)]
    return Work(
        {name: lambda turn, at, f=f: f(TAKEN) for name, f in decoders(net, prompts, new, cache).items()},
        phases,
        tokens=batch * new,
        agree=lambda result, expected: result.shape == expected.shape and net.mask_id not in result,
    )


def decode_step(device: torch.device, small: bool, model: str, batch: int, prompt: int, new: int) -> Work:
    """One pass over a block against a dual cache: what decoding 4 tokens a pass takes more than decoding 8,
    divided by the passes more.
    """
    net = model_of(model, device, small)
    prompts = torch.randint(0, net.mask_id, (batch, prompt), device=device)
    functions = decoders(net, prompts, new, "dual")
    return Work(
        {name: lambda turn, at, f=f: f(TAKEN // 2) for name, f in functions.items()},
        [(weights_of(net)[0], 0, 1)],
        less={name: lambda turn, at, f=f: f(TAKEN) for name, f in functions.items()},
        per=new // BLOCK * (BLOCK // (TAKEN // 2) - BLOCK // TAKEN),
    )


def case(model: str, cache: str, batch: int) -> Case:
    parameters = {"model": model, "cache": cache, "batch": batch, "prompt": PROMPT, "new": NEW}
    name = f"decode {NEW} tokens, {model}, cache {cache}, batch {batch}"
    return Case(name, "decode", decode, parameters, ("warm",))


def step_case(model: str, batch: int) -> Case:
    parameters = {"model": model, "batch": batch, "prompt": PROMPT, "new": NEW}
    name = f"decode step, {model}, cache dual, batch {batch}"
    return Case(name, "decode", decode_step, parameters, ("warm",))
