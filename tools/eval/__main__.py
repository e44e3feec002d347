"""`python -m tools.eval`: accuracy of a model, and the change from its base, on benchmarks or any questions.

Samples from OpenAI-compatible servers (--base-url, --against-url) or, without an address, from a model folder through
transformers. Writes DIR/responses.jsonl (the journal; DIR/base/responses.jsonl for the base), evaluation.json and
evaluation.html. Run the same command again to continue after any stop. The defaults are the paper's.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spot_megatron.errors import EXIT_DONE, EXIT_FAILURE, PairError, UserError, positive_int, print_error
from tools.eval.answers import JOURNAL, Answers, Plan
from tools.eval.benchmarks import BENCHMARKS, MAX_TOKENS, TEMPERATURE, TOP_K, TOP_P, find_benchmark
from tools.eval.evaluation import RESULT, ask_server, num_missing, plan_digest, result, weights_digest, write_result
from tools.eval.page import page
from tools.eval.questions import Items, read_questions
from tools.eval.table import table
from tools.pairs.cli import HelpFormatter, add_endpoint_options, make_client, output_folder, run_program
from tools.pairs.grade import Grader
from tools.pairs.journal import settings_file
from tools.pairs.sampling import Sampling


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        found = evaluate(args)
    except UserError as error:
        return print_error(error)
    print(json.dumps(found) if args.json else table(found))
    if missing := num_missing(found):
        print(f"{missing} samples have no answer and do not count; run again to ask again", file=sys.stderr)
    return EXIT_FAILURE if missing else EXIT_DONE


def evaluate(args: argparse.Namespace, parent: Path = Path("runs/eval")) -> dict[str, Any]:
    """Samples what is not yet on file, writes the result and the page, and returns the result.

    Without --output the folder lies in `parent` and is named by all that its answers depend on, weights included, so
    that a changed model is asked anew. Raises UserError, RunFailed or Interrupted.
    """
    plan = make_plan(args)
    sides = {"model": args.model} | ({"base": args.base} if args.base else {})
    weights = {name: local_weights(model, urls_of(args, name)) for name, model in sides.items()}
    names = [*sides.values(), *weights.values()]
    output = args.output or parent / plan_digest(plan, make_sampling(args, args.model), names)
    output_folder(output, (JOURNAL, RESULT), *(asked.path for asked in plan.benchmarks))
    print(f"responses, evaluation.json and evaluation.html: {output}", file=sys.stderr, flush=True)
    grader = Grader(args.grade_workers)
    try:
        base = None
        if args.base_evaluation:
            base = earlier_base(args, plan, grader)
        elif args.base:
            base = collect(args, "base", output / "base", plan, grader, weights["base"])
        model = collect(args, "model", output, plan, grader, weights["model"])
        found = result(model, base)
        write_result(output, found, page(found, model, base, args.results))
    finally:
        grader.close()
    return found


def make_plan(args: argparse.Namespace) -> Plan:
    """Reads every question file. Raises PairError for an unknown benchmark, or a file that is not one's."""
    files: list[tuple[str, Path]] = [("questions", args.questions)] if args.questions else []
    for text in args.benchmark:
        name, separator, path = text.partition("=")
        if not separator or not path:
            raise PairError(f"--benchmark {text!r}: write NAME=FILE. Known names: {', '.join(BENCHMARKS)}.")
        files.append((find_benchmark(name).name, Path(path)))
    if not files:
        raise PairError("nothing to ask: give --benchmark NAME=FILE, or --questions FILE.")
    names = [name for name, _ in files]
    if len(set(names)) < len(names):
        raise PairError(f"--benchmark {max(names, key=names.count)} is given twice; join the files, or evaluate twice.")
    found: list[Items] = [read_questions(path, BENCHMARKS[name], args.seed) for name, path in files]
    repeats = {name: args.samples or BENCHMARKS[name].repeats for name in names}
    if args.limit:
        for asked in found:
            asked.dropped["beyond_limit"] = max(0, len(asked.items) - args.limit)
            asked.items = dict(list(asked.items.items())[: args.limit])
    return Plan(tuple(found), repeats, args.prompt_suffix)


def urls_of(args: argparse.Namespace, side: str) -> list[str] | None:
    """The servers of one side, or None for a model folder."""
    return (args.against_url if side == "base" else None) or args.base_url


