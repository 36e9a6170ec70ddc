// Re-attention, forward and backward; the maths is in vitdiv_kernels/ops/maps/reattention/README.md.
//
// Sums that cross tasks are kept per task and added in order, so that the bits do not depend on which thread
// ran what.
#include "attention.h"
#include "heads.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

// scale * matrix [H, H], or its transpose.
template <class T>
const T* scaled(int64_t H, const void* matrix, double scale, bool transpose, T* out) {
  if (!matrix) return nullptr;
  for (int64_t g = 0; g < H; g++)
    for (int64_t h = 0; h < H; h++)
      out[transpose ? h * H + g : g * H + h] = T(scale * double(static_cast<const T*>(matrix)[g * H + h]));
  return out;
}

// The bias beside centred maps: mix A + bias = mix (A - 1/M) + (bias + sum_h mix / M).
template <class T>
const T* centred_bias(const ReattentionArgs& args, T* out) {
  for (int64_t g = 0; g < args.H; g++) {
    double total = 0;
    for (int64_t h = 0; !args.centred && h < args.H; h++)
      total += double(static_cast<const T*>(args.folded_mix)[g * args.H + h]);
    out[g] = T(total / double(args.M) +
               (args.folded_bias ? double(static_cast<const T*>(args.folded_bias)[g]) : 0));
  }
  return out;
}

// A thread's scratch for making the maps of one tile.
template <class T>
struct MapScratch {
  HeadPanels<T> keys_t;
  int64_t columns;
  T *copy, *a, *row_scales,
      *chunk;  // maps [H, rows, padded] before their row_scales [H, rows]; [H, columns]
  MapScratch(Arena& arena, const ReattentionArgs& args, const Work<T>& w)
      : keys_t(arena, w.whole > 0, args.H, args.M, args.d, Pack::kTransposed),
        columns(chunk_columns<T>(args.H)),
        copy(arena.take<T>(copy_size(w.tile, max64(args.d, args.dv)))),
        a(arena.take<T>(args.H * w.tile.head_stride())),
        row_scales(arena.take<T>(args.H * w.tile.rows)),
        chunk(arena.take<T>(args.H * columns)) {}
};

// The softmax maps of query rows i ... i + n into m.a, for m.row_scales to scale. With pre_mix (times the
// scale already) the raw logits are made in `raw`.
template <class T>
void softmax_maps(const ReattentionArgs& args, const Work<T>& w, const MapScratch<T>& m,
                  const HeadPanels<T>& keys_t, const T* pre_mix, T* raw, int64_t b, int64_t i, int64_t n) {
  const int64_t stride = w.tile.head_stride(), padded = w.tile.padded;
  for (int64_t h = 0; h < args.H; h++) {
    T* z = raw + h * stride;
    const Rows<T> q = head_rows(args.q, b, h, i, n, args.d, m.copy);
    gemm<T, false>(n, args.M, args.d, q.data, q.ld, keys_t[h], z, padded, false);
    if (pre_mix)
      w.tile.clear_padding(n, z);
    else
      softmax_rows_unscaled(n, args.M, padded, z, T(args.scale), m.row_scales + h * n);
  }
  if (!pre_mix) return;
  if (raw == m.a)
    mix_in_place<T>(args.H, n * padded, pre_mix, static_cast<const T*>(args.pre_bias), raw, stride, m.chunk);
  else
    mix<T>(args.H, n * padded, pre_mix, static_cast<const T*>(args.pre_bias), T(0), raw, stride, m.a, stride);
  for (int64_t h = 0; h < args.H; h++)
    softmax_rows_unscaled(n, args.M, padded, m.a + h * stride, T(1), m.row_scales + h * n);
}

template <class T>
struct ForwardScratch : MapScratch<T> {
  HeadPanels<T> values;
  PairSums<T, true> gram;
  ForwardScratch(Arena& arena, const ReattentionForward& args, const Work<T>& w)
      : MapScratch<T>(arena, args, w),
        values(arena, args.out.data && w.whole > 0, args.H, args.M, args.dv, Pack::kRows),
        gram{arena.take<T>(args.gram ? PairSums<T, true>::size(args.H) : 0), args.H} {}
};

