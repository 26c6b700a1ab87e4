#include "convert.h"

#include <pybind11/gil_safe_call_once.h>

#include "dlpack.h"
#include "lazy_views.h"

namespace spec_rollout::python {
namespace {

// Torch's objects, looked up once. Never released: the interpreter may be gone when static
// destructors run.
struct Torch {
  PyObject* tensor_type;
  struct {
    PyObject* object;
    DType dtype;
    int32_t item_size;
  } dtypes[7];
  PyObject *s_dtype, *s_shape, *s_stride, *s_data_ptr, *s_is_cuda, *s_is_cpu, *s_get_device,
      *s_element_size, *s_device, *s_new_empty, *s_split, *s_view, *s_requires_grad;
  const dlpack::ExchangeApi* exchange = nullptr;
  LazyViews lazy_views{py::module_::import("torch").attr("Tensor")};

  Torch() {
    py::module_ torch = py::module_::import("torch");
    const auto get = [&](const char* name) -> PyObject* {
      return py::object(torch.attr(name)).release().ptr();
    };
    tensor_type = get("Tensor");
    dtypes[0] = {get("float32"), DType::kFloat32, 4};
    dtypes[1] = {get("bfloat16"), DType::kBFloat16, 2};
    dtypes[2] = {get("float16"), DType::kFloat16, 2};
    dtypes[3] = {get("int32"), DType::kInt32, 4};
    dtypes[4] = {get("int64"), DType::kInt64, 8};
    dtypes[5] = {get("bool"), DType::kBool, 1};
    dtypes[6] = {get("uint8"), DType::kUInt8, 1};
    s_dtype = PyUnicode_InternFromString("dtype");
    s_shape = PyUnicode_InternFromString("shape");
    s_stride = PyUnicode_InternFromString("stride");
    s_data_ptr = PyUnicode_InternFromString("data_ptr");
    s_is_cuda = PyUnicode_InternFromString("is_cuda");
    s_is_cpu = PyUnicode_InternFromString("is_cpu");
    s_get_device = PyUnicode_InternFromString("get_device");
    s_element_size = PyUnicode_InternFromString("element_size");
    s_device = PyUnicode_InternFromString("device");
    s_new_empty = PyUnicode_InternFromString("new_empty");
    // "Unsafe" where gradients flow through the parts, and no views of each other elsewhere.
    s_split = PyUnicode_InternFromString("unsafe_split_with_sizes");
    s_view = PyUnicode_InternFromString("view");
    s_requires_grad = PyUnicode_InternFromString("requires_grad");
    exchange = find_exchange();
  }

