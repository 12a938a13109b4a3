"""A `dparallel serve` in a process of its own, and many clients at once: for its benchmark and its tests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

KEY = "sk-of-the-tests"
START_SECONDS = 120


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name; by name{value,value} where they have labels other than the model's
        name."""
        request = urllib.request.Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        values = {}
        for family in families:
            for sample in family.samples:
                labels = ",".join(value for name, value in sample.labels.items() if name != "model")
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return values


@contextlib.contextmanager
def server(model: str | Path, *options: object, files: int | None = None) -> Iterator[Served]:
    """Run `dparallel serve` in a process of its own, on a free port of the loopback interface; stop it at the
    end. Raises RuntimeError with its log where it does not start.

    files: the most files that it may have open.
    """
    with tempfile.TemporaryDirectory() as place:
        keys, log = Path(place) / "keys", Path(place) / "log"
        keys.write_text(f"another\n{KEY}\n")
        command = [sys.executable, "-m", "dparallel", "serve", "--model", model, "--port", 0]
        command += ["--api-key-file", keys, *options]
        with log.open("wb") as file:
            limit = None if files is None else functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE)
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=file,
                stderr=file,
                preexec_fn=limit and functools.partial(limit, (files, files)),
            )
        try:
            ends = time.monotonic() + START_SECONDS
            while not (address := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.05)
            yield Served(process, int(address[1]), log)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@dataclass
class Reply:
    """The answer that a client received, and when."""

    text: str
    first: float
    """Seconds to the first text."""
    seconds: float
    """Seconds to the end."""
    passes: int
    tokens: int


async def _ask(client: AsyncOpenAI, model: str, prompt: str, settings: dict[str, Any]) -> Reply:
    began, first, text, usage = time.perf_counter(), None, "", None
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        stream=True,
        stream_options={"include_usage": True},
        **settings,
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.perf_counter() - began
                text += choice.delta.content
    assert usage is not None
    seconds = time.perf_counter() - began
    return Reply(text, first or seconds, seconds, usage.forward_passes, usage.completion_tokens)


def ask_all(served: Served, model: str, prompts: Sequence[str], **settings: Any) -> list[Reply]:
    """Ask for every prompt at once, streaming, each over a connection of its own."""

    async def run() -> list[Reply]:
        url = f"{served.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=600) as client:
            return await asyncio.gather(*(_ask(client, model, prompt, settings) for prompt in prompts))

    return asyncio.run(run())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that a `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
