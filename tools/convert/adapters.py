"""A checkpoint of a LoRA run, which holds adapters without the model that they adapt -> a PEFT folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spot_megatron.errors import CheckpointError
from spot_megatron.files import write_json
from spot_megatron.hf.checksums import file_names, sums_of, verify_checksums, write_checksums
from spot_megatron.hf.output import partial_folder, publish, refuse_destination, start_partial
from tools.convert.convert import MODEL_FOLDER

if TYPE_CHECKING:
    from torch import Tensor


def is_of_adapters(checkpoint: Path) -> bool:
    """Whether state.json names a run with adapters."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return isinstance(state["recipe"].get("lora"), dict)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # an imported checkpoint, or a damaged one, which export_checkpoint refuses


def export_adapters(checkpoint: Path, output: Path) -> int:
    """Writes the PEFT folder of a checkpoint of a LoRA run. Returns the number of tensors.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        WeightError: `output` cannot be written.
    """
    from safetensors.torch import save_file
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from spot_megatron.recipe import Lora
    from spot_megatron.weights.checkpoint import check_format
    from spot_megatron.weights.peft import CONFIG, WEIGHTS, adapter_config, tensor_name

    checkpoint, output = checkpoint.absolute(), output.absolute()
    verify_checksums(checkpoint, CheckpointError)
    check_format(checkpoint / MODEL_FOLDER)
    refuse_destination(output, checkpoint)
    recipe = json.loads((checkpoint / "state.json").read_text())["recipe"]
    state: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint / MODEL_FOLDER)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, is_adapter, side = key.rpartition(".lora_")
        if is_adapter:
            tensors[tensor_name(module, side)] = tensor
    start_partial(output)
    partial = partial_folder(output)
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    write_json(partial / CONFIG, adapter_config(Lora.model_validate(recipe["lora"]), recipe["model"]["hf"]))
    write_checksums(partial, sums_of(partial, file_names(partial)))
    publish(output)
    return len(tensors)
