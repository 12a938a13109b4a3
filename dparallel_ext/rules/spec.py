"""Rules as text, for the command line, the server and `decode(rule=...)`: "credit+confidence:0.8"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import policies
from ..arguments import instance, shown, whole
from .credit import Credit
from .distance import Distance
from .early import Prophet, SchED
from .edit import Edit
from .end_of_text import EndOfText
from .filter_file import NAMED
from .leading import Leading
from .learned import Learned
from .levenshtein import Levenshtein
from .protocol import Function, Rule
from .soft import Soft

ONE = "one"
"""The name of the policy that commits one token a pass, the most confident."""
ROWS = {ONE: "", "steps": "N", **{name: selector.parameter for name, selector in policies.RULES.items()}}
"""Words that the text of a policy row, or of the fixed schedule, begins with -> the parameter behind them."""


def ids_of(text: str) -> int | tuple[int, ...]:
    """The id in "2", or the ids in "2/7"."""
    first, *others = map(int, text.split("/"))
    return (first, *others) if others else first


class Kind(NamedTuple):
    """A rule that a text can name."""

    make: type[Rule]
    parameters: tuple[tuple[str, Callable[[str], Any]], ...]
    """Names and types of the parameters after the colon, in order."""
    needed: int
    """How many of the parameters, from the first on, have to be given."""
    does: str
    path: bool = False
    """Whether the first parameter is a path, which may hold commas, colons and plus signs."""

    def values(self, text: str) -> list[str]:
        """The parameters in the text after the colon; behind a path only a number counts as one."""
        path, _, last = text.rpartition(",")
        if not self.path:
            return text.split(",") if text else []
        return [path, last] if path and _is_number(last) else [text] if text else []


KINDS: dict[str, Kind] = {
    "credit": Kind(
        Credit,
        (("scale", float), ("decay", float), ("power", float)),
        0,
        "adds credit for earlier predictions (CreditDecoding)",
    ),
    "distance": Kind(
        Distance,
        (("tau", float), ("penalty", float)),
        0,
        "commits H + PENALTY x distance from the first mask < TAU nats (WeDLM)",
    ),
    "leading": Kind(Leading, (), 0, "commits what the row chooses in front of what it does not (SDLM)"),
    "edit": Kind(
        Edit,
        (("mask", float), ("edit", float), ("edits", int)),
        0,
        "may change decoded tokens while their block is open (LLaDA2.1)",
    ),
    "levenshtein": Kind(
        Levenshtein,
        (("mask", float), ("edit", float), ("edits", int), ("delete", int), ("split", int)),
        0,
        "may change, delete and insert tokens while their block is open (LLaDA 2.2)",
    ),
    "soft": Kind(
        Soft,
        (("threshold", float), ("accept", float), ("edits", int)),
        0,
        "keeps decoded tokens soft, and predicts them anew while their block is open (DMax)",
    ),
    "sched": Kind(
        SchED,
        (("high", float), ("low", float), ("kind", str), ("k", float)),
        0,
        "fills all once the mean logit gap reaches a falling threshold (SchED)",
    ),
    "prophet": Kind(
        Prophet,
        (("start", int), ("width", int)),
        1,
        "fills all once the mean gap of the answer's columns reaches a falling threshold (Prophet)",
    ),
    "eot": Kind(
        EndOfText,
        (("eos", ids_of), ("floor", float)),
        1,
        "fills all from the first EOS on whose probability is at least FLOOR (Learn2PD)",
    ),
    "learned": Kind(
        Learned,
        (("file", str), ("tau", float)),
        1,
        "commits what a trained filter judges right, see `dparallel filter` (Learn2PD)",
        path=True,
    ),
}
"""Name -> rule; a rule of your own has the name that you give it here."""


def _kinds() -> dict[str, Kind]:
    """`KINDS`. Raises ValueError for an entry that is no Kind."""
    for name, kind in KINDS.items():
        instance(f"rules.KINDS[{name!r}]", kind, Kind)
    return KINDS


def parse(text: str, *, default: bool = True) -> tuple[Rule | None, dict[str, Any]]:
    """The rule, if any, and the arguments of `decode` for the policy row in "NAME:P,P+SELECTOR:THRESHOLD".

    Either part may stand alone; "one" and "steps:N", the fixed schedule, may stand in place of a row.

    default: if the text has no row, take the rule's own.

    Raises ValueError saying what was expected.
    """
    name = _name(text)
    if name not in KINDS:
        return None, _row(text)
    kind = _kinds()[name]
    values, beside = _parts(text, kind)
    names = [parameter for parameter, _ in kind.parameters]
    if not kind.needed <= len(values) <= len(names):
        raise ValueError(f"rule: expected {_usage(name)}, got {shown(text)}")
    try:
        named_values = zip(kind.parameters, values, strict=False)
        rule = kind.make(**{key: _value(key, of, value) for (key, of), value in named_values})
    except ValueError as error:
        raise ValueError(f"rule: expected {_usage(name)}, got {shown(text)} ({error})") from error
    except TypeError as error:
        raise ValueError(
            f"rules.KINDS[{name!r}]: expected names of parameters of {kind.make.__name__}, got {names} "
            f"({error})"
        ) from error
    if beside is not None:
        return rule, _row(beside)
    return rule, row_of(rule) if default else {}


def file_of(text: str) -> str | None:
    """The file that a rule's text names, and that `parse` would read; None if it names none."""
    kind = _kinds().get(_name(text))
    return "".join(_parts(text, kind)[0][:1]) if kind is not None and kind.path else None


