// Backward of re-attention over a workspace: plans it, launches its kernels for a chunk of images at a time, or
// of the rows of one image, and adds up what their blocks have summed; the maths is in
// vitdiv_kernels/ops/maps/reattention/README.md.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "../core/with_type.cuh"
#include "reattention_bwd.cuh"
#include "softmax_rows.cuh"

namespace vitdiv::cuda {
namespace {

constexpr const char* kOperation = "reattention_bwd";

// Adds up the images' sums, in float64 and in order, and takes them apart.
template <class A>
struct Parameters {
  Global<const A> sums;  // [images, 2 H H + 3 H]: of dM (A - 1/M), dL z, dM, dY x, dY
  int images, heads;
  double mean;  // what each map has been lessened by too much
  Global<A> dmix, dpre_mix, dbias, dnorm_weight, dnorm_bias;
};

// dmix = sum over images of dM (A - 1/M)^T, likewise dpre_mix = dL z^T, dbias = dM, dnorm_weight = dY x,
// dnorm_bias = dY.
template <class A>
KERNEL LAUNCH_BOUNDS(256, 1) parameter_sums(Parameters<A> a) {
  const int heads = a.heads, size = 2 * heads * heads + 3 * heads, at = block_x() * threads() + thread_x();
  if (at >= size) return;
  const auto sum = [&](int from) {
    double total = 0;
    for (int image = 0; image < a.images; ++image) total += a.sums.ld(int64_t(image) * size + from);
    return total;
  };
  if (at < heads * heads) {
    if (!a.dmix.p) return;
    double total = sum(at);
    if (a.mean != 0) total += a.mean * sum(2 * heads * heads + at / heads);
    a.dmix.st(at, static_cast<A>(total));
  } else if (at < 2 * heads * heads) {
    if (a.dpre_mix.p) a.dpre_mix.st(at - heads * heads, static_cast<A>(sum(at)));
  } else {
    const int which = (at - 2 * heads * heads) / heads;
    A* const to = which == 0 ? a.dbias.p : which == 1 ? a.dnorm_weight.p : a.dnorm_bias.p;
    if (to) Global<A>{to}.st((at - 2 * heads * heads) % heads, static_cast<A>(sum(at)));
  }
}

// 1/M; where maps are not rounded, to a multiple of what separates numbers below 1, so that 1 less it and it
// again are 1: the logits of a one-hot map have no gradient.
template <class T>
double mean_of(int64_t keys) {
  const double mean = 1 / static_cast<double>(keys);
  if (sizeof(T) == 2) return static_cast<float>(mean);
  const int bits = sizeof(T) == 8 ? 53 : 24;
  return std::ldexp(std::nearbyint(std::ldexp(mean, bits)), -bits);
}
// What maps less mean_of() lack beside those that are to be mixed.
template <class T>
double mean_beside(const ReattentionArgs& args) {
  return mean_of<T>(args.M) - (args.centred ? 1 / static_cast<double>(args.M) : 0);
}

[[noreturn]] void refuse(const std::string& what, int64_t limit) {
  throw std::invalid_argument("reattention: the backward of " + what +
                              " does not fit the shared memory of this GPU, " + std::to_string(limit) +
                              " bytes");
}

// Where each part of the scratch begins, in bytes.
struct Scratch {
  int64_t size = 0;
  int64_t take(int64_t bytes) {
    const int64_t at = size;
    size += (bytes + 127) / 128 * 128;
    return at;
  }
};

template <class T>
struct Plan {
  MapsKernel<T> maps{};
  HeadsKernel<T> heads{};
  ProductsKernel<T> products{};
  int chunk_images, chunk_rows;
  int maps_warps;
  int warps;             // of heads_tile
  int64_t shared_bytes;  // likewise
  int64_t maps_at, low_at, grads_at, rows_at, bounds_at, units_at, partial_at, images_at, sums_at[2];
  Scratch scratch;

