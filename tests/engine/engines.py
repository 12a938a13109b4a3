"""What the tests of the engine share: models, prompts, and a gate before each pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import Model

MODELS = {
    (name, dtype): golden.model(name, dtype=dtype)
    for name in ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a")
    for dtype in (torch.float32, torch.bfloat16)
}


def fast_dllm(dtype: torch.dtype) -> Model:
    """Block-causal with shifted logits, in blocks of 8."""
    torch.manual_seed(0)
    config = {
        "model_type": "Fast_dLLM_Qwen",
        "bd_size": BLOCK,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "mask_token_id": 511,
    }
    return models.FastDLLM(config).to(dtype).eval()


BLOCK = 8


MODELS |= {("fast_dllm", dtype): fast_dllm(dtype) for dtype in (torch.float32, torch.bfloat16)}


SDAR = MODELS["sdar_tiny_a", torch.float32]
LLADA = MODELS["llada_tiny_a", torch.float32]


def some_prompts(seed: int, count: int, longest: int = 30) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    return [torch.randint(0, 500, (n,), generator=g) for n in lengths]


def alone(model: Model, prompt: Tensor, cache: str, **settings: Any) -> tuple[list[int], int]:
    """Tokens up to EOS, a stop sequence or gen_length, and passes."""
    seed = torch.tensor([settings.pop("seed", 0)])
    out = dx.decode(model, [prompt], block_length=BLOCK, cache=cache, seed=seed, **settings)
    kept = min(int(out.kept[0]), settings["gen_length"])
    return out.responses[0][:kept].tolist(), int(out.nfe[0])


class Gate:
    """Lets a model's passes through one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = threading.Semaphore(0)
        self.counts: list[int] = []
        step = Model.step

        def gated(model: Model, ids: Tensor, cache: Any, metadata: Any, **more: Any) -> Tensor:
            assert self.passes.acquire(timeout=60)
            self.counts.append(len(ids))
            return step(model, ids, cache, metadata, **more)

        monkeypatch.setattr(Model, "step", gated)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.002)
