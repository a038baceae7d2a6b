// The passes of select_kernel alone, for sm90sim: one image whose similarities, lists and order by
// score are given. The lists come as pairs of a key and a token; a stage of its own converts them
// first, which no launch does.
#include "cuda/select.cu"

using namespace vispruner;

constexpr int32_t kThreads = 512;

// The driver allocates shared memory by these: the second and third, and the fourth and the product
// of the next two for each token, but at least the last. And scratch: the fourth for each token,
// and 2048. So the converted lists are part of the fourth.
extern "C" __constant__ int32_t sm90sim_sizes[] = {
    kThreads,
    kFixedBytes,
    static_cast<int32_t>(fixed_bytes(576)),
    17 + kListBytes,
    2,
    0,
    kFixedBytes + kCompactBytes + static_cast<int32_t>(fixed_bytes(576)) + 576 * 17,
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    passes(const int32_t* sim, const Best* pairs, const int32_t* order, int32_t n, int32_t keep,
           int32_t important, int32_t step, int32_t eager_rounds, int32_t shared_bytes,
           char* scratch, int64_t* out) {
  NeighbourLists lists;
  lists.keys = reinterpret_cast<int32_t*>(scratch);
  lists.codes = reinterpret_cast<uint16_t*>(lists.keys + int64_t{n} * kListed);
  char* const rest = reinterpret_cast<char*>(lists.codes + int64_t{n} * kListed);
  for (int32_t e = threadIdx.x; e < n * kListed; e += kThreads) {
    lists.key(e / kListed, e % kListed) = pairs[e].value;
    lists.code(e / kListed, e % kListed) = NeighbourLists::code_of(pairs[e].index, e % kListed);
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
        order, n, keep, important, out, 0);
  };
  // The variants with blocks of 512 threads and tiles of 64.
  static_assert(kVariants[3].fit == Fit::kAll && kVariants[4].fit == Fit::kCodes);
  if (SHARED) {
    run(std::integral_constant<int32_t, 3>{});
  } else if (kFixedBytes + pass_bytes(Matching::RULE, n) + n * kListed * 2 <= shared_bytes) {
    run(std::integral_constant<int32_t, 4>{});
  } else {
    run(std::integral_constant<int32_t, 5>{});
  }
}
