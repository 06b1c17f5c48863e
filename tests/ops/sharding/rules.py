"""Sharding rules that no public function reaches, and refused calls: for worker.py."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ditfast import ops
from ditfast.ops import backend as backend_module
from ditfast.ops import sharding

R, P = Replicate(), Partial()


def _drawn(*shape):
    return torch.randn(shape)


def _cases():
    """(operator, arguments, placements of its tensors, placements expected of its results)."""
    x, weight, bias, gate, residual = _drawn(24, 16), _drawn(32, 16), _drawn(32), _drawn(4, 32), _drawn(4, 6, 32)
    d_out, w2, pre, d_act = _drawn(24, 16), _drawn(16, 32), _drawn(24, 32), _drawn(24, 32)
    s0, s1, s2 = Shard(0), Shard(1), Shard(2)
    placements = [s0, R, R, s0, s0]
    yield "linear_gated_residual", (x, weight, bias, gate, residual, True, True), placements, [s0, s0]
    yield "linear_gated_residual", (x[:18], weight, bias, gate[:3], residual[:3], True, True), placements, [R, R]
    yield "linear_gelu_backward", (d_out, w2, pre, True, True), [R, s1, s1], [s1, s1, s2]
    yield "linear_gelu_backward", (d_out, w2, pre, True, True), [s0, R, s0], [R, R, R]
    yield "linear_gelu_backward", (d_out, w2, pre, False, True), [s0, R, s0], [s0, s0, R]
    yield "gelu_backward", (d_act, pre, True), [s1, s1], [s1, s2]
    yield "gelu_backward", (d_act, pre, True), [s0, s0], [R, R]
    yield "gelu_backward", (d_act, pre, False), [s0, s0], [s0, R]
    tokens, vector, moment = _drawn(4, 6, 16), _drawn(4, 16), _drawn(4, 6)
    arguments = (tokens, tokens, tokens, tokens, vector, vector, vector, moment, moment, *[True] * 6, [])
    yield "adaln_backward", arguments, [*[s0] * 7, s0, s0], [s0, s0, s0, s1, P]
    yield "adaln_backward", arguments, [*[s1] * 4, R, R, R, s1, s1], [s1, s1, s1, P, P]
    for placement, expected in ((R, R), (s0, s0), (s1, P), (s2, s1), (P, P)):
        yield "sum_partials", ([_drawn(2, 4, 32)], torch.float32), [placement], [expected]
    for batch, expected in ((4, Shard(0)), (3, R)):  # sums have a row per sample; of uneven shards they are replicated
        qkv, out = _drawn(batch, 6, 48), _drawn(batch, 6, 16)
        stats = torch.ops.ditfast.attention_forward.default(qkv, 2, 0.5, None, True)[1]
        arguments = (out, qkv, out, stats, 2, 0.5, None, False, True)
        yield "attention_backward", arguments, [s0] * 4, [expected, R, expected]


def _distributed(value, placement, mesh):
    if placement == P:
        return DTensor.from_local(value if mesh.get_local_rank() == 0 else value * 0, mesh, [P])
    return distribute_tensor(value, mesh, [placement])


def _rules(mesh):
    assert backend_module.sharded(distribute_tensor(torch.zeros(2), mesh, [R]))
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ditfast::")}
    # with a sharded weight each of their Linears runs on its own
    ruled = {*sharding._RULES, "modulations"}
    if names != ruled:
        yield f"operators without a rule, or rules without one: {names ^ ruled}"
    for name, arguments, placements, expected in _cases():
        operator = getattr(torch.ops.ditfast, name).default
        remaining_placements = iter(placements)
        sharded = [
            _distributed(value, next(remaining_placements), mesh)
            if isinstance(value, torch.Tensor)
            else [_distributed(item, next(remaining_placements), mesh) for item in value]
            if isinstance(value, list)
            else value
            for value in arguments
        ]
        complete, parts = operator(*arguments), operator(*sharded)
        if len(complete) != len(parts):
            yield f"{name} {placements}: {len(parts)} results"
        for index, (exact, part, placement) in enumerate(zip(complete, parts, expected, strict=False)):
            if part.placements != (placement,):
                yield f"{name} {placements}: result {index} lies as {part.placements}"
            # the same kernels on other rows: only the order of sums may differ
            elif not torch.allclose(part.full_tensor(), exact, rtol=1e-5, atol=1e-5):
                yield f"{name} {placements}: result {index} is off"


def _refusals(mesh):
    other_mesh = init_device_mesh("cpu", (1, 2))
    x, vector = torch.randn(3, 6, 16), torch.randn(3, 16)

    def replicated(value, mesh=mesh):
        return distribute_tensor(value, mesh, [R] * mesh.ndim)

    weight = replicated(torch.randn(32, 16))
    calls = {
        "mixed torch.Tensor and DTensor": lambda: ops.layer_norm_modulate(replicated(x), vector, vector),
        "one mesh": lambda: ops.layer_norm_modulate(replicated(x), replicated(vector), replicated(vector, other_mesh)),
        "Cannot flatten unevenly": lambda: ops.linear_gelu(distribute_tensor(x, mesh, [Shard(0)]), weight, None),
        "shift must have shape (3, 16), got (3, 8)": lambda: ops.layer_norm_modulate(
            replicated(x), replicated(vector[:, :8]), replicated(vector)
        ),
        "bias must be a DTensor of qkv's mesh": lambda: ops.self_attention(
            replicated(x[..., :12]), 2, bias=torch.zeros(6, 6), backend="sdpa"
        ),
        "no partials beside DTensors": lambda: torch.ops.ditfast.adaln_backward.default(
            None, replicated(x), replicated(x), None, None, replicated(vector), replicated(vector),
            replicated(x[..., 0]), replicated(x[..., 0]), True, False, False, True, False, True, [replicated(x[:1])],
        ),
    }  # fmt: skip
    for message, call in calls.items():
        try:
            with ops.use_backend("triton"):
                call()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if message not in str(error):
                yield f"wanted {message!r}, got {error}"
        else:
            yield f"not refused: {message}"


def failures(mesh):
    return [*_rules(mesh), *_refusals(mesh)]
