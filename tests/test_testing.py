"""The tools that prove kernels, each shown to see the fault that it is for."""

import ast
import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402  (after the skip)

from xt_kernels import _aot  # noqa: E402
from xt_kernels.testing import (  # noqa: E402
    GpuCase,
    KernelFault,
    assert_no_worse,
    check_mutants,
    honest_interpreter,
    make,
    mutants,
    poisoned_empty,
    sparse,
    widening_casts,
    with_gaps,
)

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels run on the GPU here, not interpreted"
)
LOW = (torch.bfloat16, torch.float16, torch.float32)


# Inputs


@pytest.mark.parametrize("kind", ["normal", "huge", "tiny", "outlier", "constant", "count"])
@pytest.mark.parametrize("dtype", LOW)
def test_make_gives_the_same_numbers_twice(kind: str, dtype: torch.dtype) -> None:
    low, wide = make((3, 50), dtype, seed=1, kind=kind)
    again, _ = make((3, 50), dtype, seed=1, kind=kind)
    assert low.dtype == dtype and wide.dtype == torch.float64 and low.shape == (3, 50)
    assert torch.equal(low.double(), wide) and torch.equal(low, again)
    assert low.isfinite().all()
    if kind not in ("constant", "count"):
        assert not torch.equal(low, make((3, 50), dtype, seed=2, kind=kind)[0])


def test_make_kinds_are_what_they_say() -> None:
    spread = {k: make((4096,), torch.float32, 0, kind=k)[0] for k in ("normal", "huge", "tiny")}
    assert 0.9 < spread["normal"].std() < 1.1
    assert spread["huge"].std() > 50
    assert spread["tiny"].std() < 2e-4
    outlier = make((4096,), torch.float32, 0, kind="outlier")[0]
    assert 0.005 < (outlier.abs() > 5).double().mean() < 0.03
    count = make((2, 300), torch.bfloat16, 0, kind="count")[0]
    assert count.flatten()[:128].tolist() == [*range(127), 0]
    for dtype, top in ((torch.uint8, 255), (torch.int8, 127), (torch.uint16, 65535)):
        pixels = make((2**16,), dtype, 0)[0].long()
        assert pixels.min() <= top // 256 and 0.999 * top <= pixels.max() <= top
        assert pixels.min() < -126 or dtype != torch.int8
    with pytest.raises(ValueError, match=r"kind must be one of normal, .*, got 'odd'"):
        make((3,), torch.float32, 0, kind="odd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_with_gaps_keeps_values_and_poisons_the_gaps(dtype: torch.dtype) -> None:
    tensor = make((2, 3, 5), dtype, seed=0)[0]
    view = with_gaps(tensor)
    assert torch.equal(view, tensor)
    assert view.stride(-1) == 2 and not view.is_contiguous()
    whole = torch.empty(0, dtype=dtype).set_(view.untyped_storage())
    if dtype == torch.bfloat16:
        assert whole.isnan().sum() == whole.numel() - tensor.numel()
    assert whole.numel() == 3 * 4 * 11


def test_sparse_costs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = sparse((3, 2**31), None, torch.bfloat16)
    tensor[2, -1] = 7.0
    assert tensor[2, -1] == 7.0 and tensor[0, -1] == 0.0
    odd = sparse((2, 4), (2**32, 3), torch.float64)
    odd[1, 3] = 1.0
    assert odd.stride() == (2**32, 3) and odd[1, 3] == 1.0 and odd[0, 3] == 0.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(4, 5),
        lambda: torch.empty(4, dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.zeros(3, 3)),
        lambda: torch.empty_strided((2, 2), (5, 1)),
        lambda: torch.zeros(3).new_empty(7),
        lambda: torch.zeros(3).new_empty_strided((2, 2), (3, 1)),
    ],
)
def test_poisoned_empty_gives_nan(allocate: Callable[[], torch.Tensor]) -> None:
    with poisoned_empty():
        assert allocate().isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 0x2AAAAAAA).all()
        assert torch.empty(0).numel() == 0


def test_poisoned_empty_ends_and_spares_huge_tensors() -> None:
    names = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in names]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with poisoned_empty():
        assert torch.empty(2**31 + 5, dtype=torch.uint8)[-1] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert [getattr(owner, name) for owner, name in names] == originals


# The error bound, on a small attention kernel with faults to choose from


