// Memory for results, kept when they die.
//
// The system clears every page that it hands out. PyTorch keeps memory on a GPU; on the CPU it leaves that to the C
// library, which returns large blocks to the system.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace leannorm {

struct Block {
  void* start;
  std::size_t bytes;
};

class Pool {
 public:
  // A block of at least that many bytes, at most a quarter more, aligned to a huge page. Throws std::bad_alloc.
  Block take(std::size_t bytes);
  void give_back(Block);

  // Returns to the system what no tensor holds.
  void release();

  std::size_t idle_bytes();
  std::mutex& mutex() { return mutex_; }

 private:
  void shrink_to(std::size_t bytes);

  std::mutex mutex_;
  std::vector<Block> idle_;  // the one that was given back last comes last: the caches may still hold it
  std::size_t idle_bytes_ = 0, held_bytes_ = 0, most_held_ = 0;
};

// The process's pool. It is never destroyed, since tensors may outlive static objects.
Pool& pool();

}  // namespace leannorm
