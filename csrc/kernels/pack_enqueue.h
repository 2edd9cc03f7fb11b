// What the instantiations of the pack kernels define and launch.cpp calls; free of device code.
#pragma once

#include <driver_types.h>

#include "perceiver/params.h"

namespace perceiver {

// Content of one element type that lies in one aligned run per batch, without positions (params.flat is 1).
template <ElementType kContent>
cudaError_t enqueue_pack_flat(const PackForwardParams& params);

// Any strides, any mixture of types, with or without positions.
cudaError_t enqueue_pack_strided(const PackForwardParams& params);

// The gradient of the content.
cudaError_t enqueue_pack_backward(const PackBackwardParams& params);

}  // namespace perceiver
