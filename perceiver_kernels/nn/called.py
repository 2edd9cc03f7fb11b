"""Submodules that a layer has to call, where it reads the weights of others: adapters, hooks, pruned and quantised weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from perceiver_kernels import functional
from perceiver_kernels.functional.cross_attention import on_device
from perceiver_kernels.inputs import InputArray, PackedInputs

_FORWARDS = (nn.Linear.forward, nn.LayerNorm.forward)
_WEIGHTS = (nn.Parameter, Tensor, type(None), FakeTensor, FunctionalTensor)


def is_plain(*modules: nn.Module | None) -> bool:
    """Whether calling modules is no more than a product or a norm with their weights, which may then be read instead."""
    return all(module is None or _is_plain(module) for module in modules)


def _is_plain(module: nn.Module) -> bool:
    kind: Any = type(module)
    if kind.forward not in _FORWARDS:
        # Of parts of another layer, which has been asked.
        return getattr(kind, "is_product", False)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if "forward" in module.__dict__:
        return False
    # Other subclasses of Tensor are quantised or spread over devices.
    return type(getattr(module, "weight", None)) in _WEIGHTS


def parameter_of(module: nn.Module) -> Tensor:
    """A parameter whose dtype and device are the layer's: the weight, or where a module has none, the first of any in it.

    torch's dynamically quantised layers have none at all: they take float32, on a CPU.
    """
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next(module.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))


def written_out(array: Tensor | InputArray, dtype: torch.dtype) -> Tensor:
    """The tokens [B, M, C] of an array, positions written out, in ``dtype``."""
    if isinstance(array, Tensor):
        return array.to(dtype)
    return functional.pack_inputs(array, normalize=False, dtype=dtype).data[..., : array.channels]


def normed_tokens(
    name: str, array: InputArray | PackedInputs, norm: nn.Module | None, seen: Tensor | None, like: Tensor
) -> Tensor:
    """What a norm makes of the tokens of an array, [B, M, C]; hidden ones are zeros before it.

    Args:
        name: of the array, for errors.
        array: packed ones are normalised already, and get the norm's weight and bias alone.
        norm: the module, None for none.
        seen: bool [B, M], True where a token is visible; None for all.
        like: has the dtype and the device.
    """
    if isinstance(array, InputArray):
        array = on_device(array, like.device)
        given = array.positions is array.mean is array.std is None and array.content.dtype == like.dtype
        tokens = array.content if given else written_out(array, like.dtype)
        tokens = tokens if seen is None else torch.where(seen[..., None], tokens, 0.0)
        return tokens if norm is None else norm(tokens)
    tokens = array.data[..., : array.channels]
    if norm is None:
        return tokens
    if not (isinstance(norm, nn.LayerNorm) and is_plain(norm)):
        raise TypeError(f"{name} must not be packed where their norm is no plain LayerNorm, got PackedInputs")
    tokens = tokens if norm.weight is None else tokens * norm.weight.to(tokens.dtype)
    return tokens if norm.bias is None else tokens + norm.bias.to(tokens.dtype)
