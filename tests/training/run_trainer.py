"""Small training runs in two processes, for test_trainer: run_trainer.py "[[ENVIRONMENT, {OUT: RUN}], ...]".

What they import takes longer than they do, so one process imports it and forks. With ACCELERATE_USE_FSDP=true
each holds a shard of every parameter. The rows are of different lengths and the gate is open for some tokens
only, so that every way of normalising wrongly shows.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from dparallel.toy import train
from dparallel.training import distill
from dparallel.training.trainer import CertaintyForcingArguments, CertaintyForcingTrainer
from dparallel.training.trajectories import Collator
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import dparallel_ext as dx

SIZES = train.ToySettings(width=32, layers=1, heads=2, mlp_width=32)


def model(seed: int = 0, dropout: float = 0.0) -> dx.models.LLaDA:
    torch.manual_seed(seed)
    made = dx.models.LLaDA(train.model_config(SIZES))
    train.initialise(made)
    if dropout:
        made.blocks[0].register_forward_hook(
            lambda block, _, out: nn.functional.dropout(out, dropout, block.training)
        )
    return made


def rows(count: int) -> list[dict[str, Any]]:
    """Few words, so that an untrained model's argmax is right at times and the gate counts differ."""
    drawn = torch.Generator().manual_seed(3)
    made = []
    for index in range(count):
        length = int(torch.randint(6, 20, (), generator=drawn))
        ids = torch.randint(3, 6, (length,), generator=drawn)
        made.append({"input_ids": ids, "prompt_length": 3, "index": index})
    return made


def run(
    out: Path,
    count: int = 16,
    resume: str | None = None,
    judged: int = 0,
    dropout: float = 0.0,
    **settings: Any,
) -> CertaintyForcingTrainer:
    """`judged`: rows to evaluate on after the training."""
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "block_length": 4,
        "on_policy": 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = CertaintyForcingArguments(output_dir=str(out), **{**defaults, **settings})
    trainer = CertaintyForcingTrainer(
        model=model(dropout=dropout), args=args, train_dataset=rows(count), data_collator=Collator(1)
    )
    trainer.train(resume_from_checkpoint=resume)
    if judged:
        trainer.evaluate(rows(judged))
    return trainer


def shard_on_the_cpu() -> None:
    """accelerate shards over accelerators alone, torch over anything: here it takes processes for such."""
    found = PartialState.__init__

    def initialise(self: PartialState, *given: Any, **named: Any) -> None:
        found(self, *given, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialise


def run_all(runs: dict[str, dict[str, Any]]) -> None:
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        shard_on_the_cpu()
    for out, settings in runs.items():
        directory = Path(out)
        trainer = run(directory, **settings)
        assert trainer.accelerator.num_processes == 2
        assert sharded == any(isinstance(p, DTensor) for p in trainer.model.parameters())
        trainer.save_model(str(directory))
        if trainer.is_world_process_zero():
            (directory / "log.json").write_text(json.dumps(trainer.state.log_history))
        trainer.accelerator.wait_for_everyone()
    distill.finish(trainer)
    if not sharded:
        end_often(directory)


def end_often(directory: Path) -> None:
    """End 16 groups of two processes; the first writes how many ended.

    With DistributedDataParallel as the group's last owner one end in five hangs.
    """
    gc.freeze()  # collecting what was imported would take a second each
    rank, store = int(os.environ["RANK"]), dist.FileStore(str(directory / "store"), 2)
    for number in range(1, 17):
        own = dist.PrefixStore(str(number), store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=2)
        trainer: Any = SimpleNamespace(args=SimpleNamespace(world_size=2), model=nn.Linear(2, 2))
        trainer.model_wrapped = nn.parallel.DistributedDataParallel(trainer.model)
        dist.all_reduce(torch.zeros(6))
        trainer.accelerator = SimpleNamespace(
            end_training=dist.destroy_process_group, free_memory=lambda: None
        )
        distill.finish(trainer)
        if rank == 0:
            (directory / "ends").write_text(str(number))


def fork(rank: int, port: int, environment: dict[str, str], runs: dict[str, dict[str, Any]]) -> int:
    """The process that makes these runs as one of two, told so as torchrun does."""
    if process := os.fork():
        return process
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {**environment, **{k: str(v) for k, v in own.items()}, "MASTER_ADDR": "127.0.0.1"}
    try:
        run_all(runs)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for environment, runs in json.loads(sys.argv[1]):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = [fork(rank, port, environment, runs) for rank in range(2)]
        if any(os.waitpid(process, 0)[1] for process in processes):
            sys.exit(1)
