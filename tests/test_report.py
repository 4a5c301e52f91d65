"""``attnpred report``: figures, intervals, tables and the page, of runs written by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_text_model import write_jsonl

from attention_predictor.cli import main
from attention_predictor.eval.benchmarks.longbench.scorer import score_folder
from attention_predictor.eval.benchmarks.longbench.tasks import TASKS
from attention_predictor.eval.display.line_charts import Point, legend_mark, line_chart, nice_ticks
from attention_predictor.eval.harness.bootstrap import interval, resampled_means
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.report.results_table import make_tables
from attention_predictor.eval.report.text_formats import escape_latex, escape_markdown, latex, markdown, signed

FAILED = {"pred": "", "error": "OutOfMemoryError: no"}


def variant(policy: str, budget: int | None) -> dict[str, Any]:
    return {"policy": policy, "budget": budget, "stock": budget is None}


def write_run(path: Path, benchmark: str, results: dict[str, dict[str, list[dict[str, Any]]]], **settings: Any) -> Path:
    """A run as the runner leaves it: ``results`` has records by variant (``<policy>-<budget>``, ``full``), by task."""
    tasks = list(dict.fromkeys(task for by_task in results.values() for task in by_task))
    sizes = {task: max(len(one.get(task, ())) for one in results.values()) for task in tasks}
    variants = {}
    for name in results:
        policy, _, budget = name.rpartition("-")
        variants[name] = variant(policy, int(budget)) if policy else variant(name, None)
    path.mkdir(parents=True)
    run = {
        "benchmark": benchmark,
        "settings": {"model": "models/tiny"} | settings,
        "tasks": {task: {"samples": sizes[task], "sha256": task} for task in tasks},
        "variants": variants,
        "sessions": [{"versions": {"torch": "2"}}],
    }
    (path / "run.json").write_text(json.dumps(run))
    for name, by_task in results.items():
        for task, records in by_task.items():
            (path / name).mkdir(exist_ok=True)
            rows = [{"index": number, "id": str(number)} | one for number, one in enumerate(records)]
            write_jsonl(path / name / f"{task}.jsonl", rows)
    return path


def answers(right: str, **figures: Any) -> list[dict[str, Any]]:
    """Needles: ``+`` found, ``-`` not, ``!`` failed; depths 0 and 100 in turn."""
    said = {"+": {"pred": "It is 7."}, "-": {"pred": "no"}, "!": FAILED}
    return [said[one] | {"answers": ["7"], "depth": 100 * (n % 2)} | figures for n, one in enumerate(right)]


def needle_run(path: Path, more: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Those of the predictor have figures of its engine, and ``more``."""
    figures = {"hit_rate": 0.5, "steps": 4, "fetched_bytes": 8192} | (more or {})
    results = {
        "predictor-512": {"2048": answers("++++", **figures), "4096": answers("+++-", **figures)},
        "full": {"2048": answers("++++"), "4096": answers("++++")},
        "quest-256": {"2048": answers("+--!"), "4096": answers("+-+-")},
        "predictor-256": {"2048": answers("+++-", **figures), "4096": answers("+-+-", **figures)},
        "quest-512": {"2048": answers("+++-"), "4096": answers("+++-")},
    }
    return write_run(path, "needle", results, depths=[0, 100], **changes)


