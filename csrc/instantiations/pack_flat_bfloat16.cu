#include "kernels/pack_enqueue.cuh"

namespace perceiver {
template cudaError_t enqueue_pack_flat<ElementType::kBFloat16>(const PackForwardParams&);
}
