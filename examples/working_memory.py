"""A working memory: latents that summarise a long history of text, code and metadata, and are asked what it contained.

A history is a sequence of episodes. Each holds a sentence of CPython's documentation, a snippet of a module of its standard
library, and metadata, writes of ``key = value``. Every word, token of code and write is a token of one input array, with the
time of its record as Fourier features. The latents read it once; queries then ask

    value     which value did key k get at its latest write?          (chance: 1 / values)
    occurred  did the sentence with this hash occur?                  (chance: 1 / 2)
    module    which module does the snippet at time t come from?      (chance: 1 / modules)

Text and code are held out: other topics, and the last part of every module. Keys and values are drawn at random. A model is
trained for each budget of latents, on histories of one episode to the longest, and evaluated at several lengths: a grid.

    python examples/working_memory.py
"""

from __future__ import annotations

import memory_task as memory
import torch
import torch.nn.functional as F
from common import Run, counts, learning_curve, multiple_of, options_of, run
from memory_task import EPISODE, KINDS, Records, draw
from torch import Tensor, nn

from perceiver_kernels.cli import options
from perceiver_kernels.cli.report import CommandError
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import EncoderConfig, PerceiverEncoder, PerceiverIO
from perceiver_kernels.models.heads import PatchHead
from perceiver_kernels.models.multimodal import MultimodalPreprocessor, written_out
from perceiver_kernels.nn import OutputBlock


class Timed(nn.Module):
    """Tokens of one modality with the time of their records.

    Args:
        channels: of a token.
        positions: of the time: 1 is now, -1 is ``horizon`` episodes ago.
    """

    def __init__(self, channels: int, positions: FourierPositions, horizon: float) -> None:
        super().__init__()
        self.content, self.positions, self.horizon = channels, positions, horizon
        self.channels = channels + positions.channels

    def placed(self, tokens: Tensor, times: Tensor) -> InputArray:
        """tokens [B, M, content] at times [B, M]."""
        return InputArray(tokens, self.positions, (1 + 2 * times / self.horizon)[..., None])


