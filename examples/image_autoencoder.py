"""Perceiver IO as an autoencoder of photographs: pixels in, latents, pixels out, and what more latents are worth.

The encoder reads a square of pixels into few latents; the decoder asks the latents for every pixel by the Fourier features of
its place. Nothing else passes. One model is trained for each number of latents, on squares of some photographs of
scikit-image, and evaluated on others.

    python examples/image_autoencoder.py
"""

from __future__ import annotations

import math

import shipped
import torch
import torch.nn.functional as F
from common import Run, counts, learning_curve, multiple_of, options_of, run
from torch import Tensor

from perceiver_kernels.cli import options
from perceiver_kernels.cli.report import CommandError
from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.models import EncoderConfig, PerceiverEncoder, PerceiverIO
from perceiver_kernels.models.heads import PatchHead
from perceiver_kernels.models.preprocessing import PixelPreprocessor
from perceiver_kernels.models.queries import FourierQueries
from perceiver_kernels.nn import OutputBlock

TRAIN = ("astronaut", "rocket", "motorcycle", "hubble_deep_field", "immunohistochemistry")
HELD_OUT = ("chelsea", "coffee")
HEADS = 8
"""Of every attention: a latent reads as many places at once."""
SHOWN = 8
"""Squares along both sides of the part of a held-out photograph that is drawn."""


