"""Real photographs as model inputs: scikit-image's own, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.cli.report import CommandError

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(path: str | None) -> list[tuple[str, Tensor]]:
    """Return named photographs, uint8 [3, H, W].

    Args:
        path: an image file; None takes the photographs that scikit-image ships.

    Raises:
        CommandError: the file is missing, unreadable or no image; or nothing that reads images is installed.
    """
    return _shipped() if path is None else [(Path(path).name, _read(Path(path)))]


def crops(photographs: list[tuple[str, Tensor]], count: int, side: int) -> Tensor:
    """Return square crops, uint8 [count, 3, side, side], of the photographs and their corners in turn."""
    batch = []
    for index in range(count):
        _, pixels = photographs[index % len(photographs)]
        batch.append(_crop(pixels, side, corner=index // len(photographs)))
    return torch.stack(batch)


def _crop(pixels: Tensor, side: int, corner: int) -> Tensor:
    """The centre square for corner 0, then three quarters of it from a corner, mirrored past the fourth."""
    edge = min(pixels.shape[1:])
    top, left = (pixels.shape[1] - edge) // 2, (pixels.shape[2] - edge) // 2
    square = pixels[:, top : top + edge, left : left + edge]
    if corner:
        part = max(3 * edge // 4, 1)
        top, left = ((edge - part) * (corner >> 1 & 1), (edge - part) * (corner & 1))
        square = square[:, top : top + part, left : left + part]
        square = square.flip(-1) if corner > 4 else square
    resized = torch.nn.functional.interpolate(
        square[None].float(), (side, side), mode="bilinear", antialias=True
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _shipped() -> list[tuple[str, Tensor]]:
    try:
        from skimage import data
    except ImportError:
        raise CommandError(
            "no photograph: install scikit-image (pip install 'perceiver-kernels[cli]') or pass --image PATH"
        ) from None
    found = []
    for name in NAMES:
        try:
            pixels = getattr(data, name)()
        except (OSError, AttributeError, ImportError, RuntimeError, ValueError):
            # Photographs that a version does not ship would be downloaded; those that it does ship are
            # enough.
            continue
        found.append((name, torch.from_numpy(pixels.copy())[..., :3].permute(2, 0, 1)))
    if not found:
        raise CommandError("scikit-image ships no photograph here; pass --image PATH")
    return found


def _read(path: Path) -> Tensor:
    if not path.is_file():
        raise CommandError(
            f"cannot read image {path}: {'is a directory' if path.is_dir() else 'no such file'}"
        )
    try:
        import numpy
        from PIL import Image
    except ImportError:
        raise CommandError("--image needs Pillow: pip install 'perceiver-kernels[cli]'") from None
    try:
        with Image.open(path) as image:
            is_wide = image.mode.startswith(("I", "F"))
            pixels = _from_wide(numpy.array(image)) if is_wide else numpy.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for a broken PNG; a truncated file is an OSError.
        raise CommandError(f"cannot read image {path}: {' '.join(str(error).split())}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _from_wide(grey: Any) -> Any:
    """Grey pixels of more than 8 bits as 8-bit RGB; Pillow's own conversion cuts every value off at 255."""
    if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"pixels must be 8 or 16 bits, got {grey.dtype} from {grey.min()} to {grey.max()}")
    return (grey[..., None] / 257).round().astype("uint8").repeat(3, axis=-1)
