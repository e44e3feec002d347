"""A run's metrics: metrics.jsonl, TensorBoard, Weights & Biases and the progress line. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from spot_megatron.errors import PairError
from spot_megatron.files import parse_line, write_rows
from spot_megatron.recipe import Recipe
from spot_megatron.train.loggers import open_loggers
from spot_megatron.train.step import StepSums
from spot_megatron.train.watch import KEYS, Watch


def metrics_row(step: int, sums: StepSums, shift: float, lr: float, seconds: float) -> dict[str, Any]:
    """Means over the step's pairs, measured before the update; rewards include beta."""
    n = sums.num_pairs
    return {
        "step": step,
        "loss": sums.loss / n,
        "reward_chosen": sums.reward_chosen / n,
        "reward_rejected": sums.reward_rejected / n,
        "reward_margin": (sums.reward_chosen - sums.reward_rejected) / n,
        "reward_accuracy": sums.num_accurate / n,
        "reward_shift": shift,
        "grad_norm": sums.grad_norm,
        "lr": lr,
        "pairs": n,
        "tokens": sums.num_tokens,
        "unique_tokens": sums.num_unique_tokens,
        "seconds": round(seconds, 4),
    }


def earlier_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows of steps 1 to `last_step`. Prints a warning if some are missing or damaged.

    A crash or a full disk may leave half a line. No update depends on these rows, so the run continues without them.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(PairError):
            row = parse_line(line, str(path))
            numbers = [row.get("step"), *(row.get(key) for key in KEYS)]
            if all(type(number) in (int, float) for number in numbers) and 1 <= row["step"] <= last_step:
                rows[row["step"]] = row
    if len(rows) < last_step:
        print(f"WARNING: {path}: the rows of {last_step - len(rows)} of {last_step} steps are missing or damaged")
    return [rows[step] for step in sorted(rows)]


def earlier_validations(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The validations after 0 to `last_step` updates of a run that continues from there; of a new run, none."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if last_step and path.exists() else []:
        with contextlib.suppress(PairError):
            row = parse_line(line, str(path))
            if type(row.get("step")) is int and 0 <= row["step"] <= last_step:
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


class MetricsLog:
    """Appends a row per step to every logger. A resumed run drops the rows after its checkpoint and writes them again.

    Other ranks than 0 may use it too: it does nothing there.
    """

    def __init__(self, folder: Path, recipe: Recipe, num_steps: int, first_step: int, is_main: bool) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self.path = folder / "metrics.jsonl"
        rows = earlier_rows(self.path, first_step)
        write_rows(self.path, rows)
        self._file = self.path.open("a", encoding="utf-8")
        self._validations = folder / "validation.jsonl"
        validations = earlier_validations(self._validations, first_step)
        if validations or self._validations.exists():
            write_rows(self._validations, validations)
        self._watch = Watch(rows, validations)
        self._every = recipe.train.log_every_steps
        self._loggers = open_loggers(folder, recipe, first_step)
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not self._interactive)

    def __enter__(self) -> MetricsLog:
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Logs one optimizer step; its row is on disk when this returns."""
        if not self._is_main:
            return
        step = row["step"]
        warnings = self._watch.look(row)
        if warnings:
            row["warnings"] = sorted(warnings)
        _append(self._file, row)
        numbers = {key: value for key, value in row.items() if key != "warnings"}
        for logger in self._loggers:
            logger.log(numbers, step)
        self._bar.update()
        self._warn(step, warnings)
        if step % self._every == 0:
            self._show(row)

    def write_validation(self, row: dict[str, Any], is_best: bool) -> None:
        """Logs a validation; its row is on disk when this returns. `is_best`: by validation.keep_best."""
        if not self._is_main:
            return
        step = row["step"]
        numbers = {f"validation/{key}": value for key, value in row.items() if key != "step"}
        warnings = self._watch.look_at_validation(row)
        if warnings:
            row["warnings"] = sorted(warnings)
        with self._validations.open("a", encoding="utf-8") as file:
            _append(file, row)
        for logger in self._loggers:
            logger.log(numbers, step)
        self._warn(step, warnings)
        tqdm.write(validation_line(row, is_best), file=sys.stdout)
        sys.stdout.flush()

    def _warn(self, step: int, warnings: dict[str, str]) -> None:
        for name, text in warnings.items():
            tqdm.write(f"WARNING {name}: step {step}: {text}", file=sys.stderr)

    def _show(self, row: dict[str, Any]) -> None:
        text = (
            f"loss {row['loss']:.4f}  r+ {row['reward_chosen']:+.3f}  r- {row['reward_rejected']:+.3f}  "
            f"accuracy {row['reward_accuracy']:.2f}  shift {row['reward_shift']:+.3f}  norm {row['grad_norm']:.2f}"
        )
        if self._interactive:
            self._bar.set_postfix_str(text)
            return
        left = (self._bar.total - row["step"]) * row["seconds"]
        print(
            f"step {row['step']:>4}/{self._bar.total}  {text}  {row['seconds']:.2f} s  left {_clock(left)}", flush=True
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        self._bar.close()
        self._file.close()
        for logger in self._loggers:
            logger.close(failed=kind is not None)


def validation_line(row: dict[str, Any], is_best: bool) -> str:
    """The progress line of a validation."""
    text = f"validation after step {row['step']}:"
    if "loss" in row:
        text += (
            f"  loss {row['loss']:.4f}  r+ {row['reward_chosen']:+.3f}  r- {row['reward_rejected']:+.3f}  "
            f"accuracy {row['reward_accuracy']:.2f}"
        )
    if "probe_logp" in row:
        text += f"  probe {row['probe_logp']:.4f} ({row['probe_change']:+.4f}) nats a token"
    return text + ("  best" if is_best else "")


def _append(file: TextIO, row: dict[str, Any]) -> None:
    """A line that is on disk when this returns."""
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
