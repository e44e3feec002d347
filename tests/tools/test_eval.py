"""The evaluation: what it samples, what it counts, how it fails. About 10 s."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spot_megatron.errors import PairError, WeightError
from spot_megatron.recipe import Evaluation
from tests.tools.pairs.support import oracle_server, run
from tools.eval.__main__ import main, make_plan, parser
from tools.eval.local import load_model
from tools.eval.questions import read_questions
from tools.eval.sample import Decoding, end_token_ids, prompt_ids, sample_responses
from tools.pairs.prompts import ELICIT_SUFFIX

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


def test_a_response_that_reaches_the_limit_is_cut(tiny):
    model, tokenizer = tiny
    decoding = Decoding(temperature=0.0, max_new_tokens=5)
    (response,) = sample_responses(model, tokenizer, ["4*2, 7*9"], decoding, seed=0)
    assert response.finish == "length"
    assert len(response.ids) == 5


def test_same_seed_same_responses_other_seed_others(tiny):
    model, tokenizer = tiny
    questions = ["4*2, 7*9, 8*6, 2*2"] * 8
    first, again, other = (sample_responses(model, tokenizer, questions, Decoding(), seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


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
        ('{"question": "1", "answer": "2", "skill": ["a"]}\n', ":1: `skill` is a list"),
        ('{"question": "1", "answer": "2"}\n{"question": "1", "answer": "2", "skill": 3}\n', ":2: `skill`"),
    ],
)
def test_a_bad_question_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(PairError, match=message):
        read_questions(path)


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
    assert re.search(f"argument {flags[0]}.*: must", capsys.readouterr().err)


def test_a_model_that_cannot_be_asked_is_named(tmp_path):
    """No end token; no chat template; no readable tokenizer."""
    for path in ASSETS.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(WeightError, match="no end token"):
        end_token_ids(load_model(tmp_path)[0])
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(WeightError, match="no chat template"):
        load_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightError, match=r"need the model's tokenizer.*copy"):
        load_model(tmp_path)


HELDOUT = [json.loads(line) for line in (ASSETS / "heldout.jsonl").read_text().splitlines()]


def questions_file(path: Path, *skills: str, count: int = 4) -> Path:
    rows = [row for skill in skills for row in [row for row in HELDOUT if row["skill"] == skill][:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(tmp_path: Path, *flags: str, output: str = "out") -> list[str]:
    asked = ["--model", str(ASSETS), "--questions", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / output)]
    return [*asked, "--max-new-tokens", "60", *flags]


def records(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    return sorted(
        ({k: row[k] for k in ("id", "sample", "response", "verdict", "finish_reason")} for row in rows),
        key=lambda row: (row["id"], row["sample"]),
    )


def test_base_and_model_are_asked_saved_and_compared(tmp_path, capsys):
    questions_file(tmp_path / "q.jsonl", "est", "kw")
    assert main(command(tmp_path, "--base", str(ASSETS), "--samples", "2", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out/evaluation.json").read_text())
    assert {name: score["total"] for name, score in printed["model"]["skills"].items()} == {"est": 8, "kw": 8}
    right = sum(row["verdict"] == "correct" for row in records(tmp_path / "out"))
    assert printed["model"]["benchmarks"]["questions"]["accuracy"] == right / 16 > 0.5
    assert printed["model"]["skills"] == printed["base"]["skills"]
    assert printed["differences"]["questions"]["difference"] == 0
    page = (tmp_path / "out/evaluation.html").read_text()
    assert "Accuracy in per cent" in page
    assert len(records(tmp_path / "out/base")) == 16


def test_a_stopped_evaluation_ends_with_the_answers_of_an_undisturbed_one(tmp_path, capsys):
    """Whole batches are redone, and what is on file stays; a cut-off last line is asked again."""
    questions_file(tmp_path / "q.jsonl", "products", "sum", count=6)
    flags = ("--temperature", "1.0", "--batch-size", "5", "--samples", "2")
    assert main(command(tmp_path, *flags)) == 0
    whole = records(tmp_path / "out")
    lines = (tmp_path / "out/responses.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("responses.jsonl.settings.json",):
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / name).write_bytes((tmp_path / "out" / name).read_bytes())
    (tmp_path / "again/responses.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:30])
    assert main(command(tmp_path, *flags, output="again")) == 0
    assert records(tmp_path / "again") == whole
    assert (tmp_path / "again/responses.jsonl").read_bytes().splitlines(keepends=True)[:7] == lines[:7]
    assert len({row["response"] for row in whole}) > 12


def test_an_evaluation_of_other_settings_weights_or_questions_is_not_continued(tmp_path, capsys):
    questions_file(tmp_path / "q.jsonl", "est", count=2)
    assert main(command(tmp_path)) == 0
    assert main(command(tmp_path, "--temperature", "0.1")) == 2
    assert "temperature: 0.7 then, 0.1 now" in capsys.readouterr().err
    for path in ASSETS.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert main(command(tmp_path, "--model", str(tmp_path))) == 2
    assert "weights" in capsys.readouterr().err
    rows = [
        json.loads(line) | {"question": "about 2*2+3*3"} for line in (tmp_path / "q.jsonl").read_text().splitlines()
    ]
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(command(tmp_path)) == 2
    assert "is on file with another text" in capsys.readouterr().err


def test_an_earlier_evaluation_is_the_base_if_it_asked_the_same(tmp_path, capsys):
    questions_file(tmp_path / "q.jsonl", "est", count=3)
    assert main(command(tmp_path, output="base")) == 0
    earlier = ("--base-evaluation", str(tmp_path / "base"))
    assert main(command(tmp_path, *earlier, "--json")) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        printed["base"]["benchmarks"]["questions"]["accuracy"]
        == printed["model"]["benchmarks"]["questions"]["accuracy"]
    )
    assert main(command(tmp_path, *earlier, "--greedy", output="greedy")) == 2
    assert "was sampled with temperature 0.7, and this run samples with 0.0" in capsys.readouterr().err
    questions_file(tmp_path / "q.jsonl", "est", "kw", count=3)
    assert main(command(tmp_path, *earlier)) == 2
    assert "must have been evaluated on the same files" in capsys.readouterr().err
    assert main(command(tmp_path, "--base-evaluation", str(tmp_path))) == 2
    assert "is not the folder of an evaluation" in capsys.readouterr().err


def test_a_server_is_asked_as_in_the_data_half(tmp_path, capsys):
    """Own-made rows of two benchmarks; a tenth of the calls fail; the closing instruction is elicitation's."""
    (tmp_path / "aime.jsonl").write_text('{"ID": "2024-I-1", "Problem": "4*2, 7*9", "Answer": 204}\n')
    questions_file(tmp_path / "q.jsonl", "products", count=10)
    with oracle_server("--fault-rate", "0.1", "--fixed-answer", r"so it is \boxed{204}.") as url:
        flags = ["--model", "oracle", "--base-url", url, "--benchmark", f"aime24={tmp_path / 'aime.jsonl'}", "--json"]
        flags += ["--backoff-seconds", "0.01", "--concurrency", "8"]
        code = main(command(tmp_path, *flags))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    asked = printed["model"]["benchmarks"]
    assert (asked["aime24"]["repeats"], asked["aime24"]["answered"]) == (16, 16)
    assert (asked["aime24"]["accuracy"], asked["questions"]["accuracy"]) == (1, 0)
    assert printed["model"]["usage"]["http_calls"] > 26
    plan = make_plan(parser().parse_args([*command(tmp_path), *flags]))
    suffixes = {
        asked.benchmark.name: plan.suffix_of(asked, item) for asked in plan.benchmarks for item in asked.items.values()
    }
    assert suffixes == {"aime24": ELICIT_SUFFIX, "questions": ""}  # the tiny grader's questions are asked as they are


