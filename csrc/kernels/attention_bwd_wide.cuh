// Attention backward on sm_90a, for heads of up to 256 channels: dq by query blocks, which leaves weights p and their
// gradients ds in a workspace, then dv = p^T dout and dk = scale ds^T q as products over it. Five products, none computed
// twice.
//
// Work of dq: items of (128 query rows, split of a chunk's keys, head, batch entry). Threads: a producer warpgroup, two
// consumers of 64 rows. Queries and dout stay in shared memory, tiles of 64 keys stream: keys in two stages, values in one. dq
// is a sum in registers; it is taken up from its part where the chunk is not the first.
//
// The workspace holds tiles of 64 rows x 64 keys as they lie in shared memory (rows of 128 bytes, swizzled), 8 KiB each, first
// p and then ds: bulk copies bring them as operands of the products.
#pragma once

#include "kernels/attention_enqueue.h"
#include "kernels/warpgroups.cuh"
#include "perceiver/device/barrier.cuh"
#include "perceiver/device/element.cuh"
#include "perceiver/device/shared.cuh"
#include "perceiver/device/tma.cuh"
#include "perceiver/device/wgmma.cuh"

namespace perceiver {

struct WideShape {
  static constexpr int kColumns = 256, kSlabs = 4, kBlockQ = 128, kBlockKV = 64;
  static constexpr int kRowSlabBytes = 64 * 128;  // 64 rows of 64 columns: of queries and of keys
  static constexpr int kRowBytes = kSlabs * kRowSlabBytes;
  static constexpr int kKeyStages = 2;
  static constexpr int kBarriers = 2 * kKeyStages + 2 + 2;
  static constexpr int kSharedBytes = 1024 + (2 * kConsumers + kKeyStages + 1) * kRowBytes + 8 * kBarriers;
  static constexpr int kTileBytes = 64 * 128;
};
// Rows of a block of attention_bwd_rows_kernel.
constexpr int kRowsBlock = attention_bwd_block_q(WideShape::kColumns);
static_assert(WideShape::kSharedBytes <= 232448);

struct WideMemory {
  uint32_t base;

  __device__ explicit WideMemory(unsigned char* shared) : base((shared_address(shared) + 1023) & ~1023u) {}

  __device__ __forceinline__ uint32_t rows(int index) const { return base + index * WideShape::kRowBytes; }
  __device__ __forceinline__ uint32_t query(int warpgroup) const { return rows(warpgroup); }
  __device__ __forceinline__ uint32_t dout(int warpgroup) const { return rows(kConsumers + warpgroup); }
  __device__ __forceinline__ uint32_t keys(int stage) const { return rows(2 * kConsumers + stage); }
  __device__ __forceinline__ uint32_t values() const { return keys(WideShape::kKeyStages); }
  __device__ __forceinline__ uint32_t barrier(int index) const {
    return rows(2 * kConsumers + WideShape::kKeyStages + 1) + 8 * index;
  }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return barrier(WideShape::kKeyStages + stage); }
  __device__ __forceinline__ uint32_t values_full() const { return barrier(2 * WideShape::kKeyStages); }
  __device__ __forceinline__ uint32_t values_empty() const { return barrier(2 * WideShape::kKeyStages + 1); }
  __device__ __forceinline__ uint32_t query_full() const { return barrier(2 * WideShape::kKeyStages + 2); }
  __device__ __forceinline__ uint32_t query_empty() const { return barrier(2 * WideShape::kKeyStages + 3); }
};

// What is computed at a time: all rows and some keys, or some rows and all keys.
struct WideChunk {
  int row_begin, row_end, row_blocks, key_begin, key_end, key_tiles, splits, keys_per_split, items, product_items;
  int slices, strips_per_slice;
  // From p to ds.
  int64_t ds_bytes;
  // Whether dq, dk and dv are added to what earlier chunks left.
  bool continues_rows, continues_keys;
};

// One item of work.
struct WideWork {
  int row, split, head, entry, key_begin, key_end;

  __device__ __forceinline__ static WideWork of(const AttentionBackwardParams& params, const WideChunk& chunk, int item) {
    WideWork work;
    work.row = chunk.row_begin + item % chunk.row_blocks * WideShape::kBlockQ;
    item /= chunk.row_blocks;
    work.split = item % chunk.splits;
    item /= chunk.splits;
    work.head = item % params.heads;
    work.entry = item / params.heads;
    work.key_begin = chunk.key_begin + work.split * chunk.keys_per_split;
    work.key_end = min(work.key_begin + chunk.keys_per_split, chunk.key_end);
    return work;
  }
};

__device__ __forceinline__ void load_rows(uint32_t tile, const CUtensorMap& map, uint32_t full, int row, int head, int entry) {
  for (int slab = 0; slab < WideShape::kSlabs; ++slab) {
    load_tile(tile + slab * WideShape::kRowSlabBytes, map, full, 64 * slab, row, head, entry);
  }
}

