"""Every way to tokens gives on an emulated GPU, which records passes, what it gives on the CPU: no tensor
strays to the other device, and what a caller has on one of them may go with a model on the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import drafters
import nemotron
import pytest
import sdlm
import torch
import wedlm
from conftest import golden
from dparallel import likelihood
from dparallel.token_scores import token_scores
from dparallel.training import filter as filters
from dparallel.training.drafters import settings_of
from dparallel.training.drafters.common import Target
from dparallel.training.drafters.runs import KINDS as TRAINEES
from emulated_gpu import GPU, emulated_gpu, on_cpu
from forms import a_form
from tape import Tape
from test_soft import Mixed
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.models import Model
from dparallel_ext.speculation import TreeDrafter

pytest_plugins = ["taping"]

Prompts = list[Tensor]
Way = Callable[[str], Any]
"""Takes the name of a device, and returns numbers."""

FAST_DLLM, DEEP = drafters.fast_dllm(), drafters.deep_model()
DUAL: dict[str, Any] = {"cache": "dual", "threshold": 2.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 3, "suppress": [4], "eos_id": [5, 9]}
SAMPLED |= {"logprobs": True, "top_logprobs": 3}


def moved(model: Model, device: str) -> Model:
    return copy.deepcopy(model).to(device)


def prompts(device: str, vocabulary: int = 60) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=generator).to(device) for n in (5, 1, 12)]


def decoded(model: Callable[[], Model], **settings: Any) -> Way:
    def way(device: str) -> Any:
        of = moved(model(), device)
        given = {"gen_length": 16, "block_length": 8, "record": True, **settings}
        out = dx.decode(of, prompts(device, of.shape.embedding_size - 1), **given)
        assert out.trajectory is not None
        return out.sequences, out.nfe, out.kept, out.trajectory.step, *_top(out)

    return way


def speculated(model: Model, drafter: Callable[[str], Any], **settings: Any) -> Way:
    def way(device: str) -> Any:
        of = moved(model, device)
        given = prompts(device, of.shape.embedding_size - 1)
        out = dx.speculate(of, given, drafter=drafter(device), gen_length=10, **settings)
        return out.sequences, *_top(out)

    return way


def _top(out: dx.DecodeOutput) -> tuple[torch.Tensor, ...]:
    return () if out.top_logprobs is None else (out.top_logprobs.token,)


def served(model: Model, drafter: Callable[[str], Any] | None = None, **settings: Any) -> Way:
    """By an engine; some prompts are on the device."""

    def way(device: str) -> Any:
        of = moved(model, device)
        more = {} if drafter is None else {"drafter": drafter(device)}
        given = prompts(device, of.shape.embedding_size - 1)
        with dx.Engine(of, lanes=2, max_length=64, **more) as engine:
            handles = [engine.submit(p, gen_length=10, **settings) for p in (given[0].cpu(), *given)]
            return [handle.result(60).tokens for handle in handles]

    return way


def padded(device: str) -> Any:
    """Whatever a caller has on the CPU."""
    model, causal = golden.model("llada_tiny_a", device=device), moved(drafters.MODEL, device)
    ids = {"input_ids": [[0, 1, 2], [4, 5, 6]], "attention_mask": [[0, 1, 1], [1, 1, 1]]}
    given = {name: torch.tensor(value) for name, value in ids.items()}
    numbers = {"gen_length": [16, 9], "seed": [1, 2], "suppress": [3]}
    settings: Any = {"temperature": 1.0, **{name: torch.tensor(value) for name, value in numbers.items()}}
    out = dx.decode(model, given, policy=dx.policies.make("entropy", 2.0, batch=2), cache="dual", **settings)
    return out.sequences, dx.speculate(causal, given, drafter="ngram", **settings).sequences


def published(device: str) -> Any:
    """The published functions move what they get."""
    llada, dream = (golden.model(name, device=device) for name in ("llada_tiny_a", "dream_tiny_a"))
    ids, mask = torch.tensor([[0, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    settings: Any = {"steps": 8, "gen_length": 8, "block_length": 4, "mask_id": 511}
    found = [dx.compat.generate(llada, ids, attention_mask=mask, cfg_scale=1.5, **settings)]
    for name in ("generate", "generate_with_prefix_cache", "generate_with_dual_cache"):
        found.append(getattr(dx.compat, name)(llada, ids, threshold=0.02, **settings))
    for alg in ("origin", "entropy"):
        torch.manual_seed(0)
        given: Any = {"attention_mask": mask, "steps": 4, "max_new_tokens": 8, "alg": alg}
        found.append(dx.compat.diffusion_generate(dream, ids, mask_token_id=511, pad_token_id=0, **given))
    return found


class Foreign(torch.nn.Module):
    """A model that says where it is, as Hugging Face's do."""

    def __init__(self, inner: Model) -> None:
        super().__init__()
        self.inner, self.config = inner, type("Config", (), inner.config)()
        self.device = inner.device

    def forward(self, input_ids: Tensor) -> Any:
        return self.inner(input_ids)


