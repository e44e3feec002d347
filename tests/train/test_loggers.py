"""Loggers, offline and with the packages themselves: records arrive, and a run folder keeps its own record.

Each is skipped where its package is not installed.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from spot_megatron.errors import RecipeError
from spot_megatron.train.loggers import IDS, LOGGERS, open_loggers, run_id, wanted_loggers
from tests.support import make_recipe

OPTIONAL = sorted(LOGGERS.keys() - {"tensorboard"})


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "swanlab_home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def start(folder: Path, name: str, steps: range):
    """A start of a run, which logs `steps`."""
    folder.mkdir(exist_ok=True)
    recipe = make_recipe(folder, logging={name: True})
    (logger,) = open_loggers(folder, recipe, steps.start - 1)
    for step in steps:
        logger.log({"step": step, "loss": 2.0 / step}, step)
    logger.close(failed=False)
    return logger


def stored_id(folder: Path, name: str) -> str:
    return json.loads((folder / IDS).read_text())[name]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_resumed_run_continues_its_record(tmp_path, offline, name):
    """Step 2 is logged twice, as after a kill."""
    pytest.importorskip(name)
    start(tmp_path / "run", name, range(1, 3))
    first = stored_id(tmp_path / "run", name)
    start(tmp_path / "run", name, range(2, 5))
    start(tmp_path / "other", name, range(1, 2))
    assert stored_id(tmp_path / "run", name) == first
    assert stored_id(tmp_path / "other", name) != first
    globals()[f"check_{name}"](tmp_path, first)


def check_wandb(folder: Path, run: str) -> None:
    ids = sorted(path.name.rsplit("-", 1)[1] for path in (folder / "run" / "wandb").glob("offline-run-*"))
    assert ids == [run, run]  # one folder a start, which `wandb sync` joins by the id
    assert all(path.stat().st_size for path in (folder / "run" / "wandb").glob("offline-run-*/*.wandb"))


def check_mlflow(folder: Path, run: str) -> None:
    client = importlib.import_module("mlflow").MlflowClient((folder / "run" / "mlflow").as_uri())
    losses = {metric.step: metric.value for metric in client.get_metric_history(run, "loss")}
    assert losses == {1: 2.0, 2: 1.0, 3: 2 / 3, 4: 0.5}
    assert client.get_run(run).info.status == "FINISHED"


def check_swanlab(folder: Path, run: str) -> None:
    starts = [path for path in (folder / "run" / "swanlab").glob("*run-*") if path.is_dir()]
    assert len(starts) == 2
    for path in starts:
        assert any(run.encode() in file.read_bytes() for file in path.rglob("*") if file.is_file()), path


def check_trackio(folder: Path, run: str) -> None:
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    names = storage.get_runs("spot_megatron")
    assert len(names) == 2
    (name,) = (name for name in names if name.endswith(run))
    assert {row["step"]: row["loss"] for row in storage.get_logs("spot_megatron", name)}[4] == 0.5


def test_a_logger_that_does_not_start_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no API key")

    monkeypatch.setitem(LOGGERS, "tensorboard", refuse)
    recipe = make_recipe(tmp_path, logging={"tensorboard": True})
    with pytest.raises(RecipeError, match=r"logging.tensorboard=true: .*no API key.*offline mode"):
        open_loggers(tmp_path, recipe, 0)


def test_an_id_stays_with_its_folder(tmp_path):
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path, "wandb") == run_id(tmp_path, "wandb")
    assert run_id(tmp_path, "wandb") != run_id(tmp_path, "trackio")
    assert run_id(tmp_path, "wandb") != run_id(tmp_path / "other", "wandb")


def test_every_key_has_its_logger(tmp_path):
    assert wanted_loggers(make_recipe(tmp_path, logging=dict.fromkeys(LOGGERS, True))) == list(LOGGERS)
