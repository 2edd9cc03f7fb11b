// Shared-KV attention forward, z = softmax(scale q x^T) x, on sm_90a: one tile of x in shared memory serves both products.
//
// Work: one block per (128 query rows, split of the tokens, batch entry), row blocks fastest. Threads: a producer warpgroup
// that copies tiles of kBlockKV tokens ahead (TMA) and two consumer warpgroups of 64 rows each, whose accumulators of all
// columns stay in registers. Shared memory: 2 (128 C + kStages kBlockKV 64 slabs) bytes. While the softmax of tile t runs, the
// products q x^T of tile t + 1 and p x of tile t - 1 are in flight.
//
// FLOPs 4 B R M C. Device memory: x once while row blocks share it through the L2, and 4 B S R (C + 1) bytes of partial states.
#pragma once

#include "kernels/shared_kv_enqueue.h"
#include "perceiver/device/barrier.cuh"
#include "perceiver/device/element.cuh"
#include "perceiver/device/tma.cuh"
#include "perceiver/device/wgmma.cuh"

namespace perceiver {

constexpr int kWarpgroup = 128;
constexpr int kSharedKVConsumers = 2;
constexpr int kSharedKVThreads = (1 + kSharedKVConsumers) * kWarpgroup;
static_assert(kSharedKVBlockQ == 64 * kSharedKVConsumers, "a warpgroup owns 64 rows");
// Registers of a thread after the warpgroups have shared them out: (24 + 2 x 240) x 128 of 65,536.
#define PK_PRODUCER_REGISTERS "24"
#define PK_CONSUMER_REGISTERS "240"
// A row's maximum is raised only when scores outgrow it by 2^8: weights stay below 2^8, and the division at the end is exact.
constexpr float kRescaleAbove = 8.0f;

// Rows of kColumns columns lie as slabs of 64 columns; a last piece of 16 columns is the front of one more slab.
template <int kColumns_, int kBlockKV_, int kStages_>
struct SharedKVShape {
  static constexpr int kColumns = kColumns_, kBlockKV = kBlockKV_, kStages = kStages_;
  static constexpr int kFullSlabs = kColumns / 64, kTail = kColumns % 64;
  static constexpr int kSlabs = kFullSlabs + (kTail > 0 ? 1 : 0);
  static_assert(kTail == 0 || kTail == 16, "a tail is one step of a product");
  static_assert(kBlockKV % 16 == 0 && kBlockKV <= 128, "weights are taken 16 tokens at a time, masks 32 in four words");
  // The columns of the sums: two products where one of at most 256 columns does not do.
  static constexpr int kFirst = kTail > 0 ? 64 * (kFullSlabs - 1) : kColumns, kSecond = kColumns - kFirst;
  // The queries of a warpgroup: slabs of 64 rows of 128 bytes, and their tail, 64 rows of 32.
  static constexpr int kQuerySlabBytes = 64 * 128;
  static constexpr int kWarpgroupQueryBytes = kFullSlabs * kQuerySlabBytes + 64 * 2 * kTail;
  static constexpr int kQueryBytes = kSharedKVConsumers * kWarpgroupQueryBytes;
  static constexpr int kTokenSlabBytes = kBlockKV * 128;
  static constexpr int kStageBytes = kSlabs * kTokenSlabBytes;
  static constexpr int kMaskWords = (kBlockKV + 31) / 32;
  static constexpr int kSharedBytes =
      1024 + kQueryBytes + kStages * (kStageBytes + 2 * sizeof(uint64_t) + kMaskWords * sizeof(uint32_t)) + sizeof(uint64_t);
};

// The block's shared memory; tiles start on 1,024 bytes, which their swizzle counts from. One address is kept, the others are
// sums.
template <class Shape>
struct SharedKVMemory {
  uint32_t query;

  __device__ explicit SharedKVMemory(unsigned char* shared) : query((shared_address(shared) + 1023) & ~1023u) {}

