"""The compiled ops under checked, documented signatures.

`row_stats`, `select` and `unmask_` are torch custom ops (torch.ops.dparallel.*) with CPU and, where
built, CUDA kernels, and fake kernels for torch.compile. Their float64 twins are in `reference`.
"""

from __future__ import annotations

import numbers
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _C, policies  # noqa: F401  (importing _C registers the ops)
from .arguments import is_number, shown, temperature_in_force, whole
from .types import RowStats, UnmaskOutput

_ROW_FIELDS = 7
NO_ERROR = 2**63 - 1
_ERRORS = {
    1: "logits: {} holds NaN",
    2: "logits: {} leaves no token to choose: every logit that may be chosen is -inf",
    3: "logits: {} is masked and in the active window, but `positions` does not list it",
}

Ids = Tensor | Sequence[int] | None


def row_stats(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor = 0,
    position: int | Tensor | None = None,
    step: int | Tensor = 0,
) -> RowStats:
    """Statistics of softmax(logits), each needed row read once.

    Args:
        logits: (..., V) float32, bfloat16 or float16, any strides (copied where the vocabulary is not
            contiguous).
        rows: (N,) int64 flat indices into the leading dimensions; only these rows are read.
        mask_id: keeps its share of the softmax but is never chosen.
        suppress: ids left out altogether.
        temperature: above 0, also draw `sample` by Gumbel-max from softmax(logits / temperature). Below 1e-5
            it is 0, and above 2^100 (1.3e30) that.
        top_p, top_k: draw it from the most probable ids alone, ties to the lowest id: from those before
            which at most `top_p` of the probability comes (nucleus sampling, arXiv 1904.09751), and at
            most `top_k` of them. None, 1.0 and 0 leave nothing out. The noise of an id stays the same.
            They are not read where the temperature is 0 (or below 1e-5).
        seed, sequence, position, step: the Philox key, one value or one per row: a sample depends on
            its key alone. `position` defaults to the row's place in the output.

    Returns:
        RowStats with fields shaped like the leading dimensions, or (N,) with `rows`. The statistics do
        not depend on temperature, top_p or top_k, but `confidence` is that of the sampled token. A logit
        of +inf counts as the largest float32: k of them share the probability evenly.

    Raises:
        ValueError: on the CPU, for a row that holds NaN or leaves no token to choose. On CUDA, see
            `check_errors`.
    """
    stats, error = read_rows(
        logits,
        rows=rows,
        mask_id=mask_id,
        suppress=suppress,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        sequence=sequence,
        position=position,
        step=step,
    )
    _report(error, named_row)
    return stats


def read_rows(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor = 0,
    position: int | Tensor | None = None,
    step: int | Tensor = 0,
) -> tuple[RowStats, Tensor]:
    """`row_stats` that leaves bad rows to the caller: errors (rows,) int64 of `explain`, by row."""
    _check_logits(logits)
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    flat = _rows_view(logits)
    count = flat.shape[:-1].numel()
    if rows is not None:
        _check_index("rows", rows, logits)
        shape, count = rows.shape, rows.numel()
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    keys = None
    if temperature > 0:
        where = torch.arange(count, device=logits.device) if position is None else position
        keys = _keys(logits, count, seed=seed, sequence=sequence, position=where, step=step)
    tokens, fields, error = torch.ops.dparallel.row_stats(
        flat,
        rows,
        _mask_id(mask_id, vocab),
        _suppress(suppress, logits),
        temperature,
        top_p,
        top_k,
        keys,
        _counters(logits, count),
    )
    return _stats(tokens, fields, shape), error


