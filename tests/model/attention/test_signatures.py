"""Our calls of attention packages bind to the argument lists that those packages publish; nothing is computed.

Sources: flash-attn 2.8.3, flash_attn/flash_attn_interface.py; FlashAttention-3, hopper/flash_attn_interface.py at
01afd16d of Dao-AILab/flash-attention; transformer-engine 2.20.2 (wheel),
transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py; PyTorch v2.11 and v2.13,
torch/nn/attention/varlen.py.
"""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from spot_megatron.model.attention import cuda
from spot_megatron.parallel.installed import import_problem

FLASH2 = """(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
block_table=None)"""
FLASH3 = """(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
return_attn_probs=False)"""
ENGINE = """(num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
attn_mask_type="causal", window_size=None, bottom_right_diagonal=None, softcap=0.0, sequence_parallel=False, tp_size=1,
get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
return_max_logit=False, name=None)"""
ENGINE_CALL = """(query_layer=None, key_layer=None, value_layer=None, attention_mask=None, qkv_format=None,
cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None,
max_seqlen_kv=None, attn_mask_type=None, window_size=None, bottom_right_diagonal=None, softcap=None,
checkpoint_core_attention=False, core_attention_bias_type="no_bias", core_attention_bias=None, alibi_slopes=None,
fast_zero_fill=True, inference_params=None, pad_between_seqs=None, fp8_output=False, bf16_backward=False, num_splits=1,
score_mod=None, score_mod_bprop=None, score_mod_tensors=None, score_mod_bprop_tensors=None, qkv_layer=None,
kv_layer=None, qkv_interleave_dim=-3, thd_attention_policies=None, thd_attention_policy_dispatch="auto")"""
TORCH_2_11 = """(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
window_size=(-1, -1))"""
TORCH_2_13 = """(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None)"""


class Package:
    """Modules with one name each, whose call binds its arguments to a published list and gives the queries back."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.bound: list[dict] = []

    def function(self, published: str):
        scope: dict = {}
        exec(f"def published{' '.join(published.split())}: pass", scope)
        signature = inspect.signature(scope["published"])

        def call(*args, **kwargs):
            self.bound.append(signature.bind(*args, **kwargs).arguments)
            return args[0] if args else kwargs["query_layer"]

        call.__signature__ = signature
        return call

    def install(self, module: str, name: str, value) -> None:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if end == len(parts) or path not in sys.modules:
                made = types.ModuleType(path)
                made.__spec__, made.__path__ = types.SimpleNamespace(name=path), []
                self.monkeypatch.setitem(sys.modules, path, made)
        setattr(sys.modules[module], name, value)


@pytest.fixture
def package(monkeypatch):
    for cached in (import_problem, cuda._asks_for_gqa, cuda._engine_module):
        cached.cache_clear()
    yield Package(monkeypatch)
    for cached in (import_problem, cuda._asks_for_gqa, cuda._engine_module):
        cached.cache_clear()


def call(kernel: str) -> torch.Tensor:
    query, keys = torch.zeros(6, 4, 8), torch.zeros(9, 2, 8)
    offsets, key_offsets = torch.tensor([0, 6]), torch.tensor([0, 9])
    return cuda.varlen_kernel(kernel)(query, keys, keys, offsets, key_offsets, 6, 9, 0.5)


def test_flash2(package):
    package.install("flash_attn", "flash_attn_varlen_func", package.function(FLASH2))
    assert call("flash2").shape == (6, 4, 8)
    (bound,) = package.bound
    assert (bound["max_seqlen_q"], bound["max_seqlen_k"], bound["softmax_scale"], bound["causal"]) == (6, 9, 0.5, True)


@pytest.mark.parametrize("module", cuda.FLASH3_MODULES)
def test_flash3(package, module):
    package.install(module, "flash_attn_varlen_func", package.function(FLASH3))
    assert call("flash3").shape == (6, 4, 8)
    (bound,) = package.bound
    assert (bound["max_seqlen_q"], bound["max_seqlen_k"], bound["softmax_scale"], bound["causal"]) == (6, 9, 0.5, True)


def test_engine(package):
    make, attend = package.function(ENGINE), package.function(ENGINE_CALL)

    def attention(*args, **kwargs):
        make(*args, **kwargs)
        return attend

    package.install("transformer_engine.pytorch", "DotProductAttention", attention)
    assert call("engine").shape == (6, 4, 8)
    made, called = package.bound
    assert (made["num_attention_heads"], made["num_gqa_groups"], made["kv_channels"]) == (4, 2, 8)
    assert (made["qkv_format"], made["softmax_scale"]) == ("thd", 0.5)
    assert called["attn_mask_type"] == "padding_causal_bottom_right"
    assert (called["max_seqlen_q"], called["max_seqlen_kv"]) == (6, 9)


@pytest.mark.parametrize(("published", "asks"), [(TORCH_2_11, False), (TORCH_2_13, True)])
def test_torch(package, published, asks):
    package.install("torch.nn.attention.varlen", "varlen_attn", package.function(published))
    assert call("torch").shape == (6, 4, 8)
    (bound,) = package.bound
    assert (bound["scale"], bound["window_size"]) == (0.5, (-1, 0))
    assert bound.get("enable_gqa", False) is asks


def test_torch_here_is_one_of_them():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    ours = set(inspect.signature(varlen.varlen_attn).parameters)
    assert {"scale", "window_size", "cu_seq_q", "max_q"} <= ours
