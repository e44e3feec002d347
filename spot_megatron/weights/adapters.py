"""LoRA adapters on a rank's model chunks: which weights get one and their initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.names import ParameterMapping, Sharding, resolve, target_modules, weight_map
from spot_megatron.model.gpt import PairGPT
from spot_megatron.model.lora import (
    Layout,
    LinearAdapter,
    Matrix,
    add_adapter,
    initial_bound,
)
from spot_megatron.recipe import Lora
from spot_megatron.weights.peft import AdapterFolder
from spot_megatron.weights.placement import Placement, layer_offset


def attach_adapters(chunks: Sequence[PairGPT], hf: HFModelConfig, lora: Lora, seed: int) -> None:
    """Freezes every parameter of `chunks` and adds the recipe's adapters, with their initial values.

    These do not depend on the split: A is drawn whole, from `seed` and its name, B is 0; or both are read from
    `lora.adapter`.

    Raises:
        WeightError: the folder of `lora.adapter` cannot be used.
    """
    source = AdapterFolder(lora, hf) if lora.adapter else None
    mappings, placement = weight_map(hf), Placement.of_megatron()
    modules = target_modules(lora.targets)
    for chunk in chunks:
        offset = layer_offset(chunk)
        for name, weight in list(chunk.named_parameters()):
            weight.requires_grad_(False)
            mapping, hf_names = resolve(mappings, name, offset, placement.expert_offset(hf.num_experts))
            if not any(mapping.adapted(modules)):
                continue
            matrices = _matrices(mapping, hf_names, modules)
            adapter = LinearAdapter(matrices, _layout(mapping, hf, placement, chunk), _rank(lora), lora.alpha, weight)
            fill(adapter, source, seed)
            add_adapter(chunk.get_submodule(name.rpartition(".")[0]), adapter)


def _rank(lora: Lora) -> int:
    assert lora.rank is not None
    return lora.rank


def _matrices(mapping: ParameterMapping, hf_names: Sequence[str], modules: Sequence[str]) -> list[Matrix]:
    matrices = []
    for name, shape, is_target in zip(hf_names, mapping.shapes, mapping.adapted(modules), strict=True):
        num_rows, num_columns = shape
        matrices.append(Matrix(name.removesuffix(".weight"), (num_rows, num_columns), is_target))
    return matrices


def _layout(mapping: ParameterMapping, hf: HFModelConfig, placement: Placement, chunk: PairGPT) -> Layout:
    ranks = placement.replica_group(mapping).ranks
    is_expert = mapping.num_experts > 0
    num_groups = hf.num_groups // ranks.size() if mapping.sharding is Sharding.QKV else 1
    return Layout(mapping.sharding, num_groups, ranks, chunk.config.sequence_parallel and not is_expert, is_expert)


@torch.no_grad()
def fill(adapter: LinearAdapter, source: AdapterFolder | None, seed: int) -> None:
    """Gives an adapter its initial values, see attach_adapters."""
    for matrix, side, parameter in adapter.named_sides():
        if parameter.is_meta:
            continue
        if source is not None:
            parameter.copy_(adapter.layout.cut(source.read(matrix, side), side))
        elif side == "A":
            digest = hashlib.sha256(f"{seed}:lora:{matrix.module}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            whole = torch.empty(adapter.whole_shape(matrix, side))
            bound = initial_bound(matrix.shape[1])
            whole.uniform_(-bound, bound, generator=generator)
            parameter.copy_(adapter.layout.cut(whole, side))
