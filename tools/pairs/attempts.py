"""The journal of a rectification: attempts, their outcomes, and what is still open."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import FINISH_REASONS, AtomicWriter, Row, dump_line, write_text
from tools.pairs.answers import EditMeter
from tools.pairs.journal import Fields, Journal, check_fields
from tools.pairs.limits import Prices
from tools.pairs.oracle import HUMAN, Choice, Oracle
from tools.pairs.prompts import PROMPT_VERSION

_KEPT = (
    "corrected",
    "oracle",
    "prompt_version",
    "with_answer",
    "attempt",
    "change_ratio",
    "shared_prefix_tokens",
)  # of an accepted attempt

OUTPUT_FILES = ("journal.jsonl", "rectified.jsonl", "rejected.jsonl", "summary.json")

_COMMON_FIELDS = {"id": str, "attempt": int, "original": str, "oracle": str}
_RECORD_FIELDS: dict[str, Fields] = {
    "verified": {**_COMMON_FIELDS, "corrected": str},
    "rejected": {**_COMMON_FIELDS, "reason": str, "detail": str},
    "failed": {**_COMMON_FIELDS, "reason": str, "permanent": bool},
}


@dataclass(slots=True)
class Progress:
    """The journal's state of one error."""

    failures: list[tuple[str, str]] = field(default_factory=list)  # (reason, detail) of rejected attempts
    edited_at: int | None = None  # journal offset of the latest rejected edit
    verified_at: int | None = None  # journal offset of the accepted attempt
    failed: str | None = None  # why the latest attempt's request came to nothing
    refused_by: str = ""  # ... and would again with the oracle of this name


