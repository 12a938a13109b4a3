"""Arguments, drafts and logits that `speculate` refuses by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import golden
from drafters import Knowing, model_of
from test_speculate import PROMPTS, plain

import dparallel_ext as dx
from dparallel_ext.speculation import Draft, DraftSession


def test_bad_input_is_named_before_anything_runs() -> None:
    class Model2(Knowing):
        def check(self, model: Any) -> None:
            raise ValueError("drafter: made for another vocabulary")

    class Forgetful(Knowing):
        def session(self, *given: Any, **more: Any) -> Any:
            pass

    class Silent(Knowing):
        def session(self, *given: Any, **more: Any) -> Any:
            return DraftSession()

    class Half:
        most = 4

    def own(**attributes: Any) -> Any:
        drafter = Knowing([])
        vars(drafter).update(attributes)
        return drafter

    cases: list[tuple[dict[str, Any], str]] = [
        ({"threshold": 0.5}, "threshold: belongs to masked diffusion"),
        ({"block_length": 8}, "block_length: belongs to masked diffusion"),
        ({"rule": "credit"}, "rule: belongs to masked diffusion"),
        ({"rule": "unheard_of"}, "rule: belongs to masked diffusion"),
        ({"cache": "block"}, "cache: belongs to masked diffusion"),
        ({"eos_id": 61}, "eos_id: expected one of the model's 61 token ids, got 61"),
        ({"eos_id": -2}, "eos_id: expected a whole number >= -1"),
        ({"stop": [[1, 61]]}, "stop: expected one of the model's 61 token ids, got 61"),
        ({"drafter": "medusa"}, "drafter: expected a Drafter, .*got .medusa"),
        ({"drafter": "ngram:x"}, 'drafter: expected "ngram" or "ngram:N"'),
        ({"drafter": "ngram:0"}, 'drafter: expected "ngram" or "ngram:N"'),
        ({"drafter": 3}, "drafter: expected a Drafter"),
        (
            {"drafter": torch.nn.Linear(2, 2)},
            "drafter: expected one of dparallel_ext.models .*wrap.*, got Linear",
        ),
        ({"drafter": ""}, "drafter: expected a Drafter, a name .* got .."),
        ({"drafter": Model2([])}, "drafter: made for another vocabulary"),
        ({"drafter": Knowing}, "drafter: expected a Drafter, .*got .*class"),
        ({"drafter": Forgetful([])}, "drafter: expected a DraftSession from session, got NoneType"),
        ({"drafter": Half()}, "drafter: expected a Drafter, .*Half.*, which has no check and no session"),
        ({"drafter": own(most=None)}, "drafter: most: expected a whole number >= 0, got None"),
        ({"drafter": own(most=4.5)}, "drafter: most: expected a whole number >= 0, got 4.5"),
        (
            {"drafter": own(expected=lambda size: None)},
            "drafter: expected: expected a finite number >= 0, got",
        ),
        ({"drafter": own(apart=False)}, "drafter: apart: expected True or no such attribute, got False"),
        (
            {"drafter": own(taps=(99,))},
            r"drafter: taps: expected ascending numbers of layers of .*, got \(99,\)",
        ),
        ({"drafter": own(taps=2)}, "drafter: taps: expected ascending numbers of layers of .*, got 2"),
        ({"drafter": own(taps=(0,), apart=True)}, "drafter: apart: expected no such attribute .* taps"),
        ({"drafter": own(observe=print, apart=True)}, "drafter: apart: expected no such .* method observe"),
        ({"draft_size": -1, "drafter": "ngram"}, "draft_size: expected a whole number >= 0"),
        ({"config": dx.DecodeConfig(threshold=0.5)}, "threshold: belongs to masked diffusion"),
        ({"suppress": [61]}, r"suppress: expected token ids in \[0, 61\), got 61"),
        ({"gen_length": [1, 2]}, "gen_length: expected a number or one for each of 4"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            plain(**settings)
    with pytest.raises(NotImplementedError, match=r"DraftSession: expected a method propose\(lanes, sizes\)"):
        plain(drafter=Silent([]))
    with pytest.raises(ValueError, match="prompt: expected at least one token, got none in sequence 1"):
        plain(prompts=[PROMPTS[0], PROMPTS[0][:0]])
    with pytest.raises(ValueError, match=r"prompt: expected token ids in \[0, 61\), got 99"):
        plain(prompts=[torch.tensor([99])])
    with pytest.raises(ValueError, match="is a diffusion model"):
        dx.speculate(golden.model("llada_tiny_a"), PROMPTS)
    with pytest.raises(ValueError, match="model: expected an autoregressive one"):
        dx.speculate(lambda ids: ids, PROMPTS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gen_lenght'"):
        plain(gen_lenght=3)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (Draft((1, 2), (0, 2)), "drafter: no tree, node 2 of lane 0 has the parent 2"),
        (Draft((1, 2), (0,)), "drafter: expected a parent for each of 2 nodes of lane 0, got 1"),
        (Draft((1, 61)), r"drafter: expected token ids in \[0, 61\), got 61"),
        (Draft((1,) * 6), "drafter: expected at most 5 nodes for lane 0, got 6"),
        (Draft((1.5,)), r"drafter: expected token ids for lane 0, got \(1\.5,\)"),  # type: ignore[arg-type]
        (Draft((True,)), r"drafter: expected token ids for lane 0, got \(True,\)"),
        (Draft(torch.tensor([1])), "drafter: expected a Draft of a tuple for lane 0"),  # type: ignore[arg-type]
        (Draft((1,), (0.0,)), r"drafter: expected a tuple of nodes as parents, got \(0\.0,\)"),  # type: ignore[arg-type]
        (Draft((1,), 0), "drafter: expected a tuple of nodes as parents, got 0"),  # type: ignore[arg-type]
        (Draft((1,), ("a",)), "drafter: expected a tuple of nodes as parents"),  # type: ignore[arg-type]
        (Draft((1,), start=1), "drafter: expected a draft that begins at layer 0, since .* got 1"),
        (Draft((1,), start="a"), "drafter: expected a draft that begins at a layer of"),  # type: ignore[arg-type]
        (Draft((1,), layers="a"), "drafter: expected layers >= 0 of a draft, got 'a'"),  # type: ignore[arg-type]
        (Draft((1,), riders=2), "drafter: expected a tuple of riders for lane 0, got 2"),  # type: ignore[arg-type]
        ([1, 2], r"drafter: expected a Draft of a tuple for lane 0, got \[1, 2\]"),
        (None, "drafter: expected a list of drafts, got NoneType"),
    ],
)
def test_what_is_no_draft_is_refused(draft: Any, message: str) -> None:
    class Bad(Knowing):
        def propose(self, lanes: Any, sizes: Any) -> Any:
            return None if draft is None else [draft]

    with pytest.raises(ValueError, match=message):
        plain(prompts=PROMPTS[:1], drafter=Bad([]), draft_size=5)


def test_each_lane_has_a_draft() -> None:
    class Twice(Knowing):
        def propose(self, lanes: Any, sizes: Any) -> list[Draft]:
            return [Draft(), Draft()]

    with pytest.raises(ValueError, match="drafter: expected a draft for each of 1 lanes, got 2"):
        plain(prompts=PROMPTS[:1], drafter=Twice([]), draft_size=5)


def test_a_bad_row_is_named_by_sequence_and_position() -> None:
    """And the sequences are as they were before."""
    model = model_of()
    clean = plain(model, PROMPTS[:2])
    texts = clean.sequences.tolist()
    # A token of the second response that nothing before it holds, in either sequence.
    at = next(
        at
        for at in range(len(PROMPTS[1]) + 1, len(PROMPTS[1]) + 24)
        if texts[1][at] not in texts[1][:at] and texts[1][at] not in texts[0][: at + 2]
    )
    with torch.no_grad():
        model.embed.weight[texts[1][at]] = math.nan
    for drafter in (None, Knowing(list(clean.sequences), right=1.0)):
        with pytest.raises(ValueError, match=f"sequence 1 at position {at + 1} holds NaN"):
            plain(model, PROMPTS[:2], drafter=drafter, draft_size=0 if drafter is None else 2)


def test_bad_rows_off_the_path_do_not_matter() -> None:
    """Plain decoding would not have computed them."""
    model = model_of()
    clean = plain(model, PROMPTS[:1])
    unused = next(t for t in range(61) if t not in clean.sequences[0].tolist())
    with torch.no_grad():
        model.embed.weight[unused] = math.nan

    class Poison(Knowing):
        def propose(self, lanes: Any, sizes: Any) -> list[Draft]:
            return [Draft((unused,) * most, (0,) * most) for most in sizes]

    found = plain(model, PROMPTS[:1], drafter=Poison([]), draft_size=3)
    assert torch.equal(found.sequences, clean.sequences)
