"""Reading the tensors of a Hugging Face model folder with PyTorch. This module does not import Megatron."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spot_megatron.errors import WeightError
from spot_megatron.hf.checksums import is_weight_file, read_checksums, refuse_differing, sums_of
from spot_megatron.hf.index import HFIndex

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFFolder(HFIndex):
    """A Hugging Face folder whose tensors can be read, whole or sliced."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._handles: dict[Path, Any] = {}

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self.spans[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spans[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.spans[name].kind]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or its slice at `index` (one slice for each leading dimension), on the CPU.

        Reads only that slice. A slice that ends beyond a dimension is truncated.
        """
        file = self.spans[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        cut = [slice(*part.indices(length)) for part, length in zip(index, self.shape(name), strict=False)]
        return self._handles[file].get_slice(name)[tuple(cut) if cut else ...]

    def digest(self) -> str:
        """Hex digest of config.json and of every byte of the weight files (about a second per GB and thread).

        Raises:
            WeightError: a weight file differs from the folder's SHA256SUMS.
        """
        sums = sums_of(self.folder, ["config.json", *(file.name for file in self.files())])
        expected = read_checksums(self.folder, WeightError)
        refuse_differing(
            self.folder, {name: sums[name] for name in sums if is_weight_file(name)}, expected, WeightError
        )
        return hashlib.sha256("".join(sums.values()).encode()).hexdigest()


def same_bits(left: Tensor, right: Tensor) -> bool:
    """True if data type, shape and every bit agree (NaN equals itself, 0.0 differs from -0.0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
