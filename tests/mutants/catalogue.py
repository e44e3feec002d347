# ruff: noqa: E501 (a fault a line)
"""The planted faults: where, what is replaced by what, and the tests that must fail.

A test is a pytest id, or "split NAME ..." for tests/mutants/splits.py with those splits of tests/train/test_parity.py.
`equivalent` explains a fault that no test can see.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault in the file `path` of the repository."""

    area: str
    path: str
    old: str  # occurs once in the file
    new: str
    tests: str
    equivalent: str = ""


LOSSES = "tests/objective/test_losses.py"
SHIFT = "tests/objective/test_shift.py"
PACK = "tests/data/test_pack.py"
SAMPLER = "tests/data/test_sampler.py"
ATTENTION = "tests/model/attention/test_pair.py::test_outputs_and_gradients"
HEAD = "tests/model/test_logprob.py"
GATE = "tests/train/test_gate.py"
TEMPLATE = "tests/data/test_template.py"
ENDS = "tests/data/test_end_tokens.py"
TABLE = "tests/tools/pairs/test_grading_table.py::test_the_table"
GRADE = "tests/tools/pairs/test_grade.py::test_whole_responses"
FILES = "tests/tools/pairs/test_files.py"
CHECKPOINT = "tests/train/test_checkpoint.py"
BACKGROUND = f"{CHECKPOINT}::test_a_save_in_the_background_has_the_bits_of_its_step"
VALIDATION = "tests/train/test_validation.py"
BEST = "tests/train/test_best.py"
FAILURE = "tests/train/test_failure.py"
LORA = "tests/model/test_lora.py"
LORA_SPLITS = "tests/train/test_lora_parity.py::test_nothing_depends_on_the_split"
LORA_RUN = "tests/train/test_lora.py"

_O, _T, _D, _M = "spot_megatron/objective/", "spot_megatron/train/", "spot_megatron/data/", "spot_megatron/model/"

