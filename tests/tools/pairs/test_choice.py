"""Which errors are rectified, and in flat memory. About 10 s."""

import json
import subprocess
import sys

import pytest

from spot_megatron.errors import PairError
from spot_megatron.files import write_rows
from tests.tools.pairs.support import ENVIRONMENT, RIGHT, ROOT, an_error, marked, oracle_server, rectify, rows, run
from tests.tools.pairs.support import write_questions as make_questions
from tools.oracle.http_server import Answer
from tools.pairs.limits import Prices
from tools.pairs.oracle import Choice, ErrorFile, Oracle
from tools.pairs.rectify import Rectification


def table(count: int = 40) -> dict:
    """Four errors of each of ten questions, whose pass rates are 0.0, 0.1, ..., 0.9."""
    return {
        f"q{n // 4}#{n % 4}": an_error(f"q{n // 4}#{n % 4}", question_id=f"q{n // 4}", pass_rate=n // 4 / 10)
        for n in range(count)
    }


def test_the_order_is_shuffled_by_the_seed():
    errors = table()
    orders = [Choice(seed=seed).sort(errors)[0] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(errors) != orders[0]
    assert Choice().sort(errors)[0] == list(errors)


def test_pass_rates_and_one_error_a_question():
    chosen, left_out = Choice((0.1, 0.3), one_per_question=True, seed=3).sort(table())
    assert sorted(name.split("#")[0] for name in chosen) == ["q1", "q2", "q3"]
    assert left_out == {"pass_rate": 28, "another_of_its_question": 9}
    drawn = {name for seed in range(9) for name in Choice(one_per_question=True, seed=seed).sort(table(4))[0]}
    assert len(drawn) > 1
    with pytest.raises(PairError, match="`pass_rate`"):
        Choice((0.1, 0.9)).sort({"a": an_error("a")})


def test_errors_that_are_not_chosen_are_rejected_with_that_reason(tmp_path):
    choice = Choice((0.1, 0.1), one_per_question=True, seed=1)
    summary = rectify(tmp_path, table(), lambda *_: Answer(marked(RIGHT)), choice=choice)
    assert summary["rectified"] == 1
    assert summary["rejected"] == {"not_chosen": 39}
    assert summary["not_chosen"] == {"pass_rate": 36, "another_of_its_question": 3}


def test_elicitation_writes_pass_rates(tmp_path):
    make_questions(tmp_path / "q.jsonl", 12)
    base = ("--questions", tmp_path / "q.jsonl", "--output", tmp_path / "out", "--prompt-suffix", "")
    with oracle_server("--wrong-rate", "0.5") as url:
        run("elicit", *base, "--base-url", url, "--model", "oracle", "--samples", "4")
    graded = [row for name in ("correct", "errors") for row in rows(tmp_path / f"out/{name}.jsonl")]
    for row in graded:
        same = [other for other in graded if other["question_id"] == row["question_id"]]
        assert row["pass_rate"] == sum(other["verdict"] == "correct" for other in same) / 4


def test_the_estimate_counts_what_is_open(tmp_path):
    errors = {name: an_error(name) for name in ("a", "b")}
    rectification = Rectification(tmp_path, errors, Oracle("m"), 3, Prices(1.0, 10.0))
    estimate = rectification.estimate()
    rectification.journal.close()
    assert estimate["requests"] == 2
    assert 300 < estimate["prompt_tokens"] < 2000
    assert estimate["usd"] == round((estimate["prompt_tokens"] + 10 * estimate["completion_tokens"]) / 1e6, 2)


MEMORY = """
import resource, sys
from pathlib import Path
from tools.pairs.limits import Prices
from tools.pairs.oracle import Choice, ErrorFile, Oracle
from tools.pairs.rectify import Rectification
def used():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = used()
errors = ErrorFile(Path(sys.argv[1]))
rectification = Rectification(Path(sys.argv[2]), errors, Oracle("m"), 3, Prices(), choice=Choice(seed=1))
print((used() - before) / len(errors))
"""


def test_an_error_takes_little_memory_however_long_it_is(tmp_path):
    write_rows(tmp_path / "errors.jsonl", (an_error(f"q{n}", token_ids=list(range(4000))) for n in range(3000)))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "errors.jsonl"), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1500


def test_rows_are_read_again_from_their_places(tmp_path):
    path = tmp_path / "errors.jsonl"
    write_rows(path, [an_error(f"q{n}", token_ids=[n]) for n in range(5)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n"))
    errors = ErrorFile(path)
    assert [errors[name]["token_ids"] for name in ("q4", "q0", "q2")] == [[4], [0], [2]]
    assert list(errors) == [f"q{n}" for n in range(5)]
    assert json.dumps(errors["q1"]) == json.dumps({**an_error("q1"), "token_ids": [1]})
