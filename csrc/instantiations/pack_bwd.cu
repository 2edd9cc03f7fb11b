#include "kernels/pack_bwd.cuh"
#include "kernels/pack_enqueue.cuh"

namespace perceiver {

cudaError_t enqueue_pack_backward(const PackBackwardParams& params) {
  const int element_bytes = params.content_type == static_cast<int32_t>(ElementType::kFloat32) ? 4 : 2;
  const int shared_bytes = params.rows_per_tile * params.content_channels * element_bytes;
  const auto blocks = static_cast<unsigned>((params.rows + params.rows_per_tile - 1) / params.rows_per_tile);
  return with_packed_type(params, [&](auto packed) {
    return with_shape(params.channels, StridedShapes{}, [&](auto shape) {
      return enqueue(&pack_bwd_kernel<decltype(packed), decltype(shape)>, params, blocks, shared_bytes);
    });
  });
}

}  // namespace perceiver
