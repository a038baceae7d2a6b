"""Shared by the kernels: the integer keys of docs/contract.md and arrival at a counter."""

from __future__ import annotations

import triton
import triton.language as tl

# tl.debug_barrier() is __syncthreads(): the threads of a program see each other's stores. It stands
# wherever a thread reads elements that another one stored.

INT32_MIN = tl.constexpr(-(2**31))
INT32_MAX = tl.constexpr(2**31 - 1)
INT64_MIN = tl.constexpr(-(2**63))
INT64_MAX = tl.constexpr(2**63 - 1)
# Bits of a token index; N <= 16384.
INDEX_BITS = tl.constexpr(14)
LAST_INDEX = tl.constexpr(2**14 - 1)
# The most keys that are sorted at once. Blocks of 2048 would take the compiler 15 s.
SORTED = tl.constexpr(512)
# Bits of a counter below its tag, enough for all programs that arrive at one.
COUNT_BITS = tl.constexpr(20)
COUNT_MASK = tl.constexpr(2**20 - 1)


@triton.jit
def float_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def ordered(x):
    """Map floats other than NaN and -0.0 to int32 of the same order."""
    bits = float_bits(x)
    return tl.where(bits >= 0, bits, bits ^ INT32_MAX)


@triton.jit
def score_key(x):
    """Map any floats to int32 of the same order: -0.0 equals 0.0, NaN is below all others."""
    bits = float_bits(x)
    key = tl.where(bits == INT32_MIN, 0, ordered(x))
    return tl.where((bits & INT32_MAX) > 0x7F800000, INT32_MIN, key)


@triton.jit
def index_key(value, index):
    """Unique int64 keys of int32 values. The larger value has the larger key; of equal values, the
    one with the smaller index has it."""
    return (value.to(tl.int64) << 32) + (index ^ INT32_MAX).to(tl.int64)


@triton.jit
def key_value(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def key_index(key):
    return (key & INT32_MAX).to(tl.int32) ^ INT32_MAX


@triton.jit
def pair_key(value, a, b):
    """The key of a pair of tokens. The pair with the larger similarity has the larger key. Of equal
    similarities, it is the pair with the smaller first index, then with the smaller second index;
    the first index of a pair is the smaller one."""
    key = (value.to(tl.int64) << INDEX_BITS) + (tl.minimum(a, b) ^ LAST_INDEX)
    return (key << INDEX_BITS) + (tl.maximum(a, b) ^ LAST_INDEX)


@triton.jit
def pair_value(key):
    return (key >> (2 * INDEX_BITS)).to(tl.int32)


@triton.jit
def pair_tokens(key):
    first, second = (key >> INDEX_BITS).to(tl.int32), key.to(tl.int32)
    return (first & LAST_INDEX) ^ LAST_INDEX, (second & LAST_INDEX) ^ LAST_INDEX


@triton.jit
def sorted_keys(keys_ptr, n, BLOCK: tl.constexpr):
    """The first BLOCK of n keys, the largest first, and their new offsets."""
    offs = tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + offs, mask=offs < n, other=INT64_MIN)
    return tl.sort(key, descending=True), offs


@triton.jit
def sort_blocks(keys_ptr, n):
    """Sort each block of SORTED keys; `ranked_block` then ranks the keys of all blocks."""
    for first in range(0, n, SORTED):
        key, offs = sorted_keys(keys_ptr + first, n - first, SORTED)
        tl.store(keys_ptr + first + offs, key, mask=offs < n - first)
    tl.debug_barrier()


@triton.jit
def ranked_block(keys_ptr, n, first):
    """(key, mask, rank) of the sorted block that begins at `first`, the ranks among all n keys."""
    offs = tl.arange(0, SORTED)
    mask = offs < n - first
    key = tl.load(keys_ptr + first + offs, mask=mask, other=INT64_MIN)
    rank = offs
    for other in range(0, n, SORTED):
        if other != first:
            rank += _count_larger(keys_ptr + other, tl.minimum(n - other, SORTED), key)
    return key, mask, rank


@triton.jit
def _count_larger(keys_ptr, n, key):
    """Count those of n <= SORTED sorted keys that are larger than each `key`, by bisection."""
    larger = tl.zeros([SORTED], tl.int32)
    step = SORTED
    while step > 0:
        more = larger + step
        other = tl.load(keys_ptr + more - 1, mask=more <= n, other=INT64_MIN)
        larger = tl.where(other > key, more, larger)
        step = step // 2
    return larger


@triton.jit
def rank_by_score(scores_ptr, stride_sn, N, offs_n, mask_n, BLOCK_N: tl.constexpr):
    """Positions of BLOCK_N tokens in the order by score."""
    score = tl.load(scores_ptr + offs_n.to(tl.int64) * stride_sn, mask=mask_n, other=0.0)
    key = index_key(score_key(score), offs_n)
    larger = tl.zeros([BLOCK_N, BLOCK_N], tl.int32)
    for first in range(0, N, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        mask = offs < N
        score = tl.load(scores_ptr + offs.to(tl.int64) * stride_sn, mask=mask, other=0.0)
        other = tl.where(mask, index_key(score_key(score), offs), INT64_MIN)
        larger += (other[:, None] > key[None, :]).to(tl.int32)
    return tl.sum(larger, axis=0)


# A counter is an int64 in the uninitialised scratch of one call: the random tag of the call, then
# COUNT_BITS bits of count. So no launch has to zero counters, and calls and streams share none.


@triton.jit
def read_counter(counter_ptr):
    """The `word` for `arrive`, loaded early to hide the latency."""
    return tl.load(counter_ptr, volatile=True)


@triton.jit
def arrive(counter_ptr, word, tag, expected):
    """Whether this program is the last of `expected` programs to arrive; none of them waits.

    The last one sees all stores of the others from before their arrival. It must close the counter:
    a replay of a CUDA graph has the same tag, so an open counter would continue to count. `word`
    comes from read_counter.
    """
    # The first program opens the counter. If this attempt fails, another program has opened it.
    if (word >> COUNT_BITS) != tag:
        tl.atomic_cas(counter_ptr, word, tag.to(tl.int64) << COUNT_BITS, sem="relaxed")
    # The stores of all threads come before the release by one thread.
    tl.debug_barrier()
    word = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    return (word & COUNT_MASK) == expected - 1


@triton.jit
def close_counter(counter_ptr):
    """Reset the counter: no call has tag 0."""
    tl.store(counter_ptr, 0)
