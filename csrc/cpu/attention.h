// A tile of attention maps: `rows` query rows of all heads of one image, [H, rows, padded keys], made in L2 and used there.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "scratch.h"
#include "softmax.h"

namespace vitdiv {
namespace VITDIV_CPU_NAMESPACE {
namespace {

template <class T>
struct TileShape {
  int64_t N, M, padded, rows, tiles;
  // All maps of a tile stay within about a third of a 1 MB L2; 16 to 56 rows measured the same within 5 %.
  TileShape(int64_t heads, int64_t N, int64_t M) : N(N), M(M), padded(round_up(M, kLanes<T>)) {
    constexpr int64_t kTileBytes = 384 << 10, kMostRows = 32;
    const int64_t fitting = kTileBytes / (max64(heads * padded, 1) * int64_t(sizeof(T)));
    rows = min64(kMostRows, max64(fitting, kMaxRows));
    tiles = ceil_div(N, rows);
    rows = tiles ? ceil_div(N, tiles) : 0;
  }
  int64_t begin(int64_t tile) const { return tile * N / tiles; }
  int64_t head_stride() const { return rows * padded; }
};

VITDIV_INLINE int64_t offset_of(const HeadsView& view, int64_t b, int64_t h, int64_t i) {
  return b * view.stride_b + h * view.stride_h + i * view.stride_n;
}

template <class T>
Rows<T> head_rows(const HeadsView& view, int64_t b, int64_t h, int64_t i, int64_t n, int64_t width, bool whole_vectors,
                  T* copy) {
  return rows_of(view.data, view.dtype, offset_of(view, b, h, i), view.stride_n, n, width, whole_vectors, copy);
}

template <class T>
bool needs_copy(const HeadsView& view, int64_t width) {
  return !is_native<T>(view.dtype) || width % kLanes<T> != 0;
}

// The transposes of all heads' [M, width] as panels, head h at h * packed_size(M, width).
template <class T>
void pack_heads(const HeadsView& view, int64_t b, int64_t H, int64_t M, int64_t width, T* staging, T* panels) {
  for (int64_t h = 0; h < H; h++) {
    const Rows<T> rows = head_rows(view, b, h, 0, M, width, false, staging);
    pack_transposed(M, width, rows.data, rows.ld, panels + h * packed_size<T>(M, width));
  }
}

// All heads' rows as panels of a product: in place or copied to [H, M, round_up(width, kLanes)].
template <class T>
class HeadPanels {
 public:
  HeadPanels(const HeadsView& view, int64_t M, int64_t width, T* copy)
      : view_(view), M_(M), width_(width), copy_(copy), copied_(needs_copy<T>(view, width)) {}
  static int64_t copy_size(const HeadsView& view, int64_t H, int64_t M, int64_t width) {
    return needs_copy<T>(view, width) ? H * M * round_up(width, kLanes<T>) : 0;
  }
  void set_image(int64_t b, int64_t H) {
    for (int64_t h = 0; copied_ && h < H; h++) head_rows(view_, b, h, 0, M_, width_, true, head_copy(h));
  }
  Panels<T> at(int64_t b, int64_t h) const {
    if (copied_) return row_panels<T>(head_copy(h), round_up(width_, kLanes<T>));
    return row_panels<T>(static_cast<const T*>(view_.data) + offset_of(view_, b, h, 0), view_.stride_n);
  }

 private:
  T* head_copy(int64_t h) const { return copy_ + h * M_ * round_up(width_, kLanes<T>); }
  HeadsView view_;
  int64_t M_, width_;
  T* copy_;
  bool copied_;
};

// Query rows i ... i + n of head h times all its keys: raw logits.
template <class T>
void logits(const HeadsView& q, const T* key_panels, int64_t b, int64_t h, int64_t i, int64_t n, int64_t M, int64_t d,
            T* copy, T* out, int64_t padded) {
  const Rows<T> rows = head_rows(q, b, h, i, n, d, false, copy);
  gemm<T, false>(n, M, d, rows.data, rows.ld, packed_panels(key_panels + h * packed_size<T>(M, d), d), out, padded, false);
}

// The gradient [M, width] of each head's keys or values, which every row tile adds to. It grows in the output itself where
// whole vectors of its own dtype can be written there and no other task adds to it; else in scratch, and store() converts.
template <class T>
class HeadGradients {
 public:
  // bytes of scratch: per thread, or per task where an image has several
  static int64_t scratch_size(const HeadsView& out, int64_t H, int64_t M, int64_t width, bool several) {
    return out.data && (several || needs_copy<T>(out, width)) ? H * M * round_up(width, kLanes<T>) : 0;
  }
  HeadGradients(const HeadsView& out, int64_t H, int64_t M, int64_t width, bool several, T* scratch)
      : out_(out), H_(H), M_(M), width_(width), direct_(scratch_size(out, H, M, width, several) == 0), scratch_(scratch) {}
  // (+)= a^T rows, a [n, M]
  void add(int64_t b, int64_t h, int64_t n, const T* a, int64_t lda, Rows<T> rows, bool accumulate) {
    T* c = direct_ ? static_cast<T*>(out_.data) + offset_of(out_, b, h, 0) : head(scratch_, h);
    gemm<T, true>(M_, width_, n, a, lda, row_panels<T>(rows.data, rows.ld), c, direct_ ? out_.stride_n : ld(), accumulate);
  }
  // The sum of `count` tasks' scratch, each `stride` apart.
  void store(int64_t b, int64_t h, int64_t count = 1, int64_t stride = 0) {
    if (direct_) return;
    T* sum = head(scratch_, h);
    for (int64_t i = 0; i < M_; i++) {
      T* row = sum + i * ld();
      for (int64_t p = 1; p < count; p++)
        for (int64_t c = 0; c < ld(); c++) row[c] += row[p * stride + c];
      store_row(row, width_, out_.data, out_.dtype, offset_of(out_, b, h, i));
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

// The per-task upper triangles [B * pieces, H, H] to [B, H, H].
template <class T>
void store_grams(int64_t B, int64_t pieces, int64_t H, const double* sums, T* out) {
  for (int64_t b = 0; b < B; b++)
    for (int64_t g = 0; g < H; g++)
      for (int64_t h = g; h < H; h++) {
        double total = 0;
        for (int64_t p = 0; p < pieces; p++) total += sums[((b * pieces + p) * H + g) * H + h];
        out[(b * H + g) * H + h] = out[(b * H + h) * H + g] = T(total);
      }
}

// c [n, width] of query rows i ... i + n: written in place where possible, else through `copy`.
template <class T>
void product_to_rows(int64_t n, int64_t width, int64_t K, const T* a, int64_t lda, Panels<T> b_panels, const HeadsView& out,
                     int64_t b, int64_t h, int64_t i, T* copy) {
  if (!needs_copy<T>(out, width)) {
    gemm<T, false>(n, width, K, a, lda, b_panels, static_cast<T*>(out.data) + offset_of(out, b, h, i), out.stride_n, false);
    return;
  }
  const int64_t ld = round_up(width, kLanes<T>);
  gemm<T, false>(n, width, K, a, lda, b_panels, copy, ld, false);
  for (int64_t r = 0; r < n; r++) store_row(copy + r * ld, width, out.data, out.dtype, offset_of(out, b, h, i + r));
}

}  // namespace
}  // namespace VITDIV_CPU_NAMESPACE
}  // namespace vitdiv
