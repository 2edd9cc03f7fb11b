"""Attention of a model, replaced in place and reversibly."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from perceiver_kernels.integrations.adapter import SHADOW, Adapter, bypassed
from perceiver_kernels.integrations.report import Entry, Report

LIBRARIES = {
    "diffusers.models.attention_processor": "diffusers",
    "flamingo_pytorch.flamingo_pytorch": "flamingo_pytorch",
    "open_flamingo.src.helpers": "open_flamingo",
    "perceiver.model.core.modules": "perceiver_io",
    "perceiver_ar_pytorch.perceiver_ar_pytorch": "perceiver_ar_pytorch",
    "perceiver_pytorch.perceiver_pytorch": "perceiver_pytorch",
    "timm.layers.attention_pool": "timm",
    "torch.nn": "torch_nn",
    "transformers.models.perceiver.modeling_perceiver": "transformers_perceiver",
}
"""Module of a library -> file here that knows its classes, imported where a program has imported the library's."""


def _adapters_of(library: str, file: str) -> dict[type[nn.Module], Adapter]:
    module = importlib.import_module(f"perceiver_kernels.integrations.{file}")
    theirs = vars(sys.modules[library])
    own = (adapter.original for adapter in module.ADAPTERS if adapter.original.__module__ == library)
    if any(theirs.get(original.__name__) is not original for original in own):
        # The library was loaded again, and its classes are others.
        module = importlib.reload(module)
    return {adapter.original: adapter for adapter in module.ADAPTERS}


def known_adapters() -> dict[type[nn.Module], Adapter]:
    """Adapters of every library that this program has imported, by the class that they replace."""
    found: dict[type[nn.Module], Adapter] = {}
    for library, file in LIBRARIES.items():
        if library in sys.modules:
            found |= _adapters_of(library, file)
    return found


def replace_attention(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Let a model's attention layers run on these kernels, in place: parameters, and the keys of its state dict, stay.

    Every module of a class that is known here changes its class to a subclass with another ``forward``; models of transformers
    that choose their attention by name get the name ``"perceiver_kernels"``, and diffusers' ``Attention`` another processor.
    Results and gradients are the same to rounding. What is not converted, and why, is in the report: subclasses of known
    classes, modules whose children have hooks or were replaced (adapters, quantised weights), options that these kernels do not
    have. A converted model can be copied, saved, compiled and trained as before; a layer whose projections are replaced later
    runs as the original does, or with the new ones.

    Args:
        model: any module; of torch.nn, transformers, perceiver-pytorch, perceiver-io, perceiver-ar-pytorch,
            flamingo-pytorch, open_flamingo, diffusers and timm, the classes that docs/integrations lists.
        dry_run: change nothing, only report.

    Returns:
        What was converted and what was not. ``report.undo()`` puts everything back, but for modules whose class something
            else has changed since, which it names in a warning.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report(dry_run=dry_run)
    if "transformers" in sys.modules:
        from perceiver_kernels.integrations import transformers

        transformers.replace_implementation(model, report)
    adapters = known_adapters()
    # Where a class is known, what is inside is not looked at: the replacement runs all of it, or a reason says why not.
    for name, module in _outermost(model, adapters):
        _replace(name, module, adapters, report)
    return report


def _outermost(model: nn.Module, adapters: dict[type[nn.Module], Adapter]) -> Iterator[tuple[str, nn.Module]]:
    """Modules, with their names, that are known, of a known class's subclass, or replaced already; nothing inside them.

    A known module that is refused is followed by what is known inside it.
    """
    pending: list[tuple[str, nn.Module]] = [("", model)]
    replaced = {each.replacement for each in adapters.values() if each.whole}
    seen: set[int] = set()
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        adapter = adapters.get(type(module))
        concerned = adapter is None or adapter.concerns(module)
        # Asked before the module is handed out, and perhaps replaced.
        done = type(module) in replaced or (
            adapter is not None and concerned and adapter.whole and _reason(module, adapter) is None
        )
        if concerned and (adapter is not None or _original(type(module), adapters) is not None):
            yield name, module
        if done:
            continue
        children = [(f"{name}.{child}" if name else child, each) for child, each in module.named_children()]
        pending += reversed(children)


def _original(kind: type[nn.Module], adapters: Iterable[type[nn.Module]]) -> type[nn.Module] | None:
    """The known class that another is a subclass of."""
    return next((original for original in adapters if issubclass(kind, original)), None)


def _reason(module: nn.Module, adapter: Adapter) -> str | None:
    """Why a module of a known class is left alone, or None."""
    return bypassed(module, adapter.whole) or adapter.refuses(module)


def _replace(name: str, module: nn.Module, adapters: dict[type[nn.Module], Adapter], report: Report) -> None:
    kind = f"{type(module).__module__.split('.')[0]} {type(module).__name__}"
    adapter = adapters.get(type(module))
    if adapter is None:
        if any(type(module) is known.replacement for known in adapters.values()):
            report.kept.append(Entry(name, kind, "converted already"))
            return
        original = _original(type(module), adapters)
        assert original is not None
        report.kept.append(Entry(name, kind, f"a subclass of {original.__name__}, which may compute something else"))
        return
    reason = _reason(module, adapter)
    if reason is not None:
        report.kept.append(Entry(name, kind, reason))
        return
    report.converted.append(Entry(name, kind, adapter.runs))
    if report.dry_run:
        return
    if adapter.changes is not None:
        report._undo.append(adapter.changes(module))
    if adapter.assembled is not None:
        module.__dict__[SHADOW] = adapter.assembled(module)
    if adapter.replacement is not None:
        module.__class__ = adapter.replacement
        report._undo.append(functools.partial(_restore, name, module, adapter))


def _restore(name: str, module: Any, adapter: Adapter) -> str | None:
    """Put a module's class back; its name where it has another than the replacement now, and stays."""
    if type(module) is not adapter.replacement:
        return name
    module.__class__ = adapter.original
    module.__dict__.pop(SHADOW, None)
    return None
