"""Tools that prove a kernel: inputs, an error bound, an honest interpreter, sparse memory.

    low, wide = make((2, 4, 128, 64), torch.bfloat16, seed=0)   # inputs and their fp64 copies
    with honest_interpreter(), poisoned_empty():                # the real kernel, without a GPU
        ours = launch(low)
    assert_no_worse(ours, plain(low), truth(wide))              # no hand-tuned tolerance

The bound asks that a kernel is about as right as plain PyTorch in the same dtype. The honest
interpreter removes what Triton's interpreter forgives and a GPU does not: bf16 taken as integers,
reads past a view, programs that race, an order of programs, int32 offsets that wrap, scratch that
happens to be zero. Tensors on sparse memory and `check_mutants` show that every offset is 64-bit.
`GpuCase` is how an op tells `scripts/gpu_run.py` what to run on a GPU. Importing this module
imports neither Triton nor a GPU driver.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import itertools
import linecache
import mmap
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ._interpreter import POISON_INT, KernelFault, honest_interpreter

__all__ = [
    "GpuCase",
    "KernelFault",
    "assert_no_worse",
    "check_mutants",
    "honest_interpreter",
    "make",
    "mutants",
    "poisoned_empty",
    "sparse",
    "widening_casts",
    "with_gaps",
]


# Inputs


def make(
    shape: Sequence[int],
    dtype: torch.dtype,
    seed: int,
    device: torch.device | str = "cpu",
    kind: str = "normal",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make an input in `dtype` and its fp64 copy, so that both references see the same numbers.

    Args:
      shape: size of the tensor.
      dtype: any floating or integer dtype.
      seed: the same seed, shape and kind give the same values on every device.
      device: where both tensors live; values are drawn on the CPU.
      kind: "normal": N(0, 1). "huge": N(0, 64**2), so that exp without its running maximum
        overflows. "tiny": N(0, 1e-4**2). "outlier": N(0, 1) with one value in 64 times 32.
        "constant": all ones. "count": 0, 1, 2, ... modulo 127, exact in every dtype, for kernels
        that only move data. For integer dtypes all but "count" are uniform over the dtype's range,
        at most +-2**16.

    Returns:
      (tensor in `dtype`, the same values in fp64).

    Raises:
      ValueError: for an unknown kind.
    """
    kinds = ("normal", "huge", "tiny", "outlier", "constant", "count")
    if kind not in kinds:
        raise ValueError(f"make: kind must be one of {', '.join(kinds)}, got {kind!r}.")
    size = tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    if kind == "count":
        low = (torch.arange(int(np.prod(size, dtype=np.int64))) % 127).reshape(size).to(dtype)
    elif dtype == torch.bool:
        low = torch.rand(size, generator=generator) < 0.5
    elif not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        bottom, top = max(info.min, -(2**16)), min(info.max, 2**16)
        low = torch.randint(bottom, top + 1, size, generator=generator).to(dtype)
    else:
        wide = torch.randn(size, generator=generator, dtype=torch.float64)
        if kind == "huge":
            wide *= 64
        elif kind == "tiny":
            wide *= 1e-4
        elif kind == "outlier":
            wide = torch.where(torch.rand(size, generator=generator) < 1 / 64, wide * 32, wide)
        elif kind == "constant":
            wide = torch.ones_like(wide)
        low = wide.to(dtype)
    return low.to(device), low.to(torch.float64).to(device)


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values under odd strides; the gaps hold NaN, or a large integer.

    The last axis is strided by 2 and every other axis is padded, so a kernel that assumes
    contiguity, or reads past a row, is seen in the result even without the honest interpreter.
    """
    if tensor.ndim == 0:
        return tensor.clone()
    padded = [n + 1 for n in tensor.shape[:-1]] + [2 * tensor.shape[-1] + 1]
    base = torch.empty(padded, dtype=tensor.dtype, device=tensor.device)
    _poison(base)
    rows = [slice(0, n) for n in tensor.shape[:-1]]
    view = base[(*rows, slice(1, 2 * tensor.shape[-1], 2))]
    view.copy_(tensor)
    return view


def sparse(shape: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype) -> torch.Tensor:
    """Make a CPU tensor of zeros over memory that costs nothing until it is touched.

    Offsets past 2**31 elements then fit on any machine: only touched pages (4 KiB each) become
    real. Never call something that walks the whole tensor (`copy_`, `==`, `isnan`): index what you
    need.

    Args:
      shape: size of the tensor.
      strides: in elements; None for contiguous.
      dtype: any dtype.
    """
    size = tuple(shape)
    if strides is None:
        strides = [int(np.prod(size[i + 1 :], dtype=np.int64)) for i in range(len(size))]
    last = sum((n - 1) * s for n, s in zip(size, strides, strict=True)) if 0 not in size else 0
    page = mmap.PAGESIZE
    num_bytes = ((last + 1) * dtype.itemsize + page - 1) // page * page
    # 0x4000 is Linux's MAP_NORESERVE, which Python names only from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, num_bytes, flags=flags)
    # One touched element would otherwise claim a huge page of 2 MiB.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, size, tuple(strides))


# Above this size a poisoned tensor is left on untouched sparse memory.
_POISON_LIMIT = 2**28


def _poison(tensor: torch.Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(POISON_INT[tensor.dtype.itemsize])


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return: NaN, True, or 0x2AAA... for integers.

    A launcher that allocates its output with `torch.empty` and leaves one element unwritten then
    gives NaN instead of what the allocator left there. CPU tensors above 256 MiB are put on sparse
    memory instead (zeros), so that launches past 2**31 elements cost no memory. Covers
    `torch.empty`, `empty_like`, `empty_strided`, `Tensor.new_empty` and `Tensor.new_empty_strided`
    called from Python.
    """
    places: list[tuple[Any, str]] = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]

    def poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = original(*args, **kwargs)
            if result.numel() == 0 or result.device.type == "meta":
                return result
            num_bytes = result.untyped_storage().nbytes()
            if result.device.type == "cpu" and num_bytes > _POISON_LIMIT:
                return sparse(result.shape, result.stride(), result.dtype)
            with torch.no_grad():
                _poison(result.as_strided((num_bytes // result.dtype.itemsize,), (1,), 0))
            return result

        return allocate

    saved = [
        (owner, name, owner.__dict__.get(name), getattr(owner, name)) for owner, name in places
    ]
    try:
        for owner, name, _, original in saved:
            setattr(owner, name, poisoned(original))
        yield
    finally:
        for owner, name, own, _ in saved:
            # `Tensor` inherits these from its C base: deleting the override brings them back.
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


# The error bound


def assert_no_worse(
    ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str = ""
) -> None:
    """Assert that `ours` is about as near to the truth as plain PyTorch in the same dtype is.

    With e = |x - truth|:  max(e_ours) <= 2 max(e_plain) + ulp(max|truth|)  and
    mean(e_ours) <= 2 mean(e_plain) + ulp(mean|truth|), where ulp is the spacing of `ours.dtype`
    there. Where the truth is not finite (the lse of a fully masked row), `ours` must equal it;
    everywhere else it must be finite. Elements where `plain` overflows count no error of `plain`.
    Integers and booleans must be equal.

    Args:
      ours: the kernel's result.
      plain: the eager form's result; same dtype and shape as `ours`.
      truth: the eager form's result in fp64 on the fp64 copies of the same low-precision inputs.
      name: said in the message, e.g. "grad_key".

    Raises:
      AssertionError: with the errors, the bounds and the place of the largest error.
      ValueError: if shapes or dtypes do not belong together; a comparison that cannot be made must
        not pass.

    Not for fp64 results, where plain and truth are the same number: use
    `torch.testing.assert_close` there.
    """
    label = f"{name}: " if name else ""
    if not ours.shape == plain.shape == truth.shape:
        raise ValueError(
            f"assert_no_worse: {label}shapes must be equal, got ours {tuple(ours.shape)}, "
            f"plain {tuple(plain.shape)}, truth {tuple(truth.shape)}."
        )
    if ours.dtype != plain.dtype:
        raise ValueError(
            f"assert_no_worse: {label}ours and plain must share a dtype, "
            f"got {ours.dtype} and {plain.dtype}."
        )
    ours, plain, truth = ours.detach().cpu(), plain.detach().cpu(), truth.detach().cpu()
    if not ours.dtype.is_floating_point:
        wrong = ours.to(torch.float64) != truth.to(torch.float64)
        if wrong.any():
            place = tuple(torch.nonzero(wrong)[0].tolist())
            raise AssertionError(
                f"{label}{int(wrong.sum())} of {ours.numel()} values differ, first at {place}: "
                f"{ours[place].item()} instead of {truth[place].item()}."
            )
        return
    if truth.dtype != torch.float64:
        raise ValueError(f"assert_no_worse: {label}truth must be float64, got {truth.dtype}.")
    if ours.numel() == 0:
        return

    finite = truth.isfinite()
    odd = ~finite & ~(torch.isclose(ours.double(), truth, equal_nan=True))
    odd |= finite & ~ours.isfinite()
    if odd.any():
        place = tuple(torch.nonzero(odd)[0].tolist())
        raise AssertionError(
            f"{label}{int(odd.sum())} of {ours.numel()} values are not finite or should not be, "
            f"first at {place}: {ours[place].item()} instead of {truth[place].item()}."
        )
    if not finite.any():
        return

    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (ours.double() - truth).abs(), zero)
    usable = finite & plain.isfinite()
    plain_error = torch.where(usable, (plain.double() - truth).abs(), zero)
    size = torch.where(finite, truth.abs(), zero)
    count = int(finite.sum())
    faults = []
    for what, got, allowed, scale in (
        ("max", error.max(), plain_error.max(), size.max()),
        (
            "mean",
            error.sum() / count,
            plain_error.sum() / max(int(usable.sum()), 1),
            size.sum() / count,
        ),
    ):
        bound = 2 * allowed.item() + _ulp(scale.item(), ours.dtype)
        if not got.item() <= bound:
            faults.append(
                f"{what} error {got.item():.3e} > {bound:.3e} (plain {allowed.item():.3e})"
            )
    if faults:
        place = tuple(np.unravel_index(int(error.argmax()), tuple(error.shape)))
        where = tuple(int(i) for i in place)
        raise AssertionError(
            f"{label}{'; '.join(faults)}; largest at {where}: "
            f"{ours[where].item():.6g} instead of {truth[where].item():.6g}."
        )


def _ulp(scale: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    if scale < info.tiny:
        return float(info.tiny * info.eps)
    return float(info.eps * 2.0 ** np.floor(np.log2(scale)))


# Mutants


def widening_casts(source: str, helpers: Sequence[str] = ()) -> list[int]:
    """Find the casts to int64 in a kernel's source: their lines, 1 being the first of `source`.

    Counts `x.to(tl.int64)`, `x.to(int64)`, `tl.cast(x, tl.int64)` and calls of functions named in
    `helpers`, which widen inside themselves.
    """
    return [
        node.lineno for node in _widening_nodes(ast.parse(textwrap.dedent(source)), set(helpers))
    ]


def mutants(jit_fn: Any) -> Iterator[tuple[int, Any]]:
    """Yield (line in its file, the kernel without that one cast) for each cast to int64.

    A helper that widens (a jit function called by the kernel) is replaced at that one call by
    itself without any cast, so kernels that widen through a shared helper are covered. Works on a
    kernel under `triton.jit`, also inside `heuristics` or `autotune`; the mutant is a bare jit
    function.
    """
    base = _bare(jit_fn)
    tree, first_line = _parsed(base.fn)
    helpers = _widening_helpers(base.fn.__globals__, tree)
    for number, node in enumerate(_widening_nodes(tree, set(helpers))):
        changed = copy.deepcopy(tree)
        target = _widening_nodes(changed, set(helpers))[number]
        extra: dict[str, Any] = {}
        if isinstance(target.func, ast.Name) and target.func.id in helpers:
            narrow = f"{target.func.id}__narrow"
            extra[narrow] = _without_casts(helpers[target.func.id])
            target.func.id = narrow
        else:
            changed = _Removed([target]).visit(changed)
        yield first_line + node.lineno - 1, _rebuilt(base.fn, changed, extra)


def check_mutants(owner: Any, name: str, check: Callable[[], None]) -> int:
    """Assert that `check` passes, and fails once any one cast to int64 is removed from a kernel.

    Args:
      owner: the module (or object) whose attribute the launcher looks up, e.g.
        `xt_kernels.regions.kernels`.
      name: the kernel's name there.
      check: runs the launcher on tensors past 2**31 elements inside `honest_interpreter` and
        asserts on the result.

    Returns:
      How many mutants were tried, at least one.

    Raises:
      AssertionError: for a kernel without casts, or naming the line of a cast whose removal nobody
        noticed: either it is redundant, or the check does not drive that offset past 2**31.
    """
    kernel = getattr(owner, name)
    check()
    tried, survivors = 0, []
    try:
        for line, mutant in mutants(kernel):
            tried += 1
            setattr(owner, name, mutant)
            try:
                check()
            except AssertionError:
                continue
            survivors.append(line)
    finally:
        setattr(owner, name, kernel)
    if not tried:
        raise AssertionError(f"{name}: no cast to int64 found.")
    if survivors:
        raise AssertionError(
            f"{name}: the check passes without the cast to int64 in line "
            f"{', '.join(map(str, survivors))}."
        )
    return tried


def _bare(jit_fn: Any) -> Any:
    """The jit function under autotune and heuristics."""
    while not inspect.isfunction(jit_fn.fn):
        jit_fn = jit_fn.fn
    return jit_fn


def _parsed(fn: Any) -> tuple[ast.Module, int]:
    lines, first_line = inspect.getsourcelines(fn)
    return ast.parse(textwrap.dedent("".join(lines))), first_line


def _is_int64(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "int64") or (
        isinstance(node, ast.Name) and node.id == "int64"
    )


def _widening_nodes(tree: ast.AST, helpers: set[str]) -> list[ast.Call]:
    """Calls that widen, in an order that a deep copy keeps."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        values = node.args + [keyword.value for keyword in node.keywords]
        direct = called in ("to", "cast") and any(_is_int64(value) for value in values)
        if direct or (isinstance(node.func, ast.Name) and node.func.id in helpers):
            found.append(node)
    return sorted(
        found, key=lambda node: (node.lineno, node.col_offset, -(node.end_col_offset or 0))
    )


def _widening_helpers(names: dict[str, Any], tree: ast.AST) -> dict[str, Any]:
    """Jit functions called by name in `tree` that widen, themselves or through another."""
    helpers = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = getattr(names.get(node.func.id), "fn", None)
            if inspect.isfunction(function):
                inner, _ = _parsed(function)
                deeper = _widening_helpers(function.__globals__, inner)
                if _widening_nodes(inner, set(deeper)):
                    helpers[node.func.id] = names[node.func.id]
    return helpers


class _Removed(ast.NodeTransformer):
    """Replace the given `x.to(tl.int64)` and `tl.cast(x, tl.int64)` nodes by x."""

    def __init__(self, targets: Sequence[ast.Call]) -> None:
        self.targets = {id(node) for node in targets}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if id(node) not in self.targets:
            return node
        assert isinstance(node.func, ast.Attribute)
        return node.func.value if node.func.attr == "to" else node.args[0]


def _without_casts(helper: Any) -> Any:
    tree, _ = _parsed(helper.fn)
    deeper = _widening_helpers(helper.fn.__globals__, tree)
    extra = {}
    for node in _widening_nodes(tree, set(deeper)):
        if isinstance(node.func, ast.Name) and node.func.id in deeper:
            extra[f"{node.func.id}__narrow"] = _without_casts(deeper[node.func.id])
            node.func.id += "__narrow"
    return _rebuilt(helper.fn, _Removed(_widening_nodes(tree, set())).visit(tree), extra)


_rebuilt_count = itertools.count()


def _rebuilt(fn: Any, tree: ast.Module, extra: dict[str, Any]) -> Any:
    """Jit the changed source; `linecache` holds it, because Triton reads a kernel's source."""
    import triton

    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    text = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    filename = f"{fn.__code__.co_filename}.mutant{next(_rebuilt_count)}.py"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names = {**fn.__globals__, **extra}
    exec(compile(text, filename, "exec"), names)
    return triton.jit(names[fn.__name__])


# On a GPU


@dataclass(frozen=True)
class GpuCase:
    """One launch that `scripts/gpu_run.py` runs on a GPU, per config and 250 times over.

    An op offers its cases in its test file, `tests/test_<op>.py`:

        def gpu_cases(device: str, full: bool) -> Iterator[GpuCase]: ...

    With full=False (the script's dry run, device "cpu", interpreted) a launch must take under a
    second. The function is a generator, so that the inputs of one case are freed before the next is
    made.

    Attributes:
      name: unique within the op, e.g. "extract-uint8-bf16-29k".
      run: launches the kernels with an entry of `configs` (None: as shipped) and returns the
        outputs, freshly allocated with `torch.empty`, which the script fills with NaN first. Inputs
        are made before, outside.
      configs: every shipped tuning config of the kernels that `run` launches.
      expected: the (plain, truth) pair for each output, as `assert_no_worse` takes them. For
        outputs of many GB it may return a pair of slices, with `select` taking the same slices of
        the outputs.
      select: what of the outputs is compared with `expected`; of the rest it is known that it was
        written, and that it repeats.
      repeats: how often the shipped config runs again and must give the same bits.
    """

    name: str
    run: Callable[[Any], Sequence[torch.Tensor]]
    configs: Sequence[Any]
    expected: Callable[[], Sequence[tuple[torch.Tensor, torch.Tensor]]]
    select: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = list
    repeats: int = 250

    def check(
        self,
        outputs: Sequence[torch.Tensor],
        expected: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """Assert that what `run` returned is as `expected` (made now if not given) by the bound,
        and that no output holds NaN, which is what nobody wrote.

        Raises AssertionError as `assert_no_worse` does, naming the case and the output's number.
        """
        for place, output in enumerate(outputs):
            if output.isnan().any():
                count = int(output.isnan().sum())
                raise AssertionError(f"{self.name}, output {place}: {count} values are NaN.")
        pairs = zip(self.select(outputs), expected or self.expected(), strict=True)
        for place, (ours, (plain, truth)) in enumerate(pairs):
            assert_no_worse(ours, plain, truth, f"{self.name}, output {place}")
