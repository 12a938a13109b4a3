"""Self-speculation in a window (SDLM, WeDLM): the text of a token a pass, in fewer; SDLM's published one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import sdlm
import torch
import wedlm
from test_self_speculation import check_trajectories
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.batch import Batch
from dparallel_ext.decoding.decode import run, start_batch
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.models import Model

pytest_plugins = ["taping"]

ONE: dict[str, Any] = {"rule": "one", "record": True}
THEIRS = sdlm.of_few_words(sdlm.theirs())
MODELS: dict[str, Model] = {
    "sdlm": models.wrap(THEIRS),
    "wedlm": models.wrap(sdlm.of_few_words(wedlm.theirs())),
}
SDLM = MODELS["sdlm"]


def ids(n: int, seed: int) -> Tensor:
    return sdlm.ids(n, seed=seed)


@pytest.mark.parametrize("size", [2, 4, 11])
@pytest.mark.parametrize(("prompt", "gen_length"), [(5, 40), (1, 7), (23, 33), (70, 20)])
def test_it_is_the_published_loop(prompt: int, gen_length: int, size: int) -> None:
    """Tokens, and the passes that bring them. The first of a pass's tokens, which the published loop keeps
    for the next, is committed at once."""
    x = ids(prompt, seed=prompt)
    expected = sdlm.self_speculative(THEIRS, x, gen_length, size)
    settings: dict[str, Any] = {"block_length": size, "draft_size": size - 1, **ONE}
    out = dx.decode(SDLM, x, gen_length=gen_length + size - 1, **settings)
    assert out.trajectory is not None
    kept = len(expected.tokens)
    assert out.responses[0][:kept].tolist() == expected.tokens
    steps = [1, *(number for number, count in enumerate(expected.filled, 2) for _ in range(count))]
    assert out.trajectory.step[0, :kept].tolist() == steps[:kept]
    one = sdlm.published(THEIRS, x, kept, size, tau=1.0)
    assert expected.tokens == one.tokens  # its text is that of a token a pass
    # Windows that end where the response does.
    out = dx.decode(SDLM, x, gen_length=gen_length, **settings)
    alone = dx.decode(SDLM, x, gen_length=gen_length, block_length=size, **ONE)
    assert torch.equal(out.sequences, alone.sequences)
    assert int(out.nfe) <= int(alone.nfe) == gen_length
    assert int(out.canvases) <= size * int(out.nfe)


def test_the_cases_tell() -> None:
    """Passes accept some guesses and all, over the ends of blocks."""
    expected = sdlm.self_speculative(THEIRS, ids(5, seed=5), 60)
    assert set(expected.filled) == {1, 2, 3, 4}


@pytest.mark.parametrize("at", [0, 1, 3, 4, 10, 39])
def test_an_end_token_ends_it(at: int) -> None:
    """In the published passes, whichever end token; what is guessed behind it counts for nothing."""
    x = ids(5, seed=5)
    whole = sdlm.self_speculative(THEIRS, x, 44).tokens
    ends = (whole[at], whole[20])
    expected = sdlm.self_speculative(THEIRS, x, 44, ends=ends)
    out = dx.decode(SDLM, x, gen_length=44, eos_id=ends, draft_size=3, **ONE)
    alone = dx.decode(SDLM, x, gen_length=44, eos_id=ends, **ONE)
    assert out.responses[0][: int(out.kept)].tolist() == expected.tokens
    for field in ("sequences", "kept", "generated", "nfe_published"):
        assert torch.equal(getattr(out, field), getattr(alone, field)), field
    # The published loop has the end token among a pass's tokens one pass after it is predicted, unless with
    # guesses in front of it.
    assert int(out.nfe) in (expected.passes - 1, expected.passes)


def random_case(rng: random.Random, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    count = rng.randint(1, 4)
    prompts = [ids(rng.randint(1, 90), seed=rng.randrange(999)) for _ in range(count)]
    case: dict[str, Any] = {
        "gen_length": [rng.randint(0, 40) for _ in prompts],
        "block_length": rng.choice([1, 2, 3, 4, 8, 11]),
        "temperature": rng.choice([0.0, 0.0, 0.7]),
        "seed": rng.randrange(99),
        "batch_invariant": rng.random() < 0.2,
        "suppress": [7, 9] if rng.random() < 0.2 else None,
        "graphs": rng.random() < 0.5,
        **rng.choice([{}, {}, {"rule": "quota:2"}, {"rule": "quota:9"}, {"score": "margin"}]),
    }
    if rng.random() < 0.5:
        ends = [rng.randrange(5, 59) for _ in range(4)]
        ends[0] = rng.choice([ends[0], 10, 11, 12])  # the words of these models
        case |= {"eos_id": ends[:2], "stop": [ends[2:3], ends[2:]]}
    return prompts, case


@pytest.mark.parametrize("name", ["sdlm", "wedlm"])
def test_the_text_is_that_of_the_schedule_alone(name: str) -> None:
    """Random cases: every field but the passes, of which there are fewer, and all that was committed."""
    rng, saved, crossed = random.Random(0), 0, 0
    model = MODELS[name]
    for _ in range(20):
        prompts, case = random_case(rng, name)
        size = rng.randint(1, 12)
        shared = {"record": True, "logprobs": True, **case}
        plain = dx.decode(model, prompts, **shared)
        out = dx.decode(model, prompts, draft_size=size, **shared)
        for field in ("sequences", "generated", "kept", "lengths", "nfe_published"):
            assert torch.equal(getattr(out, field), getattr(plain, field)), (case, field)
        assert bool((out.nfe <= plain.nfe).all())
        assert bool((out.canvases <= (1 + min(size, case["block_length"])) * out.nfe).all())
        check_trajectories(out, plain, name == "sdlm" or "eos_id" not in case)
        saved += int((plain.nfe - out.nfe).sum())
        step = out.trajectory.step if out.trajectory is not None else torch.zeros(0)
        for row in step:
            passes, length = row[row > 0].tolist(), case["block_length"]
            crossed += any(passes[at - 1] == passes[at] for at in range(length, len(passes), length))
    assert saved > 50
    assert crossed > 5


@pytest.mark.parametrize("name", ["sdlm", "wedlm"])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.7, "seed": 5, "top_p": 0.9}], ids=["0", "0.7"])
def test_an_engine_shares_what_guessed_states_have_stored(name: str, sampled: dict[str, Any]) -> None:
    """Keys and values of an accepted state are the sequence's own at once: others read them."""
    model = MODELS[name]
    common = ids(23, seed=23)
    prompts = [torch.cat((common, ids(n, seed=n))) for n in (1, 2, 4, 6)]
    lengths, settings = (9, 40, 16, 17), {"rule": "one", "block_length": 4, **sampled}
    alone = [
        dx.decode(model, p, gen_length=n, draft_size=3, **settings)
        for p, n in zip(prompts, lengths, strict=True)
    ]
    plain = [dx.decode(model, p, gen_length=n, **settings) for p, n in zip(prompts, lengths, strict=True)]
    engine = dx.Engine(model, lanes=2, max_length=72, page_size=5, draft_size=3, **settings)
    with engine:
        for turn in range(2):
            handles = [engine.submit(p, gen_length=n) for p, n in zip(prompts, lengths, strict=True)]
            streamed = [[token for part in handle for token in part] for handle in handles]
            found = [handle.result(60) for handle in handles]
            assert [each.tokens for each in found] == [out.responses[0].tolist() for out in plain]
            assert streamed == [each.tokens for each in found]
            assert [each.nfe for each in found] == [int(out.nfe[0]) for out in alone]
            assert [each.nfe_published for each in found] == [int(out.nfe_published[0]) for out in plain]
            assert turn == 0 or all(each.reused >= 20 for each in found)
        # A response is shared, too, as far as it is stored.
        text = torch.cat((prompts[1], plain[1].responses[0]))
        for length in (64, 60, 52, 41):
            again = engine.submit(text[:length], gen_length=4).result(60)
            assert again.reused >= length - 9
            expected = dx.decode(model, text[:length], gen_length=4, **settings)
            assert again.tokens == expected.responses[0].tolist()
        stats = engine.stats
    assert stats.drafted_tokens > stats.accepted_tokens > 0
    assert sum(int(out.nfe) for out in alone) < sum(int(out.nfe) for out in plain)


