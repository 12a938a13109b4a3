"""The log-likelihood of an answer after a prompt, under a masked diffusion language model.

Such a model predicts masked tokens, so no single pass gives the probability of a text. There are two methods:

`monte_carlo` estimates the bound that these models are trained by (LLaDA, arXiv 2502.09992, equation 6 and
algorithm 3). l of an answer's L tokens are masked, with l uniform in 1..L and the positions uniform:

    log p(answer | prompt) >= E [ L / l * sum over masked i of log p(answer_i | prompt, unmasked tokens) ]

The counts l are stratified over the samples, as in the published evaluation. An answer with at most as many
masks (2^L - 1) as there are samples is computed under each mask once, which gives the expectation itself: one
pass for a single token.

`left_to_right` is exact, by the chain rule: answer_i is predicted with the answer before it known and
everything after it masked. For a block-causal model (SDAR, Fast-dLLM v2) only the rest of i's own block is
visible, so these are the probabilities with which the model's decoder draws the answer, one token a pass from
left to right; over all answers of one length they sum to one. Finished blocks are computed once and shared by
all sequences with the same prefix. For other models the rest of the answer is visible as masks, so the model
knows its length.

The default is `left_to_right` for block-causal models and `monte_carlo` for others.

If a model's logits are shifted (Dream, Fast-dLLM v2), position p is predicted by the logits of position
max(p - 1, 0). The head is applied only to the needed positions, in chunks, so no (B, L, V) tensor exists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.arguments import check_ids, one_of, token_ids, whole
from dparallel_ext.cache import KVCache, Span, block_causal_spans
from dparallel_ext.decoding.padding import row_padding
from dparallel_ext.decoding.settings import mask_of
from dparallel_ext.models import Model, check_diffusion, native, own_precision, traits
from dparallel_ext.ops.head import rows_of_chunk

METHODS = ("monte_carlo", "left_to_right")
SAMPLES = 128
"""The published number of masks for each answer."""
PASS_TOKENS = 4096
"""The most tokens of a pass over the masked blocks of `left_to_right`."""


class Likelihood(NamedTuple):
    """The log-likelihood of an answer."""

    logprob: float
    """In nats. With `monte_carlo` it is an estimate of a lower bound."""
    greedy: bool | None
    """Whether greedy decoding of one token a pass gives the answer: with `monte_carlo` the most confident
    token first, as in the published evaluation, with `left_to_right` from left to right. None without
    `greedy`."""


def log_likelihoods(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], **options: Any
) -> list[Likelihood]:
    """The log-likelihood of each answer after its prompt; arguments and errors as `iter_log_likelihoods`."""
    results = dict(iter_log_likelihoods(model, prompts, answers, **options))
    return [results[index] for index in range(len(prompts))]


def iter_log_likelihoods(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    method: str | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    batch_size: int = 16,
    greedy: bool = True,
    block_length: int | None = None,
    mask_id: int | None = None,
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the log-likelihood of each answer after its prompt, with its index, as soon as it is known.

    Args:
        model: a native model (`dparallel_ext.models`), in evaluation mode; wrapped or adapted as in `decode`.
        prompts, answers: token ids, pair by pair, of any lengths. A prompt may be empty. An empty answer has
            the log-likelihood 0.
        method: "monte_carlo" or "left_to_right"; None: by the model, see the module.
        samples: masks that `monte_carlo` draws for each answer.
        seed: seed of the masks, which depend only on it and on the answer's length: answers of one length are
            compared under the same masks, and a result does not depend on the other pairs.
        batch_size: masked sequences of a pass (`monte_carlo`), or pairs whose keys and values are held at
            once (`left_to_right`).
        greedy: compute `Likelihood.greedy`. With `monte_carlo` it takes one more pass for each token of the
            answer.
        block_length: for a block-causal model; default: the model's own.
        mask_id: default: the model's.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    model = native(model)
    check_diffusion(model)
    model_traits = traits(model)
    if method is None:
        method = "monte_carlo" if model_traits.block_length is None else "left_to_right"
    one_of("method", method, METHODS)
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        whole(name, value, 1)
    mask_id = mask_of(model, mask_id)
    if block_length is not None:
        if model_traits.block_length is None:
            raise ValueError(f"block_length: only for block-causal models, got {block_length!r}")
        whole("block_length", block_length, 1)
    if len(prompts) != len(answers):
        raise ValueError(f"answers: expected one for each of {len(prompts)} prompts, got {len(answers)}")
    pairs = [
        Pair(i, _ids(f"prompts[{i}]", prompt, model), _ids(f"answers[{i}]", answer, model))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    scorer = Scorer(
        model, mask_id, block_length or model_traits.block_length, int(model_traits.shift), batch_size
    )
    if method == "monte_carlo":
        estimates = scorer.by_masks(pairs, functools.partial(answer_masks, samples=samples, seed=seed))
        return scorer.with_decoding(pairs, estimates, greedy)
    if scorer.block_length is None:
        return scorer.by_masks(pairs, left_to_right_masks)
    return scorer.by_blocks(pairs)


class Pair(NamedTuple):
    number: int
    prompt: Tensor
    """(P,) int64"""
    answer: Tensor
    """(L,) int64"""


def _ids(name: str, value: Sequence[int], model: Model) -> Tensor:
    ids = token_ids(name, value).cpu()
    check_ids(name, [ids], model.shape.embedding_size)
    return ids


# --- masks --------------------------------------------------------------------------------------


class MaskedStates(NamedTuple):
    """The n masked states of an answer of L tokens."""

    masked: Tensor
    """(n, L) bool"""
    weight: Tensor
    """(n, L) float64: the weight of each token's log-probability in the sum; 0: it is not needed."""


