"""State dicts that do not fit: for every library and kind of rule, one error lists all under their names, nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.convert.rules import Rule
from perceiver_kernels.models import (
    LinformerLM,
    LinformerLMConfig,
    Perceiver,
    PerceiverAR,
    PerceiverIO,
    PerceiverResampler,
    SetTransformer,
    SetTransformerConfig,
)

LATENTS: dict[str, Any] = {"num_latents": 6, "latent_dim": 16}
ENCODER: dict[str, Any] = {**LATENTS, "num_blocks": 2, "layers_per_block": 1, "latent_heads": 4, "like": "transformers"}
RESAMPLER: dict[str, Any] = {"dim": 24, "depth": 2, "num_latents": 4, "num_heads": 3, "head_dim": 5}
PROJECTED: dict[str, Any] = {**RESAMPLER, "input_dim": 10, "output_dim": 14}
LUCIDRAINS: dict[str, Any] = {**LATENTS, "qk_channels": 7, "latent_heads": 4, "latent_qk_channels": 20}
AR: dict[str, Any] = {"vocab_size": 13, "max_length": 20, "num_latents": 8, "dim": 48, "num_heads": 3, "num_layers": 2}
KEYS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}

# Libraries and models of ours that they have.
MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "transformers, learned": ("transformers", lambda: PerceiverIO.imagenet_learned(image_size=6, num_classes=5, **ENCODER)),
    "transformers, conv": ("transformers", lambda: PerceiverIO.imagenet_conv(num_classes=5, **ENCODER)),
    "idefics": ("transformers", lambda: PerceiverResampler.idefics(qk_norm="layer", **RESAMPLER)),
    "idefics2": (
        "transformers", lambda: PerceiverResampler.idefics2(**RESAMPLER | KEYS, input_dim=10, input_hidden_dim=31)
    ),
    "flamingo_pytorch": ("flamingo_pytorch", lambda: PerceiverResampler.flamingo(max_media=3, **RESAMPLER)),
    "open_flamingo": ("open_flamingo", lambda: PerceiverResampler.open_flamingo(max_media=3, max_frames=2, **RESAMPLER)),
    "ip_adapter": ("ip_adapter", lambda: PerceiverResampler.ip_adapter_plus(**PROJECTED)),
    "diffusers": ("diffusers", lambda: PerceiverResampler.ip_adapter_plus(**PROJECTED)),
    "linformer": (
        "linformer", lambda: LinformerLM(LinformerLMConfig(vocab_size=7, length=9, num_keys=4, depth=2, dim=16))
    ),
    "perceiver_ar_pytorch": (
        "perceiver_ar_pytorch",
        lambda: PerceiverAR.perceiver_ar_pytorch(**AR, num_perceiver_layers=1, head_dim=32, rotary_width=32),
    ),
    "perceiver_io, images": (
        "perceiver_io",
        lambda: PerceiverIO.mnist(
            image_size=(5, 4), num_bands=3, num_classes=5, query_channels=8, decoder_heads=2, latent_heads=4, **LATENTS
        ),
    ),
    "perceiver_io, text": ("perceiver_io", lambda: PerceiverAR.clm_small(**AR)),
    "perceiver_pytorch": (
        "perceiver_pytorch",
        lambda: Perceiver.perceiver_pytorch(
            input_dim=17, num_classes=5, num_cross_attends=3, num_blocks=3, weight_sharing="v1", **LUCIDRAINS
        ),
    ),
    "set_transformer": ("set_transformer", lambda: SetTransformer(SetTransformerConfig(3, 5, dim=16, post_norm=True))),
}  # fmt: skip

KINDS: dict[str, Callable[[Rule], bool]] = {
    "stacked": lambda rule: bool(rule.sizes),
    "parted": lambda rule: rule.rows is not None,
    "reshaped": lambda rule: rule.read is not None,
    "buffer": lambda rule: rule.value is not None,
    "shared": lambda rule: rule.same_as is not None,
    "renamed": lambda rule: rule == Rule(rule.ours, rule.theirs),
}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "width": lambda t: torch.cat((t, t[..., :1]), -1),
    "rows": lambda t: torch.cat((t, t[:1])),
    "rank": lambda t: t[None],
    "tail": lambda t: t[..., None].expand(*t.shape, 2),
}


def examples(rules: list[Rule]) -> dict[str, tuple[str, ...]]:
    """For each kind of rule, the names of the first that is of it."""
    first = {kind: next((rule.theirs for rule in rules if of(rule)), None) for kind, of in KINDS.items()}
    return {kind: names for kind, names in first.items() if names is not None}


def every_corruption() -> list[Any]:
    return [
        pytest.param(name, key, id=f"{name}-{kind}-{key}")
        for name, (library, build) in MODELS.items()
        for kind, names in examples(convert.rules_of(build(), library)).items()
        for key in names
    ]


def written(name: str) -> tuple[nn.Module, str, dict[str, Tensor]]:
    """A model, its library and, in their names, weights of which none is the model's."""
    library, build = MODELS[name]
    model = build()
    state = {key: tensor.clone() for key, tensor in convert.to_library(model, library).items()}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.add_(1)
    return model, library, state


