// Tensors of Python to views of the core, and the checks of rank, size, dtype, device and layout on
// the way. Torch is not needed to build this: its tensors are read through DLPack's exchange
// interface, or, where that is missing, through their Python attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "spec_rollout/check.h"
#include "spec_rollout/ops.h"
#include "spec_rollout/tensor_view.h"

namespace spec_rollout::python {

namespace py = pybind11;

// A size that several arguments share. The first argument that has it sets it.
struct Dim {
  const char* name;
  int64_t value = -1;
};

// One expected dimension: a shared size, possibly plus a constant, or anything (null).
struct Size {
  Dim* dim = nullptr;
  int64_t plus = 0;
  Size(Dim& d) : dim(&d) {}  // NOLINT: implicit on purpose, so that expected shapes read as lists
  Size(Dim& d, int64_t extra) : dim(&d), plus(extra) {}
  Size() = default;
};

enum class Contiguity { kFull, kLastDim };

// Reads the arguments of one call; all tensors must be on the device of the first.
class ArgReader {
 public:
  TensorView tensor(py::handle value, const char* name, std::initializer_list<Size> shape,
                    std::initializer_list<DType> dtypes, Contiguity contiguity = Contiguity::kFull);
  // A one-dimensional int32 or int64 tensor; None gives a null vector if `optional`.
  IntVec ints(py::handle value, const char* name, Size size, bool optional = false);
  IntVec int_matrix(py::handle value, const char* name, Dim& rows, Dim& cols);
  const int64_t* keys(py::handle value, Size size);
  // float32 vector or null.
  float* floats(py::handle value, const char* name, Size size, bool optional = false);
  LogitsView logits(py::handle value, Dim& rows, Dim& vocab);
  // An error unless it is the device of the arguments read so far.
  void same_device(int device, const char* name);
  // Device of the arguments read so far: -1 is the CPU.
  int device() const { return device_; }
  bool on_cpu() const { return device_ < 0; }

 private:
  int device_ = -2;
  const char* device_arg_ = nullptr;
};

// Data of a contiguous tensor to write to.
template <class T>
T* output(ArgReader& reader, py::handle value, const char* name, std::initializer_list<Size> shape,
          DType dtype) {
  return static_cast<T*>(reader.tensor(value, name, shape, {dtype}).data);
}

// One new allocation of int32 words, cut into four vectors; the third is float32.
struct WordParts {
  py::tuple tensors;  // of the first three
  int32_t* data;      // of all
  int device;
};
WordParts new_word_parts(py::handle like, const int64_t (&sizes)[4], int float_part);

// Whether none of a call's arguments, or items of its lists, is a subclass of Tensor, and none at a
// place with a bit in `differentiable` requires a gradient.
bool all_plain(const py::tuple& args, uint64_t differentiable);
// Torch's current stream on a CUDA device.
void* current_stream(int device);
// A tensor's layout without any expectation.
TensorView describe(py::handle value, const char* name);
const char* dtype_name(DType dtype);
// A key or value cache: [rows, heads, tokens, head_dim], or paged [blocks, tokens, heads,
// head_dim].
CacheView cache_view(const TensorView& view, bool paged);

}  // namespace spec_rollout::python
