// Backward of the Gram matrix of attention maps; the maths is in
// vitdiv_kernels/ops/maps/attention_gram/README.md.
//
// dQ and dK are made by the same kernel with queries and keys in exchanged roles. A block owns 16 rows of one
// side, of all heads, and walks over the other side in chunks. Of each chunk it makes the centred maps of all
// heads, mixes them to dA, makes dZ = A (dA - sum of A dA over keys) and adds dZ times the other side's rows.
// So each sum belongs to one block.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_gram.cuh"

namespace vitdiv::cuda {
namespace {

constexpr int kRows = 16;
template <class T>
inline constexpr int kMaxWarps = sizeof(T) == 8 ? 8 : 12;  // registers
template <class T>
inline constexpr int kGroups = sizeof(T) == 8 ? 3 : 4;  // of 16 heads, at most; gram_rows takes no more heads

template <class T>
struct GradientKernel {
  Heads<T> own[2];    // of each layer [images, heads, n, width]: q, by key k
  Heads<T> other[2];  // [images, heads, m, width]: k, by key q
  int heads[2];
  int width[2];
  Acc<T> scale[2];      // times log2(e)
  Acc<T> out_scale[2];  // scale
  int n;                // rows of the own side
  int m;                // of the other side
  int tiles;            // of the own side's rows
  int images;
  int chunk;                      // rows of the other side
  int workers;                    // warps that make maps
  int stride;                     // of rows in shared memory
  Acc<T> mean;                    // 1 / keys
  Acc<T> dz_scale;                // dZ is held times this
  Global<const Acc<T>> rows;      // [3, images, H, queries], of gram_rows; H = heads of both layers
  Global<const Acc<T>> coupling;  // [images, H, H]
  bool wanted[2];
  Global<T> out[2];  // [images, heads, n, width]: dq, by key dk
  int64_t out_image[2];
  int64_t out_head[2];
  int64_t out_row[2];
  bool sums_shared;
  Global<Acc<T>> sums;  // otherwise: a block's own [H, 16, sum_row]
};

// Places in shared memory, in elements.
template <class T>
struct GradientLayout {
  Chunk<T> maps;
  int coupling_row, coupling_size, sum_row;
  HOST_DEVICE GradientLayout(int heads, int chunk, int stride)
      : maps(heads, kRows, chunk),
        coupling_row(row_stride<T>(heads)),
        coupling_size(padded_width(heads) * coupling_row),
        sum_row(stride - Numbers<T>::kPad + 8) {}  // pairs of numbers of eight rows in different banks
};

// dA_g = sum_h coupling[g, h] (A_h - 1 / keys); dZ = A (dA - sum over keys of A dA); dq = scale dZ k, and
// BY_KEY dk = scale dZ^T q.
template <class T, bool BY_KEY>
KERNEL LAUNCH_BOUNDS(32 * kMaxWarps<T>, 1) gradient_tile(GradientKernel<T> a) {
  using M = Map<T>;
  constexpr bool narrow = sizeof(T) == 2;
  constexpr Acc<T> map_scale = MapNumbers<T>::kScale;
  const int warp = thread_x() >> 5, warps = threads() >> 5, lane = lane_id();
  const int image = block_x() / a.tiles, row0 = block_x() % a.tiles * kRows;
  const int heads = a.heads[0] + a.heads[1], padded_heads = padded_width(heads);
  const int64_t queries = BY_KEY ? a.m : a.n, field = int64_t(a.images) * heads * queries;
  const GradientLayout<T> at(heads, a.chunk, a.stride);
  Carver carve;
  const Shared<M> maps = carve.take<M>(at.maps.size);
  const Shared<T> dz = maps.template as<T>();                                     // takes the maps' place
  const Shared<M> coupling = carve.take<M>((narrow ? 2 : 1) * at.coupling_size);  // high, then low part
  const int slot = (kRows + a.chunk) * a.stride;
  const Shared<T> slots = carve.take<T>(a.workers * slot);
  const Shared<Acc<T>> sums = carve.take<Acc<T>>(a.sums_shared ? heads * kRows * at.sum_row : 0);
  at.maps.clear_zeros(dz);

  // The coupling enters as float16 in two parts, divided by a power of two that makes its largest element 1
  // to 2.
  Acc<T> unit = 1;
  if constexpr (narrow) {
    float largest = 0;
    for (int c = lane; c < heads * heads; c += 32)
      largest = larger(largest, fabsf(a.coupling.ld(int64_t(image) * heads * heads + c)));
    largest = warp_max(largest);
    if (largest > 0 && largest < INFINITY) unit = ldexpf(1, ilogbf(largest));
  }
  for (int c = thread_x(); c < padded_heads * padded_heads; c += threads()) {
    const int g = c / padded_heads, h = c % padded_heads;
    const bool inside = g < heads && h < heads;
    const Acc<T> x = inside ? a.coupling.ld((int64_t(image) * heads + g) * heads + h) / unit : Acc<T>(0);
    if constexpr (narrow) {
      const M high = from_float<M>(x);
      coupling.st(g * at.coupling_row + h, high);
      coupling.st(at.coupling_size + g * at.coupling_row + h, from_float<M>(x - to_float(high)));
    } else {
      coupling.st(g * at.coupling_row + h, x);
    }
  }

  const Shared<T> own = slots.part(warp < a.workers ? warp * slot : 0, slot);
  const int other = kRows * a.stride;  // behind the own rows
  const auto fetch = [&](int h, int first, int count, bool with_own) {
    const int layer = h >= a.heads[0], g = h - (layer ? a.heads[0] : 0), width = a.width[layer];
    const int padded = padded_width(width);
    const Heads<T> x = a.own[layer], y = a.other[layer];
    sync_warp();
    if (with_own)
      fetch16(own.part(0, 16 * a.stride), a.stride, x, image * x.image + g * x.head, row0, a.n, width,
              padded);
    for (int t = 0; t < count; t += 16)
      fetch16(own.part(other + t * a.stride, 16 * a.stride), a.stride, y, image * y.image + g * y.head,
              first + t, a.m, width, padded);
    copy_commit();
    copy_wait<0>();
    sync_warp();
  };
  const auto row_number = [&](int which, int h, int query) {
    return query < queries ? a.rows.ld(which * field + (int64_t(image) * heads + h) * queries + query)
                           : Acc<T>(0);
  };

  for (int first = 0; first < a.m; first += a.chunk) {
    const int left = a.m - first < a.chunk ? a.m - first : a.chunk, columns = padded_width(left);
    const bool once = a.workers >= heads;
    for (int h = warp; h < heads && warp < a.workers; h += a.workers) {
      fetch(h, first, columns, !once || first == 0);
      const int layer = h >= a.heads[0], padded = padded_width(a.width[layer]);
      for (int t = 0; t < columns; t += 16) {
        Acc<T> acc[2][4] = {};
        for (int x = 0; x < padded; x += kDepth<T>) {
          FragmentA<T> p;
          FragmentB<T> b[2];
          load_a(p, own, [&](int row, int k) { return row * a.stride + x + k; });
          load_b(b, own, [&](int col, int k) { return other + (t + col) * a.stride + x + k; });
          multiply_add<T>(acc, p, b);
        }
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int i = 0; i < 2; ++i) {
            Acc<T> x[2];
            UNROLLED_FOR (int e = 0; e < 2; ++e) {
              const int row = row0 + tile_row(2 * i), col = first + t + 8 * j + tile_col(e);
              const int query = BY_KEY ? col : row;
              const Acc<T> row_max = row_number(0, h, query), row_scale = row_number(1, h, query);
              x[e] = row < a.n && col < a.m
                         ? fast_exp2(acc[j][2 * i + e] * a.scale[layer] - row_max) * row_scale -
                               a.mean * map_scale
                         : Acc<T>(0);
            }
            store2(maps, at.maps.place_of_head(h, tile_row(2 * i), t + 8 * j + tile_col(0)), x[0], x[1]);
          }
      }
    }
    sync_block();

    for (int i = warp; i < kRows; i += warps)
      for (int x = 0; x < columns; x += 16) {
        Acc<T> da[kGroups<T>][2][4] = {};
        for (int h = 0; h < padded_heads; h += kDepth<M>) {
          FragmentB<M> b[2];
          load_b<true>(b, maps, [&](int col, int k) { return at.maps.place(h + k, i, x + col); });
          UNROLLED_FOR (int group = 0; group < kGroups<T>; ++group)
            UNROLLED_FOR (int part = 0; part < (narrow ? 2 : 1); ++part) {
              if (16 * group >= heads) continue;
              FragmentA<M> c;
              load_a(c, coupling, [&](int g, int k) {
                return part * at.coupling_size + (16 * group + g) * at.coupling_row + h + k;
              });
              multiply_add<M>(da[group], c, b);
            }
        }
        sync_warp();  // all heads of these places are read
        UNROLLED_FOR (int group = 0; group < kGroups<T>; ++group)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int half = 0; half < 2; ++half) {
              const int g = 16 * group + tile_row(2 * half), col = x + 8 * j + tile_col(0);
              if (g >= heads) continue;
              const int place = at.maps.place_of_head(g, i, col);
              Acc<T> z[2];
              UNROLLED_FOR (int e = 0; e < 2; ++e) {
                const Acc<T> row_dot = row_number(2, g, BY_KEY ? first + col + e : row0 + i) / unit;
                const Acc<T> map = to_float(maps.ld(place + e)) / map_scale + a.mean;
                z[e] = map * (da[group][j][2 * half + e] / map_scale - row_dot) * a.dz_scale;
              }
              store2(dz, place, z[0], z[1]);
            }
      }
    sync_block();

