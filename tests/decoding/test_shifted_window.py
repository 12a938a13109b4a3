"""SDLM in cache "window": tokens and passes of the published loop, which computes the last known token twice
and here keeps nothing; in batches, engines and recorded passes."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.cli import app
from sdlm import EOS, MASK, VOCABULARY, Published, ids, ours, published, theirs
from server_here import serving
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.models import Model

pytest_plugins = ["taping"]

CASES = [(5, 40, 4), (1, 7, 4), (23, 33, 8), (70, 20, 1), (130, 50, 8), (3, 17, 64), (9, 70, 40)]
"""Lengths of prompt, response and window."""
PROMPTS = [ids(n, seed=n) for n in (5, 1, 23, 70)]
LENGTHS = [40, 7, 33, 20]
RULE = "confidence:0.3"


def check(out: dx.DecodeOutput, expected: Published, b: int = 0) -> None:
    """The same tokens, in the same passes."""
    assert out.trajectory is not None
    kept = len(expected.tokens)
    assert out.responses[b][:kept].tolist() == expected.tokens
    steps = [number for number, count in enumerate(expected.filled, 1) for _ in range(count)]
    assert out.trajectory.step[b, :kept].tolist() == steps
    assert int(out.nfe_published[b]) == int(out.nfe[b])


@pytest.mark.parametrize(("prompt", "gen_length", "size"), CASES)
@pytest.mark.parametrize(("by", "tau"), [("confidence", 0.3), ("confidence", 0.6), ("entropy", 0.6)])
def test_the_published_loop(by: str, tau: float, prompt: int, gen_length: int, size: int) -> None:
    x = ids(prompt, seed=prompt)
    settings: dict[str, Any] = {"selector": by, "block_length": size, "record": True}
    settings["threshold"] = tau if by == "confidence" else (1 - tau) * math.log(VOCABULARY)
    out = dx.decode(ours(), x, gen_length=gen_length + size - 1, **settings)
    check(out, published(theirs(), x, gen_length, size, tau, by))  # with windows as published at the end
    out = dx.decode(ours(), x, gen_length=gen_length, **settings)
    expected = published(theirs(), x, gen_length, size, tau, by, whole=False)
    check(out, expected)
    assert (int(out.nfe), len(expected.tokens)) == (expected.passes, gen_length)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_of_the_published_loop(seed: int) -> None:
    """Twenty each, in batches of up to four with other lengths and thresholds, and with an end token."""
    rng, left = random.Random(seed), 20
    ended, longest, shortest = 0, 0, 1000
    while left:
        count = min(left, rng.randint(1, 4))
        left -= count
        size, whole = rng.choice([2, 3, 4, 8, 11]), rng.random() < 0.5
        prompts = [ids(rng.randint(1, 90), seed=rng.randrange(999)) for _ in range(count)]
        lengths = [rng.randint(1, 40) for _ in range(count)]
        taus = [rng.choice([0.0, 0.2, 0.4, 0.7, 1.0]) for _ in range(count)]
        eos = None
        if rng.random() < 0.5:
            eos = rng.choice(published(theirs(), prompts[0], lengths[0], size, taus[0]).tokens)
        out = dx.decode(
            *(ours(), prompts),
            gen_length=[n + (size - 1) * whole for n in lengths],
            **{"threshold": taus, "selector": "confidence", "block_length": size, "record": True},
            eos_id=eos,
        )
        for b, (x, n, tau) in enumerate(zip(prompts, lengths, taus, strict=True)):
            ends = () if eos is None else (eos,)
            expected = published(theirs(), x, n, size, tau, ends=ends, whole=whole)
            check(out, expected, b)
            if int(out.kept[b]) == len(expected.tokens) < n:
                ended += 1
                assert int(out.nfe[b]) == expected.passes
                assert int(out.responses[b][len(expected.tokens)]) == eos
            longest, shortest = max(longest, *expected.filled), min(shortest, *expected.filled)
    assert ended > 0
    assert longest > 2
    assert shortest <= 1


def test_the_cases_tell() -> None:
    """Passes fill one token, some and whole windows."""
    filled = [published(theirs(), x, n, 4, 0.3).filled for x, n in zip(PROMPTS, LENGTHS, strict=True)]
    assert {count for each in filled for count in each} == {1, 2, 3, 4}


def test_the_threshold_is_strict() -> None:
    """As published: at its own confidence a token is not committed."""

    def first_pass(tau: float) -> Tensor:
        out = dx.decode(ours(), PROMPTS[0], gen_length=40, rule=f"confidence:{tau}", record=True)
        assert out.trajectory is not None
        return out.trajectory.confidence[0][out.trajectory.step[0] == 1]

    least = first_pass(0.3).min()
    assert len(first_pass(float(torch.nextafter(least, torch.tensor(0.0))))) == 4
    assert len(first_pass(float(least))) < 4


def test_a_pass_without_a_threshold_commits_one_token() -> None:
    """As published with `only_first_token_keep`; a quota is of what it chooses in the window."""
    for way in ({}, {"rule": "one"}, {"rule": "leading+one"}, {"rule": "quota:1"}):
        out = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, record=True, **way)
        for b, (x, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
            check(out, published(theirs(), x, n, 4, 1.0, whole=False), b)
        assert out.nfe.tolist() == LENGTHS
    fast = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, rule="quota:4")
    assert fast.nfe.tolist() == [-(-n // 4) for n in LENGTHS]


def test_the_rule_by_name_is_the_models_own() -> None:
    expected = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, rule=RULE)
    for rule in (f"leading+{RULE}", dx.rules.Leading()):
        row = {} if isinstance(rule, str) else {"threshold": 0.3, "selector": "confidence"}
        out = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, rule=rule, **row)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.nfe, expected.nfe)
    alone = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, rule="leading")
    again = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, rule="confidence:0.9")
    assert torch.equal(alone.sequences, again.sequences)


def test_a_ragged_batch_is_what_each_is_alone() -> None:
    settings: dict[str, Any] = {"rule": RULE, "record": True}
    out = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, **settings)
    for b, (x, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        check(out, published(theirs(), x, n, 4, 0.3, whole=False), b)
    alone = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, batch_invariant=True, **settings)
    assert torch.equal(alone.sequences, out.sequences)
    assert alone.forwards == int(out.nfe.sum()) > out.forwards


@pytest.mark.parametrize("at", [0, 1, 3, 4, 10, 39])
def test_an_end_token_ends_it(at: int) -> None:
    whole = published(theirs(), PROMPTS[0], 40, 4, 0.3, whole=False)
    eos = whole.tokens[at]
    expected = published(theirs(), PROMPTS[0], 40, 4, 0.3, ends=(eos,), whole=False)
    out = dx.decode(ours(), PROMPTS[0], gen_length=40, rule=RULE, eos_id=eos, record=True)
    check(out, expected)
    assert int(out.kept) == len(expected.tokens) == whole.tokens.index(eos)
    assert int(out.nfe) == expected.passes
    assert MASK not in out.responses[0].tolist()


def test_any_of_several_end_tokens_ends_it() -> None:
    """As published, whichever comes first."""
    whole = published(theirs(), PROMPTS[0], 40, 4, 0.3, whole=False).tokens
    first, second = (
        whole[20],
        next(token for token in whole[5:] if whole.index(token) < whole.index(whole[20])),
    )
    for ends in ((first, second), (second, first)):
        expected = published(theirs(), PROMPTS[0], 40, 4, 0.3, ends=ends, whole=False)
        out = dx.decode(ours(), PROMPTS[0], gen_length=40, rule=RULE, eos_id=ends)
        assert out.responses[0][: int(out.kept)].tolist() == expected.tokens
        assert int(out.nfe) == expected.passes
        assert int(out.responses[0][-1]) == ends[0]


def test_a_mask_token_of_the_prompt_is_a_token() -> None:
    """As published, where the prompt is causal whatever it holds."""
    x = ids(9, seed=4)
    x[[2, 5, 8]] = MASK
    expected = published(theirs(), x, 20, 4, 0.3, whole=False)
    check(dx.decode(ours(), x, gen_length=20, rule=RULE, record=True), expected)


def test_what_a_pass_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not stored, the last known token and a mask less than the window; logits of the window."""
    rows: list[tuple[int, int]] = []
    step, head = Model.step, Model.head
    monkeypatch.setattr(Model, "step", lambda self, x, *a: rows.append((len(x), 0)) or step(self, x, *a))

    def counted(self: Model, x: Tensor) -> Tensor:
        rows[-1] = rows[-1][0], len(x)
        return head(self, x)

    monkeypatch.setattr(Model, "head", counted)
    out = dx.decode(ours(), PROMPTS[3], gen_length=40, rule=RULE, record=True)
    assert out.trajectory is not None
    steps, stored = out.trajectory.step[0].tolist(), -70
    for number, found in enumerate(rows, 1):
        first = next(i for i, at in enumerate(steps) if at >= number)
        end = min(first + 4, 40)
        assert found == (end - 1 - stored, end - first)
        stored = first - 1
    assert len(rows) == int(out.nfe)
    assert max(computed for computed, _ in rows[1:]) <= 8


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.7, "seed": 5, "top_p": 0.9}], ids=["0", "0.7"])
def test_an_engine_gives_the_same_in_shared_pages(sampled: dict[str, Any]) -> None:
    prompts = [torch.cat((PROMPTS[2], PROMPTS[0][:n])) for n in (0, 2, 3, 5)]  # the second of whole pages
    lengths, settings = (9, 40, 16, 17), {"rule": RULE, **sampled}
    expected = [dx.decode(ours(), p, gen_length=n, **settings) for p, n in zip(prompts, lengths, strict=True)]
    with dx.Engine(ours(), lanes=2, max_length=72, page_size=5, **settings) as engine:
        assert (engine.config.cache, engine.config.block_length) == ("window", 4)
        for _ in range(2):
            handles = [engine.submit(p, gen_length=n) for p, n in zip(prompts, lengths, strict=True)]
            streamed = [[token for part in handle for token in part] for handle in handles]
            found = [handle.result(60) for handle in handles]
            assert [each.tokens for each in found] == [out.responses[0].tolist() for out in expected]
            assert streamed == [each.tokens for each in found]
            assert [each.nfe for each in found] == [int(out.nfe[0]) for out in expected]
        assert all(each.reused >= 20 for each in found)
        # A response is shared, too, as far as it is stored.
        text = torch.cat((prompts[1], expected[1].responses[0]))
        again = engine.submit(text[:60], gen_length=4).result(60)
        assert again.reused >= 50
        if not sampled:
            assert again.tokens == published(theirs(), text[:60], 4, 4, 0.3, whole=False).tokens
    with dx.Engine(ours(8), share=False, max_length=72, **settings) as engine:
        assert engine.config.block_length == 8
        alone = dx.decode(ours(8), prompts[1], gen_length=40, **settings)
        assert engine.submit(prompts[1], gen_length=40).result(60).tokens == alone.responses[0].tolist()


