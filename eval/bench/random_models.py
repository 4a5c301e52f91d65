"""Models of a named shape with random weights, created on the device.

Random weights alone would give consecutive queries that are not similar, and thus an unrealistic reuse of blocks. In
trained models they are very similar (q-similarity: TAPPA, ICLR 2026, arXiv 2601.21709). So consecutive token ids get
similar embeddings here: the sum of a part common to all, a part that drifts slowly with the id, and a part of its own;
and the layers' contributions to the residual stream are kept small. Decode ids in order to get similar queries;
``synthetic_cache`` reports their similarity.

Suffixes: V ids, E hidden size.
"""

from __future__ import annotations

import argparse
import math

import torch
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from attention_predictor.eval.bench.named_shapes import SHAPES
from attention_predictor.loading import DTYPES, load_model, tensor_parallel_options
from attention_predictor.offload.hf.forwards import check_positions

# Shares of an embedding's variance; the rest is the token's own.
COMMON, DRIFTING = 0.5, 0.3
DRIFT_TOKENS = 64  # ids over which the drifting part becomes another one
BRANCH_SCALE = 0.25  # contribution of all attention and MLP layers, as a share of the embedding
ROWS = 8192  # embeddings made at once


def shape_config(name: str, positions: int) -> PreTrainedConfig:
    """The config of a named shape with at least ``positions`` positions."""
    kind, fields = SHAPES[name]
    config_class = getattr(transformers, kind)
    more = {"max_position_embeddings": max(positions, fields["max_position_embeddings"])}
    return config_class(**(fields | more), bos_token_id=None, eos_token_id=None, pad_token_id=None)


def random_or_loaded(args: argparse.Namespace, device: torch.device, tokens: int, ranks: int = 1) -> PreTrainedModel:
    """A random model of ``--shape``, or ``--model``, with positions for ``tokens`` tokens.

    Args:
        ranks: Processes of a launcher among which it is divided by tensor parallelism.
    """
    if args.shape is None:
        model = load_model(args.model, args.device, args.dtype, ranks)
        check_positions(model.config.get_text_config(decoder=True), tokens)
        return model
    dtype = DTYPES[args.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_model(shape_config(args.shape, tokens), device, dtype, args.seed, ranks)


def random_ids(model: PreTrainedModel, context: int, seed: int, *, batch: int = 1, first: int = 0) -> Tensor:
    """Random token ids ``[batch, context]`` from ``first`` on, the same in every sequence, on the model's device."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, vocabulary, (1, context), generator=generator).expand(batch, -1).to(model.device)


@torch.no_grad()
def random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0, ranks: int = 1
) -> PreTrainedModel:
    """A model with random weights, in evaluation mode; no weight is ever on another device.

    Args:
        ranks: Processes of a launcher among which it is divided by tensor parallelism. Each makes its own part.
    """
    torch.manual_seed(seed)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if ranks > 1:
            model = _divided_model(config, dtype, ranks)
        else:
            with device:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        logging.set_verbosity(verbosity)
    torch.manual_seed(seed)  # ranks have drawn different numbers of weights
    _relate_embeddings(model.get_input_embeddings().weight)
    quiet = BRANCH_SCALE / math.sqrt(2 * config.num_hidden_layers)
    for name, weight in model.named_parameters():  # Gemma 3 norms what its branches add: of variance 1 beside the width
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            weight.mul_(quiet)
    return model.eval()


def _divided_model(config: PreTrainedConfig, dtype: torch.dtype, ranks: int) -> PreTrainedModel:
    """This rank's part of a model with random weights."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # A checkpoint without weights: transformers makes those that are missing, each rank those of its part.
    return kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype, **tensor_parallel_options(ranks))


def _relate_embeddings(weight_VE: Tensor) -> None:
    """``_relate``; of embeddings that are divided among ranks, each has its part of the same ones."""
    mesh = getattr(weight_VE, "device_mesh", None)
    if mesh is None:
        _relate(weight_VE)
        return
    from torch.distributed.tensor import distribute_tensor  # importing it takes a while

    whole_VE = torch.empty(weight_VE.shape, dtype=weight_VE.dtype, device=weight_VE.device)
    _relate(whole_VE)
    weight_VE.copy_(distribute_tensor(whole_VE, mesh, weight_VE.placements))  # type: ignore[attr-defined]


def _relate(weight_VE: Tensor) -> None:
    """Embeddings of unit variance, similar for consecutive ids."""
    ids, width = weight_VE.shape
    own = math.sqrt(1 - COMMON - DRIFTING)
    common_E = torch.randn(width, device=weight_VE.device) * math.sqrt(COMMON)
    anchor_AE = torch.randn(ids // DRIFT_TOKENS + 2, width, device=weight_VE.device) * math.sqrt(DRIFTING)
    for part_VE, id_V in zip(
        weight_VE.split(ROWS), torch.arange(ids, device=weight_VE.device).split(ROWS), strict=True
    ):
        # Between two anchors on an arc, so that the variance is the same everywhere.
        angle_V1 = (id_V % DRIFT_TOKENS / DRIFT_TOKENS * (math.pi / 2))[:, None]
        before_V = id_V // DRIFT_TOKENS
        drifting_VE = angle_V1.cos() * anchor_AE[before_V] + angle_V1.sin() * anchor_AE[before_V + 1]
        part_VE.copy_(common_E + drifting_VE + own * torch.randn_like(drifting_VE))
