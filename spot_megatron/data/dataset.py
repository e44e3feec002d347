"""Tokenised pairs as a megatron.core dataset, and the packs of a rank."""

import hashlib
from collections.abc import Sequence

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from spot_megatron.data.costs import CostModel
from spot_megatron.data.pack import Layout, Pack, build_pack, num_positions, num_targets, positions_and_products
from spot_megatron.data.records import TokenPair
from spot_megatron.data.template import TokenizedPairs


class PreferencePairDataset(MegatronDataset):
    """Preference pairs in token ids; the low-level dataset is the list of TokenPair. Built by `build`."""

    pad_id: int  # fills packs

    @classmethod
    def build(cls, pairs: TokenizedPairs, seed: int, max_tokens: int, pad_id: int) -> "PreferencePairDataset":
        """All pairs as the training split. `max_tokens` bounds prompt + response; `pad_id` fills packs."""
        name = "preference_pairs"
        config = BlendedMegatronDatasetConfig(
            random_seed=seed, sequence_length=max_tokens, blend=([name], None), split="1,0,0"
        )
        dataset = cls(
            dataset=pairs.pairs,
            dataset_path=name,
            indices=np.arange(len(pairs.pairs)),
            num_samples=len(pairs.pairs),
            index_split=Split.train,
            config=config,
        )
        dataset.pad_id = pad_id
        return dataset

    @property
    def pairs(self) -> list[TokenPair]:
        return self.dataset

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, idx: int) -> dict[str, np.ndarray]:
        """prompt_ids, chosen_ids, rejected_ids, each [tokens] int32, and index [] int64."""
        pair = self.pairs[idx]
        return {
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
            "index": np.array(idx, dtype=np.int64),
        }

    def num_positions(self, layout: Layout) -> np.ndarray:
        """[N] int64: positions of every pair in a pack."""
        return np.array([num_positions(pair, layout) for pair in self.pairs], dtype=np.int64)

    def costs(self, layout: Layout, model: CostModel, recomputed_above: int | None = None) -> np.ndarray:
        """[N] float64: compute time of every pair, in positions; see CostModel.of."""
        work = [(*positions_and_products(pair, layout), num_targets(pair, layout)) for pair in self.pairs]
        positions, products, targets = np.array(work, dtype=np.float64).T
        return model.of(positions, products, targets, recomputed_above)

    def fingerprint(self) -> str:
        """SHA-256 of the pairs' ids and tokens, in order; equal for equal training data only."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            name = pair.id.encode()
            sides = [
                np.ascontiguousarray(x, dtype="<i4") for x in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
            ]
            digest.update(np.array([len(name), *map(len, sides)], dtype="<i8").tobytes())
            digest.update(b"".join([name, *(side.tobytes() for side in sides)]))
        return digest.hexdigest()

    def pack(self, indices: Sequence[int], layout: Layout, multiple_of: int) -> Pack:
        """One micro-batch of the pairs `indices` (padding only if there are none); see build_pack."""
        return build_pack([self.pairs[i] for i in indices], indices, layout, multiple_of, self.pad_id)
