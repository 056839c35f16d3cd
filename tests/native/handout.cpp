// Threads take pieces of work, one kind after another from the same handout: every unit must be
// taken once, in pieces as long as promised. Prints what went wrong.

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

constexpr int64_t kUnit = 16, kMost = 48;
constexpr int64_t kEnds[] = {16, 16, 800, 805, 4000, 20'000'000};  // of each kind; one is empty

int fail(const char* what, int threads) {
  std::printf("%s, %d threads\n", what, threads);
  return 1;
}

int check(int threads) {
  rnnlm::cpu::Handout handout;
  std::vector<std::vector<rnnlm::cpu::Handout::Piece>> taken(static_cast<size_t>(threads));
  std::vector<std::thread> team;
  std::atomic<int> there{0};  // all begin together, or the first is done before the others come
  for (auto& mine : taken)
    team.emplace_back([&] {
      ++there;
      while (there < threads) std::this_thread::yield();
      for (int64_t end : kEnds)
        for (;;) {
          const auto piece = handout.take(end, kMost, kUnit, threads);
          if (piece.begin == piece.end) break;
          mine.push_back(piece);
        }
    });
  for (std::thread& thread : team) thread.join();

  std::vector<unsigned char> times(size_t(kEnds[5]), 0);
  int64_t longest = 0;
  for (const auto& mine : taken)
    for (const auto piece : mine) {
      const int64_t length = piece.end - piece.begin;
      if (length < 1 || length > kMost) return fail("a piece of the wrong length", threads);
      bool is_last = false;
      for (int64_t end : kEnds) {
        if (piece.begin < end && piece.end > end) return fail("a piece of two kinds", threads);
        is_last = is_last || piece.end == end;
      }
      if (length % kUnit && !is_last) return fail("a piece that is no multiple", threads);
      if (length > longest) longest = length;
      for (int64_t i = piece.begin; i < piece.end; ++i) ++times[size_t(i)];
    }
  for (int count : times)
    if (count != 1) return fail("a unit that was not taken once", threads);
  if (longest != kMost) return fail("no piece of full length", threads);
  return 0;
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 8})
    if (check(threads)) return 1;
  // Near the end nobody gets more than an equal share.
  rnnlm::cpu::Handout handout;
  const auto first = handout.take(64, kMost, kUnit, 4);
  if (first.begin != 0 || first.end != 16) return fail("more than an equal share", 4);
  return 0;
}
