"""Triton's interpreter made honest: it refuses what a GPU would punish, and rounds as a GPU does.

`honest_interpreter` replaces methods of `triton.runtime.interpreter` while it is active: launches
(`_Launching`), loads and stores (`_Memory`), arithmetic and casts (`_Arithmetic`), reductions and
scans (`_Blocks`). Works with Triton 3.6 to 3.9. Importing this module imports no Triton.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

_Array = npt.NDArray[Any]

# What integers hold that were never written, by size in bytes.
POISON_INT = {1: 0x2A, 2: 0x2AAA, 4: 0x2AAAAAAA, 8: 0x2AAAAAAAAAAAAAAA}


class KernelFault(AssertionError):
    """A kernel did what a GPU punishes; the message names kernel, argument, program and line."""


# Overlapping views with more elements are only checked from their first to their last element.
_MAX_OFFSETS = 10**7


@dataclass(frozen=True)
class _View:
    """One tensor argument of a launch, and which addresses its sizes and strides reach."""

    name: str
    base: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    # Merged axes, largest stride first, without those of size 1 or stride 0.
    axes: tuple[tuple[int, int], ...]
    # All element offsets, for views whose axes overlap (a sliding window); None otherwise.
    offsets: _Array | None
    last: int

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> _View:
        sizes, strides = tuple(tensor.shape), tuple(tensor.stride())
        axes: list[tuple[int, int]] = []
        for size, stride in sorted(zip(sizes, strides, strict=True), key=lambda axis: -axis[1]):
            if size == 1 or stride == 0:
                continue
            if axes and axes[-1][1] == size * stride:
                axes[-1] = (axes[-1][0] * size, stride)
            else:
                axes.append((size, stride))
        last = sum((size - 1) * stride for size, stride in axes) if 0 not in sizes else -1
        offsets = None
        below = 0
        for size, stride in reversed(axes):
            if stride <= below:
                if tensor.numel() > _MAX_OFFSETS:
                    axes = [(last + 1, 1)]
                    break
                offsets = np.zeros(1, dtype=np.int64)
                for n, s in axes:
                    offsets = np.unique(np.add.outer(offsets, np.arange(n) * s))
                break
            below += (size - 1) * stride
        return _View(
            name,
            tensor.data_ptr(),
            tensor.element_size(),
            sizes,
            strides,
            tuple(axes),
            offsets,
            last,
        )

    def holds(self, element: _Array) -> _Array:
        """Which element offsets belong to the view."""
        inside = (element >= 0) & (element <= self.last)
        if self.offsets is not None:
            return inside & np.isin(element, self.offsets)
        if len(self.axes) == 1 and self.axes[0][1] == 1:
            return inside
        rest = element
        for size, stride in self.axes:
            rest = rest - np.minimum(rest // stride, size - 1) * stride
        result: _Array = inside & (rest == 0)
        return result

    @property
    def end(self) -> int:
        return self.base + (self.last + 1) * self.itemsize


@dataclass
class _Accesses:
    """Addresses that programs touched in one way: kept per program, then joined."""

    now: list[tuple[int, _Array]] = field(default_factory=list)  # (view, addresses)
    done: list[tuple[int, int, _Array]] = field(default_factory=list)  # (view, program, addresses)

    def finish(self, program: int) -> None:
        for view, group in itertools.groupby(sorted(self.now, key=lambda x: x[0]), lambda x: x[0]):
            self.done.append((view, program, np.unique(np.concatenate([a for _, a in group]))))
        self.now = []

    def joined(self, views: set[int] | None = None) -> tuple[_Array, _Array, _Array]:
        """Addresses, programs and views, sorted by address."""
        kept = [x for x in self.done if views is None or x[0] in views]
        if not kept:
            empty = np.zeros(0, dtype=np.int64)
            return empty.astype(np.uint64), empty, empty
        address = np.concatenate([a for _, _, a in kept])
        program = np.concatenate([np.full(a.size, p) for _, p, a in kept])
        view = np.concatenate([np.full(a.size, v) for v, _, a in kept])
        order = np.argsort(address, kind="stable")
        return address[order], program[order], view[order]


# User addresses have 47 bits, so the number of the argument rides in the bits above and survives
# pointer arithmetic, `where`, broadcasts and reshapes. The top bit stays clear.
_TAG_SHIFT = np.uint64(48)
_ADDRESS_MASK = np.uint64(2**48 - 1)


class _Launch:
    """What one kernel launch may touch and has touched."""

    def __init__(self, kernel: str, grid: tuple[int, ...] = (1, 1, 1)) -> None:
        self.kernel = kernel
        self.grid = grid  # of the launch; `loop` is what the interpreter walks
        self.loop = grid
        self.views: list[_View] = []
        self.names: dict[int, str] = {}
        self.order: _Array | None = None
        self.program = -1
        self.loads, self.stores = _Accesses(), _Accesses()
        self.atomics, self.float_atomics = _Accesses(), _Accesses()
        self.unsynced: list[_Array] = []

    def name(self, name: str, value: Any) -> None:
        """Remember which argument a tensor is, also inside tuples and descriptors."""
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self.name(f"{name}[{i}]", item)
        elif hasattr(value, "data_ptr"):
            self.names[id(value)] = name
        elif hasattr(value, "base"):
            self.name(name, value.base)

    def add(self, tensor: Any) -> int:
        """The number of a tensor argument, from 1; its pointers carry it."""
        name = self.names.get(id(tensor), "an argument")
        # Triton's own wrapper for reinterpreted tensors keeps the tensor in `base`.
        self.views.append(_View.of(name, tensor if torch.is_tensor(tensor) else tensor.base))
        return len(self.views)

    def grid_index(self, program: int) -> tuple[int, int, int]:
        x, y, z = np.unravel_index(program, self.grid)
        return int(x), int(y), int(z)

    def begin(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        self.end_program()
        program = (x * self.loop[1] + y) * self.loop[2] + z
        if self.order is not None:
            program = int(self.order[program])
        self.program = program
        return self.grid_index(program)

    def end_program(self) -> None:
        self.unsynced = []
        for accesses in (self.loads, self.stores, self.atomics, self.float_atomics):
            accesses.finish(self.program)

    def fault(self, text: str) -> KernelFault:
        program = self.grid_index(max(self.program, 0))
        return KernelFault(f"{self.kernel}: {text} [program {program}{_kernel_line()}]")

    def overlapping(self, written: set[int]) -> set[int]:
        """Views that share memory with a written one."""
        spans = [(self.views[i - 1].base, self.views[i - 1].end) for i in written]
        return {
            i + 1
            for i, view in enumerate(self.views)
            if any(view.base < end and start < view.end for start, end in spans)
        }

    def check_races(self, allow_float_atomics: bool) -> None:
        self.end_program()
        written = {
            view
            for accesses in (self.stores, self.atomics, self.float_atomics)
            for view, _, _ in accesses.done
        }
        if not written:
            return
        stores = self.stores.joined()
        atomics, float_atomics = self.atomics.joined(), self.float_atomics.joined()
        loads = self.loads.joined(self.overlapping(written))
        self._conflict("both write", stores, stores)
        self._conflict("write and read", stores, loads)
        for updates in (atomics, float_atomics):
            self._conflict("write and atomically update", stores, updates)
            self._conflict("atomically update and read", updates, loads)
        if not allow_float_atomics:
            self._conflict("add floats in an order that varies, to", float_atomics, float_atomics)

    def _conflict(
        self,
        what: str,
        first: tuple[_Array, _Array, _Array],
        second: tuple[_Array, _Array, _Array],
    ) -> None:
        address, program, view = first
        if not address.size or not second[0].size:
            return
        left = np.searchsorted(address, second[0], "left")
        right = np.searchsorted(address, second[0], "right")
        # The entries of one program lie together (the sort is stable): if the first and the last
        # entry of an address are the seeker's own, all are.
        found = left < right
        low = np.minimum(left, address.size - 1)
        high = np.maximum(right - 1, 0)
        clash = found & ((program[low] != second[1]) | (program[high] != second[1]))
        if not clash.any():
            return
        at = int(np.argmax(clash))
        one = int(low[at]) if program[low[at]] != second[1][at] else int(high[at])
        target = self.views[int(view[one]) - 1]
        other = self.views[int(second[2][at]) - 1]
        names = target.name if other.name == target.name else f"{target.name} / {other.name}"
        element = (int(address[one]) - target.base) // target.itemsize
        raise KernelFault(
            f"{self.kernel}: race: programs {self.grid_index(int(program[one]))} and "
            f"{self.grid_index(int(second[1][at]))} {what} element {element} of {names} "
            f"({int(clash.sum())} such accesses)."
        )


def _package_folder(name: str) -> str:
    return str(Path(str(sys.modules[name].__file__)).parent) + "/"


def _kernel_line() -> str:
    """The source line of the kernel that is being interpreted, as ", file.py:12"."""
    ours = (_package_folder("triton"), _package_folder("numpy"), __file__, contextlib.__file__, "<")
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(ours):
            return f", {name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _widen(bits: _Array) -> _Array:
    """bf16 bit patterns as fp32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(value: _Array) -> _Array:
    """Round to the nearest bf16, ties to even, as bit patterns; NaN stays NaN."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return (
        np.where(np.isnan(value), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(value.shape)
    )


def _tf32(value: _Array) -> _Array:
    """Round fp32 to the 10 mantissa bits that a TF32 tensor core reads."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded.view(np.float32), value).reshape(value.shape)


