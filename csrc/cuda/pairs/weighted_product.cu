// Gradients of vectors from their pairs' weights in a workspace: pair_weights.cuh.
#include "pair_weights.cuh"

namespace vitdiv::cuda {
namespace {

// Two buffers, each of weights of 32 other vectors, a square of 32 for each warp, and of the unit vectors.
template <class T>
struct ProductLayout : TallLayout<T> {
  static constexpr int kWeightStride = row_stride<T>(32), kWeights = TallLayout<T>::kRows * kWeightStride;
  static constexpr int kBuffer = kWeights + TallLayout<T>::kUnit;
  static constexpr int kMemory = std::max(2 * kBuffer, TallLayout<T>::kAllTurned);
  static constexpr int64_t kBytes =
      kMemory * int64_t(sizeof(T)) + TallLayout<T>::kRows * int64_t(sizeof(Acc<T>));
};

// u_i = sum_j weights[i, j] ŷ_j; dx_i = factor inverse_norm_i (u_i - x̂_i along_i), along_i = x̂_i . u_i.
template <class T>
KERNEL LAUNCH_BOUNDS(CosineTile<T>::kThreads, (sizeof(T) == 2 ? 2 : 1))
    weighted_product(WeightedProduct<T> a) {
  using Layout = ProductLayout<T>;
  using A = Acc<T>;
  const int m = a.y.count, tiles = a.row_tiles * a.width_tiles, tile = block_x() % tiles;
  const WeightsOfPairs<T>& from = a.from;
  const int64_t local = block_x() / tiles, item = from.first_item + local;
  const int row0 = from.first_row + tile / a.width_tiles * Layout::kRows,
            k0 = tile % a.width_tiles * Layout::kWidth, bottom = from.first_row + from.rows;
  const auto part = CosinePart<T>::of_column(row0, k0, bottom, a.x.width);
  const int top = row0 + part.row;  // of the warp's rows
  Carver carve;
  const Shared<T> memory = carve.take<T>(Layout::kMemory);
  const Shared<A> along = carve.take<A>(Layout::kRows);
  UnitVectors<T, Layout> unit{a.y, a.y_inverse_norms, item * a.y.item, item * m, k0, {}, {}};
  // Squares below the diagonal are those above it, turned. A warp fetches its own.
  const auto turned = [&](int first) { return from.triangle && first < top; };
  const auto fetch = [&](int first) {
    constexpr int pieces = 32 / kPiece<T>, each = 32 / pieces;  // of a row; rows at a time
    const bool turn = turned(first);
    const int down = lane_id() / pieces, across = lane_id() % pieces * kPiece<T>;
    const int row = (turn ? first : top) + down, column = (turn ? top : first) + across;
    const int to = first / 32 % 2 * Layout::kBuffer + (part.row + down) * Layout::kWeightStride + across;
    const int64_t at = (local * from.rows + row - from.first_row) * from.stride + column;
    UNROLLED_FOR (int q = 0; q < pieces; ++q)
      copy16_async(memory, to + q * each * Layout::kWeightStride, Global<const T>{from.weights.p},
                   at + q * each * int64_t(from.stride), part.any() && row + q * each < bottom);
    copy_commit();
  };
  CosineSums<T> acc = {};
  fetch(0);
  unit.load(0);
  A sum = 0;
  if (const int row = row0 + thread_x(); row < bottom)
    for (int s = 0; s < from.slots; ++s)
      sum += from.along.ld((local * from.slots + s) * from.rows + row - from.first_row);
  along.st(thread_x(), sum);
  for (int first = 0; first < m; first += 32) {
    const int at = first / 32 % 2 * Layout::kBuffer;
    unit.store(memory.part(at + Layout::kWeights, Layout::kUnit), first);
    copy_wait<0>();
    sync_block();  // also: the other buffer is no longer in use
    if (first + 32 < m) {
      fetch(first + 32);
      unit.load(first + 32);
    }
    const bool turn = turned(first);
    const int square = at + part.row * Layout::kWeightStride;
    add_unit_vectors<T, Layout, false>(
        acc, part, memory, at + Layout::kWeights, [&](FragmentA<T>& w, int r, int j) {
          if (turn)
            load_a<true>(w, memory, [&](int row, int k) {
              return square + (j + k) * Layout::kWeightStride + 16 * r + row;
            });
          else
            load_a(w, memory,
                   [&](int row, int k) { return square + (16 * r + row) * Layout::kWeightStride + j + k; });
        });
  }

  sync_block();  // the memory may still be in use
  if (!part.any()) return;
  const A factor = a.factor * (a.dsums.p ? a.dsums.ld(item) : A(1)) / (a.ranges.p ? a.ranges.ld(item) : A(1));
  write_gradient<T, Layout>(a, acc, part, memory, item, row0, k0, factor,
                            [&](int at) { return along.ld(at); });
}

}  // namespace

template <class T>
void launch_weighted_product(const char* operation, const WeightedProduct<T>& a, int64_t items,
                             void* stream) {
  launch(operation, weighted_product<T>, items * a.row_tiles * a.width_tiles, CosineTile<T>::kThreads,
         ProductLayout<T>::kBytes, stream, a);
}
template void launch_weighted_product(const char*, const WeightedProduct<half_t>&, int64_t, void*);
template void launch_weighted_product(const char*, const WeightedProduct<bf16_t>&, int64_t, void*);
template void launch_weighted_product(const char*, const WeightedProduct<float>&, int64_t, void*);
template void launch_weighted_product(const char*, const WeightedProduct<double>&, int64_t, void*);

}  // namespace vitdiv::cuda
