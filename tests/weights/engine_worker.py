"""Builds every rank of a small model with Transformer Engine's layers: `engine_worker.py MODEL key=value ...`

Transformer Engine asks whether there is a CUDA device before it makes a layer, but needs none to make one.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, name="H100"
)

from spot_megatron.model.config import transformer_config  # noqa: E402
from spot_megatron.model.gpt import build_model  # noqa: E402
from spot_megatron.parallel import cpu  # noqa: E402
from spot_megatron.plan.dryrun import Holdings, fake_rank, places  # noqa: E402
from spot_megatron.plan.models import planned_model  # noqa: E402
from spot_megatron.recipe import load_recipe  # noqa: E402
from spot_megatron.train.optim import make_trainable  # noqa: E402


def main() -> None:
    model, *overrides = sys.argv[1:]
    cpu.use_torch_adamw = lambda: None  # it is Transformer Engine's that is built here
    cpu.redirect_cuda()
    recipe = load_recipe("qwen3_0p6b_spot", [f"model.hf={model}", *overrides])
    hf, num_ranks = planned_model(model), 8
    holdings = Holdings(hf)
    for place, members in sorted(places(recipe.parallel, num_ranks).items()):
        with fake_rank(recipe.parallel, members[0], num_ranks):
            config = transformer_config(hf, recipe, "cuda")
            with torch.device("meta"):
                holdings.add(place, build_model(config, hf))
            if members[0] == 0:  # the optimizer is made, too, from weights that exist
                policy = make_trainable(build_model(config, hf), recipe)
                parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
                print("optimizer", *sorted({type(part.optimizer).__module__.split(".")[0] for part in parts}))
                names = {type(m).__name__ for chunk in policy.bare for m in chunk.modules()}
                print("layers", *sorted(name for name in names if name.startswith("TE")))
                fused = {
                    m.fuse_wgrad_accumulation for m in policy.bare[0].modules() if hasattr(m, "fuse_wgrad_accumulation")
                }
                print("fused weight gradients", *fused)
                experts = [p for name, p in policy.bare[0].named_parameters() if ".mlp.experts." in name]
                assert all(param.tensor_model_parallel and not param.allreduce for param in experts)
    print("parameters", holdings.check())


if __name__ == "__main__":
    main()
