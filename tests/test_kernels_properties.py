"""The adaLN and attention kernels at shapes, dtypes and subsets of gradients that hypothesis draws.

Of a few dozen elements the yardstick's errors may all happen to be small: 512 are judged, of several draws if need be.
"""

from dataclasses import replace

import pytest
import torch
from kernel_helpers import DTYPES, NAMES, failures, triton_operator
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast.bench.operators import OPERATORS, Shape, check

hypothesis = pytest.importorskip("hypothesis", reason="draws the shapes")
st = hypothesis.strategies
pytestmark = pytest.mark.kernels


@hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    name=st.sampled_from(NAMES),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 35),
    width=st.integers(16, 300),
    mean=st.sampled_from([0.0, 5.0, -50.0]),
    dtype=st.sampled_from(sorted(DTYPES)),
    mixed=st.booleans(),
    mask=st.integers(0, 31),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes(name, batch, tokens, width, mean, dtype, mixed, mask, seed):
    operator = triton_operator(name)
    shape = Shape(batch, tokens, width, mean=mean)
    names = tuple(operator.draw(shape, torch.Generator()))
    wanted = tuple(item for index, item in enumerate(names) if mask >> index & 1)
    mixed = mixed and dtype != "fp32"
    elements = 512 if dtype == "fp32" else 1  # half an eps of 16 bits leaves room enough
    assert not failures(check(operator, shape, DTYPES[dtype], mixed=mixed, wanted=wanted, seed=seed, elements=elements))


@hypothesis.settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    biased=st.booleans(),
    batch=st.integers(1, 2),
    tokens=st.integers(8, 40),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 16, 24, 40, 64, 72]),
    scale=st.sampled_from([None, 0.1, 1.0]),
    deviation=st.sampled_from([1.0, 20.0, 50.0, 200.0, 1000.0]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 1000),
)
def test_drawn_attention(biased, batch, tokens, heads, head_dim, scale, deviation, dtype, seed):
    """Logits of every size, up to where all rows but a few are saturated."""
    name = "self_attention+bias" if biased else "self_attention"
    factor = (deviation / ((scale or head_dim**-0.5) * head_dim**0.5)) ** 0.5

    def draw(shape, generator):
        inputs = OPERATORS[name].draw(shape, generator)
        return inputs | {"qkv": factor * inputs["qkv"]}

    operator = replace(triton_operator(name), draw=draw, options=lambda _: {"num_heads": heads, "scale": scale})
    shape = Shape(batch, tokens, heads * head_dim, num_heads=heads)
    with sdpa_kernel(SDPBackend.MATH):
        assert not failures(check(operator, shape, DTYPES[dtype], seed=seed, elements=512))
