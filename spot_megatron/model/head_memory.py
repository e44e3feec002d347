"""How much memory the LM head may hold. Without PyTorch, so that `make plan` counts with the same bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadMemory:
    """Bounds of the LM head's buffers. They change speed and memory; values only by rounding."""

    tile_elements: int  # logits of one tile
    kept_bytes: int  # softmax of tiles, kept from forward to backward


CPU_HEAD_MEMORY = HeadMemory(tile_elements=2**21, kept_bytes=2**26)  # a tile of 8 MiB of float32 stays in the cache


def gpu_head_memory(total_bytes: int) -> HeadMemory:
    """Shares of a GPU's whole memory, not of what is free, so that a resumed run rounds as before."""
    return HeadMemory(tile_elements=total_bytes // 4096, kept_bytes=total_bytes // 64)
