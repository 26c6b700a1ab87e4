// Cached rollouts: entries of Python (spec_rollout/cache/entry.py) to packed arrays and back.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cache/crc32c.h"
#include "cache/entry_bytes.h"
#include "spec_rollout/check.h"

namespace spec_rollout::python {
namespace {

namespace py = pybind11;

using cache::Array;
using cache::Bytes;
using cache::EntryBytes;

// The fields of an `Entry`, and where its arrays are among them, in the order of its checksum.
enum Field { kFinishReason = 3, kPolicyVersion = 4, kChecksum = 5, kNumFields = 8 };
constexpr int kFieldOf[cache::kNumArrays] = {0, 1, 2, 6, 7};

// Objects whose bytes are read: neither they nor their bytes go before this does.
class Held {
 public:
  Held() = default;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    for (PyObject* object : objects_) Py_DECREF(object);
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
  }

  Bytes bytes(PyObject* object) {
    Bytes bytes;
    if (PyBytes_CheckExact(object)) {
      objects_.push_back(object);
      Py_INCREF(object);
      bytes = {reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(object)),
               PyBytes_GET_SIZE(object)};
    } else {
      Py_buffer view;
      if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
      views_.push_back(view);
      bytes = {static_cast<const uint8_t*>(view.buf), view.len};
    }
    static constexpr uint8_t kNothing = 0;
    if (bytes.data == nullptr) bytes.data = &kNothing;  // there, and empty
    return bytes;
  }

 private:
  std::vector<PyObject*> objects_;
  std::vector<Py_buffer> views_;
};

// A list or tuple, or a list of what any other sequence holds.
class Items {
 public:
  Items(py::handle values, const char* name)
      : values_(py::reinterpret_steal<py::object>(PySequence_Fast(values.ptr(), name))) {
    if (!values_) throw py::error_already_set();
  }
  int64_t size() const { return PySequence_Fast_GET_SIZE(values_.ptr()); }
  PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(values_.ptr(), i); }

 private:
  py::object values_;
};

