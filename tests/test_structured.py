"""Automata of patterns, JSON schemas and choices over a tokenizer's tokens."""

from __future__ import annotations

import functools
import json
import math
import random
import re
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel import registry, sandbox, structured
from dparallel.structured import Vocabulary, automaton, choice_pattern, json_pattern
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import dparallel_ext as dx
from dparallel_ext.automaton import NOWHERE
from dparallel_ext.decoding.sequence_settings import SamplingGroup
from dparallel_ext.speculation import JumpForward, Lane

TEXT = '{"name": "Zoë", "age": 37, "tags": ["a", "b"]} the café costs 4.50 € \t and 12,000 more words'
SPECIAL = "<end>"


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Byte-level BPE, as LLaDA's and Qwen's, or BPE with byte fallback, as Llama 2's."""
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": [SPECIAL]}
    else:
        made = Tokenizer(models.BPE(byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        made.decoder = decoders.Sequence(parts)
        special = {"special_tokens": [SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]}
    made.train_from_iterator(
        [TEXT.replace("ë", "e").replace("€", "")] * 3, trainers.BpeTrainer(vocab_size=420, **special)
    )
    if kind != "bytes":  # the trainer makes bytes special, which they are not in Llama 2
        content = json.loads(made.to_str())
        content["added_tokens"] = content["added_tokens"][:1]
        made = Tokenizer.from_str(json.dumps(content))
    return made


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_the_tokens_of_a_text_have_its_bytes(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.tokens[tokenizer.token_to_id(SPECIAL)] is None
    for text in (TEXT, "a", "Zoë €", "  two  spaces", "中文 🙂", '{"a": [1, 2]}'):
        ids = tokenizer.encode(text).ids
        joined = b"".join(vocabulary.tokens[token] or b"" for token in ids).decode()
        assert joined == (" " * (kind == "fallback")) + text
        assert (
            b"".join([*vocabulary.first[ids[0] :][:1], *(vocabulary.tokens[token] for token in ids[1:])])
            == text.encode()
        )
        assert len({*ids}) > 1 or len(text) == 1


PATTERNS = [
    ("[a-c]+", "abc"),
    ("(ab|a)*c?", "abc"),
    (r"-?(0|[1-9][0-9]*)(\.[0-9]+)?", "-019."),
    ("a{2,4}b{0,3}", "ab"),
    ('"([^"]|é)*"', '"aé🙂'),
    (".*", "ab\né"),
    ("a|abc|(ab)*", "abc"),
]


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_texts_that_match(kind: str) -> None:
    tokenizer, rng, matched = tokenizer_of(kind), random.Random(0), 0
    vocabulary, end = Vocabulary.of(tokenizer), tokenizer.token_to_id(SPECIAL)
    for pattern, letters in PATTERNS:
        form = automaton(pattern, vocabulary, [end])
        for _ in range(60):
            text = "".join(rng.choices(letters, k=rng.randint(0, 6)))
            ids = tokenizer.encode(text).ids
            state = form.after(0, ids)
            matches = re.fullmatch(pattern, text) is not None
            assert (state != NOWHERE and form.distance[state] == 0) == matches, (pattern, text)
            ended = form.after(state, [end, end])
            assert (ended != NOWHERE) == matches
            assert form.after(ended, ids or [1]) == NOWHERE  # nothing follows the end
            matched += matches
    assert matched > 60


def decoding(kind: str) -> Tokenizer:
    """A few words; `kind`: a decoder."""
    words = ["a", "▁a", "▁", "▁▁a", "a▁a", "##a", ".", "▁.", "b", "<0x20>", "Ġa", "é", "<end>"]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="b"))
    made.add_special_tokens([AddedToken("<end>")])
    made.add_tokens([AddedToken("a b"), AddedToken("ä"), AddedToken("▁b")])
    if kind == "llama":
        made.decoder = tokenizer_of("fallback").decoder
    else:
        made.decoder = {
            **{
                f"metaspace {scheme}": decoders.Metaspace(prepend_scheme=scheme)
                for scheme in ("always", "never")
            },
            **{"wordpiece": decoders.WordPiece(), "bytes": decoders.ByteLevel(), "none": None},
        }[kind]
    return made


@pytest.mark.parametrize(
    "kind", ["metaspace always", "metaspace never", "wordpiece", "bytes", "llama", "none"]
)
def test_whatever_tokens_a_text_has(kind: str) -> None:
    """Of any tokens, not only those that the tokenizer makes, it is the decoder's text that matches."""
    tokenizer, rng, matched = decoding(kind), random.Random(0), 0
    vocabulary = Vocabulary.of(tokenizer)
    known = [token for token, text in enumerate(vocabulary.tokens) if text is not None]
    for pattern in ("[ab]+", " [ab]+|b", "( ?[ab.])*", "a *a", "(##)?[a ]*", "", " ?", "[^#]*"):
        form = automaton(pattern, vocabulary, [tokenizer.token_to_id("<end>")])
        for _ in range(150):
            ids = rng.choices(known, k=rng.randint(0, 3))
            text, state = tokenizer.decode(ids), form.after(0, ids)
            matches = re.fullmatch(pattern, text) is not None and "\N{REPLACEMENT CHARACTER}" not in text
            assert (state != NOWHERE and bool(form.accepting[state])) == matches, (pattern, ids, text)
            matched += matches
    assert matched > 60


def test_a_decoder_that_looks_ahead_is_refused() -> None:
    tokenizer = decoding("none")
    tokenizer.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match=r"tokenizer: expected a decoder by which .*, got BPEDecoder"):
        Vocabulary.of(tokenizer)


