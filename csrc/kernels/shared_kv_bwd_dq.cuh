// The gradient of shared-KV attention's queries on sm_90a: with p = exp(scale q x^T - lse) and ds = p (dz x^T - delta),
// dq = scale ds x. One tile of x in shared memory serves all three products.
//
// Work: one block per (128 query rows, split of the tokens, batch entry), row blocks fastest. Threads: a producer warpgroup
// that copies tiles of kBlockKV tokens ahead (TMA) and two consumer warpgroups of 64 rows each, whose sums of all columns stay
// in registers. Shared memory: 2 (256 C + kStages kBlockKV 64 slabs) bytes. The product ds x of tile t is in flight while
// those of tile t + 1 are started, and dz x^T while its weights are computed.
//
// FLOPs 6 B R M C. Device memory: x once while row blocks share it through the L2, and 4 B S R C bytes of partial sums.
#pragma once

#include "kernels/row_statistics.cuh"
#include "kernels/shared_kv_tiles.cuh"

namespace perceiver {

// Two rows of one thread: weights and ds of a tile, and the sums of dq.
template <class Element, class Shape>
struct QueryGradientRows : RowSums<Element, Shape> {
  float scores[Shape::kBlockKV / 2], dweights[Shape::kBlockKV / 2];
  uint32_t dscores[Shape::kBlockKV / 16][4];
  RowStatistics statistics[2];

  __device__ __forceinline__ QueryGradientRows(const SharedKVBackwardParams& params, int entry, int row)
      : statistics{RowStatistics(params, entry, row), RowStatistics(params, entry, row + 8)} {
    this->clear_sums();
  }

  // scores become weights; none is above 1, not even that of a masked token, which is zeros and whose ds only has to be
  // finite.
  __device__ __forceinline__ void weigh(float scale_log2) {
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; ++i) {
      scores[i] = exp2_approx(fminf(fmaf(scores[i], scale_log2, -statistics[i / 2 % 2].lse), 0.0f));
    }
  }

  __device__ __forceinline__ void differentiate() {
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; i += 2) {
      const float delta = statistics[i / 2 % 2].delta;
      dscores[i / 8][i / 2 % 4] =
          packed_pair<Element>(scores[i] * (dweights[i] - delta), scores[i + 1] * (dweights[i + 1] - delta));
    }
  }
};

template <class Element, class Shape>
__device__ __forceinline__ void store_dq(QueryGradientRows<Element, Shape>& rows, const SharedKVBackwardParams& params,
                                         const SharedKVWork& work, int row) {
  const int64_t flat_row = (int64_t{work.entry} * params.splits + work.split) * params.rows + row;
  const bool exists[2] = {row < params.rows, row + 8 < params.rows};
  const float scale[2] = {params.dq_scale, params.dq_scale};
  const int64_t offset = flat_row * params.channels;
  if (params.dq_out_type == static_cast<int32_t>(ElementType::kFloat32)) {
    rows.store(static_cast<float*>(params.dq_out) + offset, params.channels, scale, exists);
  } else {
    rows.store(static_cast<Element*>(params.dq_out) + offset, params.channels, scale, exists);
  }
}

// At the start of a step, the sums hold ds x of the tiles before the last one; the last one's ds waits.
template <class Element, class Shape>
__device__ __forceinline__ void differentiate_queries(SharedKVMemory<Shape> memory, const SharedKVBackwardParams& params,
                                                      const SharedKVWork& work) {
  // Where rows are narrow, both products of the next tile follow that of the last one; else dz x^T waits for the scores, and
  // takes the place of its ds.
  constexpr bool kTogether = Shape::kColumns <= 128;
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
  const uint32_t query = memory.rows(0, warpgroup), dz = memory.rows(1, warpgroup);
  const int row = work.row + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
  const float scale_log2 = params.scale_log2;
  // Tokens that have not been weighed.
  int left = work.token_end - work.token_begin;
  QueryGradientRows<Element, Shape> rows(params, work.entry, row);
  const auto weigh = [&] {
    rows.weigh(scale_log2);
    // Behind the weights: where the branch is, ptxas does not move them past the wait for dz x^T.
    if (left < Shape::kBlockKV) hide_past(rows.scores, left, 0.0f);
    left -= Shape::kBlockKV;
  };
  wait(memory.query_full(), 0);
  if (left > 0) {
    Turn<Shape::kStages> turn;
    wait(memory.full(0), 0);
    fence_products();
    start_scores<Element, Shape>(rows.scores, query, memory.tokens(0));
    start_scores<Element, Shape>(rows.dweights, dz, memory.tokens(0));
    wait_products<1>();
    pin(rows.scores);
    weigh();
    wait_products<0>();
    pin(rows.dweights);
    rows.differentiate();
    while (left > 0) {
      const int before = turn.stage;
      turn.next();
      fence_products();
      rows.start_sums(rows.dscores, memory.tokens(before));
      wait(memory.full(turn.stage), turn.parity);
      fence_products();
      start_scores<Element, Shape>(rows.scores, query, memory.tokens(turn.stage));
      if constexpr (kTogether) start_scores<Element, Shape>(rows.dweights, dz, memory.tokens(turn.stage));
      wait_products<kTogether ? 2 : 1>();
      rows.pin_sums();
      arrive_if(threadIdx.x % 32 == 0, memory.empty(before));
      wait_products<kTogether ? 1 : 0>();
      pin(rows.scores);
      if constexpr (!kTogether) {
        fence_products();
        start_scores<Element, Shape>(rows.dweights, dz, memory.tokens(turn.stage));
      }
      weigh();
      wait_products<0>();
      pin(rows.dweights);
      rows.differentiate();
    }
    fence_products();
    rows.start_sums(rows.dscores, memory.tokens(turn.stage));
    wait_products<0>();
    rows.pin_sums();
  }
  store_dq(rows, params, work, row);
}

template <class Element, class Shape>
__global__ void __launch_bounds__(kBlockThreads, 1)
    shared_kv_bwd_dq_kernel(const __grid_constant__ SharedKVBackwardMaps maps,
                            const __grid_constant__ SharedKVBackwardParams params) {
  extern __shared__ unsigned char shared[];
  const SharedKVMemory<Shape> memory(shared);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.dz);
    prefetch_map(maps.tokens);
    init_barriers(memory, 1);
  }
  __syncthreads();
  const SharedKVWork work = SharedKVWork::of<Shape>(params);
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      arrive_expecting(memory.query_full(), 2 * Shape::kQueryBytes);
      load_rows(memory, 0, maps.query, maps.query_tail, work);
      load_rows(memory, 1, maps.dz, maps.dz_tail, work);
      load_tokens(memory, maps.tokens, maps.tokens_tail, work);
    }
  } else {
    take_registers<kConsumerRegisters>();
    differentiate_queries<Element, Shape>(memory, params, work);
  }
}

}  // namespace perceiver
