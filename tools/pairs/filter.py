"""Stage 3: which rectified answers become preference pairs. Keep, or drop for a counted reason."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from spot_megatron.errors import PairError
from spot_megatron.files import FINISH_REASONS, Row, answer_field, id_field, text_field
from tools.pairs.answers import contradiction, is_answer_only
from tools.pairs.conversation import read_prompt, transcript
from tools.pairs.grade import CORRECT, Grader
from tools.pairs.leaks import find_leak
from tools.pairs.measures import Measures, PolicyTokenizer, measure

_BATCH = 64  # rows that are tokenised together


@dataclass(frozen=True)
class Rules:
    """`gamma` bounds the change ratio, `max_tokens` the prompt and the longer side."""

    gamma: float = 0.6
    max_tokens: int = 8192
    min_edit_tokens: int = 1
    verify: bool = True


@dataclass(frozen=True)
class Keep:
    row: Row
    measures: Measures


@dataclass(frozen=True)
class Drop:
    id: str
    reason: str
    detail: str
    measures: Measures | None = None


@dataclass
class Candidate:
    """A line of rectified.jsonl, checked for its fields."""

    id: str
    row: Row
    messages: list[Row]
    prompt: str  # the messages as one text
    chosen: str
    rejected: str


@dataclass
class PairFilter:
    """Applies the rules to rows in order; remembers pairs already seen."""

    rules: Rules
    tokenizer: PolicyTokenizer
    grader: Grader
    counts: Counter[str] = field(default_factory=Counter)
    num_inconsistent: int = 0  # kept pairs whose chosen side last states another result than its box
    _ids: set[str] = field(default_factory=set)
    _pairs: set[int] = field(default_factory=set)

    def run(self, rows: Iterable[tuple[int, Row]], source: Path) -> Iterator[Keep | Drop]:
        """One decision per row, in order. Raises PairError naming the line of a broken row or the repeated id."""
        rows = iter(rows)
        while batch := [read_candidate(row, f"{source}:{number}") for number, row in islice(rows, _BATCH)]:
            texts = [text for item in batch for text in (self._prompt_text(item), item.chosen, item.rejected)]
            ids = self.tokenizer.encode(texts)
            for index, candidate in enumerate(batch):
                if candidate.id in self._ids:
                    raise PairError(f"{source}: id {candidate.id!r} occurs twice. Every pair needs an id of its own.")
                self._ids.add(candidate.id)
                decision = self._decide(candidate, *ids[3 * index : 3 * index + 3])
                self.counts["kept" if isinstance(decision, Keep) else decision.reason] += 1
                yield decision

    def _prompt_text(self, pair: Candidate) -> str:
        return self.tokenizer.prompt_text(pair.messages, pair.row.get("tools"), pair.prompt)

    def _decide(self, pair: Candidate, prompt: list[int], chosen: list[int], rejected: list[int]) -> Keep | Drop:
        finish = str(pair.row.get("finish_reason", "stop"))
        if not chosen or not rejected:
            return Drop(pair.id, "empty_side", "chosen" if not chosen else "rejected")
        if finish not in FINISH_REASONS:
            return Drop(pair.id, "unknown_finish", finish)
        if self.rules.verify:
            verdict = self.grader.grade(pair.chosen, pair.row["answer"])
            if verdict.verdict != CORRECT:
                return Drop(pair.id, "not_verified", f"{verdict.verdict}: {verdict.reason}")
        if pair.chosen.split() != pair.rejected.split() and is_answer_only(pair.chosen, pair.rejected):
            return Drop(pair.id, "answer_only_edit", "")
        leak = find_leak(pair.chosen, pair.rejected, pair.row["question"], pair.prompt)
        if leak is not None:
            return Drop(pair.id, "answer_leak", leak)
        content = hash(tuple(" ".join(text.split()) for text in (pair.prompt, pair.chosen, pair.rejected)))
        if content in self._pairs:
            return Drop(pair.id, "duplicate", "")
        self._pairs.add(content)
        longest = len(prompt) + max(len(chosen), len(rejected)) + self.tokenizer.end_tokens
        if longest > self.rules.max_tokens:
            return Drop(pair.id, "too_long", f"{longest} tokens")
        measures = measure(len(prompt), chosen, rejected)
        if measures.edited_tokens < self.rules.min_edit_tokens or pair.chosen.split() == pair.rejected.split():
            return Drop(pair.id, "near_empty_edit", f"{measures.edited_tokens} tokens", measures)
        if measures.change_ratio > self.rules.gamma:
            return Drop(pair.id, "change_ratio", f"{measures.change_ratio:.3f}", measures)
        row = pair_row(pair, finish, measures)
        self.num_inconsistent += "inconsistent" in row["meta"]
        return Keep(row, measures)


def read_candidate(row: Row, where: str) -> Candidate:
    """Check the fields of a rectified row; the prompt is what was sent (messages), or the question alone."""
    identifier = id_field(row, where)
    question, chosen, rejected = (text_field(row, key, where) for key in ("question", "corrected", "response"))
    row["answer"] = answer_field(row, "answer", where)
    read_prompt(row, where)
    asked = row.get("prompt", question)
    messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    return Candidate(identifier, row, messages, transcript(messages, row.get("tools")), chosen, rejected)


def pair_row(pair: Candidate, finish: str, measures: Measures) -> Row:
    """The line of pairs.jsonl. Sampled token ids, where the server gave them, go along as `rejected_ids`."""
    row = pair.row
    meta: Row = {
        key: row[key]
        for key in ("question_id", "sample", "pass_rate", "answer", "oracle", "prompt_version", "attempt")
        if key in row
    }
    meta |= {"change_ratio": round(measures.change_ratio, 4), "shared_prefix_tokens": measures.shared_prefix_tokens}
    meta |= {"chosen_tokens": measures.chosen_tokens, "rejected_tokens": measures.rejected_tokens}
    prompt = row.get("prompt", row["question"])
    result: Row = {"id": pair.id, "prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if isinstance(prompt, list):  # one kind for all three, or other readers drop the prompt
        result |= {side: [{"role": "assistant", "content": result[side]}] for side in ("chosen", "rejected")}
    if row.get("tools"):
        result["tools"] = row["tools"]
    if (stated := contradiction(pair.chosen)) is not None:
        meta["inconsistent"] = stated
    result |= {"chosen_finish": "stop", "rejected_finish": finish}
    if row.get("token_ids"):
        result["rejected_ids"] = row["token_ids"]
    return {**result, "meta": meta}
