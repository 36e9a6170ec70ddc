// Backward of pairwise cosine penalties; the maths is in vitdiv_kernels/ops/pairs/pairwise_cosine/README.md.
//
// The slopes of abs and relu are made from the forward's signs in the registers of the product; those of
// square are the similarities, made again. What the normalisation takes out of the gradient of abs and relu
// is known from the forward's sums of penalties.
#include "pair_weights.cuh"
#include "pairwise_cosine_bwd.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kName = "pairwise_cosine_bwd";

// dx_i = factor dsums inverse_norm_i (sum_j slope[i, j] ŷ_j - x̂_i x_sums_i), slope = 1, -1 or 0 by the
// forward's signs.
template <class T>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, (sizeof(T) == 2 ? 2 : 1)) gradient_tile(SignedGradient<T> a) {
  using Layout = SignLayout<T>;
  const int n = a.x.count, m = a.y.count, tiles = a.row_tiles * a.width_tiles, tile = block_x() % tiles;
  const int64_t item = block_x() / tiles;
  const int row0 = tile / a.width_tiles * Layout::kRows, k0 = tile % a.width_tiles * Layout::kWidth;
  const auto part = CosinePart<T>::of_column(row0, k0, n, a.x.width);
  const int row = row0 + part.row, lane = lane_id();
  Carver carve;
  const Shared<T> memory = carve.take<T>(Layout::kMemory);
  UnitVectors<T, Layout> unit{a.y, a.y_inverse_norms, item * a.y.item, item * m, k0, {}, {}};
  CosineSums<T> acc = {};

  unit.load(0);
  SignWords next = sign_words(a, item, row, 0);
  for (int first = 0; first < m; first += 32) {
    const int to = first / 32 % 2 * Layout::kUnit;
    unit.store(memory.part(to, Layout::kUnit), first);
    SignWords words = next;
    sync_block();  // the other buffer was read before it
    if (first + 32 < m) {
      unit.load(first + 32);
      next = sign_words(a, item, row, first + 32);
    }
    uint32_t mine[2][4];
    UNROLLED_FOR (int p = 0; p < 2; ++p) {
      if (a.within ? first < row : a.turned) words.plane[p] = transpose32(words.plane[p]);
      UNROLLED_FOR (int i = 0; i < 4; ++i) mine[p][i] = warp_shuffle(words.plane[p], 8 * i + (lane >> 2));
    }
    add_unit_vectors<T, Layout, true>(acc, part, memory, to, [&](FragmentA<T>& w, int r, int j) {
      const uint32_t positive[2] = {mine[0][2 * r], mine[0][2 * r + 1]},
                     negative[2] = {mine[1][2 * r], mine[1][2 * r + 1]};
      slopes<T>(w, positive, negative, j);
    });
  }

  sync_block();  // the memory may still be in use
  if (part.any())
    write_gradient<T, Layout>(a, acc, part, memory, item, row0, k0, a.factor * a.dsums.ld(item),
                              [&](int at) { return a.x_sums.ld(item * n + row0 + at); });
}

// The slope of S^2 / 2.
template <class A>
struct SquareWeights {
  static constexpr int kGrams = 1;
  struct Side {};
  bool without_itself;
  DEVICE void begin(int64_t) {}
  DEVICE Side row(int64_t) const { return {}; }
  DEVICE Side column(int64_t) const { return {}; }
  DEVICE A weight(Side, Side, A s, A, bool itself) const { return without_itself && itself ? A(0) : s; }
};

// Places in scratch, in bytes, of square.
struct Places : Pieces {
  WeightsPlan plans[2];  // of dx and of dy
  int64_t weights, along;
  explicit Places(const CosineArgs& args)
      : Pieces(args.x.dtype),
        plans{{kName, args.x.dtype, args.L, args.N, args.M}, {kName, args.x.dtype, args.L, args.M, args.N}} {
    weights = take(std::max(plans[0].weights(), plans[1].weights()));
    along = take(std::max(plans[0].along(), plans[1].along()));
  }
};

// Of set s against the other, or of x against itself.
template <class T>
void gradient(const CosineBackward& args, int s, const BatchView& dx, void* scratch, void* stream) {
  using A = Acc<T>;
  if (!dx.data) return;
  const bool within = !args.y.data;
  const char* name = s ? "dy" : "dx";
  const CosineSaved saved(args);
  const auto numbers = [&](int64_t word) { return Global<const A>{in_words<const A>(args.saved, word)}; };
  const auto fill = [&](auto& a) {
    a.x = set_of<T>(args, s);
    a.y = set_of<T>(args, 1 - s);
    a.x_inverse_norms = numbers(saved.inverse_norms[s]);
    a.y_inverse_norms = numbers(saved.inverse_norms[1 - s]);
  };
  const A inverse_eps = static_cast<A>(inverse_of(args.eps));
  const Global<const A> dsums{static_cast<const A*>(args.dsums)};
  if (args.penalty == Penalty::kSquare) {
    const Places at(args);
    WeightsKernel<T, SquareWeights<A>> a{};
    WeightedProduct<T> out{};
    fill(a);
    a.within = within;
    a.weights = {within && !args.include_self};
    out.inverse_eps = inverse_eps;
    out.factor = A(within ? 4 : 2);
    out.dsums = dsums;
    launch_weighted(kName, a, out, name, dx, args.L, at.plans[s], place_in<T>(scratch, at.weights),
                    place_in<A>(scratch, at.along), stream);
    return;
  }
  SignedGradient<T> a{};
  fill(a);
  a.inverse_eps = inverse_eps;
  a.x_sums = numbers(saved.sums[s]);
  a.dsums = dsums;
  a.signs = {in_words<const uint32_t>(args.saved, saved.signs)};
  a.within = within;
  a.turned = s == 1;
  a.planes = args.penalty == Penalty::kAbs ? 2 : 1;
  a.factor = A(within ? 2 : 1);
  set_gradient<T, SignLayout<T>>(a, name, dx, args.L);
  launch(kName, gradient_tile<T>, args.L * a.row_tiles * a.width_tiles, CosineTile<T>::kThreads,
         SignLayout<T>::kMemory * int64_t(sizeof(T)), stream, a);
}

}  // namespace

int64_t pairwise_cosine_bwd_scratch(const CosineBackward& args) {
  return args.penalty == Penalty::kSquare && args.L > 0 ? Places(args).size : 0;
}

void pairwise_cosine_bwd(const CosineBackward& args, void* scratch, void* stream) {
  if (args.L == 0) return;
  if (args.penalty == Penalty::kSigned) return signed_backward(args, stream);
  with_type(args.x.dtype, [&](auto number) {
    using T = decltype(number);
    gradient<T>(args, 0, args.dx, scratch, stream);
    gradient<T>(args, 1, args.dy, scratch, stream);
  });
}

}  // namespace vitdiv::cuda
