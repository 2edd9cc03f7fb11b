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
  const auto fits = [](int64_t size, int64_t pitch) { return size == 1 || (pitch % kElements == 0 && pitch > 0); };
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && fits(tensor.rows, tensor.row_pitch) &&
         fits(tensor.heads, tensor.head_pitch) && fits(tensor.entries, tensor.entry_pitch);
}

bool encode_tiles(CUtensorMap* map, const RowTensor& tensor, int rows, int columns) {
  const auto encode = encode_function();
  if (encode == nullptr) return false;
  const auto type =
      tensor.type == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto whole = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t sizes[4] = {whole(tensor.columns), whole(tensor.rows), whole(tensor.heads), whole(tensor.entries)};
  // The pitch of a single row, head or entry is never used and may be anything: 16 bytes, which the driver takes.
  const auto bytes = [&](int64_t size, int64_t pitch) { return size == 1 ? cuuint64_t{16} : whole(pitch) * 2; };
  const cuuint64_t pitches[3] = {bytes(tensor.rows, tensor.row_pitch), bytes(tensor.heads, tensor.head_pitch),
                                 bytes(tensor.entries, tensor.entry_pitch)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto swizzle = columns * 2 == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B;
  return encode(map, type, 4, const_cast<void*>(tensor.data), sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace perceiver
