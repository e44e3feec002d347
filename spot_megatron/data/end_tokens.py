"""The tokens that end a response: the chat template's turn end, and the other tokens at which generation stops."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spot_megatron.errors import PairError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "END-OF-TURN-PROBE"  # an assistant message; what the template renders behind it ends a turn


@dataclass(frozen=True)
class EndTokens:
    """`turn_end` is appended to a response in text; sampled ids may end with any of `accepted`, which holds it too."""

    turn_end: int
    accepted: frozenset[int]


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a model folder's file; empty if there is no file. Raises PairError if it is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise PairError(f"{path} cannot be read as JSON ({error}); copy the file from the model again") from None
    if not isinstance(value, dict):
        raise PairError(f"{path} does not hold a JSON object; copy the file from the model again")
    return value


def find_end_tokens(tokenizer: PreTrainedTokenizerBase, rendered_turns: str | None) -> EndTokens:
    """The end tokens of a model folder.

    The turn end is the token that the chat template renders behind an assistant message; the tokenizer's eos only where
    the template renders none. The tokenizer's eos and generation_config.json's eos_token_id (config.json's where that
    file has none) are where serving stops, so one of them must contain the turn end.

    Args:
        tokenizer: of the model folder `tokenizer.name_or_path`.
        rendered_turns: a user message and the assistant message PROBE through the chat template, without a generation
            prompt; None if the template cannot render them.

    Raises:
        PairError: serving would not stop at the turn end, or no end token is set. Names the tokens and the files.
    """
    folder = Path(tokenizer.name_or_path)
    listed = _listed(folder)
    eos: int | None = tokenizer.eos_token_id
    stops = frozenset(listed if eos is None else [*listed, eos])
    if not stops:
        raise PairError(f'{folder}: the tokenizer has no end token; set "eos_token" in tokenizer_config.json')
    turn_end = _turn_end(tokenizer, rendered_turns)
    if turn_end is not None:
        if turn_end not in stops:
            raise PairError(
                f"{folder}: the chat template ends a turn with {_name(tokenizer, turn_end)}, but generation stops at "
                f"{', '.join(_name(tokenizer, stop) for stop in sorted(stops))}; add {turn_end} to eos_token_id in "
                "generation_config.json, or correct the template"
            )
        return EndTokens(turn_end, stops)
    if eos is None and len(listed) == 1:
        return EndTokens(listed[0], stops)
    if eos is None or (listed and eos not in listed):
        raise PairError(
            f"{folder}: the chat template renders no end token behind an answer, the tokenizer's eos_token is "
            f"{'not set' if eos is None else _name(tokenizer, eos)}, and generation_config.json lists "
            f"{', '.join(_name(tokenizer, stop) for stop in listed)}; set eos_token in tokenizer_config.json to the "
            "token that ends an answer"
        )
    return EndTokens(eos, stops)


def _listed(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json, as a list."""
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise PairError(f"{folder / name}: eos_token_id must be a token id or a list of token ids, not {value!r}")
        return ids
    return []


def _turn_end(tokenizer: PreTrainedTokenizerBase, rendered_turns: str | None) -> int | None:
    """The added token with which the text behind PROBE starts, white space apart; None if there is none."""
    _, found, tail = (rendered_turns or "").rpartition(PROBE)
    if not found:
        return None
    tail = tail.lstrip()
    ending = [
        (len(token.content), id)
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.content and tail.startswith(token.content)
    ]
    return max(ending)[1] if ending else None


def _name(tokenizer: PreTrainedTokenizerBase, id: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(id)} ({id})"
