"""JSON objects of any content, to a depth: the texts of the form, and responses that have it."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel.any_json import DEPTH, any_object, any_value
from dparallel.structured import Vocabulary, automaton, json_pattern
from drafters import model_of
from json_texts import END, an_object, depth_of, read, tokenizer

import dparallel_ext as dx
from dparallel_ext.automaton import NOWHERE, Automaton

PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]
OBJECT = json_pattern({"type": "object"})
STYLES: list[dict[str, Any]] = [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}]


@functools.cache
def of_bytes() -> Automaton:
    """The form over a vocabulary of the 256 bytes."""
    each = [bytes([byte]) for byte in range(256)]
    return automaton(OBJECT, Vocabulary(each, each))


def has_the_form(text: bytes) -> bool:
    state = of_bytes().after(0, text)
    return state != NOWHERE and bool(of_bytes().accepting[state])


@functools.cache
def form() -> Automaton:
    return automaton(OBJECT, Vocabulary.of(tokenizer()), [END])


def text_of(tokens: list[int]) -> bytes:
    texts = Vocabulary.of(tokenizer()).tokens
    return b"".join(texts[token] or b"" for token in tokens)


def at_random(found: Automaton, rng: random.Random, length: int) -> list[int]:
    """Tokens of a response of at most `length`, each of a class at random behind which it can end in time."""
    state, tokens = 0, []
    for left in reversed(range(length)):
        target = found.transitions[state]
        fits = (target >= 0) & (found.distance[target.clamp(min=0)] <= left)
        token_class = rng.choice(fits.nonzero()[:, 0].tolist())
        tokens.append(rng.choice((found.token_class == token_class).nonzero()[:, 0].tolist()))
        state = int(target[token_class])
    return tokens[: tokens.index(END)] if END in tokens else tokens


def check(text: bytes) -> dict[str, Any]:
    said = read(text)
    assert isinstance(said, dict), text
    assert depth_of(said) <= DEPTH, text
    return said


def test_what_json_writers_write() -> None:
    """Of every depth, in each style; a text that another character makes no JSON has not the form."""
    rng, depths, changed = random.Random(1), set(), 0
    for _ in range(400):
        value = an_object(rng, DEPTH + 2)
        depths.add(depth := depth_of(value))
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, **rng.choice(STYLES))
        assert has_the_form(text.encode()) == (depth <= 5), text  # as the docs say
        for _ in range(8):
            at, new = rng.randrange(len(text) + 1), rng.choice('{}[],:" \n\t\\01-.eEutn\x01\ud83dé')
            other = (text[:at] + new + text[at + rng.randint(0, 1) :]).encode(errors="surrogatepass")
            if has_the_form(other):
                changed += 1
                check(other)
    assert depths >= {1, 5, 6}
    assert changed > 100


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1]", '"a"', "1", " {}", "{} ", "{}{}", "{", '{"a"}', '{"a":}', '{"a":1,}', "{,}", "{a:1}"),
        *("{'a':1}", '{"a":01}', '{"a":.5}', '{"a":1.}', '{"a":+1}', '{"a":-}', '{"a":1e}', '{"a":NaN}'),
        *('{"a":tru}', '{"a":True}', '{"a":[1,]}', '{"a":[1}]', '{"a":"\n"}', '{"a":"\\x"}', '{"a":"\\u12"}'),
        *('{"a":"\\ud83d"}', '{"a":"\\ude00"}', '{"a":"\\ud83d\\u0041"}', '{"a":1 "b":2}', '{"a":1} //'),
        *('{\n\n"a":1}', '{\n     "a":1}', '{"a":\n1}', '{"a":\x01}', "{\x01:1}"),
    ],
)
def test_what_is_not_of_the_form(text: str) -> None:
    assert not has_the_form(text.encode())


def test_bytes_of_a_string_are_characters() -> None:
    for character in (
        b"\xc3\xa9",
        b"\xe4\xb8\xad",
        b"\xf0\x9f\x99\x82",
        b"\x7f",
        b"\\ud83d\\uDE00",
        b"\\u00e9",
    ):
        assert has_the_form(b'{"' + character + b'":"' + character + b'"}')
    for wrong in (b"\xc3", b"\xa9", b"\xed\xa0\x80", b"\xff", b"\xc0\x80"):
        assert not has_the_form(b'{"' + wrong + b'":1}')


@pytest.mark.parametrize(("pattern_of", "depths"), [(any_object, (1, 2, 4)), (any_value, (1, 3))])
def test_of_other_depths(pattern_of: Callable[..., str], depths: Sequence[int]) -> None:
    for depth in depths:
        pattern = re.compile(pattern_of(depth=depth))
        for levels in range(1, 7):
            arrays = "[" * (levels - 1) + "1" + "]" * (levels - 1)
            for text in ('{"a":' * levels + "1" + "}" * levels, f'{{"a":{arrays}}}'):
                assert bool(pattern.fullmatch(text)) == (levels <= depth), text
    assert all(re.fullmatch(any_value(), text) for text in ("[1, {}]", '"a"', "-1.5e+7", "null"))
    assert re.fullmatch(any_value("array"), "[1, [2]]")
    assert not re.fullmatch(any_value("array"), "{}")


FREE: list[tuple[Any, list[str], list[str]]] = [
    ("true", ["1", '"\\n"', '[{"a": [null]}]'], ["[[[[1]]]]", '[{"a": [[]]}]', "", "nul"]),
    ({}, ['{"a": {"b": [1]}}'], ['{"a": {"b": [{}]}}', "1,"]),
    ({"title": "t", "description": "d", "default": 3, "x-own": 1}, ["[]", "true"], ["[1"]),
    ({"type": "array"}, ["[1, {}, [[]]]"], ["{}", "1", "[[[[]]]]"]),
    ({"type": "object", "additionalProperties": {}, "required": []}, ['{\n  "a": 1\n}'], ["[]"]),
    (
        {"properties": {"a": True}, "required": ["a"]},
        ['{"a": null}', '{"a": [{"b": []}]}'],
        ["{null}", "null"],
    ),
    ({"properties": {"a": {}, "b": {}}}, ["{}", '{"a": 1}', '{"b": [2]}', '{"a": 1, "b": {}}'], ["{1}", "{"]),
    (
        {"properties": {"name": {"const": "f"}, "arguments": {"type": "object"}}, "required": ["arguments"]},
        ['{"name": "f", "arguments": {"x": [{"y": 1.5}]}}', '{"arguments": {}}'],
        ['{"arguments": []}', '{"arguments": {"x": [{"y": []}]}}', "{}"],
    ),
    ({"type": "array", "items": {"type": "object"}}, ['[{"a": 1}, {}]', "[]"], ["[1]", "[[]]"]),
    (
        {"type": "array", "items": True, "minItems": 2, "maxItems": 2},
        ['[{"a": [[]]}, 2]'],
        ["[1]", "[1, 2, 3]"],
    ),
    ({"prefixItems": [{}, {"type": "null"}]}, ["[[1], null]"], ["[[1]]", "[1]", "1", "[null, 1]"]),
    ({"type": "array", "minItems": 1}, ['[{"a": [[1]]}]', "[1, 2]"], ["[]", "[[[[[1]]]]]"]),
    ({"type": ["object", "null"]}, ["null", '{"a": "\\u00e9"}'], ["[]", "1"]),
    (
        {"type": ["array", "integer"], "items": {"type": "null"}, "maxItems": 2},
        ["[null, null]", "7", "[]"],
        ["7.5", "[1]", "[null, null, null]", "null"],
    ),
    (
        {"anyOf": [{"type": "object"}, {"properties": {"a": {"type": "null"}}}]},
        ['{"a": null}', '{"b": 1}'],
        ["1"],
    ),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}, ['{"a": 1}'], ["1", "[]"]),
    (
        {"additionalProperties": {"type": "array"}, "type": "object"},
        ['{"a": [1], "b": []}', "{}"],
        ['{"a": 1}'],
    ),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), FREE)
def test_values_of_any_content_within_a_schema(schema: Any, right: list[str], wrong: list[str]) -> None:
    each = [bytes([byte]) for byte in range(256)]
    found = automaton(json_pattern(schema), Vocabulary(each, each))
    for text in [*right, *wrong]:
        state = found.after(0, text.encode())
        assert (state != NOWHERE and bool(found.accepting[state])) == (text in right), text


def test_a_schema_of_values_of_any_content_is_written() -> None:
    """By tokens at random: JSON, whatever the values are, and their names as the schema says."""
    values = {"a": {}, "b": {"type": "array"}, "c": {"type": ["object", "null"]}, "d": {"type": "object"}}
    schema = {"type": "object", "properties": values, "required": ["a", "b", "c"]}
    found = automaton(json_pattern(schema), Vocabulary.of(tokenizer()), [END])
    rng, types = random.Random(3), set()
    for _ in range(100):
        said = read(text_of(at_random(found, rng, rng.choice([25, 40, 90]))))
        assert {*"abc"} <= said.keys() <= {*"abcd"}
        assert isinstance(said["b"], list)
        assert isinstance(said["c"], (dict, type(None)))
        assert isinstance(said.get("d", {}), dict)
        types.add(type(said["a"]))
        assert depth_of(said) <= 4
    assert len(types) > 4


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "minProperties": 2}, "minProperties: is not supported beside type"),
        ({"type": ["object", "null"], "maxProperties": 2}, "maxProperties: .* at #"),
        ({"type": "array", "contains": {}}, "contains: is not supported"),
        (
            functools.reduce(lambda inner, _: {"type": ["array"] * 9, "items": inner}, range(60), {}),
            "Expected a valid",
        ),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems: .* at #/properties/a"),
        ({"minimum": 3}, "Unsupported JSON Schema structure"),
        ({"type": ["object", 3]}, "Unsupported type: 3"),
        (
            {"properties": {f"p{at}": {} for at in range(60)}},
            "its pattern has more than 16,777,216 characters",
        ),
        ("[" * 100_000, "expected JSON"),
        ("nothing", "expected JSON, got 'nothing'"),
    ],
)
def test_what_of_such_a_schema_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"schema: {said}"):
        json_pattern(schema)


def test_a_gpu_holds_its_states() -> None:
    """`best_path` keeps the sums of 4096 states in shared memory; in other vocabularies there are as many."""
    assert len(form().accepting) <= 4096


def test_whatever_tokens_are_chosen() -> None:
    """At random, as long as the response can end in time."""
    rng, depths, lines = random.Random(2), set(), 0
    for _ in range(300):
        text = text_of(at_random(form(), rng, rng.choice([1, 2, 3, 8, 30, 90])))
        depths.add(depth_of(check(text)))
        lines += b"\n" in text
    assert depths >= {1, 2, 3}
    assert lines > 10


@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a", "sdar_tiny_a"])
def test_a_diffusion_model_writes_an_object(name: str) -> None:
    model, passes = golden.model(name), 0
    cache = "block" if name == "sdar_tiny_a" else None
    for length in (2, 3, 9, 40):
        for selector, threshold in (("confidence", 0.02), ("entropy", 4.0), ("quota", 4)):
            out = dx.decode(
                model,
                PROMPTS,
                gen_length=length,
                block_length=8,
                selector=selector,
                threshold=threshold,
                automaton=form(),
                eos_id=END,
                **({"cache": cache} if cache else {}),
            )
            for response, kept in zip(out.responses, out.kept.tolist(), strict=True):
                check(text_of(response[: min(kept, length)].tolist()))  # blocks go beyond the length
            passes += int(out.nfe.sum())
    assert passes < 0.6 * 3 * 3 * (2 + 3 + 9 + 40)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_autoregressive_model_writes_an_object(temperature: float) -> None:
    model, fewer = model_of(vocab_size=512, eos_token_id=END), 0
    for seed in range(4):
        for length in (2, 3, 12, 50):
            settings: dict[str, Any] = {
                "gen_length": length,
                "temperature": temperature,
                "seed": seed,
                "automaton": form(),
            }
            plain = dx.speculate(model, PROMPTS, **settings)
            for response, kept in zip(plain.responses, plain.kept.tolist(), strict=True):
                check(text_of(response[:kept].tolist()))
            for drafter in ("jump_forward", "ngram"):
                found = dx.speculate(model, PROMPTS, drafter=drafter, draft_size=4, **settings)
                assert torch.equal(found.sequences, plain.sequences)
                fewer += int((plain.nfe - found.nfe).sum())
    assert fewer > 0


def test_a_stop_cuts_an_object() -> None:
    """What ends a response ends it wherever it lies, its form complete or not."""
    model, brace = model_of(vocab_size=512, eos_token_id=END), tokenizer().token_to_id("{")
    out = dx.speculate(model, PROMPTS[0], gen_length=20, automaton=form(), stop=[[brace]])
    whole = dx.speculate(model, PROMPTS[0], gen_length=20, automaton=form())
    first = whole.responses[0].tolist()
    expected = first[: first.index(brace)] if brace in first else first[: int(whole.kept[0])]
    assert out.responses[0][: int(out.kept[0])].tolist() == expected


def test_tokens_that_write_no_object_are_refused() -> None:
    words: list[bytes | None] = [b"{", b'"a"', b"1", None]
    with pytest.raises(
        ValueError, match="pattern: expected one that some text of the model's tokens matches"
    ):
        automaton(OBJECT, Vocabulary(words, words), [3])
