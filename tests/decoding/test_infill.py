"""Infill and warm start: masks between given tokens, with every cache, alone, together and in the Engine."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor

import dparallel_ext as dx
from benchmarks.baselines import Plain, published
from dparallel_ext import models
from dparallel_ext.decoding.sequence import lay_out

MASK, BLOCK = 511, 8


def fast_dllm() -> models.Model:
    """Block-causal with shifted logits; its blocks of 8 are filled by sub-blocks of 4."""
    torch.manual_seed(0)
    config = {"model_type": "Fast_dLLM_Qwen", "bd_size": BLOCK, "vocab_size": 512, "mask_token_id": MASK}
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = models.FastDLLM(config).eval()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.ndim == 2):
            p.normal_(std=p.shape[1] ** -0.5)
        model.lm_head.weight *= 8
        model.lm_head.weight[MASK] = 0
    return model


MODELS = {name: golden.model(name) for name in ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a")}
MODELS["fast_dllm"] = fast_dllm()
BIDIRECTIONAL = [
    (name, cache) for name in ("llada_tiny_a", "dream_tiny_a") for cache in ("none", "prefix", "dual")
]
BLOCK_CAUSAL = [("sdar_tiny_a", "none"), ("sdar_tiny_a", "block")]
BLOCK_CAUSAL += [("fast_dllm", cache) for cache in ("none", "block", "dual")]
WAYS = BIDIRECTIONAL + BLOCK_CAUSAL
RULES: dict[str, dict[str, Any]] = {
    "llada_tiny_a": {"threshold": 2.0},
    "dream_tiny_a": {"threshold": 2.0},
    "sdar_tiny_a": {"threshold": 0.05, "selector": "confidence"},
    "fast_dllm": {"threshold": 0.3, "selector": "confidence", "sub_block_length": 4},
}


@pytest.fixture(autouse=True)
def _there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs on every device."""
    for model in MODELS.values():
        model.to(device)
    monkeypatch.setattr(f"{__name__}.PROMPTS", [prompt.to(device) for prompt in PROMPTS])


def gapped(seed: int, length: int, *gaps: tuple[int, int]) -> Tensor:
    prompt = torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(seed))
    for start, end in gaps:
        prompt[start:end] = MASK
    return prompt


PROMPTS = [
    gapped(1, 40, (9, 20)),  # text on both sides, over a block's end
    gapped(2, 43, (3, 5), (7, 8), (30, 41)),  # three gaps, a block between that holds none
    gapped(3, 24, (0, 6), (20, 24)),  # at the beginning and at the end
    gapped(4, 33, (16, 24), (25, 26), (28, 33)),  # a warm start, at the edge of a block
    gapped(5, 11),  # none
    gapped(6, 13, (0, 13)),  # nothing else
]


@torch.no_grad()
def published_infill(forward: Plain, x: Tensor, rule: dict[str, Any], cache: str) -> tuple[list[int], int]:
    """The published loop over a sequence (L,) whose masks lie anywhere: `x[:, start:end]` block by block from
    the first mask on, until it holds none. Tokens, passes.
    """
    x, passes, length = x[None].clone(), 0, len(x)
    for start in range(int((x[0] == MASK).nonzero()[0]), length, BLOCK):
        end, turn = min(start + BLOCK, length), 0
        while bool((x[:, start:end] == MASK).any()):
            if cache != "none" and turn:
                last = end if cache == "dual" else length
                part = x[:, start:last]
                published(part, forward(part, start), MASK, 0, end - start, rule["threshold"])
            else:  # as published, Dream's first position, whose logits are those of the one before, by itself
                alone = cache != "none" and forward.model.shift and x[0, start] == MASK
                published(x, forward(x), MASK, start, start + 1 if alone else end, rule["threshold"])
            turn += 1
            passes += 1
    return x[0].tolist(), passes


