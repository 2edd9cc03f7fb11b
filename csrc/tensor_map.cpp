#include "tensor_map.h"

#include <cuda_runtime_api.h>

namespace perceiver {
namespace {

// The driver's function, found at run time: the library does not link against the driver.
decltype(&cuTensorMapEncodeTiled) encode_function() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  return function;
}

}  // namespace

bool can_encode(const RowTensor& tensor) {
  constexpr int64_t kElements = 16 / 2;
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.row_pitch % kElements == 0 && tensor.row_pitch > 0 &&
         (tensor.entries == 1 || (tensor.entry_pitch % kElements == 0 && tensor.entry_pitch > 0));
}

bool encode_tiles(CUtensorMap* map, const RowTensor& tensor, int rows, int columns) {
  const auto encode = encode_function();
  if (encode == nullptr) return false;
  const auto type =
      tensor.type == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(tensor.columns), static_cast<cuuint64_t>(tensor.rows),
                               static_cast<cuuint64_t>(tensor.entries)};
  // The pitch of a single entry is never used, and may be anything.
  const int64_t entry_pitch = tensor.entries == 1 ? tensor.rows * tensor.row_pitch : tensor.entry_pitch;
  const cuuint64_t pitches[2] = {static_cast<cuuint64_t>(tensor.row_pitch) * 2, static_cast<cuuint64_t>(entry_pitch) * 2};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto swizzle = columns * 2 == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B;
  return encode(map, type, 3, const_cast<void*>(tensor.data), sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace perceiver