  __device__ __forceinline__ uint32_t tokens(int stage) const {
    return query + Shape::kQueryBytes + stage * Shape::kStageBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return tokens(Shape::kStages) + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(Shape::kStages + stage); }
  __device__ __forceinline__ uint32_t query_full() const { return full(2 * Shape::kStages); }
  // A word of the visibility of a stage's tokens.
  __device__ __forceinline__ uint32_t visible(int stage, int word) const {
    return full(2 * Shape::kStages + 1) + 4 * (stage * Shape::kMaskWords + word);
  }
};

// The stage of a tile and how often it was used before, modulo 2.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The block's share of the work.
struct SharedKVWork {
  int row, split, entry, token_begin, token_end, tiles;

  template <class Shape>
  __device__ static SharedKVWork of(const SharedKVForwardParams& params) {
    const int row_blocks = (params.rows + kSharedKVBlockQ - 1) / kSharedKVBlockQ;
    SharedKVWork work;
    work.row = static_cast<int>(blockIdx.x) % row_blocks * kSharedKVBlockQ;
    const int rest = static_cast<int>(blockIdx.x) / row_blocks;
    work.split = rest % params.splits;
    work.entry = rest / params.splits;
    work.token_begin = work.split * params.tokens_per_split;
    work.token_end = min(work.token_begin + params.tokens_per_split, params.tokens);
    if (params.lengths != nullptr) work.token_end = min(work.token_end, params.lengths[work.entry]);
    work.tiles = max(0, (work.token_end - work.token_begin + Shape::kBlockKV - 1) / Shape::kBlockKV);
    return work;
  }
};

template <class Shape>
__device__ __forceinline__ void load_queries_and_tokens(SharedKVMemory<Shape> memory, const SharedKVMaps& maps,
                                                        const SharedKVWork& work) {
  arrive_expecting(memory.query_full(), Shape::kQueryBytes);
  for (int warpgroup = 0; warpgroup < kSharedKVConsumers; ++warpgroup) {
    const uint32_t query = memory.query + warpgroup * Shape::kWarpgroupQueryBytes;
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(query + slab * Shape::kQuerySlabBytes, slab < Shape::kFullSlabs ? maps.query : maps.query_tail,
                memory.query_full(), 64 * slab, work.row + 64 * warpgroup, work.entry);
    }
  }
  Turn<Shape::kStages> turn;
  for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
    wait(memory.empty(turn.stage), turn.parity ^ 1);
    arrive_expecting(memory.full(turn.stage), Shape::kStageBytes);
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
      load_tile(memory.tokens(turn.stage) + slab * Shape::kTokenSlabBytes, maps.tokens, memory.full(turn.stage), 64 * slab,
                work.token_begin + tile * Shape::kBlockKV, work.entry);
    }
  }
}

// One bit a token of every tile, by one warp: set where it is visible and inside the split.
template <class Shape>
__device__ __forceinline__ void load_visibility(SharedKVMemory<Shape> memory, const SharedKVForwardParams& params,
                                                const SharedKVWork& work) {
  const int lane = threadIdx.x % 32;
  const auto* gMask = static_cast<const unsigned char*>(params.key_mask) + int64_t{work.entry} * params.tokens;
  Turn<Shape::kStages> turn;
  for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
    wait(memory.empty(turn.stage), turn.parity ^ 1);
#pragma unroll
    for (int word = 0; word < Shape::kMaskWords; ++word) {
      const int in_tile = 32 * word + lane, token = work.token_begin + tile * Shape::kBlockKV + in_tile;
      const bool exists = in_tile < Shape::kBlockKV && token < work.token_end;
      const uint32_t visible = __ballot_sync(0xffffffffu, exists && gMask[token] != 0);
      if (lane == 0) store_shared(memory.visible(turn.stage, word), visible);
    }
    if (lane == 0) arrive(memory.full(turn.stage));
  }
}

// Two rows of one thread: scores and weights of a tile, and the softmax state. Maxima are in powers of two.
template <class Element, class Shape>
struct SharedKVRows {
  float sums_first[Shape::kFirst / 2];
  float sums_second[Shape::kSecond > 0 ? Shape::kSecond / 2 : 1];
  float scores[Shape::kBlockKV / 2];
  uint32_t weights[Shape::kBlockKV / 16][4];
  float maximum[2], total[2], factor[2];
  bool rescaled;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& sum : sums_first) sum = 0.0f;
