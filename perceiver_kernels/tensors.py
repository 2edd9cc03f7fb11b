"""What dataclasses of tensors share: they are told without their numbers, and move as one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="Tensors")


@dataclass(frozen=True, eq=False, repr=False)
class Tensors:
    """A dataclass with fields that are tensors."""

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """Copied to a device, a dtype or both, or itself where nothing changes; arguments as those of ``nn.Module.to``.

            inputs.to("cuda", non_blocking=True)        inputs.to(torch.bfloat16)        inputs.to("cuda", torch.bfloat16)

        A dtype is that of content, positions and data where these are floating: bytes stay bytes, masks and lengths are not
        touched, and coordinates are never made half precision, which would leave no correct bit of a high frequency's phase.
        All tensors go to a device, also those of ``InputArray``, which may well stay on the host instead: layers with
        ``chunk_size`` copy slices of it from there.

        Raises:
            TypeError: the dtype is not a floating-point type.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")

        def moved(name: str, tensor: Tensor) -> Tensor:
            casts = tensor.is_floating_point() and dtype is not None and not (name == "coordinates" and dtype.itemsize < 4)
            return tensor.to(device, dtype if casts else None, non_blocking)

        return self._with({name: moved(name, tensor) for name, tensor in self._tensors().items()})

    def pin_memory(self: T) -> T:
        """With what is in host memory in pinned host memory, from which copies to a GPU are asynchronous."""
        return self._with(
            {name: tensor.pin_memory() for name, tensor in self._tensors().items() if tensor.device.type == "cpu"}
        )

    def _tensors(self) -> dict[str, Tensor]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def _with(self: T, tensors: dict[str, Tensor]) -> T:
        changes: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor is not getattr(self, name)}
        return replace(self, **changes) if changes else self

    def __repr__(self) -> str:
        """The fields that are given; of a tensor its dtype, shape and device."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        told = (f"{name}={_brief(value)}" for name, value in given if value is not None)
        return f"{type(self).__name__}({', '.join(told)})"


def _brief(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
