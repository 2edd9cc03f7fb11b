"""The CUDA library and its binding: what can be known of them without a GPU."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perceiver_kernels import build_info
from perceiver_kernels.backends import cuda
from perceiver_kernels.backends.cuda import attention, attention_plans, pack, shared_kv, states
from perceiver_kernels.device import H200
from perceiver_kernels.masks import NO_MASKS

ROOT = Path(__file__).resolve().parents[3]
LAUNCH_HEADER = ROOT / "csrc" / "include" / "perceiver" / "launch.h"
PARAMS_HEADER = ROOT / "csrc" / "include" / "perceiver" / "params.h"
FLAT_SHAPES, STRIDED_SHAPES = 10, 5
"""Row shapes in csrc/kernels/pack_enqueue.cuh; each is compiled for every element type written (and, flat, read). The backward
has the flat ones, for every element type read."""
HOPPER_KERNELS = 2 * (
    2 * len(shared_kv.BLOCK_KV) + 2 * len(shared_kv.DQ_BLOCK_KV) + len(attention_plans.BLOCK_KV) + 1
    + 4 * len(attention_plans.BACKWARD_BLOCK_Q)
)  # fmt: skip
"""In bf16 and fp16: shared-KV attention with and without a mask, its dq and dx, attention, also of long tiles, and the four
kernels of its backward."""
MERGES = 4
"""Of states and of sums, with one and eight groups: csrc/instantiations/merge_states.cu, for every element type written."""
ROW_PRODUCTS = 2
"""csrc/instantiations/row_products.cu, in bf16 and fp16."""

built = pytest.mark.skipif(
    not build_info.read()["cuda_built"], reason=f"CUDA library not built: {build_info.read()['reason']}"
)


@pytest.fixture
def binding():
    return cuda.binding()


STRUCTS = (
    "PackForwardParams", "SharedKVForwardParams", "SharedKVBackwardParams", "RowProductsParams", "AttentionForwardParams",
    "AttentionBackwardParams", "MergeStatesParams",
)  # fmt: skip


def header_fields(struct: str = "PackForwardParams") -> list[str]:
    body = re.search(rf"struct {struct} \{{(.*?)\n\}};", PARAMS_HEADER.read_text(), re.S).group(1)
    return re.findall(r"^  [\w ]+[*\s]\s*(\w+);$", body, re.M)


@built
class TestStruct:
    def test_library_and_binding_agree_on_the_layout(self, binding):
        assert binding.library_abi_version() == binding.ABI_VERSION
        assert binding.layout() == binding.library_layout()

    @pytest.mark.parametrize("struct", STRUCTS)
    def test_every_field_of_the_header_is_bound_at_ascending_offsets(self, binding, struct):
        described, size = binding.layout().split(" | ")[STRUCTS.index(struct)].split(" ; ")
        fields = [field.split(":") for field in described.split()]
        assert [name for name, _, _ in fields] == header_fields(struct)
        assert all(hasattr(getattr(binding, struct), name) for name, _, _ in fields)
        ends = [int(offset) + int(length) for _, offset, length in fields]
        assert all(int(after[1]) >= end for end, after in zip(ends, fields[1:], strict=False))
        assert ends[-1] <= int(size)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("content", 2**47), ("stride_content_batch", 2**40), ("packed_channels", 1024), ("eps", 0.5)],
    )
    def test_fields_hold_what_is_written(self, binding, name, value):
        params = cuda.filled(binding.PackForwardParams(), {name: value})
        assert getattr(params, name) == value

    def test_unknown_field_is_an_error(self, binding):
        with pytest.raises(AttributeError, match="no_such_field"):
            cuda.filled(binding.PackForwardParams(), {"no_such_field": 1})

    def test_launch_fills_every_field(self, monkeypatch):
        filled = {}
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(pack, "filled", lambda params, fields: filled.update(fields))
        monkeypatch.setattr(
            pack, "binding", lambda: SimpleNamespace(PackForwardParams=object, pack_inputs_fwd=lambda _: None)
        )
        content, positions = torch.zeros(2, 3, 4), torch.zeros(3, 2)
        pack.pack_inputs_forward(
            content, positions, None, None, normalize=True, eps=1e-5, dtype=torch.float16
        )
        assert sorted(filled) == sorted(header_fields())

    def test_attention_fills_every_field(self, monkeypatch):
        """Over so many tokens that forwards are split, and merged."""
        filled = {struct: set() for struct in STRUCTS[1:]}
        functions = ("shared_kv_fwd", "shared_kv_bwd", "row_products", "attention_fwd", "attention_bwd", "merge_states")
        structs = {struct: (lambda *_, struct=struct: struct) for struct in STRUCTS}
        stand_in = SimpleNamespace(**structs, **dict.fromkeys(functions, lambda _: None))

        def fill(struct, fields):
            filled[struct] |= set(fields)
            return struct

        for module in (shared_kv, attention):
            monkeypatch.setattr(module, "on_device_of", lambda _: contextlib.nullcontext())
            monkeypatch.setattr(module, "stream_of", lambda _: 0)
        caches = [(module, name) for module in (shared_kv, attention) for name in ("_forward_params", "_backward_params")]
        for module, cached in (*caches, (states, "_params")):
            monkeypatch.setattr(module, "filled", fill)
            monkeypatch.setattr(module, "binding", lambda: stand_in)
            monkeypatch.setattr(module, cached, getattr(module, cached).__wrapped__)
        for module in (shared_kv, attention):
            monkeypatch.setattr(module, "device_facts", lambda _: H200)
        q, x = torch.zeros(1, 3, 64, dtype=torch.float16), torch.zeros(1, 10**5, 64, dtype=torch.float16)
        options = {"scale": 1.0, "dropout_p": 0.0, "dropout_seed": None}
        shared_kv.shared_kv_attention_forward(q, x, None, None, key_offset=0, **options)
        delta = shared_kv.shared_kv_attention_delta(q, q.float(), None, None, torch.zeros(1, 3))
        of_forward = (torch.zeros(1, 3), None, None)
        shared_kv.shared_kv_attention_backward(
            q, delta, None, q, x, *of_forward, key_offset=0, needs_dq=True, needs_dx=True, **options
        )
        attention.attention_forward(q[None], (x[None],), (x[None],), NO_MASKS, **options)
        of_forward = (q[None], torch.zeros(1, 1, 3), torch.zeros(0))
        attention.attention_backward(q[None], None, *of_forward, q[None], (x[None],), (x[None],), NO_MASKS, **options)
        assert filled == {struct: set(header_fields(struct)) for struct in STRUCTS[1:]}

    def test_repeated_heads_are_read_once(self, monkeypatch):
        """Keys and values expanded over the heads are one key head, not a copy for each."""
        filled = {}
        stand_in = SimpleNamespace(AttentionForwardParams=lambda *_: None, attention_fwd=lambda _: None)
        for module in (shared_kv, attention):
            monkeypatch.setattr(module, "on_device_of", lambda _: contextlib.nullcontext())
            monkeypatch.setattr(module, "stream_of", lambda _: 0)
        monkeypatch.setattr(attention, "filled", lambda _, fields: filled.update(fields))
        monkeypatch.setattr(attention, "binding", lambda: stand_in)
        monkeypatch.setattr(attention, "_forward_params", attention._forward_params.__wrapped__)
        monkeypatch.setattr(attention, "device_facts", lambda _: H200)
        monkeypatch.setattr(attention, "merge_states", lambda *_: None)
        query = torch.zeros(2, 8, 128, 64, dtype=torch.float16)
        key, value = (torch.zeros(2, 1, 256, 64, dtype=torch.float16) for _ in range(2))
        repeated = (key.expand(2, 8, 256, 64),), (value.expand(2, 8, 256, 64),)
        attention.attention_forward(query, *repeated, NO_MASKS, scale=1.0, dropout_p=0.0, dropout_seed=None)
        assert filled["heads_per_key_head"] == filled["heads"] == 8
        assert (filled["key"], filled["value"]) == (key.data_ptr(), value.data_ptr())


def tiles_of(header: str, function: str, columns: str) -> dict[int, int]:
    """What a function of csrc's that chooses by width returns for each of the widths."""
    (rule,) = re.findall(rf"\b{function}\(int columns\) \{{\s+return ([^;]+);", header)
    *steps, (_, of_rest) = re.findall(r"(?:columns <= (\d+) \? )?(\d+)(?: : |$)", rule)
    return {c: int(next((of for up_to, of in steps if c <= int(up_to)), of_rest)) for c in map(int, columns.split(", "))}