FAULTS = (
    "dropped key",
    "missing rescale",
    "swapped sign",
    "one wrong tile",
    "lost tail",
    "stale maximum",
)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    num_queries,
    num_keys,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    FAULT: tl.constexpr,
):
    """out = softmax(scale q k^T) v for BLOCK queries, keys in tiles of BLOCK, online softmax."""
    pid = tl.program_id(0)
    offs_m = pid * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < num_queries
    q = tl.load(q_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    row_max = tl.full([BLOCK], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    end = num_keys
    if FAULT == "lost tail":
        end = num_keys // BLOCK * BLOCK
    for start in range(0, end, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        mask_n = offs_n < num_keys
        offs_v = offs_n
        if FAULT == "one wrong tile":
            offs_v = tl.where(
                (pid == 1) & (offs_n >= BLOCK) & (offs_n < 2 * BLOCK), offs_n ^ 1, offs_n
            )
        k = tl.load(k_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask_n[:, None], other=0.0)
        v = tl.load(v_ptr + offs_v[:, None] * D + offs_d[None, :], mask=mask_n[:, None], other=0.0)
        if FAULT == "dropped key":
            mask_n = mask_n & (offs_n != 5)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if FAULT == "swapped sign":
            scores = tl.where(start == BLOCK, -scores, scores)
        scores = tl.where(mask_n[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        if FAULT == "stale maximum":
            new_max = tl.maximum(row_max, -1e4)
        p = tl.exp(scores - new_max[:, None])
        rescale = tl.exp(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        if FAULT != "missing rescale":
            acc = acc * rescale[:, None]
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        row_max = new_max
    out = acc / row_sum[:, None]
    tl.store(
        out_ptr + offs_m[:, None] * D + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None],
    )


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fault: str = "", precision: str = "ieee"
) -> torch.Tensor:
    out = torch.empty_like(q)
    grid = (triton.cdiv(q.shape[0], 32),)
    _attention_kernel[grid](
        q, k, v, out, q.shape[0], k.shape[0], q.shape[1] ** -0.5, q.shape[1], 32, precision, fault
    )
    return out


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.T * q.shape[1] ** -0.5, dim=-1) @ v


def attention_inputs(
    dtype: torch.dtype, kind: str, device: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shapes = ((70, 32), (150, 32), (150, 32))
    kinds = (kind, kind, "normal")
    pairs = [
        make(s, dtype, i, device, k) for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))
    ]
    return [low for low, _ in pairs], [wide for _, wide in pairs]


@pytest.mark.usefixtures("honest", "poisoned_empty")
class TestBoundOnAttention:
    @pytest.mark.parametrize("kind", ["normal", "huge", "tiny", "outlier"])
    @pytest.mark.parametrize("dtype", LOW)
    def test_right_kernel_passes(self, dtype: torch.dtype, kind: str, device: str) -> None:
        low, wide = attention_inputs(dtype, kind, device)
        assert_no_worse(attention(*low), eager_attention(*low), eager_attention(*wide), kind)

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("dtype", LOW)
    def test_planted_fault_is_rejected(self, dtype: torch.dtype, fault: str, device: str) -> None:
        # A maximum that never moves only shows where exp overflows without it.
        kind = "huge" if fault == "stale maximum" else "normal"
        low, wide = attention_inputs(dtype, kind, device)
        ours = attention(*low, fault=fault)
        with pytest.raises(AssertionError, match=r"out: .*"):
            assert_no_worse(ours, eager_attention(*low), eager_attention(*wide), "out")

    def test_tf32_is_no_fp32(self, device: str) -> None:
        low, wide = attention_inputs(torch.float32, "normal", device)
        ours = attention(*low, precision="tf32")
        with pytest.raises(AssertionError, match=r"max error .* > .*mean error"):
            assert_no_worse(ours, eager_attention(*low), eager_attention(*wide))


class TestBound:
    """The bound itself, on numbers made for it."""

    def test_one_ulp_of_the_scale_is_free(self) -> None:
        truth = torch.full((8,), 1.5, dtype=torch.float64)
        plain = truth.bfloat16()
        assert_no_worse(plain + 2**-7, plain, truth)
        with pytest.raises(AssertionError, match=r"max error 1.562e-02 > 7.812e-03"):
            assert_no_worse(plain + 2**-6, plain, truth)

    def test_mean_sees_what_max_forgives(self) -> None:
        truth = torch.full((1000,), 0.5, dtype=torch.float64)
        truth[0] = 1000.0
        plain = truth.float()
        # Off by 64 ulp of 0.5 everywhere: less than one ulp of 1000.
        ours = torch.where(truth < 1, plain + 64 * 2**-24, plain)
        with pytest.raises(AssertionError, match=r"^mean error"):
            assert_no_worse(ours, plain, truth)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite_is_rejected(self, bad: float) -> None:
        truth = torch.ones(4, dtype=torch.float64)
        ours = torch.tensor([1.0, 1.0, bad, 1.0])
        with pytest.raises(AssertionError, match=r"1 of 4 values .* first at \(2,\)"):
            assert_no_worse(ours, truth.float(), truth)
        # Not even where plain PyTorch overflows as well.
        with pytest.raises(AssertionError, match=r"first at \(2,\)"):
            assert_no_worse(ours, ours.clone(), truth)

    def test_infinite_truth_must_be_met(self) -> None:
        truth = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
        assert_no_worse(truth.float(), truth.float(), truth)
        for wrong in (0.0, float("inf"), float("nan")):
            with pytest.raises(AssertionError, match=r"first at \(1,\)"):
                assert_no_worse(torch.tensor([1.0, wrong]), truth.float(), truth)

    def test_integers_must_be_equal(self) -> None:
        truth = torch.arange(5)
        assert_no_worse(truth.int(), truth.int(), truth)
        with pytest.raises(AssertionError, match=r"1 of 5 values differ, first at \(4,\)"):
            assert_no_worse(torch.tensor([0, 1, 2, 3, 5]).int(), truth.int(), truth)

    def test_comparisons_that_cannot_be_made_do_not_pass(self) -> None:
        x = torch.ones(3)
        with pytest.raises(ValueError, match="out: shapes must be equal"):
            assert_no_worse(x, x, torch.ones(4).double(), "out")
        with pytest.raises(ValueError, match="must share a dtype"):
            assert_no_worse(x.half(), x, x.double())
        with pytest.raises(ValueError, match="truth must be float64"):
            assert_no_worse(x, x, x)

    def test_empty_passes(self) -> None:
        x = torch.empty(0, 3)
        assert_no_worse(x, x, x.double())


# The interpreter's arithmetic


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "neg":
        out = -a
    elif OP == "max":
        out = tl.maximum(a, b)
    elif OP == "where":
        out = tl.where(a < b, a, b)
    elif OP == "compare":
        out = (a < b).to(tl.float32)
    else:
        out = tl.abs(a)
    tl.store(out_ptr + offs, out)


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize(
    ("op", "torch_op"),
    [
        ("add", torch.add),
        ("sub", torch.sub),
        ("mul", torch.mul),
        ("neg", lambda a, b: -a),
        ("max", torch.maximum),
        ("where", torch.minimum),
        ("abs", lambda a, b: a.abs()),
        ("compare", lambda a, b: (a < b).bfloat16()),
    ],
)
def test_bf16_arithmetic(op: str, torch_op: Callable[..., torch.Tensor], device: str) -> None:
    a = make((1024,), torch.bfloat16, 0, device)[0]
    b = make((1024,), torch.bfloat16, 1, device)[0]
    out = torch.empty_like(a)
    _binary_kernel[(1,)](a, b, out, op, 1024)
    assert torch.equal(out, torch_op(a, b))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_casts_round_like_torch(source: torch.dtype, target: torch.dtype, device: str) -> None:
    if source.is_floating_point:
        # Every pattern of the upper 16 bits with lower bits around the ties.
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        high = (torch.arange(2**16, dtype=torch.int32) << 16)[:, None]
        x = (high | low).flatten()[: 6 * 2**16].view(torch.float32).to(source)
        x = x[x.isfinite()]
        if target == torch.int32:
            x = x[x.abs() < 1e9]
    else:
        x = torch.arange(-(2**17), 2**17, dtype=torch.int32)
    x = x[: x.numel() // 4096 * 4096].to(device)
    out = torch.empty(x.shape, dtype=target, device=device)
    _cast_kernel[(x.numel() // 4096,)](x, out, 4096)
    assert torch.equal(out, x.to(target))


@triton.jit
def _sum_kernel(x_ptr, sum_ptr, max_ptr, scan_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr, tl.sum(x, 0))
    tl.store(max_ptr, tl.max(x, 0))
    tl.store(scan_ptr + offs, tl.cumsum(x, 0))


@pytest.mark.usefixtures("honest")
def test_bf16_reductions(device: str) -> None:
    x, wide = make((256,), torch.bfloat16, 0, device)
    total, top, scan = (torch.empty(n, dtype=torch.float32, device=device) for n in (1, 1, 256))
    _sum_kernel[(1,)](x, total, top, scan, 256)
    assert_no_worse(total, x.sum(0, keepdim=True).float(), wide.sum(0, keepdim=True))
    assert torch.equal(top.bfloat16(), x.amax(0, keepdim=True))
    assert_no_worse(scan, x.cumsum(0).float(), wide.cumsum(0))


@triton.jit
def _decay(a, x, b, y):
    return a * b, x * b + y


@triton.jit
def _first_largest(value, index, other, other_index):
    keep = (value > other) | ((value == other) & (index < other_index))
    return tl.where(keep, value, other), tl.where(keep, index, other_index)


@triton.jit
def _scan_kernel(a_ptr, x_ptr, out_ptr, N: tl.constexpr, D: tl.constexpr, REVERSE: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :]
    _, h = tl.associative_scan((tl.load(a_ptr + offs), tl.load(x_ptr + offs)), 0, _decay, REVERSE)
    tl.store(out_ptr + offs, h)


@triton.jit
def _argmax_kernel(x_ptr, value_ptr, index_ptr, N: tl.constexpr, D: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :]
    rows = tl.arange(0, N)[:, None] + tl.zeros([N, D], tl.int32)
    value, index = tl.reduce((tl.load(x_ptr + offs), rows), 0, _first_largest)
    tl.store(value_ptr + tl.arange(0, D), value)
    tl.store(index_ptr + tl.arange(0, D), index)


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize("reverse", [False, True])
def test_custom_scan_is_right_and_fast(reverse: bool, device: str) -> None:
    length = 4096 if device == "cpu" else 256
    decay = make((length, 16), torch.float32, 0, device)[0].sigmoid()
    x = make((length, 16), torch.float32, 1, device)[0]
    out = torch.empty_like(x)
    start = time.process_time()
    _scan_kernel[(1,)](decay, x, out, length, 16, reverse)
    # One element at a time takes 0.1 ms each, 6.5 s in all.
    assert time.process_time() - start < 2 or device == "cuda"
    h = torch.zeros(16, dtype=torch.float64, device=device)
    expected = torch.empty(length, 16, dtype=torch.float64, device=device)
    for i in reversed(range(length)) if reverse else range(length):
        h = decay[i].double() * h + x[i].double()
        expected[i] = h
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("honest")
def test_custom_reduction_is_right(device: str) -> None:
    x = make((64, 8), torch.float32, 0, device)[0].round()  # with ties
    value = torch.empty(8, device=device)
    index = torch.empty(8, dtype=torch.int32, device=device)
    _argmax_kernel[(1,)](x, value, index, 64, 8)
    assert torch.equal(value, x.amax(0))
    assert torch.equal(index.long(), (x == x.amax(0)).int().argmax(0))


# The interpreter's checks


@triton.jit
def _copy_kernel(
    x_ptr,
    out_ptr,
    strides,
    rows,
    columns,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Copies [rows, columns]; a program owns a row. MASK says what keeps it inside."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < (columns if MASK == "right" else BLOCK)
    x = tl.load(x_ptr + row * strides[0] + offs * strides[1], mask=mask, other=0.0)
    tl.store(out_ptr + row * columns + offs, x.to(DTYPE), mask=offs < columns)


@interpreted
class TestBounds:
    """A program may touch what sizes and strides of an argument reach, and nothing else."""

    def copy(self, x: torch.Tensor, strides: tuple[int, ...], mask: str = "right") -> torch.Tensor:
        out = torch.empty(x.shape)
        block = triton.next_power_of_2(x.shape[1])
        _copy_kernel[(x.shape[0],)](x, out, strides, *x.shape, mask, block, tl.float32)
        return out

    def test_any_view_passes(self, honest: None) -> None:
        x = torch.randn(6, 10)
        shared = torch.randn(40)
        views = (
            x,
            x.T,
            x[::2, 1::3],
            with_gaps(x),
            x[:1].expand(5, 10),
            shared.as_strided((5, 8), (4, 1)),
        )
        for view in views:
            assert torch.equal(self.copy(view, view.stride()), view)

    @pytest.mark.parametrize(
        "view",
        [
            torch.randn(6, 10),
            torch.randn(6, 30)[:, 10:20],
            torch.randn(40).as_strided((3, 7), (3, 1)),
        ],
        ids=["whole", "neighbour in the same storage", "overlapping rows"],
    )
    def test_missing_mask_is_caught(self, view: torch.Tensor) -> None:
        with honest_interpreter(), pytest.raises(KernelFault, match=r"load out of bounds.* x_ptr"):
            self.copy(view, view.stride(), mask="none")
        with honest_interpreter(check_bounds=False):
            self.copy(torch.randn(2, 16)[:, :10], (16, 1), mask="none")

    def test_holes_of_overlapping_rows_are_caught(self, honest: None) -> None:
        view = torch.randn(40).as_strided((3, 4), (3, 2))  # offsets 0 2 3 4 5 6 7 8 9 10 12
        assert torch.equal(self.copy(view, (3, 2)), view)
        with pytest.raises(KernelFault, match="element offset 1 of x_ptr"):
            self.copy(view, (0, 1))

    def test_wrong_strides_are_caught(self, honest: None) -> None:
        x = torch.randn(6, 30)
        with pytest.raises(
            KernelFault, match=r"element offset \d0 of x_ptr, a view of size \(6, 10\)"
        ):
            self.copy(x[:, :10], (10, 1))
        gaps = with_gaps(x)
        with pytest.raises(KernelFault, match="out of bounds"):
            self.copy(gaps, (gaps.stride(0), 1))

    def test_message_names_kernel_program_and_line(self) -> None:
        x = torch.randn(1, 10)
        place = r"_copy_kernel: load .* \[program \(0, 0, 0\), test_testing.py:\d+\]"
        with honest_interpreter(), pytest.raises(KernelFault, match=place):
            self.copy(x, (10, 1), mask="none")

    def test_store_and_empty_view_are_caught(self, honest: None) -> None:
        x = torch.randn(2, 8)
        with pytest.raises(KernelFault, match=r"store out of bounds.* out_ptr"):
            _copy_kernel[(2,)](x, torch.empty(9), (8, 1), 2, 8, "right", 8, tl.float32)
        with pytest.raises(KernelFault, match=r"store out of bounds.* out_ptr"):
            _copy_kernel[(2,)](x, torch.empty(0), (8, 1), 2, 8, "right", 8, tl.float32)

    def test_tensors_in_tuples_have_names(self, honest: None) -> None:
        with pytest.raises(KernelFault, match=r"store out of bounds.* ptrs\[1\]"):
            _tuple_kernel[(1,)]((torch.randn(8), torch.empty(7)), 8)

    def test_atomics_are_checked(self, honest: None) -> None:
        with pytest.raises(KernelFault, match=r"atomic out of bounds.* out_ptr"):
            _count_kernel[(1,)](torch.zeros(7, dtype=torch.int32), 1, 8)


@triton.jit
def _tuple_kernel(ptrs, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(ptrs[1] + offs, tl.load(ptrs[0] + offs))


@triton.jit
def _count_kernel(out_ptr, value, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK), value)


@triton.jit
def _race_kernel(x_ptr, out_ptr, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    if WHAT == "both write":
        tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + offs))
    elif WHAT == "write and read":
        left = tl.load(x_ptr + tl.maximum(offs - 1, 0))
        tl.store(x_ptr + offs, left)
    elif WHAT == "atomically update and read":
        x = tl.load(x_ptr)
        tl.atomic_max(x_ptr, x + 1)
    elif WHAT == "write and atomically update":
        tl.store(out_ptr + offs, 0.0)
        tl.atomic_max(out_ptr + (offs + BLOCK) % (2 * BLOCK), 1.0)
    elif WHAT == "add floats in an order that varies":
        tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + offs), 0))
    elif WHAT == "loads from out_ptr what it stored itself":
        tl.store(out_ptr + offs, tl.load(x_ptr + offs))
        tl.store(out_ptr + offs, tl.load(out_ptr + pid * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)))
    elif WHAT == "one store puts different values in one element":
        tl.store(out_ptr + offs // 2, tl.load(x_ptr + offs))
    elif WHAT == "barrier":
        tl.store(out_ptr + offs, tl.load(x_ptr + offs))
        tl.debug_barrier()
        tl.store(out_ptr + offs, tl.load(out_ptr + pid * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)))
    elif WHAT == "in place":
        tl.store(x_ptr + offs, tl.load(x_ptr + offs) * 2)
    elif WHAT == "count":
        tl.atomic_add(out_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, BLOCK) % 2, 1)


