// select, prune and select_varlen in one launch: similarities by tiles, lists of neighbours, and
// one thread block per image that removes duplicates.

#include <atomic>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/removal.cuh"

namespace vispruner {
namespace {

// Shared memory for the totals of a block.
constexpr int32_t kTotalsBytes = 2 * kWarps * sizeof(int64_t);
// Score keys in shared memory at a time.
constexpr int32_t kScores = 4096;
static_assert(kScores * sizeof(int32_t) <= kTileBytes, "the keys are in the memory of the tile");
static_assert(kWarps * kStagingBytes <= kTileBytes, "the staging is in the memory of the tile");

__device__ int32_t score_key_at(const Tokens& scores, const char* row, int64_t token) {
  const int64_t offset = token * scores.token_stride;
  float score;
  if (scores.dtype == DType::kFloat32) {
    score = reinterpret_cast<const float*>(row)[offset];
  } else {
    const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[offset];
    score = scores.dtype == DType::kFloat16 ? half_to_float(bits)
                                            : __int_as_float(static_cast<int32_t>(bits) << 16);
  }
  return score_key(score);
}

// score_rank[t] of the tokens of one block: their positions in the order by score. Eight threads
// count for each token.
__device__ void rank_scores(const Tokens& scores, const char* row, int32_t n, int32_t first_token,
                            int32_t* keys, int32_t* score_rank) {
  constexpr int32_t kParts = kThreads / kTile;
  const int32_t token = first_token + static_cast<int32_t>(threadIdx.x) / kParts;
  const int32_t part = static_cast<int32_t>(threadIdx.x) % kParts;
  // No score has the key INT32_MIN + 1. NaN takes it, so that key - 1 does not overflow.
  const auto key_at = [&](int32_t t) {
    return t < n ? larger(INT32_MIN + 1, score_key_at(scores, row, t)) : INT32_MIN;
  };
  // That of a thread without a token is not used.
  const int32_t own = larger(INT32_MIN + 1, key_at(token));
  int32_t before = 0;
  for (int32_t first = 0; first < n; first += kScores) {
    const int32_t count = smaller(kScores, static_cast<int32_t>(rounded(n - first, 4)));
    __syncthreads();
    for (int32_t j = threadIdx.x; j < count; j += kThreads) keys[j] = key_at(first + j);
    __syncthreads();
    // Equal scores count if they are before the token: all of a vector of four, or, in the vector
    // of the token, some.
    const int32_t behind = token - first;
#pragma unroll 4
    for (int32_t j = 4 * part; j < count; j += 4 * kParts) {
      const int4 four = *reinterpret_cast<const int4*>(keys + j);
      const int32_t bound = own - (j + 4 <= behind);
      before += ((four.x > bound) + (four.y > bound)) + ((four.z > bound) + (four.w > bound));
    }
    if (part == 0 && 0 <= behind && behind < count) {
      for (int32_t j = behind & ~3; j < behind; ++j) before += keys[j] == own;
    }
  }
  for (int32_t distance = 1; distance < kParts; distance *= 2) {
    before += __shfl_xor_sync(kAllLanes, before, distance);
  }
  if (part == 0 && token < n) score_rank[token] = before;
  __syncthreads();
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
__device__ int2 clamped_range(Block& block, const Offsets& offsets, int64_t image, int32_t end) {
  const auto at = [=](int64_t i) { return offsets.data[i * offsets.stride]; };
  const int64_t largest = block.max(static_cast<int32_t>(image) + 1,
                                    [=](int32_t i) { return static_cast<int64_t>(at(i)); });
  const int32_t begin = smaller(larger(0, static_cast<int32_t>(largest)), end);
  return make_int2(begin, larger(begin, smaller(at(image + 1), end)));
}

// Whether an image may have this tile: a cheap test, because most tiles do not exist if most images
// are shorter than the longest one. Clamped offsets never make an image longer.
__device__ bool may_have_tile(const CudaSelect& call, int64_t image, int32_t tile) {
  const int32_t* const offset = call.cu_seqlens.data + image * call.cu_seqlens.stride;
  const int64_t length = int64_t{offset[call.cu_seqlens.stride]} - offset[0];
  const int64_t sides = ((length < call.tokens ? length : call.tokens) + kTile - 1) / kTile;
  return length > 0 && tile < sides * (sides + 1) / 2;
}

// An image of select_varlen. Its first tile also zeros output slots to which no image writes: those
// of this image beyond its `keep` tokens, and those before the first and after the last image.
__device__ Image packed_image(Block& block, const CudaSelect& call, int64_t image, int32_t tile) {
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

// Lists the neighbours of one block of tokens.
__device__ void list_block(const ImageScratch& scratch, int32_t n, int32_t token_block,
                           char* memory) {
  const int32_t ld = static_cast<int32_t>(rounded(n, 16));
  int32_t* const staging = reinterpret_cast<int32_t*>(memory + warp_id() * kStagingBytes);
  for (int32_t k = warp_id(); k < kTile; k += kWarps) {
    const int32_t token = token_block * kTile + k;
    if (token >= n) break;
    list_neighbours(scratch.sim + int64_t{token} * ld, n, token, scratch.lists, staging);
  }
}

// Copies features[indices[k]] to kept[k] for k < keep.
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

// Grid: images * tiles of 64 x 64 similarities. The thread block that finishes the last tile of a
//   block of tokens lists the neighbours of these tokens; the one that finishes the last lists of
//   an image runs its passes.
// Shared: 41 KiB for a tile; for the passes as much as they use, up to the limit of the device.
// Moves: features 2 * (N / 64 + 1) times, from L2 after the first time; similarities out once, and
//   in for the lists.
// Deterministic: all sums and comparisons are of integers; the order of arrival decides only which
//   thread block continues.
template <Matching kMatching, Fit kFit>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(const SelectArgs args) {
  const CudaSelect& call = args.call;
  const int32_t most_blocks = (call.tokens + kTile - 1) / kTile;
  const int32_t tiles = most_blocks * (most_blocks + 1) / 2;
  const int32_t tile = blockIdx.x % tiles;
  Block block{reinterpret_cast<int64_t*>(shared_memory())};
  char* const memory = shared_memory() + kTotalsBytes + kImageBytes;
  Image& image = *reinterpret_cast<Image*>(shared_memory() + kTotalsBytes);

  const bool packed = call.cu_seqlens.data != nullptr;
  if (packed && tile > 0 && !may_have_tile(call, blockIdx.x / tiles, tile)) return;
  {
    const int64_t number = blockIdx.x / tiles;
    const Image found =
        packed ? packed_image(block, call, number, tile) : batched_image(call, number);
    if (threadIdx.x == 0) image = found;
  }
  __syncthreads();
  const int32_t n = image.n, keep = image.keep;
  if (packed && keep == 0) return;
  const int32_t blocks = (n + kTile - 1) / kTile;
  // If scores alone decide, or all tokens are kept, only the tiles on the diagonal have work.
  const bool removes = keep > image.important && keep < n;
  if (tile >= (removes ? blocks * (blocks + 1) / 2 : blocks)) return;

  // Computed where it is needed, because it would take many registers too.
  const auto scratch = [&] {
    return Scratch(call.images, call.tokens, call.total, args.removes)
        .of_image(call.scratch, call.images, call.tokens, image.number, image.start);
  };
  const auto features = [&] {
    return call.features.data + image.features * element_size(call.features.dtype);
  };
  // Pairs of blocks by their distance around a circle: each pair once.
  const int32_t block_a = tile % blocks;
  const int32_t block_b = (block_a + tile / blocks) % blocks;
  // By three warps, because each waits for memory.
  if (threadIdx.x == 0) open(scratch().done_blocks, args.tag);
  if (threadIdx.x == kWarp && removes) open(scratch().done_tiles + block_a, args.tag);
  if (threadIdx.x == 2 * kWarp && removes && block_b != block_a) {
    open(scratch().done_tiles + block_b, args.tag);
  }

  // Phase 1: the order by score (on the diagonal) and the similarities.
  if (block_a == block_b) {
    rank_scores(call.scores, call.scores.data + image.scores * element_size(call.scores.dtype), n,
                block_a * kTile, reinterpret_cast<int32_t*>(memory), scratch().score_rank);
  }
  if (removes) {
    const auto make_tile = [&](auto dtype) {
      similarity_tile<decltype(dtype)::value>(features(), call.features.token_stride, call.channels,
                                              args.aligned, n, block_a, block_b, memory,
                                              scratch().sim, rounded(n, 16));
    };
    if (call.features.dtype == DType::kFloat32) {
      make_tile(std::integral_constant<DType, DType::kFloat32>{});
    } else if (call.features.dtype == DType::kFloat16) {
      make_tile(std::integral_constant<DType, DType::kFloat16>{});
    } else {
      make_tile(std::integral_constant<DType, DType::kBFloat16>{});
    }
  }

  // Phase 2: the thread block that finishes the last tile of a block of tokens lists the neighbours
  // of these tokens.
  bool last = !removes && arrive(scratch().done_blocks, blocks);
  for (int32_t side = 0; side < (removes ? 1 + (block_a != block_b) : 0); ++side) {
    const int32_t token_block = side == 0 ? block_a : block_b;
    if (!arrive(scratch().done_tiles + token_block, blocks)) continue;
    list_block(scratch(), n, token_block, memory);
    last = arrive(scratch().done_blocks, blocks) || last;
  }
  if (!last) return;

  // Phase 3: the thread block that finishes the last block of tokens of an image removes duplicates
  // and writes the answer.
  if (removes) {
    const Arena<kFit != Fit::kLess> arena = {memory, shared_memory() + args.shared_bytes,
                                             scratch().passes};
    remove_duplicates<kMatching, kFit>(block, args, arena, scratch().sim, scratch().lists,
                                       scratch().score_rank, image.n, image.keep, image.important,
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
  gather_kept(args, features(), call.indices + image.out, image.keep,
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

Kernel kernel_of(Matching matching, Fit fit) {
  static constexpr Kernel kernels[2][3] = {
      {select_kernel<Matching::kBipartite, Fit::kAll>,
       select_kernel<Matching::kBipartite, Fit::kCodes>,
       select_kernel<Matching::kBipartite, Fit::kLess>},
      {select_kernel<Matching::kPairwise, Fit::kAll>,
       select_kernel<Matching::kPairwise, Fit::kCodes>,
       select_kernel<Matching::kPairwise, Fit::kLess>},
  };
  return kernels[static_cast<int>(matching)][static_cast<int>(fit)];
}

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

// The bytes of shared memory that a block of the current device may have, queried once per device.
int shared_limit(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const int found = device < kDevices ? known[device].load(std::memory_order_acquire) : 0;
  if (found) return found;
  const CaptureMode relaxed;
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of the device");
  for (const Matching matching : {Matching::kBipartite, Matching::kPairwise}) {
    for (const Fit fit : {Fit::kAll, Fit::kCodes, Fit::kLess}) {
      check(cudaFuncSetAttribute(kernel_of(matching, fit),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, limit),
            "a kernel for this device");
    }
  }
  if (device < kDevices) known[device].store(limit, std::memory_order_release);
  return limit;
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
  const int64_t blocks = rounded(call.tokens, kTile) / kTile;
  const int64_t grid = call.images * (blocks * (blocks + 1) / 2);
  if (grid > INT32_MAX) {
    throw std::invalid_argument("vispruner_kernels: the grid would have " + std::to_string(grid) +
                                " blocks, expected at most 2147483647; call it with fewer images "
                                "at a time");
  }
  const DeviceGuard guard(device);
  SelectArgs args;
  args.call = call;
  args.removes = call.cu_seqlens.data || (call.keep > call.important && call.keep < call.tokens);
  const int64_t size = element_size(call.features.dtype);
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  args.aligned = aligned(reinterpret_cast<int64_t>(call.features.data)) &&
                 aligned(call.features.image_stride * size) &&
                 aligned(call.features.token_stride * size);
  // The shared memory that the passes of the longest image can use. A block may take all of it: a
  // multiprocessor has no registers for a second block.
  const int64_t arrays = kFixedBytes + pass_bytes(call.matching, call.tokens);
  const int64_t lists = call.tokens * kListBytes;
  const int64_t compact = call.matching == Matching::kBipartite ? kCompactBytes : 0;
  int64_t shared = shared_limit(device) / 16 * 16;
  const Fit fit = arrays + lists <= shared                                ? Fit::kAll
                  : arrays + call.tokens * kListed * int64_t{2} <= shared ? Fit::kCodes
                                                                          : Fit::kLess;
  const int64_t useful = rounded(arrays + (lists > compact ? lists : compact), 16);
  if (shared > useful) shared = useful;
  if (shared < kSharedBytes) shared = kSharedBytes;
  args.shared_bytes = static_cast<int32_t>(shared);
  args.tag = new_tag();

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel_of(call.matching, fit), args), "the launch of select");
}

}  // namespace vispruner
