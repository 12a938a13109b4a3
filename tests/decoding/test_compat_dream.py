"""compat.diffusion_generate: Dream's published loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import golden

from dparallel_ext import compat, models


def dream_loop(
    model: models.Model,
    prompt: torch.Tensor,
    *,
    steps: int,
    new: int,
    alg: str,
    alg_temp: float = 0.0,
    eps: float = 1e-3,
    top_p: float | None = None,
    top_k: int | None = None,
    rivalled: bool = False,
) -> list[torch.Tensor]:
    """Dream's published loop, greedy, over one or more prompts of one length; the state after each step."""
    mask, states = 511, []
    x = torch.nn.functional.pad(prompt, (0, new), value=mask)
    times = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        masked = x == mask
        logits = model(x).logits
        logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)[masked]  # (N, V)
        if rivalled:
            logits = mask_in_second_place(logits)
        if top_p is not None:
            ordered, order = logits.sort(descending=True)
            remove = ordered.softmax(-1).cumsum(-1) > top_p
            remove[:, 1:] = remove[:, :-1].clone()
            remove[:, 0] = False
            logits = logits.masked_fill(remove.scatter(1, order, remove), torch.finfo(logits.dtype).min)
        if top_k is not None:
            worst = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < worst, torch.finfo(logits.dtype).min)
        p = logits.softmax(-1)
        confidence, x0 = p.max(-1)
        if alg == "origin":
            share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
            moved = torch.rand(len(x0)) < share
            x[masked] = torch.where(moved, x0, mask)
        else:
            if alg == "topk_margin":
                confidence = p.topk(2).values.diff().neg()[:, 0]
            elif alg == "entropy":
                confidence = (p * (p + 1e-10).log()).sum(-1)
            mean = masked.sum() / len(x)
            many = int(mean * (1 - times[i + 1] / times[i])) if i < steps - 1 else int(mean)
            full = torch.full(x.shape, -torch.inf)
            full[masked] = confidence
            if many and alg_temp:
                chosen = torch.multinomial((full / alg_temp).softmax(-1), many)
            elif many:
                chosen = full.sort(dim=1, descending=True, stable=True).indices[:, :many]
            if many:
                guess = torch.full_like(x, mask)
                guess[masked] = x0
                x = x.scatter(1, chosen, guess.gather(1, chosen))
        states.append(x.clone())
    return states


@pytest.mark.parametrize("alg", compat.ALGORITHMS)
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 20},
        {"steps": 6, "eps": 0.1},
        {"steps": 6, "top_p": 0.8},
        {"steps": 5, "top_p": 0.9, "top_k": 3},
        {"steps": 8, "alg_temp": 0.3},
    ],
)
def test_dreams_options(alg: str, options: dict) -> None:
    """To the token in every step, random positions included: they are drawn as published."""
    model = golden.model("dream_tiny_a")
    prompts = torch.tensor([[5, 6, 7, 8], [300, 20, 11, 40]])
    torch.manual_seed(3)
    with torch.no_grad():
        expected = dream_loop(model, prompts, new=12, alg=alg, **options)
    torch.manual_seed(3)
    out = compat.diffusion_generate(
        model,
        prompts,
        max_new_tokens=12,
        alg=alg,
        output_history=True,
        return_dict_in_generate=True,
        **options,
    )
    assert isinstance(out, compat.DreamOutput)
    assert out.history is not None
    assert len(out.history) == options["steps"]
    for i, (a, b) in enumerate(zip(out.history, expected, strict=True)):
        assert torch.equal(a, b), f"step {i}"
    assert torch.equal(out.sequences, expected[-1])


def mask_in_second_place(logits: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) in which the mask token's is halfway between the two largest others."""
    two = logits.index_fill(-1, torch.tensor(511), -torch.inf).topk(2, dim=-1).values
    return torch.cat((logits[..., :511], two.mean(-1, keepdim=True)), -1)


