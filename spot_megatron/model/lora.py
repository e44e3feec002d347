"""LoRA (arXiv 2106.09685) on Megatron's column- and row-parallel linears: y += alpha / rank * B A x.

A Megatron weight may hold several Hugging Face matrices (q, k, v; gate, up). Each has an A and a B of its own, as in a
PEFT folder, so that adapters are read and written without loss; one shared A could start from no PEFT folder. Their
A x are one product, and their outputs are put together in the order of the fused weight's rows.

Tensor parallelism, with r the rank and n ranks. What is replicated gets the whole gradient on every rank:

    column-parallel   A [r, in] replicated, B [out / n, r]; A x is gathered when positions are split (A's gradient is
                      then summed by Megatron, as a norm's), else its gradient is summed over the ranks
    row-parallel      A [r, in / n], B [out, r] replicated; A x is summed over the ranks, and split by positions when
                      they are (B's gradient is then summed by Megatron)
    experts           the dispatcher gathers inputs and sums outputs, of which the adapter's are a part; the gradients
                      of what is replicated are summed in backward

Communication is r wide, not hidden wide. Shapes: T positions of this rank, W rows of the weight on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from spot_megatron.hf.names import Sharding

SIDES = ("A", "B")


@dataclass(frozen=True)
class Matrix:
    """A Hugging Face matrix inside a weight: its module, as in `model.layers.3.self_attn.q_proj`, and whole shape."""

    module: str
    shape: tuple[int, int]
    is_target: bool

    @property
    def leaf(self) -> str:
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class Layout:
    """How the weight of an adapter is put together and split.

    Attributes:
        num_groups: groups of rows in which the weight's matrices alternate: query groups on this rank, 1 if none.
        ranks: the ranks that split the weight.
        gathers: whether positions between linears are split over `ranks`.
    """

    sharding: Sharding
    num_groups: int
    ranks: dist.ProcessGroup
    gathers: bool
    is_expert: bool

    @property
    def is_row_parallel(self) -> bool:
        return self.sharding is Sharding.COLUMNS

    def split_dim(self, side: str) -> int | None:
        """The dimension of A or B that `ranks` split; None for the replicated one."""
        if self.is_row_parallel:
            return 1 if side == "A" else None
        return 0 if side == "B" else None

    def cut(self, whole: Tensor, side: str) -> Tensor:
        """This rank's part of a whole A or B."""
        dim = self.split_dim(side)
        return whole if dim is None else whole.chunk(self.ranks.size(), dim)[self.ranks.rank()]


