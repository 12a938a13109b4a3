"""Constrained decoding: responses that have the form of an automaton, in few passes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from forms import a_form
from test_infill import fast_dllm
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models, policies
from dparallel_ext.automaton import FAR, NOWHERE, Automaton

MASK = 511
PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


def fills(form: Automaton, z: Tensor, x: Tensor, state: int, left: int) -> Tensor:
    """The most probable way (N,) to fill x (N,) from `state` on, so that a response can end in `left` more
    tokens, where it can at all. z: (N, V), in float64."""
    best = {state: (0.0, [])}
    tokens = torch.arange(z.shape[1])
    for at, row in enumerate(z.log_softmax(1)):
        onward: dict[int, tuple[float, list[int]]] = {}
        given = int(x[at])
        for origin, (score, path) in best.items():
            target = form.transitions[origin][form.token_class]
            for state in set(target.tolist()) - {NOWHERE}:
                among = (target == state) if given == MASK else (target == state) & (tokens == given)
                if not among.any():
                    continue
                token = int(row.masked_fill(~among, -math.inf).argmax())
                found = score + (float(row[token]) if given == MASK else 0.0), [*path, token]
                onward[state] = max(onward.get(state, (-math.inf, [])), found)
        best = onward
    ends = {state: way for state, way in best.items() if form.distance[state] <= left} or best
    return torch.tensor(max(ends.values())[1])


def plain(
    model: Any, form: Automaton, prompt: Tensor, length: int, block: int, row: Any
) -> tuple[Tensor, int]:
    """The loop in float64. row: a policy row."""
    x = torch.cat((prompt, torch.full((length,), MASK)))
    first, passes = len(prompt), 0
    for start in range(first, len(x), block):
        end = min(start + block, len(x))
        while bool((x[start:end] == MASK).any()):
            passes += 1
            z = model(x[None]).logits[0, start:end].detach().double()
            state = form.after(0, x[first:start].tolist())
            way = fills(form, z, x[start:end], state, len(x) - end)
            in_time = form.distance[form.after(state, way.tolist())] <= len(x) - end
            confidence, margin, entropy = (torch.zeros(end - start) for _ in range(3))
            for at, token in enumerate(way.tolist()):
                behind = form.transitions[state][form.token_class]
                distance = torch.where(behind >= 0, form.distance[behind.clamp(min=0)], FAR)
                allowed = distance <= len(x) - start - at - 1 if in_time else distance < FAR
                p = z[at].masked_fill(~allowed, -math.inf).softmax(0)
                others = p.index_fill(0, torch.tensor([token]), -1.0).amax().clamp(min=0)
                confidence[at], margin[at] = p[token], p[token] - others
                entropy[at] = -torch.special.xlogy(p, p).sum() if p[token] >= others else math.inf
                state = int(behind[token])
            masked = x[start:end] == MASK
            stats = dx.RowStats(way, *(confidence,) * 3, confidence, margin, entropy, way, confidence)
            chosen = dx.select(stats.map(lambda values: values[None]), masked[None], row)[0]
            x[start:end] = torch.where(chosen, way, x[start:end])
    return x, passes


POLICIES = [("confidence", 0.02), ("entropy", 4.5), ("margin", 0.005), ("quota", 3), ("factor", 0.9)]


@pytest.mark.parametrize(("selector", "threshold"), POLICIES)
def test_the_plain_loop(llada: models.Model, selector: Any, threshold: float) -> None:
    passes = 0
    for seed, prompt in enumerate(PROMPTS * 2):
        form, row = a_form(100 * len(selector) + seed), policies.make(selector, threshold)
        expected, steps = plain(llada, form, prompt, 21, 8, row)
        out = dx.decode(
            llada,
            prompt,
            gen_length=21,
            block_length=8,
            automaton=form,
            selector=selector,
            threshold=threshold,
        )
        assert torch.equal(out.sequences[0], expected)
        assert int(out.nfe) == steps
        passes += steps
    assert passes < 6 * 21


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("llada_tiny_a", {"cache": "none"}),
    ("llada_tiny_a", {"cache": "prefix", "sub_block_length": 4}),
    ("llada_tiny_a", {"cache": "dual", "refresh": 2}),
    ("dream_tiny_a", {"cache": "none"}),
    ("dream_tiny_a", {"cache": "prefix"}),
    ("dream_tiny_a", {"cache": "dual"}),
    ("sdar_tiny_a", {"cache": "block"}),
    ("fast_dllm", {"cache": "block"}),
    ("fast_dllm", {"cache": "dual", "sub_block_length": 4}),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_response_has_its_form(name: str, way: dict[str, Any]) -> None:
    """Alone, in a batch, and in an engine beside requests of other forms."""
    model = fast_dllm() if name == "fast_dllm" else golden.model(name)
    for seed in range(4):
        form, lengths = a_form(seed), [24, 9, 17]
        settings: dict[str, Any] = {"selector": "confidence", "threshold": 0.02, "automaton": form, **way}
        if model.block_length is None:
            settings["block_length"] = 8
        out = dx.decode(model, PROMPTS, gen_length=lengths, **settings)
        for prompt, length, response, passes in zip(PROMPTS, lengths, out.responses, out.nfe, strict=True):
            state = form.after(0, response[:length].tolist())
            assert state != NOWHERE
            assert form.distance[state] == 0 or form.distance[0] > length
            alone = dx.decode(model, prompt, gen_length=length, **settings)
            assert torch.equal(alone.responses[0], response)
            assert int(alone.nfe) == passes
        config = dx.DecodeConfig(**{**settings, "automaton": None})
        with dx.Engine(model, config, lanes=2) as engine:
            free = engine.submit(PROMPTS[1], gen_length=lengths[1], threshold=None, selector=None)
            handles = [
                engine.submit(prompt, gen_length=length, automaton=form)
                for prompt, length in zip(PROMPTS, lengths, strict=True)
            ]
            for handle, response in zip(handles, out.responses, strict=True):
                answer = handle.result().tokens
                assert answer == response[: len(answer)].tolist()
            assert len(free.result().tokens) == lengths[1]


def test_a_form_that_does_not_fit_is_begun(llada: models.Model) -> None:
    """Of a response that takes more tokens than there are, the beginning is decoded."""
    token_class = torch.cat((torch.arange(500) % 2, torch.full((12,), 2)))
    rows = [[at + 1, NOWHERE, NOWHERE] if at % 2 else [NOWHERE, at + 1, NOWHERE] for at in range(30)]
    form = Automaton(token_class, torch.tensor([*rows, [NOWHERE] * 3]), torch.arange(31) == 30)
    assert form.distance.tolist() == list(range(30, -1, -1))
    settings: dict[str, Any] = {"block_length": 8, "threshold": 0.02, "selector": "confidence"}
    for length in (20, 30):
        out = dx.decode(llada, PROMPTS[0], gen_length=length, automaton=form, **settings)
        assert form.after(0, out.responses[0].tolist()) == length
    with pytest.raises(ValueError, match="sequence 0 at position 35 leaves no token to choose"):
        dx.decode(llada, PROMPTS[0], gen_length=33, automaton=form, **settings)  # nothing may follow


def decode_of(form: list[list[int]], logits: list[list[float]], **settings: Any) -> tuple[list[int], int]:
    """The response to a prompt of one token, and its passes. form: transitions by the first ids, of which
    the last state accepts. logits: of each token of the response, in every pass."""
    table = torch.tensor(form)
    automaton = Automaton(torch.arange(table.shape[1]), table, torch.arange(len(table)) == len(table) - 1)
    rows = torch.tensor([[0.0] * len(logits[0]), *logits])
    out = dx.decode(
        lambda ids: SimpleNamespace(logits=rows.expand(len(ids), -1, -1)),
        torch.tensor([0]),
        gen_length=len(logits),
        block_length=len(logits),
        mask_id=len(logits[0]) - 1,
        automaton=automaton,
        **settings,
    )
    return out.responses[0].tolist(), int(out.nfe)


def test_where_nothing_ends_in_time_all_that_may_follow_counts() -> None:
    """The first token alone would end the response, after which nothing follows; or its logit is -inf."""
    way = {"selector": "entropy", "threshold": 0.5}
    over = [[4, 1], [NOWHERE, 2], [NOWHERE, 3], [NOWHERE, 4], [NOWHERE, NOWHERE]]
    assert decode_of(over, [[0.0, 2.0, 0.0]] * 2, **way) == ([1, 1], 1)
    without = [[4, 1], [4, 2], [4, 3], [NOWHERE, 4], [NOWHERE, NOWHERE]]
    assert decode_of(without, [[-math.inf, 2.0, 0.0]] * 2, **way) == ([1, 1], 1)


@pytest.mark.parametrize("equal", [2.0, math.inf])
@pytest.mark.parametrize("way", [("confidence", 0.45), ("entropy", 0.7), ("margin", 0.0)])
def test_a_token_as_probable_as_a_lower_one(equal: float, way: tuple[Any, float]) -> None:
    form = [[1, 2], [3, NOWHERE], [NOWHERE, 3], [NOWHERE, NOWHERE]]
    logits = [[equal, equal, 0.0], [0.0, 5.0, 0.0]]
    assert decode_of(form, logits, selector=way[0], threshold=way[1]) == ([1, 1], 1)


@pytest.mark.parametrize("way", [("entropy", 5.0), ("margin", 0.0)])
def test_a_token_that_another_is_more_probable_than_is_not_certain(way: tuple[Any, float]) -> None:
    """Though the way by it is more probable than that by the other."""
    form = [[1, 2], [3, NOWHERE], [NOWHERE, 3], [NOWHERE, NOWHERE]]
    logits = [[2.0, 1.9, 0.0], [0.0, 5.0, 0.0]]
    assert decode_of(form, logits, selector=way[0], threshold=way[1]) == ([1, 1], 2)


@pytest.mark.parametrize("other", [math.inf, 3e38])
def test_the_largest_logits_of_tokens_that_may_not_follow(other: float) -> None:
    form = [[1, 2, NOWHERE], [3, NOWHERE, NOWHERE], [NOWHERE, 3, NOWHERE], [NOWHERE, NOWHERE, 3]]
    logits = [[0.0, 2.0, other, 0.0]] * 2
    assert decode_of(form, logits, threshold=0.5)[0] in ([0, 0], [1, 1])


def test_suppressed_ids_are_in_no_form(llada: models.Model) -> None:
    form = Automaton(torch.arange(511) % 2, torch.tensor([[0, NOWHERE]]), torch.tensor([True]))
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "automaton": form}
    free = dx.decode(llada, PROMPTS[0], **settings).responses[0]
    assert bool((free % 2 == 0).all())
    out = dx.decode(llada, PROMPTS[0], suppress=free.unique(), **settings).responses[0]
    assert bool((out % 2 == 0).all())
    assert not torch.isin(out, free).any()
    with pytest.raises(ValueError, match="automaton: expected one with a response of tokens that the model"):
        dx.decode(llada, PROMPTS, suppress=range(0, 511, 2), **settings)


def test_a_form_goes_by_tokens_that_can_be_decoded(llada: models.Model) -> None:
    """A response does not go towards an end that takes suppressed ids, the mask or ids that the model does
    not have."""
    for never in (300, MASK, 600):
        # Through state 1 to the end is the shorter way.
        token_class = torch.arange(never + 1) % 2
        token_class[never] = 2
        rows = [
            [1, 2, NOWHERE],
            [1, NOWHERE, 4],
            [NOWHERE, 3, NOWHERE],
            [4, NOWHERE, NOWHERE],
            [4, 4, NOWHERE],
        ]
        form = Automaton(token_class, torch.tensor(rows), torch.arange(5) == 4)
        settings: dict[str, Any] = {"automaton": form, "suppress": [never] if never < MASK else None}
        for prompt in PROMPTS:
            out = dx.decode(llada, prompt, gen_length=4, block_length=2, **settings)
            assert form.after(0, out.responses[0].tolist()) == 4
            assert int(out.responses[0][0]) % 2 == 1
        with dx.Engine(llada, lanes=1) as engine:
            assert form.after(0, engine.submit(PROMPTS[0], gen_length=4, **settings).result().tokens) == 4
        only = Automaton(token_class, torch.tensor([[NOWHERE, NOWHERE, 0]]), torch.tensor([True]))
        with pytest.raises(ValueError, match="automaton: expected one with a response of tokens that the"):
            dx.decode(llada, PROMPTS[0], gen_length=4, **{**settings, "automaton": only})
        short = Automaton(
            token_class, torch.tensor([[NOWHERE, 1, 1], [NOWHERE] * 2 + [2], [2] * 3]), torch.arange(3) == 2
        )
        with pytest.raises(ValueError, match="automaton: expected one with a response of tokens that the"):
            dx.decode(llada, PROMPTS[0], gen_length=4, **{**settings, "automaton": short})


def test_what_does_not_go_with_a_form_is_refused(llada: models.Model) -> None:
    form = a_form(1)
    for wrong, message in [
        ({"rule": "credit"}, "rule: expected a policy row or none beside a form .automaton., got Credit"),
        ({"rule": lambda stats, masked, step: masked}, "rule: expected a policy row or none beside"),
        ({"infill": True}, "infill: does not go with a form"),
        ({"temperature": 0.5}, "temperature: expected 0 beside a form"),
        ({"active_blocks": 2, "threshold": 0.5}, "active_blocks"),
        ({"draft_size": 2}, "draft_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            dx.decode(llada, PROMPTS, automaton=form, **wrong)
        if "active_blocks" in wrong:
            continue  # an engine opens one block for such a request
        with (
            pytest.raises(ValueError, match=message),
            dx.Engine(llada, draft_size=wrong.pop("draft_size", None)) as engine,
        ):
            engine.submit(PROMPTS[0], automaton=form, **wrong)
    for value in ("[0-9]+", 3, form.transitions):
        with pytest.raises(ValueError, match="automaton: expected Automaton, got"):
            dx.DecodeConfig(automaton=value)
    with pytest.raises(ValueError, match="automaton: cannot be written"):
        dx.DecodeConfig(automaton=form).to_dict()
    assert "Automaton(" in repr(dx.DecodeConfig(automaton=form))
    with pytest.raises(ValueError, match="automaton: with a verifier decoding goes left to right"):
        dx.adaptive_decode(llada, PROMPTS, verifier=llada, automaton=form)


def test_an_automaton_is_checked() -> None:
    kinds, table, ends = (
        torch.tensor([0, 1, 1]),
        torch.tensor([[1, NOWHERE], [NOWHERE, 1]]),
        torch.tensor([False, True]),
    )
    form = Automaton(kinds, table, ends)
    assert [form.after(0, tokens) for tokens in ([], [0], [0, 2, 1], [1], [0, 3], [0, 0, 1])] == [
        0,
        1,
        1,
        -1,
        -1,
        -1,
    ]
    assert form.distance.tolist() == [1, 0]
    # The way into a state that leads nowhere is removed.
    trap = Automaton(kinds, torch.tensor([[1, 2], [1, 2], [NOWHERE, 2]]), torch.tensor([False, True, False]))
    assert trap.transitions.tolist() == [[1, -1], [1, -1], [-1, -1]]
    assert trap.distance.tolist() == [1, 0, FAR]
    # So are the ways by classes without a token.
    hollow = Automaton(torch.zeros(3, dtype=torch.int64), torch.tensor([[0, 1], [0, 1]]), ~ends | ends)
    assert hollow.transitions.tolist() == [[0, -1], [0, -1]]
    assert form.without([], 5) is form
    assert form.without([2], 5) is form.without([2, 7])
    assert form.without([2]).distance.tolist() == [1, 0]
    assert form.without([], 2).after(0, [0, 1]) == 1
    assert form.without([], 2).after(0, [0, 2]) == NOWHERE
    for change, message in [
        ({"token_class": torch.tensor([0, 2, 1])}, "token_class: expected numbers from 0 to 1, got 2"),
        (
            {"token_class": kinds.float()},
            "token_class: expected torch.int64 of 1 dimensions on the CPU, got torch.float32",
        ),
        (
            {"transitions": torch.tensor([[2, 0], [0, 0]])},
            "transitions: expected numbers from -1 to 1, got 2",
        ),
        ({"transitions": table[0]}, "transitions: expected torch.int64 of 2 dimensions"),
        ({"accepting": torch.tensor([True])}, r"accepting: expected \(2,\), got \(1,\)"),
        ({"accepting": torch.tensor([False, False])}, "accepting: expected a state that tokens lead to"),
        (
            {"transitions": table[:0], "accepting": ends[:0]},
            "accepting: expected a state that tokens lead to",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Automaton(**{"token_class": kinds, "transitions": table, "accepting": ends, **change})
    with pytest.raises(TypeError, match="accepting: expected a Tensor, got list"):
        Automaton(kinds, table, [True, False])


def test_threads_share_an_automaton_s_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded pass reads them where they are, so that no others may take their place."""
    form, bincount = a_form(1), torch.bincount
    others: list[Any] = []

    def beside(*given: Any, **keywords: Any) -> torch.Tensor:
        monkeypatch.setattr(torch, "bincount", bincount)
        others.append(form.tables(torch.device("cpu")))  # of another thread, which is done first
        return bincount(*given, **keywords)

    monkeypatch.setattr(torch, "bincount", beside)
    assert form.tables(torch.device("cpu")) is others[0]
