"""Measures every model with every policy or drafter, and goes on with the results of an earlier run."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import dparallel_ext as dx
from dparallel_ext.arguments import temperature_in_force
from dparallel_ext.decoding.config import DEFAULTS
from dparallel_ext.decoding.decode import resolve
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.rules import ONE
from dparallel_ext.speculation.speculate import DIFFUSION_FIELDS, check_causal

from . import registry
from .configs import Fields, changed_fields, check_row, parse_policy, without
from .evaluate import (
    PLAIN,
    Answer,
    check_named,
    drafted_by,
    drafter_fields,
    evaluate,
    evaluate_adaptive,
    evaluate_drafter,
)
from .problems import Problems, held_out
from .recording import Recording

POLICIES = (ONE, "confidence:0.9", "entropy:0.5")
"""The policies that a diffusion model is measured with if none is named."""
DRAFTERS = (PLAIN, "ngram")
"""The same for an autoregressive model."""


def sweep(
    names: Iterable[str],
    policies: Iterable[str | Fields],
    known: Iterable[dict[str, Any]] = (),
    *,
    drafters: Iterable[str] = DRAFTERS,
    draft_size: int | None = None,
    config: dx.DecodeConfig | None = None,
    problems: int | Problems = 500,
    seed: int = 0,
    batch: int = 100,
    chat: bool | None = None,
    recording: Recording | None = None,
    loading: registry.Loading | None = None,
) -> Iterable[dict[str, Any]]:
    """Run `evaluate` for every model and policy (`evaluate_adaptive` for a row with a verifier), and
    `evaluate_drafter` for every autoregressive model and drafter; load each model once, and yield each
    result.

    policies: texts, or the fields of a row. drafters: "plain" for none. draft_size: for the drafters; if all
    models are diffusion models, `decode`'s for every policy that has no draft size of its own; such a result
    has same_texts, the number of responses equal to the same policy's without drafts. config: the fields of
    all results; fields of masked diffusion are refused where all models are autoregressive, and are for
    diffusion models alone if there are both kinds. known: results of an earlier run, which are not measured
    again; results of older versions, which name no device, mask token or dtype, count if none is asked for.
    The other arguments are those of `evaluate`.
    """
    entries = [each if isinstance(each, Mapping) else {"rule": each} for each in policies]
    for entry in entries:
        if "verifier" not in entry:
            parse_policy(entry.get("rule", ""))
        check_row(entry)
        if "verifier" in entry:
            registry.check_verifier(entry["verifier"])
    known, loading = list(known), loading or registry.Loading()
    config = causal_config = config or dx.DecodeConfig()
    problem_set = problems if isinstance(problems, Problems) else held_out(problems, seed)
    models = [(name, registry.is_causal(name, config.cache)) for name in names]
    if all(causal for _, causal in models):
        check_causal(vars(config))
    else:  # each model takes the fields of its kind
        cleared: Any = {field: DEFAULTS[field] for field in DIFFUSION_FIELDS}
        causal_config = config.replace(**cleared)
    if not any(causal for _, causal in models):  # else it is the drafters'
        entries = [each if "verifier" in each else {"draft_size": draft_size, **each} for each in entries]
    drafters, of_causal = list(drafters), loading
    if not all(causal for _, causal in models) or {*drafters} == {PLAIN}:
        of_causal = replace(loading, mask_id=None)  # it is the diffusion models', or nobody's
    in_chat = {}
    for name, causal in models:  # before the first measurement, which may take hours
        of_name = of_causal if causal else loading
        if causal:
            _check_drafters(name, drafters, causal_config, of_name)
        else:
            _check_policies(name, entries, config, of_name)
        problem_set.length(name)
        in_chat[name] = registry.template_of(name, chat) is not None
    for name, causal in models:
        of_name = of_causal if causal else loading
        conditions = of_name.conditions(name)
        unasked = {key for key, value in vars(registry.Loading()).items() if getattr(of_name, key) == value}
        older = {key: conditions[key] for key in unasked}  # of rows that do not name them
        results = {_key(older | row): row for row in known}
        of_problems = {"gen_length": problem_set.length(name), "chat": in_chat[name]}
        conditions |= {**problem_set.description, **of_problems}
        shared = {"problems": problem_set, "batch": batch, "chat": in_chat[name], "recording": recording}
        if causal:
            fixed = causal_config, draft_size
            yield from _drafted(name, drafters, *fixed, results, of_name, conditions, shared)
        else:
            yield from _by_policy(name, entries, config, results, of_name, conditions, shared)


def _check_policies(
    name: str, entries: Iterable[Fields], config: dx.DecodeConfig, loading: registry.Loading
) -> None:
    """Raise ValueError or FileNotFoundError for an entry that does not fit the model, which is not loaded."""
    stored = loading.stored(name)
    for entry in entries:
        if "verifier" in entry:
            registry.check_verifier(str(entry["verifier"]), name)
        else:
            size: Any = entry.get("draft_size")
            resolve(stored, _with_entry(config, entry), 1, size)


def _check_drafters(
    name: str, drafters: Iterable[str], config: dx.DecodeConfig, loading: registry.Loading
) -> None:
    """The same for the drafters of an autoregressive model."""
    stored = loading.stored(name)
    make_settings(config, stored, "none", 1)
    for drafter in drafters:
        check_named(drafter)
        if drafter != PLAIN:
            loaded = registry.load_drafter(drafter, stored.device, loading.dtype_for(name))
            if loaded is not None:
                loaded.check(stored)


def _with_entry(config: dx.DecodeConfig, entry: Fields) -> dx.DecodeConfig:
    """The config of a row: `config` with the fields of the entry."""
    return config.with_rule(str(entry["rule"])).replace(**without(entry, "draft_size"))


def _by_policy(
    name: str,
    entries: Iterable[Fields],
    config: dx.DecodeConfig,
    known: Mapping[str, dict[str, Any]],
    loading: registry.Loading,
    conditions: Fields,
    settings: dict[str, Any],
) -> Iterable[dict[str, Any]]:
    """The rows of a diffusion model. config: the fields that an entry does not have. conditions: the rows'
    fields about weights, problems and how these are put. settings: of `evaluate`."""
    loaded: tuple[Any, Any] | None = None
    plain: dict[dx.DecodeConfig, list[Answer]] = {}
    for entry in entries:
        if "verifier" in entry:
            of_row = config.with_rule(None)
            judge, options = str(entry["verifier"]), without(entry, "verifier")
            changed = changed_fields(of_row) | options
            row = known.get(_key({"model": name, "policy": judge, "config": changed, **conditions}))
            if row is None:
                loaded = loaded or loading.load(name)
                row = evaluate_adaptive(
                    name, judge, options=options, config=of_row, loaded=loaded, **settings
                )
            yield row
            continue
        text = str(entry["rule"])
        size: Any = entry.get("draft_size")
        of_row = _with_entry(config, entry)
        changed = changed_fields(of_row)
        identity = {"model": name, "policy": text, "config": changed | drafted_by(size), **conditions}
        row = known.get(_key(identity))
        if row is None:
            loaded = loaded or loading.load(name)
            arguments: dict[str, Any] = {"config": of_row, "loaded": loaded, **settings}
            answers: list[Answer] = []
            row = evaluate(name, text, draft_size=size, answers=answers, **arguments)
            if not size:
                plain[of_row] = answers
            elif of_row not in plain and _key(identity | {"config": changed}) in known:
                # That row is of an earlier run, whose texts are gone.
                evaluate(name, text, answers=plain.setdefault(of_row, []), **arguments)
            if size and of_row in plain:
                row["same_texts"] = sum(map(operator.eq, plain[of_row], answers))
        yield row


def _drafted(
    name: str,
    drafters: Iterable[str],
    config: dx.DecodeConfig,
    draft_size: int | None,
    known: Mapping[str, dict[str, Any]],
    loading: registry.Loading,
    conditions: Fields,
    settings: Mapping[str, Any],
) -> Iterable[dict[str, Any]]:
    """The rows of an autoregressive model. conditions, settings: see `_by_policy`."""
    loaded: tuple[Any, Any] | None = None
    plain: list[Answer] = []
    compares = False
    for drafter in drafters:
        compares |= drafter == PLAIN
        drafter_name = None if drafter == PLAIN else drafter
        changed = drafter_fields(config, drafter_name, draft_size)
        row = known.get(_key({"model": name, "policy": drafter, "config": changed, **conditions}))
        if row is None:
            loaded = loaded or loading.load(name)
            answers = list[Answer]()
            arguments: dict[str, Any] = {"config": config, "draft_size": draft_size, "loaded": loaded}
            row = evaluate_drafter(name, drafter_name, answers=answers, **arguments, **settings)
            if drafter == PLAIN:
                plain = answers
            elif compares and not plain:  # its row is of an earlier run, whose texts are gone
                evaluate_drafter(name, None, answers=plain, **arguments, **settings)
            if plain:
                row |= compared(loaded[0], config, plain, answers)
        yield row


def compared(
    model: Any, config: dx.DecodeConfig, plain: Sequence[Answer], drafted: Sequence[Answer]
) -> dict[str, Any]:
    """same_texts: the number of answers equal to plain decoding's. gaps: for the others, where decoding is
    greedy, the difference of the two best logits where they differ first, since rounding may choose either of
    two that are near."""
    same = sum(map(operator.eq, plain, drafted))
    if temperature_in_force(config.temperature) > 0:
        return {"same_texts": same}
    gaps = []
    for answer, other in zip(plain, drafted, strict=True):
        if answer == other:
            continue
        pairs = enumerate(itertools.zip_longest(answer.tokens, other.tokens))
        at = next(i for i, (a, b) in pairs if a != b)
        with torch.inference_mode():
            ids = torch.tensor([answer.prompt + answer.tokens[:at]], device=model.device)
            logits = model(ids).logits[0, -1].float()
            logits[[*(config.suppress or ())]] = -torch.inf
            best = logits.topk(2).values
        gaps.append(round(float(best[0] - best[1]), 5))
    return {"same_texts": same, "gaps": sorted(gaps)}


def _key(row: Mapping[str, Any]) -> str:
    """A key of all settings that a result depends on."""
    defaults = {"config": {}, "problems": 500, "seed": 0, "chat": False, "fp8": False}
    known = {**defaults, **row}
    of_problems = ("data", "data_sha256", "checker", "gen_length")
    names = ("model", "policy", "device", "mask_id", "dtype", *of_problems, *defaults)
    return json.dumps([known.get(name) for name in names], sort_keys=True)
