"""The page to watch decoding, which `dparallel serve` serves at /, and which a recording is written into.

Both are made from page.html, page.css and a script, which is answers.js and page.js in a row. The page reads
its data from the JSON in its <script id="data">: a server's rules and samples, or a recording, which holds
the events of the server's stream of drafts (see `serving.answer.draft_of` and `recording`).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from dparallel_ext import rules

from ..toy import tasks

SAMPLE_PROMPTS = (
    "A baker makes 24 rolls in the morning and twice as many in the afternoon. She sells 50 of them. How "
    "many are left?",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "Write a Python function that says whether a word reads the same backwards.",
)
"""Sample problems for models that do not ship."""
BUILTIN_SAMPLES = 8

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Headers of each part of the page, which loads nothing from elsewhere and runs only its own script."""

NO_DATA = '<script id="data" type="application/json">null</script>'
STYLE = '<link rel="stylesheet" href="page.css">'
SCRIPT = '<script type="module" src="page.js"></script>'


class Part(NamedTuple):
    """The answer of one of the page's paths."""

    media_type: str
    content: bytes


def served(builtin: bool) -> dict[str, Part]:
    """The parts of a server's page, by path. `builtin`: all its models ship with the package, so the samples
    are problems of their task."""
    samples = list(SAMPLE_PROMPTS)
    if builtin:
        problems = itertools.islice(tasks.problems("held_out", seed=1), BUILTIN_SAMPLES)
        samples = [problem.prompt for problem in problems]
    page = _with_data({"rules": rules.menu(), "samples": samples, "builtin": builtin})
    return {
        "/": Part("text/html", page.encode()),
        "/page.css": Part("text/css", _text("page.css").encode()),
        "/page.js": Part("text/javascript", _script().encode()),
    }


def recorded(recording: Mapping[str, Any]) -> str:
    """The page of a recording, as one file that needs no other. `recording`: see `recording`."""
    style, script = _text("page.css"), _script()
    allowed = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = _with_data({"recording": recording})
    for old, new in (
        (STYLE, f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n<style>{style}</style>'),
        (SCRIPT, f'<script type="module">{script}</script>'),
    ):
        assert old in page
        page = page.replace(old, new)
    return page


def _with_data(data: Mapping[str, Any]) -> str:
    page = _text("page.html")
    assert NO_DATA in page
    # Without "<" no text in the data can end the element.
    content = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return page.replace(NO_DATA, NO_DATA.replace("null", content))


def _text(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _script() -> str:
    return "\n".join(map(_text, ("answers.js", "page.js")))


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