def select(stats: RowStats, eligible: Tensor, policy: Tensor, *, check: bool = True) -> Tensor:
    """The positions that each policy row commits, from given statistics.

    Args:
        stats: confidence, margin and entropy (B, L) float32 are used; other fields are ignored.
        eligible: (B, L) bool, the masked positions of the active window.
        policy: (B, 5) float32 rows, see `policies.make`.
        check: False leaves the values unread, which a recording as a CUDA graph asks for.

    Returns:
        (B, L) bool: at least one position of every sequence that has an eligible one.

    Raises:
        ValueError: naming the argument that does not fit, or an eligible position whose score is NaN.
    """
    if eligible.ndim != 2 or eligible.dtype != torch.bool:
        raise ValueError(f"eligible: expected bool (B, L), got {eligible.dtype} {tuple(eligible.shape)}")
    scores = (stats.confidence, stats.margin, stats.entropy)
    for name, value in zip(("confidence", "margin", "entropy"), scores, strict=True):
        if value.shape != eligible.shape or value.dtype != torch.float32:
            raise ValueError(
                f"stats.{name}: expected float32 {tuple(eligible.shape)}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
    policies.check(policy, len(eligible), values=check)
    return torch.ops.dparallel.select(*scores, eligible, policy.to(eligible.device))


def unmask_(
    tokens: Tensor,
    logits: Tensor,
    *,
    mask_id: int,
    start: int | Tensor = 0,
    end: int | Tensor | None = None,
    selector: policies.Name = "entropy",
    threshold: policies.Number = 0.5,
    policy: Tensor | None = None,
    min_commit: policies.Number = 1,
    max_commit: policies.Number | None = None,
    score: policies.Name | None = None,
    positions: Tensor | None = None,
    suppress: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor | None = None,
    step: int | Tensor = 0,
    position_offset: int = 0,
    check: bool = True,
) -> UnmaskOutput:
    """One unmasking step, in place: statistics, selection and commit in one call.

    Only masked positions of each sequence's active window [start, end) are read.

    Args:
        tokens: (B, L) int64, any strides (a view such as `x[:, s:e]` will do); changed in place.
        logits: (B, L, V) float32, bfloat16 or float16; or (N, V) with `positions`.
        mask_id: the token that marks what is to be filled; it is never committed.
        start, end: columns, a number or (B,) int64; `end` None is L.
        selector, threshold, min_commit, max_commit, score: the policy, see `policies.make`; each one
            value or one per sequence.
        policy: (B, 5) float32 rows in full, instead of the above.
        positions: (N,) int64 ascending flat positions b * L + l that the rows of `logits` stand for, so
            that an LM head may be applied to the needed rows alone. It must list every masked
            position of the windows; others that it lists are not read.
        suppress: ids left out altogether.
        temperature: above 0, commit Gumbel-max samples of softmax(logits / temperature). Below 1e-5 it is 0,
            which commits the argmax, and above 2^100 (1.3e30) that.
        top_p, top_k: what may be sampled, see `row_stats`; the rule sees the statistics of all ids.
        seed, sequence, step: with the position, the sample's key; a number or (B,) int64. `sequence`
            defaults to 0..B-1.
        position_offset: added to the column to give the position, where `tokens` is a view.
        check: False leaves a bad row to the caller, who finds it in `error`, on the CPU too.

    Returns:
        UnmaskOutput: tensors on the device of the logits, without synchronisation.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU a row that holds NaN or
            leaves no token to choose (also since there is none but the mask token, or all are
            suppressed), by sequence and position, with every token left as it was. On CUDA such a row
            commits nothing in its sequence and raises a flag, see `check_errors`.
    """
    _check_logits(logits)
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a Tensor, got {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected int64 (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.device != logits.device:
        raise ValueError(f"tokens: expected on {logits.device} as the logits, got {tokens.device}")
    batch, length = tokens.shape
    if positions is None:
        if logits.shape[:-1] != tokens.shape:
            raise ValueError(
                f"logits: expected ({batch}, {length}, V) matching tokens, got {tuple(logits.shape)}"
            )
        stats_shape = tokens.shape
    else:
        _check_index("positions", positions, logits)
        if logits.ndim != 2 or len(logits) != len(positions):
            raise ValueError(
                f"logits: expected ({len(positions)}, V), a row for each of positions, "
                f"got {tuple(logits.shape)}"
            )
        stats_shape = positions.shape
    if policy is None:
        policy = policies.make(
            selector,
            threshold,
            min_commit=min_commit,
            max_commit=max_commit,
            score=score,
            batch=batch,
        )
    else:
        policies.check(policy, batch)
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    keys = None
    if temperature > 0:
        of = torch.arange(batch, device=logits.device) if sequence is None else sequence
        keys = _keys(logits, batch, seed=seed, sequence=of, step=step)
    committed, remaining, done, row_tokens, fields, error = torch.ops.dparallel.unmask_(
        tokens,
        logits if positions is None else _rows_view(logits),
        positions,
        _per_sequence("start", start, batch, logits),
        _per_sequence("end", length if end is None else end, batch, logits),
        policy.to(logits.device),
        _mask_id(mask_id, None),
        _suppress(suppress, logits),
        temperature,
        top_p,
        top_k,
        keys,
        position_offset,
        _counters(logits, batch + 1 + logits.shape[:-1].numel()),
    )
    if check:
        _report(error, Cell(length, position_offset))
    return UnmaskOutput(committed, remaining, done, _stats(row_tokens, fields, stats_shape), error)


# --- errors -------------------------------------------------------------------------------------

Where = Callable[[int], str]
"""Names a flat position; hashable, and equal to one that names all positions alike."""


@dataclass(frozen=True)
class Cell:
    """Names a flat position of tokens (B, length), whose columns count from `offset`."""

    length: int
    offset: int = 0

    def __call__(self, at: int) -> str:
        return f"sequence {at // self.length} at position {at % self.length + self.offset}"


def named_row(at: int) -> str:
    return f"row {at}"


class Errors:
    """What the launches of one stream have found bad, on the device until it is read.

    A word (an int64 on the device) for each kind of report, that is for each way to put it into words, holds
    the first report's error since it was read, of several rows' the least. So a report costs three small
    kernels and no memory.
    """

    KINDS = 64

    def __init__(self, device: torch.device) -> None:
        self.words = torch.full((self.KINDS,), NO_ERROR, device=device)
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.kinds: dict[tuple[Where, tuple[tuple[int, str], ...]], int] = {}
        """Places among the words."""

    def report(self, error: Tensor, where: Where, texts: Mapping[int, str]) -> None:
        kind = where, tuple(texts.items())
        at = self.kinds.get(kind)
        if at is None:
            if len(self.kinds) == self.KINDS:
                if _capturing(error.device):
                    return  # a recording cannot look, and keeps the words that it writes
                self.read()
                self.kinds.clear()
            at = self.kinds[kind] = len(self.kinds)
        word = self.words[at : at + 1]
        # In training what follows the first error follows from it.
        torch.where(word == NO_ERROR, error.amin(0, keepdim=True), word, out=word)

    def read(self) -> None:
        """Raise ValueError for the first kind that has an error; all words are as new. This waits."""
        # Not the whole device: that is forbidden while anybody records.
        here = None if self.stream is None else torch.cuda.current_stream(self.words.device)
        if self.stream is not None and here is not None:
            here.wait_stream(self.stream)
        found = self.words.tolist()
        if min(found) == NO_ERROR:
            return
        self.words.fill_(NO_ERROR)
        if self.stream is not None and here is not None:
            self.stream.wait_stream(here)
        for (where, texts), at in self.kinds.items():
            explain(found[at], where, dict(texts))


_errors: dict[tuple[torch.device, int | None], Errors] = {}
"""By device and stream. What is recorded has its own (stream None): it is replayed on any stream. That exists
once something was launched that was not recorded, as it is where a recording is warmed up."""
_errors_lock = threading.Lock()


def check_errors(device: torch.device | str | None = None) -> None:
    """Raise ValueError for a bad row that a CUDA op has met since the last call; this synchronises.

    What a CUDA graph of yours found is told once its replay comes before this on the current stream.

    device: "cuda" is every GPU of this process, and None every device.
    """
    asked = None if device is None else torch.device(device)
    with _errors_lock, torch.inference_mode():
        for (of, _), errors in _errors.items():
            if asked is None or (of.type == asked.type and asked.index in (None, of.index)):
                errors.read()


def _report(error: Tensor, where: Where, texts: Mapping[int, str] = _ERRORS) -> None:
    if torch.compiler.is_compiling() or isinstance(error, torch._subclasses.FakeTensor):
        return
    device = error.device
    if not _waits(device):
        explain(int(error.min()) if error.numel() else NO_ERROR, where, texts)
    elif error.numel():
        with _errors_lock, torch.inference_mode():
            recorded = _capturing(device)
            if not recorded:
                for stream in (None, stream_of(device)):
                    if (device, stream) not in _errors:
                        _errors[device, stream] = Errors(device)
            errors = _errors.get((device, None if recorded else stream_of(device)))
            if errors is not None:
                errors.report(error, where, texts)


def explain(error: int, where: Where, texts: Mapping[int, str] = _ERRORS) -> None:
    """Raise ValueError for an error that a kernel reports: 4 * flat position + code; not for NO_ERROR."""
    if error != NO_ERROR:
        raise ValueError(texts[error % 4].format(where(error // 4)))


def _waits(device: torch.device) -> bool:
    """Whether an error stays on the device until it is asked for, since a look would stop the host."""
    return device.type != "cpu"


# --- streams ------------------------------------------------------------------------------------


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    """Whether launches are recorded now, by whomever, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# --- arguments ----------------------------------------------------------------------------------


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a Tensor, got {type(logits).__name__}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits: expected float32, bfloat16 or float16, got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected (..., V) with V >= 1, got {tuple(logits.shape)}")


def _rows_view(logits: Tensor) -> Tensor:
    """(..., V) as (R, V) or (B, L, V) without a copy wherever strides allow."""
    if logits.ndim > 3:
        logits = logits.flatten(0, -3)
    return logits[None] if logits.ndim == 1 else logits


def _check_index(name: str, index: Tensor, logits: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"{name}: expected int64 (N,), got {index.dtype} {tuple(index.shape)}")
    if index.device != logits.device:
        raise ValueError(f"{name}: expected on {logits.device} as the logits, got {index.device}")


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> tuple[float, float, int]:
    """Temperature, top_p and top_k in force: (..., 1.0, 0) where none is given, or the temperature is 0.

    Raises ValueError naming the argument that does not fit.
    """
    temperature = temperature_in_force(temperature)
    top_p = 1.0 if top_p is None else top_p
    top_k = 0 if top_k is None else top_k
    if not (is_number(top_p) and 0 <= top_p <= 1):
        raise ValueError(f"top_p: expected a number from 0 to 1, got {shown(top_p)}")
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or not 0 <= top_k < 2**63:
        raise ValueError(f"top_k: expected a whole number >= 0 (0 keeps all), got {shown(top_k)}")
    return (temperature, float(top_p), int(top_k)) if temperature > 0 else (0.0, 1.0, 0)


def _mask_id(mask_id: int | None, vocab: int | None) -> int:
    if mask_id is None:
        return -1
    if type(mask_id) is not int or mask_id < 0:
        mask_id = whole("mask_id", mask_id, 0)
    if vocab is not None and mask_id >= vocab:
        raise ValueError(f"mask_id: expected an id below {vocab}, got {mask_id}")
    return mask_id


def _suppress(ids: Ids, logits: Tensor) -> Tensor | None:
    if ids is None:
        return None
    if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.device == logits.device:
        ids = ids.reshape(-1)
        return ids.sort().values if ids.device.type == "cpu" else ids  # the CPU bisects them
    given = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else ids
    found = sorted({i if type(i) is int else whole("suppress", i, 0) for i in given})
    vocab = logits.shape[-1]
    if found and not (found[0] >= 0 and found[-1] < vocab):
        raise ValueError(
            f"suppress: expected ids in [0, {vocab}), got {found[0] if found[0] < 0 else found[-1]}"
        )
    return torch.tensor(found, dtype=torch.int64, device=logits.device) if found else None


def _per_sequence(name: str, value: int | Tensor, batch: int, like: Tensor) -> Tensor:
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
        return torch.full((batch,), value, dtype=torch.int64, device=like.device)
    try:
        values = torch.as_tensor(value, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an integer or int64 ({batch},), got {value!r}") from error
    if values.is_floating_point() or values.ndim > 1 or values.shape not in ((), (batch,)):
        raise ValueError(
            f"{name}: expected an integer or int64 ({batch},), got {values.dtype} {tuple(values.shape)}"
        )
    return values.to(torch.int64).expand(batch)


def _keys(like: Tensor, count: int, **parts: int | Tensor) -> Tensor:
    """(count, len(parts)) int64."""
    return torch.stack([_per_sequence(k, v, count, like) for k, v in parts.items()], 1)


_counter_buffers: dict[tuple[torch.device, int], list[Tensor]] = {}
_own_recording = threading.local()


@contextmanager
def own_recording() -> Iterator[None]:
    """Within it, what is recorded uses the counters of the stream that it is recorded on.

    For a recording that is replayed on that stream alone. What is recorded must have run there before, so
    that the counters are there.
    """
    _own_recording.active = True
    try:
        yield
    finally:
        _own_recording.active = False


def _counters(like: Tensor, needed: int) -> Tensor | None:
    """int32 zeros for the CUDA kernels' last-block-done counters, which they leave zero again.

    There is one buffer per stream, so that launches that may overlap never share one. Launches that somebody
    else records, or compiles, get zeros of their own: they may be replayed on any stream.
    """
    if like.device.type != "cuda":
        return None
    own = not torch.compiler.is_compiling()
    if own and _capturing(like.device):
        own = getattr(_own_recording, "active", False)
    if not own:
        return torch.zeros(needed, dtype=torch.int32, device=like.device)
    buffers = _counter_buffers.setdefault((like.device, stream_of(like.device)), [])
    if not buffers or buffers[-1].numel() < needed:
        size = max(4096, 2 * buffers[-1].numel() if buffers else 0, needed)
        # Those outgrown stay: CUDA graphs may hold their addresses.
        buffers.append(torch.zeros(size, dtype=torch.int32, device=like.device))
    return buffers[-1]


def _stats(tokens: Tensor, fields: Tensor, shape: Sequence[int]) -> RowStats:
    token, sample = (x.view(shape) for x in tokens.unbind(0))
    top1, top2, lse, confidence, margin, entropy, logprob = (x.view(shape) for x in fields.unbind(0))
    return RowStats(token, top1, top2, lse, confidence, margin, entropy, sample, logprob)


# --- fake kernels -------------------------------------------------------------------------------


def _row_outputs(like: Tensor, count: Any, errors: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((2, count), dtype=torch.int64),
        like.new_empty((_ROW_FIELDS, count), dtype=torch.float32),
        like.new_empty((errors,), dtype=torch.int64),
    )


@torch.library.register_fake("dparallel::row_stats")
def _(  # type: ignore[no-untyped-def]
    logits, rows, mask_id, suppress, temperature, top_p, top_k, keys, counters
):
    count = logits.shape[:-1].numel() if rows is None else rows.shape[0]
    return _row_outputs(logits, count, count)


@torch.library.register_fake("dparallel::select")
def _(confidence, margin, entropy, eligible, policy):  # type: ignore[no-untyped-def]
    return eligible.new_empty(eligible.shape)


@torch.library.register_fake("dparallel::unmask_")
def _(  # type: ignore[no-untyped-def]
    tokens,
    logits,
    positions,
    start,
    end,
    policy,
    mask_id,
    suppress,
    temperature,
    top_p,
    top_k,
    keys,
    position_offset,
    counters,
):
    batch = tokens.shape[0]
    return (
        logits.new_empty((batch,), dtype=torch.int64),
        logits.new_empty((batch,), dtype=torch.int64),
        logits.new_empty((), dtype=torch.bool),
        *_row_outputs(logits, logits.shape[:-1].numel(), batch),
    )


# --- ops without a gradient ---------------------------------------------------------------------


_library = torch.library.Library("dparallel", "IMPL")


def _below_autograd(op: Any, keys: Any, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, keys: Any, *arguments: Any) -> Any:
        ctx.op = op._schema.name
        return _below_autograd(op, keys, *arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{ctx.op} has no gradient: detach its inputs, or use torch.no_grad()")


def _without_gradient(name: str) -> None:
    """A backward pass through the op raises, where torch's own fallback would warn and yield None.

    An op that returns nothing has no backward pass to raise in, so it refuses inputs that require a gradient.
    What an op changes in place counts as changed, for those who have saved it for their own gradient.
    """
    op = getattr(torch.ops.dparallel, name).default
    written = [place for place, argument in enumerate(op._schema.arguments) if argument.is_write]

    def kernel(keys: Any, *arguments: Any) -> Any:
        wanted = None
        if torch.is_grad_enabled():
            named = zip(op._schema.arguments, arguments, strict=False)
            wanted = next((a.name for a, t in named if isinstance(t, Tensor) and t.requires_grad), None)
        if wanted and not op._schema.returns:
            raise ValueError(
                f"{wanted}: requires a gradient, which this op does not have; use torch.no_grad()"
            )
        result = (_NoGradient.apply if wanted else _below_autograd)(op, keys, *arguments)
        changed = [arguments[place] for place in written]
        torch.autograd.graph.increment_version([t for t in changed if t is not None and not t.is_inference()])
        return result

    _library.impl(name, kernel, "Autograd", with_keyset=True)


for _name in (
    "row_stats", "select", "unmask_", "kv_write", "block_attention", "rms_norm", "swiglu", "fp8_linear",
    "fp8_widen", "certainty_forcing_loss_backward", "certainty_forcing_loss_backward_",
):  # fmt: skip
    _without_gradient(_name)
