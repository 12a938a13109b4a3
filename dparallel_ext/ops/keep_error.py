"""Op: `keep_error_`, by which a launch's bad rows wait on a GPU until the host reads them."""

from __future__ import annotations

from torch import Tensor

from .fake import register_fake
from .kernel import kernel

_keep_error_ = kernel("keep_error_")


def keep_error_(word: Tensor, error: Tensor) -> None:
    """Write the least of the errors into the word if it holds `NO_ERROR`: the first launch counts.

    word: one int64. error: (N,) int64 on the same device, `NO_ERROR` or the code of a row's error.
    """
    _keep_error_(word, error)


@register_fake("keep_error_")
def _() -> None:
    return None
