// Linked with -Wl,--wrap=mmap,--wrap=munmap,--wrap=madvise: a mapped file becomes a heap block of exactly its size, so
// that AddressSanitizer sees a read one byte behind its end (a real mapping is readable to the end of the page).
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>
#include <set>

namespace {

std::mutex mutex;
std::set<void*>& blocks() {
  static std::set<void*> held;
  return held;
}

}  // namespace

extern "C" {

void* __real_mmap(void* address, size_t size, int protection, int flags, int file, off_t offset);
int __real_munmap(void* address, size_t size);

void* __wrap_mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) {
  if (file < 0 || protection != PROT_READ) return __real_mmap(address, size, protection, flags, file, offset);
  auto* block = static_cast<char*>(std::malloc(size));
  for (size_t got = 0; got < size;) {
    const ssize_t n = ::pread(file, block + got, size - got, off_t(got));
    if (n <= 0) std::abort();
    got += size_t(n);
  }
  std::lock_guard lock(mutex);
  blocks().insert(block);
  return block;
}

int __wrap_munmap(void* address, size_t size) {
  {
    std::lock_guard lock(mutex);
    if (!blocks().erase(address)) return __real_munmap(address, size);
  }
  std::free(address);
  return 0;
}

// The pages of a heap block would be cleared.
int __wrap_madvise(void*, size_t, int) { return 0; }
}
