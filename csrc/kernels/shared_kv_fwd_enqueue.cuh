// Starts the shared-KV forward kernel of one width and element type.
#pragma once

#include "kernels/shared_kv_fwd.cuh"
#include "kernels/shared_kv_fwd_wide.cuh"

namespace perceiver {

// Columns, tokens of a tile, stages: as many stages as fit 227 KiB beside the queries.
template <int kColumns>
struct SharedKVShapeOf;
template <>
struct SharedKVShapeOf<64> : SharedKVShape<64, 128, 4> {};
template <>
struct SharedKVShapeOf<128> : SharedKVShape<128, 128, 4> {};
template <>
struct SharedKVShapeOf<256> : SharedKVShape<256, 80, 4> {};
template <>
struct SharedKVShapeOf<272> : SharedKVShape<272, 80, 3> {};
template <>
struct SharedKVShapeOf<336> : SharedKVShape<336, 48, 3> {};
template <>
struct SharedKVShapeOf<512> : SharedKVWideShape<512, 64> {};

using SharedKVKernel = void (*)(SharedKVMaps, SharedKVForwardParams);

template <class Element, class Shape, bool kMasked>
SharedKVKernel shared_kv_kernel() {
  if constexpr (Shape::kConsumersShareRows) {
    return &shared_kv_fwd_wide_kernel<Element, Shape, kMasked>;
  } else {
    return &shared_kv_fwd_kernel<Element, Shape, kMasked>;
  }
}

template <ElementType kElement, int kColumns>
cudaError_t enqueue_shared_kv_fwd(const SharedKVMaps& maps, const SharedKVForwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  using Shape = SharedKVShapeOf<kColumns>;
  static_assert(Shape::kSharedBytes <= 232448, "a block may have 227 KiB of shared memory");
  static_assert(Shape::kBlockKV == shared_kv_block_kv(kColumns), "launch.cpp describes tiles of this size");
  static_assert(Shape::kBlockQ == shared_kv_block_q(kColumns), "rules.cpp counts blocks of this size");
  const SharedKVKernel kernel =
      params.key_mask != nullptr ? shared_kv_kernel<Element, Shape, true>() : shared_kv_kernel<Element, Shape, false>();
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t row_blocks = (int64_t{params.rows} + Shape::kBlockQ - 1) / Shape::kBlockQ;
  const auto blocks = static_cast<unsigned>(row_blocks * params.splits * params.batch);
  kernel<<<blocks, kBlockThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(params.stream)>>>(maps, params);
  return cudaGetLastError();
}

}  // namespace perceiver
