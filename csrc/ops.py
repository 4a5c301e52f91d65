"""All kernels as torch operations: arguments checked, shapes known to torch.compile, a reason where there are none."""

from attention_predictor.csrc.attention import fits, sparse_decode
from attention_predictor.csrc.binding import missing
from attention_predictor.csrc.gather import append_token, gather_to_host, gather_to_pool, move_blocks, note_time
from attention_predictor.csrc.observe import fold_rows, observe_row
from attention_predictor.csrc.predict import pack_convolutions, predict_blocks
from attention_predictor.csrc.reduce import reduce_logits, reduces
from attention_predictor.csrc.select import choose_ahead, choose_blocks
from attention_predictor.csrc.sketch import no_sketch_kernel, sketch_append, sketch_scores, sketch_store
from attention_predictor.csrc.window import pack_network, push_window, score_window

__all__ = [
    "append_token",
    "choose_ahead",
    "choose_blocks",
    "fits",
    "fold_rows",
    "gather_to_host",
    "gather_to_pool",
    "missing",
    "move_blocks",
    "no_sketch_kernel",
    "note_time",
    "observe_row",
    "pack_convolutions",
    "pack_network",
    "predict_blocks",
    "push_window",
    "reduce_logits",
    "reduces",
    "score_window",
    "sketch_append",
    "sketch_scores",
    "sketch_store",
    "sparse_decode",
]
