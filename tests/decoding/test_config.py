"""DecodeConfig: what it refuses, what stands instead of what, and the same tokens however it comes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from conftest import golden
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import DecodeConfig, policies, rules
from dparallel_ext.decoding import ENGINE_FIELDS, DecodeKeywords
from dparallel_ext.decoding.config import DEFAULTS, OTHER_LIBRARIES, PER_SEQUENCE_FIELDS, POLICY_FIELDS

LLADA = golden.model("llada_tiny_a")
SDAR = golden.model("sdar_tiny_a")
PROMPTS = [[5, 6, 7], [8], [9, 10]]


def first(stats: dx.RowStats, masked: Tensor, step: Tensor) -> Tensor:
    return masked & (masked.cumsum(1) == 1)


# --- its fields ---------------------------------------------------------------------------------


def test_the_keywords_are_the_fields() -> None:
    assert get_type_hints(DecodeKeywords) == get_type_hints(DecodeConfig)
    assert set(DEFAULTS) == set(get_type_hints(DecodeKeywords))
    assert set(ENGINE_FIELDS) | set(PER_SEQUENCE_FIELDS) | set(POLICY_FIELDS) <= set(DEFAULTS)
    assert set(OTHER_LIBRARIES.values()) <= set(DEFAULTS)
    assert not set(OTHER_LIBRARIES) & set(DEFAULTS)


@pytest.mark.parametrize(
    ("call", "own"),
    [
        (dx.decode, ["model", "prompt", "config", "draft_size", "attention_mask", "streamer", "progress"]),
        (dx.Engine.submit, ["self", "prompt", "config", "on_draft"]),
        (dx.Engine(LLADA, lanes=1, max_length=8).submit, ["prompt", "config", "on_draft"]),
        (
            dx.Engine,
            [
                *("model", "config", "drafter", "draft_size", "verifier", "mixture", "window", "lookahead"),
                *("lanes", "max_length", "pages", "page_size", "max_waiting", "share"),
            ],
        ),
    ],
)
def test_signatures_name_every_field(call: Callable[..., Any], own: list[str]) -> None:
    found = inspect.signature(call).parameters
    assert list(found) == [*own, *DEFAULTS]
    assert {name: found[name].default for name in DEFAULTS} == DEFAULTS
    assert all(found[name].kind is inspect.Parameter.KEYWORD_ONLY for name in DEFAULTS)


def test_the_repr_says_what_differs_and_makes_the_same() -> None:
    assert repr(DecodeConfig()) == "DecodeConfig()"
    config = DecodeConfig(threshold=0.5, stop=[[1, 2]], suppress=np.array([3]))
    assert repr(config) == "DecodeConfig(threshold=0.5, suppress=(3,), stop=((1, 2),))"
    assert eval(repr(config)) == config


BAD: list[tuple[str, Any, str]] = [
    ("automaton", "[0-9]+", "automaton: expected Automaton, got str"),
    ("gen_length", b"ab", "gen_length: expected a whole number >= 0, got b'ab'"),
    ("gen_length", -1, "gen_length: expected a whole number >= 0, got -1"),
    ("gen_length", 1.5, "gen_length: expected a whole number >= 0, got 1.5"),
    ("gen_length", [3, True], "gen_length: expected a whole number >= 0, got True"),
    ("gen_length", "8", "gen_length: expected a whole number >= 0, got '8'"),
    ("infill", "no", "infill: expected True or False, got 'no'"),
    ("infill", None, "infill: expected True or False, got None"),
    ("block_length", 0, "block_length: expected a whole number >= 1, got 0"),
    ("sub_block_length", 0, "sub_block_length: expected a whole number >= 1, got 0"),
    ("steps", 0, "steps: expected a whole number >= 1, got 0"),
    ("threshold", "x", "threshold: expected a number or 1 of them, got 'x'"),
    ("threshold", float("nan"), r"threshold: expected a number >= 0 \(H <= TAU nats\), got nan"),
    ("threshold", [[0.5]], r"threshold: expected a number or shape \(1,\), got shape \(1, 1\)"),
    ("selector", "entropy", "selector: belongs to a threshold, .* got 'entropy'"),
    ("policy", [[0.0, 0.9]], r"policy: expected float32 \(1, 5\)"),
    ("policy", torch.zeros(2, 5, dtype=torch.float64), r"policy: expected float32 \(2, 5\)"),
    ("policy", [[9.0, 0.9, 1, None, 0]], "selector: expected ids"),
    (
        "policy",
        [[0.0, 0.9, 0, None, 0]],
        "min_commit: expected .*, got 0 for sequence 0",
    ),
    ("policy", "credit", "policy: expected rows or a function, got str; pass it as rule='credit'"),
    ("policy", rules.Credit(), "policy: expected rows or a function, got Credit; pass it as rule=Credit"),
    ("rule", "credit:x", "rule: expected credit"),
    ("rule", "entropy", "rule: expected entropy:TAU, got 'entropy' .*threshold: expected a number, got ''"),
    ("rule", 5, "rule: expected a Rule, its name or a function, got int"),
    ("threshold", {0.5, 0.6}, "threshold: expected a number or 1 of them, got {"),
    ("min_commit", 2, "min_commit: belongs to a threshold, .* got 2"),
    ("max_commit", 2, "max_commit: belongs to a threshold, .* got 2"),
    ("score", "best", "score: expected one of"),
    ("score", "", "score: expected one of .*, got ''"),
    ("score", False, "score: expected one of .*, got False"),
    ("cache", "all", r"cache: expected one of \['none', 'prefix', 'dual', 'block', 'window'\], got 'all'"),
    ("cache", np.array(["none", "dual"]), r"cache: expected one of .*, got array"),
    ("cache", 5, "cache: expected one of .*, got 5"),
    ("refresh", 0, "refresh: expected a whole number >= 1, got 0"),
    ("active_blocks", 0, "active_blocks: expected a whole number >= 1, got 0"),
    ("active_blocks", None, "active_blocks: expected a whole number >= 1, got None"),
    ("open_at", 1.5, "open_at: expected a number from 0 to 1, got 1.5"),
    ("open_at", "x", "open_at: expected a number from 0 to 1, got 'x'"),
    ("activate_at", -0.5, "activate_at: expected a number from 0 to 1, got -0.5"),
    ("batch_invariant", 2, "batch_invariant: expected True or False, got 2"),
    ("graphs", "yes", "graphs: expected True or False, got 'yes'"),
    ("temperature", -0.5, "temperature: expected a finite number >= 0, got -0.5"),
    ("temperature", "hot", "temperature: expected a finite number >= 0, got 'hot'"),
    ("top_p", 1.5, "top_p: expected a number from 0 to 1, got 1.5"),
    ("top_k", 1.5, "top_k: expected a whole number >= 0"),
    ("top_k", -1, "top_k: expected a whole number >= 0"),
    ("suppress", [1.5], r"suppress: expected int64 \(P,\), got torch.float32"),
    ("suppress", "ab", "suppress: expected int64 .* got str"),
    ("mask_id", -1, "mask_id: expected a whole number >= 0, got -1"),
    ("eos_id", -2, "eos_id: expected a whole number >= -1, got -2"),
    ("eos_id", [5, -1], "eos_id: expected a whole number >= 0, got -1"),
    ("eos_id", [[5]], "eos_id: expected a whole number >= 0, got "),
    ("eos_id", "5", "eos_id: expected a whole number >= -1, got '5'"),
    ("stop", 5, "stop: expected sequences of token ids, got the number 5"),
    ("stop", [5], "stop: expected sequences of token ids, got the number 5"),
    ("stop", [[]], "stop: expected sequences of at least one token"),
    ("stop", None, "stop: expected int64"),
    ("seed", 1.5, "seed: expected an integer or int64"),
    ("seed", "x", "seed: expected an integer of 64 bits or int64"),
    ("seed", 2**63, "seed: expected an integer of 64 bits or int64 .*, got 9223372036854775808"),
    ("seed", torch.zeros(2, 2), r"seed: expected an integer or int64 \(B,\), got torch.float32 \(2, 2\)"),
    ("record", "yes", "record: expected True or False, got 'yes'"),
    ("repetition_penalty", 0.0, "repetition_penalty: expected a number from 0.01 to 100, got 0.0"),
    ("presence_penalty", 2.5, "presence_penalty: expected a number from -2 to 2, got 2.5"),
    ("frequency_penalty", "a", "frequency_penalty: expected a number from -2 to 2, got 'a'"),
    ("logprobs", 1.0, "logprobs: expected True or False, got 1.0"),
    ("top_logprobs", None, "top_logprobs: expected a whole number >= 0, got None"),
]


def test_every_field_is_looked_at() -> None:
    assert {name for name, _, _ in BAD} == set(DEFAULTS)


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_values_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**{name: value})
    with pytest.raises(ValueError, match=message):
        DecodeConfig().replace(**{name: value})  # type: ignore[misc]
    with pytest.raises(ValueError, match=message):
        dx.decode(LLADA, [1], **{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.5, "steps": 4}, "steps: belongs to the fixed schedule"),
        ({"threshold": 0.5, "min_commit": 0}, "min_commit: expected a"),
        ({"threshold": 0.5, "min_commit": 3, "max_commit": 2}, "max_commit: expected at least min_commit"),
        ({"threshold": 0.5, "score": "margin"}, "score: only 'quota' chooses its score"),
        ({"threshold": 1.5, "selector": "margin"}, "threshold: expected a number >= 0 and <= 1"),
        ({"policy": first, "rule": "credit"}, "policy: give it alone, without rule"),
        ({"policy": first, "threshold": 0.5}, "policy: give it alone, without threshold"),
        (
            {"rule": "credit+entropy:0.5", "threshold": 0.5},
            "rule: names a policy row, .* without threshold",
        ),
        (
            {"rule": first, "score": "margin"},
            "rule: a function decides without a policy row, .* without score",
        ),
        ({"rule": "edit+confidence:0.8"}, "rule: Edit decides without a policy row, so .* without threshold"),
        ({"rule": rules.Edit(), "steps": 4}, "rule: Edit decides without a policy row, so .* without steps"),
        ({"rule": "distance+one", "min_commit": 2}, "rule: Distance decides .* without min_commit"),
        ({"rule": "credit", "temperature": 0.5}, "temperature: Credit commits tokens of its own"),
        ({"rule": "credit+margin:0.5"}, "selector: Credit has no margin to rank by"),
        (
            {"block_length": 8, "sub_block_length": 3},
            "sub_block_length: expected a divisor of block_length 8",
        ),
        ({"cache": "prefix", "refresh": 2}, "refresh: belongs to cache \"dual\", got cache='prefix'"),
        (
            {"gen_length": [3, 4], "seed": [1, 2, 3]},
            "seed: expected one value or 2, as many as gen_l",
        ),
        (
            {"threshold": [0.5, 0.6], "selector": ["entropy"] * 3},
            "selector: expected .* 2, .* got 3",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gen_length": [3, 4]}, "gen_length: expected a number or one for each of 3, got 2"),
        ({"threshold": [0.5, 0.6]}, r"threshold: expected a number or shape \(3,\), got shape \(2,\)"),
        ({"policy": policies.make("quota", 1, batch=2)}, r"policy: expected float32 \(3, 5\)"),
        ({"seed": [1, 2], "temperature": 1.0}, r"seed: expected an integer or int64 \(3,\)"),
        ({"cache": "block"}, "cache: expected .* since LLaDA is not block-causal, got 'block'"),
        ({"refresh": 2}, "refresh: belongs to cache \"dual\", got cache='none'"),
        ({"eos_id": 512}, "eos_id: expected one of the model's 512 token ids, got 512"),
        ({"eos_id": (5, 512)}, "eos_id: expected one of the model's 512 token ids, got 512"),
        ({"mask_id": 512}, "mask_id: expected one of the model's 512 token ids, got 512"),
        ({"sub_block_length": 5}, "sub_block_length: expected a divisor of block_length 32, got 5"),
    ],
)
def test_what_depends_on_the_call_is_checked_there(fields: dict[str, Any], message: str) -> None:
    config = DecodeConfig(**fields)
    with pytest.raises(ValueError, match=message):
        dx.decode(LLADA, PROMPTS, config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("treshold", "got an unexpected keyword argument 'treshold'. Did you mean 'threshold'?"),
        ("max_tokens", "got an unexpected keyword argument 'max_tokens'. Did you mean 'gen_length'?"),
        ("eos_token_id", "got an unexpected keyword argument 'eos_token_id'. Did you mean 'eos_id'?"),
        ("generator", "got an unexpected keyword argument 'generator'. Did you mean 'seed'?"),
        ("alg", "got an unexpected keyword argument 'alg'. Did you mean 'selector'?"),
        ("use_cache", "got an unexpected keyword argument 'use_cache'. Did you mean 'cache'?"),
        ("stop_token", "got an unexpected keyword argument 'stop_token'. Did you mean 'eos_id'?"),
        ("max_post_steps", "got an unexpected keyword argument 'max_post_steps'. Did you mean 'rule'?"),
        ("num_beams", "got an unexpected keyword argument 'num_beams'$"),
    ],
)
def test_unknown_keywords_are_named_with_the_nearest_or_what_stands_for_them(name: str, message: str) -> None:
    with dx.Engine(LLADA, lanes=1, max_length=64) as engine:
        calls: dict[str, Callable[..., Any]] = {
            "decode": lambda **more: dx.decode(LLADA, [1], **more),
            "Engine": lambda **more: dx.Engine(LLADA, **more),
            "submit": lambda **more: engine.submit([1], **more),
            "replace": DecodeConfig().replace,
        }
        for where, call in calls.items():
            with pytest.raises(TypeError, match=f"{where}\\(\\) {message}".replace("?", r"\?")):
                call(**{name: 0.5})
    with pytest.raises(ValueError, match="config: expected a DecodeConfig, got dict"):
        dx.decode(LLADA, [1], {"threshold": 0.5})  # type: ignore[arg-type]


# --- values -------------------------------------------------------------------------------------


def test_it_does_not_change_and_compares_by_value() -> None:
    ids, tau = torch.tensor([3, 4]), torch.tensor([0.25, 0.5])
    config = DecodeConfig(suppress=ids, threshold=tau, seed=np.array([1, 2]), gen_length=torch.tensor([3, 4]))
    same = DecodeConfig(suppress=[3, 4], threshold=(0.25, 0.5), seed=[1, 2], gen_length=[3, 4])
    assert config == same
    assert hash(config) == hash(same)
    assert len({config, same, DecodeConfig()}) == 2
    assert config != same.replace(threshold=0.5)
    ids[0], tau[0] = 9, 9.0
    assert (config.suppress, config.threshold) == ((3, 4), (0.25, 0.5))
    with pytest.raises(FrozenInstanceError):
        config.seed = 5  # type: ignore[misc]
    rows = policies.make("quota", 2, batch=3)
    assert DecodeConfig(policy=rows) == DecodeConfig(policy=rows.tolist())
    assert hash(DecodeConfig(rule=rules.Credit())) == hash(DecodeConfig(rule=rules.Credit()))


def test_numbers_of_numpy_and_torch_become_plain() -> None:
    config = DecodeConfig(
        gen_length=np.int64(8),
        block_length=torch.tensor(4),
        threshold=np.float32(0.5),
        min_commit=torch.tensor(2),
        temperature=torch.tensor([0.5]),
        top_k=np.int32(3),
        graphs=np.bool_(False),
        stop=[np.array([1, 2]), torch.tensor([3])],
    )
    assert all(type(value) in (int, float, bool, tuple, type(None)) for value in vars(config).values())
    assert config == DecodeConfig(
        gen_length=8,
        block_length=4,
        threshold=0.5,
        min_commit=2,
        temperature=0.5,
        top_k=3,
        graphs=False,
        stop=[[1, 2], [3]],
    )


def test_another_rule_takes_the_place_of_all_that_decides() -> None:
    config = DecodeConfig(threshold=0.5, selector="margin", min_commit=2, temperature=0.5, gen_length=8)
    assert config.with_rule("one") == DecodeConfig(rule="one", temperature=0.5, gen_length=8)
    assert config.with_rule("credit", temperature=0.0).rule == "credit"
    rows = DecodeConfig(policy=policies.make("quota", 2))
    assert rows.with_rule("entropy:0.5") == DecodeConfig(rule="entropy:0.5")


# --- decode -------------------------------------------------------------------------------------

SOME: list[dict[str, Any]] = [
    {},
    {"threshold": torch.tensor([0.5, 2.0, 4.0]), "selector": "entropy", "max_commit": 3},
    {"steps": 8, "score": "margin", "cache": "dual", "refresh": 2},
    {"rule": "credit+confidence:0.3", "cache": "prefix", "sub_block_length": 4},
    {"policy": policies.make("quota", 2, batch=3), "suppress": torch.arange(9), "eos_id": (11, 12)},
    {"policy": first},
    {"threshold": 3.0, "temperature": 0.8, "top_p": 0.9, "seed": torch.tensor([5, 6, 7])},
    {"rule": "credit", "logprobs": True, "top_logprobs": 3},
]


@pytest.mark.parametrize("fields", SOME, ids=range(len(SOME)))
def test_a_config_decodes_as_its_keywords(fields: dict[str, Any]) -> None:
    fields = {"gen_length": 16, "block_length": 8, **fields}
    expected = dx.decode(LLADA, PROMPTS, **fields)
    out = dx.decode(LLADA, PROMPTS, DecodeConfig(**fields))
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    config = DecodeConfig(**fields)
    if not callable(config.policy):
        config = DecodeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert config == DecodeConfig(**fields)
        assert torch.equal(dx.decode(LLADA, PROMPTS, config).sequences, expected.sequences)


def test_keywords_stand_instead_of_the_fields() -> None:
    config = DecodeConfig(gen_length=8, block_length=8, threshold=0.1, eos_id=11)
    expected = dx.decode(LLADA, PROMPTS, gen_length=8, block_length=8, threshold=4.0, selector="entropy")
    out = dx.decode(LLADA, PROMPTS, config, threshold=4.0, eos_id=None)
    assert torch.equal(out.sequences, expected.sequences)
    assert int(out.forwards) == int(expected.forwards)
    assert config.threshold == 0.1
    with pytest.raises(ValueError, match="steps: belongs to the fixed schedule"):
        dx.decode(LLADA, PROMPTS, config, steps=8)


def test_samples_without_a_seed_are_drawn_in_the_call() -> None:
    """Not when the config is made: a config is used again, and its samples differ."""
    config = DecodeConfig(gen_length=16, temperature=9.0, threshold=9.0)
    torch.manual_seed(0)
    one, two = (dx.decode(LLADA, [1], config).sequences for _ in range(2))
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(dx.decode(LLADA, [1], config).sequences, one)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        rules.Credit(0.6, 0.9, 0.3),
        rules.Edit(0.8, 0.7, 4),
        rules.Soft(0.4, 0.7, 16),
        rules.Levenshtein(0.03, 0.05, 4, 7, 9),
        rules.SchED(14, 8, "linear"),
        rules.Prophet(3, 4),
        "sched:14,8+entropy:0.5",
        None,
    ],
)
@pytest.mark.parametrize("row", [{}, {"threshold": 0.3}, {"score": "entropy"}], ids=str)
def test_rules_in_files(rule: Any, row: dict[str, Any]) -> None:
    if isinstance(rule, str) or (rule is not None and rule.alone):
        row = {}
    config = DecodeConfig(rule=rule, gen_length=8, **row)
    written = json.dumps(config.to_dict(), allow_nan=False)
    again = DecodeConfig.from_dict(json.loads(written))
    assert again.to_dict() == config.to_dict()
    expected, out = (dx.decode(LLADA, PROMPTS, each, record=True) for each in (config, again))
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.trajectory.step, expected.trajectory.step)


def test_what_a_file_cannot_hold() -> None:
    for fields, message in (
        ({"rule": first}, "rule: expected one of .* got a function"),
        ({"policy": first}, "policy: a function cannot be written"),
        ({"rule": rules.Credit(kept=3)}, "rule: expected one of .*, got Credit"),
    ):
        with pytest.raises(ValueError, match=message):
            DecodeConfig(**fields).to_dict()
    with pytest.raises(ValueError, match=r"got 'temprature'\. Did you mean 'temperature'"):
        DecodeConfig.from_dict({"temprature": 0.5})
    with pytest.raises(ValueError, match="config: expected fields by name, got list"):
        DecodeConfig.from_dict([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="graphs: expected True or False, got 'no'"):
        DecodeConfig.from_dict({"graphs": "no"})


# --- the engine ---------------------------------------------------------------------------------


def test_an_engine_has_a_config_and_each_request_another() -> None:
    config = DecodeConfig(cache="dual", block_length=8, gen_length=16, threshold=2.0)
    alone = [dx.decode(LLADA, [5, 6], config), dx.decode(LLADA, [5, 6], config, threshold=0.1)]
    other = DecodeConfig(gen_length=8, rule="credit", eos_id=11)
    alone.append(dx.decode(LLADA, [5, 6], other, cache="dual", block_length=8))
    with dx.Engine(LLADA, config, lanes=2, max_length=64) as engine:
        assert engine.config == config.replace(sub_block_length=8, mask_id=LLADA.mask_id)
        handles = [engine.submit([5, 6]), engine.submit([5, 6], threshold=0.1), engine.submit([5, 6], other)]
        for handle, expected in zip(handles, alone, strict=True):
            done = handle.result(60)
            assert done.tokens == expected.responses[0][: int(expected.kept)].tolist()
            assert done.nfe == int(expected.nfe)


def test_keywords_of_an_engine_stand_instead_of_its_config() -> None:
    config = DecodeConfig(cache="dual", block_length=8, refresh=2)
    with dx.Engine(LLADA, config, lanes=1, max_length=64, cache="none", refresh=None) as engine:
        assert (engine.config.cache, engine.config.block_length, engine.config.refresh) == ("none", 8, None)


def test_caches_where_a_config_names_none() -> None:
    for model, cache in ((LLADA, "dual"), (SDAR, "block")):
        with dx.Engine(model, DecodeConfig(), lanes=1, max_length=64) as engine:
            assert engine.config.cache == engine.cache == cache
            engine.submit([1], DecodeConfig(gen_length=4, cache=cache)).result(60)


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("cache", "dual", "none"),
        ("block_length", 8, 16),
        ("sub_block_length", 4, 8),
        ("refresh", 2, 3),
        ("active_blocks", 1, 2),
        ("open_at", 0.1, 0.2),
        ("activate_at", 0.95, 0.5),
        ("batch_invariant", False, True),
        ("graphs", True, False),
        ("mask_id", 511, 3),
    ],
)
def test_what_belongs_to_the_engine(name: str, value: Any, other: Any) -> None:
    assert name in ENGINE_FIELDS
    config = DecodeConfig(cache="dual", block_length=8, sub_block_length=4, refresh=2, mask_id=511)
    with dx.Engine(LLADA, config, lanes=1, max_length=64) as engine:
        expected = engine.submit([5, 6], gen_length=8).result(60)
        assert engine.submit([5, 6], gen_length=8, **{name: value}).result(60).tokens == expected.tokens
        message = f"{name}: belongs to the engine, which has {value!r}, .* got {other!r}"
        with pytest.raises(ValueError, match=message):
            engine.submit([5, 6], **{name: other})
        with pytest.raises(ValueError, match=message):
            engine.submit([5, 6], DecodeConfig(**{name: other}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"record": True}, "record: an engine keeps no trajectory, so expected False"),
        ({"eos_id": 512}, "eos_id: expected one of the model's 512 token ids, got 512"),
        ({"suppress": [512]}, r"suppress: expected token ids in \[0, 512\), got 512"),
        ({"threshold": [0.5, 0.6]}, r"threshold: expected a number or shape \(1,\), got shape \(2,\)"),
        ({"sub_block_length": 4, "steps": 8}, "steps: the fixed schedule is for whole blocks"),
    ],
)
def test_an_engine_refuses_its_config_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.Engine(LLADA, DecodeConfig(**fields), lanes=1, max_length=64)


def test_an_engine_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with dx.Engine(LLADA, DecodeConfig(temperature=1.0), lanes=1, max_length=64) as engine:
        assert torch.equal(torch.get_rng_state(), before)
        rows = policies.make("quota", 4)
        done = engine.submit([5, 6], policy=rows, gen_length=8, temperature=0.0).result(60)
        assert done.nfe == 2


def test_no_seeds_for_no_prompts() -> None:
    assert DecodeConfig(gen_length=[], threshold=[], seed=[]) == DecodeConfig(
        gen_length=(), threshold=(), seed=()
    )
