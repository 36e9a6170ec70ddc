// The operators of csrc/cuda/operators.h over emulated kernels, for CPU tensors: tests/support/emulated_operators.py declares them in the
// namespace vitdiv_emulated and links the kernels.
#include "../../../csrc/cuda/operators.h"

#include "emulation.h"

namespace vitdiv {
namespace {

int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::kDouble ? 8 : dtype == ScalarType::kFloat ? 4 : 2;
}
int64_t accumulator_bytes(ScalarType dtype) { return dtype == ScalarType::kDouble ? 8 : 4; }

// Kernels may read inputs, not write them, and must write outputs before they read them; null is neither.
void allow(const void* memory, int64_t bytes, bool output) {
  if (memory != nullptr && bytes > 0) emulation::allow(memory, bytes, output, !output);
}
void allow(const HeadsView& x, int64_t B, int64_t H, int64_t rows, int64_t width, bool output) {
  if (x.data == nullptr || B * H * rows * width == 0) return;
  const int64_t elements =
      1 + (B - 1) * x.stride_b + (H - 1) * x.stride_h + (rows - 1) * x.stride_n + (width - 1);
  allow(x.data, elements * bytes_of(x.dtype), output);
}

void allow(const BatchView& x, int64_t items, int64_t rows, int64_t width, bool output) {
  if (x.data == nullptr || rows * width == 0) return;
  for (int64_t l = 0; l < items; ++l)
    allow(static_cast<const char*>(x.data) + x.offset[l] * bytes_of(x.dtype),
          (1 + (rows - 1) * x.stride_n + width - 1) * bytes_of(x.dtype), output);
}
void allow_inputs(const CosineArgs& args) {
  allow(args.x, args.L, args.N, args.D, false);
  allow(args.y, args.L, args.M, args.D, false);
}
void allow_all(const CosineForward& args) {
  allow_inputs(args);
  allow(args.sums, args.L * accumulator_bytes(args.x.dtype), true);
  allow(args.saved, 4 * cuda::pairwise_cosine_saved_words(args), true);
}
void allow_all(const CosineBackward& args) {
  allow_inputs(args);
  allow(args.dsums, args.L * accumulator_bytes(args.x.dtype), false);
  allow(args.saved, 4 * cuda::pairwise_cosine_saved_words(args), false);
  allow(args.dx, args.L, args.N, args.D, true);
  allow(args.dy, args.L, args.M, args.D, true);
}

void allow_inputs(const RowsArgs& args) {
  allow(args.x, args.L, args.N, args.D, false);
  allow(args.y, args.L, args.M, args.D, false);
}
void allow_all(const LogSumExpForward& args) {
  allow_inputs(args);
  allow(args.rows, args.L * args.N * accumulator_bytes(args.x.dtype), true);
}
void allow_all(const LogSumExpBackward& args) {
  allow_inputs(args);
  for (const void* rows : {args.drows, args.rows})
    allow(rows, args.L * args.N * accumulator_bytes(args.x.dtype), false);
  allow(args.dx, args.L, args.N, args.D, true);
  allow(args.dy, args.L, args.M, args.D, true);
}
void allow_all(const NearestForward& args) {
  allow_inputs(args);
  allow(args.nearest, args.L * args.N * sizeof(int64_t), true);
}

void allow_inputs(const TwoGramArgs& args) {
  allow(args.x, args.L, args.N, args.D, false);
  allow(args.y, args.L, args.N, args.E, false);
}
void allow_all(const TwoGramForward& args) {
  allow_inputs(args);
  allow(args.sums, args.L * accumulator_bytes(args.x.dtype), true);
}
void allow_all(const TwoGramBackward& args) {
  allow_inputs(args);
  allow(args.dsums, args.L * accumulator_bytes(args.x.dtype), false);
  allow(args.dx, args.L, args.N, args.D, true);
  allow(args.dy, args.L, args.N, args.E, true);
}

void allow_inputs(const GramArgs& args) {
  for (const Layer& layer : args.layers) {
    allow(layer.q, args.B, layer.H, args.N, layer.d, false);
    allow(layer.k, args.B, layer.H, args.M, layer.d, false);
  }
}
int64_t gram_bytes(const GramArgs& args) {
  const int64_t H = args.layers[0].H + args.layers[1].H;
  return args.B * H * H * accumulator_bytes(args.layers[0].q.dtype);
}
void allow_all(const GramForward& args) {
  allow_inputs(args);
  allow(args.gram, gram_bytes(args), true);
}
void allow_all(const GramBackward& args) {
  allow_inputs(args);
  allow(args.coupling, gram_bytes(args), false);
  for (int l = 0; l < 2; ++l) {
    allow(args.dq[l], args.B, args.layers[l].H, args.N, args.layers[l].d, true);
    allow(args.dk[l], args.B, args.layers[l].H, args.M, args.layers[l].d, true);
  }
}
int64_t gram_bytes(const ReattentionArgs& args) {
  return args.B * args.H * args.H * accumulator_bytes(args.q.dtype);
}
void allow_inputs(const ReattentionArgs& args) {
  allow(args.q, args.B, args.H, args.N, args.d, false);
  allow(args.k, args.B, args.H, args.M, args.d, false);
  allow(args.v, args.B, args.H, args.M, args.dv, false);
  const int64_t vector = args.H * accumulator_bytes(args.q.dtype);
  for (const void* matrix : {args.pre_mix, args.mix}) allow(matrix, args.H * vector, false);
  for (const void* each : {args.pre_bias, args.bias, args.norm_weight, args.norm_bias})
    allow(each, vector, false);
}
void allow_all(const ReattentionForward& args) {
  allow_inputs(args);
  allow(args.out, args.B, args.H, args.N, args.dv, true);
  allow(args.gram, gram_bytes(args), true);
}
void allow_all(const ReattentionBackward& args) {
  allow_inputs(args);
  allow(args.dout, args.B, args.H, args.N, args.dv, false);
  allow(args.dq, args.B, args.H, args.N, args.d, true);
  allow(args.dk, args.B, args.H, args.M, args.d, true);
  allow(args.dv_out, args.B, args.H, args.M, args.dv, true);
  const int64_t vector = args.H * accumulator_bytes(args.q.dtype), matrix = args.H * vector;
  allow(args.coupling, args.coupling_stride_b ? gram_bytes(args) : matrix, false);
  for (const void* each : {args.dpre_mix, args.dmix}) allow(each, matrix, true);
  for (const void* each : {args.dbias, args.dnorm_weight, args.dnorm_bias}) allow(each, vector, true);
}
void allow_all(const HeadDots& args) {
  allow(args.x, args.B, args.H, args.N, args.width, false);
  allow(args.y, args.B, args.H, args.N, args.width, false);
  allow(args.sums, args.H * accumulator_bytes(args.x.dtype), true);
}

class Emulated {
 public:
  static constexpr c10::DeviceType kType = c10::kCPU;

  explicit Emulated(c10::Device) {}
  ~Emulated() { emulation::forbid_all(); }

  template <class Args>
  void run(void (*kernels)(const Args&, void*, void*), const Args& args, const at::Tensor& scratch) {
    allow_all(args);
    allow(scratch.data_ptr(), scratch.numel(), true);
    kernels(args, scratch.data_ptr(), nullptr);
  }
};

}  // namespace
}  // namespace vitdiv

TORCH_LIBRARY_IMPL(vitdiv_emulated, CPU, m) { vitdiv::register_cuda_operators<vitdiv::Emulated>(m); }
