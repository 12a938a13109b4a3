"""Shows text while it is unmasked, for `dparallel decode --stream` and `dparallel demo`."""

from __future__ import annotations

import time
from typing import Any, Self

from torch import Tensor

from .text import TokenTexts
from .toy import tasks

HIDDEN = "░░"


class LiveText:
    """A streamer for `decode` and, with `causal`, for `speculate`: shows the tokens committed so far, the
    newest highlighted; without a terminal, a line for each pass."""

    def __init__(
        self, console: Any, tokenizer: Any, mask_id: int | None, delay: float, *, causal: bool = False
    ) -> None:
        self.console, self.mask_id, self.causal = console, mask_id, causal
        self.text_of = TokenTexts(tokenizer)
        self.delay = delay if console.is_terminal else 0.0
        self.done: list[int] = []
        self.before: list[int] = []
        self.passes = 0
        self.prompt_seen = False
        self.live: Any = None

    def __enter__(self) -> Self:
        from rich.live import Live

        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=30)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.done += value.flatten().tolist()
            if self.causal:
                self._show(self.done.copy())
        self.prompt_seen = True

    def put_draft(self, value: Tensor) -> None:
        self._show(self.done + value.flatten().tolist())

    def _show(self, now: list[int]) -> None:
        self.passes += 1
        text = self._text(now)
        if self.live is not None:
            self.live.update(text)
            time.sleep(self.delay)
        else:
            self.console.print(text)
        self.before = now

    def end(self) -> None:
        pass

    def _text(self, now: list[int]) -> Any:
        from rich.text import Text

        text = Text(f"pass {self.passes:2d}  ", style="bold")
        for i, token in enumerate(now):
            fresh, gap = i >= len(self.before) or token != self.before[i], " " if i else ""
            if token == self.mask_id:
                text.append(gap + HIDDEN, style="grey37")
                continue
            word = self.text_of(token, first=not i)
            style = "bold black on green" if fresh else "default"
            if word.strip() == tasks.EOS:
                word, style = gap + "·", "green" if fresh else "grey37"
            text.append(word, style=style)
        return text
