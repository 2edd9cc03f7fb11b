#include "kernels/pack_enqueue.cuh"

namespace perceiver {
template cudaError_t enqueue_pack_flat<ElementType::kFloat16>(const PackForwardParams&);
}