template <class T>
struct ForwardShared {
  HeadPanels<T> keys_t, values;  // of the images that several tasks share
  double* grams;
  T *pre_mix, *bias;
  ForwardShared(Arena& arena, const ReattentionForward& args, const Work<T>& w)
      : keys_t(arena, true, args.H * (args.B - w.whole), args.M, args.d, Pack::kTransposed),
        values(arena, args.out.data, args.H * (args.B - w.whole), args.M, args.dv, Pack::kRows),
        grams(arena.take<double>(args.gram ? w.tasks * args.H * args.H : 0)),
        pre_mix(arena.take<T>(args.H * args.H)),
        bias(arena.take<T>(args.H)) {}
};

template <class T>
bool forward(const ReattentionForward& args) {
  const Work<T> w(args.H, args.B, args.N, args.M, args.threads);
  const int64_t H = args.H, stride = w.tile.head_stride(), padded = w.tile.padded;
  Arena per_thread, common;
  ForwardScratch<T>(per_thread, args, w);
  ForwardShared<T>(common, args, w);
  const Block block(common.used() + args.threads * per_thread.used());
  if (!block.data()) return false;
  Arena common_arena(block.data());
  const ForwardShared<T> shared(common_arena, args, w);
  const T* pre_mix = scaled(H, args.pre_mix, args.scale, false, shared.pre_mix);
  const T* bias = centred_bias(args, shared.bias);

#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    Arena arena(block.data() + common.used() + thread_index() * per_thread.used());
    const ForwardScratch<T> m(arena, args, w);
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = w.whole; b < args.B; b++)
      for (int64_t h = 0; h < H; h++) {
        const int64_t slot = (b - w.whole) * H + h;
        shared.keys_t.fill_head(args.k, b, h, slot, m.copy);
        if (args.out.data) shared.values.fill_head(args.v, b, h, slot, m.copy);
      }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < w.tasks; task++) {
      const int64_t b = w.image(task);
      const bool part = w.is_part(task);
      const HeadPanels<T> keys_t = part ? shared.keys_t.from((b - w.whole) * H) : m.keys_t;
      const HeadPanels<T> values = part ? shared.values.from((b - w.whole) * H) : m.values;
      if (!part) {
        keys_t.fill(args.k, b, H, m.copy);
        if (args.out.data) values.fill(args.v, b, H, m.copy);
      }
      double* gram_sum = args.gram ? shared.grams + task * H * H : nullptr;
      for (int64_t x = 0; gram_sum && x < H * H; x++) gram_sum[x] = 0;
      for (int64_t t = w.first_tile(task); t < w.end_tile(task); t++) {
        const int64_t i = w.tile.begin(t), n = w.tile.begin(t + 1) - i;
        softmax_maps<T>(args, w, m, keys_t, pre_mix, m.a, b, i, n);
        if (args.gram) m.gram.clear();
        for_chunks<T>(H, n, padded, [&](int64_t row, int64_t rows, int64_t x, int64_t width) {
          centre<T>(H, n, args.M, padded, row, rows, x, width, m.row_scales, w.mean, m.a, stride, m.chunk,
                    m.columns, false);
          if (args.gram) m.gram.add(width, m.chunk, m.columns, m.chunk, m.columns, T(0));
          if (!args.out.data) return;
          mix<T>(H, width, static_cast<const T*>(args.folded_mix), bias, T(0), m.chunk, m.columns, m.a + x,
                 stride);
          if (args.norm_weight)
            layer_norm_heads<T>(H, width, m.a + x, nullptr, nullptr, m.a + x, stride,
                                static_cast<const T*>(args.norm_weight),
                                static_cast<const T*>(args.norm_bias), T(args.eps));
        });
        if (args.gram) m.gram.add_to(gram_sum);
        for (int64_t h = 0; args.out.data && h < H; h++)
          product_to_rows<T>(n, args.dv, args.M, m.a + h * stride, padded, values[h], args.out, b, h, i,
                             m.copy);
      }
    }
  }
  if (args.gram) store_grams<T>(w, H, shared.grams, static_cast<T*>(args.gram));
  return true;
}

// One task's share of the gradients that sum over everything.
struct ParameterSums {
  double *dpre_mix, *dmix, *dbias, *dnorm_weight, *dnorm_bias;
  ParameterSums(double* base, int64_t H)
      : dpre_mix(base),
        dmix(base + H * H),
        dbias(base + 2 * H * H),
        dnorm_weight(dbias + H),
        dnorm_bias(dbias + 2 * H) {}
  static int64_t size(int64_t H) { return 2 * H * H + 3 * H; }
};

