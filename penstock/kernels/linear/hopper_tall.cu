// y = act(x w^T + bias), or act(gate) * up over the two halves of w's rows, for some hundred tokens, few of them padding.
//
// The rows of w are the tall operand, the tokens the other: a tile has as many as divide the step evenly. A *unit* is
// 64 rows of w (gated: 32 of gate and the 32 of up that belong to them, eight of each in turn, so that a thread has
// both numbers of a pair). A cluster of two blocks walks over a stretch
// of units, in passes of up to HEIGHT a block, so that all multiprocessors get nearly the same work although 64 rows
// times a tile's tokens are coarse. The two blocks of a cluster work on the same rows and different tokens (SHARE_W) or
// on the same tokens and different rows; what they have in common is copied to both at once.
// Where there are few units, SPLIT clusters share the columns of K and add their parts up in the workspace, in order.
//
// Constants, all macros:
//   N, K; FORMAT (bf16, f16); OUT_BYTES (2: FORMAT, 4: float32); BIAS_BYTES (likewise; 0: none)
//   ACT (0: none; others as in values.cuh), GATED (0 or 1)
//   TILE_T, TILE_T_16: tokens of a tile, and as hopper.cuh names them: TILE_T / 16, with an H where eight are left
//   HEIGHT (units that the two warp groups take in a pass, in turn), STAGES
//   SHARE_W, SPLIT, ALONG (clusters that the units are dealt to)
//   STREAM (1: w is read about once, and had better not stay in the L2)
#define ROWS TILE_T  // hopper.cuh's name for the columns of a warp group's product
#define ROWS_16 TILE_T_16
#include "hopper.cuh"
#include "values.cuh"

constexpr int OUT_N = GATED ? N / 2 : N;
constexpr int UNIT_N = GATED ? 32 : 64;           // columns of y
constexpr int UNITS = (OUT_N + UNIT_N - 1) / UNIT_N;
constexpr int PER_GROUP = (HEIGHT + 1) / 2;       // units of the first warp group
constexpr int SIDES = SHARE_W ? 1 : 2;            // blocks of a cluster that have rows of their own
constexpr int PASSES = ((UNITS + ALONG - 1) / ALONG + SIDES * HEIGHT - 1) / (SIDES * HEIGHT);
constexpr int DEPTH = 64;                         // columns of x and w in a stage
constexpr int STEPS = ((K + DEPTH - 1) / DEPTH + SPLIT - 1) / SPLIT;  // of a block; what is beyond K is zero
constexpr int LINE = 2 * DEPTH;                   // bytes
constexpr int UNIT_BYTES = 64 * LINE, X_BYTES = TILE_T * LINE;
constexpr int STAGE_BYTES = HEIGHT * UNIT_BYTES + X_BYTES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr bool TURNS = GATED && OUT_N % 8 == 0;   // gate and up come in turn by themselves; else box by box
constexpr int BOX = GATED && !TURNS ? 8 : 32;     // rows of w that are copied at once
constexpr int BOX_BYTES = BOX * LINE, BOXES = 64 / BOX;
constexpr int CONSUMERS = 256;                    // threads; the producer is one of those behind them
constexpr int THREADS = CONSUMERS + 128;
constexpr int RUNS = TILE_T / 8;                  // of eight tokens, in a tile
constexpr int COUPLES = (RUNS + 1) / 2;
constexpr int RUN_PARTS = PER_GROUP * RUNS;       // runs of a thread

static_assert(TILE_T % (SHARE_W ? 8 : 16) == 0 && TILE_T <= 256, "whole patterns of the swizzle are copied");
static_assert(HEIGHT >= 1 && HEIGHT <= 4, "more do not fit the registers");
static_assert(SPLIT == 1 || (PASSES == 1 && !GATED && SPLIT <= COUPLES), "parts are added up once, and run by run");

extern __shared__ __align__(1024) char ring[];

