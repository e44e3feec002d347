"""Both forms of the pair layout's attention against a dense mask, in float64: outputs and all three gradients."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from spot_megatron.data.pack import build_pack
from spot_megatron.errors import RecipeError
from spot_megatron.model.attention import cuda as attention_kernels
from spot_megatron.model.attention.cuda import flex_mask, pick_kernel
from spot_megatron.model.attention.pair import PairAttention, pair_seq_params
from spot_megatron.model.config import check_attention
from tests.processes import output_of, run
from tests.support import make_recipe, random_pairs

PAIRS = random_pairs(5)
HEADS, GROUPS, HEAD_DIM, SCALE = 4, 2, 16, 0.3


def spans(cu):
    return list(itertools.pairwise(cu.tolist()))


def dense_mask(num_rows, layout):
    """[T, T] what each position sees, from the arguments of the two calls."""
    sees = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for start, stop in spans(layout.cu_main):
        sees[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
    queries, keys = spans(layout.cu_suffix_q), spans(layout.cu_suffix_k)
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        causal = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril((k1 - k0) - (q1 - q0))
        sees[layout.num_main + q0 : layout.num_main + q1, layout.suffix_k_position[k0:k1]] = causal
    return sees


def dense_attention(query, key, value, layout):
    """The definition: one softmax a row over all rows of the pack, with everything that it must not see masked."""
    sees = dense_mask(query.shape[0], layout)
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) * SCALE
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~sees, -torch.inf).softmax(dim=-1), value)


def pair_attention(kernel, inputs, layout):
    module = PairAttention.__new__(PairAttention)
    torch.nn.Module.__init__(module)
    module.scale, module.kernel = SCALE, kernel
    return module._attend(*inputs, layout)


@pytest.mark.parametrize("kernel", [None, "sdpa"])
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("multiple_of", [1, 64])
@pytest.mark.parametrize("strided", [False, True])
def test_outputs_and_gradients(kernel, layout, multiple_of, strided):
    pack = build_pack(PAIRS, range(5), layout, multiple_of, pad_id=0)
    params = pair_seq_params(pack, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    num_rows = len(pack.input_ids)
    joined = torch.randn(num_rows, HEADS + 2 * GROUPS, HEAD_DIM, generator=generator, dtype=torch.float64)
    parts = joined.split([HEADS, GROUPS, GROUPS], dim=1)  # as Megatron splits its joint projection: views
    inputs = [(part if strided else part.contiguous()).detach().requires_grad_() for part in parts]
    direction = torch.randn(num_rows, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    expected = dense_attention(*inputs, params)
    expected_grads = torch.autograd.grad((expected * direction).sum(), inputs)
    out = pair_attention(kernel, inputs, params)
    grads = torch.autograd.grad((out * direction).sum(), inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-13)


def test_no_tensor_of_queries_times_keys():
    """Memory grows with the rows of a pack, not with their square: no mask, no scores, no gathered keys."""
    pack = build_pack(random_pairs(1, longest=4000), [0], "shared", 1, pad_id=0)
    params = pair_seq_params(pack, torch.device("cpu"))
    num_rows, sizes = len(pack.input_ids), []
    assert num_rows > 1000

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    inputs = [torch.randn(num_rows, heads, 8, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
    with Watch():
        pair_attention(None, inputs, params).sum().backward()
    assert max(sizes) == num_rows * HEADS * 8


def check_flex(layout, multiple_of):
    pack = build_pack(PAIRS, range(5), layout, multiple_of, pad_id=0)
    params = pair_seq_params(pack, torch.device("cpu"))
    num_rows = len(pack.input_ids)
    mask = flex_mask(num_rows, params.cu_main, params.cu_suffix_q, params.cu_suffix_k, params.suffix_k_position)
    row = torch.arange(num_rows)
    assert torch.equal(mask.mask_mod(None, None, row[:, None], row[None, :]), dense_mask(num_rows, params))
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(num_rows, heads, HEAD_DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    torch.testing.assert_close(pair_attention("flex", inputs, params), dense_attention(*inputs, params))


def test_flex_attention_sees_the_same(tmp_path):
    """Its mask, row by row, and its outputs; PyTorch has no backward of it on a CPU. In a process of its own: Dynamo,
    which it always asks, does not know PyTorch again once Megatron's CUDA calls are redirected."""
    code = "from tests.model.attention.test_pair import check_flex\n"
    code += "for layout in ('shared', 'separate'):\n    for rows in (1, 64):\n        check_flex(layout, rows)\n"
    assert run(["-c", code], tmp_path / "log") == 0, output_of(tmp_path / "log")


def test_a_kernel_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(attention_kernels, "import_problem", lambda name: "is not installed")
    assert pick_kernel("auto", torch.bfloat16) == "flex"
    assert pick_kernel("auto", torch.float32) == "sdpa"
    with pytest.raises(RecipeError, match="flash2: flash-attn is not installed"):
        pick_kernel("flash2", torch.bfloat16)
    with pytest.raises(RecipeError, match="16 bits"):
        pick_kernel("torch", torch.float32)
    with pytest.raises(RecipeError, match="CUDA kernel"):
        check_attention(make_recipe(Path(), model={"attention": "flex"}), "cpu")
