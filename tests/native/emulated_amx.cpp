#include "emulated_amx.h"

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace rnnlm::emulated {
namespace {

// Of palette 1, the only one there is.
constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64, kWords = kMaxRowBytes / 4;

struct Tile {
  int rows = 0, row_bytes = 0;
  bool has_contents = false;
  alignas(64) uint32_t words[kMaxRows][kWords] = {};
};

struct Tiles {
  bool configured = false;
  Tile tiles[kTiles];
};
thread_local Tiles own;
std::atomic<int> configured_threads{0};

[[noreturn]] void fault(const char* instruction, const char* what) {
  std::fprintf(stderr, "emulated %s: %s\n", instruction, what);
  std::abort();
}
void require(bool condition, const char* instruction, const char* what) {
  if (!condition) fault(instruction, what);
}

Tile& usable(int tile, const char* instruction) {
  require(own.configured, instruction, "no tiles are configured");
  require(tile >= 0 && tile < kTiles, instruction, "there is no such tile");
  require(own.tiles[tile].rows > 0, instruction, "the configuration leaves this tile out");
  return own.tiles[tile];
}
Tile& filled(int tile, const char* instruction) {
  Tile& t = usable(tile, instruction);
  require(t.has_contents, instruction, "nothing was loaded into this tile");
  return t;
}

void configure(bool configured) {
  if (own.configured != configured) configured_threads += configured ? 1 : -1;
  own = Tiles{};
  own.configured = configured;
}

// Within it, arithmetic is that of these instructions whatever MXCSR said: numbers below 2^-126 are
// zero, read or computed, and results are rounded to nearest even. Operands and results have to be
// in memory: that is what the compiler does not move across.
class Arithmetic {
 public:
  Arithmetic() : mxcsr_(_mm_getcsr()) {
    constexpr unsigned kNoExceptions = 0x1f80;
    _mm_setcsr(kNoExceptions | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    __asm__ volatile("" ::: "memory");
  }
  Arithmetic(const Arithmetic&) = delete;
  Arithmetic& operator=(const Arithmetic&) = delete;
  ~Arithmetic() {
    __asm__ volatile("" ::: "memory");
    _mm_setcsr(mxcsr_);
  }

 private:
  unsigned mxcsr_;
};

// A pair of bfloat16 is a word, the first number in its lower half.
float number(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
uint32_t bits(float value) {
  uint32_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
float first(uint32_t pair) {
  return number(pair << 16);
}
float second(uint32_t pair) {
  return number(pair & 0xffff0000u);
}

}  // namespace

int threads_with_tiles() {
  return configured_threads;
}

void tile_loadconfig(const void* config) {
  const char* const name = "ldtilecfg";
  uint8_t byte[64];
  std::memcpy(byte, config, sizeof byte);
  if (byte[0] == 0) return configure(false);
  require(byte[0] == 1, name, "there is no such palette");
  require(byte[1] == 0, name, "no instruction was interrupted (start_row)");
  const auto zero = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) require(byte[i] == 0, name, "a reserved byte is not zero");
  };
  zero(2, 16);
  zero(32, 48);
  zero(56, 64);
  configure(true);
  for (int i = 0; i < kTiles; ++i) {
    Tile& tile = own.tiles[i];
    tile.row_bytes = byte[16 + 2 * i] | byte[17 + 2 * i] << 8;
    tile.rows = byte[48 + i];
    require(tile.row_bytes <= kMaxRowBytes, name, "rows of more than 64 bytes");
    require(tile.rows <= kMaxRows, name, "more than 16 rows");
    require((tile.rows == 0) == (tile.row_bytes == 0), name, "rows without bytes, or none of some");
  }
}

void tile_release() {
  configure(false);
}

void tile_zero(int tile) {
  Tile& t = usable(tile, "tilezero");
  std::memset(t.words, 0, sizeof t.words);
  t.has_contents = true;
}

void tile_loadd(int tile, const void* base, int64_t stride) {
  tile_zero(tile);  // what lies beyond the rows and columns becomes zero
  Tile& t = usable(tile, "tileloadd");
  for (int row = 0; row < t.rows; ++row)
    std::memcpy(t.words[row], static_cast<const char*>(base) + row * stride, size_t(t.row_bytes));
}

void tile_stored(int tile, void* base, int64_t stride) {
  const Tile& t = filled(tile, "tilestored");
  for (int row = 0; row < t.rows; ++row)
    std::memcpy(static_cast<char*>(base) + row * stride, t.words[row], size_t(t.row_bytes));
}

// The first numbers of all pairs are summed apart from the second ones, each sum a chain of fused
// multiply-adds that starts from zero; what is added to the tile is the sum of both.
void tile_dpbf16ps(int sums, int a, int b) {
  const char* const name = "tdpbf16ps";
  Tile& c = filled(sums, name);
  const Tile &x = filled(a, name), &y = filled(b, name);
  require(sums != a && sums != b && a != b, name, "a tile is named twice");
  require(c.row_bytes % 4 == 0 && x.row_bytes % 4 == 0, name, "rows end within a word");
  require(c.rows == x.rows, name, "sums and a have different rows");
  require(c.row_bytes == y.row_bytes, name, "sums and b have different columns");
  require(x.row_bytes / 4 == y.rows, name, "columns of a are not the rows of b");
  const Arithmetic arithmetic;
  for (int m = 0; m < c.rows; ++m) {
    float one[kWords] = {}, two[kWords] = {};
    for (int k = 0; k < y.rows; ++k)
      for (int n = 0; n < kWords; ++n) {
        one[n] = std::fma(first(x.words[m][k]), first(y.words[k][n]), one[n]);
        two[n] = std::fma(second(x.words[m][k]), second(y.words[k][n]), two[n]);
      }
    for (int n = 0; n < c.row_bytes / 4; ++n)
      c.words[m][n] = bits(number(c.words[m][n]) + (one[n] + two[n]));
  }
}

__m512i dpbf16_ps(__m512i sum, __m512i a, __m512i b) {
  alignas(64) uint32_t s[kWords], x[kWords], y[kWords];
  _mm512_store_si512(s, sum);
  _mm512_store_si512(x, a);
  _mm512_store_si512(y, b);
  {
    const Arithmetic arithmetic;
    for (int i = 0; i < kWords; ++i) {
      const float one = std::fma(second(x[i]), second(y[i]), number(s[i]));
      s[i] = bits(std::fma(first(x[i]), first(y[i]), one));
    }
  }
  return _mm512_load_si512(s);
}

__m256i cvtneps_pbh(__m512i x) {
  alignas(64) uint32_t words[kWords];
  alignas(32) uint16_t halves[kWords];
  _mm512_store_si512(words, x);
  for (int i = 0; i < kWords; ++i) {
    const uint32_t word = words[i], magnitude = word & 0x7fffffffu;
    if (magnitude > 0x7f800000u)  // NaN, made quiet
      halves[i] = uint16_t(word >> 16 | 0x40);
    else if (magnitude < 0x00800000u)
      halves[i] = uint16_t(word >> 16 & 0x8000);
    else
      halves[i] = uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(halves));
}

}  // namespace rnnlm::emulated
