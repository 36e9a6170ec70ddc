// The second kernel of re-attention's backward: what lies between the products, in place. A warp takes whole
// query rows of all heads, as many as share a tile, and needs no other warp:
//
//   mixed logits   their mix, the softmax's statistics, and A - mean
//   sums           dM (through the layer norm, if there is one), dmix, and sum_j A dA of each row and head
//   gradients      dA = mix^T dM + coupling (A - mean),  dL = A (dA - sum_j A dA),  Y;  dZ = pre_mix^T dL
//
// Rows that do not fit shared memory are walked in chunks of keys, which are loaded and made again.
#include "reattention_bwd_heads.cuh"

namespace vitdiv::cuda {
namespace {

template <class T, int GROUPS, bool EXTRA>
struct HeadsTask : HeadRows<T, GROUPS, EXTRA> {
  using B = HeadRows<T, GROUPS, EXTRA>;
  using A = Acc<T>;
  using B::a;
  using typename B::Tile;
  static constexpr bool kHeld = GROUPS == 1 && sizeof(T) == 2 && !EXTRA;

  // kMixT and kMix, in registers
  FragmentA<T> held[2][2];
  A beside[GROUPS][2];
  A row_max[GROUPS][2], row_scale[GROUPS][2];  // of mixed logits
  int row0;

  DEVICE HeadsTask(const HeadsKernel<T>& arguments) : B(arguments), row0(0) {
    if constexpr (kHeld)
      UNROLLED_FOR (int which = 0; which < 2; ++which)
        UNROLLED_FOR (int part = 0; part < matrix_parts<T>(which); ++part)
          if (this->has(which)) held[which][part] = this->fragment(which, 0, 0, part);
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) beside[group][half] = this->vector(kBeside, group, half);
  }

  DEVICE void add_product(Tile& tile, int which, int step, const FragmentB<T> (&b)[2]) const {
    if (kHeld && which < 2) {
      // the high part first: where there is one key it leaves of -dA nothing but the low one
      UNROLLED_FOR (int part = 0; part < 2; ++part) multiply_add<T>(tile[0], held[which][part], b);
    } else {
      B::add_product(tile, which, step, b, matrix_parts<T>(which));
    }
  }

  // --- mixed logits

