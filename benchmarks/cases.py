"""Inputs of the speed benchmarks: a random Qwen3 of about 100M parameters and pairs of a given length and overlap.

Imported by both sides of a comparison, so it depends on numpy, torch and safetensors only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 151_936  # Qwen3's, whole: at this width the LM head is most of the work, as it is in TRL
PROMPT_TOKENS = 128
BETA = 0.1
OPTIM: dict[str, Any] = {
    "lr": 1e-5,  # constant; the loss moves in its third digit, so that equal losses say something
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "clip_grad_norm": 1.0,
}

# 101.4M parameters, embeddings tied: 77.8M of them in the vocabulary, 23.6M in 6 layers.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 16384,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}


@dataclass(frozen=True)
class Case:
    """Pairs of equal length: `response` tokens on either side, the first `shared` (a fraction) of them the same."""

    response: int
    shared: float
    num_pairs: int

    @property
    def name(self) -> str:
        return f"response {self.response}, shared {self.shared:g}"


def write_model(folder: Path) -> None:
    """A Hugging Face folder with CONFIG and normal random weights (standard deviation 0.02), float32, from seed 0."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    heads, groups = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    matrices = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (groups * head, hidden),
        "self_attn.v_proj": (groups * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
        "self_attn.q_norm": head,
        "self_attn.k_norm": head,
    }
    weights = {"model.embed_tokens.weight": 0.02 * torch.randn(VOCAB_SIZE, hidden, generator=generator)}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in matrices.items():
            weights[f"model.layers.{layer}.{name}.weight"] = 0.02 * torch.randn(shape, generator=generator)
        for name, size in norms.items():
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(size)
    weights["model.norm.weight"] = torch.ones(hidden)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


def make_pairs(case: Case, vocab_size: int = VOCAB_SIZE) -> list[dict[str, Any]]:
    """Random token ids, the same for equal arguments; the first token after the shared part differs."""
    rng = np.random.default_rng([case.response, round(1000 * case.shared)])
    num_shared = round(case.shared * case.response)

    def ids(num: int) -> list[int]:
        return rng.integers(2, vocab_size, num).tolist()

    pairs = []
    for index in range(case.num_pairs):
        common, chosen, rejected = ids(num_shared), ids(case.response - num_shared), ids(case.response - num_shared)
        if rejected[0] == chosen[0]:
            rejected[0] = 2 + (chosen[0] - 1) % (vocab_size - 2)
        pairs.append(
            {
                "id": f"pair-{index}",
                "prompt_ids": ids(PROMPT_TOKENS),
                "chosen_ids": common + chosen,
                "rejected_ids": common + rejected,
            }
        )
    return pairs


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
