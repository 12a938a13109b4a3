"""Drafters of a block a pass: their pass in plain torch, the text with them, their files, their trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drafters import KINDS, MODEL, Knowing, drafter_with, model_of
from safetensors.torch import load_file, save_file
from test_speculate import PROMPTS, plain
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.config import DecodeConfig
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.models import Model
from dparallel_ext.speculation import CausalBatch, DFlashDrafter, Draft, DraftSession, drafter_of
from dparallel_ext.speculation.checkpoint import Origin
from dparallel_ext.speculation.dflash import default_taps
from dparallel_ext.speculation.sizing import Fixed

pytest_plugins = ["taping"]

# --- the whole computation in plain torch ---------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x (N, H, D) after RoPE at positions (N,)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() / theta ** (torch.arange(half).double() / half)
    cos, sin = (torch.cat((t, t), -1)[:, None] for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q (N, H, D), k and v (M, G, D), seen (N, M) -> (N, H D)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[2] ** -0.5
    share = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", share, v).flatten(1)


def layer(
    w: dict[str, Tensor],
    at: str,
    x: Tensor,
    positions: Tensor,
    seen: Tensor,
    theta: float,
    eps: float,
    known: Tensor | None = None,
) -> Tensor:
    """A layer of Qwen3 over rows x (N, d), which see keys and values `known` in front of their own."""

    def heads(name: str, y: Tensor) -> Tensor:
        return (y @ w[f"{at}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 8))

    def keys(y: Tensor, places: Tensor) -> Tensor:
        return turned(norm(heads("k", y), w[f"{at}self_attn.k_norm.weight"], eps), places, theta)

    y = norm(x, w[f"{at}input_layernorm.weight"], eps)
    q = turned(norm(heads("q", y), w[f"{at}self_attn.q_norm.weight"], eps), positions, theta)
    k, v = keys(y, positions), heads("v", y)
    if known is not None:
        k = torch.cat((keys(known, torch.arange(len(known))), k))
        v = torch.cat((heads("v", known), v))
    x = x + attended(q, k, v, seen) @ w[f"{at}self_attn.o_proj.weight"].T
    y = norm(x, w[f"{at}post_attention_layernorm.weight"], eps)
    gate, up = (y @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w[f"{at}mlp.down_proj.weight"].T


def guessed(drafter: DFlashDrafter, target: Model, tokens: Tensor, rows: int) -> Tensor:
    """Logits (rows - 1, V) of the block behind tokens (n,), whose last is the root, in float64; the mask's
    are among them."""
    w = {name: t.double() for name, t in drafter.model.state_dict().items()}
    t = {name: p.double() for name, p in target.state_dict().items()}
    said, length = drafter.options, len(tokens) - 1
    x = t["model.embed_tokens.weight"][tokens[:-1]]
    places = torch.arange(length)
    streams = {-1: x}
    for i in range(target.shape.layers):
        seen = places[:, None] >= places
        x = layer(t, f"model.layers.{i}.", x, places, seen, target.shape.rope_theta, 1e-5)
        streams[i] = x
    feature = norm(
        torch.cat([streams[tap] for tap in said.taps], -1) @ w["fc.weight"].T, w["hidden_norm.weight"]
    )
    ids = torch.tensor([int(tokens[-1]), *[said.mask_id] * (rows - 1)])
    x = t["model.embed_tokens.weight"][ids]
    row = torch.arange(rows)
    block = row[:, None] >= row if said.causal else torch.ones(rows, rows, dtype=torch.bool)
    seen = torch.cat((torch.ones(rows, length, dtype=torch.bool), block), 1)
    for i in range(said.shape.layers):
        x = layer(w, f"layers.{i}.", x, length + row, seen, 5000.0, 1e-6, feature)
    return norm(x, w["norm.weight"])[1:] @ t["lm_head.weight"].T


class Heard(DraftSession):
    """Notes what a drafter would draft, and drafts what `instead` does: some of it is accepted."""

    def __init__(self, drafter: DFlashDrafter, instead: Knowing | None = None) -> None:
        self.inner, self.instead, self.most = drafter, instead, drafter.most
        self.heard: list[tuple[Tensor, int, int, Draft]] = []

    def check(self, model: Any) -> None:
        self.inner.check(model)
        if self.instead is not None:
            self.instead.check(model)

    def session(self, model: Any, kv_cache: Any, lanes: int, *, graphs: bool = True) -> Heard:
        self.own = self.inner.session(model, kv_cache, lanes, graphs=graphs)
        self.taps, self.reset, self.observe, self.moved = (
            self.own.taps, self.own.reset, self.own.observe, self.own.moved
        )  # fmt: skip
        return self

    def propose(self, lanes: Any, sizes: Sequence[int]) -> list[Draft]:
        found = self.own.propose(lanes, sizes)
        for lane, size, draft in zip(lanes, sizes, found, strict=True):
            self.heard.append((lane.tokens.clone(), size, lane.length, draft))
        return found if self.instead is None else self.instead.propose(lanes, sizes)

    def compare(self, target: Model) -> int:
        """Tokens that are what the plain computation says."""
        count = 0
        for tokens, size, length, draft in self.heard:
            block = self.inner.options.block
            rows = min(block, length - len(tokens) + 1)
            logits = guessed(self.inner, target, tokens, rows)[: len(draft.tokens)]
            logits[:, self.inner.options.mask_id] = -math.inf
            assert len(draft.tokens) == min(size, rows - 1)
            chosen = logits.gather(1, torch.tensor(draft.tokens)[:, None])[:, 0]
            assert bool((chosen >= logits.max(1).values - 1e-3).all()), (tokens, draft)
            count += int((logits.argmax(1) == torch.tensor(draft.tokens)).sum())
        return count


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"), [*((kind, {}) for kind in KINDS), ("dflash", {"is_causal": True})]
)
def test_a_draft_is_its_computation_in_plain_torch(kind: str, changes: dict[str, Any], tree: bool) -> None:
    """Whatever was refused, and wherever a tree's accepted tokens were."""
    expected = plain()
    drafter = drafter_with(kind, **changes)
    assert drafter.options.causal == (kind == "parallelspec" or bool(changes))
    heard = Heard(drafter, Knowing(list(expected.sequences), tree=tree, right=0.7))
    found = plain(drafter=heard, draft_size=6)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.nfe.sum() < expected.nfe.sum()
    tokens = sum(len(draft.tokens) for *_, draft in heard.heard)
    assert tokens > 80
    assert heard.compare(MODEL) >= tokens - 1  # but for a tie


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_no_token(kind: str, temperature: float) -> None:
    settings: dict[str, Any] = {"temperature": temperature, "seed": 7, "gen_length": [24, 30, 1, 11]}
    expected = plain(**settings)
    drafter = drafter_with(kind)
    for more in ({}, {"draft_size": 1}, {"draft_size": 99}, {"batch_invariant": True}, {"suppress": [3, 17]}):
        if "suppress" in more:
            expected = plain(**more, **settings)
        found = plain(drafter=drafter, **more, **settings)
        assert torch.equal(found.sequences, expected.sequences), more
    assert int(found.draft_forwards) > 0


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_its_context_lies_in_pages_like_the_targets(page_size: int) -> None:
    """Of any size in any order; the rest of the slots may hold anything."""
    expected = plain()
    width = expected.sequences.shape[1]
    per_lane = -(-width // page_size)
    own = make_settings(DecodeConfig(), MODEL, "none", 1)[0]

    def pages() -> Tensor:
        count = len(PROMPTS) * per_lane
        return torch.randperm(count + 3)[:count].view(len(PROMPTS), -1)

    heard = Heard(drafter_with("dflash"), Knowing(list(expected.sequences)))
    heard.check(MODEL)
    with torch.inference_mode():
        cache = MODEL.new_cache(len(PROMPTS) * per_lane + 3, page_size, pages())
        batch = CausalBatch(MODEL, len(PROMPTS), width, drafter=heard, sizer=Fixed(8), kv_cache=cache)
        assert heard.own.kv_cache.block_table is cache.block_table
        heard.own.kv_cache.slots.fill_(math.nan)
        for turn in pages(), pages():
            for lane, prompt in enumerate(PROMPTS):
                cache.assign(lane, turn[lane].tolist())
                batch.admit(lane, prompt, 24, own)
            while batch.live:
                batch.step()
            for b, prompt in enumerate(PROMPTS):
                end = len(prompt) + 24
                assert torch.equal(batch.tokens[b, :end], expected.sequences[b, :end])
    assert heard.compare(MODEL) > 160


@pytest.mark.parametrize("kind", KINDS)
def test_an_engines_shared_pages_hold_its_context_too(kind: str) -> None:
    """And few pages, evicted and used again."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(10, 60, (24,), generator=generator)
    prompts = [torch.cat((common, torch.randint(10, 60, (n,), generator=generator))) for n in range(1, 7)]
    expected = plain(prompts=prompts, gen_length=20)
    heard = Heard(drafter_with(kind), Knowing(list(expected.sequences), right=0.7))
    settings: dict[str, Any] = {"lanes": 2, "max_length": 64, "page_size": 8, "pages": 14, "draft_size": 4}
    with dx.Engine(MODEL, drafter=heard, **settings) as engine:
        results = [h.result(60) for h in [engine.submit(p, gen_length=20, eos_id=-1) for p in prompts]]
    assert [result.tokens for result in results] == [response.tolist() for response in expected.responses]
    assert [result.reused for result in results[2:]] == [24] * 4
    assert heard.compare(MODEL) > 100


def test_a_draft_ends_with_the_sequences_own_slots() -> None:
    """Lanes lie behind each other in one page: a row too many would overwrite the next one's."""
    drafter = Heard(drafter_with("dflash"))
    found = plain(drafter=drafter, draft_size=8, gen_length=[3, 9, 24, 5])
    assert torch.equal(found.sequences, plain(gen_length=[3, 9, 24, 5]).sequences)
    assert drafter.compare(MODEL) > 20
    assert min(length - len(tokens) for tokens, _, length, _ in drafter.heard) < 4


def test_what_the_model_never_chooses_is_not_drafted() -> None:
    heard = Heard(drafter_with("dflash"))
    plain(drafter=heard, draft_size=8)
    often = max(range(60), key=lambda token: sum(draft.tokens.count(token) for *_, draft in heard.heard))
    # The mask is a row's own input, and so often near: of a drafter that has `often` for its mask too.
    for mask_id in (often, *range(10, 13)):
        said = {"mask_token_id": mask_id, "target_layer_ids": [0, 1]}
        other = Heard(drafter_with("dflash", dflash_config=said))
        plain(drafter=other, draft_size=8)
        assert all(mask_id not in draft.tokens for *_, draft in other.heard)
    heard.heard.clear()
    plain(drafter=heard, draft_size=8, suppress=[often])
    assert all(often not in draft.tokens for *_, draft in heard.heard)


def test_other_families_and_16_bits() -> None:
    for family, dtype in (("llama", torch.float32), ("qwen2", torch.bfloat16)):
        model = model_of(family, dtype=dtype)
        drafter = drafter_with("dflash", model)
        found = plain(model, drafter=drafter, draft_size=8)
        same = [torch.equal(a, b) for a, b in zip(found.responses, plain(model).responses, strict=True)]
        assert sum(same) >= (4 if dtype == torch.float32 else 2)


def test_training_computes_what_decoding_does() -> None:
    """Packed blocks behind whole sequences, under a mask."""
    for kind, said in KINDS.items():
        drafter, block = drafter_with(kind), said["block"]
        ids = torch.randint(0, 60, (2, 14), generator=torch.Generator().manual_seed(0))
        taps = models.Taps(drafter.options.taps)
        with torch.no_grad():
            MODEL.hidden(ids, taps=taps)
            feature = drafter.model.feature([taps[tap] for tap in drafter.options.taps])
            anchors = torch.tensor([[4, 9], [1, 13]])
            rows = anchors[..., None] + torch.arange(block)  # (2, 2, block)
            blocks = torch.full((2, 2, block), drafter.options.mask_id)
            blocks[..., 0] = ids.gather(1, anchors)
            at = torch.arange(2 * block)
            inside = at[:, None] // block == at // block
            if kind == "parallelspec":
                inside &= at[:, None] >= at
            context = torch.arange(14) < anchors.repeat_interleave(block, 1)[..., None]  # (2, 2 block, 14)
            visible = torch.cat((context, inside.expand(2, -1, -1)), -1)
            cos, sin = dx.ops.rope_table(64, 8, 5000.0)
            x = drafter.model(MODEL.embed(blocks.flatten(1)), rows.flatten(1), feature, visible, cos, sin)
            logits = MODEL.head(x).unflatten(1, (2, block))[:, :, 1:].double()
        for b in range(2):
            for a in range(2):
                expected = guessed(drafter, MODEL, ids[b, : int(anchors[b, a]) + 1], block)
                torch.testing.assert_close(logits[b, a], expected, rtol=1e-3, atol=1e-3)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["drafter.safetensors", "directory"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_all_of_it(tmp_path: Path, kind: str, name: str) -> None:
    drafter, path = drafter_with(kind), tmp_path / name
    drafter.save(path, torch.float32)
    for found in (dx.speculation.load(path), drafter_of(path), drafter_of(str(path))):
        assert found.options == drafter.options
        state = drafter.model.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in found.model.state_dict().items())
    expected = plain(drafter=drafter, draft_size=4)
    found = plain(drafter=str(path), draft_size=4)
    assert torch.equal(found.drafted, expected.drafted)
    assert torch.equal(found.sequences, expected.sequences)
    assert "block=" in repr(drafter)


def test_published_checkpoints_are_read_as_they_are(tmp_path: Path) -> None:
    """z-lab's: names of tensors and keys of config.json as released, without what is ours."""
    drafter = drafter_with("dflash")
    drafter.save(tmp_path)
    names = {
        *(
            f"layers.{i}.self_attn.{n}.weight"
            for i in (0, 1)
            for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        *(f"layers.{i}.self_attn.{n}_norm.weight" for i in (0, 1) for n in "qk"),
        *(f"layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("gate", "up", "down")),
        *(f"layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
        *("fc.weight", "hidden_norm.weight", "norm.weight"),
    }
    assert set(load_file(tmp_path / "model.safetensors")) == names
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dparallel"]
    config |= {"architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}
    config |= {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None}
    config["is_causal"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = dx.speculation.load(tmp_path)
    assert found.options == drafter.options._replace(origin=Origin())
    found.check(MODEL)
    found.check(model_of(rms_norm_eps=1e-4, eos_token_id=7))  # it does not say for which
    assert torch.equal(plain(drafter=found).sequences, plain().sequences)
    # Later ones have the block's size inside, where the published code looks first.
    config["dflash_config"]["block_size"], config["block_size"] = config["block_size"], 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dx.speculation.load(tmp_path).options.block == 9


def test_a_published_drafter_of_another_kind_is_told_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 1}))
    save_file({"0.0.linear.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    said = (
        r"drafter: .*: expected that of a published DFlash, EAGLE-3 .* got \['medusa_num_heads', 'medusa_num_"
    )
    with pytest.raises(ValueError, match=said):
        plain(drafter=str(tmp_path))


def test_published_taps() -> None:
    assert default_taps(36, 5) == (1, 9, 17, 25, 33)
    assert default_taps(24, 5) == (1, 6, 11, 16, 21)
    assert default_taps(64, 2) == (1, 61)
    assert default_taps(24, 1) == (12,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "'num_hidden_layers' is null"),
        ({"block_size": 1}, "block_size=1, expected a whole number >= 2"),
        ({"block_size": None}, "'block_size' is missing"),
        ({"dflash_config": None}, "'dflash_config' is null"),
        ({"dflash_config": {"mask_token_id": 61}}, "mask_token_id=61, expected an id below 61"),
        ({"dflash_config": {"target_layer_ids": [0]}}, "'mask_token_id' is missing"),
        ({"dflash_config": {"mask_token_id": 60}}, "'target_layer_ids' is missing"),
        ({"fc_layernorm": True}, "fc_layernorm=True is not supported"),
        ({"input_embedding_scale": 2.0}, "input_embedding_scale=2.0 is not supported, only 1"),
        ({"is_causal": "no"}, "is_causal='no', expected true or false"),
        (
            {"dflash_config": {"mask_token_id": 60, "fc_layernorm": True}},
            "fc_layernorm=True is not supported",
        ),
        (
            {"dflash_config": {"mask_token_id": 60, "target_layer_ids": [0, 2]}},
            r"target_layer_ids: expected ascending numbers of layers of \[-1, 2\), got \[0, 2\]",
        ),
        ({"dflash_config": {"mask_token_id": 60, "target_layer_ids": [1, 0]}}, "expected ascending numbers"),
        ({"dflash_config": {"mask_token_id": 60, "target_layer_ids": []}}, "expected ascending numbers"),
        ({"dparallel": {"kind": "medusa"}}, r"kind='medusa', expected one of \['dflash', 'parallelspec'"),
        ({"dparallel": {"kind": ["dflash"]}}, r"kind=\['dflash'\], expected text or null"),
        ({"dparallel": {"target": 3}}, "target=3, expected text or null"),
        ({"num_target_layers": 0}, "num_target_layers=0, expected a whole number >= 1"),
        ({"layer_types": ["sliding_attention"]}, "layer_types with 'sliding_attention' is not supported"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    drafter_with("dflash").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as raised:
        dx.speculation.load(tmp_path)
    assert str(raised.value).startswith(f"path: {tmp_path}: ")


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "drafter.safetensors"
    with pytest.raises(FileNotFoundError, match=r"path: no file .*drafter\.safetensors"):
        dx.speculation.load(file)
    with pytest.raises(FileNotFoundError, match="path: no directory nowhere"):
        dx.speculation.load("nowhere")
    with pytest.raises(ValueError, match=r"drafter: no file .*drafter\.safetensors"):
        plain(drafter=str(file))
    with pytest.raises(FileNotFoundError, match=r"path: no file .*model.safetensors"):
        dx.speculation.load(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        dx.speculation.load(file)
    save_file({"fc.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is no drafter: its metadata has no config"):
        dx.speculation.load(file)
    drafter = drafter_with("dflash")
    drafter.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for change, message in (
        ({"norm.weight": torch.zeros(3)}, r"norm.weight is \(3,\), expected \(32,\)"),
        ({"layers.0.attention_conv.base_kernel": torch.zeros(1)}, "base_kernel is unexpected"),
        (
            {"norm.weight": torch.zeros(32, dtype=torch.int8)},
            "norm.weight is torch.int8, expected",
        ),
    ):
        save_file(tensors | change, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            dx.speculation.load(tmp_path)
    del tensors["fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its config: fc\.weight is missing"):
        dx.speculation.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"path: no config.json in"):
        dx.speculation.load(tmp_path)


@pytest.mark.parametrize("value", [[], {}, 3, None])
def test_a_damaged_model_type_is_no_model(tmp_path: Path, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": value}))
    with pytest.raises(ValueError, match=r"drafter: no file .*model\.safetensors"):
        drafter_of(tmp_path)


def test_another_model_is_refused_before_anything_runs() -> None:
    for target, message in (
        (
            model_of(vocab_size=62),
            "drafter: drafter was made for a vocabulary of 61 tokens, and the model has 62",
        ),
        (model_of(hidden_size=40), "was made for a model of width 32, and the model has 40"),
        (model_of(num_hidden_layers=3), "was made for a model of 2 layers, and the model has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(target, drafter=drafter_with("dflash"))
    other = model_of()
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    said = "drafter was trained for another model"
    with pytest.raises(ValueError, match=rf"{said} \({models.fingerprint(MODEL)}, and this is "):
        plain(other, drafter=drafter_with("dflash"))


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_drafts_are_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    """On a tape in place of a GPU: drafts wait for nothing, and read nothing from the host."""
    settings: dict[str, Any] = {"drafter": drafter_with(kind), "draft_size": 4, "gen_length": 40}
    prompts = [PROMPTS[0], PROMPTS[2]]
    expected = plain(prompts=prompts, suppress=[3], **settings)
    taped = request.getfixturevalue("taped")
    found = plain(prompts=prompts, suppress=[3], **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.accepted, expected.accepted)
    assert len(taped) == 2
    assert all(graphs.replays > 5 for graphs in taped)
    taped.clear()
    plain(prompts=prompts, graphs=False, **settings)
    assert not taped
