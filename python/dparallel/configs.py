"""Configs of the command line: a JSON file of `DecodeConfig`'s fields, and options, which override it.

A file may also have `drafter` and `draft_size`, and `dparallel tune`'s account of its measurements. The rows
of `dparallel evaluate`'s table come from a list of such fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dparallel_ext import DecodeConfig, models, rules, speculation
from dparallel_ext.arguments import shown, whole
from dparallel_ext.decoding.config import POLICY_FIELDS
from dparallel_ext.rules import ONE, filter_file

from . import files, registry

POLICY = "entropy:0.5"
"""The rule if neither an option nor the file names one."""
DECIDES = {*POLICY_FIELDS, "min_commit", "policy", "rule"}
"""Fields that decide what a pass commits."""
TUNED = "tuned"
"""The key, in a file of `dparallel tune`, for the model and device that its settings were chosen for."""
TUNED_KEYS = ("model", "fingerprint", "device")
"""Keys that must be under `TUNED`."""
CONDITIONS = {"device": "on", "dtype": "in", "fp8": "with fp8"}
"""Keys under `TUNED` for what the measured times depend on -> the word before each in a warning."""
Fields = Mapping[str, Any]
"""Fields of `DecodeConfig` by name, with a "rule" among them."""
VARIED = (
    *("rule", "block_length", "sub_block_length", "cache", "refresh"),
    *("active_blocks", "open_at", "activate_at", "draft_size"),
)
"""The fields that the rows of a table may differ in; `draft_size` is `decode`'s."""
ADAPTIVE = ("verifier", "mixture", "window", "lookahead")
"""The fields of a row for `adaptive_decode`: the verifier's name, and numbers."""
BESIDE = ("drafter", "draft_size", TUNED)


def parse_policy(text: str, *, files: bool = True) -> dict[str, Any]:
    """`decode`'s arguments for a text that `rules.parse` takes: "one", "steps:N", "SELECTOR:THRESHOLD", ...

    files: whether the text may name any file of this machine ("learned:PATH"), or only filters that ship
    ("learned:builtin:teacher").

    Raises ValueError, also for a number beyond its bounds.
    """
    if not isinstance(text, str):
        raise ValueError(
            "policy: expected a text, by which a result is known, got "
            f"{shown(text)}; an entry in dparallel_ext.rules.KINDS gives a rule of your own a name"
        )
    file = rules.file_of(text)
    if not files and file is not None and file not in filter_file.NAMED:
        raise ValueError(
            "policy: expected a file that ships, learned:builtin:NAME, where a request names one, got "
            f"{shown(text)}"
        )
    try:
        rule, row = rules.parse(text)
    except ValueError as error:
        raise ValueError(str(error).replace("rule:", "policy:", 1)) from error
    return row if rule is None else {"rule": text}


def read_fields(file: Path | None) -> dict[str, Any]:
    """The file's fields, including those of `BESIDE`; none without a file.

    Raises ValueError and FileNotFoundError, naming "config", the file and the field.
    """
    if file is None:
        return {}
    content = files.json_object("config", file)
    try:
        DecodeConfig.from_dict({name: value for name, value in content.items() if name not in BESIDE})
        if not isinstance(drafter := content.get("drafter"), str | None):
            raise ValueError(f"drafter: expected a text or null, got {shown(drafter)}")
        if (size := content.get("draft_size")) is not None:
            whole("draft_size", size, 0)
        tuned = content.get(TUNED, {})
        if not isinstance(tuned, dict) or (
            TUNED in content and not all(isinstance(tuned.get(name), str) for name in TUNED_KEYS)
        ):
            raise ValueError(f"{TUNED}: expected what `dparallel tune` writes, with {', '.join(TUNED_KEYS)}")
    except ValueError as error:
        raise ValueError(f"config: {file}: {str(error).removeprefix('config: ')}") from error
    return content


def take_tuned(
    content: dict[str, Any], file: Path | None, names: Sequence[str], loading: registry.Loading
) -> str | None:
    """A warning if the file's settings were measured on another device, or with weights of another type.
    Removes `TUNED` from `content`.

    Raises ValueError if they were measured with a model other than each of `names`.
    """
    tuned = content.pop(TUNED, None)
    if tuned is None:
        return None
    for name in names:
        # The fingerprint reads few of its tensors.
        if models.fingerprint(loading.stored(name)) != tuned["fingerprint"]:
            raise ValueError(
                f"config: {file} was tuned for {tuned['model']}, and {name} is another model; "
                "`dparallel tune` makes a file for it"
            )
    for name in names:
        here = {"device": registry.device_name(loading.device), **loading.weights(name)}
        others = [
            f"{word} {tuned[key]}, and this is {here[key]}"
            for key, word in CONDITIONS.items()
            if tuned.get(key, here[key]) != here[key]  # older files name no dtype
        ]
        if others:
            return f"config: {file} was tuned {'; '.join(others)}"
    return None


