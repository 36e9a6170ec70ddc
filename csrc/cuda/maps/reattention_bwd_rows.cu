// The first sweep of re-attention's backward: a block owns 16 query rows of all heads. It makes the sums of
// the parameters' gradients and, of each row, the mean over keys of dA by A; then dq. Where a row of all
// heads' maps and of their gradients fits the shared memory they are made once, else chunk by chunk, twice.
// Where logits are mixed it makes their statistics, too.
#include "reattention_bwd_heads.cuh"

namespace vitdiv::cuda {
namespace {

template <class B>
DEVICE void statistics(const B& b) {
  using A = typename B::A;
  const auto& a = b.a;
  const int warps = threads() >> 5, keys = padded_width(a.other_rows);
  if (!a.pre_mix.p) {  // softmax_rows has made them
    for (int c = thread_x(); c < a.heads * kOwnRows; c += threads()) {
      const bool there = b.row0 + c % kOwnRows < a.own_rows;
      b.row_maxes().st(c, there ? a.rows.ld(b.global_row(c)) : A(0));
      b.row_scales().st(c, there ? a.rows.ld(b.global_row(c) + a.field) : A(0));
    }
    sync_block();
    return;
  }
  for (int first = 0; first < keys; first += a.chunk) {
    const int columns = keys - first < a.chunk ? keys - first : a.chunk;
    b.make(first, columns, true, false);
    sync_block();
    for (int i = b.warp; i < kOwnRows; i += warps) {
      RowStatistics<typename B::T, B::kGroups> row;
      for (int x = 0; x < columns; x += 16) {
        typename B::Tile z;
        mixed_logits(b, z, i, x, first);
        row.add(z);
      }
      row.finish();
      UNROLLED_FOR (int group = 0; group < B::kGroups; ++group)
        UNROLLED_FOR (int half = 0; half < 2; ++half) {
          const int h = b.head_of(group, 2 * half);
          if (h >= a.heads || (lane_id() & 3) != 0) continue;
          const int at = b.number(h, i, 0);
          const A before = first ? b.row_maxes().ld(at) : A(-1e38),
                  sum = first ? b.row_scales().ld(at) : A(0);
          const A row_max = larger(before, row.row_max[group][half]);
          b.row_maxes().st(at, row_max);
          b.row_scales().st(at, sum * fast_exp2(before - row_max) +
                                    row.sum[group][half] * fast_exp2(row.row_max[group][half] - row_max));
        }
    }
    sync_block();
  }
  for (int c = thread_x(); c < a.heads * kOwnRows; c += threads())
    b.row_scales().st(c, b.kScale / b.row_scales().ld(c));
  sync_block();
}

// The depth x 16 fragment of B from numbers of another type than the product's.
template <class T, class R, class At>
DEVICE void load_b_converted(FragmentB<T> (&b)[2], Shared<R> s, At at) {
  static_assert(sizeof(T) == 2);
  UNROLLED_FOR (int j = 0; j < 2; ++j)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const auto x = load2(s, at((lane_id() >> 2) + 8 * j, 2 * (lane_id() & 3) + 8 * i));
      b[j].r[i] = pack2<T>(x.x, x.y);
    }
}

// Sums of left_g right_h over the chunk's positions and over chunks. A warp has those of one pair of groups
// of 16 heads, over some of the rows.
template <class B>
struct Products {
  using T = typename B::T;
  using A = typename B::A;
  static constexpr int kPairs = B::kGroups * B::kGroups;
  A sums[2][4];

  DEVICE void clear() {
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 4; ++e) sums[j][e] = 0;
  }
  template <class R>
  DEVICE void add(const B& b, Shared<T> left, Shared<R> right, const Chunk<R>& right_at, int columns) {
    const int pair = b.warp % kPairs, slices = (threads() >> 5) / kPairs;
    const int first = pair / B::kGroups * 16, second = pair % B::kGroups * 16;
    const auto at = b.at_t();
    for (int i = b.warp / kPairs; i < kOwnRows && b.warp < slices * kPairs; i += slices)
      for (int x = 0; x < columns; x += kDepth<T>) {
        FragmentA<T> p;
        FragmentB<T> y[2];
        load_a(p, left, [&](int h, int k) { return at.place(first + h, i, x + k); });
        const auto place = [&](int h, int k) { return right_at.place(second + h, i, x + k); };
        if constexpr (std::is_same_v<T, R>)
          load_b(y, right, place);
        else
          load_b_converted<T>(y, right, place);
        multiply_add<T>(sums, p, y);
      }
  }
  // partial[to + g heads + h] = unit times the block's sums, added in the order of the warps.
  DEVICE void store(const B& b, int64_t to, A unit) const {
    const int heads = b.a.heads, warps = (threads() >> 5) / kPairs * kPairs;
    sync_block();
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 4; ++e)
        b.space().st(256 * b.warp + 16 * tile_row(e) + 8 * j + tile_col(e), sums[j][e]);
    sync_block();
    for (int c = thread_x(); c < heads * heads; c += threads()) {
      const int g = c / heads, h = c % heads;
      A sum = 0;
      for (int w = g / 16 * B::kGroups + h / 16; w < warps; w += kPairs)
        sum += b.space().ld(256 * w + g % 16 * 16 + h % 16);
      b.a.partial.st(to + c, sum * unit);
    }
  }
};

