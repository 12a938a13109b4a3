"""For tests of constrained decoding: random forms."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from dparallel_ext.automaton import NOWHERE, Automaton


def a_form(seed: int, vocab: int = 512, ends: Sequence[int] = (7, 9)) -> Automaton:
    """Some form, of up to 6 states and then the tokens `ends`. A twelfth of the tokens, the last among them,
    are in no response."""
    rng = random.Random(seed)
    while True:
        states, classes = rng.randint(1, 6), rng.randint(1, 5)
        token_class = torch.tensor([rng.randrange(classes) for _ in range(vocab)], device="cpu")
        token_class[[vocab - 1, *rng.sample(range(vocab), vocab // 12)]] = classes
        token_class[[*ends]] = classes + 1
        rows = [[rng.choice([NOWHERE, rng.randrange(states)]) for _ in range(classes)] for _ in range(states)]
        accepting = [rng.random() < 0.5 for _ in range(states)]
        rows = [
            [*row, NOWHERE, states if over else NOWHERE] for row, over in zip(rows, accepting, strict=True)
        ]
        rows.append([NOWHERE] * (classes + 1) + [states])
        try:
            accepts = torch.tensor([*accepting, True], device="cpu")
            form = Automaton(token_class, torch.tensor(rows, device="cpu"), accepts)
        except ValueError:  # no response has it
            continue
        if (form.transitions[0, :-1] >= 0).any():
            return form