@pytest.mark.parametrize(
    "way",
    [
        {"rule": RULE},
        {"rule": "entropy:1.5", "block_length": 5},
        {"rule": RULE, "temperature": 0.7, "seed": 5},
    ],
    ids=str,
)
def test_passes_are_replayed(taped: list[Graphs], way: dict[str, Any]) -> None:
    """Where windows are is a number of a pass and not part of its form."""
    model = models.wrap(theirs())  # without recordings
    settings: dict[str, Any] = {"gen_length": LENGTHS, "record": True, **way}
    expected = dx.decode(model, PROMPTS, graphs=False, **settings)
    out = dx.decode(model, PROMPTS, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert taped[0].recorder is not None, "a recording failed"
    assert taped[0].replays >= 5


def test_sampled_tokens_are_of_their_rows() -> None:
    """Drawn from left to right: the first of each pass is sampled from what a call predicts."""
    settings: dict[str, Any] = {"temperature": 0.7, "seed": 3, "rule": RULE}
    out = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, record=True, **settings)
    again = dx.decode(ours(), PROMPTS, gen_length=LENGTHS, **settings)
    assert torch.equal(out.sequences, again.sequences)
    assert out.trajectory is not None
    for b, n in enumerate(LENGTHS):
        steps = out.trajectory.step[b, :n].tolist()
        assert steps == sorted(steps)
        assert steps[0] == 1
        assert steps[-1] == int(out.nfe[b])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": "dual"}, 'cache: expected "window", by which SDLM fills masks, got .dual.'),
        ({"infill": True}, "infill: does not go with SDLM, whose masks are a window behind the text"),
        ({"steps": 16}, "steps: the fixed schedule is for whole blocks, and here a window slides over them"),
        ({"active_blocks": 2, "threshold": 0.5}, "active_blocks: expected 1, got 2: .* a window slides"),
        ({"rule": "credit"}, "rule: Credit does not go with SDLM, .* so expected a policy row, as "),
        ({"rule": "distance:0.4"}, "rule: Distance does not go with SDLM, which commits from left to right"),
        ({"rule": lambda stats, masked, step: masked}, "rule: FunctionRule does not go with SDLM"),
        ({"draft_size": 2, "rule": RULE}, "draft_size: needs a fixed number of tokens a pass"),
        ({"block_length": 65}, "block_length: expected a window of at most 64 masks, got 65"),
        ({"block_length": 8, "sub_block_length": 4}, "sub_block_length: a window is filled as a whole"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dx.decode(ours(), PROMPTS[0], gen_length=16, **settings)
    with pytest.raises(ValueError, match=said), dx.Engine(ours(), max_length=64, **settings):
        pass


def test_no_tokens() -> None:
    out = dx.decode(ours(), PROMPTS, gen_length=[0, 3, 0, 1])
    assert [len(response) for response in out.responses] == [0, 3, 0, 1]
    assert out.nfe_published.tolist() == [0, 3, 0, 1]
    without = dx.decode(ours(), [[]], gen_length=5, rule=RULE)  # a first token as of the first position
    assert MASK not in without.responses[0].tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdlm")
    theirs().save_pretrained(directory)
    words = {"?": 0, "<text_mask>": MASK} | {f"w{i}": i for i in range(1, VOCABULARY - 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_the_server(checkpoint: Path) -> None:
    model, tokenizer = registry.load(str(checkpoint))
    asked = {"model": "sdlm", "prompt": "w5 w7 w9", "max_tokens": 24, "policy": RULE}
    engine = {"cache": "window", "block_length": 4}
    with serving((model, tokenizer), checkpoint, engine, name="sdlm", max_length=64) as here:
        status, answer = here.ask(asked)
        out = dx.decode(ours(), [[5, 7, 9]], gen_length=24, rule=RULE, eos_id=EOS)
        assert (status, answer["usage"]["forward_passes"]) == (200, int(out.nfe))
        assert answer["choices"][0]["text"] == tokenizer.decode(out.responses[0][: int(out.kept)].tolist())
        for name, value in (
            ("structured_outputs", {"choice": ["w5"]}),
            ("suffix", "w3"),
            ("policy", "credit"),
        ):
            status, answer = here.ask({**asked, name: value})
            assert (status, answer["error"]["param"]) == (400, name)
            assert "does not go with SDLM" in answer["error"]["message"]


def test_the_window_is_the_default_block_length(checkpoint: Path) -> None:
    """By the files as by the model."""
    assert registry.traits_of(str(checkpoint)).default_block_length == 4
    assert models.traits(registry.load(str(checkpoint))[0]).default_block_length == 4


def test_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    shared = ("--model", str(checkpoint), "--gen-length", "24", "--policy", RULE)

    def run(*command: str) -> str:
        result = CliRunner().invoke(app, [command[0], *shared, *command[1:]])
        assert result.exit_code == 0, result.output
        return result.output

    out = dx.decode(ours(), [[5, 7, 9]], gen_length=24, rule=RULE, eos_id=EOS)
    row = json.loads(run("decode", "--json", "w5 w7 w9"))
    assert row["response"] == tokenizer.decode(out.responses[0][: int(out.kept)].tolist())
    assert row["forwards"] == int(out.nfe)
    guesses = json.loads(run("decode", "--policy", "one", "--draft-size", "3", "--json", "w5 w7 w9"))
    out = dx.decode(ours(), [[5, 7, 9]], gen_length=24, rule="one", draft_size=3, eos_id=EOS)
    assert guesses["response"] == tokenizer.decode(out.responses[0][: int(out.kept)].tolist())
    assert guesses["forwards"] == int(out.nfe)
    result = CliRunner().invoke(app, ["decode", *shared, "w5", "--suffix", "w7"])
    assert (result.exit_code, result.output[:26]) == (2, "error: suffix: does not go")
    (tmp_path / "prompts.jsonl").write_text("w5 w7 w9\n")
    given = ("--prompts", str(tmp_path / "prompts.jsonl"), "--repeats", "1")
    run("tune", str(tmp_path / "tuned.json"), *given)
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert (content["rule"], content["cache"], content["block_length"]) == (RULE, "window", 4)
    output = run("evaluate", "--data", str(tmp_path / "prompts.jsonl"), "--checker", "none")
    assert float(output.splitlines()[-1].split()[1]) <= int(out.nfe)


def test_a_response_ends_at_any_of_a_checkpoints_end_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """As soon as it is there, from the server and the command line, and where a program names them."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "sdlm"))
    whole = dx.decode(ours(), [[5, 7, 9]], gen_length=24, rule="one").responses[0].tolist()
    second = next(token for token in whole if whole.index(token) % 4 == 1)  # not at a block's end
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, second]}))
    model, tokenizer = registry.load(str(directory))
    assert model.eos_ids == models.load(directory).eos_ids == (EOS, second)
    out = dx.decode(model, [[5, 7, 9]], gen_length=24, rule="one", eos_id=model.eos_ids)
    at = whole.index(second)
    assert (int(out.kept), int(out.nfe), out.responses[0].tolist()) == (
        at,
        at + 1,
        [*whole[: at + 1], *[EOS] * (23 - at)],
    )
    said = tokenizer.decode(whole[:at])
    engine = {"cache": "window", "block_length": 4}
    with serving((model, tokenizer), directory, engine, name="sdlm", max_length=64) as here:
        asked = {"model": "sdlm", "prompt": "w5 w7 w9", "max_tokens": 24, "policy": "one"}
        _, answer = here.ask(asked)
        choice, usage = answer["choices"][0], answer["usage"]
        assert (choice["text"], choice["finish_reason"], usage["forward_passes"]) == (said, "stop", at + 1)
        _, answer = here.ask({**asked, "ignore_eos": True})
        assert answer["usage"]["forward_passes"] == 24
    config = tmp_path / "config.json"
    for named, passes in ((None, at + 1), ([EOS, second], at + 1), (EOS, 24), (-1, 24)):
        config.write_text(json.dumps({"gen_length": 24, "eos_id": named}))
        command = ["decode", "--model", str(directory), "--config", str(config), "--policy", "one", "--json"]
        result = CliRunner().invoke(app, [*command, "w5 w7 w9"])
        assert json.loads(result.output)["forwards"] == passes, named
