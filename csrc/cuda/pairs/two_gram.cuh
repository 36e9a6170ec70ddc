// What the kernels of two_gram share: the penalties, and inverse norms.
#pragma once

#include "pairwise_cosine.cuh"

namespace vitdiv::cuda {

// A penalty as flags, which all pairs of a launch share. The squares are of S' - T', where numbers are
// replaced by 0.
template <class A>
struct PairPenalty {
  bool product, hinge;
  bool clamps_s, clamps_t;  // negative ones
  bool drops_both;          // S, where both are negative
  A margin;

  DEVICE bool drops_s(A s, A t) const { return clamps_s ? s <= 0 : drops_both && s < 0 && t < 0; }
  DEVICE bool drops_t(A t) const { return clamps_t && t <= 0; }
  DEVICE A value(A s, A t) const {
    if (product) return s * t;
    const A d = (drops_s(s, t) ? A(0) : s) - (drops_t(t) ? A(0) : t);
    if (!hinge) return d * d;
    const A over = (d < 0 ? -d : d) - margin;
    return over < 0 ? A(0) : over;  // a NaN stays
  }
  // Of S, or of T.
  DEVICE A slope(A s, A t, bool of_t) const {
    if (product) return of_t ? s : t;
    const A d = (drops_s(s, t) ? A(0) : s) - (drops_t(t) ? A(0) : t);
    A of_s = 2 * d;
    if (hinge) of_s = (d < 0 ? -d : d) <= margin ? A(0) : d > 0 ? A(1) : d < 0 ? A(-1) : d;
    if (of_t ? drops_t(t) : drops_s(s, t)) return 0;
    return of_t ? -of_s : of_s;
  }
};

template <class A>
PairPenalty<A> pair_penalty(const TwoGramArgs& args) {
  const auto is = [&](GramPenalty penalty) { return args.penalty == penalty; };
  const bool drops_both = is(GramPenalty::kReluTeacherSquare), clamps_s = is(GramPenalty::kReluSquare);
  return {is(GramPenalty::kProduct),
          is(GramPenalty::kHinge),
          clamps_s,
          clamps_s || drops_both || is(GramPenalty::kClampedTeacherSquare),
          drops_both,
          static_cast<A>(args.margin)};
}

// Of x, 0, or of y: its vectors.
inline CosineArgs vectors_of(const TwoGramArgs& args, int set) {
  CosineArgs vectors{};
  vectors.L = args.L, vectors.N = vectors.M = args.N;
  vectors.D = set ? args.D2 : args.D;
  vectors.x = set ? args.y : args.x;
  vectors.eps = args.eps;
  return vectors;
}

// Vectors, with the name that errors call them.
template <class T>
Vectors<T> gram_vectors(const TwoGramArgs& args, int set) {
  if (set && !args.y.data) return {};
  return vectors<T>(set ? "y" : "x", set ? args.y : args.x, args.L, args.N, set ? args.D2 : args.D);
}

// numbers[..] = 1
template <class A>
KERNEL LAUNCH_BOUNDS(256, 1) fill_ones(Global<A> numbers, int64_t count) {
  const int64_t at = int64_t(block_x()) * threads() + thread_x();
  if (at < count) numbers.st(at, A(1));
}

// What products of raw vectors take: inverse norms, or 1, for both sets.
template <class A>
void gram_inverse_norms(const char* operation, const TwoGramArgs& args, A* const (&inverse_norms)[2],
                        void* stream) {
  const int64_t count = args.L * args.N;
  if (args.normalise) {
    for (int s = 0; s < (args.y.data ? 2 : 1); ++s)
      vector_inverse_norms(operation, vectors_of(args, s), 0, inverse_norms[s], stream);
  } else {
    launch(operation, fill_ones<A>, ceil_div(count, 256), 256, 0, stream, Global<A>{inverse_norms[0]}, count);
  }
}

inline void check_sizes(const TwoGramArgs& args) {
  if (args.N < 1 || args.D < 1 || (args.y.data && args.D2 < 1))
    throw std::invalid_argument(
        "two_gram: the CUDA kernels need at least one vector of at least one feature");
}

}  // namespace vitdiv::cuda
