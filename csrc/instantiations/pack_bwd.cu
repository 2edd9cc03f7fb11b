#include "kernels/pack_bwd.cuh"
#include "kernels/pack_enqueue.cuh"

namespace perceiver {

cudaError_t enqueue_pack_backward(const PackBackwardParams& params) {
  return with_packed_type(params, [&](auto packed) {
    return with_shape(params.channels, FlatShapes{}, [&](auto shape) {
      const int shared_bytes = pack_backward_bytes(params, sizeof(packed));
      return enqueue(&pack_bwd_kernel<decltype(packed), decltype(shape)>, params, params.blocks, shared_bytes);
    });
  });
}

}  // namespace perceiver