@interpreted
class TestRaces:
    @pytest.mark.parametrize(
        "what",
        [
            "both write",
            "write and read",
            "atomically update and read",
            "write and atomically update",
            "add floats in an order that varies",
            "loads from out_ptr what it stored itself",
            "one store puts different values in one element",
        ],
    )
    def test_race_is_caught(self, what: str) -> None:
        x, out = torch.arange(16.0), torch.zeros(16)
        with honest_interpreter(), pytest.raises(KernelFault, match=rf"_race_kernel: .*{what}"):
            _race_kernel[(2,)](x, out, what, 8)
        with honest_interpreter(check_races=False):
            _race_kernel[(2,)](x, out, what, 8)

    @pytest.mark.parametrize("what", ["barrier", "in place", "count"])
    def test_clean_kernel_passes(self, what: str, honest: None) -> None:
        x, out = torch.arange(16.0), torch.zeros(16)
        _race_kernel[(2,)](x, out, what, 8)
        if what == "barrier":
            assert out.tolist() == [*range(7, -1, -1), *range(15, 7, -1)]
        elif what == "in place":
            assert torch.equal(x, torch.arange(16.0) * 2)
        else:
            assert out.view(torch.int32)[:3].tolist() == [8, 8, 0]

    def test_float_atomics_may_be_allowed(self) -> None:
        x, out = torch.arange(16.0), torch.zeros(16)
        with honest_interpreter(allow_float_atomics=True):
            _race_kernel[(2,)](x, out, "add floats in an order that varies", 8)
        assert out[0] == 120

    def test_aliases_of_one_storage_race(self, honest: None) -> None:
        x = torch.arange(24.0)
        with pytest.raises(KernelFault, match=r"write and read element .* of out_ptr / x_ptr"):
            _copy_kernel[(2,)](x[:16], x[4:20], (8, 1), 2, 8, "right", 8, tl.float32)


