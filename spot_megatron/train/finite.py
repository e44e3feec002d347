"""No number that is not finite reaches an update, a checkpoint or an export (invariant 10)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from spot_megatron.data.pack import Pack
from spot_megatron.errors import TrainingError, WeightError
from spot_megatron.model.gpt import PairGPT
from spot_megatron.train.step import StepSums
from spot_megatron.weights.placement import layer_offset

if TYPE_CHECKING:
    from spot_megatron.train.setup import Setup

MOST_NAMES = 5  # of ranks and pairs in a message


def check_gradients(
    job: Setup,
    step: int,
    sums: StepSums,
    reports: Sequence[dict[str, Any]],
    packs: Sequence[Pack],
    chunks: list[PairGPT],
) -> None:
    """Compares the step's loss and gradient norm with infinity, before its update. Collective if one is not finite.

    Raises:
        TrainingError: names the step, the ranks and the first parameter with such a gradient, and the pairs.
    """
    if math.isfinite(sums.loss) and math.isfinite(sums.grad_norm):
        return
    own = {pair for report, pack in zip(reports, packs, strict=False) for pair in _bad_pairs(report, pack)}
    found = _gather((sorted(own), _first_bad(chunks, "main_grad")))
    pairs = sorted({pair for bad, _ in found for pair in bad}) or job.sampler.batch(step)
    ranks = [rank for rank, (_, name) in enumerate(found) if name]
    first = min((name for _, name in found if name), default=None)
    ids = _listed([job.dataset.pairs[pair].id for pair in pairs])
    where = f"; first parameter {first[1]}, rank {_listed(ranks)}" if first else ""
    raise TrainingError(
        f"step {step + 1}: the loss is {sums.loss / max(sums.num_pairs, 1)}, the gradient norm {sums.grad_norm}{where}"
        f"; pairs {ids}. Weights, reward shift and checkpoints were not changed. Look at these pairs; lower optim.lr, "
        "or set precision.dtype=fp32 to see whether the number format is the cause"
    )


def check_weights(chunks: Sequence[PairGPT], step: int) -> None:
    """Looks for NaN and infinity in the weights before they are saved or exported. Collective.

    Raises:
        TrainingError: names the first parameter and the ranks that hold it.
    """
    if (where := _bad_weights(chunks)) is not None:
        raise TrainingError(
            f"step {step}: the weights are not finite; {where}. Nothing was saved or exported. Lower optim.lr and run "
            "again: the run continues from its newest checkpoint, or set checkpoint.resume=never to start anew"
        )


def check_initial_weights(chunks: Sequence[PairGPT], folder: Path) -> None:
    """Looks for NaN and infinity in the weights that were read from the model `folder`. Collective.

    Raises:
        WeightError: names the first parameter and the ranks that hold it.
    """
    if (where := _bad_weights(chunks)) is not None:
        raise WeightError(f"{folder}: the weights are not finite; {where}; copy the model again, or use another one")


def check_forward(ids: Sequence[str], values: np.ndarray, name: str) -> None:
    """Looks for NaN and infinity in the `values` [num pairs, K] of the forward pass that `name` says.

    Raises:
        TrainingError: names the pairs.
    """
    bad = [ids[int(pair)] for pair in np.flatnonzero(~np.isfinite(values).all(axis=1))]
    if bad:
        raise TrainingError(
            f"{name}: the log-probabilities of {len(bad)} of {len(ids)} pairs are not finite, although the "
            f"weights are: {_listed(bad)}. Look at these pairs, or set precision.dtype=fp32 to see whether the number "
            "format is the cause"
        )


def _bad_weights(chunks: Sequence[PairGPT]) -> str | None:
    """The first parameter that is not finite and the ranks that hold it, in words; None if all are. Collective."""
    with torch.no_grad():
        norms = torch._foreach_norm([parameter for chunk in chunks for parameter in chunk.parameters()], math.inf)
        bad = (~torch.stack([norm.float() for norm in norms]).isfinite()).sum().double()
    dist.all_reduce(bad)
    if not bad.item():
        return None
    found = _gather(_first_bad(chunks, "data"))
    first = min(name for name in found if name)
    ranks = [rank for rank, name in enumerate(found) if name]
    return f"first parameter {first[1]}, rank {_listed(ranks)}"


def _bad_pairs(report: dict[str, Any], pack: Pack) -> list[int]:
    return pack.pair_index[~report["losses"].isfinite().cpu().numpy()].tolist()


def _first_bad(chunks: Sequence[PairGPT], attribute: str) -> tuple[tuple[int, int], str] | None:
    """(sort key, name with the model's layer number) of this rank's first parameter that is not finite."""
    for chunk in chunks:
        offset = layer_offset(chunk)
        for position, (name, parameter) in enumerate(chunk.named_parameters()):
            values = getattr(parameter, attribute, None)
            if values is not None and not values.isfinite().all():  # frozen ones have no gradient
                layer = re.search(r"(?<=layers\.)\d+", name)
                if layer:
                    number = int(layer[0]) + offset
                    return (number, position), name.replace(f"layers.{layer[0]}.", f"layers.{number}.", 1)
                return (-1 if "embedding" in name else 10**6, position), name
    return None


def _gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _listed(values: Sequence[Any]) -> str:
    rest = len(values) - MOST_NAMES
    return ", ".join(map(str, values[:MOST_NAMES])) + (f" and {rest} more" if rest > 0 else "")
