"""Tests of this folder need TRITON_INTERPRET=1 before Triton is imported: a process of their own (``make test``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from perceiver_kernels.backends.triton import interpreted

HERE = Path(__file__).parent


PATCHED: set[str] = set()


def _call_a_step(self: Any, *args: Any, **options: Any) -> Any:
    """A jit function that a kernel calls. Triton 3.6 patches its language again at each call, a third of all time.

    The launch of the kernel has patched what ours see; what functions of Triton's own modules see stays patched.
    """
    if self.fn.__module__ not in PATCHED:
        PATCHED.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **options)


class _Kept:
    """What Triton 3.6 derives anew for every value of a program, a third of what is left: kept by shape and element type."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[Any, Any, Any]] = {}
        self.blocks: dict[Any, dict[str, Any]] = {}
        self.numpy_types: dict[Any, Any] = {}
        self.init_block, self.numpy_type = tl.block_type.__init__, interpreter._get_np_dtype

    def init_tensor(self, tensor: Any, handle: Any, kind: Any) -> None:
        """tl.tensor's constructor."""
        shape = kind.shape if kind.is_block() else ()
        # By identity, which block types share: Triton compares its tuples slowly.
        found = self.shapes.get(id(shape))
        if found is None:
            sizes = core.tuple([tl.constexpr(size) for size in shape])
            found = self.shapes[id(shape)] = sizes, tl.constexpr(math.prod(shape)), shape
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
        tensor.shape, tensor.numel = found[:2]

    def init_block_type(self, block: Any, element: Any, shape: Any) -> None:
        """tl.block_type's constructor."""
        key = element.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in self.blocks:
            self.init_block(block, element, shape)
            self.blocks[key] = {name: vars(block)[name] for name in ("shape", "numel", "name")}
        vars(block).update(self.blocks[key], element_ty=element)

    def numpy_type_of(self, kind: Any) -> Any:
        """interpreter._get_np_dtype."""
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if element.name not in self.numpy_types:
            self.numpy_types[element.name] = self.numpy_type(element)
        return self.numpy_types[element.name]


if interpreted():
    import triton.language as tl
    from triton.language import core
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    InterpretedFunction.__call__ = _call_a_step
    kept = _Kept()
    core.tensor.__init__ = lambda tensor, handle, type: kept.init_tensor(tensor, handle, type)
    core.block_type.__init__ = lambda block, element_ty, shape: kept.init_block_type(block, element_ty, shape)
    interpreter._get_np_dtype = kept.numpy_type_of
    # The interpreter computes whether sums overflow, another third, and without ``debug`` asserts nothing.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        # The interpreter computes on numpy arrays, whose warnings about -inf and NaN say nothing of the kernels.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"))
        if not interpreted():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, in a process of its own"))
