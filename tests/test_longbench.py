"""LongBench: official metrics, prompts, lengths and rules, from data to table."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import random
import re
import sys
import tracemalloc
import zipfile

import huggingface_hub
import pytest
import torch
from tiny_models import make_tiny_model
from tiny_text_model import (
    CHAT,
    longbench_row,
    make_tiny_tokenizer,
    save_tiny_text_model,
    write_jsonl,
    write_longbench,
)

from attention_predictor.cli import main
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.longbench import metrics
from attention_predictor.eval.benchmarks.longbench.benchmark import LongBench
from attention_predictor.eval.benchmarks.longbench.data import open_source
from attention_predictor.eval.benchmarks.longbench.rouge import DEEPEST, rouge_l
from attention_predictor.eval.benchmarks.longbench.scorer import ENGLISH, sample_scores, score
from attention_predictor.eval.benchmarks.longbench.tasks import CATEGORIES, TASKS, choose_tasks
from attention_predictor.eval.harness import runner as runner_module
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.prompts import fitted_ids, prompt_ids
from attention_predictor.eval.harness.run_folder import RunFolder


def rouge_f(precision: float, recall: float) -> float:
    """The package's F value."""
    return 2 * precision * recall / (precision + recall + 1e-8)


LABELS = ["Other", "Other entity", "Food", "Date"]

# metric, prediction, reference, score worked out by hand
BY_HAND = [
    ("qa_f1", "", "x", 0),
    ("qa_f1", "cat", "", 0),
    ("qa_f1", "The Cat sat.", "cat sat on the mat", 2 / 3),  # 2 of 2 words, 2 of 4
    ("qa_f1", "the theatre", "Theatre!", 1),
    ("qa_f1", "a an the", "the", 0),  # nothing is left of either
    ("qa_f1", "don't", "dont", 1),
    ("qa_f1", "no no no", "no", 1 / 2),  # 1 of 3, 1 of 1
    ("qa_f1", "3.5%", "35", 1),
    ("qa_f1", "well-known", "well known", 0),
    ("qa_f1_zh", "", "北京", 0),
    ("qa_f1_zh", "北京大学。", "北京大学", 1),
    ("qa_f1_zh", "我来到北京清华大学", "北京清华大学", 2 / 3),  # 2 of 4 words, 2 of 2
    ("qa_f1_zh", "“ＩＢＭ” 公司！", "ｉｂｍ公司", 1),
    ("qa_f1_zh", "《红楼梦》", "红楼梦", 2 / 3),  # 》 is removed, 《 counts as a word
    ("rouge", "", "x", 0),
    ("rouge", "x", "", 0),
    ("rouge", "...", "...", 0),  # no sentence
    ("rouge", " ", " ", rouge_f(1, 1)),  # a sentence of an empty word
    ("rouge", "the cat sat", "the cat ate", rouge_f(2 / 3, 2 / 3)),
    ("rouge", "The cat", "the cat", rouge_f(1 / 2, 1 / 2)),
    ("rouge", "a a a b", "a b", rouge_f(1, 1)),  # different words count, not words
    ("rouge", "a b. c d", "c d.  a\nb ", rouge_f(1, 1)),  # any sentence with any other
    ("rouge", "b a", "a b", rouge_f(1 / 2, 1 / 2)),
    ("rouge", "b a. b", "a b", rouge_f(1 / 2, 1 / 2)),  # of "b a" it is "b" that counts as common
    ("rouge", "a b. a", "b a", rouge_f(1 / 2, 1 / 2)),
    ("rouge_zh", "", "北京", 0),
    ("rouge_zh", "我来到北京清华大学", "北京清华大学", rouge_f(1 / 2, 1)),
    ("rouge_zh", "北京。", "北京", rouge_f(1 / 2, 1)),  # 。 is a word and ends nothing
    ("classification", "", "Food", 0),
    ("classification", "Food", "Food", 1),
    ("classification", "food", "Food", 0),
    ("classification", "Food or Date", "Food", 1 / 2),
    ("classification", "Date", "Food", 0),
    ("classification", "Other entity", "Other entity", 1),  # "Other" is a part of the right name
    ("classification", "Other entity", "Other", 1 / 2),
    ("count", "", "3", 0),
    ("count", "three", "3", 0),
    ("count", "There are 3. Yes, 3, not 4.", "3", 2 / 3),
    ("count", "03", "3", 0),
    ("count", "３", "3", 0),  # a number, but other digits
    ("retrieval", "Paragraph 3", "Paragraph 3", 1),
    ("retrieval", "paragraph 3 or 30, 3", "Paragraph 3", 2 / 3),
    ("retrieval", "", "Paragraph 3", 0),
    ("retrieval_zh", "第3段", "段落3", 1),
    ("retrieval_zh", "段落3、段落13", "段落3", 1 / 2),
    ("code_similarity", "return x", "return x", 1),
    ("code_similarity", "\n\n# a comment\n// another\n```python\nreturn x\nreturn y", "return x", 1),
    ("code_similarity", "x = 1  # one\nreturn x", "x = 1", 0.15),  # one blank: 2 of 13
    ("code_similarity", "    return x", "return x", 0.80),  # 2 * 8 of 20 characters
    ("code_similarity", "# only a comment", "x", 0),
    ("code_similarity", "# only a comment", "", 1),
    ("code_similarity", "", "x", 0),
    ("code_similarity", "x", "", 0),
    ("code_similarity", "\n \nx", "x", 0),  # the line of a blank comes first
    ("code_similarity", "abcd", "bcde", 0.75),
    ("code_similarity", "ababab", "aaaaab", 0.33),  # python-Levenshtein would give .67
    ("code_similarity", "abbbbbbb", "accccccc", 0.12),  # 12.5 is rounded to even
]


