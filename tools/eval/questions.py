"""The questions of a benchmark's file, as it is published. Needs no torch: a launcher checks them before training."""

import csv
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import Row, file_sha256, read_rows
from tools.eval import connect4, ifeval
from tools.eval.benchmarks import BENCHMARKS, Benchmark
from tools.pairs.questions import Question, parse_question

LETTERS = "ABCD"
ROW_GRADERS = ("tiny",)  # what a row's `grader` may name
_GPQA = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True)
class Item:
    """A question, the skill that it counts under, and what grades its responses; `key` is what the grader needs beside
    the known answer."""

    question: Question
    skill: str = "all"
    grader: str = "math"
    key: Any = None


@dataclass
class Items:
    """A benchmark's questions in the file's order. `digest` is the SHA-256 of the file."""

    benchmark: Benchmark
    path: Path
    digest: str
    items: dict[str, Item] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


def read_questions(path: Path, benchmark: Benchmark = BENCHMARKS["questions"], seed: int = 0) -> Items:
    """The benchmark's file: JSONL (packed or not), Parquet or CSV. `seed` shuffles the choices of GPQA.

    A question that the file repeats is asked once. Raises PairError naming file and line when the file is missing or
    empty, or a line is not a row of this benchmark.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else read_rows(path)
    found = Items(benchmark, path, "")
    for number, row in rows:
        where = f"{path}:{number}"
        reason = _left_out(row) if benchmark.name == "olympiadbench" else None
        if reason:
            found.dropped[reason] += 1
            continue
        item = _parse(row, where, benchmark, seed)
        before = found.items.get(item.question.id)
        if before is None:
            found.items[item.question.id] = item
        elif before == item:
            found.dropped["duplicate"] += 1
        else:
            raise PairError(
                f"{where}: id {item.question.id!r} already belongs to another question or answer. "
                "Give every question an id of its own."
            )
    if not found.items:
        raise PairError(f"{path}: holds no question of {benchmark.title}. Its rows are those of {benchmark.source}.")
    return replace(found, digest=file_sha256(path))


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PairError(f"{path}: cannot be read ({error}); check the path, or write the file again") from None


def _parse(row: Row, where: str, benchmark: Benchmark, seed: int) -> Item:
    if benchmark.grader == "letter":
        return _choices(row, where, seed)
    if benchmark.grader == "ifeval":
        return _instructions(row, where)
    if benchmark.grader == "connect4":
        board = connect4.read_board(row, where)
        text = connect4.prompt(board)
        return Item(Question(board.id, text, connect4.answer(board)), "all", "connect4", board)
    return _known_answer(row, where)


def _known_answer(row: Row, where: str) -> Item:
    """A row as elicitation reads it. OlympiadBench's `context` is the beginning of its question."""
    question = parse_question(row, where)
    if isinstance(row.get("context"), str) and row["context"].strip():
        question = replace(question, question=f"{row['context'].strip()}\n\n{question.question}")
    skill, grader = (_name(row, key, where) for key in ("skill", "grader"))
    if grader is not None and grader not in ROW_GRADERS:
        raise PairError(f"{where}: `grader` is {grader!r}; known are {', '.join(ROW_GRADERS)}, or leave it out.")
    return Item(question, skill or "all", grader or "math")


def _left_out(row: Row) -> str | None:
    """Why a row of OlympiadBench is not part of its English questions in text."""
    if any(value for key, value in row.items() if key.startswith("image_")) or row.get("modality") == "Multimodal":
        return "image"
    return "not_english" if str(row.get("language", "English")).lower() not in ("english", "en") else None


def _choices(row: Row, where: str, seed: int) -> Item:
    """GPQA: the four answers in an order drawn from the seed and the question; the letter of the right one is known."""
    missing = [name for name in _GPQA if not isinstance(row.get(name), str) or not row[name].strip()]
    if missing:
        raise PairError(f"{where}: {missing[0]!r} is missing. GPQA's rows have {', '.join(_GPQA)}.")
    text, *answers = (row[name].strip() for name in _GPQA)
    identifier = str(row.get("Record ID") or f"q-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    shuffled = answers.copy()
    random.Random(f"{seed}/{identifier}").shuffle(shuffled)
    listed = "\n".join(f"{letter}) {answer}" for letter, answer in zip(LETTERS, shuffled, strict=True))
    skill = str(row.get("High-level domain") or "all")
    question = Question(identifier, f"{text}\n\n{listed}", LETTERS[shuffled.index(answers[0])])
    return Item(question, skill, "letter")


def _instructions(row: Row, where: str) -> Item:
    prompt, names = row.get("prompt"), row.get("instruction_id_list")
    arguments = row.get("kwargs", [{}] * len(names) if isinstance(names, list) else None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise PairError(f"{where}: `prompt` is missing. IFEval's rows have key, prompt, instruction_id_list, kwargs.")
    if not isinstance(names, list) or not names or not isinstance(arguments, list) or len(arguments) != len(names):
        raise PairError(f"{where}: `instruction_id_list` and `kwargs` must be lists of the same length.")
    rules = []
    for name, given in zip(names, arguments, strict=True):
        given = {key: value for key, value in (given or {}).items() if value is not None}
        problem = ifeval.problem(name, given)
        if problem:
            raise PairError(f"{where}: {problem}")
        rules.append(ifeval.Rule(name, json.dumps(given, sort_keys=True)))
    identifier = str(row.get("key") or f"q-{hashlib.sha256(prompt.encode()).hexdigest()[:16]}")
    return Item(Question(identifier, prompt, ", ".join(names)), "all", "ifeval", tuple(rules))


def _name(row: Row, key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise PairError(f"{where}: `{key}` is a {type(value).__name__}; write one name, or leave it out.")
    return value
