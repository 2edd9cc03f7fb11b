"""Weights in and out: our models' state dicts as those of the libraries that the models come from, and files of them.

    model = PerceiverIO.imagenet_fourier()
    convert.load(model, "model.safetensors", "transformers")     # a file or a state dict in their names
    convert.save(model, "ours.safetensors")                      # in our names
    convert.save(model, "theirs.safetensors", "transformers")
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from perceiver_kernels.convert.rules import Rule, check_shapes, to_ours, to_theirs

__all__ = ["LIBRARIES", "load", "rules_of", "save", "to_library"]

LIBRARIES = (
    "diffusers",
    "flamingo_pytorch",
    "ip_adapter",
    "linformer",
    "open_flamingo",
    "perceiver_ar_pytorch",
    "perceiver_io",
    "perceiver_pytorch",
    "set_transformer",
    "transformers",
)
"""Each is a module here whose RULES give, for a class of ours, the function from a model to its rules."""


def rules_of(model: nn.Module, library: str) -> list[Rule]:
    """How ``model``'s state dict and that of ``library``'s model correspond.

    Args:
        model: one of this package's models.
        library: one of ``LIBRARIES``.

    Raises:
        ValueError: no such library, or it has no model like this one.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(map(repr, LIBRARIES))}, got {library!r}")
    table = importlib.import_module(f"perceiver_kernels.convert.{library}").RULES
    for cls in type(model).__mro__:
        if cls in table:
            rules: list[Rule] = table[cls](model)
            return rules
    raise ValueError(f"{library} has no model like {type(model).__name__}, but {', '.join(cls.__name__ for cls in table)}")


def to_library(model: nn.Module, library: str) -> dict[str, Tensor]:
    """The weights of ``model`` under the names of ``library``; they share memory with the model's.

    Args:
        model: one of this package's models.
        library: one of ``LIBRARIES``.

    Raises:
        ValueError: no such library, or it has no model like this one.
    """
    return to_theirs(rules_of(model, library), model.state_dict())


def load(model: nn.Module, weights: Mapping[str, Tensor] | str | Path, library: str | None = None) -> None:
    """Copy weights into ``model``.

    Args:
        model: one of this package's models.
        weights: a state dict, or a file of one (safetensors, which needs the package of that name, or torch.save's).
        library: whose names they have; None: ours.

    Raises:
        ValueError: missing or additional names or wrong shapes, all of them listed as ``weights`` names them; the model is then
            as it was.
    """
    state, ours = _read(weights) if isinstance(weights, (str, Path)) else weights, model.state_dict()
    if library is None:
        check_shapes(state, ours)
    else:
        state = to_ours(rules_of(model, library), state, ours)
    model.load_state_dict(state)


def save(model: nn.Module, path: str | Path, library: str | None = None) -> None:
    """Write the weights of ``model`` as safetensors, which needs the package of that name.

    Args:
        model: one of this package's models.
        path: the file to write.
        library: under whose names; None: ours.

    Raises:
        ValueError: no such library, or it has no model like this one.
    """
    from safetensors.torch import save_file

    state = model.state_dict() if library is None else to_library(model, library)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, path)


def _read(path: str | Path) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
