"""`make doctor`: prints which recipes this machine can run, and compares Megatron's logits with transformers' once.

Exit code 0 if the embedded default can run and the logits agree.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WANTED = ("torch", "megatron-core", "transformers", "safetensors", "psutil", "openai", "math-verify")
OPTIONAL = (
    "transformer_engine",
    "flash_attn",
    "fused_weight_gradient_mlp_cuda",
    "wandb",
    "mlflow",
    "swanlab",
    "trackio",
)

ROOT = Path(__file__).resolve().parent.parent
SELFCHECK = ROOT / "docker" / "selfcheck.py"
TINY = ROOT / "recipes" / "assets" / "qwen3_tiny"
NUM_PROMPTS = 8


def main() -> int:
    missing = [name for name in WANTED if not _version(name)]
    _section("Packages", {name: _version(name) or "MISSING" for name in WANTED})
    _section("Optional", {name: "yes" if importlib.util.find_spec(name) else "no" for name in OPTIONAL})
    if missing:
        print(f"\nMissing: {', '.join(missing)}. Run: make setup")
        return 1
    import torch

    _section("Machine", _machine())
    print("\nThis machine can run")
    print("  yes  make train RECIPE=qwen3_tiny_spot   (CPU, gloo)")
    for line in _verdicts(torch.cuda.is_available()):
        print(f"  {line}")
    if torch.cuda.is_available():
        for line in host_memory_of_saves(torch.cuda.get_device_name(), torch.cuda.device_count()):
            print(f"  {line}")
    code = compare_with_transformers("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available() or "SPOT_MEGATRON_IMAGE" in os.environ:
        print("\nSelf-check of the GPU software", flush=True)
        code = subprocess.run([sys.executable, str(SELFCHECK)], check=False).returncode or code
    return code


def compare_with_transformers(device: str, other: Path = TINY) -> int:
    """Prints whether Megatron on `device` has transformers' logits on the embedded model. Returns 0 if it has.

    `other` is the Hugging Face folder that Megatron loads.
    """
    print(f"\nMegatron's logits on {device} against transformers', embedded model", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join((TINY / "pairs.jsonl").read_text().splitlines(keepends=True)[:NUM_PROMPTS]))
        command = ["-m", "tools.convert", "verify", "--a", str(TINY), "--b", str(other), "--logits", str(prompts)]
        done = subprocess.run(
            [sys.executable, *command, "--device", device], cwd=ROOT, capture_output=True, text=True, check=False
        )
    lines = (done.stdout if done.stdout.strip() else done.stderr).strip().splitlines()
    print(f"  {lines[-1] if lines else f'failed with exit code {done.returncode}'}")
    return done.returncode


def host_memory_of_saves(device: str, num_gpus: int) -> list[str]:
    """A line for each recipe that fits on `num_gpus` GPUs: does the host have the memory that a save takes.

    `device` is CUDA's name of the GPU. Lengths of pairs are assumed, as `make plan` does without a pair file.
    """
    import psutil

    from spot_megatron.errors import UserError
    from spot_megatron.plan.estimate import make_planner
    from spot_megatron.plan.hardware import GPUS
    from spot_megatron.recipe import RECIPE_FOLDER, load_recipe

    gpu = next((gpu for name, gpu in GPUS.items() if name in device.lower()), None)
    if gpu is None:
        return [f"?    host memory of a save: {device} is unknown to make plan"]
    available, lines = psutil.virtual_memory().available, []
    for path in sorted(RECIPE_FOLDER.glob("*.yaml")):
        recipe = load_recipe(path)
        if recipe.precision.dtype != "bf16":  # the embedded ones
            continue
        try:
            estimate = make_planner(recipe, gpu).estimate(recipe, num_gpus)
        except UserError:
            continue  # this number of GPUs cannot run it: `make plan` gives the reason
        if estimate.fits:
            needed = estimate.host_bytes_of_save
            answer = "yes " if needed < available else "no  "
            lines.append(
                f"{answer} {recipe.name}: a save takes up to {needed / 1e9:.0f} GB more host memory, "
                f"{available / 1e9:.0f} GB are free"
            )
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _section(title: str, rows: dict[str, str]) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<32}{value}")


def _machine() -> dict[str, str]:
    import psutil
    import torch

    rows = {
        "python": sys.version.split()[0],
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "free disk space": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB",
        "CUDA": str(torch.version.cuda) if torch.cuda.is_available() else "no device",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows[f"GPU {index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
    return rows


def _verdicts(has_cuda: bool) -> list[str]:
    import torch

    if not has_cuda:
        return ["no   bf16 training of 8B and larger models: needs NVIDIA GPUs", "no   FP8: needs Hopper GPUs"]
    from spot_megatron.parallel.installed import import_problem

    engine, flash = import_problem("transformer_engine.pytorch"), import_problem("flash_attn")
    has_engine = engine is None
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    has_block_cuda = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2]) >= (12, 9)
    return [
        "yes  bf16 training" if has_engine else f"slow bf16 training: Transformer Engine {engine}",
        "yes  flash-attn" if flash is None else f"slow pair attention, PyTorch's own: flash-attn {flash}",
        f"{'yes' if has_engine and hopper else 'no '}  FP8 tensorwise: needs Transformer Engine and Hopper",
        f"{'yes' if has_engine and hopper and has_block_cuda else 'no '}  FP8 blockwise: also needs CUDA 12.9",
    ]


if __name__ == "__main__":
    sys.exit(main())