    const bool last = first + a.chunk >= a.m;
    for (int h = warp; h < heads && warp < a.workers; h += a.workers) {
      const int layer = h >= a.heads[0];
      if (!a.wanted[layer]) continue;
      if (!once) fetch(h, first, columns, false);
      const int g = h - (layer ? a.heads[0] : 0), width = a.width[layer];
      const Acc<T> factor = a.out_scale[layer] * unit / a.dz_scale;
      const int64_t out = image * a.out_image[layer] + g * a.out_head[layer];
      for (int x = 0; x < width; x += 16) {
        Acc<T> acc[2][4] = {};
        for (int t = 0; t < columns; t += kDepth<T>) {
          FragmentA<T> p;
          FragmentB<T> b[2];
          load_a(p, dz, [&](int row, int k) { return at.maps.place_of_head(h, row, t + k); });
          load_b<true>(b, own, [&](int col, int k) { return other + (t + k) * a.stride + x + col; });
          multiply_add<T>(acc, p, b);
        }
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e) {
            // a lane always comes back to the same sums
            const int row = tile_row(e), col = x + 8 * j + tile_col(e),
                      sum = (h * kRows + row) * at.sum_row + col;
            const int64_t far = int64_t(block_x()) * heads * kRows * at.sum_row + sum;
            Acc<T> s = acc[j][e];
            if (first > 0) s += a.sums_shared ? sums.ld(sum) : a.sums.ld(far);
            if (!last) {
              if (a.sums_shared)
                sums.st(sum, s);
              else
                a.sums.st(far, s);
            } else if (row0 + row < a.n && col < width) {
              a.out[layer].st(out + (row0 + row) * a.out_row[layer] + col, from_acc<T>(s * factor));
            }
          }
      }
    }
  }
}

