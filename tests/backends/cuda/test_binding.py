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
from perceiver_kernels.backends.cuda import attention, pack, shared_kv, states
from perceiver_kernels.device import H200
from perceiver_kernels.masks import NO_MASKS

ROOT = Path(__file__).resolve().parents[3]
LAUNCH_HEADER = ROOT / "csrc" / "include" / "perceiver" / "launch.h"
PARAMS_HEADER = ROOT / "csrc" / "include" / "perceiver" / "params.h"
FLAT_SHAPES, STRIDED_SHAPES = 10, 5
"""Row shapes in csrc/kernels/pack_enqueue.cuh; each is compiled for every element type written (and, flat, read)."""
HOPPER_KERNELS = 2 * (2 * len(shared_kv.BLOCK_KV) + len(attention.BLOCK_KV) + 3 * len(attention.BACKWARD_BLOCK_Q))
"""In bf16 and fp16: shared-KV attention with and without a mask, attention, and the three of its backward."""
MERGES = 2
"""Numbers of groups in csrc/instantiations/merge_states.cu, each for every element type written."""

built = pytest.mark.skipif(
    not build_info.read()["cuda_built"], reason=f"CUDA library not built: {build_info.read()['reason']}"
)


@pytest.fixture
def binding():
    return cuda.binding()


def valid_fields(**changes):
    """A pack of [1, 4, 5] floats that is right in every way; its addresses are never followed without a GPU."""
    fields = {
        "content": 4096, "content_type": 0, "content_channels": 5, "stride_content_batch": 20,
        "stride_content_token": 5, "stride_content_channel": 1, "packed": 8192, "packed_type": 2,
        "packed_channels": 16, "batch": 1, "tokens": 4, "rows_per_tile": 8, "blocks": 1, "eps": 1e-5,
    }  # fmt: skip
    return fields | changes


def valid_shared_kv(**changes):
    """Shared-KV attention of one query over 5 tokens of 16 bf16 channels."""
    fields = {
        "q": 4096, "stride_q_batch": 16, "stride_q_row": 16, "x": 8192, "stride_x_batch": 80, "stride_x_token": 16,
        "z_out": 16384, "lse_out": 32768, "batch": 1, "rows": 1, "tokens": 5, "channels": 16, "type": 2,
        "z_out_type": 0, "splits": 1, "tokens_per_split": 128, "scale_log2": 1.0,
    }  # fmt: skip
    return fields | changes


def valid_attention(**changes):
    """Attention of one query over 5 keys of 16 bf16 channels."""
    fields = {f"stride_{name}_{axis}": 80 for name in ("query", "key", "value", "out") for axis in ("batch", "head")}
    fields |= {f"stride_{name}_row": 16 for name in ("query", "key", "value", "out")}
    fields |= {
        "query": 4096, "key": 8192, "value": 12288, "out": 16384, "lse_out": 32768, "batch": 1, "heads": 1,
        "heads_per_key_head": 1, "queries": 1, "keys": 5, "channels_qk": 16, "channels_v": 16, "type": 2, "out_type": 0,
        "splits": 1, "keys_per_split": 128, "items": 1, "blocks": 1, "scale_log2": 1.0,
    }  # fmt: skip
    return fields | changes


def valid_attention_backward(**changes):
    """The gradients of attention of one query over 5 keys of 16 bf16 channels."""
    heads = ("query", "key", "value", "out", "dout", "dq", "dk", "dv")
    fields = {f"stride_{name}_{axis}": 80 for name in heads for axis in ("batch", "head")}
    fields |= {f"stride_{name}_row": 16 for name in heads}
    fields |= {name: 4096 * (i + 1) for i, name in enumerate((*heads, "lse", "rows", "dq_parts"))}
    fields |= {
        "batch": 1, "heads": 1, "heads_per_key_head": 1, "queries": 1, "keys": 5, "channels_qk": 16, "channels_v": 16,
        "type": 2, "query_blocks": 1, "splits": 1, "keys_per_split": 128,
        "items": 1, "blocks": 1, "scale": 0.7, "scale_log2": 1.0,
    }  # fmt: skip
    return fields | changes