@triton.jit
def _last_writer_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@interpreted
def test_programs_run_in_shuffled_order() -> None:
    def last(seed: int | None) -> int:
        out = torch.zeros(1, dtype=torch.int32)
        with honest_interpreter(shuffle_seed=seed, check_races=False):
            _last_writer_kernel[(64,)](out)
        return int(out)

    assert last(None) == 63
    assert last(3) == last(3)
    assert len({last(seed) for seed in range(8)}) > 4


@triton.jit
def _grid_kernel(out_ptr):
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2)
    tl.store(out_ptr + at + tl.program_id(2), 1)


@interpreted
def test_every_program_runs_once_and_grids_have_limits(honest: None) -> None:
    out = torch.zeros(3, 4, 5, dtype=torch.int32)
    _grid_kernel[(3, 4, 5)](out)
    assert (out == 1).all()
    with pytest.raises(KernelFault, match="exceeds CUDA's"):
        _grid_kernel[(1, 65536)](out)


@interpreted
def test_chosen_programs_of_a_grid_too_large_to_walk() -> None:
    out = sparse((2**30,), None, torch.int32)
    seen = []

    def programs(kernel: str, grid: tuple[int, ...]) -> list[int]:
        seen.append((kernel, grid))
        return [grid[0] - 1, 5]

    with honest_interpreter(programs=programs):
        _number_kernel[(2**30,)](out)
        with pytest.raises(KernelFault, match=r"out of bounds.*program \(1073741823, 0, 0\)"):
            _number_kernel[(2**30,)](out[:100])
    assert seen == [("_number_kernel", (2**30, 1, 1))] * 2
    assert out[[0, 4, 5, 2**30 - 2, 2**30 - 1]].tolist() == [0, 0, 5, 0, 2**30 - 1]


