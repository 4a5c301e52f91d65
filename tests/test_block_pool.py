"""BlockPool: what is put where, and its errors.

Letters: B sequences, G KV heads, R rows = B·G, S slots, T tokens, D head size.
"""

import math

import pytest
import torch

from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.block_pool import BlockPool

KV_HEADS, BLOCK_SIZE, HEAD_DIM = 2, 4, 3


def pool_of(batch: int = 2, slots: int = 5, dtype: torch.dtype = torch.float32) -> BlockPool:
    return BlockPool(
        batch=batch,
        kv_heads=KV_HEADS,
        slots=slots,
        block_size=BLOCK_SIZE,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device="cpu",
    )


def test_blocks_tokens_and_sequences_are_where_they_were_put():
    pool, generator = pool_of(batch=2, slots=3), torch.Generator().manual_seed(0)
    data_RS2TD = torch.randn(4, 5, 2, BLOCK_SIZE, HEAD_DIM, generator=generator)
    rows, slots = (x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(3), indexing="ij"))
    pool.write_blocks(rows, slots, data_RS2TD[rows, slots])
    pool.grow(5)
    pool.write_blocks(rows, slots % 2 + 3, data_RS2TD[rows, slots % 2 + 3])
    slot_R, offset_R = torch.tensor([4, 0, 2, 1]), torch.tensor([0, 3, 1, 2])
    token_2R1D = torch.randn(2, 4, 1, HEAD_DIM, generator=generator)
    pool.write_token(slot_R, offset_R, *token_2R1D.unflatten(1, (2, KV_HEADS)))
    data_RS2TD[torch.arange(4), slot_R, :, offset_R] = token_2R1D[:, :, 0].transpose(0, 1)
    pool.index(torch.tensor([1, 0, 1]))
    data_RS2TD = data_RS2TD.unflatten(0, (2, KV_HEADS))[[1, 0, 1]]
    assert torch.equal(pool.key_BGSTD, data_RS2TD[..., 0, :, :])
    assert torch.equal(pool.value_BGSTD, data_RS2TD[..., 1, :, :])
    pool.check_integrity()


def test_attention_can_view_all_slots_as_tokens():
    pool = pool_of()
    assert pool.slots == 5
    assert pool.key_BGSTD.view(2, KV_HEADS, 5 * BLOCK_SIZE, HEAD_DIM).data_ptr() == pool.key_BGSTD.data_ptr()
    assert pool.nbytes == 2 * 2 * KV_HEADS * 5 * BLOCK_SIZE * HEAD_DIM * 4


def test_grow_keeps_contents_and_adds_zeros():
    pool = pool_of()
    pool.key_BGSTD.normal_()
    before = pool.key_BGSTD.clone()
    pool.grow(7)
    assert torch.equal(pool.key_BGSTD[:, :, :5], before)
    assert not pool.key_BGSTD[:, :, 5:].any()
    pool.check_integrity()
    with pytest.raises(ValueError, match="slots must be at least 7, got 6"):
        pool.grow(6)


def test_a_pool_of_no_slots_grows():
    pool = pool_of(slots=0)
    pool.write_blocks(torch.tensor([]).long(), torch.tensor([]).long(), torch.zeros(0, 2, BLOCK_SIZE, HEAD_DIM))
    pool.grow(2)
    pool.write_blocks(torch.tensor([3]), torch.tensor([1]), torch.ones(1, 2, BLOCK_SIZE, HEAD_DIM))
    assert pool.value_BGSTD.sum() == BLOCK_SIZE * HEAD_DIM
    assert bool((pool.value_BGSTD[1, 1, 1] == 1).all())


def test_index_repeats_sequences():
    pool = pool_of()
    pool.value_BGSTD.normal_()
    before = pool.value_BGSTD.clone()
    pool.index(torch.tensor([1, 1, 0]))
    assert torch.equal(pool.value_BGSTD, before[[1, 1, 0]])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 4, 3), torch.float64), ((1, 2, 4, 3), torch.float32), ((2, 1, 4, 3), torch.float32)],
)
def test_write_blocks_names_a_wrong_size(shape, dtype):
    with pytest.raises(ValueError, match=r"size mismatch for kv: expected torch.float32 \[2, 2, 4, 3\], got"):
        pool_of().write_blocks(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(("row", "slot"), [(0, -1), (0, 5), (4, 0), (-1, 0)])
def test_write_blocks_refuses_a_slot_that_does_not_exist(row, slot):
    pool = pool_of()
    with pytest.raises(IndexError, match="must be between 0 and"):
        pool.write_blocks(torch.tensor([row]), torch.tensor([slot]), torch.ones(1, 2, BLOCK_SIZE, HEAD_DIM))
    assert not pool.key_BGSTD.any()


def test_write_token_refuses_rows_without_a_slot():
    token, offset_R = torch.ones(2, KV_HEADS, 1, HEAD_DIM), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(IndexError, match="slot must be between 0 and 4, got -1 to 3"):
        pool_of().write_token(torch.tensor([0, 3, -1, 2]), offset_R, token, token)
    with pytest.raises(ValueError, match=r"size mismatch for value: expected torch.float32 \[2, 2, 1, 3\]"):
        pool_of().write_token(torch.tensor([0, 3, 1, 2]), offset_R, token, token[:1])


def test_a_pool_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        pool = pool_of()
        pool.grow(6)
        pool.index(torch.tensor([1, 0]))
    pool.write_blocks(torch.tensor([0]), torch.tensor([5]), torch.ones(1, 2, BLOCK_SIZE, HEAD_DIM))
    assert pool.key_BGSTD.sum() == BLOCK_SIZE * HEAD_DIM


def test_integrity_check_finds():
    pool = pool_of()
    pool.value_BGSTD = pool.value_BGSTD[:, :, :4]
    with pytest.raises(IntegrityError, match=r"shape of keys is .*5, 4, 3.* of values .*4, 4, 3"):
        pool.check_integrity()
    pool = pool_of()
    pool.value_BGSTD = pool.value_BGSTD.transpose(0, 1)
    with pytest.raises(IntegrityError, match="contiguous"):
        pool.check_integrity()
    pool = pool_of()
    pool.value_BGSTD = pool.key_BGSTD
    with pytest.raises(IntegrityError, match="share their memory"):
        pool.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_pool_takes_host_blocks_and_indices_of_any_device():
    pool = BlockPool(batch=1, kv_heads=2, slots=3, block_size=4, head_dim=3, dtype=torch.bfloat16, device="cuda")
    kv = torch.randn(2, 2, 4, 3).bfloat16()
    for kv_n2TD in (kv, kv.pin_memory(), kv.cuda()):
        for device in ("cpu", "cuda"):
            pool.key_BGSTD.fill_(math.nan)
            row_n, slot_n = torch.tensor([0, 1], device=device), torch.tensor([2, 0], device=device)
            pool.write_blocks(row_n, slot_n, kv_n2TD)
            assert torch.equal(pool.key_BGSTD[0, [0, 1], [2, 0]].cpu(), kv[:, 0])
            token = torch.randn(1, 2, 1, 3, device="cuda").bfloat16()
            pool.write_token(slot_n, 1, token, token)
            assert torch.equal(pool.value_BGSTD[0, [0, 1], [2, 0], 1], token[0, :, 0])
