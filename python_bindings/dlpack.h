// The part of DLPack's exchange interface (version 1.3) that this package calls: torch 2.10 and
// newer describe a tensor in one C call instead of eight Python attributes. Only the layouts are
// declared here, in the order the interface fixes.
#pragma once

#include <cstdint>

namespace spec_rollout::python::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct Header {
    uint32_t major, minor;
    Header* previous;
  } header;
  void* allocate;
  void* export_owning;
  void* import_owning;
  // Fills a view that is good until control returns to the tensor's owner; 0, or -1 with a Python
  // exception set.
  int (*view)(void* py_object, Tensor* out);
  // 0, or -1 with a Python exception set.
  int (*current_stream)(DeviceType type, int32_t device, void** out);
};

constexpr uint32_t kMajor = 1;
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace spec_rollout::python::dlpack
