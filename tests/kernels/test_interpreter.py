"""What tests take out of Triton's interpreter (tests/interpreter.py) changes nothing that it makes or refuses."""

from __future__ import annotations

import pytest

from lmvae_fast.kernels import backend


@pytest.mark.skipif(not backend.INTERPRET, reason="kernels are compiled here")
def test_block_types_are_those_of_their_shapes():
    from triton.language import core

    first, again = core.block_type(core.float32, [16, 4]), core.block_type(core.int32, [core.constexpr(16), 4])
    assert first.numel == again.numel == 64 and "fp32" in str(first) and "int32" in str(again)
    assert [*first.shape] == [*again.shape] == [16, 4] and first != again
    assert first == core.block_type(core.float32, [16, 4]) and first != core.block_type(core.float32, [4, 16])
    for shape, error in (([16.0, 4], TypeError), ([12, 4], ValueError), ((16, 4), AssertionError), ([], TypeError)):
        with pytest.raises(error):
            core.block_type(core.float32, shape)
