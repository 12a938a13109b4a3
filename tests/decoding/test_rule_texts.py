"""How rules are told: their texts and names, and what is said of those that do not fit."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import ROOT, golden
from dparallel import registry
from test_rules import MASK, PROMPTS

import dparallel_ext as dx
from dparallel_ext import models, rules
from dparallel_ext.rules import Credit, Decision, Edit, Levenshtein, Prophet, Rule, SchED, Where


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "nonsense"}, r"rule: expected 'one', .* or a rule of \['credit'"),
        (
            {"rule": "entropy:-1"},
            r"rule: expected entropy:TAU, got 'entropy:-1' \(threshold: expected .* >= 0",
        ),
        ({"rule": "steps:"}, r"rule: expected steps:N, got 'steps:' \(N: expected a whole number, got ''\)"),
        ({"rule": "credit:0.7,2"}, r"rule: expected credit\[:SCALE,DECAY,POWER\], got .*decay: expected"),
        ({"rule": "credit:nan"}, "scale: expected a finite number"),
        ({"rule": "credit+"}, "rule: expected 'one', steps:N, SELECTOR:THRESHOLD"),
        ({"rule": Credit}, "rule: expected a Rule, its name or a function, got the class Credit"),
        ({"rule": "credit+nonsense:1"}, "rule: expected 'one', steps:N, SELECTOR:THRESHOLD"),
        ({"rule": "prophet"}, r"rule: expected prophet:START\[,WIDTH\], got 'prophet'"),
        ({"rule": "prophet:1.5"}, "rule: expected prophet.*start: expected a whole number, got '1.5'"),
        ({"rule": "sched:7.5,2.5,square"}, "kind: expected one of"),
        ({"rule": 5}, "rule: expected a Rule, its name or a function, got int"),
        ({"rule": "entropy:0.5", "threshold": 0.5}, "rule: names a policy row, so give it without threshold"),
        ({"rule": "credit", "temperature": 0.5}, "temperature: Credit commits tokens of its own"),
        ({"rule": "credit+margin:0.5"}, "selector: Credit has no margin to rank by"),
        ({"rule": lambda s, m, n: m, "threshold": 0.5}, "rule: a function decides without a policy row"),
        ({"rule": "credit", "policy": lambda s, m, n: m}, "policy: give it alone, without rule"),
        ({"rule": lambda s, m, n: m.float()}, "policy: expected a bool Tensor"),
        ({"rule": lambda s, m, n: m.to("meta")}, "policy: expected on cpu, got meta"),
        ({"rule": lambda s, m, n: m.to_sparse()}, "policy: expected a dense Tensor, got a sparse_coo one"),
    ],
)
def test_what_does_not_fit_is_said(llada: models.Model, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dx.decode(llada, PROMPTS, gen_length=8, block_length=8, **settings)


JUNK = (
    "",
    "x",
    " ",
    "nan",
    "-inf",
    "1e400",
    "9" * 5000,
    "0x1",
    "1.5.",
    "\0",
    "\ud800",
    "+",
    ":",
    "1,,",
    "1,2,3,4,5,6",
)


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:9])
def test_a_text_that_is_no_rule_is_refused_in_words_of_ours(junk: str) -> None:
    """In the place of each rule's parameters, before and behind them; what Python says is not shown."""
    for entry in rules.menu():
        name, usual = entry["name"], entry["usual"]
        for text in (
            f"{name}:{junk}",
            f"{name}:{usual},{junk}",
            f"{name}:{junk}{usual}",
            f"{name}+{junk}",
            junk + name,
        ):
            try:
                dx.rules.parse(text)
            except ValueError as error:
                said = str(error)
                assert said.startswith("rule: expected "), said
                assert len(said) < 700
                for python in (
                    "could not convert",
                    "invalid literal",
                    "embedded null",
                    "can't encode",
                    "digits",
                ):
                    assert python not in said


@dataclass(frozen=True)
class Reads(Rule):
    reads: Any = "masks"


@dataclass(frozen=True)
class Masked(Rule):
    def decide(self, stats: Any, where: Where, state: Any) -> Any:
        return where.masked


@dataclass(frozen=True)
class Remasks(Rule):
    wide: bool = True
    edits: int = 0
    reads = "block"

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        return Decision(remask=where.decoded if self.wide else where.decoded[:, :2])


@dataclass(frozen=True)
class Narrow(Rule):
    """Has a state of five columns, where a pass has more; or asks for the logits of ids (W, C)."""

    asks: str

    def new_state(self, lanes: int, columns: int, device: torch.device) -> Any:
        return (torch.zeros((lanes, 5)),)

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        if self.asks == "remember":
            where.remember(state[0], stats.confidence)
        elif self.asks == "recall":
            where.recall(state[0])
        else:
            where.logits(stats.token if self.asks == "flat" else stats.token[..., None].int())
        return Decision()


@dataclass(frozen=True)
class Decides(Rule):
    """One field of a decision, of two columns."""

    field: str

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        return Decision(**{self.field: where.masked[:, :2]})


@dataclass(eq=True)
class Unfrozen(Rule):
    bar: float = 0.5


