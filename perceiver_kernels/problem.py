"""Problems: what one call asks for, checked once, with every axis named.

``Problem.of(...)`` is the only place that validates tensors. A problem holds plain values, no tensors. Its *static* part (all
but the sizes that vary between calls) decides which backend serves it; the sizes decide how (plan.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from perceiver_kernels.masks import Causal, Masks, check_starts

MAX_CHANNELS = 1024
CHANNEL_MULTIPLE = 16
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pad_channels(channels: int) -> int:
    """``channels`` rounded up to a multiple of 16: rows of 16 bytes or more, as TMA descriptors need."""
    return -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def _is_positive(number: float) -> bool:
    """A plain bool even where torch.compile has made a symbol of the number."""
    if number > 0.0:  # noqa: SIM103 (the comparison itself would be a symbol)
        return True
    return False


_CONSTANTS = tuple(range(4 * MAX_CHANNELS + 1))


def constant(size: int) -> int:
    """``size`` as a plain number: torch.compile(dynamic=True) makes symbols of channel counts too, an index makes it look."""
    return _CONSTANTS[size] if size < len(_CONSTANTS) else size


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    if tensor.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} must be [{axes}], got {shape_of(tensor)}")


def check_shape(name: str, tensor: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    """Compare ``tensor.shape`` with ``expected``; the message names each axis that was expected."""
    if shape_of(tensor) != tuple(expected):
        names = [axis.strip() for axis in axes.split(",")]
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(names, expected, strict=True))
        raise ValueError(f"{name} must be [{axes}] with {sizes}, got {shape_of(tensor)}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """``tensor`` must have the dtype and device of ``other``."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {tensor.dtype}")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}")


def check_scale(scale: float | None) -> None:
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, got {scale!r}")


def check_probability(name: str, p: float) -> None:
    if not (isinstance(p, (int, float)) and 0.0 <= p < 1.0):
        raise ValueError(f"{name} must be in [0, 1), got {p!r}")


def check_eps(eps: float) -> None:
    if not (isinstance(eps, (int, float)) and 0.0 <= eps < math.inf):
        raise ValueError(f"eps must be a finite number, at least 0, got {eps!r}")


def check_key_visibility(key_mask: Tensor | None, lengths: Tensor | None, B: int, M: int, device: torch.device) -> None:
    """A key mask is bool [B, M], True where a token is visible; lengths are int32 [B]; not both."""
    if key_mask is not None and lengths is not None:
        raise ValueError("key_mask and lengths exclude each other: give one of them")
    if key_mask is not None:
        check_tensor("key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(
                f"key_mask must be torch.bool (True = the token is visible), got {key_mask.dtype}, "
                "whose polarity is ambiguous; convert it with .bool() or ~mask.bool()"
            )
        check_shape("key_mask", key_mask, "B, M", (B, M))
        if key_mask.device != device:
            raise ValueError(f"key_mask must be on {device}, got {key_mask.device}")
    if lengths is not None:
        check_tensor("lengths", lengths)
        if lengths.dtype != torch.int32:
            raise TypeError(f"lengths must be torch.int32 [B], got {lengths.dtype}")
        check_shape("lengths", lengths, "B", (B,))
        if lengths.device != device:
            raise ValueError(f"lengths must be on {device}, got {lengths.device}")


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Problem:
    """Base of all problems; ``SIZES`` names the fields that vary between calls of the same compiled model."""

    OP: ClassVar[str] = ""
    SIZES: ClassVar[tuple[str, ...]] = ()
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def static_values(self) -> tuple[Any, ...]:
        """The field values with every size replaced by -1: what choosing a backend may depend on."""
        sizes = self.SIZES
        return tuple([-1 if name in sizes else getattr(self, name) for name in self.FIELDS])

    def with_sizes(self, **sizes: int) -> Any:
        return replace(self, **sizes)


