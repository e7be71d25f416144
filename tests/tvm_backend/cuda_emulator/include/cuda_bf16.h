// bfloat16 for the emulator: stored in 16 bits, rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float v) {
    uint32_t word;
    std::memcpy(&word, &v, 4);
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? 0x7fc0 : uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float v;
    std::memcpy(&v, &word, 4);
    return v;
  }
};
using __nv_bfloat16 = nv_bfloat16;
inline float __bfloat162float(nv_bfloat16 v) { return v; }
inline nv_bfloat16 __float2bfloat16(float v) { return nv_bfloat16(v); }
inline nv_bfloat16 __float2bfloat16_rn(float v) { return nv_bfloat16(v); }
