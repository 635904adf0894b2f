// Matrices: ldmatrix and stmatrix, mma.sync, and Hopper's wgmma.
//
// Products are exact. Sums follow what was measured (Fasi et al. 2021, Li et al. 2024): the accumulator and a block of
// products are aligned to the largest of them and cut to 26 bits, their sum is cut to float32, and blocks are added one
// after the other. A block is 8 products of 16-bit numbers or 4 of TF32 on Ampere, twice as many later. NVIDIA
// guarantees none of it; with exact_sums everything is added in float64 and rounded once, the other extreme.
#include "tensor_cores.h"

void multiply_add(const Machine& machine, const float* A, const float* B, float* C, int M, int N, int K, int block) {
  auto finite = [](const float* x, int n) { return std::all_of(x, x + n, [](float v) { return std::isfinite(v); }); };
  if (machine.launch.exact_sums || !finite(A, M * K) || !finite(B, K * N) || !finite(C, M * N)) {
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) {
        double sum = C[i * N + j];
        for (int k = 0; k < K; k++) sum += double(A[i * K + k]) * double(B[k * N + j]);
        C[i * N + j] = canonical(float(sum));
      }
    return;
  }
  constexpr int W = 8;  // columns at a time, for the compiler's vectors
  for (int i = 0; i < M; i++)
    for (int j0 = 0; j0 < N; j0 += W)
      for (int k0 = 0; k0 < K; k0 += block) {
        double terms[17][W], largest[W], to_units[W], from_units[W], sum[W] = {0};
        for (int j = 0; j < W; j++) terms[0][j] = C[i * N + j0 + j], largest[j] = std::fabs(terms[0][j]);
        for (int k = 0; k < block; k++)
          for (int j = 0; j < W; j++) {
            terms[k + 1][j] = double(A[i * K + k0 + k]) * double(B[(k0 + k) * N + j0 + j]);
            largest[j] = std::max(largest[j], std::fabs(terms[k + 1][j]));
          }
        for (int j = 0; j < W; j++) {
          const s64 exponent = std::max<s64>(s64(bits_of(largest[j]) >> 52) - 1023, -149);
          to_units[j] = as_double(u64(1023 + 25 - exponent) << 52);
          from_units[j] = as_double(u64(1023 - 25 + exponent) << 52);
        }
        for (int k = 0; k <= block; k++)
          for (int j = 0; j < W; j++) sum[j] += std::trunc(terms[k][j] * to_units[j]);
        for (int j = 0; j < W; j++) {
          const double result = sum[j] * from_units[j];
          C[i * N + j0 + j] = std::fabs(result) > std::numeric_limits<float>::max() ? float(result) : float_toward_zero(result);
        }
      }
}

int products_of_a_block(const Machine& machine, Type type) {
  return (type == TFLOAT32 ? 4 : 8) * (machine.launch.arch >= 90 ? 2 : 1);
}

static float half_of(u16 x, Type type) { return type == FLOAT16 ? widen(F16{x}) : widen(BF16{x}); }

// ------------------------------------------------------------------------------------------------------------ ldmatrix
// numbers: matrices, transposed, -, -, offset, bytes of the address. Lane 8 q + r holds the address of row r of
// matrix q; lane l gets elements 2 (l % 4) and the next of row l / 4, of columns where transposed.

static void prepare_matrices(const Context& c, int operand, u64* addresses) {
  addresses_of(c, operand, addresses);
  if (c.machine.launch.count_memory)
    for (int q = 0; q < c.number(0); q++) count_banks(c, addresses, 0xffu << 8 * q, 16);
  c.needs(ALL);
}

void load_matrix(Context& c) {
  const int matrices = c.number(0);
  const bool transposed = c.number(1);
  u64 addresses[32];
  prepare_matrices(c, matrices, addresses);
  for (int q = 0; q < matrices; q++) {
    u16 values[8][8] = {{0}};
    bool bad[8][8];
    for (int row = 0; row < 8; row++) {
      const u64 address = addresses[8 * q + row];
      const u8* bytes = shared_at(c, 8 * q + row, address, 16, 16);
      for (int column = 0; column < 8; column++) {
        bad[row][column] = !bytes || read_shared(c, -1, address + 2 * column, 2);
        if (bytes) memcpy(&values[row][column], bytes + 2 * column, 2);
      }
    }
    u32 undefined = 0;
    for (int lane = 0; lane < 32; lane++) {
      u32 word = 0;
      for (int k = 0; k < 2; k++) {
        int row = lane / 4, column = 2 * (lane % 4) + k;
        if (transposed) std::swap(row, column);
        word |= u32(values[row][column]) << 16 * k;
        undefined |= u32(bad[row][column]) << lane;
      }
      c.reg<u32>(q)[lane] = word;
    }
    c.set_undefined(q, undefined);
  }
}

