"""Two GPUs against one over NCCL: `make test-node`, about 10 minutes. Prints a table to paste into an issue.

Each split trains three steps of a small model. Losses, rewards and gradient norms must be those of one GPU: in fp32 to
rounding, in bf16 within its noise. Under Slurm: `make test-node SRUN="--partition=NAME"`.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from tests.processes import output_of, run
from tests.support import make_recipe, random_pairs, write_token_pairs
from tests.weights.models import make_folder

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

FP32, BF16 = {"precision": {"dtype": "fp32"}}, {"precision": {"dtype": "bf16"}}
TWO_PAIRS = {"data": {"pairs_per_microbatch": 2}}
SPLITS: dict[str, dict] = {
    "dp2": FP32,
    "tp2": {**FP32, "parallel": {"tensor": 2}},
    "tp2 sequence": {**FP32, "parallel": {"tensor": 2, "sequence": True}},
    "pp2": {**FP32, **TWO_PAIRS, "parallel": {"pipeline": 2}},
    "pp2 interleaved": {**FP32, **TWO_PAIRS, "parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "cp2": {**FP32, "parallel": {"context": 2}},
    "dp2 bf16": BF16,
    "tp2 sequence bf16": {**BF16, "parallel": {"tensor": 2, "sequence": True}},
    "pp2 bf16": {**BF16, **TWO_PAIRS, "parallel": {"pipeline": 2}},
}
EXPERT_SPLITS: dict[str, dict] = {
    "ep2": {**FP32, "parallel": {"expert": 2}},
    "tp2 experts": {**FP32, "parallel": {"tensor": 2, "sequence": True}},
    "expert tp2": {**FP32, "parallel": {"tensor": 2, "sequence": True, "expert_tensor": 2}},
}
CASES = [("qwen3", name) for name in SPLITS] + [("qwen3_moe_some", name) for name in EXPERT_SPLITS]
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
COMPARED = ("loss", "reward_chosen", "reward_rejected", "grad_norm")


def train(folder: Path, family: str, name: str, sections: dict, gpus: int, environment: dict | None = None) -> list:
    """Metrics of three steps on `gpus` GPUs."""
    if not (folder / family).exists():
        make_folder(folder / family, family=family, tied=False)
        write_token_pairs(folder / "pairs.jsonl", random_pairs(24))
    output = folder / f"{family}_{name}_{gpus}".replace(" ", "_")
    recipe = make_recipe(
        folder,
        **{
            "device": "cuda",
            "deterministic": False,
            "model": {"hf": str(folder / family)},
            "output": str(output),
            "objective": {"name": "spot_bco", "beta": 0.5},
            "train": {"batch_pairs": 8, "epochs": 1},
            "optim": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0, "eps": 1e-4},
            "export": {"hf": False},
            **sections,
        },
    )
    file, log = output.with_suffix(".yaml"), output.with_suffix(".txt")
    file.write_text(recipe.dump())
    (folder / "start.py").write_text(f"import os\nos.environ.update({environment or {}})\n{START}")
    command = [str(folder / "start.py"), str(file)]
    assert run(command, log, gpus, timeout=120) == 0, output_of(log)[-4000:]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


START = "import sys\nfrom spot_megatron.train.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def difference(ours: list[dict], theirs: list[dict]) -> float:
    """The largest of all steps, relative to values above 1."""
    pairs = ((x[key], y[key]) for x, y in zip(ours, theirs, strict=True) for key in COMPARED)
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in pairs)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """(folder, lines of the table); it is printed when all splits have run."""
    lines: list[str] = []
    yield tmp_path_factory.mktemp("node"), lines
    print("\n" + "\n".join([*machine(), "", "| model | split | difference | s/step |", "|---|---|---|---|", *lines]))


def machine() -> list[str]:
    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    packages = ("torch", "megatron-core", "transformer-engine", "flash-attn")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return [
        f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}, NCCL {nccl}",
        f"Python {platform.python_version()}, {', '.join(map(installed, packages))}",
    ]


@pytest.mark.parametrize(("family", "name"), CASES, ids=str)
def test_two_gpus_compute_what_one_does(table, family, name):
    folder, lines = table
    sections = {**SPLITS, **EXPERT_SPLITS}[name]
    one = train(folder, family, name, {**sections, "parallel": {}}, 1)
    two = train(folder, family, name, sections, 2)
    found, allowed = difference(two, one), TOLERANCE[sections["precision"]["dtype"]]
    lines.append(
        f"| {family} | {name} | {found:.1e}{'' if found <= allowed else ' **!**'} | {two[-1]['seconds']:.3f} |"
    )
    assert found <= allowed


def test_overlapped_collectives_change_nothing(table):
    """Gradients are reduced behind the backward pass. With CUDA_LAUNCH_BLOCKING nothing overlaps: a missing wait for a
    collective would show as a difference."""
    folder, lines = table
    overlapped = train(folder, "qwen3", "overlapped", FP32, 2)
    in_turn = train(folder, "qwen3", "in turn", FP32, 2, {"CUDA_LAUNCH_BLOCKING": "1"})
    found = difference(overlapped, in_turn)
    lines.append(f"| qwen3 | dp2, overlap on and off | {found:.1e} | {overlapped[-1]['seconds']:.3f} |")
    assert found <= 1e-4