@triton.jit
def _number_kernel(out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.program_id(0))


@triton.jit
def _integer_kernel(out_ptr, a, b, WHAT: tl.constexpr):
    if WHAT == "multiplication":
        c = a * b
    elif WHAT == "addition":
        c = a + b
    elif WHAT == "subtraction":
        c = -a - b
    elif WHAT == "cast":
        c = (a.to(tl.int64) * b).to(tl.int32)
    elif WHAT == "left shift":
        c = a << 2
    elif WHAT == "cumsum":
        c = tl.max(tl.cumsum(tl.zeros([4], tl.int32) + a, 0), 0)
    elif WHAT == "cumprod":
        c = tl.max(tl.cumprod(tl.zeros([4], tl.int32) + a, 0), 0)
    elif WHAT == "sum":
        c = tl.sum(tl.zeros([4], tl.int32) + a, 0)
    elif WHAT == "hash":
        c = (a.to(tl.uint32) * 2654435769).to(tl.int32, bitcast=True)
    else:
        c = a.to(tl.int64) * b
    tl.store(out_ptr, c)


@interpreted
class TestInt32:
    @pytest.mark.parametrize(
        "what",
        [
            *("multiplication", "addition", "subtraction", "cast"),
            *("left shift", "cumsum", "cumprod", "sum"),
        ],
    )
    def test_overflow_is_caught(self, what: str) -> None:
        out = torch.zeros(1, dtype=torch.int64)
        with honest_interpreter(), pytest.raises(KernelFault, match=f"int32 overflow: a {what}"):
            _integer_kernel[(1,)](out, 2**30 + 1, 2**30 + 1, what)
        with honest_interpreter(check_int32=False):
            _integer_kernel[(1,)](out, 2**30 + 1, 2**30 + 1, what)

    def test_wide_and_unsigned_arithmetic_pass(self, honest: None) -> None:
        out = torch.zeros(1, dtype=torch.int64)
        _integer_kernel[(1,)](out, 2**30 + 1, 2**30 + 1, "wide")
        assert int(out) == (2**30 + 1) ** 2
        _integer_kernel[(1,)](out, 12345, 0, "hash")
        assert int(out) % 2**32 == 12345 * 2654435769 % 2**32

    @pytest.mark.parametrize(
        ("what", "result"), [("left shift", 28), ("cumsum", 28), ("cumprod", 2401), ("sum", 28)]
    )
    def test_what_fits_passes(self, what: str, result: int, honest: None) -> None:
        out = torch.zeros(1, dtype=torch.int64)
        _integer_kernel[(1,)](out, 7, 0, what)
        assert int(out) == result

    def test_values_between_31_and_32_bits_stay_whole(self, honest: None) -> None:
        out = torch.zeros(1, dtype=torch.int64)
        _integer_kernel[(1,)](out, 2**31 + 1, 2**31 + 1, "multiplication")
        assert int(out) == (2**31 + 1) ** 2


