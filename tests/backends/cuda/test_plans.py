"""What the CUDA backend serves, how it plans, and which calls it leaves to the next backend."""

from __future__ import annotations

import importlib
import itertools
import re
from types import SimpleNamespace

import pytest
import torch

from perceiver_kernels import build_info
from perceiver_kernels.backends import cuda
from perceiver_kernels.backends.cuda import attention, attention_plans, pack, shared_kv
from perceiver_kernels.device import A100, H200
from perceiver_kernels.layouts import can_describe
from perceiver_kernels.problem import AttentionProblem, PackProblem, SharedKVProblem


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


class TestReadable:
    @pytest.mark.parametrize(
        ("make", "copied"),
        [
            (lambda t: t, False),
            (lambda t: t.transpose(1, 2), False),
            (lambda t: t[:, :1], False),
            (lambda t: t[..., 1:], True),
            (lambda t: t[..., :20], False),
            (lambda t: t.mT, True),
            (lambda t: t[:1].expand(3, -1, -1, -1), True),
            (lambda t: torch.zeros(2, 3, 5, 20, dtype=torch.float16), True),
        ],
    )
    def test_only_what_the_copy_engine_cannot_read_is_copied(self, make, copied):
        tensor = make(torch.randn(2, 3, 5, 24).half())
        found = cuda.readable(tensor)
        assert torch.equal(found, tensor) and can_describe(found)
        assert (found is not tensor) == copied


