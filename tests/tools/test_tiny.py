"""The tiny model's world and its tokenizer. About 5 s on one core."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tools.eval.sample import prompt_ids
from tools.tiny import corpus, skills
from tools.tiny.make import heldout_questions
from tools.tiny.tokenizer import SPECIAL_TOKENS

ASSETS = Path(__file__).parents[2] / "recipes/assets/qwen3_tiny"
TOKENIZER = AutoTokenizer.from_pretrained(ASSETS)
HELDOUT = frozenset(item.question for item in heldout_questions())
QUESTIONS = [item for skill in skills.SKILLS for item in skills.generate(skill, 200, seed=5)]


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, str]]:
    """(question, response) of the corpus, right and wrong ones of every skill."""
    return list(corpus.examples(2000, seed=9, exclude=HELDOUT))


@pytest.fixture(scope="module")
def samples(examples) -> list[tuple[str, str]]:
    """The examples, some of them cut, some the answer to another question."""
    rng = random.Random(3)
    cut = [(question, response[: rng.randrange(len(response))]) for question, response in examples[:500]]
    misplaced = [(examples[i][0], examples[i + 1][1]) for i in range(500)]
    return examples + cut + misplaced


# ---- questions


def test_generate_is_reproducible_distinct_and_read_back():
    for skill in skills.SKILLS:
        questions = skills.generate(skill, 300, seed=4)
        assert questions == skills.generate(skill, 300, seed=4)
        assert questions != skills.generate(skill, 300, seed=5)
        assert len({item.id for item in questions}) == len({item.question for item in questions}) == 300
        assert {skills.parse(item.question).skill for item in questions} == {skill}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("4*2, 7*9", "8,63"),
        ("7*8+6*9", "110"),
        ("about 7*8+6*9", "110"),
        ("about 5*5+9*9", "110"),
        ("[square] 4*2, 7*9", "[8,63]"),
        ("[next] [is] 2*2, 3*3", "4,9"),
    ],
)
def test_answers_by_hand(question, answer):
    task = skills.parse(question)
    assert task.box(task.true_products()) == answer


@pytest.mark.parametrize("question", ["", "what is 2*2?", "[shout] 2*2, 3*3", "12*2, 3*3", "2*2, 3*3 "])
def test_a_question_of_another_world_is_refused(question):
    with pytest.raises(ValueError):
        skills.is_correct(question, "\\boxed{4}")


# ---- grader


@pytest.mark.parametrize(
    ("response", "content"),
    [
        ("\\boxed{8,63}", "8,63"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_extract_takes_the_last_balanced_box(response, content):
    assert skills.extract(response) == content


@pytest.mark.parametrize(
    ("question", "response", "right"),
    [
        ("4*2, 7*9", "here 4*2=8. then 7*9=63. the answer is \\boxed{8,63}.", True),
        ("4*2, 7*9", "here 4*2=8. then 7*9=65. the answer is \\boxed{8,65}.", False),
        ("4*2, 7*9", "here 4*2=8. then 7*9=63. the answer is \\boxed{63,8}.", False),
        ("[loud] 4*2, 7*9", "so 4*2=8! then 7*9=65! all done: \\boxed{8,65}!", True),
        ("[loud] 4*2, 7*9", "so 4*2=8! then 7*9=63. all done: \\boxed{8,63}!", False),
        ("[loud] 4*2, 7*9", "so 4*2=8! all done: \\boxed{8,63}!", False),
        ("[list] [hello] 4*2, 7*9", "hello.\n- so 4*2=8.\n- then 7*9=63.\nall done: \\boxed{8,63}.", True),
        ("[list] [hello] 4*2, 7*9", "hello. - so 4*2=8.\n- then 7*9=63.\nall done: \\boxed{8,63}.", False),
        ("[next] [is] 4*2, 7*9", "next we get 4*2 is 8. next 7*9 is 63. \\boxed{8,63}.", True),
        ("[next] [is] 4*2, 7*9", "next 4*2 is 8. then 7*9 is 63. \\boxed{8,63}.", False),
        ("[next] [is] 4*2, 7*9", "next 4*2 is 8. next 7*9=63. \\boxed{8,63}.", False),
        ("[polite] [arrow] 4*2, 7*9", "so 4*2 -> 8. and 7*9 -> 63. \\boxed{8,63}. thank you.", True),
        ("[polite] [arrow] 4*2, 7*9", "so 4*2 -> 8. and 7*9 -> 63. \\boxed{8,63}.", False),
    ],
)
def test_grades_by_hand(question, response, right):
    assert skills.is_correct(question, response) is right


# ---- oracle


def test_oracle_keeps_the_wording_and_changes_only_wrong_numbers():
    wrong = "look clearly 4*2=8. besides 7*9 gives 65. next 8*6 is 48. in short, \\boxed{8,65,48}."
    assert skills.correct("4*2, 7*9, 8*6", wrong) == wrong.replace("65", "63")
    wrong = "so 7*8=54. and 6*9 is 54. now 54+54 makes 107. this leaves \\boxed{107}."
    right = "so 7*8=56. and 6*9 is 54. now 56+54 makes 110. this leaves \\boxed{110}."
    assert skills.correct("7*8+6*9", wrong) == right


def test_oracle_completes_what_is_cut_or_out_of_order():
    assert skills.correct("4*2, 7*9", "well 4*2 is 8. now 7*") == (
        "well 4*2 is 8. then 7*9=63. the answer is \\boxed{8,63}."
    )
    assert skills.correct("4*2, 7*9", "well 4*2 is 9. now 9*7=63. \\boxed{9,63}.") == (
        "well 4*2 is 8. then 7*9=63. the answer is \\boxed{8,63}."
    )


def test_oracle_fixes_every_sample_and_leaves_right_ones(samples):
    for question, response in samples:
        corrected = skills.correct(question, response)
        assert skills.is_correct(question, corrected), (question, response)
        assert skills.correct(question, corrected) == corrected


def test_oracle_changes_numbers_only():
    """A wrong answer becomes the same wording with the true numbers, whatever was believed."""
    rng = random.Random(1)
    table = corpus.noisy_table()
    num_wrong = 0
    for item in QUESTIONS:
        task = skills.parse(item.question)
        believed = corpus.believe(task, table, rng)
        style = corpus.random_style(len(task.factors) + 1, rng)
        response = skills.render(task, believed, style)
        num_wrong += not skills.is_correct(item.question, response)
        assert skills.correct(item.question, response) == skills.render(task, task.true_products(), style)
    assert num_wrong > 100


def test_oracle_keeps_whole_steps_before_the_cut(examples):
    for question, response in examples:
        if skills.parse(question).skill not in ("products", "est") or not skills.is_correct(question, response):
            continue
        kept = response[: response.index(".") + 1]
        assert skills.correct(question, response[: len(kept) + 3]).startswith(kept)


@given(st.sampled_from(QUESTIONS), st.text(alphabet="4*2=8. 79,-\n!+then\\boxed{}") | st.text())
def test_oracle_mends_any_text(question, response):
    assert skills.is_correct(question.question, skills.correct(question.question, response))


# ---- corpus


def test_the_noisy_table_has_18_noisy_facts_with_probabilities():
    table = corpus.noisy_table()
    assert len(table) == 64
    assert sum(len(options) > 1 for options in table.values()) == 18
    for (left, right), options in table.items():
        assert options[0][0] == left * right
        assert sum(weight for _, weight in options) == pytest.approx(1)
        assert len({value for value, _ in options}) == len(options)


def test_corpus_obeys_every_tag_and_leaves_out_what_it_should(examples):
    num_wrong = 0
    for question, response in examples:
        assert question not in HELDOUT
        right = skills.is_correct(question, response)
        assert right or skills.parse(question).skill in ("products", "sum")
        num_wrong += not right
    assert num_wrong > 200


# ---- tokenizer


@given(st.text())
def test_tokenizer_is_lossless_on_any_text(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_words_are_whole_and_digits_single():
    pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER("next 7*9 makes 63.\n\n")["input_ids"])
    assert pieces == ["next", "\u0120", "7", "*", "9", "\u0120makes", "\u0120", "6", "3", ".", "\u010a\u010a"]


def test_every_word_of_the_world_is_one_token(examples):
    for text in (part for example in examples for part in example):
        pieces = [TOKENIZER.decode([token]) for token in TOKENIZER(text)["input_ids"]]
        assert re.findall(r"[A-Za-z]+", text) == [piece.strip() for piece in pieces if piece.strip().isalpha()]


def test_vocabulary_needs_padding_to_be_split():
    assert len(TOKENIZER) == 371
    assert len(TOKENIZER) % 16
    assert max(TOKENIZER.get_vocab().values()) == len(TOKENIZER) - 1
    assert TOKENIZER.convert_ids_to_tokens(list(range(366, 371))) == list(SPECIAL_TOKENS)
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_serving_prompt_ids_hold_the_empty_think_block():
    user = [366 + SPECIAL_TOKENS.index("<|im_start|>"), *TOKENIZER("user\n4*2")["input_ids"]]
    header = [user[0], *TOKENIZER("assistant\n")["input_ids"]]
    end_of_turn = TOKENIZER("<|im_end|>\n")["input_ids"]
    think = TOKENIZER("<think>\n\n</think>\n\n")["input_ids"]
    assert len(think) == 4
    assert len(end_of_turn) == 2
    assert prompt_ids(TOKENIZER, "4*2") == user + end_of_turn + header + think
    assert prompt_ids(TOKENIZER, "4*2", enable_thinking=True) == user + end_of_turn + header


def test_template_writes_turns_as_qwen3_does():
    """Facts of Qwen3's template: only the last answer has a think block, leading newlines of an answer go."""
    asked = {"role": "user", "content": "4*2"}
    answered = {"role": "assistant", "content": "\n\n8"}
    text = TOKENIZER.apply_chat_template([asked, answered], tokenize=False)
    assert text == ("<|im_start|>user\n4*2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n8<|im_end|>\n")
    text = TOKENIZER.apply_chat_template(
        [{"role": "system", "content": "be brief"}, asked, {"role": "assistant", "content": "8"}, asked],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n4*2<|im_end|>\n<|im_start|>assistant\n8<|im_end|>\n"
        "<|im_start|>user\n4*2<|im_end|>\n<|im_start|>assistant\n"
    )
