// From one attention to the next in one launch: four products, and the residual sums and norms between them.
//
//   r = x w0^T + residual;  h = act(norm(r) gate^T) * norm(r) up^T;  total = h w2^T + r;  y = norm(total) w3^T + bias
//
// x: [tokens, Q]; w0: [E, Q]; w1 = gate over up: [2 F, E]; w2: [E, F]; w3: [N, E]; all row-major.
//
// WORKERS blocks, all of them resident (a cooperative launch), in clusters of two, one on a multiprocessor. A thread
// streams the block's share of all four weights through one ring and waits for nothing but room: while a product ends,
// is exchanged, stored and announced to all blocks, the next one's weights arrive already. A second thread streams x,
// and waits until all blocks have stored what it reads. Each of the norms is halved as in hopper.cu: a sum leaves r g
// and shares of the rows' sums of squares, the product behind it scales its result.
//
// Constants, all macros: FORMAT (bf16, f16); Q, E, F, N; ACT, OFFSET, EPS, BIAS_BYTES, WARP_GROUPS, X_ROWS as in
//   hopper.cu; WORKERS; ROWS_SUM (of w0 and w2), ROWS_GATED, ROWS_NEXT in a tile; SUM_16, GATED_16, NEXT_16: these / 16
//   CHUNKS_0 .. CHUNKS_3 (of 64 columns of a tile of w, in a slot of the ring)
//   W_SLOTS, X_SLOTS (of the rings); WINDOW (slots of w under way at once: with more, blocks get ahead of others)
#include "hopper.cuh"
#include "values.cuh"

__device__ constexpr int biggest(int a, int b) { return a > b ? a : b; }

// The four products in turn. Where one is split, the two blocks of a cluster take the slots of K in turn.
template <int P> struct Product {
  static constexpr bool GATED = P == 1;
  static constexpr int SPLIT = GATED ? 1 : 2;
  static constexpr int K = P == 0 ? Q : P == 2 ? F : E;
  static constexpr int OUT_N = P == 1 ? F : P == 3 ? N : E;
  static constexpr int ROWS = P == 1 ? ROWS_GATED : P == 3 ? ROWS_NEXT : ROWS_SUM;
  static constexpr int CHUNKS = P == 0 ? CHUNKS_0 : P == 1 ? CHUNKS_1 : P == 2 ? CHUNKS_2 : CHUNKS_3;
  static constexpr int TILE_N = GATED ? ROWS / 2 : ROWS;
  static constexpr int TILES = (OUT_N + TILE_N - 1) / TILE_N;
  static constexpr int SLOTS = (K + 64 * CHUNKS - 1) / (64 * CHUNKS);
  static constexpr int W_BYTES = ROWS * 128 * CHUNKS;
  static constexpr int VALUES = ROWS / 4;  // of y that a thread ends up with
};

constexpr int TILE_T = 64 * WARP_GROUPS;
constexpr int CONSUMERS = 128 * WARP_GROUPS;
// Five warps behind the consumers: they stream w, stream x, scale rows (two), announce events.
constexpr int STREAM_W = 0, STREAM_X = 32, SCALE = 64, ANNOUNCE = 128, SCALERS = 2, THREADS = CONSUMERS + 160;
constexpr int X_BYTES = X_ROWS * 128;
constexpr int W_BYTES = biggest(biggest(Product<0>::W_BYTES, Product<1>::W_BYTES),
                                biggest(Product<2>::W_BYTES, Product<3>::W_BYTES));
constexpr int MAIL_BYTES = biggest(Product<0>::VALUES, Product<3>::VALUES) * CONSUMERS * 4;
constexpr int X_AT = 0, W_AT = X_AT + X_SLOTS * X_BYTES, MAIL_AT = W_AT + W_SLOTS * W_BYTES;
constexpr int SCALES_AT = MAIL_AT + MAIL_BYTES, BARRIERS_AT = SCALES_AT + TILE_T * 4;
constexpr int SHARES = 2 * Product<0>::TILES;  // of a row's sum of squares
constexpr int ROUNDS = (Product<1>::TILES + WORKERS - 1) / WORKERS;  // of gated tiles
// When all blocks have stored r g, a round's columns of h, total g.
constexpr int SUMMED = 0, GATED = 1, SUMMED_AGAIN = 1 + ROUNDS, EVENTS = 2 + ROUNDS;
constexpr int EVENT_WORDS = 32;  // from one event's counter to the next; behind them that of the blocks that are done

