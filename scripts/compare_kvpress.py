"""Compare the baselines with kvpress: what each keeps of the same prompts, and what comes of it.

Prompts are LongBench's. For every method the table has

- *kept alike*: of the prompt's tokens that our first decoding step attends to, the share that kvpress keeps too, for
  each layer and KV head; their mean, and the least of all layers and heads;
- *nats*: of a token of the reference answer, decoded behind the prompt, a mean over all answers' tokens.

Ours comes twice: *by token*, with blocks of one token and what the method's paper always keeps, where both sides should
keep the same; and *as it is used*, in blocks of 16 with 64 tokens of sink and 64 recent.

The two sides run in two environments, since kvpress needs another transformers: this one, and one that the script makes
in OUT/kvpress-venv by pip, or that --kvpress-python names. What is done is not done again.

What differs, and stays:

- kvpress compresses once, behind the prompt, and keeps all that is generated beside the budget. Here the budget holds
  for all that a step attends to: by token it is larger by one, the token of the first step, and what is generated later
  takes the place of prompt tokens.
- As it is used, a block is kept for the sum of its tokens, sink and recent are kept besides, and the newest block is
  partly empty. This is all that makes SnapKV differ.
- StreamingLLM: 4 tokens of sink on kvpress's side, and by token; 64 as it is used.
- PyramidKV: here, as in its authors' code, a layer has the window and its share of the rest; in kvpress the window is
  within its share. There a budget with a top layer of less than the window (64 queries by default, 8 here and in the
  authors' scripts) falls back to SnapKV without a word. By token, upper layers keep up to 8 tokens more here. As it is
  used every layer has sink, recent and a block (144 tokens), so that a pyramid of a small budget is flat.
- H2O: its paper sums all attention that a key has had, and keeps the newest half of the budget. kvpress's press of
  observed attention (which it calls related) divides by the number of queries that could see the key, which favours
  the newest, and keeps no half. Ours sums over the last 1,024 queries of the prompt. Two methods, then.
- CAKE, TAPPA, Quest, LazyEviction: not in kvpress 0.5.5. Their likelihoods stand alone; that their choice is their
  paper's is for tests/test_baselines.py and tests/test_policy_steps.py to show.

example (2 cores, a model of 135M parameters: 4 minutes a prompt, most of it prefills):
  python scripts/compare_kvpress.py --model models/smollm2 --data longbench/ --budget 256 --out runs/kvpress

Suffixes: G KV heads, T tokens, Y layers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attention_predictor import AttentionPredictorError, OffloadConfig, attach
from attention_predictor.arguments import check_output
from attention_predictor.errors import ConfigError, DataError, one_line
from attention_predictor.eval.benchmarks.longbench.benchmark import LongBench
from attention_predictor.eval.benchmarks.longbench.data import open_source
from attention_predictor.eval.benchmarks.longbench.tasks import choose_tasks
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.gguf_file import is_gguf
from attention_predictor.loading import load_model, load_tokenizer
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policies import Step
from attention_predictor.reading import read_json
from attention_predictor.writing import json_bytes, write_atomically

REQUIRED = "kvpress==0.5.5"
AS_USED, BY_TOKEN, KVPRESS = "ours", "ours-by-token", "kvpress"  # folders of OUT
FULL = "full"


@dataclass(frozen=True)
class Method:
    """A policy and its counterpart.

    Attributes:
        press: kvpress's class and its settings beside the share; ``None`` where it has none.
        always: Sink and recent tokens of the paper.
    """

    press: tuple[str, dict[str, int]] | None = None
    always: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "snapkv": Method(("SnapKVPress", {"window_size": 32, "kernel_size": 5}), {"sink": 0, "recent": 32}),
    "pyramidkv": Method(("PyramidKVPress", {"window_size": 8, "kernel_size": 5, "beta": 20}), {"sink": 0, "recent": 8}),
    "streaming": Method(("StreamingLLMPress", {"n_sink": 4}), {"sink": 4, "recent": 0}),
    "h2o": Method(("ObservedAttentionPress", {}), {"sink": 0, "recent": 0}),
    "cake": Method(always={"sink": 0, "recent": 32}),
    "quest": Method(),  # pages are its definition
}


@dataclass(frozen=True)
class Found:
    """What came of one prompt: tokens kept, bool kept_YGT, and nats of the answer's tokens."""

    kept_YGT: Tensor | None
    nats: list[float]

    @classmethod
    def read(cls, file: Path) -> Found:
        return cls(**torch.load(file, weights_only=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="M", help="directory of a model, or a GGUF file")
    parser.add_argument("--data", required=True, metavar="DIR", help="LongBench's jsonl files, one a task")
    parser.add_argument("--tasks", default="qasper,multifieldqa_en,hotpotqa", metavar="T,…", help="default %(default)s")
    parser.add_argument("--limit", type=int, default=1, metavar="N", help="samples of each task (%(default)s)")
    parser.add_argument("--max-length", type=int, default=2000, metavar="N", help="tokens of a prompt (%(default)s)")
    parser.add_argument("--answer", type=int, default=32, metavar="N", help="tokens of an answer at most (%(default)s)")
    parser.add_argument("--budget", type=int, default=512, metavar="N", help="tokens kept (%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,…", help="default %(default)s")
    parser.add_argument("--kvpress-python", type=Path, metavar="FILE", help="Python that has kvpress (default: made)")
    parser.add_argument("--by-layer", action="store_true", help="also what is kept alike in each layer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    try:
        args = parser.parse_args()
        check_output("--out", args.out, folder=True)
        methods = _chosen(args.methods)
        args.model = directory_of(args.model, args.out / "model")
        rows = prepare(args, methods)
        model = load_model(args.model)
        for name in (FULL, *methods):
            for side, config in configs(name, args.budget).items():
                run_ours(model, config, rows, args.out / side / name)
        run_kvpress(args.kvpress_python or _own_environment(args.out / "kvpress-venv"), args.out)
        show(args, methods, rows)
    except AttentionPredictorError as error:
        print(f"compare_kvpress.py: {error}", file=sys.stderr)
        return 2
    return 0


def _chosen(names: str) -> dict[str, Method]:
    unknown = [name for name in names.split(",") if name not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {names}: {unknown[0]!r} is not known, expected some of {','.join(METHODS)}")
    return {name: METHODS[name] for name in names.split(",")}


# ---- what both sides are given ---------------------------------------------------------------------------------------


def directory_of(model: str, made: Path) -> str:
    """The model's directory; of a GGUF file one that is made, its weights in fp32: both sides can load that."""
    if not is_gguf(model):
        return model
    if not (made / "config.json").exists():
        loaded, tokenizer = load_model(model, dtype="float32"), load_tokenizer(model)
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config  # which an older transformers can't read
        tokenizer.save_pretrained(made)
        loaded.save_pretrained(made)
    return str(made)


def prepare(args: argparse.Namespace, methods: Mapping[str, Method]) -> list[dict[str, Any]]:
    """Write prompts and plan for kvpress, and give the prompts; what lies there must be of the same settings."""
    if args.limit < 1 or args.answer < 1:
        raise ConfigError(f"--limit {args.limit} --answer {args.answer}: expected 1 or more for each")
    for name in methods:
        configs(name, args.budget)  # refuses a budget that is too small
    rows = list(_prompts(args))
    for row in rows:
        if (tokens := len(row["prompt"])) <= args.budget:
            raise ConfigError(f"--budget {args.budget}: prompt {row['id']} has {tokens} tokens, expected more of them")
    presses = {name: method.press for name, method in methods.items() if method.press is not None}
    settings = {
        "model": str(Path(args.model).resolve()),
        "budget": args.budget,
        "prompts": [[row["id"], len(row["prompt"]), len(row["answer"])] for row in rows],
    }
    known = args.out / "settings.json"
    if known.exists() and (found := read_json(known)) != settings:
        name = next(key for key in settings if settings[key] != found.get(key))
        raise ConfigError(
            f"--out {args.out} has results of other settings: {name}={found.get(name)}, expected {settings[name]}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(known, json_bytes(settings))
    write_atomically(args.out / "prompts.jsonl", b"".join(json_bytes(row) + b"\n" for row in rows))
    write_atomically(args.out / "plan.json", json_bytes(settings | {"presses": presses}, indent=1))
    return rows


def _prompts(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tasks = choose_tasks(args.tasks, extended=False)
    tokenizer = load_tokenizer(args.model)
    chat = bool(getattr(tokenizer, "chat_template", None))
    benchmark = LongBench(tokenizer, open_source(args.data), tasks, chat=chat, max_length=args.max_length)
    for task in tasks:
        for number, sample in enumerate(islice(benchmark.samples(task), args.limit)):
            prompt, _ = benchmark.prompt_ids(task, sample, None)
            yield {
                "id": f"{task}-{number}",
                "prompt": prompt,
                "answer": benchmark.answer_ids(task, sample)[: args.answer],
            }


def configs(name: str, budget: int) -> dict[str, OffloadConfig | None]:
    """Our settings of a method, by the folder that its results go to."""
    if name == FULL:
        return {AS_USED: None}
    found: dict[str, OffloadConfig | None] = {AS_USED: OffloadConfig(policy=name, budget=budget)}
    if always := METHODS[name].always:
        found[BY_TOKEN] = OffloadConfig(policy=name, budget=budget + 1, block_size=1, **always)
    return found


# ---- our side --------------------------------------------------------------------------------------------------------


class FirstStep:
    """The tokens that a layer's first step attends to, kept_GT; the policy works as before."""

    def __init__(self, layer: TieredLayer, tokens: int) -> None:
        self.layer, self.tokens = layer, tokens
        self.kept_GT: Tensor | None = None
        self._observe = layer.policy.observe
        layer.policy.observe = self.observe  # type: ignore[method-assign]

    def observe(self, step: Step) -> None:
        """In place of the policy's own."""
        if self.kept_GT is None:
            block_GC = step.attended_BGC[0]
            self.kept_GT = block_GC.repeat_interleave(self.layer.block_size, -1)[:, : self.tokens].clone()
        self._observe(step)


def run_ours(model: PreTrainedModel, config: OffloadConfig | None, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """One file a prompt under these settings; ``None`` is the stock model."""
    for row in rows:
        file = out / f"{row['id']}.pt"
        if file.exists():
            continue
        if config is None:
            kept_YGT, nats = _answered(model, DynamicCache(config=model.config), row)
        else:
            with attach(model, config) as engine:
                kept_YGT, nats = _answered(model, engine.new_cache(), row)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        torch.save({"kept_YGT": kept_YGT, "nats": nats}, draft)
        draft.replace(file)
        print(f"{out.parent.name}: {out.name}, {row['id']}", file=sys.stderr, flush=True)


@torch.no_grad()
def _answered(model: PreTrainedModel, cache: Any, row: Mapping[str, Any]) -> tuple[Tensor | None, list[float]]:
    """Tokens kept of the prompt, and nats of each of the answer's."""
    prompt, answer = row["prompt"], row["answer"]
    logits_V = model(torch.tensor([prompt]), **with_cache(model, cache), logits_to_keep=1).logits[0, -1]
    first = [FirstStep(layer, len(prompt)) for layer in cache.layers if isinstance(layer, TieredLayer)]
    nats = []
    for place, token in enumerate(answer):
        nats.append(-float(logits_V.float().log_softmax(-1)[token]))
        if place + 1 < len(answer) or place == 0:  # one step at least, to see what it attends to
            logits_V = model(torch.tensor([[token]]), **with_cache(model, cache)).logits[0, -1]
    kept = [one.kept_GT for one in first if one.kept_GT is not None]
    return torch.stack(kept) if kept else None, nats


# ---- kvpress's side --------------------------------------------------------------------------------------------------


def _own_environment(folder: Path) -> Path:
    """Its Python; made, with kvpress in it, where there is none."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"making {folder} with {REQUIRED}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", REQUIRED, f"torch=={torch.__version__.split('+')[0]}"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            said = ran.stderr.strip().splitlines() or ["no reason given"]
            raise ConfigError(
                f"{REQUIRED} can't be installed ({said[-1]}): --kvpress-python names a Python that has it"
            )
        done.touch()
    return python


def run_kvpress(python: Path, out: Path) -> None:
    """Run ``kvpress_side.py`` there; its lines go to this one's standard error."""
    command = [str(python), str(Path(__file__).with_name("kvpress_side.py")), str(out / "plan.json")]
    try:
        ran = subprocess.run(command, check=False)
    except OSError as error:
        raise ConfigError(f"--kvpress-python {python}: {one_line(error)}") from error
    if ran.returncode:
        raise DataError(f"kvpress's side failed with exit code {ran.returncode}: see above")


# ---- what comes of it ------------------------------------------------------------------------------------------------


def alike(ours_YGT: Tensor, theirs_YGT: Tensor) -> Tensor:
    """Share of our tokens that are among theirs, by layer and KV head, fp64 ``[Y, G]``."""
    return (ours_YGT & theirs_YGT).sum(-1) / ours_YGT.sum(-1).clamp_min(1).double()


def show(args: argparse.Namespace, methods: Mapping[str, Method], rows: Sequence[dict[str, Any]]) -> None:
    """Print the tables, and write all of it to OUT/table.json."""

    def found(side: str, name: str) -> list[Found] | None:
        files = [args.out / side / name / f"{row['id']}.pt" for row in rows]
        return [Found.read(file) for file in files] if all(file.exists() for file in files) else None

    def nats(side: str, name: str) -> float | None:
        return None if (every := found(side, name)) is None else _mean([nat for one in every for nat in one.nats])

    table: dict[str, Any] = {FULL: {"nats": {side: nats(side, FULL) for side in (KVPRESS, AS_USED)}}}
    for name, method in methods.items():
        line: dict[str, Any] = {"nats": {side: nats(side, name) for side in (KVPRESS, BY_TOKEN, AS_USED)}, "alike": {}}
        for side in (BY_TOKEN, AS_USED):
            ours, theirs = found(side, name), found(KVPRESS, name) if method.press is not None else None
            if ours is not None and theirs is not None:
                shares = [alike(*pair) for pair in zip(_kept(ours), _kept(theirs), strict=True)]
                line["alike"][side] = torch.stack(shares).mean(0).tolist()
        table[name] = line
    versions = read_json(args.out / KVPRESS / "versions.json")
    write_atomically(args.out / "table.json", json_bytes({"versions": versions, "methods": table}, indent=1))
    tokens = [len(row["prompt"]) for row in rows]
    print(
        f"{len(rows)} prompts of {min(tokens):,} to {max(tokens):,} tokens, budget {args.budget}; kvpress "
        f"{versions['kvpress']}, transformers {versions['transformers']}"
    )
    print(text_table(*_lines(table)))
    if args.by_layer:
        print(text_table(*_layer_lines(table)))


def _kept(every: Sequence[Found]) -> list[Tensor]:
    return [one.kept_YGT for one in every if one.kept_YGT is not None]


def _lines(table: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Titles and rows: a method each."""
    rows = []
    for name, line in table.items():
        shares = [_share(line.get("alike", {}).get(side)) for side in (BY_TOKEN, AS_USED)]
        nats = [line["nats"].get(side) for side in (KVPRESS, BY_TOKEN, AS_USED)]
        rows.append([name, *shares, *(None if one is None else f"{one:.3f}" for one in nats)])
    return ["", "alike by token (least)", "as used (least)", "nats: kvpress", "by token", "as used"], rows


def _share(share_YG: list[list[float]] | None) -> str | None:
    if share_YG is None:
        return None
    every = [share for layer in share_YG for share in layer]
    return f"{_mean(every):.3f} ({min(every):.3f})"


def _layer_lines(table: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The same for what is kept alike: a layer each, a method and a side a column."""
    columns = {
        f"{name}, {side}": share_YG for name, line in table.items() for side, share_YG in line.get("alike", {}).items()
    }
    layers = range(max((len(share_YG) for share_YG in columns.values()), default=0))
    rows = [[str(layer), *(_share([share_YG[layer]]) for share_YG in columns.values())] for layer in layers]
    return ["layer", *columns], rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
