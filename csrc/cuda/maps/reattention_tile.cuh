// What the forward of re-attention does for one tile of query rows of all heads; reattention.cu tells how the
// parts go together.
#pragma once

#include "reattention.cuh"

namespace vitdiv::cuda {

template <class T, int GROUPS, bool PRE_MIX>
struct ForwardTile {
  static constexpr int kRowTileCount = kRowTiles<T>, kRows = 16 * kRowTileCount, kParts = kLogitParts<T>;
  static constexpr int kStages = Scores<T, kRowTileCount>::kStages;
  using A = Acc<T>;
  using M = Map<T>;
  using L = Logit<T>;
  using Slot = Scores<T, kRowTileCount, GROUPS == 2>;  // 12 warps have no registers left for queries
  using Columns = HeadTile<A, GROUPS>;
  // in registers where they are few
  static constexpr bool kHeld = GROUPS == 1;
  using Mix = std::conditional_t<kHeld, HeldMatrix<M, GROUPS>, HeadMatrix<M>>;

  const ForwardKernel<T>& a;
  int image, row0, present, first_head, end_head, first_column, end_column;
  HeadProducts<M, GROUPS> gram;
  A out[kRowTileCount][kOutTiles<T>][2][4];

  template <class X>
  DEVICE static Shared<X> piece(int place, int count) {
    return Carver{place}.take<X>(count);
  }
  DEVICE Shared<M> maps() const { return piece<M>(0, a.at.maps.size); }
  DEVICE Shared<T> mixed() const { return piece<T>(0, a.at.maps.size); }  // takes the maps' place
  DEVICE Shared<L> logits(int part) const {
    return piece<L>(part * a.at.logits.size * int(sizeof(L)), a.at.logits.size);
  }
  DEVICE HeadMatrix<M> mix() const {
    return {piece<M>(a.at.mix_at, a.at.mix), piece<A>(a.at.mix_units_at, a.at.vector), a.heads};
  }
  DEVICE HeadMatrix<L> pre_mix() const {
    return {piece<L>(a.at.pre_mix_at, a.at.pre_mix), piece<A>(a.at.pre_mix_units_at, a.at.vector), a.heads};
  }
  DEVICE Shared<A> vector(Vector which) const {
    return piece<A>(a.at.vectors_at + which * a.at.vector * int(sizeof(A)), a.at.vector);
  }
  DEVICE Shared<A> row_maxes() const { return piece<A>(a.at.row_maxes_at, a.at.rows); }
  DEVICE Shared<A> row_scales() const { return piece<A>(a.at.row_scales_at, a.at.rows); }
  DEVICE Slot scores() const {  // of a warp that has a slot
    return {piece<T>(a.at.slots_at + warp() * a.at.slot * int(sizeof(T)), a.at.slot), renewed(a.stride),
            a.width, padded_width(a.width)};
  }

  DEVICE static int warp() { return thread_x() >> 5; }
  DEVICE static int warps() { return threads() >> 5; }