@torch.no_grad()
def published_block_infill(model: models.Model, x: Tensor, rule: dict[str, Any]) -> tuple[list[int], int]:
    """SDAR's and Fast-dLLM v2's loops, of whole passes: blocks count from 0, the first token of a block that
    is masked is by the block before alone where logits are shifted, then sub-block by sub-block.
    """
    x, passes, length = x.clone(), 0, len(x)
    part = rule.get("sub_block_length", BLOCK)

    def commit(start: int, end: int) -> None:
        nonlocal passes
        logits = model(x[None]).logits[0].double()
        if model.shift:
            logits = torch.cat((logits[:1], logits[:-1]))
        p = logits.softmax(-1)
        p[:, MASK] = -1
        sure, token = p[start:end].max(-1)
        sure[x[start:end] != MASK] = -1
        chosen = sure > rule["threshold"]
        chosen[sure.argmax()] = True
        x[start:end][chosen] = token[chosen]
        passes += 1

    for start in range(0, length, BLOCK):
        if model.shift and start and x[start] == MASK:
            commit(start, start + 1)
        for low in range(start, min(start + BLOCK, length), part):
            high = min(low + part, length)
            while bool((x[low:high] == MASK).any()):
                commit(low, high)
    return x.tolist(), passes


def expected(name: str, cache: str, x: Tensor) -> tuple[list[int], int]:
    if MODELS[name].block_length is None:
        return published_infill(Plain(MODELS[name]), x, RULES[name], cache)
    return published_block_infill(MODELS[name], x, RULES[name])


def settings_of(name: str, cache: str) -> dict[str, Any]:
    """`refresh=1` makes the sub-block cache exact, so that whole passes can be compared with."""
    refresh = {"refresh": 1} if (name, cache) == ("fast_dllm", "dual") else {}
    return {"block_length": BLOCK, "cache": cache, **RULES[name], **refresh}


@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_tokens_and_passes_are_those_of_the_published_loop(name: str, cache: str) -> None:
    """On a sequence whose masks lie in the middle; all of them together, each as alone."""
    settings = settings_of(name, cache)
    together = dx.decode(MODELS[name], PROMPTS, gen_length=0, infill=True, **settings)
    for b, prompt in enumerate(PROMPTS):
        found = together.sequences[b, : len(prompt)]
        masked = prompt == MASK
        assert torch.equal(found[~masked], prompt[~masked])
        assert MASK not in found
        assert torch.equal(together.masked[b, : len(prompt)], masked)
        assert torch.equal(together.responses[b], found[masked])
        if not masked.any():
            assert int(together.nfe[b]) == int(together.generated[b]) == 0
            continue
        tokens, passes = expected(name, cache, prompt)
        assert found.tolist() == tokens
        assert int(together.nfe[b]) == passes
        assert int(together.generated[b]) == int(together.kept[b]) == int(masked.sum())
    assert together.forwards == int(together.nfe.max())
    assert int(together.nfe.sum()) < int(together.generated.sum())  # several at a time


@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_masks_of_the_prompt_and_after_it(name: str, cache: str) -> None:
    """With gen_length, the response goes on behind the prompt: where the masks stand alone matters."""
    settings, model = (
        {**settings_of(name, cache), "infill": True, "record": True, "logprobs": True},
        MODELS[name],
    )
    whole = [torch.cat((prompt, prompt.new_full((16 - len(prompt) % 8,), MASK))) for prompt in PROMPTS]
    counts = [len(x) - len(prompt) for x, prompt in zip(whole, PROMPTS, strict=True)]
    said = dx.decode(model, whole, gen_length=0, **settings)
    out = dx.decode(model, PROMPTS, gen_length=counts, **settings)
    assert torch.equal(out.sequences, said.sequences)
    assert torch.equal(out.masked, said.masked)
    assert torch.equal(out.nfe, said.nfe)
    assert torch.equal(out.trajectory.step, said.trajectory.step)
    assert out.prompt_lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    assert out.lengths.tolist() == [len(x) for x in whole]
    for b, response in enumerate(out.responses):
        steps, sure = (field[b] for field in (out.trajectory.step, out.trajectory.confidence))
        assert torch.equal(out.logprobs[b].isnan(), sure.isnan())
        assert steps[: len(response)].min() == 1
        assert steps[: len(response)].max() == out.nfe[b]
        assert not steps[len(response) :].any()
        assert sure[len(response) :].isnan().all()
        assert not sure[: len(response)].isnan().any()


