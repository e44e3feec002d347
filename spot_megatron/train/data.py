"""A run's pair files and probe -> tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from spot_megatron.data.holdout import Record, hold_out, prompt_digest
from spot_megatron.data.records import TokenPair, read_pairs, read_probe
from spot_megatron.data.template import TokenizedPairs, check_vocabulary, load_tokenizer, tokenize_pairs
from spot_megatron.errors import PairError, RecipeError
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.parallel.groups import Topology
from spot_megatron.recipe import Recipe
from spot_megatron.train.run_folder import say


@dataclass(frozen=True)
class RunData:
    """Token ids of a run's pairs, and the pairs that were dropped from training by reason."""

    training: TokenizedPairs
    held_out: list[TokenPair] = field(default_factory=list)
    probe: list[TokenPair] = field(default_factory=list)  # without a rejected side


def read_data(recipe: Recipe, hf_folder: Path, hf: HFModelConfig, topology: Topology, started: datetime) -> RunData:
    """Reads and tokenises every file of the recipe. Prints how many pairs were dropped and why.

    Chat templates that read the clock get `started`, so that a resumed run has the same prompts.

    Raises:
        UserError: a file, its pairs or the tokenizer cannot be used, or a set is left without a pair.
    """
    data, validation = recipe.data, recipe.validation
    training: list[Record] = read_pairs(recipe.pair_files, data.format)
    held_out: list[Record] = []
    if validation.pair_files:
        held_out = read_pairs(validation.pair_files, data.format)
        _warn_of_shared_prompts(training, held_out, topology)
    elif validation.fraction:
        training, held_out = hold_out(training, validation.fraction)
    probe = read_probe(Path(validation.probe)) if validation.probe else []

    has_text = any(not isinstance(record, TokenPair) for record in [*training, *held_out, *probe])
    if data.enable_thinking and not has_text:
        raise RecipeError("data.enable_thinking=true: these pairs are token ids already, so no template reads it")
    tokenizer = load_tokenizer(hf_folder) if has_text else None

    def tokenize(records: Sequence[Record], key: str, noun: str) -> TokenizedPairs:
        tokenized = tokenize_pairs(records, tokenizer, data.max_tokens, data.enable_thinking, started)
        for reason, ids in tokenized.dropped.items():
            say(topology, f"dropped {len(ids)} of {len(records)} {noun}: {reason} (first: {ids[0]})")
        if records and not tokenized.pairs:
            raise PairError(f"{key}: all {noun} were dropped; see the reasons above")
        check_vocabulary(tokenized.pairs, hf.vocab_size, f"vocab_size of {hf_folder}/config.json")
        return tokenized

    held_out_key = f"validation.pairs={validation.pairs}" if validation.pairs else "validation.fraction"
    return RunData(
        tokenize(training, f"data.pairs={data.pairs}", "pairs"),
        tokenize(held_out, held_out_key, "held-out pairs").pairs,
        tokenize(probe, f"validation.probe={validation.probe}", "texts of the probe").pairs,
    )


def _warn_of_shared_prompts(training: Sequence[Record], held_out: Sequence[Record], topology: Topology) -> None:
    trained = {prompt_digest(record) for record in training}
    shared = [record for record in held_out if prompt_digest(record) in trained]
    if shared:
        say(
            topology,
            f"WARNING: data.pairs holds the prompts of {len(shared)} of {len(held_out)} pairs of validation.pairs too "
            f"(first: {shared[0].source}), so validation overstates what the model does on new prompts",
        )