@dataclass(frozen=True)
class PackProblem(Problem):
    """Normalise, concatenate, pad and cast inputs: [B, M, C_content] (+ positions) to [B, M, C_padded]."""

    OP: ClassVar[str] = "pack_inputs"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "M", "C_content", "C_positions")

    B: int
    M: int
    C_content: int
    C_positions: int
    content_dtype: torch.dtype
    dtype: torch.dtype
    device_type: str
    fourier: bool
    positions_batched: bool
    normalize: bool
    masked: bool
    needs_grad: bool

    @property
    def C(self) -> int:
        return self.C_content + self.C_positions

    @property
    def C_padded(self) -> int:
        return pad_channels(self.C)

    @classmethod
    def of(
        cls,
        content: Tensor,
        positions: Tensor | None,
        fourier: Tensor | None,
        key_mask: Tensor | None,
        lengths: Tensor | None,
        normalize: bool,
        dtype: torch.dtype | None,
    ) -> PackProblem:
        """Check the tensors of one pack: content [B, M, C_content], positions [M, P] or [B, M, P], fourier [3, F]."""
        check_tensor("content", content)
        check_floating("content", content)
        check_rank("content", content, "B, M, C_content")
        B, M, C_content = *content.shape[:2], constant(content.shape[2])
        C_positions, batched = 0, False
        if positions is not None:
            check_tensor("positions", positions)
            check_floating("positions", positions)
            check_device("positions", positions, "content", content)
            batched = positions.ndim == 3
            if batched:
                check_shape("positions", positions, "B, M, P", (B, M, positions.shape[-1]))
            else:
                check_rank("positions", positions, "M, P")
                check_shape("positions", positions, "M, P", (M, positions.shape[-1]))
            C_positions = positions.shape[-1] if fourier is None else fourier.shape[-1]
        channels = C_content + C_positions
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"content and positions must have 1 to {MAX_CHANNELS} channels together, got {channels}")
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        check_key_visibility(key_mask, lengths, B, M, content.device)
        return cls(
            B=B, M=M, C_content=C_content, C_positions=C_positions, content_dtype=content.dtype,
            dtype=dtype or content.dtype, device_type=content.device.type, fourier=fourier is not None,
            positions_batched=batched, normalize=normalize,
            masked=key_mask is not None or lengths is not None, needs_grad=needs_gradient(content, positions),
        )  # fmt: skip


@dataclass(frozen=True)
class SharedKVProblem(Problem):
    """z = softmax(scale q x^T) x with keys and values one tensor: q [B, R, C], x [B, M, C]."""

    OP: ClassVar[str] = "shared_kv_attention"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "R", "M", "C")

    B: int
    R: int
    M: int
    C: int
    dtype: torch.dtype
    device_type: str
    masked: bool
    dropout: bool
    needs_lse: bool
    needs_grad: bool

    @classmethod
    def of(
        cls, q: Tensor, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None, scale: float, dropout_p: float,
        needs_lse: bool,
    ) -> SharedKVProblem:  # fmt: skip
        """Check q [B, R, C], x [B, M, C], key_mask bool [B, M] or lengths int32 [B]."""
        for name, tensor, axes in (("q", q, "B, R, C"), ("x", x, "B, M, C")):
            check_tensor(name, tensor)
            check_floating(name, tensor)
            check_rank(name, tensor, axes)
        B, R, C = *q.shape[:2], constant(q.shape[2])
        M = x.shape[1]
        if not 1 <= C <= MAX_CHANNELS:
            raise ValueError(f"q must have 1 to {MAX_CHANNELS} channels, got C={C}")
        check_shape("x", x, "B, M, C", (B, M, C))
        check_like("x", x, "q", q)
        check_key_visibility(key_mask, lengths, B, M, q.device)
        check_scale(scale)
        check_probability("dropout_p", dropout_p)
        return cls(
            B=B, R=R, M=M, C=C, dtype=q.dtype, device_type=q.device.type,
            masked=key_mask is not None or lengths is not None, dropout=_is_positive(dropout_p), needs_lse=needs_lse,
            needs_grad=needs_gradient(q, x),
        )  # fmt: skip


