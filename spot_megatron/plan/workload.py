"""The work of a run: its pairs, and the packs that the training's sampler makes of them.

Pairs come from the recipe's file, or are drawn from stated assumptions. Either way they are TokenPairs, and
data/pack.py and data/sampler.py say how many positions they take and how they are dealt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spot_megatron.data.costs import cost_model
from spot_megatron.data.pack import Layout, num_shared_tokens, positions_and_products
from spot_megatron.data.records import Pair, TokenPair, read_pairs
from spot_megatron.errors import PairError, RecipeError
from spot_megatron.files import read_rows
from spot_megatron.hf.config import HFModelConfig
from spot_megatron.parallel.split import Split
from spot_megatron.recipe import Recipe
from spot_megatron.train.packing import pack_multiple, recomputed_above, training_sampler

CHARS_PER_TOKEN = 3.0  # English mathematics under a 150k vocabulary, roughly; used only without the model's tokenizer
LAYOUTS: tuple[Layout, Layout] = ("shared", "separate")
POSITIONS, PRODUCTS, SCORED = range(3)  # columns of a micro-batch's load


@dataclass(frozen=True)
class Assumptions:
    """Random pairs for a recipe without files: lognormal response lengths, sized as in arXiv 2603.01683."""

    pairs: int = 4000  # arXiv 2603.01683
    prompt: int = 200  # tokens: a competition question with its template
    response: int = 2000  # mean tokens: Qwen3-8B without thinking, on mathematics
    cv: float = 0.6  # standard deviation of response lengths / mean: 0.5 to 0.7 in sampled answers
    shared: float = 0.5  # mean share of a response before its first edit: edits that start anywhere in it

    @classmethod
    def parse(cls, items: Sequence[str]) -> Assumptions:
        """`key=value` items. Raises RecipeError for a key or value that cannot be."""
        kinds = {"pairs": int, "prompt": int, "response": int, "cv": float, "shared": float}
        values: dict[str, Any] = {}
        for item in items:
            key, _, text = item.partition("=")
            try:
                values[key] = kinds[key](text)
            except (KeyError, ValueError):
                raise RecipeError(
                    f"--assume {item!r}: write key=number with a key of {', '.join(kinds)}, for instance response=1500"
                ) from None
        result = cls(**values)
        if min(result.pairs, result.prompt, result.response) < 1 or result.cv <= 0 or not 0 <= result.shared < 1:
            raise RecipeError("--assume: counts must be at least 1, cv above 0, and shared in [0, 1)")
        return result


@dataclass(frozen=True)
class Workload:
    """Pairs to train on. `source` names their files or the assumptions, `dropped` counts dropped pairs by reason, and
    `missing` are the recipe's files that do not exist."""

    pairs: list[TokenPair]
    source: str
    dropped: dict[str, int]
    missing: tuple[str, ...] = ()
    num_held_out: int = 0  # of validation.pairs or validation.fraction; their lengths are taken to be those of `pairs`
    num_probe: int = 0  # texts of validation.probe, each taken to be as long as half a pair

    @cached_property
    def counts(self) -> dict[Layout, np.ndarray]:
        """By layout, [N, 3]: positions in a pack, key-query products, scored targets of every pair."""
        responses = np.array([len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self.pairs])
        shared = np.array([num_shared_tokens(pair) for pair in self.pairs])
        counted = {layout: [positions_and_products(pair, layout) for pair in self.pairs] for layout in LAYOUTS}
        return {
            "shared": np.column_stack([counted["shared"], responses - shared]),
            "separate": np.column_stack([counted["separate"], responses]),
        }

    @property
    def validation_share(self) -> float:
        """A validation's forward pass, of one over the pairs."""
        return (self.num_held_out + self.num_probe / 2) / len(self.pairs)

    @property
    def shared_share(self) -> float:
        """Share of the positions of two sequences that sharing the prefix saves."""
        return 1 - self.counts["shared"][:, POSITIONS].sum() / self.counts["separate"][:, POSITIONS].sum()


