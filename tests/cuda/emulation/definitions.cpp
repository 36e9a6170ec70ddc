// The emulated layer against its definitions, written again from the PTX manual: "Matrix Fragments for
// mma.m16n8k16" and so on, element by element. Prints "name<TAB>ok" or "name<TAB>what is wrong".
#include <cstdio>
#include <random>
#include <vector>

#include "../../../csrc/cuda/core/mma.cuh"
#include "../../../csrc/cuda/core/reduce.cuh"

using namespace vitdiv::cuda;

namespace {

std::mt19937 generator(3);

void report(const char* name, bool good, const char* what = "differs from its definition") {
  std::printf("%s\t%s\n", name, good ? "ok" : what);
}

template <class K, class... A>
bool runs(int64_t bytes, K kernel, A... args) {
  try {
    launch("test", kernel, 1, 32, bytes, nullptr, args...);
    return true;
  } catch (const emulation::Fault& f) {
    std::fprintf(stderr, "%s\n", f.what());
    return false;
  }
}

float random_value() { return std::normal_distribution<float>()(generator); }

template <class T>
float rounded(float x) {
  return to_float(from_float<T>(x));
}

struct Registers {
  float c[32][4];
  uint32_t a[32][4], b[32][2];
};

template <class T>
KERNEL mma_16(Registers* r) {
  const int l = thread_x();
  mma_16816<T>(r->c[l], r->a[l], r->b[l]);
}

template <class T>
void test_mma_16816(const char* name) {
  float A[16][16], B[16][8], C[16][8];
  for (auto& row : A)
    for (float& x : row) x = rounded<T>(random_value());
  for (auto& row : B)
    for (float& x : row) x = rounded<T>(random_value());
  for (auto& row : C)
    for (float& x : row) x = random_value();
  Registers r;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    uint16_t a[8], b[4];
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
      const int col = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      a[i] = from_float<T>(A[row][col]).bits;
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      b[i] = from_float<T>(B[row][group]).bits;
    }
    std::memcpy(r.a[lane], a, 16);
    std::memcpy(r.b[lane], b, 8);
    for (int i = 0; i < 4; ++i) r.c[lane][i] = C[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
  }
  bool good = runs(0, mma_16<T>, &r);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, col = lane % 4 * 2 + (i & 1);
      double want = C[row][col];
      for (int k = 0; k < 16; ++k) want += double(A[row][k]) * B[k][col];
      good &= std::abs(r.c[lane][i] - want) < 1e-6;
    }
  report(name, good);
}

struct Tf32Registers {
  float c[32][4], a[32][4], b[32][2];
};

KERNEL mma_8(Tf32Registers* r) {
  const int l = thread_x();
  mma_1688_tf32(r->c[l], r->a[l], r->b[l]);
}

void test_mma_1688() {
  float A[16][8], B[8][8];
  for (auto& row : A)
    for (float& x : row) x = random_value();
  for (auto& row : B)
    for (float& x : row) x = random_value();
  Tf32Registers r{};
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i)
      r.a[lane][i] = A[i == 0 || i == 2 ? group : group + 8][i < 2 ? in_group : in_group + 4];
    for (int i = 0; i < 2; ++i) r.b[lane][i] = B[i == 0 ? in_group : in_group + 4][group];
  }
  bool good = runs(0, mma_8, &r);
  const auto cut = [](float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u); };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, col = lane % 4 * 2 + (i & 1);
      double want = 0;
      for (int k = 0; k < 8; ++k) want += double(cut(A[row][k])) * cut(B[k][col]);
      good &= std::abs(r.c[lane][i] - want) < 1e-6;
    }
  report("mma.m16n8k8 tf32", good);
}

struct F64Registers {
  double c[32][2], a[32], b[32];
};

KERNEL mma_4(F64Registers* r) {
  const int l = thread_x();
  mma_884_f64(r->c[l][0], r->c[l][1], r->a[l], r->b[l]);
}