// The stages of a ring in turn, and the parity of the round.
struct Turn {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// What a block works on in a pass.
struct Tile {
  int first, count;  // units
  int token;
};

// Where a block stands. Clusters that differ in tokens or in columns of K alone are neighbours: w comes from memory
// once, and those that wait for one another start together, so a split ends even where not all find room at once.
struct Place {
  int along, pair, split, rank, pairs;
  __device__ __forceinline__ explicit Place(int tokens) {
    const int tiles = (tokens + TILE_T - 1) / TILE_T, cluster = blockIdx.x / 2;
    pairs = SHARE_W ? (tiles + 1) / 2 : tiles;
    rank = cluster_rank();
    pair = cluster % pairs;
    split = cluster / pairs % SPLIT;
    along = cluster / pairs / SPLIT;
  }
  __device__ __forceinline__ Tile tile(int pass) const {
    const int begin = UNITS * along / ALONG, count = UNITS * (along + 1) / ALONG - begin;
    const int piece = SHARE_W ? pass : 2 * pass + rank, pieces = PASSES * SIDES;
    const int first = count * piece / pieces, last = count * (piece + 1) / pieces;
    return {begin + first, last - first, (SHARE_W ? 2 * pair + rank : pair) * TILE_T};
  }
};

__device__ __forceinline__ u32 stage_at(int stage) { return shared_address(ring) + stage * STAGE_BYTES; }
__device__ __forceinline__ u32 full(int stage) { return shared_address(ring) + RING_BYTES + 8 * stage; }
__device__ __forceinline__ u32 empty(int stage) { return full(stage) + 8 * STAGES; }

// Where the rows of a box begin, after those of its unit: gate and up take turns.
__device__ __forceinline__ int row_of(int box) {
  if (TURNS) return box * BOX / 2;
  return GATED ? box % 2 * OUT_N + box / 2 * BOX : box * BOX;
}

__device__ __forceinline__ void copy_w(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  constexpr u64 policy = STREAM ? READ_ONCE : READ_AGAIN;
  if (TURNS && SHARE_W) copy_turns_to_both(to, map, column, row / 8, barrier, policy);
  else if (TURNS) copy_turns(to, map, column, row / 8, barrier, policy);
  else if (SHARE_W) copy_box_to_both(to, map, column, row, barrier, policy);
  else copy_box(to, map, column, row, barrier, policy);
}

__device__ __forceinline__ void load_w(const TensorMap* map, int stage, Tile tile, int step, int rank) {
  expect_bytes(full(stage), tile.count * UNIT_BYTES + X_BYTES);
  constexpr int own = SHARE_W ? BOXES / 2 : BOXES;  // of a unit, that this block copies
  const int first = SHARE_W ? rank * own : 0;
  u32 to = stage_at(stage) + first * BOX_BYTES;
  int row = tile.first * UNIT_N + row_of(first);
#pragma unroll 1
  for (int unit = 0; unit < tile.count; unit++, to += UNIT_BYTES, row += UNIT_N) {
#pragma unroll 2  // the producer has few registers
    for (int box = 0; box < own; box++)
      copy_w(to + box * BOX_BYTES, map, step * DEPTH, row + row_of(box), full(stage));
  }
}

__device__ __forceinline__ void load_x(const TensorMap* map, int stage, Tile tile, int step, int rank) {
  constexpr u64 policy = STREAM ? READ_OFTEN : READ_AGAIN;
  const int half = SHARE_W ? 0 : rank, token = tile.token + half * (TILE_T / 2);
  const u32 to = stage_at(stage) + HEIGHT * UNIT_BYTES + half * (X_BYTES / 2);
  if (SHARE_W) copy_box(to, map, step * DEPTH, token, full(stage), policy);
  else copy_box_to_both(to, map, step * DEPTH, token, full(stage), policy);
}

__device__ __forceinline__ void produce(const TensorMap* x, const TensorMap* w, Place place) {
  constexpr int ahead = STAGES < STEPS ? STAGES : STEPS;
  const int first = place.split * STEPS, last = first + STEPS;
  const Tile own = place.tile(0);
  // No kernel of a step writes w: its first stages are fetched while the predecessor still runs.
  for (int i = 0; i < ahead; i++) load_w(w, i, own, first + i, place.rank);
  wait_for_predecessor();
  for (int i = 0; i < ahead; i++) load_x(x, i, own, first + i, place.rank);
  Turn turn{ahead % STAGES, ahead == STAGES ? 1u : 0u};
  for (int pass = 0; pass < PASSES; pass++) {
    const Tile tile = place.tile(pass);
    for (int step = pass ? first : first + ahead; step < last; step++, turn.next()) {
      wait_parity(empty(turn.stage), turn.parity ^ 1);
      load_w(w, turn.stage, tile, step, place.rank);
      load_x(x, turn.stage, tile, step, place.rank);
    }
  }
  // No block ends while the other may still tell it that it has freed a stage.
  for (int i = 0; i < STAGES; i++, turn.next()) wait_parity(empty(turn.stage), turn.parity ^ 1);
}

__device__ __forceinline__ void release(int stage) {
  if (threadIdx.x % 128) return;
  for (int rank = 0; rank < 2; rank++) arrive_at(empty(stage), rank);
}

using Sums = float[PER_GROUP][TILE_T / 2];

__device__ __forceinline__ void add_product(float (&d)[TILE_T / 2], u32 w, u32 x) {
  u64 a = tile_of(w), b = tile_of(x);
  PRODUCT(d, a, b);
}

// The products of OWN units: those at 0 and 2 of the stage for the first warp group, at 1 and 3 for the second.
template <int OWN> __device__ __forceinline__ void multiply(Sums& d, int group, Turn& turn) {
#pragma unroll
  for (int u = 0; u < OWN; u++) {
#pragma unroll
    for (int i = 0; i < TILE_T / 2; i++) d[u][i] = 0.0f;
  }
  int previous = -1;
  for (int step = 0; step < STEPS; step++, turn.next()) {
    wait_parity(full(turn.stage), turn.parity);
    const u32 w = stage_at(turn.stage) + group * UNIT_BYTES, x = stage_at(turn.stage) + HEIGHT * UNIT_BYTES;
    if constexpr (OWN > 0) product_begin();
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++) {
#pragma unroll
      for (int u = 0; u < OWN; u++) add_product(d[u], w + 2 * u * UNIT_BYTES + 32 * i, x + 32 * i);
      // The stage before is free as soon as its products are done, which is when the first of this one begin.
      if (i == 0) {
        if constexpr (OWN > 0) product_commit(), product_wait<1>();
        if (previous >= 0) release(previous);
      }
    }
    if constexpr (OWN > 0) product_commit();
    previous = turn.stage;
  }
  product_wait<0>();
  if (previous >= 0) release(previous);
}

