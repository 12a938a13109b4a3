"""How prompts are decoded, as one object, which `decode`, an engine's requests and the server take alike."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from .. import policies
from ..arguments import one_of, shown, temperature_in_force
from ..automaton import Automaton
from ..ops.inputs import check_sampling
from ..rules import Function, FunctionRule, Rule, parse
from ..rules.protocol import check_rule
from ..rules.spec import row_of, text_of
from .fields import CHECKS
from .schedule import CACHES

F = TypeVar("F", bound=Callable[..., Any])


class DecodeKeywords(TypedDict, total=False):
    """The fields of `DecodeConfig` as keywords; their meanings are there."""

    gen_length: int | Sequence[int] | Tensor
    infill: bool
    block_length: int | None
    sub_block_length: int | None
    steps: int | None
    threshold: policies.Number | None
    selector: policies.Name | None
    policy: Tensor | Sequence[Sequence[float | None]] | Function | None
    rule: Rule | Function | str | None
    automaton: Automaton | None
    min_commit: policies.Number
    max_commit: policies.Number | None
    score: policies.Name | None
    cache: str | None
    refresh: int | None
    active_blocks: int
    open_at: float
    activate_at: float
    batch_invariant: bool
    graphs: bool
    temperature: float
    top_p: float | None
    top_k: int | None
    suppress: Sequence[int] | Tensor | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    mask_id: int | None
    eos_id: int | Sequence[int] | Tensor | None
    stop: Sequence[Sequence[int]]
    seed: int | Sequence[int] | Tensor | None
    record: bool
    logprobs: bool
    top_logprobs: int


@dataclass(frozen=True, repr=False)
class DecodeConfig:
    """How prompts are decoded: the keywords of `decode`, checked, in one object that does not change.

    It goes to `decode(model, prompt, config)`, `Engine(model, config)` and `engine.submit(prompt, config)`;
    keywords beside it replace its fields. Where a field says "one per sequence", it is one value for all
    prompts of the call, or as many as there are prompts, in a list, an array or a tensor. Lists, arrays and
    tensors are kept as tuples, so that configs compare by value, can be hashed, and stay what they are
    whatever becomes of the tensors. (A rule or a function is compared as it compares itself.)

    Raises ValueError naming the field that does not fit; the call checks what depends on model and prompts.
    """

    gen_length: int | Sequence[int] | Tensor = 256
    """Tokens to decode, one number or one per sequence; the last block is shorter where block_length does not
    divide it. Block-causal models whose blocks count from position 0 fill the last block to its end. Beyond
    the positions that the model's config names there is a warning."""
    infill: bool = False
    """Fill the prompt's mask tokens too, between given tokens, whether few are missing or most of a response
    (a warm start); `gen_length` may be 0. Blocks count from the first mask; blocks without a mask are left
    out. Given tokens never change. The response, and the columns of a trajectory, are the places that held
    masks, in order. Only the last run of masks is searched for `eos_id` and `stop`: nothing ends in front of
    a given token that more masks follow, and the masks behind an end become padding. A streamer gets the
    tokens in front of the first mask as its prompt, then given and decoded tokens in order. A block-causal
    model's blocks in front of the first mask are prefilled; later blocks without a mask are computed with the
    next block that has one; with gen_length 0 its last block stays as short as the prompt leaves it."""
    block_length: int | None = None
    """Tokens of a block; blocks are decoded left to right. None: the model's own, where it is block-causal
    (blocks count from position 0) or has a window (of at most 64 masks), else 32. Block-causal models of ours
    attend by the blocks that are asked for, as in SDAR's published loop. A2D's attend by blocks with cache
    "block" alone; there, and in every model that is not block-causal, blocks count from the first mask."""
    sub_block_length: int | None = None
    """A divisor of block_length: of each block, the leftmost part of this length that has masks is filled
    first, the rest waits. None: the model's own (Fast-dLLM v2), else block_length."""
    steps: int | None = None
    """With `threshold` None, the fixed schedule (LLaDA): passes in all, the same number for each block, each
    committing its share of the block. None: one token a pass. Not with sub-blocks."""
    threshold: policies.Number | None = None
    """The selector's parameter, one per sequence; see `policies`. None: the fixed schedule."""
    selector: policies.Name | None = None
    """The statistic or rule that `threshold` belongs to, one per sequence; None: "entropy" (dParallel)."""
    policy: Tensor | Sequence[Sequence[float | None]] | Function | None = None
    """Instead of threshold, selector, steps, min_commit, max_commit and score: rows (B, 5) float32 as
    `policies.make` makes them (None for a max_commit without limit); or a function, as `rule`."""
    rule: Rule | Function | str | None = None
    """The rule that decides beside or instead of the policy, see `rules`: a `rules.Rule`; its name, such as
    "credit", "sched:7.5" or "credit+confidence:0.8", whose part after the plus sign, like "entropy:0.5"
    alone, stands for selector and threshold; or a function (stats, masked, step) -> bool (W, C) over
    the columns of the windows, instead of a policy. Only masked positions commit, and at least one of
    them."""
    automaton: Automaton | None = None
    """The form of the response, which `dparallel.structured` makes of a regular expression or a JSON schema.
    The response has it, and ends within gen_length tokens if any of the form does. A diffusion model fills a
    block's masks in the most probable way that has the form (DINGO, arXiv 2505.23061), and the policy judges
    tokens among the tokens that the form allows there; it needs temperature 0, no rule, no `infill` and one
    open block. An autoregressive model chooses or samples each token among the tokens that the form
    allows."""
    min_commit: policies.Number = 1
    """With a `threshold`, the fewest tokens that a pass commits, at least 1; one per sequence."""
    max_commit: policies.Number | None = None
    """With a `threshold`, the most tokens that a pass commits, one per sequence; None: no limit."""
    score: policies.Name | None = None
    """The score that "quota" and the fixed schedule rank by, one per sequence: "confidence", "entropy" or
    "margin". None, as published: entropy for the fixed schedule with cache "prefix" or "dual", else
    confidence."""
    cache: str | None = None
    """"none", the whole sequence each pass; for our models also "prefix" (one full pass per block, then from
    the block on), "dual" (one full pass per block, then the block alone), and for block-causal models "block"
    (each pass the block alone; finished blocks are exact). There, with sub-blocks, "dual" works inside the
    block: a pass over all of it until the sub-block's first token is known, then over the sub-block alone
    (Fast-dLLM v2's sub-block cache). A2D's models are decoded as block-causal models (BD3LM) with "block",
    and see both ways (MDLM) with the other modes. None: in `decode` "none", in an engine "block" for
    block-causal models and "dual" for others, A2D's among them. Nemotron-Labs-Diffusion has "block" alone,
    which an engine must be told: by default it decodes that model autoregressively. A model with a
    `prompt_block` (D2F's adapters, see `models.Traits`) has "block" alone, too. WeDLM and SDLM have
    "window" alone: passes fill the first `block_length` masks, wherever blocks end, without `infill`,
    `automaton`, `steps` and rules that read more than those masks; SDLM's passes commit the longest run, from
    the first mask on, of tokens that a policy row chooses, and take no other rule."""
    refresh: int | None = None
    """With cache "dual", a full pass every `refresh` passes over a block, so that no entry grows stale."""
    active_blocks: int = 1
    """Blocks of a sequence that passes may fill at once (d3LLM, arXiv 2601.07568; D2F, 2508.09192). With more
    than one, the next block opens once `open_at` of the last open block is decoded; a pass need commit
    nothing in a block behind the front block until `activate_at` of the block before it is decoded. Needs a
    threshold or a rule that says how much a pass commits; not with sub-blocks, nor with rules that edit or
    that read the whole response: `decode` refuses such rules, and in an engine such a request has one block
    open."""
    open_at: float = 0.1
    """With several active blocks: the share of a block's masks, from 0 to 1."""
    activate_at: float = 0.95
    """With several active blocks: the share of a block's masks, from 0 to 1."""
    batch_invariant: bool = False
    """Each sequence in passes of its own, so that it comes out to the bit as alone, in `speculate` with the
    same drafts. In shared passes the matrix library may round the same row otherwise in another batch."""
    graphs: bool = True
    """On a GPU, passes of our models are recorded as CUDA graphs and replayed. The tokens are the same
    without; nothing is recorded where a layer has hooks or adapters, or experts for which the host waits
    (`Model.waits`). Recordings stay with the model for the next calls of about this length and batch size, at
    most four and 1 GB of keys and values, until it is trained, moved or deleted."""
    temperature: float = 0.0
    """0, or anything below 1e-5, is greedy; above, tokens are Gumbel-max samples of softmax(logits / T). A T
    above 2^100 (1.3e30) counts as 2^100."""
    top_p: float | None = None
    """Nucleus sampling: an id may be sampled if the ids more probable than it, by softmax(logits / T), have
    at most `top_p` of the probability; None and 1.0 leave nothing out. Whatever temperature, top_p and top_k
    are, the rule judges the statistics of softmax(logits), with the sampled token's probability there as its
    confidence. Not read where temperature is 0."""
    top_k: int | None = None
    """The most ids that may be sampled, the most probable ones; None and 0 leave nothing out. Not read where
    temperature is 0."""
    suppress: Sequence[int] | Tensor | None = None
    """Ids (n,) never to be decoded, left out of the softmax."""
    repetition_penalty: float | None = None
    """Of an autoregressive model, as transformers': the logit of a token that prompt or response already have
    is divided by it where positive, multiplied where negative (CTRL, arXiv 1909.05858). 0.01 to 100. None:
    that of its generation_config.json, as in `generate`, else 1, which changes nothing."""
    presence_penalty: float = 0.0
    """As OpenAI's: taken from the logit of a token that the response already has. -2 to 2."""
    frequency_penalty: float = 0.0
    """As OpenAI's: taken from it once for each time. -2 to 2."""
    mask_id: int | None = None
    """The mask token; None: the model's `mask_token_id`."""
    eos_id: int | Sequence[int] | Tensor | None = None
    """The end token, or several, as transformers' `eos_token_id`; a model's own are its `eos_ids`. A sequence
    ends once it holds any of them with no mask in front: the masks behind it, in its block and in later ones,
    are filled with the first of `eos_id` and not computed. The tokens in front of it are the tokens of a
    decode that goes on. None, as published: every block is decoded; for an autoregressive model, None stands
    for all of its own end tokens. -1: no end token, whatever the model's own."""
    stop: Sequence[Sequence[int]] = ()
    """Sequences of token ids; each ends a response, wherever it lies in it, as eos_id does, but only once the
    block in which it ends is complete."""
    seed: int | Sequence[int] | Tensor | None = None
    """Of the samples. With one number, sequence b's samples are keyed by (seed, b); with one per sequence,
    and in an engine, by the sequence's own seed alone. None: a number from torch's generator, so that two
    calls differ and `torch.manual_seed` repeats them; nothing is drawn from it where temperature is 0."""
    record: bool = False
    """Keep `DecodeOutput.trajectory`, and in `speculate` `SpeculateOutput.passes`; not in an engine."""
    logprobs: bool = False
    """Keep the log-probabilities: of each token log softmax(logits / T)[token] over the ids that could be
    drawn in the pass that committed it (not the mask token, `suppress`, nor what top_p and top_k leave out);
    where temperature is 0, log softmax(logits)[token]. In reinforcement learning they are the
    log-probabilities of the behaviour policy, given the positions that the rule chose: a token's importance
    ratio is exp(new - logprobs), where `new` is the same of the trained model in the same state (the tokens
    of an earlier `trajectory.step`, masks elsewhere; a pass against a cache saw older keys and values, so
    that cache "none" or "block" is what can be reproduced)."""
    top_logprobs: int = 0
    """With `logprobs`: keep the log-probabilities of so many of the most probable tokens of each place too, 0
    to 20, in the same pass and of the same ids."""

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, check(name, value))
            except RuntimeError as error:  # of a tensor on "meta"
                raise ValueError(f"{name}: expected values, got {shown(value)}") from error
        check_sampling(self.temperature, self.top_p, self.top_k)
        if self.cache is not None:
            one_of("cache", self.cache, CACHES)
        if self.refresh is not None and self.cache not in (None, "dual"):
            raise ValueError(f'refresh: belongs to cache "dual", got cache={self.cache!r}')
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs: belongs to logprobs=True, got {self.top_logprobs} without it")
        size, part = self.block_length, self.sub_block_length
        if size is not None and part is not None and size % part:
            raise ValueError(f"sub_block_length: expected a divisor of block_length {size}, got {part}")
        lengths = {
            name: len(value)
            for name in PER_SEQUENCE_FIELDS
            if isinstance(value := getattr(self, name), tuple)
        }
        for name, count in lengths.items():
            first, expected = next(iter(lengths.items()))
            if count != expected:
                raise ValueError(
                    f"{name}: expected one value or {expected}, as many as {first} has, got {count}"
                )
        decider(self, next(iter(lengths.values()), 1), self.cache or "none")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens of `eos_id`."""
        ids: Any = self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)
        return () if ids in ((None,), (-1,)) else ids

    def __repr__(self) -> str:
        """As a call, without the fields that have their defaults."""
        changed = [f"{name}={value!r}" for name, value in vars(self).items() if value != DEFAULTS[name]]
        return f"DecodeConfig({', '.join(changed)})"

    def replace(self, **changes: Unpack[DecodeKeywords]) -> DecodeConfig:
        """A copy with other values of the fields that are named."""
        return configured("replace", self, changes)

    def with_rule(self, rule: Rule | Function | str | None, **changes: Any) -> DecodeConfig:
        """A copy with another rule, which decides alone: the fields for a policy are reset.

        changes: other fields, as for `replace`.
        """
        decides = {**dict.fromkeys(POLICY_FIELDS), "min_commit": 1, "policy": None, "rule": rule}
        return configured("with_rule", self, {**decides, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields in JSON's types, for `from_dict`; a rule becomes its text.

        Raises ValueError for a function, and for a rule that no text stands for.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.policy, tuple):
            values["policy"] = [
                [None if value == math.inf else value for value in row] for row in self.policy
            ]
        elif self.policy is not None:
            raise ValueError("policy: a function cannot be written, give rows or a rule with a name")
        if self.automaton is not None:
            raise ValueError("automaton: cannot be written")
        if self.rule is not None and not isinstance(self.rule, str):
            values["rule"] = text_of(self.rule, own_row=not _non_default(_row_of(self)))
        return {name: _listed(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DecodeConfig:
        """The config with these fields, as `to_dict` returns them; fields left out have their defaults.
        Raises ValueError naming the field that does not fit."""
        if not isinstance(content, Mapping):
            raise ValueError(f"config: expected fields by name, got {type(content).__name__}")
        for name in content:
            if name not in DEFAULTS:
                raise ValueError(
                    f"config: expected fields of DecodeConfig, got {shown(name)}{_nearest(name)}"
                )
        return cls(**content)


DEFAULTS = {field.name: field.default for field in fields(DecodeConfig)}
POLICY_FIELDS = ("threshold", "selector", "steps", "max_commit", "score")
"""Fields that, with `min_commit`, make a sequence's policy row; None: not given."""
ACTIVE_BLOCK_FIELDS = ("active_blocks", "open_at", "activate_at")
"""Fields for several open blocks."""
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields for autoregressive models, in the order of `sequence_settings.Penalties`."""
ENGINE_FIELDS = (
    *("cache", "block_length", "sub_block_length", "refresh", "batch_invariant", "graphs", "mask_id"),
    *ACTIVE_BLOCK_FIELDS,
)
"""Fields that all requests of an engine share."""
OTHER_LIBRARIES = {
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_gen_len", "max_completion_tokens"), "gen_length"),
    **dict.fromkeys(("eos_token_id", "eos_token_ids", "eos_early_stop"), "eos_id"),
    **dict.fromkeys(("stop_token", "stop_token_ids", "stopping_criteria_idx"), "eos_id"),
    **dict.fromkeys(("stop_strings", "stopping_criteria"), "stop"),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "logits_eos_inf"), "suppress"),
    **dict.fromkeys(("do_sample", "temp"), "temperature"),
    **dict.fromkeys(("num_steps", "diffusion_steps", "num_diffusion_steps", "denoising_steps"), "steps"),
    **dict.fromkeys(("confidence_threshold", "entropy_threshold"), "threshold"),
    **dict.fromkeys(("use_cache", "dual_cache", "use_block_cache"), "cache"),
    **dict.fromkeys(("num_to_transfer", "minimal_topk"), "min_commit"),
    **dict.fromkeys(("editing_threshold", "max_post_steps", "remasking_strategy", "eb_threshold"), "rule"),
    **dict.fromkeys(("wedlm_entropy_threshold", "wedlm_pos_penalty_factor"), "rule"),
    **dict.fromkeys(("alg", "factor"), "selector"),
    **dict.fromkeys(("block_size", "n_future_tokens", "wedlm_window_size"), "block_length"),
    **dict.fromkeys(("suffix_ids", "infill_length"), "infill"),
    "mask_token_id": "mask_id",
    "small_block_size": "sub_block_length",
    "remasking": "score",
    "generator": "seed",
    "output_scores": "logprobs",
    "repeat_penalty": "repetition_penalty",
}
"""Other libraries' names of a field's purpose, where they are unlike the field's."""
PER_SEQUENCE_FIELDS = (
    "gen_length",
    "threshold",
    "selector",
    "policy",
    "min_commit",
    "max_commit",
    "score",
    "seed",
)
"""Fields that may have a value for each sequence, in a tuple."""


