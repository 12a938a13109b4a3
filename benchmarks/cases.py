"""What `python -m benchmarks.gpu` times, as data: every op and whole decodes, most important first."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dparallel_ext as dx

from . import (
    baselines,
    bench_certainty_forcing_loss,
    bench_fp8_linear,
    bench_rms_norm,
    bench_swiglu,
    bench_unmask,
)

OURS = "dparallel_ext"
TAU = 0.5
BLOCK, PROMPT, NEW, TAKEN = 32, 256, 256, 8
"""Of the decodes: 256 new tokens after 256, by 8 a pass: 32 passes (Dream with a dual cache 40)."""

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
SMALL = {
    "rows": 5,
    "vocab": 1003,
    "width": 24,
    "batch": 3,
    "length": 70,
    "heads": 4,
    "kv_heads": 2,
    "tokens": 37,
    "new": 32,
    "prompt": 19,
    "side": 64,
    "megabytes": 1,
}
"""What `--small` caps each parameter at: odd sizes, so that every edge of a kernel is met."""


@dataclass
class Work:
    """A case on its device, ready to run."""

    run: dict[str, Callable[[int, int], Any]]
    """Contender -> a step on state `turn` (what it changes) and data set `at` (what it reads)."""
    phases: list[tuple[float, float, int]]
    """(bytes, FLOP, times): what must be moved and computed; each takes the longer of the two at least."""
    sets: int = 1
    """States, and data sets; a graph rotates among them, so that they exceed the L2 cache."""
    graphs: tuple[str, ...] = ()
    """The contenders whose launches a graph can replay."""
    reset: Callable[[], None] = lambda: None
    """Before each repeat, not timed: the states as at first."""
    less: dict[str, Callable[[int, int], Any]] = field(default_factory=dict)
    """A run whose time is taken off, and what is left divided by `per`."""
    per: int = 1
    tokens: int = 0
    """That a step yields, where it is a decode."""
    agree: Callable[[Any, Any], bool] = lambda found, expected: True
    """Whether a contender's result is that of the first one; looked at before it is timed."""


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    """The public name in `dparallel_ext` that it measures; "" where it is a ceiling."""
    make: Callable[..., Work]
    parameters: dict[str, Any]
    conditions: tuple[str, ...] = ("cold", "warm", "graph", "graph, warm")

    def build(self, device: torch.device, small: bool) -> Work:
        capped = {k: min(v, SMALL[k]) if small and k in SMALL else v for k, v in self.parameters.items()}
        return self.make(device=device, small=small, **capped)


