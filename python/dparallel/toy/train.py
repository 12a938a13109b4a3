"""Trains the built-in models from scratch on `tasks`: a masked diffusion model, or an autoregressive one.

Masked diffusion is LLaDA's: each response token is masked with probability t ~ U(0, 1); the loss is the cross
entropy of the masked tokens, weighted by 1/t, over the response's length (arXiv 2502.09992, eq. 3). The
autoregressive model, in Qwen3's layout, learns each response token from those before it. Muon trains the
matrices of the blocks, AdamW the rest; an exponential average of the weights is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dparallel_ext import backends, models
from dparallel_ext.arguments import check_fields, whole
from dparallel_ext.models import LLaDA, Qwen3
from dparallel_ext.rules import ONE

from .. import evaluate as evaluation
from .. import files
from ..training import loop
from . import tasks


@dataclass(frozen=True)
class ToySettings(loop.TrainingSchedule):
    """The settings of a training run; the same settings give the same model."""

    steps: int = 7000
    batch: int = 64
    width: int = 192
    layers: int = 4
    heads: int = 6
    mlp_width: int = 512
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 200
    decay: float = 0.25
    ema: float = 0.998
    seed: int = 0
    causal: bool = False
    """Whether to train the autoregressive model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("batch", "width", "layers", "heads", "mlp_width"), whole, 1)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"heads: expected a divisor of width {self.width} that leaves heads of an even size, got "
                f"{self.heads}"
            )


def tokenizer() -> Any:
    """The task's word-level tokenizer (a `tokenizers.Tokenizer`)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(tasks.vocabulary())}
    words_tokenizer = Tokenizer(models.WordLevel(words, unk_token=tasks.UNKNOWN))
    words_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_tokenizer.add_special_tokens([tasks.PAD, tasks.EOS, tasks.UNKNOWN, tasks.MASK])
    return words_tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json for `transformers.AutoTokenizer`."""
    with files.replacing(directory / "tokenizer.json") as partial:
        tokenizer().save(str(partial))
    special = {"pad": tasks.PAD, "eos": tasks.EOS, "unk": tasks.UNKNOWN, "mask": tasks.MASK}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": token for name, token in special.items()}
    files.write_json(directory / "tokenizer_config.json", config)


def model_config(settings: ToySettings) -> dict[str, Any]:
    """config.json in the layout of LLaDA's checkpoints."""
    vocabulary = tasks.vocabulary()
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": settings.width,
        "embedding_size": len(vocabulary),
        "eos_token_id": vocabulary.index(tasks.EOS),
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": vocabulary.index(tasks.MASK),
        "max_sequence_length": 256,
        "mlp_hidden_size": settings.mlp_width,
        "mlp_ratio": 4,
        "n_heads": settings.heads,
        "n_kv_heads": settings.heads,
        "n_layers": settings.layers,
        "pad_token_id": vocabulary.index(tasks.PAD),
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "vocab_size": len(vocabulary),
        "weight_tying": False,
    }


def causal_config(settings: ToySettings) -> dict[str, Any]:
    """config.json in the layout of Qwen3's checkpoints."""
    vocabulary = tasks.vocabulary()
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": vocabulary.index(tasks.EOS),
        "head_dim": settings.width // settings.heads,
        "hidden_act": "silu",
        "hidden_size": settings.width,
        "intermediate_size": settings.mlp_width,
        "max_position_embeddings": 256,
        "num_attention_heads": settings.heads,
        "num_hidden_layers": settings.layers,
        "num_key_value_heads": settings.heads,
        "pad_token_id": vocabulary.index(tasks.PAD),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": len(vocabulary),
    }


def batch_of(settings: ToySettings, step: int) -> tuple[Tensor, int]:
    """Token ids (batch, prompt + GEN_LENGTH) of training problems of one length, and the prompt's length.

    They depend only on the seed and the step, so that a resumed run gets the same batches.
    """
    ids = {word: i for i, word in enumerate(tasks.vocabulary())}
    stream = tasks.problems("train", seed=settings.seed * 1_000_003 + step)
    length = len(next(stream).prompt.split())
    rows = []
    for problem in itertools.islice((p for p in stream if len(p.prompt.split()) == length), settings.batch):
        words = problem.prompt.split() + problem.response.split()
        words += [tasks.EOS] * (length + tasks.GEN_LENGTH - len(words))
        rows.append([ids[word] for word in words])
    return torch.tensor(rows), length


