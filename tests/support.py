"""What several tests build: a small model's shape, random pairs, a recipe, and the world of one process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spot_megatron.data.records import TokenPair
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import PairGPT, build_model
from spot_megatron.parallel.groups import Topology, parallel_groups
from spot_megatron.recipe import Recipe

SHAPE = HFModelConfig(
    family="qwen3",
    num_layers=4,
    hidden_size=48,
    intermediate_size=96,
    num_heads=8,
    num_groups=4,
    head_dim=16,
    vocab_size=101,  # no multiple of anything, so the head is padded
    max_positions=512,
    norm_eps=1e-6,
    rope_theta=10000.0,
    tied=False,
    initializer_range=0.1,
    dtype="float32",
)


def make_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe for CPU tests; `sections` replace whole sections given as dicts."""
    raw = {
        "name": "test",
        "output": str(folder / "run"),
        "device": "cpu",
        "deterministic": True,
        "model": {"hf": str(folder / "model")},
        "data": {"pairs": str(folder / "pairs.jsonl"), "max_tokens": 512, "tokens_per_microbatch": 2048},
        "precision": {"dtype": "fp32"},
        "logging": {"tensorboard": False},
    }
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(raw)


@contextmanager
def one_process(recipe: Recipe) -> Iterator[Topology]:
    with parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology:
        yield topology


def random_model(recipe: Recipe, shape: HFModelConfig = SHAPE, dtype: torch.dtype = torch.float32) -> list[PairGPT]:
    """The policy with random weights, in `dtype`."""
    config = dataclasses.replace(transformer_config(shape, recipe, "cpu"), params_dtype=dtype, pipeline_dtype=dtype)
    chunks = build_model(config, shape)
    generator = torch.Generator().manual_seed(0)
    for chunk in chunks:
        for name, param in sorted(chunk.named_parameters()):
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.data.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return chunks


def random_pairs(count: int, seed: int = 0, vocab_size: int = SHAPE.vocab_size, longest: int = 24) -> list[TokenPair]:
    """Pairs that share a response prefix of 0 to 12 tokens; the last id is the end token."""
    rng = np.random.default_rng(seed)
    end = vocab_size - 1

    def ids(num: int) -> list[int]:
        return rng.integers(0, vocab_size - 1, num).tolist()

    pairs = []
    for index in range(count):
        shared = ids(int(rng.integers(0, 13)))
        chosen, rejected = ids(int(rng.integers(1, longest - 12))), ids(int(rng.integers(1, longest - 12)))
        rejected[0] = (chosen[0] + 1) % (vocab_size - 1)
        pairs.append(
            TokenPair(
                id=f"pair-{index}",
                prompt_ids=np.array(ids(int(rng.integers(2, 9))), dtype=np.int32),
                chosen_ids=np.array([*shared, *chosen, end], dtype=np.int32),
                rejected_ids=np.array([*shared, *rejected, end], dtype=np.int32),
                source="random",
            )
        )
    return pairs


def write_token_pairs(path: Path, pairs: list[TokenPair]) -> None:
    """A pre-tokenised pair file."""
    rows = (
        {
            "id": pair.id,
            "prompt_ids": pair.prompt_ids.tolist(),
            "chosen_ids": pair.chosen_ids.tolist(),
            "rejected_ids": pair.rejected_ids.tolist(),
        }
        for pair in pairs
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_probe(path: Path, pairs: list[TokenPair]) -> None:
    """The chosen sides of `pairs` as a pre-tokenised probe."""
    rows = ({"prompt_ids": pair.prompt_ids.tolist(), "response_ids": pair.chosen_ids.tolist()} for pair in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_random_hf(folder: Path, shape: HFModelConfig = SHAPE, tied: bool = False, dtype: str = "float32") -> None:
    """A random Qwen3 as transformers saves it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_groups,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        rope_theta=shape.rope_theta,
        dtype=dtype,
    )
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
