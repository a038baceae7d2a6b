// select, prune and select_varlen, one launch each: similarities by tiles, lists of neighbours, and
// for each image one thread block that removes duplicates.

#include <atomic>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/neighbours.cuh"
#include "cuda/operators.h"
#include "cuda/similarity.cuh"

namespace vispruner {
namespace {

constexpr int32_t kThreads = kTileThreads;
constexpr int32_t kWarps = kThreads / kWarp;
using Block = CudaBlock<kThreads>;

// Bits of a counter below its tag: more blocks than ever arrive at one.
constexpr int32_t kCountBits = 20;
// Shared memory for the totals of a block.
constexpr int32_t kTotalsBytes = 2 * kWarps * sizeof(int64_t);
// Keys of scores that a block compares with at a time.
constexpr int32_t kScores = 4096;
static_assert(kScores * sizeof(int32_t) <= kTileBytes, "they lie where the tile was");
static_assert(kWarps * kStagingBytes <= kTileBytes, "lists are made where the tile was");
constexpr int32_t kSharedBytes = kTotalsBytes + kTileBytes;
// What the passes need beside similarities and lists: bytes per token, and for rounding up.
constexpr int32_t kTokenBytes = 24;
constexpr int32_t kSlackBytes = 512;

VISPRUNER_HD int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Offsets into scratch.
struct Scratch {
  int64_t lists;
  int64_t place;
  int64_t passes;
  int64_t counters;
  int64_t bytes;

  VISPRUNER_HD Scratch(int64_t images, int64_t tokens, int64_t total, bool removes) {
    lists = removes ? total * rounded(tokens, 16) * sizeof(int32_t) : 0;
    place = lists + (removes ? total * kListed * sizeof(Best) : 0);
    passes = rounded(place + total * sizeof(int32_t), 256);
    counters = rounded(passes + (removes ? total * kTokenBytes + images * kSlackBytes : 0), 256);
    bytes = counters + images * (1 + rounded(tokens, kTile) / kTile) * sizeof(uint64_t);
  }
};

struct SelectArgs {
  CudaSelect call;
  bool removes;
  // Whether rows of features begin at multiples of 16 bytes.
  bool aligned;
  int32_t shared_bytes;
  uint64_t tag;
};

// Arrays for the passes: in shared memory, or while there is some. Where all are, the compiler
// knows that they are.
template <bool kShared>
struct Arena {
  char* shared;
  char* shared_end;
  char* global;

  template <class T>
  __device__ T* take(int64_t count) {
    const int64_t bytes = rounded(count * sizeof(T), 16);
    const bool fits = kShared || bytes <= shared_end - shared;
    T* const array = reinterpret_cast<T*>(fits ? shared : global);
    shared += fits ? bytes : 0;
    global += fits ? 0 : bytes;
    return array;
  }
};

// A counter is a word of the call's own scratch, which may hold anything: the call's random tag,
// then kCountBits bits of count. No launch has to zero it, and no two calls or streams share one.

// The first block to come opens it. One attempt: it fails only where another block's succeeded.
__device__ void open(uint64_t* counter, uint64_t tag) {
  auto* const word = reinterpret_cast<unsigned long long*>(counter);
  const unsigned long long found = *reinterpret_cast<volatile unsigned long long*>(counter);
  if (found >> kCountBits != tag) atomicCAS(word, found, tag << kCountBits);
}

// Whether this block is the last of `expected` to arrive. The last one sees what the others stored
// before they arrived, and closes the counter, so that a graph can be replayed. Nobody waits.
__device__ bool arrive(uint64_t* counter, int32_t expected) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    const uint64_t before = arrive_at(counter);
    last = static_cast<int32_t>(before & ((1u << kCountBits) - 1)) == expected - 1;
    // Tag 0 belongs to no call.
    if (last) *counter = 0;
  }
  return __syncthreads_or(last);
}

