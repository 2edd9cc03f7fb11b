"""Sequences that a Perceiver AR continues, token by token, from keys and values that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perceiver_kernels.checks import is_integer
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.nn.modes import evaluating

if TYPE_CHECKING:
    from perceiver_kernels.models.perceiver_ar import PerceiverAR


@dataclass(frozen=True)
class LatentWindow:
    """Which tokens of a growing sequence are latents, which are their prefix, and which are forgotten.

        boundary(L) = first + stride ceil(max(L - first - num_latents, 0) / stride)
        latents = tokens boundary .. L - 1,   prefix = tokens start .. boundary - 1,   start = max(boundary - max_prefix, 0)

    New tokens are latents until there are ``num_latents``; then the ``stride`` oldest latents become prefix, and what no
    longer fits ``max_prefix`` is forgotten. Between two moves the latents of earlier tokens stay as they are, so that their
    keys and values can be kept: that is exact. After a move latents see fewer latents before them, and places count from
    another token if some were forgotten: everything is then computed again.

    Args:
        first: tokens before the first latent at the beginning.
        num_latents: N, most latents.
        max_prefix: most tokens of the prefix.
        stride: latents that become prefix at once, 1 to N. With 1 the latents are always as many as can be, which the
            authors evaluate; every token then costs a whole forward once there are N. Larger strides leave
            ``N - stride + 1`` latents after a move and cost a forward every ``stride`` tokens.
    """

    first: int
    num_latents: int
    max_prefix: int
    stride: int

    def boundary(self, length: int) -> int:
        """The first latent when the sequence has ``length`` tokens."""
        excess = max(length - self.first - self.num_latents, 0)
        return self.first + -(-excess // self.stride) * self.stride

    def start(self, length: int) -> int:
        """The first token that is not forgotten."""
        return max(self.boundary(length) - self.max_prefix, 0)


class CachedDecoder:
    """A growing sequence and the logits of its next token.

        logits = model(tokens[:, start:], boundary - start)[:, -1],    start and boundary as ``window`` has them,

    up to rounding: equal to the forward over the whole window, of which only the new token is computed.

    Args:
        model: in evaluation mode.
        prompt: int64 or int32 [B, M].
        prefix_length: see ``generate``.
        stride: see ``generate``.
        length: most tokens the sequence will have, where it is known: less memory is allocated.

    Raises:
        TypeError, ValueError: see ``generate``.
    """

    def __init__(
        self, model: PerceiverAR, prompt: Tensor, *, prefix_length: int | None = None, stride: int | None = None,
        length: int | None = None,
    ) -> None:  # fmt: skip
        config = model.config
        first = model.check_tokens("prompt", prompt, prefix_length)
        if first > config.max_prefix:
            raise ValueError(f"prefix_length must be at most max_length - num_latents={config.max_prefix}, got {first}")
        stride = max(config.num_latents // 2, 1) if stride is None else stride
        check_count("stride", stride)
        if stride > config.num_latents:
            raise ValueError(f"stride must be at most num_latents={config.num_latents}, got {stride}")
        self.model, self.window = model, LatentWindow(first, config.num_latents, config.max_prefix, stride)
        self.tokens, self.caches = prompt, model.new_caches(length)
        self._boundary = -1
        self._logits: Tensor | None = None

    def append(self, tokens: Tensor) -> None:
        """Put one more token after every sequence, [B]."""
        self.tokens = torch.cat((self.tokens, tokens[:, None].to(self.tokens.dtype)), 1)
        self._logits = None

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, [B, vocab_size]."""
        if self._logits is None:
            self._logits = self._next_logits()
        return self._logits

    def _next_logits(self) -> Tensor:
        length = self.tokens.shape[1]
        boundary, start = self.window.boundary(length), self.window.start(length)
        if boundary != self._boundary:
            self._boundary = boundary
            for cache in self.caches:
                cache.clear()
        # The first layer has read as many tokens of the window as it has keys.
        known = self.caches[0].length
        latents = self.model.extend(self.tokens[:, start + known :], known, max(boundary - start - known, 0), None, self.caches)
        return self.model.logits(latents[:, -1:])[:, 0]


