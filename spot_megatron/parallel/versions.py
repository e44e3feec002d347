"""Where Megatron-Core 0.16.1 to 0.19.2 need a hand, each told apart by what is there, not by a version number.

Every guard stands here; the rest of the code is written for all of them alike.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def mark_split_weights(model: torch.nn.Module) -> None:
    """Marks the weights that tensor ranks split, which before 0.17 happens only when they are also initialised.

    Without the mark the gradient norm counts only the first rank's shard of them.
    """
    split_dims = {
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        dim = next((dim for kind, dim in split_dims.items() if isinstance(module, kind)), None)
        if dim is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def name_engine_gemm(moe_utils: Any) -> None:
    """Without Transformer Engine the router asks for a name that some versions never define."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def ready_to_load(part: DistributedOptimizer) -> None:
    """Gives a fresh torch.optim.AdamW what loading a checkpoint expects of it; Transformer Engine's needs nothing.

    Megatron reads its step count, which it has not before its first step. The setter of 0.16 expects a `step` that the
    fully reshardable loader leaves out, and writes to leaves of the graph.
    """
    inner = part.optimizer
    if not isinstance(inner, torch.optim.AdamW):
        return
    if not inner.state:
        for group in inner.param_groups:
            for param in group["params"]:
                zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[param] = {"step": torch.zeros((), dtype=torch.float32), **zeros}
    part._set_main_param_and_optimizer_states = _setter_of(part)


def _setter_of(part: DistributedOptimizer) -> Any:
    @torch.no_grad()
    def assign(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][order]
        targets = {"param": main_param, **part.optimizer.state[main_param]}
        for name, value in tensors.items():
            targets[name].copy_(value)

    return assign


def own_step_counters(part: DistributedOptimizer) -> None:
    """The loaders of all versions give every parameter the same step tensor, which torch.optim.AdamW then advances once
    per parameter."""
    for state in part.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