@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_without_masks_in_the_prompt_nothing_changes(name: str, cache: str) -> None:
    """And without `infill` they stay as they are, whatever is decoded behind them."""
    settings, model = {**settings_of(name, cache), "gen_length": 13, "record": True}, MODELS[name]
    plain = [gapped(seed, length) for seed, length in ((7, 5), (8, 16))]
    for out in (dx.decode(model, plain, infill=True, **settings),):
        ours = dx.decode(model, plain, **settings)
        assert torch.equal(out.sequences, ours.sequences)
        assert torch.equal(out.nfe, ours.nfe)
        assert torch.equal(out.trajectory.step, ours.trajectory.step)
        assert torch.equal(out.nfe_published, ours.nfe_published)
    given = torch.cat((PROMPTS[0], PROMPTS[0].new_tensor([MASK, 5])))  # in the response's first block, too
    kept = dx.decode(model, given, **settings)
    assert torch.equal(kept.sequences[0, :42], given)
    assert MASK not in kept.responses[0]


@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_a_request_gets_what_decode_gives_it(name: str, cache: str) -> None:
    settings, model = {**RULES[name], "infill": True, "logprobs": True}, MODELS[name]
    sub_block = {"sub_block_length": settings.pop("sub_block_length")} if name == "fast_dllm" else {}
    prompts, counts = PROMPTS * 2, [0, 8, 3, 16, 5, 0] + [0] * 6
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}]
    with dx.Engine(
        model, cache=cache, block_length=BLOCK, lanes=3, max_length=64, page_size=BLOCK, **sub_block
    ) as engine:
        each = list(zip(prompts, counts, itertools.cycle(ways)))
        drafts: list[list[dx.DraftEvent]] = [[] for _ in each]
        handles = [
            engine.submit(p, gen_length=n, on_draft=seen.append, **settings, **way)
            for (p, n, way), seen in zip(each, drafts, strict=True)
        ]
        for handle, seen, (prompt, count, way) in zip(handles, drafts, each, strict=True):
            done, streamed = handle.result(60), list(itertools.chain.from_iterable(handle))
            seeded = {**way, "seed": torch.tensor([way.get("seed", 0)])}
            out = dx.decode(
                model,
                prompt,
                gen_length=count,
                cache=cache,
                block_length=BLOCK,
                **settings,
                **sub_block,
                **seeded,
            )
            asked = int((prompt == MASK).sum()) + count
            assert done.tokens == streamed == out.responses[0][:asked].tolist()
            assert (
                done.logprobs == handle.logprobs == pytest.approx(out.logprobs[0][:asked].tolist(), abs=1e-4)
            )
            assert (done.nfe, done.prompt_length) == (int(out.nfe), len(prompt))
            assert [draft.nfe for draft in seen] == list(range(1, done.nfe + 1))
            for draft in seen:  # of the block's places that held masks
                final = done.tokens[draft.start : draft.start + len(draft.tokens)]
                assert all(a in (None, b) for a, b in zip(draft.tokens, final, strict=True))
            assert not seen or seen[-1].start + len(seen[-1].tokens) == asked
            assert done.finish_reason == "length"
        assert engine.stats.prompt_tokens == sum(int((p != MASK).sum()) for p in prompts)
        assert engine.stats.pages_used == 0