def test_a_word_vocabulary() -> None:
    _, tokenizer = registry.load("builtin:teacher")
    vocabulary = Vocabulary.of(tokenizer)
    form = automaton(r"sam has [0-9]+ (cups|hats) \.", vocabulary)
    for text, fits in (("sam has 12 cups .", True), ("sam has cups .", False), ("sam has 4 hats", False)):
        state = form.after(0, tokenizer.encode(text).ids)
        assert (state != NOWHERE and form.distance[state] == 0) == fits


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_random_model_writes_json(cache: str) -> None:
    """Whatever the model holds likely, in few passes; each token's bytes are some of the text's."""
    model, tokenizer = golden.model("llada_tiny_a"), tokenizer_of("bytes")
    vocabulary, end = Vocabulary.of(tokenizer), tokenizer.token_to_id(SPECIAL)
    form = automaton(json_pattern(SCHEMA), vocabulary, [end])
    prompts = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]
    out = dx.decode(
        model,
        prompts,
        gen_length=72,
        cache=cache,
        threshold=0.05,
        selector="confidence",
        automaton=form,
        eos_id=end,
    )
    for response, kept in zip(out.responses, out.kept, strict=True):
        said = json.loads(b"".join(vocabulary.tokens[token] or b"" for token in response[:kept].tolist()))
        assert set(said) == set(SCHEMA["required"])
        assert isinstance(said["age"], int)
        assert set(said["tags"]) <= {"a", "b"}
    assert bool((out.nfe < 72).all())