  // Null before torch 2.10, and for a version of the interface that is not known here.
  const dlpack::ExchangeApi* find_exchange() const {
    PyObject* capsule = PyObject_GetAttrString(tensor_type, dlpack::kAttribute);
    if (capsule == nullptr) {
      PyErr_Clear();
      return nullptr;
    }
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    Py_DECREF(capsule);
    if (api == nullptr) {
      PyErr_Clear();
      return nullptr;
    }
    return api->header.major == dlpack::kMajor && api->view != nullptr ? api : nullptr;
  }
};

// Torch gives up the interpreter's lock while it is looked up. C++'s own guard of a static would be
// held meanwhile, and a thread that waits for it would hold the interpreter's lock for ever.
const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<const Torch*> instance;
  return *instance.call_once_and_store_result([] { return new Torch; }).get_stored();
}

py::object attr(py::handle object, PyObject* name) {
  PyObject* result = PyObject_GetAttr(object.ptr(), name);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call(py::handle object, PyObject* method) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call(py::handle object, PyObject* method, py::handle argument) {
  PyObject* result = PyObject_CallMethodOneArg(object.ptr(), method, argument.ptr());
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

int64_t to_int(py::handle value) {
  const long long result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.ndim; ++d) {
    text += (d ? ", " : "") + std::to_string(view.shape[d]);
  }
  return text + "]";
}

std::string expected_text(std::initializer_list<Size> shape) {
  std::string text = "[";
  bool first = true;
  for (const Size& size : shape) {
    if (!first) text += ", ";
    first = false;
    if (size.dim == nullptr) {
      text += "*";
      continue;
    }
    text += size.dim->name;
    if (size.plus != 0) text += " + " + std::to_string(size.plus);
    if (size.dim->value >= 0) text += " = " + std::to_string(size.dim->value + size.plus);
  }
  return text + "]";
}

std::string device_text(int device) {
  return device < 0 ? "cpu" : "cuda:" + std::to_string(device);
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kBool:
      return "bool";
    case DType::kUInt8:
      return "uint8";
    case DType::kOther:
      break;
  }
  return "another dtype";
}

namespace {

DType dtype_of(const dlpack::Tensor& tensor) {
  if (tensor.lanes != 1) return DType::kOther;
  switch (tensor.type_code) {
    case dlpack::kFloat:
      if (tensor.bits == 32) return DType::kFloat32;
      return tensor.bits == 16 ? DType::kFloat16 : DType::kOther;
    case dlpack::kBfloat:
      return tensor.bits == 16 ? DType::kBFloat16 : DType::kOther;
    case dlpack::kInt:
      if (tensor.bits == 64) return DType::kInt64;
      return tensor.bits == 32 ? DType::kInt32 : DType::kOther;
    case dlpack::kUInt:
      return tensor.bits == 8 ? DType::kUInt8 : DType::kOther;
    case dlpack::kBool:
      return tensor.bits == 8 ? DType::kBool : DType::kOther;
    default:
      return DType::kOther;
  }
}

// Under functionalisation tensors are wrapped in ones without memory. Their address is their
// offset, and no other tensor's address is as low.
bool has_memory(const TensorView& view) {
  constexpr uintptr_t kLowestAddress = 4096;
  return reinterpret_cast<uintptr_t>(view.data) >= kLowestAddress || view.numel() == 0;
}

// False where the exchange interface has no answer, or one that is not all of it; the tensor's
// attributes have one, or an error that names the argument.
bool describe_by_exchange(py::handle value, const dlpack::ExchangeApi& exchange, TensorView& view) {
  dlpack::Tensor tensor;
  if (exchange.view(value.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.device_type == dlpack::kCuda) {
    view.device = tensor.device_id;
  } else if (tensor.device_type == dlpack::kCpu || tensor.device_type == dlpack::kCudaHost) {
    view.device = -1;
  } else {
    return false;
  }
  if (tensor.ndim > kMaxDims) return false;
  view.dtype = dtype_of(tensor);
  view.item_size = (tensor.bits * tensor.lanes + 7) / 8;
  view.ndim = tensor.ndim;
  for (int32_t d = 0; d < tensor.ndim; ++d) {
    view.shape[d] = tensor.shape[d];
    view.strides[d] = tensor.strides[d];
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return has_memory(view) &&
         torch().lazy_views.operation(value, view.dtype == DType::kOther) == nullptr;
}

bool requires_grad(PyObject* tensor) {
  return torch().lazy_views.may_require_grad(tensor) &&
         attr(tensor, torch().s_requires_grad).ptr() == Py_True;
}

bool is_plain(PyObject* value, PyObject* tensor_type, bool differentiable) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
  if (type == tensor_type) return !differentiable || !requires_grad(value);
  if (value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value)) return true;
  if (PyList_CheckExact(value) || PyTuple_CheckExact(value)) {
    PyObject** items = PySequence_Fast_ITEMS(value);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
      if (!is_plain(items[i], tensor_type, differentiable)) return false;
    }
    return true;
  }
  const int is_tensor = PyObject_IsInstance(value, tensor_type);
  if (is_tensor < 0) throw py::error_already_set();
  return is_tensor == 0;
}

}  // namespace

bool all_plain(const py::tuple& args, uint64_t differentiable) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args.ptr()); ++i) {
    const bool asked = i < 64 && (differentiable >> i & 1) != 0;
    if (!is_plain(PyTuple_GET_ITEM(args.ptr(), i), torch().tensor_type, asked)) return false;
  }
  return true;
}