def foreign(device: str) -> Any:
    model = Foreign(golden.model("llada_tiny_a", device=device))
    settings: Any = {"gen_length": 8, "block_length": 4, "threshold": 0.02}
    out = dx.decode(model, [[5, 6], torch.tensor([7])], temperature=1.0, seed=3, **settings)
    return out.sequences, dx.compat.generate(model, torch.tensor([[5, 6]]), mask_id=511, **settings)


def adaptive(device: str) -> Any:
    model, verifier = golden.model("llada_tiny_a", device=device), moved(drafters.MODEL, device)
    given = prompts(device)
    settings: Any = {"gen_length": 16, "suppress": range(61, 512)}
    out = dx.adaptive_decode(model, given, verifier=verifier, mixture=0.0, lookahead=3, window=3, **settings)
    named = dx.adaptive_decode(model, given[1] % 9, verifier="builtin:verifier", gen_length=4)
    if device != "cpu":
        with pytest.raises(ValueError, match="verifier: expected on cuda:0 as the model, got cpu"):
            dx.adaptive_decode(model, given, verifier=drafters.MODEL, **settings)
    with dx.Engine(model, lanes=2, max_length=64, verifier=verifier) as engine:
        handles = [engine.submit(p, **settings) for p in given]
        return out.sequences, named.sequences, [handle.result(60).tokens for handle in handles]


def infilled(device: str) -> Any:
    prompt = torch.arange(3, 60).to(device)
    prompt[10:20] = prompt[40:44] = 511
    model = golden.model("llada_tiny_a", device=device)
    settings: Any = {"gen_length": 8, "infill": True, "threshold": 2.0}
    return [dx.decode(model, prompt, cache=cache, **settings).sequences for cache in ("none", "dual")]


def scored(device: str) -> Any:
    pairs = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]
    found = []
    for name, method in (("llada_tiny_a", "monte_carlo"), ("dream_tiny_a", "left_to_right")):
        model = golden.model(name, device=device)
        found += likelihood.log_likelihoods(model, *pairs, method=method, samples=4)
    model = golden.model("llada_tiny_a", device=device)
    answers = [(torch.arange(3, 20), 4), (torch.arange(5, 30), 9)]
    given: Any = {"block_length": 8, "cache": "dual", "progress": False}
    records, _ = filters.record(model, answers, batch=2, **given)
    text = token_scores(moved(drafters.MODEL, device), range(1, 30), top=3)
    ids, values = zip(*(zip(*place, strict=True) for place in text.top), strict=True)
    of_text = torch.tensor([text.logprobs, *zip(*values, strict=True)], device="cpu"), ids
    return [(round(each.logprob, 3), each.greedy) for each in found], records.right, of_text


