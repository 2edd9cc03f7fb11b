"""nn.CrossAttention and nn.SelfAttention against the textbook, in every configuration, forward and every gradient."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels import functional, reference
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.nn import CrossAttention, SelfAttention
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.modules import assert_same, randomised, result_and_gradients

B, N, M, D, C = 2, 5, 37, 24, 21

SWITCHES = {
    "default": {},
    "no latent norm": {"norm_latents": False},
    "no input norm": {"norm_inputs": False},
    "no biases": {"bias": False, "out_bias": False},
    "no output bias": {"out_bias": False},
    "no residual": {"residual": False, "out_channels": 17},
    "several heads": {"num_heads": 3, "qk_channels": 24, "v_channels": 24},
    "heads, d_qk != d_v": {"num_heads": 4, "qk_channels": 12, "v_channels": 28},
    "d_qk != d_v": {"qk_channels": 9, "v_channels": 40},
    "eps": {"eps": 0.1},
    "bare": {"norm_latents": False, "norm_inputs": False, "bias": False, "out_bias": False, "residual": False},
}
METHODS = ("absorbed", "projected")


def textbook(module: CrossAttention, latents: Tensor, inputs: Tensor, visible: Tensor | None = None) -> Tensor:
    """The layer as the paper writes it, keys and values in full."""
    normed = latents
    if module.norm_latents is not None:
        normed = F.layer_norm(latents, latents.shape[-1:], module.norm_latents.weight, module.norm_latents.bias, module.eps)
    q = module.q_proj(normed).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    normalize = module.norm_inputs is not None
    out = reference.input_cross_attention(
        q.expand(inputs.shape[0], -1, -1, -1), inputs, module.k_proj.weight, module.v_proj.weight,
        b_k=module.k_proj.bias, b_v=module.v_proj.bias,
        norm_weight=module.norm_inputs.weight if normalize else None,
        norm_bias=module.norm_inputs.bias if normalize else None,
        normalize=normalize, eps=module.eps, key_mask=visible,
    )  # fmt: skip
    out = module.out_proj(out.transpose(1, 2).flatten(2))
    return latents + out if module.residual else out


def tensors(
    dtype: torch.dtype = torch.float32, latents: tuple[int, ...] = (B, N, D), inputs: tuple[int, ...] = (B, M, C)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(latents, generator=generator)
    x = 0.5 + 2.0 * torch.randn(inputs, generator=generator)
    return z.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()


VISIBILITY = {
    "all": None,
    "mask": torch.rand(B, M, generator=torch.Generator().manual_seed(3)) < 0.6,
    "lengths": torch.tensor([M - 8, 0], dtype=torch.int32),
}


@pytest.mark.parametrize("visibility", VISIBILITY)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("switches", SWITCHES)
def test_equals_the_textbook(switches: str, method: str, visibility: str) -> None:
    """In fp64, where nothing hides behind rounding: the absorbed form is the same function."""
    module = randomised(CrossAttention(D, C, method=method, dtype=torch.float64, **SWITCHES[switches]))
    leaves = tensors(torch.float64)
    given = VISIBILITY[visibility]
    keywords = {} if given is None else {"lengths" if visibility == "lengths" else "key_mask": given}
    visible = torch.arange(M) < given[:, None] if visibility == "lengths" else given
    actual = result_and_gradients(lambda z, x: module(z, x, **keywords), module, *leaves)
    assert_same(actual, result_and_gradients(lambda z, x: textbook(module, z, x, visible), module, *leaves))


@pytest.mark.parametrize("method", METHODS)
def test_latents_of_batch_one_are_shared_over_the_batch(method: str) -> None:
    module = randomised(CrossAttention(D, C, num_heads=3, method=method, dtype=torch.float64))
    leaves = tensors(torch.float64, (1, N, D), (4, M, C))
    actual = result_and_gradients(module, module, *leaves)
    assert actual["out"].shape == (4, N, D) and actual["leaf 0"].shape == (1, N, D)
    assert_same(actual, result_and_gradients(lambda z, x: textbook(module, z, x), module, *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("widths", [{}, {"num_heads": 4, "qk_channels": 64, "v_channels": 96}], ids=["wide", "heads"])
def test_is_as_accurate_as_eager(widths: dict[str, int], method: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of the textbook in the same dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = randomised(CrossAttention(128, 85, method=method, **widths)).to(device, dtype)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in tensors(dtype, (2, 32, 128), (2, 500, 85))]
    actual = result_and_gradients(module, module, *leaves)
    eager = result_and_gradients(lambda z, x: textbook(module, z, x), module, *leaves)
    module64, leaves64 = copy.deepcopy(module).double(), [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = result_and_gradients(lambda z, x: textbook(module64, z, x), module64, *leaves64)
    for name in actual.keys() - {"k_proj.bias"}:
        assert_as_accurate(actual[name], eager[name], oracle[name], name)


def test_key_bias_gradient_is_exactly_zero_when_absorbed() -> None:
    module = randomised(CrossAttention(D, C, method="absorbed"))
    module(*tensors()).square().sum().backward()
    assert torch.equal(module.k_proj.bias.grad, torch.zeros(C))
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 8, M - 1, M, M + 5])
def test_chunked_equals_whole(chunk_size: int, masked: bool) -> None:
    whole = randomised(CrossAttention(D, C, num_heads=3, dtype=torch.float64))
    chunked = CrossAttention(D, C, num_heads=3, chunk_size=chunk_size, dtype=torch.float64)
    chunked.load_state_dict(whole.state_dict())
    leaves = tensors(torch.float64)
    visible = VISIBILITY["mask"] if masked else None
    actual = result_and_gradients(lambda z, x: chunked(z, x, visible), chunked, *leaves)
    assert_same(actual, result_and_gradients(lambda z, x: whole(z, x, visible), whole, *leaves))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_input_array_equals_its_concatenation(chunk_size: int | None) -> None:
    """uint8 pixels with Fourier positions made on the fly read as the tensor that a user would have built."""
    fourier = FourierPositions(4, (6.0, 7.0))
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(256, (B, 3, 6, 7), generator=generator, dtype=torch.uint8)
    array = InputArray.image(images, fourier)
    content = images.flatten(2).transpose(1, 2).float() / 255
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 7), indexing="ij")
    coordinates = torch.stack((rows, columns), -1).flatten(0, 1)
    positions = reference.fourier_features(coordinates, 4, (6.0, 7.0), True, "deepmind")
    tokens = torch.cat((content, positions.expand(B, -1, -1)), -1)
    module = randomised(CrossAttention(D, tokens.shape[-1], chunk_size=chunk_size))
    latents, _ = tensors()
    torch.testing.assert_close(module(latents, array), textbook(module, latents, tokens), rtol=1e-4, atol=1e-5)


def test_one_pack_serves_several_layers() -> None:
    first = randomised(CrossAttention(D, C, method="absorbed"), seed=1)
    second = randomised(CrossAttention(D, C, num_heads=7, method="absorbed"), seed=2)
    both = nn.ModuleList((first, second))

    def packed_once(latents: Tensor, inputs: Tensor) -> Tensor:
        packed = functional.pack_inputs(inputs)
        return second(first(latents, packed), packed)

    leaves = tensors()
    actual = result_and_gradients(packed_once, both, *leaves)
    assert_same(actual, result_and_gradients(lambda z, x: second(first(z, x), x), both, *leaves))


@pytest.mark.parametrize("method", METHODS)
def test_what_masked_tokens_hold_is_never_used(method: str) -> None:
    module = randomised(CrossAttention(D, C, method=method))
    latents, inputs = tensors()
    visible = VISIBILITY["mask"]
    clean = inputs.detach().masked_fill(~visible[..., None], 0.0)
    poisoned = inputs.detach().masked_fill(~visible[..., None], float("nan")).requires_grad_()
    out = module(latents, poisoned, visible)
    assert torch.equal(out, module(latents, clean, visible))
    (gradient,) = torch.autograd.grad(out.square().sum(), poisoned)
    assert torch.equal(gradient[~visible], torch.zeros_like(gradient[~visible]))
    assert gradient.isfinite().all()


def test_order_of_the_inputs_does_not_matter() -> None:
    module = randomised(CrossAttention(D, C, num_heads=3))
    latents, inputs = tensors()
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(latents, inputs[:, order]), module(latents, inputs))


def test_no_visible_token_gives_the_residual_and_the_output_bias() -> None:
    module = randomised(CrossAttention(D, C))
    latents, inputs = tensors()
    out = module(latents, inputs, torch.zeros(B, M, dtype=torch.bool))
    torch.testing.assert_close(out, latents + module.out_proj.bias)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_keeps_the_expectation_and_rests_in_evaluation(method: str) -> None:
    """The mean of many independent dropped results is the undropped one, within five standard errors."""
    copies = 4000
    module = randomised(CrossAttention(D, C, dropout=0.3, residual=False, method=method))
    latents, inputs = (leaf.detach()[:1] for leaf in tensors())
    torch.manual_seed(0)
    dropped = module(latents.expand(copies, -1, -1), inputs.expand(copies, -1, -1))
    expected = module.eval()(latents, inputs)
    torch.testing.assert_close(expected, textbook(module, latents, inputs))
    standard_error = dropped.std(0) / copies**0.5
    assert standard_error.min() > 0
    assert ((dropped.mean(0) - expected[0]).abs() <= 5 * standard_error).all()


def test_dropout_follows_the_generator() -> None:
    module = randomised(CrossAttention(D, C, dropout=0.5, method="absorbed"))
    latents, inputs = tensors()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(module(latents, inputs))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str) -> None:
    module = randomised(CrossAttention(4, 3, num_heads=2, qk_channels=2, v_channels=4, method=method)).double()
    named = dict(module.named_parameters())
    latents = torch.randn(1, 2, 4, dtype=torch.float64).requires_grad_()
    inputs = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()

    def run(z: Tensor, x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(named, values, strict=True)), (z, x))

    assert torch.autograd.gradcheck(run, (latents, inputs, *named.values()))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_as_accurate_as_the_textbook_under_autocast(method: str) -> None:
    module = randomised(CrossAttention(D, C, num_heads=3, method=method))
    latents, inputs = tensors()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = module(latents, inputs)
        eager = textbook(module, latents, inputs)
    oracle = textbook(copy.deepcopy(module).double(), latents.double(), inputs.double()).detach()
    assert actual.dtype == eager.dtype
    assert_as_accurate(actual.bfloat16(), eager.bfloat16(), oracle, "out")


def test_compiles_without_a_graph_break() -> None:
    module = randomised(CrossAttention(D, C, method="absorbed"))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    leaves = tensors()
    assert_same(result_and_gradients(compiled, module, *leaves), result_and_gradients(module, module, *leaves))


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_that_run(method: str) -> None:
    """With C a multiple of 16 nothing is padded, and every matrix product is in the formula."""
    module = CrossAttention(D, 32, num_heads=4, qk_channels=16, v_channels=48, method=method)
    latents, inputs = torch.randn(1, N, D), torch.randn(3, M, 32)
    with torch.no_grad(), perceiver_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        module(latents, inputs)
    assert counter.get_total_flops() == module.flops(3, N, M, latent_batch=1, method=method)


def test_state_dict_keys_are_stable() -> None:
    expected = [
        f"{name}.{kind}"
        for name in ("norm_latents", "norm_inputs", "q_proj", "k_proj", "v_proj", "out_proj")
        for kind in ("weight", "bias")
    ]
    assert list(CrossAttention(D, C).state_dict()) == expected
    bare = CrossAttention(D, C, **SWITCHES["bare"])
    assert list(bare.state_dict()) == [f"{name}_proj.weight" for name in ("q", "k", "v", "out")]
    assert list(SelfAttention(D).state_dict()) == [
        f"{name}.{kind}" for name in ("norm", "qkv_proj", "out_proj") for kind in ("weight", "bias")
    ]


def test_default_widths_are_those_of_the_paper() -> None:
    module = CrossAttention(1024, 261)
    shapes = {name: tuple(projection.weight.shape) for name, projection in module.named_children() if "proj" in name}
    assert shapes == {"q_proj": (261, 1024), "k_proj": (261, 261), "v_proj": (261, 261), "out_proj": (1024, 261)}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_heads": 2}, "qk_channels must be a positive multiple of num_heads=2, got 21"),
        ({"v_channels": 0}, "v_channels must be a positive multiple of num_heads=1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"out_channels": 7}, "out_channels must be latent_dim=24 with a residual, got 7"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"chunk_size": 0}, "chunk_size must be a positive number of tokens, got 0"),
        ({"chunk_size": 8, "method": "projected"}, "chunk_size needs method='absorbed' or None"),
        ({"method": "fast"}, "method must be 'absorbed', 'projected' or None, got 'fast'"),
    ],
)
def test_wrong_configurations_are_named(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossAttention(D, C, **keywords)


def test_wrong_inputs_are_named() -> None:
    module = CrossAttention(D, C)
    latents, inputs = tensors()
    with pytest.raises(ValueError, match=r"latents must be \[B, N, D\] with D=24, got \(2, 5, 23\)"):
        module(latents[..., :-1], inputs)
    with pytest.raises(ValueError, match="inputs must be packed with normalize=True, as norm_inputs says"):
        module(latents, functional.pack_inputs(inputs, normalize=False))
    with pytest.raises(ValueError, match="key_mask"):
        module(latents, inputs, torch.ones(B, M + 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="key_mask"):
        module(latents, inputs, torch.ones(B, M))
    with pytest.raises(ValueError):
        module(latents[:1].expand(3, -1, -1), inputs)


def test_layers_name_no_backend() -> None:
    """Which kernel runs is decided below the layers."""
    package = Path(perceiver_kernels.__file__).parent
    for path in (*package.glob("nn/*.py"), *package.glob("models/*.py")):
        assert "backend" not in path.read_text().lower(), path


def test_self_attention_equals_torch_multihead_attention() -> None:
    ours = randomised(SelfAttention(D, 3, norm=None, residual=False))
    torchs = nn.MultiheadAttention(D, 3, batch_first=True)
    torchs.in_proj_weight, torchs.in_proj_bias = ours.qkv_proj.weight, ours.qkv_proj.bias
    torchs.out_proj.weight, torchs.out_proj.bias = ours.out_proj.weight, ours.out_proj.bias
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    visible = torch.tensor([[True] * N, [True, False, True, False, False]])
    for key_mask in (None, visible):
        actual = result_and_gradients(lambda x, mask=key_mask: ours(x, mask), ours, x)
        padding = None if key_mask is None else ~key_mask
        oracle = result_and_gradients(lambda x, pad=padding: torchs(x, x, x, pad, need_weights=False)[0], ours, x)
        assert_same(actual, oracle)


def test_self_attention_with_norm_residual_and_unequal_widths() -> None:
    module = randomised(SelfAttention(D, 4, qk_channels=8, v_channels=20, eps=0.1, dtype=torch.float64))

    def written_out(module: SelfAttention, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, (D,), module.norm.weight, module.norm.bias, 0.1)
        q, k, v = (
            F.linear(normed, w, b).unflatten(-1, (4, -1)).transpose(1, 2)
            for w, b in zip(module.qkv_proj.weight.split((8, 8, 20)), module.qkv_proj.bias.split((8, 8, 20)), strict=True)
        )
        out, _ = reference.attention(q, k, v)
        return x + module.out_proj(out.transpose(1, 2).flatten(2))

    x = torch.randn(B, N, D, dtype=torch.float64).requires_grad_()
    actual = result_and_gradients(module, module, x)
    assert_same(actual, result_and_gradients(lambda x: written_out(module, x), module, x))


def test_self_attention_flops_are_those_that_run() -> None:
    module = SelfAttention(D, 4, qk_channels=8, v_channels=20)
    with torch.no_grad(), perceiver_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        module(torch.randn(B, N, D))
    assert counter.get_total_flops() == module.flops(B, N)


def test_weights_start_with_unit_gain_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    module = CrossAttention(512, 384)
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        gain = linear.weight.std() * linear.in_features**0.5
        assert abs(gain - 1) < 0.02
        assert linear.weight.abs().max() <= 2.001 * linear.in_features**-0.5 / 0.8796
        assert not linear.bias.any()
