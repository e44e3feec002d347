"""Planned bytes against those of this project's model, gradients and optimizer on the CPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from spot_megatron.data.pack import build_pack
from spot_megatron.model import config, logprob
from spot_megatron.model.attention.pair import PairAttention
from spot_megatron.model.head_memory import gpu_head_memory
from spot_megatron.parallel.split import Split, padded_vocab_size
from spot_megatron.plan import memory
from spot_megatron.plan.hardware import THIS_PROJECT, find_gpu
from spot_megatron.plan.inputs import PlanInput
from spot_megatron.plan.memory import layer_bytes, rank_memory, stage_memory
from spot_megatron.plan.models import PUBLISHED, planned_model
from spot_megatron.plan.trained import parameters_of_rank
from spot_megatron.recipe import Memory, Parallel, Precision
from spot_megatron.train.microbatch import microbatch
from spot_megatron.train.optim import make_trainable
from spot_megatron.weights.checkpoint import SHARED_FROM_BYTES
from tests.support import SHAPE, make_recipe, one_process, random_model, random_pairs

SMALL = SHAPE
QWEN3_8B = PUBLISHED["Qwen/Qwen3-8B"]
H800 = find_gpu("h800")


def test_parameters_are_the_published_ones():
    """Totals of the hub's safetensors headers."""
    totals = {
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-14B": 14_768_307_200,
        "Qwen/Qwen3-32B": 32_762_123_264,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
        "Qwen/Qwen3-235B-A22B": 235_093_634_560,
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
    }
    assert {name: model.num_parameters for name, model in PUBLISHED.items()} == totals


