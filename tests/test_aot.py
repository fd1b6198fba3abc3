"""Every shipped kernel compiles and stays lean; and the gate itself sees planted faults."""

import importlib
import json
import os
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from xt_kernels import _aot  # noqa: E402  (after the skip)

# Compiled in child processes: here kernels are interpreted and cannot be compiled.
TOYS = textwrap.dedent(
    """
    import triton
    import triton.language as tl
    from xt_kernels._aot import AotCase

    @triton.jit
    def _copy_kernel(x_ptr, y_ptr, strides, length, BLOCK: tl.constexpr):
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < length
        x = tl.load(x_ptr + offs * strides[0], mask=mask)
        tl.store(y_ptr + offs * strides[1], x, mask=mask)

    @triton.jit
    def _matmul_kernel(
        a_ptr, b_ptr, c_ptr, depth, stride,
        M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    ):
        offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
        a_ptrs = a_ptr + offs_m[:, None] * stride + offs_k[None, :]
        b_ptrs = b_ptr + offs_k[:, None] * N + offs_n[None, :]
        acc = tl.zeros([M, N], tl.float32)
        for _ in range(0, depth, K):
            acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc, input_precision=PRECISION)
            a_ptrs += K
            b_ptrs += K * N
        tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], acc)

    @triton.jit
    def _branch_kernel(x_ptr, n):
        if n > 0:
            only_here = tl.load(x_ptr)
        tl.store(x_ptr, only_here)

    @triton.jit
    def _forgotten_kernel(x_ptr):
        tl.store(x_ptr, 0.0)

    def _matmul(name, m, n, k, warps, stages, dtype="*bf16", precision="tf32"):
        types = {"a_ptr": dtype, "b_ptr": dtype, "c_ptr": "*fp32", "depth": "i32", "stride": "i32"}
        sizes = {"M": m, "N": n, "K": k, "PRECISION": precision}
        return AotCase(name, _matmul_kernel, types, sizes, warps, stages, True, True)

    def aot_cases():
        copy = {"x_ptr": "*bf16", "y_ptr": "*bf16", "strides": (1, 1), "length": "i32"}
        sizes = ("length",)
        yield AotCase("copy", _copy_kernel, copy, {"BLOCK": 1024}, 4, 1, aligned_args=sizes)
        yield _matmul("matmul", 64, 64, 64, 4, 3)
        yield _matmul("spills", 256, 256, 32, 2, 2)
        yield _matmul("too-much-shared", 128, 256, 128, 8, 4)
        yield _matmul("not-pipelined", 64, 64, 64, 4, 1)
        yield _matmul("no-tensor-cores", 16, 16, 16, 4, 3, "*fp32", "ieee")
        for _ in range(2):
            yield AotCase("twice", _copy_kernel, copy, {"BLOCK": 128}, 4, 1)
        yield AotCase("branch", _branch_kernel, {"x_ptr": "*fp32", "n": "i32"}, {}, 4, 1)
        yield AotCase("misnamed", _branch_kernel, {"x": "*fp32", "n": "i32"}, {}, 4, 1)
    """
)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, _aot.Measurement]:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy_kernels.py").write_text(TOYS)
    measured = _aot.measure(["toy_kernels"], archs=(90,), path=[str(folder)])
    return {m.key: m for m in measured}


def test_good_kernels_pass(toys: dict[str, _aot.Measurement]) -> None:
    for name in ("copy", "matmul"):
        for variant in ("aligned", "unaligned"):
            assert toys[f"toy_kernels:{name}|sm_90|{variant}"].faults() == []


def test_alignment_reaches_the_compiler(toys: dict[str, _aot.Measurement]) -> None:
    aligned = toys["toy_kernels:copy|sm_90|aligned"]
    unaligned = toys["toy_kernels:copy|sm_90|unaligned"]
    # Eight bf16 a load against one: the unaligned kernel is much longer.
    assert unaligned.instructions > 1.5 * aligned.instructions


