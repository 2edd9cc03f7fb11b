"""pack_inputs on every backend: one body, whose sizes and backends the machine decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.backends import composite
from perceiver_kernels.dispatch import load
from perceiver_kernels.ops import pack as op
from perceiver_kernels.positions import grid_coordinates
from perceiver_kernels.problem import PackProblem, pad_channels
from perceiver_kernels.testing import (
    ENCODE,
    LAYOUTS,
    assert_as_accurate,
    column_major,
    nan_tail,
    poisoned_memory,
    same_bits,
)
from perceiver_kernels.testing.targets import Target, machine, one_for_each_width

OP = "pack_inputs"
WIDTHS = sorted({case.C for case in one_for_each_width(ENCODE.values())} | {1, 2, 15, 16, 17, 31, 33, 1023})
POSITIONS = ("none", "shared", "batched", "fourier", "fourier batched", "points")
FOURIER = pk.FourierPositions(5, (9.0, 7.0))
TURNS = pk.FourierPositions(64, (1120.0, 1120.0))
if machine() == "gpu":
    WIDTHS = [1, 17, 261, 322, 487, 704, 1024]


@dataclass
class Call:
    """One pack: what the token slice holds, the gradient of the result, options."""

    content: Tensor
    positions: Tensor | None
    fourier: Tensor | None
    key_mask: Tensor | None
    dpacked: Tensor
    options: dict[str, Any]

    @property
    def channels(self) -> int:
        return self.content.shape[2] + (self.table_width if self.positions is not None else 0)

    @property
    def table_width(self) -> int:
        return self.positions.shape[-1] if self.fourier is None else self.fourier.shape[-1]

    def wide(self) -> Call:
        """The same values in fp64."""
        positions = None if self.positions is None else self.positions.double()
        fourier = None if self.fourier is None else self.fourier.double()
        options = {**self.options, "dtype": torch.float64}
        return Call(self.content.double(), positions, fourier, self.key_mask, self.dpacked.double(), options)


def call_of(
    target: Target, B: int, M: int, C_content: int, positions: str = "none", *, normalize: bool = True, masked: bool = False,
    content_dtype: torch.dtype | None = None, fourier: pk.FourierPositions = FOURIER,
) -> Call:  # fmt: skip
    generator = torch.Generator().manual_seed(M + C_content)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = content_dtype or target.dtype
    channels = {
        "none": None, "shared": randn(M, 5), "batched": randn(B, M, 5), "fourier": randn(M, 2).tanh(),
        "fourier batched": randn(B, M, 2).tanh(), "points": randn(B, M, 2).tanh(),
    }[positions]  # fmt: skip
    table = fourier.table() if "fourier" in positions or positions == "points" else None
    if channels is not None and table is None:
        channels = channels.to(dtype)
    content = (0.5 + 2 * randn(B, M, 0 if positions == "points" else C_content)).to(dtype)
    mask = torch.rand(B, M, generator=generator) < 0.6 if masked else None
    if mask is not None:
        mask[-1] = False
        # What a hidden token holds must not matter.
        content.masked_fill_(~mask[..., None], float("nan"))
        if channels is not None:
            hidden = ~mask if channels.ndim == 3 else ~mask.any(0)
            channels.masked_fill_(hidden[..., None], float("nan"))
    width = content.shape[2] + (0 if channels is None else channels.shape[-1] if table is None else table.shape[-1])
    dpacked = randn(B, M, pad_channels(width)).to(target.dtype)
    tensors = (None if t is None else t.to(target.device) for t in (content, channels, table, mask, dpacked))
    return Call(*tensors, options={"normalize": normalize, "eps": 1e-5, "dtype": target.dtype})


def refusals(target: Target, call: Call, *, needs_grad: bool) -> list[str]:
    content = call.content.detach().requires_grad_(needs_grad)
    problem = PackProblem.of(
        content, call.positions, call.fourier, call.key_mask, None, call.options["normalize"], call.options["dtype"],
        call.options.get("constants", 0),
    )  # fmt: skip
    return target.refusals(problem)


def skip_if_refused(target: Target, call: Call, *, needs_grad: bool) -> None:
    if reasons := refusals(target, call, needs_grad=needs_grad):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")


def function_of(target: Target) -> Callable[..., tuple[Tensor, Tensor]]:
    module = load(OP, target.backend)
    if module.COMPOSITE:
        return module.pack_inputs

    def run(
        content: Tensor, positions: Any, fourier: Any, *, key_mask: Any, normalize: bool, eps: float, dtype: Any,
        constants: int = 0,
    ) -> Any:  # fmt: skip
        return op.pack_inputs(content, positions, fourier, key_mask, normalize, eps, dtype, (target.backend,) * 2, constants)

    return run


def results(function: Callable[..., Any], call: Call, needs_grad: bool = True) -> dict[str, Tensor]:
    content = call.content.detach().requires_grad_(needs_grad)
    packed, rstd = function(content, call.positions, call.fourier, key_mask=call.key_mask, **call.options)
    found = {"packed": packed.detach(), "rstd": rstd.detach()}
    if needs_grad:
        (found["dcontent"],) = torch.autograd.grad(packed, content, call.dpacked)
    return found


def check(target: Target, call: Call, *, needs_grad: bool = True) -> dict[str, Tensor]:
    needs_grad = needs_grad and call.content.shape[2] > 0
    skip_if_refused(target, call, needs_grad=needs_grad)
    actual = results(function_of(target), call, needs_grad)
    eager = results(reference.pack_inputs, call, needs_grad)
    if needs_grad and target.is_kernel:
        eager["dcontent"] = eager_backward(call, eager)
    oracle = results(reference.pack_inputs, call.wide(), needs_grad)
    constants = call.options.get("constants", 0)
    assert actual["packed"].shape[-1] == pad_channels(call.channels + constants)
    assert not actual["packed"][..., call.channels + constants :].any()
    for name, value in actual.items():
        terms = gradient_terms(call, oracle) if name == "dcontent" else None
        assert_as_accurate(value, eager[name], oracle[name], f"{target} {name}", terms=terms)
    return actual


def eager_backward(call: Call, eager: dict[str, Tensor]) -> Tensor:
    """PyTorch's gradient from what kernels keep, the packed rows: x_hat rounded to their dtype, not the content."""
    gradient = composite.pack_inputs_backward(
        call.dpacked, eager["packed"], eager["rstd"], content_channels=call.content.shape[2], channels=call.channels,
        normalize=call.options["normalize"], dtype=call.content.dtype,
    )  # fmt: skip
    return gradient if call.key_mask is None else gradient.masked_fill(~call.key_mask[..., None], 0)


