"""Hugging Face folder -> Megatron model -> Hugging Face folder with mbridge 0.15.1: `mbridge_worker.py SOURCE TARGET`.

Runs in mbridge's environment, not in this project's. mbridge requires CUDA and Transformer Engine; this file patches
what fails on a CPU, and disables the initialisation of weights, which is not part of a conversion.
"""

from __future__ import annotations

import contextlib
import sys

import mbridge.core.llm_bridge
import torch
import torch.distributed as dist
from mbridge import AutoBridge
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

# Megatron's names without Transformer Engine -> with it, which mbridge knows.
NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def local_spec(config, use_transformer_engine, **kwargs):
    del use_transformer_engine
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", **kwargs)


def patch(bridge) -> None:
    torch.cuda.current_device = lambda: "cpu"
    torch.nn.Module.cuda = lambda self, *_: self
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    mbridge.core.llm_bridge.get_gpt_decoder_block_spec = local_spec
    names_in_hf = bridge._weight_name_mapping_mcore_to_hf

    def with_local_names(name):
        for local, engine in NAMES.items():
            name = name.replace(local, engine)
        return names_in_hf(name)

    bridge._weight_name_mapping_mcore_to_hf = with_local_names
    bridge.config.perform_initialization = False
    bridge.config.use_cpu_initialization = True
    bridge.config.masked_softmax_fusion = False
    bridge.config.gradient_accumulation_fusion = False
    bridge.config.persist_layer_norm = False


def main() -> None:
    source, target = sys.argv[1:]
    torch.set_default_dtype(torch.bfloat16)  # of the norms, whose fallback in Megatron-Core takes no dtype
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    bridge = AutoBridge.from_pretrained(source)
    patch(bridge)
    with torch.no_grad():
        model = bridge.get_model(bf16=False, use_cpu_initialization=True, data_parallel_random_init=False)
        bridge.load_weights(model, source)
        bridge.save_weights(model, target)


if __name__ == "__main__":
    main()
