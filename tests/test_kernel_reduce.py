"""Logits reduced to blocks by a kernel, against torch operations on the same inputs.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T keys, N blocks, L tokens of the sequence, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from emulated import emulated_gpu
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.offload.attention.dense import Scorer, Terms
from attention_predictor.offload.chunk import Chunk, split

pytestmark = pytest.mark.usefixtures("exact_matmul")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "emulated": tensors on the CPU, and the GPU's kernels (tests/emulation)."""
    with emulated_gpu() if request.param == "emulated" else nullcontext():
        yield "cpu" if request.param == "emulated" else request.param


def literal(product_BHQT: Tensor, real_BL: Tensor | None, terms: tuple[int, int, int, float, float]) -> Tensor:
    """Both results stacked, in the precision of the product."""
    first_key, first_query, size, scaling, softcap = terms
    Q, T = product_BHQT.shape[2:]
    logits = product_BHQT * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    key_T, query_Q = torch.arange(T) + first_key, torch.arange(Q) + first_query
    logits = logits.masked_fill(key_T > query_Q[:, None], -torch.inf)
    if real_BL is not None:
        logits = logits.masked_fill(~real_BL[:, None, None, first_key : first_key + T], -torch.inf)
    first, last = first_key // size, (first_key + T - 1) // size
    blocks = []
    for n in range(first, last + 1):
        part = logits[..., max(n * size - first_key, 0) : (n + 1) * size - first_key]
        blocks.append(torch.stack([part.amax(-1), part.logsumexp(-1)]))
    return torch.stack(blocks, -1)


CASES = [
    # B, H, Q, T, first key, first query, block size, softcap, padded
    (1, 2, 3, 64, 0, 61, 16, 0.0, False),
    (2, 2, 5, 100, 16, 112, 16, 5.0, True),  # T ends inside a block
    (1, 1, 4, 37, 21, 50, 8, 0.0, True),  # begins and ends inside one, nothing aligned; queries before keys
    (1, 3, 2, 300, 40, 400, 128, 0.0, False),
    (2, 1, 2, 700, 100, 790, 256, 3.0, True),  # a block of more than one pass
    (1, 1, 1, 4, 0, 3, 4, 0.0, False),
    (1, 2, 4, 64, 64, 10, 32, 0.0, False),  # no query sees any of these keys
]


@pytest.mark.parametrize(("B", "H", "Q", "T", "first_key", "first_query", "size", "softcap", "padded"), CASES)
def test_blocks_of_logits(
    device: str,
    B: int,
    H: int,
    Q: int,
    T: int,
    first_key: int,
    first_query: int,
    size: int,
    softcap: float,
    padded: bool,
) -> None:
    generator = torch.Generator().manual_seed(T)
    product_BHQT = 9 * torch.randn(B, H, Q, T, generator=generator)
    length = first_key + T
    real_BL = (torch.arange(length) >= torch.randint(length, (B, 1), generator=generator)) if padded else None
    N = -(-length // size) + 1
    before = torch.randn(2, B, H, Q, N, generator=generator)
    before[1] = torch.maximum(before[0], before[1])
    before[:, ..., ::2] = -torch.inf
    peak_BHQN, sum_BHQN = (x.clone().to(device) for x in before)
    terms = (first_key, first_query, size, 0.3, softcap)
    ops.reduce_logits(
        product_BHQT.to(device), peak_BHQN, sum_BHQN, None if real_BL is None else real_BL.to(device), *terms
    )

    touched = slice(first_key // size, -(-length // size))
    for number, precision in enumerate((torch.float64, torch.float32)):
        found = literal(product_BHQT.to(precision), real_BL, terms)
        joined = before.to(precision).clone()
        joined[0, ..., touched] = torch.maximum(joined[0, ..., touched], found[0])
        joined[1, ..., touched] = torch.logaddexp(joined[1, ..., touched], found[1])
        if number == 0:
            exact = joined
    own = (joined.double() - exact).nan_to_num().abs().amax()
    for one, truth in ((peak_BHQN, exact[0]), (sum_BHQN, exact[1])):
        assert torch.equal(one.cpu() == -torch.inf, truth == -torch.inf)
        assert (one.cpu().double() - truth).nan_to_num().abs().amax() <= 2 * own + 2e-6


@pytest.mark.parametrize("pieces", [200, 33])
@pytest.mark.parametrize("extra", ["plain", "sinks and softcap", "padding"])
def test_a_scorer_with_the_kernel(device: str, pieces: int, extra: str) -> None:
    B, G, H, Q, L, D = 2, 2, 4, 6, 200, 16
    generator = torch.Generator().manual_seed(pieces)
    query_BHQD = torch.randn(B, H, Q, D, generator=generator).to(device)
    keys = torch.randn(B, G, L, D, generator=generator).to(device)
    terms = {
        "plain": Terms(D**-0.5),
        "sinks and softcap": Terms(D**-0.5, softcap=2.0, sinks_H=torch.randn(H, generator=generator).to(device)),
        "padding": Terms(D**-0.5, mask=(torch.arange(L) >= torch.tensor([[0], [70]])).to(device)),
    }[extra]
    rows = []
    for kernel in (True, False):
        scorer = Scorer(query_BHQD, L, terms, kv_heads=G, block_size=16, kernel=kernel)
        assert scorer.kernel is kernel
        for chunk in split(Chunk(0, keys, keys), pieces):
            scorer.add(chunk)
        rows.append(scorer.rows())
    for mine, others in zip(*rows, strict=True):
        torch.testing.assert_close(mine, others, atol=2e-6, rtol=1e-5)


def test_masks_of_queries_by_keys_are_for_torch(device: str) -> None:
    mask = torch.ones(1, 1, 2, 8, dtype=torch.bool, device=device)
    query = torch.zeros(1, 1, 2, 8, device=device)
    assert not Scorer(query, 8, Terms(1.0, mask=mask), kv_heads=1, block_size=16, kernel=True).kernel
    assert not Scorer(query, 8, Terms(1.0), kv_heads=1, block_size=2, kernel=True).kernel


def test_wrong_arguments_are_named(device: str) -> None:
    product, state = torch.zeros(1, 1, 2, 40, device=device), torch.zeros(1, 1, 2, 2, device=device)
    with pytest.raises(ValueError, match="keys 0 to 40: expected them within 2 blocks of 16 tokens"):
        ops.reduce_logits(product, state, state.clone(), None, 0, 40, 16, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"peak_BHQN: expected torch.float32 \[1, 1, 2, 2\]"):
        ops.reduce_logits(product[..., :9].contiguous(), state.double(), state, None, 0, 40, 16, 1.0, 0.0)
    tests = ("test_schema", "test_faketensor")
    arguments = (product[..., :9].contiguous(), state, state.clone(), None, 0, 40, 16, 1.0, 0.0)
    torch.library.opcheck(ops.reduce_logits, arguments, test_utils=tests)


def test_there_is_none_for_cpus() -> None:
    product, state = torch.zeros(1, 1, 2, 9), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="product_BHQT is on cpu, expected a GPU"):
        ops.reduce_logits(product, state, state.clone(), None, 0, 40, 16, 1.0, 0.0)