class TestMetrics:
    @pytest.mark.parametrize(("name", "prediction", "reference", "expected"), BY_HAND)
    def test_by_hand(self, name, prediction, reference, expected):
        assert getattr(metrics, name)(prediction, reference, LABELS) == pytest.approx(expected, abs=1e-15)

    def test_a_class_behind_a_removed_one_is_passed_over(self):
        """ "Other" and "entity" are parts of the right name; when "Other" goes, the loop steps over "entity"."""
        assert metrics.classification("Other entity", "Other entity", ["Other", "entity", "Other entity"]) == 1 / 2
        assert metrics.classification("Other entity", "Other entity", ["Other", "Date", "Other entity"]) == 1

    @pytest.mark.parametrize(("metric", "deepest"), [(metrics.rouge, DEEPEST), (metrics.rouge_zh, DEEPEST - 1)])
    def test_beyond_python_s_recursion_rouge_is_0(self, metric, deepest):
        """A step for each word, one more where the first word is found, and the call that finds nothing left."""
        words = deepest - 2
        assert metric(" ".join(["z", *["a"] * words]), "z", ()) > 0
        assert metric(" ".join(["z", *["a"] * (words + 1)]), "z", ()) == 0
        assert metric(" ".join(["z", *["a"] * (words + 1), ". z"]), "z", ()) == 0

    def test_rouge_is_the_package_s(self):
        package = pytest.importorskip("rouge").Rouge(["rouge-l"])
        rng = random.Random(0)
        for _ in range(300):
            prediction, reference = ("".join(rng.choices("ab c. \n", k=rng.randrange(40))) for _ in range(2))
            try:
                expected = package.get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
            except ValueError:
                expected = 0.0
            assert rouge_l(prediction, reference) == expected

    def test_without_jieba(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "jieba", None)
        metrics._jieba.cache_clear()
        with pytest.raises(ConfigError, match=r"scored with jieba: pip install 'attention-predictor\[eval\]'"):
            metrics.check_jieba()
        monkeypatch.undo()
        metrics._jieba.cache_clear()
        metrics.check_jieba()


def record(prediction: str, *answers: str, **more: object) -> dict:
    return {"pred": prediction, "answers": list(answers), "all_classes": None, "length": 1} | more


