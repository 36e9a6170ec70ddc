// Forward of re-attention for few heads of 16-bit numbers; the maths is in
// vitdiv_kernels/ops/maps/reattention/README.md.
//
// A block owns 48 query rows of all heads of an image, and takes 16 keys at a time. First a warp for each
// head makes its centred maps of all rows and leaves them in shared memory as they lie in its registers. Then
// a warp owns 16 rows and a few heads of the output: it adds up the maps of all heads, two float16 at once,
// and what comes out is already the left factor of the product with the values. Queries and keys are their
// warp's own; the block waits once for each 16 keys, where there is room for two of values and maps.
#include "../core/with_type.cuh"
#include "../kernels.h"
#include "reattention_registers.cuh"

namespace vitdiv::cuda {
namespace {

template <class T>
struct RegistersKernel {
  Heads<T> q;  // [images, heads, n, WIDTH]
  Heads<T> k;  // [images, heads, m, WIDTH]
  Heads<T> v;
  int heads;
  int own;      // heads of a warp's output
  int n;        // queries
  int m;        // keys
  int tiles;    // of the rows of an image
  float scale;  // times log2(e)
  float mean;   // 1 / m in the maps' units
  bool centred;
  Global<const float> mix;   // [heads, heads]
  Global<const float> bias;  // [heads] or null
  Global<T> out;             // [images, heads, n, WIDTH]
  int64_t out_image, out_head, out_row;
  Global<const float> rows;  // [2, images, heads, n] of softmax_rows
  int64_t field;             // images * heads * n
  RegisterLayout at;
};

template <class T, int WIDTH, int OWN>
struct RegistersTile {
  static constexpr int kTiles = kRegisterTiles, kRows = 16 * kTiles, kStride = row_stride<T>(WIDTH),
                       kHead = 16 * kStride;
  static constexpr int kStep = mixed_at_a_time(OWN);  // heads
  static constexpr float kScale = MapNumbers<T>::kScale;

  struct alignas(weights_bytes(OWN)) Weights {  // of one head for a warp's heads, two float16 each
    uint32_t pair[weights_bytes(OWN) / 4];
  };

  const RegistersKernel<T>& a;
  int warp, warps, lane, image, row0, present, tile, part;
  float out[OWN][WIDTH / 16][2][4];

  template <class X>
  DEVICE static Shared<X> piece(int place, int count) {
    return Carver{place}.take<X>(count);
  }
  DEVICE Shared<float2> statistics() const { return piece<float2>(a.at.statistics_at, a.heads * kRows); }
  DEVICE Shared<Weights> weights() const { return piece<Weights>(a.at.weights_at, a.at.parts * a.at.padded); }
  DEVICE Shared<float2> factors() const { return piece<float2>(a.at.factors_at, a.at.parts * OWN); }
  DEVICE Shared<T> queries(int slot) const {
    return piece<T>(a.at.queries_at + slot * kTiles * kHead * 2, kTiles * kHead);
  }
  DEVICE Shared<T> keys(int h) const { return piece<T>(a.at.keys_at + h * kHead * 2, kHead); }
  DEVICE Shared<T> values(int h, int t) const {
    return piece<T>(a.at.values_at + ((a.at.buffers == 2 ? t & 1 : 0) * a.heads + h) * kHead * 2, kHead);
  }
  DEVICE Shared<uint4> maps(int t) const {
    const int count = a.at.padded * kTiles * 32;
    return piece<uint4>(a.at.maps_at + (a.at.buffers == 2 ? t & 1 : 0) * count * 16, count);
  }

  DEVICE RegistersTile(const RegistersKernel<T>& a) : a(a) {
    warp = thread_x() >> 5, warps = threads() >> 5, lane = lane_id();
    image = block_x() / a.tiles, row0 = block_x() % a.tiles * kRows;
    present = a.n - row0 < kRows ? a.n - row0 : kRows;
    tile = warp % kTiles, part = warp / kTiles;
  }

