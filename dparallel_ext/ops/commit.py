"""Write tokens and count windows of them, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import CommitOutput
from . import streams
from .errors import Cell, report
from .fake import register_fake
from .inputs import check_index, check_tokens, expect, mask_id_of, windows_of
from .kernel import kernel

_commit_ = kernel("commit_")


def commit_(
    tokens: Tensor,
    positions: Tensor | None = None,
    commit: Tensor | None = None,
    token: Tensor | None = None,
    *,
    mask_id: int,
    lane: Tensor | None = None,
    start: int | Tensor = 0,
    end: int | Tensor | None = None,
    check: bool = True,
) -> CommitOutput:
    """Write tokens in place, then count the masks and changes in windows; without `commit` and `token`, count
    alone.

    It is the last step from logits to tokens: `row_stats` reads, a rule decides, `commit_` writes.

    Args:
        tokens: (B, L) int64, any strides; changed in place, in memory of their own.
        positions: (N,) int64 strictly ascending flat positions b * L + l of the rows below; None: every
            position, N = B * L.
        commit: (N,) bool, or (B, L) without `positions`: whether the row's token is written.
        token: (N,) int64, or (B, L): the tokens to write; read only where `commit` is true.
        mask_id: the mask token; it is never written.
        lane: (W,) int64: the sequence of each window; None: window w is of sequence w, and W = B.
        start, end: columns [start, end) of each window, a number or (W,) int64; `end` None is L. Columns
            beyond the sequence are ignored.
        check: False reports no token that may not be written, on a GPU, which saves a small kernel.

    Windows may overlap, come in any order, and be of sequences in which nothing is written.

    Returns:
        CommitOutput: counts after the writes, tensors on the device of the tokens, without synchronisation.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU a position that is out of bounds or
            not ascending, a lane out of bounds, or, naming sequence and position, a token to write that is
            the mask token or negative; no token is changed then. On CUDA positions out of bounds are skipped,
            any one of several tokens for one position may stay, a lane out of bounds has no tokens, and a
            token that may not be written is skipped and raises a flag, see `check_errors`.
        TypeError: naming an argument that should be a tensor and is not.

    Source: published decoders count by `(x == mask_id).sum()` after each pass.
    """
    check_tokens(tokens)
    batch, length = tokens.shape
    if (commit is None) != (token is None):
        raise ValueError(
            "token: expected together with commit, got "
            + ("commit alone" if token is None else "token alone")
        )
    if commit is None and positions is not None:
        raise ValueError(f"positions: expected none without commit and token, got {type(positions).__name__}")
    if commit is not None and token is not None:
        if positions is not None:
            check_index("positions", positions, tokens, "tokens")
        shape = tuple(tokens.shape if positions is None else positions.shape)
        for name, tensor, dtype in (("commit", commit, torch.bool), ("token", token, torch.int64)):
            flat = positions is None and isinstance(tensor, Tensor) and tensor.ndim == 1
            expect(name, tensor, (batch * length,) if flat else shape, dtype)
            if tensor.device != tokens.device:
                raise ValueError(f"{name}: expected on {tokens.device} as the tokens, got {tensor.device}")
        commit, token = commit.reshape(-1), token.reshape(-1)
    start, end = windows_of(tokens, lane, start, end)
    remaining, first, changed, error = _commit_(
        tokens,
        positions,
        commit,
        token,
        mask_id_of(mask_id, None),
        lane,
        start,
        end,
        streams.counters_for(tokens, 2 + len(start)),
    )
    if check and commit is not None:
        report(error, Cell(length), _ERRORS)
    return CommitOutput(remaining, first, changed)


_ERRORS = {1: "token: {} was to become the mask token, or an id below 0"}


@register_fake("commit_")
def _(start: Tensor) -> tuple[Tensor, ...]:
    return (*(start.new_empty(start.shape) for _ in range(3)), start.new_empty((1,)))
