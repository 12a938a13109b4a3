"""decode and compat against what the published decoders gave: tokens, and passes, of every golden case."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from conftest import EMULATED, golden

import dparallel_ext as dx
from dparallel_ext import compat, models

PUBLISHED = {
    "none": compat.generate,
    "prefix": compat.generate_with_prefix_cache,
    "dual": compat.generate_with_dual_cache,
}
FAMILIES = [("llada_tiny_a", c) for c in PUBLISHED] + [("dream_tiny_a", "none")]


def cases(name: str, cache: str) -> list[dict]:
    return [c for c in golden.json(name, "cases") if c["cache"] == cache]


def rule(case: dict) -> dict:
    """For decode: the selector with its threshold, or what the published fixed schedule ranks by."""
    if case["threshold"] is not None:
        return {key: case[key] for key in ("threshold", "selector")}
    by_entropy = case["selector"] == "entropy" and case["cache"] != "none"
    return {"steps": case["steps"], "score": "entropy" if by_entropy else "confidence"}


def lists(chosen: list[dict]) -> dict:
    """`rule` of several cases, for sequences of one call."""
    rules = [rule(case) for case in chosen]
    return {key: rules[0][key] if key in ("steps", "score") else [r[key] for r in rules] for key in rules[0]}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cache"), FAMILIES)
def test_golden_cases(name: str, cache: str, device: str) -> None:
    """By `compat` one at a time, by `decode` all of one block length and schedule together."""
    model = golden.model(name, device=device)
    found = cases(name, cache)
    assert len(found) >= 60
    together: dict[tuple, list[dict]] = {}
    if EMULATED:
        found = sorted(found, key=lambda case: case["nfe"] * case["gen_length"])[:3]
    for case in found:
        prompt = torch.tensor([case["prompt"]])
        shared = {key: case[key] for key in ("gen_length", "block_length")}
        published = {key: case[key] for key in ("steps", "threshold", "selector")}
        tokens, nfe = PUBLISHED[cache](model, prompt, mask_id=511, **shared, **published)
        assert tokens[0, len(case["prompt"]) :].tolist() == case["tokens"], case
        assert nfe == case["nfe"], case
        fixed = case["threshold"] is None
        alike = case["block_length"], case["gen_length"] if fixed else None, case["steps"] if fixed else None
        together.setdefault(alike, []).append(case)

    for (size, *_), alike in together.items():
        out = dx.decode(
            model,
            [torch.tensor(case["prompt"]) for case in alike],
            gen_length=[case["gen_length"] for case in alike],
            block_length=size,
            cache=cache,
            record=True,
            **lists(alike),
        )
        assert out.forwards == int(out.nfe.max())
        for b, case in enumerate(alike):
            assert out.responses[b].tolist() == case["tokens"], case
            assert int(out.nfe_published[b]) == case["nfe"], case
            # decode leaves out the pass that changes nothing, where a block was complete after its first.
            assert out.trajectory is not None
            last = out.trajectory.step[b, : case["gen_length"]].view(-1, size).amax(1)  # (blocks,)
            turns = last.diff(prepend=torch.zeros(1, dtype=torch.int64))
            wasted = int((turns == 1).sum()) if cache != "none" else 0
            assert int(out.nfe[b]) == case["nfe"] - wasted, case


@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a"])
def test_a_foreign_model_gives_the_same(name: str) -> None:
    """Any module whose call returns .logits; Dream is known by its config's model_type."""

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = golden.model(name)
            self.config = type("Config", (), self.inner.config)()

        def forward(self, input_ids: torch.Tensor) -> object:
            return self.inner(input_ids)

    foreign = Foreign()
    for case in cases(name, "none")[::7]:
        shared = {key: case[key] for key in ("gen_length", "block_length")}
        out = dx.decode(foreign, torch.tensor(case["prompt"]), **shared, **rule(case))
        assert out.sequences[0, len(case["prompt"]) :].tolist() == case["tokens"]
        assert out.forwards == case["nfe"]
    with pytest.raises(ValueError, match=r"selector: expected one of .*got 'nonsense'"):
        compat.generate(foreign, torch.tensor([[1]]), selector="nonsense")
    with pytest.raises(ValueError, match=r"cache: 'dual' needs one of dparallel_ext.models"):
        dx.decode(foreign, torch.tensor([1]), cache="dual")


def test_random_remasking_and_temperature_follow_torchs_generator() -> None:
    model = golden.model("llada_tiny_a")
    prompt = torch.tensor([[5, 6, 7]])

    def run(seed: int, **kwargs: object) -> list[int]:
        torch.manual_seed(seed)
        tokens, nfe = compat.generate(model, prompt, 16, 16, 8, mask_id=511, **kwargs)
        assert nfe == 16
        assert 511 not in tokens
        return tokens[0].tolist()

    for kwargs in ({"remasking": "random"}, {"temperature": 1.0}):
        assert run(1, **kwargs) == run(1, **kwargs)
        assert len({tuple(run(s, **kwargs)) for s in range(6)}) > 1


