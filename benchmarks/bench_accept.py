"""accept: the tokens that a verify pass emits for chains of drafted tokens; LLaDA's vocabulary, bfloat16.

Floor: the logits of the rows, read once: rows * V * 2 bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import dparallel_ext as dx

from .bench_unmask import VOCAB, inputs
from .harness import CPU, OURS, Case, Work, copies, on_cpu

BLOCK = 16
ROWS = (1, 16, 64)
EOS = 1


def eager(logits: Tensor, draft: Tensor, parent: Tensor, q_start: Tensor, q_end: Tensor) -> list[list[int]]:
    """The step without a kernel: log-probabilities and argmax in torch, the walk on the host."""
    z = logits.float()
    choice = z.argmax(-1)
    logprob = log_softmax(z, -1).gather(1, choice[:, None])[:, 0]
    choices, drafts, parents, _ = (t.tolist() for t in (choice, draft, parent, logprob))
    emitted = []
    for start, end in zip(q_start.tolist(), q_end.tolist(), strict=True):
        at, tokens = 0, [choices[start]]
        for i in range(1, end - start):
            if tokens[-1] == EOS:
                break
            if parents[start + i] == at and drafts[start + i] == tokens[-1]:
                at = i
                tokens.append(choices[start + i])
        emitted.append(tokens)
    return emitted


def work(device: torch.device, small: bool, rows: int, vocab: int) -> Work:
    """Lanes of up to 16 rows; the first half of each lane's draft is accepted."""
    logits = inputs(rows, vocab, vocab - 1, device)[1][0]
    data = copies(logits, device, small)
    q_start = torch.arange(0, rows, BLOCK, device=device)
    q_end = (q_start + BLOCK).clamp(max=rows)
    index = torch.arange(rows, device=device) % BLOCK
    parent = index - 1
    held = dx.row_stats(logits).token.roll(1)
    draft = torch.where(index <= BLOCK // 2, held, (held + 1) % vocab)
    lanes = draft, parent, q_start, q_end
    settings: dict[str, Any] = {
        "room": torch.full_like(q_start, 256),
        "eos_ids": torch.full_like(q_start, EOS)[:, None],
        "max_q_len": min(rows, BLOCK),
        "check": False,
    }

    def agree(result: Any, expected: list[list[int]]) -> bool:
        if isinstance(result, tuple):
            count, tokens = (t.tolist() for t in result)
            result = [row[:n] for row, n in zip(tokens, count, strict=True)]
        return bool(result == expected)

    def ours(turn: int, at: int) -> tuple[Tensor, Tensor]:
        out = dx.accept(data[at], *lanes, **settings)
        return out.count, out.tokens

    return Work(
        {"eager": lambda turn, at: eager(data[at], *lanes), OURS: ours},
        [(rows * vocab * 2, 0, 1)],
        sets=len(data),
        graphs=(OURS,),
        agree=agree,
    )


def case(rows: int) -> Case:
    return Case(f"accept, {rows} rows", "accept", work, {"rows": rows, "vocab": VOCAB})


@pytest.mark.parametrize("contender", ["eager", OURS])
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"{rows}_rows")
def test_accept(benchmark: Any, read_bandwidth: float, rows: int, contender: str) -> None:
    step = work(CPU, False, rows, VOCAB)
    on_cpu(benchmark, f"accept, {rows} rows", step, contender, read_bandwidth, rounds=60)
