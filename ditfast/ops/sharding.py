"""Sharding rules of the operators: the layouts of DTensor arguments, and those of the results.

A rule lists the layouts in which an operator may run on local tensors alone, along one dimension of a mesh. torch
expands them to all dimensions, takes what is cheapest to reach and redistributes the arguments to it: a partial sum
is added up first, as no rule takes one where the operator is not linear in it.

Along the batch everything with such an axis is sharded. Along the tokens modulations are replicated, and their
gradients partial sums. Along the columns a Linear's output features are. Heads are never: a chunk of the packed (3D)
axis is no set of them.

Imported with the first DTensor that reaches an operator (``backend.sharded``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo, TupleStrategy
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
from torch.distributed.tensor.placement_types import Placement

Layout = tuple[Sequence[Placement], Sequence[Placement]]  # of the outputs; of the tensor arguments, given or not
Rule = Callable[..., list[Layout]]

R, SUM = Replicate(), Partial()
BATCH, TOKENS = Shard(0), Shard(1)  # of (B, T, D) and of (B, D)
ROWS, COLUMNS = Shard(0), Shard(1)  # of a matrix


def _adaln_forward(x: Any, branch: Any, gate: Any, shift: Any, scale: Any, eps: float) -> list[Layout]:
    return [
        (
            [_if(branch is not None, tokens), *[_if(shift is not None, tokens)] * 3],
            [tokens, tokens, vector, vector, vector],
        )
        for tokens, vector in ((R, R), (BATCH, BATCH), (TOKENS, R))
    ]


def _adaln_backward(*args: Any) -> list[Layout]:
    want_x, want_branch, _, _, want_bias, want_out, partials = args[9:]
    if partials:
        raise ValueError("ditfast::adaln_backward takes no partials beside DTensors")
    placements = ((R, R, R, R), (BATCH, BATCH, Shard(1), SUM), (TOKENS, R, SUM, SUM))
    return [
        (
            [_if(want_x, tokens), _if(want_branch, tokens), _if(want_out, tokens), d_vectors, _if(want_bias, d_bias)],
            [*[tokens] * 4, vector, vector, vector, tokens, tokens],
        )
        for tokens, vector, d_vectors, d_bias in placements
    ]


def _linear_gelu(x: Any, weight: Any, bias: Any, save: bool, demanded: bool) -> list[Layout]:
    layouts: list[Layout] = [([rows, _if(save, rows)], [rows, R, R]) for rows in (R, *_rows(x))]
    if _splits(weight, 0):
        layouts.append(([COLUMNS, _if(save, COLUMNS)], [R, Shard(0), Shard(0)]))
    return layouts


def _linear_gelu_backward(d_out: Any, weight: Any, pre: Any, want_bias: bool, demanded: bool) -> list[Layout]:
    layouts: list[Layout] = [([rows, rows, R], [rows, R, rows]) for rows in _bias_rows(want_bias, d_out, pre)]
    if _splits(pre, 1):
        layouts.append(([COLUMNS, COLUMNS, _if(want_bias, Shard(2))], [R, COLUMNS, COLUMNS]))
    return layouts


def _gelu_backward(d_act: Any, pre: Any, want_bias: bool) -> list[Layout]:
    layouts: list[Layout] = [([rows, R], [rows, rows]) for rows in _bias_rows(want_bias, d_act, pre)]
    if _splits(pre, 1):
        layouts.append(([COLUMNS, _if(want_bias, Shard(2))], [COLUMNS, COLUMNS]))
    return layouts


def _linear_gated_residual(
    x: Any, weight: Any, bias: Any, gate: Any, residual: Any, save: bool, demanded: bool
) -> list[Layout]:
    layouts: list[Layout] = [([R, R], [R] * 5)]
    if residual.shape[0] % residual.mesh.size() == 0:  # else the rows of x would be cut within a sample
        layouts.append(([BATCH, _if(save, ROWS)], [ROWS, R, R, BATCH, BATCH]))
    return layouts


def _sum_partials(*_: Any) -> list[Layout]:
    return [([R], [R]), ([Shard(0)], [Shard(0)]), ([SUM], [Shard(1)]), ([Shard(1)], [Shard(2)]), ([SUM], [SUM])]


def _attention_forward(qkv: Any, num_heads: int, scale: float, bias: Any, save: bool) -> list[Layout]:
    return [([R, R], [R, R]), ([BATCH, _if(save, BATCH)], [BATCH, _along_batch(bias)])]


def _attention_backward(*args: Any) -> list[Layout]:
    _, qkv, _, _, _, _, bias, want_bias, want_sums = args
    layouts: list[Layout] = [([R, R, R], [R] * 5)]
    if not want_sums or qkv.shape[0] % qkv.mesh.size() == 0:  # a sample has several rows of sums
        along = _along_batch(bias)
        d_bias = _if(want_bias, SUM if along == R else BATCH)
        layouts.append(([BATCH, d_bias, _if(want_sums, Shard(0))], [*[BATCH] * 4, along]))
    return layouts


def _timestep_embedding(*_: Any) -> list[Layout]:
    return [([R], [R]), ([BATCH], [BATCH])]


def _conditioning(*_: Any) -> list[Layout]:
    return [([R], [R, R, R]), ([BATCH], [BATCH, BATCH, R])]


def _if(wanted: bool, placement: Placement) -> Placement:
    """The placement of an output; one that is not wanted is an empty tensor of one axis, replicated."""
    return placement if wanted else R


def _rows(*matrices: Any) -> list[Placement]:
    """How the rows of matrices may be sharded.

    A (B, T, D) that is sharded along T has strided shards of rows once it is flattened.
    """
    placements: list[Any] = [placement for matrix in matrices for placement in matrix.placements]
    strided = [p for p in placements if type(p).__name__ == "_StridedShard" and p.dim == 0]
    return list(dict.fromkeys([ROWS, *strided]))


def _bias_rows(want_bias: bool, *matrices: Any) -> list[Placement]:
    """As above, but replicated where partial sums are wanted: shards would give another number of them."""
    return [R] if want_bias else [R, *_rows(*matrices)]


def _splits(matrix: Any, axis: int) -> bool:
    """Whether every rank gets a width that the kernels take."""
    return bool(matrix.shape[axis] % (8 * matrix.mesh.size()) == 0)


def _along_batch(bias: Any) -> Placement:
    """The placement of a bias of four axes beside a sharded batch: one for all samples is replicated."""
    return R if bias is None or bias.shape[0] == 1 else BATCH


def _strategy(rule: Rule, op_schema: OpSchema) -> OpStrategy:
    """An operator's strategies on the whole mesh, as torch asks for them."""
    op, arguments = op_schema.op, op_schema.args_schema
    takes = [torch.TensorType.get().isSubtypeOf(argument.type) for argument in op._schema.arguments]
    present = [isinstance(argument, OpStrategy) for argument, tensor in zip(arguments, takes, strict=True) if tensor]
    layouts: list[Layout] = [(outs, list(compress(ins, present))) for outs, ins in rule(*map(_spec, arguments))]
    strategy = _expanded(layouts, op_schema)
    if len(layouts[0][0]) < len(op._schema.returns):  # the empty list of adaln_backward: torch has None for no list
        for spec in strategy.strategies:
            spec.output_specs = cast(Any, (*cast("tuple[Any, ...]", spec.output_specs), ()))
    return strategy


