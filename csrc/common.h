// From tensors to the kernels' arguments, with the checks that keep a direct call of an operator from reading
// or writing out of bounds. The public Python functions have said the same earlier and in their own
// argument's terms.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "arguments/views.h"

namespace vitdiv {

using OptionalTensor = std::optional<at::Tensor>;

inline std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline ScalarType scalar_type(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return ScalarType::kFloat;
    case at::kDouble: return ScalarType::kDouble;
    case at::kHalf: return ScalarType::kHalf;
    case at::kBFloat16: return ScalarType::kBFloat16;
    default: break;
  }
  TORCH_CHECK_TYPE(false, name, " must be float16, bfloat16, float32 or float64, got ",
                   toString(t.scalar_type()));
}

inline at::ScalarType accumulation_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// What the tensors of a call must have in common.
struct Kind {
  c10::Device device;
  at::ScalarType dtype;
};

// Of an operator's first tensor, which must be on the kind of device that the kernels are for.
inline Kind kind_of(const at::Tensor& t, const char* name, c10::DeviceType type) {
  TORCH_CHECK_VALUE(t.device().type() == type, name, " must be on ",
                    c10::DeviceTypeName(type, /*lower_case=*/true), ", got one on ", t.device().str());
  scalar_type(t, name);
  return {t.device(), t.scalar_type()};
}

inline Kind accumulation_kind(const at::Tensor& t) { return {t.device(), accumulation_type(t)}; }

inline void check_kind(const at::Tensor& t, const char* name, const Kind& kind) {
  TORCH_CHECK_VALUE(t.device() == kind.device, name, " must be on ", kind.device.str(), ", got one on ",
                    t.device().str());
  TORCH_CHECK_TYPE(t.scalar_type() == kind.dtype, name, " must have dtype ", toString(kind.dtype), ", got ",
                   toString(t.scalar_type()));
}

inline void check_tensor(const at::Tensor& t, const char* name, at::IntArrayRef sizes, const Kind& kind) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", shape_text(sizes), ", got ",
                    shape_text(t.sizes()));
  check_kind(t, name, kind);
}

// The tensor itself if its last axis is contiguous, all that the kernels ask for; else a copy. Done here and
// not in Python, where torch.compile would trace it.
inline at::Tensor unit_stride(const at::Tensor& t) {
  return t.dim() == 0 || t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

inline OptionalTensor unit_stride(const OptionalTensor& t) { return t ? OptionalTensor(unit_stride(*t)) : t; }

// [B, H, rows, width] with any strides but a last one of 1.
inline HeadsView heads_view(const at::Tensor& t, const char* name, std::initializer_list<int64_t> sizes,
                            const Kind& kind) {
  check_tensor(t, name, at::IntArrayRef(sizes), kind);
  TORCH_CHECK_VALUE(t.stride(3) == 1 || t.size(3) == 1 || t.numel() == 0, name,
                    " must have a last stride of 1, got ", t.stride(3));
  return {t.data_ptr(), scalar_type(t, name), t.stride(0), t.stride(1), t.stride(2)};
}

// Of an output that was allocated as it must be.
inline HeadsView heads_view(const at::Tensor& t, const char* name) {
  return {t.data_ptr(), scalar_type(t, name), t.stride(0), t.stride(1), t.stride(2)};
}

inline HeadsView heads_view(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> sizes,
                            const Kind& kind) {
  return t ? heads_view(*t, name, sizes, kind) : HeadsView{nullptr, ScalarType::kFloat, 0, 0, 0};
}

inline void* array(const at::Tensor& t, const char* name, at::IntArrayRef sizes, const Kind& kind) {
  check_tensor(t, name, sizes, kind);
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
  return t.data_ptr();
}

inline void* array(const OptionalTensor& t, const char* name, at::IntArrayRef sizes, const Kind& kind) {
  return t ? array(*t, name, sizes, kind) : nullptr;
}

inline at::Tensor empty(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype,
                        bool needed = true) {
  return at::empty(needed ? sizes : at::IntArrayRef({0}),
                   like.options().dtype(needed ? dtype : like.scalar_type()));
}

// The layout that heads_like of _layout.py gives: [B, N, H, d] where the model has its heads inside its
// tokens.
inline at::Tensor empty_heads(const at::Tensor& like, bool needed = true) {
  if (!needed) return empty(like, {0}, like.scalar_type());
  const int64_t H = like.size(1), N = like.size(2), d = like.size(3);
  const bool tokens_outside = like.stride(1) < like.stride(2);
  const int64_t row = std::max<int64_t>(d, 1), rows = std::max<int64_t>(N, 1),
                heads = std::max<int64_t>(H, 1);
  return at::empty_strided(like.sizes(),
                           tokens_outside ? at::IntArrayRef({rows * heads * row, row, heads * row, 1})
                                          : at::IntArrayRef({heads * rows * row, rows * row, row, 1}),
                           like.options());
}

// Where each item of a batch [..., N, D] begins, in elements.
inline std::vector<int64_t> item_offsets(const at::Tensor& t) {
  std::vector<int64_t> offsets{0};
  for (int64_t axis = 0; axis < t.dim() - 2; axis++) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * t.size(axis));
    for (int64_t offset : offsets)
      for (int64_t i = 0; i < t.size(axis); i++) next.push_back(offset + i * t.stride(axis));
    offsets = std::move(next);
  }
  return offsets;
}

