"""Checkpoints of a run: whole or absent, resumable to the same bits, loadable at another parallel split.

    checkpoints/step_00000050/   model/      Megatron distributed checkpoint of the weights, with LoRA of the adapters
                                 optimizer/  the optimizer's state, each rank's part in a file (optimizer_state.py)
                                 hf/         what an export needs besides the weights
                                 state.json  step, reward shift, the run's first date, and its identity
                                 SHA256SUMS  of all files; a resume compares them and uses the newest intact checkpoint
                 damaged_step_00000100/      a checkpoint that a resume found damaged and did not use
    finished.json                the run is complete: its identity, and the keys and digests of its results

The identity is the part of the recipe that must not change, with digests of the token ids of all pairs and of the
initial weights. A step's random numbers depend on the seed and the step alone, and the batch sampler is a pure function
of them too, so neither needs a state here.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from spot_megatron.errors import CheckpointError
from spot_megatron.files import file_sha256, write_json
from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.hf.side_files import save_side_files
from spot_megatron.objective.shift import RewardShift
from spot_megatron.recipe import Recipe
from spot_megatron.train.background import BackgroundWrite
from spot_megatron.train.optim import Policy
from spot_megatron.train.optimizer_state import load_optimizer, save_optimizer
from spot_megatron.weights import peft
from spot_megatron.weights.checkpoint import check_checksums, load_model, one_line, save_checksums, save_model

# Sections and keys whose change would make the rest of a run another run.
_FIXED = ("seed", "model", "objective", "train", "optim", "precision")
_FIXED_MEMORY = {"master_weights": "fp32"}  # with the value of checkpoints from before there was the key
_FIXED_OBJECTIVE = {"sft_weight": 0.0, "label_smoothing": 0.0}  # the same
_FIXED_DATA = ("pairs", "max_tokens", "enable_thinking", "order")

FINISHED = "finished.json"
PARTIAL = ".partial_"
PAIRS, WEIGHTS = "digest of the pairs", "digest of the initial weights"
_DIGESTS = {
    PAIRS: "the token ids of data.pairs have changed since this run began (another pair file, "
    "validation.fraction, tokenizer or chat template): restore them",
    WEIGHTS: "the weights of model.hf, its config.json or lora.adapter have changed since this run began: restore them",
}


def identity(recipe: Recipe, pairs_digest: str, weights_digest: str, num_pairs: int, num_steps: int) -> dict[str, Any]:
    """State that a resumed run must share with the run that it continues."""
    dump = recipe.model_dump(mode="json")
    dump["train"].pop("log_every_steps")
    dump["model"].pop("attention")
    part = {key: dump[key] for key in _FIXED} | {f"data.{key}": dump["data"][key] for key in _FIXED_DATA}
    part |= {f"memory.{key}": dump["memory"][key] for key in _FIXED_MEMORY}
    part["lora"] = _lora_part(dump["lora"])
    return part | {"num_pairs": num_pairs, "num_steps": num_steps, PAIRS: pairs_digest, WEIGHTS: weights_digest}


def _lora_part(lora: dict[str, Any] | None) -> dict[str, Any] | str:
    """The adapters of a run; checkpoints from before there were any name none."""
    if lora is None or lora["rank"] is None:
        return "off (all weights are trained)"
    return lora


@dataclass(frozen=True)
class Found:
    """Contents of a run's checkpoint folder for a resume."""

    newest: Path | None = None  # the intact checkpoint with the most steps
    state: Mapping[str, Any] = field(default_factory=dict)  # its state.json
    damaged: Mapping[Path, str] = field(default_factory=dict)  # newer ones: why they cannot be used


def find_intact(folder: Path) -> Found:
    """Looks for the newest checkpoint whose files have their checksums. Collective: each rank reads a share of them.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    names = [sorted(path.name for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))]
    dist.broadcast_object_list(names, src=0)
    damaged: dict[Path, str] = {}
    for path in (folder / name for name in reversed(names[0])):
        try:
            check_checksums(path)
            return Found(path, read_state(path), damaged)
        except CheckpointError as error:
            damaged[path] = str(error)
    if damaged:
        raise CheckpointError(
            f"{'. '.join(damaged.values())}. No intact checkpoint is left in {folder}: set checkpoint.resume=never to "
            "set the run aside and start anew"
        )
    return Found()


def _is_from_a_collective(error: BaseException) -> bool:
    """Whether another rank failed, and not the disk: gloo raises plain RuntimeErrors, NCCL DistErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def _errors_name(folder: Path) -> Iterator[None]:
    """Errors of writing `folder` become CheckpointErrors that name it."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
        if _is_from_a_collective(error):
            raise
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: BaseException) -> CheckpointError:
    """PyTorch's writers of a full disk raise errors that do not say so: the free space goes into the message."""
    free = shutil.disk_usage(folder.parent).free / 1e6
    return CheckpointError(
        f"{folder} cannot be written ({one_line(error)}; {free:.0f} MB are free on its disk). Earlier checkpoints are "
        "intact: make room, or choose another disk, and run the same command again"
    )


def finished_state(run: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The finished.json of a run folder; None without one, or if `recipe` wants other results than those it names, or
    if one of them is missing or is another one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state: dict[str, Any] = json.loads((run / FINISHED).read_text(encoding="utf-8"))
        if "recipe" in state and state["results"] == _results(run, recipe):
            return state
    return None


def _results(run: Path, recipe: Recipe) -> dict[str, Any]:
    """The keys that a finished run's results depend on besides its identity, and digests of these results."""
    dump = recipe.model_dump(mode="json")
    dump["export"].pop("push_to_hub")  # push.py keeps a record of its own
    files = {"hf": run / "hf" / CHECKSUMS, "adapter": run / "adapter" / peft.WEIGHTS}
    digests = {key: file_sha256(file) for key, file in files.items() if dump["export"][key]}
    return {"export": dump["export"], "validation": dump["validation"], "digests": digests}


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it is neither resumed nor counted. Returns its new path."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json. Raises CheckpointError if it is damaged."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if not {"step", "shift", "recipe"} <= state.keys():
            raise ValueError("a key is missing")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}/state.json is damaged ({error}); delete this checkpoint") from None
    return state


def check_identity(checkpoint: Path, state: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Compares a checkpoint's identity with that of the run which is to continue it.

    Returns:
        the digests that a checkpoint of an earlier version does not hold, so that they were not compared.

    Raises:
        CheckpointError: the checkpoint belongs to a run with another recipe, other pairs or other weights.
    """
    saved: dict[str, Any] = {f"memory.{key}": value for key, value in _FIXED_MEMORY.items()}
    saved |= {"lora": _lora_part(None)} | state["recipe"]
    saved["objective"] = _FIXED_OBJECTIVE | saved["objective"]
    missing = [key for key in _DIGESTS if key not in saved]
    differing = sorted(key for key in run.keys() | saved if key not in missing and run.get(key) != saved.get(key))
    if not differing:
        return missing
    changes = [f"{key}: was {saved.get(key)}, is {run.get(key)}" for key in differing if key not in _DIGESTS]
    reasons = [f"was written under another recipe ({'; '.join(changes)})"] if changes else []
    reasons += [f"cannot be continued: {_DIGESTS[key]}" for key in differing if key in _DIGESTS]
    raise CheckpointError(
        f"{checkpoint} {'; it '.join(reasons)}. Otherwise choose another `output`, or set checkpoint.resume=never to "
        "set the old run aside and start anew"
    )


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    identity: dict[str, Any]
    started: datetime  # the run's first date
    hf_folder: Path
    keep: int
    found: Found  # before this start
    background: bool = False
    _writing: BackgroundWrite | None = None  # a save that is not finished

    def path(self, step: int) -> Path:
        """The checkpoint after `step` updates, whether it exists or not."""
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, policy: Policy, shift: RewardShift, best: Mapping[str, Any] | None = None) -> None:
        """Writes the state after `step` updates, with the state of `best` (validation.py), and prunes. Collective.

        All but the `keep` newest checkpoints are removed, and those that one of these names as the best.

        The checkpoint is written beside its place and renamed when every rank has finished, so a killed run never
        leaves one that is half there. In the background, the call returns when the state is copied.

        Raises:
            CheckpointError: a file cannot be written, because the disk is full for example.
        """
        self.finish()
        partial = self.folder / f"{PARTIAL}{self.path(step).name}"
        main = dist.get_rank() == 0
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "optimizer").mkdir(parents=True)
        dist.barrier()
        content = {"step": step, "shift": shift.state_dict(), "started": self.started.isoformat()}
        content |= {"best": dict(best)} if best else {}
        with _errors_name(partial):
            if main:
                save_side_files(self.hf_folder, partial)
                write_json(partial / "state.json", content | {"recipe": self.identity})
            if self.background:
                self._writing = BackgroundWrite(policy, partial)
                return
            save_model(policy.bare, partial / "model")
            save_optimizer(policy, partial / "optimizer")
            save_checksums(partial)
        self._publish(partial)

    def advance(self) -> None:
        """Finishes a save in the background whose files are written. Collective; call it at every step."""
        if self._writing is not None and self._writing.is_done_everywhere():
            self.finish()

    def finish(self) -> None:
        """Blocks until a save in the background is finished. Collective. Raises CheckpointError as save does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with _errors_name(writing.folder):
                writing.finish()
            self._publish(writing.folder)

    def _publish(self, partial: Path) -> None:
        """Renames a complete checkpoint into its place and removes old ones. Collective."""
        if dist.get_rank() == 0:
            final = partial.with_name(partial.name.removeprefix(PARTIAL))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            self._prune()
        dist.barrier()

    def _prune(self) -> None:
        every = sorted(self.folder.glob("step_*"))
        kept = set(every[-self.keep :])
        for newest in every[-self.keep :]:
            with contextlib.suppress(CheckpointError):  # it is damaged, so that no resume will look for its best
                step = read_state(newest).get("best", {}).get("step")
                kept |= set() if step is None else {self.path(step)}
        for old in set(every) - kept:
            shutil.rmtree(old)

    def mark_finished(self, recipe: Recipe) -> None:
        """Records that the run is complete, and its results. Rank 0 only."""
        run = self.folder.parent
        state = {"started": self.started.isoformat(), "recipe": self.identity}
        write_json(run / FINISHED, state | {"results": _results(run, recipe)})

    def resume(self, policy: Policy, shift: RewardShift) -> int:
        """Restores weights, optimizer and reward shift from the checkpoint found. Returns the number of updates done.

        Raises:
            CheckpointError: the checkpoint has no checksums, being an earlier version's, and is damaged.
        """
        checkpoint, state = self.found.newest, self.found.state
        if checkpoint is None:
            return 0
        load_model(policy.bare, checkpoint / "model")
        step = int(state["step"])
        load_optimizer(policy, checkpoint / "optimizer", step)
        shift.load_state_dict(state["shift"])
        return step
