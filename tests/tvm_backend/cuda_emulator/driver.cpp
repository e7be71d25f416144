// Stand-ins for the CUDA driver and runtime: one device whose memory is the host's and whose kernels run in the emulator.
//
// A module's image is the path of a shared library that holds the emulated kernels.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "memory.h"

extern "C" {
typedef int Result;

// Memory ---------------------------------------------------------------------------------------------------------------
void*& capturing();
static std::map<void*, size_t>& blocks() { static std::map<void*, size_t> m; return m; }
static void mark(void* begin, size_t size, uint32_t writer) {
  std::fill_n(cat::writers(reinterpret_cast<uint64_t>(begin)), size, writer);
}
// Addresses are given once: what is used after it was freed lies outside.
Result cudaMalloc(void** out, size_t size) {
  if (capturing()) return 900;
  cat::Memory& m = cat::memory();
  if (!m.begin) {
    m = {nullptr, uint64_t(1) << 36, 0, nullptr, cat::first, cat::first};
    m.writers = static_cast<uint32_t*>(cat::reserved(m.size * sizeof *m.writers));
    m.begin = static_cast<char*>(cat::reserved(m.size));
  }
  const size_t room = (size + 4096) / 4096 * 4096;
  if (m.used + room > m.size) return 2;
  *out = m.begin + m.used;
  m.used += room;
  std::memset(*out, 0x7f, size);
  mark(*out, size, cat::unwritten);
  blocks()[*out] = size;
  return 0;
}
Result cudaFree(void* pointer) {
  if (capturing()) return 900;
  auto found = blocks().find(pointer);
  if (found == blocks().end()) return pointer ? 1 : 0;
  mark(pointer, found->second, cat::outside);
  madvise(pointer, found->second, MADV_DONTNEED);
  blocks().erase(found);
  return 0;
}
Result cudaMallocHost(void** out, size_t size) { return *out = std::malloc(size), 0; }
Result cudaFreeHost(void* pointer) { return std::free(pointer), 0; }
static void expect_no(const char* fault) {
  if (!fault) return;
  std::fprintf(stderr, "CUDA emulator: a copy %s\n", fault);
  std::abort();
}
static Result enqueue(void* stream, std::function<void()> run);
Result cudaMemcpyAsync(void* to, const void* from, size_t size, int, void* stream) {
  return enqueue(stream, [=] {
    // By nobody's block, behind the last launch.
    cat::memory().block = cat::memory().launch = cat::memory().block + 1;
    expect_no(cat::read_fault(reinterpret_cast<uint64_t>(from), size));
    expect_no(cat::write_fault(reinterpret_cast<uint64_t>(to), size));
    std::memmove(to, from, size);
  });
}
Result cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void* stream) {
  return cudaMemcpyAsync(to, from, size, 0, stream);
}
Result cudaMemGetInfo(size_t* free_, size_t* total) { *free_ = *total = size_t(1) << 33; return 0; }

// Device ---------------------------------------------------------------------------------------------------------------
Result cudaGetDeviceCount(int* count) { *count = 1; return 0; }
Result cudaGetDevice(int* device) { *device = 0; return 0; }
Result cudaSetDevice(int device) { return device == 0 ? 0 : 101; }
Result cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: *value = 1024; break;         // threads a block
    case 10: *value = 32; break;          // warp
    case 16: *value = 132; break;         // multiprocessors
    case 75: *value = 9; break;           // capability, major
    case 76: *value = 0; break;           // capability, minor
    default: *value = 49152; break;       // shared memory a block, and whatever else is asked
  }
  return 0;
}
Result cudaGetDeviceProperties(void* properties, int) { std::memset(properties, 0, 1008); std::strcpy(static_cast<char*>(properties), "emulator"); return 0; }
Result cuDeviceGetName(char* name, int length, int) { std::snprintf(name, size_t(length), "emulator"); return 0; }
Result cudaGetLastError() { return 0; }
Result cudaPeekAtLastError() { return 0; }
const char* cudaGetErrorString(Result) { return "error of the CUDA emulator"; }
const char* cudaGetErrorName(Result) { return "cudaErrorEmulator"; }
Result cuGetErrorName(Result, const char** name) { *name = "CUDA_ERROR_EMULATOR"; return 0; }
Result cuGetErrorString(Result, const char** text) { *text = "error of the CUDA emulator"; return 0; }

