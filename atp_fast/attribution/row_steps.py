"""Which steps of autograd's graph keep the rows of a batch apart, so that cotangents of the first of them can be taken back alone.

Rows are ahead in a tensor whose first axis holds the batch's rows in their order, one or several entries of each. A layer's outputs
are such tensors. Where a step's output is one, so are the inputs of what is said here to keep rows; of any other step nothing is
known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# of one tensor, entry by entry, those between processes that share a model among them
_EACH = frozenset(
    "_Entered _Left Abs Alias Clamp ClampMax ClampMin Clone Cos Erf Exp Gelu LeakyRelu Log Neg Relu Rsqrt Sigmoid Silu Sin "
    "Softplus Sqrt Tanh ToCopy".split()
)
# of several, entry by entry, each of which may be broadcast
_OF_SEVERAL = frozenset("Add Div MaskedFill Maximum Minimum Mul Pow Rsub Sub Where".split())
# products of rows by a matrix that is not on the graph
_OF_ROWS = frozenset(("Mm", "Addmm"))
# the same entries in the same order
_VIEWS = frozenset("ReshapeAlias UnsafeView View".split())
# along the axes that are saved
_ALONG = frozenset(
    "Cat Cumsum LogSoftmax Mean Permute Select Slice Softmax Split SplitWithSizes Stack Sum Transpose Unbind Unsqueeze".split()
)


def rule_of_ours(node: Any) -> Callable[..., Any] | None:
    """The adjoint of many cotangents that a function of ours brings, for a step that is one."""
    return getattr(getattr(type(node), "_forward_cls", None), "cotangents", None)


def axis_of(saved: int) -> int:
    """An axis as a step saves it: a negative number as an unsigned one."""
    return saved - 2**64 if saved >= 2**63 else saved


def keeps_rows(node: Any, name: str, targets: Sequence[tuple[Any, int]], parts: int) -> bool:
    """Whether rows are ahead in a step's inputs if they are in its outputs, and each part of these is made of the same part of
    those; targets: the steps and output numbers that its inputs are."""
    if rule_of_ours(node) is not None:
        return True
    kind = name.rstrip("0123456789").removesuffix("Backward")
    if kind in _EACH:
        return True
    if kind in _OF_ROWS:
        matrices = targets[1:] if kind == "Mm" else targets[::2]
        return all(matrix is None for matrix, _ in matrices)
    if kind in _VIEWS:
        before = node._saved_self_sym_sizes
        return len(before) > 0 and before[0] % parts == 0
    if kind in _OF_SEVERAL:
        out = node._input_metadata[0].shape
        shapes = (n._input_metadata[i].shape for n, i in targets if n is not None)
        return all(len(shape) == len(out) and shape[0] == out[0] for shape in shapes)
    return kind in _ALONG and _is_behind(node, kind, targets)


def _is_behind(node: Any, kind: str, targets: Sequence[tuple[Any, int]]) -> bool:
    """Whether none of the axes that a step goes along is the first."""
    if kind == "Permute":
        axes = [axis_of(a) for a in node._saved_dims]
        return len(axes) > 0 and axes[0] in (0, -len(axes))
    saved = getattr(node, "_saved_dim", None)
    if kind == "Transpose":
        saved = node._saved_dim0, node._saved_dim1
    if saved is None:
        return False
    axes = [axis_of(a) for a in (saved if isinstance(saved, (tuple, list)) else (saved,))]
    if not axes or min(axes) == 0:
        return False
    if min(axes) > 0:
        return True
    shapes = [n._input_metadata[i].shape for n, i in targets if n is not None]
    fewest = min(len(s) for s in (*shapes, node._input_metadata[0].shape))
    return -min(axes) < fewest and 0 not in axes
