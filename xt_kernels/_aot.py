"""Ahead-of-time gate: every shipped kernel compiles for the GPUs we support, and stays lean.

    python -m xt_kernels._aot                  # compile all, print the resources, apply the rules
    python -m xt_kernels._aot --update-lock    # and accept the numbers for the installed Triton
    python -m xt_kernels._aot --all            # each config with each dtype: an hour of a core

No GPU is needed: `triton.compile` takes a target, and Triton's wheel carries ptxas and cuobjdump.
A module that holds kernels offers `aot_cases()`; each case is compiled aligned (pointers and
strides divisible by 16, unit strides known, as the launcher specialises them) and unaligned (none
of it), for sm_80, sm_90 and sm_100.

Hard rules: no stack and no local loads or stores (spills), registers and shared memory within the
GPU's limits, tensor-core instructions where `has_dots`, `cp.async` where `pipelined`. The lock file
of a Triton version holds registers, shared memory and instruction counts, so that a change of any
of them is seen, and accepted on purpose. Importing this module imports no Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
# Shared memory that one block may ask for, in bytes (CUDA programming guide: 163, 227 and 227 KiB).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
REGISTERS = 65_536  # 32-bit ones of a multiprocessor, hence of a block
_ROOT = Path(__file__).resolve().parent
LOCK_DIR = _ROOT.parent / "tests" / "aot_lock"
# Under `python -m` __name__ says __main__.
_MODULE = "xt_kernels._aot"
UPDATE_COMMAND = f"python -m {_MODULE} --update-lock"

Type = str | int | tuple["Type", ...]


@dataclass(frozen=True)
class AotCase:
    """One kernel with one config and one set of dtypes, as the launcher would compile it.

    Attributes:
      name: unique within its module, e.g. "extract-uint8-bf16-32x128".
      kernel: the jit function.
      signature: Triton type of each runtime argument: "*bf16", "i32", "i64", "fp32"; a tuple of
        them for a tuple of strides. An integer instead of a type is a value that the launcher makes
        constant, i.e. a unit stride 1; the unaligned variant passes it as "i32". None values belong
        into `constexprs`.
      constexprs: value of each constexpr argument.
      num_warps, num_stages: of the config.
      has_dots: the kernel must use tensor cores. False for fp32 dots in "ieee" precision, which use
        none.
      pipelined: the aligned variant must load through `cp.async`.
      aligned_args: scalar integers (sizes, say) that are divisible by 16 in the aligned variant.
        Pointers, tuples and names with "stride" are so without being listed.
      variants, archs: fewer where the launcher takes another config for the rest.
      maxnreg: registers that the launcher allows a thread, None for what the compiler likes best.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Type]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    has_dots: bool = False
    pipelined: bool = False
    aligned_args: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("aligned", "unaligned")
    archs: tuple[int, ...] = ARCHS
    maxnreg: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What the compiler made of one case for one GPU; stack and shared are in bytes, registers of
    one thread."""

    key: str
    arch: int
    aligned: bool
    has_dots: bool
    pipelined: bool
    threads: int = 32
    error: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0
    instructions: int = 0
    tensor_cores: str = ""
    cp_async: int = 0

    @property
    def locked(self) -> dict[str, int | str]:
        """The part that the lock file holds."""
        return {
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "instructions": self.instructions,
            "tensor_cores": self.tensor_cores,
            "cp_async": self.cp_async,
        }

    def faults(self) -> list[str]:
        """The hard rules that this kernel breaks."""
        if self.error:
            return [f"{self.key}: {self.error}"]
        limit = SHARED_LIMIT[self.arch]
        held = self.registers * self.threads
        rules = [
            (held <= REGISTERS, f"needs {held} of {REGISTERS} registers a block"),
            (self.stack == 0, f"uses {self.stack} B of stack (registers spill)"),
            (self.local == 0, f"has {self.local} local loads and stores (registers spill)"),
            (self.shared <= limit, f"needs {self.shared} of {limit} B of shared memory"),
            (
                bool(self.tensor_cores) or not self.has_dots,
                "has dots but uses no tensor cores",
            ),
            (
                self.cp_async > 0 or not (self.pipelined and self.aligned),
                "is meant to be pipelined but has no cp.async",
            ),
        ]
        return [f"{self.key}: {text}" for good, text in rules if not good]


def lock_faults(
    measured: Sequence[Measurement], lock: Mapping[str, Any], keys: Iterable[str] | None = None
) -> list[str]:
    """Differences between the measured resources and the lock file's.

    keys: all that there are, where `measured` is a part of them.
    """
    faults = []
    for m in measured:
        old = lock.get(m.key)
        if old is None:
            faults.append(f"{m.key}: not in the lock file")
            continue
        changed = [f"{k} {old.get(k)} -> {v}" for k, v in m.locked.items() if old.get(k) != v]
        if changed:
            faults.append(f"{m.key}: {', '.join(changed)}")
    known = {m.key for m in measured} if keys is None else set(keys)
    faults += [f"{key}: in the lock file, but no such kernel" for key in lock if key not in known]
    return faults


def lock_path(triton_version: str, folder: Path = LOCK_DIR) -> Path:
    """Where the lock of a Triton version lies."""
    return folder / f"triton-{triton_version}.json"


def write_lock(path: Path, measured: Sequence[Measurement]) -> None:
    """Accept the measured resources."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(measured, key=lambda m: m.key)
    # One line a kernel, so that a diff shows which kernel changed.
    lines = [f" {json.dumps(m.key)}: {json.dumps(m.locked)}" for m in ordered]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def kernel_modules() -> list[str]:
    """Modules of xt_kernels that mention `triton.jit`, helpers without kernels included."""
    names = []
    for info in pkgutil.walk_packages([str(_ROOT)], "xt_kernels."):
        path = _ROOT.joinpath(*info.name.split(".")[1:])
        source = path / "__init__.py" if info.ispkg else path.with_suffix(".py")
        if info.name not in (_MODULE, "xt_kernels.testing") and "@triton.jit" in source.read_text():
            names.append(info.name)
    return sorted(names)


