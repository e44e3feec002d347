"""Checkpoints of a run: whole or absent, resumable to the same bits, loadable at another parallel split.

    checkpoints/step_00000050/   model/      Megatron distributed checkpoint of the weights
                                 optimizer/  the same of the optimizer, resharded to any TP, PP and DP
                                 hf/         what an export needs besides the weights
                                 state.json  step, reward shift, and the recipe's part that must not change

A step's random numbers depend on the seed and the step alone (train/loop.py), and the batch sampler is a pure function
of them too, so neither needs a state here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.side_files import save_side_files
from spot_megatron.objective.shift import RewardShift
from spot_megatron.parallel.versions import offsets_without_padding, own_step_counters, ready_to_load
from spot_megatron.recipe import Recipe
from spot_megatron.train.optim import Policy
from spot_megatron.weights.checkpoint import load_model, model_state, save_model

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

# Sections and keys whose change would make the rest of a run another run.
_FIXED = ("seed", "model", "objective", "train", "optim", "precision")
_FIXED_MEMORY = {"master_weights": "fp32"}  # with the value of checkpoints from before there was the key
_FIXED_DATA = ("pairs", "max_tokens", "enable_thinking", "order")


def fixed_part(recipe: Recipe, num_pairs: int, num_steps: int) -> dict[str, Any]:
    """The part of a recipe that a resumed run must share with the run it continues."""
    dump = recipe.model_dump(mode="json")
    dump["train"].pop("log_every_steps")
    dump["model"].pop("attention")
    part = {key: dump[key] for key in _FIXED} | {f"data.{key}": dump["data"][key] for key in _FIXED_DATA}
    part |= {f"memory.{key}": dump["memory"][key] for key in _FIXED_MEMORY}
    return part | {"num_pairs": num_pairs, "num_steps": num_steps}


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps in a run's checkpoint folder."""
    complete = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    return max(complete, default=None)


def save(
    folder: Path,
    step: int,
    policy: Policy,
    shift: RewardShift,
    fixed: dict[str, Any],
    hf_folder: Path,
    keep: int,
) -> Path:
    """Writes the state after `step` updates and removes all but the `keep` newest checkpoints.

    The checkpoint is written beside its place and renamed when every rank has finished, so a killed run never leaves
    one that is half there.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".partial_{final.name}"
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "optimizer").mkdir(parents=True)
    dist.barrier()
    save_model(policy.bare, partial / "model")
    with offsets_without_padding(_distributed_parts(policy.optimizer)):
        state = policy.optimizer.sharded_state_dict(model_state(policy.bare), metadata=METADATA)
    dist_checkpointing.save({"optimizer": state}, str(partial / "optimizer"))
    if main:
        save_side_files(hf_folder, partial)
        content = {"step": step, "shift": shift.state_dict(), "recipe": fixed}
        (partial / "state.json").write_text(json.dumps(content, indent=1))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in sorted(folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(checkpoint: Path, policy: Policy, shift: RewardShift, fixed: dict[str, Any]) -> int:
    """Restores weights, optimizer and reward shift. Returns the number of updates done.

    Raises:
        CheckpointError: the checkpoint belongs to a run with another recipe, or is damaged.
    """
    state = read_state(checkpoint, fixed)
    load_model(policy.bare, checkpoint / "model")
    _load_optimizer(policy.optimizer, policy, checkpoint / "optimizer")
    shift.load_state_dict(state["shift"])
    return int(state["step"])


def read_state(checkpoint: Path, fixed: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's state.json.

    Raises:
        CheckpointError: it belongs to a run with another recipe, or is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint}/state.json cannot be read ({error}); delete this checkpoint") from None
    saved = {f"memory.{key}": value for key, value in _FIXED_MEMORY.items()} | state["recipe"]
    differing = sorted(key for key in fixed | saved if fixed.get(key) != saved.get(key))
    if differing:
        changes = "; ".join(f"{key}: was {saved.get(key)}, is {fixed.get(key)}" for key in differing)
        raise CheckpointError(
            f"{checkpoint} was written under another recipe ({changes}); "
            "choose another `output`, or set checkpoint.resume=never to set the old run aside and start anew"
        )
    return state


def _load_optimizer(optimizer: MegatronOptimizer, policy: Policy, folder: Path) -> None:
    parts = _distributed_parts(optimizer)
    for part in parts:
        ready_to_load(part)
    with offsets_without_padding(parts):
        wanted = optimizer.sharded_state_dict(model_state(policy.bare), is_loading=True, metadata=METADATA)
    loaded = dist_checkpointing.load({"optimizer": wanted}, str(folder))
    optimizer.load_state_dict(loaded["optimizer"])
    for part in parts:
        own_step_counters(part)


def _distributed_parts(optimizer: MegatronOptimizer) -> Sequence[DistributedOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
