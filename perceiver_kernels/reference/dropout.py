"""Random numbers as functions of a seed and a place: the dropout of attention weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Philox-4x32 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

_Device = torch.device | str | None


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """The counter-based generator Philox-4x32: four words of a counter to four random words.

    (c0, c1, c2, c3) <- (hi(m1 * c2) ^ c1 ^ k0, lo(m1 * c2), hi(m0 * c0) ^ c3 ^ k1, lo(m0 * c0)),   k <- k + w

    Args:
        counter: four int64 tensors of 32-bit words that broadcast.
        key: two int64 tensors of 32-bit words that broadcast with them.
        rounds: 10, unless its strength is being studied.

    Returns:
        Four int64 tensors of 32-bit words.

    Source: Salmon, Moraes, Dror, Shaw, SC 2011, section 3.3, with the known answers of their Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply_words(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_words(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_keep(
    seed: Tensor, B: int, R: int, M: int, dropout_p: float, key_offset: int = 0, device: _Device = None
) -> Tensor:
    """Which attention weights dropout keeps: a function of the seed and the weight's place, so never stored.

    keep = word >= round(dropout_p * 2^32),   word = philox((j + key_offset, r, b, 0), (seed_lo, seed_hi))[0]

    Args:
        seed: int64 [1].
        B, R, M: batch, query rows (heads folded in: r = h * N + i) and keys.
        dropout_p: probability of dropping, in [0, 1].
        key_offset: index of the first of these keys in the whole sequence.
        device: of the result; the seed's when None.

    Returns:
        bool [B, R, M]. Kept weights are divided by 1 - dropout_p.

    Source: dropout of Srivastava et al., JMLR 15 (2014), on the weights of attention, drawn with philox.
    """
    device = seed.device if device is None else torch.device(device)
    seed = seed.to(device)
    counter = (
        torch.arange(key_offset, key_offset + M, device=device)[None, None, :],
        torch.arange(R, device=device)[None, :, None],
        torch.arange(B, device=device)[:, None, None],
        torch.zeros((), dtype=torch.int64, device=device),
    )
    word = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))[0]
    return word >= round(dropout_p * 2**32)


def draw_seed(device: _Device = None) -> Tensor:
    """A dropout seed, int64 [1] on device, from torch's generator: manual_seed and checkpoint govern it."""
    info = torch.iinfo(torch.int64)
    return torch.randint(info.min, info.max, (1,), dtype=torch.int64, device=device)


def dropout(weights: Tensor, dropout_p: float, seed: Tensor | None, key_offset: int = 0) -> Tensor:
    seed = draw_seed(weights.device) if seed is None else seed
    B, R, M = weights.shape
    keep = dropout_keep(seed, B, R, M, dropout_p, key_offset, weights.device)
    return weights * keep / (1 - dropout_p) if dropout_p < 1 else weights * 0


def _multiply_words(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of 32-bit words, in 16-bit steps that fit in int64."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD
