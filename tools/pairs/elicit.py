"""Stage 1: sample the policy's own answers, grade them, and set its errors apart."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import FINISH_REASONS, AtomicWriter, Row, dump_line, write_text
from tools.pairs.asking import ask_all
from tools.pairs.batch import BatchClient
from tools.pairs.client import ChatClient, Completion
from tools.pairs.grade import CORRECT, NO_ANSWER, UNDECIDED, WRONG, Grader, Verdict
from tools.pairs.journal import Fields, Journal, check_fields
from tools.pairs.pool import progress_bar
from tools.pairs.questions import QuestionSet
from tools.pairs.replies import CONTENT_FILTER
from tools.pairs.sampling import Key, Sampling, Shard, error_id
from tools.pairs.unusable import UNUSABLE, unusable_reply


class Elicitation:
    """One output folder's journal, and the state of every planned (question, sample)."""

    def __init__(
        self, output: Path, found: QuestionSet, sampling: Sampling, samples: int, shard: Shard | None = None
    ) -> None:
        self.output, self.sampling, self.samples, self.shard, self.found = output, sampling, samples, shard, found
        self.questions = {q.id: q for q in found.questions if shard is None or shard.holds(q.id)}
        names = {error_id(key) for key in self.plan()}
        if len(names) != len(self.questions) * samples:
            raise PairError(
                'two samples would get the same id, because a question id ends in "#<number>". Rename that id.'
            )
        name = shard.name("responses", ".jsonl") if shard else JOURNAL
        self.journal = Journal(output / name, asdict(sampling), _is_answer)
        self.offsets: dict[Key, int] = {}  # where the latest record of a key starts
        self.retry: dict[Key, str] = {}  # keys whose latest record is a failure; why a server refused them, else ""
        self.num_several = self.num_identical = (
            0  # questions with several samples, and those whose samples are the same
        )
        self.num_correct = self.num_graded = self.num_outside_plan = 0
        self.grader: Grader | None = None
        for offset, record in self.journal.records():
            self._note(offset, record)

    def plan(self) -> Iterator[Key]:
        """Every (question id, sample), sample by sample, so that a run stopped early has seen many questions."""
        return ((question_id, sample) for sample in range(self.samples) for question_id in self.questions)

    def pending(self) -> Iterator[Key]:
        """Keys without an answer; failures of earlier runs come last, after others have shown that the server works."""
        yield from (key for key in self.plan() if key not in self.offsets)
        yield from (key for key in self.plan() if key in self.retry)

    def _note(self, offset: int, record: Row) -> None:
        fields = _FAILURE_FIELDS if "failed" in record else _ANSWER_FIELDS
        check_fields(record, fields, f"{self.journal.path}, byte {offset}")
        key = (record["id"], record["sample"])
        question = self.questions.get(key[0])
        if question is None or key[1] >= self.samples:
            self.num_outside_plan += 1
            return
        before = (record["question"], record["answer"], record.get("prompt_hash", question.prompt_hash()))
        if before != (question.question, question.answer, question.prompt_hash()):
            raise PairError(
                f"{self.journal.path}: question {key[0]!r} is on file with another text or answer than in the "
                "question file. Give changed questions new ids, or a new --output folder."
            )
        self.offsets[key] = offset
        self.num_correct += record.get("verdict") == CORRECT
        self.num_graded += "verdict" in record
        self.retry.pop(key, None)
        if "failed" in record:
            self.retry[key] = record["failed"] if record["permanent"] else ""

    def record(self, record: Row) -> None:
        self._note(self.journal.append(record), record)

    async def run(self, client: ChatClient | BatchClient, grader: Grader, concurrency: int, max_failures: int) -> None:
        """Ask, grade and record everything that is pending."""
        pending, total = list(self.pending()), len(self.questions) * self.samples
        bar = progress_bar("elicit", total, total - len(pending), "sample")
        self.grader = grader
        await ask_all(self, pending, client, concurrency, max_failures, grader.num_workers, bar)

    def request(self, key: Key) -> tuple[dict[str, Any], Row]:
        question = self.questions[key[0]]
        record: Row = {"id": key[0], "sample": key[1], "question": question.question, "answer": question.answer}
        return self.sampling.request(question, key[1]), record | {"prompt_hash": question.prompt_hash()}

    def unfit(self, completion: Completion) -> Verdict | None:
        return unusable_reply(completion, self.sampling.thinking)

    def grade(self, key: Key, completion: Completion, at_once: bool) -> Verdict | None:
        assert self.grader is not None
        grade = self.grader.grade_at_once if at_once else self.grader.grade
        return grade(completion.text, self.questions[key[0]].answer, completion.finish_reason)

    def is_known_refusal(self, key: Key, reason: str) -> bool:
        return self.retry.get(key) == reason and self.num_graded > 0

    def sync(self) -> None:
        self.journal.sync()

    def progress(self) -> dict[str, str]:
        return {} if self.num_graded % 100 else {"accuracy": f"{self.num_correct / max(self.num_graded, 1):.1%}"}

    def write_outputs(self, errors_include: Sequence[str]) -> dict[str, Any]:
        """Sort the journal into correct.jsonl, errors.jsonl, undecided.jsonl and excluded.jsonl (a shard: only count).

        Wrong answers are errors; of no_answer, those whose reason is in `errors_include` are, too. Answers that the
        grader neither confirmed nor disproved are undecided. All else is excluded, with its reason; so is a wrong
        answer of unknown end (neither "stop" nor "length"), which cannot become a pair. Every planned sample is in
        exactly one file, or still pending.
        """
        counts: Counter[str] = Counter()
        excluded: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        graders: Counter[str] = Counter()
        with contextlib.ExitStack() as files:
            names = () if self.shard else _OUTPUTS
            pass_rates = self._pass_rates() if self.samples > 1 and names else {}
            writers = {name: files.enter_context(AtomicWriter(self.output / f"{name}.jsonl")) for name in names}
            for key in self.plan():
                if key not in self.offsets:
                    counts["pending"] += 1
                    continue
                record = self.journal.read_at(self.offsets[key])
                place, reason = _place(record, errors_include)
                counts[place] += 1
                tokens["prompt"] += record.get("prompt_tokens") or 0
                tokens["completion"] += record.get("completion_tokens") or 0
                tokens["calls"] += record.get("calls") or 0
                if "verdict" in record:
                    graders[str(record.get("grader", 1))] += 1
                tokens["with_token_ids"] += "token_ids" in record
                if place == "excluded":
                    excluded[reason] += 1
                if writers:
                    row = self._output_row(key, record, reason)
                    if key[0] in pass_rates:
                        row["pass_rate"] = pass_rates[key[0]]
                    writers[place].write(dump_line(row))
        summary = {**self._summary(counts, excluded, tokens), "grader_versions": dict(graders)}
        name = self.shard.name("summary", ".json") if self.shard else "summary.json"
        write_text(self.output / name, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return summary

    def _pass_rates(self) -> dict[str, float]:
        """By question: the share of its answered samples that are right. Counts identical samples on the way."""
        right, answered = Counter[str](), Counter[str]()
        texts: dict[str, set[int]] = {}
        for key, offset in self.offsets.items():
            record = self.journal.read_at(offset)
            if _is_answer(record):
                answered[key[0]] += 1
                right[key[0]] += record["verdict"] == CORRECT
                texts.setdefault(key[0], set()).add(hash(record["response"]))
        several = [name for name, number in answered.items() if number > 1]
        self.num_several, self.num_identical = len(several), sum(len(texts[name]) == 1 for name in several)
        return {name: round(right[name] / number, 4) for name, number in answered.items()}

    def _output_row(self, key: Key, record: Row, reason: str) -> Row:
        kept = ("question", "answer", "response", "finish_reason", "token_ids", "verdict", "extracted")
        row: Row = {"id": error_id(key), "question_id": key[0], "sample": key[1]}
        row |= {name: record[name] for name in kept if name in record}
        row["reason"] = reason
        if "failed" in record:
            row["detail"] = record.get("detail")
        question = self.questions[key[0]]
        row["prompt"] = self.sampling.messages(question)
        return {**row, "tools": list(question.tools)} if question.tools else row

    def _summary(self, counts: Counter[str], excluded: Counter[str], tokens: Counter[str]) -> dict[str, Any]:
        total = len(self.questions) * self.samples
        assert sum(counts.values()) == total, (counts, total)
        graded = counts["correct"] + counts["errors"] + sum(n for reason, n in excluded.items() if reason in _GRADED)
        return {
            "stage": "elicit",
            "question_rows": self.found.num_rows,
            "questions": len(self.questions),
            "questions_dropped": dict(self.found.dropped),
            "samples_per_question": self.samples,
            "samples": total,
            "correct": counts["correct"],
            "errors": counts["errors"],
            "undecided": counts["undecided"],
            "excluded": dict(excluded),
            "pending": counts["pending"],
            "retried_next_time": len(self.retry),
            "records_outside_plan": self.num_outside_plan,
            "accuracy": round(counts["correct"] / graded, 4) if graded else None,
            "questions_with_several_samples": self.num_several,
            "questions_with_identical_samples": self.num_identical,
            "http_calls": tokens["calls"],
            "prompt_tokens": tokens["prompt"],
            "completion_tokens": tokens["completion"],
            "samples_with_token_ids": tokens["with_token_ids"],
            "settings": asdict(self.sampling),
        }


_KEY_FIELDS = {"id": str, "sample": int, "question": str, "answer": str}
_ANSWER_FIELDS: Fields = {**_KEY_FIELDS, "response": str, "finish_reason": str, "verdict": str, "reason": str}
_FAILURE_FIELDS: Fields = {**_KEY_FIELDS, "failed": str, "permanent": bool}
_OUTPUTS = ("correct", "errors", "undecided", "excluded")
JOURNAL = "responses.jsonl"
OUTPUT_FILES = (*(f"{name}.jsonl" for name in _OUTPUTS), JOURNAL, "summary.json")
_GRADED = ("no_box", "unclosed_box", "empty_box", "unfinished_thinking", "cut_off", "unknown_finish")


def _is_answer(record: Row) -> bool:
    """Whether a record depends on the sampling settings; failures and unusable replies are asked for again."""
    return "failed" not in record and record.get("reason") not in UNUSABLE


def _place(record: Row, errors_include: Sequence[str]) -> tuple[str, str]:
    """The output that a record belongs to, and why."""
    if "failed" in record:
        return "excluded", f"failed_{record['failed']}"
    verdict, reason = record["verdict"], record["reason"]
    if record["finish_reason"] == CONTENT_FILTER:
        return "excluded", CONTENT_FILTER
    if verdict == CORRECT:
        return "correct", reason
    if verdict == UNDECIDED:
        return "undecided", reason
    if verdict != WRONG and not (verdict == NO_ANSWER and reason in errors_include):
        return "excluded", reason
    return ("errors", reason) if record["finish_reason"] in FINISH_REASONS else ("excluded", "unknown_finish")
