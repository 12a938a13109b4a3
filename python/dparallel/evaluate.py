"""Measures accuracy and passes over problems, of the built-in task or of a file, for models and policies."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.arguments import shown, whole
from dparallel_ext.decoding.config import DEFAULTS
from dparallel_ext.decoding.decode import progress_bar
from dparallel_ext.decoding.settings import check_model
from dparallel_ext.speculation.speculate import check_causal

from . import registry
from .configs import Fields, changed_fields, parse_policy, with_seeds
from .problems import Problems, Prompt, held_out
from .recording import Recording, answer_of
from .results import settings_text, wilson
from .text import Encoder, TokenTexts

Decoded = TypeVar("Decoded", bound=dx.DecodeOutput)


PLAIN = "plain"
"""The name of an autoregressive model's decoding without a drafter."""


def evaluate(
    model_name: str,
    policy: str,
    *,
    config: dx.DecodeConfig | None = None,
    draft_size: int | None = None,
    **asked: Unpack[Asked],
) -> dict[str, Any]:
    """Decode problems with a policy, and check the answers.

    Every sequence is decoded to its full length, so that numbers of passes can be compared, and answers are
    whole responses. `policy` is the rule; `config` has all other fields, except `SET_HERE`. `draft_size`: see
    `decode`. `asked`: see `Asked`.

    Returns model, policy, config (other fields that differ from the defaults), threshold, problems, seed,
    accuracy, accuracy_interval (Wilson's, 95 %), nfe_mean (passes per answer), nfe_to_eos (passes until the
    block that holds one of the model's `eos_ids` is complete; `decode(eos_id=...)` ends then or earlier),
    tokens_per_forward (tokens in front of EOS per pass), padded_tokens_per_forward (all gen_length tokens per
    pass), seconds, gen_length, block_length, cache, chat, and device, mask_id, dtype and fp8 (see
    `registry.conditions_of`); with a draft_size canvases_mean, the copies of an answer that its passes
    computed.
    """
    threshold = parse_policy(policy).get("threshold")
    config = (config or dx.DecodeConfig()).with_rule(policy)
    changed = changed_fields(config) | drafted_by(draft_size)
    task = _task(model_name, config, **asked)
    model, length = task.model, task.length
    config = config.replace(gen_length=length, record=True)
    cache, schedule, _ = check_model(config, model, "none")
    canvases = to_eos = 0
    how, totals = settings_text({"policy": policy, "config": changed}), Totals()

    def decode(part: Sequence[Encoded]) -> dx.DecodeOutput:
        return dx.decode(model, _ids(part), _seeded(config, part), draft_size=draft_size)

    for part, out in _answered(decode, task, how, totals, beyond_end=True):
        canvases += 0 if out.canvases is None else int(out.canvases.sum())
        assert out.trajectory is not None
        for i, (each, response) in enumerate(zip(part, out.responses, strict=True)):
            steps = out.trajectory.step[i, : len(response)]
            ends = torch.tensor([id in model.eos_ids for id in response.tolist()], device=steps.device)
            start = len(each.ids) if schedule.aligned else 0
            nfe = out.nfe[i : i + 1]
            to_eos += int(passes_to_eos(steps[None], nfe, ends[None], schedule.block_length, start))
    return {
        **_result(task, policy, changed, totals, threshold=threshold, to_eos=to_eos),
        "block_length": schedule.block_length,
        "cache": cache,
        **({"canvases_mean": ratio(canvases, len(task.problems.prompts))} if draft_size else {}),
    }


def ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


class Asked(TypedDict, total=False):
    """The problems of a measurement and how they are put, and what else receives the answers."""

    problems: int | Problems
    """A number: so many held-out ones of the built-in task. Default: 500."""
    seed: int
    """Of held-out problems, the same for every call with one seed. Default: 0."""
    batch: int
    """The most problems that are decoded together. Default: 100."""
    chat: bool | None
    """Put problems into the checkpoint's chat template; default: if it has one, but with `loaded` none."""
    loading: registry.Loading | None
    """How the model is loaded."""
    loaded: tuple[Any, Any] | None
    """The model and its tokenizer; a template is still that of the model's name."""
    answers: list[Answer] | None
    """Receives the answers, in the order of the problems."""
    recording: Recording | None
    """Receives the answers to the first `RECORDED` problems."""


