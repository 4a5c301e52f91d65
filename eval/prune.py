"""Leave out the layers of a model that matter least, and save what is left as a model like any other.

Layers are scored on texts: block influence (bi), 1 - the cosine of a layer's input and output, and query similarity
(q_similarity), the mean cosine of a head's last 32 queries. --metric says what goes first: the least bi (ShortGPT),
the highest q_similarity (qsim), or the least of bi + beta (1 - q_similarity), both scaled to 0..1 (TAPPA).

--out gets weights, configuration, tokenizer and scores.json, which has all scores, the whole order and what was
removed. With --sweep no model is saved: perplexity on other texts without 1, 2, ... N layers, by every metric and by
random orders, goes to sweep.json (and to a plot).

examples:
  attnpred prune --model meta-llama/Llama-3.1-8B --data texts/ --layers 4 --metric tappa --beta 0.3 --out pruned
  attnpred prune --model M --layers 6 --scores pruned/scores.json --out pruned-6       # scored before
  attnpred prune --plan-only --scores pruned/scores.json --metric bi                    # the order alone, no model
  attnpred prune --data texts/ --layers 7 --sweep heldout/ --plot sweep.png --out runs/sweep
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerBase

from attention_predictor.arguments import add_model_arguments
from attention_predictor.documents import opening, read_documents, window
from attention_predictor.eval.plain_table import plain_table
from attention_predictor.eval.plot import check_plot
from attention_predictor.eval.prompts import context_length
from attention_predictor.eval.pruning.measure import measure
from attention_predictor.eval.pruning.plan import BETA, METRICS, Plan, Scores, check_depth, importance, read_scores
from attention_predictor.eval.pruning.shorten import save, without_layers
from attention_predictor.eval.pruning.sweep import Sweep, make_orders
from attention_predictor.loading import DTYPES, load_model, load_tokenizer
from attention_predictor.offload.query_similarity import WINDOW
from attention_predictor.predictor.errors import CheckpointError, ConfigError, DataError, one_line

SCORES, SWEEP = "scores.json", "sweep.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--layers", type=int, metavar="N", help="layers to remove; with --sweep: at most")
    add("--metric", default="tappa", help=f"one of {', '.join(METRICS)} (%(default)s)")
    add("--beta", type=float, default=BETA, metavar="B", help="weight of 1 - q_similarity in tappa (%(default)s)")
    add("--data", metavar="D", help="texts to score by: what attnpred record takes")
    add("--documents", type=int, default=16, metavar="N", help="of each data set, at most (%(default)s)")
    add("--context", type=int, default=2048, metavar="N", help="tokens of each document (%(default)s)")
    what = "file with scores in place of --data, such as scores.json; twice, if bi and q_similarity are apart"
    add("--scores", type=Path, action="append", default=[], metavar="F", help=what)
    add("--plan-only", action="store_true", help="print the order that --scores give, and stop")
    add("--json", action="store_true", help="print the plan as one JSON object")
    add("--sweep", metavar="D", help="texts to judge by: perplexity without 1 to N layers, by each order")
    add("--seeds", type=int, default=5, metavar="N", help="with --sweep: random orders (%(default)s)")
    add("--plot", type=Path, metavar="F", help="with --sweep: .png, .svg or .pdf")
    add("--out", type=Path, metavar="DIR", help="the pruned model and its scores, or the sweep")


def main(args: argparse.Namespace) -> int:
    scores: Scores | None = read_scores(args.scores) if args.scores else None
    _check(args, scores)
    if args.plan_only:
        assert scores is not None  # `_check` has refused it
        _print(Plan(scores, args.metric, args.beta, args.layers or 0), args.json)
        return 0
    depth, dtype = _shape(args.model, args.dtype)
    check_depth(args.layers, depth)
    if scores is not None and (scored := len(next(iter(scores.values())))) != depth:
        raise DataError(f"--scores are of a model with {scored} layers: {args.model} has {depth}")
    if scores is not None:
        for metric in METRICS if args.sweep is not None else (args.metric,):
            importance(scores, metric, args.beta)  # what they lack is said before anything loads
    tokenizer = load_tokenizer(args.model)
    texts = None if scores is not None else _texts("--data", args.data, tokenizer, args)
    judged = None if args.sweep is None else _texts("--sweep", args.sweep, tokenizer, args)
    model = load_model(args.model, args.device, args.dtype)
    settings = {name: getattr(args, name) for name in ("model", "data", "documents", "context")}
    if texts is not None:
        with tqdm(total=len(texts), desc="scoring layers", unit="doc", disable=None) as bar:
            scores = measure(model, texts, bar.update)
    else:
        settings |= {"data": None, "scores": [str(path) for path in args.scores]}
    assert scores is not None
    plan = Plan(scores, args.metric, args.beta, args.layers)
    _write(args.out / SCORES, {"settings": settings} | plan.to_dict())
    if judged is not None:
        orders = make_orders(scores, args.beta, args.seeds, depth)
        total = sum(map(len, orders.values())) * (args.layers + 1)
        with tqdm(total=total, desc="perplexity", unit="model", disable=None) as bar:
            sweep = Sweep.run(model, judged, orders, args.layers, bar.update)
        found = {"settings": settings | {"sweep": args.sweep}, "orders": orders} | sweep.to_dict()
        _write(args.out / SWEEP, found)
        print(sweep.table())
        if args.plot is not None:
            sweep.plot(args.plot, f"Perplexity of {Path(args.model).name} without some of its layers")
    else:
        with without_layers(model, plan.removed) as pruned:
            save(pruned, tokenizer, args.out, dtype or model.dtype)
        _print(plan, args.json)
    return 0


def _check(args: argparse.Namespace, scores: Scores | None) -> None:
    """Refuse what is wrong with the options alone."""
    if args.metric not in METRICS:
        raise ConfigError(f"--metric {args.metric}: expected one of {', '.join(METRICS)}")
    if not math.isfinite(args.beta) or args.beta < 0:
        raise ConfigError(f"--beta {args.beta}: expected a number from 0 on")
    if args.plan_only:
        if scores is None:
            raise ConfigError("--plan-only needs --scores: files with bi, q_similarity or both")
        check_depth(args.layers, len(next(iter(scores.values()))))
        return
    if args.layers is None:
        raise ConfigError("--layers is required: how many to remove")
    if args.out is None:
        raise ConfigError("--out is required: a directory for the result")
    if args.data is None and scores is None:
        raise ConfigError("--data or --scores is required: texts to score layers by, or their scores")
    for option, value in (("--documents", args.documents), ("--seeds", args.seeds)):
        if value < 1:
            raise ConfigError(f"{option} {value}: expected at least 1")
    if args.data is not None and scores is not None:
        raise ConfigError("--data and --scores: texts to score layers by, or their scores; give one")
    if args.context <= WINDOW:
        raise ConfigError(f"--context {args.context}: expected more than {WINDOW}, the queries that are compared")
    if (args.out / "config.json").exists():
        raise ConfigError(f"--out {args.out} holds a model already: choose another directory")
    if args.plot is not None and args.sweep is None:
        raise ConfigError("--plot draws what --sweep finds: give both")
    check_plot(args.plot)


def _shape(model: str | None, dtype: str) -> tuple[int, torch.dtype | None]:
    """How many layers a model has, and the dtype to save it in: its own unless another was asked for."""
    if model is None:
        raise ConfigError("--model is required: no pocket model beside this installation")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot load a configuration from {model!r}: {one_line(error)}") from error
    depth = config.get_text_config(decoder=True).num_hidden_layers
    wanted = DTYPES.get(dtype)
    return depth, wanted if isinstance(wanted, torch.dtype) else config.dtype


def _texts(option: str, source: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of as many documents as are long enough; ``DataError`` if none is."""
    longest = context_length(args.model)
    if longest is not None and args.context > longest:
        raise ConfigError(f"--context {args.context}: the model has positions for {longest} tokens")
    start = opening(tokenizer)
    documents = read_documents(source, per_file=1, limit=args.documents)
    found = [start + window(document, tokenizer, args.context - len(start)) for document in documents]
    long = [ids for ids in found if len(ids) == args.context]
    if not long:
        raise DataError(f"{option} {source}: no document has {args.context} tokens (--context)")
    if short := len(found) - len(long):
        print(f"{option}: {short} of {len(found)} documents have fewer than {args.context} tokens and are left out")
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
    print(plain_table(("place", "layer", *plan.scores, "importance", ""), rows))


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _write(path: Path, found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(found, indent=1), encoding="utf-8")
    draft.replace(path)
