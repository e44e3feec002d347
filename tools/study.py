"""`make study`: trains the tiny model under each of the paper's objectives and prints one table.

Every run is an ordinary `make train` of a recipe qwen3_tiny_*. Runs that are complete are not repeated; a complete run
of another recipe in the same folder is an error. The table shows accuracy on held-out questions of every skill, and the
mean rewards of the last epoch in nats (beta taken out).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spot_megatron.errors import RecipeError, UserError, print_error
from spot_megatron.recipe import Recipe, load_recipe
from spot_megatron.report import write_report
from tools import launch

RECIPES = ("spot", "spot_bco", "dpo", "reward_sft", "sft", "dft")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=[f"qwen3_tiny_{name}" for name in RECIPES])
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="key=value", dest="overrides")
    options = parser.parse_args(arguments)
    overrides = ["--set", *options.overrides] if options.overrides else []
    try:
        recipes = [load_recipe(name, options.overrides) for name in options.recipes]
        check_comparable(recipes)
        missing = [name for name, recipe in zip(options.recipes, recipes, strict=True) if not is_complete(recipe)]
        for name in missing:
            if code := launch.main([name, *overrides]):
                return code
        print("\n" + table(recipes))
        first, *others = (Path(recipe.output) for recipe in recipes)
        print(f"report: {write_report(first, others)}")
    except UserError as error:
        return print_error(error)
    return 0


def check_comparable(recipes: Sequence[Recipe]) -> None:
    """Checks that all runs have the same base and questions, and each its own folder.

    Raises:
        RecipeError: naming the recipes and the key.
    """
    first, names, outputs = recipes[0], [recipe.name for recipe in recipes], [recipe.output for recipe in recipes]
    for recipe in recipes:
        if recipe.evaluation.questions is None:
            raise RecipeError(f"{recipe.name}: a study compares accuracies; set evaluation.questions to a file")
        for key in ("model", "evaluation"):
            if getattr(recipe, key) != getattr(first, key):
                raise RecipeError(
                    f"{recipe.name} and {first.name} differ in {key}; a study compares runs of one model on "
                    "the same questions"
                )
        for what, values in (("name", names), ("output", outputs)):
            if values.count(getattr(recipe, what)) > 1:
                raise RecipeError(
                    f"{recipe.name}: two recipes have the {what} {getattr(recipe, what)}; give each its own, or remove "
                    f"{what} from --set"
                )


def is_complete(recipe: Recipe) -> bool:
    """Whether the run folder holds this recipe's result, newer than its last start.

    Raises:
        RecipeError: it holds the result of another recipe, which must not be shown as this one's.
    """
    run = Path(recipe.output)
    if not (run / "evaluation.json").exists() or not (run / "recipe.yaml").exists():
        return False
    asked, done = (_by_dotted_key(each.model_dump()) for each in (recipe, load_recipe(run / "recipe.yaml")))
    changed = [f"its {key} is {done.get(key)}, not {asked.get(key)}" for key in asked if asked[key] != done.get(key)]
    if changed:
        raise RecipeError(
            f"{run} holds the result of another recipe: {'; '.join(changed)}. Move the folder away to train again, or "
            "undo the change"
        )
    return (run / "evaluation.json").stat().st_mtime >= (run / "recipe.yaml").stat().st_mtime


def table(recipes: list[Recipe]) -> str:
    """One line a run, in percent and nats, after the base's line."""
    results = {recipe.name: json.loads((Path(recipe.output) / "evaluation.json").read_text()) for recipe in recipes}
    base = next(iter(results.values()))["base"]["skills"]
    lines = ["".join(["run".ljust(26), *(skill.rjust(10) for skill in base), "r+".rjust(9), "r-".rjust(9)])]
    lines.append(_line("base", base, None))
    for recipe in recipes:
        lines.append(_line(recipe.name, results[recipe.name]["model"]["skills"], recipe))
    return "\n".join(lines)


def _by_dotted_key(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All values but `output`: a run that was moved is the same run."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _by_dotted_key(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    flat.pop("output", None)
    return flat


def _line(name: str, skills: dict[str, dict[str, float]], recipe: Recipe | None) -> str:
    cells = [f"{100 * skill['accuracy']:10.1f}" for skill in skills.values()]
    if recipe:
        rows = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
        last = rows[-len(rows) // recipe.train.epochs :]
        for key in ("reward_chosen", "reward_rejected"):
            cells.append(f"{sum(row[key] for row in last) / len(last) / recipe.objective.beta:+9.1f}")
    return name.ljust(26) + "".join(cells)


if __name__ == "__main__":
    sys.exit(main())
