// For each head the sum over images and rows of x . y: one read of both, all that batch norm's backward needs
// of them.
#include "../core/mma.cuh"
#include "../core/reduce.cuh"
#include "../core/with_type.cuh"
#include "../kernels.h"

namespace vitdiv::cuda {
namespace {

constexpr int kWarps = 8, kRows = 256;  // of a block

template <class T>
struct RowsOfHeads {
  Global<const T> data;
  int64_t image, head, row;
};

// partial[h, image * parts + part, warp] = sum over the warp's rows i of x[image, h, i] . y[image, h, i].
template <class T>
KERNEL LAUNCH_BOUNDS(32 * kWarps, 1) head_rows(RowsOfHeads<T> x, RowsOfHeads<T> y, Global<Acc<T>> partial,
                                               int heads, int rows, int width, int parts) {
  const int warp = thread_x() >> 5, part = block_x() % parts, head = block_x() / parts % heads;
  const int64_t image = block_x() / parts / heads, items = blocks_x() / heads;
  const int64_t x0 = image * x.image + head * x.head, y0 = image * y.image + head * y.head;
  const int end = rows - part * kRows < kRows ? rows : (part + 1) * kRows;
  Acc<T> sum = 0;
  for (int64_t i = part * kRows + warp; i < end; i += kWarps)
    for (int e = thread_x() & 31; e < width; e += 32)
      sum += to_float(x.data.ld(x0 + i * x.row + e)) * to_float(y.data.ld(y0 + i * y.row + e));
  sum = warp_sum(sum);
  if ((thread_x() & 31) == 0) partial.st((head * items + image * parts + part) * kWarps + warp, sum);
}

// sums[h] = sum_c partial[h, c]: a warp for each head, in float64 and always in the same order.
template <class A>
KERNEL LAUNCH_BOUNDS(32, 1) head_totals(Global<const A> partial, Global<A> sums, int64_t count) {
  double sum = 0;
  for (int64_t c = thread_x(); c < count; c += 32) sum += partial.ld(block_x() * count + c);
  sum = warp_sum(sum);
  if (thread_x() == 0) sums.st(block_x(), static_cast<A>(sum));
}

template <class T>
RowsOfHeads<T> rows_of(const HeadsView& view) {
  return {{static_cast<const T*>(view.data)}, view.stride_b, view.stride_h, view.stride_n};
}

int parts_of(const HeadDots& args) { return static_cast<int>((args.N + kRows - 1) / kRows); }

template <class T>
void run(const HeadDots& args, void* scratch, void* stream) {
  const char* operation = "head_dots";
  auto* partial = static_cast<Acc<T>*>(scratch);
  const int64_t items = args.B * parts_of(args);
  if (items > 0)
    launch(operation, head_rows<T>, items * args.H, 32 * kWarps, 0, stream, rows_of<T>(args.x),
           rows_of<T>(args.y), Global<Acc<T>>{partial}, int(args.H), int(args.N), int(args.width),
           parts_of(args));
  launch(operation, head_totals<Acc<T>>, args.H, 32, 0, stream, Global<const Acc<T>>{partial},
         Global<Acc<T>>{static_cast<Acc<T>*>(args.sums)}, items * kWarps);
}

}  // namespace

int64_t head_dots_scratch(const HeadDots& args) {
  return args.B * args.H * parts_of(args) * kWarps * accumulator_bytes(args.x.dtype);
}

void head_dots(const HeadDots& args, void* scratch, void* stream) {
  if (args.H == 0) return;
  with_type(args.x.dtype, [&](auto number) { run<decltype(number)>(args, scratch, stream); });
}

}  // namespace vitdiv::cuda
