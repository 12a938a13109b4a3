// Launches beyond device.cuh's: with more shared memory than 48 KB; in clusters, blocks that run at
// the same time and read one another's shared memory; and early, so that blocks begin while the
// kernel before them still runs (clusters and early launches: sm_90 and later).
#pragma once

#include <atomic>

#include "device.cuh"

namespace dparallel::cuda {

// The bytes of DPARALLEL_LARGE_SHARED of a launch, and the most of any launch of its kernel. The
// most is a property of the kernel and not of a launch, so that a device need be told once; another
// thread may launch the same kernel, and a recording may hold several launches of it.
struct LargeShared {
  size_t bytes = 0, most = 0;

  static constexpr LargeShared of(size_t bytes) { return {bytes, bytes}; }
};

#if defined(DPARALLEL_CUDA_HOST)

#define DPARALLEL_LARGE_SHARED(name, ...) DPARALLEL_SHARED(name, __VA_ARGS__)
#define DPARALLEL_LAUNCH_CLUSTERS(kernel, grid, cluster, block, shared, early, stream, ...)        \
  ((void)(stream),                                                                                 \
   cuda_host::large_shared(reinterpret_cast<const void*>(+kernel), (shared).bytes, (shared).most), \
   cuda_host::launch(                                                                              \
       grid, block, [&] { kernel(__VA_ARGS__); }, cluster, early),                                 \
   cudaGetLastError())
#define DPARALLEL_LAUNCH_EARLY(kernel, grid, block, stream, ...)                    \
  DPARALLEL_LAUNCH_CLUSTERS(kernel, grid, 1, block, dparallel::cuda::LargeShared{}, \
                            cuda_host::has_clusters(), stream, __VA_ARGS__)
inline void let_next_begin() {}
inline void wait_for_earlier() { cuda_host::wait_for_earlier(); }

template <auto kernel>
bool has_clusters_here() {
  return cuda_host::has_clusters();
}
// On a device of eight SMs.
template <auto kernel>
int clusters_at_once(unsigned cluster, unsigned, size_t) {
  return cluster == 1 || cuda_host::has_clusters() ? static_cast<int>(8 / cluster) : 0;
}
inline void team_barrier() { cuda_host::team_barrier(); }
inline void cluster_barrier() { cuda_host::cluster_barrier(); }
inline void leave_cluster() { cuda_host::cluster_barrier(); }
template <class V>
V load_of_peer(const V* p, unsigned rank) {
  return cuda_host::load(static_cast<const V*>(cuda_host::peer(p, rank)));
}
template <class V>
const V* of_peer(const V* p, unsigned rank) {
  return static_cast<const V*>(cuda_host::peer(p, rank));
}

#else

// Shared memory whose size the launch gives: at most one such name in a kernel.
#define DPARALLEL_LARGE_SHARED(name, ...)                       \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  auto& name = *reinterpret_cast<dparallel::cuda::Same<__VA_ARGS__>*>(name##_bytes)

// `cluster` blocks in a row are a cluster; the grid is a multiple of it. shared: a LargeShared.
// `early`: see wait_for_earlier. Yields the launch's cudaError_t, which cudaGetLastError does not
// tell any more.
#define DPARALLEL_LAUNCH_CLUSTERS(kernel, grid, cluster, block, shared, early, stream, ...) \
  dparallel::cuda::launch_clusters<kernel>(grid, cluster, block, shared, early,             \
                                           static_cast<cudaStream_t>(stream), __VA_ARGS__)
// DPARALLEL_LAUNCH of a kernel that waits for the kernels before it, see wait_for_earlier. Yields
// the launch's cudaError_t, too.
#define DPARALLEL_LAUNCH_EARLY(kernel, grid, block, stream, ...)                         \
  dparallel::cuda::launch_clusters<kernel>(grid, 1, block, {},                           \
                                           dparallel::cuda::has_clusters_here<kernel>(), \
                                           static_cast<cudaStream_t>(stream), __VA_ARGS__)

// Lets the next kernel begin, if it is launched early, once all blocks of this kernel have called
// this and there is room on the SMs. The next kernel's launch, and its work before it waits, then
// hide behind this kernel's work.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all earlier kernels are done and their writes are visible. In every kernel that is
// launched early each thread calls it, before it reads memory that earlier kernels may write, or
// writes memory that they may use. Memory that it reads before the call must have been written
// before the last kernel that was not launched early began: the early kernels since then, which all
// call let_next_begin, need not be done.
__device__ __forceinline__ void wait_for_earlier() {
  let_next_begin();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int kDevices = 64;  // of which something is remembered

// The current device's number, or -1 where nothing is remembered of it.
inline int known_device() {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess && device < kDevices ? device : -1;
}

// Lets `kernel` have `most` bytes of shared memory on the current device. Since a kernel always
// asks for the same, a device is told once, or by several threads that come first.
template <auto kernel>
bool allow_shared(size_t most) {
  static std::atomic<bool> allowed[kDevices];
  const int device = known_device();
  if (device >= 0 && allowed[device]) return true;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(most)) != cudaSuccess)
    return false;
  if (device >= 0) allowed[device] = true;
  return true;
}

