"""SPoT training in one flat script, on the functions of `make train`: `python docs/examples/train_flat.py OUTPUT`.

One process on a CPU, the embedded tiny model, two updates. Left out: resume, metrics, heartbeat, cache, step-0 gate.
"""

import sys
from pathlib import Path

from spot_megatron.data.dataset import PreferencePairDataset
from spot_megatron.data.records import read_pairs
from spot_megatron.data.template import load_tokenizer, tokenize_pairs
from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.objective.shift import RewardShift
from spot_megatron.parallel.groups import parallel_groups
from spot_megatron.recipe import load_recipe
from spot_megatron.train.batches import one_pass, training_batches
from spot_megatron.train.optim import learning_rate, make_trainable
from spot_megatron.train.packing import pack_multiple
from spot_megatron.train.reference import reference_sums
from spot_megatron.train.step import ObjectiveLoss, forward_backward, reduce_sums
from spot_megatron.weights.export import export_hf
from spot_megatron.weights.load import load_hf


def main(output: Path) -> None:
    recipe = load_recipe("qwen3_tiny_spot", ["device=cpu", "train.max_steps=2", f"output={output}"])
    folder = Path(recipe.model.hf)
    hf = read_hf_config(folder)

    # Pairs: JSONL rows -> token ids, the prompt exactly as it is served.
    records = read_pairs(recipe.pair_files, recipe.data.format)
    tokenized = tokenize_pairs(records, load_tokenizer(folder), recipe.data.max_tokens, recipe.data.enable_thinking)
    dataset = PreferencePairDataset.build(tokenized, seed=recipe.seed, max_tokens=recipe.data.max_tokens, pad_id=0)

    with parallel_groups(recipe.parallel, recipe.device, recipe.seed) as topology:
        # Packs: which pairs share a micro-batch, for one pass over the data and for every update.
        def packs(plan):
            mine = plan[topology.data_rank]
            return [dataset.pack(indices, recipe.data.layout, pack_multiple(recipe)) for indices in mine]

        once = one_pass(recipe, dataset, hf, topology)
        sampler = training_batches(recipe, dataset, hf, topology)

        # Model: Megatron-Core's GPTModel with the pair attention and the chunked log-probability head.
        chunks = build_model(transformer_config(hf, recipe, topology.device.type), hf)
        load_hf(chunks, HFFolder(folder), hf)

        # Reference: the model before its first update, [num pairs, 2] log-probability sums in nats.
        batches = (packs(once.plan(step)) for step in range(once.num_steps))
        reference = reference_sums(chunks, len(dataset), batches, topology)

        # Updates: a step's loss is the sum over its pairs / number of pairs in the global batch.
        policy = make_trainable(chunks, recipe)
        shift = RewardShift(recipe.objective.shift.kind, recipe.objective.shift.decay)
        loss = ObjectiveLoss(recipe.objective, shift, reference)
        for step in range(sampler.num_steps):
            batch = packs(sampler.plan(step))
            policy.zero_grad()
            reports = forward_backward(policy.wrapped, batch, loss, topology)
            sums = reduce_sums(reports, batch, policy.squared_grad_norm(), topology)
            shift.update(sums.mean_reward)
            policy.update(learning_rate(recipe.optim, step, sampler.num_steps), sums.grad_norm)
            loss_mean = sums.loss / sums.num_pairs
            print(f"step {step + 1}: loss {loss_mean:.6f}, gradient norm {sums.grad_norm:.3f}", flush=True)

        # Result: a Hugging Face folder that transformers, vLLM and SGLang load.
        policy.gather_weights()
        export_hf(policy.bare, folder, output / "hf", hf, shard_gb=recipe.export.shard_gb, replace=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
