"""``attnpred prune``: scores layers, removes the least important, saves or evaluates the rest."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from attention_predictor.documents import opening, read_documents, window
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.analysis.pruning.layer_scores import measure
from attention_predictor.eval.analysis.pruning.plan import (
    METRICS,
    SCORES_OF,
    Plan,
    Scores,
    check_depth,
    importance,
    read_scores,
)
from attention_predictor.eval.analysis.pruning.shorten import save, without_layers
from attention_predictor.eval.analysis.pruning.sweep import Sweep, make_orders
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.prompts import check_context
from attention_predictor.loading import DTYPES, load_config, load_model, load_tokenizer
from attention_predictor.offload.policies.query_similarity import WINDOW
from attention_predictor.progress import Progress
from attention_predictor.writing import json_bytes, write_atomically, writing

logger = logging.getLogger(__name__)

SCORES, SWEEP = "scores.json", "sweep.json"


def main(args: argparse.Namespace) -> int:
    scores: Scores | None = None
    scores_of: str | None = None
    if args.scores:
        scores, scores_of = read_scores(args.scores)
    if args.plan_only:
        assert scores is not None  # refused with the options
        check_depth(args.layers, len(next(iter(scores.values()))))
        _print(Plan(scores, args.metric, args.beta, args.layers or 0), args.json)
        return 0
    if args.context <= WINDOW:
        raise ConfigError(f"--context {args.context}: expected more than the {WINDOW} queries of query similarity")
    depth, dtype = _shape(args.model, args.dtype)
    check_depth(args.layers, depth)
    if scores is not None and (scored := len(next(iter(scores.values())))) != depth:
        raise DataError(f"--scores are of a model with {scored} layers: {args.model} has {depth}")
    if scores is not None:
        if scores_of is not None and Path(scores_of).name != Path(args.model).name:
            logger.warning(f"--scores are of {scores_of!r}, --model is {args.model!r}")
        for metric in METRICS if args.sweep is not None else (args.metric,):
            importance(scores, metric, args.beta)  # a missing score is reported before anything loads
    tokenizer = load_tokenizer(args.model)
    texts = None if scores is not None else _texts("--data", args.data, tokenizer, args)
    evaluated_texts = None if args.sweep is None else _texts("--sweep", args.sweep, tokenizer, args)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)  # or it would be found out when the layers are scored
    model = load_model(args.model, args.device, args.dtype)
    settings = {name: getattr(args, name) for name in ("model", "data", "documents", "context")}
    if texts is not None:
        with Progress("scoring layers", len(texts), "documents") as progress:
            scores = measure(model, texts, progress.update)
    else:
        settings |= {"data": None, "scores": [str(path) for path in args.scores], SCORES_OF: scores_of}
    assert scores is not None
    plan = Plan(scores, args.metric, args.beta, args.layers)
    write_atomically(args.out / SCORES, json_bytes({"settings": settings} | plan.to_dict(), indent=1))
    if evaluated_texts is not None:
        orders = make_orders(scores, args.beta, args.seeds, depth)
        total = sum(map(len, orders.values())) * (args.layers + 1)
        with Progress("perplexity", total, "models") as progress:
            sweep = Sweep.run(model, evaluated_texts, orders, args.layers, progress.update)
        found = {"settings": settings | {"sweep": args.sweep}, "orders": orders} | sweep.to_dict()
        write_atomically(args.out / SWEEP, json_bytes(found, indent=1))
        print(sweep.table())
        if args.plot is not None:
            sweep.plot(args.plot, f"Perplexity of {Path(args.model).name} without some of its layers")
    else:
        with without_layers(model, plan.removed) as pruned:
            save(pruned, tokenizer, args.out, dtype or model.dtype)
        _print(plan, args.json)
    return 0


def _shape(model: str | None, dtype: str) -> tuple[int, torch.dtype | None]:
    """Number of layers, and the dtype to save in: ``--dtype`` or the model's own."""
    config = load_config(model, "a configuration from")
    depth = config.get_text_config(decoder=True).num_hidden_layers
    wanted = DTYPES.get(dtype)
    return depth, wanted if isinstance(wanted, torch.dtype) else config.dtype


def _texts(option: str, source: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of as many documents as are long enough; ``DataError`` if none is."""
    check_context(args.model, args.context)
    start = opening(tokenizer)
    documents = read_documents(source, per_file=1, limit=args.documents)
    found = [start + window(document, tokenizer, args.context - len(start)) for document in documents]
    long = [ids for ids in found if len(ids) == args.context]
    if not long:
        raise DataError(f"{option} {source}: no document has {args.context} tokens (--context)")
    if short := len(found) - len(long):
        print(f"{option}: {short} of {len(found)} documents have fewer than {args.context} tokens and are skipped")
    return long


def _print(plan: Plan, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.to_dict()))
        return
    worth, columns = plan.importance, list(plan.scores.values())
    rows = [
        (str(place), str(layer), *map(_digits, (*(values[layer] for values in columns), worth[layer])), gone)
        for place, layer in enumerate(plan.order, 1)
        for gone in ["removed" if layer in plan.removed else ""]
    ]
    print(text_table(("place", "layer", *plan.scores, "importance", ""), rows))


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
