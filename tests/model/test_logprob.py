"""The tiled head against log_softmax, vocabulary whole and padded. Split heads: tests/train/test_parity.py."""

from __future__ import annotations

import pytest
import torch

from spot_megatron.model.logprob import HeadMemory, linear_logprob, tile_width

S, H, V, PADDED = 37, 12, 50, 64


@pytest.mark.parametrize("num_scored", [1, 777, 4096, 16384])
def test_tiles_are_as_wide_as_tensor_cores_want_them(num_scored):
    memory = HeadMemory(tile_elements=80 * 2**30 // 4096, kept_bytes=0)
    width = tile_width(num_scored, memory)
    assert width % 128 == 0
    assert memory.tile_elements / num_scored - 128 < width <= memory.tile_elements / num_scored
    assert tile_width(num_scored, HeadMemory(50 * num_scored, 0)) == 50


def tensors(dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(S, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (S,), generator=generator)


# A column a tile and nothing kept; five tiles of which two are kept in float32; one tile, kept.
@pytest.mark.parametrize(
    "memory", [HeadMemory(1, 0), HeadMemory(10 * S, 4 * 20 * S), HeadMemory(2**20, 2**20)], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_value_and_gradients(dtype, tolerance, memory):
    hidden, weight, target = tensors(dtype)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = torch.log_softmax(exact_hidden @ exact_weight[:V].T, dim=-1)[torch.arange(S), target]
    logp = linear_logprob(hidden, weight, target, vocab_size=V, memory=memory)
    assert logp.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(logp.double(), exact, rtol=tolerance, atol=tolerance)

    scale = torch.linspace(-1, 1, S, dtype=torch.float64)
    (exact * scale).sum().backward()
    (logp * scale.to(logp.dtype)).sum().backward()
    for grad, exact_grad in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert (grad.double() - exact_grad).abs().max() <= tolerance * exact_grad.abs().max()
    assert not weight.grad[V:].any()  # padding takes no probability, so it is never pushed


def test_no_rows_give_zero_gradients():
    hidden, weight, target = tensors(torch.float32)
    linear_logprob(hidden[:0], weight, target[:0], vocab_size=V).sum().backward()
    assert not weight.grad.any()


def test_gradient_goes_into_the_buffer_of_megatrons_ddp():
    """Added to what is there, in the buffer's own dtype; autograd gets a placeholder, or nothing for a tied weight."""
    hidden, weight, target = tensors(torch.float32)
    linear_logprob(hidden, weight, target, vocab_size=V).sum().backward()
    expected, weight.grad = weight.grad, None
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            weight.main_grad, weight.grad_added_to_main_grad = torch.ones(PADDED, H, dtype=dtype), False
            linear_logprob(hidden, weight, target, vocab_size=V, is_embedding=tied).sum().backward()
            torch.testing.assert_close(
                weight.main_grad.float() - 1, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02
            )
            assert (weight.grad is None) == tied
            assert weight.grad_added_to_main_grad != tied
            weight.grad = None


def test_targets_of_other_ranks_take_no_logit_here():
    """A rank's part: the log-sum-exp over its own rows; without a group only its own targets are scored right."""
    hidden, weight, target = tensors(torch.float64)
    half = PADDED // 2
    own = (target >= half) & (target < V)
    shard = linear_logprob(hidden, weight[half:], target, vocab_size=V, vocab_start=half, memory=HeadMemory(3 * S, 0))
    logits = hidden @ weight[half:V].T
    expected = torch.where(own, logits.gather(1, (target - half).clamp(min=0)[:, None])[:, 0], 0.0) - logits.logsumexp(
        -1
    )
    torch.testing.assert_close(shard, expected)


@pytest.mark.parametrize("kept_bytes", [0, 2**18])
def test_memory_bounds(kept_bytes):
    """The largest tensors that the head makes are a tile of logits and the kept softmax, not [S, V]."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(4096, 8, requires_grad=True)
    with Watch():
        memory = HeadMemory(tile_elements=2**15, kept_bytes=kept_bytes)
        linear_logprob(hidden, weight, torch.arange(512), vocab_size=4096, memory=memory).sum().backward()
    assert max(sizes) == max(2**15, kept_bytes // 4)
