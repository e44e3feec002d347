"""Answers by a model folder on this machine, through transformers: for small models. A server is faster for others.

Batches are cut from the whole plan, and each has a seed of its own, so that a run that was stopped ends with the
answers of an undisturbed one.
"""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from spot_megatron.data.template import load_tokenizer
from spot_megatron.errors import PairError, WeightError
from tools.eval.answers import Answers
from tools.eval.sample import Decoding, Response, chat_prompt_ids, sample_batch
from tools.pairs.client import Calls, Completion
from tools.pairs.pool import progress_bar
from tools.pairs.sampling import Key

_MEMORY_SHARE = 0.6  # of free memory, for keys and values


def answer_locally(answers: Answers, folder: Path, batch_size: int, device: str = "auto", label: str = "model") -> None:
    """Sample, grade and record every pending sample.

    Raises WeightError when the folder holds no model, or no tokenizer and chat template to ask it with.
    """
    pending = set(answers.pending())
    if not pending:
        return
    model, tokenizer = load_model(folder, device)
    template = {} if answers.sampling.thinking == "server" else {"enable_thinking": answers.sampling.thinking == "on"}
    prompts: dict[str, list[int]] = {}
    for key, messages in answers.prompts.items():
        tools = answers.questions[key][1].question.tools
        prompts[key] = chat_prompt_ids(tokenizer, messages, list(tools) if tools else None, **template)
    decoding = _decoding(answers)
    order = sorted(answers.plan.samples(), key=lambda key: (len(prompts[key[0]]), key))
    with progress_bar(label, len(order), len(order) - len(pending), "sample") as bar:
        for batch in _batches(order, prompts, decoding, model, batch_size):
            wanted = [key for key in batch if key in pending]
            if not wanted:
                continue
            started = time.monotonic()
            responses = _sample(model, tokenizer, batch, prompts, decoding, answers.sampling.seed)
            seconds = (time.monotonic() - started) / len(batch)
            for sample in wanted:
                answers.record_answer(sample, _completion(responses[sample], len(prompts[sample[0]]), seconds))
            answers.sync()
            bar.update(len(wanted))
            bar.set_postfix({"accuracy": f"{answers.num_right / max(answers.num_answered, 1):.1%}"}, refresh=False)


def load_model(folder: Path, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in fp32 on a CPU and in bf16 on a GPU, and its tokenizer with a chat template."""
    check_folder(folder)
    transformers_logging.disable_progress_bar()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokenizer = _tokenizer(folder)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device), tokenizer


def check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise WeightError(
            f"{folder}: no config.json there. Give a Hugging Face model folder (`make train` writes one), or the "
            "address of a server that serves the model (--base-url)."
        )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = load_tokenizer(folder)
    except PairError as error:  # its remedy is for pairs
        raise WeightError(
            f"{folder}: questions need the model's tokenizer, which cannot be loaded ({error.__cause__}); copy "
            "tokenizer.json and tokenizer_config.json there"
        ) from None
    if tokenizer.chat_template is None:
        raise WeightError(
            f"{folder}: the tokenizer has no chat template, so questions cannot be asked as they are served; copy the "
            "instruct model's chat_template.jinja there"
        )
    return tokenizer


def _decoding(answers: Answers) -> Decoding:
    sampling = answers.sampling
    return Decoding(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.extra_body.get("top_k", 0),
        max_new_tokens=sampling.max_tokens,
    )


def _batches(
    order: list[Key], prompts: dict[str, list[int]], decoding: Decoding, model: PreTrainedModel, batch_size: int
) -> Iterator[list[Key]]:
    """Parts of `order`, at most `batch_size` samples each, and no more than memory holds at full length."""
    room = _MEMORY_SHARE * _free_bytes(model) / max(1, _bytes_per_token(model))
    context = getattr(model.config, "max_position_embeddings", None) or decoding.max_new_tokens
    start = 0
    while start < len(order):
        longest = len(prompts[order[min(start + batch_size, len(order)) - 1][0]])
        tokens = min(longest + decoding.max_new_tokens, max(context, longest + 1))
        size = max(1, min(batch_size, int(room / tokens)))
        yield order[start : start + size]
        start += size


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of one position's keys and values in all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _free_bytes(model: PreTrainedModel) -> int:
    return torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Key],
    prompts: dict[str, list[int]],
    decoding: Decoding,
    seed: int,
) -> dict[Key, Response]:
    """The responses of a batch; one that does not fit into the GPU's memory after all is done in halves."""
    digest = hashlib.sha256(f"{seed}/{batch[0][0]}/{batch[0][1]}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:6], "big"))
    try:
        found = sample_batch(model, tokenizer, [prompts[key[0]] for key in batch], decoding)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        torch.cuda.empty_cache()
        halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
        parts: list[Any] = [_sample(model, tokenizer, half, prompts, decoding, seed) for half in halves]
        return parts[0] | parts[1]
    return dict(zip(batch, found, strict=True))


def _completion(response: Response, prompt_tokens: int, seconds: float) -> Completion:
    return Completion(
        text=response.text,
        reasoning="",
        finish_reason=response.finish,
        token_ids=None,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(response.ids),
        num_hidden=0,
        endpoint="transformers",
        seconds=seconds,
        calls=Calls(),
        seed=None,
    )
