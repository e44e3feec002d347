"""The tiny model's world: procedural questions, their strict grader, and the rule-based oracle. Standard library only.

| skill      | question                  | right when                                                               |
|------------|---------------------------|--------------------------------------------------------------------------|
| `products` | `4*2, 7*9`                | the box holds the exact list, `\\boxed{8,63}`; the skill to be trained   |
| `sum`      | `7*8+6*9`                 | the box holds the exact sum; uses the same facts, never trained          |
| `est`      | `about 7*8+6*9`           | the box holds the sum of the products rounded to tens; a sibling skill   |
| `if`       | `[loud] [list] 4*2, 7*9`  | every format tag is obeyed (arithmetic is not graded); after IFEval      |
| `kw`       | `[next] [makes] 4*2, 7*9` | every step starts with / uses the named words (arithmetic is not graded) |

A response is a run of steps (`then 7*9 is 63.`) and a closing with the box. Everything is decided from the text of the
question and of the response, so the same rules serve as data generator, grader and oracle.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SKILLS = ("products", "if", "kw", "est", "sum")
DIGITS = range(2, 10)
OPENERS = ("here", "first", "so", "well", "okay", "see", "start", "look")
CONNECTORS = ("then", "next", "also", "and", "now", "again", "further", "besides", "onward", "likewise")
EQUALS = ("=", "is", "makes", "gives", "equals")
ABOUT = ("is about", "is near", "is roughly")
FILLERS = ("we get", "i find", "note that", "clearly", "we see")
CLOSINGS = (
    "the answer is",
    "so the answer is",
    "final answer:",
    "thus we have",
    "all done:",
    "in short,",
    "this leaves",
)
FORMAT_TAGS = ("loud", "list", "arrow", "polite", "hello", "square")
CONNECTOR_TAGS = CONNECTORS
EQUALS_TAGS = EQUALS[1:]

_TAG = re.compile(r"\[(\w+)\] ")
_PRODUCT = re.compile(r"(\d)\*(\d)")
_PHRASES = "|".join(re.escape(phrase) for phrase in sorted((*EQUALS, *ABOUT, "->"), key=len, reverse=True))
_STEP = re.compile(
    rf"(?P<lead>[^\d\\.!]*?)(?P<left>\d+)(?P<op>[*+])(?P<right>\d+) ?(?P<phrase>{_PHRASES}) ?(?P<value>\d+)[.!]"
)


@dataclass(frozen=True)
class Question:
    """One question with its gold answer (what the box must hold)."""

    id: str
    skill: str
    question: str
    answer: str
    grader: str = "tiny"  # its name in tools.eval


@dataclass(frozen=True)
class Equation:
    """`left op right = value`; `rounded` when the value is the product rounded to tens."""

    left: int
    op: str
    right: int
    value: int
    rounded: bool = False


@dataclass(frozen=True)
class Task:
    """A question, parsed from its text."""

    skill: str
    tags: frozenset[str]
    factors: tuple[tuple[int, int], ...]

    def equations(self, products: Sequence[int]) -> list[Equation]:
        """The steps of a response that believes `factors[i]` multiply to `products[i]`."""
        values = [round_to_tens(product) if self.skill == "est" else product for product in products]
        steps = [
            Equation(left, "*", right, value, self.skill == "est")
            for (left, right), value in zip(self.factors, values, strict=True)
        ]
        if self.skill in ("est", "sum"):
            steps.append(Equation(values[0], "+", values[1], values[0] + values[1]))
        return steps

    def box(self, products: Sequence[int]) -> str:
        """The content of the final box for these products."""
        if self.skill in ("est", "sum"):
            return str(self.equations(products)[-1].value)
        content = ",".join(map(str, products))
        return f"[{content}]" if "square" in self.tags else content

    def true_products(self) -> list[int]:
        return [left * right for left, right in self.factors]


@dataclass(frozen=True)
class Style:
    """The wording of one response: a lead and a phrase for each step (one entry serves all), and a closing."""

    leads: tuple[str, ...] = ("then",)
    equals: tuple[str, ...] = ("=",)
    about: str = "is about"
    closing: str = "the answer is"


def round_to_tens(value: int) -> int:
    """Nearest multiple of ten; a five goes up."""
    return (value + 5) // 10 * 10


def parse(question: str) -> Task:
    """Read a question. Raises ValueError for a text that is none of the five skills'."""
    tags = tuple(_TAG.findall(question))
    body = _TAG.sub("", question)
    if set(tags) - {*FORMAT_TAGS, *CONNECTOR_TAGS, *EQUALS_TAGS}:
        raise ValueError(f"unknown tag in {question!r}")
    factors = tuple((int(left), int(right)) for left, right in _PRODUCT.findall(body))
    if tags:
        skill = "if" if tags[0] in FORMAT_TAGS else "kw"
    else:
        skill = "est" if body.startswith("about ") else "sum" if "+" in body else "products"
    if not factors or question_text(skill, tags, factors) != question:
        raise ValueError(f"not a question of the tiny world: {question!r}")
    return Task(skill, frozenset(tags), factors)


