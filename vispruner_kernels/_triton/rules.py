"""What the kernels share: the integer keys of docs/contract.md and arrival at a counter."""

from __future__ import annotations

import triton
import triton.language as tl

INT32_MIN = tl.constexpr(-(2**31))
INT32_MAX = tl.constexpr(2**31 - 1)
INT64_MIN = tl.constexpr(-(2**63))
INT64_MAX = tl.constexpr(2**63 - 1)
# Bits of a token index; N <= 16384.
INDEX_BITS = tl.constexpr(14)
LAST_INDEX = tl.constexpr(2**14 - 1)
# Keys that are ranked at once, and those they are compared with in a step.
RANKED = tl.constexpr(256)
COUNT = tl.constexpr(32)
# Bits of a counter below its tag: more programs than ever arrive at one.
COUNT_BITS = tl.constexpr(20)
COUNT_MASK = tl.constexpr(2**20 - 1)


@triton.jit
def float_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def ordered(x):
    """int32 with the order of floats that are neither NaN nor -0.0."""
    bits = float_bits(x)
    return tl.where(bits >= 0, bits, bits ^ INT32_MAX)


@triton.jit
def score_key(x):
    """The same for any float: -0.0 equals 0.0, NaN is below everything."""
    bits = float_bits(x)
    key = tl.where(bits == INT32_MIN, 0, ordered(x))
    return tl.where((bits & INT32_MAX) > 0x7F800000, INT32_MIN, key)


@triton.jit
def index_key(value, index):
    """Unique int64 keys of int32 values: larger first, equal values by the smaller index."""
    return (value.to(tl.int64) << 32) + (index ^ INT32_MAX).to(tl.int64)


@triton.jit
def key_value(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def key_index(key):
    return (key & INT32_MAX).to(tl.int32) ^ INT32_MAX


@triton.jit
def pair_key(value, a, b):
    """The key of a pair of tokens: similarity descending, then the smaller and the larger index
    ascending."""
    key = (value.to(tl.int64) << INDEX_BITS) + (tl.minimum(a, b) ^ LAST_INDEX)
    return (key << INDEX_BITS) + (tl.maximum(a, b) ^ LAST_INDEX)


@triton.jit
def pair_value(key):
    return (key >> (2 * INDEX_BITS)).to(tl.int32)


@triton.jit
def ranked_offsets():
    """[RANKED / 32, 32]: Triton gives each column to a lane, so that a thread has many keys, and a
    warp its share of those they are compared with. Else loads take the time."""
    return tl.arange(0, RANKED // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def count_larger(keys_ptr, n, key):
    """How many of keys[0:n] are larger than each key of `ranked_offsets`: its rank among unique
    keys."""
    larger = tl.zeros([RANKED // 32, COUNT, 32], tl.int32)
    for first in range(0, n, COUNT):
        offs = first + tl.arange(0, COUNT)
        other = tl.load(keys_ptr + offs, mask=offs < n, other=INT64_MIN)
        larger += (other[None, :, None] > key[:, None, :]).to(tl.int32)
    return tl.sum(larger, axis=1)


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


# A counter is an int64 in the call's own, uninitialised scratch: the call's random tag, then
# COUNT_BITS bits of count. No launch has to zero it, and no two calls or streams share one.


@triton.jit
def read_counter(counter_ptr):
    """What `arrive` wants to know, read some time before, so that nobody waits for it."""
    return tl.load(counter_ptr, volatile=True)


@triton.jit
def arrive(counter_ptr, word, tag, expected):
    """Whether this program is the last of `expected` to arrive. The last one sees what the others
    stored before they arrived, and must close the counter, so that a CUDA graph can be replayed.

    Nobody waits for anybody. `word`: from read_counter.
    """
    # The first one opens it. One attempt: it fails only where another program's succeeded.
    if (word >> COUNT_BITS) != tag:
        tl.atomic_cas(counter_ptr, word, tag.to(tl.int64) << COUNT_BITS, sem="relaxed")
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    word = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    return (word & COUNT_MASK) == expected - 1


@triton.jit
def close_counter(counter_ptr):
    """Tag 0 belongs to no call."""
    tl.store(counter_ptr, 0)
