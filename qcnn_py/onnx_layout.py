"""Building a network from values whose axes need not lie in memory in their order.

Formats other than ours reshape and transpose freely. Here both are bookkeeping: a
:class:`Value` says how its axes are made of *factors* and in which order the factors
lie in memory. Transposing permutes axes, reshaping splits and joins factors, and
nothing is moved until an operation needs its operand in another order. So the pairs of
transpositions around convolutions of channels-last networks cancel, the features
behind a flattening are matched by permuting weights, and a shuffle of channels becomes
one ``transpose`` node.

All shapes are those of one image: the batch dimension is no axis.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import ShapeError
from qcnn_py.network import Network, Node

__all__ = ["GraphBuilder", "Value"]

_Keyed = list[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Value:
    """What a node computes, seen as an array with axes of its own.

    Attributes
    ----------
    name : str
        The value's name in the network.
    axes : tuple of tuple of int
        Factors of each axis, outermost first, all greater than 1; their product is
        the axis's extent.
    order : tuple of int
        The factors, numbered through all axes, as they lie in memory, outermost first.
    """

    name: str
    axes: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    @classmethod
    def contiguous(cls, name: str, shape: Iterable[int]) -> Value:
        """Return a value whose axes lie in memory in their order."""
        axes = tuple((extent,) if extent > 1 else () for extent in shape)
        return cls(name, axes, tuple(range(sum(map(len, axes)))))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of each axis."""
        return tuple(map(prod, self.axes))

    @property
    def factors(self) -> tuple[int, ...]:
        """Factors of all axes."""
        return tuple(factor for axis in self.axes for factor in axis)

    def numbers(self, axes: Iterable[int]) -> list[int]:
        """Return the numbers of the factors of some axes."""
        starts = np.cumsum([0, *map(len, self.axes)])
        return [
            n for axis in axes for n in range(int(starts[axis]), int(starts[axis + 1]))
        ]

    def transposed(self, permutation: Sequence[int]) -> Value:
        """Return the same value with its axes in another order."""
        numbers = self.numbers(permutation)
        return Value(
            self.name,
            tuple(self.axes[axis] for axis in permutation),
            tuple(numbers.index(n) for n in self.order),
        )

    def reshaped(self, shape: Sequence[int]) -> Value | None:
        """Return the same value with other axes.

        ``None`` if a new axis would take factors apart that have no common divisor:
        the value has to lie in the order of its axes then.
        """
        pending = [item for axis in self._keyed() for item in axis][::-1]
        axes: list[_Keyed] = []
        for extent in shape:
            taken: _Keyed = []
            while extent > 1:
                size, key = pending.pop()
                if extent % size == 0:
                    taken.append((size, key))
                    extent //= size
                elif size % extent == 0:
                    taken.append((extent, (*key, 0)))
                    pending.append((size // extent, (*key, 1)))
                    extent = 1
                else:
                    return None
            axes.append(taken)
        return _from_keyed(self.name, axes)

    def permuted(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return an array of this value's shape, flat, as the value lies in memory.

        Axes of `array` behind those of the value stay the last.
        """
        factors = self.factors
        behind = array.shape[len(self.axes) :]
        split = array.reshape((*factors, *behind))
        moved = split.transpose((*self.order, *range(len(factors), split.ndim)))
        return moved.reshape((-1, *behind))

    def _keyed(self) -> list[_Keyed]:
        """Return each axis's factors, each with a key that sorts as memory does."""
        place = {number: i for i, number in enumerate(self.order)}
        numbers = iter(range(len(self.order)))
        return [[(f, (place[next(numbers)],)) for f in axis] for axis in self.axes]


def _from_keyed(name: str, axes: Sequence[_Keyed]) -> Value:
    keys = [key for axis in axes for size, key in axis if size > 1]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    place = {number: i for i, number in enumerate(order)}
    # Factors of an axis that follow each other in memory are one.
    merged: list[_Keyed] = []
    number = 0
    for axis in axes:
        joined: _Keyed = []
        last = None
        for size, _ in axis:
            if size == 1:
                continue
            if last is not None and place[number] == last + 1:
                joined[-1] = (joined[-1][0] * size, joined[-1][1])
            else:
                joined.append((size, (place[number],)))
            last = place[number]
            number += 1
        merged.append(joined)
    keys = [key for axis in merged for _, key in axis]
    return Value(
        name,
        tuple(tuple(size for size, _ in axis) for axis in merged),
        tuple(sorted(range(len(keys)), key=keys.__getitem__)),
    )


class GraphBuilder:
    """Collects nodes and tensors of a network.

    Attributes
    ----------
    label : str
        Name for the next node; a number is appended where it is taken.
    """

    def __init__(self, input_name: str, input_shape: Sequence[int]) -> None:
        self.label = "node"
        self._input = input_name
        self._nodes: dict[str, Node] = {}
        self._tensors: dict[str, npt.NDArray[np.float32]] = {}
        self._shapes = {input_name: tuple(input_shape)}
        # Of each affine node: what it is applied to, its factors and summands.
        self._affine: dict[str, tuple[str, npt.NDArray[Any], npt.NDArray[Any]]] = {}
        self._moved: dict[Hashable, str] = {}

    def network(self, output: str, metadata: Mapping[str, Any]) -> Network:
        """Return the network that computes `output`, without what it does not need."""
        needed = {output}
        kept: list[Node] = []
        for node in reversed(self._nodes.values()):
            if node.name in needed:
                kept.append(node)
                needed.update(node.inputs)
        names = {node.name for node in kept}
        return Network(
            reversed(kept),
            {k: v for k, v in self._tensors.items() if k.rpartition(".")[0] in names},
            self._shapes[self._input],
            output=output,
            input_name=self._input,
            metadata=metadata,
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a value has in the network."""
        return self._shapes[name]

    def node(self, name: str) -> Node | None:
        """Return the node that makes a value; ``None`` for the network's input."""
        return self._nodes.get(name)

    def append(
        self,
        op: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        attributes: Mapping[str, Any] | None = None,
        tensors: Mapping[str, npt.NDArray[Any]] | None = None,
        label: str | None = None,
    ) -> str:
        """Append a node and return its name.

        Parameters
        ----------
        op : str
            Operation, as in ``docs/format.md``.
        inputs : sequence of str
            Operands.
        shape : sequence of int
            Shape of its value.
        attributes, tensors : mapping, optional
            The operation's.
        label : str, optional
            Wanted name; :attr:`label` by default.
        """
        wanted = label or self.label
        name, number = wanted, 1
        while name in self._shapes:
            number += 1
            name = f"{wanted}_{number}"
        self._nodes[name] = Node(name, op, tuple(inputs), dict(attributes or {}))
        for part, array in (tensors or {}).items():
            self._tensors[f"{name}.{part}"] = np.ascontiguousarray(array, np.float32)
        self._shapes[name] = tuple(shape)
        return name

    def placed(self, value: Value, order: Sequence[int], shape: Sequence[int]) -> str:
        """Return the name of a value's copy in another order of its factors.

        Parameters
        ----------
        value : Value
            What is moved, if it does not lie like that already.
        order : sequence of int
            The factors, as they are to lie in memory.
        shape : sequence of int
            Shape that the network is to see: three extents or one.
        """
        axes = [value.order.index(number) for number in order]
        # Neighbours that stay together are one axis.
        runs: list[list[int]] = []
        for axis in axes:
            if runs and runs[-1][-1] + 1 == axis:
                runs[-1].append(axis)
            else:
                runs.append([axis])
        if len(runs) <= 1:
            return self._reshaped(value.name, tuple(shape))
        lying = sorted(runs)
        factors = value.factors
        view = [prod(factors[value.order[i]] for i in run) for run in lying]
        attributes = {
            "view": view,
            "axes": [lying.index(run) for run in runs],
            "shape": list(shape),
        }
        key = (value.name, tuple(view), tuple(attributes["axes"]), tuple(shape))
        if key not in self._moved:
            label = f"{value.name}_transposed"
            self._moved[key] = self.append(
                "transpose", [value.name], shape, attributes, label=label
            )
        return self._moved[key]

    def _reshaped(self, name: str, shape: tuple[int, ...]) -> str:
        if self._shapes[name] == shape:
            return name
        made = self._nodes.get(name)
        if made is not None and made.op in ("flatten", "reshape"):
            return self._reshaped(made.inputs[0], shape)
        key = (name, shape)
        if key not in self._moved:
            flat = len(shape) == 1
            self._moved[key] = self.append(
                "flatten" if flat else "reshape",
                [name],
                shape,
                {} if flat else {"shape": list(shape)},
                label=f"{name}_flat" if flat else f"{name}_reshaped",
            )
        return self._moved[key]

    def ordered(self, value: Value, shape: Sequence[int] | None = None) -> Value:
        """Return a value whose axes lie in memory in their order.

        Parameters
        ----------
        value : Value
            Moved if necessary.
        shape : sequence of int, optional
            Shape that the network is to see; the nearest to the value's own by
            default.
        """
        extents = value.shape
        if shape is None:
            shape = network_shape(extents)
        name = self.placed(value, range(len(value.order)), shape)
        return Value.contiguous(name, extents)

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """Return a value with other axes."""
        return value.reshaped(shape) or Value.contiguous(
            self.ordered(value).name, shape
        )

    def apply(self, op: str, value: Value, **attributes: Any) -> Value:
        """Append an operation that treats every element alike."""
        shape = self._shapes[value.name]
        return replace(value, name=self.append(op, [value.name], shape, attributes))

    def affine(
        self, value: Value, factor: npt.ArrayLike, summand: npt.ArrayLike
    ) -> Value:
        """Append ``factor * value + summand``, as a batch normalisation.

        One affine function of another becomes a single one.

        Parameters
        ----------
        value : Value
            The operand.
        factor, summand : array
            Numbers that are broadcast to the value's shape.
        """
        source, shape = value.name, self._shapes[value.name]
        coefficients = []
        for array in (factor, summand):
            spread = np.broadcast_to(np.asarray(array, np.float64), value.shape)
            coefficients.append(value.permuted(spread).reshape(shape[0], -1))
        if any((rows != rows[:, :1]).any() for rows in coefficients):
            # Not the same for all pixels of a channel: every element is a channel.
            shape = (prod(shape),)
            source = self._reshaped(source, shape)
            factors, summands = (rows.ravel() for rows in coefficients)
        else:
            factors, summands = (rows[:, 0].copy() for rows in coefficients)
        if (factors == 1).all() and (summands == 0).all():
            return value
        if source in self._affine:
            source, inner_factors, inner_summands = self._affine[source]
            summands = factors * inner_summands + summands
            factors = factors * inner_factors
        tensors = {
            "scale": factors,
            "bias": summands,
            "mean": np.zeros(shape[0]),
            "variance": np.ones(shape[0]),
        }
        name = self.append("batch_norm", [source], shape, {"epsilon": 0.0}, tensors)
        self._affine[name] = (source, factors, summands)
        return replace(value, name=name)

    def affine_source(self, name: str) -> tuple[str, float, float] | None:
        """Return operand, factor and summand of an affine node with one of each."""
        if name not in self._affine:
            return None
        source, factors, summands = self._affine[name]
        if (factors != factors[0]).any() or (summands != summands[0]).any():
            return None
        return source, float(factors[0]), float(summands[0])

    def combined(self, op: str, first: Value, other: Value) -> Value:
        """Append the sum (``add``) or product (``mul``) of two values.

        Parameters
        ----------
        op : str
            The operation.
        first : Value
            Has the shape of the result.
        other : Value
            Of the same shape, or with extents of 1 along axes that are repeated.
        """
        wanted = [
            axis if extent > 1 else ()
            for axis, extent in zip(first.axes, other.shape, strict=True)
        ]
        factors = [factor for axis in wanted for factor in axis]
        matched = other.reshaped(factors)
        if matched is None or any(len(axis) > 1 for axis in matched.axes):
            # Cut into other factors than the first operand, or into smaller ones.
            matched = self.ordered(other).reshaped(factors)
        if matched is None:
            first = self.ordered(first)
            return self.combined(op, first, self.ordered(other))
        kept = first.numbers(axis for axis, factors in enumerate(wanted) if factors)
        order = [kept.index(n) for n in first.order if n in kept]
        marks = ["whole" if n in kept else "repeated" for n in first.order]
        sizes = [first.factors[n] for n in first.order]
        frame = _framed(self._shapes[first.name], sizes, marks)
        if frame is None:
            raise ShapeError(
                f"{self.label}: cannot combine shapes {first.shape} and {other.shape}, "
                "whole and repeated axes take turns too often"
            )
        shape = tuple(1 if mark == "repeated" else size for size, mark in frame)
        left = self._reshaped(first.name, tuple(size for size, _ in frame))
        right = self.placed(matched, order, shape)
        name = self.append(op, [left, right], self._shapes[left])
        return replace(first, name=name)

    def concatenated(self, values: Sequence[Value], axis: int) -> Value:
        """Append the concatenation of values along an axis."""
        others = [a for a in range(len(values[0].axes)) if a != axis]
        extents = [values[0].shape[a] for a in others]
        # The network joins first axes only.
        pixels = extents if len(extents) == 2 else [prod(extents), 1]
        names = []
        for value in values:
            order = value.numbers([axis, *others])
            extent = value.shape[axis]
            shape = (extent,) if not extents else (extent, *pixels)
            names.append(self.placed(value, order, shape))
        total = sum(value.shape[axis] for value in values)
        shape = (total, *self._shapes[names[0]][1:])
        name = self.append("concat", names, shape)
        joined = Value.contiguous(name, [total, *extents])
        back = [
            others.index(a) + 1 if a != axis else 0 for a in range(len(extents) + 1)
        ]
        return joined.transposed(back)

    def reduced(self, op: str, value: Value, axes: Sequence[int]) -> Value:
        """Append a global pooling over some axes, which get extent 1."""
        numbers = set(value.numbers(axes))
        kept = [n for n in value.order if n not in numbers]
        factors = value.factors
        channels = prod(factors[n] for n in kept)
        shape = self._shapes[value.name]
        if len(shape) != 3 or shape[0] != channels:
            shape = (channels, prod(factors[n] for n in numbers), 1)
        order = [*kept, *(n for n in value.order if n in numbers)]
        name = self.append(op, [self.placed(value, order, shape)], (channels, 1, 1))
        keyed = value._keyed()
        return _from_keyed(
            name, [[] if a in axes else keyed[a] for a in range(len(keyed))]
        )

    def normalized(self, op: str, value: Value, axes: Sequence[int]) -> Value:
        """Append a softmax, or its logarithm, over some axes together."""
        numbers = set(value.numbers(axes))
        order = [n for n in value.order if n in numbers]
        channels = prod(value.factors[n] for n in order)
        order += [n for n in value.order if n not in numbers]
        shape = self._shapes[value.name]
        if shape[0] != channels:
            pixels = prod(value.factors) // channels
            shape = (channels,) if pixels == 1 else (channels, pixels, 1)
        name = self.append(op, [self.placed(value, order, shape)], shape)
        return Value(name, value.axes, tuple(order))

    def sliced(self, value: Value, ranges: Mapping[int, tuple[int, int, int]]) -> Value:
        """Append a slice.

        Parameters
        ----------
        value : Value
            The operand.
        ranges : mapping of int to (start, step, count)
            What is taken of each axis; all of those that are not named.
        """

        def cut(size: int, mark: tuple[int, int, int] | None) -> tuple[int, int, int]:
            return mark or (0, 1, size)

        def append(source: str, cuts: list[tuple[int, int, int]]) -> str:
            starts, steps, counts = (list(part) for part in zip(*cuts, strict=True))
            attributes = {"start": starts, "step": steps, "shape": counts}
            return self.append("slice", [source], counts, attributes)

        return self._reframed(value, ranges, cut, append, lambda size, cut: cut[2])

    def padded(
        self, value: Value, widths: Mapping[int, tuple[int, int]], number: float
    ) -> Value:
        """Append a padding.

        Parameters
        ----------
        value : Value
            The operand.
        widths : mapping of int to (before, after)
            Elements added to each axis; none to those that are not named.
        number : float
            What the new elements hold.
        """

        def width(size: int, mark: tuple[int, int] | None) -> tuple[int, int]:
            return mark or (0, 0)

        def append(source: str, pads: list[tuple[int, int]]) -> str:
            before, after = (list(part) for part in zip(*pads, strict=True))
            attributes = {"before": before, "after": after, "value": number}
            extents = zip(before, self._shapes[source], after, strict=True)
            return self.append("pad", [source], [sum(e) for e in extents], attributes)

        return self._reframed(
            value, widths, width, append, lambda size, pad: sum(pad) + size
        )

    def _reframed(
        self,
        value: Value,
        marks: Mapping[int, Any],
        complete: Any,
        append: Any,
        extent: Any,
    ) -> Value:
        """Change extents along marked axes, all at once or one after the other."""
        if any(len(value.axes[axis]) > 1 for axis in marks):
            value = self.ordered(value)
        keyed = value._keyed()
        for axis, factors in enumerate(keyed):
            if axis in marks and not factors:
                # An axis of extent 1 gets a factor, behind those of the axis before.
                before = [item[-1][1] for item in keyed[:axis] if item]
                keyed[axis] = [(1, (*(before or [(-1,)])[-1], axis))]
        flat = sorted(
            (key, size, a) for a, axis in enumerate(keyed) for size, key in axis
        )
        sizes = [size for _, size, _ in flat]
        lying = [marks.get(axis) for _, _, axis in flat]
        frame = _framed(self._shapes[value.name], sizes, lying)
        if frame is None:
            for axis, mark in marks.items():
                value = self._reframed(value, {axis: mark}, complete, append, extent)
            return value
        source = self._reshaped(value.name, tuple(size for size, _ in frame))
        name = append(source, [complete(size, mark) for size, mark in frame])
        changed = [
            [
                (extent(size, marks[axis]) if axis in marks else size, key)
                for size, key in items
            ]
            for axis, items in enumerate(keyed)
        ]
        return _from_keyed(name, changed)


def _framed(
    shape: Sequence[int], sizes: Sequence[int], marks: Sequence[Any]
) -> list[tuple[int, Any]] | None:
    """Return extents, one or three, in which each axis has one mark.

    Factors with the same mark may be one axis, but for tuples, which mark one factor
    each. The shape that the value has already is taken where it will do; ``None`` if
    three axes are too few.
    """
    return _aligned(shape, sizes, marks) or _merged(sizes, marks)


def _aligned(
    shape: Sequence[int], sizes: Sequence[int], marks: Sequence[Any]
) -> list[tuple[int, Any]] | None:
    """Frame of the shape that the value has already, if that is one."""
    pending = [(s, m) for s, m in zip(sizes, marks, strict=True)][::-1]
    frame: list[tuple[int, Any]] = []
    for extent in shape:
        taken: list[Any] = []
        rest = extent
        while rest > 1 or (
            extent == 1 and pending and pending[-1][0] == 1 and not taken
        ):
            if not pending or rest % pending[-1][0]:
                return None
            size, mark = pending.pop()
            rest //= size
            taken.append(mark)
        if any(m != taken[0] or isinstance(m, tuple) for m in taken[1:]):
            return None
        frame.append((extent, taken[0] if taken else None))
    return None if pending else frame


def _merged(sizes: Sequence[int], marks: Sequence[Any]) -> list[tuple[int, Any]] | None:
    """Frame with neighbours of the same mark joined."""
    frame: list[tuple[int, Any]] = []
    for size, mark in zip(sizes, marks, strict=True):
        if frame and frame[-1][1] == mark and not isinstance(mark, tuple):
            frame[-1] = (frame[-1][0] * size, mark)
        else:
            frame.append((size, mark))
    if len(frame) > 3:
        return None
    if len(frame) != 1:
        frame += [(1, None)] * (3 - len(frame))
    return frame


def network_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape, one or three extents, nearest to any shape."""
    if len(shape) in (1, 3):
        return tuple(shape)
    return (*shape, 1) if len(shape) == 2 else (prod(shape),)
