"""The adapters that the LoRA cases of make_golden.py start from, made by PEFT. See README.md."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3ForCausalLM


def write_adapter(folder: Path) -> None:
    """A PEFT folder over the untied model: every projection, rank 4, A random and B zero as PEFT starts them."""
    torch.manual_seed(11)
    model = Qwen3ForCausalLM.from_pretrained(folder / "untied")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "untied"}, indent=1) + "\n")


def load_model(model: Path, adapter: Path | None) -> torch.nn.Module:
    """The model of a folder; with a PEFT folder, the one whose adapters alone are trained."""
    loaded = Qwen3ForCausalLM.from_pretrained(model)
    return loaded if adapter is None else PeftModel.from_pretrained(loaded, adapter, is_trainable=True)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that have gradients, by their names in a Hugging Face or PEFT folder."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