def test_constants_are_the_codes(monkeypatch):
    card = SimpleNamespace(total_memory=H800.memory_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    head = logprob.head_memory(torch.device("cuda"))
    assert head == gpu_head_memory(H800.memory_bytes)
    assert (head.tile_elements, head.kept_bytes) == (H800.memory_bytes // 4096, H800.memory_bytes // 64)


def test_host_memory_of_a_save_is_a_share_of_large_weights():
    def plan(num_gpus):
        return PlanInput(QWEN3_8B, Split(Parallel(), num_gpus), Precision(), Memory(), H800)

    assert memory.SHARED_FROM_BYTES == SHARED_FROM_BYTES
    small, large = memory.SHARED_FROM_BYTES - 1, 16e9
    fixed = memory.WRITER_BYTES + memory.BLOCKS_BYTES
    assert memory.host_bytes_of_save(plan(8), small) == small + fixed
    assert memory.host_bytes_of_save(plan(8), large) == large / 8 + fixed


def test_software_is_this_project(tmp_path):
    """The plan's assumptions about the code against the configuration of a GPU run."""
    built = config.transformer_config(SHAPE, make_recipe(tmp_path), "cuda")
    assert built.bias_activation_fusion == THIS_PROJECT.fused_swiglu
    assert built.moe_token_dispatcher_type == "alltoall"
    assert not built.tp_comm_overlap
    assert THIS_PROJECT.pair_attention
    assert THIS_PROJECT.tiled_head


@pytest.mark.parametrize(("dtype", "grad_dtype"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_states_of_a_real_optimizer(tmp_path, dtype, grad_dtype):
    """Bytes of weights, gradient buffers, masters and moments of one rank, after an update."""
    precision = {"dtype": dtype, "grad_dtype": grad_dtype}
    recipe = make_recipe(tmp_path, precision=precision)
    with one_process(recipe):
        chunks = random_model(recipe, dtype=config.DTYPES[dtype])
        policy = make_trainable(chunks, recipe)
        policy.squared_grad_norm()  # prepares the gradients, as a step does
        policy.update(1e-6, 1.0)
        weights = sum(p.numel() * p.element_size() for p in chunks[0].parameters())
        buffers = policy.wrapped[0].buffers
        gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
        inner = policy.optimizer.chained_optimizers[0] if hasattr(policy.optimizer, "chained_optimizers") else None
        optimizer = (inner or policy.optimizer).optimizer
        held = [p for group in optimizer.param_groups for p in group["params"]]
        moments = sum(v.numel() * v.element_size() for p in held for k, v in optimizer.state[p].items() if k != "step")
        masters = sum(p.numel() * p.element_size() for p in held) if dtype == "bf16" else 0
    planned = stage_memory(PlanInput(SMALL, Split(Parallel(), 1), recipe.precision, recipe.memory, H800), 64, 1, 0)
    assert planned.weights == weights
    assert planned.gradients == pytest.approx(gradients, rel=0.01)  # buffers are padded
    assert planned.optimizer == pytest.approx(moments + masters, rel=0.01)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"tensor": 4}])
def test_parameters_of_ranks_add_up(parallel):
    """Over stages and tensor ranks: the whole model, norms once a tensor rank, a tied embedding on both ends."""
    sizes = Parallel(**parallel)
    for model in (SMALL, dataclasses.replace(SMALL, tied=True)):
        total = 0.0
        for stage in range(sizes.pipeline):
            total += sizes.tensor * parameters_of_rank(model, Split(sizes, 8), stage)[0]
        padded = padded_vocab_size(model.vocab_size, sizes.tensor) - model.vocab_size
        copies = 1 if model.tied and sizes.pipeline == 1 else 2
        extra = (sizes.tensor - 1) * (model.num_layers * model.small_weights + model.hidden_size)
        extra += (copies - (1 if model.tied else 2)) * model.embedding_weights + copies * padded * model.hidden_size
        assert total == model.num_parameters + extra


def _saved_bytes(folder, recompute: str, num_layers: int) -> tuple[float, int, float]:
    """(bytes kept for backward that Transformer Engine keeps too, rows, gathered rows) of a bf16 model."""
    hf = dataclasses.replace(SHAPE, num_layers=num_layers)
    recipe = make_recipe(folder, precision={"dtype": "bf16"}, memory={"recompute": recompute})
    pack = build_pack(random_pairs(40, longest=60), list(range(40)), "shared", 1, 0)
    num_rows = len(pack.input_ids)
    with one_process(recipe):
        model = random_model(recipe, hf, torch.bfloat16)[0]
        batch = microbatch(pack, torch.device("cpu"))
        ignored = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            # PyTorch's attention keeps masks, which kernels on GPUs do not.
            is_mask = tensor.dim() == 2 and num_rows not in tensor.shape and tensor.shape[-1] != hf.hidden_size
            if tensor.dtype == torch.bfloat16 and not is_mask and tensor.untyped_storage().data_ptr() not in ignored:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                packed_seq_params=batch.layout,
            )
        return sum(t.untyped_storage().nbytes() for t in kept.values()), num_rows, len(pack.suffix_k_position)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_the_real_layer(tmp_path, monkeypatch, recompute):
    """Autograd's saved tensors of one layer more, with the attention of GPUs: within 1% of the plan's count."""
    attend = PairAttention._attend

    def attend_as_gpus_do(self, *inputs):
        self.kernel = "sdpa"
        return attend(self, *inputs)

    monkeypatch.setattr(PairAttention, "_attend", attend_as_gpus_do)
    few, num_rows, gathered = _saved_bytes(tmp_path, recompute, 2)
    many, _, _ = _saved_bytes(tmp_path, recompute, 4)
    measured = (many - few) / 2 / num_rows
    if recompute == "full":
        assert measured == 2 * SMALL.hidden_size
        return
    software = dataclasses.replace(THIS_PROJECT, fused_rope=False)  # which takes Transformer Engine
    planned = layer_bytes(
        PlanInput(SMALL, Split(Parallel(), 1), Precision(), Memory(recompute=recompute), H800, software)
    )
    # The plan takes the most rows that can be gathered; statistics are fp32, which the hook leaves out.
    planned -= 4 * SMALL.key_value_width * (1 - gathered / num_rows) * (recompute == "none")
    planned -= 4 * SMALL.num_heads * (recompute == "none")
    assert measured == pytest.approx(planned, rel=0.01)