  template <class Use>
  DEVICE static void for_each_head_place(Use use) {
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) use(group, half, 16 * group + tile_row(2 * half));
  }
  // In place of what stands at keys that are not there. `first`: of these 16
  template <int COUNT>
  DEVICE void fill_keys(A (&s)[COUNT][2][4], int first, A value) const {
    UNROLLED_FOR (int r = 0; r < COUNT; ++r)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 4; ++e)
          if (first + 8 * j + tile_col(e) >= a.m) s[r][j][e] = value;
  }

  DEVICE ForwardTile(const ForwardKernel<T>& a) : a(a) {
    const int slice = block_x() % a.slices, tile = block_x() / a.slices;
    image = tile / a.tiles;
    row0 = tile % a.tiles * kRows;
    present = a.n - row0 < kRows ? a.n - row0 : kRows;
    first_head = slice / a.width_slices * a.slice_heads;
    end_head = first_head + a.slice_heads < a.heads ? first_head + a.slice_heads : a.heads;
    first_column = slice % a.width_slices * 16 * kOutTiles<T>;
    end_column = a.width_slices > 1 && first_column + 16 * kOutTiles<T> < a.out_width
                     ? first_column + 16 * kOutTiles<T>
                     : a.out_width;
    a.at.maps.clear_zeros(maps());
    if (a.out.p) mix().fill([&](int g, int h) { return a.mix.ld(g * a.heads + h); });
    if constexpr (PRE_MIX) {
      UNROLLED_FOR (int part = 0; part < kParts; ++part) a.at.logits.clear_zeros(logits(part));
      pre_mix().fill([&](int g, int h) { return a.pre_mix.ld(g * a.heads + h); });
    }
    sync_block();
    if (thread_x() < a.at.vector) fill_vectors(thread_x());
    gram.clear();
  }

  // Maps that are mixed in float16 are multiplied by a power of two that leaves them just within its range:
  // those of a collapsed model may be very small.
  DEVICE void fill_vectors(int g) const {
    const bool there = g < a.heads, layer = a.norm_weight.p != nullptr;
    const auto of = [&](Global<const A> x) { return there && x.p ? x.ld(g) : A(0); };
    if (PRE_MIX) {
      vector(kPreFactor).st(g, pre_mix().units.ld(g));
      vector(kPreConstant).st(g, of(a.pre_bias) * A(kLog2e));
    }
    if (!a.out.p) return;
    A total = 0, size = 0;
    for (int h = 0; there && h < a.heads; ++h) {
      const A w = a.mix.ld(g * a.heads + h);
      total += w;
      size += w < 0 ? -w : w;
    }
    const A constant = (a.centred ? A(0) : total / a.m) + of(a.bias);
    const A weight = of(a.norm_weight), added = of(a.norm_bias);
    A unit = 1;
    if constexpr (sizeof(T) == 2) {
      const float bound =
          layer ? sqrtf(float(a.heads)) * fabsf(weight) + fabsf(added) : size + fabsf(constant);
      if (bound > 1e-30f && bound < 1e30f) unit = ldexpf(1, 14 - ilogbf(bound));
    }
    const A mixed_unit = layer ? A(1) : unit;
    vector(kFactor).st(g, mix().units.ld(g) / MapNumbers<T>::kScale * mixed_unit);
    vector(kConstant).st(g, constant * mixed_unit);
    vector(kWeight).st(g, weight * unit);
    vector(kAdded).st(g, added * unit);
    vector(kOutFactor).st(g, 1 / unit);
  }

  // begin(h), then use(h, t, logits) for tiles of keys from first to end, for all heads of this warp
  template <class Begin, class Use>
  DEVICE void for_each_head(int first, int end, bool fetched, Begin begin, Use use) const {
    if (warp() >= a.workers) return;
    ROLLED_FOR (int h = warp(); h < a.heads; h += a.workers) {
      const auto scores = this->scores();
      if (!fetched) scores.fetch_queries(a.q, image * a.q.image + h * a.q.head, row0, a.n);
      begin(h);
      scores.for_each_tile(a.k, image * a.k.image + h * a.k.head, first, end, a.m, [&](int t, auto& s) {
        UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 0; e < 4; ++e) s[r][j][e] *= a.scale;
        use(h, t, s);
      });
    }
  }

  // All heads' logits of a chunk, for the mix before the softmax.
  DEVICE void make_logits(int key0, int columns, bool fetched) const {
    const auto at = a.at.maps.renewed();
    const auto nothing = [](int) {};
    for_each_head(key0 / 16, (key0 + columns) / 16, fetched, nothing, [&](int h, int t, const auto& s) {
      UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int i = 0; i < 2; ++i) {
            const int row = 16 * r + tile_row(2 * i), column = 16 * t - key0 + 8 * j + tile_col(0);
            const int place = at.place_of_head(h, row, column);
            const A x = s[r][j][2 * i], y = s[r][j][2 * i + 1];
            store2(logits(0), place, x, y);
            if constexpr (kParts == 2)
              store2(logits(1), place, x - to_float(from_float<L>(x)), y - to_float(from_float<L>(y)));
          }
    });
  }
  // The mixed logits of 16 keys of query row i.
  DEVICE void mix_logits(Columns& z, const Chunk<L>& at, int key0, int i, int x) const {
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 0; e < 4; ++e) z[group][j][e] = 0;
    Shared<L> planes[kParts];
    UNROLLED_FOR (int part = 0; part < kParts; ++part) planes[part] = logits(part);
    mix_heads<L>(z, pre_mix(), planes, at, i, x);
    for_each_head_place([&](int group, int half, int h) {
      if (16 * group >= a.heads) return;
      const A factor = vector(kPreFactor).ld(h), constant = vector(kPreConstant).ld(h);
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e)
          z[group][j][e] = z[group][j][e] * factor + constant;
    });
    if (key0 + x + 16 > a.m) fill_keys(z, key0 + x, -INFINITY);
  }

  // The largest logit of each row and the inverse of its sum of exponentials, as softmax_rows found them.
  DEVICE void load_statistics() const {
    for (int c = thread_x(); c < a.heads * kRows; c += threads()) {
      const int h = c / kRows, i = c % kRows;
      const int64_t from = (int64_t(image) * a.heads + h) * a.n + row0 + i;
      row_maxes().st(c, i < present ? a.rows.ld(from) : A(0));
      row_scales().st(c, i < present ? a.rows.ld(from + a.field) : A(0));
    }
  }
  // The same of mixed logits, chunk by chunk; `row_scales` holds the sum so far.
  DEVICE void add_statistics(int key0, int columns) const {
    const bool leader = (lane_id() & 3) == 0;
    const auto at = a.at.logits.renewed();
    for (int i = warp(); i < present; i += warps()) {
      RowStatistics<T, GROUPS> statistics;
      if (key0 > 0)
        for_each_head_place([&](int group, int half, int h) {
          if (h >= a.heads) return;
          statistics.row_max[group][half] = row_maxes().ld(h * kRows + i);
          if (leader) statistics.sum[group][half] = row_scales().ld(h * kRows + i);
        });
      ROLLED_FOR (int x = 0; x < columns; x += 16) {
        Columns z;
        mix_logits(z, at, key0, i, x);
        statistics.add(z);
      }
      statistics.finish();
      sync_warp();  // the old numbers are read
      for_each_head_place([&](int group, int half, int h) {
        if (h >= a.heads || !leader) return;
        const A sum = statistics.sum[group][half];
        row_maxes().st(h * kRows + i, statistics.row_max[group][half]);
        row_scales().st(h * kRows + i, key0 + columns < a.m ? sum : MapNumbers<T>::kScale / sum);
      });
    }
  }

  // The centred maps of a chunk.
  DEVICE void make_maps(int key0, int columns, bool fetched) const {
    const auto at = a.at.maps.renewed();
    const int end_key = a.m;
    const A mean = a.mean;
    A row_max[kRowTileCount][2], row_scale[kRowTileCount][2];
    const auto load_rows = [&](int h) {
      UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
        UNROLLED_FOR (int i = 0; i < 2; ++i) {
          const int row = h * kRows + 16 * r + tile_row(2 * i);
          row_max[r][i] = row_maxes().ld(row), row_scale[r][i] = row_scales().ld(row);
        }
    };
    for_each_head(key0 / 16, (key0 + columns) / 16, fetched, load_rows, [&](int h, int t, auto& s) {
      UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e)
            s[r][j][e] = fast_exp2(s[r][j][e] - row_max[r][e >> 1]) * row_scale[r][e >> 1] - mean;
      if (16 * t + 16 > end_key) fill_keys(s, 16 * t, A(0));
      UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
        UNROLLED_FOR (int i = 0; i < 2; ++i)
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            store2(maps(), at.place_of_head(h, 16 * r + tile_row(2 * i), 16 * t - key0 + 8 * j + tile_col(0)),
                   s[r][j][2 * i], s[r][j][2 * i + 1]);
    });
  }
  DEVICE A centred_map(A logit, A row_max, A row_scale, int column) const {
    return column < a.m ? fast_exp2(logit - row_max) * row_scale - a.mean : A(0);
  }
  // The centred maps of 16 keys of query row i, from logits in the same place.
  DEVICE void make_mixed_maps(const Chunk<L>& at, int key0, int i, int x) const {
    Columns z;
    mix_logits(z, at, key0, i, x);
    sync_warp();  // all heads of this place are read
    for_each_head_place([&](int group, int half, int h) {
      if (h >= a.heads) return;
      const A row_max = row_maxes().ld(h * kRows + i), row_scale = row_scales().ld(h * kRows + i);
      UNROLLED_FOR (int j = 0; j < 2; ++j) {
        const int column = x + 8 * j + tile_col(0);
        A p[2];
        UNROLLED_FOR (int e = 0; e < 2; ++e)
          p[e] = centred_map(z[group][j][2 * half + e], row_max, row_scale, key0 + column + e);
        store2(maps(), at.place_of_head(h, i, column), p[0], p[1]);
      }
    });
    sync_warp();
  }

  // What couples the heads of a chunk: the Gram matrix, the mix and the layer norm.
  DEVICE void couple_heads(int key0, int columns, bool wants_gram) {
    const auto at = a.at.maps.renewed();
    const auto logits_at = a.at.logits.renewed();
    Mix matrix;
    if (a.out.p) {
      if constexpr (kHeld)
        matrix.load(mix());
      else
        matrix = mix();
    }
    Affine to_mixed{}, to_normed{};
    if (kHeld && a.out.p) to_mixed = affine(kFactor, kConstant);
    if (kHeld && a.out.p && a.norm_weight.p) to_normed = affine(kWeight, kAdded);
    const int end_key = a.m;
    ROLLED_FOR (int i = 0, x = 16 * warp();; x += 16 * warps()) {
      ROLLED_FOR (; x >= columns; x -= columns) ++i;
      if (i >= present) break;
      if constexpr (PRE_MIX) make_mixed_maps(logits_at, key0, i, x);
      if (wants_gram) gram.add_square(maps(), at, i, x);
      if (!a.out.p) continue;
      Columns y = {};
      const Shared<M> chunk[1] = {maps()};
      mix_heads<M>(y, matrix, chunk, at, i, x);
      sync_warp();  // all heads of this place are read
      (kHeld ? to_mixed : affine(kFactor, kConstant)).apply(y);
      if (a.norm_weight.p) {
        A rstd[2][2];
        normalise_heads(y, rstd, a.heads, a.eps);
        (kHeld ? to_normed : affine(kWeight, kAdded)).apply(y);
      }
      // of keys that are not there the layer norm may be Inf
      if (key0 + x + 16 > end_key) fill_keys(y, key0 + x, A(0));
      for_each_head_place([&](int group, int half, int h) {
        if (h >= a.heads) return;
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          store2(mixed(), at.place_of_head(h, i, x + 8 * j + tile_col(0)), y[group][j][2 * half],
                 y[group][j][2 * half + 1]);
      });
    }
  }
  // x factor + constant, for each head
  struct Affine {
    A factor[GROUPS][2], constant[GROUPS][2];
    DEVICE void apply(Columns& y) const {
      UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e)
            y[group][j][e] = y[group][j][e] * factor[group][e >> 1] + constant[group][e >> 1];
    }
  };
  DEVICE Affine affine(Vector factors, Vector constants) const {
    Affine both = {};
    for_each_head_place([&](int group, int half, int h) {
      if (16 * group >= a.heads) return;
      both.factor[group][half] = vector(factors).ld(h), both.constant[group][half] = vector(constants).ld(h);
    });
    return both;
  }

  DEVICE int out_width(int first) const {
    return end_column - first < 16 * kOutTiles<T> ? end_column - first : 16 * kOutTiles<T>;
  }
  DEVICE void fetch_values(const Slot& slot, int h, int first, int t, int end) const {
    const int width = out_width(first);
    if (t < end)
      fetch16(slot.ring_tile(t), slot.stride, a.v, image * a.v.image + h * a.v.head + first, 16 * t, a.m,
              width, padded_width(width));
    copy_commit();
  }
  // The values of a chunk, columns first to first + 16 kOutTiles of head h, begin to load.
  DEVICE void begin_values(int h, int first, int key0, int columns) const {
    const auto slot = scores();
    sync_warp();  // the ring may still be in use
    ROLLED_FOR (int t = 0; t < kStages - 1; ++t)
      fetch_values(slot, h, first, key0 / 16 + t, (key0 + columns) / 16);
  }
  // out += mixed maps times the values that begin_values began to load.
  DEVICE void add_values(int h, int first, int key0, int columns) {
    const int width = out_width(first), first_tile = key0 / 16, end_tile = (key0 + columns) / 16;
    const auto slot = scores();
    const auto at = a.at.maps.renewed();
    ROLLED_FOR (int t = first_tile; t < end_tile; ++t) {
      copy_wait<kStages - 2>();
      sync_warp();
      fetch_values(slot, h, first, t + kStages - 1, end_tile);
      const int values = slot.ring(t);
      for (int k0 = 0; k0 < 16; k0 += kDepth<T>) {
        FragmentA<T> p[kRowTileCount];
        UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
          load_a(p[r], mixed(),
                 [&](int row, int k) { return at.place_of_head(h, 16 * r + row, 16 * t - key0 + k0 + k); });
        UNROLLED_FOR (int x = 0; x < kOutTiles<T>; ++x) {
          if (16 * x >= width) continue;
          FragmentB<T> b[2];
          load_b<true>(b, slot.memory,
                       [&](int column, int k) { return values + (k0 + k) * slot.stride + 16 * x + column; });
          UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r) multiply_add<T>(out[r][x], p[r], b);
        }
      }
    }
  }
  DEVICE void clear_out() {
    UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
      UNROLLED_FOR (int x = 0; x < kOutTiles<T>; ++x)
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 0; e < 4; ++e) out[r][x][j][e] = 0;
  }
  // By way of the queries' place, which are not needed any more.
  DEVICE void store_out(int h, int first) const {
    constexpr int piece = 16 / sizeof(T);
    const A factor = vector(kOutFactor).ld(h);
    const int width = out_width(first);
    const auto slot = scores();
    const int64_t to = image * a.out_image + h * a.out_head + row0 * a.out_row + first;
    sync_warp();
    UNROLLED_FOR (int r = 0; r < kRowTileCount; ++r)
      UNROLLED_FOR (int x = 0; x < kOutTiles<T>; ++x) {
        if (16 * x >= width) continue;
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int i = 0; i < 2; ++i)
            store2(slot.memory, (16 * r + tile_row(2 * i)) * slot.stride + 16 * x + 8 * j + tile_col(0),
                   out[r][x][j][2 * i] * factor, out[r][x][j][2 * i + 1] * factor);
      }
    sync_warp();
    if (a.out_pieces) {
      ROLLED_FOR (int i = lane_id() >> 3; i < present; i += 4)
        for (int x = (lane_id() & 7) * piece; x < width; x += 8 * piece)
          a.out.template st<uint4>(to + i * a.out_row + x,
                                   slot.memory.template ld<uint4>(i * slot.stride + x));
    } else {
      ROLLED_FOR (int i = 0; i < present; ++i)
        ROLLED_FOR (int x = lane_id(); x < width; x += 32)
          a.out.st(to + i * a.out_row + x, slot.memory.ld(i * slot.stride + x));
    }
    sync_warp();
  }
};

}  // namespace vitdiv::cuda
