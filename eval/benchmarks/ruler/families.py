"""RULER's families of tasks (Hsieh et al. 2024, arXiv 2404.06654, section 3), made at any length.

What a task asks, its parameters, the longest answer and the beginning of the answer that ends each prompt are RULER's
(https://github.com/NVIDIA/RULER, its ``scripts/synthetic.yaml``). The niah prompts read as in its published samples;
all other wording, the words and the noise are ours, so that scores come near published ones and are not the same.
Samples that RULER itself has made can be run with ``attnpred eval ruler --data``.
"""

from __future__ import annotations

from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.ruler.base import Family
from attention_predictor.eval.benchmarks.ruler.counting import CommonWords, FrequentWords
from attention_predictor.eval.benchmarks.ruler.questions import QuestionAnswering
from attention_predictor.eval.benchmarks.ruler.retrieval import Retrieval
from attention_predictor.eval.benchmarks.ruler.tracking import VariableTracking

ALL = "all"  # in ``--tasks``
FAMILIES: dict[str, Family] = {
    "niah_single_1": Retrieval("noise"),
    "niah_single_2": Retrieval("essays"),
    "niah_single_3": Retrieval("essays", value_kind="uuids"),
    "niah_multikey_1": Retrieval("essays", keys=4),
    "niah_multikey_2": Retrieval("needles"),
    "niah_multikey_3": Retrieval("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Retrieval("essays", values=4),
    "niah_multiquery": Retrieval("essays", queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": QuestionAnswering("qa_1"),
    "qa_2": QuestionAnswering("qa_2"),
}


def choose_families(names: str) -> tuple[str, ...]:
    """``"vt,cwe"`` or ``"all"`` as names of tasks, in RULER's order; ``ConfigError`` lists the valid ones."""
    if names == ALL:
        return tuple(FAMILIES)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        check_family(name)
    return tuple(name for name in FAMILIES if name in wanted)


def check_family(name: str) -> None:
    """``ConfigError`` for a name that is no task's."""
    if name not in FAMILIES:
        raise ConfigError(f"no RULER task {name!r}: expected some of {', '.join(FAMILIES)}")