def refused(model: nn.Module, library: str | None, state: dict[str, Tensor]) -> list[str]:
    """Lines of the error, which leaves the model as it was."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        convert.load(model, state, library)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    title, *lines = str(error.value).splitlines()
    assert title == "the state dict does not fit the model"
    return lines


def of_wrong_shape(wrong: dict[str, Tensor], fitting: dict[str, Tensor]) -> str:
    each = (f"{key} {tuple(t.shape)} instead of {tuple(fitting[key].shape)}" for key, t in wrong.items())
    return f"  of wrong shape: {', '.join(sorted(each))}"


def test_every_library_and_kind_of_rule_is_here() -> None:
    assert {library for library, _ in MODELS.values()} == set(convert.LIBRARIES)
    assert {kind for library, build in MODELS.values() for kind in examples(convert.rules_of(build(), library))} == set(KINDS)


@pytest.mark.parametrize(("name", "key"), every_corruption())
def test_one_of_wrong_shape_is_named_as_the_file_names_it(name: str, key: str) -> None:
    model, library, state = written(name)
    for change in CHANGES.values():
        wrong = {key: change(state[key])}
        assert refused(model, library, state | wrong)[0] == of_wrong_shape(wrong, state)


@pytest.mark.parametrize("name", MODELS)
def test_all_of_wrong_shape_are_listed(name: str) -> None:
    model, library, state = written(name)
    wrong = {key: tensor[None] for key, tensor in state.items()}
    assert refused(model, library, wrong) == [of_wrong_shape(wrong, state)]


@pytest.mark.parametrize("name", MODELS)
def test_missing_additional_and_of_wrong_shape_are_one_error(name: str) -> None:
    model, library, state = written(name)
    rules = convert.rules_of(model, library)
    missing = next(rule.theirs[0] for rule in reversed(rules) if rule.ours)
    wrong = {key: state[key][None] for names in examples(rules).values() for key in names if key != missing}
    given = {key: tensor for key, tensor in state.items() if key != missing} | {"other.weight": torch.zeros(1)} | wrong
    lines = refused(model, library, given)
    assert lines[:3] == [f"  it lacks: {missing}", "  it has besides: other.weight", of_wrong_shape(wrong, state)]


@pytest.mark.parametrize("name", MODELS)
def test_files_of_16_bits_and_without_buffers_are_read(name: str, tmp_path: Path) -> None:
    model, library, state = written(name)
    optional = {key for rule in convert.rules_of(model, library) if not rule.ours for key in rule.theirs}
    for dtype in (torch.bfloat16, torch.float16):
        narrow = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items() if key not in optional}
        torch.save(narrow, tmp_path / "narrow.pt")
        convert.load(model, tmp_path / "narrow.pt", library)
        back = convert.to_library(model, library)
        assert all(torch.equal(back[key], tensor.to(back[key].dtype)) for key, tensor in narrow.items())


@pytest.mark.parametrize(
    ("name", "key", "shape", "instead"),
    [
        ("transformers, learned", "perceiver.input_preprocessor.convnet_1x1.weight", (256, 3, 3, 3), (256, 3, 1, 1)),
        ("flamingo_pytorch", "media_pos_emb", (3, 24), (3, 1, 24)),
        ("open_flamingo", "media_time_embs", (3, 24), (3, 1, 24)),
        ("ip_adapter", "latents", (4, 24), (1, 4, 24)),
        ("perceiver_ar_pytorch", "rotary_pos_emb.inv_freq", (7,), (16,)),
        ("perceiver_io, text", "input_adapter.frq_pos_encoding.inv_freq", (16,), (4,)),
        ("perceiver_io, images", "0.input_adapter.position_encoding.position_encoding", (4, 5, 14), (20, 14)),
    ],
)
def test_what_a_rule_would_drop_is_named(name: str, key: str, shape: tuple[int, ...], instead: tuple[int, ...]) -> None:
    model, library, state = written(name)
    given = state | {key: torch.zeros(shape)}
    assert refused(model, library, given) == [f"  of wrong shape: {key} {shape} instead of {instead}"]


def test_ours_are_named_alike() -> None:
    model = MODELS["set_transformer"][1]()
    state = dict(model.state_dict())
    del state["head.bias"]
    given = state | {"other": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert refused(model, None, given) == [
        "  it lacks: head.bias", "  it has besides: other", "  of wrong shape: head.weight (1,) instead of (5, 16)"
    ]  # fmt: skip
