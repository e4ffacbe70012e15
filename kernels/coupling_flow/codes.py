"""The numbers by which the compiled kernels know a flow's parts (FlowSpec.plan) and the Triton kernels their instructions.

csrc/cpu/coupling_flow.h has the parts' numbers in the same order; 0 always means that a stage has no such part.
"""

from __future__ import annotations

from enum import IntEnum


class Activation(IntEnum):
    RELU = 1
    GELU = 2
    SILU = 3


class Squash(IntEnum):
    TANH = 1
    ATAN = 2
    SIGMOID = 3
    NONE = 4


class Scale(IntEnum):
    SOFTPLUS = 1
    EXP = 2
    SIGMOID = 3


class Permutation(IntEnum):
    HARD = 1
    SOFT = 2


def names(kinds: type[IntEnum]) -> tuple[str, ...]:
    """The names of an enumeration as a spec writes them, in order."""
    return tuple(kind.name.lower() for kind in kinds)


#: What the forward primitive keeps for backward.
KEEP_NOTHING, KEEP_ACTIVATIONS, KEEP_OUTPUT = range(3)

# ---- instructions of the rows kernel (program.py writes them, triton_kernels.py reads them) ---------------------------

DENSE, ACTIVATE, ACTIVATE_GRAD, COUPLE, MAP, AFFINE_GRAD, COUPLE_GRAD = range(7)

#: Words of an instruction, and where they stand: its kind, the matrices a and c (four words each), the width, its own.
FIELDS = 16
MATRIX_A, MATRIX_C, WIDTH, OWN = 1, 5, 9, 10

#: The memory that a matrix lies in: scratch, or what memory="save" hands to backward.
TEMPORARY, KEPT = 0, 1

#: Flags of DENSE, added to DENSE_FLAGS times the distance of the weight's rows.
BIAS, ACCUMULATE, RECTIFY, TRANSPOSED, CONSTANTS = 1, 2, 4, 8, 16
DENSE_FLAGS = 32

#: Flags of COUPLE and COUPLE_GRAD, added to the number of the squash, which is below SQUASHES.
INVERSE, LOGDET = 8, 16
SQUASHES = 8

#: What MAP does beside the permutation: nothing; y = x * scale + offset of the source's channel; or its inverse, of the
#: target's channel.
COPY, RESCALE, UNSCALE = range(3)

# ---- jobs of the sums kernel -------------------------------------------------------------------------------------------

#: Words of a job, and where they stand: the matrices a and g (four words each), then the six of the tile.
SUM_FIELDS = 14
SUM_A, SUM_G, SUM_TILE = 0, 4, 8
#: Rows and columns of a tile.
TILE = 64
