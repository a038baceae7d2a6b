// The passes of select_kernel alone, for sm90sim: one image whose similarities, lists and order by
// score are given. The lists come as pairs of a key and a token; a stage of its own converts them
// first, which no launch does. Long lists are made from the similarities.
#include "cuda/select.cu"

using namespace vispruner;

constexpr int32_t kThreads = 512;

// Scratch of a token: lists of all kinds, and arrays of the passes.
constexpr int32_t kLongBytes = kMostListed * (sizeof(uint16_t) + sizeof(int32_t));
constexpr int32_t kTokenBytes = kListBytes + kLongBytes + kNearBytes + 17;

// The driver allocates shared memory by these: the second and third, and the fourth and the product
// of the next two for each token, but at least the last; and scratch: the fourth for each token,
// and 2048. If that is more shared memory than there is, SHARED is false. Only scratch needs the
// fourth, so the third takes it off again for 576 tokens.
extern "C" __constant__ int32_t sm90sim_sizes[] = {
    kThreads,
    kFixedBytes,
    static_cast<int32_t>(fixed_bytes<ScannedSizes>(576)) - 576 * (kTokenBytes - kListBytes - 17),
    kTokenBytes,
    2,
    0,
    kFixedBytes + static_cast<int32_t>(compact_bytes(kMostCompact) + 64 +
                                       fixed_bytes<ScannedSizes>(576)) +
        576 * 17,
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    passes(const int32_t* sim, const Best* pairs, const int32_t* order, int32_t n, int32_t keep,
           int32_t important, int32_t step, int32_t eager_rounds, int32_t shared_bytes,
           char* scratch, int64_t* out) {
  constexpr bool kLongOnes = Matching::RULE == Matching::kBipartite && !SHARED;
  const int64_t size = n;
  NeighbourLists lists;
  lists.keys = reinterpret_cast<int32_t*>(scratch);
  lists.codes = reinterpret_cast<uint16_t*>(scratch + size * kListed * sizeof(int32_t));
  LongLists long_lists;
  long_lists.keys = reinterpret_cast<int32_t*>(scratch + size * kListBytes);
  long_lists.tokens = reinterpret_cast<uint16_t*>(long_lists.keys + size * kMostListed);
  char* const near = reinterpret_cast<char*>(long_lists.tokens + size * kMostListed);
  long_lists.near = near_lists({nullptr, nullptr, near}, n);
  char* const rest = near + near_bytes(1, size);
  if (kLongOnes) {
    int32_t* const staging =
        reinterpret_cast<int32_t*>(shared_memory() + kFixedBytes + warp_id() * kStagingBytes);
    for (int32_t t = warp_id(); t < n; t += kThreads / kWarp) {
      list_neighbours<long_list_of(kThreads)>(sim + int64_t{t} * ((n + 15) / 16 * 16), n, t,
                                              long_lists, staging);
    }
  } else {
    for (int32_t e = threadIdx.x; e < n * kListed; e += kThreads) {
      lists.key(e / kListed, e % kListed) = pairs[e].value;
      lists.code(e / kListed, e % kListed) = NeighbourLists::code_of(pairs[e].index, e % kListed);
    }
  }
  __syncthreads();
  char* const memory = shared_memory() + kFixedBytes;
  CudaBlock<kThreads> block{reinterpret_cast<int64_t*>(shared_memory())};
  SelectArgs args = {};
  args.call.step = step;
  args.call.eager_rounds = eager_rounds;
  args.shared_bytes = shared_bytes;
  const auto run = [&](auto variant) {
    constexpr int32_t kVariant = decltype(variant)::value;
    remove_duplicates<Matching::RULE, kVariant>(
        block, args, ArenaOf<kVariant>{memory, shared_memory() + shared_bytes, rest}, sim, lists,
        long_lists, near, order, n, keep, important, out, 0);
  };
  // As list_bytes in select.cu.
  constexpr int32_t kCodeBytes = Matching::RULE == Matching::kBipartite ? 0 : 2 * kListed;
  // The variants with blocks of 512 threads and tiles of 64.
  static_assert(kVariants[3].fit == Fit::kAll && kVariants[4].fit == Fit::kCodes);
  if (SHARED) {
    run(std::integral_constant<int32_t, 3>{});
  } else if (kFixedBytes + pass_bytes(Matching::RULE, n, Fit::kCodes) + n * kCodeBytes <=
             shared_bytes) {
    run(std::integral_constant<int32_t, 4>{});
  } else {
    run(std::integral_constant<int32_t, 5>{});
  }
}