@pytest.mark.parametrize("call", PUBLISHED.values())
def test_random_remasking_ranks_by_random_numbers_whatever_the_selector(call: Any) -> None:
    """They stand for entropies, too: none is above 1, and below 0 is none."""
    model = golden.model("llada_tiny_a")
    prompt = torch.tensor([[5, 6, 7]])
    guided = [{"cfg_scale": 0.5}] if call is compat.generate else []
    for options in ({}, *guided):
        shared = {"gen_length": 16, "block_length": 8, "mask_id": 511, "remasking": "random", **options}
        wasted = 2 if call is not compat.generate else 0  # a second pass over a block that is complete
        assert call(model, prompt, threshold=1.0, **shared)[1] == 2 + wasted
        assert call(model, prompt, threshold=0.0, **shared)[1] == 16
        runs = []
        for seed in (1, 1, 2, 3):
            torch.manual_seed(seed)
            runs.append(call(model, prompt, 16, selector="entropy", **shared)[0].tolist())
        assert runs[0] == runs[1]
        assert runs[0] != runs[2] or runs[0] != runs[3]


@pytest.mark.parametrize("cache", PUBLISHED)
def test_a_factor_commits_as_fast_dllms_loop_does(cache: str) -> None:
    """n surest masks up to the first that misses its bar; that one too, if it is the last."""
    model, alone = golden.model("llada_tiny_a"), 0
    shared: dict[str, Any] = {"gen_length": 24, "block_length": 8}
    for factor in (0.0, 0.4, 0.75, 1.0, 1.5, 30.0):

        def loop(
            stats: dx.RowStats, masked: torch.Tensor, step: torch.Tensor, factor: float = factor
        ) -> torch.Tensor:
            nonlocal alone
            chosen = torch.zeros_like(masked)
            for row, eligible, keep in zip(stats.confidence, masked, chosen, strict=True):
                order = row.masked_fill(~eligible, -1.0).argsort(descending=True, stable=True).tolist()
                count = int(eligible.sum())
                kept = next((n for n in range(1, count) if row[order[n]] < 1 - factor / (n + 2)), count)
                alone += kept == count - 1
                keep[order[: count if kept == count - 1 else kept]] = True
            return chosen

        for prompt in ([5, 6, 7], [300, 20, 11, 40, 8]):
            expected, ids = dx.decode(model, prompt, rule=loop, cache=cache, **shared), torch.tensor([prompt])
            tokens, passes = PUBLISHED[cache](model, ids, steps=24, factor=factor, **shared)
            assert torch.equal(tokens, expected.sequences), factor
            assert passes == int(expected.nfe[0])
            if cache == "none":  # through LLaDA's options; the id 511, the mask's, is never decoded
                options = {"confidence_eos_eot_inf": True, "eos_id": 511, "eot_id": 511}
                assert passes == compat.generate(model, ids, steps=24, factor=factor, **shared, **options)[1]
    assert alone
    with pytest.raises(ValueError, match="factor: expected a finite number >= 0, got -1"):
        PUBLISHED[cache](model, torch.tensor([[5]]), steps=24, factor=-1, **shared)


def test_the_prompts_masks_are_filled_as_published() -> None:
    model = golden.model("llada_tiny_a")
    prompt = torch.tensor([[5, 511, 7]])
    tokens, _ = compat.generate(model, prompt, 8, 8, 8, mask_id=511, threshold=3.5)
    assert 511 not in tokens
    out = dx.decode(model, prompt, gen_length=8, block_length=8, threshold=3.5)
    assert out.sequences[0, 1] == 511  # decode leaves the prompt alone


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.5}])
def test_a_fixed_schedule_ends_with_the_blocks_last_mask(options: dict) -> None:
    """Steps beyond it are left out; masks of the prompt that take its places add passes."""
    model = golden.model("llada_tiny_a")
    prompt = torch.tensor([[5, 6, 7]])
    shared = {"gen_length": 4, "block_length": 4, "mask_id": 511, **options}
    tokens, forwards = compat.generate(model, prompt, 4, **shared)
    more, ran = compat.generate(model, prompt, 9, **shared)
    assert torch.equal(tokens, more)
    assert forwards == ran == 4
    masks = torch.full((1, 3), 511)
    tokens, forwards = compat.generate(model, masks, 2, **shared)
    assert 511 not in tokens[:, 3:]
    assert forwards == -(-int((tokens != 511).sum()) // 2)  # each commits 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gen_length": 10, "block_length": 4}, "block_length: expected a divisor of gen_length 10"),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, "steps: expected a multiple of the 2 blocks"),
        ({"remasking": "best"}, "remasking: expected"),
    ],
)
def test_what_the_published_code_asserts_is_a_clear_error(kwargs: dict, message: str) -> None:
    model = golden.model("llada_tiny_a")
    with pytest.raises(ValueError, match=message):
        compat.generate(model, torch.tensor([[1]]), mask_id=511, **kwargs)


