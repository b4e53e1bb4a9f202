// Hopper's instructions, one function each: mbarriers, bulk tensor copies (TMA), warp-group products, dependent launch.
// Written for NVRTC, which has no standard headers.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(64) TensorMap {
  char opaque[128];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- dependent launch ----
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- clusters ----
__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster come this far. Says nothing of what they have written.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// The address, in the cluster's window, of what stands at `address` in the shared memory of block `rank`.
__device__ __forceinline__ u32 in_block(u32 address, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Two numbers to an address in the cluster's window; the barrier there counts their bytes as they arrive.
__device__ __forceinline__ void send_pair(u32 address, float a, float b, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "f"(a), "f"(b), "r"(barrier) : "memory");
}

__device__ __forceinline__ float2 load_pair(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

// ---- mbarriers ----
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_at(u32 barrier, u32 rank) {
  // Without .release.cluster, which costs a fence of the whole GPU: only copies and products touch what is handed over.
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_block(barrier, rank)) : "memory");
}

__device__ __forceinline__ void wait_parity(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// ---- bulk tensor copies ----
constexpr u64 READ_ONCE = 0x12F0000000000000;   // evict_first
constexpr u64 READ_AGAIN = 0x1000000000000000;  // evict_normal
constexpr u64 READ_OFTEN = 0x14F0000000000000;  // evict_last

__device__ __forceinline__ void fetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#define COPY "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"

// The box at (column, row) of the map's matrix into `to`; `barrier` counts its bytes as they arrive.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(COPY ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row),
               "r"(barrier), "l"(policy) : "memory");
}

// ... into both blocks of a cluster of two, at the same place, counted by each one's barrier.
__device__ __forceinline__ void copy_box_to_both(u32 to, const TensorMap* map, int column, int row, u32 barrier,
                                                 u64 policy) {
  asm volatile(COPY ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to), "l"(map),
               "r"(column), "r"(row), "r"(barrier), "h"(static_cast<u16>(3)), "l"(policy) : "memory");
}

// The same for a map of two halves of rows, of which a box has eight rows each in turn: from the rows 8 `eight` on.
#define COPY_TURNS "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"

__device__ __forceinline__ void copy_turns(u32 to, const TensorMap* map, int column, int eight, u32 barrier,
                                           u64 policy) {
  asm volatile(COPY_TURNS ".L2::cache_hint [%0], [%1, {%2, 0, 0, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column),
               "r"(eight), "r"(barrier), "l"(policy) : "memory");
}

__device__ __forceinline__ void copy_turns_to_both(u32 to, const TensorMap* map, int column, int eight, u32 barrier,
                                                   u64 policy) {
  asm volatile(COPY_TURNS ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, 0, 0, %3}], [%4], %5, %6;" ::"r"(to),
               "l"(map), "r"(column), "r"(eight), "r"(barrier), "h"(static_cast<u16>(3)), "l"(policy) : "memory");
}

