// The Python module _C: registers the compiled kernels for the operators that vitdiv_kernels/ops/*/function.py define, and
// gives facts of the build. An operator returns an empty tensor for an output that nobody asked for.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <new>

#include "batch_norm.h"
#include "common.h"
#include "cpu/dispatch.h"

namespace vitdiv {
namespace {

const CpuKernels& cpu() {
  static const CpuKernels kernels = choose_cpu_kernels();
  return kernels;
}

void require_memory(bool done) {
  if (!done) throw std::bad_alloc();  // a Python MemoryError
}

at::Tensor empty(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype, bool needed = true) {
  return at::empty(needed ? sizes : at::IntArrayRef({0}),
                   like.options().dtype(needed ? dtype : like.scalar_type()));
}

// The layout that heads_like of ops/_layout.py gives: [B, N, H, d] where the model has its heads inside its tokens.
at::Tensor empty_heads(const at::Tensor& like, bool needed = true) {
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

Penalty penalty_of(const std::string& name) {
  if (name == "signed") return Penalty::kSigned;
  if (name == "abs") return Penalty::kAbs;
  if (name == "square") return Penalty::kSquare;
  TORCH_CHECK_VALUE(name == "relu", "penalty must be signed, abs, square or relu, got ", name);
  return Penalty::kRelu;
}

// Keeps the offsets that the kernels' views point to.
struct CosineOffsets {
  std::vector<int64_t> x, y, dx, dy;
};

BatchView batch_view(const at::Tensor& t, const char* name, at::ScalarType dtype,
                     std::vector<int64_t>& offsets) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.dim() >= 2, name, " must be a CPU tensor of shape [..., N, D], got ",
                    shape_text(t.sizes()));
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must have dtype ", toString(dtype), ", got ",
                   toString(t.scalar_type()));
  TORCH_CHECK_VALUE(t.stride(-1) == 1 || t.size(-1) == 1 || t.numel() == 0, name,
                    " must have a last stride of 1, got ", t.stride(-1));
  offsets = item_offsets(t);
  return {t.data_ptr(), scalar_type(t, name), offsets.data(), t.stride(-2)};
}

void fill_cosine(CosineArgs& args, CosineOffsets& offsets, const at::Tensor& x, const OptionalTensor& y,
                 const std::string& penalty, bool include_self, double eps) {
  args.x = batch_view(x, "x", x.scalar_type(), offsets.x);
  args.y = {};
  if (y) {
    args.y = batch_view(*y, "y", x.scalar_type(), offsets.y);
    TORCH_CHECK_VALUE(
        y->dim() == x.dim() && y->size(-1) == x.size(-1) && offsets.y.size() == offsets.x.size(),
        "y must have x's shape but for its rows, got ", shape_text(y->sizes()), " beside ",
        shape_text(x.sizes()));
  }
  args.L = int64_t(offsets.x.size());
  args.N = x.size(-2);
  args.M = y ? y->size(-2) : args.N;
  args.D = x.size(-1);
  args.penalty = penalty_of(penalty);
  args.include_self = include_self;
  args.eps = eps;
  const bool closed = args.penalty == Penalty::kSigned;
  args.threads =
      threads_for(double(args.L) * double(args.N) * double(args.D) * (closed ? 1 : double(args.M)));
}

void check_saved(const CosineArgs& args, const at::Tensor& x, const at::Tensor& saved) {
  if (args.penalty == Penalty::kSigned)
    array(saved, "saved", {args.y.data ? 2 : 1, args.L, args.D}, accumulation_type(x));
  else
    array(saved, "saved", {args.L, args.N, args.penalty == Penalty::kAbs ? 2 : 1, (args.M + 31) / 32},
          at::kInt);
}

bool keeps(const CosineArgs& args, bool for_backward) {
  return args.penalty == Penalty::kSigned || (for_backward && args.penalty != Penalty::kSquare);
}

