# Types of the C++ core; see csrc/bindings.cpp for what the tuples hold.
from typing import TypeAlias

_Tokens: TypeAlias = tuple[int, int, int, int]
_Heads: TypeAlias = tuple[int, int, int, int]
_Rule: TypeAlias = tuple[float, int, int, int, int, int]
_Shape: TypeAlias = tuple[int, int, int, int, int, float, int]

def simd_sets() -> list[str]: ...
def simd() -> str: ...
def use_simd(name: str) -> None: ...
def select(
    features: _Tokens,
    scores: _Tokens,
    images: int,
    n: int,
    channels: int,
    keep: int,
    rule: _Rule,
    threads: int,
    indices: int,
    kept: int,
) -> None: ...
def select_varlen(
    features: _Tokens,
    scores: _Tokens,
    cu_seqlens: int,
    cu_keep: int,
    images: int,
    channels: int,
    rule: _Rule,
    threads: int,
    indices: int,
) -> None: ...
def select_topk(
    scores: _Tokens, images: int, n: int, keep: int, threads: int, indices: int
) -> None: ...
def select_rows(
    scores: _Tokens, images: int, n: int, width: int, rows: int, threads: int, indices: int
) -> None: ...
def cls_scores(q: _Heads, k: _Heads, shape: _Shape, threads: int, scores: int) -> None: ...
def received_scores(
    q: _Heads, k: _Heads, lse: _Heads, shape: _Shape, threads: int, scores: int
) -> None: ...
def received_scores_varlen(
    q: _Heads,
    k: _Heads,
    lse: _Heads,
    cu_seqlens: int,
    total: int,
    shape: _Shape,
    threads: int,
    scores: int,
) -> None: ...

# With the CUDA kernels; see csrc/cuda/operators.h.
_Offsets: TypeAlias = tuple[int, int]
_CudaRule: TypeAlias = tuple[float, int, int, int]

cuda_architectures: str

def cuda_select_scratch(images: int, tokens: int, total: int, removes: bool) -> int: ...
def cuda_select(
    features: _Tokens,
    scores: _Tokens,
    cu_seqlens: _Offsets,
    cu_keep: _Offsets,
    images: int,
    n: int,
    channels: int,
    total: int,
    keep: int,
    important: int,
    rule: _CudaRule,
    indices: int,
    kept: int,
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
