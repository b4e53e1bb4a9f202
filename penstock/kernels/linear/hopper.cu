// y = act(x w^T + bias), or act(gate) * up over the two halves of w's rows. x: [tokens, K], w: [N, K], both row-major.
//
// A producer thread fills a ring of stages by bulk tensor copies; WARP_GROUPS consumer warp groups multiply, each 64
// tokens (the tall operand) by ROWS rows of w. Blocks of a cluster share a tile of w (SHARE: they differ in tokens), or
// a tile of y (SPLIT: they differ in columns of K, and add their shares up in order).
//
// Constants, all macros:
//   N, K; FORMAT (bf16, f16); OUT_BYTES (2: FORMAT, 4: float32); BIAS_BYTES (likewise; 0: none)
//   ACT (0: none; others as in values.cuh), GATED (0 or 1)
//   WARP_GROUPS, ROWS, ROWS_16 (ROWS / 16), STAGES, SHARE, SPLIT, BLOCKS (on one multiprocessor)
//   X_ROWS (of x that a tile loads; products read on into w, which makes rows of y that nothing stores)
//   GROUP (tiles of tokens that share a stretch of w in the L2)
//   PERSISTENT (1: blocks walk over tiles, and free a stage while the next one is multiplied)
//   STREAM (1: w is read about once, and had better not stay in the L2)
//   PARTS, EPS (0: nothing; else x w^T is divided by the root of the mean squares, over K, of rows of which squares
//     float32[tokens, PARTS] holds shares)
//   RESIDUAL, OFFSET (1: y = x w^T + residual, scaled = y * (gain + OFFSET), and shares float32[tokens, tiles * SPLIT]
//     gets the sums of y^2 over each tile's columns)
//   EXPERTS (0: none; else w is [EXPERTS, N, K], owners[i] the one that the i-th TILE_T * SHARE tokens go to, and *used
//     how many tokens there are, both made by the step)
#include "hopper.cuh"
#include "values.cuh"

constexpr int OUT_N = GATED ? N / 2 : N;
constexpr int TILE_N = GATED ? ROWS / 2 : ROWS;  // columns of y
constexpr int TILES_ACROSS = (OUT_N + TILE_N - 1) / TILE_N;
constexpr int TILE_T = 64 * WARP_GROUPS;
constexpr int DEPTH = 64;                         // columns of x and w in a stage
constexpr int STEPS = (K + DEPTH - 1) / DEPTH;
constexpr int LINE = 2 * DEPTH;                   // bytes
constexpr int HALF_BYTES = ROWS / 2 * LINE, W_BYTES = 2 * HALF_BYTES, X_BYTES = X_ROWS * LINE;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr int CLUSTER = SHARE * SPLIT;
constexpr int CONSUMERS = 128 * WARP_GROUPS;      // threads; the producer is one of those behind them
constexpr bool MOVES_REGISTERS = WARP_GROUPS > 1;  // from a whole producer warp group to the consumers
constexpr int THREADS = CONSUMERS + (MOVES_REGISTERS ? 128 : 32);
constexpr int MATRICES = GATED ? 2 : 1;
constexpr int VALUES = ROWS / 2 / MATRICES;       // of y, per thread
constexpr int RUNS = VALUES / 4;                  // of eight columns, in a tile
constexpr int PAIRS = (RUNS + SPLIT - 1) / SPLIT * 2 * MATRICES;  // that another block sends to a thread
constexpr int MAIL_BYTES = (SPLIT - 1) * PAIRS * CONSUMERS * 8;

static_assert(ROWS % 16 == 0 && ROWS <= 256 && ROWS == 16 * ROWS_16, "a warp group's product has 16 .. 256 rows of w");
static_assert(SHARE <= 2 && (SHARE == 1 || SPLIT == 1), "a cluster shares one thing");
static_assert(SPLIT == 1 || !PERSISTENT, "the exchange of a split is for one tile");
static_assert(X_ROWS % 8 == 0 && X_ROWS + ROWS >= TILE_T, "whole patterns of the swizzle, and all within the stage");
static_assert(!RESIDUAL || (OUT_BYTES == 2 && OUT_N % 8 == 0 && !GATED), "a residual stream of whole runs");
static_assert(SPLIT <= RUNS, "a block of a split adds up at least a run of columns");