std::tuple<at::Tensor, at::Tensor> pairwise_cosine_fwd(const at::Tensor& x_given,
                                                       const OptionalTensor& y_given, std::string penalty,
                                                       bool include_self, double eps, bool for_backward) {
  const at::Tensor x = unit_stride(x_given);
  const OptionalTensor y = unit_stride(y_given);
  CosineForward args{};
  CosineOffsets offsets;
  fill_cosine(args, offsets, x, y, penalty, include_self, eps);
  const at::Tensor sums = empty(x, {args.L}, accumulation_type(x));
  at::Tensor saved;
  if (!keeps(args, for_backward))
    saved = empty(x, {0}, x.scalar_type());
  else if (args.penalty == Penalty::kSigned)
    saved = empty(x, {y ? 2 : 1, args.L, args.D}, accumulation_type(x));
  else
    saved = at::zeros({args.L, args.N, args.penalty == Penalty::kAbs ? 2 : 1, (args.M + 31) / 32},
                      x.options().dtype(at::kInt));
  args.sums = sums.data_ptr();
  args.saved = keeps(args, for_backward) ? saved.data_ptr() : nullptr;
  require_memory(cpu().pairwise_cosine_fwd(args));
  return {sums, saved};
}

std::tuple<at::Tensor, at::Tensor> pairwise_cosine_bwd(const at::Tensor& dsums, const at::Tensor& x_given,
                                                       const OptionalTensor& y_given, const at::Tensor& saved,
                                                       std::string penalty, bool include_self, double eps,
                                                       bool needs_dx, bool needs_dy) {
  const at::Tensor x = unit_stride(x_given);
  const OptionalTensor y = unit_stride(y_given);
  CosineBackward args{};
  CosineOffsets offsets;
  fill_cosine(args, offsets, x, y, penalty, include_self, eps);
  if (args.penalty != Penalty::kSquare) check_saved(args, x, saved);
  const at::Tensor dsums_row = dsums.contiguous();
  args.dsums = array(dsums_row, "dsums", {args.L}, accumulation_type(x));
  args.saved = args.penalty == Penalty::kSquare ? nullptr : saved.data_ptr();
  TORCH_CHECK_VALUE(y || !needs_dy, "dy is asked for, but y is not given");
  const at::Tensor dx = empty(x, x.sizes(), x.scalar_type(), needs_dx);
  const at::Tensor dy = empty(x, y ? y->sizes() : at::IntArrayRef({0}), x.scalar_type(), needs_dy);
  if (needs_dx) args.dx = batch_view(dx, "dx", x.scalar_type(), offsets.dx);
  if (needs_dy) args.dy = batch_view(dy, "dy", x.scalar_type(), offsets.dy);
  require_memory(cpu().pairwise_cosine_bwd(args));
  return {dx, dy};
}

Layer layer_of(const at::Tensor& q, const at::Tensor& k, double scale, int64_t B, int64_t N, int64_t M,
               at::ScalarType dtype) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q and k must have shape [B, H, N, d]");
  const int64_t H = q.size(1), d = q.size(3);
  TORCH_CHECK_VALUE(H <= 256, "q must have at most 256 heads for the compiled kernels, got ", H);
  return {heads_view(q, "q", {B, H, N, d}, dtype), heads_view(k, "k", {B, H, M, d}, dtype), H, d, scale};
}

void fill_gram(GramArgs& args, const at::Tensor& q, const at::Tensor& k, double scale,
               const OptionalTensor& q2, const OptionalTensor& k2, double scale2) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q and k must have shape [B, H, N, d]");
  TORCH_CHECK_VALUE(q.size(2) > 0 && k.size(2) > 0, "q and k must have at least one query and key");
  TORCH_CHECK_VALUE(q2.has_value() == k2.has_value(), "q2 and k2 must be given together");
  args.B = q.size(0);
  args.N = q.size(2);
  args.M = k.size(2);
  args.layers[0] = layer_of(q, k, scale, args.B, args.N, args.M, q.scalar_type());
  args.layers[1] = {};
  if (q2) args.layers[1] = layer_of(*q2, k2.value(), scale2, args.B, args.N, args.M, q.scalar_type());
  double work = 0;
  for (const Layer& layer : args.layers)
    work += double(args.B * layer.H) * double(args.N * args.M) * double(layer.d);
  args.threads = threads_for(work);
}

