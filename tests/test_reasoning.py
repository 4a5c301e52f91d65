r"""GSM8K, MATH, AIME: answers are found however they are written, and are the same where they mean the same."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from benchmark_runs import evaluate, refused, results
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text_model import CHAT, make_tiny_tokenizer, save_tiny_text_model, write_jsonl

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.reasoning.answers import find_answer, same_answer
from attention_predictor.eval.benchmarks.reasoning.benchmark import (
    KINDS,
    Reasoning,
    Sampling,
    choose_tasks,
    kind,
    read_problem,
    sample_scores,
)
from attention_predictor.eval.benchmarks.reasoning.latex import normalise, value
from attention_predictor.eval.benchmarks.reasoning.prompts import as_task, behind_examples
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.run_folder import RunFolder

# What a model wrote, and the answer in it.
NUMERIC = [
    ("So she sells 9 eggs and earns 18 dollars.\n#### 18", "18"),
    ("The answer is 65.", "65"),
    ("The answer is -5.", "-5"),
    ("The answer is −5.", "-5"),
    ("the answer is **$1,450,000.00**.", "1450000"),
    ("**Answer:** $18", "18"),
    ("Answer: 3/4", "0.75"),
    ("The final answer is: $\\boxed{70{,}000}$", "70000"),
    ("The final answer is 12.50", "12.5"),
    ("That is 33%, so the answer is 33\\%", "33"),
    ("The answer is 18 dollars per day.", "18"),
    ("The answer is 10 - 3 = 7.", "7"),
    ("The answer is 5^2 + 7^2 = 74.", "74"),
    ("The answer is:\n\n42", "42"),
    ("The answer is\n$$\\boxed{7}$$", "7"),
    ("\\boxed{18 \\text{ cm}^2}", "18"),
    ("\\boxed{\\$18}", "18"),
    ("\\boxed{ 033 }", "33"),
    ("\\boxed 5", "5"),
    ("First \\boxed{4}, no: \\boxed{5}", "5"),
    ("\\boxed{x = 204}", "204"),
    ("\\boxed{5", "5"),  # cut off: the last number is left
    ("<think>Maybe the answer is 4</think>\nThe answer is 5.", "5"),
    ("<think>the answer is 4</think>", "4"),
    ("He has $15 and then 3 more, which makes $18", "18"),
    ("It is 1 4/5", "1.8"),
    ("He needs .5", "0.5"),
    ("#### 1. A heading\nAll in all 7", "7"),
    ("7-3", "3"),
    ("It costs -$5", "-5"),
    ("In total: 1,234,567.", "1234567"),
    ("Answer: I think it is 12, or so", "12"),
    ("The answer is unknown, but 8 may be", "8"),
]
FORMULAS = [
    ("so it is $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
    ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\fbox{x^{2}+1}", "x^{2}+1"),
    ("The final answer is $70 \\sqrt{2}$. I hope it is right.", "70 \\sqrt{2}"),
    ("The answer is \\(\\frac{3}{4}\\).", "\\frac{3}{4}"),
    ("Therefore, the answer is (15, -29).", "(15, -29)"),
    ("hence $p - q$", "p - q"),
    ("hence \\[x^2 + 1\\]", "x^2 + 1"),
    ("We get 3 in the end", "3"),
    ("The answer is $$\\frac12$$ as said", "\\frac12"),
]
NOTHING = ["", "no idea", "\\boxed{}", "\\boxed{ }", "#### none", "The answer is"]

SAME = [
    ("18", "18.00"),
    ("18", "$18$"),
    ("18", "\\$18"),
    ("18.5", "18.50"),
    (".5", "0.5"),
    ("5.", "5"),
    ("-5", "- 5"),
    ("+5", "5"),
    ("70000", "70,000"),
    ("10080", "10,\\!080"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
    ("1/2", "\\frac{1}{2}"),
    ("0.5", "\\frac12"),
    ("\\frac 59", "5/9"),
    ("\\frac9{19}", "\\dfrac{9}{19}"),
    ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("-\\frac{1}{2}", "-0.5"),
    ("1\\frac{4}{5}", "1.8"),
    ("137 \\frac{1}{2}", "137.5"),
    ("1 4/5", "9/5"),
    ("50%", "50"),
    ("50\\%", "0.5"),
    ("3 \\times 10^4", "30000"),
    ("2^{10}", "1024"),
    ("2**10", "2^10"),
    ("**42**", "42"),
    ("`42`", "42"),
    ("18 dollars", "18"),
    ("1,800 square meters", "1800"),
    ("5cm", "5"),
    ("5 cm", "5"),
    ("5.4 \\text{ cents}", "5.4"),
    ("864 \\mbox{ inches}^2", "864"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90°"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("11\\sqrt2", "11 \\sqrt{2}"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("\\sqrt[3]{27}", "3"),
    ("2\\pi", "π*2"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{east}", "East"),
    ("\\text{(C)}", "C"),
    ("x=5", "5"),
    ("x \\in [-2,7]", "[-2, 7]"),
    ("f(x) = 2x", "2x"),
    ("y = 2x + 3", "2x+3"),
    ("4210_{5}", "4210_5"),
    ("x^{5} - x^4", "x^5-x^4"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
    ("(2,\\infty)", "( 2 , \\infty )"),
    ("\\left(\\frac{3}{5},\\frac{8}{3}\\right]", "(0.6, 8/3]"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty,2)\\cup(3,\\infty)"),
    ("1,-2", "-2, 1"),
    ("3, 5, and 7", "7,5,3"),
    ("1 \\text{ or } 2", "2 or 1"),
    ("\\{1\\pm\\sqrt{5},-2\\}", "\\{-2, 1+\\sqrt5, 1-\\sqrt5\\}"),
    ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
    (
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
        "\\begin{bmatrix} -\\frac13 \\\\ \\frac{2}{3}\\\\ \\end{bmatrix}",
    ),
    ("\\begin{pmatrix} -1 & 0 \\\\ 0 & -1 \\end{pmatrix}", "\\begin{pmatrix}-1&0\\\\0&-1.0\\end{pmatrix}"),
    ("6 - 5i", "6-5i"),
    ("x \\leq 3", "x \\le 3"),
]
DIFFERENT = [
    ("18", "81"),
    ("-5", "5"),
    ("12345678901", "12345678902"),
    ("0.333", "1/3"),
    ("0.5", "50"),
    ("5", "52_8"),
    ("(3,4]", "(3,4)"),
    ("(3,4)", "[3,4)"),
    ("(1,2)", "(2,1)"),
    ("1, 2", "(1, 2)"),
    ("1,2", "1,2,2"),
    ("1,2,2", "1,1,2"),
    ("x+1", "x+2"),
    ("3x", "3y"),
    ("3R^2", "3r^2"),
    ("\\sqrt{2}", "1.414"),
    ("\\text{even}", "odd"),
    ("A", "B"),
    ("2 and 3", "2"),
    ("5 cos", "5"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"),
    ("", "5"),
    ("\\frac{1}{0}", "1"),
    ("9^{9^{9}}", "1"),
]


class TestFindAnswer:
    @pytest.mark.parametrize(("text", "answer"), NUMERIC)
    def test_numbers(self, text, answer):
        assert same_answer(find_answer(text, numeric=True), answer)

    @pytest.mark.parametrize(("text", "answer"), FORMULAS)
    def test_formulas(self, text, answer):
        assert find_answer(text, numeric=False) == answer

    @pytest.mark.parametrize("text", NOTHING)
    @pytest.mark.parametrize("numeric", [True, False])
    def test_nothing(self, text, numeric):
        assert find_answer(text, numeric=numeric) is None

    def test_a_model_that_repeats_itself_takes_no_time(self):
        assert find_answer("\\boxed{ \\frac{" * 20_000, numeric=False) is None
        assert find_answer("the answer is " * 20_000 + "5", numeric=True) == "5"

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet="\\boxed{}frac$#1,.%- ()[]&answeri:\n\x00^_=", max_size=120), st.booleans())
    def test_never_fails(self, text, numeric):
        found = find_answer(text, numeric=numeric)
        same_answer(found, "5")
        same_answer("5", text)
        assert same_answer(text, text) or not normalise(text)


class TestSameAnswer:
    @pytest.mark.parametrize(("one", "other"), SAME)
    def test_same(self, one, other):
        assert same_answer(one, other)
        assert same_answer(other, one)

    @pytest.mark.parametrize(("one", "other"), DIFFERENT)
    def test_different(self, one, other):
        assert not same_answer(one, other)
        assert not same_answer(other, one)

    def test_no_answer(self):
        assert not same_answer(None, "5")

    @given(st.fractions(max_denominator=10_000))
    def test_fractions_are_exact(self, number):
        spellings = [
            f"\\frac{{{number.numerator}}}{{{number.denominator}}}",
            f"{number.numerator}/{number.denominator}",
        ]
        assert [value(normalise(one)) for one in spellings] == [number, number]

    @given(st.integers(-(10**12), 10**12), st.integers(0, 999))
    def test_decimals(self, whole, thousandths):
        sign = "-" if whole < 0 else ""
        exact = Fraction(f"{whole}.{thousandths:03}")
        assert value(normalise(f"{sign}\\${abs(whole):,}.{thousandths:03}")) == exact

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("2+3*4", 14),
            ("(2+3)*4", 20),
            ("2^3^", None),
            ("-2^2", -4),
            ("2^-1", Fraction(1, 2)),
            ("3(4)", 12),
            ("x", None),
        ],
    )
    def test_arithmetic(self, text, number):
        assert value(text) == number


class TestProblems:
    @pytest.mark.parametrize(
        ("row", "problem", "answer"),
        [
            ({"question": "q", "answer": "3 + 4 = <<3+4=7>>7\n#### 7,000"}, "q", "7,000"),
            ({"problem": "p", "solution": "s \\boxed{9}", "answer": "\\frac12"}, "p", "\\frac12"),
            ({"problem": "p", "solution": "first \\boxed{1}, so \\boxed{\\text{no}}"}, "p", "\\text{no}"),
            ({"id": "2024-I-1", "problem": "p", "answer": 33}, "p", "33"),
            ({"prompt": "p", "answer": 70}, "p", "70"),
        ],
    )
    def test_forms(self, row, problem, answer):
        assert read_problem(row, "here") == (problem, answer)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"answer": "1"}, "here: expected a text in one of problem, question, prompt; found fields answer"),
            (
                {"problem": "p"},
                "here: expected a text or number in 'answer', or a text in 'solution'; found fields problem",
            ),
            ({"problem": "p", "answer": [1]}, r"here: expected a text or number in 'answer'.* found \[1\]"),
            ({"problem": "p", "answer": True}, "here: expected a text or number in 'answer'.* found True"),
            ({"problem": "p", "answer": ""}, "here: it has no answer"),
            ({"problem": "p", "solution": "we don't know"}, "here: it has no answer"),
        ],
    )
    def test_bad_ones(self, row, said):
        with pytest.raises(DataError, match=said):
            read_problem(row, "here")

    def test_prompts(self):
        assert as_task("What is 1 + 1?").startswith("What is 1 + 1?\n\nSolve this step by step.")
        given = "What is 1 + 1?\nReason well, and put the answer within \\boxed{}."
        assert as_task(given) == as_task("What is 1 + 1?")
        for known in KINDS.values():
            prompt = behind_examples(given, known.examples)
            assert prompt.endswith("Question: What is 1 + 1?\nAnswer:")
            assert prompt.count("Question: ") == 5

    @pytest.mark.parametrize("known", KINDS.values())
    def test_examples_are_in_a_form_that_is_understood(self, known):
        ends = [solution.rpartition("\\boxed")[1] or "The answer is" for _, solution in known.examples]
        assert set(ends) == ({"The answer is"} if known is KINDS["gsm8k"] else {"\\boxed"})
        for _, solution in known.examples:
            assert find_answer(solution, numeric=known.numeric) is not None

    def test_kinds(self):
        assert kind("gsm8k_test") is KINDS["gsm8k"]
        assert kind("math500") is KINDS["math"]
        assert kind("aime25") is KINDS["aime"]


def test_scores():
    records = [
        {"pred": "The answer is 18.", "answers": ["18"]},
        {"pred": "The answer is 19.", "answers": ["18"]},
        {"pred": "", "answers": ["18"], "error": "MemoryError: 18"},
    ]
    assert sample_scores("gsm8k_test", records) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-1.0,), "--temperature -1.0: expected 0"),
        ((0.5, 0.0), "--top-p 0.0: expected a share above 0, up to 1"),
        ((0.5, 1.0, 0), "--repeats 0: expected at least 1"),
        ((0.0, 1.0, 2), "--repeats 2: greedy decoding gives the same answer each time"),
    ],
)
def test_sampling(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Sampling(*arguments)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "gsm8k_test.jsonl", [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)])
    write_jsonl(folder / "gsm8k_train.jsonl", [{"question": "0?", "answer": "#### 0"}])
    write_jsonl(folder / "aime24.jsonl", [{"id": f"2024-{n}", "problem": f"{n}?", "answer": n} for n in range(2)])
    write_jsonl(folder / "unknown.jsonl", [{"question": "0?", "answer": "#### 0"}])
    return folder


def test_choose_tasks(data, tmp_path):
    assert choose_tasks(data, "all") == ("aime24", "gsm8k_test")
    assert choose_tasks(data, "gsm8k_train, aime24") == ("aime24", "gsm8k_train")
    with pytest.raises(
        ConfigError, match=r"no reasoning task 'unknown' in .*: expected some of aime24, gsm8k_test, gsm8k_train"
    ):
        choose_tasks(data, "unknown")
    with pytest.raises(DataError, match="no such directory"):
        choose_tasks(tmp_path / "nowhere", "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected files named gsm8k\*.jsonl, math\*.jsonl, aime\*.jsonl, found none"):
        choose_tasks(tmp_path / "empty", "all")


def test_samples(data):
    zero_shot = Reasoning(make_tiny_tokenizer(CHAT), data, ["aime24"])
    few_shot = Reasoning(make_tiny_tokenizer(CHAT), data, ["aime24"], few_shot=True)
    assert [one.id for one in zero_shot.samples("aime24")] == ["2024-0", "2024-1"]
    assert next(zero_shot.samples("aime24")).prompt == as_task("0?")
    assert next(few_shot.samples("aime24")).prompt == behind_examples("0?", KINDS["aime"].examples)
    assert next(Reasoning(make_tiny_tokenizer(), data, ["aime24"]).samples("aime24")).prompt.endswith("0?\nAnswer:")
    repeated = Reasoning(make_tiny_tokenizer(), data, ["aime24"], sampling=Sampling(0.5, 1.0, 2))
    assert [one.id for one in repeated.samples("aime24")] == ["2024-0", "2024-0#1", "2024-1", "2024-1#1"]


class Talker:
    """Says what it is told to, and notes how it was asked."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text, self.asked = tokenizer, text, {}

    def generate(self, prompt, max_new_tokens, **options):
        self.asked = {"prompt": self.tokenizer.decode(prompt), "max_new_tokens": max_new_tokens} | options
        return self.tokenizer(self.text, add_special_tokens=False)["input_ids"]

    predict = EvaluatedModel.predict


