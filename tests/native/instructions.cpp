// Single instructions of AMX and AVX512-BF16, as the CPU has them or, where emulated_amx.h is
// included first, in software. Operands come from standard input, many sets of them one after the
// other, and results go to standard output; arguments say what to do:
//
//   dot_pairs    sum [16] float32, a [32], b [32] bfloat16 -> [16]
//   to_bfloat16  [16] float32 -> [16] bfloat16
//   tiles ROWS PAIRS COLUMNS
//                sums [ROWS, COLUMNS] float32, a [ROWS, 2 PAIRS], b [PAIRS, 2 COLUMNS] bfloat16
//                -> [ROWS, COLUMNS]
//   sequence STEP..., in software only
//                config [64 bytes] -> nothing; a step is configure, release, zeroT, loadT, storeT,
//                or dotABC, with digits for tiles

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

template <class T>
bool read(T* data, int count) {
  return std::fread(data, sizeof(T), size_t(count), stdin) == size_t(count);
}
template <class T>
void write(const T* data, int count) {
  std::fwrite(data, sizeof(T), size_t(count), stdout);
}

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void tiles(int rows, int pairs, int columns) {
#if !defined(RNNLM_EMULATED_AMX)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) std::exit(2);
#endif
  Config config;
  const auto set = [&](int tile, int tile_rows, int words) {
    config.rows[tile] = uint8_t(tile_rows);
    config.row_bytes[tile] = uint16_t(4 * words);
  };
  set(0, rows, columns);
  set(4, rows, pairs);
  set(6, pairs, columns);
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  alignas(64) uint32_t sums[256], a[256], b[256];
  while (read(sums, rows * columns) && read(a, rows * pairs) && read(b, pairs * columns)) {
    __asm__ volatile("" ::: "memory");
    _tile_loadd(0, sums, 4 * columns);
    _tile_loadd(4, a, 4 * pairs);
    _tile_loadd(6, b, 4 * columns);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stored(0, sums, 4 * columns);
    __asm__ volatile("" ::: "memory");
    write(sums, rows * columns);
  }
  _tile_release();
}

void sequence(int count, char** steps) {
#if defined(RNNLM_EMULATED_AMX)
  Config config;
  if (!read(&config, 1)) std::exit(2);
  alignas(64) uint32_t memory[256] = {};
  for (int i = 0; i < count; ++i) {
    const std::string step = steps[i];
    const auto tile = [&](size_t from_end) { return step[step.size() - from_end] - '0'; };
    if (step == "configure") _tile_loadconfig(&config);
    if (step == "release") _tile_release();
    if (step.find("zero") == 0) _tile_zero(tile(1));
    if (step.find("load") == 0) _tile_loadd(tile(1), memory, 64);
    if (step.find("store") == 0) _tile_stored(tile(1), memory, 64);
    if (step.find("dot") == 0) _tile_dpbf16ps(tile(3), tile(2), tile(1));
  }
#else
  (void)count, (void)steps;
#endif
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  __m512i x, y, z;
  if (what == "dot_pairs")
    while (read(&x, 1) && read(&y, 1) && read(&z, 1)) {
      const __m512 sum = _mm512_dpbf16_ps((__m512)x, (__m512bh)y, (__m512bh)z);
      write(&sum, 1);
    }
  if (what == "to_bfloat16")
    while (read(&x, 1)) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x);
      write(&rounded, 1);
    }
  if (what == "tiles")
    tiles(std::atoi(arguments[2]), std::atoi(arguments[3]), std::atoi(arguments[4]));
  if (what == "sequence") sequence(count - 2, arguments + 2);
}
