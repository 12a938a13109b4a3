"""What the wrappers call: errors about arguments are ValueErrors with every torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dparallel_ext.ops.kernel import kernel


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("suppress: expected in [0, 40), got 41 at 0"), ValueError),
        (RuntimeError("q_start, q_end: expected int64 (S,)"), ValueError),
        (ValueError("suppress: expected in [0, 40), got 41 at 0"), ValueError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
        (RuntimeError("launch, csrc/torch/backend.h:58: this torch has no CUDA"), RuntimeError),
        (torch.OutOfMemoryError("memory: there is none"), torch.OutOfMemoryError),
        (NotImplementedError("k: not there"), NotImplementedError),
    ],
)
def test_only_errors_about_arguments_change(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception]
) -> None:
    def op(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(torch.ops.dparallel, "row_topk", op)
    with pytest.raises(kind) as found:
        kernel("row_topk")(torch.zeros(1, 4), 17)
    assert type(found.value) is kind
    assert str(found.value) == str(raised)


def test_a_kernel_of_its_own_says_the_same() -> None:
    """Whatever torch makes of the library's exception."""
    with pytest.raises(ValueError, match=r"^k: expected 1 to 32, got 33$"):
        kernel("row_topk")(torch.zeros(1, 4), 33, None, -1, None, None)
