"""ceil_div: whole numbers and integer tensors alike."""

import pytest
import torch

from attention_predictor.arithmetic import ceil_div

CASES = [
    (0, 16, 0),
    (1, 16, 1),
    (15, 16, 1),
    (16, 16, 1),
    (17, 16, 2),
    (32, 16, 2),
    (5, 1, 5),
    (-1, 16, 0),
    (-17, 16, -1),
]


@pytest.mark.parametrize(("length", "size", "expected"), CASES)
def test_rounds_up(length: int, size: int, expected: int) -> None:
    assert ceil_div(length, size) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensors_as_numbers(dtype: torch.dtype) -> None:
    length_B = torch.tensor([length for length, size, _ in CASES if size == 16], dtype=dtype)
    blocks_B = ceil_div(length_B, 16)
    assert blocks_B.dtype == dtype
    assert blocks_B.tolist() == [expected for _, size, expected in CASES if size == 16]


def test_exact_where_floats_are_not() -> None:
    assert ceil_div(2**53 + 1, 1) == 2**53 + 1
