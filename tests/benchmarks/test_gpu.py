"""The arithmetic of the GPU benchmark, and its whole path on a CPU with a small model. About 10 s."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention, gpu
from spot_megatron.data.pack import num_targets, positions_and_products
from spot_megatron.model.attention.pair import pair_seq_params
from tests.support import SHAPE, make_recipe, one_process


def test_flops_are_six_a_parameter_and_row_without_attention():
    """Qwen3-8B: 8.19B parameters, of which the input embedding (0.62B) does no work."""
    flops = gpu.model_flops(gpu.MODELS["8b"], positions=1000, products=0, scored=1000)
    assert flops == pytest.approx(6 * (8.19e9 - 0.62e9) * 1000, rel=2e-3)


def test_flops_of_attention():
    """QK^T and PV are 2 x 2 x head_dim operations a visible key and head, three times with backward."""
    hf = gpu.MODELS["0p6b"]
    assert gpu.model_flops(hf, 0, 5, 0) == 3 * 4 * 128 * 16 * 28 * 5


def test_rates_of_known_times():
    hf = gpu.MODELS["0p6b"]
    dataset = gpu.random_dataset(response=100, shared=0.5, num_pairs=8, vocab_size=1000)
    phases = gpu.Phases(torch.device("cpu"))
    phases.seconds = {"reference": [9.0], "forward_backward": [50.0, 1.5, 1.5, 2.5], "update": [50.0, 0.5, 0.5, 0.5]}
    recipe = gpu.load_recipe("qwen3_8b_spot", ["train.batch_pairs=4"])
    found = gpu.rates(phases, hf, dataset, recipe, peak=100.0, num_gpus=2)
    assert found["step_seconds"] == {"median": 2.0, "min": 2.0, "max": 3.0, "count": 3}  # the first is warm-up
    assert found["tokens_per_second"] == 4 * 2 * (128 + 100) / 2.0 / 2
    assert found["unique_tokens_per_second"] == 4 * (128 + 150) / 2.0 / 2
    pair = dataset.pairs[0]
    flops = 4 * gpu.model_flops(hf, *positions_and_products(pair, "shared"), num_targets(pair, "shared"))
    assert found["model_tflops_per_second"] == pytest.approx(flops / 2.0 / 2 / 1e12)
    assert found["mfu_on_unique_tokens"] == pytest.approx(flops / 2.0 / 2 / 1e12 / 100)


def test_peaks_by_name():
    assert gpu.peak_tflops("NVIDIA H200") == gpu.peak_tflops("NVIDIA H100 80GB HBM3") == 989.5
    assert gpu.peak_tflops("Tesla T4") is None


def test_the_whole_path_on_a_cpu(tmp_path):
    """What it times is training: the reference pass and two finite steps, each phase once a step."""
    recipe = make_recipe(tmp_path, train={"batch_pairs": 2, "max_steps": 2}, objective={"name": "spot_bce"})
    dataset = gpu.random_dataset(response=20, shared=0.5, num_pairs=4, vocab_size=SHAPE.vocab_size)
    with one_process(recipe) as topology:
        phases = gpu.train(recipe, SHAPE, dataset, topology)
    assert {name: len(seconds) for name, seconds in phases.seconds.items()} == {
        "build": 1,
        "reference": 1,
        "forward_backward": 2,
        "update": 2,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
@pytest.mark.parametrize("program", [gpu, attention])
def test_refuses_without_a_gpu(program, capsys):
    assert program.main([]) == 2
    assert "PyTorch sees none here" in capsys.readouterr().err


def test_the_attention_that_is_timed_is_the_models():
    pack = gpu.random_dataset(response=20, shared=0.5, num_pairs=2, vocab_size=50).pack(range(2), "shared", 128)
    layout = pair_seq_params(pack, torch.device("cpu"))
    rows = len(pack.input_ids)
    inputs = [torch.randn(rows, 1, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    timed, models = (attention.kernel_attention(name, 16)(*inputs, packed_seq_params=layout) for name in ("sdpa", None))
    torch.testing.assert_close(timed, models)
