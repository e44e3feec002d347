"""Converts a Hugging Face folder to a Megatron distributed checkpoint and back, and compares two folders.

    python -m tools.convert import --hf DIR --output DIR
    python -m tools.convert export --checkpoint DIR --output DIR
    python -m tools.convert verify --a DIR --b DIR [--logits PROMPTS.jsonl]

Several processes copy the files in small batches, so memory does not grow with the model. Run the same command again to
resume a conversion that was killed. Checkpoints of a run can be exported as well, those of a LoRA run as a PEFT folder.
If the folder to read has SHA256SUMS, it is verified first. `verify` prints each tensor that differs, the largest
difference of each layer and the first layer that differs, and then exits with 1. With --logits it compares the hidden
states and logits of transformers on A with those of Megatron on B, which may be a Megatron checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from pathlib import Path

from spot_megatron.errors import RecipeError, UserError, print_error
from spot_megatron.hf.hub import resolve_model
from tools.convert.adapters import export_adapters, is_of_adapters
from tools.convert.convert import MODEL_FOLDER, export_checkpoint, import_folder

TOLERANCES = {"cpu": 1e-5, "cuda": 2e-3}  # GPUs may multiply fp32 in TF32, which has 10 bits


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Megatron-Core warns of missing GPU packages, PyTorch of deprecated calls in Megatron-Core.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        return _run(options)
    except UserError as error:
        return print_error(error)


def _run(options: argparse.Namespace) -> int:
    if options.command == "verify":
        return _verify(options)
    if options.command == "import":
        source = resolve_model(options.hf)
        if options.overrides:
            check_can_split(source, options.overrides)
        num_tensors = import_folder(source, options.output, options.workers)
    else:
        source = options.checkpoint
        if is_of_adapters(source):
            num_tensors = export_adapters(source, options.output)
        else:
            num_tensors = export_checkpoint(source, options.output, options.shard_gb, options.workers)
    print(f"{source} -> {options.output}: {num_tensors} tensors")
    return 0


def check_can_split(source: Path, overrides: list[str]) -> None:
    """Raises RecipeError if the model cannot be split this way. The checkpoint itself is the same for every split."""
    from spot_megatron.hf.config import read_hf_config
    from spot_megatron.parallel.split import Split, check_split
    from spot_megatron.recipe import parallel_sizes

    parallel = parallel_sizes(overrides)
    ranks = math.lcm(parallel.model_ranks, parallel.expert * parallel.expert_tensor * parallel.pipeline)
    check_split(read_hf_config(source), Split(parallel, ranks))


def _verify(options: argparse.Namespace) -> int:
    if not options.logits and (options.device or options.tolerance is not None):
        raise RecipeError("--device and --tolerance require --logits PROMPTS.jsonl")
    device = options.device or "cpu"
    tolerance = TOLERANCES[device] if options.tolerance is None else options.tolerance
    code = 0
    if not (options.logits and (options.b / MODEL_FOLDER).is_dir()):
        from tools.convert.compare import differences, report  # imports PyTorch; a conversion does not

        found = differences(options.a, options.b)
        same = f"{options.a} and {options.b} hold the same tensors, bit for bit"
        print("\n".join(report(found)) if found else same)
        code = 1 if found else 0
    if options.logits:
        from tools.convert.compare_logits import compare_logits

        errors = compare_logits(options.a, options.b, options.logits, device)
        for stage in errors:
            print(f"{stage.name}: largest difference {stage.error:.2e} of {stage.scale:.3g}")
        wrong = [stage.name for stage in errors if not stage.relative <= tolerance]
        print(f"first difference: {wrong[0]}" if wrong else f"transformers and Megatron agree to {tolerance:g}")
        code = 1 if wrong else code
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face folder -> Megatron distributed checkpoint")
    importing.add_argument("--hf", required=True, help="folder, or hub id")
    importing.add_argument("--output", type=Path, required=True)
    importing.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="parallel.key=value",
        dest="overrides",
        help="check that the model can be split this way; the checkpoint can be loaded with any split",
    )
    exporting = commands.add_parser("export", help="Megatron checkpoint (of import or of a run) -> Hugging Face folder")
    exporting.add_argument("--checkpoint", type=Path, required=True)
    exporting.add_argument("--output", type=Path, required=True)
    exporting.add_argument(
        "--shard-gb", type=float, default=5.0, help="maximum size of a file in 10^9 bytes (default: 5)"
    )
    for command in (importing, exporting):
        workers = min(4, os.cpu_count() or 1)
        command.add_argument("--workers", type=int, default=workers, help=f"number of processes (default: {workers})")
    verifying = commands.add_parser("verify", help="compare the tensors of two Hugging Face folders")
    verifying.add_argument("--a", type=Path, required=True)
    verifying.add_argument("--b", type=Path, required=True)
    verifying.add_argument("--logits", type=Path, help="JSONL file of prompts; also compares hidden states and logits")
    verifying.add_argument("--device", choices=["cpu", "cuda"], help="with --logits: device of Megatron (default: cpu)")
    verifying.add_argument(
        "--tolerance",
        type=float,
        help="with --logits: relative to the largest magnitude "
        f"(default: {TOLERANCES['cpu']:g}; cuda: {TOLERANCES['cuda']:g})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
