"""A Perceiver that classifies sets of points in any order and of any size: handwritten digits without their pixels.

A digit's points are drawn from its ink: a pixel with probability proportional to its intensity, and a place within it. Sets
of a batch have different sizes, which the input array knows; the model is evaluated on sets of several sizes, turned and
scaled at random as in training.

    python examples/point_clouds.py
"""

from __future__ import annotations

import math

import shipped
import torch
import torch.nn.functional as F
from common import Run, counts, learning_curve, multiple_of, options_of, run
from torch import Tensor

from perceiver_kernels.cli import options
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import Perceiver, PerceiverConfig

TEST_SHARE = 0.25
POSITIONS = FourierPositions(8, (16.0, 16.0))
TURN = math.radians(15)
SCALE = 0.15
"""Largest angle and relative change of size of a set."""


def points_of(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[B, count, 2] in about [-1, 1], drawn from the ink of images [B, 1, H, W], turned and scaled."""
    B, _, H, W = images.shape
    pixels = torch.multinomial(images.flatten(1), count, replacement=True, generator=generator)
    places = torch.stack((pixels % W, pixels // W), -1) + torch.rand(B, count, 2, generator=generator, device=images.device)
    places = places * places.new_tensor([2 / W, 2 / H]) - 1
    angle, change = (2 * torch.rand(2, B, generator=generator, device=images.device) - 1) * places.new_tensor([[TURN], [SCALE]])
    cos, sin = (1 + change) * angle.cos(), (1 + change) * angle.sin()
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)  # [B, 2, 2]
    return places @ turn.mT


def build(arguments) -> Perceiver:
    """The model: everything else here would suit any that classifies an ``InputArray``."""
    config = PerceiverConfig(
        input_dim=POSITIONS.channels, num_classes=10, num_latents=arguments.latents, latent_dim=arguments.latent_dim,
        num_cross_attends=3, num_blocks=3, layers_per_block=1, latent_heads=4, head_norm=True,
    )  # fmt: skip
    return Perceiver(config, device=arguments.device)


def execute(task: Run) -> None:
    arguments, most = task.arguments, max(task.arguments.points)
    images, labels = (part.to(task.device) for part in shipped.digits())
    train, test = (part.to(task.device) for part in shipped.split(labels.cpu(), TEST_SHARE, arguments.seed))
    model = build(arguments)
    generator = torch.Generator(task.device).manual_seed(arguments.seed)

    def loss_of(step: int) -> Tensor:
        picked = train[torch.randint(len(train), (arguments.batch_size,), generator=generator, device=task.device)]
        lengths = torch.randint(min(arguments.points), most + 1, (len(picked),), generator=generator, device=task.device)
        points = points_of(images[picked], most, generator)
        return F.cross_entropy(model(InputArray.points(points, positions=POSITIONS, lengths=lengths.int())), labels[picked])

    def accuracy(part: Tensor, count: int) -> float:
        # The same sets at every evaluation.
        drawn = torch.Generator(task.device).manual_seed(arguments.seed + 1)
        right = 0
        for chunk in part.split(256):
            points = points_of(images[chunk], count, drawn)
            right += (model(InputArray.points(points, positions=POSITIONS)).argmax(-1) == labels[chunk]).sum().item()
        return right / len(part)

    def evaluate() -> dict[str, float]:
        return {"train accuracy": accuracy(train[: len(test)], most), "test accuracy": accuracy(test, most)}

    curve = task.train(model, loss_of, evaluate, title="points")
    with task.evaluating(model):
        by_count = {count: accuracy(test, count) for count in arguments.points}
    told = ", ".join(f"{reached:.1%} from {count}" for count, reached in by_count.items())
    task.finish(
        f"test accuracy by points of a digit: {told} ({len(test)} held-out digits, chance about 10%)",
        {"test_accuracy": by_count, "train_accuracy": curve[-1]["train accuracy"], "chance": 0.1},
        {"parameters": model.num_params(), "train_sets": len(train), "test_sets": len(test), "points": arguments.points,
         "channels": POSITIONS.channels, "latents": arguments.latents, "latent_dim": arguments.latent_dim},
        curve,
        [lambda axes: draw_counts(axes, by_count), learning_curve(curve, "train accuracy", "test accuracy", label="accuracy"),
         lambda axes: draw_sets(axes, points_of(images[test[:9]], most, generator).cpu())],
    )  # fmt: skip


def draw_counts(axes, by_count: dict[int, float]) -> None:
    axes.plot(list(by_count), list(by_count.values()), marker="o")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="points of a set", ylabel="test accuracy")
    axes.grid(alpha=0.3)


def draw_sets(axes, sets: Tensor) -> None:
    for index, points in enumerate(sets):
        axes.scatter(points[:, 0] + 3 * (index % 3), -points[:, 1] - 3 * (index // 3), s=1)
    axes.set(title="held-out sets", aspect="equal", xticks=[], yticks=[])


if __name__ == "__main__":
    parser = options_of(
        "Classify point sets with a Perceiver.", name="point_clouds", steps=3000, batch_size=128, learning_rate=3e-3
    )
    parser.add_argument("--points", type=counts, default="16,32,64,128,256", help="of a set: evaluated, and trained between")
    parser.add_argument("--latents", type=options.count, default=32)
    parser.add_argument("--latent-dim", type=multiple_of(4), default=64, help="a multiple of 4, the number of heads")
    run(execute, parser)