def test_a_model_without_template_is_stopped_at_the_next_problem(data):
    benchmark = Reasoning(make_tiny_tokenizer(), data, ["gsm8k_test"], max_new_tokens=99)
    talker = Talker(benchmark.tokenizer, " The answer is 1.\n\nQuestion: What is 7?\nAnswer: The answer is 7.")
    sample = next(benchmark.samples("gsm8k_test"))
    found = benchmark.predict(talker, "gsm8k_test", sample)
    assert found["pred"] == " The answer is 1."
    assert talker.asked["stop_strings"] == ["\n\nQuestion: "]
    assert talker.asked["max_new_tokens"] == 99
    assert sample_scores("gsm8k_test", [found | sample.record]) == [1.0]
    chat = Reasoning(make_tiny_tokenizer(CHAT), data, ["gsm8k_test"], sampling=Sampling(0.6, 0.9))
    chat.predict(talker, "gsm8k_test", next(chat.samples("gsm8k_test")))
    assert {"do_sample": True, "temperature": 0.6, "top_p": 0.9}.items() <= talker.asked.items()
    assert "stop_strings" not in talker.asked
    assert talker.asked["max_new_tokens"] == 1024


class TestCommand:
    @pytest.fixture
    def given(self, tmp_path, data):
        model = save_tiny_text_model(tmp_path / "model", chat=True)
        new = ("--max-new-tokens", 8, "--budgets", 144)
        return ("reasoning", "--model", model, "--data", data, *new, "--out", tmp_path / "out")

    def test_table_and_records(self, given, tmp_path, capsys):
        evaluate(*given, "--policies", "full,streaming")
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["solved,", "%", "aime24", "gsm8k_test", "mean"]
        assert [row.split()[0] for row in rows] == ["full", "streaming-144"]
        (first, _, _) = RunFolder(tmp_path / "out").records("full", "gsm8k_test")
        assert (first["answers"], first["new_tokens"]) == (["1"], 8)

    def test_few_shot(self, given, tmp_path):
        evaluate(*given, "--few-shot", "--tasks", "gsm8k_test", "--policies", "full", "--limit", 1)
        (record,) = RunFolder(tmp_path / "out").records("full", "gsm8k_test")
        assert record["prompt_tokens"] == 1 + len(behind_examples("0 + 1?", KINDS["gsm8k"].examples))

    def test_sampling_repeats_itself_and_nothing_else(self, given, tmp_path):
        options = ("--tasks", "aime24", "--policies", "full", "--temperature", 1.0, "--repeats", 2)
        evaluate(*given, *options)
        evaluate(*given, *options, "--out", tmp_path / "again")
        first, again = (results(RunFolder(tmp_path / name)) for name in ("out", "again"))
        assert first == again
        preds = [one["pred"] for one in first["full", "aime24"]]
        assert preds[0] != preds[1]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--tasks", "gsm9k"), "no reasoning task 'gsm9k'"),
            (("--data", "nowhere"), "--data nowhere: no such directory"),
            (("--max-new-tokens", "0"), "--max-new-tokens 0: expected at least 1"),
            (
                ("--max-new-tokens", "4090"),
                "new tokens exceed the model's 4096 positions: choose a smaller",
            ),
            (("--temperature", "-1"), "--temperature -1: expected 0"),
            (("--repeats", "3"), "--repeats 3: greedy decoding gives the same answer each time; set --temperature"),
        ],
    )
    def test_refuses(self, given, options, said, capsys, monkeypatch):
        assert said in refused(capsys, monkeypatch, *given, *options)

    def test_a_malformed_line(self, given, data, capsys, monkeypatch):
        with (data / "aime24.jsonl").open("a") as file:
            file.write(json.dumps({"problem": "p"}) + "\n")
        line = refused(capsys, monkeypatch, *given)
        assert "aime24.jsonl, line 3: expected a text or number in 'answer'" in line
