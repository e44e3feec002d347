"""Answers and rectifications of the tiny model's questions by rule, without a model."""

import hashlib
import json
import random
import re
from typing import Any

from tools.oracle.http_server import Answer, RefusedRequest
from tools.pairs.prompts import MARKER_END, MARKER_START, PROBLEM_BLOCK, SOLUTION_BLOCK
from tools.tiny import skills


class RuleOracle:
    """Rectifies a prompt that names the marker lines; answers any other as a policy that errs at `wrong_rate`.

    Every answer is a function of the request alone.
    """

    def __init__(self, wrong_rate: float = 0.4, seed: int = 0) -> None:
        self._wrong_rate, self._seed = wrong_rate, seed

    def __call__(self, request: dict[str, Any], fault: str | None) -> Answer:
        prompt = request["messages"][-1]["content"]
        digest = hashlib.sha256(f"{self._seed}/{json.dumps(request, sort_keys=True)}".encode()).digest()
        rng = random.Random(digest)
        text = self._rectify(prompt, fault, rng) if MARKER_START in prompt else self._solve(prompt, rng)
        return Answer(text, prompt_tokens=len(prompt) // 4 + 1, completion_tokens=len(text) // 4 + 1)

    def _solve(self, question: str, rng: random.Random) -> str:
        task = _parse(question.strip())
        products = task.true_products()
        if rng.random() < self._wrong_rate:
            products[rng.randrange(len(products))] += rng.choice((-2, -1, 1, 2))
        style = skills.Style(
            leads=tuple(rng.choices(skills.CONNECTORS, k=4)),
            equals=tuple(rng.choices(skills.EQUALS, k=4)),
            closing=rng.choice(skills.CLOSINGS),
        )
        return skills.render(task, products, style)

    def _rectify(self, prompt: str, fault: str | None, rng: random.Random) -> str:
        question = _block(PROBLEM_BLOCK, prompt)
        task = _parse(question)
        text = skills.correct(question, _block(SOLUTION_BLOCK, prompt))
        if fault == "wrong_answer":
            products = task.true_products()
            products[rng.randrange(len(products))] += 1
            text = skills.render(task, products, skills.Style())
        thinking = "<think>\nI look for the first wrong step and edit from there.\n</think>\n\n"
        if fault == "missing_markers":
            return thinking + text
        return f"{thinking}{MARKER_START}\n{text}\n{MARKER_END}"


def _parse(question: str) -> skills.Task:
    try:
        return skills.parse(question)
    except ValueError as error:
        raise RefusedRequest(f"the rule oracle knows the tiny model's questions only ({error})") from None


def _block(name: str, prompt: str) -> str:
    match = re.search(rf"<{name}>\n(.*?)\n</{name}>", prompt, re.DOTALL)
    if match is None:
        raise RefusedRequest(f"no <{name}> block in the prompt")
    return match[1]
