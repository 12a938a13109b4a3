"""Unmasking policies as data: one float32 row per window, so that one launch serves a mixed batch.

Every rule sorts the masked positions of a window by its score (best first, ties to the lowest position) and
commits a prefix. The rule decides the length of the prefix, `min_commit` and `max_commit` bound it. With a
`min_commit` of 0 a pass may commit nothing in a window; else it commits at least one position.

============== ========================================================= =====================
selector       commits                                                   threshold
============== ========================================================= =====================
confidence     p1 >= tau                     (Fast-dLLM, SDAR)           tau, e.g. 0.9
entropy        H <= tau                      (dParallel, d3LLM)          tau in nats, e.g. 0.5
margin         p1 - p2 >= tau                                            tau
quota          the k best by `score`         (fixed schedule)            k
factor         largest n: p_(n) >= 1 - f/(n+1)  (Fast-dLLM)              f
entropy_bound  lowest-H prefix whose preceding cumulative H <= gamma     gamma, e.g. 0.1
               (EB-sampler, DiffusionGemma)
frechet        largest n: p_(n) - sum over j <= n of 1 - p_(j) > delta   delta, e.g. 0.25
               (Fast-dLLM++, arXiv 2606.02955)
============== ========================================================= =====================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .arguments import check_tensor, described, one_of, shown


class Selector(NamedTuple):
    """A selector of policy rows, a line of the table above."""

    id: int
    """The selector's id, as in csrc/include/dparallel/policy.h."""
    score: str | None
    """The statistic that it sorts by; None: the row's `score`."""
    commits: str
    parameter: str
    low: float
    high: float
    """Bounds of the threshold, both allowed."""
    usual: float
    """A threshold to begin with."""
    whole: bool = False

    @property
    def expected(self) -> str:
        """The thresholds that it takes, for error texts."""
        kind = "a whole number" if self.whole else "a number"
        above = f" and <= {self.high:g}" if math.isfinite(self.high) else ""
        return f"{kind} >= {self.low:g}{above} ({self.commits})"


RULES = {
    "confidence": Selector(0, "confidence", "p1 >= TAU", "TAU", 0.0, 1.0, 0.9),
    "entropy": Selector(1, "entropy", "H <= TAU nats", "TAU", 0.0, math.inf, 0.5),
    "margin": Selector(2, "margin", "p1 - p2 >= TAU", "TAU", 0.0, 1.0, 0.5),
    "quota": Selector(3, None, "the K best", "K", 1.0, math.inf, 2.0, whole=True),
    "factor": Selector(4, "confidence", "the largest n with p_(n) >= 1 - F/(n+1)", "F", 0.0, math.inf, 0.75),
    "entropy_bound": Selector(
        5, "entropy", "lowest H whose preceding sum <= GAMMA", "GAMMA", 0.0, math.inf, 0.5
    ),
    "frechet": Selector(
        6, "confidence", "the largest n with p_(n) - sum_(j<=n) (1 - p_(j)) > DELTA", "DELTA", 0.0, 1.0, 0.25
    ),
}
SELECTORS = {name: rule.id for name, rule in RULES.items()}
SCORES = {"confidence": 0, "entropy": 1, "margin": 2}
FIELDS = ("selector", "threshold", "min_commit", "max_commit", "score")
MOST = 2**24
"""The largest min_commit: float32 holds every whole number up to it. A max_commit of as much is no limit."""
BOUNDS = {
    "selector": (0, len(RULES) - 1),
    "min_commit": (0, MOST),
    "max_commit": (1, math.inf),
    "score": (0, len(SCORES) - 1),
}
"""Bounds of the whole numbers, both allowed; a threshold's bounds are in `RULES`. The same in
csrc/include/dparallel/policy.h, for rows that this module has not checked."""

Name: TypeAlias = str | Sequence[str]
Number: TypeAlias = float | Sequence[float] | Tensor


def _one_step(value: float, towards: float) -> float:
    """The next float32. A threshold moves by it where a published decoder compares strictly."""
    return torch.nextafter(torch.tensor(value, device="cpu"), torch.tensor(towards, device="cpu")).item()


_BY_ID: dict[float, tuple[float, float, Selector, str]] = {
    rule.id: (_one_step(rule.low, -math.inf), _one_step(rule.high, math.inf), rule, rule.expected)
    for rule in RULES.values()
}


def describe() -> str:
    """Every rule as SELECTOR:PARAMETER, with the positions that it commits, for `--help`."""
    return "; ".join(f"{name}:{rule.parameter} ({rule.commits})" for name, rule in RULES.items())


