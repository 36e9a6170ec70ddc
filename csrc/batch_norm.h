// Batch norm on the mixed maps of re-attention, of which everything is H x H:
// vitdiv_kernels/ops/maps/reattention/fold.py says the maths and does the same with torch. A dozen small
// torch calls cost some 5 us each, more than the maths; hence these.
#pragma once

#include <ATen/ops/empty.h>

#include <cmath>

#include "common.h"

namespace vitdiv {

inline constexpr const char* kBatchNorm[] = {
    "batch_norm_fwd(Tensor gram, Tensor mix, Tensor? mix_bias, Tensor? norm_weight, SymInt queries, "
    "SymInt keys, float eps, float out_scale) -> (Tensor mean, Tensor var, Tensor unbiased_var, "
    "Tensor mixed_covariance, Tensor gain)",
    "batch_norm_coupling(Tensor dots, Tensor var, Tensor mix, SymInt count, float eps) -> (Tensor "
    "dvar, Tensor coupling)",
    "batch_norm_bwd(Tensor dweight, Tensor mix, Tensor? norm_weight, Tensor var, Tensor "
    "mixed_covariance, Tensor? dvar, float eps, float out_scale) -> (Tensor dmix, Tensor "
    "dnorm_weight)",
    "batch_norm_gain_bwd(Tensor dgain, Tensor mix, Tensor? norm_weight, Tensor var, Tensor "
    "mixed_covariance, SymInt count, float eps, float out_scale) -> (Tensor dgram, Tensor dmix, "
    "Tensor dnorm_weight)",
};

using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
void statistics_of(int64_t B, int64_t H, double count, double keys, const T* gram, const T* mix,
                   const T* mix_bias, const T* norm_weight, double eps, double out_scale, T* mean, T* var,
                   T* unbiased_var, T* mixed_covariance, T* gain) {
  std::vector<double> covariance(H * H);
  for (int64_t b = 0; b < B; b++)
    for (int64_t x = 0; x < H * H; x++) covariance[x] += double(gram[b * H * H + x]);
  for (int64_t g = 0; g < H; g++) {
    const T* row = mix + g * H;
    double total = 0, variance = 0;
    for (int64_t h = 0; h < H; h++) {
      double mixed = 0;
      for (int64_t k = 0; k < H; k++) mixed += double(row[k]) * covariance[k * H + h];
      mixed /= count;
      mixed_covariance[g * H + h] = T(mixed);
      total += double(row[h]);
      variance += double(row[h]) * mixed;
    }
    mean[g] = T(total / keys + (mix_bias ? double(mix_bias[g]) : 0));
    var[g] = T(variance);
    unbiased_var[g] = T(variance * (count / (count - 1)));
    gain[g] = T(out_scale * (norm_weight ? double(norm_weight[g]) : 1) / std::sqrt(variance + eps));
  }
}

// dvar [H], and what it adds to the coupling of the maps' Gram matrix: [1, H, H].
template <class T>
void coupling_of(int64_t H, double count, const T* dots, const T* var, const T* mix, double eps, T* dvar,
                 T* coupling) {
  for (int64_t g = 0; g < H; g++) dvar[g] = T(-0.5 * double(dots[g]) / (double(var[g]) + eps));
  for (int64_t h = 0; h < H; h++)
    for (int64_t k = 0; k < H; k++) {
      double sum = 0;
      for (int64_t g = 0; g < H; g++)
        sum += double(mix[g * H + h]) * double(dvar[g]) * double(mix[g * H + k]);
      coupling[h * H + k] = T(2 * sum / count);
    }
}

// dmix and dnorm_weight from the gradient of gain * mix.
template <class T>
void gradients_of(int64_t H, const T* dweight, const T* mix, const T* norm_weight, const T* var,
                  const T* mixed_covariance, const T* dvar, double eps, double out_scale, T* dmix,
                  T* dnorm_weight) {
  for (int64_t g = 0; g < H; g++) {
    const double rstd = out_scale / std::sqrt(double(var[g]) + eps);
    const double gain = rstd * (norm_weight ? double(norm_weight[g]) : 1);
    double dgain = 0;
    for (int64_t x = g * H; x < (g + 1) * H; x++) {
      dgain += double(dweight[x]) * double(mix[x]);
      dmix[x] = T(gain * double(dweight[x]) + (dvar ? 2 * double(dvar[g]) * double(mixed_covariance[x]) : 0));
    }
    dnorm_weight[g] = T(dgain * rstd);
  }
}

// The maps' Gram matrices [B, H, H] to the mixed maps' mean, variance, unbiased variance [H], mix times the
// maps' covariance [H, H], and what batch norm and out_scale multiply a mixed map by [H].
inline Tensors5 batch_norm_fwd(const at::Tensor& gram_given, const at::Tensor& mix,
                               const OptionalTensor& mix_bias, const OptionalTensor& norm_weight,
                               int64_t queries, int64_t keys, double eps, double out_scale) {
  TORCH_CHECK_VALUE(gram_given.dim() == 3, "gram must have shape [B, H, H], got ",
                    shape_text(gram_given.sizes()));
  const at::Tensor gram = gram_given.contiguous();
  const int64_t B = gram.size(0), H = gram.size(1);
  const Kind kind{c10::kCPU, accumulation_type(gram)};
  const auto vector = [&] { return at::empty({H}, gram.options()); };
  const at::Tensor mean = vector(), var = vector(), unbiased_var = vector(), gain = vector();
  const at::Tensor mixed_covariance = at::empty({H, H}, gram.options());
  const double count = std::max(1.0, double(B) * double(queries) * double(keys));  // 1 for an empty batch
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](void* p) { return static_cast<const T*>(p); };
    statistics_of<T>(B, H, count, double(keys), in(array(gram, "gram", {B, H, H}, kind)),
                     in(array(mix, "mix", {H, H}, kind)), in(array(mix_bias, "mix_bias", {H}, kind)),
                     in(array(norm_weight, "norm_weight", {H}, kind)), eps, out_scale, mean.data_ptr<T>(),
                     var.data_ptr<T>(), unbiased_var.data_ptr<T>(), mixed_covariance.data_ptr<T>(),
                     gain.data_ptr<T>());
  };
  kind.dtype == at::kDouble ? run(double()) : run(float());
  return {mean, var, unbiased_var, mixed_covariance, gain};
}