@functools.lru_cache(maxsize=64)
def answer_masks(length: int, samples: int, seed: int) -> MaskedStates:
    """The masks of `monte_carlo` for an answer of `length` tokens, at least 1.

    If there are at most `samples` masks, of 2^length - 1, all are returned with their exact weights.
    Otherwise sample j of n masks l = 1 + (k + floor(j length / n)) mod length positions, drawn uniformly: k
    is drawn once, so each l is uniform, and the samples have every l equally often, as far as possible.
    """
    if length.bit_length() < 6 and 2**length - 1 <= samples:
        masked = (torch.arange(1, 2**length)[:, None] >> torch.arange(length)) & 1 == 1
        weight = [1 / (count * math.comb(length, count)) for count in masked.sum(1).tolist()]
    else:
        generator = torch.Generator().manual_seed(seed)
        first = int(torch.randint(length, (), generator=generator))
        count = (first + torch.arange(samples) * length // samples) % length + 1  # (n,)
        place = torch.rand((samples, length), generator=generator, dtype=torch.float64).argsort(1).argsort(1)
        masked = place < count[:, None]
        weight = [length / (count * samples) for count in count.tolist()]
    return MaskedStates(masked, masked * torch.tensor(weight, dtype=torch.float64)[:, None])


def left_to_right_masks(length: int) -> MaskedStates:
    """In state i the tokens from i on are masked, and token i is needed."""
    masked = torch.ones((length, length), dtype=torch.bool).triu()
    return MaskedStates(masked, torch.eye(length, dtype=torch.float64))


# --- passes -------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """m tokens whose probabilities are needed from one pass; tensors (m,)."""

    pair: Tensor
    """int64: the index of the token's pair."""
    source: Tensor
    """int64: the packed position whose hidden state predicts the token."""
    target: Tensor
    """int64: the token's id."""
    weight: Tensor
    """float64: the weight of its log-probability."""


Key = tuple[int, tuple[int, ...]]
"""A prefix: the page of its last finished block (-1: none), and the tokens after that block."""


class BlockWork(NamedTuple):
    """The work of `left_to_right` for some sequences of a block-causal model. A page holds a block."""

    spans: list[Span]
    tokens: list[int]
    """Spans and tokens of the finished blocks, which are the blocks before a sequence's last; page i holds
    the i-th."""
    pages: list[list[int]]
    """Each sequence's pages, in order."""
    known: list[tuple[int, int, int]]
    """(pair, source, target) of the tokens that a finished block predicts, for shifted logits."""
    masked: dict[Key, tuple[int, int]]
    """Prefix -> (sequence, number of the block), for each block that is masked after a prefix."""
    following: dict[Key, list[tuple[int, int]]]
    """Prefix -> (pair, target) of the tokens that follow it."""


def lay_out_blocks(pairs: Sequence[Pair], size: int, shift: int) -> BlockWork:
    """The work for `pairs`: sequences with a common prefix share pages, and tokens after a prefix share its
    masked block."""
    page_of: dict[Key, int] = {}
    blocks = BlockWork([], [], [], [], {}, {})
    for row, pair in enumerate(pairs):
        ids = torch.cat((pair.prompt, pair.answer)).tolist()
        pages: list[int] = []
        for start in range(0, (len(ids) - 1) // size * size, size):
            key = (pages[-1] if pages else -1, tuple(ids[start : start + size]))
            if key not in page_of:
                page_of[key] = len(page_of)
                blocks.spans.append(Span(row, start, start + size, start + size))
                blocks.tokens.extend(key[1])
            pages.append(page_of[key])
        blocks.pages.append(pages)
        for at in range(len(pair.prompt), len(ids)):
            block, inside = divmod(at, size)
            before = pages[block - 1] if block else -1
            if shift and block and not inside:
                blocks.known.append((pair.number, (before + 1) * size - 1, ids[at]))
                continue
            key = (before, tuple(ids[at - inside : at]))
            blocks.masked.setdefault(key, (row, block))
            blocks.following.setdefault(key, []).append((pair.number, ids[at]))
    return blocks


class Scorer:
    """The passes of a model that score answers.

    Args:
        block_length: for a block-causal model, else None.
        shift: the logits for position p are produced at position max(p - shift, 0).
        batch_size: see `iter_log_likelihoods`.
    """

    def __init__(
        self, model: Model, mask_id: int, block_length: int | None, shift: int, batch_size: int
    ) -> None:
        self.model, self.mask_id, self.block_length = model, mask_id, block_length
        self.shift, self.batch_size = shift, batch_size
        self.chunk_rows = rows_of_chunk(None, model.lm_head.weight)
        self.pad_to = row_padding(model)

    def by_masks(
        self, pairs: Sequence[Pair], masks_of: Callable[[int], MaskedStates]
    ) -> Iterator[tuple[int, Likelihood]]:
        """Score each answer in the states of `masks_of(L)`; `greedy`: each needed token is the argmax.

        Each state is a whole sequence. Pairs with a common state, such as one-token answers to one prompt,
        share it if it falls into one pass.
        """
        states_left = {pair.number: 0 for pair in pairs}
        totals = {pair.number: Likelihood(0.0, True) for pair in pairs}
        rows: dict[bytes, Tensor] = {}
        states: list[tuple[Pair, bytes, Tensor]] = []

        def run() -> Iterator[tuple[int, Likelihood]]:
            for index, part in self._whole(rows, states).items():
                totals[index] = _add(totals[index], part)
            for pair, _, _ in states:
                states_left[pair.number] -= 1
                if not states_left[pair.number]:
                    yield pair.number, totals[pair.number]
            rows.clear()
            states.clear()

        for pair in pairs:
            if not len(pair.answer):
                yield pair.number, totals[pair.number]
                continue
            masked, weight = masks_of(len(pair.answer))
            states_left[pair.number] = len(masked)
            answers = pair.answer.masked_fill(masked, self.mask_id)  # (n, L)
            for state, wanted in zip(answers, weight, strict=True):
                ids = torch.cat((pair.prompt, state))
                key = ids.numpy().tobytes()
                if key not in rows and len(rows) == self.batch_size:
                    yield from run()
                rows[key] = ids
                states.append((pair, key, wanted))
        if states:
            yield from run()

    @torch.inference_mode()
    def _whole(
        self, rows: dict[bytes, Tensor], states: Sequence[tuple[Pair, bytes, Tensor]]
    ) -> dict[int, Likelihood]:
        """Run one pass over whole masked sequences; for each pair, return the sum over the needed tokens."""
        begin: dict[bytes, int] = {}
        spans: list[Span] = []
        at = 0
        for row, (key, ids) in enumerate(rows.items()):
            begin[key], length = at, len(ids)
            spans += block_causal_spans(row, 0, length, length, self.block_length or length)
            at += length
        wanted = []
        for pair, key, weight in states:
            column = weight.nonzero()[:, 0]
            source = (column + len(pair.prompt) - self.shift).clamp(min=0) + begin[key]
            wanted.append(
                Targets(torch.full_like(column, pair.number), source, pair.answer[column], weight[column])
            )
        cache = self.model.new_cache(len(rows), max(map(len, rows.values())), kept=False)
        hidden = self._step(cache, spans, torch.cat(list(rows.values())))
        return self._score(hidden, Targets(*map(torch.cat, zip(*wanted, strict=True))))

    def by_blocks(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Likelihood]]:
        """`left_to_right` of a block-causal model, `batch_size` pairs at a time."""
        for at in range(0, len(pairs), self.batch_size):
            group = pairs[at : at + self.batch_size]
            totals = {pair.number: Likelihood(0.0, True) for pair in group}
            for part in self._blocks([pair for pair in group if len(pair.answer)]):
                for index, likelihood in part.items():
                    totals[index] = _add(totals[index], likelihood)
            yield from totals.items()

    @torch.inference_mode()
    def _blocks(self, pairs: Sequence[Pair]) -> list[dict[int, Likelihood]]:
        """One pass over the finished blocks, then passes over the masked blocks; the sums of each pass."""
        size = self.block_length
        assert size is not None
        blocks = lay_out_blocks(pairs, size, self.shift)
        lanes = min(max(1, PASS_TOKENS // size), len(blocks.masked))
        finished = len(blocks.spans)  # pages, followed by one for each masked block of a pass
        table = torch.zeros(
            (len(pairs) + lanes, max(map(len, blocks.pages), default=0) + 1), dtype=torch.int64
        )
        cache = self.model.new_cache(finished + lanes, size, table)
        sums = []
        if blocks.spans:
            for row, pages in enumerate(blocks.pages):
                cache.assign(row, pages)
            hidden = self._step(cache, blocks.spans, torch.tensor(blocks.tokens))
            if blocks.known:
                sums.append(self._score(hidden, _all(blocks.known)))
            del hidden
        beginnings = list(blocks.masked.items())
        for first in range(0, len(beginnings), max(1, lanes)):
            spans, tokens, wanted = [], [], []
            for lane, (key, (row, block)) in enumerate(beginnings[first : first + lanes]):
                cache.assign(len(pairs) + lane, [*blocks.pages[row][:block], finished + lane])
                spans.append(Span(len(pairs) + lane, block * size, (block + 1) * size, (block + 1) * size))
                tokens += [*key[1], *[self.mask_id] * (size - len(key[1]))]
                source = lane * size + max(len(key[1]) - self.shift, 0)
                wanted += [(pair, source, target) for pair, target in blocks.following[key]]
            sums.append(self._score(self._step(cache, spans, torch.tensor(tokens)), _all(wanted)))
        return sums

    def with_decoding(
        self, pairs: Sequence[Pair], estimates: Iterator[tuple[int, Likelihood]], greedy: bool
    ) -> Iterator[tuple[int, Likelihood]]:
        """The estimates, with `greedy` by decoding: one token a pass, the most confident first."""
        waiting: list[tuple[int, Likelihood]] = []
        for index, estimate in estimates:
            if not greedy or not len(pairs[index].answer):
                yield index, estimate._replace(greedy=None if not greedy else True)
                continue
            waiting.append((index, estimate))
            if len(waiting) == self.batch_size:
                yield from self._decode(pairs, waiting)
                waiting = []
        if waiting:
            yield from self._decode(pairs, waiting)

    def _decode(
        self, pairs: Sequence[Pair], waiting: Sequence[tuple[int, Likelihood]]
    ) -> Iterator[tuple[int, Likelihood]]:
        lengths = [len(pairs[index].answer) for index, _ in waiting]
        responses = dx.decode(
            self.model,
            [pairs[index].prompt.to(self.model.device) for index, _ in waiting],
            gen_length=lengths,
            block_length=self.block_length or max(lengths),
            mask_id=self.mask_id,
            graphs=False,  # few passes, of other shapes in each call
        ).responses
        for (index, estimate), response in zip(waiting, responses, strict=True):
            answer = pairs[index].answer
            same = torch.equal(response[: len(answer)].cpu(), answer)
            yield index, estimate._replace(greedy=same)

    def _step(self, cache: KVCache, spans: Sequence[Span], tokens: Tensor) -> Tensor:
        """Hidden states (N, width) of the packed tokens (N,) of the spans."""
        device = self.model.device
        metadata = cache.metadata(spans, self.pad_to).to(device)
        tokens = F.pad(tokens, (0, len(metadata.positions) - len(tokens)))
        with own_precision(self.model, device):
            return self.model.step(tokens.to(device), cache, metadata)

    def _score(self, hidden: Tensor, targets: Targets) -> dict[int, Likelihood]:
        """For each pair, the weighted sum of its tokens' log-probabilities, and whether all are the argmax.

        hidden: (N, width). The head is applied once to each position, chunk by chunk.
        """
        source, row = targets.source.unique(return_inverse=True)  # (r,), (m,)
        device = hidden.device
        logprob = torch.zeros(len(row), dtype=torch.float64)
        argmax = torch.zeros(len(row), dtype=torch.bool)
        for begin in range(0, len(source), self.chunk_rows):
            part = source[begin : begin + self.chunk_rows]
            here = ((row >= begin) & (row < begin + len(part))).nonzero()[:, 0]
            at, target = (row[here] - begin).to(device), targets.target[here].to(device)
            if self.pad_to is not None:
                part = F.pad(part, (0, self.pad_to(len(part)) - len(part)))
            with own_precision(self.model, device):
                logits = self.model.head(hidden[part.to(device)])
            stats = dx.row_stats(logits, mask_id=self.mask_id)
            logprob[here] = (logits[at, target].double() - stats.lse[at]).cpu()
            argmax[here] = (stats.token[at] == target).cpu()
        dx.check_errors(device)
        indices, of_pair = targets.pair.unique(return_inverse=True)
        weighted = logprob * targets.weight
        totals = torch.zeros(len(indices), dtype=torch.float64).index_add_(0, of_pair, weighted)
        missed = torch.zeros(len(indices)).index_add_(0, of_pair, (~argmax).float())
        return {
            index: Likelihood(total, not count)
            for index, total, count in zip(indices.tolist(), totals.tolist(), missed.tolist(), strict=True)
        }


def _all(tokens: Sequence[tuple[int, int, int]]) -> Targets:
    """Tokens (pair, source, target) with weight 1."""
    pair, source, target = torch.tensor(tokens).unbind(1)
    return Targets(pair, source, target, torch.ones(len(tokens), dtype=torch.float64))


def _add(a: Likelihood, b: Likelihood) -> Likelihood:
    return Likelihood(a.logprob + b.logprob, bool(a.greedy and b.greedy))
