// The CPU device: a persistent pool of threads and the instruction set that its kernels use.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace halfturn {

struct Kernels;
namespace cpu {
class Arena;
struct Matrix;
struct Vector;
}  // namespace cpu

enum class Isa { kGeneric, kAvx2, kAvx512 };

// The instruction sets this machine can run, worst first, and their names.
std::vector<Isa> available_isas();
const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // "auto" takes the best one
std::string cpu_name();

// The kernels of the best instruction set, for work that belongs to no Cpu.
const Kernels& best_kernels();
int usable_cores();  // that the process may run on

class Cpu {
 public:
  using Arena = cpu::Arena;
  using Matrix = cpu::Matrix;
  using Vector = cpu::Vector;

  // threads = 0 takes one per core that the process may use. Throws Error if the system doesn't give as many.
  Cpu(int threads, Isa isa);
  ~Cpu();
  Cpu(const Cpu&) = delete;

  int threads() const { return threads_; }
  Isa isa() const { return isa_; }
  const Kernels& kernels() const { return *kernels_; }

  // Calls work(task, thread) for every task in [0, tasks), each once, on all threads; returns when all are done. Each
  // thread begins with a range of neighbouring tasks and then takes over what others have not begun, so that a thread
  // that the system holds up does not hold up the rest. What work() throws ends the process.
  template <class Work>
  void parallel(int64_t tasks, Work&& work) {
    using Plain = std::remove_reference_t<Work>;
    run(
        tasks, [](void* context, int64_t task, int thread) noexcept { (*static_cast<Plain*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&work)));
  }

 private:
  using Call = void (*)(void*, int64_t, int) noexcept;
  void run(int64_t tasks, Call call, void* context);
  void take_tasks(int thread);
  void worker(int thread);
  void stop();  // ends the workers

  int threads_;
  Isa isa_;
  const Kernels* kernels_;
  int process_;  // that has the workers: one that was forked from it has none

  // A region is open while its tasks last; a worker that comes late leaves it alone, so that the caller never waits for
  // a thread that the system has not scheduled yet.
  Call call_ = nullptr;
  void* context_ = nullptr;
  uint64_t regions_ = 0;
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::vector<Range> ranges_;                     // of the tasks, one per thread
  alignas(64) std::atomic<uint64_t> open_{0};     // number of the open region, 0 between regions
  alignas(64) std::atomic<uint64_t> started_{0};  // number of the latest region, open or not: wakes sleepers
  alignas(64) std::atomic<int> inside_{0};        // workers that may be taking tasks
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  struct Workers {
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;
  };
  std::unique_ptr<Workers> workers_;
};

}  // namespace halfturn
