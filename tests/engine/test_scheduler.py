"""The scheduler, its pages and its prefix tree: by example, and by random operations under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from dparallel_ext._C import Scheduler

CXX = os.environ.get("CXX", "c++")
FLAGS = "-std=c++17 -Wall -Wextra -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program, runtime = tmp_path_factory.mktemp("scheduler") / "scheduler", ROOT / "csrc" / "runtime"
    sources = [Path(__file__).with_name("scheduler.cpp"), runtime / "scheduler.cpp"]
    subprocess.run([CXX, *FLAGS.split(), f"-I{runtime}", *sources, "-o", program], check=True)
    return program


@pytest.mark.slow
def test_no_page_is_lost_or_doubly_owned(driver: Path) -> None:
    """180,000 random operations against a simple model of what the pages hold."""
    shared = []
    for seed in range(6):
        result = subprocess.run([str(driver), str(seed), "30000"], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        pattern = r"30000 operations, (\d+) admitted, \d+ reused, (\d+) pages shared"
        counts = re.match(pattern, result.stdout)
        assert counts is not None
        assert int(counts[1]) > 300
        shared.append(int(counts[2]))
    assert sum(count > 1000 for count in shared) >= 3


@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        ("early", "does not hold what its request computed"),
        ("leak", "pages in use are not"),
        ("twice", "no request"),
    ],
)
def test_the_model_notices_planted_faults(driver: Path, fault: str, noticed: str) -> None:
    results = [
        subprocess.run([str(driver), str(seed), "20000", fault], capture_output=True, text=True)
        for seed in range(6)
    ]
    failed = [r for r in results if r.returncode != 0]
    assert len(failed) >= 3  # where nothing is shared, early is not too early
    assert all(noticed in r.stdout + r.stderr for r in failed)


def scheduler(**settings: int) -> Scheduler:
    return Scheduler(**{"lanes": 4, "pages": 8, "page_size": 4, "share": True, **settings})


def test_a_beginning_is_computed_once_and_shared() -> None:
    s = scheduler()
    prompt = list(range(10))
    s.submit(0, prompt, 14)
    first = s.admit()
    assert first is not None
    assert (first.lane, first.pages, first.reused) == (0, [0, 1, 2, 3], 0)
    s.submit(1, prompt, 12)
    assert s.admit() is None  # request 0 is computing what it needs
    assert s.store(0, prompt[:8]) == []
    second = s.admit()
    assert second is not None
    assert (second.lane, second.pages, second.reused) == (1, [0, 1, 4], 8)
    assert (s.stats.used, s.stats.kept, s.stats.prompt_tokens, s.stats.reused_tokens) == (5, 0, 20, 8)
    s.release(0)
    assert (s.stats.used, s.stats.kept) == (3, 0)
    s.release(1)
    assert (s.stats.used, s.stats.kept) == (0, 2)


def test_equal_responses_are_kept_once() -> None:
    s = scheduler()
    for id in (0, 1):
        s.submit(id, [1, 2], 8)
        assert s.admit() is not None  # no full page of the prompt: neither waits
    assert s.store(0, [1, 2, 3, 4]) == []
    assert s.store(1, [1, 2, 3, 4]) == [(0, 0)]  # its own page 2 is free again
    assert s.stats.used == 3
    assert s.store(0, [1, 2, 3, 4, 5, 6, 7, 8]) == []
    assert s.store(1, [1, 2, 3, 4, 5, 6, 7, 9]) == []
    assert s.stats.used == 3


@pytest.mark.parametrize("prompts", [([1] * 8, [2] * 4), ([2] * 4, [1] * 8)])
def test_what_was_of_use_least_recently_goes_first(prompts: tuple[list[int], ...]) -> None:
    s = scheduler(pages=4)
    for id, prompt in enumerate(prompts):
        s.submit(id, prompt, len(prompt))
        assert s.admit() is not None
        s.store(id, prompt)
        s.release(id)
    s.submit(2, [1] * 8, 8)  # uses one, perhaps the older, so that the other is now the older
    found = s.admit()
    assert found is not None
    assert found.reused == 8
    s.release(2)
    assert s.stats.kept == 3
    s.submit(3, [3] * 8, 8)  # needs two pages: the free one, and one that is kept
    assert s.admit() is not None
    assert s.stats.evicted == 1
    s.release(3)
    s.submit(4, [1] * 8, 8)
    found = s.admit()
    assert found is not None
    assert found.reused == 8


def test_first_come_first_served_and_none_starves() -> None:
    s = scheduler(share=False)
    s.submit(0, [1], 28)
    s.submit(1, [2], 8)  # two pages: there is but one
    s.submit(2, [3], 4)  # would fit, and waits behind it
    assert s.admit() is not None
    assert s.admit() is None
    s.release(0)
    found = [s.admit(), s.admit(), s.admit()]
    assert [a and a.id for a in found] == [1, 2, None]
    s.submit(3, [4], 4)
    s.submit(4, [5], 4)
    s.release(3)  # while it waits
    last = s.admit()
    assert last is not None
    assert last.id == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.submit(0, [1], 33), "length: 33 positions need 9 pages of 4, and there are 8"),
        (
            lambda s: s.submit(0, [1], 2**63 - 1),
            "length: 9223372036854775807 positions need 2305843009213693952",
        ),
        (lambda s: s.submit(0, [1, 2], 1), "length: expected at least the prompt's 2, got 1"),
        (lambda s: s.release(7), "id: no request 7"),
        (lambda s: s.store(7, [1]), "id: request 7 does not run"),
        (lambda s: [s.submit(0, [1], 4), s.submit(0, [1], 4)], "id: 0 is taken"),
        (lambda s: scheduler(lanes=0), "lanes: expected >= 1, got 0"),
        (lambda s: scheduler(pages=0), "pages: expected >= 1, got 0"),
        (lambda s: scheduler(page_size=0), "page_size: expected >= 1, got 0"),
        (lambda s: scheduler(pages=-(2**63)), "pages: expected >= 1, got -9223372036854775808"),
        (
            lambda s: [s.submit(0, [1], 4), s.admit(), s.store(0, [1] * 8)],
            "tokens: expected as many as the request's 1 pages of 4 hold, got 8",
        ),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(scheduler())