# --- configs and keywords -----------------------------------------------------------------------


def configured(where: str, config: DecodeConfig | None, keywords: Mapping[str, Any]) -> DecodeConfig:
    """`config`, or the default, with its fields replaced by `keywords`.

    Raises TypeError, worded as for a call of the function `where`, for a keyword that is no field.
    """
    for name in keywords:
        if name not in DEFAULTS:
            raise TypeError(f"{where}() got an unexpected keyword argument {name!r}{_nearest(name)}")
    if config is None:
        return DecodeConfig(**keywords)
    if not isinstance(config, DecodeConfig):
        raise ValueError(f"config: expected a DecodeConfig, got {type(config).__name__}")
    return DecodeConfig(**{**vars(config), **keywords}) if keywords else config


def with_ends(config: DecodeConfig, eos_ids: Sequence[int]) -> DecodeConfig:
    """The config with a model's end tokens, unless it names its own, or -1 for none."""
    return config.replace(eos_id=eos_ids) if config.eos_id is None else config


def _nearest(name: Any) -> str:
    known = OTHER_LIBRARIES.get(name) if isinstance(name, str) else None
    near = [known] if known else difflib.get_close_matches(str(name), DEFAULTS, 1)
    return f". Did you mean {near[0]!r}?" if near else ""