@pytest.mark.parametrize("alg", compat.ALGORITHMS)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_p": 1e-6}, {"top_k": 2}, {"top_k": 7}])
def test_the_mask_token_keeps_its_share_as_published(alg: str, options: dict) -> None:
    """It is a rival of other tokens in ranks, top_p and top_k, although it is never decoded."""
    model, prompts = golden.model("dream_tiny_a"), torch.tensor([[5, 6, 7, 8], [300, 20, 11, 40]])
    settings: dict[str, Any] = {"max_new_tokens": 12, "alg": alg, "steps": 8, **options}
    torch.manual_seed(3)
    with torch.no_grad():
        expected = dream_loop(model, prompts, new=12, alg=alg, steps=8, rivalled=True, **options)
    torch.manual_seed(3)
    settings["generation_logits_hook_func"] = lambda step, x, logits: mask_in_second_place(logits)
    out = compat.diffusion_generate(model, prompts, **settings)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, expected[-1])
    # Where it would be the one choice left, the next best token is.
    settings["generation_logits_hook_func"] = lambda step, x, z: z.index_fill(2, torch.tensor(511), 1e4)
    out = compat.diffusion_generate(model, prompts, **settings)
    assert isinstance(out, torch.Tensor)
    assert not bool((out == 511).any())


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("alg_temp", [1e-300, 1e-12, 1e-4, 1e300])
def test_any_alg_temp_draws_masks_alone(alg: str, alg_temp: float) -> None:
    """A small one is the limit, without noise: its probabilities are 0 but for the best ranks."""
    model = golden.model("dream_tiny_a")
    prompts = torch.tensor([[5, 6, 7, 8], [300, 20, 11, 40]])
    settings: dict[str, Any] = {"max_new_tokens": 8, "steps": 4, "alg": alg}
    torch.manual_seed(3)
    out = compat.diffusion_generate(model, prompts, **settings, alg_temp=alg_temp)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out[:, :4], prompts)
    assert not bool((out == 511).any())
    if alg_temp < 1e-10:
        assert torch.equal(out, compat.diffusion_generate(model, prompts, **settings))


