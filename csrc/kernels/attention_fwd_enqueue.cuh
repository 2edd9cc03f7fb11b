// Starts the attention forward kernel of one head width and element type.
#pragma once

#include "kernels/attention_fwd.cuh"

namespace perceiver {

// Columns, keys of a tile, stages, those of the queries, whether warpgroups take turns. In ms on an H200: 128 channels, 512 x
// 512 in 256 heads 0.0730 with turns and 0.0737 without, 64 keys a tile 0.080; 64 channels with turns and without, 784 x 784
// in 256 heads 0.1345 and 0.1390, 512 x 50,176 in 32 0.466 and 0.448, without and of 192 keys 0.434; 256 channels, 1,048,576 x
// 512 0.844 with tiles of 64 keys and 0.890 with 80.
template <int kColumns>
struct AttentionShapeOf;
template <>
struct AttentionShapeOf<64> : AttentionShape<64, 128, 4, 2, true> {};
template <>
struct AttentionShapeOf<128> : AttentionShape<128, 128, 2, 2, true> {};
template <>
struct AttentionShapeOf<256> : AttentionShape<256, 64, 2, 1, false> {};

template <int kColumns>
struct AttentionLongShapeOf;
template <>
struct AttentionLongShapeOf<64> : AttentionShape<64, kAttentionLongBlockKV, 3, 2, false> {};

template <class Element, class Shape>
cudaError_t enqueue_attention_of(const AttentionMaps& maps, const AttentionForwardParams& params) {
  static_assert(Shape::kSharedBytes <= 232448, "a block may have 227 KiB of shared memory");
  const auto kernel = &attention_fwd_kernel<Element, Shape>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<params.blocks, kBlockThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(params.stream)>>>(maps, params);
  return cudaGetLastError();
}

template <ElementType kElement, int kColumns>
cudaError_t enqueue_attention_fwd(const AttentionMaps& maps, const AttentionForwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  static_assert(AttentionShapeOf<kColumns>::kBlockKV == attention_block_kv(kColumns), "rules.cpp knows tiles of this size");
  if constexpr (kColumns == 64) {
    if (params.block_kv == kAttentionLongBlockKV) return enqueue_attention_of<Element, AttentionLongShapeOf<64>>(maps, params);
  }
  return enqueue_attention_of<Element, AttentionShapeOf<kColumns>>(maps, params);
}

}  // namespace perceiver
