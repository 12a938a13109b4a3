"""Regular expressions of JSON of any content, to a depth: JSON of any depth has no finite automaton."""

from __future__ import annotations

import functools

DEPTH = 5
"""The most objects and arrays in each other of an object that is a whole response, itself among them. In a
vocabulary of 130,000 ids five levels take half the transitions that an automaton may have; six would take
more than all."""
FREE = 3
"""The same of a value of any content within a schema, which may have several of them."""
HEX = "[0-9a-fA-F]"
PAIR = rf"[dD][89abAB]{HEX}{{2}}\\u[dD][c-fC-F]{HEX}{{2}}"
ESCAPED = rf"u(?:[0-9a-ce-fA-CE-F]{HEX}{{3}}|[dD][0-7]{HEX}{{2}}|{PAIR})"
STRING = rf'"(?:[^"\\\x00-\x1F]|\\(?:["\\/bfnrt]|{ESCAPED}))*"'
"""No half of a surrogate pair stands alone: readers of JSON other than Python's refuse it."""
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
SCALAR = f"{STRING}|{NUMBER}|true|false|null"


@functools.cache
def any_object(depth: int = DEPTH) -> str:
    """Of an object that is a whole response, with at most `depth` levels: on one line, or each item on a line
    of its own, indented by two or four spaces a level. Names may come twice, of which readers take the last.
    """
    return _nested(depth, 0)[0]


def _nested(depth: int, level: int | None) -> tuple[str, str]:
    """Of an object and of an array, of at most `depth` levels, within `level` others; None: on one line."""
    inner = None if level is None else level + 1
    value = "|".join((SCALAR, *(_nested(depth - 1, inner) if depth > 1 else ())))
    space, closing = _space(inner), _space(level)

    def some(item: str) -> str:
        return f"(?:{space}(?:{item},{space})*{item})?{closing}"

    return rf"\{{{some(f'{STRING}: ?(?:{value})')}\}}", rf"\[{some(f'(?:{value})')}\]"


def _space(level: int | None) -> str:
    """Between brackets and items: bounded, so that a response cannot go on with it forever."""
    return " ?" if level is None else rf"(?: |\n(?: {{{2 * level}}}| {{{4 * level}}}))?"


@functools.cache
def any_value(kind: str | None = None, depth: int = FREE) -> str:
    """Of a value within another: on one line, with at most `depth` levels. kind: "object", "array", or None
    for any value."""
    both = dict(zip(("object", "array"), _nested(depth, None), strict=True))
    return f"(?:{both[kind] if kind else '|'.join((SCALAR, *both.values()))})"
