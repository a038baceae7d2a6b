// select, prune and select_varlen in one launch: similarities by tiles, lists of neighbours, and
// one thread block per image that removes duplicates.

#include <algorithm>
#include <array>
#include <atomic>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/removal.cuh"

namespace vispruner {
namespace {

// Warps of the largest block, and shared memory for its totals.
constexpr int32_t kMostWarps = 16;
constexpr int32_t kTotalsBytes = 2 * kMostWarps * sizeof(int64_t);
static_assert(kMostWarps * kStagingBytes <= kTileBytes, "the staging is in the memory of the tile");

// score_rank[t] of two tokens, by a warp: the position in the order by score. It counts larger
// scores, and equal ones before the token.
template <DType kDType>
__device__ void rank_scores(const char* row, int64_t stride, int32_t n, int2 tokens,
                            int32_t* score_rank) {
  using Bits = std::conditional_t<kDType == DType::kFloat32, uint32_t, uint16_t>;
  const auto bits_at = [=](int32_t t) { return reinterpret_cast<const Bits*>(row)[t * stride]; };
  // No score has the key INT32_MIN + 1. NaN takes it, so that key - 1 does not overflow.
  const auto key_of = [](Bits bits) {
    return larger(INT32_MIN + 1, score_key(Slice<kDType>::value(bits)));
  };
  const int2 own = make_int2(key_of(bits_at(tokens.x)), key_of(bits_at(tokens.y)));
  int2 before = make_int2(0, 0);
  // A batch of loads without a condition between them.
  constexpr int32_t kBatch = 10;
#pragma unroll 1
  for (int32_t first = lane_id(); first < n; first += kBatch * kWarp) {
    Bits bits[kBatch];
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) bits[b] = bits_at(smaller(first + b * kWarp, n - 1));
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) {
      const int32_t j = first + b * kWarp, key = j < n ? key_of(bits[b]) : INT32_MIN;
      before.x += key > own.x - (j < tokens.x);
      before.y += key > own.y - (j < tokens.y);
    }
  }
  before =
      make_int2(__reduce_add_sync(kAllLanes, before.x), __reduce_add_sync(kAllLanes, before.y));
  if (lane_id() != 0) return;
  score_rank[tokens.x] = before.x;
  score_rank[tokens.y] = before.y;
}

// Calls f(std::integral_constant<DType, dtype>{}).
template <class F>
__device__ void with_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) {
    f(std::integral_constant<DType, DType::kFloat32>{});
  } else if (dtype == DType::kFloat16) {
    f(std::integral_constant<DType, DType::kFloat16>{});
  } else {
    f(std::integral_constant<DType, DType::kBFloat16>{});
  }
}

// The image of a thread block. It is in shared memory, because it would take many registers.
struct Image {
  // Its tokens, its kept tokens, and how many of those by score.
  int32_t n;
  int32_t keep;
  int32_t important;
  // Its first token: `start` among the tokens of all images, `first_index` in the tensors. A
  // batched image begins at index 0 of its own rows.
  int32_t first_index;
  int64_t start;
  int64_t number;
  // Its rows and its part of the answer: where they begin, in elements.
  int64_t features;
  int64_t scores;
  int64_t out;
  // Of this thread block: whether the image needs similarities, how many blocks of tokens it has,
  // and the two of the tile.
  bool removes;
  int32_t blocks;
  int32_t block_a;
  int32_t block_b;
};
constexpr int32_t kImageBytes = (sizeof(Image) + 15) / 16 * 16;
// Shared memory of a thread block: at least that of a tile.
constexpr int32_t kFixedBytes = kTotalsBytes + kImageBytes;
constexpr int32_t kSharedBytes = kFixedBytes + kTileBytes;

// An image of select or prune.
__device__ Image batched_image(const CudaSelect& call, int64_t image) {
  Image result;
  result.n = call.tokens;
  result.keep = call.keep;
  result.important = call.important;
  result.number = image;
  result.start = image * call.tokens;
  result.first_index = 0;
  result.features = image * call.features.image_stride;
  result.scores = image * call.scores.image_stride;
  result.out = image * call.keep;
  return result;
}

// offsets[image] and offsets[image + 1], clamped to [0, end]. An offset below an earlier one counts
// as the largest before it. So the ranges of images are disjoint for any offsets.
template <int32_t kThreads>
__device__ int2 clamped_range(CudaBlock<kThreads>& block, const Offsets& offsets, int64_t image,
                              int32_t end) {
  const auto at = [=](int64_t i) { return offsets.data[i * offsets.stride]; };
  const int64_t largest = block.max(static_cast<int32_t>(image) + 1,
                                    [=](int32_t i) { return static_cast<int64_t>(at(i)); });
  const int32_t begin = smaller(larger(0, static_cast<int32_t>(largest)), end);
  return make_int2(begin, larger(begin, smaller(at(image + 1), end)));
}

