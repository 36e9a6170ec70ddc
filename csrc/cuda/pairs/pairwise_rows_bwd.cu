// Backward of the log-sum-exp of rows of cosines; the maths is in
// vitdiv_kernels/ops/pairs/pairwise_rows/README.md.
#include "pair_weights.cuh"
#include "pairwise_rows.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "pairwise_logsumexp_bwd";
constexpr int kRangeThreads = 256;

// ranges = 8192 / max |drows|. float16 ends at 65504 and begins at 2^-24. A softmax is at most 1, so that
// with this factor no weight of an item is larger than 2^14.
template <class A>
KERNEL LAUNCH_BOUNDS(kRangeThreads, 1) slope_ranges(Global<const A> drows, Global<A> ranges, int n) {
  Carver carve;
  const Shared<A> memory = carve.take<A>(kRangeThreads / 32);
  const int64_t item = block_x();
  A top = 0;
  for (int i = thread_x(); i < n; i += threads()) {
    const A slope = drows.ld(item * n + i);
    top = larger(top, slope < 0 ? -slope : slope);
  }
  top = block_max(top, memory);
  if (thread_x() == 0) ranges.st(item, A(8192) / larger(top, A(1e-30)));
}

// drows_i exp(scale S_ij - rows_i) of the row i or the column j that S was summed along; of pairs within x,
// of both.
template <class T>
struct SoftmaxWeights {
  using A = Acc<T>;
  static constexpr int kGrams = 1;
  struct Side {
    A slope, rows;
  };
  Global<const A> drows, rows;
  Global<const A> ranges;  // of items, or null: 1
  bool of_row, of_column;
  A scale, range;

  DEVICE void begin(int64_t item) { range = ranges.p ? ranges.ld(item) : A(1); }
  DEVICE Side side(bool present, int64_t at) const {
    return present ? Side{drows.ld(at) * range, rows.ld(at)} : Side{A(0), A(0)};
  }
  DEVICE Side row(int64_t at) const { return side(of_row, at); }
  DEVICE Side column(int64_t at) const { return side(of_column, at); }
  DEVICE A weight(const Side& row, const Side& column, A s, A, bool itself) const {
    const A exponent = scale * s;
    A sum = 0;
    if (of_row) sum += row.slope * fast_exp2((exponent - row.rows) * A(1.4426950408889634));
    if (of_column) sum += column.slope * fast_exp2((exponent - column.rows) * A(1.4426950408889634));
    return of_row && of_column && itself ? A(0) : sum;
  }
};

// Places in scratch, in bytes.
struct Places : Pieces {
  WeightsPlan plans[2];  // of dx and of dy
  int64_t inverse_norms[2], ranges, weights, along;
  explicit Places(const RowsArgs& args)
      : Pieces(args.x.dtype),
        plans{{kName, args.x.dtype, args.L, args.N, args.M}, {kName, args.x.dtype, args.L, args.M, args.N}} {
    inverse_norms[0] = inverse_norms[1] = take(args.L * args.N);
    if (args.y.data) inverse_norms[1] = take(args.L * args.M);
    ranges = take(args.x.dtype == ScalarType::kHalf ? args.L : 0);
    weights = take(std::max(plans[0].weights(), plans[1].weights()));
    along = take(std::max(plans[0].along(), plans[1].along()));
  }
};

template <class T>
void backward(const LogSumExpBackward& args, void* scratch, void* stream) {
  using A = Acc<T>;
  const Places at(args);
  const bool within = !args.y.data;
  const CosineArgs sets = vectors_of(args);
  const auto place = [&](int64_t byte) { return place_in<A>(scratch, byte); };
  for (int s = 0; s < (within ? 1 : 2); ++s)
    vector_inverse_norms(kName, sets, s, place(at.inverse_norms[s]), stream);
  SoftmaxWeights<T> weights{};
  weights.drows = {static_cast<const A*>(args.drows)};
  weights.rows = {static_cast<const A*>(args.rows)};
  weights.scale = static_cast<A>(args.scale);
  if (args.x.dtype == ScalarType::kHalf) {
    launch(kName, slope_ranges<A>, args.L, kRangeThreads, kRangeThreads / 32 * sizeof(A), stream,
           weights.drows, Global<A>{place(at.ranges)}, static_cast<int>(args.N));
    weights.ranges = {place(at.ranges)};
  }
  for (int s = 0; s < 2; ++s) {
    const BatchView& dx = s ? args.dy : args.dx;
    if (!dx.data) continue;
    WeightsKernel<T, SoftmaxWeights<T>> a{};
    WeightedProduct<T> out{};
    a.x = set_of<T>(sets, s);
    a.y = set_of<T>(sets, 1 - s);
    a.x_inverse_norms = {place(at.inverse_norms[s])};
    a.y_inverse_norms = {place(at.inverse_norms[1 - s])};
    a.within = within;
    out.inverse_eps = static_cast<A>(inverse_of(args.eps));
    out.factor = weights.scale;
    out.ranges = weights.ranges;
    a.weights = weights;
    a.weights.of_row = within || s == 0;
    a.weights.of_column = within || s == 1;
    launch_weighted(kName, a, out, s ? "dy" : "dx", dx, args.L, at.plans[s], place_in<T>(scratch, at.weights),
                    place(at.along), stream);
  }
}

}  // namespace

int64_t pairwise_logsumexp_bwd_scratch(const LogSumExpBackward& args) { return Places(args).size; }

void pairwise_logsumexp_bwd(const LogSumExpBackward& args, void* scratch, void* stream) {
  if (args.L == 0 || !(args.dx.data || args.dy.data)) return;
  check_sizes(args);
  with_type(args.x.dtype, [&](auto number) { backward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
