"""A Perceiver AR that models English, byte by byte, and what a longer context is worth to it.

The text is the reference documentation that comes with CPython. The last bytes of every window are latents, all before them
are a prefix that is read once. One model is trained with prefixes of every length that is evaluated, and evaluated on the
same held-out bytes with each of them.

    python examples/language_modelling.py
"""

from __future__ import annotations

import math

import shipped
import torch
import torch.nn.functional as F
from common import Run, counts, learning_curve, multiple_of, options_of, run, share
from torch import Tensor

from perceiver_kernels.cli import options
from perceiver_kernels.cli.report import CommandError
from perceiver_kernels.models import PerceiverAR, PerceiverARConfig

HEAD_DIM = 32


def as_bytes(topics: dict[str, str]) -> Tensor:
    """All topics, one after the other, int64 [bytes]."""
    return torch.tensor(list("".join(topics.values()).encode()))


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """int64 [n, length] from each start on."""
    return text[starts[:, None].to(text.device) + torch.arange(length, device=text.device)]


def bits_per_byte(model: PerceiverAR, batch: Tensor, prefix_length: int) -> Tensor:
    """Mean of -log2 p over the bytes that follow the latents' bytes; batch int64 [B, prefix_length + N + 1]."""
    logits = model(batch[:, :-1], prefix_length).float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, prefix_length + 1 :].flatten()) / math.log(2)


def unigram_bits(train: Tensor, held_out: Tensor) -> float:
    """What the frequencies of single bytes, with one added to each, would need."""
    counted = train.bincount(minlength=256).double() + 1
    return -(counted / counted.sum()).log2()[held_out].mean().item()


def execute(task: Run) -> None:
    arguments, N = task.arguments, task.arguments.latents
    train, held_out = (as_bytes(part).to(task.device) for part in shipped.english())
    longest = max(arguments.prefixes)
    if longest + N >= len(held_out):
        raise CommandError(f"--prefixes must leave --latents={N} of the {len(held_out)} held-out bytes, got {longest}")
    config = PerceiverARConfig(
        vocab_size=256, max_length=longest + N, num_latents=N, dim=arguments.dim, num_heads=arguments.dim // HEAD_DIM,
        num_layers=arguments.layers, widening_factor=4, activation="gelu", rotary_base=10_000.0, latent_proj=False,
        own_keys=True, dropout=arguments.dropout, prefix_dropout=0.1, init_std=0.02,
    )  # fmt: skip
    model = PerceiverAR(config, device=task.device)
    # The latents' bytes are the same for every prefix: as many windows as there are room and patience for.
    places = torch.arange(longest, len(held_out) - N, N)[: arguments.windows]

    def loss_of(step: int) -> Tensor:
        prefix = arguments.prefixes[torch.randint(len(arguments.prefixes), ()).item()]
        length = prefix + N + 1
        return bits_per_byte(model, windows(train, torch.randint(len(train) - length, (arguments.batch_size,)), length), prefix)

    def on_held_out(prefix: int) -> float:
        total = 0.0
        for chunk in places.split(arguments.batch_size):
            total += bits_per_byte(model, windows(held_out, chunk - prefix, prefix + N + 1), prefix).item() * len(chunk)
        return total / len(places)

    curve = task.train(model, loss_of, lambda: {"held out": on_held_out(longest)}, title="bytes")
    with task.evaluating(model):
        by_context = {prefix + N: on_held_out(prefix) for prefix in arguments.prefixes}
        prompt = held_out[: min(longest + N, 256)][None]
        generator = torch.Generator(task.device).manual_seed(arguments.seed)
        sample = model.generate(prompt, arguments.sample, temperature=0.8, top_p=0.95, generator=generator)[0]
    asked, continued = (bytes(part.tolist()).decode(errors="replace") for part in (prompt[0], sample[prompt.shape[1] :]))
    task.console.line(f"...{asked[-120:]}|{continued}")
    shortest, best = min(by_context), max(by_context)
    unigram = unigram_bits(train, held_out[longest + 1 :])
    told = ", ".join(f"{bits:.3f} with {context}" for context, bits in by_context.items())
    task.finish(
        f"held-out bits per byte by bytes of context: {told} (single bytes by frequency: {unigram:.2f})",
        {"bits_per_byte": by_context, "unigram_bits_per_byte": unigram, "prompt": asked, "sample": continued,
         "gain_of_context": by_context[shortest] - by_context[best]},
        {"parameters": model.num_params(), "train_bytes": len(train), "held_out_bytes": len(held_out),
         "evaluated_bytes": len(places) * N, "latents": N, "dim": arguments.dim, "layers": arguments.layers},
        curve,
        [lambda axes: draw_contexts(axes, by_context), learning_curve(curve, "loss", "held out", label="bits per byte")],
    )  # fmt: skip


def draw_contexts(axes, by_context: dict[int, float]) -> None:
    axes.plot(list(by_context), list(by_context.values()), marker="o")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes of context, of which the latents are the last", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    parser = options_of(
        "Model English bytes with a Perceiver AR.", name="language_modelling", steps=1200, batch_size=32, learning_rate=1e-3
    )
    parser.add_argument("--latents", type=options.count, default=128, help="the last bytes of a window")
    parser.add_argument("--prefixes", type=counts, default="32,128,512,1920", help="bytes before them, trained and evaluated")
    parser.add_argument("--dim", type=multiple_of(HEAD_DIM), default=256, help=f"a multiple of {HEAD_DIM}, a head's channels")
    parser.add_argument("--layers", type=options.count, default=6)
    parser.add_argument("--dropout", type=share, default=0.2)
    parser.add_argument("--windows", type=options.count, default=128, help="held-out windows that are evaluated")
    parser.add_argument("--sample", type=options.count, default=400, help="bytes to generate")
    run(execute, parser)
