// The gradient of shared-KV attention's tokens on sm_90a: with p = exp(scale q x^T - lse) and ds = p (dz x^T - delta),
// dx = p^T dz + scale ds^T q. Tokens are rows of the products, query rows are columns.
//
// Work: items of (128 tokens, batch entry); blocks stay on their multiprocessors and take items in turn. A block holds its
// tokens and walks all query rows, in tiles of kBlockQ. Threads: a producer warpgroup, whose first warp copies tokens and tiles
// of q and dz ahead (TMA) and the second one writes lse and delta beside them; two consumer warpgroups of 64 tokens each, whose
// sums of all columns stay in registers. Shared memory: 2 (128 C + 2 kStages kBlockQ C) bytes. While weights are computed
// dz x^T is in flight, and while ds is, p^T dz.
//
// FLOPs 8 B R M C. Device memory: x and dx once; q and dz a tile of tokens, which the L2 holds.
#pragma once

#include <type_traits>

#include "kernels/backward_columns.cuh"
#include "kernels/row_statistics.cuh"
#include "kernels/shared_kv_enqueue.h"
#include "kernels/tile_products.cuh"
#include "perceiver/device/barrier.cuh"
#include "perceiver/device/tma.cuh"

namespace perceiver {

// Tiles of kBlockQ query rows, which 64 tokens of a warpgroup are multiplied with.
template <int kColumns_, int kBlockQ_, int kStages_, bool kNarrowTail_ = false>
struct SharedKVTokenGradientShape : TileShape<kColumns_, kBlockQ_, kNarrowTail_> {
  using Tile = TileShape<kColumns_, kBlockQ_, kNarrowTail_>;
  static constexpr int kBlockQ = kBlockQ_, kStages = kStages_;
  static constexpr int kStageBytes = 2 * Tile::kTilePitch + 2 * kBlockQ * sizeof(float) + 2 * sizeof(uint64_t);
  static constexpr int kSharedBytes = 1024 + Tile::kQueryBytes + kStages * kStageBytes + 2 * sizeof(uint64_t);
};

// The block's shared memory; tiles start on 1,024 bytes, which their swizzle counts from.
template <class Shape>
struct TokenGradientMemory {
  uint32_t base;

  __device__ explicit TokenGradientMemory(unsigned char* shared) : base((shared_address(shared) + 1023) & ~1023u) {}

