// The operators reattention_{fwd,bwd} and head_dots, for the kernels of any device.
#pragma once

#include "../arguments/reattention.h"
#include "../common.h"

namespace vitdiv {

inline constexpr const char* kReattention[] = {
    "reattention_fwd(Tensor q, Tensor k, Tensor v, float scale, Tensor? pre_mix, Tensor? pre_bias, "
    "Tensor folded_mix, Tensor? folded_bias, bool centred, Tensor? norm_weight, Tensor? norm_bias, float "
    "eps, bool "
    "needs_out, bool needs_gram) -> (Tensor out, Tensor gram)",
    "reattention_bwd(Tensor? dout, Tensor? coupling, Tensor q, Tensor k, Tensor v, float scale, "
    "Tensor? pre_mix, Tensor? pre_bias, Tensor folded_mix, Tensor? folded_bias, bool centred, Tensor? "
    "norm_weight, "
    "Tensor? norm_bias, float eps, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor "
    "dpre_mix, Tensor dfolded_mix, Tensor dfolded_bias, Tensor dnorm_weight, Tensor dnorm_bias)",
    "head_dots(Tensor x, Tensor y) -> Tensor",
};

inline void fill_reattention(c10::DeviceType device, ReattentionArgs& args, const at::Tensor& q,
                             const at::Tensor& k, const at::Tensor& v, double scale,
                             const OptionalTensor& pre_mix, const OptionalTensor& pre_bias,
                             const at::Tensor& folded_mix, const OptionalTensor& folded_bias, bool centred,
                             const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have shape [B, H, N, d]");
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2), d = q.size(3), dv = v.size(3);
  TORCH_CHECK_VALUE(H <= 256, "q must have at most 256 heads for the compiled kernels, got ", H);
  TORCH_CHECK_VALUE(N > 0 && M > 0, "q and k must have at least one query and key");
  TORCH_CHECK_VALUE(v.size(3) == d, "v must have the head width of q, ", d, ", got ", v.size(3));
  TORCH_CHECK_VALUE(norm_weight.has_value() == norm_bias.has_value(),
                    "norm_weight and norm_bias must be given together");
  args.B = B, args.H = H, args.N = N, args.M = M, args.d = d, args.dv = dv;
  const Kind kind = kind_of(q, "q", device), acc = accumulation_kind(q);
  args.q = heads_view(q, "q", {B, H, N, d}, kind);
  args.k = heads_view(k, "k", {B, H, M, d}, kind);
  args.v = heads_view(v, "v", {B, H, M, dv}, kind);
  args.scale = scale;
  args.pre_mix = array(pre_mix, "pre_mix", {H, H}, acc);
  args.pre_bias = array(pre_bias, "pre_bias", {H}, acc);
  args.folded_mix = array(folded_mix, "folded_mix", {H, H}, acc);
  args.folded_bias = array(folded_bias, "folded_bias", {H}, acc);
  args.centred = centred;
  args.norm_weight = array(norm_weight, "norm_weight", {H}, acc);
  args.norm_bias = array(norm_bias, "norm_bias", {H}, acc);
  args.eps = eps;
  args.threads = threads_for(double(B * H) * double(N * M) * double(d + dv));
}

template <class Device>
std::tuple<at::Tensor, at::Tensor> reattention_fwd(
    const at::Tensor& q_given, const at::Tensor& k_given, const at::Tensor& v_given, double scale,
    const OptionalTensor& pre_mix, const OptionalTensor& pre_bias, const at::Tensor& folded_mix,
    const OptionalTensor& folded_bias, bool centred, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double eps, bool needs_out, bool needs_gram) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given), v = unit_stride(v_given);
  ReattentionForward args{};
  fill_reattention(Device::kType, args, q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred,
                   norm_weight, norm_bias, eps);
  const at::Tensor out = empty_heads(q_given, needs_out);
  const at::Tensor gram = empty(q, {args.B, args.H, args.H}, accumulation_type(q), needs_gram);
  if (needs_out) args.out = heads_view(out, "out");
  if (needs_gram) args.gram = gram.data_ptr();
  Device::run(args, q);
  return {out, gram};
}

using Tensors8 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                            at::Tensor, at::Tensor>;