static_assert(2 * Product<0>::TILES <= WORKERS && 2 * Product<3>::TILES <= WORKERS, "a tile a cluster");
static_assert(Product<0>::SLOTS > 1 && Product<2>::SLOTS > 1 && Product<3>::SLOTS > 1, "slots for both of a cluster");
static_assert(E % 8 == 0 && F % 8 == 0 && N % 8 == 0, "results are stored in runs of eight");
static_assert(X_ROWS % 8 == 0 && W_SLOTS * W_BYTES >= (TILE_T - X_ROWS) * 128, "products read on behind x's last slot");
static_assert(WINDOW < W_SLOTS, "a slot's parity is read before it is filled again");

extern __shared__ __align__(1024) char memory[];

__device__ __forceinline__ u32 barrier_at(int i) { return shared_address(memory) + BARRIERS_AT + 8 * i; }
__device__ __forceinline__ u32 w_full(int i) { return barrier_at(i); }
__device__ __forceinline__ u32 w_empty(int i) { return barrier_at(W_SLOTS + i); }
__device__ __forceinline__ u32 x_full(int i) { return barrier_at(2 * W_SLOTS + i); }
__device__ __forceinline__ u32 x_empty(int i) { return barrier_at(2 * W_SLOTS + X_SLOTS + i); }
__device__ __forceinline__ u32 mail() { return barrier_at(2 * (W_SLOTS + X_SLOTS)); }
__device__ __forceinline__ u32 squares() { return barrier_at(2 * (W_SLOTS + X_SLOTS) + 1); }  // of all blocks are there
__device__ __forceinline__ u32 scaled() { return barrier_at(2 * (W_SLOTS + X_SLOTS) + 2); }
__device__ __forceinline__ u32 stored(int event) { return barrier_at(2 * (W_SLOTS + X_SLOTS) + 3 + event); }
__device__ __forceinline__ u32 w_at(int i) { return shared_address(memory) + W_AT + i * W_BYTES; }
__device__ __forceinline__ u32 x_at(int i) { return shared_address(memory) + X_AT + i * X_BYTES; }
__device__ __forceinline__ float* scales() { return reinterpret_cast<float*>(memory + SCALES_AT); }

template <int SLOTS> struct Turn {
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

// ---- events ----
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// What this warp's threads have stored may be announced.
__device__ __forceinline__ void signal(int event) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(stored(event));
}

// Tells all blocks of each event. The fence orders what the consumers have stored, which has come to this thread by the
// barrier, before the copies of those who see the counter. It and the release take microseconds, while copies are under
// way: hence a thread of its own.
__device__ __forceinline__ void announce(u32* events) {
  for (int event = 0; event < EVENTS; event++) {
    wait_parity(stored(event), 0);
    fence_copies();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(events + event * EVENT_WORDS) : "memory");
  }
}

// Until all blocks have come to `event`; `seen`: how many events are behind.
__device__ __forceinline__ void await(const u32* events, int event, int& seen) {
  while (seen <= event) {
    u32 count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(events + seen * EVENT_WORDS) : "memory");
    if (count == WORKERS) seen++;
  }
}

// ---- the two streams ----
template <int P> __device__ __forceinline__ int rank_of() { return Product<P>::SPLIT > 1 ? blockIdx.x & 1 : 0; }
template <int P> __device__ __forceinline__ int first_tile() { return blockIdx.x / Product<P>::SPLIT; }
template <int P> __device__ __forceinline__ int stride() { return WORKERS / Product<P>::SPLIT; }

