"""Megatron-Core on a machine without CUDA.

Megatron-Core asks for CUDA by name in many places: devices, streams, random states, tensor type names. `redirect_cuda`
sends each of these to the CPU, so that its own model, schedules, DDP, distributed optimizer and checkpoints run over
gloo. All redirections are in this file; none is applied on import.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from spot_megatron.parallel.adamw import use_torch_adamw

_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
_LIKE_FACTORIES = ("empty_like", "full_like", "ones_like", "zeros_like")
_redirected = False


def redirect_cuda() -> None:
    """Redirects Megatron-Core's CUDA calls to the CPU, once per process.

    Call it before the first model is built, and only where no CUDA device is in use.
    """
    global _redirected
    if _redirected:
        return
    assert not torch.cuda.is_initialized(), "CUDA is already in use in this process"
    _redirect_devices()
    _redirect_streams()
    _redirect_random_state()
    _redirect_type_names()
    _redirect_experts()
    _leave_out_engine()
    _exchange_uneven_parts()
    _skip_lone_collectives()
    _redirected = True


def _redirect_devices() -> None:
    # `with torch.device(...)` recognises factories by identity, from a table that it makes on first use. Made after the
    # replacement it would miss the originals, which other libraries hold, and leave their tensors on meta, silently.
    torch.utils._device._device_constructors()
    for name in (*_FACTORIES, *_LIKE_FACTORIES):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.set_device = _nothing
    torch.cuda.synchronize = _nothing
    torch.cuda.empty_cache = _nothing
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory with device="cuda" read as "cpu"."""

    @functools.wraps(factory)
    def create(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None:
            kwargs["device"] = "cpu" if str(device).startswith("cuda") else device
        return factory(*args, **kwargs)

    return create


class _Stream:
    """Stands in for a CUDA stream or event: the CPU finishes each call before the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    wait_stream = wait_event = record = wait = synchronize = lambda self, *args, **kwargs: None

    def record_event(self, *args: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True


def _redirect_streams() -> None:
    stream = _Stream()
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: stream  # type: ignore[assignment]
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing


def _redirect_random_state() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    torch.cuda.manual_seed = torch.random.default_generator.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _redirect_type_names() -> None:
    """The optimizers sort parameters by `param.type()` and know CUDA's type names only."""
    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_of(self, *args, **kwargs)
        if isinstance(name, str) and name.startswith("torch.") and not name.startswith("torch.cuda."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = cuda_type  # type: ignore[assignment,method-assign]


def _redirect_experts() -> None:
    """The dispatcher counts its tokens in tensors that it turns to NumPy only if they are on CUDA."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        del record_stream
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    torch.compiler.set_stance("force_eager")  # the router is compiled, and Dynamo refuses one stand-in for two names
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_numpy
    # Transformer Engine's product runs on CUDA only; where it is not installed, some versions never define the name.
    moe_utils.te_general_gemm = None


def _leave_out_engine() -> None:
    """Transformer Engine, where it is importable, computes on CUDA only."""
    from megatron.core.transformer import attention

    attention.SplitAlongDim = None
    use_torch_adamw()


def _exchange_uneven_parts() -> None:
    """Experts that tensor ranks split gather and reduce parts of unequal length, which gloo refuses in all_gather and
    reduce_scatter; it does take them in all_to_all."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_parts(part: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, *args)
        size = group.size()
        whole = part.new_empty(sum(output_split_sizes), *part.shape[1:])
        copies = part.repeat(size, *[1] * (part.dim() - 1))
        dist.all_to_all_single(whole, copies, output_split_sizes, [len(part)] * size, group=group)
        return whole

    @functools.wraps(reduce_scatter)
    def reduce_parts(whole: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, *args)
        size, own = group.size(), input_split_sizes[group.rank()]
        parts = whole.new_empty(size, own, *whole.shape[1:])
        dist.all_to_all_single(parts.flatten(0, 1), whole.contiguous(), [own] * size, input_split_sizes, group=group)
        return parts.sum(dim=0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_parts, reduce_parts


def _skip_lone_collectives() -> None:
    """Megatron's exchange of gradients and parameters within a group of one rank, for which gloo copies them all."""
    from megatron.core.distributed import param_and_grad_buffer

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, _unless_alone(getattr(param_and_grad_buffer, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: torch.Tensor, data: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, data, *args, group=group, **kwargs)
        if output.data_ptr() != data.data_ptr():
            output.copy_(data.view_as(output))
        return None

    return call


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A CUDA call without meaning on a CPU."""
    del args, kwargs