  int tiles_of(int rows) const {  // of maps_tile
    const int tile = 16 * MapsKernel<T>::kRowTiles * maps_warps;
    return (rows + tile - 1) / tile;
  }
};

// How many images, or rows of one image, the workspace holds: chunks of about the same size.
template <class T>
void share_out(Plan<T>& plan, const ReattentionBackward& args, int64_t row_bytes) {
  const int64_t limit = workspace_bytes(kOperation);
  const auto even = [](int64_t all, int64_t most) {
    const int64_t chunks = (all + most - 1) / most;
    return (all + chunks - 1) / chunks;
  };
  const int64_t images = limit / std::max<int64_t>(row_bytes * args.N, 1);
  plan.chunk_images = static_cast<int>(even(std::max<int64_t>(args.B, 1), std::max<int64_t>(images, 1)));
  plan.chunk_rows = static_cast<int>(args.N);
  if (images == 0)
    plan.chunk_rows =
        std::min<int>(plan.chunk_rows,
                      padded_width(static_cast<int>(even(args.N, std::max<int64_t>(limit / row_bytes, 16)))));
}

// The shared memory of heads_tile with so many warps and keys at a time.
template <class T>
int64_t place_heads(HeadsKernel<T>& a, int warps, int chunk) {
  constexpr int acc = sizeof(Acc<T>), number = sizeof(T);
  const int groups = a.heads > 16 ? 2 : 1, places = 16 * groups;
  int bytes = 0;
  const auto take = [&](int count, int size) {
    const int at = bytes;
    bytes += (count * size + 15) / 16 * 16;
    return at;
  };
  a.chunk = chunk;
  a.stride = row_stride<T>(chunk);
  a.matrix_fragments = groups * (places / kDepth<T>)*(sizeof(T) == 8 ? 1 : std::is_same_v<T, bf16_t> ? 3 : 2);
  a.dense_at = take((a.has_dy && a.goes_on ? 2 : 1) * places * (places + 8), acc);
  a.fragments_at = take((a.mixed_logits ? 5 : 3) * a.matrix_fragments, 512);
  a.vectors_at = take(4 * places + 8, acc);
  const bool sums = a.wants_dmix || a.wants_dnorm || a.wants_dpre_mix;
  a.warp_sums = sums ? ((a.mixed_logits ? 2 : 1) * groups * groups * 256 + 3 * places) * acc : 0;
  a.sums_at = take(warps, a.warp_sums);
  a.tile = places * a.stride * number;
  a.warp_tiles = a.tile * (a.mixed_logits ? 2 + kLogitPlanes<T> : a.has_dy || a.goes_on ? 2 : 1);
  a.tiles_at = take(warps, a.warp_tiles);
  return bytes;
}

// Rows as a whole where eight of them fit a multiprocessor, or else in chunks, or else as fits; and as many
// warps as leave no memory unused.
template <class T>
void fit_heads(Plan<T>& plan, int64_t limit) {
  HeadsKernel<T>& a = plan.heads;
  const int all = a.space.row;
  int most = 0;
  const auto try_chunk = [&](int chunk, int least) {
    int best = 0;
    for (int warps = HeadsKernel<T>::kMostWarps; warps >= 1; --warps) {
      // 16 warps of 128 registers; the hardware keeps 1 KB for each block
      const int64_t bytes = place_heads(a, warps, chunk),
                    blocks = std::min<int64_t>(16 / warps, (limit + 1024) / (bytes + 1024));
      if (bytes > limit || warps * blocks <= most) continue;
      most = static_cast<int>(warps * blocks);
      best = warps;
    }
    if (most < least) return most = 0, false;
    plan.warps = best;
    plan.shared_bytes = place_heads(a, best, chunk);
    return true;
  };
  const auto part = [&](int chunks) { return padded_width((all + chunks - 1) / chunks); };
  if (all <= 8192 && try_chunk(all, 8)) return;
  for (int chunks = 2; chunks < 512 && part(chunks) >= 64; ++chunks)
    if (try_chunk(part(chunks), 12)) return;
  for (int chunk : {64, 32, 16})
    if (try_chunk(std::min(chunk, all), 1)) return;
  refuse(std::to_string(a.heads) + " heads", limit);
}

template <class T>
Plan<T> plan_of(const ReattentionBackward& args) {
  if (args.H > kMaxMixedHeads)
    throw std::invalid_argument("reattention: the CUDA kernels take at most " +
                                std::to_string(kMaxMixedHeads) + " heads, got " + std::to_string(args.H));
  const auto array = [](const void* p) { return Global<const Acc<T>>{static_cast<const Acc<T>*>(p)}; };
  const int heads = static_cast<int>(args.H), queries = static_cast<int>(args.N);
  Plan<T> plan;
  HeadsKernel<T>& a = plan.heads;
  a.heads = heads;
  a.goes_on = args.dq.data || args.dk.data || args.dpre_mix;
  a.wants_y = args.dv_out.data;
  a.wants_dmix = args.dfolded_mix || args.dfolded_bias;
  a.wants_dnorm = args.dnorm_weight || args.dnorm_bias;
  a.wants_dpre_mix = args.dpre_mix;
  a.has_dy = args.dout.data && (a.goes_on || a.wants_dmix || a.wants_dnorm);
  a.layer_norm = args.dout.data && args.norm_weight;
  a.mixed_logits = args.pre_mix;
  a.eps = static_cast<Acc<T>>(args.eps);
  a.mean = static_cast<Acc<T>>(mean_of<T>(args.M));
  a.beside = static_cast<Acc<T>>(mean_beside<T>(args));
  a.bias = array(args.folded_bias);
  a.pre_bias = array(args.pre_mix ? args.pre_bias : nullptr);
  a.norm_weight = array(args.norm_weight);
  a.norm_bias = array(args.norm_bias);

  const auto matrix = [&](HeadMatrices which, bool needed, const void* data, bool transposed,
                          double factor = 1, int64_t image = 0) {
    if (needed)
      a.matrices[which] = {array(data), image, transposed ? 1 : heads, transposed ? heads : 1,
                           Acc<T>(factor)};
  };
  matrix(kMixT, a.has_dy && a.goes_on, args.folded_mix, true);
  matrix(kMix, a.wants_y || a.layer_norm, args.folded_mix, false);
  matrix(kCoupling, args.coupling && a.goes_on, args.coupling, false, 1, args.coupling_stride_b);
  matrix(kPre, a.mixed_logits, args.pre_mix, false, kLog2e);
  matrix(kPreT, a.mixed_logits && a.goes_on, args.pre_mix, true);

  Workspace<T> space{};
  space.heads = heads;
  space.keys = static_cast<int>(args.M);
  space.row = padded_width(space.keys);
  const bool needs_low = args.pre_mix && kLogitPlanes<T> == 2, needs_grads = a.has_dy || a.goes_on;
  const int64_t row_bytes = int64_t(1 + needs_low + needs_grads) * heads * space.row * sizeof(T);
  share_out(plan, args, row_bytes);
  a.space = space;

  // Query rows share a tile of heads where nothing but sums joins the heads of one.
  a.places = heads > 16 ? 32 : 16;
  if (sizeof(T) == 2 && !a.layer_norm && !a.mixed_logits)
    while (a.places / 2 >= heads) a.places /= 2;
  while (1 << a.places_bits < a.places) ++a.places_bits;
  const int64_t limit = shared_memory_limit(kOperation);
  fit_heads(plan, limit);
  plan.maps.mixed_logits = a.mixed_logits;
  plan.maps.stride = row_stride<T>(static_cast<int>(std::max(args.d, a.has_dy ? args.dv : args.d)));
  for (plan.maps_warps = MapsKernel<T>::kWarps; plan.maps.shared_bytes(plan.maps_warps) > limit;
       plan.maps_warps /= 2)
    if (plan.maps_warps == 1) refuse("heads of width " + std::to_string(std::max(args.d, args.dv)), limit);
  a.rows = 2 * plan.warps * ((heads > 16 ? 32 : 16) / a.places);  // two tasks for each warp

  const auto blocks_of = [&](int rows) { return (rows + a.rows - 1) / a.rows; };
  const int whole_chunks = (queries - 1) / plan.chunk_rows;
  a.parts = whole_chunks * blocks_of(plan.chunk_rows) + blocks_of(queries - whole_chunks * plan.chunk_rows);

  constexpr int acc = sizeof(Acc<T>);
  Scratch& scratch = plan.scratch;
  const int64_t parameters = 2 * args.H * args.H + 3 * args.H,
                plane = row_bytes / (1 + needs_low + needs_grads) * plan.chunk_rows * plan.chunk_images;
  const bool summed = a.wants_dmix || a.wants_dnorm || a.wants_dpre_mix;
  plan.maps_at = scratch.take(plane);
  plan.low_at = scratch.take(needs_low ? plane : 0);
  plan.grads_at = scratch.take(needs_grads ? plane : 0);
  plan.rows_at = scratch.take(args.pre_mix ? 0 : 2 * args.B * args.H * args.N * acc);
  plan.bounds_at = scratch.take(int64_t(plan.chunk_images) * heads * plan.tiles_of(plan.chunk_rows) *
                                plan.maps_warps * acc);
  plan.units_at = scratch.take(int64_t(plan.chunk_images) * acc);
  plan.partial_at = scratch.take(summed ? args.B * a.parts * parameters * acc : 0);
  plan.images_at = scratch.take(summed ? args.B * parameters * acc : 0);
  const bool grows = plan.chunk_rows < queries;
  plan.sums_at[0] = scratch.take(grows && args.dk.data ? args.H * args.M * args.d * acc : 0);
  plan.sums_at[1] = scratch.take(grows && args.dv_out.data ? args.H * args.M * args.dv * acc : 0);
  return plan;
}

template <class T>
OutProduct<T> product_of(const HeadsView& out, const HeadsView& right, int64_t width, int heads,
                         Acc<T> factor) {
  OutProduct<T> p{};
  p.right = heads_view<T>(right, width);
  p.heads = heads;
  p.width = static_cast<int>(width);
  p.factor = factor;
  p.out = {static_cast<T*>(out.data)};
  p.out_image = out.stride_b;
  p.out_head = out.stride_h;
  p.out_row = out.stride_n;
  p.pieces = heads_view<T>(out, width).pieces;
  p.slices = (p.width + ProductsKernel<T>::kWidth - 1) / ProductsKernel<T>::kWidth;
  return p;
}

// What is launched for one chunk.
template <class T>
void run_chunk(const Plan<T>& plan, Workspace<T> space, void* stream) {
  MapsKernel<T> maps = plan.maps;
  HeadsKernel<T> heads = plan.heads;
  ProductsKernel<T> products = plan.products;
  maps.space = heads.space = products.space = space;
  maps.tiles = plan.tiles_of(space.rows);
  int64_t blocks = 0;
  for (MapProduct<T>& p : maps.products) blocks += p.blocks = space.images * p.heads * maps.tiles;
  launch_maps(maps, plan.maps_warps, blocks, stream);

  heads.blocks = (space.rows + heads.rows - 1) / heads.rows;
  heads.first_part = space.first_row / plan.chunk_rows * ((plan.chunk_rows + heads.rows - 1) / heads.rows);
  heads.bounds_count = space.heads * maps.tiles * plan.maps_warps;
  launch_heads(heads, plan.warps, plan.shared_bytes, stream);

  products.first = space.first_row == 0;
  products.last = space.first_row + space.rows == maps.queries;
  blocks = 0;
  for (OutProduct<T>& p : products.products) {
    const int rows = p.transposed ? space.keys : space.rows;
    p.tiles = (rows + ProductsKernel<T>::kRows - 1) / ProductsKernel<T>::kRows;
    blocks += p.blocks = space.images * p.heads * p.tiles * p.slices;
  }
  if (blocks > 0) launch_products(products, blocks, stream);
}

template <class T>
void backward(const ReattentionBackward& args, void* scratch, void* stream) {
  using A = Acc<T>;
  Plan<T> plan = plan_of<T>(args);
  const auto at = [&](int64_t offset) { return reinterpret_cast<A*>(static_cast<char*>(scratch) + offset); };
  const auto plane = [&](int64_t offset) {
    return Global<T>{reinterpret_cast<T*>(static_cast<char*>(scratch) + offset)};
  };
  MapsKernel<T>& maps = plan.maps;
  HeadsKernel<T>& heads = plan.heads;
  ProductsKernel<T>& products = plan.products;
  Workspace<T> space = heads.space;
  space.maps = plane(plan.maps_at);
  space.low = plane(plan.low_at);
  space.grads = plane(plan.grads_at);

  MapProduct<T>& logits = maps.products[0];
  logits.left = heads_view<T>(args.q, args.d);
  logits.right = heads_view<T>(args.k, args.d);
  logits.heads = heads.heads;
  logits.width = static_cast<int>(args.d);
  logits.scale = static_cast<A>(args.scale * (args.pre_mix ? kLogitUnit<T> : kLog2e));
  logits.field = args.B * args.H * args.N;
  if (!args.pre_mix) logits.rows = {at(plan.rows_at)};
  if (heads.has_dy) {
    MapProduct<T>& gradients = maps.products[1];
    gradients.left = heads_view<T>(args.dout, args.dv);
    gradients.right = heads_view<T>(args.v, args.dv);
    gradients.heads = heads.heads;
    gradients.width = static_cast<int>(args.dv);
    gradients.scale = 1;
    gradients.grads = true;
  }
  maps.queries = static_cast<int>(args.N);
  maps.mean = heads.mean * A(kMapUnit<T>);
  maps.bounds = {at(plan.bounds_at)};
  heads.bounds = {at(plan.bounds_at)};
  heads.units = {at(plan.units_at)};
  heads.partial = {at(plan.partial_at)};
  products.units = {at(plan.units_at)};
  const auto factor = static_cast<A>(args.scale);
  const bool grows = plan.chunk_rows < args.N;
  if (args.dq.data) {
    products.products[0] = product_of<T>(args.dq, args.k, args.d, heads.heads, factor);
    products.products[0].grads = true;
  }
  if (args.dk.data) {
    products.products[1] = product_of<T>(args.dk, args.q, args.d, heads.heads, factor);
    products.products[1].grads = products.products[1].transposed = true;
    if (grows) products.products[1].sums = {at(plan.sums_at[0])};
  }
  if (args.dv_out.data) {
    products.products[2] = product_of<T>(args.dv_out, args.dout, args.dv, heads.heads, 1);
    products.products[2].transposed = true;
    if (grows) products.products[2].sums = {at(plan.sums_at[1])};
  }

  const bool summed = heads.wants_dmix || heads.wants_dnorm || heads.wants_dpre_mix;
  if (args.B > 0 && (heads.goes_on || heads.wants_y || summed)) {
    if (!args.pre_mix) launch_softmax_rows<T>(kOperation, args, at(plan.rows_at), stream);
    for (int image = 0; image < args.B; image += plan.chunk_images)
      for (int row = 0; row < args.N; row += plan.chunk_rows) {
        space.first_image = image;
        space.images = static_cast<int>(std::min<int64_t>(plan.chunk_images, args.B - image));
        space.first_row = row;
        space.rows = static_cast<int>(std::min<int64_t>(plan.chunk_rows, args.N - row));
        run_chunk(plan, space, stream);
      }
  }
  if (!summed) return;
  const int size = static_cast<int>(2 * args.H * args.H + 3 * args.H);
  if (args.B > 0)
    launch_sum_parts(kOperation, at(plan.partial_at), at(plan.images_at), args.B, heads.parts, size, stream);
  Parameters<A> sums{};
  sums.sums = {at(plan.images_at)};
  sums.images = static_cast<int>(args.B);
  sums.heads = heads.heads;
  sums.mean = mean_beside<T>(args);
  sums.dmix = {static_cast<A*>(args.dfolded_mix)};
  sums.dpre_mix = {static_cast<A*>(args.dpre_mix)};
  sums.dbias = {static_cast<A*>(args.dfolded_bias)};
  sums.dnorm_weight = {static_cast<A*>(args.dnorm_weight)};
  sums.dnorm_bias = {static_cast<A*>(args.dnorm_bias)};
  launch(kOperation, parameter_sums<A>, (size + 255) / 256, 256, 0, stream, sums);
}

}  // namespace

int64_t reattention_bwd_scratch(const ReattentionBackward& args) {
  if (args.H == 0) return 0;
  return with_type(args.q.dtype, [&](auto number) { return plan_of<decltype(number)>(args).scratch.size; });
}

void reattention_bwd(const ReattentionBackward& args, void* scratch, void* stream) {
  if (args.H > 0)
    with_type(args.q.dtype, [&](auto number) { backward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
