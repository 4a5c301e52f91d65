"""Chunked and sparse attention against a literal softmax, and the rows they give; masks against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from attention_predictor import AttachError
from attention_predictor.offload.attention import dense, fused
from attention_predictor.offload.attention.dense import Terms, attend, attend_prompt, score_rows
from attention_predictor.offload.attention.sparse import attend_slots
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.chunk import Chunk, split
from attention_predictor.offload.hf.attention import tiered_attention, tiered_mask
from attention_predictor.offload.policies.base import Step
from attention_predictor.predictor.scores import block_mass, block_scores

B, G, H, D, BLOCK = 2, 2, 6, 8, 4


def literal(query, key, value, terms):
    """Softmax attention with every matrix whole: output and probabilities of the keys."""
    length, Q = key.shape[2], query.shape[2]
    key, value = key.repeat_interleave(H // G, 1), value.repeat_interleave(H // G, 1)
    logits = query.double() @ key.double().transpose(-1, -2) * terms.scaling
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    allowed = torch.ones(Q, length, dtype=torch.bool).tril(length - Q)
    if terms.mask is not None:
        allowed = terms.mask if terms.mask.dim() == 4 else allowed & terms.mask[:, None, None]
    logits = logits.masked_fill(~allowed, -torch.inf)
    if terms.sinks_H is not None:
        sink = terms.sinks_H.double().view(1, H, 1, 1).expand(*logits.shape[:3], 1)
        probability = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        probability = logits.softmax(-1)
    probability = probability.nan_to_num(0.0)
    return probability @ value.double(), probability


def masks(length, Q):
    padding = torch.arange(length) >= torch.tensor([[0], [3]])
    band = torch.ones(Q, length, dtype=torch.bool).tril(length - Q).triu(length - Q - 5)
    return {"causal": None, "padding": padding, "4-D": band[None, None].expand(B, 1, Q, length)}


TERMS = [
    {"softcap": None, "sinks_H": None},
    {"softcap": 3.0, "sinks_H": None},
    {"softcap": None, "sinks_H": torch.linspace(-2, 2, H)},
]


def tensors(length, Q, seed=0):
    torch.manual_seed(seed)
    return torch.randn(B, H, Q, D) * 2, torch.randn(B, G, length, D), torch.randn(B, G, length, D)


@pytest.fixture(params=["plain", "tiles", "fused"])
def way(request, monkeypatch):
    """Plain operations, the same in small tiles, and fused kernels for however few keys."""
    if request.param == "tiles":
        monkeypatch.setattr(dense, "LOGITS_BYTES", 4 * B * H * 3 * 8)
        monkeypatch.setattr(dense, "LOGITS_TOKENS", 8)
    if request.param == "fused":
        monkeypatch.setattr(dense, "MIN_FUSED_TOKENS", 1)
        monkeypatch.setattr(dense, "MASK_ELEMENTS", 0)
    return request.param


@pytest.mark.parametrize("mask", ["causal", "padding", "4-D"])
@pytest.mark.parametrize("extra", TERMS)
@pytest.mark.parametrize(("length", "Q"), [(23, 23), (23, 5), (23, 1), (16, 7)])
def test_attention_in_chunks_and_rows(way, mask, extra, length, Q):
    query, key, value = tensors(length, Q)
    terms = Terms(D**-0.5, mask=masks(length, Q)[mask], **extra)
    expected, probability = literal(query, key, value, terms)
    # What a query of padding gives is nobody's business.
    real = terms.mask[:, length - Q :] if mask == "padding" else torch.ones(B, Q, dtype=torch.bool)
    whole = Chunk(0, key, value)
    past, own = split(whole.tokens(0, length - Q), 8), whole.tokens(length - Q, length)
    for out in (attend(query, own, terms, past), attend(query, whole, terms), attend_prompt(query, key, value, terms)):
        assert (out - expected).abs().amax(-1).masked_fill(~real[:, None], 0).max() < 1e-5
    rows = score_rows(query, split(whole, 8), length, terms, kv_heads=G, block_size=BLOCK)
    assert (rows.scores_BGQN - block_scores(probability, G, BLOCK)).abs().max() < 1e-6
    assert (rows.mass_BGQN - block_mass(probability, G, BLOCK)).abs().max() < 1e-6


@pytest.mark.parametrize("mask", ["causal", "padding"])
@pytest.mark.parametrize("cuts", [[23], [5, 23], [3, 7, 8, 23]])
def test_chunks_need_not_end_with_blocks(mask, cuts):
    query, key, value = tensors(23, 6)
    terms, whole = Terms(D**-0.5, mask=masks(23, 6)[mask]), Chunk(0, key, value)
    chunks = [whole.tokens(start, end) for start, end in zip([0, *cuts], cuts, strict=False)]
    form = {"kv_heads": G, "block_size": BLOCK}
    expected = score_rows(query, [whole], 23, terms, **form)
    for got, wanted in zip(score_rows(query, chunks, 23, terms, **form), expected, strict=True):
        assert (got - wanted).abs().max() < 1e-6


class TestFused:
    """Whether kernels run where they should, and what they are trusted with."""

    @pytest.fixture
    def calls(self, monkeypatch):
        monkeypatch.setattr(dense, "MIN_FUSED_TOKENS", 1)
        calls, real = [], fused.attend_piece

        def counted(query, *args, **kwargs):
            calls.append((len(query), kwargs["causal"]))
            return real(query, *args, **kwargs)

        monkeypatch.setattr(fused, "attend_piece", counted)
        return calls

    def attend(self, length, Q, **terms):
        query, key, value = tensors(length, Q)
        whole = Chunk(0, key, value)
        attend(query, whole.tokens(length - Q, length), Terms(D**-0.5, **terms), split(whole.tokens(0, length - Q), 8))

    def test_one_call_a_chunk(self, calls):
        self.attend(23, 7)
        assert calls == [(B, False), (B, False), (B, True)]

    def test_sinks_are_merged_afterwards(self, calls):
        self.attend(23, 7, sinks_H=torch.zeros(H))
        assert len(calls) == 3

    def test_padded_sequences_go_one_by_one_and_chunks_of_padding_not_at_all(self, calls):
        self.attend(23, 7, mask=torch.arange(23) >= torch.tensor([[0], [17]]))
        assert calls == [(1, False), (1, False), (1, True), (1, True)]

    @pytest.mark.parametrize(
        "terms",
        [
            {"softcap": 3.0},
            {"mask": torch.ones(B, 1, 7, 23, dtype=torch.bool)},
            {"mask": torch.arange(23) != torch.tensor([[4], [5]])},  # a hole
        ],
    )
    def test_what_kernels_cannot_do(self, calls, terms):
        self.attend(23, 7, **terms)
        assert not calls

    def test_gradients_are_exact(self, calls):
        """The log-sum-exp of a kernel has no gradient; that of the plain operations has."""
        query, key, value = (x.requires_grad_() for x in tensors(23, 7))
        terms = Terms(D**-0.5)
        whole = Chunk(0, key, value)
        attend(query, whole.tokens(16, 23), terms, split(whole.tokens(0, 16), 8)).square().sum().backward()
        found = [x.grad.clone() for x in (query, key, value)]
        query.grad = key.grad = value.grad = None
        literal(query, key, value, terms)[0].square().sum().backward()
        assert not calls
        for got, wanted in zip(found, (query.grad, key.grad, value.grad), strict=True):
            assert (got - wanted).abs().max() < 1e-4

    @pytest.mark.parametrize("softcap", [None, 3.0])
    @pytest.mark.parametrize("Q", [23, 5])
    def test_flash_attn_where_it_is_installed(self, monkeypatch, Q, softcap):
        """By a stand-in of the same signature and layout: [B, T, H, D], causal from the bottom right."""
        seen = []

        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                            alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
            assert return_attn_probs
            seen.append(causal)
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
            mask = None if causal else torch.ones(*q.shape[:1], 1, q.shape[1], k.shape[1], dtype=torch.bool)
            terms = Terms(softmax_scale, softcap or None, mask=mask)
            out, _ = literal(query, key, value, terms)
            logits = dense._masked(dense.scaled_logits(query, key, terms), 0, k.shape[1] - q.shape[1], mask)
            return out.float().transpose(1, 2), logits.logsumexp(-1), None

        monkeypatch.setattr(dense, "MIN_FUSED_TOKENS", 1)
        monkeypatch.setattr(fused, "flash_attn", lambda query, softcap: flash_attn_func)
        query, key, value = tensors(23, Q)
        terms = Terms(D**-0.5, softcap)
        out = attend_prompt(query, key, value, terms)
        assert (out - literal(query, key, value, terms)[0]).abs().max() < 1e-5
        assert seen == ([True] if Q == 23 else [False, True])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_costs_little_precision(dtype):
    """In chunks, of which each is rounded: beside one kernel for all in the same precision, and plain operations."""
    torch.manual_seed(0)
    key, value = (torch.randn(1, 2, 1000, 64).to(dtype) for _ in range(2))
    query = (torch.randn(1, 6, 200, 64) * 2).to(dtype)
    repeated = [x.repeat_interleave(3, 1) for x in (key, value)]
    mask = torch.ones(200, 1000, dtype=torch.bool).tril(800)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact = sdpa(query.double(), *(x.double() for x in repeated), attn_mask=mask, scale=0.125)
    logits = (query @ repeated[0].mT * 0.125).masked_fill(~mask, -torch.inf)
    plain = logits.softmax(-1, dtype=torch.float32).to(dtype) @ repeated[1] - exact
    in_one = sdpa(query, *repeated, attn_mask=mask, scale=0.125) - exact
    whole = Chunk(0, key, value)
    out = attend(query, whole.tokens(800, 1000), Terms(0.125), split(whole.tokens(0, 800), 128))
    assert out.dtype == dtype
    assert (out - exact).square().mean().sqrt() <= 2 * in_one.square().mean().sqrt()
    assert (out - exact).abs().max() <= plain.abs().max()


def test_additive_mask():
    query, key, value = tensors(12, 3)
    allowed = torch.ones(3, 12, dtype=torch.bool).tril(9)
    additive = torch.zeros(1, 1, 3, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    as_bool = Terms(D**-0.5, mask=allowed[None, None])
    whole = Chunk(0, key, value)
    out = attend(query, whole, Terms(D**-0.5, mask=additive))
    assert (out - attend(query, whole, as_bool)).abs().max() < 1e-6


def test_a_query_that_sees_nothing_gives_zeros():
    query, key, value = tensors(8, 8)
    padding = torch.arange(8) >= torch.tensor([[0], [3]])
    out = attend(query, Chunk(0, key, value), Terms(1.0, mask=padding))
    assert torch.isfinite(out).all()
    assert (out[1, :, :3] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40),
    seed=st.integers(0, 1000),
    padded=st.booleans(),
    extra=st.sampled_from(TERMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_sparse_attention_reads_exactly_its_slots(length, seed, padded, extra, dtype):
    """Against dense attention over the tokens of the chosen blocks; error at most twice bf16's own."""
    query, key, value = (one.to(dtype) for one in tensors(length, 1, seed))
    generator = torch.Generator().manual_seed(seed)
    n_blocks = -(-length // BLOCK)
    slots = torch.stack([torch.randperm(n_blocks + 2, generator=generator) for _ in range(B * G)]).view(B, G, -1)
    slots = slots.masked_fill(slots >= n_blocks, -1)[..., : max(n_blocks, 2) - 1]
    slots[..., 0] = n_blocks - 1  # the newest block always takes part
    slots[..., 1:] = slots[..., 1:].masked_fill(slots[..., 1:] == n_blocks - 1, -1)
    short = n_blocks * BLOCK - length
    filled = [torch.nn.functional.pad(one, (0, 0, 0, short), value=99.0) for one in (key, value)]
    blocks = [one.view(B, G, n_blocks, BLOCK, D) for one in filled]
    pool = [
        one.gather(2, slots.clamp_min(0)[..., None, None].expand(-1, -1, -1, BLOCK, D)).contiguous() for one in blocks
    ]
    real = (torch.arange(length) >= torch.tensor([[0], [length - 1]])) if padded else None
    result = attend_slots(query[:, :, 0], *pool, slots, torch.full((B,), length), real, Terms(D**-0.5, **extra))
    wanted = (slots[..., None] == torch.arange(n_blocks)).any(2).repeat_interleave(BLOCK, -1)[..., :length]
    allowed = wanted if real is None else wanted & real[:, None]
    allowed = allowed.repeat_interleave(H // G, 1)[:, :, None]
    exact, _ = literal(query, key, value, Terms(D**-0.5, mask=allowed, **extra))
    tolerance = 1e-5 if dtype == torch.float32 else 2 * float((exact.to(dtype) - exact).abs().max()) + 1e-2
    assert (result.out_BHD - exact[:, :, 0]).abs().max() <= tolerance


def test_a_step_knows_its_attended_blocks():
    extent = Extent(torch.tensor([18]), None, 6, BLOCK)
    step = Step(
        torch.zeros(1, 2, D), extent, None, Terms(1.0), 2, kernel=False, length=18, stream=lambda query: iter(())
    )
    step.block_BGS = torch.tensor([[[0, -1, 4], [-1, -1, 2]]])
    assert step.blocks == 5
    assert step.attended_BGC.int().tolist() == [[[1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]]


class TestMask:
    def test_plain_causal_needs_none(self):
        assert tiered_mask(2, 5, 5) is None
        assert tiered_mask(2, 1, 9, q_offset=8) is None
        assert tiered_mask(2, 3, 9, q_offset=6, attention_mask=torch.ones(2, 9, dtype=torch.bool)) is None

    def test_padding_keeps_two_dimensions(self):
        padding = torch.arange(9) >= torch.tensor([[0], [3]])
        assert torch.equal(tiered_mask(2, 3, 9, q_offset=6, attention_mask=padding), padding)

    def test_everything_else_is_the_stock_mask(self):
        window = sliding_window_causal_mask_function(4)
        shape = {"batch_size": 1, "q_length": 3, "kv_length": 9, "q_offset": 6}
        ours = tiered_mask(**shape, mask_function=window, local_size=4)
        assert torch.equal(ours, sdpa_mask(**shape, mask_function=window, allow_is_causal_skip=False))
        ours = tiered_mask(1, 3, 8, q_offset=6, kv_offset=1, mask_function=causal_mask_function)
        assert ours.shape == (1, 1, 3, 8)


def test_position_bias_is_refused():
    query, key, value = tensors(4, 4)
    with pytest.raises(AttachError, match="position_bias"):
        tiered_attention(torch.nn.Module(), query, key, value, None, position_bias=torch.zeros(1))