template <class B>
DEVICE void add_dbias(const B& b, int i, int x, VectorSums<B>& sums) {
  typename B::Tile dm;
  load_tile(dm, b.grads(), b.at_t(), i, x);
  for_each_element<B::kGroups>(
      [&](int group, int j, int e) { sums.sums[0][group][e >> 1] += dm[group][j][e]; });
}

// A lane's part of sum_j A dA and of sum_j A, which rounding has made other than 1, and its largest |A dA|.
template <class B>
struct RowDot {
  typename B::A sums[B::kGroups][2], maps[B::kGroups][2];
};
template <class B>
DEVICE void add_row_dot(const B& b, const typename B::Tile& da, int i, int x, int first, RowDot<B>& row_dot,
                        typename B::A& largest) {
  typename B::Tile p;
  whole_maps(b, p, i, x, first);
  for_each_element<B::kGroups>([&](int group, int j, int e) {
    const typename B::A product = p[group][j][e] * da[group][j][e];
    row_dot.sums[group][e >> 1] += product;
    row_dot.maps[group][e >> 1] += p[group][j][e];
    if constexpr (kBounded<typename B::T>) largest = larger(largest, product < 0 ? -product : product);
  });
}

template <class B>
DEVICE void store_row_dot(const B& b, const RowDot<B>& row_dot, int i, bool first) {
  for_each_head<B::kGroups>([&](int group, int half, int h) {
    const typename B::A sum = quad_sum(row_dot.sums[group][half]), maps = quad_sum(row_dot.maps[group][half]);
    if (h >= b.a.heads || (lane_id() & 3) != 0) return;
    const int at = b.number(h, i, 0);
    b.row_dots().st(at, first ? sum : b.row_dots().ld(at) + sum);
    b.map_sums().st(at, first ? maps : b.map_sums().ld(at) + maps);
  });
}

// The block's sums of vectors over its warps, in their order: partial[to + which heads + h].
template <class B>
DEVICE void store_vectors(const B& b, const VectorSums<B>& sums, int64_t to) {
  const int heads = b.a.heads, warps = threads() >> 5, padded = 16 * B::kGroups;
  sync_block();
  UNROLLED_FOR (int which = 0; which < 3; ++which)
    UNROLLED_FOR (int group = 0; group < B::kGroups; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const typename B::A sum = quad_sum(sums.sums[which][group][half]);
        if ((lane_id() & 3) == 0)
          b.space().st((b.warp * 3 + which) * padded + b.head_of(group, 2 * half), sum);
      }
  sync_block();
  for (int c = thread_x(); c < 3 * heads; c += threads()) {
    typename B::A sum = 0;
    for (int w = 0; w < warps; ++w) sum += b.space().ld((w * 3 + c / heads) * padded + c % heads);
    b.a.partial.st(to + c, sum);
  }
}

// A bound of |dL| in this block, from the lanes' largest |A dA|.
template <class B>
DEVICE typename B::A bound_of(const B& b, typename B::A largest) {
  typename B::A row_dot = 0;
  for (int c = lane_id(); c < b.a.heads * kOwnRows; c += 32) {
    const typename B::A x = b.row_dots().ld(c);
    row_dot = larger(row_dot, x < 0 ? -x : x);
  }
  row_dot = warp_max(row_dot);
  largest = warp_max(largest);
  if (lane_id() == 0) b.maxima().st(b.warp, largest);
  sync_block();
  for (int w = 0; w < threads() >> 5; ++w) largest = larger(largest, b.maxima().ld(w));
  return largest + row_dot;
}

