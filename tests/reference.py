"""The mathematics of M-FAC written densely in float64: an oracle that shares no code with the library.

Everything here forms the d x d matrices that the library avoids. Where float64 itself is not enough to say what is
right (a damping of 1e-8 beside gradients of 1e3), ``exact_inverse`` computes in decimals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, localcontext
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Pruned(NamedTuple):
    """What a dense pruning step gives; the fields are those of the library's result."""

    weights: dict[str, Vector]
    masks: dict[str, Mask]
    sparsity: float
    predicted_loss_increase: float


def block_slices(size: int, block_size: int | None) -> Iterator[slice]:
    """Cut ``size`` consecutive weights into blocks of ``block_size``; the last may be shorter."""
    step = size if block_size is None else block_size
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(start + step, size))


def damping_of_weights(gradients: ArrayLike, damping: float | str, block_size: int | None = None) -> Vector:
    """The damping in the block of each weight: a number, or for ``auto`` 0.1 of the mean diagonal of G^T G / m, (d,).

    That mean counts as 1e-12 of the one over all blocks at least; where there is no gradient at all, damping is 1.
    """
    g = np.asarray(gradients, dtype=np.float64)
    if damping != "auto":
        return np.full(g.shape[1], float(damping))
    least = 1e-12 * np.mean(g**2)
    values = np.empty(g.shape[1])
    for block in block_slices(g.shape[1], block_size):
        values[block] = 0.1 * max(np.trace(g[:, block].T @ g[:, block] / len(g)) / len(values[block]), least) or 1.0
    return values


def dense_fisher(gradients: ArrayLike, damping: float | str, block_size: int | None = None) -> Matrix:
    """Damped empirical Fisher ``damping * I + G^T G / m`` with everything outside the diagonal blocks zero, (d, d)."""
    g = np.asarray(gradients, dtype=np.float64)
    rows, size = g.shape
    fisher = np.zeros((size, size))
    for block in block_slices(size, block_size):
        fisher[block, block] = g[:, block].T @ g[:, block] / rows
    return fisher + np.diag(damping_of_weights(g, damping, block_size))


def dense_inverse(gradients: ArrayLike, damping: float | str, block_size: int | None = None) -> Matrix:
    """Inverse of :func:`dense_fisher` by LAPACK, block by block, (d, d)."""
    fisher = dense_fisher(gradients, damping, block_size)
    inverse = np.zeros_like(fisher)
    for block in block_slices(len(fisher), block_size):
        inverse[block, block] = np.linalg.inv(fisher[block, block])
    return inverse


def exact_inverse(gradients: ArrayLike, damping: float, block_size: int | None = None) -> Matrix:
    """Inverse of the damped empirical Fisher in decimals with digits to spare, rounded to float64 at the end, (d, d).

    The Fisher too is formed in decimals, since damping can be lost when it is added in float64.
    """
    g = np.asarray(gradients, dtype=np.float64)
    rows, size = g.shape
    inverse = np.zeros((size, size))
    with localcontext() as context:
        context.prec = _digits(g, damping)
        for block in block_slices(size, block_size):
            columns = np.vectorize(Decimal, otypes=[object])(g[:, block])
            fisher = columns.T @ columns / Decimal(rows)
            for q in range(len(fisher)):
                fisher[q, q] += Decimal(damping)
            inverse[block, block] = _gauss_jordan(fisher).astype(np.float64)
    return inverse


def recursion_diagonal(gradients: ArrayLike, damping: float, block_size: int | None = None) -> Vector:
    """Diagonal of the inverse Fisher by the row-by-row recursion of the M-FAC paper, matrix-free, (d,)."""
    g = np.asarray(gradients, dtype=np.float64)
    diagonal = np.empty(g.shape[1])
    for block in block_slices(g.shape[1], block_size):
        v, denominators = _recursion(g[:, block], damping)
        diagonal[block] = 1 / damping - np.sum(v**2 / denominators[:, None], axis=0)
    return diagonal