class Task(NamedTuple):
    """Problems and the model that answers them."""

    problems: Problems
    name: str
    model: Any
    tokenizer: Any
    encode: Encoder
    chat: bool
    """Whether `encode` puts prompts into a chat template."""
    length: int
    """Tokens of a response."""
    batch: int
    answers: list[Answer] | None
    recording: Recording | None
    """See `Asked`."""


RECORDED = 3
"""Problems of a recording."""
SET_HERE = ("gen_length", "record", "logprobs")
"""Fields of `DecodeConfig` that a measurement sets itself; the problems have the length."""


def _task(
    name: str,
    config: dx.DecodeConfig,
    *,
    problems: int | Problems = 500,
    seed: int = 0,
    batch: int = 100,
    chat: bool | None = None,
    loading: registry.Loading | None = None,
    loaded: tuple[Any, Any] | None = None,
    answers: list[Answer] | None = None,
    recording: Recording | None = None,
) -> Task:
    """The checked arguments of `evaluate` and its like, with the model loaded; see `Asked`."""
    for key in SET_HERE:
        if (value := getattr(config, key)) != DEFAULTS[key]:
            raise ValueError(
                f"{key}: expected {DEFAULTS[key]}, since a measurement sets it itself, got {shown(value)}"
            )
    if not isinstance(problems, Problems):
        problems = held_out(problems, seed)
    length = problems.length(name)
    whole("batch", batch, 1)
    template = registry.template_of(name, chat) if chat or loaded is None else None
    model, tokenizer = loaded or (loading or registry.Loading()).load(name)
    model = dx.models.for_decoding(model)
    encode = registry.encoder_of(name, model, tokenizer, template, length)
    in_chat = template is not None
    return Task(problems, name, model, tokenizer, encode, in_chat, length, batch, answers, recording)


@dataclass
class Totals:
    """Sums over all answers."""

    right: int = 0
    passes: int = 0
    tokens: int = 0
    """Tokens in front of the ends."""
    generated: int = 0
    began: float = field(default_factory=time.perf_counter)


def _result(
    task: Task,
    policy: str,
    config: Fields,
    totals: Totals,
    *,
    threshold: float | None = None,
    to_eos: int | None = None,
) -> dict[str, Any]:
    """The fields that all results have. to_eos: passes until the ends; default: all."""
    count = len(task.problems.prompts)
    return {
        "model": task.name,
        "policy": policy,
        "config": config,
        "threshold": threshold,
        **task.problems.description,
        "accuracy": ratio(totals.right, count),
        "accuracy_interval": wilson(totals.right, count),
        "nfe_mean": ratio(totals.passes, count),
        "nfe_to_eos": ratio(totals.passes if to_eos is None else to_eos, count),
        "tokens_per_forward": ratio(totals.tokens, totals.passes),
        "padded_tokens_per_forward": ratio(totals.generated, totals.passes),
        "seconds": round(time.perf_counter() - totals.began, 3),
        "gen_length": task.length,
        "chat": task.chat,
        **registry.conditions_of(task.model),
    }


class Encoded(NamedTuple):
    """A problem in a batch."""

    number: int
    """Its place among the problems."""
    prompt: Prompt
    ids: list[int]
    """Of the prompt."""


class Answer(NamedTuple):
    """The ids of a prompt and of its response; an autoregressive model's response without its end."""

    prompt: list[int]
    tokens: list[int]