# --- LLaDA's options, against its loop in plain torch ---------------------------------------------


def llada_loop(
    model: models.Model,
    prompt: torch.Tensor,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    cfg_scale: float = 0.0,
    eos: int | None = None,
    last: tuple[int, ...] = (),
) -> torch.Tensor:
    """LLaDA's published loop, greedy. eos: of logits_eos_inf; last: of confidence_eos_eot_inf."""
    length, mask = prompt.shape[1], 511
    x = torch.nn.functional.pad(prompt, (0, gen_length), value=mask)
    given = x != mask
    blocks = gen_length // block_length
    for block in range(blocks):
        end = length + (block + 1) * block_length
        base, rest = divmod(block_length, steps // blocks)
        for turn in range(steps // blocks):
            masked = x == mask
            logits = model(x).logits.double()
            if cfg_scale:
                without = model(torch.where(given, mask, x)).logits.double()
                logits = without + (cfg_scale + 1) * (logits - without)
            if eos is not None:
                logits[:, :, eos] = -torch.inf
            best = logits.clone()
            best[:, :, mask] = -torch.inf  # ours never decodes it
            x0 = best.argmax(-1)
            logits[:, :, list(last)] = -torch.inf
            p = logits.softmax(-1).gather(2, x0[..., None])[..., 0]
            p[:, end:] = -torch.inf
            p = p.where(masked, -torch.inf)
            for b in range(len(x)):
                chosen = p[b].sort(descending=True, stable=True).indices[: base + (turn < rest)]
                x[b, chosen] = x0[b, chosen]
    return x


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"cfg_scale": 1.5}, {"cfg_scale": 1.5}),
        ({"logits_eos_inf": True, "eos_id": 85}, {"eos": 85}),
        ({"confidence_eos_eot_inf": True, "eos_id": 85, "eot_id": 472}, {"last": (85, 472)}),
        (
            {
                "cfg_scale": 0.5,
                "logits_eos_inf": True,
                "confidence_eos_eot_inf": True,
                "eos_id": 85,
                "eot_id": 472,
            },
            {"cfg_scale": 0.5, "eos": 85, "last": (85, 472)},
        ),
    ],
)
def test_lladas_options(ours: dict, theirs: dict) -> None:
    """To the token, also of padded prompts; each option changes them."""
    model = golden.model("llada_tiny_a")
    prompts = torch.tensor([[5, 6, 7, 8], [300, 20, 11, 40]])
    shared = {"steps": 12, "gen_length": 16, "block_length": 8}
    with torch.no_grad():
        expected = llada_loop(model, prompts, **shared, **theirs)
        plain = llada_loop(model, prompts, **shared)
        short = llada_loop(model, prompts[:1, 1:], **shared, **theirs)
    tokens, forwards = compat.generate(model, prompts, mask_id=511, **shared, **ours)
    assert torch.equal(tokens, expected)
    assert forwards == 12
    assert torch.equal(expected, plain) == (not ours)
    padded = torch.tensor([[0, 6, 7, 8], [300, 20, 11, 40]])
    tokens, _ = compat.generate(
        model, padded, mask_id=511, attention_mask=(padded != 0).long(), **shared, **ours
    )
    assert torch.equal(tokens[1], expected[1])
    assert tokens[0].tolist() == [0, *short[0].tolist()]


