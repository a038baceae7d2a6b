# Types of the C++ core; csrc/bindings.cpp defines it. All addresses are data pointers of tensors.
#
# The TypedDicts exist only here. Each has the fields of the C++ struct of the same name, in
# csrc/contract.h, csrc/cpu/operators.h and csrc/cuda/operators.h.
from collections.abc import Callable
from typing import Any, TypedDict

class Tokens(TypedDict):
    data: int
    dtype: int
    image_stride: int
    token_stride: int

class Heads(TypedDict):
    data: int
    image_stride: int
    token_stride: int
    head_stride: int

class LogSumExp(TypedDict):
    data: int
    image_stride: int
    head_stride: int
    token_stride: int

class SelectRule(TypedDict):
    important_ratio: float
    step: int
    matching: int
    block_threads: int
    eager_rounds: int
    compact_to: int

class AttentionShape(TypedDict):
    dtype: int
    images: int
    sequence: int
    heads: int
    head_dim: int
    scale: float
    num_prefix: int

def simd_sets() -> list[str]: ...
def simd() -> str: ...
def use_simd(name: str) -> None: ...
def select(
    *,
    features: Tokens,
    scores: Tokens,
    images: int,
    tokens: int,
    channels: int,
    keep: int,
    rule: SelectRule,
    threads: int,
    indices: int,
    kept: int,
) -> None: ...
def select_varlen(
    *,
    features: Tokens,
    scores: Tokens,
    cu_seqlens: int,
    cu_keep: int,
    images: int,
    channels: int,
    rule: SelectRule,
    threads: int,
    indices: int,
) -> None: ...
def select_topk(
    *, scores: Tokens, images: int, tokens: int, keep: int, threads: int, indices: int
) -> None: ...
def select_rows(
    *, scores: Tokens, images: int, tokens: int, width: int, rows: int, threads: int, indices: int
) -> None: ...
def cls_scores(*, q: Heads, k: Heads, shape: AttentionShape, threads: int, scores: int) -> None: ...
def received_scores(
    *, q: Heads, k: Heads, lse: LogSumExp, shape: AttentionShape, threads: int, scores: int
) -> None: ...
def received_scores_varlen(
    *,
    q: Heads,
    k: Heads,
    lse: LogSumExp,
    cu_seqlens: int,
    total: int,
    shape: AttentionShape,
    threads: int,
    scores: int,
) -> None: ...

# csrc/torch/registration.h. Names and device types of the operators that it can register.
torch_operators: tuple[tuple[str, str], ...]

def load_torch(
    *,
    cpu_library: str,
    cuda_library: str,
    block_threads: int,
    eager_rounds: int,
    compact_to: int,
    to_tensors: Callable[..., Any],
    to_handles: Callable[..., Any],
    cuda_variant: Callable[..., int],
) -> None: ...
def register_operator(
    *, device: str, name: str, library: str, key: str, function: Callable[..., Any]
) -> None: ...

# Only in a build with the CUDA kernels.

class Offsets(TypedDict):
    data: int
    stride: int

class CudaSelect(TypedDict):
    features: Tokens
    scores: Tokens
    cu_seqlens: Offsets
    cu_keep: Offsets
    images: int
    tokens: int
    channels: int
    total: int
    keep: int
    important: int
    total_keep: int
    important_ratio: float
    step: int
    matching: int
    eager_rounds: int
    variant: int
    indices: int
    kept: int
    scratch: int

class Variant(TypedDict):
    threads: int
    tile: int
    fit: int
    at_once: int
    compact: int

cuda_architectures: str
# csrc/cuda/variants.h, in its order.
cuda_variants: tuple[Variant, ...]

def cuda_select_scratch(*, images: int, tokens: int, total: int, removes: bool) -> int: ...
def cuda_select(*, call: CudaSelect, device: int, stream: int) -> None: ...
