#include "launch/guard.h"

#include <map>
#include <mutex>
#include <tuple>

namespace rnnlm {
namespace {

struct Device {
  bool asked = false;
  DeviceLimits limits;
  std::string why_off[kCudaTiers];
  uint32_t* word_on_host = nullptr;
  uint32_t* word_on_device = nullptr;
};

using Launch = std::tuple<const void*, int, unsigned, std::size_t, unsigned>;

// Calls may come from any thread of the process, and from the backward pass's threads.
std::mutex mutex;
std::map<int, Device> devices;
std::map<Launch, int> residents;

constexpr WaitLimit kDefaultLimit{1u << 20, 2'000'000'000};
WaitLimit limit_now = kDefaultLimit;

Launch launch_key(const void* kernel, const LaunchShape& shape, int device) {
  return {kernel, device, shape.threads, shape.shared, shape.cluster};
}

}  // namespace

WaitLimit wait_limit() {
  const std::lock_guard<std::mutex> lock(mutex);
  return limit_now;
}

void set_wait_limit(const WaitLimit& limit) {
  const std::lock_guard<std::mutex> lock(mutex);
  limit_now = limit;
}

Status known_limits(int device, DeviceLimits* limits) {
  const std::lock_guard<std::mutex> lock(mutex);
  Device& known = devices[device];
  if (!known.asked) {
    const Status status = device_limits(device, &known.limits);
    if (!status.is_ok()) return status;
    known.asked = true;
  }
  *limits = known.limits;
  for (int tier = 0; tier < kCudaTiers; ++tier) limits->off[tier] = !known.why_off[tier].empty();
  return Status::ok();
}

void switch_off(int device, CudaTier tier, const std::string& why) {
  const std::lock_guard<std::mutex> lock(mutex);
  devices[device].why_off[static_cast<int>(tier)] = why;
}

std::string why_off(int device, CudaTier tier) {
  const std::lock_guard<std::mutex> lock(mutex);
  return devices[device].why_off[static_cast<int>(tier)];
}

Status failure_place(int device, uint32_t** word) {
  const std::lock_guard<std::mutex> lock(mutex);
  Device& known = devices[device];
  if (known.word_on_host == nullptr) {
    const Status status = host_word(&known.word_on_host, &known.word_on_device);
    if (!status.is_ok()) return status;
  }
  *word = known.word_on_device;
  return Status::ok();
}

std::string take_failure(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  Device& known = devices[device];
  if (known.word_on_host == nullptr) return {};
  // The device writes it when it likes. Nothing else is read because of what it says.
  if (__atomic_load_n(known.word_on_host, __ATOMIC_RELAXED) == 0) return {};
  const uint32_t said = __atomic_exchange_n(known.word_on_host, 0u, __ATOMIC_RELAXED);
  const auto tier = static_cast<CudaTier>(said >> 8);
  std::string& why = known.why_off[static_cast<int>(tier)];
  why = "a launch waited too long for a part of itself";
  return std::string("an earlier call on CUDA device ") + std::to_string(device) +
         " failed in the " + tier_name(tier) + " tier: " + why +
         " (is the GPU shared, or under a debugger?), and its results were set to NaN";
}

int recall_resident(const void* kernel, const LaunchShape& shape, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = residents.find(launch_key(kernel, shape, device));
  return found == residents.end() ? -1 : found->second;
}

void remember_resident(const void* kernel, const LaunchShape& shape, int device, int limit) {
  const std::lock_guard<std::mutex> lock(mutex);
  residents[launch_key(kernel, shape, device)] = limit;
}

Status check_resident(const LaunchShape& shape, int limit) {
  const int64_t ctas = int64_t{shape.grid_x} * shape.grid_y * shape.grid_z;
  const int64_t needed = shape.cooperative ? ctas / shape.cluster : 1;
  if (needed <= limit) return Status::ok();
  const char* const what = shape.cluster > 1 ? "clusters" : "CTAs";
  return Status::unsupported(
      "the launch needs " + std::to_string(needed) + " " + what + " at once and the device holds " +
          std::to_string(limit),
      "Other work on the device may hold its SMs; RNNLM_CUDA_TIER=stepwise needs none at once");
}

void forget_devices() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto& [index, device] : devices) {
    device.asked = false;
    for (std::string& why : device.why_off) why.clear();
    if (device.word_on_host != nullptr) *device.word_on_host = 0;
  }
  residents.clear();
  limit_now = kDefaultLimit;
}

}  // namespace rnnlm
