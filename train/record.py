"""Record attention-score histories of a model, to train a predictor on.

Of a document's last tokens (--steps) the rows of block scores and the true block mass are kept, for every
full-attention layer and KV head. Where a row of the data names continuations, a list of texts such as questions with
their answers, each is recorded right behind the document by itself; 16 of them together cost one prefill.

With --rows sparse, the default, all but the first 64 steps are decoded one by one with a sparse cache, so that the rows
are those a predictor sees at inference: exact where the step attended, estimated from the key sketch elsewhere. With
--rows full everything is attended, in one pass, as the published training does.

A .txt file gives --per-file documents from places spread over it, fewer where these would be the same tokens. A row of
a .jsonl or .parquet file, or of a data set of the hub, gives one, whose end is kept when it is too long: that is where
questions and answers stand. Documents already recorded are skipped, so an interrupted run goes on.

examples:
  attnpred record --data texts/ --out runs/histories
  attnpred record --model meta-llama/Llama-3.1-8B --dtype bfloat16 --data prompts.jsonl --out runs/llama \\
      --max-tokens 32768 --budgets 512,1024
  attnpred record --data OWNER/NAME:test --documents 50 --out runs/books
  accelerate launch --num_processes 4 -m attention_predictor.cli record --data texts/ --out runs/histories
"""

from __future__ import annotations

import argparse
import zlib
from itertools import compress, groupby
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from attention_predictor.arguments import add_model_arguments, whole_numbers
from attention_predictor.documents import Document, Excerpt, excerpt, read_documents
from attention_predictor.loading import load_model, load_tokenizer
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.forwards import check_positions
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.predictor.errors import ConfigError, DataError
from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train.dataset import HistoryWriter
from attention_predictor.train.estimate import check_space, in_words, largest_size, seconds_a_document
from attention_predictor.train.recorder import FullRecorder, SparseRecorder, attach_recorder, record

ROWS = ("sparse", "full")
SAMPLE = 4  # documents that the estimate of time is made from


def is_validation(group: str, share: float) -> bool:
    """Whether a group of documents is kept from training: by a hash, so that it is the same in every run."""
    return zlib.crc32(group.encode()) % 1000 < 1000 * share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="D", help=".txt, .jsonl or .parquet file, a directory, or [owner/]name:split"
    )
    parser.add_argument("--field", default="text", metavar="F", help="column of a row's text (%(default)s)")
    parser.add_argument("--documents", type=int, metavar="N", help="at most so many; needed for a data set of the hub")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the recording")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="tokens a document (%(default)s)")
    parser.add_argument("--steps", type=int, default=256, metavar="N", help="last tokens to record (%(default)s)")
    parser.add_argument("--rows", choices=ROWS, default="sparse", help="what a predictor is shown (%(default)s)")
    parser.add_argument("--predictor", default="ema", metavar="P", help="that selects for sparse rows (%(default)s)")
    parser.add_argument("--budgets", default="256,512", metavar="N,N", help="of sparse rows, in turn (%(default)s)")
    parser.add_argument("--per-file", type=int, default=4, metavar="N", help="documents of a .txt file (%(default)s)")
    what = "of the .txt files and rows, chosen by a hash of their names, kept from training (%(default)s)"
    parser.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help=what)


def recording_configs(args: argparse.Namespace) -> list[OffloadConfig]:
    """Engine settings that documents are recorded under, in turn."""
    if args.rows == "full":
        return [OffloadConfig(policy=FullRecorder.name, history=args.steps, prefetch="none")]
    budgets = whole_numbers("--budgets", args.budgets)
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
    if not documents:
        raise DataError(f"--data {args.data}: holds no document")
    tokenizer = load_tokenizer(args.model)
    processes = PartialState(cpu=args.device == "cpu")
    if processes.num_processes > 1 and args.device != "cpu":
        args.device = str(processes.device)
    model = load_model(args.model, args.device, args.dtype)
    attach_recorder(model, defaults).detach()  # refused now, before anything is written
    check_positions(model.config.get_text_config(decoder=True), args.max_tokens)
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
    writer = HistoryWriter(args.out, meta, part=processes.process_index)
    missing = [not writer.has(document.name) for document in documents]
    sequences = sum(len(document.continuations) or 1 for document in compress(documents, missing))
    space = check_space(args.out, largest_size(model, sequences, args.max_tokens, args.steps, defaults.block_size))
    mine = range(len(documents))[processes.process_index :: processes.num_processes]
    left = [number for number in mine if missing[number]]
    # Budgets take turns within a file and from one to the next: of a short file only the first document is recorded.
    files = groupby(documents, key=lambda document: document.group)
    turns = [number + part for number, (_, same) in enumerate(files) for part, _ in enumerate(same)]

    def taken(document: Document) -> Excerpt | None:
        found = excerpt(document, tokenizer, args.max_tokens, args.steps - PROMPT_ROWS)
        return found if len(found.prompt) > PROMPT_ROWS + defaults.sink + defaults.recent else None

    def is_repeat(number: int, found: Excerpt) -> bool:
        # Places ascend within a file, so that what is taken twice is taken twice in a row.
        before = documents[max(number - 1, 0)]
        return number > 0 and before.group == documents[number].group and taken(before) == found

    sample = [found for number in left[:: len(left) // SAMPLE + 1] if (found := taken(documents[number])) is not None]
    if sample and processes.is_main_process:
        time = in_words(len(left) * seconds_a_document(model, sample, defaults))
        print(f"recording {sum(missing)} documents: {space}, {time} on {model.device.type}")
    short = repeats = 0
    for number in tqdm(left, desc="recording", unit="doc", disable=None):
        document = documents[number]
        found = taken(document)
        if found is None:
            short += 1
            continue
        if is_repeat(number, found):
            repeats += 1
            continue
        split = "validation" if is_validation(document.group, args.validation) else "train"
        records = record(model, found, configs[turns[number] % len(configs)])
        writer.write(document.name, records, split=split, group=document.group)
    if short:
        print(f"{short} of {len(mine)} documents have no more than {least} tokens and were left out")
    if repeats:
        print(f"{repeats} of {len(mine)} documents repeat another one of their file and were left out")
    if short == len(mine) and processes.num_processes == 1:  # of several, another one may have longer documents
        raise DataError(f"no document of {args.data} has more than {least} tokens")
    return 0