// Streams, graphs: everything is done when a call returns, but what a stream captures, which a graph does when it is launched ----
struct Work {
  std::function<void()> run;
};
using Graph = std::vector<Work>;
inline void*& capturing() { static void* stream = nullptr; return stream; }
inline Graph& recorded() { static Graph graph; return graph; }
// Whether the work was recorded; what a device refuses while a stream captures is an error here as well.
static Result enqueue(void* stream, std::function<void()> run) {
  if (!capturing()) return run(), 0;
  if (stream != capturing()) return 906;
  recorded().push_back({std::move(run)});
  return 0;
}
Result cudaStreamCreate(void** stream) { *stream = new char; return 0; }
Result cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
Result cudaStreamDestroy(void* stream) { delete static_cast<char*>(stream); return 0; }
Result cudaStreamSynchronize(void*) { return capturing() ? 900 : 0; }
Result cudaStreamWaitEvent(void*, void*, unsigned) { return capturing() ? 900 : 0; }
Result cudaStreamBeginCapture(void* stream, int) {
  if (capturing()) return 900;
  capturing() = stream;
  recorded().clear();
  return 0;
}
Result cudaStreamEndCapture(void*, void** graph) {
  *graph = new Graph(std::move(recorded()));
  capturing() = nullptr;
  return 0;
}
Result cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*static_cast<Graph*>(graph));
  return 0;
}
Result cudaGraphLaunch(void* executable, void*) {
  if (capturing()) return 900;
  for (const Work& work : *static_cast<Graph*>(executable)) work.run();
  if (std::getenv("CAT_EMULATOR_TELL")) std::fprintf(stderr, "graph of %zu\n", static_cast<Graph*>(executable)->size());
  return 0;
}
Result cudaGraphDestroy(void* graph) { delete static_cast<Graph*>(graph); return 0; }
Result cudaGraphExecDestroy(void* executable) { delete static_cast<Graph*>(executable); return 0; }
Result cudaEventCreate(void** event) { *event = nullptr; return 0; }
Result cudaEventDestroy(void*) { return 0; }
Result cudaEventRecord(void*, void*) { return 0; }
Result cudaEventSynchronize(void*) { return 0; }
Result cudaEventElapsedTime(float* time, void*, void*) { *time = 0; return 0; }

// Modules and kernels --------------------------------------------------------------------------------------------------
Result cuModuleLoadData(void** module, const void* image) {
  *module = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  if (!*module) std::fprintf(stderr, "CUDA emulator: %s\n", dlerror());
  return *module ? 0 : 200;
}
Result cuModuleUnload(void*) { return 0; }
using Launch = void (*)(const unsigned*, void**);
using Keep = void** (*)(void**);
struct Function {
  Launch launch;
  Keep keep;
};
static void* symbol(void* module, const char* kind, const char* name) {
  char text[512];
  std::snprintf(text, sizeof text, "cat_%s_%s", kind, name);
  return dlsym(module, text);
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  void *launch = symbol(module, "emulated", name), *keep = symbol(module, "kept", name);
  *function = new Function{reinterpret_cast<Launch>(launch), reinterpret_cast<Keep>(keep)};
  return launch && keep ? 0 : 500;
}
Result cuFuncSetAttribute(void*, int, int) { return 0; }
Result cuTensorMapEncodeTiled() { return 801; }
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void* stream;
  void* attributes;
  unsigned count;
};
Result cuLaunchKernelEx(const LaunchConfig* c, void* function, void** parameters, void**) {
  if (!c->grid_x || !c->grid_y || !c->grid_z || c->grid_y > 65535 || c->grid_z > 65535) return 1;
  const Function& f = *static_cast<Function*>(function);
  if (!capturing()) return f.launch(&c->grid_x, parameters), 0;
  struct Size { unsigned numbers[6]; } size;
  std::memcpy(size.numbers, &c->grid_x, sizeof size.numbers);
  void** kept = f.keep(parameters);
  return enqueue(c->stream, [f, size, kept] { f.launch(size.numbers, kept); });
}
}
