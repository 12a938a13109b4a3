"""The parameters of OpenAI's API and its kin that the server does not follow, and where they ask for nothing.

Clients of OpenAI, vLLM, SGLang and llama.cpp name many parameters at the value that changes nothing. Such a
request is answered; a request for more is refused by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .text import INCOMPLETE

Neutral = Mapping[str, tuple[Any, ...]]
"""Of each parameter the values that ask for nothing; null always does."""

HARMLESS = frozenset(
    {
        "metadata",
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
"""Parameters that concern the provider's books, or only what another that is not followed does."""

EITHER = (False, True)

OPENAI: Neutral = {
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": EITHER,
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
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
    "repetition_penalty": (1,),
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
CHAT: Neutral = {**REQUEST, "add_special_tokens": (False,)}
COMPLETION: Neutral = {**REQUEST, "add_special_tokens": (True,), "chat_template_kwargs": ({},)}
STREAM_OPTIONS: Neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
MESSAGE: Neutral = {
    "annotations": ([],),
    "partial": (False,),
    "prefix": (False,),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "tool_calls": ([],),
    "type": ("text", "message"),
}
"""Of a message: an assistant's answer as clients send it back, and what lm-evaluation-harness adds."""

TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "messages",
        "tokenize",
        "tools",
    }
)
"""Names that chat_template_kwargs must not have: a request says these by other parameters, or not at all."""

SCORES = (
    "log-likelihoods of a given text are computed by lm_eval --model dparallel, see "
    "dparallel.integrations.lm_eval"
)
HINTS = {"echo": SCORES, "prompt_logprobs": SCORES}
"""Where to find what the server does not do."""


def chat_logprobs(tokens: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Texts of tokens and their log-probabilities, as chat completions have them."""
    content = [
        {
            "token": text,
            "logprob": _finite(value),
            "bytes": None if INCOMPLETE in text else list(text.encode()),
            "top_logprobs": [],
        }
        for text, value in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[tuple[str, float]], offset: int, top: bool) -> dict[str, Any]:
    """The same as completions have them. `offset`: characters of the tokens before these. `top`: each token
    is the most probable one of its place, and is listed as that too."""
    texts, values = [text for text, _ in tokens], [_finite(value) for _, value in tokens]
    ends = itertools.accumulate(map(len, texts), initial=offset)
    return {
        "tokens": texts,
        "token_logprobs": values,
        "text_offset": [start for start, _ in zip(ends, texts, strict=False)],
        "top_logprobs": [{text: value} for text, value in zip(texts, values, strict=True)] if top else None,
    }


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that is as good as impossible."""
    return max(value, -9999.0)


def refused(given: Mapping[str, Any], neutral: Neutral) -> tuple[str, str] | None:
    """The first parameter that asks for something, and a sentence that names it; None where there is none."""
    # A parameter with a hint says most about what the client is after.
    for name in sorted(given, key=lambda name: name not in HINTS):
        value, accepted = given[name], neutral.get(name, ())
        if value is None or name in HARMLESS or any(_same(value, one) for one in accepted):
            continue
        only = " or ".join(json.dumps(one) for one in accepted)
        said = f"{name}: " + (f"only {only} is supported" if accepted else "is not supported")
        return name, f"{said}; {HINTS[name]}" if name in HINTS else said
    return None


def _same(value: Any, other: Any) -> bool:
    """Whether JSON values are equal; true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