// needs: dq, dk, dv, dpre_mix, dfolded_mix (with dfolded_bias), dnorm (weight and bias)
template <class Device>
Tensors8 reattention_bwd(const OptionalTensor& dout_given, const OptionalTensor& coupling,
                         const at::Tensor& q_given, const at::Tensor& k_given, const at::Tensor& v_given,
                         double scale, const OptionalTensor& pre_mix, const OptionalTensor& pre_bias,
                         const at::Tensor& folded_mix, const OptionalTensor& folded_bias, bool centred,
                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                         c10::List<bool> needs) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given), v = unit_stride(v_given);
  const OptionalTensor dout = unit_stride(dout_given);
  ReattentionBackward args{};
  fill_reattention(Device::kType, args, q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred,
                   norm_weight, norm_bias, eps);
  TORCH_CHECK_VALUE(needs.size() == 6, "needs must name dq, dk, dv, dpre_mix, dfolded_mix and dnorm");
  const bool needs_dv = needs[2], needs_dpre_mix = needs[3], needs_dfolded_mix = needs[4],
             needs_dnorm = needs[5];
  TORCH_CHECK_VALUE(!needs_dpre_mix || pre_mix, "dpre_mix is asked for, but pre_mix is not given");
  TORCH_CHECK_VALUE(!needs_dnorm || norm_weight, "dnorm is asked for, but norm_weight is not given");
  TORCH_CHECK_VALUE(dout || coupling, "dout or coupling must be given");
  TORCH_CHECK_VALUE(dout || !(needs_dv || needs_dfolded_mix || needs_dnorm),
                    "dout must be given for these gradients");
  const int64_t B = args.B, H = args.H;
  const Kind kind{q.device(), q.scalar_type()}, acc = accumulation_kind(q);
  args.dout = heads_view(dout, "dout", {B, H, args.N, args.dv}, kind);
  const OptionalTensor coupling_rows = coupling ? OptionalTensor(coupling->contiguous()) : coupling;
  if (coupling_rows) {
    const int64_t images = coupling_rows->dim() == 3 && coupling_rows->size(0) == 1 ? 1 : B;
    args.coupling = array(*coupling_rows, "coupling", {images, H, H}, acc);
    args.coupling_stride_b = images == B ? H * H : 0;
  }
  const at::Tensor dq = empty_heads(q_given, needs[0]), dk = empty_heads(k_given, needs[1]),
                   dv = empty_heads(v_given, needs_dv);
  if (needs[0]) args.dq = heads_view(dq, "dq");
  if (needs[1]) args.dk = heads_view(dk, "dk");
  if (needs_dv) args.dv_out = heads_view(dv, "dv");
  const auto parameter = [&](at::IntArrayRef sizes, bool needed, void*& pointer) {
    const at::Tensor gradient = empty(q, sizes, acc.dtype, needed);
    pointer = needed ? gradient.data_ptr() : nullptr;
    return gradient;
  };
  const at::Tensor dpre_mix = parameter({H, H}, needs_dpre_mix, args.dpre_mix);
  const at::Tensor dfolded_mix = parameter({H, H}, needs_dfolded_mix, args.dfolded_mix),
                   dfolded_bias = parameter({H}, needs_dfolded_mix, args.dfolded_bias);
  const at::Tensor dnorm_weight = parameter({H}, needs_dnorm, args.dnorm_weight);
  const at::Tensor dnorm_bias = parameter({H}, needs_dnorm, args.dnorm_bias);
  Device::run(args, q);
  return {dq, dk, dv, dpre_mix, dfolded_mix, dfolded_bias, dnorm_weight, dnorm_bias};
}

template <class Device>
at::Tensor head_dots(const at::Tensor& x_given, const at::Tensor& y_given) {
  const at::Tensor x = unit_stride(x_given), y = unit_stride(y_given);
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have shape [B, H, N, d], got ", shape_text(x.sizes()));
  const int64_t B = x.size(0), H = x.size(1), N = x.size(2), d = x.size(3);
  const Kind kind = kind_of(x, "x", Device::kType);
  const at::Tensor sums = empty(x, {H}, accumulation_type(x));
  HeadDots args{B, H, N, d, {}, {}, sums.data_ptr(), threads_for(double(B * H) * double(N * d))};
  args.x = heads_view(x, "x", {B, H, N, d}, kind);
  args.y = heads_view(y, "y", {B, H, N, d}, kind);
  Device::run(args, x);
  return sums;
}

}  // namespace vitdiv