// `landed`: the first slot of those under way.
template <int P>
__device__ __forceinline__ void stream_w(const TensorMap* map, Turn<W_SLOTS>& turn, Turn<W_SLOTS>& landed,
                                         int& under_way) {
  using It = Product<P>;
  for (int tile = first_tile<P>(); tile < It::TILES; tile += stride<P>()) {
    for (int slot = rank_of<P>(); slot < It::SLOTS; slot += It::SPLIT, turn.next()) {
      if (under_way == WINDOW) wait_parity(w_full(landed.slot), landed.parity), landed.next();
      else under_way++;
      wait_parity(w_empty(turn.slot), turn.parity ^ 1);
      expect_bytes(w_full(turn.slot), It::W_BYTES);
      u32 to = w_at(turn.slot);
#pragma unroll
      for (int chunk = 0; chunk < It::CHUNKS; chunk++) {
#pragma unroll
        for (int half = 0; half < (It::GATED ? 2 : 1); half++, to += It::TILE_N * 128)
          copy_box(to, map, (slot * It::CHUNKS + chunk) * 64, half * It::OUT_N + tile * It::TILE_N, w_full(turn.slot),
                   READ_ONCE);
      }
    }
  }
}

template <int P>
__device__ __forceinline__ void stream_x(const TensorMap* map, Turn<X_SLOTS>& turn, const u32* events, int& seen) {
  using It = Product<P>;
  if (P == 1 || P == 3) {
    // The scalers have seen phase 0 of squares() before it moves on, also in a block without a gated tile.
    if (P == 3) wait_parity(scaled(), 0);
    await(events, P == 1 ? SUMMED : SUMMED_AGAIN, seen);
    arrive(squares());
  }
  for (int tile = first_tile<P>(); tile < It::TILES; tile += stride<P>()) {
    for (int slot = rank_of<P>(); slot < It::SLOTS; slot += It::SPLIT) {
      if constexpr (P == 2) {  // rounds of the gated product leave h from left to right
        const int last = min((slot + 1) * It::CHUNKS * 64, F) - 1;
        await(events, GATED + last / (WORKERS * Product<1>::TILE_N), seen);
      }
#pragma unroll
      for (int chunk = 0; chunk < It::CHUNKS; chunk++, turn.next()) {
        wait_parity(x_empty(turn.slot), turn.parity ^ 1);
        expect_bytes(x_full(turn.slot), X_BYTES);
        copy_box(x_at(turn.slot), map, (slot * It::CHUNKS + chunk) * 64, 0, x_full(turn.slot), READ_OFTEN);
      }
    }
  }
}

// 1 / rms of each row, from the shares of its sum of squares.
__device__ __forceinline__ void scale_rows(const float* shares, int tokens, u32 parity) {
  wait_parity(squares(), parity);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % SCALERS;
  constexpr int AT_ONCE = 8, PAIRS = (SHARES / 2 + 31) / 32;
  for (int top = warp * AT_ONCE; top < tokens; top += SCALERS * AT_ONCE) {
    float2 part[AT_ONCE][PAIRS];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float2* row = reinterpret_cast<const float2*>(shares + (top + i) * SHARES);
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        const int at = 32 * j + lane;
        part[i][j] = top + i < tokens && at < SHARES / 2 ? __ldcg(row + at) : make_float2(0.0f, 0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) sum += part[i][j].x + part[i][j].y;
#pragma unroll
      for (int k = 16; k; k /= 2) sum += __shfl_xor_sync(~0u, sum, k);
      if (lane == 0) scales()[top + i] = rsqrtf(sum / E + EPS);
    }
  }
  __syncwarp();
  if (lane == 0) arrive(scaled());
}

// ---- the consumers ----
#define PRODUCT_OF(rows, rows_16, d, a, b)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                               \
               "wgmma.mma_async.sync.aligned.m64n" TEXT(rows) "k16.f32." TEXT(FORMAT) "." TEXT(FORMAT)  \
               " {" JOIN(REGS_, rows_16) "}, %0, %1, p, 1, 1, 0, 0;\n}"                                 \
               : "+l"(a), "+l"(b), JOIN(OUTS_, rows_16))

template <int P> __device__ __forceinline__ void multiply_16(float (&d)[Product<P>::ROWS / 2], u64 a, u64 b) {
  if constexpr (P == 1) PRODUCT_OF(ROWS_GATED, GATED_16, d, a, b);
  else if constexpr (P == 3) PRODUCT_OF(ROWS_NEXT, NEXT_16, d, a, b);
  else PRODUCT_OF(ROWS_SUM, SUM_16, d, a, b);
}

__device__ __forceinline__ void release(u32 barrier) {
  if (threadIdx.x % 128 == 0) arrive(barrier);
}