MaskKind = Literal["none", "boolean", "additive", "learned"]


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """out = softmax(scale q k^T + mask) v: query [B, H, Lq, d_qk], key [B, H_kv, Lk, d_qk], value [B, H_kv, Lk, d_v].

    Lk counts the keys of both segments where there are two, Lk_first those of the first.
    """

    OP: ClassVar[str] = "attention"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "H", "H_kv", "Lq", "Lk", "Lk_first")

    B: int
    H: int
    H_kv: int
    Lq: int
    Lk: int
    Lk_first: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    device_type: str
    attn_mask: MaskKind = "none"
    key_mask: bool = False
    lengths: bool = False
    query_mask: bool = False
    packed: bool = False
    causal: Causal = "none"
    segments: int = 1
    dropout: bool = False
    needs_lse: bool = False
    needs_grad: bool = False

    @classmethod
    def of(
        cls, query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], masks: Masks, dropout_p: float = 0.0,
        scale: float | None = None, enable_gqa: bool = False, needs_lse: bool = False,
    ) -> AttentionProblem:  # fmt: skip
        """Check the tensors of one attention call; batches and heads of key and value may be broadcast (size 1)."""
        if len(keys) != len(values) or len(keys) not in (1, 2):
            raise ValueError(f"key and value must be tensors or pairs of segments alike, got {len(keys)} and {len(values)}")
        names = [("key", "value")] if len(keys) == 1 else [("key[0]", "value[0]"), ("key[1]", "value[1]")]
        check_tensor("query", query)
        check_floating("query", query)
        check_rank("query", query, "B, H, Lq, d_qk")
        B, H, Lq, d_qk = query.shape
        if not (H and d_qk):
            raise ValueError(f"query must be [B, H, Lq, d_qk] with H and d_qk at least 1, got {shape_of(query)}")
        for (key_name, value_name), key, value in zip(names, keys, values, strict=True):
            for name, tensor, axes in ((key_name, key, "B, H, Lk, d_qk"), (value_name, value, "B, H, Lk, d_v")):
                check_tensor(name, tensor)
                check_floating(name, tensor)
                check_rank(name, tensor, axes)
            key_B, H_kv, Lk, d_v = keys[0].shape[0], keys[0].shape[1], key.shape[2], values[0].shape[3]
            check_shape(key_name, key, "B, H, Lk, d_qk", (key_B, H_kv, Lk, d_qk))
            check_shape(value_name, value, "B, H, Lk, d_v", (key_B, H_kv, Lk, d_v))
            check_like(key_name, key, "query", query)
            check_like(value_name, value, "query", query)
        B = max(B, key_B)
        if key_B not in (1, B) or query.shape[0] not in (1, B):
            raise ValueError(f"query and key must have one batch size (or 1), got {query.shape[0]} and {key_B}")
        if H_kv not in (1, H) and not (enable_gqa and H_kv and H % H_kv == 0):
            hint = "a divisor of the query heads" if enable_gqa else "the query heads or 1 (see enable_gqa)"
            raise ValueError(f"key must have {hint}, H={H}, got H={H_kv}")
        check_scale(scale)
        check_probability("dropout_p", dropout_p)
        Lk = sum(key.shape[2] for key in keys)
        _check_masks(masks, B, H, Lq, Lk, query, len(keys))
        return cls(
            B=B, H=H, H_kv=H_kv, Lq=Lq, Lk=Lk, Lk_first=keys[0].shape[2], d_qk=constant(d_qk), d_v=constant(d_v),
            dtype=query.dtype, device_type=query.device.type, attn_mask=_mask_kind(masks.attn_mask),
            key_mask=masks.key_mask is not None, lengths=masks.lengths is not None,
            query_mask=masks.query_mask is not None, packed=masks.packed, causal=masks.causal, segments=len(keys),
            dropout=_is_positive(dropout_p), needs_lse=needs_lse,
            needs_grad=needs_gradient(query, *keys, *values, masks.attn_mask),
        )  # fmt: skip


def _mask_kind(attn_mask: Tensor | None) -> MaskKind:
    if attn_mask is None:
        return "none"
    if attn_mask.dtype == torch.bool:
        return "boolean"
    return "learned" if needs_gradient(attn_mask) else "additive"


def _check_masks(masks: Masks, B: int, H: int, Lq: int, Lk: int, query: Tensor, segments: int) -> None:
    if masks.attn_mask is not None and masks.causal != "none":
        raise ValueError("attn_mask excludes is_causal: fold them into one mask")
    check_key_visibility(masks.key_mask, masks.lengths, B, Lk, query.device)
    if masks.query_mask is not None:
        check_tensor("query_mask", masks.query_mask)
        if masks.query_mask.dtype != torch.bool:
            raise TypeError(f"query_mask must be torch.bool (True = the query sees keys), got {masks.query_mask.dtype}")
        check_shape("query_mask", masks.query_mask, "B, Lq", (B, Lq))
        check_device("query_mask", masks.query_mask, "query", query)
    if masks.attn_mask is not None:
        mask = masks.attn_mask
        check_tensor("attn_mask", mask)
        if mask.dtype not in (torch.bool, query.dtype, torch.float32):
            raise TypeError(f"attn_mask must be bool, float32 or query's dtype {query.dtype}, got {mask.dtype}")
        check_device("attn_mask", mask, "query", query)
        scores = (B, H, Lq, Lk)
        sizes = zip(mask.shape[::-1], scores[::-1], strict=False)
        if mask.ndim > 4 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(f"attn_mask must broadcast to [B, H, Lq, Lk] = {scores}, got {shape_of(mask)}")
    _check_packing(masks, B, Lq, Lk, query, segments)