def called(device: str) -> Any:
    """A model by itself, and the states of its training; masks are on the CPU."""
    mask, lengths = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([1, 0])
    ids = torch.tensor([[0, 2, 3], [4, 5, 6]]).to(device)
    with torch.no_grad():
        found = [
            model(ids, attention_mask=mask).logits
            for model in (golden.model("llada_tiny_a", device=device), moved(drafters.MODEL, device))
        ]
    generator = torch.Generator().manual_seed(0)
    return found, dx.semi_autoregressive_masks(ids, lengths, mask_id=9, block_length=2, generator=generator)


def trained(kind: str) -> Way:
    """The loss of a step, without its gradient."""

    def way(device: str) -> Any:
        target = Target("it", moved(DEEP, device), None, False)
        masked = {"mask_id": 60} if kind not in ("ppd", "hidden_transfer", "adadecode") else {}
        settings: Any = settings_of(kind, batch=2, anchors=3, gen_length=8, **masked)
        trainee = TRAINEES[kind](target, settings)
        torch.manual_seed(0)
        trainee.module = trainee.build().to(device)
        answers = [(p.cpu(), 1) for p in prompts("cpu") if len(p) > 4]
        with torch.no_grad():
            return trainee.loss_of(answers, 0)

    return way


def trees(device: str) -> TreeDrafter:
    return TreeDrafter(drafters.drafter_with("dflash"))


DRAFTERS: dict[str, Callable[[str], Any]] = {
    "none": lambda device: None,
    "ngram": lambda device: "ngram",
    "recycling": lambda device: "recycling",
    "a model": lambda device: moved(drafters.model_of("llama"), device),
    "trees": trees,
    "trees of p-eagle": lambda device: TreeDrafter(drafters.eagle("p-eagle")),
    "trees of eagle3": lambda device: TreeDrafter(drafters.eagle("eagle3")),
    "strided": lambda device: drafters.strided(),
    **{kind: (lambda device, kind=kind: drafters.drafter_with(kind)) for kind in drafters.KINDS},
    **{kind: (lambda device, kind=kind: drafters.eagle(kind)) for kind in ("eagle3", "p-eagle")},
    **{kind: (lambda device, kind=kind: drafters.riding(kind)) for kind in ("ppd", "hidden_transfer")},
}


def of(name: str, **settings: Any) -> Callable[[], Model]:
    return lambda: golden.model(name, **settings)


def with_a_prompt_block(name: str) -> Model:
    model = golden.model(name)
    model.prompt_block = True
    return model