class TestScores:
    def test_the_best_of_several_references_counts(self):
        assert sample_scores("qasper", [record("blue sky", "sea", "the sky", "grey")]) == [2 / 3]
        assert sample_scores("qasper", [record("blue")]) == [0]

    @pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.first_line])
    def test_only_the_first_line_of_few_shot_tasks(self, task):
        said = record("\n\nFood\nDate\nFood", "Food", all_classes=LABELS)
        assert sample_scores(task, [said])[0] == pytest.approx(1)

    def test_other_tasks_are_scored_whole(self):
        assert sample_scores("qasper", [record("blue\nsky", "sky")]) == [2 / 3]

    def test_failed_samples_score_0_and_are_counted(self):
        records = [record("sky", "sky"), record("", "sky", error="OutOfMemoryError: all of it"), record("no", "sky")]
        scores = score({"qasper": records})
        assert scores.tasks == {"qasper": 33.33}
        assert scores.samples == {"qasper": 3}
        assert scores.errors == {"qasper": 1}

    def test_averages(self):
        points = {name: 1 + number for number, name in enumerate(TASKS)}
        found = score({name: self._of(name, points[name]) for name in TASKS})
        assert found.tasks == points
        assert found.categories == {
            "single-document QA": 2.5,
            "multi-document QA": 6.5,
            "summarisation": 10.5,
            "few-shot learning": 14.5,
            "synthetic tasks": 18,
            "code completion": 20.5,
        }
        assert tuple(found.categories) == CATEGORIES
        # 231 in all, without multifieldqa_zh 4, dureader 8, vcsum 12, lsht 16, passage_retrieval_zh 19
        assert found.english_average == round((231 - 4 - 8 - 12 - 16 - 19) / 16, 2)
        assert len(ENGLISH) == 16

    def test_averages_of_a_part(self):
        found = score({"qasper": self._of("qasper", 10), "trec": self._of("trec", 40)})
        assert found.categories["single-document QA"] == 10
        assert found.categories["few-shot learning"] == 40
        assert found.categories["code completion"] is None
        assert found.english_average is None

    def _of(self, task: str, percent: int) -> list[dict]:
        """100 predictions, as many of them right as per cent are wanted."""
        answer = {"passage_retrieval_en": "Paragraph 7", "passage_retrieval_zh": "段落7"}.get(task, "7")
        predicted = ["7"] * percent + [""] * (100 - percent)
        if task.startswith("passage_retrieval"):
            return [record(one, answer) for one in predicted]
        return [record(one, answer, all_classes=["7", "8"]) for one in predicted]

    def test_longbench_e(self):
        lengths = {3999: 1.0, 4000: 0.0, 7999: 1.0, 8000: 0.0}
        records = [record("sky" if right else "", "sky", length=length) for length, right in lengths.items()]
        scores = score({"qasper": records, "hotpotqa": records[:2]}, extended=True)
        assert scores.to_dict()["tasks"] == {
            "qasper": {"0-4k": 100.0, "4-8k": 50.0, "8k+": 0.0},
            "hotpotqa": {"0-4k": 100.0, "4-8k": 0.0, "8k+": None},
        }
        assert scores.to_dict()["averages"] == {"0-4k": 100.0, "4-8k": 25.0, "8k+": 0.0}

    def test_perplexity_is_of_all_answers_tokens(self):
        said = [record("", "x", answer_log_likelihood=-3.0, answer_tokens=1)]
        said += [record("", "x", answer_log_likelihood=-1.0, answer_tokens=3), record("", "x", error="E: x")]
        assert score({"qasper": said}).perplexity == {"qasper": pytest.approx(math.e)}
        assert score({"qasper": [record("", "x")]}).perplexity == {}


class TestTasks:
    def test_templates_and_lengths_are_the_official_ones(self):
        """By a digest of THUDM/LongBench's two configuration files, put together."""
        config = [[name, TASKS[name].template, TASKS[name].max_new_tokens] for name in sorted(TASKS)]
        digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()
        assert digest == "af1547bf00b7cb2fc201a455a28d31e2ee70154009255fe43b6cdf2cfa798d7c"

    def test_rules(self):
        without_chat = {name for name, task in TASKS.items() if not task.chat}
        assert without_chat == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
        assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
        assert [name for name, task in TASKS.items() if task.stops_at_newline] == ["samsum"]
        assert {name for name, task in TASKS.items() if task.classes} == {"trec", "lsht"}
        assert len(TASKS) == 21

    def test_choice(self):
        assert choose_tasks("all") == tuple(TASKS)
        assert len(choose_tasks("all", extended=True)) == 13
        assert choose_tasks("trec, qasper") == ("qasper", "trec")
        with pytest.raises(ConfigError, match="no LongBench task 'trek': expected some of narrativeqa, qasper"):
            choose_tasks("trek")
        with pytest.raises(ConfigError, match="no LongBench task 'musique': expected some of qasper"):
            choose_tasks("musique", extended=True)