extern __shared__ __align__(1024) char ring[];

struct Tile {
  int token, column;  // of y, where it begins
  int down;           // which of the tiles of tokens
};

// Where the numbers beside the product are; null where there are none.
struct Beside {
  const void* bias;
  const float* squares;
  const u16 *residual, *gain;
  u16* scaled;
  float* shares;
  const int *owners, *used;
};

__device__ __forceinline__ int clusters() { return gridDim.x / CLUSTER; }

__device__ __forceinline__ int tiles_down(int tokens) { return (tokens + TILE_T * SHARE - 1) / (TILE_T * SHARE); }

__device__ __forceinline__ int tiles(int tokens) { return tiles_down(tokens) * TILES_ACROSS; }

// GROUP tiles of tokens go together along w, so that w comes from memory once for all of them.
__device__ __forceinline__ Tile tile_at(int index, int tokens, int rank) {
  const int top = index / (GROUP * TILES_ACROSS) * GROUP;
  const int height = min(tiles_down(tokens) - top, GROUP);
  const int within = index - top * TILES_ACROSS;
  const int down = top + within % height, along = within / height;
  return {(down * SHARE + (SHARE > 1 ? rank : 0)) * TILE_T, along * TILE_N, down};
}

// The stages of a ring in turn, and the parity of the round.
struct Turn {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ u32 stage_at(int stage) { return shared_address(ring) + stage * STAGE_BYTES; }
__device__ __forceinline__ u32 full(int stage) { return shared_address(ring) + RING_BYTES + MAIL_BYTES + 8 * stage; }
__device__ __forceinline__ u32 empty(int stage) { return full(stage) + 8 * STAGES; }
__device__ __forceinline__ u32 arrived() { return full(2 * STAGES); }

// `top`: the row of w at which those of the tile's expert begin.
__device__ __forceinline__ void load_w(const TensorMap* map, int stage, Tile tile, int top, int step, int rank) {
  expect_bytes(full(stage), STAGE_BYTES);
  constexpr u64 policy = STREAM ? READ_ONCE : READ_AGAIN;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = top + tile.column + half * (GATED ? OUT_N : ROWS / 2);
    const u32 to = stage_at(stage) + X_BYTES + half * HALF_BYTES;
    if (SHARE == 1) copy_box(to, map, step * DEPTH, row, full(stage), policy);
    else if (half == rank) copy_box_to_both(to, map, step * DEPTH, row, full(stage), policy);
  }
}

__device__ __forceinline__ void load_x(const TensorMap* map, int stage, Tile tile, int step) {
  copy_box(stage_at(stage), map, step * DEPTH, tile.token, full(stage), STREAM ? READ_OFTEN : READ_AGAIN);
}

// The steps along K that fall to a block.
__device__ __forceinline__ int first_step(int rank) { return SPLIT == 1 ? 0 : STEPS * rank / SPLIT; }
__device__ __forceinline__ int last_step(int rank) { return SPLIT == 1 ? STEPS : STEPS * (rank + 1) / SPLIT; }

__device__ __forceinline__ int expert_row(const Beside& beside, Tile tile) {
  return EXPERTS ? beside.owners[tile.down] * N : 0;
}

// With experts, only the step knows how many tokens there are.
__device__ __forceinline__ int token_count(const Beside& beside, int tokens) {
  if constexpr (EXPERTS == 0) return tokens;
  wait_for_predecessor();
  return *beside.used;
}

__device__ __forceinline__ void produce(const TensorMap* x, const TensorMap* w, const Beside& beside, int given,
                                        int rank) {
  const int tokens = token_count(beside, given);
  const int first = first_step(rank), last = last_step(rank), begin = blockIdx.x / CLUSTER;
  const int ahead = begin < tiles(tokens) ? min(STAGES, last - first) : 0;
  const Tile own = tile_at(begin, tokens, rank);
  const int own_top = ahead ? expert_row(beside, own) : 0;
  // No kernel of a step writes w: its first stages are fetched while the predecessor still runs.
  for (int i = 0; i < ahead; i++) load_w(w, i, own, own_top, first + i, rank);
  wait_for_predecessor();
  for (int i = 0; i < ahead; i++) load_x(x, i, own, first + i);
  Turn turn{ahead % STAGES, ahead == STAGES ? 1u : 0u};
  for (int index = begin; index < tiles(tokens); index += clusters()) {
    const Tile tile = tile_at(index, tokens, rank);
    const int top = expert_row(beside, tile);
    for (int step = index == begin ? first + ahead : first; step < last; step++, turn.next()) {
      wait_parity(empty(turn.stage), turn.parity ^ 1);
      load_w(w, turn.stage, tile, top, step, rank);
      load_x(x, turn.stage, tile, step);
    }
  }
  // No block ends while others may still tell it that they have freed a stage.
  if constexpr (SHARE > 1) {
    for (int i = 0; i < STAGES; i++, turn.next()) wait_parity(empty(turn.stage), turn.parity ^ 1);
  }
}

