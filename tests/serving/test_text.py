"""Between text and tokens: text that streams, stop strings, chat templates, end tokens."""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dparallel import registry, sandbox
from dparallel.text import INCOMPLETE, TextStream, TokenTexts, chat_template, prompt_encoder
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = ["the cat sat on the mat", "Straße, café, naïve", "你好,世界!", "😀😃 flags 🇩🇪🇫🇷", "a  b   c\n\n\td"]


def byte_level() -> Tokenizer:
    """As GPT-2's, Qwen's and LLaDA's: characters beyond ASCII are mostly several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_fallback() -> Tokenizer:
    """As Llama's: words with ▁ for the space before them, and bytes for what has no token."""
    vocabulary = {"<end>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}
    for word in ["▁", "▁the", "▁cat", "c", "a", "t", "é"]:
        vocabulary[word] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.add_special_tokens(["<end>"])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "words": registry.load("builtin:student")[1],
}
BYTE_LEVEL = TOKENIZERS["byte level"]


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], stop: list[str]) -> tuple[list[str], int]:
    """What is given out block by block and at the end, and the tokens counted."""
    stream, found, at = TextStream(tokenizer, stop), [], 0
    for cut in [*sorted(cuts), len(ids)]:
        found.append(stream.put(ids[at : max(at, cut)]))
        at = max(at, cut)
    return [*found, stream.finish()], stream.count


