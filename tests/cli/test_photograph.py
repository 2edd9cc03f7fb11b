"""Photographs from files: every depth gives the same picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perceiver_kernels.cli import photograph
from perceiver_kernels.cli.report import CommandError

numpy = pytest.importorskip("numpy")
image = pytest.importorskip("PIL.Image")

GREY = [[0, 64, 128], [192, 254, 255]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_cut_off(suffix: str, tmp_path: Path) -> None:
    """Pillow's conversion makes every 16-bit value above 255 white."""
    image.fromarray(257 * numpy.array(GREY, dtype=numpy.uint16)).save(tmp_path / f"wide.{suffix}")
    image.fromarray(numpy.array(GREY, dtype=numpy.uint8)).save(tmp_path / f"narrow.{suffix}")
    for name in ("wide", "narrow"):
        ((_, pixels),) = photograph.load(str(tmp_path / f"{name}.{suffix}"))
        assert pixels.dtype == torch.uint8 and pixels.tolist() == 3 * [GREY]


@pytest.mark.parametrize(
    "pixels", [numpy.full((2, 3), 0.5, numpy.float32), numpy.full((2, 3), 70_000, numpy.int32)]
)
def test_other_depths_are_refused(pixels: object, tmp_path: Path) -> None:
    path = tmp_path / "deep.tiff"
    image.fromarray(pixels).save(path)
    with pytest.raises(CommandError, match=f"cannot read image {path}: pixels must be 8 or 16 bits, got "):
        photograph.load(str(path))