class Attempts:
    """One output folder's journal, and the state of every error."""

    def __init__(
        self,
        output: Path,
        errors: Mapping[str, Row],
        oracle: Oracle,
        attempts: int,
        prices: Prices,
        meter: EditMeter | None = None,
        choice: Choice | None = None,
    ) -> None:
        self.output, self.errors, self.oracle, self.attempts, self.prices = output, errors, oracle, attempts, prices
        self.meter = meter
        self.order, self.left_out = (choice or Choice()).sort(errors)
        # The journal has no settings: another oracle, or the same one with the true answer, may finish the work.
        self.journal = Journal(output / "journal.jsonl", {"stage": "rectify"})
        self.progress = {identifier: Progress() for identifier in errors}
        self.spent_usd = 0.0
        self.num_verified = self.num_outside = 0
        self.stopped = ""  # target_reached, budget_spent, interrupted or requests_failed
        self.totals: Counter[str] = Counter()
        self.answered_by: set[str] = set()  # oracles that have answered anything
        for offset, record in self.journal.records():
            self._note(offset, record)

    def record(self, row: Row) -> None:
        """Put an attempt on file."""
        self._note(self.journal.append(row), row)

    def open_errors(self) -> Iterator[str]:
        """Ids that may still be attempted, in the order of the choice; none that could never become a pair."""
        for identifier in self.order:
            progress = self.progress[identifier]
            settled = progress.verified_at is not None or len(progress.failures) >= self.attempts
            if not settled and _why_never(self.errors[identifier]) is None:
                yield identifier

    def _note(self, offset: int, record: Row) -> None:
        check_fields(record, _RECORD_FIELDS.get(str(record.get("outcome"))), f"{self.journal.path}, byte {offset}")
        self.spent_usd += record.get("cost_usd") or 0.0
        for name in ("prompt_tokens", "completion_tokens", "calls"):
            self.totals[name] += record.get(name) or 0
        if record["outcome"] != "failed":
            self.answered_by.add(record["oracle"])
        error = self.errors.get(str(record.get("id")))
        if error is None:
            self.num_outside += 1
            return
        if record.get("original") != fingerprint(error["response"]):
            raise PairError(
                f"{self.journal.path}: {record.get('id')!r} is on file with another response than in the errors file. "
                "Rectify a changed errors file into a new --output folder."
            )
        progress = self.progress[str(record["id"])]
        progress.failed, progress.refused_by = None, ""
        if record["outcome"] == "verified":
            self.num_verified += progress.verified_at is None
            progress.verified_at = offset
        elif record["outcome"] == "rejected":
            progress.failures.append((record["reason"], record.get("detail") or ""))
            progress.edited_at = offset if record.get("corrected") else progress.edited_at
        else:
            progress.failed, progress.refused_by = record["reason"], record["oracle"] if record["permanent"] else ""

    def estimate(self) -> dict[str, Any]:
        """Estimate for the open errors' first attempts: requests, tokens (four bytes each) and dollars."""
        requests = prompt = completion = 0
        for identifier in self.open_errors():
            error = self.errors[identifier]
            requests += 1
            prompt += len(json.dumps(self.oracle.request(error, []), ensure_ascii=False).encode()) // 4
            completion += len(error["response"].encode()) // 4
        usd = round(self.prices.cost(prompt, completion), 2)
        return {"requests": requests, "prompt_tokens": prompt, "completion_tokens": completion, "usd": usd}

    def request(self, identifier: str, progress: Progress) -> dict[str, Any]:
        previous = None if progress.edited_at is None else self.journal.read_at(progress.edited_at)["corrected"]
        return self.oracle.request(self.errors[identifier], progress.failures, previous)

    def known_refusal(self, progress: Progress) -> str | None:
        """Why an oracle that answers others refused this error before; the same refusal does not stop the run."""
        known = progress.refused_by == self.oracle.model and self.oracle.model in self.answered_by
        return progress.failed if known else None

    def attempt_record(self, identifier: str, oracle: str) -> Row:
        """The beginning of the next attempt's journal record."""
        return {
            "id": identifier,
            "attempt": len(self.progress[identifier].failures) + 1,
            "original": fingerprint(self.errors[identifier]["response"]),
            "oracle": oracle,
            "prompt_version": None if oracle == HUMAN else PROMPT_VERSION,
            "with_answer": self.oracle.with_answer,
        }

    def write_outputs(self, upstream: dict[str, Any] | None = None) -> dict[str, Any]:
        """Sort the errors into rectified.jsonl and rejected.jsonl (each id is in exactly one) and sum up."""
        attempts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        with (
            AtomicWriter(self.output / "rectified.jsonl") as accepted,
            AtomicWriter(self.output / "rejected.jsonl") as rejected,
        ):
            chosen = set(self.order)
            for identifier, progress in self.progress.items():
                error = self.errors[identifier]
                tried = [{"reason": reason, "detail": detail} for reason, detail in progress.failures]
                if progress.verified_at is not None:
                    record = self.journal.read_at(progress.verified_at)
                    accepted.write(dump_line(_rectified_row(identifier, error, record, tried)))
                    attempts[str(record["attempt"])] += 1
                else:
                    reason = _why_never(error) or self._why_rejected(progress, identifier in chosen)
                    reasons[reason] += 1
                    rejected.write(dump_line({**error, "id": identifier, "reason": reason, "rejected_attempts": tried}))
        summary = {
            "stage": "rectify",
            "errors": len(self.errors),
            "rectified": sum(attempts.values()),
            "rejected": dict(reasons),
            "not_chosen": dict(self.left_out),
            "accepted_at_attempt": dict(sorted(attempts.items())),
            "stopped": self.stopped or "finished",
            "records_outside_errors_file": self.num_outside,
            "http_calls": self.totals["calls"],
            "prompt_tokens": self.totals["prompt_tokens"],
            "completion_tokens": self.totals["completion_tokens"],
            "cost_usd": round(self.spent_usd, 6),
            "settings": {
                "model": self.oracle.model,
                "with_answer": self.oracle.with_answer,
                "prompt_version": PROMPT_VERSION,
                "attempts": self.attempts,
            },
            "upstream": upstream,
        }
        assert sum(attempts.values()) + sum(reasons.values()) == len(self.errors)
        write_text(self.output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return summary

    def _why_rejected(self, progress: Progress, is_chosen: bool) -> str:
        if not is_chosen and not progress.failures and progress.failed is None:
            return "not_chosen"
        if progress.failed is not None:
            return progress.failed
        if len(progress.failures) >= self.attempts:
            return progress.failures[-1][0]
        if progress.failures and not self.stopped:
            return progress.failures[-1][0]
        return f"not_attempted_{self.stopped}" if self.stopped else "not_attempted"


def _why_never(error: Row) -> str | None:
    """Why an error could never become a pair, so that no oracle is asked; None where it could."""
    if not error["response"].strip():
        return "empty_content"
    return None if error.get("finish_reason", "stop") in FINISH_REASONS else "unknown_finish"


def _rectified_row(identifier: str, error: Row, record: Row, tried: list[Row]) -> Row:
    """The error's own fields, its verdict renamed to make room for the accepted edit's."""
    row = {name: value for name, value in error.items() if name not in ("verdict", "reason", "extracted")}
    row |= {
        "id": identifier,
        "response_extracted": error.get("extracted"),
        "corrected_extracted": record.get("extracted"),
    }
    return {**row, **{name: record[name] for name in _KEPT if name in record}, "rejected_attempts": tried}


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
