"""Packing: inputs normalised, joined with their positions, padded and cast, once for all layers that read them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.absorption import pad_to
from perceiver_kernels.dispatch import is_composite, load, select_passes
from perceiver_kernels.functional.common import autocast_dtype, float_dtype, visible
from perceiver_kernels.inputs import InputArray, PackedInputs, TokenSlice
from perceiver_kernels.ops import pack as pack_op
from perceiver_kernels.positions import FourierPositions, check_coordinates, grid_coordinates
from perceiver_kernels.problem import PackProblem, check_eps, check_is_tensor, needs_gradient, pad_channels, shape_of


@dataclass(frozen=True)
class Packing:
    """One call, checked and decided: everything that is left is to compute it."""

    problem: PackProblem
    part: TokenSlice
    key_mask: Tensor | None
    lengths: Tensor | None


def _on_grid(content: Tensor, positions: FourierPositions, coordinates: Tensor | None) -> Tensor:
    """Coordinates of the tokens of ``content`` [B, *grid, C_content]: those given, or the dense grid's."""
    grid = tuple(content.shape[1:-1])
    if coordinates is not None:
        check_coordinates(coordinates, positions, content.shape[0], math.prod(grid))
        return coordinates
    if len(grid) != positions.num_axes:
        raise ValueError(f"positions must have one max_resolution per grid axis {grid}, got {positions.num_axes}")
    return grid_coordinates(grid, device=content.device)


def _joined(part: TokenSlice, seen: Tensor | None) -> TokenSlice:
    """Trained positions, or features of trained coordinates, beside the content: one gradient reaches both."""
    content, positions = part.content, part.positions
    assert positions is not None
    if part.fourier is not None:
        nothing = content[..., :0]
        positions, _ = reference.pack_inputs(
            nothing, positions, part.fourier, key_mask=seen, normalize=False, channels_multiple=1,
            dtype=torch.promote_types(content.dtype, torch.float32),
        )  # fmt: skip
    if positions.dtype != content.dtype:
        wide = torch.promote_types(content.dtype, torch.float32)
        content, positions = content.to(wide), positions.to(wide)
    return TokenSlice(torch.cat([content, positions.expand(content.shape[0], -1, -1)], -1))


def resolve(
    content: Tensor | InputArray, positions: Tensor | FourierPositions | None = None, *, coordinates: Tensor | None = None,
    key_mask: Tensor | None = None, lengths: Tensor | None = None, normalize: bool = True, eps: float = 1e-5,
    dtype: torch.dtype | None = None, constants: int = 0,
) -> Packing:  # fmt: skip
    """Check every argument of pack_inputs and decide what is packed."""
    check_eps(eps)
    if isinstance(content, InputArray):
        if not (positions is None and coordinates is None and key_mask is None and lengths is None):
            raise ValueError("an InputArray brings its own positions, coordinates, key_mask and lengths")
        raw, key_mask, lengths = content.content, content.key_mask, content.lengths
        dtype = dtype or autocast_dtype(raw) or (raw.dtype if raw.is_floating_point() else torch.get_default_dtype())
        part = content.slice(dtype=float_dtype(content, dtype))
    else:
        check_is_tensor("content", content)
        if content.ndim < 3:
            raise ValueError(f"content must be [B, M, C_content] or [B, *grid, C_content], got {shape_of(content)}")
        fourier = None
        if isinstance(positions, FourierPositions):
            fourier = positions.table(content.device)
            positions = _on_grid(content, positions, coordinates)
        elif coordinates is not None:
            raise ValueError("coordinates must come with FourierPositions as positions")
        dtype = dtype or autocast_dtype(content) or content.dtype
        part = TokenSlice(content.flatten(1, -2), positions, fourier)
    problem = PackProblem.of(part.content, part.positions, part.fourier, key_mask, lengths, normalize, dtype, constants)
    if needs_gradient(part.positions):
        part = _joined(part, visible(key_mask, lengths, problem.M))
        problem = PackProblem.of(part.content, None, None, key_mask, lengths, normalize, dtype, constants)
    return Packing(problem, part, key_mask, lengths)