  __device__ __forceinline__ uint32_t tokens(int warpgroup) const { return base + warpgroup * Shape::kWarpgroupQueryBytes; }
  __device__ __forceinline__ uint32_t queries(int stage) const { return tokens(kConsumers) + stage * Shape::kTilePitch; }
  __device__ __forceinline__ uint32_t dz(int stage) const { return queries(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t lse(int stage) const { return queries(2 * Shape::kStages) + stage * 8 * Shape::kBlockQ; }
  __device__ __forceinline__ uint32_t delta(int stage) const { return lse(stage) + 4 * Shape::kBlockQ; }
  __device__ __forceinline__ uint32_t full(int stage) const { return lse(Shape::kStages) + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t tokens_full() const { return full(2 * Shape::kStages); }
  __device__ __forceinline__ uint32_t tokens_empty() const { return full(2 * Shape::kStages + 1); }
};

// One item of work; it has no tiles where none of its tokens counts.
struct TokenGradientWork {
  int entry, token, token_end, tiles;

  template <class Shape>
  __device__ __forceinline__ static TokenGradientWork of(const SharedKVBackwardParams& params, int item) {
    const int token_blocks = (params.tokens + kSharedKVGradientBlockKV - 1) / kSharedKVGradientBlockKV;
    TokenGradientWork work;
    work.entry = item / token_blocks;
    work.token = item % token_blocks * kSharedKVGradientBlockKV;
    work.token_end = params.tokens;
    if (params.lengths != nullptr) work.token_end = min(work.token_end, params.lengths[work.entry]);
    work.tiles = work.token < work.token_end ? (params.rows + Shape::kBlockQ - 1) / Shape::kBlockQ : 0;
    return work;
  }

  __device__ __forceinline__ static int items(const SharedKVBackwardParams& params) {
    return (params.tokens + kSharedKVGradientBlockKV - 1) / kSharedKVGradientBlockKV * params.batch;
  }
};

template <class Shape>
__device__ __forceinline__ void load_item_tokens(TokenGradientMemory<Shape> memory, const SharedKVBackwardMaps& maps,
                                                 const TokenGradientWork& work) {
  arrive_expecting(memory.tokens_full(), Shape::kQueryBytes);
  for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(memory.tokens(warpgroup) + slab * Shape::kQuerySlabBytes,
                slab < Shape::kFullSlabs ? maps.tokens : maps.tokens_tail, memory.tokens_full(), 64 * slab,
                work.token + 64 * warpgroup, 0, work.entry);
    }
  }
}

// The first tile of query rows goes before the tokens: its place is free while those of the last item are still read.
template <class Shape>
__device__ __forceinline__ void load_rows_and_tokens(TokenGradientMemory<Shape> memory, const SharedKVBackwardMaps& maps,
                                                     const SharedKVBackwardParams& params) {
  const int items = TokenGradientWork::items(params);
  Turn<Shape::kStages> turn;
  uint32_t tokens_parity = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const auto work = TokenGradientWork::of<Shape>(params, item);
    for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
      wait(memory.empty(turn.stage), turn.parity ^ 1);
      arrive_expecting(memory.full(turn.stage), 2 * Shape::kTileBytes);
      for (int slab = 0; slab < Shape::kSlabs; ++slab) {
        const bool narrow = Shape::kNarrowTail && slab == Shape::kFullSlabs;
        const int offset = slab * Shape::kSlabBytes, row = tile * Shape::kBlockQ;
        load_tile(memory.queries(turn.stage) + offset, narrow ? maps.query_tail : maps.query, memory.full(turn.stage),
                  64 * slab, row, 0, work.entry);
        load_tile(memory.dz(turn.stage) + offset, narrow ? maps.dz_tail : maps.dz, memory.full(turn.stage), 64 * slab, row, 0,
                  work.entry);
      }
      if (tile > 0) continue;
      wait(memory.tokens_empty(), tokens_parity ^ 1);
      tokens_parity ^= 1;
      load_item_tokens(memory, maps, work);
    }
  }
}

// lse in powers of two and scale delta of every tile, by one warp.
template <class Shape>
__device__ __forceinline__ void load_statistics(TokenGradientMemory<Shape> memory, const SharedKVBackwardParams& params) {
  const int items = TokenGradientWork::items(params), lane = threadIdx.x % 32;
  Turn<Shape::kStages> turn;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const auto work = TokenGradientWork::of<Shape>(params, item);
    for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
      wait(memory.empty(turn.stage), turn.parity ^ 1);
#pragma unroll 1
      for (int in_tile = lane; in_tile < Shape::kBlockQ; in_tile += 32) {
        const int row = tile * Shape::kBlockQ + in_tile;
        const RowStatistics of_row(params, work.entry, row);
        store_shared(memory.lse(turn.stage) + 4 * in_tile, __float_as_uint(of_row.lse));
        store_shared(memory.delta(turn.stage) + 4 * in_tile, __float_as_uint(params.scale * of_row.delta));
      }
      // Every lane for what it wrote.
      arrive(memory.full(turn.stage));
    }
  }
}

// Two tokens of one thread: weights and ds of a tile of query rows, and the sums of dx.
template <class Element, class Shape>
struct TokenGradientRows : RowSums<Element, Shape> {
  float scores[Shape::kBlockQ / 2], dweights[Shape::kBlockQ / 2];
  uint32_t weights[Shape::kBlockQ / 16][4], dscores[Shape::kBlockQ / 16][4];

  // Sums of a token that is not visible, which may be no numbers, are replaced.
  __device__ __forceinline__ void hide_sums(const bool (&visible)[2]) {
    this->visit_sums([&](auto& sums, int) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(sums) / sizeof(float)); ++i) sums[i] = visible[i / 2 % 2] ? sums[i] : 0.0f;
    });
  }
};

