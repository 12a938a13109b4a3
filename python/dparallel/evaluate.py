"""Measures accuracy and passes over held-out problems of `tasks`, for models and policies."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.arguments import whole
from dparallel_ext.rules import ONE as ONE

from . import registry
from .configs import parse_policy
from .files import read_text
from .recording import Recording, answer_of
from .text import TokenTexts, prompt_encoder
from .toy import tasks

Output = TypeVar("Output", bound=dx.DecodeOutput)
Fields = Mapping[str, Any]
"""Fields of `DecodeConfig` by name, with a "rule" among them."""
VARIED = (
    *("rule", "block_length", "sub_block_length", "cache", "refresh"),
    *("active_blocks", "open_at", "activate_at", "draft_size"),
)
"""The fields that the rows of a table may differ in; `draft_size` is `decode`'s."""
ADAPTIVE = ("verifier", "mixture", "window", "lookahead")
"""The fields of a row for `adaptive_decode`: the verifier's name, and numbers."""


PLAIN = "plain"
"""The name of an autoregressive model's decoding without a drafter."""


def read_rows(file: str | Path) -> list[Fields]:
    """The rows of a table in a JSON file: a list of objects with a "rule" and other fields of `VARIED`, or
    with a "verifier" and other fields of `ADAPTIVE`.

    Raises FileNotFoundError, and ValueError naming the entry and the field that does not fit.
    """
    entries = _read_list("rows", file)
    for number, entry in enumerate(entries, 1):
        try:
            check_row(entry)
        except ValueError as error:
            raise ValueError(f"rows: {file}, entry {number}: {error}") from error
    return entries


def check_row(entry: Any) -> None:
    """Raise ValueError naming the field of a row that does not fit."""
    known = ADAPTIVE if isinstance(entry, Mapping) and "verifier" in entry else VARIED
    if not isinstance(entry, Mapping) or not isinstance(entry.get(known[0]), str):
        raise ValueError('expected an object with a "rule", or a "verifier", a text')
    if unknown := [name for name in entry if name not in known]:
        raise ValueError(f"expected fields of {list(known)}, got {unknown[0]!r}")
    if known is ADAPTIVE:
        dx.speculation.adaptive.check_numbers(**numbers_of(entry))
        return
    dx.DecodeConfig.from_dict(of_config(entry))
    if (size := entry.get("draft_size")) is not None:
        whole("draft_size", size, 0)


def of_config(entry: Fields) -> dict[str, Any]:
    """A row's fields of `DecodeConfig`."""
    return {name: value for name, value in entry.items() if name != "draft_size"}


def numbers_of(entry: Fields) -> dict[str, Any]:
    """The fields of a row for `adaptive_decode` without its verifier's name."""
    return {name: value for name, value in entry.items() if name != "verifier"}


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """The results that an earlier run wrote. Raises ValueError for a file that holds anything else."""
    rows = _read_list("json", file)
    if not all(isinstance(row, dict) and {"model", "policy", "accuracy"} <= row.keys() for row in rows):
        raise ValueError(f"json: {file} holds other things than results")
    return rows