def recursion_apply(gradients: ArrayLike, damping: float, x: ArrayLike, block_size: int | None = None) -> Vector:
    """``F^-1 x`` by the row-by-row recursion of the M-FAC paper, matrix-free, (d,)."""
    g = np.asarray(gradients, dtype=np.float64)
    product = np.asarray(x, dtype=np.float64) / damping
    for block in block_slices(g.shape[1], block_size):
        v, denominators = _recursion(g[:, block], damping)
        coefficients = v @ np.asarray(x, dtype=np.float64)[block] / denominators
        product[block] -= coefficients @ v
    return product


def saliency(weights: ArrayLike, inverse_diagonal: ArrayLike) -> Vector:
    """``w_q^2 / (2 [F^-1]_qq)``."""
    return np.asarray(weights, dtype=np.float64) ** 2 / (2 * np.asarray(inverse_diagonal, dtype=np.float64))


def select(saliencies: ArrayLike, mask: ArrayLike, sparsity: float) -> Mask:
    """The mask after pruning the smallest saliencies until ``round(n * sparsity)`` of the n weights are pruned.

    Ties go to the lowest index. What ``mask`` has pruned stays pruned and counts; if that is already enough, the
    mask comes back as it is.
    """
    kept = np.array(mask, dtype=bool).ravel()
    values = np.asarray(saliencies, dtype=np.float64).ravel()
    missing = round(kept.size * sparsity) - int(np.sum(~kept))
    candidates = [int(q) for q in np.argsort(values, kind="stable") if kept[q]]
    for q in candidates[: max(missing, 0)]:
        kept[q] = False
    return kept


