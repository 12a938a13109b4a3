"""For tests of speculation: small models; drafters with random weights, and those that know the text, or half
of it, and guess in every shape."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dparallel_ext import models
from dparallel_ext.models import Model
from dparallel_ext.speculation import (
    DFlashDrafter,
    DFlashModel,
    Draft,
    DraftSession,
    EagleDrafter,
    HiddenTransfer,
    Lane,
    PromptTokens,
    RiderDrafter,
    StridedDrafter,
)
from dparallel_ext.speculation.adadecode import AdaDecode, AdaDecodeOptions, ExitHeads
from dparallel_ext.speculation.adapter import Adapter
from dparallel_ext.speculation.checkpoint import DraftCheckpoint, Origin
from dparallel_ext.speculation.eagle import drafter_of_eagle
from dparallel_ext.speculation.riders import rider_config

SIZES = {
    **{"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8},
}


_EXPERTS = {
    **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    **{"mask_token_id": 60, "mlp_only_layers": [1], "num_hidden_layers": 3},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": _EXPERTS,
    "sdar_moe": {**_EXPERTS, "block_size": 8},
    "rnd1": _EXPERTS,
    "lladamoe": {
        **{"num_experts": 8, "num_experts_per_tok": 3, "expert_intermediate_size": 24, "mask_token_id": 60},
        **{"num_hidden_layers": 3, "moe_layer_freq": [1, 0, 1], "qk_layernorm": True},
    },
    "llada2_moe": {
        **_EXPERTS,
        **{"num_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
        **{"partial_rotary_factor": 0.5, "use_bias": False, "block_length": 8},
    },
}
MIXTURES["llada2.2"] = MIXTURES["llada2_moe"] | {
    **{"model_type": "llada2_moe", "expert_capacity": 4, "block_size": 8},
}
"""What `model_of` takes for the families with mixtures of experts: layers of both kinds, widths that one
product for all experts takes."""


def model_of(family: str = "qwen3", dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    """Random weights, large enough that every token tells."""
    torch.manual_seed(3)
    config: dict[str, Any] = {"model_type": family, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, **SIZES}
    config |= MIXTURES.get(family, {})
    model = models.FAMILIES[config["model_type"]]({**config, **changes})
    for p in (*model.parameters(), *model.buffers()):
        if p.ndim >= 2 or not p.requires_grad:
            torch.nn.init.normal_(p, std=0.4)
    return model.to(dtype).eval()


def fast_dllm() -> Model:
    """Random weights; block-causal, in sub-blocks, the block before giving a block its first token."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bd_size": 16, "mask_token_id": 511}
    model = models.FastDLLM({"model_type": "Fast_dLLM_Qwen", "rms_norm_eps": 1e-6, **sizes, **heads}).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=1.0 if len(p) == 512 else p.shape[1] ** -0.5)
    return model.requires_grad_(False)


MODEL = model_of(eos_token_id=[5, 9])

KINDS = {
    "dflash": {"block": 9, "taps": [0, 1], "layers": 2},
    "parallelspec": {"block": 5, "taps": [-1, 1], "layers": 1},
}


def config_of(kind: str, target: Model = MODEL, **changes: Any) -> dict[str, Any]:
    said = KINDS[kind]
    return {
        **{key: target.config[key] for key in ("vocab_size", "hidden_size", "head_dim")},
        **{"num_hidden_layers": said["layers"], "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 40, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "model_type": "qwen3"},
        **{"num_target_layers": target.shape.layers, "block_size": said["block"]},
        "dflash_config": {"mask_token_id": 60, "target_layer_ids": said["taps"]},
        "dparallel": {"kind": kind, "target": models.fingerprint(target), "template": None},
        **changes,
    }


def drafter_with(kind: str, target: Model = MODEL, **changes: Any) -> DFlashDrafter:
    """Random weights, large enough that every token of the context tells."""
    torch.manual_seed(11)
    model = DFlashModel(config_of(kind, target, **changes))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)
        elif "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return DFlashDrafter(model)


def deep_model(family: str = "qwen3", **changes: Any) -> Model:
    """Five layers, of which the last say little: what the first ones guess is often right."""
    model = model_of(family, **{"num_hidden_layers": 5, "eos_token_id": [5, 9], **changes})
    with torch.no_grad():
        for block in model.blocks[1:]:
            for part in (block.o, block.down):
                part.weight.mul_(0.2)
    return model


DEEP = deep_model()


def exits(layers: Sequence[int] = (2,), gamma: float = 0.5, most: int = 6, target: Model = DEEP) -> AdaDecode:
    """Heads of a model's first layers whose matrices are near the identity."""
    torch.manual_seed(5)
    s = target.shape
    origin = Origin("adadecode", models.fingerprint(target), None)
    options = AdaDecodeOptions(s.width, s.embedding_size, s.layers, tuple(layers), gamma, most, origin)
    heads = ExitHeads(options)
    for p in heads.parameters():
        p.data.add_(torch.randn(p.shape, device="cpu"), alpha=0.02)
    return AdaDecode(heads)


def riding(kind: str, target: Model = MODEL) -> RiderDrafter:
    """Random weights, and ranks by which its trees have several depths."""
    torch.manual_seed(4)
    origin = Origin(kind, models.fingerprint(target), None)
    of, more = {"ppd": (PromptTokens, {}), "hidden_transfer": (HiddenTransfer, {"layer": 1})}[kind]
    riders = of(rider_config(target, 3, origin, **more))
    for p in riders.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return RiderDrafter(riders, ((0.6, 0.2, 0.1), (0.5, 0.2, 0.1, 0.05), (0.4, 0.2)))


