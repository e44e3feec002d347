"""After each module of tests: process groups of runs within the test process end, and their threads with them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import psutil
import pytest

MANY_THREADS = 200  # a run within the process leaves some 50 behind; each of gloo's polls a hundred times a second


@pytest.fixture(scope="module", autouse=True)
def _groups_end() -> Iterator[None]:
    """Megatron's DDP never ends by itself: hooks of autograd nodes hold it, and it holds these nodes, directly and by
    the optimizer's parameters. The garbage collector does not see such cycles."""
    yield
    if "megatron.core.optimizer" not in sys.modules or psutil.Process().num_threads() < MANY_THREADS:
        return
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    for thing in gc.get_objects():
        if isinstance(thing, DistributedDataParallel):
            thing.grad_accs.clear()
            for parameter in thing.module.parameters():
                parameter.__dict__.clear()
        elif isinstance(thing, MegatronOptimizer):
            inner = vars(thing).get("optimizer")  # a chained one refuses the attribute
            if inner is not None:
                inner.param_groups.clear()
                inner.state.clear()
            thing.__dict__.clear()
    gc.collect()