def _of_each(rule: Rule, op_schema: OpSchema) -> TupleStrategy:
    """The strategies of an operator on a list of tensors, each for itself."""
    children = cast(TupleStrategy, op_schema.args_schema[0]).children
    schemas = [OpSchema(op_schema.op, (child,), {}, op_schema.schema_info) for child in children]
    return TupleStrategy([_expanded(rule(), schema) for schema in schemas])


def _expanded(layouts: list[Layout], op_schema: OpSchema) -> OpStrategy:
    specs = [_spec(argument) for argument in op_schema.args_strategy]
    meshes = list(dict.fromkeys(spec.mesh for spec in specs))
    if len(meshes) > 1:
        raise ValueError(f"{op_schema.op} takes DTensors of one mesh, got {meshes}")
    # only as an argument is sharded already: torch finds sums cheapest in parts, and would cut 3 samples into 2 and 1
    lists: list[list[Placement | None]] = [
        [*outs, *ins]
        for outs, ins in layouts
        if all(p == R for p in ins) or any(p in spec.placements for p, spec in zip(ins, specs, strict=True) if p != R)
    ]
    return expand_to_full_mesh_op_strategy(meshes[0], op_schema, lists, input_index=len(layouts[0][0]))


def _spec(argument: Any) -> Any:
    return argument.strategies[0].output_spec if isinstance(argument, OpStrategy) else argument


_RULES: dict[str, Rule] = {
    "adaln_forward": _adaln_forward,
    "adaln_backward": _adaln_backward,
    "linear_gelu": _linear_gelu,
    "linear_gated_residual": _linear_gated_residual,
    "linear_gelu_backward": _linear_gelu_backward,
    "gelu_backward": _gelu_backward,
    "sum_partials": _sum_partials,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "timestep_embedding": _timestep_embedding,
    "conditioning": _conditioning,
}


def register() -> None:
    """Gives torch the rules of all operators."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rule in _RULES.items():
        op = getattr(torch.ops.ditfast, name).default
        make = _of_each if name == "sum_partials" else _strategy
        # all arguments are part of a cached decision's key: flags decide what is empty
        info = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
        propagator.register_op_strategy(op, partial(make, rule), info)


def by_samples(function: Callable[..., Tensor], x: Any, bias: Any = None) -> DTensor:
    """A function of each sample on its own, run on local tensors: x (B, ...) -> (B, ...), along the batch as x lies.

    bias: of four axes, the first 1 or B, where the function takes one beside x.

    Raises:
        ValueError: bias is no DTensor of x's mesh.
    """
    if bias is not None and getattr(bias, "device_mesh", None) != x.device_mesh:
        raise ValueError(f"bias must be a DTensor of qkv's mesh {x.device_mesh}, got {type(bias).__name__}")
    placements = [placement if placement == BATCH else R for placement in x.placements]
    arguments = [x.redistribute(placements=placements).to_local(grad_placements=placements)]
    if bias is not None:
        shared = bias.shape[0] == 1
        bias_placements = [R if shared else placement for placement in placements]
        gradient_placements = [SUM if shared and placement == BATCH else placement for placement in placements]
        arguments.append(bias.redistribute(placements=bias_placements).to_local(grad_placements=gradient_placements))
    out = function(*arguments)
    shape = torch.Size((x.shape[0], *out.shape[1:]))
    return DTensor.from_local(out, x.device_mesh, placements, run_check=False, shape=shape, stride=out.stride())
