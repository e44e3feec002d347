"""Texts of a probe: rendered and ended like the chosen side of a pair, and packed as one sequence each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spot_megatron.data.pack import build_pack, num_positions
from spot_megatron.data.records import read_pairs, read_probe
from spot_megatron.data.template import check_vocabulary, load_tokenizer, tokenize_pairs
from spot_megatron.errors import PairError

MODEL = Path(__file__).parents[2] / "recipes/assets/qwen3_tiny"


def write(folder: Path, *rows: dict) -> Path:
    file = folder / "probe.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def test_a_text_is_tokenised_as_the_chosen_side_of_a_pair(tmp_path, tokenizer):
    lines = [json.loads(line) for line in (MODEL / "pairs.jsonl").read_text().splitlines()[:8]]
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in lines]
    texts = tokenize_pairs(read_probe(write(tmp_path, *rows)), tokenizer, 256, False)
    pairs = tokenize_pairs(read_pairs([MODEL / "pairs.jsonl"])[:8], tokenizer, 256, False).pairs
    assert not texts.dropped
    for text, pair in zip(texts.pairs, pairs, strict=True):
        assert np.array_equal(text.prompt_ids, pair.prompt_ids)
        assert np.array_equal(text.chosen_ids, pair.chosen_ids)
        assert len(text.rejected_ids) == 0
    check_vocabulary(texts.pairs, 371, "")


def test_a_pack_of_texts_holds_one_sequence_each(tmp_path):
    rows = [{"prompt_ids": [1, 2, 3], "response_ids": [4, 5]}, {"prompt_ids": [6], "response_ids": [7, 8, 9]}]
    texts = read_probe(write(tmp_path, *rows))
    pack = build_pack(texts, [0, 1], "shared", 4, 0)
    assert [num_positions(text, "shared") for text in texts] == [5, 4]
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert pack.cu_main.tolist() == [0, 5, 9, 12]
    assert (pack.num_suffix, pack.cu_suffix_q.tolist()) == (0, [0])
    assert pack.head_position.tolist() == [2, 3, 5, 6, 7]
    assert pack.head_target.tolist() == [4, 5, 7, 8, 9]
    assert pack.num_rejected.tolist() == [0, 0]


def test_a_cut_text_has_no_end_token(tmp_path, tokenizer):
    row = {"prompt": "4*2", "response": "first 4*2=8."}
    whole, cut = (
        tokenize_pairs(read_probe(write(tmp_path, {**row, **more})), tokenizer, 256, False).pairs[0].chosen_ids
        for more in ({}, {"response_finish": "length"})
    )
    assert whole.tolist() == [*cut.tolist(), tokenizer.eos_token_id]


def test_dropped_texts_are_counted(tmp_path, tokenizer):
    rows = [
        {"id": "long", "prompt": "4*2", "response": "8 " * 300},
        {"id": "ends", "prompt": "4*2", "response": "8<|im_end|>8"},
        {"id": "good", "prompt": "4*2", "response": "8"},
    ]
    found = tokenize_pairs(read_probe(write(tmp_path, *rows)), tokenizer, 256, False)
    assert found.dropped == {"too_long": ["long"], "end_token_inside": ["ends"]}
    assert [pair.id for pair in found.pairs] == ["good"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, 'probe.jsonl:1: key "response" is missing'),
        ({"prompt": "a", "response": " "}, '"response" is empty'),
        ({"prompt": "a", "response": "b", "respones": "c"}, 'did you mean "response"'),
        ({"prompt": "a", "response": "b", "image": "c"}, '"image" would change the prompt'),
        ({"prompt_ids": [1], "response": "b"}, 'key "response_ids" is missing'),
        ({"prompt_ids": [1], "response_ids": []}, '"response_ids" is empty'),
    ],
)
def test_mistakes_name_line_and_key(tmp_path, row, message):
    with pytest.raises(PairError, match=message):
        read_probe(write(tmp_path, row))