template <int P>
__device__ __forceinline__ void multiply(float (&d)[Product<P>::ROWS / 2], Turn<W_SLOTS>& w, Turn<X_SLOTS>& x) {
  using It = Product<P>;
  const int group = threadIdx.x / 128;
#pragma unroll
  for (int i = 0; i < It::ROWS / 2; i++) d[i] = 0.0f;
  int last_w = -1, last_x = -1;
  for (int slot = rank_of<P>(); slot < It::SLOTS; slot += It::SPLIT, w.next()) {
    wait_parity(w_full(w.slot), w.parity);
#pragma unroll
    for (int chunk = 0; chunk < It::CHUNKS; chunk++, x.next()) {
      wait_parity(x_full(x.slot), x.parity);
      const u32 a_at = x_at(x.slot) + group * 64 * 128, b_at = w_at(w.slot) + chunk * It::ROWS * 128;
      product_begin();
#pragma unroll
      for (int i = 0; i < 4; i++) multiply_16<P>(d, tile_of(a_at + 32 * i), tile_of(b_at + 32 * i));
      product_commit();
      product_wait<1>();
      if (last_x >= 0) release(x_empty(last_x));
      if (chunk == 0 && last_w >= 0) release(w_empty(last_w));
      last_x = x.slot;
    }
    last_w = w.slot;
  }
  product_wait<0>();
  release(x_empty(last_x)), release(w_empty(last_w));
}

__device__ __forceinline__ int own_token() {
  return threadIdx.x / 128 * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

template <int P> __device__ __forceinline__ void expect_mail() {
  expect_bytes(mail(), Product<P>::ROWS / 2 * X_ROWS * 4);
}

__device__ __forceinline__ u32 mailbox(int pair) {
  return shared_address(memory) + MAIL_AT + (pair * CONSUMERS + threadIdx.x) * 8;
}

// Each block of the cluster ends up with the sums over K of its half of the tile's columns.
template <int P>
__device__ __forceinline__ void exchange(float (&d)[Product<P>::ROWS / 2], float (&own)[Product<P>::VALUES],
                                         u32 parity) {
  constexpr int VALUES = Product<P>::VALUES;
  const int rank = rank_of<P>();
  const u32 other = rank ^ 1, barrier = in_block(mail(), other);
#pragma unroll
  for (int i = 0; i < VALUES; i += 2) {
    own[i] = rank ? d[VALUES + i] : d[i], own[i + 1] = rank ? d[VALUES + i + 1] : d[i + 1];
    const float a = rank ? d[i] : d[VALUES + i], b = rank ? d[i + 1] : d[VALUES + i + 1];
    if (own_token() + i % 4 * 4 < X_ROWS) send_pair(in_block(mailbox(i / 2), other), a, b, barrier);
  }
  wait_parity(mail(), parity);
#pragma unroll
  for (int i = 0; i < VALUES; i += 2) {
    if (own_token() + i % 4 * 4 >= X_ROWS) continue;
    const float2 got = load_pair(mailbox(i / 2));
    own[i] += got.x, own[i + 1] += got.y;  // of two, so in any order
  }
}

// Rows of y, 16 bytes at a time: each lane a run of eight columns.
template <int VALUES, int OUT_N>
__device__ __forceinline__ void store_runs(const float (&d)[VALUES], u16* y, int column, int tokens) {
  constexpr int RUNS = VALUES / 4;
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int run = 0; run < RUNS; run += 4) {
#pragma unroll
    for (int below = 0; below < 2; below++) {
      u32 p[4];
      traded_runs<VALUES>(d, run, below, p);
      const int t = own_token() + 8 * below, n = column + 8 * (run + lane);
      if (t < tokens && n < OUT_N && run + lane < RUNS)
        *reinterpret_cast<uint4*>(y + static_cast<long long>(t) * OUT_N + n) = make_uint4(p[0], p[1], p[2], p[3]);
    }
  }
}

constexpr int KEPT = Product<0>::VALUES / 2;  // pairs of the residual stream that a thread adds to, in both sums

__device__ __forceinline__ int sum_column() { return blockIdx.x / 2 * ROWS_SUM + (blockIdx.x & 1) * (ROWS_SUM / 2); }

