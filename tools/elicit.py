"""`python -m tools.elicit`: sample the policy's answers to questions, grade them, set its errors apart.

Writes DIR/responses.jsonl (the journal), correct.jsonl, errors.jsonl, undecided.jsonl, excluded.jsonl, summary.json.
Run the same command again to continue after any stop. With --shard i/n one process of many does its part; --merge then
joins the parts. --regrade --output DIR grades DIR's finished samples again with this version's grader; nothing is sent.
"""

import argparse
import asyncio
import re
import sys
from pathlib import Path

from spot_megatron.errors import PairError, positive_int
from tools.pairs.cli import (
    HelpFormatter,
    add_endpoint_options,
    existing_file,
    make_client,
    output_folder,
    print_summary,
    run_program,
)
from tools.pairs.decontaminate import Benchmark
from tools.pairs.elicit import JOURNAL, OUTPUT_FILES, Elicitation
from tools.pairs.endpoint import EndpointError
from tools.pairs.grade import Grader
from tools.pairs.merge import merge
from tools.pairs.pool import Interrupted, RunFailed
from tools.pairs.prompts import ELICIT_SUFFIX
from tools.pairs.questions import read_questions
from tools.pairs.regrade import questions_on_file, regrade
from tools.pairs.sampling import Sampling, Shard, read_sampling

NO_ANSWER_REASONS = ("no_box", "empty_box", "unclosed_box", "unfinished_thinking", "cut_off")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.elicit", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--questions",
        type=Path,
        help="a JSONL or Parquet file of rows {id, question | prompt | problem, answer}; --regrade of a finished run "
        "needs none",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder; a folder with records is continued")
    parser.add_argument(
        "--english-only", action="store_true", help="drop questions with Chinese characters (DAPO-Math-17k)"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="benchmarks: questions with the same text or 13 words in a row in common are dropped",
    )
    parser.add_argument("--limit", type=positive_int, help="use the first N questions only")
    parser.add_argument("--samples", type=positive_int, default=1, help="answers per question")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the policy's sampling")
    parser.add_argument("--top-p", type=float, default=0.8, help="nucleus of the policy's sampling")
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        default=32768,
        help="of one answer; less where the server's context ends before",
    )
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
        help="kinds of missing answers that count as errors besides wrong ones (they may be right)",
    )
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="do part I of N only, I from 0 to N-1")
    parser.add_argument(
        "--merge", nargs="*", type=Path, metavar="JOURNAL", help="join shards (default: those in --output)"
    )
    parser.add_argument(
        "--regrade", action="store_true", help="grade the finished samples in --output again; nothing is sent"
    )
    parser.add_argument("--grade-workers", type=positive_int, default=2, help="processes for answers that need algebra")
    add_endpoint_options(parser, concurrency=256)
    return parser


def _shard(text: str) -> Shard:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard; the parts of four are 0/4, 1/4, 2/4 and 3/4")
    return Shard(int(match[1]), int(match[2]))


def main() -> None:
    args = arguments().parse_args()
    if args.regrade:
        _regrade(args)
        return
    if args.questions is None:
        raise PairError("--questions is missing. Name a JSONL or Parquet file of questions with known answers.")
    found = read_questions(existing_file(args.questions, "question file"), args.english_only)
    if args.against:
        Benchmark(existing_file(path, "benchmark file") for path in args.against).drop_from(found)
    if args.limit is not None:
        found.dropped["beyond_limit"] = max(0, len(found.questions) - args.limit)
        del found.questions[args.limit :]
    if args.merge is not None:
        output_folder(args.output, OUTPUT_FILES, args.questions)
        sampling = merge(args.output, _shard_journals(args.merge, args.output))
    else:
        make_client(args)  # raises for a wrong address before anything is written
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
    except (Interrupted, RunFailed, EndpointError):
        _finish(args, elicitation)
        raise
    _finish(args, elicitation)


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
            await client.find_context_length()
            await elicitation.run(client, grader, args.batch or args.concurrency, args.max_failures)
    finally:
        grader.close()


def _finish(args: argparse.Namespace, elicitation: Elicitation) -> None:
    """Write the outputs, print the summary, and warn of what a server did not do although it was asked to."""
    summary = elicitation.write_outputs(args.errors_include)
    print_summary(summary)
    answered = summary["correct"] + summary["errors"]
    if args.token_ids and answered and not summary["samples_with_token_ids"]:
        print(
            "warning: --token-ids was set, and no answer came with token_ids; the pairs will be tokenised from text. "
            "vLLM >= 0.10.2 and SGLang of 2026-07 return them.",
            file=sys.stderr,
        )
    same, compared = summary["questions_with_identical_samples"], summary["questions_with_several_samples"]
    if compared >= 5 and same == compared and args.temperature > 0:
        print(
            f"warning: the samples of all {compared} questions are identical although --temperature is "
            f"{args.temperature:g}; the server ignores it (transformers serve samples only where "
            "generation_config.json says do_sample).",
            file=sys.stderr,
        )


def _shard_journals(given: list[Path], output: Path) -> list[Path]:
    journals = given or sorted(output.glob("responses.shard-*-of-*.jsonl"))
    if not journals:
        raise PairError(f"{output}: holds no responses.shard-*.jsonl to merge. Name the shard journals after --merge.")
    return [existing_file(path, "shard's journal") for path in journals]


if __name__ == "__main__":
    run_program(main)
