"""The shape autoencoder against its description written out, its grid decoder, gradients by places, and training."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_kernels
from perceiver_kernels.functional import output_attention
from perceiver_kernels.models import LatentDistribution, VecSetAutoencoder, VecSetConfig
from perceiver_kernels.nn import farthest_points
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.models.plain_vecset import plain_decode, plain_encode
from tests.modules import perturbed, result_and_gradients

B, M, O = 2, 40, 23

SMALL: dict[str, Any] = {"num_latents": 7, "dim": 24, "decoder_layers": 2, "latent_heads": 3, "num_bands": 3, "drop_path": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "sampled": {},
    "learned": {"queries": "learned", "output_dim": 2},
    "bottleneck": {"bottleneck_dim": 5},
    "large": {
        "encoder_layers": 1, "cross_heads": 3, "feature_dim": 4, "activation": "gelu", "qk_norm": "layer", "head_norm": True,
        "eps": 1e-6,
    },
    "rms": {"qk_norm": "rms", "queries": "learned", "bottleneck_dim": 5},
}  # fmt: skip


def model_of(case: str, **changes: Any) -> VecSetAutoencoder:
    """A model with noise on every parameter, so that no bias is zero and no norm weight is one."""
    torch.manual_seed(0)
    model = VecSetAutoencoder(VecSetConfig(**{**SMALL, **CASES[case], **changes}), dtype=torch.float64)
    return perturbed(model, scale=0.2)


def arrays(model: VecSetAutoencoder) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    points, queries = (
        (torch.rand(B, n, 3, dtype=torch.float64, generator=generator) * 2 - 1).requires_grad_() for n in (M, O)
    )
    features = torch.randn(B, M, model.config.feature_dim, dtype=torch.float64, generator=generator).requires_grad_()
    return points, queries, features if model.config.feature_dim else None


def plain(model: VecSetAutoencoder, points: Tensor, queries: Tensor, features: Tensor | None = None) -> tuple[Tensor, Any]:
    encoded = plain_encode(model, points, features)
    if not isinstance(encoded, tuple):
        return plain_decode(model, encoded, queries), None
    mean, log_variance = encoded
    kl = (mean**2 + log_variance.exp() - 1 - log_variance).mean((1, 2)) / 2
    return plain_decode(model, mean, queries), kl


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to rounding of fp64, relative to the largest element of each tensor, or of a bias's weight.

    Some biases shift all scores of a row alike, or all values: their gradients are rounding of what the weights' sum.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(t.abs().max().item() for t in (tensor, expected[name.replace(".bias", ".weight")]))
        rounding = 1024 * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=rounding * scale, msg=lambda m, name=name: f"{name}: {m}")


def joined(outputs: tuple[Tensor, Tensor | None]) -> Tensor:
    return torch.cat([t.flatten() for t in outputs if t is not None])


@pytest.mark.parametrize("case", CASES)
def test_equals_its_description_written_out(case: str) -> None:
    """The field, the divergence, and the gradients of all parameters, the cloud, its features and the queries."""
    model = model_of(case).eval()
    leaves = [t for t in arrays(model) if t is not None]
    actual = result_and_gradients(lambda *t: joined(model(*t)), model, *leaves)
    assert_same(actual, result_and_gradients(lambda *t: joined(plain(model, *t)), model, *leaves))


@pytest.mark.parametrize("method", ["absorbed", "projected"])
def test_both_forms_of_one_head(method: str) -> None:
    model = model_of("sampled").eval()
    model.read.method = model.answer.method = method
    leaves = arrays(model)[:2]
    actual = result_and_gradients(lambda *t: joined(model(*t)), model, *leaves)
    assert_same(actual, result_and_gradients(lambda *t: joined(plain(model, *t)), model, *leaves))


def test_order_of_the_points_does_not_matter() -> None:
    model, order = model_of("learned").eval(), torch.randperm(M, generator=torch.Generator().manual_seed(2))
    points, queries, _ = arrays(model)
    torch.testing.assert_close(model(points[:, order], queries)[0], model(points, queries)[0], rtol=1e-11, atol=1e-11)
    model = model_of("sampled").eval()
    sample = farthest_points(points, 7)
    places = order.argsort()[sample]
    torch.testing.assert_close(model.encode(points[:, order], sample=places), model.encode(points, sample=sample))


def test_sampling() -> None:
    """From the first point in evaluation, from a random one in training, from the given ones where they are given."""
    model = model_of("sampled").eval()
    points = arrays(model)[0].detach()
    assert torch.equal(model.encode(points), model.encode(points, sample=farthest_points(points, 7)))
    model.train()
    encoded = [model.encode(points) for _ in range(4)]
    assert any(not torch.equal(encoded[0], other) for other in encoded[1:])


def test_bottleneck_draws_in_training_and_takes_the_mean_else() -> None:
    model = model_of("bottleneck").eval()
    points, queries, _ = arrays(model)
    distribution = model.encode(points)
    assert isinstance(distribution, LatentDistribution)
    assert torch.equal(model(points, queries)[0], model.decode(distribution.mean, queries))
    model.train()
    sample = farthest_points(points, 7)
    assert not torch.equal(model(points, queries, sample=sample)[0], model(points, queries, sample=sample)[0])
    wide = LatentDistribution(torch.full((1, 200, 200), 3.0), torch.full((1, 200, 200), 2.0))
    drawn = wide.sample()
    assert abs(drawn.mean() - 3) < 0.05 and abs(drawn.var() - torch.e**2) < 0.2
    normal = torch.distributions.Normal(wide.mean, torch.e)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).mean((1, 2))
    torch.testing.assert_close(wide.kl(), expected)


@pytest.mark.parametrize("chunk_size", [1, 17, 60, 1000])
@pytest.mark.parametrize("case", ["sampled", "large", "bottleneck"])
def test_grid_in_chunks_is_the_whole(case: str, chunk_size: int) -> None:
    """To rounding: products of another number of rows may add in another order."""
    model = model_of(case).eval()
    points, _, features = arrays(model)
    latents = model.encode(points, features)
    latents = latents.mean if isinstance(latents, LatentDistribution) else latents
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64).float().double() for n in (5, 3, 4)]
    queries = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3)
    expected = model.decode(latents, queries).view(B, 5, 3, 4, 1)
    actual = model.decode_grid(latents, (5, 3, 4), chunk_size)
    assert actual.shape == expected.shape and not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)


def test_grid_is_one_allocation_and_latents_are_transformed_once() -> None:
    model = model_of("sampled").eval()
    latents, runs, asked = model.encode(arrays(model)[0]), [], []
    model.decoder[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model.answer.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape[1]))
    out = torch.full((B, 4, 4, 4, 1), torch.nan, dtype=torch.float32)
    result = model.decode_grid(latents, 4, 30, out=out)
    assert result is out and out.isfinite().all() and runs == [1] and asked == [30, 30, 4]
    torch.testing.assert_close(out.double(), model.decode_grid(latents, 4), rtol=1e-5, atol=1e-5)
    assert model.decode_grid(latents, (1, 2, 3)).shape == (B, 1, 2, 3, 1)


def test_a_grid_makes_of_its_latents_once_what_its_chunks_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of("sampled").eval(), []
    for name in ("absorb_keys", "fold_norm"):
        original = getattr(output_attention, name)
        monkeypatch.setattr(output_attention, name, lambda *a, original=original: calls.append(1) or original(*a))
    model.decode_grid(model.encode(arrays(model)[0]), 4, 16)
    assert len(calls) == 1


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, told = model_of("sampled").eval(), []
    latents = model.encode(arrays(model)[0])
    silent = model.decode_grid(latents, 4, 25)
    assert torch.equal(model.decode_grid(latents, 4, 25, lambda done, total: told.append((done, total))), silent)
    assert told == [(25, 64), (50, 64), (64, 64)]
    assert torch.equal(model.decode_grid(latents, 4, 25, False), silent) and capsys.readouterr().out == ""
    assert torch.equal(model.decode_grid(latents, 4, 25, True), silent)
    with pytest.raises(TypeError, match=r"progress must be callable with \(done, total\), a bool or None, got 'bar'"):
        model.decode_grid(latents, 4, 25, "bar")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"progress=True needs rich: pip install perceiver-kernels\[cli\]"):
        model.decode_grid(latents, 4, 25, True)


@pytest.mark.parametrize("case", ["sampled", "large"])
def test_surfaces_are_trained_by_their_gradients(case: str) -> None:
    """An eikonal loss: the gradient by places, and the parameters' gradient of its length."""
    model = model_of(case).eval()
    points, queries, features = arrays(model)

    def eikonal(decoder: Any, encoder: Any) -> dict[str, Tensor]:
        field = decoder(encoder(points, features), queries)
        (normals,) = torch.autograd.grad(field.sum(), queries, create_graph=True)
        loss = (normals.norm(dim=-1) - 1).square().sum()
        named = dict(model.named_parameters()) | {"queries": queries}
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        return {"normals": normals.detach(), **dict(zip(named, gradients, strict=True))}

    # torch's own fused attention has no second derivatives on a CPU.
    with perceiver_kernels.use_backend("reference"):
        actual = eikonal(model.decode, model.encode)
    expected = eikonal(lambda z, y: plain_decode(model, z, y), lambda x, f: plain_encode(model, x, f))
    assert_same(actual, expected)


