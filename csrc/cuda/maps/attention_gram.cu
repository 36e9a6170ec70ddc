// Forward: the centred Gram matrix of attention maps between all heads of one or two layers; the maths is in
// vitdiv_kernels/ops/maps/attention_gram/README.md.
//
// A block owns 16 or 32 query rows of all heads of an image. Keys stream by twice: once for the row
// statistics, once, in chunks, to make the chunk of all heads' centred maps in shared memory, whose product
// with itself is the Gram matrix. So rows may be of any length. A warp makes the maps of its own heads.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "attention_gram.cuh"

namespace vitdiv::cuda {
namespace {

template <class T>
inline constexpr int kRowTiles = sizeof(T) == 2 ? 2 : 1;

// A warp for each pair of groups of 16 heads. Threads of 12 warps may have 168 registers, of 16 warps 128,
// too few for double.
template <class T>
inline constexpr int kMaxWarps = sizeof(T) == 8 ? 12 : 16;
template <class T>
inline constexpr int kMaxHeads = sizeof(T) == 8 ? 48 : 64;

template <class T>
struct GramKernel {
  Heads<T> q[2];  // of each layer [images, heads, n, width]
  Heads<T> k[2];  // [images, heads, m, width]
  int heads[2];
  int width[2];
  Acc<T> scale[2];                // times log2(e)
  int n;                          // queries
  int m;                          // keys
  int tiles;                      // of the rows of an image
  int chunk;                      // keys
  int workers;                    // warps that make maps
  int stride;                     // of rows in shared memory
  Global<Acc<T>> partial;         // [images, tiles, H, H], H = heads of both layers
  Global<const Acc<T>> coupling;  // [images, H, H]; this and rows for gram_rows
  Global<Acc<T>> rows;            // [3, images, H, n]
  int images;
};

template <class T>
HOST_DEVICE Chunk<Map<T>> maps_of(int heads, int chunk) {
  return {heads, 16 * kRowTiles<T>, chunk};
}
// Shared memory for them and later for the warps' sums, in elements.
template <class T>
HOST_DEVICE int maps_space(int heads, int chunk, int warps) {
  const int maps = maps_of<T>(heads, chunk).size,
            sums = HeadProducts<Map<T>, 1>::space(warps) * int(sizeof(Acc<T>) / sizeof(Map<T>));
  return maps > sums ? maps : sums;
}

// A_h = softmax(scale q_h k_h^T); partial[g, h] = sum over rows i of the tile, keys j of
// (A_g[i, j] - 1/m) (A_h[i, j] - 1/m). With ROWS what gram_rows gives: the sum over keys of A_g dA_g is the
// sum over h of coupling[g, h] times the row's own Gram matrix.
template <class T, bool ROWS>
KERNEL LAUNCH_BOUNDS(32 * kMaxWarps<T>, 1) gram_tile(GramKernel<T> a) {
  constexpr int row_tiles = kRowTiles<T>, rows = 16 * row_tiles;
  using M = Map<T>;
  const int warp = thread_x() >> 5, warps = threads() >> 5, lane = lane_id();
  const int image = block_x() / a.tiles, row0 = block_x() % a.tiles * rows;
  const int heads = a.heads[0] + a.heads[1], groups = (heads + 15) / 16;
  const Chunk<M> at = maps_of<T>(heads, a.chunk);
  Carver carve;
  const Shared<M> maps = carve.take<M>(maps_space<T>(heads, a.chunk, warps));
  const Shared<Acc<T>> row_maxes = carve.take<Acc<T>>(heads * rows),
                       row_scales = carve.take<Acc<T>>(heads * rows);
  const Shared<Acc<T>> row_dots = carve.take<Acc<T>>(ROWS ? groups * heads * rows : 0);
  const int slot = Scores<T, row_tiles>::size(a.stride);
  const Shared<T> slots = carve.take<T>(a.workers * slot);
  at.clear_zeros(maps);

  Scores<T, row_tiles> scores{};
  scores.stride = a.stride;
  if (warp < a.workers) scores.memory = slots.part(warp * slot, slot);
  // use(h, t, logits) for tiles of keys from first to end of all heads of this warp, then done(h)
  const auto for_each_head = [&](int first, int end, bool fetched, auto begin, auto use, auto done) {
    if (warp >= a.workers) return;
    for (int h = warp; h < heads; h += a.workers) {
      const int layer = h >= a.heads[0], g = h - (layer ? a.heads[0] : 0);
      const Heads<T> q = a.q[layer], k = a.k[layer];
      const Acc<T> scale = a.scale[layer];
      scores.width = a.width[layer];
      scores.padded = padded_width(scores.width);
      if (!fetched) scores.fetch_queries(q, image * q.image + g * q.head, row0, a.n);
      begin(h);
      scores.for_each_tile(k, image * k.image + g * k.head, first, end, a.m, [&](int t, auto& s) {
        UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 0; e < 4; ++e)
              s[r][j][e] = 16 * t + 8 * j + tile_col(e) < a.m ? s[r][j][e] * scale : -INFINITY;
        use(h, t, s);
      });
      done(h);
    }
  };

