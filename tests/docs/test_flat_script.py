"""The flat script of docs/ computes what the training program computes. About 20 s."""

from __future__ import annotations

import json
import re

from safetensors.torch import load_file

from spot_megatron.hf.folder import same_bits
from tests.processes import ROOT, output_of, run


def test_the_flat_script_trains_as_the_program_does(tmp_path):
    log = tmp_path / "log"
    assert run([str(ROOT / "docs/examples/train_flat.py"), str(tmp_path / "flat")], log) == 0, output_of(log)
    printed = re.findall(r"step \d+: loss (\S+), gradient norm (\S+)", output_of(log))

    keys = ["device=cpu", "train.max_steps=2", f"output={tmp_path / 'run'}"]
    arguments = ["-m", "spot_megatron.train", "qwen3_tiny_spot", "--set", *keys]
    assert run(arguments, log) == 0, output_of(log)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert printed == [(f"{row['loss']:.6f}", f"{row['grad_norm']:.3f}") for row in rows]
    flat, program = (load_file(tmp_path / folder / "hf/model.safetensors") for folder in ("flat", "run"))
    assert flat.keys() == program.keys()
    assert all(same_bits(flat[name], program[name]) for name in flat)
