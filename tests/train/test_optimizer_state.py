"""The optimizer's state in blocks: every element once, read back to the bit, from earlier versions' checkpoints too."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core import dist_checkpointing

from spot_megatron.errors import CheckpointError
from spot_megatron.train import optimizer_blocks
from spot_megatron.train.optim import Policy, make_trainable
from spot_megatron.train.optimizer_blocks import blocks, rectangles
from spot_megatron.train.optimizer_state import _make_states, load_optimizer, save_optimizer
from spot_megatron.weights.checkpoint import model_state
from tests.support import make_recipe, one_process, random_model


@pytest.mark.parametrize("most", [1, 5, 7, 1000])
@pytest.mark.parametrize("shape", [(11,), (4, 6), (3, 4, 5), (5, 1)])
def test_rectangles_are_the_range(monkeypatch, shape, most):
    monkeypatch.setattr(optimizer_blocks, "BLOCK_ELEMENTS", most)
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel()):
        for end in range(start, whole.numel() + 1):
            found = []
            for offsets, sizes in rectangles(shape, start, end):
                cut = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                assert cut.numel() <= most
                found += cut.flatten().tolist()
            assert found == list(range(start, end))


def policy_with_states(recipe, seed: int, family: str = "dense") -> Policy:
    """A policy whose optimizer has random states after 3 updates."""
    policy = make_trainable(random_model(recipe), recipe)
    generator = torch.Generator().manual_seed(seed)
    for part in policy.parts:
        _make_states(part)
        for state in part.optimizer.state.values():
            for value in state.values():
                value.copy_(torch.randn(value.shape, generator=generator).abs() if value.dim() else 3.0)
    return policy


def states(policy: Policy) -> dict[str, torch.Tensor]:
    return {
        f"{block.name} {block.offsets}": block.of(block.held.states()[block.state]).clone() for block in blocks(policy)
    }


def test_a_round_trip_keeps_every_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer_blocks, "BLOCK_ELEMENTS", 1000)
    recipe = make_recipe(tmp_path)
    with one_process(recipe):
        written, read = policy_with_states(recipe, 1), policy_with_states(recipe, 2)
        (tmp_path / "optimizer").mkdir()
        save_optimizer(written, tmp_path / "optimizer")
        load_optimizer(read, tmp_path / "optimizer", 3)
        expected, found = states(written), states(read)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        counters = [state["step"] for part in read.parts for state in part.optimizer.state.values()]
        assert {counter.item() for counter in counters} == {3.0}
        assert len({counter.data_ptr() for counter in counters}) == len(counters)


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """Until version 0.1 Megatron's own fully reshardable form was written."""
    recipe = make_recipe(tmp_path)
    with one_process(recipe):
        written, read = policy_with_states(recipe, 1), policy_with_states(recipe, 2)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        state = written.optimizer.sharded_state_dict(model_state(written.bare), metadata=metadata)
        (tmp_path / "optimizer").mkdir()
        dist_checkpointing.save({"optimizer": state}, str(tmp_path / "optimizer"))
        load_optimizer(read, tmp_path / "optimizer", 3)
        expected, found = states(written), states(read)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_models_optimizer_is_refused(tmp_path):
    recipe = make_recipe(tmp_path)
    with one_process(recipe):
        policy = policy_with_states(recipe, 1)
        (tmp_path / "optimizer").mkdir()
        save_optimizer(policy, tmp_path / "optimizer")
        (file,) = (tmp_path / "optimizer").glob("*.distcp")
        file.write_bytes(file.read_bytes()[:-5000])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_optimizer(policy, tmp_path / "optimizer", 3)
        (tmp_path / "optimizer" / ".metadata").unlink()
        with pytest.raises(CheckpointError, match="is damaged"):
            load_optimizer(policy, tmp_path / "optimizer", 3)