#pragma unroll
    for (float& sum : sums_second) sum = 0.0f;
    maximum[0] = maximum[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }

  // Starts scores = q x^T for the tile at `tokens`.
  __device__ __forceinline__ void start_scores(uint32_t query, uint32_t tokens) {
    using Scores = Product<Element, Shape::kBlockKV>;
    // Addresses of every step, kept through the loop, spill where rows are widest: there they are sums each time.
    if constexpr (Shape::kSlabs > 5) asm volatile("" : "+r"(query));
    const OperandTile<16, 1024, Swizzle::k128Bytes> a(query), b(tokens);
    const OperandTile<16, 256, Swizzle::k32Bytes> a_tail(query);
#pragma unroll
    for (int slab = 0; slab < Shape::kFullSlabs; ++slab) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Scores::template add<false>(scores, a.at(slab * Shape::kQuerySlabBytes + 32 * step),
                                    b.at(slab * Shape::kTokenSlabBytes + 32 * step), slab + step > 0);
      }
    }
    if constexpr (Shape::kTail > 0) {
      Scores::template add<false>(scores, a_tail.at(Shape::kFullSlabs * Shape::kQuerySlabBytes),
                                  b.at(Shape::kFullSlabs * Shape::kTokenSlabBytes));
    }
    commit_products();
  }

  // Starts sums += weights x for the tile at `tokens`.
  __device__ __forceinline__ void start_sums(uint32_t tokens) {
    const OperandTile<Shape::kTokenSlabBytes, 1024, Swizzle::k128Bytes> b(tokens);
#pragma unroll
    for (int step = 0; step < Shape::kBlockKV / 16; ++step) {
      Product<Element, Shape::kFirst>::template add<true>(sums_first, weights[step], b.at(2048 * step));
      if constexpr (Shape::kSecond > 0) {
        Product<Element, Shape::kSecond>::template add<true>(
            sums_second, weights[step], b.at(2048 * step + Shape::kFirst / 64 * Shape::kTokenSlabBytes));
      }
    }
    commit_products();
  }

  __device__ __forceinline__ void pin_sums() {
    pin(sums_first);
    if constexpr (Shape::kSecond > 0) pin(sums_second);
  }

  // The token of the tile that score i belongs to.
  __device__ __forceinline__ static int token_of(int i) { return 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2; }

  __device__ __forceinline__ void hide_past(int count) {
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; ++i) {
      if (token_of(i) >= count) scores[i] = -INFINITY;
    }
  }

  __device__ __forceinline__ void hide_masked(SharedKVMemory<Shape> memory, int stage) {
#pragma unroll
    for (int word = 0; word < Shape::kMaskWords; ++word) {
      const uint32_t bits = load_shared(memory.visible(stage, word)) >> 2 * (threadIdx.x % 4);
#pragma unroll
      for (int i = 16 * word; i < min(16 * word + 16, Shape::kBlockKV / 2); ++i) {
        if (!(bits >> (8 * (i / 4 % 4) + i % 2) & 1)) scores[i] = -INFINITY;
      }
    }
  }

  // scores become weights relative to the maxima; `factor` brings older sums to maxima that were raised.
  __device__ __forceinline__ void softmax(float scale_log2) {
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
    bool outgrown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 1));
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 2)) * scale_log2;
      outgrown |= largest[half] > maximum[half] + kRescaleAbove;
    }
    rescaled = __any_sync(0xffffffffu, outgrown);
    float safe[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (rescaled) {
        const float raised = fmaxf(maximum[half], largest[half]);
        // A row that has seen nothing yet is at -inf, and so is its new maximum where the tile is hidden from it.
        factor[half] = maximum[half] == -INFINITY ? 0.0f : exp2_approx(maximum[half] - raised);
        maximum[half] = raised;
        total[half] *= factor[half];
      }
      safe[half] = maximum[half] == -INFINITY ? 0.0f : maximum[half];
    }
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 2; ++i) {
      const int half = i / 2 % 2;
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -safe[half]));
      total[half] += scores[i];
    }
  }

  __device__ __forceinline__ void rescale_sums() {
    if (!rescaled) return;
#pragma unroll
    for (int i = 0; i < Shape::kFirst / 2; ++i) sums_first[i] *= factor[i / 2 % 2];
    if constexpr (Shape::kSecond > 0) {
#pragma unroll
      for (int i = 0; i < Shape::kSecond / 2; ++i) sums_second[i] *= factor[i / 2 % 2];
    }
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < Shape::kBlockKV / 4; ++i) {
      weights[i / 4][i % 4] = packed_pair<Element>(scores[2 * i], scores[2 * i + 1]);
    }
  }
};

