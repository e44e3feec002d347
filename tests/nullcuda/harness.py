"""One process's view of a training job on CUDA, over the null device: reference pass, updates, and where it waited."""

from __future__ import annotations

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.testing._internal.distributed.fake_pg import FakeStore

from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.template import TokenizedPairs
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.objective.shift import RewardShift
from spot_megatron.parallel.groups import parallel_groups
from spot_megatron.train.batches import one_pass, training_batches
from spot_megatron.train.optim import Policy, make_trainable
from spot_megatron.train.packing import pack_multiple
from spot_megatron.train.reference import reference_sums
from spot_megatron.train.step import ObjectiveLoss, forward_backward, reduce_sums
from tests.support import SHAPE, make_recipe, random_pairs

# Large enough for every kernel, and for tensor and context parallelism of 4.
WIDE = replace(SHAPE, hidden_size=256, intermediate_size=512, num_heads=16, num_groups=8, head_dim=64, vocab_size=512)

# A wait of the host for the device: (file, function) of the innermost frame of this project or of Megatron-Core.
Wait = tuple[str, str]


@dataclass
class Seen:
    """What a run showed."""

    policy: Policy
    waits: list[Counter[Wait]] = field(default_factory=list)  # from zero_grad to the end of the update, by step
    num_packs: int = 0


@contextmanager
def recorded_waits() -> Iterator[Counter[Wait]]:
    """PyTorch warns of each synchronising call in this block; counted by where it comes from."""
    waits: Counter[Wait] = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchronizing CUDA" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if "/spot_megatron/" in f.filename or "/megatron/" in f.filename]
        frame = frames[-1]
        waits[(frame.filename.rsplit("site-packages/")[-1].rsplit("/spot_megatron/")[-1], frame.name)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def one_of(world: int, rank: int, monkeypatch) -> Iterator[None]:
    """This process as rank `rank` of `world`, whose collectives return at once and move nothing."""
    if world == 1:
        yield
        return
    initialize, initialize_megatron = dist.init_process_group, mpu.initialize_model_parallel

    def start(backend, **options):
        return initialize("fake", store=FakeStore(), rank=rank, world_size=world)

    def start_megatron(**options):
        return initialize_megatron(**options, create_gloo_process_groups=False)

    with monkeypatch.context() as patch:
        for name, value in {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": 0}.items():
            patch.setenv(name, str(value))
        patch.setattr(dist, "init_process_group", start)
        patch.setattr(mpu, "initialize_model_parallel", start_megatron)
        try:
            yield
        finally:
            if dist.is_initialized():  # after an error the groups are left alone
                mpu.destroy_model_parallel()
                dist.destroy_process_group()


def train(folder: Path, shape: HFModelConfig = WIDE, steps: int = 3, num_pairs: int = 24, **sections) -> Seen:
    """The reference pass and `steps` updates of a small model under a recipe with `sections`."""
    recipe = make_recipe(
        folder,
        **{
            "device": "cuda",
            "deterministic": False,
            "precision": {"dtype": "bf16"},
            "objective": {"name": "spot_bco"},
            "train": {"batch_pairs": 8, "max_steps": steps},
            "data": {"tokens_per_microbatch": 128},
            **sections,
        },
    )
    pairs = random_pairs(num_pairs, vocab_size=shape.vocab_size)
    dataset = PreferencePairDataset.build(TokenizedPairs(pairs, {}), seed=0, max_tokens=512, pad_id=0)
    layout, multiple = recipe.data.layout, pack_multiple(recipe)
    with parallel_groups(recipe.parallel, "cuda", recipe.seed) as topology:
        chunks = build_model(transformer_config(shape, recipe, "cuda"), shape)
        plan = one_pass(recipe, dataset, shape, topology).plan(0)[topology.data_rank]
        reference_sums(chunks, len(dataset), [[dataset.pack(pack, layout, multiple) for pack in plan]], topology)
        policy = make_trainable(chunks, recipe)
        shift = RewardShift(recipe.objective.shift.kind, recipe.objective.shift.decay)
        loss = ObjectiveLoss(recipe.objective, shift, np.zeros((len(dataset), 2)))
        sampler = training_batches(recipe, dataset, shape, topology)
        seen = Seen(policy)
        for step in range(steps):
            packs = [dataset.pack(pack, layout, multiple) for pack in sampler.plan(step)[topology.data_rank]]
            with recorded_waits() as waits:
                policy.zero_grad()
                reports = forward_backward(policy.wrapped, packs, loss, topology)
                sums = reduce_sums(reports, packs, policy.squared_grad_norm(), topology)
                policy.update(1e-6, sums.grad_norm)
            seen.waits.append(waits)
            seen.num_packs = len(packs)
        policy.gather_weights()
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                assert parameter.is_cuda and parameter.main_grad.is_cuda, name
    return seen


def on_null_device() -> bool:
    return "SPOT_MEGATRON_NULL_CUDA" in os.environ
