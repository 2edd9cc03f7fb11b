// Attention backward on sm_90a, for heads of up to kColumns channels: with p = exp(scale q k^T - lse) and
// ds = p (dout v^T - delta), dv = p^T dout, dk = scale ds^T q, dq = scale ds k.
//
// Work: items of (split of the keys, slice of the queries, head of keys, batch entry); blocks stay on their multiprocessors
// and take items in turn. A block walks the tiles of 128 keys of an item and for each of them all queries of the heads that
// read it, in blocks of kBlockQ. dk and dv are sums in registers; dq of every step is staged in shared memory, from where the
// copy engine adds it to the item's own part in device memory, one tile after the other: the same bits every time. The last
// tile of all keys takes the part up and leaves dq. Threads: a producer warpgroup, whose first warp copies queries and the
// second one keys; two consumer warpgroups of 64 keys each, which exchange ds in shared memory. While the weights of a block
// are computed dout v^T is in flight, and while ds is, p^T dout.
//
// FLOPs 10 B H Lq Lk d. Device memory: keys, values and their gradients once; queries, dout and 8 B H Lq d bytes of dq per
// tile of keys, which the L2 holds where there are few.
#pragma once

#include <type_traits>

#include "kernels/backward_rows.cuh"
#include "perceiver/device/barrier.cuh"
#include "perceiver/device/tma.cuh"

namespace perceiver {

// The block's shared memory: tiles, which start on 1,024 bytes, of two stages but for the values; rows of lse and delta;
// barriers.
template <class Shape>
struct BackwardMemory {
  uint32_t base;

  __device__ explicit BackwardMemory(unsigned char* shared) : base((shared_address(shared) + 1023) & ~1023u) {}

