// The second sweep of re-attention's backward: a block owns 16 key rows of all heads and walks over the
// queries in chunks, with transposed tiles. It adds up dk and dv.
#include "reattention_bwd_heads.cuh"

namespace vitdiv::cuda {
namespace {

// dk = scale dZ^T q, dZ as in query_sweep, and dv = Y^T dout.
template <class T, int GROUPS>
KERNEL LAUNCH_BOUNDS((32 * kBackwardWarps<T, GROUPS>), 1) key_sweep(BackwardKernel<T> a) {
  using A = Acc<T>;
  using B = BackwardTile<T, true, GROUPS>;
  const B b(a);
  const int warps = threads() >> 5, heads = a.heads, queries = padded_width(a.other_rows);
  const bool wants_dk = a.out[0].p != nullptr, wants_dv = a.out[1].p != nullptr;
  A size = 1;
  if (kBounded<T> && wants_dk) {
    A bound = 0;
    for (int t = lane_id(); t < a.query_tiles; t += 32)
      bound = larger(bound, a.bounds.ld(int64_t(b.image) * a.query_tiles + t));
    size = gradient_size<T>(warp_max(bound), a.pre_mix.p != nullptr);
  }
  for (int first = 0; first < queries; first += a.chunk) {
    const int columns = queries - first < a.chunk ? queries - first : a.chunk;
    for (int c = thread_x(); c < heads * columns; c += threads()) {
      const int h = c / columns, x = c % columns;
      const int64_t from = (int64_t(b.image) * heads + h) * a.other_rows + first + x;
      const int to = b.number(h, 0, x);
      const bool there = first + x < a.other_rows;
      b.row_maxes().st(to, there ? a.rows.ld(from) : A(0));
      b.row_scales().st(to, there ? a.rows.ld(from + a.field) : A(0));
      b.row_dots().st(to, there && wants_dk ? a.rows.ld(from + 2 * a.field) : A(0));
    }
    sync_block();
    b.make(first, columns, true, a.dout && wants_dk);
    sync_block();
    for (int i = b.warp; i < kOwnRows; i += warps)
      for (int x = 0; x < columns; x += 16) {
        if (a.pre_mix.p) maps_of_logits(b, i, x, first);
        typename B::Tile y;
        if (a.layer_norm) {
          VectorSums<B> unused{};
          if (wants_dk) {
            through_norm(b, y, unused, i, x, first);
          } else {
            A rstd[2][2];
            normalised_maps(b, y, rstd, i, x, first);
          }
          for_each_head<GROUPS>([&](int group, int half, int g) {
            const A weight = b.vector(1, g), norm_bias = b.vector(2, g);
            UNROLLED_FOR (int j = 0; j < 2; ++j)
              UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e)
                y[group][j][e] = y[group][j][e] * weight + norm_bias;
          });
        } else if (wants_dv) {
          mixed_maps(b, y, i, x);
        }
        if (wants_dk) {
          typename B::Tile da;
          maps_gradient(b, da, i, x);
          logits_gradient(b, da, i, x, first, size);
          if (a.pre_mix.p) {
            sync_warp();
            mix_back(b, i, x);
          }
        }
        if (wants_dv) store_tile(y, b.grads(), b.at_t(), i, x);
      }
    sync_block();
    if (wants_dk)
      b.multiply(0, b.dz(), first, columns,
                 [&](int h) { return a.out_scale / size * (a.pre_mix.p ? unit_of(b.pre_t(), h) : A(1)); });
    if (wants_dv) b.multiply(1, b.grads(), first, columns, [](int) { return A(1); });
  }
}

}  // namespace

template <class T>
void launch_key_sweep(const BackwardKernel<T>& a, int64_t shared_bytes, void* stream) {
  const auto kernel = a.heads > 16 ? key_sweep<T, 2> : key_sweep<T, 1>;
  launch("reattention_bwd", kernel, int64_t(a.images) * a.tiles, 32 * a.warps, shared_bytes, stream, a);
}
template void launch_key_sweep(const BackwardKernel<half_t>&, int64_t, void*);
template void launch_key_sweep(const BackwardKernel<bf16_t>&, int64_t, void*);
template void launch_key_sweep(const BackwardKernel<float>&, int64_t, void*);
template void launch_key_sweep(const BackwardKernel<double>&, int64_t, void*);

}  // namespace vitdiv::cuda
