"""Result files of lm-eval and lighteval, for the same page."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError

# Names of tasks, as far as they name one of our benchmarks: lm-eval's and lighteval's, lower case, without separators.
_TASKS = {
    "aime24": ("aime24", "aime2024"),
    "aime25": ("aime25", "aime2025"),
    "amc23": ("amc23", "amc2023"),
    "math500": ("math500", "hendrycksmath500"),
    "minerva": ("minerva", "minervamath"),
    "olympiadbench": ("olympiadbench", "olympiadbenchoetomathsencomp"),
    "gpqa_diamond": ("gpqadiamond", "gpqadiamondcotzeroshot", "gpqadiamondzeroshot", "gpqadiamondgenerative"),
    "ifeval": ("ifeval", "extendedifeval"),
}
_NAME = {task: name for name, tasks in _TASKS.items() for task in tasks}
# The metrics that are this project's accuracy, the first that a task has; others are not comparable.
_METRICS = (
    "prompt_level_strict_acc",
    "math_verify",
    "exact_match",
    "extractive_match",
    "pass@k:k=1",
    "avg@n",
    "acc",
)


@dataclass(frozen=True)
class OtherResults:
    """`scores`: benchmark -> (accuracy, its standard error or None), as fractions."""

    label: str
    scores: dict[str, tuple[float, float | None]]


def read_results(path: Path) -> list[OtherResults]:
    """The benchmarks of a results file that this project knows.

    Raises PairError for a file that neither program wrote, or that holds none of them.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PairError(
            f"--results {path}: cannot be read ({error}). Give results_*.json of lm-eval or lighteval."
        ) from None
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not all(isinstance(row, dict) for row in results.values()):
        raise PairError(f"--results {path}: has no `results` by task. Give results_*.json of lm-eval or lighteval.")
    scores = {}
    for task, row in results.items():
        name, score = _NAME.get(_plain(task)), _score(row)
        if name is not None and score is not None:
            scores[name] = score
    if not scores:
        raise PairError(f"--results {path}: none of its tasks is known here ({', '.join(results) or 'it has none'}).")
    return [OtherResults(_label(content), scores)]


def _plain(task: str) -> str:
    """lighteval writes suite|task|shots; subsets follow a colon."""
    parts = task.split("|")
    name = parts[1] if len(parts) > 2 else parts[0]
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _score(row: dict[str, Any]) -> tuple[float, float | None] | None:
    """lm-eval's keys are "metric,filter" and "metric_stderr,filter", lighteval's "metric" and "metric_stderr"."""
    for metric in _METRICS:
        for key, value in row.items():
            name, comma, kind = key.partition(",")
            if name == metric and isinstance(value, (int, float)) and not isinstance(value, bool):
                error = row.get(f"{metric}_stderr{comma}{kind}")
                return float(value), float(error) if isinstance(error, (int, float)) else None
    return None


def _label(content: dict[str, Any]) -> str:
    general = content.get("config_general")
    if isinstance(general, dict):
        config = general.get("model_config")
        name = general.get("model_name") or (config.get("model_name") if isinstance(config, dict) else None)
        return f"{name or 'model'} (lighteval)"
    arguments = content.get("config", {}).get("model_args") if isinstance(content.get("config"), dict) else None
    if isinstance(arguments, dict):
        arguments = arguments.get("model") or arguments.get("pretrained")
    return f"{content.get('model_name') or arguments or 'model'} (lm-eval)"
