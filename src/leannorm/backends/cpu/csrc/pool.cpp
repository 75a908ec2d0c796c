#include "pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace leannorm {
namespace {

constexpr std::size_t kHugePage = 2 << 20;
constexpr std::size_t kRounding = 1 << 16;

std::size_t round_up(std::size_t bytes, std::size_t step) { return (bytes + step - 1) / step * step; }

#if defined(__linux__)

void* allocate(std::size_t bytes) {
  const std::size_t mapped = bytes + kHugePage;
  void* const mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(mapping), end = begin + mapped, start = round_up(begin, kHugePage);
  if (start > begin) munmap(mapping, start - begin);
  if (end > start + bytes) munmap(reinterpret_cast<void*>(start + bytes), end - start - bytes);
  madvise(reinterpret_cast<void*>(start), bytes, MADV_HUGEPAGE);  // a wish: where it is refused, pages are small
  return reinterpret_cast<void*>(start);
}

void deallocate(Block block) { munmap(block.start, block.bytes); }

#else

void* allocate(std::size_t bytes) { return std::aligned_alloc(kHugePage, round_up(bytes, kHugePage)); }
void deallocate(Block block) { std::free(block.start); }

#endif

}  // namespace

Block Pool::take(std::size_t bytes) {
  bytes = round_up(bytes, kRounding);
  const std::lock_guard lock(mutex_);
  auto best = idle_.end();
  for (auto block = idle_.begin(); block != idle_.end(); ++block)
    if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
        (best == idle_.end() || block->bytes <= best->bytes))
      best = block;
  Block taken{nullptr, bytes};
  if (best != idle_.end()) {
    taken = *best;
    idle_.erase(best);
    idle_bytes_ -= taken.bytes;
  } else {
    const std::size_t most = std::max(most_held_, held_bytes_ + bytes);
    shrink_to(most + most / 2 - held_bytes_ - bytes);
    taken.start = allocate(bytes);
    if (!taken.start) {
      shrink_to(0);
      taken.start = allocate(bytes);
    }
    if (!taken.start) throw std::bad_alloc();
  }
  held_bytes_ += taken.bytes;
  most_held_ = std::max(most_held_, held_bytes_);
  return taken;
}

void Pool::give_back(Block block) {
  const std::lock_guard lock(mutex_);
  idle_.push_back(block);
  idle_bytes_ += block.bytes;
  held_bytes_ -= block.bytes;
}

// The oldest go first.
void Pool::shrink_to(std::size_t bytes) {
  auto kept = idle_.begin();
  for (; idle_bytes_ > bytes; ++kept) {
    deallocate(*kept);
    idle_bytes_ -= kept->bytes;
  }
  idle_.erase(idle_.begin(), kept);
}

void Pool::release() {
  const std::lock_guard lock(mutex_);
  shrink_to(0);
  most_held_ = held_bytes_;
}

std::size_t Pool::idle_bytes() {
  const std::lock_guard lock(mutex_);
  return idle_bytes_;
}

Pool& pool() {
  static Pool* const pool = [] {
    auto* const made = new Pool;
    static std::mutex& mutex = made->mutex();  // a process that is forked while another thread holds it could never take it
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
    return made;
  }();
  return *pool;
}

}  // namespace leannorm
