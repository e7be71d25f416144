"""Device functions that the CUDA kernels call and CUDA C++ has no name for."""

from __future__ import annotations

__all__ = ["PRELUDE"]

PRELUDE = """\
template <class T, class V> static __device__ __forceinline__ void cat_store2(T* to, V first, V second) {
  struct alignas(2 * sizeof(T)) Pair { T first, second; };
  *reinterpret_cast<Pair*>(to) = Pair{T(first), T(second)};
}
// Tensor core product, m16n8k32: sums[4] += a[4] (16 x 32, row) * b[2] (32 x 8, column), bytes to int32.
#ifdef CAT_EMULATOR
template <class A> inline CAT_UNCHECKED void cat_mma_emulated(int* sums, const int* a, const int* b) {
  struct Fragments { int a[4], b[2]; } own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  cat::share(own);
  const unsigned lane = cat::machine().self->lane;
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + (i & 2 ? 8 : 0), column = lane % 4 * 2 + (i & 1);
    for (unsigned k = 0; k < 32; ++k) {
      const Fragments left = cat::of_lane<Fragments>(row % 8 * 4 + k % 16 / 4);
      const Fragments right = cat::of_lane<Fragments>(column * 4 + k % 16 / 4);
      sums[i] += cat_bytes<A, void*>(left.a[(row >= 8) + 2 * (k >= 16)], k % 4) *
                 cat_bytes<int8_t, void*>(right.b[k >= 16], k % 4);
    }
  }
  cat::wait(cat::at_warp);
}
inline void cat_mma_s8(int* sums, const int* a, const int* b) { cat_mma_emulated<int8_t>(sums, a, b); }
inline void cat_mma_u8(int* sums, const int* a, const int* b) { cat_mma_emulated<uint8_t>(sums, a, b); }
inline int cat_dp4a_u8(int a, int b, int c) {
  for (unsigned i = 0; i < 4; ++i) c += cat_bytes<uint8_t, void*>(a, i) * cat_bytes<int8_t, void*>(b, i);
  return c;
}
#else
// Four products of unsigned by signed bytes, for which CUDA C++ has no intrinsic.
static __device__ __forceinline__ int cat_dp4a_u8(int a, int b, int c) {
  int sum;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
#define CAT_MMA(name, type)                                                                               \\
  static __device__ __forceinline__ void name(int* sums, const int* a, const int* b) {                    \\
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." type ".s8.s32 "                                 \\
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                  \\
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])                             \\
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \\
  }
CAT_MMA(cat_mma_s8, "s8")
CAT_MMA(cat_mma_u8, "u8")
#undef CAT_MMA
#endif
"""
