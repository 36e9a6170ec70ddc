// The Gram matrix of attention maps between all heads of one or two layers, forward and backward; the maths
// is in vitdiv_kernels/ops/maps/attention_gram/README.md. Tasks and sums as in reattention.cpp.
#include "attention.h"
#include "heads.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

constexpr int kLayers = 2;

VITDIV_INLINE int64_t heads_of(const GramArgs& a) { return a.layers[0].H + a.layers[1].H; }

template <class T>
struct MapScratch {
  HeadPanels<T> keys_t[kLayers];
  int64_t columns;
  T *copy, *a, *row_scales,
      *chunk;  // maps [H, rows, padded] before their row_scales [H, rows]; [H, columns]
  MapScratch(Arena& arena, const GramArgs& args, const Work<T>& w)
      : keys_t{{arena, true, args.layers[0].H, args.M, args.layers[0].d, Pack::kTransposed},
               {arena, true, args.layers[1].H, args.M, args.layers[1].d, Pack::kTransposed}},
        columns(chunk_columns<T>(heads_of(args))),
        copy(arena.take<T>(copy_size(w.tile, max64(args.layers[0].d, args.layers[1].d)))),
        a(arena.take<T>(heads_of(args) * w.tile.head_stride())),
        row_scales(arena.take<T>(heads_of(args) * w.tile.rows)),
        chunk(arena.take<T>(heads_of(args) * columns)) {}
  void set_image(const GramArgs& args, int64_t b) const {
    for (int l = 0; l < kLayers; l++) keys_t[l].fill(args.layers[l].k, b, args.layers[l].H, copy);
  }
};

// The softmax maps of query rows i ... i + n of both layers' heads, for m.row_scales to scale.
template <class T>
void softmax_maps(const GramArgs& args, const Work<T>& w, const MapScratch<T>& m, int64_t b, int64_t i,
                  int64_t n) {
  const int64_t padded = w.tile.padded;
  T *a = m.a, *row_scales = m.row_scales;
  for (int l = 0; l < kLayers; l++)
    for (int64_t h = 0; h < args.layers[l].H; h++, a += w.tile.head_stride(), row_scales += n) {
      const Layer& layer = args.layers[l];
      const Rows<T> q = head_rows(layer.q, b, h, i, n, layer.d, m.copy);
      gemm<T, false>(n, args.M, layer.d, q.data, q.ld, m.keys_t[l][h], a, padded, false);
      softmax_rows_unscaled(n, args.M, padded, a, T(layer.scale), row_scales);
    }
}

template <class T>
struct ForwardScratch : MapScratch<T> {
  PairSums<T, true> gram;
  ForwardScratch(Arena& arena, const GramArgs& args, const Work<T>& w)
      : MapScratch<T>(arena, args, w),
        gram{arena.take<T>(PairSums<T, true>::size(heads_of(args))), heads_of(args)} {}
};

template <class T>
bool forward(const GramForward& args) {
  const int64_t H = heads_of(args);
  const Work<T> w(H, args.B, args.N, args.M, args.threads);
  const int64_t stride = w.tile.head_stride(), padded = w.tile.padded;
  Arena per_thread;
  ForwardScratch<T>(per_thread, args, w);
  const int64_t sums_size = H * H, sums_bytes = round_up(w.tasks * sums_size * int64_t(sizeof(double)), 64);
  const Block block(sums_bytes + args.threads * per_thread.used());
  if (!block.data()) return false;
  double* sums = reinterpret_cast<double*>(block.data());

#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    Arena arena(block.data() + sums_bytes + thread_index() * per_thread.used());
    const ForwardScratch<T> m(arena, args, w);
    int64_t image = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < w.tasks; task++) {
      const int64_t b = w.image(task);
      if (b != image) m.set_image(args, image = b);
      double* task_sums = sums + task * sums_size;
      for (int64_t x = 0; x < sums_size; x++) task_sums[x] = 0;
      for (int64_t t = w.first_tile(task); t < w.end_tile(task); t++) {
        const int64_t i = w.tile.begin(t), n = w.tile.begin(t + 1) - i;
        softmax_maps(args, w, m, b, i, n);
        m.gram.clear();
        for_chunks<T>(H, n, padded, [&](int64_t row, int64_t rows, int64_t x, int64_t width) {
          centre<T>(H, n, args.M, padded, row, rows, x, width, m.row_scales, w.mean, m.a, stride, m.chunk,
                    m.columns, false);
          m.gram.add(width, m.chunk, m.columns, m.chunk, m.columns, T(0));
        });
        m.gram.add_to(task_sums);
      }
    }
  }
  store_grams<T>(w, H, sums, static_cast<T*>(args.gram));
  return true;
}