def test_a_server_that_is_down_is_a_failure_with_a_remedy(tmp_path, capsys):
    questions_file(tmp_path / "q.jsonl", "est", count=1)
    flags = ["--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--wait-minutes", "0", "--max-failures", "1"]
    result = run("eval", *command(tmp_path, *flags), check=False)
    assert result.returncode == 1
    assert "repair the server and run the same command again" in result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--benchmark", "math50=f"), "'math50' is unknown; did you mean math500? Known: aime24"),
        (("--benchmark", "aime24"), "write NAME=FILE"),
        (("--benchmark", "aime24=none.jsonl"), "none.jsonl: cannot be read"),
        (("--benchmark", "questions=x"), "questions is given twice"),
        (("--model", "nowhere"), "nowhere: no config.json there"),
    ],
)
def test_mistakes_exit_with_2_and_name_the_remedy(tmp_path, capsys, flags, words):
    questions_file(tmp_path / "q.jsonl", "est", count=1)
    assert main(command(tmp_path, *flags)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_s_keys_are_flags():
    """tools.launch passes the one on as the other, and the sampling is the paper's in both."""
    keys = Evaluation().model_dump(exclude={"questions"})
    flags = vars(parser().parse_args(["--model", "m"]))
    assert set(keys) <= set(flags)
    for name in ("temperature", "top_p", "top_k", "batch_size"):
        assert flags[name] == keys[name]


def test_the_page_and_the_table_show_what_flipped(tmp_path, capsys):
    """The base is sampled at another temperature by hand: its journal is rewritten with wrong answers."""
    questions_file(tmp_path / "q.jsonl", "est", count=4)
    assert main(command(tmp_path, output="base")) == 0
    journal = tmp_path / "base/responses.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in rows[:3]:
        row |= {"verdict": "wrong", "response": "a wrong <b>answer</b>"}
    lines = ({key: value for key, value in row.items() if key != "crc32"} for row in rows)
    journal.write_text("".join(json.dumps(row) + "\n" for row in lines))
    capsys.readouterr()
    assert main(command(tmp_path, "--base-evaluation", str(tmp_path / "base"))) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("est"))
    assert "(1/4)" in line and "(4/4)" in line and "+75.0" in line
    page = (tmp_path / "out/evaluation.html").read_text()
    assert "3 questions that the trained model answers and the base does not" in page
    assert page.count("a wrong &lt;b&gt;answer&lt;/b&gt;") == 3
