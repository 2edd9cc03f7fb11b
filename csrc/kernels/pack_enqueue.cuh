// Chooses a pack kernel: by the type it writes and by the narrowest row shape that holds the channels.
#pragma once

#include "kernels/pack.cuh"
#include "kernels/pack_enqueue.h"

namespace perceiver {

template <class... Shapes>
struct ShapeList {};

// Narrow rows share a warp; from 129 channels on a warp owns a row, in steps of 64 channels up to the widths
// of published image and flow models (261, 322), coarser beyond.
using FlatShapes = ShapeList<RowShape<8, 0, 2>, RowShape<8, 2, 4>, RowShape<16, 2, 4>, RowShape<32, 2, 3>,
                             RowShape<32, 3, 4>, RowShape<32, 4, 5>, RowShape<32, 5, 6>, RowShape<32, 6, 8>,
                             RowShape<32, 8, 12>, RowShape<32, 12, 16>>;

// The strided kernel waits for device memory, not for instructions: every step is checked, and few shapes do.
using StridedShapes = ShapeList<RowShape<8, 0, 4>, RowShape<32, 0, 4>, RowShape<32, 0, 6>, RowShape<32, 0, 8>,
                                RowShape<32, 0, 16>>;

// True when each shape's unchecked steps lie inside every row that the shape before it cannot hold.
template <class... Shapes>
constexpr bool covers_all_widths(ShapeList<Shapes...>) {
  int widest = 0;
  bool chained = true;
  ((chained = chained && Shapes::kMinChannels <= widest + 1 && Shapes::kMaxChannels > widest,
    widest = Shapes::kMaxChannels),
   ...);
  return chained && widest == kMaxChannels;
}
static_assert(covers_all_widths(FlatShapes{}) && covers_all_widths(StridedShapes{}),
              "shapes must cover 1..kMaxChannels in order");

template <class Visit, class... Shapes>
cudaError_t with_shape(int channels, ShapeList<Shapes...>, Visit visit) {
  cudaError_t error = cudaErrorInvalidValue;
  bool found = false;
  ((found || channels > Shapes::kMaxChannels ? void() : (found = true, void(error = visit(Shapes{})))), ...);
  return error;
}

template <class Params, class Visit>
cudaError_t with_packed_type(const Params& params, Visit visit) {
  switch (static_cast<ElementType>(params.packed_type)) {
    case ElementType::kFloat32: return visit(float{});
    case ElementType::kFloat16: return visit(__half{});
    case ElementType::kBFloat16: return visit(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

template <class Params>
cudaError_t enqueue(void (*kernel)(Params), const Params& params, unsigned blocks, int shared_bytes) {
  // Above 48 KiB dynamic shared memory has to be asked for.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kPackThreads, shared_bytes, static_cast<cudaStream_t>(params.stream)>>>(params);
  return cudaGetLastError();
}

template <ElementType kContent>
cudaError_t enqueue_pack_flat(const PackForwardParams& params) {
  using Content = typename ElementOf<kContent>::Type;
  return with_packed_type(params, [&](auto packed) {
    const int shared_bytes = pack_flat_bytes(params, sizeof(Content), sizeof(packed));
    return with_shape(params.content_channels, FlatShapes{}, [&](auto shape) {
      return enqueue(&pack_flat_kernel<Content, decltype(packed), decltype(shape)>, params, params.blocks, shared_bytes);
    });
  });
}

}  // namespace perceiver
