"""Which of transformers' causal language models can be attached: each type, small and random, against its stock self.

Each is built with a few layers, generates greedily in fp32 with its own cache, then attached with a budget that covers
the context: exact, or refused in one line. Then it decodes sparsely, and its cache is checked. Prints a table in
Markdown; exit code 1 if any type gives other tokens, or fails in any other way than by a line.

examples:
  python scripts/sweep_models.py                          # all types: about ten minutes on two cores
  python scripts/sweep_models.py llama gemma3_text mamba  # some
  python scripts/sweep_models.py --out docs/models.md
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from attention_predictor.writing import why_not_writable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PROMPT, NEW = 70, 12
SECONDS = 90  # that one type may take
LAYERS = 4
# What an attribute of a configuration becomes, where there is one of that name.
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim"), 8),
    "global_head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"), 512),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "n_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "intermediate_size_mlp"),
        32,
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "attention_window"), 24),
    "attention_chunk_size": 32,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_state_dim"), 8),
    "linear_num_key_heads": 2,
    "mamba_dt_rank": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "lru_width": 32,
    "altup_num_inputs": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    "num_kv_shared_layers": 1,
    "num_mtp_modules": 0,
    "query_pre_attn_scalar": 8,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Tried one after the other, until a type builds and generates; None leaves what the type has.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None, "sliding_window": None, "num_key_value_heads": None},
    {"head_dim": None, "num_attention_heads": None, "num_key_value_heads": None, "hidden_size": None},
)
# Hybrids that need to be told which layers attend, and other special wishes.
OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "nemotron_h": {"layers_block_type": ["full_attention", "mlp"] * 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "mistral": {"sliding_window": None},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "hidden_size": 32},
    **{
        f"{name}_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
        for name in ("glm4v", "glm_ocr", "qwen2_vl", "qwen2_5_vl")
    },
}


PREAMBLE = """# Models

Every model type of transformers that has a causal language model, or one for text and images: built small and random
by `scripts/sweep_models.py`, held attached against its stock self in fp32.