def names_fields(function: F) -> F:
    """Make `help`, `inspect.signature` and editors show the fields in place of **keywords."""
    signature = inspect.signature(function)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    of_config = inspect.signature(DecodeConfig).parameters.values()
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in of_config]
    function.__signature__ = signature.replace(parameters=[*parameters, *keywords])  # type: ignore[attr-defined]
    return function


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, (tuple, list)) else value


# --- the decider ------------------------------------------------------------------------------


class Decider(NamedTuple):
    """The rule, the schedule or the policy rows that choose the tokens which a pass commits."""

    rule: Rule | None
    """The rule beside the policy rows, if any."""
    steps: int | None
    """Passes of the fixed schedule, if that decides."""
    rows: Tensor
    """(B, 5) float32 policy rows, see `policies`; the fixed schedule sets their quota later."""
    selectors: list[str]
    """Each row's selector; empty unless the rows come from a threshold."""


def decider(config: DecodeConfig, size: int, cache: str) -> Decider:
    """The decider of `size` sequences. Raises ValueError naming the field that does not fit."""
    rule, row = _rule(config)
    threshold, selector, steps = row["threshold"], row["selector"], row["steps"]
    selectors: list[str] = []
    if isinstance(config.policy, tuple):
        rows = torch.tensor(config.policy, dtype=torch.float32, device="cpu").view(-1, len(policies.FIELDS))
        policies.check(rows, size)
    elif threshold is not None:
        if steps is not None:
            raise ValueError("steps: belongs to the fixed schedule, so not beside a threshold")
        selector = "entropy" if selector is None else selector
        bounds = {name: row[name] for name in ("min_commit", "max_commit", "score")}
        rows = policies.make(selector, threshold, **bounds, batch=size)
        selectors = [selector] * size if isinstance(selector, str) else list(selector)
    else:
        ignored = {name: row[name] for name in ("selector", "min_commit", "max_commit")}
        if names := _non_default(ignored):
            raise ValueError(
                f"{names[0]}: belongs to a threshold, and without one each pass commits the share of a fixed "
                f"schedule, got {ignored[names[0]]!r}"
            )
        score = row["score"]
        if score is None:
            score = "entropy" if cache in ("prefix", "dual") else "confidence"
        rows = policies.make("quota", 1, score=score, batch=size)
    for sequence, numbers in enumerate(rows.tolist()):
        least, score = numbers[2], policies.score_of(numbers)
        if least < 1:  # a window beside others need not move, but a sequence's only window must
            raise ValueError(
                f"min_commit: expected a whole number >= 1, got {least:g} for sequence {sequence}"
            )
        if rule is not None and score in rule.without:
            raise ValueError(f"selector: {type(rule).__name__} has no {score} to rank by")
    return Decider(rule, steps if threshold is None else None, rows, selectors)


