// Shared-KV attention forward, z = softmax(scale q x^T) x, on sm_90a: one tile of x in shared memory serves both products.
//
// Work: one block per (128 query rows, split of the tokens, batch entry), row blocks fastest. Threads: a producer warpgroup
// that copies tiles of kBlockKV tokens ahead (TMA) and two consumer warpgroups of 64 rows each, whose accumulators of all
// columns stay in registers. Shared memory: 2 (128 C + kStages kBlockKV 64 slabs) bytes. While the softmax of tile t runs, the
// products q x^T of tile t + 1 and p x of tile t - 1 are in flight.
//
// FLOPs 4 B R M C. Device memory: x once while row blocks share it through the L2, and 4 B S R (C + 1) bytes of partial states.
#pragma once

#include "kernels/shared_kv_state.cuh"
#include "kernels/shared_kv_tiles.cuh"

namespace perceiver {

// After tile t, (sums, maximum, total) is the softmax state of the split's tokens before tile t; tile t's weights wait.
template <class Element, class Shape, bool kMasked>
__device__ __forceinline__ void attend(SharedKVMemory<Shape> memory, const SharedKVForwardParams& params,
                                       const SharedKVWork& work) {
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
  const uint32_t query = memory.rows(0, warpgroup);
  const float scale_log2 = params.scale_log2;
  // Tokens that have not been weighed.
  int left = work.token_end - work.token_begin;
  ForwardRows<Element, Shape> rows;
  rows.clear();
  const auto weigh = [&](int stage) {
    if constexpr (kMasked) {
      rows.hide_masked(memory.visible(stage, 0));
    } else if (left < Shape::kBlockKV) {
      hide_past(rows.scores, left);
    }
    left -= Shape::kBlockKV;
    rows.softmax(scale_log2);
  };
  wait(memory.query_full(), 0);
  if (left > 0) {
    Turn<Shape::kStages> turn;
    wait(memory.full(0), 0);
    fence_products();
    start_scores<Element, Shape>(rows.scores, query, memory.tokens(0));
    wait_products<0>();
    pin(rows.scores);
    weigh(0);
    rows.round_weights();
    while (left > 0) {
      const int before = turn.stage;
      turn.next();
      wait(memory.full(turn.stage), turn.parity);
      fence_products();
      start_scores<Element, Shape>(rows.scores, query, memory.tokens(turn.stage));
      rows.start_sums(rows.weights, memory.tokens(before));
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
    rows.start_sums(rows.weights, memory.tokens(turn.stage));
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
    init_barriers(memory, kMasked ? 2 : 1);
  }
  __syncthreads();
  const SharedKVWork work = SharedKVWork::of<Shape>(params);
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      arrive_expecting(memory.query_full(), Shape::kQueryBytes);
      load_rows(memory, 0, maps.query, maps.query_tail, work);
      load_tokens(memory, maps.tokens, maps.tokens, work);
    } else if (kMasked && threadIdx.x / 32 == 1) {
      load_visibility<Shape>(memory, params, work);
    }
  } else {
    take_registers<kConsumerRegisters>();
    attend<Element, Shape, kMasked>(memory, params, work);
  }
}

}  // namespace perceiver