def _read_list(argument: str, file: str | Path) -> list[Any]:
    text = read_text(argument, file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {file} is not JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{argument}: {file} holds a {type(content).__name__}, expected a list")
    return content


def evaluate(
    model_name: str,
    policy: str,
    *,
    config: dx.DecodeConfig | None = None,
    problems: int = 500,
    seed: int = 0,
    batch: int = 100,
    block_length: int | None = None,
    cache: str | None = None,
    mask_id: int | None = None,
    chat: bool | None = None,
    device: str | None = None,
    fp8: bool = False,
    draft_size: int | None = None,
    loaded: tuple[Any, Any] | None = None,
    answers: list[Answer] | None = None,
    recording: Recording | None = None,
) -> dict[str, Any]:
    """Decode `problems` held-out problems, the same for every call with one `seed`, and check the answers.

    Every sequence is decoded to its full length, so that numbers of passes can be compared. `policy` is the
    rule; `config` has all other fields but the length. `block_length` and `cache`: default the config's.
    `chat`: put problems into the checkpoint's chat template; default: if it has one. With `loaded`, a model
    and its tokenizer, there is no template unless `chat` is true, which takes that of `model_name`.
    `draft_size`: see `decode`. `answers`: a list that receives whole responses, in the order of the problems.
    `recording`: receives the answers to the first `RECORDED` problems.

    Returns model, policy, config (other fields that differ from the defaults), threshold, problems, seed,
    accuracy, accuracy_interval (Wilson's, 95 %), nfe_mean (passes per answer), nfe_to_eos (passes until the
    block that holds EOS, the model's `eos_id`, is complete, where `decode(eos_id=...)` would end),
    tokens_per_forward (tokens in front of EOS per pass), padded_tokens_per_forward (all gen_length tokens per
    pass), seconds, gen_length, block_length, cache, chat, fp8; with a draft_size canvases_mean, the copies of
    an answer that its passes computed.
    """
    threshold = parse_policy(policy).get("threshold")
    config = (config or dx.DecodeConfig()).with_rule(policy)
    if block_length is not None:
        config = config.replace(block_length=block_length)
    if cache is not None:
        config = config.replace(cache=cache)
    said = _said(config) | drafted_by(draft_size)
    config = config.replace(gen_length=tasks.GEN_LENGTH, record=True)
    for name, value, least in (("problems", problems, 0), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name}: expected a whole number >= {least}, got {value}")
    template = registry.template_of(model_name, chat) if chat or loaded is None else None
    model, tokenizer = loaded or registry.load(model_name, device=device, fp8=fp8, mask_id=mask_id)
    model = dx.models.for_decoding(model)
    dx.models.check_diffusion(model)
    groups = _groups(problems, seed, prompt_encoder(tokenizer, template))
    causal = dx.models.traits(model).block_length
    block = config.block_length or causal or 32
    correct = passes = canvases = to_eos = tokens = padded = 0
    found: dict[str, Answer] = {}
    began = time.perf_counter()
    for group in groups.values():
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            prompt = torch.tensor([ids for _, ids in part], device=model.device)
            out = dx.decode(model, prompt, config, draft_size=draft_size)
            responses = out.sequences[:, prompt.shape[1] :]
            texts = tokenizer.decode_batch(responses.tolist())
            correct += sum(tasks.is_correct(p, text) for (p, _), text in zip(part, texts, strict=True))
            found |= {
                p.prompt: Answer(ids, own) for (p, ids), own in zip(part, responses.tolist(), strict=True)
            }
            passes += int(out.nfe.sum())
            canvases += 0 if out.canvases is None else int(out.canvases.sum())
            tokens += kept_tokens(responses[:, : tasks.GEN_LENGTH], model.eos_id)
            assert out.trajectory is not None
            steps, ends = out.trajectory.step, responses == (-1 if model.eos_id is None else model.eos_id)
            to_eos += int(passes_to_eos(steps, out.nfe, ends, block, prompt.shape[1] if causal else 0).sum())
            padded += int(out.generated.sum())
            if recording is not None:
                ends = kept_of(responses[:, : tasks.GEN_LENGTH], model.eos_id)
                label_of = {"model": model_name, "how": label({"policy": policy, "config": said})}
                _record(recording, part, seed, texts, out, ends, tokenizer, **label_of)
    if answers is not None:
        answers += [found[p.prompt] for p in itertools.islice(tasks.problems("held_out", seed), problems)]
    of_drafts = {"canvases_mean": canvases / problems if problems else 0.0} if draft_size else {}
    return {
        **_judged(model_name, policy, said, problems, seed, correct, threshold),
        "nfe_mean": passes / problems if problems else 0.0,
        "nfe_to_eos": to_eos / problems if problems else 0.0,
        "tokens_per_forward": tokens / passes if passes else 0.0,
        "padded_tokens_per_forward": padded / passes if passes else 0.0,
        "seconds": round(time.perf_counter() - began, 3),
        "gen_length": tasks.GEN_LENGTH,
        "block_length": block,
        "cache": config.cache or "none",
        "chat": template is not None,
        "fp8": model.quantized,
        **of_drafts,
    }


def _judged(
    model_name: str,
    policy: str,
    said: Fields,
    problems: int,
    seed: int,
    correct: int,
    threshold: float | None = None,
) -> dict[str, Any]:
    """The fields that all results have: model, policy, settings, and the share of right answers."""
    return {
        "model": model_name,
        "policy": policy,
        "config": said,
        "threshold": threshold,
        "problems": problems,
        "seed": seed,
        "accuracy": correct / problems if problems else 0.0,
        "accuracy_interval": wilson(correct, problems),
    }


class Answer(NamedTuple):
    """The ids of a prompt and of its response; an autoregressive model's response without its end."""

    prompt: list[int]
    tokens: list[int]


def evaluate_drafter(
    model_name: str,
    drafter: str | None,
    *,
    draft_size: int | None = None,
    problems: int = 500,
    seed: int = 0,
    batch: int = 100,
    device: str | None = None,
    loaded: tuple[Any, Any] | None = None,
    answers: list[Answer] | None = None,
    recording: Recording | None = None,
) -> dict[str, Any]:
    """`evaluate` an autoregressive model, each answer to its end, with a drafter (None: plain).

    answers: a list that receives the answers, in the order of the problems. recording: see `evaluate`.

    Returns as `evaluate`: nfe_mean and nfe_to_eos are passes of the model per answer, tokens_per_forward
    counts the end among the tokens; policy is "plain" or the drafter's name, as it is given. Besides,
    draft_mean (drafts per answer), drafted and accepted (drafts that reached each depth, and those whose
    token there was the model's own), accepted_per_draft, and layers: the layers of the model run for a token,
    one after the other, as a share of all its layers.
    """
    model, tokenizer = loaded or registry.load(model_name, device=device)
    encode = prompt_encoder(tokenizer, registry.template_of(model_name))
    correct = passes = drafts = tokens = layers = 0
    drafted, accepted = [0] * 0, [0] * 0
    found: dict[str, Answer] = {}
    made = dx.speculation.drafter_of(drafter, model.device)
    size = made.most if made is not None and draft_size is None else draft_size  # for reproducible passes
    began = time.perf_counter()
    decode = functools.partial(
        dx.speculate,
        model,
        gen_length=tasks.GEN_LENGTH,
        drafter=made,
        draft_size=size,
        record=recording is not None,
    )
    how = f"{drafter} guesses ahead" if drafter else "a token a pass"
    noted = functools.partial(_record, recording, seed=seed, tokenizer=tokenizer, model=model_name, how=how)
    for out, right in _to_the_end(decode, _groups(problems, seed, encode), batch, tokenizer, found, noted):
        correct += right
        passes, drafts = passes + int(out.nfe.sum()), drafts + int(out.draft_nfe.sum())
        tokens, layers = tokens + int(out.generated.sum()), layers + int(out.layers.sum())
        drafted, accepted = (
            [sum(pair) for pair in itertools.zip_longest(old, new.tolist(), fillvalue=0)]
            for old, new in ((drafted, out.drafted), (accepted, out.accepted))
        )
    seconds = time.perf_counter() - began
    if answers is not None:
        answers += [found[p.prompt] for p in itertools.islice(tasks.problems("held_out", seed), problems)]
    said: Fields = {} if draft_size is None else {"draft_size": draft_size}
    return {
        **_judged(model_name, drafter or PLAIN, said, problems, seed, correct),
        "nfe_mean": passes / problems if problems else 0.0,
        "nfe_to_eos": passes / problems if problems else 0.0,
        "draft_mean": drafts / problems if problems else 0.0,
        "tokens_per_forward": tokens / passes if passes else 0.0,
        "padded_tokens_per_forward": tokens / passes if passes else 0.0,
        "drafted": drafted,
        "accepted": accepted,
        "accepted_per_draft": sum(accepted) / drafted[0] if drafted else 0.0,
        "layers": layers / (tokens * model.shape.layers) if tokens else 0.0,
        "seconds": round(seconds, 3),
        "gen_length": tasks.GEN_LENGTH,
        "batch": batch,
    }


def _to_the_end(
    decode: Callable[[list[list[int]]], Output],
    groups: Mapping[int, list[tuple[tasks.Problem, list[int]]]],
    batch: int,
    tokenizer: Any,
    found: dict[str, Answer],
    noted: Callable[..., None],
) -> Iterator[tuple[Output, int]]:
    """Decode the prompts in batches; yield each batch's output, and how many of its answers are right.

    found: receives the answers, by prompt. noted: `_record` with all arguments but those about the batch.
    """
    for group in groups.values():
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            out = decode([ids for _, ids in part])
            kept = [r[:n].tolist() for r, n in zip(out.responses, out.kept.tolist(), strict=True)]
            texts = tokenizer.decode_batch(kept)
            found |= {p.prompt: Answer(ids, own) for (p, ids), own in zip(part, kept, strict=True)}
            noted(part=part, answers=texts, out=out, kept=out.kept.tolist())
            yield out, sum(tasks.is_correct(p, text) for (p, _), text in zip(part, texts, strict=True))


def evaluate_adaptive(
    model_name: str,
    verifier: str,
    *,
    numbers: Fields | None = None,
    config: dx.DecodeConfig | None = None,
    problems: int = 500,
    seed: int = 0,
    batch: int = 100,
    mask_id: int | None = None,
    chat: bool | None = None,
    device: str | None = None,
    fp8: bool = False,
    loaded: tuple[Any, Any] | None = None,
    recording: Recording | None = None,
) -> dict[str, Any]:
    """`evaluate` a diffusion model with a verifier, see `adaptive_decode`, each answer to its end.

    verifier: its name. numbers: mixture, window and lookahead, as far as they are given. config: the other
    fields. The other arguments are those of `evaluate`.

    Returns as `evaluate`, with the verifier's name as policy: nfe_mean and nfe_to_eos are passes of the
    diffusion model per answer, to its end. Besides, verifier_mean: passes of the verifier per answer.
    """
    numbers, config = dict(numbers or {}), config or dx.DecodeConfig()
    said = _said(config) | numbers
    model, tokenizer = loaded or registry.load(model_name, device=device, fp8=fp8, mask_id=mask_id)
    judge = registry.load_verifier(verifier, model, tokenizer)
    template = registry.template_of(model_name, chat)
    config = config.replace(gen_length=tasks.GEN_LENGTH, record=recording is not None)
    decode = functools.partial(dx.adaptive_decode, model, config=config, verifier=judge, **numbers)
    how = label({"policy": verifier, "config": said})
    noted = functools.partial(_record, recording, seed=seed, tokenizer=tokenizer, model=model_name, how=how)
    groups = _groups(problems, seed, prompt_encoder(tokenizer, template))
    correct = passes = verified = tokens = kept = 0
    began = time.perf_counter()
    for out, right in _to_the_end(decode, groups, batch, tokenizer, {}, noted):
        correct, passes = correct + right, passes + int(out.nfe.sum())
        verified += int(out.verifier_nfe.sum())
        tokens, kept = tokens + int(out.generated.sum()), kept + int(out.kept.sum())
    return {
        **_judged(model_name, verifier, said, problems, seed, correct),
        "nfe_mean": passes / problems if problems else 0.0,
        "nfe_to_eos": passes / problems if problems else 0.0,
        "verifier_mean": verified / problems if problems else 0.0,
        "tokens_per_forward": kept / passes if passes else 0.0,
        "padded_tokens_per_forward": tokens / passes if passes else 0.0,
        "seconds": round(time.perf_counter() - began, 3),
        "gen_length": tasks.GEN_LENGTH,
        "chat": template is not None,
        "fp8": model.quantized,
    }


RECORDED = 3
"""Problems of a recording."""


def _record(
    recording: Recording | None,
    part: Sequence[tuple[tasks.Problem, list[int]]],
    seed: int,
    answers: Sequence[str],
    out: dx.DecodeOutput,
    kept: Sequence[int],
    tokenizer: Any,
    **said: Any,
) -> None:
    """Add a batch's answers to the first problems to the recording; `said`: arguments of `answer_of`."""
    if recording is None:
        return
    first = {problem.prompt for problem in itertools.islice(tasks.problems("held_out", seed), RECORDED)}
    texts = TokenTexts(tokenizer)
    for i, ((problem, _), answer) in enumerate(zip(part, answers, strict=True)):
        if problem.prompt in first:
            note = "right" if tasks.is_correct(problem, answer) else f"wrong, it is {problem.answer}"
            found = answer_of(out, i, texts, kept=kept[i], length=tasks.GEN_LENGTH, note=note, **said)
            recording.add(problem.prompt, found)


def _groups(problems: int, seed: int, encode: Any) -> dict[int, list[tuple[tasks.Problem, list[int]]]]:
    """Number of ids -> the held-out problems whose prompts have as many, with these ids."""
    groups: dict[int, list[tuple[tasks.Problem, list[int]]]] = {}
    for problem in itertools.islice(tasks.problems("held_out", seed), problems):
        ids = encode(problem.prompt)
        groups.setdefault(len(ids), []).append((problem, ids))
    return groups


def report(row: Mapping[str, Any]) -> str:
    """A result's drafted and accepted tokens by position, as text."""
    lines = ["position   drafted  accepted   share  of all"]
    first = row["drafted"][0] if row["drafted"] else 0
    for at, (asked, taken) in enumerate(zip(row["drafted"], row["accepted"], strict=True), 1):
        lines.append(f"{at:>8} {asked:>9} {taken:>9} {taken / asked:>7.1%} {taken / first:>7.1%}")
    without = row["accepted_per_draft"]
    lines.append(
        f"tokens of a draft that are accepted: {without:.2f}; with the pass's own token {without + 1:.2f}"
    )
    asked, taken = sum(row["drafted"]), sum(row["accepted"])
    lines.append(f"share of drafted tokens that are accepted: {taken / max(1, asked):.1%}")
    if "layers" in row:
        lines.append(f"layers of the model run for a token: {row['layers']:.3f} of all")
    if row.get("same_texts") is not None:
        tokens, gaps = row["nfe_mean"] * row["tokens_per_forward"] * row["problems"], row["gaps"]
        lines.append(f"texts equal to plain decoding's: {row['same_texts']} of {row['problems']}")
        if gaps:
            lines.append(
                f"the others differ first where the two best logits are {gaps[0]:g} to {gaps[-1]:g} apart, "
                f"{len(gaps) / tokens * 10_000:.2f} times in 10,000 tokens"
            )
    return "\n".join(lines)


def kept_tokens(responses: Tensor, eos_id: int | None) -> int:
    """The number of tokens in front of EOS, over all responses (B, R) int64."""
    return sum(kept_of(responses, eos_id))


def kept_of(responses: Tensor, eos_id: int | None) -> list[int]:
    """The number of tokens in front of EOS, for each response (B, R) int64."""
    found: list[int] = (responses == (-1 if eos_id is None else eos_id)).cumsum(1).eq(0).sum(1).tolist()
    return found


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


def sweep(
    names: Iterable[str],
    policies: Iterable[str | Fields],
    known: Iterable[dict[str, Any]] = (),
    *,
    drafters: Iterable[str] = (PLAIN, "ngram"),
    draft_size: int | None = None,
    config: dx.DecodeConfig | None = None,
    recording: Recording | None = None,
    **settings: Any,
) -> Iterable[dict[str, Any]]:
    """Run `evaluate` for every model and policy (`evaluate_adaptive` for a row with a verifier), and
    `evaluate_drafter` for every autoregressive model and drafter; load each model once, and yield each
    result.

    policies: texts, or the fields of a row. drafters: "plain" for none. draft_size: for the drafters; if all
    models are diffusion models, `decode`'s for every policy without one; such a result has same_texts, the
    number of responses equal to the same policy's without it. known: results of an earlier run, which are not
    measured again. recording: see `evaluate`.
    """
    entries = [{"rule": each} if isinstance(each, str) else each for each in policies]
    for entry in entries:
        if "verifier" not in entry:
            parse_policy(entry["rule"])
        check_row(entry)
    found = {_key(row): row for row in known}
    of_all = {name: settings.pop(name, None) for name in ("block_length", "cache")}
    for_all = {name: value for name, value in of_all.items() if value is not None}
    names = list(names)
    of_policies = None if any(registry.is_causal(name) for name in names) else draft_size
    for name in names:
        options = {key: settings[key] for key in ("device", "fp8", "mask_id") if key in settings}
        if registry.is_causal(name):
            shared = {key: value for key, value in settings.items() if key in ("problems", "seed", "batch")}
            yield from _drafted(name, drafters, draft_size, found, options.get("device"), shared, recording)
            continue
        settings = {**settings, "chat": registry.template_of(name, settings.get("chat")) is not None}
        loaded: tuple[Any, Any] | None = None
        more: dict[str, Any]
        plain: dict[dx.DecodeConfig, list[Answer]] = {}
        for entry in entries:
            if "verifier" in entry:
                of_row = (config or dx.DecodeConfig()).with_rule(None).replace(**for_all)
                judge, numbers = str(entry["verifier"]), numbers_of(entry)
                asked = {"model": name, "policy": judge, "config": _said(of_row) | numbers, **settings}
                row = found.get(_key(asked))
                if row is None:
                    loaded = loaded or registry.load(name, **options)
                    more = {"loaded": loaded, "recording": recording}
                    row = evaluate_adaptive(name, judge, numbers=numbers, config=of_row, **more, **settings)
                yield row
                continue
            text = str(entry["rule"])
            size: Any = entry.get("draft_size", of_policies)
            of_row = (config or dx.DecodeConfig()).with_rule(text).replace(**{**for_all, **of_config(entry)})
            asked = {"model": name, "policy": text, "config": _said(of_row) | drafted_by(size), **settings}
            row = found.get(_key(asked))
            if row is None:
                loaded = loaded or registry.load(name, **options)
                answers: list[Answer] = []
                more = {"draft_size": size, "loaded": loaded, "answers": answers}
                more["recording"] = recording
                row = evaluate(name, text, config=of_row, **more, **settings)
                if not size:
                    plain[of_row] = answers
                elif of_row not in plain and _key({**asked, "config": _said(of_row)}) in found:
                    # That row is of an earlier run, whose texts are gone.
                    again = {**more, "draft_size": None, "answers": plain.setdefault(of_row, [])}
                    evaluate(name, text, config=of_row, **again, **settings)
                if size and of_row in plain:
                    row["same_texts"] = sum(map(operator.eq, plain[of_row], answers))
            yield row


def _drafted(
    name: str,
    drafters: Iterable[str],
    draft_size: int | None,
    known: Mapping[str, dict[str, Any]],
    device: str | None,
    settings: Mapping[str, Any],
    recording: Recording | None = None,
) -> Iterable[dict[str, Any]]:
    """The rows of an autoregressive model."""
    loaded: tuple[Any, Any] | None = None
    sized = {} if draft_size is None else {"draft_size": draft_size}
    plain: list[Answer] = []
    compares = False
    for drafter in drafters:
        compares |= drafter == PLAIN
        row = known.get(_key({"model": name, "policy": drafter, "config": sized, **settings}))
        if row is None:
            loaded = loaded or registry.load(name, device=device)
            given, answers = None if drafter == PLAIN else drafter, list[Answer]()
            more: dict[str, Any] = {"loaded": loaded, "answers": answers, "recording": recording}
            row = evaluate_drafter(name, given, draft_size=draft_size, **more, **settings)
            if drafter == PLAIN:
                plain = answers
            elif compares and not plain:  # its row is of an earlier run, whose texts are gone
                again = {**more, "answers": plain}
                evaluate_drafter(name, None, draft_size=draft_size, **again, **settings)
            if plain:
                row |= compared(loaded[0], plain, answers)
        yield row


def compared(model: Any, plain: Sequence[Answer], drafted: Sequence[Answer]) -> dict[str, Any]:
    """same_texts: the number of answers equal to plain decoding's. gaps: for the others, the difference of
    the two best logits where they differ first, since rounding may choose either of two that are near."""
    gaps = []
    for one, other in zip(plain, drafted, strict=True):
        if one == other:
            continue
        pairs = enumerate(itertools.zip_longest(one.tokens, other.tokens))
        at = next(i for i, (a, b) in pairs if a != b)
        with torch.inference_mode():
            ids = torch.tensor([one.prompt + one.tokens[:at]], device=model.device)
            best = model(ids).logits[0, -1].float().topk(2).values
        gaps.append(round(float(best[0] - best[1]), 5))
    return {"same_texts": len(plain) - len(gaps), "gaps": sorted(gaps)}


def drafted_by(size: int | None) -> dict[str, int]:
    """The entry of a row's config for a draft size."""
    return {"draft_size": size} if size else {}


def _said(config: dx.DecodeConfig) -> dict[str, Any]:
    """The fields that differ from the defaults, in JSON's types, without rule and length."""
    own, defaults = config.with_rule(None).to_dict(), dx.DecodeConfig().to_dict()
    return {name: own[name] for name in own if own[name] != defaults[name] and name != "gen_length"}


def _key(row: Mapping[str, Any]) -> str:
    """A key of all settings that a result depends on."""
    defaults = {"config": {}, "problems": 500, "seed": 0, "chat": False, "fp8": False}
    known = {**defaults, **row}
    return json.dumps([known[name] for name in ("model", "policy", *defaults)], sort_keys=True)


def wilson(right: int, trials: int) -> list[float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    if not trials:
        return [0.0, 1.0]
    z, share = 1.959964, right / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def aup(rows: Iterable[dict[str, Any]], best: float) -> float:
    """Accuracy under parallelism of one model's rows (d3LLM, arXiv 2601.07568).

    The area under accuracy (in %) against padded tokens per pass, from the slowest row on, each accuracy y
    weighted min(exp(-3 (1 - y / best)), 1); rows more than 5 points below the slowest are left out.
    `best`: the highest accuracy (0 to 1) of all models that are compared.
    """
    points = sorted((row["padded_tokens_per_forward"], 100 * row["accuracy"]) for row in rows)
    points = [(x, y) for x, y in points if y >= points[0][1] - 5]
    if not points or best <= 0:
        return 0.0
    weighted = [(x, y * min(math.exp(-3 * (1 - y / (100 * best))), 1.0)) for x, y in points]
    area = points[0][0] * points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(weighted):
        area += (x1 - x0) * (y0 + y1) / 2
    return area


HEADING = (
    f"{'model':<15} {'policy':<23} {'accuracy':>8} {'passes':>6} {'to EOS':>7} {'tok/pass':>8} {'seconds':>7}"
)


def label(row: Mapping[str, Any]) -> str:
    """A result's policy, and the other fields of its config, as text."""
    said = ", ".join(f"{name} {value}" for name, value in row.get("config", {}).items())
    return str(row["policy"]) + (f", {said}" if said else "")


def line(row: Mapping[str, Any]) -> str:
    """A result as a line under HEADING."""
    return (
        f"{row['model']:<15} {label(row):<23} {row['accuracy']:>8.1%} {row['nfe_mean']:>6.1f} "
        f"{row['nfe_to_eos']:>7.1f} {row['tokens_per_forward']:>8.2f} {row['seconds']:>7.1f}"
    )


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Results as tables in Markdown: of policies, and of drafters."""
    rows = list(rows)
    drafted = [row for row in rows if "drafted" in row]
    others = [row for row in rows if "drafted" not in row]
    return "\n".join(make(part) for make, part in ((_policies, others), (_drafters, drafted)) if part)


def _drafters(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| model | drafter | problems | accuracy | texts as plain | passes | drafts | tokens a pass | "
        "accepted of a draft | seconds |",
        "|--|--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        same = "" if row.get("same_texts") is None else f"{row['same_texts']:,}"
        drafts, accepted = f"{row['draft_mean']:.2f}", f"{row['accepted_per_draft']:.2f}"
        if not row["drafted"]:
            drafts = accepted = ""
        lines.append(
            f"| {row['model'].removeprefix('builtin:')} | `{label(row)}` | {row['problems']} "
            f"| {row['accuracy']:.1%} | {same} | {row['nfe_mean']:.2f} | {drafts} "
            f"| {row['tokens_per_forward']:.2f} | {accepted} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _policies(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    guessed = any("canvases_mean" in row for row in rows)
    verified = any("verifier_mean" in row for row in rows)
    lines = [
        "| model | rule | problems | accuracy | 95 % interval | passes | to EOS | tokens a pass to EOS |",
        "|--|--|--:|--:|--|--:|--:|--:|",
    ]
    if guessed:
        lines = [lines[0] + " canvases | texts as without |", lines[1] + "--:|--:|"]
    if verified:
        lines = [lines[0] + " verifier's passes |", lines[1] + "--:|"]
    for row in rows:
        low, high = row["accuracy_interval"]
        rule = f"`{row['policy']}`" + label(row).removeprefix(row["policy"])
        to_eos = ["", ""]
        if row.get("nfe_to_eos"):
            tokens = row["tokens_per_forward"] * row["nfe_mean"]
            to_eos = [f"{row['nfe_to_eos']:.2f}", f"{tokens / row['nfe_to_eos']:.2f}"]
        lines.append(
            f"| {row['model'].removeprefix('builtin:')} | {rule} | {row['problems']} | {row['accuracy']:.1%} "
            f"| {low:.1%} to {high:.1%} | {row['nfe_mean']:.2f} | {' | '.join(to_eos)} |"
        )
        if guessed:
            same = "" if row.get("same_texts") is None else f"{row['same_texts']:,}"
            lines[-1] += f" {row.get('canvases_mean', row['nfe_mean']):.2f} | {same} |"
        if verified:
            lines[-1] += f" {row['verifier_mean']:.2f} |" if "verifier_mean" in row else "  |"
    return "\n".join(lines) + "\n"
