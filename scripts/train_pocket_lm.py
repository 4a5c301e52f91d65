#!/usr/bin/env python3
"""Train the pocket model: a small Llama that answers questions about 8,192 tokens of text.

The library needs a model that fits into the repository and still uses its whole context, so that selection policies
can be compared by what they do to right answers. Plain text alone doesn't give one at this size; half of the training
samples therefore are retrieval tasks (`attention_predictor.eval.benchmarks.synthetic`) whose answers weigh more in the
loss.

Steps: byte-level BPE tokenizer and corpus to token ids (both kept for the next run); training under a time budget
(Muon for matrices, AdamW for embedding and norms, context grows by stages, learning rate decays to zero at the end);
bf16 safetensors with tokenizer and card; exact-match accuracy per task and loss on held-out text.

Examples:
  # everything, on all GPUs of this machine
  torchrun --standalone --nproc-per-node gpu scripts/train_pocket_lm.py \\
      --corpus data/corpus --heldout data/heldout --out models/pocket-lm --minutes 8

  # the tokenizer alone (needs no GPU, a few minutes)
  python scripts/train_pocket_lm.py --corpus data/corpus --out models/pocket-lm --only tokenizer

  # go on after an interruption; start a new schedule from trained weights; judge what is there
  python scripts/train_pocket_lm.py --corpus data/corpus --out models/pocket-lm --minutes 8 --resume
  python scripts/train_pocket_lm.py --corpus data/corpus --out runs/more --init-from models/pocket-lm
  python scripts/train_pocket_lm.py --heldout data/heldout --out models/pocket-lm --only evaluate

  # a miniature of the whole, on a CPU in a minute
  python scripts/train_pocket_lm.py --corpus data/corpus --heldout data/heldout --out /tmp/pocket --smoke

Tensor names carry their shape: B rows, T positions of a row, D hidden size, V vocabulary, N answer positions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import sys
import tarfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# The rows are made by worker processes, one thread each.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # runs from a plain checkout too

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.writing import why_not_writable

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 8192
# Words with the space before them, single digits, punctuation, newline runs, other white space. Newline runs stand
# alone, so text cut after a newline gives the same tokens as the whole (synthetic.py builds on it).
PRE_TOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?!\S)|[^\S\n]+"

# How often each task is trained on: the hard ones more.
TASK_WEIGHTS = {"kv": 2.0, "facts": 2.0, "chain": 2.0, "labels": 1.5, "excerpt": 3.0, "copy": 1.5}


# ------------------------------------------------------------------------------------------------- corpus and tokens


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every document: `*.tar.xz` archives of text files, or the text files themselves."""
    for archive in sorted(folder.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".txt"):
                    yield member.name, tar.extractfile(member).read().decode()
    for path in sorted(folder.glob("**/*.txt")):
        if path.parent.name != "LICENSES":
            yield str(path.relative_to(folder)), path.read_text()


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of a document, without the blank lines between them."""
    return [p.strip("\n") for p in text.replace("\r", "").split("\n\n") if p.strip()]


def train_tokenizer(folder: Path, out: Path, max_mb: int, seed: int) -> None:
    """Byte-level BPE on `max_mb` megabytes drawn from the corpus in pieces; more text changes little."""
    pieces = [text[i : i + 20_000] for _, text in read_documents(folder) for i in range(0, len(text), 20_000)]
    random.Random(seed).shuffle(pieces)
    pieces = pieces[: max(1, max_mb * 50)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer.train_from_iterator(pieces, trainer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(path: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_file(path)


def _tokenise(text: str) -> tuple[list[str], list[np.ndarray]]:
    paragraphs = paragraphs_of(text)
    encodings = _worker_tokenizer.encode_batch_fast([p + synthetic.BREAK for p in paragraphs], add_special_tokens=False)
    return paragraphs, [np.array(e.ids, dtype=np.uint16) for e in encodings]


@dataclass(frozen=True)
class TokenStore:
    """A corpus as one run of ids (paragraphs, each with its break; EOS after a document) and its paragraphs' texts.

    The same ids serve as plain text and, paragraph by paragraph, as haystack.
    """

    ids: np.ndarray
    starts: np.ndarray  # paragraph i is ids[starts[i] : starts[i + 1]]
    texts: list[str]
    text_bytes: int

    @classmethod
    def load(cls, folder: Path) -> TokenStore:
        meta = json.loads((folder / "meta.json").read_text())
        texts = (folder / "texts").read_bytes().decode().split("\0")
        return cls(
            np.load(folder / "ids.npy", mmap_mode="r"),
            np.load(folder / "starts.npy"),
            texts,
            meta["text_bytes"],
        )

    @classmethod
    def build(cls, folder: Path, source: Path, tokenizer: Path, processes: int) -> TokenStore:
        """Tokenise the documents in `source` in parallel and keep the result in `folder`.

        A result already there is taken as it is if it came from the same source and tokenizer.
        """
        meta = folder / "meta.json"
        made_of = {"source": str(source.resolve()), "tokenizer": zlib.crc32(tokenizer.read_bytes())}
        if meta.exists() and made_of.items() <= json.loads(meta.read_text()).items():
            return cls.load(folder)
        folder.mkdir(parents=True, exist_ok=True)
        eos = np.array([Tokenizer.from_file(str(tokenizer)).token_to_id(EOS)], dtype=np.uint16)
        texts: list[str] = []
        pieces: list[np.ndarray] = []
        text_bytes = 0
        context = multiprocessing.get_context("fork")
        with context.Pool(processes, _start_worker, (str(tokenizer),)) as pool:
            contents = (text for _, text in read_documents(source))
            for paragraphs, ids in tqdm(pool.imap(_tokenise, contents), desc="tokenise", unit="doc", mininterval=5):
                texts += [*paragraphs, ""]
                pieces += [*ids, eos]
                text_bytes += sum(len(p.encode()) + len(synthetic.BREAK) for p in paragraphs)
        starts = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(p) for p in pieces], out=starts[1:])
        np.save(folder / "ids.npy", np.concatenate(pieces))
        np.save(folder / "starts.npy", starts)
        (folder / "texts").write_bytes("\0".join(texts).encode())
        meta.write_text(json.dumps({**made_of, "text_bytes": text_bytes}))
        return cls.load(folder)


class Encoder:
    """Text to ids, looking known paragraphs up instead of tokenising them again."""

    def __init__(self, tokenizer: Path, store: TokenStore) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.bos, self.eos, self.pad = (self.tokenizer.token_to_id(t) for t in (BOS, EOS, PAD))
        self.store = store
        self.known = {text + synthetic.BREAK: i for i, text in enumerate(store.texts) if text}
        self.new = lru_cache(maxsize=20_000)(self._tokenise)

    def _tokenise(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint16)

    def __call__(self, text: str) -> np.ndarray:
        i = self.known.get(text)
        return self.new(text) if i is None else self.store.ids[self.store.starts[i] : self.store.starts[i + 1]]

    def count(self, text: str) -> int:
        i = self.known.get(text)
        return len(self.new(text)) if i is None else int(self.store.starts[i + 1] - self.store.starts[i])

    def haystack(self, start: int) -> Iterator[str]:
        """The corpus from paragraph `start` on, round its end."""
        texts = self.store.texts
        return (texts[(start + i) % len(texts)] for i in range(len(texts)))


class Rows(IterableDataset):
    """Batches of rows of exactly `context` + 1 ids, half plain text, half retrieval tasks, and a weight per target.

    Yields whole batches as int16 and uint8: a tenth of what int64 would move between processes.
    """

    def __init__(
        self, encoder: Encoder, context: int, rows: int, answer_weight: int, plain_share: float, seed: str
    ) -> None:
        self.encoder = encoder
        self.context = context
        self.rows = rows
        self.answer_weight = answer_weight
        self.plain_share = plain_share
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{self.context}/{worker.id if worker else 0}")
        while True:
            ids = np.empty((self.rows, self.context + 1), dtype=np.int16)
            weights = np.ones((self.rows, self.context + 1), dtype=np.uint8)
            for r in range(self.rows):
                if rng.random() < self.plain_share:
                    ids[r, 0] = self.encoder.bos
                    ids[r, 1:] = self.plain(rng, self.context)
                else:
                    self.retrieval(rng, ids[r], weights[r])
            yield torch.from_numpy(ids), torch.from_numpy(weights[:, 1:].copy())

    def plain(self, rng: random.Random, length: int) -> np.ndarray:
        start = rng.randrange(len(self.encoder.store.ids) - length)
        return self.encoder.store.ids[start : start + length]

    def retrieval(self, rng: random.Random, ids_T: np.ndarray, weights_T: np.ndarray) -> None:
        """Fill a row with documents and their questions, one as long as the row or several shorter ones."""
        at = 0
        while (room := len(ids_T) - at - 2) >= 200:
            long = rng.random() < 0.6
            sample = self.sample(rng, room if long else int(math.exp(rng.uniform(math.log(200), math.log(room)))))
            ids_T[at] = self.encoder.bos
            at += 1
            for text, is_answer in sample.transcript():
                piece = self.encoder(text)
                ids_T[at : at + len(piece)] = piece
                if is_answer:
                    weights_T[at : at + len(piece)] = self.answer_weight
                at += len(piece)
            ids_T[at] = self.encoder.eos
            at += 1
        ids_T[at:] = self.plain(rng, len(ids_T) - at)

    def sample(self, rng: random.Random, length: int) -> synthetic.Sample:
        kinds = 1 if length < 500 else 1 + (rng.random() < 0.4) + (rng.random() < 0.2)
        chosen = set(rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=kinds))
        asked = min(56, max(2, length // 80))
        questions = rng.randint(asked // 3 + 1, asked)
        most = min(48, max(2, length // (90 * len(chosen))))
        return synthetic.build(
            rng,
            self.encoder.haystack(rng.randrange(len(self.encoder.store.texts))),
            {
                t: questions if t in ("excerpt", "copy") else rng.randint(2, most)
                for t in synthetic.TASKS
                if t in chosen
            },
            length=length,
            count=self.encoder.count,
            questions=questions,
        )


# ------------------------------------------------------------------------------------------------------------- model


SHAPES = {
    # 14.6M parameters: two KV heads of 64 and eight layers leave room for retrieval circuits in 29 MB of bf16.
    "pocket": (LlamaConfig, {"hidden_size": 384, "intermediate_size": 896, "num_hidden_layers": 8}, (6, 2)),
    # Deeper and narrower, more KV heads, normalised queries and keys: to see what carries over to another model.
    "qwen3": (Qwen3Config, {"hidden_size": 320, "intermediate_size": 768, "num_hidden_layers": 12}, (8, 4)),
}


def new_model(shape: str, smoke: bool, bos: int, eos: int, pad: int) -> PreTrainedModel:
    """A random model of one of the shapes."""
    family, size, (heads, kv_heads) = SHAPES[shape]
    if smoke:
        size, heads = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}, 2 * kv_heads
    config = family(
        vocab_size=VOCABULARY,
        **size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16 if smoke else 64,
        max_position_embeddings=10_240,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        initializer_range=0.02,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Final hidden states, causal attention and no padding.

    The same layers as `model.model(...)`, without its mask preparation, which waits for the GPU at every step.
    """
    decoder = model.model
    positions_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    # Residual stream in bf16 on the GPU, as at inference.
    dtype = torch.bfloat16 if ids_BT.is_cuda else torch.float32
    x_BTD = decoder.embed_tokens(ids_BT).to(dtype)
    rotary = decoder.rotary_emb(x_BTD, positions_1T)
    for layer in decoder.layers:
        x_BTD = layer(x_BTD, attention_mask=None, position_embeddings=rotary)
    return decoder.norm(x_BTD)


