// Backward of penalties on two Gram matrices; the maths is in vitdiv_kernels/ops/pairs/two_gram/README.md.
#include "pair_weights.cuh"
#include "two_gram.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "two_gram_bwd";
constexpr int kRangeThreads = 256;

// ranges = 4096 / (bound + the largest |x|^2 and |y|^2). float16 ends at 65504 and begins at 2^-24. No weight
// is larger than a multiple of the squares of the largest norms, and with this factor than 2^14.
template <class A>
KERNEL LAUNCH_BOUNDS(kRangeThreads, 1)
    norm_ranges(Global<const A> x_inverse_norms, Global<const A> y_inverse_norms, A bound, Global<A> ranges,
                int n) {
  Carver carve;
  const Shared<A> memory = carve.take<A>(kRangeThreads / 32);
  const int64_t item = block_x();
  UNROLLED_FOR (int s = 0; s < 2; ++s) {
    const Global<const A> inverse_norms = s ? y_inverse_norms : x_inverse_norms;
    A top = 0;
    if (inverse_norms.p)
      for (int i = thread_x(); i < n; i += threads()) top = larger(top, 1 / inverse_norms.ld(item * n + i));
    top = block_max(top, memory);
    bound += top * top;
  }
  if (thread_x() == 0) ranges.st(item, A(4096) / larger(bound, A(1e-30)));
}

// The slopes of the penalty.
template <class A>
struct PenaltyWeights {
  static constexpr int kGrams = 2;
  struct Side {};
  PairPenalty<A> penalty;
  bool of_y, identity;
  Global<const A> ranges;  // of items, or null: `range` of all
  A range;

  DEVICE void begin(int64_t item) {
    if (ranges.p) range = ranges.ld(item);
  }
  DEVICE Side row(int64_t) const { return {}; }
  DEVICE Side column(int64_t) const { return {}; }
  DEVICE A weight(Side, Side, A own, A other, bool itself) const {
    if (identity) other = A(itself);
    return range * penalty.slope(of_y ? other : own, of_y ? own : other, of_y);
  }
};

// Places in scratch, in bytes.
struct Places : Pieces {
  WeightsPlan plan;
  int64_t inverse_norms[2], norms[2], ranges, weights, along;
  bool finds_ranges;
  explicit Places(const TwoGramArgs& args)
      : Pieces(args.x.dtype),
        plan(kName, args.x.dtype, args.L, args.N, args.N),
        finds_ranges(!args.normalise && args.x.dtype == ScalarType::kHalf) {
    const int sets = args.y.data ? 2 : 1;
    inverse_norms[0] = inverse_norms[1] = take(args.L * args.N);
    if (args.y.data && args.normalise) inverse_norms[1] = take(args.L * args.N);
    for (int s = 0; s < 2; ++s) norms[s] = take(finds_ranges && s < sets ? args.L * args.N : 0);
    ranges = take(finds_ranges ? args.L : 0);
    weights = take(plan.weights());
    along = take(plan.along());
  }
};

template <class T>
void backward(const TwoGramBackward& args, void* scratch, void* stream) {
  using A = Acc<T>;
  const Places at(args);
  const auto place = [&](int64_t byte) { return place_in<A>(scratch, byte); };
  A* const inverse_norms[2] = {place(at.inverse_norms[0]), place(at.inverse_norms[1])};
  gram_inverse_norms(kName, args, inverse_norms, stream);
  const bool half = args.x.dtype == ScalarType::kHalf, product = args.penalty == GramPenalty::kProduct;
  for (int s = 0; at.finds_ranges && s < (args.y.data ? 2 : 1); ++s) {
    CosineArgs set = vectors_of(args, s);
    set.eps = 0;
    vector_inverse_norms(kName, set, 0, place(at.norms[s]), stream);
  }
  for (int s = 0; s < 2; ++s) {
    const BatchView& dx = s ? args.dy : args.dx;
    if (!dx.data) continue;
    WeightsKernel<T, PenaltyWeights<A>> a{};
    WeightedProduct<T> out{};
    a.weights.penalty = pair_penalty<A>(args);
    a.weights.of_y = s == 1;
    a.weights.identity = !args.y.data;
    // slopes of cosines are at most 4
    a.weights.range = half && !at.finds_ranges ? A(1024) : A(1);
    if (at.finds_ranges) {  // the slope of a product is the other's
      const auto norms = [&](int set, bool counts) {
        return Global<const A>{counts && (set == 0 || args.y.data) ? place(at.norms[set]) : nullptr};
      };
      launch(kName, norm_ranges<A>, args.L, kRangeThreads, kRangeThreads / 32 * sizeof(A), stream,
             norms(0, !product || s == 1), norms(1, !product || s == 0), args.y.data ? A(0) : A(1),
             Global<A>{place(at.ranges)}, static_cast<int>(args.N));
      a.weights.ranges = {place(at.ranges)};
    }
    a.x = a.y = gram_vectors<T>(args, s);
    a.z = gram_vectors<T>(args, 1 - s);
    a.x_inverse_norms = a.y_inverse_norms = {inverse_norms[s]};
    a.z_inverse_norms = {inverse_norms[1 - s]};
    a.within = true;
    out.inverse_eps = static_cast<A>(args.normalise ? inverse_of(args.eps) : 0);
    out.factor = 2 / a.weights.range;
    out.dsums = {static_cast<const A*>(args.dsums)};
    out.ranges = a.weights.ranges;
    launch_weighted(kName, a, out, s ? "dy" : "dx", dx, args.L, at.plan, place_in<T>(scratch, at.weights),
                    place(at.along), stream);
  }
}

}  // namespace

int64_t two_gram_bwd_scratch(const TwoGramBackward& args) { return Places(args).size; }

void two_gram_bwd(const TwoGramBackward& args, void* scratch, void* stream) {
  if (args.L == 0 || !(args.dx.data || args.dy.data)) return;
  check_sizes(args);
  with_type(args.x.dtype, [&](auto number) { backward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
