"""Record attention-score histories of a model, to train a predictor on.

Of a document's last tokens (--steps) the rows of block scores and the true block mass are kept, for every
full-attention layer and KV head. With --rows sparse, the default, all but the first 64 of them are decoded one by one
with a sparse cache, so that the rows are those a predictor sees at inference: exact where the step attended, estimated
from the key sketch elsewhere. With --rows full everything is attended, in one pass, as the published training does.

A .txt file gives up to --per-file documents from places spread over it. A row of a .jsonl or .parquet file, or of a
data set of the hub, gives one, whose end is kept when it is too long: that is where questions and answers stand.
Documents already recorded are skipped, so an interrupted run goes on.

examples:
  attnpred record --data texts/ --out runs/histories
  attnpred record --model meta-llama/Llama-3.1-8B --dtype bfloat16 --data prompts.jsonl --out runs/llama \\
      --max-tokens 32768 --budgets 512,1024
  attnpred record --data OWNER/NAME:test --documents 50 --out runs/books
  accelerate launch --num_processes 4 -m attention_predictor.cli record --data texts/ --out runs/histories
"""

from __future__ import annotations

import argparse
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from attention_predictor.loading import add_model_arguments, load_model, load_tokenizer
from attention_predictor.offload.attach import attach
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.dense import ScoreRows
from attention_predictor.offload.layer import TieredLayer
from attention_predictor.offload.policies import LayerSpec, Policy, Step, register
from attention_predictor.offload.policies.predictor import Predictor
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.predictor.errors import ConfigError, ContextLengthError, DataError
from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train.dataset import HistoryWriter
from attention_predictor.train.documents import read_documents, window
from attention_predictor.train.shards import Record

ROWS = ("sparse", "full")


@register
class FullRecorder(Policy):
    """Attends to everything and keeps the rows it is shown: recording is a policy that only watches."""

    name = "record-full"
    selects = "all"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.prompt_rows = spec.config.history
        self.shown: list[ScoreRows] = []

    def observe_rows(self, rows: ScoreRows) -> None:
        self.shown.append(rows)


@register
class SparseRecorder(Predictor):
    """Decodes as the predictor policy does; keeps the rows its history is told and, beside them, the true mass."""

    name = "record-sparse"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.prompt_rows = PROMPT_ROWS  # whatever the rule that selects makes use of
        self.prompt: list[ScoreRows] = []
        self.rows: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.last: Step | None = None

    def observe_rows(self, rows: ScoreRows) -> None:
        super().observe_rows(rows)
        self.prompt.append(rows)

    def row(self, step: Step) -> Tensor:
        row_BGN = super().row(step)
        self.rows.append(row_BGN[:, :, None])
        self.queries.append(step.query_BHD[:, :, None])
        self.last = step
        return row_BGN

    @property
    def shown(self) -> list[ScoreRows]:
        """Of the prompt's last queries and every step since."""
        if self.last is None:
            return self.prompt
        # The truth of all steps is read from host memory in one go.
        truth = self.last.true_rows(torch.cat(self.queries, dim=2))
        return [*self.prompt, ScoreRows(_joined(self.rows), truth.mass_BGQN)]


