"""Trains with a planted fault: `plant_worker.py CASE.json`, in one process or a torchrun group.

CASE.json: {"recipe": file, "rank", "parameter", "step", "value", "where": "gradient" or "weight"}. Every rank writes
<recipe>.rank_<n>.json: the error's message, and whether weights, optimizer and reward shift are those before the step.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from spot_megatron.errors import UserError  # noqa: E402
from spot_megatron.objective.shift import RewardShift  # noqa: E402
from spot_megatron.parallel.groups import parallel_groups  # noqa: E402
from spot_megatron.recipe import load_recipe  # noqa: E402
from spot_megatron.train import loop  # noqa: E402
from spot_megatron.train.optim import Policy, make_trainable  # noqa: E402
from spot_megatron.train.optimizer_blocks import blocks  # noqa: E402


def snapshot(policy: Policy, shift: RewardShift) -> list[Any]:
    policy.gather_weights()
    weights = [parameter.detach().clone() for chunk in policy.bare for parameter in chunk.parameters()]
    has_states = all(part.optimizer.state for part in policy.parts)
    states = [block.of(block.held.states()[block.state]).clone() for block in blocks(policy)] if has_states else []
    return [weights, states, shift.state_dict()]


def same(left: Any, right: Any) -> bool:
    if torch.is_tensor(left):
        return torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    recipe = load_recipe(case["recipe"])
    steps, before = 0, []
    policies: list[Policy] = []
    shifts: list[RewardShift] = []

    class Shift(RewardShift):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            shifts.append(self)

    with parallel_groups(recipe.parallel, "cpu", recipe.seed) as topology:

        def planted(chunks: Any, *arguments: Any) -> Policy:
            policy = make_trainable(chunks, *arguments)
            policies.append(policy)
            (parameter,) = [p for chunk in chunks for name, p in chunk.named_parameters() if name == case["parameter"]]

            def plant(gradient: torch.Tensor) -> torch.Tensor:
                if steps == case["step"] and topology.rank == case["rank"]:
                    gradient = gradient.clone()
                    gradient.view(-1)[-1] = float(case["value"])
                return gradient

            if case["where"] == "gradient":
                parameter.register_hook(plant)
            zero_grad, update = policy.zero_grad, policy.update

            def next_step() -> None:
                nonlocal steps
                steps += 1
                before[:] = snapshot(policy, shifts[-1])
                zero_grad()

            def spoiled_update(lr: float, norm: float) -> None:
                update(lr, norm)
                policy.gather_weights()
                if case["where"] == "weight" and steps == case["step"] and topology.rank == case["rank"]:
                    parameter.data.view(-1)[-1] = float(case["value"])

            policy.zero_grad, policy.update = next_step, spoiled_update  # type: ignore[method-assign]
            return policy

        loop.make_trainable, loop.RewardShift = planted, Shift  # type: ignore[assignment,misc]
        message, code = "", None
        try:
            code = loop.run(recipe, topology)
        except UserError as error:
            message = f"{type(error).__name__}: {error}"
        untouched = same(before, snapshot(policies[0], shifts[-1]))
        result = {"message": message, "code": code, "untouched": untouched, "steps": steps}
        Path(f"{case['recipe']}.rank_{topology.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
