// The device's memory, and who wrote each of its bytes last. Finds what compute-sanitizer finds: access outside of what is
// allocated, misaligned access, reading what nothing has written; and blocks of one launch that meet in one byte.
#pragma once
#include <sys/mman.h>

#include <cstdint>

// Code that touches no memory of the device, and is not slowed down by asking whether it does.
#define CAT_UNCHECKED __attribute__((no_sanitize("kernel-address")))

namespace cat {
enum : uint32_t { outside, unwritten, first };  // from the last on, numbers of blocks and copies
struct Memory {
  char* begin;
  uint64_t size, used;
  uint32_t *writers, block, launch;  // the running block, and the first one of its launch
};
// Inline functions' variables are the same in both stand-ins and in all kernels.
inline CAT_UNCHECKED Memory& memory() {
  static Memory one;
  return one;
}
inline void* reserved(uint64_t size) {
  return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
// The writers of the bytes at an address, or null if it is none of the device's.
inline CAT_UNCHECKED uint32_t* writers(uint64_t address) {
  const Memory& m = memory();
  const uint64_t place = address - reinterpret_cast<uint64_t>(m.begin);
  return place < m.size ? m.writers + place : nullptr;
}
// What is wrong with an access by the running block, or null.
inline CAT_UNCHECKED const char* read_fault(uint64_t address, uint64_t size) {
  const uint32_t* found = writers(address);
  for (uint64_t i = 0; found && i < size; ++i) {
    if (found[i] == outside) return "reads outside of what is allocated";
    if (found[i] == unwritten) return "reads what nothing has written";
    if (found[i] >= memory().launch && found[i] != memory().block) return "reads what another block of the launch writes";
  }
  return nullptr;
}
inline CAT_UNCHECKED const char* write_fault(uint64_t address, uint64_t size) {
  uint32_t* found = writers(address);
  for (uint64_t i = 0; found && i < size; ++i) {
    if (found[i] == outside) return "writes outside of what is allocated";
    if (found[i] >= memory().launch && found[i] != memory().block) return "writes what another block of the launch writes";
    found[i] = memory().block;
  }
  return nullptr;
}
}  // namespace cat
