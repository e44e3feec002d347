"""The update by PyTorch alone: clipping in place, and no kernel of a package that needs CUDA."""

from __future__ import annotations

import json

import torch
from megatron.core.optimizer import clip_grads

from spot_megatron.parallel.adamw import use_torch_adamw
from tests.processes import ROOT, output_of, run
from tests.support import SHAPE, make_recipe, random_pairs, save_random_hf, write_token_pairs


def test_gradients_are_scaled_where_they_are():
    use_torch_adamw()
    grads = [torch.full((size,), float(size)) for size in (3, 1, 8)]
    places = [grad.data_ptr() for grad in grads]
    clip_grads.multi_tensor_scale_impl(0, None, [grads, grads], 0.5)
    assert [grad[0].item() for grad in grads] == [1.5, 0.5, 4.0]
    assert [grad.data_ptr() for grad in grads] == places


def test_a_cpu_run_where_transformer_engine_is_importable(tmp_path):
    """Megatron-Core takes its optimizer from there; on a CPU the run is the same as without it, to the bit."""
    save_random_hf(tmp_path / "model", SHAPE)
    write_token_pairs(tmp_path / "pairs.jsonl", random_pairs(8))
    rows = []
    for program in (["-m", "spot_megatron.train"], [str(ROOT / "tests/parallel/engine_stand_in.py")]):
        name = f"run{len(rows)}"
        sections = {"train": {"batch_pairs": 4, "max_steps": 2}, "optim": {"lr": 1e-2, "clip_grad_norm": 0.1}}
        recipe = make_recipe(tmp_path, output=str(tmp_path / name), export={"hf": False}, **sections)
        (tmp_path / f"{name}.yaml").write_text(recipe.dump())
        code = run([*program, str(tmp_path / f"{name}.yaml")], tmp_path / "log")
        assert code == 0, output_of(tmp_path / "log")[-3000:]
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rows.append([{key: value for key, value in row.items() if key != "seconds"} for row in metrics])
    assert rows[0] == rows[1]
    assert rows[0][0]["grad_norm"] > 0.1
