"""Batched sampling of responses from a HF causal language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from spot_megatron.errors import WeightError


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: by default as in the paper's evaluation (arXiv 2603.01683). Temperature 0 is greedy,
    top-k 0 is no limit."""

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    max_new_tokens: int = 128
    batch_size: int = 128
    enable_thinking: bool = False


@dataclass(frozen=True)
class Response:
    """A sampled answer; `finish` is "stop" when the end token was produced (`ids` holds it), "length" when cut."""

    text: str
    finish: str
    ids: tuple[int, ...]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, enable_thinking: bool = False) -> list[int]:
    """The serving prompt of one user turn; see `chat_prompt_ids`."""
    return chat_prompt_ids(tokenizer, [{"role": "user", "content": question}], enable_thinking=enable_thinking)


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    **template: Any,
) -> list[int]:
    """The serving prompt of a conversation, ending where the response begins; without thinking it holds the empty
    think block, where the template knows one."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True, **template)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    decoding: Decoding,
    seed: int,
) -> list[Response]:
    """One response per question, in the questions' order. Prompts of similar length are batched together.

    The model's own sampling defaults (its generation config) are replaced by `decoding`; only its end tokens stay.
    """
    torch.manual_seed(seed)
    prompts = [prompt_ids(tokenizer, question, decoding.enable_thinking) for question in questions]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses: dict[int, Response] = {}
    for start in range(0, len(order), decoding.batch_size):
        chosen = order[start : start + decoding.batch_size]
        batch = sample_batch(model, tokenizer, [prompts[index] for index in chosen], decoding)
        responses |= dict(zip(chosen, batch, strict=True))
    return [responses[index] for index in range(len(prompts))]


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], decoding: Decoding
) -> list[Response]:
    """One response per prompt, all of them generated at once. A response ends at the model's context length at last."""
    end_ids = end_token_ids(model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    context = getattr(model.config, "max_position_embeddings", None)
    limit = decoding.max_new_tokens
    if context is not None:
        limit = max(1, min(limit, context - max(map(len, prompts))))
    model.generation_config = _generation_config(decoding, limit, end_ids, pad_id)
    return [_response(tokenizer, ids, end_ids) for ids in _generate(model, prompts, pad_id)]


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """The model's end-of-response token ids, from its generation config. Raises WeightError when it names none."""
    assert model.generation_config is not None
    end_ids = model.generation_config.eos_token_id
    if end_ids is None:
        raise WeightError(f'{model.name_or_path}: no end token; set "eos_token_id" in its generation_config.json')
    return list(end_ids) if isinstance(end_ids, (list, tuple)) else [end_ids]


def _generation_config(decoding: Decoding, limit: int, end_ids: list[int], pad_id: int) -> GenerationConfig:
    if decoding.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
    else:
        sampling = {"do_sample": False}
    return GenerationConfig(max_new_tokens=limit, eos_token_id=end_ids, pad_token_id=pad_id, **sampling)


def _generate(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int) -> list[list[int]]:
    """New token ids per prompt, with whatever padding follows the end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    generate: Any = model.generate  # its annotation does not describe the method
    return generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()


def _response(tokenizer: PreTrainedTokenizerBase, ids: list[int], end_ids: list[int]) -> Response:
    end = next((position for position, token in enumerate(ids) if token in end_ids), None)
    text = tokenizer.decode(ids[:end])
    assert isinstance(text, str)
    return Response(text, "length" if end is None else "stop", tuple(ids if end is None else ids[: end + 1]))