def strided(target: Model = MODEL) -> StridedDrafter:
    """With an adapter of random weights, in models without a mask."""
    generator = torch.Generator().manual_seed(6)
    tensors, last = {}, f"model.layers.{target.shape.layers - 1}."
    for name, rows in (("self_attn.q_proj", 32), ("self_attn.o_proj", 32), ("mlp.up_proj", 48)):
        for leaf, shape in (("lora_A", (4, 32)), ("lora_B", (rows, 4))):
            tensors[f"{last}{name}.{leaf}.weight"] = (
                torch.randn(shape, generator=generator, device="cpu") * 0.4
            )
    adapter = Adapter(DraftCheckpoint("adapter", {"r": 4, "lora_alpha": 4}, tensors))
    return StridedDrafter(adapter=adapter, mask_id=60)


def eagle_tensors(
    target: Model = MODEL,
    *,
    width: int = 32,
    layers: int = 1,
    taps: int = 3,
    vocabulary: int = 40,
    qk_norm: bool = False,
) -> dict[str, Tensor]:
    """The tensors of P-EAGLE with the names of speculators: random weights, large enough that every pair
    tells."""
    every = target.shape.embedding_size
    g = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int, std: float = 0.4) -> Tensor:
        return torch.randn(rows, columns, generator=g, device="cpu") * std

    def scale(size: int) -> Tensor:
        return torch.rand(size, generator=g, device="cpu") + 0.5

    t = {"fc.weight": matrix(width, taps * target.shape.width, 0.2), "norm.weight": scale(width)}
    for i in range(layers):
        at, inputs = f"layers.{i}.", width if i else 2 * width
        for name, rows in (("q", 32), ("k", 16), ("v", 16)):
            t[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, inputs)
        t[f"{at}self_attn.o_proj.weight"] = matrix(width, 32)
        for name, rows, columns in (("gate", 40, width), ("up", 40, width), ("down", width, 40)):
            t[f"{at}mlp.{name}_proj.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm", *(() if i else ("hidden_norm",))):
            t[f"{at}{name}.weight"] = scale(width)
        for name in "qk" if qk_norm else "":
            t[f"{at}self_attn.{name}_norm.weight"] = scale(8)
    t["lm_head.weight"] = matrix(vocabulary, width)
    if vocabulary < every:
        ids = torch.randperm(every, generator=g, device="cpu")[:vocabulary].sort().values
        t["d2t"] = ids - torch.arange(vocabulary, device="cpu")
        t["t2d"] = torch.zeros(every, dtype=torch.bool, device="cpu").index_fill_(0, ids, True)
    t["embed_tokens.weight"] = matrix(every, width, 1.0)
    t["mask_hidden"] = matrix(1, taps * target.shape.width, 1.0)
    return t


def eagle(kind: str, target: Model = MODEL) -> EagleDrafter:
    """EAGLE-3, or P-EAGLE."""
    parallel = {"eagle3": False, "p-eagle": True}[kind]
    layers, size = (2 if parallel else 1), target.shape.embedding_size
    tensors = eagle_tensors(target, layers=layers, vocabulary=size - 21)
    config = {
        **{"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "head_dim": 8},
        **{"num_key_value_heads": 2, "intermediate_size": 40, "vocab_size": size, "rope_theta": 5000.0},
        **{"draft_vocab_size": size - 21, "target_hidden_size": target.shape.width, "mask_token_id": 60},
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0, target.shape.layers - 1]},
    }
    if not parallel:
        del tensors["mask_hidden"]
    return drafter_of_eagle(DraftCheckpoint("drafter", config, tensors))


class Knowing(DraftSession):
    """Guesses how `texts` (prompt and all) go on, each token right with probability `right`, in chains or in
    random trees. Of a lane's text it knows nothing where none of `texts` begins so."""

    def __init__(
        self,
        texts: Sequence[Tensor],
        *,
        right: float = 0.8,
        tree: bool = False,
        most: int = 12,
        ragged: bool = True,
        seed: int = 0,
    ) -> None:
        self.texts, self.right, self.tree, self.most = [t.tolist() for t in texts], right, tree, most
        self.rng, self.ragged = random.Random(seed), ragged

    def check(self, model: Any) -> None:
        self.vocabulary = model.shape.embedding_size

    def session(self, model: Any, kv_cache: Any, lanes: int, *, graphs: bool = True) -> Knowing:
        return self

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        return [self._draft(lane, most) for lane, most in zip(lanes, sizes, strict=True)]

    def _draft(self, lane: Lane, most: int) -> Draft:
        ids, known = lane.tokens.tolist(), len(lane.tokens)
        text: list[int] = next((text for text in self.texts if text[:known] == ids), [])
        tokens: list[int] = []
        parents: list[int] = []
        depths = [0]
        for node in range(self.rng.randint(0, most) if self.ragged else most):
            parent = self.rng.randint(max(0, node - 3), node) if self.tree else node
            at = known + depths[parent]
            depths.append(depths[parent] + 1)
            knows = at < len(text) and self.rng.random() < self.right
            tokens.append(text[at] if knows else self.rng.randrange(self.vocabulary))
            parents.append(parent)
        return Draft(tuple(tokens), tuple(parents) if self.tree else None)


class Noted:
    """Before a drafter in a class's bases: notes the sessions that it makes, and the drafts of each step."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sessions: list[Any] = []
        self.drafts: list[list[Draft]] = []

    def session(self, *args: Any, **settings: Any) -> Any:
        of: Any = super()
        made = of.session(*args, **settings)
        propose = made.propose

        def noted(lanes: Any, sizes: Sequence[int]) -> list[Draft]:
            self.drafts.append(propose(lanes, sizes))
            return self.drafts[-1]

        made.propose = noted
        self.sessions.append(made)
        return made