int64_t to_int64(PyObject* value) {
  const int64_t number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

void check_size(const char* name, int64_t size, int64_t expected) {
  if (size != expected) fail(name, ": expected ", expected, " rows, got ", size);
}

// A contiguous array of a buffer's items, all of them.
template <class T>
T* array_of(const py::buffer_info& info, const char* name, int64_t expected) {
  const bool fits = info.ndim == 1 && info.itemsize == sizeof(T) && info.shape[0] == expected &&
                    (expected == 0 || info.strides[0] == info.itemsize);
  if (!fits) {
    fail(name, ": expected ", expected, " contiguous items of ", sizeof(T), " bytes, got ",
         info.size, " of ", info.itemsize);
  }
  return static_cast<T*>(info.ptr);
}

// What numbers say of an entry; false where no entry can have them.
bool read_numbers(PyObject* entry, EntryBytes& out) {
  const auto number = [&](Field field, int64_t& value) {
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(PyTuple_GET_ITEM(entry, field), &overflow);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return overflow == 0;
  };
  int64_t finish_reason = 0;
  const bool fits = number(kFinishReason, finish_reason) &&
                    number(kPolicyVersion, out.policy_version) && number(kChecksum, out.checksum);
  out.finish_reason = static_cast<uint8_t>(finish_reason);
  return fits && finish_reason == out.finish_reason;
}

// A batch of entries on their way into packed arrays. Holds their bytes, so that they may be read
// without the interpreter lock.
class EntryBatch {
 public:
  EntryBatch(py::handle prompt_keys, py::handle sample_ids, py::handle entries) {
    const Items keys(prompt_keys, "prompt_keys: expected a sequence");
    const Items samples(sample_ids, "sample_ids: expected a sequence");
    const Items rows(entries, "entries: expected a sequence");
    check_size("prompt_keys", keys.size(), rows.size());
    check_size("sample_ids", samples.size(), rows.size());
    entries_.resize(static_cast<size_t>(rows.size()));
    for (int64_t row = 0; row < rows.size(); ++row) {
      if (rows[row] != Py_None) read(keys[row], samples[row], rows[row], entries_[row]);
    }
  }

  // How many rows have: an entry, each of its arrays, behaviour log-probs or log-probs.
  py::dict counts() const {
    int64_t num_entries = 0, num_drawn_with = 0, num_of[cache::kNumArrays] = {};
    for (const EntryBytes& entry : entries_) {
      num_entries += is_there(entry);
      for (int k = 0; k < cache::kNumArrays; ++k) num_of[k] += entry.arrays[k].data != nullptr;
      num_drawn_with += entry.arrays[cache::kBehaviourLogprobs].data != nullptr ||
                        entry.arrays[cache::kLogprobs].data != nullptr;
    }
    py::dict counts;
    counts["entries"] = num_entries;
    counts["logprobs"] = num_of[cache::kLogprobs];
    counts["trainer_logprobs"] = num_of[cache::kTrainerLogprobs];
    counts["behaviour_logprobs"] = num_of[cache::kBehaviourLogprobs];
    counts["any_logprobs"] = num_drawn_with;
    counts["ages"] = num_of[cache::kAges];
    return counts;
  }

  // Writes cu_lens [batch + 1] and finished [batch] of drafts cut to `max_tokens`.
  void layout(int64_t max_tokens, int finish_reason, const py::buffer& cu_lens,
              const py::buffer& finished) const {
    const py::buffer_info cu_info = cu_lens.request(true), finished_info = finished.request(true);
    const auto batch = static_cast<int64_t>(entries_.size());
    auto* cu = array_of<int64_t>(cu_info, "cu_lens", batch + 1);
    auto* is_finished = array_of<bool>(finished_info, "finished", batch);
    if (max_tokens < 0) fail("max_tokens: expected >= 0, got ", max_tokens);
    cu[0] = 0;
    for (int64_t row = 0; row < batch; ++row) {
      const EntryBytes& entry = entries_[row];
      const int64_t len = entry.num_tokens();
      cu[row + 1] = cu[row] + std::min(len, max_tokens);
      is_finished[row] =
          is_there(entry) && entry.finish_reason == finish_reason && len <= max_tokens;
    }
  }

  // Fills packed arrays; the rows whose checksum is wrong.
  std::vector<int64_t> unpack(const py::buffer& cu_lens, bool trainer_logprobs,
                              const py::buffer& token_ids, const py::object& logprobs,
                              const py::object& behaviour_logprobs, const py::object& ages,
                              int num_threads) const {
    const auto batch = static_cast<int64_t>(entries_.size());
    const py::buffer_info cu_info = cu_lens.request();
    const auto* cu = array_of<const int64_t>(cu_info, "cu_lens", batch + 1);
    std::vector<int64_t> offsets(cu, cu + batch + 1);
    if (offsets[0] != 0) fail("cu_lens: expected to start at 0, got ", offsets[0]);
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t len = offsets[row + 1] - offsets[row];
      if (len < 0 || len > entries_[row].num_tokens()) {
        fail("cu_lens: expected lengths of 0 to ", entries_[row].num_tokens(), ", got ", len,
             " in row ", row);
      }
    }
    std::vector<py::buffer_info> infos;  // as long as what is written to
    const auto output = [&](const py::object& values, const char* name, auto item) -> uint8_t* {
      if (values.is_none()) return nullptr;
      infos.push_back(py::cast<py::buffer>(values).request(true));
      return reinterpret_cast<uint8_t*>(
          array_of<decltype(item)>(infos.back(), name, offsets.back()));
    };
    cache::PackedArrays out;
    out.token_ids = output(token_ids, "token_ids", int32_t{});
    out.logprobs = output(logprobs, "logprobs", float{});
    out.behaviour_logprobs = output(behaviour_logprobs, "behaviour_logprobs", float{});
    out.ages = output(ages, "ages", int16_t{});
    std::vector<uint8_t> sound(entries_.size());
    {
      py::gil_scoped_release release;
      cache::unpack_entries(entries_, offsets,
                            trainer_logprobs ? cache::kTrainerLogprobs : cache::kLogprobs, out,
                            sound.data(), num_threads);
    }
    std::vector<int64_t> wrong;
    for (int64_t row = 0; row < batch; ++row) {
      if (!sound[row]) wrong.push_back(row);
    }
    return wrong;
  }

 private:
  static bool is_there(const EntryBytes& entry) {
    return entry.arrays[cache::kTokenIds].data != nullptr;
  }

  void read(PyObject* key, PyObject* sample_id, PyObject* entry, EntryBytes& out) {
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != kNumFields) {
      fail("entries: expected an Entry or None, got ", Py_TYPE(entry)->tp_name);
    }
    out.key = held_.bytes(key);
    out.sample_id = to_int64(sample_id);
    out.readable = read_numbers(entry, out);
    for (int k = 0; k < cache::kNumArrays; ++k) {
      PyObject* array = PyTuple_GET_ITEM(entry, kFieldOf[k]);
      if (array != Py_None) out.arrays[k] = held_.bytes(array);
    }
  }

  Held held_;
  std::vector<EntryBytes> entries_;
};

py::object new_bytes(int64_t size) {
  auto bytes = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, size));
  if (!bytes) throw py::error_already_set();
  return bytes;
}

