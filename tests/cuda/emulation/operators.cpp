// The operators of csrc/cuda/operators.h over emulated kernels, for CPU tensors, and some that set how kernels
// run and tell what they did: tests/support/emulated_operators.py declares the operators in the namespace
// vitdiv_emulated, links the kernels and includes memory/*.h before this file.
#include "../../../csrc/cuda/operators.h"

#include "memory.h"

namespace vitdiv {
namespace {

class Emulated {
 public:
  static constexpr c10::DeviceType kType = c10::kCPU;

  explicit Emulated(c10::Device) {}
  ~Emulated() { emulation::forbid_all(); }

  template <class Args>
  void run(void (*kernels)(const Args&, void*, void*), const Args& args, const at::Tensor& scratch) {
    allow_all(args);
    allow(scratch.data_ptr(), scratch.numel(), true);
    kernels(args, scratch.data_ptr(), nullptr);
  }
};

void configure(int64_t order, int64_t seed, int64_t shared_limit, bool as_hardware, int64_t withheld,
               int64_t workspace) {
  emulation::config = {
      static_cast<emulation::Order>(order), unsigned(seed), shared_limit, as_hardware, withheld, workspace};
}

c10::Dict<std::string, int64_t> take_counts() {
  const emulation::Counts c = std::exchange(emulation::counts, {});
  c10::Dict<std::string, int64_t> counts;
  const std::pair<const char*, uint64_t> taken[] = {{"mma", c.mma},
                                                    {"ldmatrix", c.ldmatrix},
                                                    {"ldmatrix_rounds", c.ldmatrix_rounds},
                                                    {"shuffles", c.shuffles},
                                                    {"barriers", c.barriers},
                                                    {"shared_bytes", c.shared_bytes},
                                                    {"global_bytes", c.global_bytes},
                                                    {"copied_bytes", c.copied_bytes},
                                                    {"launches", c.launches},
                                                    {"switches", c.switches}};
  for (const auto& [name, count] : taken) counts.insert(name, int64_t(count));
  return counts;
}

void record(bool on) {
  emulation::recording = on;
  emulation::launches.clear();
}

// Of recorded launch i: the kernel's address, blocks, threads, bytes of shared memory; the arguments' bytes.
std::tuple<std::vector<int64_t>, at::Tensor> launch(int64_t i) {
  const emulation::Launch& found = emulation::launches.at(i);
  const at::Tensor arguments = at::empty(int64_t(found.arguments.size()), at::kByte);
  std::memcpy(arguments.data_ptr(), found.arguments.data(), found.arguments.size());
  return {{reinterpret_cast<int64_t>(found.kernel), found.blocks, found.threads, found.shared_bytes},
          arguments};
}

int64_t launches() { return int64_t(emulation::launches.size()); }

}  // namespace
}  // namespace vitdiv

TORCH_LIBRARY_IMPL(vitdiv_emulated, CPU, m) { vitdiv::register_operators<vitdiv::Cuda<vitdiv::Emulated>>(m); }
TORCH_LIBRARY_FRAGMENT(vitdiv_emulated, m) {
  m.def("configure", vitdiv::configure);
  m.def("take_counts", vitdiv::take_counts);
  m.def("record", vitdiv::record);
  m.def("launches", vitdiv::launches);
  m.def("launch", vitdiv::launch);
}
