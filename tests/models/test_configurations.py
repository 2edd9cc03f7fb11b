"""Fields that do not exist are named, with those that are near, wherever published sizes are changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from perceiver_kernels.models import (
    RIN,
    Perceiver,
    PerceiverAR,
    PerceiverIO,
    PerceiverResampler,
    SetTransformer,
    VecSetAutoencoder,
)

CONSTRUCTORS: dict[Callable[..., Any], str] = {
    build: config
    for config, builds in {
        "EncoderConfig": (
            PerceiverIO.imagenet_fourier, PerceiverIO.language, PerceiverIO.optical_flow, PerceiverIO.multimodal,
            PerceiverIO.perceiver_pytorch_lm, PerceiverIO.mnist,
        ),
        "PerceiverConfig": (Perceiver.imagenet, Perceiver.perceiver_pytorch),
        "PerceiverARConfig": (PerceiverAR.copy_task, PerceiverAR.imagenet64),
        "PerceiverResamplerConfig": (PerceiverResampler.flamingo, PerceiverResampler.idefics2),
        "SetTransformerConfig": (SetTransformer.modelnet40,),
        "RINConfig": (RIN.cifar10,),
        "VecSetConfig": (VecSetAutoencoder.shapenet, VecSetAutoencoder.large),
    }.items()
    for build in builds
}  # fmt: skip


@pytest.mark.parametrize("build", list(CONSTRUCTORS), ids=lambda build: build.__qualname__)
def test_unknown_fields_are_named(build: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"fields of {CONSTRUCTORS[build]} \(nearest: .*num_\w+.*\), got num_latent=3"):
        build(device="meta", num_latent=3)
