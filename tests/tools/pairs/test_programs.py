"""What the four programs share: wrong places for their output, signals, ids. About 20 s."""

import re
import signal
import subprocess
import time

import pytest

from spot_megatron.files import write_rows
from tests.tools.pairs.support import (
    ASSETS,
    ENVIRONMENT,
    ROOT,
    an_error,
    oracle_server,
    program,
    rows,
    run,
    write_questions,
)

ENDPOINT = ("--base-url", "http://127.0.0.1:9/v1", "--model", "m")


@pytest.fixture
def folder(tmp_path):
    """Inputs of every program, a folder `d` and a file `f` in its way, all in `tmp_path`."""
    write_questions(tmp_path / "questions.jsonl", 3)
    write_rows(tmp_path / "errors.jsonl", [an_error()])
    write_rows(tmp_path / "rectified.jsonl", [an_error(corrected="x")])
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grade", ("--input", "errors.jsonl", "--output", "d"), "is a folder"),
        ("grade", ("--input", "errors.jsonl", "--output", "f/x"), "cannot be made"),
        ("grade", ("--input", "errors.jsonl", "--output", "d/../errors.jsonl"), "would overwrite errors.jsonl"),
        ("grade", ("--input", "errors.jsonl", "--output", "/proc/none/x"), "cannot be made"),
        ("pairs", ("--rectified", "rectified.jsonl", "--output", "d"), "is a folder"),
        ("pairs", ("--rectified", "rectified.jsonl", "--output", "."), "is a folder"),
        ("pairs", ("--rectified", "rectified.jsonl", "--output", "rectified.jsonl"), "would overwrite rectified.jsonl"),
        ("pairs", ("--rectified", "rectified.jsonl", "--output", "p", "--report", "f/x"), "--report f/x: the folder f"),
        ("pairs", ("--rectified", "rectified.jsonl", "--output", "p", "--report", "p"), "would overwrite p"),
        ("elicit", ("--questions", "questions.jsonl", "--output", "f", *ENDPOINT), "cannot be made"),
        ("elicit", ("--questions", "errors.jsonl", "--output", ".", *ENDPOINT), "would overwrite errors.jsonl"),
        ("rectify", ("--errors", "errors.jsonl", "--output", "f/x", *ENDPOINT), "cannot be made"),
        ("rectify", ("--errors", "rectified.jsonl", "--output", ".", *ENDPOINT), "would overwrite rectified.jsonl"),
        ("rectify", ("--errors", "errors.jsonl", "--output", "o", "--export-human", "d"), "is a folder"),
        ("rectify", ("--errors", "errors.jsonl", "--output", "o", "--import-human", "none"), "no such file"),
    ],
)
def test_a_wrong_place_for_the_output_is_told_before_the_work(folder, name, options, message):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    options = (*options, "--tokenizer", ASSETS) if name == "pairs" else options
    result = subprocess.run(program(name, *options), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "number"), [("grade", signal.SIGINT), ("grade", signal.SIGTERM), ("pairs", signal.SIGTERM)]
)
def test_a_signal_leaves_nothing_in_part(tmp_path, name, number):
    table = [
        {"id": n, "question": f"expand {n}", "answer": f"a^2+{2 * n}a+{n * n}", "response": rf"\boxed{{(a+{n})^2}}"}
        for n in range(2, 5000)
    ]
    write_rows(tmp_path / "in.jsonl", ({**row, "corrected": row["response"]} for row in table))
    given = ("--input",) if name == "grade" else ("--tokenizer", ASSETS, "--rectified")
    options = (*given, tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    process = subprocess.Popen(program(name, *options), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "starts from the beginning" in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("second", "message"),
    [({}, "`id` is missing"), ({"id": True}, "`id` is missing"), ({"id": "1"}, "id '1' occurs twice")],
)
def test_every_graded_row_needs_its_own_id(tmp_path, second, message):
    answer = {"response": r"\boxed{5}", "answer": 5}
    write_rows(tmp_path / "in.jsonl", [{"id": 1, **answer}, {**second, **answer}])
    result = run("grade", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", check=False)
    assert result.returncode == 2
    assert f"in.jsonl:2: {message}" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
    write_rows(tmp_path / "in.jsonl", [{"id": 1, **answer}])
    run("grade", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert rows(tmp_path / "out.jsonl")[0]["id"] == 1


@pytest.mark.parametrize("name", ["elicit", "rectify", "pairs", "grade"])
def test_every_option_has_a_line_of_help_with_its_default(name):
    text = run(name, "--help").stdout
    options = re.split(r"\n  (?=-)", text)[1:]
    assert len(options) > 4
    for option in options:
        described = re.sub(r"\s+", " ", option)
        assert len(re.sub(r"--?[\w-]+|\[?[A-Z_]{2,}\S*|\{.*?\}", "", described).split()) >= 3, option
    shown = {"elicit": "(default: 0.7)", "rectify": "(default: 3)", "pairs": "(default: 8192)", "grade": "(default: 2)"}
    assert shown[name] in re.sub(r"\s+", " ", text)


def test_a_server_that_does_less_than_it_was_asked_to_is_noticed(tmp_path):
    write_questions(tmp_path / "q.jsonl", 6)
    base = ("--questions", tmp_path / "q.jsonl", "--output", tmp_path / "out", "--model", "m", "--samples", "2")
    with oracle_server("--fixed-answer", r"it is \boxed{1}") as url:
        result = run("elicit", *base, "--base-url", url, "--token-ids")
    assert "no answer came with token_ids" in result.stderr
    assert "samples of all 6 questions are identical" in result.stderr
    with oracle_server() as url:
        result = run("elicit", *base[:3], tmp_path / "other", *base[4:], "--base-url", url, "--prompt-suffix", "")
    assert "warning" not in result.stderr
