"""IFEval (arXiv 2311.07911): whether a response follows instructions that a program can check.

The verdicts are meant to equal lm-eval's, oddities included, because published numbers rest on them; tests compare the
two. Strict looks at the response alone; loose also at versions without its first line, its last line and asterisks.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import langdetect
import punkt

from spot_megatron.files import did_you_mean

langdetect.DetectorFactory.seed = 0  # its detection draws random numbers
FOLLOWED, LOOSELY, NOT = "+", "~", "-"
RELATIONS = ("less than", "at least")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
_FENCES = ("```json", "```Json", "```JSON", "```")
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """One instruction: its published name, and its arguments as JSON."""

    name: str
    arguments: str = "{}"


def check(rules: tuple[Rule, ...], prompt: str, response: str) -> str:
    """A mark for each rule: FOLLOWED (by the strict reading), LOOSELY (only by the loose one) or NOT."""
    versions = _loose_versions(response)
    marks = ""
    for rule in rules:
        arguments = {"prompt_to_repeat": prompt} | json.loads(rule.arguments)
        follows = _CHECKS[rule.name].follows
        if response.strip() and follows(response, arguments):
            marks += FOLLOWED
        else:
            marks += LOOSELY if any(text.strip() and follows(text, arguments) for text in versions) else NOT
    return marks


def problem(name: object, arguments: Arguments) -> str | None:
    """Why a rule of a file cannot be checked, or None."""
    if not isinstance(name, str) or name not in _CHECKS:
        return f"the instruction {name!r} is unknown{did_you_mean(str(name), _CHECKS)}; IFEval has {len(_CHECKS)} kinds"
    missing = [key for key in _CHECKS[name].needs if not arguments.get(key)]
    if missing:
        return f"`kwargs` of {name} lack `{missing[0]}`"
    relation = next((value for key, value in arguments.items() if key.endswith("relation")), RELATIONS[0])
    return (
        None if relation in RELATIONS else f"`kwargs` of {name}: the relation is {relation!r}, not one of {RELATIONS}"
    )


def _loose_versions(response: str) -> list[str]:
    lines = response.split("\n")
    cuts = (response, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip())
    return [text.replace("*", "") if plain else text for plain, text in product((False, True), cuts)]


def _compare(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == RELATIONS[0] else count >= bound


def _find(pattern: str, text: str) -> list[Any]:
    """All matches in any case. Keywords of the data set are patterns; one that is no pattern is taken literally."""
    try:
        return re.findall(pattern, text, re.IGNORECASE)
    except re.error:
        return re.findall(re.escape(pattern), text, re.IGNORECASE)


def _is_language(text: str, code: str) -> bool:
    """A text in which no language can be found (digits, say) counts as any."""
    try:
        return bool(langdetect.detect(text) == code)
    except langdetect.LangDetectException:
        return True


def _capitals(text: str, arguments: Arguments) -> bool:
    return _english_case(text, str.isupper)


def _lowercase(text: str, arguments: Arguments) -> bool:
    return _english_case(text, str.islower)


def _english_case(text: str, has_case: Callable[[str], bool]) -> bool:
    return has_case(text) and _is_language(text, "en")


@functools.lru_cache(maxsize=512)
def _num_sentences(text: str) -> int:
    return len(punkt.sent_tokenize(text))


# The word boundaries of the Penn Treebank, as far as they matter for words in capitals: marks are cut off, contractions
# are two words, hyphens and inner points part nothing.
_MARKS = re.compile(r"""[,;:!?()\[\]{}<>"“”‘`@#$%&*]+|--+|\.\.+|\.(?=\s*$)""")
_CONTRACTION = re.compile(r"(?<=\w)(N'T|'(?:S|M|D|LL|RE|VE)\b|'(?=\s|$))")


def _num_capital_words(text: str) -> int:
    words = _CONTRACTION.sub(r" \1", _MARKS.sub(" ", text)).split()
    return sum(word.isupper() for word in words)