class Text(Timed):
    """Sentences: half of a token's channels say the word, half the hash of its sentence."""

    def __init__(self, channels: int, positions: FourierPositions, horizon: float) -> None:
        super().__init__(channels, positions, horizon)
        self.words = nn.Embedding(memory.WORDS, channels // 2)
        self.hash = nn.Linear(memory.HASH_BITS, channels - channels // 2)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> InputArray:
        words, hashes, times = inputs
        hashes = self.hash(hashes)[:, :, None].expand(-1, -1, memory.SENTENCE, -1)
        tokens = torch.cat((self.words(words), hashes), -1)  # [B, episodes, SENTENCE, content]
        return self.placed(tokens.flatten(1, 2), times.repeat_interleave(memory.SENTENCE, 1))


class Code(Timed):
    """Snippets."""

    def __init__(self, channels: int, positions: FourierPositions, horizon: float) -> None:
        super().__init__(channels, positions, horizon)
        self.words = nn.Embedding(memory.WORDS, channels)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> InputArray:
        words, times = inputs
        return self.placed(self.words(words).flatten(1, 2), times.repeat_interleave(memory.SNIPPET, 1))


class Metadata(Timed):
    """Writes: half of a token's channels say the key, half the value."""

    def __init__(self, channels: int, positions: FourierPositions, horizon: float) -> None:
        super().__init__(channels, positions, horizon)
        self.keys, self.values = nn.Embedding(memory.KEYS, channels // 2), nn.Embedding(memory.VALUES, channels - channels // 2)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> InputArray:
        keys, values, times = inputs
        return self.placed(torch.cat((self.keys(keys), self.values(values)), -1), times)


class Questions(Timed):
    """Queries: kind, key and hash of what is asked for, and a time."""

    def __init__(self, channels: int, positions: FourierPositions, horizon: float) -> None:
        super().__init__(channels, positions, horizon)
        self.kinds, self.keys = nn.Embedding(len(KINDS), channels), nn.Embedding(memory.KEYS, channels)
        self.hash = nn.Linear(memory.HASH_BITS, channels, bias=False)

    def forward(self, array: Tensor, points: dict[str, Tensor]) -> Tensor:
        key = self.keys(points["key"]) * (points["kind"] == 0)[..., None]
        content = self.kinds(points["kind"]) + key + self.hash(points["hash"])
        return written_out(self.placed(content, points["time"]), array.dtype)


def build(arguments, latents: int) -> PerceiverIO:
    horizon, C, D = max(arguments.episodes), arguments.channels, arguments.latent_dim
    # The highest frequency turns once in an episode.
    positions = FourierPositions(min(horizon, 32), (2.0 * max(horizon, 2),))
    modalities = {"code": Code, "metadata": Metadata, "text": Text}
    preprocessor = MultimodalPreprocessor({name: kind(C, positions, horizon) for name, kind in modalities.items()})
    config = EncoderConfig(
        input_dim=preprocessor.channels, num_latents=latents, latent_dim=D, num_cross_attends=2, num_blocks=2,
        layers_per_block=1, cross_heads=4, latent_heads=4, qk_channels=D, v_channels=D, weight_sharing="none",
        cross_widening_factor=2, latent_widening_factor=2,
    )  # fmt: skip
    queries = Questions(C, positions, horizon)
    # What was read is compared with what was asked: the residual brings both to the feed-forward layer.
    decoder = OutputBlock(queries.channels, D, qk_channels=D, residual=True, widening_factor=4)
    model = PerceiverIO(preprocessor, PerceiverEncoder(config), queries, decoder, PatchHead(queries.channels, memory.ANSWERS))
    return model.to(arguments.device)


def execute(task: Run) -> None:
    arguments = task.arguments
    train, held_out = (Records.read(part, task.device) for part in (False, True))
    if max(arguments.episodes) >= len(held_out.hashes):
        limit = f"below {len(held_out.hashes)}, the number of held-out sentences"
        raise CommandError(f"--episodes must be {limit}, got {max(arguments.episodes)}")
    generator, longest, most = torch.Generator(task.device), max(arguments.episodes), max(arguments.latents)

    def measure(model: PerceiverIO, episodes: int) -> dict[str, float]:
        """Accuracy of each kind of question, over histories that are the same at every evaluation."""
        drawn = torch.Generator(task.device).manual_seed(arguments.seed + 1)
        right = torch.zeros(len(KINDS), device=task.device)
        rounds = max(arguments.evaluated // arguments.batch_size, 1)
        for _ in range(rounds):
            history, queries, answers = draw(held_out, arguments.batch_size, episodes, arguments.asked, drawn)
            found = model(history, points=queries).argmax(-1)
            right += (found == answers).float().mean(0).view(len(KINDS), -1).mean(1) / rounds
        return dict(zip(KINDS, right.tolist(), strict=True))

    def train_one(latents: int) -> tuple[dict[int, dict[str, float]], list[dict[str, float]], int]:
        torch.manual_seed(arguments.seed)
        generator.manual_seed(arguments.seed)
        model = build(arguments, latents)

        def loss_of(step: int) -> Tensor:
            # Short histories, where every latent holds something to be found, are what learning begins with.
            episodes = round(longest ** torch.rand(()).item())
            history, queries, answers = draw(train, arguments.batch_size, episodes, arguments.asked, generator)
            return F.cross_entropy(model(history, points=queries).float().flatten(0, 1), answers.flatten())

        curve = task.train(model, loss_of, lambda: measure(model, min(arguments.episodes)), title=f"{latents} latents")
        with task.evaluating(model):
            return {episodes: measure(model, episodes) for episodes in arguments.episodes}, curve, model.num_params()

    runs = {latents: train_one(latents) for latents in arguments.latents}
    grid = [
        {"latents": latents, "episodes": episodes, "tokens": EPISODE * episodes, **reached}
        for latents, (by_length, _, _) in runs.items() for episodes, reached in by_length.items()
    ]  # fmt: skip
    show_grid(task, grid)
    best = runs[most][0][longest]
    told = ", ".join(f"{kind} {best[kind]:.1%} (chance {memory.CHANCE[kind]:.1%})" for kind in KINDS)
    task.finish(
        f"held-out accuracy after {EPISODE * longest} tokens through {most} latents: {told}",
        {"grid": grid, "chance": memory.CHANCE, "tokens": EPISODE * longest, "latents": most, "accuracy": best},
        {"parameters": {latents: count for latents, (_, _, count) in runs.items()}, "tokens_of_an_episode": EPISODE,
         "train_sentences": len(train.hashes), "held_out_sentences": len(held_out.hashes),
         "train_snippets": len(train.modules), "held_out_snippets": len(held_out.modules),
         "modules": list(memory.MODULES), "keys": memory.KEYS, "values": memory.VALUES, "latent_dim": arguments.latent_dim},
        [{"latents": latents, **point} for latents, (_, curve, _) in runs.items() for point in curve],
        [*(lambda axes, kind=kind: draw_grid(axes, grid, kind) for kind in KINDS),
         learning_curve(runs[most][1], *KINDS, label=f"accuracy, {most} latents, {EPISODE * min(arguments.episodes)} tokens")],
    )  # fmt: skip


def show_grid(task: Run, grid: list[dict]) -> None:
    rows = [[cell["latents"], cell["tokens"], *(f"{cell[kind]:.1%}" for kind in KINDS)] for cell in grid]
    task.console.table(["latents", "tokens", *(f"{kind} (chance {memory.CHANCE[kind]:.0%})" for kind in KINDS)], rows)


def draw_grid(axes, grid: list[dict], kind: str) -> None:
    for latents in dict.fromkeys(cell["latents"] for cell in grid):
        mine = [cell for cell in grid if cell["latents"] == latents]
        axes.plot([cell["tokens"] for cell in mine], [cell[kind] for cell in mine], marker="o", label=f"{latents} latents")
    axes.axhline(memory.CHANCE[kind], ls=":", color="black", label="chance")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of the history", ylabel=f"held-out accuracy: {kind}", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    parser = options_of(
        "Ask latents what a long history contained.", name="working_memory", steps=2500, batch_size=64, learning_rate=2e-3
    )
    parser.add_argument("--latents", type=counts, default="8,32,128", help="a model is trained for each of these numbers")
    parser.add_argument("--episodes", type=counts, default="4,8,16,32,64", help=f"of a history: {EPISODE} tokens each")
    parser.add_argument("--latent-dim", type=multiple_of(4), default=128, help="a multiple of 4, the number of heads")
    parser.add_argument("--channels", type=multiple_of(2), default=64, help="of a token, even, beside its time")
    parser.add_argument("--asked", type=options.count, default=16, help="questions of each kind about a history")
    parser.add_argument("--evaluated", type=options.count, default=512, help="held-out histories of each length")
    run(execute, parser)
