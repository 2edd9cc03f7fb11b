// Shared-KV attention forward, z = softmax(scale q x^T) x, on sm_90a, for rows whose sums fill the registers of two warpgroups.
//
// Work: one block per (64 query rows, split of the tokens, batch entry), row blocks fastest. Threads: a producer warpgroup that
// copies tiles ahead (TMA), and two consumers of the same rows, which halve the columns of the sums. Tiles alternate: a
// consumer computes scores and weights of every other tile, in a buffer of its own, and both add x times the weights, which
// pass through shared memory. Shared memory: 2 (64 C + 2 kBlockKV C) bytes of tiles, 20 KiB that pass between the consumers.
// The softmax of tile t runs beside one consumer's products p x of tile t - 1; the other's run beside q x^T of tile t.
//
// FLOPs 4 B R M C. Device memory: x once while row blocks share it through the L2, which delivers 2 M C bytes for 64 rows; and
// 4 B S R (C + 1) bytes of partial states.
#pragma once

#include "kernels/shared_kv_state.cuh"
#include "perceiver/device/tma.cuh"

namespace perceiver {

// A buffer is filled and released in units of kUnitSlabs slabs: two in each half of the columns, one for each array of sums.
template <int kColumns_, int kBlockKV_>
struct SharedKVWideShape : TileShape<kColumns_, kBlockKV_> {
  using Tile = TileShape<kColumns_, kBlockKV_>;
  static_assert(kColumns_ % 256 == 0, "four units of whole slabs");
  static constexpr int kBlockQ = 64;
  static constexpr bool kConsumersShareRows = true;
  static constexpr int kStages = 2, kUnits = 4, kUnitSlabs = Tile::kSlabs / kUnits;
  static constexpr int kUnitBytes = kUnitSlabs * Tile::kSlabBytes;
  // The columns of the sums of one consumer.
  static constexpr int kFirst = kColumns_ / 4, kSecond = kColumns_ / 4, kHalf = kColumns_ / 2;
  // What a consumer leaves for the other: weights, and two floats a thread, once of maxima and once of totals.
  static constexpr int kSteps = kBlockKV_ / 16, kWeightBytes = kSteps * 16 * kWarpgroup, kPairBytes = 8 * kWarpgroup;
  static constexpr int kPassedBytes = kWeightBytes + 2 * kPairBytes;
  static constexpr int kQueryBytes = Tile::kWarpgroupQueryBytes;
  static constexpr int kBarriers = 2 * kStages * kUnits + 1 + kConsumers + 1;
  static constexpr int kSharedBytes = 1024 + kQueryBytes + kStages * (Tile::kTileBytes + kPassedBytes) +
                                      kBarriers * sizeof(uint64_t) + kStages * Tile::kMaskWords * sizeof(uint32_t);
};

// The block's shared memory; tiles start on 1,024 bytes, which their swizzle counts from. Unit 2 h + i of a tile is piece i of
// half h of the columns.
template <class Shape>
struct SharedKVWideMemory {
  uint32_t query;

  __device__ explicit SharedKVWideMemory(unsigned char* shared) : query((shared_address(shared) + 1023) & ~1023u) {}

