// Shared-KV attention forward, z = softmax(scale q x^T) x, on sm_90a: one tile of x in shared memory serves both products.
//
// Work: one block per (128 query rows, split of the tokens, batch entry), row blocks fastest. Threads: a producer warpgroup
// that copies tiles of kBlockKV tokens ahead (TMA) and two consumer warpgroups of 64 rows each, whose accumulators of all
// columns stay in registers. Shared memory: 2 (128 C + kStages kBlockKV 64 slabs) bytes. While the softmax of tile t runs, the
// products q x^T of tile t + 1 and p x of tile t - 1 are in flight.
//
// FLOPs 4 B R M C. Device memory: x once while row blocks share it through the L2, and 4 B S R (C + 1) bytes of partial states.
#pragma once

#include "kernels/shared_kv_work.cuh"
#include "perceiver/device/barrier.cuh"
#include "perceiver/device/tma.cuh"

namespace perceiver {

template <int kColumns_, int kBlockKV_, int kStages_>
struct SharedKVShape : TileShape<kColumns_, kBlockKV_>, SharedKVBlocks<kColumns_> {
  using Tile = TileShape<kColumns_, kBlockKV_>;
  static_assert(SharedKVShape::kClusterRows == 64 * kConsumers, "a warpgroup owns 64 rows");
  static constexpr int kStages = kStages_;
  static constexpr bool kConsumersShareRows = false;
  static constexpr int kSharedBytes = 1024 + Tile::kQueryBytes + sizeof(uint64_t) +
                                      kStages * (Tile::kTileBytes + 2 * sizeof(uint64_t) + Tile::kMaskWords * sizeof(uint32_t));
};

// The block's shared memory; tiles start on 1,024 bytes, which their swizzle counts from. One address is kept, the others are
// sums.
template <class Shape>
struct SharedKVMemory {
  uint32_t query;

  __device__ explicit SharedKVMemory(unsigned char* shared) : query((shared_address(shared) + 1023) & ~1023u) {}

  __device__ __forceinline__ uint32_t tokens(int stage) const {
    return query + Shape::kQueryBytes + stage * Shape::kTileBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return tokens(Shape::kStages) + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t query_full() const { return full(2 * Shape::kStages); }
  // The visibility of a stage's tokens comes and goes with them.
  __device__ __forceinline__ uint32_t visible_full(int stage) const { return full(stage); }
  __device__ __forceinline__ uint32_t visible_empty(int stage) const { return empty(stage); }
  // A word of it.
  __device__ __forceinline__ uint32_t visible(int stage, int word) const {
    return full(2 * Shape::kStages + 1) + 4 * (stage * Shape::kMaskWords + word);
  }
};

template <class Shape>
__device__ __forceinline__ void load_queries_and_tokens(SharedKVMemory<Shape> memory, const SharedKVMaps& maps,
                                                        const SharedKVWork& work) {
  arrive_expecting(memory.query_full(), Shape::kQueryBytes);
  for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
    const uint32_t query = memory.query + warpgroup * Shape::kWarpgroupQueryBytes;
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(query + slab * Shape::kQuerySlabBytes, slab < Shape::kFullSlabs ? maps.query : maps.query_tail,
                memory.query_full(), 64 * slab, work.row + 64 * warpgroup, 0, work.entry);
    }
  }
  Turn<Shape::kStages> turn;
  for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
    wait(memory.empty(turn.stage), turn.parity ^ 1);
    arrive_expecting(memory.full(turn.stage), Shape::kTileBytes);
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(memory.tokens(turn.stage) + slab * Shape::kSlabBytes, maps.tokens, memory.full(turn.stage), 64 * slab,
                work.token_begin + tile * Shape::kBlockKV, 0, work.entry);
    }
  }
}

// After tile t, (sums, maximum, total) is the softmax state of the split's tokens before tile t; tile t's weights wait.
template <class Element, class Shape, bool kMasked>
__device__ __forceinline__ void attend(SharedKVMemory<Shape> memory, const SharedKVForwardParams& params,
                                       const SharedKVWork& work) {
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
  const uint32_t query = memory.query + warpgroup * Shape::kWarpgroupQueryBytes;
  const float scale_log2 = params.scale_log2;
  // Tokens that have not been weighed.
  int left = work.token_end - work.token_begin;
  ForwardRows<Element, Shape> rows;
  rows.clear();
  const auto weigh = [&](int stage) {
    if constexpr (kMasked) {
      rows.hide_masked(memory.visible(stage, 0));
    } else if (left < Shape::kBlockKV) {
      rows.hide_past(left);
    }
    left -= Shape::kBlockKV;
    rows.softmax(scale_log2);
  };
  wait(memory.query_full(), 0);
  if (left > 0) {
    Turn<Shape::kStages> turn;
    wait(memory.full(0), 0);
    fence_products();
    rows.start_scores(query, memory.tokens(0));
    wait_products<0>();
    pin(rows.scores);
    weigh(0);
    rows.round_weights();
    while (left > 0) {
      const int before = turn.stage;
      turn.next();
      wait(memory.full(turn.stage), turn.parity);
      fence_products();
      rows.start_scores(query, memory.tokens(turn.stage));
      rows.start_sums(memory.tokens(before));
      wait_products<1>();
      pin(rows.scores);
      weigh(turn.stage);
      wait_products<0>();
      rows.pin_sums();
      arrive_if(threadIdx.x % 32 == 0, memory.empty(before));
      rows.rescale_sums();
      rows.round_weights();
    }
    fence_products();
    rows.start_sums(memory.tokens(turn.stage));
    wait_products<0>();
    rows.pin_sums();
  }
  store_state(rows, params, work, warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4, 0, true);
}

template <class Element, class Shape, bool kMasked>
__global__ void __launch_bounds__(kBlockThreads, 1)
    shared_kv_fwd_kernel(const __grid_constant__ SharedKVMaps maps, const __grid_constant__ SharedKVForwardParams params) {
  extern __shared__ unsigned char shared[];
  const SharedKVMemory<Shape> memory(shared);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.tokens);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      init_barrier(memory.full(stage), kMasked ? 2 : 1);
      init_barrier(memory.empty(stage), kConsumers * kWarpgroup / 32);
    }
    init_barrier(memory.query_full(), 1);
    publish_barriers();
  }
  __syncthreads();
  const SharedKVWork work = SharedKVWork::of<Shape>(params);
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      load_queries_and_tokens<Shape>(memory, maps, work);
    } else if (kMasked && threadIdx.x / 32 == 1) {
      load_visibility<Shape>(memory, params, work);
    }
  } else {
    take_registers<kConsumerRegisters>();
    attend<Element, Shape, kMasked>(memory, params, work);
  }
}

}  // namespace perceiver
