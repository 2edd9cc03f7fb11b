#include "kernels/row_products.cuh"
#include "kernels/shared_kv_enqueue.h"

namespace perceiver {

cudaError_t enqueue_row_products(const RowProductsParams& params) {
  constexpr int kRows = kRowProductThreads / 32;
  const auto blocks = static_cast<unsigned>((int64_t{params.batch} * params.rows + kRows - 1) / kRows);
  const auto kernel = params.type == static_cast<int32_t>(ElementType::kFloat16) ? &row_products_kernel<__half>
                                                                                 : &row_products_kernel<__nv_bfloat16>;
  kernel<<<blocks, kRowProductThreads, 0, static_cast<cudaStream_t>(params.stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace perceiver