template <class T>
struct BackwardScratch : MapScratch<T> {
  HeadPanels<T> values_t, keys;
  T *g, *raw, *normalised, *rstd, *dk, *dv;
  PairSums<T, false> dmix, dpre_mix;
  HeadSums<T> dbias, dnorm_weight, dnorm_bias;
  BackwardScratch(Arena& arena, const ReattentionBackward& args, const Work<T>& w)
      : MapScratch<T>(arena, args, w),
        values_t(arena, args.dout.data && w.whole > 0, args.H, args.M, args.dv, Pack::kTransposed),
        keys(arena, args.dq.data && w.whole > 0, args.H, args.M, args.d, Pack::kRows),
        g(arena.take<T>(args.H * w.tile.head_stride())),
        raw(arena.take<T>(args.pre_mix ? args.H * w.tile.head_stride() : 0)),
        normalised(arena.take<T>(args.norm_weight ? args.H * w.tile.head_stride() : 0)),
        rstd(arena.take<T>(args.norm_weight ? w.tile.head_stride() : 0)),
        dk(arena.take<T>(HeadGradients<T>::scratch_size(args.dk, args.H, args.M, args.d, false))),
        dv(arena.take<T>(HeadGradients<T>::scratch_size(args.dv_out, args.H, args.M, args.dv, false))),
        dmix{arena.take<T>(args.dfolded_mix ? PairSums<T, false>::size(args.H) : 0), args.H},
        dpre_mix{arena.take<T>(args.dpre_mix ? PairSums<T, false>::size(args.H) : 0), args.H},
        dbias{arena.take<T>(HeadSums<T>::size(args.H)), args.H},
        dnorm_weight{arena.take<T>(HeadSums<T>::size(args.H)), args.H},
        dnorm_bias{arena.take<T>(HeadSums<T>::size(args.H)), args.H} {}
};

template <class T>
struct BackwardShared {
  HeadPanels<T> keys_t, values_t, keys;  // of the images that several tasks share
  double* sums;
  T *pre_mix, *pre_mix_t, *mix_t, *bias, *dk, *dv;
  BackwardShared(Arena& arena, const ReattentionBackward& args, const Work<T>& w)
      : keys_t(arena, true, args.H * (args.B - w.whole), args.M, args.d, Pack::kTransposed),
        values_t(arena, args.dout.data, args.H * (args.B - w.whole), args.M, args.dv, Pack::kTransposed),
        keys(arena, args.dq.data, args.H * (args.B - w.whole), args.M, args.d, Pack::kRows),
        sums(arena.take<double>(w.tasks * ParameterSums::size(args.H))),
        pre_mix(arena.take<T>(args.H * args.H)),
        pre_mix_t(arena.take<T>(args.H * args.H)),
        mix_t(arena.take<T>(args.H * args.H)),
        bias(arena.take<T>(args.H)),
        dk(arena.take<T>(w.parts() * HeadGradients<T>::scratch_size(args.dk, args.H, args.M, args.d, true))),
        dv(arena.take<T>(w.parts() *
                         HeadGradients<T>::scratch_size(args.dv_out, args.H, args.M, args.dv, true))) {}
};

// What a tile's backward reads beside the arguments and a thread's scratch.
template <class T>
struct BackwardInputs {
  HeadPanels<T> values_t;
  const T *pre_mix_t, *mix_t, *bias;
};