  // To the base of 2; -inf for keys that are not there.
  DEVICE void mixed_logits(Tile& z, int x, int first) const {
    this->clear(z);
    ROLLED_FOR (int step = 0; step < kSteps<T, GROUPS>; ++step) {
      if (!this->has_step(step)) continue;
      UNROLLED_FOR (int plane = B::kPlanes - 1; plane >= 0; --plane) {
        FragmentB<T> b[2];
        this->load_right(b, this->logits(plane), step, x);
        // the product of two low parts is below what is rounded
        B::add_product(z, kPre, step, b, plane == 0 ? matrix_parts<T>(kPre) : 1);
      }
    }
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const A added = this->vector(kPreBias, group, half);
        UNROLLED_FOR (int j = 0; j < 2; ++j)
          UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e)
            z[group][j][e] = first + x + 8 * j + tile_col(e) < a.space.keys
                                 ? z[group][j][e] * this->pre_unit + added
                                 : -INFINITY;
      }
  }
  DEVICE void make_maps(int first, int columns) const {
    ROLLED_FOR (int x = 0; x < columns; x += 16) {
      Tile z;
      mixed_logits(z, x, first);
      this->for_each_element([&](int group, int j, int e) {
        const A p =
            fast_exp2(z[group][j][e] - row_max[group][e >> 1]) * row_scale[group][e >> 1] - a.mean * B::kUnit;
        z[group][j][e] = first + x + 8 * j + tile_col(e) < a.space.keys ? p : A(0);
      });
      this->store_tile(z, this->maps(), x);
    }
    sync_warp();
  }
  DEVICE void find_statistics() {
    RowStatistics<T, GROUPS> rows;
    for (int first = 0; first < a.space.row; first += a.chunk) {
      const int columns = columns_from(first);
      fetch_logits(first, columns);
      arrive();
      ROLLED_FOR (int x = 0; x < columns; x += 16) {
        Tile z;
        mixed_logits(z, x, first);
        rows.add(z);
      }
    }
    rows.finish();
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        row_max[group][half] = rows.row_max[group][half];
        row_scale[group][half] = B::kUnit / rows.sum[group][half];
      }
  }

  // --- the layer norm

  // The mixed maps before the norm's weight; they and their rstd are 0 for keys that are not there, where
  // the rstd would be Inf without eps.
  DEVICE void normalise(Tile& y, A (&rstd)[2][2], int x, int first) const {
    this->for_each_element([&](int group, int j, int e) {
      y[group][j][e] = y[group][j][e] * this->mix_unit + beside[group][e >> 1];
    });
    normalise_heads(y, rstd, a.heads, a.eps);
    UNROLLED_FOR (int j = 0; j < 2; ++j)
      UNROLLED_FOR (int e = 0; e < 2; ++e)
        if (first + x + 8 * j + tile_col(e) >= a.space.keys) {
          rstd[j][e] = 0;
          UNROLLED_FOR (int group = 0; group < GROUPS; ++group) y[group][j][e] = y[group][j][e + 2] = 0;
        }
  }
  // dY becomes dM. With `sums` also those of dnorm.
  DEVICE void through_norm(int first, int columns, bool sums) const {
    A weight_sums[GROUPS][2] = {}, bias_sums[GROUPS][2] = {};
    const A part = A(1) / a.heads;
    ROLLED_FOR (int x = 0; x < columns; x += 16) {
      Tile normal, dy;
      A rstd[2][2], mean[2][2], projection[2][2];
      this->clear(normal);
      this->mix(normal, kMix, this->maps(), x);
      normalise(normal, rstd, x, first);
      this->load_tile(dy, this->grads(), x);
      UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
        UNROLLED_FOR (int half = 0; half < 2; ++half) {
          const A weight = this->vector(kNormWeight, group, half);
          UNROLLED_FOR (int j = 0; j < 2; ++j)
            UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e) {
              bias_sums[group][half] += dy[group][j][e];
              weight_sums[group][half] += dy[group][j][e] * normal[group][j][e];
              dy[group][j][e] *= weight;
            }
        }
      sum_heads(mean, dy);
      Tile product;
      this->for_each_element(
          [&](int group, int j, int e) { product[group][j][e] = dy[group][j][e] * normal[group][j][e]; });
      sum_heads(projection, product);
      this->for_each_element([&](int group, int j, int e) {
        const A along = mean[j][e & 1] + projection[j][e & 1] * normal[group][j][e];
        dy[group][j][e] = rstd[j][e & 1] * (dy[group][j][e] - part * along);
      });
      sync_warp();  // dY is read
      this->store_tile(dy, this->grads(), x);
    }
    sync_warp();
    if (!sums) return;
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const A of_weight = quad_sum(weight_sums[group][half]), of_bias = quad_sum(bias_sums[group][half]);
        if ((lane_id() & 3) != 0) continue;
        this->add_vector_sum(1, this->place(group, 2 * half), of_weight);
        this->add_vector_sum(2, this->place(group, 2 * half), of_bias);
      }
  }

  // --- chunks

  DEVICE int columns_from(int first) const {
    return a.space.row - first < a.chunk ? a.space.row - first : a.chunk;
  }
  DEVICE void fetch_logits(int first, int columns) const {
    sync_warp();  // what was there is read
    this->fetch(this->logits(0), a.space.maps, row0, first, columns);
    if constexpr (B::kPlanes == 2) this->fetch(this->logits(1), a.space.low, row0, first, columns);
  }
  DEVICE static void arrive() {
    copy_commit();
    copy_wait<0>();
    sync_warp();
  }
  // A - mean, and dM, of a chunk; the logits may be there.
  DEVICE void make(int first, int columns, bool with_logits, bool sums) const {
    if (EXTRA && a.mixed_logits) {
      if (with_logits) fetch_logits(first, columns);
    } else {
      sync_warp();
      this->fetch(this->maps(), a.space.maps, row0, first, columns);
    }
    if (a.has_dy) {
      sync_warp();
      this->fetch(this->grads(), a.space.grads, row0, first, columns);
    }
    arrive();
    if constexpr (EXTRA) {
      if (a.mixed_logits) make_maps(first, columns);
      if (a.layer_norm && a.has_dy) through_norm(first, columns, sums);
    }
  }

  // Adds dA to da, and the mix of maps to y, if it is wanted.
  DEVICE void mix_maps(Tile& da, Tile& y, bool wants_y, int x) const {
    ROLLED_FOR (int step = 0; step < kSteps<T, GROUPS>; ++step) {
      if (!this->has_step(step)) continue;
      FragmentB<T> b[2];
      if (this->has(kMixT)) {
        this->load_right(b, this->grads(), step, x);
        add_product(da, kMixT, step, b);
      }
      this->load_right(b, this->maps(), step, x);
      if (this->has(kCoupling)) {
        if constexpr (kBounded<T>) {  // has units of its own
          Tile coupled;
          this->clear(coupled);
          add_product(coupled, kCoupling, step, b);
          const A unit = this->coupling_unit / this->mix_t_unit;
          this->for_each_element(
              [&](int group, int j, int e) { da[group][j][e] += coupled[group][j][e] * unit; });
        } else {
          add_product(da, kCoupling, step, b);
        }
      }
      if (wants_y) add_product(y, kMix, step, b);
    }
    if constexpr (kBounded<T>)
      this->for_each_element([&](int group, int j, int e) { da[group][j][e] *= this->mix_t_unit; });
  }
  // sum_j A dA in 32 and 64 bits, from what dL will be made of: where a map is 1 it is exactly dA.
  DEVICE void add_dots(typename B::Sums& sums, int columns) const {
    A dots[GROUPS][2] = {};
    ROLLED_FOR (int x = 0; x < columns; x += 16) {
      Tile da, y, p;
      this->clear(da);
      mix_maps(da, y, false, x);
      this->load_tile(p, this->maps(), x);
      this->for_each_element([&](int group, int j, int e) {
        dots[group][e >> 1] += (p[group][j][e] + a.mean) * da[group][j][e];
      });
    }
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half) sums.dots[group][half] += quad_sum(dots[group][half]);
  }

  // dL takes the place of dM, and Y that of the maps. dots: sum_j A dA; spoil: NaN for rows of Y that are to
  // be, or 0.
  DEVICE void make_gradients(int first, int columns, const A (&dots)[GROUPS][2], const A (&spoil)[2]) const {
    // What is added after the products stands in their sums from the beginning, where these have no units.
    constexpr bool ahead = !kBounded<T> && !EXTRA;
    const A size = this->size, size_of_maps = size / B::kUnit, size_of_mean = size * a.mean;
    ROLLED_FOR (int x = 0; x < columns; x += 16) {
      Tile da, y;
      this->for_each_element([&](int group, int j, int e) {
        da[group][j][e] = ahead ? -dots[group][e >> 1] : A(0);
        y[group][j][e] = ahead ? beside[group][e >> 1] + spoil[e >> 1] : A(0);
      });
      mix_maps(da, y, a.wants_y, x);
      if (a.goes_on) {
        Tile p;
        this->load_tile(p, this->maps(), x);
        this->for_each_element([&](int group, int j, int e) {
          const A d = ahead ? da[group][j][e] : da[group][j][e] - dots[group][e >> 1];
          da[group][j][e] = (p[group][j][e] * size_of_maps + size_of_mean) * d;
        });
      }
      if (a.wants_y) {
        bool plain = true;
        if constexpr (EXTRA)
          if (a.layer_norm) {
            A rstd[2][2];
            normalise(y, rstd, x, first);
            UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
              UNROLLED_FOR (int half = 0; half < 2; ++half) {
                const A weight = this->vector(kNormWeight, group, half),
                        norm_bias = this->vector(kNormBias, group, half);
                UNROLLED_FOR (int j = 0; j < 2; ++j)
                  UNROLLED_FOR (int e = 2 * half; e < 2 * half + 2; ++e)
                    y[group][j][e] = y[group][j][e] * weight + norm_bias;
              }
            plain = false;
          }
        if (plain && !ahead)
          this->for_each_element([&](int group, int j, int e) {
            y[group][j][e] = y[group][j][e] * this->mix_unit + (beside[group][e >> 1] + spoil[e >> 1]);
          });
      }
      sync_warp();  // these columns are read
      if (a.goes_on) this->store_tile(da, this->grads(), x);
      if (a.wants_y) this->store_tile(y, this->maps(), x);
    }
    sync_warp();
  }
  // dL becomes dZ.
  DEVICE void mix_back(int columns) const {
    if (a.wants_dpre_mix)
      ROLLED_FOR (int pair = 0; pair < GROUPS * GROUPS; ++pair) {
        const int first = pair / GROUPS, second = pair % GROUPS;
        if (GROUPS > 1 && (16 * first >= a.heads || 16 * second >= a.heads)) continue;
        A acc[2][4] = {};
        ROLLED_FOR (int x = 0; x < columns; x += kDepth<T>) {
          FragmentA<T> left;
          this->load_left(left, this->grads(), first, x);
          UNROLLED_FOR (int plane = B::kPlanes - 1; plane >= 0; --plane) {
            FragmentB<T> b[2];
            this->load_rows(b, this->logits(plane), second, x);
            multiply_add<T>(acc, left, b);
          }
        }
        this->add_sums(B::kMatrixSums + pair * 256, acc);
      }
    ROLLED_FOR (int x = 0; x < columns; x += 16) {
      Tile dz;
      this->clear(dz);
      this->mix(dz, kPreT, this->grads(), x);
      this->for_each_element([&](int group, int j, int e) { dz[group][j][e] *= this->pre_t_unit; });
      sync_warp();
      this->store_tile(dz, this->grads(), x);
    }
    sync_warp();
  }

  DEVICE void run(int first_row) {
    row0 = first_row;
    const bool whole = a.chunk >= a.space.row;
    const bool shares = GROUPS == 1 && !EXTRA && a.places < 16;
    if constexpr (EXTRA)
      if (a.mixed_logits) find_statistics();
    typename B::Sums sums;
    uint32_t spoilt[2] = {};
    const bool wants_sums = a.goes_on || this->wants_sums() || shares;
    if (wants_sums)
      for (int first = 0; first < a.space.row; first += a.chunk) {
        const int columns = columns_from(first);
        make(first, columns, !whole, a.wants_dnorm);
        this->add_rows(sums, columns, spoilt);
        if constexpr (sizeof(T) > 2)
          if (a.goes_on) add_dots(sums, columns);
      }
    if (!a.goes_on && !a.wants_y) return;

    A spoil[2] = {};
    UNROLLED_FOR (int group = 0; group < GROUPS; ++group)
      UNROLLED_FOR (int half = 0; half < 2; ++half)
        sums.dots[group][half] /= sums.maps[group][half] * (1 / B::kUnit) + a.mean * a.space.keys;
    if (shares && (spoilt[0] | spoilt[1]) != 0)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const bool of_maps = this->has_any(spoilt[0], tile_row(2 * half));
        if (of_maps) spoil[half] = NAN;
        if (this->has_any(spoilt[1], tile_row(2 * half)) || (this->has(kCoupling) && of_maps))
          sums.dots[0][half] = NAN;
      }
    for (int first = 0; first < a.space.row; first += a.chunk) {
      const int columns = columns_from(first);
      if (!whole || !wants_sums) make(first, columns, !whole, false);
      if (shares && (spoilt[0] | spoilt[1]) != 0) {  // zeros of the matrices times these would be NaN
        sync_warp();
        this->clear_places(this->maps(), spoilt[0], columns);
        if (a.has_dy) this->clear_places(this->grads(), spoilt[1], columns);
      }
      make_gradients(first, columns, sums.dots, spoil);
      if constexpr (EXTRA)
        if (a.mixed_logits && a.goes_on) mix_back(columns);
      if (a.goes_on) this->store(this->grads(), a.space.grads, row0, first, columns);
      if (a.wants_y) this->store(this->maps(), a.space.maps, row0, first, columns);
    }
  }

  // The block's sums: the warps' in order, and the query rows' that share a tile.
  DEVICE void store_sums() const {
    sync_block();
    const int heads = a.heads, warps = threads() >> 5, size = 2 * heads * heads + 3 * heads;
    const int64_t to =
        (int64_t(a.space.first_image + this->image) * a.parts + a.first_part + this->block) * size;
    for (int c = thread_x(); c < size; c += threads()) {
      A sum = 0, unit = 1;
      for (int w = 0; w < warps; ++w) {
        const Shared<A> sums = B::template piece<A>(a.sums_at + w * a.warp_sums, this->all_sums());
        for (int r = 0; r < this->share(); ++r) {
          const int place = r * a.places;
          if (c < heads * heads) {
            unit = 1 / B::kUnit;
            sum += sums.ld(B::place_of_sum(place + c % heads, place + c / heads));
          } else if (c < 2 * heads * heads) {
            if (!a.mixed_logits) continue;
            const int at = c - heads * heads;
            unit = 1 / (this->size * kLogitUnit<T>);
            sum += sums.ld(B::kMatrixSums + B::place_of_sum(place + at / heads, place + at % heads));
          } else {
            const int at = c - 2 * heads * heads;
            sum += sums.ld(this->vector_sums() + at / heads * B::kPlaces + place + at % heads);
          }
        }
      }
      a.partial.st(to + c, sum * unit);
    }
  }
};

