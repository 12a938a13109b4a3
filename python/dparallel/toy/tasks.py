"""A synthetic reasoning task whose answers can be checked exactly: word problems with a worked response.

    sam has 4 cups now . first sam grows 3 times . finally sam sells 8 cups . how many cups does sam have ?
    to begin sam has 4 * 3 = 12 cups . at last we get 4 = 12 - 8 cups . #### 4

A problem is a start and 2 to 4 dependent operations; every number is in 0..99 and a token of its own. Clauses
of the prompt have 6 tokens. Each step of the response has one of several wordings, some more frequent than
others, and 10 to 15 tokens, so the wording of a step moves all tokens after it. A model that decodes many
tokens at once has to keep these choices consistent; a model that is trained on its own answers, which take
the most probable wording, can know the choices in advance.

Problems are split by their arithmetic: a held-out combination of start and operations never occurs in
training, whatever the names and wording. Parts of such a chain may occur.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NUMBERS = range(100)
GEN_LENGTH = 64
MASK, EOS, PAD, UNKNOWN = "[MASK]", "[EOS]", "[PAD]", "[UNK]"

# fmt: off
NAMES = [
    "sam", "ana", "ben", "eva", "tom", "mia", "leo", "zoe", "max", "ivy", "dan", "amy", "kai", "lia",
    "joe", "sue", "ned", "fay", "gus", "uma", "roy", "pam", "hal", "dot",
]
ITEMS = [
    "cups", "pens", "books", "coins", "balls", "hats", "keys", "cards", "shells", "stamps", "stones",
    "plates", "apples", "plums", "cakes", "eggs", "nuts", "boxes", "bags", "rings", "beads", "kites",
    "toys", "lamps",
]
# fmt: on
VERBS = {
    "+": ["buys", "finds", "gets", "wins", "collects"],
    "-": ["sells", "loses", "gives", "drops", "trades"],
    "*": ["grows"],
}
ORDINALS = ("first", "next", "then", "finally")  # of the prompt's clauses
# Openers of a step (the first, those between, the last) and forms of a step, drawn by WEIGHTS;
# o: opener, n: name, i: item.
OPENERS = (
    ("first", "to begin", "at the start", "initially"),
    ("then", "after that", "a bit later", "next"),
    ("finally", "at last", "in the end", "lastly"),
)
STEPS = (
    "{o} {n} has {a} {op} {b} = {c} {i} .",
    "{o} we get {c} = {a} {op} {b} {i} .",
    "{o} , all in all , {a} {op} {b} = {c} {i} .",
    "{o} that makes {a} {op} {b} = {c} {i} now .",
    "{o} {n} now holds {c} = {a} {op} {b} {i} .",
)
WEIGHTS = {4: (45, 25, 20, 10), 5: (45, 25, 15, 10, 5)}  # by how many ways there are


@dataclass(frozen=True)
class Problem:
    """prompt and response as space-separated tokens; answer is the number after ####."""

    prompt: str
    response: str
    answer: int


def vocabulary() -> list[str]:
    """Every token, special ones first; the mask token last, as in LLaDA's checkpoints."""
    words = {w for step in STEPS for w in step.split() if "{" not in w}
    words |= {w for openers in OPENERS for opener in openers for w in opener.split()} | set(ORDINALS)
    words |= {v for verbs in VERBS.values() for v in verbs} | set(VERBS) | set(NAMES) | set(ITEMS)
    words |= {"has", "now", ".", "times", "how", "many", "does", "have", "?", "####"}
    return [PAD, EOS, UNKNOWN, *map(str, NUMBERS), *sorted(words), MASK]


def problems(split: str, seed: int = 0) -> Iterator[Problem]:
    """An endless, deterministic stream of problems of `split`: "train" or "held_out"."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split: expected 'train' or 'held_out', got {split!r}")
    rng = random.Random(f"{split}:{seed}")
    while True:
        start, operations = _chain(rng)
        if _held_out(start, operations) == (split == "held_out"):
            yield _word(rng, start, operations)


def extract_answer(text: str) -> int | None:
    """The number after the first ####, or None."""
    words = text.split()
    if "####" not in words:
        return None
    after = words[words.index("####") + 1 :]
    return int(after[0]) if after and after[0].isdecimal() else None


def is_correct(problem: Problem, response: str) -> bool:
    """Whether `response` (decoded text, special tokens removed or not) gives the right answer."""
    return extract_answer(response) == problem.answer


Chain = list[tuple[str, int]]


def _chain(rng: random.Random) -> tuple[int, Chain]:
    value = start = rng.randint(1, 30)
    operations: Chain = []
    for _ in range(rng.randint(2, 4)):
        choices = ["+"] * (value <= 87) + ["-"] * (value >= 1) + ["*"] * (1 <= value <= 24)
        op = rng.choice(choices)
        if op == "+":
            number = rng.randint(1, 12)
            value += number
        elif op == "-":
            number = rng.randint(1, min(12, value))
            value -= number
        else:
            number = rng.randint(2, 4)
            value *= number
        operations.append((op, number))
    return start, operations


def _held_out(start: int, operations: Chain) -> bool:
    """One chain in ten, by hash."""
    digest = hashlib.sha256(f"{start}{operations}".encode()).digest()
    return digest[0] * 256 + digest[1] < 6554


def _word(rng: random.Random, start: int, operations: Chain) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    prompt, response = [f"{name} has {start} {item} now ."], []
    value, last = start, len(operations) - 1
    for i, (op, number) in enumerate(operations):
        ordinal = ORDINALS[-1] if i == last else ORDINALS[min(i, 2)]
        unit = "times" if op == "*" else item
        prompt.append(f"{ordinal} {name} {rng.choice(VERBS[op])} {number} {unit} .")
        result = {"+": value + number, "-": value - number, "*": value * number}[op]
        opener = _one_of(rng, OPENERS[-1 if i == last else min(i, 1)])
        step = _one_of(rng, STEPS)
        response.append(step.format(o=opener, n=name, a=value, op=op, b=number, c=result, i=item))
        value = result
    prompt.append(f"how many {item} does {name} have ?")
    response.append(f"#### {value}")
    return Problem(" ".join(prompt), " ".join(response), value)


def _one_of(rng: random.Random, ways: Sequence[str]) -> str:
    return rng.choices(ways, WEIGHTS[len(ways)])[0]
