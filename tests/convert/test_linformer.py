"""Weights of the package linformer, there and back."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels import convert
from perceiver_kernels.models import Linformer, LinformerConfig, LinformerLM, LinformerLMConfig

linformer = pytest.importorskip("linformer")


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("one_kv_head", [False, True])
def test_there_and_back_is_the_identity(one_kv_head: bool, share_kv: bool) -> None:
    options = {"one_kv_head": one_kv_head, "share_kv": share_kv, "depth": 2, "dim": 16}
    pairs = (
        (Linformer(LinformerConfig(length=9, num_keys=4, **options)), linformer.Linformer(seq_len=9, k=4, **options)),
        (
            LinformerLM(LinformerLMConfig(vocab_size=7, length=9, num_keys=4, **options)),
            linformer.LinformerLM(num_tokens=7, seq_len=9, k=4, **options),
        ),
    )
    for model, original in pairs:
        state = original.state_dict()
        convert.load(model, state, "linformer")
        back = convert.to_library(model, "linformer")
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
        original.load_state_dict(back)


def test_what_does_not_fit_is_named() -> None:
    model = Linformer(LinformerConfig(length=9, depth=1, dim=16, share_kv=True))
    state = linformer.Linformer(seq_len=9, depth=1, dim=16).state_dict()
    with pytest.raises(ValueError, match="it has besides: net.layers.0.0.fn.proj_v, net.layers.0.0.fn.to_v.weight"):
        convert.load(model, state, "linformer")