// Whether an image may have this tile: a cheap test, because most tiles do not exist if most images
// are shorter than the longest one. Clamped offsets never make an image longer.
template <int32_t kTile>
__device__ bool may_have_tile(const CudaSelect& call, int64_t image, int32_t tile) {
  const int32_t* const offset = call.cu_seqlens.data + image * call.cu_seqlens.stride;
  const int64_t length = int64_t{offset[call.cu_seqlens.stride]} - offset[0];
  const int64_t sides = ((length < call.tokens ? length : call.tokens) + kTile - 1) / kTile;
  return length > 0 && tile < sides * (sides + 1) / 2;
}

// An image of select_varlen. Its first tile also zeros output slots to which no image writes: those
// of this image beyond its `keep` tokens, and those before the first and after the last image.
template <int32_t kThreads>
__device__ Image packed_image(CudaBlock<kThreads>& block, const CudaSelect& call, int64_t image,
                              int32_t tile) {
  const int64_t most = call.total < INT32_MAX ? call.total : INT32_MAX;
  const int2 range = clamped_range(block, call.cu_seqlens, image, static_cast<int32_t>(most));
  const int2 slots = clamped_range(block, call.cu_keep, image, call.total_keep);
  Image result;
  result.n = smaller(range.y - range.x, call.tokens);
  result.keep = smaller(slots.y - slots.x, result.n);
  result.important = static_cast<int32_t>(important_count(result.keep, call.important_ratio));
  result.number = image;
  result.start = range.x;
  result.first_index = range.x;
  result.features = range.x * call.features.token_stride;
  result.scores = range.x * call.scores.token_stride;
  result.out = slots.x;
  const auto zero = [&](int32_t begin, int32_t end) {
    for (int32_t i = begin + threadIdx.x; i < end; i += kThreads) call.indices[i] = 0;
  };
  if (tile == 0) {
    if (image == 0) zero(0, slots.x);
    zero(slots.x + result.keep, slots.y);
    if (image == call.images - 1) zero(slots.y, call.total_keep);
  }
  return result;
}

// How many tiles of an image do anything.
__device__ inline int32_t tiles_with_work(const Image& image) {
  return image.removes ? image.blocks * (image.blocks + 1) / 2 : image.blocks;
}

// Lists the neighbours of one block of tokens.
template <int32_t kWarps, int32_t kTile, bool kLong>
__device__ void list_block(const ImageScratch& scratch, int32_t n, int32_t token_block,
                           char* memory) {
  const int32_t ld = static_cast<int32_t>(rounded(n, 16));
  int32_t* const staging = reinterpret_cast<int32_t*>(memory + warp_id() * kStagingBytes);
  for (int32_t k = warp_id(); k < kTile; k += kWarps) {
    const int32_t token = token_block * kTile + k;
    if (token >= n) break;
    const int32_t* const row = scratch.sim + int64_t{token} * ld;
    if constexpr (kLong) {
      list_neighbours<long_list_of(kWarps * kWarp)>(row, n, token, scratch.long_lists, staging);
    } else {
      list_neighbours(row, n, token, scratch.lists, staging);
    }
  }
}

// Copies features[indices[k]] to kept[k] for k < keep.
template <int32_t kWarps>
__device__ void gather_kept(const SelectArgs& args, const char* features, const int64_t* indices,
                            int32_t keep, char* kept) {
  const int64_t size = element_size(args.call.features.dtype);
  const int64_t row_bytes = args.call.channels * size;
  const int64_t vectors = args.aligned && row_bytes % 16 == 0 ? row_bytes / 16 : 0;
  for (int32_t k = warp_id(); k < keep; k += kWarps) {
    const char* const from = features + indices[k] * args.call.features.token_stride * size;
    char* const to = kept + k * row_bytes;
    constexpr int32_t kBatch = 4;
    for (int64_t first = lane_id(); first < vectors; first += kBatch * kWarp) {
      uint4 vector[kBatch];
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        const int64_t v = first + b * kWarp;
        if (v < vectors) vector[b] = reinterpret_cast<const uint4*>(from)[v];
      }
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        const int64_t v = first + b * kWarp;
        if (v < vectors) reinterpret_cast<uint4*>(to)[v] = vector[b];
      }
    }
