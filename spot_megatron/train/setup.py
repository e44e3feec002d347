"""Everything that a run needs before its model is built: the data, its batches, and the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.pack import Pack
from spot_megatron.data.records import TokenPair
from spot_megatron.data.sampler import BatchSampler, Bins
from spot_megatron.data.template import TokenizedPairs
from spot_megatron.files import write_json
from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.hf.config import HFModelConfig, read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.hub import resolve_model
from spot_megatron.model.config import transformer_config
from spot_megatron.parallel.device import make_deterministic
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Recipe
from spot_megatron.train import checkpoint
from spot_megatron.train.batches import training_batches
from spot_megatron.train.checkpoint import FINISHED, Checkpoints, Found, find_intact, finished_state, set_aside
from spot_megatron.train.data import read_data
from spot_megatron.train.heartbeat import Heartbeat
from spot_megatron.train.loggers import check_loggers
from spot_megatron.train.packing import pack_multiple
from spot_megatron.train.push import check_token
from spot_megatron.train.run_folder import first_date, from_main, prepare_folder, say
from spot_megatron.weights.peft import adapter_digest


@dataclass(frozen=True)
class Setup:
    """A run's inputs, equal on every rank but for `topology` and `heartbeat`."""

    recipe: Recipe
    topology: Topology
    folder: Path
    hf: HFModelConfig
    weights: HFFolder
    weights_digest: str
    dataset: PreferencePairDataset
    sampler: BatchSampler
    checkpoints: Checkpoints
    heartbeat: Heartbeat
    held_out: PreferencePairDataset | None = None
    probe: PreferencePairDataset | None = None
    finished: bool = False  # by an earlier start: nothing is left to do

    def packs(self, step: int) -> list[Pack]:
        """This rank's micro-batches of a step."""
        return self.lay_out(self.sampler.plan(step))

    def lay_out(self, plan: Sequence[Bins]) -> list[Pack]:
        """This rank's packs of `plan`: by data-parallel rank, by micro-batch, the indices of pairs."""
        pairs_of_packs, multiple_of = plan[self.topology.data_rank], pack_multiple(self.recipe)
        return [self.dataset.pack(pairs, self.recipe.data.layout, multiple_of) for pairs in pairs_of_packs]

    def seed(self, step: int) -> int:
        """The random state of a step, a function of the recipe's seed and the step alone."""
        return int.from_bytes(hashlib.sha256(f"{self.recipe.seed}:{step}".encode()).digest()[:7], "big")


def set_up(recipe: Recipe, topology: Topology, heartbeat: Heartbeat) -> Setup:
    """Reads the data and prepares the run folder. Collective.

    Raises:
        UserError: recipe, model folder, pairs or the run to be resumed cannot be used.
    """
    if recipe.deterministic:
        make_deterministic(topology.device)
    check_loggers(recipe)
    check_token(recipe)
    hf_folder = resolve_model(recipe.model.hf)
    hf = read_hf_config(hf_folder)
    transformer_config(hf, recipe, topology.device.type)  # raises for a split that does not fit, before data is read
    weights = HFFolder(hf_folder)
    output = Path(recipe.output)
    resume = recipe.checkpoint.resume
    finished = from_main(lambda: finished_state(output, recipe) if resume == "auto" else None, topology)
    found = find_intact(output / "checkpoints") if resume == "auto" and not finished else Found()
    started: datetime = from_main(lambda: first_date(output, finished or found.state, resume), topology)
    data = read_data(recipe, hf_folder, hf, topology, started)
    dataset = _dataset(data.training.pairs, recipe)
    sampler = training_batches(recipe, dataset, hf, topology)
    digest: str = from_main(lambda: _initial_digest(recipe, weights), topology)
    identity = checkpoint.identity(recipe, dataset.fingerprint(), digest, len(dataset), sampler.num_steps)
    if found.newest:  # another run is refused before any of its files is overwritten
        for name in checkpoint.check_identity(found.newest, found.state, identity):
            say(
                topology,
                f"WARNING: {found.newest} was written by an earlier version without a {name}, so it is not compared",
            )
        if not (found.newest / CHECKSUMS).is_file():
            say(topology, f"WARNING: {found.newest} has no {CHECKSUMS}, so damage to its files may go unnoticed")
    checkpoints = Checkpoints(
        output / "checkpoints",
        identity,
        started,
        hf_folder,
        keep=recipe.checkpoint.keep,
        found=found,
        background=recipe.checkpoint.background,
    )
    job = Setup(recipe, topology, output, hf, weights, digest, dataset, sampler, checkpoints, heartbeat)
    if finished:
        checkpoint.check_identity(output / FINISHED, finished, identity)
        return replace(job, finished=True)
    folder = prepare_folder(recipe, topology, started)
    if topology.is_main:
        if (folder / FINISHED).exists():
            say(
                topology,
                f"WARNING: the finished run in {folder} has other results than this recipe (its sections export and "
                f"validation), or they are gone; continuing from {found.newest or 'the first step'}",
            )
            (folder / FINISHED).unlink()
        write_json(folder / "dropped.json", data.training.dropped)
        for damaged, reason in found.damaged.items():
            say(topology, f"WARNING: {reason}. Renamed to {set_aside(damaged)}; continuing from {found.newest}")
    held_out, probe = (_dataset(pairs, recipe) if pairs else None for pairs in (data.held_out, data.probe))
    return replace(job, held_out=held_out, probe=probe)


def _dataset(pairs: list[TokenPair], recipe: Recipe) -> PreferencePairDataset:
    tokenized = TokenizedPairs(pairs, {})
    return PreferencePairDataset.build(tokenized, seed=recipe.seed, max_tokens=recipe.data.max_tokens, pad_id=0)


def _initial_digest(recipe: Recipe, weights: HFFolder) -> str:
    """Of the policy before its first update: the model's weights, and adapters that are not new."""
    digest = weights.digest()
    if recipe.lora.adapter is None:
        return digest
    return hashlib.sha256((digest + adapter_digest(Path(recipe.lora.adapter))).encode()).hexdigest()
