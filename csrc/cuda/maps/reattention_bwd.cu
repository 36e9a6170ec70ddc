// Backward of re-attention: plans the two sweeps, launches them and adds up what their blocks have summed;
// the maths is in vitdiv_kernels/ops/maps/reattention/README.md.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "../core/with_type.cuh"
#include "reattention_bwd.cuh"
#include "softmax_rows.cuh"

namespace vitdiv::cuda {

template <class T>
void launch_query_sweep(const BackwardKernel<T>& a, int64_t shared_bytes, void* stream);
template <class T>
void launch_key_sweep(const BackwardKernel<T>& a, int64_t shared_bytes, void* stream);

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

template <class T>
struct Plan {
  BackwardKernel<T> rows{}, keys{};
  bool sweeps_rows, sweeps_keys;
  int64_t row_bytes = 0, key_bytes = 0;  // of shared memory
  // Pieces of scratch, in bytes from its beginning.
  int64_t bounds = 0, partial = 0, images = 0, sums = 0, size = 0;
};

template <class T>
BackwardMemory<T> memory_of(const BackwardKernel<T>& a, bool by_key) {
  using A = Acc<T>;
  const int heads = a.heads, padded = padded_width(heads);
  const bool pre_mixed = a.pre_mix.p != nullptr;
  BackwardMemory<T> m{};
  m.at = {heads, kOwnRows, a.chunk};
  m.at_t = {heads, kOwnRows, a.chunk};
  m.raw_at = {heads, kOwnRows, a.chunk};
  const auto take = [&](Piece& piece, bool needed, int count, int size) {
    piece = {m.bytes, needed ? count : 0};
    m.bytes += (piece.count * size + 15) / 16 * 16;
  };
  constexpr int number = sizeof(T), acc = sizeof(A);
  take(m.maps, true, m.at.size, number);
  take(m.grads, a.dout || (kWideNumbers<T> && a.wants_dpre_mix), m.at.size, number);
  take(m.raw, pre_mixed && !kWideNumbers<T>, m.raw_at.size, acc);
  if (pre_mixed && kWideNumbers<T>) m.raw = m.maps;
  const int matrix = kFarMatrices<T> ? 0 : HeadMatrix<T>::size(heads);
  take(m.mix, a.dout && (a.layer_norm || (by_key && a.out[1].p)), matrix, number);
  take(m.mix_t, a.dout && a.goes_on, matrix, number);
  take(m.coupling, a.coupling.p && a.goes_on, matrix, number);
  take(m.pre, pre_mixed, kFarMatrices<T> ? 0 : HeadMatrix<A>::size(heads), acc);
  take(m.pre_t, pre_mixed && a.goes_on, matrix, number);
  for (Piece& units : m.units) take(units, !kFarMatrices<T>, padded, acc);
  take(m.vectors, true, 4 * padded, acc);
  m.number_row = by_key ? a.chunk : kOwnRows;
  for (Piece* numbers : {&m.row_maxes, &m.row_scales, &m.row_dots})
    take(*numbers, true, heads * m.number_row, acc);
  take(m.map_sums, !by_key, heads * kOwnRows, acc);
  m.slot = Scores<T, 1>::size(a.stride);
  // at other times in the same place
  take(m.slots, true, std::max(a.workers * m.slot, HeadProducts<T, 1>::space(a.warps) * (acc / number)),
       number);
  m.sum_row = a.stride - Numbers<T>::kPad + 8;  // pairs of numbers of eight rows in different banks
  take(m.sums, a.sums_shared && a.chunk < a.other_rows, (by_key ? 2 : 1) * heads * kOwnRows * m.sum_row, acc);
  take(m.maxima, true, a.warps, acc);
  return m;
}

// How many keys or queries a chunk has and how many heads are made at a time. Whole rows need no sums beside
// the registers, and by query are made once; that is worth having fewer warps make them, but not fewer than
// four.
template <class T>
int64_t fit(BackwardKernel<T>& a, bool by_key, int64_t limit) {
  const int all = padded_width(a.other_rows);
  const int warps = a.heads > 16 ? kBackwardWarps<T, 2> : kBackwardWarps<T, 1>;
  const int least = (a.heads + warps - 1) / warps;
  const auto fits = [&](int chunk, int rounds, bool sums_shared) {
    a.workers = (a.heads + rounds - 1) / rounds;
    a.warps = std::max(a.workers, 8);
    a.chunk = chunk;
    a.sums_shared = sums_shared;
    a.memory = memory_of(a, by_key);
    return a.memory.bytes <= limit;
  };
  for (int rounds = least; all <= 4096 && (rounds == least || a.heads >= 4 * rounds); ++rounds)
    if (fits(all, rounds, true)) return a.memory.bytes;
  for (bool sums_shared : {true, false})
    for (int rounds = least; rounds <= a.heads; ++rounds)
      for (int chunk : {64, 32, 16})
        if (chunk <= all && fits(chunk, rounds, sums_shared)) return a.memory.bytes;
  throw std::invalid_argument("reattention: the backward of " + std::to_string(a.heads) + " heads of width " +
                              std::to_string(std::max(a.width[0], a.width[1])) +
                              " does not fit the shared memory of this GPU, " + std::to_string(limit) +
                              " bytes");
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

template <class T>
BackwardKernel<T> common(const ReattentionBackward& args) {
  const auto array = [](const void* p) { return Global<const Acc<T>>{static_cast<const Acc<T>*>(p)}; };
  BackwardKernel<T> a{};
  a.width[0] = static_cast<int>(args.d);
  a.width[1] = static_cast<int>(args.dv);
  a.heads = static_cast<int>(args.H);
  a.images = static_cast<int>(args.B);
  a.stride = row_stride<T>(std::max(a.width[0], a.width[1]));
  a.dout = args.dout.data != nullptr;
  a.layer_norm = a.dout && args.norm_weight;
  a.scale = static_cast<Acc<T>>(args.scale * (args.pre_mix ? 1 : kLog2e));
  a.out_scale = static_cast<Acc<T>>(args.scale);
  a.mean = static_cast<Acc<T>>(mean_of<T>(args.M));
  a.beside = static_cast<Acc<T>>(mean_beside<T>(args));
  a.eps = static_cast<Acc<T>>(args.eps);
  a.pre_mix = array(args.pre_mix);
  a.pre_bias = array(args.pre_mix ? args.pre_bias : nullptr);
  a.mix = array(args.folded_mix);
  a.bias = array(args.folded_bias);
  a.coupling = array(args.coupling);
  a.coupling_image = args.coupling_stride_b;
  a.norm_weight = array(args.norm_weight);
  a.norm_bias = array(args.norm_bias);
  a.field = args.B * args.H * args.N;
  a.query_tiles = static_cast<int>((args.N + kOwnRows - 1) / kOwnRows);
  return a;
}

template <class T>
void set_out(BackwardKernel<T>& a, int which, const HeadsView& out) {
  a.out[which] = {static_cast<T*>(out.data)};
  a.out_image[which] = out.stride_b;
  a.out_head[which] = out.stride_h;
  a.out_row[which] = out.stride_n;
}

template <class T>
Plan<T> plan_of(const ReattentionBackward& args) {
  if (args.H > kMaxMixedHeads)
    throw std::invalid_argument("reattention: the CUDA kernels take at most " +
                                std::to_string(kMaxMixedHeads) + " heads, got " + std::to_string(args.H));
  const int64_t limit = shared_memory_limit(kOperation);
  Plan<T> plan;
  BackwardKernel<T>&rows = plan.rows, &keys = plan.keys;
  rows = keys = common<T>(args);

  rows.own[0] = heads_view<T>(args.q, args.d);
  rows.other[0] = heads_view<T>(args.k, args.d);
  if (rows.dout) {
    rows.own[1] = heads_view<T>(args.dout, args.dv);
    rows.other[1] = heads_view<T>(args.v, args.dv);
  }
  for (int i = 0; i < 2; ++i) keys.own[i] = rows.other[i], keys.other[i] = rows.own[i];
  rows.own_rows = keys.other_rows = static_cast<int>(args.N);
  rows.other_rows = keys.own_rows = static_cast<int>(args.M);
  for (BackwardKernel<T>* a : {&rows, &keys}) a->tiles = (a->own_rows + kOwnRows - 1) / kOwnRows;
  rows.wants_dmix = args.dfolded_mix || args.dfolded_bias;
  rows.wants_dnorm = args.dnorm_weight || args.dnorm_bias;
  rows.wants_dpre_mix = args.dpre_mix != nullptr;
  rows.goes_on = args.dq.data || args.dk.data || args.dpre_mix;
  keys.goes_on = args.dk.data != nullptr;
  set_out(rows, 0, args.dq);
  set_out(keys, 0, args.dk);
  set_out(keys, 1, args.dv_out);
  plan.sweeps_keys = args.dk.data || args.dv_out.data;
  // that over keys takes from that over queries the means of dA and, where logits are mixed, the statistics
  plan.sweeps_rows =
      rows.goes_on || rows.wants_dmix || rows.wants_dnorm || (plan.sweeps_keys && args.pre_mix);

  if (plan.sweeps_rows) plan.row_bytes = fit(rows, false, limit);
  if (plan.sweeps_keys) plan.key_bytes = fit(keys, true, limit);
  const auto piece = [](int64_t numbers) { return (numbers * int64_t(sizeof(Acc<T>)) + 15) / 16 * 16; };
  const int64_t parameters = 2 * args.H * args.H + 3 * args.H, blocks = args.B * rows.tiles;
  const bool summed = rows.wants_dmix || rows.wants_dnorm || rows.wants_dpre_mix;
  const auto far_sums = [&](const BackwardKernel<T>& a, int outputs) {
    return a.sums_shared || a.chunk >= a.other_rows
               ? 0
               : piece(args.B * a.tiles * outputs * args.H * kOwnRows * a.memory.sum_row);
  };
  plan.bounds = piece(3 * args.B * args.H * args.N);
  plan.partial = plan.bounds + piece(blocks);
  plan.images = plan.partial + (summed ? piece(blocks * parameters) : 0);
  plan.sums = plan.images + (summed ? piece(args.B * parameters) : 0);
  plan.size = plan.sums +
              std::max(plan.sweeps_rows ? far_sums(rows, 1) : 0, plan.sweeps_keys ? far_sums(keys, 2) : 0);
  return plan;
}

template <class T>
void backward(const ReattentionBackward& args, void* scratch, void* stream) {
  using A = Acc<T>;
  Plan<T> plan = plan_of<T>(args);
  const auto at = [&](int64_t offset) { return reinterpret_cast<A*>(static_cast<char*>(scratch) + offset); };
  for (BackwardKernel<T>* a : {&plan.rows, &plan.keys}) {
    a->rows = {at(0)};
    a->bounds = {at(plan.bounds)};
    a->partial = {at(plan.partial)};
    a->sums = {at(plan.sums)};
  }
  const BackwardKernel<T>& rows = plan.rows;
  if (args.B > 0) {
    if (!args.pre_mix && (plan.sweeps_rows || plan.sweeps_keys))
      launch_softmax_rows<T>(kOperation, args, at(0), stream);
    if (plan.sweeps_rows) launch_query_sweep(rows, plan.row_bytes, stream);
    if (plan.sweeps_keys) launch_key_sweep(plan.keys, plan.key_bytes, stream);
  }
  if (!rows.wants_dmix && !rows.wants_dnorm && !rows.wants_dpre_mix) return;
  const int size = static_cast<int>(2 * args.H * args.H + 3 * args.H);
  if (args.B > 0)
    launch_sum_parts(kOperation, at(plan.partial), at(plan.images), args.B, rows.tiles, size, stream);
  Parameters<A> sums{};
  sums.sums = {at(plan.images)};
  sums.images = rows.images;
  sums.heads = rows.heads;
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
  return with_type(args.q.dtype, [&](auto number) { return plan_of<decltype(number)>(args).size; });
}

void reattention_bwd(const ReattentionBackward& args, void* scratch, void* stream) {
  if (args.H > 0)
    with_type(args.q.dtype, [&](auto number) { backward<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