def test_choices() -> None:
    tokenizer = tokenizer_of("bytes")
    form = automaton(choice_pattern(["a.b", "née", "a"]), Vocabulary.of(tokenizer))
    found = [form.after(0, tokenizer.encode(text).ids) for text in ("a.b", "née", "a", "axb", "b")]
    assert [state != NOWHERE and form.distance[state] == 0 for state in found] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"pattern: expected a regular .*got '\(' \(Python's re says: missing \), unterminated"),
        ("a)|(b", r"pattern: expected a regular .*got 'a\)\|\(b' .*: unbalanced parenthesis at position 1\)"),
        (r"\p{L})|(b", "pattern: expected a regular expression"),
        ("(?x)(a # )\n)|b)|(c", "pattern: expected a regular expression"),
        ("a\\", r"pattern: expected a regular .*bad escape \(end of pattern\)"),
        ("(?", "pattern: expected a regular .*unexpected end of pattern"),
        ("[a", "pattern: expected a regular .*unterminated character set"),
        ("(?=a)b", r"without look-around and references to groups, got '\(\?=a\)b'$"),
        (r"(a)\1", "without look-around and references to groups"),
        ("^a$", r"pattern: expected a pattern without anchors, got '\^a\$'"),
        ("a$b", "pattern: expected a pattern without anchors"),
        *(
            (text, "pattern: expected a pattern without anchors")
            for text in ("(^|b)a", r"\[^a|b", r"b|\Aa", "(a*|b)$")
        ),
        (r"a\b", "pattern: expected a pattern without anchors"),
        ("🙂" * 40 + "[^\\x00-\\U0010ffff]", "pattern: "),
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        automaton(pattern, Vocabulary.of(tokenizer_of("bytes")))


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [("(?x) a b # or )", "ab"), ("a#", "a#"), ("a |b", "a "), ("a|(?x: b )", "b"), ("(?x)a\\ |b", "a ")],
)
def test_flags_and_comments_end_with_the_pattern(pattern: str, texts: str) -> None:
    tokenizer = tokenizer_of("bytes")
    form = automaton(pattern, Vocabulary.of(tokenizer))
    state = form.after(0, tokenizer.encode(texts).ids)
    assert state != NOWHERE
    assert form.distance[state] == 0
    assert form.after(state, tokenizer.encode("\n").ids) == NOWHERE


