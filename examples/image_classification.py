"""A Perceiver that classifies images, pixel by pixel: handwritten digits, or whether there is a face.

Every pixel is a token with Fourier features of its place. The latents read all pixels several times; the weights of all
reads but the first are shared, as are those of the blocks.

    python examples/image_classification.py --data digits
"""

from __future__ import annotations

import shipped
import torch
import torch.nn.functional as F
from common import Run, learning_curve, multiple_of, options_of, run
from torch import Tensor

from perceiver_kernels.cli import options
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import Perceiver, PerceiverConfig

TEST_SHARE = 0.25
DATA = {"digits": shipped.digits, "faces": shipped.faces}
CLASSES = {"digits": 10, "faces": 2}
BANDS = 8
"""Frequencies of an axis: at 25 pixels more would tell less than a pixel apart."""


def shifted(images: Tensor, most: int) -> Tensor:
    """Every image moved by up to ``most`` pixels along both axes, its border repeated."""
    B, _, H, W = images.shape
    padded = F.pad(images, (most,) * 4, mode="replicate")
    top = torch.randint(2 * most + 1, (B, 1), device=images.device) + torch.arange(H, device=images.device)
    left = torch.randint(2 * most + 1, (B, 1), device=images.device) + torch.arange(W, device=images.device)
    batch = torch.arange(B, device=images.device)[:, None, None]
    return padded[batch, 0, top[:, :, None], left[:, None, :]][:, None]


def execute(task: Run) -> None:
    arguments = task.arguments
    images, labels = DATA[arguments.data]()
    images = (images - images.mean()) / images.std()
    train, test = shipped.split(labels, TEST_SHARE, arguments.seed)
    images, labels = images.to(task.device), labels.to(task.device)
    positions = FourierPositions(BANDS, tuple(images.shape[2:]))
    config = PerceiverConfig(
        input_dim=1 + positions.channels, num_classes=CLASSES[arguments.data], num_latents=arguments.latents,
        latent_dim=arguments.latent_dim, num_cross_attends=arguments.cross_attends, num_blocks=arguments.cross_attends,
        layers_per_block=arguments.layers, latent_heads=4, dropout=0.1,
        head_norm=True,
    )  # fmt: skip
    model = Perceiver(config, device=task.device)

    def loss_of(step: int) -> Tensor:
        picked = train[torch.randint(len(train), (arguments.batch_size,))].to(task.device)
        batch = images[picked]
        if arguments.data == "faces":
            batch = shifted(batch, 2)
            batch = torch.where(torch.rand(len(batch), 1, 1, 1, device=task.device) < 0.5, batch, batch.flip(-1))
        return F.cross_entropy(model(InputArray.image(batch, positions)).float(), labels[picked])

    def accuracy(part: Tensor) -> float:
        right = 0
        for chunk in part.to(task.device).split(256):
            right += (model(InputArray.image(images[chunk], positions)).argmax(-1) == labels[chunk]).sum().item()
        return right / len(part)

    def evaluate() -> dict[str, float]:
        return {"train accuracy": accuracy(train[torch.randperm(len(train))[: len(test)]]), "test accuracy": accuracy(test)}

    curve = task.train(model, loss_of, evaluate, title=arguments.data)
    reached, chance = curve[-1]["test accuracy"], labels[test].bincount().max().item() / len(test)
    task.finish(
        f"{arguments.data}: test accuracy {reached:.1%} on {len(test)} held-out images of {len(labels)} "
        f"(the most frequent class: {chance:.1%})",
        {"test_accuracy": reached, "train_accuracy": curve[-1]["train accuracy"], "most_frequent_class": chance},
        {"parameters": model.num_params(), "train_images": len(train), "test_images": len(test),
         "tokens": images.shape[2] * images.shape[3], "channels": config.input_dim, "latents": arguments.latents,
         "latent_dim": arguments.latent_dim, "cross_attends": arguments.cross_attends},
        curve,
        [learning_curve(curve, "train accuracy", "test accuracy", label="accuracy"), learning_curve(curve, "loss")],
    )  # fmt: skip


if __name__ == "__main__":
    parser = options_of(
        "Classify real images with a Perceiver.", name="image_classification", steps=2000, batch_size=128, learning_rate=3e-3
    )
    parser.add_argument("--data", choices=sorted(DATA), default="digits", help="scikit-learn's digits or scikit-image's faces")
    parser.add_argument("--latents", type=options.count, default=32)
    parser.add_argument("--latent-dim", type=multiple_of(4), default=64, help="a multiple of 4, the number of heads")
    parser.add_argument("--cross-attends", type=options.count, default=3, help="how often the pixels are read")
    parser.add_argument("--layers", type=options.count, default=1, help="self-attention layers after each")
    run(execute, parser)