@torch.no_grad()
def record(model: PreTrainedModel, ids: list[int], steps: int, config: OffloadConfig) -> Iterator[Record]:
    """Records of the last ``steps`` tokens of one document, under one of the two recording policies."""
    prompt = len(ids) - steps + PROMPT_ROWS if config.policy == SparseRecorder.name else len(ids)
    with attach(model, config) as engine:
        if not engine.tiered_layers:
            raise ConfigError(f"{type(model).__name__} has no full-attention layer to record")
        cache = engine.new_cache()
        tokens = torch.tensor([ids], device=model.device)
        for part in tokens.split([prompt] + [1] * (len(ids) - prompt), dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            if not isinstance(layer, TieredLayer):
                continue
            assert isinstance(layer.policy, FullRecorder | SparseRecorder)
            shown = layer.policy.shown  # once: it reads all keys of the layer
            scores_GQN = _joined([rows.scores_BGQN[0] for rows in shown])
            mass_GQN = _joined([rows.mass_BGQN[0] for rows in shown])
            for head in range(layer.kv_heads):
                yield Record(
                    layer=layer.number,
                    head=head,
                    first_tokens=len(ids) - steps + 1,
                    scores_QN=scores_GQN[head],
                    mass_QN=mass_GQN[head],
                )


def _joined(rows: list[Tensor]) -> Tensor:
    """Rows one after the other; those from before a block existed have zeros for it."""
    blocks = rows[-1].shape[-1]
    return torch.cat([torch.nn.functional.pad(part, (0, blocks - part.shape[-1])) for part in rows], dim=-2)


def is_validation(group: str, share: float) -> bool:
    """Whether a group of documents is kept from training: by a hash, so that it is the same in every run."""
    return zlib.crc32(group.encode()) % 1000 < 1000 * share


def largest_size(model: PreTrainedModel, documents: int, max_tokens: int, steps: int, block_size: int) -> int:
    """Bytes that a recording may take on disk: scores and mass in fp16, before they are compressed."""
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * 2 * documents * config.num_hidden_layers * kv_heads * steps * -(-max_tokens // block_size)


def check_space(directory: Path, needed: int) -> None:
    """Say how large the recording may get; DataError if the disk has no room for it."""
    there = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(
            f"--out {directory}: the recording may take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
            "take fewer --documents, --steps or --max-tokens"
        )
    print(f"the recording takes at most {needed / 2**30:.2f} GiB in {directory} ({free / 2**30:.0f} GiB free)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="D", help=".txt, .jsonl or .parquet file, a directory, or owner/name:split"
    )
    parser.add_argument("--field", default="text", metavar="F", help="column of a row's text (%(default)s)")
    parser.add_argument("--documents", type=int, metavar="N", help="at most so many; needed for a data set of the hub")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the recording")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="tokens a document (%(default)s)")
    parser.add_argument("--steps", type=int, default=256, metavar="N", help="last tokens to record (%(default)s)")
    parser.add_argument("--rows", choices=ROWS, default="sparse", help="what a predictor is shown (%(default)s)")
    parser.add_argument("--predictor", default="ema", metavar="P", help="that selects for sparse rows (%(default)s)")
    parser.add_argument("--budgets", default="256,512", metavar="N,N", help="of sparse rows, in turn (%(default)s)")
    parser.add_argument("--per-file", type=int, default=4, metavar="N", help="documents a .txt file (%(default)s)")
    parser.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help="of the documents (%(default)s)")


def recording_configs(args: argparse.Namespace) -> list[OffloadConfig]:
    """Engine settings that documents are recorded under, in turn."""
    if args.rows == "full":
        return [OffloadConfig(policy=FullRecorder.name, history=args.steps, prefetch="none")]
    try:
        budgets = [int(text) for text in args.budgets.split(",")]
    except ValueError as error:
        raise ConfigError(f"--budgets {args.budgets!r}: expected numbers separated by commas") from error
    AttentionPredictor.from_pretrained(args.predictor)  # refused now, not when the model is loaded
    return [
        OffloadConfig(
            policy=SparseRecorder.name, predictor=args.predictor, budget=budget, late_fetch=0.0, prefetch="none"
        )
        for budget in budgets
    ]


def main(args: argparse.Namespace) -> int:
    if args.steps <= PROMPT_ROWS or args.per_file < 1 or not 0 <= args.validation < 1:
        raise ConfigError(
            f"expected --steps above {PROMPT_ROWS}, --per-file of at least 1 and --validation from 0 to below 1"
        )
    configs = recording_configs(args)
    defaults = configs[0]
    least = args.steps + defaults.sink + defaults.recent
    if args.max_tokens <= least:
        raise ConfigError(f"--max-tokens {args.max_tokens}: expected more than --steps + sink + recent = {least}")
    if args.documents is None and not Path(args.data).exists():
        raise DataError(
            f"--data {args.data}: no such file or directory; of a data set of the hub, say with --documents how much"
        )
    documents = list(read_documents(args.data, per_file=args.per_file, limit=args.documents, field=args.field))
    tokenizer = load_tokenizer(args.model)
    processes = PartialState(cpu=args.device == "cpu")
    if processes.num_processes > 1 and args.device != "cpu":
        args.device = str(processes.device)
    model = load_model(args.model, args.device, args.dtype)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and args.max_tokens > positions:
        raise ContextLengthError(f"--max-tokens {args.max_tokens}: the model has positions for {positions}")
    meta = {
        "block_size": defaults.block_size,
        "sink": defaults.sink,
        "recent": defaults.recent,
        "model": Path(str(args.model)).name,
        "data": Path(args.data).name,
        "max_tokens": args.max_tokens,
        "steps": args.steps,
        "rows": args.rows,
    }
    if args.rows == "sparse":
        meta |= {"predictor": str(args.predictor), "budgets": args.budgets}
    check_space(args.out, largest_size(model, len(documents), args.max_tokens, args.steps, defaults.block_size))
    writer = HistoryWriter(args.out, meta, part=processes.process_index)
    mine = list(enumerate(documents))[processes.process_index :: processes.num_processes]
    short = 0
    for number, document in tqdm(mine, desc="recording", unit="doc", disable=None):
        if writer.has(document.name):
            continue
        ids = window(document, tokenizer, args.max_tokens)
        if len(ids) <= least:
            short += 1
            continue
        split = "validation" if is_validation(document.group, args.validation) else "train"
        config = configs[number % len(configs)]
        writer.write(document.name, record(model, ids, args.steps, config), split=split)
    if short:
        print(f"{short} of {len(mine)} documents have no more than {least} tokens and were left out")
    if short == len(mine):
        raise DataError(f"no document of {args.data} has more than {least} tokens")
    return 0
