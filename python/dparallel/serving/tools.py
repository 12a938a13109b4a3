"""Function calls: the form of their text, and the calls in an answer.

Where a function is to be called, the call of one function is the JSON of its arguments; where there are
several to choose from, it is {"name": "...", "arguments": {...}}. Where a function may be called, calls are
written as the checkpoint has learned to write them.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import sandbox as limits
from ..json_schema import json_pattern
from ..sandbox import Sandbox
from ..text import overlap

TAIL = "}"
NO_ARGUMENTS = {"type": "object", "properties": {}}
"""The schema of a function's arguments that has no `parameters`."""


def head(name: str) -> str:
    """What comes before the arguments of one of several functions; `TAIL` comes behind them."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


def calls_pattern(
    schemas: Mapping[str, Any], sandbox: Sandbox, written: Callable[[str], tuple[str, str]] | None = None
) -> str:
    """The regular expression of a call of one of the functions, with the schemas of their arguments.

    written: from a function's name to what comes before and behind its arguments; None: only where there are
        several functions something does.

    Raises ValueError saying which part of a schema is not supported.
    """
    patterns, end = [], time.monotonic() + limits.SECONDS
    for name, schema in schemas.items():
        if time.monotonic() > end:
            raise ValueError(f"the patterns of the functions took more than {limits.SECONDS:g} s together")
        try:
            arguments = f"(?:{json_pattern(schema, sandbox)})"
        except ValueError as error:
            raise ValueError(f"{name}: parameters: {error}") from error
        before, behind = written(name) if written else (head(name), TAIL) if len(schemas) > 1 else ("", "")
        patterns.append(f"{re.escape(before)}{arguments}{re.escape(behind)}")
    return "|".join(patterns)


def new_id() -> str:
    """The id of a call: nine letters and digits, as Mistral's templates demand."""
    return secrets.token_hex(5)[:9]


class Said(NamedTuple):
    """What more text brings to an answer."""

    parts: Sequence[str | dict[str, Any]] = ()
    """Text, and entries of "tool_calls" of a stream, whose `index` is the call's, as they follow each
    other."""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [part for part in self.parts if isinstance(part, dict)]


class CallText:
    """The call of one of `functions`, as its text comes."""

    content: str | None = None
    """The content of an answer in front of its first text."""

    def __init__(self, functions: Sequence[str]) -> None:
        self._heads = {name: head(name) if len(functions) > 1 else "" for name in functions}
        self._tail = len(TAIL) if len(functions) > 1 else 0
        self._text, self._sent = "", 0
        self.count = 0
        """The calls so far whose function is known."""

    def put(self, text: str, last: bool = False) -> Said:
        """What more text brings. last: no more follows."""
        self._text += text
        call: dict[str, Any] = {"index": 0, "function": {}}
        if not self.count:
            found = [(name, head) for name, head in self._heads.items() if self._text.startswith(head)]
            if not found or not self._text:
                return Said()
            ((name, begins),) = found
            self.count, self._sent = 1, len(begins)
            call |= {"id": new_id(), "type": "function", "function": {"name": name}}
        # The last character may be the call's end, which is not of the arguments.
        end = max(self._sent, len(self._text) - self._tail)
        call["function"]["arguments"], self._sent = self._text[self._sent : end], end
        return Said([call] if "id" in call or call["function"]["arguments"] else [])


# --- calls that a model may make ------------------------------------------------------------------


class CallStyle(NamedTuple):
    """How a checkpoint has learned to write calls."""

    begin: str
    end: str
    """"": up to the next call, or the end of the text."""
    kept: tuple[str, ...]
    """Tokens that are text in answers, though they may be special."""
    formed: bool = True
    """Whether a call has a regular expression, by `written`."""
    bare: bool = False
    """Whether a text that is JSON is a call too, without `begin`."""

    def written(self, name: str) -> tuple[str, str]:
        """What comes before and behind the arguments of a function in a call."""
        if self.bare:
            return f'{{"name": {json.dumps(name)}, "parameters": ', TAIL
        return f"{self.begin}\n{head(name)}", f"{TAIL}\n{self.end}"

    def pattern(self, schemas: Mapping[str, Any], one: bool, sandbox: Sandbox) -> str:
        """The regular expression of calls, one or some. Raises ValueError as `calls_pattern`."""
        call = calls_pattern(schemas, sandbox, self.written)
        return f"(?:{call})" if one or self.bare else f"(?:(?:{call})\n?)+"


def call_style(template: str) -> CallStyle | None:
    """The style that a chat template shows; None where it shows none that is read."""
    if "<tool_call>" in template and "<arg_key>" not in template:  # not GLM's
        # Qwen's and Hermes', in JSON; Qwen3-Coder's, in tags.
        marks = "<tool_call>", "</tool_call>"
        return CallStyle(*marks, marks, formed="<function=" not in template)
    if "[TOOL_CALLS]" in template:  # Mistral's
        return CallStyle("[TOOL_CALLS]", "", ("[TOOL_CALLS]", "[ARGS]"), formed=False)
    if re.search(r'"parameters\\*": dictionary of argument name', template):  # Llama 3's
        return CallStyle("<|python_tag|>", "", ("<|python_tag|>",), bare=True)
    return None


