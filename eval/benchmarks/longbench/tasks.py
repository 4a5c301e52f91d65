"""The 21 tasks of LongBench: prompt template, answer length and metric of each.

Wording of the templates and generation lengths are LongBench's own (https://github.com/THUDM/LongBench, its
``config/dataset2prompt.json`` and ``config/dataset2maxlen.json``; copyright 2023 THU-KEG & Zhipu AI, MIT licence), kept
to the letter, mistakes included: other wording gives other scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.longbench import metrics
from attention_predictor.eval.benchmarks.longbench.metrics import Metric

BENCHMARK = "longbench"
ALL = "all"  # in ``--tasks``


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        category: One of the six.
        template: The prompt; ``{context}`` and ``{input}`` are fields of a sample.
        max_new_tokens: Longest answer.
        chinese: Not one of the paper's 16 English tasks.
        extended: Also in LongBench-E.
        chat: Put into the chat template; prompts that are examples to go on with, or code, are not.
        first_line: Only the first line that is not empty is scored, since what follows are further made-up examples.
        stops_at_newline: A new line ends the answer, which has at least one token.
        classes: Scoring needs the names of all classes.
    """

    category: str
    metric: Metric
    max_new_tokens: int
    template: str
    chinese: bool = False
    extended: bool = False
    chat: bool = True
    first_line: bool = False
    stops_at_newline: bool = False
    classes: bool = False


_STORY = "using a single phrase if possible. Do not provide any explanation.\n\n"
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_ONLY = "Only give me the answer and do not output any other words."
_PASSAGES = (
    f"Answer the question based on the given passages. {_ONLY}\n\nThe following are given passages.\n{{context}}\n\n"
    f"Answer the question based on the given passages. {_ONLY}\n\nQuestion: {{input}}\nAnswer:"
)

SINGLE, MULTI, SUMMARY = "single-document QA", "multi-document QA", "summarisation"
FEW_SHOT, SYNTHETIC, CODE = "few-shot learning", "synthetic tasks", "code completion"
CATEGORIES = (SINGLE, MULTI, SUMMARY, FEW_SHOT, SYNTHETIC, CODE)

TASKS = {
    "narrativeqa": Task(
        SINGLE,
        metrics.qa_f1,
        128,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"asconcisely as you can, {_STORY}Story: {{context}}\n\nNow, answer the question based on the story "
        f"asconcisely as you can, {_STORY}Question: {{input}}\n\nAnswer:",
    ),
    "qasper": Task(
        SINGLE,
        metrics.qa_f1,
        128,
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}Article: {{context}}\n\n "
        f"Answer the question based on the above article {_ARTICLE}Question: {{input}}\n\nAnswer:",
        extended=True,
    ),
    "multifieldqa_en": Task(
        SINGLE,
        metrics.qa_f1,
        64,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        extended=True,
    ),
    "multifieldqa_zh": Task(
        SINGLE,
        metrics.qa_f1_zh,
        64,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。"
        "\n\n问题：{input}\n回答：",
        chinese=True,
    ),
    "hotpotqa": Task(MULTI, metrics.qa_f1, 32, _PASSAGES, extended=True),
    "2wikimqa": Task(MULTI, metrics.qa_f1, 32, _PASSAGES, extended=True),
    "musique": Task(MULTI, metrics.qa_f1, 32, _PASSAGES),
    "dureader": Task(
        MULTI,
        metrics.rouge_zh,
        128,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        chinese=True,
    ),
    "gov_report": Task(
        SUMMARY,
        metrics.rouge,
        512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        extended=True,
    ),
    "qmsum": Task(
        SUMMARY,
        metrics.rouge,
        512,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    "multi_news": Task(
        SUMMARY,
        metrics.rouge,
        512,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write "
        "a one-page summary of all the news.\n\nSummary:",
        extended=True,
    ),
    "vcsum": Task(
        SUMMARY,
        metrics.rouge_zh,
        512,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        chinese=True,
    ),
    "trec": Task(
        FEW_SHOT,
        metrics.classification,
        64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        extended=True,
        chat=False,
        first_line=True,
        classes=True,
    ),
    "triviaqa": Task(
        FEW_SHOT,
        metrics.qa_f1,
        32,
        f"Answer the question based on the given passage. {_ONLY} The following are some examples.\n\n{{context}}\n\n"
        "{input}",
        extended=True,
        chat=False,
        first_line=True,
    ),
    "samsum": Task(
        FEW_SHOT,
        metrics.rouge,
        128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        extended=True,
        chat=False,
        first_line=True,
        stops_at_newline=True,
    ),
    "lsht": Task(
        FEW_SHOT,
        metrics.classification,
        64,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        chinese=True,
        chat=False,
        first_line=True,
        classes=True,
    ),
    "passage_count": Task(
        SYNTHETIC,
        metrics.count,
        32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        extended=True,
    ),
    "passage_retrieval_en": Task(
        SYNTHETIC,
        metrics.retrieval,
        32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        extended=True,
    ),
    "passage_retrieval_zh": Task(
        SYNTHETIC,
        metrics.retrieval_zh,
        32,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}"
        '\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        chinese=True,
    ),
    "lcc": Task(
        CODE,
        metrics.code_similarity,
        64,
        "Please complete the code given below. \n{context}Next line of code:\n",
        extended=True,
        chat=False,
    ),
    "repobench-p": Task(
        CODE,
        metrics.code_similarity,
        64,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        extended=True,
        chat=False,
    ),
}


def choose_tasks(names: str, *, extended: bool = False) -> tuple[str, ...]:
    """``"qasper,trec"`` or ``"all"`` as names of tasks, in LongBench's order; ``ConfigError`` lists the valid ones."""
    valid = [name for name, task in TASKS.items() if task.extended or not extended]
    if names == ALL:
        return tuple(valid)
    wanted = [name.strip() for name in names.split(",")]
    check_names(wanted, valid)
    return tuple(name for name in valid if name in wanted)


def check_names(names: Sequence[str], valid: Sequence[str] = tuple(TASKS)) -> None:
    """``ConfigError`` for a name that is no task's."""
    for name in names:
        if name not in valid:
            raise ConfigError(f"no LongBench task {name!r}: expected some of {', '.join(valid)}")


def needing_jieba(names: Sequence[str]) -> list[str]:
    """The tasks whose metrics need jieba: some of the Chinese ones."""
    return [name for name in names if TASKS[name].metric in metrics.NEEDING_JIEBA]


def check_scorers(names: Sequence[str]) -> None:
    """``ConfigError`` if a task can't be scored here."""
    if needing_jieba(names):
        metrics.check_jieba()


def without_unscorable(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Tasks that can be scored here, and a line about the others, empty if there are none."""
    try:
        check_scorers(names)
    except ConfigError as error:
        absent = needing_jieba(names)
        return tuple(name for name in names if name not in absent), f"left out: {', '.join(absent)}: {error}"
    return tuple(names), ""
