// The promises of the C interface whose breach would be a crash. What users pass was checked in Python before.
#pragma once

#include <initializer_list>

#include "perceiver/params.h"
#include "tensor_map.h"

namespace perceiver {

// The rule that is broken, or null. `columns` is the width of the kernel, 0 where there is none; `tiled` tensors are described to
// the copy engine.
const char* broken_rule(const PackForwardParams& params);
const char* broken_rule(const PackBackwardParams& params);
const char* broken_rule(const SharedKVForwardParams& params, std::initializer_list<RowTensor> tiled, int columns);
const char* broken_rule(const SharedKVBackwardParams& params, std::initializer_list<RowTensor> tiled, int columns);
const char* broken_rule(const AttentionForwardParams& params, std::initializer_list<RowTensor> tiled, int columns);
const char* broken_rule(const AttentionBackwardParams& params, std::initializer_list<RowTensor> tiled, int columns);
const char* broken_rule(const RowProductsParams& params);
const char* broken_rule(const MergeStatesParams& params);

}  // namespace perceiver
