"""Uploads a finished run's Hugging Face folder to a private repository of the Hugging Face hub, with a model card.

The token is read from HF_TOKEN; HF_ENDPOINT names another hub. hub.json in the run folder records the upload, so that
the same command started again does not repeat it, and retries one that failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spot_megatron.errors import RecipeError, TrainingError
from spot_megatron.files import write_json
from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.recipe import Recipe
from spot_megatron.report.run import EXPORT
from spot_megatron.train.checkpoint import PAIRS, WEIGHTS

RECORD = "hub.json"
CARD = "README.md"


def check_token(recipe: Recipe) -> None:
    """Raises RecipeError if the recipe uploads its result and the environment has no token."""
    if recipe.export.push_to_hub and not os.environ.get("HF_TOKEN"):
        raise RecipeError(
            "export.push_to_hub: HF_TOKEN is not set; set it to a token with write access, or set "
            "export.push_to_hub=null"
        )


def push_to_hub(recipe: Recipe, run: Path, identity: Mapping[str, Any]) -> str | None:
    """Uploads `run`/hf in one commit. Call it on one rank.

    Returns:
        the commit's address; None if the record shows that this export was uploaded before.

    Raises:
        RecipeError: the repository exists and is public.
        TrainingError: the hub cannot be reached, or refuses; nothing is visible there then.
    """
    name, folder = recipe.export.push_to_hub, run / "hf"
    assert name is not None
    sums = (folder / CHECKSUMS).read_text(encoding="utf-8")
    record = run / RECORD
    if record.exists() and json.loads(record.read_text(encoding="utf-8")).get("sha256sums") == sums:
        return None
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi

    # Without `endpoint` the client uses the HF_ENDPOINT of when it was imported.
    api = HfApi(token=os.environ["HF_TOKEN"], endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        repository = api.create_repo(name, private=True, exist_ok=True).repo_id
        if not api.model_info(repository).private:
            raise RecipeError(
                f"export.push_to_hub: {repository} exists and is public; make it private, or name another repository"
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        operations.append(CommitOperationAdd(CARD, model_card(recipe, run, identity).encode()))
        commit = api.create_commit(repository, operations, commit_message=f"{recipe.name}: trained with spot_megatron")
    except (HTTPError, OSError, ValueError) as error:  # of the network, of the hub, of a name that it does not allow
        raise TrainingError(
            f"export.push_to_hub: {name} could not be uploaded ({error}); the result is in {folder}. Start the same "
            "command again to retry the upload alone"
        ) from None
    write_json(record, {"repository": repository, "commit": commit.commit_url, "sha256sums": sums})
    return str(commit.commit_url)


def model_card(recipe: Recipe, run: Path, identity: Mapping[str, Any]) -> str:
    """Markdown with the hub's metadata: objective, data digest, last metrics, export gate, and the whole recipe."""
    base = recipe.model.hf if not Path(recipe.model.hf).expanduser().is_dir() else None
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["spot", "preference-optimization"]}
    if base:
        head["base_model"] = base
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    shown = ("step", "loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
    rows = [f"| {key} | {last[key]:.6g} |" for key in shown]
    if (run / EXPORT).exists():
        rows += ["", "## Export", "", "```json", (run / EXPORT).read_text(encoding="utf-8").strip(), "```"]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"Trained from {base or Path(recipe.model.hf).name} with the objective `{recipe.objective.name}` of "
        "spot_megatron (Surgical Post-Training, arXiv 2603.01683).",
        "",
        f"Data: {identity['num_pairs']} pairs, digest of their token ids `{identity[PAIRS]}`; "
        f"digest of the initial weights `{identity[WEIGHTS]}`.",
        "",
        "## Last step",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.dump().rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)
