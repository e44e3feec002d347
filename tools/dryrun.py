"""`make dryrun`: builds every rank of a job without weights and GPUs, and checks whether the recipe fits.

    python -m tools.dryrun RECIPE --gpus N [--gpu h800] [--set key=value ...] [--pairs FILE ...]
        [--assume key=number ...] [--json]

Shapes, weight map and parameter counts are checked on Megatron-Core's own model; memory and packs are the plan's.
Pairs come from --pairs, else from the recipe's file if it is there, else they are assumed (change that with --assume).
Exit code 2 if something does not fit; the message names the recipe's key to change.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from spot_megatron.data.costs import cost_model
from spot_megatron.data.template import check_vocabulary
from spot_megatron.errors import RecipeError, UserError, print_error
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.plan.estimate import Estimate, Planner, make_planner
from spot_megatron.plan.hardware import GIB, find_gpu
from spot_megatron.plan.memory import checkpoint_bytes, stage_memory
from spot_megatron.plan.search import cheapest_fits
from spot_megatron.plan.trained import num_trained
from spot_megatron.plan.workload import POSITIONS, SCORED
from spot_megatron.quiet import hide_known_warnings
from spot_megatron.recipe import Recipe, load_recipe

SIZES = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
STAGE_KEYS = ("stage", "layers", "ranks", "parameters")  # of a stage's facts; the others are memory
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
EXPORT_BYTES = {"float32": 4}  # a parameter, by the dtype of config.json; else 2
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.dryrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="name of a recipe in recipes/, or a YAML file")
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the job")
    parser.add_argument("--gpu", default="h800", help="GPU type (default h800)")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--pairs", nargs="+", type=Path, default=[], help="pair files; default: the recipe's, if there")
    parser.add_argument(
        "--assume", nargs="+", default=[], metavar="key=number", help="pairs, prompt, response (tokens), cv, shared"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead; sizes in bytes")
    options = parser.parse_args(arguments)
    if options.gpus < 1:
        parser.error("--gpus must be at least 1")
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        planner = make_planner(recipe, find_gpu(options.gpu), options.pairs, options.assume)
        estimate = planner.estimate(recipe, options.gpus)
        facts = dry_run_facts(recipe, estimate)
        print(json.dumps(facts, indent=1) if options.json else table(facts))
        if not estimate.fits:
            raise does_not_fit(planner, recipe, estimate)
    except UserError as error:
        return print_error(error)
    return 0


def dry_run_facts(recipe: Recipe, estimate: Estimate) -> dict[str, Any]:
    """Builds every rank. Returns the values of the table; sizes are in bytes."""
    hide_known_warnings()
    from spot_megatron.plan.dryrun import dry_run

    start = time.perf_counter()
    inputs, load = estimate.inputs, estimate.load
    hf = inputs.model
    check_vocabulary(estimate.workload.pairs, hf.vocab_size, f"vocab_size of {recipe.model.hf}")
    run = dry_run(recipe, hf, inputs.split.num_gpus)
    stages = []
    for stage in range(recipe.parallel.pipeline):
        ranks = run.of_stage(stage)
        memory = stage_memory(inputs, recipe.data.tokens_per_microbatch, load.num_microbatches, stage)
        stages.append(
            {
                "stage": stage,
                "layers": [f"{part.start}-{part.stop - 1}" for part in ranks[0].layers],
                "ranks": sum(rank.num_ranks for rank in ranks),
                "parameters": max(rank.num_dense + rank.num_expert + rank.num_adapter for rank in ranks),
                **memory.parts(),
                "total": memory.total,
            }
        )
    return {
        "recipe": recipe.name,
        "model": recipe.model.hf,
        "num_gpus": inputs.split.num_gpus,
        "gpu": inputs.gpu.name,
        "parallel": recipe.parallel.model_dump(),
        "num_parameters": run.num_parameters,
        "num_tensors": run.num_tensors,
        "compared": run.compared,
        "built_ranks": len(run.ranks),
        "stages": stages,
        "usable": inputs.gpu.usable_bytes,
        "fits": estimate.fits,
        "pairs": len(estimate.workload.pairs),
        "pairs_source": estimate.workload.source,
        "dropped": estimate.workload.dropped,
        "packs": packs(recipe, estimate, hf),
        "checkpoint": checkpoint_bytes(num_trained(hf, recipe.lora), recipe.precision),
        "checkpoints_kept": recipe.checkpoint.keep,
        "export": run.num_parameters * EXPORT_BYTES.get(hf.dtype, 2) if recipe.export.hf else 0,
        "warnings": estimate.warnings,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT,
    }


def packs(recipe: Recipe, estimate: Estimate, hf: HFModelConfig) -> dict[str, Any]:
    """The packs of the sampled steps, as the training's own sampler makes them."""
    load, steps = estimate.load, estimate.load.steps
    model = cost_model(hf)
    loads = [(step @ [1, model.product, model.scored]).sum(axis=1) for step in steps]  # POSITIONS, PRODUCTS, SCORED
    scored = np.concatenate([step[..., SCORED].ravel() for step in steps])
    return {
        "steps": load.num_steps,
        "pairs_a_step": recipe.train.batch_pairs,
        "data_ranks": estimate.inputs.split.data,
        "most_microbatches": load.num_microbatches,
        "largest_pair": load.largest_pair,
        "largest_pack": int(max(step[..., POSITIONS].max() for step in steps)),
        "budget": recipe.data.tokens_per_microbatch,
        "padding": load.padding,
        "empty": float((scored == 0).mean()),
        "slowest_rank": float(np.mean([ranks.max() / ranks.mean() for ranks in loads])),
    }


