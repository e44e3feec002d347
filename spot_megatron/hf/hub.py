"""Resolves a recipe's `model.hf`: a local folder, or a hub id that is downloaded once into the Hugging Face cache."""

from __future__ import annotations

from pathlib import Path

from spot_megatron.errors import WeightError

PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]


def resolve_model(name: str) -> Path:
    """The local folder of a model.

    Raises:
        WeightError: it is neither a folder nor a hub id that can be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WeightError(
            f"model.hf: the folder {name} does not exist; set a Hugging Face model folder or a hub id owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except OSError as error:  # the hub's errors are OSErrors, as are network errors
        raise WeightError(
            f"model.hf: {name} is not a local folder and could not be downloaded from the hub ({error}); "
            "download it on a machine with network access and set model.hf to its folder"
        ) from None
