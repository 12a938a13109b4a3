"""Forms of texts (regular expressions, JSON schemas, choices) as automata over a tokenizer's tokens.

The library outlines_core makes an automaton over bytes of a regular expression. Here the bytes become tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dparallel_ext.arguments import whole
from dparallel_ext.automaton import NOWHERE, Automaton
from dparallel_ext.models.files import MOST_IDS

from .json_schema import json_pattern
from .sandbox import Exceeded, Refused, Sandbox, shared
from .text import INCOMPLETE, TokenTexts, check_tokenizer

__all__ = ["Vocabulary", "automaton", "choice_pattern", "json_pattern"]

MOST = 2**22
"""The most transitions of an automaton over tokens, before those that lead nowhere are removed."""


class Vocabulary(NamedTuple):
    """The bytes that a tokenizer's tokens add to a text."""

    tokens: list[bytes | None]
    """The bytes of each id; None for special tokens and ids without a token. Tokens of byte-level BPE and of
    byte fallback may be parts of characters."""
    first: list[bytes | None]
    """The same at the beginning of a text, where decoders drop spaces, for example."""

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """tokenizer: a `tokenizers.Tokenizer`. Raises ValueError for anything else, and for a decoder by
        which a token's text depends on the tokens beside it."""
        check_tokenizer(tokenizer)
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
    """The regular expression of one of some texts. Raises ValueError for none, or a text in their place."""
    if isinstance(choices, str) or not choices:
        raise ValueError(f"choices: expected a list of texts, got {choices!r:.80}")
    return "|".join(map(re.escape, choices))


def automaton(
    pattern: str, vocabulary: Vocabulary, ends: Sequence[int] = (), sandbox: Sandbox = shared
) -> Automaton:
    """The token sequences whose whole text matches the pattern, alone or before tokens of `ends`.

    pattern: a regular expression in the syntax of Rust's regex, without anchors, look-around and references
        to groups; no text holds a NUL.
    ends: ids, which the vocabulary need not have: a config.json may name an end that the tokenizer lacks.
    sandbox: where the automaton over bytes is made, with limits of time and size.

    Raises ValueError for a pattern that is none, that is too large, or that no text of these tokens matches,
    and for an end that is no id.
    """
    ends = [whole("ends", end, 0, MOST_IDS - 1) for end in ends]
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
    leading = {byte for steps in onward.values() for byte, _ in steps}
    columns = {byte: [dead] * (dead + 1) for byte in sorted(leading)}
    for state, steps in onward.items():
        for byte, to in steps:
            columns[byte][numbers[state]] = numbers.get(to, dead)
    accepting = [state in final for state in numbers]
    return _over_tokens(columns, [*accepting, False], vocabulary, ends)


def _over_tokens(
    columns: dict[int, list[int]], accepting: list[bool], vocabulary: Vocabulary, ends: Sequence[int]
) -> Automaton:
    """The automaton over tokens of an automaton over bytes. columns: [byte][state], of bytes that lead
    somewhere; the last state is dead.

    A text is a function from states to states. A vocabulary's texts have few different ones, so each is
    computed once, and the tokens with the same one, that begin a text alike, are a class.
    """
    states = len(accepting)
    dead, over = states - 1, states
    functions = [tuple(range(states))]
    numbers = {functions[0]: 0}
    onward: dict[tuple[int, int], int] = {}

    def number(function: tuple[int, ...]) -> int:
        if function not in numbers:
            if (len(functions) + 1) * states > MOST:
                raise ValueError(f"pattern: expected one of at most {MOST:,} transitions, got more")
            numbers[function] = len(functions)
            functions.append(function)
        return numbers[function]

    nothing = number((dead,) * states)

    def of_text(text: bytes) -> int:
        at = 0
        for byte in text:
            if at == nothing:
                break
            if byte not in columns:
                return nothing
            if (at, byte) not in onward:
                onward[at, byte] = number(tuple(map(columns[byte].__getitem__, functions[at])))
            at = onward[at, byte]
        return at

    classes: dict[tuple[int, int], int] = {}

    def class_of(text: bytes | None, first: bytes | None) -> int:
        within = of_text(text) if text else nothing  # an empty token would come again and again
        begins = nothing if first is None else of_text(first)
        return classes.setdefault((within, functions[begins][0]), len(classes))

    lacking = [None] * (max(ends, default=-1) + 1 - len(vocabulary.tokens))
    texts = [*vocabulary.tokens, *lacking], [*vocabulary.first, *lacking]
    token_class = torch.tensor([*map(class_of, *texts)], device="cpu")
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
        begins = bytes(byte for byte, column in columns.items() if column[0] < dead)
        missing = begins and not any(text and text[0] in begins for text in vocabulary.first)
        why = f"; it begins with {begins.decode('latin-1')[:9]!r}, and no token does" if missing else ""
        raise ValueError(
            f"pattern: expected one that some text of the model's tokens matches{why}"
        ) from error