def masked_diffusion_loss(model: models.Model, ids: Tensor, prompts: Sequence[int], seed: int) -> Tensor:
    """Cross entropy of the masked response tokens of ids (B, L), weighted 1/t.

    prompts: the lengths of a row's prompts, each of which a response of GEN_LENGTH tokens follows; each
    response has a t of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    answered = [[False] * length + [True] * tasks.GEN_LENGTH for length in prompts]
    asked = torch.tensor([*itertools.chain(*answered)])  # (L,)
    count = len(ids) * len(prompts)
    # Stratified: one t in each of `count` equal slices of (0, 1); each response's t is uniform, with less
    # noise in the sum.
    t = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    t = t.clamp(min=1e-2).view(len(ids), -1).repeat_interleave(tasks.GEN_LENGTH, 1)  # (B, asked)
    masked = torch.rand(t.shape, generator=generator) < t
    assert model.mask_id is not None
    noisy = ids.clone()
    noisy[:, asked] = ids[:, asked].masked_fill(masked, model.mask_id)
    labels, weight = ids[:, asked][masked], (1 / t)[masked]
    with torch.autocast("cpu", torch.bfloat16, enabled=backends.fast_bfloat16()):
        logits = model.head(model.hidden(noisy)[:, asked][masked])  # (masked, V)
    nll = F.cross_entropy(logits.float(), labels, reduction="none")
    return (nll * weight).sum() / masked.numel()


def next_token_loss(model: models.Model, ids: Tensor, prompt: int, eos_id: int) -> Tensor:
    """Cross entropy of the response tokens of ids (B, L), up to and with the first EOS."""
    labels = ids[:, prompt:]
    asked = (labels == eos_id).cumsum(1) - (labels == eos_id).long() == 0  # (B, R): no EOS in front
    ids = ids[:, : prompt + int(asked.any(0).sum())]  # no longer than the longest response
    labels, asked = (t[:, : ids.shape[1] - prompt] for t in (labels, asked))
    with torch.autocast("cpu", torch.bfloat16, enabled=backends.fast_bfloat16()):
        logits = model.head(model.hidden(ids[:, :-1])[:, prompt - 1 :][asked])  # (asked, V)
    return F.cross_entropy(logits.float(), labels[asked])


def train(
    out: str | Path,
    settings: ToySettings | None = None,
    *,
    save_every: int = 500,
    evaluate: int = 2000,
    progress: bool = True,
) -> Path:
    """Train, or resume an interrupted run in `out`, and write the checkpoint there.

    `out` receives config.json, model.safetensors (bfloat16, the averaged weights), the tokenizer's files and
    training.json: the settings, the loss, and the share of `evaluate` held-out problems that the checkpoint
    gets right at one token a pass. Every `save_every` steps the run's state goes to state.pt; a resumed run
    continues exactly as if it had not been stopped; only `steps` may change.

    Raises ValueError naming the argument that does not fit, also if `out` holds a run with other settings or
    another run is writing there; OSError if the disk is full.
    """
    settings = settings or ToySettings()
    for name, value, least in (("save_every", save_every, 1), ("evaluate", evaluate, 0)):
        whole(name, value, least)
    with files.run_directory(out) as directory:
        torch.manual_seed(settings.seed)
        model = Qwen3(causal_config(settings)) if settings.causal else LLaDA(model_config(settings))
        initialise(model)

        def loss_of(step: int) -> Tensor:
            ids, prompt = batch_of(settings, step)
            if settings.causal:
                assert model.eos_id is not None
                return next_token_loss(model, ids, prompt, model.eos_id)
            return masked_diffusion_loss(model, ids, [prompt], settings.seed * 1_000_003 + step)

        seconds, curve = loop.run(
            directory,
            model,
            [p for p in model.blocks.parameters() if p.ndim == 2],
            loss_of,
            settings,
            asdict(settings),
            defaults=asdict(ToySettings()),
            save_every=save_every,
            report_every=100,
            described="train",
            progress=progress,
        )
        save_tokenizer(directory)  # before config.json, which makes it a checkpoint
        models.save(model, directory, dtype=torch.bfloat16)
        report: dict[str, Any] = {"settings": asdict(settings), "seconds": round(seconds), "loss": curve}
        if evaluate:
            if settings.causal:
                report["held_out"] = evaluation.evaluate_drafter(str(directory), None, problems=evaluate)
            else:
                report["held_out"] = evaluation.evaluate(str(directory), ONE, problems=evaluate)
            report["held_out"]["model"] = directory.name
        files.write_json(directory / "training.json", report)
    return directory


def initialise(model: models.Model) -> None:
    """Initialise by normal weights of variance 1 / width of a row, smaller for the head."""
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)