  __device__ __forceinline__ uint32_t unit(int stage, int index) const {
    return query + Shape::kQueryBytes + stage * Shape::kTileBytes + index * Shape::kUnitBytes;
  }
  // A thread's place in what `consumer` leaves.
  __device__ __forceinline__ uint32_t weights(int consumer, int step) const {
    return unit(Shape::kStages, 0) + consumer * Shape::kPassedBytes + (step * kWarpgroup + threadIdx.x % kWarpgroup) * 16;
  }
  __device__ __forceinline__ uint32_t maxima(int consumer) const {
    return unit(Shape::kStages, 0) + consumer * Shape::kPassedBytes + Shape::kWeightBytes + threadIdx.x % kWarpgroup * 8;
  }
  __device__ __forceinline__ uint32_t totals(int consumer) const { return maxima(consumer) + Shape::kPairBytes; }
  __device__ __forceinline__ uint32_t barrier(int index) const {
    return unit(Shape::kStages, 0) + Shape::kStages * Shape::kPassedBytes + 8 * index;
  }
  __device__ __forceinline__ uint32_t full(int stage, int unit) const { return barrier(stage * Shape::kUnits + unit); }
  __device__ __forceinline__ uint32_t empty(int stage, int unit) const { return full(Shape::kStages + stage, unit); }
  __device__ __forceinline__ uint32_t query_full() const { return full(2 * Shape::kStages, 0); }
  // What a consumer leaves for the other one, once a tile and at the end: every thread arrives for what it wrote.
  __device__ __forceinline__ uint32_t weights_full(int consumer) const { return query_full() + 8 * (1 + consumer); }
  __device__ __forceinline__ uint32_t totals_full() const { return weights_full(kConsumers); }
  // The unit of a tile that is copied, and read, at place i: the half of the stage's own consumer comes first.
  __device__ __forceinline__ static int unit_at(int stage, int i) { return i ^ 2 * stage; }
  // The visibility of a stage's tokens comes with its last unit.
  __device__ __forceinline__ uint32_t visible_full(int stage) const { return full(stage, unit_at(stage, 3)); }
  __device__ __forceinline__ uint32_t visible_empty(int stage) const { return empty(stage, unit_at(stage, 3)); }
  __device__ __forceinline__ uint32_t visible(int stage, int word) const {
    return barrier(Shape::kBarriers) + 4 * (stage * Shape::kMaskWords + word);
  }
};

template <class Shape>
__device__ __forceinline__ void load_queries_and_tokens(SharedKVWideMemory<Shape> memory, const SharedKVMaps& maps,
                                                        const SharedKVWork& work) {
  arrive_expecting(memory.query_full(), Shape::kQueryBytes);
  for (int slab = 0; slab < Shape::kSlabs; ++slab) {
    load_tile(memory.query + slab * Shape::kQuerySlabBytes, maps.query, memory.query_full(), 64 * slab, work.row, 0,
              work.entry);
  }
  Turn<Shape::kStages> turn;
  for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
    for (int i = 0; i < Shape::kUnits; ++i) {
      const int unit = memory.unit_at(turn.stage, i);
      const uint32_t full = memory.full(turn.stage, unit);
      wait(memory.empty(turn.stage, unit), turn.parity ^ 1);
      arrive_expecting(full, Shape::kUnitBytes);
      for (int slab = 0; slab < Shape::kUnitSlabs; ++slab) {
        load_tile(memory.unit(turn.stage, unit) + slab * Shape::kSlabBytes, maps.tokens, full,
                  64 * (unit * Shape::kUnitSlabs + slab), work.token_begin + tile * Shape::kBlockKV, 0, work.entry);
      }
    }
  }
}

// A consumer: its half of the columns of the sums, and the scores of every other tile, which lies in stage `half`.
template <class Element, class Shape, bool kMasked>
struct SharedKVWideConsumer {
  SharedKVWideMemory<Shape> memory;
  int half;
  float scale_log2;
  ForwardRows<Element, Shape> rows;
  uint32_t received_parity = 0;
  // Of the tile before, which the other consumer weighed.
  uint32_t passed[Shape::kSteps][4];

  // Starts scores = q x^T of the own tile.
  __device__ __forceinline__ void start_scores(uint32_t parity) {
#pragma unroll
    for (int i = 0; i < Shape::kUnits; ++i) {
      const int unit = memory.unit_at(half, i);
      wait(memory.full(half, unit), parity);
      fence_products();
      add_scores<Element, Shape, Shape::kUnitSlabs>(
          rows.scores, memory.query + unit * Shape::kUnitSlabs * Shape::kQuerySlabBytes, memory.unit(half, unit), i > 0);
      commit_products();
    }
  }