// Entries of some rows of packed arrays: `arrays` are those of the whole batch, None where there
// are none. Behaviour log-probs beside log-probs, and ages, are kept of rows of which something was
// reused: of others they say nothing new.
py::list pack_entries(const py::type& entry_type, const py::sequence& prompt_keys,
                      const py::sequence& sample_ids, const std::vector<int64_t>& rows,
                      const py::sequence& arrays, const py::buffer& cu_lens,
                      const py::buffer& finish_reasons, const py::buffer& reused,
                      int64_t policy_version, int num_threads) {
  Held held;
  const Items keys(prompt_keys, "prompt_keys: expected a sequence");
  const Items samples(sample_ids, "sample_ids: expected a sequence");
  const int64_t batch = keys.size();
  check_size("sample_ids", samples.size(), batch);
  check_size("arrays", static_cast<int64_t>(arrays.size()), cache::kNumArrays);
  const py::buffer_info cu_info = cu_lens.request(), reasons_info = finish_reasons.request(),
                        reused_info = reused.request();
  const auto* cu = array_of<const int64_t>(cu_info, "cu_lens", batch + 1);
  const auto* reasons = array_of<const uint8_t>(reasons_info, "finish_reasons", batch);
  const auto* is_reused = array_of<const bool>(reused_info, "reused", batch);
  Bytes packed[cache::kNumArrays];
  for (int k = 0; k < cache::kNumArrays; ++k) {
    const py::object array = arrays[k];
    if (array.is_none()) continue;
    packed[k] = held.bytes(array.ptr());
  }
  if (packed[cache::kTokenIds].data == nullptr) fail("arrays: expected token ids, got None");
  std::vector<cache::NewEntry> entries(rows.size());
  std::vector<py::object> targets(rows.size() * cache::kNumArrays, py::none());
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t row = rows[i];
    if (row < 0 || row >= batch) fail("rows: expected 0 <= row < ", batch, ", got ", row);
    EntryBytes& source = entries[i].source;
    source.key = held.bytes(keys[row]);
    source.sample_id = to_int64(samples[row]);
    source.policy_version = policy_version;
    source.finish_reason = reasons[row];
    for (int k = 0; k < cache::kNumArrays; ++k) {
      const bool says_nothing = k == cache::kAges || (k == cache::kBehaviourLogprobs &&
                                                      packed[cache::kLogprobs].data != nullptr);
      if (packed[k].data == nullptr || (says_nothing && !is_reused[row])) continue;
      const int64_t width = cache::kWidths[k];
      if (cu[row] < 0 || cu[row + 1] < cu[row] || cu[row + 1] > packed[k].size / width) {
        fail("cu_lens: expected offsets of 0 to ", packed[k].size / width, ", got ", cu[row],
             " to ", cu[row + 1], " in row ", row);
      }
      const int64_t size = width * (cu[row + 1] - cu[row]);
      source.arrays[k] = {packed[k].data + width * cu[row], size};
      py::object& target = targets[i * cache::kNumArrays + k];
      target = new_bytes(size);
      entries[i].targets[k] = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(target.ptr()));
    }
  }
  {
    py::gil_scoped_release release;
    cache::pack_entries(entries, num_threads);
  }
  const py::object new_tuple =
      py::handle(reinterpret_cast<PyObject*>(&PyTuple_Type)).attr("__new__");
  py::list made(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    py::tuple fields(static_cast<size_t>(kNumFields));
    for (int k = 0; k < cache::kNumArrays; ++k) {
      fields[kFieldOf[k]] = std::move(targets[i * cache::kNumArrays + k]);
    }
    fields[kFinishReason] = entries[i].source.finish_reason;
    fields[kPolicyVersion] = policy_version;
    fields[kChecksum] = entries[i].checksum;
    made[i] = new_tuple(entry_type, fields);
  }
  return made;
}

// CRC-32C of `data`, which follows what `crc` is of.
uint32_t crc32c(const py::buffer& data, uint32_t crc, const std::string& impl) {
  Held held;
  const Bytes bytes = held.bytes(data.ptr());
  const auto size = static_cast<size_t>(bytes.size);
  if (impl.empty()) {
    py::gil_scoped_release release;
    return cache::crc32c(crc, bytes.data, size);
  }
  std::string names;
  for (const cache::Crc32cImpl& candidate : cache::crc32c_available()) {
    if (impl == candidate.name) return candidate.function(crc, bytes.data, size);
    names += (names.empty() ? "" : ", ") + std::string(candidate.name);
  }
  fail("impl: expected one of ", names, ", got ", impl);
}

std::vector<std::string> crc32c_available() {
  std::vector<std::string> names;
  for (const cache::Crc32cImpl& impl : cache::crc32c_available()) names.emplace_back(impl.name);
  return names;
}

}  // namespace

void bind_cache(py::module_& module) {
  module.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0, py::arg("impl") = "");
  module.def("crc32c_available", &crc32c_available);
  py::class_<EntryBatch>(module, "EntryBatch")
      .def(py::init<py::handle, py::handle, py::handle>(), py::arg("prompt_keys"),
           py::arg("sample_ids"), py::arg("entries"))
      .def("counts", &EntryBatch::counts)
      .def("layout", &EntryBatch::layout)
      .def("unpack", &EntryBatch::unpack);
  module.def("pack_entries", &pack_entries);
}

}  // namespace spec_rollout::python
