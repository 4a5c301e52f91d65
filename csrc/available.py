"""Whether a device has kernels, and their compilation before first use."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from attention_predictor.csrc import attention, function, gather, kernel, sketch
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.errors import BuildError

FUNCTIONS = (attention.ON_CPU, gather.ON_CPU, sketch.ON_CPU)  # all CPU kernels
MIN_CAPABILITY = (8, 0)
logger = logging.getLogger(__name__)
_reasons: dict[torch.device, str | None] = {}


def why_no_kernels(device: torch.device) -> str | None:
    """Why this device has no kernels, on one line; ``None`` if it has. Compiler output goes to the log, once."""
    if device in _reasons:
        return _reasons[device]
    return prepare(device, [gather.NOTE_TIME])  # the smallest one: shows whether kernels can be compiled and loaded


def prepare(device: torch.device, kernels: Sequence[Kernel]) -> str | None:
    """Compile (in parallel, unless cached on disk) and load kernels before they are needed.

    On a CPU this ignores ``kernels`` and loads all CPU kernels.

    Returns:
        ``None``, or one line that says why it failed. ``why_no_kernels`` returns the same line from then on: a
        failure is not tried again.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if (reason := _reasons.get(device)) is None:
        try:
            if device.type == "cpu":
                function.load(FUNCTIONS)
            else:
                reason = _why_unsupported(device)
                if reason is None:
                    kernel.load(kernels, device)
        except BuildError as error:
            reason, *output = str(error).splitlines()
            if output:
                logger.warning("kernels for %s: %s", device, error)
    _reasons[device] = reason
    return reason


def _why_unsupported(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"no kernels are written for {device.type}"
    if torch.version.cuda is None:
        return "no kernels are written for ROCm"
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        least, found = (".".join(map(str, one)) for one in (MIN_CAPABILITY, capability))
        return f"kernels need a GPU of compute capability {least} or higher, this one has {found}"
    return None
