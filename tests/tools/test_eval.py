"""The evaluation: what it samples, what it counts, how it fails. About 10 s."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spot_megatron.errors import PairError, WeightError
from spot_megatron.recipe import Evaluation
from tools.eval.__main__ import main, parser
from tools.eval.accuracy import evaluate, table
from tools.eval.questions import grade_row, read_questions
from tools.eval.sample import Decoding, end_token_ids, prompt_ids, sample_responses

ASSETS = Path(__file__).parents[2] / "recipes/assets/qwen3_tiny"
GREEDY = Decoding(temperature=0.0)


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        ASSETS
    )


def test_batched_greedy_equals_step_by_step_argmax(tiny):
    """Padding, sorting by length and batching change no response."""
    model, tokenizer = tiny
    questions = ["4*2, 7*9, 8*6, 2*2", "about 7*8+6*9", "[loud] 4*2, 7*9", "3*3, 2*4"]
    responses = sample_responses(model, tokenizer, questions, Decoding(temperature=0.0, batch_size=3), seed=0)
    for question, response in zip(questions, responses, strict=True):
        ids = prompt_ids(tokenizer, question)
        expected: list[int] = []
        with torch.inference_mode():
            while not expected or expected[-1] not in end_token_ids(model):
                logits = model(torch.tensor([ids + expected])).logits
                expected.append(int(logits[0, -1].argmax()))
        assert list(response.ids) == expected
        assert response.finish == "stop"
        assert response.text == tokenizer.decode(expected[:-1])


def test_a_response_that_reaches_the_limit_is_cut_and_counted(tiny):
    model, tokenizer = tiny
    decoding = Decoding(temperature=0.0, max_new_tokens=5)
    (response,) = sample_responses(model, tokenizer, ["4*2, 7*9"], decoding, seed=0)
    assert response.finish == "length"
    assert len(response.ids) == 5
    rows = [{"id": "a", "question": "4*2, 7*9", "answer": "8,63", "skill": "products", "grader": "tiny"}]
    result = evaluate(ASSETS, rows, decoding)
    assert result["skills"]["products"] == {"correct": 0, "total": 1, "accuracy": 0.0, "undecided": 0, "cut": 1}
    assert "model: 1 responses reached the token limit" in table(result, None)


def test_same_seed_same_responses_other_seed_others(tiny):
    model, tokenizer = tiny
    questions = ["4*2, 7*9, 8*6, 2*2"] * 8
    first, again, other = (sample_responses(model, tokenizer, questions, Decoding(), seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_evaluate_counts_samples_per_skill():
    rows = read_questions(ASSETS / "heldout.jsonl")
    some = [row for skill in ("est", "kw") for row in rows if row["skill"] == skill][95:105]
    result = evaluate(ASSETS, some, samples=2)
    assert {skill: score["total"] for skill, score in result["skills"].items()} == {"est": 10, "kw": 10}
    for score in result["skills"].values():
        assert score["accuracy"] == score["correct"] / score["total"]


def test_rows_without_a_grader_are_graded_as_mathematics():
    row = {"question": "half of one?", "answer": "0.5", "skill": "all"}
    assert grade_row(row, "so it is \\boxed{\\frac{1}{2}}.") == "correct"
    assert grade_row(row, "so it is \\boxed{2}.") == "wrong"
    assert grade_row(row, "so it is \\boxed{0.51}.") == "undecided"
    products = {"question": "4*2, 7*9", "answer": "8,63", "skill": "products"}
    assert grade_row({**products, "grader": "tiny"}, "\\boxed{63,8}") == "wrong"
    assert grade_row(products, "\\boxed{63,8}") == "correct"  # a skill's name alone says nothing of the grader


def test_questions_are_read_as_the_pair_tools_read_them(tmp_path):
    """AIME_2024, MATH-500 and OlympiadBench as published."""
    path = tmp_path / "questions.jsonl"
    rows = [
        {"ID": "2024-I-1", "Problem": "p", "Solution": "s \\boxed{204}", "Answer": 204},
        {"problem": "q", "solution": "long", "answer": "\\frac{1}{2}", "subject": "Algebra"},
        {"question": "r", "solution": ["a long text"], "final_answer": ["2", "3"]},
        {"prompt": [{"role": "user", "content": "t"}], "answer": 7},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions(path)
    assert [(row["question"], row["answer"]) for row in found] == [
        ("p", "204"),
        ("q", r"\frac{1}{2}"),
        ("r", "2, 3"),
        ("t", "7"),
    ]
    assert {row["skill"] for row in found} == {"all"}


def test_table_shows_counts_and_the_difference():
    base = {"skills": {"products": {"correct": 5, "total": 10, "accuracy": 0.5, "undecided": 0, "cut": 0}}}
    model = {"skills": {"products": {"correct": 9, "total": 10, "accuracy": 0.9, "undecided": 3, "cut": 0}}}
    *_, line, remark = table(model, base).splitlines()
    assert remark.startswith("model: 3 responses are undecided")
    assert line.split() == ["products", "50.0", "(5/10)", "90.0", "(9/10)", "+40.0"]


def test_command_prints_json_for_both_models(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"id": 1, "question": "about 2*2+3*3", "answer": "10", "skill": "est"}) + "\n")
    arguments = ["--model", str(ASSETS), "--base", str(ASSETS), "--questions", str(path), "--greedy", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["base"]["skills"] == printed["model"]["skills"]
    assert printed["model"]["skills"]["est"]["total"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ('{"question": "1"}\n', ":1: "),
        ('{"question": "1", "answer": "2"}\nnot json\n', ":2: "),
        ('{"question": 1, "answer": "2"}\n', ":1: the prompt must be text"),
        ('{"question": "1", "answer": NaN}\n', ":1: "),
        ('{"question": "1", "answer": "null"}\n', ":1: `answer` is 'null'"),
        ('{"question": "1", "answer": "2", "grader": "mine"}\n', ":1: `grader` is 'mine'; known are tiny"),
        (
            '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "answer": "2"}\n',
            ":1: several turns or tools",
        ),
        ('{"question": "1", "answer": "2", "skill": ["a"]}\n', ":1: `skill` is a list"),
        ('{"question": "1", "answer": "2"}\n{"question": "1", "answer": "2", "skill": 3}\n', ":2: `skill`"),
    ],
)
def test_a_bad_question_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(PairError, match=message):
        read_questions(path)


def test_wrong_paths_exit_with_2_and_no_traceback(tmp_path, capsys):
    questions = str(ASSETS / "heldout.jsonl")
    with pytest.raises(WeightError, match="no config"):
        evaluate(tmp_path, [])
    assert main(["--model", str(tmp_path), "--questions", questions]) == 2
    assert main(["--model", str(ASSETS), "--questions", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--samples", "0"),
        ("--batch-size", "0"),
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--top-p", "0"),
        ("--top-p", "nan"),
        ("--top-k", "-1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--model", str(ASSETS), "--questions", str(ASSETS / "heldout.jsonl"), *flags])
    assert refused.value.code == 2
    assert f"argument {flags[0]}: must" in capsys.readouterr().err


def test_the_recipe_s_keys_are_the_flags():
    """tools.launch passes the one on as the other, and the defaults are those of the paper's decoding."""
    keys = Evaluation().model_dump(exclude={"questions"})
    flags = vars(parser().parse_args(["--model", "m", "--questions", "q"]))
    assert {key: flags[key] for key in keys} == keys
    assert Decoding(**{key: value for key, value in keys.items() if key != "samples"}) == Decoding()


def test_a_model_that_cannot_be_asked_is_named(tmp_path):
    """No end token; no chat template; no readable tokenizer."""
    for path in ASSETS.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    question = [{"question": "4*2", "answer": "8", "skill": "all"}]
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(WeightError, match="no end token"):
        evaluate(tmp_path, question)
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(WeightError, match="no chat template"):
        evaluate(tmp_path, question)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightError, match=r"need the model's tokenizer.*copy"):
        evaluate(tmp_path, question)
