"""Drafts: a drafter's guesses of the next tokens, a chain or a tree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ..arguments import shown
from ..models.config import ModelConfig


class Draft(NamedTuple):
    """Guessed tokens after the last known token, the root. Nodes are numbered from 1; 0 is the root.

    The root and each node may have a chain of riders: rows of the pass that are not verified, but guess
    tokens for the next draft, see `drafter.Riders`.
    """

    tokens: tuple[int, ...] = ()
    """The tokens of nodes 1, 2, ..."""
    parents: tuple[int, ...] | None = None
    """Each node's parent, an earlier node or the root; None: a chain."""
    start: int = 0
    """The layer at which the verify pass begins: root and nodes have run through the layers before it, and
    the session has their streams, see `drafter.KeepsStreams`."""
    layers: int = 0
    """Layers of the model that were run to make the draft, one after the other."""
    riders: tuple[int, ...] = ()
    """The number of riders of the root and of each node; empty: none."""

    @property
    def size(self) -> int:
        """Rows besides the root: nodes and riders."""
        return len(self.tokens) + sum(self.riders) if self.riders else len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether each row, riders included, is the child of the row before."""
        return self.rows == tuple(range(-1, self.size))

    @property
    def verified_rows(self) -> tuple[int, ...]:
        """Parents of the root and the nodes, by rows of the verify pass; the root's is -1."""
        return -1, *(range(len(self.tokens)) if self.parents is None else self.parents)

    @property
    def rows(self) -> tuple[int, ...]:
        """Parents of all rows: as `verified_rows`, then the riders, in the order of their nodes."""
        parents = [*self.verified_rows]
        for node, count in enumerate(self.riders):
            for number in range(count):
                parents.append(len(parents) - 1 if number else node)
        return tuple(parents)

    def refused(self, emitted: Sequence[int]) -> tuple[int, ...]:
        """The tokens of the nodes that are not on the path of the emitted tokens."""
        children: dict[tuple[int, int], int] = {}
        for node, child in enumerate(zip(self.verified_rows[1:], self.tokens, strict=True), 1):
            children.setdefault(child, node)  # of siblings with one token, the first is on the path
        node, taken = 0, set[int]()
        for token in emitted:
            if (node := children.get((node, token), 0)) == 0:
                break
            taken.add(node)
        return tuple(token for node, token in enumerate(self.tokens, 1) if node not in taken)


def check_drafts(
    drafts: Sequence[Draft],
    lanes: Sequence[int],
    sizes: Sequence[int],
    shape: ModelConfig,
    riders: int,
    prefilling: Collection[int],
    keeps_streams: bool,
) -> None:
    """Raise ValueError unless a drafter's drafts are well-formed and of the requested sizes.

    riders: the most riders of a node. prefilling: the lanes whose drafts must have no nodes. keeps_streams:
    whether a draft may begin at a layer behind the first.
    """
    vocabulary = shape.embedding_size
    if len(drafts) != len(lanes):
        raise ValueError(f"drafter: expected a draft for each of {len(lanes)} lanes, got {len(drafts)}")
    for draft, lane, most in zip(drafts, lanes, sizes, strict=True):
        if not isinstance(draft, Draft) or not isinstance(draft.tokens, Sequence):
            raise ValueError(f"drafter: expected a Draft of a tuple for lane {lane}, got {shown(draft)}")
        count = len(draft.tokens)
        if not _are_whole(draft.tokens):
            raise ValueError(f"drafter: expected token ids for lane {lane}, got {shown(draft.tokens)}")
        _check_riders(draft, lane, riders)
        if draft.size > most:
            of = f"{draft.size}" if draft.size == count else f"{count} and {draft.size - count} riders"
            raise ValueError(f"drafter: expected at most {most} nodes for lane {lane}, got {of}")
        if count and lane in prefilling:
            raise ValueError(f"drafter: expected no nodes for lane {lane} with its prompt, got {count}")
        if count and not (min(draft.tokens) >= 0 and max(draft.tokens) < vocabulary):
            bad = next(token for token in draft.tokens if not 0 <= token < vocabulary)
            raise ValueError(f"drafter: expected token ids in [0, {vocabulary}), got {shown(bad)}")
        _check_layers(draft, shape.layers, keeps_streams)
        if draft.parents is None:
            continue
        if not isinstance(draft.parents, Sequence) or not _are_whole(draft.parents):
            raise ValueError(f"drafter: expected a tuple of nodes as parents, got {shown(draft.parents)}")
        if len(draft.parents) != count:
            raise ValueError(
                f"drafter: expected a parent for each of {count} nodes of lane {lane}, "
                f"got {len(draft.parents)}"
            )
        for node, parent in enumerate(draft.parents, 1):
            if not 0 <= parent < node:
                raise ValueError(
                    f"drafter: no tree, node {node} of lane {lane} has the parent {shown(parent)}, "
                    f"expected one of [0, {node})"
                )


def _are_whole(values: Sequence[Any]) -> bool:
    return not any(kind is bool or not hasattr(kind, "__index__") for kind in {*map(type, values)})


def _check_layers(draft: Draft, layers: int, keeps_streams: bool) -> None:
    if type(draft.start) is not int or not 0 <= draft.start < layers:
        raise ValueError(
            f"drafter: expected a draft that begins at a layer of [0, {layers}), got {shown(draft.start)}"
        )
    if draft.start and not keeps_streams:
        raise ValueError(
            f"drafter: expected a draft that begins at layer 0, since its session has no method streams, got "
            f"{draft.start}"
        )
    if type(draft.layers) is not int or draft.layers < 0:
        raise ValueError(f"drafter: expected layers >= 0 of a draft, got {shown(draft.layers)}")


def _check_riders(draft: Draft, lane: int, most: int) -> None:
    """Check the riders first, since the draft's number of rows depends on them."""
    if not isinstance(draft.riders, Sequence):
        raise ValueError(f"drafter: expected a tuple of riders for lane {lane}, got {shown(draft.riders)}")
    if not draft.riders:
        return
    if len(draft.riders) != 1 + len(draft.tokens):
        raise ValueError(
            f"drafter: expected riders of the root and each of {len(draft.tokens)} nodes of lane {lane}, "
            f"got {len(draft.riders)} numbers"
        )
    for count in draft.riders:
        if type(count) is not int or not 0 <= count <= most:
            raise ValueError(
                f"drafter: expected from 0 to {most} riders behind a node of lane {lane}, got {shown(count)}"
            )


def depths(draft: Draft) -> Sequence[int]:
    """The depths of the root, which is 0, and of the nodes."""
    depths = [0]
    for parent in draft.verified_rows[1:]:
        depths.append(1 + depths[parent])
    return depths
