// The Gram matrix of attention maps between all heads of one or two layers, forward and backward; the maths is in
// vitdiv_kernels/ops/attn_diversity/README.md. Tasks and sums as in reattention.cpp.
#include "attention.h"
#include "heads.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

constexpr int kLayers = 2;

template <class T>
struct Work {
  int64_t H;
  TileShape<T> tile;
  int64_t pieces, tasks;
  T mean;
  explicit Work(const GramArgs& a)
      : H(a.layers[0].H + a.layers[1].H),
        tile(H, a.N, a.M),
        pieces(pieces_per_item(a.B, a.threads, min64(tile.tiles, a.threads))),
        tasks(a.B * pieces),
        mean(T(1) / T(a.M)) {}
  int64_t first_tile(int64_t task) const { return task % pieces * tile.tiles / pieces; }
  int64_t end_tile(int64_t task) const { return (task % pieces + 1) * tile.tiles / pieces; }
};

template <class T>
struct MapScratch {
  HeadPanels<T> keys_t[kLayers];
  T *copy, *a;
  MapScratch(Arena& arena, const GramArgs& args, const Work<T>& w)
      : keys_t{{arena, true, args.layers[0].H, args.M, args.layers[0].d, Pack::kTransposed},
               {arena, true, args.layers[1].H, args.M, args.layers[1].d, Pack::kTransposed}},
        copy(arena.take<T>(copy_size(w.tile, max64(args.layers[0].d, args.layers[1].d)))),
        a(arena.take<T>(w.H * w.tile.head_stride())) {}
  void set_image(const GramArgs& args, int64_t b) const {
    for (int l = 0; l < kLayers; l++) keys_t[l].fill(args.layers[l].k, b, args.layers[l].H, copy);
  }
};

// The softmax maps of query rows i ... i + n of both layers' heads, their padding set to `pad`.
template <class T>
void softmax_maps(const GramArgs& args, const Work<T>& w, const MapScratch<T>& m, int64_t b, int64_t i,
                  int64_t n, T pad) {
  const int64_t padded = w.tile.padded;
  T* a = m.a;
  for (int l = 0; l < kLayers; l++)
    for (int64_t h = 0; h < args.layers[l].H; h++, a += w.tile.head_stride()) {
      const Layer& layer = args.layers[l];
      const Rows<T> q = head_rows(layer.q, b, h, i, n, layer.d, m.copy);
      gemm<T, false>(n, args.M, layer.d, q.data, q.ld, m.keys_t[l][h], a, padded, false);
      for (int64_t r = 0; r < n; r++) softmax_row(args.M, padded, a + r * padded, T(layer.scale), pad);
    }
}

template <class T>
bool forward(const GramForward& args) {
  const Work<T> w(args);
  Arena per_thread;
  MapScratch<T>(per_thread, args, w);
  const int64_t sums_size = w.H * w.H,
                sums_bytes = round_up(w.tasks * sums_size * int64_t(sizeof(double)), 64);
  const Block block(sums_bytes + args.threads * per_thread.used());
  if (!block.data()) return false;
  double* sums = reinterpret_cast<double*>(block.data());

#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
  {
    Arena arena(block.data() + sums_bytes + thread_index() * per_thread.used());
    const MapScratch<T> m(arena, args, w);
    int64_t image = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < w.tasks; task++) {
      const int64_t b = task / w.pieces;
      if (b != image) m.set_image(args, image = b);
      double* task_sums = sums + task * sums_size;
      for (int64_t x = 0; x < sums_size; x++) task_sums[x] = 0;
      for (int64_t t = w.first_tile(task); t < w.end_tile(task); t++) {
        const int64_t i = w.tile.begin(t), n = w.tile.begin(t + 1) - i;
        // padding at the mean adds nothing to the centred Gram
        softmax_maps(args, w, m, b, i, n, w.mean);
        gram<T>(w.H, w.H, n * w.tile.padded, m.a, w.mean, m.a, w.mean, w.tile.head_stride(), task_sums, true);
      }
    }
  }
  store_grams<T>(args.B, w.pieces, w.H, sums, static_cast<T*>(args.gram));
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
        g(arena.take<T>(w.H * w.tile.head_stride())) {
    for (int l = 0; l < kLayers; l++) {
      const Layer& layer = args.layers[l];
      dk[l] = arena.take<T>(
          w.pieces == 1 ? HeadGradients<T>::scratch_size(args.dk[l], layer.H, args.M, layer.d, false) : 0);
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
  const Work<T> w(args);
  const int64_t stride = w.tile.head_stride(), padded = w.tile.padded;
  const bool several = w.pieces > 1;
  int64_t dk_size[kLayers], dk_offset[kLayers], dk_total = 0;
  for (int l = 0; l < kLayers; l++) {
    dk_size[l] =
        HeadGradients<T>::scratch_size(args.dk[l], args.layers[l].H, args.M, args.layers[l].d, several);
    dk_offset[l] = dk_total;
    if (several) dk_total += dk_size[l];
  }
  Arena per_thread, common;
  BackwardScratch<T>(per_thread, args, w);
  common.take<T>(w.tasks * dk_total);
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
      const int64_t b = task / w.pieces;
      if (b != image) m.set_image(args, image = b);
      const T* coupling = static_cast<const T*>(args.coupling) + b * w.H * w.H;
      for (int64_t t = w.first_tile(task); t < w.end_tile(task); t++) {
        const int64_t i = w.tile.begin(t), n = w.tile.begin(t + 1) - i;
        softmax_maps(args, w, m, b, i, n, T(0));
        // the maps enter centred: a constant along a row of their gradient has no effect on that of the logits
        mix<T>(w.H, n * padded, coupling, nullptr, w.mean, m.a, m.g, stride);
        T *a = m.a, *g = m.g;
        for (int l = 0; l < kLayers; l++) {
          const Layer& layer = args.layers[l];
          HeadGradients<T> dk(args.dk[l], layer.H, args.M, layer.d, several,
                              several ? partial + task * dk_total + dk_offset[l] : m.dk[l]);
          for (int64_t h = 0; h < layer.H; h++, a += stride, g += stride) {
            for (int64_t r = 0; r < n; r++)
              softmax_row_bwd(padded, a + r * padded, g + r * padded, T(layer.scale));
            if (args.dq[l].data)
              product_to_rows<T>(n, layer.d, args.M, g, padded, m.keys[l][h], args.dq[l], b, h, i, m.copy);
            if (args.dk[l].data)
              dk.add(b, h, n, g, padded, head_row_panels(layer.q, b, h, i, n, layer.d, m.copy),
                     t != w.first_tile(task));
            if (args.dk[l].data && !several && t + 1 == w.end_tile(task)) dk.store(b, h);
          }
        }
      }
    }
    if (several)
      for (int l = 0; l < kLayers; l++) {
        const Layer& layer = args.layers[l];
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < args.B; b++)
          for (int64_t h = 0; h < layer.H; h++) {
            if (!args.dk[l].data) continue;
            T* first = partial + b * w.pieces * dk_total + dk_offset[l];
            HeadGradients<T>(args.dk[l], layer.H, args.M, layer.d, true, first)
                .store(b, h, w.pieces, dk_total);
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
