"""Grade the finished samples of an elicitation folder again, without sampling: for a folder of an older grader."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import AtomicWriter, Row, dump_line, read_rows
from tools.pairs.elicit import JOURNAL, OUTPUT_FILES
from tools.pairs.grade import GRADER_VERSION, Grader
from tools.pairs.journal import Journal, read_records
from tools.pairs.prompts import elicit_messages
from tools.pairs.questions import Question, QuestionSet
from tools.pairs.sampling import Sampling, read_sampling

_BATCH = 256


def regrade(output: Path, grader: Grader) -> dict[str, int]:
    """Replace `output`'s journal by one with this grader's verdicts; {"wrong -> correct": number, ...}.

    The new journal appears whole or not at all. Raises PairError when there is none, or another process writes to it.
    """
    path = _journal(output)
    settings = asdict(read_sampling(path))
    changes: Counter[str] = Counter()

    def again(record: Row) -> Row:
        if "failed" in record:
            return record
        verdict = grader.grade(record["response"], record["answer"], record["finish_reason"])
        if record["verdict"] != verdict.verdict:
            changes[f"{record['verdict']} -> {verdict.verdict}"] += 1
        fields = {"verdict": verdict.verdict, "extracted": verdict.extracted, "reason": verdict.reason}
        return {**record, **fields, "grader": GRADER_VERSION}

    with Journal(path, settings) as journal, AtomicWriter(path) as writer:
        records = (record for _, record in journal.records())
        with ThreadPoolExecutor(grader.num_workers) as threads:
            while batch := list(islice(records, _BATCH)):
                for record in threads.map(again, batch):
                    writer.write(dump_line(record))
    return dict(changes)


def questions_on_file(output: Path) -> tuple[QuestionSet, Sampling, int]:
    """(questions, settings, samples a question) of a finished run, from what it left in `output`.

    Raises PairError when the run is not finished: then only its question file knows the rest.
    """
    sampling = read_sampling(_journal(output))
    summary = _summary(output)
    prompts = {row["question_id"]: row["prompt"] for row in _output_rows(output)}
    found: dict[str, Question] = {}
    for _, record in read_records(_journal(output)):
        prompt = prompts.get(record["id"])
        plain = prompt is None or prompt == elicit_messages(record["question"], sampling.suffix)
        messages = None if plain else tuple(prompt or ())
        found.setdefault(record["id"], Question(record["id"], record["question"], record["answer"], messages))
    dropped: Counter[str] = Counter(summary.get("questions_dropped") or {})
    rows = int(summary.get("question_rows") or len(found))
    return QuestionSet(list(found.values()), rows, dropped), sampling, int(summary["samples_per_question"])


def _journal(output: Path) -> Path:
    path = output / JOURNAL
    if not path.exists():
        raise PairError(
            f"{output}: holds no {JOURNAL} to grade again. Give the --output of an elicit run; join shards by --merge."
        )
    return path


def _summary(output: Path) -> dict[str, Any]:
    try:
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        pending = summary["pending"]
    except (OSError, ValueError, KeyError, TypeError):
        pending = -1
    if pending:
        raise PairError(f"{output}: its run is not finished. Name its question file, too: --regrade --questions F.")
    return summary


def _output_rows(output: Path) -> Iterator[Row]:
    for name in OUTPUT_FILES:
        path = output / name
        if name not in (JOURNAL, "summary.json") and path.exists():
            yield from (row for _, row in read_rows(path))