# (a kernel's name, its grid) -> numbers of the programs to run, x slowest.
Programs = Callable[[str, tuple[int, ...]], Sequence[int]]


@dataclass(frozen=True)
class _Checks:
    """What to check; see `honest_interpreter`."""

    shuffle_seed: int | None
    check_bounds: bool
    check_races: bool
    check_int32: bool
    poison: bool
    allow_float_atomics: bool
    programs: Programs | None


class _Session:
    """Triton's interpreter while it is honest: its modules, what was replaced, the launch under
    way."""

    def __init__(self, checks: _Checks) -> None:
        import triton.language
        from triton.runtime import interpreter

        self.checks = checks
        self.tl: Any = triton.language
        self.interp: Any = interpreter
        self.builder: Any = interpreter.interpreter_builder
        self.handle: Any = interpreter.TensorHandle
        self.launches: list[_Launch] = []
        self.launch_count = 0
        self.replaced: list[tuple[Any, str, bool, Any]] = []

    @property
    def launch(self) -> _Launch:
        return self.launches[-1]

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put make(what is there) in the place of `owner.name`."""
        self.replaced.append((owner, name, name in vars(owner), vars(owner).get(name)))
        setattr(owner, name, make(getattr(owner, name)))

    def restore(self) -> None:
        while self.replaced:
            owner, name, own, value = self.replaced.pop()
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


class _Launching:
    """Follows each launch: its arguments and their views, its grid, the order of its programs."""

    def __init__(self, session: _Session) -> None:
        self.s = session
        s = session
        s.replace(s.interp.GridExecutor, "__call__", self.call)
        s.replace(s.interp.GridExecutor, "_init_args_hst", self.init_args)
        s.replace(s.interp, "_implicit_cvt", self.implicit_cvt)
        s.replace(s.builder, "set_grid_dim", self.set_grid_dim)
        s.replace(s.builder, "set_grid_idx", self.set_grid_idx)

    def call(self, original: Any) -> Any:
        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            s = self.s
            s.launches.append(_Launch(executor.fn.__name__))
            if s.checks.programs is not None:
                s.launch.grid = (*executor.grid, 1, 1)[:3]
                s.launch.order = np.array(s.checks.programs(s.launch.kernel, s.launch.grid))
                executor.grid = (len(s.launch.order),)
            try:
                with np.errstate(all="ignore"):
                    result = original(executor, *args, **kwargs)
                if s.checks.check_races:
                    s.launch.check_races(s.checks.allow_float_atomics)
                return result
            except Exception as error:
                # The interpreter wraps what a kernel raises, once per call depth.
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, KernelFault):
                    cause = cause.__cause__
                if cause is None:
                    raise
                raise cause.with_traceback(None) from None
            finally:
                s.launches.pop()

        return call

    def init_args(self, original: Any) -> Any:
        def init_args(executor: Any, args: Any, kwargs: Any) -> Any:
            args_hst, kwargs_hst = original(executor, args, kwargs)
            for name, value in inspect.getcallargs(executor.fn, *args_hst, **kwargs_hst).items():
                self.s.launch.name(name, value)
            return args_hst, kwargs_hst

        return init_args

    def implicit_cvt(self, original: Any) -> Any:
        def implicit_cvt(arg: Any) -> Any:
            result = original(arg)
            if hasattr(arg, "data_ptr"):
                tag = np.uint64(self.s.launch.add(arg)) << _TAG_SHIFT
                result.handle.data = result.handle.data | tag
            elif isinstance(arg, int) and not isinstance(arg, bool) and arg >= 2**31:
                # Some integers come as uint32 data under an int64 type, and would wrap as uint32.
                wide = np.uint64 if arg >= 2**63 else np.int64
                result.handle.data = result.handle.data.astype(wide)
            return result

        return implicit_cvt

    def set_grid_dim(self, original: Any) -> Any:
        def set_grid_dim(*loop: int) -> None:
            s = self.s
            s.launch.loop = loop
            chosen = s.launch.order
            grid = s.launch.grid if chosen is not None else loop
            if grid[0] >= 2**31 or max(grid[1:]) > 65535:
                raise s.launch.fault(f"grid {grid} exceeds CUDA's (2**31 - 1, 65535, 65535)")
            s.launch.grid = grid
            if s.checks.shuffle_seed is not None:
                random = np.random.default_rng((s.checks.shuffle_seed, s.launch_count))
                count = int(np.prod(grid, dtype=np.int64))
                s.launch.order = random.permutation(count if chosen is None else chosen)
                s.launch_count += 1
            original(*grid)

        return set_grid_dim

    def set_grid_idx(self, original: Any) -> Any:
        return lambda x, y, z: original(*self.s.launch.begin(x, y, z))


class _Memory:
    """Loads, stores and atomics: bounds, races, NaN in masked lanes."""

    def __init__(self, session: _Session) -> None:
        self.s = session
        self.interp, self.tl = session.interp, session.tl
        for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas", "barrier"):
            session.replace(session.builder, f"create_{name}", getattr(self, name))

    def touch(self, ptrs: Any, mask: Any, verb: str) -> tuple[Any, list[tuple[int, _Array]]]:
        """Untag pointers, check bounds, and return them with the active addresses by view."""
        launch = self.s.launch
        tags, address = ptrs.data >> _TAG_SHIFT, ptrs.data & _ADDRESS_MASK
        plain = self.s.handle(address, ptrs.dtype)
        if mask is not None:
            active = np.broadcast_to(mask.data, address.shape)
            tags, address = tags[active], address[active]
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        groups = []
        # A block mostly points into one argument; sorting to learn that would cost the most here.
        one = tags.size > 0 and bool((tags == tags.flat[0]).all())
        for tag in [int(tags.flat[0])] if one else np.unique(tags).tolist():
            if not 1 <= tag <= len(launch.views):
                raise launch.fault(f"a {verb} through a pointer that belongs to no argument")
            view = launch.views[tag - 1]
            here = address.ravel() if one else address[tags == tag]
            groups.append((tag, here))
            if not self.s.checks.check_bounds:
                continue
            offset = here.astype(np.int64) - view.base
            first, last = offset // view.itemsize, (offset + width - 1) // view.itemsize
            good = view.holds(first) & (view.holds(last) | (first == last))
            if not good.all():
                raise launch.fault(
                    f"{verb} out of bounds: element offset {first[~good][0]} of {view.name}, "
                    f"a view of size {view.sizes} and stride {view.strides} "
                    f"({(~good).sum()} of {good.size} addresses)"
                )
        return plain, groups

    def masked_load(self, original: Any) -> Any:
        def masked_load(ptrs: Any, mask: Any, other: Any, *rest: Any, **kwargs: Any) -> Any:
            plain, groups = self.touch(ptrs, mask, "load")
            launch = self.s.launch
            if self.s.checks.check_races:
                launch.loads.now.extend(groups)
                for tag, here in groups:
                    if any(np.isin(here, stored).any() for stored in launch.unsynced):
                        raise launch.fault(
                            f"loads from {launch.views[tag - 1].name} what it stored itself; "
                            "other threads may not see it before tl.debug_barrier()"
                        )
            if other is None and self.s.checks.poison:
                other = self.poison(ptrs)
            return original(plain, mask, other, *rest, **kwargs)

        return masked_load

    def poison(self, ptrs: Any) -> Any:
        """What lanes without a value hold: on a GPU, anything."""
        element = ptrs.get_element_ty()
        dtype = self.interp._get_np_dtype(element)
        if element == self.tl.bfloat16:
            fill: Any = 0x7FC0
        elif dtype.kind == "f":
            fill = np.nan
        elif dtype.kind == "b":
            fill = True
        else:
            fill = 0x7F if element.is_floating() else POISON_INT[dtype.itemsize]
        return self.s.handle(np.full(ptrs.data.shape, fill, dtype=dtype), element)

    def masked_store(self, original: Any) -> Any:
        def masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
            plain, groups = self.touch(ptrs, mask, "store")
            launch = self.s.launch
            if self.s.checks.check_races and groups:
                launch.stores.now.extend(groups)
                launch.unsynced.extend(here for _, here in groups)
                active = np.broadcast_to(mask.data, plain.data.shape)
                stored = np.broadcast_to(value.data, plain.data.shape)[active]
                if _disagree(plain.data[active], stored):
                    name = launch.views[groups[0][0] - 1].name
                    raise launch.fault(f"one store puts different values in one element of {name}")
            return original(plain, value, mask, *rest, **kwargs)

        return masked_store

    def atomic_rmw(self, original: Any) -> Any:
        def atomic_rmw(op: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
            launch = self.s.launch
            if val.dtype.scalar == self.tl.bfloat16:
                raise launch.fault("atomics on bfloat16 need sm_90 and are not interpreted")
            plain, groups = self.touch(ptr, mask, "atomic")
            ordered = val.dtype.scalar.is_floating() and op == self.interp._ir.ATOMIC_OP.FADD
            (launch.float_atomics if ordered else launch.atomics).now.extend(groups)
            return original(op, plain, val, mask, *rest, **kwargs)

        return atomic_rmw

    def atomic_cas(self, original: Any) -> Any:
        def atomic_cas(ptr: Any, *rest: Any, **kwargs: Any) -> Any:
            plain, groups = self.touch(ptr, None, "atomic")
            self.s.launch.atomics.now.extend(groups)
            return original(plain, *rest, **kwargs)

        return atomic_cas

    def barrier(self, original: Any) -> Any:
        def barrier() -> Any:
            self.s.launch.unsynced = []
            return original()

        return barrier


def _disagree(address: _Array, values: _Array) -> bool:
    """Whether one address gets two values that differ in their bits."""
    if address.size < 2 or (np.diff(address.astype(np.int64)) > 0).all():
        return False
    order = np.argsort(address, kind="stable")
    same = np.diff(address[order]) == 0
    bits = values[order].view(f"u{values.dtype.itemsize}")
    return bool((same & (bits[1:] != bits[:-1])).any())


class _Arithmetic:
    """Rounds bf16 and TF32 as a GPU does, and refuses int32 that wraps."""

    NAMES: ClassVar = {
        np.add: "addition",
        np.subtract: "subtraction",
        np.multiply: "multiplication",
        np.left_shift: "left shift",
    }

    def __init__(self, session: _Session) -> None:
        self.s = session
        self.interp, self.tl = session.interp, session.tl
        self.check = session.checks.check_int32
        for name in ("binary_op", "unary_op", "ternary_op", "cast_impl"):
            session.replace(session.builder, name, getattr(self, name))
        for name in ("fma", "fp_to_fp", "dot"):
            session.replace(session.builder, f"create_{name}", getattr(self, name))
        # A dot with K < 16 runs interpreted and does not compile.
        sizes = {8: 32, 64: 4}
        session.replace(
            session.builder,
            "codegen_fns",
            lambda functions: {
                **functions,
                "min_dot_size": lambda a, b: (1, 1, sizes.get(a.scalar.primitive_bitwidth, 16)),
            },
        )

    def is_bf16(self, x: Any) -> bool:
        return bool(x.dtype.scalar == self.tl.bfloat16 and x.data.dtype == np.uint16)

    def lift(self, x: Any) -> Any:
        """bf16 as fp32, anything else as it is."""
        return self.s.handle(_widen(x.data), self.tl.float32) if self.is_bf16(x) else x

    def lower(self, x: Any) -> Any:
        return self.s.handle(_narrow(x.data), self.tl.bfloat16)

    def binary_op(self, original: Any) -> Any:
        def binary_op(lhs: Any, rhs: Any, op: Any) -> Any:
            low = self.is_bf16(lhs) and self.is_bf16(rhs)
            result = original(self.lift(lhs), self.lift(rhs), op) if low else original(lhs, rhs, op)
            if result.data.dtype == np.bool_:
                # Comparisons come back under the operands' type: broadcast, a mask would turn into
                # integers.
                return self.s.handle(result.data, self.tl.int1)
            kind = lhs.dtype.scalar
            if self.check and op in self.NAMES and kind.is_int_signed() and kind.int_bitwidth <= 32:
                exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
                self.refuse_change(kind, result.data, exact, self.NAMES[op])
            return self.lower(result) if low else result

        return binary_op

    def refuse_change(self, kind: Any, got: _Array, exact: _Array, what: str) -> None:
        wrong = got != exact
        if wrong.any():
            raise self.s.launch.fault(
                f"int{kind.int_bitwidth} overflow: a {what} gives {exact[wrong].flat[0]}; "
                "widen an operand to int64 first"
            )

    def unary_op(self, original: Any) -> Any:
        def unary_op(arg: Any, op: Any) -> Any:
            if self.is_bf16(arg):
                return self.lower(original(self.lift(arg), op))
            return original(arg, op)

        return unary_op

    def ternary_op(self, original: Any) -> Any:
        def ternary_op(x: Any, y: Any, z: Any, op: Any) -> Any:
            if op is not np.where and self.is_bf16(z):
                return self.lower(original(self.lift(x), self.lift(y), self.lift(z), op))
            return original(x, y, z, op)

        return ternary_op

    def fma(self, original: Any) -> Any:
        def fma(x: Any, y: Any, z: Any) -> Any:
            if self.is_bf16(z):
                return self.lower(original(self.lift(x), self.lift(y), self.lift(z)))
            return original(x, y, z)

        return fma

    def cast_impl(self, original: Any) -> Any:
        def cast_impl(src: Any, dst_type: Any) -> Any:
            dst = dst_type.scalar
            if self.is_bf16(src):
                if dst == self.tl.bfloat16:
                    return src
                src = self.lift(src)
                return self.s.handle(src.data.astype(self.interp._get_np_dtype(dst)), dst)
            if dst == self.tl.bfloat16:
                return self.s.handle(_narrow(src.data.astype(np.float32)), dst)
            result = original(src, dst_type)
            if self.check and src.data.dtype == np.int64 and dst.is_int_signed():
                self.refuse_change(dst, result.data, src.data, "cast")
            return result

        return cast_impl

    def fp_to_fp(self, original: Any) -> Any:
        """Casts with a rounding mode; Triton's own rounding carries no bit into the exponent."""
        plain = (self.tl.bfloat16, self.tl.float16, self.tl.float32, self.tl.float64)

        def fp_to_fp(src: Any, dst_type: Any, rounding_mode: Any) -> Any:
            dst = dst_type.scalar
            toward_zero = rounding_mode == self.interp._ir.ROUNDING_MODE.RTZ
            if dst in plain and src.dtype.scalar in plain and not toward_zero:
                return self.s.builder.cast_impl(src, dst_type)
            return original(self.lift(src), dst_type, rounding_mode)

        return fp_to_fp

    def dot(self, original: Any) -> Any:
        def dot(a: Any, b: Any, acc: Any, input_precision: Any, *rest: Any) -> Any:
            fp32, handle = self.tl.float32, self.s.handle
            if a.dtype.scalar == fp32 and input_precision == self.interp._ir.INPUT_PRECISION.TF32:
                a, b = handle(_tf32(a.data), fp32), handle(_tf32(b.data), fp32)
            elif a.data.dtype == np.float16 and acc.data.dtype == np.float32:
                # The same numbers, through the fast matrix product.
                a = handle(a.data.astype(np.float32), fp32)
                b = handle(b.data.astype(np.float32), fp32)
            return original(self.lift(a), self.lift(b), acc, input_precision, *rest)

        return dot