@dataclass(frozen=True)
class Sure(Rule):
    bar: float = 0.5

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        return Decision(where.masked & (stats.confidence >= self.bar))


@dataclass(frozen=True)
class Own(Rule):
    """Decides nothing by itself, and has the fields and the state that it is given."""

    row: Any = None
    edits: Any = 0
    reads: Any = "masked"
    state: Any = ()

    def new_state(self, lanes: int, columns: int, device: torch.device) -> Any:
        return self.state

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        return Decision()


def test_what_a_rule_of_a_users_own_lacks_is_said(llada: models.Model) -> None:
    for rule, error, said in (
        (Rule(), NotImplementedError, r"Rule: expected a method decide\(stats, where, state\)"),
        (Reads(), ValueError, "Reads: reads: expected one of .*'block'.* got 'masks'"),
        (Masked(), ValueError, "Masked: decide: expected a Decision, got Tensor"),
        (Remasks(), ValueError, "Remasks: remask: expected None of a rule whose edits are 0"),
        (Remasks(wide=False, edits=1), ValueError, r"Remasks: remask: .* \(3, 8\), got .*\(3, 2\)"),
        (Decides("commit"), ValueError, r"Decides: commit: expected a bool Tensor \(3, 8\), got .*\(3, 2\)"),
        (Decides("token"), ValueError, r"Decides: token: expected an int64 Tensor \(3, 8\), got .*\(3, 2\)"),
        (Decides("impossible"), ValueError, r"Decides: impossible: .* bool Tensor \(3,\), got .*\(3, 2\)"),
        (Unfrozen(), ValueError, "Unfrozen: expected a rule that can be hashed, such as a frozen dataclass"),
        (Own(state=[1]), ValueError, "Own: expected a rule that can be hashed, .* 'list'"),
        (Own(row="foo:3"), ValueError, "Own: row: expected a policy row, .*, got 'foo:3'"),
        (Own(row="credit+one"), ValueError, "Own: row: expected a policy row, .*, got 'credit.one'"),
        (Own(row=3), ValueError, "Own: row: expected a policy row, .*, got 3"),
        (Own(edits=math.inf, reads="block"), ValueError, "Own: edits: expected a whole number >= 0, got inf"),
        (Own(edits=-1, reads="block"), ValueError, "Own: edits: expected a whole number >= 0, got -1"),
        (Own(edits=2), ValueError, "Own: reads: expected 'block' of a rule that edits, got 'masked'"),
        *((Narrow(asks), ValueError, rf"Where.{asks}: .* got .*\(3, 5\)") for asks in ("recall", "remember")),
        (Narrow("flat"), ValueError, r"Where.logits: ids: .* \(3, 8, K\), got .*\(3, 8\)"),
        (Narrow("int"), ValueError, r"Where.logits: ids: expected an int64 Tensor .* got torch.int32"),
        (Own(state=None), ValueError, "Own: new_state: expected a tuple of Tensors, got None"),
        (Own(state=(3,)), ValueError, r"Own: new_state: expected a tuple of Tensors, got \(3,\)"),
        (Own(state=(torch.ones(3, 4, device="meta"),)), ValueError, "Own: new_state: .* on cpu, got .* meta"),
        (Own(state=(torch.ones(()),)), ValueError, r"Own: new_state: .* \(3, ...\) .*, got one \(\)"),
        (
            Own(state=(torch.ones(2, 4),)),
            ValueError,
            r"Own: new_state: .* \(3, ...\) .* reset of its own, got one \(2, 4\)",
        ),
    ):
        with pytest.raises(error, match=said):
            dx.decode(llada, PROMPTS, gen_length=8, block_length=8, rule=rule)


def test_a_text_and_a_name_for_each_sequence_are_expected() -> None:
    with pytest.raises(ValueError, match="rule: expected a text, got 3"):
        rules.parse(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="selector: expected one name or 3, got 2"):
        dx.policies.make(["entropy", "quota"], 1.0, batch=3)


@pytest.mark.parametrize("bars", [[7.5, 5.0, 2.5], (7.5, 5.0), 7.5])
def test_prophets_bars_are_three(bars: Any) -> None:
    with pytest.raises(ValueError, match="bars: expected a tuple of three numbers, got"):
        Prophet(0, bars=bars)


def test_rules_keep_plain_numbers() -> None:
    """Rules made of tensors or numpy's numbers are equal, hash alike, and have a text."""
    two, half = torch.tensor(2), torch.tensor(0.5)
    for rule, expected in (
        (Prophet(two, two, (half, half, half)), Prophet(2, 2, (0.5, 0.5, 0.5))),  # type: ignore[arg-type]
        (SchED(half, half, k=two, floor=half), SchED(0.5, 0.5, k=2, floor=0.5)),  # type: ignore[arg-type]
        (Credit(half, half, half, two), Credit(0.5, 0.5, 0.5, 2)),  # type: ignore[arg-type]
        (Edit(half, half, two), Edit(0.5, 0.5, 2)),  # type: ignore[arg-type]
        (rules.EndOfText(two, half), rules.EndOfText(2, 0.5)),  # type: ignore[arg-type]
        (rules.EndOfText([two, 7]), rules.EndOfText((2, 7))),  # type: ignore[arg-type, list-item]
    ):
        assert rule == expected
        assert hash(rule) == hash(expected)
        assert "tensor" not in repr(rule)
    assert rules.spec.text_of(Edit(half, half, two)) == "edit:0.5,0.5,2"  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["floor", "changes"])
