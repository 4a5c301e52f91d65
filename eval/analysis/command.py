"""Show where a model's attention can be foreseen, by layer and head, and why.

Of each document --context tokens are taken. All but the last --tail go through the model as the prompt, then those,
with attention to everything; rows with continuations, questions with their answers for example, are followed by these.
Measured for each layer and head: query similarity (of the prompt's last --window queries, and of the steps), how much
of the next step's attention the predictor finds ahead of it within --budget tokens, and how much the last row
repeated, the pattern that the attention map shows, and the RoPE frequencies that carry it.

OUT/attention/<data>.jsonl has a line a document, written as it goes: an unfinished run goes on. From all of them are
made OUT/heads.json (a row a layer and head), OUT/correlation.json (query similarity against recovery),
OUT/heads.parquet with --parquet, and OUT/gallery.html, a page that needs nothing else.

examples:
  attnpred analyze --data texts/ --context 8192 --limit 8 --out runs/analysis
  attnpred analyze --model Qwen/Qwen3-0.6B --data books=books/ --data asked=questions.jsonl --budget 256 --out runs/q
"""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from transformers import AutoConfig

from attention_predictor.arguments import add_model_arguments
from attention_predictor.eval.analysis.benchmark import VARIANT, Analysis
from attention_predictor.eval.analysis.gallery import LEVELS, NAMES, correlation_text, gallery
from attention_predictor.eval.analysis.patterns import CLASSES
from attention_predictor.eval.analysis.summary import FILES, Head, Summary, summarise
from attention_predictor.eval.folder import RunFolder
from attention_predictor.eval.plain_table import plain_table
from attention_predictor.eval.predictions import write_atomically
from attention_predictor.eval.prompts import context_length
from attention_predictor.eval.runner import Plan, run
from attention_predictor.eval.sources import Windows, parse_sources
from attention_predictor.loading import load_tokenizer
from attention_predictor.offload.cache import full_attention_layers
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.selection import Selection
from attention_predictor.predictor.errors import AttachError, ConfigError

# Columns of the table; short, since layers have to be seen side by side.
SHOWN = {
    "qsim_prompt_plain": "q-sim before RoPE",
    "qsim_prompt": "q-sim after",
    "qsim_steps": "q-sim of steps",
    "predictor_relative": "predictor",
    "last_relative": "last row",
    "predictor_far": "predictor, far",
    "last_far": "last row, far",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    what = "[name=]place: .txt, .jsonl or .parquet, a directory or pattern of them, or a data set of the hub"
    add("--data", action="append", required=True, metavar="D", help=what)
    add("--out", type=Path, required=True, metavar="DIR", help="results; an unfinished run in it goes on")
    add("--context", type=int, default=4096, metavar="N", help="tokens of each document (%(default)s)")
    add("--tail", type=int, default=128, metavar="N", help="the last of them, the steps that are judged (%(default)s)")
    add("--tails", type=int, default=4, metavar="N", help="continuations of a row at most (%(default)s)")
    add("--per-file", type=int, default=1, metavar="N", help="documents of a .txt file (%(default)s)")
    add("--limit", type=int, metavar="N", help="the first N documents of each --data alone")
    add("--window", type=int, default=32, metavar="T", help="queries that are compared with each other (%(default)s)")
    add("--budget", type=int, default=512, metavar="N", help="tokens that may be chosen for a step (%(default)s)")
    add("--predictor", default="default", metavar="P", help="that chooses: a name or a directory (%(default)s)")
    add("--parquet", action="store_true", help="write heads.parquet too (needs pyarrow)")
    add("--retry-errors", action="store_true", help="try documents once more that failed")


def main(args: argparse.Namespace) -> int:
    args.policies, args.rule, args.budgets = None, [f"{VARIANT}: full,prefetch=none"], str(args.budget)
    args.prefetch = "none"
    plan = Plan.of(args)
    if args.parquet and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--parquet needs pyarrow: pip install 'attention-predictor[train]'")
    selection = Selection.of(OffloadConfig(budget=args.budget))
    check_model(args.model)
    context = context_length(args.model)
    if context is not None and args.context > context:
        raise ConfigError(f"--context {args.context}: the model has positions for {context} tokens")
    if not args.budget < args.context - args.tail:
        raise ConfigError(f"--budget {args.budget}: expected less than --context without --tail, or all is chosen")
    tokenizer = load_tokenizer(args.model)
    windows = Windows(parse_sources(args.data), tokenizer, args.context, args.tail, args.per_file, continuations=True)
    options = {"tails": args.tails, "window": args.window, "predictor": args.predictor}
    folder = run(Analysis(windows, **options, selection=selection), plan)
    return 0 if folder is None else conclude(folder, parquet=args.parquet)


def check_model(name: str) -> None:
    """Refuse a model whose attention can't be seen, by its configuration; ``context_length`` says if there is none."""
    context_length(name)
    config = AutoConfig.from_pretrained(name)
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise AttachError(f"--model {name}: {config.model_type} is not a causal language model")
    if getattr(text_config, "kv_lora_rank", None) is not None:
        raise AttachError(f"--model {name}: {config.model_type} uses multi-head latent attention: not supported")
    if not full_attention_layers(text_config):
        raise AttachError(f"--model {name}: {config.model_type} has no full-attention layer here: nothing to analyse")


def conclude(folder: RunFolder, *, parquet: bool) -> int:
    """Make everything that documents together say; 1 where not one of them succeeded."""
    summary = summarise(folder)
    if not summary.heads:
        print(f"no document succeeded: {summary.failures[0] if summary.failures else 'none is done'}")
        return 1
    for name, text in (*summary.files(), (FILES.page, gallery(summary))):
        write_atomically(folder.path / name, text.encode())
    if parquet:
        summary.write_parquet(folder.path / FILES.parquet)
    print(table(summary))
    print(f"gallery: {folder.path / FILES.page}")
    return 0


def table(summary: Summary) -> str:
    """Layers down: query similarity, recovery, and how many heads show which pattern; correlations below."""
    rows: list[tuple[object, ...]] = []
    for layer in sorted({head.layer for head in summary.heads}):
        heads = [head for head in summary.heads if head.layer == layer]
        rows.append((f"layer {layer}", *_figures(heads), _patterns(heads)))
    rows.append(("all layers", *_figures(summary.heads), _patterns(summary.heads)))
    titles = ("%", *SHOWN.values(), "heads by pattern")
    notes = [
        f"rank correlation over {LEVELS[level]}, {NAMES[one]} with {NAMES[other]}: {correlation_text(found)}"
        for (level, one, other), found in summary.correlations.items()
        if one.startswith("qsim_prompt") and other.startswith("predictor")
    ]
    notes += [f"failed, left out: {failure}" for failure in summary.failures]
    return plain_table(titles, rows, notes)


def _figures(heads: Sequence[Head]) -> list[float | None]:
    found = []
    for name in SHOWN:
        known = [value for head in heads if (value := head.means[name]) is not None]
        found.append(100 * fmean(known) if known else None)
    return found


def _patterns(heads: Sequence[Head]) -> str:
    counts = Counter(head.pattern for head in heads)
    return ", ".join(f"{counts[name]} {name}" for name in CLASSES if counts[name])