def measure(
    modules: Sequence[str],
    archs: Sequence[int] = ARCHS,
    jobs: int = 1,
    path: Sequence[str] = (),
    only: int | None = None,
    everything: bool = False,
) -> list[Measurement]:
    """Compile the cases of the modules in child processes and read their resources.

    Args:
      modules: names of modules with kernels; one whose `*_kernel` functions have no case gives a
        fault.
      archs: compute capabilities times ten.
      jobs: child processes, each on every jobs-th case.
      path: folders to put in front of the children's import path.
      only: run this one of the jobs, from 0, and leave the others to other calls.
      everything: all dtypes and head dims of all configs, not one of each.

    Raises:
      RuntimeError: if a child fails other than by a kernel that does not compile.
    """
    measured: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="xt-aot-") as folder:
        children = []
        for part in range(jobs) if only is None else [only]:
            # Kernels defined while interpreting cannot be compiled, and a warm cache hides what the
            # compiler does today.
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment["TRITON_CACHE_DIR"] = f"{folder}/cache{part}"
            environment["PYTHONPATH"] = os.pathsep.join(
                [*path, str(_ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
            out = f"{folder}/{part}.json"
            command = [sys.executable, "-m", _MODULE, "--child", out, str(part), str(jobs)]
            command += [",".join(map(str, archs)), "all" * everything, *modules]
            child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
            children.append((out, child))
        for out, child in children:
            _, err = child.communicate()
            if child.returncode:
                text = err.decode()[-4000:]
                raise RuntimeError(f"aot child failed ({child.returncode}):\n{text}")
            measured += [Measurement(**row) for row in json.loads(Path(out).read_text())]
    return sorted(measured, key=lambda m: m.key)


def keys(modules: Sequence[str], archs: Sequence[int] = ARCHS) -> list[str]:
    """The keys of all that `measure` compiles; nothing is compiled."""
    return [
        _key(name, case, arch, variant)
        for name in modules
        for case in _cases(importlib.import_module(name))
        for variant, arch in _variants(case, archs)
    ]


def _cases(module: Any, everything: bool = False) -> list[AotCase]:
    if not hasattr(module, "aot_cases"):
        return []
    return list(module.aot_cases(everything=True) if everything else module.aot_cases())


def _variants(case: AotCase, archs: Sequence[int]) -> list[tuple[str, int]]:
    return [(variant, a) for variant in case.variants for a in archs if a in case.archs]


def _key(module: str, case: AotCase, arch: int, variant: str) -> str:
    return f"{module.removeprefix('xt_kernels.')}:{case.name}|sm_{arch}|{variant}"


def _child(
    out: str, part: int, jobs: int, archs: Sequence[int], everything: bool, modules: Sequence[str]
) -> None:
    rows = []
    number = 0
    for name in modules:
        module = importlib.import_module(name)
        cases = _cases(module, everything)
        for case in cases:
            for variant, arch in _variants(case, archs):
                number += 1
                if number % jobs == part:
                    rows.append(_measured(name, case, arch, variant))
        covered = {_bare(case.kernel).fn.__name__ for case in cases}
        if part == 0:
            missing = _kernels_of(module) - covered
            faults = dict.fromkeys(missing, "aot_cases() has no case for it")
            names = [case.name for case in cases]
            faults |= {k: "aot_cases() has two of this name" for k in names if names.count(k) > 1}
            for k, error in sorted(faults.items()):
                rows.append(_row(f"{name}:{k}", archs[0], True, None, error=error))
    Path(out).write_text(json.dumps(rows))


def _kernels_of(module: Any) -> set[str]:
    """Names of the kernels (not helpers) defined in a module."""
    names = set()
    for name, value in vars(module).items():
        if name.endswith("_kernel") and hasattr(value, "fn"):
            if _bare(value).fn.__module__ == module.__name__:
                names.add(name)
    return names


def _bare(jit_fn: Any) -> Any:
    while not inspect.isfunction(jit_fn.fn):
        jit_fn = jit_fn.fn
    return jit_fn


def _row(key: str, arch: int, aligned: bool, case: AotCase | None, **found: Any) -> dict[str, Any]:
    dots, pipelined = (case.has_dots, case.pipelined) if case else (False, False)
    return {
        "key": key,
        "arch": arch,
        "aligned": aligned,
        "has_dots": dots,
        "pipelined": pipelined,
        "threads": 32 * case.num_warps if case else 32,
        **found,
    }


def _measured(module: str, case: AotCase, arch: int, variant: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    key, aligned = _key(module, case, arch, variant), variant == "aligned"
    kernel = _bare(case.kernel)
    try:
        signature, constexprs, attrs = _specialised(kernel, case, aligned)
        options = {
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "maxnreg": case.maxnreg,
        }
        parts = (kernel.cache_key, signature, constexprs, attrs, arch, options)
        how = [inspect.getsource(function) for function in (_measured, _resources)]
        known = _Known(*parts, triton.__version__, *how)
        if known.resources is not None:
            return _row(key, arch, aligned, case, **known.resources)
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs, attrs),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
        resources = {"shared": compiled.metadata.shared, **_resources(compiled)}
        known.keep(resources)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _row(key, arch, aligned, case, error=f"does not compile: {text[:500]}")
    return _row(key, arch, aligned, case, **resources)


class _Known:
    """Resources measured earlier, under a hash of all that they depend on (half a second each)."""

    def __init__(self, *parts: object) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(repr(parts).encode()).hexdigest()
        self.path = base / "xt-kernels" / "aot" / f"{name}.json"
        self.resources: dict[str, Any] | None = None
        with contextlib.suppress(OSError, ValueError):
            self.resources = json.loads(self.path.read_text())

    def keep(self, resources: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(resources))
            os.replace(temporary, self.path)


def _specialised(
    kernel: Any, case: AotCase, aligned: bool
) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes in the form that Triton's launcher gives them."""
    names = list(kernel.arg_names)
    unknown = (set(case.signature) | set(case.constexprs)) - set(names)
    missing = set(names) - set(case.signature) - set(case.constexprs)
    if unknown or missing:
        raise ValueError(f"arguments unknown: {sorted(unknown)}, missing: {sorted(missing)}")
    constexprs: dict[Any, Any] = {(names.index(name),): v for name, v in case.constexprs.items()}
    attrs: dict[Any, Any] = {}

    def visit(kind: Type, place: tuple[int, ...], may_align: bool) -> Any:
        if isinstance(kind, tuple):
            return tuple(visit(item, (*place, i), True) for i, item in enumerate(kind))
        if isinstance(kind, int):
            if not aligned:
                return "i32"
            constexprs[place] = kind
            return "constexpr"
        if aligned and (kind.startswith("*") or (may_align and kind.lstrip("iu").isdigit())):
            attrs[place] = [["tt.divisibility", 16]]
        return kind

    signature = {}
    for i, name in enumerate(names):
        if name in case.constexprs:
            signature[name] = "constexpr"
        else:
            may_align = "stride" in name or name in case.aligned_args
            signature[name] = visit(case.signature[name], (i,), may_align)
    return signature, constexprs, attrs


# The instruction forms that feed tensor cores, per generation; the lock file notes which one a
# kernel got.
_TENSOR_CORES = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


def _resources(compiled: Any) -> dict[str, Any]:
    """Registers, stack, spills and instruction counts from the machine code and the PTX."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _run(tools / "nvdisasm", "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", assembly, re.MULTILINE
    )
    # Trailing NOPs pad the code to a fetch boundary.
    real = [opcode for opcode in opcodes if opcode != "NOP"]
    ptx = compiled.asm["ptx"]
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": sum(opcode.startswith(("STL", "LDL")) for opcode in real),
        "instructions": len(real),
        "tensor_cores": next((name for name in _TENSOR_CORES if name in ptx), ""),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _table(measured: Iterable[Measurement]) -> Iterator[str]:
    yield f"{'registers':>9} {'stack':>6} {'shared':>7} {'instr':>6}  kernel"
    for m in measured:
        numbers = f"{m.registers:9} {m.stack:6} {m.shared:7} {m.instructions:6}"
        copies = f"cp.async x{m.cp_async}" if m.cp_async else ""
        yield f"{numbers}  {m.key}  {m.tensor_cores} {copies}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, judge; returns the exit status."""
    import triton

    parser = argparse.ArgumentParser(prog="python -m xt_kernels._aot", description=__doc__)
    parser.add_argument("modules", nargs="*", help="default: all of xt_kernels")
    parser.add_argument("--update-lock", action="store_true", help="accept the numbers")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every dtype, head dim and kind of level of every config, by the hard rules alone",
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lock-dir", type=Path, default=LOCK_DIR)
    options = parser.parse_args(arguments)
    if options.update_lock and (options.modules or options.all):
        parser.error("--update-lock writes what CI compiles, of all modules: no --all, no names")
    names = options.modules or kernel_modules()
    measured = measure(names, jobs=options.jobs, everything=options.all)
    print("\n".join(_table(measured)))
    faults = [fault for m in measured for fault in m.faults()]
    path = lock_path(triton.__version__, options.lock_dir)
    if options.update_lock and not faults:
        write_lock(path, measured)
        print(f"wrote {path}")
    elif path.exists() and not options.modules and not options.all:
        faults += lock_faults(measured, json.loads(path.read_text()))
    elif not options.all:
        print(f"no lock for Triton {triton.__version__}: only the hard rules were applied")
    print("\n".join(faults) or f"{len(measured)} kernels: no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(
            sys.argv[2],
            int(sys.argv[3]),
            int(sys.argv[4]),
            json.loads(f"[{sys.argv[5]}]"),
            sys.argv[6] == "all",
            sys.argv[7:],
        )
    else:
        sys.exit(main())