void test_mma_884() {
  double A[8][4], B[4][8], C[8][8];
  for (auto& row : A)
    for (double& x : row) x = random_value();
  for (auto& row : B)
    for (double& x : row) x = random_value();
  for (auto& row : C)
    for (double& x : row) x = random_value();
  F64Registers r;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    r.a[lane] = A[group][in_group];
    r.b[lane] = B[in_group][group];
    for (int i = 0; i < 2; ++i) r.c[lane][i] = C[group][in_group * 2 + (i & 1)];
  }
  bool good = runs(0, mma_4, &r);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) {
      const int row = lane >> 2, col = lane % 4 * 2 + (i & 1);
      double want = C[row][col];
      for (int k = 0; k < 4; ++k) want += A[row][k] * B[k][col];
      good &= std::abs(r.c[lane][i] - want) < 1e-14;
    }
  report("mma.m8n8k4 f64", good);
}

// Element (row, column) of the matrices in shared memory is 100 row + column; rows are 24 elements apart.
template <int COUNT, bool TRANS>
KERNEL load_matrices(uint32_t (*out)[4]) {
  Carver carve;
  const auto s = carve.take<half_t>(32 * 24);
  const int l = thread_x();
  for (int x = 0; x < 8; ++x) s.st(l * 24 + x, half_t{uint16_t(100 * l + x)});
  sync_warp();
  uint32_t r[COUNT];
  ldmatrix<TRANS>(r, s, l % (8 * COUNT) * 24);
  for (int m = 0; m < COUNT; ++m) out[l][m] = r[m];
}

template <int COUNT, bool TRANS>
void test_ldmatrix(const char* name) {
  uint32_t out[32][4];
  emulation::counts = {};
  bool good = runs(32 * 24 * 2, load_matrices<COUNT, TRANS>, out);
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < COUNT; ++m)
      for (int e = 0; e < 2; ++e) {
        const int i = lane / 4, j = lane % 4 * 2 + e;  // of the fragment
        const int row = TRANS ? j : i, col = TRANS ? i : j;
        good &= (out[lane][m] >> 16 * e & 0xffff) == unsigned(100 * (8 * m + row) + col);
      }
  // rows 48 bytes apart lie in eight different groups of four banks
  good &= emulation::counts.ldmatrix == 1 && emulation::counts.ldmatrix_rounds == COUNT;
  report(name, good);
}

KERNEL shuffles(bool* out) {
  const int l = thread_x();
  bool good = true;
  for (int m = 0; m < 32; ++m) {
    good &= warp_shuffle_xor(3 * l, m) == 3 * (l ^ m);
    good &= warp_shuffle(5.0 * l, m) == 5.0 * m;
  }
  good &= warp_shuffle(l, l + 7) == (l + 7) % 32;
  good &= warp_ballot(l % 3 == 0) == 0x49249249u;
  good &= quad_sum(1 << l % 4) == 15 && quad_max(float(l % 4)) == 3;
  out[l] = good;
}

KERNEL copies(Global<const float> from, float* out) {
  Carver carve;
  const auto s = carve.take<float>(128);
  const int l = thread_x();
  copy16_async(s, 4 * l, from, 4 * l, l % 2 == 0);
  copy_commit();
  copy_wait<0>();
  sync_warp();
  for (int x = l; x < 128; x += 32) out[x] = s.ld(127 - x);
}

// Element (0, 0) of one product, with the arithmetic of the hardware: c + a_0 b_0 + ...
template <class T>
float on_hardware(float c, std::initializer_list<std::pair<float, float>> factors) {
  constexpr int K = kDepth<T>;
  float a[K] = {}, b[K] = {}, result;
  int k = 0;
  for (const auto& [x, y] : factors) a[k] = x, b[k++] = y;
  emulation::config.as_hardware = true;
  if constexpr (sizeof(T) == 2) {
    Registers r{};
    r.c[0][0] = c;
    for (int lane = 0; lane < 4; ++lane)  // of row 0 and of column 0
      for (int half = 0; half < 2; ++half) {
        const int first = 2 * lane + 8 * half;
        r.a[lane][2 * half] = pack2<T>(a[first], a[first + 1]);
        r.b[lane][half] = pack2<T>(b[first], b[first + 1]);
      }
    runs(0, mma_16<T>, &r);
    result = r.c[0][0];
  } else {
    Tf32Registers r{};
    r.c[0][0] = c;
    for (int lane = 0; lane < 4; ++lane)
      for (int half = 0; half < 2; ++half)
        r.a[lane][2 * half] = a[lane + 4 * half], r.b[lane][half] = b[lane + 4 * half];
    runs(0, mma_8, &r);
    result = r.c[0][0];
  }
  emulation::config.as_hardware = false;
  return result;
}

