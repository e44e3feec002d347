"""Small random folders of every family, written by transformers, with the files that come with a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state as mpu
from torch import Tensor

from spot_megatron.data.pack import Pack, build_pack
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.gpt import PairGPT
from spot_megatron.train.microbatch import microbatch
from tests.support import random_pairs

# PyTorch notes the functions that `with torch.device(...)` governs at its first use. transformers needs that block, and
# after redirect_cuda it would note the replacements, which PyTorch never sees: rotary frequencies stay uninitialised.
torch.utils._device._device_constructors()

VOCAB_SIZE = 101  # no multiple of 16 times any tensor-parallel size
OTHER_FILES = {
    "tokenizer.json": b'{"model": {}}\r\n',  # line ends and trailing bytes must survive
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    "LICENSE": b"terms \xff\xfe",
    "assets/logo.png": bytes(range(256)),
}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# family -> transformers' class, and what its config has besides COMMON
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True, **EXPERTS}),
    # dense layers between those with experts, and weights that do not sum to 1
    "qwen3_moe_some": (
        "Qwen3Moe",
        {"head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [1], "decoder_sparse_step": 1, **EXPERTS},
    ),
}
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    initializer_range=0.2,
)


def make_folder(
    folder: Path,
    *,
    tied: bool,
    family: str = "qwen3",
    dtype: str = "fp32",
    shard_size: str = "1GB",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A model of 4 layers, 8 heads in 4 groups; in Qwen3 head_dim * heads differs from hidden, as in the real ones.

    `dtype` is fp32, bf16, or mixed: bf16 with fp32 norms. `changes` replace values of its config.
    """
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options, **changes, "tie_word_embeddings": tied})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if dtype == "bf16" or (dtype == "mixed" and "norm" not in parameter_name):
                parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder, max_shard_size=shard_size)
    for file, content in OTHER_FILES.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


@torch.no_grad()
def logits_of_transformers(folder: Path, sequences: list[Tensor]) -> list[Tensor]:
    """fp32 logits [T, V] of each sequence of token ids [T]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(input_ids=ids[None]).logits[0] for ids in sequences]


def causal_pack() -> tuple[Pack, list[Tensor]]:
    """A pack of plain causal sequences, and the token ids of each."""
    pack = build_pack(random_pairs(2, vocab_size=VOCAB_SIZE), [0, 1], "separate", 4, pad_id=0)
    ids = torch.from_numpy(pack.input_ids)
    return pack, list(ids.split(torch.from_numpy(pack.cu_main).diff().tolist()))


@torch.no_grad()
def logits_of_megatron(chunks: Sequence[PairGPT], pack: Pack, config: HFModelConfig) -> list[Tensor]:
    """fp32 logits [T, V] of each sequence of a causal pack: the chunks' hidden states times the output weight.

    Under pipeline parallelism the last stage gets them, the others an empty list; one chunk a stage.
    """
    (chunk,) = chunks
    batch = microbatch(pack, torch.device("cpu"))
    tp_group = mpu.get_tensor_model_parallel_group()
    split = tp_group.size() if chunk.config.sequence_parallel else 1
    if not chunk.pre_process:
        hidden = torch.empty(len(pack.input_ids) // split, 1, config.hidden_size)
        dist.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
        chunk.set_input_tensor([hidden])
    seen: list[Tensor] = []
    hook = chunk.decoder.register_forward_hook(lambda module, args, output: seen.append(output))
    chunk(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        packed_seq_params=batch.layout,
    )
    hook.remove()
    if not chunk.post_process:
        dist.send(seen[0].contiguous(), mpu.get_pipeline_model_parallel_next_rank())
        return []
    rows = _gathered(seen[0], 0, tp_group) if split > 1 else seen[0]
    weight = chunk.shared_embedding_or_output_weight() if config.tied else chunk.output_layer.weight
    logits = _gathered(rows[:, 0] @ weight.T, 1, tp_group)[:, : config.vocab_size]
    return list(logits.split(torch.from_numpy(pack.cu_main).diff().tolist()))


def _gathered(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