class TestPrompts:
    tokenizer = make_tiny_tokenizer(CHAT)

    def decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def test_chat_or_not(self):
        assert self.decoded(prompt_ids(self.tokenizer, "Hi", chat=True)) == "<Hi>A: "
        assert self.decoded(prompt_ids(self.tokenizer, "Hi", chat=False)) == "<s>Hi"

    def test_a_long_prompt_loses_its_middle(self):
        text = "abcdefghij"  # 11 tokens with the one that begins it
        assert fitted_ids(self.tokenizer, text, chat=False, longest=11, room=None)[1] is False
        ids, cut = fitted_ids(self.tokenizer, text, chat=False, longest=8, room=None)
        assert (self.decoded(ids), cut) == ("<s>abcghij", True)  # <s>abc and ghij are four tokens each
        ids, _ = fitted_ids(self.tokenizer, text, chat=False, longest=7, room=None)  # half of 7 is 3, twice
        assert self.decoded(ids) == "<s>abhij"

    def test_cut_before_the_template_is_put_around(self):
        ids, _ = fitted_ids(self.tokenizer, "abcdefghij", chat=True, longest=8, room=None)
        assert self.decoded(ids) == "<abcghij>A: "

    @pytest.mark.parametrize("chat", [True, False])
    @pytest.mark.parametrize("room", range(8, 20))
    def test_always_as_long_as_there_is_room_for(self, chat, room):
        ids, cut = fitted_ids(self.tokenizer, "abcdefghij", chat=chat, longest=None, room=room)
        whole = 15 if chat else 11
        assert cut == (whole > room)
        assert min(room, whole) - 2 <= len(ids) <= room  # two halves of an odd number are one token short

    def test_a_template_without_a_date_of_today(self):
        tokenizer = make_tiny_tokenizer("{{ date_string }}: {{ messages[0]['content'] }}")
        assert tokenizer.decode(prompt_ids(tokenizer, "x", chat=True)) == "26 Jul 2024: x"


def benchmark(rows, tasks, **options) -> LongBench:
    return LongBench(make_tiny_tokenizer(options.pop("template", None)), rows, tasks, **options)