  // Four or eight lanes share a row, 16 bytes each.
  static constexpr int kLanes = WIDTH == 32 ? 4 : 8, kRowsAtOnce = 32 / kLanes;
  DEVICE int lane_row() const { return lane / kLanes; }
  DEVICE int lane_column() const { return lane % kLanes * 8; }
  // Where this lane begins in the warp's first head.
  DEVICE Global<const T> lane_start(const Heads<T>& from) const {
    const int lane = renewed(this->lane);  // there are no registers to hold it
    return {from.data.p + image * from.image + warp * from.head + lane / kLanes * from.row +
            lane % kLanes * 8};
  }
  // 16 rows of the warp's head number i
  DEVICE void fetch(Shared<T> to, int at, const Heads<T>& from, Global<const T> start, int i, int first,
                    int end) const {
    if (kLanes * 8 > WIDTH && lane_column() >= WIDTH) return;
    const int64_t head = i * warps * from.head;
    UNROLLED_FOR (int r = 0; r < 16; r += kRowsAtOnce)
      copy16_async(to, at + (lane_row() + r) * kStride + lane_column(), start, head + (first + r) * from.row,
                   lane_row() + r < end - first);
  }
  DEVICE void fetch_queries() const {
    const auto start = lane_start(a.q);
    for (int h = warp, i = 0; h < a.heads; h += warps, ++i)
      UNROLLED_FOR (int r = 0; r < kTiles; ++r)
        fetch(queries(h), r * kHead, a.q, start, i, row0 + 16 * r, a.n);
  }
  DEVICE void fetch_keys(int t) const {
    const auto start = lane_start(a.k);
    if (16 * t < a.m)
      for (int h = warp, i = 0; h < a.heads; h += warps, ++i) fetch(keys(h), 0, a.k, start, i, 16 * t, a.m);
    copy_commit();
  }
  DEVICE void fetch_values(int t) const {
    const auto start = lane_start(a.v);
    if (16 * t < a.m)
      for (int h = warp, i = 0; h < a.heads; h += warps, ++i)
        fetch(values(h, t), 0, a.v, start, i, 16 * t, a.m);
    copy_commit();
  }

  // What a thread loads before it asks for rows of queries, keys and values: it would wait behind them.
  struct Small {
    float2 rows[(OWN + 1) / 2];                     // statistics of softmax_rows
    float mix[(OWN + 2) / 3], bias[(OWN + 2) / 3];  // for each lane a head
  };
  template <class Use>
  DEVICE void for_each_statistic(Use use) const {
    UNROLLED_FOR (int i = 0; i < (OWN + 1) / 2; ++i) {
      const int c = thread_x() + i * threads();
      if (c < a.heads * kRows) use(i, c);
    }
  }
  // use(i, g, row): place g of a part's heads is row `row` of the mix, or -1
  template <class Use>
  DEVICE void for_each_mix(Use use) const {
    UNROLLED_FOR (int i = 0; i < (OWN + 2) / 3; ++i) {
      const int g = warp + i * warps, row = g / OWN * a.own + g % OWN;
      if (g < a.at.parts * OWN) use(i, g, g % OWN < a.own && row < a.heads ? row : -1);
    }
  }
  DEVICE Small load_small() const {
    Small x{};
    for_each_statistic([&](int i, int c) {
      if (c % kRows >= present) return;
      const int64_t from = (int64_t(image) * a.heads + c / kRows) * a.n + row0 + c % kRows;
      x.rows[i] = float2{a.rows.ld(from), a.rows.ld(from + a.field)};
    });
    for_each_mix([&](int i, int, int row) {
      if (row >= 0 && lane < a.heads) x.mix[i] = a.mix.ld(row * a.heads + lane);
      if (row >= 0 && a.bias.p) x.bias[i] = a.bias.ld(row);
    });
    return x;
  }
  // A row of the mix is multiplied by a power of two, so that mixed maps are just within float16's range:
  // those of a collapsed model may be very small.
  DEVICE void store_small(const Small& x) const {
    for_each_statistic([&](int i, int c) { statistics().st(c, x.rows[i]); });
    for_each_mix([&](int i, int g, int) {
      const float w = x.mix[i], total = warp_sum(w), size = warp_sum(fabsf(w));
      const float constant = (a.centred ? 0.0f : total / a.m) + x.bias[i], bound = size + fabsf(constant);
      const float unit = bound > 1e-37f && bound < INFINITY ? ldexpf(1, -ilogbf(bound)) : 1.0f;
      if (lane < a.at.padded)
        weights().template as<half_t>().st(
            (g / OWN * a.at.padded + lane) * (weights_bytes(OWN) / 2) + g % OWN,
            from_float<half_t>(w * unit));
      if (lane == 0) factors().st(g, float2{constant * unit * kScale, 1 / unit / kScale});
    });
    // of heads that are not there
    constexpr int pad = weights_bytes(OWN) / 2 - OWN;
    if constexpr (pad > 0)
      for (int c = thread_x(); c < a.at.parts * a.at.padded * pad; c += threads())
        weights().template as<half_t>().st(c / pad * (weights_bytes(OWN) / 2) + OWN + c % pad, half_t{});
    for (int c = thread_x() + a.heads * kTiles * 32; c < a.at.padded * kTiles * 32; c += threads())
      UNROLLED_FOR (int t = 0; t < 2; ++t) maps(t).st(c, uint4{0, 0, 0, 0});
  }

