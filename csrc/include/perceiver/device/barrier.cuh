// Barriers in shared memory (mbarrier): bytes that a copy brings and threads that arrive complete a phase.
// They are told by their addresses in shared memory.
// A phase has a parity, 0 for the first one. Waiting for parity 1 on a fresh barrier returns at once.
#pragma once

#include <cstdint>

#include "perceiver/device/shared.cuh"

namespace perceiver {

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers that this thread initialised visible to the copy engine; a __syncthreads must follow.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Without a branch, which would serialize products that are running.
__device__ __forceinline__ void arrive_if(bool arrives, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred arrives;\nsetp.ne.b32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}

// Barriers of the block without memory of their own, by number; 0 is __syncthreads. `threads` arrive at one or wait.
__device__ __forceinline__ void arrive_at(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void sync_at(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Arrives, and keeps the phase open until `bytes` more have been copied.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (!complete) {
    asm volatile(
        "{\n.reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

}  // namespace perceiver