__device__ __forceinline__ void load_wide(WideMemory memory, const AttentionBackwardMaps& maps,
                                          const AttentionBackwardParams& params, const WideChunk& chunk) {
  Turn<WideShape::kKeyStages> turn;
  uint32_t value_parity = 0, query_parity = 0;
  for (int item = blockIdx.x; item < chunk.items; item += gridDim.x, query_parity ^= 1) {
    const WideWork work = WideWork::of(params, chunk, item);
    wait(memory.query_empty(), query_parity ^ 1);
    arrive_expecting(memory.query_full(), 2 * kConsumers * WideShape::kRowBytes);
    for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
      const int row = work.row + 64 * warpgroup;
      load_rows(memory.query(warpgroup), maps.query, memory.query_full(), row, work.head, work.entry);
      load_rows(memory.dout(warpgroup), maps.dout, memory.query_full(), row, work.head, work.entry);
    }
    const int key_head = work.head / params.heads_per_key_head;
    for (int key = work.key_begin; key < work.key_end; key += WideShape::kBlockKV, turn.next(), value_parity ^= 1) {
      wait(memory.keys_empty(turn.stage), turn.parity ^ 1);
      arrive_expecting(memory.keys_full(turn.stage), WideShape::kRowBytes);
      load_rows(memory.keys(turn.stage), maps.key, memory.keys_full(turn.stage), key, key_head, work.entry);
      wait(memory.values_empty(), value_parity ^ 1);
      arrive_expecting(memory.values_full(), WideShape::kRowBytes);
      load_rows(memory.values(), maps.value, memory.values_full(), key, key_head, work.entry);
    }
  }
}

// Adds what an earlier chunk left in a thread's two rows.
template <int kCount>
__device__ __forceinline__ void add_sums(float (&sums)[kCount], const float* gRow, const bool (&exists)[2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int half = i % 2, column = 8 * (i / 2) + 2 * (threadIdx.x % 4);
    if (!exists[half]) continue;
    const float2 pair = *reinterpret_cast<const float2*>(gRow + half * 8 * WideShape::kColumns + column);
    sums[2 * i] += pair.x;
    sums[2 * i + 1] += pair.y;
  }
}

// 64 query rows in the registers of a warpgroup: a thread has two of them.
template <class Element>
struct WideRows {
  float dq[WideShape::kColumns / 2];
  float scores[WideShape::kBlockKV / 2], dweights[WideShape::kBlockKV / 2];
  uint32_t weights[WideShape::kBlockKV / 16][4];

  __device__ __forceinline__ static void start_scores(float (&sums)[WideShape::kBlockKV / 2], uint32_t rows, uint32_t tokens) {
    const OperandTile<16, 1024, Swizzle::k128Bytes> a(rows), b(tokens);
#pragma unroll
    for (int slab = 0; slab < WideShape::kSlabs; ++slab) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int at = slab * WideShape::kRowSlabBytes + 32 * step;
        Product<Element, WideShape::kBlockKV>::template add<false>(sums, a.at(at), b.at(at), slab + step > 0);
      }
    }
    commit_products();
  }

  // Starts dq (+)= ds k, with ds in `weights`.
  __device__ __forceinline__ void start_dq(uint32_t keys, bool accumulate) {
    const OperandTile<WideShape::kRowSlabBytes, 1024, Swizzle::k128Bytes> b(keys);
#pragma unroll
    for (int step = 0; step < WideShape::kBlockKV / 16; ++step) {
      Product<Element, WideShape::kColumns>::template add<true>(dq, weights[step], b.at(2048 * step), accumulate || step > 0);
    }
    commit_products();
  }

  // scores become weights; those of keys that do not exist, 0.
  __device__ __forceinline__ void weigh(float scale_log2, const float (&lse)[2], int keys_left) {
    const bool whole = keys_left >= WideShape::kBlockKV;
#pragma unroll
    for (int i = 0; i < WideShape::kBlockKV / 2; ++i) {
      const int token = 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2;
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -lse[i / 2 % 2]));
      if (!whole && token >= keys_left) scores[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void round(const float (&values)[WideShape::kBlockKV / 2]) {
#pragma unroll
    for (int i = 0; i < WideShape::kBlockKV / 4; ++i) {
      weights[i / 4][i % 4] = packed_pair<Element>(values[2 * i], values[2 * i + 1]);
    }
  }

  // Writes the rounded values as a tile: four threads hold 16 bytes of a row between them, and each writes those of one unit
  // in four. `gRow` is the thread's first row.
  __device__ __forceinline__ void store_tile_rows(unsigned char* gRow) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < WideShape::kBlockKV / 8; block += 4) {
        uint32_t units[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) units[i] = weights[(block + i) / 2][(block + i) % 2 * 2 + half];
        transpose_quad(units);
        const int unit = block + threadIdx.x % 4, row = threadIdx.x % 32 / 4;
        *reinterpret_cast<uint4*>(gRow + half * 8 * 128 + ((unit ^ row) << 4)) =
            make_uint4(units[0], units[1], units[2], units[3]);
      }
    }
  }
};

