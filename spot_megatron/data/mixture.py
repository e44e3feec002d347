"""Weighted mixing of pair files: which pairs an epoch holds, and how often."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spot_megatron.data.records import TokenPair
from spot_megatron.errors import PairError


@dataclass(frozen=True, eq=False)
class FileShare:
    """The pairs of one file and their number in an epoch, repetitions included."""

    file: str
    indices: np.ndarray  # [pairs of the file] int64, in the dataset
    per_epoch: int


def mix_files(pairs: Sequence[TokenPair], weights: Mapping[Path, float]) -> list[FileShare]:
    """The files of `pairs` in their order; a file without a weight has weight 1.

    An epoch holds weight x (the file's pairs that were not dropped), rounded to a whole number.

    Raises:
        PairError: the weight of a file rounds to no pair at all.
    """
    members: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        members.setdefault(pair.source.rpartition(":")[0], []).append(index)
    weight_of = {str(path): weight for path, weight in weights.items()}
    shares = []
    for file, indices in members.items():
        weight = weight_of.get(file, 1.0)
        share = FileShare(file, np.array(indices, dtype=np.int64), round(weight * len(indices)))
        if share.per_epoch == 0:
            raise PairError(
                f"{file}: data.pairs gives it the weight {weight:g}, which shows none of its {len(indices)} pairs; "
                "raise the weight, or remove the file"
            )
        shares.append(share)
    return shares


def epoch_pairs(shares: Sequence[FileShare], seed: int, epoch: int) -> np.ndarray:
    """[pairs of the epoch] int64 indices, file by file.

    Every pair occurs floor(weight) times. The rest of the weight is a window on a fixed permutation of the file that
    moves on by its own length every epoch, so that no pair is repeated before all others were shown.
    """
    chosen = []
    for number, share in enumerate(shares):
        times, rest = divmod(share.per_epoch, len(share.indices))
        chosen += [share.indices] * times
        if rest:
            # RandomState: numpy guarantees that its streams never change.
            stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, number, 1])))
            window = (epoch * rest + np.arange(rest)) % len(share.indices)
            chosen.append(share.indices[np.sort(stream.permutation(len(share.indices))[window])])
    return np.concatenate(chosen)
