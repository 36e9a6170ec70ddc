// A kernel that reverses 64 numbers, in several ways, with one fault planted at a time. Prints, for each
// fault and order, "fault<TAB>order<TAB>what the emulation said". The comments `at: ...` name the faults that
// must be found at that line.
#include <cstdio>
#include <vector>

#include "../../../csrc/cuda/core/platform.cuh"

using namespace vitdiv::cuda;

namespace {

// clang-format off
#define FAULTS(X)                                                                                       \
  X(none) X(no_block_barrier) X(no_barrier_before_reuse) X(no_copy_wait) X(no_barrier_after_copy_wait)  \
  X(shared_index_off_by_one) X(device_index_off_by_one) X(shared_uninitialised) X(device_uninitialised) \
  X(misaligned_shared) X(misaligned_device) X(diverged_shuffle) X(different_collectives)                \
  X(diverged_barrier) X(early_exit) X(no_warp_barrier) X(arena_overrun) X(copy_never_waited_for)        \
  X(input_written) X(blocks_share_an_output)
// clang-format on

enum Fault {
#define NAME(f) f,
  FAULTS(NAME)
#undef NAME
};

template <Fault F>
KERNEL reverse(Global<const float> in, Global<float> out, Global<float> other) {
  const int t = thread_x(), n = threads(), first = block_x() * n;
  Carver carve;
  const auto s = carve.take<float>(n);
  const auto u = carve.take<float>(F == arena_overrun ? 1000 : n);  // at: arena_overrun
  float x = in.ld(first + t);
  if (F == misaligned_device) x = in.template ld<uint2>(first + (t | 1)).x;  // at: misaligned_device
  if (F != shared_uninitialised || t != 5)
    s.st(F == shared_index_off_by_one ? t + 1 : t, x);  // at: shared_index_off_by_one
  if (F == early_exit && t == 40) return;
  if (F == diverged_barrier && t < 32)
    sync_block();  // at: diverged_barrier
  else if (F != no_block_barrier)
    sync_block();       // at: diverged_barrier early_exit
  x = s.ld(n - 1 - t);  // at: no_block_barrier shared_uninitialised
  if (F != no_barrier_before_reuse) sync_block();
  s.st(t, x);                                                   // at: no_barrier_before_reuse
  if (t < 16) copy16_async(u, 4 * t, in, first + 4 * t, true);  // at: copy_never_waited_for
  copy_commit();
  if (F != no_copy_wait && F != copy_never_waited_for) copy_wait<0>();
  if (F != no_barrier_after_copy_wait) sync_block();
  if (F != copy_never_waited_for) x = u.ld(n - 1 - t);  // at: no_copy_wait no_barrier_after_copy_wait
  if (F == misaligned_shared) x = s.template ld<uint2>(t % 8 | 1).x;  // at: misaligned_shared
  if (F == diverged_shuffle)
    x = t % 2 ? warp_shuffle_xor(x, 2) : warp_shuffle_xor(x, 4) + 1;  // at: diverged_shuffle
  if (F == different_collectives)
    x = t % 2 ? warp_shuffle_xor(x, 2) : float(warp_ballot(x > 0));  // at: different_collectives
  sync_block();
  s.st(t, x);
  if (F != no_warp_barrier) sync_warp();
  x = s.ld(t ^ 1);  // at: no_warp_barrier
  if (F == no_warp_barrier && t > 64) sync_warp();
  const int to = F == blocks_share_an_output ? t : F == device_index_off_by_one ? first + t + 1 : first + t;
  out.st(to, x);  // at: device_index_off_by_one blocks_share_an_output
  if (F == device_uninitialised) out.st(to, other.ld(to));  // at: device_uninitialised
  if (F == input_written) Global<float>{const_cast<float*>(in.p)}.st(first + t, x);  // at: input_written
}

template <Fault F>
void run(const char* name) {
  std::vector<float> in(128, 1), out(128), other(128);
  for (int order = 0; order < 10; ++order) {
    const auto kind = static_cast<emulation::Order>(order < 2 ? order : 2);
    emulation::config = {kind, unsigned(order), 227 << 10};
    emulation::allow(in.data(), 512, false, true);
    emulation::allow(out.data(), 512, true, false);
    emulation::allow(other.data(), 512, true, false);
    std::string said;
    try {
      launch(name, reverse<F>, 2, 64, 512, nullptr, Global<const float>{in.data()}, Global<float>{out.data()},
             Global<float>{other.data()});
    } catch (const emulation::Fault& f) {
      said = f.what();
    }
    emulation::forbid_all();
    std::printf("%s\t%d\t%s\n", name, order, said.c_str());
  }
}

}  // namespace

int main() {
#define RUN(f) run<f>(#f);
  FAULTS(RUN)
}