def test_lladas_options_take_a_threshold_and_a_temperature() -> None:
    model = golden.model("llada_tiny_a")
    prompt = torch.tensor([[5, 6, 7]])
    shared = {"gen_length": 16, "block_length": 8, "mask_id": 511, "threshold": 3.0}
    _, forwards = compat.generate(model, prompt, cfg_scale=0.5, **shared)
    assert forwards < 16
    # Guidance that changes nothing is the plain loop: there the prompt is all masks.
    masks = torch.full((1, 2), 511)
    guided, ran = compat.generate(model, masks, cfg_scale=2.0, **shared)
    plain, forwards = compat.generate(model, masks, **shared)
    assert torch.equal(guided, plain)
    assert ran == forwards
    for options in ({"cfg_scale": 0.5}, {"remasking": "random", "cfg_scale": 0.5}):
        runs = []
        for seed in (1, 1, 2, 3):
            torch.manual_seed(seed)
            runs.append(compat.generate(model, prompt, temperature=2.0, **options, **shared)[0].tolist())
        assert runs[0] == runs[1]
        assert runs[0] != runs[2] or runs[0] != runs[3]
        assert 511 not in runs[0][0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"logits_eos_inf": True}, "eos_id: expected an id below 512, got 126081"),
        ({"confidence_eos_eot_inf": True, "eos_id": 3}, "eot_id: expected an id below 512, got 126348"),
        ({"cfg_scale": -1.0}, "cfg_scale: expected a finite number >= 0"),
        (
            {"confidence_eos_eot_inf": True, "eos_id": 3, "eot_id": 4, "threshold": 0.5},
            "confidence_eos_eot_inf: 'entropy' is no rule of confidences",
        ),
        ({"steps": torch.ones(1, 1)}, "steps: expected a whole number, got a Tensor; give attention_mask"),
        ({"steps": 0}, "steps: expected a whole number >= 1, got 0"),
        ({"steps": -128}, "steps: expected a whole number >= 1, got -128"),
        ({"gen_length": -128}, "gen_length: expected a whole number >= 0, got -128"),
        ({"gen_length": None}, "gen_length: expected a whole number >= 0, got None"),
        ({"block_length": 8.0}, "block_length: expected a whole number >= 1, got 8.0"),
        ({"cfg_scale": "1"}, "cfg_scale: expected a finite number >= 0, got '1'"),
        ({"attention_mask": [[1]]}, r"attention_mask: expected the shape of prompt \(1, 1\), got list"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask: expected the shape of prompt"),
    ],
)
def test_lladas_options_are_checked(kwargs: dict, message: str) -> None:
    model = golden.model("llada_tiny_a")
    for options in ({}, {"cfg_scale": 1.0}):
        with pytest.raises(ValueError, match=message):
            compat.generate(model, torch.tensor([[1]]), mask_id=511, **{**options, **kwargs})


CALLS: list[tuple[str, str, Any]] = [
    ("llada_tiny_a", "prompt", compat.generate),
    ("llada_tiny_a", "prompt", functools.partial(compat.generate, cfg_scale=1.0)),
    ("llada_tiny_a", "prompt", compat.generate_with_prefix_cache),
    ("llada_tiny_a", "prompt", compat.generate_with_dual_cache),
    ("dream_tiny_a", "inputs", compat.diffusion_generate),
]


@pytest.mark.parametrize(("name", "argument", "call"), CALLS)
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[1, 2]], r"expected int64 \(B, P\), got list"),
        (torch.tensor([[1.5, 2.0]]), r"expected int64 \(B, P\), got torch.float32 \(1, 2\)"),
        (torch.tensor([[True]]), r"expected int64 \(B, P\), got torch.bool \(1, 1\)"),
        (torch.ones(1, 1, 1).long(), r"expected int64 \(B, P\), got torch.int64 \(1, 1, 1\)"),
        (torch.tensor([[1, 512]]), r"expected token ids in \[0, 512\), got 512"),
        (torch.tensor([[-1, 2]]), r"expected token ids in \[0, 512\), got -1"),
    ],
)
def test_prompts_are_checked(name: str, argument: str, call: Any, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: {message}"):
        call(golden.model(name), prompt)


@pytest.mark.parametrize(("name", "argument", "call"), CALLS)
def test_no_prompts(name: str, argument: str, call: Any) -> None:
    new = 20 if argument == "inputs" else 128
    tokens = call(golden.model(name), torch.zeros((0, 3), dtype=torch.int32))
    tokens = tokens if argument == "inputs" else tokens[0]
    assert tokens.shape == (0, 3 + new)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize(("name", "argument", "call"), CALLS[:2] + CALLS[4:])
def test_a_bad_row_is_named(name: str, argument: str, call: Any) -> None:
    model = golden.model(name)

    def bad(x: torch.Tensor) -> types.SimpleNamespace:
        logits = model(x).logits
        logits[1, 4, 7] = float("nan")
        return types.SimpleNamespace(logits=logits)

    options = {"mask_id": 511} if argument == "prompt" else {"mask_token_id": 511, "alg": "entropy"}
    with pytest.raises(ValueError, match="logits: sequence 1 at position 4 holds NaN"):
        call(bad, torch.tensor([[1, 2], [3, 4]]), **options)


@pytest.mark.parametrize(("name", "argument", "call"), CALLS[:2] + CALLS[4:])
def test_logits_of_the_last_token_alone_are_refused(name: str, argument: str, call: Any) -> None:
    def last(x: torch.Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=torch.zeros(len(x), 1, 8))

    mask = {"mask_id": 7} if argument == "prompt" else {"mask_token_id": 7}
    with pytest.raises(ValueError, match=r"model: expected logits \(1, \d+, V\), got \(1, 1, 8\)"):
        call(last, torch.tensor([[1, 2]]), **mask)
