"""One model's answers to every question of an evaluation: a journal, read back whenever the same command runs again."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import Row
from tools.eval.grade import grade_item
from tools.eval.questions import Item, Items
from tools.pairs.asking import answer_fields, verdict_fields
from tools.pairs.client import Completion
from tools.pairs.conversation import prompt_hash
from tools.pairs.grade import CORRECT, GRADER_VERSION, Grader, Verdict
from tools.pairs.journal import Journal, check_fields, read_records
from tools.pairs.sampling import Key, Sampling
from tools.pairs.unusable import EMPTY_CONTENT, UNUSABLE, unusable_reply

JOURNAL = "responses.jsonl"
_KEY_FIELDS = {"benchmark": str, "id": str, "sample": int, "prompt_hash": str}
_ANSWER_FIELDS = {**_KEY_FIELDS, "response": str, "finish_reason": str, "verdict": str, "reason": str}
_FAILURE_FIELDS = {**_KEY_FIELDS, "failed": str, "permanent": bool}


@dataclass(frozen=True)
class Plan:
    """What is asked: benchmarks, samples a question, and the closing instruction (None: each benchmark's own)."""

    benchmarks: tuple[Items, ...]
    repeats: dict[str, int]
    suffix: str | None = None

    def samples(self) -> Iterator[Key]:
        """Every ("benchmark/question id", sample), sample by sample."""
        for sample in range(max(self.repeats.values())):
            for asked in self.benchmarks:
                if sample < self.repeats[asked.benchmark.name]:
                    yield from ((f"{asked.benchmark.name}/{name}", sample) for name in asked.items)

    def find(self, key: Key) -> tuple[Items, Item]:
        benchmark, _, name = key[0].partition("/")
        asked = next(asked for asked in self.benchmarks if asked.benchmark.name == benchmark)
        return asked, asked.items[name]

    def suffix_of(self, asked: Items, item: Item) -> str:
        """A grader of a row's own knows no box, so its questions are asked as they are."""
        if self.suffix is not None:
            return self.suffix
        return asked.benchmark.suffix if item.grader == asked.benchmark.grader else ""


@dataclass(frozen=True, slots=True)
class Mark:
    """What became of one sample; `missing` says why there is no answer, else it is empty."""

    verdict: str = ""
    extracted: str | None = None
    reason: str = ""
    finish: str = ""
    tokens: int = 0
    missing: str = ""

    @property
    def right(self) -> bool:
        return self.verdict == CORRECT


class Answers:
    """The journal of one model in `folder`, and the mark of every planned sample. Implements Questionnaire.

    Args:
        weights: what identifies a local model's weights; the journal of other weights is refused.
        read_only: read a finished evaluation's journal; a planned sample that it does not hold is an error.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        sampling: Sampling,
        grader: Grader,
        weights: str | None = None,
        read_only: bool = False,
    ) -> None:
        self.folder, self.plan, self.sampling, self.grader = folder, plan, sampling, grader
        self.path = folder / JOURNAL
        self.questions = {key: plan.find((key, 0)) for key, sample in plan.samples() if sample == 0}
        self.prompts = {key: self._messages(*found) for key, found in self.questions.items()}
        self.hashes = {
            key: prompt_hash(self.prompts[key], item.question.tools) for key, (_, item) in self.questions.items()
        }
        self.marks: dict[Key, Mark] = {}
        self.offsets: dict[Key, int] = {}
        self.refused: dict[Key, str] = {}
        self.num_right = self.num_answered = 0
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0, "http_calls": 0, "seconds": 0.0}
        self._planned = set(plan.samples())
        self._journal = None if read_only else Journal(self.path, self.settings(weights), _is_answer)
        for offset, record in read_records(self.path) if self.path.exists() else ():
            self._note(offset, record)
        if read_only:
            self._check_complete()

    def settings(self, weights: str | None) -> dict[str, Any]:
        """What the answers depend on besides the prompts, whose hashes are in the records."""
        return {**{key: value for key, value in asdict(self.sampling).items() if key != "suffix"}, "weights": weights}

    def _messages(self, asked: Items, item: Item) -> list[Row]:
        return replace(self.sampling, suffix=self.plan.suffix_of(asked, item)).messages(item.question)

    def pending(self) -> list[Key]:
        return [key for key in self.plan.samples() if key not in self.marks or self.marks[key].missing]

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def response(self, key: Key) -> str:
        """The text of an answered sample."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[key])
            return str(json.loads(file.readline())["response"])

    # Questionnaire

    def request(self, key: Key) -> tuple[dict[str, Any], Row]:
        asked, item = self.questions[key[0]]
        sampling = replace(self.sampling, suffix=self.plan.suffix_of(asked, item))
        return sampling.request(item.question, key[1]), self.first_fields(key)

    def first_fields(self, key: Key) -> Row:
        asked, item = self.questions[key[0]]
        question = item.question
        return {
            "benchmark": asked.benchmark.name,
            "id": question.id,
            "sample": key[1],
            "question": question.question,
            "answer": question.answer,
            "prompt_hash": self.hashes[key[0]],
        }

    def unfit(self, completion: Completion) -> Verdict | None:
        """As elicitation; but a model that thought until its limit, or said nothing, has given no answer."""
        found = unusable_reply(completion, self.sampling.thinking)
        if found is not None and found.reason == EMPTY_CONTENT:
            return None if self.sampling.thinking != "off" or not completion.has_thinking else found
        return found

    def grade(self, key: Key, completion: Completion, at_once: bool) -> Verdict | None:
        item = self.questions[key[0]][1]
        return grade_item(item, completion.text, completion.finish_reason, self.grader, at_once)

    def record(self, row: Row) -> None:
        assert self._journal is not None
        self._note(self._journal.append(row), row)

    def record_answer(self, key: Key, completion: Completion) -> None:
        """Grade and put on file; blocks while the grader does."""
        verdict = self.unfit(completion) or self.grade(key, completion, at_once=False)
        assert verdict is not None
        self.record(self.first_fields(key) | answer_fields(completion, verdict))

    def is_known_refusal(self, key: Key, reason: str) -> bool:
        return self.refused.get(key) == reason and self.num_answered > 0

    def sync(self) -> None:
        assert self._journal is not None
        self._journal.sync()

    def progress(self) -> dict[str, str]:
        return {} if self.num_answered % 50 else {"accuracy": f"{self.num_right / max(self.num_answered, 1):.1%}"}

    def _note(self, offset: int, record: Row) -> None:
        check_fields(record, _FAILURE_FIELDS if "failed" in record else _ANSWER_FIELDS, f"{self.path}, byte {offset}")
        key = (f"{record['benchmark']}/{record['id']}", record["sample"])
        if key not in self._planned:
            return  # of a benchmark, or a repeat, that this command does not name
        _, item = self.questions[key[0]]
        if (record["prompt_hash"], record.get("answer")) != (self.hashes[key[0]], item.question.answer):
            raise PairError(
                f"{self.path}: question {record['id']!r} of {record['benchmark']} is on file with another text, "
                "instruction or answer than in this run's file. Evaluate the same file, or give a new --output folder."
            )
        self.offsets[key] = offset
        before = self.marks.get(key)
        self.marks[key] = mark = self._mark(record, item)
        for place, name in (
            ("prompt_tokens",) * 2,
            ("completion_tokens",) * 2,
            ("http_calls", "calls"),
            ("seconds",) * 2,
        ):
            self.usage[place] += record.get(name) or 0
        self.refused.pop(key, None)
        if record.get("permanent"):
            self.refused[key] = record["failed"]
        self.num_answered += (not mark.missing) - (before is not None and not before.missing)
        self.num_right += mark.right - (before is not None and before.right)

    def _mark(self, record: Row, item: Item) -> Mark:
        if not _is_answer(record):
            return Mark(missing=record.get("failed") or record["reason"])
        if record.get("grader") != GRADER_VERSION:  # an earlier version's verdict
            verdict = grade_item(item, record["response"], record["finish_reason"], self.grader)
            assert verdict is not None
            record = record | verdict_fields(verdict)
        return Mark(
            record["verdict"],
            record.get("extracted"),
            record["reason"],
            record["finish_reason"],
            record.get("completion_tokens") or 0,
        )

    def _check_complete(self) -> None:
        absent = next((key for key in self.plan.samples() if key not in self.marks), None)
        if absent is not None:
            raise PairError(
                f"{self.folder}: holds no answer to {absent[0]!r}, sample {absent[1]}. The base must have been "
                "evaluated on the same files with as many repeats: evaluate it again, or name those files."
            )


def _is_answer(record: Row) -> bool:
    return "failed" not in record and record.get("reason") not in UNUSABLE