__device__ __forceinline__ void store_one(void* y, int token, int n, int tokens, float value) {
  if (token >= tokens || n >= OUT_N) return;
  const long long at = static_cast<long long>(token) * OUT_N + n;
  if constexpr (OUT_BYTES == 4) static_cast<float*>(y)[at] = value;
  else static_cast<u16*>(y)[at] = static_cast<u16>(rounded_pair<BF16>(value, value));
}

// Two runs of eight tokens, each by 16 columns of y from n on: four numbers of a run are in a lane, two (tokens
// 2 (lane % 4) and the next) of column lane / 4 and two of the column eight on. A negative token: no such run.
__device__ __forceinline__ void store_runs(void* y, const float (&v)[2][4], const int (&token)[2], int n, int tokens) {
  const int lane = threadIdx.x % 32;
  if constexpr (OUT_BYTES == 2 && OUT_N % 8 == 0) {
    u32 p[4];
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = transposed(rounded_pair<BF16>(v[i / 2][i % 2 * 2], v[i / 2][i % 2 * 2 + 1]));
    trade_runs(p);
    const int run = lane & 2 ? token[1] : token[0], t = run + lane / 4, column = n + lane % 2 * 8;
    u16* to = static_cast<u16*>(y) + static_cast<long long>(t) * OUT_N + column;
    if (run >= 0 && t < tokens && column < OUT_N) *reinterpret_cast<uint4*>(to) = make_uint4(p[0], p[1], p[2], p[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int run = token[i / 4];
      if (run >= 0) store_one(y, run + lane % 4 * 2 + i % 2, n + lane / 4 + i % 4 / 2 * 8, tokens, v[i / 4][i % 4]);
    }
  }
}

// Which block of a split adds up and stores a couple of runs.
__device__ constexpr int owner_of(int couple) { return couple * SPLIT / COUPLES; }
// The first couple of a block, and the first run.
__device__ constexpr int first_of(int split) { return (split * COUPLES + SPLIT - 1) / SPLIT; }
__device__ constexpr int first_run(int split) { return split < SPLIT ? 2 * first_of(split) : RUNS; }

// Of each run of eight tokens by 16 rows, the upper eight are gate and the lower eight their up: four runs of eight
// tokens and eight columns of y at a time.
__device__ __forceinline__ void store_gated(const float (&d)[TILE_T / 2], void* y, int unit, int token, int tokens) {
  const int lane = threadIdx.x % 32, n = unit * 32 + threadIdx.x % 128 / 32 * 8;
#pragma unroll
  for (int begin = 0; begin < RUNS; begin += 4) {
    float v[4][2];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int at = begin + i / 2 < RUNS ? 4 * (begin + i / 2) + i % 2 : 0;
      v[i / 2][i % 2] = activated<ACT>(d[at]) * d[at + 2];
    }
    if constexpr (OUT_BYTES == 2 && OUT_N % 8 == 0) {
      u32 p[4];
#pragma unroll
      for (int i = 0; i < 4; i++) p[i] = transposed(rounded_pair<BF16>(v[i][0], v[i][1]));
      trade_runs(p);
      const int run = begin + lane % 4, t = token + run * 8 + lane / 4;
      u16* to = static_cast<u16*>(y) + static_cast<long long>(t) * OUT_N + n;
      if (run < RUNS && t < tokens && n < OUT_N) *reinterpret_cast<uint4*>(to) = make_uint4(p[0], p[1], p[2], p[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int t = token + (begin + i / 2) * 8 + lane % 4 * 2 + i % 2;
        if (begin + i / 2 < RUNS) store_one(y, t, n + lane / 4, tokens, v[i / 2][i % 2]);
      }
    }
  }
}

__device__ __forceinline__ void put_far(float4* to, float a, float b, float c, float e) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(e) : "memory");
}
__device__ __forceinline__ float4 take_far(const float4* from) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
}