struct Plan {
  int chunk, workers, warps;
  bool sums_shared;
  int64_t shared_bytes, sums_bytes;  // sums_bytes: of device memory
};

template <class T>
int widest_stride(const GramArgs& args) {
  return row_stride<T>(static_cast<int>(std::max(args.layers[0].d, args.layers[1].d)));
}

template <class T>
Plan plan(const GramArgs& args, int64_t own, int64_t other) {
  const int heads = heads_of(args), stride = widest_stride<T>(args);
  const int64_t limit = shared_memory_limit("attention_gram_bwd"),
                tiles = args.B * ((own + kRows - 1) / kRows);
  const auto piece = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  for (bool shared : {true, false})
    for (int rounds = (heads + kMaxWarps<T> - 1) / kMaxWarps<T>; rounds <= heads; ++rounds)
      for (int chunk : {64, 32, 16}) {
        if (chunk > 16 && chunk > padded_width(static_cast<int>(other))) continue;
        if (shared && rounds * kMaxWarps<T> >= heads + 2 * kMaxWarps<T>)
          continue;  // rather all warps at work
        const GradientLayout<T> at(heads, chunk, stride);
        const int workers = (heads + rounds - 1) / rounds;
        const int64_t sums = int64_t(heads) * kRows * at.sum_row * sizeof(Acc<T>);
        const int64_t bytes = piece(int64_t(at.maps.size) * sizeof(T)) +
                              piece(int64_t(sizeof(T) == 2 ? 2 : 1) * at.coupling_size * sizeof(T)) +
                              piece(int64_t(workers) * (kRows + chunk) * stride * sizeof(T)) +
                              (shared ? sums : 0);
        if (bytes <= limit)
          return {chunk,  workers, std::max(workers, 4),
                  shared, bytes,   shared || chunk >= other ? 0 : tiles * sums};
      }
  throw std::invalid_argument(
      "attention_gram: the backward of " + std::to_string(heads) + " heads of width " +
      std::to_string(std::max(args.layers[0].d, args.layers[1].d)) +
      " does not fit the shared memory of this GPU, " + std::to_string(limit) + " bytes");
}

