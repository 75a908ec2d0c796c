// Memory that a thread keeps: what it would get anew from the C library it would get page by page.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace leannorm {

enum class Of { call, thread };  // what all threads of a call share, what one of them has for itself

constexpr std::size_t kLineBytes = 64;

// Memory for that many values, at the beginning of a cache line, until the same is asked for again.
template <class T, Of kOf>
T* scratch_of(int64_t size) {
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{kLineBytes}); }
  };
  thread_local std::unique_ptr<T, Free> kept;
  thread_local int64_t kept_size = 0;
  if (kept_size < size) {
    kept.reset();
    kept.reset(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kLineBytes})));
    kept_size = size;
  }
  return kept.get();
}

}  // namespace leannorm
