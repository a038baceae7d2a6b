"""The choice of the kernel of cls_attention on a GPU, with stand-ins for the GPU and for cuDNN."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vispruner_kernels import _pytorch_attention, _tuned, reference
from vispruner_kernels._pytorch_attention import attention, chosen
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import assert_close, assert_same_bits, sample_qkv


@pytest.fixture
def cudnn(monkeypatch):
    """A GPU whose table names cuDNN, which serves. Its attention is the reference's."""
    calls = []

    def stand_in(q, k, v, attn_bias, compute_log_sumexp, scale):
        assert attn_bias is None
        assert not compute_log_sumexp
        calls.append(scale)
        out = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), scale)
        # As PyTorch: with the strides of q.
        return torch.empty_like(q).copy_(out.transpose(1, 2)), None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", stand_in)
    monkeypatch.setattr(_tuned, "capability", lambda device: "9.0")
    monkeypatch.setattr(_pytorch_attention, "cudnn_serves", lambda q, k, v: True)
    row = {"capability": "9.0", "head_dim": 16, "images": 1, "kernel": "cudnn"}
    monkeypatch.setitem(_tuned.ROWS, "attention", [row])
    return calls


def test_the_operator_of_pytorch_has_the_arguments_that_are_passed():
    with FakeTensorMode():
        q = torch.empty(2, 40, 3, 72, dtype=torch.float16, device="cuda")
        out = attention("cudnn", q, q, q, None)
    assert (out.shape, out.dtype, out.stride()) == (q.shape, q.dtype, q.stride())


def test_tensors_of_a_cpu_are_not_served():
    assert not _pytorch_attention.cudnn_serves(*sample_qkv(1, 40, 3, 16, torch.float16, 1))


@pytest.mark.parametrize("scale", [None, 0.3, -0.3])
@pytest.mark.parametrize("kernel", ["sdpa", "cudnn"])
def test_the_output_is_contiguous_and_right(kernel, scale, cudnn):
    # Tokens first: with one image PyTorch's output would have the strides of q.
    q, k, v = (x.transpose(0, 1) for x in torch.randn(3, 40, 1, 3, 16).half())
    out = attention(kernel, q, k, v, scale)
    assert out.stride() == torch.empty(q.shape).stride()
    expected = reference.attention(q.double(), k.double(), v.double(), scale)
    assert_close(out, expected, 2**-8)
    assert all(given > 0 for given in cudnn)


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn"])
def test_no_images_have_no_output(kernel, cudnn):
    x = torch.empty(0, 40, 3, 16, dtype=torch.float16)
    assert attention(kernel, x, x, x, None).shape == x.shape
    assert not cudnn


def test_memory_at_any_address_reaches_pytorch_aligned():
    q, k, v = sample_qkv(2, 40, 3, 16, torch.float16, 1)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert odd.data_ptr() % 16
    assert_same_bits(attention("sdpa", odd, k, v, None), attention("sdpa", q, k, v, None))


def test_auto_is_that_of_the_table_for_usual_tensors_only(cudnn):
    q, k, v = sample_qkv(2, 40, 3, 16, torch.float16, 1)
    assert chosen("auto", q, k, v, None, True) == "cudnn"
    assert chosen("auto", q, k, v, 1.0, True) == "cudnn"
    for scale in (0.0, -1.0, 1e-40, 2e38):
        assert chosen("auto", q, k, v, scale, True) == "fused"
    assert chosen("auto", q, k, v, None, False) == "fused"
    assert chosen("auto", q, k[:1].expand_as(k), v, None, True) == "fused"
    assert chosen("auto", q.float(), k.float(), v.float(), None, True) == "fused"
    other = sample_qkv(2, 40, 3, 8, torch.float16, 1)
    assert chosen("auto", *other, None, True) == "fused"


def test_a_named_kernel_is_taken_or_refused(cudnn, monkeypatch):
    q, k, v = sample_qkv(2, 40, 3, 8, torch.float16, 1)
    for kernel in ("fused", "sdpa", "cudnn"):
        assert chosen(kernel, q, k, v, -1.0, True) == kernel
    for kernel in ("fused", "sdpa"):
        assert chosen(kernel, q, k[:1].expand_as(k), v, None, False) == kernel
    message = "cls_attention: kernel is 'cudnn', which cpu tensors of torch.float16, shape"
    for args in ((q, k, v, None, False), (q, k[:1].expand_as(k), v, None, True)):
        with pytest.raises(ValueError, match=message):
            chosen("cudnn", *args)
    monkeypatch.setattr(_pytorch_attention, "cudnn_serves", lambda q, k, v: False)
    with pytest.raises(ValueError, match="switched off in PyTorch; pass 'auto', 'sdpa' or 'fused'"):
        chosen("cudnn", q, k, v, None, True)
    assert chosen("cudnn", q[:0], k[:0], v[:0], None, True) == "cudnn"


@pytest.mark.skipif(not operators.INSTALLED, reason="Triton is not installed")
def test_unusual_scales_are_those_of_the_kernel():
    from vispruner_kernels._triton.attention import is_signed

    for scale in (0.0, 1e-40, 2.0**-126, 1e-37, 1.0, 1e38, 1.1e38, -1.0):
        assert is_signed(scale) == _pytorch_attention.is_unusual(scale)
