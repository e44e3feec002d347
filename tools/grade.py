"""`python -m tools.grade`: grade responses against known answers, line by line, in the input's order."""

import argparse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from spot_megatron.errors import PairError, positive_int
from spot_megatron.files import AtomicWriter, Row, answer_field, dump_line, id_field, read_rows, text_field
from tools.pairs.cli import STARTS_OVER, HelpFormatter, existing_file, output_file, print_summary, run_program
from tools.pairs.grade import TIME_LIMIT, Grader

_BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.grade", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--input", type=Path, required=True, help='JSONL: {"id", "response", "answer"}, optional "finish_reason"'
    )
    parser.add_argument(
        "--output", type=Path, required=True, help='JSONL file to write: {"id", "verdict", "extracted", "reason"}'
    )
    parser.add_argument("--workers", type=positive_int, default=2, help="processes for answers that need algebra")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="CPU seconds for one answer")
    args = parser.parse_args()
    rows = _rows(existing_file(args.input, "JSONL file of responses"))
    output_file(args.output, "--output", args.input)
    grader = Grader(args.workers, args.time_limit)
    counts: Counter[str] = Counter()

    def grade(numbered: tuple[int, Row]) -> Row:
        number, row = numbered
        where = f"{args.input}:{number}"
        response, gold = text_field(row, "response", where), answer_field(row, "answer", where)
        verdict = grader.grade(response, gold, row.get("finish_reason"))
        return {
            "id": row["id"],
            "verdict": verdict.verdict,
            "extracted": verdict.extracted,
            "reason": verdict.reason,
        }

    with AtomicWriter(args.output) as output, ThreadPoolExecutor(args.workers) as threads:
        while batch := list(islice(rows, _BATCH)):
            for graded in threads.map(grade, batch):
                output.write(dump_line(graded))
                counts[graded["verdict"]] += 1
    grader.close()
    print_summary({"graded": counts.total(), "verdicts": dict(counts)})


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, row), with an id that no other row has."""
    seen: set[str] = set()
    for number, row in read_rows(path):
        identifier = id_field(row, f"{path}:{number}")
        if identifier in seen:
            raise PairError(f"{path}:{number}: id {identifier!r} occurs twice. Every row needs an id of its own.")
        seen.add(identifier)
        yield number, row


if __name__ == "__main__":
    run_program(main, STARTS_OVER)
