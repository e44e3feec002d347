"""A run's checkpoints: damage is named, the newest intact one is used, and a run folder has one run. About 10 s."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.hf.config import read_hf_config
from spot_megatron.objective.shift import RewardShift
from spot_megatron.recipe import Lora
from spot_megatron.train.checkpoint import Checkpoints, Found, find_intact, set_aside
from spot_megatron.train.optim import make_trainable
from spot_megatron.train.optimizer_state import OptimizerWrite
from spot_megatron.train.reference import read_reference, write_reference
from spot_megatron.train.run_folder import locked
from spot_megatron.weights.adapters import attach_adapters
from spot_megatron.weights.checkpoint import ModelWrite, load_model, save_model
from tests.processes import ROOT
from tests.support import make_recipe, one_process, random_model, save_random_hf


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("written")
    save_random_hf(folder / "model")
    recipe = make_recipe(folder)
    with one_process(recipe):
        policy = make_trainable(random_model(recipe), recipe)
        policy.zero_grad()
        policy.update(0.1, policy.squared_grad_norm().item())
        made = Checkpoints(folder / "checkpoints", {}, datetime(2026, 1, 1), folder / "model", 3, Found())
        for step in (2, 4, 6):
            made.save(step, policy, RewardShift("none", 0.9))
    return folder / "checkpoints"


@pytest.fixture
def checkpoints(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.fixture
def world(tmp_path):
    """One process with a policy in training, and a maker of Checkpoints."""
    save_random_hf(tmp_path / "model")
    recipe = make_recipe(tmp_path)
    with one_process(recipe):
        policy = make_trainable(random_model(recipe), recipe)
        policy.zero_grad()

        def checkpoints(name: str, background: bool) -> Checkpoints:
            date = datetime(2026, 1, 1)
            return Checkpoints(tmp_path / name, {}, date, tmp_path / "model", 2, Found(), background)

        yield policy, checkpoints


def update(policy) -> None:
    policy.update(0.1, policy.squared_grad_norm().item())


def test_a_save_in_the_background_has_the_bits_of_its_step(world):
    """Updates during the write do not enter the checkpoint; the files are those of a save that blocks."""
    policy, checkpoints = world
    update(policy)
    checkpoints("blocking", False).save(2, policy, RewardShift("none", 0.9))
    background = checkpoints("background", True)
    background.save(2, policy, RewardShift("none", 0.9))
    for chunk in policy.bare:
        for parameter in chunk.parameters():
            parameter.data.add_(1)
    update(policy)
    assert not (background.folder / "step_00000002").exists()
    background.finish()
    files = {name: background.folder.parent / name / "step_00000002" for name in ("blocking", "background")}
    blocking, written = (read_files(folder) for folder in files.values())
    assert blocking.keys() == written.keys()
    for name in blocking.keys() - {CHECKSUMS, "optimizer/.metadata", "model/.metadata"}:  # those hold ids of the save
        assert blocking[name] == written[name], name
    assert find_intact(background.folder).newest == files["background"]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_kill_during_a_background_write_leaves_the_earlier_checkpoint(world, monkeypatch):
    policy, checkpoints = world
    update(policy)
    made = checkpoints("checkpoints", True)
    made.save(2, policy, RewardShift("none", 0.9))
    written = threading.Event()
    write = OptimizerWrite.write
    monkeypatch.setattr(OptimizerWrite, "write", lambda self: (written.wait(60), write(self)))
    made.save(4, policy, RewardShift("none", 0.9))  # one save is in flight at most: this finishes the first
    made.advance()
    assert [path.name for path in sorted(made.folder.iterdir())] == [".partial_step_00000004", "step_00000002"]
    assert find_intact(made.folder).newest == made.folder / "step_00000002"
    written.set()
    made.finish()
    assert find_intact(made.folder).newest == made.folder / "step_00000004"


def test_a_save_that_is_never_finished_leaves_no_trace_in_the_next(world, tmp_path):
    """Results that it left in megatron.core's queue would become the next checkpoint's metadata."""
    policy, _ = world
    ModelWrite(policy.bare, tmp_path / "abandoned").write()
    attach_adapters(policy.bare, read_hf_config(tmp_path / "model"), Lora(rank=2), 0)  # other tensors are saved
    save_model(policy.bare, tmp_path / "next")
    load_model(policy.bare, tmp_path / "next")


@pytest.mark.parametrize("part", [ModelWrite, OptimizerWrite])
def test_an_error_of_the_writing_thread_reaches_the_run(world, monkeypatch, part):
    def fail(self) -> None:
        raise OSError(28, "No space left on device")

    policy, checkpoints = world
    update(policy)
    made = checkpoints("checkpoints", True)
    monkeypatch.setattr(part, "write", fail)
    made.save(2, policy, RewardShift("none", 0.9))
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be written .*No space left.*Earlier checkpoints"):
        made.finish()
    made.finish()
    assert find_intact(made.folder) == Found()


def find(folder: Path) -> Found:
    with one_process(make_recipe(folder)):
        return find_intact(folder)


FILES = [
    "model/.metadata", "model/metadata.json", "model/__0_0.distcp", "optimizer/.metadata", "optimizer/__0_0.distcp",
    "state.json", CHECKSUMS, "hf/config.json",
]  # fmt: skip


FAULTS = [(file, fault) for file in FILES for fault in ("flip", "cut", "remove")]
FAULTS.remove((CHECKSUMS, "remove"))  # a checkpoint without checksums counts as an earlier version's


@pytest.mark.parametrize(("file", "fault"), FAULTS)
def test_the_newest_intact_checkpoint_is_found(checkpoints, file, fault):
    path = checkpoints / "step_00000006" / file
    content = path.read_bytes()
    if fault == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + (bytes([content[middle] ^ 1]) + content[middle + 1 :]) * (fault == "flip"))
    found = find(checkpoints)
    assert found.newest == checkpoints / "step_00000004"
    assert found.state["step"] == 4
    ((damaged, reason),) = found.damaged.items()
    assert damaged == checkpoints / "step_00000006"
    assert file in reason
    assert set_aside(damaged) == checkpoints / "damaged_step_00000006"
    assert find(checkpoints).damaged == {}


def test_an_intact_folder(checkpoints):
    found = find(checkpoints)
    assert (found.newest, found.damaged) == (checkpoints / "step_00000006", {})
    assert find(checkpoints / "nothing") == Found()


def test_all_damaged(checkpoints):
    for path in checkpoints.glob("step_*/state.json"):
        path.write_text("{")
    with pytest.raises(CheckpointError, match=r"step_00000006/state.json .*step_00000002.*checkpoint.resume=never"):
        find(checkpoints)


def test_an_earlier_versions_checkpoint_has_no_checksums(checkpoints):
    (checkpoints / "step_00000006" / CHECKSUMS).unlink()
    assert find(checkpoints).newest == checkpoints / "step_00000006"


HOLD = """
import sys, time
from pathlib import Path
from spot_megatron.files import take_lock
take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_the_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("spot_megatron.train.run_folder.LOCK_SECONDS", 0.3)
    recipe = make_recipe(tmp_path)
    with one_process(recipe) as topology:
        with locked(tmp_path / "run", topology):
            pass
        command = [sys.executable, "-c", HOLD, str(tmp_path / ".run.lock")]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
        try:
            assert holder.stdout
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(CheckpointError, match=f"process {holder.pid} .*is training in .*run"):
                locked(tmp_path / "run", topology).__enter__()
        finally:
            holder.kill()
            holder.wait()
        with locked(tmp_path / "run", topology):  # the lock goes with its holder
            pass


def test_a_damaged_reference_cache_is_refused(tmp_path):
    dataset = SimpleNamespace(pairs=[SimpleNamespace(id=f"p{number}") for number in range(3)])
    sums = np.array([[-1.25, -2.5], [-3.0, -4.0], [-5.0, -6.0]])
    path = tmp_path / "cache.jsonl"
    write_reference(path, dataset, sums)
    assert (read_reference(path, dataset) == sums).all()
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"cache\.jsonl"):
            read_reference(path, dataset)
        path.write_bytes(content[:place])
        with pytest.raises(CheckpointError, match=r"cache\.jsonl"):
            read_reference(path, dataset)
    assert json.loads(content.splitlines()[0]) == {"id": "p0", "logp_chosen": -1.25, "logp_rejected": -2.5}