__device__ __forceinline__ void release(int stage) {
  if (threadIdx.x % 128) return;
  if constexpr (SHARE == 1) {
    arrive(empty(stage));
  } else {
    for (int rank = 0; rank < CLUSTER; rank++) arrive_at(empty(stage), rank);
  }
}

__device__ __forceinline__ void multiply(float (&d)[ROWS / 2], int group, int steps, Turn& turn) {
#pragma unroll
  for (int i = 0; i < ROWS / 2; i++) d[i] = 0.0f;
  int previous = -1;
  for (int step = 0; step < steps; step++, turn.next()) {
    wait_parity(full(turn.stage), turn.parity);
    const u32 x = stage_at(turn.stage) + group * 64 * LINE, w = stage_at(turn.stage) + X_BYTES;
    product_begin();
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++) {
      u64 a = tile_of(x + 32 * i), b = tile_of(w + 32 * i);
      PRODUCT(d, a, b);
    }
    product_commit();
    product_wait<PERSISTENT>();
    if (!PERSISTENT) release(turn.stage);
    if (PERSISTENT && previous >= 0) release(previous);
    previous = turn.stage;
  }
  product_wait<0>();
  if (PERSISTENT && previous >= 0) release(previous);
}

// Two neighbouring numbers of a row of y.
__device__ __forceinline__ void store_pair(void* y, int token, int n, int tokens, float a, float b) {
  if (token >= tokens || n >= OUT_N) return;
  const long long at = static_cast<long long>(token) * OUT_N + n;
  if constexpr (OUT_BYTES == 4) {
    float* to = static_cast<float*>(y) + at;
    if (OUT_N % 2 == 0) {
      *reinterpret_cast<float2*>(to) = make_float2(a, b);
    } else {
      to[0] = a;
      if (n + 1 < OUT_N) to[1] = b;
    }
  } else {
    u16* to = static_cast<u16*>(y) + at;
    const u32 both = rounded_pair<BF16>(a, b);
    if (OUT_N % 2 == 0) {
      *reinterpret_cast<u32*>(to) = both;
    } else {
      to[0] = static_cast<u16>(both);
      if (n + 1 < OUT_N) to[1] = static_cast<u16>(both >> 16);
    }
  }
}

// Which block of a split adds up run i of columns of y.
__device__ constexpr int owner_of(int run) { return run * SPLIT / RUNS; }
// The first run of a block, and so how many there are before it.
__device__ constexpr int first_run(int rank) { return (rank * RUNS + SPLIT - 1) / SPLIT; }

// 1 / rms of the thread's row and of that eight below; four lanes share a row.
__device__ __forceinline__ float2 row_scales(const float* squares, int token, int tokens) {
  float sums[2] = {0.0f, 0.0f};
  if constexpr (PARTS > 0) {
#pragma unroll 4
    for (int i = threadIdx.x % 4; i < PARTS; i += 4) {
      if (token < tokens) sums[0] += squares[token * PARTS + i];
      if (token + 8 < tokens) sums[1] += squares[(token + 8) * PARTS + i];
    }
  }
  return make_float2(rsqrtf(across_row(sums[0]) / K + EPS), rsqrtf(across_row(sums[1]) / K + EPS));
}

__device__ __forceinline__ float2 pair_at(const u16* from) {
  return opened(*reinterpret_cast<const u32*>(from));
}

__device__ __forceinline__ bool is_own(int run, int rank) { return SPLIT == 1 || owner_of(run) == rank; }