#pragma unroll 4
    for (int64_t h = 8 * vectors + lane_id(); h < row_bytes / 2; h += kWarp) {
      reinterpret_cast<uint16_t*>(to)[h] = reinterpret_cast<const uint16_t*>(from)[h];
    }
  }
}

// Grid: images * tiles, each of kTile x kTile similarities. The thread block that finishes the last
//   tile of a block of tokens lists the neighbours of these tokens; the one that finishes the last
//   lists of an image runs its passes.
// Shared: at most 41 KiB for a tile; for the passes as much as they use, up to the device's limit.
// Moves: features 2 * (N / kTile + 1) times, from L2 after the first time; similarities out once,
//   and in for the lists.
// Deterministic: all sums and comparisons are of integers; the order of arrival decides only which
//   thread block continues.
template <Matching kMatching, int32_t kVariant>
__global__ void __launch_bounds__(kVariants[kVariant].threads, blocks_of(kVariants[kVariant]))
    select_kernel(const SelectArgs args) {
  constexpr int32_t kThreads = kVariants[kVariant].threads, kWarps = kThreads / kWarp;
  constexpr int32_t kTile = kVariants[kVariant].tile;
  const CudaSelect& call = args.call;
  const int32_t number = blockIdx.x / args.tiles, tile = blockIdx.x - number * args.tiles;
  CudaBlock<kThreads> block{reinterpret_cast<int64_t*>(shared_memory())};
  char* const memory = shared_memory() + kTotalsBytes + kImageBytes;
  Image& image = *reinterpret_cast<Image*>(shared_memory() + kTotalsBytes);

  const bool packed = call.cu_seqlens.data != nullptr;
  if (packed && tile > 0 && !may_have_tile<kTile>(call, number, tile)) return;
  {
    Image found = packed ? packed_image(block, call, number, tile) : batched_image(call, number);
    // If scores alone decide, or all tokens are kept, only the tiles on the diagonal have work.
    found.removes = found.keep > found.important && found.keep < found.n;
    found.blocks = (found.n + kTile - 1) / kTile;
    if (packed && found.keep == 0) return;
    if (tile >= tiles_with_work(found)) return;
    // Pairs of blocks by their distance around a circle: each pair once.
    const int32_t distance = tile / found.blocks, around = tile - distance * found.blocks;
    found.block_a = around;
    found.block_b = around + distance - (around + distance < found.blocks ? 0 : found.blocks);
    if (threadIdx.x == 0) image = found;
  }
  __syncthreads();

  // Computed where it is needed, because it would take many registers too.
  const auto scratch = [&] {
    return Scratch(call.images, call.tokens, call.total, args.removes)
        .of_image(call.scratch, call.images, call.tokens, image.number, image.start, image.n);
  };
  const auto features = [&] {
    return call.features.data + image.features * element_size(call.features.dtype);
  };
  // By the last warps: those of a small tile have no other work at first. Each waits for memory.
  if (threadIdx.x == kThreads - kWarp) open(scratch().done_blocks, args.tag);
  if (threadIdx.x == kThreads - 2 * kWarp && image.removes) {
    open(scratch().done_tiles + image.block_a, args.tag);
  }
  if (threadIdx.x == kThreads - 3 * kWarp && image.removes && image.block_b != image.block_a) {
    open(scratch().done_tiles + image.block_b, args.tag);
  }

  // Phase 1: the similarities, and the ranks of some scores: the image has all of them when all of
  // its tiles have arrived.
  constexpr int32_t kIdle = idle_warps(kThreads, kTile);
  const int32_t rankers = kIdle > 0 && image.removes ? kIdle : kWarps;
  const int32_t ranker = warp_id() - (kWarps - rankers);
  if (ranker >= 0) {
    with_dtype(call.scores.dtype, [&](auto dtype) {
      constexpr DType kDType = decltype(dtype)::value;
      const char* const row = call.scores.data + image.scores * element_size(call.scores.dtype);
      const int32_t n = image.n, stride = 2 * rankers * tiles_with_work(image);
#pragma unroll 1
      for (int32_t t = 2 * (tile * rankers + ranker); t < n; t += stride) {
        rank_scores<kDType>(row, call.scores.token_stride, n, make_int2(t, smaller(t + 1, n - 1)),
                            scratch().score_rank);
      }
    });
  }
  if (image.removes) {
    with_dtype(call.features.dtype, [&](auto dtype) {
      similarity_tile<kThreads, kTile, decltype(dtype)::value>(
          features(), call.features.token_stride, call.channels, args.aligned, memory,
          [&] { return Tile{image.n, image.block_a, image.block_b, scratch().sim}; });
    });
  }

  // Phase 2: the thread block that finishes the last tile of a block of tokens lists the neighbours
  // of these tokens.
  bool last = !image.removes && arrive(scratch().done_blocks, image.blocks);
#pragma unroll 1
  for (int32_t side = 0; side < 2; ++side) {
    const int32_t token_block = side == 0 ? image.block_a : image.block_b;
    if (!image.removes || (side == 1 && image.block_a == image.block_b)) break;
    if (!arrive(scratch().done_tiles + token_block, image.blocks)) continue;
    list_block<kWarps, kTile, kLongLists<kMatching, kVariant>>(scratch(), image.n, token_block,
                                                               memory);
    last = arrive(scratch().done_blocks, image.blocks);
  }
  if (!last) return;

  // Phase 3: the thread block that finishes the last block of tokens of an image removes duplicates
  // and writes the answer.
  if (image.removes) {
    const ArenaOf<kVariant> arena = {memory, shared_memory() + args.shared_bytes, scratch().passes};
    remove_duplicates<kMatching, kVariant>(
        block, args, arena, computed(scratch().sim), scratch().lists, scratch().long_lists,
        scratch().near, scratch().score_rank, image.n, image.keep, image.important,
        call.indices + image.out, image.first_index);
  } else {
    const int32_t* const score_rank = scratch().score_rank;
    int64_t* const out = call.indices + image.out;
    const int32_t first_index = image.first_index, keep = image.keep;
    block.each_in_order(
        image.n, [=](int32_t t) { return score_rank[t] < keep; },
        [=](int32_t t, int32_t k) { out[k] = first_index + t; });
  }
  if (!call.kept) return;
  const int64_t kept_bytes =
      int64_t{image.keep} * call.channels * element_size(call.features.dtype);
  gather_kept<kWarps>(args, features(), call.indices + image.out, image.keep,
                      call.kept + image.number * kept_bytes);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // Clears the error, so that the next CUDA call does not report it.
  cudaGetLastError();
  throw std::runtime_error(std::string("vispruner_kernels: ") + what + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                           "; VISPRUNER_KERNELS_BACKEND=triton avoids these CUDA kernels");
}