at::Tensor attention_gram_fwd(const at::Tensor& q_given, const at::Tensor& k_given, double scale,
                              const OptionalTensor& q2_given, const OptionalTensor& k2_given, double scale2) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given);
  const OptionalTensor q2 = unit_stride(q2_given), k2 = unit_stride(k2_given);
  GramForward args{};
  fill_gram(args, q, k, scale, q2, k2, scale2);
  const int64_t H = args.layers[0].H + args.layers[1].H;
  const at::Tensor gram = empty(q, {args.B, H, H}, accumulation_type(q));
  args.gram = gram.data_ptr();
  require_memory(cpu().attention_gram_fwd(args));
  return gram;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_gram_bwd(
    const at::Tensor& coupling, const at::Tensor& q_given, const at::Tensor& k_given, double scale,
    const OptionalTensor& q2_given, const OptionalTensor& k2_given, double scale2, c10::List<bool> needs) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given);
  const OptionalTensor q2 = unit_stride(q2_given), k2 = unit_stride(k2_given);
  GramBackward args{};
  fill_gram(args, q, k, scale, q2, k2, scale2);
  const int64_t H = args.layers[0].H + args.layers[1].H;
  const at::Tensor coupling_rows = coupling.contiguous();
  args.coupling = array(coupling_rows, "coupling", {args.B, H, H}, accumulation_type(q));
  TORCH_CHECK_VALUE(needs.size() == 4 && (q2 || !(needs[2] || needs[3])),
                    "needs must name dq, dk, dq2 and dk2");
  const at::Tensor gradients[] = {empty_heads(q_given, needs[0]), empty_heads(k_given, needs[1]),
                                  empty_heads(q2_given.value_or(q_given), needs[2]),
                                  empty_heads(k2_given.value_or(k_given), needs[3])};
  for (int l = 0; l < 2; l++) {
    if (needs[2 * l]) args.dq[l] = heads_view(gradients[2 * l], "dq");
    if (needs[2 * l + 1]) args.dk[l] = heads_view(gradients[2 * l + 1], "dk");
  }
  require_memory(cpu().attention_gram_bwd(args));
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

void fill_reattention(ReattentionArgs& args, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      double scale, const OptionalTensor& pre_mix, const OptionalTensor& pre_bias,
                      const at::Tensor& mix, const OptionalTensor& bias, bool centred,
                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have shape [B, H, N, d]");
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2), d = q.size(3), dv = v.size(3);
  TORCH_CHECK_VALUE(H <= 256, "q must have at most 256 heads for the compiled kernels, got ", H);
  TORCH_CHECK_VALUE(N > 0 && M > 0, "q and k must have at least one query and key");
  TORCH_CHECK_VALUE(v.size(3) == d, "v must have the head width of q, ", d, ", got ", v.size(3));
  TORCH_CHECK_VALUE(norm_weight.has_value() == norm_bias.has_value(),
                    "norm_weight and norm_bias must be given together");
  args.B = B, args.H = H, args.N = N, args.M = M, args.d = d, args.dv = dv;
  const at::ScalarType dtype = q.scalar_type(), acc = accumulation_type(q);
  args.q = heads_view(q, "q", {B, H, N, d}, dtype);
  args.k = heads_view(k, "k", {B, H, M, d}, dtype);
  args.v = heads_view(v, "v", {B, H, M, dv}, dtype);
  args.scale = scale;
  args.pre_mix = array(pre_mix, "pre_mix", {H, H}, acc);
  args.pre_bias = array(pre_bias, "pre_bias", {H}, acc);
  args.mix = array(mix, "mix", {H, H}, acc);
  args.bias = array(bias, "bias", {H}, acc);
  args.centred = centred;
  args.norm_weight = array(norm_weight, "norm_weight", {H}, acc);
  args.norm_bias = array(norm_bias, "norm_bias", {H}, acc);
  args.eps = eps;
  args.threads = threads_for(double(B * H) * double(N * M) * double(d + dv));
}

std::tuple<at::Tensor, at::Tensor> reattention_fwd(
    const at::Tensor& q_given, const at::Tensor& k_given, const at::Tensor& v_given, double scale,
    const OptionalTensor& pre_mix, const OptionalTensor& pre_bias, const at::Tensor& mix,
    const OptionalTensor& bias, bool centred, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double eps, bool needs_out, bool needs_gram) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given), v = unit_stride(v_given);
  ReattentionForward args{};
  fill_reattention(args, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps);
  const at::Tensor out = empty_heads(q_given, needs_out);
  const at::Tensor gram = empty(q, {args.B, args.H, args.H}, accumulation_type(q), needs_gram);
  if (needs_out) args.out = heads_view(out, "out");
  if (needs_gram) args.gram = gram.data_ptr();
  require_memory(cpu().reattention_fwd(args));
  return {out, gram};
}

using Tensors8 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                            at::Tensor, at::Tensor>;

