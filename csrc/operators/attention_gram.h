// The operators attention_gram_{fwd,bwd}, for the kernels of any device.
#pragma once

#include "../arguments/attention_gram.h"
#include "../common.h"

namespace vitdiv {

inline constexpr const char* kAttentionGram[] = {
    "attention_gram_fwd(Tensor q, Tensor k, float scale, Tensor? q2, Tensor? k2, float scale2) -> "
    "Tensor",
    "attention_gram_bwd(Tensor coupling, Tensor q, Tensor k, float scale, Tensor? q2, Tensor? k2, "
    "float scale2, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dq2, Tensor dk2)",
};

inline Layer layer_of(const at::Tensor& q, const at::Tensor& k, double scale, int64_t B, int64_t N, int64_t M,
                      const Kind& kind) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q and k must have shape [B, H, N, d]");
  const int64_t H = q.size(1), d = q.size(3);
  TORCH_CHECK_VALUE(H <= 256, "q must have at most 256 heads for the compiled kernels, got ", H);
  return {heads_view(q, "q", {B, H, N, d}, kind), heads_view(k, "k", {B, H, M, d}, kind), H, d, scale};
}

inline void fill_gram(c10::DeviceType device, GramArgs& args, const at::Tensor& q, const at::Tensor& k,
                      double scale, const OptionalTensor& q2, const OptionalTensor& k2, double scale2) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q and k must have shape [B, H, N, d]");
  const Kind kind = kind_of(q, "q", device);
  TORCH_CHECK_VALUE(q.size(2) > 0 && k.size(2) > 0, "q and k must have at least one query and key");
  TORCH_CHECK_VALUE(q2.has_value() == k2.has_value(), "q2 and k2 must be given together");
  args.B = q.size(0);
  args.N = q.size(2);
  args.M = k.size(2);
  args.layers[0] = layer_of(q, k, scale, args.B, args.N, args.M, kind);
  args.layers[1] = {};
  if (q2) args.layers[1] = layer_of(*q2, k2.value(), scale2, args.B, args.N, args.M, kind);
  double work = 0;
  for (const Layer& layer : args.layers)
    work += double(args.B * layer.H) * double(args.N * args.M) * double(layer.d);
  args.threads = threads_for(work);
}

template <class Device>
at::Tensor attention_gram_fwd(const at::Tensor& q_given, const at::Tensor& k_given, double scale,
                              const OptionalTensor& q2_given, const OptionalTensor& k2_given, double scale2) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given);
  const OptionalTensor q2 = unit_stride(q2_given), k2 = unit_stride(k2_given);
  GramForward args{};
  fill_gram(Device::kType, args, q, k, scale, q2, k2, scale2);
  const int64_t H = args.layers[0].H + args.layers[1].H;
  const at::Tensor gram = empty(q, {args.B, H, H}, accumulation_type(q));
  args.gram = gram.data_ptr();
  Device::run(args, q);
  return gram;
}

template <class Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_gram_bwd(
    const at::Tensor& coupling, const at::Tensor& q_given, const at::Tensor& k_given, double scale,
    const OptionalTensor& q2_given, const OptionalTensor& k2_given, double scale2, c10::List<bool> needs) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given);
  const OptionalTensor q2 = unit_stride(q2_given), k2 = unit_stride(k2_given);
  GramBackward args{};
  fill_gram(Device::kType, args, q, k, scale, q2, k2, scale2);
  const int64_t H = args.layers[0].H + args.layers[1].H;
  const at::Tensor coupling_rows = coupling.contiguous();
  args.coupling = array(coupling_rows, "coupling", {args.B, H, H}, accumulation_kind(q));
  TORCH_CHECK_VALUE(needs.size() == 4 && (q2 || !(needs[2] || needs[3])),
                    "needs must name dq, dk, dq2 and dk2");
  const at::Tensor gradients[] = {empty_heads(q_given, needs[0]), empty_heads(k_given, needs[1]),
                                  empty_heads(q2_given.value_or(q_given), needs[2]),
                                  empty_heads(k2_given.value_or(k_given), needs[3])};
  for (int l = 0; l < 2; l++) {
    if (needs[2 * l]) args.dq[l] = heads_view(gradients[2 * l], "dq");
    if (needs[2 * l + 1]) args.dk[l] = heads_view(gradients[2 * l + 1], "dk");
  }
  Device::run(args, q);
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace vitdiv
