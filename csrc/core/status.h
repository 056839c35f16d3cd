// The result of a host entry: a code, what went wrong (cause) and what the caller can do about it
// (mend).
//
// Kernels and launchers return a Status and never throw; csrc/python/errors.h turns it into a
// Python exception. Nothing here knows CUDA, Python or torch.
#pragma once

#include <string>
#include <utility>

namespace rnnlm {

enum class StatusCode {
  kOk = 0,
  kInvalidArgument,  // ValueError
  kUnsupported,      // NotImplementedError: a right request that this build or machine cannot serve
  kOutOfMemory,      // MemoryError
  kDeviceError,      // RuntimeError: the driver, the device or a launch failed
  kInternal,         // RuntimeError: a defect of this library
};

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string cause;
  std::string mend;

  static Status ok() { return {}; }
  static Status invalid_argument(std::string cause, std::string mend = {}) {
    return {StatusCode::kInvalidArgument, std::move(cause), std::move(mend)};
  }
  static Status unsupported(std::string cause, std::string mend = {}) {
    return {StatusCode::kUnsupported, std::move(cause), std::move(mend)};
  }
  static Status out_of_memory(std::string cause, std::string mend = {}) {
    return {StatusCode::kOutOfMemory, std::move(cause), std::move(mend)};
  }
  static Status device_error(std::string cause, std::string mend = {}) {
    return {StatusCode::kDeviceError, std::move(cause), std::move(mend)};
  }
  static Status internal(std::string cause, std::string mend = {}) {
    return {StatusCode::kInternal, std::move(cause), std::move(mend)};
  }

  bool is_ok() const { return code == StatusCode::kOk; }
  std::string message() const { return mend.empty() ? cause : cause + ". " + mend; }
};

}  // namespace rnnlm
