"""Accept the drafted tokens that are the model's own choice: statistics and walk in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import described, whole
from ..types import AcceptOutput
from . import streams
from .errors import lane_row, report
from .fake import register_fake
from .inputs import Ids, check_logits, check_sampling, expect, mask_id_of, per_sequence, suppressed
from .kernel import kernel
from .row_stats import as_stats, row_outputs

_accept = kernel("accept")


def accept(
    logits: Tensor,
    draft: Tensor,
    parent: Tensor,
    q_start: Tensor,
    q_end: Tensor,
    *,
    room: int | Tensor | None = None,
    eos_ids: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    keys: Tensor | None = None,
    max_q_len: int | None = None,
    check: bool = True,
) -> AcceptOutput:
    """Accept, in each lane of a verify pass, the drafted tokens that the model itself would have chosen.

    A lane is a sequence of the pass, and has rows [q_start, q_end): a tree of drafted tokens, its root first.
    The choice at a row is `row_stats(...).sample` there, to the bit: the argmax, or a Gumbel-max sample whose
    noise depends only on its key. The walk goes from the root to the child whose drafted token is the choice
    (the lowest row, if several are), and on from there. The lane emits the choices along this path; the last
    of them, which no child holds, is the bonus token. Each is the model's own choice after the tokens before
    it, so if keys name position and sequence, the text is that of plain decoding, whatever the draft.

    Args:
        logits: (N, V) float32, bfloat16 or float16: the rows of all lanes.
        draft: (N,) int64 the token at each row; a root's, the last committed token, is not read.
        parent: (N,) int64 rows counted from the lane's first row: -1 for the root, an earlier row for others;
            in a chain, the row before.
        q_start, q_end: (B,) int64 rows of each lane, in any order; lanes share no row, and rows of no lane
            are not read. A lane without rows is idle.
        room: the most tokens that a lane may emit, a number or (B,) int64 >= 0. With 0 its rows are not read.
        eos_ids: (B, E) int64 end-of-text ids of each lane; negative ones are ignored. The lane stops behind
            the first of them that it emits.
        mask_id, suppress: ids that are never chosen, see `row_stats`.
        temperature, top_p, top_k: of the samples, see `row_stats`.
        keys: (N, 4) int64 seed, sequence, position, step of each row's noise. Not read at temperature 0.
        max_q_len: an upper bound of q_end - q_start, which sizes the output and a CUDA launch without waiting
            for the device. Default: N.
        check: False reports a bad row in `error` alone, on the CPU too.

    Returns:
        AcceptOutput: tensors on the device of the logits, without synchronisation. A lane's tokens do not
        depend on other lanes.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU, before anything is read, lanes that
            are out of bounds, overlap or have more rows than max_q_len, and a parent that is not an earlier
            row; and, naming lane and row, a row on a lane's path that holds NaN or leaves no token to choose.
            Rows off the path may be bad: plain decoding would not have computed them. On CUDA a lane with a
            bad row on its path emits nothing and raises a flag, see `check_errors`; a lane that is out of
            bounds, or overlaps an earlier one, emits nothing; rows beyond max_q_len are ignored; and a row
            whose parent is not an earlier one is nobody's child.
        TypeError: naming an argument that should be a tensor and is not.

    Source: token matching along a tree as SpecInfer's greedy verification (arXiv 2305.09781), with samples
    coupled by position-keyed Gumbel noise in place of rejection sampling.
    """
    check_logits(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits: expected (N, V), got {tuple(logits.shape)}")
    rows, vocab = logits.shape
    if not isinstance(q_start, Tensor) or q_start.ndim != 1:
        raise ValueError(f"q_start: expected int64 (B,), got {described(q_start)}")
    lanes = len(q_start)
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    if temperature == 0:
        keys = None
    elif keys is None:
        raise ValueError(f"keys: expected int64 ({rows}, 4) at a temperature of {temperature:g}, got None")
    if room is not None:
        room = per_sequence("room", room, lanes, logits)
    ids = eos_ids.shape[-1] if isinstance(eos_ids, Tensor) and eos_ids.ndim else 0
    wanted: list[tuple[str, Any, tuple[int, ...]]] = [
        ("draft", draft, (rows,)),
        ("parent", parent, (rows,)),
        ("q_start", q_start, (lanes,)),
        ("q_end", q_end, (lanes,)),
        ("eos_ids", eos_ids, (lanes, ids)),
        ("keys", keys, (rows, 4)),
    ]
    for name, tensor, shape in wanted:
        if tensor is None and name in ("eos_ids", "keys"):
            continue
        expect(name, tensor, shape, torch.int64)
        if tensor.device != logits.device:
            raise ValueError(f"{name}: expected on {logits.device} as the logits, got {tensor.device}")
    count, path, tokens, ended, row_tokens, fields, error = _accept(
        logits,
        draft,
        parent,
        q_start,
        q_end,
        room,
        eos_ids,
        mask_id_of(mask_id, vocab),
        suppressed(suppress, logits),
        temperature,
        top_p,
        top_k,
        keys,
        rows if max_q_len is None else whole("max_q_len", max_q_len, 0),
        streams.counters_for(logits, lanes + rows),
    )
    if check:
        report(error, lane_row)
    return AcceptOutput(count, path, tokens, ended, as_stats(row_tokens, fields, (rows,)), error)


@register_fake("accept")
def _(logits: Tensor, q_start: Tensor, max_q_len: int) -> tuple[Tensor, ...]:
    lanes = q_start.shape[0]
    return (
        logits.new_empty((lanes,), dtype=torch.int64),
        logits.new_empty((lanes, max_q_len), dtype=torch.int64),
        logits.new_empty((lanes, max_q_len), dtype=torch.int64),
        logits.new_empty((lanes,), dtype=torch.bool),
        *row_outputs(logits, logits.shape[0], lanes),
    )
