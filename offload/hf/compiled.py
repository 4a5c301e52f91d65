"""CompiledLayers: a model's decoder layers under torch.compile, during captured steps only."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn

from attention_predictor.errors import AttachError
from attention_predictor.offload.hf.versions import decoder_layers


class CompiledLayers:
    """Within ``with``, the decoder layers' forwards are compiled, which fuses small operations around linear layers.

    Cache and attention are not compiled (``torch.compiler.disable``). One compilation serves all layers, for this
    object's lifetime.

    Raises:
        AttachError: The model's decoder layers are not where transformers' models have them.
    """

    def __init__(self, decoder: nn.Module) -> None:
        layers = decoder_layers(decoder)
        if layers is None:
            raise AttachError(f"compile=True: {type(decoder).__name__} has no list of layers to compile")
        self._layers = [
            (layer, vars(layer).get("forward"), torch.compile(layer.forward, dynamic=False)) for layer in layers
        ]

    def __enter__(self) -> None:
        # Every layer reads its own number; a number fixed at compile time would mean one program per layer.
        self._settings = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=256)
        self._settings.__enter__()
        for layer, _, compiled in self._layers:
            layer.forward = compiled

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, own, _ in self._layers:
            if own is None:
                del layer.forward
            else:
                layer.forward = own
        self._settings.__exit__(kind, error, trace)