- *exact*: the same greedy tokens and logits with a budget that covers the context, and sparse steps run.
- *stock*: no layer attends to the whole context, so nothing is offloaded, and `engine.stats` says so.
- *refused*: one line, at attach or at the first forward.
- *not built*: the script could not make a small one.
"""


class Outcome(NamedTuple):
    """What came of one type: ``exact``, ``stock`` (nothing to offload), ``refused``, ``not built``, or a fault."""

    kind: str
    line: str
    layers: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types, such as llama (default: all)")
    parser.add_argument("--out", type=Path, metavar="F", help="file for the table (default: standard output)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="default %(default)s")
    args = parser.parse_args()
    if args.out is not None and (reason := why_not_writable(args.out)) is not None:
        parser.error(f"--out {args.out}: can't be written: {reason}")
    types = args.types or all_types()
    outcomes: dict[str, Outcome] = {}
    for name, outcome in in_processes(types, args.processes):
        outcomes[name] = outcome
        print(f"{len(outcomes)}/{len(types)} {name}: {outcome.kind} {outcome.line}", file=sys.stderr, flush=True)
    table = as_table({name: outcomes[name] for name in types})
    if args.out is not None:
        args.out.write_text(table, encoding="utf-8")
    else:
        print(table)
    return int(any(outcome.kind == "fault" for outcome in outcomes.values()))


def all_types() -> list[str]:
    """Every model type that has a causal language model, or one for text and images."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def in_processes(types: list[str], count: int) -> Iterator[tuple[str, Outcome]]:
    """What comes of each type, in a process of its own: none can hang or crash the others."""
    import torch
    import transformers  # noqa: F401  once, before processes are forked

    torch.set_num_threads(1)
    context, waiting = multiprocessing.get_context("fork"), list(types)
    running: dict[str, tuple[Any, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < count:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=lambda name, end: end.send(try_type(name)), args=(waiting[0], sender))
            process.start()
            sender.close()  # here: a process that dies is noticed by the end of its pipe
            running[waiting.pop(0)] = process, receiver, time.monotonic() + SECONDS
        multiprocessing.connection.wait([receiver for _, receiver, _ in running.values()], timeout=1)
        for name, (process, receiver, deadline) in list(running.items()):
            if not receiver.poll() and time.monotonic() < deadline:
                continue
            try:
                outcome = receiver.recv() if receiver.poll() else Outcome("not built", f"takes more than {SECONDS} s")
            except EOFError:
                outcome = Outcome("fault", "the process died")
            process.kill()
            process.join()
            del running[name]
            yield name, outcome


def try_type(name: str) -> Outcome:
    """Build a model of this type and hold it attached against itself."""
    import torch
    from transformers import AutoConfig

    warnings.simplefilter("ignore")
    prompt = torch.randint(3, 98, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    errors = []
    for change in CHANGES:
        small = {key: value for key, value in (SMALL | change).items() if value is not None}
        try:
            model = random_model(shrunk(AutoConfig.for_model(name, **OF_TYPE.get(name, {})), small))
            stock = generate(model, prompt)
        except Exception as error:  # whatever a type does not take
            errors.append(error)
        else:
            return compare(model, prompt, stock)
    return Outcome("not built", _first_line(errors[0]))


def shrunk(config: Any, small: dict[str, Any]) -> Any:
    """A configuration of the same class with the small values, in its parts too."""
    given = dict(OF_TYPE.get(config.model_type, {}))
    for key, value in config.to_dict().items():
        part = getattr(config, key, None) if key in config.sub_configs else None
        if part is not None:
            given[key] = shrunk(part, small)
        elif key in given:
            continue
        elif key in small and (value is not None or key in ("pad_token_id", "bos_token_id", "eos_token_id")):
            given[key] = min(small[key], value) if _both_numbers(small[key], value) else small[key]
        elif isinstance(value, list) and key in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
            given[key] = _few_of_each(value)
    return type(config)(**given)


def _both_numbers(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _few_of_each(kinds: list[str]) -> list[str]:
    """So many layers' kinds, each kind at least once."""
    each = list(dict.fromkeys(kinds))
    return (each + kinds)[:LAYERS] if len(each) > 1 else (kinds * LAYERS)[:LAYERS]


def random_model(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    if sum(parameter.numel() for parameter in model.parameters()) > 60_000_000:
        raise ValueError(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters with small settings")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # sharper attention and logits than at initialisation: ties would prove nothing
                parameter.mul_(3.0)
    if not model.can_generate():
        raise ValueError("can't generate")
    model.generation_config.eos_token_id = None
    return model.eval()


def generate(model: Any, prompt: Any) -> Any:
    import torch

    torch.manual_seed(0)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def compare(model: Any, prompt: Any, stock: Any) -> Outcome:
    """Hold the attached model against what the stock one gave."""
    import torch

    from attention_predictor import AttentionPredictorError, OffloadConfig, attach

    before = copy.deepcopy({key: value for key, value in vars(model).items() if not key.startswith("_")}).keys()
    try:
        with attach(model, OffloadConfig(predictor="ema")) as engine:
            ours = generate(model, prompt)
        tiered = len(engine.tiered_layers)
        layers = f"{tiered} of {model.config.get_text_config(decoder=True).num_hidden_layers}"
        gap = max(float((a - b).abs().max()) for a, b in zip(ours.logits, stock.logits, strict=True))
        if not torch.equal(ours.sequences, stock.sequences) or gap > 1e-3:
            return Outcome("fault", f"other tokens or logits (off by {gap:.2g})", layers)
        if not tiered:
            return Outcome("stock", "no full-attention layer", layers)
        if not engine.stats.host_kv_bytes:
            return Outcome("fault", "nothing was offloaded", layers)
        with attach(model, OffloadConfig(predictor="ema", budget=48, sink=16, recent=16)) as engine:
            out = generate(model, prompt)
            if not all(bool(logits.isfinite().all()) for logits in out.logits):
                return Outcome("fault", "logits of sparse steps are not finite", layers)
    except AttentionPredictorError as error:
        return Outcome("refused", _first_line(error))
    except Exception as error:
        return Outcome("fault", f"{type(error).__name__}: {_first_line(error)}")
    after = {key for key in vars(model) if not key.startswith("_")}
    if after != set(before) or not torch.equal(generate(model, prompt).sequences, stock.sequences):
        return Outcome("fault", "the model is not what it was before")
    return Outcome("exact", "", layers)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def as_table(outcomes: dict[str, Outcome]) -> str:
    """Markdown: counts, then a row a type."""
    import torch
    import transformers

    counts = Counter(outcome.kind for outcome in outcomes.values())
    summary = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
    rows = [
        PREAMBLE,
        f"transformers {transformers.__version__}, torch {torch.__version__}: {summary}.",
        "",
        "| type | outcome | layers offloaded | |",
        "|---|---|---|---|",
        *(
            f"| `{name}` | {outcome.kind} | {outcome.layers} | {outcome.line.replace('|', '/')} |"
            for name, outcome in outcomes.items()
        ),
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