def gradient_terms(call: Call, oracle: dict[str, Tensor]) -> Tensor:
    """rstd (|dy| + mean |dy| + |x_hat| mean |dy x_hat|): what the LayerNorm gradient adds up, without cancellation."""
    dy = call.dpacked[..., : call.channels].double().abs()
    if call.options["normalize"]:
        x_hat = oracle["packed"][..., : call.channels].abs()
        dy = dy + dy.mean(-1, keepdim=True) + x_hat * (dy * x_hat).mean(-1, keepdim=True)
        dy = dy * oracle["rstd"][..., None]
    return dy[..., : call.content.shape[2]]


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("C", WIDTHS)
def test_widths(target: Target, C: int, normalize: bool) -> None:
    check(target, call_of(target, 2, 7, C, normalize=normalize), needs_grad=normalize or C % 16 == 1)


@pytest.mark.parametrize("masked", [False, True], ids=["all visible", "masked"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions(target: Target, positions: str, normalize: bool, masked: bool) -> None:
    found = check(target, call_of(target, 3, 13, 4, positions, normalize=normalize, masked=masked))
    if masked:
        assert not any(found[name][-1].any() for name in found if found[name].numel())


@pytest.mark.parametrize("constants", [1, 2])
@pytest.mark.parametrize(("C", "positions"), [(14, "none"), (15, "none"), (16, "none"), (65, "shared"), (4, "fourier")])
def test_ones_follow_the_channels(target: Target, C: int, positions: str, constants: int) -> None:
    """They are no part of the statistics, have no gradient, and hidden tokens have none of them."""
    call = call_of(target, 2, 7, C, positions, masked=True)
    call.options["constants"] = constants
    missing = pad_channels(call.channels + constants) - call.dpacked.shape[-1]
    call.dpacked = torch.nn.functional.pad(call.dpacked, (0, missing), value=3.0)
    ones = check(target, call)["packed"][..., call.channels : call.channels + constants]
    assert torch.equal(ones, call.key_mask[..., None].to(ones).expand_as(ones))


@pytest.mark.parametrize("positions", ["none", "shared", "fourier"])
def test_forward_alone(target: Target, positions: str) -> None:
    """Data needs no gradient: a backend that only packs forward serves it."""
    check(target, call_of(target, 2, 21, 21, positions), needs_grad=False)


@pytest.mark.parametrize(("B", "M"), [(0, 5), (3, 0), (1, 1), (1, 3), (2, 5), (5, 129)])
@pytest.mark.parametrize("positions", ["none", "fourier"])
def test_sizes(target: Target, B: int, M: int, positions: str) -> None:
    check(target, call_of(target, B, M, 3, positions))


@pytest.mark.parametrize("content_dtype", [torch.float32, torch.float16], ids=str)
def test_casts(target: Target, content_dtype: torch.dtype) -> None:
    """Statistics are of the content as it comes, in fp32: only the result is in the requested dtype."""
    check(target, call_of(target, 2, 9, 19, content_dtype=content_dtype))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_are_centred(target: Target, offset: float) -> None:
    """A large common offset, and rows of one value whose variance is 0: E[x^2] - E[x]^2 would cancel."""
    call = call_of(target, 2, 8, 37, content_dtype=torch.float32)
    call.content = call.content + offset
    call.content[:, ::3] = offset
    check(target, call)


def test_high_frequencies_keep_their_phase(target: Target) -> None:
    """560 half turns at the highest band of a point cloud: fp32 sine of the whole angle, without range reduction, is off."""
    call = call_of(target, 1, 40, 0, "points", normalize=False, fourier=TURNS)
    call.positions = torch.linspace(-1, 1, 80, device=target.device).view(1, 40, 2)
    check(target, call)


@pytest.mark.parametrize("positions", ["none", "batched"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "column major"])
def test_layouts(target: Target, layout: str, positions: str) -> None:
    """Any strides: channels first as images have them, gaps, poison beside the values; no bit changes.

    On a GPU the compiler spreads a row over lanes as its strides suggest, and with the lanes the order of its sums changes:
    there the results are compared with fp64.
    """
    call = call_of(target, 3, 11, 21, positions)
    skip_if_refused(target, call, needs_grad=True)
    plain = results(function_of(target), call)
    lay = {**LAYOUTS, "column major": column_major}[layout]
    laid_out = replace(call, content=lay(call.content), dpacked=lay(call.dpacked))
    if call.positions is not None:
        laid_out.positions = lay(call.positions)
    if not target.is_kernel or machine() == "gpu":
        check(target, laid_out)
        return
    found = results(function_of(target), laid_out)
    assert [name for name in plain if not same_bits(plain[name], found[name])] == []


@pytest.mark.parametrize("positions", ["none", "shared", "fourier batched"])
def test_fresh_memory_and_repetition_change_no_bit(target: Target, positions: str) -> None:
    call = call_of(target, 3, 11, 21, positions, masked=True)
    skip_if_refused(target, call, needs_grad=True)
    first = results(function_of(target), call)
    with poisoned_memory():
        poisoned = results(function_of(target), call)
    again = results(function_of(target), call)
    for other in (poisoned, again):
        assert [name for name in first if not same_bits(first[name], other[name])] == []


def test_poison_after_the_positions_is_not_read(target: Target) -> None:
    call = call_of(target, 2, 11, 21, "shared")
    skip_if_refused(target, call, needs_grad=False)
    plain = results(function_of(target), call, needs_grad=False)
    call.positions = nan_tail(call.positions)
    found = results(function_of(target), call, needs_grad=False)
    assert same_bits(plain["packed"], found["packed"])


def test_public_function_on_a_grid(target: Target) -> None:
    """[B, H, W, C] content with Fourier positions is the specification on explicit coordinates and features."""
    content = torch.randn(2, 5, 3, 4).to(target.device, target.dtype)
    fourier = pk.FourierPositions(6, (5.0, 3.0))
    mask = torch.rand(2, 15).to(target.device) < 0.7
    problem = PackProblem.of(content.flatten(1, 2), torch.zeros(15, 2, device=target.device), fourier.table(target.device),
                             mask, None, True, None)  # fmt: skip
    if reasons := target.refusals(problem):
        pytest.skip(f"{target.backend}: {'; '.join(reasons)}")
    packed = pk.pack_inputs(content, fourier, key_mask=mask, backend=target.backend)
    coordinates = grid_coordinates((5, 3), device=target.device)
    eager, oracle = (
        reference.pack_inputs(
            content.flatten(1, 2).to(dtype),
            reference.fourier_features(coordinates.to(wide), 6, (5.0, 3.0)).to(dtype if dtype == wide else wide),
            key_mask=mask, dtype=dtype,
        )[0]
        for dtype, wide in ((target.dtype, torch.float32), (torch.float64, torch.float64))
    )  # fmt: skip
    assert (packed.channels, packed.normalized) == (30, True) and packed.key_mask is mask
    assert_as_accurate(packed.data, eager, oracle, f"{target} packed")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_trained_coordinates_get_their_gradient(target: Target, batched: bool, normalize: bool) -> None:
    """Features of coordinates that require a gradient are computed before packing: gradients of both, the same values."""
    call = call_of(target, 2, 23, 3, "fourier batched" if batched else "fourier", normalize=normalize, masked=True)
    skip_if_refused(target, replace(call, fourier=None), needs_grad=True)
    if batched:
        call.positions[~call.key_mask] = float("nan")

    def gradients(call: Call, function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (call.content, call.positions)]
        packed = function(*leaves)
        return [packed.detach(), *torch.autograd.grad(packed, leaves, call.dpacked)]

    def specified(call: Call) -> list[Tensor]:
        options = {"key_mask": call.key_mask, **call.options}
        return gradients(call, lambda content, places: reference.pack_inputs(content, places, call.fourier, **options)[0])

    def from_packed_rows(content: Tensor, places: Tensor) -> Tensor:
        """PyTorch's gradient from what kernels keep, see eager_backward."""
        apart = {"key_mask": call.key_mask, "normalize": False, "channels_multiple": 1, "dtype": torch.float32}
        joined, _ = reference.pack_inputs(content, places, call.fourier, **apart)
        return op.pack_inputs(joined, None, None, call.key_mask, normalize, 1e-5, target.dtype, ("reference",) * 2)[0]

    def packed(content: Tensor, coordinates: Tensor) -> Tensor:
        options = {"coordinates": coordinates, "key_mask": call.key_mask, "normalize": normalize, "backend": target.backend}
        return pk.pack_inputs(content, FOURIER, **options).data

    eager = gradients(call, from_packed_rows) if target.is_kernel else specified(call)
    actual, oracle = gradients(call, packed), specified(call.wide())
    for name, *values in zip(("packed", "dcontent", "dcoordinates"), actual, eager, oracle, strict=True):
        assert_as_accurate(*values, f"{target} {name}")
    # Without a gradient the features are the kernel's own, where it has them.
    if not refusals(target, call, needs_grad=False):
        with torch.no_grad():
            torch.testing.assert_close(packed(call.content, call.positions), actual[0])


def test_bytes_are_normalised_before_they_are_rounded(target: Target) -> None:
    """Bytes that differ by little, whose difference 16 bits of the bytes themselves would round away."""
    images = torch.randint(250, 253, (2, 4, 3, 5), dtype=torch.uint8).to(target.device)
    raw, options = pk.InputArray.image(images, torch.zeros(15, 0)), {"dtype": target.dtype, "backend": target.backend}
    floats = raw.content.float() / 255
    packed, expected = (pk.pack_inputs(inputs, **options).data for inputs in (raw, floats))
    # The two lie differently in memory, and sums in another order differ by 1e-7 / std(x) = 1e-4.
    torch.testing.assert_close(packed, expected, rtol=torch.finfo(target.dtype).eps, atol=1e-3)


def test_what_the_automatic_choice_looks_at() -> None:
    """Chunks of several entries have gaps between them; channels are counted with those of positions."""
    content, positions = torch.zeros(2, 8, 5), torch.zeros(8, 2)
    assert op.choice_sizes(content, None, None) == (16, 5, 4, 1)
    assert op.choice_sizes(content[:, :4], None, None) == (8, 5, 4, 0)
    assert op.choice_sizes(content[:1, :4], None, None) == (4, 5, 4, 1)
    assert op.choice_sizes(content.half(), positions, None) == (16, 7, 2, 0)
    assert op.choice_sizes(content, positions, FOURIER.table()) == (16, 5 + FOURIER.table().shape[-1], 4, 0)
