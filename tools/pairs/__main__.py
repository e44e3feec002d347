"""`python -m tools.pairs`: filter rectified answers into preference pairs, and report on the whole data half.

Writes the pairs, beside them OUTPUT.dropped.jsonl (id, reason, detail of every other row) and OUTPUT.summary.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError, positive_int
from spot_megatron.files import AtomicWriter, dump_line, read_rows, write_text
from tools.pairs.cli import STARTS_OVER, HelpFormatter, existing_file, output_file, print_summary, run_program
from tools.pairs.filter import Keep, PairFilter, Rules
from tools.pairs.grade import Grader
from tools.pairs.measures import load_tokenizer


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.pairs", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--rectified", type=Path, required=True, help="rectified.jsonl of tools.rectify")
    parser.add_argument("--tokenizer", required=True, help="the policy's folder, tokenizer.json or hub name")
    parser.add_argument("--output", type=Path, required=True, help="pairs.jsonl to write")
    parser.add_argument("--gamma", type=float, default=0.6, help="largest change ratio R; 1 keeps all")
    parser.add_argument(
        "--max-tokens", type=positive_int, default=8192, help="longest prompt + response; longer pairs are dropped"
    )
    parser.add_argument("--min-edit-tokens", type=positive_int, default=1, help="fewest tokens removed plus added")
    parser.add_argument("--no-verify", action="store_true", help="do not grade the chosen sides once more")
    parser.add_argument("--report", type=Path, metavar="FILE", help="an HTML page of the whole data half to write, too")
    return parser


def main() -> None:
    args = arguments().parse_args()
    if not 0.0 <= args.gamma <= 1.0:
        raise PairError(f"--gamma {args.gamma} is not a change ratio; give a number from 0 to 1 (the paper: 0.6).")
    existing_file(args.rectified, "rectified.jsonl of tools.rectify")
    output_file(args.output, "--output", args.rectified)
    dropped_path, summary_path = (args.output.with_suffix(suffix) for suffix in (".dropped.jsonl", ".summary.json"))
    for path in (dropped_path, summary_path):
        output_file(path, f"--output {args.output}:", args.rectified)
    if args.report:
        output_file(args.report, "--report", args.rectified, args.output, dropped_path, summary_path)
    rules = Rules(args.gamma, args.max_tokens, args.min_edit_tokens, verify=not args.no_verify)
    grader = Grader(num_workers=1)
    pair_filter = PairFilter(rules, load_tokenizer(args.tokenizer), grader)
    report = None
    if args.report:
        from tools.pairs.report import ReportData

        report = ReportData(args.gamma)
        report.add_rejected(args.rectified.with_name("rejected.jsonl"))
        elicit = (_upstream(args.rectified) or {}).get("upstream") or {}
        report.add_undecided(args.rectified.parent / elicit.get("folder", ".") / "undecided.jsonl")
    with AtomicWriter(args.output) as kept, AtomicWriter(dropped_path) as dropped:
        for decision in pair_filter.run(read_rows(args.rectified), args.rectified):
            if isinstance(decision, Keep):
                kept.write(dump_line(decision.row))
            else:
                dropped.write(dump_line({"id": decision.id, "reason": decision.reason, "detail": decision.detail}))
            if report:
                report.add(decision)
    grader.close()
    summary = _summary(args, pair_filter)
    write_text(summary_path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print_summary(summary)
    if report:
        from tools.pairs.report import write_report

        write_report(args.report, report, summary)
        print(f"report: {args.report}")


def _summary(args: argparse.Namespace, pair_filter: PairFilter) -> dict[str, Any]:
    dropped = {reason: number for reason, number in pair_filter.counts.items() if reason != "kept"}
    return {
        "stage": "pairs",
        "rectified": pair_filter.counts.total(),
        "pairs": pair_filter.counts["kept"],
        "dropped": dropped,
        "flagged_inconsistent": pair_filter.num_inconsistent,
        "settings": {
            "gamma": args.gamma,
            "max_tokens": args.max_tokens,
            "min_edit_tokens": args.min_edit_tokens,
            "verify": not args.no_verify,
            "tokenizer": Path(args.tokenizer).name,
        },
        "upstream": _upstream(args.rectified),
    }


def _upstream(rectified: Path) -> dict[str, Any] | None:
    """The rectification's summary, which holds the elicitation's in turn, when it lies beside its output."""
    try:
        summary = json.loads(rectified.with_name("summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("stage") == "rectify" else None


if __name__ == "__main__":
    run_program(main, STARTS_OVER)
