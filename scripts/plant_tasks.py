"""Write documents with planted statements as .jsonl for `attnpred record`, questions and answers as continuations.

The names in them are those kept for training (`split="train"`), never those that evaluation asks about.

example:
  python scripts/plant_tasks.py --data texts/ --out runs/tasks.jsonl --documents 240
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attention_predictor.arguments import add_model_arguments, check_model_arguments
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.benchmarks.synthetic.documents import plant, read_texts
from attention_predictor.loading import load_tokenizer
from attention_predictor.writing import why_not_writable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="text to plant in: .txt file or directory")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    parser.add_argument("--tasks", default="kv,facts,chain,labels", help="default %(default)s")
    parser.add_argument("--documents", type=int, default=240, help="default %(default)s")
    parser.add_argument("--questions", type=int, default=8, help="a document (%(default)s)")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a document and a question (%(default)s)")
    args = parser.parse_args()
    if (reason := why_not_writable(args.out)) is not None:
        parser.error(f"--out {args.out}: can't be written: {reason}")
    check_model_arguments(args)
    samples = plant(
        load_tokenizer(args.model),
        read_texts(args.data),
        tasks=args.tasks.split(","),
        documents=args.documents,
        questions=args.questions,
        context=args.context,
        seed=args.seed,
        split="train",
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for sample in samples:
            continuations = [one.question + one.answer + synthetic.BREAK for one in sample.questions]
            row = {"text": sample.document, "continuations": continuations}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(samples)} documents in {args.out}")


if __name__ == "__main__":
    main()
