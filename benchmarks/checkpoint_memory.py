"""Host memory of a checkpoint, by rank: `python -m benchmarks.checkpoint_memory --parameters 64 --ranks 2`.

Starts `ranks` CPU processes that hold one model of about `parameters` million weights in bf16, with fp32 gradients and
optimizer state, data-parallel. Each saves a checkpoint and loads it again, once with Megatron's fully reshardable form,
which earlier versions wrote, and once as training does. Printed and written to benchmarks/results: anonymous and shared
memory (Pss_Anon, Pss_Shmem of /proc/PID/smaps_rollup: pages of a forked process count once) of a rank and the processes
it starts, above what it holds before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6
VOCABULARY, HIDDEN = 32000, 512


class Peak:
    """The most memory of this process and its children while the block runs, in bytes."""

    def __init__(self) -> None:
        self.before, self.peak = resident(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, resident())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.peak = max(self.peak, resident())
        self._ended.set()
        self._thread.join()


def resident() -> int:
    """Bytes of anonymous and shared memory of this process and its children."""
    import psutil

    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return 1024 * total


def worker(millions: int, folder: Path, after_only: bool) -> None:
    """One rank: builds the model, saves and loads both forms, writes its figures."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from spot_megatron.hf.config import HFModelConfig
    from spot_megatron.model.config import transformer_config
    from spot_megatron.model.gpt import build_model
    from spot_megatron.parallel.groups import parallel_groups
    from spot_megatron.recipe import Recipe
    from spot_megatron.train.optim import make_trainable
    from spot_megatron.train.optimizer_state import load_optimizer, save_optimizer
    from spot_megatron.weights.checkpoint import load_model, model_state, save_model

    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    shape = HFModelConfig(
        family="qwen3",
        num_layers=round((millions * 1e6 - 2 * VOCABULARY * HIDDEN) / layer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_heads=8,
        num_groups=8,
        head_dim=HIDDEN // 8,
        vocab_size=VOCABULARY,
        max_positions=512,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied=False,
        initializer_range=0.02,
        dtype="bfloat16",
    )
    recipe = Recipe.model_validate({"name": "b", "output": "", "model": {"hf": ""}, "data": {"pairs": ""}})
    with parallel_groups(recipe.parallel, "cpu", 0) as topology:
        chunks = build_model(transformer_config(shape, recipe, "cpu"), shape)
        policy = make_trainable(chunks, recipe)
        policy.zero_grad()
        policy.update(1e-3, float(policy.squared_grad_norm()))
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}

        def megatron_save() -> None:
            state = policy.optimizer.sharded_state_dict(model_state(policy.bare), metadata=metadata)
            dist_checkpointing.save({"optimizer": state}, str(folder / "megatron"))

        def megatron_load() -> None:
            state = policy.optimizer.sharded_state_dict(model_state(policy.bare), is_loading=True, metadata=metadata)
            dist_checkpointing.load({"optimizer": state}, str(folder / "megatron"))

        parts: dict[str, Callable[[], Any]] = {
            "weights, save": lambda: save_model(policy.bare, folder / "model"),
            "weights, load": lambda: load_model(policy.bare, folder / "model"),
            "optimizer, save": lambda: save_optimizer(policy, folder / "blocks"),
            "optimizer, load": lambda: load_optimizer(policy, folder / "blocks", 1),
        }
        if not after_only:
            parts |= {"optimizer before, save": megatron_save, "optimizer before, load": megatron_load}
        found: dict[str, Any] = {"parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters())}
        found["own optimizer state"] = sum(
            12 * p.numel() for part in policy.parts for group in part.optimizer.param_groups for p in group["params"]
        )
        for name, part in parts.items():
            torch.manual_seed(0)
            (folder / "megatron").mkdir(exist_ok=True)
            (folder / "blocks").mkdir(exist_ok=True)
            dist.barrier()
            start = time.perf_counter()
            with Peak() as peak:
                part()
            found[name] = {"bytes": peak.peak - peak.before, "seconds": time.perf_counter() - start}
            dist.barrier()
        (folder / f"rank_{topology.rank}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_memory", description=__doc__)
    parser.add_argument("--parameters", type=int, default=64, help="millions")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--after-only", action="store_true", help="leave out what earlier versions wrote")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.parameters, options.worker, options.after_only)
        return
    with tempfile.TemporaryDirectory() as name:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        own = [__file__, "--parameters", str(options.parameters), "--worker", name]
        own += ["--after-only"] if options.after_only else []
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        subprocess.run([sys.executable, *torchrun, *own], check=True, env=environment)
        ranks = [json.loads((Path(name) / f"rank_{rank}.json").read_text()) for rank in range(options.ranks)]
    print(f"{ranks[0]['parameters'] / 1e6:.0f}M parameters, {options.ranks} data-parallel ranks; MB above what is held")
    print(f"{'own optimizer state':<24}" + "".join(f"{rank['own optimizer state'] / MB:>9.0f}" for rank in ranks))
    for part in [key for key, value in ranks[0].items() if isinstance(value, dict)]:
        figures = "".join(f"{rank[part]['bytes'] / MB:>9.0f}" for rank in ranks)
        print(f"{part:<24}{figures}   {max(rank[part]['seconds'] for rank in ranks):.1f} s")
    result = ROOT / "benchmarks/results" / f"checkpoint_memory_{options.parameters}M_{options.ranks}.json"
    result.write_text(json.dumps(ranks, indent=1) + "\n")


if __name__ == "__main__":
    main()