__device__ int32_t score_key_at(const Tokens& scores, const char* row, int64_t token) {
  const int64_t offset = token * scores.token;
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

// place[t] of the tokens of a tile's side: their positions in the order by score. Eight threads
// count for a token.
__device__ void rank_scores(const Tokens& scores, const char* row, int32_t n, int32_t first_token,
                            int32_t* keys, int32_t* place) {
  constexpr int32_t kParts = kThreads / kTile;
  const int32_t token = first_token + static_cast<int32_t>(threadIdx.x) / kParts;
  const int32_t part = static_cast<int32_t>(threadIdx.x) % kParts;
  const int32_t own = token < n ? score_key_at(scores, row, token) : 0;
  int32_t before = 0;
  for (int32_t first = 0; first < n; first += kScores) {
    const int32_t count = smaller(kScores, n - first);
    __syncthreads();
    for (int32_t j = threadIdx.x; j < count; j += kThreads) {
      keys[j] = score_key_at(scores, row, first + j);
    }
    __syncthreads();
    for (int32_t j = part; j < count; j += kParts) {
      before += keys[j] > own || (keys[j] == own && first + j < token);
    }
  }
  for (int32_t distance = 1; distance < kParts; distance *= 2) {
    before += __shfl_xor_sync(kAllLanes, before, distance);
  }
  if (part == 0 && token < n) place[token] = before;
  __syncthreads();
}

// Copies of the first `length` of kListed neighbours of each token, a power of two.
__device__ void copy_lists(const Best* lists, int32_t n, int32_t length, Best* copy) {
  static_assert(sizeof(uint4) == 2 * sizeof(Best), "two entries at a time");
  // Loaded in batches before anything is stored, for the compiler must take one for the other.
  constexpr int32_t kBatch = 8;
  const int32_t log2 = 30 - __clz(length);
  const int32_t count = n << log2;
  const uint4* const from = reinterpret_cast<const uint4*>(lists);
  uint4* const to = reinterpret_cast<uint4*>(copy);
  for (int32_t first = threadIdx.x; first < count; first += kBatch * kThreads) {
    uint4 two[kBatch];
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) {
      const int32_t v = first + b * kThreads;
      const int32_t token = v >> log2;
      if (v < count) two[b] = from[int64_t{token} * (kListed / 2) + (v - (token << log2))];
    }
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) {
      if (first + b * kThreads < count) to[first + b * kThreads] = two[b];
    }
  }
  __syncthreads();
}

// The `important` best by score, and those of the rest that are left when the rule has removed all
// but keep - important: out[keep], ascending.
template <Matching kMatching, bool kShared>
__device__ void remove_duplicates(Block& block, const SelectArgs& args, Arena<kShared> arena,
                                  const int32_t* sim, const Best* lists, const int32_t* order,
                                  int32_t n, int32_t keep, int32_t important, int64_t* out,
                                  int32_t first_index) {
  const int32_t ld = static_cast<int32_t>(rounded(n, 16));
  int32_t* const mask = arena.template take<int32_t>(ld);
  int32_t* const first = arena.template take<int32_t>(n);
  int32_t* const second = arena.template take<int32_t>(n + 1);
  // Whole lists in shared memory, half of each, or where they are.
  const auto listed = [&](Arena<kShared>& arena) {
    const int64_t free = arena.shared_end - arena.shared;
    const int64_t size = n * sizeof(Best);
    const int32_t length = size * kListed <= free ? kListed : kListed / 2;
    if (!kShared && size * length > free) return Lists{const_cast<Best*>(lists), kListed};
    Best* const copy = arena.template take<Best>(int64_t{n} * length);
    copy_lists(lists, n, length, copy);
    return Lists{copy, length};
  };
  if constexpr (kMatching == Matching::kPairwise) {
    int64_t* const pair = arena.template take<int64_t>(n);
    int32_t* const places = arena.template take<int32_t>(n);
    block.each(n, [=](int32_t t) { places[t] = order[t]; });
    block.each(ld, [=](int32_t t) { mask[t] = t < n && places[t] >= important ? kLives : kDead; });
    pairwise(block, sim, ld, n, n - keep, args.call.eager_rounds, places, first, second, pair, mask,
             listed(arena));
  } else {
    const int32_t half = (n + 1) / 2;
    int32_t* const values = arena.template take<int32_t>(half);
    int32_t* const ranks = arena.template take<int32_t>(half);
    block.each(half, [=](int32_t i) { ranks[i] = 0; });
    block.ranks = ranks;
    block.each(n, [=](int32_t t) {
      if (order[t] >= important) first[order[t] - important] = t;
    });
    // Where the lists were.
    Compact compact = {0, nullptr, nullptr};
    const int64_t free = arena.shared_end - arena.shared;
    for (int32_t most = 16; (most + 1) * most * static_cast<int64_t>(sizeof(int32_t)) <= free;
         most += 16) {
      compact.most = most;
    }
    compact.sim = reinterpret_cast<int32_t*>(arena.shared);
    compact.names = compact.sim + compact.most * compact.most;
    // Where tokens move at once, nobody reads a list.
    const Lists copies = n - important > compact.most ? listed(arena) : Lists{nullptr, kListed};
    const int32_t* const left =
        bipartite(block, sim, ld, n - important, keep - important, args.call.step, first, second,
                  values, mask, copies, compact);
    block.each(n, [=](int32_t t) { mask[t] = order[t] < important ? kLives : kDead; });
    block.each(keep - important, [=](int32_t p) { mask[left[p]] = kLives; });
  }
  block.each_in_order(
      n, [=](int32_t t) { return mask[t] == kLives; },
      [=](int32_t t, int32_t k) { out[k] = first_index + t; });
}