  // The centred maps of 16 keys and COUNT tiles of rows, from `first` on, of head h.
  template <int COUNT>
  DEVICE void make_maps(int h, int t, int first, const FragmentB<T> (&k)[WIDTH / 16][2]) const {
    float s[COUNT][2][4] = {};
    UNROLLED_FOR (int x = 0; x < WIDTH / 16; ++x)
      UNROLLED_FOR (int r = 0; r < COUNT; ++r) {
        FragmentA<T> q;
        load_a(q, queries(h),
               [&](int row, int i) { return (first + r) * kHead + row * kStride + 16 * x + i; });
        multiply_add<T>(s[r], q, k[x]);
      }
    const float scale = a.scale, mean = a.mean;
    UNROLLED_FOR (int r = 0; r < COUNT; ++r) {
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const float2 row = statistics().ld(h * kRows + 16 * (first + r) + tile_row(2 * i));
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 2 * i; e < 2 * i + 2; ++e)
            s[r][j][e] = fast_exp2(s[r][j][e] * scale - row.x) * row.y - mean;
      }
      if (16 * t + 16 > a.m)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e)
            if (16 * t + 8 * j + tile_col(e) >= a.m) s[r][j][e] = 0;
      uint32_t p[2][2];
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int i = 0; i < 2; ++i) p[j][i] = pack2<half_t>(s[r][j][2 * i], s[r][j][2 * i + 1]);
      maps(t).st((h * kTiles + first + r) * 32 + lane, uint4{p[0][0], p[0][1], p[1][0], p[1][1]});
    }
  }
  DEVICE void make_maps(int t) const {
    ROLLED_FOR (int h = warp; h < a.heads; h += warps) {
      FragmentB<T> k[WIDTH / 16][2];
      UNROLLED_FOR (int x = 0; x < WIDTH / 16; ++x)
        load_b(k[x], keys(h), [&](int key, int i) { return key * kStride + 16 * x + i; });
      if (present > kRows - 16) {
        make_maps<kTiles>(h, t, 0, k);
      } else {
        ROLLED_FOR (int r = 0; 16 * r < present; ++r) make_maps<1>(h, t, r, k);
      }
    }
  }

  DEVICE static void add_map(uint32_t (&y)[4], uint32_t weights, bool high, const uint4& p) {
    const uint32_t x[4] = {p.x, p.y, p.z, p.w};
    UNROLLED_FOR (int i = 0; i < 4; ++i)
      y[i] = high ? fma2<true>(weights, x[i], y[i]) : fma2<false>(weights, x[i], y[i]);
  }
  // out += mixed maps times the values of 16 keys
  DEVICE void mix_maps(int t) {
    if (16 * tile >= present) return;
    const auto maps = this->maps(t);
    const auto weights = this->weights();
    uint32_t y[OWN][4] = {};
    uint4 p[kStep];
    Weights w[kStep];
    const auto load = [&](int i, int h) {
      p[i] = maps.ld((h * kTiles + tile) * 32 + lane);
      w[i] = weights.ld(part * a.at.padded + h);
    };
    const auto add = [&](int i) {
      UNROLLED_FOR (int g = 0; g < OWN; ++g) add_map(y[g], w[i].pair[g / 2], g % 2, p[i]);
    };
    UNROLLED_FOR (int i = 0; i < kStep; ++i) load(i, i);
    ROLLED_FOR (int h = kStep; h < a.at.padded; h += kStep)
      UNROLLED_FOR (int i = 0; i < kStep; ++i) {
        add(i);
        load(i, h + i);  // travels while the others are added
      }
    UNROLLED_FOR (int i = 0; i < kStep; ++i) add(i);
    UNROLLED_FOR (int g = 0; g < OWN; ++g) {
      const int h = part * a.own + g;
      if (g >= a.own || h >= a.heads) break;
      const float constant = factors().ld(part * OWN + g).x;
      const uint32_t one = pack2<half_t>(1, 1), added = pack2<half_t>(constant, constant);
      FragmentA<T> p;
      UNROLLED_FOR (int i = 0; i < 4; ++i) {
        const uint32_t mixed = fma2<false>(one, y[g][i], added);
        if constexpr (std::is_same_v<T, half_t>)
          p.r[i] = mixed;
        else
          p.r[i] = pack2<T>(to_float(half_t{uint16_t(mixed)}), to_float(half_t{uint16_t(mixed >> 16)}));
      }
      UNROLLED_FOR (int x = 0; x < WIDTH / 16; ++x) {
        FragmentB<T> v[2];
        load_b<true>(v, values(h, t), [&](int column, int key) { return key * kStride + 16 * x + column; });
        multiply_add<T>(out[g][x], p, v);
      }
    }
  }

  DEVICE void clear_out() {
    UNROLLED_FOR (int g = 0; g < OWN; ++g)
      UNROLLED_FOR (int x = 0; x < WIDTH / 16; ++x)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e) out[g][x][j][e] = 0;
  }
  // By way of the warp's own queries, which are not needed any more.
  DEVICE void store_out() const {
    const auto rows = queries(warp);
    UNROLLED_FOR (int g = 0; g < OWN; ++g) {
      const int h = part * a.own + g;
      if (g >= a.own || h >= a.heads) break;
      const float factor = factors().ld(part * OWN + g).y;
      sync_warp();
      UNROLLED_FOR (int x = 0; x < WIDTH / 16; ++x)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int i = 0; i < 2; ++i)
            store2(rows, tile_row(2 * i) * kStride + 16 * x + 8 * j + tile_col(0),
                   out[g][x][j][2 * i] * factor, out[g][x][j][2 * i + 1] * factor);
      sync_warp();
      const int64_t to = image * a.out_image + h * a.out_head + (row0 + 16 * tile) * a.out_row;
      UNROLLED_FOR (int i = 0; i < WIDTH / 16; ++i) {
        const int c = lane + 32 * i, r = c / (WIDTH / 8), x = c % (WIDTH / 8) * 8;
        if (16 * tile + r < present)
          a.out.template st<uint4>(to + r * a.out_row + x, rows.template ld<uint4>(r * kStride + x));
      }
    }
  }
};

