"""A wrapped model gives the tokens of the model in it, or is refused by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import golden
from torch import Tensor, nn

import dparallel_ext as dx
from dparallel_ext import compat, models
from dparallel_ext.models import Dream, Model, Traits

DREAM = golden.home / "dream_tiny_a"
PROMPT = torch.tensor([[17, 4, 230, 95, 8, 301, 44, 7, 120], [9, 9, 2, 77, 410, 3, 205, 66, 31]])
BRIEF = {"gen_length": 8, "block_length": 8, "threshold": 0.5}


def tokens(model: Any, **settings: Any) -> Tensor:
    return dx.decode(model, PROMPT, **{**BRIEF, **settings}).sequences


def native(name: str = "dream_tiny_a", **settings: Any) -> Model:
    return golden.model(name, **settings)


@functools.cache
def expected(cache: str = "none") -> Tensor:
    return tokens(native(), cache=cache)


class Theirs(nn.Module):
    """A Hugging Face model as decoding sees it: a config, and a call that returns logits."""

    def __init__(self, name: str = "dream_tiny_a") -> None:
        super().__init__()
        self.__dict__["inner"] = native(name)  # not a submodule: it is no model of ours
        self.config = type("Config", (), dict(self.inner.config))()
        self.weight = nn.Parameter(torch.zeros(1))

    @torch.compiler.disable  # tracing our layers takes seconds
    def forward(self, input_ids: Tensor) -> Any:
        return self.inner(input_ids)


class Delegating(nn.Module):
    """A wrapper of nobody's kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = model

    def forward(self, input_ids: Tensor) -> Any:
        return self.held(input_ids)


def called(model: nn.Module) -> Any:
    """The model's own call, and nothing that decoding knows of it."""

    def call(input_ids: Tensor) -> Any:
        return model(input_ids=input_ids)

    call.traits = models.traits(model)  # type: ignore[attr-defined]
    return call


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- compilers and parallelism ------------------------------------------------------------------


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


