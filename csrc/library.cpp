// The Python module _C: the compiled kernels behind plain functions of tensors, and facts of the build. Outputs are
// allocated by the caller; a None is an argument that is absent or an output that nobody asked for.
#include <torch/csrc/utils/pybind.h>

#include <new>

#include "common.h"
#include "cpu/dispatch.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vitdiv {
namespace {

const CpuKernels& cpu() {
  static const CpuKernels kernels = choose_cpu_kernels();
  return kernels;
}

void require_memory(bool done) {
  if (!done) throw std::bad_alloc();  // a Python MemoryError
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

BatchView batch_view(const at::Tensor& t, const char* name, at::ScalarType dtype, std::vector<int64_t>& offsets) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.dim() >= 2, name, " must be a CPU tensor of shape [..., N, D], got ", shape_text(t.sizes()));
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must have dtype ", toString(dtype), ", got ", toString(t.scalar_type()));
  TORCH_CHECK_VALUE(t.stride(-1) == 1 || t.size(-1) == 1, name, " must have a last stride of 1, got ", t.stride(-1));
  offsets = item_offsets(t);
  return {t.data_ptr(), scalar_type(t, name), offsets.data(), t.stride(-2)};
}

void fill_cosine(CosineArgs& args, CosineOffsets& offsets, const at::Tensor& x, const OptionalTensor& y,
                 const std::string& penalty, bool include_self, double eps) {
  args.x = batch_view(x, "x", x.scalar_type(), offsets.x);
  args.y = {};
  if (y) {
    args.y = batch_view(*y, "y", x.scalar_type(), offsets.y);
    TORCH_CHECK_VALUE(y->dim() == x.dim() && y->size(-1) == x.size(-1) && offsets.y.size() == offsets.x.size(),
                      "y must have x's shape but for its rows, got ", shape_text(y->sizes()), " beside ", shape_text(x.sizes()));
  }
  args.L = int64_t(offsets.x.size());
  args.N = x.size(-2);
  args.M = y ? y->size(-2) : args.N;
  args.D = x.size(-1);
  args.penalty = penalty_of(penalty);
  args.include_self = include_self;
  args.eps = eps;
  const bool closed = args.penalty == Penalty::kSigned;
  args.threads = threads_for(double(args.L) * double(args.N) * double(args.D) * (closed ? 1 : double(args.M)));
}

void check_saved(const CosineArgs& args, const at::Tensor& x, const OptionalTensor& saved) {
  if (!saved) return;
  if (args.penalty == Penalty::kSigned)
    array(*saved, "saved", {args.y.data ? 2 : 1, args.L, args.D}, accumulation_type(x));
  else
    array(*saved, "saved", {args.L, args.N, args.penalty == Penalty::kAbs ? 2 : 1, (args.M + 31) / 32}, at::kInt);
}

void pairwise_cosine_fwd(const at::Tensor& x, const OptionalTensor& y, const std::string& penalty, bool include_self, double eps,
                         const at::Tensor& sums, const OptionalTensor& saved) {
  CosineForward args{};
  CosineOffsets offsets;
  fill_cosine(args, offsets, x, y, penalty, include_self, eps);
  TORCH_CHECK_VALUE(saved || args.penalty != Penalty::kSigned, "saved must be given for the signed penalty");
  check_saved(args, x, saved);
  args.sums = array(sums, "sums", {args.L}, accumulation_type(x));
  args.saved = saved ? saved->data_ptr() : nullptr;
  require_memory(cpu().pairwise_cosine_fwd(args));
}

void pairwise_cosine_bwd(const at::Tensor& dsums, const at::Tensor& x, const OptionalTensor& y, const OptionalTensor& saved,
                         const std::string& penalty, bool include_self, double eps, const OptionalTensor& dx,
                         const OptionalTensor& dy) {
  CosineBackward args{};
  CosineOffsets offsets;
  fill_cosine(args, offsets, x, y, penalty, include_self, eps);
  TORCH_CHECK_VALUE(saved || args.penalty == Penalty::kSquare, "saved must be given for the penalty ", penalty);
  check_saved(args, x, saved);
  args.dsums = array(dsums, "dsums", {args.L}, accumulation_type(x));
  args.saved = saved ? saved->data_ptr() : nullptr;
  if (dx) {
    check_tensor(*dx, "dx", x.sizes(), x.scalar_type());
    args.dx = batch_view(*dx, "dx", x.scalar_type(), offsets.dx);
  }
  if (dy) {
    TORCH_CHECK_VALUE(y, "dy is asked for, but y is not given");
    check_tensor(*dy, "dy", y->sizes(), x.scalar_type());
    args.dy = batch_view(*dy, "dy", x.scalar_type(), offsets.dy);
  }
  require_memory(cpu().pairwise_cosine_bwd(args));
}

