"""For tests of JSON of any content: a tokenizer that writes JSON, values at random, and how deep they are."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = 1
"""The id that ends a response, as in the tiny checkpoints."""
CHARACTERS = 'ab1 "\\/\n\té中🙂\x7f'
SOME = {
    "name": "Zoë",
    "tags": ["a", {"b": []}, -1.5e-7, None, True],
    "more": {"of it": [[1, 20], {}], "no": False, "text": 'a "quote" \\ \n €'},
}


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE of at most 500 ids, with pieces such as `": ` and `"}],`, whose end token is `END`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [made.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<pad>", "<end>"]
    )
    rng = random.Random(0)
    texts = [
        json.dumps(value, indent=indent)
        for value in (SOME, *(an_object(rng, 4) for _ in range(200)))
        for indent in (None, 2, 4)
    ]
    made.train_from_iterator(texts, trainer)
    return made


def a_value(rng: random.Random, depth: int) -> Any:
    """Of at most `depth` levels."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 6:
        return (
            *(
                None,
                rng.random() < 0.5,
                rng.randint(-2000, 2000),
                rng.uniform(-1, 1) * 10 ** rng.randint(-20, 20),
            ),
            *("".join(rng.choices(CHARACTERS, k=rng.randint(0, 5))), rng.choice([0, "", -1, 10**20])),
        )[kind]
    if kind == 6:
        return [a_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return an_object(rng, depth)


def an_object(rng: random.Random, depth: int) -> dict[str, Any]:
    """Of at most `depth` levels, itself among them."""
    names = ("".join(rng.choices(CHARACTERS, k=rng.randint(0, 3))) for _ in range(rng.randint(0, 3)))
    return {name: a_value(rng, depth - 1) for name in names}


def depth_of(value: Any) -> int:
    """How many objects and arrays are in each other."""
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def read(text: str | bytes) -> Any:
    """The value of a JSON text, as any reader takes it. Raises ValueError for others, and for halves of
    surrogate pairs."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    value = json.loads(text, parse_constant=no_constant)
    json.dumps(value, ensure_ascii=False).encode()
    return value
