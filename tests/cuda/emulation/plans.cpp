// How the forward of re-attention is shared out, as a line for each of some shapes: number, bytes of shared
// memory, heads, tokens; warps, those that make maps, keys of a chunk, buffers of the kernel in registers.
#include <cstdio>

#include "maps/reattention.cuh"
#include "maps/reattention_registers.cuh"

namespace {

using namespace vitdiv::cuda;

template <class T>
void print(const char* number) {
  for (int64_t kilobytes : {227, 163, 99})
    for (int heads : {3, 4, 6, 12, 16})
      for (int tokens : {197, 577}) {
        ForwardKernel<T> a{};
        a.heads = heads, a.n = a.m = tokens, a.width = a.out_width = 64;
        a.stride = row_stride<T>(64);
        a.out.p = reinterpret_cast<T*>(16);
        int warps = 0;
        fit(a, warps, kilobytes << 10);
        const int buffers = sizeof(T) == 2 ? fit_registers(heads, 64, kilobytes << 10).buffers : 0;
        std::printf("%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\n", number, int(kilobytes), heads, tokens, warps,
                    a.workers, a.chunk, a.slices, buffers);
      }
}

}  // namespace

int main() {
  print<half_t>("float16");
  print<float>("float32");
  print<double>("float64");
}
