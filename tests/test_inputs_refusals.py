"""What InputArray and its constructors refuse: the error names the argument, the rule and the value."""

from __future__ import annotations

import math

import pytest
import torch

from perceiver_kernels.inputs import FourierPositions, InputArray

CONTENT = torch.zeros(2, 6, 3)
BYTES = CONTENT.byte()
MASK = torch.ones(2, 6, dtype=torch.bool)
PLANE = FourierPositions(4, (8, 8))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"content": 3}, TypeError, r"content must be a tensor \[B, M, C_content\], got int"),
        (
            {"content": CONTENT.long()},
            TypeError,
            "content must be float32 or bfloat16 or .* or uint8, got int64",
        ),
        ({"content": CONTENT.cfloat()}, TypeError, "content must be .*, got complex64"),
        ({"content": CONTENT[0]}, ValueError, r"content must be \[B, M, C_content\], got \(6, 3\)"),
        (
            {"content": CONTENT[..., :0]},
            ValueError,
            "content and positions must have a channel between them, got C=0",
        ),
        (
            {"positions": "fourier"},
            TypeError,
            r"positions must be a tensor .* or a FourierPositions, got str",
        ),
        ({"positions": torch.zeros(6, 4).int()}, TypeError, "positions must be float32 or .*, got int32"),
        (
            {"positions": torch.zeros(5, 4)},
            ValueError,
            r"positions must be \[M, P\] or \[B, M, P\] with B=2, M=6, or a FourierPositions, got \(5, 4\)",
        ),
        (
            {"positions": torch.zeros(1, 6, 4)},
            ValueError,
            r"positions must be .* with B=2, M=6, .*, got \(1, 6, 4\)",
        ),
        (
            {"coordinates": torch.zeros(6, 2)},
            ValueError,
            "coordinates must be None unless positions is a Fourier",
        ),
        ({"grid": (2, 3)}, ValueError, "grid must be None unless positions is a FourierPositions"),
        ({"positions": PLANE}, ValueError, "either coordinates or grid must be given .*, got neither"),
        (
            {"positions": PLANE, "grid": (2, 3), "coordinates": torch.zeros(6, 2)},
            ValueError,
            "either coordinates or grid must be given with a FourierPositions, got both",
        ),
        (
            {"positions": PLANE, "coordinates": torch.zeros(6, 3)},
            ValueError,
            r"coordinates must be \[M, axes\] or \[B, M, axes\] with B=2, M=6, axes=2, got \(6, 3\)",
        ),
        (
            {"positions": PLANE, "coordinates": torch.zeros(6, 2).long()},
            TypeError,
            "coordinates must be .*, got int64",
        ),
        ({"positions": PLANE, "grid": 6}, TypeError, "grid must be a tuple of integers, got 6"),
        (
            {"positions": PLANE, "grid": (2.0, 3)},
            TypeError,
            r"grid must be a tuple of integers, got \(2.0, 3\)",
        ),
        (
            {"positions": PLANE, "grid": (6,)},
            ValueError,
            r"grid must be 2 sizes whose product is M=6, got \(6,\)",
        ),
        (
            {"positions": PLANE, "grid": (2, 4)},
            ValueError,
            r"grid must be 2 sizes whose product is M=6, got \(2, 4\)",
        ),
        ({"positions": PLANE, "grid": (-2, -3)}, ValueError, r"grid must be 2 sizes .*, got \(-2, -3\)"),
        ({"key_mask": [True]}, TypeError, r"key_mask must be a tensor \[B, M\] with B=2, M=6, got list"),
        ({"key_mask": MASK.float()}, TypeError, "key_mask must be bool, True = visible, got float32"),
        ({"key_mask": MASK.byte()}, TypeError, "key_mask must be bool, True = visible, got uint8"),
        ({"key_mask": MASK[:1]}, ValueError, r"key_mask must be \[B, M\] with B=2, M=6, got \(1, 6\)"),
        ({"lengths": (6, 6)}, TypeError, r"lengths must be a tensor \[B\] with B=2, got tuple"),
        ({"lengths": torch.ones(2).long()}, TypeError, "lengths must be int32, got int64"),
        ({"lengths": torch.ones(6).int()}, ValueError, r"lengths must be \[B\] with B=2, got \(6,\)"),
        (
            {"lengths": torch.ones(2).int(), "key_mask": MASK},
            ValueError,
            "key_mask and lengths exclude each other",
        ),
        (
            {"mean": (0.5,) * 3},
            TypeError,
            "mean must be None unless content is uint8, got content of float32",
        ),
        ({"content": BYTES, "mean": 0.5}, TypeError, "mean must be a tuple of finite numbers, got 0.5"),
        ({"content": BYTES, "mean": (0.5,) * 2}, ValueError, "mean must hold C_content=3 numbers, got 2"),
        (
            {"content": BYTES, "mean": (0.5, 0.5, math.nan)},
            ValueError,
            "mean must be a tuple of finite numbers",
        ),
        (
            {"content": BYTES, "std": (1, 1, 0)},
            ValueError,
            r"std must be .* finite positive numbers, got \(1, 1, 0\)",
        ),
        (
            {"content": BYTES, "std": (1, 1, True)},
            TypeError,
            "std must be a tuple of finite positive numbers",
        ),
    ],
)
def test_input_array(fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InputArray(**{"content": CONTENT} | fields)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        (
            "image",
            (torch.zeros(3, 224, 224),),
            ValueError,
            r"images must be \[B, Ch, H, W\], got \(3, 224, 224\)",
        ),
        ("image", ("cat.png",), TypeError, r"images must be a tensor \[B, Ch, H, W\], got str"),
        ("image", (torch.zeros(1, 3, 4, 4).long(),), TypeError, "images must be .* or uint8, got int64"),
        (
            "image",
            (torch.zeros(1, 3, 4, 4), FourierPositions(4, (8,))),
            ValueError,
            r"grid must be 1 sizes whose product is M=16, got \(4, 4\)",
        ),
        (
            "image",
            (torch.zeros(1, 3, 4, 4), torch.zeros(4, 4, 9)),
            ValueError,
            "positions must be .*, got .4, 4, 9.",
        ),
        (
            "video",
            (torch.zeros(4, 3, 8, 8),),
            ValueError,
            r"video must be \[B, T, Ch, H, W\], got \(4, 3, 8, 8\)",
        ),
        (
            "video",
            (torch.zeros(1, 4, 3, 8, 8), 2),
            TypeError,
            r"patch must be integers for \(T, H, W\), got 2",
        ),
        (
            "video",
            (torch.zeros(1, 4, 3, 8, 8), (1, 3, 4)),
            ValueError,
            r"patch must be positive and divide \(T, H, W\) = \(4, 8, 8\), got \(1, 3, 4\)",
        ),
        ("video", (torch.zeros(1, 4, 3, 8, 8), (2, 2)), ValueError, r"patch must .*, got \(2, 2\)"),
        (
            "video",
            (torch.zeros(1, 4, 3, 8, 8), (0, 1, 1)),
            ValueError,
            r"patch must be positive .*, got \(0, 1, 1\)",
        ),
        ("audio", (torch.zeros(96),), ValueError, r"samples must be \[B, S\] or \[B, S, Ch\], got \(96,\)"),
        ("audio", (torch.zeros(1, 96).short(),), TypeError, "samples must be .*, got int16"),
        (
            "audio",
            (torch.zeros(1, 96), 7),
            ValueError,
            r"patch must be positive and divide \(S,\) = \(96,\), got \(7,\)",
        ),
        ("audio", (torch.zeros(1, 96), 16.0), TypeError, r"patch must be integers for \(S,\), got \(16.0,\)"),
        ("points", (torch.zeros(6, 3),), ValueError, r"coordinates must be \[B, M, axes\], got \(6, 3\)"),
        (
            "points",
            (torch.zeros(2, 6, 0),),
            ValueError,
            r"coordinates must have at least one axis, got \(2, 6, 0\)",
        ),
        (
            "points",
            (torch.zeros(2, 6, 3), torch.zeros(2, 5, 1)),
            ValueError,
            r"features must be \[B, M, F\] with B=2, M=6, got \(2, 5, 1\)",
        ),
        (
            "points",
            (torch.zeros(2, 6, 3), torch.zeros(2, 6, 1).long()),
            TypeError,
            "features must be .*, got int64",
        ),
        (
            "points",
            (torch.zeros(2, 6, 3), None, torch.zeros(6, 4)),
            TypeError,
            "positions must be a FourierPositions, got Tensor",
        ),
        (
            "points",
            (torch.zeros(2, 6, 3), None, PLANE),
            ValueError,
            r"coordinates must be .* axes=2, got \(2, 6, 3\)",
        ),
        ("tokens", (torch.zeros(6, 3),), ValueError, r"content must be \[B, M, C\], got \(6, 3\)"),
        ("tokens", (torch.zeros(2, 6, 3).long(),), TypeError, "content must be .*, got int64"),
        ("tokens", (CONTENT, PLANE), ValueError, r"grid must be 2 sizes whose product is M=6, got \(6,\)"),
    ],
)
def test_constructors(name: str, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(InputArray, name)(*arguments)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_of_video(name: str) -> None:
    video = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{name} must hold Ch=3 numbers, got 2"):
        InputArray.video(video, (2, 2, 2), **{name: (1.0, 1.0)})
    with pytest.raises(TypeError, match=f"{name} must be a tuple of finite numbers, got 1.0"):
        InputArray.video(video, (2, 2, 2), **{name: 1.0})
    with pytest.raises(ValueError, match=f"{name} must be a tuple of finite"):
        InputArray.video(video, (2, 2, 2), **{name: (1.0, 1.0, math.inf)})