def test_a_pattern_that_no_token_matches_is_refused() -> None:
    _, tokenizer = registry.load("builtin:teacher")
    with pytest.raises(ValueError, match=r"expected one that some text of the model's tokens matches$"):
        automaton("[a-z]{3}!", Vocabulary.of(tokenizer))
    with pytest.raises(ValueError, match="matches; it begins with '!%', and no token does"):
        automaton("(?s:%|!).*", Vocabulary.of(tokenizer))


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": ["integer", "null"], "minimum": 3}, "minimum: is not supported beside type, at #"),
        ({"type": "number", "exclusiveMinimum": 3}, "exclusiveMinimum: expected a whole number, in minimum"),
        ({"type": "number", "minimum": 0.5}, "minimum: expected a whole number, .* got 0.5, at #"),
        ({"type": "integer", "minimum": True}, "minimum: expected a number below 1e100, got True, at #"),
        ({"type": "integer", "minimum": 1e200}, "minimum: expected a number below 1e100, got 1e"),
        (
            {"type": "integer", "minimum": 3, "exclusiveMaximum": 3},
            "minimum: expected at most 2, got 3",
        ),
        ({"type": "array", "items": {"type": "number", "multipleOf": 2}}, "multipleOf: .* at #/items"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems: "),
        ({"type": "object", "maxProperties": 2}, "maxProperties: "),
        ({"type": "object", "required": ["a"]}, "required: is not supported beside type"),
        (
            {"type": "object", "properties": {"minimum": {"type": "null"}}, "anyOf": []},
            "anyOf: .* properties",
        ),
        ({"properties": {"a": {"type": "integer", "maximum": "9"}}}, "maximum: .* at #/properties/a"),
        (
            {"properties": {"a": {"type": "null"}}, "required": ["b"]},
            r"required: .* of \['a'\], got \['b'\]",
        ),
        ({"properties": {"a": {"type": "null"}}, "required": 5}, "required: expected some of"),
        ({"properties": {"a": {"type": "null"}}, "required": [["a"]]}, "required: expected some of"),
        ({"type": "integer", "pattern": 1}, "pattern: expected a text, got 1, at #"),
        ({"type": "object", "format": ["date"]}, r"format: expected a text, got \['date'\], at #"),
        ({"type": "null", "items": {"allOf": True}}, "allOf: expected a list, got True, at #/items"),
        ({"const": 1, "$defs": {"a": {"properties": 1}}}, "properties: expected an object, got 1, at #/"),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, "pattern: is not supported beside maxLength"),
        ({"type": "string", "pattern": "a+", "format": "date"}, "format: is not supported beside pattern"),
        ({"allOf": [{"type": "integer"}, {"type": "null"}]}, "allOf: expected one schema, got 2"),
        ({"prefixItems": [{"type": "null"}], "minItems": 2}, "minItems: expected 1, .* got 2"),
        ({"enum": [1, 2], "const": 3}, "const: is not supported beside enum"),
        (
            {"type": "string", "pattern": "^.{2}$"},
            r"pattern: expected strings without quotes, .* got '\.\{2\}', at #",
        ),
        ({"type": "string", "pattern": "^a$|^b$"}, "pattern: expected a pattern without anchors"),
        ({"properties": {'a"': {"type": "null"}}}, "properties: expected names without escapes"),
        ({"enum": [1, [{"a": {"b\n": 1}}]]}, r"enum: expected names without escapes, got 'b\\n', at #"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", "multipleOf": 2}}},
            r"multipleOf: .* at #/\$defs/a",
        ),
    ],
)
def test_a_constraint_that_the_pattern_would_not_have_is_refused(schema: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"schema: {named}"):
        json_pattern(schema)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"pattern": "^ab|c$"}, ["ab", "c"], ["b", "a", "abc"]),
        ({"pattern": r"^[0-9]+\$"}, ["12$"], ["12"]),
        ({"format": "date"}, ["2024-02-29"], ["2024-13-01", "٢٠٢٤-02-29"]),
        ({"format": "time"}, ["07:11:14.5Z", "23:59:59+02:00"], ["07:11:14", r"07:11:14\.5Z", "24:00:00Z"]),
        ({"format": "date-time"}, ["2024-02-29T07:11:14Z"], ["2024-02-29", "2024-02-29T07:11:14"]),
        ({"format": "email"}, ["a.b+c@d-e.org"], ['"a"@b.org', "a@b", "a..b@c.org", "a@[1.2.3.4]"]),
        (
            {"format": "uri"},
            ["https://a.b:80/c?d=%20#e", "ftp://localhost"],
            ['http://a/"', "a.b", "http://"],
        ),
        ({"format": "uuid"}, ["01234567-89ab-cdef-0123-456789abcdef"], ["01234567"]),
    ],
)
def test_strings_of_a_schema(schema: dict[str, str], right: list[str], wrong: list[str]) -> None:
    pattern = json_pattern({"type": "string", **schema})
    assert all(re.fullmatch(pattern, json.dumps(text)) for text in right)
    assert not any(re.fullmatch(pattern, f'"{text}"') for text in wrong)


