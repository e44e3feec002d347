"""Adapters as a PEFT folder: adapter_config.json, and adapter_model.safetensors with two tensors a matrix.

Experts' adapters are named by expert, as PEFT reads them for every version of transformers and as vLLM does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spot_megatron.errors import WeightError
from spot_megatron.files import write_json
from spot_megatron.hf.checksums import sums_of
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.folder import DTYPES, HFFolder
from spot_megatron.hf.names import ParameterMapping, Sharding, target_modules, weight_map
from spot_megatron.hf.output import join_shards, partial_folder, publish, refuse_destination, start_partial
from spot_megatron.model.gpt import PairGPT
from spot_megatron.model.lora import Matrix, adapters_of
from spot_megatron.recipe import Lora
from spot_megatron.weights.checkpoint import save_checksums
from spot_megatron.weights.export import Share, ShareDealer, write_shares

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of adapter_config.json that change what the adapters compute, with the value that ours have.
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
}


def tensor_name(module: str, side: str) -> str:
    """The tensor of A or B of a Hugging Face module."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def adapter_shapes(lora: Lora, hf: HFModelConfig) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor in the PEFT folder of a recipe's adapters."""
    modules, rank = target_modules(lora.targets), lora.rank or 0
    found: dict[str, tuple[int, int]] = {}
    for mapping in weight_map(hf):
        for layer, expert in mapping.instances() if any(mapping.adapted(modules)) else ():
            names = mapping.hf_names(layer, expert)
            for name, shape, is_target in zip(names, mapping.shapes, mapping.adapted(modules), strict=True):
                if is_target:
                    found[tensor_name(name.removesuffix(".weight"), "A")] = (rank, shape[1])
                    found[tensor_name(name.removesuffix(".weight"), "B")] = (shape[0], rank)
    return found


class AdapterFolder:
    """The PEFT folder of `lora.adapter`.

    Raises:
        WeightError: the folder is incomplete or damaged, or its adapters are not those of the recipe.
    """

    def __init__(self, lora: Lora, hf: HFModelConfig) -> None:
        assert lora.adapter is not None
        self.folder = Path(lora.adapter)
        self._check_config(lora)
        self._tensors = HFFolder(self.folder)
        wanted = adapter_shapes(lora, hf)
        present = {name: self._tensors.shape(name) for name in self._tensors.names()}
        if present != wanted:
            names = sorted(name for name in wanted.keys() | present if wanted.get(name) != present.get(name))
            raise WeightError(
                f"{self.folder}: {len(names)} tensors are not those of adapters of rank {lora.rank} on "
                f"{', '.join(target_modules(lora.targets))} of this model; the first is {names[0]} "
                f"({present.get(names[0], 'missing')}, expected {wanted.get(names[0], 'none')}). Set lora.targets to "
                f"the target_modules of its {CONFIG}, and model.hf to the model it was trained on"
            )

    def _check_config(self, lora: Lora) -> None:
        file = self.folder / CONFIG
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightError(
                f"{file} cannot be read ({error!r}); set lora.adapter to a folder that PEFT saved"
            ) from None
        changed = sorted(key for key, value in _PLAIN.items() if (config.get(key) or value) != value)
        if kind != "LORA" or changed:
            raise WeightError(
                f"{file}: only plain LoRA is supported (peft_type {kind}"
                f"{''.join(f', {key} {config[key]}' for key in changed)}); merge it into the model with PEFT's "
                "merge_and_unload and start new adapters"
            )
        if (rank, alpha) != (lora.rank, lora.alpha):
            raise WeightError(
                f"{file} has r {rank} and lora_alpha {alpha}: set lora.rank={rank} and lora.alpha={alpha}"
            )

    def read(self, matrix: Matrix, side: str) -> Tensor:
        """A [r, in] or B [out, r] of a matrix, whole, on the CPU."""
        return self._tensors.read(tensor_name(matrix.module, side))


def adapter_digest(folder: Path) -> str:
    """Hex digest of an adapter folder's two files.

    Raises:
        WeightError: one of them is missing.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise WeightError(f"lora.adapter: {folder / name} is missing; name a folder that PEFT saved")
    return hashlib.sha256("".join(sums_of(folder, [CONFIG, WEIGHTS]).values()).encode()).hexdigest()


@torch.no_grad()
def export_adapter(
    chunks: Sequence[PairGPT], destination: str | Path, hf: HFModelConfig, lora: Lora, model: str
) -> None:
    """Writes the adapters of all ranks as a PEFT folder over `model`, replacing an earlier one. Collective.

    Raises:
        WeightError: the ranks do not share one file system, or a value is NaN or infinite.
    """
    destination = Path(destination).absolute()
    refuse_destination(destination, destination / "none", replace=True)
    if dist.get_rank() == 0:
        start_partial(destination)
    dist.barrier()
    shares = _shares(chunks)
    dtype = next(kind for kind, value in DTYPES.items() if value == chunks[0].config.params_dtype)
    wanted = adapter_shapes(lora, hf)
    write_shares(shares, hf, dict.fromkeys(wanted, dtype), destination, shard_bytes=1 << 40)
    dist.barrier()
    partial = partial_folder(destination)
    if dist.get_rank() == 0:
        join_shards(partial, WEIGHTS, wanted)
        write_json(partial / CONFIG, adapter_config(lora, model))
    save_checksums(partial)
    if dist.get_rank() == 0:
        publish(destination)
    dist.barrier()


def _shares(chunks: Sequence[PairGPT]) -> list[Share]:
    dealer = ShareDealer()
    shares = []
    for chunk in chunks:
        for _, adapter in adapters_of(chunk):
            for matrix, side, parameter in adapter.named_sides():
                dim = adapter.layout.split_dim(side)
                sharding = {None: Sharding.REPLICATED, 0: Sharding.ROWS, 1: Sharding.COLUMNS}[dim]
                names = (tensor_name(matrix.module, side),)
                shape = adapter.whole_shape(matrix, side)
                mapping = ParameterMapping(names, (shape,), "", "", sharding, num_experts=int(adapter.layout.is_expert))
                shares.append(dealer.share(parameter, mapping, names))
    return shares


def adapter_config(lora: Lora, model: str) -> dict[str, Any]:
    """The content of adapter_config.json. `model`: folder or hub id of the model that the adapters belong to."""
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "base_model_name_or_path": model,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(target_modules(lora.targets)),
        "inference_mode": True,
        **_PLAIN,
    }
