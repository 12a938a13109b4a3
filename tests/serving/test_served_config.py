"""A server whose requests have a config for what they do not say."""

from __future__ import annotations

from typing import Any

from asking import BLOCK, MODEL, PROMPT
from dparallel import registry, text
from server_here import serving

import dparallel_ext as dx

pytest_plugins = ["servers"]


def test_what_a_request_does_not_say_is_as_the_config(student: tuple[Any, Any]) -> None:
    model, tokenizer = student
    ids = tokenizer.encode(PROMPT).ids
    ended = text.endings(registry.directory_of(MODEL), tokenizer)
    config = {"rule": "confidence:0.6", "temperature": 0.7, "top_k": 3, "seed": 5, "gen_length": 24}
    own = {**config, "block_length": BLOCK, "cache": "dual", "stop": [[9, 9, 9]]}
    with serving(student, engine=own) as here:

        def ask(**request: Any) -> list[int]:
            status, answer = here.ask({"model": MODEL, "prompt": ids, "logprobs": 0, **request})
            assert status == 200, answer
            return [answer["choices"][0]["text"], answer["usage"]["forward_passes"]]

        def expected(**fields: Any) -> list[Any]:
            stop = [*own["stop"], *ended["stop"]]
            asked = dx.DecodeConfig(**{**own, "stop": stop, "eos_id": ended["eos_id"]})
            rule = fields.pop("rule", asked.rule)
            out = dx.decode(model, ids, asked.with_rule(rule, **{**fields, "seed": [fields.get("seed", 5)]}))
            return [tokenizer.decode(out.responses[0][: int(out.kept)].tolist()), int(out.nfe)]

        assert ask() == ask() == expected()
        assert ask(seed=6, top_k=-1, top_p=0.5) == expected(seed=6, top_k=0, top_p=0.5)
        assert ask(temperature=0, max_tokens=16) == expected(temperature=0.0, gen_length=16)
        assert ask(temperature=0, policy="one") == expected(temperature=0.0, rule="one")
        assert ask(temperature=0, policy="credit") == expected(temperature=0.0, rule="credit")
        status, answer = here.ask({"model": MODEL, "prompt": ids, "policy": "credit"})
        assert (status, answer["error"]["param"]) == (400, "temperature")