@triton.jit
def _careless_kernel(x_ptr, out_ptr, length, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < length
    if WHAT == "no other":
        x = tl.load(x_ptr + offs, mask=mask)
        tl.store(out_ptr, tl.sum(x, 0))
    elif WHAT == "other":
        x = tl.load(x_ptr + offs, mask=mask, other=0)
        tl.store(out_ptr, tl.sum(x, 0))
    elif WHAT == "scalar mask":
        x = tl.load(x_ptr + offs, mask=mask & (tl.program_id(0) < length), other=0)
        tl.store(out_ptr, tl.sum(x, 0))
    elif WHAT == "and":
        tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0), mask=mask and offs > 2)
    elif WHAT == "small dot":
        x = tl.load(x_ptr + offs[:, None] * 0 + tl.arange(0, 8)[None, :])
        tl.store(out_ptr + offs, tl.sum(tl.dot(x, tl.trans(x)), 1))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_hold_nan(dtype: torch.dtype, honest: None) -> None:
    x, out = torch.ones(16, dtype=dtype), torch.zeros(1)
    _careless_kernel[(1,)](x, out, 10, "other", 16)
    assert out == 10
    _careless_kernel[(1,)](x, out, 16, "no other", 16)
    assert out == 16
    _careless_kernel[(1,)](x, out, 10, "no other", 16)
    assert out.isnan()


@interpreted
def test_a_scalar_comparison_masks_a_block(honest: None) -> None:
    out = torch.zeros(1)
    _careless_kernel[(1,)](torch.ones(16), out, 10, "scalar mask", 16)
    assert out == 10


@interpreted
def test_masked_integers_hold_a_large_value(honest: None) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _careless_kernel[(1,)](torch.ones(16, dtype=torch.int64), out, 15, "no other", 16)
    assert int(out) == 15 + 0x2AAAAAAAAAAAAAAA


@interpreted
def test_what_does_not_compile_is_caught(honest: None) -> None:
    x, out = torch.ones(16), torch.zeros(16)
    with pytest.raises(KernelFault, match="truth value of a block"):
        _careless_kernel[(1,)](x, out, 10, "and", 16)
    with pytest.raises(Exception, match="K >= 16"):
        _careless_kernel[(1,)](x, out, 16, "small dot", 16)


@interpreted
def test_interpreter_is_left_as_it_was() -> None:
    from triton.runtime import interpreter

    names = [*vars(interpreter.InterpreterBuilder), *vars(interpreter.interpreter_builder)]
    before = {name: getattr(interpreter.interpreter_builder, name) for name in names}
    places = (interpreter.GridExecutor, interpreter.ScanOps, interpreter.ReduceOps)
    classes = [dict(vars(owner)) for owner in places]
    with pytest.raises(KernelFault), honest_interpreter():
        _integer_kernel[(1,)](torch.zeros(1), 2**31 - 1, 2, "multiplication")
    after = {name: getattr(interpreter.interpreter_builder, name) for name in names}
    skip = {"grid_dim", "grid_idx"}
    assert {k: v for k, v in before.items() if k not in skip} == {
        k: v for k, v in after.items() if k not in skip
    }
    assert [dict(vars(owner)) for owner in places] == classes


