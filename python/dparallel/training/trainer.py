"""Certainty forcing (dParallel, arXiv 2509.26488) as a `transformers.Trainer`.

A step's loss, over all micro-batches of all processes:

    sum over the two complementary views of the active blocks:
        ce_weight * mean of -log p(label) over the active tokens
        + entropy_weight * mean entropy at `temperature` over those active tokens whose argmax is the label

The objectives of the paper's ablation are special cases:

    certainty forcing        the defaults (entropy_weight 2 for LLaDA, 1 for Dream)
    cross entropy alone      entropy_weight=0
    entropy alone            ce_weight=0
    confidence-aware (CAP)   temperature=1, as LLaDA2.0 (arXiv 2512.15745)
    no semi-autoregression   block_length=None: the whole response is one block (Dream as published)
    mask ratios              mask_ratio=0.25, 0.75, 1; (0, 1) is random

With `on_policy` some states hold the model's own predictions in place of masks, so that it learns to correct
itself: On-Policy Uniform Training of DMax (arXiv 2604.08302), whose decoding is the rule "soft".
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import dparallel_ext as dx
from dparallel_ext.arguments import check_fields, is_number, number, one_of, warn, whole
from dparallel_ext.models import Model
from dparallel_ext.ops.certainty_forcing_loss import check_temperature
from dparallel_ext.ops.head import chunks, rows_of_chunk

from .heads import forward_of, plain_head
from .trajectories import Collator


@dataclass
class CertaintyForcingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and the arguments of certainty forcing."""

    temperature: float = 0.5
    """The temperature of the entropy term, from 1e-5 to 1e5."""
    entropy_weight: float = 2.0
    """Beta, the weight of the entropy term; 0: cross entropy alone."""
    ce_weight: float = 1.0
    """The weight of the cross entropy; 0: entropy alone."""
    gate: str = "correct"
    """The active tokens whose entropy counts: "correct", those whose argmax is the label, or "all"."""
    block_length: int | None = 32
    """Tokens of a block; None: the whole response is one block. For a block-causal model its own, which are
    the blocks that decoding fills one by one: they count from position 0 where the model's do."""
    mask_ratio: Any = 0.5
    """The probability that a token of the active block is masked; or [low, high]: drawn uniformly for each
    row, then cut to 1, so that a high above 1 gives a share of fully masked blocks."""
    on_policy: float = 0.0
    """The probability that in a row's states the masks of the active block hold what the model predicts there
    by the weights of the step. Of such a state the whole block is active, since any token may be wrong."""
    remove_unused_columns: bool = False
    """It must stay False: the collator needs the columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = ratio_bounds(self.mask_ratio)
        if not 0 <= low <= high or low > 1:
            raise ValueError(f"mask_ratio: expected 0 <= low <= 1 and low <= high, got {self.mask_ratio!r}")
        check_fields(self, ("entropy_weight", "ce_weight", "temperature"), number)
        check_temperature("temperature", self.temperature)
        self.on_policy = number("on_policy", self.on_policy, 0, 1)
        check_fields(self, ("per_device_train_batch_size", "gradient_accumulation_steps"), whole, 1)
        if self.block_length is not None:
            check_fields(self, ("block_length",), whole, 1)
        if self.max_steps != -1:  # of 0, Trainer makes one step or all epochs
            whole("max_steps", self.max_steps, 1)
        if not number("num_train_epochs", self.num_train_epochs):
            raise ValueError(f"num_train_epochs: expected a number above 0, got {self.num_train_epochs!r}")
        one_of("gate", self.gate, ("correct", "all"))
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, since the collator needs the columns")
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor: expected 0, which the certainty-forcing loss has, got "
                f"{self.label_smoothing_factor!r}"
            )


def ratio_bounds(ratio: Any) -> tuple[float, float]:
    """(low, high) of a mask_ratio. Raises ValueError for anything but one or two numbers."""
    try:
        low, high = (ratio, ratio) if is_number(ratio) else ratio
        return number("low", low, float("-inf")), number("high", high, float("-inf"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"mask_ratio: expected a number or two of them, got {ratio!r}") from error


class CertaintyForcingTrainer(Trainer):
    """A Trainer on rows of `trajectories.Trajectories`, collated by `trajectories.Collator`.

    The default `data_collator` has the EOS of the model's config, and lengthens and cuts nothing; the
    published one has `total_length` or `response_length`.

    The model is a native one, a Hugging Face one (remote code included), or either with PEFT's adapters or
    compiled. The two views are one batch of twice the rows. If the model's output embedding is a plain linear
    layer that it calls, the loss is taken on the hidden states by `linear_certainty_forcing_loss`, and the
    logits never exist; otherwise on the active rows of the logits.

    A row's blocks and masks depend only on the seed, the optimizer step and the row's index, so batch size,
    accumulation, the number of processes and resuming do not change an update. With gradient accumulation the
    number of gated tokens of the whole step must be known before the first micro-batch's gradient, which
    costs one more forward pass without gradient. A micro-batch's dropout depends only on the seed, the step
    and the index of its first row, so both passes and a resumed run drop the same. With several dataloader
    workers an iterable dataset has to divide its rows among them (`torch.utils.data.get_worker_info`), else
    each row comes once from every worker.

    Logged with the loss: ce (mean -log p of the label, nats), entropy (mean over the gated tokens, at
    `temperature`, nats), correct (share of active tokens whose argmax is right) and certainty (their mean
    probability).
    """

    args: CertaintyForcingArguments

    def __init__(self, model: nn.Module, args: CertaintyForcingArguments, **keywords: Any) -> None:
        if not isinstance(args, CertaintyForcingArguments):
            raise ValueError(f"args: expected CertaintyForcingArguments, got {type(args).__name__}")
        if model is None or keywords.get("model_init") is not None:
            raise ValueError("model: expected a module, and no model_init, which is not supported")
        dx.models.check_diffusion(model)
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if keywords.get(name) is not None:
                raise ValueError(f"{name}: expected None: the loss is certainty forcing's, on no logits")
        if keywords.get("data_collator") is None:
            keywords["data_collator"] = default_collator(model)
        super().__init__(model=model, args=args, **keywords)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"model: {self.args.n_gpu} GPUs in one process are not supported: start one process for each "
                "with `torchrun` or `accelerate launch`"
            )
        self.add_callback(FiniteGradients(self))
        # The loss is normalised over the whole step here.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.traits = dx.models.traits(model)
        if self.traits.mask_id is None:
            raise ValueError("model: its config has no mask_token_id; models.load(mask_id=) sets one")
        if self.traits.block_length not in (None, self.args.block_length):
            warn(
                f"block_length: {self.args.block_length} tokens are masked at once, and the model is "
                f"block-causal with blocks of {self.traits.block_length}, which it decodes one by one; give "
                f"block_length={self.traits.block_length}, unless several blocks are to be active"
            )
        base = dx.models.unwrap(model)
        self.takes_attention_mask = "attention_mask" in inspect.signature(base.forward).parameters
        self.lm_head = plain_head(base)
        self.sums = torch.zeros(6, dtype=torch.float64, device=self.args.device)
        self.evaluated = torch.zeros(8, dtype=torch.float64, device=self.args.device)

    # --- a step's batches and counts ------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, *arguments: Any
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step as views, and the step's counts over all processes.

        The counts are the active tokens of each view (2,), and, with several micro-batches, also the gated
        tokens of each (4,).
        """
        if self.state.global_step >= self.state.max_steps:
            # A finished run is resumed: Trainer asks whether it has ended behind each step, not in front.
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, *arguments)
        views = [self.views(batch, self.state.global_step) for batch in batches]
        if views:
            self.leave_out_repeated(views[-1])
        for view in views:
            self.fill(self.model_wrapped, view)
        counts = torch.zeros(2, dtype=torch.float64)
        for view in views:
            counts += by_view(view["active"])
        counts = counts.to(self.args.device)
        if len(views) > 1:
            gated = torch.zeros_like(counts)
            self.model_wrapped.train()
            with torch.no_grad(), self.compute_loss_context_manager():
                for view in views:
                    gated += by_view(self.rows(self.model_wrapped, self._prepare_inputs(view))[2])
            counts = torch.cat((counts, gated))
        return views, self.accelerator.reduce(counts, "sum")

    def leave_out_repeated(self, view: dict[str, Any]) -> None:
        """Make no token active of the rows (of 2B) that a process got again to fill an epoch's last batch.

        Over all processes, in their order, the last batch starts with the epoch's last `remainder` rows.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return
        active = view["active"]
        count = len(active) // 2
        unpadded = state.remainder - self.accelerator.process_index * count
        active.view(2, count, -1)[:, max(0, unpadded) :] = False

    def views(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        """The masked states of a collated batch (B, T) and their complements, as one batch (2B, T); and the
        seed of its dropout."""
        ids, lengths = batch["input_ids"].cpu(), batch["lengths"].cpu()
        low, high = ratio_bounds(self.args.mask_ratio)
        generators = [torch.Generator().manual_seed(self._key(step, int(i))) for i in batch["index"]]
        ratio = [low + (high - low) * float(torch.rand((), generator=g)) for g in generators]
        share = self.args.on_policy
        own = [share > 0 and float(torch.rand((), generator=g)) < share for g in generators]
        assert self.traits.mask_id is not None
        pair = dx.semi_autoregressive_masks(
            ids,
            batch["prompt_lengths"].cpu(),
            mask_id=self.traits.mask_id,
            block_length=self.args.block_length,
            aligned=self.traits.block_length is not None and self.traits.aligned_blocks,
            mask_ratio=torch.tensor(ratio).clamp(max=1),
            lengths=lengths,
            generator=generators,
        )
        masked = torch.cat((pair.active, pair.reverse_active))
        filled = torch.tensor(own, dtype=torch.bool).repeat(2)[:, None]
        whole_block = torch.cat((pair.active | pair.reverse_active,) * 2)
        stacked: dict[str, Any] = {
            "input_ids": torch.cat((pair.input_ids, pair.reverse_input_ids)),
            "labels": torch.cat((ids, ids)),
            "active": torch.where(filled, whole_block, masked),
            "filled": masked & filled,
            "seed": self._key(step, -1 - int(batch["index"][0])),  # of no row's masks
        }
        if self.traits.shift:
            for name in ("active", "filled"):  # no row of logits comes before a sequence's first token
                stacked[name][:, :1] = False
        if len(lengths) and int(lengths.min()) < ids.shape[1]:
            if not self.takes_attention_mask:
                raise ValueError(
                    "data_collator: rows of different lengths, but the model takes no attention_mask: give "
                    "total_length"
                )
            seen = torch.arange(ids.shape[1]) < lengths[:, None]
            stacked["attention_mask"] = torch.cat((seen, seen))
        return stacked

    def fill(self, model: nn.Module, view: dict[str, Any]) -> None:
        """Put the model's predictions into the view's states, in place of the masks that are to be filled.

        Every process computes as many passes.
        """
        if not self.args.on_policy:
            return
        inputs = self._prepare_inputs(view)
        filled, training = inputs["filled"], model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens = self.predictions(model, inputs, filled)
        model.train(training)
        view["input_ids"] = torch.where(filled, tokens, inputs["input_ids"])

    def predictions(self, model: nn.Module, inputs: Mapping[str, Any], at: Tensor) -> Tensor:
        """(2B, T) int64: the most probable token but the mask token in each place of `at` (2B, T) bool."""
        shift, mask_id = self.traits.shift, self.traits.mask_id
        rows = torch.cat((at[:, 1:], at[:, :1]), 1) if shift else at  # where the logits for these places are

        def of_hidden(hidden: Tensor) -> Tensor:
            assert self.lm_head is not None
            weight, tokens = self.lm_head.weight, rows.long().flatten()
            states = hidden.to(weight.dtype).flatten(0, 1)
            for some, _, logits in chunks(states, weight, rows.flatten(), 0.0, rows_of_chunk(None, weight)):
                logits[:, mask_id] = -torch.inf
                tokens[some] = logits.argmax(-1)
            return tokens.view(rows.shape)

        with forward_of(self.lm_head, of_hidden):
            tokens = model(**self._arguments(inputs)).logits
        if tokens.ndim == 3:  # logits: the model has no plain head
            tokens[..., mask_id] = -torch.inf
            tokens = tokens.argmax(-1)
        return torch.cat((tokens[:, :1], tokens[:, :-1]), 1) if shift else tokens

    def _key(self, step: int, index: int) -> int:
        """A generator's seed, from the run's seed, the step and the row."""
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return ((seed * 1_000_003 + step) * 1_000_000_007 + index) % 2**63

    # --- the loss -------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The part of the step's loss that is from `inputs` (of `views`), times the number of processes."""
        nll, entropy, gated, correct = self.rows(model, inputs)
        counts = num_items_in_batch
        if counts is None:
            counts = self.accelerator.reduce(by_view(inputs["active"]), "sum")
        if len(counts) == 2:
            counts = torch.cat((counts, self.accelerator.reduce(by_view(gated), "sum")))
        # Gradients are averaged over the processes.
        share = (self.accelerator.num_processes / counts.clamp(min=1)).to(nll.dtype)
        ce, certainty = by_view(nll) * share[:2], by_view(entropy * gated) * share[2:]
        loss = (self.args.ce_weight * ce + self.args.entropy_weight * certainty).sum()
        if model.training:
            with torch.no_grad():
                sure = ((-nll).exp() * correct).sum()
                active = inputs["active"].sum()
                self.sums += torch.stack(
                    (nll.sum(), active, (entropy * gated).sum(), gated.sum(), correct.sum(), sure)
                )
        return (loss, {}) if return_outputs else loss

    def rows(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """nll and entropy (float, with gradient), gated and correct (bool) of each token (2B, T).

        The model's head is replaced by a function that returns these, so that they pass through all hooks of
        a distributed wrapper on the model's output.
        """
        labels, active, shift = inputs["labels"], inputs["active"], self.traits.shift
        settings: dict[str, Any] = {"temperature": self.args.temperature}
        replaced = False

        def of_hidden(hidden: Tensor) -> Tensor:
            nonlocal replaced
            replaced = True
            assert self.lm_head is not None
            weight = self.lm_head.weight
            out = dx.linear_certainty_forcing_loss(
                hidden.to(weight.dtype), weight, labels, active, shift=shift, **settings
            )
            return torch.stack((out.nll, out.entropy, out.correct.to(out.nll.dtype)), -1)

        device = self.args.device
        forked = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
        with forward_of(self.lm_head, of_hidden), forked:
            torch.manual_seed(inputs["seed"])
            logits = model(**self._arguments(inputs)).logits
        if replaced:
            nll, entropy, right = logits.unbind(-1)
            correct = right.bool()
        else:
            if shift:
                logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
            _, nll, entropy, correct = dx.certainty_forcing_loss(logits, labels, active, **settings)
        return nll, entropy, correct if self.args.gate == "correct" else active, correct

    @staticmethod
    def _arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The model's arguments among a view's tensors."""
        return {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}

    # --- other methods of Trainer ---------------------------------------------------------------

    def create_optimizer(self, *arguments: Any, **named: Any) -> Any:
        """Trainer's. Raises ValueError for a model that cannot be trained."""
        model: Any = self.model
        if getattr(dx.models.unwrap(model), "quantized", False):
            raise ValueError("model: its weights are quantised, which is for inference alone")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: expected parameters to train, and none requires a gradient")
        return super().create_optimizer(*arguments, **named)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Trainer's; the loss is that of the whole dataset as one batch, with the same masks each time."""
        self.evaluated.zero_()
        result: Any = super().evaluation_loop(*arguments, **named)
        ce, certainty, active, gated = self.evaluated.view(4, 2)
        ce, certainty = ce / active.clamp(min=1), certainty / gated.clamp(min=1)
        loss = self.args.ce_weight * ce + self.args.entropy_weight * certainty
        metrics: dict[str, float] = result.metrics
        for name in metrics:
            if name.endswith("_loss"):
                metrics[name] = loss.sum().item()
        return result

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Adds the rows' sums to the evaluation's; the loss that it returns counts for nothing."""
        views = self.views(inputs, -1)
        self.fill(model, views)
        views = self._prepare_inputs(views)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll, entropy, gated, _correct = self.rows(model, views)
        of_row = torch.stack((nll, entropy * gated, views["active"], gated)).double().sum(-1)  # (4, 2B)
        by_row = of_row.view(8, -1).T.contiguous()  # (B, 8)
        # Without the rows that a process got again to fill its last batch.
        self.evaluated += self.accelerator.gather_for_metrics(by_row).sum(0)
        return nll.new_zeros(()), None, None

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """Log; raises ValueError for a label out of range since the last call, which losses on a GPU do not
        raise by themselves.
        """
        dx.check_errors(self.args.device)
        if "loss" in logs:
            nll, active, entropy, gated, correct, sure = self.accelerator.reduce(self.sums, "sum").tolist()
            self.sums.zero_()
            if not active:
                warn(
                    "train_dataset: no row of the last steps has a response token to learn, since the "
                    "prompts leave the collator's length none: the loss is 0"
                )
            logs["ce"] = nll / max(active, 1)
            logs["entropy"] = entropy / max(gated, 1)
            logs["correct"] = correct / max(active, 1)
            logs["certainty"] = sure / max(correct, 1)
        super().log(logs, *arguments, **named)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a native model in its checkpoint's own layout, which `models.load` reads; others as Trainer
        does."""
        directory = Path(output_dir or self.args.output_dir or ".")
        model = self.accelerator.unwrap_model(self.model)
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if not isinstance(model, Model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # called in every process, true in one
            if self.processing_class is not None:  # before config.json, which makes it a checkpoint
                directory.mkdir(parents=True, exist_ok=True)
                self.processing_class.save_pretrained(str(directory))
            dx.models.save(model, directory, state_dict=state_dict)
            torch.save(self.args, directory / "training_args.bin")
        if self.args.should_save:
            # safetensors makes files that only their owner may read.
            for file in directory.glob("*.safetensors"):
                shutil.copymode(directory / "training_args.bin", file)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save every process's random state before the first process marks the checkpoint complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


class FiniteGradients(TrainerCallback):
    """Ends a run, in front of the optimizer, by a gradient that is not finite: its weights would be lost, and
    a checkpoint of them would be where the run goes on."""

    def __init__(self, trainer: CertaintyForcingTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **named: Any) -> None:
        """Raise ValueError for a gradient that is not finite."""
        if self.trainer.accelerator.scaler is not None:  # which leaves such a step out
            return
        gradients = [p.grad for p in named["model"].parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = getattr(norm, "full_tensor", lambda: norm)()  # of shards
        if not norm.isfinite():
            dx.check_errors(args.device)  # which names a row that is the cause
            raise ValueError(
                f"the gradient's norm at step {state.global_step + 1} is {norm.item():g}: training stops "
                "before a weight moves; a lower learning_rate may help"
            )


def default_collator(model: nn.Module) -> Collator:
    """A Collator that pads with the model's EOS. Raises ValueError if the config names none."""
    config: Any = getattr(dx.models.unwrap(model), "config", None)
    eos = config.get("eos_token_id") if isinstance(config, Mapping) else getattr(config, "eos_token_id", None)
    first = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
    if not isinstance(first, int):
        raise ValueError(
            "data_collator: the model's config has no eos_token_id to pad with, so give "
            f"trajectories.Collator(eos_id, ...), got {eos!r}"
        )
    return Collator(first)


def by_view(values: Tensor) -> Tensor:
    """The sums (2,) over the first and the second half of the rows (2B, T)."""
    return values.view(2, -1).sum(1, dtype=values.dtype if values.is_floating_point() else torch.float64)
