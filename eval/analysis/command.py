"""``attnpred analyze``: runs the analysis and writes its tables, files and gallery."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from attention_predictor.errors import AttachError, ConfigError
from attention_predictor.eval.analysis.benchmark import VARIANT, Analysis
from attention_predictor.eval.analysis.gallery import LEVELS, NAMES, correlation_text, gallery
from attention_predictor.eval.analysis.patterns import CLASSES
from attention_predictor.eval.analysis.scatter import plot_similarity
from attention_predictor.eval.analysis.summary import FILES, Head, Summary, summarise
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.prompts import check_context
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Plan, run
from attention_predictor.eval.harness.windows import Windows, parse_sources
from attention_predictor.loading import load_config, load_tokenizer
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.cache import full_attention_layers
from attention_predictor.writing import write_atomically

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


def main(args: argparse.Namespace) -> int:
    args.policies, args.rule, args.budgets = None, [f"{VARIANT}: full,prefetch=none"], str(args.budget)
    args.prefetch = "none"
    plan = Plan.of(args)
    selection = Selection.of(OffloadConfig(budget=args.budget))
    check_model(args.model)
    check_context(args.model, args.context)
    if not args.budget < args.context - args.tail:
        raise ConfigError(f"--budget {args.budget}: expected less than --context minus --tail")
    tokenizer = load_tokenizer(args.model)
    windows = Windows(parse_sources(args.data), tokenizer, args.context, args.tail, args.per_file, continuations=True)
    options = {"tails": args.tails, "window": args.window, "predictor": args.predictor}
    folder = run(Analysis(windows, **options, selection=selection), plan)
    return 0 if folder is None else conclude(folder, parquet=args.parquet, plot=args.plot)


def check_model(name: str) -> None:
    """Raise ``ConfigError`` for a model whose attention can't be observed, by its configuration."""
    config = load_config(name)
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise AttachError(f"--model {name}: {config.model_type} is not a causal language model")
    if getattr(text_config, "kv_lora_rank", None) is not None:
        raise AttachError(f"--model {name}: {config.model_type} uses multi-head latent attention: not supported")
    if not full_attention_layers(text_config):
        raise AttachError(f"--model {name}: {config.model_type} has no full-attention layer here: nothing to analyse")


def conclude(folder: RunFolder, *, parquet: bool, plot: Path | None) -> int:
    """Summarise all documents, write and print the results; returns 1 if every document failed."""
    summary = summarise(folder)
    if not summary.heads:
        print(f"no document succeeded: {summary.failures[0] if summary.failures else 'none has run'}")
        return 1
    for name, text in (*summary.files(), (FILES.page, gallery(summary))):
        write_atomically(folder.path / name, text)
    if parquet:
        summary.write_parquet(folder.path / FILES.parquet)
    if plot is not None:
        plot_similarity(summary, plot)
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
    return text_table(titles, rows, notes)


def _figures(heads: Sequence[Head]) -> list[float | None]:
    found = []
    for name in SHOWN:
        known = [value for head in heads if (value := head.means[name]) is not None]
        found.append(100 * fmean(known) if known else None)
    return found


def _patterns(heads: Sequence[Head]) -> str:
    counts = Counter(head.pattern for head in heads)
    return ", ".join(f"{counts[name]} {name}" for name in CLASSES if counts[name])