// Arrives at a counter that 2 SPLIT arrivals bring back to zero: SPLIT before the reading, SPLIT behind it.
__device__ __forceinline__ void count_up(u32* counter) {
  asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(counter), "n"(2 * SPLIT - 1) : "memory");
}
__device__ __forceinline__ void await_all(const u32* counter) {
  u32 seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen < SPLIT);
}

// What a warp shares with the same warp of the other blocks of a split: runs that each leaves to their owner; a count.
struct Shares {
  float4* runs;
  u32* counter;
  __device__ __forceinline__ Shares(float4* parts, u32* counters, Place place) {
    const int tile = (place.along * place.pairs + place.pair) * 2 + place.rank;
    runs = parts + static_cast<long long>(tile) * SPLIT * RUN_PARTS * CONSUMERS + threadIdx.x;
    counter = counters + tile * (CONSUMERS / 32) + threadIdx.x / 32;
  }
  __device__ __forceinline__ float4* at(int split, int u, int run) const {
    return runs + ((split * PER_GROUP + u) * RUNS + run) * CONSUMERS;
  }
};

template <int SPLIT_RANK> __device__ __forceinline__ void leave(const Sums& d, int own, Shares shares) {
#pragma unroll
  for (int u = 0; u < PER_GROUP; u++) {
    if (u >= own) continue;
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
      if (owner_of(run / 2) == SPLIT_RANK) continue;
      put_far(shares.at(SPLIT_RANK, u, run), d[u][4 * run], d[u][4 * run + 1], d[u][4 * run + 2], d[u][4 * run + 3]);
    }
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    count_up(shares.counter);
    await_all(shares.counter);
  }
  __syncwarp();
}

// The sums over the split of the runs that a block owns, always in the order of K. All loads are under way at once.
template <int SPLIT_RANK> __device__ __forceinline__ void add_up(float (&d)[TILE_T / 2], Shares shares, int u) {
  constexpr int FIRST = first_run(SPLIT_RANK), LAST = first_run(SPLIT_RANK + 1);
  float4 part[SPLIT][LAST - FIRST];
#pragma unroll
  for (int from = 0; from < SPLIT; from++) {
#pragma unroll
    for (int run = FIRST; run < LAST; run++) {
      if (from != SPLIT_RANK) part[from][run - FIRST] = take_far(shares.at(from, u, run));
      else part[from][run - FIRST] = make_float4(d[4 * run], d[4 * run + 1], d[4 * run + 2], d[4 * run + 3]);
    }
  }
#pragma unroll
  for (int run = FIRST; run < LAST; run++) {
    float4 sum = part[0][run - FIRST];
#pragma unroll
    for (int from = 1; from < SPLIT; from++) {
      const float4 next = part[from][run - FIRST];
      sum = make_float4(sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w);
    }
    d[4 * run] = sum.x, d[4 * run + 1] = sum.y, d[4 * run + 2] = sum.z, d[4 * run + 3] = sum.w;
  }
}

