"""The export, and whether it still is what was trained.

Rounding to the folder's data type may undo small updates: a weight that moved by less than half a step of bf16 is
exported as it began. So the exported values are read back into the model, and the rewards of a sample of pairs are
measured with them as in the reference pass, beside those of the weights as trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spot_megatron.files import write_json
from spot_megatron.hf.folder import HFFolder
from spot_megatron.model.gpt import PairGPT
from spot_megatron.model.lora import adapters_off
from spot_megatron.report.run import EXPORT, MARGIN_LOSS
from spot_megatron.train.reference import reward_means, sample_of, sample_sums
from spot_megatron.train.run_folder import say
from spot_megatron.train.setup import Setup
from spot_megatron.weights.export import export_hf
from spot_megatron.weights.load import load_hf

SAMPLE = 32  # pairs


def export_run(job: Setup, chunks: Sequence[PairGPT], reference: np.ndarray) -> Path:
    """Writes the run's Hugging Face folder and export.json; afterwards `chunks` hold the exported values. Collective.

    Prints a warning if the mean margin of the sample has fallen by more than MARGIN_LOSS of itself.

    Args:
        reference: [num pairs, 2] log-probability sums (chosen, rejected) in nats.

    Returns:
        the folder.
    """
    options, beta = job.recipe.export, job.recipe.objective.beta
    sample = sample_of(len(reference), SAMPLE)
    trained = reward_means(beta * (sample_sums(job, chunks, sample) - reference[sample]))
    result = job.folder / "hf"
    source = job.weights.folder
    export_hf(chunks, source, result, job.hf, dtype=options.dtype, shard_gb=options.shard_gb, replace=True)
    load_hf(chunks, HFFolder(result), job.hf)
    with adapters_off(chunks):  # they are merged into the folder's weights
        exported = reward_means(beta * (sample_sums(job, chunks, sample) - reference[sample]))
    if job.topology.is_main:
        content = {"dtype": options.dtype, "pairs": len(sample), "trained": trained, "exported": exported}
        write_json(job.folder / EXPORT, content)
    before, after = trained["reward_margin"], exported["reward_margin"]
    say(job.topology, f"exported to {result}; margin of {len(sample)} pairs {after:+.4f}, as trained {before:+.4f}")
    if before - after > MARGIN_LOSS * abs(before):
        say(
            job.topology,
            f"WARNING export_rounding: rounding to the export's data type has lost {before - after:.4f} of the margin, "
            f"more than {MARGIN_LOSS:.0%} of it; raise optim.lr, or set export.dtype=fp32 with precision.dtype=fp32",
        )
    return result
