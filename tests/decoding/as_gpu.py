"""The tests of a GPU on the emulated one, before a GPU is lent:

    PYTHONPATH=tests/decoding python -m pytest -p as_gpu -m gpu tests/decoding tests/speculation tests/models

It shows what has changed under them: names, arguments, tensors on the wrong device, recordings that fail. The
CPU's kernels compute, so of what only a GPU does nothing is shown.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo  # an operator of an emulated GPU would import it, where that fails
from emulated_gpu import emulated_gpu

from dparallel_ext.models import experts

pytest_plugins = ["taping"]

_is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: True  # as tests/conftest.py is imported


def pytest_configure() -> None:
    torch.cuda.is_available = _is_available


@pytest.fixture(autouse=True)
def _emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Before the fixture `device`."""
    case = getattr(request.node, "callspec", None)
    if case is None or not str(case.params.get("device")).startswith("cuda"):
        yield
        return
    request.getfixturevalue("taped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "by_one_product", lambda sizes, like: like.dtype == torch.bfloat16)
        for name in ("empty_cache", "synchronize"):
            patch.setattr(torch.cuda, name, lambda *args: None)
        patch.setattr(torch.cuda, "memory_reserved", lambda *args: 0)
        with emulated_gpu():
            yield
