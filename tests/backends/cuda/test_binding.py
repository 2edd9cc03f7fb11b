"""The CUDA library and its binding: what can be known of them without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perceiver_kernels import build_info
from perceiver_kernels.backends import cuda
from perceiver_kernels.backends.cuda import pack
from perceiver_kernels.device import A100, H200
from perceiver_kernels.problem import PackProblem

ROOT = Path(__file__).resolve().parents[3]
PARAMS_HEADER = ROOT / "csrc" / "include" / "perceiver" / "params.h"
FLAT_SHAPES, STRIDED_SHAPES = 10, 5
"""Row shapes in csrc/kernels/pack_enqueue.cuh; each is compiled for every element type written (and, flat, read)."""

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


def header_fields() -> list[str]:
    body = re.search(r"struct PackForwardParams \{(.*?)\n\};", PARAMS_HEADER.read_text(), re.S).group(1)
    return re.findall(r"^  [\w ]+[*\s]\s*(\w+);$", body, re.M)


@built
class TestStruct:
    def test_library_and_binding_agree_on_the_layout(self, binding):
        assert binding.library_abi_version() == binding.ABI_VERSION
        assert binding.layout() == binding.library_layout()

    def test_every_field_of_the_header_is_bound_at_ascending_offsets(self, binding):
        described, size = binding.layout().split(" ; ")
        fields = [field.split(":") for field in described.split()]
        assert [name for name, _, _ in fields] == header_fields()
        assert all(hasattr(binding.PackForwardParams, name) for name, _, _ in fields)
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
        assert sorted(exported) == ["pk_abi_version", "pk_layout", "pk_pack_inputs_fwd"]

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
        per_arch = 3 * 3 * FLAT_SHAPES + 3 * STRIDED_SHAPES
        assert kernels["count"] % per_arch == 0
        assert kernels["count"] >= per_arch

    def test_build_is_of_these_sources(self):
        assert not build_info.is_stale(build_info.read())


class TestAvailability:
    @pytest.mark.parametrize(
        ("capability", "archs", "fits"),
        [
            ((8, 0), ["80", "90a"], True),
            ((8, 6), ["80-real"], True),
            ((9, 0), ["80-real"], False),
            ((9, 0), ["90a"], True),
            ((10, 0), ["90a"], False),
            ((10, 0), ["80", "90a"], True),
            ((12, 0), ["80-virtual"], True),
            ((8, 0), ["86"], False),
            ((7, 5), ["80"], False),
            ((12, 1), ["121a-real"], True),
            ((8, 0), ["native"], True),
        ],
    )
    def test_code_for_a_gpu(self, capability, archs, fits):
        assert cuda.has_code_for(capability, archs) is fits

    def test_not_built_gives_the_recorded_reason(self, monkeypatch):
        monkeypatch.setattr(build_info, "read", lambda: {"cuda_built": False, "reason": "no nvcc in sight"})
        cuda._load.cache_clear()
        try:
            assert cuda.unavailable() == "the CUDA library is not built: no nvcc in sight"
            with pytest.raises(RuntimeError, match="no nvcc in sight"):
                cuda.binding()
        finally:
            cuda._load.cache_clear()

    def test_library_of_another_version_is_refused(self, monkeypatch):
        other = SimpleNamespace(
            ABI_VERSION=1, library_abi_version=lambda: 2, layout=lambda: "", library_layout=lambda: ""
        )
        monkeypatch.setattr(build_info, "read", lambda: {"cuda_built": True, "reason": None, "archs": ["80"]})
        monkeypatch.setattr(importlib, "import_module", lambda _: other)
        cuda._load.cache_clear()
        try:
            assert "ABI version 1 and libperceiver_kernels.so 2" in cuda.unavailable()
        finally:
            cuda._load.cache_clear()


class TestPlan:
    def problem(self, **changes):
        fields = {
            "B": 8, "M": 50176, "C_content": 261, "C_positions": 0, "content_dtype": torch.bfloat16,
            "dtype": torch.bfloat16, "device_type": "cuda", "fourier": False, "positions_batched": False,
            "normalize": True, "masked": False, "needs_grad": False,
        }  # fmt: skip
        return PackProblem(**fields | changes)

    def test_serves_plain_packs(self):
        assert pack.reasons_against(self.problem()) == []

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"fourier": True}, "does not compute Fourier features"),
            ({"needs_grad": True}, "without gradient to the content"),
            ({"device_type": "cpu"}, "cuda takes CUDA tensors, got cpu"),
            ({"content_dtype": torch.float64}, "got float64"),
            ({"C_content": 1000, "C_positions": 30}, "up to 1024 channels, got 1030"),
            ({"constants": 2}, "no constant channels"),
        ],
    )
    def test_refusals_are_sentences(self, changes, reason):
        (sentence,) = pack.reasons_against(self.problem(**changes))
        assert reason in sentence

    def test_imagenet_on_h200(self):
        # 32 rows of 522 bytes twice in a sixth of 228 KiB; 6 blocks on each of 132 multiprocessors.
        assert pack.plan_tiles(1, 8 * 50176, 261, 2, True, H200) == pack.PackTiles(True, 32, 792, 33664)

    @pytest.mark.parametrize(
        ("device", "itemsize", "flat"), list(itertools.product([H200, A100], [2, 4], [True, False]))
    )
    def test_every_width_and_size_fits(self, device, itemsize, flat):
        for channels in (1, 3, 16, 61, 64, 129, 261, 322, 384, 385, 704, 1024):
            for batch, tokens in ((1, 1), (3, 7), (8, 50176), (1, 10**8)):
                tiles = pack.plan_tiles(batch, tokens, channels, itemsize, flat, device)
                assert tiles.rows_per_tile * channels * itemsize % 16 == 0
                assert tiles.shared_bytes <= device.smem_bytes
                assert (
                    1 <= tiles.blocks <= min(6 * device.sm_count, batch * -(-tokens // tiles.rows_per_tile))
                )

    def test_flat_content_is_recognised(self):
        content = torch.zeros(2, 8, 5, dtype=torch.float16)

        def fields(tensor, alone=True):
            flat, found = pack._content_fields(tensor, None, alone)
            return flat, found["batch"], found["tokens"]

        assert fields(content) == (True, 1, 16)
        assert fields(content, alone=False) == (False, 2, 8)
        assert fields(content.expand(2, 8, 5)[:1].expand(3, 8, 5)) == (True, 3, 8)
        # A batch stride of 30 elements is not a multiple of 16 bytes; a slice may not start on 16 bytes.
        assert fields(torch.zeros(2, 6, 5, dtype=torch.float16)[:, :4]) == (False, 2, 4)
        assert fields(content[:, 1:]) == (False, 2, 7)
        assert fields(content.mT.contiguous().mT) == (False, 2, 8)
