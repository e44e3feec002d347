"""The tiny model's committed assets, and how they are made. About 10 s on one core."""

import json
import math
import re
import shutil
from dataclasses import asdict

import pytest
from rapidfuzz.distance import LCSseq
from safetensors.torch import load_file

from tests.tools.test_tiny import ASSETS, TOKENIZER
from tools.eval.sample import prompt_ids
from tools.tiny import corpus, make, pretrain, skills
from tools.tiny.make import HELDOUT_COUNTS, elicitation_questions, heldout_questions
from tools.tiny.tokenizer import save


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text().splitlines()]


# ---- committed assets


def test_assets_are_small_and_name_no_path():
    files = list(ASSETS.iterdir())
    assert sum(file.stat().st_size for file in files) <= 2.5e6
    for file in files:
        if file.suffix != ".safetensors":
            assert not re.search(r"/(home|root|tmp|work|Users)/|https?://", file.read_text()), file.name


def test_committed_tokenizer_is_the_built_one(tmp_path):
    save(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (ASSETS / file.name).read_bytes(), file.name


def test_committed_weights_fit_the_config():
    config = json.loads((ASSETS / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["tie_word_embeddings"]) == ("qwen3", 371, True)
    tensors = load_file(ASSETS / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert tensors["model.embed_tokens.weight"].shape == (371, 96)
    assert "lm_head.weight" not in tensors
    generation = json.loads((ASSETS / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [368, 366]
    assert generation["pad_token_id"] == 366


def test_committed_pairs_are_the_oracles_and_valid():
    pairs = read("pairs.jsonl")
    questions = {item["id"]: item for item in read("questions.jsonl")}
    assert len(pairs) >= 400
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        item = questions[pair["id"]]
        assert pair["prompt"] == item["question"]
        assert pair["meta"]["answer"] == item["answer"]
        assert not skills.is_correct(pair["prompt"], pair["rejected"])
        assert skills.is_correct(pair["prompt"], pair["chosen"])
        assert pair["chosen"] == skills.correct(pair["prompt"], pair["rejected"])
        chosen, rejected = (TOKENIZER(pair[side])["input_ids"] for side in ("chosen", "rejected"))
        assert chosen[:4] == rejected[:4], "the first step's operands precede any edit"
        ratio = 1 - LCSseq.similarity(rejected, chosen) / len(chosen)
        assert pair["meta"]["change_ratio"] == pytest.approx(ratio, abs=1e-4)
        assert ratio <= 0.6
        assert pair["chosen_finish"] == "stop"


def test_committed_questions_are_the_generated_ones_and_heldout_is_disjoint():
    heldout, asked = read("heldout.jsonl"), read("questions.jsonl")
    assert heldout == [asdict(item) for item in heldout_questions()]
    assert asked == [asdict(item) for item in elicitation_questions()]
    assert {skill: sum(row["skill"] == skill for row in heldout) for skill in skills.SKILLS} == HELDOUT_COUNTS
    assert not {row["question"] for row in heldout} & {row["question"] for row in asked}
    assert {pair["id"] for pair in read("pairs.jsonl")} <= {row["id"] for row in asked}


def test_committed_validation_data_are_new_questions_and_what_the_model_keeps():
    pairs, probe = read("validation.jsonl"), read("probe.jsonl")
    trained_or_asked = {row["prompt"] for row in read("pairs.jsonl")} | {
        row["question"] for row in read("heldout.jsonl")
    }
    assert len(pairs) > 80
    assert {row["prompt"] for row in pairs} <= {item.question for item in make.validation_questions()}
    assert not {row["prompt"] for row in [*pairs, *probe]} & trained_or_asked
    for pair in pairs:
        assert pair["chosen"] == skills.correct(pair["prompt"], pair["rejected"])
        assert not skills.is_correct(pair["prompt"], pair["rejected"])
    assert probe == make.probe_texts()
    table = corpus.noisy_table()
    assert {
        skill: sum(row["meta"]["skill"] == skill for row in probe) for skill in ("if", "kw", "est")
    } == dict.fromkeys(make.PROBE_SKILLS, make.NUM_PROBE)
    for row in probe:
        assert skills.is_correct(row["prompt"], row["response"])
        assert all(len(table[fact]) == 1 for fact in skills.parse(row["prompt"]).factors)


# ---- pretraining


def test_labels_are_the_response_and_its_end_token():
    settings = pretrain.Settings(num_examples=8, batch_size=4)
    examples = list(corpus.examples(8, settings.seed, frozenset()))
    seen = []
    for ids, labels in pretrain.batches(TOKENIZER, settings, frozenset()):
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            start = next(index for index, target in enumerate(label) if target != pretrain.IGNORED)
            scored = [target for target in label if target != pretrain.IGNORED]
            assert row[start : start + len(scored)] == scored
            assert scored[-1] == TOKENIZER.eos_token_id
            assert set(row[start + len(scored) :]) <= {TOKENIZER.pad_token_id}
            seen.append((tuple(row[:start]), TOKENIZER.decode(scored[:-1])))
    assert sorted(seen) == sorted((tuple(prompt_ids(TOKENIZER, question)), answer) for question, answer in examples)


def test_pretraining_learns_and_is_reproducible(tmp_path):
    losses = []
    for name in ("first", "second"):
        save(tmp_path / name)
        losses.append(
            pretrain.pretrain(tmp_path / name, pretrain.Settings(num_examples=160, batch_size=16), frozenset())
        )
    assert losses[0] == losses[1]
    assert losses[0] < 5.5 < math.log(371)  # the mean over 10 steps, from about ln(vocabulary)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_pairs_stage_accounts_for_every_question(tmp_path, monkeypatch):
    """The pair stage on fewer questions: each is right or becomes a pair, or has a named reason."""
    for file in ASSETS.iterdir():
        if file.suffix != ".jsonl":
            shutil.copy(file, tmp_path)
    monkeypatch.setattr(make, "NUM_ELICITED", 40)
    monkeypatch.setattr(make, "NUM_VALIDATION", 20)
    fates = make.make_pairs(tmp_path)
    num_pairs = len((tmp_path / "pairs.jsonl").read_text().splitlines())
    assert sum(fates.values()) == len((tmp_path / "questions.jsonl").read_text().splitlines())
    assert fates["pair"] == num_pairs > 5
    assert fates["already right"] > 5
