// The Python module _C: parameter structs with a property per field, functions that raise a status's text.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <type_traits>

#include "perceiver/launch.h"
#include "perceiver/layout.h"

namespace py = pybind11;
using perceiver::AttentionBackwardParams;
using perceiver::AttentionForwardParams;
using perceiver::MergeStatesParams;
using perceiver::PackBackwardParams;
using perceiver::PackForwardParams;
using perceiver::RowProductsParams;
using perceiver::SharedKVBackwardParams;
using perceiver::SharedKVForwardParams;

namespace {

template <typename Params>
void bind_params(py::module_& module, const char* name) {
  py::class_<Params> type(module, name);
  type.def(py::init([] { return Params{}; }));
  type.def(py::init<const Params&>(), "A copy.");
  perceiver::visit_fields(static_cast<const Params*>(nullptr), [&](const char* field, auto member,
                                                                   std::size_t) {
    using Field = std::remove_reference_t<decltype(std::declval<Params&>().*member)>;
    if constexpr (std::is_pointer_v<Field>) {
      type.def_property(
          field, [member](const Params& params) { return reinterpret_cast<std::uintptr_t>(params.*member); },
          [member](Params& params, std::uintptr_t address) {
            params.*member = reinterpret_cast<Field>(address);
          });
    } else {
      type.def_readwrite(field, member);
    }
  });
}

template <typename Params>
auto raising(void (*function)(const Params*, PkStatus*)) {
  return [function](const Params& params) {
    PkStatus status{};
    function(&params, &status);
    if (status.code != PK_OK) throw std::runtime_error(status.text);
  };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Binding of libperceiver_kernels: fills plain parameter structs and enqueues kernels.";
  module.attr("ABI_VERSION") = PK_ABI_VERSION;
  module.def("library_abi_version", &pk_abi_version, "The ABI version of the library that was loaded.");
  module.def("layout", &perceiver::describe_layouts, "The layout of the structs as this module was compiled.");
  module.def("library_layout", &pk_layout, "The layout of the structs as the library was compiled.");
  module.def("shared_bytes", &pk_shared_bytes, py::arg("kernel"), py::arg("columns"),
             "Shared memory of a block of a kernel for Hopper, by its width; 0: not built.");
  bind_params<PackForwardParams>(module, "PackForwardParams");
  bind_params<PackBackwardParams>(module, "PackBackwardParams");
  bind_params<SharedKVForwardParams>(module, "SharedKVForwardParams");
  bind_params<SharedKVBackwardParams>(module, "SharedKVBackwardParams");
  bind_params<RowProductsParams>(module, "RowProductsParams");
  bind_params<AttentionForwardParams>(module, "AttentionForwardParams");
  bind_params<AttentionBackwardParams>(module, "AttentionBackwardParams");
  bind_params<MergeStatesParams>(module, "MergeStatesParams");
  module.def("pack_inputs_fwd", raising(&pk_pack_inputs_fwd), py::arg("params"),
             "Enqueue the forward of pack_inputs. Raises RuntimeError with the library's sentence.");
  module.def("pack_inputs_bwd", raising(&pk_pack_inputs_bwd), py::arg("params"),
             "Enqueue the backward of pack_inputs. Raises RuntimeError with the library's sentence.");
  module.def("shared_kv_fwd", raising(&pk_shared_kv_fwd), py::arg("params"),
             "Enqueue the forward of shared_kv_attention. Raises RuntimeError with the library's sentence.");
  module.def("shared_kv_bwd", raising(&pk_shared_kv_bwd), py::arg("params"),
             "Enqueue the backward of shared_kv_attention. Raises RuntimeError with the library's sentence.");
  module.def("row_products", raising(&pk_row_products), py::arg("params"),
             "Enqueue the row products that a backward starts from. Raises RuntimeError with the library's sentence.");
  module.def("attention_fwd", raising(&pk_attention_fwd), py::arg("params"),
             "Enqueue the forward of attention. Raises RuntimeError with the library's sentence.");
  module.def("attention_bwd", raising(&pk_attention_bwd), py::arg("params"),
             "Enqueue the backward of attention. Raises RuntimeError with the library's sentence.");
  module.def("merge_states", raising(&pk_merge_states), py::arg("params"),
             "Enqueue the merge of softmax states. Raises RuntimeError with the library's sentence.");
}
