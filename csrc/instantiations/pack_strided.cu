#include "kernels/pack_enqueue.cuh"

namespace perceiver {
cudaError_t enqueue_pack_strided(const PackForwardParams& params) {
  return with_packed_type(params, [&](auto packed) {
    return with_shape(params.content_channels + params.position_channels, StridedShapes{}, [&](auto shape) {
      return enqueue(&pack_strided_kernel<decltype(packed), decltype(shape)>, params, params.blocks, 0);
    });
  });
}
}  // namespace perceiver
