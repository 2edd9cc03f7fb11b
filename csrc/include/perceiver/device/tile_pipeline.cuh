// A ring of shared-memory slots into which 16-byte-aligned runs of device memory are copied ahead of use.
// sm_90 and newer: one thread starts a bulk copy per slot, an mbarrier counts its bytes (UBLKCP).
// sm_80: every thread copies 16-byte vectors past the registers and the L1 (LDGSTS.BYPASS.128).
//
// Contract: fetch is called by every thread for which fetches() holds, wait by every thread, with the same
// arguments as the others; fetches are numbered 0, 1, 2, ... by `turn`. A __syncthreads stands between the
// last read of turn t and fetch(t + kSlots), and between the first kSlots fetches and the first wait. A run
// of zero bytes is fetched too, so that turns and slots stay in step.
#pragma once

#include <cstdint>

#include "perceiver/device/shared.cuh"

namespace perceiver {

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

  // Starts copying `bytes` bytes from `source`, which lies on 16 bytes, into the slot of `turn`.
  __device__ void fetch(uint32_t turn, const unsigned char* source, int bytes) {
    unsigned char* sSlot = slot(turn);
    const int vector_bytes = bytes & ~15;
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      const uint32_t barrier = shared_address(&sBarriers[turn % kSlots]);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(vector_bytes)
                   : "memory");
      if (vector_bytes > 0) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(sSlot)),
            "l"(source), "r"(vector_bytes), "r"(barrier)
            : "memory");
      }
    }
#else
    for (int offset = threadIdx.x * 16; offset < vector_bytes; offset += blockDim.x * 16) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(sSlot + offset)),
                   "l"(source + offset)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    // A run may end within 16 bytes: those are copied singly, so that nothing past the end is read.
    const int tail_offset = vector_bytes + static_cast<int>(threadIdx.x);
    if (tail_offset < bytes) {
      sSlot[tail_offset] = source[tail_offset];
#if __CUDA_ARCH__ >= 900
      fence_against_bulk_copies();
#endif
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