// dY = dout v^T; dM = dY through the layer norm; dA_h = sum_g mix[g, h] dM_g + sum_k coupling[h, k] (A_k -
// 1/M); dL = A (dA - sum over keys of A dA); dZ = dL, or pre_mix^T dL; dq = scale dZ k.
template <class T, int GROUPS>
KERNEL LAUNCH_BOUNDS((32 * kBackwardWarps<T, GROUPS>), 1) query_sweep(BackwardKernel<T> a) {
  using A = Acc<T>;
  using B = BackwardTile<T, false, GROUPS>;
  const B b(a);
  const int warps = threads() >> 5, heads = a.heads, keys = padded_width(a.other_rows);
  const bool whole = a.chunk >= keys;
  const int64_t part = int64_t(block_x()) * (2 * heads * heads + 3 * heads);
  constexpr bool holds_row_dot = GROUPS == 1 || sizeof(T) < 8;  // else registers are short
  const auto clear = [&](bool unused, int first, int end) {     // all of it is added up
    if (unused && (a.wants_dmix || a.wants_dnorm || a.wants_dpre_mix))
      for (int c = first + thread_x(); c < end; c += threads()) a.partial.st(part + c, A(0));
  };
  clear(!a.wants_dmix, 0, heads * heads);
  clear(!a.wants_dpre_mix, heads * heads, 2 * heads * heads);
  clear(!a.wants_dmix && !a.wants_dnorm, 2 * heads * heads, 2 * heads * heads + 3 * heads);
  statistics(b);

  const bool wants_sums = a.goes_on || a.wants_dmix || a.wants_dnorm,
             wants_dl = a.out[0].p || a.wants_dpre_mix;
  Products<B> products;
  VectorSums<B> sums{};
  A largest = 0, size = 1;
  for (int pass = wants_sums ? 0 : 2; pass < (wants_dl ? 2 : 1); ++pass) {
    const bool fresh = pass == 0 || !whole;  // the maps are to be made
    products.clear();
    for (int first = 0; first < keys; first += a.chunk) {
      const int columns = keys - first < a.chunk ? keys - first : a.chunk;
      if (fresh) b.make(first, columns, !(whole && a.pre_mix.p), a.dout);
      sync_block();
      ROLLED_FOR (int i = b.warp; i < kOwnRows; i += warps) {
        RowDot<B> row_dot{};
        ROLLED_FOR (int x = 0; x < columns; x += 16) {
          typename B::Tile tile;
          if (fresh && a.pre_mix.p) maps_of_logits(b, i, x, first);
          if (fresh && a.layer_norm) through_norm(b, tile, sums, i, x, first);
          if (pass == 0 && a.wants_dmix) add_dbias(b, i, x, sums);
          if (!a.goes_on) continue;
          maps_gradient(b, tile, i, x);
          if (pass == 1) {
            logits_gradient(b, tile, i, x, first, size);
            continue;
          }
          if constexpr (!holds_row_dot) row_dot = {};
          add_row_dot(b, tile, i, x, first, row_dot, largest);
          if constexpr (!holds_row_dot) store_row_dot(b, row_dot, i, first == 0 && x == 0);
        }
        if (holds_row_dot && pass == 0 && a.goes_on) store_row_dot(b, row_dot, i, first == 0);
      }
      sync_block();
      if (pass == 0) {
        if (!a.wants_dmix) continue;
        products.add(b, b.grads(), b.maps(), b.at(), columns);
        sync_block();
        continue;
      }
      if (a.pre_mix.p) {
        if (a.wants_dpre_mix) {
          if constexpr (B::kWide) {
            b.make(first, columns, true, false, b.raw_again());
            sync_block();
          }
          products.add(b, b.dz(), b.raw_again(), b.raw_at(), columns);
          sync_block();
        }
        ROLLED_FOR (int i = b.warp; i < kOwnRows; i += warps)
          ROLLED_FOR (int x = 0; x < columns; x += 16) mix_back(b, i, x);
        sync_block();
      }
      if (a.out[0].p)
        b.multiply(0, b.dz(), first, columns,
                   [&](int h) { return a.out_scale / size * (a.pre_mix.p ? unit_of(b.pre_t(), h) : A(1)); });
    }
    if (pass == 0) {
      if (a.wants_dmix) products.store(b, part, 1 / b.kScale);
      if (a.wants_dmix || a.wants_dnorm) store_vectors(b, sums, part + 2 * heads * heads);
      if (!a.goes_on) break;
      for (int c = thread_x(); c < heads * kOwnRows; c += threads())
        if (b.map_sums().ld(c) != 0) b.row_dots().st(c, b.row_dots().ld(c) / b.map_sums().ld(c));
      sync_block();  // the sums' place is that of rows again
      if constexpr (kBounded<T>) {
        const A bound = bound_of(b, largest);
        if (thread_x() == 0) a.bounds.st(block_x(), bound);
        size = gradient_size<T>(bound, a.pre_mix.p != nullptr);
      }
    } else if (a.wants_dpre_mix) {
      products.store(b, part + heads * heads, 1 / size);
    }
  }
  for (int c = thread_x(); c < heads * kOwnRows; c += threads()) {
    if (b.row0 + c % kOwnRows >= a.own_rows) continue;
    const int64_t to = b.global_row(c);
    if (a.pre_mix.p) {
      a.rows.st(to, b.row_maxes().ld(c));
      a.rows.st(to + a.field, b.row_scales().ld(c));
    }
    if (a.goes_on) a.rows.st(to + 2 * a.field, b.row_dots().ld(c));
  }
}

}  // namespace

template <class T>
void launch_query_sweep(const BackwardKernel<T>& a, int64_t shared_bytes, void* stream) {
  const auto kernel = a.heads > 16 ? query_sweep<T, 2> : query_sweep<T, 1>;
  launch("reattention_bwd", kernel, int64_t(a.images) * a.tiles, 32 * a.warps, shared_bytes, stream, a);
}
template void launch_query_sweep(const BackwardKernel<half_t>&, int64_t, void*);
template void launch_query_sweep(const BackwardKernel<bf16_t>&, int64_t, void*);
template void launch_query_sweep(const BackwardKernel<float>&, int64_t, void*);
template void launch_query_sweep(const BackwardKernel<double>&, int64_t, void*);

}  // namespace vitdiv::cuda