def evaluate_drafter(
    model_name: str,
    drafter: str | None,
    *,
    draft_size: int | None = None,
    config: dx.DecodeConfig | None = None,
    **asked: Unpack[Asked],
) -> dict[str, Any]:
    """`evaluate` an autoregressive model, each answer to its end, with a drafter (None: plain).

    config: fields that `speculate` takes, except `SET_HERE`. asked: see `Asked`.

    Returns as `evaluate`: nfe_mean and nfe_to_eos are passes of the model per answer, tokens_per_forward
    counts the end among the tokens; policy is "plain" or the drafter's name, as it is given. Besides,
    draft_mean (drafts per answer), drafted and accepted (drafts that reached each depth, and drafts whose
    token there was the model's own), accepted_per_draft, and layers: the layers of the model run for a token,
    one after the other, as a share of all its layers.
    """
    config = config or dx.DecodeConfig()
    check_named(drafter)
    check_causal(vars(config))
    changed = drafter_fields(config, drafter, draft_size)
    task = _task(model_name, config, **asked)
    model = task.model
    drafts = layers = 0
    drafted, accepted = list[int](), list[int]()
    loaded_drafter = registry.load_drafter(drafter, model.device, model.dtype)
    size = draft_size
    if size is None and loaded_drafter is not None:
        size = loaded_drafter.most  # for reproducible passes
    config, totals = config.replace(gen_length=task.length, record=task.recording is not None), Totals()

    def decode(part: Sequence[Encoded]) -> dx.SpeculateOutput:
        seeded = _seeded(config, part)
        return dx.speculate(model, _ids(part), seeded, drafter=loaded_drafter, draft_size=size)

    how = settings_text(
        {"policy": f"{drafter} guesses ahead" if drafter else "a token a pass", "config": changed}
    )
    for _, out in _answered(decode, task, how, totals):
        drafts, layers = drafts + int(out.draft_nfe.sum()), layers + int(out.layers.sum())
        drafted, accepted = (
            [sum(pair) for pair in itertools.zip_longest(old, new.tolist(), fillvalue=0)]
            for old, new in ((drafted, out.drafted), (accepted, out.accepted))
        )
    totals.tokens = totals.generated
    return {
        **_result(task, drafter or PLAIN, changed, totals),
        "draft_mean": ratio(drafts, len(task.problems.prompts)),
        "drafted": drafted,
        "accepted": accepted,
        "accepted_per_draft": sum(accepted) / drafted[0] if drafted else 0.0,
        "layers": ratio(layers, totals.generated * model.shape.layers),
        "batch": task.batch,
    }


def check_named(drafter: Any) -> None:
    """Raise ValueError for a drafter without a name, by which a result could be known."""
    if not isinstance(drafter, str | None):
        raise ValueError(
            "drafter: expected a name, such as one of your own in dparallel_ext.speculation.NAMED, or None, "
            f"got {shown(drafter)}"
        )


def _answered(
    decode: Callable[[Sequence[Encoded]], Decoded],
    task: Task,
    how: str,
    totals: Totals,
    *,
    beyond_end: bool = False,
) -> Iterator[tuple[Sequence[Encoded], Decoded]]:
    """Decode the prompts in batches; yield each batch and its output, once it is in `totals`.

    how: the decoding in words, for the recording. beyond_end: the tokens behind the model's own ends are part
    of the answers.
    """
    recording, by_number = task.recording, dict[int, Answer]()
    for part in _batches(task):
        out = decode(part)
        responses, kept = [response.tolist() for response in out.responses], out.kept.tolist()
        if beyond_end:
            kept = [
                kept_of(response[: min(task.length, end)], task.model.eos_ids)
                for response, end in zip(responses, kept, strict=True)
            ]
        cut = [response[:count] for response, count in zip(responses, kept, strict=True)]
        texts = task.tokenizer.decode_batch(responses if beyond_end and task.problems.beyond_end else cut)
        each_answer = zip(part, responses if beyond_end else cut, strict=True)
        by_number |= {each.number: Answer(each.ids, tokens) for each, tokens in each_answer}
        right = [*map(task.problems.checker, (each.prompt.answer for each in part), texts)]
        totals.right += sum(right)
        totals.passes += int(out.nfe.sum())
        totals.tokens += sum(kept)
        # Without the rest of the last block, which a block-causal model fills.
        totals.generated += int(out.generated.clamp(max=task.length).sum())
        for i, each in enumerate(part):
            if recording is not None and each.number < RECORDED:
                note = "right" if right[i] else f"wrong, it is {each.prompt.answer[-80:]}"
                shown: Fields = {"model": task.name, "how": how, "length": task.length, "note": note}
                words = TokenTexts(task.tokenizer)
                recording.add(each.prompt.shown, answer_of(out, i, words, kept=kept[i], **shown))
        yield part, out
    if task.answers is not None:
        task.answers.extend(by_number[number] for number in range(len(by_number)))


