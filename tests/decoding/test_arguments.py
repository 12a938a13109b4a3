"""What callers hand over: numbers of Python, numpy and torch, prompts in any form, and what is refused."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import dparallel_ext as dx
from dparallel_ext import arguments, compat, models

LLADA = golden.model("llada_tiny_a")
PROMPT = [5, 6, 7]
ENCODED = Tokenizer(WordLevel({"a": 5}, unk_token="a")).encode("a")


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor, np.asarray])
def test_whole_numbers(kind: Any) -> None:
    assert arguments.whole("n", kind(3), 0) == 3
    assert type(arguments.whole("n", kind(3), 0)) is int
    assert arguments.per_sequence("n", kind(3), 2, 0) == [3, 3]
    with pytest.raises(ValueError, match="n: expected a whole number >= 4, got"):
        arguments.whole("n", kind(3), 4)


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, torch.tensor, np.asarray])
def test_numbers(kind: Any) -> None:
    assert arguments.number("x", kind(0.5)) == 0.5
    for bad in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="x: expected a finite number >= 0"):
            arguments.number("x", kind(bad))


def test_temperatures_in_force() -> None:
    for kind in (float, np.float64, torch.tensor):
        for given, found in (
            (0.0, 0.0),
            (5e-324, 0.0),
            (1e-38, 0.0),
            (9.9e-6, 0.0),
            (0.5, 0.5),
            (1e30, 1e30),
        ):
            assert arguments.temperature_in_force(kind(given)) == pytest.approx(found, rel=1e-6)
    assert arguments.temperature_in_force(1e-5) == 1e-5
    assert arguments.temperature_in_force(1e38) == arguments.temperature_in_force(10**39) == 2.0**100
    for bad in (-1e-38, float("nan"), float("inf"), "0", None, True):
        with pytest.raises(ValueError, match="temperature: expected a finite number >= 0, got"):
            arguments.temperature_in_force(bad)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), 1.0, np.float64(1), torch.ones(1), "1", None, [1]]
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="n: expected a whole number >= 0"):
        arguments.whole("n", value, 0)


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_numpy_and_0_d_tensors_wherever_a_number_is(cache: str, kind: Any) -> None:
    def real(value: float) -> Any:
        return torch.tensor(value) if kind is torch.tensor else np.float32(value)

    plain: dict[str, Any] = {
        "gen_length": 12,
        "block_length": 4,
        "sub_block_length": 2,
        "seed": 3,
        "eos_id": 5,
    }
    plain |= {"mask_id": 511, "min_commit": 1, "max_commit": 3}
    given = {name: kind(value) for name, value in plain.items()}
    reals = {"threshold": 2.0, "temperature": 0.5}
    given |= {name: real(value) for name, value in reals.items()}
    given |= {"suppress": np.array([1, 2]), "stop": [np.array([3, 4]), torch.tensor([9])]}
    plain |= {**reals, "suppress": [1, 2], "stop": [[3, 4], [9]]}
    if cache == "dual":
        plain["refresh"], given["refresh"] = 2, kind(2)
    expected = dx.decode(LLADA, PROMPT, cache=cache, **plain)
    out = dx.decode(LLADA, PROMPT, cache=cache, **given)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.kept, expected.kept)
    ours, theirs = (dx.decode(LLADA, PROMPT, gen_length=8, block_length=4, steps=n) for n in (4, kind(4)))
    assert torch.equal(ours.sequences, theirs.sequences)
    sizes = ("block_length", "sub_block_length", "refresh")
    whole: dict[str, Any] = {name: given.pop(name) for name in sizes if name in given}
    whole |= {name: kind(64) for name in ("max_length", "pages", "max_waiting", "page_size")}
    with dx.Engine(LLADA, cache=cache, lanes=kind(1), mask_id=given.pop("mask_id"), **whole) as engine:
        tokens = engine.submit(PROMPT, **given).result(60).tokens
    del plain["mask_id"]
    seeded = dx.decode(LLADA, PROMPT, cache=cache, **{**plain, "seed": [3]})
    assert tokens == seeded.responses[0][: int(seeded.kept)].tolist()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_one_number_for_each_sequence(kind: Any) -> None:
    out = dx.decode(LLADA, [[1], [2, 3]], gen_length=kind([3, 5]), threshold=kind([0.5, 2.0]), seed=[1, 2])
    assert out.lengths.tolist() == [4, 7]
    with pytest.raises(ValueError, match="gen_length: expected a number or one for each of 2, got 3"):
        dx.decode(LLADA, [[1], [2, 3]], gen_length=kind([3, 5, 7]))
    with pytest.raises(ValueError, match="gen_length: expected a whole number >= 0, got -1"):
        dx.decode(LLADA, [[1], [2, 3]], gen_length=kind([3, -1]))


RAGGED = [[5, 6, 7], [8], [9, 10]]
PADDED = torch.tensor([[5, 6, 7], [0, 0, 8], [9, 10, 0]])
SHOWN = torch.tensor([[1, 1, 1], [0, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    "prompts",
    [
        RAGGED,
        tuple(RAGGED),
        [torch.tensor(row) for row in RAGGED],
        [np.array(row, dtype=np.int32) for row in RAGGED],
        UserDict(input_ids=RAGGED, attention_mask=[[1] * len(row) for row in RAGGED]),
        UserDict(input_ids=PADDED, attention_mask=SHOWN),
        {"input_ids": PADDED.numpy(), "attention_mask": SHOWN.numpy(), "token_type_ids": None},
        {"input_ids": PADDED.tolist(), "attention_mask": SHOWN.tolist()},
    ],
)
def test_prompts_in_any_form(prompts: Any) -> None:
    """A tokenizer's list of lists, its BatchEncoding (a UserDict), tensors and arrays."""
    expected = dx.decode(LLADA, [torch.tensor(row) for row in RAGGED], gen_length=4)
    assert torch.equal(dx.decode(LLADA, prompts, gen_length=4).sequences, expected.sequences)


