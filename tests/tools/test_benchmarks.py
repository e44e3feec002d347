"""Benchmarks: rows as published, graders, statistics, other programs' results. About 3 s; no model."""

import json
import math
import random

import pytest

from spot_megatron.errors import PairError
from tools.eval import ifeval, statistics
from tools.eval.answers import Mark, Plan
from tools.eval.benchmarks import BENCHMARKS, PAPER_ROWS
from tools.eval.grade import grade_item
from tools.eval.other_results import read_results
from tools.eval.questions import read_questions
from tools.pairs.grade import Grader

GPQA = {
    "Record ID": "rec1",
    "Question": "Which one?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "High-level domain": "Physics",
}


def read(tmp_path, name, *rows, seed=0):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(path, BENCHMARKS[name], seed)


@pytest.fixture(scope="module")
def grader():
    found = Grader()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("name", "row", "question", "answer"),
    [
        ("aime24", {"ID": "2024-I-1", "Problem": "p", "Solution": "s \\boxed{204}", "Answer": 204}, "p", "204"),
        (
            "aime24",
            {"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"},
            "p",
            "204",
        ),
        ("aime25", {"problem": "p", "answer": "70", "id": "0"}, "p", "70"),
        ("amc23", {"id": 0, "question": "p", "answer": 27.0, "url": "u"}, "p", "27.0"),
        (
            "math500",
            {"problem": "q", "solution": "long", "answer": "\\frac{1}{2}", "unique_id": "a.json"},
            "q",
            "\\frac{1}{2}",
        ),
        (
            "minerva",
            {"problem": "q", "solution": "so \\boxed{4.5e33}", "type": "t", "idx": 0},
            "q",
            "so \\boxed{4.5e33}",
        ),
        ("questions", {"problem": "q", "ground_truth": "4"}, "q", "4"),
        ("questions", {"prompt": [{"role": "user", "content": "t"}], "answer": 7}, "t", "7"),
    ],
)
def test_rows_are_read_as_published(tmp_path, name, row, question, answer):
    (item,) = read(tmp_path, name, row).items.values()
    assert (item.question.question, item.question.answer, item.grader) == (question, answer, "math")


def test_olympiadbench_is_its_english_questions_in_text(tmp_path):
    row = {"id": 1, "question": "r", "solution": ["a long text"], "final_answer": ["2", "3"], "language": "English"}
    rows = [
        row | {"context": "Let x."},
        row | {"id": 2, "modality": "Multimodal"},
        row | {"id": 3, "language": "Chinese"},
    ]
    found = read(tmp_path, "olympiadbench", *rows)
    assert [(i.question.question, i.question.answer) for i in found.items.values()] == [("Let x.\n\nr", "2, 3")]
    assert found.dropped == {"image": 1, "not_english": 1}


def test_gpqa_is_shuffled_by_the_seed_and_the_question(tmp_path, grader):
    rows = [GPQA | {"Record ID": f"rec{n}"} for n in range(40)]
    first, again, other = (read(tmp_path, "gpqa_diamond", *rows, seed=seed) for seed in (0, 0, 1))
    assert first.items == again.items != other.items
    assert {item.question.answer for item in first.items.values()} == set("ABCD")
    for item in first.items.values():
        letter = item.question.answer
        assert f"{letter}) right" in item.question.question
        for text in (
            f"\\boxed{{{letter}}}",
            f"\\boxed{{\\text{{{letter}}}}}",
            f"\\boxed{{({letter})}}",
            f"\\boxed{{{letter}) right}}",
        ):
            assert grade_item(item, text, "stop", grader).verdict == "correct", text
        wrong = "ABCD"[("ABCD".index(letter) + 1) % 4]
        assert grade_item(item, f"\\boxed{{{wrong}}}", "stop", grader).verdict == "wrong"
        assert grade_item(item, "\\boxed{right}", "stop", grader).verdict == "undecided"
        assert grade_item(item, "none", "length", grader).reason == "cut_off"


def test_gpqa_s_csv_is_read(tmp_path):
    path = tmp_path / "gpqa_diamond.csv"
    path.write_text(
        ",".join(f'"{key}"' for key in GPQA) + "\n" + ",".join(f'"{value}\nx"' for value in GPQA.values()) + "\n"
    )
    (item,) = read_questions(path, BENCHMARKS["gpqa_diamond"]).items.values()
    assert "right\nx" in item.question.question


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("gpqa_diamond", {"Question": "q"}, "'Correct Answer' is missing"),
        ("ifeval", {"prompt": "p"}, "must be lists of the same length"),
        (
            "ifeval",
            {"prompt": "p", "instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]},
            "did you mean punctuation:no_comma",
        ),
        ("ifeval", {"prompt": "p", "instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "lack `keywords`"),
        ("connect4", {"board": []}, "`board` must be"),
        ("aime24", {"question": "q"}, "no answer"),
    ],
)
def test_a_file_of_another_benchmark_is_refused_with_its_line(tmp_path, name, row, words):
    with pytest.raises(PairError, match=words) as refused:
        read(tmp_path, name, row)
    assert f"{name}.jsonl:1" in str(refused.value)


def test_ifeval_strict_and_loose(tmp_path, grader):
    row = {
        "key": 1000,
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{"num_words": None}, {}],
    }
    (item,) = read(tmp_path, "ifeval", row).items.values()
    marks = {"<<a>>\nno": "++", "<<a>>\nno, no": "~+", "Well, here: <<a>> yes, or": "-+", "": "--"}
    for text, expected in marks.items():
        verdict = grade_item(item, text, "stop", grader)
        assert (verdict.extracted, verdict.verdict) == (expected, "correct" if expected == "++" else "wrong")
    assert grade_item(item, "<think>a, b</think>\n\n<<a>>\nno", "stop", grader).verdict == "correct"
    levels = statistics._instruction_levels([Mark(extracted=text) for text in ("++", "~+", "-+")])
    assert levels == pytest.approx(
        {"prompt_strict": 1 / 3, "prompt_loose": 2 / 3, "instruction_strict": 4 / 6, "instruction_loose": 5 / 6}
    )


