"""Input arrays and packed inputs as batches: what data loaders and trainers call on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from perceiver_kernels.inputs import FourierPositions, InputArray, PackedInputs

LENGTHS = torch.tensor([1, 4], dtype=torch.int32)
FOURIER = FourierPositions(2, (4.0, 4.0))


def bytes_at_points() -> InputArray:
    coordinates = torch.rand(2, 4, 2)
    return InputArray(
        torch.zeros(2, 4, 3, dtype=torch.uint8), FOURIER, coordinates, lengths=LENGTHS, mean=(0.5,) * 3, std=(0.2,) * 3
    )


def learned() -> InputArray:
    return InputArray.tokens(torch.rand(2, 4, 3), torch.rand(4, 5), key_mask=torch.ones(2, 4, dtype=torch.bool))


def packed() -> PackedInputs:
    return PackedInputs(torch.rand(2, 4, 16), 13, True, lengths=LENGTHS, constants=2)


class TestTo:
    @pytest.mark.parametrize("make", [bytes_at_points, learned, packed])
    def test_all_tensors_go_to_a_device(self, make: Any) -> None:
        given = make()
        moved = given.to("meta", non_blocking=True)
        assert type(moved) is type(given)
        for name, value in vars(given).items():
            found = getattr(moved, name)
            if isinstance(value, Tensor):
                assert (found.device.type, found.dtype, found.shape) == ("meta", value.dtype, value.shape)
            else:
                assert found == value

    def test_a_dtype_is_of_floating_content_and_positions(self) -> None:
        moved = learned().to(torch.bfloat16)
        assert isinstance(moved.positions, Tensor) and moved.key_mask is not None
        assert (moved.content.dtype, moved.positions.dtype) == (torch.bfloat16,) * 2
        assert moved.key_mask.dtype == torch.bool
        data = packed().to(device="meta", dtype=torch.float16)
        assert (data.data.dtype, data.data.device.type, data.constants) == (torch.float16, "meta", 2)
        assert data.lengths is not None and data.lengths.dtype == torch.int32

    def test_bytes_stay_and_coordinates_are_never_half_precision(self) -> None:
        given = bytes_at_points()
        assert given.to(torch.bfloat16) is given
        wide = given.to(torch.float64)
        assert wide.content is given.content and wide.coordinates is not None and wide.coordinates.dtype == torch.float64

    def test_as_another_tensor(self) -> None:
        assert learned().to(torch.zeros(1, dtype=torch.float64)).content.dtype == torch.float64

    @pytest.mark.parametrize("make", [bytes_at_points, learned, packed])
    def test_nothing_changes_where_nothing_has_to(self, make: Any) -> None:
        given = make()
        assert given.to("cpu") is given and given.to(torch.float32) is given

    def test_integers_are_refused(self) -> None:
        with pytest.raises(TypeError, match="dtype must be a floating-point type, got torch.int32"):
            learned().to(torch.int32)


class TestPinMemory:
    @pytest.mark.parametrize("make", [bytes_at_points, learned, packed])
    def test_what_is_on_the_host(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pinning needs a GPU: here it is a copy that is counted."""
        monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
        given = make()
        pinned = given.pin_memory()
        for name, value in vars(given).items():
            found = getattr(pinned, name)
            assert (found is not value and torch.equal(found, value)) if isinstance(value, Tensor) else found == value
        elsewhere = given.to("meta")
        assert elsewhere.pin_memory() is elsewhere

    @pytest.mark.gpu
    @pytest.mark.parametrize("make", [bytes_at_points, learned, packed])
    def test_by_a_data_loader(self, make: Any) -> None:
        (batch,) = DataLoader([make()], batch_size=None, pin_memory=True)
        tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        assert tensors and all(tensor.is_pinned() for tensor in tensors)
        assert all(value.is_cuda for value in vars(batch.to("cuda", non_blocking=True)).values() if isinstance(value, Tensor))
