// launch/launch.h on the emulator: the same functions as launch/cuda_launch.h. There is one device,
// number 0, streams mean nothing, and a launch has ended when launch() returns. Errors read as the
// CUDA runtime's.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "core/status.h"
#include "emulator/machine.h"

namespace rnnlm {

// As in launch/cuda_status.h.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (device != 0) {
      status_ = emulator::cuda_error(
          "selecting the device", "invalid device ordinal", "cudaErrorInvalidDevice",
          "Pass the index of a device that CUDA_VISIBLE_DEVICES lets this process see");
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  const Status& status() const { return status_; }

 private:
  Status status_;
};

inline Status device_limits(int device, DeviceLimits* limits) {
  const DeviceGuard guard(device);
  if (!guard.status().is_ok()) return guard.status();
  const emulator::Settings is = emulator::settings();
  *limits = {is.compute_capability, is.sms, is.shared_per_block, is.cooperative};
  return Status::ok();
}

template <class Params>
Status resident_limit(void (*)(Params), const LaunchShape& shape, int sms, int* limit) {
  return emulator::resident_limit(shape, sms, limit);
}

template <class Params>
Status launch(const char* doing, void (*kernel)(Params), const LaunchShape& shape, std::uintptr_t,
              const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  };
  const Call call{kernel, &params};
  return emulator::run(
      doing, shape,
      [](const void* argument) {
        const Call& given = *static_cast<const Call*>(argument);
        given.kernel(*given.params);
      },
      &call);
}

inline Status fill_bytes(void* p, int byte, std::size_t bytes, std::uintptr_t) {
  if (bytes != 0) std::memset(p, byte, bytes);
  return Status::ok();
}

// Streams mean nothing here, but no two are the same.
inline Status new_stream(std::uintptr_t, std::uintptr_t* stream) {
  static std::atomic<std::uintptr_t> last{0};
  *stream = ++last;
  return Status::ok();
}

inline Status host_word(uint32_t** on_host, uint32_t** on_device) {
  *on_host = *on_device = new uint32_t(0);
  return Status::ok();
}

}  // namespace rnnlm