WAYS: dict[str, Way] = {
    "no cache": decoded(of("llada_tiny_a"), cache="none", threshold=2.0),
    "prefix": decoded(of("dream_tiny_a"), cache="prefix", threshold=2.0),
    "schedule": decoded(of("llada_tiny_a"), cache="dual", steps=8, stop=[[7, 8]], top_p=0.9, **SAMPLED),
    "several blocks": decoded(of("llada_tiny_a"), active_blocks=2, **DUAL),
    "one by one": decoded(of("llada_tiny_a"), batch_invariant=True, **DUAL),
    "bfloat16": decoded(of("llada_tiny_a", dtype=torch.bfloat16), **DUAL),
    "fused": decoded(lambda: golden.model("llada_tiny_a").fuse(), **DUAL),
    "8 bits": decoded(lambda: golden.model("llada_tiny_a").quantize(), **DUAL),
    "self-speculation": decoded(of("llada_tiny_a"), cache="dual", draft_size=3),
    "self-speculation, a threshold": decoded(
        of("sdar_tiny_a"), cache="block", rule="confidence:0.6", draft_size=3
    ),
    "a form": decoded(of("llada_tiny_a"), automaton=a_form(3), cache="dual"),
    "a form, in blocks": decoded(of("sdar_tiny_a"), automaton=a_form(2), cache="block", threshold=4.5),
    "soft masks": decoded(of("llada_tiny_a"), rule=Mixed(), cache="dual", active_blocks=2, gen_length=32),
    "soft tokens": decoded(of("sdar_tiny_a"), rule=Mixed(reads="block", edits=1), cache="block"),
    "a function": decoded(of("llada_tiny_a"), rule=lambda stats, masked, step: stats.confidence > 0.02),
    **{  # the last sequence's last block ends where the memory does, so its rows begin in the block before
        rule: decoded(of("llada_tiny_a"), rule=rule, cache="dual", eos_id=5, gen_length=[16, 16, 12])
        for rule in (
            "credit+entropy:3.5",
            "sched:0.4,0.1",
            "edit:0.03,0.05,4",
            "soft:0.05,0.9,6",
            "levenshtein:0.03,0.05,4,7,9",
            "prophet:4",
            "eot:5",
        )
    },
    **{
        f"{selector}, a policy": decoded(of("llada_tiny_a"), selector=selector, threshold=0.05)
        for selector in ("confidence", "margin", "factor", "entropy_bound")
    },
    "sdar": decoded(of("sdar_tiny_a"), cache="block", threshold=2.0),
    **{
        f"{name}, a prompt block": decoded(
            lambda name=name: with_a_prompt_block(f"{name}_tiny_a"), threshold=1.0, active_blocks=active
        )
        for name, active in (("llada", 1), ("dream", 2))
    },
    "fast_dllm": decoded(lambda: FAST_DLLM, cache="block", threshold=2.0),
    "fast_dllm, sub-blocks": decoded(lambda: FAST_DLLM, sub_block_length=4, **DUAL),
    "nemotron": decoded(nemotron.ours, cache="block", threshold=1.0),
    "wedlm": decoded(wedlm.ours, threshold=1.0),
    "wedlm, its rule": decoded(wedlm.ours, rule="distance:0.4,0.02"),
    "sdlm": decoded(sdlm.ours, threshold=1.0),
    **{
        f"{name}, guesses": decoded(
            lambda of=of: models.wrap(sdlm.of_few_words(of.theirs())),
            rule="one",
            draft_size=3,
            eos_id=[5, 11],
        )
        for name, of in (("wedlm", wedlm), ("sdlm", sdlm))
    },
    **{
        family: decoded(lambda family=family: drafters.model_of(family), cache=cache, threshold=2.0)
        for family, cache in {
            "sdar_moe": "block",
            "rnd1": "dual",
            "lladamoe": "dual",
            "llada2_moe": "block",
            "llada2.2": "block",
        }.items()
    },
    **{
        f"a2d, {cache}": decoded(lambda: drafters.model_of("a2d-qwen3", mask_token_id=60), cache=cache)
        for cache in ("block", "dual")
    },
    **{
        name: speculated(drafters.MODEL, made, automaton=a_form(1, 61, ends=(5, 9)), **SAMPLED)
        for name, made in DRAFTERS.items()
    },
    **{
        f"penalties, {name}": speculated(
            drafters.MODEL,
            lambda device, name=name: name,
            repetition_penalty=1.3,
            frequency_penalty=0.5,
            **SAMPLED,
        )
        for name in (None, "recycling")
    },
    "jump_forward": speculated(
        drafters.MODEL, lambda device: "jump_forward", automaton=a_form(1, 61, ends=(5, 9))
    ),
    "adadecode": speculated(DEEP, lambda device: drafters.exits(target=DEEP)),
    "nemotron, itself": speculated(nemotron.ours(), lambda device: "self"),
    "nemotron, trees": speculated(nemotron.ours(), lambda device: "tree:self"),
    "idlm": speculated(drafters.model_of("idlm", mask_token_id=60), lambda device: "strided"),
    **{
        family: speculated(drafters.model_of(family), lambda device: "ngram")
        for family in ("llama", "qwen2", "qwen3_moe")
    },
    "an engine": served(golden.model("llada_tiny_a"), threshold=2.0),
    "an engine, sampling": served(golden.model("llada_tiny_a"), steps=8, **SAMPLED),
    "an engine, a rule": served(golden.model("llada_tiny_a"), rule="credit+entropy:3.5"),
    "an engine, a form": served(golden.model("llada_tiny_a"), automaton=a_form(3)),
    "an engine, in blocks": served(golden.model("sdar_tiny_a"), threshold=2.0),
    "an engine, fast_dllm": served(FAST_DLLM, threshold=2.0),
    "an engine, wedlm": served(wedlm.ours(), threshold=1.0),
    "an engine, sdlm": served(sdlm.ours(), threshold=1.0),
    "an engine, experts": served(drafters.model_of("llada2_moe"), threshold=2.0),
    "an engine, adadecode": served(DEEP, lambda device: drafters.exits(target=DEEP)),
    **{
        f"an engine, {name}": served(drafters.MODEL, DRAFTERS[name])
        for name in ("none", "recycling", "a model", "trees", "p-eagle", "strided", "hidden_transfer")
    },
    "padded prompts": padded,
    "the published functions": published,
    "a foreign model": foreign,
    "adaptive": adaptive,
    "infilled": infilled,
    "scored": scored,
    "called": called,
    **{f"{kind}, trained": trained(kind) for kind in TRAINEES},
}