def sets_of(bytes_: float, small: bool) -> int:
    """Data sets that exceed any L2 cache several times over (256 MB and more), and at least two."""
    return 2 if small else max(2, -(-(2**28) // int(bytes_)))


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


# --- the card's two ceilings ---------------------------------------------------------------------


def copy(device: torch.device, small: bool, megabytes: int) -> Work:
    """A copy kernel, reading and writing `megabytes` each, far more than the L2 cache."""
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    return Work({"torch copy": lambda turn, at: target.copy_(source)}, [(2 * source.nbytes, 0, 1)])


def matmul(device: torch.device, small: bool, side: int) -> Work:
    a, b = random(device, side, side), random(device, side, side)
    return Work({"torch matmul": lambda turn, at: a @ b}, [(3 * a.nbytes, 2 * side**3, 1)])


# --- ops -----------------------------------------------------------------------------------------


def unmask(device: torch.device, small: bool, rows: int, vocab: int) -> Work:
    """A whole step, every row masked and in the window."""
    mask = min(bench_unmask.MASK, vocab - 1)
    tokens, logits = bench_unmask.inputs(rows, vocab, mask, device)
    sets = sets_of(logits.nbytes, small)
    data = [logits, *(logits.clone() for _ in range(sets - 1))]
    board = tokens.expand(sets, -1, -1).clone()

    def of(step: Callable[..., None]) -> Callable[[int, int], Tensor]:
        def run(turn: int, at: int) -> Tensor:
            step(board[turn], data[at], mask, 0, rows, TAU)
            return board[turn]

        return run

    return Work(
        {name: of(step) for name, step in bench_unmask.CONTENDERS.items()},
        [(logits.nbytes, 0, 1)],
        sets=sets,
        graphs=(OURS,),
        reset=lambda: board.copy_(tokens.expand_as(board)),
        agree=torch.equal,
    )


def row_stats(device: torch.device, small: bool, rows: int, vocab: int) -> Work:
    logits = bench_unmask.inputs(rows, vocab, vocab - 1, device)[1][0]
    sets = sets_of(logits.nbytes, small)
    data = [logits, *(logits.clone() for _ in range(sets - 1))]
    compiled = baselines.compile_(baselines.statistics)
    return Work(
        {
            "eager": lambda turn, at: baselines.statistics(data[at])[0],
            OURS: lambda turn, at: dx.row_stats(data[at]).token,
            "compiled": lambda turn, at: compiled(data[at])[0],
        },
        [(logits.nbytes, 0, 1)],
        sets=sets,
        graphs=(OURS, "eager"),
        agree=torch.equal,
    )


def select(device: torch.device, small: bool, batch: int, length: int) -> Work:
    score = torch.rand(batch, length, device=device)
    entropy = 4 * torch.rand(batch, length, device=device)
    stats = dx.RowStats(*[score] * 5, score, entropy, *[score] * 2)
    eligible = torch.rand(batch, length, device=device) < 0.6
    policy = dx.policies.make("entropy", TAU, batch=batch, device=device)

    def eager(turn: int, at: int) -> Tensor:
        masked = torch.where(eligible, entropy, torch.inf)
        return eligible & ((masked <= TAU) | (masked == masked.amin(1, keepdim=True)))

    return Work(
        {"eager": eager, OURS: lambda turn, at: dx.select(stats, eligible, policy)},
        [(batch * length * (3 * 4 + 2), 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        agree=torch.equal,
    )


def commit(device: torch.device, small: bool, batch: int, length: int) -> Work:
    """A quarter of the first block of each sequence written, and the block counted."""
    mask, width = 7, min(BLOCK, length)
    tokens = torch.full((batch, length), mask, device=device)
    grid = torch.arange(width, device=device) + length * torch.arange(batch, device=device)[:, None]
    positions, written = grid.flatten(), torch.rand(batch * width, device=device) < 0.25
    token = torch.randint(mask, (batch * width,), device=device)
    board = tokens.expand(16, -1, -1).clone()

    def eager(turn: int, at: int) -> Tensor:
        flat = board[turn].view(-1)
        before = flat[positions]
        flat[positions] = torch.where(written, token, before)
        masked, changed = flat[grid] == mask, (flat[grid] != before.view_as(grid)).sum(1)
        first = torch.where(masked.any(1), masked.int().argmax(1), width)
        return torch.stack((masked.sum(1), first, changed))[:2]

    def ours(turn: int, at: int) -> Tensor:
        out = dx.commit_(board[turn], positions, written, token, mask_id=mask, end=width)
        return torch.stack((out.remaining, out.first))

    return Work(
        {"eager": eager, OURS: ours},
        [(batch * width * (3 * 8 + 1), 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        reset=lambda: board.copy_(tokens.expand_as(board)),
        agree=torch.equal,
    )


def loss(device: torch.device, small: bool, rows: int, vocab: int) -> Work:
    """Forward and backward, every row active: read twice, and the gradient written."""
    module = bench_certainty_forcing_loss
    case = module.inputs(rows, slice(0, rows), vocab, device)

    def of(contender: str) -> Callable[[int, int], Tensor]:
        return lambda turn, at: module.step(contender, *case)[0]

    return Work({name: of(name) for name in module.CONTENDERS}, [(3 * case[0].nbytes, 0, 1)], agree=close)


def close(found: Tensor, expected: Tensor) -> bool:
    """Within a hundredth of the largest number."""
    return bool((found - expected).abs().max() <= 0.01 * expected.abs().max())


def linear_loss(device: torch.device, small: bool, rows: int, width: int, vocab: int) -> Work:
    """Forward and backward with a frozen head: three matrix products, 6 N H V FLOP."""
    module = bench_certainty_forcing_loss
    hidden, head, labels, _ = case = module.linear_inputs(rows, width, vocab, device)
    chunk = 256 if device.type == "cuda" else 32  # MB of logits, as the op takes

    def gradient(loss_of_rows: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss_of_rows(hidden @ head.T, labels), hidden)[0]

    run: dict[str, Callable[[int, int], Any]] = {
        "eager": lambda turn, at: gradient(baselines.row_loss),
        "compiled": lambda turn, at: gradient(baselines.compile_(baselines.row_loss)),
        OURS: lambda turn, at: module.linear_step(*case),
        "matrix products alone": lambda turn, at: module.linear_products(*case, megabytes=chunk),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()

        def of_liger(turn: int, at: int) -> None:  # not the same gradient
            torch.autograd.grad(liger(head, hidden, labels), hidden)

        run["Liger (cross entropy alone)"] = of_liger
    return Work(
        run,
        [(3 * head.nbytes, 6 * rows * width * vocab, 1)],
        agree=lambda found, expected: found is None or close(found, expected),
    )


def kv_write(device: torch.device, small: bool, tokens: int, heads: int, kv_heads: int, dim: int) -> Work:
    """Rows to random slots of a cache twice as long. Warm, as in a decode, which has just made them."""
    q, keys, values = (random(device, tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    caches = torch.zeros(2, 1, 2 * tokens, kv_heads, dim, dtype=q.dtype, device=device)
    k_cache, v_cache = caches.transpose(2, 3)  # (1, Hkv, slots, D)
    slots = torch.randperm(2 * tokens, device=device)[:tokens]
    positions = torch.arange(tokens, device=device)
    cos, sin = dx.rope_table(tokens, dim, device=device)
    first = q.clone()

    def plain(step: Callable[..., Tensor]) -> Callable[[int, int], Tensor]:
        def run(turn: int, at: int) -> Tensor:
            step(q, keys, values, caches[0, 0], caches[1, 0], slots, cos, sin)
            return caches

        return run

    def ours(turn: int, at: int) -> Tensor:
        dx.kv_write(q, keys, values, k_cache, v_cache, positions=positions, slots=slots, cos=cos, sin=sin)
        return caches

    def reset() -> None:
        q.copy_(first)
        caches.zero_()

    return Work(
        {
            "eager": plain(baselines.kv_write),
            "compiled": plain(baselines.compile_(baselines.kv_write)),
            OURS: ours,
        },
        [(2 * tokens * dim * (2 * heads + 4 * kv_heads) + cos.nbytes + sin.nbytes, 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        reset=reset,
        agree=close,
    )


def block_attention(
    device: torch.device, small: bool, batch: int, length: int, heads: int, kv_heads: int, dim: int
) -> Work:
    """A block of 32 queries of each sequence against a contiguous cache of `length`."""
    q = random(device, batch, BLOCK, heads, dim)
    shape = (batch, kv_heads, length, dim)
    bytes_ = 2 * (2 * batch * kv_heads * length * dim) + 2 * q.nbytes
    sets = sets_of(bytes_, small)
    data = [(random(device, *shape), random(device, *shape)) for _ in range(sets)]
    lengths = torch.full((batch,), length, device=device)

    def sdpa(turn: int, at: int) -> Tensor:
        grouped = heads != kv_heads
        y = functional.scaled_dot_product_attention(q.transpose(1, 2), *data[at], enable_gqa=grouped)
        return y.transpose(1, 2)

    return Work(
        {
            "torch SDPA": sdpa,
            OURS: lambda turn, at: dx.block_attention(q, *data[at], lengths, longest_length=length),
        },
        [(bytes_, 4 * batch * BLOCK * length * heads * dim, 1)],
        sets=sets,
        graphs=(OURS, "torch SDPA"),
        agree=close,
    )


def rms_norm(device: torch.device, small: bool, tokens: int, width: int) -> Work:
    """With the residual's sum. Warm, as in a decode, which has just made both."""
    x, delta, weight = random(device, tokens, width), random(device, tokens, width), random(device, width)
    eager = bench_rms_norm.eager
    return layer(
        {"eager": eager, "compiled": baselines.compile_(eager), OURS: bench_rms_norm.ours},
        (x, delta, weight),
        4 * x.nbytes + weight.nbytes,
    )


def swiglu(device: torch.device, small: bool, tokens: int, width: int) -> Work:
    """Warm, as in a decode, which has just made its input."""
    both, eager = random(device, tokens, 2 * width), bench_swiglu.eager
    return layer(
        {"eager": eager, "compiled": baselines.compile_(eager), OURS: dx.swiglu},
        (both,),
        both.nbytes * 3 // 2,
    )


def fp8_linear(device: torch.device, small: bool, tokens: int, width: int) -> Work:
    """To three times the width, as gate or up; several matrices, so that none is in the L2 cache."""
    out, x = 3 * width, random(device, tokens, width)
    sets = sets_of(out * width, small)
    weights = [bench_fp8_linear.Weights(out, width, device) for _ in range(sets)]

    def step(name: str) -> Callable[[int, int], Tensor]:
        return torch.inference_mode()(lambda turn, at: weights[at].contenders[name](x))

    def agree(found: Tensor, expected: Tensor) -> bool:  # within what 8 bits leave
        gap = (found - expected).double().square().mean() / expected.double().square().mean()
        return float(gap) < 0.03**2

    return Work(
        {name: step(name) for name in weights[0].contenders},
        [(out * width, 2 * tokens * out * width, 1)],
        sets=sets,
        graphs=tuple(weights[0].contenders),
        agree=agree,
    )


def layer(steps: dict[str, Callable[..., Any]], inputs: tuple[Tensor, ...], bytes_: int) -> Work:
    """Steps that change nothing, under inference mode, without which the models' do not take our ops."""

    def under(step: Callable[..., Any]) -> Callable[[int, int], Any]:
        @torch.inference_mode()
        def run(turn: int, at: int) -> Any:
            return step(*inputs)

        return run

    return Work(
        {name: under(step) for name, step in steps.items()},
        [(bytes_, 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        agree=lambda found, expected: all(close(a, b) for a, b in zip(found, expected, strict=True)),
    )


# --- whole decodes -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def model_of(name: str, device: torch.device, small: bool) -> dx.models.Model:
    """Random bfloat16 weights, made on the device and fused."""
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
    """Contender -> tokens, by so many a pass."""
    quantised = deepcopy(model).quantize()

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
    """Bytes that a pass reads at least, the embedding left out; and the layers' parameters."""
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
    if cache == "dual" and net.shift:  # the full pass fills one position
        passes += 1
    full = blocks if cache == "dual" else blocks * passes
    phases = [(*a_pass(length), full), (*a_pass(BLOCK), blocks * passes - full)]
    return Work(
        {name: lambda turn, at, f=f: f(TAKEN) for name, f in decoders(net, prompts, new, cache).items()},
        phases,
        tokens=batch * new,
        agree=lambda found, expected: found.shape == expected.shape and net.mask_id not in found,
    )


def decode_step(device: torch.device, small: bool, model: str, batch: int, prompt: int, new: int) -> Work:
    """A pass over a block against a dual cache: what decoding by 4 a pass takes more than by 8, a pass."""
    net = model_of(model, device, small)
    prompts = torch.randint(0, net.mask_id, (batch, prompt), device=device)
    found = decoders(net, prompts, new, "dual")
    return Work(
        {name: lambda turn, at, f=f: f(TAKEN // 2) for name, f in found.items()},
        [(weights_of(net)[0], 0, 1)],
        less={name: lambda turn, at, f=f: f(TAKEN) for name, f in found.items()},
        per=new // BLOCK * (BLOCK // (TAKEN // 2) - BLOCK // TAKEN),
    )


# --- the list ------------------------------------------------------------------------------------


def _decode(model: str, cache: str, batch: int) -> Case:
    parameters = {"model": model, "cache": cache, "batch": batch, "prompt": PROMPT, "new": NEW}
    name = f"decode {NEW} tokens, {model}, cache {cache}, batch {batch}"
    return Case(name, "decode", decode, parameters, ("warm",))


def _step(model: str, batch: int) -> Case:
    parameters = {"model": model, "batch": batch, "prompt": PROMPT, "new": NEW}
    return Case(
        f"decode step, {model}, cache dual, batch {batch}", "decode", decode_step, parameters, ("warm",)
    )


def _rows(make: Callable[..., Work], op: str, rows: int) -> Case:
    return Case(f"{op}, {rows} rows", op, make, {"rows": rows, "vocab": bench_unmask.VOCAB})


def _attention(family: str, batch: int, length: int) -> Case:
    heads, kv_heads = {"LLaDA": (32, 32), "Dream": (28, 4)}[family]
    parameters = {"batch": batch, "length": length, "heads": heads, "kv_heads": kv_heads, "dim": 128}
    name = f"block_attention, {family} heads, batch {batch}, length {length}"
    return Case(name, "block_attention", block_attention, parameters, ("cold", "graph"))


def _kv_write(family: str, tokens: int) -> Case:
    heads, kv_heads = {"LLaDA": (32, 32), "Dream": (28, 4)}[family]
    parameters = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": 128}
    name = f"kv_write, {family} heads, {tokens} tokens"
    return Case(name, "kv_write", kv_write, parameters, ("warm", "graph, warm"))


def _layer(op: str, make: Callable[..., Work], tokens: int, width: int) -> Case:
    name = f"{op}, {tokens} rows of {width}"
    return Case(name, op, make, {"tokens": tokens, "width": width}, ("warm", "graph, warm"))


LOSS = {"rows": 4096, "vocab": bench_unmask.VOCAB}
LINEAR = {"rows": 8192, "width": 4096, "vocab": bench_unmask.VOCAB}
SELECT = {"batch": 64, "length": 512}
COPY = Case("copy bandwidth", "", copy, {"megabytes": 2048}, ("warm",))
MATMUL = Case("bf16 matrix rate", "", matmul, {"side": 8192}, ("warm",))

CASES = (
    COPY,
    MATMUL,
    _rows(unmask, "unmask_", 32),
    _rows(unmask, "unmask_", 512),
    Case("certainty_forcing_loss, 4096 rows", "certainty_forcing_loss", loss, LOSS, ("cold",)),
    Case(
        "linear_certainty_forcing_loss, 8192 rows",
        "linear_certainty_forcing_loss",
        linear_loss,
        LINEAR,
        ("cold",),
    ),
    _attention("LLaDA", 1, 512),
    _attention("LLaDA", 8, 512),
    _step("LLaDA-8B", 1),
    _decode("LLaDA-8B", "dual", 1),
    _decode("LLaDA-8B", "dual", 8),
    _decode("LLaDA-8B", "none", 1),
    _kv_write("LLaDA", 32),
    _layer("rms_norm", rms_norm, 32, 4096),
    _layer("swiglu", swiglu, 32, 12288),
    Case("fp8_linear, 32 rows of 4096", "fp8_linear", fp8_linear, {"tokens": 32, "width": 4096}),
    _rows(row_stats, "row_stats", 32),
    _rows(row_stats, "row_stats", 512),
    Case("select, batch 64, 512 positions", "select", select, SELECT, ("warm", "graph, warm")),
    Case("commit, batch 64, 512 positions", "commit_", commit, SELECT, ("warm", "graph, warm")),
    _step("LLaDA-8B", 8),
    _decode("LLaDA-8B", "none", 8),
    *(_attention("LLaDA", batch, length) for batch, length in ((1, 4096), (1, 32768), (64, 512), (8, 4096))),
    *(_attention("Dream", batch, length) for batch, length in ((1, 512), (8, 512), (1, 32768), (64, 4096))),
    *(_attention("LLaDA", batch, length) for batch, length in ((64, 4096), (8, 32768))),
    _kv_write("LLaDA", 4096),
    _layer("rms_norm", rms_norm, 4096, 4096),
    _layer("swiglu", swiglu, 4096, 12288),
    Case("fp8_linear, 8 rows of 4096", "fp8_linear", fp8_linear, {"tokens": 8, "width": 4096}),
    _kv_write("Dream", 32),
    _step("Dream-7B", 1),
    _decode("Dream-7B", "dual", 1),
    _decode("Dream-7B", "dual", 8),
    _decode("Dream-7B", "none", 1),
    _decode("Dream-7B", "none", 8),
)  # fmt: skip