def build(arguments, latents: int) -> PerceiverIO:
    side, D, where = arguments.side, arguments.latent_dim, {"device": arguments.device}
    positions = FourierPositions(min(max(side // 2, 1), 16), (side, side))
    preprocessor = PixelPreprocessor(3, positions)
    config = EncoderConfig(
        input_dim=preprocessor.channels, num_latents=latents, latent_dim=D, num_cross_attends=2, num_blocks=2,
        layers_per_block=2, cross_heads=HEADS, latent_heads=HEADS, qk_channels=D, v_channels=D, weight_sharing="none",
        latent_widening_factor=2,
    )  # fmt: skip
    queries = FourierQueries((side, side), positions)
    decoder = OutputBlock(queries.channels, D, num_heads=HEADS, qk_channels=D, widening_factor=4, **where)
    head = PatchHead(queries.channels, 3, **where)
    return PerceiverIO(preprocessor, PerceiverEncoder(config, **where), queries, decoder, head)


def squares(photograph: Tensor, side: int) -> Tensor:
    """A photograph [3, H, W] cut into squares [n, 3, side, side], row by row; what is left at two borders is dropped."""
    tiles = photograph.unfold(1, side, side).unfold(2, side, side)  # [3, rows, columns, side, side]
    return tiles.flatten(1, 2).transpose(0, 1)


def random_squares(photographs: list[Tensor], count: int, side: int) -> Tensor:
    """Squares [count, 3, side, side] from random places, mirrored at random."""
    batch = []
    for index in torch.randint(len(photographs), (count,)).tolist():
        _, height, width = photographs[index].shape
        top, left = torch.randint(height - side + 1, ()).item(), torch.randint(width - side + 1, ()).item()
        square = photographs[index][:, top : top + side, left : left + side]
        batch.append(square.flip(-1) if torch.rand(()) < 0.5 else square)
    return torch.stack(batch)


def reconstructed(model: PerceiverIO, images: Tensor) -> Tensor:
    """What comes back for images [B, 3, side, side] in [0, 1]."""
    pixels = model(2 * images - 1)  # [B, side * side, 3]
    return (pixels.mT.unflatten(2, images.shape[2:]).float() + 1) / 2


def psnr(images: Tensor, others: Tensor) -> float:
    """10 log10(1 / mean squared error), in dB, of all pixels together."""
    return -10 * math.log10(F.mse_loss(others.clamp(0, 1), images).item())


def execute(task: Run) -> None:
    arguments, side = task.arguments, task.arguments.side
    try:
        train = [photograph.to(task.device) for photograph in shipped.photographs(TRAIN).values()]
    except (OSError, ImportError, RuntimeError) as error:
        raise CommandError(f"this version of scikit-image does not ship a photograph: {error}") from None
    test_photographs = {name: photograph.to(task.device) for name, photograph in shipped.photographs(HELD_OUT).items()}
    smallest = min(min(photograph.shape[1:]) for photograph in (*train, *test_photographs.values()))
    if side > smallest:
        raise CommandError(f"--side must be at most {smallest}, the smallest side of a photograph, got {side}")
    test = torch.cat([squares(photograph, side) for photograph in test_photographs.values()])
    # Evenly over both photographs.
    test = test[torch.linspace(0, len(test) - 1, min(arguments.squares, len(test))).long()]

    def on_held_out(model: PerceiverIO) -> float:
        return psnr(test, torch.cat([reconstructed(model, chunk) for chunk in test.split(64)]))

    def train_one(latents: int) -> tuple[PerceiverIO, list[dict[str, float]]]:
        torch.manual_seed(arguments.seed)
        model = build(arguments, latents)

        def loss_of(step: int) -> Tensor:
            images = random_squares(train, arguments.batch_size, side)
            return F.mse_loss(reconstructed(model, images), images)

        return model, task.train(model, loss_of, lambda: {"psnr": on_held_out(model)}, title=f"{latents} latents")

    runs = {latents: train_one(latents) for latents in arguments.latents}
    reached = {latents: curve[-1]["psnr"] for latents, (_, curve) in runs.items()}
    flat = psnr(test, test.mean((2, 3), keepdim=True).expand_as(test))
    name, photograph = next(iter(test_photographs.items()))
    before = middle(photograph, side * min(SHOWN, min(photograph.shape[1:]) // side))
    afters = []
    for model, _ in runs.values():
        with task.evaluating(model):
            afters.append(joined(reconstructed(model, squares(before, side)), before.shape[2] // side))
    shown = f"{name}: as it is, then from {', '.join(map(str, runs))} latents"
    told = ", ".join(f"{decibel:.1f} dB from {latents} latents" for latents, decibel in reached.items())
    task.finish(
        f"held-out PSNR of {side} x {side} pixels: {told} of {arguments.latent_dim} channels "
        f"(the mean colour of each square: {flat:.1f} dB)",
        {"psnr": reached, "mean_colour_psnr": flat},
        {"parameters": {latents: model.num_params() for latents, (model, _) in runs.items()}, "side": side,
         "values_of_a_square": 3 * side * side, "values_of_the_latents": {n: n * arguments.latent_dim for n in runs},
         "train_photographs": list(TRAIN), "held_out_photographs": list(HELD_OUT), "held_out_squares": len(test)},
        [{"latents": latents, **point} for latents, (_, curve) in runs.items() for point in curve],
        [lambda axes: draw_psnr(axes, reached, flat), learning_curve(runs[max(runs)][1], "psnr", label="held-out PSNR, dB"),
         lambda axes: draw_pictures(axes, [before, *afters], shown)],
    )  # fmt: skip


def middle(photograph: Tensor, edge: int) -> Tensor:
    top, left = (photograph.shape[1] - edge) // 2, (photograph.shape[2] - edge) // 2
    return photograph[:, top : top + edge, left : left + edge]


def joined(tiles: Tensor, columns: int) -> Tensor:
    """Squares [n, 3, side, side], row by row, as one picture [3, H, W]."""
    rows = [torch.cat(list(row), 2) for row in tiles.split(columns)]
    return torch.cat(rows, 1).clamp(0, 1)


def draw_psnr(axes, reached: dict[int, float], flat: float) -> None:
    axes.plot(list(reached), list(reached.values()), marker="o")
    axes.axhline(flat, ls=":", color="black", label="mean colour of the square")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="latents", ylabel="held-out PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_pictures(axes, pictures: list[Tensor], title: str) -> None:
    """In rows of two."""
    blank = torch.ones_like(pictures[0])
    pairs = [torch.cat((left, right), 2) for left, right in zip(pictures[::2], [*pictures[1::2], blank], strict=False)]
    axes.imshow(torch.cat(pairs, 1).permute(1, 2, 0).cpu())
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


if __name__ == "__main__":
    parser = options_of(
        "Autoencode photographs with Perceiver IO.", name="image_autoencoder", steps=1500, batch_size=64, learning_rate=2e-3
    )
    parser.add_argument("--latents", type=counts, default="4,16,64", help="a model is trained for each of these numbers")
    parser.add_argument("--latent-dim", type=multiple_of(HEADS), default=64, help=f"a multiple of {HEADS}, the number of heads")
    parser.add_argument("--side", type=options.count, default=32, help="pixels along a side of a square")
    parser.add_argument("--squares", type=options.count, default=192, help="held-out squares that are evaluated")
    run(execute, parser)