NOT_REPLAYED = {
    "a function",
    "a foreign model",
    "scored",
    "called",
    *(f"{kind}, trained" for kind in TRAINEES),
}
"""Ways that record no pass, or none twice."""


@pytest.mark.parametrize("name", WAYS)
def test_the_same_as_on_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    expected = WAYS[name]("cpu")
    taped: list[Graphs] = request.getfixturevalue("taped")  # whose passes have a GPU's shapes everywhere
    with emulated_gpu():
        found = WAYS[name](str(GPU))
        dx.check_errors()
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"
    if not name.startswith("an engine"):  # whose passes depend on when requests come
        assert any(graphs.replays for graphs in taped) == (name not in NOT_REPLAYED)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(on_cpu(a), b, rtol=1e-4, atol=1e-4)
        else:
            assert a == b


def test_the_emulated_gpu_refuses_what_a_gpu_refuses(taped: list[Graphs]) -> None:
    with emulated_gpu():
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + here
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            torch.cat([there, here])
        with pytest.raises(ValueError, match="tokens: expected on cuda:0 as the logits, got cpu"):
            dx.unmask_(torch.zeros(1, 3, dtype=torch.int64), there.expand(1, 3, 3), mask_id=0, threshold=1.0)
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            there.numpy()
        there.copy_(here * 2)
        for made in (here.to(GPU), there + here[0], torch.full((2,), 1, device=GPU)):
            assert made.device == GPU
        assert there[1:].cpu().tolist() == [2, 2]


FROM_THE_HOST: dict[str, Callable[[Tensor, Tensor], object]] = {
    "to": lambda there, here: here.to(there.device),
    "to the host": lambda there, here: there.to("cpu"),
    "like": lambda there, here: here.to(there),
    "another dtype": lambda there, here: here.to(there.device, torch.float32),
    "a list": lambda there, here: there[[1, 2]],
    "a tensor of a list": lambda there, here: torch.tensor([1, 2], device=GPU),
    "an index": lambda there, here: there[here],
    "a copy": lambda there, here: there.copy_(here),
    "a number": lambda there, here: there[0].copy_(here[1]),
    "a number that is kept": lambda there, here: there + here[1],
    "tolist": lambda there, here: there.tolist(),
}


@pytest.mark.parametrize("how", FROM_THE_HOST)
def test_a_recording_takes_nothing_from_the_host(how: str) -> None:
    """Also in inference mode, in which passes run, and torch has other operators."""
    for mode in (torch.inference_mode, torch.no_grad):
        with emulated_gpu(), mode():
            there, here = torch.arange(3, device=GPU), torch.arange(3)
            with pytest.raises(RuntimeError, match="not permitted while recording"), Tape():
                FROM_THE_HOST[how](there, here)