  // Starts sums += weights x, of the own columns of a tile: one group for each array of sums.
  __device__ __forceinline__ void start_sums(const uint32_t (&weights)[Shape::kSteps][4], int stage) {
    const OperandTile<Shape::kSlabBytes, 1024, Swizzle::k128Bytes> first(memory.unit(stage, 2 * half)),
        second(memory.unit(stage, 2 * half + 1));
    fence_products();
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      Product<Element, Shape::kFirst>::template add<true>(rows.sums_first, weights[step], first.at(2048 * step));
    }
    commit_products();
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      Product<Element, Shape::kSecond>::template add<true>(rows.sums_second, weights[step], second.at(2048 * step));
    }
    commit_products();
  }

  // Ends with the products of start_sums: waits for a piece, and releases the unit that was read.
  __device__ __forceinline__ void end_first(int stage) {
    wait_products<1>();
    pin(rows.sums_first);
    release(stage, 2 * half);
  }
  __device__ __forceinline__ void end_second(int stage) {
    wait_products<0>();
    pin(rows.sums_second);
    release(stage, 2 * half + 1);
  }
  __device__ __forceinline__ void release(int stage, int unit) {
    arrive_if(threadIdx.x % 32 == 0, memory.empty(stage, unit));
  }

  // They are read before the other one leaves its next weights, which stand between them and what overwrites them.
  __device__ __forceinline__ void leave_weights() {
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) store_shared(memory.weights(half, step), rows.weights[step]);
    store_shared(memory.maxima(half), rows.maximum[0], rows.maximum[1]);
    arrive(memory.weights_full(half));
  }
  // Brings sums to the maxima that the other consumer's weights are relative to, which are no less.
  __device__ __forceinline__ void receive_weights() {
    wait(memory.weights_full(1 - half), received_parity);
    received_parity ^= 1;
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) load_shared(passed[step], memory.weights(1 - half, step));
    const float2 maxima = load_shared_pair(memory.maxima(1 - half));
    const float raised[2] = {maxima.x, maxima.y};
    rows.raise(raised[0] != rows.maximum[0] || raised[1] != rows.maximum[1], raised);
    rows.rescale_sums();
  }

  // Scores of the own tile, of which `left` tokens are in the split, become maxima.
  __device__ __forceinline__ void see_scores(int left) {
    pin(rows.scores);
    if constexpr (kMasked) {
      rows.hide_masked(memory.visible(half, 0));
    } else if (left < Shape::kBlockKV) {
      hide_past(rows.scores, left);
    }
    rows.raise_to_scores(scale_log2);
  }
  __device__ __forceinline__ void weigh_scores() {
    rows.weigh_scores(scale_log2);
    rows.round_weights();
    leave_weights();
  }
  __device__ __forceinline__ void add_own() {
    start_sums(rows.weights, half);
    end_first(half);
    end_second(half);
  }

  // After tile t, (sums, maxima) of either consumer, and totals of both together, are the softmax state of the tokens up to it.
  __device__ __forceinline__ void attend(const SharedKVWork& work) {
    rows.clear();
    wait(memory.query_full(), 0);
    int tile = half, left = work.token_end - work.token_begin - half * Shape::kBlockKV;
    if (tile == 0 && left > 0) {
      start_scores(0);
      wait_products<0>();
      see_scores(left);
      weigh_scores();
      rows.pin_sums();
      add_own();
      tile += 2;
      left -= 2 * Shape::kBlockKV;
    }
    for (; left > 0; tile += 2, left -= 2 * Shape::kBlockKV) {
      receive_weights();
      start_scores(tile / 2 & 1);
      start_sums(passed, 1 - half);
      wait_products<2>();
      see_scores(left);
      end_first(1 - half);
      weigh_scores();
      end_second(1 - half);
      rows.rescale_sums();
      add_own();
    }
    // The last tile is the other consumer's.
    if (tile == work.tiles && tile > 0) {
      receive_weights();
      start_sums(passed, 1 - half);
      end_first(1 - half);
      end_second(1 - half);
    }
  }

  // The totals of both: their sum is the same whichever adds.
  __device__ __forceinline__ void join_totals() {
    store_shared(memory.totals(half), rows.total[0], rows.total[1]);
    arrive(memory.totals_full());
    wait(memory.totals_full(), 0);
    const float2 others = load_shared_pair(memory.totals(1 - half));
    rows.total[0] += others.x;
    rows.total[1] += others.y;
  }
};

template <class Element, class Shape, bool kMasked>
__global__ void __launch_bounds__(kBlockThreads, 1)
    shared_kv_fwd_wide_kernel(const __grid_constant__ SharedKVMaps maps,
                              const __grid_constant__ SharedKVForwardParams params) {
  extern __shared__ unsigned char shared[];
  const SharedKVWideMemory<Shape> memory(shared);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.tokens);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      for (int unit = 0; unit < Shape::kUnits; ++unit) {
        init_barrier(memory.full(stage, unit), kMasked && unit == memory.unit_at(stage, 3) ? 2 : 1);
        init_barrier(memory.empty(stage, unit), kWarpgroup / 32);
      }
    }
    init_barrier(memory.query_full(), 1);
    for (int consumer = 0; consumer < kConsumers; ++consumer) init_barrier(memory.weights_full(consumer), kWarpgroup);
    init_barrier(memory.totals_full(), kConsumers * kWarpgroup);
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
    const int half = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
    SharedKVWideConsumer<Element, Shape, kMasked> consumer{memory, half, params.scale_log2};
    consumer.attend(work);
    consumer.join_totals();
    store_state(consumer.rows, params, work, thread / 32 * 16 + thread % 32 / 4, half * Shape::kHalf, half == 0);
  }
}

}  // namespace perceiver