@given(st.text(max_size=30), st.lists(st.integers(0, 60), max_size=6))
def test_text_streams_whole_characters(said: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(said).ids
    found, count = pieces(BYTE_LEVEL, ids, cuts, [])
    assert "".join(found) == said
    assert count == len(ids)
    assert said.count(INCOMPLETE) == sum(piece.count(INCOMPLETE) for piece in found)


@pytest.mark.parametrize("name", ["byte level", "words"])
@given(st.data())
def test_any_tokens_stream_as_they_decode(name: str, data: st.DataObject) -> None:
    """Special tokens and bytes that are no text included."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=6))
    assert "".join(pieces(tokenizer, ids, cuts, [])[0]) == tokenizer.decode(ids)


@given(
    st.lists(
        st.sampled_from(
            ["▁", "▁the", "▁cat", "c", "é", "<end>", (0xE4, 0xBD, 0xA0), (0xF0, 0x9F, 0x98, 0x80)]
        ),
        max_size=20,
    ),
    st.lists(st.integers(0, 40), max_size=6),
)
def test_byte_fallback_streams_as_it_decodes(parts: list, cuts: list[int]) -> None:
    tokenizer, ids = TOKENIZERS["byte fallback"], []
    for part in parts:
        names = [part] if isinstance(part, str) else [f"<0x{b:02X}>" for b in part]
        ids += [tokenizer.token_to_id(name) for name in names]
    assert "".join(pieces(tokenizer, ids, cuts, [])[0]) == tokenizer.decode(ids)


@given(
    st.lists(st.sampled_from(["3A", "E4", "BD", "A0"]), min_size=2, max_size=9),
    st.lists(st.integers(0, 9), max_size=3),
)
def test_bytes_that_are_no_text_do_not_depend_on_the_cuts(codes: list[str], cuts: list[int]) -> None:
    """A decoder may make one thing of them alone, and another of all together."""
    tokenizer = TOKENIZERS["byte fallback"]
    ids = [tokenizer.token_to_id(f"<0x{byte}>") for byte in codes]
    whole, single = (pieces(tokenizer, ids, at, [])[0] for at in (cuts, [*range(len(ids))]))
    assert "".join(whole) == "".join(single)


def byte_ids(name: str, values: list[int]) -> list[int]:
    """The tokens of single bytes."""
    tokenizer = TOKENIZERS[name]
    if name == "byte fallback":
        return [tokenizer.token_to_id(f"<0x{value:02X}>") for value in values]
    shown = {number: number for number in (*range(33, 127), *range(161, 173), *range(174, 256))}  # as GPT-2's
    others = (number for number in range(256) if number not in shown)
    shown |= {number: 256 + at for at, number in enumerate(others)}
    return [tokenizer.token_to_id(chr(shown[value])) for value in values]


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@given(st.lists(st.sampled_from([0x41, 0x80, 0xA0, 0xBD, 0xE4, 0xF0, 0xFF]), min_size=15, max_size=70))
def test_long_runs_of_bytes_that_are_no_text_stream_as_they_decode(name: str, values: list[int]) -> None:
    """Though most of them are left out once no later token can change them."""
    ids = byte_ids(name, [0xFF, *values])
    for token in (TOKENIZERS[name].token_to_id("<end>"), 10**6):  # neither known nor special ones have text
        first, *others = byte_ids(name, [0xE4, 0xBD, 0xA0])
        assert "".join(pieces(TOKENIZERS[name], [first, *[token] * 20, *others], [1, 9], [])[0]) == "你"
    assert "".join(pieces(TOKENIZERS[name], ids, [*range(len(ids))], [])[0]) == TOKENIZERS[name].decode(ids)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@pytest.mark.parametrize("values", [[], [0xFF], [0x80], [0xE4], [0xE4, 0xBD], [0xFF, 0xE4, 0xBD, 0xA0]])
def test_long_runs_take_no_more_work_a_token_than_short_ones(name: str, values: list[int]) -> None:
    class Counting:
        get_added_tokens_decoder = TOKENIZERS[name].get_added_tokens_decoder
        id_to_token = TOKENIZERS[name].id_to_token
        tokens = 0

        def decode(self, ids: list[int], **settings: Any) -> str:
            self.tokens += len(ids)
            return TOKENIZERS[name].decode(ids, **settings)

    tokenizer, each = Counting(), []
    for length in (100, 1000):
        tokenizer.tokens = 0
        stream, ids = TextStream(tokenizer), byte_ids(name, (values * length)[:length])
        ids = ids or [10**6] * length  # which the tokenizer does not know, and which have no text
        assert stream.put(ids) + stream.finish() == TOKENIZERS[name].decode(ids)
        each.append(tokenizer.tokens / length)
    assert each[1] <= 1.2 * each[0]


@pytest.mark.parametrize("name", ["byte level", "words"])
@given(st.data())
def test_tokens_start_where_the_text_before_them_ends(name: str, data: st.DataObject) -> None:
    """In characters. The tokens of a character start with it, special tokens take no place, and neither cuts
    nor a stop string move anything."""
    tokenizer = TOKENIZERS[name]
    words = data.draw(st.lists(st.sampled_from(["sam", " has", "语", "😀", " the", "ж", "3"]), max_size=9))
    end = tokenizer.token_to_id("[EOS]" if name == "words" else "<end>")
    parts = [[end] if data.draw(st.booleans()) else tokenizer.encode(word).ids for word in words]
    ids = [token for part in parts for token in part]
    cut = data.draw(st.integers(0, len(ids)))
    stream = TextStream(tokenizer, data.draw(st.sampled_from([[], ["has the"]])))
    stream.put(ids[:cut])
    stream.put(ids[cut:])
    complete = (tokenizer.decode(ids[:at]).rstrip(INCOMPLETE) for at in range(stream.count))
    assert stream.starts == [len(text) for text in complete]


def test_a_character_over_two_blocks_waits_for_its_end() -> None:
    ids = BYTE_LEVEL.encode("a语b").ids  # no merge of the corpus has it
    assert len(ids) == 5
    stream = TextStream(BYTE_LEVEL)
    assert [stream.put([one]) for one in ids] == ["a", "", "", "语", "b"]
    assert TextStream(BYTE_LEVEL).put(ids[:3]) == "a"


def test_a_character_that_never_ends_is_given_out_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("a语").ids[:-1]
    assert pieces(BYTE_LEVEL, ids, [2], [])[0] == ["a", "", INCOMPLETE]


@given(
    st.text("abc语", max_size=24),
    st.lists(st.text("abc语", min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_stop_strings_do_not_depend_on_the_blocks(said: str, stop: list[str], cuts: list[int]) -> None:
    """The first to be complete ends the text, of those the longest; the tokens count up to it."""
    ids = BYTE_LEVEL.encode(said).ids
    found, count = pieces(BYTE_LEVEL, ids, cuts, stop)
    ends = [(said.find(s) + len(s), said.find(s)) for s in stop if s in said]
    text = "".join(found)
    if not ends:
        assert (text, count) == (said, len(ids))
        return
    end, _ = min(ends)
    # A token of several characters may complete two: then the first in it counts, as everywhere.
    assert text == said[: min(ends)[1]]
    assert len(BYTE_LEVEL.decode(ids[:count]).rstrip(INCOMPLETE)) >= end
    assert len(BYTE_LEVEL.decode(ids[: count - 1]).rstrip(INCOMPLETE)) < end


def test_the_first_stop_string_of_a_token_counts() -> None:
    ids = BYTE_LEVEL.encode("the").ids
    assert len(ids) == 1
    assert "".join(pieces(BYTE_LEVEL, ids, [], ["the", "h"])[0]) == "t"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    stream = TextStream(BYTE_LEVEL, ["<<end>>"])
    ids = [BYTE_LEVEL.encode(c).ids for c in "a<<en<<end>>b"]
    assert [stream.put(one) for one in ids] == ["a", *[""] * 4, "<<en", *[""] * 7][:13]
    assert stream.stopped
    assert stream.put(BYTE_LEVEL.encode("more").ids) == stream.finish() == ""
    assert stream.count == 12


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 你好?"},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": 'And "bye"?\n'},
]
TEMPLATES = {
    "llama 3, LLaDA": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|end|>\n\n' %}"
    "{% set content = content + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}",
    "chatml, Dream, SDAR": "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if loop.first and message.role == 'system' %}{% continue %}\n"
    "    {%- endif %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "json": "{% for m in messages %}\n  {{ m | tojson }}{{ eos_token }}\n{% endfor %}\n",
    "marks what the assistant says": "{% for m in messages %}\n    {%- if m.role == 'assistant' %}\n"
    "        {% generation %}\n  {% set said = m.content | trim %}{{ said }}{{ eos_token }}\n"
    "        {% endgeneration %}\n    {%- else %}{{ m.content }}{{ said }}{%- endif %}\n{% endfor %}\n",
    "what is not given": "{{ unk_token }}|{{ cls_token is defined }}|{{ tools is defined }}|{{ tools }}|"
    "{{ messages | tojson(indent=2, sort_keys=true, separators=(',', ': ')) }}",
}


def write(directory: Path, **config: object) -> Path:
    BYTE_LEVEL.save(str(directory / "tokenizer.json"))
    special = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "<end>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["config", "list", "file", "json file", "files"])
def test_templates_render_as_transformers_renders_them(tmp_path: Path, name: str, place: str) -> None:
    source = TEMPLATES[name]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    given = {"config": {"chat_template": source}, "list": {"chat_template": named}}.get(place, {})
    write(tmp_path, **given, unk_token=None)
    if place.startswith("file"):
        (tmp_path / "chat_template.jinja").write_text(source)
    if place == "files":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("no")
    if place == "json file":  # of processors, so that transformers' tokenizers pass it over
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    render = chat_template(tmp_path)
    assert render is not None
    own = source if place == "json file" else None
    expected = theirs.apply_chat_template(
        MESSAGES, chat_template=own, tokenize=False, add_generation_prompt=True
    )
    assert render(MESSAGES) == expected
    assert "你好" in expected


def test_templates_that_refuse_or_do_not_compile(tmp_path: Path) -> None:
    write(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    render = chat_template(tmp_path)
    assert render is not None
    with pytest.raises(ValueError, match=r"messages: .*roles must alternate"):
        render(MESSAGES)
    write(tmp_path, chat_template="{{ messages.__class__.__base__.__subclasses__() }}")
    render = chat_template(tmp_path)
    assert render is not None
    with pytest.raises(ValueError, match="messages: "):
        render(MESSAGES)
    write(tmp_path, chat_template="{% if %}")
    with pytest.raises(ValueError, match=r"model: the chat template of .* does not compile"):
        chat_template(tmp_path)
    write(tmp_path)
    assert chat_template(tmp_path) is None
    wrong = [3, True, ["a"], [{"name": "default"}], {"default": 3}, [None]]
    for template in wrong:
        write(tmp_path, chat_template=template)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected chat_template to be text"):
            chat_template(tmp_path)
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{{ '\xff' }}")
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text: byte 4"):
            chat_template(tmp_path)
        (tmp_path / name).unlink()
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        chat_template(tmp_path)


def test_one_of_several_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0] }}"}]
    render = chat_template(write(tmp_path, chat_template=named))
    assert render is not None
    assert (render(MESSAGES), render(MESSAGES, tools=["hammer"])) == ("plain", "hammer")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("a {{ tools[0] }}")
    render = chat_template(write(tmp_path, chat_template="plain"))
    assert render is not None
    assert (render(MESSAGES), render(MESSAGES, tools=["hammer"])) == ("plain", "a hammer")
    shutil.rmtree(tmp_path / "additional_chat_templates")
    render = chat_template(write(tmp_path, chat_template={"rag": "alone"}))
    assert render is not None
    assert render(MESSAGES) == "alone"
    write(tmp_path, chat_template={"rag": "a", "tool_use": "b"})
    with pytest.raises(ValueError, match=r"are \['rag', 'tool_use'\], none is \"default\""):
        chat_template(tmp_path)
    for wrong in (3, [{"name": "default"}], {"default": None}):
        write(tmp_path, chat_template=wrong)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected chat_template to be text"):
            chat_template(tmp_path)


def test_variables_of_a_template(tmp_path: Path) -> None:
    source = "{{ enable_thinking }} {{ add_generation_prompt }} {{ bos_token }} {{ messages | length }}"
    render = chat_template(write(tmp_path, chat_template=source))
    assert render is not None
    assert render(MESSAGES, enable_thinking=False) == "False True <s> 4"
    assert render([], add_generation_prompt=False, bos_token="!", enable_thinking=["é"]) == "['é'] False ! 0"
    for more, said in (({"messages": []}, "messages are no keyword"), ({"x": object()}, "not JSON")):
        with pytest.raises(ValueError, match=said):
            render(MESSAGES, **more)


def test_roles_of_the_older_files(tmp_path: Path) -> None:
    """special_tokens_map.json counts where tokenizer_config.json lists no added tokens."""
    write(tmp_path, chat_template="{{ eos_token }}{{ sep_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "cat"}, "sep_token": "S"}')
    render = chat_template(tmp_path)
    assert render is not None
    assert render([]) == "catS"
    write(tmp_path, chat_template="{{ eos_token }}", added_tokens_decoder={"0": {"content": "<end>"}})
    render = chat_template(tmp_path)
    assert render is not None
    assert render([]) == "<end>"


def test_prompts_by_a_template_or_as_they_are(tmp_path: Path) -> None:
    plain = prompt_encoder(BYTE_LEVEL, None)
    assert plain("the cat") == BYTE_LEVEL.encode("the cat").ids
    render = chat_template(write(tmp_path, chat_template="[{{ messages[0].content }}]<end>"))
    assert prompt_encoder(BYTE_LEVEL, render)("the cat") == BYTE_LEVEL.encode("[the cat]<end>").ids


# --- templates that would do harm ---------------------------------------------------------------

HARMFUL = {
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": r"more than 0\.2 s",
    "{{ 'a' * 10**10 }}": "MiB of memory",
    "{{ ('a' * n) | length }}": "MiB of memory",
    "{{ 'x' | center(10**10) }}": "MiB of memory",
    "{{ '%1000000000d' % 1 }}": r"more than 0\.2 s|MiB of memory",
    "{{ (n ** n) ** n }}": r"more than 0\.2 s|MiB of memory",
    "{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x * 2 %}{% endfor %}": "more than",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "recursion",
    "{{ 'a' * 20000 }}{{ 'b' }}": "20,001 characters, more than 20,000",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages.x.y }}": "has no attribute",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% include 'other' %}": "no loader",
}


def test_templates_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused by its name, and the next is rendered; a busy machine does not count."""
    write(tmp_path, chat_template="fine")
    (tmp_path / "harmful").mkdir()
    fine = chat_template(tmp_path)
    assert fine is not None
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "CHARACTERS", 20000)
    for source, said in HARMFUL.items():
        with pytest.raises(
            ValueError, match=rf"chat template of .*harmful does not (compile|render).*({said})"
        ):
            chat_template(write(tmp_path / "harmful", chat_template=source))([], n=10**10)
        assert fine([]) == "fine"