// Keeps the offsets that the kernels' views point to.
struct BatchOffsets {
  std::vector<int64_t> x, y, dx, dy;
};

inline BatchView batch_view(const at::Tensor& t, const char* name, const Kind& kind,
                            std::vector<int64_t>& offsets) {
  TORCH_CHECK_VALUE(t.dim() >= 2, name, " must have shape [..., N, D], got ", shape_text(t.sizes()));
  check_kind(t, name, kind);
  TORCH_CHECK_VALUE(t.stride(-1) == 1 || t.size(-1) == 1 || t.numel() == 0, name,
                    " must have a last stride of 1, got ", t.stride(-1));
  offsets = item_offsets(t);
  return {t.data_ptr(), scalar_type(t, name), offsets.data(), t.stride(-2)};
}

// One set of vectors, or two of one width, and their sizes.
template <class Args>
Kind fill_sets(c10::DeviceType device, Args& args, BatchOffsets& offsets, const at::Tensor& x,
               const OptionalTensor& y) {
  const Kind kind = kind_of(x, "x", device);
  args.x = batch_view(x, "x", kind, offsets.x);
  args.y = {};
  if (y) {
    args.y = batch_view(*y, "y", kind, offsets.y);
    TORCH_CHECK_VALUE(
        y->dim() == x.dim() && y->size(-1) == x.size(-1) && offsets.y.size() == offsets.x.size(),
        "y must have x's shape but for its rows, got ", shape_text(y->sizes()), " beside ",
        shape_text(x.sizes()));
  }
  args.L = int64_t(offsets.x.size());
  args.N = x.size(-2);
  args.M = y ? y->size(-2) : args.N;
  args.D = x.size(-1);
  return kind;
}

// The gradients of x and y, and where kernels write them.
template <class Args>
std::tuple<at::Tensor, at::Tensor> new_gradients(Args& args, BatchOffsets& offsets, const at::Tensor& x,
                                                 const OptionalTensor& y, bool needs_dx, bool needs_dy) {
  TORCH_CHECK_VALUE(y || !needs_dy, "dy is asked for, but y is not given");
  const Kind kind{x.device(), x.scalar_type()};
  const at::Tensor dx = empty(x, x.sizes(), kind.dtype, needs_dx);
  const at::Tensor dy = empty(x, y ? y->sizes() : at::IntArrayRef({0}), kind.dtype, needs_dy);
  if (needs_dx) args.dx = batch_view(dx, "dx", kind, offsets.dx);
  if (needs_dy) args.dy = batch_view(dy, "dy", kind, offsets.dy);
  return {dx, dy};
}

// What the kernels of a device keep of a forward for its backward.
struct Saved {
  std::vector<int64_t> sizes;
  at::ScalarType dtype;
  bool zeros = false;
};

// A tensor without elements where nothing is kept.
inline at::Tensor new_saved(const std::optional<Saved>& saved, const at::Tensor& like, void*& pointer) {
  if (!saved) return empty(like, {0}, like.scalar_type());
  const at::TensorOptions options = like.options().dtype(saved->dtype);
  const at::Tensor kept = saved->zeros ? at::zeros(saved->sizes, options) : at::empty(saved->sizes, options);
  pointer = kept.data_ptr();
  return kept;
}

inline const void* check_saved(const std::optional<Saved>& saved, const at::Tensor& given,
                               c10::Device device) {
  return saved ? array(given, "saved", saved->sizes, {device, saved->dtype}) : nullptr;
}

// As the kernels of a device step through them.
template <class Device>
OptionalTensor optional_items(const OptionalTensor& y) {
  return y ? OptionalTensor(Device::items(*y)) : y;
}

// Threads for `work` multiply-adds: forking costs some microseconds, in which one thread does about 100,000.
inline int threads_for(double work) {
  if (at::in_parallel_region() || work < 2e5) return 1;
  return std::max(1, at::get_num_threads());
}

}  // namespace vitdiv