def groups_of(
    shape: tuple[int, ...], mask_type: str | tuple[int, int], axes: tuple[int, ...] | None = None
) -> list[list[int]]:
    """The positions, in the order of the array, of each group that a mask type makes of it.

    An array is outputs x kernel positions x inputs; one with a single axis is one row of inputs.
    """
    order = tuple(axes) if axes is not None else (0, *range(2, len(shape)), 1) if len(shape) > 1 else (0,)
    found: dict[tuple, list[int]] = {}
    for position, index in enumerate(np.ndindex(*shape)):
        if len(shape) < 2:
            output, kernel, inp, outputs, inputs = 0, (), (index or (0,))[0], 1, int(np.prod(shape))
        else:
            output, *kernel, inp = (index[axis] for axis in order)
            outputs, inputs = shape[order[0]], shape[order[-1]]
        if mask_type == "channel":
            key = (inp,)
        elif mask_type == "filter":
            key = (output,)
        else:
            if mask_type == "block4":
                high, wide = 1, 4
            elif ":" in mask_type:
                high, wide = 1, int(mask_type.split(":")[1])
            else:
                high, wide = mask_type
            high, wide = outputs if high == -1 else high, inputs if wide == -1 else wide
            key = (output // high, *kernel, inp // wide)
        found.setdefault(key, []).append(position)
    return [found[key] for key in sorted(found)]


def select_groups(
    saliencies: ArrayLike, mask: ArrayLike, sparsity: float, groups: list[list[int]], *, count_weights: bool = False
) -> Mask:
    """The mask after pruning whole groups, those of the least mean saliency first; pruned weights have saliency 0.

    ``round(len(groups) * sparsity)`` of the groups, or with ``count_weights`` as many as come closest to
    ``n * sparsity`` weights. Groups that are pruned already go first, and ties to the first group.
    """
    kept = np.array(mask, dtype=bool).ravel()
    values = np.where(kept, np.asarray(saliencies, dtype=np.float64).ravel(), 0.0)
    score = [
        math.fsum(values[q] for q in group) / len(group) if any(kept[q] for q in group) else -1.0 for group in groups
    ]
    order = sorted(range(len(groups)), key=lambda g: score[g])
    count = round(len(groups) * sparsity)
    if count_weights:
        sizes = [sum(len(groups[g]) for g in order[:k]) for k in range(len(groups) + 1)]
        count = min(range(len(sizes)), key=lambda k: abs(sizes[k] - kept.size * sparsity))
    for g in order[:count]:
        kept[groups[g]] = False
    return kept


def select_n_of_m(saliencies: ArrayLike, mask: ArrayLike, sparsity: float, groups: list[list[int]], n: int) -> Mask:
    """The mask after pruning the least salient among those that ``n`` kept of each group allow."""
    kept = np.array(mask, dtype=bool).ravel()
    values = np.asarray(saliencies, dtype=np.float64).ravel()
    candidates = []
    for group in groups:
        pruned = sum(not kept[q] for q in group)
        free = sorted((q for q in group if kept[q]), key=lambda q: values[q])
        candidates += free[: max(len(group) - n - pruned, 0)]
    missing = round(kept.size * sparsity) - int(np.sum(~kept))
    candidates.sort(key=lambda q: (values[q], q))
    kept[candidates[: max(missing, 0)]] = False
    return kept


def independent_update(weights: ArrayLike, inverse: Matrix, pruned: Mask) -> Vector:
    """Sum over the pruned q of ``-w_q / [F^-1]_qq * F^-1 e_q``, then the pruned entries made exactly zero: dw, (d,)."""
    w = np.asarray(weights, dtype=np.float64)
    dw = np.zeros_like(w)
    for q in np.flatnonzero(pruned):
        dw -= w[q] / inverse[q, q] * inverse[:, q]
    dw[pruned] = -w[pruned]
    return dw


def joint_update(weights: ArrayLike, inverse: Matrix, pruned: Mask) -> Vector:
    """The dw of least predicted loss that zeroes all of the pruned set: ``-F^-1 E (E^T F^-1 E)^-1 E^T w``, (d,)."""
    w = np.asarray(weights, dtype=np.float64)
    columns = inverse[:, pruned]
    dw = -columns @ np.linalg.solve(inverse[np.ix_(pruned, pruned)], w[pruned])
    dw[pruned] = -w[pruned]
    return dw


def predicted_loss_increase(fisher: Matrix, dw: Vector) -> float:
    """``1/2 dw^T F dw`` of the update that was made."""
    return float(dw @ fisher @ dw) / 2


def prune(
    weights: Mapping[str, ArrayLike],
    gradients: ArrayLike | Callable[[dict[str, Vector]], ArrayLike],
    *,
    sparsity: float | Mapping[str, float],
    masks: Mapping[str, ArrayLike] | None = None,
    block_size: int | None = 2000,
    damping: float | str = "auto",
    scope: str = "global",
    update: str = "joint",
    mask_type: str | tuple[int, int] = "unstructured",
    axes: Mapping[str, tuple[int, ...]] | None = None,
    num_recomputations: int | str = "auto",
    recomputation_spacing: str = "geometric",
) -> Pruned:
    """One pruning step, densely. Only weights that ``masks`` keep take part; they are cut into blocks in their order.

    Args:
        weights: Name to array, in parameter order.
        gradients: Shape (m, total): all weights flattened and concatenated in parameter order; or a function that
            gives these for each part, from the weights as they are then.
        sparsity: Pruned fraction to reach, within each layer or over all (``scope``); or one per layer.
        masks: Name to mask, True keeps; None keeps all.
        block_size: Unpruned weights per block; None for one block.
        damping: Lambda, or ``auto``, measured anew for each Fisher.
        scope: ``layer`` or ``global``.
        update: ``independent`` or ``joint``.
        mask_type: Pattern of the zeros.
        axes: Name to the permutation of axes into outputs, kernel, inputs.
        num_recomputations: Parts with a Fisher of their own; "auto" for the least number of which none removes more
            than 22% of what is left.
        recomputation_spacing: Each part keeps the same fraction of what it finds (geometric), or removes the same
            fraction of all (linear).
    """
    shapes = {name: np.shape(array) for name, array in weights.items()}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    layers = dict(zip(shapes, _consecutive(sizes), strict=True))
    w = np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in weights.values()])
    kept = np.ones(w.size, dtype=bool)
    if masks is not None:
        kept = np.concatenate([np.asarray(masks[name], dtype=bool).ravel() for name in weights])
    w = np.where(kept, w, 0.0)
    groups = {
        name: [] if mask_type == "unstructured" else groups_of(shape, mask_type, (axes or {}).get(name))
        for name, shape in shapes.items()
    }
    fields = {"all": slice(0, w.size)} if scope == "global" else layers
    if scope == "global":
        groups = {"all": [[q + layers[name].start for q in group] for name in groups for group in groups[name]]}

    def ways():
        for name, field in fields.items():
            wanted = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
            now = _reached((w != 0)[field], mask_type, groups[name], by_groups=scope == "layer")
            yield name, field, now, max(wanted, now)

    parts = num_recomputations
    if parts == "auto":
        parts = 1
        while any(1 - wanted < (1 - now) * 0.78**parts * (1 - 1e-8) for _, _, now, wanted in ways()):
            parts += 1
    increase = 0.0
    for parts_left in range(parts, 0, -1):
        rows = (
            gradients({name: w[part].reshape(shapes[name]) for name, part in layers.items()})
            if callable(gradients)
            else gradients
        )
        g = np.asarray(rows, dtype=np.float64)
        fisher = dense_fisher(g[:, kept], damping, block_size)
        inverse = dense_inverse(g[:, kept], damping, block_size)
        saliencies = np.zeros(w.size)
        saliencies[kept] = saliency(w[kept], np.diag(inverse))
        after = kept.copy()
        for name, field, now, wanted in ways():
            if parts_left == 1:
                target = wanted
            elif recomputation_spacing == "linear":
                target = now + (wanted - now) / parts_left
            else:
                target = 1 - (1 - now) * np.exp((np.log(1 - wanted) - np.log(1 - now)) / parts_left)
            after[field] = _select(saliencies[field], kept[field], target, mask_type, groups[name], scope)
        pruned = ~after[kept]
        dw = {"independent": independent_update, "joint": joint_update}[update](w[kept], inverse, pruned)
        w[kept] += dw
        kept = after
        increase += predicted_loss_increase(fisher, dw)
    return Pruned(
        weights={name: w[part].reshape(shapes[name]) for name, part in layers.items()},
        masks={name: kept[part].reshape(shapes[name]) for name, part in layers.items()},
        sparsity=float(np.mean(~kept)),
        predicted_loss_increase=increase,
    )


