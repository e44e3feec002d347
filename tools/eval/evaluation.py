"""An evaluation: sample and grade every benchmark with one model or two, and put the numbers together."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spot_megatron.files import write_text
from spot_megatron.hf.checksums import file_names, sums_of
from tools.eval import statistics
from tools.eval.answers import Answers, Plan
from tools.eval.questions import Items
from tools.pairs.asking import ask_all
from tools.pairs.batch import BatchClient
from tools.pairs.client import ChatClient
from tools.pairs.grade import CORRECT
from tools.pairs.pool import progress_bar
from tools.pairs.sampling import Sampling

RESULT, PAGE = "evaluation.json", "evaluation.html"
_SHAPES_ANSWERS = (".safetensors", ".bin", ".json", ".jinja", ".model")


def weights_digest(folder: Path) -> str:
    """A digest of all files of a model folder that shape its answers."""
    names = [name for name in file_names(folder) if name.endswith(_SHAPES_ANSWERS) and "/" not in name]
    return hashlib.sha256(json.dumps(sums_of(folder, sorted(names)), sort_keys=True).encode()).hexdigest()[:16]


def plan_digest(plan: Plan, sampling: Sampling, models: Sequence[str | None]) -> str:
    """8 digits of all that an evaluation depends on, for the name of its folder."""
    parts = [asdict(sampling), plan.repeats, plan.suffix, list(models), [asked.digest for asked in plan.benchmarks]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def ask_server(
    answers: Answers,
    make_client: Callable[[], ChatClient | BatchClient],
    concurrency: int,
    max_failures: int,
    label: str,
) -> None:
    """Ask a server for every pending sample. Raises RunFailed, Interrupted or EndpointError; answers are on file."""
    pending = answers.pending()
    if not pending:
        return
    total = len(list(answers.plan.samples()))

    async def ask() -> None:
        async with make_client() as client:
            await client.find_context_length()
            bar = progress_bar(label, total, total - len(pending), "sample")
            await ask_all(answers, pending, client, concurrency, max_failures, answers.grader.num_workers, bar)

    asyncio.run(ask())


def result(model: Answers, base: Answers | None) -> dict[str, Any]:
    """What evaluation.json holds: per side the numbers of every skill and benchmark, and the paired differences."""
    found: dict[str, Any] = {
        "base": side(base) if base else None,
        "model": side(model),
        "settings": {key: value for key, value in asdict(model.sampling).items() if key not in ("model", "suffix")},
    }
    if base:
        asked = {name: statistics.compare(base, model, items) for name, items in skills(model.plan).items()}
        found["skill_differences"] = asked
        rows = {items.benchmark.name: statistics.compare(base, model, items) for items in model.plan.benchmarks}
        found["differences"] = rows
        groups = {
            items.benchmark.name: {**(rows[items.benchmark.name] or {}), "group": items.benchmark.group}
            for items in model.plan.benchmarks
        }
        found["average_differences"] = statistics.averages(groups, "difference")
    return found


def side(answers: Answers) -> dict[str, Any]:
    benchmarks = {asked.benchmark.name: statistics.summarize(answers, asked) for asked in answers.plan.benchmarks}
    return {
        "model": answers.sampling.model,
        "seconds": round(answers.usage["seconds"], 3),
        "skills": {name: row for name, items in skills(answers.plan).items() if (row := _skill(answers, items))},
        "benchmarks": benchmarks,
        "averages": statistics.averages(benchmarks),
        "usage": {key: value for key, value in answers.usage.items() if key != "seconds"},
    }


def skills(plan: Plan) -> dict[str, Items]:
    """The skills of each benchmark, each with its questions; a benchmark without skills is one."""
    parts: dict[str, Items] = {}
    for asked in plan.benchmarks:
        names = list(dict.fromkeys(item.skill for item in asked.items.values()))
        for name in names:
            items = {key: item for key, item in asked.items.items() if item.skill == name}
            title = asked.benchmark.title if len(names) == 1 else f"{asked.benchmark.title}: {name}"
            parts[name if asked.benchmark.name == "questions" else title] = replace(asked, items=items)
    return parts


def _skill(answers: Answers, asked: Items) -> dict[str, Any] | None:
    marks = [mark for found in statistics.by_question(answers, asked).values() for mark in found]
    if not marks:
        return None
    correct = sum(mark.verdict == CORRECT for mark in marks)
    row: dict[str, Any] = {"correct": correct, "total": len(marks), "accuracy": correct / len(marks)}
    return row | {name: sum(statistics.SHARES[name](mark) for mark in marks) for name in ("undecided", "cut")}


def write_result(folder: Path, found: dict[str, Any], page: str) -> None:
    write_text(folder / RESULT, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / PAGE, page)


def num_missing(found: dict[str, Any]) -> int:
    """Samples without an answer, of both sides."""
    sides = [found[name] for name in ("base", "model") if found.get(name)]
    return sum(sum(row["missing"].values()) for each in sides for row in each["benchmarks"].values())
