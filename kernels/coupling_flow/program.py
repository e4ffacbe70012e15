"""A flow as a list of instructions for the Triton kernels: one table per way of running it, whatever its stages are.

The kernels keep every array as a matrix [batch, width] of fp32 in one of two memories, "temporary" or "kept" (what
memory="save" hands to backward); an array is named by its first column there, so that tables do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from .codes import (
    ACCUMULATE,
    ACTIVATE,
    ACTIVATE_GRAD,
    AFFINE_GRAD,
    BIAS,
    CONSTANTS,
    COPY,
    COUPLE,
    COUPLE_GRAD,
    DENSE,
    DENSE_FLAGS,
    FIELDS,
    INVERSE,
    KEPT,
    LOGDET,
    MAP,
    RECTIFY,
    RESCALE,
    TEMPORARY,
    TILE,
    TRANSPOSED,
    UNSCALE,
    Activation,
    Permutation,
)
from .plan import StageLayout, read_plan


@dataclass(frozen=True)
class Matrix:
    """Columns [column, column + width) of a memory that holds rows of `row` columns from `start` on."""

    memory: int
    start: int
    row: int
    width: int
    column: int = 0

    def slice(self, column: int, width: int) -> Matrix:
        return Matrix(self.memory, self.start, self.row, width, self.column + column)

    @property
    def words(self) -> list[int]:
        return [self.memory, self.start, self.row, self.column]


@dataclass
class Memory:
    """Hands out matrices; `columns` is how much was used."""

    which: int
    columns: int = 0

    def take(self, width: int) -> Matrix:
        self.columns += width
        return Matrix(self.which, self.columns - width, width, width)


class Code:
    """Instructions of FIELDS integers and two floats: opcode, a (4 words), c (4 words), width, and four of its own."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.reals: list[float] = []

    def add(
        self, op: int, a: Matrix, c: Matrix, width: int, *extra: int, reals: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        row = [op, *a.words, *c.words, width, *extra]
        assert len(row) <= FIELDS
        self.words += row + [0] * (FIELDS - len(row))
        self.reals += reals

    def __len__(self) -> int:
        return len(self.words) // FIELDS


def dense(code: Code, a: Matrix, c: Matrix, weight: int, ld: int, flags: int, bias: int = 0) -> None:
    """c = a @ W: W [a.width, c.width] at `weight`, rows `ld` apart (or its transpose lies there)."""
    code.add(DENSE, a, c, c.width, a.width, weight, bias, ld * DENSE_FLAGS + flags)


@dataclass
class Arrays:
    """What a stage keeps: its x side, the subnets' output, hidden activations by (net, layer)."""

    state: Matrix
    raw: Matrix
    hidden: dict[tuple[int, int], Matrix]


def arrays(memory: Memory, s: StageLayout, dim: int) -> Arrays:
    state, raw = memory.take(dim), memory.take(2 * s.active_width)
    hidden = {
        (n, k): memory.take(layer.fan_out) for n, net in enumerate(s.nets) for k, layer in enumerate(net.layers[:-1])
    }
    return Arrays(state, raw, hidden)


def run_nets(code: Code, s: StageLayout, at: Arrays, x: Matrix, cond: Matrix | None, post: Matrix) -> None:
    for n, net in enumerate(s.nets):
        source = x.slice(s.passive, s.passive_width)
        for k, layer in enumerate(net.layers):
            last = k + 1 == len(net.layers)
            out = at.raw.slice(net.column, layer.fan_out) if last else at.hidden[n, k]
            relu = RECTIFY if net.activation == Activation.RELU and not last else 0
            split = k == 0 and s.conditional and cond is not None
            dense(code, source, out, layer.weight, layer.fan_out, BIAS | (0 if split else relu), layer.bias)
            if split:
                weight = layer.weight + s.passive_width * layer.fan_out
                dense(code, cond, out, weight, layer.fan_out, ACCUMULATE | relu)
            source = out
            if not last and net.activation != Activation.RELU:
                source = Matrix(post.memory, post.start, layer.fan_out, layer.fan_out)
                code.add(ACTIVATE, out, source, layer.fan_out, net.activation)


def stage_forward(code, s, at, x, y, cond, post, u, dim, logdet) -> None:
    """x side `x` -> y side `y`."""
    run_nets(code, s, at, x, cond, post)
    source = x
    if s.nets:
        code.add(MAP, x, u, dim, -1, COPY, 0)  # the passive half passes
        code.add(COUPLE, x.slice(s.active, s.active_width), u.slice(s.active, s.active_width), s.active_width,
                 *_raw(at.raw), s.squash + (LOGDET if logdet else 0), reals=(s.clamp, s.gain))  # fmt: skip
        source = u
    _affine_and_permute(code, s, source, y, u, dim)


def _raw(raw: Matrix) -> tuple[int, int, int]:
    """A raw matrix [s | t] in three words: its width is twice the active half's."""
    return raw.memory, raw.start, raw.row


def _affine_and_permute(code, s, source, y, u, dim) -> None:
    if s.permutation == Permutation.SOFT:
        if s.affine:
            code.add(MAP, source, u, dim, -1, RESCALE, s.prepared, s.offset)
            source = u
        dense(code, source, y, s.matrix, dim, CONSTANTS)
        return
    code.add(MAP, source, y, dim, s.index if s.permutation else -1, RESCALE if s.affine else COPY, s.prepared, s.offset)


def stage_inverse(code, s, at, y, x, cond, post, u, dim, logdet) -> None:
    """y side `y` -> x side `x`."""
    source, index = y, s.index + dim if s.permutation == Permutation.HARD else -1
    if s.permutation == Permutation.SOFT:
        dense(code, y, u, s.matrix + dim * dim, dim, CONSTANTS)
        source = u
    code.add(MAP, source, x, dim, index, UNSCALE if s.affine else COPY, s.prepared, s.offset)
    run_nets(code, s, at, x, cond, post)
    if s.nets:
        half = x.slice(s.active, s.active_width)
        flags = s.squash + INVERSE + (LOGDET if logdet else 0)
        code.add(COUPLE, half, half, s.active_width, *_raw(at.raw), flags, reals=(s.clamp, s.gain))


@dataclass(frozen=True)
class Program:
    """A table for the rows kernel, and how many columns of temporary and kept memory it wants."""

    words: tuple[int, ...]
    reals: tuple[float, ...]
    temporary: int
    kept: int
    places: dict[str, Matrix] = field(default_factory=dict, hash=False, compare=False)
    sums: tuple[int, ...] = ()
    uploaded: dict = field(default_factory=dict, hash=False, compare=False)  # device -> its tensors, the launcher's


@cache  # for good: a captured CUDA graph reads the program's uploaded tables at every replay
def forward_program(ints: tuple[int, ...], floats: tuple[float, ...], inverse: bool, save: bool) -> Program:
    dim, cond_dim = ints[:2]
    stages = read_plan(ints, floats)
    code, temporary, kept = Code(), Memory(TEMPORARY), Memory(KEPT)
    x, y, u = (temporary.take(dim) for _ in range(3))
    cond = temporary.take(cond_dim) if cond_dim else None
    spare = temporary.take(dim)
    post = temporary.take(max([0, *(la.fan_out for s in stages for net in s.nets for la in net.layers)]))
    base = temporary.columns
    places = {"x": x, "y": y, **({"cond": cond} if cond else {})}
    if save:
        by_stage = [arrays(kept, s, dim) for s in stages]
    else:
        by_stage, most = [], base
        for s in stages:
            temporary.columns = base
            by_stage.append(arrays(temporary, s, dim))
            most = max(most, temporary.columns)
        temporary.columns = most
    here = x
    order = range(len(stages))
    for step, i in enumerate(reversed(order) if inverse else order):
        s, at = stages[i], by_stage[i]
        last = step + 1 == len(stages)
        there = y if last else spare if here is x else x
        if inverse:
            target = at.state if save else there
            stage_inverse(code, s, at, here, target, cond, post, u, dim, True)
            if save and last:
                code.add(MAP, target, y, dim, -1, COPY, 0)
            here = target if save else there
        else:
            if save:
                code.add(MAP, here, at.state, dim, -1, COPY, 0)
            stage_forward(code, s, at, here, there, cond, post, u, dim, True)
            here = there
    if not stages:
        code.add(MAP, x, y, dim, -1, COPY, 0)
    return Program(tuple(code.words), tuple(code.reals), temporary.columns, kept.columns, places)


@cache
def backward_programs(
    ints: tuple[int, ...], floats: tuple[float, ...], inverse: bool, save: bool
) -> tuple[Program, ...]:
    """One program per stage, in the order of backward; all share one temporary memory."""
    dim, cond_dim = ints[:2]
    stages = read_plan(ints, floats)
    temporary, kept = Memory(TEMPORARY), Memory(KEPT)
    g, spare = temporary.take(dim), temporary.take(dim)
    here, there, u = (temporary.take(dim) for _ in range(3))
    through, through_u = temporary.take(dim), temporary.take(dim)
    cond = temporary.take(cond_dim) if cond_dim else None
    d_cond = temporary.take(cond_dim) if cond_dim else None
    widest = max([0, *(la.fan_out for s in stages for net in s.nets for la in net.layers)])
    post = temporary.take(widest)
    base = most = temporary.columns
    kept_arrays = [arrays(kept, s, dim) for s in stages] if save else []
    made = []
    for i in range(len(stages)) if inverse else reversed(range(len(stages))):
        s, code, sums = stages[i], Code(), []
        temporary.columns = base
        at = kept_arrays[i] if save else arrays(temporary, s, dim)
        d_raw = temporary.take(2 * s.active_width)
        d_hidden = {key: temporary.take(m.width) for key, m in at.hidden.items()}
        posts = {key: temporary.take(m.width) for key, m in at.hidden.items()}
        most = max(most, temporary.columns)
        x = at.state
        if not save:
            if inverse:  # at the x side: run forward to find the next
                x = here
                stage_forward(code, s, at, here, there, cond, post, u, dim, False)
            else:
                x = there
                stage_inverse(code, s, at, here, there, cond, post, u, dim, False)
        start = {"g": g}

        def permute(s=s, code=code, inverse=inverse):
            nonlocal g, spare
            if s.permutation == Permutation.HARD:
                code.add(MAP, g, spare, dim, s.index if inverse else s.index + dim, COPY, 0)
            elif s.permutation == Permutation.SOFT:
                dense(code, g, spare, s.matrix + (dim * dim if inverse else 0), dim, CONSTANTS | TRANSPOSED)
            if s.permutation:
                g, spare = spare, g

        def affine(s=s, code=code, inverse=inverse, x=x):
            if s.affine:
                code.add(AFFINE_GRAD, g, through, dim, through_u.start, s.prepared, int(inverse))

        def coupling(s=s, code=code, inverse=inverse, x=x, at=at, d_raw=d_raw, d_hidden=d_hidden):
            if not s.nets:
                return
            code.add(COUPLE_GRAD, x.slice(s.active, s.active_width), g.slice(s.active, s.active_width), s.active_width,
                     *_raw(at.raw), d_raw.start, s.squash + INVERSE * inverse, reals=(s.clamp, s.gain))  # fmt: skip
            _nets_gradient(code, s, at, d_raw, d_hidden, g, d_cond, dim)

        if s.affine:  # the coupling's y side, for d scale
            code.add(MAP, x, through_u, dim, -1, COPY, 0)
            if s.nets:
                code.add(COUPLE, x.slice(s.active, s.active_width), through_u.slice(s.active, s.active_width),
                         s.active_width, *_raw(at.raw), s.squash, reals=(s.clamp, s.gain))  # fmt: skip
        for part in (coupling, affine, permute) if inverse else (permute, affine, coupling):
            part()
        _sums(code, sums, s, at, x, cond, d_raw, d_hidden, posts, through, through_u)
        places = {**start, "g_out": g, "here": here}
        made.append((tuple(code.words), tuple(code.reals), places, tuple(sums)))
        if not save:
            here, there = there, here
    places = {"d_cond": d_cond, "cond": cond}
    if not made:
        made = [((), (), {"g": g, "g_out": g, "here": here}, ())]
    return tuple(Program(w, r, most, kept.columns, {**p, **places}, sums) for w, r, p, sums in made)


def _nets_gradient(code, s, at, d_raw, d_hidden, g, d_cond, dim) -> None:
    for n, net in enumerate(s.nets):
        down = d_raw.slice(net.column, net.layers[-1].fan_out)
        for k in range(len(net.layers) - 1, 0, -1):
            layer = net.layers[k]
            dense(code, down, d_hidden[n, k - 1], layer.weight, layer.fan_out, TRANSPOSED)
            code.add(ACTIVATE_GRAD, at.hidden[n, k - 1], d_hidden[n, k - 1], layer.fan_in, net.activation)
            down = d_hidden[n, k - 1]
        layer = net.layers[0]
        dense(code, down, g.slice(s.passive, s.passive_width), layer.weight, layer.fan_out, TRANSPOSED | ACCUMULATE)
        if s.conditional:
            weight = layer.weight + s.passive_width * layer.fan_out
            dense(code, down, d_cond, weight, layer.fan_out, TRANSPOSED | ACCUMULATE)


def _sums(code, sums, s, at, x, cond, d_raw, d_hidden, posts, through, through_u) -> None:
    """Tiles of TILE x TILE: a words, g words, rows and columns of the gradient, its place, bias place or -1."""

    def product(a: Matrix, grad: Matrix, out: int, bias: int) -> None:
        for m in range(0, a.width, TILE):
            for n in range(0, grad.width, TILE):
                sums.extend([*a.words, *grad.words, m, n, a.width, grad.width, out, bias if m == 0 else -1])

    if s.affine:
        for matrix, out in ((through_u, s.scale), (through, s.offset)):
            for n in range(0, matrix.width, TILE):
                sums.extend([*matrix.words, *matrix.words, 0, n, 0, matrix.width, 0, out])
    for n, net in enumerate(s.nets):
        for k, layer in enumerate(net.layers):
            last = k + 1 == len(net.layers)
            grad = d_raw.slice(net.column, layer.fan_out) if last else d_hidden[n, k]
            if k == 0:
                product(x.slice(s.passive, s.passive_width), grad, layer.weight, layer.bias)
                if s.conditional:
                    product(cond, grad, layer.weight + s.passive_width * layer.fan_out, -1)
                continue
            source = at.hidden[n, k - 1]
            if net.activation != Activation.RELU:
                code.add(ACTIVATE, source, posts[n, k - 1], source.width, net.activation)
                source = posts[n, k - 1]
            product(source, grad, layer.weight, layer.bias)
