// The operators over the CUDA kernels: what their calls have in common. `Queue` is where launches go; it makes a device the
// current one as long as it lives. Besides the GPU's own in library.cpp the tests have one that runs emulated kernels.
#pragma once

#include <torch/library.h>

#include <stdexcept>

#include "../operators/attention_gram.h"
#include "../operators/pairwise_cosine.h"
#include "../operators/pairwise_rows.h"
#include "../operators/reattention.h"
#include "../operators/two_gram.h"
#include "kernels.h"

namespace vitdiv {

template <class Queue>
struct Cuda {
  static constexpr c10::DeviceType kType = Queue::kType;

  // [items, N, D], the items at equal distances: a view where the leading axes are one in memory.
  static at::Tensor items(const at::Tensor& x) {
    if (x.dim() < 2) return x;
    const at::IntArrayRef leading = x.sizes().slice(0, x.dim() - 2);
    return unit_stride(x.reshape({c10::multiply_integers(leading), x.size(-2), x.size(-1)}));
  }
  static OptionalTensor new_saved(const CosineArgs& args, const at::Tensor& x, bool for_backward) {
    if (!for_backward) return std::nullopt;
    return at::empty({cuda::pairwise_cosine_saved_words(args)}, x.options().dtype(at::kInt));
  }
  static const void* check_saved(const CosineArgs& args, const at::Tensor& x, const at::Tensor& saved) {
    return array(saved, "saved", {cuda::pairwise_cosine_saved_words(args)}, {x.device(), at::kInt});
  }

  static OptionalTensor new_saved(const RowsArgs&, const at::Tensor&, bool) { return std::nullopt; }
  static const void* check_saved(const RowsArgs&, const at::Tensor&, const at::Tensor&) { return nullptr; }
  static OptionalTensor new_saved(const TwoGramArgs&, const at::Tensor&, bool, bool) { return std::nullopt; }
  static const void* check_saved(const TwoGramArgs&, const at::Tensor&, const at::Tensor&, bool, bool) {
    return nullptr;
  }

  static void run(const CosineForward& args, const at::Tensor& on) {
    launch(args, on, cuda::pairwise_cosine_fwd_scratch, cuda::pairwise_cosine_fwd);
  }
  static void run(const CosineBackward& args, const at::Tensor& on) {
    launch(args, on, cuda::pairwise_cosine_bwd_scratch, cuda::pairwise_cosine_bwd);
  }
  static void run(const LogSumExpForward& args, const at::Tensor& on) {
    launch(args, on, cuda::pairwise_logsumexp_fwd_scratch, cuda::pairwise_logsumexp_fwd);
  }
  static void run(const LogSumExpBackward& args, const at::Tensor& on) {
    launch(args, on, cuda::pairwise_logsumexp_bwd_scratch, cuda::pairwise_logsumexp_bwd);
  }
  static void run(const NearestForward& args, const at::Tensor& on) {
    launch(args, on, cuda::pairwise_nearest_scratch, cuda::pairwise_nearest);
  }
  static void run(const TwoGramForward& args, const at::Tensor& on) {
    launch(args, on, cuda::two_gram_fwd_scratch, cuda::two_gram_fwd);
  }
  static void run(const TwoGramBackward& args, const at::Tensor& on) {
    launch(args, on, cuda::two_gram_bwd_scratch, cuda::two_gram_bwd);
  }
  static void run(const GramForward& args, const at::Tensor& on) {
    launch(args, on, cuda::attention_gram_fwd_scratch, cuda::attention_gram_fwd);
  }
  static void run(const GramBackward& args, const at::Tensor& on) {
    launch(args, on, cuda::attention_gram_bwd_scratch, cuda::attention_gram_bwd);
  }
  static void run(const ReattentionForward& args, const at::Tensor& on) {
    launch(args, on, cuda::reattention_fwd_scratch, cuda::reattention_fwd);
  }
  static void run(const ReattentionBackward& args, const at::Tensor& on) {
    launch(args, on, cuda::reattention_bwd_scratch, cuda::reattention_bwd);
  }
  static void run(const HeadDots& args, const at::Tensor& on) {
    launch(args, on, cuda::head_dots_scratch, cuda::head_dots);
  }

 private:
  template <class Args>
  static void launch(const Args& args, const at::Tensor& on, int64_t (*scratch_bytes)(const Args&),
                     void (*kernels)(const Args&, void*, void*)) {
    try {
      Queue queue(on.device());
      // the allocator gives it to later work of the same stream only
      const at::Tensor scratch = at::empty({scratch_bytes(args)}, on.options().dtype(at::kByte));
      queue.run(kernels, args, scratch);
    } catch (const std::invalid_argument& refused) {
      TORCH_CHECK_VALUE(false, refused.what());
    }
  }
};

template <class Queue>
void register_cuda_operators(torch::Library& m) {
  using Device = Cuda<Queue>;
  m.impl("pairwise_cosine_fwd", &pairwise_cosine_fwd<Device>);
  m.impl("pairwise_cosine_bwd", &pairwise_cosine_bwd<Device>);
  m.impl("pairwise_logsumexp_fwd", &pairwise_logsumexp_fwd<Device>);
  m.impl("pairwise_logsumexp_bwd", &pairwise_logsumexp_bwd<Device>);
  m.impl("pairwise_nearest", &pairwise_nearest<Device>);
  m.impl("two_gram_fwd", &two_gram_fwd<Device>);
  m.impl("two_gram_bwd", &two_gram_bwd<Device>);
  m.impl("attention_gram_fwd", &attention_gram_fwd<Device>);
  m.impl("attention_gram_bwd", &attention_gram_bwd<Device>);
  m.impl("reattention_fwd", &reattention_fwd<Device>);
  m.impl("reattention_bwd", &reattention_bwd<Device>);
  m.impl("head_dots", &head_dots<Device>);
}

}  // namespace vitdiv
