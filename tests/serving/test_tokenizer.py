"""Tokenizers of vocab.json and merges.txt, against transformers' Qwen2Tokenizer of the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dparallel import registry, tokenizer
from dparallel.structured import Vocabulary, choice_pattern
from dparallel.text import TextStream, prompt_encoder
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The cat's mat: it's what they'd've wanted, I'll say. WE'RE DONE, that's IT.",
    "def f(x):\n    return x ** 2 + 1  # 12345 times\n\n\tprint('hello world')\r\n",
    "Straße, café, naïve Ångström, Việt Nam, Ελλάδα, Москва, שלום, مرحبا",
    "你好,世界! 日本語のテキスト、한국어 텍스트。",
    "😀😃 flags 🇩🇪🇫🇷 👩‍👩‍👧‍👦 1️⃣ ½ ² Ⅷ ٣",
]
ROLES = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|beginoftext|>", "<|mask|>"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def train() -> tuple[dict[str, int], list[list[str]]]:
    """A vocabulary of 500 and its merges."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS * 2, trainer)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], model["merges"]


VOCABULARY, MERGES = train()
BASE = len(VOCABULARY)


def write(directory: Path, form: str = "legacy", **config: Any) -> Path:
    """Dream's files. `legacy`: added_tokens.json and special_tokens_map.json; `decoder`: all in one."""
    directory.mkdir(exist_ok=True)

    def put(name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (directory / name).write_text(text, encoding="utf-8")

    put("vocab.json", VOCABULARY)
    put("merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False}
    if form == "legacy":
        put("added_tokens.json", {text: BASE + i for i, text in enumerate(ADDED)})
        mask = {
            "content": "<|mask|>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }
        put("special_tokens_map.json", {**ROLES, "mask_token": mask, "additional_special_tokens": SPECIAL})
    else:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        decoder = {
            str(BASE + i): {"content": text, **flags, "special": text != "<tool_call>"}
            for i, text in enumerate(ADDED)
        }
        more = {
            "<|left|>": {"lstrip": True, "special": True},
            "<|right|>": {"rstrip": True, "special": True},
            "<word>": {"single_word": True},
            "Å<norm>": {"normalized": True},
        }
        for text, change in more.items():
            decoder[str(BASE + len(decoder))] = {"content": text, **flags, "special": False, **change}
        settings |= {"added_tokens_decoder": decoder, "additional_special_tokens": SPECIAL, **ROLES}
    put("tokenizer_config.json", {**settings, **config})
    return directory


@pytest.fixture(scope="module", params=["legacy", "decoder"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ours, transformers') of the same files."""
    from transformers import Qwen2Tokenizer

    directory = write(tmp_path_factory.mktemp(request.param), request.param)
    return tokenizer.load(directory), Qwen2Tokenizer.from_pretrained(directory)


HARD = [
    "",
    " ",
    "\n",
    " \n \n\n  x",
    "a  b   c\t\td \r\n\r\n e\n",
    "it's IT'S we'Re they'LL 'tis o'clock 'S 's''d",
    "0123456789 3.14 1,000,000 ½²Ⅷ٣ x1y2",
    "e\u0301 A\u030a \u1112\u1161\u11ab \ufb01 \u212b \u2126 q\u0323\u0307 q\u0307\u0323",
    "\u0301 alone, \u0301\u0301x",
    "\x00\x01\x1b\x7f\x80\x85\u2028\u2029\ufeff\u200b\u200d",
    "\u00a0\u3000 spaces\u2003of\u00a0kinds\x1c\x1d",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|mask|><|mask|>b <|endoftext|>x<|endoftext|>\n\n",
    "<|im_end|><|im_end", "<|im_ end|>", "<<|mask|>>", "x<tool_call>{}<tool_call>y",
    "don't<|im_end|>'s", "  <|left|>  x", "x  <|right|>  \n y", "a<word>b <word> <word>.",
    "A\u030a<norm>x Å<norm>", "ſ'ſ K 'K İ ß 'ß",
    "👩‍👩‍👧‍👦 🇩🇪 1️⃣ \U0010ffff \U000e0001",
    *CORPUS,
]  # fmt: skip


def check(both: tuple[Any, Any], text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"], text
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def test_hard_text(both: tuple[Any, Any]) -> None:
    for text in HARD:
        check(both, text)
    check(both, "".join(HARD))


@given(
    st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(
                [*ADDED, "<|left|>", "<|right|>", "<word>", "'s", "'LL", " ", "\n", "\u0301", "7"]
            ),
        ),
        max_size=12,
    )
)
def test_any_text(both: tuple[Any, Any], parts: list[str]) -> None:
    check(both, "".join(parts))


def test_the_vocabulary_and_what_streams(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.token_to_id("<|mask|>") == BASE + 5
    text = "日本語 😀 <tool_call>x<|im_end|> naïve"
    stream = TextStream(ours)
    pieces = [stream.put([one]) for one in ours.encode(text).ids] + [stream.finish()]
    assert "".join(pieces) == text.replace("<|im_end|>", "")


def test_ids_with_holes_are_those_of_the_files(tmp_path: Path) -> None:
    """transformers numbers them on from the vocabulary's end; the model's rows are where the files say."""
    write(tmp_path)
    added = {"<|endoftext|>": BASE + 3, "<|im_end|>": BASE + 1, "<|mask|>": BASE + 40}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    ours = tokenizer.load(tmp_path)
    assert [ours.token_to_id(text) for text in added] == list(added.values())
    ids = ours.encode("x<|mask|>y<|im_end|>").ids
    assert (ids[1], ids[-1]) == (BASE + 40, BASE + 1)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("Qwen2TokenizerFast", "Dream"), ("DreamTokenizer", "Dream"), (None, "Dream")),
        *((None, "a2d-qwen2"), (None, "a2d-qwen3"), (None, "wedlm"), (None, "sdlm")),
    ],
)
def test_the_class_that_it_is(tmp_path: Path, name: str | None, family: str) -> None:
    write(tmp_path, tokenizer_class=name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert tokenizer.load(tmp_path).encode("<|mask|>").ids == [BASE + 5]


@pytest.mark.parametrize("ends", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_beginnings_and_ends_that_the_config_asks_for(tmp_path: Path, ends: dict[str, bool]) -> None:
    from transformers import Qwen2Tokenizer

    write(tmp_path, "decoder", bos_token="<|beginoftext|>", **ends)
    ours, theirs = tokenizer.load(tmp_path), Qwen2Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("hello").ids == theirs("hello")["input_ids"]
    assert ours.encode("hello").ids[0] == BASE + 4
    assert ours.encode("hello", add_special_tokens=False).ids[0] != BASE + 4


def test_special_tokens_that_are_to_be_split(tmp_path: Path) -> None:
    made = tokenizer.load(write(tmp_path, split_special_tokens=True))
    assert BASE + 5 not in made.encode("<|mask|>").ids


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json, nor vocab\.json and merges\.txt"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is not read, save_pretrained .* writes"):
        tokenizer.load(tmp_path)
    write(tmp_path, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ValueError, match=r"not tokenizer_class 'GPT2Tokenizer'"):
        tokenizer.load(tmp_path)
    write(tmp_path)
    for name, content, said in (
        ("merges.txt", "#version: 0.2\na b c\n", r"merges\.txt:2 is 'a b c', expected two parts"),
        ("merges.txt", "zzz yyy\n", r"vocab\.json and merges\.txt of .* do not fit"),
        ("added_tokens.json", '{"a": 7777}', r"'a' is \d+ in vocab\.json and 7777 when added"),
        ("added_tokens.json", '{"<|mask|>": 3}', r"one id each: '.*' and '<\|mask\|>' are both 3 in"),
        ("vocab.json", '{"a": "0"}', r"vocab\.json of .* gives 'a' the id '0'"),
        ("vocab.json", "[]", r"vocab\.json holds a list"),
        ("tokenizer.json", "{", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ):
        write(tmp_path)
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=said):
            tokenizer.load(tmp_path)


def test_files_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    """Each by its name, whatever is wrong in it; never an error of another library."""
    decoder = {"added_tokens_decoder": {"3": {"content": "<a>"}}}
    for name, content, said in (
        ("merges.txt", b"h e\n\xff\xfe", r"merges\.txt is not UTF-8 text: byte 4"),
        ("vocab.json", b'{"a": "\xff"}', r"vocab\.json is not UTF-8 text"),
        ("vocab.json", b'{"a": true}', r"vocab\.json of .* gives 'a' the id True"),
        ("vocab.json", b'{"a": 1000000000000}', r"vocab\.json of .* gives 'a' the id 1000000000000"),
        ("vocab.json", b'{"\\ud800": 1}', r"vocab\.json is not JSON: .*surrogates not allowed"),
        (
            "added_tokens.json",
            b'{"<a>": 1.5}',
            r"tokens\.json does not list .*: '<a>' with the id 1\.5",
        ),
        ("added_tokens.json", b'{"<a>": -1}', r"tokens\.json does not list .*: '<a>' with the id -1"),
        ("added_tokens.json", b"[1]", r"added_tokens\.json holds a list"),
        (
            "special_tokens_map.json",
            b'{"additional_special_tokens": 3}',
            r"map\.json: additional.*=3, ",
        ),
        ("special_tokens_map.json", b'{"additional_special_tokens": [3]}', r"map\.json: additional.*=\[3\]"),
        ("special_tokens_map.json", b"3", r"special_tokens_map\.json holds a int"),
        ("tokenizer_config.json", b'{"tokenizer_class": ["x"]}', r"not tokenizer_class \['x'\]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [3]}', r"config\.json does not list its added"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {}}}',
            r"config\.json does not list its added",
        ),
        ("tokenizer_config.json", json.dumps(decoder).replace('"<a>"', "3").encode(), r"3 with the id 3"),
        ("config.json", b'{"model_type": ["Dream"]}', None),  # the class says it
    ):
        write(tmp_path)
        if name == "tokenizer_config.json":
            settings = json.loads((tmp_path / name).read_text())
            content = json.dumps({**settings, **json.loads(content)}).encode()
        (tmp_path / name).write_bytes(content)
        if said is None:
            tokenizer.load(tmp_path)
        else:
            with pytest.raises(ValueError, match=rf"^(path|model): .*{said}"):
                tokenizer.load(tmp_path)
        (tmp_path / name).unlink()


def test_a_tokenizer_json_that_takes_not_every_text_is_named(tmp_path: Path) -> None:
    shutil.copy(registry.directory_of("builtin:student") / "tokenizer.json", tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    for content, said in (
        (whole.replace('"unk_token": "', '"unk_token": "no '), "UNK"),
        (whole[:-20], ""),
        (whole.replace('"id": 0', '"id": -1'), ""),
        ("3", ""),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"model: .*tokenizer\.json is not a tokenizer: .*{said}"):
            tokenizer.load(tmp_path)
    file.write_bytes(whole.encode("utf-16"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not UTF-8 text"):
        tokenizer.load(tmp_path)


def test_ends_that_the_model_has_no_rows_for_are_named(tmp_path: Path) -> None:
    shutil.copytree(registry.directory_of("builtin:student"), tmp_path / "m")
    for ids, said in (
        ([1, 5000], r"m: generation_config\.json: eos_token_id has \[5000\], expected ids below 202"),
        ("1", r"generation_config\.json: eos_token_id='1', expected ids or null"),
        ([True], r"generation_config\.json: eos_token_id=\[True\], expected ids or null"),
    ):
        (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        with pytest.raises(ValueError, match=said):
            registry.load(str(tmp_path / "m"))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model = registry.load(str(tmp_path / "m"))[0]
    assert (model.eos_id, model.eos_ids) == (1, (1, 7, 9))
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<far>", "id": 5000})
    file.write_text(json.dumps(content))
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"eos_token": "<far>"}')
    with pytest.raises(
        ValueError, match=r"model: the eos_token '<far>' of .*m has the id \d+, expected one below 202"
    ):
        registry.load(str(tmp_path / "m"))


def test_a_tokenizer_json_neither_cuts_nor_pads(tmp_path: Path) -> None:
    """Files keep the lengths that training had set; transformers passes them over too."""
    found = tokenizer.load(registry.directory_of("builtin:student"))
    expected = found.encode("sam has 4 cups now .").ids
    found.enable_truncation(3)
    found.enable_padding(length=12)
    found.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).encode("sam has 4 cups now .").ids == expected


def test_tokens_that_only_the_config_lists_are_added(tmp_path: Path) -> None:
    """As those of a model whose mask was added after its tokenizer.json had been written."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(registry.directory_of("builtin:student") / "tokenizer.json", tmp_path)
    for index, said in ((202, None), (210, r"lists '<new>' with the id 210; .* would give it 202")):
        listed = {str(index): {"content": "<new>", "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
        if said is None:
            found = tokenizer.load(tmp_path)
            theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
            assert found.encode("sam has <new> cups").ids == theirs("sam has <new> cups")["input_ids"]
            assert found.token_to_id("<new>") == index
        else:
            with pytest.raises(ValueError, match=said):
                tokenizer.load(tmp_path)


def test_a_tokenizer_json_comes_first(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.copy(registry.directory_of("builtin:student") / "tokenizer.json", tmp_path)
    assert tokenizer.load(tmp_path).get_vocab_size() == 202


def test_what_is_no_tokenizer_and_no_choices_is_named() -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for read in (Vocabulary.of, lambda tokenizer: prompt_encoder(tokenizer, None)):
        with pytest.raises(
            ValueError, match=r"expected a tokenizers\.Tokenizer, got .*backend_tokenizer is one"
        ):
            read(theirs)
        with pytest.raises(ValueError, match=r"expected a tokenizers\.Tokenizer, got str$"):
            read("path")
    with pytest.raises(
        ValueError, match=r"template: expected what registry\.template_of returns, .* got str"
    ):
        prompt_encoder(theirs.backend_tokenizer, "{{ messages }}")  # type: ignore[arg-type]
    for choices in ("yes", []):
        with pytest.raises(ValueError, match="choices: expected a list of texts, got"):
            choice_pattern(choices)