void store_matrix(Context& c) {
  const bool transposed = c.number(1);
  u64 addresses[32];
  prepare_matrices(c, 0, addresses);
  for (int q = 0; q < c.number(0); q++) {
    u16 values[8][8];
    bool bad[8][8];
    for (int lane = 0; lane < 32; lane++)
      for (int k = 0; k < 2; k++) {
        int row = lane / 4, column = 2 * (lane % 4) + k;
        if (transposed) std::swap(row, column);
        values[row][column] = u16(c.reg<u32>(1 + q)[lane] >> 16 * k);
        bad[row][column] = c.undefined(1 + q) >> lane & 1;
      }
    for (int row = 0; row < 8; row++) {
      const u64 address = addresses[8 * q + row];
      u8* bytes = shared_at(c, 8 * q + row, address, 16, 16);
      if (!bytes) continue;
      for (int column = 0; column < 8; column++) {
        const u8* value = reinterpret_cast<const u8*>(&values[row][column]);
        write_shared(c, 8 * q + row, address + 2 * column, 2, value, bad[row][column]);
        memcpy(bytes + 2 * column, value, 2);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- mma.sync

// A matrix of at most ROWS x COLUMNS, with marks of what is undefined: its elements, its rows and its columns.
template <class T, int ROWS, int COLUMNS>
struct Matrix {
  int columns;
  T values[ROWS * COLUMNS] = {0};
  u8 undefined[ROWS * COLUMNS] = {0}, bad_row[ROWS] = {0}, bad_column[COLUMNS] = {0};
  explicit Matrix(int columns) : columns(columns) {}
  void set(int row, int column, T value, bool bad) {
    values[row * columns + column] = value;
    undefined[row * columns + column] = bad;
    bad_row[row] |= bad;
    bad_column[column] |= bad;
  }
};

int elements_of(Type type) { return type == TFLOAT32 ? 1 : 2; }
float element(u32 word, int k, Type type) { return type == TFLOAT32 ? tf32_of(word) : half_of(u16(word >> 16 * k), type); }

// Row and column of what a lane holds in register k of A (16 x K), of B (K x 8), and of the accumulator (16 x N).
struct Place {
  int row, column;
};
static Place place_of_a(int lane, int k, int elements) { return {lane / 4 + 8 * (k % 2), elements * (lane % 4 + 4 * (k / 2))}; }
static Place place_of_b(int lane, int k, int elements) { return {elements * (lane % 4 + 4 * k), lane / 4}; }
static Place place_of_sum(int lane, int k) { return {lane / 4 + 8 * (k / 2 % 2), 8 * (k / 4) + 2 * (lane % 4) + k % 2}; }

static Matrix<float, 16, 16> registers_of_a(const Context& c, int first, int K, Type type) {
  Matrix<float, 16, 16> A(K);
  const int elements = elements_of(type);
  for (int k = 0; k < K / (2 * elements); k++)
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < elements; e++) {
        const Place at = place_of_a(lane, k, elements);
        A.set(at.row, at.column + e, element(c.reg<u32>(first + k)[lane], e, type), c.undefined(first + k) >> lane & 1);
      }
  return A;
}

// numbers: type, K, M. Operands: result, A, B, accumulator; the result has the places of the accumulator.
void multiply_matrices(Context& c) {
  c.needs(ALL);
  const Type type = Type(c.number(0));
  const int K = c.number(1), elements = elements_of(type), of_a = K / (2 * elements), of_b = K / (4 * elements);
  const Matrix<float, 16, 16> A = registers_of_a(c, 4, K, type);
  Matrix<float, 16, 8> B(8), C(8);
  for (int k = 0; k < of_b; k++)
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < elements; e++) {
        const int operand = 4 + of_a + k;
        const Place at = place_of_b(lane, k, elements);
        B.set(at.row + e, at.column, element(c.reg<u32>(operand)[lane], e, type), c.undefined(operand) >> lane & 1);
      }
  for (int k = 0; k < 4; k++)
    for (int lane = 0; lane < 32; lane++) {
      const int operand = 4 + of_a + of_b + k;
      const Place at = place_of_sum(lane, k);
      C.set(at.row, at.column, c.reg<float>(operand)[lane], c.undefined(operand) >> lane & 1);
    }
  const int block = std::min(K, products_of_a_block(c.machine, type));
  multiply_add(c.machine, A.values, B.values, C.values, 16, 8, K, block);
  for (int k = 0; k < 4; k++) {
    u32 undefined = 0;
    for (int lane = 0; lane < 32; lane++) {
      const Place at = place_of_sum(lane, k);
      c.reg<float>(k)[lane] = C.values[at.row * 8 + at.column];
      const bool bad = A.bad_row[at.row] || B.bad_column[at.column] || C.undefined[at.row * 8 + at.column];
      undefined |= u32(bad) << lane;
    }
    c.set_undefined(k, undefined);
  }
}

// float64: each product is added with one rounding.
void multiply_double_matrices(Context& c) {
  c.needs(ALL);
  const int K = c.number(1), M = c.number(2), of_a = M / 8 * K / 4, of_b = K / 4, sums = M / 8 * 2;
  Matrix<double, 16, 16> A(K);
  Matrix<double, 16, 8> B(8), C(8);
  for (int lane = 0; lane < 32; lane++) {
    for (int k = 0; k < of_a; k++) {
      const int row = lane / 4 + (M == 16 ? 8 * (k % 2) : 0), column = lane % 4 + 4 * (M == 16 ? k / 2 : k);
      A.set(row, column, c.reg<double>(sums + k)[lane], c.undefined(sums + k) >> lane & 1);
    }
    for (int k = 0; k < of_b; k++) {
      const int operand = sums + of_a + k;
      B.set(lane % 4 + 4 * k, lane / 4, c.reg<double>(operand)[lane], c.undefined(operand) >> lane & 1);
    }
    for (int k = 0; k < sums; k++) {
      const int operand = sums + of_a + of_b + k;
      const Place at = place_of_sum(lane, k);
      C.set(at.row, at.column, c.reg<double>(operand)[lane], c.undefined(operand) >> lane & 1);
    }
  }
  for (int row = 0; row < M; row++)
    for (int column = 0; column < 8; column++)
      for (int k = 0; k < K; k++) {
        double& sum = C.values[row * 8 + column];
        sum = std::fma(A.values[row * K + k], B.values[k * 8 + column], sum);
      }
  for (int k = 0; k < sums; k++) {
    u32 undefined = 0;
    for (int lane = 0; lane < 32; lane++) {
      const Place at = place_of_sum(lane, k);
      c.reg<double>(k)[lane] = canonical(C.values[at.row * 8 + at.column]);
      const bool bad = A.bad_row[at.row] || B.bad_column[at.column] || C.undefined[at.row * 8 + at.column];
      undefined |= u32(bad) << lane;
    }
    c.set_undefined(k, undefined);
  }
}

// --------------------------------------------------------------------------------------------------------------- wgmma

// Where a shared-memory descriptor puts element k of row or column mn; outer_major: mn is the axis that is contiguous.
static u64 address_in_descriptor(u64 descriptor, int mn, int k, int bytes, bool outer_major) {
  auto field = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
  const u64 start = field(0), leading = field(16), stride = field(32);
  const int mode = descriptor >> 62 & 3, swizzle = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  u64 address = start;
  if (!outer_major) {
    const u64 at = u64(k) * bytes;
    address += (mn % 8) * swizzle + mn / 8 * stride + (mode ? at : at / 16 * leading + at % 16);
  } else {
    const u64 at = u64(mn) * bytes;
    address += mode ? at % swizzle + at / swizzle * leading + (k % 8) * swizzle + k / 8 * stride
                    : at % 16 + at / 16 * stride + (k % 8) * 16 + k / 8 * leading;
  }
  return address ^ (mode ? (address >> 7 & (8 / (1 << (mode - 1)) - 1)) << 4 : 0);
}

// What the generic proxy wrote is visible to the tensor cores only after its warp's fence.proxy.async.
float element_in_shared(
    Context& c, u64 descriptor, int mn, int k, Type type, bool outer_major, std::vector<std::pair<u32, u32>>& reads,
    bool& undefined) {
  const int bytes = type == TFLOAT32 ? 4 : 2;
  const u64 address = address_in_descriptor(descriptor, mn, k, bytes, outer_major);
  const u8* place = shared_at(c, 0, address, bytes, bytes);
  undefined = !place;
  if (!place) return 0;
  const SharedByte& byte = c.machine.shared_bytes[address - c.machine.launch.shared_base];
  if (!byte.undefined && byte.write_epoch && byte.fences == c.machine.warps[byte.writer].fences)
    c.report(NO_PROXY_FENCE, 0, address, byte.writer);
  undefined = read_shared(c, -1, address, bytes);
  reads.push_back({u32(address), u32(bytes)});
  u32 word = 0;
  memcpy(&word, place, bytes);
  return element(word, 0, type);
}

static u64 descriptor_of(Context& c, int operand) {
  const u64* values = c.reg<u64>(operand);
  for (int lane = 1; lane < 32; lane++)
    if (values[lane] != values[0]) c.report(DESCRIPTOR, lane, values[lane]);
  if (values[0] >> 49 & 7) c.report(DESCRIPTOR, 0, values[0]);  // a base offset: the matrix does not begin a swizzled tile
  return values[0];
}

// This warp's 16 of the 64 rows. numbers: type, N, K, A is in shared memory, A is transposed, B is transposed,
// accumulate, accumulate is a predicate. Operands: sums (N / 2), A (4 registers or a descriptor), descriptor of B
// [, predicate].
void multiply_group(Context& c) {
  c.needs(ALL);
  const Type type = Type(c.number(0));
  const int N = c.number(1), K = c.number(2), sums = N / 2;
  const bool shared_a = c.number(3);
  Warp& warp = c.warp;
  Matrix<float, 16, 16> A(K);
  Matrix<float, 16, 256> B(N), C(N);
  if (shared_a) {
    const u64 descriptor = descriptor_of(c, sums);
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < K; k++) {
        bool bad;
        const float value = element_in_shared(c, descriptor, 16 * (warp.number % 4) + row, k, type, c.number(4), warp.async_reads, bad);
        A.set(row, k, value, bad);
      }
  } else {
    A = registers_of_a(c, sums, K, type);
  }
  const int b = sums + (shared_a ? 1 : 4);
  const u64 descriptor = descriptor_of(c, b);
  for (int k = 0; k < K; k++)
    for (int column = 0; column < N; column++) {
      bool bad;
      const float value = element_in_shared(c, descriptor, column, k, type, c.number(5), warp.async_reads, bad);
      B.set(k, column, value, bad);
    }
  bool accumulate = c.number(6);
  if (c.number(7)) {
    accumulate = c.predicate(b + 1) & 1;
    if (c.undefined(b + 1)) c.report(UNDEFINED_BRANCH, 0, 0);
  }
  auto pending = [&](int k) {  // the undefined bits that wait_group will give the register
    const s32 word = c.operand(k).word;
    return std::find_if(warp.pending.begin(), warp.pending.end(), [=](const auto& p) { return p.word == word; });
  };
  if (accumulate)
    for (int k = 0; k < sums; k++) {
      const auto known = pending(k);
      const u32 undefined = known == warp.pending.end() ? c.undefined(k) : known->undefined;
      for (int lane = 0; lane < 32; lane++) {
        const Place at = place_of_sum(lane, k);
        C.set(at.row, at.column, c.reg<float>(k)[lane], undefined >> lane & 1);
      }
    }
  multiply_add(c.machine, A.values, B.values, C.values, 16, N, K, products_of_a_block(c.machine, type));
  for (int k = 0; k < sums; k++) {
    u32 undefined = 0;
    for (int lane = 0; lane < 32; lane++) {
      const Place at = place_of_sum(lane, k);
      c.reg<float>(k)[lane] = C.values[at.row * N + at.column];
      undefined |= u32(A.bad_row[at.row] | B.bad_column[at.column] | C.undefined[at.row * N + at.column]) << lane;
    }
    const auto known = pending(k);
    const Operand& sum = c.operand(k);
    if (known == warp.pending.end()) warp.pending.push_back({sum.word, sum.high, undefined});
    else known->undefined = undefined;
    warp.undefined[sum.word] = warp.undefined[sum.high] = ALL;
  }
}

// numbers[0]: groups that may still run. One that leaves some running is taken as none, which is the stricter reading.
void wait_group(Context& c) {
  c.needs(ALL);
  if (c.number(0) != 0) return;
  for (const auto& [address, bytes] : c.warp.async_reads) read_shared(c, -1, address, bytes);  // until now
  for (const auto& [word, high, undefined] : c.warp.pending)
    c.warp.undefined[word] = c.warp.undefined[high] = undefined;
  c.warp.async_reads.clear();
  c.warp.pending.clear();
}

void fence_async_proxy(Context& c) { c.warp.fences++; }

void define_tensor_cores() {
  define("ldmatrix", load_matrix), define("stmatrix", store_matrix);
  define("mma", multiply_matrices), define("mma.f64", multiply_double_matrices);
  define("wgmma", multiply_group), define("wgmma.wait", wait_group);
  define("fence.proxy", fence_async_proxy);
}
