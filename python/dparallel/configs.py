"""Configs of the command line: a JSON file of `DecodeConfig`'s fields, and the options beside it.

Beside these fields a file may have `drafter` and `draft_size`, which the options of these names stand instead
of, and what `dparallel tune` says of its measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dparallel_ext import DecodeConfig, models, rules
from dparallel_ext.arguments import shown, whole
from dparallel_ext.rules import ONE, learned

from . import files, registry

POLICY = "entropy:0.5"
"""The rule where neither an option nor the file says how a pass decides."""
DECIDES = {"rule", "policy", "threshold", "selector", "steps", "min_commit", "max_commit", "score"}
"""Fields that say so."""
TUNED = "tuned"
"""The key of a file of `dparallel tune` under which stands for what its settings were chosen."""
TOLD = ("model", "fingerprint", "device")
"""What it has to say to be checked."""
BESIDE = ("drafter", "draft_size", TUNED)


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
    """The fields that the file names, those of `BESIDE` among them; none without a file.

    Raises ValueError and FileNotFoundError, by name.
    """
    if file is None:
        return {}
    content = files.json_object("config", file, 1, files.read_text("config", file))
    try:
        DecodeConfig.from_dict({name: value for name, value in content.items() if name not in BESIDE})
        if not isinstance(drafter := content.get("drafter"), str | None):
            raise ValueError(f"drafter: expected a text or null, got {shown(drafter)}")
        if (size := content.get("draft_size")) is not None:
            whole("draft_size", size, 0)
        tuned = content.get(TUNED, {})
        if not isinstance(tuned, dict) or (
            TUNED in content and not all(isinstance(tuned.get(name), str) for name in TOLD)
        ):
            raise ValueError(f"{TUNED}: expected what `dparallel tune` writes, with {', '.join(TOLD)}")
    except ValueError as error:
        raise ValueError(f"config: {file}: {str(error).removeprefix('config: ')}") from error
    return content


def take_tuned(
    content: dict[str, Any], file: Path | None, names: Sequence[str], device: str | None, mask_id: int | None
) -> str | None:
    """A warning where the file's settings were measured on another device. They are no field any more.

    Raises ValueError where they were measured with another model than each of `names`.
    """
    tuned = content.pop(TUNED, None)
    if tuned is None:
        return None
    for name in names:
        # Its tensors are mapped from the files, and few are looked at.
        model = models.load(registry.directory_of(name), mask_id=mask_id)
        if models.fingerprint(model) != tuned["fingerprint"]:
            raise ValueError(
                f"config: {file} was tuned for {tuned['model']}, and {name} is another model; "
                "`dparallel tune` makes a file for it"
            )
    if (here := registry.device_name(device)) != tuned["device"]:
        return f"config: {file} was tuned on {tuned['device']}, and this is {here}"
    return None


def take_drafter(
    content: dict[str, Any], drafters: list[str] | None, draft_size: int | None
) -> tuple[list[str] | None, int | None]:
    """The drafters and the size that the options name, else the file: its size only with its own drafter."""
    drafter, size = content.pop("drafter", None), content.pop("draft_size", None)
    if drafters and drafters != [drafter]:
        return drafters, draft_size
    return [drafter] if drafter else None, size if draft_size is None else draft_size


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


def policy_in(content: Mapping[str, Any]) -> str | None:
    """What a file's fields say of how a pass decides, as a text; None where they say nothing."""
    return policy_of(DecodeConfig.from_dict(content)) if DECIDES & content.keys() else None


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
