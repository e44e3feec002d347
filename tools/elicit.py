"""`python -m tools.elicit`: sample the policy's answers to questions, grade them, set its errors apart.

Writes DIR/responses.jsonl (the journal), correct.jsonl, errors.jsonl, undecided.jsonl, excluded.jsonl, summary.json.
Run the same command again to continue after any stop. With --shard i/n one process of many does its part; --merge then
joins the parts. --regrade --output DIR grades DIR's finished samples again with this version's grader; nothing is sent.
"""

import argparse
import asyncio
import re
from pathlib import Path

from spot_megatron.errors import PairError
from tools.pairs.cli import (
    add_endpoint_options,
    existing_file,
    make_client,
    output_folder,
    positive,
    print_summary,
    run_program,
)
from tools.pairs.elicit import JOURNAL, OUTPUT_FILES, Elicitation, merge, read_sampling
from tools.pairs.grade import Grader
from tools.pairs.pool import Interrupted, RunFailed
from tools.pairs.prompts import ELICIT_SUFFIX
from tools.pairs.questions import read_questions
from tools.pairs.regrade import questions_on_file, regrade
from tools.pairs.sampling import Sampling, Shard

NO_ANSWER_REASONS = ("no_box", "empty_box", "unclosed_box", "unfinished_thinking", "cut_off")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.elicit", description=__doc__)
    parser.add_argument(
        "--questions",
        type=Path,
        help="JSONL or Parquet: {id, question | prompt | problem, answer}; --regrade of a finished run needs none",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder; a folder with records is continued")
    parser.add_argument(
        "--english-only", action="store_true", help="drop questions with Chinese characters (DAPO-Math-17k)"
    )
    parser.add_argument("--limit", type=positive, help="use the first N questions only")
    parser.add_argument("--samples", type=positive, default=1, help="answers per question")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=positive, default=32768)
    parser.add_argument(
        "--thinking", choices=("off", "on", "server"), default="off", help="enable_thinking of the template"
    )
    parser.add_argument("--prompt-suffix", default=ELICIT_SUFFIX, help='added to a plain question; "" adds nothing')
    parser.add_argument("--seed", type=int, default=1234, help="every request's own seed is derived from it")
    parser.add_argument(
        "--token-ids", action="store_true", help="ask for sampled token ids (vLLM, SGLang) and keep them"
    )
    parser.add_argument(
        "--errors-include",
        nargs="*",
        choices=NO_ANSWER_REASONS,
        default=[],
        help="kinds of missing answers that count as errors besides wrong ones (default: none)",
    )
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="do part I of N only, I from 0 to N-1")
    parser.add_argument(
        "--merge", nargs="*", type=Path, metavar="JOURNAL", help="join shards (default: those in --output)"
    )
    parser.add_argument(
        "--regrade", action="store_true", help="grade the finished samples in --output again; nothing is sent"
    )
    parser.add_argument("--grade-workers", type=positive, default=2, help="processes for answers that need algebra")
    add_endpoint_options(parser, concurrency=256)
    return parser


def _shard(text: str) -> Shard:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; the parts of four are 0/4, 1/4, 2/4 and 3/4")
    return Shard(int(match[1]), int(match[2]))


def main() -> None:
    args = arguments().parse_args()
    if args.regrade:
        _regrade(args)
        return
    if args.questions is None:
        raise PairError("--questions is missing. Name a JSONL or Parquet file of questions with known answers.")
    found = read_questions(existing_file(args.questions, "question file"), args.english_only)
    if args.limit is not None:
        found.dropped["beyond_limit"] = max(0, len(found.questions) - args.limit)
        del found.questions[args.limit :]
    if args.merge is not None:
        output_folder(args.output, OUTPUT_FILES, args.questions)
        sampling = merge(args.output, _shard_journals(args.merge, args.output))
    else:
        make_client(args)  # a wrong address should be told before anything is written
        output_folder(args.output, OUTPUT_FILES, args.questions)
        sampling = Sampling(
            model=args.model,
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_tokens,
            thinking=args.thinking,
            suffix=args.prompt_suffix,
            seed=args.seed,
            token_ids=args.token_ids,
            extra_body=args.extra_body,
        )
    elicitation = Elicitation(args.output, found, sampling, args.samples, args.shard)
    try:
        if args.merge is None:
            asyncio.run(_ask(args, elicitation))
    except (Interrupted, RunFailed):
        print_summary(elicitation.write_outputs(args.errors_include))
        raise
    print_summary(elicitation.write_outputs(args.errors_include))


def _regrade(args: argparse.Namespace) -> None:
    if args.merge is not None or args.shard is not None:
        raise PairError("--regrade works on a whole folder. Join the shards by --merge first, then grade it again.")
    if args.questions is None:
        found, sampling, samples = questions_on_file(args.output)
    else:
        found = read_questions(existing_file(args.questions, "question file"), args.english_only)
        sampling, samples = read_sampling(args.output / JOURNAL), args.samples
    grader = Grader(args.grade_workers)
    try:
        changes = regrade(args.output, grader)
    finally:
        grader.close()
    elicitation = Elicitation(args.output, found, sampling, samples)
    print_summary({**elicitation.write_outputs(args.errors_include), "changed_verdicts": changes})


async def _ask(args: argparse.Namespace, elicitation: Elicitation) -> None:
    grader = Grader(args.grade_workers)
    try:
        async with make_client(args) as client:
            await elicitation.run(client, grader, args.concurrency, args.max_failures)
    finally:
        grader.close()


def _shard_journals(given: list[Path], output: Path) -> list[Path]:
    journals = given or sorted(output.glob("responses.shard-*-of-*.jsonl"))
    if not journals:
        raise PairError(f"{output}: holds no responses.shard-*.jsonl to merge. Name the shard journals after --merge.")
    return [existing_file(path, "shard's journal") for path in journals]


if __name__ == "__main__":
    run_program(main)
