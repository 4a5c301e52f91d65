"""RULER: samples can be answered from what they hold, have the length asked for, and are scored as published."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter

import pytest
from benchmark_runs import evaluate, make_text, refused, results, write_texts
from tiny_text_model import make_tiny_tokenizer, save_tiny_text_model, write_jsonl
from transformers import AutoTokenizer

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.fixed_length import Haystack
from attention_predictor.eval.benchmarks.ruler import command
from attention_predictor.eval.benchmarks.ruler.base import Sources
from attention_predictor.eval.benchmarks.ruler.benchmark import GivenRuler, MadeRuler, find_files
from attention_predictor.eval.benchmarks.ruler.families import FAMILIES, choose_families
from attention_predictor.eval.benchmarks.ruler.passages import Passages
from attention_predictor.eval.benchmarks.ruler.scorer import sample_scores
from attention_predictor.eval.benchmarks.ruler.words import compounds
from attention_predictor.eval.harness.run_folder import RunFolder

NIAH = [name for name in FAMILIES if name.startswith("niah")]
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.(?=\s|$)")
# In the published form: names, order and wording of a sample of niah_multikey_3.
PUBLISHED = (
    "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "uuid afterwards.\nOne of the special magic uuids for {0} is: {1}.\nOne of the special magic uuids for {2} is: {3}."
    "\nWhat is the special magic uuid for {0} mentioned in the provided text? The special magic uuid for {0} mentioned "
    "in the provided text is"
)


@pytest.fixture
def passages(tmp_path) -> dict[str, Passages]:
    rows = [
        {"question": f"Who built house {n}?", "answers": [f"mason {n}"], "context": f"House {n} is of mason {n}."}
        for n in range(140)
    ]
    write_jsonl(tmp_path / "qa.jsonl", rows)
    return {name: Passages(tmp_path / "qa.jsonl") for name in ("qa_1", "qa_2")}


def make(families, lengths, passages, **changes) -> MadeRuler:
    sources = Sources(Haystack({"one": make_text()}), passages)
    return MadeRuler(make_tiny_tokenizer(), families, lengths, sources, **({"samples": 2, "chat": False} | changes))


def prompts(benchmark, task):
    """Text and answers of every sample; checks their length."""
    for sample in benchmark.samples(task):
        ids = benchmark.prompt(task, sample.hidden["number"])
        assert len(ids) + benchmark.new_tokens(task) <= benchmark.length(task) == sample.record["length"]
        yield benchmark.tokenizer.decode(ids, skip_special_tokens=True), sample.record["answers"], len(ids)


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_answers_stand_in_prompts_of_the_length(self, name, passages):
        length = 3500  # in characters, this tokenizer's tokens
        benchmark = make([name], [length], passages)
        task = f"{name}-{length}"
        found = list(prompts(benchmark, task))
        assert benchmark.check(task, None)["samples"] == 2
        assert found == list(prompts(make([name], [length], passages), task))
        assert found != list(prompts(make([name], [length], passages, seed=1), task))
        for text, answers, tokens in found:
            assert len(set(answers)) == len(answers)
            assert all(answer in text for answer in answers)
            # The largest piece of filler is a line with two uuids.
            assert tokens + benchmark.new_tokens(task) > length - 130
            assert not text.endswith(" ")

    def test_passages_that_are_too_few_are_refused(self, passages):
        with pytest.raises(DataError, match=r"task qa_1-9000: its data fill only 5[0-9]{3} of 9000 tokens"):
            make(["qa_1"], [9000], passages).check("qa_1-9000", None)

    @pytest.mark.parametrize("name", NIAH)
    def test_needles(self, name, passages):
        family = FAMILIES[name]
        for text, answers, _ in prompts(make([name], [4000], passages), f"{name}-4000"):
            held = {}
            for kind, key, value in NEEDLE.findall(text):
                assert kind == family.value_kind
                held.setdefault(key, []).append(value)
            asked = re.search(r"What (?:is|are all) the special magic \w+ for (.+?) mentioned in", text)[1]
            keys = [key.removeprefix("and ") for key in asked.split(", ")]
            assert len(keys) == family.queries
            assert [value for key in keys for value in sorted(held[key])] == [
                value for key in keys for value in sorted(set(answers) & set(held[key]))
            ]
            assert len(answers) == family.queries * family.values
            if family.haystack == "needles":
                assert len(held) > 20
                assert text.count("\n") == len(held) + 1  # and nothing else in between
            else:
                assert len(held) == max(family.keys, family.queries)

    def test_needles_read_as_published(self, passages):
        for text, answers, _ in prompts(make(["niah_multikey_3"], [800], passages), "niah_multikey_3-800"):
            lines = NEEDLE.findall(text)
            key = next(key for _, key, value in lines if value == answers[0])
            shape = PUBLISHED.replace("{1}.\nOne of the special magic uuids for {2} is: {3}", "{1}")
            head, _, tail = shape.format(key, answers[0]).split("\n")
            assert text == "\n".join([head, *(line for line in text.split("\n")[1:-1]), tail])

    def test_the_pocket_models_wording(self, passages):
        sources = Sources(Haystack({"one": make_text()}), passages, "pocket")
        benchmark = MadeRuler(make_tiny_tokenizer(), NIAH, [1500], sources, samples=1, chat=False)
        for name, task in zip(NIAH, benchmark.tasks, strict=True):
            ((text, answers, _),) = prompts(benchmark, task)
            kind = "access code" if name in ("niah_single_3", "niah_multikey_3") else "secret number"
            if len(answers) == 1:
                key = re.search(rf"\n\nQuestion: What is the {kind} of the (.+)\?\nAnswer:$", text)[1]
                assert text.count(f"The {kind} of the {key} is {answers[0]}.") == 1
            else:
                assert re.search(rf"\n\nQuestion: What are the {kind}s of the (.+)\?\nAnswer:$", text)
                assert all(text.count(f" is {answer}.") == 1 for answer in answers)

    def test_depths_differ(self, passages):
        benchmark = make(["niah_single_1"], [4000], passages, samples=40)
        drafts = [benchmark.drawn(benchmark.tasks[0], number) for number in range(40)]
        depths = [text.index(one.answers[0]) / len(text) for one in drafts for text in [one.fill(100)]]
        assert min(depths) < 0.2
        assert max(depths) > 0.8

    def test_variables_have_the_value_in_the_end(self, passages):
        for text, answers, _ in prompts(make(["vt"], [3000], passages), "vt-3000"):
            example, task = text.split("\n\nSome variables")
            for part, expected in ((example, re.search(r"they are: ([A-Z ]+)$", example)[1].split()), (task, answers)):
                value = re.search(r"have the value (\d+) in the end", part)[1]
                variables: dict[str, str] = {}
                for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", part, re.MULTILINE):
                    variables[name] = variables.get(source, source)
                assert len(expected) == 5
                assert {name for name, held in variables.items() if held == value} == set(expected)
            assert set(re.findall(r"VAR (\w+)", example)).isdisjoint(answers)

    @pytest.mark.parametrize(("length", "often", "rarely"), [(15000, 30, 3), (4000, 10, 1)])
    def test_common_words_are_common(self, length, often, rarely, passages):
        for text, answers, _ in prompts(make(["cwe"], [length], passages), f"cwe-{length}"):
            example, task = text.split("\n\nHere is a numbered list")
            counts = Counter(re.findall(r"\d+\. ([a-z]+)", task.split("\nQuestion")[0]))
            assert {word for word, count in counts.items() if count == often} == set(answers)
            assert set(counts.values()) == {often, rarely}
            given = example.split("often in the list are: ")[1]
            shown = Counter(re.findall(r"\d+\. ([a-z]+)", example.split("\nQuestion")[0]))
            assert {word for word, _ in shown.most_common(10)} == set(re.findall(r"\d+\. ([a-z]+)", given))
            assert set(shown).isdisjoint(answers)

    def test_frequent_words_are_the_most_frequent(self, passages):
        for text, answers, _ in prompts(make(["fwe"], [4000], passages), "fwe-4000"):
            words = Counter(text.split("\n")[1].split())
            assert words.most_common(1)[0][0] == "......"
            del words["......"]
            (first, second, third, fourth), counts = zip(*words.most_common(4), strict=True)
            assert [first, second, third] == answers
            assert counts[2] > counts[3]
            assert fourth not in answers

    def test_questions_are_about_one_of_the_documents(self, passages):
        for text, answers, _ in prompts(make(["qa_1"], [1500], passages), "qa_1-1500"):
            documents = re.findall(r"Document (\d+):\n(.+)\n", text)
            assert [number for number, _ in documents] == [str(n) for n in range(1, len(documents) + 1)]
            assert len(documents) > 5
            assert len({document for _, document in documents}) == len(documents)
            house = re.search(r"Question: Who built house (\d+)\? Answer:$", text)[1]
            assert f"House {house} is of {answers[0]}." in [document for _, document in documents]

    def test_a_family_without_its_text_is_refused(self):
        with pytest.raises(ConfigError, match="RULER task niah_single_2 needs --haystack"):
            MadeRuler(make_tiny_tokenizer(), ["vt", "niah_single_2"], [4000], Sources(), chat=False)
        with pytest.raises(ConfigError, match="RULER task qa_2 needs --hotpotqa"):
            MadeRuler(make_tiny_tokenizer(), ["qa_2"], [4000], Sources(), chat=False)

    def test_longest_answers_are_the_published_ones(self):
        lengths = {
            "niah_single_1": 128,
            "niah_multiquery": 128,
            "vt": 30,
            "cwe": 120,
            "fwe": 50,
            "qa_1": 32,
            "qa_2": 32,
        }
        assert {name: FAMILIES[name].new_tokens for name in lengths} == lengths

    def test_words_are_many_and_none_holds_another(self):
        words = list(compounds(random.Random(0)))
        assert len(words) == len(set(words)) > 20_000
        known = set(words)
        inside = {
            word[start:end] for word in words for start in range(len(word)) for end in range(start + 5, len(word))
        }
        inside |= {word[start:] for word in words for start in range(1, len(word) - 4)}
        assert known.isdisjoint(inside)

    def test_choose(self):
        assert choose_families("all") == tuple(FAMILIES)
        assert choose_families("fwe, vt") == ("vt", "fwe")
        with pytest.raises(ConfigError, match="no RULER task 'nia': expected some of niah_single_1, "):
            choose_families("vt,nia")


class TestScores:
    @pytest.mark.parametrize(
        ("task", "prediction", "answers", "score"),
        [
            ("niah_single_1-4096", " 1234567.", ["1234567"], 1.0),
            ("niah_single_1", "12345678", ["1234567"], 1.0),  # published scores look for the text, no more
            ("niah_multivalue-4096", "1, 2 and 3", ["1", "2", "3", "4"], 0.75),
            ("vt-4096", "abcde FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], 0.4),
            ("cwe-4096", "", ["a", "b"], 0.0),
            ("fwe-8192", "x\ty\x00z", ["x", "y", "z"], 1.0),
            ("fwe-8192", "a\tb", ["a\nb"], 1.0),  # control characters become new lines
            ("qa_1-4096", "It was Paris, maybe Rome", ["rome", "Oslo"], 1.0),
            ("qa_2-4096", "It was Paris", ["rome", "Oslo"], 0.0),
        ],
    )
    def test_as_published(self, task, prediction, answers, score):
        assert sample_scores(task, [{"pred": prediction, "answers": answers}]) == [pytest.approx(score)]

    def test_a_failed_sample_found_nothing(self):
        assert sample_scores("vt-4096", [{"pred": "", "answers": ["A"], "error": "MemoryError: A"}]) == [0.0]


class TestPassages:
    @pytest.mark.parametrize(
        ("row", "answers", "paragraphs"),
        [
            ({"answers": {"text": ["a", "b", "a"], "answer_start": [1, 2, 3]}, "context": " p. "}, ("a", "b"), ("p.",)),
            (
                {"answer": "a", "context": [["T", ["One. ", "Two."]], ["U", ["Three."]]]},
                ("a",),
                ("T\nOne. Two.", "U\nThree."),
            ),
            ({"answer": "a", "context": {"title": ["T"], "sentences": [["One.", " Two."]]}}, ("a",), ("T\nOne. Two.",)),
            ({"answers": ["a"], "context": ["p", "q"]}, ("a",), ("p", "q")),
        ],
    )
    def test_forms(self, row, answers, paragraphs, tmp_path):
        other = {"question": "?", "answers": [], "context": "another"}  # has no answer, as in SQuAD 2
        write_jsonl(tmp_path / "qa.jsonl", [{"question": " Which? ", **row}, other])
        found = Passages(tmp_path / "qa.jsonl")
        (one,) = found.questions
        assert (one.question, one.answers, one.paragraphs) == ("Which?", answers, paragraphs)
        assert found.paragraphs == [*paragraphs, "another"]

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            (
                [{"question": "q", "answer": "a"}],
                "line 1: expected a text, or a list of passages, in 'context'; found None",
            ),
            ([{"question": "q", "answer": 3, "context": "c"}], "line 1: expected a list of texts in 'answers'"),
            ([{"answer": "a", "context": "c"}], "line 1: expected a text in 'question'; found fields answer, context"),
            ([{"question": "q", "answer": "a", "context": [3]}], "line 1: expected texts, or .title, .sentences.."),
            ([{"question": "q", "answers": [], "context": "c"}], "no question with an answer in it"),
            ([{"question": "q", "answer": "a", "context": "c"}], "has only one paragraph"),
        ],
    )
    def test_bad_ones(self, rows, said, tmp_path):
        write_jsonl(tmp_path / "qa.jsonl", rows)
        with pytest.raises(DataError, match=said):
            Passages(tmp_path / "qa.jsonl")


def published_rows(count: int = 3) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for index in range(count):
        four = ["".join(rng.choices("0123456789abcdef", k=8)) for _ in range(4)]
        rows.append({"index": index, "input": PUBLISHED.format(*four), "outputs": [four[1]], "length": 99})
    return rows


class TestGiven:
    def test_inputs_as_they_are(self, tmp_path):
        write_jsonl(tmp_path / "niah_multikey_3.jsonl", published_rows())
        benchmark = GivenRuler(make_tiny_tokenizer(), find_files(tmp_path, None), chat=False, context=4096)
        assert benchmark.tasks == ("niah_multikey_3",)
        assert benchmark.check("niah_multikey_3", None)["samples"] == 3
        for sample, row in zip(benchmark.samples("niah_multikey_3"), published_rows(), strict=True):
            assert benchmark.tokenizer.decode(benchmark.prompt(sample), skip_special_tokens=True) == row["input"]
            assert sample.record == {"answers": row["outputs"], "length": 99}

    @pytest.mark.parametrize("ends_in_it", [True, False])
    def test_a_prefix_of_its_own_begins_the_answer(self, ends_in_it, tmp_path):
        row = {"input": "Which?" + (" It is" if ends_in_it else ""), "outputs": ["x"], "answer_prefix": " It is"}
        (tmp_path / "vt").mkdir()
        write_jsonl(tmp_path / "vt" / "validation.jsonl", [row])  # as RULER's own scripts name them
        tokenizer = AutoTokenizer.from_pretrained(save_tiny_text_model(tmp_path / "model", chat=True))
        for source in (tmp_path, tmp_path / "vt" / "validation.jsonl"):
            benchmark = GivenRuler(tokenizer, find_files(source, None))
            (sample,) = benchmark.samples("vt")
            assert tokenizer.decode(benchmark.prompt(sample)) == "<Which?>A: It is"

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"outputs": ["x"]}, "line 1: expected a text in 'input'; found fields outputs"),
            ({"input": "x", "outputs": "x"}, "line 1: expected a list of texts in 'outputs'; found 'x'"),
            ({"input": "x", "outputs": []}, "line 1: expected a list of texts in 'outputs'"),
            ({"input": "x", "outputs": ["x"], "answer_prefix": 3}, "line 1: expected a text in 'answer_prefix'"),
            (
                {"input": "x" * 5000, "outputs": ["x"]},
                "sample 0 has 5031 tokens with its answer; the model has positions",
            ),
        ],
    )
    def test_bad_samples(self, row, said, tmp_path):
        write_jsonl(tmp_path / "vt.jsonl", [row])
        benchmark = GivenRuler(make_tiny_tokenizer(), find_files(tmp_path, ["vt"]), chat=False, context=4096)
        with pytest.raises(DataError, match=said):
            benchmark.check("vt", None)


class TestCommand:
    @pytest.fixture
    def given(self, tmp_path):
        model = save_tiny_text_model(tmp_path / "model")
        return ("ruler", "--model", model, "--no-chat", "--budgets", 144, "--out", tmp_path / "out")

    @pytest.mark.slow
    def test_made_samples(self, given, tmp_path, capsys):
        options = ("--tasks", "vt,fwe", "--lengths", "2000,2200", "--samples", 1)
        evaluate(*given, *options, "--policies", "full,streaming")
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["score,", "%", "vt", "fwe", "mean"]
        assert [row.split()[:2] for row in rows] == [
            [variant, length] for variant in ("full", "streaming-144") for length in ("2000", "2200")
        ]
        folder = RunFolder(tmp_path / "out")
        assert folder.tasks == ("vt-2000", "fwe-2000", "vt-2200", "fwe-2200")
        before = results(folder)
        evaluate(*given, *options, "--policies", "full,streaming")
        assert results(RunFolder(tmp_path / "out")) == before

    def test_questions_are_left_out_with_a_word(self, given, tmp_path, passages, capsys):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        texts, squad = write_texts(tmp_path / "texts"), tmp_path / "qa.jsonl"
        options = map(str, (*given[1:], "--haystack", texts, "--lengths", 4000, "--squad", squad))
        benchmark = command.make_benchmark(parser.parse_args(list(options)))
        assert capsys.readouterr().out == "skipped: qa_2, which needs --hotpotqa\n"
        assert benchmark.tasks == tuple(f"{name}-4000" for name in FAMILIES if name != "qa_2")

    def test_given_samples(self, given, tmp_path, capsys):
        write_jsonl(tmp_path / "niah_multikey_3.jsonl", published_rows())
        evaluate(*given, "--data", tmp_path / "niah_multikey_3.jsonl", "--policies", "full", "--limit", 2)
        assert capsys.readouterr().out.splitlines()[0].split() == ["score,", "%", "niah_multikey_3", "mean"]
        records = RunFolder(tmp_path / "out").records("full", "niah_multikey_3")
        assert [one["answers"] for one in records] == [row["outputs"] for row in published_rows()[:2]]
        assert all(one["new_tokens"] == 128 for one in records)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--tasks", "all"), "RULER task niah_single_2 needs --haystack"),
            (("--tasks", "qa_1"), "RULER task qa_1 needs --squad"),
            (("--tasks", "riddles"), "no RULER task 'riddles': expected some of niah_single_1"),
            (("--tasks", "vt", "--lengths", "5000"), "length 5000: the model has positions for 4096 tokens"),
            (("--tasks", "cwe", "--lengths", "2000"), "task cwe-2000: length 2000 is too short"),
            (("--tasks", "vt", "--lengths", "2000,2000"), "--lengths 2000,2000: a value is given twice"),
            (("--tasks", "vt", "--samples", "0"), "--samples 0: expected at least 1"),
            (("--tasks", "qa_1", "--squad", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
            (("--tasks", "niah_single_2", "--haystack", "nowhere"), "cannot read text from nowhere"),
            (("--data", "nowhere"), "--data nowhere: no such file or directory"),
            (("--data", "nowhere", "--samples", "3"), "--samples is for samples made here, not for those of --data"),
            (("--data", "nowhere", "--haystack", "h"), "--haystack is for samples made here"),
        ],
    )
    def test_refuses(self, given, options, said, capsys, monkeypatch):
        assert said in refused(capsys, monkeypatch, *given, *options)

    def test_refuses_other_files(self, given, tmp_path, capsys, monkeypatch):
        (tmp_path / "empty").mkdir()
        assert "expected <task>.jsonl, a task being" in refused(
            capsys, monkeypatch, *given, "--data", tmp_path / "empty"
        )
        (tmp_path / "samples.jsonl").write_text(json.dumps(published_rows(1)[0]))
        line = refused(capsys, monkeypatch, *given, "--data", tmp_path / "samples.jsonl")
        assert "no RULER task 'samples'" in line
        write_jsonl(tmp_path / "vt.jsonl", published_rows(1))
        line = refused(capsys, monkeypatch, *given, "--data", tmp_path, "--tasks", "vt,fwe")
        assert "no fwe.jsonl in it" in line
