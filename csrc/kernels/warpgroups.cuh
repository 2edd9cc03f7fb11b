// How the warpgroups of a block share work and registers, and how they write the sums that they end with.
#pragma once

#include "perceiver/device/element.cuh"

namespace perceiver {

constexpr int kWarpgroup = 128;
// A producer warpgroup, and two that own 64 rows each.
constexpr int kConsumers = 2;
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;
// Registers of a thread after the warpgroups have shared them out: (24 + 2 x 240) x 128 of 65,536.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

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

// Of a 4 x 4 matrix of registers, spread over four neighbouring threads by columns: thread i gets row i.
__device__ __forceinline__ void transpose_quad(uint32_t (&value)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? value[0] : value[1], 1);
  uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? value[2] : value[3], 1);
  (odd ? value[0] : value[1]) = first;
  (odd ? value[2] : value[3]) = second;
  first = __shfl_xor_sync(0xffffffffu, upper ? value[0] : value[2], 2);
  second = __shfl_xor_sync(0xffffffffu, upper ? value[1] : value[3], 2);
  (upper ? value[0] : value[2]) = first;
  (upper ? value[1] : value[3]) = second;
}

// Writes columns first.. of the two rows, times `inverse`, as Out: rows on 16 bytes, channels a multiple of 8.
template <int kCount>
__device__ __forceinline__ void store_sums(float* gRow, int64_t row_pitch, const float (&sums)[kCount],
                                           const float (&inverse)[2], const bool (&exists)[2], int first, int channels) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int half = i % 2, column = first + 8 * (i / 2) + 2 * (threadIdx.x % 4);
    if (exists[half] && column < channels) {
      store_pair(gRow + half * 8 * row_pitch + column, sums[2 * i] * inverse[half], sums[2 * i + 1] * inverse[half]);
    }
  }
}

// In 16 bits four threads hold 8 columns of a row, 16 bytes: each of them writes those of one block of 8 in four.
template <class Out, int kCount>
__device__ __forceinline__ void store_sums(Out* gRow, int64_t row_pitch, const float (&sums)[kCount],
                                           const float (&inverse)[2], const bool (&exists)[2], int first, int channels) {
  constexpr int kBlocks = kCount / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int block = 0; block < kBlocks; block += 4) {
      uint32_t columns[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = block + i < kBlocks ? 4 * (block + i) + 2 * half : 0;
        columns[i] = packed_pair<Out>(sums[at] * inverse[half], sums[at + 1] * inverse[half]);
      }
      transpose_quad(columns);
      const int mine = block + threadIdx.x % 4, column = first + 8 * mine;
      if (exists[half] && mine < kBlocks && column < channels) {
        *reinterpret_cast<uint4*>(gRow + half * 8 * row_pitch + column) =
            make_uint4(columns[0], columns[1], columns[2], columns[3]);
      }
    }
  }
}

}  // namespace perceiver