# Offsets past 2**31 and the casts that make them possible


@triton.jit
def _wide_offset(index, stride):
    return index.to(tl.int64) * stride


@triton.jit
def _gather_kernel(x_ptr, out_ptr, x_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * x_stride + offs)
    tl.store(out_ptr + _wide_offset(row, out_stride) + offs, x)


@triton.jit
def _redundant_kernel(x_ptr, out_ptr, x_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + offs)
    tl.store(out_ptr + row * out_stride + offs, x)


class Owner:
    kernel = _gather_kernel


@pytest.fixture
def owner() -> Iterator[type[Owner]]:
    yield Owner
    Owner.kernel = _gather_kernel


@interpreted
class TestMutants:
    def gather(self, owner: type[Owner], x_stride: int, out_stride: int) -> None:
        x = sparse((3, 8), (x_stride, 1), torch.float32)
        out = sparse((3, 8), (out_stride, 1), torch.float32)
        x.copy_(torch.arange(24.0).reshape(3, 8))
        with honest_interpreter():
            owner.kernel[(3,)](x, out, x_stride, out_stride, 8)
        assert torch.equal(out, x)

    def test_casts_are_found(self) -> None:
        source = "def f(x):\n    a = x.to(tl.int64)\n    return wide(a) + tl.cast(x, tl.int64)\n"
        assert widening_casts(source) == [2, 3]
        assert widening_casts(source, ["wide"]) == [2, 3, 3]
        assert widening_casts("y = x.to(tl.int32)") == []

    def test_mutants_lack_one_cast_each(self) -> None:
        lines = [line for line, _ in mutants(_gather_kernel)]
        start = _gather_kernel.fn.__code__.co_firstlineno
        assert [line - start for line in lines] == [4, 5]

    def test_each_cast_is_needed(self, owner: type[Owner]) -> None:
        assert check_mutants(owner, "kernel", lambda: self.gather(owner, 2**30, 2**30)) == 2

    def test_wrong_addresses_alone_show_it(self, owner: type[Owner]) -> None:
        def check() -> None:
            x = sparse((3, 8), (2**30, 1), torch.float32)
            out = torch.zeros(3, 8)
            x.copy_(torch.arange(24.0).reshape(3, 8))
            with honest_interpreter(check_int32=False):
                owner.kernel[(3,)](x, out, 2**30, 8, 8)
            assert torch.equal(out, x)

        # Only the load is past 2**31 here.
        with pytest.raises(AssertionError, match="passes without the cast to int64 in line"):
            check_mutants(owner, "kernel", check)
        _, first = next(mutants(_gather_kernel))
        owner.kernel = first
        with pytest.raises(KernelFault, match="out of bounds"):
            check()

    def test_a_check_that_stays_small_is_seen(self, owner: type[Owner]) -> None:
        with pytest.raises(AssertionError, match="passes without the cast to int64 in line"):
            check_mutants(owner, "kernel", lambda: self.gather(owner, 2**30, 8))

    def test_a_redundant_cast_is_seen(self, owner: type[Owner]) -> None:
        owner.kernel = _redundant_kernel
        with pytest.raises(AssertionError, match="passes without the cast"):
            check_mutants(owner, "kernel", lambda: self.gather(owner, 2**30, 2**30))

    def test_a_kernel_without_casts_is_seen(self, owner: type[Owner]) -> None:
        owner.kernel = _tuple_kernel
        with pytest.raises(AssertionError, match="no cast to int64 found"):
            check_mutants(owner, "kernel", lambda: None)

    def test_every_shipped_kernel_has_them(self) -> None:
        tried = set()
        for file in Path(__file__).parent.glob("test_*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                parts = list(ast.walk(node)) if isinstance(node, ast.FunctionDef) else []
                if any(isinstance(n, ast.Name) and n.id == "check_mutants" for n in parts):
                    tried |= {n.value for n in parts if isinstance(n, ast.Constant)}
        shipped = set()
        for name in _aot.kernel_modules():
            shipped |= _aot._kernels_of(importlib.import_module(name))
        assert len(shipped) > 15 and shipped <= tried, shipped - tried


# The GPU run, dry


def test_what_nobody_wrote_is_seen_outside_what_is_compared() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    pairs = [(truth.float(), truth)]
    first = lambda outputs: [outputs[0][:4]]  # noqa: E731
    case = GpuCase("case", lambda config: [torch.ones(8)], [], lambda: pairs, first)
    case.check(case.run(None))
    with pytest.raises(AssertionError, match="case, output 0: 1 values are NaN"):
        case.check([torch.tensor([1.0] * 7 + [float("nan")])])
    with pytest.raises(AssertionError, match="case, output 0: max error"):
        case.check([torch.tensor([1.0, 2.0] * 4)])


def test_gpu_tests_need_no_more_than_a_gpu_machine_has() -> None:
    """That is torch, Triton, timm, pytest, matplotlib, tifffile, click, tqdm and safetensors."""
    root = Path(__file__).parents[1]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({OTHERS}))
