"""The head of the losses of hidden states: it is applied, and its gradient taken, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..arguments import check_tensor, described, number, whole
from .certainty_forcing_loss import real_dtype
from .inputs import WIDE_DTYPES, refuse_transform


def check_head(hidden: Tensor, head: Tensor, name: str, head_name: str) -> tuple[Tensor, Tensor]:
    """Hidden states (..., H) and the head (V, H), in autocast's dtype under autocast.

    Raises ValueError naming the argument that does not fit.
    """
    check_tensor(name, hidden)
    check_tensor(head_name, head)
    if hidden.ndim < 1 or hidden.dtype not in WIDE_DTYPES:
        raise ValueError(f"{name}: expected floating point (..., H), got {described(hidden)}")
    if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{head_name}: expected (V, {hidden.shape[-1]}) matching {name}, got {tuple(head.shape)}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, head))
    if head.dtype != hidden.dtype or head.device != hidden.device:
        raise ValueError(
            f"{head_name}: expected {hidden.dtype} on {hidden.device} as {name}, "
            f"got {head.dtype} on {head.device}"
        )
    if head.shape[0] < 1:
        raise ValueError(f"{head_name}: expected at least one row")
    refuse_transform(name, hidden)
    refuse_transform(head_name, head)
    return hidden, head


def check_softcap(softcap: float | None) -> float:
    """`softcap` as a number, 0.0 for none."""
    cap = 0.0 if softcap is None else number("softcap", softcap)
    if softcap is not None and not cap:
        raise ValueError(f"softcap: expected a number > 0 or None, got {softcap!r}")
    return cap


CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""The most bytes of logits that exist at once, by type of device."""


def rows_of_chunk(chunk_rows: int | None, head: Tensor) -> int:
    """`chunk_rows`, by default as many rows of the logits of the head (V, H) as `CHUNK_BYTES` lets, at least
    one."""
    if chunk_rows is not None:
        return whole("chunk_rows", chunk_rows, 1)
    rows = CHUNK_BYTES.get(head.device.type, CHUNK_BYTES["cpu"]) // (head.shape[0] * head.element_size())
    # Whole tiles of the matrix products: 1024 rows of LLaDA's 126464 16-bit logits, not 1061.
    return rows // 128 * 128 if rows >= 128 else max(1, rows)


def chunks(
    hidden: Tensor, head: Tensor, active: Tensor, softcap: float, chunk_rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of the active rows: indices (n,), hidden states (n, H), and logits (n, V), all in one buffer."""
    at = active.nonzero()[:, 0]
    memory = hidden.new_empty((min(chunk_rows, len(at)), len(head)))
    for begin in range(0, len(at), chunk_rows):
        rows = at[begin : begin + chunk_rows]
        states, logits = hidden[rows], memory[: len(rows)]
        torch.mm(states, head.T, out=logits)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        yield rows, states, logits


def slope_of(softcap: float, logits: Tensor) -> Tensor | None:
    """The derivative of the soft cap at capped logits; None without a cap."""
    return (logits / softcap).square_().neg_().add_(1) if softcap else None


class HeadGradient:
    """The gradients of the hidden states (N, H) and, where it needs one, of the head (V, H), by chunks."""

    def __init__(self, hidden: Tensor, head: Tensor, head_needs_grad: bool) -> None:
        self.head, self.head_needs_grad = head, head_needs_grad
        self.of_hidden = torch.zeros_like(hidden)
        # Summed over many chunks, in 16 bits small gradients would be lost.
        self.of_head = torch.zeros(
            head.shape if head_needs_grad else (0,), dtype=real_dtype(head), device=head.device
        )

    def add(self, rows: Tensor, states: Tensor, gradient: Tensor, slope: Tensor | None) -> None:
        """Add a chunk: the rows' indices (n,), their hidden states (n, H), the gradient of their capped
        logits (n, V), which may be overwritten, and `slope_of` the cap."""
        if slope is not None:
            gradient *= slope
        self.of_hidden[rows] = gradient @ self.head
        if self.head_needs_grad:
            add_product(self.of_head, gradient.T, states)

    def result(self) -> tuple[Tensor, Tensor]:
        """The gradients of the hidden states (N, H) and of the head, (V, H) or (0,), in the head's dtype."""
        return self.of_hidden, self.of_head.to(self.head.dtype)

    @staticmethod
    def fake(hidden: Tensor, head: Tensor, head_needs_grad: bool) -> tuple[Tensor, Tensor]:
        """Tensors as of `result`, without numbers."""
        return torch.empty_like(hidden), head.new_empty(head.shape if head_needs_grad else (0,))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a (m, k) @ b (k, n), where `total` may be float32 and `a` and `b` of 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        # cuBLAS adds to the float32 sum: the product is neither rounded nor stored. `addmm` refuses
        # a float32 sum in some releases; `baddbmm`, of a batch of one, takes it in all.
        batch = total[None]
        torch.ops.aten.baddbmm.dtype_out(batch, a[None], b[None], total.dtype, out=batch)
    else:
        total += a @ b
