"""Assigns pairs to global batches, data-parallel ranks and micro-batches.

The plan of a step is a pure function of the sampler's arguments and the step: resuming needs no other state, and every
rank computes the whole plan.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from spot_megatron.data.mixture import FileShare, epoch_pairs
from spot_megatron.errors import PairError

Bins = list[list[int]]  # pair indices, by rank or by micro-batch


class BatchSampler:
    """Global batches over epochs, dealt to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches, a multiple of `microbatch_multiple`. The last batch of an epoch
    holds the remaining pairs.

    Order "shuffled": every epoch has its own permutation, and each batch is divided so that the slowest rank has little
    more than its share of the cost. A rank has empty micro-batches only if it has fewer pairs than micro-batches.

    Order "file": pairs keep the order of the file, over epochs, micro-batches and ranks. With pairs_per_microbatch k
    (within the token budget) micro-batch j of a batch holds its pairs j*k to j*k + k - 1; ranks take equal contiguous
    parts of the micro-batches, filled up by empty ones. Without it, ranks take equal contiguous parts of the pairs.

    Args:
        tokens: [N] positions of each pair in a pack.
        costs: [N] compute time of each pair, in any unit.
        batch_pairs: pairs in a global batch.
        epochs: passes over the pairs.
        order: see above.
        seed: of the permutations.
        max_steps: upper bound on the steps.
        dp_size: data-parallel ranks.
        tokens_per_microbatch: upper bound on the tokens of a micro-batch, without padding.
        pairs_per_microbatch: upper bound on its pairs.
        shared_tokens: upper bound on the tokens of a micro-batch of several pairs.
        microbatch_multiple: see above.
        ids: names of the pairs in errors.
        shares: how often an epoch holds each pair; None: once.

    Raises:
        PairError: no pairs, or a pair that exceeds `tokens_per_microbatch`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        costs: np.ndarray,
        *,
        batch_pairs: int,
        epochs: int,
        order: Literal["shuffled", "file"],
        seed: int,
        max_steps: int | None,
        dp_size: int,
        tokens_per_microbatch: int,
        pairs_per_microbatch: int | None,
        shared_tokens: int | None = None,
        microbatch_multiple: int = 1,
        ids: Sequence[str] | None = None,
        shares: Sequence[FileShare] | None = None,
    ) -> None:
        assert order in ("shuffled", "file"), order
        assert len(tokens) == len(costs)
        assert min(batch_pairs, epochs, dp_size, microbatch_multiple) >= 1
        assert pairs_per_microbatch is None or pairs_per_microbatch >= 1
        if len(tokens) == 0:
            raise PairError("every pair of data.pairs was dropped; see the counts of the drop reasons")
        largest = int(np.argmax(tokens))
        if tokens[largest] > tokens_per_microbatch:
            name = ids[largest] if ids is not None else f"number {largest}"
            raise PairError(
                f"pair {name} takes {tokens[largest]} tokens, more than data.tokens_per_microbatch="
                f"{tokens_per_microbatch}; set it to at least {tokens[largest]}, or lower data.max_tokens to drop such "
                "pairs"
            )
        self.tokens = np.asarray(tokens, dtype=np.int64)
        self.costs = np.asarray(costs, dtype=np.float64)
        self.batch_pairs = batch_pairs
        self.order = order
        self.seed = seed
        self.dp_size = dp_size
        self.tokens_per_microbatch = tokens_per_microbatch
        self.shared_tokens = min(tokens_per_microbatch, shared_tokens or tokens_per_microbatch)
        self.bounds_pairs = pairs_per_microbatch is not None
        self.pairs_per_microbatch = pairs_per_microbatch or len(tokens)
        self.microbatch_multiple = microbatch_multiple
        self.shares = shares
        self._epoch_order: tuple[int, np.ndarray] | None = None  # of the last epoch asked for
        self.steps_per_epoch = _divide_up(len(self.epoch_pairs(0)), batch_pairs)
        num_steps = epochs * self.steps_per_epoch
        self.num_steps = num_steps if max_steps is None else min(num_steps, max_steps)

    def epoch_pairs(self, epoch: int) -> np.ndarray:
        """[pairs of the epoch] int64: indices in the order of the files, before shuffling."""
        return np.arange(len(self.tokens)) if self.shares is None else epoch_pairs(self.shares, self.seed, epoch)

    def batch(self, step: int) -> list[int]:
        """Indices of the pairs in a step's global batch."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = self.epoch_pairs(epoch)
            if self.order == "shuffled":
                # RandomState: numpy guarantees that its streams never change.
                seeds = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
                order = order[np.random.RandomState(seeds).permutation(len(order))]
            self._epoch_order = epoch, order
        order = self._epoch_order[1]
        return order[batch * self.batch_pairs : (batch + 1) * self.batch_pairs].tolist()

    def plan(self, step: int) -> list[Bins]:
        """By rank and micro-batch, the indices of the pairs of a step; equal on every rank."""
        batch = self.batch(step)
        if self.order == "shuffled":
            return self._pack_evenly(self._deal_to_ranks(batch))
        if self.bounds_pairs:
            groups = self._next_fit(batch)
            ranks = [[groups[i] for i in part] for part in np.array_split(range(len(groups)), self.dp_size)]
        else:
            ranks = [self._next_fit(part.tolist()) for part in np.array_split(batch, self.dp_size)]
        num_microbatches = self._whole_multiple(max(map(len, ranks)))
        return [_fill_up(bins, num_microbatches, may_split=not self.bounds_pairs) for bins in ranks]

    def _whole_multiple(self, count: int) -> int:
        return _divide_up(count, self.microbatch_multiple) * self.microbatch_multiple

    def _fits(self, pairs: list[int]) -> bool:
        most = self.shared_tokens if len(pairs) > 1 else self.tokens_per_microbatch
        return len(pairs) <= self.pairs_per_microbatch and int(self.tokens[pairs].sum()) <= most

    def _deal_to_ranks(self, batch: list[int]) -> Bins:
        """Ranks of about equal cost; no rank gets more pairs than the smallest number of micro-batches can hold."""
        num_microbatches = _divide_up(len(batch), self.dp_size * self.pairs_per_microbatch)
        return deal(batch, self.costs[batch], self.dp_size, num_microbatches * self.pairs_per_microbatch)

    def _pack_evenly(self, ranks: Bins) -> list[Bins]:
        """Few micro-batches of every rank's pairs: equally many on every rank, of about equal tokens."""
        tight = [self._first_fit_decreasing(pairs) for pairs in ranks]
        most = self._whole_multiple(max(map(len, tight)))
        fewest_for_tokens = max(
            _divide_up(int(self.tokens[pairs].sum()), self.tokens_per_microbatch) for pairs in ranks
        )
        fewest_for_pairs = max(_divide_up(len(pairs), self.pairs_per_microbatch) for pairs in ranks)
        fewest = self._whole_multiple(max(fewest_for_tokens, fewest_for_pairs))
        for num_microbatches in range(fewest, most + 1, self.microbatch_multiple):
            even = [deal(pairs, self.tokens[pairs], num_microbatches, self.pairs_per_microbatch) for pairs in ranks]
            if all(self._fits(members) for bins in even for members in bins):
                return even
        return [_fill_up(bins, most, may_split=True) for bins in tight]

    def _first_fit_decreasing(self, pairs: list[int]) -> Bins:
        """Few micro-batches: longest pairs first, each into the first micro-batch that has room."""
        bins: Bins = []
        for pair in sorted(pairs, key=lambda i: (-self.tokens[i], i)):
            for members in bins:
                if self._fits([*members, pair]):
                    members.append(pair)
                    break
            else:
                bins.append([pair])
        return bins

    def _next_fit(self, pairs: list[int]) -> Bins:
        """Micro-batches in the order of the pairs: a new one starts when the current one is full."""
        bins: Bins = []
        for pair in pairs:
            if bins and self._fits([*bins[-1], pair]):
                bins[-1].append(pair)
            else:
                bins.append([pair])
        return bins