def test_published_sizes() -> None:
    model = VecSetAutoencoder.shapenet(device="meta")
    assert model.num_params() == 106_116_097 == by_hand(512, 24, 51)
    assert [layer.num_heads for layer in (model.read, model.answer, model.decoder[0][0])] == [1, 1, 8]
    assert model.read.qk_channels == model.answer.v_channels == 512 and not model.answer.residual
    assert len(model.decoder) == 24 and model.decoder[0][1].hidden_dim == 2048 and model.decoder[0][0].drop_path == 0.1
    assert model.read.q_proj.bias is None and model.read.out_proj.bias is not None
    assert VecSetAutoencoder.shapenet(device="meta", bottleneck_dim=8).expand.weight.shape == (512, 8)
    large = VecSetAutoencoder.large(device="meta")
    assert (large.config.num_latents, len(large.encoder), len(large.decoder)) == (4096, 8, 16)
    for layer in (large.read, large.answer, large.decoder[0][0], large.encoder[7][0]):
        assert layer.num_heads == 16 and layer.norm_query.normalized_shape == (64,)
    assert large.point_embedding.proj.weight.shape == (1024, 55)
    assert VecSetAutoencoder.large(device="meta", num_latents=2048, queries="learned").queries.shape == (1, 2048, 1024)


