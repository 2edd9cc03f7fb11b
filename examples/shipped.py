"""Real data that comes with Python or with installed packages: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from common import missing
from torch import Tensor

from perceiver_kernels.cli.report import CommandError

HELD_OUT = 0.1
"""Share of the text that is held out, in whole topics."""


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images float [1797, 1, 8, 8] in [0, 1], labels int64 [1797] of 10 classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing("scikit-learn") from None
    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()


def faces() -> tuple[Tensor, Tensor]:
    """scikit-image's part of LFW: images float [200, 1, 25, 25] in [0, 1], labels int64 [200], 1 for a face, 0 for none."""
    images = torch.from_numpy(_skimage().lfw_subset()).float()
    return images[:, None], (torch.arange(200) < 100).long()


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices for training and testing, the share of every class for testing, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        test[members[: round(share * len(members))]] = True
    return (~test).nonzero()[:, 0], test.nonzero()[:, 0]


def photographs(names: Iterable[str]) -> dict[str, Tensor]:
    """Photographs of scikit-image, by the names of their functions: float [3, H, W] in [0, 1]."""
    data, found = _skimage(), {}
    for name in names:
        pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
        found[name] = torch.from_numpy(pixels.copy())[..., :3].permute(2, 0, 1).float() / 255
    return found


def english() -> tuple[dict[str, str], dict[str, str]]:
    """The reference documentation in CPython's ``pydoc_data``, by topic: for training, held out.

    The topics share paragraphs. Every paragraph counts once, and what is held out is no part of the text for training.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CommandError("needs pydoc_data, which comes with CPython's standard library") from None
    # In an order without meaning that does not depend on Python's version.
    names = sorted(topics, key=lambda name: zlib.crc32(name.encode()))
    wanted = HELD_OUT * sum(map(len, topics.values()))
    seen: set[str] = set()
    held_out: dict[str, str] = {}
    train: dict[str, str] = {}
    for name in names:
        part = held_out if sum(map(len, held_out.values())) + len(topics[name]) <= wanted else train
        kept = []
        for paragraph in re.split(r"\n\s*\n", topics[name].strip()):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(paragraph)
            seen.add(words)
        if kept:
            part[name] = "\n\n".join(kept) + "\n\n"
    return train, held_out


def sentences(text: str) -> list[str]:
    """Sentences of prose, in one line each: what ends with a full stop and holds at least five words."""
    found = re.findall(r"[A-Z][^.:\n]*(?:\n[^.:\n]+)*\.(?=\s)", text)
    joined = (" ".join(sentence.split()) for sentence in found)
    return [sentence for sentence in joined if len(sentence.split()) >= 5]


def source_lines(module: str) -> list[str]:
    """Lines of a module of the standard library, blank ones left out."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise CommandError(f"needs the source of the standard library's module {module}")
    return [line for line in Path(spec.origin).read_text(encoding="utf-8").splitlines() if line.strip()]


def _skimage():  # type: ignore[no-untyped-def]
    try:
        from skimage import data
    except ImportError:
        raise missing("scikit-image") from None
    return data
