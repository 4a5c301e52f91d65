"""The sketch's kernels against torch operations on the same inputs."""

from __future__ import annotations

import pytest
import torch

from attention_predictor.predictor.sketch import KeySketch

pytestmark = pytest.mark.usefixtures("exact_matmul")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [5, 64, 700, 1029])
@pytest.mark.parametrize("extra", ["plain", "padded", "softcap"])
def test_sketch_scores(dtype: torch.dtype, bits: int, length: int, extra: str) -> None:
    """Against the logits in torch operations, block by block."""
    generator = torch.Generator().manual_seed(length + bits)
    B, G, H, D = 2, 2, 6, 48
    sketch = KeySketch(batch=B, kv_heads=G, head_dim=D, dtype=dtype, device="cpu", bits=bits)
    key, query = torch.randn(B, G, length, D, generator=generator), torch.randn(B, H, length, D, generator=generator)
    sketch.extend(key.to(dtype), query.to(dtype))
    real = torch.arange(length) >= torch.tensor([[0], [length // 3]]) if extra == "padded" else None
    arguments = (query[:, :, -1].to(dtype), D**-0.5, 2.0 if extra == "softcap" else None)
    wanted = sketch.block_scores(*arguments, block_size=16, real_BL=real)
    found = sketch.block_scores(*arguments, block_size=16, real_BL=real, kernel=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