template <class T, int GROUPS, bool EXTRA>
KERNEL LAUNCH_BOUNDS(32 * HeadsKernel<T>::kMostWarps, (sizeof(T) == 2 && GROUPS == 1 && !EXTRA ? 2 : 1))
    heads_tile(HeadsKernel<T> a) {
  HeadsTask<T, GROUPS, EXTRA> task(a);
  const int step = task.share() * (threads() >> 5), first = task.block * a.rows;
  ROLLED_FOR (int i = task.share() * task.warp; i < a.rows && first + i < a.space.rows; i += step)
    task.run(first + i);
  if (task.wants_sums()) task.store_sums();
}

}  // namespace

template <class T>
void launch_heads(const HeadsKernel<T>& a, int warps, int64_t shared_bytes, void* stream) {
  auto* kernel = a.heads > 16 ? heads_tile<T, 2, true> : heads_tile<T, 1, true>;
  if constexpr (sizeof(T) == 2)
    if (a.heads <= 16 && !a.layer_norm && !a.mixed_logits) kernel = heads_tile<T, 1, false>;
  launch("reattention_bwd", kernel, int64_t(a.space.images) * a.blocks, 32 * warps, shared_bytes, stream, a);
}
template void launch_heads(const HeadsKernel<half_t>&, int, int64_t, void*);
template void launch_heads(const HeadsKernel<bf16_t>&, int, int64_t, void*);
template void launch_heads(const HeadsKernel<float>&, int, int64_t, void*);
template void launch_heads(const HeadsKernel<double>&, int, int64_t, void*);

}  // namespace vitdiv::cuda
