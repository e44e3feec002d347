"""What is corrected in some versions of Megatron-Core only. The corrections themselves: tests/train, tests/weights."""

from __future__ import annotations

from types import SimpleNamespace

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from spot_megatron.parallel.versions import offsets_without_padding


def optimizer_of_two_buckets():
    """Parameters a, b, c of 100, 100 and 50 elements; a's bucket is padded from 100 to 128."""
    buckets = [SimpleNamespace(offset=0, numel_unpadded=100), SimpleNamespace(offset=128, numel_unpadded=150)]
    index = {"a": (0, 100, 0), "b": (128, 228, 1), "c": (228, 278, 1)}
    return SimpleNamespace(buffers=[SimpleNamespace(buckets=buckets, param_index_map=index)])


def test_offsets_do_not_count_the_padding():
    part = optimizer_of_two_buckets()
    with offsets_without_padding([part]):
        assert part.buffers[0].param_index_map == {"a": (0, 100, 0), "b": (100, 200, 1), "c": (200, 250, 1)}
    assert part.buffers[0].param_index_map["b"] == (128, 228, 1)


def test_offsets_are_left_to_a_megatron_that_adjusts_them(monkeypatch):
    def sharded_param_state_fully_reshardable(self):
        """Its source has the name `padding_adjustment`."""

    name = "sharded_param_state_fully_reshardable"
    monkeypatch.setattr(DistributedOptimizer, name, sharded_param_state_fully_reshardable)
    part = optimizer_of_two_buckets()
    with offsets_without_padding([part]):
        assert part.buffers[0].param_index_map["b"] == (128, 228, 1)
