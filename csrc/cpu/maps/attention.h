// A tile of attention maps: `rows` query rows of all heads of one image, [H, rows, padded keys], made in L2
// and used there.
#pragma once

#include "../core/convert.h"
#include "../core/gemm.h"
#include "../core/scratch.h"
#include "softmax.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

template <class T>
struct TileShape {
  int64_t N, M, padded, rows, tiles;
  // Each tile passes over all of K and V, and in the backward adds to all of dK and dV, with its rows as the
  // depth of the product: few rows cost more than a tile that leaves the L2. Measured at H = 12, N = 197, d =
  // 64, forward and backward: 28 rows take 1.04 times as long as 50, and 66 and 99 are within 1 % of 50.
  TileShape(int64_t heads, int64_t N, int64_t M) : N(N), M(M), padded(round_up(M, kLanes<T>)) {
    // rows that lie a large power of two apart would evict each other from L1 where a product reads them as
    // columns
    if (padded * int64_t(sizeof(T)) % 512 == 0) padded += kLanes<T>;
    constexpr int64_t kTileBytes = 4 << 20, kMostRows = 50;
    const int64_t fitting = kTileBytes / (max64(heads * padded, 1) * int64_t(sizeof(T)));
    rows = min64(kMostRows, max64(fitting, kMaxRows));
    tiles = ceil_div(N, rows);
    set_multiple(1);
  }
  // Tiles of an image that is cut into `pieces` pieces of whole tiles.
  void set_multiple(int64_t pieces) {
    tiles = min64(round_up(tiles, pieces), N);
    rows = tiles ? ceil_div(N, tiles) : 0;
  }
  int64_t begin(int64_t tile) const { return tile * N / tiles; }
  int64_t head_stride() const { return rows * padded; }
  void clear_padding(int64_t n, T* map) const {
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = M; j < padded; j++) map[r * padded + j] = 0;
  }
};

// The tasks that threads share: whole images and, where those left over would keep some threads idle, ranges
// of the row tiles of the images left over. Tasks of one image are neighbours and in the order of its tiles.
template <class T>
struct Work {
  TileShape<T> tile;
  int64_t B, pieces, whole, tasks;
  // of a softmax map: maps are mixed and their Gram is taken less this, which keeps digits near uniform maps
  T mean;
  Work(int64_t heads, int64_t B, int64_t N, int64_t M, int64_t threads)
      : tile(heads, N, M), B(B), pieces(pieces_per_item(B % threads, threads, min64(tile.tiles, threads))) {
    const int64_t idle = B % threads ? threads - B % threads : 0;
    if (8 * idle <= ceil_div(B, threads) * threads) pieces = 1;
    if (pieces > 1) tile.set_multiple(pieces);
    whole = pieces > 1 ? B - B % threads : B;
    tasks = whole + (B - whole) * pieces;
    mean = T(1) / T(M);
  }
  int64_t image(int64_t task) const { return task < whole ? task : whole + (task - whole) / pieces; }
  int64_t first_task(int64_t image) const {
    return image <= whole ? image : whole + (image - whole) * pieces;
  }
  bool is_part(int64_t task) const { return task >= whole; }
  int64_t parts() const { return tasks - whole; }
  int64_t first_tile(int64_t task) const {
    return is_part(task) ? (task - whole) % pieces * tile.tiles / pieces : 0;
  }
  int64_t end_tile(int64_t task) const {
    return is_part(task) ? ((task - whole) % pieces + 1) * tile.tiles / pieces : tile.tiles;
  }
};

VITDIV_INLINE int64_t offset_of(const HeadsView& view, int64_t b, int64_t h, int64_t i) {
  return b * view.stride_b + h * view.stride_h + i * view.stride_n;
}

template <class T>
Rows<T> head_rows(const HeadsView& view, int64_t b, int64_t h, int64_t i, int64_t n, int64_t width, T* copy) {
  return rows_of(view.data, view.dtype, offset_of(view, b, h, i), view.stride_n, n, width, copy);
}

enum class Pack { kRows, kTransposed };

// Panels of all heads' [M, width], or of their transposes, one head after the other. copy: [M, width].
template <class T>
struct HeadPanels {
  T* data;
  int64_t M, width;
  Pack order;
  static int64_t size(int64_t H, int64_t M, int64_t width, Pack order) {
    return H * (order == Pack::kRows ? packed_size<T>(width, M) : packed_size<T>(M, width));
  }
  HeadPanels(Arena& arena, bool needed, int64_t H, int64_t M, int64_t width, Pack order)
      : data(arena.take<T>(needed ? size(H, M, width, order) : 0)), M(M), width(width), order(order) {}
  // Head h of image b becomes panel set `slot`.
  void fill_head(const HeadsView& view, int64_t b, int64_t h, int64_t slot, T* copy) const {
    const Rows<T> rows = head_rows(view, b, h, 0, M, width, copy);
    T* out = data + slot * size(1, M, width, order);
    if (order == Pack::kRows)
      pack_rows(M, width, rows.data, rows.ld, out);
    else
      pack_transposed(M, width, rows.data, rows.ld, out);
  }
  void fill(const HeadsView& view, int64_t b, int64_t H, T* copy) const {
    for (int64_t h = 0; h < H; h++) fill_head(view, b, h, h, copy);
  }
  HeadPanels from(int64_t slot) const {
    HeadPanels rest = *this;
    rest.data += slot * size(1, M, width, order);
    return rest;
  }
  Panels<T> operator[](int64_t h) const {
    return {data + h * size(1, M, width, order), order == Pack::kRows ? M : width};
  }
};

