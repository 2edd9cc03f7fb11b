"""A context that several layers read is packed once in a forward pass, and never served after a write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_kernels import functional, replace_attention
from perceiver_kernels.integrations import sharing
from tests.integrations.replaced import Case, assert_agree, results

module = pytest.importorskip("perceiver_pytorch.perceiver_pytorch", reason="perceiver-pytorch is not installed")

B, SIDE, LENGTH = 2, 4, 12


def perceiver(**changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "num_freq_bands": 3, "max_freq": 10.0, "depth": 3, "num_classes": 5, "num_latents": 6, "latent_dim": 16,
        "cross_heads": 1, "cross_dim_head": 7, "latent_heads": 4, "latent_dim_head": 5,
    }  # fmt: skip
    return module.Perceiver(**{**sizes, **changes})


IMAGE = Case(perceiver, lambda model, data: model(data), {"data": (B, SIDE, SIDE, 3)}, {})
POINTS = Case(
    lambda **c: perceiver(input_axis=1, input_channels=9, fourier_encode_data=False, **c), lambda model, data: model(data),
    {"data": (B, LENGTH, 9)}, {},
)  # fmt: skip


def seen(length: int = LENGTH) -> Tensor:
    """A third is hidden; of the last entry, all."""
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[-1] = False
    return mask


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is packed from here on."""
    found: list[tuple[int, ...]] = []
    original = functional.pack_inputs

    def recording(content: Tensor, *args: Any, **options: Any) -> Any:
        found.append(tuple(content.shape))
        return original(content, *args, **options)

    monkeypatch.setattr(functional, "pack_inputs", recording)
    return found


def test_packed_once(packs: list[tuple[int, ...]]) -> None:
    """Six layers read one packed form, masked or not, recording or not; the next pass has one of its own."""
    model, data = IMAGE.model(depth=6), IMAGE.data()["data"]
    expected = model(data)
    replace_attention(model)
    mask = seen(SIDE * SIDE).view(B, SIDE, SIDE)
    calls: tuple[Callable[[Tensor], Tensor], ...] = (model, lambda data: model(data, mask=mask))
    for call in calls:
        packs.clear()
        call(data)
        assert packs == [(B, SIDE * SIDE, 17)]
        call(data)
        assert len(packs) == 2
    for mode, count in ((torch.no_grad, 1), (torch.inference_mode, 6)):
        packs.clear()
        with mode():
            torch.testing.assert_close(model(data), expected.detach())
        assert len(packs) == count, "tensors of inference mode count no writes"
    packs.clear()
    results(IMAGE, model)
    assert len(packs) == 6, "inputs that want gradients are packed by every layer"


def test_packed_again_after_a_write(packs: list[tuple[int, ...]]) -> None:
    """A hook writes to the inputs between two layers."""
    model, read = POINTS.model(), POINTS.data()["data"]

    def write(block: nn.Module, args: Any, options: Any) -> None:
        options["context"].mul_(1.5)

    model.layers[1].register_forward_pre_hook(write, with_kwargs=True)
    expected = model(read.clone())
    replace_attention(model)
    torch.testing.assert_close(model(read.clone()), expected, rtol=1e-12, atol=1e-12)
    assert len(packs) == 2
    with torch.inference_mode():
        torch.testing.assert_close(model(read.clone()), expected.detach(), rtol=1e-12, atol=1e-12)
    assert sharing._forward.get() is None, "nothing outlives the pass"


def test_packed_again_for_another_mask(packs: list[tuple[int, ...]]) -> None:
    """The mask, too, is part of what is shared, and a write to it is seen."""
    context, mask = torch.randn(B, LENGTH, 9), seen()
    with sharing.one_forward():
        reads = []
        for each in (None, mask, mask, mask.clone()):
            reads.append(sharing.packed_context(context, each, normalize=True, eps=1e-5, dtype=torch.float32))
        assert len(packs) == 3 and reads[1] is reads[2]
        assert reads[1].blind is not None and reads[1].blind.tolist() == [False, True]
        mask[0, 0] = ~mask[0, 0]
        sharing.packed_context(context, mask, normalize=True, eps=1e-5, dtype=torch.float32)
        sharing.packed_context(context, mask, normalize=True, eps=1e-3, dtype=torch.float32)
        assert len(packs) == 5


def test_model_that_fails_leaves_nothing() -> None:
    model = IMAGE.model()
    replace_attention(model)
    with pytest.raises(AssertionError, match="axis"):
        model(torch.randn(B, 5, 3).double())
    assert sharing._forward.get() is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("checkpointed", [(0, 1, 2), (0,), (1, 2)])
def test_checkpointed_layers(checkpointed: tuple[int, ...], reentrant: bool) -> None:
    """Layers that run without recording and again in the backward pass, beside others; inputs that want a gradient, or not."""
    model = POINTS.model()
    for index in checkpointed:
        block = model.layers[index]

        def run(x: Tensor, block: nn.Module = block, **read: Any) -> Tensor:
            def forward(x: Tensor, context: Tensor) -> Tensor:
                return type(block).forward(block, x, **{**read, "context": context})

            return checkpoint(forward, x, read["context"], use_reentrant=reentrant)

        block.forward = run

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(POINTS.data()["data"]).square().sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        data = POINTS.data()["data"].requires_grad_()
        model(data).square().sum().backward()
        return found | {"data": data.grad}

    expected = gradients()
    replace_attention(model)
    assert_agree(gradients(), expected)


def test_per_example_gradients() -> None:
    """torch.func's transforms, inside and around a forward pass."""
    model = POINTS.model()
    parameters, data = dict(model.named_parameters()), POINTS.data()["data"]

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (one[None],)).square().sum()

    def found() -> tuple[Any, ...]:
        return tuple(torch.func.grad(loss, argnums=which)(parameters, data[0]) for which in (0, 1))

    expected = found()
    replace_attention(model)
    actual = found()
    assert_agree({**actual[0], "data": actual[1]}, {**expected[0], "data": expected[1]})
