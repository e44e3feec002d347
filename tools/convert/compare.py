"""Compares the tensors of two Hugging Face folders. This module does not import Megatron."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.index import same_bytes
from spot_megatron.hf.names import EMBEDDING, LM_HEAD, is_derived
from tools.convert.copy_plan import row_ranges


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between two folders; `largest` is None if the values cannot be compared."""

    name: str
    text: str
    largest: float | None

    @property
    def part(self) -> str:
        """The part of the model, in the terms of its forward pass."""
        if self.name == EMBEDDING:
            return "embedding"
        layer = re.match(r"model\.layers\.(\d+)\.", self.name)
        return f"layer {layer.group(1)}" if layer else "head"

    @property
    def depth(self) -> tuple[int, str]:
        place = {"embedding": -1, "head": 10**9}
        return place.get(self.part, int(self.part.split()[-1]) if self.part.startswith("layer") else 0), self.name


def differences(a: Path, b: Path) -> list[Difference]:
    """All tensors that are not bitwise equal in two Hugging Face folders, in the order of the forward pass."""
    left, right = HFFolder(a), HFFolder(b)
    names_left, names_right = _own_tensors(left), _own_tensors(right)
    found = [Difference(name, f"only in {a}", None) for name in names_left - names_right]
    found += [Difference(name, f"only in {b}", None) for name in names_right - names_left]
    for name in names_left & names_right:
        kinds = [f"{str(folder.dtype(name)).removeprefix('torch.')} {folder.shape(name)}" for folder in (left, right)]
        if kinds[0] != kinds[1]:
            text, largest = f"{kinds[0]} in {a}, {kinds[1]} in {b}", None
            if left.shape(name) == right.shape(name):
                values = _compare_values(name, left, right)
                text, largest = f"{text}; {values.text}", values.largest
            found.append(Difference(name, text, largest))
        elif not same_bytes(left.spans[name], right.spans[name]):
            found.append(_compare_values(name, left, right))
    return sorted(found, key=lambda difference: difference.depth)


def _compare_values(name: str, left: HFFolder, right: HFFolder) -> Difference:
    """Counts unequal values, reading a few rows at a time."""
    count, largest, total = 0, 0.0, 0
    for ours, theirs in _runs(name, left, right):
        unequal = ~((ours == theirs) | (ours.isnan() & theirs.isnan()))
        total += unequal.numel()
        if unequal.any():
            count += int(unequal.sum())
            errors = (ours[unequal].double() - theirs[unequal].double()).abs()
            largest = float(torch.maximum(errors.max(), torch.tensor(largest, dtype=torch.float64)))
    text = f"{count} of {total} values differ, by up to {largest:g}" if count else "the values are the same"
    return Difference(name, text, largest)


def _runs(name: str, left: HFFolder, right: HFFolder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    shape = left.shape(name)
    row_bytes = 4 * int(torch.Size(shape[1:]).numel())
    for start, stop in row_ranges(shape[0], row_bytes):
        yield left.read(name, (slice(start, stop),)), right.read(name, (slice(start, stop),))


def report(found: Sequence[Difference]) -> list[str]:
    """A line for each difference, the largest error of each part of the model, and the first part that differs."""
    lines = [f"{difference.name}: {difference.text}" for difference in found]
    parts = list(dict.fromkeys(difference.part for difference in found))
    for part in parts:
        of_part = [difference for difference in found if difference.part == part]
        errors = [difference.largest for difference in of_part if difference.largest is not None]
        size = f", by up to {max(errors, key=_nan_first):g}" if errors else ""
        lines.append(f"{part}: {len(of_part)} tensors differ{size}")
    return [*lines, f"first difference: {parts[0]}"]


def _nan_first(error: float) -> float:
    return float("inf") if error != error else error


def _own_tensors(folder: HFFolder) -> set[str]:
    """Names without tensors that follow from config.json: rotary frequencies, and a tied `lm_head`."""
    names = {name for name in folder.names() if not is_derived(name)}
    if {LM_HEAD, EMBEDDING} <= names and read_hf_config(folder.folder).tied:
        names -= {LM_HEAD} if same_bytes(folder.spans[LM_HEAD], folder.spans[EMBEDDING]) else set()
    return names
