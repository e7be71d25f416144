// Runs CUDA kernels on one CPU thread, to check indexing and barriers where there is no GPU.
//
// A block's threads are fibers; one runs until it meets a barrier or a warp-wide operation. So whatever one thread reads
// before a barrier that another writes after it in program order is found out in one of the two orders in which fibers
// can be resumed (CAT_EMULATOR_ORDER=reverse). Blocks run one after the other, in the order of their index or against it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "fiber.h"
#include "memory.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define CAT_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __align__(n) alignas(n)
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict

namespace cat {
struct dim { unsigned x, y, z; };
enum State { ready, at_block, at_warp, done };
struct Fiber {
  Context context;
  std::vector<char> stack;
  State state;
  dim thread;
  unsigned lane, warp;
};
struct Machine {
  std::vector<Fiber> fibers;
  Fiber* self = nullptr;
  Context scheduler;
  dim block, grid, threads;
  const char* kernel = "";
  char exchange[32][32][128];  // warp, lane, bytes
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
};
inline CAT_UNCHECKED Machine& machine() { static Machine one; return one; }
[[noreturn]] inline void fail(const char* what) {
  Machine& m = machine();
  const dim thread = m.self ? m.self->thread : dim{};
  std::fprintf(stderr, "CUDA emulator: %s %s (block %u %u %u, thread %u %u %u)\n", m.kernel, what, m.block.x, m.block.y,
               m.block.z, thread.x, thread.y, thread.z);
  std::abort();
}
inline CAT_UNCHECKED void check(const char* fault) {
  if (__builtin_expect(fault != nullptr, 0)) fail(fault);
}
inline CAT_UNCHECKED void check_aligned(uint64_t address, uint64_t size) {
  if (address % size && writers(address)) fail("touches what is not aligned");
}
inline void wait(State state) {
  Machine& m = machine();
  Fiber* self = m.self;
  self->state = state;
  hand_over(self->context, m.scheduler);
}
inline void trampoline() {
  Machine& m = machine();
  m.entry(m.argument);
  m.self->state = done;
  hand_over(m.self->context, m.scheduler);
}
inline bool backwards() {
  const char* order = std::getenv("CAT_EMULATOR_ORDER");
  return order && std::strcmp(order, "reverse") == 0;
}
inline void run_block() {
  Machine& m = machine();
  const unsigned count = m.threads.x * m.threads.y * m.threads.z;
  const bool reverse = backwards();
  if (m.fibers.size() < count) m.fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& f = m.fibers[i];
    f.stack.resize(1 << 16);
    f.state = ready;
    f.thread = {i % m.threads.x, i / m.threads.x % m.threads.y, i / m.threads.x / m.threads.y};
    f.lane = i % 32;
    f.warp = i / 32;
    begin(f.context, f.stack, trampoline);
  }
  for (;;) {
    bool progressed = false;
    for (unsigned k = 0; k < count; ++k) {
      Fiber& f = m.fibers[reverse ? count - 1 - k : k];
      if (f.state != ready) continue;
      m.self = &f;
      hand_over(m.scheduler, f.context);
      progressed = true;
    }
    for (unsigned w = 0; w * 32 < count; ++w) {
      const unsigned last = std::min(count, w * 32 + 32);
      unsigned waiting = 0;
      for (unsigned i = w * 32; i < last; ++i) waiting += m.fibers[i].state == at_warp;
      if (waiting == last - w * 32)
        for (unsigned i = w * 32; i < last; ++i) m.fibers[i].state = ready, progressed = true;
    }
    unsigned waiting = 0, finished = 0;
    for (unsigned i = 0; i < count; ++i) {
      waiting += m.fibers[i].state == at_block;
      finished += m.fibers[i].state == done;
    }
    if (finished == count) return;
    if (waiting == count) {
      for (unsigned i = 0; i < count; ++i) m.fibers[i].state = ready;
    } else if (!progressed) {
      fail(finished ? "a barrier waits for threads that have returned" : "threads wait at different barriers");
    }
  }
}
inline void run_grid(dim grid, dim threads, void (*entry)(void*), void* argument) {
  Machine& m = machine();
  m.grid = grid, m.threads = threads, m.entry = entry, m.argument = argument;
  if (threads.x * threads.y * threads.z > 1024 || !threads.x) fail("a block has 1 to 1024 threads");
  memory().launch = memory().block + 1;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t b = backwards() ? blocks - 1 - k : k;
    ++memory().block;
    m.block = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block();
  }
}
// Every lane's value, after all lanes of the warp have given theirs.
template <class V> inline CAT_UNCHECKED void share(const V& value) {
  static_assert(sizeof(V) <= 128, "an exchanged value has 128 bytes at most");
  Machine& m = machine();
  std::memcpy(m.exchange[m.self->warp][m.self->lane], &value, sizeof(V));
  wait(at_warp);
}
template <class V> inline CAT_UNCHECKED V of_lane(unsigned lane) {
  V value;
  std::memcpy(&value, machine().exchange[machine().self->warp][lane], sizeof(V));
  return value;
}
template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** p, std::index_sequence<I...>) {
  kernel(*reinterpret_cast<std::remove_reference_t<A>*>(p[I])...);
}
// What outlives the call: a graph keeps the parameters of the launches that it has recorded.
template <class... A, std::size_t... I>
void** kept(void (*)(A...), void** p, std::index_sequence<I...>) {
  return new void*[sizeof...(A) + 1]{new std::decay_t<A>(*reinterpret_cast<std::remove_reference_t<A>*>(p[I]))..., nullptr};
}
template <class... A> void** keep(void (*kernel)(A...), void** parameters) {
  return kept(kernel, parameters, std::index_sequence_for<A...>{});
}
template <class... A>
void launch(const char* name, void (*kernel)(A...), dim grid, dim threads, void** parameters) {
  machine().kernel = name;
  struct Both { void (*kernel)(A...); void** parameters; } both{kernel, parameters};
  run_grid(grid, threads, [](void* b) {
    call(static_cast<Both*>(b)->kernel, static_cast<Both*>(b)->parameters, std::index_sequence_for<A...>{});
  }, &both);
}
}  // namespace cat