// Writes columns first.. of the two rows, divided by their totals, as Out.
template <class Out, int kCount>
__device__ __forceinline__ void store_sums(Out* gRow, int64_t row_pitch, const float (&sums)[kCount], const float (&inverse)[2],
                                           const bool (&exists)[2], int first, int channels) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int half = i % 2, column = first + 8 * (i / 2) + 2 * (threadIdx.x % 4);
    if (exists[half] && column < channels) {
      store_pair(gRow + half * 8 * row_pitch + column, sums[2 * i] * inverse[half], sums[2 * i + 1] * inverse[half]);
    }
  }
}

template <class Element, class Shape>
__device__ __forceinline__ void store_state(SharedKVRows<Element, Shape>& rows, const SharedKVForwardParams& params,
                                            const SharedKVWork& work, int row_in_block) {
  const int row = work.row + row_in_block;
  const int64_t flat_row = (int64_t{work.entry} * params.splits + work.split) * params.rows + row;
  const bool exists[2] = {row < params.rows, row + 8 < params.rows};
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& total = rows.total[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    // A row that saw nothing has total 0: its z and rho are 0, its lse is -inf.
    inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
    if (threadIdx.x % 4 == 0 && exists[half]) {
      params.lse_out[flat_row + 8 * half] = (rows.maximum[half] + log2f(total)) * 0.69314718055994530942f;
      if (params.rho_out != nullptr) params.rho_out[flat_row + 8 * half] = total == 0.0f ? 0.0f : 1.0f;
    }
  }
  const int64_t offset = flat_row * params.channels;
  const auto store = [&](auto* gRow) {
    store_sums(gRow, params.channels, rows.sums_first, inverse, exists, 0, params.channels);
    if constexpr (Shape::kSecond > 0) {
      store_sums(gRow, params.channels, rows.sums_second, inverse, exists, Shape::kFirst, params.channels);
    }
  };
  if (params.z_out_type == static_cast<int32_t>(ElementType::kFloat32)) {
    store(static_cast<float*>(params.z_out) + offset);
  } else {
    store(static_cast<Element*>(params.z_out) + offset);
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
  SharedKVRows<Element, Shape> rows;
  rows.clear();
  const auto weigh = [&](int stage) {
    if constexpr (kMasked) {
      rows.hide_masked(memory, stage);
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
      if (threadIdx.x % 32 == 0) arrive(memory.empty(before));
      rows.rescale_sums();
      rows.round_weights();
    }
    fence_products();
    rows.start_sums(memory.tokens(turn.stage));
    wait_products<0>();
    rows.pin_sums();
  }
  store_state(rows, params, work, warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4);
}

template <class Element, class Shape, bool kMasked>
__global__ void __launch_bounds__(kSharedKVThreads, 1)
    shared_kv_fwd_kernel(const __grid_constant__ SharedKVMaps maps, const __grid_constant__ SharedKVForwardParams params) {
  extern __shared__ unsigned char shared[];
  const SharedKVMemory<Shape> memory(shared);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.tokens);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      init_barrier(memory.full(stage), kMasked ? 2 : 1);
      init_barrier(memory.empty(stage), kSharedKVConsumers * kWarpgroup / 32);
    }
    init_barrier(memory.query_full(), 1);
    publish_barriers();
  }
  __syncthreads();
  const SharedKVWork work = SharedKVWork::of<Shape>(params);
  if (threadIdx.x < kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 " PK_PRODUCER_REGISTERS ";");
    if (threadIdx.x == 0) {
      load_queries_and_tokens<Shape>(memory, maps, work);
    } else if (kMasked && threadIdx.x / 32 == 1) {
      load_visibility<Shape>(memory, params, work);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 " PK_CONSUMER_REGISTERS ";");
    attend<Element, Shape, kMasked>(memory, params, work);
  }
}

}  // namespace perceiver
