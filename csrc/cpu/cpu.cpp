#include "cpu.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "../check.h"
#include "kernels.h"

namespace halfturn {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

const Kernels* kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return &kernels_avx512;
  if (isa == Isa::kAvx2) return &kernels_avx2;
#endif
  (void)isa;
  return &kernels_generic;
}

// Pauses before a waiting worker goes to sleep: about 0.2 ms, longer than the serial work between two regions.
constexpr int kSpins = 4000;

}  // namespace

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::kGeneric};
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) isas.push_back(Isa::kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
    isas.push_back(Isa::kAvx512);
#endif
  return isas;
}

const Kernels& best_kernels() {
  static const Kernels& best = *kernels_of(available_isas().back());
  return best;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "";
}

Isa isa_from_name(const std::string& name) {
  std::vector<Isa> isas = available_isas();
  if (name == "auto") return isas.back();
  std::string names;
  for (Isa isa : isas) {
    if (name == isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw Error(sentence("isa is \"", name, "\", this machine runs: auto, ", names));
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

Cpu::Cpu(int threads, Isa isa)
    : threads_(threads ? threads : usable_cores()),
      isa_(isa),
      kernels_(kernels_of(isa)),
      process_(getpid()),
      workers_(std::make_unique<Workers>()) {
  CHECK(threads >= 0 && threads_ <= 1024, "threads is ", threads, ", it must be between 1 and 1024 (0: one per core)");
  ranges_ = std::vector<Range>(size_t(threads_));
  try {
    for (int i = 1; i < threads_; ++i) workers_->threads.emplace_back([this, i] { worker(i); });
  } catch (const std::exception&) {  // the system gives no more threads, or no memory for them
    stop();
    throw Error(
        sentence("only ", workers_->threads.size() + 1, " of ", threads_, " threads could be started: lower threads"));
  }
}

Cpu::~Cpu() {
  if (getpid() == process_) stop();
  else static_cast<void>(workers_.release());  // there is nobody to wait for, and no way to destroy what they wait on
}

void Cpu::stop() {
  {
    std::lock_guard lock(workers_->mutex);
    stop_ = true;
    started_.fetch_add(1);
  }
  workers_->wake.notify_all();
  for (std::thread& w : workers_->threads) w.join();
}

// Each thread begins with a range of its own, so that it streams neighbouring weights, and then helps the others.
void Cpu::take_tasks(int thread) {
  for (int i = 0; i < threads_; ++i) {
    Range& range = ranges_[size_t((thread + i) % threads_)];
    for (;;) {
      const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= range.end) break;
      call_(context_, task, thread);
    }
  }
}

void Cpu::run(int64_t tasks, Call call, void* context) {
  if (threads_ == 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) call(context, t, 0);
    return;
  }
  call_ = call;
  context_ = context;
  for (int i = 0; i < threads_; ++i) {
    ranges_[size_t(i)].next.store(tasks * i / threads_, std::memory_order_relaxed);
    ranges_[size_t(i)].end = tasks * (i + 1) / threads_;
  }
  ++regions_;
  open_.store(regions_);
  started_.store(regions_);
  if (sleepers_.load()) {
    std::lock_guard lock(workers_->mutex);
    workers_->wake.notify_all();
  }
  take_tasks(0);
  open_.store(0);
  for (int spins = 0; inside_.load();)
    if (++spins > kSpins) std::this_thread::yield();  // somebody else uses our cores: let the workers finish
    else pause();
}

void Cpu::worker(int thread) {
  uint64_t seen = 0;  // the last region this worker took part in, or missed
  while (!stop_.load(std::memory_order_relaxed)) {
    uint64_t region = 0;
    for (int spins = 0; spins < kSpins; ++spins) {
      region = open_.load(std::memory_order_acquire);
      if (region && region != seen) break;
      pause();
    }
    if (!region || region == seen) {
      const uint64_t started = started_.load();
      if (open_.load() && open_.load() != seen) continue;
      std::unique_lock lock(workers_->mutex);
      sleepers_.fetch_add(1);
      workers_->wake.wait(lock, [&] { return stop_ || started_.load() != started; });
      sleepers_.fetch_sub(1);
      continue;
    }
    inside_.fetch_add(1);
    if (open_.load() == region) take_tasks(thread);  // else the caller has closed it, and may not wait for us
    inside_.fetch_sub(1);
    seen = region;
  }
}

}  // namespace halfturn
