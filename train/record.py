"""``attnpred record``: record attention-score histories of a model, document by document.

Processes of a launcher share the documents, or divide the model (``--tp``) and record every document together.
"""

from __future__ import annotations

import argparse
import zlib
from collections import deque
from contextlib import ExitStack
from itertools import compress, groupby
from pathlib import Path

import torch.distributed as dist

from attention_predictor.arguments import whole_numbers
from attention_predictor.documents import Document, Excerpt, excerpt, read_documents
from attention_predictor.errors import DataError
from attention_predictor.launcher import Launcher
from attention_predictor.loading import device_name, load_model, load_tokenizer
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.forwards import check_positions
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.progress import Progress
from attention_predictor.train.dataset import HistoryWriter
from attention_predictor.train.estimate import check_space, in_words, largest_size, seconds_a_document
from attention_predictor.train.recorder import FullRecorder, SparseRecorder, attach_recorder, record
from attention_predictor.writing import locked

SAMPLE = 4  # documents that the time estimate uses


def is_validation(group: str, share: float) -> bool:
    """Whether a group of documents is held out from training; by a hash, so it is the same in every run."""
    return zlib.crc32(group.encode()) % 1000 < 1000 * share


def recording_configs(args: argparse.Namespace) -> list[OffloadConfig]:
    """Engine settings for recording; documents use them in turn."""
    shape = {name: getattr(args, name) for name in ("block_size", "sink", "recent")}
    if args.rows == "full":
        least = args.sink + args.recent + args.block_size  # unused, as the recorder attends to everything, but checked
        return [
            OffloadConfig(
                policy=FullRecorder.name, history=args.steps, prefetch="none", budget=max(least, 1024), **shape
            )
        ]
    budgets = whole_numbers("--budgets", args.budgets)
    # Refuse bad input now, not after loading the model.
    AttentionPredictor.from_pretrained(args.predictor, block_size=args.block_size)
    sparse = {"policy": SparseRecorder.name, "predictor": args.predictor, "late_fetch": 0.0, "prefetch": "none"}
    return [OffloadConfig(budget=budget, **sparse, **shape) for budget in budgets]


def main(args: argparse.Namespace) -> int:
    launcher = Launcher()
    with ExitStack() as stack:
        if not args.tp:
            return _record(args, launcher, stack)
        stack.enter_context(launcher.as_one())
        code = _record(args, launcher, stack)
        if launcher.count > 1:
            dist.destroy_process_group()
        return code


def _record(args: argparse.Namespace, launcher: Launcher, stack: ExitStack) -> int:
    ranks = launcher.count if args.tp else 1  # the processes that divide the model
    part, parts = (0, 1) if args.tp else (launcher.rank, launcher.count)  # of the documents
    writes = launcher.is_main or not args.tp
    configs = recording_configs(args)
    defaults = configs[0]
    least = args.steps + defaults.sink + defaults.recent
    documents = list(read_documents(args.data, per_file=args.per_file, limit=args.documents, field=args.field))
    if not documents:
        raise DataError(f"--data {args.data}: holds no document")
    tokenizer = load_tokenizer(args.model)
    device = launcher.device(device_name(args.device)) if parts > 1 else device_name(args.device)
    model = load_model(args.model, device, args.dtype, ranks, args.device_map)
    attach_recorder(model, defaults).detach()  # refuse a bad model now, before anything is written
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
        "per_file": args.per_file,
        "validation": args.validation,
    }
    if args.rows == "sparse":
        meta |= {"predictor": str(args.predictor), "budgets": args.budgets}
    writer = HistoryWriter(args.out, meta, part=part)
    if launcher.is_main:
        stack.enter_context(locked(args.out))
    missing = [not writer.has(document.name) for document in documents]
    sequences = sum(len(document.continuations) or 1 for document in compress(documents, missing))
    space = check_space(args.out, largest_size(model, sequences, args.max_tokens, args.steps, defaults.block_size))
    mine = range(len(documents))[part::parts]
    left = [number for number in mine if missing[number]]
    # Budgets alternate within and across files, since only the first document of a short file is recorded.
    files = groupby(documents, key=lambda document: document.group)
    turns = [number + part for number, (_, same) in enumerate(files) for part, _ in enumerate(same)]

    def taken(document: Document) -> Excerpt | None:
        found = excerpt(document, tokenizer, args.max_tokens, args.steps - PROMPT_ROWS)
        return found if len(found.prompt) > PROMPT_ROWS + defaults.sink + defaults.recent else None

    def is_repeat(number: int, found: Excerpt) -> bool:
        # Positions ascend within a file, so repeated excerpts are adjacent.
        before = documents[max(number - 1, 0)]
        return number > 0 and before.group == documents[number].group and taken(before) == found

    if not any(missing) and launcher.is_main:
        print(f"all {len(documents)} documents are in {args.out}")
    sample = [found for number in left[:: len(left) // SAMPLE + 1] if (found := taken(documents[number])) is not None]
    if sample and (launcher.is_main or ranks > 1):
        time = in_words(len(left) * seconds_a_document(model, sample, defaults))
        print(f"recording {sum(missing)} documents: {space}, {time} on {model.device.type}")
    short = repeats = 0
    with Progress("recording", len(left), "documents", quiet=not writes) as progress:
        for number in left:
            document = documents[number]
            found = taken(document)
            if found is None:
                short += 1
            elif is_repeat(number, found):
                repeats += 1
            else:
                split = "validation" if is_validation(document.group, args.validation) else "train"
                records = record(model, found, configs[turns[number] % len(configs)])
                if writes:
                    writer.write(document.name, records, split=split, group=document.group)
                else:
                    deque(records, maxlen=0)  # computed for the process that writes them
            progress.update()
    if short:
        print(f"{short} of {len(mine)} documents have no more than {least} tokens and were left out")
    if repeats:
        print(f"{repeats} of {len(mine)} documents repeat another one of their file and were left out")
    if short == len(mine) and parts == 1:  # with several processes, another may have longer documents
        raise DataError(f"no document of {args.data} has more than {least} tokens")
    return 0
