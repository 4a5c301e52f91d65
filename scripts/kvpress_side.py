"""What kvpress keeps of some prompts and how likely it makes the answers: the other side of ``compare_kvpress.py``.

That script runs this one, in an environment that has kvpress and its transformers and nothing of this project. All is
passed in files: PLAN.json says what to do, and every prompt under every press becomes one file of tensors. What is
there is not done again.

  python scripts/kvpress_side.py OUT/plan.json

A press compresses the cache once, when the prompt is in it. The answer is then decoded token by token behind it, at the
positions that it would have had, and adds to the cache what it is: nothing more is dropped.

Suffixes: B sequences, G KV heads, T tokens, D head size, Y layers, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


class Noting(kvpress.BasePress):
    """Another press, and the tokens that it kept, by layer: kept_GT."""

    def __init__(self, press: Any) -> None:
        self.press, self.kept = press, {}

    def post_init_from_model(self, model: Any) -> None:
        self.press.post_init_from_model(model)

    def compress(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict) -> Any:
        # These presses look at no value: the tokens' numbers go through in their place.
        number_BGTD = torch.arange(keys.shape[2])[:, None].expand(keys.shape)
        keys_kept, number_BGTD = self.press.compress(module, hidden, keys, number_BGTD, attentions, kwargs)
        token_BGT = number_BGTD[..., 0]
        kept_BGT = torch.zeros(keys.shape[:3], dtype=torch.bool).scatter_(2, token_BGT, True)
        self.kept[module.layer_idx] = kept_BGT[0]
        return keys_kept, values.gather(2, token_BGT[..., None].expand(-1, -1, -1, values.shape[-1])).contiguous()


@torch.no_grad()
def answered(model: Any, press: Noting | None, prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """Tokens kept of the prompt, and nats of each of the answer's."""
    cache = DynamicCache(config=model.config)
    with press(model) if press is not None else nullcontext():
        logits_V = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
    nats = []
    for place, token in enumerate(answer):
        nats.append(-float(logits_V.float().log_softmax(-1)[token]))
        if place + 1 < len(answer):
            position = torch.tensor([[len(prompt) + place]])
            logits_V = model(torch.tensor([[token]]), past_key_values=cache, position_ids=position).logits[0, -1]
    kept = [] if press is None else [press.kept[layer] for layer in sorted(press.kept)]
    return {"kept_YGT": torch.stack(kept) if kept else None, "nats": nats}


def main() -> int:
    plan_file = Path(sys.argv[1])
    plan, out = json.loads(plan_file.read_text()), plan_file.parent / "kvpress"
    prompts = [json.loads(line) for line in (plan_file.parent / "prompts.jsonl").read_text().splitlines()]
    out.mkdir(exist_ok=True)
    versions = {"kvpress": version("kvpress"), "transformers": transformers.__version__, "torch": torch.__version__}
    (out / "versions.json").write_text(json.dumps(versions))
    transformers.utils.logging.disable_progress_bar()
    model, loaded = None, ""
    for name, (kind, settings) in {"full": (None, {}), **plan["presses"]}.items():
        for row in prompts:
            file = out / name / f"{row['id']}.pt"
            if file.exists():
                continue
            attention = "eager" if kind == "ObservedAttentionPress" else "sdpa"  # which needs all weights
            if model is None or attention != loaded:
                model = AutoModelForCausalLM.from_pretrained(
                    plan["model"], dtype=torch.float32, attn_implementation=attention
                ).eval()
                loaded = attention
            # Half a token more, lest rounding take one.
            ratio = 1 - (plan["budget"] + 0.5) / len(row["prompt"])
            press = None if kind is None else Noting(getattr(kvpress, kind)(compression_ratio=ratio, **settings))
            found = answered(model, press, row["prompt"], row["answer"])
            file.parent.mkdir(exist_ok=True)
            torch.save(found, file.with_suffix(".draft"))
            file.with_suffix(".draft").replace(file)
            print(f"kvpress: {name}, {row['id']}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