WRAPS: list[Callable[[Any], Any]] = [
    compiled,
    nn.DataParallel,
    averaged,
    lambda model: compiled(nn.DataParallel(model)),
    lambda model: nn.DataParallel(compiled(model)),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_ours_in_a_wrapper_is_decoded_as_without(wrap: Callable[[Any], Any]) -> None:
    model = wrap(native())
    assert models.traits(model) == models.traits(native())
    for cache in ("none", "dual"):
        assert torch.equal(tokens(model, cache=cache), expected(cache))


@pytest.mark.parametrize("wrap", WRAPS[:2])
def test_theirs_in_a_wrapper_keeps_its_traits(wrap: Callable[[Any], Any]) -> None:
    model = wrap(Theirs())
    assert models.traits(model) == models.traits(native())
    assert torch.equal(tokens(model), expected())


def test_theirs_is_called_as_it_was_compiled_and_not_by_replicas_wrappers() -> None:
    theirs = Theirs()
    one = compiled(theirs)
    assert models.for_decoding(one) is one
    assert models.for_decoding(nn.DataParallel(one)) is one
    assert models.for_decoding(compiled(nn.DataParallel(theirs))) is theirs
    assert models.unwrap(nn.DataParallel(one)) is theirs
    plain = nn.Linear(1, 1)
    assert models.for_decoding(plain) is models.unwrap(plain) is plain


def test_a_method_of_a_model_has_its_traits() -> None:
    for model in (native(), Theirs()):
        for call in (model.forward, model.__call__, functools.partial(model)):
            assert torch.equal(tokens(call), expected())
        assert models.traits(compiled(model.forward)) == models.traits(native())


def test_a_class_says_the_traits_of_its_objects() -> None:
    class Says:
        traits = models.Traits(mask_id=3, block_length=8)

    class Asks:
        """An object that passes questions on to another, whose traits are not its own."""

        def __getattr__(self, name: str) -> Any:
            return getattr(Says, name)

        def __call__(self) -> None:
            raise AssertionError

    assert models.traits(Says()) == Says.traits
    assert models.traits(Asks()) == models.Traits(mask_id=None)


def test_a_function_says_its_traits_itself() -> None:
    model = native()

    def call(input_ids: Tensor) -> Any:
        return model(input_ids)

    unshifted = tokens(call, mask_id=511)
    assert not torch.equal(unshifted, expected())  # a plain function is taken by its word
    call.traits = models.traits(model)  # type: ignore[attr-defined]
    assert torch.equal(tokens(call), expected())


def test_every_entrance_unwraps() -> None:
    model, wrapped = native(), compiled(native())
    given = (8, 8, 8)
    for generate in (compat.generate, compat.generate_with_dual_cache):
        ours, plain = (generate(m, PROMPT, *given, mask_id=511, threshold=0.5) for m in (wrapped, model))
        assert torch.equal(ours[0], plain[0])
        assert ours[1] == plain[1]
    with dx.Engine(wrapped, block_length=8) as engine:
        found = engine.submit(PROMPT[0], gen_length=8, threshold=0.5).result().tokens
    assert found == expected("dual")[0, 9:].tolist()
    assert models.wrap(wrapped) is models.unwrap(wrapped)
    with pytest.raises(ValueError, match=r"model: expected one of dparallel_ext\.models.*got Theirs"):
        dx.Engine(nn.DataParallel(Theirs()))  # type: ignore[arg-type]


def test_ddp_is_unwrapped_and_waits_for_nobody(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.parallel import DistributedDataParallel

    theirs = Theirs()
    theirs.register_buffer("counter", torch.zeros(1))  # DDP's call sends buffers to the other processes
    for inner, caches in ((native(), ("none", "dual")), (theirs, ("none",))):
        model = DistributedDataParallel(inner)
        monkeypatch.setattr(DistributedDataParallel, "forward", None)
        for cache in caches:
            for wrapped in (model, compiled(model)):
                assert torch.equal(tokens(wrapped, cache=cache), expected(cache))


@pytest.mark.parametrize("version", [1, 2])
def test_sharded_models_are_refused_by_name_and_the_advice_works(version: int, process_group: None) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model: Any = native()
    if version == 1:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
        with whole:
            assert torch.equal(tokens(model.module, cache="dual"), expected("dual"))
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    for decode in (tokens, dx.Engine, models.wrap):
        with pytest.raises(ValueError, match=r"FSDP has sharded its weights \(F.*get_model_state_dict"):
            decode(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    own = Dream(native().config)
    assert own.load_state_dict(state) == ([], [])
    assert torch.equal(tokens(own.eval()), expected())
    theirs = FullyShardedDataParallel(Theirs(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="FSDP has sharded"):
        tokens(theirs)


def test_a_sharded_model_of_experts_resumes(process_group: None) -> None:
    """The names of a layer's experts were sought in its shards, which have none."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    sizes = {
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    }
    first, second = (models.SDARMoE({**sizes, "model_type": "sdar_moe"}) for _ in range(2))
    for model in (first, second):
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    set_model_state_dict(second, get_model_state_dict(first))
    x = torch.arange(9)[None]
    assert torch.equal(second(x).logits, first(x).logits)


def test_weights_that_are_elsewhere_are_named() -> None:
    with torch.device("meta"):
        model = Dream(native().config)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on the meta device"):
        tokens(model)


def test_accelerate_leaves_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(native())
        assert "forward" in vars(model)  # its calls run under autocast
        assert torch.equal(tokens(model, cache="dual"), expected("dual"))
        assert torch.equal(tokens(accelerator.prepare(nn.DataParallel(native()))), expected())
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_wrapper_of_another_kind_is_refused_unless_nothing_depends_on_it() -> None:
    for wrapped in (Delegating(native()), Delegating(Theirs()), nn.DataParallel(Delegating(native()))):
        with pytest.raises(ValueError, match=r"Delegating holds a (Dream|Theirs) as held.*model\.traits ="):
            tokens(wrapped)
    saying = Delegating(native())
    saying.traits = models.traits(saying.held)  # type: ignore[assignment]
    assert torch.equal(tokens(saying), expected())
    sdar = Delegating(native("sdar_tiny_a"))
    sdar.config = sdar.held.config  # of the family, but not block-causal by that alone
    with pytest.raises(ValueError, match="holds a SDAR"):
        models.traits(sdar)
    llada = native("llada_tiny_a")  # nothing but a mask token
    assert models.traits(Delegating(llada)) == Traits(511) == models.traits(llada)
    assert torch.equal(tokens(Delegating(llada)), tokens(llada))

    class Holder:
        def __init__(self) -> None:
            self.inner = native()

        def __call__(self, input_ids: Tensor) -> Any:
            return self.inner(input_ids)

    with pytest.raises(ValueError, match="Holder holds a Dream as inner"):
        tokens(Holder())


# --- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cache"), [("dream_tiny_a", "dual"), ("sdar_tiny_a", "block")])
@pytest.mark.parametrize("quantized", [False, True])
def test_autocast_changes_no_token_of_ours(name: str, cache: str, quantized: bool) -> None:
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        model = native(name, dtype=dtype)
        model = model.quantize() if quantized else model
        settings = {"cache": cache, "block_length": model.block_length or 8}
        before = tokens(model, **settings)
        with torch.autocast("cpu", dtype=other):
            assert torch.equal(tokens(model, **settings), before)
            assert torch.is_autocast_enabled("cpu")
            fresh = native(name, dtype=dtype)
            assert models.fingerprint(fresh) == models.fingerprint(model)
            if quantized:
                assert torch.equal(tokens(fresh.quantize(), **settings), before)


def test_autocast_holds_for_theirs() -> None:
    seen, theirs = [], Theirs()
    theirs.register_forward_hook(lambda _m, _i, out: seen.append(out.logits.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens(theirs)
    assert set(seen) == {torch.bfloat16}


def test_the_published_loops_over_logits_unwrap_too() -> None:
    model = native()
    for wrapped in (nn.DataParallel(model), compiled(model), model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = compat.diffusion_generate(wrapped, PROMPT, max_new_tokens=8, steps=4, alg="entropy")
        plain = compat.diffusion_generate(model, PROMPT, max_new_tokens=8, steps=4, alg="entropy")
        assert torch.equal(found, plain)
    with pytest.raises(ValueError, match="Delegating holds a Dream"):
        compat.diffusion_generate(Delegating(model), PROMPT, max_new_tokens=8, steps=4)


def test_likelihoods_unwrap_too() -> None:
    likelihood = pytest.importorskip("dparallel.likelihood")
    settings = {"samples": 2, "greedy": False}
    plain = likelihood.log_likelihoods(native(), [[5, 6]], [[7, 8, 9]], **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = likelihood.log_likelihoods(nn.DataParallel(native()), [[5, 6]], [[7, 8, 9]], **settings)
    assert found == plain


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_under_autocast_is_that_of_autocast_s_dtype(softcap: float | None) -> None:
    hidden, head = (torch.randn(*shape, requires_grad=True) for shape in ((4, 7, 16), (50, 16)))
    labels, active = torch.randint(0, 50, (4, 7)), torch.rand(4, 7) < 0.5

    def loss(*given: Tensor) -> Tensor:
        return dx.linear_certainty_forcing_loss(*given, labels, active, gate="all", softcap=softcap).loss

    def gradients(total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, (hidden, head))

    plain = loss(hidden.bfloat16(), head.bfloat16())
    wanted = gradients(plain)
    full = loss(hidden, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(hidden, head)
        within = gradients(loss(hidden, head))
        # A graph that was made without autocast runs backward under it all the same.
        exact = gradients(full)
        logits = F.linear(hidden, head)
        dx.certainty_forcing_loss(logits, labels, active).loss.backward()
    assert torch.equal(total, plain)
    for found in (within, gradients(total)):
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)
    for a, b in zip(exact, gradients(loss(hidden, head)), strict=True):
        assert torch.equal(a, b)


# --- calls that decoding does not make ------------------------------------------------------------


class Negated(Dream):
    def forward(self, *args: Any, **keywords: Any) -> Any:
        output = super().forward(*args, **keywords)
        output.logits.neg_()
        return output


def test_a_native_model_s_own_call_is_refused_and_the_advice_works() -> None:
    model = native()
    model.__class__ = Negated
    for wrap in (lambda m: m, compiled, nn.DataParallel):
        with pytest.raises(ValueError, match="model: Negated has a forward of its own"):
            tokens(wrap(model))
    found = tokens(called(model))
    assert not torch.equal(found, expected())
    other = native()
    other.lm_head.weight.data.neg_()
    assert torch.equal(found, tokens(other))


@pytest.mark.parametrize("name", ["forward", "hidden"])
def test_a_method_set_on_the_object_is_refused(name: str) -> None:
    model = native()
    plain = getattr(model, name)
    setattr(model, name, plain)
    assert torch.equal(tokens(model), expected())
    setattr(model, name, lambda *args, **keywords: plain(*args, **keywords))
    with pytest.raises(ValueError, match=f"model: Dream has a {name} of its own"):
        tokens(model)
    with pytest.raises(ValueError, match=f"model: Dream has a {name} of its own"):
        dx.Engine(model)


def test_a_forward_that_is_compiled_or_accelerate_s_changes_nothing() -> None:
    model: Any = native()
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(tokens(model), expected())
    hooks = pytest.importorskip("accelerate.hooks")
    model = native()
    hooks.add_hook_to_module(model, hooks.ModelHook())
    assert "forward" in vars(model)
    assert torch.equal(tokens(model), expected())


def test_hooks_on_the_call_are_not_run_and_a_warning_says_so() -> None:
    model, seen = native(), []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="model: Dream has hooks on its call, which decoding does not run"):
        assert torch.equal(tokens(model), expected())
    assert not seen
    hook.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(tokens(model), expected())
    assert seen


# --- training -----------------------------------------------------------------------------------


def test_the_trainer_sees_through_wrappers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pytest.importorskip("dparallel.training.trainer")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for i, wrap in enumerate((compiled, nn.DataParallel)):
        model = native()
        args = trainer.CertaintyForcingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        made = trainer.CertaintyForcingTrainer(model=wrap(model), args=args)
        assert made.lm_head is model.lm_head
        assert made.takes_attention_mask
        assert made.traits == models.traits(model)
        made.save_model(str(tmp_path / str(i)))
        assert torch.equal(tokens(models.load(tmp_path / str(i))), expected())