@pytest.mark.parametrize("name", ["sdar_tiny_a", "fast_dllm"])
def test_pages_are_shared_up_to_the_first_mask(name: str) -> None:
    """A page with masks is nobody else's, a filled one is what any page of its tokens is."""
    model, rule = MODELS[name], {k: v for k, v in RULES[name].items() if k != "sub_block_length"}
    prompt = gapped(9, 64, (18, 20), (40, 44))
    with dx.Engine(model, lanes=1, max_length=96, page_size=BLOCK) as engine:

        def ask(prompt: Tensor, gen_length: int = 0) -> dx.Completion:
            return engine.submit(prompt, gen_length=gen_length, infill=True, **rule).result(60)

        first = ask(prompt)
        assert (first.reused, ask(prompt).reused) == (0, 16)
        filled = prompt.clone()
        filled[prompt == MASK] = torch.tensor(first.tokens, device=prompt.device)
        # Blocks in front of the last that was filled are final, whether they held masks or not.
        again = ask(filled, gen_length=8)
        assert again.reused == 40
        fresh = dx.decode(model, filled, gen_length=8, cache="block", **rule)
        assert again.tokens == fresh.responses[0].tolist()
        other = torch.cat((filled[:16], prompt[16:]))
        assert ask(other).tokens == first.tokens


def position_model(length: int, **said: int) -> Any:
    """Says token p + 10 at position p, surely; and what is said otherwise."""
    logits = torch.full((length, 64), -9.0)
    logits[torch.arange(length), torch.arange(length) + 10] = 9.0
    for position, token in said.items():
        logits[int(position[1:]), token] = 20.0
    return lambda ids: SimpleNamespace(logits=logits[None].expand(len(ids), -1, -1))


@pytest.mark.parametrize(("eos", "stop"), [(1, ()), (None, ([1, 17],)), (1, ([9, 9],))])
def test_an_end_cuts_no_given_text(eos: int | None, stop: Any) -> None:
    """EOS in the last gap ends it and leaves padding there; in front of another gap it is a token as any."""
    x = torch.tensor([3, 3, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 3, 3])
    model = position_model(14, p2=1, p3=17, p6=1)
    settings: dict[str, Any] = {"gen_length": 0, "block_length": 3, "threshold": 0.5, "mask_id": 0}
    out = dx.decode(model, x, infill=True, eos_id=eos, stop=stop, **settings)
    pad = 0 if eos is None else eos
    # Blocks from column 2: [2, 5), [5, 8), which holds the end at 6, and no more.
    assert out.sequences[0].tolist() == [3, 3, 1, 17, 3, 3, 1, 17, *[pad] * 4, 3, 3]
    assert (int(out.nfe), int(out.generated), int(out.kept)) == (2, 4, 2)
    assert (out.tokens_per_forward, out.padded_tokens_per_forward) == (1.0, 2.0)
    assert out.responses[0].tolist() == [1, 17, 1, 17, *[pad] * 4]
    plain = dx.decode(model, x, infill=True, **settings)
    assert (int(plain.nfe), int(plain.kept)) == (4, 8)
    slow = dx.decode(model, x, infill=True, eos_id=eos, stop=stop, **{**settings, "threshold": None})
    assert slow.sequences[0, :6].tolist() == [3, 3, 1, 17, 3, 3]  # though a mask is behind EOS at first
    over = dx.decode(model, x, infill=True, stop=[[21, 3]], **settings)  # its end would be a given token
    assert int(over.kept) == 8
    one = torch.tensor([3, 3, 0, 0, 3, 0, 0])  # one given token lies between the gaps
    apart = dx.decode(position_model(7, p2=1, p3=17), one, infill=True, eos_id=eos, stop=stop, **settings)
    assert apart.sequences[0].tolist() == [3, 3, 1, 17, 3, 15, 16]
    assert int(apart.kept) == 4


def test_an_engine_stops_in_the_gap_too() -> None:
    model = MODELS["llada_tiny_a"]
    prompt = gapped(11, 40, (4, 6), (10, 34))
    settings: dict[str, Any] = {"gen_length": 0, "infill": True, "threshold": 2.0}
    plain = dx.decode(model, prompt, block_length=BLOCK, cache="dual", **settings)
    response = plain.responses[0].tolist()
    stop = response[12:14]
    first = next(i for i in range(2, 26) if response[i : i + 2] == stop)
    with dx.Engine(model, block_length=BLOCK, lanes=1, max_length=64) as engine:
        handle = engine.submit(prompt, stop=[stop], **settings)
        assert handle.result(60).tokens == list(itertools.chain.from_iterable(handle)) == response[:first]
        assert handle.result().finish_reason == "stop"
        assert handle.result().nfe < int(plain.nfe)