def test_scheds_shares_are_at_most_1(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number from 0 to 1, got 2"):
        SchED(**{name: 2.0})  # type: ignore[arg-type]


def test_names() -> None:
    assert rules.parse("credit") == (Credit(), {"selector": "confidence", "threshold": 0.9})
    assert rules.parse("credit:0.5+entropy:0.4") == (Credit(0.5), {"selector": "entropy", "threshold": 0.4})
    assert rules.parse("sched:7.5,0,exponential,16") == (SchED(7.5, 0.0, "exponential", 16.0), {})
    for text, ends in (("eot:2/7,0.5", (2, 7)), ("eot:2,0.5", 2)):
        assert rules.parse(text) == (rules.EndOfText(ends, 0.5), {})
        assert rules.spec.text_of(rules.EndOfText(ends, 0.5)) == text
    assert rules.parse("edit:0.8,0.95,4") == (Edit(0.8, 0.95, 4), {})
    assert rules.parse("levenshtein:0.4,0.1") == (Levenshtein(0.4, 0.1, 16, 156930, 156931), {})
    assert rules.spec.text_of(Levenshtein(0.4, 0.1, 8, 5, 7)) == "levenshtein:0.4,0.1,8,5,7"
    assert rules.parse("prophet:203") == (Prophet(203), {})
    assert rules.parse("sched:5+steps:16") == (SchED(5.0), {"steps": 16})
    assert rules.parse("credit+one") == (Credit(), {})
    assert rules.parse("one") == (None, {})
    assert rules.parse("entropy:0.5") == (None, {"selector": "entropy", "threshold": 0.5})


def test_a_rule_of_a_users_own_has_a_name(llada: models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.KINDS, "sure", rules.Kind(Sure, (("bar", float),), 0, "commits what is sure"))
    settings = {"gen_length": 8, "block_length": 8, "mask_id": MASK}
    by_name = dx.decode(llada, PROMPTS, rule="sure:0.01", **settings)
    by_object = dx.decode(llada, PROMPTS, rule=Sure(0.01), **settings)
    assert torch.equal(by_name.sequences, by_object.sequences)
    assert by_name.nfe.tolist() == by_object.nfe.tolist() != [8] * 3
    assert dx.DecodeConfig(rule=Sure(0.01)).to_dict()["rule"] == "sure:0.01"
    assert "sure[:BAR]" in rules.describe()
    assert rules.menu()[-1]["name"] == "sure"
    monkeypatch.setitem(
        rules.KINDS, "sure", rules.Kind(Sure, (("height", float),), 0, "commits what is sure")
    )
    assert rules.parse("sure") == (Sure(), {})
    with pytest.raises(ValueError, match=r"rules.KINDS\['sure'\]: expected .* of Sure, got \['height'\]"):
        rules.parse("sure:0.5")
    monkeypatch.setitem(rules.KINDS, "sure", Sure())
    for call in (lambda: rules.parse("sure:0.5"), rules.describe, rules.menu):
        with pytest.raises(ValueError, match=r"rules.KINDS\['sure'\]: expected Kind, got Sure"):
            call()


@pytest.mark.parametrize(("needed", "usage"), [(0, "own[:A,B]"), (1, "own:A[,B]"), (2, "own:A,B")])
def test_parameters_are_told_as_they_are_given(
    needed: int, usage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.KINDS, "own", rules.Kind(Rule, (("a", int), ("b", int)), needed, "commits"))
    monkeypatch.setitem(rules.KINDS, "bare", rules.Kind(Rule, (), 0, "commits nothing"))
    for text, expected in (("own:1,2,3", usage), ("bare:1", "bare")):
        with pytest.raises(ValueError, match=f"^rule: expected {re.escape(expected)}, got '{text}'$"):
            rules.parse(text)


def test_the_rule_of_the_example() -> None:
    """A rule of a user's own says the same in `decode` and in the engine."""
    file = ROOT / "examples" / "custom_rule.py"
    spec = importlib.util.spec_from_file_location("custom_rule", file)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["custom_rule"] = example  # where dataclasses look for the names of annotations
    spec.loader.exec_module(example)
    model = registry.load("builtin:teacher")[0]
    asked: dict[str, Any] = {"gen_length": 32, "rule": example.Steady()}
    alone = dx.decode(model, PROMPTS, cache="dual", **asked)
    with dx.Engine(model, lanes=2) as engine:
        handles = [engine.submit(prompt, **asked) for prompt in PROMPTS]
        for handle, response, passes in zip(handles, alone.responses, alone.nfe, strict=True):
            assert handle.result().tokens == response.tolist()
            assert handle.result().nfe == passes