def evaluate_adaptive(
    model_name: str,
    verifier: str,
    *,
    options: Fields | None = None,
    config: dx.DecodeConfig | None = None,
    **asked: Unpack[Asked],
) -> dict[str, Any]:
    """`evaluate` a diffusion model with a verifier, see `adaptive_decode`, each answer to its end.

    verifier: its name. options: mixture, window and lookahead, as far as they are given. config: the other
    fields, except `SET_HERE`. asked: see `Asked`.

    Returns as `evaluate`, with the verifier's name as policy: nfe_mean and nfe_to_eos are passes of the
    diffusion model per answer, to its end. Besides, verifier_mean: passes of the verifier per answer.
    """
    options, config = dict(options or {}), config or dx.DecodeConfig()
    changed = changed_fields(config) | options
    task = _task(model_name, config, **asked)
    model = task.model
    judge = registry.load_verifier(verifier, model, task.tokenizer)
    config = config.replace(gen_length=task.length, record=task.recording is not None)

    def decode(part: Sequence[Encoded]) -> dx.AdaptiveOutput:
        return dx.adaptive_decode(model, _ids(part), config=_seeded(config, part), verifier=judge, **options)

    how = settings_text({"policy": verifier, "config": changed})
    verified, totals = 0, Totals()
    for _, out in _answered(decode, task, how, totals):
        verified += int(out.verifier_nfe.sum())
    return {
        **_result(task, verifier, changed, totals),
        "verifier_mean": ratio(verified, len(task.problems.prompts)),
    }


def _ids(part: Sequence[Encoded]) -> list[list[int]]:
    return [each.ids for each in part]


def _seeded(config: dx.DecodeConfig, part: Sequence[Encoded]) -> dx.DecodeConfig:
    return with_seeds(config, [each.number for each in part])


def _batches(task: Task) -> Iterator[Sequence[Encoded]]:
    """At most `task.batch` problems at a time; problems of like lengths go together. A terminal shows how
    many are done."""
    prompts = enumerate(task.problems.prompts)
    encoded = [Encoded(number, prompt, task.encode(prompt.text)) for number, prompt in prompts]
    encoded.sort(key=lambda each: len(each.ids))
    bar = progress_bar(sys.stderr.isatty(), len(encoded), task.name, "problem", leave=False)
    for first in range(0, len(encoded), task.batch):
        part = encoded[first : first + task.batch]
        yield part
        if bar is not None:
            bar.update(len(part))
    if bar is not None:
        bar.close()


def kept_of(response: Sequence[int], eos_ids: Sequence[int]) -> int:
    """The number of tokens in front of the first end."""
    return next((at for at, id in enumerate(response) if id in eos_ids), len(response))


def passes_to_eos(steps: Tensor, nfe: Tensor, ends: Tensor, block_length: int, start: int = 0) -> Tensor:
    """(B,) int64: passes of each sequence until the block with its first EOS was complete; all without an
    EOS.

    steps: (B, R) of a `Trajectory`. nfe: (B,). ends: (B, R) bool, the places of EOS. start: the column of a
    block where the response begins.
    """
    if not steps.shape[1]:
        return nfe
    index = (torch.arange(steps.shape[1], device=steps.device) + start) // block_length  # (R,) of the block
    held = torch.where(ends.any(1), index[ends.int().argmax(1)], index[-1])[:, None]  # (B, 1)
    last = steps.masked_fill(index > held, 0).amax(1)
    # A rule that edits has passes that commit nothing before the next block begins.
    after = torch.where(index == held + 1, steps, nfe[:, None] + 1).amin(1) - 1
    return torch.where(held[:, 0] == index[-1], nfe, torch.maximum(last, after))


def drafter_fields(config: dx.DecodeConfig, drafter: str | None, size: int | None) -> dict[str, Any]:
    """The `config` of a result of `evaluate_drafter`: plain decoding has no size of a draft."""
    return changed_fields(config) | ({} if drafter is None or size is None else {"draft_size": size})


def drafted_by(size: int | None) -> dict[str, int]:
    """The entry of a row's config for a draft size."""
    return {"draft_size": size} if size else {}
