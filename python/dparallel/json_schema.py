"""Regular expressions of JSON schemas.

The library outlines_core makes them. It leaves out constraints that it does not follow without a word, and
some of its strings are no JSON: here each constraint is refused by name that a response might not keep, and
the patterns of strings, the bounds of numbers and values of any content are written.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

from . import sandbox as limits
from .any_json import any_object, any_value
from .sandbox import Refused, Sandbox, shared

ITEMS = {"minItems", "maxItems"}
TEXTS = {"minLength", "maxLength", "pattern", "format"}
OF_TYPE = {"array": {"items", *ITEMS}, "object": {"additionalProperties"}, "string": TEXTS}
"""The keywords beside a type, by the type whose values they are for."""
NONE: set[str] = set()
FOLLOWED = {
    "properties": {"required", "additionalProperties"},
    "allOf": NONE,
    "anyOf": NONE,
    "oneOf": NONE,
    "prefixItems": {"items", *ITEMS},
    "enum": NONE,
    "const": NONE,
    "$ref": NONE,
    "type": NONE.union(*OF_TYPE.values()),
}
"""The library follows the first of these keywords that a schema has, with these beside it. It would leave out
any other constraint without a word."""
STRINGS = {"maxLength": {"pattern", "format"}, "minLength": {"pattern", "format"}, "pattern": {"format"}}
"""Nor does the library follow these keywords beside the key."""
OTHERS = """minimum maximum exclusiveMinimum exclusiveMaximum multipleOf uniqueItems contains minContains
    maxContains minProperties maxProperties patternProperties propertyNames dependentRequired dependentSchemas
    dependencies additionalItems unevaluatedItems unevaluatedProperties not if then else"""
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
CONSTRAINTS = {*FOLLOWED, *NONE.union(*FOLLOWED.values()), *OTHERS.split()} - {"type"}
"""The keywords of JSON Schema by which a value may be invalid. Others describe it, or say no more than the
library's keyword beside them."""
KINDS: dict[str, type] = {
    **{"pattern": str, "format": str, "properties": dict, "enum": list},
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), list),
}
"""The types of keywords' values. The library does not check keywords that it ignores."""
OFFSET = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
DATE = "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
TIME = rf"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?{OFFSET}"
ATOM, LABEL = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+", "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
WITHIN = "(?:[A-Za-z0-9._~:@!$&'()*+,;=/-]|%[0-9A-Fa-f]{2})*"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "email": rf"{ATOM}(?:\.{ATOM})*@{LABEL}(?:\.{LABEL})+",
    "uri": rf"(?:https?|ftp)://{LABEL}(?:\.{LABEL})*(?::[0-9]{{1,5}})?(?:/{WITHIN})?(?:\?{WITHIN})?(?:#{WITHIN})?",
}
"""Of these formats the library's patterns have strings that are not of the format, or no JSON."""
MARK = '"([0-9a-f]{32})"'
"""The library's pattern of a mark, in whose place a pattern that is written here comes."""
NO_CONSTRAINT: dict[str, Any] = {"required": [], "uniqueItems": False, "minProperties": 0}
"""Values with which such a keyword allows everything."""