// d = y as it is rounded; the sums of its squares over the tile's columns go to shares.
__device__ __forceinline__ void add_residual(float (&d)[ROWS / 2], const Beside& beside, Tile tile, int token,
                                             int tokens, int rank) {
  float squares[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < VALUES; i += 2) {
    const int below = i % 4 / 2, t = token + 8 * below, n = tile.column + i / 4 * 8 + threadIdx.x % 4 * 2;
    if (t >= tokens || n >= OUT_N || !is_own(i / 4, rank)) continue;
    const float2 old = pair_at(beside.residual + static_cast<long long>(t) * OUT_N + n);
    const u32 both = rounded_pair<BF16>(d[i] + old.x, d[i + 1] + old.y);
    d[i] = widened<BF16>(static_cast<u16>(both)), d[i + 1] = widened<BF16>(static_cast<u16>(both >> 16));
    squares[below] += d[i] * d[i] + d[i + 1] * d[i + 1];
  }
#pragma unroll
  for (int below = 0; below < 2; below++) {
    const float sum = across_row(squares[below]);
    const int t = token + 8 * below;
    const int share = (t * TILES_ACROSS + tile.column / TILE_N) * SPLIT + (SPLIT > 1 ? rank : 0);
    if (threadIdx.x % 4 == 0 && t < tokens) beside.shares[share] = sum;
  }
}

// Rows of y, 16 bytes at a time: each lane a run of eight columns.
__device__ __forceinline__ void store_runs(float (&d)[ROWS / 2], u16* y, Tile tile, int token, int tokens, int rank) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int run = 0; run < RUNS; run += 4) {
#pragma unroll
    for (int below = 0; below < 2; below++) {
      u32 p[4];
      traded_runs<VALUES>(d, run, below, p);
      const int t = token + 8 * below, n = tile.column + 8 * (run + lane);
      if (t < tokens && n < OUT_N && run + lane < RUNS && is_own(run + lane, rank))
        *reinterpret_cast<uint4*>(y + static_cast<long long>(t) * OUT_N + n) = make_uint4(p[0], p[1], p[2], p[3]);
    }
  }
}

// A thread's part of a tile: of each run of eight columns, a pair in its row and one in the row eight below.
__device__ __forceinline__ void store_tile(float (&d)[ROWS / 2], const Beside& beside, void* y, Tile tile, int group,
                                           int tokens, int rank, float2 scale) {
  const int lane = threadIdx.x % 4;
  const int token = tile.token + group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    const float s = i % 4 / 2 ? scale.y : scale.x;
    if constexpr (PARTS > 0) d[i] *= s;
    if constexpr (PARTS > 0 && GATED) d[i + ROWS / 4] *= s;
    if constexpr (GATED) d[i] = activated<ACT>(d[i]) * d[i + ROWS / 4];
    else d[i] = activated<ACT>(d[i] + bias_at<OUT_N>(beside.bias, tile.column + i / 4 * 8 + lane * 2 + i % 2));
  }
  if constexpr (OUT_BYTES == 2 && OUT_N % 8 == 0) {
    if constexpr (RESIDUAL) add_residual(d, beside, tile, token, tokens, rank);
    store_runs(d, static_cast<u16*>(y), tile, token, tokens, rank);
    if constexpr (RESIDUAL) {
#pragma unroll
      for (int i = 0; i < VALUES; i += 2) {
        const int n = min(tile.column + i / 4 * 8 + lane * 2, OUT_N - 2);
        const float2 gain = pair_at(beside.gain + n);
        d[i] *= gain.x + OFFSET, d[i + 1] *= gain.y + OFFSET;
      }
      store_runs(d, beside.scaled, tile, token, tokens, rank);
    }
  } else {
#pragma unroll
    for (int i = 0; i < VALUES; i += 2)
      if (is_own(i / 4, rank))
        store_pair(y, token + i % 4 / 2 * 8, tile.column + i / 4 * 8 + lane * 2, tokens, d[i], d[i + 1]);
  }
}

__device__ __forceinline__ bool is_loaded(int group, int below) {
  return group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + below < X_ROWS;
}

// Where in its owner's memory the pair of register i lies that block `from` of the cluster sends, to the same thread.
// `of` counts gate and up.
__device__ __forceinline__ u32 mailbox(int i, int of, int from, int owner) {
  const int slot = from < owner ? from : from - 1, run = i / 4 - first_run(owner);
  const int pair = (run * 2 + i % 4 / 2) * MATRICES + of;
  return shared_address(ring) + RING_BYTES + ((slot * PAIRS + pair) * CONSUMERS + threadIdx.x) * 8;
}

