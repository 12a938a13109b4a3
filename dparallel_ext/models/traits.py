"""The traits of a model, also of a model inside wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import warn
from .base import Model
from .checkpoint import config_of
from .config import Traits
from .families import DECISIVE, FAMILIES, family_in, family_of
from .fast_dllm import FastDLLM
from .sdlm import SDLM
from .stable_diffcoder import StableDiffCoder
from .wrappers import stated_traits, unwrap


def traits(model: Any) -> Traits:
    """The traits of a native model or of a Hugging Face model (by its config), also inside
    `wrappers.WRAPPERS`.

    An attribute `traits` comes first. A plain function without it has default traits.

    Raises ValueError for an object that is no model, and for a module of another kind that holds a model with
    traits beside the mask token, since they may or may not hold for the module's own logits.
    """
    inner = unwrap(model)
    if (stated := stated_traits(inner)) is not None:
        return stated
    if isinstance(inner, Model):
        return _of_family(type(inner), inner.mask_id, inner.block_length, inner.window, inner.prompt_block)
    if not callable(inner) or isinstance(inner, type):
        got = f"the class {inner.__name__}" if isinstance(inner, type) else type(inner).__name__
        raise ValueError(f"model: expected a module or function, got {got}")
    config = getattr(inner, "config", None)
    family = family_of({key: getattr(config, key, None) for key in DECISIVE}) or Model
    if family is StableDiffCoder:
        raise ValueError(
            f"model: a call of {type(inner).__name__} is causal, and only its published loop makes it "
            "block-causal; pass what dparallel_ext.models.wrap makes of it"
        )
    candidates = [
        getattr(config, family.mask_key, None),
        *(getattr(of, "mask_token_id", None) for of in (config, getattr(inner, "generation_config", None))),
    ]
    candidates.append(family.released_mask_id(getattr(config, "vocab_size", None)))
    mask_id, block_length = next((candidate for candidate in candidates if candidate is not None), None), None
    if family is FastDLLM:  # block-causal whenever it is called, unlike SDAR, whose mask its caller makes
        block_length = getattr(config, "bd_size", None) or FastDLLM.bd_size
    window = getattr(config, "block_size", None) if family is SDLM else None
    result = _of_family(family, mask_id, block_length, window or family.window)
    for name, part in _held(inner, known=family is not Model):
        inside = traits(part)
        if replace(inside, mask_id=None) != replace(result, mask_id=None):
            raise ValueError(
                f"model: {type(inner).__name__} holds a {type(part).__name__} as {name}, and whether its own "
                "logits are shifted or block-causal, or causal, as the inner model's is not known. Pass the "
                f"inner model, or say it: model.traits = dparallel_ext.models.traits(model.{name}), or other "
                "dparallel_ext.models.Traits"
            )
        result = inside if result.mask_id is None else result
    return result


def stored_traits(directory: Path) -> Traits:
    """The traits of a checkpoint's model, without its mask token, by its config.json alone. Raises as
    `config_of`."""
    config, shape = config_of(directory)
    family = family_in(config, f"path: {directory}")
    return _of_family(family, None, shape.block_length, shape.window or family.window, shape.prompt_block)


def _of_family(
    family: type[Model],
    mask_id: int | None,
    block_length: int | None,
    window: int | None,
    prompt_block: bool = False,
) -> Traits:
    of_config: dict[str, Any] = {
        "mask_id": mask_id,
        "block_length": block_length,
        "window": window,
        "prompt_block": prompt_block,
    }
    of_class = {field.name for field in fields(Traits)} - set(of_config)
    return Traits(**of_config, **{name: getattr(family, name) for name in of_class})


def _held(model: Any, known: bool) -> Iterator[tuple[str, Any]]:
    """(name, model) of the native models that an object holds, and of models of a known family, unless the
    object itself is `known` to be of one: its parts have its config then.
    """
    parts = model.named_modules() if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).items()
    for name, part in parts:
        of_family = getattr(getattr(part, "config", None), "model_type", None) in FAMILIES
        if part is not model and (isinstance(part, Model) or (of_family and not known)):
            yield name, part


def check_diffusion(model: Any, *, decoding: bool = False) -> None:
    """Raise ValueError for an autoregressive model, and for a model whose masks come behind all known tokens,
    or in blocks behind a prompt that is one.

    decoding: accept such models if `decode` decodes them.
    """
    model_traits, inner = traits(model), unwrap(model)
    if (model_traits.window is not None or model_traits.prompt_block) and not decoding:
        behind = "in blocks behind its prompt" if model_traits.prompt_block else "behind all known tokens"
        raise ValueError(
            f"model: {type(inner).__name__} has its masks {behind}, and this is for models that see both "
            "ways or by blocks of one length; dparallel_ext.decode and an Engine decode it"
        )
    if model_traits.causal and not (decoding and model_traits.onward):
        other = " If it was made to see both ways, say so: model.traits = dparallel_ext.models.Traits(...)"
        raise ValueError(
            f"model: {type(inner).__name__} is autoregressive, and this is for masked diffusion models; "
            f"dparallel_ext.speculate decodes it.{'' if isinstance(inner, Model) else other}"
        )


def max_positions(model: Any) -> int | None:
    """The positions that a model, or its config as a mapping, was made for; None if it does not say."""
    inner = unwrap(model)
    config = getattr(inner, "config", inner)
    content = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    keys = ("max_sequence_length", "max_position_embeddings")
    most = min((content[key] for key in keys if isinstance(content.get(key), int)), default=None)
    scaling = inner.shape.rope_scaling if isinstance(inner, Model) else None
    return most if most is None or scaling is None else max(most, int(scaling.positions))


def warn_beyond(model: Any, positions: int, name: str = "gen_length") -> None:
    """Warn, naming the argument, if a sequence has more positions than the model was made for."""
    most = max_positions(model)
    if most is not None and positions > most:
        warn(
            f"{name}: {positions} positions of prompt and response, but the model's config says {most}; "
            "text beyond them may be senseless"
        )