def _check_packing(masks: Masks, B: int, Lq: int, Lk: int, query: Tensor, segments: int) -> None:
    """Packed sequences: int32 starts that begin at 0, never decrease and end at the token count."""
    starts = {"cu_seqlens_q": masks.cu_seqlens_q, "cu_seqlens_k": masks.cu_seqlens_k}
    given = [name for name, value in starts.items() if value is not None]
    if not given:
        return
    if len(given) == 1:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be given together, got {given[0]} alone")
    if B != 1 or segments != 1:
        raise ValueError(f"packed sequences must lie in one batch entry and one segment, got B={B} and {segments} segments")
    for name in ("key_mask", "lengths", "query_mask", "attn_mask"):
        if getattr(masks, name) is not None:
            raise ValueError(f"{name} excludes cu_seqlens_q and cu_seqlens_k: leave hidden tokens out of the sequences")
    for name, total in (("cu_seqlens_q", Lq), ("cu_seqlens_k", Lk)):
        value = starts[name]
        check_tensor(name, value)
        assert value is not None
        if value.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32 [sequences + 1], got {value.dtype}")
        if value.ndim != 1 or value.shape[0] < 1:
            raise ValueError(f"{name} must be [sequences + 1], got {shape_of(value)}")
        check_device(name, value, "query", query)
        check_starts(name, value, total)
    sizes = [value.shape[0] for value in starts.values() if value is not None]
    if sizes[0] != sizes[1]:
        raise ValueError(f"cu_seqlens_k must have cu_seqlens_q's {sizes[0]} entries, got {sizes[1]}")


@dataclass(frozen=True)
class CrossAttentionProblem(Problem):
    """Input-to-latent cross-attention with its key and value projections: what the absorbed-or-projected choice needs."""

    OP: ClassVar[str] = "input_cross_attention"
    SIZES: ClassVar[tuple[str, ...]] = ("B", "H", "N", "M", "C", "d_qk", "d_v")

    B: int
    H: int
    N: int
    M: int
    C: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    device_type: str
    packed: bool
    needs_grad: bool
    inputs_need_grad: bool

    @classmethod
    def of(
        cls, q: Tensor, w_k: Tensor, w_v: Tensor, *, B: int, M: int, C: int, dtype: torch.dtype, packed: bool,
        inputs_need_grad: bool,
    ) -> CrossAttentionProblem:  # fmt: skip
        """Check q [B or 1, H, N, d_qk], w_k [H*d_qk, C] and w_v [H*d_v, C] against inputs of [B, M, C]."""
        for name, tensor, axes in (("q", q, "B, H, N, d_qk"), ("w_k", w_k, "H*d_qk, C"), ("w_v", w_v, "H*d_v, C")):
            check_tensor(name, tensor)
            check_floating(name, tensor)
            check_rank(name, tensor, axes)
            check_device(name, tensor, "q", q)
        H, N, d_qk, C = constant(q.shape[1]), q.shape[2], constant(q.shape[3]), constant(C)
        if q.shape[0] not in (1, B) or not (H and d_qk):
            raise ValueError(f"q must be [B, H, N, d_qk] with B={B} or 1, H and d_qk at least 1, got {shape_of(q)}")
        if not 1 <= C <= MAX_CHANNELS:
            raise ValueError(f"inputs must have 1 to {MAX_CHANNELS} channels, got C={C}")
        # Weights may come with zero columns up to C_padded.
        if shape_of(w_k) != (H * d_qk, pad_channels(C)):
            check_shape("w_k", w_k, "H*d_qk, C", (H * d_qk, C))
        if w_v.shape[0] % H or not w_v.shape[0]:
            raise ValueError(f"w_v must be [H*d_v, C] with H={H}, d_v at least 1, got {shape_of(w_v)}")
        if w_v.shape[1] != pad_channels(C):
            check_shape("w_v", w_v, "H*d_v, C", (w_v.shape[0], C))
        return cls(
            B=B, H=H, N=N, M=M, C=C, d_qk=d_qk, d_v=w_v.shape[0] // H, dtype=dtype,
            device_type=q.device.type, packed=packed, needs_grad=needs_gradient(q, w_k, w_v), inputs_need_grad=inputs_need_grad,
        )  # fmt: skip


PROBLEMS = {cls.OP: cls for cls in (PackProblem, SharedKVProblem, AttentionProblem, CrossAttentionProblem)}
for _problem in PROBLEMS.values():
    _problem.FIELDS = tuple(field.name for field in fields(_problem))