def table(facts: dict[str, Any]) -> str:
    """The facts as text."""
    pack, num_built = facts["packs"], facts["built_ranks"]
    sizes = [f"{key} {facts['parallel'][key]}" for key in SIZES if (facts["parallel"][key] or 1) > 1]
    left_out = ", ".join(f"{count} {reason}" for reason, count in facts["dropped"].items())
    rows = {
        "model": f"{facts['model']}, {facts['num_parameters']:,} parameters in {facts['num_tensors']:,} tensors, "
        f"{facts['compared']}",
        "ranks": f"{num_built} built, {facts['num_gpus'] - num_built} are copies of these "
        f"({facts['seconds']:.1f} s, {facts['peak_memory'] / GIB:.1f} GiB here)",
        "weights": "every parameter has the shape that is loaded, every tensor is held once over the different ranks",
        "pairs": f"{facts['pairs']}, {facts['pairs_source']}" + (f"; left out: {left_out}" if left_out else ""),
        "steps": f"{pack['steps']} of {pack['pairs_a_step']} pairs over {pack['data_ranks']} data-parallel ranks, "
        f"the slowest with {pack['slowest_rank']:.2f} x the mean load",
        "packs": f"at most {pack['most_microbatches']} a rank and step, of at most {pack['largest_pack']} of "
        f"{pack['budget']} positions; longest pair {pack['largest_pair']}; "
        f"{pack['padding']:.1%} padding, {pack['empty']:.1%} of packs empty",
        "disk": f"{facts['checkpoints_kept']} checkpoints of {_size(facts['checkpoint'])}"
        + (f", export {_size(facts['export'])}" if facts["export"] else ""),
        **{f"warning {number}": text for number, text in enumerate(facts["warnings"], start=1)},
    }
    lines = [
        f"{facts['recipe']} on {facts['num_gpus']} {facts['gpu'].upper()}: {', '.join(sizes) or 'data parallel'}",
        "",
    ]
    lines += [f"{name:<10} {text}" for name, text in rows.items()]
    lines += ["", *_stage_lines(facts["stages"]), ""]
    fullest = max(stage["total"] for stage in facts["stages"])
    verdict = "fits" if facts["fits"] else "does not fit"
    lines += [f"{verdict}: {fullest / GIB:.1f} GiB on the fullest rank, {facts['usable'] / GIB:.1f} usable"]
    return "\n".join(lines)


def _stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    """One line per pipeline stage: contents of one of its ranks, memory in GiB."""
    parts = [key for key in stages[0] if key not in STAGE_KEYS]
    width = max(8, *(len(", ".join(stage["layers"])) + 2 for stage in stages))
    lines = [f"stage{'layers':>{width}}   ranks  parameters" + "".join(f"{part:>{len(part) + 2}}" for part in parts)]
    for stage in stages:
        sizes = "".join(f"{stage[part] / GIB:>{len(part) + 2}.1f}" for part in parts)
        layers = ", ".join(stage["layers"])
        lines.append(
            f"{stage['stage']:>5}{layers:>{width}}{stage['ranks']:>8}{stage['parameters'] / 1e6:>11,.1f}M{sizes}"
        )
    return lines


def _size(num_bytes: float) -> str:
    unit, scale = next((unit, scale) for unit, scale in UNITS.items() if num_bytes >= scale or unit == "MB")
    return f"{num_bytes / scale:.1f} {unit}"


def does_not_fit(planner: Planner, recipe: Recipe, estimate: Estimate) -> RecipeError:
    """Names the keys to change."""
    need, have = estimate.memory.total / GIB, estimate.inputs.gpu.usable_bytes / GIB
    num_gpus = estimate.inputs.split.num_gpus
    ways = [
        f"{'' if option.num_gpus == num_gpus else f'--gpus {option.num_gpus} '}--set {option.flags} "
        f"({option.estimate.memory.total / GIB:.1f} GiB)"
        for option in cheapest_fits(planner, recipe, num_gpus)
    ]
    remedy = "; or ".join(ways) or "no configuration that was tried fits; choose a GPU with more memory"
    return RecipeError(
        f"{recipe.name} needs {need:.1f} GiB on {estimate.inputs.gpu.name.upper()}, of which {have:.1f} can be used: "
        f"{remedy}"
    )


if __name__ == "__main__":
    sys.exit(main())