// stream += d, rounded; d becomes stream * gain, and shares get the sums of squares over the block's columns.
__device__ __forceinline__ void add_up(float (&d)[2 * KEPT], u32 (&stream)[KEPT], const u32 (&gain)[KEPT / 2],
                                       float* shares, int tokens) {
  float squares[2] = {0.0f, 0.0f};
  const int n0 = sum_column() + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * KEPT; i += 2) {
    const float2 old = opened(stream[i / 2]);
    stream[i / 2] = rounded_pair<BF16>(d[i] + old.x, d[i + 1] + old.y);
    const float2 sum = opened(stream[i / 2]);
    const int n = n0 + i / 4 * 8;
    const float2 g = opened(gain[i / 4]);
    if (n < E) squares[i % 4 / 2] += sum.x * sum.x + sum.y * sum.y;
    d[i] = sum.x * (g.x + OFFSET), d[i + 1] = sum.y * (g.y + OFFSET);
  }
#pragma unroll
  for (int below = 0; below < 2; below++) {
    const float sum = across_row(squares[below]);
    const int t = own_token() + 8 * below;
    if (threadIdx.x % 4 == 0 && t < tokens) shares[t * SHARES + blockIdx.x] = sum;
  }
}

struct Given {
  const u16 *residual, *gain_1, *gain_2;
  const void* bias;
  u16 *total, *y, *scaled_1, *h, *scaled_2;
  float *shares_1, *shares_2;
  u32* events;
};

template <int P>
__device__ __forceinline__ void sum_product(const Given& g, u32 (&stream)[KEPT], Turn<W_SLOTS>& w, Turn<X_SLOTS>& x,
                                            int tokens) {
  if (first_tile<P>() < Product<P>::TILES) {
    float d[Product<P>::ROWS / 2], own[Product<P>::VALUES];
    u32 gain[KEPT / 2];
#pragma unroll
    for (int i = 0; i < KEPT / 2; i++) {
      const int n = min(sum_column() + i * 8 + static_cast<int>(threadIdx.x % 4) * 2, E - 2);
      gain[i] = *reinterpret_cast<const u32*>((P ? g.gain_2 : g.gain_1) + n);
    }
    multiply<P>(d, w, x);
    // Measured best here: blocks of the next kernel that come earlier take the places of those that work, and those
    // that come later begin late.
    if (P == 2) launch_dependents();
    exchange<P>(d, own, P / 2);
    if (threadIdx.x == 0) {
      if (P == 0) expect_mail<2>();
      else expect_mail<3>();
    }
    add_up(own, stream, gain, P ? g.shares_2 : g.shares_1, tokens);
    store_runs<Product<P>::VALUES, E>(own, P ? g.scaled_2 : g.scaled_1, sum_column(), tokens);
    if (P == 2) {
#pragma unroll
      for (int i = 0; i < 2 * KEPT; i += 2) {
        const float2 sum = opened(stream[i / 2]);
        own[i] = sum.x, own[i + 1] = sum.y;
      }
      store_runs<Product<P>::VALUES, E>(own, g.total, sum_column(), tokens);
    }
  }
  signal(P == 0 ? SUMMED : SUMMED_AGAIN);
}

__device__ __forceinline__ void gated_product(const Given& g, Turn<W_SLOTS>& w, Turn<X_SLOTS>& x, int tokens) {
  using It = Product<1>;
  for (int round = 0; round < ROUNDS; round++) {
    const int tile = first_tile<1>() + round * stride<1>();
    if (tile < It::TILES) {
      float d[It::ROWS / 2], out[It::VALUES];
      multiply<1>(d, w, x);
      wait_parity(scaled(), 0);
      const float s[2] = {scales()[own_token()], scales()[own_token() + 8]};
#pragma unroll
      for (int i = 0; i < It::VALUES; i++)
        out[i] = activated<ACT>(d[i] * s[i % 4 / 2]) * (d[i + It::VALUES] * s[i % 4 / 2]);
      store_runs<It::VALUES, F>(out, g.h, tile * It::TILE_N, tokens);
    }
    signal(GATED + round);
  }
}

