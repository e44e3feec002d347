"""Warnings of Megatron-Core and PyTorch that do not concern users. `make doctor` lists missing packages."""

from __future__ import annotations

import warnings

_KNOWN = (
    r"(Transformer Engine and )?Apex (is|are) not installed",  # the local implementations are meant to be used then
    r"full scope is deprecated",  # a default of Megatron's own
    r"The \.grad attribute of a Tensor that is not a leaf",  # Megatron's optimizer looks for gradients it does not need
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",  # Megatron's collectives
    r"`load_state_dict` is deprecated",  # of torch.distributed.checkpoint, in Megatron's loader
    r"Please use DTensor instead",  # of PyTorch's own planner, about Megatron's tensors
)


def hide_known_warnings() -> None:
    """Call it before Megatron is imported: some of these come from its imports."""
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
