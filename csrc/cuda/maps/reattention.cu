// Forward of re-attention; the maths is in vitdiv_kernels/ops/maps/reattention/README.md.
//
// A block owns 16 or 32 query rows of all heads of an image. Keys stream by twice: once for the row
// statistics, once, in chunks, to make the chunk of all heads' centred maps in shared memory; there it is
// multiplied with itself (Gram), mixed and normalised in place, and multiplied with the values. So rows may
// be of any length. A warp makes the maps of its heads, couples the heads of its places, and holds the output
// of one head. Where warps are fewer than heads, or a head is wider than a warp can hold, a block makes a
// slice of the output.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../core/with_type.cuh"
#include "../kernels.h"
#include "reattention_registers.cuh"
#include "reattention_tile.cuh"
#include "softmax_rows.cuh"

namespace vitdiv::cuda {
namespace {

// A_h = softmax(scale q_h k_h^T), or of these logits mixed by pre_mix; Y_g = sum_h mix[g, h] A_h + bias[g],
// with `centred` of A - 1/m, then perhaps layer norm over heads; out_g = Y_g v_g, and partial, the centred
// Gram matrix of the maps.
template <class T, int GROUPS, bool PRE_MIX>
KERNEL LAUNCH_BOUNDS(32 * max_warps<T>(GROUPS == 2), 1) reattention_tile(ForwardKernel<T> a) {
  ForwardTile<T, GROUPS, PRE_MIX> tile(a);
  const bool fetched = a.workers == a.heads, wants_gram = a.partial.p && block_x() % a.slices == 0;
  const auto columns_from = [&](int key0) {
    return padded_width(a.m - key0 < a.chunk ? a.m - key0 : a.chunk);
  };
  if constexpr (PRE_MIX) {
    for (int key0 = 0; key0 < a.m; key0 += a.chunk) {
      tile.make_logits(key0, columns_from(key0), fetched && key0 > 0);
      sync_block();
      tile.add_statistics(key0, columns_from(key0));
      sync_block();
    }
  } else {
    tile.load_statistics();
    sync_block();
  }
  for (int key0 = 0; key0 < a.m; key0 += a.chunk) {
    const int columns = columns_from(key0);
    if constexpr (PRE_MIX)
      tile.make_logits(key0, columns, fetched);
    else
      tile.make_maps(key0, columns, fetched && key0 > 0);
    // The warp's heads and 16 kOutTiles columns of them: several only where one chunk is all.
    int h = tile.first_head + tile.warp(), first = tile.first_column;
    bool coupled = false;
    while (true) {
      const bool more = a.out.p && tile.warp() < a.workers && h < tile.end_head;
      if (more) tile.begin_values(h, first, key0, columns);
      if (!coupled) {  // while values travel
        sync_block();
        tile.couple_heads(key0, columns, wants_gram);
        sync_block();
        coupled = true;
      }
      if (!more) break;
      if (key0 == 0) tile.clear_out();
      tile.add_values(h, first, key0, columns);
      if (key0 + a.chunk >= a.m) tile.store_out(h, first);
      first += 16 * kOutTiles<T>;
      if (first >= tile.end_column) first = tile.first_column, h += a.workers;
    }
    sync_block();
  }
  if (wants_gram) {
    constexpr Acc<T> scale = MapNumbers<T>::kScale;
    const auto sums = tile.template piece<Acc<T>>(0, HeadProducts<Map<T>, GROUPS>::space(tile.warps()));
    const int64_t to = int64_t(block_x() / a.slices) * a.heads * a.heads;
    tile.gram.store(sums, a.partial, to, a.heads, 1 / (scale * scale), true);
  }
}

template <class T>
int tiles_of(const ReattentionForward& args) {
  return static_cast<int>((args.N + 16 * kRowTiles<T> - 1) / (16 * kRowTiles<T>));
}

// Numbers of the softmax's rows, in front of the scratch.
int64_t rows_size(const ReattentionForward& args) { return args.pre_mix ? 0 : 2 * args.B * args.H * args.N; }

// Which kernel makes the output. In registers:
//
//   numbers        16 bits, in whole and aligned pieces of 16 bytes
//   what is asked  the output alone, of mixed maps without pre_mix and layer norm
//   heads          of width 32, 48, 64: at most 24, 16, 12, if they fit the shared memory
//
// and all else in shared memory. No layout: in shared memory.
template <class T>
RegisterLayout in_registers(const ReattentionForward& args, int64_t limit) {
  const bool plain = args.out.data && !args.gram && !args.pre_mix && !args.norm_weight && args.d == args.dv;
  if (!plain || !in_pieces<T>(args.q, args.d) || !in_pieces<T>(args.k, args.d) ||
      !in_pieces<T>(args.v, args.d) || !in_pieces<T>(args.out, args.d))
    return {};
  return fit_registers(static_cast<int>(args.H), static_cast<int>(args.d), limit);
}

template <class T>
void forward(const ReattentionForward& args, void* scratch, void* stream) {
  const char* operation = "reattention_fwd";
  if (args.H > kMaxMixedHeads)
    throw std::invalid_argument("reattention: the CUDA kernels take at most " +
                                std::to_string(kMaxMixedHeads) + " heads, got " + std::to_string(args.H));
  const auto acc = [](const void* p) { return Global<const Acc<T>>{static_cast<const Acc<T>*>(p)}; };
  const int heads = static_cast<int>(args.H), tiles = tiles_of<T>(args);
  auto* rows = static_cast<Acc<T>*>(scratch);
  const int64_t limit = shared_memory_limit(operation);
  if (!args.pre_mix) launch_softmax_rows<T>(operation, args, rows, stream);
  if constexpr (sizeof(T) == 2) {
    const RegisterLayout layout = in_registers<T>(args, limit);
    if (layout.buffers > 0) return launch_registers(args, layout, rows, stream);
  }
  auto* partial = static_cast<Acc<T>*>(args.gram);
  if (args.gram && tiles > 1) partial = rows + rows_size(args);
  ForwardKernel<T> a{};
  a.q = heads_view<T>(args.q, args.d);
  a.k = heads_view<T>(args.k, args.d);
  a.v = heads_view<T>(args.v, args.dv);
  a.heads = heads;
  a.n = static_cast<int>(args.N);
  a.m = static_cast<int>(args.M);
  a.width = static_cast<int>(args.d);
  a.out_width = static_cast<int>(args.dv);
  a.tiles = tiles;
  a.scale = static_cast<Acc<T>>(args.scale * kLog2e);
  a.eps = static_cast<Acc<T>>(args.eps);
  a.mean = Acc<T>(MapNumbers<T>::kScale) / a.m;
  a.centred = args.centred;
  a.pre_mix = acc(args.pre_mix);
  a.pre_bias = acc(args.pre_bias);
  a.mix = acc(args.folded_mix);
  a.bias = acc(args.folded_bias);
  a.norm_weight = acc(args.norm_weight);
  a.norm_bias = acc(args.norm_bias);
  a.stride = row_stride<T>(std::max(a.width, std::min(a.out_width, 16 * kOutTiles<T>)));
  a.out = {static_cast<T*>(args.out.data)};
  a.out_image = args.out.stride_b;
  a.out_head = args.out.stride_h;
  a.out_row = args.out.stride_n;
  a.out_pieces = in_pieces<T>(args.out, args.dv);
  a.partial = {partial};
  if (!args.pre_mix) a.rows = {rows};
  a.field = args.B * args.H * args.N;
  int warps = 0;
  fit(a, warps, limit);
  const int64_t blocks = args.B * tiles * a.slices;
  auto* kernel = reattention_tile<T, 1, false>;
  if (heads > 16)
    kernel = args.pre_mix ? reattention_tile<T, 2, true> : reattention_tile<T, 2, false>;
  else if (args.pre_mix)
    kernel = reattention_tile<T, 1, true>;
  launch(operation, kernel, blocks, 32 * warps, a.at.bytes, stream, a);
  if (args.gram && tiles > 1)
    launch_sum_parts(operation, partial, static_cast<Acc<T>*>(args.gram), args.B, tiles, heads * heads,
                     stream);
}

}  // namespace

int64_t reattention_fwd_scratch(const ReattentionForward& args) {
  return with_type(args.q.dtype, [&](auto number) {
    using T = decltype(number);
    const int64_t tiles = tiles_of<T>(args),
                  grams = args.gram && tiles > 1 ? args.B * tiles * args.H * args.H : 0;
    return int64_t((rows_size(args) + grams) * sizeof(Acc<T>));
  });
}

void reattention_fwd(const ReattentionForward& args, void* scratch, void* stream) {
  if (args.B > 0 && args.H > 0 && args.N > 0 && (args.out.data || args.gram))
    with_type(args.q.dtype, [&](auto number) { forward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
