"""Op: `best_path`, the most probable way through an automaton (Viterbi's algorithm)."""

from __future__ import annotations

from torch import Tensor

from ..automaton import Tables
from .fake import register_fake
from .kernel import kernel

_best_path = kernel("best_path")


def best_path(
    scores: Tensor, begin: Tensor, end: Tensor, enter: Tensor, room: Tensor, tables: Tables
) -> tuple[Tensor, Tensor]:
    """The path with the largest sum of scores through the cells [begin, end) of each window (DINGO, arXiv
    2505.23061).

    Of the paths behind which the response can end in the room that is left; where there is none, of all. Of
    equal sums into a state the first edge counts, of equal last states the lowest. A score of -inf or NaN is
    no way.

    Args:
        scores: (W, C, K) float32: of a token of each class in each cell.
        begin, end: (W,) int64, from 0 to C.
        enter: (W,) int64: the state in front of cell `begin`.
        room: (W,) int64: the most tokens that may follow cell `end - 1`.
        tables: the automaton, of which the transitions and the distances are read.

    Returns:
        The state in front of each cell and behind the last, (W, C + 1) int64; and the class of each cell's
        token, (W, C) int64: -1 outside [begin, end), and everywhere in a window without a path, whose states
        are all `enter`.

    Raises:
        ValueError: naming the argument that does not fit; on the CPU, a number out of its bounds. On CUDA
            begin and end are clamped, and edges out of bounds passed over.
    """
    state, token_class = _best_path(
        scores,
        begin,
        end,
        enter,
        room,
        tables.origin,
        tables.edge_class,
        tables.edge_offsets,
        tables.distance,
    )
    return state, token_class


@register_fake("best_path")
def _(scores: Tensor, begin: Tensor) -> tuple[Tensor, ...]:
    windows, cells, _ = scores.shape
    return begin.new_empty((windows, cells + 1)), begin.new_empty((windows, cells))