// Known values, of an A100: Fasi et al. 2021, Khattak and Mikaitis 2025.
template <class T>
void test_tensor_cores(const char* name) {
  constexpr float e = 0x1p-12f;  // its square is half of the last place of 1
  const std::pair<float, float> none{0, 0}, half{e, e}, quarter{e, e / 2}, less{-e, 0.75f * e};
  // cut, not rounded to 1 + 2^-23; of both signs
  bool good = on_hardware<T>(1, {half, quarter}) == 1 && on_hardware<T>(-1, {{-e, e}, {-e, e / 2}}) == -1;
  // one bit more than float32 has is kept of each number: together two are seen, and of one alone nothing
  good &= on_hardware<T>(1, {half, half}) == 1 + 0x1p-23f && on_hardware<T>(1, {half}) == 1;
  good &= on_hardware<T>(1, {quarter, quarter, quarter, quarter}) == 1;
  good &= on_hardware<T>(1, {{-e, e}}) == 1 - 0x1p-24f && on_hardware<T>(1, {less}) == 1;
  // but not from one half of K to the next
  if constexpr (kDepth<T> == 16)
    good &= on_hardware<T>(1, {half, none, none, none, none, none, none, none, half}) == 1;
  else
    good &= on_hardware<T>(1, {half, none, none, none, half}) == 1;
  // aligned by the factors' exponents: 1.5 by 1.5 counts as less than 2
  good &= on_hardware<T>(0, {{1.5f, 1.5f}, half, half, half}) == 2.25f;
  good &= on_hardware<T>(0x1p-24f, {{1.5f, 1.5f}, half, half, half}) == 2.25f + 0x1p-22f;
  good &= std::isnan(on_hardware<T>(NAN, {half})) && std::isinf(on_hardware<T>(1, {{INFINITY, 1}}));
  if constexpr (!std::is_same_v<T, half_t>)
    good &= std::isinf(on_hardware<T>(0x1p127f, {{0x1p100f, 0x1p27f}}));
  report(name, good);
}

// A planted fault: a long sum of one sign that stays in tensor cores, which nothing sees if sums are rounded;
// and the same by multiply_add, which adds each step to the sum itself.
float term(int step) { return 0.5f + static_cast<float>(step * 37 % 101) / 202; }

template <bool CHAINED>
KERNEL long_sum(float* out, int steps) {
  float chained[4] = {}, acc[2][4] = {};
  FragmentA<float> a;
  FragmentB<float> b[2];
  for (int i = 0; i < 4; ++i) split_tf32(0.9f, b[i / 2].hi[i % 2], b[i / 2].lo[i % 2]);
  for (int step = 0; step < steps; ++step) {
    for (int i = 0; i < 4; ++i) split_tf32(term(step), a.hi[i], a.lo[i]);
    if constexpr (CHAINED) {
      mma_1688_tf32(chained, a.lo, b[0].hi);
      mma_1688_tf32(chained, a.hi, b[0].lo);
      mma_1688_tf32(chained, a.hi, b[0].hi);
    } else {
      multiply_add<float>(acc, a, b);
    }
  }
  out[thread_x()] = CHAINED ? chained[0] : acc[0][0];
}

template <bool CHAINED>
double error_of_long_sum(bool as_hardware) {
  constexpr int steps = 1000;
  float out[32];
  emulation::config.as_hardware = as_hardware;
  runs(0, long_sum<CHAINED>, out, steps);
  emulation::config.as_hardware = false;
  double want = 0;
  for (int step = 0; step < steps; ++step) want += double(8) * term(step) * 0.9f;
  return std::abs(out[0] / want - 1);
}