def filter_logits(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits of which only probable tokens are left, the others ``-inf``.

    ``top_k`` keeps the k largest, and those equal to the smallest of them. Of what is left ``top_p`` keeps, from the most
    probable on, the fewest tokens whose probabilities sum to ``top_p`` or more; never none.

    Args:
        logits: [B, vocab_size].
        top_k: at least 1; None: all.
        top_p: in (0, 1]; None or 1: all.

    Returns:
        [B, vocab_size].

    Raises:
        TypeError, ValueError: an argument out of its range.

    Source: top-p: The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
    """
    _check_filters(top_k, top_p)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token stays if those before it do not suffice.
        dropped = (probabilities.cumsum(-1) - probabilities) >= top_p
        dropped[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def _check_filters(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None:
        if isinstance(top_p, bool) or not isinstance(top_p, (int, float)):
            raise TypeError(f"top_p must be a number in (0, 1], got {top_p!r}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be a number in (0, 1], got {top_p!r}")


def _check_generation(max_new_tokens: int, temperature: float, eos_token: int | None, vocab_size: int) -> None:
    check_count("max_new_tokens", max_new_tokens, 0)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a finite number, at least 0, got {temperature!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number, at least 0, got {temperature!r}")
    if eos_token is not None:
        if not is_integer(eos_token):
            raise TypeError(f"eos_token must be an integer, got {eos_token!r}")
        if not 0 <= eos_token < vocab_size:
            raise ValueError(f"eos_token must be a token, 0 to {vocab_size - 1}, got {eos_token}")


def generate(
    model: PerceiverAR,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos_token: int | None = None,
    prefix_length: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Continue sequences; every step computes one token, all others are kept as keys and values.

        token ~ softmax(filter_logits(logits / temperature)),   or argmax(logits) when temperature = 0

    The logits are those of a forward over the window that ``LatentWindow`` describes, to rounding. Dropout is off.

    Args:
        prompt: int64 or int32 [B, M], M from 1 to ``max_length``.
        max_new_tokens: tokens to append; the sequence may become longer than ``max_length``, whose oldest tokens are then
            forgotten, unless the model's positions are those of a grid.
        temperature: 0 takes the most probable token.
        top_k, top_p: see ``filter_logits``.
        generator: that the tokens are drawn from; torch's own when None.
        eos_token: ends a sequence; it is then filled with this token, and generation stops when all have ended.
        prefix_length: tokens of the prompt that are no latents, at most ``max_length - num_latents``; None: all but the last
            ``num_latents``.
        stride: see ``LatentWindow``; None: half of ``num_latents``.

    Returns:
        int64 or int32 [B, M + new tokens], prompt included.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range; the message names it.
    """
    config = model.config
    _check_generation(max_new_tokens, temperature, eos_token, config.vocab_size)
    _check_filters(top_k, top_p)
    model.check_tokens("prompt", prompt, prefix_length)
    length = prompt.shape[1] + max_new_tokens
    decoder = CachedDecoder(model, prompt, prefix_length=prefix_length, stride=stride, length=length)
    if config.grid is not None and length > config.max_length:
        limit = f"max_length={config.max_length} with a grid, the prompt having M={prompt.shape[1]}"
        raise ValueError(f"max_new_tokens must leave at most {limit}, got {max_new_tokens}")
    with evaluating(model):
        ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        for _ in range(max_new_tokens):
            token = _sample(decoder.logits(), temperature, top_k, top_p, generator)
            if eos_token is not None:
                token = torch.where(ended, eos_token, token)
                ended = ended | (token == eos_token)
            decoder.append(token)
            if eos_token is not None and bool(ended.all()):
                break
    return decoder.tokens


def _sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: Any) -> Tensor:
    """One token of every row, int64 [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    # In 16 bits the sum of the probabilities of a large vocabulary would be far off.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    filtered = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(filtered.softmax(-1), 1, generator=generator)[:, 0]