// n rows of a head as panels. copy: [n, width], then room for the panels.
template <class T>
Panels<T> head_row_panels(const HeadsView& view, int64_t b, int64_t h, int64_t i, int64_t n, int64_t width,
                          T* copy) {
  const Rows<T> rows = head_rows(view, b, h, i, n, width, copy);
  T* panels = copy + n * width;
  pack_rows(n, width, rows.data, rows.ld, panels);
  return {panels, n};
}

// c [n, width] of query rows i ... i + n of a head: written in place where whole vectors of its own dtype can
// be, else through copy [n, round_up(width, kLanes)].
template <class T>
bool takes_whole_vectors(const HeadsView& view, int64_t width) {
  return is_native<T>(view.dtype) && width % kLanes<T> == 0;
}

template <class T>
void product_to_rows(int64_t n, int64_t width, int64_t K, const T* a, int64_t lda, Panels<T> panels,
                     const HeadsView& out, int64_t b, int64_t h, int64_t i, T* copy) {
  if (takes_whole_vectors<T>(out, width)) {
    gemm<T, false>(n, width, K, a, lda, panels, static_cast<T*>(out.data) + offset_of(out, b, h, i),
                   out.stride_n, false);
    return;
  }
  const int64_t ld = round_up(width, kLanes<T>);
  gemm<T, false>(n, width, K, a, lda, panels, copy, ld, false);
  for (int64_t r = 0; r < n; r++)
    store_row(copy + r * ld, width, out.data, out.dtype, offset_of(out, b, h, i + r));
}

// Scratch that serves the copies above: a whole head, or a tile of query rows and its panels.
template <class T>
int64_t copy_size(const TileShape<T>& tile, int64_t width) {
  return max64(tile.M * width, tile.rows * (width + round_up(width, kPanel<T>)));
}

// The gradient [M, width] of each head's keys or values, which every row tile adds to. It grows in the output
// itself where whole vectors of its own dtype can be written there and the task is the first of its image;
// else in scratch, and store() adds up and converts.
template <class T>
class HeadGradients {
 public:
  // elements of scratch: per thread, or per task where an image has several
  static int64_t scratch_size(const HeadsView& out, int64_t H, int64_t M, int64_t width, bool several) {
    return out.data && (several || !takes_whole_vectors<T>(out, width)) ? H * M * round_up(width, kLanes<T>)
                                                                        : 0;
  }
  HeadGradients(const HeadsView& out, int64_t H, int64_t M, int64_t width, bool first, T* scratch)
      : out_(out),
        H_(H),
        M_(M),
        width_(width),
        direct_(first && takes_whole_vectors<T>(out, width)),
        scratch_(scratch) {}
  // (+)= a^T rows, a [n, M]
  void add(int64_t b, int64_t h, int64_t n, const T* a, int64_t lda, Panels<T> rows, bool accumulate) {
    T* c = direct_ ? static_cast<T*>(out_.data) + offset_of(out_, b, h, 0) : head(scratch_, h);
    gemm<T, true>(M_, width_, n, a, lda, rows, c, direct_ ? out_.stride_n : ld(), accumulate);
  }
  // The sum of `count` tasks, the first one's first. Their scratch is `stride` apart.
  void store(int64_t b, int64_t h, int64_t count = 1, int64_t stride = 0) {
    if (direct_ && count == 1) return;
    for (int64_t i = 0; i < M_; i++) {
      T* sum = head(scratch_, h) + i * ld();
      T* row = direct_ ? static_cast<T*>(out_.data) + offset_of(out_, b, h, i) : sum;
      for (int64_t p = 1; p < count; p++)
        for (int64_t c = 0; c < ld(); c++) row[c] += sum[p * stride + c];
      if (!direct_) store_row(row, width_, out_.data, out_.dtype, offset_of(out_, b, h, i));
    }
  }

 private:
  int64_t ld() const { return round_up(width_, kLanes<T>); }
  T* head(T* base, int64_t h) const { return base + h * M_ * ld(); }
  HeadsView out_;
  int64_t H_, M_, width_;
  bool direct_;
  T* scratch_;
};

// The upper triangles [H, H] of each task, added up and mirrored: [B, H, H].
template <class T>
void store_grams(const Work<T>& w, int64_t H, const double* sums, T* out) {
  for (int64_t b = 0; b < w.B; b++)
    for (int64_t g = 0; g < H; g++)
      for (int64_t h = g; h < H; h++) {
        double total = 0;
        for (int64_t task = w.first_task(b); task < w.first_task(b + 1); task++)
          total += sums[(task * H + g) * H + h];
        out[(b * H + g) * H + h] = out[(b * H + h) * H + g] = T(total);
      }
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