def assumed_pairs(assumptions: Assumptions, recipe: Recipe) -> Workload:
    """Pairs of the stated lengths, without those over data.max_tokens, which training drops, and those that no
    micro-batch can hold, at which training stops: both are counted."""
    rng = np.random.default_rng(recipe.seed)
    sigma = np.sqrt(np.log1p(assumptions.cv**2))
    lengths = rng.lognormal(np.log(assumptions.response) - sigma**2 / 2, sigma, assumptions.pairs)
    # A mean share s of a uniform start of the edit: uniform over [0, 2s] up to one half, over [2s - 1, 1] above.
    low, high = max(0.0, 2 * assumptions.shared - 1), min(1.0, 2 * assumptions.shared)
    starts = rng.uniform(low, high, assumptions.pairs)
    pairs = [
        _pair_of_lengths(f"assumed-{i}", assumptions.prompt, max(2, round(n)), max(2, round(n)), int(s * n))
        for i, (n, s) in enumerate(zip(lengths, starts, strict=True))
    ]
    data = recipe.data
    short = [pair for pair in pairs if len(pair.prompt_ids) + len(pair.chosen_ids) <= data.max_tokens]
    kept = [pair for pair in short if positions_and_products(pair, data.layout)[0] <= data.tokens_per_microbatch]
    if not kept:
        raise RecipeError(
            f"data.max_tokens={data.max_tokens} and data.tokens_per_microbatch={data.tokens_per_microbatch} leave none "
            "of the assumed pairs; describe yours with --assume, for instance --assume response=500"
        )
    words = ", ".join(f"{field.name} {getattr(assumptions, field.name)}" for field in fields(assumptions))
    counts = {"too_long": len(pairs) - len(short), "over_tokens_per_microbatch": len(short) - len(kept)}
    return Workload(kept, f"assumed ({words})", {reason: count for reason, count in counts.items() if count})


def _pair_of_lengths(name: str, prompt: int, chosen: int, rejected: int, shared: int) -> TokenPair:
    """Token ids that only have the right lengths, and differ first after `shared` tokens of the responses."""
    other = np.zeros(rejected, dtype=np.int32)
    other[min(shared, rejected - 1)] = 1
    return TokenPair(name, np.zeros(prompt, dtype=np.int32), np.zeros(chosen, dtype=np.int32), other)


def pairs_of_files(recipe: Recipe, files: Sequence[Path]) -> Workload:
    """The pairs as training sees them. Without the model's tokenizer here, lengths are estimated from characters.

    Raises:
        PairError: a file cannot be read or no pair is left; the message names line and remedy.
    """
    records = read_pairs(files, recipe.data.format)
    texts = [record for record in records if isinstance(record, Pair)]
    folder = Path(recipe.model.hf).expanduser()
    names = ", ".join(map(str, files))
    if texts and not folder.is_dir():
        pairs = [_by_characters(record) if isinstance(record, Pair) else record for record in records]
        kept = [
            p
            for p in pairs
            if len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= recipe.data.max_tokens
        ]
        dropped = {"too_long": len(pairs) - len(kept)} if len(kept) < len(pairs) else {}
        how = f", {CHARS_PER_TOKEN:g} characters a token (the tokenizer is not on this machine)"
    else:
        from spot_megatron.data.template import load_tokenizer, tokenize_pairs  # takes transformers, hence seconds

        tokenizer = load_tokenizer(folder) if texts else None
        tokenized = tokenize_pairs(records, tokenizer, recipe.data.max_tokens, recipe.data.enable_thinking)
        kept, dropped, how = tokenized.pairs, {reason: len(ids) for reason, ids in tokenized.dropped.items()}, ""
    if not kept:
        raise PairError(f"{names}: no pair is left to train on; dropped: {dropped}")
    return Workload(kept, f"{names}{how}", dropped)


def with_validation(workload: Workload, recipe: Recipe) -> Workload:
    """Adds what the recipe validates on; a fraction is taken out of the pairs, from the end of a recipe's assumed ones.

    Files that do not exist are not counted.
    """
    options = recipe.validation
    num_held_out = sum(_num_rows(path) for path in options.pair_files)
    pairs = workload.pairs
    if options.fraction:
        num_held_out = round(options.fraction * len(pairs))
        pairs = pairs[: max(1, len(pairs) - num_held_out)]
    num_probe = _num_rows(Path(options.probe)) if options.probe else 0
    return replace(workload, pairs=pairs, num_held_out=num_held_out, num_probe=num_probe)


