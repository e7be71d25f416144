/* Calls compiled kernels without TVM's runtime: reads tensors from a file, writes the outputs to another.

   cases.h, written by the test, declares the kernels and lists them in `kernels`. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
  int32_t type;
  uint32_t padding;
  void* value;
} Any;

typedef struct {
  void* data;
  int32_t device_type, device;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
} Tensor;

typedef int (*Kernel)(void* self, Any* arguments, int32_t count, Any* result);

#include "cases.h"

/* What kernels call of the runtime, by pointers of their own. */
typedef struct {
  void* handle;
  int32_t tasks;
} Group;
typedef int (*Task)(int, Group*, void*);

static void* allocate(int device, int number, uint64_t bytes, int code, int bits) {
  (void)device, (void)number, (void)code, (void)bits;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int release(int device, int number, void* memory) {
  (void)device, (void)number;
  free(memory);
  return 0;
}

static int launch(Task task, void* data, int count) {
  (void)count;
  Group group = {NULL, 3};
  for (int i = 0; i < group.tasks; ++i)
    if (task(i, &group, data)) return -1;
  return 0;
}

void* __TVMBackendAllocWorkspace = (void*)allocate;
void* __TVMBackendFreeWorkspace = (void*)release;
void* __TVMBackendParallelLaunch = (void*)launch;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

static void get(void* into, size_t bytes, FILE* file) {
  if (fread(into, 1, bytes, file) != bytes) exit(2);
}

int main(int argc, char** argv) {
  FILE* in = argc == 3 ? fopen(argv[1], "rb") : NULL;
  FILE* out = in ? fopen(argv[2], "wb") : NULL;
  if (!out) return 2;
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; ++i) {
    int32_t count;
    get(&count, 4, in);
    Tensor* tensors = calloc(count, sizeof *tensors);
    Any* arguments = calloc(count, sizeof *arguments);
    size_t* bytes = calloc(count, sizeof *bytes);
    int32_t first_output;
    get(&first_output, 4, in);
    for (int t = 0; t < count; ++t) {
      Tensor* tensor = &tensors[t];
      int32_t head[3]; /* dimensions, DLPack's type code, bits */
      get(head, sizeof head, in);
      *tensor = (Tensor){.device_type = 1, .dimensions = head[0], .code = head[1], .bits = head[2], .lanes = 1};
      tensor->shape = calloc(head[0], sizeof(int64_t));
      get(tensor->shape, head[0] * sizeof(int64_t), in);
      bytes[t] = head[2] / 8;
      for (int d = 0; d < head[0]; ++d) bytes[t] *= tensor->shape[d];
      tensor->data = allocate(0, 0, bytes[t], 0, 0);
      get(tensor->data, bytes[t], in);
      arguments[t] = (Any){.type = 7, .value = tensor}; /* a pointer to a DLTensor */
    }
    Any result = {0};
    if (kernels[i](NULL, arguments, count, &result)) return 1;
    for (int t = first_output; t < count; ++t)
      if (fwrite(tensors[t].data, 1, bytes[t], out) != bytes[t]) return 2;
  }
  return fclose(out) ? 2 : 0;
}
