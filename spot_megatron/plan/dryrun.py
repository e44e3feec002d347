"""Every rank of a job, built with Megatron-Core's own model in one process: no weights, no GPU, no other process.

Parameters are on PyTorch's meta device, which gives them shapes and no memory, and PyTorch's "fake" backend says that
this process is rank r of n. Megatron sets up its groups for that rank, builds the rank's model, and the weight map
reads from a folder that has shapes only, exactly as it would to load the model. So the checks are those of a real job:

    every parameter of every rank has the shape that loading gives it
    over all ranks, every element of every Hugging Face tensor is held, and by one pipeline stage and expert rank only

Ranks that differ only in the pairs they see (data and context parallelism) hold the same parameters: one of them is
built. Transformer Engine's layers, which need CUDA, have the same parameters under other names; FP8 keeps their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from spot_megatron.errors import WeightError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.index import HFIndex, check_folder
from spot_megatron.hf.names import hf_shapes, resolve, weight_map
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import PairGPT, build_model
from spot_megatron.model.lora import adapters_of, base_parameters
from spot_megatron.parallel.cpu import redirect_cuda
from spot_megatron.plan.models import PUBLISHED_PARAMETERS, published_name
from spot_megatron.recipe import Lora, Memory, Model, Parallel, Precision, Recipe
from spot_megatron.weights.adapters import attach_adapters
from spot_megatron.weights.load import read_slices
from spot_megatron.weights.peft import adapter_shapes, tensor_name
from spot_megatron.weights.placement import Placement, layer_offset
from spot_megatron.weights.shards import merge


@dataclass(frozen=True, order=True)
class Place:
    """Which part of the model a rank holds. Ranks at one place hold the same parameters."""

    pipeline: int
    tensor: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class BuiltRank:
    """A rank's model: `layers` by virtual stage (global numbers from 0), parameters counted with vocabulary padding."""

    place: Place
    num_ranks: int  # at this place
    layers: tuple[range, ...]
    num_dense: int  # parameters of everything but experts
    num_expert: int
    num_adapter: int  # parameters of adapters, not counted above


@dataclass(frozen=True)
class DryRun:
    """All ranks of a job. `num_tensors` and `num_parameters` are the Hugging Face folder's, found over all ranks;
    `compared` names the reference that they agree with."""

    ranks: list[BuiltRank]
    num_tensors: int
    num_parameters: int
    compared: str

    def of_stage(self, stage: int) -> list[BuiltRank]:
        return [rank for rank in self.ranks if rank.place.pipeline == stage]


def dry_run(recipe: Recipe, hf: HFModelConfig, num_ranks: int) -> DryRun:
    """Builds and checks every rank of `num_ranks`. Afterwards this process can use no CUDA device.

    Raises:
        RecipeError: a parallel size does not divide the model.
        WeightError: a parameter is not what the weight map loads, a tensor is held twice or not at all, or the total is
            not the published one or that of the folder's weight files.
    """
    redirect_cuda()
    plain = recipe.model_copy(
        update={
            "model": Model(hf=recipe.model.hf),
            "precision": Precision(dtype=recipe.precision.dtype),
            "memory": Memory(),
        }
    )
    holdings, adapters = Holdings(hf), Adapters()
    ranks = []
    for place, members in sorted(places(recipe.parallel, num_ranks).items()):
        with fake_rank(recipe.parallel, members[0], num_ranks) as built_at:
            assert built_at == place, f"rank {members[0]} is at {built_at}, expected at {place}"
            with torch.device("meta"):
                chunks = build_model(transformer_config(hf, plain, "cpu"), hf)
            holdings.add(place, chunks)
            if recipe.lora.rank is not None:
                attach_adapters(chunks, hf, recipe.lora.model_copy(update={"adapter": None}), recipe.seed)
                adapters.add(chunks)
            ranks.append(_built(place, len(members), chunks))
    num_parameters = holdings.check()
    adapters.check(recipe.lora, hf)
    return DryRun(ranks, len(holdings.shapes), num_parameters, _compare(recipe.model.hf, hf, num_parameters))


def places(parallel: Parallel, num_ranks: int) -> dict[Place, list[int]]:
    """The ranks at every place, in Megatron-Core's order: tensor fastest, then context, data and pipeline; for experts
    expert_tensor fastest, then expert, data and pipeline."""
    found: dict[Place, list[int]] = {}
    for rank in range(num_ranks):
        place = Place(
            pipeline=rank // (num_ranks // parallel.pipeline),
            tensor=rank % parallel.tensor,
            expert=rank // parallel.expert_tensor % parallel.expert,
            expert_tensor=rank % parallel.expert_tensor,
        )
        found.setdefault(place, []).append(rank)
    return found


@contextmanager
def fake_rank(parallel: Parallel, rank: int, num_ranks: int) -> Iterator[Place]:
    """This process as `rank` of `num_ranks`, alone; gives the place that Megatron-Core's groups put it at."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
        yield Place(
            pipeline=mpu.get_pipeline_model_parallel_rank(),
            tensor=mpu.get_tensor_model_parallel_rank(),
            expert=mpu.get_expert_model_parallel_rank(),
            expert_tensor=mpu.get_expert_tensor_parallel_rank(),
        )
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


Part = tuple[int, int, int]  # of a tensor: the dimension that is cut, its first index, its end


class ShapeFolder(HFFolder):
    """The folder that a config promises: its tensors have shapes, on the meta device, and no values."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.reads: list[tuple[str, Part]] = []

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        dim = max(len(index) - 1, 0)
        first, end, _ = (index[dim] if index else slice(None)).indices(self.shapes[name][dim])
        self.reads.append((name, (dim, first, end)))
        return torch.empty(self.shapes[name], device="meta")[index]


