"""Accuracy per skill: sample every question, grade every response, count."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from spot_megatron.data.template import load_tokenizer
from spot_megatron.errors import PairError, WeightError
from spot_megatron.files import Row
from tools.eval.questions import grade_row
from tools.eval.sample import Decoding, sample_responses
from tools.pairs.grade import CORRECT, TIMEOUT, UNDECIDED


def evaluate(
    model_dir: str | Path,
    questions: Sequence[Row],
    decoding: Decoding | None = None,
    samples: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Sample each question `samples` times from the HF model in `model_dir` and grade the responses.

    Returns `{"model", "seconds", "skills": {skill: {"correct", "total", "accuracy", "undecided", "cut"}}}`,
    accuracies as fractions in the questions' order of skills; `undecided` counts the responses that the grader could
    neither confirm nor disprove, which are not counted as correct, `cut` those that reached `decoding.max_new_tokens`.
    Raises WeightError when the folder holds no model, or no tokenizer and chat template to ask it with.
    """
    if not (Path(model_dir) / "config.json").is_file():
        raise WeightError(
            f"{model_dir}: no config.json there. Give a Hugging Face model folder (`make train` writes one)."
        )
    started = time.perf_counter()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokenizer = _tokenizer(Path(model_dir))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval().to(device)
    rows = [row for row in questions for _ in range(samples)]
    responses = sample_responses(model, tokenizer, [row["question"] for row in rows], decoding or Decoding(), seed)
    total: Counter[str] = Counter(row["skill"] for row in rows)
    correct: Counter[str] = Counter()
    undecided: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for row, response in zip(rows, responses, strict=True):
        verdict = grade_row(row, response.text)
        correct[row["skill"]] += verdict == CORRECT
        undecided[row["skill"]] += verdict in (UNDECIDED, TIMEOUT)
        cut[row["skill"]] += response.finish == "length"
    return {
        "model": str(model_dir),
        "seconds": time.perf_counter() - started,
        "skills": {
            skill: {
                "correct": correct[skill],
                "total": total[skill],
                "accuracy": correct[skill] / total[skill],
                "undecided": undecided[skill],
                "cut": cut[skill],
            }
            for skill in total
        },
    }


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = load_tokenizer(folder)
    except PairError as error:  # its remedy is for pairs
        raise WeightError(
            f"{folder}: questions need the model's tokenizer, which cannot be loaded ({error.__cause__}); copy "
            "tokenizer.json and tokenizer_config.json there"
        ) from None
    if tokenizer.chat_template is None:
        raise WeightError(
            f"{folder}: the tokenizer has no chat template, so questions cannot be asked as they are served; copy the "
            "instruct model's chat_template.jinja there"
        )
    return tokenizer


def table(model: dict[str, Any], base: dict[str, Any] | None) -> str:
    """The result as text: a line per skill, accuracies in percent with counts, and the difference to the base."""
    header = f"{'skill':<12}" + (f"{'base':>20}" if base else "") + f"{'model':>20}" + ("  difference" if base else "")
    lines = [header, "-" * len(header)]
    for skill, score in model["skills"].items():
        before = base["skills"][skill] if base else None
        line = f"{skill:<12}" + (_cell(before) if before else "") + _cell(score)
        if before:
            line += f"{100 * (score['accuracy'] - before['accuracy']):>+12.1f}"
        lines.append(line)
    for name, result in (("base", base), ("model", model)):
        num_cut = sum(score["cut"] for score in result["skills"].values()) if result else 0
        if num_cut:
            lines.append(f"{name}: {num_cut} responses reached the token limit and were graded as they stood")
        num_undecided = sum(score["undecided"] for score in result["skills"].values()) if result else 0
        if num_undecided:
            lines.append(f"{name}: {num_undecided} responses are undecided: neither confirmed nor disproved")
    return "\n".join(lines)


def _cell(score: dict[str, Any]) -> str:
    counts = f"({score['correct']}/{score['total']})"
    return f"{100 * score['accuracy']:>8.1f} {counts:>11}"
