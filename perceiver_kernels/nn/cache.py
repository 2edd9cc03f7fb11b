"""Keys and values of earlier tokens, kept so that a sequence can grow by few tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.nn.checks import check_count


class KeyValueCache:
    """Keys and values of one attention layer, in memory that is allocated once.

    A layer appends those of the tokens it is given, after rotary positions, and lets their queries read all of them. No
    gradient passes through what was appended earlier.

    Args:
        capacity: tokens it can hold.
    """

    def __init__(self, capacity: int) -> None:
        check_count("capacity", capacity)
        self.capacity, self.length = capacity, 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys [B, H, n, d_qk] and values [B, H, n, d_v] after those that are there.

        Returns:
            all keys and values, [B, H, length, d]; views that later calls leave as they are, or copies through which these keys
            and values get their gradient, where they want one.

        Raises:
            ValueError: more tokens than ``capacity``, or another shape than before.
        """
        start, stop = self.length, self.length + key.shape[2]
        if stop > self.capacity:
            raise ValueError(f"cache must hold at most capacity={self.capacity} tokens, got {start} + {key.shape[2]}")
        if self._key is None or self._value is None:
            self._key, self._value = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key, value))
        for name, x, kept in (("key", key, self._key), ("value", value, self._value)):
            expected = (*kept.shape[:2], key.shape[2], kept.shape[3])
            if tuple(x.shape) != expected:
                raise ValueError(f"{name} must be [B, H, n, d] as before, {expected}, got {tuple(x.shape)}")
            kept[:, :, start:stop] = x.detach()
        self.length = stop
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            return torch.cat((self._key[:, :, :start], key), 2), torch.cat((self._value[:, :, :start], value), 2)
        return self._key[:, :, :stop], self._value[:, :, :stop]
