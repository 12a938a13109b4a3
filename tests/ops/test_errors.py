"""What ops find bad on a GPU: kept on the device until it is read, in a bounded number of words.

Where there is no GPU, the ops of these tests leave their errors on the CPU in the same way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GPUS, everywhere
from tape import Tape, kernels
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.ops import errors, streams
from dparallel_ext.ops.errors import Cell, Errors, named_row
from dparallel_ext.types import NO_ERROR

TEXTS = {1: "logits: {} holds NaN", 3: "labels: {} is out of range"}


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors wait on the CPU too."""
    monkeypatch.setattr(errors, "waits", lambda device: True)
    monkeypatch.setattr(errors, "pending", {})


def reported(where: Any = named_row, position: int = 5, code: int = 1, size: int = 8) -> None:
    error = torch.full((size,), NO_ERROR)
    error[-1] = 4 * position + code
    errors.report(error, where, TEXTS)


def test_an_error_waits_until_it_is_read(waiting: None) -> None:
    errors.report(torch.tensor([NO_ERROR, 4 * 7 + 1, 4 * 5 + 1, NO_ERROR]), named_row, TEXTS)
    reported(position=2)  # what comes later may follow from the first
    reported(position=9)
    with pytest.raises(ValueError, match=r"^logits: row 5 holds NaN$"):
        dx.check_errors()
    dx.check_errors()  # said once
    reported(Cell(10, offset=2), position=34, code=3)
    with pytest.raises(ValueError, match=r"^labels: sequence 3 at position 6 is out of range$"):
        dx.check_errors("cpu")


def test_reports_take_no_memory(waiting: None) -> None:
    for number in range(1000):
        reported(position=number, size=number % 3 + 1)
        errors.report(torch.empty(0, dtype=torch.int64), named_row, TEXTS)
    (recorded, own) = errors.pending.values()
    assert (len(own.kinds), len(recorded.kinds)) == (1, 0)
    assert own.words.numel() == Errors.KINDS
    with pytest.raises(ValueError, match="row 0 holds"):
        dx.check_errors()


def test_a_report_is_one_launch(waiting: None) -> None:
    fine = torch.full((8,), NO_ERROR)
    errors.report(fine, named_row, TEXTS)  # the words are made
    with Tape() as tape:
        errors.report(fine, named_row, TEXTS)
        errors.report(fine, Cell(4), TEXTS)
    assert kernels(tape) == {"keep_error_": 2}


def test_more_kinds_than_words(waiting: None) -> None:
    """To make room a report looks; so does a user who decodes views of many lengths, once in a while."""
    fine = torch.full((4,), NO_ERROR)
    for length in range(1, 3 * Errors.KINDS):
        errors.report(fine, Cell(length), TEXTS)
    reported(Cell(1000), position=2003)

    def others() -> None:
        for length in range(2000, 2000 + Errors.KINDS):
            errors.report(fine, Cell(length), TEXTS)

    with pytest.raises(ValueError, match="sequence 2 at position 3 holds NaN"):
        others()
    dx.check_errors()


def test_what_has_no_numbers_waits_for_nobody(waiting: None) -> None:
    """Else nobody could look any more: an error on the device "meta" cannot be read."""
    before = dict(errors.pending)
    dx.row_stats(torch.empty(2, 5, device="meta"))
    assert errors.pending == before
    dx.check_errors()


def test_cuda_is_every_gpu(waiting: None) -> None:
    gpus = [torch.device("cuda", index) for index in (0, 1)]
    for asked, index, raises in (("cuda", 1, True), ("cuda:1", 1, True), ("cuda:0", 1, False)):
        for gpu in gpus:
            errors.pending[gpu, 7] = Errors(torch.device("cpu"))
        error = torch.tensor([4 * 3 + 1])
        errors.pending[gpus[index], 7].report(error, named_row, TEXTS)
        if raises:
            with pytest.raises(ValueError, match="row 3"):
                dx.check_errors(asked)
        else:
            dx.check_errors(asked)
    with pytest.raises(ValueError, match="row 3"):
        dx.check_errors()


@everywhere
def test_the_ops_name_their_rows(waiting: None) -> None:
    logits = torch.zeros(2, 6, 40)
    logits[1, 3, 9] = torch.nan
    tokens = torch.full((2, 6), 5)
    labels, active = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool)
    dx.row_stats(logits)
    with pytest.raises(ValueError, match="logits: row 9 holds NaN"):
        dx.check_errors()
    dx.unmask_(tokens, logits, mask_id=5, position_offset=100)
    with pytest.raises(ValueError, match="logits: sequence 1 at position 103 holds NaN"):
        dx.check_errors(logits.device.type)
    dx.certainty_forcing_loss(logits, labels, active)
    with pytest.raises(ValueError, match="logits: row 9 holds NaN"):
        dx.check_errors(logits.device)
    dx.distillation_loss(torch.zeros(2, 6, 40), logits, weight=active.float())
    with pytest.raises(ValueError, match="teacher: row 9 holds NaN"):
        dx.check_errors()
    labels[0, 2] = 40
    hidden, head = torch.ones(2, 6, 8), torch.ones(40, 8)
    dx.linear_certainty_forcing_loss(hidden, head, labels, active)
    with pytest.raises(ValueError, match=r"labels: row 2 is active, .* no id in \[0, 40\)"):
        dx.check_errors()
    of_teacher = torch.cat((hidden[:1], hidden[1:] * torch.nan))
    dx.linear_distillation_loss(hidden, head, of_teacher, chunk_rows=5)
    with pytest.raises(ValueError, match="teacher: row 6 holds NaN"):
        dx.check_errors()
    dx.check_errors()


def test_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer for each stream; zeros of its own for every launch that somebody else records."""

    class Like:
        device = torch.device("cuda", 0)

    stream, capturing, zeros = 1, False, torch.zeros
    monkeypatch.setattr(streams, "stream_of", lambda device: stream)
    monkeypatch.setattr(streams, "capturing", lambda device: capturing)
    monkeypatch.setattr(streams, "counter_buffers", {})
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **how: zeros(*size, **how))

    def given(needed: int = 10) -> Tensor:
        made = streams.counters_for(Like(), needed)  # type: ignore[arg-type]
        assert made is not None
        assert made.numel() >= needed
        assert not made.any()
        return made

    first = given()
    assert given() is first
    larger = given(5000)
    assert given() is larger
    stream = 2
    second = given()
    assert second is not larger
    capturing = True
    own = given(), given()
    assert len({id(t) for t in (first, larger, second, *own)}) == 5
    with streams.own_recording():
        assert given() is second
    capturing = False
    assert given() is second


@pytest.mark.parametrize("device", GPUS, indirect=True)
def test_recordings_of_a_user_share_no_counters(device: str) -> None:
    """Warmed up on one stream and recorded on another, replayed side by side on two."""
    given = [torch.randn(64, 20000), torch.randn(64, 20000)]
    expected = [dx.row_stats(logits).token for logits in given]
    graphs, found = [], []
    for logits in given:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(dx.row_stats(logits).token)
        graphs.append(graph)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        torch.cuda.synchronize()
        for graph, stream in zip(reversed(graphs), streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for tokens in found:
            tokens.fill_(-1)
    given[1][7, 3] = torch.nan
    graphs[1].replay()
    with pytest.raises(ValueError, match="row 7 holds NaN"):
        dx.check_errors("cuda")
    given[0][5, 3] = torch.nan
    streams[0].wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(streams[0]):
        dx.row_stats(given[0])
    with pytest.raises(ValueError, match="row 5 holds NaN"):
        dx.check_errors()  # of any stream
