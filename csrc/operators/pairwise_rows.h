// The operators pairwise_logsumexp_{fwd,bwd} and pairwise_nearest, for the kernels of any device. What is
// saved for the backward is the device's own affair.
#pragma once

#include "../arguments/pairwise_rows.h"
#include "../common.h"

namespace vitdiv {

inline constexpr const char* kPairwiseRows[] = {
    "pairwise_logsumexp_fwd(Tensor x, Tensor? y, float scale, float eps, bool for_backward) -> "
    "(Tensor rows, Tensor saved)",
    "pairwise_logsumexp_bwd(Tensor drows, Tensor rows, Tensor x, Tensor? y, Tensor saved, float "
    "scale, float eps, bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
    "pairwise_nearest(Tensor x, Tensor? y, float eps) -> Tensor",
};

inline Kind fill_rows(c10::DeviceType device, RowsArgs& args, BatchOffsets& offsets, const at::Tensor& x,
                      const OptionalTensor& y, double scale, double eps) {
  const Kind kind = fill_sets(device, args, offsets, x, y);
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, got ", scale);
  args.scale = scale;
  args.eps = eps;
  args.threads = threads_for(double(args.L) * double(args.N) * double(args.M) * double(args.D));
  return kind;
}

// On CPUs, of two sets, the gradients for drows = 1.
template <class Device>
std::optional<Saved> saved_of(const RowsArgs& args, const at::Tensor& x, bool for_backward) {
  if (Device::kCudaKernels || !for_backward || !args.y.data) return std::nullopt;
  return Saved{{args.L * (args.N + args.M) * args.D}, accumulation_type(x)};
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> pairwise_logsumexp_fwd(const at::Tensor& x_given,
                                                          const OptionalTensor& y_given, double scale,
                                                          double eps, bool for_backward) {
  const at::Tensor x = Device::items(x_given);
  const OptionalTensor y = optional_items<Device>(y_given);
  LogSumExpForward args{};
  BatchOffsets offsets;
  fill_rows(Device::kType, args, offsets, x, y, scale, eps);
  const at::Tensor rows = empty(x, {args.L, args.N}, accumulation_type(x));
  args.rows = rows.data_ptr();
  const at::Tensor saved = new_saved(saved_of<Device>(args, x, for_backward), x, args.saved);
  Device::run(args, x);
  return {rows, saved};
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> pairwise_logsumexp_bwd(const at::Tensor& drows, const at::Tensor& rows,
                                                          const at::Tensor& x_given,
                                                          const OptionalTensor& y_given,
                                                          const at::Tensor& saved, double scale, double eps,
                                                          bool needs_dx, bool needs_dy) {
  const at::Tensor x = Device::items(x_given);
  const OptionalTensor y = optional_items<Device>(y_given);
  LogSumExpBackward args{};
  BatchOffsets offsets;
  fill_rows(Device::kType, args, offsets, x, y, scale, eps);
  const at::Tensor dense_drows = drows.contiguous();
  args.drows = array(dense_drows, "drows", {args.L, args.N}, accumulation_kind(x));
  args.rows = array(rows, "rows", {args.L, args.N}, accumulation_kind(x));
  args.saved = check_saved(saved_of<Device>(args, x, true), saved, x.device());
  const auto gradients = new_gradients(args, offsets, x_given, y_given, needs_dx, needs_dy);
  Device::run(args, x);
  return gradients;
}

template <class Device>
at::Tensor pairwise_nearest(const at::Tensor& x_given, const OptionalTensor& y_given, double eps) {
  const at::Tensor x = Device::items(x_given);
  const OptionalTensor y = optional_items<Device>(y_given);
  NearestForward args{};
  BatchOffsets offsets;
  fill_rows(Device::kType, args, offsets, x, y, 1, eps);
  const at::Tensor nearest = empty(x, {args.L, args.N}, at::kLong);
  args.nearest = nearest.mutable_data_ptr<int64_t>();
  Device::run(args, x);
  return nearest;
}

}  // namespace vitdiv