def deal(pairs: list[int], weights: np.ndarray, num_bins: int, most_pairs: int) -> Bins:
    """Divides pairs with positive `weights` into bins of at most `most_pairs`, with the least heaviest weight.

    Longest processing time first, then moves and swaps out of the heaviest bin while they reduce its weight. With at
    least as many pairs as bins, no bin stays empty.
    """
    assert len(pairs) <= num_bins * most_pairs
    assert (weights > 0).all()
    bin_of = np.full(len(pairs), -1)
    load, count = np.zeros(num_bins), np.zeros(num_bins, dtype=np.int64)
    for i in np.argsort(-weights, kind="stable"):
        bin_of[i] = np.argmin(np.where(count < most_pairs, load, np.inf))
        load[bin_of[i]] += weights[i]
        count[bin_of[i]] += 1
    while True:
        heaviest = int(load.argmax())
        ours, theirs = np.flatnonzero(bin_of == heaviest), np.flatnonzero(bin_of != heaviest)
        open_bins = np.flatnonzero((count < most_pairs) & (np.arange(num_bins) != heaviest))
        # Columns: every pair of another bin (a swap), then every bin with room (a move).
        their_bin = np.concatenate([bin_of[theirs], open_bins])
        their_weight = np.concatenate([weights[theirs], np.zeros(len(open_bins))])
        change = weights[ours][:, None] - their_weight[None, :]
        heavier = np.maximum(load[heaviest] - change, load[their_bin] + change)
        if heavier.size == 0 or heavier.min() >= load[heaviest] * (1 - 1e-9):
            break
        row, column = np.unravel_index(heavier.argmin(), heavier.shape)
        bin_of[ours[row]] = their_bin[column]
        if column < len(theirs):
            bin_of[theirs[column]] = heaviest
        load = np.bincount(bin_of, weights, num_bins).astype(np.float64)
        count = np.bincount(bin_of, minlength=num_bins)
    return [[pairs[i] for i in np.flatnonzero(bin_of == b)] for b in range(num_bins)]


def _fill_up(bins: Bins, num_bins: int, may_split: bool) -> Bins:
    """The bins, extended to `num_bins`: by halving the one with the most pairs if `may_split`, else by empty bins."""
    bins = list(bins)
    while len(bins) < num_bins:
        largest = max(range(len(bins)), key=lambda i: len(bins[i]), default=None)
        if may_split and largest is not None and len(bins[largest]) > 1:
            half = len(bins[largest]) // 2
            bins[largest : largest + 1] = [bins[largest][:half], bins[largest][half:]]
        else:
            bins.append([])
    return bins


def _divide_up(count: int, by: int) -> int:
    return -(-count // by)
