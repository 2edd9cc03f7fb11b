"""Packing: inputs normalised, joined with their positions, padded and cast, once for all layers that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.dispatch import load, select
from perceiver_kernels.functional.common import autocast_dtype, visible
from perceiver_kernels.inputs import FourierPositions, InputArray, PackedInputs, grid_coordinates
from perceiver_kernels.ops import pack as pack_op
from perceiver_kernels.problem import PackProblem, check_tensor


def _pack(
    content: Tensor, positions: Tensor | None, fourier: Tensor | None, key_mask: Tensor | None, lengths: Tensor | None,
    normalize: bool, eps: float, dtype: torch.dtype | None, backend: str | None,
) -> PackedInputs:  # fmt: skip
    if positions is not None and fourier is None and torch.is_grad_enabled() and positions.requires_grad:
        # Learned positions: the gradient that reaches both parts flows through one concatenation.
        content = torch.cat([content, positions.to(content.dtype).expand(content.shape[0], -1, -1)], -1)
        positions = None
    problem = PackProblem.of(content, positions, fourier, key_mask, lengths, normalize, dtype)
    if _is_packed_already(content, problem):
        return PackedInputs(content, problem.C, False, None, None)
    name = select(problem, backend)
    key_visible = visible(key_mask, lengths, problem.M)
    module = load(problem.OP, name)
    if module.COMPOSITE:
        data, _ = module.pack_inputs(
            content, positions, fourier, key_mask=key_visible, normalize=normalize, eps=eps, dtype=problem.dtype
        )
        data = data.contiguous()
    else:
        data, _ = pack_op.pack_inputs(content, positions, fourier, key_visible, normalize, eps, problem.dtype, name)
    return PackedInputs(data, problem.C, normalize, key_mask, lengths)


def _is_packed_already(content: Tensor, problem: PackProblem) -> bool:
    """Whether ``content`` can serve as packed inputs as it lies: nothing to compute and rows of 16-byte multiples."""
    return (
        not problem.normalize
        and not problem.masked
        and problem.C_positions == 0
        and problem.C_padded == problem.C
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
    backend: str | None = None,
) -> PackedInputs:
    """Inputs as every cross-attention of a model reads them: ``x_hat = (x - mean) / sqrt(var + eps)``, padded and cast.

    x is content and positions side by side; statistics are over its C real channels, in fp32. Fourier features are
    computed while packing and stored nowhere else. One pass over the inputs; the result serves any number of layers.

    Args:
        content: float ``[B, M, C_content]`` or ``[B, *grid, C_content]``; or an InputArray, which brings its own positions
            and masks.
        positions: channels ``[M, P]`` or ``[B, M, P]``, or FourierPositions of the grid or of ``coordinates``.
        coordinates: ``[M, axes]`` or ``[B, M, axes]`` in ``[-1, 1]`` for FourierPositions; None takes the dense grid.
        key_mask: bool ``[B, M]``, True where a token is visible; masked tokens are packed as zeros whatever they hold.
        lengths: int32 ``[B]``, instead of ``key_mask``.
        normalize: False packs x itself; where nothing has to be computed the result is a view of ``content``.
        eps: added to the variance.
        dtype: of the result; None is autocast's where autocast is on, else content's.
        backend: a backend's name; it never falls back.

    Returns:
        PackedInputs with data ``[B, M, C_padded]``, C_padded = C rounded up to 16.

    Raises:
        TypeError: integer content (InputArray takes uint8). ValueError: shapes, devices, more than 1024 channels.

    Source: Ba et al. 2016 (LayerNorm); Jaegle et al. 2021, section 3.2 (Fourier positions).
    """
    if isinstance(content, InputArray):
        if not (positions is None and coordinates is None and key_mask is None and lengths is None):
            raise ValueError("an InputArray brings its own positions, coordinates, key_mask and lengths")
        inputs = content
        part = inputs.slice(dtype=dtype or torch.get_default_dtype() if not inputs.content.is_floating_point() else None)
        dtype = dtype or autocast_dtype(part.content)
        return _pack(
            part.content, part.positions, part.fourier, inputs.key_mask, inputs.lengths, normalize, eps, dtype, backend
        )
    check_tensor("content", content)
    if content.ndim < 3:
        raise ValueError(f"content must be [B, M, C_content] or [B, *grid, C_content], got {tuple(content.shape)}")
    grid = tuple(content.shape[1:-1])
    content = content.flatten(1, -2)
    fourier = None
    if isinstance(positions, FourierPositions):
        fourier = positions.table(content.device)
        if coordinates is None:
            if len(grid) != positions.num_axes:
                raise ValueError(f"positions must have one max_resolution per grid axis {grid}, got {positions.num_axes}")
            coordinates = grid_coordinates(grid, device=content.device)
        positions = coordinates
    elif coordinates is not None:
        raise ValueError("coordinates must come with FourierPositions as positions")
    dtype = dtype or autocast_dtype(content)
    return _pack(content, positions, fourier, key_mask, lengths, normalize, eps, dtype, backend)
