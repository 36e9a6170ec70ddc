// A tile of one or two kinds of products: of x with y or, where y is x, of x and of z with themselves.
#pragma once

#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {

template <class T>
struct PairSets {
  Vectors<T> x;  // [items, N, D]
  Vectors<T> y;  // [items, M, D]
  Vectors<T> z;  // [items, N, D2], N = M; its width may be 0: then there is no second product
  Global<const Acc<T>> x_inverse_norms;  // [items, N]
  Global<const Acc<T>> y_inverse_norms;  // [items, M]
  Global<const Acc<T>> z_inverse_norms;  // [items, N]
};

template <class T, int GRAMS>
struct PairProducts {
  using Tile = CosineTile<T>;
  using A = Acc<T>;
  static constexpr int kNorms = 2 * GRAMS * Tile::kSize;
  Shared<A> norms;  // inverse norms: [GRAMS][rows, columns][kSize]
  CosineSums<T> s, t;
  Powers<T> powers[GRAMS];

  // What a product of the gram takes of the tile's i-th row (set 0) or column (set 1).
  DEVICE A inverse_norm(int gram, int set, int i) const {
    return powers[gram].left_of(norms.ld((2 * gram + set) * Tile::kSize + i));
  }

  // `same`: rows and columns are the same vectors.
  DEVICE void make(const PairSets<T>& a, const CosineProducts<T>& products, const CosinePart<T>& part,
                   int64_t item, int row0, int column0, bool same) {
    ROLLED_FOR (int e = thread_x(); e < kNorms; e += threads()) {
      const int gram = e / (2 * Tile::kSize), set = e / Tile::kSize % 2;
      const int at = (set ? column0 : row0) + e % Tile::kSize, count = set ? a.y.count : a.x.count;
      const auto from = gram ? a.z_inverse_norms : set ? a.y_inverse_norms : a.x_inverse_norms;
      norms.st(e, at < count && (gram == 0 || a.z.width > 0) ? from.ld(item * count + at) : A(0));
    }
    sync_block();
    UNROLLED_FOR (int i = 0; i < 32 * Tile::kGroups; ++i)
      s[i / 32][i / 16 % 2][i / 8 % 2][i / 4 % 2][i % 4] = 0;
    ROLLED_FOR (int gram = GRAMS == 2 && a.z.width > 0 ? 1 : 0; gram >= 0; --gram) {
      const bool of_z = GRAMS == 2 && gram == 1;
      if constexpr (GRAMS == 2)
        if (!of_z)
          UNROLLED_FOR (int i = 0; i < 32 * Tile::kGroups; ++i) {
            A& sum = s[i / 32][i / 16 % 2][i / 8 % 2][i / 4 % 2][i % 4];
            t[i / 32][i / 16 % 2][i / 8 % 2][i / 4 % 2][i % 4] = sum;
            sum = 0;
          }
      const auto number = [&](int set, int i) { return norms.ld((2 * gram + set) * Tile::kSize + i); };
      const Powers<T> now = Powers<T>::of_tile(Tile::kSize, number);
      if constexpr (GRAMS == 2)
        if (of_z) powers[GRAMS - 1] = now;
      if (!of_z) powers[0] = now;
      const Vectors<T> rows = of_z ? a.z : a.x, columns = GRAMS == 2 ? rows : a.y;
      sync_block();  // the memory may still be in use
      products.add(s, part, rows, item * rows.item, row0, columns, item * columns.item, column0, same, now,
                   number, [](int) {});
    }
  }
};

}  // namespace vitdiv::cuda
