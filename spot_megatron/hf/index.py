"""The tensors of a Hugging Face model folder: safetensors shards and their index.

All headers are checked first, so that a damaged folder is refused before a tensor is loaded. This module imports
neither PyTorch nor Megatron.
"""

from __future__ import annotations

import json
from pathlib import Path

from spot_megatron.errors import WeightError
from spot_megatron.files import BLOCK_BYTES
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.names import EMBEDDING, LM_HEAD, hf_shapes, is_derived
from spot_megatron.hf.safetensors import Span, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HFIndex:
    """The tensors of a Hugging Face folder: one safetensors file, or several and an index.

    Raises:
        WeightError: no (readable) weights, a shard that the index names is missing, a truncated or damaged file, an
            index that names a tensor which its file lacks, a tensor in two files, or a tensor that is not a float.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.spans: dict[str, Span] = {}
        files, placed = _find_files(self.folder)
        for file in files:
            self._add(file)
        for name, file in placed.items():
            if name not in self.spans or self.spans[name].file != file:
                raise WeightError(
                    f"{self.folder / INDEX_FILE} says that {name} is in {file.name}, which does not hold it: "
                    "index and shards belong to different models; fetch the folder again"
                )

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self.spans)

    def files(self) -> list[Path]:
        """Every weight file, sorted."""
        return sorted({span.file for span in self.spans.values()})

    def kinds(self) -> dict[str, str]:
        """The data type of every tensor by its safetensors name; an export casts to them."""
        return {name: self.spans[name].kind for name in self.names()}

    def _add(self, file: Path) -> None:
        try:
            found = read_header(file)
        except FileNotFoundError:
            raise WeightError(f"{file} is missing, though {INDEX_FILE} names it: fetch the folder again") from None
        except OSError as error:
            raise WeightError(f"{file} cannot be read: {error}") from None
        for name in found:
            if name in self.spans:
                first = self.spans[name].file.name
                raise WeightError(f"{name} is in two files of {self.folder}: {first} and {file.name}")
        self.spans.update(found)


def check_folder(hf: HFIndex, config: HFModelConfig) -> None:
    """Compares the folder's tensors with config.json; reads headers only (and a tied `lm_head`).

    Raises:
        WeightError: a tensor is missing, unknown or of another shape than config.json says, or a tied folder's
            `lm_head` differs from its embedding.
    """
    wanted = hf_shapes(config)
    present = {name for name in hf.spans if not is_derived(name)}
    if config.tied and LM_HEAD in present:
        head = hf.spans[LM_HEAD]
        if EMBEDDING in present and not same_bytes(head, hf.spans[EMBEDDING]):
            raise WeightError(
                f"{head.file}: {LM_HEAD} differs from {EMBEDDING}, though config.json ties them; "
                "set tie_word_embeddings to false if the head was trained separately, or remove the tensor"
            )
        present.remove(LM_HEAD)
    for problem, names in {"lacks": wanted.keys() - present, "holds unknown": present - wanted.keys()}.items():
        if names:
            first = ", ".join(sorted(names)[:8])
            raise WeightError(
                f"{hf.folder} {problem} {len(names)} tensor(s): {first}{' ...' if len(names) > 8 else ''}; "
                "its weights do not belong to its config.json"
            )
    for name, shape in wanted.items():
        span = hf.spans[name]
        if span.shape != shape:
            raise WeightError(f"{span.file}: {name} has shape {span.shape}, but config.json gives {shape}")


def same_bytes(left: Span, right: Span) -> bool:
    """True if data type, shape and every byte of two tensors agree; reads a block at a time."""
    if (left.kind, left.shape) != (right.kind, right.shape):
        return False
    with left.file.open("rb") as one, right.file.open("rb") as other:
        one.seek(left.offset)
        other.seek(right.offset)
        for start in range(0, left.num_bytes, BLOCK_BYTES):
            length = min(BLOCK_BYTES, left.num_bytes - start)
            if one.read(length) != other.read(length):
                return False
    return True


def _find_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards of a folder, and the file of each tensor according to the index (empty without one)."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        placed = _read_index(index)
        if single.is_file() and single not in placed.values():
            raise WeightError(
                f"{folder} holds both {SINGLE_FILE} and an {INDEX_FILE} that does not name it: "
                "two models in one folder; remove one of them"
            )
        return sorted(set(placed.values())), placed
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    if found:
        raise WeightError(f"{folder} holds {len(found)} safetensors files but no {INDEX_FILE}; fetch the index as well")
    if not folder.is_dir():
        raise WeightError(f"{folder} is not a folder: name a folder in the Hugging Face format")
    if any(folder.glob("*.bin")):
        raise WeightError(
            f'{folder} holds only PyTorch .bin weights; save it as safetensors first: python -c "from transformers '
            f"import AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW')\" "
            "and copy the tokenizer files"
        )
    raise WeightError(f"{folder} holds no weights ({SINGLE_FILE}, or {INDEX_FILE} and its shards)")


def _read_index(index: Path) -> dict[str, Path]:
    try:
        placed = json.loads(index.read_text())["weight_map"]
        names_are_plain = all(
            Path(file).name == file and file.endswith(".safetensors") and file.isprintable() for file in placed.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightError(f"{index} is damaged: it must be JSON with a weight_map of tensor and file names") from None
    if not placed or not names_are_plain:
        raise WeightError(
            f"{index} is damaged: weight_map must name a tensor, and only .safetensors files of its own folder"
        )
    return {name: index.parent / file for name, file in placed.items()}