def _highlights(text: str, arguments: Arguments) -> bool:
    single = (found.strip("*") for found in re.findall(r"\*[^\n*]*\*", text))
    double = (found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", text))
    return sum(bool(found.strip()) for found in (*single, *double)) >= arguments["num_highlights"]


def _sections(text: str, arguments: Arguments) -> bool:
    return len(re.split(rf"\s?{arguments['section_spliter']}\s?\d+\s?", text)) - 1 >= arguments["num_sections"]


def _bullets(text: str, arguments: Arguments) -> bool:
    stars, dashes = (re.findall(pattern, text, re.MULTILINE) for pattern in (r"^\s*\*[^*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == arguments["num_bullets"]


def _parts(text: str, separator: str) -> list[str] | None:
    """The parts between separators; empty ones may be first and last only, else None."""
    parts = re.split(separator, text)
    inner = parts[1:-1]
    return [part for part in parts if part.strip()] if all(part.strip() for part in inner) else None


def _paragraphs(text: str, arguments: Arguments) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == arguments["num_paragraphs"]


def _two_responses(text: str, arguments: Arguments) -> bool:
    parts = _parts(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _nth_paragraph(text: str, arguments: Arguments) -> bool:
    paragraphs = text.split("\n\n")
    count, index = sum(bool(part.strip()) for part in paragraphs), arguments["nth_paragraph"]
    if index > count or not paragraphs[index - 1].strip():
        return False
    word = paragraphs[index - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split(r"""[.,?!'"]""", word)[0].lower()
    return count == arguments["num_paragraphs"] and first == str(arguments["first_word"]).lower()


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = arguments["postscript_marker"]
    return bool(re.search(_POSTSCRIPTS.get(marker, marker.lower()), text.lower()))


def _json(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, arguments: Arguments) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _quotation(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@dataclass(frozen=True)
class Check:
    follows: Callable[[str, Arguments], bool]
    needs: tuple[str, ...] = ()


_CHECKS = {
    "keywords:existence": Check(lambda t, a: all(_find(word, t) for word in a["keywords"]), ("keywords",)),
    "keywords:frequency": Check(
        lambda t, a: _compare(len(_find(a["keyword"].strip(), t)), a["relation"], a["frequency"]),
        ("keyword", "relation", "frequency"),
    ),
    "keywords:forbidden_words": Check(
        lambda t, a: not any(_find(rf"\b{word}\b", t) for word in a["forbidden_words"]), ("forbidden_words",)
    ),
    "keywords:letter_frequency": Check(
        lambda t, a: _compare(t.lower().count(a["letter"].lower()), a["let_relation"], a["let_frequency"]),
        ("letter", "let_relation", "let_frequency"),
    ),
    "language:response_language": Check(lambda t, a: _is_language(t, a["language"]), ("language",)),
    "length_constraints:number_sentences": Check(
        lambda t, a: _compare(_num_sentences(t), a["relation"], a["num_sentences"]), ("relation", "num_sentences")
    ),
    "length_constraints:number_paragraphs": Check(_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": Check(
        lambda t, a: _compare(len(re.findall(r"\w+", t)), a["relation"], a["num_words"]), ("relation", "num_words")
    ),
    "length_constraints:nth_paragraph_first_word": Check(
        _nth_paragraph, ("num_paragraphs", "nth_paragraph", "first_word")
    ),
    "detectable_content:number_placeholders": Check(
        lambda t, a: len(re.findall(r"\[.*?\]", t)) >= a["num_placeholders"], ("num_placeholders",)
    ),
    "detectable_content:postscript": Check(_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": Check(_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": Check(lambda t, a: any(answer in t for answer in _ANSWERS)),
    "detectable_format:number_highlighted_sections": Check(_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": Check(_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": Check(_json),
    "detectable_format:title": Check(_title),
    "combination:two_responses": Check(_two_responses),
    "combination:repeat_prompt": Check(
        lambda t, a: t.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())
    ),
    "startend:end_checker": Check(
        lambda t, a: t.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()), ("end_phrase",)
    ),
    "startend:quotation": Check(_quotation),
    "change_case:capital_word_frequency": Check(
        lambda t, a: _compare(_num_capital_words(t), a["capital_relation"], a["capital_frequency"]),
        ("capital_relation", "capital_frequency"),
    ),
    "change_case:english_capital": Check(_capitals),
    "change_case:english_lowercase": Check(_lowercase),
    "punctuation:no_comma": Check(lambda t, a: "," not in t),
}
