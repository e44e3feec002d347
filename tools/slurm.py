"""`make slurm`: writes Slurm scripts that run a recipe on many nodes, and submits them on request.

    <output>/slurm/job.sh    for sbatch: passes the warning before the time limit on, queues again after exit code 75
    <output>/slurm/node.sh   what each node runs: the interconnect's environment, then `make train`'s own command
    <output>/slurm/job.log   the console of the job and of rank 0; each process has a log in <output>/logs/node_*/

The folder of the repository and the run folder must be on a file system that all nodes share.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from spot_megatron.errors import RecipeError, UserError, positive_int, print_error
from spot_megatron.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent

# Names, meanings and defaults: NVIDIA's NCCL user guide, "Environment Variables". NCCL finds the cards, RoCE's GID
# (since 2.21) and the topology by itself; a site's own NCCL_IB_HCA or NCCL_IB_TC comes from the shell that submits.
INTERCONNECTS = {
    "rdma": """\
# InfiniBand and RoCE: a flapping link on one of many cards must not end the run.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}  # 4.096 us * 2^22 = 17 s before a retry (default 20: 4 s), 7 retries""",
    "ethernet": """\
# TCP sockets only; one thread does not fill a fast card (the guide: for 100 Gb/s, threads x sockets up to 64).
export NCCL_IB_DISABLE=1
export NCCL_SOCKET_NTHREADS=${NCCL_SOCKET_NTHREADS:-4} NCCL_NSOCKS_PERTHREAD=${NCCL_NSOCKS_PERTHREAD:-4}""",
}

JOB = """\
#!/bin/bash
# Written by tools/slurm.py; `sbatch {job}` submits it. Pass other options by `make slurm SBATCH="--option ..."`.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --signal=B:USR1@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/job.log
{directives}
set -u
cd {root} || exit 1
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
echo "job $SLURM_JOB_ID, start $((${{SLURM_RESTART_COUNT:-0}} + 1)), $(date): $SLURM_JOB_NODELIST"

# {grace} s before the time limit, or on `scancel --batch --signal=USR1 JOB`: save after the step, and stop.
trap 'echo "$(date): saving"; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=0 --wait=0{srun} bash {folder}/node.sh &
until wait $!; code=$?; [ "$code" -ne 138 ]; do :; done  # 138: the signal came, and srun is still there
echo "job $SLURM_JOB_ID ended with exit code $code, $(date)"
if [ "$code" -eq 75 ]; then  # stopped after saving
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

NODE = """\
#!/bin/bash
# Written by tools/slurm.py. What every node runs; without Slurm set NODE_RANK, MASTER_ADDR and MASTER_PORT yourself.
cd {root} || exit 1
export NODE_RANK=${{NODE_RANK:-${{SLURM_PROCID:-0}}}}
{environment}
{interface}trap '' USR1  # for the training processes, which handle it; torchrun's agent inherits that it is ignored
exec {command}
"""


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        job = write(recipe, options)
    except UserError as error:
        return print_error(error)
    print(f"wrote {job} and node.sh beside it")
    print("+ sbatch " + shlex.quote(str(job)), flush=True)
    if not options.submit:
        print("not submitted; add SUBMIT=1 (--submit), or run the line above")
        return 0
    if shutil.which("sbatch") is None:
        print(
            "not submitted: sbatch is not installed on this machine; run the line above on one that has Slurm",
            file=sys.stderr,
        )
        return RecipeError.exit_code
    return subprocess.run(["sbatch", str(job)], check=False).returncode


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.slurm", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--nodes", type=positive_int, required=True)
    parser.add_argument("--gpus", type=positive_int, default=8, help="GPUs, and processes, on a node; default 8")
    parser.add_argument("--time", default="24:00:00", help="time limit of one start; the job requeues itself")
    parser.add_argument(
        "--grace", type=positive_int, default=120, help="seconds before the time limit at which to save; default 120"
    )
    parser.add_argument("--interconnect", choices=sorted(INTERCONNECTS), default="rdma")
    parser.add_argument("--interface", help="network interface of the rendezvous, for instance eth0")
    parser.add_argument("--image", help="container image for the pyxis plug-in (srun --container-image)")
    parser.add_argument(
        "--sbatch", default="", help='more sbatch options, for instance --sbatch="--partition=h800 --account=me"'
    )
    parser.add_argument("--submit", action="store_true")
    return parser


def write(recipe: Recipe, options: argparse.Namespace) -> Path:
    """Writes job.sh and node.sh; returns the former.

    Raises:
        RecipeError: the nodes do not fit the recipe's parallel sizes, or every stop would restart the job from step 0.
    """
    world = options.nodes * options.gpus
    if world % recipe.parallel.model_ranks:
        raise RecipeError(
            f"{options.nodes} nodes of {options.gpus} GPUs do not hold a whole number of models of "
            f"{recipe.parallel.model_ranks} ranks (parallel.tensor x pipeline x context); change NODES or GPUS"
        )
    if recipe.checkpoint.resume == "never":
        raise RecipeError(
            "checkpoint.resume=never would restart the training from step 0 when Slurm restarts the job; use auto"
        )
    folder = Path(recipe.output).absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    q = shlex.quote
    directives = [] if recipe.device == "cpu" else [f"--gpus-per-node={options.gpus}"]
    directives += shlex.split(options.sbatch)
    train = ["-m", "tools.launch", options.recipe, "--nodes", str(options.nodes), "--processes", str(options.gpus)]
    train += ["--set", *options.overrides] if options.overrides else []
    mounts = f"{ROOT}:{ROOT},{folder.parent}:{folder.parent}"
    container = [f"--container-image={options.image}", f"--container-mounts={mounts}"]
    values = {
        "job": folder / "job.sh",
        "folder": q(str(folder)),
        "root": q(str(ROOT)),
        "name": recipe.name,
        "nodes": options.nodes,
        "time": options.time,
        "grace": options.grace,
        "directives": "\n".join(f"#SBATCH {option}" for option in directives),
        "srun": " " + shlex.join(container) if options.image else "",
        "environment": INTERCONNECTS[options.interconnect],
        "interface": _interface(options.interface),
        "command": shlex.join(["python3" if options.image else sys.executable, *train]),
    }
    (folder / "job.sh").write_text(JOB.format(**values), encoding="utf-8")
    (folder / "node.sh").write_text(NODE.format(**values), encoding="utf-8")
    return folder / "job.sh"


def _interface(name: str | None) -> str:
    if name is None:
        return ""
    return f"export NCCL_SOCKET_IFNAME={shlex.quote(name)} GLOO_SOCKET_IFNAME={shlex.quote(name)}\n"


if __name__ == "__main__":
    sys.exit(main())