def _select(saliencies, kept, sparsity, mask_type, groups, scope) -> Mask:
    if mask_type == "unstructured":
        return select(saliencies, kept, sparsity)
    if ":" in mask_type:
        return select_n_of_m(saliencies, kept, sparsity, groups, int(mask_type.split(":")[0]))
    return select_groups(saliencies, kept, sparsity, groups, count_weights=scope == "global")


def _reached(kept: Mask, mask_type, groups: list[list[int]], *, by_groups: bool) -> float:
    if mask_type == "unstructured":
        return float(np.mean(~kept))
    if ":" in mask_type:
        n = int(mask_type.split(":")[0])
        return sum(min(sum(not kept[q] for q in group), max(len(group) - n, 0)) for group in groups) / kept.size
    whole = [group for group in groups if not any(kept[q] for q in group)]
    return len(whole) / len(groups) if by_groups else sum(map(len, whole)) / kept.size


def _recursion(g: Matrix, damping: float) -> tuple[Matrix, Vector]:
    rows = len(g)
    v = np.empty_like(g)
    denominators = np.empty(rows)
    for i in range(rows):
        v[i] = g[i] / damping - (v[:i] @ g[i] / denominators[:i]) @ v[:i]
        denominators[i] = rows + g[i] @ v[i]
    return v, denominators


def _digits(g: Matrix, damping: float) -> int:
    # Elimination loses the digits of the condition number, and small entries stand beside entries of 1 / damping:
    # so twice those digits, and 40 that are left.
    largest = float(np.max(np.abs(g), initial=0.0))
    condition = 2 * math.log10(largest) + math.log10(g.size) - math.log10(damping) if largest else 0.0
    return 40 + 2 * max(math.ceil(condition), 0)


def _gauss_jordan(matrix: NDArray[np.object_]) -> NDArray[np.object_]:
    size = len(matrix)
    identity = np.vectorize(Decimal, otypes=[object])(np.eye(size))
    work = np.concatenate([matrix, identity], axis=1)
    for column in range(size):
        # Without pivoting: the matrix is symmetric positive definite, so every pivot is positive.
        work[column] = work[column] / work[column, column]
        for row in range(size):
            if row != column:
                work[row] = work[row] - work[row, column] * work[column]
    return work[:, size:]


def _consecutive(sizes: list[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size
