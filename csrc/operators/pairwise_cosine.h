// The operators pairwise_cosine_{fwd,bwd}, for the kernels of any device. What is saved for the backward is
// the device's own affair; so is which batches its kernels can step through without a copy.
#pragma once

#include "../arguments/pairwise_cosine.h"
#include "../common.h"
#include "../cuda/kernels.h"

namespace vitdiv {

inline constexpr const char* kPairwiseCosine[] = {
    "pairwise_cosine_fwd(Tensor x, Tensor? y, str penalty, bool include_self, float eps, bool "
    "for_backward) -> (Tensor sums, Tensor saved)",
    "pairwise_cosine_bwd(Tensor dsums, Tensor x, Tensor? y, Tensor saved, str penalty, bool "
    "include_self, float eps, bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
};

inline Penalty penalty_of(const std::string& name) {
  if (name == "signed") return Penalty::kSigned;
  if (name == "abs") return Penalty::kAbs;
  if (name == "square") return Penalty::kSquare;
  TORCH_CHECK_VALUE(name == "relu", "penalty must be signed, abs, square or relu, got ", name);
  return Penalty::kRelu;
}

inline Kind fill_cosine(c10::DeviceType device, CosineArgs& args, BatchOffsets& offsets, const at::Tensor& x,
                        const OptionalTensor& y, const std::string& penalty, bool include_self, double eps) {
  const Kind kind = fill_sets(device, args, offsets, x, y);
  args.penalty = penalty_of(penalty);
  args.include_self = include_self;
  args.eps = eps;
  const bool closed = args.penalty == Penalty::kSigned;
  args.threads =
      threads_for(double(args.L) * double(args.N) * double(args.D) * (closed ? 1 : double(args.M)));
  return kind;
}

// On CPUs sums of unit rows, or two bits or one a pair, or nothing.
template <class Device>
std::optional<Saved> saved_of(const CosineArgs& args, const at::Tensor& x, bool for_backward) {
  if constexpr (Device::kCudaKernels) {
    if (!for_backward) return std::nullopt;
    return Saved{{cuda::pairwise_cosine_saved_words(args)}, at::kInt};
  } else {
    if (args.penalty == Penalty::kSigned)
      return Saved{{args.y.data ? 2 : 1, args.L, args.D}, accumulation_type(x)};
    if (!for_backward || args.penalty == Penalty::kSquare) return std::nullopt;
    const int64_t planes = args.penalty == Penalty::kAbs ? 2 : 1;
    return Saved{{args.L, args.N, planes, (args.M + 31) / 32}, at::kInt, true};
  }
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> pairwise_cosine_fwd(const at::Tensor& x_given,
                                                       const OptionalTensor& y_given, std::string penalty,
                                                       bool include_self, double eps, bool for_backward) {
  const at::Tensor x = Device::items(x_given);
  const OptionalTensor y = optional_items<Device>(y_given);
  CosineForward args{};
  BatchOffsets offsets;
  fill_cosine(Device::kType, args, offsets, x, y, penalty, include_self, eps);
  const at::Tensor sums = empty(x, {args.L}, accumulation_type(x));
  args.sums = sums.data_ptr();
  const at::Tensor saved = new_saved(saved_of<Device>(args, x, for_backward), x, args.saved);
  Device::run(args, x);
  return {sums, saved};
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> pairwise_cosine_bwd(const at::Tensor& dsums, const at::Tensor& x_given,
                                                       const OptionalTensor& y_given, const at::Tensor& saved,
                                                       std::string penalty, bool include_self, double eps,
                                                       bool needs_dx, bool needs_dy) {
  const at::Tensor x = Device::items(x_given);
  const OptionalTensor y = optional_items<Device>(y_given);
  CosineBackward args{};
  BatchOffsets offsets;
  fill_cosine(Device::kType, args, offsets, x, y, penalty, include_self, eps);
  const at::Tensor dsums_row = dsums.contiguous();
  args.dsums = array(dsums_row, "dsums", {args.L}, accumulation_kind(x));
  args.saved = check_saved(saved_of<Device>(args, x, true), saved, x.device());
  const auto gradients = new_gradients(args, offsets, x_given, y_given, needs_dx, needs_dy);
  Device::run(args, x);
  return gradients;
}

}  // namespace vitdiv