def read_calls(text: str, schemas: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of functions and the JSON of their arguments in the text of some calls: JSON objects with
    "name" and "arguments" or "parameters", a list of these, a name followed by JSON, or tags as of
    Qwen3-Coder.

    schemas: of the functions' arguments, whose types values in tags have. Raises ValueError for another text.
    """
    text = text.strip()
    if tagged := re.match(r"<function=([^>\s]+)>", text):
        tags = text[tagged.end() :].removesuffix("</function>")
        return [(tagged[1], _dumped(_tagged(tags, schemas.get(tagged[1]))))]
    named = re.match(r"([\w.-]+)\s*(?:\[ARGS\]\s*)?(\{.*)", text, re.DOTALL)
    values = _values(named[2] if named else text)
    if named:
        given = [{"name": named[1], "arguments": value} for value in values]
    else:
        given = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    calls = []
    for call in given:
        arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
        if isinstance(arguments, str):  # JSON within JSON
            (arguments,) = _values(arguments)
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"expected a call, got {text!r:.80}")
        calls.append((call["name"], _dumped(arguments)))
    if not calls:
        raise ValueError("expected a call, got none")
    return calls


TAG = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _tagged(text: str, schema: Any) -> dict[str, Any]:
    """Arguments in tags. Raises ValueError for another text."""
    if TAG.sub("", text).strip():
        raise ValueError(f"expected arguments in tags, got {text!r:.80}")
    types = schema.get("properties") if isinstance(schema, dict) else None
    types = types if isinstance(types, dict) else {}
    return {name: _of_kinds(value, _kinds(types.get(name))) for name, value in TAG.findall(text)}


def _kinds(schema: Any) -> list[Any]:
    """The types that a schema names for a value."""
    if not isinstance(schema, dict):
        return []
    kind, several = schema.get("type"), schema.get("anyOf")
    parts = several if isinstance(several, list) else []
    return [
        *(kind if isinstance(kind, list) else [kind]),
        *(found for part in parts for found in _kinds(part)),
    ]


def _of_kinds(text: str, kinds: Sequence[Any]) -> Any:
    """The value that a text without quotes stands for: a string where it may be one, else JSON, or Python's
    words for it, if it is any."""
    if "string" in kinds and not ("null" in kinds and text in ("null", "None")):
        return text
    try:
        (value,) = _values({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    except ValueError:
        return text
    return value


def _dumped(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _values(text: str) -> list[Any]:
    """The values of JSON after JSON; Llama 3 puts ; between them. Raises ValueError for another text."""
    decoder, at, values = json.JSONDecoder(), 0, []
    while found := re.compile(r"[\s;]*(?=[^\s;])").match(text, at):
        try:
            value, at = decoder.raw_decode(text, found.end())
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply") from error
        values.append(value)
    return values


class PossibleCalls:
    """Text and calls of an answer that may have calls of a style, as its text comes.

    A call counts once it is complete; text that is no call stays text. Blanks beside calls are left out.

    Args:
        schemas: the schemas of the functions' arguments, by the functions' names.
        most: the most calls; further ones are left out. None: any number.
    """

    content = ""

    def __init__(self, style: CallStyle, schemas: Mapping[str, Any], most: int | None) -> None:
        self._style, self._schemas, self._most = style, schemas, most
        self._held, self._inside = "", False
        self._blank = ""  # in front of the call that is being written
        self._bare = style.bare
        self.count = 0

    def put(self, text: str, last: bool = False) -> Said:
        """What more text brings. last: no more follows."""
        self._held += text
        if self._bare:
            self._bare = self._held.strip()[:1] in ("", "{", "[")
            if self._bare and not last:
                return Said()
            if self._bare and (found := self._read(self._held, foreign=False)):
                return Said(found)
        style = self._style
        said: list[str | dict[str, Any]] = []
        while True:
            if not self._inside:
                text, begun, rest = self._held.partition(style.begin)
                if not begun:
                    open_at = len(text) - (0 if last else overlap(text, style.begin))
                    shown = text[:open_at].rstrip() if not last or self.count else text
                    self._held = text[len(shown) :]
                    return Said([*said, shown] if shown else said)
                shown = text.rstrip()
                said += [shown] if shown else []
                self._blank = text[len(shown) :]
                self._held, self._inside = rest, True
            body, ended, rest = self._held.partition(style.end or style.begin)
            if not ended and not last:
                return Said(said)
            written = self._read(body)
            if written is None:
                said.append(f"{self._blank}{style.begin}{body}{ended and style.end}")
            said += written or []
            self._held, self._inside = rest if style.end else ended + rest, False

    def _read(self, body: str, foreign: bool = True) -> list[dict[str, Any]] | None:
        """The entries of the calls of a text; None if it has none. foreign: of other functions, too."""
        try:
            found = read_calls(body, self._schemas)
        except ValueError:
            return None
        if not foreign and any(name not in self._schemas for name, _ in found):
            return None
        entries = []
        for name, arguments in found[: None if self._most is None else self._most - self.count]:
            function = {"name": name, "arguments": arguments}
            entries.append({"index": self.count, "id": new_id(), "type": "function", "function": function})
            self.count += 1
        return entries
