// SuffixIndex and HistoryDrafter to Python. Calls on one index must not overlap; different indexes
// are independent, and the bulk call runs without the interpreter lock, so that many groups can be
// built at once.
#include "drafting/suffix_index.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "convert.h"
#include "drafting/history_drafter.h"

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

// None: null.
const float* logprobs_of(ArgReader& reader, py::handle value, Size size) {
  if (value.is_none()) return nullptr;
  return static_cast<const float*>(
      reader.tensor(value, "logprobs", {size}, {DType::kFloat32}).data);
}

const int64_t* int64s(ArgReader& reader, py::handle value, const char* name, Size size) {
  return static_cast<const int64_t*>(reader.tensor(value, name, {size}, {DType::kInt64}).data);
}

// Packed rows; the offsets are checked.
struct PackedIds {
  const int32_t* ids;
  const float* logprobs;
  const int64_t* cu;
  PackedIds(ArgReader& reader, py::handle token_ids, py::handle logprob_values, py::handle cu_lens,
            Dim& rows) {
    Dim tokens{"num_tokens"};
    ids = static_cast<const int32_t*>(
        reader.tensor(token_ids, "token_ids", {tokens}, {DType::kInt32}).data);
    logprobs = logprobs_of(reader, logprob_values, tokens);
    cu = int64s(reader, cu_lens, "cu_lens", {rows, 1});
    if (!reader.on_cpu()) fail("token_ids: expected a CPU tensor, got a CUDA one");
    bool rising = cu[0] == 0 && cu[rows.value] == tokens.value;
    for (int64_t r = 0; r < rows.value; ++r) rising = rising && cu[r] <= cu[r + 1];
    if (!rising) {
      fail("cu_lens: expected offsets rising from 0 to ", tokens.value, ", got ", cu[0], " to ",
           cu[rows.value]);
    }
  }
};

HistoryDrafter make_drafter(int64_t max_bytes, int64_t max_group_bytes, int64_t table_tokens,
                            int64_t max_table_bytes, bool is_lasting,
                            std::shared_ptr<MatchShares> shares) {
  constexpr int64_t kLineBytes = NgramTable::kNumOrders * sizeof(NgramTable::Line);
  return HistoryDrafter(
      {max_bytes, max_group_bytes, table_tokens, max_table_bytes / kLineBytes, is_lasting},
      std::move(shares));
}

// Two int64 make a key.
std::vector<GroupKey> keys_of(ArgReader& reader, py::handle values, Size count) {
  Dim both{"words", 2};
  const auto* words = static_cast<const uint64_t*>(
      reader.tensor(values, "groups", {count, both}, {DType::kInt64}).data);
  std::vector<GroupKey> keys(count.dim->value);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = {words[2 * i], words[2 * i + 1]};
  return keys;
}

py::list join(HistoryDrafter& drafter, py::handle groups,
              const std::vector<int32_t>& stop_token_ids, py::handle tags) {
  ArgReader reader;
  Dim count{"count"};
  const std::vector<GroupKey> keys = keys_of(reader, groups, count);
  const int64_t* known = tags.is_none() ? nullptr : int64s(reader, tags, "tags", count);
  py::list handles;
  for (size_t i = 0; i < keys.size(); ++i) {
    handles.append(
        drafter.join(keys[i], stop_token_ids, known == nullptr ? Group::kNoTag : known[i]));
  }
  return handles;
}

void add_history(HistoryDrafter& drafter, py::handle token_ids, py::handle logprobs,
                 py::handle cu_lens, py::handle groups, py::handle tags, int num_threads) {
  ArgReader reader;
  Dim rows{"rows"};
  const std::vector<GroupKey> keys = keys_of(reader, groups, rows);
  const int64_t* known = tags.is_none() ? nullptr : int64s(reader, tags, "tags", rows);
  const PackedIds packed(reader, token_ids, logprobs, cu_lens, rows);
  py::gil_scoped_release release;
  drafter.add_history(packed.ids, packed.logprobs, packed.cu, keys.data(), known, rows.value,
                      num_threads);
}

py::bytes bytes_of(const void* data, size_t size) {
  return py::bytes(static_cast<const char*>(data), size);
}

