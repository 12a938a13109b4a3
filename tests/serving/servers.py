"""Fixtures: the servers that the tests here ask, and what they serve.

A server is a thread of the test's process (`served`), or a process of its own (`odd`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import PAGE, VOCABULARY, enumerate_bytes
from dparallel import registry
from openai import OpenAI
from server_here import MODEL, Here, serving
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models

import dparallel_ext as dx
from benchmarks.serving import KEY, Served, server


@pytest.fixture(scope="module")
def served() -> Iterator[Here]:
    with serving(keys=("another", KEY), cors_origins=(PAGE,), engine={"lanes": 16}) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Here) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def student() -> tuple[Any, Any]:
    return registry.load(MODEL)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student without an end token, with NaN for token 0, and with a character of three bytes over each
    two of its tokens: token i is the end of one and the beginning of the next."""
    out = tmp_path_factory.mktemp("odd")
    shutil.copytree(registry.directory_of(MODEL), out, dirs_exist_ok=True)
    model = dx.models.load(out)
    with torch.no_grad():
        model.embed.weight[0] = torch.nan
    dx.models.save(model, out)
    config = json.loads((out / "config.json").read_text())
    config |= {"eos_token_id": None, "max_sequence_length": 2048}
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer_config.json").write_text("{}")
    byte_of = {c: b for b, c in enumerate_bytes()}
    assert len(byte_of) == 256
    names = {b: c for c, b in byte_of.items()}
    vocabulary = {}
    for i in range(VOCABULARY):
        first, *rest = chr(0x4E00 + i).encode()
        vocabulary["".join(names[b] for b in [*rest, first])] = i
    made = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    made.decoder = decoders.ByteLevel()
    made.save(str(out / "tokenizer.json"))
    return out


@pytest.fixture(scope="module")
def odd(odd_model: Path) -> Iterator[Served]:
    """A small and slow server: one token a pass, and responses that only end at their length."""
    options = ("--name", "odd", "--policy", "one", "--lanes", 2, "--max-waiting", 4)
    with server(odd_model, *options, "--max-choices", 3, "--max-body", 20000) as running:
        yield running


@pytest.fixture(scope="module")
def odd_client(odd: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{odd.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made
