// The kernels, emulated, behind a C interface for tests/support/emulated_cuda.py. A function returns null or what went wrong.
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
void emulation_allow(const void* memory, int64_t bytes, int writable, int initialised) {
  emulation::allow(memory, bytes, writable, initialised);
}
void emulation_forbid_all() { emulation::forbid_all(); }
void emulation_take_counts(uint64_t* counts) {
  static_assert(sizeof(emulation::Counts) == 10 * sizeof(uint64_t));
  std::memcpy(counts, &emulation::counts, sizeof(emulation::Counts));
  emulation::counts = {};
}

int64_t attention_gram_fwd_size() { return sizeof(vitdiv::GramForward); }
int64_t attention_gram_fwd_scratch(const vitdiv::GramForward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::attention_gram_fwd_scratch(*args); });
}
const char* attention_gram_fwd(const vitdiv::GramForward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::attention_gram_fwd(*args, scratch, nullptr); });
}

int64_t attention_gram_bwd_size() { return sizeof(vitdiv::GramBackward); }
int64_t attention_gram_bwd_scratch(const vitdiv::GramBackward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::attention_gram_bwd_scratch(*args); });
}
const char* attention_gram_bwd(const vitdiv::GramBackward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::attention_gram_bwd(*args, scratch, nullptr); });
}

int64_t pairwise_cosine_saved_words(const vitdiv::CosineForward* args) {
  return vitdiv::cuda::pairwise_cosine_saved_words(*args);
}
int64_t pairwise_cosine_fwd_size() { return sizeof(vitdiv::CosineForward); }
int64_t pairwise_cosine_fwd_scratch(const vitdiv::CosineForward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::pairwise_cosine_fwd_scratch(*args); });
}
const char* pairwise_cosine_fwd(const vitdiv::CosineForward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::pairwise_cosine_fwd(*args, scratch, nullptr); });
}

int64_t pairwise_cosine_bwd_size() { return sizeof(vitdiv::CosineBackward); }
int64_t pairwise_cosine_bwd_scratch(const vitdiv::CosineBackward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::pairwise_cosine_bwd_scratch(*args); });
}
const char* pairwise_cosine_bwd(const vitdiv::CosineBackward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::pairwise_cosine_bwd(*args, scratch, nullptr); });
}

int64_t pairwise_logsumexp_fwd_size() { return sizeof(vitdiv::LogSumExpForward); }
int64_t pairwise_logsumexp_fwd_scratch(const vitdiv::LogSumExpForward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::pairwise_logsumexp_fwd_scratch(*args); });
}
const char* pairwise_logsumexp_fwd(const vitdiv::LogSumExpForward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::pairwise_logsumexp_fwd(*args, scratch, nullptr); });
}

int64_t pairwise_logsumexp_bwd_size() { return sizeof(vitdiv::LogSumExpBackward); }
int64_t pairwise_logsumexp_bwd_scratch(const vitdiv::LogSumExpBackward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::pairwise_logsumexp_bwd_scratch(*args); });
}
const char* pairwise_logsumexp_bwd(const vitdiv::LogSumExpBackward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::pairwise_logsumexp_bwd(*args, scratch, nullptr); });
}

int64_t pairwise_nearest_size() { return sizeof(vitdiv::NearestForward); }
int64_t pairwise_nearest_scratch(const vitdiv::NearestForward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::pairwise_nearest_scratch(*args); });
}
const char* pairwise_nearest(const vitdiv::NearestForward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::pairwise_nearest(*args, scratch, nullptr); });
}

int64_t two_gram_fwd_size() { return sizeof(vitdiv::TwoGramForward); }
int64_t two_gram_fwd_scratch(const vitdiv::TwoGramForward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::two_gram_fwd_scratch(*args); });
}
const char* two_gram_fwd(const vitdiv::TwoGramForward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::two_gram_fwd(*args, scratch, nullptr); });
}

int64_t two_gram_bwd_size() { return sizeof(vitdiv::TwoGramBackward); }
int64_t two_gram_bwd_scratch(const vitdiv::TwoGramBackward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::two_gram_bwd_scratch(*args); });
}
const char* two_gram_bwd(const vitdiv::TwoGramBackward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::two_gram_bwd(*args, scratch, nullptr); });
}

int64_t reattention_fwd_size() { return sizeof(vitdiv::ReattentionForward); }
int64_t reattention_fwd_scratch(const vitdiv::ReattentionForward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::reattention_fwd_scratch(*args); });
}
const char* reattention_fwd(const vitdiv::ReattentionForward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::reattention_fwd(*args, scratch, nullptr); });
}

int64_t reattention_bwd_size() { return sizeof(vitdiv::ReattentionBackward); }
int64_t reattention_bwd_scratch(const vitdiv::ReattentionBackward* args) {
  return guarded_bytes([&] { return vitdiv::cuda::reattention_bwd_scratch(*args); });
}
const char* reattention_bwd(const vitdiv::ReattentionBackward* args, void* scratch) {
  return guarded([&] { vitdiv::cuda::reattention_bwd(*args, scratch, nullptr); });
}
}