// Scales the tile's softmax maps and, where dv or the layer norm needs them, mixes them into m.g.
template <class T>
void mixed_maps(const ReattentionBackward& args, const Work<T>& w, const BackwardScratch<T>& m,
                const BackwardInputs<T>& in, int64_t n) {
  const int64_t H = args.H, stride = w.tile.head_stride(), padded = w.tile.padded;
  const T* norm_weight = static_cast<const T*>(args.norm_weight);
  const bool mixes = args.dout.data && (norm_weight || args.dv_out.data);
  for_chunks<T>(H, n, padded, [&](int64_t row, int64_t rows, int64_t x, int64_t width) {
    centre<T>(H, n, args.M, padded, row, rows, x, width, m.row_scales, w.mean, m.a, stride, m.chunk,
              m.columns, true);
    if (!mixes) return;
    T* mixed = (norm_weight ? m.normalised : m.g) + x;
    mix<T>(H, width, static_cast<const T*>(args.folded_mix), in.bias, T(0), m.chunk, m.columns, mixed,
           stride);
    if (norm_weight)
      layer_norm_heads<T>(H, width, mixed, mixed, m.rstd + x, args.dv_out.data ? m.g + x : nullptr, stride,
                          norm_weight, static_cast<const T*>(args.norm_bias), T(args.eps));
  });
  if (!norm_weight) return;
  w.tile.clear_padding(n, m.rstd);
  for (int64_t h = 0; h < H; h++) w.tile.clear_padding(n, m.normalised + h * stride);
}

// m.g, the gradient of the tile's mixed maps, becomes that of the logits; on the way to the parameters' sums.
template <class T>
void logits_gradient(const ReattentionBackward& args, const Work<T>& w, const BackwardScratch<T>& m,
                     const BackwardInputs<T>& in, int64_t b, int64_t n, ParameterSums sums) {
  const int64_t H = args.H, stride = w.tile.head_stride(), padded = w.tile.padded;
  const bool goes_on = args.dq.data || args.dk.data || args.dpre_mix;
  const T* norm_weight = static_cast<const T*>(args.norm_weight);
  const T* coupling =
      args.coupling ? static_cast<const T*>(args.coupling) + b * args.coupling_stride_b : nullptr;
  if (args.dfolded_mix) m.dmix.clear();
  if (args.dpre_mix) m.dpre_mix.clear();
  m.dbias.clear(), m.dnorm_weight.clear(), m.dnorm_bias.clear();
  for_chunks<T>(H, n, padded, [&](int64_t row, int64_t rows, int64_t x, int64_t width) {
    T *a = m.a + x, *g = m.g + x;
    if (args.dout.data) {
      if (norm_weight) {
        const T* normalised = m.normalised + x;
        for (int64_t h = 0; h < H; h++) {
          m.dnorm_weight.add(h, sum_products<T>(width, g + h * stride, normalised + h * stride));
          m.dnorm_bias.add(h, sum_vectors<T>(width, g + h * stride));
        }
        layer_norm_heads_bwd<T>(H, width, normalised, m.rstd + x, g, stride, norm_weight);
      }
      for (int64_t h = 0; h < H; h++)
        m.dbias.add(h, copy_and_sum<T>(width, g + h * stride, m.chunk + h * m.columns));
      if (args.dfolded_mix) m.dmix.add(width, m.chunk, m.columns, a, stride, w.mean);
      if (goes_on) mix<T>(H, width, in.mix_t, nullptr, T(0), m.chunk, m.columns, g, stride);
    }
    if (!goes_on) return;
    // the centred maps serve here too: a constant along a row of the maps' gradient has no effect on that of
    // the logits
    if (coupling)
      mix<T>(H, width, coupling, nullptr, w.mean, a, stride, g, stride, args.dout.data != nullptr);
    if (x + width < (row + rows) * padded) return;
    for (int64_t r = row; r < row + rows; r++)
      for (int64_t h = 0; h < H; h++)
        softmax_row_bwd(padded, m.a + h * stride + r * padded, m.g + h * stride + r * padded,
                        in.pre_mix_t ? T(1) : T(args.scale));
    if (!in.pre_mix_t) return;
    const int64_t end = x + width;
    for (int64_t y = row * padded; y < end; y += m.columns) {
      const int64_t some = min64(m.columns, end - y);
      for (int64_t h = 0; h < H; h++)
        memcpy(m.chunk + h * m.columns, m.g + h * stride + y, size_t(some) * sizeof(T));
      if (args.dpre_mix) m.dpre_mix.add(some, m.chunk, m.columns, m.raw + y, stride, T(0));
      mix<T>(H, some, in.pre_mix_t, nullptr, T(0), m.chunk, m.columns, m.g + y, stride);
    }
  });
  if (args.dfolded_mix) m.dmix.add_to(sums.dmix);
  if (args.dpre_mix) m.dpre_mix.add_to(sums.dpre_mix);
  m.dbias.add_to(sums.dbias);
  m.dnorm_weight.add_to(sums.dnorm_weight), m.dnorm_bias.add_to(sums.dnorm_bias);
}

