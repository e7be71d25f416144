/* The AMX instructions that kernels use, one C function each, by Intel's description of them.

   Whatever the processor would refuse with a fault is counted in `faults`. */
#include <stdint.h>
#include <string.h>

typedef struct {
  uint8_t configured, rows[8];
  uint16_t columns[8];
  uint8_t data[8][16][64];
} Tiles;

static _Thread_local Tiles tiles;
int faults, configurations, releases, products;

static int usable(int tile) {
  if (tiles.configured && tiles.rows[tile] && tiles.columns[tile]) return 1;
  __atomic_fetch_add(&faults, 1, __ATOMIC_RELAXED);
  return 0;
}

int emulated_ldtilecfg(const uint8_t* configuration) {
  memset(&tiles, 0, sizeof tiles);
  int good = configuration[0] == 1 && configuration[1] == 0;
  for (int i = 2; i < 64; ++i) {
    int reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (reserved && configuration[i]) good = 0;
  }
  for (int tile = 0; tile < 8; ++tile) {
    memcpy(&tiles.columns[tile], configuration + 16 + 2 * tile, 2);
    tiles.rows[tile] = configuration[48 + tile];
    if (tiles.columns[tile] > 64 || tiles.rows[tile] > 16) good = 0;
  }
  tiles.configured = (uint8_t)good;
  if (!good) __atomic_fetch_add(&faults, 1, __ATOMIC_RELAXED);
  __atomic_fetch_add(&configurations, 1, __ATOMIC_RELAXED);
  return 0;
}

int emulated_tilerelease(void) {
  memset(&tiles, 0, sizeof tiles);
  __atomic_fetch_add(&releases, 1, __ATOMIC_RELAXED);
  return 0;
}

int emulated_tilezero(int8_t tile) {
  if (usable(tile)) memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  return 0;
}

int emulated_tileloadd64(int8_t tile, const uint8_t* base, int64_t pitch) {
  if (!usable(tile)) return 0;
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int row = 0; row < tiles.rows[tile]; ++row)
    memcpy(tiles.data[tile][row], base + row * pitch, tiles.columns[tile]);
  return 0;
}

int emulated_tilestored64(int8_t tile, uint8_t* base, int64_t pitch) {
  if (!usable(tile)) return 0;
  for (int row = 0; row < tiles.rows[tile]; ++row)
    memcpy(base + row * pitch, tiles.data[tile][row], tiles.columns[tile]);
  return 0;
}

static int product(int c, int a, int b, int is_signed) {
  if (!usable(c) || !usable(a) || !usable(b)) return 0;
  if (tiles.rows[c] != tiles.rows[a] || tiles.columns[c] != tiles.columns[b] ||
      tiles.columns[a] != 4 * tiles.rows[b] || c == a || c == b || a == b) {
    __atomic_fetch_add(&faults, 1, __ATOMIC_RELAXED);
    return 0;
  }
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int k = 0; k < tiles.rows[b]; ++k)
      for (int n = 0; n < tiles.columns[c] / 4; ++n) {
        int32_t sum;
        memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i) {
          uint8_t x = tiles.data[a][m][4 * k + i];
          sum += (is_signed ? (int8_t)x : x) * (int8_t)tiles.data[b][k][4 * n + i];
        }
        memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
      }
  __atomic_fetch_add(&products, 1, __ATOMIC_RELAXED);
  return 0;
}

int emulated_tdpbusd(int8_t c, int8_t a, int8_t b) { return product(c, a, b, 0); }
int emulated_tdpbssd(int8_t c, int8_t a, int8_t b) { return product(c, a, b, 1); }
