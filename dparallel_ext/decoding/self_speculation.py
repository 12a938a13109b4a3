"""Self-speculation of masked diffusion models (SSD, arXiv 2510.04147): several passes of a policy in one.

A decode that commits few tokens a pass, most often one, needs many passes. The statistics of a pass hint at
what the next passes will commit:

    draft     rank the window's masks by the rule's score in the last pass. State 0 is the sequence itself,
              state i the sequence after i more passes of the fewest commits, if ranks and tokens stay
    verify    one pass over states 0 to N side by side; in each the rule decides as in a pass of its own
    accept    from state 0 on, the state into which the commits, positions and tokens, turn the state before
    commit    the last accepted state with its own commits; its statistics make the next draft

So every token is committed where, when and by which statistics the rule alone would have committed it: the
text is the same. A pass computes N + 1 canvases, the rejected ones for nothing. A threshold may commit more
than the fewest, and so pass over states.

Where keys and values outlive a pass, a guessed state shares the sequence's pages, but for the positions that
its pass computes, which have pages of its own. Positions that it does not compute are as the passes before
left them: so a state is guessed only if its pass computes all positions that the guessed passes before it
would have written.

A window (WeDLM, SDLM) slides over the ends of blocks, and so do its states. SDLM's states, which are filled
from left to right, are the states of its published `self_speculative` decoding (arXiv 2509.24007).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import policies
from ..arguments import whole
from ..cache import KVCache
from ..models import Model
from ..rules import Decision, Leading, Rule, Where
from ..types import RowStats
from .batch import Batch
from .schedule import Schedule
from .sequence import IDLE, SequenceSettings, SequenceState


@dataclass(frozen=True)
class RankMemory(Rule):
    """Commits by the policy row, and remembers each position's token and score: the best commits first, and
    of equal ones the first position.

    leading: it commits as `Leading` does, the first position first: the scores stay 0.
    """

    score: str
    leading: bool

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        token = torch.zeros((lanes, columns), dtype=torch.int64, device=device)
        return token, torch.zeros((lanes, columns), device=device)

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        where.remember(state[0], stats.token)
        if self.leading:
            return Leading().decide(stats, where, ())
        score: Tensor = getattr(stats, self.score)
        where.remember(state[1], -score if self.score == "entropy" else score)
        return Decision()


class Guess(NamedTuple):
    """The guessed commits that make a state of the state before it."""

    columns: list[int]
    tokens: list[int]
    sequence: SequenceState
    """The sequence with these tokens committed."""


class LastPass(NamedTuple):
    """The last pass of a sequence."""

    lane: int
    """The lane that holds the accepted state."""
    start: int = 0
    end: int = 0
    """Columns [start, end) whose statistics it read."""
    computed: tuple[int, int] = (0, 0)
    """Positions [first, last) whose keys and values it wrote."""


def states_to_guess(draft_size: int | None, schedule: Schedule) -> int:
    """How many states a pass guesses at most: no two have as many masks of the last pass's window, and the
    last has one. Raises ValueError naming `draft_size`."""
    size = 0 if draft_size is None else whole("draft_size", draft_size, 0)
    return min(size, max(1, schedule.block_length - 1))


def check_draft(settings: Sequence[SequenceSettings], schedule: Schedule) -> None:
    """Raise ValueError naming `draft_size` if states cannot be guessed."""
    for setting in settings:
        if setting.rule is not None and not isinstance(setting.rule, Leading):
            raise ValueError(
                "draft_size: goes with policy rows alone, as 'one' or 'entropy:0.5', got the rule "
                f"{type(setting.rule).__name__}"
            )
        if schedule.known_first and setting.policy[0] != policies.SELECTORS["quota"]:
            selector = next(name for name, i in policies.SELECTORS.items() if i == setting.policy[0])
            raise ValueError(
                "draft_size: needs a fixed number of tokens a pass with cache 'window' (as a policy 'one' or "
                f"'steps:N', or the selector 'quota'), got the selector {selector!r}"
            )
    if schedule.active_blocks > 1:
        raise ValueError(f"draft_size: goes with active_blocks=1 alone, got {schedule.active_blocks}")


def batch_class(draft_size: int) -> Callable[..., Batch]:
    """The class of batches whose passes guess up to `draft_size` states, called with all other arguments."""
    return functools.partial(SelfSpeculation, draft_size=draft_size) if draft_size else Batch


def new_cache(
    model: Model, schedule: Schedule, draft_size: int, pages: int, page_size: int, block_table: Tensor
) -> KVCache:
    """A cache for sequences, as `Model.new_cache` makes it, with more pages behind, for their guessed states.

    Its block table has a row for each sequence, then one for each guessed state, which begins with the
    state's own pages.
    """
    lanes, per_lane = block_table.shape
    size = schedule.overlap + schedule.block_length
    if schedule.known_first:
        size *= 2  # what the pass before has decoded, too
    unit = math.gcd(size, page_size) if schedule.aligned else 1  # blocks begin at multiples of it
    each = (page_size - unit + size - 1) // page_size + 1
    each = per_lane if schedule.to_the_end else min(per_lane, each)
    guessed_pages = torch.arange(pages, pages + lanes * draft_size * each, device="cpu").view(-1, each)
    table = torch.cat((block_table, F.pad(guessed_pages, (0, per_lane - each))))
    return model.new_cache(pages + guessed_pages.numel(), page_size, table, kept=schedule.keeps)


class SelfSpeculation(Batch):
    """A batch whose passes compute up to 1 + `draft_size` states of each sequence, see above.

    Lanes 0 to count - 1 hold the sequences, which are their states 0. Guessed states have lanes of their own,
    which are idle between passes.

    kv_cache: one that `new_cache` has made; default: one with pages of a block.
    """

    def __init__(
        self,
        model: Any,
        lanes: int,
        width: int,
        schedule: Schedule,
        mask_id: int,
        *,
        draft_size: int,
        kv_cache: KVCache | None = None,
        **options: Any,
    ) -> None:
        self.count, self.draft_size = lanes, draft_size
        self.passes, self.canvases = [0] * lanes, [0] * lanes
        self._last = [LastPass(b) for b in range(lanes)]
        self._ended: dict[int, int] = {}
        """Lanes that an end of the text ended in the last pass -> the first column of their padding."""
        if kv_cache is None and schedule.keeps:
            size = schedule.block_length
            table = torch.arange(lanes * max(1, -(-width // size)), device="cpu").view(lanes, -1)
            kv_cache = new_cache(model, schedule, draft_size, table.numel(), size, table)
        self._own_pages = [] if kv_cache is None else kv_cache.block_table.tolist()
        """By lane, the pages of a guessed state, from the first position on that its pass computes."""
        lanes *= 1 + draft_size
        super().__init__(model, lanes, width, schedule, mask_id, kv_cache=kv_cache, **options)

    @property
    def nfe(self) -> list[int]:
        return self.passes

    def states(self, b: int) -> list[int]:
        """The lanes of sequence b's states."""
        first = self.count + b * self.draft_size
        return [b, *range(first, first + self.draft_size)]

    def admit(
        self, lane: int, prompt: Tensor, gen_length: int, settings: SequenceSettings, **options: Any
    ) -> SequenceState:
        self._last[lane], self.passes[lane], self.canvases[lane] = LastPass(lane), 0, 0
        ranks = RankMemory(policies.score_of(settings.policy), isinstance(settings.rule, Leading))
        return super().admit(lane, prompt, gen_length, dataclasses.replace(settings, rule=ranks), **options)

    def step(self, lanes: Sequence[int] | None = None) -> list[int]:
        """Run a pass over the states of every sequence that is not done (of `lanes`), see `Batch.step`."""
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        drafts = self._drafts(live)
        try:
            return self._verify(drafts)
        except ValueError:
            if not any(drafts.values()):
                raise
            # The error may be in a guessed state that decoding would never have come to.
            return self._verify({b: [] for b in live})

    def end(self, b: int) -> None:
        self._ended[b] = self.sequences[b].ahead
        super().end(b)

    def _groups(self, live: list[int]) -> list[list[int]]:
        if not self.batch_invariant:
            return super()._groups(live)
        groups = [[lane for lane in self.states(b) if lane in live] for b in range(self.count)]
        return [group for group in groups if group]

    # --- draft --------------------------------------------------------------------------------------

    def _drafts(self, live: Sequence[int]) -> dict[int, list[Guess]]:
        """For each live sequence the guesses that make its states 1, 2, ..."""
        tokens = self.tokens[: self.count].tolist()
        rules = {rule: None for b in live if (rule := self.sequences[b].settings.rule) is not None}
        states = {rule: [state.cpu() for state in self.runner.states[rule]] for rule in rules}
        return {b: self._draft(b, tokens[b], *states[self.sequences[b].settings.rule]) for b in live}  # type: ignore[index]

    def _draft(self, b: int, held: list[int], token: Tensor, rank: Tensor) -> list[Guess]:
        """The guesses of sequence b. held: its tokens, and then the tokens of the last guess. token, rank:
        (lanes, columns), see `RankMemory`."""
        sequence, last = self.sequences[b], self._last[b]
        window = self.schedule.front_window(sequence)
        start, end = max(window.start, last.start), min(window.end, last.end)
        if start >= end:
            return []
        tokens, ranks = (state[last.lane, start:end].tolist() for state in (token, rank))
        known = [column for column in range(start, end) if held[column] == self.mask_id]
        known.sort(key=lambda column: (-ranks[column - start], column))
        guesses: list[Guess] = []
        while len(guesses) < self.draft_size:
            columns = known[: int(policies.least(sequence.policy(sequence.open[0])))]
            known = known[len(columns) :]
            for column in columns:
                held[column] = tokens[column - start]
            before, sequence = sequence, self._after_pass(sequence, held)
            if not columns or not self._follows(before, sequence):
                break
            guesses.append(Guess(columns, [held[column] for column in columns], sequence))
        return guesses

    def _after_pass(self, sequence: SequenceState, held: list[int]) -> SequenceState:
        """The sequence after another pass, which leaves these tokens."""
        after, blocks = earlier(sequence, -1), []  # samples are keyed by the number of their pass
        for block in after.open:
            left = [column for column in range(block.start, block.end) if held[column] == self.mask_id]
            blocks.append(block._replace(masks_left=len(left), first_mask=left[0] if left else block.start))
        after.open = tuple(blocks)
        while after.open and not after.masks_left:
            after.leave_front()
        if after.block_index > sequence.block_index:
            self.open_front(after)
        return after

    def _follows(self, before: SequenceState, after: SequenceState) -> bool:
        """Whether two states may be in one pass: `after` has a mask to decide, and none of the keys and
        values that it sees, but does not compute, are written by the pass over `before`, which comes first in
        the schedule. Blocks other than a window's begin with a pass of their own.
        """
        if after.done or (after.block_index > before.block_index and not self.schedule.known_first):
            return False
        if not self.schedule.keeps:
            return True
        recomputed = covers(self.schedule.computed(after), self.schedule.computed(before))
        return recomputed and not self.schedule.full(after)  # which needs more pages of its own

    # --- verify, accept, commit ---------------------------------------------------------------------

    def _verify(self, drafts: dict[int, list[Guess]]) -> list[int]:
        lanes = {b: self.states(b)[: 1 + len(guesses)] for b, guesses in drafts.items()}
        for b, guesses in drafts.items():
            self._keep(b)
            self._lay_out(lanes[b], guesses)
        try:
            finished = self._decide(lanes)
        finally:
            for states in lanes.values():
                for lane in states[1:]:
                    self.sequences[lane] = IDLE
        for b, guesses in drafts.items():
            accepted = lanes[b].index(self._last[b].lane)
            tokens, sequence = [guess.tokens for guess in guesses], self.sequences[b]
            sequence.drafted, sequence.accepted = sum(map(len, tokens)), sum(map(len, tokens[:accepted]))
            sequence.refused = tuple(itertools.chain.from_iterable(tokens[accepted:]))
        return finished

    def _keep(self, b: int) -> None:
        """Copy the keys and values of sequence b's accepted state to its own pages, if the next pass does
        not compute them anew."""
        last = self._last[b]
        if last.lane == b or not self.schedule.keeps:
            return
        if not covers(self.schedule.computed(self.sequences[b]), last.computed):
            self._copy(last.lane, b, range(*last.computed))
            self._last[b] = last._replace(computed=(0, 0))

    def _lay_out(self, lanes: Sequence[int], guesses: Sequence[Guess]) -> None:
        """Put the guessed states into their lanes."""
        for lane, before, guess in zip(lanes[1:], lanes, guesses, strict=False):
            self.sequences[lane] = guess.sequence
            self.tokens[lane] = self.tokens[before]
            self.tokens[lane, guess.columns] = self.tokens.new_tensor(guess.tokens)
            if guess.sequence.settings.record:
                self.trajectory.clear(lane)
            if self.schedule.keeps:
                self._share(lane, lanes[0], *self.schedule.computed(guess.sequence))

    def _share(self, lane: int, b: int, first: int, last: int) -> None:
        """Let a state share sequence b's pages, but for positions [first, last), which its pass computes."""
        assert self.kv_cache is not None
        cache, size = self.kv_cache, self.kv_cache.page_size
        low, high = first // size, -(-last // size)
        pages = cache.block_table[b].tolist()
        pages[low:high] = self._own_pages[lane][: high - low]
        if cache.block_table[lane].tolist() != pages:
            cache.assign(lane, pages)
        beside = *range(low * size, first), *range(last, min(high * size, self.sequences[b].length))
        self._copy(b, lane, beside)

    def _copy(self, source: int, target: int, positions: Sequence[int]) -> None:
        """Copy the keys and values of these positions from one lane's pages to another's. `kv_move` takes at
        most 2048 positions, and a long block may have more."""
        if not positions:
            return
        assert self.kv_cache is not None
        table, slots = self.kv_cache.block_table, self.kv_cache.slots
        at = torch.tensor(positions, device="cpu")
        page, offset = at // slots.shape[4], at % slots.shape[4]
        where = torch.stack((table[source, page], table[target, page], offset)).to(slots.device)
        slots[:, :, where[1], :, where[2]] = slots[:, :, where[0], :, where[2]]

    def _decide(self, lanes: dict[int, list[int]]) -> list[int]:
        """Run the pass; return the sequences of which it completed a block. lanes: of each sequence's
        states."""
        before = self.tokens.clone()
        begun = {b: copy.copy(self.sequences[b]) for states in lanes.values() for b in states}
        windows = {b: self.schedule.front_window(sequence)[:2] for b, sequence in begun.items()}
        computed = {b: self.schedule.computed(sequence) for b, sequence in begun.items()}
        self._ended = {}
        finished = set(super().step(list(windows)))
        paths = self._paths(lanes, before, begun)
        last = {b: path[-1] for b, path in paths.items()}
        self.tokens[list(last)] = self.tokens[list(last.values())]
        completed = []
        for b, lane in last.items():
            accepted = paths[b]
            self.passes[b] += 1
            self.canvases[b] += len(lanes[b])
            skipped = lanes[b].index(lane) + 1 - len(accepted)
            self.sequences[b] = earlier(self.sequences[lane], skipped)
            first, end = computed[lane]
            if lane != b and first < self.sequences[b].num_cached:  # final, and perhaps shared from now on
                final = min(end, self.sequences[b].num_cached)
                self._copy(lane, b, range(first, final))
                first = final
            self._last[b] = LastPass(lane, *windows[lane], (first, end))
            if self.sequences[b].settings.record:
                self._record(b, {each: begun[each].nfe + 1 for each in accepted})
                if lane in self._ended:
                    self.trajectory.clear(b, self._ended[lane])
            if finished.intersection(accepted):
                completed.append(b)
        return completed

    def _paths(
        self, lanes: dict[int, list[int]], before: Tensor, begun: dict[int, SequenceState]
    ) -> dict[int, list[int]]:
        """By sequence, the lanes of the states to which decoding comes, one after the other.

        before: the tokens before the pass. begun: the sequences that the lanes held then.
        """
        each = list(lanes.values())
        became = [(self.tokens[states][:, None] == before[states]).all(2).flatten() for states in each]
        answers = iter(torch.cat(became).tolist() if became else [])
        paths = {}
        for b, states in lanes.items():
            follows = [[next(answers) for _ in states] for _ in states]
            path = [0]
            # Behind a state that has ended, at an EOS, nothing comes, whatever its masks became.
            while not self.sequences[states[path[-1]]].done:
                later = range(path[-1] + 1, len(states))
                after = next((i for i in later if follows[path[-1]][i]), None)
                if after is None or not self._comes_to(begun[states[after]], after - len(path)):
                    break
                path.append(after)
            paths[b] = [states[i] for i in path]
        return paths

    def _comes_to(self, state: SequenceState, skipped: int) -> bool:
        """Whether the pass over a guessed state is decoding's own, so many passes sooner than guessed.
        Samples are keyed by the number of their pass."""
        if not skipped:
            return True
        alike = self.schedule.computed(earlier(state, skipped)) == self.schedule.computed(state)
        return alike and state.settings.temperature == 0

    def _record(self, b: int, numbers: dict[int, int]) -> None:
        """Copy the commits of sequence b's accepted states to its trajectory.

        numbers: for each state's lane, the number that its pass would have without self-speculation.
        """
        trajectory = self.trajectory
        for lane, number in numbers.items():
            fresh = trajectory.step[lane] == number
            for field in (trajectory.confidence, trajectory.logprob, *(trajectory.top or ())):
                of_field = fresh if field.ndim == 2 else fresh[:, None]
                field[b] = torch.where(of_field, field[lane], field[b])
            trajectory.step[b] = torch.where(fresh, self.passes[b], trajectory.step[b])


def earlier(sequence: SequenceState, passes: int) -> SequenceState:
    """The sequence, had it come to its tokens in so many passes fewer; -1: in one pass more."""
    sooner = copy.copy(sequence)
    sooner.nfe, sooner.published, sooner.step_in_block = (
        number - passes for number in (sequence.nfe, sequence.published, sequence.step_in_block)
    )
    sooner.open = tuple(block._replace(step=block.step - passes) for block in sequence.open)
    return sooner


def covers(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    """Whether positions [first, last) hold all of the others, which may be none."""
    return inner[0] == inner[1] or (outer[0] <= inner[0] and inner[1] <= outer[1])