template <class T>
int64_t rows_bytes(const GramArgs& args) {
  return (3 * args.B * heads_of(args) * args.N * int64_t(sizeof(Acc<T>)) + 15) / 16 * 16;
}

template <class T, bool BY_KEY>
void gradient(const GramBackward& args, const HeadsView (&out)[2], void* scratch, void* stream) {
  const int64_t own = BY_KEY ? args.M : args.N, other = BY_KEY ? args.N : args.M;
  const Plan p = plan<T>(args, own, other);
  const int heads = heads_of(args);
  GradientKernel<T> a{};
  for (int l = 0; l < 2; ++l) {
    const Layer& layer = args.layers[l];
    a.own[l] = heads_view<T>(BY_KEY ? layer.k : layer.q, layer.d);
    a.other[l] = heads_view<T>(BY_KEY ? layer.q : layer.k, layer.d);
    a.heads[l] = static_cast<int>(layer.H);
    a.width[l] = static_cast<int>(layer.d);
    a.scale[l] = static_cast<Acc<T>>(layer.scale * kLog2e);
    a.out_scale[l] = static_cast<Acc<T>>(layer.scale);
    a.wanted[l] = out[l].data != nullptr;
    a.out[l] = {static_cast<T*>(out[l].data)};
    a.out_image[l] = out[l].stride_b;
    a.out_head[l] = out[l].stride_h;
    a.out_row[l] = out[l].stride_n;
  }
  a.n = static_cast<int>(own);
  a.m = static_cast<int>(other);
  a.tiles = static_cast<int>((own + kRows - 1) / kRows);
  a.images = static_cast<int>(args.B);
  a.chunk = p.chunk;
  a.workers = p.workers;
  a.stride = widest_stride<T>(args);
  a.mean = Acc<T>(1) / static_cast<Acc<T>>(args.M);
  a.dz_scale = 1;
  if (sizeof(T) == 2)  // |dZ| <= 4 heads: as large as float16 can hold
    while (a.dz_scale * 2 * 4 * heads < 65504) a.dz_scale *= 2;
  a.rows = {static_cast<const Acc<T>*>(scratch)};
  a.coupling = {static_cast<const Acc<T>*>(args.coupling)};
  a.sums_shared = p.sums_shared;
  a.sums = {reinterpret_cast<Acc<T>*>(static_cast<char*>(scratch) + rows_bytes<T>(args))};
  launch("attention_gram_bwd", gradient_tile<T, BY_KEY>, args.B * a.tiles, 32 * p.warps, p.shared_bytes,
         stream, a);
}

}  // namespace

int64_t attention_gram_bwd_scratch(const GramBackward& args) {
  if (args.B == 0 || heads_of(args) == 0) return 0;
  return with_type(type_of(args), [&](auto number) {
    using T = decltype(number);
    return rows_bytes<T>(args) +
           std::max(plan<T>(args, args.N, args.M).sums_bytes, plan<T>(args, args.M, args.N).sums_bytes);
  });
}

void attention_gram_bwd(const GramBackward& args, void* scratch, void* stream) {
  if (args.B == 0 || heads_of(args) == 0) return;
  with_type(type_of(args), [&](auto number) {
    using T = decltype(number);
    plan<T>(args, args.N, args.M);  // throws before anything is launched
    gram_rows(args, scratch, stream);
    if (args.dq[0].data || args.dq[1].data) gradient<T, false>(args, args.dq, scratch, stream);
    if (args.dk[0].data || args.dk[1].data) gradient<T, true>(args, args.dk, scratch, stream);
  });
}

}  // namespace vitdiv::cuda