def test_a_template_is_rendered_for_any_thread_and_in_a_child(tmp_path: Path) -> None:
    render = chat_template(write(tmp_path, chat_template="{{ messages[0].content * 3 }}"))
    assert render is not None
    said = [str(i) * 1000 for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: render([{"role": "user", "content": text}]), said))
    assert found == [text * 3 for text in said]
    child = os.fork()
    if child == 0:
        os._exit(render([{"role": "user", "content": "a"}]) != "aaa")
    assert os.waitpid(child, 0)[1] == 0
    assert render([{"role": "user", "content": "b"}]) == "bbb"


def test_without_jinja2_a_template_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("__version__ = '3.1.5'\nnodes = None\n")
    monkeypatch.setattr(sandbox, "shared", sandbox.Sandbox())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match=r'jinja2 3\.1\.6 or later must be .*dparallel-ext\[cli\]" does'):
        sandbox.shared.compile("x")
    sandbox.shared.close()


def test_without_outlines_core_a_form_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outlines_core.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    process, said = (
        sandbox.Sandbox(),
        r'outlines_core must be .* pip install "dparallel-ext\[structured\]" does',
    )
    for ask in (process.pattern_of, process.automaton_of):
        with pytest.raises(ValueError, match=said):
            ask("{}")
    process.close()


def test_a_sandbox_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(sandbox.Refused, match="its process does not start"):
        sandbox.Sandbox().compile("x")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_texts_of_tokens_join_to_the_text(name: str) -> None:
    """Where no character is over several tokens; special tokens and parts of characters are shown as such."""
    tokenizer = TOKENIZERS[name]
    texts = TokenTexts(tokenizer)
    said = "sam has 3 cups" if name == "words" else "the cat at the cat"
    ids = tokenizer.encode(said).ids
    if name == "byte fallback":
        ids = [tokenizer.token_to_id(token) for token in ("▁the", "▁cat", "▁", "a", "t", "▁the", "▁cat")]
    for _ in range(2):  # what is known is the same
        assert "".join(texts(token, first=at == 0) for at, token in enumerate(ids)) == tokenizer.decode(ids)
    if name != "words":
        assert texts(tokenizer.token_to_id("<end>")) == "<end>"
        part = tokenizer.token_to_id("<0xD0>") or tokenizer.encode("ж").ids[0]
        assert INCOMPLETE in texts(part)
