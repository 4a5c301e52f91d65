"""Maps of blocks by step: true attention mass, blocks the policy read, and the best selection.

Suffixes: G KV heads, N blocks.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A block is a letter: 4 bits for its mass, a bit each for being read and for being among the best.
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
LEVELS, READ, BEST = 16, 16, 32
MAP_STEPS = 16
MAP_LETTERS = 1 << 15  # largest map of a sample; a page holds maps of many variants


def codes_of(mass_GN: Tensor, read_GN: Tensor, best_GN: Tensor) -> Tensor:
    """Encode each block as uint8 ``[G, N]``: mass level, read or not, among the best or not.

    Args:
        mass_GN: Share of the attention, from 0 to 1. A level is a power of two: 15 from a half on, 1 from 2**-15 on.
        read_GN, best_GN: bool, whether the step attended to it, and whether the best selection would have.
    """
    level_GN = (mass_GN.log2().floor() + LEVELS).clamp(0, LEVELS - 1)
    return (level_GN + READ * read_GN + BEST * best_GN).to(torch.uint8)


def map_record(maps: Mapping[int, Sequence[Tensor]], interval: int, block_size: int) -> dict[str, Any]:
    """The map in a record: ``rows``, a text by layer, head and step with one letter for each block.

    Of many steps and layers there are some, evenly spaced, so that all rows together stay about ``MAP_LETTERS`` long.

    Args:
        maps: ``codes_of`` each measured step's blocks, by layer.
        interval: Steps from one to the next.
    """
    first = next(iter(maps.values()))
    heads, blocks = first[-1].shape
    steps = spread(len(first), max(1, min(MAP_STEPS, MAP_LETTERS // (heads * blocks))))
    numbers = sorted(maps)
    layers = [numbers[place] for place in spread(len(numbers), max(1, MAP_LETTERS // (heads * blocks * len(steps))))]
    return {
        "block_size": block_size,
        "steps": [interval * (place + 1) for place in steps],
        "layers": layers,
        "rows": [
            [[_letters(maps[layer][place][head]) for place in steps] for head in range(heads)] for layer in layers
        ],
    }


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spaced."""
    taken = min(count, most)
    return [number * count // taken for number in range(taken)]


def _letters(codes_N: Tensor) -> str:
    return "".join(LETTERS[code] for code in codes_N.tolist())
