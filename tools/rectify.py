"""`python -m tools.rectify`: have a stronger model, the policy itself or a human edit wrong answers until they are
right.

Writes DIR/journal.jsonl, rectified.jsonl, rejected.jsonl (with reasons) and summary.json. Run the same command again to
continue after any stop; a later run may use another oracle, --with-answer, or more --attempts for what is still open.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError, positive_int
from tools.pairs.answers import EditMeter
from tools.pairs.attempts import OUTPUT_FILES
from tools.pairs.cli import (
    HelpFormatter,
    add_endpoint_options,
    existing_file,
    make_client,
    output_file,
    output_folder,
    print_summary,
    run_program,
)
from tools.pairs.endpoint import EndpointError
from tools.pairs.grade import Grader
from tools.pairs.human import export_errors, import_edits
from tools.pairs.limits import Prices
from tools.pairs.measures import load_tokenizer
from tools.pairs.oracle import HUMAN, Choice, ErrorFile, Oracle
from tools.pairs.pool import Interrupted, RunFailed
from tools.pairs.rectify import Rectification


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.rectify", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--errors", type=Path, required=True, help="errors.jsonl of tools.elicit")
    parser.add_argument("--output", type=Path, required=True, help="folder; a folder with records is continued")
    parser.add_argument("--with-answer", action="store_true", help="show the oracle the true answer")
    parser.add_argument(
        "--attempts", type=positive_int, default=3, help="edits per error; each prompt names what was wrong before"
    )
    parser.add_argument(
        "--target-pairs", type=positive_int, metavar="N", help="stop when N errors are rectified, earlier runs included"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="POLICY",
        help="the policy's folder, tokenizer.json or hub name: edits whose change ratio is above --gamma are tried "
        "again, and --target-pairs counts those within it",
    )
    parser.add_argument("--gamma", type=float, default=0.6, help="largest change ratio R, with --tokenizer")
    parser.add_argument(
        "--pass-rate",
        type=_pass_rate,
        default=(0.0, 1.0),
        metavar="LOW..HIGH",
        help="only errors of questions answered right in this share of their samples, such as 0.1..0.9",
    )
    parser.add_argument("--one-per-question", action="store_true", help="one error of each question, drawn by --seed")
    parser.add_argument("--seed", type=int, default=1234, help="of the order in which errors are attempted")
    parser.add_argument("--file-order", action="store_true", help="attempt the errors in the order of their file")
    parser.add_argument("--max-tokens", type=positive_int, default=32768, help="of one reply, thinking included")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    parser.add_argument("--top-p", type=float, help="default: the server's")
    parser.add_argument(
        "--thinking", choices=("off", "on", "server"), default="server", help="enable_thinking of the template"
    )
    parser.add_argument("--price-prompt", type=float, metavar="USD", help="price of a million prompt tokens")
    parser.add_argument("--price-completion", type=float, metavar="USD", help="price of a million written tokens")
    parser.add_argument("--budget-usd", type=float, metavar="X", help="never spend more; needs both prices")
    parser.add_argument(
        "--export-human", type=Path, metavar="FILE", help="write the open errors as a text file to edit"
    )
    parser.add_argument("--import-human", type=Path, metavar="FILE", help="grade and take over such a file's edits")
    parser.add_argument("--grade-workers", type=positive_int, default=2, help="processes for answers that need algebra")
    add_endpoint_options(parser, concurrency=64)
    return parser


def _pass_rate(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range; give one such as 0.1..0.9") from None
    if not 0.0 <= low <= high <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range within 0..1")
    return low, high


def main() -> None:
    args = arguments().parse_args()
    prices = _prices(args)
    errors = ErrorFile(existing_file(args.errors, "errors.jsonl of tools.elicit"))
    human = args.export_human or args.import_human
    if not human:
        make_client(args)  # raises for a wrong address before anything is written
    oracle = Oracle(
        model=HUMAN if human else args.model,
        with_answer=args.with_answer,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        thinking=args.thinking,
        extra_body=args.extra_body,
    )
    if args.budget_usd is not None:
        oracle.check_bounded()
    if args.import_human:
        existing_file(args.import_human, "file that --export-human wrote")
    if args.export_human:
        output_file(args.export_human, "--export-human", args.errors)
    output_folder(args.output, OUTPUT_FILES, args.errors)
    choice = Choice(args.pass_rate, args.one_per_question, None if args.file_order else args.seed)
    meter = EditMeter(load_tokenizer(args.tokenizer), args.gamma) if args.tokenizer else None
    rectification = Rectification(args.output, errors, oracle, args.attempts, prices, meter, choice)
    grader = Grader(args.grade_workers)
    try:
        if args.import_human:
            counts, rejected = import_edits(args.import_human, rectification, grader)
            print_summary(counts)
            for identifier, reason in rejected.items():
                print(f"rejected {identifier}: {reason}")
        elif not args.export_human:
            asyncio.run(_rectify(args, rectification, grader))
    except (Interrupted, RunFailed, EndpointError):
        print_summary(rectification.write_outputs(_upstream(args.errors, args.output)))
        raise
    finally:
        grader.close()
    if args.export_human:
        open_errors = [{**errors[identifier], "id": identifier} for identifier in rectification.open_errors()]
        print(f"{args.export_human}: {export_errors(args.export_human, open_errors, args.with_answer)} errors to edit")
        return
    print_summary(rectification.write_outputs(_upstream(args.errors, args.output)))


async def _rectify(args: argparse.Namespace, rectification: Rectification, grader: Grader) -> None:
    async with make_client(args) as client:
        await client.find_context_length()
        print(f"estimate of the first attempts: {_estimate_line(rectification.estimate())}", file=sys.stderr)
        await rectification.run(
            client,
            grader,
            args.batch or args.concurrency,
            args.max_failures,
            target=args.target_pairs,
            budget_usd=args.budget_usd,
        )


def _estimate_line(estimate: dict[str, Any]) -> str:
    tokens = f"{estimate['prompt_tokens']:,} prompt tokens, {estimate['completion_tokens']:,} written tokens"
    return f"{estimate['requests']:,} requests, about {tokens}, ${estimate['usd']:,.2f}"


def _prices(args: argparse.Namespace) -> Prices:
    if args.budget_usd is not None and (args.price_prompt is None or args.price_completion is None):
        raise PairError("--budget-usd needs --price-prompt and --price-completion (US dollars for a million tokens).")
    return Prices(args.price_prompt or 0.0, args.price_completion or 0.0)


def _upstream(errors: Path, output: Path) -> dict[str, Any] | None:
    """The elicitation's summary, when it lies beside the errors file: the report's funnel begins there.

    `folder` is the elicitation's folder, relative to `output`.
    """
    path = errors.with_name("summary.json")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or summary.get("stage") != "elicit":
        return None
    return {**summary, "folder": os.path.relpath(errors.parent.resolve(), output.resolve())}


if __name__ == "__main__":
    run_program(main)