class TestPack:
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
            ({"device_type": "cpu"}, "cuda takes CUDA tensors, got cpu"),
            ({"content_dtype": torch.float64}, "got float64"),
            ({"C_content": 1000, "C_positions": 30}, "up to 1024 channels, got 1030"),
            ({"constants": 2}, "no constant channels"),
        ],
    )
    def test_refusals_are_sentences(self, changes, reason):
        (sentence,) = pack.reasons_against(self.problem(**changes))
        assert reason in sentence

    @pytest.mark.parametrize(
        ("sizes", "forward", "backward"),
        [
            ((8 * 50176, 261, 2, 1), None, None),
            ((8 * 50176, 261, 2, 0), "content that is not one run", None),
            ((8 * 50176, 261, 4, 1), "faster with float32", None),
            ((8 * 50176, 64, 2, 1), None, None),
            ((8 * 50176, 96, 2, 1), "faster with 96 channels", None),
            ((8 * 50176, 128, 2, 1), None, "faster with 128 channels"),
            ((8 * 50176, 144, 2, 1), None, None),
            ((8 * 50176, 400, 2, 1), None, "faster with 400 channels"),
            ((8 * 50176, 512, 2, 1), "faster with 512 channels", "faster with 512 channels"),
            ((8 * 50176, 704, 2, 1), None, None),
            ((2000, 261, 2, 1), None, "less than 2\\^22"),
        ],
    )
    def test_leaves_what_triton_does_faster(self, sizes, forward, backward):
        for found, reason in ((pack.leaves(sizes), forward), (pack.leaves_backward(sizes), backward)):
            assert found is None if reason is None else re.search(reason, found)

    def test_imagenet_on_h200(self):
        # 16 rows of 522 bytes are the most of 12 KiB; 3 blocks on each of 132 multiprocessors.
        assert pack.plan_tiles(1, 8 * 50176, 261, 2, 544, True, H200) == pack.PackTiles(True, 16, 396, 34432)

    @pytest.mark.parametrize(
        ("device", "itemsize", "flat"), list(itertools.product([H200, A100], [2, 4], [True, False]))
    )
    def test_every_width_and_size_fits(self, device, itemsize, flat):
        for channels in (1, 3, 16, 61, 64, 129, 261, 322, 384, 385, 704, 1024):
            for batch, tokens in ((1, 1), (3, 7), (8, 50176), (1, 10**8)):
                tiles = pack.plan_tiles(batch, tokens, channels, itemsize, 4 * -(-channels // 16) * 16, flat, device)
                assert tiles.rows_per_tile * channels * itemsize % 16 == 0
                assert tiles.shared_bytes <= device.smem_bytes
                assert 1 <= tiles.blocks <= min(6 * device.sm_count, batch * -(-tokens // tiles.rows_per_tile))

    @pytest.mark.parametrize(("device", "itemsize"), list(itertools.product([H200, A100], [2, 4])))
    def test_every_width_of_the_backward_fits(self, device, itemsize):
        for packed_channels in (16, 64, 80, 128, 144, 272, 384, 400, 704, 1024):
            sizes = ((1, 4), (21, 4 * packed_channels), (8 * 50176, 2 * packed_channels), (10**9, 6))
            for rows, content_row_bytes in sizes:
                tiles = pack.plan_backward_tiles(rows, packed_channels, itemsize, content_row_bytes, device)
                vector_rows = 4 if content_row_bytes == 4 * packed_channels else 8
                assert tiles.rows_per_tile % vector_rows == 0 and tiles.rows_per_tile * packed_channels <= 8192
                assert tiles.shared_bytes <= device.smem_bytes
                assert 1 <= tiles.blocks <= min(5 * device.sm_count, -(-rows // tiles.rows_per_tile))

    def test_flat_content_is_recognised(self):
        content = torch.zeros(2, 8, 5, dtype=torch.float16)

        def fields(tensor, alone=True):
            flat, found = pack._content_fields(tensor, None, alone)
            return flat, found["batch"], found["tokens"]

        assert fields(content) == (True, 1, 16)
        assert fields(content, alone=False) == (False, 2, 8)
        assert fields(content[:1].expand(3, 8, 5)) == (False, 3, 8)
        # Gaps between batch entries; a slice may not start on 16 bytes.
        assert fields(torch.zeros(2, 16, 8, dtype=torch.float16)[:, :4]) == (False, 2, 4)
        assert fields(content[:, 1:]) == (False, 2, 7)
        assert fields(content.mT.contiguous().mT) == (False, 2, 8)


class TestSharedKV:
    def problem(self, **changes):
        fields = {
            "B": 8, "R": 512, "M": 50176, "C": 272, "dtype": torch.bfloat16, "device_type": "cuda", "masked": True,
            "dropout": False, "needs_lse": True, "needs_grad": False,
        }  # fmt: skip
        return SharedKVProblem(**fields | changes)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"dtype": torch.float32}, "in bfloat16 and float16, got float32"),
            ({"C": 528}, "rows of up to 512 channels, got 528"),
            ({"dropout": True}, "without dropout"),
            ({"C": 352, "needs_grad": True}, "the gradients of rows of up to 336 channels, got 352"),
        ],
    )
    def test_refusals_are_sentences(self, changes, reason, monkeypatch):
        monkeypatch.setattr(cuda, "reasons_against_hopper", list)
        assert shared_kv.reasons_against(self.problem()) == []
        assert shared_kv.reasons_against(self.problem(needs_grad=True)) == []
        (sentence,) = shared_kv.reasons_against(self.problem(**changes))
        assert reason in sentence

    @pytest.mark.parametrize(
        ("capability", "archs", "reason"),
        [((8, 0), ["80", "90a"], "compute capability 9.0 alone"), ((9, 0), ["80"], "without 90a"), ((9, 0), ["90a"], None)],
    )
    def test_hopper_alone(self, capability, archs, reason, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(build_info, "read", lambda: {"archs": archs})
        found = shared_kv.reasons_against(self.problem())
        assert len(found) == (reason is not None) and all(reason in sentence for sentence in found)

    def test_imagenet_is_one_wave_on_h200(self):
        # 8 x 4 blocks of rows, 4 splits: 128 blocks on 132 multiprocessors.
        assert shared_kv.plan(self.problem(), H200) == shared_kv.ForwardPlan(80, 4, 12560)

    def test_wide_rows_have_blocks_of_64(self):
        # 8 x 8 blocks of rows, 2 splits: again 128 blocks.
        assert shared_kv.plan(self.problem(C=512), H200) == shared_kv.ForwardPlan(64, 2, 25088)

    def test_splits_cover_the_tokens_in_whole_tiles(self):
        for B, R, M, C in itertools.product((1, 8, 500), (1, 128, 2048), (1, 79, 80, 50176, 10**8), (8, 64, 272, 336, 512)):
            plan = shared_kv.plan(self.problem(B=B, R=R, M=M, C=C), H200)
            assert plan.tokens_per_split % plan.block_kv == 0
            assert (plan.splits - 1) * plan.tokens_per_split < M <= plan.splits * plan.tokens_per_split

    @pytest.mark.parametrize("rule", [shared_kv.leaves, shared_kv.leaves_backward])
    def test_calls_are_left_to_the_next_backend_where_it_is_faster(self, rule):
        assert rule((8, 512, 50176, 272)) is None
        assert "less than 5 GFLOP" in rule((4, 128, 4096, 256))
        assert "of 129 to 19" in rule((8, 512, 50176, 160))

    def test_passes_are_left_apart(self):
        assert shared_kv.leaves((8, 512, 50176, 192)) is None
        assert "129 to 192 channels, got 192" in shared_kv.leaves_backward((8, 512, 50176, 192))
        assert "or 12 where rows have 257 to 336" in shared_kv.leaves((4, 256, 8192, 272))
        assert shared_kv.leaves_backward((4, 256, 8192, 272)) is None

    def test_gradients_of_imagenet_on_h200(self):
        # dq as the forward, in tiles of 64 tokens; dx in 3,136 blocks of tokens, which 132 resident blocks share.
        assert shared_kv.plan_backward(8, 512, 50176, 272, H200) == shared_kv.BackwardPlan(64, 4, 12544, 132)

    def test_splits_of_dq_cover_the_tokens_in_whole_tiles(self):
        for B, R, M, C in itertools.product((1, 8, 500), (1, 128, 2048), (1, 79, 80, 50176, 10**8), (8, 64, 272, 336)):
            plan = shared_kv.plan_backward(B, R, M, C, H200)
            assert plan.tokens_per_split % plan.block_kv == 0
            assert (plan.splits - 1) * plan.tokens_per_split < M <= plan.splits * plan.tokens_per_split
            assert 1 <= plan.blocks <= min(B * -(-M // 128), 132)


class TestAttention:
    def problem(self, **changes):
        fields = {
            "B": 32, "H": 8, "H_kv": 8, "Lq": 512, "Lk": 512, "Lk_first": 512, "d_qk": 128, "d_v": 128,
            "dtype": torch.bfloat16, "device_type": "cuda",
        }  # fmt: skip
        return AttentionProblem(**fields | changes)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"dtype": torch.float32}, "in bfloat16 and float16, got float32"),
            ({"d_v": 264}, "heads of up to 256 channels, got 128 and 264"),
            ({"d_qk": 84}, "a multiple of 8 channels, got 84 and 128"),
            ({"dropout": True}, "without dropout"),
            ({"key_mask": True}, "without a key_mask"),
            ({"lengths": True}, "without lengths"),
            ({"attn_mask": "boolean"}, "without an attn_mask"),
            ({"query_mask": True}, "without a query_mask"),
            ({"packed": True}, "without packed sequences"),
            ({"causal": "upper_left"}, "without a causal mask"),
            ({"segments": 2}, "without two segments"),
        ],
    )
    def test_refusals_are_sentences(self, changes, reason, monkeypatch):
        monkeypatch.setattr(cuda, "reasons_against_hopper", list)
        assert attention.reasons_against(self.problem(needs_grad=True)) == []
        assert attention.reasons_against(self.problem()) == []
        (sentence,) = attention.reasons_against(self.problem(**changes))
        assert reason in sentence

    def test_latents_are_items_of_resident_blocks(self):
        assert attention.plan(self.problem(), H200) == attention_plans.ForwardPlan(128, 1, 512, 1024, 132)

    def test_splits_cover_the_keys_in_whole_tiles(self):
        for B, Lq, Lk, d in itertools.product((1, 8, 500), (1, 128, 2048), (1, 79, 128, 50176, 10**8), (8, 64, 96, 128, 256)):
            plan = attention.plan(self.problem(B=B, Lq=Lq, Lk=Lk, d_qk=d, d_v=d), H200)
            assert plan.keys_per_split % plan.block_kv == 0
            assert (plan.splits - 1) * plan.keys_per_split < Lk <= plan.splits * plan.keys_per_split
            assert plan.items == B * 8 * -(-Lq // 128) * plan.splits and 1 <= plan.blocks <= min(plan.items, 132)

    @pytest.mark.parametrize(
        ("sizes", "reason"),
        [
            ((32, 8, 512, 512, 128, 128), None),
            ((8, 8, 2048, 2048, 64, 64), None),
            ((32, 8, 256, 256, 160, 160), None),
            ((32, 8, 512, 512, 64, 64), None),
            ((1, 4, 2**20, 512, 64, 64), "more than 16 queries a key"),
            ((32, 8, 784, 784, 64, 64), "784 keys: neither whole tiles"),
            ((8, 8, 512, 4096, 64, 64), "4096 keys: neither whole tiles"),
            ((4, 8, 512, 50176, 64, 64), None),
            ((8, 16, 64, 16384, 64, 64), None),
            ((32, 8, 512, 512, 128, 64), "heads of 128 and 64 channels were not measured"),
            ((8, 16, 72, 16384, 128, 128), "72 queries leave more than a fifth"),
            ((1, 1, 128, 512, 128, 128), "less than 5 GFLOP"),
        ],
    )
    def test_calls_are_left_to_the_next_backend_where_it_is_faster(self, sizes, reason):
        found = attention.leaves(sizes)
        assert found is None if reason is None else reason in found

    def test_latents_are_differentiated_a_head_a_block(self):
        latents = attention_plans.plan_backward(32, 8, 8, 512, 512, 128, 128, H200)
        assert latents == attention_plans.BackwardPlan(128, 64, 8, 1, 512, 256, 132)

    def test_tiles_of_inputs_are_balanced(self):
        # 8 heads of 392 tiles of keys, 24 at most for each of 132 programs; 16 splits of 25 would leave four idle.
        inputs = attention_plans.plan_backward(8, 1, 1, 512, 50176, 128, 128, H200)
        assert inputs == attention_plans.BackwardPlan(128, 64, 8, 18, 50176, 264, 132, balanced=True)
        # Nothing is gained where as many tiles are left to the longest.
        assert not attention_plans.plan_backward(8, 8, 8, 2048, 2048, 64, 64, H200).balanced

    def test_balanced_tiles_are_all_taken_once(self):
        """As csrc/kernels/attention_bwd.cuh shares them out, and counts the parts of a head."""
        for blocks, tiles, heads in ((132, 392, 8), (132, 19, 100), (7, 5, 6), (114, 114, 1), (3, 1, 3)):
            total, taken = tiles * heads, {}
            first = [block * total // blocks for block in range(blocks + 1)]

            def block_of(tile, blocks=blocks, total=total):
                return ((tile + 1) * blocks - 1) // total

            for block, item in itertools.product(range(blocks), (0, 1)):
                head = first[block] // tiles + item
                for tile in range(max(first[block], head * tiles), min(first[block + 1], (head + 1) * tiles)):
                    assert tile not in taken
                    taken[tile] = block - block_of(head * tiles)
            assert len(taken) == total
            for head in range(heads):
                parts = {taken[tile] for tile in range(head * tiles, (head + 1) * tiles)}
                assert parts == set(range(block_of((head + 1) * tiles - 1) - block_of(head * tiles) + 1))
                assert len(parts) <= (tiles - 1) * blocks // total + 2

    def test_splits_of_the_backward_cover_the_keys_in_whole_tiles(self):
        sizes = itertools.product((1, 8, 500), ((8, 8), (8, 2)), (1, 128, 10**5), (1, 79, 128, 50176, 10**8), (8, 64, 96, 128))
        for B, (H, H_kv), Lq, Lk, d in sizes:
            plan = attention_plans.plan_backward(B, H, H_kv, Lq, Lk, d, d, H200)
            if plan.balanced:
                assert plan.items == 2 * plan.blocks == 264 and plan.splits > 1
                continue
            assert plan.keys_per_split % attention_plans.BACKWARD_BLOCK_KV == 0
            assert (plan.splits - 1) * plan.keys_per_split < Lk <= plan.splits * plan.keys_per_split
            assert (plan.query_blocks - 1) * plan.block_q < Lq <= plan.query_blocks * plan.block_q
            assert (plan.slices - 1) * -(-plan.query_blocks // plan.slices) < plan.query_blocks
            assert plan.items == B * H_kv * plan.splits * plan.slices and 1 <= plan.blocks <= min(plan.items, 132)

    def test_queries_of_a_decoder_are_sliced(self):
        # 8 heads of two tiles of keys would be eight programs. In nine waves the parts of dq of 132 programs are 231 MiB.
        plan = attention_plans.plan_backward(1, 8, 8, 2**20, 256, 64, 64, H200)
        assert plan == attention_plans.BackwardPlan(64, 128, 8192, 1, 256, 1176, 132, slices=147)

    def test_wide_backwards_are_chunks(self):
        for B, (H, H_kv), Lq, Lk in itertools.product((1, 8), ((1, 1), (8, 2)), (1, 128, 512, 10**6), (1, 65, 512, 10**6)):
            plan = attention_plans.plan_backward(B, H, H_kv, Lq, Lk, 256, 256, H200)
            assert plan.chunk_rows in (Lq, plan.chunk_rows // 128 * 128) and 1 <= plan.chunk_rows <= Lq
            assert plan.chunk_keys in (Lk, plan.chunk_keys // 64 * 64) and 1 <= plan.chunk_keys <= Lk
            assert plan.chunk_rows == Lq or plan.chunk_keys == Lk
            tiles = attention_plans.workspace_floats(plan, (B, H, H_kv, Lq, Lk, 256, 256))[2]
            least = 4 * B * H * 128 * min(max(Lq, Lk), min(Lq, Lk) + 128)
            assert 4 * tiles <= max(96 << 20, 2 * least)

    def test_parts_of_dq_take_no_more_than_the_operands_or_256_mib(self):
        sizes = ((1, 1, 10**5, 10**5, 128), (1, 8, 65536, 65536, 64), (512, 8, 512, 512, 128), (1, 2, 10**6, 256, 64))
        for B, H, Lq, Lk, d in sizes:
            plan = attention_plans.plan_backward(B, H, H, Lq, Lk, d, d, H200)
            _, parts, *_ = attention_plans.workspace_floats(plan, (B, H, H, Lq, Lk, d, d))
            assert 4 * parts <= 1.1 * max(256 << 20, 8 * B * H * (Lq + Lk) * d)

    @pytest.mark.parametrize(
        ("sizes", "reason"),
        [
            ((32, 8, 512, 512, 128, 128), None),
            ((64, 8, 512, 512, 64, 64), None),
            ((8, 1, 512, 50176, 128, 128), None),
            ((4, 8, 512, 50176, 64, 64), None),
            ((32, 8, 512, 512, 96, 96), "heads of 96 and 96 channels were not measured"),
            ((8, 16, 64, 16384, 64, 64), "64 queries leave more than a fifth"),
            ((8, 16, 128, 8192, 64, 64), "one block, were not measured"),
            ((8, 8, 4096, 256, 64, 64), None),
            ((1, 8, 2**20, 256, 64, 64), None),
            ((1, 4, 2**19, 256, 128, 128), None),
            ((1, 2, 100_352, 256, 64, 64), "more than 16 queries a key"),
            ((1, 1, 2**20, 512, 128, 128), "more than 16 queries a key"),
            ((1, 1, 256, 2**20, 256, 256), None),
            ((1, 1, 2**20, 512, 256, 256), None),
            ((8, 8, 72, 16384, 256, 256), None),
            ((4, 1, 8077, 2048, 64, 64), "fewer than 128 tiles of keys in all heads, got 64"),
            ((1, 8, 2048, 2048, 128, 128), "fewer than 512 tiles of keys in all heads, got 128"),
            ((1, 16, 4096, 4096, 64, 64), None),
            ((1, 1, 100_000, 100_000, 64, 64), "more memory than the operands, with 1 heads of 100000 queries"),
            ((32, 8, 128, 512, 64, 64), "less than 5 GFLOP"),
        ],
    )
    def test_backwards_are_left_to_the_next_backend_where_it_is_faster(self, sizes, reason):
        found = attention.leaves_backward(sizes)
        assert found is None if reason is None else reason in found