def local_weights(model: str, urls: list[str] | None) -> str | None:
    """The digest of a model folder that is not served. Raises WeightError where there is none."""
    if urls:
        return None
    from tools.eval.local import check_folder

    check_folder(Path(model))
    return weights_digest(Path(model))


def make_sampling(args: argparse.Namespace, model: str) -> Sampling:
    top_k = {"top_k": args.top_k} if args.top_k else {}
    return Sampling(
        model=model,
        temperature=0.0 if args.greedy else args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_new_tokens,
        thinking=args.thinking,
        seed=args.seed,
        extra_body={**top_k, **args.extra_body},
    )


def collect(
    args: argparse.Namespace, side: str, folder: Path, plan: Plan, grader: Grader, weights: str | None
) -> Answers:
    """One side's answers, after asking what is not yet on file."""
    name, urls = getattr(args, side), urls_of(args, side)
    answers = Answers(folder, plan, make_sampling(args, name), grader, weights)
    try:
        if urls:
            options = copy.copy(args)
            options.base_url, options.model, options.output = urls, name, folder
            ask_server(answers, lambda: make_client(options), args.batch or args.concurrency, args.max_failures, side)
        else:
            from tools.eval.local import answer_locally

            answer_locally(answers, Path(name), args.batch_size, label=side)
    finally:
        answers.close()
    return answers


def earlier_base(args: argparse.Namespace, plan: Plan, grader: Grader) -> Answers:
    """The base's answers from the folder of its own evaluation, which must have been sampled in the same way."""
    folder = args.base_evaluation
    side = settings_file(folder / JOURNAL)
    try:
        before: dict[str, Any] = json.loads(side.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PairError(f"--base-evaluation {folder}: is not the folder of an evaluation ({error}).") from None
    sampling = make_sampling(args, str(before.get("model")))
    base = Answers(folder, plan, sampling, grader, read_only=True)
    now = base.settings(before.get("weights"))
    changed = [key for key in now if key != "seed" and now[key] != before.get(key)]
    if changed:
        raise PairError(
            f"--base-evaluation {folder}: was sampled with {changed[0]} {before.get(changed[0])!r}, and this run "
            f"samples with {now[changed[0]]!r}. Sample both in the same way."
        )
    return base


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.eval", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--base", help="the model to compare with: a folder, or the name under which a server serves it"
    )
    parser.add_argument(
        "--against-url", nargs="+", metavar="URL", help="servers of the base (default: those of --base-url)"
    )
    parser.add_argument(
        "--base-evaluation", type=Path, metavar="DIR", help="compare with an earlier evaluation's --output"
    )
    parser.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help=f"one of {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="the same as --benchmark questions=FILE")
    parser.add_argument("--output", type=Path, help="folder (default: one below runs/eval, named by what is asked)")
    parser.add_argument(
        "--samples", "--repeats", type=positive_int, help="responses a question (default: the benchmark's)"
    )
    parser.add_argument("--limit", type=positive_int, help="ask the first N questions of each file only")
    parser.add_argument("--temperature", type=_bounded(0), default=TEMPERATURE, help="0: greedy")
    parser.add_argument("--top-p", type=_bounded(1e-6, 1), default=TOP_P)
    parser.add_argument("--top-k", type=_not_negative, default=TOP_K, help="0: no limit, and none is sent to a server")
    parser.add_argument("--greedy", action="store_true", help="the most likely token each time (temperature 0)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=MAX_TOKENS,
        help="a longer response is cut, and graded as it stands; less where the context ends before",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=128, help="of transformers; less where memory is short"
    )
    parser.add_argument(
        "--thinking", choices=("off", "on", "server"), default="off", help="enable_thinking of the template"
    )
    parser.add_argument("--prompt-suffix", help='closing instruction (default: the benchmark\'s); "" adds nothing')
    parser.add_argument("--seed", type=int, default=0, help="of the samples, and of the order of GPQA's choices")
    parser.add_argument("--grade-workers", type=positive_int, default=2, help="processes for answers that need algebra")
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="results of lm-eval or lighteval, for the page",
    )
    parser.add_argument("--json", action="store_true", help="print evaluation.json instead of the table")
    add_endpoint_options(parser, concurrency=256, takes_folder=True)
    return parser


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _bounded(low: float, high: float = math.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must lie between {low:g} and {high:g}")
        return value

    return number


if __name__ == "__main__":
    run_program(lambda: sys.exit(main()))