def test_what_a_tokenizer_returns() -> None:
    transformers = pytest.importorskip("transformers")
    from dparallel import registry

    directory = registry.directory_of("builtin:student")
    model = models.load(directory, dtype=torch.float32)
    tok = transformers.AutoTokenizer.from_pretrained(directory)
    texts = ["sam has 4 cups now .", "how many cups does sam have ?"]
    expected = dx.decode(model, tok(texts)["input_ids"], gen_length=4)
    for given in (tok(texts), tok(texts, padding=True, return_tensors="pt")):
        out = dx.decode(model, given, gen_length=4)
        assert [r.tolist() for r in out.responses] == [r.tolist() for r in expected.responses]
    alone = dx.decode(model, tok(texts[0]), gen_length=4)
    assert torch.equal(alone.responses[0], expected.responses[0])
    with dx.Engine(model, lanes=1, max_length=32, cache="none") as engine:
        for one in (tok(texts[0]), tok(texts[0], return_tensors="pt"), tok(texts[0])["input_ids"]):
            assert engine.submit(one, gen_length=4).result(60).tokens == expected.responses[0].tolist()


def test_prompts_without_a_token() -> None:
    """Empty ones among others, and where a row is all padding; an empty list is a batch of none."""
    expected = dx.decode(LLADA, [[], PROMPT], gen_length=4)
    shown = dx.decode(LLADA, [[1, 2, 3], PROMPT], attention_mask=[[0, 0, 0], [1, 1, 1]], gen_length=4)
    assert torch.equal(shown.sequences, expected.sequences)
    assert torch.equal(dx.decode(LLADA, [torch.tensor([])], gen_length=4).responses[0], expected.responses[0])
    assert dx.decode(LLADA, [], gen_length=4).sequences.shape == (0, 0)
    with dx.Engine(LLADA, lanes=1, max_length=32, cache="none") as engine:
        for empty in ([], torch.tensor([]), {"input_ids": []}):
            assert engine.submit(empty, gen_length=4).result(60).tokens == expected.responses[0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ["text"]}, "prompt: .* got str; encode it with the model's tokenizer first"),
        ({"prompt": ENCODED}, r"prompt: .* got Encoding; its ids are its \.ids$"),
        ({"prompt": [ENCODED, ENCODED]}, r"prompt: .* got Encoding; its ids are its \.ids$"),
        ({"prompt": [{"input_ids": [1]}]}, r'prompt: .* got dict; its ids are its \["input_ids"\]$'),
        ({"prompt": [UserDict(input_ids=[1])]}, r'prompt: .* got UserDict; its ids are its \["input_ids"\]$'),
        ({"prompt": [1, 2**70]}, f"prompt: .* got list with {2**70}$"),
        ({"prompt": [[1], [2, "a"]]}, "prompt: .* got list with 'a'$"),
        ({"prompt": [True, False]}, "prompt: expected int64 .* got torch.bool"),
        ({"prompt": torch.tensor([[True]])}, "prompt: expected int64 .* got torch.bool"),
        ({"prompt": [1.5]}, "prompt: expected int64 .* got torch.float32"),
        ({"prompt": [[1], [[2]]]}, r"prompt: expected int64 \(P,\)"),
        ({"prompt": 3}, "prompt: expected int64 .* got int"),
        ({"prompt": None}, "prompt: expected int64 .* got NoneType"),
        ({"prompt": {"ids": [1]}}, r"prompt: expected input_ids in the mapping, got \['ids'\]"),
        ({"prompt": [[1], [-2]]}, r"prompt: expected token ids in \[0, 512\), got -2"),
        ({"prompt": [512]}, r"prompt: expected token ids in \[0, 512\), got 512"),
        ({"attention_mask": [1, 1]}, "attention_mask: expected the shape of prompt"),
        ({"attention_mask": [0.0, 0.0, -1e9]}, "attention_mask: expected bool or whole numbers"),
        ({"attention_mask": [None]}, "attention_mask: expected bool or whole numbers, got NoneType"),
        ({"mask_id": 512}, "mask_id: expected one of the model's 512 token ids, got 512"),
        ({"eos_id": 126081}, "eos_id: expected one of the model's 512 token ids, got 126081"),
        ({"temperature": "warm"}, "temperature: expected a finite number >= 0, got 'warm'"),
        ({"stop": [1, 2]}, "stop: expected sequences of token ids, got the number 1"),
        ({"stop": ["\\n"]}, "stop: .* got str; encode it"),
        ({"stop": [[3, 512]]}, "stop: expected one of the model's 512 token ids, got 512"),
        ({"stop": [[3], [511]]}, "stop: expected a token that can be decoded, got the mask token 511"),
        ({"eos_id": 511}, "eos_id: expected a token that can be decoded, got the mask token 511"),
        (
            {"prompt": torch.ones(1, 3, dtype=torch.int64, device="meta")},
            "prompt: .* got torch.int64 on meta",
        ),
        (
            {"attention_mask": torch.ones(3, device="meta") > 0},
            "attention_mask: .* got torch.bool on meta",
        ),
        ({"policy": torch.zeros(1, 5, device="meta")}, "policy: expected values, got tensor.*meta"),
        ({"seed": torch.zeros((), device="meta").long()}, "seed: expected an integer .*meta"),
        ({"top_p": torch.zeros((), device="meta")}, "top_p: expected values, got tensor.*meta"),
        ({"graphs": [torch.zeros((), device="meta")]}, "graphs: expected values, got .*meta"),
        ({"rule": "eot:512"}, "rule: expected one of the model's 512 token ids, got 512"),
        ({"rule": "eot:5/512"}, "rule: expected one of the model's 512 token ids, got 512"),
        ({"rule": "eot:5/x"}, r"\(eos: expected whole numbers, as 2 or 2/7, got '5/x'\)"),
        ({"rule": "eot:511"}, "rule: expected a token that can be decoded, got the mask token 511"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    call = {"prompt": PROMPT, "gen_length": 4, **change}
    with pytest.raises(ValueError, match=message):
        dx.decode(LLADA, call.pop("prompt"), **call)


def test_a_foreign_model_is_asked_for_its_ids() -> None:
    class Foreign(torch.nn.Module):
        config = SimpleNamespace(mask_token_id=511)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return torch.nn.Embedding(512, 2)

    with pytest.raises(ValueError, match=r"prompt: expected token ids in \[0, 512\), got 700"):
        dx.decode(Foreign(), [700])
    with pytest.raises(ValueError, match=r"prompt: expected token ids >= 0, got -1"):
        dx.decode(lambda ids: None, [-1], mask_id=0)
    with pytest.raises(ValueError, match="mask_id: expected one of the model's 512 token ids, got 126336"):
        dx.decode(Foreign(), [7], mask_id=126336)


def test_a_foreign_models_rows_say_which_ids_can_be_suppressed() -> None:
    """Whatever ids its embedding has, and wherever its own weights are."""

    class Foreign(torch.nn.Module):
        device = torch.device("meta")  # as with weights that come with each call

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return torch.nn.Embedding(5, 2)

        def forward(self, ids: torch.Tensor) -> Any:
            return SimpleNamespace(logits=torch.arange(9.0).flip(0).expand(*ids.shape, 9))

    assert dx.decode(Foreign(), [[3]], mask_id=4, gen_length=2, suppress=[0, 7]).sequences.tolist() == [
        [3, 1, 1]
    ]
    with pytest.raises(ValueError, match=r"suppress: expected .*got 9"):
        dx.decode(Foreign(), [[3]], mask_id=4, gen_length=2, suppress=[9])


def test_compat_takes_the_models_own_mask() -> None:
    """As published LLaDA's by default, where the model does not say; one that it does not have is named."""
    prompt = torch.tensor([PROMPT])
    tokens, _ = compat.generate(LLADA, prompt, 8, 8, 8)
    assert torch.equal(tokens, compat.generate(LLADA, prompt, 8, 8, 8, mask_id=511)[0])
    for mask_id in (126336, 512, -1, 1.5):
        with pytest.raises(ValueError, match="mask_id: expected"):
            compat.generate(LLADA, prompt, 8, 8, 8, mask_id=mask_id)
    seen = []

    def foreign(ids: torch.Tensor) -> Any:
        seen.append(ids[0, -1].item())
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 9))

    compat.generate(foreign, prompt, 1, 1, 1)
    assert seen == [126336]


def test_devices_are_named() -> None:
    for device in ("gpu", "mps", "cuda:x", "cpu:1"):
        with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got"):
            golden.model("llada_tiny_a", device=device)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda:1' needs an NVIDIA GPU"):
            golden.model("llada_tiny_a", device="cuda:1")
    for device in ("cpu:0", torch.device("cpu"), torch.device("cpu:0")):
        assert golden.model("llada_tiny_a", device=device).device.type == "cpu"