template <auto kernel, class... Args>
[[nodiscard]] int launch_clusters(int64_t grid, unsigned cluster, unsigned block,
                                  LargeShared shared, bool early, cudaStream_t stream,
                                  const Args&... args) {
  // cudaGetLastError takes an error away, or the next launch would be blamed for it.
  if (shared.most > 0 && !allow_shared<kernel>(shared.most))
    return static_cast<int>(cudaGetLastError());
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_of(grid));
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared.bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  if (early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchKernelEx(&config, kernel, args...);
  return static_cast<int>(cudaGetLastError());
}

// Whether the code that runs on the current device was compiled for clusters, which the device then
// has; asked once for each device.
template <auto kernel>
bool has_clusters_here() {
  static std::atomic<int> known[kDevices];  // and one more
  const int device = known_device();
  if (device < 0) return false;
  std::atomic<int>& kept = known[device];
  if (kept == 0) {
    cudaFuncAttributes attributes{};
    const bool known_here = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    if (!known_here) cudaGetLastError();  // the launch has its own
    kept = 1 + (known_here && attributes.ptxVersion >= 90);
  }
  return kept > 1;
}

// The number of clusters of `cluster` blocks, up to 8, that run at once on the current device,
// which is asked the first time; 0: it has none, but at least one of a single block. GPCs have
// different numbers of SMs, so some SMs may find no place in a cluster. `kernel` stands for all
// kernels whose blocks take a whole SM.
template <auto kernel>
int clusters_at_once(unsigned cluster, unsigned block, size_t shared_bytes) {
  static std::atomic<int> known[kDevices][9];  // and one more
  const int device = known_device();
  if (device < 0) return cluster == 1;
  std::atomic<int>& kept = known[device][cluster];
  if (const int count = kept; count > 0) return count - 1;
  int count = 0;
  if (cluster == 1) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
      cudaGetLastError();
    if (count < 1) count = 1;
  } else if (has_clusters_here<kernel>()) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (!allow_shared<kernel>(shared_bytes) ||
        cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
      count = 0;
      cudaGetLastError();
    }
  }
  kept = count + 1;
  return count;
}

// A barrier of a block's 128 threads from a multiple of 128 on; their writes before it are then
// visible to each of them.
__device__ __forceinline__ void team_barrier() {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
}

// A barrier of all threads of the cluster that have not left; their writes before it are then
// visible to all of them.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#else
  __trap();
#endif
}

// A thread's last act: it stays until no block reads this block's shared memory any more. Its
// writes need not have arrived, as they must at a barrier.
__device__ __forceinline__ void leave_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;" ::
          : "memory");
#else
  __trap();
#endif
}

// Loads from the shared memory of the cluster's block `rank`, which must not have left, the vector
// whose address in this block's shared memory would be `p`.
__device__ __forceinline__ uint4 load_of_peer(const uint4* p, unsigned rank) {
  uint4 x{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 at;\n"
      "mapa.shared::cluster.u32 at, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [at];\n"
      "}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))), "r"(rank));
#endif
  return x;
}

// The address of that vector, for any load. A block that was not launched in a cluster is its own
// rank 0.
template <class V>
__device__ __forceinline__ const V* of_peer(const V* p, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t at;
  asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(p), "r"(rank));
  return reinterpret_cast<const V*>(at);
#else
  return p;
#endif
}

#endif

}  // namespace dparallel::cuda