class _Blocks:
    """Custom scans and reductions in log2(n) steps, bf16 ones in fp32, and no truth of a block."""

    def __init__(self, session: _Session, arithmetic: _Arithmetic) -> None:
        self.s = session
        self.arithmetic = arithmetic
        interp = session.interp
        session.replace(interp, "_patch_lang_tensor", self.patch_lang_tensor)
        session.replace(interp.ScanOps, "generic_scan", lambda _: lambda op, x: self.scan(op, x))
        session.replace(
            interp.ReduceOps, "generic_reduce", lambda _: lambda op, x: self.reduce(op, x)
        )
        for operation in (interp.ScanOps, interp.ReduceOps):
            session.replace(operation, "apply_impl", self.apply_impl)
        for operation, name, function in (
            (interp.ScanOps, "cumsum", np.cumsum),
            (interp.ScanOps, "cumprod", np.cumprod),
            (interp.ReduceOps, "sum", np.sum),
        ):
            session.replace(operation, name, self.narrow(function))

    def patch_lang_tensor(self, original: Any) -> Any:
        home = _package_folder("triton")

        def patch_lang_tensor(tensor: Any, scope: Any, *rest: Any) -> None:
            original(tensor, scope, *rest)
            truth = tensor.__bool__

            def strict(block: Any) -> bool:
                # Triton's own front end asks for the truth of blocks too; only kernels are meant.
                caller = sys._getframe(1).f_code.co_filename
                if block.handle.data.size > 1 and not caller.startswith(home):
                    raise self.s.launch.fault(
                        "the truth value of a block: `and`, `or`, `not` and `if` take scalars; "
                        "use &, |, ~ and tl.where"
                    )
                return bool(truth(block))

            scope.set_attr(tensor, "__bool__", strict)
            # Triton 3.6 makes an integer of a one-element array, which NumPy 2.4 refuses.
            scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

        return patch_lang_tensor

    def narrow(self, function: Any) -> Callable[[Any], Any]:
        """NumPy sums small integers in 64 bits, and the result would stay so."""

        def make(original: Any) -> Any:
            def total(op: Any, block: Any) -> Any:
                kind = block.dtype.scalar
                if not kind.is_int() or not 8 <= kind.int_bitwidth <= 32:
                    return original(op, block)
                options = {"keepdims": op.keep_dims} if function is np.sum else {}
                exact = function(block.handle.data.astype(np.int64), axis=op.axis, **options)
                narrow = exact.astype(self.s.interp._get_np_dtype(kind))
                if self.arithmetic.check and kind.is_int_signed():
                    self.arithmetic.refuse_change(
                        kind, np.asarray(narrow), np.asarray(exact), function.__name__
                    )
                result = op.to_tensor(narrow, block.dtype)
                return result if function is np.sum else [result]

            return total

        return make

    def combine(
        self, op: Any, dtypes: list[Any], left: list[_Array], right: list[_Array]
    ) -> list[_Array]:
        """Combine elementwise, in one call."""
        function = op.combine_fn.rewrite()
        shape, count = left[0].shape, left[0].size
        # Blocks have a power of two of elements: the pairs are repeated up to one.
        padded = 1 << (count - 1).bit_length()
        arguments = [
            op.to_tensor(np.resize(data, (padded,)), dtype)
            for side in (left, right)
            for data, dtype in zip(side, dtypes, strict=True)
        ]
        result = function(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        out = []
        for item, data in zip(results, left, strict=True):
            values = item.handle.data if hasattr(item, "handle") else np.asarray(item)
            values = np.broadcast_to(values, (padded,))[:count]
            out.append(values.reshape(shape).astype(data.dtype))
        return out

    def scan(self, op: Any, inputs: Any) -> list[Any]:
        """Inclusive scan by doubling: after the step of width w, element i holds i-2w+1 .. i."""
        dtypes = [x.dtype for x in inputs]
        data = [np.moveaxis(np.array(x.handle.data), op.axis, 0) for x in inputs]
        width = 1
        while width < data[0].shape[0]:
            tail = self.combine(op, dtypes, [x[:-width] for x in data], [x[width:] for x in data])
            data = [np.concatenate([x[:width], y]) for x, y in zip(data, tail, strict=True)]
            width *= 2
        moved = [np.ascontiguousarray(np.moveaxis(x, 0, op.axis)) for x in data]
        return [op.to_tensor(x, dtype) for x, dtype in zip(moved, dtypes, strict=True)]

    def reduce(self, op: Any, inputs: Any) -> list[Any]:
        """Reduction by a tree of neighbours."""
        dtypes = [x.dtype for x in inputs]
        arrays = [x.handle.data for x in inputs]
        rank, axis = arrays[0].ndim, op.axis
        data = [np.moveaxis(x, axis, 0) if axis is not None else x.reshape(-1) for x in arrays]
        while data[0].shape[0] > 1:
            even = data[0].shape[0] // 2 * 2
            pairs = self.combine(
                op, dtypes, [x[0:even:2] for x in data], [x[1:even:2] for x in data]
            )
            data = [np.concatenate([x, y[even:]]) for x, y in zip(pairs, data, strict=True)]
        results = [x[0] for x in data]
        if op.keep_dims:
            axes = tuple(range(rank)) if axis is None else (axis,)
            results = [np.expand_dims(np.asarray(x), axes) for x in results]
        return [op.to_tensor(x, dtype) for x, dtype in zip(results, dtypes, strict=True)]

    def apply_impl(self, original: Any) -> Any:
        tl, arithmetic = self.s.tl, self.arithmetic

        def lower(x: Any) -> Any:
            kind = tl.block_type(tl.bfloat16, list(x.shape)) if x.type.is_block() else tl.bfloat16
            return tl.core.tensor(arithmetic.lower(x.handle), kind)

        def apply_impl(op: Any, inputs: Any) -> Any:
            low = [arithmetic.is_bf16(x.handle) for x in inputs]
            if not any(low):
                return original(op, inputs)
            lifted = tuple(
                op.to_tensor(_widen(x.handle.data), tl.float32) if is_low else x
                for x, is_low in zip(inputs, low, strict=True)
            )
            results = original(op, lifted)
            results = results if isinstance(results, (list, tuple)) else (results,)
            return [lower(x) if is_low else x for x, is_low in zip(results, low, strict=True)]

        return apply_impl


@contextlib.contextmanager
def honest_interpreter(
    *,
    shuffle_seed: int | None = 0,
    check_bounds: bool = True,
    check_races: bool = True,
    check_int32: bool = True,
    poison: bool = True,
    allow_float_atomics: bool = False,
    programs: Programs | None = None,
) -> Iterator[None]:
    """Make Triton's interpreter refuse what a GPU would punish, and round as a GPU does.

    Needs `TRITON_INTERPRET=1` in the environment before Triton is imported.

    Always: bf16 is rounded as a GPU does (dot, cast, arithmetic, reductions), fp32 dots round their
    operands to TF32 unless `input_precision="ieee"` or "tf32x3" is asked for, a dot with K < 16 and
    the truth value of a block are errors (neither compiles), grids beyond CUDA's 65535 in y and z
    are errors, custom scans and reductions take log2(n) steps.

    Args:
      shuffle_seed: programs run in a random order drawn from this seed; None keeps the grid's
        order.
      check_bounds: each address must lie in the *view* of the argument that its pointer came from,
        as given by its size and strides; a neighbour in the same storage is a fault.
      check_races: an element that one program writes and another writes or reads is a fault, as
        are: a program that reads back its own store without `tl.debug_barrier()`, one store that
        puts two values in one place, and float atomics of several programs on one element (their
        order varies). Elements that two arguments share count as one if both have the same dtype.
        Not seen inside one program: two stores to one element, a store after a load of it, a load
        after an atomic.
      check_int32: int32 (and smaller signed) add, subtract, multiply, left shift, sum, scan and
        narrowing that change the value are faults. Unsigned arithmetic may wrap, and narrowing to
        an unsigned type may cut.
      poison: masked lanes of a load without `other` hold NaN, or 0x2AAA... for integers, instead of
        0.
      allow_float_atomics: see `check_races`.
      programs: takes a kernel's name and its grid (a tuple, not a function) and returns the numbers
        of the programs to run, x slowest; None runs all. The last few of a grid too large to walk
        show what offsets its program ids make.

    Raises:
      KernelFault: from the launch, naming kernel, argument, program and source line.
      RuntimeError: if Triton does not interpret.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("honest_interpreter: set TRITON_INTERPRET=1 before Triton is imported.")
    session = _Session(
        _Checks(
            shuffle_seed,
            check_bounds,
            check_races,
            check_int32,
            poison,
            allow_float_atomics,
            programs,
        )
    )
    try:
        _Launching(session)
        _Memory(session)
        _Blocks(session, _Arithmetic(session))
        yield
    finally:
        session.restore()
