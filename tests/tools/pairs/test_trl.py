"""pairs.jsonl in TRL, by its own code: prompt, chosen and rejected arrive intact. About 30 s."""

import pytest

from spot_megatron.files import write_rows
from tests.tools.pairs.support import ASSETS, RIGHT, an_error, run

pytestmark = pytest.mark.slow
TALK = [
    {"role": "system", "content": "You are a tutor."},
    {"role": "user", "content": "Think of 3+4."},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "4*2, 7*9"},
]


@pytest.mark.parametrize("prompt", [None, TALK[3:], TALK], ids=["text", "one turn", "conversation"])
def test_trl_reads_the_pairs(tmp_path, prompt):
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    from transformers import AutoTokenizer

    rows = [an_error(f"q{n}", corrected=RIGHT.replace("then", word)) for n, word in enumerate(("then", "next"))]
    for row in rows:
        row |= {"prompt": prompt} if prompt else {}
    rows[0]["token_ids"] = [3, 1, 4]
    write_rows(tmp_path / "rectified.jsonl", rows)
    output = tmp_path / "pairs.jsonl"
    run("pairs", "--rectified", tmp_path / "rectified.jsonl", "--tokenizer", ASSETS, "--output", output)
    loaded = datasets.load_dataset("json", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    for row, line in zip(rows, loaded, strict=True):
        example = {key: line[key] for key in ("prompt", "chosen", "rejected")}
        assert data_utils.is_conversational(example) == (prompt is not None)
        texts = data_utils.maybe_apply_chat_template(example, tokenizer)
        if prompt is None:
            assert texts == {"prompt": row["question"], "chosen": row["corrected"], "rejected": row["response"]}
            continue
        rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert texts["prompt"] == rendered
        assert row["corrected"] in texts["chosen"]
        assert row["response"] in texts["rejected"]