  RowStatistics<T, row_tiles> statistics;
  for_each_head(
      0, (a.m + 15) / 16, false, [&](int) { statistics = RowStatistics<T, row_tiles>(); },
      [&](int, int, const auto& logits) { statistics.add(logits); },
      [&](int h) {
        statistics.finish();
        UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
          UNROLLED_FOR (int i = 0; i < 2; ++i) {
            if ((lane & 3) != 0) continue;
            const int row = h * rows + 16 * r + tile_row(2 * i);
            row_maxes.st(row, statistics.row_max[r][i]);
            row_scales.st(row, MapNumbers<T>::kScale / statistics.sum[r][i]);
          }
      });

  const int pairs = groups * groups, pair = warp % pairs, slice = warp / pairs;
  const int slices = (warps - pair + pairs - 1) / pairs;  // warps that share this pair's rows
  const int first = pair / groups * 16, second = pair % groups * 16;
  const int present = a.n - row0 < rows ? a.n - row0 : rows;
  const Acc<T> mean = Acc<T>(MapNumbers<T>::kScale) / a.m;
  Acc<T> gram[2][4] = {}, coupling[2][4] = {}, row_max[row_tiles][2], row_scale[row_tiles][2];
  if constexpr (ROWS)
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 4; ++e) {
        const int g = first + tile_row(e), h = second + 8 * j + tile_col(e);
        if (g < heads && h < heads) coupling[j][e] = a.coupling.ld((int64_t(image) * heads + g) * heads + h);
      }
  for (int key0 = 0; key0 < a.m; key0 += a.chunk) {
    const int keys = a.m - key0 < a.chunk ? a.m - key0 : a.chunk, columns = (keys + 15) / 16 * 16;
    for_each_head(
        key0 / 16, (key0 + columns) / 16, a.workers == heads,
        [&](int h) {
          sync_warp();
          UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
            UNROLLED_FOR (int i = 0; i < 2; ++i) {
              const int row = h * rows + 16 * r + tile_row(2 * i);
              row_max[r][i] = row_maxes.ld(row), row_scale[r][i] = row_scales.ld(row);
            }
        },
        [&](int h, int t, const auto& logits) {
          UNROLLED_FOR (int r = 0; r < row_tiles; ++r)
            UNROLLED_FOR (int j = 0; j < 2; ++j)
              UNROLLED_FOR (int i = 0; i < 2; ++i) {
                Acc<T> x[2];
                UNROLLED_FOR (int e = 0; e < 2; ++e)
                  x[e] = 16 * t + 8 * j + tile_col(e) < a.m
                             ? fast_exp2(logits[r][j][2 * i + e] - row_max[r][i]) * row_scale[r][i] - mean
                             : Acc<T>(0);
                store2(maps,
                       at.place_of_head(h, 16 * r + tile_row(2 * i), 16 * t - key0 + 8 * j + tile_col(0)),
                       x[0], x[1]);
              }
        },
        [](int) {});
    sync_block();
    for (int i = slice; i < present; i += slices) {
      for (int x = 0; x < columns; x += kDepth<M>) {
        const auto place = [&](int group) {
          return [&, group](int h, int k) { return at.place(group + h, i, x + k); };
        };
        FragmentA<M> p;
        FragmentB<M> b[2];
        load_a(p, maps, place(first));
        if (first == second)
          transpose<M>(b, p);
        else
          load_b(b, maps, place(second));
        multiply_add<M>(gram, p, b);
      }
      if constexpr (ROWS)
        UNROLLED_FOR (int half = 0; half < 2; ++half) {
          Acc<T> row_dot = 0;
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e) {
              row_dot += coupling[j][e] * gram[j][e];
              gram[j][e] = 0;
            }
          row_dot = quad_sum(row_dot);
          const int g = first + tile_row(2 * half), to = (second / 16 * heads + g) * rows + i;
          if ((lane & 3) == 0 && g < heads) row_dots.st(to, key0 ? row_dots.ld(to) + row_dot : row_dot);
        }
    }
    sync_block();
  }

  constexpr Acc<T> unit = 1 / (Acc<T>(MapNumbers<T>::kScale) * MapNumbers<T>::kScale);
  if constexpr (ROWS) {
    for (int c = thread_x(); c < heads * present; c += threads()) {
      const int h = c / present, i = c % present;
      Acc<T> row_dot = 0;
      for (int group = 0; group < groups; ++group) row_dot += row_dots.ld((group * heads + h) * rows + i);
      const int64_t to = (int64_t(image) * heads + h) * a.n + row0 + i,
                    field = int64_t(a.images) * heads * a.n;
      a.rows.st(to, row_maxes.ld(h * rows + i));
      a.rows.st(to + field, row_scales.ld(h * rows + i));
      a.rows.st(to + 2 * field, row_dot * unit);
    }
    return;
  }
  const Shared<Acc<T>> sums = maps.template as<Acc<T>>();
  UNROLLED_FOR (int j = 0; j < 2; ++j)
    UNROLLED_FOR (int e = 0; e < 4; ++e)
      sums.st(warp * 256 + tile_row(e) * 16 + 8 * j + tile_col(e), gram[j][e]);
  sync_block();
  for (int c = thread_x(); c < heads * heads; c += threads()) {
    const int g = c / heads, h = c % heads;
    Acc<T> sum = 0;
    for (int w = g / 16 * groups + h / 16; w < warps; w += pairs)
      sum += sums.ld(w * 256 + g % 16 * 16 + h % 16);
    a.partial.st(int64_t(block_x()) * heads * heads + c, sum * unit);
  }
}