def _num_rows(path: Path) -> int:
    return sum(1 for _ in read_rows(path)) if path.exists() else 0


def _by_characters(record: Pair) -> TokenPair:
    prompt = record.prompt if isinstance(record.prompt, str) else "".join(str(m.get("content")) for m in record.prompt)
    same = next((i for i, (a, b) in enumerate(zip(record.chosen, record.rejected, strict=False)) if a != b), None)
    shared = min(len(record.chosen), len(record.rejected)) if same is None else same
    prompt_tokens, chosen, rejected, shared = (
        max(1, round(n / CHARS_PER_TOKEN)) for n in (len(prompt), len(record.chosen), len(record.rejected), shared)
    )
    return replace(_pair_of_lengths(record.id, prompt_tokens, chosen + 1, rejected + 1, shared), source=record.source)


@dataclass(frozen=True)
class Load:
    """Packs of some steps of a run, as the sampler plans them, and totals of the whole run.

    `steps`: for each sampled step, [data ranks, micro-batches, 3] positions with padding, products and scored targets.
    """

    steps: list[np.ndarray]
    num_steps: int
    num_tokens: float  # of the whole run, counted as two sequences a pair
    num_unique_tokens: float  # of the whole run, as laid out, without padding
    pair_counts: np.ndarray  # [N, 3] of all pairs once, for the reference pass
    largest_pair: int  # positions
    padding: float  # share of the sampled steps' positions that are padding

    @property
    def num_microbatches(self) -> int:
        """The most micro-batches of a rank in a sampled step."""
        return max(step.shape[1] for step in self.steps)


def plan_steps(recipe: Recipe, split: Split, workload: Workload, model: HFModelConfig, most_steps: int = 12) -> Load:
    """The run's packs, from the sampler that training uses, for up to `most_steps` steps spread over the run.

    Raises:
        PairError: a pair does not fit in data.tokens_per_microbatch.
    """
    data = recipe.data
    counts, model_costs = workload.counts[data.layout], cost_model(model)
    positions, products, scored = counts.T
    pair_costs = model_costs.of(positions, products, scored, recomputed_above(recipe.memory))
    sampler = training_sampler(recipe, workload.pairs, positions, pair_costs, split.data)
    multiple = pack_multiple(recipe)
    chosen = np.unique(np.linspace(0, sampler.num_steps - 1, min(most_steps, sampler.num_steps)).round().astype(int))
    steps = [_loads(sampler.plan(int(step)), counts, multiple) for step in chosen]
    real_positions = sum(counts[sampler.batch(int(step)), POSITIONS].sum() for step in chosen)
    if recipe.train.max_steps is None:
        shown = np.concatenate([sampler.epoch_pairs(epoch) for epoch in range(recipe.train.epochs)])
        uses = np.bincount(shown, minlength=len(counts))
    else:
        every = [sampler.batch(step) for step in range(sampler.num_steps)]
        uses = np.bincount(np.concatenate(every), minlength=len(counts))
    return Load(
        steps=steps,
        num_steps=sampler.num_steps,
        num_tokens=float(uses @ workload.counts["separate"][:, POSITIONS]),
        num_unique_tokens=float(uses @ counts[:, POSITIONS]),
        pair_counts=counts,
        largest_pair=int(counts[:, POSITIONS].max()),
        padding=1 - real_positions / sum(step[..., POSITIONS].sum() for step in steps),
    )


def _loads(plan: list[list[list[int]]], counts: np.ndarray, multiple: int) -> np.ndarray:
    loads = np.array([[counts[members].sum(axis=0) for members in rank] for rank in plan], dtype=np.float64)
    positions = loads[..., POSITIONS]
    loads[..., POSITIONS] = np.maximum(np.ceil(positions / multiple), 1) * multiple
    return loads
