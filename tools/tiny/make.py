"""Make the embedded default: tokenizer -> pretrained model -> its own errors, rectified -> pairs, held-out questions.

`python -m tools.tiny.make --output recipes/assets/qwen3_tiny` makes all of it again (about 10 CPU-minutes, one thread);
`--stage` makes one part from what the folder holds. The same seeds and thread count give the same files.
"""

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from spot_megatron.files import Row, write_rows
from tools.eval.sample import Decoding, Response, sample_responses
from tools.pairs.filter import Rules
from tools.pairs.measures import measure
from tools.tiny import pretrain, skills, tokenizer

STAGES = ("tokenizer", "pretrain", "pairs")
HELDOUT_COUNTS = {"products": 250, "if": 100, "kw": 100, "est": 100, "sum": 100}
HELDOUT_SEED, ELICIT_SEED = 101, 202  # pretraining uses its own seed; held-out questions are excluded from both
NUM_ELICITED = 1200
GAMMA = Rules().gamma


def heldout_questions() -> list[skills.Question]:
    """The evaluation questions; neither the corpus nor the pairs have any of them."""
    return [item for skill, count in HELDOUT_COUNTS.items() for item in skills.generate(skill, count, HELDOUT_SEED)]


def elicitation_questions() -> list[skills.Question]:
    """In-domain questions whose wrong answers become pairs."""
    heldout = {item.question for item in heldout_questions()}
    drawn = skills.generate("products", NUM_ELICITED, ELICIT_SEED)
    return [item for item in drawn if item.question not in heldout]


def make_pairs(folder: Path) -> Counter[str]:
    """Sample, grade, rectify and filter; write questions.jsonl, heldout.jsonl and pairs.jsonl. Returns what became of
    every question."""
    encoder = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = elicitation_questions()
    responses = sample_responses(model, encoder, [item.question for item in questions], Decoding(), seed=ELICIT_SEED)
    fates: Counter[str] = Counter()
    pairs = []
    for item, response in zip(questions, responses, strict=True):
        fate, pair = _rectified_pair(encoder, item, response)
        fates[fate] += 1
        if pair is not None:
            pairs.append(pair)
    write_rows(folder / "questions.jsonl", map(asdict, questions))
    write_rows(folder / "heldout.jsonl", map(asdict, heldout_questions()))
    write_rows(folder / "pairs.jsonl", pairs)
    return fates


def _rectified_pair(
    encoder: PreTrainedTokenizerBase, item: skills.Question, response: Response
) -> tuple[str, Row | None]:
    """(what became of the response, the pair if one did)."""
    if skills.is_correct(item.question, response.text):
        return "already right", None
    rejected_ids = encoder(response.text, add_special_tokens=False)["input_ids"]
    if tuple(rejected_ids) != response.ids[: len(rejected_ids)]:
        return "its text encodes to other tokens", None
    chosen = skills.correct(item.question, response.text)
    chosen_ids = encoder(chosen, add_special_tokens=False)["input_ids"]
    change_ratio = measure(0, chosen_ids, rejected_ids).change_ratio
    if change_ratio > GAMMA:
        return f"changed more than {GAMMA}", None
    return "pair", {
        "id": item.id,
        "prompt": item.question,
        "chosen": chosen,
        "rejected": response.text,
        "chosen_finish": "stop",
        "rejected_finish": response.finish,
        "meta": {"answer": item.answer, "skill": item.skill, "change_ratio": round(change_ratio, 4)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.make", description=__doc__)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--stage", choices=STAGES, help="make only this part")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    stages = (options.stage,) if options.stage else STAGES
    if "tokenizer" in stages:
        tokenizer.save(options.output)
    if "pretrain" in stages:
        exclude = frozenset(item.question for item in heldout_questions())
        loss = pretrain.pretrain(options.output, pretrain.Settings(), exclude)
        print(f"pretrained: {loss:.4f} nats a response token")
    if "pairs" in stages:
        for fate, count in make_pairs(options.output).items():
            print(f"{count:5d}  {fate}")


if __name__ == "__main__":
    main()