// Sends to each block of the cluster what it adds up, and adds up what the others send, always in the order of K.
__device__ __forceinline__ void exchange(float (&d)[ROWS / 2], int group, int rank) {
#pragma unroll
  for (int i = 0; i < VALUES; i += 2) {
#pragma unroll
    for (int of = 0; of < MATRICES; of++) {
      const int owner = owner_of(i / 4), at = i + of * VALUES;
      if (owner != rank && is_loaded(group, i % 4 * 4))
        send_pair(in_block(mailbox(i, of, rank, owner), owner), d[at], d[at + 1], in_block(arrived(), owner));
    }
  }
  wait_parity(arrived(), 0);
#pragma unroll
  for (int i = 0; i < VALUES; i += 2) {
#pragma unroll
    for (int of = 0; of < MATRICES; of++) {
      const int owner = owner_of(i / 4), at = i + of * VALUES;
      if (owner != rank || !is_loaded(group, i % 4 * 4)) continue;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int from = 0; from < SPLIT; from++) {
        const float2 share = from == rank ? make_float2(d[at], d[at + 1]) : load_pair(mailbox(i, of, from, owner));
        sum = make_float2(sum.x + share.x, sum.y + share.y);
      }
      d[at] = sum.x, d[at + 1] = sum.y;
    }
  }
}

__device__ __forceinline__ void consume(const Beside& beside, void* y, int given, int rank) {
  const int group = threadIdx.x / 128;
  Turn turn;
  wait_for_predecessor();
  const int tokens = token_count(beside, given);
  for (int index = blockIdx.x / CLUSTER; index < tiles(tokens); index += clusters()) {
    const Tile tile = tile_at(index, tokens, rank);
    float2 scale = make_float2(1.0f, 1.0f);
    if constexpr (PARTS > 0) {
      const int token = tile.token + group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
      scale = row_scales(beside.squares, token, tokens);
    }
    float d[ROWS / 2];
    multiply(d, group, last_step(rank) - first_step(rank), turn);
    if constexpr (SPLIT > 1) exchange(d, group, rank);
    store_tile(d, beside, y, tile, group, tokens, rank, scale);
  }
}

__device__ __forceinline__ void set_up(const TensorMap* x, const TensorMap* w) {
  if (threadIdx.x == 0) {
    if (shared_address(ring) % 1024) __trap();
    fetch_map(x), fetch_map(w);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), WARP_GROUPS * SHARE);
    }
    if constexpr (SPLIT > 1) {
      const int rank = cluster_rank(), runs = first_run(rank + 1) - first_run(rank);
      barrier_init(arrived(), 1);
      expect_bytes(arrived(), (SPLIT - 1) * runs * 8 * MATRICES * X_ROWS * 4);
    }
    publish_barriers();
  }
  if constexpr (CLUSTER > 1) cluster_meet();
  else __syncthreads();
  launch_dependents();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(CLUSTER, 1, 1)
hopper(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
#if BIAS_BYTES
       const void* bias,
#endif
#if PARTS
       const float* squares,
#endif
#if RESIDUAL
       const u16* residual, const u16* gain,
#endif
       void* y,
#if RESIDUAL
       u16* scaled, float* shares,
#endif
#if EXPERTS
       const int* owners, const int* used,
#endif
       int tokens) {
  Beside beside{};
#if BIAS_BYTES
  beside.bias = bias;
#endif
#if PARTS
  beside.squares = squares;
#endif
#if RESIDUAL
  beside.residual = residual, beside.gain = gain, beside.scaled = scaled, beside.shares = shares;
#endif
#if EXPERTS
  beside.owners = owners, beside.used = used;
#endif
  const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
  set_up(&x, &w);
  if (threadIdx.x >= CONSUMERS) {
    if constexpr (MOVES_REGISTERS) give_registers<40>();
    if (threadIdx.x == CONSUMERS) produce(&x, &w, beside, tokens, rank);
    __syncwarp();
  } else {
    if constexpr (MOVES_REGISTERS) take_registers<232>();
    consume(beside, y, tokens, rank);
  }
}