inline std::tuple<at::Tensor, at::Tensor> batch_norm_coupling(const at::Tensor& dots, const at::Tensor& var,
                                                              const at::Tensor& mix, int64_t count,
                                                              double eps) {
  const int64_t H = dots.numel();
  const Kind kind{c10::kCPU, accumulation_type(dots)};
  const at::Tensor dvar = at::empty({H}, dots.options()), coupling = at::empty({1, H, H}, dots.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](void* p) { return static_cast<const T*>(p); };
    coupling_of<T>(H, double(count), in(array(dots, "dots", {H}, kind)), in(array(var, "var", {H}, kind)),
                   in(array(mix, "mix", {H, H}, kind)), eps, dvar.data_ptr<T>(), coupling.data_ptr<T>());
  };
  kind.dtype == at::kDouble ? run(double()) : run(float());
  return {dvar, coupling};
}

inline std::tuple<at::Tensor, at::Tensor> batch_norm_bwd(const at::Tensor& dweight, const at::Tensor& mix,
                                                         const OptionalTensor& norm_weight,
                                                         const at::Tensor& var,
                                                         const at::Tensor& mixed_covariance,
                                                         const OptionalTensor& dvar, double eps,
                                                         double out_scale) {
  const int64_t H = var.numel();
  const Kind kind{c10::kCPU, accumulation_type(dweight)};
  const at::Tensor dmix = at::empty({H, H}, var.options()), dnorm_weight = at::empty({H}, var.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](void* p) { return static_cast<const T*>(p); };
    gradients_of<T>(H, in(array(dweight, "dweight", {H, H}, kind)), in(array(mix, "mix", {H, H}, kind)),
                    in(array(norm_weight, "norm_weight", {H}, kind)), in(array(var, "var", {H}, kind)),
                    in(array(mixed_covariance, "mixed_covariance", {H, H}, kind)),
                    in(array(dvar, "dvar", {H}, kind)), eps, out_scale, dmix.data_ptr<T>(),
                    dnorm_weight.data_ptr<T>());
  };
  kind.dtype == at::kDouble ? run(double()) : run(float());
  return {dmix, dnorm_weight};
}

}  // namespace vitdiv
