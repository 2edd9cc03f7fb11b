// Attention forward, out = softmax(scale q k^T) v, on sm_90a, for heads of up to kColumns channels.
//
// Work: items of (128 query rows, split of the keys, head, batch entry), row blocks fastest; blocks stay on their
// multiprocessors and take items in turn, so that the next item's tiles are copied while this one ends. Threads: a producer
// warpgroup that copies tiles of kBlockKV keys and values ahead (TMA), two consumer warpgroups of 64 rows. Shared memory:
// 2 (128 kQueryStages d + 2 kStages kBlockKV d) bytes. While the softmax of tile t runs, p v of tile t - 1 is in flight; with
// two stages of queries, the next item's first q k^T is while an item's results leave.
//
// FLOPs 4 B H Lq Lk d. Device memory: every operand once while programs that share it run together, and 4 B H S Lq (d + 1)
// bytes of partial states.
#pragma once

#include "kernels/attention_enqueue.h"
#include "kernels/forward_rows.cuh"
#include "perceiver/device/barrier.cuh"
#include "perceiver/device/tma.cuh"

namespace perceiver {

static_assert(kAttentionBlockQ == 64 * kConsumers, "a warpgroup owns 64 rows");

// With kTakeTurns one warpgroup starts its products while the other one weighs.
template <int kColumns_, int kBlockKV_, int kStages_, int kQueryStages_, bool kTakeTurns_>
struct AttentionShape : TileShape<kColumns_, kBlockKV_> {
  using Tile = TileShape<kColumns_, kBlockKV_>;
  static_assert(Tile::kTail == 0, "heads are whole slabs");
  static constexpr int kStages = kStages_;
  static constexpr bool kTakeTurns = kTakeTurns_;
  static constexpr int kQueryStages = kQueryStages_;
  static constexpr int kBarriers = 4 * kStages + 2 * kQueryStages;
  static constexpr int kSharedBytes = 1024 + kQueryStages * Tile::kQueryBytes + kBarriers * sizeof(uint64_t) +
                                      kStages * 2 * Tile::kTileBytes;
};

// The block's shared memory: queries, keys, values, barriers. Tiles start on 1,024 bytes, which their swizzle
// counts from.
template <class Shape>
struct AttentionMemory {
  uint32_t query;

  __device__ explicit AttentionMemory(unsigned char* shared) : query((shared_address(shared) + 1023) & ~1023u) {}

