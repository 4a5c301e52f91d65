"""Few-bit codes of keys: a scale and a zero per channel and group of tokens, and one small integer per token.

The grouping is KIVI's (arXiv 2402.02750, section 3: keys per channel, because some channels are large in every token).
The choice of scale and zero is ours. The usual choice, smallest and largest value as outer levels, wastes levels on
rare values. Here the best of a few narrower ranges is chosen and then fitted by least squares. Measured on five kinds
of synthetic keys (normal, with channel means, heavy-tailed, slowly varying, aligned with a query; most with RoPE), root
mean square error of the logits relative to their spread: 1 bit 0.82–2.2 → 0.35–0.65, 2 bits 0.26–0.66 → 0.19–0.43, 4
bits 0.050–0.131 → 0.049–0.127. Scale and zero from mean and deviation were as good on normal keys, but lost the
outliers of heavy-tailed ones.

Suffixes: ... any, T tokens of one group, D channels, P planes (codes a byte), J bytes.
"""

import functools

import torch
from torch import Tensor

# Ranges to try, as shares of the full range. Only 2 bits gain: with 1 bit the fit undoes the choice, with 4 or more the
# outer levels cost little. A second round of fitting gained 1% more.
SHARES = {1: (1.0,), 2: (1.0, 0.8, 0.6), 4: (1.0,), 8: (1.0,)}
LARGEST = torch.finfo(torch.float16).max


def quantise(key_TD: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `key_TD` [..., T, D] in uint8, scale and zero [..., D] in fp16: key ≈ zero + scale · code."""
    # fp16 can't represent larger zeros, and an infinity would spread to the whole group.
    key_TD = key_TD.float().clamp(-LARGEST, LARGEST)
    top = 2**bits - 1
    low_1D, high_1D = key_TD.amin(-2, keepdim=True), key_TD.amax(-2, keepdim=True)
    centre_1D, half_1D = low_1D / 2 + high_1D / 2, high_1D / 2 - low_1D / 2
    zero_1D, scale_1D, error_1D = low_1D, half_1D * (2 / top), torch.full_like(low_1D, torch.inf)
    for share in SHARES[bits]:
        trial_zero_1D, trial_scale_1D = centre_1D - share * half_1D, half_1D * (2 * share / top)
        code_TD = _nearest(key_TD, trial_zero_1D, trial_scale_1D, top)
        restored_TD = torch.addcmul(trial_zero_1D, trial_scale_1D, code_TD)
        trial_error_1D = (restored_TD - key_TD).square_().sum(-2, keepdim=True)
        better_1D = trial_error_1D < error_1D
        zero_1D = torch.where(better_1D, trial_zero_1D, zero_1D)
        scale_1D = torch.where(better_1D, trial_scale_1D, scale_1D)
        error_1D = torch.minimum(trial_error_1D, error_1D)
    zero_1D, scale_1D = _least_squares(key_TD, _nearest(key_TD, zero_1D, scale_1D, top))
    zero_1D, scale_1D = zero_1D.half(), scale_1D.half()
    # Choose codes for the rounded scale and zero, to minimise the effect of their rounding.
    code_TD = _nearest(key_TD, zero_1D.float(), scale_1D.float(), top)
    return code_TD.to(torch.uint8), scale_1D.squeeze(-2), zero_1D.squeeze(-2)


def _nearest(key_TD: Tensor, zero_1D: Tensor, scale_1D: Tensor, top: int) -> Tensor:
    # A constant channel has codes 0, and so has one whose scale fp16 rounds to 0: its inverse could overflow.
    inverse_1D = torch.where(scale_1D > 2**-25, 1 / scale_1D, 0)
    return ((key_TD - zero_1D) * inverse_1D).round_().clamp_(0, top)


def _least_squares(key_TD: Tensor, code_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Zero and scale of the line key = zero + scale · code through one group's tokens."""
    key_mean_1D, code_mean_1D = key_TD.mean(-2, keepdim=True), code_TD.mean(-2, keepdim=True)
    offset_TD = code_TD - code_mean_1D
    variance_1D = offset_TD.square().sum(-2, keepdim=True)
    covariance_1D = ((key_TD - key_mean_1D) * offset_TD).sum(-2, keepdim=True)
    scale_1D = torch.where(variance_1D > 0, covariance_1D / variance_1D, 0).clamp_(0, LARGEST)
    return (key_mean_1D - scale_1D * code_mean_1D).clamp_(-LARGEST, LARGEST), scale_1D


def pack(code_TD: Tensor, bits: int) -> Tensor:
    """Codes [..., T, D] as bytes [..., J, D]. Plane p, bits p·bits and up, holds tokens p·J to (p + 1)·J − 1.

    Planes of neighbouring tokens make unpacking one broadcast `and` that writes tokens in order.
    """
    code_PJD = code_TD.unflatten(-2, (8 // bits, -1))
    packed_JD = code_PJD[..., 0, :, :].clone()
    for plane in range(1, 8 // bits):
        packed_JD |= code_PJD[..., plane, :, :] << (bits * plane)
    return packed_JD


@functools.cache
@torch.inference_mode(False)
def masks(bits: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """For `unpack`: each plane's bit mask, uint8 [P, 1, 1], and the factor that corrects its shift, fp32 [P].

    Cached, since a copy from the host would delay a prompt in every layer.
    """
    shifts_P = torch.arange(0, 8, bits)
    mask_P11 = ((2**bits - 1) << shifts_P).to(torch.uint8).view(-1, 1, 1)
    return mask_P11.to(device), (0.5**shifts_P).to(device)


def unpack(packed_JD: Tensor, mask_P11: Tensor) -> Tensor:
    """Codes [..., T, D] in fp32; codes of plane p are still shifted, too large by a factor of 2^(p·bits).

    The caller corrects the shift in its products with the codes, which are far smaller than the codes.
    """
    return (packed_JD.unsqueeze(-3) & mask_P11).to(torch.float32).flatten(-3, -2)
