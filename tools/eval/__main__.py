"""`python -m tools.eval --model DIR [--base DIR] --questions F.jsonl`: accuracy per skill, and the change from base."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

from spot_megatron.errors import UserError, positive_int, print_error
from spot_megatron.recipe import Evaluation
from tools.eval.accuracy import evaluate, table
from tools.eval.questions import read_questions
from tools.eval.sample import Decoding


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    transformers_logging.disable_progress_bar()
    decoding = Decoding(
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    try:
        questions = read_questions(options.questions)
        base = evaluate(options.base, questions, decoding, options.samples, options.seed) if options.base else None
        model = evaluate(options.model, questions, decoding, options.samples, options.seed)
    except UserError as error:
        return print_error(error)
    print(json.dumps({"base": base, "model": model}) if options.json else table(model, base))
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags; their defaults are those of the recipe's section `evaluation`."""
    parser = argparse.ArgumentParser(prog="python -m tools.eval", description=__doc__)
    parser.add_argument("--model", required=True, help="HF model folder")
    parser.add_argument("--base", help="HF model folder to compare with")
    parser.add_argument("--questions", required=True, type=Path, help="JSONL of {id, question, answer, skill}")
    parser.add_argument("--samples", type=positive_int, help="responses per question")
    parser.add_argument("--temperature", type=_bounded(0), help="0: greedy")
    parser.add_argument("--top-p", type=_bounded(1e-6, 1))
    parser.add_argument("--top-k", type=_not_negative, help="0: no limit")
    parser.add_argument("--greedy", action="store_true", help="the most likely token each time (temperature 0)")
    parser.add_argument("--max-new-tokens", type=positive_int, help="a longer response is cut, and graded as it stands")
    parser.add_argument("--batch-size", type=positive_int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(**Evaluation().model_dump(exclude={"questions"}))
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
    sys.exit(main())