def test_tensor_cores_and_copies_are_seen(toys: dict[str, _aot.Measurement]) -> None:
    good = toys["toy_kernels:matmul|sm_90|aligned"]
    assert good.tensor_cores == "wgmma.mma_async"
    assert good.cp_async > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spills", "B of stack"),
        ("too-much-shared", "of 232448 B of shared memory"),
        ("not-pipelined", "no cp.async"),
        ("no-tensor-cores", "uses no tensor cores"),
        ("branch", "does not compile"),
        ("misnamed", "arguments unknown: ['x'], missing: ['x_ptr']"),
    ],
)
def test_planted_fault_is_rejected(
    toys: dict[str, _aot.Measurement], name: str, message: str
) -> None:
    faults = toys[f"toy_kernels:{name}|sm_90|aligned"].faults()
    assert any(message in fault for fault in faults), faults


def test_more_registers_than_a_block_can_have_are_rejected(
    toys: dict[str, _aot.Measurement],
) -> None:
    good = toys["toy_kernels:matmul|sm_90|aligned"]
    assert good.threads == 128 and not good.faults()
    assert "needs 65792 of 65536 registers" in replace(good, registers=514).faults()[0]


def test_local_loads_are_rejected(toys: dict[str, _aot.Measurement]) -> None:
    assert toys["toy_kernels:spills|sm_90|aligned"].local > 0
    good = toys["toy_kernels:matmul|sm_90|aligned"]
    assert "local loads and stores" in replace(good, local=4).faults()[0]


def test_kernel_without_a_case_is_rejected(toys: dict[str, _aot.Measurement]) -> None:
    assert "no case for it" in toys["toy_kernels:_forgotten_kernel"].faults()[0]


def test_a_name_used_twice_is_rejected(toys: dict[str, _aot.Measurement]) -> None:
    assert "two of this name" in toys["toy_kernels:twice"].faults()[0]


def test_lock_holds_the_numbers(toys: dict[str, _aot.Measurement], tmp_path: Path) -> None:
    good = toys["toy_kernels:matmul|sm_90|aligned"]
    path = _aot.lock_path("9.9.9", tmp_path)
    _aot.write_lock(path, [good])
    lock = json.loads(path.read_text())
    assert _aot.lock_faults([good], lock) == []
    for name in ("registers", "shared", "instructions", "cp_async"):
        changed = replace(good, **{name: getattr(good, name) + 1})
        assert name in _aot.lock_faults([changed], lock)[0]
    assert "not in the lock file" in _aot.lock_faults([replace(good, key="new")], lock)[0]
    assert "no such kernel" in _aot.lock_faults([], lock)[0]
    assert _aot.lock_faults([], lock, keys=lock) == []


@pytest.mark.parametrize("name", _aot.kernel_modules())
def test_all_cases_are_every_config_with_every_dtype(name: str) -> None:
    module = importlib.import_module(name)
    some, everything = _aot._cases(module), _aot._cases(module, True)

    def keys(cases: list[_aot.AotCase]) -> list[str]:
        return [
            _aot._key(name, case, arch, variant)
            for case in cases
            for variant, arch in _aot._variants(case, _aot.ARCHS)
        ]

    def kinds(cases: list[_aot.AotCase]) -> set[Any]:
        sizes = ("BLOCK_M", "BLOCK_N", "BLOCK_S", "BLOCK_L", "BLOCK_H", "BLOCK_D", "LOG_T", "ROWS")
        return {
            (_aot._bare(case.kernel), case.num_warps, *map(case.constexprs.get, sizes))
            for case in cases
        }

    found = keys(everything)
    assert len(found) == len(set(found))
    assert kinds(some) <= kinds(everything)
    for kernel in {kernel for kernel, *_ in kinds(some)}:
        types = {
            kind
            for case in everything
            if _aot._bare(case.kernel) is kernel
            for kind in case.signature.values()
        }
        assert {"*bf16", "*fp16", "*fp32"} <= types or not {"*bf16", "*fp16"} & types, kernel


