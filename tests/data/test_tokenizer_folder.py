"""Tokenizers as model folders hold them, and their vocabulary. Takes about 4 s."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerBase

from spot_megatron.data.template import check_vocabulary, load_tokenizer
from spot_megatron.errors import PairError
from tests.data.conftest import CHAT_TEMPLATE
from tests.data.pairs import pair, token_pair, tokenize


def test_vocabulary() -> None:
    pairs = [token_pair([1], [2], [3]), token_pair([1], [2], [11], id="b")]
    check_vocabulary(pairs, 12, "config.json")
    with pytest.raises(PairError, match=r"pairs\.jsonl:1: pair b holds token id 11.* of 12; the model's has 11 \(here"):
        check_vocabulary(pairs, 11, "here")


def test_tokenizers_load_from_their_folder(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_tokenizer(Path(tokenizer.name_or_path))
    assert (
        tokenize(loaded, pair()).pairs[0].prompt_ids.tolist()
        == tokenize(tokenizer, pair()).pairs[0].prompt_ids.tolist()
    )


@pytest.mark.parametrize("content", [None, "{cut", "{}"])
def test_a_folder_without_a_whole_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(PairError, match=r"the tokenizer cannot be loaded.*copy the model's tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_pad_token_beyond_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    folder = Path(tokenizer.name_or_path)
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.pad_token_id}))
    with pytest.raises(PairError, match=r'<\|endoftext\|> is token id 258, beyond .* 258; set "pad_token" in'):
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.pad_token_id + 1}))
    load_tokenizer(folder)


def test_a_folder_with_only_a_sentencepiece_model(tmp_path: Path) -> None:
    """Ids are sentencepiece's own, the turn end is the template's control token."""
    sentences = [
        f"What is {a} times {b}? It is {a * b}, so the answer is {a * b}." for a in range(30) for b in range(30)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, control_symbols=["<|im_start|>", "<|im_end|>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tokens,) = tokenize(tokenizer, pair(chosen="It is  4 é.", rejected="It is\n5.")).pairs
    end = processor.piece_to_id("<|im_end|>")
    assert tokens.chosen_ids.tolist() == [*processor.encode("It is  4 é."), end]
    assert tokens.rejected_ids.tolist() == [*processor.encode("It is\n5."), end]
    assert tokens.prompt_ids.tolist()[0] == processor.piece_to_id("<|im_start|>")
    assert processor.decode(tokens.prompt_ids.tolist()).count("2+2?") == 1