def normalise_wide(source: InputArray, seen: Tensor | None, normalize: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """Tokens of more channels than are packed, [B, M, C_padded] in ``dtype``: for layers that project them at any width."""
    part = source.slice(dtype=float_dtype(source, dtype))
    rows = part.content if part.positions is None else _joined(part, seen).content
    if seen is not None:
        rows = torch.where(seen[..., None], rows, 0.0)
    if normalize:
        rows = F.layer_norm(rows, rows.shape[-1:], eps=eps)
    return pad_to(rows.to(dtype), pad_channels(rows.shape[-1]))


def is_packed_already(content: Tensor, problem: PackProblem) -> bool:
    """Whether ``content`` can serve as packed inputs as it lies: nothing to compute and rows of 16-byte multiples."""
    return (
        not problem.normalize
        and not problem.masked
        and problem.C_positions == 0
        and problem.C_padded == problem.C  # no constants either
        and problem.dtype == content.dtype
        and content.stride(-1) == 1
        and content.stride(1) % 8 == 0
    )


def pack_inputs(
    content: Tensor | InputArray,
    positions: Tensor | FourierPositions | None = None,
    *,
    coordinates: Tensor | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    constants: int = 0,
    backend: str | None = None,
) -> PackedInputs:
    """Inputs as every cross-attention of a model reads them: ``x_hat = (x - mean) / sqrt(var + eps)``, padded and cast.

    x is content and positions side by side; statistics are over its C real channels, in fp32. Fourier features are
    computed while packing and stored nowhere else. One pass over the inputs; the result serves any number of layers.

    Args:
        content: float ``[B, M, C_content]`` or ``[B, *grid, C_content]``; or an InputArray, which brings its own positions
            and masks.
        positions: channels ``[M, P]`` or ``[B, M, P]``, or FourierPositions of the grid or of ``coordinates``.
        coordinates: ``[M, axes]`` or ``[B, M, axes]`` in ``[-1, 1]`` for FourierPositions; None takes the dense grid. Where
            they require a gradient their features are computed, and kept for it, before packing.
        key_mask: bool ``[B, M]``, True where a token is visible; masked tokens are packed as zeros whatever they hold.
        lengths: int32 ``[B]``, tokens visible from the front, all of them above M and none below 0; instead of ``key_mask``.
        normalize: False packs x itself; where nothing has to be computed the result is a view of ``content``.
        eps: added to the variance.
        dtype: of the result; None is autocast's where autocast is on, else content's.
        constants: channels of ones after the C real ones, in which ``output_cross_attention`` carries the biases of its
            scores: 2 (one is enough in float32 and float64). Layers that read the tokens as inputs do not see them.
        backend: a backend's name; it never falls back.

    Returns:
        PackedInputs with data ``[B, M, C_padded]``, C_padded = C + constants rounded up to 16.

    Raises:
        TypeError: integer content (InputArray takes uint8). ValueError: shapes, devices, more than 1024 channels.

    Source: Ba et al. 2016 (LayerNorm); Jaegle et al. 2021, section 3.2 (Fourier positions).
    """
    packing = resolve(
        content, positions, coordinates=coordinates, key_mask=key_mask, lengths=lengths, normalize=normalize, eps=eps,
        dtype=dtype, constants=constants,
    )  # fmt: skip
    problem, part = packing.problem, packing.part
    if is_packed_already(part.content, problem):
        return PackedInputs(part.content, problem.C, False, None, None)
    backends = select_passes(problem, backend)
    seen = visible(packing.key_mask, packing.lengths, problem.M)
    if is_composite(problem.OP, backends[0]):
        data, _ = load(problem.OP, backends[0]).pack_inputs(
            part.content, part.positions, part.fourier, key_mask=seen, normalize=normalize, eps=eps, dtype=problem.dtype,
            constants=constants,
        )  # fmt: skip
        data = data.contiguous()
    else:
        data, _ = pack_op.pack_inputs(
            part.content, part.positions, part.fourier, seen, normalize, eps, problem.dtype, backends, constants
        )
    return PackedInputs(data, problem.C, normalize, packing.key_mask, packing.lengths, constants)
