// A struct's layout as text, "name:offset:size ... ; size", by which library and binding are compared.
#pragma once

#include <string>

#include "perceiver/fields.h"

namespace perceiver {

template <typename Params>
std::string describe_layout() {
  std::string text;
  visit_fields(static_cast<const Params*>(nullptr), [&](const char* name, auto member, std::size_t offset) {
    text += std::string(name) + ":" + std::to_string(offset) + ":" +
            std::to_string(sizeof(static_cast<Params*>(nullptr)->*member)) + " ";
  });
  return text + "; " + std::to_string(sizeof(Params));
}

// All structs of the interface.
inline std::string describe_layouts() {
  return describe_layout<PackForwardParams>() + " | " + describe_layout<SharedKVForwardParams>() + " | " +
         describe_layout<SharedKVBackwardParams>() + " | " + describe_layout<RowProductsParams>() + " | " +
         describe_layout<AttentionForwardParams>() + " | " + describe_layout<AttentionBackwardParams>() + " | " +
         describe_layout<MergeStatesParams>();
}

}  // namespace perceiver