// needs: dq, dk, dv, dpre_mix, dmix (with dbias), dnorm (weight and bias)
Tensors8 reattention_bwd(const OptionalTensor& dout_given, const OptionalTensor& coupling,
                         const at::Tensor& q_given, const at::Tensor& k_given, const at::Tensor& v_given,
                         double scale, const OptionalTensor& pre_mix, const OptionalTensor& pre_bias,
                         const at::Tensor& mix, const OptionalTensor& bias, bool centred,
                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                         c10::List<bool> needs) {
  const at::Tensor q = unit_stride(q_given), k = unit_stride(k_given), v = unit_stride(v_given);
  const OptionalTensor dout = unit_stride(dout_given);
  ReattentionBackward args{};
  fill_reattention(args, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps);
  TORCH_CHECK_VALUE(needs.size() == 6, "needs must name dq, dk, dv, dpre_mix, dmix and dnorm");
  const bool needs_dv = needs[2], needs_dpre_mix = needs[3], needs_dmix = needs[4], needs_dnorm = needs[5];
  TORCH_CHECK_VALUE(!needs_dpre_mix || pre_mix, "dpre_mix is asked for, but pre_mix is not given");
  TORCH_CHECK_VALUE(!needs_dnorm || norm_weight, "dnorm is asked for, but norm_weight is not given");
  TORCH_CHECK_VALUE(dout || coupling, "dout or coupling must be given");
  TORCH_CHECK_VALUE(dout || !(needs_dv || needs_dmix || needs_dnorm),
                    "dout must be given for these gradients");
  const int64_t B = args.B, H = args.H;
  const at::ScalarType acc = accumulation_type(q);
  args.dout = heads_view(dout, "dout", {B, H, args.N, args.dv}, q.scalar_type());
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
    const at::Tensor gradient = empty(q, sizes, acc, needed);
    pointer = needed ? gradient.data_ptr() : nullptr;
    return gradient;
  };
  const at::Tensor dpre_mix = parameter({H, H}, needs_dpre_mix, args.dpre_mix);
  const at::Tensor dmix = parameter({H, H}, needs_dmix, args.dmix),
                   dbias = parameter({H}, needs_dmix, args.dbias);
  const at::Tensor dnorm_weight = parameter({H}, needs_dnorm, args.dnorm_weight);
  const at::Tensor dnorm_bias = parameter({H}, needs_dnorm, args.dnorm_bias);
  require_memory(cpu().reattention_bwd(args));
  return {dq, dk, dv, dpre_mix, dmix, dbias, dnorm_weight, dnorm_bias};
}

at::Tensor head_dots(const at::Tensor& x_given, const at::Tensor& y_given) {
  const at::Tensor x = unit_stride(x_given), y = unit_stride(y_given);
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have shape [B, H, N, d], got ", shape_text(x.sizes()));
  const int64_t B = x.size(0), H = x.size(1), N = x.size(2), d = x.size(3);
  const at::Tensor sums = empty(x, {H}, accumulation_type(x));
  HeadDots args{B, H, N, d, {}, {}, sums.data_ptr(), threads_for(double(B * H) * double(N * d))};
  args.x = heads_view(x, "x", {B, H, N, d}, x.scalar_type());
  args.y = heads_view(y, "y", {B, H, N, d}, x.scalar_type());
  require_memory(cpu().head_dots(args));
  return sums;
}

}  // namespace
}  // namespace vitdiv

TORCH_LIBRARY_IMPL(vitdiv, CPU, m) {
  m.impl("pairwise_cosine_fwd", &vitdiv::pairwise_cosine_fwd);
  m.impl("pairwise_cosine_bwd", &vitdiv::pairwise_cosine_bwd);
  m.impl("attention_gram_fwd", &vitdiv::attention_gram_fwd);
  m.impl("attention_gram_bwd", &vitdiv::attention_gram_bwd);
  m.impl("reattention_fwd", &vitdiv::reattention_fwd);
  m.impl("reattention_bwd", &vitdiv::reattention_bwd);
  m.impl("head_dots", &vitdiv::head_dots);
  m.impl("batch_norm_fwd", &vitdiv::batch_norm_fwd);
  m.impl("batch_norm_coupling", &vitdiv::batch_norm_coupling);
  m.impl("batch_norm_bwd", &vitdiv::batch_norm_bwd);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_capability", [] { return std::string(vitdiv::cpu().capability); });
  m.def("num_threads", [] { return vitdiv::cpu().count_threads(at::get_num_threads()); });
  m.attr("built_for_torch") = VITDIV_TORCH_VERSION;
  m.attr("with_cuda") = false;  // no operator is registered for CUDA tensors
  m.attr("cuda_architectures") = VITDIV_CUDA_ARCHITECTURES;
}