def test_bounds_of_numbers() -> None:
    rng = random.Random(2)
    near = [rng.randint(-1300, 1300) for _ in range(60)] + [0, 9, 10, 99, 100, 1000, -1, -9, -10, -100]
    for _ in range(60):
        low, high = sorted((rng.choice(near), rng.choice(near)))
        bounds = {"minimum": low, "maximum": high}
        bounds = {name: bounds[name] for name in rng.choice([["minimum"], ["maximum"], [*bounds]])}
        least, most = bounds.get("minimum", -math.inf), bounds.get("maximum", math.inf)
        whole = re.compile(json_pattern({"type": "integer", **bounds}))
        number = re.compile(json_pattern({"type": "number", **bounds}))
        around = [value + step for value in (low, high) for step in (-1, 0, 1)]
        for value in [*range(-1400, 1400, 7), *around, -(10**9), 10**9]:
            assert bool(whole.fullmatch(str(value))) == (least <= value <= most), (bounds, value)
            for part in ("", ".0", ".5"):
                text = f"{value}{part}"
                assert bool(number.fullmatch(text)) == (least <= float(text) <= most), (bounds, text)
        assert not whole.fullmatch("007")
    above = re.compile(json_pattern({"type": "integer", "exclusiveMinimum": 2.5, "exclusiveMaximum": 7}))
    assert [value for value in range(20) if above.fullmatch(str(value))] == [3, 4, 5, 6]
    of_two = {"$defs": {"a": {"type": "integer", "minimum": 5, "maximum": 7}}}
    of_two["prefixItems"] = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]  # type: ignore[assignment]
    pattern = json_pattern(of_two)
    assert re.fullmatch(pattern, "[5, 7]")
    assert not re.fullmatch(pattern, "[5, 8]")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "null"}, "minItems": 1, "uniqueItems": False},
        {"type": "array", "prefixItems": [{"type": "null"}], "items": False, "minItems": 1, "maxItems": 1},
        {"type": "object", "properties": {"minimum": {"type": "null"}}, "required": [], "minProperties": 0},
        {"allOf": [{"$ref": "#/definitions/a"}], "definitions": {"a": {"const": 1, "type": "integer"}}},
        {"type": "integer", "title": "n", "description": "a count", "default": 3, "examples": [1]},
    ],
)
def test_keywords_that_forbid_nothing_more_are_taken(schema: dict[str, Any]) -> None:
    assert json_pattern(schema)


@pytest.mark.parametrize("schema", ['{"type": "foo"}', "[1", '{"$ref": "#/x"}', {"type": 3}])
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match="schema: "):
        json_pattern(schema)


def test_an_end_need_not_be_in_the_vocabulary() -> None:
    """config.json may name one that the tokenizer lacks."""
    vocabulary = Vocabulary.of(tokenizer := tokenizer_of("bytes"))
    end = len(vocabulary.tokens) + 3
    form = automaton("a", vocabulary, [end])
    a = tokenizer.encode("a").ids
    assert form.after(0, a) != NOWHERE != form.after(0, [*a, end])
    assert form.after(0, [*a, end - 1]) == form.after(0, [end]) == NOWHERE
    with pytest.raises(ValueError, match="ends: expected a whole number >= 0, got -1"):
        automaton("a", vocabulary, [-1])