def valid_merge(**changes):
    fields = {
        "z_part": 4096, "lse_part": 8192, "z": 16384, "lse": 32768, "rho": 65536, "batch": 1, "heads": 1, "splits": 2,
        "rows": 1, "channels": 16, "stride_z_batch": 16, "stride_z_head": 16, "stride_z_row": 16, "z_type": 2,
    }  # fmt: skip
    return fields | changes


STRUCTS = (
    "PackForwardParams", "SharedKVForwardParams", "AttentionForwardParams", "AttentionBackwardParams", "MergeStatesParams"
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
        """Over so many tokens that both forwards are split, and merged."""
        filled = {struct: set() for struct in STRUCTS[1:]}
        functions = ("shared_kv_fwd", "attention_fwd", "attention_bwd", "merge_states")
        structs = {struct: (lambda *_, struct=struct: struct) for struct in STRUCTS}
        stand_in = SimpleNamespace(**structs, **dict.fromkeys(functions, lambda _: None))

        def fill(struct, fields):
            filled[struct] |= set(fields)
            return struct

        for module in (shared_kv, attention):
            monkeypatch.setattr(module, "on_device_of", lambda _: contextlib.nullcontext())
            monkeypatch.setattr(module, "stream_of", lambda _: 0)
        caches = ((shared_kv, "_forward_params"), (attention, "_forward_params"), (attention, "_backward_params"))
        for module, cached in (*caches, (states, "_params")):
            monkeypatch.setattr(module, "filled", fill)
            monkeypatch.setattr(module, "binding", lambda: stand_in)
            monkeypatch.setattr(module, cached, getattr(module, cached).__wrapped__)
        for module in (shared_kv, attention):
            monkeypatch.setattr(module, "device_facts", lambda _: H200)
        q, x = torch.zeros(1, 3, 64, dtype=torch.float16), torch.zeros(1, 10**5, 64, dtype=torch.float16)
        options = {"scale": 1.0, "dropout_p": 0.0, "dropout_seed": None}
        shared_kv.shared_kv_attention_forward(q, x, None, None, key_offset=0, **options)
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


@built
class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"content_channels": 1025, "packed_channels": 1040}, "must have 1 to 1024 channels together"),
            ({"content_channels": 0}, "must have 1 to 1024 channels together"),
            ({"packed_channels": 12}, "packed_channels must be a multiple of 16"),
            ({"packed_channels": 32}, "packed_channels must be the channels rounded up to 16"),
            ({"content_type": 3}, "element types must be 0"),
            ({"batch": -1}, "must not be negative"),
            ({"rows_per_tile": 0}, "rows_per_tile and blocks must be positive"),
            ({"tokens": 2**40}, "must be below 2\\^31"),
            ({"packed": 0}, "a pointer is null"),
            ({"normalize": 1, "rstd": 0}, "a pointer is null"),
            ({"packed": 8200}, "packed must lie on 16 bytes"),
            ({"flat": 1, "content": 4104}, "every tile to start on 16 bytes"),
            ({"flat": 1, "rows_per_tile": 3}, "every tile to start on 16 bytes"),
            ({"flat": 1, "batch": 2, "stride_content_batch": 21}, "every tile to start on 16 bytes"),
            ({"flat": 1, "stride_content_token": 6}, "needs contiguous content and no positions"),
        ],
    )
    def test_broken_promise_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.PackForwardParams(), valid_fields(**changes))
        with pytest.raises(RuntimeError, match=f"pack_inputs_fwd: .*{sentence}"):
            binding.pack_inputs_fwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"channels": 520}, "channels must be at most 512"),
            ({"channels": 12}, "channels must be a multiple of 8"),
            ({"rows": -1}, "sizes must not be negative"),
            ({"type": 0}, "type must be 1"),
            ({"z_out_type": 1}, "z_out_type must be 0"),
            ({"splits": 2, "tokens_per_split": 80}, "of whole tiles of tokens"),
            ({"tokens_per_split": 4}, "must cover the tokens"),
            ({"batch": 2**30, "rows": 257}, "fewer than 2\\^31 blocks"),
            ({"scale_log2": 0.0}, "scale_log2 must be positive"),
            ({"tokens": 0}, "there must be tokens"),
            ({"x": 0}, "a pointer is null"),
            ({"q": 4104}, "a base and pitches of 16 bytes"),
            ({"stride_x_token": 20}, "a base and pitches of 16 bytes"),
            ({"batch": 2, "stride_x_batch": 84}, "a base and pitches of 16 bytes"),
            ({"z_out": 16388}, "z_out must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_shared_kv_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.SharedKVForwardParams(), valid_shared_kv(**changes))
        with pytest.raises(RuntimeError, match=f"shared_kv_fwd: .*{sentence}"):
            binding.shared_kv_fwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"heads": 0}, "heads and channels positive"),
            ({"channels_v": 264}, "channels must be at most 256"),
            ({"channels_qk": 12}, "channels must be multiples of 8"),
            ({"heads": 3, "heads_per_key_head": 2}, "heads_per_key_head must divide heads"),
            ({"type": 0}, "type must be 1"),
            ({"out_type": 1}, "out_type must be 0"),
            ({"splits": 2, "keys_per_split": 80}, "of whole tiles of keys"),
            ({"keys_per_split": 4}, "must cover the keys"),
            ({"items": 2}, "items must be all blocks"),
            ({"scale_log2": -1.0}, "scale_log2 must be positive"),
            ({"blocks": 0}, "blocks must be positive"),
            ({"keys": 0}, "there must be keys"),
            ({"value": 0}, "a pointer is null"),
            ({"key": 4104}, "a base and pitches of 16 bytes"),
            ({"stride_value_row": 20}, "a base and pitches of 16 bytes"),
            ({"out": 16388}, "out must lie on 16 bytes"),
            ({"stride_out_row": 12}, "out must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_attention_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.AttentionForwardParams(), valid_attention(**changes))
        with pytest.raises(RuntimeError, match=f"attention_fwd: .*{sentence}"):
            binding.attention_fwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"heads": 0}, "heads and channels positive"),
            ({"channels_v": 136}, "channels must be at most 128"),
            ({"channels_qk": 12}, "channels must be multiples of 8"),
            ({"heads": 3, "heads_per_key_head": 2}, "heads_per_key_head must divide heads"),
            ({"type": 0}, "type must be 1"),
            ({"splits": 2, "keys_per_split": 80}, "of whole tiles of keys"),
            ({"keys_per_split": 4}, "must cover the keys, and none be empty"),
            ({"splits": 2, "items": 2}, "must cover the keys, and none be empty"),
            ({"query_blocks": 2}, "query_blocks must cover the queries"),
            ({"queries": 2**30, "query_blocks": 2**23, "heads": 64}, "fewer than 2\\^29 blocks of queries"),
            ({"items": 2}, "items must be all splits of all heads"),
            ({"scale": -1.0}, "scale and scale_log2 must be positive"),
            ({"blocks": 0}, "blocks must be positive"),
            ({"keys": 0}, "none be empty"),
            ({"dout": 0}, "a pointer is null"),
            ({"dq": 0}, "a pointer is null"),
            ({"key": 4104}, "a base and pitches of 16 bytes"),
            ({"queries": 2, "stride_dout_row": 20}, "a base and pitches of 16 bytes"),
            ({"stride_dk_row": 12}, "a base and pitches of 16 bytes"),
            ({"rows": 4100}, "out and workspaces must lie on 16 bytes"),
            ({"stride_out_row": 12}, "out and workspaces must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_attentions_backward_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.AttentionBackwardParams(), valid_attention_backward(**changes))
        with pytest.raises(RuntimeError, match=f"attention_bwd: .*{sentence}"):
            binding.attention_bwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"heads": 2}, "heads must divide batch"),
            ({"channels": 6}, "a positive multiple of 4"),
            ({"z_type": 5}, "z_type must be 0"),
            ({"lse_state": 4096}, "an earlier state is z_state and lse_state"),
            ({"z_part": 0}, "a pointer is null"),
            ({"z": 8}, "on 16 bytes everywhere"),
        ],
    )
    def test_broken_promise_of_a_merge_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.MergeStatesParams(), valid_merge(**changes))
        with pytest.raises(RuntimeError, match=f"merge_states: .*{sentence}"):
            binding.merge_states(params)

    @pytest.mark.parametrize("empty", ["batch", "rows"])
    def test_no_rows_are_nothing_to_do(self, binding, empty):
        binding.shared_kv_fwd(cuda.filled(binding.SharedKVForwardParams(), valid_shared_kv(**{empty: 0})))
        binding.merge_states(cuda.filled(binding.MergeStatesParams(), valid_merge(**{empty: 0})))
        of_attention = valid_attention(**{{"rows": "queries"}.get(empty, empty): 0}, items=0)
        binding.attention_fwd(cuda.filled(binding.AttentionForwardParams(), of_attention))

    @pytest.mark.parametrize("empty", ["batch", "tokens"])
    def test_nothing_to_do_returns_before_the_driver_is_asked(self, binding, empty):
        binding.pack_inputs_fwd(cuda.filled(binding.PackForwardParams(), valid_fields(**{empty: 0})))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_missing_driver_is_named(self, binding):
        params = cuda.filled(binding.PackForwardParams(), valid_fields())
        with pytest.raises(
            RuntimeError, match=r"no NVIDIA driver is loaded.*cudaErrorInsufficientDriver, 35"
        ):
            binding.pack_inputs_fwd(params)


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
        assert kernels["count"] == archs * (3 * 3 * FLAT_SHAPES + 3 * STRIDED_SHAPES + 3 * MERGES) + hopper

    def test_plan_knows_the_tiles_of_the_library(self):
        header = (ROOT / "csrc" / "kernels" / "shared_kv_enqueue.h").read_text()
        columns = re.search(r"kSharedKVColumns\[\] = \{([\d, ]+)\}", header).group(1)
        for function, table in (("block_kv", shared_kv.BLOCK_KV), ("block_q", shared_kv.BLOCK_Q)):
            (rule,) = re.findall(rf"shared_kv_{function}\(int columns\) \{{\s+return ([^;]+);", header)
            *steps, (_, of_rest) = re.findall(r"(?:columns <= (\d+) \? )?(\d+)(?: : |$)", rule)
            tiles = {c: next((of for up_to, of in steps if c <= int(up_to)), of_rest) for c in map(int, columns.split(", "))}
            assert {c: int(of) for c, of in tiles.items()} == table
        header = (ROOT / "csrc" / "kernels" / "attention_enqueue.h").read_text()
        columns = re.search(r"kAttentionColumns\[\] = \{([\d, ]+)\}", header).group(1)
        first, of_first, of_rest = map(int, re.search(r"return columns <= (\d+) \? (\d+) : (\d+);", header).groups())
        assert {c: of_first if c <= first else of_rest for c in map(int, columns.split(", "))} == attention.BLOCK_KV
        assert int(re.search(r"kAttentionBlockQ = (\d+)", header).group(1)) == attention.BLOCK_Q
        columns = re.search(r"kAttentionBackwardColumns\[\] = \{([\d, ]+)\}", header).group(1)
        rule = re.search(r"attention_bwd_block_q\(int columns\) \{ return columns <= (\d+) \? (\d+) : (\d+);", header)
        first, of_first, of_rest = map(int, rule.groups())
        tiles = {c: of_first if c <= first else of_rest for c in map(int, columns.split(", "))}
        assert tiles == attention.BACKWARD_BLOCK_Q
        assert int(re.search(r"kAttentionBackwardBlockKV = (\d+)", header).group(1)) == attention.BACKWARD_BLOCK_KV

    def test_build_is_of_these_sources(self):
        assert not build_info.is_stale(build_info.read())