def json_pattern(schema: str | dict[str, Any], sandbox: Sandbox = shared) -> str:
    """The regular expression of a JSON schema, an object or its text. Raises ValueError saying which part of
    it is not supported.

    A value of any content has at most `any_json.FREE` objects and arrays in each other, and `any_json.DEPTH`
    where the whole schema is that of an object of any content, as {"type": "object"}.
    """
    try:
        read = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"schema: expected JSON, got {schema!r:.80}: {error}") from error
    if _free(read) == "object":
        return any_object()
    read, marked = {} if read is True else read, dict[str, str]()
    try:
        for _, part in _parts(read):
            marked |= _mark_free(part)
        sandbox.pattern_of(json.dumps(read, ensure_ascii=False))  # refuses what is no schema
        end = time.monotonic() + limits.SECONDS
        for at, part in _parts(read):
            if time.monotonic() > end:
                raise ValueError(
                    f"schema: its patterns took more than {limits.SECONDS:g} s together; expected fewer or "
                    "smaller ones"
                )
            marked |= _prepare(part, at, sandbox)
        pattern = sandbox.pattern_of(json.dumps(read, ensure_ascii=False))
    except Refused as error:
        raise ValueError(f"schema: {str(error).splitlines()[0].strip()}") from error
    marks = [mark for mark in re.findall(MARK, pattern) if mark in marked]
    if len(pattern) + sum(len(marked[mark]) for mark in marks) > limits.CHARACTERS:
        raise ValueError(
            f"schema: its pattern has more than {limits.CHARACTERS:,} characters; expected fewer values of "
            "any content, or required ones"
        )
    return re.sub(MARK, lambda found: marked.get(found[1], found[0]), pattern)


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The places and schemas of a schema and of all schemas in it, each before the schemas in it, so that the
    caller may change it. A schema that is true becomes {}, which says the same."""
    waiting = [("#", schema)]
    while waiting:
        at, part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield at, part
        of_part: list[tuple[str, Any, list[Any]]] = [(at, part, ["items", "additionalProperties"])]
        for keyword in ("properties", "$defs", "definitions"):
            if isinstance(inner := part.get(keyword), dict):
                of_part.append((f"{at}/{keyword}", inner, [*inner]))
        for keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
            if isinstance(inner := part.get(keyword), list):
                of_part.append((f"{at}/{keyword}", inner, [*range(len(inner))]))
        for place, inner, keys in of_part:
            for key in keys:
                if inner is part and key not in part:
                    continue
                if inner[key] is True:
                    inner[key] = {}
                waiting.append((f"{place}/{key}", inner[key]))


def _free(schema: Any) -> str | None:
    """The type of a schema without any other constraint, "any", "object" or "array"; None for others."""
    if not isinstance(schema, dict):
        return "any" if schema is True else None
    kind = schema.get("type", "any")
    for keyword in CONSTRAINTS & schema.keys():
        value = schema[keyword]
        of_all = keyword in ("items", "additionalProperties") and (value is True or value == {})
        if not of_all and NO_CONSTRAINT.get(keyword, ...) != value:
            return None
    return kind if kind in ("any", "object", "array") else None


def _mark_free(part: dict[str, Any]) -> dict[str, str]:
    """Write a mark in place of a schema of values of any content, in place; return the mark's pattern. What
    the library would fill with such values itself, many times larger, gets a schema for them."""
    if kind := _free(part):
        for keyword in CONSTRAINTS & part.keys():
            del part[keyword]
        part["const"] = mark = uuid.uuid4().hex
        return {mark: any_value(None if kind == "any" else kind)}
    if "type" not in part or CONSTRAINTS & part.keys() - FOLLOWED["type"]:
        return {}
    kinds = part["type"]
    if kinds == "array":
        part.setdefault("items", {})
    elif isinstance(kinds, list) and {"object", "array"} & {kind for kind in kinds if isinstance(kind, str)}:
        own = {keyword: part.pop(keyword) for keyword in CONSTRAINTS & part.keys()}
        del part["type"]
        part["anyOf"] = [
            {"type": kind, **{keyword: own[keyword] for keyword in OF_TYPE.get(kind, NONE) & own.keys()}}
            for kind in dict.fromkeys(map(str, kinds))
        ]
    return {}


def _prepare(part: dict[str, Any], at: str, sandbox: Sandbox) -> dict[str, str]:
    """Write the pattern of a string, in place, as the library has to read it, and a mark in place of a number
    with bounds; return the marks' patterns. Raises ValueError naming a constraint that the schema's pattern
    would not have, and its place."""
    marked: dict[str, str] = {}
    for keyword, kind in KINDS.items():
        if not isinstance(value := part.get(keyword, kind()), kind):
            wanted = "a text" if kind is str else "a list" if kind is list else "an object"
            raise ValueError(f"schema: {keyword}: expected {wanted}, got {value!r:.80}, at {at}")
    leading = next((keyword for keyword in FOLLOWED if keyword in part), None)
    if leading is None:
        return marked
    followed = FOLLOWED[leading]
    for of_text in ("maxLength", "minLength", "pattern"):
        if leading == "type" and of_text in part:
            leading, followed = of_text, followed - STRINGS[of_text]
            break
    if leading == "type" and part["type"] in ("integer", "number") and BOUNDS & part.keys():
        mark, leading = uuid.uuid4().hex, "const"
        marked[mark] = _between(*_bounds(part, at), part["type"] == "integer")
        part["const"] = mark
    for keyword in sorted(CONSTRAINTS & part.keys() - followed - {leading}):
        if NO_CONSTRAINT.get(keyword, ...) != part[keyword]:
            raise ValueError(f"schema: {keyword}: is not supported beside {leading}, at {at}")
    if leading == "allOf" and len(part["allOf"]) != 1:
        raise ValueError(f"schema: allOf: expected one schema, got {len(part['allOf'])}, at {at}")
    if leading == "prefixItems":
        count = len(part["prefixItems"])
        for keyword in sorted(ITEMS):
            if (got := part.get(keyword, count)) != count:
                raise ValueError(
                    f"schema: {keyword}: expected {count}, as many as prefixItems, got {got}, at {at}"
                )
    if leading in ("pattern", "type") and (text := part.get("pattern", FORMATS.get(part.get("format", "")))):
        part["pattern"] = f"(?:{_unanchored(text)})"
        part.pop("format", None)
        _check_text(_unanchored(text), at, sandbox)
    if leading in ("properties", "enum", "const"):
        for name in part[leading] if leading == "properties" else _names(part[leading]):
            if json.dumps(name, ensure_ascii=False) != f'"{name}"':
                raise ValueError(
                    f"schema: {leading}: expected names without escapes, got {name!r:.80}, at {at}"
                )
    if leading == "properties":
        names, required = {*part["properties"]}, part.get("required", [])
        known = isinstance(required, list) and all(isinstance(n, str) and n in names for n in required)
        if not known:
            raise ValueError(
                f"schema: required: expected some of {sorted(names)}, got {required!r:.200}, at {at}"
            )
    return marked


def _bounds(part: dict[str, Any], at: str) -> tuple[int | None, int | None]:
    """The least and the greatest value of an integer or a number, None where there is none; taken out of the
    schema."""
    low, high = [], []
    for keyword in sorted(BOUNDS & part.keys()):
        value, integer = part.pop(keyword), part["type"] == "integer"
        of_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
        if not of_number or not (integer or (value == int(value) and not keyword.startswith("exclusive"))):
            kind = "a number below 1e100" if integer else "a whole number, in minimum or maximum"
            raise ValueError(f"schema: {keyword}: expected {kind}, got {value!r:.80}, at {at}")
        exclusive = keyword.startswith("exclusive") and value == int(value)
        if keyword.endswith("inimum"):
            low.append(math.ceil(value) + exclusive)
        else:
            high.append(math.floor(value) - exclusive)
    if low and high and max(low) > min(high):
        raise ValueError(f"schema: minimum: expected at most {min(high)}, got {max(low)}, at {at}")
    return max(low, default=None), min(high, default=None)


def _between(low: int | None, high: int | None, integer: bool) -> str:
    """The regular expression of the numbers from `low` to `high`; None: without a bound."""
    magnitudes = _naturals if integer else _decimals
    ways = []
    if low is None or low < 0:
        least = 0 if high is None else max(0, -high)
        ways.append(f"-(?:{magnitudes(least, None if low is None else -low)})")
    if high is None or high >= 0:
        ways.append(magnitudes(max(0, low or 0), high))
    return f"(?:{'|'.join(ways)})"


def _decimals(low: int, high: int | None) -> str:
    fraction = r"(?:\.[0-9]+)?"
    if high is None:
        return f"(?:{_naturals(low, None)}){fraction}"
    most = rf"{high}(?:\.0+)?"
    return most if low == high else f"(?:{_naturals(low, high - 1)}){fraction}|{most}"


def _naturals(low: int, high: int | None) -> str:
    """Of the whole numbers from `low` >= 0."""
    sizes = range(len(str(low)), len(str(low if high is None else high)) + 1)
    ways = []
    for size in sizes:  # by their number of digits
        first, last = 10 ** (size - 1) if size > 1 else 0, 10**size - 1
        ways.append(_digits(str(max(low, first)), str(last if high is None else min(last, high))))
    if high is None:
        ways.append(f"[1-9][0-9]{{{sizes[-1]},}}")
    return "|".join(ways)


def _digits(low: str, high: str) -> str:
    """Of the numbers from `low` to `high`, which have as many digits."""
    if not low:
        return ""
    least, most, rest = int(low[0]), int(high[0]), len(low) - 1
    if least == most:
        return f"{least}(?:{_digits(low[1:], high[1:])})"
    ways = []
    if low[1:].strip("0"):
        ways.append(f"{least}(?:{_digits(low[1:], '9' * rest)})")
        least += 1
    if high[1:].strip("9"):
        ways.append(f"{most}(?:{_digits('0' * rest, high[1:])})")
        most -= 1
    if least <= most:
        ways.append(f"[{least}-{most}][0-9]{{{rest}}}")
    return "|".join(ways)


def _names(value: Any) -> list[str]:
    """The names of the objects in a JSON value, at every depth."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*(value if isinstance(value, dict) else ()), *(name for each in inner for name in _names(each))]


def _unanchored(pattern: str) -> str:
    return re.sub(r"^\^|(?<!\\)\$$", "", pattern)


def _check_text(pattern: str, at: str, sandbox: Sandbox) -> None:
    """Raise ValueError unless JSON writes the texts of a pattern as they are."""
    try:
        steps = sandbox.automaton_of(pattern)["next"]
    except Refused as error:
        raise ValueError(f"schema: pattern: {error}, at {at}") from error
    if any(byte < 0x20 or byte in b'"\\' for _, onward in steps for byte, _ in onward):
        raise ValueError(
            "schema: pattern: expected strings without quotes, backslashes and control characters, as of "
            f"[a-z ]+, got {pattern!r:.80}, at {at}"
        )