def test_experts_are_sharded_over_their_own_data_ranks():
    """8 GPUs, experts over 4 of them: half the optimizer state of a rank's experts, an eighth of everything else."""
    model = PUBLISHED["Qwen/Qwen3-30B-A3B"]
    sizes = Split(Parallel(expert=4), 8)
    dense, experts = parameters_of_rank(model, sizes, 0)
    assert experts == 48 * 128 * 3 * 2048 * 768 / 4
    assert stage_memory(PlanInput(model, sizes, Precision(), Memory(), H800), 64, 1, 0).optimizer == 12 * (
        dense / 8 + experts / 2
    )


def test_fullest_stage():
    """Without recompute the first stage holds most micro-batches; a long vocabulary makes the last one the fullest."""
    inputs = PlanInput(QWEN3_8B, Split(Parallel(pipeline=4), 8), Precision(), Memory(), H800)
    assert rank_memory(inputs, 8192, 16).stage == 0
    wide = dataclasses.replace(QWEN3_8B, vocab_size=2_000_000)
    assert rank_memory(dataclasses.replace(inputs, model=wide, memory=Memory(recompute="full")), 2048, 16).stage == 3


def test_what_saves_memory():
    def total(precision=None, recompute="none", num_gpus=8, tokens=8192, **parallel):
        sizes = Split(Parallel(sequence=parallel.get("tensor", 1) > 1, **parallel), num_gpus)
        inputs = PlanInput(QWEN3_8B, sizes, Precision(**(precision or {})), Memory(recompute=recompute), H800)
        return rank_memory(inputs, tokens, 16).total

    plain = total()
    assert total(recompute="full") < total(recompute="selective") < plain
    assert total(precision={"grad_dtype": "bf16"}) == plain - 2 * QWEN3_8B.num_parameters
    assert total(tokens=4096) < plain
    assert total(context=2) < plain
    assert total(tensor=2) < total(pipeline=2) < plain
    assert total(num_gpus=16) < plain


def test_fp8_keeps_copies_of_weights_and_smaller_activations():
    inputs = PlanInput(QWEN3_8B, Split(Parallel(), 8), Precision(), Memory(), H800)
    bf16 = rank_memory(inputs, 8192, 2)
    fp8 = rank_memory(dataclasses.replace(inputs, precision=Precision(fp8="tensorwise")), 8192, 2)
    blocks = QWEN3_8B.active_weights - QWEN3_8B.embedding_weights
    assert fp8.weights == bf16.weights + 2 * blocks
    assert fp8.activations < 0.9 * bf16.activations
    assert (fp8.gradients, fp8.optimizer) == (bf16.gradients, bf16.optimizer)


def test_unknown_model_names_the_nearest():
    with pytest.raises(Exception, match=r"did you mean Qwen/Qwen3-14B\?.*config.json"):
        planned_model("Qwen/Qwen3-14")
    assert planned_model("meta-llama/Llama-3.1-8B-Instruct").num_layers == 32
    assert planned_model("recipes/assets/qwen3_tiny").num_parameters < 1_000_000


# (recompute, layers, positions of the pack) -> GiB that forward and backward add to weights, gradients and optimizer:
# PyTorch's CUDA allocator, torch 2.11, local layers, attention `sdpa`, an 8B-wide model in bf16.
ALLOCATED = {
    ("none", 4, 12_512): 10.257,
    ("selective", 4, 12_512): 9.701,
    ("full", 4, 12_512): 3.247,
    ("full", 16, 6256): 3.525,
}


@pytest.mark.parametrize(("case", "measured"), ALLOCATED.items())
def test_peak_of_a_step_is_the_allocators(case, measured):
    recompute, num_layers, positions = case
    model = dataclasses.replace(QWEN3_8B, num_layers=num_layers)
    inputs = PlanInput(model, Split(Parallel(), 1), Precision(), Memory(recompute=recompute), H800)
    planned = stage_memory(inputs, positions, 2, 0)
    assert measured <= (planned.activations + planned.transient) / memory.GIB <= 1.06 * measured