// A row's tokens, int32, and their log-probs, float32.
py::tuple row_of(const Group& group, int64_t row) {
  const auto len = static_cast<size_t>(group.index.row_len(row));
  return py::make_tuple(bytes_of(group.index.row_tokens(row), len * sizeof(int32_t)),
                        bytes_of(group.index.row_logprobs(row), len * sizeof(float)));
}

py::object row_if_any(const std::pair<const Group*, int64_t>& found) {
  if (found.first == nullptr) return py::none();
  return row_of(*found.first, found.second);
}

py::object recall(const HistoryDrafter& drafter, py::handle groups, int64_t tag) {
  ArgReader reader;
  Dim count{"count"};
  return row_if_any(drafter.recall(keys_of(reader, groups, count).at(0), tag));
}

// Of every group with kept rows, the least recently used first: key, and (tag, tokens, log-probs)
// of every row, the oldest first.
py::list kept_rows(const HistoryDrafter& drafter) {
  py::list groups;
  for (const Group* group : drafter.history().by_use()) {
    py::list rows;
    for (int32_t row = group->oldest; row != Group::kNoRow; row = group->kept[row].newer) {
      const py::tuple values = row_of(*group, row);
      rows.append(py::make_tuple(group->kept[row].tag, values[0], values[1]));
    }
    const uint64_t key[] = {group->key.high, group->key.low};
    groups.append(py::make_tuple(bytes_of(key, sizeof(key)), rows));
  }
  return groups;
}

py::dict info(const HistoryDrafter& drafter) {
  const GroupHistory& history = drafter.history();
  py::dict values;
  values["history_bytes"] = history.num_bytes();
  values["table_bytes"] = drafter.table_bytes();
  values["num_groups"] = history.num_groups();
  values["num_live"] = drafter.num_live();
  values["num_sequences"] = history.num_kept();
  values["num_tokens"] = history.num_tokens();
  values["num_evicted_groups"] = history.num_evicted_groups();
  values["num_evicted_sequences"] = history.num_evicted_rows();
  values["num_learned_tokens"] = drafter.num_learned();
  return values;
}

void follow(HistoryDrafter& drafter, int64_t request, py::handle token_ids, py::handle logprobs) {
  ArgReader reader;
  Dim count{"num_tokens"};
  const TensorView ids = reader.tensor(token_ids, "token_ids", {count}, {DType::kInt32});
  const TensorView known = reader.tensor(logprobs, "logprobs", {count}, {DType::kFloat32});
  if (!reader.on_cpu()) fail("token_ids: expected a CPU tensor, got a CUDA one");
  drafter.follow(request, static_cast<const int32_t*>(ids.data),
                 static_cast<const float*>(known.data), count.value);
}

void extend_requests(HistoryDrafter& drafter, py::handle requests, py::handle token_ids,
                     py::handle logprobs, py::handle cu_lens) {
  ArgReader reader;
  Dim count{"count"};
  const int64_t* values = int64s(reader, requests, "requests", count);
  const PackedIds packed(reader, token_ids, logprobs, cu_lens, count);
  drafter.extend(values, count.value, packed.ids, packed.logprobs, packed.cu);
}

int64_t propose_for(HistoryDrafter& drafter, py::handle requests, py::handle limits,
                    py::handle keys, py::handle positions, py::handle with_noise,
                    double min_probability, bool favours_longest, int64_t max_total,
                    int num_threads, py::handle out, py::handle out_lens, py::handle own_lens,
                    py::handle expected) {
  ArgReader reader;
  Dim count{"count"}, room{"room"};
  const int64_t* values = int64s(reader, requests, "requests", count);
  const int64_t* most = int64s(reader, limits, "limits", count);
  const bool keyed = !keys.is_none();
  const int64_t* noise_keys = keyed ? int64s(reader, keys, "keys", count) : nullptr;
  const int64_t* next = keyed ? int64s(reader, positions, "positions", count) : nullptr;
  const bool* drawn = nullptr;
  if (!with_noise.is_none()) {
    const TensorView flags = reader.tensor(with_noise, "with_noise", {count}, {DType::kBool});
    drawn = static_cast<const bool*>(flags.data);
  }
  const TensorView ids = reader.tensor(out, "out", {room}, {DType::kInt32});
  int64_t total = 0;
  for (int64_t i = 0; i < count.value; ++i) total += std::max<int64_t>(0, most[i]);
  if (total > room.value) fail("out: expected room for ", total, " tokens, got ", room.value);
  auto* lens =
      static_cast<int64_t*>(reader.tensor(out_lens, "out_lens", {count}, {DType::kInt64}).data);
  auto* own =
      static_cast<int64_t*>(reader.tensor(own_lens, "own_lens", {count}, {DType::kInt64}).data);
  auto* passing =
      static_cast<float*>(reader.tensor(expected, "expected", {count}, {DType::kFloat32}).data);
  py::gil_scoped_release release;
  return drafter.propose(values, most, noise_keys, next, drawn, count.value, min_probability,
                         favours_longest, max_total, num_threads, static_cast<int32_t*>(ids.data),
                         lens, own, passing);
}