def _parts(text: str, kind: Kind) -> tuple[list[str], str | None]:
    """The parameters after the colon, and the policy row after the plus sign, None if there is no row."""
    first, plus, beside = text.rpartition("+") if kind.path else text.partition("+")
    if kind.path and beside.partition(":")[0] not in ROWS:
        first, plus = text, ""
    return kind.values(first.partition(":")[2]), beside if plus else None


def _name(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"rule: expected a text, got {shown(text)}")
    return re.split(r"[:+]", text, maxsplit=1)[0]


def text_of(rule: Rule | Function, *, own_row: bool = True) -> str:
    """The text from which `rules.parse` makes the rule. Without `own_row`, the rule's own row does not apply.

    Raises ValueError if there is no such text.
    """
    for name, kind in _kinds().items():
        if type(rule) is kind.make:
            values = [_text(getattr(rule, parameter)) for parameter, _ in kind.parameters]
            text = f"{name}:{','.join(values)}"
            if parse(text)[0] == rule:
                return text if own_row or rule.row is None else f"{text}+{ONE}"
    got = "a function" if not isinstance(rule, Rule) else shown(rule)
    raise ValueError(f"rule: expected one of {list(KINDS)} with the parameters that its text has, got {got}")


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def row_of(rule: Rule) -> dict[str, Any]:
    """The arguments of `decode` for a rule's own policy row; none where it has no row. Raises ValueError
    naming the rule's class for a row that is none."""
    try:
        return {} if rule.row is None else _row(rule.row)
    except ValueError as error:
        name = type(rule).__name__
        raise ValueError(
            f"{name}: row: expected a policy row, as 'quota:1', got {shown(rule.row)}"
        ) from error


def _row(text: str) -> dict[str, Any]:
    """The arguments of `decode` for a policy row, or for the fixed schedule."""
    if text == ONE:
        return {}
    name, _, parameter = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name not in ROWS or name == ONE:
        raise ValueError(
            f"rule: expected {ONE!r}, steps:N, SELECTOR:THRESHOLD with a selector of "
            f"{list(policies.SELECTORS)}, or a rule of {list(KINDS)}, alone or with one of the former behind "
            f"a plus sign, got {shown(text)}"
        )
    try:
        if name == "steps":
            return {"steps": whole("N", _value("N", int, parameter), 1)}
        threshold = _value("threshold", float, parameter)
        policies.make(name, threshold)
    except ValueError as error:
        raise ValueError(f"rule: expected {name}:{ROWS[name]}, got {shown(text)} ({error})") from error
    return {"selector": name, "threshold": threshold}


def _value(name: str, of: Callable[[str], Any], text: str) -> Any:
    """A parameter's value, of type `of`, from its text. Raises ValueError naming the parameter."""
    try:
        return of(text)
    except ValueError:
        expected = {int: "a whole number", ids_of: "whole numbers, as 2 or 2/7"}.get(of, "a number")
        raise ValueError(f"{name}: expected {expected}, got {shown(text)}") from None


def menu() -> list[dict[str, str]]:
    """All texts that `parse` takes, for a menu: each rule's "name", "parameters" after the colon ("" for
    none, optional ones in brackets), their "usual" values, and what it "does"."""
    rows = [
        (ONE, "", "", "one token a pass, the most confident"),
        ("steps", "N", "16", "the fixed schedule of N passes"),
        *(
            (name, selector.parameter, f"{selector.usual:g}", f"commits {selector.commits}")
            for name, selector in policies.RULES.items()
        ),
    ]
    for name, kind in _kinds().items():
        parameters = _usage(name).removeprefix(name).replace("[:", "[").removeprefix(":")
        rows.append((name, parameters, next(iter(NAMED), "") if kind.path else "", kind.does))
    return [dict(zip(("name", "parameters", "usual", "does"), each, strict=True)) for each in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _usage(name: str) -> str:
    kind = KINDS[name]
    names = [parameter.upper() for parameter, _ in kind.parameters]
    needed, optional = ",".join(names[: kind.needed]), ",".join(names[kind.needed :])
    text = f"{name}:{needed}" if needed else name
    return f"{text}[{',' if needed else ':'}{optional}]" if optional else text


def describe() -> str:
    """All texts that `parse` takes, for `--help`."""
    kinds = "; ".join(f"{_usage(name)} ({kind.does})" for name, kind in _kinds().items())
    return (
        f"{ONE!r} (one token a pass), steps:N (the fixed schedule), or one of {policies.describe()}; or "
        f"a rule with memory, alone or with one of the former behind a plus sign: {kinds}"
    )
