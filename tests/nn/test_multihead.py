"""nn.MultiheadAttention against torch's: values, weights, every gradient, parameters and refusals."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver_kernels import use_backend
from perceiver_kernels.nn import MultiheadAttention
from perceiver_kernels.testing import assert_as_accurate

B, H, LQ, LK, E = 3, 2, 5, 7, 12

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both appended": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "kdim, vdim": {"kdim": 9, "vdim": 10},
    "kdim, appended": {"kdim": 9, "add_bias_kv": True, "add_zero_attn": True},
    "kdim, no bias": {"kdim": 9, "vdim": 10, "bias": False},
    "one head": {"num_heads": 1},
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Our layer and torch's, of the same random parameters: what starts at zero would hide a mistake."""
    options = {"embed_dim": E, "num_heads": H} | options
    theirs = nn.MultiheadAttention(**options, dtype=dtype)
    for i, parameter in enumerate(theirs.parameters()):
        parameter.data = (rand(*parameter.shape, seed=i) * parameter.shape[-1] ** -0.5).to(dtype)
    ours = MultiheadAttention(**options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def sequences(module: nn.MultiheadAttention, kind: str = "cross", batched: bool = True) -> list[Tensor]:
    """query, key and value; "self": one tensor; "memory": one for key and value."""

    def sequence(L: int, channels: int, seed: int) -> Tensor:
        shape = ((B, L) if module.batch_first else (L, B)) if batched else (L,)
        dtype = module.out_proj.weight.dtype
        return rand(*shape, channels, seed=seed).to(module.out_proj.weight.device, dtype).requires_grad_()

    if kind == "self":
        return [sequence(LK, E, 1)] * 3
    query, key = sequence(LQ, E, 1), sequence(LK, module.kdim, 2)
    return [query, key, key if kind == "memory" else sequence(LK, module.vdim, 3)]


def results(module: nn.MultiheadAttention, tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, weights, and the gradient of every parameter, sequence and additive mask."""
    leaves = dict(module.named_parameters()) | {f"sequence {id(t)}": t for t in tensors}
    leaves |= {k: v for k, v in options.items() if isinstance(v, Tensor) and v.requires_grad}
    out, weights = module(*tensors, **options)
    upstream = rand(*out.shape, seed=9).to(out)
    total = (out * upstream).sum() + (0.0 if weights is None else (weights * rand(*weights.shape, seed=8).to(weights)).sum())
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {"out": out.detach()} | ({} if weights is None else {"weights": weights.detach()})
    return found | {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def hidden_keys(batched: bool = True, *, whole_row: bool = False) -> Tensor:
    hidden = rand(B, LK, seed=4) > 0.3
    hidden[:, 2] = False
    hidden[1] = whole_row
    return hidden if batched else hidden[0]


def masks(kind: str, L: int, heads: int, *, batched: bool = True) -> dict[str, Any]:
    """Every kind of mask for L queries and LK keys; none hides all keys of a query."""
    each = (B if batched else 1) * heads
    square, for_each_head = rand(L, LK, seed=5), rand(each, L, LK, seed=6)
    square_hidden, each_hidden = square > 0.4, for_each_head > 0.4
    square_hidden[:, 2], each_hidden[:, :, 2] = False, False
    padding = hidden_keys(batched)
    causal = torch.ones(L, LK, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": rand(*padding.shape, seed=7).requires_grad_()},
        "mask": {"attn_mask": square_hidden},
        "float mask": {"attn_mask": square.requires_grad_()},
        "mask for each head": {"attn_mask": each_hidden},
        "float mask for each head": {"attn_mask": for_each_head.requires_grad_()},
        "both": {"attn_mask": square_hidden, "key_padding_mask": padding},
        "both, for each head": {"attn_mask": each_hidden, "key_padding_mask": padding},
        "both float": {"attn_mask": for_each_head, "key_padding_mask": rand(*padding.shape, seed=7)},
        "float mask, padding": {"attn_mask": square.requires_grad_(), "key_padding_mask": padding},
        "mask, float padding": {"attn_mask": square_hidden, "key_padding_mask": rand(*padding.shape, seed=7)},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal, padding": {"attn_mask": causal & (torch.arange(LK) != 2), "is_causal": True, "key_padding_mask": padding},
    }[kind]


KINDS = (
    "none", "padding", "float padding", "mask", "float mask", "mask for each head", "float mask for each head", "both",
    "both, for each head", "both float", "float mask, padding", "mask, float padding", "causal", "causal, padding",
)  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
def test_equals_torchs(options: str, kind: str, need_weights: bool) -> None:
    """Masks meet every way of appending keys; sequences and their axes are taken in turn."""
    chosen = {"num_heads": H} | OPTIONS[options]
    ours, theirs = pair(**chosen, batch_first=KINDS.index(kind) % 2 == 1)
    tensors = sequences(ours)
    given = masks(kind, LQ, chosen["num_heads"]) | {"need_weights": need_weights}
    assert_same(results(ours, tensors, **given), results(theirs, tensors, **given))


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["L first", "batch first"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("sources", ["self", "memory", "cross"])
@pytest.mark.parametrize("kind", ["none", "padding", "mask for each head", "float padding"])
def test_sources_and_axes(kind: str, sources: str, batched: bool, batch_first: bool, need_weights: bool) -> None:
    ours, theirs = pair(add_bias_kv=True, batch_first=batch_first)
    tensors = sequences(ours, sources, batched)
    given = masks(kind, LK if sources == "self" else LQ, H, batched=batched) | {"need_weights": need_weights}
    assert_same(results(ours, tensors, **given), results(theirs, tensors, **given))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_weights_are_averaged_or_not(average: bool, batched: bool) -> None:
    ours, theirs = pair()
    tensors = sequences(ours, batched=batched)
    assert_same(*(results(module, tensors, average_attn_weights=average) for module in (ours, theirs)))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("as_mask", [False, True], ids=["padding", "mask"])
def test_a_query_that_sees_nothing_gets_the_output_bias(as_mask: bool, backend: str) -> None:
    """As torch does without its fast path, in which, in evaluation and for some inputs, it gives NaN."""
    ours, theirs = pair()
    hidden = hidden_keys(whole_row=True)
    each = hidden[:, None, None].expand(B, H, LQ, LK).reshape(B * H, LQ, LK)
    given = {"need_weights": False} | ({"attn_mask": each} if as_mask else {"key_padding_mask": hidden})
    tensors = sequences(ours)
    with use_backend(backend):
        found = results(ours, tensors, **given)
    assert_same(found, results(theirs, tensors, **given))
    torch.testing.assert_close(found["out"][:, 1], theirs.out_proj.bias.expand(LQ, -1).detach())


def test_evaluation_without_gradients_equals_training() -> None:
    """torch takes another path there for self-attention; ours and its own must agree, and ours with itself."""
    ours, theirs = pair(batch_first=True)
    tensors = sequences(ours, "self")
    hidden = hidden_keys()
    expected = ours(*tensors, hidden, need_weights=False)[0].detach()
    for module in (ours.eval(), theirs.eval()):
        with torch.no_grad():
            out, weights = module(*tensors, hidden, need_weights=False)
        assert weights is None
        torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_nested_sequences_are_torchs() -> None:
    ours, theirs = (module.eval() for module in pair(torch.float32, batch_first=True))
    nested = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5)])
    (out, _), (expected, _) = (module(nested, nested, nested, need_weights=False) for module in (ours, theirs))
    for a, e in zip(out.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, e)
    with pytest.raises(TypeError, match="key must be a dense tensor, got a nested one"):
        ours(torch.randn(2, 5, E), nested, nested)


def out_and_parameter_gradients(module: nn.MultiheadAttention, tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """No gradient comes through the weights, where the module returns them."""
    parameters = dict(module.named_parameters())
    out, _ = module(*tensors, **options)
    gradients = torch.autograd.grad(out, list(parameters.values()), rand(*out.shape, seed=9).to(out))
    return {"out": out.detach()} | dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "padding", "mask for each head", "float mask"])
def test_is_as_accurate_as_torchs(kind: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of torch's layer in the same dtype with its weights written out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, theirs = (layer.to(device) for layer in pair(dtype, batch_first=True))
    tensors = sequences(module)
    given = {
        k: v.detach().to(device, dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
        for k, v in masks(kind, LQ, H).items()
    }
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    wide_tensors = [tensor.detach().double() for tensor in tensors]
    actual = out_and_parameter_gradients(module, tensors, need_weights=False, **given)
    eager = out_and_parameter_gradients(theirs, tensors, **given)
    oracle = out_and_parameter_gradients(copy.deepcopy(theirs).double(), wide_tensors, **wide)
    for name in oracle.keys() - {"in_proj_bias"}:  # the gradient of the key bias is rounding alone
        assert_as_accurate(actual[name], eager[name], oracle[name], name)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_padding_builds_no_mask_of_scores() -> None:
    ours, _ = pair()
    L = 256
    query = rand(L, B, E)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[:, -9:] = True
    with Largest() as largest:
        ours(query, query, query, hidden, need_weights=False)
    assert largest.numel == 3 * L * B * E < L * L


def test_dropout_is_for_training_alone() -> None:
    """The mean over many copies is the undropped result, within five standard errors."""
    copies = 4000
    ours, theirs = pair(torch.float32, dropout=0.4)
    tensors = [tensor.detach()[:, :1].expand(-1, copies, -1) for tensor in sequences(ours)]
    with torch.no_grad():
        dropped = ours(*tensors, need_weights=False)[0]
        expected = theirs.eval()(*(tensor[:, :1] for tensor in tensors), need_weights=False)[0]
        torch.testing.assert_close(ours.eval()(*tensors, need_weights=False)[0][:, :1], expected)
    error = dropped.std(1) / copies**0.5
    assert error.min() > 0 and ((dropped.mean(1) - expected[:, 0]).abs() <= 5 * error).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_are_torchs(options: str) -> None:
    """Same names, same shapes, same order, same first values from one seed; each loads the other's state strictly."""
    made = []
    for kind in (MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(3)
        made.append(kind(**{"embed_dim": E, "num_heads": H} | OPTIONS[options]))
    ours, theirs = made
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    for module, other in ((ours, theirs), (theirs, ours)):
        for parameter in other.parameters():
            parameter.data.uniform_()
        module.load_state_dict(other.state_dict(), strict=True)


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_torchs(method: str) -> None:
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(getattr(kind, method)).parameters.values()]
        for kind in (MultiheadAttention, nn.MultiheadAttention)
    )
    assert ours == theirs


def test_serves_inside_torchs_encoder_layer() -> None:
    theirs = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, hidden = rand(B, LK, E), hidden_keys()
    torch.testing.assert_close(ours(x, src_key_padding_mask=hidden), theirs(x, src_key_padding_mask=hidden))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    ours, _ = pair(add_bias_kv=True)
    tensors = sequences(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for kind in ("none", "padding", "both"):
        given = masks(kind, LQ, H) | {"need_weights": False}
        torch.testing.assert_close(compiled(*tensors, **given)[0], ours(*tensors, **given)[0])


def test_autocast() -> None:
    ours, theirs = pair(torch.float32, add_bias_kv=True)
    tensors = sequences(ours)
    for kind in ("none", "padding", "both"):
        given = masks(kind, LQ, H) | {"need_weights": False}
        with torch.autocast("cpu", torch.bfloat16):
            (out, _), (expected, _) = ours(*tensors, **given), theirs(*tensors, **given)
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=0, atol=0.03)


X, Y = torch.zeros(LQ, B, E), torch.zeros(LK, B, E)
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (([1], Y, Y), {}, TypeError, "query must be a torch.Tensor, got list"),
    ((X[None], Y, Y), {}, ValueError, r"query must be a sequence .* got \(1, 5, 3, 12\)"),
    ((X[..., :4], Y, Y), {}, ValueError, r"query must be \[Lq, B, embed_dim\] with embed_dim=12, got \(5, 3, 4\)"),
    ((X, Y[:, 0], Y[:, 0]), {}, ValueError, r"key must be \[Lk, B, kdim\] with kdim=12, got \(7, 12\)"),
    ((X, Y[:, :2], Y[:, :2]), {}, ValueError, r"key must be \[Lk, B, kdim\] with Lk=7, B=3, kdim=12, got \(7, 2, 12\)"),
    ((X, Y, Y[:6]), {}, ValueError, r"value must be \[Lk, B, vdim\] with Lk=7, B=3, vdim=12, got \(6, 3, 12\)"),
    ((X.double(), Y, Y), {}, TypeError, "query must have the parameters' dtype torch.float32 .* got torch.float64"),
    ((X, Y, Y), {"key_padding_mask": torch.zeros(LK, B)}, ValueError, r"key_padding_mask must be \[B, Lk\] .* got \(7, 3\)"),
    ((X, Y, Y), {"key_padding_mask": torch.zeros(B, LK).int()}, TypeError, "key_padding_mask must be bool, .* got torch.int32"),
    ((X, Y, Y), {"attn_mask": torch.zeros(LQ, 6)}, ValueError, r"attn_mask must be \[Lq, Lk\] = \(5, 7\) or .* got \(5, 6\)"),
    ((X, Y, Y), {"attn_mask": torch.zeros(B, LQ, LK)}, ValueError, r"attn_mask must be .*\(6, 5, 7\), got \(3, 5, 7\)"),
    ((X, Y, Y), {"attn_mask": torch.zeros(LQ, LK).double()}, TypeError, "attn_mask must be bool, .* got torch.float64"),
    ((X, Y, Y), {"is_causal": True}, ValueError, "attn_mask must be given with is_causal"),
]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("tensors", "options", "error", "message"), REFUSED, ids=[case[3][:50] for case in REFUSED])
def test_refusals_name_the_argument_and_its_value(
    tensors: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str, need_weights: bool
) -> None:
    with pytest.raises(error, match=message):
        MultiheadAttention(E, H)(*tensors, need_weights=need_weights, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "embed_dim must be a positive multiple of num_heads=5, got 12"),
        ({"embed_dim": 0}, ValueError, "embed_dim must be a positive multiple of num_heads=2, got 0"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"kdim": 0}, ValueError, "kdim must be at least 1, got 0"),
        ({"vdim": 2.5}, TypeError, "vdim must be an integer, got 2.5"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_configurations_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options)