// ---- warp groups ----
template <int REGISTERS> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
__device__ __forceinline__ void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A tile of rows of 128 bytes, 128-byte swizzle: 8 rows lie 1024 bytes behind one another. 16 columns on: address + 32.
__device__ __forceinline__ u64 tile_of(u32 address) {
  return (static_cast<u64>(address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Operands of the product of 64 x 16 by 16 x (16 k): 8 k registers from %2 on.
#define REGS_1 "%2, %3, %4, %5, %6, %7, %8, %9"
#define REGS_2 REGS_1 ", %10, %11, %12, %13, %14, %15, %16, %17"
#define REGS_3 REGS_2 ", %18, %19, %20, %21, %22, %23, %24, %25"
#define REGS_4 REGS_3 ", %26, %27, %28, %29, %30, %31, %32, %33"
#define REGS_5 REGS_4 ", %34, %35, %36, %37, %38, %39, %40, %41"
#define REGS_6 REGS_5 ", %42, %43, %44, %45, %46, %47, %48, %49"
#define REGS_7 REGS_6 ", %50, %51, %52, %53, %54, %55, %56, %57"
#define REGS_8 REGS_7 ", %58, %59, %60, %61, %62, %63, %64, %65"
#define REGS_9 REGS_8 ", %66, %67, %68, %69, %70, %71, %72, %73"
#define REGS_10 REGS_9 ", %74, %75, %76, %77, %78, %79, %80, %81"
#define REGS_11 REGS_10 ", %82, %83, %84, %85, %86, %87, %88, %89"
#define REGS_12 REGS_11 ", %90, %91, %92, %93, %94, %95, %96, %97"
#define REGS_13 REGS_12 ", %98, %99, %100, %101, %102, %103, %104, %105"
#define REGS_14 REGS_13 ", %106, %107, %108, %109, %110, %111, %112, %113"
#define REGS_15 REGS_14 ", %114, %115, %116, %117, %118, %119, %120, %121"
#define REGS_16 REGS_15 ", %122, %123, %124, %125, %126, %127, %128, %129"
// ... and of 64 x 16 by 16 x (16 k + 8).
#define REGS_1H REGS_1 ", %10, %11, %12, %13"
#define REGS_2H REGS_2 ", %18, %19, %20, %21"
#define REGS_3H REGS_3 ", %26, %27, %28, %29"
#define REGS_4H REGS_4 ", %34, %35, %36, %37"
#define REGS_5H REGS_5 ", %42, %43, %44, %45"
#define REGS_6H REGS_6 ", %50, %51, %52, %53"
#define REGS_7H REGS_7 ", %58, %59, %60, %61"
#define REGS_8H REGS_8 ", %66, %67, %68, %69"
#define REGS_9H REGS_9 ", %74, %75, %76, %77"
#define REGS_10H REGS_10 ", %82, %83, %84, %85"
#define REGS_11H REGS_11 ", %90, %91, %92, %93"
#define REGS_12H REGS_12 ", %98, %99, %100, %101"
#define REGS_13H REGS_13 ", %106, %107, %108, %109"
#define REGS_14H REGS_14 ", %114, %115, %116, %117"
#define REGS_15H REGS_15 ", %122, %123, %124, %125"
#define OUTS8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define OUTS_1 OUTS8(0)
#define OUTS_2 OUTS_1, OUTS8(8)
#define OUTS_3 OUTS_2, OUTS8(16)
#define OUTS_4 OUTS_3, OUTS8(24)
#define OUTS_5 OUTS_4, OUTS8(32)
#define OUTS_6 OUTS_5, OUTS8(40)
#define OUTS_7 OUTS_6, OUTS8(48)
#define OUTS_8 OUTS_7, OUTS8(56)
#define OUTS_9 OUTS_8, OUTS8(64)
#define OUTS_10 OUTS_9, OUTS8(72)
#define OUTS_11 OUTS_10, OUTS8(80)
#define OUTS_12 OUTS_11, OUTS8(88)
#define OUTS_13 OUTS_12, OUTS8(96)
#define OUTS_14 OUTS_13, OUTS8(104)
#define OUTS_15 OUTS_14, OUTS8(112)
#define OUTS_16 OUTS_15, OUTS8(120)
#define OUTS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUTS_1H OUTS_1, OUTS4(8)
#define OUTS_2H OUTS_2, OUTS4(16)
#define OUTS_3H OUTS_3, OUTS4(24)
#define OUTS_4H OUTS_4, OUTS4(32)
#define OUTS_5H OUTS_5, OUTS4(40)
#define OUTS_6H OUTS_6, OUTS4(48)
#define OUTS_7H OUTS_7, OUTS4(56)
#define OUTS_8H OUTS_8, OUTS4(64)
#define OUTS_9H OUTS_9, OUTS4(72)
#define OUTS_10H OUTS_10, OUTS4(80)
#define OUTS_11H OUTS_11, OUTS4(88)
#define OUTS_12H OUTS_12, OUTS4(96)
#define OUTS_13H OUTS_13, OUTS4(104)
#define OUTS_14H OUTS_14, OUTS4(112)
#define OUTS_15H OUTS_15, OUTS4(120)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
// d [64, ROWS] += a [64, 16] b [ROWS, 16]^T, both in shared memory; FORMAT is bf16 or f16.
// ROWS = 16 ROWS_16, or where ROWS_16 ends in H, eight more.
#define PRODUCT(d, a, b)                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" TEXT(ROWS) "k16.f32." TEXT(FORMAT) "." TEXT(FORMAT) \
               " {" JOIN(REGS_, ROWS_16) "}, %0, %1, p, 1, 1, 0, 0;\n}"                               \
               : "+l"(a), "+l"(b), JOIN(OUTS_, ROWS_16))