// offsets[image] and offsets[image + 1] within [0, end]; one that falls counts as the largest
// before it.
__device__ int2 range_of(Block& block, const Offsets& offsets, int64_t image, int32_t end) {
  const auto at = [=](int64_t i) { return offsets.data[i * offsets.stride]; };
  const int64_t largest = block.max(static_cast<int32_t>(image) + 1,
                                    [=](int32_t i) { return static_cast<int64_t>(at(i)); });
  const int32_t begin = smaller(larger(0, static_cast<int32_t>(largest)), end);
  return make_int2(begin, larger(begin, smaller(at(image + 1), end)));
}

// Grid: images * tiles of 64 x 64 similarities. The last tile to arrive at one of its two blocks of
//   tokens lists their neighbours, the last block to arrive at an image walks its passes.
// Shared: 41 KiB for a tile, for the passes as much as there is.
// Moves: features 2 * (N / 64 + 1) times, from L2 but for the first; similarities once out, and in
//   for the lists.
// Deterministic: all sums and comparisons are of integers; arrival decides only who goes on.
// kShared: shared memory holds all that the passes need, for an image of any size there is.
template <Matching kMatching, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(const SelectArgs args) {
  const CudaSelect& call = args.call;
  const int64_t size = call.features.dtype == DType::kFloat32 ? 4 : 2;
  const Scratch scratch(call.images, call.tokens, call.total, args.removes);
  const int32_t most_blocks = (call.tokens + kTile - 1) / kTile;
  const int32_t tiles = most_blocks * (most_blocks + 1) / 2;
  const int64_t image = blockIdx.x / tiles;
  const int32_t tile = blockIdx.x % tiles;
  char* const memory = shared_memory() + kTotalsBytes;
  Block block{reinterpret_cast<int64_t*>(shared_memory()), nullptr};

  // Which image: its tokens, where its answer goes, how many are kept.
  int32_t n = call.tokens, keep = call.keep, important = call.important;
  int64_t start = image * n;
  int32_t first_index = 0;
  const char* features = call.features.data;
  const char* scores = call.scores.data;
  const int64_t score_size = call.scores.dtype == DType::kFloat32 ? 4 : 2;
  int64_t* out = call.indices;
  if (call.cu_seqlens.data) {
    if (tile > 0) {
      // Most blocks, where most images are smaller than the largest. No image is longer than its
      // offsets say.
      const int32_t* const offset = call.cu_seqlens.data + image * call.cu_seqlens.stride;
      const int64_t length = int64_t{offset[call.cu_seqlens.stride]} - offset[0];
      const int64_t sides = ((length < n ? length : n) + kTile - 1) / kTile;
      if (length <= 0 || tile >= sides * (sides + 1) / 2) return;
    }
    // Whatever the offsets say, images are disjoint and within the tensors.
    const int64_t most = call.total < INT32_MAX ? call.total : INT32_MAX;
    const int2 range = range_of(block, call.cu_seqlens, image, static_cast<int32_t>(most));
    const int2 slots = range_of(block, call.cu_keep, image, call.keep);
    n = smaller(range.y - range.x, n);
    keep = smaller(slots.y - slots.x, n);
    important = static_cast<int32_t>(important_count(keep, call.important_ratio));
    start = first_index = range.x;
    if (tile == 0) {
      // What no image's tokens fill.
      const auto fill = [=](int32_t begin, int32_t end) {
        for (int32_t i = begin + threadIdx.x; i < end; i += kThreads) call.indices[i] = 0;
      };
      if (image == 0) fill(0, slots.x);
      fill(slots.x + keep, slots.y);
      if (image == call.images - 1) fill(slots.y, call.keep);
    }
    if (keep == 0) return;
    out += slots.x;
  } else {
    out += image * keep;
    features += image * call.features.batch * size;
    scores += image * call.scores.batch * score_size;
  }
  features += first_index * call.features.token * size;
  scores += first_index * call.scores.token * score_size;
  const int32_t blocks = (n + kTile - 1) / kTile;
  // Where the score alone decides, or nothing does, the tiles on the diagonal are enough.
  const bool removes = keep > important && keep < n;
  if (tile >= (removes ? blocks * (blocks + 1) / 2 : blocks)) return;

  const int32_t ld = static_cast<int32_t>(rounded(n, 16));
  int32_t* const sim = reinterpret_cast<int32_t*>(call.scratch) + start * rounded(call.tokens, 16);
  Best* const lists = reinterpret_cast<Best*>(call.scratch + scratch.lists) + start * kListed;
  int32_t* const place = reinterpret_cast<int32_t*>(call.scratch + scratch.place) + start;
  uint64_t* const counters = reinterpret_cast<uint64_t*>(call.scratch + scratch.counters);
  uint64_t* const block_counters = counters + call.images + image * most_blocks;
  // Pairs of blocks by their distance around a circle: each pair once.
  const int32_t block_a = tile % blocks;
  const int32_t block_b = (block_a + tile / blocks) % blocks;
  if (threadIdx.x == 0) {
    open(counters + image, args.tag);
    if (removes) open(block_counters + block_a, args.tag);
    if (removes && block_b != block_a) open(block_counters + block_b, args.tag);
  }

  // Phase 1: on the diagonal the order by score, and everywhere the similarities.
  if (block_a == block_b) {
    rank_scores(call.scores, scores, n, block_a * kTile, reinterpret_cast<int32_t*>(memory), place);
  }
  if (removes) {
    const auto tile_of = [&](auto dtype) {
      similarity_tile<decltype(dtype)::value>(features, call.features.token, call.channels,
                                              args.aligned, n, block_a, block_b, memory, sim, ld);
    };
    if (call.features.dtype == DType::kFloat32) {
      tile_of(std::integral_constant<DType, DType::kFloat32>{});
    } else if (call.features.dtype == DType::kFloat16) {
      tile_of(std::integral_constant<DType, DType::kFloat16>{});
    } else {
      tile_of(std::integral_constant<DType, DType::kBFloat16>{});
    }
  }

  // Phase 2: whose tile was the last of a block lists the neighbours of its tokens. Rows are copied
  // to shared memory if they all fit.
  bool last = !removes && arrive(counters + image, blocks);
  for (int32_t side = 0; side < (removes ? 1 + (block_a != block_b) : 0); ++side) {
    const int32_t side_block = side == 0 ? block_a : block_b;
    if (!arrive(block_counters + side_block, blocks)) continue;
    Best* const staging = reinterpret_cast<Best*>(memory) + warp_id() * kListed;
    int32_t* const rows = reinterpret_cast<int32_t*>(memory + kWarps * kStagingBytes);
    const bool copied =
        kTotalsBytes + kWarps * (kStagingBytes + ld * static_cast<int64_t>(sizeof(int32_t))) <=
        args.shared_bytes;
    for (int32_t k = warp_id(); k < kTile; k += kWarps) {
      const int32_t token = side_block * kTile + k;
      if (token >= n) break;
      const int32_t* row = sim + int64_t{token} * ld;
      if (copied) {
        int32_t* const copy = rows + warp_id() * ld;
        for (int32_t j = lane_id(); j < ld; j += kWarp) copy[j] = row[j];
        __syncwarp();
        row = copy;
      }
      list_neighbours(row, n, ld, token, staging, lists + int64_t{token} * kListed);
    }
    last = arrive(counters + image, blocks) || last;
  }
  if (!last) return;

  // Phase 3: whose block was the last of an image removes duplicates and writes the result.
  if (removes) {
    char* const passes = call.scratch + scratch.passes + start * kTokenBytes;
    const Arena<kShared> arena = {
        memory, shared_memory() + args.shared_bytes,
        reinterpret_cast<char*>(
            rounded(reinterpret_cast<int64_t>(passes) + image * kSlackBytes, 16))};
    remove_duplicates<kMatching, kShared>(block, args, arena, sim, lists, place, n, keep, important,
                                          out, first_index);
  } else {
    block.each_in_order(
        n, [=](int32_t t) { return place[t] < keep; },
        [=](int32_t t, int32_t k) { out[k] = first_index + t; });
  }
  if (!call.kept) return;
  const int64_t row_bytes = call.channels * size;
  char* const kept = call.kept + image * keep * row_bytes;
  const int64_t vectors = args.aligned && row_bytes % 16 == 0 ? row_bytes / 16 : 0;
  for (int32_t k = warp_id(); k < keep; k += kWarps) {
    const char* const from = features + out[k] * call.features.token * size;
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

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // The next call is not to find it.
  cudaGetLastError();
  throw std::runtime_error(std::string("vispruner_kernels: ") + what + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                           "; VISPRUNER_KERNELS_BACKEND=triton does without the CUDA kernels");
}

using Kernel = void (*)(const SelectArgs);

Kernel kernel_of(Matching matching, bool shared) {
  constexpr Matching kFirst = Matching::kBipartite, kSecond = Matching::kPairwise;
  if (matching == kFirst)
    return shared ? select_kernel<kFirst, true> : select_kernel<kFirst, false>;
  return shared ? select_kernel<kSecond, true> : select_kernel<kSecond, false>;
}

// A first call may come while a graph is captured: what it asks for is not part of it.
class CaptureMode {
 public:
  CaptureMode() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "the capture mode"); }
  ~CaptureMode() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureMode(const CaptureMode&) = delete;
  CaptureMode& operator=(const CaptureMode&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Bytes of shared memory that a block may have; asked for once a device, which is the current one.
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
    for (const bool shared : {false, true}) {
      check(cudaFuncSetAttribute(kernel_of(matching, shared),
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

// Random, never 0, and not that of another call: bits of a counter through a mixer (splitmix64).
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
  const int64_t size = call.features.dtype == DType::kFloat32 ? 4 : 2;
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  args.aligned = aligned(reinterpret_cast<int64_t>(call.features.data)) &&
                 aligned(call.features.batch * size) && aligned(call.features.token * size);
  // All that the passes of an image can use; registers let no second block on a multiprocessor.
  const auto needed = [&](int32_t listed) {
    return rounded(
        kTotalsBytes + kSlackBytes + int64_t{call.tokens} * (kTokenBytes + listed * sizeof(Best)),
        16);
  };
  int64_t shared = shared_limit(device) / 16 * 16;
  const bool all_shared = needed(kListed / 2) <= shared;
  if (shared > needed(kListed)) shared = needed(kListed);
  if (shared < kSharedBytes) shared = kSharedBytes;
  args.shared_bytes = static_cast<int32_t>(shared);
  args.tag = new_tag();

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel_of(call.matching, all_shared), args),
        "the launch of select");
}

}  // namespace vispruner
