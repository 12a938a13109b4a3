"""The language model within a model that sees images too: Mistral 3, as which Ministral 3 and, from 3.1 on,
Mistral Small are published. The parts that see images are not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .stored import SourceTensor

TYPES = ("mistral3",)
"""The model_type of config.json of such models."""
_NAMES = {"language_model.": "", "model.language_model.": "model."}
"""How the names of its tensors begin, in files and in transformers -> in a model of language alone."""
_HEAD, _TIED = "lm_head.weight", "tie_word_embeddings"
_OF_ALL = ("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id")
"""Keys of the whole model's config.json that hold for its language model, unless that has its own."""


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model alone; any other model's is returned as it is.

    Raises ValueError if it is not there.
    """
    if config.get("model_type") not in TYPES:
        return dict(config)
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"config: text_config={text!r:.80}, expected an object")
    shared = {key: config[key] for key in _OF_ALL if config.get(key) is not None}
    untied = any(part.get(_TIED) is False for part in (config, text))
    return {"model_type": "mistral", **shared, **text, _TIED: False if untied else None}


def language_tensors(
    config: dict[str, Any], tensors: Iterable[SourceTensor]
) -> tuple[dict[str, Any], list[SourceTensor]]:
    """The config and the tensors of the language model alone; as they are, if it is not within another model.

    Where the config does not say that the head is apart, it is the embedding if none is stored: transformers
    takes the head that is stored.
    """
    tensors = list(tensors)
    named = [(language_name(entry.name), entry) for entry in tensors]
    within = [entry._replace(name=name) for name, entry in named if name is not None]
    if not within:
        return config, tensors
    within += [entry for entry in tensors if entry.name.startswith("lm_head.")]
    if config.get(_TIED) is None:
        config = {**config, _TIED: all(entry.name != _HEAD for entry in within)}
    return config, within


def language_name(name: str) -> str | None:
    """The name in the language model of a tensor or module of the whole model; None if it is not in there."""
    for start, ours in _NAMES.items():
        if name.startswith(start):
            return ours + name.removeprefix(start)
    return None
