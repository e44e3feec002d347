"""Compares Megatron's model with transformers on prompts: hidden states of every layer, and logits."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spot_megatron.data.pack import build_pack
from spot_megatron.data.records import TokenPair
from spot_megatron.data.template import load_tokenizer
from spot_megatron.errors import PairError
from spot_megatron.files import read_rows
from spot_megatron.hf.config import HFModelConfig, read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import PairGPT, build_model
from spot_megatron.parallel.groups import parallel_groups, pick_device
from spot_megatron.recipe import Recipe
from spot_megatron.train.microbatch import microbatch
from spot_megatron.weights.checkpoint import load_model
from spot_megatron.weights.load import load_hf


@dataclass(frozen=True)
class StageError:
    """The largest difference of the two models after a layer or in the logits; `scale` is the largest magnitude."""

    name: str
    error: float
    scale: float

    @property
    def relative(self) -> float:
        return self.error / self.scale


def compare_logits(hf_folder: Path, other: Path, prompts: Path, device: str = "cpu") -> list[StageError]:
    """The largest differences between transformers on `hf_folder` and Megatron on `other`, in float32.

    transformers runs on the CPU, Megatron on `device` with the layers that a run uses there.

    Args:
        other: a Hugging Face folder, or a Megatron checkpoint (imported, or a run's).
        prompts: JSONL of {"prompt": text or messages} or {"prompt_ids": [...]}, such as a pair file.

    Raises:
        UserError: a folder or the prompts cannot be read.
    """
    sequences = read_prompts(prompts, hf_folder)
    expected = _run_transformers(hf_folder, sequences)
    gc.collect()
    found = _run_megatron(other, sequences, device)
    names = [*(f"layer {number}" for number in range(len(expected[0]) - 1)), "logits"]
    errors = []
    for stage, name in enumerate(names):
        theirs = torch.cat([states[stage] for states in expected])
        ours = torch.cat([states[stage] for states in found])
        errors.append(StageError(name, (ours - theirs).abs().max().item(), theirs.abs().max().item()))
    return errors


def read_prompts(file: Path, model_folder: Path) -> list[Tensor]:
    """Token ids [T] of each line."""
    tokenizer: Any = None
    sequences = []
    for number, row in read_rows(file):
        ids, prompt = row.get("prompt_ids"), row.get("prompt")
        if ids is None and prompt is None:
            raise PairError(f"{file}:{number}: neither prompt nor prompt_ids; add one of them")
        if ids is None:
            tokenizer = tokenizer or load_tokenizer(model_folder)
            if isinstance(prompt, str):
                ids = tokenizer(prompt).input_ids
            else:
                ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        sequences.append(torch.tensor(ids, dtype=torch.int64))
    if not sequences:
        raise PairError(f"{file} holds no prompts")
    return sequences


@torch.no_grad()
def _run_transformers(folder: Path, sequences: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each sequence, the hidden states [T, H] after every layer and the logits [T, V]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    results = []
    for ids in sequences:
        with _Recorder(model.model.layers) as recorder:
            logits = model(input_ids=ids[None]).logits[0]
        results.append([*(state.reshape(len(ids), -1) for state in recorder.states), logits])
    return results


@torch.no_grad()
def _run_megatron(folder: Path, sequences: Sequence[Tensor], device: str) -> list[list[Tensor]]:
    """The same values, computed by Megatron's model."""
    is_checkpoint = (folder / "model").is_dir()
    config = read_hf_config(folder / "hf" if is_checkpoint else folder)
    unused: dict[str, Any] = {"name": "verify", "output": "", "model": {"hf": ""}, "data": {"pairs": ""}}
    recipe = Recipe.model_validate({**unused, "precision": {"dtype": "fp32"}})
    with parallel_groups(recipe.parallel, pick_device(device), recipe.seed) as topology:
        chunks = build_model(transformer_config(config, recipe, device), config)
        if is_checkpoint:
            load_model(chunks, folder / "model")
        else:
            load_hf(chunks, HFFolder(folder), config)
        return [_states(chunks[0], ids, config, topology.device) for ids in sequences]


def _states(model: PairGPT, ids: Tensor, config: HFModelConfig, device: torch.device) -> list[Tensor]:
    """Runs the ids as the prompt of a pair whose responses are a token each; rows of the prompt see only the prompt."""
    token = np.zeros(1, dtype=np.int32)
    pair = TokenPair(id="prompt", prompt_ids=ids.int().numpy(), chosen_ids=token, rejected_ids=token + 1, source="")
    batch = microbatch(build_pack([pair], [0], "shared", 1, pad_id=0), device)
    with _Recorder([*model.decoder.layers, model.decoder]) as recorder:
        model(batch.input_ids, batch.position_ids, None, packed_seq_params=batch.layout)
    *layers, final = (state.reshape(-1, config.hidden_size)[: len(ids)] for state in recorder.states)
    weight = model.shared_embedding_or_output_weight() if config.tied else model.output_layer.weight
    return [state.cpu() for state in (*layers, (final @ weight.T)[:, : config.vocab_size])]


class _Recorder:
    """Records the output of each module while the context is open."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.states: list[Tensor] = []
        self._hooks = [module.register_forward_hook(self._keep) for module in modules]

    def _keep(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        del module, arguments
        self.states.append((output[0] if isinstance(output, tuple) else output).clone())

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