  __device__ __forceinline__ uint32_t keys(int stage) const {
    return query + Shape::kQueryStages * Shape::kQueryBytes + stage * Shape::kTileBytes;
  }
  __device__ __forceinline__ uint32_t values(int stage) const { return keys(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t barrier(int index) const { return keys(2 * Shape::kStages) + 8 * index; }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return barrier(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t values_full(int stage) const { return barrier(2 * Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t values_empty(int stage) const { return barrier(3 * Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t query_full(int stage) const { return barrier(4 * Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t query_empty(int stage) const { return query_full(Shape::kQueryStages + stage); }
};

// One item of work.
struct AttentionWork {
  int row, split, head, entry, key_begin, key_end;

  __device__ __forceinline__ static AttentionWork of(const AttentionForwardParams& params, int item) {
    const int row_blocks = (params.queries + kAttentionBlockQ - 1) / kAttentionBlockQ;
    AttentionWork work;
    work.row = item % row_blocks * kAttentionBlockQ;
    item /= row_blocks;
    work.split = item % params.splits;
    item /= params.splits;
    work.head = item % params.heads;
    work.entry = item / params.heads;
    work.key_begin = work.split * params.keys_per_split;
    work.key_end = min(work.key_begin + params.keys_per_split, params.keys);
    return work;
  }
};

template <class Shape>
__device__ __forceinline__ void load_heads(AttentionMemory<Shape> memory, const AttentionMaps& maps,
                                           const AttentionForwardParams& params) {
  const auto load_tokens = [](uint32_t tile, const CUtensorMap& map, uint32_t full, uint32_t empty, uint32_t parity, int key,
                              int head, int entry) {
    wait(empty, parity ^ 1);
    arrive_expecting(full, Shape::kTileBytes);
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(tile + slab * Shape::kSlabBytes, map, full, 64 * slab, key, head, entry);
    }
  };
  Turn<Shape::kStages> turn;
  Turn<Shape::kQueryStages> queries;
  for (int item = blockIdx.x; item < params.items; item += gridDim.x) {
    const AttentionWork work = AttentionWork::of(params, item);
    wait(memory.query_empty(queries.stage), queries.parity ^ 1);
    const uint32_t full = memory.query_full(queries.stage), query = memory.query + queries.stage * Shape::kQueryBytes;
    queries.next();
    arrive_expecting(full, Shape::kQueryBytes);
    for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
      for (int slab = 0; slab < Shape::kSlabs; ++slab) {
        load_tile(query + warpgroup * Shape::kWarpgroupQueryBytes + slab * Shape::kQuerySlabBytes, maps.query,
                  full, 64 * slab, work.row + 64 * warpgroup, work.head, work.entry);
      }
    }
    const int key_head = work.head / params.heads_per_key_head;
    for (int key = work.key_begin; key < work.key_end; key += Shape::kBlockKV, turn.next()) {
      load_tokens(memory.keys(turn.stage), maps.key, memory.keys_full(turn.stage), memory.keys_empty(turn.stage), turn.parity,
                  key, key_head, work.entry);
      load_tokens(memory.values(turn.stage), maps.value, memory.values_full(turn.stage), memory.values_empty(turn.stage),
                  turn.parity, key, key_head, work.entry);
    }
  }
}

template <class Element, class Shape>
__device__ __forceinline__ void store_heads(ForwardRows<Element, Shape>& rows, const AttentionForwardParams& params,
                                            const AttentionWork& work, int row_in_block) {
  const int row = work.row + row_in_block;
  const int64_t flat_row =
      ((int64_t{work.entry} * params.heads + work.head) * params.splits + work.split) * params.queries + row;
  const bool exists[2] = {row < params.queries, row + 8 < params.queries};
  float inverse[2], lse[2];
  finish_totals(rows, inverse, lse);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (threadIdx.x % 4 == 0 && exists[half]) params.lse_out[flat_row + 8 * half] = lse[half];
  }
  const int64_t offset = work.entry * params.stride_out_batch + work.head * params.stride_out_head +
                         work.split * params.stride_out_split + row * params.stride_out_row;
  if (params.out_type == static_cast<int32_t>(ElementType::kFloat32)) {
    store_sums(static_cast<float*>(params.out) + offset, params.stride_out_row, rows.sums_first, inverse, exists, 0,
               params.channels_v);
  } else {
    store_sums(static_cast<Element*>(params.out) + offset, params.stride_out_row, rows.sums_first, inverse, exists, 0,
               params.channels_v);
  }
}

// After tile t of an item, (sums, maximum, total) is the softmax state of its keys before tile t; tile t's weights wait.
template <class Element, class Shape>
__device__ __forceinline__ void attend(AttentionMemory<Shape> memory, const AttentionForwardParams& params) {
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
  const uint32_t query = memory.query + warpgroup * Shape::kWarpgroupQueryBytes;
  const float scale_log2 = params.scale_log2;
  // Named barriers 1 and 2: the warpgroup's turn, and the other one's.
  const auto take_turn = [&] {
    if constexpr (Shape::kTakeTurns) sync_at(1 + warpgroup, kConsumers * kWarpgroup);
  };
  const auto pass_turn = [&] {
    if constexpr (Shape::kTakeTurns) arrive_at(2 - warpgroup, kConsumers * kWarpgroup);
  };
  if (warpgroup == 1) pass_turn();
  const auto release = [](uint32_t barrier) { arrive_if(threadIdx.x % 32 == 0, barrier); };
  Turn<Shape::kStages> turn;
  Turn<Shape::kQueryStages> queries;
  ForwardRows<Element, Shape> rows;
  const auto wait_first = [&] {
    wait(memory.query_full(queries.stage), queries.parity);
    wait(memory.keys_full(turn.stage), turn.parity);
  };
  const auto start_keys = [&] {
    start_scores<Element, Shape>(rows.scores, query + queries.stage * Shape::kQueryBytes, memory.keys(turn.stage));
  };
  // The first scores of an item.
  const auto begin = [&] {
    wait_first();
    take_turn();
    fence_products();
    start_keys();
    pass_turn();
    wait_products<0>();
    pin(rows.scores);
  };
  for (int item = blockIdx.x; item < params.items; item += gridDim.x) {
    const AttentionWork work = AttentionWork::of(params, item);
    // With two stages of queries, the item before began this one.
    if (Shape::kQueryStages == 1 || item == static_cast<int>(blockIdx.x)) begin();
    // Keys that have not been weighed.
    int left = work.key_end - work.key_begin;
    const auto weigh = [&](int stage) {
      if (left < Shape::kBlockKV) hide_past(rows.scores, left);
      left -= Shape::kBlockKV;
      release(memory.keys_empty(stage));
      rows.softmax(scale_log2);
    };
    Turn<Shape::kStages> before = turn;
    const bool idles = work.row + 64 * warpgroup >= params.queries;
    if (idles) {
      // No row of the item is this warpgroup's: it lets its tiles pass.
      for (; left > Shape::kBlockKV; left -= Shape::kBlockKV, before = turn) {
        release(memory.keys_empty(turn.stage));
        turn.next();
        wait(memory.values_full(before.stage), before.parity);
        release(memory.values_empty(before.stage));
        wait(memory.keys_full(turn.stage), turn.parity);
        take_turn();
        pass_turn();
      }
      release(memory.keys_empty(turn.stage));
    } else {
      rows.clear();
      weigh(turn.stage);
      rows.round_weights();
    }
    turn.next();
    while (left > 0 && !idles) {
      // Values that were copied before these keys: a wait between the two products would serialize them.
      wait(memory.values_full(before.stage), before.parity);
      wait(memory.keys_full(turn.stage), turn.parity);
      take_turn();
      fence_products();
      start_keys();
      rows.start_sums(rows.weights, memory.values(before.stage));
      pass_turn();
      wait_products<1>();
      pin(rows.scores);
      weigh(turn.stage);
      wait_products<0>();
      rows.pin_sums();
      release(memory.values_empty(before.stage));
      rows.rescale_sums();
      rows.round_weights();
      before = turn;
      turn.next();
    }
    release(memory.query_empty(queries.stage));
    queries.next();
    wait(memory.values_full(before.stage), before.parity);
    if constexpr (Shape::kQueryStages == 1) {
      fence_products();
      rows.start_sums(rows.weights, memory.values(before.stage));
      wait_products<0>();
    } else {
      if (item + static_cast<int>(gridDim.x) < params.items) wait_first();
      take_turn();
      fence_products();
      rows.start_sums(rows.weights, memory.values(before.stage));
      // Of the last item, scores of what lies there, which nothing reads.
      start_keys();
      pass_turn();
      wait_products<1>();
    }
    rows.pin_sums();
    release(memory.values_empty(before.stage));
    if (!idles) store_heads(rows, params, work, warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4);
    if constexpr (Shape::kQueryStages > 1) {
      wait_products<0>();
      pin(rows.scores);
    }
  }
  if (warpgroup == 0) take_turn();
}

template <class Element, class Shape>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_fwd_kernel(const __grid_constant__ AttentionMaps maps, const __grid_constant__ AttentionForwardParams params) {
  extern __shared__ unsigned char shared[];
  const AttentionMemory<Shape> memory(shared);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.key);
    prefetch_map(maps.value);
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      init_barrier(memory.keys_full(stage), 1);
      init_barrier(memory.keys_empty(stage), kConsumerWarps);
      init_barrier(memory.values_full(stage), 1);
      init_barrier(memory.values_empty(stage), kConsumerWarps);
    }
    for (int stage = 0; stage < Shape::kQueryStages; ++stage) {
      init_barrier(memory.query_full(stage), 1);
      init_barrier(memory.query_empty(stage), kConsumerWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) load_heads<Shape>(memory, maps, params);
  } else {
    take_registers<kConsumerRegisters>();
    attend<Element, Shape>(memory, params);
  }
}

}  // namespace perceiver
