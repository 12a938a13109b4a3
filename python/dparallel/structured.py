"""Forms of texts (regular expressions, JSON schemas, choices) as automata over a tokenizer's tokens.

The library outlines_core makes a regular expression of a JSON schema, and an automaton over bytes of a
regular expression. Here the bytes become tokens.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dparallel_ext.automaton import NOWHERE, Automaton

from . import sandbox as limits
from .sandbox import Exceeded, Refused, Sandbox, shared
from .text import INCOMPLETE, TokenTexts

MOST = 2**22
"""The most transitions of an automaton over tokens, before those that lead nowhere are removed."""

ITEMS = {"minItems", "maxItems"}
TEXTS = {"minLength", "maxLength", "pattern", "format"}
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
    "type": {"items", "additionalProperties", *ITEMS, *TEXTS},
}
"""The library follows the first of these keywords that a schema has, with these beside it. It would leave out
any other constraint without a word."""
STRINGS = {"maxLength": {"pattern", "format"}, "minLength": {"pattern", "format"}, "pattern": {"format"}}
"""Nor does it follow these beside each of those."""
OTHERS = """minimum maximum exclusiveMinimum exclusiveMaximum multipleOf uniqueItems contains minContains
    maxContains minProperties maxProperties patternProperties propertyNames dependentRequired dependentSchemas
    dependencies additionalItems unevaluatedItems unevaluatedProperties not if then else"""
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
CONSTRAINTS = {*FOLLOWED, *NONE.union(*FOLLOWED.values()), *OTHERS.split()} - {"type"}
"""The keywords of JSON Schema by which a value may be invalid. Others describe it, or say no more than the
library's keyword beside them."""
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
NO_CONSTRAINT: dict[str, Any] = {"required": [], "uniqueItems": False, "minProperties": 0}
"""Values with which such a keyword allows everything."""


class Vocabulary(NamedTuple):
    """What a tokenizer's tokens add to a text."""

    tokens: list[bytes | None]
    """The bytes of each id; None for special tokens and ids without a token. Tokens of byte-level BPE and of
    byte fallback may be parts of characters."""
    first: list[bytes | None]
    """The same at the beginning of a text, where decoders drop spaces, for example."""

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """tokenizer: a `tokenizers.Tokenizer`. Raises ValueError for a decoder by which a token's text
        depends on the tokens beside it."""
        if found := re.search(r"\b(BPEDecoder|CTC)\(", repr(tokenizer.decoder)):
            raise ValueError(
                f"tokenizer: expected a decoder by which each token has a text of its own, got {found[1]}"
            )
        added = tokenizer.get_added_tokens_decoder()
        names = {token: name for name, token in tokenizer.get_vocab().items()}
        texts, decoder = TokenTexts(tokenizer), repr(tokenizer.decoder)
        by_level, fallback = "ByteLevel(" in decoder, "ByteFallback(" in decoder

        def read(token: int) -> bytes | None:
            name = names.get(token)
            if name is None or (token in added and added[token].special):
                return None
            if by_level:  # of other characters a name is the text itself, as added tokens may be
                known = BYTES.keys() >= {*name}
                return bytes(BYTES[character] for character in name) if known else name.encode()
            if fallback and (byte := re.fullmatch("<0x([0-9A-F]{2})>", name)):
                return bytes([int(byte[1], 16)])
            text = texts(token)
            return None if INCOMPLETE in text else text.encode()

        def read_first(token: int) -> bytes | None:
            text = texts(token, first=True)
            return tokens[token] if tokens[token] is None or INCOMPLETE in text else text.encode()

        tokens = [read(token) for token in range(max(names, default=-1) + 1)]
        return cls(tokens, tokens if by_level else [*map(read_first, range(len(tokens)))])


def _byte_level() -> dict[str, int]:
    """Byte-level BPE writes visible characters of Latin-1 as themselves, and other bytes as U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _byte_level()


def choice_pattern(choices: Sequence[str]) -> str:
    """The regular expression of one of some texts."""
    return "|".join(map(re.escape, choices))


def json_pattern(schema: str | dict[str, Any], sandbox: Sandbox = shared) -> str:
    """The regular expression of a JSON schema, an object or its text. Raises ValueError saying what of it is
    not supported."""
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    try:
        sandbox.pattern_of(text)  # refuses what is no schema
        read = json.loads(text)
        marked = _prepare(read, sandbox)
        pattern = sandbox.pattern_of(json.dumps(read, ensure_ascii=False))
    except Refused as error:
        raise ValueError(f"schema: {str(error).splitlines()[0].strip()}") from error
    for mark, numbers in marked.items():
        pattern = pattern.replace(f'"{mark}"', numbers)
    return pattern


def _prepare(schema: Any, sandbox: Sandbox) -> dict[str, str]:
    """Write the patterns of a schema's strings, in place, as the library has to read them, and marks in place
    of what it does not know; return the mark's patterns. Raises ValueError naming a constraint that the
    schema's pattern would not have, and its place."""
    marked: dict[str, str] = {}
    began = time.monotonic()
    waiting = [("#", schema)]
    while waiting:
        at, part = waiting.pop()
        leading = next((keyword for keyword in FOLLOWED if isinstance(part, dict) and keyword in part), None)
        if leading is None:
            continue
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
        if leading in ("pattern", "type") and (text := part.get("pattern", FORMATS.get(part.get("format")))):
            part["pattern"] = f"(?:{_unanchored(text)})"
            part.pop("format", None)
            if time.monotonic() - began > limits.SECONDS:
                raise ValueError(
                    f"schema: its patterns took more than {limits.SECONDS:g} s together; expected fewer or "
                    "smaller ones"
                )
            _check_text(_unanchored(text), at, sandbox)
        if leading in ("properties", "enum", "const"):
            for name in part[leading] if leading == "properties" else _names(part[leading]):
                if json.dumps(name, ensure_ascii=False) != f'"{name}"':
                    raise ValueError(
                        f"schema: {leading}: expected names without escapes, got {name!r:.80}, at {at}"
                    )
        if leading == "properties":
            names, required = {*part["properties"]}, part.get("required", [])
            if not isinstance(required, list) or not all(name in [*names] for name in required):
                raise ValueError(
                    f"schema: required: expected some of {sorted(names)}, got {required!r:.200}, at {at}"
                )
        for keyword in ("properties", "$defs", "definitions"):
            if isinstance(part.get(keyword), dict):
                waiting += [(f"{at}/{keyword}/{name}", inner) for name, inner in part[keyword].items()]
        for keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
            if isinstance(part.get(keyword), list):
                waiting += [(f"{at}/{keyword}/{index}", inner) for index, inner in enumerate(part[keyword])]
        waiting += [(f"{at}/{keyword}", part.get(keyword)) for keyword in ("items", "additionalProperties")]
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


