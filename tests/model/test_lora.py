"""The adapters of one linear: against the formula, and on linears that return what Transformer Engine's do.

Transformer Engine computes on CUDA only, so classes here have its protocol: a norm fused into the linear returns the
normalised input beside the output where `return_layernorm_output` is set; a grouped linear takes the rows of each
expert and names its weights weight0, weight1, ...
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu

from spot_megatron.hf.names import Sharding
from spot_megatron.model.lora import Layout, LinearAdapter, Matrix, adapter_of_weight, add_adapter
from spot_megatron.weights.shards import merge
from tests.support import make_recipe, one_process

HIDDEN, RANK, ALPHA, GROUPS, HEAD_DIM = 12, 3, 6.0, 2, 4
PARTS = {
    Sharding.QKV: (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)),  # two query heads a group
    Sharding.GATE_UP: (("gate_proj", 10), ("up_proj", 10)),
    Sharding.COLUMNS: (("down_proj", 10),),
}


@pytest.fixture(autouse=True)
def groups(tmp_path):
    with one_process(make_recipe(tmp_path)):
        yield


def make_adapter(sharding: Sharding, targets: tuple[str, ...] | None = None, is_expert: bool = False) -> LinearAdapter:
    """With random values, in float64."""
    matrices = [
        Matrix(f"model.layers.0.{name}", (rows, HIDDEN), targets is None or name in targets)
        for name, rows in PARTS[sharding]
    ]
    num_groups = GROUPS if sharding is Sharding.QKV else 1
    layout = Layout(sharding, num_groups, mpu.get_tensor_model_parallel_group(), False, is_expert)
    weight = torch.zeros(sum(rows for _, rows in PARTS[sharding]), HIDDEN, dtype=torch.float64)
    adapter = LinearAdapter(matrices, layout, RANK, ALPHA, weight)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    return adapter


def update(adapter: LinearAdapter) -> torch.Tensor:
    """alpha / r B A of each matrix, merged as load_hf merges the weights."""
    parts = []
    for matrix in adapter.matrices:
        b, a = (adapter.parameter(matrix, side) if matrix.is_target else None for side in "BA")
        parts.append(torch.zeros(matrix.shape, dtype=torch.float64) if a is None else ALPHA / RANK * b @ a)
    return merge(parts, adapter.layout.sharding, HEAD_DIM)


@pytest.mark.parametrize("targets", [None, ("q_proj",), ("v_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("sharding", PARTS)
def test_forward_and_merge_are_the_formula(sharding, targets):
    names = [name for name, _ in PARTS[sharding]]
    if targets is not None and not set(targets) & set(names):
        return
    adapter = make_adapter(sharding, targets)
    x = torch.randn(5, 1, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), F.linear(x, update(adapter)))
    torch.testing.assert_close(adapter.delta(), update(adapter).float(), atol=1e-5, rtol=1e-5)


class NormLinear(torch.nn.Module):
    """As Transformer Engine's LayerNormLinear under Megatron-Core."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(20, HIDDEN, dtype=torch.float64))
        self.return_layernorm_output = False

    def forward(self, x):
        normed = F.rms_norm(x, (HIDDEN,))
        out = F.linear(normed, self.weight)
        return ((out, normed) if self.return_layernorm_output else out), None


class GroupedLinear(torch.nn.Module):
    """As Transformer Engine's GroupedLinear under Megatron-Core."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        for index in range(num_experts):
            weight = torch.nn.Parameter(torch.randn(20, HIDDEN, dtype=torch.float64))
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x, m_splits):
        weights = [getattr(self, f"weight{index}") for index in range(len(m_splits))]
        parts = x.split(m_splits)
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)]), None


def test_a_fused_norm_gives_the_adapter_its_output():
    linear, adapter = NormLinear(), make_adapter(Sharding.GATE_UP)
    x = torch.randn(5, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    add_adapter(linear, adapter)
    out, bias = linear(x)
    torch.testing.assert_close(out, F.linear(F.rms_norm(x, (HIDDEN,)), linear.weight + update(adapter)))
    assert bias is None
    assert adapter_of_weight(linear) == {".weight": adapter}
    assert torch.autograd.grad(out.sum(), adapter.gate_proj_A)[0].abs().max() > 0


@pytest.mark.parametrize("splits", [[3, 0, 4], [7]])
def test_a_grouped_linear_has_an_adapter_for_each_expert(splits):
    linear = GroupedLinear(len(splits))
    adapters = [make_adapter(Sharding.GATE_UP, is_expert=True) for _ in splits]
    for adapter in adapters:
        add_adapter(linear, adapter)
    x = torch.randn(sum(splits), HIDDEN, dtype=torch.float64)
    out, _ = linear(x, splits)
    wanted = [
        F.linear(part, getattr(linear, f"weight{index}") + update(adapter))
        for index, (part, adapter) in enumerate(zip(x.split(splits), adapters, strict=True))
    ]
    torch.testing.assert_close(out, torch.cat(wanted))
    assert adapter_of_weight(linear) == {f".weight{index}": adapter for index, adapter in enumerate(adapters)}
