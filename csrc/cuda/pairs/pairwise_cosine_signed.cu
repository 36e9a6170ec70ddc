// Inverse norms of vectors, and the penalty `signed` of pairwise cosines, forward and backward, which needs
// no pairs: it is a product of sums of unit vectors. The maths is in
// vitdiv_kernels/ops/pairs/pairwise_cosine/README.md.
#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {
namespace {

constexpr int kThreads = 256, kBlockRows = 32;  // a block's vectors, four a warp

template <class T>
struct InverseNormsKernel {
  Vectors<T> x;  // [items, count, width]
  int blocks;    // of an item
  Acc<T> eps;
  Acc<T> inverse_eps;
  Global<Acc<T>> inverse_norms;  // [items, count]
  bool wants_sums;
  Global<Acc<T>> sums;     // [items, blocks, width]: of unit vectors
  Global<Acc<T>> squares;  // [items, blocks]: of their norms
};

// The norm of a vector of any length, by a warp: a power of two times the norm of the rest.
template <class T>
DEVICE Acc<T> far_norm(const Vectors<T>& x, int64_t at, Acc<T> eps) {
  using A = Acc<T>;
  // up to there the inverse is a normal number, too
  constexpr A most = sizeof(A) == 8 ? A(0x1p1022) : A(0x1p126);
  A size = larger(eps, 1 / most), power, rest, squares = 0;
  for (int k = lane_id(); k < x.width; k += 32) {
    const A entry = to_float(x.data.ld(at + k));
    size = larger(size, entry < 0 ? -entry : entry);
  }
  size = warp_max(size);
  power_and_rest(size < most ? size : most, power, rest);
  for (int k = lane_id(); k < x.width; k += 32) {
    const A entry = to_float(x.data.ld(at + k)) * (1 / power);
    squares += entry * entry;
  }
  return square_root(warp_sum(squares)) * power;
}

// inverse_norm_i = 1 / max(|x_i|, eps); with wants_sums, of a block's vectors, sum_i x̂_i and
// sum_i |x̂_i|^2.
template <class T>
KERNEL LAUNCH_BOUNDS(kThreads, 2) read_vectors(InverseNormsKernel<T> a) {
  constexpr int each = kBlockRows / (kThreads / 32);
  const int warp = thread_x() >> 5, lane = lane_id();
  const int64_t item = block_x() / a.blocks, x = item * a.x.item;
  const int row0 = block_x() % a.blocks * kBlockRows, mine = row0 + warp * each;
  Acc<T> squares[each] = {};
  if (a.x.pieces) {
    for (int k = lane * kPiece<T>; k < a.x.width; k += 32 * kPiece<T>)
      UNROLLED_FOR (int r = 0; r < each; ++r) {
        if (mine + r >= a.x.count) continue;
        Acc<T> v[kPiece<T>];
        unpack<T>(a.x.data.template ld<uint4>(x + (mine + r) * a.x.row + k), v);
        UNROLLED_FOR (int i = 0; i < kPiece<T>; ++i) squares[r] += v[i] * v[i];
      }
  } else {
    for (int k = lane; k < a.x.width; k += 32)
      UNROLLED_FOR (int r = 0; r < each; ++r) {
        if (mine + r >= a.x.count) continue;
        const Acc<T> v = to_float(a.x.data.ld(x + (mine + r) * a.x.row + k));
        squares[r] += v * v;
      }
  }
  Carver carve;
  const Shared<Acc<T>> inverse_norms = carve.take<Acc<T>>(kBlockRows),
                       lengths = carve.take<Acc<T>>(kBlockRows);
  UNROLLED_FOR (int r = 0; r < each; ++r) {
    Acc<T> norm = square_root(warp_sum(squares[r]));
    if constexpr (!std::is_same_v<T, half_t>)
      if (mine + r < a.x.count && is_far(larger(norm, a.eps)))
        norm = far_norm<T>(a.x, x + (mine + r) * a.x.row, a.eps);
    const Acc<T> inverse_norm = inverse_of_norm(norm, a.eps, a.inverse_eps);
    if (lane != 0) continue;
    if (mine + r < a.x.count) a.inverse_norms.st(item * a.x.count + mine + r, inverse_norm);
    inverse_norms.st(warp * each + r, inverse_norm);
    lengths.st(warp * each + r, norm * inverse_norm);
  }
  if (!a.wants_sums) return;
  sync_block();
  const int present = a.x.count - row0 < kBlockRows ? a.x.count - row0 : kBlockRows;
  for (int k = thread_x(); k < a.x.width; k += threads()) {
    Acc<T> sum = 0;
    for (int r = 0; r < present; ++r)
      sum += to_float(a.x.data.ld(x + (row0 + r) * a.x.row + k)) * inverse_norms.ld(r);
    a.sums.st(int64_t(block_x()) * a.x.width + k, sum);
  }
  if (thread_x() == 0) {
    Acc<T> sum = 0;
    for (int r = 0; r < present; ++r) sum += lengths.ld(r) * lengths.ld(r);
    a.squares.st(block_x(), sum);
  }
}

// totals = x . y - sum_b squares[b]: of the sums of unit vectors of two sets, or of one set, of which the
// vectors with themselves are taken off.
template <class A>
KERNEL LAUNCH_BOUNDS(kThreads, 1) signed_totals(Global<const A> x, Global<const A> y, Global<const A> squares,
                                                Global<A> totals, int width, int blocks) {
  Carver carve;
  const Shared<double> memory = carve.take<double>(kThreads / 32);
  const int64_t item = block_x();
  double sum = 0;
  for (int k = thread_x(); k < width; k += threads())
    sum += static_cast<double>(x.ld(item * width + k)) * y.ld(item * width + k);
  for (int b = thread_x(); b < blocks; b += threads()) sum -= squares.ld(item * blocks + b);
  sum = block_sum(sum, memory);
  if (thread_x() == 0) totals.st(item, static_cast<A>(sum));
}

template <class T>
struct SignedKernel {
  Vectors<T> x;                        // [items, count, width]
  Global<const Acc<T>> inverse_norms;  // [items, count]
  Global<const Acc<T>> sums;           // [items, width]: of the other set's unit vectors
  Global<const Acc<T>> dsums;          // [items]
  int blocks;                          // of an item
  bool less_itself;
  Acc<T> factor;
  Acc<T> inverse_eps;
  Global<T> dx;  // [items, count, width]
  int64_t dx_item;
  int64_t dx_row;
};

// dx = inverse_norm (u - x̂ (x̂ . u)), u being the sum of unit vectors. The part of x̂ itself in u has no
// gradient, but where it was divided by eps.
template <class T>
KERNEL LAUNCH_BOUNDS(kThreads, 1) signed_gradient(SignedKernel<T> a) {
  using A = Acc<T>;
  const int64_t item = block_x() / a.blocks, sums = item * a.x.width;
  const int row0 = block_x() % a.blocks * kBlockRows;
  const A factor = a.factor * a.dsums.ld(item);
  for (int i = row0 + thread_x() / 32; i < row0 + kBlockRows && i < a.x.count; i += kThreads / 32) {
    const int64_t x = item * a.x.item + i * a.x.row, dx = item * a.dx_item + i * a.dx_row;
    const A inverse_norm = a.inverse_norms.ld(item * a.x.count + i);
    A along = 0;
    for (int k = lane_id(); k < a.x.width; k += 32)
      along += to_float(a.x.data.ld(x + k)) * inverse_norm * a.sums.ld(sums + k);
    along = warp_sum(along);
    if (!(inverse_norm < a.inverse_eps)) along = a.less_itself ? A(1) : A(0);
    for (int k = lane_id(); k < a.x.width; k += 32) {
      const A unit = to_float(a.x.data.ld(x + k)) * inverse_norm;
      a.dx.st(dx + k, from_acc<T>(factor * inverse_norm * (a.sums.ld(sums + k) - unit * along)));
    }
  }
}

template <class T>
void read(const char* operation, const CosineArgs& args, int set, Acc<T>* inverse_norms, Acc<T>* sums,
          Acc<T>* squares, void* stream) {
  const Vectors<T> x = set_of<T>(args, set);
  const int blocks = static_cast<int>(ceil_div(x.count, kBlockRows));
  launch(operation, read_vectors<T>, args.L * blocks, kThreads, 2 * kBlockRows * sizeof(Acc<T>), stream,
         InverseNormsKernel<T>{x,
                               blocks,
                               static_cast<Acc<T>>(args.eps),
                               static_cast<Acc<T>>(inverse_of(args.eps)),
                               {inverse_norms},
                               sums != nullptr,
                               {sums},
                               {squares}});
}

// Places in scratch, in bytes.
struct Places : Pieces {
  int64_t inverse_norms[2], sums[2], parts[2], squares[2];
  explicit Places(const CosineForward& args) : Pieces(args.x.dtype) {
    const int64_t counts[2] = {args.N, args.M}, L = args.L;
    for (int s = 0; s < (args.y.data ? 2 : 1); ++s) {
      const int64_t blocks = ceil_div(counts[s], kBlockRows);
      inverse_norms[s] = take(args.saved ? 0 : L * counts[s]);
      sums[s] = take(args.saved ? 0 : L * args.D);
      parts[s] = take(blocks > 1 ? L * blocks * args.D : 0);
      squares[s] = take(L * blocks);
    }
  }
};

template <class T>
void forward(const CosineForward& args, void* scratch, void* stream) {
  using A = Acc<T>;
  const Places at(args);
  const CosineSaved saved(args);
  const int64_t counts[2] = {args.N, args.M};
  const auto place = [&](int64_t byte) { return place_in<A>(scratch, byte); };
  const auto keep = [&](int64_t word, int64_t bytes) {
    return args.saved ? in_words<A>(args.saved, word) : place(bytes);
  };
  const int sets = args.y.data ? 2 : 1;
  A* sums[2];
  for (int s = 0; s < sets; ++s) {
    const int blocks = static_cast<int>(ceil_div(counts[s], kBlockRows));
    sums[s] = keep(saved.sums[s], at.sums[s]);
    A* parts = blocks > 1 ? place(at.parts[s]) : sums[s];
    read<T>("pairwise_cosine_fwd", args, s, keep(saved.inverse_norms[s], at.inverse_norms[s]), parts,
            place(at.squares[s]), stream);
    if (blocks > 1)
      launch_sum_parts("pairwise_cosine_fwd", parts, sums[s], args.L, blocks, int(args.D), stream);
  }
  const int64_t blocks = sets == 1 && !args.include_self ? ceil_div(args.N, kBlockRows) : 0;
  launch("pairwise_cosine_fwd", signed_totals<A>, args.L, kThreads, kThreads / 32 * sizeof(double), stream,
         Global<const A>{sums[0]}, Global<const A>{sums[sets - 1]}, Global<const A>{place(at.squares[0])},
         Global<A>{static_cast<A*>(args.sums)}, static_cast<int>(args.D), static_cast<int>(blocks));
}

template <class T>
void backward(const CosineBackward& args, int set, const BatchView& dx, void* stream) {
  using A = Acc<T>;
  const bool within = !args.y.data;
  const CosineSaved saved(args);
  const Vectors<T> x = set_of<T>(args, set), out = vectors<T>(set ? "dy" : "dx", dx, args.L, x.count, args.D);
  const auto numbers = [&](int64_t word) { return Global<const A>{in_words<const A>(args.saved, word)}; };
  const int blocks = static_cast<int>(ceil_div(x.count, kBlockRows));
  launch("pairwise_cosine_bwd", signed_gradient<T>, args.L * blocks, kThreads, 0, stream,
         SignedKernel<T>{x,
                         numbers(saved.inverse_norms[set]),
                         numbers(saved.sums[1 - set]),
                         {static_cast<const A*>(args.dsums)},
                         blocks,
                         within && !args.include_self,
                         within ? A(2) : A(1),
                         static_cast<A>(inverse_of(args.eps)),
                         {const_cast<T*>(out.data.p)},
                         out.item,
                         out.row});
}

}  // namespace

void vector_inverse_norms(const char* operation, const CosineArgs& args, int set, void* inverse_norms,
                          void* stream) {
  with_type(args.x.dtype, [&](auto number) {
    using T = decltype(number);
    read<T>(operation, args, set, static_cast<Acc<T>*>(inverse_norms), nullptr, nullptr, stream);
  });
}

int64_t signed_forward_scratch(const CosineForward& args) { return Places(args).size; }

void signed_forward(const CosineForward& args, void* scratch, void* stream) {
  with_type(args.x.dtype, [&](auto number) { forward<decltype(number)>(args, scratch, stream); });
}

void signed_backward(const CosineBackward& args, void* stream) {
  with_type(args.x.dtype, [&](auto number) {
    using T = decltype(number);
    if (args.dx.data) backward<T>(args, 0, args.dx, stream);
    if (args.dy.data) backward<T>(args, 1, args.dy, stream);
  });
}

}  // namespace vitdiv::cuda