void test_long_sums() {
  constexpr double budget = 1e-5;
  report("a long sum, rounded", error_of_long_sum<true>(false) < budget, "is not within the budget");
  report("a long sum in tensor cores", error_of_long_sum<true>(true) > 3 * budget, "does not drift");
  report("a long sum by multiply_add", error_of_long_sum<false>(true) < budget, "is not within the budget");
}

void test_approximations() {
  emulation::config.as_hardware = true;
  double largest = 0, largest_root = 0;
  for (float x = -20; x < 20; x += 0.0371f) {
    largest = std::max(largest, std::abs(fast_exp2(x) / std::exp2(double(x)) - 1));
    largest_root = std::max(largest_root, std::abs(reciprocal_sqrt(x + 21) * std::sqrt(double(x) + 21) - 1));
  }
  const auto near = [](double error) { return 0x1p-23 < error && error < 0x1.4p-22; };
  bool good = near(largest) && near(largest_root);
  good &= fast_exp2(0.0f) == 1 && fast_exp2(-INFINITY) == 0 && std::isinf(fast_exp2(INFINITY));
  good &= fast_exp2(0x1p-140f) == 1 && fast_exp2(-127.0f) == 0 && std::isnan(fast_exp2(NAN));
  emulation::config.as_hardware = false;
  report("approximations", good);
}

void test_numbers() {
  bool good = rounded<half_t>(1 + 0x1p-11f) == 1 && rounded<half_t>(1 + 0x1.8p-10f) == 1 + 0x1p-9f;
  good &= rounded<bf16_t>(1 + 0x1p-8f) == 1 && rounded<bf16_t>(1 + 0x1.8p-7f) == 1 + 0x1p-6f;
  good &= to_tf32(1 + 0x1p-11f) == 1 + 0x1p-10f && to_tf32(-1 - 0x1p-12f) == -1;
  good &= rounded<half_t>(0x1p-24f) == 0x1p-24f && std::isinf(rounded<half_t>(1e6f)) &&
          std::isnan(rounded<bf16_t>(NAN)) && std::isnan(rounded<half_t>(NAN)) &&
          std::isinf(to_tf32(INFINITY));
  for (int i = 0; i < 65536; ++i) {
    const half_t h{uint16_t(i)};
    if (!std::isnan(to_float(h))) good &= from_float<half_t>(to_float(h)).bits == i;
  }
  good &= pack2<bf16_t>(1, -2) == 0xc0003f80u && pack2<half_t>(1, -2) == 0xc0003c00u;
  report("numbers", good);
}

KERNEL fused(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
  const int l = thread_x();
  out[l] = fma2<false>(a[l], b[l], c[l]), out[32 + l] = fma2<true>(a[l], b[l], c[l]);
}

void test_fused_pairs() {
  uint32_t a[32], b[32], c[32], out[64];
  for (uint32_t* each : {a, b, c})
    for (int l = 0; l < 32; ++l) each[l] = pack2<half_t>(random_value(), random_value());
  // by one rounding: 1 - 2^-20 less 1, which a product of its own would have rounded to 1
  const float above = 1 + 0x1p-10f, below = 1 - 0x1p-10f;
  a[0] = pack2<half_t>(below, above), b[0] = pack2<half_t>(above, below), c[0] = pack2<half_t>(-1, -1);
  bool good = runs(0, fused, a, b, c, out);
  const auto half_of = [](uint32_t x, int high) { return to_float(half_t{uint16_t(x >> 16 * high)}); };
  for (int high = 0; high < 2; ++high)
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 2; ++e) {
        const double want = double(half_of(a[l], high)) * half_of(b[l], e) + half_of(c[l], e);
        good &= half_of(out[32 * high + l], e) == static_cast<float>(static_cast<_Float16>(want));
      }
  good &= half_of(out[0], 0) == -0x1p-20f && half_of(out[32], 1) == -0x1p-20f;
  report("pairs of float16", good);
}

template <class T>
T number(float x) {
  if constexpr (sizeof(T) == 2)
    return from_float<T>(x);
  else
    return x;
}

