"""Synthetic tasks: reproducible, answerable from the document alone, within their length, exact at token boundaries."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.benchmarks.synthetic.tasks import TASKS, Sample, build

TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "pocket-lm" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


def haystack(seed: int = 0) -> Iterator[str]:
    """Endless paragraphs of made-up sentences, some with digits, quotes, indentation and several lines."""
    rng = random.Random(seed)
    text = "the grey river ran past a mill and nobody saw 12 boats it's “late” over (there) while rain fell"
    words = text.split()
    while True:
        sentences = []
        for _ in range(rng.randint(1, 5)):
            middle = " ".join(rng.choice(words) for _ in range(rng.randint(10, 24)))
            sentences.append("So " + middle + rng.choice(".!?"))
        yield " ".join(sentences)
        yield f"def f{rng.randint(0, 99)}(x):\n    return  x + {rng.randint(0, 999)}"


def make(task: str, seed: int = 0, length: int = 1500, **changes: object) -> Sample:
    arguments = {"length": length, "count": lambda text: len(text.split()) + 2, "questions": 6, **changes}
    return build(random.Random(seed), haystack(seed), {task: 9}, **arguments)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_sample(task: str) -> None:
    assert make(task, seed=3) == make(task, seed=3)
    assert make(task, seed=3) != make(task, seed=4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(4))
def test_document_holds_the_answer(task: str, seed: int) -> None:
    sample = make(task, seed)
    assert sample.questions
    for example in sample.examples():
        document, question, answer = example.document, example.question, example.answer.strip()
        assert example.task == task
        assert example.prompt == document + question
        assert example.answer.startswith(" ")
        if task == "kv":
            kind, key = re.search(r"What is the (.+) of the (.+)\?", question).groups()
            assert document.count(synthetic.kv_statement(key, answer, kind)) == 1
        elif task == "facts":
            if "live?" in question:
                person = re.search(r"Where does (.+) live", question).group(1)
                assert synthetic.home_statement(person, answer) in document
            else:
                person = re.search(r"What does (.+) work as", question).group(1)
                assert synthetic.job_statement(person, answer) in document
        elif task == "chain":
            links = answer.split(" = ")
            assert question == synthetic.chain_question(links[0])
            assert links[-1].isdigit()
            for name, value in pairwise(links):
                assert document.count(synthetic.chain_statement(name, value)) == 1
        elif task == "labels":
            item = re.search(r"label of (.+)\?", question).group(1)
            assert f"The label of {item} is" not in document  # only others of its kind are shown
            assert f" is {answer}.\n" in document
        elif task == "excerpt":
            excerpt = re.search(r"“(.*)”\?", question).group(1)
            after = document.split(synthetic.paragraph_header(int(answer)))[1]
            assert excerpt in after.split("\n\nParagraph ")[0]
        else:
            beginning = question.split("Answer: ")[1]
            assert document.count(beginning + example.answer) == 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("length", [300, 700, 2000])
def test_length_is_respected_and_used(task: str, together: bool, length: int, tokenizer: Tokenizer) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    for seed in range(3):
        sample = make(task, seed, length=length, count=count, together=together)
        document = count(sample.document)
        asked = [count(q.question) + count(q.answer + synthetic.BREAK) for q in sample.questions]
        total = document + (sum(asked) if together else max(asked, default=0))
        assert 0.45 * length < total <= length


@pytest.mark.parametrize("task", TASKS)
def test_pieces_tokenise_as_the_whole(task: str, tokenizer: Tokenizer) -> None:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    sample = make(task, seed=5)
    pieces = [text for text, _ in sample.transcript()]
    assert [i for p in pieces for i in encode(p)] == encode("".join(pieces))
    assert "".join(pieces).startswith(sample.document)
    for example in sample.examples():
        assert encode(example.prompt) + encode(example.answer) == encode(example.prompt + example.answer)


def test_transcript_marks_answers() -> None:
    sample = make("kv")
    marked = [text for text, is_answer in sample.transcript() if is_answer]
    assert marked == [q.answer + synthetic.BREAK for q in sample.questions]


def test_training_and_evaluation_share_no_keys() -> None:
    def keys(split: synthetic.Split) -> set[str]:
        samples = [make("kv", seed, split=split) for seed in range(20)]
        return {re.search(r"of the (.+)\?", q.question).group(1) for s in samples for q in s.questions}

    assert keys("train").isdisjoint(keys("eval"))


def test_tasks_mix_in_one_document() -> None:
    sample = build(
        random.Random(1), haystack(), dict.fromkeys(TASKS, 4), length=3000, count=lambda t: len(t.split()), questions=40
    )
    assert {q.task for q in sample.questions} == set(TASKS)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="tasks: expected some of kv, facts"):
        make("riddles")
    with pytest.raises(ValueError, match="length: expected at least"):
        make("kv", length=20)


def test_paragraphs_without_end_that_are_all_too_long():
    endless = itertools.repeat("word " * 1000)
    with pytest.raises(ValueError, match=r"paragraphs: expected some of at most \d+, got 1000 longer ones in a row"):
        build(random.Random(0), endless, {"kv": 2}, length=2000, count=len, questions=2)