using Kernel = void (*)(const SelectArgs);

template <int32_t... kVariant>
constexpr std::array<std::array<Kernel, kVariantCount>, 2> kernels_of(
    std::integer_sequence<int32_t, kVariant...>) {
  return {{{select_kernel<Matching::kBipartite, kVariant>...},
           {select_kernel<Matching::kPairwise, kVariant>...}}};
}

// By matching and variant.
constexpr auto kernels = kernels_of(std::make_integer_sequence<int32_t, kVariantCount>{});

// Allows the queries of a first call while a graph is captured; they are not part of the graph.
class CaptureMode {
 public:
  CaptureMode() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "the capture mode"); }
  ~CaptureMode() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureMode(const CaptureMode&) = delete;
  CaptureMode& operator=(const CaptureMode&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The bytes of shared memory that a block may have, and the number of multiprocessors.
struct Limits {
  int32_t shared;
  int32_t multiprocessors;
};

// Those of the current device, queried once per device.
Limits limits_of(int device) {
  constexpr int kDevices = 64;
  static std::atomic<Limits> known[kDevices];
  const Limits found =
      device < kDevices ? known[device].load(std::memory_order_acquire) : Limits{0, 0};
  if (found.shared) return found;
  const CaptureMode relaxed;
  Limits limits = {0, 0};
  check(cudaDeviceGetAttribute(&limits.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of the device");
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "multiprocessors of the device");
  for (const auto& kernels_of_rule : kernels) {
    for (const Kernel kernel : kernels_of_rule) {
      check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared),
          "a kernel for this device");
    }
  }
  if (device < kDevices) known[device].store(limits, std::memory_order_release);
  return limits;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "the current device");
    if (before_ != device_) check(cudaSetDevice(device_), "the device of the tensors");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int before_ = 0;
};

// The shared memory that a block of this variant may have.
int64_t most_shared(const Variant& variant, const Limits& limits) {
  // The limit of a block is what a multiprocessor has less 1 KiB for each block.
  constexpr int32_t kReserved = 1024;
  return ((limits.shared + kReserved) / blocks_of(variant) - kReserved) / 16 * 16;
}

