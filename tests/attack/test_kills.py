"""Runs that are killed, or whose disk is full, in the middle of a save: nothing half-written counts."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import full_disk
from dparallel import registry, text
from dparallel.problems import Prompt, read_prompts
from dparallel.toy import train
from dparallel.training import adapters, distill, trajectories

import dparallel_ext as dx
from dparallel_ext import speculation

TINY = train.ToySettings(steps=4, batch=2, width=32, layers=1, heads=2, mlp_width=32, warmup=2)
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.mkdir", "os.chmod")
"""Python's audit events of what changes files; what C++ and Rust write shows at the next of them."""

watched: list[tuple[str, Callable[[], None]]] = []


def audit(event: str, arguments: tuple[object, ...]) -> None:
    if watched and event in CHANGES and any(str(a).startswith(watched[-1][0]) for a in arguments[:2]):
        directory, look = watched.pop()  # what looking does is not looked at
        look()
        watched.append((directory, look))


sys.addaudithook(audit)  # for the life of the process: there is no way to take one away


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def states(directory: Path, run: Callable[[], object]) -> list[dict[str, bytes]]:
    """What the directory held before each change that `run` made to its files, and at its end."""
    found: list[dict[str, bytes]] = []

    def look() -> None:
        now = contents(directory)
        if not found or now != found[-1]:
            found.append(now)

    watched.append((str(directory), look))
    try:
        run()
    finally:
        watched.clear()
    look()
    return found


