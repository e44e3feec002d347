"""Loggers besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, SwanLab and Trackio, each optional.

A run keeps the ids under which it is known in loggers.json of its folder, so that a resumed run continues its own
record there, and two runs of one name have two. Where a logger stores its records, and whether it is offline, is set by
its own environment variables: WANDB_MODE, MLFLOW_TRACKING_URI (by default a folder of the run), SWANLAB_MODE,
TRACKIO_DIR.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from spot_megatron.errors import RecipeError
from spot_megatron.files import write_json
from spot_megatron.recipe import Recipe

PROJECT = "spot_megatron"
IDS = "loggers.json"


class Logger(Protocol):
    """Receives the numbers of every step, and those of a validation under names with the prefix validation/. A step
    that is logged again after a resume has the same numbers."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


def wanted_loggers(recipe: Recipe) -> list[str]:
    """Names of the loggers that the recipe switches on, which are those of their packages."""
    return [name for name, is_wanted in recipe.logging.model_dump().items() if is_wanted]


def check_loggers(recipe: Recipe) -> None:
    """Raises RecipeError, on every rank, if a logger of the recipe needs a package that is not installed."""
    for package in wanted_loggers(recipe):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RecipeError(
                f"logging.{package}=true: the package cannot be imported ({error}); pip install {package}, or set "
                f"logging.{package}=false"
            ) from None


def open_loggers(folder: Path, recipe: Recipe, first_step: int) -> list[Logger]:
    """The recipe's loggers; those of a resumed run continue after `first_step` updates.

    Raises:
        RecipeError: a logger cannot be started, for lack of a login for example.
    """
    made: list[Logger] = []
    for name in wanted_loggers(recipe):
        try:
            made.append(LOGGERS[name](folder, recipe, first_step))
        except Exception as error:  # services fail in many ways, each with exceptions of its package
            raise RecipeError(
                f"logging.{name}=true: the logger did not start ({type(error).__name__}: {error}); log in, set its "
                f"offline mode, or set logging.{name}=false"
            ) from error
    return made


def run_id(folder: Path, logger: str, make: Callable[[], str] = lambda: uuid4().hex[:16]) -> str:
    """The id of the run in `folder` under a logger: the stored one, else `make()`, which is stored."""
    file = folder / IDS
    ids: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if logger not in ids:
        ids[logger] = make()
        write_json(file, ids)
    return ids[logger]


class TensorBoard:
    def __init__(self, folder: Path, recipe: Recipe, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            if key != "step":
                self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, folder: Path, recipe: Recipe, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=recipe.name,
            id=run_id(folder, "wandb"),
            resume="allow",
            dir=str(folder),
            config=recipe.model_dump(by_alias=True),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    def __init__(self, folder: Path, recipe: Recipe, first_step: int) -> None:
        from mlflow import MlflowClient

        # A folder needs no database; MLflow 3 asks for this word of consent.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri())
        self._run = run_id(folder, "mlflow", lambda: self._create(recipe))
        self._client.update_run(self._run, status="RUNNING")

    def _create(self, recipe: Recipe) -> str:
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        created: str = self._client.create_run(number, run_name=recipe.name).info.run_id
        self._client.log_text(created, recipe.dump(), "recipe.yaml")
        return created

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(key, value, now, step) for key, value in numbers.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Swanlab:
    def __init__(self, folder: Path, recipe: Recipe, first_step: int) -> None:
        import swanlab

        self._run = swanlab.init(
            project=PROJECT,
            experiment_name=recipe.name,
            id=run_id(folder, "swanlab", lambda: uuid4().hex[:21]),  # the length that it asks for
            resume="allow",
            logdir=str(folder / "swanlab"),
            config=recipe.model_dump(by_alias=True),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        import swanlab

        swanlab.finish(state="crashed" if failed else "success")


class Trackio:
    def __init__(self, folder: Path, recipe: Recipe, first_step: int) -> None:
        import trackio

        self._run = trackio.init(
            project=PROJECT,
            name=f"{recipe.name}-{run_id(folder, 'trackio')}",  # Trackio knows a run by its name
            resume="allow",
            config=recipe.model_dump(by_alias=True),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, Recipe, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "swanlab": Swanlab,
    "trackio": Trackio,
}