class TestBenchmark:
    def test_samples(self, tmp_path):
        rows = open_source(str(write_longbench(tmp_path, ["trec"])))
        samples = list(benchmark(rows, ["trec"]).samples("trec"))
        assert [one.id for one in samples] == ["trec-0", "trec-1", "trec-2"]
        row = longbench_row("trec", 1)
        assert samples[1].prompt == (
            "Please determine the type of the question below. Here are some examples of questions.\n\n"
            f"{row['context']}\n{row['input']}"
        )
        assert samples[1].record == {name: row[name] for name in ("answers", "all_classes", "length")}

    def test_braces_in_a_document_are_no_fields(self, tmp_path):
        write_jsonl(tmp_path / "lcc.jsonl", [longbench_row("lcc", context="f'{input} {{}} {0}'\n")])
        (sample,) = benchmark(open_source(str(tmp_path)), ["lcc"]).samples("lcc")
        assert sample.prompt == "Please complete the code given below. \nf'{input} {{}} {0}'\nNext line of code:\n"

    def test_rows_without_an_id_are_numbered(self, tmp_path):
        rows = [{k: v for k, v in longbench_row("trec", n).items() if k != "_id"} for n in range(2)]
        write_jsonl(tmp_path / "trec.jsonl", rows)
        assert [one.id for one in benchmark(open_source(str(tmp_path)), ["trec"]).samples("trec")] == ["0", "1"]

    def test_only_what_is_asked_for_is_read(self, tmp_path):
        write_jsonl(tmp_path / "trec.jsonl", [longbench_row("trec", n) for n in range(2)])
        with (tmp_path / "trec.jsonl").open("a") as file:
            file.write("not JSON\n")
        bench = benchmark(open_source(str(tmp_path)), ["trec"])
        assert bench.check("trec", 2)["samples"] == 2
        with pytest.raises(DataError, match=r"trec\.jsonl, line 3"):
            bench.check("trec", 3)

    def test_one_sample_in_memory_at_a_time(self, tmp_path):
        """40 documents of a million characters, about 250,000 tokens each."""
        size, number = 1_000_000, 40
        write_jsonl(
            tmp_path / "trec.jsonl", [longbench_row("trec", n, context="word " * (size // 5)) for n in range(number)]
        )
        bench = benchmark(open_source(str(tmp_path)), ["trec"])
        tracemalloc.start()
        try:
            assert bench.check("trec", None)["samples"] == number
            assert tracemalloc.get_traced_memory()[1] < 10 * size
        finally:
            tracemalloc.stop()

    def test_samsum_ends_with_its_line_and_has_a_token(self, tmp_path, monkeypatch):
        """The model is made to say: end of line at once, a, end of line, b."""
        model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
        newline, a, b, end = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("\n", "a", "b", "</s>"))
        model.generation_config.eos_token_id = end
        said = iter([newline, a, newline, b])
        begun = model.forward

        def forward(*arguments, **named):
            out = begun(*arguments, **named)
            wanted = next(said)
            # the second best word is "a"
            out.logits[..., -1, :] = torch.nn.functional.one_hot(torch.tensor(wanted), out.logits.shape[-1]) * 2.0
            out.logits[..., -1, a] += 1.0
            return out

        monkeypatch.setattr(model, "forward", forward)
        rows = open_source(str(write_longbench(tmp_path, ["samsum"], samples=1)))
        bench = LongBench(tokenizer, rows, ["samsum"])
        (sample,) = bench.samples("samsum")
        found = bench.predict(EvaluatedModel(model, None), "samsum", sample)
        assert found["pred"] == "aa\n"  # no end at the first token: the next best
        assert found["new_tokens"] == 3

    def test_other_tasks_go_on_behind_a_line(self, tmp_path):
        rows = open_source(str(write_longbench(tmp_path, ["trec"], samples=1)))
        bench = benchmark(rows, ["trec"])
        (sample,) = bench.samples("trec")
        assert bench.predict(EvaluatedModel(make_tiny_model(), None), "trec", sample)["new_tokens"] == 64

    def test_prompt_and_answer_fill_the_context_at_most(self, tmp_path):
        rows = open_source(str(write_longbench(tmp_path, ["trec"], samples=1)))
        model = make_tiny_model(max_position_embeddings=256)
        bench = benchmark(rows, ["trec"])
        (sample,) = bench.samples("trec")
        found = bench.predict(EvaluatedModel(model, None), "trec", sample)
        assert found["truncated"]
        assert 190 <= found["prompt_tokens"] <= 192
        assert found["new_tokens"] == 64

    def test_likelihood_of_the_answer(self, tmp_path):
        rows = open_source(str(write_longbench(tmp_path, ["hotpotqa"], samples=1)))
        bench = benchmark(rows, ["hotpotqa"], chat=False, answer_likelihood=True)
        (sample,) = bench.samples("hotpotqa")
        model, tokenizer = make_tiny_model(), bench.tokenizer
        found = bench.predict(EvaluatedModel(model, None), "hotpotqa", sample)
        prompt = tokenizer(sample.prompt)["input_ids"]
        answer = tokenizer(" nothing at all", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert found["answer_log_likelihood"] == pytest.approx(expected, abs=1e-3)
        assert found["answer_tokens"] == len(answer)


class TestData:
    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            ({"context": None}, "line 2: expected a text in 'context', which the template of trec needs; found None"),
            ({"answers": "x"}, "line 2: expected a list of texts in 'answers', found 'x'"),
            ({"answers": []}, "line 2: no reference answer in 'answers'"),
            ({"answers": [1]}, "line 2: expected a list of texts in 'answers', found [1]"),
            ({"all_classes": None}, "line 2: expected a list of texts in 'all_classes', found None"),
            ({"length": "long"}, "line 2: expected a number in 'length', found 'long'"),
        ],
    )
    def test_a_bad_row(self, tmp_path, changes, line):
        write_jsonl(tmp_path / "trec.jsonl", [longbench_row("trec"), longbench_row("trec", 1, **changes)])
        with pytest.raises(DataError, match=re.escape("trec.jsonl, " + line)):
            benchmark(open_source(str(tmp_path)), ["trec"]).check("trec", None)

    def test_an_answer_without_its_number(self, tmp_path):
        name = "passage_retrieval_en"
        write_jsonl(tmp_path / f"{name}.jsonl", [longbench_row(name, answers=["the first"])])
        with pytest.raises(DataError, match="line 1, field 'answers': expected Paragraph … with a number"):
            benchmark(open_source(str(tmp_path)), [name], chat=False).check(name, None)

    def test_the_archive_of_the_hub(self, tmp_path, monkeypatch):
        write_longbench(tmp_path / "data", ["trec", "lcc"], suffix="_e")
        archive = tmp_path / "data.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in (tmp_path / "data").iterdir():
                packed.write(file, f"data/{file.name}")
            packed.writestr("data/lsht.jsonl", '{"input": ')
        asked = []
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(archive))
        rows = open_source("hub")
        assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]
        bench = benchmark(rows, ["trec", "lcc"], extended=True)
        assert [one.id for one in bench.samples("lcc")] == ["lcc-0", "lcc-1", "lcc-2"]
        with pytest.raises(DataError, match=r"can't read data/musique\.jsonl from it"):
            benchmark(rows, ["musique"], chat=False).check("musique", None)
        with pytest.raises(DataError, match=r"data\.zip, data/lsht\.jsonl, line 1: not readable as JSON"):
            benchmark(rows, ["lsht"]).check("lsht", None)

    def test_a_hub_out_of_reach(self, monkeypatch):
        def refuse(*_, **__):
            raise OSError("no network\nat all")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
        with pytest.raises(DataError, match=r"the hub does not give data\.zip of THUDM/LongBench: no network at all"):
            open_source("hub")

    def test_a_mirror_on_the_hub(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        asked = []

        def load(*arguments, **named):
            asked.append((arguments, named))
            return iter([longbench_row("trec"), {"text": "something else"}])

        monkeypatch.setattr(datasets, "load_dataset", load)
        bench = benchmark(open_source("hub:someone/LongBench"), ["trec"])
        assert bench.check("trec", 1)["samples"] == 1
        with pytest.raises(
            DataError, match=r"someone/LongBench, trec, row 2: expected a text in 'context'.*fields text"
        ):
            bench.check("trec", None)
        assert asked[0] == (("someone/LongBench", "trec"), {"split": "test"})

    def test_the_archive_in_the_hub_s_cache(self, tmp_path, monkeypatch):
        """As the hub's client keeps it, and without network."""
        folder = tmp_path / "datasets--THUDM--LongBench"
        snapshot = folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        with zipfile.ZipFile(snapshot / "data.zip", "w") as packed:
            packed.writestr("data/trec.jsonl", json.dumps(longbench_row("trec")) + "\n")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        bench = benchmark(open_source("hub"), ["trec"])
        assert [one.id for one in bench.samples("trec")] == ["trec-0"]

    def test_a_mirror_of_parquet_files(self, tmp_path, monkeypatch):
        """A directory laid out as on the hub, read by the hub's own library."""
        datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "someone" / "LongBench"
        rows = {"trec": [longbench_row("trec", number) for number in range(3)], "lcc": [{"text": "something else"}]}
        for name, of_task in rows.items():
            (folder / name).mkdir(parents=True)
            table = pyarrow.Table.from_pylist(of_task)
            parquet.write_table(table, folder / name / "test-00000-of-00001.parquet")
        files = "- config_name: {0}\n  data_files:\n  - split: test\n    path: {0}/test-*.parquet\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(map(files.format, rows))}---\n")
        monkeypatch.chdir(tmp_path)
        source = open_source("hub:someone/LongBench")
        given = list(benchmark(source, ["trec"]).samples("trec"))
        direct = open_source(str(write_longbench(tmp_path / "plain", ["trec"])))
        assert given == list(benchmark(direct, ["trec"]).samples("trec"))
        with pytest.raises(DataError, match=r"LongBench, lcc, row 1: expected a text in 'context'.*found fields text"):
            benchmark(source, ["lcc"]).check("lcc", None)
        with pytest.raises(DataError, match="the hub gives no data set someone/LongBench, configuration qasper"):
            benchmark(source, ["qasper"], chat=False).check("qasper", None)

    def test_nothing_of_the_hub_is_imported_for_a_directory(self, tmp_path, monkeypatch):
        original = builtins.__import__

        def guarded(name, *arguments, **named):
            assert name.partition(".")[0] not in ("datasets", "huggingface_hub")
            return original(name, *arguments, **named)

        rows = open_source(str(write_longbench(tmp_path, ["trec"])))
        monkeypatch.setattr(builtins, "__import__", guarded)
        assert len(list(rows("trec"))) == 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_text_model(folder / "plain")
    save_tiny_text_model(folder / "chat", chat=True)
    write_longbench(folder / "data", TASKS, samples=1)
    write_longbench(folder / "data", choose_tasks("all", extended=True), samples=3, suffix="_e")
    return folder