MUTANTS = [
    # objectives
    Mutant("objective", f"{_O}losses.py", "sigmoid(-reward_rejected, label", "sigmoid(reward_rejected, label", LOSSES),
    Mutant("objective", f"{_O}losses.py", "-(reward_rejected - shift)", "-(reward_rejected + shift)", LOSSES),
    Mutant("objective", f"{_O}losses.py", "(reward_chosen - reward_rejected, label", "(reward_rejected - reward_chosen, label", LOSSES),
    Mutant("objective", f"{_O}losses.py", "-policy_chosen / num_chosen", "-policy_chosen", LOSSES),
    Mutant("objective", f"{_O}reward.py", "torch.exp(logp_S.detach())", "torch.exp(logp_S)", LOSSES),
    Mutant("objective", f"{_O}reward.py", "SHARED] + sums_B3[:, REJECTED]", "REJECTED]", LOSSES),
    Mutant("objective", f"{_O}reward.py", "beta * (policy_B - reference_B)", "policy_B - reference_B", LOSSES),
    Mutant("validation", f"{_D}holdout.py", "int.from_bytes(prompt_digest(record)[:8]", "int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:8]", "tests/data/test_holdout.py"),
    Mutant("validation", f"{_T}validation.py", 'fixed = RewardShift("none", 0.0, value=shift)', 'fixed = RewardShift("none", 0.0, value=0.0)', VALIDATION),
    Mutant("validation", f"{_T}validation.py", "torch.random.fork_rng([device] if device.type == \"cuda\" else [])", "torch.random.fork_rng(enabled=False)", VALIDATION,
           "no random number is drawn in a validation: the dropout is 0. The fork guards later layers"),
    Mutant("validation", f"{_T}validation.py", "if best.step != self.in_model:", "if False:", BEST),
    Mutant("validation", f"{_T}validation.py", 'sign = -1 if self.key == "loss" else 1', "sign = 1", BEST),
    Mutant("validation", f"{_T}validation.py", "self.num_since += 1", "self.num_since = 1", BEST),
    Mutant("validation", f"{_T}checkpoint.py", "kept |= set() if step is None else {self.path(step)}", "kept |= set()", BEST),
    Mutant("results", f"{_T}checkpoint.py", 'state["results"] == _results(run, recipe)', "True", "tests/train/test_resume.py::test_a_finished_run_that_is_to_have_another_result_continues"),
    Mutant("results", f"{_T}export_gate.py", "load_hf(chunks, HFFolder(result), job.hf)", "pass", "tests/train/test_export_gate.py"),
    Mutant("background", "spot_megatron/weights/checkpoint.py", "tensor.clone() if on_cpu(chunks) else tensor", "tensor", BACKGROUND,
           "megatron.core copies tensors that are views, as parameters in DDP's buffers are; this is for all others"),
    Mutant("background", f"{_T}optimizer_state.py", "        self._planner.copy()\n", "", BACKGROUND),
    Mutant("failure", f"{_T}heartbeat.py", 'beat.get("start") != start or', "", FAILURE),
    Mutant("objective", f"{_O}losses.py", "+ label_smoothing * F.logsigmoid(-logit)", "+ label_smoothing * F.logsigmoid(logit)", LOSSES),
    Mutant("objective", f"{_O}losses.py", "losses + sft_weight * sft(", "losses + sft(", LOSSES),
    Mutant("gate", f"{_T}gate.py", "known[0] + objective.sft_weight * nll", "known[0] + nll", GATE),
    # delta
    Mutant("delta", f"{_O}shift.py", "self.decay * self.value + (1 - self.decay)", "(1 - self.decay) * self.value + self.decay", SHIFT),
    Mutant("delta", f"{_O}shift.py", "/ self.num_updates", "/ (self.num_updates + 1)", SHIFT),
    Mutant("delta", f"{_O}shift.py", '"num_updates": self.num_updates', '"num_updates": 0', SHIFT),
    Mutant("delta", f"{_T}step.py", "/ (2 * self.num_pairs)", "/ self.num_pairs", "split one_rank"),
    Mutant("delta", f"{_T}loop.py", "shift.update(sums.mean_reward)", "shift.update(0.0)", "split one_rank"),
    # reductions
    Mutant("reduction", f"{_T}step.py", "mpu.get_context_parallel_rank() == 0 else 0", "True else 0", "split cp2"),
    Mutant("reduction", f"{_T}step.py", "topology.tensor_rank == topology.context_rank == 0", "topology.context_rank == 0", "split tp2"),
    Mutant("reduction", f"{_T}step.py", "    dist.all_reduce(sums)\n", "", "split dp2"),
    Mutant("reduction", f"{_T}step.py", "    dist.all_reduce(values, group=mpu.get_data_parallel_group())\n", "", "split dp2"),
    Mutant("reduction", f"{_T}step.py", "    dist.all_reduce(values, group=mpu.get_pipeline_model_parallel_group())\n", "", "split pp2"),
    Mutant("reduction", f"{_T}microbatch.py", "tensor_parallel.reduce_from_tensor_model_parallel_region(sums, group=mpu.get_context_parallel_group())", "sums", "split cp2"),
    Mutant("reduction", f"{_M}logprob.py", "gathered_G2S[:, 1].sum(dim=0)", "gathered_G2S[0, 1]", "split tp2"),
    Mutant("reduction", f"{_M}logprob.py", "torch.logsumexp(gathered_G2S[:, 0], dim=0)", "gathered_G2S[0, 0]", "split tp2"),
    # scaling
    Mutant("scaling", f"{_T}step.py", "loss = losses.sum() if", "loss = losses.mean() if", "tests/train/test_scaling.py"),
    Mutant("scaling", f"{_T}optim.py", ".double().square().sum()", ".double().sum()", "split dp2"),
    Mutant("scaling", f"{_T}optim.py", 'self.weight_decay * group["wd_mult"]', "self.weight_decay", "tests/train/test_optim.py"),
    Mutant("scaling", f"{_T}optim.py", "return optim.lr * (step + 1) / warmup", "return optim.lr * step / warmup", "tests/train/test_optim.py"),
    # adapters
    Mutant("lora", "spot_megatron/model/lora.py", "* self.scale\n        hidden_of", "\n        hidden_of", LORA),
    Mutant("lora", "spot_megatron/model/lora.py", "part.unflatten(-1, (num_groups, -1))", "part.unflatten(-1, (1, -1))", LORA),
    Mutant("lora", "spot_megatron/model/lora.py", "        result, x = result\n", "        result, _ = result\n", LORA),
    Mutant("lora", "spot_megatron/model/lora.py", "return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)", "return hidden", LORA_SPLITS),
    Mutant("lora", "spot_megatron/model/lora.py", '{"sequence_parallel": self.layout.gathers}', "{}", LORA_SPLITS),
    Mutant("lora", "spot_megatron/model/lora.py", "return tensor_parallel.copy_to_tensor_model_parallel_region(parameter, group=layout.ranks)", "return parameter", LORA_SPLITS),
    Mutant("lora", "spot_megatron/model/lora.py", 'marks["shared"] = True', 'marks["shared"] = False', LORA_SPLITS),
    Mutant("lora", "spot_megatron/model/lora.py", "tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, split_dim, 1)", "pass", LORA_SPLITS),
    Mutant("lora", "spot_megatron/model/gpt.py", "embedded.requires_grad_() if torch.is_grad_enabled() else embedded", "embedded", LORA_SPLITS),
    Mutant("lora", "spot_megatron/weights/export.py", "torch.where(delta == 0, weight.float(), weight.float() + delta)", "weight.float() + delta", LORA_RUN),
    Mutant("lora", "spot_megatron/train/checkpoint.py", 'part["lora"] = _lora_part(dump["lora"])', 'part["lora"] = _lora_part(None)', LORA_RUN),
    # masks and attention
    Mutant("mask", f"{_M}attention/cpu.py", "attend(main, main, causal=True)", "attend(main, main, causal=False)", ATTENTION),
    Mutant("mask", f"{_M}attention/cpu.py", "attend(suffix, prefix, causal=False)\n                share", "attend(suffix, suffix, causal=False)\n                share", ATTENTION),
    Mutant("mask", f"{_M}attention/cpu.py", "torch.sigmoid(lse - prefix_lse)", "torch.sigmoid(prefix_lse - lse)", ATTENTION),
    Mutant("mask", f"{_M}attention/cpu.py", "                grad_key[prefix] += parts[1]\n", "", ATTENTION),
    Mutant("mask", f"{_M}attention/pair.py", "pack.head_position[scored] - own.start", "pack.head_position[scored]", "split cp2"),
    Mutant("mask", f"{_M}attention/pair.py", "all_to_all(group, by_rank).transpose(0, 1).reshape(", "all_to_all(group, by_rank).reshape(", "split cp2"),
    # layout
    Mutant("layout", f"{_D}pack.py", "branch_row = chosen_row + shared - 1", "branch_row = chosen_row + shared", PACK),
    Mutant("layout", f"{_D}pack.py", "np.zeros_like(main), prefix[has_own]", "np.zeros_like(main), 0 * prefix[has_own]", PACK),
    Mutant("layout", f"{_D}pack.py", "_interleave(prefix * has_own, own)", "_interleave(prefix, own)", PACK),
    Mutant("layout", f"{_D}pack.py", "num_chosen=chosen,", "num_chosen=chosen - shared,", PACK),
    Mutant("layout", f"{_D}pack.py", "return int(differs.argmax()) if", "return int(differs.argmax()) + 1 if", PACK),
    Mutant("layout", f"{_D}pack.py", "np.stack([shared, chosen - shared, own], axis=1)", "np.stack([shared, own, chosen - shared], axis=1)", PACK),
    Mutant("layout", f"{_D}pack.py", "num_padding = -num_rows % multiple_of if pairs", "num_padding = 0 if pairs", PACK),
    # LM head and embedding
    Mutant("head", f"{_M}logprob.py", "sum_S * torch.exp(largest_S - new_largest_S)", "sum_S", HEAD),
    Mutant("head", f"{_M}logprob.py", "max(0, min(vocab_size - vocab_start, weight_VpH.shape[0]))", "weight_VpH.shape[0]", HEAD),
    Mutant("head", f"{_M}logprob.py", "weight_VpH, target_S - vocab_start, group", "weight_VpH, target_S, group", HEAD),
    Mutant("head", f"{_M}embedding.py", ".mul_(owned_T1)", "", "tests/model/test_embedding.py"),
    # sampler
    Mutant("sampler", f"{_D}sampler.py", "[self.seed, epoch]", "[self.seed, 0]", SAMPLER),
    Mutant("sampler", f"{_D}sampler.py", "(batch + 1) * self.batch_pairs]", "(batch + 1) * self.batch_pairs - 1]", SAMPLER),
    Mutant("sampler", f"{_D}sampler.py", "int(self.tokens[pairs].sum()) <= most", "int(self.tokens[pairs].sum()) <= most + 1", SAMPLER),
    Mutant("sampler", f"{_D}sampler.py", "return _divide_up(count, self.microbatch_multiple) * self.microbatch_multiple", "return count", SAMPLER),
    # step-0 gate and finite numbers
    Mutant("gate", f"{_T}gate.py", "passed = sums.worst_drift <= bound and total <= total_bound", "passed = True", GATE),
    Mutant("gate", f"{_T}gate.py", "SIGMAS = 6.0", "SIGMAS = 600.0", GATE),
    Mutant("gate", f"{_T}gate.py", "passed = passed and abs(loss - known[0]) <= loss_bound", "pass", GATE),
    Mutant("gate", f"{_T}finite.py", "if math.isfinite(sums.loss) and math.isfinite(sums.grad_norm):", "if True:", "tests/train/test_finite.py"),
    Mutant("gate", f"{_T}finite.py", "if not bad.item():", "if True:", "tests/train/test_finite.py::test_bad_weights_are_not_saved"),
    # end tokens
    Mutant("end tokens", f"{_D}template.py", "ids = [*ids, ends.turn_end]", "ids = [*ids]", TEMPLATE),
    Mutant("end tokens", f"{_D}template.py", 'sampled is None and finish == "stop" and', "sampled is None and", TEMPLATE),
    Mutant("end tokens", f"{_D}template.py", "(ids[:-1] == end).any()", "(ids[:-2] == end).any()", TEMPLATE),
    Mutant("end tokens", f"{_D}end_tokens.py", "if turn_end not in stops:", "if False:", ENDS),
    Mutant("end tokens", f"{_D}end_tokens.py", "max(ending)[1]", "min(ending)[1]", ENDS),
    # grading
    Mutant("grading", "tools/pairs/grade.py", 'response.rpartition("</think>")', '("", "", response)', GRADE),
    Mutant("grading", "tools/pairs/grade.py", "math_text.UNKNOWN: (UNDECIDED, \"rounded\")", "math_text.UNKNOWN: (WRONG, \"another_number\")", TABLE),
    Mutant("grading", "tools/pairs/grade.py", "math_text.UNKNOWN: (UNDECIDED, \"not_proved\")", "math_text.UNKNOWN: (WRONG, \"another_answer\")", TABLE),
    Mutant("grading", "tools/pairs/math_compare.py", "return DIFFERENT if DIFFERENT in outcomes else UNKNOWN if UNKNOWN in outcomes else EQUAL", "return DIFFERENT if DIFFERENT in outcomes else EQUAL", TABLE),
    Mutant("grading", "tools/pairs/boxes.py", '"unclosed_box" if unclosed else "no_box"', '"no_box"', GRADE),
    # files
    Mutant("files", "spot_megatron/files.py", "            if kind is None:\n", "            if True:\n", FILES),
    Mutant("files", "spot_megatron/files.py", "            self.partial.unlink(missing_ok=True)\n", "            pass\n", FILES),
    Mutant("files", "tools/pairs/journal.py", "            os.ftruncate(self._file, offset)\n", "            pass\n", FILES),
    Mutant("files", "tools/pairs/journal.py", "        os.ftruncate(file, end)\n", "        pass\n", FILES),
    Mutant("files", "tools/pairs/journal.py", "zlib.crc32(start)):\n", "int(end[-11:-3], 16)):\n", FILES),
    Mutant("files", "spot_megatron/hf/checksums.py", "if sums.get(name, found[name]) != found[name]:", "if False:", "tests/hf/test_checksums.py"),
    Mutant("files", f"{_T}checkpoint.py", "            save_checksums(partial)\n", "", CHECKPOINT),
    Mutant("files", f"{_T}checkpoint.py", "reversed(names[0])", "names[0]", CHECKPOINT),
    Mutant("files", f"{_T}reference.py", 'if last != dump_line({"sha256": hashlib.sha256(b"".join(lines)).hexdigest()}):', "if False:", CHECKPOINT),
]  # fmt: skip
