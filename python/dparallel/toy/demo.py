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
    # A problem that is not among the table's.
    problem = next(itertools.islice(tasks.problems("held_out", seed=1), 2, None))
    console.print(f"\n[bold]{problem.prompt}[/bold]", highlight=False)
    console.print(LEGEND, highlight=False)
    pictures = [_show(name, problem, directory, delay, console) for name in names]
    console.print(f"{problems} held-out problems, {tasks.GEN_LENGTH} tokens each:\n", highlight=False)
    console.print(results.HEADING, style="bold")
    rows = []
    for name in names:
        drafters = DRAFTERS if name == "builtin:causal" else DRAFTERS[:2]  # which belong to no model
        for row in sweeping.sweep([name], sweeping.POLICIES, problems=problems, drafters=drafters):
            rows.append(row)
            console.print(results.result_line(row), highlight=False)
    files.write_json(directory / "table.json", rows)
    console.print(f"\npictures: {', '.join(map(str, pictures))}", highlight=False)
    return directory


def _show(name: str, problem: tasks.Problem, directory: Path, delay: float, console: Any) -> Path:
    """Show a model's answer pass by pass; return the file of its picture."""
    model, tokenizer = registry.load(name)
    prompt = torch.tensor([tokenizer.encode(problem.prompt).ids])
    console.print(f"\n[bold]{name}[/bold]\n", highlight=False)
    shared: dict[str, Any] = {"gen_length": tasks.GEN_LENGTH, "record": True}
    answer: dx.DecodeOutput
    with LiveText(console, tokenizer, model.mask_id, delay, causal=model.causal) as streamer:
        if model.causal:
            how = DRAFTER if name == "builtin:causal" else "ngram"
            answer = dx.speculate(model, prompt, drafter=how, draft_size=15, streamer=streamer, **shared)
        else:
            how = "entropy:0.5"
            answer = dx.decode(model, prompt, rule=how, streamer=streamer, **shared)
    ids, passes = answer.responses[0].tolist(), answer.forwards
    kept = evaluate.kept_of(ids, model.eos_ids)
    if model.causal:
        ids = ids[: kept + 1]
        figures = (
            f"{kept} tokens and the end in {passes} passes, drafted by {how}; without a draft {kept + 1} "
            "passes give the same text"
        )
    else:
        figures = (
            f"{kept} tokens in {passes} passes, {kept / passes:.1f} tokens a pass (all {tasks.GEN_LENGTH} "
            f"positions, the padding after the end too: {answer.padded_tokens_per_forward:.1f} a pass)"
        )
    text = tokenizer.decode(ids)
    verdict = "right" if tasks.is_correct(problem, text) else f"wrong, it is {problem.answer}"
    console.print(f"\nanswer {tasks.extract_answer(text)} ({verdict}): {figures}\n", highlight=False)
    picture = directory / f"response-{Path(name.removeprefix('builtin:')).name}.png"
    words = ["·" if word == tasks.EOS else word for word in map(tokenizer.id_to_token, ids)]
    assert answer.trajectory is not None
    steps = answer.trajectory.step[0, : len(ids)].tolist()
    title = f"{problem.prompt}   ({name}: {passes} passes, {how})"
    plots.response_by_pass(words, steps, picture, title=title)
    return picture