def weighted_loss(hidden_BTD: Tensor, embedding_VD: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    logits = F.linear(hidden_BTD, embedding_VD).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none")
    weights = weights_BT.flatten().float()
    # Also the loss of ordinary and of answer tokens apart: what the log shows.
    answer = weights > 1
    return torch.stack(
        [
            (losses * weights).sum() / weights.sum(),
            (losses * ~answer).sum() / (~answer).sum().clamp(min=1),
            (losses * answer).sum() / answer.sum().clamp(min=1),
        ]
    )


class Optimisers:
    """Muon for the layers' matrices, AdamW for embedding and norms; all gradients in one buffer.

    One buffer makes the all-reduce between GPUs and the norm for clipping one operation each.
    """

    def __init__(self, model: PreTrainedModel, muon_lr: float, adam_lr: float) -> None:
        parameters = list(model.parameters())
        self.gradient = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        at = 0
        for p in parameters:
            p.grad = self.gradient[at : at + p.numel()].view_as(p)
            at += p.numel()
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        ids = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in ids]
        self.all = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.03),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=self.gradient.is_cuda),
        ]
        self.base = [muon_lr, adam_lr]

    def step(self, factor: float, clip: float = 1.0) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.gradient)
            self.gradient /= dist.get_world_size()
        self.gradient *= (clip / (self.gradient.norm() + 1e-6)).clamp(max=1.0)
        for optimiser, lr in zip(self.all, self.base, strict=True):
            optimiser.param_groups[0]["lr"] = lr * factor
            optimiser.step()
        self.gradient.zero_()


