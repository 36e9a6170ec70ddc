// The operators pairwise_cosine_{fwd,bwd}, for the kernels of any device. What is saved for the backward is the device's own
// affair; so is which batches its kernels can step through without a copy.
#pragma once

#include "../common.h"

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
  const OptionalTensor saved = Device::new_saved(args, x, for_backward);
  args.sums = sums.data_ptr();
  args.saved = saved ? saved->data_ptr() : nullptr;
  Device::run(args, x);
  return {sums, saved ? *saved : empty(x, {0}, x.scalar_type())};
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
  const Kind kind = fill_cosine(Device::kType, args, offsets, x, y, penalty, include_self, eps);
  const at::Tensor dsums_row = dsums.contiguous();
  args.dsums = array(dsums_row, "dsums", {args.L}, accumulation_kind(x));
  args.saved = Device::check_saved(args, x, saved);
  TORCH_CHECK_VALUE(y || !needs_dy, "dy is asked for, but y is not given");
  const at::Tensor dx = empty(x, x_given.sizes(), x.scalar_type(), needs_dx);
  const at::Tensor dy =
      empty(x, y_given ? y_given->sizes() : at::IntArrayRef({0}), x.scalar_type(), needs_dy);
  if (needs_dx) args.dx = batch_view(dx, "dx", kind, offsets.dx);
  if (needs_dy) args.dy = batch_view(dy, "dy", kind, offsets.dy);
  Device::run(args, x);
  return {dx, dy};
}

}  // namespace vitdiv
