// SuffixIndex to Python. Calls on one index must not overlap; different indexes are independent,
// and the bulk call runs without the interpreter lock, so that many groups can be built at once.
#include "spec_rollout/suffix_index.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "convert.h"

namespace spec_rollout::python {
namespace {

int64_t add_rows(SuffixIndex& index, py::handle token_ids, py::handle cu_lens) {
  ArgReader reader;
  Dim tokens{"num_tokens"}, rows{"rows"};
  const IntVec ids = reader.ints(token_ids, "token_ids", tokens);
  const IntVec cu = reader.ints(cu_lens, "cu_lens", {rows, 1});
  if (!reader.on_cpu()) fail("token_ids: expected a CPU tensor, got a CUDA one");
  if (index.num_rows() + rows.value > SuffixIndex::kMaxRows) {
    fail("cu_lens: expected at most ", SuffixIndex::kMaxRows, " rows in one index, got ",
         index.num_rows() + rows.value);
  }
  if (cu[0] != 0 || cu[rows.value] != tokens.value) {
    fail("cu_lens: expected offsets from 0 to ", tokens.value, ", got ", cu[0], " to ",
         cu[rows.value]);
  }
  for (int64_t r = 0; r < rows.value; ++r) {
    const int64_t len = cu[r + 1] - cu[r];
    if (len < 0 || len > SuffixIndex::kMaxRowTokens) {
      fail("cu_lens: expected row lengths of 0 to ", SuffixIndex::kMaxRowTokens, ", got ", len,
           " in row ", r);
    }
  }
  for (int64_t i = 0; i < tokens.value; ++i) {
    if (ids[i] < 0 || ids[i] > 0x7fffffff) {
      fail("token_ids: expected 0 <= id < 2^31, got ", ids[i], " at index ", i);
    }
  }
  py::gil_scoped_release release;
  const int64_t first = index.num_rows();
  for (int64_t r = 0; r < rows.value; ++r) {
    const int64_t row = index.add_row(cu[r + 1] - cu[r]);
    for (int64_t i = cu[r]; i < cu[r + 1]; ++i) index.append(row, static_cast<int32_t>(ids[i]));
  }
  return first;
}

void extend(SuffixIndex& index, int64_t row, const py::sequence& token_ids) {
  for (const py::handle token : token_ids) index.append(row, py::cast<int32_t>(token));
}

// -> (proposed ids, length of the match); no ids if the match is shorter than min_match.
py::tuple propose(const SuffixIndex& index, int64_t row, int64_t max_tokens, int64_t min_match,
                  double tokens_per_match) {
  SuffixIndex::Match match = index.find(row);
  py::list ids;
  if (match.len >= min_match) {
    constexpr int64_t kPiece = 256;
    const auto wanted = static_cast<int64_t>(
        std::min(static_cast<double>(std::min(max_tokens, kPiece)), tokens_per_match * match.len));
    int32_t buffer[kPiece];
    const int64_t count = index.continuation(match, std::max<int64_t>(wanted, 0), buffer);
    for (int64_t i = 0; i < count; ++i) ids.append(buffer[i]);
  }
  return py::make_tuple(ids, match.len);
}

}  // namespace

void bind_suffix_index(py::module_& module) {
  py::class_<SuffixIndex>(module, "SuffixIndex")
      .def(py::init<int32_t>(), py::arg("max_match"))
      .def("add_row", &SuffixIndex::add_row, py::arg("capacity"))
      .def("add_rows", &add_rows, py::arg("token_ids"), py::arg("cu_lens"))
      .def("extend", &extend, py::arg("row"), py::arg("token_ids"))
      .def("propose", &propose, py::arg("row"), py::arg("max_tokens"), py::arg("min_match"),
           py::arg("tokens_per_match"))
      .def_property_readonly("num_rows", &SuffixIndex::num_rows)
      .def_property_readonly("num_tokens", &SuffixIndex::num_tokens)
      .def_property_readonly("num_bytes", &SuffixIndex::num_bytes);
}

}  // namespace spec_rollout::python
