"""All kernels as torch operations: arguments checked, shapes known to torch.compile, a reason where there are none."""

from attention_predictor.csrc.attention import fits, sparse_decode
from attention_predictor.csrc.binding import missing
from attention_predictor.csrc.gather import gather_to_host, gather_to_pool
from attention_predictor.csrc.sketch import sketch_scores

__all__ = ["fits", "gather_to_host", "gather_to_pool", "missing", "sketch_scores", "sparse_decode"]
