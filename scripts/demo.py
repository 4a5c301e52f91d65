"""Three questions about a book, answered twice: with the whole KV cache, and with the cache in CPU memory.

The text is the beginning of Jules Verne's *Around the World in Eighty Days* (1873; public domain), in
`scripts/demo_text.txt`. Facts are planted in it that the model can't know otherwise. Both runs prefill the document;
questions and answers are then decoded token by token. The second run reads at most `--budget` tokens a step and KV
head: sink, recent, and the blocks that the predictor chose and fetched ahead.

example:
  python scripts/demo.py --budget 256
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from attention_predictor import OffloadConfig, attach
from attention_predictor.arguments import add_model_arguments, check_model_arguments
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.loading import load_model, load_tokenizer
from attention_predictor.offload.hf.versions import with_cache

TEXT = Path(__file__).with_name("demo_text.txt")
# Statement, its place in the document, a question, what the answer must say.
FACTS = (
    ((synthetic.kv_statement("amber falcon", 482913),), 0.2, synthetic.kv_question("amber falcon"), "482913"),
    ((synthetic.home_statement("Marta Keller", "Lisbon"),), 0.5, synthetic.home_question("Marta Keller"), "Lisbon"),
    (
        (synthetic.chain_statement("bruvolt", "kasimel"), synthetic.chain_statement("kasimel", "7351")),
        0.75,
        synthetic.chain_question("bruvolt"),
        "7351",
    ),
)


@dataclass
class Answer:
    text: str
    tokens: int
    seconds: float


def document() -> str:
    """The text with each statement as a paragraph of its own."""
    paragraphs = TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    for statements, place, _, _ in sorted(FACTS, key=lambda fact: -fact[1]):
        for offset, statement in enumerate(reversed(statements)):
            # Statements of one chain stand apart, so that each hop is a retrieval of its own.
            position = int(len(paragraphs) * (place - 0.3 * offset))
            paragraphs.insert(position, statement)
    return "".join(paragraph + synthetic.BREAK for paragraph in paragraphs)


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, question: str, limit: int = 24
) -> Answer:
    """Greedy decoding, one token a step from the question's first on; an answer ends with a blank line."""
    pending = tokenizer(question, add_special_tokens=False)["input_ids"]
    answered: list[int] = []
    started, steps = time.perf_counter(), 0
    while len(answered) < limit:
        token = torch.tensor([[pending.pop(0)]], device=model.device)
        logits = model(token, **with_cache(model, cache)).logits
        steps += 1
        if pending:
            continue
        pending = [int(logits[0, -1].argmax())]
        answered += pending
        if "\n" in tokenizer.decode(pending):
            break
    return Answer(tokenizer.decode(answered).strip(), steps, time.perf_counter() - started)


def ask_all(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, title: str) -> list[Answer]:
    """Prefill once, then each question on a copy of that cache."""
    tokens = torch.tensor([tokenizer(document())["input_ids"]], device=model.device)
    with torch.no_grad(), tqdm(total=1 + len(FACTS), desc=title, leave=False, disable=None) as progress:
        model(tokens, **with_cache(model, cache), logits_to_keep=1)
        progress.update()
        answers = []
        for _, _, question, _ in FACTS:
            answers.append(answer(model, tokenizer, copy.deepcopy(cache), question))
            progress.update()
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--budget", type=int, default=512, help="tokens a step reads (%(default)s)")
    args = parser.parse_args()
    check_model_arguments(args)
    config = OffloadConfig(budget=args.budget)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, args.device, args.dtype)
    length = len(tokenizer(document())["input_ids"])
    print(f"A book of {length} tokens, with facts planted in it; {Path(args.model).name} on {model.device}.\n")

    full = ask_all(model, tokenizer, DynamicCache(config=model.config), "whole cache")
    with attach(model, config) as engine:
        offloaded = ask_all(model, tokenizer, engine.new_cache(), "cache in CPU memory")

    width = max(len(question.splitlines()[0]) for _, _, question, _ in FACTS)
    print(f"{'':{width}}  {'whole cache':28} cache in CPU memory, budget {args.budget}")
    for (_, _, question, _), one, two in zip(FACTS, full, offloaded, strict=True):
        print(f"{question.splitlines()[0]:{width}}  {one.text:28} {two.text}")
    rates = [sum(a.tokens for a in answers) / sum(a.seconds for a in answers) for answers in (full, offloaded)]
    print(f"{'tokens/s':{width}}  {rates[0]:<28.1f} {rates[1]:.1f}\n")
    print(engine.stats)
    wrong = [fact[3] for fact, one in zip(FACTS, offloaded, strict=True) if not one.text.endswith(fact[3])]
    if wrong:
        print(f"\nNot found with the cache in CPU memory: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
