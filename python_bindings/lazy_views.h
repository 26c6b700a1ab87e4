// Tensors whose values are not those in their memory: torch marks the views that `conj()` and
// `.imag` give as conjugate or negative, and computes the values when it reads them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

namespace spec_rollout::python {

class LazyViews {
 public:
  explicit LazyViews(pybind11::handle tensor_type);

  // "neg" or "conj", so that `resolve_` and this is torch's name for what makes the values real;
  // null for any other tensor. Only a complex tensor can be conjugate.
  const char* operation(pybind11::handle tensor, bool is_complex) const {
    if (!is_complex && !may_be_negative(tensor)) return nullptr;
    return ask(tensor, is_complex);
  }

 private:
  struct Flag {
    size_t object_word = 0;  // of a tensor's Python object: the address of what it stands for
    size_t word = 0;         // of that: the word in which the flag is
    uint64_t mask = 0;       // 0: not known, torch has to be asked
  };

  static Flag find_flag(pybind11::handle tensor_type);
  bool may_be_negative(pybind11::handle tensor) const {
    if (flag_.mask == 0) return true;
    const auto* object = reinterpret_cast<const uintptr_t*>(tensor.ptr());
    const auto* words = reinterpret_cast<const uint64_t*>(object[flag_.object_word]);
    return (words[flag_.word] & flag_.mask) != 0;
  }
  const char* ask(pybind11::handle tensor, bool is_complex) const;

  Flag flag_;
};

}  // namespace spec_rollout::python
