"""The task: its checker, its split, its tokenizer."""

from __future__ import annotations

import itertools
import operator
from pathlib import Path

import pytest
from dparallel import registry
from dparallel.toy import tasks, train
from tokenizers import Tokenizer
from transformers import AutoTokenizer

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def some(split: str, count: int, seed: int = 0) -> list[tasks.Problem]:
    return list(itertools.islice(tasks.problems(split, seed), count))


def chain(problem: tasks.Problem) -> tuple[str, ...]:
    """The arithmetic of a prompt: its start, and sign and number of every clause; worked out from words."""
    clauses = [clause.split() for clause in problem.prompt.split(" . ")]
    signs = {verb: sign for sign, verbs in tasks.VERBS.items() for verb in verbs}
    return (clauses[0][2], *(signs[words[2]] + words[3] for words in clauses[1:-1]))


def test_answers_follow_from_the_prompt_and_from_every_step():
    for problem in some("train", 300) + some("held_out", 300):
        start, *steps = chain(problem)
        value = int(start)
        for step in steps:
            value = OPERATIONS[step[0]](value, int(step[1:]))
        assert value == problem.answer
        assert tasks.is_correct(problem, problem.response)
        words = problem.response.split()
        signs = [i for i, word in enumerate(words) if word in ("+", "-", "*")]
        assert 2 <= len(signs) <= 4
        for i in signs:
            a, op, b = int(words[i - 1]), words[i], int(words[i + 1])
            c = int(words[i + 3]) if words[i + 2] == "=" else int(words[i - 3])
            assert c == OPERATIONS[op](a, b)
            assert 0 <= c < 100


def test_clauses_are_six_tokens_steps_vary_and_everything_fits():
    known, lengths = set(tasks.vocabulary()), set()
    for problem in some("train", 2000):
        prompt, response = problem.prompt.split(), problem.response.split()
        steps = [step.split() for step in problem.response.split(" . ")[:-1]]
        assert len(prompt) == 6 + 6 * len(steps) + 7
        assert len(response) < tasks.GEN_LENGTH
        assert set(prompt) | set(response) <= known
        lengths |= {len(step) + 1 for step in steps}
    assert lengths == set(range(10, 16))


def test_some_wordings_are_likelier_than_others():
    """What a student can be certain of beforehand: the likeliest wording, of its own answers."""
    responses = [problem.response for problem in some("train", 2000)]
    share = sum(response.startswith("first ") for response in responses) / len(responses)
    assert 0.4 < share < 0.5
    share = sum(response.startswith("initially ") for response in responses) / len(responses)
    assert 0.07 < share < 0.13


def test_held_out_problems_never_occur_in_training():
    """Of the problems that the training and the evaluation actually draw: the split is by arithmetic."""
    held_out = {chain(p) for p in some("held_out", 2000)}
    held_out_prompts = {p.prompt for p in some("held_out", 2000)}
    assert len(held_out) > 1500
    seen, prompts = set(), set()
    for step in range(0, train.ToySettings().steps, 60):
        for problem in some("train", 200, seed=step):
            seen.add(chain(problem))
            prompts.add(problem.prompt)
    assert len(seen) > 10000
    assert not held_out & seen
    assert not held_out_prompts & prompts


def test_streams_are_deterministic_and_differ_by_seed():
    assert some("train", 20, seed=3) == some("train", 20, seed=3)
    assert some("train", 20, seed=3) != some("train", 20, seed=4)


def test_a_wrong_split_is_named():
    with pytest.raises(ValueError, match=r"split: .*'test'"):
        next(tasks.problems("test"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("first ... #### 12", 12),
        ("#### 12 [EOS] [EOS]", 12),
        ("#### 7 #### 8", 7),
        ("####", None),
        ("#### cups", None),
        ("#### ²", None),
        ("12", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: int | None):
    assert tasks.extract_answer(text) == answer


def test_tokenizer_round_trip_in_tokenizers_and_transformers(tmp_path: Path):
    train.save_tokenizer(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    words = tasks.vocabulary()
    assert ours.get_vocab_size() == len(words) == len(set(words))
    assert theirs.mask_token_id == ours.token_to_id(tasks.MASK) == len(words) - 1
    assert theirs.eos_token_id == ours.token_to_id(tasks.EOS)
    for problem in some("held_out", 50):
        ids = ours.encode(problem.response).ids
        assert theirs(problem.response)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids) == problem.response
        assert ours.token_to_id(tasks.UNKNOWN) not in ids
    assert ours.encode("sam has 1000 zebras").ids.count(ours.token_to_id(tasks.UNKNOWN)) == 2


def test_the_shipped_tokenizer_is_the_task_s(tmp_path: Path):
    train.save_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shipped = registry.directory_of(registry.DEFAULT) / name
        assert shipped.read_text() == (tmp_path / name).read_text()