template <class Element>
__device__ __forceinline__ void differentiate_wide(WideMemory memory, const AttentionBackwardParams& params,
                                                   const WideChunk& chunk) {
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
  const uint32_t query = memory.query(warpgroup), dout = memory.dout(warpgroup);
  const int row_in_block = 64 * warpgroup + thread / 32 * 16 + thread % 32 / 4;
  Turn<WideShape::kKeyStages> turn;
  uint32_t value_parity = 0, query_parity = 0;
  for (int item = blockIdx.x; item < chunk.items; item += gridDim.x, query_parity ^= 1) {
    const WideWork work = WideWork::of(params, chunk, item);
    WideRows<Element> rows;
    const int row = work.row + row_in_block, flat_head = work.entry * params.heads + work.head;
    const bool exists[2] = {row < chunk.row_end, row + 8 < chunk.row_end};
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 8 * half;
      const float* gRow =
          params.rows + (int64_t{flat_head} * params.query_blocks + at / kRowsBlock) * (2 * kRowsBlock) + at % kRowsBlock;
      lse[half] = exists[half] ? gRow[0] : INFINITY;
      delta[half] = exists[half] ? gRow[kRowsBlock] : 0.0f;
    }
    float* gPart =
        params.dq_parts + ((int64_t{flat_head} * params.splits + work.split) * params.queries + row) * WideShape::kColumns;
    // Tiles of a strip of 64 rows lie side by side, keys fastest.
    const int64_t strip =
        (int64_t{flat_head} * chunk.row_blocks + (work.row - chunk.row_begin) / WideShape::kBlockQ) * kConsumers + warpgroup;
    const int64_t first_tile = strip * chunk.key_tiles + (work.key_begin - chunk.key_begin) / WideShape::kBlockKV;
    unsigned char* gTile = static_cast<unsigned char*>(params.tiles) + first_tile * WideShape::kTileBytes +
                           (thread / 32 * 16 + thread % 32 / 4) * 128;
    wait(memory.query_full(), query_parity);
    wait(memory.keys_full(turn.stage), turn.parity);
    fence_products();
    rows.start_scores(rows.scores, query, memory.keys(turn.stage));
    wait_products<0>();
    pin(rows.scores);
    for (int key = work.key_begin; key < work.key_end; key += WideShape::kBlockKV, gTile += WideShape::kTileBytes) {
      const int stage = turn.stage;
      turn.next();
      wait(memory.values_full(), value_parity);
      value_parity ^= 1;
      fence_products();
      rows.start_scores(rows.dweights, dout, memory.values());
      rows.weigh(params.scale_log2, lse, work.key_end - key);
      rows.round(rows.scores);
      rows.store_tile_rows(gTile);
      wait_products<0>();
      pin(rows.dweights);
      arrive_if(threadIdx.x % 32 == 0, memory.values_empty());
#pragma unroll
      for (int i = 0; i < WideShape::kBlockKV / 2; ++i) {
        rows.dweights[i] = rows.scores[i] * (rows.dweights[i] - delta[i / 2 % 2]);
      }
      rows.round(rows.dweights);
      const bool last = key + WideShape::kBlockKV >= work.key_end;
      if (!last) wait(memory.keys_full(turn.stage), turn.parity);
      fence_products();
      rows.start_dq(memory.keys(stage), key > work.key_begin);
      // Of the last tile, scores of what the other stage holds, which nothing reads.
      rows.start_scores(rows.scores, query, memory.keys(turn.stage));
      rows.store_tile_rows(gTile + chunk.ds_bytes);
      wait_products<1>();
      pin(rows.dq);
      arrive_if(threadIdx.x % 32 == 0, memory.keys_empty(stage));
      wait_products<0>();
      pin(rows.scores);
    }
    arrive_if(threadIdx.x % 32 == 0, memory.query_empty());
    if (chunk.splits == 1 && chunk.key_end - chunk.key_begin == params.keys) {
      const float scale[2] = {params.scale, params.scale};
      store_sums(static_cast<Element*>(params.dq) + work.entry * params.stride_dq_batch + work.head * params.stride_dq_head +
                     row * params.stride_dq_row,
                 params.stride_dq_row, rows.dq, scale, exists, 0, params.channels_qk);
    } else {
      const float one[2] = {1.0f, 1.0f};
      if (chunk.continues_rows) add_sums(rows.dq, gPart, exists);
      store_sums(gPart, WideShape::kColumns, rows.dq, one, exists, 0, WideShape::kColumns);
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_bwd_wide_kernel(const __grid_constant__ AttentionBackwardMaps maps,
                              const __grid_constant__ AttentionBackwardParams params,
                              const __grid_constant__ WideChunk chunk) {
  extern __shared__ unsigned char shared[];
  const WideMemory memory(shared);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
    for (int stage = 0; stage < WideShape::kKeyStages; ++stage) {
      init_barrier(memory.keys_full(stage), 1);
      init_barrier(memory.keys_empty(stage), kConsumerWarps);
    }
    init_barrier(memory.values_full(), 1);
    init_barrier(memory.values_empty(), kConsumerWarps);
    init_barrier(memory.query_full(), 1);
    init_barrier(memory.query_empty(), kConsumerWarps);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) load_wide(memory, maps, params, chunk);
  } else {
    take_registers<kConsumerRegisters>();
    differentiate_wide<Element>(memory, params, chunk);
  }
}

}  // namespace perceiver
