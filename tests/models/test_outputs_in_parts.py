"""Outputs of Perceiver IO that are asked for a part at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models.queries import FourierQueries, InputQueries, LearnedQueries
from perceiver_kernels.nn import OutputCrossAttention
from tests.models.test_perceiver_io import MODELS


def test_outputs_in_parts_read_the_inputs_once() -> None:
    """A video's pixels a part at a time, as they are decoded at full size; what is not asked for is empty."""
    build, inputs = MODELS["multimodal"]
    torch.manual_seed(0)
    model, raw, ran = build().eval(), inputs(), []
    pixels, none = torch.arange(128), torch.arange(0)
    expected = model(raw, points={"image": pixels, "audio": torch.arange(4), "label": None})
    for module in (model.encoder, model.decoder.attention.norm_latents):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    encoded = model.prepare(model.encode(raw))
    assert model.prepare(encoded) is encoded
    parts = [model.decode(encoded, points={"image": part, "audio": none, "label": None}) for part in pixels.split(50)]
    torch.testing.assert_close(torch.cat([part["image"] for part in parts], 1), expected["image"])
    assert {name: tuple(t.shape) for name, t in parts[0].items()} == {"audio": (2, 0), "image": (2, 50, 3), "label": (2, 5)}
    assert ran == [model.encoder, model.decoder.attention.norm_latents]
    torch.testing.assert_close(parts[0]["label"], expected["label"])


PARTS: dict[str, tuple[int, int]] = {"language": (9, 4), "flow": (20, 7), "fourier": (1, 1)}


@pytest.mark.parametrize("name", list(PARTS))
def test_slices_are_the_whole(name: str) -> None:
    """Of learned queries and of the inputs themselves, which for flow are pixels and the places of their grid."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, (count, size) = build().eval().double(), PARTS[name]
    raw = inputs()
    raw = raw.double() if raw.is_floating_point() else raw
    encoded = model.prepare(model.encode(raw))
    whole = model.decode(encoded)
    parts = [model.decode(encoded, points=slice(i, min(i + size, count))) for i in range(0, count, size)]
    joined = torch.cat(parts, 1) if name != "fourier" else parts[0]
    torch.testing.assert_close(joined, whole.flatten(1, 2) if name == "flow" else whole)


def test_slices_of_places_are_those_of_the_grid() -> None:
    """Picked ones are not; both as the originals have it."""
    array, queries = torch.zeros(1, 3, 5), FourierQueries((3, 4), FourierPositions(2, (3.0, 4.0)))
    whole = queries(array).slice().positions
    parts = [queries(array, slice(i, i + 4)).slice().positions for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(queries(array, torch.arange(12)).slice().positions, whole)


FOURIER = FourierPositions(2, (3.0, 4.0))
ARRAYS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "positions": {"positions": torch.randn(12, 3)},
    "positions of each": {"positions": torch.randn(2, 12, 3)},
    "grid": {"positions": FOURIER, "grid": (3, 4)},
    "coordinates": {"positions": FOURIER, "coordinates": torch.rand(2, 12, 2)},
    "mask": {"key_mask": torch.rand(2, 12) < 0.5},
    "lengths": {"lengths": torch.tensor([3, 9], dtype=torch.int32)},
    "bytes": {"content": torch.randint(0, 256, (2, 12, 5), dtype=torch.uint8), "mean": (0.5,) * 5, "std": (0.2,) * 5},
}  # fmt: skip


@pytest.mark.parametrize("name", list(ARRAYS))
def test_a_part_of_an_array_is_its_slice(name: str) -> None:
    array = InputArray(**{"content": torch.randn(2, 12, 5), **ARRAYS[name]})
    part = InputQueries(array.channels)(array, slice(5, 11))
    assert isinstance(part, InputArray) and part.length == 6
    expected, actual = array.slice(5, 11), part.slice()
    for field in ("content", "positions", "fourier", "key_mask"):
        a, e = getattr(actual, field), getattr(expected, field)
        assert (a is None and e is None) or torch.equal(a, e), field


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        (slice(0, 13), ValueError, r"points must be a slice of 0\.\.O=12 without a step, got slice\(0, 13, None\)"),
        (slice(-1, 3), ValueError, "points must be a slice"),
        (slice(4, 3), ValueError, "points must be a slice"),
        (slice(0, 4, 2), ValueError, "points must be a slice"),
        (slice(0.0, 4), ValueError, "points must be a slice"),
    ],
)
def test_wrong_slices_are_named(points: slice, error: type[Exception], message: str) -> None:
    array = torch.zeros(1, 12, 5)
    for queries in (InputQueries(5), LearnedQueries(12, 5), FourierQueries((3, 4), FOURIER)):
        with pytest.raises(error, match=message):
            queries(array, points)


def test_prepared_latents_are_of_the_decoder() -> None:
    build, inputs = MODELS["fourier"]
    model = build().eval()
    encoded = model.prepare(model.encode(inputs()))
    assert isinstance(model.decoder.attention, OutputCrossAttention) and encoded.latents.layer is model.decoder.attention
