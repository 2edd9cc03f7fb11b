"""RIN against its description written out: output, latents and every gradient; published sizes; training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_kernels.models import RIN, RINConfig
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.models.plain_rin import plain_rin
from tests.modules import assert_same, randomised, result_and_gradients

B = 3

SMALL: dict[str, Any] = {
    "image_size": 12, "patch_size": 4, "num_classes": 7, "num_latents": 9, "latent_dim": 32, "tape_dim": 24, "layers": (2, 1),
    "latent_heads": 4, "tape_heads": 2, "tape_widening_factor": 2,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "classes": {},
    "none": {"num_classes": None, "channels": 2},
    "patches of a pixel": {"patch_size": 1, "image_size": 4, "tape_widening_factor": 0, "time_scale": 50.0},
}


def model_of(case: str = "classes", **changes: Any) -> RIN:
    return randomised(RIN(RINConfig(**{**SMALL, **CASES[case], **changes}), dtype=torch.float64))


def arguments(model: RIN, previous: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    c, generator = model.config, torch.Generator().manual_seed(1)
    images = torch.randn(B, c.channels, c.image_size, c.image_size, dtype=torch.float64, generator=generator)
    time = torch.rand(B, dtype=torch.float64, generator=generator)
    labels = None if c.num_classes is None else torch.randint(c.num_classes, (B,), generator=generator)
    latents = torch.randn(B, c.num_latents, c.latent_dim, dtype=torch.float64, generator=generator)
    return images.requires_grad_(), time, labels, latents.requires_grad_() if previous else None


def run(function: Any, model: RIN, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Prediction and latents in one, with the gradients of all parameters, the images and the latents of the step before."""
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    return result_and_gradients(lambda *_: torch.cat([t.flatten() for t in function(*inputs)]), model, *leaves)


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_its_description_written_out(case: str, previous: bool) -> None:
    model = model_of(case)
    inputs = arguments(model, previous)
    actual = run(model, model, inputs)
    assert_same(actual, run(lambda *t: plain_rin(model, *t), model, inputs), 1024)


def test_the_latents_of_a_step_are_those_of_the_next() -> None:
    model = model_of()
    images, time, labels, _ = arguments(model)
    _, latents = model(images, time, labels)
    first, again = model(images, time, labels)[0], model(images, time, labels, latents.detach())[0]
    assert latents.shape == (B, 9, 32) and not torch.allclose(first, again)
    zeros = model(images, time, labels, torch.zeros_like(latents))[0]
    assert torch.equal(first, zeros)


def test_published_sizes() -> None:
    imagenet, cifar = RIN.imagenet64(device="meta"), RIN.cifar10(device="meta")
    assert imagenet.positions.shape == (1, 64, 512) and cifar.positions.shape == (1, 256, 256)
    # Two of the 128 latents are the time and the class.
    assert imagenet.latents.shape == (1, 126, 768) and cifar.latents.shape == (1, 126, 512)
    assert [len(block.process) for block in imagenet.blocks] == [4] * 4
    assert [len(block.process) for block in cifar.blocks] == [2] * 3
    assert imagenet.blocks[0].write.qk_channels // 16 == 32 and imagenet.blocks[0].process[0].attention.qk_channels // 16 == 48
    assert (imagenet.num_params(), cifar.num_params()) == (by_hand(imagenet.config), by_hand(cifar.config))
    images = torch.randn(2, 3, 32, 32)
    out, latents = RIN.cifar10()(images, torch.rand(2), torch.tensor([0, 9]))
    assert out.shape == images.shape and latents.shape == (2, 128, 512)
    assert RIN.cifar10(device="meta", num_classes=None).latents.shape == (1, 127, 512)


