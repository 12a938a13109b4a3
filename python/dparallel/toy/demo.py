"""`dparallel demo`: each model decodes a problem while you watch; then a table, and pictures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

import dparallel_ext as dx

from .. import evaluate, files, plots, registry, results
from .. import sweep as sweeping
from ..live import HIDDEN, LiveText
from . import tasks

LEGEND = (
    f"{HIDDEN} is a masked token, · the end of the text. A pass is one run of the model over the text, and a "
    "policy decides which predictions stay. The student is the teacher, distilled to need fewer passes. The "
    "causal model writes from left to right, and a pass keeps the tokens that a drafter guessed right."
)
DRAFTER = "builtin:dflash"
DRAFTERS = (evaluate.PLAIN, "ngram", *registry.DRAFTERS, "builtin:student")


def run(
    names: list[str] | None = None,
    *,
    problems: int = 50,
    out: str | Path = "out/demo",
    delay: float = 0.25,
    console: Any = None,
) -> Path:
    """Run the demo of the models `names`, by default all that ship except the verifier.

    Writes table.json and, for each model, response-NAME.png to `out`, and returns that directory.
    """
    from rich.console import Console

    console, directory = console or Console(), Path(out)
    names = names or [name for name in registry.builtins() if name != registry.VERIFIER]
    for name in names:
        registry.is_causal(name)  # raises for a name that is none, before anything is shown
    # A problem that is not among those of the table.
    problem = next(itertools.islice(tasks.problems("held_out", seed=1), 2, None))
    console.print(f"\n[bold]{problem.prompt}[/bold]", highlight=False)
    console.print(LEGEND, highlight=False)
    pictures = [_show(name, problem, directory, delay, console) for name in names]
    console.print(f"{problems} held-out problems, {tasks.GEN_LENGTH} tokens each:\n", highlight=False)
    console.print(results.HEADING, style="bold")
    rows = []
    for row in sweeping.sweep(names, sweeping.POLICIES, problems=problems, drafters=DRAFTERS):
        rows.append(row)
        console.print(results.line(row), highlight=False)
    files.write_json(directory / "table.json", rows)
    console.print(f"\npictures: {', '.join(map(str, pictures))}", highlight=False)
    return directory


def _show(name: str, problem: tasks.Problem, directory: Path, delay: float, console: Any) -> Path:
    """Show a model's answer pass by pass; return the file of its picture."""
    model, tokenizer = registry.load(name)
    prompt = torch.tensor([tokenizer.encode(problem.prompt).ids])
    console.print(f"\n[bold]{name}[/bold]\n", highlight=False)
    picture = directory / f"response-{Path(name.removeprefix('builtin:')).name}.png"
    if model.causal:
        return _show_drafted(name, model, tokenizer, prompt, problem, picture, delay, console)
    assert model.mask_id is not None
    with LiveText(console, tokenizer, model.mask_id, delay) as streamer:
        answer = dx.decode(
            model,
            prompt,
            gen_length=tasks.GEN_LENGTH,
            threshold=0.5,
            selector="entropy",
            streamer=streamer,
            record=True,
        )
    ids = answer.sequences[0, prompt.shape[1] :].tolist()
    kept = evaluate.kept_of(ids, model.eos_ids)
    console.print(
        f"\n{_judged(problem, tokenizer.decode(ids))}: {kept} tokens in {answer.forwards} passes, "
        f"{kept / answer.forwards:.1f} tokens a pass (all {tasks.GEN_LENGTH} "
        f"positions, the padding after the end too: {answer.padded_tokens_per_forward:.1f} a pass)\n",
        highlight=False,
    )
    assert answer.trajectory is not None
    title = f"{problem.prompt}   ({name}: {answer.forwards} passes, entropy 0.5)"
    return _draw(picture, tokenizer, ids, answer.trajectory.step[0].tolist(), title)


def _show_drafted(
    name: str,
    model: dx.models.Model,
    tokenizer: Any,
    prompt: torch.Tensor,
    problem: tasks.Problem,
    picture: Path,
    delay: float,
    console: Any,
) -> Path:
    """Show an autoregressive model's answer, a line for each pass; return the file of its picture."""
    drafter = DRAFTER if name == "builtin:causal" else "ngram"
    with Passes(console, tokenizer, None, delay, causal=True) as streamer:
        answer = dx.speculate(
            model, prompt, gen_length=tasks.GEN_LENGTH, drafter=drafter, draft_size=15, streamer=streamer
        )
    kept = int(answer.kept[0])
    ids = answer.responses[0][: kept + 1].tolist()
    console.print(
        f"\n{_judged(problem, tokenizer.decode(ids[:kept]))}: {kept} tokens and the end in {answer.forwards} "
        f"passes, drafted by {drafter}; without a draft {kept + 1} passes give the same text\n",
        highlight=False,
    )
    title = f"{problem.prompt}   ({name}: {answer.forwards} passes, {drafter})"
    return _draw(picture, tokenizer, ids, streamer.of_token, title)


def _judged(problem: tasks.Problem, text: str) -> str:
    """The answer in a text, and whether it is right."""
    verdict = "right" if tasks.is_correct(problem, text) else f"wrong, it is {problem.answer}"
    return f"answer {tasks.extract_answer(text)} ({verdict})"


def _draw(picture: Path, tokenizer: Any, ids: list[int], steps: list[int], title: str) -> Path:
    """Draw a response with the pass of each token; return the file."""
    words = [tokenizer.id_to_token(token) for token in ids]
    shown = ["·" if word == tasks.EOS else word for word in words]
    plots.response_by_pass(shown, steps, picture, title=title)
    return picture


class Passes(LiveText):
    """A LiveText that also notes the pass of each token."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.of_token: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self.of_token += [self.passes] * (len(self.done) - len(self.of_token))
