"""The grader: verdicts, bounds on hostile answers, and its use from threads and as a program. About 20 s."""

import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spot_megatron.files import write_rows
from tests.tools.pairs.grading_cases import BOXED, WHOLE
from tests.tools.pairs.support import rows, run
from tools.pairs import grade as package_grade
from tools.pairs.boxes import final_boxes
from tools.pairs.grade import Grader, compare_at_once, grade
from tools.pairs.math_text import clean

TIME_LIMIT = 1.5


@pytest.fixture(scope="module")
def grader():
    grader = Grader(time_limit=TIME_LIMIT)
    yield grader
    grader.close()


@pytest.mark.parametrize(("given", "answer", "verdict"), BOXED, ids=lambda value: str(value)[:30])
def test_boxed_answers(grader, given, answer, verdict):
    started = time.monotonic()
    result = grader.grade(f"So the result is $\\boxed{{{given}}}$.", answer)
    assert result.verdict == verdict, result.reason
    assert result.extracted == given.strip()
    assert time.monotonic() - started < 4 * TIME_LIMIT + 10  # the clock's limit and, after a kill, a new worker's start


@pytest.mark.parametrize(
    ("response", "answer", "finish", "verdict", "reason"), WHOLE, ids=lambda value: str(value)[:30]
)
def test_whole_responses(grader, response, answer, finish, verdict, reason):
    started = time.process_time()
    result = grader.grade(response, answer, finish)
    assert (result.verdict, result.reason) == (verdict, reason)
    assert (result.extracted is None) == (verdict == "no_answer")
    assert time.process_time() - started < 1.0


def test_there_are_enough_cases_and_the_reference_rule_fails_many(capsys):
    """The public reference takes the last regex match, and equality of differently normalised strings."""

    def reference(given: str, answer: str, normalise) -> bool:
        found = re.findall(r"\\boxed\{([^}]+)\}", f"So \\boxed{{{given}}}.")
        return bool(found) and normalise(found[-1].strip()) == normalise(answer)

    decided = [
        (given, answer, verdict == "correct") for given, answer, verdict in BOXED if verdict in ("correct", "wrong")
    ]
    exact = sum(reference(given, answer, str) == right for given, answer, right in decided)
    loose = sum(
        reference(given, answer, lambda text: text.replace("\\", "").replace(" ", "").lower()) == right
        for given, answer, right in decided
    )
    with capsys.disabled():
        print(
            f"\n[{len(decided)} answers: the reference's rules get {exact} and {loose} right, this grader all]", end=""
        )
    assert len(BOXED) + len(WHOLE) >= 150
    assert max(exact, loose) < 0.7 * len(decided)


def test_the_package_offers_grade():
    assert package_grade is grade
    assert grade(r"\boxed{5}", "5").verdict == "correct"
    assert grade(r"\boxed{6}", "5").verdict == "wrong"


def test_a_decided_comparison_is_cached(grader):
    started = time.monotonic()
    first = grader.grade(r"\boxed{(x+3)^2}", "x^2+6x+9")
    second = grader.grade_at_once(r"now \boxed{(x+3)^2}", "x^2+6x+9")
    assert first == second
    assert first.extracted == "(x+3)^2"
    assert first.reason == "same_mathematics"
    assert time.monotonic() - started < 30


def test_the_cache_forgets_its_oldest_entries():
    grader = Grader(cache_size=2)
    for number in range(4):
        grader.grade(rf"\boxed{{(x+{number + 1})^2}}", "x")
    assert len(grader._cache) == 2
    grader.close()


def test_threads_share_a_pool(grader):
    cases = [(rf"\boxed{{\sqrt{{{4 * n * n}}}\cdot y}}", f"{2 * n} y" if n % 2 else "y z") for n in range(1, 21)]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda case: grader.grade(*case).verdict, cases))
    assert verdicts == ["correct", "wrong"] * 10


def test_a_killed_worker_is_replaced():
    grader = Grader(time_limit=0.5)
    assert grader.grade(r"\boxed{9^{9^{9^9}}}", "8").verdict == "timeout"
    assert grader.grade(r"\boxed{2x+x}", "3x").verdict == "correct"
    worker = grader._workers.get()
    threading.Timer(0.3, worker._process.kill).start()
    verdict = worker.compare("9^{9^{9^9}}", "8")
    assert verdict[0] == "timeout"
    grader._workers.put(worker)
    assert grader.grade(r"\boxed{2z+z}", "3z").verdict == "correct"
    grader.close()


def test_a_worker_is_timed_by_its_own_cpu_time_and_not_by_the_clock():
    grader = Grader(time_limit=0.5)
    worker = grader._workers.get()
    assert worker.compare("2x", "x+x")[0] == "correct"
    process = worker._process
    for seconds, number in ((0.2, signal.SIGSTOP), (3.0, signal.SIGCONT)):
        threading.Timer(seconds, process.send_signal, [number]).start()
    assert worker.compare("9^{9^{9^9}}", "8") == ("timeout", "time_limit")
    assert process.returncode == -signal.SIGPROF
    worker.close()


def test_search_is_linear_in_hostile_text():
    for unit in ("\\", "{", "}", r"\boxed{", r"\boxed{a}", "\\\\", r"\{", "box"):
        started = time.process_time()
        final_boxes(unit * (2_000_000 // len(unit)))
        assert time.process_time() - started < 1.0, unit


def test_cleaning_is_idempotent():
    for given, answer, _ in BOXED:
        for text in (given, answer):
            assert clean(clean(text)) == clean(text)


def test_comparison_as_text_never_contradicts_itself():
    """Equal texts are right whatever they hold."""
    for text in filter(None, (clean(given) for given, _, _ in BOXED)):
        assert compare_at_once(text, text) == ("correct", "same_text")


def test_program_keeps_order_and_names_bad_lines(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(
        source,
        [
            {"id": 1, "response": r"\boxed{5}", "answer": 5},
            {"id": "b", "response": r"\boxed{(a+b)^2}", "answer": "a^2+2ab+b^2"},
            {"id": "c", "response": "none", "answer": "1", "finish_reason": "length"},
        ],
    )
    result = run("grade", "--input", source, "--output", target)
    assert [(row["id"], row["verdict"], row["reason"]) for row in rows(target)] == [
        (1, "correct", "same_text"),
        ("b", "correct", "same_mathematics"),
        ("c", "no_answer", "cut_off"),
    ]
    assert "correct 2" in result.stdout

    source.write_text('{"id": 1, "response": "x"}\n')
    result = run("grade", "--input", source, "--output", target, check=False)
    assert result.returncode == 2
    assert ":1: " in result.stderr
    assert "answer" in result.stderr
    assert len(rows(target)) == 3  # the former output is still whole
