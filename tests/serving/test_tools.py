"""Calls of functions that a model may make, in the way that its chat template shows."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import bad_request, chat, responded
from dparallel.serving.tools import PossibleCalls, call_style
from drafters import model_of
from openai import OpenAI
from server_here import serving
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers import models as tokenizer_models

QWEN = '{{ \'<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\' }}'
MISTRAL = "{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"
LLAMA = """{{ 'Respond in the format {"name": function name, "parameters": dictionary of argument name' }}"""
TOOLS: list[Any] = [{"type": "function", "function": {"name": name}} for name in ("add", "hat-s")]
TOOLS[0]["function"]["parameters"] = {"type": "object", "properties": {"n": {"type": "integer"}}}
SCHEMAS = {
    "add": {"properties": {"n": {"type": "integer"}, "s": {"anyOf": [{"type": "string"}, {"type": "null"}]}}},
    "hat-s": {},
}
FUNCTION = {"type": "function"}
CODER = "{{ '<tool_call>\\n<function=example>\\n<parameter=a>' }}"
ADD, HATS = ("add", {"n": 1, "s": "é}"}), ("hat-s", {})

Calls = Sequence[tuple[str, Any]]


def test_text_and_calls_come_in_their_order() -> None:
    style = call_style(QWEN)
    assert style is not None
    call = '<tool_call>{"name": "hat-s"}</tool_call>'
    said = PossibleCalls(style, SCHEMAS, None).put(f"So: {call} {call} it is {call}.", last=True)
    named = [part if isinstance(part, str) else part["index"] for part in said.parts]
    assert named == ["So:", 0, 1, " it is", 2, "."]


def written(template: str, parts: Sequence[str], most: int | None = None) -> tuple[str, Calls]:
    """Text and calls of an answer that comes in these parts."""
    style = call_style(template)
    assert style is not None
    said, text, calls = PossibleCalls(style, SCHEMAS, most), "", []
    for part in [said.put(part) for part in parts] + [said.put("", last=True)]:
        text += part.text
        for call in part.calls:
            assert (call["index"], call["type"], len(call["id"])) == (len(calls), "function", 9)
            calls.append((call["function"]["name"], json.loads(call["function"]["arguments"])))
    assert said.count == len(calls)
    return text, calls


@pytest.mark.parametrize(
    ("template", "text", "said", "calls"),
    [
        (QWEN, "No <tool here>.\n", "No <tool here>.\n", []),
        (QWEN, '<tool_call>\n{"name": "add", "arguments": {"n": 1, "s": "é}"}}\n</tool_call>', "", [ADD]),
        (
            QWEN,
            'So:\n<tool_call>{"name":"hat-s"}</tool_call>\n'
            '<tool_call>{"arguments": "{\\"n\\": 1, \\"s\\": \\"\\u00e9}\\"}", "name": "add"}',
            "So:",
            [HATS, ADD],
        ),
        (QWEN, 'a <tool_call>{"name": 3}</tool_call> b', 'a <tool_call>{"name": 3}</tool_call> b', []),
        (QWEN, "a <tool_call>{", "a <tool_call>{", []),
        (QWEN, "<tool_call></tool_call>", "<tool_call></tool_call>", []),
        (QWEN, "<tool_call>" + "[" * 10**5, "<tool_call>" + "[" * 10**5, []),
        (MISTRAL, '[TOOL_CALLS]add[ARGS]{"n": 1, "s": "é}"}[TOOL_CALLS]hat-s{}', "", [ADD, HATS]),
        (MISTRAL, 'x[TOOL_CALLS] [{"name": "hat-s"}, {"name": "other"}]', "x", [HATS, ("other", {})]),
        (
            CODER,
            "So <tool_call>\n<function=add>\n<parameter=n>\n1\n</parameter>\n"
            "<parameter=s>\né}\n</parameter>\n</function>\n</tool_call>\n<tool_call><function=hat-s>\n</function></tool_call>",
            "So",
            [ADD, HATS],
        ),
        (
            CODER,
            "<tool_call>\n<function=hat-s>\n<parameter=a>\n[1,\n 2]\n</parameter>\n"
            "<parameter=b>True</parameter>\n<parameter=c>\n\nx y\n\n</parameter>\n</function>",
            "",
            [("hat-s", {"a": [1, 2], "b": True, "c": "\nx y\n"})],
        ),
        (CODER, "<tool_call><function=a>n=1</tool_call>", "<tool_call><function=a>n=1</tool_call>", []),
        (QWEN, f"<tool_call>a{' ' * 10**6}</tool_call>", f"<tool_call>a{' ' * 10**6}</tool_call>", []),
        (LLAMA, '{"name": "hat-s", "parameters": {}}; {"name": "hat-s", "parameters": {}}', "", [HATS, HATS]),
        (LLAMA, '<|python_tag|>{"name": "hat-s", "parameters": {}}', "", [HATS]),
        (LLAMA, '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        (LLAMA, ' {"x": 1} ', ' {"x": 1} ', []),
        (LLAMA, 'Use {"name": "hat-s"}', 'Use {"name": "hat-s"}', []),
    ],
)  # fmt: skip
def test_calls_are_read_however_they_come(template: str, text: str, said: str, calls: Calls) -> None:
    whole = (said, calls)
    assert written(template, [text]) == whole
    if len(text) < 1000:
        assert written(template, list(text)) == whole
        assert all(written(template, [text[:at], text[at:]]) == whole for at in range(len(text)))
    assert written(template, [text], most=1) == (said, calls[:1])


def test_a_template_shows_the_style() -> None:
    for template in ("", "{{ tools }}", "<tool_call>{{ name }}<arg_key>"):
        assert call_style(template) is None


@pytest.mark.parametrize("special", [False, True])
def test_a_model_calls_a_function(tmp_path: Path, special: bool) -> None:
    """Whole and streaming. The model writes token after token of the vocabulary, and they spell a call."""
    parts = ["?", "Yes. ", "<tool_call>", '\n{"name": "add", "argu', 'ments": {"n": 1}}\n</tool_call>', "end"]
    model = model_of(vocab_size=64, eos_token_id=5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        model.lm_head.weight.copy_(model.embed.weight.roll(1, 0))
    vocabulary = {name: token for token, name in enumerate(parts)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.add_tokens([AddedToken("<tool_call>", special=special, normalized=False)])
    tokenizer.decoder = decoders.Fuse()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if false %}<tool_call>{% endif %}"
    )
    with (
        serving((model, tokenizer), tmp_path, name="calls") as here,
        OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        asked: dict[str, Any] = {
            "model": "calls",
            "max_tokens": 16,
            "tools": copy.deepcopy(TOOLS),
            "temperature": 2.0,
            "seed": 5,
        }
        choice = chat(client, "?", **asked).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Yes.", "tool_calls")
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"n": 1})
        with client.chat.completions.stream(
            messages=[{"role": "user", "content": "?"}], **asked, parallel_tool_calls=False
        ) as stream:
            streamed = stream.get_final_completion().choices[0]
        (same,) = streamed.message.tool_calls or ()
        assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)
        assert (streamed.message.content, streamed.finish_reason) == ("Yes.", "tool_calls")
        messages = [{"role": "user", "content": "?"}, streamed.message]
        messages.append({"role": "tool", "tool_call_id": same.id, "content": "so"})
        assert client.chat.completions.create(messages=messages, **asked).choices[0].message.tool_calls
        flat = {**asked, "max_output_tokens": 16, "tools": [tool["function"] | FUNCTION for tool in TOOLS]}
        own = {"extra_body": {"seed": flat.pop("seed")}}
        del flat["max_tokens"]
        text, called = responded(client, "?", **flat, **own).output
        assert text.content[0].text == "Yes."
        assert (called.type, called.name, called.status) == ("function_call", "add", "completed")
        assert called.arguments == call.function.arguments
        result = {"type": "function_call_output", "call_id": called.call_id, "output": "so"}
        given = [{"role": "user", "content": "?"}, text, called, result]
        assert client.responses.create(input=given, **flat, **own).output[-1].type == "function_call"
        on = {**flat, "max_output_tokens": 75, "temperature": 0, "extra_body": {"ignore_eos": True}}
        kinds = [item.type for item in responded(client, "?", **on).output]
        assert kinds == [*["message", "function_call"] * 2, "message"]
        spelled = chat(client, "?", **asked, tool_choice="none").choices[0]
        assert spelled.message.tool_calls is None
        assert ("<tool_call>" in spelled.message.content) is not special
        schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        if special:  # in a form it can be written in letters alone, which this model has not
            with bad_request("response_format", "no token does"):
                chat(client, "?", **asked, response_format=form)
            return
        formed = chat(client, "?", **asked, response_format=form).choices[0]
        assert (formed.message.content, formed.finish_reason) == (None, "tool_calls")
        assert formed.message.tool_calls[0].function == call.function
        asked["tools"][0]["function"]["parameters"]["minProperties"] = 2
        with bad_request("tools", "add: parameters: schema: "):
            chat(client, "?", **asked, response_format=form)
