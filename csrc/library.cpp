// The library libvitdiv: defines the operators and registers the CPU kernels; cuda/library.cpp registers the CUDA kernels.
// It needs torch and no Python, so that a C++ program that runs an exported model has only to load it.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <new>

#include "batch_norm.h"
#include "cpu/dispatch.h"
#include "facts.h"
#include "operators/attention_gram.h"
#include "operators/pairwise_cosine.h"
#include "operators/pairwise_rows.h"
#include "operators/reattention.h"
#include "operators/two_gram.h"

namespace vitdiv {
namespace {

const CpuKernels& cpu() {
  static const CpuKernels kernels = choose_cpu_kernels();
  return kernels;
}

void require_memory(bool done) {
  if (!done) throw std::bad_alloc();  // a Python MemoryError
}

struct Cpu {
  static constexpr c10::DeviceType kType = c10::kCPU;

  static at::Tensor items(const at::Tensor& x) { return unit_stride(x); }
  // Sums of unit rows, or two bits or one a pair, or nothing.
  static OptionalTensor new_saved(const CosineArgs& args, const at::Tensor& x, bool for_backward) {
    if (args.penalty == Penalty::kSigned)
      return empty(x, {args.y.data ? 2 : 1, args.L, args.D}, accumulation_type(x));
    if (!for_backward || args.penalty == Penalty::kSquare) return std::nullopt;
    return at::zeros({args.L, args.N, planes(args), (args.M + 31) / 32}, x.options().dtype(at::kInt));
  }
  static const void* check_saved(const CosineArgs& args, const at::Tensor& x, const at::Tensor& saved) {
    if (args.penalty == Penalty::kSquare) return nullptr;
    if (args.penalty == Penalty::kSigned)
      return array(saved, "saved", {args.y.data ? 2 : 1, args.L, args.D}, accumulation_kind(x));
    const Kind words{x.device(), at::kInt};
    return array(saved, "saved", {args.L, args.N, planes(args), (args.M + 31) / 32}, words);
  }

  static void run(const CosineForward& args, const at::Tensor&) {
    require_memory(cpu().pairwise_cosine_fwd(args));
  }
  static void run(const CosineBackward& args, const at::Tensor&) {
    require_memory(cpu().pairwise_cosine_bwd(args));
  }
  // Of two sets the gradients for drows = 1.
  static OptionalTensor new_saved(const RowsArgs& args, const at::Tensor& x, bool for_backward) {
    if (!for_backward || !args.y.data) return std::nullopt;
    return empty(x, {args.L * (args.N + args.M) * args.D}, accumulation_type(x));
  }
  static const void* check_saved(const RowsArgs& args, const at::Tensor& x, const at::Tensor& saved) {
    if (!args.y.data) return nullptr;
    return array(saved, "saved", {args.L * (args.N + args.M) * args.D}, accumulation_kind(x));
  }
  static void run(const LogSumExpForward& args, const at::Tensor&) {
    require_memory(cpu().pairwise_logsumexp_fwd(args));
  }
  static void run(const LogSumExpBackward& args, const at::Tensor&) {
    require_memory(cpu().pairwise_logsumexp_bwd(args));
  }
  static void run(const NearestForward& args, const at::Tensor&) {
    require_memory(cpu().pairwise_nearest(args));
  }

  // The gradients of x and y for dsums = 1.
  static OptionalTensor new_saved(const TwoGramArgs& args, const at::Tensor& x, bool needs_dx,
                                  bool needs_dy) {
    if (!needs_dx && !needs_dy) return std::nullopt;
    return empty(x, {two_gram_gradients(args, needs_dx, needs_dy)}, accumulation_type(x));
  }
  static const void* check_saved(const TwoGramArgs& args, const at::Tensor& x, const at::Tensor& saved,
                                 bool needs_dx, bool needs_dy) {
    if (!needs_dx && !needs_dy) return nullptr;
    return array(saved, "saved", {two_gram_gradients(args, needs_dx, needs_dy)}, accumulation_kind(x));
  }
  static void run(const TwoGramForward& args, const at::Tensor&) { require_memory(cpu().two_gram_fwd(args)); }
  static void run(const TwoGramBackward& args, const at::Tensor&) {
    require_memory(cpu().two_gram_bwd(args));
  }
  static void run(const GramForward& args, const at::Tensor&) {
    require_memory(cpu().attention_gram_fwd(args));
  }
  static void run(const GramBackward& args, const at::Tensor&) {
    require_memory(cpu().attention_gram_bwd(args));
  }
  static void run(const ReattentionForward& args, const at::Tensor&) {
    require_memory(cpu().reattention_fwd(args));
  }
  static void run(const ReattentionBackward& args, const at::Tensor&) {
    require_memory(cpu().reattention_bwd(args));
  }
  static void run(const HeadDots& args, const at::Tensor&) { require_memory(cpu().head_dots(args)); }

 private:
  static int64_t planes(const CosineArgs& args) { return args.penalty == Penalty::kAbs ? 2 : 1; }
};

}  // namespace

std::string cpu_capability() { return cpu().capability; }
int num_threads() { return cpu().count_threads(at::get_num_threads()); }

}  // namespace vitdiv

// The same as in vitdiv_kernels/ops, for the Triton kernels; tests/ops/test_operators.py compares.
TORCH_LIBRARY(vitdiv, m) {
  const auto define = [&m](const auto& schemas) {
    for (const char* schema : schemas) m.def(schema);
  };
  define(vitdiv::kPairwiseCosine);
  define(vitdiv::kPairwiseRows);
  define(vitdiv::kTwoGram);
  define(vitdiv::kAttentionGram);
  define(vitdiv::kReattention);
  define(vitdiv::kBatchNorm);
}

TORCH_LIBRARY_IMPL(vitdiv, CPU, m) {
  m.impl("pairwise_cosine_fwd", &vitdiv::pairwise_cosine_fwd<vitdiv::Cpu>);
  m.impl("pairwise_cosine_bwd", &vitdiv::pairwise_cosine_bwd<vitdiv::Cpu>);
  m.impl("pairwise_logsumexp_fwd", &vitdiv::pairwise_logsumexp_fwd<vitdiv::Cpu>);
  m.impl("pairwise_logsumexp_bwd", &vitdiv::pairwise_logsumexp_bwd<vitdiv::Cpu>);
  m.impl("pairwise_nearest", &vitdiv::pairwise_nearest<vitdiv::Cpu>);
  m.impl("two_gram_fwd", &vitdiv::two_gram_fwd<vitdiv::Cpu>);
  m.impl("two_gram_bwd", &vitdiv::two_gram_bwd<vitdiv::Cpu>);
  m.impl("attention_gram_fwd", &vitdiv::attention_gram_fwd<vitdiv::Cpu>);
  m.impl("attention_gram_bwd", &vitdiv::attention_gram_bwd<vitdiv::Cpu>);
  m.impl("reattention_fwd", &vitdiv::reattention_fwd<vitdiv::Cpu>);
  m.impl("reattention_bwd", &vitdiv::reattention_bwd<vitdiv::Cpu>);
  m.impl("head_dots", &vitdiv::head_dots<vitdiv::Cpu>);
  m.impl("batch_norm_fwd", &vitdiv::batch_norm_fwd);
  m.impl("batch_norm_coupling", &vitdiv::batch_norm_coupling);
  m.impl("batch_norm_bwd", &vitdiv::batch_norm_bwd);
}