template <int SPLIT_RANK>
__device__ __forceinline__ void store_plain(const float (&d)[TILE_T / 2], const void* bias, void* y, int unit,
                                            int token, int tokens) {
  const int n = unit * 64 + threadIdx.x % 128 / 32 * 16, row = n + threadIdx.x % 32 / 4;
  const float offset[2] = {bias_at<OUT_N>(bias, row), bias_at<OUT_N>(bias, row + 8)};
#pragma unroll
  for (int couple = first_of(SPLIT_RANK); couple < first_of(SPLIT_RANK + 1); couple++) {
    const bool whole = 2 * couple + 1 < RUNS;
    const int t = token + couple * 16, at[2] = {t, whole ? t + 8 : -1};
    float v[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++)
      v[i / 4][i % 4] = activated<ACT>(d[8 * couple + (whole ? i : i % 4)] + offset[i % 4 / 2]);
    store_runs(y, v, at, n, tokens);
  }
}

// What block SPLIT_RANK of a split does with its sums. A constant, so that registers are free as soon as they are left.
template <int SPLIT_RANK>
__device__ __forceinline__ void finish(Sums& d, int own, Shares shares, const void* bias, void* y, Place place,
                                       Tile tile, int tokens) {
  if constexpr (SPLIT_RANK + 1 < SPLIT) {
    if (place.split != SPLIT_RANK) return finish<SPLIT_RANK + 1>(d, own, shares, bias, y, place, tile, tokens);
  }
  if constexpr (SPLIT > 1) leave<SPLIT_RANK>(d, own, shares);
#pragma unroll
  for (int u = 0; u < PER_GROUP; u++) {
    if (u >= own) continue;
    const int unit = tile.first + threadIdx.x / 128 + 2 * u;
    if constexpr (SPLIT > 1) add_up<SPLIT_RANK>(d[u], shares, u);
    if constexpr (GATED) store_gated(d[u], y, unit, tile.token, tokens);
    else store_plain<SPLIT_RANK>(d[u], bias, y, unit, tile.token, tokens);
  }
  if constexpr (SPLIT > 1) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) count_up(shares.counter);
  }
}

__device__ __forceinline__ void consume(const void* bias, void* y, float4* parts, u32* counters, int tokens,
                                        Place place) {
  const int group = threadIdx.x / 128;
  const Shares shares(parts, counters, place);
  Turn turn;
  wait_for_predecessor();
  for (int pass = 0; pass < PASSES; pass++) {
    const Tile tile = place.tile(pass);
    const int own = (tile.count + 1 - group) / 2;
    Sums d;
    if (PER_GROUP == 2 && own == 2) multiply<PER_GROUP>(d, group, turn);
    else if (own == 1) multiply<1>(d, group, turn);
    else multiply<0>(d, group, turn);
    finish<0>(d, own, shares, bias, y, place, tile, tokens);
  }
}

__device__ __forceinline__ void set_up(const TensorMap* x, const TensorMap* w) {
  if (threadIdx.x == 0) {
    if (shared_address(ring) % 1024) __trap();
    fetch_map(x), fetch_map(w);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), 2 * 2);  // two warp groups of two blocks
    }
    publish_barriers();
  }
  cluster_meet();
  launch_dependents();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(2, 1, 1)
hopper_tall(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
#if BIAS_BYTES
            const void* bias,
#endif
            void* y,
#if SPLIT > 1
            float4* parts, u32* counters,
#endif
            int tokens) {
#if !BIAS_BYTES
  const void* bias = nullptr;
#endif
#if SPLIT == 1
  float4* parts = nullptr;
  u32* counters = nullptr;
#endif
  const Place place(tokens);
  set_up(&x, &w);
  if (threadIdx.x >= CONSUMERS) {
    give_registers<24>();
    if (threadIdx.x == CONSUMERS) produce(&x, &w, place);
    __syncwarp();
  } else {
    take_registers<240>();
    consume(bias, y, parts, counters, tokens, place);
  }
}