// A of 16 rows, B of 16 columns, both as [16][depth] or, with TRANS, as [depth][16]; A B and A Aᵀ.
template <class T, bool TRANS>
KERNEL products(const T* a, const T* b, Acc<T>* out) {
  constexpr int depth = kDepth<T>, stride = TRANS ? 16 + Numbers<T>::kPad : row_stride<T>(depth);
  Carver carve;
  const auto s = carve.take<T>(2 * 16 * stride);
  const auto at = [](int x, int k) { return TRANS ? k * stride + x : x * stride + k; };
  for (int i = thread_x(); i < 16 * depth; i += 32) {
    s.st(at(i / depth, i % depth), a[i]);
    s.st(16 * stride + at(i / depth, i % depth), b[i]);
  }
  sync_warp();
  FragmentA<T> fa;
  FragmentB<T> fb[2];
  Acc<T> acc[2][2][4] = {};
  load_a<TRANS>(fa, s, at);
  load_b<TRANS>(fb, s, [&](int x, int k) { return 16 * stride + at(x, k); });
  multiply_add<T>(acc[0], fa, fb);
  transpose<T>(fb, fa);
  multiply_add<T>(acc[1], fa, fb);
  for (int p = 0; p < 2; ++p)
    for (int j = 0; j < 2; ++j)
      for (int e = 0; e < 4; ++e) out[p * 256 + tile_row(e) * 16 + 8 * j + tile_col(e)] = acc[p][j][e];
}

template <class T, bool TRANS>
void test_products(const char* name, double tolerance) {
  constexpr int depth = kDepth<T>;
  std::vector<T> a(16 * depth), b(16 * depth);
  for (T& x : a) x = number<T>(random_value());
  for (T& x : b) x = number<T>(random_value());
  std::vector<Acc<T>> out(512);
  bool good = runs(8192, products<T, TRANS>, a.data(), b.data(), out.data());
  for (int p = 0; p < 2; ++p)
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        double want = 0;
        for (int k = 0; k < depth; ++k)
          want += double(to_float(a[i * depth + k])) * to_float(p ? a[j * depth + k] : b[j * depth + k]);
        good &= std::abs(out[p * 256 + i * 16 + j] - want) < tolerance;
      }
  report(name, good);
}

}  // namespace

int main() {
  test_mma_16816<half_t>("mma.m16n8k16 f16");
  test_mma_16816<bf16_t>("mma.m16n8k16 bf16");
  test_mma_1688();
  test_mma_884();
  test_ldmatrix<2, false>("ldmatrix.x2");
  test_ldmatrix<4, false>("ldmatrix.x4");
  test_ldmatrix<2, true>("ldmatrix.x2.trans");
  test_ldmatrix<4, true>("ldmatrix.x4.trans");
  bool good[32], all = runs(0, shuffles, good);
  for (bool g : good) all &= g;
  report("shuffles", all);
  std::vector<float> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[i] = i + 1;
  emulation::allow(in.data(), 512, false, true);
  all = runs(512, copies, Global<const float>{in.data()}, out.data());
  for (int i = 0; i < 128; ++i) all &= out[127 - i] == (i / 4 % 2 == 0 ? i + 1 : 0);
  report("cp.async", all);
  test_numbers();
  test_fused_pairs();
  test_tensor_cores<half_t>("tensor cores f16");
  test_tensor_cores<bf16_t>("tensor cores bf16");
  test_tensor_cores<float>("tensor cores tf32");
  test_long_sums();
  test_approximations();
  test_products<half_t, false>("tile product f16", 1e-5);
  test_products<half_t, true>("tile product f16, transposed", 1e-5);
  test_products<bf16_t, false>("tile product bf16", 1e-5);
  test_products<bf16_t, true>("tile product bf16, transposed", 1e-5);
  test_products<float, false>("tile product f32", 4e-6);
  test_products<float, true>("tile product f32, transposed", 4e-6);
  test_products<double, false>("tile product f64", 1e-14);
  test_products<double, true>("tile product f64, transposed", 1e-14);
}