def test_the_fixed_schedule_shares_out_the_masks_of_each_block() -> None:
    """4 passes for each of the 2 blocks that hold masks: 8 by 2, and 5 by 2, 1, 1, 1."""
    prompt = gapped(12, 48, (8, 16), (33, 38))
    out = dx.decode(
        MODELS["llada_tiny_a"], prompt, gen_length=0, infill=True, block_length=16, steps=8, record=True
    )
    assert out.trajectory.step[0].bincount().tolist() == [0, 2, 2, 2, 2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="steps: expected a multiple of the 2 blocks, got 3"):
        dx.decode(MODELS["llada_tiny_a"], prompt, gen_length=0, infill=True, block_length=16, steps=3)


class Recorder:
    def __init__(self, drafts: bool) -> None:
        self.put_: list[list[int]] = []
        self.drafts: list[list[int]] = []
        if drafts:
            self.put_draft = lambda value: self.drafts.append(value.flatten().tolist())

    def put(self, value: Tensor) -> None:
        self.put_.append(value.flatten().tolist())

    def end(self) -> None:
        self.put_.append([])


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_streamer_gets_everything_once_and_in_order(cache: str) -> None:
    settings = {"gen_length": 6, "infill": True, "block_length": BLOCK, "cache": cache, "threshold": 2.0}
    for prompt in PROMPTS:
        streamer = Recorder(drafts=True)
        out = dx.decode(MODELS["llada_tiny_a"], prompt, streamer=streamer, **settings)
        whole = out.sequences[0].tolist()
        first = int(out.masked[0].nonzero()[0])
        assert streamer.put_[0] == whole[:first]
        assert list(itertools.chain.from_iterable(streamer.put_)) == whole
        assert len(streamer.drafts) == out.forwards
        assert len(streamer.drafts[0]) == len(whole) - first
        seen = Recorder(drafts=False)
        dx.decode(MODELS["llada_tiny_a"], prompt, streamer=seen, **settings)
        assert seen.put_ == streamer.put_


def test_policies_of_ones_own_and_sampling_are_as_alone() -> None:
    model, settings = MODELS["llada_tiny_a"], {"gen_length": 3, "infill": True, "block_length": BLOCK}

    def pairs(stats: dx.RowStats, eligible: Tensor, step: Tensor) -> Tensor:
        return dx.select(stats, eligible, dx.policies.make("quota", 2, batch=len(eligible)))

    rows = dx.decode(model, PROMPTS, policy=dx.policies.make("quota", 2, batch=6), **settings)
    assert torch.equal(dx.decode(model, PROMPTS, policy=pairs, **settings).sequences, rows.sequences)
    seeds = torch.arange(6)
    sampled = dx.decode(model, PROMPTS, temperature=0.9, seed=seeds, threshold=2.0, **settings)
    for b, prompt in enumerate(PROMPTS):
        alone = dx.decode(model, prompt, temperature=0.9, seed=seeds[b : b + 1], threshold=2.0, **settings)
        assert torch.equal(alone.responses[0], sampled.responses[b])


def test_layouts() -> None:
    """Today's call is the case where masks stand behind the prompt alone."""
    assert lay_out(5, 20, 8, False).blocks == [(5, 13), (13, 21), (21, 25)]
    causal = lay_out(5, 20, 8, True)
    assert (causal.blocks, causal.length) == ([(5, 8), (8, 16), (16, 24), (24, 32)], 32)
    assert list(causal.columns) == list(range(5, 32))
    between = lay_out(40, 0, 8, False, None, [3, 4, 30])
    assert (between.blocks, between.length, list(between.columns)) == ([(3, 11), (27, 35)], 40, [3, 4, 30])
    assert lay_out(42, 0, 8, True, None, [3, 30, 41]).blocks == [(3, 8), (24, 32), (40, 42)]
    assert lay_out(9, 0, 8, True)[:3] == ([], [], 9)
