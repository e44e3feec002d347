"""The paper's benchmarks: where each is published, how it is asked, sampled and graded. Data only; no file is bundled.

Sampling is arXiv 2603.01683's, section "Evaluation": temperature 0.7, top-p 0.8, top-k 20, up to 32,768 tokens, 16
samples a question of AIME and AMC, 5 of the others. Mathematics is asked with the closing instruction of elicitation,
so that a model is measured in the form in which its pairs were sampled; the paper does not print its prompts.
"""

from dataclasses import dataclass

from spot_megatron.errors import PairError
from spot_megatron.files import did_you_mean
from tools.pairs.prompts import ELICIT_SUFFIX

TEMPERATURE, TOP_P, TOP_K, MAX_TOKENS = 0.7, 0.8, 20, 32_768
IN_DOMAIN, OUT_OF_DOMAIN, INSTRUCTIONS, OWN = "in-domain", "OOD", "IFEval", "own"

CHOICE_SUFFIX = (
    "Reason step by step, and end your solution with this line, with LETTER replaced by the letter of your choice:\n"
    r"Therefore, the final answer is: $\boxed{LETTER}$."
)


@dataclass(frozen=True)
class Benchmark:
    """`source` is the published data set whose rows are read, `repeats` the samples of a question, `suffix` what is
    added to its text. `grader`: math, letter, ifeval or connect4; a row of one's own may name another."""

    name: str
    title: str
    group: str
    source: str
    licence: str
    repeats: int
    suffix: str = ELICIT_SUFFIX
    grader: str = "math"


# Licences as the data sets' cards state them, to our knowledge. The problems of AIME and AMC are MAA's.
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "AIME24", IN_DOMAIN, "huggingface.co/datasets/HuggingFaceH4/aime_2024", "not stated", 16),
        Benchmark("aime25", "AIME25", IN_DOMAIN, "huggingface.co/datasets/math-ai/aime25", "Apache-2.0", 16),
        Benchmark("amc23", "AMC23", IN_DOMAIN, "huggingface.co/datasets/math-ai/amc23", "not stated", 16),
        Benchmark("math500", "MATH-500", IN_DOMAIN, "huggingface.co/datasets/HuggingFaceH4/MATH-500", "not stated", 5),
        Benchmark("minerva", "Minerva", IN_DOMAIN, "huggingface.co/datasets/math-ai/minervamath", "not stated", 5),
        Benchmark(
            "olympiadbench",
            "OlympiadBench",
            IN_DOMAIN,
            "huggingface.co/datasets/Hothan/OlympiadBench, configuration OE_TO_maths_en_COMP",
            "Apache-2.0",
            5,
        ),
        Benchmark(
            "gpqa_diamond",
            "GPQA-Diamond",
            OUT_OF_DOMAIN,
            "huggingface.co/datasets/Idavidrein/gpqa, gpqa_diamond.csv (gated)",
            "CC-BY-4.0",
            5,
            CHOICE_SUFFIX,
            "letter",
        ),
        Benchmark(
            "connect4",
            "Connect4",
            OUT_OF_DOMAIN,
            "generated: python -m tools.eval.connect4 --boards 500 --seed 1",
            "this project's",
            5,
            "",  # its prompt says how the answer is written
            "connect4",
        ),
        Benchmark(
            "ifeval", "IFEval", INSTRUCTIONS, "huggingface.co/datasets/google/IFEval", "Apache-2.0", 5, "", "ifeval"
        ),
        Benchmark("questions", "Questions", OWN, "any file that tools.elicit reads", "", 1),
    )
}

# Table 1 of the paper: Qwen3-8B in per cent. (in-domain average, OOD average, IFEval, overall)
PAPER_ROWS = {
    "Qwen3-8B": (46.8, 29.9, 83.0, 47.1),
    "SFT": (41.0, 25.5, 79.6, 41.8),
    "RFT": (47.3, 26.1, 81.5, 46.4),
    "SFT+": (50.5, 30.7, 80.0, 49.4),
    "SPoT": (52.1, 41.4, 84.8, 53.3),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name. Raises PairError that lists the known ones."""
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS) or "."
        raise PairError(f"--benchmark {name!r} is unknown{hint} Known: {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]