template <class T>
void store_parameters(const ReattentionBackward& args, const Work<T>& w, const double* sums) {
  const int64_t H = args.H, size = ParameterSums::size(H);
  const ParameterSums first(const_cast<double*>(sums), H);
  const auto total = [&](const double* from) {
    double sum = 0;
    for (int64_t task = 0; task < w.tasks; task++) sum += from[task * size];
    return sum;
  };
  const auto store = [&](void* out, const double* from, int64_t count, double factor) {
    for (int64_t x = 0; out && x < count; x++) static_cast<T*>(out)[x] = T(factor * total(from + x));
  };
  store(args.dpre_mix, first.dpre_mix, H * H, args.scale);
  for (int64_t g = 0; args.dfolded_mix && g < H; g++) {
    const double from_bias = args.centred ? 0 : total(first.dbias + g) / double(args.M);
    for (int64_t h = 0; h < H; h++)
      static_cast<T*>(args.dfolded_mix)[g * H + h] = T(total(first.dmix + g * H + h) + from_bias);
  }
  store(args.dfolded_bias, first.dbias, H, 1);
  store(args.dnorm_weight, first.dnorm_weight, H, 1);
  store(args.dnorm_bias, first.dnorm_bias, H, 1);
}

template <class T>
bool backward(const ReattentionBackward& args) {
  const Work<T> w(args.H, args.B, args.N, args.M, args.threads);
  const int64_t H = args.H, stride = w.tile.head_stride(), padded = w.tile.padded;
  const int64_t dk_size = HeadGradients<T>::scratch_size(args.dk, H, args.M, args.d, true);
  const int64_t dv_size = HeadGradients<T>::scratch_size(args.dv_out, H, args.M, args.dv, true);
  Arena per_thread, common;
  BackwardScratch<T>(per_thread, args, w);
  BackwardShared<T>(common, args, w);
  const Block block(common.used() + args.threads * per_thread.used());
  if (!block.data()) return false;
  Arena common_arena(block.data());
  const BackwardShared<T> shared(common_arena, args, w);
  const T* pre_mix = scaled(H, args.pre_mix, args.scale, false, shared.pre_mix);
  const T* pre_mix_t = scaled(H, args.pre_mix, args.scale, true, shared.pre_mix_t);
  const T* mix_t = scaled(H, args.folded_mix, 1, true, shared.mix_t);
  const T* bias = centred_bias(args, shared.bias);

#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    Arena arena(block.data() + common.used() + thread_index() * per_thread.used());
    const BackwardScratch<T> m(arena, args, w);
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = w.whole; b < args.B; b++)
      for (int64_t h = 0; h < H; h++) {
        const int64_t slot = (b - w.whole) * H + h;
        shared.keys_t.fill_head(args.k, b, h, slot, m.copy);
        if (args.dout.data) shared.values_t.fill_head(args.v, b, h, slot, m.copy);
        if (args.dq.data) shared.keys.fill_head(args.k, b, h, slot, m.copy);
      }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < w.tasks; task++) {
      const int64_t b = w.image(task);
      const bool part = w.is_part(task);
      const HeadPanels<T> keys_t = part ? shared.keys_t.from((b - w.whole) * H) : m.keys_t;
      const HeadPanels<T> values_t = part ? shared.values_t.from((b - w.whole) * H) : m.values_t;
      const HeadPanels<T> keys = part ? shared.keys.from((b - w.whole) * H) : m.keys;
      if (!part) {
        keys_t.fill(args.k, b, H, m.copy);
        if (args.dout.data) values_t.fill(args.v, b, H, m.copy);
        if (args.dq.data) keys.fill(args.k, b, H, m.copy);
      }
      double* task_sums = shared.sums + task * ParameterSums::size(H);
      for (int64_t x = 0; x < ParameterSums::size(H); x++) task_sums[x] = 0;
      const ParameterSums sums(task_sums, H);
      const bool first_task = task == w.first_task(b);
      HeadGradients<T> dk(args.dk, H, args.M, args.d, first_task,
                          part ? shared.dk + (task - w.whole) * dk_size : m.dk);
      HeadGradients<T> dv(args.dv_out, H, args.M, args.dv, first_task,
                          part ? shared.dv + (task - w.whole) * dv_size : m.dv);
      const BackwardInputs<T> in{values_t, pre_mix_t, mix_t, bias};
      for (int64_t t = w.first_tile(task); t < w.end_tile(task); t++) {
        const int64_t i = w.tile.begin(t), n = w.tile.begin(t + 1) - i;
        const bool first = t == w.first_tile(task);
        softmax_maps<T>(args, w, m, keys_t, pre_mix, pre_mix ? m.raw : m.a, b, i, n);
        mixed_maps<T>(args, w, m, in, n);
        for (int64_t h = 0; args.dout.data && h < H; h++) {
          T* g = m.g + h * stride;
          if (args.dv_out.data)
            dv.add(b, h, n, g, padded, head_row_panels(args.dout, b, h, i, n, args.dv, m.copy), !first);
          const Rows<T> dout = head_rows(args.dout, b, h, i, n, args.dv, m.copy);
          gemm<T, false>(n, args.M, args.dv, dout.data, dout.ld, values_t[h], g, padded, false);
          w.tile.clear_padding(n, g);
        }
        logits_gradient<T>(args, w, m, in, b, n, sums);
        for (int64_t h = 0; h < H; h++) {
          if (args.dq.data)
            product_to_rows<T>(n, args.d, args.M, m.g + h * stride, padded, keys[h], args.dq, b, h, i,
                               m.copy);
          if (args.dk.data)
            dk.add(b, h, n, m.g + h * stride, padded, head_row_panels(args.q, b, h, i, n, args.d, m.copy),
                   !first);
        }
      }
      for (int64_t h = 0; !part && h < H; h++) {
        if (args.dk.data) dk.store(b, h);
        if (args.dv_out.data) dv.store(b, h);
      }
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = w.whole; b < args.B; b++)
      for (int64_t h = 0; h < H; h++) {
        const int64_t first = (b - w.whole) * w.pieces;
        if (args.dk.data)
          HeadGradients<T>(args.dk, H, args.M, args.d, true, shared.dk + first * dk_size)
              .store(b, h, w.pieces, dk_size);
        if (args.dv_out.data)
          HeadGradients<T>(args.dv_out, H, args.M, args.dv, true, shared.dv + first * dv_size)
              .store(b, h, w.pieces, dv_size);
      }
  }
  store_parameters<T>(args, w, shared.sums);
  return true;
}