def by_hand(D: int, layers: int, channels: int) -> int:
    """Parameters counted from the sizes: attention without biases but the output's, GEGLU four times as wide."""
    attention = 4 * D * D + D
    feed_forward = 2 * D + 12 * D * D + 9 * D
    crosses = 2 * (attention + 4 * D)
    return channels * D + D + crosses + feed_forward + layers * (attention + 2 * D + feed_forward) + D + 1


def test_activation_checkpointing_changes_no_bit() -> None:
    sizes = {"drop_path": 0.3, "encoder_layers": 1}
    model, again = (model_of("learned", activation_checkpointing=on, **sizes) for on in (False, True))
    runs: list[int] = []
    again.decoder[1].register_forward_pre_hook(lambda *_: runs.append(1))
    results = []
    for m in (model, again):
        torch.manual_seed(5)
        results.append(result_and_gradients(lambda *t, m=m: m(*t)[0], m, *arrays(m)[:2]))
    assert all(torch.equal(results[1][name], results[0][name]) for name in results[0])
    assert len(runs) == 2, "the layer ran again for its gradient"


@pytest.mark.parametrize(("case", "checkpointing"), [("sampled", False), ("large", True)])
def test_compiles_without_a_graph_break(case: str, checkpointing: bool) -> None:
    model = model_of(case, activation_checkpointing=checkpointing)
    model.train(checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    points, queries, features = arrays(model)
    sample = farthest_points(points, 7) if checkpointing else None
    leaves = [points, queries, *([] if features is None else [features])]
    actual, expected = (
        result_and_gradients(lambda *t, m=m: m(*t, **({"sample": sample} if checkpointing else {}))[0], model, *leaves)
        for m in (compiled, model)
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("case", ["sampled", "large"])
def test_autocast(case: str) -> None:
    model = model_of(case).eval()
    inputs = [None if t is None else t.detach() for t in arrays(model)]
    oracle, single = plain(model, *inputs)[0].detach(), copy.deepcopy(model).float()
    inputs = [None if t is None else t.float() for t in inputs]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, eager = single(*inputs)[0], plain(single, *inputs)[0]
        grid = single.decode_grid(single.encode(inputs[0], inputs[2]), 3)
    assert actual.dtype == grid.dtype == torch.bfloat16
    assert_as_accurate(actual, eager.bfloat16(), oracle, "field")


def test_learns_shapes() -> None:
    """To tell the inside of a few spheres from their surfaces' points."""
    torch.manual_seed(0)
    model = VecSetAutoencoder(VecSetConfig(**{**SMALL, "num_latents": 8, "num_bands": 2}))
    radii = torch.tensor([0.3, 0.5, 0.7, 0.9]).view(-1, 1, 1)
    optimiser, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(100):
        points = radii * F.normalize(torch.randn(4, 32, 3), dim=-1)
        queries = torch.rand(4, 64, 3) * 2 - 1
        inside = (queries.norm(dim=-1, keepdim=True) < radii).float()
        loss = F.binary_cross_entropy_with_logits(model(points, queries)[0], inside)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_latents": 0}, ValueError, "num_latents must be at least 1, got 0"),
        ({"dim": 2048}, ValueError, "input_dim must be at most 1024, .* got 2048"),
        ({"latent_heads": 5}, ValueError, "dim must be a positive multiple of num_heads=5, got 24"),
        ({"queries": "random"}, ValueError, "queries must be one of 'sampled', 'learned', got 'random'"),
        ({"decoder_layers": -1}, ValueError, "decoder_layers must be at least 0, got -1"),
        ({"bottleneck_dim": 0}, ValueError, "bottleneck_dim must be at least 1, got 0"),
        ({"activation": "fast"}, ValueError, "activation must be one of 'gelu', .* got 'fast'"),
        ({"qk_norm": "batch"}, ValueError, "qk_norm must be one of 'layer', 'rms', got 'batch'"),
        ({"head_norm": 1}, TypeError, "head_norm must be a bool, got 1"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VecSetConfig(**{**SMALL, **changes})


def test_wrong_inputs_are_named() -> None:
    model, learned = model_of("sampled").eval(), model_of("learned").eval()
    points, queries, _ = arrays(model)
    sample = torch.zeros(B, 7, dtype=torch.int64)
    latents = model.encode(points)
    for error, message, run in (
        (ValueError, r"points must be \[B, M, 3\], got \(2, 40, 2\)", lambda: model(points[..., :2], queries)),
        (ValueError, "points must have at least num_latents=7 points in a cloud, got 6", lambda: model.encode(points[:, :6])),
        (ValueError, r"sample must be \[B, N\] with B=2, N=7, got", lambda: model.encode(points, sample=sample[:, 1:])),
        (TypeError, "sample must be int64, got float64", lambda: model.encode(points, sample=sample.double())),
        (ValueError, "sample must be None with queries='learned', got", lambda: learned.encode(points, sample=sample)),
        (ValueError, r"features must be None where feature_dim is 0, got \(2, 7, 3\)", lambda: model.encode(points, points)),
        (ValueError, r"latents must be \[B, N, C\] with C=24, got \(2, 7, 23\)", lambda: model.transform(latents[..., 1:])),
        (ValueError, r"queries must be \[B, O, 3\], got \(40, 3\)", lambda: model(points, points[0])),
        (ValueError, "resolution must be a positive integer, or three of them, got 0", lambda: model.decode_grid(latents, 0)),
        (ValueError, r"resolution must be .* got \(3, 3\)", lambda: model.decode_grid(latents, (3, 3))),
        (ValueError, "chunk_size must be at least 1, got 0", lambda: model.decode_grid(latents, 3, 0)),
        (ValueError, r"out must be \[B, x, y, z, output_dim\] with B=2, x=3, y=3, z=3, output_dim=1, got \(2,\)",
         lambda: model.decode_grid(latents, 3, out=torch.empty(2))),
        (ValueError, "out must be contiguous, got strides",
         lambda: model.decode_grid(latents, 3, out=torch.empty(2, 3, 3, 3, 1).transpose(1, 2))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            run()