template <class T>
struct BackwardScratch : MapScratch<T> {
  HeadPanels<T> keys[kLayers];
  T *g, *dk[kLayers];
  BackwardScratch(Arena& arena, const GramBackward& args, const Work<T>& w)
      : MapScratch<T>(arena, args, w),
        keys{{arena, args.dq[0].data != nullptr, args.layers[0].H, args.M, args.layers[0].d, Pack::kRows},
             {arena, args.dq[1].data != nullptr, args.layers[1].H, args.M, args.layers[1].d, Pack::kRows}},
        g(arena.take<T>(heads_of(args) * w.tile.head_stride())) {
    for (int l = 0; l < kLayers; l++) {
      const Layer& layer = args.layers[l];
      dk[l] = arena.take<T>(HeadGradients<T>::scratch_size(args.dk[l], layer.H, args.M, layer.d, false));
    }
  }
  void set_image(const GramBackward& args, int64_t b) const {
    MapScratch<T>::set_image(args, b);
    for (int l = 0; l < kLayers; l++)
      if (args.dq[l].data) keys[l].fill(args.layers[l].k, b, args.layers[l].H, this->copy);
  }
};

template <class T>
bool backward(const GramBackward& args) {
  const int64_t H = heads_of(args);
  const Work<T> w(H, args.B, args.N, args.M, args.threads);
  const int64_t stride = w.tile.head_stride(), padded = w.tile.padded;
  int64_t dk_offset[kLayers], dk_total = 0;  // of one part of an image
  for (int l = 0; l < kLayers; l++) {
    dk_offset[l] = dk_total;
    dk_total += HeadGradients<T>::scratch_size(args.dk[l], args.layers[l].H, args.M, args.layers[l].d, true);
  }
  Arena per_thread, common;
  BackwardScratch<T>(per_thread, args, w);
  common.take<T>(w.parts() * dk_total);
  const Block block(common.used() + args.threads * per_thread.used());
  if (!block.data()) return false;
  T* partial = reinterpret_cast<T*>(block.data());

#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    Arena arena(block.data() + common.used() + thread_index() * per_thread.used());
    const BackwardScratch<T> m(arena, args, w);
    int64_t image = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < w.tasks; task++) {
      const int64_t b = w.image(task);
      if (b != image) m.set_image(args, image = b);
      const T* coupling = static_cast<const T*>(args.coupling) + b * H * H;
      for (int64_t t = w.first_tile(task); t < w.end_tile(task); t++) {
        const int64_t i = w.tile.begin(t), n = w.tile.begin(t + 1) - i;
        softmax_maps(args, w, m, b, i, n);
        for_chunks<T>(H, n, padded, [&](int64_t row, int64_t rows, int64_t x, int64_t width) {
          centre<T>(H, n, args.M, padded, row, rows, x, width, m.row_scales, w.mean, m.a, stride, m.chunk,
                    m.columns, true);
          // the maps enter centred: a constant along a row of their gradient has no effect on that of the
          // logits
          mix<T>(H, width, coupling, nullptr, T(0), m.chunk, m.columns, m.g + x, stride);
        });
        T *a = m.a, *g = m.g;
        for (int l = 0; l < kLayers; l++) {
          const Layer& layer = args.layers[l];
          const bool part = w.is_part(task);
          HeadGradients<T> dk(args.dk[l], layer.H, args.M, layer.d, task == w.first_task(b),
                              part ? partial + (task - w.whole) * dk_total + dk_offset[l] : m.dk[l]);
          for (int64_t h = 0; h < layer.H; h++, a += stride, g += stride) {
            for (int64_t r = 0; r < n; r++)
              softmax_row_bwd(padded, a + r * padded, g + r * padded, T(layer.scale));
            if (args.dq[l].data)
              product_to_rows<T>(n, layer.d, args.M, g, padded, m.keys[l][h], args.dq[l], b, h, i, m.copy);
            if (args.dk[l].data)
              dk.add(b, h, n, g, padded, head_row_panels(layer.q, b, h, i, n, layer.d, m.copy),
                     t != w.first_tile(task));
            if (args.dk[l].data && !part && t + 1 == w.end_tile(task)) dk.store(b, h);
          }
        }
      }
    }
    for (int l = 0; l < kLayers; l++) {
      const Layer& layer = args.layers[l];
#pragma omp for collapse(2) schedule(static)
      for (int64_t b = w.whole; b < args.B; b++)
        for (int64_t h = 0; h < layer.H; h++) {
          if (!args.dk[l].data) continue;
          T* first = partial + (b - w.whole) * w.pieces * dk_total + dk_offset[l];
          HeadGradients<T>(args.dk[l], layer.H, args.M, layer.d, true, first).store(b, h, w.pieces, dk_total);
        }
    }
  }
  return true;
}

}  // namespace

bool attention_gram_fwd(const GramForward& args) {
  return args.layers[0].q.dtype == ScalarType::kDouble ? forward<double>(args) : forward<float>(args);
}

bool attention_gram_bwd(const GramBackward& args) {
  return args.layers[0].q.dtype == ScalarType::kDouble ? backward<double>(args) : backward<float>(args);
}

}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