  __device__ __forceinline__ uint32_t keys(int stage) const { return base + stage * Shape::kKeyBytes; }
  __device__ __forceinline__ uint32_t values() const { return keys(Shape::kStages); }
  __device__ __forceinline__ uint32_t queries(int stage) const {
    return values() + Shape::kKeyBytes + stage * Shape::kQueryBytes;
  }
  __device__ __forceinline__ uint32_t douts(int stage) const { return queries(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t scores(int stage) const {
    return queries(2 * Shape::kStages) + stage * Shape::kScoreBytes;
  }
  __device__ __forceinline__ uint32_t out(int warpgroup) const { return scores(Shape::kStages) + warpgroup * Shape::kOutBytes; }
  __device__ __forceinline__ uint32_t lse(int stage) const { return out(kConsumers) + stage * Shape::kRowBytes; }
  __device__ __forceinline__ uint32_t delta(int stage) const { return lse(stage) + Shape::kRowBytes / 2; }
  __device__ __forceinline__ uint32_t barrier(int index) const { return lse(Shape::kStages) + 8 * index; }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return barrier(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t queries_full(int stage) const { return barrier(2 * Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t queries_empty(int stage) const { return barrier(3 * Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t balanced() const { return barrier(Shape::kBarriers); }
  __device__ __forceinline__ uint32_t values_full() const { return barrier(4 * Shape::kStages); }
  __device__ __forceinline__ uint32_t values_empty() const { return barrier(4 * Shape::kStages + 1); }
};

// Tiles of keys of all heads, shared out to blocks side by side: block b has those from b total / blocks on.
struct KeyTiles {
  uint32_t of_head, total, blocks;

  __device__ __forceinline__ explicit KeyTiles(const AttentionBackwardParams& params)
      : of_head(params.balanced_tiles), total(params.all_tiles), blocks(params.blocks) {}

  __device__ __forceinline__ uint32_t first_of(uint32_t block) const { return block * total / blocks; }
  __device__ __forceinline__ uint32_t block_of(uint32_t tile) const { return ((tile + 1) * blocks - 1) / total; }
};

// One item of work. Heads that read one head of keys lie side by side, and so do their blocks of queries.
struct BackwardWork {
  int split, key_head, entry, key_begin, key_end, first_head, block_begin, blocks;

  // What keep_balanced leaves of each of two items.
  static constexpr int kWords = 5;

  // A block's tiles are of one head or two, and fewer than a head has: the second item may be empty. By one thread, whose
  // registers do: those of a producer do not.
  __device__ static void keep_balanced(const AttentionBackwardParams& params, uint32_t balanced) {
    const KeyTiles tiles(params);
    const uint32_t key_heads = params.heads / params.heads_per_key_head, begin = tiles.first_of(blockIdx.x);
    for (uint32_t line = begin / tiles.of_head, item = 0; item < 2; ++line, ++item, balanced += kWords * 4) {
      const uint32_t first = line * tiles.of_head, end = min(tiles.first_of(blockIdx.x + 1), first + tiles.of_head);
      const int key_end = end <= first ? 0 : static_cast<int>(end - first) * kAttentionBackwardBlockKV;
      store_shared(balanced, blockIdx.x - tiles.block_of(first));
      store_shared(balanced + 4, line % key_heads);
      store_shared(balanced + 8, line / key_heads);
      store_shared(balanced + 12, (max(begin, first) - first) * kAttentionBackwardBlockKV);
      store_shared(balanced + 16, static_cast<uint32_t>(min(key_end, params.keys)));
    }
  }

  __device__ __forceinline__ static BackwardWork of(const AttentionBackwardParams& params, int item, uint32_t balanced) {
    const int key_heads = params.heads / params.heads_per_key_head;
    BackwardWork work;
    if (params.balanced_tiles > 0) {
      const uint32_t kept = balanced + (item >= static_cast<int>(gridDim.x) ? kWords * 4 : 0);
      work.split = load_shared(kept);
      work.key_head = load_shared(kept + 4);
      work.entry = load_shared(kept + 8);
      work.key_begin = load_shared(kept + 12);
      work.key_end = load_shared(kept + 16);
      work.block_begin = 0;
      work.blocks = params.query_blocks;
      work.first_head = work.key_head * params.heads_per_key_head;
      return work;
    }
    work.split = item % params.splits;
    item /= params.splits;
    work.block_begin = item % params.slices * blocks_per_slice(params);
    item /= params.slices;
    work.blocks = min(blocks_per_slice(params), params.query_blocks - work.block_begin);
    work.key_head = item % key_heads;
    work.entry = item / key_heads;
    work.key_begin = work.split * params.keys_per_split;
    work.key_end = min(work.key_begin + params.keys_per_split, params.keys);
    work.first_head = work.key_head * params.heads_per_key_head;
    return work;
  }

  __device__ __forceinline__ static int blocks_per_slice(const AttentionBackwardParams& params) {
    return (params.query_blocks + params.slices - 1) / params.slices;
  }

  // Blocks of queries before this item's first one.
  __device__ __forceinline__ int first_block(const AttentionBackwardParams& params) const {
    return (entry * params.heads + first_head) * params.query_blocks + block_begin;
  }
};

// After the last tile a stage is reported full without one: consumers start the products of one block more.
template <class Shape>
__device__ __forceinline__ void load_keys(BackwardMemory<Shape> memory, const AttentionBackwardMaps& maps,
                                          const AttentionBackwardParams& params) {
  const uint64_t policy = evict_first();
  const auto load_tokens = [&](uint32_t tile, const CUtensorMap& map, uint32_t full, uint32_t empty, uint32_t parity, int key,
                               const BackwardWork& work) {
    wait(empty, parity ^ 1);
    arrive_expecting(full, Shape::kKeyBytes);
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(tile + slab * Shape::kKeySlabBytes, map, full, 64 * slab, key, work.key_head, work.entry, policy);
    }
  };
  Turn<Shape::kStages> turn;
  uint32_t value_parity = 0;
  for (int item = blockIdx.x; item < params.items; item += gridDim.x) {
    const BackwardWork work = BackwardWork::of(params, item, memory.balanced());
    for (int key = work.key_begin; key < work.key_end; key += Shape::kBlockKV, turn.next(), value_parity ^= 1) {
      load_tokens(memory.keys(turn.stage), maps.key, memory.keys_full(turn.stage), memory.keys_empty(turn.stage), turn.parity,
                  key, work);
      load_tokens(memory.values(), maps.value, memory.values_full(), memory.values_empty(), value_parity, key, work);
    }
  }
  wait(memory.keys_empty(turn.stage), turn.parity ^ 1);
  arrive(memory.keys_full(turn.stage));
}

template <class Shape>
__device__ __forceinline__ void load_queries(BackwardMemory<Shape> memory, const AttentionBackwardMaps& maps,
                                             const AttentionBackwardParams& params) {
  Turn<Shape::kStages> turn;
  for (int item = blockIdx.x; item < params.items; item += gridDim.x) {
    const BackwardWork work = BackwardWork::of(params, item, memory.balanced());
    const int heads_end = work.first_head + params.heads_per_key_head, end = work.block_begin + work.blocks;
    for (int tiles = (work.key_end - work.key_begin + Shape::kBlockKV - 1) / Shape::kBlockKV; tiles > 0; --tiles) {
      int flat_block = work.first_block(params);
      for (int head = work.first_head; head < heads_end; ++head) {
        for (int block = work.block_begin; block < end; ++block, turn.next(), ++flat_block) {
          const uint32_t full = memory.queries_full(turn.stage);
          wait(memory.queries_empty(turn.stage), turn.parity ^ 1);
          arrive_expecting(full, 2 * Shape::kQueryBytes + Shape::kRowBytes);
#pragma unroll 1
          for (int slab = 0; slab < Shape::kSlabs; ++slab) {
            const int offset = slab * Shape::kQuerySlabBytes, row = block * Shape::kBlockQ;
            load_tile(memory.queries(turn.stage) + offset, maps.query, full, 64 * slab, row, head, work.entry);
            load_tile(memory.douts(turn.stage) + offset, maps.dout, full, 64 * slab, row, head, work.entry);
          }
          load_run(memory.lse(turn.stage), params.rows + int64_t{flat_block} * (2 * Shape::kBlockQ), Shape::kRowBytes, full);
        }
      }
    }
  }
  wait(memory.queries_empty(turn.stage), turn.parity ^ 1);
  arrive(memory.queries_full(turn.stage));
}

// Named barriers: of both consumers, and of the threads of one.
__device__ __forceinline__ void sync_consumers() { sync_at(1, kConsumers * kWarpgroup); }
__device__ __forceinline__ void sync_warpgroup(int warpgroup) { sync_at(2 + warpgroup, kWarpgroup); }

// What a single tile of keys adds to: a warpgroup's share of zeros.
static __device__ float no_sums[32 * kWarpgroup];

// dk and dv of one slice of the queries.
template <class Element, class Shape>
__device__ __forceinline__ void store_key_parts(const BackwardRows<Element, Shape>& rows, const AttentionBackwardParams& params,
                                                const BackwardWork& work, int key) {
  const int64_t key_heads = params.heads / params.heads_per_key_head;
  const int64_t gradient_floats = int64_t{params.slices} * params.keys * Shape::kColumns;
  float* gRow = params.key_parts + (work.entry * key_heads + work.key_head) * 2 * gradient_floats +
                (int64_t{work.block_begin / work.blocks_per_slice(params)} * params.keys + key) * Shape::kColumns;
  const bool exists[2] = {key < params.keys, key + 8 < params.keys};
  const float one[2] = {1.0f, 1.0f};
  store_sums(gRow, Shape::kColumns, rows.dv, one, exists, 0, Shape::kColumns);
  store_sums(gRow + gradient_floats, Shape::kColumns, rows.dk, one, exists, 0, Shape::kColumns);
}

// At the start of a step, the scores of its block of queries wait.
template <class Element, class Shape>
__device__ __forceinline__ void differentiate(BackwardMemory<Shape> memory, const AttentionBackwardMaps& maps,
                                              const AttentionBackwardParams& params) {
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32;
  const bool leads = thread == 0;
  const uint32_t first_key = warpgroup * 64 * 128, out = memory.out(warpgroup);
  const int key_in_tile = warpgroup * 64 + thread / 32 * 16 + lane / 4;
  // Of the lane's row in a tile of the warpgroup's keys: matrices are (8 columns, 8 keys), keys first.
  const uint32_t place = (thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8) * 128 + ((lane / 16 ^ lane % 8) << 4);
  const uint32_t dq_scores = Shape::kDqByRows ? warpgroup * Shape::kKeySlabBytes : 0;
  const uint32_t dq_keys = Shape::kDqByRows ? 0 : warpgroup * Shape::kKeySlabBytes;
  const int64_t block_floats = kConsumers * Shape::kDqFloats;
  const int all_blocks = params.batch * params.heads * params.query_blocks;
  uint32_t value_parity = 0;
  BackwardRows<Element, Shape> rows;
  Turn<Shape::kStages> key_turn, turn;
  wait(memory.keys_full(0), 0);
  wait(memory.queries_full(0), 0);
  fence_products();
  rows.start_scores(rows.scores, memory.keys(0) + first_key, memory.queries(0));
  wait_products<0>();
  pin(rows.scores);
  // One tile of keys. The last one of all keys leaves dq itself, not its part.
  const auto differentiate_tile = [&](auto ends, const BackwardWork& work, int key, bool is_first) {
    constexpr bool kEnds = decltype(ends)::value;
    const int keys_left = work.key_end - key - key_in_tile;
    // Of a slice, whose item is this block's alone, the block's own part.
    const int64_t first_block = params.slices > 1 ? static_cast<int>(blockIdx.x) * work.blocks_per_slice(params)
                                                  : int64_t{work.split} * all_blocks + work.first_block(params);
    float* gPart = params.dq_parts + first_block * block_floats + warpgroup * Shape::kDqFloats;
    const int steps = params.heads_per_key_head * work.blocks;
    // The tile before this one, if there was one, lies in the other stage, which the next one takes. It leaves in the first
    // step: where that is the last one too, before it waits for the next tile.
    const bool leaves = leads && !is_first, leaves_early = leaves && steps == 1, leaves_late = leaves && steps > 1;
    for (int step = 0; step < steps; ++step, gPart += block_floats) {
      const bool last = step + 1 == steps;
      const auto now = turn;
      const int keys_now = key_turn.stage;
      turn.next();
      if (last) key_turn.next();
      wait(memory.values_full(), value_parity);
      fence_products();
      rows.start_scores(rows.dweights, memory.values() + first_key, memory.douts(now.stage));
      rows.weigh(memory.lse(now.stage), params.scale_log2);
      fence_products();
      rows.start_sums(rows.dv, rows.weights, memory.douts(now.stage), step > 0);
      wait_products<1>();
      pin(rows.dweights);
      arrive_if(last && lane == 0, memory.values_empty());
      rows.differentiate(memory.delta(now.stage), keys_left);
#pragma unroll
      for (int i = 0; i < Shape::kBlockQ / 16; ++i) {
        share<Shape::kKeySlabBytes>(memory.scores(now.stage) + first_key + place, i, rows.dscores[i]);
      }
      publish_writes();
      if constexpr (kEnds) rows.load_dq((key == work.key_begin ? no_sums : gPart) + 4 * thread);
      fence_products();
      rows.start_sums(rows.dk, rows.dscores, memory.queries(now.stage), step > 0);
      wait_products<1>();
      pin(rows.dv);
      sync_consumers();
      fence_products();
      rows.start_dq(memory.scores(now.stage) + dq_scores, memory.keys(keys_now) + dq_keys, kEnds);
      wait(memory.queries_full(turn.stage), turn.parity);
      wait_stores_if(leaves_early);
      arrive_if(leaves_early, memory.keys_empty(keys_now ^ 1));
      wait(memory.keys_full(key_turn.stage), key_turn.parity);
      fence_products();
      rows.start_scores(rows.scores, memory.keys(key_turn.stage) + first_key, memory.queries(turn.stage));
      // What left the block before: dq of the last step, or dk and dv of the last tile.
      wait_stores_if(leads);
      sync_warpgroup(warpgroup);
      wait_products<1>();
      pin(rows.dq);
      pin(rows.dk);
      // Every thread for the rows of lse and delta that it read.
      arrive(memory.queries_empty(now.stage));
      arrive_if(leaves_late && step == 0, memory.keys_empty(keys_now ^ 1));
      if constexpr (kEnds) {
        share_sums<Element, Shape::kOutSlabBytes>(out + place, rows.dq, params.scale);
        publish_writes();
        sync_warpgroup(warpgroup);
        const int row = (work.block_begin + step % work.blocks) * Shape::kBlockQ + (Shape::kDqByRows ? 64 * warpgroup : 0);
        store_tile_if(leads, maps.dq, out, Shape::kDqByRows ? 0 : 64 * warpgroup, row,
                      work.first_head + step / work.blocks, work.entry);
      } else {
        rows.share_dq(out + 16 * thread);
        publish_writes();
        sync_warpgroup(warpgroup);
        store_or_add_run_if(leads, gPart, out, Shape::kOutBytes, key == work.key_begin);
      }
      wait_products<0>();
      pin(rows.scores);
    }
    value_parity ^= 1;
    if (params.slices > 1) return store_key_parts(rows, params, work, key + key_in_tile);
    // Over the keys, of which the other warpgroup's last dq read all, and over the last dq.
    const uint32_t keys = memory.keys(key_turn.stage ^ 1) + first_key;
    sync_consumers();
    share_sums<Element, Shape::kKeySlabBytes>(keys + place, rows.dk, params.scale);
    wait_stores_if(leads);
    sync_warpgroup(warpgroup);
    share_sums<Element, Shape::kOutSlabBytes>(out + place, rows.dv, 1.0f);
    publish_writes();
    sync_warpgroup(warpgroup);
    if (leads) {
      const uint64_t policy = evict_first();
      for (int slab = 0; slab < Shape::kSlabs; ++slab) {
        const int row = key + 64 * warpgroup;
        store_tile(maps.dk, keys + slab * Shape::kKeySlabBytes, 64 * slab, row, work.key_head, work.entry, policy);
        store_tile(maps.dv, out + slab * Shape::kOutSlabBytes, 64 * slab, row, work.key_head, work.entry, policy);
      }
      commit_stores();
    }
  };
  for (int item = blockIdx.x; item < params.items; item += gridDim.x) {
    const BackwardWork work = BackwardWork::of(params, item, memory.balanced());
    for (int key = work.key_begin; key < work.key_end; key += Shape::kBlockKV) {
      const bool is_first = key == work.key_begin && item == static_cast<int>(blockIdx.x);
      if (params.splits == 1 && key + Shape::kBlockKV >= params.keys) {
        differentiate_tile(std::true_type{}, work, key, is_first);
      } else {
        differentiate_tile(std::false_type{}, work, key, is_first);
      }
    }
  }
  wait_stores_if(leads);
}

template <class Element, class Shape>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_bwd_kernel(const __grid_constant__ AttentionBackwardMaps maps,
                         const __grid_constant__ AttentionBackwardParams params) {
  extern __shared__ unsigned char shared[];
  const BackwardMemory<Shape> memory(shared);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.key);
    prefetch_map(maps.value);
    prefetch_map(maps.dout);
    if (params.balanced_tiles > 0) BackwardWork::keep_balanced(params, memory.balanced());
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      init_barrier(memory.keys_full(stage), 1);
      init_barrier(memory.keys_empty(stage), kConsumers);
      init_barrier(memory.queries_full(stage), 1);
      init_barrier(memory.queries_empty(stage), kConsumers * kWarpgroup);
    }
    init_barrier(memory.values_full(), 1);
    init_barrier(memory.values_empty(), kConsumerWarps);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) load_queries<Shape>(memory, maps, params);
    if (threadIdx.x == 32) load_keys<Shape>(memory, maps, params);
  } else {
    take_registers<kConsumerRegisters>();
    differentiate<Element, Shape>(memory, maps, params);
  }
}

}  // namespace perceiver