template <class T>
bool dots_of_heads(const HeadDots& args) {
  Arena per_thread;
  per_thread.take<T>(2 * round_up(args.width, kLanes<T>));
  const int64_t sums_bytes = round_up(args.B * args.H * int64_t(sizeof(double)), 64);
  const Block block(sums_bytes + args.threads * per_thread.used());
  if (!block.data()) return false;
  double* sums = reinterpret_cast<double*>(block.data());
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    Arena arena(block.data() + sums_bytes + thread_index() * per_thread.used());
    T *x_copy = arena.take<T>(2 * round_up(args.width, kLanes<T>)),
      *y_copy = x_copy + round_up(args.width, kLanes<T>);
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < args.B; b++)
      for (int64_t h = 0; h < args.H; h++) {
        double total = 0;
        for (int64_t i = 0; i < args.N; i++) {
          const T* x = head_rows(args.x, b, h, i, 1, args.width, x_copy).data;
          const T* y = head_rows(args.y, b, h, i, 1, args.width, y_copy).data;
          total += double(dot(args.width, x, y));
        }
        sums[b * args.H + h] = total;
      }
  }
  for (int64_t h = 0; h < args.H; h++) {
    double total = 0;
    for (int64_t b = 0; b < args.B; b++) total += sums[b * args.H + h];
    static_cast<T*>(args.sums)[h] = T(total);
  }
  return true;
}

}  // namespace

bool head_dots(const HeadDots& args) {
  return args.x.dtype == ScalarType::kDouble ? dots_of_heads<double>(args) : dots_of_heads<float>(args);
}

bool reattention_fwd(const ReattentionForward& args) {
  return args.q.dtype == ScalarType::kDouble ? forward<double>(args) : forward<float>(args);
}

bool reattention_bwd(const ReattentionBackward& args) {
  return args.q.dtype == ScalarType::kDouble ? backward<double>(args) : backward<float>(args);
}

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
