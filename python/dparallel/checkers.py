"""Checkers of `dparallel trajectories` and `evaluate`: whether a response gives the reference answer."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable

from dparallel_ext.arguments import is_number, shown


def hashes(answer: str, response: str) -> bool:
    """Whether the number after #### (GSM8K's form) equals the reference's, or the reference itself."""
    match = re.search(r"####\s*(-?[\d,.]*\d)", response)
    return match is not None and _number(match[1]) == _number(_after_hashes(answer))


def last_number(answer: str, response: str) -> bool:
    """Whether the last number of the response equals the reference's (GSM8K as usually scored)."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    return bool(numbers) and _number(numbers[-1]) == _number(_after_hashes(answer))


def boxed(answer: str, response: str) -> bool:
    r"""Whether the last \boxed{...} equals the reference's (or the reference itself), spaces aside (MATH)."""
    content = _boxed(response)
    expected = _boxed(answer) or answer
    return content is not None and content.replace(" ", "") == expected.replace(" ", "")


def anything(answer: str, response: str) -> bool:
    """True, so that every answer is kept."""
    return True


def without_number(name: str, answers: Iterable[str]) -> str | None:
    """A sentence, if a checker that compares numbers finds none in some of these references: no response is
    right there."""
    if CHECKERS.get(name) not in (hashes, last_number):
        return None
    answers = [*answers]
    texts = [answer for answer in answers if isinstance(_number(_after_hashes(answer)), str)]
    if not texts:
        return None
    return (
        f"checker: {name} compares with a number, alone or behind ####, and {len(texts)} of {len(answers)} "
        f"answers are none, such as {texts[0]!r:.80}: no response to these is right"
    )


Checker = Callable[[str, str], bool]
"""(reference, response as text) -> whether the response is right."""
CHECKERS: dict[str, Checker] = {
    "hashes": hashes,
    "last_number": last_number,
    "boxed": boxed,
    "none": anything,
}


def compares(name: str) -> bool:
    """Whether a checker compares with reference answers: all do but "none"."""
    return CHECKERS.get(name) is not anything


def checker_of(name: str) -> Checker:
    """One of CHECKERS, or "package.module:function". Raises ValueError, also where the module raises
    anything. The checker raises ValueError where the function raises anything, or returns neither true nor
    false."""
    expected = f"one of {list(CHECKERS)} or package.module:function"
    if not isinstance(name, str):
        raise ValueError(f"checker: expected {expected}, got {shown(name)}")
    if name in CHECKERS:
        return CHECKERS[name]
    module, _, function = name.partition(":")
    try:
        checker = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        raise ValueError(f"checker: expected {expected}, got {shown(name)} ({error!r})") from error
    if not callable(checker):
        raise ValueError(f"checker: {name!r} is not a function")

    def checked(answer: str, response: str) -> bool:
        try:
            right = checker(answer, response)
            verdict = bool(right) if is_number(right) and right in (0, 1) else None
        except (Exception, SystemExit) as error:  # an exit would end the command as if all were measured
            raise ValueError(
                f"checker: {name} raised {error!r} for the answer {answer!r:.200} and the response "
                f"{response!r:.2000}"
            ) from error
        if verdict is None:
            raise ValueError(f"checker: expected True or False from {name}, got {right!r:.80}")
        return verdict

    return checked


def _after_hashes(answer: str) -> str:
    return answer.rpartition("####")[2].strip()


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text.strip()


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None