WordParts new_word_parts(py::handle like, const int64_t (&sizes)[4], int float_part) {
  const Torch& t = torch();
  const int64_t total = sizes[0] + sizes[1] + sizes[2] + sizes[3];
  const py::object words = call(like, t.s_new_empty, py::int_(total));
  const TensorView view = describe(words, "like");
  if (view.dtype != DType::kInt32) fail("like: expected int32, got ", dtype_name(view.dtype));
  py::list lens(4);
  for (size_t i = 0; i < 4; ++i) lens[i] = py::int_(sizes[i]);
  const py::object parts = call(words, t.s_split, lens);
  py::tuple tensors(3);
  for (int i = 0; i < 3; ++i) {
    auto part = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(parts.ptr(), i));
    tensors[static_cast<size_t>(i)] =
        i == float_part ? call(part, t.s_view, t.dtypes[0].object) : std::move(part);
  }
  return {std::move(tensors), static_cast<int32_t*>(const_cast<void*>(view.data)), view.device};
}

void* current_stream(int device) {
  const Torch& t = torch();
  void* stream = nullptr;
  if (t.exchange != nullptr && t.exchange->current_stream != nullptr) {
    if (t.exchange->current_stream(dlpack::kCuda, device, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  const py::object function =
      py::module_::import("torch").attr("_C").attr("_cuda_getCurrentRawStream");
  return reinterpret_cast<void*>(py::cast<uintptr_t>(function(device)));
}

TensorView describe(py::handle value, const char* name) {
  const Torch& t = torch();
  if (reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) == t.tensor_type) {
    TensorView view;
    if (t.exchange != nullptr && describe_by_exchange(value, *t.exchange, view)) return view;
  } else {
    const int is_tensor = PyObject_IsInstance(value.ptr(), t.tensor_type);
    if (is_tensor < 0) throw py::error_already_set();
    if (is_tensor == 0)
      fail(name, ": expected a torch.Tensor, got ", Py_TYPE(value.ptr())->tp_name);
  }
  TensorView view;
  const py::object dtype = attr(value, t.s_dtype);
  for (const auto& known : t.dtypes) {
    if (known.object == dtype.ptr()) {
      view.dtype = known.dtype;
      view.item_size = known.item_size;
    }
  }
  if (view.item_size == 0)
    view.item_size = static_cast<int32_t>(to_int(call(value, t.s_element_size)));
  if (attr(value, t.s_is_cpu).ptr() == Py_True) {
    view.device = -1;
  } else if (attr(value, t.s_is_cuda).ptr() == Py_True) {
    view.device = static_cast<int32_t>(to_int(call(value, t.s_get_device)));
  } else {
    fail(name, ": expected a CPU or CUDA tensor, got device ",
         py::cast<std::string>(py::str(attr(value, t.s_device))));
  }
  const py::object shape = attr(value, t.s_shape), strides = call(value, t.s_stride);
  const Py_ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
  if (ndim > kMaxDims) fail(name, ": expected at most ", kMaxDims, " dimensions, got ", ndim);
  view.ndim = static_cast<int32_t>(ndim);
  for (Py_ssize_t d = 0; d < ndim; ++d) {
    view.shape[d] = to_int(PyTuple_GET_ITEM(shape.ptr(), d));
    view.strides[d] = to_int(PyTuple_GET_ITEM(strides.ptr(), d));
  }
  const py::object pointer = call(value, t.s_data_ptr);
  view.data = PyLong_AsVoidPtr(pointer.ptr());
  if (view.data == nullptr && PyErr_Occurred()) throw py::error_already_set();
  const char* operation = t.lazy_views.operation(value, view.dtype == DType::kOther);
  if (operation != nullptr) {
    fail(name, ": expected a tensor whose values are those in its memory, got a view that torch ",
         "reads through ", operation, "; resolve_", operation, "() gives one");
  }
  if (!has_memory(view)) fail(name, ": expected a tensor with memory of its own, got one without");
  return view;
}

void ArgReader::same_device(int device, const char* name) {
  if (device == device_) return;
  fail(name, ": expected device ", device_text(device_), " (that of ", device_arg_, "), got ",
       device_text(device));
}

TensorView ArgReader::tensor(py::handle value, const char* name, std::initializer_list<Size> shape,
                             std::initializer_list<DType> dtypes, Contiguity contiguity) {
  const TensorView view = describe(value, name);
  bool dtype_ok = dtypes.size() == 0;
  for (DType dtype : dtypes) dtype_ok = dtype_ok || view.dtype == dtype;
  if (!dtype_ok) {
    std::string wanted;
    for (DType dtype : dtypes)
      wanted += (wanted.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    fail(name, ": expected ", wanted, ", got ",
         view.dtype == DType::kOther
             ? py::cast<std::string>(py::str(attr(value, torch().s_dtype))).substr(sizeof("torch"))
             : std::string(dtype_name(view.dtype)));
  }
  bool shape_ok = view.ndim == static_cast<int32_t>(shape.size());
  int d = 0;
  for (const Size& size : shape) {
    if (!shape_ok) break;
    const int64_t actual = view.shape[d++];
    if (size.dim == nullptr) continue;
    if (size.dim->value < 0) {
      if (actual < size.plus) {
        shape_ok = false;
      } else {
        size.dim->value = actual - size.plus;
      }
    }
    shape_ok = shape_ok && actual == size.dim->value + size.plus;
  }
  if (!shape_ok) {
    fail(name, ": expected shape ", expected_text(shape), ", got ", shape_text(view));
  }
  int64_t stride = 1;
  const int first_checked = contiguity == Contiguity::kFull ? 0 : view.ndim - 1;
  for (int i = view.ndim - 1; i >= first_checked && i >= 0; --i) {
    if (view.shape[i] > 1 && view.strides[i] != stride && view.numel() > 0) {
      fail(name,
           contiguity == Contiguity::kFull ? ": expected a contiguous tensor"
                                           : ": expected a contiguous last dimension",
           ", got stride ", view.strides[i], " in dimension ", i);
    }
    stride *= view.shape[i];
  }
  if (device_ == -2) {
    device_ = view.device;
    device_arg_ = name;
  } else {
    same_device(view.device, name);
  }
  return view;
}

namespace {
// An empty tensor may have a null pointer, which would read as "not given".
const void* non_null(const void* data) {
  static const int64_t zero = 0;
  return data != nullptr ? data : &zero;
}
}  // namespace

IntVec ArgReader::ints(py::handle value, const char* name, Size size, bool optional) {
  if (optional && value.is_none()) return {};
  const TensorView view = tensor(value, name, {size}, {DType::kInt32, DType::kInt64});
  return {non_null(view.data), view.dtype == DType::kInt64};
}

IntVec ArgReader::int_matrix(py::handle value, const char* name, Dim& rows, Dim& cols) {
  const TensorView view = tensor(value, name, {rows, cols}, {DType::kInt32, DType::kInt64});
  return {non_null(view.data), view.dtype == DType::kInt64};
}

const int64_t* ArgReader::keys(py::handle value, Size size) {
  return static_cast<const int64_t*>(tensor(value, "keys", {size}, {DType::kInt64}).data);
}

float* ArgReader::floats(py::handle value, const char* name, Size size, bool optional) {
  if (optional && value.is_none()) return nullptr;
  const TensorView view = tensor(value, name, {size}, {DType::kFloat32});
  return static_cast<float*>(const_cast<void*>(non_null(view.data)));
}

LogitsView ArgReader::logits(py::handle value, Dim& rows, Dim& vocab) {
  const TensorView view =
      tensor(value, "logits", {rows, vocab}, {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
             Contiguity::kLastDim);
  if (view.shape[1] < 1) fail("logits: expected a vocabulary of at least one token, got 0");
  if (view.shape[1] > 0x7fffffff)
    fail("logits: expected a vocabulary below 2^31, got ", view.shape[1]);
  return {view.data, view.dtype, view.shape[0], view.shape[1], view.strides[0]};
}

CacheView cache_view(const TensorView& view, bool paged) {
  CacheView out;
  out.data = static_cast<char*>(view.data);
  out.outer_stride = view.strides[0] * view.item_size;
  out.token_stride = view.strides[paged ? 1 : 2] * view.item_size;
  out.head_stride = view.strides[paged ? 2 : 1] * view.item_size;
  return out;
}

}  // namespace spec_rollout::python