def test_a_part_of_the_cases_can_be_measured(
    toys: dict[str, _aot.Measurement], tmp_path: Path
) -> None:
    (tmp_path / "toy_kernels.py").write_text(TOYS)
    first, second = (
        {m.key for m in measured}
        for measured in (
            _aot.measure(["toy_kernels"], archs=(90,), jobs=2, path=[str(tmp_path)], only=part)
            for part in range(2)
        )
    )
    assert first | second == set(toys) and first and second
    assert all("twice" in key for key in first & second)


def test_the_lock_is_written_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, on a module with one good kernel, which then gets a bad one."""
    module = tmp_path / "toy_kernels.py"
    kernel = TOYS[: TOYS.index("@triton.jit\ndef _matmul_kernel")]
    cases = TOYS[TOYS.index("def aot_cases") :]
    good = kernel + cases[: cases.index("    yield _matmul")]
    module.write_text(good)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_aot, "kernel_modules", lambda: ["toy_kernels"])
    locks = ["--lock-dir", str(tmp_path / "locks")]
    path = _aot.lock_path(triton.__version__, tmp_path / "locks")

    assert _aot.main(locks) == 0 and not path.exists()
    assert f"no lock for Triton {triton.__version__}" in capsys.readouterr().out
    assert _aot.main(["--update-lock", *locks]) == 0
    text = path.read_text()
    lock = json.loads(text)
    assert len(lock) == 6 and all(row["registers"] > 0 for row in lock.values())
    assert _aot.main(locks) == 0

    key = "toy_kernels:copy|sm_90|aligned"
    row = lock[key]["registers"]
    path.write_text(json.dumps({**lock, key: {**lock[key], "registers": row + 1}}))
    assert _aot.main(locks) == 1
    assert f"{key}: registers {row + 1} -> {row}" in capsys.readouterr().out
    assert _aot.main(["--update-lock", *locks]) == 0 and path.read_text() == text

    bad = {"x_ptr": "*bf16"}
    module.write_text(good + f"    yield AotCase('bad', _copy_kernel, {bad}, {{}}, 4, 1)\n")
    assert _aot.main(["--update-lock", *locks]) == 1 and path.read_text() == text
    with pytest.raises(SystemExit):
        _aot.main(["--update-lock", "toy_kernels", *locks])
    assert "--update-lock writes what CI compiles, of all modules" in capsys.readouterr().err


PARTS = 10  # each in a test of its own, so that workers share them
# All of them takes ten minutes of a core: XT_AOT_ARCHS=90 is for a second look with another Triton.
CHOSEN = tuple(int(a) for a in os.environ.get("XT_AOT_ARCHS", "80,90,100").split(","))


def locked() -> dict[str, Any]:
    path = _aot.lock_path(triton.__version__)
    lock = json.loads(path.read_text()) if path.exists() else {}
    return {key: row for key, row in lock.items() if any(f"|sm_{a}|" in key for a in CHOSEN)}


@pytest.mark.parametrize("part", range(PARTS))
def test_shipped_kernels_keep_the_rules_and_the_lock(part: int) -> None:
    measured = _aot.measure(_aot.kernel_modules(), archs=CHOSEN, jobs=PARTS, only=part)
    faults = [fault for m in measured for fault in m.faults()]
    if lock := locked():
        faults += _aot.lock_faults(measured, lock, keys=lock)
    assert measured
    assert not faults, "\n".join([*faults, f"If this is meant: {_aot.UPDATE_COMMAND}"])


def test_the_lock_names_all_shipped_kernels() -> None:
    lock = locked()
    if not lock:
        pytest.skip(
            f"no lock for Triton {triton.__version__}, only the hard rules apply; "
            f"`{_aot.UPDATE_COMMAND}` writes one"
        )
    assert sorted(_aot.keys(_aot.kernel_modules(), CHOSEN)) == sorted(lock)
