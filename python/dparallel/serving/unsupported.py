"""The parameters of OpenAI's API and its relatives that the server does not support.

Clients of OpenAI, vLLM, SGLang and llama.cpp send many parameters with a value that changes nothing. Such a
request is answered; with any other value the parameter is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]
"""Parameter -> the values, besides null, that change nothing."""

HARMLESS = frozenset(
    {
        "cache_control",
        "client_metadata",
        "metadata",
        "parsed",
        "parsed_arguments",
        "prompt_cache_breakpoint",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "rid",
        "return_mm_kwargs",
        "safety_identifier",
        "session_id",
        "truncation_side",
        "user",
    }
)
"""Parameters for the provider's records or caches, or that only modify another parameter that is not
supported; and what OpenAI's client adds to an answer that it parses. Fields of messages and of their parts,
too."""

EITHER = (False, True)
SUMMARIES = ("auto", "concise", "detailed")
"""Of what answers have not."""

OPENAI: Neutral = {
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
}
VLLM_AND_SGLANG: Neutral = {
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "custom_params": ({},),
    "documents": ([],),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "media_io_kwargs": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "no_stop_trim": (False,),
    "priority": (0,),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_prompt_text": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "routed_experts_start_len": (0,),
    "separate_reasoning": EITHER,
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": EITHER,
    "stream_reasoning": EITHER,
    "thinking_token_budget": (-1,),
    "use_audio_in_video": (False,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
LLAMA_CPP: Neutral = {
    "cache_prompt": EITHER,
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "repeat_penalty": (1,),
    "tfs_z": (1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
REQUEST: Neutral = {**OPENAI, **VLLM_AND_SGLANG, **LLAMA_CPP}
CHAT: Neutral = {**REQUEST, "echo": (False,), "add_special_tokens": (False,)}
OF_CHATS: Neutral = {
    "parallel_tool_calls": EITHER,
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
COMPLETION: Neutral = {**REQUEST, **OF_CHATS, "add_special_tokens": (True,), "chat_template_kwargs": ({},)}
STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}
MESSAGE: Neutral = {
    "annotations": ([],),
    "partial": (False,),
    "prefix": (False,),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "type": ("text", "message"),
}
"""Fields of a message that clients send back with an assistant's answer, or that lm-evaluation-harness
adds."""
PART: Neutral = {"annotations": ([],), "type": ("text",)}
"""Fields of a part of a message's content, besides its text."""

RESPONSE: Neutral = {
    **REQUEST,
    "background": (False,),
    "context_management": ([],),
    "n": (1,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
"""Of the Responses API."""
RESPONSE_TEXT: Neutral = {"verbosity": ("medium",)}
RESPONSE_TOOL: Neutral = {"async": (False,), "defer_loading": (False,)}
REASONING: Neutral = {"effort": ("none",), **dict.fromkeys(("summary", "generate_summary"), SUMMARIES)}

SCORES = (
    "log-likelihoods of a given text under diffusion models are computed by lm_eval --model dparallel, see "
    "dparallel.integrations.lm_eval"
)
HINTS = {"prompt_logprobs": f"completions of autoregressive models have echo with logprobs; {SCORES}"}
"""Unsupported parameter -> where to find what it asks for."""


def refused(fields: Mapping[str, Any], neutral: Neutral) -> tuple[str, str] | None:
    """The first unsupported parameter whose value would change something, and an error text; None if there is
    none."""
    # Parameters with a hint first: they tell best what the client wants.
    for name in sorted(fields, key=lambda name: name not in HINTS):
        value, accepted = fields[name], neutral.get(name, ())
        if value is None or name in HARMLESS or any(_same(value, each) for each in accepted):
            continue
        only = " or ".join(json.dumps(each) for each in accepted)
        message = f"{name}: " + (f"only {only} is supported" if accepted else "is not supported")
        return name, f"{message}; {HINTS[name]}" if name in HINTS else message
    return None


def _same(value: Any, other: Any) -> bool:
    """Whether JSON values are equal; true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