// The shared memory of the lists of n tokens that is useful, or without which a variant is not.
int64_t list_bytes(Matching matching, Fit fit, int64_t n, bool must) {
  if (fit == Fit::kAll) return n * kListBytes;
  if (matching == Matching::kPairwise) return n * kListed * sizeof(uint16_t);
  return must ? 0 : n * kNearBytes + name_bytes(n);
}

// The shared memory that it can use for the passes of the longest image, or must have if it is to
// run at all.
int64_t useful_shared(const CudaSelect& call, const Variant& variant, bool must) {
  if (variant.fit == Fit::kLess) return must ? kSharedBytes : INT32_MAX;
  const bool bipartite = call.matching == Matching::kBipartite;
  const int64_t lists = list_bytes(call.matching, variant.fit, call.tokens, must);
  // The compact matrix is where the lists were, behind names and numbers.
  const int64_t names = variant.fit == Fit::kAll ? 0 : name_bytes(call.tokens);
  const int64_t compact = bipartite && !must ? names + compact_bytes(variant.compact) + 64 : 0;
  const int64_t bytes =
      kFixedBytes + pass_bytes(call.matching, call.tokens, variant.fit) + std::max(lists, compact);
  return std::max<int64_t>(kSharedBytes, rounded(bytes, 16));
}

// Whether it is likely to be the fastest variant for this call.
bool suits(const CudaSelect& call, const Variant& variant, const Limits& limits) {
  // Found by simulation and arithmetic (docs/cuda.md).
  constexpr int64_t kManyTiles = 4, kShort = 1280;
  const int64_t tiles = call.images * tiles_of(call.tokens, variant.tile);
  if (variant.tile < kLargeTile && tiles > limits.multiprocessors) return false;
  return blocks_of(variant) == 1 ||
         (tiles >= kManyTiles * limits.multiprocessors && call.tokens <= kShort);
}

int32_t first_variant(const CudaSelect& call, const Limits& limits) {
  for (int32_t v = 0; v < kVariantCount; ++v) {
    const Variant& variant = kVariants[v];
    const bool fits = useful_shared(call, variant, true) <= most_shared(variant, limits);
    if (fits && suits(call, variant, limits)) return v;
  }
  return -1;
}

// A random tag, never 0 and almost surely different for each call: a counter through a mixer
// (splitmix64).
uint64_t new_tag() {
  static std::atomic<uint64_t> calls{uint64_t{std::random_device{}()} << 32 |
                                     std::random_device{}()};
  uint64_t x = calls.fetch_add(0x9e3779b97f4a7c15, std::memory_order_relaxed);
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return (x ^ x >> 31) >> kCountBits | uint64_t{1} << (63 - kCountBits);
}

}  // namespace

int64_t cuda_select_scratch(int64_t images, int64_t tokens, int64_t total, bool removes) {
  return Scratch(images, tokens, total, removes).bytes;
}

void cuda_select(const CudaSelect& call, int device, void* stream) {
  const DeviceGuard guard(device);
  SelectArgs args;
  args.call = call;
  args.removes = call.cu_seqlens.data || (call.keep > call.important && call.keep < call.tokens);
  const int64_t size = element_size(call.features.dtype);
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  args.aligned = aligned(reinterpret_cast<int64_t>(call.features.data)) &&
                 aligned(call.features.image_stride * size) &&
                 aligned(call.features.token_stride * size);
  const Limits limits = limits_of(device);
  const int32_t v = call.variant ? call.variant - 1 : first_variant(call, limits);
  if (v < 0 || v >= kVariantCount ||
      useful_shared(call, kVariants[v], true) > most_shared(kVariants[v], limits)) {
    throw std::invalid_argument("vispruner_kernels: variant " + std::to_string(call.variant) +
                                " of select does not exist, or its arrays for " +
                                std::to_string(call.tokens) +
                                " tokens do not fit in the shared memory of this device");
  }
  const Variant& variant = kVariants[v];
  const int64_t shared =
      std::min(useful_shared(call, variant, false), most_shared(variant, limits));
  args.shared_bytes = static_cast<int32_t>(shared);
  args.tag = new_tag();
  const int64_t tiles = tiles_of(call.tokens, variant.tile);
  const int64_t grid = call.images * tiles;
  args.tiles = static_cast<int32_t>(tiles);
  if (grid > INT32_MAX) {
    throw std::invalid_argument("vispruner_kernels: the grid would have " + std::to_string(grid) +
                                " blocks, expected at most 2147483647; call it with fewer images "
                                "at a time");
  }

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(variant.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernels[static_cast<int>(call.matching)][v], args),
        "the launch of select");
}

}  // namespace vispruner