def test_the_averages_are_the_paper_s():
    """overall is the mean over nine benchmarks, not over three columns."""
    for in_domain, ood, instructions, overall in PAPER_ROWS.values():
        values = {statistics.IN_DOMAIN: in_domain, statistics.OUT_OF_DOMAIN: ood, statistics.INSTRUCTIONS: instructions}
        rows = {
            b.name: {"group": b.group, "accuracy": values[b.group]} for b in BENCHMARKS.values() if b.group in values
        }
        assert len(rows) == 9
        assert statistics.averages(rows)["overall"]["accuracy"] == pytest.approx(overall, abs=0.11)


def test_t_quantiles():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 499: 1.965}
    for degrees, value in known.items():
        assert statistics.t_quantile(degrees) == pytest.approx(value, rel=2e-3)


def test_pass_at_k_is_the_mean_over_all_draws():
    rng = random.Random(0)
    for samples, right in ((5, 2), (16, 1), (4, 4), (4, 0)):
        marks = [1] * right + [0] * (samples - right)
        for k in (1, 2, samples):
            draws = sum(any(rng.sample(marks, k)) for _ in range(4000)) / 4000
            assert statistics.pass_at(right, samples, k) == pytest.approx(draws, abs=0.03)


def test_majority_counts_right_spellings_as_one_answer():
    right = [Mark("correct", "1/2"), Mark("correct", "0.5")]
    assert statistics.majority([*right, Mark("wrong", "3"), Mark("wrong", "4")]) == 1
    assert statistics.majority([*right, Mark("wrong", "3"), Mark("wrong", "3 ")]) == 0.5
    assert statistics.majority([right[0], Mark("wrong", "3"), Mark("wrong", "3")]) == 0
    assert statistics.majority([right[0], Mark("no_answer"), Mark("no_answer")]) == 1


def test_the_error_is_clustered_by_question():
    """Sixteen equal samples of a question are one observation."""
    few = {str(q): [Mark("correct" if q % 2 else "wrong")] for q in range(10)}
    many = {name: marks * 16 for name, marks in few.items()}
    one, sixteen = (statistics.estimate(list(statistics.scores(marks).values())) for marks in (few, many))
    assert one == sixteen
    assert one.error == pytest.approx(math.sqrt(0.25 * 10 / 9 / 10))
    assert one.interval == pytest.approx((0.5 - 2.262 * one.error, 0.5 + 2.262 * one.error), rel=1e-3)


def test_paired_differences_need_less_than_the_unpaired(tmp_path):
    asked = read(tmp_path, "questions", *({"id": str(n), "question": f"q{n}", "answer": "1"} for n in range(8)))

    class Sampled:
        def __init__(self, right):
            self.plan = Plan((asked,), {"questions": 1})
            self.marks = {(f"questions/{n}", 0): Mark("correct" if n in right else "wrong") for n in range(8)}

    base, model = Sampled({0, 1, 2}), Sampled({0, 1, 2, 3, 4})
    found = statistics.compare(base, model, asked)
    assert found["difference"] == 0.25
    values = [0, 0, 0, 1, 1, 0, 0, 0]
    assert found["standard_error"] == pytest.approx(math.sqrt(sum((v - 0.25) ** 2 for v in values) / 7 / 8))
    del model.marks["questions/4", 0]
    assert statistics.compare(base, model, asked)["questions"] == 7


def test_results_of_other_programs_are_read(tmp_path):
    path = tmp_path / "results.json"
    lm_eval = {
        "results": {
            "aime24": {"alias": "aime24", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1},
            "ifeval": {"prompt_level_strict_acc,none": 0.8, "prompt_level_strict_acc_stderr,none": "N/A"},
            "hellaswag": {"acc,none": 0.3},
        },
        "model_name": "m",
    }
    path.write_text(json.dumps(lm_eval))
    (found,) = read_results(path)
    assert (found.label, found.scores) == ("m (lm-eval)", {"aime24": (0.5, 0.1), "ifeval": (0.8, None)})
    lighteval = {
        "config_general": {"model_name": "n"},
        "results": {"lighteval|gpqa:diamond|0": {"extractive_match": 0.4, "extractive_match_stderr": 0.02}, "all": {}},
    }
    path.write_text(json.dumps(lighteval))
    (found,) = read_results(path)
    assert (found.label, found.scores) == ("n (lighteval)", {"gpqa_diamond": (0.4, 0.02)})
    for text, words in (
        ("{", "cannot be read"),
        ('{"a": 1}', "has no `results`"),
        ('{"results": {"x": {}}}', "none of its tasks"),
    ):
        path.write_text(text)
        with pytest.raises(PairError, match=words):
            read_results(path)


def test_every_published_kind_of_instruction_has_a_checker():
    assert len(ifeval._CHECKS) == 25
