"""LLaDA 2.2: experts of blocks, and its loop, which deletes and inserts, written again in plain torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_llada2 import BLOCK, EOS, MASK, ids, model_of, plain, stored
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.models import LLaDA2
from dparallel_ext.rules import Levenshtein, levenshtein

DELETE, SPLIT = 94, 95
SLOW = Levenshtein(0.6, 0.3, 3, DELETE, SPLIT)
NEW: dict[str, Any] = {"expert_capacity": 5, "block_size": BLOCK, "block_length": None}
IDS = {"delete_token_id": DELETE, "split_token_id": SPLIT}


def of_2_2(edits: float = 1.0) -> LLaDA2:
    """edits: how large the logits of `DELETE` and `SPLIT` are, as a factor."""
    model = model_of(**NEW, **IDS)
    with torch.no_grad():
        model.lm_head.weight[[DELETE, SPLIT]] *= edits
    return model


@torch.no_grad()
def test_padding_has_no_say_about_a_block_s_experts() -> None:
    model, x = of_2_2(), ids(3, 21)
    alone = model(x).logits
    for pads in (1, 3, 11):
        padded = torch.cat((x, torch.full((3, pads), 7)), 1)
        mask = torch.arange(padded.shape[1]).expand_as(padded) < 21
        logits = model(padded, attention_mask=mask).logits[:, :21]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)
    assert not torch.allclose(model(padded).logits[:, :21], alone, rtol=0, atol=1e-2)


@torch.no_grad()
def test_a_pass_routes_each_sequence_s_blocks_by_themselves() -> None:
    """Of prompts that end at other places of a block, in one batch and one by one."""
    model, prompts = of_2_2(), [ids(n, seed=n) for n in (3, 9, 17, 24)]
    for cache in ("none", "block"):
        together = dx.decode(model, prompts, gen_length=20, threshold=0.3, cache=cache)
        for prompt, response in zip(prompts, together.responses, strict=True):
            for drafts in ({}, {"draft_size": 3}):  # states of a sequence, too, side by side
                alone = dx.decode(model, prompt, gen_length=20, threshold=0.3, cache=cache, **drafts)
                assert torch.equal(alone.responses[0], response)


@pytest.mark.parametrize("active_blocks", [1, 2])
@torch.no_grad()
def test_an_engine_serves_it(active_blocks: int) -> None:
    """Blocks that a rule edits are decoded one after the other, whatever others do."""
    model, rule = of_2_2(1.5), Levenshtein(0.3, 0.2, 4, DELETE, SPLIT)
    prompts = [ids(n, seed=n) for n in (3, 9, 17, 12)]
    with dx.Engine(model, lanes=2, max_length=64, active_blocks=active_blocks) as engine:
        handles = [engine.submit(prompt, gen_length=24, rule=rule, eos_id=EOS) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            alone = dx.decode(model, prompt, gen_length=24, rule=rule, eos_id=EOS, cache="block")
            assert handle.result(60).tokens == alone.responses[0][: min(int(alone.kept), 24)].tolist()


def carried_out(
    written: list[int], old: list[int], began: list[bool], given: list[bool], rule: Levenshtein, mask: int
) -> tuple[list[int], list[bool]]:
    """The block once deletions and insertions are carried out between its given tokens, and which of its
    tokens began as masks."""
    tokens: list[int] = []
    flags: list[bool] = []
    for stays, run in itertools.groupby(range(len(written)), key=given.__getitem__):
        places, part = list(run), []
        for i in places:
            if not stays and written[i] == rule.split:
                part += [(mask, False), (old[i], began[i])]
            elif stays or written[i] != rule.delete:
                part.append((written[i], began[i]))
        part = (part + [(mask, False)] * len(places))[: len(places)]
        tokens, flags = [*tokens, *(p[0] for p in part)], [*flags, *(p[1] for p in part)]
    return tokens, flags


def likeliest(logits: Tensor, *without: int) -> int:
    logits = logits.clone()
    logits[list(without)] = -torch.inf
    return int(logits.argmax())


def published(
    logits_of: Callable[[Tensor], Tensor], x: Tensor, rule: Levenshtein, met: Counter[str], mask: int = MASK
) -> tuple[list[int], int]:
    """The published `generate` for one sequence of whole blocks, at temperature 0, with steps=BLOCK: its
    tokens and passes.

    Where it draws a position at random, this takes the least confident of those that were not taken yet. Its
    mask is never predicted, tokens stay that stand between the masks, and the last of the passes that a block
    may take ends it. met: counts what happened.
    """
    x, passes = x.clone(), 0
    for first in range(0, len(x), BLOCK):
        block = x[first : first + BLOCK].tolist()
        began, initial = [token == mask for token in block], block.count(mask)
        given = [not was for was in began]
        if not initial:
            continue
        free = [i for i in range(BLOCK) if began[i]]
        schedule = [initial // BLOCK + (step < initial % BLOCK) for step in range(BLOCK)]
        post, step, seen = 0, 0, set()
        while True:
            masks = [i for i in free if block[i] == mask]
            left = [i for i in masks if began[i]]
            post = 0 if left else post + 1
            if step == levenshtein.STEPS or (not masks and post > rule.edits):
                met["out of passes"] += 1
                break
            x[first : first + BLOCK] = torch.tensor(block)
            logits = logits_of(x[: first + BLOCK])[first:]
            passes += 1
            token = [likeliest(row, mask) for row in logits]
            p = [float(row.softmax(-1)[t]) for row, t in zip(logits, token, strict=True)]
            if step < BLOCK:
                need = schedule[step] + len(masks) - len(left)
                fill = [i for i in masks if p[i] > rule.mask]
                if len(fill) < need:
                    fill = sorted(masks, key=lambda i: -p[i])[:need]
            else:
                fill = masks
            decoded = [i for i in free if i not in masks]
            change = [i for i in decoded if p[i] > rule.edit and token[i] != block[i]]
            last = post >= rule.edits or step + 1 == levenshtein.STEPS
            if last:
                fill = masks
                for i in [*fill, *change]:
                    if token[i] in rule.tokens:
                        met["an edit too late"] += 1
                        token[i] = likeliest(logits[i], mask, rule.delete, rule.split)
            written = list(block)
            for i in [*fill, *change]:
                written[i] = token[i]
            if not last and tuple(written) in seen:
                met["seen"] += 1
                changed = [i for i in range(BLOCK) if written[i] != block[i]]
                for i in sorted(changed, key=lambda i: p[i])[:5]:
                    met["exchanged"] += 1
                    written[i] = likeliest(logits[i], mask, written[i])
                    if tuple(written) not in seen:
                        break
            seen.add(tuple(written))
            met["deleted"] += written.count(rule.delete)
            met["split"] += written.count(rule.split)
            before = block
            block, began = carried_out(written, block, began, given, rule, mask)
            met["more masks"] += block.count(mask) > before.count(mask)
            step += 1
            if block == before and mask not in block:
                met["stable"] += 1
                break
        met["steps beyond the block's"] += step > BLOCK
        x[first : first + BLOCK] = torch.tensor(block)
    return x.tolist(), passes


HAPPENS = {
    *("out of passes", "an edit too late", "seen", "exchanged", "deleted", "split", "more masks", "stable"),
    "steps beyond the block's",
}


@torch.no_grad()
def test_tokens_and_passes_are_those_of_the_published_loop(tmp_path: Path) -> None:
    met: Counter[str] = Counter()
    for factor, mask, edit, edits in (
        (1.0, 0.3, 0.2, 16),
        (1.3, 0.15, 0.0, 6),
        (1.7, 0.6, 0.3, 3),
        (1.7, 0.0, 0.5, 1),
    ):
        model, rule = of_2_2(factor), Levenshtein(mask, edit, edits, DELETE, SPLIT)
        weights = {name: tensor.double() for name, tensor in stored(model, tmp_path).items()}
        for case in range(2):
            prompt = ids(3 + 14 * case, seed=case)
            whole = -(-(len(prompt) + 14) // BLOCK) * BLOCK
            canvas = torch.cat((prompt, torch.full((whole - len(prompt),), MASK)))
            tokens, passes = published(partial(plain, weights, **NEW), canvas, rule, met)
            for cache in ("none", "block"):
                out = dx.decode(model, prompt, gen_length=14, cache=cache, rule=rule)
                assert out.responses[0].tolist() == tokens[len(prompt) :], (factor, case, mask, cache)
                assert int(out.nfe) == passes
    assert min(met[each] for each in ("deleted", "split", "more masks", "stable")) > 2, met


class Scripted:
    """A model whose logits of a block, of 12 ids, are drawn for its tokens."""

    traits = dx.models.Traits(mask_id=11, block_length=BLOCK)

    def __init__(self, seed: int, edits: float) -> None:
        """edits: what is added to the logits of 9 and 10."""
        self.seed, self.edits = seed, edits

    def of_sequence(self, x: Tensor) -> Tensor:
        blocks = []
        for first in range(0, len(x), BLOCK):
            seed = hash((self.seed, first, *x[first : first + BLOCK].tolist())) % 2**60
            blocks.append(torch.randn(BLOCK, 12, generator=torch.Generator().manual_seed(seed)))
        logits = torch.cat(blocks)
        logits[:, 9:11] += self.edits
        return logits

    def __call__(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack([self.of_sequence(row) for row in x]))


def test_blocks_end_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that go on beyond their length, or begin in the prompt."""
    monkeypatch.setattr(levenshtein, "STEPS", 40)
    met: Counter[str] = Counter()
    for case in range(80):
        model = Scripted(case, edits=(0.0, 1.0, 2.5)[case % 3])
        rule = Levenshtein((0.3, 0.99)[case % 2], (0.2, 0.5, 0.99)[case // 3 % 3], 1 + case % 7, 9, 10)
        x = torch.full((2 * BLOCK,), 11)
        x[: case % BLOCK] = case % 9
        tokens, passes = published(model.of_sequence, x, rule, met, mask=11)
        out = dx.decode(model, x[: case % BLOCK], gen_length=2 * BLOCK - case % BLOCK, rule=rule)
        assert out.sequences[0].tolist() == tokens
        assert int(out.nfe) == passes
    assert min(met[each] for each in HAPPENS) > 8, met


@torch.no_grad()
def test_given_tokens_stay_where_they_are(tmp_path: Path) -> None:
    """What is deleted or inserted moves the tokens up to the next of them."""
    met: Counter[str] = Counter()
    for factor, rule in ((1.3, Levenshtein(0.15, 0.0, 6, DELETE, SPLIT)), (1.7, SLOW)):
        model = of_2_2(factor)
        weights = {name: tensor.double() for name, tensor in stored(model, tmp_path).items()}
        for case in range(3):
            canvas = ids(24, seed=case)
            canvas[torch.randperm(24, generator=torch.Generator().manual_seed(case))[:17]] = MASK
            tokens, passes = published(partial(plain, weights, **NEW), canvas, rule, met)
            assert [token for token in tokens if token != MASK] == tokens
            for cache in ("none", "block"):
                out = dx.decode(model, canvas, gen_length=0, infill=True, cache=cache, rule=rule)
                assert out.sequences[0].tolist() == tokens
                assert int(out.nfe) == passes
    assert min(met[each] for each in ("deleted", "split", "more masks")) > 2


def test_a_block_ends_that_would_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last pass writes every mask, and no id that is to be carried out."""

    def model(x: Tensor) -> SimpleNamespace:
        logits = torch.full((*x.shape, 10), -9.0)
        logits[..., 5] = 1.0
        logits[..., 7] = 2.0  # a mask more, in front of each
        return SimpleNamespace(logits=logits)

    rule = Levenshtein(0.1, 0.1, 3, 6, 7)
    for steps, passes in ((2, 2), (5, 5), (9, 6)):  # all masks that it began with have left it after three
        monkeypatch.setattr(levenshtein, "STEPS", steps)
        out = dx.decode(model, [[1, 2]], mask_id=9, gen_length=8, block_length=4, rule=rule)
        assert (out.responses[0].tolist(), int(out.nfe)) == ([5] * 8, 2 * passes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "levenshtein"}, "rule: expected one of the model's 97 token ids, got 156930"),
        ({"rule": "levenshtein:0.5,0,16,5,95"}, "rule: expected delete=94, the delete_token_id of the model"),
        ({"rule": "levenshtein:0.5,0,16,94,93"}, "rule: expected split=95, the split_token_id of the model"),
        ({"rule": Levenshtein(0.5, 0.0, 2, 94, 95), "temperature": 1.0}, "temperature: Levenshtein commits"),
        ({"block_length": 12}, "block_length: expected a multiple of 8, since as many tokens of LLaDA2"),
        (
            {"block_length": 16, "sub_block_length": 4, "cache": "dual"},
            "sub_block_length: expected a multiple of 8",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.decode(of_2_2(), ids(4), gen_length=8, **settings)
    with pytest.raises(ValueError, match="split: expected another id than delete, 5, got 5"):
        Levenshtein(delete=5, split=5)