def make(
    selector: Name = "entropy",
    threshold: Number = 0.5,
    *,
    min_commit: Number = 1,
    max_commit: Number | None = None,
    score: Name | None = None,
    batch: int = 1,
    device: torch.device | str | None = "cpu",
) -> Tensor:
    """Policy rows (batch, 5) float32: selector, threshold, min_commit, max_commit, score.

    Each argument is one value or one per row. `threshold` is the rule's parameter (see the table above): a
    probability or a difference of two in [0, 1], nats >= 0, a factor >= 0, or a whole number >= 1.
    `min_commit` is a whole number from 0 to `MOST`; `max_commit` None is no limit; `score` is the statistic
    that `quota` ranks by, by default confidence.

    Raises ValueError naming the argument that does not fit.
    """
    names = _names("selector", selector, SELECTORS, batch)
    scores = _names("score", "confidence" if score is None else score, SCORES, batch)
    for name, chosen in zip(names, scores, strict=True):
        score_of_rule = RULES[name].score
        if score is not None and score_of_rule is not None and chosen != score_of_rule:
            raise ValueError(
                f"score: only 'quota' chooses its score; {name!r} sorts by {score_of_rule!r}, got {chosen!r}"
            )
    rows = list(
        zip(
            (float(SELECTORS[name]) for name in names),
            _numbers("threshold", threshold, batch),
            _numbers("min_commit", min_commit, batch),
            _numbers("max_commit", math.inf if max_commit is None else max_commit, batch),
            (float(SCORES[RULES[name].score or c]) for name, c in zip(names, scores, strict=True)),
            strict=True,
        )
    )
    _check_rows(rows)
    return torch.tensor(rows, dtype=torch.float32, device=device).view(batch, len(FIELDS))


def check(policy: Tensor, batch: int, *, values: bool = True) -> None:
    """Raise ValueError unless `policy` is (batch, 5) float32 with numbers that a kernel can follow; TypeError
    unless it is a tensor.

    values: check the numbers too, if they are on the CPU.
    """
    check_tensor("policy", policy)
    if policy.shape != (batch, len(FIELDS)) or policy.dtype != torch.float32:
        raise ValueError(
            f"policy: expected float32 ({batch}, {len(FIELDS)}) {FIELDS}, got {described(policy)}"
        )
    # Reading values from a device would stall it, and there are no values while tracing.
    if values and policy.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_rows(policy.tolist())


def in_force(row: Sequence[float]) -> tuple[float, ...]:
    """A row of `FIELDS` as kernels on a GPU read it, where nobody has checked it: each number is clamped to
    its `BOUNDS`, NaN to the lower, and the score is the rule's. The threshold stays: no position passes NaN,
    so `min_commit` positions commit."""
    values = dict(zip(FIELDS, row, strict=True))
    for name, (low, high) in BOUNDS.items():
        value = values[name]
        values[name] = low if not value > low else high if value >= high else value // 1
    rule = _BY_ID[values["selector"]][2]
    values["score"] = values["score"] if rule.score is None else SCORES[rule.score]
    return tuple(values.values())


def most(row: Sequence[float]) -> float:
    """The most positions that a pass commits in a window by a row of `FIELDS`."""
    selector, threshold, low, high, _ = row
    return max(low, min(high, threshold if selector == SELECTORS["quota"] else math.inf))


def least(row: Sequence[float]) -> float:
    """The fewest positions that a pass commits by a row of `FIELDS`, in a window with enough masks."""
    return most(row) if row[0] == SELECTORS["quota"] else max(1.0, row[2])


def score_of(row: Sequence[float]) -> str:
    """The name of the statistic that a row of `FIELDS` ranks by."""
    score = _BY_ID[row[0]][2].score
    return score or next(name for name, number in SCORES.items() if number == row[4])


_SELECTOR_IDS = f"ids 0..{len(RULES) - 1} of {list(RULES)}"
_SCORE_IDS = f"ids 0..{len(SCORES) - 1} of {list(SCORES)}"


def _check_rows(rows: Iterable[Sequence[float]]) -> None:
    sound = set()  # most batches repeat one row
    for row, values in enumerate(map(tuple, rows)):
        if values in sound:
            continue
        selector, threshold, low, high, score = values
        # The first check below names an unknown selector.
        least, most, rule, expected_of = _BY_ID.get(selector, _BY_ID[0])
        fits = least <= threshold <= most and (not rule.whole or _is_whole(threshold))
        for name, value, ok, expected in (
            ("selector", selector, selector in _BY_ID, _SELECTOR_IDS),
            ("threshold", threshold, fits, expected_of),
            ("min_commit", low, _within(low, "min_commit"), f"a whole number >= 0 and <= {MOST}"),
            ("max_commit", high, _within(high, "max_commit"), "a whole number >= 1, or inf"),
            ("max_commit", high, high >= low, "at least min_commit"),
            ("score", score, _within(score, "score"), _SCORE_IDS),
        ):
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {value:g} in policy row {row}")
        sound.add(values)


def _within(value: float, field: str) -> bool:
    low, high = BOUNDS[field]
    return low <= value <= high and _is_whole(value)


def _is_whole(value: float) -> bool:
    return math.isinf(value) or value == value // 1


def _names(argument: str, value: Name, known: dict[str, int], batch: int) -> list[str]:
    names = [value] * batch if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if len(names) != batch:
        raise ValueError(f"{argument}: expected one name or {batch}, got {len(names)}")
    return [one_of(argument, name, known) for name in names]


def _numbers(argument: str, value: Any, batch: int) -> list[float]:
    """`batch` numbers, as float32 holds them."""
    try:
        if isinstance(value, (int, float)):
            return [float(value)] * batch
        numbers = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{argument}: expected a number or {batch} of them, got {shown(value)}") from error
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != batch):
        raise ValueError(
            f"{argument}: expected a number or shape ({batch},), got shape {tuple(numbers.shape)}"
        )
    return numbers.expand(batch).tolist()
