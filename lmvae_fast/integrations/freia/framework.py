"""`SequenceINN`, FrEIA's sequence of blocks: runs of them that coupling_flow can express are one call of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.freia.blocks import ActNorm, Block, joined
from lmvae_fast.integrations.freia.fused import Fused


class SequenceINN(nn.Module):
    """Blocks one after another, with FrEIA's interface.

    Args:
        dims: of the input: one number, the channels of a vector.
        force_tuple_output: return the result as a tuple of one tensor.

    Raises ConfigError for inputs that are no vectors.
    """

    def __init__(self, *dims: int, force_tuple_output: bool = False):
        super().__init__()
        if len(dims) != 1:
            raise ConfigError(
                "SequenceINN works on vectors", value=dims, limit="one number", remedy="use FrEIA itself for images"
            )
        self.shapes: list[tuple[int, ...]] = [tuple(dims)]
        self.conditions: list[int | None] = []
        self.module_list = nn.ModuleList()
        self.force_tuple_output = force_tuple_output
        self._runs: list[tuple[list[int], Fused | None]] | None = None

    def append(
        self, module_class: type, cond: int | None = None, cond_shape: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        """Append a block of ``lmvae_fast.integrations.freia``.

        cond: which of forward's conditions it reads; cond_shape: of that condition. kwargs: of the class.
        Raises ConfigError for another library's class.
        """
        if not (isinstance(module_class, type) and issubclass(module_class, Block)):
            raise ConfigError(
                "blocks of FrEIA and of this package do not mix",
                value=f"{getattr(module_class, '__module__', '')}.{getattr(module_class, '__qualname__', module_class)}",
                limit="the classes of lmvae_fast.integrations.freia",
                remedy="build the sequence of FrEIA's own classes and hand it to freia.convert",
            )
        if cond is not None:
            if cond_shape is None:
                raise ConfigError("a condition needs its shape", value=f"cond={cond}", remedy="cond_shape=(width,)")
            kwargs["dims_c"] = [tuple(cond_shape)]
        block = module_class([self.shapes[-1]], **kwargs)
        self.conditions.append(cond)
        self.module_list.append(block)
        self.shapes.append(tuple(block.output_dims([self.shapes[-1]])[0]))
        self._runs = None

    def __getitem__(self, item: Any) -> Any:
        return self.module_list[item]

    def __len__(self) -> int:
        return len(self.module_list)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.module_list)

    def output_dims(self, input_dims: Any) -> Any:
        """The same as the input's."""
        return input_dims

    @property
    def why_plain(self) -> dict[int, str]:
        """Which blocks run in plain torch, and why."""
        blocks: Any = self.module_list
        return {i: block.why_plain for i, block in enumerate(blocks) if block.why_plain is not None}

    def _plan(self) -> list[tuple[list[int], Fused | None]]:
        """Runs of blocks with one condition at most that coupling_flow can run together; the others, each by itself."""
        blocks: Any = self.module_list
        groups: list[tuple[list[int], bool, int | None]] = []
        for i, block in enumerate(blocks):
            fast, cond = block.why_plain is None, self.conditions[i]
            members, was_fast, of = groups[-1] if groups else ([], False, None)
            if groups and fast and was_fast and (cond is None or of is None or cond == of):
                groups[-1] = ([*members, i], True, of if cond is None else cond)
            else:
                groups.append(([i], fast, cond))
        runs: list[tuple[list[int], Fused | None]] = []
        for members, fast, _ in groups:
            if fast and any(p.is_floating_point() for i in members for p in blocks[i].parameters()):
                runs.append((members, Fused([blocks[i] for i in members])))
            else:  # also permutations without a coupling beside them
                runs += [([i], None) for i in members]
        return runs

    def forward(
        self, x_or_z: Any, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Any, Tensor]:
        """The sequence, or with ``rev`` its inverse: the result ``[B, dim]`` and the logdet ``[B]`` of what was run.

        c: conditions ``[B, width]``, by index. jac: without a meaning here; the logdet costs nothing.
        """
        x: Tensor = x_or_z if isinstance(x_or_z, Tensor) else x_or_z[0]
        blocks: Any = self.module_list
        logdet = x.new_zeros(x.shape[0])
        if any(isinstance(block, ActNorm) and block.init_on_next_batch for block in blocks):
            runs: Any = [([i], None) for i in range(len(blocks))]  # so that it sees what reaches it
        else:
            self._runs = self._runs or self._plan()
            runs = self._runs
        for members, fused in reversed(runs) if rev else runs:
            cond = self._condition(members, c)
            if fused is not None:
                x, part = fused(x, cond, rev)
            else:
                (x,), part = blocks[members[0]]((x,), c=None if cond is None else [cond], rev=rev)
            logdet = logdet + part
        return ((x,) if self.force_tuple_output else x), logdet

    def _condition(self, members: Sequence[int], c: Sequence[Tensor] | None) -> Tensor | None:
        for i in members:
            index = self.conditions[i]
            if index is not None:
                if c is None or index >= len(c):
                    raise ConfigError(f"block {i} needs condition {index}", value=f"{len(c or [])} conditions")
                return joined(self.module_list[i], [c[index]])  # type: ignore[arg-type]
        return None
