"""The three float types of weight files as NumPy arrays: casts, and the search for NaN and infinity. No PyTorch here.

NumPy has no bfloat16; its bits are kept in uint16, the upper half of a float32.
"""

from __future__ import annotations

import numpy as np

from spot_megatron.hf.safetensors import KIND_BYTES

# The bits of infinity. Larger values, as integers of either sign, are NaN.
_INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_BLOCK = 1 << 17  # elements; fits into a core's cache


def widest(kinds: set[str]) -> str:
    """The narrowest type that holds the values of all `kinds` exactly."""
    return kinds.copy().pop() if len(kinds) == 1 else "F32"


def cast(data: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bytes [n] uint8 of one type as bytes of another; rounds to nearest, ties to even, as PyTorch does.

    NaN stays NaN, with the same bits if the target type can hold them.
    """
    if source == target:
        return data
    wide = _to_float32(data, source)
    if target == "F32":
        return wide.view(np.uint8)
    if target == "F16":
        with np.errstate(over="ignore"):
            return wide.astype(np.float16).view(np.uint8)
    bits = wide.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    kept = (bits >> 16).astype(np.uint16)
    is_nan = np.isnan(wide)
    # A NaN whose payload is in the lower half alone would become infinity.
    nan = np.where(kept & 0x7F, kept, np.uint16(0x7FC0))
    return np.where(is_nan, nan, rounded).view(np.uint8)


def _to_float32(data: np.ndarray, source: str) -> np.ndarray:
    if source == "F32":
        return data.view(np.float32)
    if source == "F16":
        return data.view(np.float16).astype(np.float32)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def has_nonfinite(data: np.ndarray, kind: str) -> bool:
    """True if bytes [n] uint8 of a type hold NaN or infinity. Takes two integer maxima, about 10 GB/s."""
    num_bytes, infinity = KIND_BYTES[kind], _INFINITY[kind]
    unsigned = data.view(f"u{num_bytes}")
    signed = data.view(f"i{num_bytes}")
    negative_infinity = infinity | 1 << (8 * num_bytes - 1)
    return any(
        signed[start : start + _BLOCK].max() >= infinity or unsigned[start : start + _BLOCK].max() >= negative_infinity
        for start in range(0, len(unsigned), _BLOCK)
    )
