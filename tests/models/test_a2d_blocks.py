"""Tiny-A2D as BD3LM: block-causal, with blocks that count from the prompt's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import golden
from test_a2d import MASK, best_of, every_family, ids, logits_of, theirs_of
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.cache import Span, block_causal_spans
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.models import Model, Traits

pytest_plugins = ["taping"]


def seen_from(column: Tensor, size: int, origin: int = 0) -> Tensor:
    """(L, L) bool: each column sees the blocks up to its own; blocks begin at `origin`, and every `size`."""
    block = (column - origin).div(size, rounding_mode="floor")
    return block[:, None] >= block


def commit(x: Tensor, logits: Tensor, start: int, end: int, count: int, threshold: float | None) -> None:
    """Fill masks of x (L,) in columns [start, end): the `count` surest, or those above the threshold."""
    masked = x[start:end] == MASK
    if threshold is not None:
        p = logits[start:end].double().softmax(-1).amax(-1)
        count = max(1, int((masked & (p >= threshold)).sum()))
    chosen, tokens = best_of(logits[start:end], masked, min(count, int(masked.sum())))
    x[start + chosen] = tokens


def bd3lm(
    theirs: Any,
    prompts: list[Tensor],
    gen_length: int,
    size: int,
    steps: int = 1,
    threshold: float | None = None,
    eos: int | None = None,
) -> tuple[list[Tensor], list[int]]:
    """The responses of dLLM's BD3LM sampler, and the passes over their blocks: prompts are padded in front to
    a multiple of `size`, blocks are columns of the padded batch, and RoPE counts real tokens.

    steps: passes over each block, by LLaDA's counts; with a threshold as many as it takes.
    """
    width = -(-max(map(len, prompts)) // size) * size
    x = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=-1) for p in prompts])
    passes, ends = [0] * len(prompts), [gen_length] * len(prompts)
    for start in range(width, width + gen_length, size):
        end = min(start + size, width + gen_length)
        x = torch.nn.functional.pad(x, (0, end - start), value=MASK)
        real = x >= 0
        position = real.long().cumsum(1) - 1
        seen = seen_from(torch.arange(end), size) & real[:, None]
        seen |= torch.eye(end, dtype=torch.bool)  # padding sees itself, so that its rows are numbers
        base, rest = divmod(end - start, steps)
        for step in range(steps if threshold is None else end - start):
            logits = logits_of(theirs, x.clamp(min=0), seen[:, None], position_ids=position.clamp(min=0))
            for b in range(len(x)):
                if ends[b] == gen_length and (x[b, start:end] == MASK).any():
                    commit(x[b], logits[b], start, end, base + (step < rest), threshold)
                    passes[b] += 1
        for b in range(len(x)):
            if eos is not None and ends[b] == gen_length and (x[b, start:end] == eos).any():
                ends[b] = end - width
    return [row[width : width + end] for row, end in zip(x, ends, strict=True)], passes


LENGTHS = (1, 5, 8, 13, 16, 30)
"""Of prompts: shorter than a block of 8, some blocks, and blocks with a shorter one in front."""


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [ids(length, seed=length) for length in lengths]


@pytest.mark.parametrize(("gen_length", "size", "steps"), [(16, 8, 8), (20, 8, 3), (5, 32, 2)])
@every_family
def test_block_diffusion_gives_the_tokens_of_the_published_loop(
    base: str, gen_length: int, size: int, steps: int
) -> None:
    theirs, prompts = theirs_of(base), prompts_of()
    model, blocks = models.wrap(theirs), -(-gen_length // size)
    expected, passes = bd3lm(theirs, prompts, gen_length, size, steps)
    settings: dict[str, Any] = {"gen_length": gen_length, "block_length": size, "steps": steps * blocks}
    out = dx.decode(model, prompts, cache="block", mask_id=MASK, **settings)
    assert [r.tolist() for r in out.responses] == [r.tolist() for r in expected]
    assert out.nfe.tolist() == passes
    # Theirs has a pass over all that is in front of each block.
    assert out.nfe_published.tolist() == [n + blocks for n in passes]
    alone = dx.decode(model, prompts[3], cache="block", mask_id=MASK, **settings)
    assert torch.equal(alone.responses[0], expected[3])
    bidirectional = dx.decode(model, prompts, mask_id=MASK, **settings)
    assert not all(map(torch.equal, bidirectional.responses, out.responses))


@pytest.fixture(scope="module")
def both() -> tuple[Any, Model]:
    theirs = theirs_of("qwen3", tie_word_embeddings=False)
    theirs.generation_config.mask_token_id = MASK
    return theirs, models.wrap(theirs)


BLOCKS: dict[str, Any] = {"cache": "block", "block_length": 8}


@pytest.mark.parametrize("threshold", [0.2, 0.3])
def test_thresholds_and_ends(both: tuple[Any, Model], threshold: float) -> None:
    theirs, model = both
    prompts = prompts_of()
    settings: dict[str, Any] = {**BLOCKS, "gen_length": 27, "selector": "confidence", "threshold": threshold}
    expected, passes = bd3lm(theirs, prompts, 27, 8, threshold=threshold)
    out = dx.decode(model, prompts, **settings)
    assert [r.tolist() for r in out.responses] == [r.tolist() for r in expected]
    assert out.nfe.tolist() == passes
    assert min(passes) < 27
    eos = int(expected[2][10])
    ended, _ = bd3lm(theirs, prompts, 27, 8, threshold=threshold, eos=eos)
    out = dx.decode(model, prompts, eos_id=eos, **settings)
    assert min(map(len, ended)) < 27
    for response, until, kept in zip(out.responses, ended, out.kept.tolist(), strict=True):
        held = until.tolist()
        assert kept == (held.index(eos) if eos in held else 27)
        assert response[:kept].tolist() == held[:kept]


def test_blocks_count_from_the_prompts_end(both: tuple[Any, Model]) -> None:
    """As those of SDAR they would not: other tokens, to the end of the last block."""
    _, model = both
    prompt = ids(13, seed=13)
    out = dx.decode(model, prompt, gen_length=20, **BLOCKS)
    assert out.responses[0].shape == (20,)
    model.traits = Traits(MASK, block_causal_too=True)  # type: ignore[assignment]
    try:
        aligned = dx.decode(model, prompt, gen_length=20, **BLOCKS)
    finally:
        del model.traits
    assert aligned.responses[0].shape == (27,)
    assert not torch.equal(aligned.responses[0][:20], out.responses[0])
    assert block_causal_spans(2, 0, 12, 30, 8, 5) == [Span(2, 0, 5, 5), Span(2, 5, 12, 13)]
    assert block_causal_spans(2, 5, 14, 14, 8, 21) == [Span(2, 5, 13, 13), Span(2, 13, 14, 14)]
    assert block_causal_spans(0, 2, 9, 40, 4) == [Span(0, 2, 4, 4), Span(0, 4, 8, 8), Span(0, 8, 9, 12)]
    assert block_causal_spans(2, 6, 6, 30, 8, 5) == []
    assert model.spans(2, 6, 8, 30) == [Span(2, 6, 8, 30)]


def as_causal_class(theirs: Any, model: Model) -> Model:
    """The weights in the class of the base family."""
    config = {**dict(model.config), "model_type": theirs.config.model_type.removeprefix("a2d-")}
    causal = models.FAMILIES[config["model_type"]](config).eval()
    causal.load_state_dict(model.state_dict())
    causal.tie()
    return causal


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "block"])
def test_a_causal_class_with_its_traits_is_decoded_alike(both: tuple[Any, Model], cache: str) -> None:
    """What a position sees is what the traits say, in passes over a part of the sequence too."""
    model, causal = both[1], as_causal_class(*both)
    prompt, settings = (
        ids(13, seed=13),
        {"gen_length": 24, "block_length": 8, "cache": cache, "mask_id": MASK},
    )
    with pytest.raises(ValueError, match="is autoregressive"):
        dx.decode(causal, prompt, **settings)
    causal.traits = models.traits(model)  # type: ignore[assignment]
    expected, found = (dx.decode(each, prompt, **settings) for each in (model, causal))
    assert torch.equal(found.sequences, expected.sequences)


def test_a_causal_class_with_its_traits_is_decoded_adaptively_alike(both: tuple[Any, Model]) -> None:
    model, causal, verifier = both[1], as_causal_class(*both), as_causal_class(*both)
    causal.traits = models.traits(model)  # type: ignore[assignment]
    expected, found = (
        dx.adaptive_decode(each, ids(13, seed=13), verifier=verifier, gen_length=24)
        for each in (model, causal)
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.nfe, expected.nfe)
    with pytest.raises(ValueError, match="verifier: expected an autoregressive model"):
        dx.adaptive_decode(model, ids(13, seed=13), verifier=causal, gen_length=4)


@pytest.mark.parametrize(
    "way",
    [
        *({"rule": "edit:0.2,0.3,4"}, {"rule": "credit+entropy:3"}, {"rule": "sched:0.4,0.1", "steps": 48}),
        {"rule": "soft:0.2,0.9,6"},
        *({"rule": "prophet:3"}, {"steps": 12}, {"threshold": 3.0, "active_blocks": 2}, {"draft_size": 2}),
        {"threshold": 4.0, "temperature": 0.8, "seed": 4, "top_p": 0.9},
    ],
    ids=str,
)
def test_whole_blocks_are_decoded_as_those_of_other_block_causal_models(
    both: tuple[Any, Model], way: dict[str, Any]
) -> None:
    """Where prompts end with a block there is no difference, whatever decides."""
    _, model = both
    settings: dict[str, Any] = {**BLOCKS, "gen_length": 24, **way}
    prompts = prompts_of((8, 16, 40))
    out = dx.decode(model, prompts, **settings)
    model.traits = Traits(MASK, block_length=8)  # type: ignore[assignment]
    try:
        other = dx.decode(model, prompts, **settings)
    finally:
        del model.traits
    assert torch.equal(other.sequences, out.sequences)
    assert torch.equal(other.nfe, out.nfe)


@pytest.mark.parametrize("way", [{"threshold": 2.0}, {"rule": "edit:0.2,0.3,4"}, {"draft_size": 2}], ids=str)
def test_passes_are_replayed(both: tuple[Any, Model], taped: list[Graphs], way: dict[str, Any]) -> None:
    """Where blocks begin is a number of a pass, not part of its form."""
    model = models.wrap(both[0])  # without recordings
    settings: dict[str, Any] = {**BLOCKS, "gen_length": 44, **way}
    expected = dx.decode(model, prompts_of(), graphs=False, **settings)
    out = dx.decode(model, prompts_of(), **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert taped[0].recorder is not None, "a recording failed"
    assert taped[0].replays >= 2


def test_a_pass_computes_a_block_and_what_is_not_stored(
    both: tuple[Any, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = both
    widths: list[int] = []
    step = Model.step
    monkeypatch.setattr(Model, "step", lambda self, x, *a: widths.append(len(x)) or step(self, x, *a))
    dx.decode(model, ids(13), gen_length=20, rule="quota:4", **BLOCKS)
    assert widths == [13 + 8, 8, 8 + 8, 8, 8 + 4]


@pytest.mark.parametrize("options", [{}, {"page_size": 5}, {"batch_invariant": True}, {"draft_size": 3}])
def test_an_engine_gives_the_tokens_of_decode(both: tuple[Any, Model], options: dict[str, Any]) -> None:
    """Prompts have prefixes in common, which are cut into other blocks in each."""
    _, model = both
    prompts = [ids(30, seed=1)[:length] for length in (9, 30, 16, 17, 25, 30)]
    settings: dict[str, Any] = {**BLOCKS, "gen_length": 20, "rule": "quota:2"}
    expected = dx.decode(model, prompts, **settings)
    with dx.Engine(model, lanes=2, max_length=64, **BLOCKS, **options) as engine:
        handles = [engine.submit(prompt, gen_length=20, rule="quota:2") for prompt in prompts]
        results = [handle.result(60) for handle in handles]
    assert [result.tokens for result in results] == [r.tolist() for r in expected.responses]
    if "draft_size" not in options:
        assert [result.nfe for result in results] == expected.nfe.tolist()
    with pytest.raises(ValueError, match=r"share: .*got blocks of A2DQwen3 that count from the end of each"):
        dx.Engine(model, share=True, **BLOCKS)


def test_the_default_of_an_engine_is_that_of_models_that_see_both_ways(both: tuple[Any, Model]) -> None:
    _, model = both
    with dx.Engine(model, max_length=64) as engine:
        assert engine.config.cache == "dual"


@pytest.mark.parametrize(
    "options",
    [{"draft_size": 3, "rule": "quota:1"}, {"active_blocks": 2}, {"sub_block_length": 4}, {"infill": True}],
    ids=str,
)
def test_finished_blocks_are_exact(both: tuple[Any, Model], options: dict[str, Any]) -> None:
    """Whatever else is asked for, each token is that of a pass over the whole text so far."""
    theirs, model = both
    prompts = prompts_of()
    if options.get("infill"):
        for prompt in prompts[2:]:
            prompt[[2, 3, -2]] = MASK
    settings: dict[str, Any] = {**BLOCKS, "gen_length": 20, "record": True, **options}
    if "rule" not in options:
        settings |= {"selector": "confidence", "threshold": 0.6}
    out = dx.decode(model, prompts, **settings)
    assert out.trajectory is not None
    for b, prompt in enumerate(prompts):
        final, steps = out.sequences[b, : len(prompt) + 20], out.trajectory.step[b]
        places = [*(prompt == MASK).nonzero()[:, 0].tolist(), *range(len(prompt), len(final))]
        seen = seen_from(torch.arange(len(final)), 8, places[0])
        step_of = dict(zip(places, steps.tolist(), strict=False))
        for step in set(step_of.values()) if "draft_size" not in options else ():
            now = [column for column in places if step_of[column] == step]
            x = final.clone()
            x[[column for column in places if step_of[column] >= step]] = MASK
            logits = logits_of(theirs, x[None], seen)[0, now]
            assert logits.argmax(-1).tolist() == final[now].tolist()
    if "draft_size" in options:
        plain = dx.decode(model, prompts, **BLOCKS, gen_length=20, rule="quota:1")
        assert torch.equal(out.sequences, plain.sequences)
        assert sum(out.nfe.tolist()) < sum(plain.nfe.tolist())


def test_what_block_diffusion_does_not_go_with_is_named(both: tuple[Any, Model]) -> None:
    theirs, model = both
    with pytest.raises(ValueError, match=r"cache: 'block' needs one of dparallel_ext\.models"):
        dx.decode(theirs, ids(1, 4), cache="block", mask_id=MASK)
    with pytest.raises(ValueError, match="refresh: belongs to cache"):
        dx.decode(model, ids(1, 4), cache="block", refresh=2)
    llada = models.LLaDA.__name__
    with pytest.raises(ValueError, match=rf'"none", "prefix" or "dual", since {llada} is not block-causal'):
        dx.decode(golden.model("llada_tiny_a"), ids(1, 4), cache="block")
