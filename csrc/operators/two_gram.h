// The operators two_gram_{fwd,bwd}, for the kernels of any device. What is saved for the backward is the
// device's own affair.
#pragma once

#include "../arguments/two_gram.h"
#include "../common.h"

namespace vitdiv {

inline constexpr const char* kTwoGram[] = {
    "two_gram_fwd(Tensor x, Tensor? y, str penalty, float margin, bool normalise, float eps, bool "
    "needs_dx, bool needs_dy) -> (Tensor sums, Tensor saved)",
    "two_gram_bwd(Tensor dsums, Tensor x, Tensor? y, Tensor saved, str penalty, float margin, bool "
    "normalise, float eps, bool needs_dx, bool needs_dy) -> (Tensor dx, Tensor dy)",
};

inline GramPenalty gram_penalty_of(const std::string& name) {
  if (name == "square") return GramPenalty::kSquare;
  if (name == "relu_square") return GramPenalty::kReluSquare;
  if (name == "relu_teacher_square") return GramPenalty::kReluTeacherSquare;
  if (name == "clamped_teacher_square") return GramPenalty::kClampedTeacherSquare;
  if (name == "hinge") return GramPenalty::kHinge;
  TORCH_CHECK_VALUE(name == "product",
                    "penalty must be square, relu_square, relu_teacher_square, clamped_teacher_square, hinge "
                    "or product, got ",
                    name);
  return GramPenalty::kProduct;
}

// On CPUs the gradients for dsums = 1 that are wanted, x's before y's.
template <class Device>
std::optional<Saved> saved_of(const TwoGramArgs& args, const at::Tensor& x, bool needs_dx, bool needs_dy) {
  if (Device::kCudaKernels || !(needs_dx || needs_dy)) return std::nullopt;
  const int64_t widths = (needs_dx ? args.D : 0) + (needs_dy ? args.D2 : 0);
  return Saved{{args.L * args.N * widths}, accumulation_type(x)};
}

inline Kind fill_two_gram(c10::DeviceType device, TwoGramArgs& args, BatchOffsets& offsets,
                          const at::Tensor& x, const OptionalTensor& y, const std::string& penalty,
                          double margin, bool normalise, double eps, bool needs_dy) {
  const Kind kind = kind_of(x, "x", device);
  args.x = batch_view(x, "x", kind, offsets.x);
  args.y = {};
  args.D2 = 0;
  if (y) {
    args.y = batch_view(*y, "y", kind, offsets.y);
    TORCH_CHECK_VALUE(y->sizes().slice(0, y->dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                      "y must have x's shape but for its width, got ", shape_text(y->sizes()), " beside ",
                      shape_text(x.sizes()));
    args.D2 = y->size(-1);
  }
  TORCH_CHECK_VALUE(y || !needs_dy, "dy is asked for, but y is not given");
  args.L = int64_t(offsets.x.size());
  args.N = x.size(-2);
  args.D = x.size(-1);
  args.penalty = gram_penalty_of(penalty);
  args.margin = margin;
  args.normalise = normalise;
  args.eps = eps;
  args.threads = threads_for(double(args.L) * double(args.N) * double(args.N) * double(args.D + args.D2));
  return kind;
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> two_gram_fwd(const at::Tensor& x_given, const OptionalTensor& y_given,
                                                std::string penalty, double margin, bool normalise,
                                                double eps, bool needs_dx, bool needs_dy) {
  const at::Tensor x = Device::items(x_given);
  const OptionalTensor y = optional_items<Device>(y_given);
  TwoGramForward args{};
  BatchOffsets offsets;
  fill_two_gram(Device::kType, args, offsets, x, y, penalty, margin, normalise, eps, needs_dy);
  const at::Tensor sums = empty(x, {args.L}, accumulation_type(x));
  args.sums = sums.data_ptr();
  const at::Tensor saved = new_saved(saved_of<Device>(args, x, needs_dx, needs_dy), x, args.saved);
  args.needs_dx = needs_dx;
  args.needs_dy = needs_dy;
  Device::run(args, x);
  return {sums, saved};
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> two_gram_bwd(const at::Tensor& dsums, const at::Tensor& x_given,
                                                const OptionalTensor& y_given, const at::Tensor& saved,
                                                std::string penalty, double margin, bool normalise,
                                                double eps, bool needs_dx, bool needs_dy) {
  const at::Tensor x = Device::items(x_given);
  const OptionalTensor y = optional_items<Device>(y_given);
  TwoGramBackward args{};
  BatchOffsets offsets;
  fill_two_gram(Device::kType, args, offsets, x, y, penalty, margin, normalise, eps, needs_dy);
  const at::Tensor dense_dsums = dsums.contiguous();
  args.dsums = array(dense_dsums, "dsums", {args.L}, accumulation_kind(x));
  args.saved = check_saved(saved_of<Device>(args, x, needs_dx, needs_dy), saved, x.device());
  const auto gradients = new_gradients(args, offsets, x_given, y_given, needs_dx, needs_dy);
  Device::run(args, x);
  return gradients;
}

}  // namespace vitdiv
