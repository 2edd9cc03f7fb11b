"""Weights of the authors' Set Transformer, there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perceiver_kernels import convert
from perceiver_kernels.models import Perceiver, SetTransformer, SetTransformerConfig
from tests.models.plain_set_transformer import PlainSetTransformer

FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_outputs": 3, "num_inducing": 5, "post_norm": True}, {"outputs": 3, "inducing": 5, "post_norm": True}),
    ({"num_inducing": None, "decoder_blocks": 1}, {"inducing": None, "decoder": 1}),
    ({"decoder_blocks": 0, "num_inducing": 2, "pooling_dropout": 0.5}, {"decoder": 0, "inducing": 2, "dropout": True}),
]


@pytest.mark.parametrize(("ours", "theirs"), FORMS)
def test_there_and_back_is_the_identity(ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Any) -> None:
    model = SetTransformer(SetTransformerConfig(3, 5, dim=16, **ours))
    oracle = PlainSetTransformer(3, 5, dim=16, heads=4, **theirs)
    state = oracle.state_dict()
    torch.save(state, tmp_path / "theirs.pt")
    convert.load(model, tmp_path / "theirs.pt", "set_transformer")
    back = convert.to_library(model, "set_transformer")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    model.eval()
    x = torch.randn(2, 11, 3)
    torch.testing.assert_close(model(x), oracle(x))


def test_names_of_the_published_models() -> None:
    """As the authors' two model files lay them out, ModelNet40's with dropout layers at places 0 and 2 of the decoder."""
    mixture = set(convert.to_library(SetTransformer.mixture_of_gaussians(device="meta"), "set_transformer"))
    assert {"enc.0.I", "enc.1.mab1.fc_o.bias", "dec.0.S", "dec.0.mab.fc_q.weight"} < mixture
    assert {"dec.2.mab.fc_v.bias", "dec.3.weight"} < mixture
    cloud = set(convert.to_library(SetTransformer.modelnet40(device="meta"), "set_transformer"))
    assert {"enc.0.mab0.fc_k.weight", "dec.1.S", "dec.1.mab.fc_o.weight", "dec.3.bias"} < cloud
    assert {name.split(".")[1] for name in cloud if name.startswith("dec")} == {"1", "3"}


def test_what_has_no_counterpart_is_named() -> None:
    model = SetTransformer(SetTransformerConfig(3, 5, dim=16, pooling_feed_forward=True))
    with pytest.raises(ValueError, match="pooling_feed_forward must be False, as in the authors' code, got True"):
        convert.to_library(model, "set_transformer")
    with pytest.raises(ValueError, match="set_transformer has no model like Perceiver, but SetTransformer"):
        convert.to_library(Perceiver.imagenet(device="meta"), "set_transformer")
    with pytest.raises(ValueError, match="it lacks: .*enc.0.mab0.fc_q.weight"):
        convert.load(SetTransformer(SetTransformerConfig(3, 5, dim=16)), {}, "set_transformer")