def options(tiny, tmp_path, *more: object, model: str = "plain") -> list[str]:
    given = ["eval", "longbench", "--model", tiny / model, "--data", tiny / "data", "--device", "cpu"]
    return [str(one) for one in (*given, "--budgets", 144, "--out", tmp_path / "out", *more)]


@pytest.fixture
def without_jieba(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    metrics._jieba.cache_clear()
    yield
    metrics._jieba.cache_clear()


@pytest.mark.usefixtures("without_jieba")
class TestWithoutJieba:
    NEEDING = ("multifieldqa_zh", "dureader", "vcsum")

    @pytest.mark.parametrize("task", ["qasper", "lsht", "passage_retrieval_zh"])
    def test_other_tasks_do_without_it(self, task, tiny, tmp_path, capsys):
        assert main(options(tiny, tmp_path, "--no-chat", "--policies", "full", "--tasks", task)) == 0
        assert main(["score", "longbench", str(tmp_path / "out")]) == 0
        assert "jieba" not in capsys.readouterr().out

    @pytest.mark.parametrize("task", NEEDING)
    def test_a_task_that_needs_it_is_refused_at_once(self, task, tiny, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("attention_predictor.eval.benchmarks.longbench.command.main", None)
        assert main(options(tiny, tmp_path, "--no-chat", "--tasks", f"qasper,{task}")) == 2
        said = capsys.readouterr().err
        assert "Chinese tasks are scored with jieba: pip install 'attention-predictor[eval]'" in said
        assert said.count("\n") == 1

    @pytest.mark.slow
    def test_of_all_tasks_those_that_need_it_are_left_out(self, tiny, tmp_path, capsys):
        assert main(options(tiny, tmp_path, "--no-chat", "--policies", "full", "--limit", 1)) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(
            f"left out: {', '.join(self.NEEDING)}: Chinese tasks are scored with jieba: pip install"
        )
        assert not {*RunFolder(tmp_path / "out").tasks} & {*self.NEEDING}
        assert len(RunFolder(tmp_path / "out").tasks) == len(TASKS) - len(self.NEEDING)


class TestCommand:
    @pytest.mark.slow
    def test_all_tasks(self, tiny, tmp_path, capsys):
        assert main(options(tiny, tmp_path, "--policies", "full", model="chat")) == 0
        table = capsys.readouterr().out.splitlines()
        assert table[0].split()[:3] == ["score", "narrativeqa", "qasper"]
        assert table[0].endswith("16 English tasks")
        assert [line.split()[0] for line in table[1:]] == ["full"]
        assert main(["score", "longbench", str(tmp_path / "out" / "full"), "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert list(alone["tasks"]) == list(TASKS)
        assert f"{alone['english_average']:.2f}" == table[1].split()[-1]
        assert main(["score", "longbench", str(tmp_path / "out"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["variants"]["full"] == alone

    def test_longbench_e(self, tiny, tmp_path, capsys):
        assert main(options(tiny, tmp_path, "--e", "--tasks", "triviaqa", "--policies", "streaming")) == 0
        table = capsys.readouterr().out.splitlines()
        assert table[0].split() == ["score", "triviaqa", "average"]
        assert [line.split()[:2] for line in table[1:]] == [["streaming-144", name] for name in ("0-4k", "4-8k", "8k+")]
        assert [one["length"] for one in RunFolder(tmp_path / "out").records("streaming-144", "triviaqa")] == [
            0,
            3000,
            6000,
        ]

    def test_failures_below_the_table(self, tiny, tmp_path, capsys, monkeypatch):
        predict, asked = LongBench.predict, []

        def failing(self, evaluated, task, sample):
            asked.append(task)
            if len(asked) == 1:
                raise torch.OutOfMemoryError("no room")
            return predict(self, evaluated, task, sample)

        monkeypatch.setattr(LongBench, "predict", failing)
        given = options(tiny, tmp_path, "--tasks", "trec,triviaqa", "--policies", "full")
        assert main(given) == 0
        note = capsys.readouterr().out.splitlines()[-1]
        assert note == "failed, counted as 0 (each line's 'error' says why): full trec 1 of 1"
        assert main([*given, "--retry-errors"]) == 0
        assert "failed" not in capsys.readouterr().out

    def test_exit_code_where_nothing_worked(self, tiny, tmp_path, capsys, monkeypatch):
        def fail(*_):
            raise RuntimeError("never")

        monkeypatch.setattr(LongBench, "predict", fail)
        assert main(options(tiny, tmp_path, "--tasks", "trec")) == 1
        assert "full trec 1 of 1, predictor-144 trec 1 of 1" in capsys.readouterr().out

    def test_perplexity_beside_the_scores(self, tiny, tmp_path, capsys):
        given = ("--tasks", "triviaqa", "--policies", "full", "--answer-perplexity")
        assert main(options(tiny, tmp_path, *given)) == 0
        table = capsys.readouterr().out
        (saved,) = RunFolder(tmp_path / "out").records("full", "triviaqa")
        expected = math.exp(-saved["answer_log_likelihood"] / saved["answer_tokens"])
        assert re.search(rf"perplexity of the answer +triviaqa\nfull +{expected:.2f}$", table, re.MULTILINE)

    def test_templates_of_one_s_own(self, tiny, tmp_path):
        file = tmp_path / "templates.json"
        file.write_text(json.dumps({"trec": "{input} {dataset}?"}))
        assert main(options(tiny, tmp_path, "--tasks", "trec", "--policies", "full", "--templates", file)) == 0
        (saved,) = RunFolder(tmp_path / "out").records("full", "trec")
        assert saved["prompt_tokens"] == 1 + len("What is it, 0? trec?")

    @pytest.mark.parametrize(
        ("more", "line"),
        [
            (("--tasks", "trek"), "no LongBench task 'trek': expected some of narrativeqa, qasper"),
            (("--tasks", ""), "no LongBench task ''"),
            (("--tasks", "trec", "--policies", "best"), "policy='best' is not allowed: expected one of full"),
            (("--tasks", "trec", "--budgets", "128"), "budget=128 is not allowed: expected at least"),
            (("--tasks", "qasper"), "no chat template: qasper needs one; --no-chat gives prompts as they are"),
            (("--tasks", "trec", "--data", "nowhere"), "--data nowhere: no such directory, and not hub"),
            (
                ("--tasks", "trec", "--e", "--data", "{empty}"),
                "--data {empty}: no trec_e.jsonl in it; --tasks chooses among those that are: none",
            ),
            (
                ("--tasks", "trec", "--max-length", "4090"),
                "--max-length 4090: expected 2 to 4032, the model's 4096 less",
            ),
            (("--tasks", "trec", "--max-length", "1"), "--max-length 1: expected 2 to 4032"),
            (("--tasks", "trec", "--templates", "nowhere"), "--templates nowhere can't be read as JSON"),
            (("--tasks", "trec", "--templates", "{list}"), "list.json: expected an object of texts"),
            (("--tasks", "trec", "--templates", "{unknown}"), "no LongBench task 'trek'"),
            (
                ("--tasks", "trec", "--templates", "{absent}"),
                "trec.jsonl, line 1: expected a text in 'question', which",
            ),
            (("--tasks", "trec", "--templates", "{broken}"), "not a template, "),
        ],
    )
    def test_bad_input(self, tiny, tmp_path, capsys, more, line, monkeypatch):
        templates = {"list": [1], "unknown": {"trek": "x"}, "absent": {"trec": "{question}"}, "broken": {"trec": "{x"}}
        files = {name: tmp_path / f"{name}.json" for name in templates} | {"empty": tmp_path}
        for name, content in templates.items():
            files[name].write_text(json.dumps(content))
        monkeypatch.setattr(runner_module, "load_model", None)  # refused before this
        assert main(options(tiny, tmp_path, *(one.format(**files) for one in more))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert line.format(**files) in captured.err
        assert not (tmp_path / "out").exists()