def report(capsys: pytest.CaptureFixture[str], out: Path, *runs: Path) -> dict[str, str]:
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    texts = {suffix: (out / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("md", "tex", "html")}
    assert texts["md"] in printed
    return texts


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    try:
        code = main(["report", *map(str, arguments)])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


class TestBootstrap:
    def test_as_computed_directly(self):
        scores_N, weights_N = np.array([0.0, 0.2, 1.0, 0.7, 0.4]), np.array([1.0, 3.0, 2.0, 1.0, 5.0])
        drawn_RN = np.random.default_rng([3, 1]).integers(5, size=(400, 5))
        expected = [
            sum(scores_N[one] * weights_N[one] for one in drawn) / sum(weights_N[one] for one in drawn)
            for drawn in drawn_RN
        ]
        means_R = resampled_means(scores_N, weights_N, seed=(3, 1), resamples=400)
        np.testing.assert_allclose(means_R, expected)
        ordered = sorted(expected)
        low, high = interval(means_R)
        assert ordered[9] <= low <= ordered[10]
        assert ordered[389] <= high <= ordered[390]

    def test_close_to_the_normal_interval(self):
        scores_N = np.random.default_rng(0).normal(5.0, 2.0, 4000)  # more than are drawn at once
        low, high = interval(resampled_means(scores_N, np.ones(4000), seed=(0,)))
        error = scores_N.std() / 4000**0.5
        assert low == pytest.approx(scores_N.mean() - 1.96 * error, abs=0.15 * error)
        assert high == pytest.approx(scores_N.mean() + 1.96 * error, abs=0.15 * error)

    def test_seeded(self):
        scores_N = np.arange(9.0)
        first, again, other = (resampled_means(scores_N, np.ones(9), seed=(seed,)) for seed in (1, 1, 2))
        assert (first == again).all()
        assert (first != other).any()

    def test_draws_are_paired(self):
        scores_N = np.arange(9.0)
        first, second = (resampled_means(one, np.ones(9), seed=(1,)) for one in (scores_N, scores_N + 2))
        np.testing.assert_allclose(second - first, 2.0)


class TestFigures:
    def test_values_and_differences(self, tmp_path):
        (table,) = make_tables([needle_run(tmp_path / "run")])
        assert [row.name for row in table.rows] == [
            *("full", "quest-256", "predictor-256", "predictor-512", "quest-512")
        ]
        assert [column.title for column in table.columns] == ["2048", "4096", "mean"]
        values = {row.name: [table.figures[row.name, one.title].value for one in table.columns] for row in table.rows}
        assert values == {
            "full": [100, 100, 100],
            "quest-256": [25, 50, 37.5],
            "predictor-256": [75, 50, 62.5],
            "predictor-512": [100, 75, 87.5],
            "quest-512": [75, 75, 75],
        }
        assert table.figures["quest-256", "mean"].delta == -62.5
        assert table.figures["full", "mean"].delta is None

    def test_best_at_each_budget(self, tmp_path):
        (table,) = make_tables([needle_run(tmp_path / "run")])
        best = {key for key, figure in table.figures.items() if figure.best}
        assert best == {
            ("predictor-256", "2048"),
            *((name, "4096") for name in ("quest-256", "predictor-256", "quest-512", "predictor-512")),  # as good
            ("predictor-512", "2048"),
            *((f"predictor-{budget}", "mean") for budget in (256, 512)),
        }

    def test_one_policy_is_not_best(self, tmp_path):
        results = {"full": {"8": answers("++")}, "quest-64": {"8": answers("+-")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        assert not any(figure.best for figure in table.figures.values())

    def test_intervals(self, tmp_path):
        (table,) = make_tables([needle_run(tmp_path / "run")], seed=5)
        drawn = {
            task: np.random.default_rng([5, *task.encode()]).integers(4, size=(2000, 4))
            for task in table.rows[0].outcomes
        }
        quest = {"2048": np.array([100, 0, 0, 0]), "4096": np.array([100, 0, 100, 0])}
        means = {task: quest[task][drawn[task]].mean(1) for task in quest}
        figure = table.figures["quest-256", "2048"]
        assert figure.interval == pytest.approx(tuple(np.quantile(means["2048"], (0.025, 0.975))))
        assert figure.delta_interval == pytest.approx(tuple(np.quantile(means["2048"] - 100, (0.025, 0.975))))
        both = (means["2048"] + means["4096"]) / 2
        assert table.figures["quest-256", "mean"].interval == pytest.approx(tuple(np.quantile(both, (0.025, 0.975))))
        assert table.figures["full", "mean"].interval == (100, 100)

    def test_no_interval_of_one_sample(self, tmp_path):
        results = {"full": {"8": answers("+")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0])])
        assert table.figures["full", "8"].interval is None

    def test_no_interval_of_a_mean_with_such_a_task(self, tmp_path):
        results = {"full": {"8": answers("+"), "16": answers("+-+")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        assert table.figures["full", "16"].interval is not None
        assert table.figures["full", "mean"].interval is None

    def test_traffic(self, tmp_path):
        (table,) = make_tables([needle_run(tmp_path / "run")])
        rows = {row.name: row for row in table.rows}
        assert rows["predictor-256"].hit_rate == 0.5
        assert rows["predictor-256"].fetched_bytes == 2048  # a token
        assert rows["full"].hit_rate is rows["full"].fetched_bytes is None

    def test_failed_and_unfinished(self, tmp_path):
        results = {"full": {"8": answers("+++-")}, "quest-64": {"8": answers("-!")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        assert table.notes == [
            "failed, counted as 0: quest-64 8 1 of 2",
            "not finished (differences are over samples that both have): quest-64 8 2 of 4",
        ]
        assert table.figures["full", "8"].value == 75
        assert table.figures["quest-64", "8"].delta == -100  # of the two

    def test_many_unfinished_tasks_are_counted_together(self, tmp_path):
        results = {"full": {str(n): answers("++") for n in range(5)}, "quest-64": {"0": answers("+!")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        assert table.notes == [
            "failed, counted as 0: quest-64 0 1 of 2",
            "not finished (differences are over samples that both have): quest-64 0 of 8 in 4 tasks",
        ]

    def test_task_without_results(self, tmp_path):
        results = {"full": {"8": answers("++"), "16": answers("++")}, "quest-64": {"8": answers("+-")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        assert ("quest-64", "16") not in table.figures
        assert ("quest-64", "mean") not in table.figures
        assert table.notes == ["not finished (differences are over samples that both have): quest-64 16 0 of 2"]

    def test_perplexity(self, tmp_path):
        def tails(*bits: float) -> list[dict[str, Any]]:
            return [
                {"log_likelihood": -bit * tokens * np.log(2), "tokens": tokens}
                for bit, tokens in zip(bits, (10, 30), strict=True)
            ]

        failing = [*tails(2.5, 4.5), {"error": "RuntimeError: no"}]
        results = {
            "full": {"books": [*tails(2, 4), *tails(2, 4)[:1]]},
            "a-8": {"books": failing},
            "b-8": {"books": tails(3, 5)},
        }
        (table,) = make_tables([write_run(tmp_path / "run", "perplexity", results)])
        assert table.figures["full", "books"].value == pytest.approx((10 * 2 + 30 * 4 + 10 * 2) / 50)
        figure = table.figures["a-8", "books"]
        assert figure.value == pytest.approx(4.0)  # over all tokens, without the one that failed
        assert figure.delta == pytest.approx(0.5)
        assert figure.best  # less is better
        assert not table.figures["b-8", "books"].best
        assert table.notes[0] == "failed, left out of the figures: a-8 books 1 of 3"

    def test_the_oracle_is_never_the_best(self, tmp_path):
        lines = {"oracle-64": "++++", "quest-64": "+++-", "streaming-64": "+---", "full": "++++"}
        results = {name: {"2048": answers(right)} for name, right in lines.items()}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        assert [name for (name, _), figure in table.figures.items() if figure.best] == ["quest-64"]


class TestLongBench:
    def run(self, path: Path, tasks: tuple[str, ...] = ("qasper", "hotpotqa", "2wikimqa"), **settings: Any) -> Path:
        def lines(*said: str) -> list[dict[str, Any]]:
            wanted = {"answers": ["sky sea"], "all_classes": None}
            return [{"pred": one} | wanted | {"length": 100 + 5000 * n} for n, one in enumerate(said)]

        results = {
            "full": {task: lines("sky", "sea or sky", "the sky sea") for task in tasks},
            "quest-64": {task: lines("", "sea", "a sky and") for task in tasks},
        }
        return write_run(path, "longbench", results, **{"extended": False} | settings)

    def test_as_scored(self, tmp_path):
        path = self.run(tmp_path / "run")
        (table,) = make_tables([path])
        assert [column.title for column in table.columns if column.average] == [
            *("single-document QA", "multi-document QA")
        ]
        for name, scores in score_folder(RunFolder.finished(path)).items():
            for column in table.columns:
                known = scores.categories if column.average else scores.tasks
                assert table.figures[name, column.title].value == known[column.title]

    def test_english_average(self, tmp_path):
        english = [name for name, task in TASKS.items() if not task.chinese]
        said = ["Paragraph 3", "3", "no"]
        lines = [{"pred": one, "answers": ["Paragraph 3"], "all_classes": ["Paragraph 3"]} for one in said]
        results = {"full": dict.fromkeys(english, lines)}
        path = write_run(tmp_path / "run", "longbench", results, extended=False)
        (table,) = make_tables([path])
        expected = score_folder(RunFolder.finished(path))["full"].english_average
        assert table.figures["full", "16 English tasks"].value == expected

    def test_likelihood_of_the_answers(self, tmp_path):
        known = [(-2.0, 4), (-6.0, 4), (-3.0, 8)]
        said = {"pred": "sky", "answers": ["sky"], "all_classes": None}
        lines = [said | {"answer_log_likelihood": sum_, "answer_tokens": tokens} for sum_, tokens in known]
        results = {"full": {"qasper": lines}, "quest-64": {"qasper": [*lines[:2], said | {"error": "no"}]}}
        path = write_run(tmp_path / "run", "longbench", results, extended=False, answer_likelihood=True)
        scores, answers_ = make_tables([path])
        assert scores.title == "LongBench · tiny"
        assert answers_.title == "LongBench's answers · tiny"
        assert answers_.figures["full", "qasper"].value == pytest.approx(11 / 16 / np.log(2))
        assert answers_.figures["quest-64", "qasper"].value == pytest.approx(1 / np.log(2))
        assert score_folder(RunFolder.finished(path))["full"].perplexity["qasper"] == pytest.approx(np.exp(11 / 16))

    def test_by_length(self, tmp_path):
        path = self.run(tmp_path / "run", extended=True)
        tables = make_tables([path])
        assert [table.title for table in tables] == [
            *("LongBench-E · 0-4k · tiny", "LongBench-E · 4-8k · tiny", "LongBench-E · 8k+ · tiny")
        ]
        scores = score_folder(RunFolder.finished(path))
        for table, length in zip(tables, ("0-4k", "4-8k", "8k+"), strict=True):
            for name, one in scores.items():
                assert table.figures[name, "qasper"].value == one.buckets["qasper"][length]


class TestSheets:
    def test_runs_that_agree_share_one(self, tmp_path):
        first = write_run(
            tmp_path / "a", "needle", {"full": {"8": answers("++")}, "a-4": {"8": answers("+-")}}, depths=[0, 100]
        )
        second = write_run(
            tmp_path / "b", "needle", {"full": {"8": answers("--")}, "b-4": {"8": answers("--")}}, depths=[0, 100]
        )
        (table,) = make_tables([first, second])
        assert [row.name for row in table.rows] == ["full", "a-4", "b-4"]
        assert table.figures["full", "8"].value == 100
        assert table.notes == ["in more than one of the runs, taken from the first: full 8"]

    def test_others_have_their_own(self, tmp_path):
        first = needle_run(tmp_path / "a")
        second = needle_run(tmp_path / "b", seed=1)
        third = write_run(
            tmp_path / "c", "synthetic", {"full": {"kv": [{"found": [True, False], "answers": ["a", "b"]}]}}
        )
        assert [table.title for table in make_tables([first, third, second])] == [
            f"Needle in a haystack · tiny · {first}",
            "Synthetic tasks · tiny",
            f"Needle in a haystack · tiny · {second}",
        ]

    def test_ruler_by_length(self, tmp_path):
        results = {
            "full": {
                f"{task}-{length}": [{"pred": "7", "answers": ["7"]}] for length in (8, 16) for task in ("vt", "cwe")
            }
        }
        (table,) = make_tables([write_run(tmp_path / "run", "ruler", results)])
        averages = {column.title: column.tasks for column in table.columns if column.average}
        assert averages == {
            "mean at 8": ("vt-8", "cwe-8"),
            "mean at 16": ("vt-16", "cwe-16"),
            "mean": ("vt-8", "cwe-8", "vt-16", "cwe-16"),
        }


class TestTables:
    def test_markdown(self, tmp_path):
        results = {"full": {"8": answers("++")}, "a_b-4": {"8": answers("++")}, "c-4": {"8": answers("--")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        assert markdown(table).splitlines() == [
            "## Needle in a haystack · tiny",
            "",
            "| policy | budget | 8 |",
            "| :-- | --: | --: |",
            "| full | all | 100.00 [100.00, 100.00] |",
            "| a\\_b | 4 | **100.00** [100.00, 100.00] |",
            "| c | 4 | 0.00 [0.00, 0.00] |",
            "",
            "Difference to full",
            "",
            "| policy | budget | 8 |",
            "| :-- | --: | --: |",
            "| a\\_b | 4 | 0.00 [0.00, 0.00] |",
            "| c | 4 | −100.00 [−100.00, −100.00] |",
            "",
            "- found, %; bold: best policy at a budget, full attention and the oracle apart; "
            "\\[95% bootstrap interval over samples\\]",
        ]

    def test_latex(self, tmp_path):
        results = {"full": {"8": answers("++")}, "a_b-4": {"8": answers("++")}, "c-4": {"8": answers("--")}}
        (table,) = make_tables([write_run(tmp_path / "run", "needle", results, depths=[0, 100])])
        text = latex(table)
        assert r"a\_b & 4 & \textbf{100.00} \\" in text
        assert r"c & 4 & $-$100.00 {\scriptsize [$-$100.00, $-$100.00]} \\" in text
        assert r"full & all & 100.00 \\" in text
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
        assert "found, \\%" in text

    def test_escapes(self):
        assert escape_markdown("a|b*c_d <i> `x`\n[y] & #") == r"a\|b\*c\_d &lt;i&gt; \`x\` \[y\] &amp; \#"
        escaped = r"50\% of a\_b \& \{c\} \textbackslash{}d \textasciitilde{}\textasciicircum{}"
        assert escape_latex("50% of a_b & {c} \\d ~^") == escaped

    def test_signs(self):
        assert [signed(one) for one in (1.234, -1.234, 0.001, -0.001)] == ["+1.23", "−1.23", "0.00", "0.00"]


class Reader(HTMLParser):
    """Sees that every element is closed, and collects references and texts."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestPage:
    def test_needs_nothing_else(self, capsys, tmp_path):
        page = report(capsys, tmp_path / "out", needle_run(tmp_path / "run"))["html"]
        reader = Reader(page)
        assert reader.references == []
        assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
        assert not re.search(r"https?:|//\w|url\(|@import", page)
        assert "default-src 'none'" in page

    def test_table(self, capsys, tmp_path):
        page = report(capsys, tmp_path / "out", needle_run(tmp_path / "run"))["html"]
        assert "<td><b>75.00</b><small>[25.00, 100.00]</small><small>Δ −25.00 [−75.00, 0.00]</small></td>" in page
        assert "failed, counted as 0: quest-256 2048 1 of 4" in page

    def test_charts(self, capsys, tmp_path):
        page = report(capsys, tmp_path / "out", needle_run(tmp_path / "run"))["html"]
        captions = re.findall("<figcaption>(.*?)</figcaption>", page)
        assert captions == [
            *(f"{column} (found, %)" for column in ("mean", "2048", "4096")),
            "Hit rate, % of blocks read that no late fetch had to bring",
            "Fetched from host memory, KiB a decoding step",
            *("predictor-512", "full", "quest-256", "predictor-256", "quest-512"),
        ]
        assert "<title>predictor at 256: 2.00</title>" in page  # KiB
        assert "<title>depth 100 %, length, tokens 4096: 0.000</title>" in page

    def test_recovery_by_layer_and_head(self, capsys, tmp_path):
        maps = [
            {"layers": [0, 3], "relative_map": [[0.5, 1.0], [0.75, 0.875]], "recovery_map": [[0.4, 0.9], [0.6, 0.7]]},
            {"layers": [0, 3], "relative_map": [[0.25, 1.0], [0.25, 0.625]], "recovery_map": [[0.2, 0.9], [0.6, 0.7]]},
            {"error": "RuntimeError: no"},
        ]
        page = report(capsys, tmp_path / "out", write_run(tmp_path / "run", "recovery-map", {"a-8": {"books": maps}}))[
            "html"
        ]
        for where, value in {(0, 0): 0.375, (0, 1): 1.0, (3, 0): 0.5, (3, 1): 0.75}.items():
            assert f"<title>layer {where[0]}, KV head {where[1]}: {value:.3f}</title>" in page
        assert "failed, left out of the figures: a-8 books 1 of 3" in page

    def test_traffic_over_steps(self, capsys, tmp_path):
        series = {"steps": 3, "stride": 1, "hit_rate": [1.0, None, 0.5], "fetched_bytes": [0, 1024, 2048]}
        page = report(capsys, tmp_path / "out", needle_run(tmp_path / "run", {"over_steps": series}))["html"]
        captions = re.findall("<figcaption>(Budget.*?)</figcaption>", page)
        assert [caption.partition(":")[0] for caption in captions] == ["Budget 256"] * 2 + ["Budget 512"] * 2
        curves = re.findall(r'class="s\d curve"><path d="(.*?)"', page)
        assert len(curves) == 4  # Quest has none
        assert [curve.count("L") for curve in curves] == [1, 2, 1, 2]

    def test_attention_maps(self, capsys, tmp_path):
        drawn = {"block_size": 16, "steps": [4], "layers": [0], "rows": [[["</script>AB"]]]}
        lines = [{"layers": [0], "relative_map": [[0.5]], "recovery_map": [[0.5]], "map": drawn}]
        run = write_run(tmp_path / "run", "recovery-map", {"a-8": {"books": lines}})
        page = report(capsys, tmp_path / "out", run)["html"]
        Reader(page)
        (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
        assert json.loads(data) == {"books": {"a-8": drawn}}
        (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in page

    def test_texts_are_escaped(self, capsys, tmp_path):
        run = write_run(tmp_path / "a&b", "synthetic", {"full": {"kv": [{"found": [True], "answers": ["a"]}]}})
        known = json.loads((run / "run.json").read_text())
        known["tasks"] = {"<script>": {"samples": 1, "sha256": ""}}
        known["settings"]["model"] = "tiny<img src=x>"
        (run / "run.json").write_text(json.dumps(known))
        (run / "full" / "kv.jsonl").rename(run / "full" / "<script>.jsonl")
        texts = report(capsys, tmp_path / "out", run)
        assert not {"script", "img"} & set(Reader(texts["html"]).tags)
        assert "&lt;script&gt;" in texts["html"]
        assert "a&amp;b" in texts["html"]
        assert "<" not in texts["md"]

    def test_one_full_run_has_no_charts(self, capsys, tmp_path):
        run = write_run(tmp_path / "run", "synthetic", {"full": {"kv": [{"found": [True], "answers": ["a"]}]}})
        page = report(capsys, tmp_path / "out", run)["html"]
        assert "svg" not in Reader(page).tags

    def test_lines(self):
        lines = {"a": {256: Point(1.0, (0.5, 2.0)), 512: Point(3.0)}, "none": {}, "b": {1024: Point(2.0)}}
        drawn = line_chart("t", lines, 2.5)
        assert re.findall(r'class="(s\d)"', drawn) == ["s0", "s2"]
        assert drawn.count('class="marker"') == 3
        assert drawn.count('class="whisker"') == 1
        assert drawn.count('class="level"') == 1
        assert "<title>a at 256: 1.00 [0.50, 2.00]</title>" in drawn
        assert [one for one in re.findall(r">(\d+)</text>", drawn) if int(one) > 200] == ["256", "512", "1024"]

    def test_lines_stay_apart(self):
        marks = [legend_mark(number) for number in (*range(16), None)]
        assert len(set(marks)) == 17
        places = [
            float(re.search(r'class="marker" d="M([\d.]+)', one)[1])
            for one in re.findall(r"<g>.*?</g>", line_chart("t", {name: {64: Point(1.0)} for name in "abc"}))
        ]
        assert len(set(places)) == 3

    @pytest.mark.parametrize(
        ("low", "high"), [(0, 100), (37.2, 38.9), (5, 5), (0, 0), (-3, 1), (1e-7, 3e-7), (1e6, 9e6)]
    )
    def test_ticks(self, low, high):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert 3 <= len(ticks) <= 8
        np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])

    @pytest.mark.parametrize("value", [0.0, 40.0, 100.0])
    def test_ticks_around_one_value_stay_within_bounds(self, value):
        ticks = nice_ticks(value, value, (0.0, 100.0))
        assert 0 <= ticks[0] <= value <= ticks[-1] <= 100
        assert len(ticks) > 2


class TestRefused:
    def test_no_directory(self, capsys, tmp_path):
        assert refused(capsys, tmp_path / "none") == f"attnpred report: {tmp_path / 'none'}: no such directory"

    def test_no_run(self, capsys, tmp_path):
        assert "is not the directory of a run: no run.json in it" in refused(capsys, tmp_path)

    def test_nothing_given(self, capsys):
        assert "DIR" in refused(capsys)

    def test_empty_run(self, capsys, tmp_path):
        run = write_run(tmp_path / "run", "needle", {"full": {"8": []}})
        assert refused(capsys, run, "--out", tmp_path / "out") == f"attnpred report: {run}: no results in this run yet"
        assert not (tmp_path / "out").exists()

    def test_damaged(self, capsys, tmp_path):
        run = needle_run(tmp_path / "run")
        (run / "full" / "2048.jsonl").write_text('{"index": 0, "id"\n')
        assert "2048.jsonl, line 1: not readable as JSON" in refused(capsys, run)

    def test_other_records(self, capsys, tmp_path):
        run = write_run(tmp_path / "run", "needle", {"full": {"8": [{"said": "7"}]}}, depths=[0])
        assert "8.jsonl: not results of needle: KeyError('answers')" in refused(capsys, run, "--out", tmp_path / "out")

    def test_records_without_depth(self, capsys, tmp_path):
        run = write_run(tmp_path / "run", "needle", {"full": {"8": [{"pred": "7", "answers": ["7"]}]}}, depths=[0])
        assert "not results of needle: KeyError('depth')" in refused(capsys, run, "--out", tmp_path / "out")

    def test_unknown_benchmark(self, capsys, tmp_path):
        run = write_run(tmp_path / "run", "riddles", {"full": {"8": answers("+")}})
        assert "is a run of 'riddles': expected one of longbench, needle" in refused(capsys, run)

    def test_given_twice(self, capsys, tmp_path):
        run = needle_run(tmp_path / "run")
        assert refused(capsys, run, run / ".." / "run").endswith(f"is given twice, once as {run}")
        assert refused(capsys, run, run).endswith("run is given twice")

    def test_out_is_a_file(self, capsys, tmp_path):
        (tmp_path / "out").write_text("")
        run = needle_run(tmp_path / "run")
        for place in (tmp_path / "out", tmp_path / "out" / "below"):
            assert refused(capsys, run, "--out", place).endswith(
                f"--out {place}: can't be written: {tmp_path}/out is not a directory"
            )

    def test_seed(self, capsys, tmp_path):
        assert "--seed -1: expected 0 or more" in refused(capsys, needle_run(tmp_path / "run"), "--seed", -1)
