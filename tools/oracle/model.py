"""A small model as the local server's policy: requests that arrive together are sampled in one batch on the CPU."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from tools.oracle.http_server import Answer, RefusedRequest
from tools.oracle.rules import RuleOracle
from tools.pairs.prompts import MARKER_START

MAX_BATCH = 128
GATHER_SECONDS = 0.02  # how long a batch waits for company


class ModelPolicy:
    """Answers questions with the model in `folder`; prompts that name the marker lines go to `otherwise`.

    Each request is sampled with noise of its own, drawn from its body (which holds its seed), so that an answer does
    not depend on what else is in the batch, up to rounding.
    """

    def __init__(self, folder: Path, otherwise: RuleOracle) -> None:
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._otherwise = otherwise
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[Answer]]] = []
        self._worker: asyncio.Task[None] | None = None

    def __call__(self, request: dict[str, Any], fault: str | None) -> Answer | asyncio.Future[Answer]:
        if MARKER_START in request["messages"][-1]["content"]:
            return self._otherwise(request, fault)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._serve())
        return future

    async def _serve(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                answers = await asyncio.to_thread(self._sample, [request for request, _ in batch])
            except Exception as error:  # a malformed request can make the model raise anything; its client gets a 400
                for _, future in batch:
                    future.set_exception(RefusedRequest(f"{type(error).__name__}: {error}"))
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    @torch.inference_mode()
    def _sample(self, requests: list[dict[str, Any]]) -> list[Answer]:
        prompts = [
            self._tokenizer.apply_chat_template(
                request["messages"],
                add_generation_prompt=True,
                tokenize=False,
                **request.get("chat_template_kwargs", {}),
            )
            for request in requests
        ]
        inputs = self._tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        room = self._model.config.max_position_embeddings - width
        limits = [min(int(request.get("max_tokens") or 128), room) for request in requests]
        config = GenerationConfig(
            do_sample=False,  # the noise is in the logits already
            max_new_tokens=max(limits),
            eos_token_id=self._end_ids(),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        noise = LogitsProcessorList([_OwnNoise(requests)])
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=config,
            logits_processor=noise,
        )
        prompt_lengths = inputs["attention_mask"].sum(dim=1).tolist()
        rows = output[:, width:].tolist()
        return [
            self._answer(ids[:limit], length) for ids, limit, length in zip(rows, limits, prompt_lengths, strict=True)
        ]

    def _end_ids(self) -> list[int]:
        ids = self._model.generation_config.eos_token_id
        return list(ids) if isinstance(ids, (list, tuple)) else [ids]

    def _answer(self, ids: list[int], prompt_length: int) -> Answer:
        end = next((position for position, token in enumerate(ids) if token in self._end_ids()), None)
        finish = "length" if end is None else "stop"
        ids = ids if end is None else ids[: end + 1]
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(str(text), finish, ids, prompt_tokens=prompt_length, completion_tokens=len(ids))


class _OwnNoise(LogitsProcessor):
    """Gumbel noise on the top-p nucleus at the request's temperature: the largest entry is then a sample of it."""

    def __init__(self, requests: list[dict[str, Any]]) -> None:
        self._temperature = torch.tensor([[max(float(r.get("temperature", 1.0)), 1e-4)] for r in requests])
        self._top_p = torch.tensor([[float(r.get("top_p", 1.0))] for r in requests])
        self._generators = []
        for request in requests:
            digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest()
            self._generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_probs = torch.log_softmax(scores.float() / self._temperature, dim=-1)
        ordered, order = log_probs.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()  # mass of the more likely tokens
        outside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, order, before >= self._top_p)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return (log_probs + gumbel).masked_fill(outside, float("-inf"))
