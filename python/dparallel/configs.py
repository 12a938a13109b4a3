"""Configs of the command line: a JSON file of `DecodeConfig`'s fields, and the options beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dparallel_ext import DecodeConfig, rules
from dparallel_ext.rules import ONE, learned

from . import files

POLICY = "entropy:0.5"
"""The rule where neither an option nor the file says how a pass decides."""
DECIDES = {"rule", "policy", "threshold", "selector", "steps", "min_commit", "max_commit", "score"}
"""Fields that say so."""


def parse_policy(text: str, *, files: bool = True) -> dict[str, Any]:
    """decode's arguments for what `rules.parse` takes: "one", "steps:N", "SELECTOR:THRESHOLD", "credit", ...

    files: whether it may name any file of this machine ("learned:PATH"), not those alone that ship
    ("learned:builtin:teacher").

    Raises ValueError, also for a number beyond its bounds.
    """
    file = rules.file_of(text)
    if not files and file is not None and file not in learned.NAMED:
        raise ValueError(
            "policy: expected a file that ships, learned:builtin:NAME, where a request names one"
        )
    try:
        rule, row = rules.parse(text)
    except ValueError as error:
        raise ValueError(str(error).replace("rule:", "policy:", 1)) from error
    return row if rule is None else {"rule": text}


def read_fields(file: Path | None) -> dict[str, Any]:
    """The fields that the file names; none without a file.

    Raises ValueError and FileNotFoundError, by name.
    """
    if file is None:
        return {}
    content = files.json_object("config", file, 1, files.read_text("config", file))
    try:
        DecodeConfig.from_dict(content)
    except ValueError as error:
        raise ValueError(f"config: {file}: {str(error).removeprefix('config: ')}") from error
    return content


def take_mask(content: dict[str, Any], option: int | None) -> int | None:
    """The mask token that the option names, else the file. It is the model's from its loading on, and no
    field any more."""
    of_file = content.pop("mask_id", None)
    return of_file if option is None else option


def config_of(content: Mapping[str, Any], policy: str | None, **options: Any) -> DecodeConfig:
    """The config of a file's fields and of the options beside them, None where an option is not given.

    policy: what `parse_policy` takes; it stands instead of what the file says of rule and policy.
    Raises ValueError naming the option that does not fit.
    """
    config = DecodeConfig.from_dict(content)
    given: Any = {name: value for name, value in options.items() if value is not None}
    if policy is not None or not DECIDES & content.keys():
        parse_policy(policy or POLICY)
        return config.with_rule(policy or POLICY, **given)
    return config.replace(**given)


def causal_config_of(content: Mapping[str, Any], policy: str | None, **options: Any) -> DecodeConfig:
    """The same for an autoregressive model, which takes no policy."""
    assert policy is None
    given: Any = {name: value for name, value in options.items() if value is not None}
    return DecodeConfig.from_dict(content).replace(**given)


def policy_of(config: DecodeConfig) -> str | None:
    """How a pass decides, as `parse_policy` takes it; None where no text says it."""
    defaults = DecodeConfig()
    given = {name for name in DECIDES if getattr(config, name) != getattr(defaults, name)}
    if given <= {"rule"}:
        rule = config.rule or ONE
        return rule if isinstance(rule, str) else None
    if given <= {"selector", "threshold"}:
        return f"{config.selector or 'entropy'}:{config.threshold}"
    return f"steps:{config.steps}" if given == {"steps"} else None


def without_ends(config: DecodeConfig) -> DecodeConfig:
    """A response ends where the config says, and not at the model's own end tokens."""
    return config.replace(eos_id=-1) if config.eos_id is None else config


def with_ends(config: DecodeConfig, ends: Mapping[str, Any]) -> DecodeConfig:
    """A response ends where the config says, and at what `text.endings` found: its eos_id unless the config
    has one, and its stops too. With eos_id -1 it ends where the config says alone."""
    if config.eos_id == -1:
        return config
    eos_id = ends["eos_id"] if config.eos_id is None else config.eos_id
    return config.replace(eos_id=eos_id, stop=[*config.stop, *ends["stop"]])
