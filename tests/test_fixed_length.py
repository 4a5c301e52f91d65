"""Prompts of a length: as long as fits, and statements where they were asked for."""

from __future__ import annotations

import random

import pytest
from benchmark_runs import make_text
from hypothesis import given
from hypothesis import strategies as st
from tiny_text_model import CHAT, make_tiny_tokenizer

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.fixed_length import (
    Draft,
    FixedLengthBenchmark,
    Haystack,
    most_that_fit,
    prefixed_ids,
)


class Words(FixedLengthBenchmark):
    """So many words and a question."""

    name = "words"
    tasks = ("200", "301")

    def __init__(self, *, most=None, **changes):
        super().__init__(
            make_tiny_tokenizer(CHAT), **({"chat": False, "context": 512, "count": 3, "seed": 0} | changes)
        )
        self.most = most

    def draft(self, task, number, rng):
        word = rng.choice(("oak ", "cedar ", "maple "))
        return Draft((word.strip(),), lambda n: word * n + "Which tree?", " It is", self.most, {"number": number})

    def length(self, task):
        return int(task)

    def new_tokens(self, task):
        return 10


class TestMostThatFit:
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=300), st.integers(0, 5000), st.integers(0, 50))
    def test_is_the_largest(self, sizes, spare, base):
        limit = base + spare
        sums = [base]
        for size in sizes:
            sums.append(sums[-1] + size)
        expected = max(n for n, total in enumerate(sums) if total <= limit)
        assert most_that_fit(lambda n: sums[n], limit, most=len(sizes)) == expected

    def test_costs_a_few_counts_where_tokens_grow_evenly(self):
        rng, sums = random.Random(0), [7]
        for _ in range(200_000):
            sums.append(sums[-1] + rng.randint(1, 3))
        asked = []

        def count(n: int) -> int:
            asked.append(n)
            return sums[n]

        found = most_that_fit(count, 131072)
        assert sums[found] <= 131072 < sums[found + 1]
        assert len(asked) <= 16

    def test_a_count_that_grows_less_and_less_ends_too(self):
        asked = []

        def count(n: int) -> int:
            asked.append(n)
            return round(n**0.5 * 10)

        assert most_that_fit(count, 10_000) == 1_000_100  # round(10000.5) is 10000
        assert len(asked) < 80


class TestPrompts:
    @pytest.mark.parametrize("chat", [False, True])
    @pytest.mark.parametrize("task", Words.tasks)
    def test_as_long_as_fits(self, task, chat):
        benchmark = Words(chat=chat)
        for sample in benchmark.samples(task):
            prompt = benchmark.prompt(task, sample.hidden["number"])
            piece = len(sample.record["answers"][0]) + 1
            assert int(task) - piece < len(prompt) + 10 <= int(task)
            text = benchmark.tokenizer.decode(prompt, skip_special_tokens=True)
            assert text.endswith("Which tree?>A: It is" if chat else "Which tree? It is")

    def test_the_prefix_is_the_assistants(self):
        tokenizer = make_tiny_tokenizer(CHAT)
        assert tokenizer.decode(prefixed_ids(tokenizer, "Which?", " It is", chat=True)) == "<Which?>A: It is"
        assert tokenizer.decode(prefixed_ids(tokenizer, "Which?", " It is", chat=False)) == "<s>Which? It is"

    def test_samples_come_from_the_seed_alone(self):
        def answers(seed: int) -> list[str]:
            return [one.record["answers"][0] for one in Words(seed=seed, count=30).samples("200")]

        assert answers(1) == answers(1) != answers(2)
        assert list(Words(count=5).samples("200")) == list(Words(count=30).samples("200"))[:5]

    def test_what_a_record_holds(self):
        first = next(iter(Words().samples("301")))
        assert (first.id, first.record["length"], first.record["number"]) == ("0", 301, 0)


class TestCheck:
    def test_tells_other_samples(self):
        first = Words().check("200", None)
        assert first == Words().check("200", None)
        assert first["samples"] == 3
        assert Words().check("200", 2)["samples"] == 2
        assert first["sha256"] != Words(seed=1, count=3).check("200", None)["sha256"]

    def test_refuses(self):
        with pytest.raises(ConfigError, match="length 301: the model has positions for 256"):
            Words(context=256).check("301", None)
        with pytest.raises(ConfigError, match="length 20 is too short; a sample without filler has 28"):
            Words().check("20", None)
        with pytest.raises(DataError, match=r"its data fill only .* of 200 tokens: add more data"):
            Words(most=5).check("200", None)
        with pytest.raises(ConfigError, match="--samples 0: expected at least 1"):
            Words(count=0)
        assert Words(most=10_000).check("200", None)["samples"] == 3


class TestHaystack:
    @pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("words", [60, 400, 9000])  # the last goes round
    def test_a_statement_stands_behind_the_sentence_nearest_its_depth(self, depth, words):
        haystack = Haystack({"one": make_text(1), "two": make_text(2)})
        assert words < 9000 or len(haystack.words) < words
        text = haystack.bury(haystack.start(random.Random(words)), words, [(depth, "Here I am.")])
        before, after = text.split("Here I am.")
        assert len(text.split()) == words + 3
        assert before == "" or before.rstrip()[-1] in ".!?"
        assert abs(len(before.split()) - depth * words) <= 14  # no sentence is longer
        assert after.strip() or depth == 1.0

    def test_several_statements_in_their_order(self):
        haystack = Haystack({"one": make_text(1)})
        text = haystack.bury(0, 500, [(0.8, "Third."), (0.2, "First."), (0.5, "Second.")])
        places = [text.index(one) for one in ("First.", "Second.", "Third.")]
        assert places == sorted(places)

    def test_without_words_only_statements_are_left(self):
        assert Haystack({"one": make_text(1)}).bury(5, 0, [(0.5, "One."), (0.5, "Two.")]) == "One. Two."

    def test_the_text_itself_is_unchanged(self):
        text = make_text(3)
        haystack = Haystack({"one": text})
        assert haystack.bury(0, len(haystack.words), []) == text

    def test_text_without_sentences_is_refused(self):
        with pytest.raises(DataError, match="contains no sentence"):
            Haystack({"one": "word " * 100})
