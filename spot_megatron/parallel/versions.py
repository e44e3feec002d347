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


def grads_for_norm(part: DistributedOptimizer) -> list[torch.Tensor]:
    """This rank's gradients, each element on one rank only; 0.19 renamed the method."""
    find = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    return find()