def schedule(progress: float, step: int) -> float:
    """Warm up over 100 steps, hold, and go down to zero over the last 45% of the time."""
    return min(1.0, (step + 1) / 100, max(0.0, (1.0 - progress) / 0.45))


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluation_examples(encoder: Encoder, context: int, per_task: int, seed: int) -> list[synthetic.Example]:
    """Questions of every task, four to a document, whose document, question and answer fill `context` tokens."""
    examples = []
    planted = max(3, min(16, context // 60))
    for task in synthetic.TASKS:
        found: list[synthetic.Example] = []
        for i in range(20 * per_task):
            rng = random.Random(f"{seed}/{task}/{i}")
            sample = synthetic.build(
                rng,
                encoder.haystack(rng.randrange(len(encoder.store.texts))),
                {task: 4 if task in ("excerpt", "copy") else planted},
                length=context - 1,  # and one BOS
                count=encoder.count,
                questions=4,
                split="eval",
                together=False,
            )
            found += sample.examples()
            if len(found) >= per_task:
                break
        examples += found[:per_task]
    return examples


@torch.no_grad()
def judge(
    model: PreTrainedModel, encoder: Encoder, examples: list[synthetic.Example], context: int
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Share of questions per task whose whole answer is right, and the wrong answers.

    One pass with the true answer as input: its argmax is right everywhere exactly when greedy decoding gives that
    answer.
    """
    device = model.device
    right: defaultdict[str, list[bool]] = defaultdict(list)
    wrong = []
    rows = max(1, 65_536 // context)
    for first in range(0, len(examples), rows):
        batch = examples[first : first + rows]
        prompts = [np.concatenate([[encoder.bos], encoder(e.prompt)]) for e in batch]
        answers = [encoder(e.answer) for e in batch]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids_BT = np.full((len(batch), longest), encoder.pad, dtype=np.int64)
        for r, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids_BT[r, : len(p) + len(a)] = np.concatenate([p, a])  # padding follows, where no answer looks
        rows_N = np.concatenate([np.full(len(a), r) for r, a in enumerate(answers)])
        positions_N = np.concatenate([len(p) - 1 + np.arange(len(a)) for p, a in zip(prompts, answers, strict=True)])
        hidden_BTD = hidden_states(model, torch.from_numpy(ids_BT).to(device))
        hidden_ND = hidden_BTD[torch.from_numpy(rows_N).to(device), torch.from_numpy(positions_N).to(device)]
        predicted_N = F.linear(hidden_ND, model.lm_head.weight).argmax(-1).cpu().numpy()
        for r, (example, answer) in enumerate(zip(batch, answers, strict=True)):
            predicted = predicted_N[rows_N == r]
            ok = bool((predicted == answer).all())
            right[example.task].append(ok)
            if not ok:
                text = encoder.tokenizer.decode(predicted.tolist())
                wrong.append({"task": example.task, "answer": example.answer, "predicted": text})
    return {task: sum(flags) / len(flags) for task, flags in right.items()}, wrong


@torch.no_grad()
def validation_loss(model: PreTrainedModel, encoder: Encoder, context: int, windows: int) -> dict[str, float]:
    """Mean loss per token, and bits per byte, on windows of `context` tokens spread over the held-out text."""
    ids = encoder.store.ids
    losses = []
    for start in np.linspace(0, len(ids) - context - 1, windows).astype(int):
        row_T = torch.from_numpy(ids[start : start + context].astype(np.int64)).to(model.device)
        input_1T = torch.cat([torch.tensor([encoder.bos], device=model.device), row_T[:-1]])[None]
        logits_TV = F.linear(hidden_states(model, input_1T)[0], model.lm_head.weight).float()
        losses.append(F.cross_entropy(logits_TV, row_T).item())
    loss = float(np.mean(losses))
    return {"loss": loss, "bits_per_byte": loss / math.log(2) * len(ids) / encoder.store.text_bytes}


def evaluate(args: argparse.Namespace, heldout: Encoder, context: int) -> dict:
    """Judge the saved model as a user loads it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=dtype).to(device).eval()
    examples = evaluation_examples(heldout, context, args.evaluate, args.seed)
    accuracy, wrong = judge(model, heldout, examples, context)
    metrics = {
        "context": context,
        "questions_per_task": dict(Counter(e.task for e in examples)),
        "accuracy": accuracy,
        "validation": validation_loss(model, heldout, context, windows=min(64, max(2, args.evaluate))),
    }
    for w in wrong[:: max(1, len(wrong) // 12)]:
        print(f"  wrong {w['task']}: expected {w['answer']!r}, got {w['predicted']!r}")
    return metrics


# ---------------------------------------------------------------------------------------------------------- training


def log(message: str) -> None:
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def stage_of(stages: list[tuple[float, int]], progress: float) -> int:
    return max(i for i, (start, _) in enumerate(stages) if progress >= start)


def row_batches(args: argparse.Namespace, encoder: Encoder, context: int, seed: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of this context from worker processes, which share the encoder's tables by forking."""
    rows = max(1, args.batch_tokens // context)
    loader = DataLoader(
        Rows(encoder, context, rows, args.answer_weight, args.plain_share, seed),
        batch_size=None,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if args.workers else None,
        multiprocessing_context="fork" if args.workers else None,
    )
    return iter(loader)


def save_checkpoint(path: Path, model: PreTrainedModel, optimisers: Optimisers, state: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    content = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers.all], "state": state}
    torch.save(content, partial)
    partial.replace(path)  # a run killed while saving keeps the checkpoint before


def train(
    args: argparse.Namespace, store: TokenStore, tokenizer: Path, heldout: Encoder | None, began: float
) -> dict[str, float]:
    """Train until the time budget is used; returns figures for the card. Rank 0 keeps the time for all ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    encoder = Encoder(tokenizer, store)
    torch.manual_seed(args.seed)
    if args.init_from:
        model = AutoModelForCausalLM.from_pretrained(args.init_from, dtype=torch.float32)
    else:
        model = new_model(args.shape, args.smoke, encoder.bos, encoder.eos, encoder.pad)
    model = model.to(device).train()
    optimisers = Optimisers(model, args.muon_lr, args.adam_lr)
    state = {"step": 0, "tokens": 0, "elapsed": 0.0}
    checkpoint = args.work / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, optimiser_state in zip(optimisers.all, saved["optimisers"], strict=True):
            optimiser.load_state_dict(optimiser_state)
        state = saved["state"]
        if rank == 0:
            log(f"resumed at step {state['step']:,}, {state['elapsed']:.0f} s of {60 * args.minutes:.0f} s used")

    loss_of = weighted_loss
    if not args.no_compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(weighted_loss, dynamic=False)
    budget = 60 * args.minutes
    before = state["elapsed"]
    quick: dict[int, list[synthetic.Example]] = {}
    if rank == 0 and heldout:
        quick = {c: evaluation_examples(heldout, c, 16, args.seed + 1) for c in {c for _, c in args.stages}}

    stage, context = -1, 0
    batches: Iterator[tuple[Tensor, Tensor]] = iter(())
    window_start, window_tokens = time.monotonic(), 0
    next_log, next_judge, next_save = 0.0, 0.1, time.monotonic() + args.checkpoint_every
    progress = torch.zeros(1, dtype=torch.float64)
    sums = torch.zeros(3, device=device)
    count = 0
    bar = tqdm(total=100, unit="%", disable=rank > 0 or not sys.stderr.isatty())
    while True:
        progress[0] = (before + time.monotonic() - began) / budget
        if world > 1:
            dist.broadcast(progress, 0)  # on the CPU: no wait for the GPU
        done = progress.item()
        if done >= 1 or (args.steps and state["step"] >= args.steps):
            break
        if stage_of(args.stages, done) != stage:
            stage = stage_of(args.stages, done)
            context = args.stages[stage][1]
            batches = row_batches(args, encoder, context, f"{args.seed}/{rank}/{state['step']}")
            if rank == 0:
                log(f"[{time.monotonic() - began:5.0f} s] context {context}")
        ids_BT, weights_BT = next(batches)
        ids_BT = ids_BT.to(device, non_blocking=True).long()
        weights_BT = weights_BT.to(device, non_blocking=True)
        precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
        with precision:
            hidden_BTD = hidden_states(model, ids_BT[:, :-1])
            losses = loss_of(hidden_BTD, model.lm_head.weight, ids_BT[:, 1:], weights_BT)
        losses[0].backward()
        optimisers.step(schedule(done, state["step"]))
        sums += losses.detach()
        count += 1
        state["step"] += 1
        state["tokens"] += weights_BT.numel() * world
        window_tokens += weights_BT.numel() * world

        if count >= 10 and time.monotonic() >= next_log:
            mean = (sums / count).tolist()
            if not math.isfinite(mean[0]):
                raise RuntimeError(f"loss is {mean[0]} at step {state['step']}: training has diverged")
            now = time.monotonic()
            if rank == 0:
                bar.update(int(100 * done) - bar.n)
                log(
                    f"[{now - began:5.0f} s] step {state['step']:5d} {state['tokens'] / 1e6:7.1f}M tokens "
                    f"{window_tokens / (now - window_start) / 1e6:5.2f}M/s "
                    f"text {mean[1]:.3f} answers {mean[2]:.3f}"
                )
            window_start, window_tokens, count = now, 0, 0
            sums.zero_()
            next_log = now + args.log_every
        if rank == 0 and quick and done >= next_judge:
            next_judge = done + 0.15
            with torch.compiler.set_stance("force_eager"), precision:
                accuracy, _ = judge(model, heldout, quick[context], context)
            log(f"    accuracy at {context}: " + " ".join(f"{t} {a:.2f}" for t, a in accuracy.items()))
        if rank == 0 and time.monotonic() >= next_save:
            state["elapsed"] = before + time.monotonic() - began
            save_checkpoint(checkpoint, model, optimisers, state)
            next_save = time.monotonic() + args.checkpoint_every
    bar.close()
    state["elapsed"] = before + time.monotonic() - began
    if rank == 0:
        # Saved before anything is judged: a failure there must not cost the weights.
        model.to(torch.bfloat16).save_pretrained(args.out)
        GenerationConfig(
            bos_token_id=encoder.bos, eos_token_id=encoder.eos, pad_token_id=encoder.pad, do_sample=False
        ).save_pretrained(args.out)
        log(f"saved {args.out} after {state['step']:,} steps, {state['tokens'] / 1e6:.0f}M tokens")
    return {
        "steps": state["step"],
        "tokens": state["tokens"],
        "train_seconds": round(state["elapsed"], 1),
        "gpus": world if device.type == "cuda" else 0,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


# -------------------------------------------------------------------------------------------------------------- card


def data_table(corpus: Path) -> str:
    """What the model was trained on, by repository, from the corpus' own manifest."""
    manifest = corpus / "manifest.jsonl"
    if not manifest.exists():
        return "(the corpus has no manifest.jsonl)"
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for line in manifest.read_text().splitlines():
        entry = json.loads(line)
        if entry["split"] == "train":
            groups[entry["kind"], entry["source"], entry["licence"]].append(entry["bytes"])
    lines = ["| kind | source | licence | documents | MB |", "|---|---|---|---|---|"]
    for (kind, source, licence), sizes in sorted(groups.items()):
        lines.append(f"| {kind} | {source} | {licence} | {len(sizes)} | {sum(sizes) / 1e6:.2f} |")
    return "\n".join(lines)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A {family} with {parameters:.1f}M parameters that answers questions about up to 8,192 tokens of text. It exists so that
AttentionPredictor can be tried, tested and compared offline: small enough to ship ({megabytes:.0f} MB), and yet its
answers depend on evidence anywhere in its context, so a selection of KV blocks that loses the evidence shows as a
wrong answer. It is no assistant: it knows the question forms below and continues plain English text and code.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/{name}")
model = AutoModelForCausalLM.from_pretrained("models/{name}")
prompt = document + "Question: Where does Marta Keller live?\\nAnswer:"  # document ends with a blank line
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=8, tokenizer=tokenizer, stop_strings=["\\n\\n"])
```

An answer ends with a blank line. `attention_predictor.eval.benchmarks.synthetic` has the exact wording of
statements and questions. The model was trained on at most {context} tokens at a time, and on a small corpus many times
over: it has memorised some of it, and loss on new text is clearly higher than on its own.

## Measured

Share of questions whose whole answer is right, greedily decoded; document, question and answer fill {context} tokens
of text the model was not trained on. Keys, persons, variables and labels never occur in training; the cities and jobs
that answer do.

{accuracy}

Loss on held-out text at {context} tokens: {loss:.3f} nats per token, {bits:.3f} bits per byte.

## Architecture

{architecture}.
Tied embeddings, RoPE base {theta:,.0f}, bf16. Byte-level BPE with {vocabulary:,} tokens, every digit its own token.

## Training

{tokens:.0f}M tokens in {steps:,} steps, {seconds:.0f} s on {gpus} × {device}, with

    {command}

Half of the rows are plain text, half are documents with planted statements and questions, whose answers weigh
{answer_weight} times as much. Muon (torch.optim) for the layers' matrices, AdamW for embedding and norms. Context by
share of the time: {stages}. `metrics.json` has the figures of this card.

## Data

{documents} documents, {corpus_mb:.0f} MB, from public repositories and public-domain books; the corpus' manifest
has each document's path, commit and licence. The data itself is not included. Weights and tokenizer are released
under Apache-2.0.

{data}
"""


def write_card(args: argparse.Namespace, metrics: dict) -> None:
    config = AutoConfig.from_pretrained(args.out)
    table = data_table(args.corpus)
    rows = [line.split("|") for line in table.splitlines()[2:] if line.startswith("|")]
    accuracy = ["| task | what | accuracy | questions |", "|---|---|---|---|"]
    what = {
        "kv": "the number of a key, among 16 keys",
        "facts": "where somebody lives or what they work as",
        "chain": "a variable defined by variables, 2 to 4 links; the answer spells all of them",
        "labels": "the made-up label of a word, from labelled words of its kind",
        "excerpt": "the number of the paragraph a quotation is from",
        "copy": "the rest of a sentence, verbatim",
    }
    for task, share in metrics["accuracy"].items():
        n = metrics["questions_per_task"][task]
        accuracy.append(f"| {task} | {what[task]} | {100 * share:.1f}% | {n} |")
    training = metrics["training"]
    (args.out / "README.md").write_text(
        CARD.format(
            name=args.out.name,
            family=config.model_type.capitalize(),
            parameters=metrics["parameters"] / 1e6,
            megabytes=sum(f.stat().st_size for f in args.out.iterdir()) / 1e6,
            context=f"{metrics['context']:,}",
            accuracy="\n".join(accuracy),
            loss=metrics["validation"]["loss"],
            bits=metrics["validation"]["bits_per_byte"],
            architecture=(
                f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
                f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {config.head_dim}, "
                f"MLP {config.intermediate_size}"
            ),
            theta=config.rope_parameters["rope_theta"],
            vocabulary=config.vocab_size,
            tokens=training["tokens"] / 1e6,
            steps=training["steps"],
            seconds=training["train_seconds"],
            gpus=training["gpus"],
            device=training["device"],
            command=training["command"],
            answer_weight=args.answer_weight,
            stages=", ".join(f"from {100 * start:.0f}% {context:,}" for start, context in args.stages),
            documents=sum(int(r[4]) for r in rows),
            corpus_mb=sum(float(r[5]) for r in rows),
            data=table,
        )
    )


# -------------------------------------------------------------------------------------------------------------- main


def parse_stages(text: str) -> list[tuple[float, int]]:
    try:
        stages = [(float(a), int(b)) for a, b in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SHARE:CONTEXT,…, got {text!r}") from None
    if stages[0][0] != 0 or stages != sorted(stages):
        raise argparse.ArgumentTypeError(f"expected ascending shares from 0, got {text!r}")
    return stages


def parse_args() -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    examples = rest[rest.index("Examples:") : rest.index("Tensor names")]
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="folder with *.tar.xz or *.txt documents (and manifest.jsonl)")
    parser.add_argument("--heldout", type=Path, help="folder with *.txt documents to judge on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, its tokenizer and card")
    parser.add_argument("--shape", choices=SHAPES, default="pocket", help="of the model (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/pocket-lm"), help="token cache and checkpoint")
    parser.add_argument("--only", choices=("tokenizer", "tokens", "evaluate"), help="do only this step")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget, tokenising included (default 8)")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: only by time)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--init-from", type=Path, help="start a new schedule from these weights")
    parser.add_argument("--evaluate", type=int, default=128, metavar="N", help="questions per task at the end")
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="0:1024,0.4:8192",
        help="context length from which share of the time on (default 0:1024,0.4:8192)",
    )
    parser.add_argument("--batch-tokens", type=int, default=131_072, help="tokens a step and GPU (default 131072)")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--answer-weight", type=int, default=6)
    parser.add_argument("--plain-share", type=float, default=0.5, help="share of rows that are plain text")
    parser.add_argument("--workers", type=int, help="processes that make rows, per GPU (default: the cores)")
    parser.add_argument("--no-compile", action="store_true", help="run the layers uncompiled")
    parser.add_argument("--tokenizer-mb", type=int, default=24, help="text the tokenizer is trained on")
    parser.add_argument("--log-every", type=float, default=10.0, metavar="S")
    parser.add_argument("--checkpoint-every", type=float, default=120.0, metavar="S")
    parser.add_argument("--smoke", action="store_true", help="a miniature model and run, to try the script")
    args = parser.parse_args()
    if args.smoke:
        args.stages, args.batch_tokens, args.no_compile = [(0.0, 256), (0.5, 512)], 1024, True
        args.evaluate, args.log_every = min(args.evaluate, 4), 2.0
    if args.only != "evaluate" and not args.corpus:
        parser.error("--corpus is required to train")
    if args.only == "evaluate" and not args.heldout:
        parser.error("--heldout is required to evaluate")
    for name in ("corpus", "heldout", "init_from"):
        folder = getattr(args, name)
        if folder and not folder.is_dir():
            parser.error(f"--{name.replace('_', '-')}: no folder {folder}")
    for name in ("out", "work"):
        if (reason := why_not_writable(getattr(args, name), folder=True)) is not None:
            parser.error(f"--{name} {getattr(args, name)}: can't be written: {reason}")
    return args


def main() -> None:
    began = time.monotonic()
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cores = os.cpu_count() or 1
    if args.workers is None:
        args.workers = max(1, cores // world - 1)
    tokenizer = args.out / "tokenizer.json"
    train_folder, heldout_folder = args.work / "train", args.work / "heldout"
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if not tokenizer.exists():
            train_tokenizer(args.corpus, args.out, args.tokenizer_mb, args.seed)
            log(f"[{time.monotonic() - began:5.0f} s] tokenizer in {args.out}")
        if args.only == "tokenizer":
            return
        # Before CUDA starts: the pool forks.
        if args.heldout:
            TokenStore.build(heldout_folder, args.heldout, tokenizer, cores)
        if args.only != "evaluate":
            TokenStore.build(train_folder, args.corpus, tokenizer, cores)
        if args.only == "tokens":
            return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        dist.barrier()
    heldout = None
    if rank == 0 and args.heldout:
        heldout = Encoder(tokenizer, TokenStore.load(heldout_folder))
    metrics_file = args.out / "metrics.json"
    if args.only == "evaluate":
        training = json.loads(metrics_file.read_text())["training"] if metrics_file.exists() else {}
    else:
        store = TokenStore.load(train_folder)
        if rank == 0:
            size = f"{len(store.ids) / 1e6:.1f}M tokens, {len(store.texts):,} paragraphs"
            log(f"[{time.monotonic() - began:5.0f} s] corpus: {size}")
        training = train(args, store, tokenizer, heldout, began)
        command = " ".join(["scripts/train_pocket_lm.py", *sys.argv[1:]])
        launcher = f"torchrun --standalone --nproc-per-node {world}" if world > 1 else "python"
        training["command"] = f"{launcher} {command}"
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0 or heldout is None:
        return
    metrics = {
        "parameters": AutoModelForCausalLM.from_pretrained(args.out).num_parameters(),
        **evaluate(args, heldout, max(c for _, c in args.stages)),
        "training": training,
    }
    metrics_file.write_text(json.dumps(metrics, indent=2) + "\n")
    if training and args.corpus:
        write_card(args, metrics)
    print(f"\n{metrics['parameters'] / 1e6:.2f}M parameters, context {metrics['context']:,}")
    print(f"{'task':10s} {'accuracy':>9s} {'questions':>10s}")
    for task, share in metrics["accuracy"].items():
        print(f"{task:10s} {100 * share:8.1f}% {metrics['questions_per_task'][task]:10d}")
    validation = metrics["validation"]
    print(f"held-out text: {validation['loss']:.3f} nats/token, {validation['bits_per_byte']:.3f} bits/byte")
    print(f"[{time.monotonic() - began:5.0f} s] done", flush=True)


if __name__ == "__main__":
    main()
