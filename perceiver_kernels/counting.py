"""What a model is made of: parameters and FLOPs of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from perceiver_kernels.dispatch import use_backend
from perceiver_kernels.functional.explanation import described
from perceiver_kernels.nn.attention import CrossAttention, Method
from perceiver_kernels.nn.checks import check_count
from perceiver_kernels.nn.modes import evaluating
from perceiver_kernels.nn.output_attention import OutputCrossAttention

__all__ = ["Part", "Summary", "summary"]


@dataclass(frozen=True)
class Part:
    """A module of a model.

    Args:
        name: as in the state dict; empty for the whole model.
        kind: the class.
        parameters: its own and those of its parts; one that several parts share counts in the first of them.
        flops: of one forward, matrix products and convolutions, a multiply and an add counted as two.
    """

    name: str
    kind: str
    parameters: int
    flops: int


@dataclass(frozen=True)
class Summary:
    """The parts of a model; ``str`` makes a table of it.

    Args:
        whole: the model.
        parts: modules inside it, in the order of the state dict.
    """

    whole: Part
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        rows = [("part", "class", "parameters", "GFLOP")]
        rows += [(p.name or "all", p.kind, f"{p.parameters:,}", f"{p.flops / 1e9:,.2f}") for p in (*self.parts, self.whole)]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        names, kinds, counts, flops = widths
        return "\n".join(f"{a:<{names}}  {b:<{kinds}}  {c:>{counts}}  {d:>{flops}}" for a, b, c, d in rows)


def summary(model: nn.Module, *inputs: Any, depth: int = 1, method: Method = "projected", **keywords: Any) -> Summary:
    """Count parameters, and FLOPs of ``model(*inputs, **keywords)``, without computing anything.

    Args:
        model: any module.
        *inputs: arguments of the model; of tensors only shapes and dtypes are read.
        **keywords: more of them.
        depth: levels of parts below the model.
        method: how cross-attentions are counted: "projected", with keys and values for every token, as papers do, or
            "absorbed".

    Returns:
        A ``Summary``; print it.
    """
    check_count("depth", depth, 0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False, depth=depth + 1)
    arguments, options = described(list(inputs), mode), described(keywords, mode)
    with evaluating(model), _counted(model, method), use_backend("reference"), mode, counter:
        model(*arguments, **options)
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    root = type(model).__name__

    def flops_of(name: str, module: nn.Module) -> int:
        """Of a module that was called, or of the parts of one that only holds them."""
        if (key := f"{root}.{name}") in counts:
            return counts[key]
        return sum(flops_of(f"{name}.{child}", part) for child, part in module.named_children())

    seen: set[int] = set()
    parts = []
    for name, module in model.named_modules():
        if name and name.count(".") < depth:
            own = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
            if name.count(".") == depth - 1:
                seen |= own.keys()
            parts.append(Part(name, type(module).__name__, sum(own.values()), flops_of(name, module)))
    total = sum(parameter.numel() for parameter in model.parameters())
    return Summary(Part("", root, total, counts.get("Global", 0)), tuple(parts))


@contextmanager
def _counted(model: nn.Module, method: Method) -> Iterator[None]:
    """Let every cross-attention compute in one way."""
    layers = [module for module in model.modules() if isinstance(module, (CrossAttention, OutputCrossAttention))]
    kept = [(layer.method, getattr(layer, "chunk_size", None)) for layer in layers]
    try:
        for layer in layers:
            layer.method = method if not isinstance(layer, OutputCrossAttention) or layer.num_heads == 1 else "projected"
            if isinstance(layer, CrossAttention):
                layer.chunk_size = None
        yield
    finally:
        for layer, (own, chunk) in zip(layers, kept, strict=True):
            layer.method = own
            if isinstance(layer, CrossAttention):
                layer.chunk_size = chunk
