// A ring of shared-memory slots into which 16-byte-aligned runs of device memory are copied ahead of use, and the way out of
// shared memory for results.
// sm_90 and newer: one thread starts a bulk copy per slot and per result, an mbarrier counts the bytes that come (UBLKCP).
// sm_80: every thread copies 16-byte vectors, on their way in past the registers and the L1 (LDGSTS.BYPASS.128).
//
// Contract: fetch is called by every thread for which fetches() holds, wait by every thread, with the same
// arguments as the others; fetches are numbered 0, 1, 2, ... by `turn`. A __syncthreads stands between the
// last read of turn t and fetch(t + kSlots), and between the first kSlots fetches and the first wait. A run
// of zero bytes is fetched too, so that turns and slots stay in step. Results lie in two places in turn: every thread calls
// finish_results after it wrote to one, then comes a __syncthreads, then store by every thread, and finish_stores at the end.
#pragma once

#include <cstdint>

#include "perceiver/device/shared.cuh"

namespace perceiver {

// Bytes of device memory that start on 16 bytes, and where in a slot they go, a multiple of 16.
struct Run {
  const unsigned char* source;
  int bytes;
  int offset;
};

template <int kSlots>
class TilePipeline {
 public:
  // Bytes in front of the slots; slots start on 128 bytes.
  static constexpr int kHeaderBytes = 128;
  static_assert(kSlots * sizeof(uint64_t) <= kHeaderBytes, "the barriers must fit in front of the slots");
  static_assert(kSlots >= 2, "the contract's __syncthreads must fall between a fetch and its wait");

  __device__ TilePipeline(unsigned char* shared, int slot_bytes)
      : sBarriers(reinterpret_cast<uint64_t*>(shared)),
        sSlots(shared + kHeaderBytes),
        slot_bytes_(slot_bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kSlots; ++slot) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&sBarriers[slot]))
                     : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      fence_against_bulk_copies();
    }
    __syncthreads();
#endif
  }

  // Whether this thread takes part in fetch: all do, or the first warp where the copy engine does the work.
  __device__ bool fetches() const {
#if __CUDA_ARCH__ >= 900
    return threadIdx.x < 32;
#else
    return true;
#endif
  }

  // Starts copying the runs into the slot of `turn`.
  template <int kRuns>
  __device__ void fetch(uint32_t turn, const Run (&runs)[kRuns]) {
    unsigned char* sSlot = slot(turn);
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      const uint32_t barrier = shared_address(&sBarriers[turn % kSlots]);
      int all_bytes = 0;
#pragma unroll
      for (const Run& run : runs) all_bytes += run.bytes & ~15;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(all_bytes) : "memory");
#pragma unroll
      for (const Run& run : runs) {
        if (run.bytes < 16) continue;
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(sSlot + run.offset)),
            "l"(run.source), "r"(run.bytes & ~15), "r"(barrier)
            : "memory");
      }
    }
#else
#pragma unroll
    for (const Run& run : runs) {
      for (int offset = threadIdx.x * 16; offset < (run.bytes & ~15); offset += blockDim.x * 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(sSlot + run.offset + offset)),
                     "l"(run.source + offset)
                     : "memory");
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    // A run may end within 16 bytes: those are copied singly, so that nothing past the end is read.
#pragma unroll
    for (const Run& run : runs) {
      const int tail = (run.bytes & ~15) + static_cast<int>(threadIdx.x);
      if (tail < run.bytes) {
        sSlot[run.offset + tail] = run.source[tail];
#if __CUDA_ARCH__ >= 900
        fence_against_bulk_copies();
#endif
      }
    }
  }

  // Returns the slot of `turn` once its bytes have arrived.
  __device__ const unsigned char* wait(uint32_t turn) {
#if __CUDA_ARCH__ >= 900
    const uint32_t barrier = shared_address(&sBarriers[turn % kSlots]);
    const uint32_t parity = (turn / kSlots) & 1;
    uint32_t arrived = 0;
    while (!arrived) {
      asm volatile(
          "{\n.reg .pred arrived;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 arrived, [%1], %2;\n"
          "selp.u32 %0, 1, 0, arrived;\n}"
          : "=r"(arrived)
          : "r"(barrier), "r"(parity)
          : "memory");
    }
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 1) : "memory");
    __syncthreads();
#endif
    return slot(turn);
  }

  // What this thread wrote may be stored after the next __syncthreads, and the other place for results may be written then.
  __device__ void finish_results() const {
#if __CUDA_ARCH__ >= 900
    fence_against_bulk_copies();
    finish_stores();
#endif
  }

  // Starts copying whole vectors of a run that starts on 16 bytes to device memory.
  __device__ void store(unsigned char* gRun, const unsigned char* sRun, int bytes) const {
    const int vector_bytes = bytes & ~15;
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && vector_bytes > 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(gRun),
                   "r"(shared_address(sRun)), "r"(vector_bytes)
                   : "memory");
    }
#else
#pragma unroll 1
    for (int at = 16 * threadIdx.x; at < vector_bytes; at += 16 * blockDim.x) {
      *reinterpret_cast<uint4*>(gRun + at) = *reinterpret_cast<const uint4*>(sRun + at);
    }
#endif
  }

  // Waits until the stores that this thread started have read shared memory.
  __device__ void finish_stores() const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
  }

 private:
  __device__ unsigned char* slot(uint32_t turn) { return sSlots + (turn % kSlots) * slot_bytes_; }

  // Orders this thread's ordinary shared-memory accesses before later bulk copies into the same memory.
  __device__ static void fence_against_bulk_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  uint64_t* sBarriers;
  unsigned char* sSlots;
  int slot_bytes_;
};

}  // namespace perceiver
