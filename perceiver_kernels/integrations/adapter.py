"""What a library's file says of one of its classes: by what a module of it is replaced, and when it is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from perceiver_kernels.nn.called import is_plain

SHADOW = "_perceiver_kernels"
"""Where a replaced module keeps a layer of ours: an attribute that is no submodule, so that the state dict stays as it is."""


@dataclass(frozen=True)
class Adapter:
    """One class and its replacement.

    Args:
        original: the library's class. Subclasses of it are left alone: they may compute something else.
        replacement: a subclass of it with another ``forward``; a module changes its class, and nothing else. None: the class
            stays, see ``changes``.
        runs: what the module then runs, for the report.
        refuses: why a module is left alone, or None.
        assembled: makes what a replaced module keeps, a layer of ours of its own submodules as a rule. These are the module's
            by reference: parameters that are loaded, moved or trained there are those here.
        whole: the replacement runs all that is inside the module, so that nothing in there is replaced by itself.
        changes: for a class whose modules have a setting for their attention: sets it, and returns what sets it back.
        concerns: False for modules of the class that hold nothing to replace; what is inside them is still looked at.
    """

    original: type[nn.Module]
    replacement: type[nn.Module] | None
    runs: str
    refuses: Callable[[Any], str | None] = lambda module: None
    assembled: Callable[[Any], Any] | None = None
    whole: bool = True
    changes: Callable[[Any], Callable[[], None]] | None = None
    concerns: Callable[[Any], bool] = lambda module: True


def are_plain(*parts: nn.Module | None) -> bool:
    """Whether a replacement may read the weights of these submodules: nobody has hooked, wrapped or quantised one since."""
    return is_plain(*(part for part in parts if type(part) is not nn.Identity))


def is_still_of(layer: Any, **parts: nn.Module) -> bool:
    """Whether a layer of ours has these submodules, by its names, and they are plain."""
    return all(getattr(layer, name) is part for name, part in parts.items()) and are_plain(*parts.values())


def dropping(layer: Any, p: float) -> Any:
    """A layer of ours that drops attention weights with probability ``p``, whatever its mode."""
    layer.training, layer.dropout = True, p
    return layer


def dropout_of(dropout: nn.Dropout | None) -> float:
    """The probability with which a library's dropout layer drops now."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def bypassed(module: nn.Module, whole: bool = True) -> str | None:
    """What runs now and would not after a replacement of the module, or of all that is inside it too; None where nothing."""
    for name, each in module.named_modules() if whole else (("", module),):
        if "forward" in each.__dict__:
            return f"{name or 'it'} has a forward of its own, set on the module, which a replacement would not call"
        if name and (each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks):
            return f"{name} has hooks, which a replacement of the whole would not call"
    return None


def unlike(module: nn.Module, **expected: type[nn.Module] | tuple[type[nn.Module], ...]) -> str | None:
    """Why a replacement cannot read these submodules' parameters itself: one has another class than it should, or None.

    Args:
        module: the one whose submodules they are.
        expected: class, or classes, by the submodule's name, dots written as two underscores.
    """
    for name, classes in expected.items():
        path = name.replace("__", ".")
        submodule: Any = module
        for part in path.split("."):
            submodule = getattr(submodule, part, None)
        allowed = classes if isinstance(classes, tuple) else (classes,)
        if type(submodule) not in allowed:
            names = " or ".join(each.__name__ for each in allowed)
            return f"{path} is a {type(submodule).__name__}, whose weight may be no plain one, where a {names} was expected"
    return None
