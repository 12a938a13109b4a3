"""Nemotron-Labs-Diffusion by diffusion: the published loop in plain torch, on transformers' layers. A
finished block sees what is in front of it, and its last position gives the next block's first token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from dparallel.cli import app
from dparallel.likelihood import log_likelihoods
from nemotron import CONFIG, MASK, PROMPTS, chosen_behind, guesses, names, ours, theirs
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext.decoding import inputs
from dparallel_ext.models import Traits

pytest_plugins = ["taping"]

LENGTHS = [27, 16, 9]
"""Of the responses to `PROMPTS`: with a block of 8, ends within one, at one, and behind the first token."""


def published(
    prompt: Tensor, gen_length: int, size: int, threshold: float, eos: int | None = None
) -> tuple[list[int], int]:
    """The response at temperature 0, and the passes: of each block one over what is in front, whose last row
    gives the first token, and those over the block."""
    text, end, passes = prompt.tolist(), len(prompt) + gen_length, 0
    while len(text) < end:
        block = [MASK] * min(size, end - len(text))
        if text:
            block[0] = chosen_behind(text, MASK)[-1]  # ours never commits the mask, whose id is the last
            passes += 1
        while MASK in block:
            chances, tokens = guesses(theirs(), text, block)
            masks = [at for at, token in enumerate(block) if token == MASK]
            first = max(masks, key=chances.__getitem__)
            for at in masks:
                if at == first or chances[at] >= threshold:
                    block[at] = tokens[at]
            passes += 1
        text += block
        if eos in block:
            break
    return text[len(prompt) :], passes


SETTINGS: dict[str, Any] = {"block_length": 8, "selector": "confidence"}


@pytest.mark.parametrize("threshold", [0.9, 0.3, 0.15])
def test_tokens_and_passes_are_those_of_the_published_loop(threshold: float) -> None:
    expected = [published(p, n, 8, threshold) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    out = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, threshold=threshold, **SETTINGS)
    assert [r.tolist() for r in out.responses] == [tokens for tokens, _ in expected]
    assert out.nfe.tolist() == [passes for _, passes in expected]
    for prompt, n, (tokens, passes) in zip(PROMPTS, LENGTHS, expected, strict=True):
        alone = dx.decode(ours(), prompt, gen_length=n, threshold=threshold, cache="block", **SETTINGS)
        assert (alone.responses[0].tolist(), alone.nfe.tolist()) == (tokens, [passes])
    assert len({passes for _, passes in expected}) > 1
    # Theirs counts no pass over the prompt, and has one behind the last block.
    assert torch.equal(out.nfe_published, out.nfe)


def test_a_block_has_32_tokens() -> None:
    """As published, unless another number is asked for."""
    tokens, passes = published(PROMPTS[2], 40, 32, 0.15)
    out = dx.decode(ours(), PROMPTS[2], gen_length=40, selector="confidence", threshold=0.15)
    assert (out.responses[0].tolist(), out.nfe.tolist()) == (tokens, [passes])


def test_without_a_prompt_the_first_token_is_a_mask_too() -> None:
    tokens, passes = published(PROMPTS[0][:0], 20, 8, 0.3)
    out = dx.decode(ours(), PROMPTS[0][:0], gen_length=20, threshold=0.3, **SETTINGS)
    assert (out.responses[0].tolist(), out.nfe.tolist()) == (tokens, [passes])


@pytest.mark.parametrize(("size", "quota"), [(8, 1), (5, 2), (32, 3)])
def test_guessed_states_change_no_token(size: int, quota: int) -> None:
    settings: dict[str, Any] = {"gen_length": LENGTHS, "block_length": size, "selector": "quota"}
    expected = dx.decode(ours(), PROMPTS, threshold=quota, **settings)
    found = dx.decode(ours(), PROMPTS, threshold=quota, draft_size=3, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert int(found.nfe.sum()) <= int(expected.nfe.sum())


def test_an_end_token_ends_it() -> None:
    whole, _ = published(PROMPTS[0], 40, 8, 0.3)
    eos = next(token for token in whole[10:] if token not in whole[:8])
    tokens, passes = published(PROMPTS[0], 40, 8, 0.3, eos)
    out = dx.decode(ours(), PROMPTS[0], gen_length=40, threshold=0.3, eos_id=eos, **SETTINGS)
    kept = tokens.index(eos)
    assert out.kept.tolist() == [kept]
    assert out.responses[0][:kept].tolist() == tokens[:kept]
    assert int(out.nfe[0]) <= passes < published(PROMPTS[0], 40, 8, 0.3)[1]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.7, "seed": 5, "top_p": 0.9}], ids=["0", "0.7"])
def test_an_engine_gives_the_same_in_shared_pages(sampled: dict[str, Any]) -> None:
    """Lanes that store a block and lanes that fill one are in passes of their own."""
    common = PROMPTS[2]
    prompts = [torch.cat((common, PROMPTS[0][:n])) for n in (0, 1, 3, 5)]
    settings = {"threshold": 0.3, **SETTINGS, **sampled}
    expected = [
        dx.decode(ours(), p, gen_length=n, **settings) for p, n in zip(prompts, (9, 30, 16, 17), strict=True)
    ]
    with dx.Engine(ours(), lanes=2, max_length=64, page_size=5, cache="block", **settings) as engine:
        for _ in range(2):
            handles = [engine.submit(p, gen_length=n) for p, n in zip(prompts, (9, 30, 16, 17), strict=True)]
            found = [handle.result(60) for handle in handles]
            assert [each.tokens for each in found] == [out.responses[0].tolist() for out in expected]
            assert [each.nfe for each in found] == [int(out.nfe[0]) for out in expected]
        assert all(each.reused >= 20 for each in found)


def test_recorded_passes_are_the_same(request: pytest.FixtureRequest) -> None:
    """Those over finished positions have recordings of their own."""
    settings: dict[str, Any] = {"gen_length": LENGTHS, "threshold": 0.3, **SETTINGS}
    expected = dx.decode(ours(), PROMPTS, **settings)
    taped = request.getfixturevalue("taped")
    found = dx.decode(ours(), PROMPTS, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.nfe, expected.nfe)
    assert sum(graphs.replays for graphs in taped) > 3
    taped.clear()
    again = dx.decode(ours(), PROMPTS, **settings)
    assert torch.equal(again.sequences, expected.sequences)
    assert not taped  # the first call's recordings are replayed


def test_each_position_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[bool, int]] = []
    pack = inputs.InputPacker.pack

    def counted(self: inputs.InputPacker, *args: Any) -> tuple[Tensor, inputs.GraphKey]:
        numbers, key = pack(self, *args)
        rows.append((key.onward, key.shapes[0][0]))
        return numbers, key

    monkeypatch.setattr(inputs.InputPacker, "pack", counted)
    dx.decode(ours(), PROMPTS[2], gen_length=24, threshold=0.3, **SETTINGS)
    assert [n for onward, n in rows if onward] == [len(PROMPTS[2]), 8, 8]
    assert {n for onward, n in rows if not onward} == {8}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": "dual"}, 'cache: expected "block", by which NemotronDiffusion fills masks, got .dual.'),
        ({"cache": "none"}, 'cache: expected "block"'),
        ({"infill": True}, "infill: does not go with NemotronDiffusion"),
        ({"steps": 16}, "steps: the fixed schedule is for whole blocks"),
        (
            {"active_blocks": 2, "threshold": 0.5},
            "active_blocks: expected 1, got 2: .* the block before",
        ),
        ({"rule": "edit:0.03,0.05,4"}, "rule: .* edits, which does not go with NemotronDiffusion"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dx.decode(ours(), PROMPTS[0], gen_length=16, block_length=8, **settings)


def test_a_request_cannot_ask_for_infill_either() -> None:
    """An engine without `infill` takes requests with it, where the model can."""
    with (
        dx.Engine(ours(), lanes=1, max_length=64, cache="block", block_length=8) as engine,
        pytest.raises(ValueError, match="infill: does not go with NemotronDiffusion"),
    ):
        engine.submit(torch.tensor([3, MASK, 4]), gen_length=8, infill=True)


def test_its_traits() -> None:
    expected = Traits(MASK, causal=True, aligned_blocks=False, onward=True)
    assert dx.models.traits(ours()) == expected


def test_the_command_line_decodes_it_both_ways(tmp_path: Path) -> None:
    """The cache mode says which; training and likelihoods take it for an autoregressive model."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: tensor.contiguous() for name, tensor in names(theirs().state_dict()).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    words = {
        word: at
        for at, word in enumerate(["?", "a", ".", "b", "c", "d", "e", "f", "g", "h", "i", "j", "[MASK]"])
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def run(*command: str) -> tuple[int, str]:
        shared = ("--model", str(tmp_path), "--gen-length", "24")
        result = CliRunner().invoke(app, [command[0], *shared, *command[1:]])
        return result.exit_code, result.output

    def decode(*options: str) -> tuple[int, str]:
        return run("decode", "--json", *options, "d e f g a")

    prompt = torch.tensor([words[word] for word in ["d", "e", "f", "g", "a"]])
    by_blocks = dx.decode(ours(), prompt, gen_length=24, selector="confidence", threshold=0.3, eos_id=2)
    left_to_right = dx.speculate(ours(), prompt, gen_length=24)
    for options, out in (
        (("--cache", "block", "--policy", "confidence:0.3"), by_blocks),
        (("--drafter", "self"), left_to_right),
    ):
        code, output = decode(*options)
        kept = out.responses[0][: int(out.kept[0])].tolist()
        assert code == 0, output
        assert json.loads(output)["response"] == tokenizer.decode(kept)
    assert decode("--cache", "block", "--drafter", "self") == (2, ANY)
    assert decode("--policy", "confidence:0.3") == (2, ANY)
    (tmp_path / "prompts.jsonl").write_text("d e f g a\n")
    measure = ("evaluate", "--data", str(tmp_path / "prompts.jsonl"), "--checker", "none")
    for options, out in (
        (("--cache", "block", "--policy", "confidence:0.3"), by_blocks),
        (("--drafter", "self", "--draft-size", "31"), left_to_right),
    ):
        code, output = run(*measure, *options)
        assert code == 0, output
        passes = float(output.splitlines()[-1].split()[1])
        assert passes <= float(out.nfe[0])
    tune = (
        "tune",
        str(tmp_path / "tuned.json"),
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--repeats",
        "1",
    )
    for options, settings in (
        (("--cache", "block", "--policy", "confidence:0.3", "--block-length", "8"), {"cache": "block"}),
        (("--drafter", "self", "--draft-size", "31"), {"drafter": "self", "draft_size": 31}),
    ):
        code, output = run(*tune, *options)
        assert code == 0, output
        content = json.loads((tmp_path / "tuned.json").read_text())
        assert settings.items() <= content.items()
        assert decode("--config", str(tmp_path / "tuned.json"))[0] == 0
    code, output = run(*tune, "--policy", "confidence:0.3")
    assert "is autoregressive, unless with --cache block" in " ".join(output.split())
    with pytest.raises(ValueError, match="NemotronDiffusion is autoregressive"):
        log_likelihoods(ours(), [[3, 4]], [[5]])
