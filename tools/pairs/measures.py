"""Token counts of pairs: the policy's tokenizer, the exact change ratio, the shared prefix.

The change ratio is the paper's: R(rejected, chosen) = 1 - |LCS| / |chosen| over the policy's tokens (arXiv 2603.01683).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz.distance import LCSseq

from spot_megatron.errors import PairError
from spot_megatron.files import Row

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Measures:
    """Token counts of one pair, and what its sides share."""

    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    common_tokens: int  # longest common subsequence
    shared_prefix_tokens: int

    @property
    def change_ratio(self) -> float:
        return 1.0 - self.common_tokens / self.chosen_tokens

    @property
    def edited_tokens(self) -> int:
        """Tokens removed from the rejected side plus tokens added to make the chosen one."""
        return self.chosen_tokens + self.rejected_tokens - 2 * self.common_tokens


def measure(num_prompt_tokens: int, chosen: Sequence[int], rejected: Sequence[int]) -> Measures:
    """Exact counts from token ids."""
    return Measures(
        prompt_tokens=num_prompt_tokens,
        chosen_tokens=len(chosen),
        rejected_tokens=len(rejected),
        common_tokens=LCSseq.similarity(chosen, rejected),
        shared_prefix_tokens=_shared_prefix(chosen, rejected),
    )


def _shared_prefix(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))


class PolicyTokenizer:
    """The policy's tokenizer: `encode` turns texts into ids without special tokens, truncation or padding.

    Args:
        render: (messages, tools) -> the prompt's text by the chat template; None counts the texts alone.
    """

    def __init__(self, encode: Encode, render: Callable[[Sequence[Row], Any], str] | None = None) -> None:
        self.encode, self._render = encode, render

    @property
    def end_tokens(self) -> int:
        """Tokens that the template adds behind a response: its end."""
        return int(self._render is not None)

    def prompt_text(self, messages: Sequence[Row], tools: Sequence[Row] | None, plain: str) -> str:
        """The text to tokenise: the prompt rendered by the chat template, or `plain` without one."""
        return plain if self._render is None else self._render(messages, tools)


def load_tokenizer(name: str) -> PolicyTokenizer:
    """A folder with tokenizer.json, that file itself, or anything that transformers' AutoTokenizer loads.

    A folder with a chat template needs transformers to render it. Raises PairError where there is no tokenizer.
    """
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and _has_template(path):
        return _load_pretrained(name)
    if file.is_file():
        return PolicyTokenizer(_load_file(file))
    return _load_pretrained(name)


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _load_file(file: Path) -> Encode:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception for every broken file
        raise PairError(f"{file}: is not a tokenizer ({error}). Give the policy's tokenizer.json.") from None
    tokenizer.no_truncation()  # a file keeps what its last user set, which would corrupt every count
    tokenizer.no_padding()
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _load_pretrained(name: str) -> PolicyTokenizer:
    from transformers import AutoTokenizer

    try:
        pretrained = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PairError(
            f"--tokenizer {name}: no tokenizer there ({str(error).splitlines()[0]}). Give the policy's folder."
        ) from None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = pretrained(list(texts), add_special_tokens=False, truncation=False, padding=False)[
            "input_ids"
        ]
        return ids

    def render(messages: Sequence[Row], tools: Any) -> str:
        text = pretrained.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return str(text)

    return PolicyTokenizer(encode, render if pretrained.chat_template else None)
