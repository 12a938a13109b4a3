"""The fixtures `seen_graphs`, the graphs of batches, and `taped`, which records batches on the CPU."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tape import TapeGraph, TapeStream

from dparallel_ext.decoding import padding, workspace
from dparallel_ext.decoding.graphs import Graphs, Recorded
from dparallel_ext.models import experts


@pytest.fixture
def seen_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """The graphs of all batches that the test makes."""
    made: list[Graphs] = []

    class Seen(Graphs):
        def __init__(self, recorder: Any) -> None:
            super().__init__(recorder)
            self.small = 0  # passes that may be recorded
            made.append(self)

        def recording_of(self, key: Any, *args: Any) -> Recorded | None:
            self.small += 1
            return super().recording_of(key, *args)

    monkeypatch.setattr(workspace, "Graphs", Seen)
    return made


@pytest.fixture
def taped(seen_graphs: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """Batches on the CPU whose passes take the forms they have on a GPU, and are recorded; with one product
    for all experts, as on an H100."""
    monkeypatch.setattr(workspace, "can_record", lambda device: True)
    monkeypatch.setattr(padding, "runs_ahead", lambda device: True)
    monkeypatch.setattr(experts, "by_one_product", lambda sizes, like: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", TapeGraph)
    monkeypatch.setattr(TapeGraph, "pools", {})
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", itertools.count(1).__next__)
    monkeypatch.setattr(torch.cuda, "Stream", TapeStream)
    current = TapeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return seen_graphs
