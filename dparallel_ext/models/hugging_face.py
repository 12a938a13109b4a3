"""The methods of a language model that transformers, PEFT and trainers call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .modules import CheckpointNamed


class HuggingFaceInterface(CheckpointNamed):
    """The methods that transformers, PEFT and trainers look for. `Model` has the parts `embed` and `lm_head`,
    and computes by `checkpointing`."""

    embed: nn.Embedding
    lm_head: nn.Linear
    checkpointing: dict[str, Any] | None = None
    """Keywords of `torch.utils.checkpoint.checkpoint` for each layer in training; None: none."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, by the name that transformers and PEFT look for; `get_output_embeddings`: the
        head."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        """PEFT expects this method of models for causal language modelling; `decode` does not use it."""
        return {"input_ids": input_ids}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """In training, keep only each layer's input and compute the rest again, as transformers' models do.

        gradient_checkpointing_kwargs: keywords of `torch.utils.checkpoint.checkpoint`.
        """
        self.checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        self.checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.checkpointing is not None

    def enable_input_require_grads(self) -> None:
        """Do nothing: `hidden` makes the layers' input require a gradient if a checkpoint needs it."""

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by transformers 5's name. Raises ValueError for its other
        options."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                "activation_checkpointing: expected every_n_layers=1 and offload=False, "
                f"got {every_n_layers} and {offload}"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)
