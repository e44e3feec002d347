"""Question files in their published shapes. About 2 s."""

import gzip

import pyarrow
import pytest
from pyarrow import parquet

from spot_megatron.errors import PairError
from spot_megatron.files import write_rows
from tools.pairs.decontaminate import Benchmark
from tools.pairs.questions import Question, read_questions

DAPO_TEXT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $1+1$.\n\nSo: how much?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def dapo(text: str, index: str, answer: str = "2") -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def test_dapo_parquet_is_deduplicated_unwrapped_and_english(tmp_path):
    rows = [dapo(DAPO_TEXT, "u1")] * 3 + [dapo(DAPO_TEXT.replace("Find", "求"), "u2"), dapo("Plain?", "u3", "5")]
    path = tmp_path / "dapo.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_questions(path, english_only=True)
    assert found.questions == [
        Question("u1", "Find $1+1$.\n\nSo: how much?", "2"),
        Question("u3", "Plain?", "5", ({"role": "user", "content": "Plain?"},)),
    ]
    assert found.num_rows == 5
    assert found.dropped == {"duplicate": 2, "not_english": 1}
    assert len(read_questions(path).questions) == 3
    jsonl = tmp_path / "dapo.jsonl"
    write_rows(jsonl, rows)
    assert read_questions(jsonl, english_only=True) == found
    packed = tmp_path / "dapo.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    assert read_questions(packed, english_only=True) == found


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"id": 7, "question": "q", "answer": 12}, "q", "12"),
        ({"question": "q", "answer": "She has 3+4=<<3+4=7>>7.\n#### 7"}, "q", "7"),
        ({"problem": "q", "solution": r"so \boxed{3}", "answer": "3"}, "q", "3"),
        ({"prompt": "q", "solution": "34", "reward_model": {"ground_truth": "34"}}, "q", "34"),
        ({"question": "q", "answer": 0.5}, "q", "0.5"),
        ({"Problem": "q", "Solution": "so 3", "Answer": 3}, "q", "3"),  # AIME_2024
        ({"problem": "q", "solution": r"so $x$ is \boxed{\frac{1}{2}}"}, "q", r"so $x$ is \boxed{\frac{1}{2}}"),  # MATH
        ({"problem": "q", "solution": "so 3", "answer": "3", "unique_id": "u"}, "q", "3"),  # MATH-500
        ({"question": "q", "solution": ["by cases"], "final_answer": ["$2$", "$3$"]}, "q", "$2$, $3$"),  # OlympiadBench
        ({"question": "q", "final_answer": ["8"]}, "q", "8"),
        ({"question": "q", "answer": "", "ground_truth": "5"}, "q", "5"),
        ({"question": "q", "answer": "no solution"}, "q", "no solution"),
    ],
)
def test_published_shapes(tmp_path, row, question, answer):
    path = tmp_path / "q.jsonl"
    write_rows(path, [row])
    found = read_questions(path).questions[0]
    assert (found.question, found.answer) == (question, answer)
    assert found.id == "7" if "id" in row else found.id.startswith("q-")


def test_ids_from_content_survive_reordering(tmp_path):
    rows = [{"question": f"what is {n}?", "answer": n} for n in range(20)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", rows[::-1])
    first, second = (read_questions(tmp_path / name).questions for name in ("a.jsonl", "b.jsonl"))
    assert {q.question: q.id for q in first} == {q.question: q.id for q in second}
    assert len({q.id for q in first}) == 20


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 1}, "no question"),
        ({"question": " ", "answer": 1}, "question is empty"),
        ({"question": "q"}, "no answer"),
        ({"question": "q", "answer": True}, "`answer` is true or false"),
        ({"question": "q", "answer": [[1]]}, "`answer` must be a text, a number, or a list"),
        ({"question": "q", "answer": []}, "`answer` must be a text, a number, or a list"),
        ({"question": "q", "answer": {"value": 1}}, "`answer` is an object"),
        ({"question": "q", "answer": "NaN"}, "`answer` is 'NaN', which marks a missing value"),
        ({"question": "q", "answer": "null"}, "`answer` is 'null', which marks a missing value"),
        ({"question": "q", "final_answer": [""]}, "no answer"),
        ({"question": "q", "answer": "$ $"}, "`answer` is empty"),
        ({"question": "q", "answer": r"so \boxed{5"}, "`answer` has a .* that never closes"),
        ({"question": "q", "answer": "x" * 3000}, "`answer` has 3,000 characters"),
        ({"question": "q", "Answer": 1, "ANSWER": 2}, "both 'Answer' and 'ANSWER' are given"),
        (
            {
                "problem": "q",
                "solution": "We add both numbers and see that what we get is the number five in the end.",
            },
            "`solution` is prose .* without a box",
        ),
        ({"question": "q", "answer": " "}, "no answer"),
        ({"question": "q", "answer": 1, "id": [1]}, "id"),
        ({"prompt": [], "answer": 1}, "last is a user's turn"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": 1}, "last is a user's turn"),
        ({"prompt": 3, "answer": 1}, "must be (text|a string)"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, message):
    path = tmp_path / "q.jsonl"
    write_rows(path, [{"question": "fine", "answer": 1}, row])
    with pytest.raises(PairError, match=message) as caught:
        read_questions(path)
    assert f"{path}:2: " in str(caught.value)


def test_an_id_for_two_questions_and_an_empty_file_are_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    write_rows(path, [{"id": "a", "question": "q", "answer": 1}, {"id": "a", "question": "q", "answer": 2}])
    with pytest.raises(PairError, match=":2: id 'a' already belongs"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(PairError, match="holds no question"):
        read_questions(path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(PairError, match="Parquet"):
        read_questions(tmp_path / "bad.parquet")


def test_questions_of_a_benchmark_are_dropped_by_text_and_by_thirteen_words(tmp_path):
    words = [f"w{number}" for number in range(40)]
    benchmark = [{"problem": "What is $1 + 1$?"}, {"question": " ".join(words)}]
    write_rows(tmp_path / "benchmark.jsonl", benchmark)
    table = ["what is 1+1", " ".join(["x", *words[5:18], "y"]), " ".join(["x", *words[5:17], "y"]), "What is 1 + 2?"]
    write_rows(tmp_path / "q.jsonl", [{"question": text, "answer": 1} for text in table])
    found = read_questions(tmp_path / "q.jsonl")
    Benchmark([tmp_path / "benchmark.jsonl"]).drop_from(found)
    assert [question.question for question in found.questions] == table[2:]
    assert found.dropped == {"contaminated": 2}