template <class Element, class Shape>
__device__ __forceinline__ void store_dx(TokenGradientRows<Element, Shape>& rows, const SharedKVBackwardParams& params,
                                         const TokenGradientWork& work, int token) {
  const auto* gMask = static_cast<const unsigned char*>(params.key_mask);
  const int64_t flat_token = int64_t{work.entry} * params.tokens + token;
  const float one[2] = {1.0f, 1.0f};
  bool exists[2], visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    exists[half] = token + 8 * half < params.tokens;
    visible[half] = token + 8 * half < work.token_end;
    if (visible[half] && gMask != nullptr) visible[half] = gMask[flat_token + 8 * half] != 0;
  }
  rows.hide_sums(visible);
  rows.store(static_cast<Element*>(params.dx) + flat_token * params.channels, params.channels, one, exists);
}

// At the start of a step, the scores of its tile of query rows wait.
template <class Element, class Shape>
__device__ __forceinline__ void differentiate_tokens(TokenGradientMemory<Shape> memory, const SharedKVBackwardParams& params) {
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
  const bool leads = threadIdx.x % 32 == 0;
  const int token_in_item = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
  const uint32_t tokens = memory.tokens(warpgroup), all[2] = {~0u, ~0u};
  const int items = TokenGradientWork::items(params);
  uint32_t tokens_parity = 0;
  Turn<Shape::kStages> turn;
  TokenGradientRows<Element, Shape> rows;
  const auto step = [&](auto ends) {
    constexpr bool kLast = decltype(ends)::value;
    const int now = turn.stage;
    turn.next();
    fence_products();
    start_scores<Element, Shape>(rows.dweights, tokens, memory.dz(now));
    weigh_columns<Element>(rows.scores, rows.weights, memory.lse(now), params.scale_log2);
    fence_products();
    rows.start_sums(rows.weights, memory.dz(now));
    wait_products<1>();
    pin(rows.dweights);
    if constexpr (kLast) arrive_if(leads, memory.tokens_empty());
    differentiate_columns<Element, true>(rows.dweights, rows.weights, rows.dscores, memory.delta(now), params.scale, all);
    fence_products();
    rows.start_sums(rows.dscores, memory.queries(now));
    if constexpr (!kLast) {
      wait(memory.full(turn.stage), turn.parity);
      // Registers of the weights are free for the scores: p^T dz is done long before ds^T q.
      wait_products<1>();
      fence_products();
      start_scores<Element, Shape>(rows.scores, tokens, memory.queries(turn.stage));
    }
    wait_products<kLast ? 0 : 1>();
    rows.pin_sums();
    // Every thread for the statistics that it read.
    arrive(memory.empty(now));
    if constexpr (!kLast) {
      wait_products<0>();
      pin(rows.scores);
    }
  };
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const auto work = TokenGradientWork::of<Shape>(params, item);
    rows.clear_sums();
    if (work.tiles > 0) {
      wait(memory.tokens_full(), tokens_parity);
      tokens_parity ^= 1;
      wait(memory.full(turn.stage), turn.parity);
      fence_products();
      start_scores<Element, Shape>(rows.scores, tokens, memory.queries(turn.stage));
      wait_products<0>();
      pin(rows.scores);
      for (int left = work.tiles; left > 1; --left) step(std::false_type{});
      step(std::true_type{});
    }
    store_dx(rows, params, work, work.token + token_in_item);
  }
}

template <class Element, class Shape>
__global__ void __launch_bounds__(kBlockThreads, 1)
    shared_kv_bwd_dx_kernel(const __grid_constant__ SharedKVBackwardMaps maps,
                            const __grid_constant__ SharedKVBackwardParams params) {
  extern __shared__ unsigned char shared[];
  const TokenGradientMemory<Shape> memory(shared);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.dz);
    prefetch_map(maps.tokens);
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      init_barrier(memory.full(stage), 1 + 32);
      init_barrier(memory.empty(stage), kConsumers * kWarpgroup);
    }
    init_barrier(memory.tokens_full(), 1);
    init_barrier(memory.tokens_empty(), kConsumerWarps);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      load_rows_and_tokens<Shape>(memory, maps, params);
    } else if (threadIdx.x / 32 == 1) {
      load_statistics<Shape>(memory, params);
    }
  } else {
    take_registers<kConsumerRegisters>();
    differentiate_tokens<Element, Shape>(memory, params);
  }
}

}  // namespace perceiver