Layer layer_of(const at::Tensor& q, const at::Tensor& k, double scale, int64_t B, int64_t N, int64_t M, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q and k must have shape [B, H, N, d]");
  const int64_t H = q.size(1), d = q.size(3);
  TORCH_CHECK_VALUE(H <= 256, "at most 256 heads are supported, got ", H);
  return {heads_view(q, "q", {B, H, N, d}, dtype), heads_view(k, "k", {B, H, M, d}, dtype), H, d, scale};
}

void fill_gram(GramArgs& args, const at::Tensor& q, const at::Tensor& k, double scale, const OptionalTensor& q2,
               const OptionalTensor& k2, double scale2) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q and k must have shape [B, H, N, d]");
  TORCH_CHECK_VALUE(k.size(2) > 0, "k must have at least one key");
  args.B = q.size(0);
  args.N = q.size(2);
  args.M = k.size(2);
  args.layers[0] = layer_of(q, k, scale, args.B, args.N, args.M, q.scalar_type());
  args.layers[1] = {};
  if (q2) args.layers[1] = layer_of(*q2, k2.value(), scale2, args.B, args.N, args.M, q.scalar_type());
  double work = 0;
  for (const Layer& layer : args.layers) work += double(args.B * layer.H) * double(args.N * args.M) * double(layer.d);
  args.threads = threads_for(work);
}

void attention_gram_fwd(const at::Tensor& q, const at::Tensor& k, double scale, const OptionalTensor& q2, const OptionalTensor& k2,
                        double scale2, const at::Tensor& gram) {
  GramForward args{};
  fill_gram(args, q, k, scale, q2, k2, scale2);
  const int64_t H = args.layers[0].H + args.layers[1].H;
  args.gram = array(gram, "gram", {args.B, H, H}, accumulation_type(q));
  require_memory(cpu().attention_gram_fwd(args));
}

void attention_gram_bwd(const at::Tensor& coupling, const at::Tensor& q, const at::Tensor& k, double scale, const OptionalTensor& q2,
                        const OptionalTensor& k2, double scale2, const OptionalTensor& dq, const OptionalTensor& dk,
                        const OptionalTensor& dq2, const OptionalTensor& dk2) {
  GramBackward args{};
  fill_gram(args, q, k, scale, q2, k2, scale2);
  const int64_t H = args.layers[0].H + args.layers[1].H;
  const at::ScalarType dtype = q.scalar_type();
  args.coupling = array(coupling, "coupling", {args.B, H, H}, accumulation_type(q));
  const OptionalTensor* dqs[] = {&dq, &dq2};
  const OptionalTensor* dks[] = {&dk, &dk2};
  for (int l = 0; l < 2; l++) {
    const Layer& layer = args.layers[l];
    args.dq[l] = heads_view(*dqs[l], "dq", {args.B, layer.H, args.N, layer.d}, dtype);
    args.dk[l] = heads_view(*dks[l], "dk", {args.B, layer.H, args.M, layer.d}, dtype);
  }
  require_memory(cpu().attention_gram_bwd(args));
}

void fill_reattention(ReattentionArgs& args, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                      const OptionalTensor& pre_mix, const OptionalTensor& pre_bias, const at::Tensor& mix,
                      const at::Tensor& bias, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have shape [B, H, N, d]");
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2), d = q.size(3), dv = v.size(3);
  TORCH_CHECK_VALUE(H <= 256, "at most 256 heads are supported, got ", H);
  TORCH_CHECK_VALUE(M > 0, "k must have at least one key");
  TORCH_CHECK_VALUE(norm_weight.has_value() == norm_bias.has_value(), "norm_weight and norm_bias must be given together");
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
  args.norm_weight = array(norm_weight, "norm_weight", {H}, acc);
  args.norm_bias = array(norm_bias, "norm_bias", {H}, acc);
  args.eps = eps;
  args.threads = threads_for(double(B * H) * double(N * M) * double(d + dv));
}

void reattention_fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, const OptionalTensor& pre_mix,
                     const OptionalTensor& pre_bias, const at::Tensor& mix, const at::Tensor& bias,
                     const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps, const OptionalTensor& out,
                     const OptionalTensor& gram) {
  ReattentionForward args{};
  fill_reattention(args, q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps);
  args.out = heads_view(out, "out", {args.B, args.H, args.N, args.dv}, q.scalar_type());
  args.gram = array(gram, "gram", {args.B, args.H, args.H}, accumulation_type(q));
  require_memory(cpu().reattention_fwd(args));
}