__device__ __forceinline__ void next_product(const Given& g, Turn<W_SLOTS>& w, Turn<X_SLOTS>& x, int tokens) {
  using It = Product<3>;
  if (first_tile<3>() >= It::TILES) return;
  float d[It::ROWS / 2], own[It::VALUES];
  multiply<3>(d, w, x);
  exchange<3>(d, own, 0);
  wait_parity(scaled(), 1);
  const float s[2] = {scales()[own_token()], scales()[own_token() + 8]};
  const int column = first_tile<3>() * ROWS_NEXT + rank_of<3>() * (ROWS_NEXT / 2);
#pragma unroll
  for (int i = 0; i < It::VALUES; i++)
    own[i] = own[i] * s[i % 4 / 2] + bias_at<N>(g.bias, column + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2);
  store_runs<It::VALUES, N>(own, g.y, column, tokens);
}

__device__ __forceinline__ void consume(const Given& g, int tokens) {
  Turn<W_SLOTS> w;
  Turn<X_SLOTS> x;
  u32 stream[KEPT];
  wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int t = own_token() + i % 2 * 8, n = sum_column() + i / 2 * 8 + threadIdx.x % 4 * 2;
    stream[i] = t < tokens && n < E
                    ? *reinterpret_cast<const u32*>(g.residual + static_cast<long long>(t) * E + n) : 0;
  }
  sum_product<0>(g, stream, w, x, tokens);
  gated_product(g, w, x, tokens);
  sum_product<2>(g, stream, w, x, tokens);
  next_product(g, w, x, tokens);
}

__device__ __forceinline__ void set_up() {
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024) __trap();
    for (int i = 0; i < W_SLOTS; i++) barrier_init(w_full(i), 1), barrier_init(w_empty(i), WARP_GROUPS);
    for (int i = 0; i < X_SLOTS; i++) barrier_init(x_full(i), 1), barrier_init(x_empty(i), WARP_GROUPS);
    barrier_init(mail(), 1);
    barrier_init(squares(), 1);
    barrier_init(scaled(), SCALERS);
    for (int i = 0; i < EVENTS; i++) barrier_init(stored(i), CONSUMERS / 32);
    if (first_tile<0>() < Product<0>::TILES) expect_mail<0>();
    else expect_mail<3>();
    publish_barriers();
  }
  cluster_meet();
}

// Every block has seen every event before it comes here; the last one leaves the counters as it found them.
__device__ __forceinline__ void leave(u32* events) {
  if (atomicAdd(events + EVENTS * EVENT_WORDS, 1) < WORKERS - 1) return;
  for (int i = 0; i <= EVENTS; i++) events[i * EVENT_WORDS] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(2, 1, 1)
dense_block(const __grid_constant__ TensorMap x0, const __grid_constant__ TensorMap w0,
            const __grid_constant__ TensorMap x1, const __grid_constant__ TensorMap w1,
            const __grid_constant__ TensorMap x2, const __grid_constant__ TensorMap w2,
            const __grid_constant__ TensorMap x3, const __grid_constant__ TensorMap w3,
            const u16* residual, const u16* gain_1, const u16* gain_2,
#if BIAS_BYTES
            const void* bias,
#endif
            u16* y, u16* total, u16* scaled_1, float* shares_1, u16* h, u16* scaled_2, float* shares_2, u32* events,
            int tokens) {
  Given g{residual, gain_1, gain_2, nullptr, total, y, scaled_1, h, scaled_2, shares_1, shares_2, events};
#if BIAS_BYTES
  g.bias = bias;
#endif
  set_up();
  const int role = static_cast<int>(threadIdx.x) - CONSUMERS;
  if (role < 0) {
    consume(g, tokens);
  } else if (role == STREAM_W) {
    Turn<W_SLOTS> turn, landed;
    int under_way = 0;
    stream_w<0>(&w0, turn, landed, under_way), stream_w<1>(&w1, turn, landed, under_way);
    stream_w<2>(&w2, turn, landed, under_way), stream_w<3>(&w3, turn, landed, under_way);
  } else if (role == STREAM_X) {
    Turn<X_SLOTS> turn;
    int seen = 0;
    wait_for_predecessor();
    stream_x<0>(&x0, turn, events, seen), stream_x<1>(&x1, turn, events, seen);
    stream_x<2>(&x2, turn, events, seen), stream_x<3>(&x3, turn, events, seen);
    leave(events);
  } else if (role == ANNOUNCE) {
    announce(events);
  } else if (role >= SCALE && role < ANNOUNCE) {
    scale_rows(shares_1, tokens, 0);
    scale_rows(shares_2, tokens, 1);
  }
}