def killed(rng: random.Random, found: list[dict[str, bytes]]) -> tuple[str, dict[str, bytes]]:
    """A state in which a kill leaves the directory: one of those, or one where a file is written in part."""
    at = rng.randrange(len(found))
    state, before = dict(found[at]), found[at - 1] if at else {}
    fresh = sorted(name for name in state if before.get(name) != state[name])
    if not fresh or rng.random() < 0.3:
        return f"state {at} of {len(found)}", state
    name = rng.choice(fresh)
    renamed = state[name] in before.values()  # a rename is whole or not
    if not renamed:
        state[name] = state[name][: rng.choice([0, 1, len(state[name]) // 2, len(state[name]) - 1])]
    return f"state {at} of {len(found)}, {name} in part", state


def lay(directory: Path, state: dict[str, bytes]) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in state.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


class Saves:
    """A run that saves, the files that it ends with, and every state on the way there."""

    def __init__(self, root: Path, run: Callable[[Path], object], same: Callable[[dict[str, bytes]], Any]):
        self.root, self.run, self.same = root, run, same
        (root / "whole").mkdir()
        self.states = states(root / "whole", lambda: run(root / "whole"))
        self.expected = same(contents(root / "whole"))
        self.largest = max(map(len, contents(root / "whole").values()))

    def attack(self, rng: random.Random) -> None:
        out = self.root / "killed"
        if rng.random() < 0.75:
            said, state = killed(rng, self.states)
            lay(out, state)
        else:
            size = int(self.largest * rng.random())
            said = f"a disk full at {size}"
            lay(out, {})
            with full_disk(size), suppress(OSError):
                self.run(out)
        try:
            self.run(out)
        except Exception as error:
            raise AssertionError(f"{said}: the run does not go on: {error!r}") from error
        left = contents(out)
        assert not [name for name in left if name.endswith(".partial")], said
        assert self.same(left) == self.expected, said


# --- train --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    def run(out: Path) -> None:
        train.train(out, TINY, save_every=2, evaluate=0, progress=False)

    def same(found: dict[str, bytes]) -> Any:
        report = json.loads(found["training.json"])
        rest = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        return [report["loss"], *(found[name] for name in rest)]

    return Saves(tmp_path_factory.mktemp("train"), run, same)


def test_training_goes_on_from_every_state_of_a_save(training: Saves, attack: Any) -> None:
    assert len(training.states) > 10
    for rng in attack.cases(8):
        training.attack(rng)


# --- trajectories -------------------------------------------------------------------------------


def every(answer: str, response: str) -> bool:
    """A checker that finds all answers right."""
    return True


@pytest.fixture(scope="module")
def model(training: Saves) -> Path:
    """A tiny model's checkpoint, with its tokenizer."""
    return training.root / "whole"


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def answering(request: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Saves:
    prompts = read_prompts("builtin:4")
    settings = trajectories.TrajectorySettings(
        str(model), checker=f"{__name__}:every", shard=2, gen_length=8, block_length=8, format=request.param
    )
    loaded = registry.load(str(model))

    def run(out: Path) -> None:
        trajectories.generate(out, prompts, settings, loaded=loaded, progress=False)
        assert len(trajectories.Trajectories(out)) == len(prompts)

    return Saves(tmp_path_factory.mktemp("answers"), run, lambda found: found)


def test_answering_goes_on_from_every_state_of_a_save(answering: Saves, attack: Any) -> None:
    for rng in attack.cases(8):
        answering.attack(rng)


# --- distill ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("few")
    settings = trajectories.TrajectorySettings(model=str(model), checker=f"{__name__}:every", gen_length=32)
    prompts = [Prompt(p.text, p.answer) for p in read_prompts("builtin:8")]
    return trajectories.generate(out, prompts, settings, progress=False)


def recipe(model: Path, **changes: Any) -> distill.Recipe:
    training = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "save_total_limit": 2}
    found = distill.Recipe(str(model), {**training, "disable_tqdm": True})
    return replace(found, **changes)


@pytest.fixture(scope="module", params=["weights", "adapter"])
def distilling(request: Any, model: Path, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Saves:
    lora = {"r": 2, "lora_alpha": 4} if request.param == "adapter" else None

    def run(out: Path) -> None:
        distill.run(recipe(model, lora=lora), answers, out, progress=False)

    def same(found: dict[str, bytes]) -> Any:
        name = "adapter_model.safetensors" if lora else "model.safetensors"
        log = [{k: v for k, v in e.items() if "loss" in k} for e in json.loads(found["training.json"])["log"]]
        return [log[:-1], *(found[n] for n in (name, "tokenizer.json", f"checkpoint-4/{name}"))]

    return Saves(tmp_path_factory.mktemp(request.param), run, same)


@pytest.mark.slow
def test_distilling_goes_on_from_every_state_of_a_save(distilling: Saves, attack: Any) -> None:
    for rng in attack.cases(4):
        distilling.attack(rng)


# --- a model's checkpoint, written over another -------------------------------------------------


def outcome(directory: Path) -> str:
    """Of a load: the model's numbers, or the error."""
    try:
        found, tokenizer = registry.load(str(directory))
        template = registry.template_of(str(directory))
    except (ValueError, FileNotFoundError) as error:
        return "refused" if str(directory) in str(error) else f"refused without a name: {error}"
    encode = text.prompt_encoder(tokenizer, template)
    total = sum(float(p.detach().double().abs().sum()) for p in found.parameters())
    return f"{found.shape} {found.mask_id} {total} {encode('Tom has 3')}"


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same sizes, and another config, tokenizer and template: what would be mixed up is not seen."""
    out = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(model, out)
    found = dx.models.load(model)
    found.config["rope_theta"] = 500.0
    for p in found.parameters():
        p.data.mul_(2)
    dx.models.save(found, out)
    (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }} =")
    return out


def test_a_save_over_another_model_is_old_or_new_or_refused(
    model: Path, other: Path, attack: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(model, out)
    new = dx.models.load(other)
    ends = [outcome(out)]
    found = states(out, lambda: dx.models.save(new, out))
    ends.append(outcome(out))
    assert len(set(ends)) == 2
    for rng in attack.cases(20):
        said, state = killed(rng, found)
        assert outcome(lay(tmp_path / "killed", state)) in [*ends, "refused"], said
    with full_disk(10_000), pytest.raises(OSError, match="full"):
        dx.models.save(dx.models.load(model), out)
    assert outcome(out) == ends[1]


def test_a_drafter_saved_over_another_is_old_or_new_or_refused(attack: Any, tmp_path: Path) -> None:
    """Of the same sizes."""

    def outcome_of(directory: Path) -> str:
        try:
            found = speculation.load(directory)
        except (ValueError, FileNotFoundError) as error:
            return "refused" if str(directory) in str(error) else f"refused without a name: {error}"
        assert isinstance(found, speculation.AdaDecode)
        return f"{found.options.gamma} {sum(float(p.abs().sum()) for p in found.heads.parameters())}"

    out = tmp_path / "out"
    old = speculation.load(registry.DRAFTERS["builtin:adadecode"])
    assert isinstance(old, speculation.AdaDecode)
    old.save(out)
    ends = [outcome_of(out)]
    new = speculation.AdaDecode(old.heads, gamma=0.25)
    for parameter in new.heads.parameters():
        parameter.data *= 2
    found = states(out, lambda: new.save(out))
    ends.append(outcome_of(out))
    assert len(set(ends)) == 2
    for rng in attack.cases(20):
        said, state = killed(rng, found)
        assert outcome_of(lay(tmp_path / "killed", state)) in [*ends, "refused"], said


@pytest.fixture(scope="module")
def adapter(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    adapted = adapters.with_lora(dx.models.load(other), {"r": 2, "init_lora_weights": False}, str(other))
    adapted.save_pretrained(out)
    return out


def test_a_merge_is_whole_or_refused(adapter: Path, attack: Any, tmp_path: Path) -> None:
    """Also without the base's tokenizer or template, which make another prompt."""
    out = tmp_path / "out"
    out.mkdir()
    found = states(out, lambda: adapters.merge(adapter, out))
    whole = outcome(out)
    assert whole != "refused"
    for rng in attack.cases(20):
        said, state = killed(rng, found)
        assert outcome(lay(tmp_path / "killed", state)) in (whole, "refused"), said
        if rng.random() < 0.1:
            adapters.merge(adapter, tmp_path / "killed")
            assert contents(tmp_path / "killed") == contents(out), said