template <class T>
int tiles_of(const GramArgs& args) {
  return static_cast<int>((args.N + 16 * kRowTiles<T> - 1) / (16 * kRowTiles<T>));
}

template <class T>
int64_t shared_bytes(int heads, int chunk, int warps, int workers, int stride, bool rows) {
  const auto piece = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  const int64_t row_numbers = int64_t(heads) * 16 * kRowTiles<T> * sizeof(Acc<T>);
  return piece(int64_t(maps_space<T>(heads, chunk, warps)) * sizeof(Map<T>)) +
         (rows ? 2 + (heads + 15) / 16 : 2) * piece(row_numbers) +
         piece(int64_t(workers) * Scores<T, kRowTiles<T>>::size(stride) * sizeof(T));
}

// How many heads are made at a time and how many keys a chunk has: as much as lets two blocks share a
// processor, or else as fits.
template <class T>
int64_t fit(GramKernel<T>& a, int& warps, int64_t limit, bool rows) {
  const int heads = a.heads[0] + a.heads[1], groups = (heads + 15) / 16, keys = (a.m + 15) / 16 * 16;
  const int least = (heads + kMaxWarps<T> - 1) / kMaxWarps<T>;
  for (int64_t share : {limit / 2 - 1024, limit})
    for (int rounds = least; rounds <= (share == limit ? heads : least); ++rounds)
      for (int chunk : {64, 32, 16}) {
        if (chunk > 16 && chunk > keys) continue;
        a.workers = (heads + rounds - 1) / rounds;
        a.chunk = chunk;
        warps = std::max(a.workers, groups * groups);
        const int64_t bytes = shared_bytes<T>(heads, chunk, warps, a.workers, a.stride, rows);
        if (bytes <= share) return bytes;
      }
  throw std::invalid_argument("attention_gram: " + std::to_string(heads) + " heads of width " +
                              std::to_string(std::max(a.width[0], a.width[1])) +
                              " do not fit the shared memory of this GPU, " + std::to_string(limit) +
                              " bytes");
}

