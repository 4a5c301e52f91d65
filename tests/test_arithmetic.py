"""Division that rounds up; scatters that drop what has no place."""

import pytest
import torch

from attention_predictor.arithmetic import ceil_div, scatter_or_drop

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64, torch.bool])
def test_scatter_drops_what_has_no_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    into = torch.randint(2, (3, 2, 7), generator=generator).to(dtype)
    index = torch.stack([torch.randperm(7, generator=generator) for _ in range(6)]).view(3, 2, 7)[..., :5]
    index = index.masked_fill(torch.rand(3, 2, 5, generator=generator) < 0.4, -1)
    values = torch.randint(2, (3, 2, 5), generator=generator).to(dtype)
    before, expected = into.clone(), into.clone()
    for *row, column in (index >= 0).nonzero().tolist():
        expected[(*row, int(index[(*row, column)]))] = values[(*row, column)]
    assert torch.equal(scatter_or_drop(into, index, values), expected)
    assert torch.equal(into, before)


def test_scatter_of_one_value() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    mask = scatter_or_drop(nothing, torch.tensor([[3, -1, 0], [-1, -1, -1]]), True)
    assert mask.tolist() == [[True, False, False, True], [False] * 4]
    assert scatter_or_drop(torch.zeros(2, 0), torch.full((2, 3), -1), 1.0).shape == (2, 0)