def take_drafter(
    content: dict[str, Any], drafters: list[str] | None, draft_size: int | None
) -> tuple[list[str] | None, int | None]:
    """The drafters and the draft size of the options, else of the file, whose size goes with its drafter
    alone. Removes both from `content`."""
    drafter, size = content.pop("drafter", None), content.pop("draft_size", None)
    if drafters and drafters != [drafter]:
        return drafters, draft_size
    return None if drafter is None else [drafter], size if draft_size is None else draft_size


def take_mask(content: dict[str, Any], option: int | None) -> int | None:
    """The mask token of the option, else of the file. Removes it from `content`, since the model is loaded
    with it."""
    of_file = content.pop("mask_id", None)
    return of_file if option is None else option


def config_with_policy(content: Mapping[str, Any], policy: str | None, **options: Any) -> DecodeConfig:
    """The config of a file's fields and of options that override them; None: an option is not given.

    policy: a text for `parse_policy`; it overrides the file's fields that decide, see `DECIDES`.
    Raises ValueError naming the option that does not fit.
    """
    config = DecodeConfig.from_dict(content)
    fields: Any = {name: value for name, value in options.items() if value is not None}
    if policy is not None or not DECIDES & content.keys():
        parse_policy(policy or POLICY)
        return config.with_rule(policy or POLICY, **fields)
    return config.replace(**fields)


def policy_in(content: Mapping[str, Any]) -> str | None:
    """The text for `parse_policy` of a file's fields that decide; None without such fields. Raises ValueError
    naming them if there is no such text."""
    if not (given := sorted(DECIDES & content.keys())):
        return None
    policy = policy_of(DecodeConfig.from_dict(content))
    if policy is None:
        raise ValueError(f"config: expected a rule that a text names, or --policy, got {', '.join(given)}")
    return policy


def config_without_policy(content: Mapping[str, Any], **options: Any) -> DecodeConfig:
    """`config_with_policy` without an option or a default for the policy."""
    fields: Any = {name: value for name, value in options.items() if value is not None}
    return DecodeConfig.from_dict(content).replace(**fields)


def changed_fields(config: DecodeConfig) -> dict[str, Any]:
    """The fields that differ from the defaults, in JSON's types, without rule and length."""
    values, defaults = config.with_rule(None).to_dict(), DecodeConfig().to_dict()
    return {name: values[name] for name in values if values[name] != defaults[name] and name != "gen_length"}


def policy_of(config: DecodeConfig) -> str | None:
    """The text for `parse_policy` of a config's fields that decide; None if there is no such text."""
    defaults = DecodeConfig()
    changed = {name for name in DECIDES if getattr(config, name) != getattr(defaults, name)}
    if changed <= {"rule"}:
        rule = config.rule or ONE
        return rule if isinstance(rule, str) else None
    of_each = any(isinstance(getattr(config, name), tuple) for name in changed)
    if changed <= {"selector", "threshold"} and not of_each:
        return f"{config.selector or 'entropy'}:{config.threshold}"
    return f"steps:{config.steps}" if changed == {"steps"} else None


def without_ends(config: DecodeConfig) -> DecodeConfig:
    """The config without the model's own end tokens: a response ends only where the config says."""
    return config.replace(eos_id=-1) if config.eos_id is None else config


def seed_of(seed: int, number: int) -> int:
    """seed + number, of 64 bits: the largest seed is followed by the least."""
    return (seed + number + 2**63) % 2**64 - 2**63


def with_seeds(config: DecodeConfig, numbers: Sequence[int]) -> DecodeConfig:
    """The config with a seed for each prompt, by its number, so that its samples do not depend on the
    batch."""
    if not isinstance(config.seed, int):
        return config
    return config.replace(seed=[seed_of(config.seed, number) for number in numbers])


def read_rows(file: str | Path) -> list[Fields]:
    """The rows of a table in a JSON file: a list of objects with a "rule" and other fields of `VARIED`, or
    with a "verifier" and other fields of `ADAPTIVE`.

    Raises FileNotFoundError, and ValueError naming the entry and the field that does not fit.
    """
    entries = files.json_list("rows", file)
    if not entries:
        raise ValueError(f"rows: {file} holds an empty list")
    for number, entry in enumerate(entries, 1):
        try:
            check_row(entry)
        except ValueError as error:
            raise ValueError(f"rows: {file}, entry {number}: {error}") from error
    return entries


def check_row(entry: Any) -> None:
    """Raise ValueError naming the field of a row that does not fit."""
    known = ADAPTIVE if isinstance(entry, Mapping) and "verifier" in entry else VARIED
    if not isinstance(entry, Mapping) or not isinstance(entry.get(known[0]), str):
        raise ValueError(f'expected an object with a "rule", or a "verifier", a text, got {shown(entry)}')
    if unknown := [name for name in entry if name not in known]:
        raise ValueError(f"expected fields of {list(known)}, got {unknown[0]!r}")
    if known is ADAPTIVE:
        speculation.adaptive.checked_options(**without(entry, "verifier"))
        return
    DecodeConfig.from_dict(without(entry, "draft_size"))
    if (size := entry.get("draft_size")) is not None:
        whole("draft_size", size, 0)


def without(entry: Fields, name: str) -> dict[str, Any]:
    """A row's fields but one."""
    return {field: value for field, value in entry.items() if field != name}