def by_hand(c: RINConfig) -> int:
    """Parameters counted from the sizes."""
    C, D, patch = c.tape_dim, c.latent_dim, c.patch_size**2 * c.channels
    width = min(C, D)

    def mlp(dim: int, factor: int) -> int:
        return 2 * dim + 2 * factor * dim**2 + (factor + 1) * dim

    def mha(query: int, keys: int) -> int:
        return 2 * query + query * width + 2 * keys * width + 3 * width + width * query + query

    layer = 2 * D + 4 * D * D + 4 * D + mlp(D, 4)
    rounds = [mha(D, C) + mlp(D, 4) + n * layer + mha(C, D) + mlp(C, c.tape_widening_factor) for n in c.layers]
    time = D // 4 * D + D + D * D + D
    ends = patch * C + C + 2 * C + 2 * C + C * patch + patch
    learned = (c.image_size // c.patch_size) ** 2 * C + (c.num_latents - 2) * D + c.num_classes * D + D
    return sum(rounds) + time + ends + learned + mlp(D, 4) + 2 * D


def test_start() -> None:
    """Glorot's uniform matrices, biases zero, and the step before not heard yet."""
    model = RIN(RINConfig(**SMALL))
    weight = model.blocks[0].process[0].feed_forward.up_proj.weight
    bound = (6 / (32 + 128)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound and not model.head.bias.any()
    assert not model.previous_norm.weight.any() and model.latents.abs().max() <= 0.04
    images, time, labels, previous = (t if t is None or not t.is_floating_point() else t.float() for t in arguments(model))
    assert torch.equal(model(images, time, labels, previous)[0], model(images, time, labels)[0])


def test_activation_checkpointing_changes_no_bit() -> None:
    model, again = model_of(drop_path=0.2, hidden_dropout=0.1), model_of(activation_checkpointing=True, drop_path=0.2,
                                                                          hidden_dropout=0.1)  # fmt: skip
    runs: list[int] = []
    again.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    results = []
    for m in (model, again):
        torch.manual_seed(5)
        results.append(run(m, m, arguments(m)))
    assert all(torch.equal(results[1][name], results[0][name]) for name in results[0])
    assert len(runs) == 2, "the round ran again for its gradient"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(checkpointing: bool) -> None:
    model = model_of(activation_checkpointing=checkpointing)
    compiled, inputs = torch.compile(model, backend="aot_eager", fullgraph=True), arguments(model)
    assert_same(run(compiled, model, inputs), run(model, model, inputs), 1024)


def test_autocast() -> None:
    model = model_of()
    inputs = [t if t is None or not t.is_floating_point() else t.detach() for t in arguments(model)]
    oracle, single = plain_rin(model, *inputs)[0].detach(), copy.deepcopy(model).float()
    halves = [t.float() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, eager = single(*halves)[0], plain_rin(single, *halves)[0]
    assert_as_accurate(actual.bfloat16(), eager.bfloat16(), oracle, "prediction")


def test_learns_a_batch() -> None:
    """To give back the clean image, alike for every image of a class, from any noise."""
    torch.manual_seed(0)
    model, clean, losses = RIN(RINConfig(**SMALL)), torch.randn(7, 3, 12, 12), []
    optimiser = torch.optim.Adam(model.parameters(), 4e-3)
    labels = torch.arange(7)
    for _ in range(150):
        time = torch.rand(7) / 2
        noisy = clean * (1 - time).view(-1, 1, 1, 1) + torch.randn_like(clean) * time.view(-1, 1, 1, 1)
        with torch.no_grad():
            _, latents = model(noisy, time, labels)
        loss = (model(noisy, time, labels, latents)[0] - clean).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patch_size": 5}, ValueError, "patch_size must divide image_size=12, got 5"),
        ({"num_latents": 2}, ValueError, "num_latents must be at least 3, got 2"),
        ({"latent_dim": 36}, ValueError, "latent_dim must be a multiple of 8, got 36"),
        ({"latent_heads": 5}, ValueError, "latent_dim must be a positive multiple of num_heads=5, got 32"),
        ({"tape_heads": 5}, ValueError, "tape_dim must be a positive multiple of num_heads=5, got 24"),
        ({"tape_dim": 2048}, ValueError, "input_dim must be at most 1024, .* got 2048"),
        ({"layers": ()}, ValueError, r"layers must hold the number of latent blocks of every round, got \(\)"),
        ({"layers": (2, 0)}, ValueError, "layers must be at least 1, got 0"),
        ({"time_scale": float("inf")}, ValueError, "time_scale must be a finite number, got inf"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"activation_checkpointing": 1}, TypeError, "activation_checkpointing must be a bool, got 1"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RINConfig(**{**SMALL, **changes})


def test_wrong_inputs_are_named() -> None:
    model = model_of()
    images, time, labels, previous = arguments(model)
    for error, message, given in (
        (ValueError, r"images must be \[B, Ch, H, W\] with Ch=3, H=12, W=12, got", (images[..., :-1], time, labels)),
        (TypeError, "images must have the parameters' dtype torch.float64", (images.float(), time, labels)),
        (ValueError, r"time must be \[B\] with B=3, got \(3, 1\)", (images, time[:, None], labels)),
        (ValueError, "labels must be given if num_classes=7 is not None, and only then, got None", (images, time)),
        (TypeError, "labels must be int64, got float64", (images, time, labels.double())),
        (ValueError, r"previous must be \[B, N, D\] with B=3, N=9, D=32, got", (images, time, labels, previous[:, 1:])),
    ):
        with pytest.raises(error, match=message):
            model(*given)
    with pytest.raises(ValueError, match=r"labels must be given if num_classes=None is not None, and only then, got \(3,\)"):
        other = model_of("none")
        other(*arguments(other)[:2], labels)