class Holdings:
    """Which rank loads which part of which Hugging Face tensor."""

    def __init__(self, config: HFModelConfig) -> None:
        self.config = config
        self.mappings = weight_map(config)
        self.shapes = hf_shapes(config)
        self.holders: dict[str, dict[Part, tuple[int, int, int, str]]] = {name: {} for name in self.shapes}

    def add(self, place: Place, chunks: Sequence[PairGPT]) -> None:
        """The parameters of a rank, under Megatron's groups for it.

        Raises:
            WeightError: loading gives a parameter another shape, or what is loaded is held elsewhere already.
        """
        placement = Placement.of_megatron()
        folder = ShapeFolder(self.shapes)
        for stage, chunk in enumerate(chunks):
            offset = layer_offset(chunk)
            for name, parameter in chunk.named_parameters():
                mapping, hf_names = resolve(
                    self.mappings, name, offset, placement.expert_offset(self.config.num_experts)
                )
                group = placement.replica_group(mapping).ranks
                parts = read_slices(folder, mapping, hf_names, parameter.shape[0], group.rank(), group.size())
                loaded = merge(parts, mapping.sharding, self.config.head_dim)
                if loaded.shape != parameter.shape:
                    raise WeightError(
                        f"{name} of {place} has the shape {tuple(parameter.shape)}, but the weight map loads "
                        f"{tuple(loaded.shape)} from {', '.join(hf_names)}"
                    )
                if mapping.exported:  # else a copy: the last stage's of a tied embedding
                    self._hold(folder.reads, (place.pipeline, stage, place.expert if mapping.num_experts else 0, name))
                folder.reads.clear()

    def _hold(self, reads: Sequence[tuple[str, Part]], holder: tuple[int, int, int, str]) -> None:
        """`holder` is pipeline rank, virtual stage, expert rank and parameter."""
        for name, part in reads:
            known = self.holders[name].setdefault(part, holder)
            if known != holder:
                raise WeightError(f"{name} {part} is held twice: as {known} and as {holder}")

    def check(self) -> int:
        """The number of parameters that all ranks hold together, copies and padding apart.

        Raises:
            WeightError: a part of a tensor is held by no rank, or by several.
        """
        for name, shape in self.shapes.items():
            parts = sorted(self.holders[name]) or [(0, 0, 0)]
            dim = parts[0][0]
            if [*(first for _, first, _ in parts), shape[dim]] != [0, *(end for _, _, end in parts)]:
                raise WeightError(f"{name} of {shape}: the ranks' parts {parts} do not make it whole")
        return sum(map(math.prod, self.shapes.values()))


class Adapters:
    """How many elements of each adapter's A and B the ranks hold, each part counted once."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, int]] = {}

    def add(self, chunks: Sequence[PairGPT]) -> None:
        for chunk in chunks:
            for _, adapter in adapters_of(chunk):
                for matrix, side, parameter in adapter.named_sides():
                    rank = 0 if adapter.layout.split_dim(side) is None else adapter.layout.ranks.rank()
                    self._parts.setdefault(tensor_name(matrix.module, side), {})[rank] = parameter.numel()

    def check(self, lora: Lora, hf: HFModelConfig) -> None:
        """Raises WeightError if the ranks' adapters are not those of the PEFT folder that a run exports."""
        held = {name: sum(parts.values()) for name, parts in self._parts.items()}
        wanted = {name: math.prod(shape) for name, shape in adapter_shapes(lora, hf).items()} if lora.rank else {}
        if held != wanted:
            name = min(name for name in held.keys() | wanted if held.get(name) != wanted.get(name))
            raise WeightError(f"{name}: the ranks hold {held.get(name)} elements of {wanted.get(name)}")


def _compare(name: str, hf: HFModelConfig, num_parameters: int) -> str:
    """Compares the weight map with the published count or the folder's files, and names the reference."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        base = published_name(name)
        assert base is not None, f"{name} is neither a folder nor published"
        published = PUBLISHED_PARAMETERS[base]
        if num_parameters != published:
            raise WeightError(f"{name}: the weight map has {num_parameters:,} parameters, published are {published:,}")
        return "as published"
    if not any(folder.glob("*.safetensors")):
        return "by config.json; no weights here to compare"
    check_folder(HFIndex(folder), hf)
    return "as in the folder's weight files"


def _built(place: Place, num_ranks: int, chunks: Sequence[PairGPT]) -> BuiltRank:
    counts = {True: 0, False: 0}
    for chunk in chunks:
        for name, parameter in base_parameters(chunk):
            counts[".mlp.experts." in name] += parameter.numel()
    layers = tuple(range(layer_offset(chunk), layer_offset(chunk) + len(chunk.decoder.layers)) for chunk in chunks)
    adapted = sum(p.numel() for chunk in chunks for _, adapter in adapters_of(chunk) for p in adapter.parameters())
    return BuiltRank(place, num_ranks, layers, counts[False], counts[True], adapted)
