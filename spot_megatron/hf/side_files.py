"""What a Megatron checkpoint carries so that it can become a Hugging Face folder again. No PyTorch, no Megatron."""

from __future__ import annotations

import json
from pathlib import Path

from spot_megatron.errors import CheckpointError
from spot_megatron.hf.index import HFIndex
from spot_megatron.hf.output import copy_other_files
from spot_megatron.hf.safetensors import KIND_BYTES

HF_FOLDER = "hf"  # the source's config, tokenizer and all else that holds no weights
HF_KINDS = "hf_dtypes.json"  # {tensor name: data type as safetensors names it}: an export casts to them


def save_side_files(source: Path, folder: Path) -> None:
    """Puts into a checkpoint's `folder` what an export needs besides the weights. One process does this."""
    copy_other_files(source, folder / HF_FOLDER)
    (folder / HF_KINDS).write_text(json.dumps(HFIndex(source).kinds(), indent=1) + "\n")


def load_kinds(folder: Path) -> dict[str, str]:
    """The data types that save_side_files noted.

    Raises:
        CheckpointError: they are not there or damaged.
    """
    try:
        kinds = json.loads((folder / HF_KINDS).read_text())
        unknown = set(kinds.values()) - KIND_BYTES.keys()
        if unknown:
            raise ValueError(f"unknown data types {sorted(unknown)}")
        return dict(kinds)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder / HF_KINDS} cannot be read ({error}): {folder} is no checkpoint of a run or of "
            "`tools.convert import`; name the folder that holds model/ and hf/"
        ) from None
