// The kernels, emulated, behind a C interface for tests/support/emulated_cuda.py. A function returns null or
// what went wrong.
#include "../../../csrc/cuda/kernels.h"
#include "emulation.h"

namespace {
thread_local std::string message;

template <class Call>
const char* guarded(Call call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

template <class Call>
int64_t guarded_bytes(Call call) {  // 0: the call that follows says what is wrong
  int64_t bytes = 0;
  guarded([&] { bytes = call(); });
  return bytes;
}
}  // namespace

extern "C" {

void emulation_configure(int order, unsigned seed, int64_t shared_limit, int as_hardware) {
  emulation::config = {static_cast<emulation::Order>(order), seed, shared_limit, as_hardware != 0};
}
void emulation_configure_workspace(int64_t bytes) { emulation::config.workspace = bytes; }
void emulation_allow(const void* memory, int64_t bytes, int writable, int initialised) {
  emulation::allow(memory, bytes, writable, initialised);
}
void emulation_forbid_all() { emulation::forbid_all(); }
void emulation_take_counts(uint64_t* counts) {
  static_assert(sizeof(emulation::Counts) == 10 * sizeof(uint64_t));
  std::memcpy(counts, &emulation::counts, sizeof(emulation::Counts));
  emulation::counts = {};
}

int64_t pairwise_cosine_saved_words(const vitdiv::CosineForward* args) {
  return vitdiv::cuda::pairwise_cosine_saved_words(*args);
}

#define VITDIV_FUNCTIONS(operation, name, Args)                                \
  int64_t name##_size() { return sizeof(vitdiv::Args); }                       \
  int64_t name##_scratch(const vitdiv::Args* args) {                           \
    return guarded_bytes([&] { return vitdiv::cuda::name##_scratch(*args); }); \
  }                                                                            \
  const char* name(const vitdiv::Args* args, void* scratch) {                  \
    return guarded([&] { vitdiv::cuda::name(*args, scratch, nullptr); });      \
  }
VITDIV_KERNELS(VITDIV_FUNCTIONS)
}
