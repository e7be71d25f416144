// Runs a compiled model on numbers from standard input and writes the float32 result to standard output.
//
//   run_library model.so 2 3 32 32 < inputs.f32 > logits.f32
//   run_library --images model.so 2 32 32 3 < images.u8 > logits.f32
//
// The numbers after the library are the shape of what is read, the batch first: float32 as the model takes it, or with
// --images bytes (N, H, W, C), which are prepared as model.json says.  Only the headers of tvm_ffi are needed.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <sstream>
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

ffi::Tensor Allocate(const std::vector<int64_t>& shape) {
  return ffi::Tensor::FromNDAlloc(AlignedAllocator(), ffi::ShapeView(shape.data(), shape.size()),
                                  DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
}

// How images become inputs: of each channel of the model the value that is taken from and divides what lies in [0, 1].
struct Preparation {
  std::vector<double> mean, std;
  bool reversed;  // the model takes BGR
};

std::vector<double> Numbers(const ffi::json::Object& entries, const char* name, size_t channels, double otherwise) {
  auto found = entries.find(ffi::String(name));
  if (found == entries.end() || (*found).second == nullptr) return std::vector<double>(channels, otherwise);
  std::vector<double> numbers;
  for (const ffi::Any& each : (*found).second.cast<ffi::json::Array>()) numbers.push_back(each.cast<double>());
  if (numbers.size() != channels) {
    TVM_FFI_THROW(ValueError) << name << " has " << numbers.size() << " values; the images have " << channels << " channels";
  }
  return numbers;
}

Preparation ReadPreparation(const std::string& library, size_t channels) {
  std::string path = library.substr(0, library.rfind('.')) + ".json";
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  ffi::String wrong;
  ffi::Any parsed = ffi::json::Parse(text.str(), &wrong);
  if (!file || wrong.size() != 0) TVM_FFI_THROW(ValueError) << path << " cannot be read " << wrong;
  auto manifest = parsed.cast<ffi::json::Object>();
  auto found = manifest.find(ffi::String("preparation"));
  if (found == manifest.end() || (*found).second == nullptr) {
    TVM_FFI_THROW(ValueError) << path << " does not say how images are prepared; give prepared numbers without --images";
  }
  auto entries = (*found).second.cast<ffi::json::Object>();
  if (entries[ffi::String("source")].cast<ffi::String>() != "images") {
    TVM_FFI_THROW(ValueError) << "the model was calibrated on prepared numbers; give such without --images";
  }
  return {Numbers(entries, "mean", channels, 0.0), Numbers(entries, "std", channels, 1.0),
          entries[ffi::String("channel_order")].cast<ffi::String>() == "BGR"};
}

// Bytes (N, H, W, C) as numbers (N, C, H, W).
ffi::Tensor Prepare(const std::vector<unsigned char>& bytes, const std::vector<int64_t>& shape, const Preparation& how) {
  int64_t area = shape[1] * shape[2], channels = shape[3];
  ffi::Tensor input = Allocate({shape[0], channels, shape[1], shape[2]});
  float* out = static_cast<float*>(input.data_ptr());
  for (int64_t n = 0; n < shape[0]; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const unsigned char* from = bytes.data() + n * area * channels + (how.reversed ? channels - 1 - c : c);
      float mean = static_cast<float>(how.mean[c]), std = static_cast<float>(how.std[c]);
      for (int64_t i = 0; i < area; ++i) *out++ = (from[i * channels] / 255.0f - mean) / std;
    }
  }
  return input;
}

int Run(int argc, char** argv) {
  bool images = argc > 1 && std::string(argv[1]) == "--images";
  int first = images ? 2 : 1;
  if (argc < first + 2 || (images && argc != first + 5)) {
    std::fprintf(stderr, "usage: %s model.so BATCH [SIZE ...] < input.f32 > output.f32\n", argv[0]);
    std::fprintf(stderr, "       %s --images model.so N H W C < images.u8 > output.f32\n", argv[0]);
    return 2;
  }
  const char* path = argv[first];
  std::vector<int64_t> shape;
  for (int i = first + 1; i < argc; ++i) shape.push_back(std::atoll(argv[i]));
  size_t wanted = images ? 1 : sizeof(float);
  for (int64_t size : shape) wanted *= size;
  std::vector<unsigned char> read(wanted);
  size_t got = std::fread(read.data(), 1, wanted, stdin);
  if (got != wanted) {
    std::fprintf(stderr, "the input has %zu bytes; the shape needs %zu\n", got, wanted);
    return 2;
  }
  ffi::Tensor input = images ? Prepare(read, shape, ReadPreparation(path, shape[3])) : Allocate(shape);
  if (!images) std::memcpy(input.data_ptr(), read.data(), wanted);

#if defined(__linux__) && defined(__x86_64__)
  // A library for AMX needs the state of the tile registers (ARCH_REQ_XCOMP_PERM), once for the process; without AMX the
  // call fails and changes nothing.
  syscall(SYS_arch_prctl, 0x1023, 18);
#endif
  ffi::Module library = ffi::Module::LoadFromFile(path);
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
