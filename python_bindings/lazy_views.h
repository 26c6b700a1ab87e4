// Tensors whose values are not those in their memory: torch marks the views that `conj()` and
// `.imag` give as conjugate or negative, and computes the values when it reads them. And tensors of
// which autograd keeps notes.
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

  // False for most tensors that require no gradient; true for all that do.
  bool may_require_grad(pybind11::handle tensor) const {
    return autograd_word_ == 0 || words(tensor)[autograd_word_] != 0;
  }

 private:
  struct Flag {
    size_t object_word = 0;  // of a tensor's Python object: the address of what it stands for
    size_t word = 0;         // of that: the word in which the flag is
    uint64_t mask = 0;       // 0: not known, torch has to be asked
  };

  static Flag find_flag(pybind11::handle tensor_type);
  size_t find_autograd_word() const;
  bool may_be_negative(pybind11::handle tensor) const {
    if (flag_.mask == 0) return true;
    return (words(tensor)[flag_.word] & flag_.mask) != 0;
  }
  const uint64_t* words(pybind11::handle tensor) const {
    const auto* object = reinterpret_cast<const uintptr_t*>(tensor.ptr());
    return reinterpret_cast<const uint64_t*>(object[flag_.object_word]);
  }
  const char* ask(pybind11::handle tensor, bool is_complex) const;

  Flag flag_;
  size_t autograd_word_ = 0;  // 0 in it: autograd keeps no notes; 0 itself: not known
};

}  // namespace spec_rollout::python
