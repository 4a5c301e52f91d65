"""Wrap a model: continue a prompt with the stock model, then with the KV cache in CPU memory.

The prompt is the beginning of a novel, in scripts/demo_text.txt. With a budget of at least the context both continue it
with the same tokens; with a smaller one the second run attends to the blocks that the predictor chooses.

example:
  python examples/wrap_model.py --context 2048 --budget 512
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attention_predictor import OffloadConfig, attach

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "pocket-lm"), help="directory or hub name")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--budget", type=int, default=512, help="tokens a step attends to (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each answer (%(default)s)")
    args = parser.parse_args()
    config = OffloadConfig(budget=args.budget)  # refuses a budget that is not allowed, before anything is loaded

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    text = (ROOT / "scripts" / "demo_text.txt").read_text(encoding="utf-8")
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.context).to(device)
    context = inputs["input_ids"].shape[1]
    asked = {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}

    stock = model.generate(**inputs, **asked)[0, context:]
    with attach(model, config) as engine:
        offloaded = model.generate(**inputs, **asked)[0, context:]

    print(f"prompt of {context} tokens, budget {config.budget}")
    print("stock:    ", tokenizer.decode(stock))
    print("offloaded:", tokenizer.decode(offloaded))
    print(engine.stats)


if __name__ == "__main__":
    main()
