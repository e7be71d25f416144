// Half precision for the emulator: stored in 16 bits, computed in float.
#pragma once
struct half {
  _Float16 value;
  half() = default;
  half(float v) : value(_Float16(v)) {}
  operator float() const { return float(value); }
};
using __half = half;
inline float __half2float(half v) { return v; }
inline half __float2half(float v) { return half(v); }
inline half __float2half_rn(float v) { return half(v); }
struct alignas(4) __half2 {
  half x, y;
};
inline bool __hgt(half a, half b) { return float(a) > float(b); }
inline bool __hlt(half a, half b) { return float(a) < float(b); }
