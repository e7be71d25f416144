// Runs a compiled model on float32 numbers from standard input and writes the float32 result to standard output.
//
//   run_library model.so 2 3 32 32 < images.f32 > logits.f32
//
// The numbers after the library are the shape of the input, the batch first.  Only the headers of tvm_ffi are needed.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr int64_t kPooledAllocator = 2;

// Memory at 64-byte boundaries, which the kernels rely on.
struct AlignedAllocator {
  void AllocData(DLTensor* tensor) {
    size_t bytes = ffi::GetDataSize(*tensor);
    tensor->data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Function Need(const ffi::Module& module, const std::string& name) {
  auto found = module->GetFunction(name, false);
  if (!found.has_value()) {
    TVM_FFI_THROW(RuntimeError) << "the library has no function " << name << "; was it made by tvm_backend.compile?";
  }
  return found.value();
}

int Run(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s model.so BATCH [SIZE ...] < input.f32 > output.f32\n", argv[0]);
    return 2;
  }
  std::vector<int64_t> shape;
  for (int i = 2; i < argc; ++i) shape.push_back(std::atoll(argv[i]));
  DLDevice cpu{kDLCPU, 0};
  auto input = ffi::Tensor::FromNDAlloc(AlignedAllocator(), ffi::ShapeView(shape.data(), shape.size()),
                                        DLDataType{kDLFloat, 32, 1}, cpu);
  size_t wanted = ffi::GetDataSize(*input.GetDLTensorPtr());
  size_t got = std::fread(input.data_ptr(), 1, wanted, stdin);
  if (got != wanted) {
    std::fprintf(stderr, "the input has %zu bytes; the shape needs %zu\n", got, wanted);
    return 2;
  }

#if defined(__linux__) && defined(__x86_64__)
  // A library for AMX needs the state of the tile registers (ARCH_REQ_XCOMP_PERM), once for the process; without AMX the
  // call fails and changes nothing.
  syscall(SYS_arch_prctl, 0x1023, 18);
#endif
  ffi::Module library = ffi::Module::LoadFromFile(argv[1]);
  ffi::Module machine = Need(library, "vm_load_executable")().cast<ffi::Module>();
  Need(machine, "vm_initialization")(static_cast<int64_t>(kDLCPU), static_cast<int64_t>(0), kPooledAllocator);
  ffi::Tensor output = Need(machine, "main")(input).cast<ffi::Tensor>();

  const DLTensor* result = output.GetDLTensorPtr();
  const char* data = static_cast<const char*>(result->data) + result->byte_offset;
  size_t bytes = ffi::GetDataSize(*result);
  return std::fwrite(data, 1, bytes, stdout) == bytes ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
