"""What streamers and progress bars of decode get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from drafters import model_of
from test_decode import PROMPTS
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


@pytest.fixture(scope="module")
def dream() -> models.Model:
    return golden.model("dream_tiny_a")


@pytest.fixture(autouse=True)
def _there(device: str, llada, dream, monkeypatch) -> None:
    """Every test of this file runs on every device."""
    llada.to(device)
    dream.to(device)
    monkeypatch.setattr(f"{__name__}.PROMPTS", PROMPTS.to(device))


class Recorder:
    def __init__(self) -> None:
        self.said: list[tuple[str, list[int]]] = []

    def put(self, value: Tensor) -> None:
        self.said.append(("put", value.flatten().tolist()))

    def put_draft(self, value: Tensor) -> None:
        self.said.append(("draft", value.flatten().tolist()))

    def end(self) -> None:
        self.said.append(("end", []))


@pytest.mark.parametrize("eos", [False, True])
def test_streaming(llada, eos: bool) -> None:
    streamer = Recorder()
    settings = {"gen_length": 12, "block_length": 4, "threshold": 2.0}
    out = dx.decode(llada, PROMPTS[0], streamer=streamer, **settings)
    if eos:
        streamer = Recorder()
        eos_id = int(out.sequences[0, 5])
        out = dx.decode(llada, PROMPTS[0], streamer=streamer, eos_id=eos_id, **settings)
    put = [tokens for kind, tokens in streamer.said if kind == "put"]
    assert put[0] == PROMPTS[0].tolist()
    assert [token for tokens in put for token in tokens] == out.sequences[0].tolist()
    # Each block by itself, up to that of the end, and so the padding behind it.
    blocks = int(out.kept) // 4 + 1 if eos else 3
    padding = [12 - 4 * blocks] * eos
    assert 0 not in padding
    assert [len(tokens) for tokens in put] == [PROMPTS.shape[1], *[4] * blocks, *padding]
    assert streamer.said[-1] == ("end", [])
    drafts = [tokens for kind, tokens in streamer.said if kind == "draft"]
    assert len(drafts) == out.forwards
    assert len(drafts[0]) == 12
    with pytest.raises(ValueError, match="streamer: expected a batch of 1, got 3"):
        dx.decode(llada, PROMPTS, streamer=streamer, gen_length=4)


def test_a_streamer_may_keep_and_change_what_it_gets(llada) -> None:
    class Keeping:
        def __init__(self) -> None:
            self.kept: list[Tensor] = []
            self.copies: list[Tensor] = []

        def put(self, tokens: Tensor) -> None:
            self.kept.append(tokens)
            self.copies.append(tokens.clone())

        put_draft = put

        def end(self) -> None:
            pass

    class Erasing(Keeping):
        def put(self, tokens: Tensor) -> None:
            tokens.zero_()

        put_draft = put

    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "threshold": 0.5}
    expected, keeping = dx.decode(llada, PROMPTS[0], **settings).sequences, Keeping()
    for streamer in (keeping, Erasing()):
        assert torch.equal(dx.decode(llada, PROMPTS[0], streamer=streamer, **settings).sequences, expected)
    assert len(keeping.kept) > 2
    assert all(map(torch.equal, keeping.kept, keeping.copies))


@pytest.mark.parametrize("streamer", [5, Recorder, SimpleNamespace(put=print)], ids=["5", "class", "no end"])
def test_streamers_that_are_none_are_named(llada, streamer: Any) -> None:
    for call in (dx.decode, dx.speculate):
        model = llada if call is dx.decode else model_of(vocab_size=512)
        with pytest.raises(ValueError, match="streamer: expected an object with the methods put and end"):
            call(model, PROMPTS[0], gen_length=8, streamer=streamer)


def test_transformers_streamers_work(llada, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    for kind in ("TextDiffusionStreamer", "TextStreamer"):
        if not hasattr(transformers, kind):
            continue
        streamer = getattr(transformers, kind)(tokenizer)
        out = dx.decode(llada, PROMPTS[0], gen_length=8, block_length=4, threshold=2.0, streamer=streamer)
        printed = capsys.readouterr().out
        for token in out.sequences[0].tolist():
            assert f"w{token}" in printed


def test_progress(llada, capsys) -> None:
    dx.decode(llada, PROMPTS, gen_length=8, progress=True)
    assert "24/24" in capsys.readouterr().err
