"""Shared by the tests: the devices they run on, the oracle's bounds, deterministic hypothesis runs."""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Before torch is imported: threads that wait do not spin, and workers beside each other take one thread each.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import dparallel_ext as dx
from dparallel_ext import _C
from dparallel_ext.models import Model
from dparallel_ext.ops import streams

ROOT = Path(__file__).parents[1]
TESTS = f"{ROOT / 'tests'}{os.sep}"
EMULATED = "cuda_host" in _C.build_info()["backends"]
"""The CUDA kernels, executed on the CPU, take the place of the CPU's: see test_cuda_host."""

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("host_emulation", parent=settings.get_profile("ci"), max_examples=10)
settings.load_profile("host_emulation" if EMULATED else "ci")

with suppress(ModuleNotFoundError):  # `make gpu` runs tests where torch, pytest and hypothesis are
    import typer.testing

    # The command line is built once: for each of some 400 calls it would take a thirtieth of the tests' time.
    typer.testing._get_command = functools.cache(typer.testing._get_command)  # type: ignore[attr-defined]

if not torch.cuda.is_available():
    # torch would write down the stack for each kind of device that is not there, should one begin later.
    torch.manual_seed = torch.default_generator.manual_seed

GPU = "cuda:0"
GPUS = [pytest.param(GPU, marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
LEVELS = ["portable", "avx2", "avx512"]
LEVELS = ["cpu"] if EMULATED else LEVELS[: LEVELS.index(dx.simd_level()) + 1]
"""The CPU's instruction sets that this machine runs, see `every_level`."""

OF_AN_OP: type[Exception] = ValueError if torch.__version__ < "2.15" else RuntimeError
"""What torch makes of an op's error about an argument where no function of ours is around it."""

MAKERS = {
    getattr(torch, name)
    for name in (
        "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
        "randperm", "tensor", "zeros",
    )
}  # fmt: skip


class OnDevice(TorchFunctionMode):
    """What a test makes is made on the CPU, so that it has the same numbers everywhere, and moved here.

    What the library makes, and what names a device, stays where it is.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function in MAKERS and not (kwargs and kwargs.get("device")):
            caller = sys._getframe(1).f_globals.get("__file__", "")
            if caller.startswith(TESTS):
                gradient = made.requires_grad
                made = made.detach().to(self.device).requires_grad_(gradient)
        return made


@pytest.fixture(params=["cpu", *GPUS])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a test that runs on the CPU, and on the GPU where there is one: what it makes is made there."""
    if request.param == GPU:
        with OnDevice(GPU):
            yield GPU
        dx.check_errors()  # no test leaves one unread
    elif request.param == "cpu":
        yield "cpu"
    else:
        before = dx.simd_level()
        _C.use_simd_level(request.param)
        assert dx.simd_level() == request.param
        yield "cpu"
        _C.use_simd_level(before)


everywhere = pytest.mark.usefixtures("device")
"""Marks a test that runs on every device."""


def every_level(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs on every device, and on the CPU with every instruction set."""
    return everywhere(pytest.mark.parametrize("device", [*LEVELS, *GPUS], indirect=True)(test))


def counters(like: Tensor, needed: int) -> Tensor | None:
    """What `torch.ops.dparallel` is given for `like`: int32 zeros where its kernels count blocks."""
    if not EMULATED:
        return _counters_for(like, needed)
    _given.append(torch.zeros(needed, dtype=torch.int32))  # to the byte
    return _given[-1]


def goes_on(tokens: Tensor) -> bool:
    """Whether a bad row keeps its own sequence from committing, and not the whole batch."""
    return tokens.is_cuda or EMULATED


_given: list[Tensor] = []
_counters_for = streams.counters_for
if EMULATED:  # also where tests make arguments before they run
    streams.counters_for = counters


@pytest.fixture(autouse=EMULATED)
def _emulated() -> Iterator[None]:
    yield
    assert not any(bool(given.any()) for given in _given), "counters were not left zero"
    _given.clear()


LONGEST = (
    "cuda_host", "every_device", "distill", "eagle", "self_speculation", "trajectories", "benchmarks", "load",
    "install", "sliding_guesses", "shifted_window", "trainer", "compat", "adadecode", "op_inputs", "batch",
    "kept_speculation", "graphs", "speculate", "train", "docs", "cli", "engine_causal", "riders", "evaluate",
    "rules", "kept_adaptive", "page_in_browser", "strided", "ddtree", "study", "connections", "engine_chaos",
    "engine", "ends",
)  # fmt: skip
"""The test files that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the host emulation, what runs on every device. Long files come first: workers then end together."""
    if EMULATED:
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection() -> None:
    """What is imported and collected stays until the end: looking through it again and again for garbage
    took a fifteenth of the tests' time. What tests make is looked through less often than Python would."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


class Golden:
    """What the published code gave, recorded: tests/golden/NAME holds a tiny checkpoint and its cases."""

    home = ROOT / "tests" / "golden"

    def model(self, name: str, **settings: Any) -> Model:
        """Loaded anew, so that a test may change it; `settings` of `models.load`."""
        return dx.models.load(self.home / name, **settings)

    def tensors(self, name: str, file: str = "model") -> dict[str, Tensor]:
        return load_file(self.home / name / f"{file}.safetensors")

    def json(self, name: str, file: str) -> Any:
        return json.loads((self.home / name / f"{file}.json").read_text())


golden = Golden()
"""Imported rather than injected: test files need it for their parameters too."""


@contextmanager
def refused(said: str) -> Iterator[None]:
    """A bad row raises at once on the CPU, and on a GPU when the flag is read."""
    with pytest.raises(ValueError, match=said):  # noqa: PT012
        yield
        dx.check_errors()


def layouts(t: Tensor) -> Iterator[Tensor]:
    """`t` again, in memory of other strides, between whose elements there is NaN."""
    between = math.nan if t.is_floating_point() else 1
    order = list(range(t.ndim))[::-1]
    yield t.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if t.ndim:
        for step in (1, 2):  # gaps between rows, and between elements
            wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), between)
            yield wide[..., 1 : 1 + step * t.shape[-1] : step].copy_(t)
    if 1 in t.shape:  # whose stride means nothing
        own = t.clone(memory_format=torch.contiguous_format)
        strides = [5 if size == 1 else step for size, step in zip(own.shape, own.stride(), strict=True)]
        yield own.as_strided(own.shape, strides)
    for d in range(t.ndim):
        if t.shape[d] > 1 and bool((t == t.narrow(d, 0, 1)).all()):
            yield t.narrow(d, 0, 1).expand(t.shape)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_stats_close(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    """The bound of DESIGN.md: |d| <= 2e-6 + 1e-6 |x|, infinities equal, ids exact; what nobody asked for."""
    if actual is None or expected is None:
        assert actual is expected, f"{name}: {actual} != {expected}"
        return
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} != {expected.dtype}"
    if actual.dtype == torch.int64:
        assert torch.equal(actual, expected), f"{name}: {actual} != {expected}"
        return
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = (actual.double() - expected.double()).abs()
    close = same | (gap <= 2e-6 + 1e-6 * expected.double().abs())
    assert bool(close.all()), f"{name}: {actual[~close]} != {expected[~close]}"


@pytest.fixture(autouse=True, scope="module")
def _keep_imports() -> None:
    """Trainers look through everything for garbage: what tests of other files have imported is kept."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attack", "tests/attack, see the fixture `attack`")
    group.addoption("--attack-seconds", type=float, default=0, help="for each of its tests; 0: a few cases")
    group.addoption("--attack-seed", type=int, default=0, help="of the cases")
    group.addoption("--attack-first", type=int, default=0, help="the number of the first case")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.stats.get("", []):
        for name, value in report.user_properties:
            if name == "attack" and terminalreporter.config.getoption("--attack-seconds"):
                terminalreporter.write_line(f"{report.nodeid.split('/')[-1]}: {value}")


class Attack:
    """The cases of a test of tests/attack: a few in `make test`, as many as time allows in `make attack`."""

    def __init__(self, config: pytest.Config, test: str) -> None:
        self.seconds: float = config.getoption("--attack-seconds")
        self.seed: int = config.getoption("--attack-seed")
        self.first: int = config.getoption("--attack-first")
        self.test = test
        self.tried = 0

    def cases(self, few: int) -> Iterator[random.Random]:
        """A generator of random numbers for each case: `few` of them, or for `--attack-seconds`.

        A case depends on the test's name, the seed and its number, so that each can be run again by itself.
        """
        start = time.monotonic()
        while time.monotonic() - start < self.seconds or (not self.seconds and self.tried < few):
            number = self.first + self.tried
            self.tried += 1
            yield random.Random(f"{self.test} {self.seed} {number}")

    def __str__(self) -> str:
        last = self.first + self.tried - 1
        return f"{self.tried} cases, the last of them by --attack-seed {self.seed} --attack-first {last}"


@pytest.fixture
def attack(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Iterator[Attack]:
    """Of a test of tests/attack; where it fails, the case is the last one that is named."""
    cases = Attack(request.config, request.node.name)
    yield cases
    print(cases)
    record_property("attack", str(cases))
