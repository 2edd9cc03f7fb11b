// What the instantiations of the attention kernels define and launch.cpp calls; free of device code.
#pragma once

#include <cuda.h>
#include <driver_types.h>

#include "perceiver/params.h"

namespace perceiver {

// Tiles of 64 columns of queries, keys and values.
struct AttentionMaps {
  CUtensorMap query;
  CUtensorMap key;
  CUtensorMap value;
};

// The head widths that there are kernels for: heads take the first that holds them.
constexpr int kAttentionColumns[] = {64, 128, 256};

// Keys of a tile; and of the other kernel for 64 columns, of heads that read many keys.
constexpr int attention_block_kv(int columns) { return columns <= 128 ? 128 : 64; }
constexpr int kAttentionLongBlockKV = 192;

// Query rows of a block.
constexpr int kAttentionBlockQ = 128;

// The kernel for heads of up to kColumns channels of one element type, of tiles of params.block_kv keys.
template <ElementType kElement, int kColumns>
cudaError_t enqueue_attention_fwd(const AttentionMaps& maps, const AttentionForwardParams& params);

// The same of the backward.
struct AttentionBackwardMaps {
  CUtensorMap query;
  CUtensorMap key;
  CUtensorMap value;
  CUtensorMap dout;
  // What a warpgroup writes: 64 rows.
  CUtensorMap dq;
  CUtensorMap dk;
  CUtensorMap dv;
};

constexpr int kAttentionBackwardColumns[] = {64, 128, 256};
constexpr int kAttentionBackwardBlockKV = 128, kAttentionWideBlockQ = 128, kAttentionWideBlockKV = 64;
constexpr int attention_bwd_block_q(int columns) { return columns <= 64 ? 128 : columns <= 128 ? 64 : 32; }

// What the kernels start from (lse in powers of two, delta), the gradients, and dq from its parts.
template <ElementType kElement, int kColumns>
cudaError_t enqueue_attention_bwd(const AttentionBackwardMaps& maps, const AttentionBackwardParams& params);

// The same for heads of up to 256 channels.
template <ElementType kElement>
cudaError_t enqueue_attention_bwd_wide(const AttentionBackwardMaps& maps, const AttentionBackwardParams& params);

// Shared memory of a block of the kernel for `columns`; 0: there is none.
int attention_shared_bytes(int columns);
int attention_long_shared_bytes(int columns);
int attention_bwd_shared_bytes(int columns);

}  // namespace perceiver
