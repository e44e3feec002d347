"""The files that a Megatron checkpoint carries besides weights, for an export back to a Hugging Face folder.

This module imports neither PyTorch nor Megatron.
"""

from __future__ import annotations

import json
from pathlib import Path

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.index import HFIndex
from spot_megatron.hf.output import copy_other_files
from spot_megatron.hf.safetensors import KIND_BYTES

HF_FOLDER = "hf"  # the source's config, tokenizer and other files without weights
HF_KINDS = "hf_dtypes.json"  # {tensor name: safetensors data type}; an export casts to them


def save_side_files(source: Path, folder: Path) -> None:
    """Writes the files that an export needs besides weights into a checkpoint's `folder`. Call it in one process."""
    copy_other_files(source, folder / HF_FOLDER)
    (folder / HF_KINDS).write_text(json.dumps(HFIndex(source).kinds(), indent=1) + "\n")


def load_kinds(folder: Path) -> dict[str, str]:
    """The data types that save_side_files wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        kinds = json.loads((folder / HF_KINDS).read_text())
        unknown = set(kinds.values()) - KIND_BYTES.keys()
        if unknown:
            raise ValueError(f"unknown data types {sorted(unknown)}")
        return dict(kinds)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / HF_KINDS} cannot be read ({error}): {folder} is not a checkpoint of a run or of "
            "`tools.convert import`; name the folder that holds model/ and hf/"
        ) from None
