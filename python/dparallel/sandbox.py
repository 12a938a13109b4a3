"""Runs chat templates and patterns, which are not trusted, in a process with limits of time and memory.

jinja2's sandbox keeps a template from files and from Python's internals, but not from an endless loop or from
gigabytes of text; a short regular expression may have an automaton of billions of states. So another process
renders templates and makes automata. The operating system ends it when that takes too much time, and limits
its memory; the next request starts another.

This file is also that process's program: it imports nothing of the package.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import IO, Any

SECONDS = 5.0
"""Processor time of one request, which a busy machine does not increase."""
CHARACTERS = 2**24
"""The most characters of an answer, such as a rendered prompt."""
MEMORY = 2**30
"""Bytes of the process's address space, of which Python and jinja2 take about a tenth."""
LENGTH = 2**17
"""The longest text that a pattern may have (see `length_of`), and the most states of its automaton."""


class Refused(ValueError):
    """Raised if what runs in the process is wrong, raises, or exceeds its limits; the message says which."""


class Exceeded(Refused):
    """Raised if what runs in the process takes more time or memory than its limits, or is too large."""


class Sandbox:
    """The process. The first request starts it; where a request has ended it, the next one starts another.

    Any thread may send requests, which are answered one after another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def compile(self, source: str) -> None:
        """Raise Refused if `source` is no template."""
        self._ask({"source": source})

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The rendered text of a template; `variables` are of JSON's types. Raises Refused."""
        return str(self._ask({"source": source, "variables": variables})["text"])

    def pattern_of(self, schema: str) -> str:
        """The regular expression of a JSON schema. Raises Refused."""
        return str(self._ask({"schema": schema})["pattern"])

    def automaton_of(self, pattern: str) -> dict[str, Any]:
        """The automaton over bytes of a regular expression: "first", its first state; "final", the accepting
        states; "next", for each state the pairs (byte, next state). Raises Refused."""
        return self._ask({"pattern": pattern})

    def close(self) -> None:
        """End the process at once. Current and later requests raise Refused."""
        self._closed = True
        process = self._process  # without the lock, which a waiting request holds
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _forget(self) -> None:
        """Forget the process, in a fork: it belongs to the parent."""
        self._lock, self._process = threading.Lock(), None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        bounds = {"seconds": SECONDS, "characters": CHARACTERS}
        try:
            line = json.dumps({**request, **bounds}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise Refused(f"it is given what is not JSON: {error}") from error
        with self._lock:
            if self._closed:
                raise Refused("its process was closed")
            try:
                answer = self._exchange(line)
            except OSError as error:
                raise Refused(f"its process does not start: {error}") from error
            except BaseException:
                self._end(signal.SIGKILL)  # so that a late answer is not taken for the next request's
                raise
            if not answer.endswith(b"\n"):  # the process ended before the answer did
                code = self._end()
                if self._closed:
                    raise Refused("its process was closed")
                if code == -signal.SIGPROF:
                    raise Exceeded(f"it took more than {SECONDS:g} s")
                if code == -signal.SIGABRT:  # so ends Rust where memory is refused
                    raise Exceeded(_too_much_memory())
                raise Refused(f"its process ended (status {code})")
        reply: dict[str, Any] = json.loads(answer)
        if "error" in reply:
            raise (Exceeded if reply.get("exceeded") else Refused)(reply["error"])
        return reply

    def _exchange(self, line: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._end()
            path = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            )
        if self._closed:  # `close` was called meanwhile, and saw no process
            self._process.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(line)
            self._process.stdin.flush()
        return self._process.stdout.readline()

    def _end(self, number: int | None = None) -> int | None:
        """Wait for the process to end, which it does at the end of its input; return its status."""
        process, self._process = self._process, None
        if process is None:
            return None
        if number is not None:
            process.send_signal(number)
        with contextlib.suppress(BrokenPipeError):
            process.communicate()
        return process.returncode


shared = Sandbox()
"""This process's sandbox, for callers that need none of their own."""


def _too_much_memory() -> str:
    return f"it took more than {MEMORY / 2**20:.0f} MiB of memory"


# --- the other process --------------------------------------------------------------------------


def environment() -> Any:
    """jinja2 as transformers sets it up for chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if [int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]] < [3, 1, 6]:
        raise ImportError(f"jinja2 {jinja2.__version__} has a sandbox with holes; 3.1.6 and later do not")

    class Generation(Extension):
        """{% generation %} marks the assistant's text for training; its content is rendered unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return sandbox


PART = re.compile(
    r"""(?P<open>\((?:\?(?:P?<[^>]*>|[imsUuR-]*:))?(?!\?))
    | (?P<close>\)) | (?P<or>\|) | (?P<flags>\(\?[imsUuR-]+\))
    | (?P<repeat>(?:[*+?]|\{(?P<least>[0-9]{0,9})(?:,(?P<most>[0-9]{0,9}))?\})\??)
    | (?P<one>\\[pP]\{[^}]*\} | \\[xuU]\{[^}]*\} | \\[pP]. | \\x.. | \\u.{4} | \\U.{8} | \\.
        | \[\^?\]?(?:[^\[\]\\]|\\.|\[:\^?[a-z]+:\])*\] | [^\[({\\])""",
    re.DOTALL | re.VERBOSE,
)


def length_of(pattern: str) -> int:
    """The length of the longest text that matches, in characters, where a part that may repeat without bound
    repeats as seldom as it may; beyond 2^31 some number beyond it. 0 for a pattern with parts that are not
    followed here (the flag x, classes in classes), and for a text that is no pattern.

    An automaton of texts that all have an end has as many states at least.
    """
    # Of each open group: its longest alternative, the last alternative without its last part, and that part.
    groups, at = [[0, 0, 0]], 0
    while part := PART.match(pattern, at):
        at, group = part.end(), groups[-1]
        if part["repeat"]:
            group[2] = min(group[2] * int(part["most"] or part["least"] or 1), 2**31)
            continue
        if part["open"]:
            groups.append([0, 0, 0])
            continue
        if part["or"]:
            groups[-1] = [max(group[0], group[1] + group[2]), 0, 0]
            continue
        length = 1 if part["one"] else 0
        if part["close"]:
            longest, before, last = groups.pop()
            if not groups:
                return 0
            length, group = max(longest, before + last), groups[-1]
        group[1:] = group[1] + group[2], length
    longest, before, last = groups[0]
    return max(longest, before + last) if at == len(pattern) and len(groups) == 1 else 0


class TooLarge(ValueError):
    """Raised in the process for a result that is too large for an answer."""


def automaton_of(pattern: str) -> dict[str, Any]:
    """See `Sandbox.automaton_of`."""
    from outlines_core import Index, Vocabulary

    if length_of(pattern) > LENGTH:
        raise TooLarge(f"its repetitions allow texts of more than {LENGTH:,} characters")
    # NUL stands for the end of a text, so that no text holds it. Without such an end the library would leave
    # out ways on from a text that matches already ("a|abc").
    end, begun, library_end = 0, 256, 257
    tokens = {bytes([byte]): [byte] for byte in range(256)}
    # The library searches for the pattern at every place of a text, though it keeps the first alone. Each
    # place of ".{30}" or of JSON in JSON begins another text, which takes minutes. So three NUL stand in
    # front, and the first of them may be all that is found: behind a match the search ends, and a longer text
    # is preferred. The three are a token, since the library would take the second for a text's end.
    # Where there may be an anchor, which is refused, the pattern itself has to stand at the beginning.
    anchored = re.search(r"(?<!\[)\^|\\\[\^|\$|\\[AzbB<>]", pattern)
    before, behind = ("", "") if anchored else (r"\x00(?:\x00\x00", "|)")
    vocabulary = Vocabulary(library_end, tokens if anchored else {**tokens, b"\0\0\0": [begun]})
    # "a)|(b" is a pattern in a group, and none by itself. So each is first read without a group, beside a \b,
    # which the library refuses in a pattern that it could read, before it makes an automaton. The group ends
    # in a line of its own that matches nothing more: with the flag x a pattern may end in a comment.
    for text in (rf"\b|{pattern}", f"{before}(?:{pattern}(?x)\n)\\x00{behind}"):
        try:
            index = Index(text, vocabulary)
        except ValueError as error:
            if "building NFA" in str(error):
                raise ValueError(
                    "expected a regular expression in the syntax of Rust's regex, without look-around and "
                    f"references to groups, got {pattern!r:.80}{_of_python(pattern)}"
                ) from error
            if text.startswith(r"\b|"):
                continue
            if re.search("start state|no transitions|word boundaries", str(error)):
                raise ValueError(f"expected a pattern without anchors, got {pattern!r:.80}") from error
            raise
    over = index.get_final_states()
    found, first = index.get_transitions(), index.get_initial_state()
    if not anchored:
        first = found[first][begun]
    onward: dict[int, list[tuple[int, int]]] = {first: []}
    waiting = [first]
    while waiting:  # only what texts without NUL reach
        state = waiting.pop()
        onward[state] = [(byte, to) for byte, to in found.get(state, {}).items() if end < byte < begun]
        for _, to in onward[state]:
            if to not in onward:
                onward[to] = []
                waiting.append(to)
        if len(onward) > LENGTH:
            raise TooLarge(f"its automaton has more than {LENGTH:,} states")
    return {
        "first": first,
        "final": [state for state in onward if found.get(state, {}).get(end) in over],
        "next": [*onward.items()],
    }


def _of_python(pattern: str) -> str:
    """Python's reason to refuse a pattern, for an error, since the library gives none; "" if it does not."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f" (Python's re says: {error})"
    return ""


def pattern_of(schema: str) -> dict[str, Any]:
    """See `Sandbox.pattern_of`."""
    from outlines_core import json_schema

    return {"pattern": json_schema.build_regex_from_schema(schema)}


def work(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer each line, {seconds, characters, ...} and a template's {source, variables or nothing}, {schema}
    or {pattern}, by {text}, {pattern}, an automaton, or {error}."""
    import resource

    # The parent handles it, and this process ends with the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    sandbox: Any = functools.cache(environment)
    with contextlib.suppress(ImportError):  # requests get this error below
        sandbox()  # with its imports, before memory is limited
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, most))
    compiled = functools.lru_cache(maxsize=16)(lambda source: sandbox().from_string(source))

    def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
        if "pattern" in asked:
            return automaton_of(asked["pattern"])
        if "schema" in asked:
            return pattern_of(asked["schema"])
        template = compiled(asked["source"])
        return {"text": template.render(asked["variables"]) if "variables" in asked else ""}

    for line in requests:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        try:
            made = answer_to(asked)
            answer = json.dumps(made)
            if (size := len(made.get("text", answer))) > asked["characters"]:
                raise TooLarge(f"it made {size:,} characters, more than {asked['characters']:,}")
        except ImportError as error:
            needed, extra = (
                ("jinja2 3.1.6 or later", "cli") if "source" in asked else ("outlines_core", "structured")
            )
            command = f'pip install "dparallel-ext[{extra}]"'
            answer = json.dumps({"error": f"{needed} must be installed; {command} does it ({error})"})
        except TooLarge as error:
            answer = json.dumps({"error": str(error), "exceeded": True})
        except MemoryError:
            answer = json.dumps({"error": _too_much_memory(), "exceeded": True})
        except Exception as error:  # whatever the template does
            answer = json.dumps({"error": str(error)[:1000] or type(error).__name__})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer.encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    work(sys.stdin.buffer, sys.stdout.buffer)