// What the compiler calls before each access to memory (-fsanitize=kernel-address).
#define CAT_HOOKS(size)                                                                                   \
  extern "C" CAT_UNCHECKED void __asan_load##size##_noabort(uint64_t address) {                           \
    cat::check_aligned(address, size);                                                                    \
    cat::check(cat::read_fault(address, size));                                                           \
  }                                                                                                       \
  extern "C" CAT_UNCHECKED void __asan_store##size##_noabort(uint64_t address) {                          \
    cat::check_aligned(address, size);                                                                    \
    cat::check(cat::write_fault(address, size));                                                          \
  }
CAT_HOOKS(1)
CAT_HOOKS(2)
CAT_HOOKS(4)
CAT_HOOKS(8)
CAT_HOOKS(16)
extern "C" CAT_UNCHECKED void __asan_loadN_noabort(uint64_t address, uint64_t size) {
  cat::check(cat::read_fault(address, size));
}
extern "C" CAT_UNCHECKED void __asan_storeN_noabort(uint64_t address, uint64_t size) {
  cat::check(cat::write_fault(address, size));
}
extern "C" CAT_UNCHECKED void __asan_handle_no_return() {}

#define threadIdx (cat::machine().self->thread)
#define blockIdx (cat::machine().block)
#define blockDim (cat::machine().threads)
#define gridDim (cat::machine().grid)

inline void __syncthreads() { cat::wait(cat::at_block); }
inline void __syncwarp(unsigned = ~0u) { cat::wait(cat::at_warp); }
template <class V> inline V cat_shuffled(V value, unsigned lane) {
  cat::share(value);
  const V other = lane < 32 ? cat::of_lane<V>(lane) : value;
  cat::wait(cat::at_warp);
  return other;
}
template <class V> inline V __shfl_xor_sync(unsigned, V value, int mask, int = 32) {
  return cat_shuffled(value, cat::machine().self->lane ^ mask);
}
template <class V> inline V __shfl_down_sync(unsigned, V value, int distance, int = 32) {
  return cat_shuffled(value, cat::machine().self->lane + distance);
}
template <class V> inline V __shfl_sync(unsigned, V value, int lane, int = 32) { return cat_shuffled(value, lane); }
inline unsigned __activemask() { return ~0u; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float normcdff(float v) { return float(0.5 * std::erfc(-double(v) * 0.70710678118654752)); }
inline int __float2int_rn(float v) { return int(std::nearbyint(v)); }
inline float __int2float_rn(int v) { return float(v); }
template <class A, class B> inline auto max(A a, B b) { return a > b ? a : b; }
template <class A, class B> inline auto min(A a, B b) { return a < b ? a : b; }

#define CAT_VECTOR(name, type)                                                                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                \
  struct name##3 { type x, y, z; };                                                                       \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                                          \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                        \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CAT_VECTOR(float, float)
CAT_VECTOR(int, int32_t)
CAT_VECTOR(uint, uint32_t)
CAT_VECTOR(char, signed char)
CAT_VECTOR(uchar, unsigned char)
CAT_VECTOR(short, short)
CAT_VECTOR(ushort, unsigned short)
CAT_VECTOR(longlong, int64_t)

template <class A, class B> inline CAT_UNCHECKED int cat_bytes(int word, unsigned i) {
  (void)sizeof(B);
  return int(A(uint8_t(uint32_t(word) >> (8 * i))));
}
inline int __dp4a(int a, int b, int c) {
  for (unsigned i = 0; i < 4; ++i) c += cat_bytes<int8_t, void*>(a, i) * cat_bytes<int8_t, void*>(b, i);
  return c;
}