template <class T, int WIDTH, int OWN>
KERNEL LAUNCH_BOUNDS(32 * kRegisterWarps, 1) registers_tile(RegistersKernel<T> a) {
  RegistersTile<T, WIDTH, OWN> tile(a);
  const auto small = tile.load_small();
  tile.fetch_queries();
  tile.fetch_keys(0);
  tile.fetch_values(0);
  tile.store_small(small);
  tile.clear_out();
  sync_block();
  ROLLED_FOR (int t = 0; 16 * t < a.m; ++t) {
    copy_wait<1>();  // own keys
    sync_warp();
    tile.make_maps(t);
    sync_warp();
    tile.fetch_keys(t + 1);
    copy_wait<1>();  // values
    sync_block();
    tile.mix_maps(t);
    if (a.at.buffers == 1) sync_block();
    tile.fetch_values(t + 1);
  }
  tile.store_out();
}

template <class T>
void launch_of(const ReattentionForward& args, const RegisterLayout& at, const float* rows, void* stream) {
  RegistersKernel<T> a{};
  a.q = heads_view<T>(args.q, args.d);
  a.k = heads_view<T>(args.k, args.d);
  a.v = heads_view<T>(args.v, args.d);
  a.heads = static_cast<int>(args.H);
  a.own = (a.heads + at.parts - 1) / at.parts;
  a.n = static_cast<int>(args.N);
  a.m = static_cast<int>(args.M);
  a.tiles = (a.n + 16 * kRegisterTiles - 1) / (16 * kRegisterTiles);
  a.scale = static_cast<float>(args.scale * kLog2e);
  a.mean = MapNumbers<T>::kScale / a.m;
  a.centred = args.centred;
  a.mix = {static_cast<const float*>(args.folded_mix)};
  a.bias = {static_cast<const float*>(args.folded_bias)};
  a.out = {static_cast<T*>(args.out.data)};
  a.out_image = args.out.stride_b;
  a.out_head = args.out.stride_h;
  a.out_row = args.out.stride_n;
  a.rows = {rows};
  a.field = args.B * args.H * args.N;
  a.at = at;
  auto* kernel = registers_tile<T, 64, 3>;
  if (args.d == 32) kernel = registers_tile<T, 32, 6>;
  if (args.d == 48) kernel = registers_tile<T, 48, 4>;
  launch("reattention_fwd", kernel, args.B * a.tiles, 32 * kRegisterTiles * at.parts, at.bytes, stream, a);
}

}  // namespace

void launch_registers(const ReattentionForward& args, const RegisterLayout& at, const float* rows,
                      void* stream) {
  if (args.q.dtype == ScalarType::kHalf)
    launch_of<half_t>(args, at, rows, stream);
  else
    launch_of<bf16_t>(args, at, rows, stream);
}

}  // namespace vitdiv::cuda