def _row_of(config: DecodeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*POLICY_FIELDS, "min_commit")}


def _non_default(values: Mapping[str, Any]) -> list[str]:
    """The names of the values that are not the default."""

    def default(name: str, value: Any) -> bool:
        return value is None or (name == "min_commit" and isinstance(value, int) and value == 1)

    return [name for name, value in values.items() if not default(name, value)]


def _rule(config: DecodeConfig) -> tuple[Rule | None, dict[str, Any]]:
    """The rule that `policy` or `rule` names, and the values that make the policy row."""
    policy, rule = config.policy, config.rule
    row = _row_of(config)
    if policy is not None:
        if rule is not None:
            raise ValueError("policy: give it alone, without rule")
        if names := _non_default(row):
            raise ValueError(f"policy: give it alone, without {names[0]}")
        return (FunctionRule(policy) if callable(policy) else None), row
    if isinstance(rule, str):
        named = [name for name in ("threshold", "selector", "steps") if row[name] is not None]
        rule, of_text = parse(rule, default=not named)
        if of_text and named:
            raise ValueError(f"rule: names a policy row, so give it without {named[0]}")
        row = {**row, **of_text}
    elif isinstance(rule, Rule):
        if not _non_default(row):
            row = {**row, **row_of(rule)}
    elif callable(rule) and not isinstance(rule, type):
        rule = FunctionRule(rule)
    elif rule is not None:
        got = f"the class {rule.__name__}" if isinstance(rule, type) else type(rule).__name__
        raise ValueError(f"rule: expected a Rule, its name or a function, got {got}")
    if rule is not None:
        check_rule(rule)
        if rule.alone and (names := _non_default(row)):
            kind = "a function" if isinstance(rule, FunctionRule) else type(rule).__name__
            raise ValueError(f"rule: {kind} decides without a policy row, so give it without {names[0]}")
        if rule.greedy and temperature_in_force(config.temperature) > 0:
            raise ValueError(f"temperature: {type(rule).__name__} commits tokens of its own, so expected 0")
    return rule, row