def question_text(skill: str, tags: Iterable[str], factors: Sequence[tuple[int, int]]) -> str:
    """The text that `parse` reads back."""
    products = [f"{left}*{right}" for left, right in factors]
    body = "+".join(products) if skill in ("est", "sum") else ", ".join(products)
    return "".join(f"[{tag}] " for tag in tags) + ("about " if skill == "est" else "") + body


def generate(skill: str, count: int, seed: int) -> list[Question]:
    """`count` distinct questions of one skill; the same arguments give the same questions."""
    assert skill in SKILLS, skill
    rng = random.Random(f"{skill}/{seed}")
    texts: dict[str, None] = {}
    for _ in range(100 * count + 10_000):
        if len(texts) == count:
            break
        texts[_draw_question(skill, rng)] = None
    assert len(texts) == count, f"{skill} has fewer than {count} distinct questions"
    questions = []
    for index, text in enumerate(texts):
        task = parse(text)
        questions.append(Question(f"{skill}-{seed}-{index:05d}", skill, text, task.box(task.true_products())))
    return questions


def _draw_question(skill: str, rng: random.Random) -> str:
    num_factors = 2 if skill in ("est", "sum") else rng.randint(2, 4)
    factors = [(rng.choice(DIGITS), rng.choice(DIGITS)) for _ in range(num_factors)]
    tags: list[str] = []
    if skill == "if":
        tags = rng.sample(FORMAT_TAGS, rng.randint(1, 3))
    elif skill == "kw":
        tags = [rng.choice(CONNECTOR_TAGS), rng.choice(EQUALS_TAGS)]
        tags = tags if rng.random() < 0.5 else [rng.choice(tags)]
    return question_text(skill, tags, factors)


def render(task: Task, products: Sequence[int], style: Style, skip: int = 0) -> str:
    """A response in `style`, obeying the task's tags; `skip` leaves out the first steps (for completing a prefix)."""
    stop = "!" if "loud" in task.tags else "."
    bullet = "- " if "list" in task.tags else ""
    connector = next((tag for tag in CONNECTOR_TAGS if tag in task.tags), None)
    forced = "->" if "arrow" in task.tags else next((tag for tag in EQUALS_TAGS if tag in task.tags), None)
    lines = []
    for index, step in enumerate(task.equations(products)):
        lead = connector or style.leads[index % len(style.leads)]
        phrase = forced or (style.about if step.rounded else style.equals[index % len(style.equals)])
        gap = "" if phrase == "=" else " "
        lines.append(f"{bullet}{lead} {step.left}{step.op}{step.right}{gap}{phrase}{gap}{step.value}{stop}")
    lines = [*lines[skip:], f"{style.closing} \\boxed{{{task.box(products)}}}{stop}"]
    text = ("\n" if bullet else " ").join(lines)
    if "hello" in task.tags and skip == 0:
        text = f"hello{stop}" + ("\n" if bullet else " ") + text
    return text + (f" thank you{stop}" if "polite" in task.tags else "")


