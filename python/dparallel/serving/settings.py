"""The server's settings and API keys."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dparallel_ext.arguments import check_fields, whole

from .. import files
from .protocol import MOST_PROMPTS

KEY_VARIABLE = "DPARALLEL_API_KEY"
"""The environment variable whose keys count if the command line has none."""


MAX_LENGTH = 2048
"""The default of the most tokens of prompt and response."""


@dataclass(frozen=True)
class ServerSettings:
    """The server's settings that do not depend on its models. Raises ValueError naming the field."""

    keys: tuple[str, ...] = ()
    """API keys, one of which each request needs; none: no request needs a key. /health and the page never
    do."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages (scheme://host:port, or "null" for files) that may send requests; "*": any."""
    max_length: int | None = None
    """The most tokens of prompt and response; None: each model's own, at most `MAX_LENGTH`."""
    max_choices: int = 64
    """The most responses of a request: its prompts times `n`; never more than an engine has lanes and places
    to wait."""
    max_body: int = 2**20
    """The most bytes of a request."""
    max_connections: int | None = None
    """The most connections at once; requests may be under way on all but a few of them. None: no limit."""
    body_seconds: float = 30.0
    """Seconds for a request to arrive, from its connection, or from the end of the answer before it."""
    grace: float = 30.0
    """Seconds for running requests to finish once the server is told to stop."""
    page: bool = True
    """Whether there is a page at /."""

    def __post_init__(self) -> None:
        if not all(key.strip() for key in self.keys):
            raise ValueError("api_key: expected a key, got an empty one")
        check_fields(self, ("max_length",), whole, 1, 2**20)
        check_fields(self, ("max_choices",), whole, 1, MOST_PROMPTS)
        check_fields(self, ("max_body",), whole, 1, 2**31)
        check_fields(self, ("max_connections",), whole, 2, 2**20)
        for name in ("body_seconds", "grace"):
            if not 0 <= (seconds := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected seconds >= 0, got {seconds}")
        for origin in self.cors_origins:
            # Browsers write them in lower case, without a path.
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
                raise ValueError(
                    f"cors_origin: expected '*' or an origin such as https://example.org, got {origin!r}"
                )


def find_keys(key: str | None, file: Path | None) -> tuple[str, ...]:
    """API keys: the option's, the file's, or the environment's.

    Raises ValueError if one of them is given and holds no key, since that must not open the server to all.
    """
    if key is not None and file is not None:
        raise ValueError("api_key: not beside --api-key-file")
    if file is not None:
        return read_keys(file)
    if key is not None and key.startswith("--"):
        raise ValueError(f"api_key: expected a key, got the option {key}; is a variable empty?")
    name, content = (KEY_VARIABLE, os.environ.get(KEY_VARIABLE)) if key is None else ("api_key", key)
    if content is None:
        return ()
    keys = keys_in(name, content)
    if not keys:
        raise ValueError(f"{name}: expected a key, got an empty one")
    return keys


def read_keys(file: Path) -> tuple[str, ...]:
    """The API keys in a file. Raises ValueError if there is none."""
    keys = keys_in("api_key_file", files.read_text("api_key_file", file))
    if not keys:
        raise ValueError(f"api_key_file: {file} holds no key")
    return keys


def keys_in(name: str, content: str) -> tuple[str, ...]:
    """The API keys in a text, one a line, without surrounding blanks and without comments, which # begins.

    Raises ValueError for a key that cannot be sent in a header.
    """
    entries = (re.split(r"(?:^|\s)#", line)[0].strip() for line in re.split(r"\r\n|\r|\n", content))
    keys = tuple(key for key in entries if key)
    for number, key in enumerate(keys, 1):
        if not key.isprintable():
            raise ValueError(f"{name}: expected printable characters, but key {number} has others")
    return keys
