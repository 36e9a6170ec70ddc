// csrc/cuda/core/launch.cpp over a runtime of its own that keeps, as CUDA does, the shared memory that each
// kernel may have on each device. Prints "name<TAB>ok" or "name<TAB>what is wrong".
#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "../../../csrc/cuda/core/launch.h"
#include "../../../csrc/facts.h"
#include "cuda_runtime_api.h"

namespace {

constexpr int kOptIn[] = {227 << 10, 99 << 10};  // of the two devices

std::mutex mutex;
std::map<std::pair<const void*, int>, int> limits;  // of kernels on devices
std::atomic<int> times_set;
std::atomic<bool> refuse;
std::function<void()> while_setting, before_launching;
thread_local int device;
thread_local cudaLaunchConfig_t launched;
thread_local void** given;

}  // namespace

const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int of) {
  *value = which == cudaDevAttrL2CacheSize ? 50 << 20 : kOptIn[of];
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  ++times_set;
  if (while_setting) while_setting();
  if (refuse.exchange(false) || value > kOptIn[device]) return cudaErrorInvalidValue;
  const std::lock_guard lock(mutex);
  limits[{kernel, device}] = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  if (before_launching) before_launching();
  launched = *config;
  given = arguments;
  const std::lock_guard lock(mutex);
  const auto limit = limits.find({kernel, device});
  const size_t allowed = limit == limits.end() ? 48 << 10 : limit->second;
  return config->dynamicSmemBytes <= allowed ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12080;
  return cudaSuccess;
}

namespace {

void launch(const void* kernel, int64_t shared_bytes, int64_t blocks = 3) {
  vitdiv::cuda::launch("operation", kernel, blocks, 64, shared_bytes, nullptr, nullptr);
}
std::string said_of(const std::function<void()>& call) {
  try {
    call();
    return "nothing";
  } catch (const std::exception& error) {
    return error.what();
  }
}
void report(const char* name, const std::function<std::string()>& test) {
  times_set = 0;
  while_setting = before_launching = nullptr;
  std::string wrong;
  try {
    wrong = test();
  } catch (const std::exception& error) {
    wrong = error.what();
  }
  std::printf("%s\t%s\n", name, wrong.empty() ? "ok" : wrong.c_str());
}

// Each test has kernels of its own: what one may use is kept as long as the process lives.
const char kernels[8] = {};

// The small launch comes between what the large one does to be allowed its memory, and the large launch.
std::string two_threads_two_shapes() {
  const void* kernel = &kernels[0];
  std::promise<void> large_is_about_to_launch, small_is_done;
  thread_local bool is_large = false;
  before_launching = [&] {
    if (!is_large) return;
    large_is_about_to_launch.set_value();
    small_is_done.get_future().wait();
  };
  std::string wrong;
  std::thread large([&] {
    is_large = true;
    wrong = said_of([&] { launch(kernel, 200 << 10); });
  });
  large_is_about_to_launch.get_future().wait();
  const std::string small = said_of([&] { launch(kernel, 60 << 10); });
  small_is_done.set_value();
  large.join();
  return wrong == "nothing" && small == "nothing" ? "" : "large: " + wrong + ", small: " + small;
}

std::string nobody_launches_before_it_is_set() {
  const void* kernel = &kernels[1];
  std::promise<void> begun;
  while_setting = [&] {
    if (times_set > 1) return;
    begun.set_value();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  };
  std::string first;
  std::thread other([&] { first = said_of([&] { launch(kernel, 100 << 10); }); });
  begun.get_future().wait();
  const std::string second = said_of([&] { launch(kernel, 100 << 10); });
  other.join();
  return first == "nothing" && second == "nothing" ? "" : "first: " + first + ", second: " + second;
}

std::string once_for_each_kernel_and_device() {
  for (int repeat = 0; repeat < 3; ++repeat)
    for (int kernel = 2; kernel < 4; ++kernel)
      for (device = 1; device >= 0; --device) launch(&kernels[kernel], 60 << 10);
  device = 0;
  for (int of = 0; of < 2; ++of)
    if (limits[{&kernels[2], of}] != kOptIn[of])
      return "not the most that device " + std::to_string(of) + " has";
  return times_set == 4 ? "" : "set " + std::to_string(times_set) + " times";
}

std::string little_is_not_asked_for() {
  launch(&kernels[4], 48 << 10);
  return times_set == 0 ? "" : "asked for";
}

std::string what_is_refused_is_asked_for_again() {
  refuse = true;
  const std::string said = said_of([] { launch(&kernels[5], 60 << 10); });
  launch(&kernels[5], 60 << 10);
  return said == "operation: CUDA says: invalid argument" && times_set == 2 ? "" : said;
}

std::string the_launch_is_the_one_asked_for() {
  int argument = 5;
  void* arguments[] = {&argument};
  vitdiv::cuda::launch("operation", &kernels[6], 7, 96, 1000, reinterpret_cast<void*>(0x40), arguments);
  const bool same = launched.gridDim.x == 7 && launched.gridDim.y == 1 && launched.blockDim.x == 96 &&
                    launched.dynamicSmemBytes == 1000 && given == arguments &&
                    launched.stream == reinterpret_cast<cudaStream_t>(0x40);
  return same ? "" : "another grid, stream or arguments";
}

std::string too_large_launches_are_refused() {
  const std::string shared = said_of([] { launch(&kernels[7], 228 << 10); });
  if (shared != "operation: CUDA says: invalid argument") return shared;
  try {
    launch(&kernels[7], 0, int64_t(1) << 31);
  } catch (const std::invalid_argument& error) {
    return std::string(error.what()).find("2147483648 blocks") == std::string::npos ? error.what() : "";
  }
  return "more blocks than a launch has are not refused";
}

std::string the_versions_are_the_runtimes() {
  return vitdiv::cuda_runtime_version() == 13000 && vitdiv::cuda_driver_version() == 12080 ? "" : "others";
}

}  // namespace

int main() {
  report("two threads, two shapes", two_threads_two_shapes);
  report("nobody launches before it is set", nobody_launches_before_it_is_set);
  report("once for each kernel and device", once_for_each_kernel_and_device);
  report("little is not asked for", little_is_not_asked_for);
  report("what is refused is asked for again", what_is_refused_is_asked_for_again);
  report("the launch is the one asked for", the_launch_is_the_one_asked_for);
  report("too large launches are refused", too_large_launches_are_refused);
  report("the versions are the runtime's", the_versions_are_the_runtimes);
}
