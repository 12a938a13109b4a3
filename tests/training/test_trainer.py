"""The trainer: its loss is the published one; batch layout, processes and interruptions do not change it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_trainer
import torch
import yaml
from conftest import ROOT, golden
from dparallel.training.heads import plain_head
from dparallel.training.trainer import CertaintyForcingArguments, CertaintyForcingTrainer
from dparallel.training.trajectories import Collator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import dparallel_ext as dx


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 leaves that of one run in the environment, for every run that follows."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


class RemoteConfig(PretrainedConfig):
    model_type = "remote"

    def __init__(self, mask_token_id: int = 2, scale_logits: bool = False, **more: Any) -> None:
        super().__init__(**{"tie_word_embeddings": False, **more})
        self.mask_token_id = mask_token_id
        self.scale_logits = scale_logits


class Remote(PreTrainedModel):
    """A model as remote code gives it: bidirectional, .logits, an output embedding; no attention_mask."""

    config_class = RemoteConfig
    _tied_weights_keys = None

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(240, 16)
        self.mix = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 240, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        x = x + torch.tanh(self.mix(x.mean(1, keepdim=True) + x))
        logits = self.lm_head(x)
        return dx.models.Output(logits / 4 if self.config.scale_logits else logits)


def trainer_of(model: nn.Module, tmp_path: Path, **settings: Any) -> CertaintyForcingTrainer:
    args = CertaintyForcingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, **settings
    )
    return CertaintyForcingTrainer(
        model=model, args=args, train_dataset=run_trainer.rows(4), data_collator=Collator(1)
    )


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "llada": golden.model("llada_tiny_a", dtype=torch.float64),
        "dream": golden.model("dream_tiny_a", dtype=torch.float64),
        "remote": Remote(RemoteConfig()).double(),
        "remote, scaled": Remote(RemoteConfig(scale_logits=True)).double(),
    }


SETTINGS = [
    {},
    {"entropy_weight": 0.0},
    {"ce_weight": 0.0, "entropy_weight": 1.0},
    {"temperature": 1.0},
    {"gate": "all"},
    {"block_length": None, "mask_ratio": [0, 1.2]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["llada", "dream", "remote", "remote, scaled"])
def test_the_loss_is_that_of_the_definition(name: str, settings: dict[str, Any], tmp_path: Path):
    """Both views one by one, over the whole logits, by the float64 oracle; and so its gradient."""
    model = models()[name]
    trainer = trainer_of(model, tmp_path, **{"block_length": 4, **settings})
    assert (trainer.lm_head is None) == (name == "remote, scaled")
    rows = run_trainer.rows(5)
    for row in rows:
        row["input_ids"] = row["input_ids"][:6].repeat(2)
        row["prompt_length"] = row["index"]  # 0: where logits are shifted, none are for the first token
    views = trainer.views(Collator(1)(rows), step=3)
    assert "attention_mask" not in views
    model.train()
    loss = trainer.compute_loss(model, views)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    expected = torch.zeros((), dtype=torch.float64)
    args, shift = trainer.args, name == "dream"
    for part in (slice(0, 5), slice(5, 10)):
        logits = model(views["input_ids"][part]).logits.double()
        labels, active = views["labels"][part], views["active"][part]
        if shift:
            logits, labels, active = logits[:, :-1], labels[:, 1:], active[:, 1:]
        logits, labels = logits[active], labels[active]
        nll = nn.functional.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
        q = (logits / args.temperature).log_softmax(-1)
        gated = (logits.argmax(-1) == labels) | (args.gate == "all")
        entropy = -(q.exp() * q).sum(-1)[gated].sum() / max(1, int(gated.sum()))
        expected = expected + args.ce_weight * nll + args.entropy_weight * entropy
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    for ours, p in zip(grads, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-8)


def test_the_head_s_logits_never_exist(tmp_path: Path):
    """Where the head is plain, what the model returns in the place of its logits is three numbers a token."""
    model = golden.model("llada_tiny_a", dtype=torch.float32)
    trainer = trainer_of(model, tmp_path)
    seen = []
    hook = model.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.logits.shape)))
    trainer.compute_loss(model, trainer.views(Collator(1)(run_trainer.rows(2)), 0))
    hook.remove()
    assert seen[0][-1] == 3
    assert "forward" not in vars(model.lm_head)  # as it was
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, model.shape.embedding_size)


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of runs in two processes, by name: whole parameters in each, and shards."""
    names = ("at-once", "accumulated", "uneven", "sharded", "whole", "resumed")
    directories = {name: tmp_path_factory.mktemp(name) for name in names}
    shared = {"ddp_backend": "gloo", "per_device_train_batch_size": 4, "judged": 9}
    shared |= {"per_device_eval_batch_size": 2}
    whole = {
        "at-once": shared,
        "accumulated": {**shared, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "uneven": {**shared, "count": 11},
    }
    adam = {"per_device_train_batch_size": 4, "optim": "adamw_torch"}
    sharded = {
        "sharded": {"per_device_train_batch_size": 4},
        "whole": {**adam, "save_strategy": "steps", "save_steps": 2},
        "resumed": {**adam, "resume": str(directories["whole"] / "checkpoint-2")},
    }
    recipe = yaml.safe_load((ROOT / "recipes" / "fsdp.yaml").read_text())["fsdp_config"]
    fsdp = {name.upper(): str(value) for name, value in recipe.items()} | {"ACCELERATE_USE_FSDP": "true"}
    fsdp["FSDP_TRANSFORMER_CLS_TO_WRAP"] = fsdp.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
    groups = [
        [environment, {str(directories[name]): settings for name, settings in runs.items()}]
        for environment, runs in (({}, whole), (fsdp, sharded))
    ]
    done = subprocess.run(
        [sys.executable, run_trainer.__file__, json.dumps(groups)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return directories


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Four steps on batches of 8 rows in one process."""
    out = tmp_path_factory.mktemp("big")
    trainer = run_trainer.run(out, judged=9, per_device_eval_batch_size=16)
    trainer.save_model(str(out))
    log = [entry for entry in trainer.state.log_history if "ce" in entry]
    log[-1] |= {"eval_loss": trainer.state.log_history[-1]["eval_loss"]}
    start = {name: p.detach() for name, p in run_trainer.model().named_parameters()}
    moved = max(float((weights(out)[name] - p).abs().max()) for name, p in start.items())
    assert moved > 0.02  # far above the tolerance
    assert sum(0 < entry["correct"] < 1 for entry in log) >= 3  # the gate is open for some
    return weights(out), log


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_accumulation_makes_the_update_of_one_big_batch(micro: int, big: Any, tmp_path: Path):
    settings = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
    trainer = run_trainer.run(tmp_path, **settings)
    trainer.save_model(str(tmp_path))
    close(weights(tmp_path), big[0])
    log = [entry for entry in trainer.state.log_history if "ce" in entry]
    for ours, theirs in zip(log, big[1], strict=True):
        for key in ("loss", "ce", "entropy", "correct", "certainty"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


@pytest.mark.slow
def test_sharded_parameters_train_save_and_resume_as_whole_ones(big: Any, in_two_processes: dict[str, Path]):
    """By FSDP2, as recipes/fsdp.yaml has it."""
    sharded, whole, resumed = (in_two_processes[name] for name in ("sharded", "whole", "resumed"))
    close(weights(sharded), big[0])
    found, expected, half = weights(resumed), weights(whole), weights(whole / "checkpoint-2")
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert any(not torch.equal(half[name], p) for name, p in expected.items())


@pytest.mark.slow
def test_ends_of_distributed_runs_do_not_hang(in_two_processes: dict[str, Path]):
    assert (in_two_processes["uneven"] / "ends").read_text() == "16"


@pytest.mark.slow
def test_two_processes_make_the_update_of_one_big_batch(big: Any, in_two_processes: dict[str, Path]):
    for name in ("at-once", "accumulated"):
        out = in_two_processes[name]
        close(weights(out), big[0])
        history = json.loads((out / "log.json").read_text())
        assert history[-1]["eval_loss"] == pytest.approx(big[1][-1]["eval_loss"], rel=1e-3)
        log = [entry for entry in history if "ce" in entry]
        for ours, theirs in zip(log, big[1], strict=True):
            for key in ("loss", "ce", "entropy", "correct", "certainty"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


@pytest.mark.slow
def test_rows_repeated_to_fill_an_epoch_s_last_batch_count_once(
    in_two_processes: dict[str, Path], tmp_path: Path
):
    """Of 11 rows the first process gets three and a repeated one last, the second four repeated ones."""
    trainer = run_trainer.run(tmp_path, count=11)
    trainer.save_model(str(tmp_path))
    out = in_two_processes["uneven"]
    close(weights(out), weights(tmp_path))
    logs = json.loads((out / "log.json").read_text()), trainer.state.log_history
    found, expected = ([entry for entry in log if "ce" in entry] for log in logs)
    assert len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "ce", "entropy", "correct", "certainty"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "dropout": 0.3},
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(settings: dict[str, Any], tmp_path: Path):
    given = {"optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 4, **settings}
    saving = {**given, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = run_trainer.run(tmp_path / "whole", **saving)
    whole.save_model(str(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run_trainer.run(tmp_path / "resumed", resume=str(checkpoint), **saving)
    resumed.save_model(str(tmp_path / "resumed"))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(expected[name], p) for name, p in weights(checkpoint).items())
    assert dx.models.load(checkpoint).mask_id == run_trainer.model().mask_id


def test_a_finished_run_that_is_resumed_makes_no_step_more(tmp_path: Path):
    given = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "max_steps": 3}
    given |= {"save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run_trainer.run(tmp_path, **given)
    checkpoint = tmp_path / "checkpoint-3"
    again = run_trainer.run(tmp_path, resume=str(checkpoint), **given)
    again.save_model(str(tmp_path / "again"))
    assert again.state.global_step == 3
    expected, found = weights(checkpoint), weights(tmp_path / "again")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_gradient_checkpointing_and_bf16_train_the_same_thing(big: Any, tmp_path: Path):
    run_trainer.run(tmp_path, gradient_checkpointing=True).save_model(str(tmp_path))
    close(weights(tmp_path), big[0])
    trainer = run_trainer.run(tmp_path, bf16=True)
    log = [entry["loss"] for entry in trainer.state.log_history if "ce" in entry]
    assert log == pytest.approx([entry["loss"] for entry in big[1]], rel=0.05)


def test_what_is_logged_is_of_the_steps_since_the_last_log(tmp_path: Path):
    """ce is a mean over active tokens, entropy over gated and certainty over right ones."""
    model = run_trainer.model().train()
    model.lm_head.weight.data[6:] = 0  # so that some of the rows' three words are predicted
    trainer = trainer_of(model, tmp_path, block_length=4, gate="all")
    for step in (3, 4):
        logs: dict[str, float] = {"loss": 0.0}
        views = trainer.views(Collator(1)(run_trainer.rows(6)), step)
        with torch.no_grad():
            nll, entropy, gated, right = trainer.rows(model, views)
        trainer.compute_loss(model, views)
        trainer.log(logs)
        assert 0 < int(right.sum()) < int(gated.sum()) == int(views["active"].sum())
        assert logs["ce"] == pytest.approx(float(nll[gated].mean()))
        assert logs["entropy"] == pytest.approx(float(entropy[gated].mean()))
        assert logs["correct"] == pytest.approx(float(right.sum() / gated.sum()))
        assert logs["certainty"] == pytest.approx(float((-nll[right]).exp().mean()))
    trainer.args.gate = "correct"
    trainer.compute_loss(model, views)
    trainer.log(logs)
    assert logs["entropy"] == pytest.approx(float(entropy[right].mean()))


def test_training_makes_right_tokens_certain(tmp_path: Path):
    """On a task that can be learned, ce and entropy fall, correct and certainty rise."""
    given = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 60, "logging_steps": 10}
    log = [e for e in run_trainer.run(tmp_path, **given).state.log_history if "ce" in e]
    first, last = log[0], log[-1]
    assert last["ce"] < 0.7 * first["ce"]
    assert last["entropy"] < 0.7 * first["entropy"]
    assert last["certainty"] > first["certainty"] + 0.1


def test_views_depend_on_seed_step_and_row_alone(tmp_path: Path):
    trainer = trainer_of(run_trainer.model(), tmp_path, mask_ratio=[0, 1.2], block_length=4)
    rows = run_trainer.rows(6)
    batch = trainer.views(Collator(1)(rows), 5)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        alone = trainer.views(Collator(1)([row]), 5)
        for key in ("input_ids", "labels", "active"):
            assert torch.equal(alone[key][0], batch[key][i, :length])
            assert torch.equal(alone[key][1], batch[key][6 + i, :length])
        assert batch["attention_mask"][i].tolist() == [j < length for j in range(batch["labels"].shape[1])]
    assert not torch.equal(trainer.views(Collator(1)(rows), 6)["active"], batch["active"])
    seed = trainer.args.seed
    trainer.args.seed += 1
    assert not torch.equal(trainer.views(Collator(1)(rows), 5)["active"], batch["active"])
    trainer.args.data_seed = seed  # which comes first
    assert torch.equal(trainer.views(Collator(1)(rows), 5)["active"], batch["active"])


def test_a_block_causal_model_trains_on_states_that_decoding_has(tmp_path: Path):
    """One of the model's own blocks, which count from position 0, has masks; all before it is known."""
    model = golden.model("sdar_tiny_a")
    size = model.block_length
    assert size is not None
    rows = [
        {"input_ids": list(range(5, 30)), "prompt_length": prompt, "index": index}
        for index, prompt in enumerate([*range(1, 10)] * 8)
    ]
    views = trainer_of(model, tmp_path, block_length=size).views(Collator(1)(rows), step=3)
    several = 0
    for ids, active, prompt in zip(views["input_ids"], views["active"], [*range(1, 10)] * 16, strict=True):
        columns = active.nonzero()[:, 0].tolist()
        if not columns:
            continue
        (block,) = {column // size for column in columns}
        masked = (ids == model.mask_id).nonzero()[:, 0].tolist()
        assert masked[0] >= max(prompt, block * size)
        later = max(prompt, (block + 1) * size)
        assert masked == [*columns, *range(later, 25)]
        several += prompt // size < block
    assert several > 20
    with pytest.warns(UserWarning, match=rf"block_length: {size + 1} tokens .* give block_length={size}"):
        trainer_of(model, tmp_path, block_length=size + 1)


def test_every_pass_over_a_micro_batch_has_the_same_dropout(tmp_path: Path):
    """The tokens that are counted before the first gradient are those whose entropies are summed then."""
    model = run_trainer.model(dropout=0.5).train()
    trainer = trainer_of(model, tmp_path, block_length=4)
    views = [trainer.views(Collator(1)(run_trainer.rows(6)), step) for step in (0, 1)]
    before = torch.get_rng_state()
    with torch.no_grad():
        counted = trainer.rows(model, views[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    summed = trainer.rows(model, views[0])
    torch.testing.assert_close(counted, summed)  # without a gradient the matrix library may round otherwise
    other = trainer.rows(model, {**views[0], "seed": views[1]["seed"]})
    assert not torch.equal(other[0], summed[0])
    assert not torch.equal(summed[0], trainer.rows(model.eval(), views[0])[0])


def test_evaluation_uses_the_same_masks_every_time(tmp_path: Path):
    trainer = trainer_of(run_trainer.model(), tmp_path, block_length=4)
    losses = [trainer.evaluate(run_trainer.rows(count))["eval_loss"] for count in (6, 3, 6)]
    assert losses[0] == losses[2] > 0
    assert losses[0] != losses[1]


@pytest.mark.parametrize("settings", [{}, {"ce_weight": 0.0}, {"gate": "all"}], ids=str)
def test_the_evaluation_s_loss_is_that_of_one_batch(settings: dict[str, Any], tmp_path: Path):
    """Means of batches' means would depend on the batch size, most where few tokens are gated."""
    rows, model = run_trainer.rows(9), run_trainer.run(tmp_path).model
    trainer = trainer_of(model, tmp_path, block_length=4, **settings)
    with torch.no_grad():
        expected = float(trainer.compute_loss(model.eval(), trainer.views(Collator(1)(rows), -1)))
    for size in (1, 2, 4, 9):
        trainer.args.per_device_eval_batch_size = size
        found = trainer.evaluate(rows, metric_key_prefix="test")["test_loss"]
        assert found == pytest.approx(expected, rel=1e-5), size


def test_a_hugging_face_model_is_saved_by_its_own_code_and_resumes(tmp_path: Path):
    torch.manual_seed(0)
    trainer = trainer_of(
        Remote(RemoteConfig()), tmp_path, max_steps=2, save_steps=1, per_device_train_batch_size=2
    )
    trainer.data_collator = Collator(1, total_length=16)
    trainer.train()
    again = Remote.from_pretrained(tmp_path / "checkpoint-2")
    for ours, theirs in zip(trainer.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.parameters(), strict=True))


def test_a_collator_comes_with_the_trainer(tmp_path: Path):
    """That of the model's EOS; a model whose config names none is told so."""
    args = CertaintyForcingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    rows = run_trainer.rows(2)
    for eos, found in ((5, 5), ([7, 9], 7)):
        model = run_trainer.model()
        model.config["eos_token_id"] = eos
        trainer = CertaintyForcingTrainer(model=model, args=args, train_dataset=rows)
        assert trainer.data_collator == Collator(found)
    model.config["eos_token_id"] = None
    with pytest.raises(ValueError, match=r"data_collator: .* no eos_token_id .* got None"):
        CertaintyForcingTrainer(model=model, args=args, train_dataset=rows)


def test_rows_of_other_datasets(tmp_path: Path):
    """Lists of ids, as `datasets` gives them, are tensors' equal; bad rows are named, idle ones warned of."""
    trainer = trainer_of(run_trainer.model(), tmp_path, max_steps=1, logging_steps=1)
    rows = run_trainer.rows(4)
    lists = [{**row, "input_ids": row["input_ids"].tolist(), "text": "more"} for row in rows]
    narrow = [{**row, "input_ids": row["input_ids"].int()} for row in rows]
    for others in (lists, narrow):
        for name, found in Collator(1)(others).items():
            assert torch.equal(found, Collator(1)(rows)[name]), name
            assert found.dtype == torch.int64
    for changed, said in (
        ({"input_ids": [3.5, 4]}, r"input_ids: expected int64 \(P,\), got torch.float32"),
        ({"input_ids": "three"}, r"input_ids: expected int64 \(P,\) or a list of ids, got str"),
        ({"prompt_length": 99}, "prompt_length: expected a whole number <= "),
        ({"prompt_length": -1}, "prompt_length: expected a whole number >= 0"),
        ({"index": None}, r"rows: expected the field 'index' in each, got \['input_ids', 'prompt_length'\]"),
    ):
        row = {key: value for key, value in {**rows[0], **changed}.items() if value is not None}
        with pytest.raises(ValueError, match=said):
            Collator(1)([row])
    trainer.data_collator = Collator(1, total_length=3)  # the prompts' length
    with pytest.warns(UserWarning, match="train_dataset: no row of the last steps has a response token"):
        trainer.train()


def test_which_heads_are_plain():
    found = models()
    assert plain_head(found["llada"]) is found["llada"].lm_head
    assert plain_head(found["remote"]) is found["remote"].lm_head
    assert plain_head(found["remote, scaled"]) is None
    assert plain_head(nn.Linear(2, 2)) is None
    head = found["llada"].lm_head
    head.forward = lambda x: 2 * type(head).forward(head, x)  # which the loss in its place would leave out
    assert plain_head(found["llada"]) is None
