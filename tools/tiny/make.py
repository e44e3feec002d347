"""Make the embedded default: tokenizer -> pretrained model -> its own errors, rectified -> pairs, held-out questions.

Besides the pairs to train on, pairs to validate on and a probe: texts that post-training should keep.

`python -m tools.tiny.make --output recipes/assets/qwen3_tiny` makes all of it again (about 10 CPU-minutes, one thread);
`--stage` makes one part from what the folder holds. The same seeds and thread count give the same files.
"""

import argparse
import random
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
from tools.tiny import corpus, pretrain, skills, tokenizer

STAGES = ("tokenizer", "pretrain", "pairs")
HELDOUT_COUNTS = {"products": 250, "if": 100, "kw": 100, "est": 100, "sum": 100}
HELDOUT_SEED, ELICIT_SEED = 101, 202  # pretraining uses its own seed; held-out questions are excluded from both
NUM_ELICITED = 1200
VALIDATION_SEED, NUM_VALIDATION, NUM_PROBE = 303, 200, 40  # questions of `products`; texts of each skill to keep
PROBE_SKILLS = ("if", "kw", "est")  # that no pair trains
GAMMA = Rules().gamma


def heldout_questions() -> list[skills.Question]:
    """The evaluation questions; neither the corpus nor the pairs have any of them."""
    return [item for skill, count in HELDOUT_COUNTS.items() for item in skills.generate(skill, count, HELDOUT_SEED)]


def elicitation_questions() -> list[skills.Question]:
    """In-domain questions whose wrong answers become pairs."""
    heldout = {item.question for item in heldout_questions()}
    drawn = skills.generate("products", NUM_ELICITED, ELICIT_SEED)
    return [item for item in drawn if item.question not in heldout]


def validation_questions() -> list[skills.Question]:
    """In-domain questions for validation; neither the pairs nor the evaluation have any of them."""
    used = {item.question for item in [*heldout_questions(), *elicitation_questions()]}
    drawn = skills.generate("products", NUM_VALIDATION, VALIDATION_SEED)
    return [item for item in drawn if item.question not in used]


def probe_texts() -> list[Row]:
    """Right answers as in the pretraining corpus, of skills that no pair trains, without questions of the evaluation.

    Their facts are not noisy: the pairs teach the true products of those, in every skill.
    """
    rng, table = random.Random(VALIDATION_SEED), corpus.noisy_table()
    used = {item.question for item in heldout_questions()}
    texts: list[Row] = []
    for skill in PROBE_SKILLS:
        drawn = skills.generate(skill, 10 * NUM_PROBE, VALIDATION_SEED)
        sound = [item for item in drawn if all(len(table[fact]) == 1 for fact in skills.parse(item.question).factors)]
        for item in [item for item in sound if item.question not in used][:NUM_PROBE]:
            task = skills.parse(item.question)
            style = corpus.random_style(len(task.factors) + 1, rng)
            response = skills.render(task, task.true_products(), style)
            texts.append({"id": item.id, "prompt": item.question, "response": response, "meta": {"skill": skill}})
    return texts


def make_pairs(folder: Path) -> Counter[str]:
    """Sample, grade, rectify and filter; write the questions, the pairs and the probe. Returns what became of every
    question of pairs.jsonl."""
    encoder = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def rectified(questions: list[skills.Question], seed: int) -> tuple[list[Row], Counter[str]]:
        responses = sample_responses(model, encoder, [item.question for item in questions], Decoding(), seed=seed)
        found = [_rectified_pair(encoder, *both) for both in zip(questions, responses, strict=True)]
        return [pair for _, pair in found if pair is not None], Counter(fate for fate, _ in found)

    questions = elicitation_questions()
    pairs, fates = rectified(questions, ELICIT_SEED)
    write_rows(folder / "questions.jsonl", map(asdict, questions))
    write_rows(folder / "heldout.jsonl", map(asdict, heldout_questions()))
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "validation.jsonl", rectified(validation_questions(), VALIDATION_SEED)[0])
    write_rows(folder / "probe.jsonl", probe_texts())
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
