"""Differences and defects of Megatron-Core 0.16.1 to 0.19.2, recognised by its code, not by a version number.

The rest of the project is written for all of these versions alike.
"""

from __future__ import annotations

import inspect

import torch
from megatron.core import dist_checkpointing, tensor_parallel
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


def grads_for_norm(part: DistributedOptimizer) -> list[torch.Tensor]:
    """This rank's gradients, each element on one rank only; 0.19 renamed the method."""
    find = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    return find()


def own_async_writer() -> dict[str, str]:
    """The argument of dist_checkpointing.save for Megatron-Core's own asynchronous writer: 0.19's default is another
    package's, which need not be installed."""
    parameters = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}