class LinearAdapter(torch.nn.Module):
    """The adapters of one weight. Parameters are named q_proj_A [r, in], q_proj_B [out, r], ...; zeros at first."""

    def __init__(self, matrices: Sequence[Matrix], layout: Layout, rank: int, alpha: float, weight: Tensor) -> None:
        """`weight`: this rank's shard; its type and device are the adapter's."""
        super().__init__()
        self.matrices, self.layout = tuple(matrices), layout
        self.rank, self.scale = rank, alpha / rank
        for matrix in self.targets:
            for side in SIDES:
                shape = list(self.whole_shape(matrix, side))
                dim = layout.split_dim(side)
                if dim is not None:
                    shape[dim] //= layout.ranks.size()
                values = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                parameter = torch.nn.Parameter(values)
                self._mark(parameter, dim)
                self.register_parameter(f"{matrix.leaf}_{side}", parameter)

    @property
    def targets(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.is_target]

    def whole_shape(self, matrix: Matrix, side: str) -> tuple[int, int]:
        """Before tensor parallelism, as in a PEFT folder."""
        num_rows, num_columns = matrix.shape
        return (self.rank, num_columns) if side == "A" else (num_rows, self.rank)

    def named_sides(self) -> Iterator[tuple[Matrix, str, torch.nn.Parameter]]:
        for matrix in self.targets:
            for side in SIDES:
                yield matrix, side, self.parameter(matrix, side)

    def parameter(self, matrix: Matrix, side: str) -> torch.nn.Parameter:
        return self.get_parameter(f"{matrix.leaf}_{side}")

    def _mark(self, parameter: torch.nn.Parameter, split_dim: int | None) -> None:
        """Sets the attributes by which Megatron reduces the parameter's gradient and counts it in the norm."""
        marks: dict[str, Any] = {}
        if self.layout.is_expert:  # as _mark_expert_weights (gpt.py) marks the experts' own weights
            marks = {"allreduce": False, "tensor_model_parallel": True}
            if split_dim is None and self.layout.ranks.rank() > 0:
                marks["shared"] = True  # counted on the first rank
        elif split_dim is None:
            marks = {"sequence_parallel": self.layout.gathers}
        else:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, split_dim, 1)
        for name, value in marks.items():
            setattr(parameter, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """[T, ..., in], the linear's own input -> [T, ..., W] to add to its output."""
        down = torch.cat([self._whole_gradient(matrix, "A") for matrix in self.targets])
        hidden = self._across_ranks(F.linear(x, down)) * self.scale
        hidden_of = dict(zip(self.targets, hidden.split(self.rank, dim=-1), strict=True))
        outputs = []
        for matrix in self.matrices:
            if matrix.is_target:
                outputs.append(F.linear(hidden_of[matrix], self._whole_gradient(matrix, "B")))
            else:
                outputs.append(hidden.new_zeros(*hidden.shape[:-1], matrix.shape[0] // self.layout.ranks.size()))
        return _alternate(outputs, self.layout.num_groups)

    def _whole_gradient(self, matrix: Matrix, side: str) -> Tensor:
        """The parameter; an expert's replicated one such that its gradient is summed over the ranks in backward."""
        parameter, layout = self.parameter(matrix, side), self.layout
        if layout.is_expert and layout.split_dim(side) is None and layout.ranks.size() > 1:
            return tensor_parallel.copy_to_tensor_model_parallel_region(parameter, group=layout.ranks)
        return parameter

    def _across_ranks(self, hidden: Tensor) -> Tensor:
        """A x of a rank -> what B of the rank takes; see the module."""
        layout = self.layout
        if layout.is_expert or layout.ranks.size() == 1:
            return hidden
        if layout.is_row_parallel:
            if layout.gathers:
                return tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(hidden)
        if layout.gathers:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """[W, in of this rank] float32: what merging adds to this rank's shard of the weight. No communication."""
        parts = []
        for matrix in self.matrices:
            if matrix.is_target:
                up, down = (self.parameter(matrix, side).float() for side in ("B", "A"))
                parts.append((up @ down).T * self.scale)
            else:
                num_columns = self.parameter(self.targets[0], "A").shape[1]
                num_rows = matrix.shape[0] // self.layout.ranks.size()
                parts.append(parts[0].new_zeros(num_columns, num_rows) if parts else self._zeros(num_columns, num_rows))
        return _alternate(parts, self.layout.num_groups).T.contiguous()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.parameter(self.targets[0], "A").device)


def _alternate(parts: Sequence[Tensor], num_groups: int) -> Tensor:
    """[..., W_i] of each matrix -> [..., sum of W_i] in the order of a fused weight's rows: for each group of the
    matrices' rows, those of the first, of the second, ..."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(-1, (num_groups, -1)) for part in parts], dim=-1).flatten(-2)


def add_adapter(linear: torch.nn.Module, adapter: LinearAdapter) -> None:
    """Registers the adapter of a weight of `linear`; a grouped linear gets one for each expert, in their order."""
    known = getattr(linear, "adapters", None)
    if isinstance(known, torch.nn.ModuleList):
        known.append(adapter)
        return
    linear.adapters = torch.nn.ModuleList([adapter])
    if hasattr(linear, "return_layernorm_output"):  # Transformer Engine's norm and linear in one
        linear.return_layernorm_output = True  # type: ignore[assignment]
    linear.register_forward_hook(_adapt)


def _adapt(linear: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a linear that returns (output, bias): the same with the adapters' output added.

    Inputs are (x) or, of a grouped linear, (x, positions of each expert).
    """
    result, bias = output
    x = inputs[0]
    if isinstance(result, tuple):  # the normalised input is the second
        result, x = result
    if len(inputs) == 1:
        (adapter,) = linear.adapters
        return result + adapter(x), bias
    parts = x.split(list(inputs[1]))
    return result + torch.cat([adapter(part) for adapter, part in zip(linear.adapters, parts, strict=True)]), bias


def adapters_of(model: torch.nn.Module) -> Iterator[tuple[str, LinearAdapter]]:
    """(name, adapter) of every weight that has one."""
    for name, module in model.named_modules():
        if isinstance(module, LinearAdapter):
            yield name, module


def has_adapters(model: torch.nn.Module) -> bool:
    return any(True for _ in adapters_of(model))


@contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within it the adapters add nothing, so that the model is its base."""
    scales = {adapter: adapter.scale for chunk in chunks for _, adapter in adapters_of(chunk)}
    for adapter in scales:
        adapter.scale = 0.0
    try:
        yield
    finally:
        for adapter, scale in scales.items():
            adapter.scale = scale


def adapter_of_weight(model: torch.nn.Module) -> dict[str, LinearAdapter]:
    """Name of a weight -> its adapter, for those that have one."""
    found: dict[str, LinearAdapter] = {}
    for name, linear in model.named_modules():
        for index, adapter in enumerate(getattr(linear, "adapters", ())):
            leaf = f"weight{index}" if f"weight{index}" in linear._parameters else "weight"
            found[f"{name}.{leaf}"] = adapter
    return found


def base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Named parameters without those of adapters."""
    adapted = {id(parameter) for _, adapter in adapters_of(model) for parameter in adapter.parameters()}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in adapted)


def initial_bound(num_columns: int) -> float:
    """A's initial values are uniform in +- this: PEFT's, which is Kaiming's with a = sqrt(5). B is 0."""
    return 1 / math.sqrt(num_columns)
