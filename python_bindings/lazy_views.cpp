#include "lazy_views.h"

#include <array>
#include <vector>

namespace spec_rollout::python {

namespace py = pybind11;

namespace {

constexpr size_t kWords =
    22;  // of a TensorImpl; torch asserts its layout, of which this is the size
static_assert(sizeof(void*) == 8, "the layouts read here are those of 64-bit platforms");

// Word of a tensor's Python object that holds the address of what it stands for; 0 if none does.
size_t address_word(py::handle tensor, size_t num_words) {
  const uintptr_t address = py::cast<uintptr_t>(tensor.attr("_cdata"));
  const auto* object = reinterpret_cast<const uintptr_t*>(tensor.ptr());
  for (size_t word = sizeof(PyObject) / sizeof(void*); word < num_words; ++word) {
    if (object[word] == address) return word;
  }
  return 0;
}

}  // namespace

LazyViews::LazyViews(py::handle tensor_type) {
  try {
    flag_ = find_flag(tensor_type);
    if (flag_.mask != 0) autograd_word_ = find_autograd_word();
  } catch (py::error_already_set&) {
    // No private name of torch's that this needs is one of its promises.
    flag_ = {};
    autograd_word_ = 0;
  }
}

// Torch's own answer gives up the interpreter's lock, which costs half as much as all the rest of
// reading a tensor. So the place of the flag is found once, from tensors with it and without: it is
// the one bit that tells them apart. Where there is none, torch is asked every time.
LazyViews::Flag LazyViews::find_flag(py::handle tensor_type) {
  const py::module_ torch = py::module_::import("torch");
  const size_t object_words =
      static_cast<size_t>(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())->tp_basicsize) /
      sizeof(void*);
  std::array<uint64_t, kWords> in_all_negative, in_any_plain{};
  in_all_negative.fill(~uint64_t{0});
  std::vector<py::object> alive;
  size_t object_word = 0;
  for (const char* dtype : {"float32", "bfloat16", "int64"}) {
    py::object plain =
        torch.attr("zeros")(py::make_tuple(2, 3), py::arg("dtype") = torch.attr(dtype));
    for (int part = 0; part < 2; ++part) {
      const py::object negative = torch.attr("_neg_view")(plain);
      for (const py::object& tensor : {plain, negative}) {
        const size_t word = address_word(tensor, object_words);
        if (word == 0 || (object_word != 0 && word != object_word)) return {};
        object_word = word;
        const auto* words =
            reinterpret_cast<const uint64_t*>(py::cast<uintptr_t>(tensor.attr("_cdata")));
        for (size_t i = 0; i < kWords; ++i) {
          if (tensor.is(negative)) {
            in_all_negative[i] &= words[i];
          } else {
            in_any_plain[i] |= words[i];
          }
        }
        alive.push_back(tensor);
      }
      plain = plain[py::int_(1)];  // a view
    }
  }
  Flag flag;
  for (size_t i = 0; i < kWords; ++i) {
    const uint64_t bits = in_all_negative[i] & ~in_any_plain[i];
    if (bits == 0) continue;
    if (flag.mask != 0 || (bits & (bits - 1)) != 0) return {};  // more than one
    flag = {object_word, i, bits};
  }
  return flag;
}

// The one word that is 0 in plain tensors and not in those that require a gradient: a pointer to
// what autograd notes of a tensor. Views have such notes, too.
size_t LazyViews::find_autograd_word() const {
  const py::module_ torch = py::module_::import("torch");
  std::array<bool, kWords> distinguishes;
  distinguishes.fill(true);
  for (const char* dtype : {"float32", "bfloat16"}) {
    for (const bool requires_grad : {false, true}) {
      const py::object tensor =
          torch.attr("zeros")(py::make_tuple(2, 3), py::arg("dtype") = torch.attr(dtype),
                              py::arg("requires_grad") = requires_grad);
      for (size_t i = 0; i < kWords; ++i) {
        if ((words(tensor)[i] != 0) != requires_grad) distinguishes[i] = false;
      }
    }
  }
  size_t found = 0;
  for (size_t i = 0; i < kWords; ++i) {
    if (!distinguishes[i]) continue;
    if (found != 0) return 0;  // more than one
    found = i;
  }
  return found;
}

const char* LazyViews::ask(py::handle tensor, bool is_complex) const {
  if (py::cast<bool>(tensor.attr("is_neg")())) return "neg";
  return is_complex && py::cast<bool>(tensor.attr("is_conj")()) ? "conj" : nullptr;
}

}  // namespace spec_rollout::python