def test_patterns_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few characters that stand for billions of states, and the next pattern is read again."""
    vocabulary = Vocabulary.of(tokenizer_of("bytes"))
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"pattern: it took more than 0\.3 s; expected a smaller form"):
        automaton("(a|b)*a(a|b){30}", vocabulary)
    assert automaton("a", vocabulary).distance[0] == 1
    several = {f"p{at}": {"type": "string", "pattern": f"(a|b)*a(a|b){{13}}{at}"} for at in range(50)}
    with pytest.raises(ValueError, match=r"schema: its patterns took more than 0\.3 s together"):
        json_pattern({"type": "object", "properties": several})
    monkeypatch.setattr(sandbox, "SECONDS", 100)  # of which a fast machine takes some
    with pytest.raises(ValueError, match="pattern: it took more than 1024 MiB of memory; expected a smaller"):
        automaton(r"\pL{20000}", vocabulary)
    assert automaton("a", vocabulary).distance[0] == 1
    monkeypatch.setattr(structured, "MOST", 500)
    with pytest.raises(ValueError, match="pattern: expected one of at most 500 transitions, got more"):
        automaton("[a-z]{1,100}", vocabulary)


def test_repetitions_are_multiplied_out_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion states are refused without an automaton, whatever time there is."""
    monkeypatch.setattr(sandbox, "SECONDS", 1e6)
    message = "pattern: its repetitions allow texts of more than 131,072 characters; expected a smaller form"
    for pattern in (
        "(a{1000}){1000}",
        "([a-z]{1,1000}){1,1000} *",
        "a*|((b|ca){3}){9999999}{99}",
        "a{131073}",
    ):
        with pytest.raises(ValueError, match=message):
            automaton(pattern, Vocabulary.of(tokenizer_of("bytes")))
    schema = {"type": "array", "items": {"type": "string", "minLength": 10**5}, "minItems": 2, "maxItems": 2}
    with pytest.raises(ValueError, match=message):
        automaton(json_pattern(schema), Vocabulary.of(tokenizer_of("bytes")))
    with pytest.raises(
        ValueError, match="its automaton has more than 131,072 states; expected a smaller form"
    ):
        automaton("é{70000}", Vocabulary.of(tokenizer_of("bytes")))


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        *(
            ("", 0),
            ("a|bcd", 3),
            ("(a{3}){4}|a", 12),
            ("(?:ab){2,5}c", 11),
            ("(?P<n>ab?)+", 2),
            ("a{2,}?b", 3),
        ),
        *(("[]a]{3}", 3), (r"[^]\]a]x", 2), ("[[:alpha:]]{3}", 3), (r"\p{Greek}{3}\x{41}\u0041\pL", 6)),
        *(("a{3}{4}", 12), ("(?i)ab", 2), ("(?i:ab)c", 3), ("a{0}b", 1), ("(|ab){3}?", 6), ("[0-9]{1,}", 1)),
        *(("(a{999}){999}" + "{999}" * 9, 2**31), ("(?x)a b", 0), ("[a[bc]]", 0), ("(?=a)", 0)),
        *(("b(a", 0), ("a)", 0), ("a{", 0), ("\\", 0), ("[a", 0)),
    ],
)
def test_the_length_of_a_pattern(pattern: str, length: int) -> None:
    assert sandbox.length_of(pattern) == length


def test_any_character_many_times() -> None:
    """Among the characters of such a pattern is the one that stands for a text's end."""
    vocabulary = Vocabulary.of(tokenizer_of("bytes"))
    for pattern in (".{30}", "[^a]{1,200}", r"(?s:\D{40})"):
        table = sandbox.shared.automaton_of(pattern)
        assert len(table["next"]) < 2000
        form = automaton(pattern, vocabulary)
        assert form.distance[0] > 0
        assert all(0 < byte < 256 for _, onward in table["next"] for byte, _ in onward)


def test_text_of_a_schema_is_guessed_as_its_tokenizer_writes_it() -> None:
    """Jump-forward drafts of JSON in a byte-level BPE vocabulary: more than half of the tokens of a text need
    no pass."""
    rng = random.Random(4)

    def text() -> str:
        name = "".join(rng.choices("aeioulmnrst", k=rng.randint(3, 9)))
        city = rng.choice(["Paris", "Rome", "New York"])
        return json.dumps(
            {"name": name, "age": rng.randint(1, 99), "city": city, "active": rng.random() < 0.5}
        )

    properties = {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "city": {"enum": ["Paris", "Rome", "New York"]},
        "active": {"type": "boolean"},
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=[SPECIAL])
    tokenizer.train_from_iterator([TEXT, *(text() for _ in range(300))], trainer)
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    end = tokenizer.token_to_id(SPECIAL)
    form = automaton(json_pattern(schema), Vocabulary.of(tokenizer), [end])
    session = JumpForward().session(None, None, 1)  # type: ignore[arg-type]
    tokens = passes = 0
    for _ in range(40):
        ids, known = [*tokenizer.encode(text()).ids, end], 0
        tokens += len(ids)
        while known < len(ids):
            state = form.after(0, ids[:known])
            lane = Lane(0, torch.tensor([]), 0, SamplingGroup(0.0, 1.0, 0, None), (0, 0), (), form, state)
            (draft,) = session.propose([lane], [16])
            right = [a == b for a, b in zip(draft.tokens, ids[known:], strict=False)]
            known += [*right, False].index(False) + 1  # and the model's own choice
            passes += 1
    assert passes < tokens / 2
