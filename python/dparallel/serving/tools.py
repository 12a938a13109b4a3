"""Function calls: the form of their text, and the calls in an answer.

The call of one function is the JSON of its arguments; where there are several to choose from, it is
{"name": "...", "arguments": {...}}.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from .. import sandbox as limits
from ..json_schema import json_pattern
from ..sandbox import Sandbox

TAIL = "}"
NO_ARGUMENTS = {"type": "object", "properties": {}}
"""The schema of a function's arguments that has no `parameters`."""


def head(name: str) -> str:
    """What comes before the arguments of one of several functions; `TAIL` comes behind them."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


def calls_pattern(schemas: Mapping[str, Any], sandbox: Sandbox) -> str:
    """The regular expression of a call of one of the functions, with the schemas of their arguments. Raises
    ValueError saying which part of a schema is not supported."""
    patterns, end = [], time.monotonic() + limits.SECONDS
    for name, schema in schemas.items():
        if time.monotonic() > end:
            raise ValueError(f"the patterns of the functions took more than {limits.SECONDS:g} s together")
        try:
            arguments = f"(?:{json_pattern(schema, sandbox)})"
        except ValueError as error:
            raise ValueError(f"{name}: parameters: {error}") from error
        several = len(schemas) > 1
        patterns.append(f"{re.escape(head(name))}{arguments}{re.escape(TAIL)}" if several else arguments)
    return "|".join(patterns)


class CallText:
    """A call of one of `functions`, as its text comes."""

    def __init__(self, functions: Sequence[str]) -> None:
        self._heads = {name: head(name) if len(functions) > 1 else "" for name in functions}
        self._tail = len(TAIL) if len(functions) > 1 else 0
        self._text, self._sent = "", 0
        self.named = False
        """Whether the function's name is complete."""

    def put(self, text: str) -> list[dict[str, Any]]:
        """The entries of "tool_calls" that more text brings: its addition to the one call, if there is
        any."""
        self._text += text
        call: dict[str, Any] = {"function": {}}
        if not self.named:
            found = [(name, head) for name, head in self._heads.items() if self._text.startswith(head)]
            if not found:
                return []
            ((name, begins),) = found
            self.named, self._sent = True, len(begins)
            call = {"id": f"call_{uuid.uuid4().hex}", "type": "function"}
            call["function"] = {"name": name}
        # The last character may be the call's end, which is not of the arguments.
        end = max(self._sent, len(self._text) - self._tail)
        call["function"]["arguments"], self._sent = self._text[self._sent : end], end
        return [call] if "id" in call or call["function"]["arguments"] else []