def test_passes_are_replayed(taped: list[Graphs]) -> None:
    model, prompts = models.wrap(THEIRS), [ids(n, seed=n) for n in (5, 1, 23)]
    settings: dict[str, Any] = {"gen_length": [40, 7, 33], "draft_size": 3, **ONE}
    expected = dx.decode(model, prompts, graphs=False, **settings)
    out = dx.decode(model, prompts, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert taped[0].recorder is not None, "a recording failed"
    assert taped[0].replays >= 5


def test_a_streamer_gets_every_token_once() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.sent: list[int] = []

        def put(self, value: Tensor) -> None:
            self.sent += value.flatten().tolist()

        def end(self) -> None:
            pass

    for gen_length in (1, 4, 30, 41):
        streamer = Streamer()
        out = dx.decode(
            SDLM, ids(5, seed=5), gen_length=gen_length, rule="one", draft_size=3, streamer=streamer
        )
        assert streamer.sent == out.sequences[0].tolist()


@pytest.mark.parametrize(
    ("name", "rule", "said"),
    [
        ("sdlm", "confidence:0.9", "draft_size: needs a fixed number .* got the selector 'confidence'"),
        ("wedlm", "distance:0.4,0.02", "draft_size: goes with policy rows alone, .* got the rule Distance"),
    ],
)
def test_a_threshold_is_refused(name: str, rule: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dx.decode(MODELS[name], ids(5, seed=5), gen_length=8, rule=rule, draft_size=3)


@pytest.mark.parametrize("name", ["sdlm", "wedlm"])
def test_a_completed_block_is_named(name: str) -> None:
    """Also one that a guessed state completed, while a state behind it is in the next: it can be streamed."""
    config, beyond = dx.DecodeConfig(gen_length=60, block_length=4, rule="one"), 0
    with torch.inference_mode():
        batch = start_batch(MODELS[name], [ids(9, seed=n) for n in range(4)], config, draft_size=3)
        while batch.live:
            before = [batch.sequences[b].block_index for b in range(4)]
            finished = batch.step()
            after = [batch.sequences[b].block_index for b in range(4)]
            assert sorted(finished) == [b for b in range(4) if after[b] > before[b]]
            beyond += sum(not batch.sequences[b].between_blocks for b in finished)
            batch.enter(finished)
    assert beyond > 0


@pytest.mark.parametrize("name", ["sdlm", "wedlm"])
def test_final_keys_are_the_sequences_own_at_once(name: str) -> None:
    """An engine shares the sequence's pages after a pass, and a sequence that is done has no pass more."""
    config, behind = dx.DecodeConfig(gen_length=30, block_length=4, rule="one"), 0

    def keys(batch: Batch, count: int) -> Tensor:
        cache, at = batch.kv_cache, torch.arange(count)
        assert cache is not None
        return cache.slots[:, :, cache.block_table[0, at // cache.page_size], :, at % cache.page_size]

    with torch.inference_mode():
        plain, batch = (start_batch(MODELS[name], [ids(9, seed=1)], config, draft_size=n) for n in (0, 3))
        run(plain, None, False, "")
        while batch.live:
            finished, sequence = batch.step(), batch.sequences[0]
            final = sequence.num_cached
            torch.testing.assert_close(keys(batch, final), keys(plain, final))
            behind += sequence.accepted > 0
            batch.enter(finished)
    assert behind > 3


@pytest.mark.parametrize("name", ["sdlm", "wedlm"])
def test_an_engine_guesses_nothing_behind_an_end(name: str) -> None:
    """An engine leaves masks there, as guesses do."""
    model, saved = MODELS[name], 0
    fixed: dict[str, Any] = {"block_length": 8, "rule": "one"}
    with dx.Engine(model, lanes=1, max_length=96, draft_size=7, **fixed) as engine:
        for seed in range(3):
            x = ids(9, seed=seed)
            text = dx.decode(model, x, gen_length=40, **fixed).responses[0].tolist()
            for eos_id in (text[2:4], text[20], text[11]):
                own = {"gen_length": 40, "eos_id": eos_id}
                found = engine.submit(x, **own).result(60)
                plain = dx.decode(model, x, **own, **fixed)
                alone = dx.decode(model, x, draft_size=7, **own, **fixed)
                assert found.tokens == plain.responses[0][: int(plain.kept)].tolist()
                assert (found.nfe, found.nfe_published) == (int(alone.nfe), int(plain.nfe_published))
                saved += int(plain.nfe) - found.nfe
    assert saved > 0
