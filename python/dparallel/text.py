"""A checkpoint's chat template, and text streamed from tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dparallel_ext.models import files

from . import sandbox as sandboxes
from .sandbox import Refused, Sandbox

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4
"""The most tokens of a character: the bytes of UTF-8."""
LONG = 16
"""Pending tokens beyond which most of them can be no part of a character: a run of bytes that are no text."""


def unicode(value: str) -> str:
    """`value` itself. Raises ValueError if it holds half of a surrogate pair, as strings of JSON can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text, got half of a surrogate pair at {error.start}") from error
    return value


Message = dict[str, Any]
"""{"role": "system", "user" or "assistant", "content": text}"""


def shown(prompt: str | list[Message]) -> str:
    """A prompt as text: of messages their JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


class TextStream:
    """The text of tokens that come a few at a time. Text that it has returned never changes, and the whole
    text does not depend on how many tokens come at a time.

    A character may take several tokens (byte-level BPE, byte fallback), so an incomplete character at the end
    is held back, and so is text that may begin a stop string. Only the tokens since the last complete
    character are decoded again, and of these the last ones, so the work is linear in the number of tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; its special tokens are left out of the text, and so are ids that
            it does not know.
        stop: stop strings; the text ends before the one that is complete first, even within a token.
        kept: special tokens, as text, that are text all the same.
        after: tokens whose text stands in front: decoders drop a space at the beginning of a text.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), kept: Sequence[str] = (), after: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token for token, each in added if each.special and each.content not in kept}
        self.starts: list[int] = []
        """For each token taken, the number of characters that were complete before it: special tokens have
        none, and the tokens of one character start together."""
        self.count = 0
        """Tokens taken, up to the one that completed a stop string."""
        self.stopped = False
        # Tokens whose text is complete; a decoder may look back on them.
        self._before = [token for token in after if token not in self._special][-LONGEST:]
        self._pending: list[int] = []
        self._emitted = 0  # characters of _pending's text that are complete
        self._in_run = False  # whether pending tokens were left out since the last complete character
        self._length = 0  # characters of all complete text, stop strings included
        self._held = ""

    @property
    def length(self) -> int:
        """Characters that are complete."""
        return self._length

    def put(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        # One by one: the text of bytes that are no UTF-8 depends on the tokens decoded with them, and the
        # count ends with the token that completes a stop string.
        released = ""
        for token in tokens:
            if self.stopped:
                break
            self.count += 1
            self.starts.append(self._length)
            if token in self._special or self.tokenizer.id_to_token(token) is None:
                continue  # without text, whatever is in front of it
            self._pending.append(token)
            fresh = self._complete()
            self._length += len(fresh)
            released += self._until_stop(fresh)
        return released

    def finish(self) -> str:
        """The text that was held back; no tokens follow."""
        if self.stopped:
            return ""
        return self._until_stop(self._complete(last=True), last=True)

    def _complete(self, last: bool = False) -> str:
        before = self._before
        text = self._following(before, self._pending)
        if text is None:
            # After bytes that are no text, a decoder may change earlier text; returned text stays.
            before, text = [], self._decode(self._pending)
        end = len(text) if last else len(text.rstrip(INCOMPLETE))
        left_out = 0 if end == len(text) else self._shorten(before, text)
        end = max(end, left_out)
        fresh = text[self._emitted : end]
        self._emitted = end - left_out
        if end == len(text):
            # Decoders drop a space in front of the first token, so the context must have some text.
            self._before = self._pending if text else self._before + self._pending
            self._pending, self._emitted, self._in_run = [], 0, False
        return fresh

    def _following(self, before: list[int], tokens: list[int]) -> str | None:
        """The text that `tokens` add to that of the tokens before; None where that changes."""
        text, both = self._decode(before), self._decode(before + tokens)
        return both[len(text) :] if both.startswith(text) else None

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)  # `put` leaves them out

    def _shorten(self, before: list[int], text: str) -> int:
        """Leave out the first of many pending tokens, whose text behind the tokens `before` is `text`; return
        how many characters these have, which no later token changes."""
        if len(self._pending) <= LONG:
            return 0
        head, tail = self._pending[:-LONGEST], self._pending[-LONGEST:]
        first = self._following(before, head)
        if first is None or not text.startswith(first):  # the last character began in the head
            return 0
        # Where a single bad byte makes all bytes beside it bad (byte fallback), it is among the first.
        for context in [before, head] if self._in_run else [head]:
            if self._following(context, tail) == text[len(first) :]:
                self._before, self._pending, self._in_run = context, tail, True
                return len(first)
        return 0

    def _until_stop(self, fresh: str, last: bool = False) -> str:
        text = self._held + fresh
        ends = [(text.find(s) + len(s), text.find(s)) for s in self.stop if s in text]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        held = 0 if last else max((overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class TokenTexts:
    """The text of single tokens as within a longer text, special tokens included.

    Decoders drop a space in front of the first token, so each token is decoded after another one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        ids = range(tokenizer.get_vocab_size())
        self._first = next((token for token in ids if self._decode([token]).strip(INCOMPLETE + " ")), None)
        self._before = "" if self._first is None else self._decode([self._first])
        self._known: dict[int, str] = {}

    def __call__(self, token: int, first: bool = False) -> str:
        """The token's text; `first`: at the beginning of the text."""
        if first:
            return self._decode([token])
        if token not in self._known:
            both = self._decode([token] if self._first is None else [self._first, token])
            follows = both.startswith(self._before)
            self._known[token] = both[len(self._before) :] if follows else self._decode([token])
        return self._known[token]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


Template = Callable[..., str]
"""(messages, **chat_template_kwargs) -> the text of a prompt."""


def chat_template(directory: Path, sandbox: Sandbox | None = None) -> Template | None:
    """The checkpoint's template: messages to the text of a prompt. None if it has none.

    Of several templates it is the one named "default", and with tools "tool_use", as in transformers. The
    returned function takes other variables of the template as keywords (enable_thinking, ...), in JSON's
    types. It runs the template in `sandbox`, with limits of time and size; default: the shared one.

    Raises ValueError if the template does not compile; the returned function raises ValueError, naming the
    template, if it refuses the messages or exceeds its limits.
    """
    named = _chat_templates(directory)
    source = _default_of(named)
    if not source:
        if any(named.values()):
            raise ValueError(
                f'model: the chat templates of {directory} are {sorted(named)}, none is "default"'
            )
        return None
    special = files.special_tokens(directory)
    process = sandboxes.shared if sandbox is None else sandbox
    try:
        process.compile(source)
    except Refused as error:
        raise ValueError(f"model: the chat template of {directory} does not compile: {error}") from error

    def render(messages: Sequence[Message], /, **keywords: Any) -> str:
        if "messages" in keywords:
            raise ValueError("chat_template_kwargs: messages are no keyword of a chat template")
        chosen = named.get("tool_use", source) if keywords.get("tools") else source
        stated = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {"tools": None, "documents": None, "add_generation_prompt": True, **special, **keywords}
        try:
            return unicode(process.render(chosen, {**variables, "messages": stated}))
        except ValueError as error:
            raise ValueError(
                f"messages: the chat template of {directory.name} does not render them: {error}"
            ) from error

    return render


def tool_template(directory: Path) -> str:
    """The source of the template that `chat_template` takes for messages with tools; "" without one."""
    named = _chat_templates(directory)
    source = _default_of(named)
    return (named.get("tool_use", source) or "") if source else ""


def _default_of(named: dict[str, str]) -> str | None:
    return named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)


def _chat_templates(directory: Path) -> dict[str, str]:
    """The templates by name. .jinja files come before tokenizer_config.json, and that before
    chat_template.json."""
    alone = {"default": directory / "chat_template.jinja"}
    additional = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    of_files = {
        name: files.read_text(file)
        for name, file in {**alone, **{file.stem: file for file in additional}}.items()
        if files.is_there(file)
    }
    if "default" in of_files:
        return of_files
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = files.read_json(directory / name).get("chat_template")
        if isinstance(content, list):  # several, each {"name": ..., "template": ...}
            entries = [entry if isinstance(entry, dict) else {} for entry in content]
            content = {str(entry.get("name")): entry.get("template") for entry in entries}
        elif content is None or isinstance(content, str):
            content = {"default": content} if content else {}
        if not isinstance(content, dict) or not all(isinstance(entry, str) for entry in content.values()):
            raise ValueError(
                f"model: {directory / name}: expected chat_template to be text, or texts by name"
            )
        if content:
            return {**content, **of_files}
    return of_files


Encoder = Callable[[str | list[Message]], list[int]]
"""From a prompt to its token ids."""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless it is a `tokenizers.Tokenizer`, which a fast tokenizer of transformers
    holds."""
    from tokenizers import Tokenizer

    if not isinstance(tokenizer, Tokenizer):
        hint = "; its backend_tokenizer is one" if hasattr(tokenizer, "backend_tokenizer") else ""
        raise ValueError(f"tokenizer: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}{hint}")


def prompt_encoder(tokenizer: Any, template: Template | None) -> Encoder:
    """An encoder of prompts: of a text as the user's message in the chat template, or without one; of
    messages in the template, so that it raises ValueError for them without one.

    tokenizer: a `tokenizers.Tokenizer`, as `registry.load` returns it.
    template: as `registry.template_of` returns it.

    Raises ValueError naming the argument that is something else.
    """
    check_tokenizer(tokenizer)
    if template is not None and not callable(template):
        got = type(template).__name__
        raise ValueError(f"template: expected what registry.template_of returns, or None, got {got}")

    def encode(prompt: str | list[Message]) -> list[int]:
        if template is None:
            if not isinstance(prompt, str):
                raise ValueError(
                    "prompt: expected a text, since no chat template is used (the checkpoint has none, or "
                    f"--no-chat), got messages {prompt!r:.80}"
                )
            return list(tokenizer.encode(prompt).ids)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = template(messages)
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode
