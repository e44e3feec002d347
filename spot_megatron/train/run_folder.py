"""The run folder: recipe, environment and first date; an earlier run is set aside if it must not be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spot_megatron.errors import CheckpointError, RecipeError
from spot_megatron.files import take_lock, write_json, write_text
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Recipe

PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "numpy")
LOCK_SECONDS = 10.0  # that a killed run's processes may take to end


@contextlib.contextmanager
def locked(folder: Path, topology: Topology) -> Iterator[None]:
    """Keeps other processes from training in `folder` meanwhile. Collective.

    Raises:
        CheckpointError: another run uses the folder, on every rank.
    """
    file = folder.with_name(f".{folder.name}.lock")  # beside it, as checkpoint.resume=never renames the folder
    lock: int | None = None

    def take() -> str | None:
        nonlocal lock
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(file, LOCK_SECONDS)
        except BlockingIOError as holder:
            return f"output: {holder} is training in {folder}; let it finish, stop it, or choose another `output`"
        except PermissionError as error:
            return f"output: {folder} cannot be created ({error}); choose a writable folder"
        except OSError as error:
            say(topology, f"WARNING: {file} cannot be locked ({error}): do not start a second run in {folder}")
        return None

    refusal: str | None = from_main(take, topology)
    if refusal is not None:
        raise CheckpointError(refusal)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def prepare_folder(recipe: Recipe, topology: Topology, started: datetime) -> Path:
    """Makes the run folder and writes recipe and environment. Collective.

    Raises:
        RecipeError: the folder cannot be created.
    """
    folder = Path(recipe.output)
    if topology.is_main:
        if recipe.checkpoint.resume == "never" and (folder / "metrics.jsonl").exists():
            aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
            folder.rename(aside)
            say(topology, f"set the earlier run aside as {aside}")
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"output: {folder} cannot be created ({error}); choose a writable folder") from None
        shutil.rmtree(folder / "heartbeat", ignore_errors=True)
        write_text(folder / "recipe.yaml", recipe.dump())
        write_json(folder / "environment.json", environment(topology) | {"started": started.isoformat()})
    dist.barrier()
    return folder


def first_date(folder: Path, state: Mapping[str, Any], resume: str) -> datetime:
    """When the run in `folder` began: from its checkpoint's `state`, else its environment.json, else now."""
    text = state.get("started")
    file = folder / "environment.json"
    if text is None and resume == "auto" and file.exists():
        with contextlib.suppress(ValueError, AttributeError):  # environment.json is for readers; it may be edited
            text = json.loads(file.read_text(encoding="utf-8")).get("started")
    return datetime.now().replace(microsecond=0) if text is None else datetime.fromisoformat(text)


def environment(topology: Topology) -> dict[str, Any]:
    """Versions and hardware behind a run's numbers."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if topology.device.type == "cuda" else platform.processor() or "cpu",
        "processes": topology.world,
        "threads": torch.get_num_threads(),
    }


def from_main(value: Callable[[], Any], topology: Topology) -> Any:
    """`value()` of rank 0, on every rank. Collective."""
    values = [value() if topology.is_main else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def say(topology: Topology, text: str) -> None:
    """Prints on rank 0."""
    if topology.is_main:
        print(text, flush=True)