template <class T, bool ROWS>
void launch_tiles(const char* operation, GramKernel<T> a, const GramArgs& args, void* stream) {
  if (heads_of(args) > kMaxHeads<T>)
    throw std::invalid_argument("attention_gram: the CUDA kernels take at most " +
                                std::to_string(kMaxHeads<T>) + " heads, of both layers together, got " +
                                std::to_string(heads_of(args)));
  int width = 0;
  for (int l = 0; l < 2; ++l) {
    const Layer& layer = args.layers[l];
    a.q[l] = heads_view<T>(layer.q, layer.d);
    a.k[l] = heads_view<T>(layer.k, layer.d);
    a.heads[l] = static_cast<int>(layer.H);
    a.width[l] = static_cast<int>(layer.d);
    a.scale[l] = static_cast<Acc<T>>(layer.scale * kLog2e);
    width = std::max(width, a.width[l]);
  }
  a.n = static_cast<int>(args.N);
  a.m = static_cast<int>(args.M);
  a.images = static_cast<int>(args.B);
  a.tiles = tiles_of<T>(args);
  a.stride = row_stride<T>(width);
  int warps = 0;
  const int64_t bytes = fit(a, warps, shared_memory_limit(operation), ROWS);
  launch(operation, gram_tile<T, ROWS>, args.B * a.tiles, 32 * warps, bytes, stream, a);
}

template <class T>
void forward(const GramForward& args, void* scratch, void* stream) {
  const char* operation = "attention_gram_fwd";
  const int heads = heads_of(args), tiles = tiles_of<T>(args);
  auto* partial = static_cast<Acc<T>*>(tiles > 1 ? scratch : args.gram);
  GramKernel<T> a{};
  a.partial = {partial};
  launch_tiles<T, false>(operation, a, args, stream);
  if (tiles > 1)
    launch_sum_parts(operation, partial, static_cast<Acc<T>*>(args.gram), args.B, tiles, heads * heads,
                     stream);
}

bool is_reattention(const GramForward& args) {
  const Layer& layer = args.layers[0];
  return args.layers[1].H == 0 && layer.H <= 16 && layer.d <= 128 && type_of(args) != ScalarType::kDouble;
}
// The same as maps that nothing mixes and no values follow.
ReattentionForward as_reattention(const GramForward& args) {
  const Layer& layer = args.layers[0];
  ReattentionForward same{};
  same.B = args.B, same.H = layer.H, same.N = args.N, same.M = args.M, same.d = layer.d;
  same.q = layer.q, same.k = layer.k;
  same.scale = layer.scale;
  same.gram = args.gram;
  return same;
}

}  // namespace

int64_t attention_gram_fwd_scratch(const GramForward& args) {
  if (is_reattention(args)) return reattention_fwd_scratch(as_reattention(args));
  return with_type(type_of(args), [&](auto number) {
    using T = decltype(number);
    const int64_t tiles = tiles_of<T>(args), heads = heads_of(args);
    return tiles > 1 ? int64_t(args.B * tiles * heads * heads * sizeof(Acc<T>)) : int64_t(0);
  });
}

void attention_gram_fwd(const GramForward& args, void* scratch, void* stream) {
  if (args.B == 0 || heads_of(args) == 0) return;
  if (is_reattention(args)) return reattention_fwd(as_reattention(args), scratch, stream);
  with_type(type_of(args), [&](auto number) { forward<decltype(number)>(args, scratch, stream); });
}

void gram_rows(const GramBackward& args, void* rows, void* stream) {
  with_type(type_of(args), [&](auto number) {
    using T = decltype(number);
    GramKernel<T> a{};
    a.coupling = {static_cast<const Acc<T>*>(args.coupling)};
    a.rows = {static_cast<Acc<T>*>(rows)};
    launch_tiles<T, true>("attention_gram_bwd", a, args, stream);
  });
}

}  // namespace vitdiv::cuda