def automaton(
    pattern: str, vocabulary: Vocabulary, ends: Sequence[int] = (), sandbox: Sandbox = shared
) -> Automaton:
    """The token sequences whose whole text matches the pattern, alone or before tokens of `ends`.

    pattern: a regular expression in the syntax of Rust's regex, without anchors, look-around and references
        to groups; no text holds a NUL.
    sandbox: where the automaton over bytes is made, with limits of time and size.

    Raises ValueError for a pattern that is none, that is too large, or that no text of these tokens matches.
    """
    try:
        found = sandbox.automaton_of(pattern)
    except Exceeded as error:
        raise ValueError(
            f"pattern: {error}; expected a smaller form, as of fewer repetitions (minLength, {{n,m}}) or of "
            "values whose schema has a type"
        ) from error
    except Refused as error:
        raise ValueError(f"pattern: {error}") from error
    onward, final = dict(found["next"]), {*found["final"]}
    numbers = {state: at for at, state in enumerate(dict.fromkeys([found["first"], *onward]))}
    dead = len(numbers)
    table = [[dead] * 256 for _ in range(dead + 1)]
    for state, steps in onward.items():
        for byte, to in steps:
            table[numbers[state]][byte] = numbers.get(to, dead)
    accepting = [state in final for state in numbers]
    return _over_tokens(table, [*accepting, False], vocabulary, ends)


def _over_tokens(
    table: list[list[int]], accepting: list[bool], vocabulary: Vocabulary, ends: Sequence[int]
) -> Automaton:
    """The automaton over tokens of one over bytes. table: [state][byte], whose last state is dead.

    A text is a function from states to states. A vocabulary's texts have few different ones, so each is
    computed once, and the tokens with the same one, that begin a text alike, are a class.
    """
    dead, over = len(table) - 1, len(table)
    columns = [*zip(*table, strict=True)]  # [byte][state]
    functions = [tuple(range(len(table)))]
    numbers = {functions[0]: 0}
    onward: dict[tuple[int, int], int] = {}

    def number(function: tuple[int, ...]) -> int:
        if function not in numbers:
            if (len(functions) + 1) * len(table) > MOST:
                raise ValueError(f"pattern: expected one of at most {MOST:,} transitions, got more")
            numbers[function] = len(functions)
            functions.append(function)
        return numbers[function]

    nothing = number((dead,) * len(table))

    def of_text(text: bytes) -> int:
        at = 0
        for byte in text:
            if at == nothing:
                break
            if (at, byte) not in onward:
                onward[at, byte] = number(tuple(map(columns[byte].__getitem__, functions[at])))
            at = onward[at, byte]
        return at

    classes: dict[tuple[int, int], int] = {}

    def class_of(text: bytes | None, first: bytes | None) -> int:
        within = of_text(text) if text else nothing  # an empty token would come again and again
        begins = nothing if first is None else of_text(first)
        return classes.setdefault((within, functions[begins][0]), len(classes))

    token_class = torch.tensor([*map(class_of, *vocabulary)], device="cpu")
    token_class[list(ends)] = len(classes)
    # The first state is that of no token yet; then come those of the table, and the one behind an end.
    rows = [
        [begins for _, begins in classes],
        *zip(*(functions[within] for within, _ in classes), strict=True),
    ]
    transitions = torch.tensor([*rows, (dead,) * len(classes)], device="cpu")
    accepts = torch.tensor([accepting[0], *accepting, True], device="cpu")
    transitions = torch.cat((transitions, torch.where(accepts, over, dead)[:, None]), 1)
    try:
        return Automaton(token_class, torch.where(transitions == dead, NOWHERE, transitions + 1), accepts)
    except ValueError as error:
        raise ValueError("pattern: expected one that some text of the model's tokens matches") from error
