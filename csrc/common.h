// From tensors to the kernels' arguments, with the checks that keep a direct call of an operator from reading or writing
// out of bounds. The public Python functions have said the same earlier and in their own argument's terms.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

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

inline void check_tensor(const at::Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.is_cpu(), name, " must be a CPU tensor, got one on ", t.device().str());
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", shape_text(sizes), ", got ",
                    shape_text(t.sizes()));
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must have dtype ", toString(dtype), ", got ",
                   toString(t.scalar_type()));
}

// The tensor itself if its last axis is contiguous, all that the kernels ask for; else a copy. Done here and not in Python,
// where torch.compile would trace it.
inline at::Tensor unit_stride(const at::Tensor& t) {
  return t.dim() == 0 || t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

inline OptionalTensor unit_stride(const OptionalTensor& t) { return t ? OptionalTensor(unit_stride(*t)) : t; }

// [B, H, rows, width] with any strides but a last one of 1.
inline HeadsView heads_view(const at::Tensor& t, const char* name, std::initializer_list<int64_t> sizes,
                            at::ScalarType dtype) {
  check_tensor(t, name, at::IntArrayRef(sizes), dtype);
  TORCH_CHECK_VALUE(t.stride(3) == 1 || t.size(3) == 1 || t.numel() == 0, name,
                    " must have a last stride of 1, got ", t.stride(3));
  return {t.data_ptr(), scalar_type(t, name), t.stride(0), t.stride(1), t.stride(2)};
}

// Of an output that was allocated as it must be.
inline HeadsView heads_view(const at::Tensor& t, const char* name) {
  return {t.data_ptr(), scalar_type(t, name), t.stride(0), t.stride(1), t.stride(2)};
}

inline HeadsView heads_view(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> sizes,
                            at::ScalarType dtype) {
  return t ? heads_view(*t, name, sizes, dtype) : HeadsView{nullptr, ScalarType::kFloat, 0, 0, 0};
}

inline void* array(const at::Tensor& t, const char* name, std::initializer_list<int64_t> sizes,
                   at::ScalarType dtype) {
  check_tensor(t, name, at::IntArrayRef(sizes), dtype);
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
  return t.data_ptr();
}

inline void* array(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> sizes,
                   at::ScalarType dtype) {
  return t ? array(*t, name, sizes, dtype) : nullptr;
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

// Threads for `work` multiply-adds: forking costs some microseconds, in which one thread does about 100,000.
inline int threads_for(double work) {
  if (at::in_parallel_region() || work < 2e5) return 1;
  return std::max(1, at::get_num_threads());
}

}  // namespace vitdiv
