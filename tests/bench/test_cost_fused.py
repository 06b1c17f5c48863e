"""What ditfast's fused operators launch, move and compute in training, by hand."""

import torch

from ditfast import ops
from ditfast.bench.cost.count import count
from tests.bench.conftest import listing, meta

BF16 = torch.bfloat16


def test_a_training_mlp():
    """M=8, D=8, F=16, fp32: pre-activation and activation written, both GEMMs' gradients, one launch of sums."""
    x, w1, b1, w2, b2 = inputs = [
        meta(*size, grad=True) for size in ((2, 4, 8), (16, 8), (16,), (8, 16), (8,))
    ]
    grad = meta(2, 4, 8)
    with ops.use_backend("triton"):
        counted = count(lambda: torch.autograd.grad(ops.gelu_mlp(*inputs), inputs, grad), grad=True)
    gemm, narrow, wide, weight = 2 * 8 * 8 * 16, 64, 128, 128
    assert listing(counted) == [
        ("linear_gelu", gemm, 4 * (narrow + weight + 16 + 2 * wide)),
        ("addmm", gemm, 4 * (wide + weight + 8 + narrow)),
        # d_y, W2 and the pre-activation read; its gradient, the activation and one row of sums written
        ("linear_gelu_backward", gemm, 4 * (narrow + weight + wide + 2 * wide + 16)),
        ("mm", gemm, 4 * (wide + weight + narrow)),
        ("mm", gemm, 4 * (wide + narrow + weight)),
        ("sum_partials", 0, 4 * (16 + 16)),
        ("mm", gemm, 4 * (narrow + wide + weight)),
        ("sum", 0, 4 * (narrow + 8)),
    ]


def test_our_attention_counts_as_anyones():
    """B=2, T=5, H=3, head dim 8: gradients land in the packed projection, without stack or copy."""
    qkv, grad = meta(2, 5, 3 * 24, dtype=BF16, grad=True), meta(2, 5, 24, dtype=BF16)
    with ops.use_backend("triton"):
        counted = count(lambda: ops.self_attention(qkv, 3).backward(grad), grad=True)
    # the log-sum-exp is kept in two numbers
    one, flops, log_sums = 240 * 2, 4 * 2 * 3 * 5 * 5 * 8, 2 * 2 * 3 * 5 * 4
    assert listing(counted) == [
        ("scaled_dot_product_attention", flops, 4 * one + log_sums),
        ("scaled_dot_product_attention_backward", flops * 5 // 2, 8 * one + log_sums),
    ]
