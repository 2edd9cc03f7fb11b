"""What the examples share: options, the training loop with its progress bar, plots, and the report."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from perceiver_kernels.cli import Parser, options
from perceiver_kernels.cli.console import Console
from perceiver_kernels.cli.report import CommandError, check_writable

WARMUP = 0.05
"""Share of the steps in which the learning rate rises; it then falls along a cosine."""


def options_of(description: str, *, name: str, steps: int, batch_size: int, learning_rate: float) -> Parser:
    """The parser of an example, with the options that all have."""
    parser = Parser(prog=f"{name}.py", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=options.count, default=steps, help="optimiser steps")
    parser.add_argument("--batch-size", type=options.count, default=batch_size, help="examples of a step")
    parser.add_argument("--learning-rate", type=positive, default=learning_rate, help="its largest value")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and held-out data")
    parser.add_argument("--device", type=device, default=default_device(), help="cpu, cuda or cuda:N")
    parser.add_argument("--output", type=options.path, default=f"runs/{name}", help="folder of result.json and curve.png")
    return parser


def positive(text: str) -> float:
    """Read a finite number above 0."""
    with contextlib.suppress(ValueError):
        number = float(text)
        if 0 < number < math.inf:
            return number
    raise CommandError(f"must be a finite number above 0, got {text!r}")


def share(text: str) -> float:
    """Read a number from 0 on and below 1."""
    with contextlib.suppress(ValueError):
        number = float(text)
        if 0 <= number < 1:
            return number
    raise CommandError(f"must be at least 0 and below 1, got {text!r}")


def multiple_of(factor: int) -> Callable[[str], int]:
    """Return the type of a whole number that ``factor`` divides."""

    def read(text: str) -> int:
        number = options.count(text)
        if number % factor:
            raise CommandError(f"must be a multiple of {factor}, got {text!r}")
        return number

    return read


def counts(text: str) -> list[int]:
    """Read whole numbers from 1 on, separated by commas: each once, in ascending order."""
    return sorted({options.count(part) for part in text.split(",")})


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(text: str) -> torch.device:
    """Read a device that this machine has."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise CommandError(f"must be cpu, cuda or cuda:N, got {text!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise CommandError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"must be a device of this machine, which has {torch.cuda.device_count()} GPUs, got {text!r}")
    return found


class Run:
    """One call of an example: what is written into its folder, and when it began.

    Args:
        arguments: those of the parser.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.console, self.started = arguments, Console(sys.stdout), time.perf_counter()
        self.device = torch.device(arguments.device)
        self.folder = Path(arguments.output)
        for name in ("result.json", "curve.png"):
            check_writable(self.folder / name)
        torch.manual_seed(arguments.seed)

    def autocast(self) -> Any:
        """bfloat16 for the products on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def train(
        self,
        model: nn.Module,
        loss_of: Callable[[int], Tensor],
        evaluate: Callable[[], dict[str, float]] | None = None,
        *,
        title: str = "training",
    ) -> list[dict[str, float]]:
        """Train with AdamW, a warm-up, a cosine and clipped gradients.

        Args:
            model: on the device.
            loss_of: from the step to the loss of a batch.
            evaluate: called up to 10 times, the last time after the last step; the model is then in evaluation mode.
            title: of the progress bar.

        Returns:
            One point for each evaluation: its step, the mean loss since the one before, seconds, and what ``evaluate`` gives.
        """
        arguments, steps = self.arguments, self.arguments.steps
        optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        # Short runs, as those of the tests, would do little else than evaluate.
        evaluations = min(10, max(2, steps // 20))
        stops = {math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)}
        curve: list[dict[str, float]] = []
        total, since = torch.zeros((), device=self.device), 0
        started = time.perf_counter()
        model.train()
        with self.console.progress(title, steps) as bar:
            for step in range(1, steps + 1):
                with self.autocast():
                    loss = loss_of(step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total, since = total + loss.detach().float(), since + 1
                if step in stops:
                    point = {"step": step, "loss": total.item() / since, "seconds": time.perf_counter() - started}
                    if not math.isfinite(point["loss"]):
                        raise CommandError(f"the loss is {point['loss']} by step {step}: try a smaller --learning-rate")
                    if evaluate is not None:
                        with self.evaluating(model):
                            point |= evaluate()
                    curve.append(point)
                    total, since = torch.zeros_like(total), 0
                    if not self.console.shows_progress:
                        self.console.line(f"{title}: {_told(point)}")
                bar.advance(_told(curve[-1]) if curve else "")
        return curve

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode, without gradients, in the dtypes of training."""
        model.eval()
        with torch.no_grad(), self.autocast():
            yield
        model.train()

    def finish(
        self,
        statement: str,
        result: dict[str, Any],
        sizes: dict[str, Any],
        curve: Sequence[dict[str, Any]],
        panels: Sequence[Callable[[Any], None]],
    ) -> None:
        """Write ``result.json`` and ``curve.png``, and print the statement.

        Args:
            statement: the result in one line.
            result: the numbers it states.
            sizes: of model and data.
            curve: the points of training.
            panels: each draws on one pair of axes.
        """
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        content = {
            "example": Path(sys.argv[0]).stem, "statement": statement, "result": result,
            "command": [Path(sys.executable).name, *sys.argv],
            "arguments": {name: value if isinstance(value, (int, float, list)) else str(value)
                          for name, value in vars(self.arguments).items()},
            "sizes": sizes, "seconds": time.perf_counter() - self.started, "torch": torch.__version__, "device": where,
            "curve": list(curve),
        }  # fmt: skip
        save_figure(self.folder / "curve.png", panels, statement)
        (self.folder / "result.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        self.console.line(f"{statement}  [{content['seconds']:.0f} s on {where}; {self.folder / 'result.json'}]")


def run(execute: Callable[[Run], None], parser: Parser) -> NoReturn:
    """Parse, execute, exit: 0 done, 2 the request was wrong, 130 interrupted."""
    try:
        execute(Run(parser.parse_args()))
    except CommandError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; no results were written", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def save_figure(path: Path, panels: Sequence[Callable[[Any], None]], title: str) -> None:
    """Draw panels side by side into a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib") from None
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for index, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(1, len(panels), index))
    figure.suptitle(title, fontsize=8, wrap=True)
    figure.savefig(path, format="png", dpi=130)


def learning_curve(curve: Sequence[dict[str, float]], *names: str, label: str = "") -> Callable[[Any], None]:
    """The panel of what was measured while training: every name against the step."""

    def draw(axes: Any) -> None:
        for name in names:
            axes.plot([point["step"] for point in curve], [point[name] for point in curve], marker="o", ms=3, label=name)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    return draw


def missing(package: str) -> CommandError:
    """The error of an example whose package is not there."""
    return CommandError(f"needs {package}: pip install 'perceiver-kernels[examples]'")


def _rate(step: int, steps: int) -> float:
    warmup = max(WARMUP * steps, 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))), 0.01)


def _told(point: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.0f}" if name in ("step", "seconds") else f"{name} {value:.3f}" for name, value in point.items()
    )