@built
class TestLibrary:
    library = build_info.PACKAGE / "libperceiver_kernels.so"

    def symbols(self, *options):
        if shutil.which("nm") is None:
            pytest.skip("nm is not installed")
        output = subprocess.run(
            ["nm", "-D", *options, str(self.library)], check=True, capture_output=True, text=True
        )
        return [line.split()[-1] for line in output.stdout.splitlines()]

    def test_exports_the_c_interface_alone(self):
        exported = [
            name for name in self.symbols("--defined-only", "--extern-only") if not name.startswith("_")
        ]
        declared = re.findall(r"^PK_API .*?\b(pk_\w+)\(", LAUNCH_HEADER.read_text(), re.M)
        assert sorted(exported) == sorted(declared)

    def test_needs_neither_torch_nor_python_nor_the_driver(self):
        foreign = re.compile(r"^(_?Py[A-Z_]|_ZN?K?\d*(at|c10|torch)\d?|cu[A-Z]|cuda|aoti_)")
        assert not [name for name in self.symbols("--undefined-only") if foreign.match(name)]

    def test_kernels_are_all_compiled_without_spills_or_warnings(self):
        info = build_info.read()
        kernels = info["kernels"]
        assert kernels["spilling"] == []
        assert kernels["warnings"] == []
        # 65,536 registers a multiprocessor hold one block of 256 threads at 255 registers each.
        assert kernels["max_registers"] <= 255
        archs = len(info["archs"])
        hopper = HOPPER_KERNELS if "90a" in info["archs"] else 0
        assert kernels["count"] == archs * (4 * 3 * FLAT_SHAPES + 3 * STRIDED_SHAPES + 3 * MERGES + ROW_PRODUCTS) + hopper

    def test_plan_knows_the_tiles_of_the_library(self):
        header = (ROOT / "csrc" / "kernels" / "shared_kv_enqueue.h").read_text()
        widths = re.search(r"kSharedKVColumns\[\] = \{([\d, ]+)\}", header).group(1)
        of_gradients = re.search(r"kSharedKVGradientColumns\[\] = \{([\d, ]+)\}", header).group(1)
        tables = {
            "block_kv": (widths, shared_kv.BLOCK_KV), "block_q": (widths, shared_kv.BLOCK_Q),
            "dq_block_kv": (of_gradients, shared_kv.DQ_BLOCK_KV),
        }  # fmt: skip
        for function, (columns, table) in tables.items():
            assert tiles_of(header, f"shared_kv_{function}", columns) == table
        assert int(re.search(r"kSharedKVGradientBlockKV = (\d+)", header).group(1)) == shared_kv.DX_BLOCK_KV
        header = (ROOT / "csrc" / "kernels" / "attention_enqueue.h").read_text()
        tables = {
            ("kAttentionColumns", "attention_block_kv"): attention_plans.BLOCK_KV,
            ("kAttentionBackwardColumns", "attention_bwd_block_q"): attention_plans.BACKWARD_BLOCK_Q,
        }
        for (widths, function), table in tables.items():
            columns = re.search(rf"{widths}\[\] = \{{([\d, ]+)\}}", header).group(1)
            assert tiles_of(header, function, columns) == table
        constants = {
            "kAttentionBlockQ": attention_plans.BLOCK_Q, "kAttentionLongBlockKV": attention_plans.LONG_BLOCK_KV,
            "kAttentionBackwardBlockKV": attention_plans.BACKWARD_BLOCK_KV,
            "kAttentionWideBlockQ": attention_plans.WIDE_BLOCK_Q, "kAttentionWideBlockKV": attention_plans.WIDE_BLOCK_KV,
        }  # fmt: skip
        for name, value in constants.items():
            assert int(re.search(rf"{name} = (\d+)", header).group(1)) == value

    def test_build_is_of_these_sources(self):
        assert not build_info.is_stale(build_info.read())
