"""What is installed and what the machine has, for `xt doctor`."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .host import available_memory, cpu_name, num_cpus

_REQUIRED = (
    "xt-kernels", "torch", "triton", "timm", "numpy", "tifffile", "imagecodecs", "zarr", "pillow",
    "safetensors", "huggingface_hub",
)  # fmt: skip

_OPTIONAL = {
    "rasterio": ("geo", "reads JPEG 2000, VRT and other formats of GDAL"),
    "openslide-python": ("wsi", "reads whole-slide formats (SVS, NDPI, MRXS, ...)"),
    "segmentation-models-pytorch": ("seg", "decoders of the heads segmentation and xview3"),
    "transformers": ("det", "the head detr"),
    "pycocotools": ("det", "COCO's measures of boxes"),
    "scikit-learn": ("train", "holds the digits of xt train cue-digits and megapixel-digits"),
    "mamba-ssm": ("mamba", "its CUDA scan, as baseline and where asked for"),
    "causal-conv1d": ("mamba", "a faster convolution for Mamba on CUDA"),
    "pytest-benchmark": ("bench", "runs the benchmarks in bench/"),
    "matplotlib": ("train", "draws the curves of xt train and the plots of the benchmark reports"),
}

_COMPILED = {
    "mamba-ssm": "mamba_ssm.ops.selective_scan_interface",
    "causal-conv1d": "causal_conv1d",
}
"""Package -> the module of it that we use, of those that are built for one torch and CUDA."""


def report() -> str:
    """Versions, devices, optional parts and what each missing one is for, as lines of text.

    The packages of `_COMPILED` are imported: a build for another torch is there and does not work.
    """
    import torch

    from .registry import list_models

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in _REQUIRED:
        found = _version(name)
        lines.append(f"  {name:<17} {found or 'MISSING: run pip install xt-kernels again'}")
    lines.append("optional parts")
    for name, (extra, purpose) in _OPTIONAL.items():
        found = _version(name)
        lines.append(
            f"  {name:<17} "
            + (found or f"not installed: {purpose}; pip install 'xt-kernels[{extra}]'")
            + (_trouble(_COMPILED[name]) if found and name in _COMPILED else "")
        )
    lines.append("devices")
    gib = available_memory() / 2**30
    lines.append(f"  cpu               {num_cpus()} cores, {cpu_name()}, {gib:.1f} GiB free")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"  cuda:{i}            {properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
    if not torch.cuda.is_available():
        lines.append("  cuda              none found; everything runs on the CPU")
    lines.append("models")
    lines += [f"  {name}" for name in list_models()]
    return "\n".join(lines)


def _trouble(module: str) -> str:
    """What to say behind the version: nothing, or why the module does not import."""
    try:
        import_module(module)
    except Exception as error:
        reason = " ".join(str(error).split())
        return f", but does not import and is not used: {type(error).__name__}: {reason}"
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