void expect_noise(HistoryDrafter& drafter, int law) {
  if (law < 0 || law > static_cast<int>(NoiseLaw::kVllm64)) {
    fail("law: expected 0 to 2, got ", law);
  }
  drafter.expect_noise(static_cast<NoiseLaw>(law));
}

void observe(HistoryDrafter& drafter, py::handle requests, py::handle accepted_lens) {
  ArgReader reader;
  Dim count{"count"};
  const int64_t* values = int64s(reader, requests, "requests", count);
  drafter.observe(values, int64s(reader, accepted_lens, "accepted_lens", count), count.value);
}

}  // namespace

void bind_drafting(py::module_& module) {
  py::class_<SuffixIndex>(module, "SuffixIndex")
      .def(py::init<int32_t>(), py::arg("max_match"))
      .def("add_row", &SuffixIndex::add_row, py::arg("capacity"))
      .def("add_rows", &add_rows, py::arg("token_ids"), py::arg("cu_lens"))
      .def("extend", &extend, py::arg("row"), py::arg("token_ids"))
      .def("remove_row", &SuffixIndex::remove_row, py::arg("row"))
      .def("propose", &propose, py::arg("row"), py::arg("max_tokens"), py::arg("min_match"),
           py::arg("tokens_per_match"))
      .def_property_readonly("num_rows", &SuffixIndex::num_rows)
      .def_property_readonly("num_tokens", &SuffixIndex::num_tokens)
      .def_property_readonly("num_bytes", &SuffixIndex::num_bytes)
      .def_property_readonly("num_visits", &SuffixIndex::num_visits);
  // What a drafter expects of a token's noise.
  module.def("vllm_gumbel", &vllm_noise::gumbel, py::arg("seed"), py::arg("position"),
             py::arg("token"), py::arg("is_float64"));
  py::class_<MatchShares, std::shared_ptr<MatchShares>>(module, "MatchShares").def(py::init<>());
  py::class_<HistoryDrafter>(module, "HistoryDrafter")
      .def(py::init(&make_drafter), py::kw_only(), py::arg("max_bytes"), py::arg("max_group_bytes"),
           py::arg("table_tokens"), py::arg("max_table_bytes"), py::arg("is_lasting"),
           py::arg("shares").none(false))
      .def("expect_noise", &expect_noise)
      .def("join", &join)
      .def("leave", &HistoryDrafter::leave)
      .def("add_history", &add_history)
      .def("follow", &follow)
      .def("extend", &extend_requests)
      .def("propose", &propose_for)
      .def("observe", &observe)
      .def("recall", &recall)
      .def("generated", [](const HistoryDrafter& d,
                           int64_t request) { return row_if_any(d.generated(request)); })
      .def("kept_rows", &kept_rows)
      .def("clear", &HistoryDrafter::clear)
      .def("followed_len", &HistoryDrafter::followed_len)
      .def("has_history", &HistoryDrafter::has_history)
      .def_property_readonly("info", &info)
      .def_property_readonly("num_tokens",
                             [](const HistoryDrafter& d) { return d.history().num_tokens(); })
      .def_property_readonly("num_bytes", &HistoryDrafter::num_bytes)
      // Nodes looked at: by insertions and removals, by lookups.
      .def_property_readonly("num_visits",
                             [](const HistoryDrafter& d) {
                               return py::make_tuple(d.history().num_visits(),
                                                     d.num_lookup_visits());
                             })
      .def_property_readonly("acceptance", &HistoryDrafter::acceptance);
}

}  // namespace spec_rollout::python