void reattention_bwd(const OptionalTensor& dout, const OptionalTensor& coupling, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& v, double scale, const OptionalTensor& pre_mix, const OptionalTensor& pre_bias,
                     const at::Tensor& mix, const at::Tensor& bias, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, double eps, const OptionalTensor& dq, const OptionalTensor& dk,
                     const OptionalTensor& dv, const OptionalTensor& dpre_mix, const OptionalTensor& dmix,
                     const OptionalTensor& dbias, const OptionalTensor& dnorm_weight, const OptionalTensor& dnorm_bias) {
  ReattentionBackward args{};
  fill_reattention(args, q, k, v, scale, pre_mix, pre_bias, mix, bias, norm_weight, norm_bias, eps);
  const int64_t B = args.B, H = args.H, N = args.N, M = args.M;
  const at::ScalarType dtype = q.scalar_type(), acc = accumulation_type(q);
  TORCH_CHECK_VALUE(dmix.has_value() == dbias.has_value(), "dmix and dbias must be asked for together");
  TORCH_CHECK_VALUE(!dpre_mix || pre_mix, "dpre_mix is asked for, but pre_mix is not given");
  TORCH_CHECK_VALUE(dout || coupling, "dout or coupling must be given");
  TORCH_CHECK_VALUE(dout || !(dv || dmix || dnorm_weight || dnorm_bias), "dout must be given for these gradients");
  args.dout = heads_view(dout, "dout", {B, H, N, args.dv}, dtype);
  if (coupling) {
    const int64_t images = coupling->dim() == 3 && coupling->size(0) == 1 ? 1 : B;
    args.coupling = array(*coupling, "coupling", {images, H, H}, acc);
    args.coupling_stride_b = images == B ? H * H : 0;
  }
  args.dq = heads_view(dq, "dq", {B, H, N, args.d}, dtype);
  args.dk = heads_view(dk, "dk", {B, H, M, args.d}, dtype);
  args.dv_out = heads_view(dv, "dv", {B, H, M, args.dv}, dtype);
  args.dpre_mix = array(dpre_mix, "dpre_mix", {H, H}, acc);
  args.dmix = array(dmix, "dmix", {H, H}, acc);
  args.dbias = array(dbias, "dbias", {H}, acc);
  args.dnorm_weight = array(dnorm_weight, "dnorm_weight", {H}, acc);
  args.dnorm_bias = array(dnorm_bias, "dnorm_bias", {H}, acc);
  require_memory(cpu().reattention_bwd(args));
}

void reattention_alignment(const at::Tensor& dout, const at::Tensor& out, const at::Tensor& v, const at::Tensor& bias,
                           const at::Tensor& sums) {
  TORCH_CHECK_VALUE(out.dim() == 4 && v.dim() == 4, "out and v must have shape [B, H, N, d]");
  const int64_t B = out.size(0), H = out.size(1), N = out.size(2), M = v.size(2), dv = out.size(3);
  const at::ScalarType dtype = out.scalar_type(), acc = accumulation_type(out);
  ReattentionAlignment args{B, H, N, M, dv, {}, {}, {}, nullptr, nullptr, threads_for(double(B * H) * double(N * dv))};
  args.dout = heads_view(dout, "dout", {B, H, N, dv}, dtype);
  args.out = heads_view(out, "out", {B, H, N, dv}, dtype);
  args.v = heads_view(v, "v", {B, H, M, dv}, dtype);
  args.bias = array(bias, "bias", {H}, acc);
  args.sums = array(sums, "sums", {H}, acc);
  require_memory(cpu().reattention_alignment(args));
}

// Threads that the kernels' parallel regions get; 1 when they were compiled without OpenMP.
int num_threads() {
  int threads = 1;
#if defined(_OPENMP)
#pragma omp parallel num_threads(at::get_num_threads())
#pragma omp single
  threads = omp_get_num_threads();
#endif
  return threads;
}

}  // namespace
}  // namespace vitdiv

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace vitdiv;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("pairwise_cosine_fwd", &pairwise_cosine_fwd, unlocked);
  m.def("pairwise_cosine_bwd", &pairwise_cosine_bwd, unlocked);
  m.def("attention_gram_fwd", &attention_gram_fwd, unlocked);
  m.def("attention_gram_bwd", &attention_gram_bwd, unlocked);
  m.def("reattention_fwd", &reattention_fwd, unlocked);
  m.def("reattention_bwd", &reattention_bwd, unlocked);
  m.def("reattention_alignment", &reattention_alignment, unlocked);
  m.def("cpu_capability", [] { return std::string(cpu().capability); });
  m.def("num_threads", &num_threads, unlocked);
  m.attr("built_for_torch") = VITDIV_TORCH_VERSION;
  m.attr("with_cuda") = false;
}