import pytest
from pathlib import Path
sys.path.insert(0, {str(root / "scripts")!r})
import gpu_run
steps = gpu_run.plan(Path("tests"), Path("bench"), ["tests", "configs"])
files = sorted({{str(file) for _, file in steps}})
assert len(files) > 5
sys.exit(pytest.main([*{OPTIONS}, *files]))
"""
    # Plugins of what is missing, zarr's for one, would be missing too.
    variables = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=root, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["regions", "xl_attention", "hyper_attention", "selective_scan"]
    for name in [*names, *(["streaming_gpu"] if importlib.util.find_spec("timm") else [])]:
        assert f"test_{name}.py::" in done.stdout


OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--collect-only", "-m", "gpu"]
OTHERS = [
    *("zarr", "numcodecs", "imagecodecs", "rasterio", "openslide", "sklearn", "scipy"),
    *("segmentation_models_pytorch", "transformers", "pycocotools", "accelerate"),
]

GPU_CASES = textwrap.dedent(
    """
    import os
    import time
    import pytest
    import torch
    import triton
    import triton.language as tl
    from xt_kernels.testing import GpuCase

    @triton.jit
    def _double_kernel(x_ptr, out_ptr, scale, length, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < length
        tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0) * scale, mask=mask)

    launches = 0

    def gpu_cases(device, full):
        x = torch.arange(100.0, device=device)

        def run(fault):
            def launch(config):
                global launches
                launches += 1
                out = torch.empty_like(x)
                scale = 2.5 if fault == "wrong" and config == 64 else 2.0
                length = 90 if fault == "unwritten" and config == 64 else 100
                if fault == "crashes" and config == 64:
                    os._exit(139)
                if fault == "slow" and config == 64 and not os.path.exists(__file__ + ".seen"):
                    open(__file__ + ".seen", "w").close()
                    time.sleep(600)
                _double_kernel[(triton.cdiv(100, 32),)](x, out, scale, length, 32)
                if fault == "varies" and launches % 2:
                    out[0] = -0.0
                return [out]

            return launch

        def expected():
            return [(x * 2, x.double() * 2)]

        for fault in FAULTS:
            yield GpuCase(fault, run(fault), [32, 64], expected)

    @pytest.mark.gpu
    def test_needs_a_gpu():
        pytest.skip("none here")
    """
)


@interpreted
class TestGpuRun:
    def run(
        self, folder: Path, faults: list[str], *options: str
    ) -> tuple[int, str, dict[str, dict[str, Any]]]:
        (folder / "test_toy.py").write_text(f"FAULTS = {faults}\n{GPU_CASES}")
        script = Path(__file__).resolve().parents[1] / "scripts" / "gpu_run.py"
        command = [sys.executable, str(script), "--dry", "--tests", str(folder)]
        command += ["--bench", str(folder), "--out", str(folder / "out.json"), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        record = json.loads((folder / "out.json").read_text())
        items = {k: v for step in record["steps"].values() for k, v in step.items()}
        assert set(record["environment"]) >= {"gpu", "driver", "torch", "triton", "commit"}
        return done.returncode, done.stdout + done.stderr, items

    def test_faults_are_found_and_the_run_goes_on(self, tmp_path: Path) -> None:
        faults = ["crashes", "wrong", "unwritten", "varies", "good"]
        bench = "def test_speed(benchmark):\n    benchmark(sum, [1, 2])\n"
        (tmp_path / "bench_kernels.py").write_text(bench)
        status, text, items = self.run(tmp_path, faults)
        outcomes = {name: item["outcome"] for name, item in items.items()}
        assert status == 1, text
        if importlib.util.find_spec("pytest_benchmark"):
            assert items["bench_kernels.py::test_speed"]["numbers"]["median"] > 0
            assert " ms  bench_kernels.py::test_speed" in text
        else:
            assert "status 4" in items.pop("bench_kernels (benches)")["message"]
            outcomes.pop("bench_kernels (benches)")
        failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
        assert failed == {
            "test_toy:crashes:64",
            "test_toy:wrong:64",
            "test_toy:unwritten:64",
            "test_toy:varies",
        }, text
        assert "the process died (139)" in items["test_toy:crashes:64"]["message"]
        assert "max error" in items["test_toy:wrong:64"]["message"]
        assert "output 0: 10 values are NaN" in items["test_toy:unwritten:64"]["message"]
        assert "bytes differ" in items["test_toy:varies"]["message"]
        assert outcomes["test_toy:good:shipped"] == outcomes["test_toy:good"] == "passed"
        assert outcomes["test_toy.py::test_needs_a_gpu"] == "skipped"
        assert "FAILED test_toy:wrong:64" in text

    def test_a_cut_off_run_keeps_and_resumes(self, tmp_path: Path) -> None:
        for minutes in ("0.3", "1", "3"):  # a busy machine needs longer to get to the slow config
            budget = ("--only", "configs", "--minutes", minutes)
            status, text, items = self.run(tmp_path, ["slow"], *budget)
            if "test_toy:slow:64" in items:
                break
        assert status == 2 and "OUT OF TIME" in text
        assert items["test_toy:slow:32"]["outcome"] == "passed"
        assert items["test_toy:slow:64"]["outcome"] == "out of time"
        first = items["test_toy:slow:32"]
        status, text, items = self.run(tmp_path, ["slow"], "--only", "configs")
        assert status == 0 and "complete" in text
        assert items["test_toy:slow:32"] == first
        assert items["test_toy:slow:64"]["outcome"] == "passed"
