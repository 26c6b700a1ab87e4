// The Python face of the core. Every function takes tensors (never loose pointers), writes into
// outputs the caller allocated, and ends with the number of CPU threads to use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "convert.h"
#include "cuda_reason.h"  // made by CMakeLists.txt
#include "spec_rollout/ops.h"

namespace spec_rollout::python {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = SPEC_ROLLOUT_VERSION;
  info["compiler"] = SPEC_ROLLOUT_COMPILER;
  info["isa_levels"] = py::str(SPEC_ROLLOUT_ISA_LEVELS).attr("split")(",");
  info["isa_available"] = cpu::isa_available();  // of these, what the processor has
  info["isa_in_use"] = cpu::isa_in_use();
#if defined(SPEC_ROLLOUT_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = SPEC_ROLLOUT_CUDA_VERSION;
  info["cuda_archs"] = py::str(SPEC_ROLLOUT_CUDA_ARCHS).attr("split")(",");
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  info["cuda_reason"] = SPEC_ROLLOUT_CUDA_REASON;
  return info;
}

}  // namespace

void bind_logits_ops(py::module_& module);  // logits_ops.cpp
void bind_splice_kv(py::module_& module);   // splice_kv.cpp
void bind_assemble(py::module_& module);    // assemble.cpp
void bind_forward(py::module_& module);     // forward.cpp
void bind_drafting(py::module_& module);    // drafting.cpp
void bind_cache(py::module_& module);       // cache.cpp
void bind_arithmetic(py::module_& module);  // arithmetic.cpp

}  // namespace spec_rollout::python

PYBIND11_MODULE(_C, module) {
  using namespace spec_rollout::python;
  module.doc() =
      "Kernels of spec_rollout. Use spec_rollout.ops, which documents and registers them.";
  module.def("all_plain", &all_plain);
  module.def("build_info", &build_info);
  bind_logits_ops(module);
  bind_splice_kv(module);
  bind_assemble(module);
  bind_forward(module);
  bind_drafting(module);
  bind_cache(module);
  bind_arithmetic(module);
}
