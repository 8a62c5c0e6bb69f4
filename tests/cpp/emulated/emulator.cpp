// Fibers, and as much of CUDA's runtime as the tests of kernels call.
#include <cstdio>
#include <cstdlib>

// Puts what a call preserves onto the stack, and goes on with another stack that was left in this way: a few
// nanoseconds, where swapcontext() asks the system for its signal mask, twice.
extern "C" void emulator_switch(void** left, void* to);
asm(R"(
  .globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

uint8_t* memory = nullptr;
bool late = false;

namespace {

struct Fiber {
  std::vector<void*> stack = std::vector<void*>((256 << 10) / sizeof(void*));
  void* left = nullptr;  // where on it
  Copies copies;
  bool ended = false;
};
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier barriers[16];
std::deque<int> ready;
void* scheduler = nullptr;  // its stack
const std::function<void()>* job = nullptr;

void wait(Barrier& barrier, int threads) {
  const int self = int(threadIdx.x);
  if (++barrier.arrived < threads) {
    barrier.waiting.push_back(self);
    emulator_switch(&fibers[size_t(self)].left, scheduler);
    return;
  }
  ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier = {};
}

void run_fiber() {
  (*job)();
  Fiber& fiber = fibers[threadIdx.x];
  fiber.ended = true;
  emulator_switch(&fiber.left, scheduler);
}

}  // namespace

Warp& warp() { return warps[threadIdx.x / 32]; }
Copies& copies() { return fibers[threadIdx.x].copies; }
void meet(int number, int threads) { wait(barriers[number], threads); }
void meet_warp() { wait(warp().barrier, 32); }

void run_blocks(dim3 grid, int threads, size_t memory_bytes, const std::function<void()>& kernel) {
  std::vector<uint8_t> held(memory_bytes + 1024);
  memory = held.data() + (1024 - reinterpret_cast<uintptr_t>(held.data()) % 1024) % 1024;
  gridDim = grid, blockDim = dim3(unsigned(threads));
  job = &kernel;
  if (fibers.size() < size_t(threads)) fibers.resize(size_t(threads));
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    std::fill(held.begin(), held.end(), uint8_t(0x5a));  // whatever was there
    warps.assign(size_t(threads) / 32, {});
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[size_t(t)];
      fiber.ended = false, fiber.copies = {};
      void** top = fiber.stack.data() + fiber.stack.size();
      top -= 3 - reinterpret_cast<uintptr_t>(top) / 8 % 2;  // where a return address stands: 8 bytes off 16
      *top = nullptr;
      *--top = reinterpret_cast<void*>(run_fiber);
      fiber.left = top - 6;  // registers, whatever they are
      ready.push_back(t);
    }
    int ended = 0;
    while (!ready.empty()) {
      threadIdx = dim3(unsigned(ready.front()), 0, 0);
      ready.pop_front();
      Fiber& fiber = fibers[threadIdx.x];
      emulator_switch(&scheduler, fiber.left);
      ended += fiber.ended;
    }
    if (ended < threads)
      std::fprintf(stderr, "%d of %d threads wait for ever\n", threads - ended, threads), std::abort();
  }
}

}  // namespace emulator

extern "C" {

void emulator_late(int64_t late) { emulator::late = late != 0; }

// A card of few multiprocessors, so that small matrices have blocks with several pairs of tiles.
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  std::strcpy(p->name, "emulator");
  p->major = 8, p->minor = 6, p->sharedMemPerBlockOptin = 99 << 10, p->multiProcessorCount = 6;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1 << 20, cudaSuccess; }
cudaError_t cudaMalloc(void** p, size_t bytes) {
  return *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256), cudaSuccess;
}
cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return std::memset(to, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* all) { return *free = *all = size_t(1) << 30, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// Nothing is timed here.
cudaError_t cudaEventCreate(cudaEvent_t*) { return cudaErrorNotSupported; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaErrorNotSupported; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaErrorNotSupported; }
cudaError_t cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t) { return cudaErrorNotSupported; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaErrorNotSupported; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaErrorNotSupported; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) { return cudaErrorNotSupported; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaErrorNotSupported; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaErrorNotSupported; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaErrorNotSupported; }

}  // extern "C"