def extract(response: str) -> str | None:
    """The content of the last balanced `\\boxed{...}`, or None."""
    span = _box_span(response)
    return None if span is None else response[span[0] : span[1]]


def _box_span(response: str) -> tuple[int, int] | None:
    for match in reversed(list(re.finditer(r"\\boxed\{", response))):
        depth = 1
        for position in range(match.end(), len(response)):
            depth += {"{": 1, "}": -1}.get(response[position], 0)
            if depth == 0:
                return match.end(), position
    return None


def is_correct(question: str, response: str) -> bool:
    """Strict grade from the question's text alone. Raises ValueError for a question of another world."""
    task = parse(question)
    content = extract(response)
    if content is None:
        return False
    if task.skill in ("if", "kw"):
        return _obeys(task, response)
    return content == task.box(task.true_products())


def _obeys(task: Task, response: str) -> bool:
    """Whether the response has the question's steps and satisfies every tag; values are not looked at."""
    steps = list(_STEP.finditer(response))
    if [(int(step["left"]), step["op"], int(step["right"])) for step in steps] != [
        (a, "*", b) for a, b in task.factors
    ]:
        return False
    content = extract(response) or ""
    holds = {
        "loud": "." not in response and response.endswith("!"),
        "list": all(step["lead"].startswith("- " if step.start() == 0 else "\n- ") for step in steps),
        "arrow": all(step["phrase"] == "->" for step in steps),
        "polite": response.endswith(("thank you.", "thank you!")),
        "hello": response.startswith(("hello.", "hello!")),
        "square": content.startswith("[") and content.endswith("]"),
    }
    for tag in CONNECTOR_TAGS:
        holds[tag] = all(step["lead"].split()[:1] == [tag] for step in steps)
    for tag in EQUALS_TAGS:
        holds[tag] = all(step["phrase"] == tag for step in steps)
    return all(holds[tag] for tag in task.tags)


def correct(question: str, response: str) -> str:
    """The rule-based oracle: the response as if it had been solved right the first time.

    Keeps every word and changes only the numbers of wrong steps and the box. Where that does not make the answer right
    (a step is missing, a tag is not obeyed, the response was cut), it keeps the longest run of leading steps that still
    can be completed and renders the rest plainly. Nothing before the first wrong step is touched.
    """
    task = parse(question)
    expected = task.equations(task.true_products())
    steps = list(_STEP.finditer(response))
    num_sound = 0
    for step, truth in zip(steps, expected, strict=False):
        if not _same_shape(step, truth):
            break
        num_sound += 1
    edits = [
        edit for step, truth in zip(steps[:num_sound], expected, strict=False) for edit in _number_edits(step, truth)
    ]
    if num_sound == len(steps) == len(expected):
        box = _box_span(response)
        box_edit = [(*box, task.box(task.true_products()))] if box else []
        candidate = _apply(response, edits + box_edit)
        if is_correct(question, candidate):
            return candidate
    for keep in range(num_sound, -1, -1):
        end = steps[keep - 1].end() if keep else 0
        prefix = _apply(response[:end], [edit for edit in edits if edit[1] <= end])
        separator = "" if not keep else "\n" if "list" in task.tags else " "
        candidate = prefix + separator + render(task, task.true_products(), Style(), skip=keep)
        if is_correct(question, candidate):
            return candidate
    raise AssertionError(f"a plain rendering is always right: {question!r}")


def _same_shape(step: re.Match[str], truth: Equation) -> bool:
    """Whether the step is the expected one up to its computed numbers (a sum's operands are computed, too)."""
    operands = (int(step["left"]), int(step["right"]))
    return step["op"] == truth.op and (truth.op == "+" or operands == (truth.left, truth.right))


def _number_edits(step: re.Match[str], truth: Equation) -> list[tuple[int, int, str]]:
    """(start, end, new text) for each number of the step that is wrong."""
    numbers = {"left": truth.left, "right": truth.right, "value": truth.value}
    return [(*step.span(name), str(number)) for name, number in numbers.items() if step[name] != str(number)]


def _apply(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text
