// What persistent launches need beyond launch.h: proof that all their CTAs will be resident, a
// bound on their waits, and a word in host memory where a launch that gave up says so.
//
// A launch whose CTAs wait for CTAs that never start would not end. So the launchers of the
// persistent tiers start their kernels through launch_persistent(), which asks first how many fit;
// and a launch that waited too long all the same (kernels/finish.cuh) is reported to the next call
// on the device, which raises. Either way the tier is off on that device from then on.
#pragma once

#include <string>

#include "core/params.h"
#include "device/exchange.h"
#include "launch/launch.h"
#include "launch/plan.h"

namespace rnnlm {

// How long the waits of a launch may last: 2^20 polls and 2 s, unless a test has set it otherwise.
WaitLimit wait_limit();
void set_wait_limit(const WaitLimit& limit);

// device_limits(), asked once per device, with the tiers that are off.
Status known_limits(int device, DeviceLimits* limits);

// Switches a tier off on a device for the rest of the process and remembers why.
void switch_off(int device, CudaTier tier, const std::string& why);
std::string why_off(int device, CudaTier tier);  // empty while it is on

// The device's word, as kernels address it: 0, or failure_word() of the last launch that gave up.
Status failure_place(int device, uint32_t** word);
constexpr uint32_t failure_word(CudaTier tier, uint32_t reason) {
  return static_cast<uint32_t>(tier) << 8 | reason;
}
// Clears the word and switches its tier off. Returns what happened as a sentence, empty if nothing.
// Does not wait: a launch that still runs has not said anything yet.
std::string take_failure(int device);

// How many CTAs (clusters, where the shape has them) fit at once; negative where nobody has asked.
int recall_resident(const void* kernel, const LaunchShape& shape, int device);
void remember_resident(const void* kernel, const LaunchShape& shape, int device, int limit);
// Status unsupported unless as many fit as wait for each other: all CTAs of a cooperative launch,
// else those of one cluster.
Status check_resident(const LaunchShape& shape, int limit);

// Forgets everything above, the wait limit included. For tests: the emulator's device changes.
void forget_devices();

// launch() of a kernel whose CTAs wait for each other. Status unsupported, with nothing enqueued,
// where they would not all run at once.
template <class Params>
Status launch_persistent(const char* doing, void (*kernel)(Params), const LaunchShape& shape,
                         const CudaCall& call, const Params& params) {
  const void* key = reinterpret_cast<const void*>(kernel);
  int limit = recall_resident(key, shape, call.device);
  if (limit < 0) {
    DeviceLimits device;
    const Status known = known_limits(call.device, &device);
    if (!known.is_ok()) return known;
    const Status asked = resident_limit(kernel, shape, device.sms, &limit);
    if (!asked.is_ok()) return asked;
    remember_resident(key, shape, call.device, limit);
  }
  const Status fits = check_resident(shape, limit);
  if (!fits.is_ok()) return fits;
  return launch(doing, kernel, shape, call.stream, params);
}

}  // namespace rnnlm