def test_dreams_padding_hooks_and_config() -> None:
    model = golden.model("dream_tiny_a")
    short, settings = torch.tensor([[6, 7, 8]]), {"steps": 6, "alg": "entropy"}
    alone = compat.diffusion_generate(model, short, max_new_tokens=8, **settings)
    padded = torch.tensor([[0, 6, 7, 8], [300, 20, 11, 40]])
    config = type("Config", (), {**settings, "max_new_tokens": 8, "temperature": 0.0, "top_k": None})()
    both = compat.diffusion_generate(model, padded, config, attention_mask=padded != 0)
    assert both.shape == (2, 12)
    assert both[0].tolist() == [0, *alone[0].tolist()]
    seen: list[int | None] = []

    def tokens(step: int | None, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        seen.append(step)
        assert (logits is None) == (step is None)
        x[:, 5] = 77  # held, as the published examples do
        return x

    def logits(step: int, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        z[:, :, 85] = -torch.inf
        return z

    out = compat.diffusion_generate(
        model,
        short,
        max_length=11,
        num_return_sequences=2,
        generation_tokens_hook_func=tokens,
        generation_logits_hook_func=logits,
        eos_token_id=9,
        **settings,
    )
    assert seen == [None, *range(6)]
    assert out.shape == (2, 11)
    assert out[:, 5].tolist() == [77, 77]
    assert 85 not in out[:, 3:]
    assert compat.diffusion_generate(model, short, steps=2).shape == (1, 23)


def test_dreams_samples() -> None:
    """They come from the restricted distribution, and follow torch's generator."""
    model = golden.model("dream_tiny_a")
    prompt = torch.tensor([[5, 6, 7]])

    def run(seed: int, **options: object) -> list[int]:
        torch.manual_seed(seed)
        out = compat.diffusion_generate(
            model, prompt, max_new_tokens=8, steps=4, alg="maskgit_plus", temperature=2.0, **options
        )
        assert isinstance(out, torch.Tensor)
        return out[0].tolist()

    assert run(1, top_p=0.95) == run(1, top_p=0.95)
    assert len({tuple(run(s, top_p=0.95, alg_temp=0.1)) for s in range(4)}) > 1
    greedy = compat.diffusion_generate(model, prompt, max_new_tokens=8, steps=8, alg="maskgit_plus", top_k=1)
    torch.manual_seed(0)
    sampled = compat.diffusion_generate(
        model, prompt, max_new_tokens=8, steps=8, alg="maskgit_plus", top_k=1, temperature=0.7
    )
    assert torch.equal(greedy, sampled)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alg": "confidence_threshold"}, r"alg: expected one of .*'entropy'\), got 'confidence_threshold'"),
        ({"threshold": 0.9}, "threshold: not an option of Dream's diffusion_generate"),
        ({"block_length": 32}, "block_length: not an option of Dream's diffusion_generate"),
        ({"steps": 0}, "steps: expected a whole number >= 1"),
        ({"eps": 1.5}, "eps: expected a number from 0 and below 1"),
        ({"alg_temp": -1.0}, "alg_temp: expected a finite number >= 0"),
        ({"generation_config": 5}, "generation_config: expected an object with attributes such as steps"),
        ({"generation_tokens_hook_func": 5}, "generation_tokens_hook_func: expected a function, got int"),
        (
            {"generation_tokens_hook_func": lambda step, x, logits: x[:, :3]},
            r"generation_tokens_hook_func: expected it to return torch\.int64 .* got torch.int64 \(1, 3\)",
        ),
        (
            {"generation_tokens_hook_func": lambda step, x, logits: x if step is None else x.float()},
            r"generation_tokens_hook_func: expected it to return torch\.int64 .* got torch.float32",
        ),
        (
            {"generation_logits_hook_func": lambda step, x, logits: None},
            "generation_logits_hook_func: expected it to return torch.float.*, got None",
        ),
        (
            {"generation_logits_hook_func": lambda step, x, logits: logits[..., :5]},
            r"generation_logits_hook_func: expected it to return .*, got torch\.float\d+ \(1, \d+, 5\)",
        ),
        ({"top_p": 2.0}, "top_p: expected a number from 0 to 1"),
        ({"max_length": 2}, "max_length: expected more than the 3 tokens of inputs, got 2"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask: expected the shape of inputs \(1, 3\)"),
        ({"attention_mask": [[1, 1, 1]]}, r"attention_mask: expected the shape of inputs \(1, 3\), got list"),
        (
            {"generation_config": {"steps": 4}},
            "such as steps, got dict; give its items",
        ),
        ({"mask_token_id": 512}, "mask_token_id: expected one of the model's 512 token ids, got 512"),
        ({"eps": "0"}, "eps: expected a finite number >= 0, got '0'"),
        ({"alg_temp": "0"}, "alg_temp: expected a finite number >= 0, got '0'"),
    ],
)
def test_dreams_options_are_checked(kwargs: dict, message: str) -> None:
    model = golden.model("dream_tiny_a")
    with pytest.raises(ValueError, match=message):
        compat.diffusion_generate(model, torch.tensor([[5, 6, 7]]), **kwargs)
    with pytest.raises(ValueError, match="inputs: expected as many masks in each sequence, got \\[20, 21\\]"):
        compat.diffusion_generate(model, torch.tensor([[1, 2], [511, 3]]), alg="entropy", steps=2)


def test_a_model_that_names_no_mask_is_asked_for_one() -> None:
    with pytest.raises(ValueError, match="mask_token_id: the model's config has none, so give one"):
        compat.diffusion_generate(lambda ids: None, torch.tensor([[1]]), steps=1, max_new_tokens=1)
