"""The command line, `xt`. Only click is imported at the top: `xt --help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from .model import XT
    from .planning import Plan
    from .source import ImageSource
    from .streaming import StreamStats


class _Group(click.Group):
    """Turns any failure into one sentence and an exit code; XT_TRACEBACK=1 shows the rest."""

    def invoke(self, ctx: click.Context) -> Any:
        from .host import keep_memory_flat

        signal.signal(signal.SIGTERM, _on_sigterm)
        keep_memory_flat()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("\nInterrupted: nothing was written.", err=True)
            ctx.exit(130)
        except Exception as error:
            if os.environ.get("XT_TRACEBACK"):
                raise
            raise click.ClickException(_sentence(error)) from None


def _on_sigterm(*_: object) -> NoReturn:
    raise SystemExit(143)  # unwinds through every cleanup, unlike the default


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Out of memory: choose a smaller --batch-size or --chunk-regions (see `xt plan`)."
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    known = isinstance(error, ValueError | OSError)
    text = str(error).strip().splitlines()
    line = text[0] if text else "no message"
    return line if known else f"{type(error).__name__}: {line} (XT_TRACEBACK=1 shows where)"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xt-kernels", prog_name="xt")
def main() -> None:
    """Vision models on very large images, end to end, in near-constant memory."""


def _numbers(kind: type, low: float | None = None) -> Callable[..., Any]:
    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            numbers = tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"expected numbers like 1,2,3, got {value!r}.") from None
        if low is not None and min(numbers) < low:
            raise click.BadParameter(f"expected numbers of at least {low}, got {value!r}.")
        return numbers

    return convert


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--encoder", default="swinv2_tiny", show_default=True,
                         help="Region encoder: short name (see xt doctor) or timm model."),
            click.option("--context", default="xl", show_default=True,
                         type=click.Choice(["xl", "hyper", "vit", "none"]),
                         help="Context encoder."),
            click.option("--model", "model_dir", type=click.Path(path_type=Path),
                         help="Folder of a saved model; replaces the options that define one."),
            click.option("--pretrained", is_flag=True, 
                         help="timm's weights for the region encoder."),
            click.option("--region", type=click.IntRange(1), help="Side of the regions, pixels."),
            click.option("--chunk-regions", type=click.IntRange(0),
                         help="Regions a chunk of the context encoder; 0 is the whole image."),
            click.option("--memory-chunks", type=click.IntRange(1),
                         help="Chunks that XL remembers."),
            click.option("--tiling", type=click.Choice(["row", "zigzag", "two-stream"]),
                         help="Order of the chunks."),
            click.option("--mean", callback=_numbers(float), help="One number a band: .5,.4,.4"),
            click.option("--std", callback=_numbers(float), help="One number a band."),
            click.option("--seed", type=int, default=0, show_default=True,
                         help="Of random weights."),
            click.option("--device", default="auto", show_default=True,
                         help="auto, cpu, cuda, cuda:1"),
            click.option("--bands", callback=_numbers(int, 1),
                         help="Bands to use, numbered from 1, e.g. 4,3,2."),
            click.option("--fill", type=float, help="Value for NaN and infinite pixels."),
            click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True,
                         help="Regions encoded at once."),
            click.option("--readers", type=click.IntRange(1), default=2, show_default=True,
                         help="Threads that read ahead."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


_image = click.argument("image", metavar="FILE", type=click.Path(path_type=Path))


@main.command()
@_image
def info(image: Path) -> None:
    """Size, bands, type, levels and georeference of an image FILE."""
    from .source import open_image

    with open_image(image) as source:
        rows: list[tuple[str, Any]] = [
            ("file", source.name),
            ("size", f"{source.height:,} x {source.width:,} px (height x width)"),
            ("bands", f"{source.bands} x {source.dtype}"),
            (
                "in memory",
                _bytes(source.height * source.width * source.bands * source.dtype.itemsize),
            ),
            ("levels", ", ".join(f"{h:,} x {w:,}" for h, w in source.level_sizes)),
            ("block", f"{source.block[0]:,} x {source.block[1]:,} px"),
            *source.metadata.items(),
        ]
        _table(rows)


@main.command("plan")
@_image
@click.option(
    "-o", "--out", default=".", type=click.Path(path_type=Path), help="Where results would go."
)
@_model_options
def plan_(image: Path, out: Path, **options: Any) -> None:
    """What embedding FILE would take: regions, tokens, memory, time, and whether it fits."""
    with _opened(image) as source:
        model = _model(source, options)
        plan = _plan(model, source, out, options)
        _table(_plan_rows(plan))
        if not plan.fits:
            raise click.ClickException("It does not fit on this machine as planned.")


@main.command()
@_image
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--preview/--no-preview", default=True, show_default=True, help="Make preview.png.")
@_model_options
def embed(image: Path, out: Path, preview: bool, **options: Any) -> None:
    """Token map, embedding and preview of an image FILE of any size."""
    from .output import check_output

    check_output(out)
    with _opened(image) as source:
        model = _model(source, options)
        result = _run(model, source, out, options, preview=preview)
        _table(_stats_rows(result.stats))
        click.echo(f"wrote {out}/: tokens.zarr, embedding.json" + ", preview.png" * preview)


@main.command()
@_image
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="JSON file; default is the screen."
)
@click.option("--num-classes", type=click.IntRange(1), default=10, show_default=True,
              help="Classes of a new head (a saved model has its own).")  # fmt: skip
@_model_options
def predict(image: Path, out: Path | None, num_classes: int, **options: Any) -> None:
    """Class scores of an image FILE of any size."""
    import json

    from .output import check_output, class_scores

    if out is not None:
        check_output(out)
    with _opened(image) as source:
        model = _model(source, options, num_classes=num_classes)
        if model.head is None:
            raise click.ClickException(
                f"The model in {options['model_dir']} has no head (num_classes 0)."
            )
        result = _run(model, source, None, options)
        assert result.logits is not None
        record = {"image": source.name, "embedding": result.embedding.tolist()}
        text = json.dumps(record | class_scores(result.logits), indent=1)
        if out is None:
            click.echo(text)
            return
        part = check_output(out)
        try:
            part.write_text(text + "\n")
            os.rename(part, out)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        click.echo(f"wrote {out}")


@main.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to make; default xt-demo."
)
def demo(out: Path | None) -> None:
    """Builds a large image from a photograph, plans and embeds it. No network, no arguments."""
    from .demo import PHOTOGRAPH, write_scene
    from .output import check_output
    from .source import open_image

    if out is None:
        names = (Path("xt-demo" + (f"-{i}" if i > 1 else "")) for i in range(1, 1000))
        out = next(name for name in names if not name.exists())
    check_output(out).parent.mkdir(parents=True, exist_ok=True)
    out.mkdir()
    scene = out / "scene.tif"
    click.echo(f"Building {scene} from {PHOTOGRAPH}")
    write_scene(scene)
    with open_image(scene) as source:
        options = {**_DEMO_OPTIONS, "batch_size": 16, "readers": 2, "bands": None, "fill": None}
        model = _model(source, options)
        plan = _plan(model, source, out, options)
        _table(_plan_rows(plan))
        result = _run(model, source, out / "embedding", options)
    _table(_stats_rows(result.stats))
    click.echo(
        f"Look at {out}/embedding/preview.png: the scene, and its tokens' first three principal"
    )
    click.echo("components as colours. The same on your own image: xt embed FILE -o OUT")


_DEMO_OPTIONS: dict[str, Any] = {
    "encoder": "convnext_atto", "context": "xl", "model_dir": None, "pretrained": False,
    "region": None, "chunk_regions": None, "memory_chunks": None, "tiling": None,
    "mean": None, "std": None, "seed": 0, "device": "auto",
}  # fmt: skip


@main.command()
def doctor() -> None:
    """Versions, devices, and which optional parts are there."""
    from .doctor import report

    click.echo(report())


@contextmanager
def _opened(image: Path) -> Iterator[ImageSource]:
    from .source import open_image

    source = open_image(image)
    try:
        yield source
    finally:
        source.close()


def _model(source: ImageSource, options: dict[str, Any], **extra: Any) -> XT:
    """The model that the options name, on its device; a notice where its weights are random."""
    import warnings

    import torch

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device must be cpu where no CUDA device is found, got {device}.")
    if options["model_dir"] is not None:
        from .model import XT

        folder = options["model_dir"]
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model must be a folder with config.json, got {folder}.")
        model = XT.from_pretrained(str(folder)).eval()
    else:
        from .registry import RandomWeightsWarning, create_model

        bands = options["bands"]
        extra["in_chans"] = source.bands if bands is None else len(bands)
        for name in ("region", "memory_chunks", "tiling", "mean", "std"):
            if options[name] is not None:
                extra[name] = options[name]
        if options["chunk_regions"] is not None:
            extra["chunk_regions"] = options["chunk_regions"] or None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RandomWeightsWarning)
            model = create_model(
                options["encoder"],
                context=None if options["context"] == "none" else options["context"],
                pretrained=options["pretrained"],
                seed=options["seed"],
                **extra,
            )
        for warning in caught:
            click.echo(f"note: {warning.message}", err=True)
    return model.to(device)


def _stream_options(options: dict[str, Any]) -> dict[str, Any]:
    bands = options["bands"]
    return {
        "batch_size": options["batch_size"],
        "readers": options["readers"],
        "bands": None if bands is None else [b - 1 for b in bands],
    }


def _plan(model: XT, source: ImageSource, out: Path, options: dict[str, Any]) -> Plan:
    from .planning import plan

    return plan(model, source, out=out, **_stream_options(options))


def _run(
    model: XT, source: ImageSource, out: Path | None, options: dict[str, Any], preview: bool = True
) -> Any:
    from tqdm import tqdm

    from .streaming import stream

    visits = sum(len(s.regions) for s in model.walk(model.grid(source.height, source.width)))
    with tqdm(total=visits, unit=" regions", desc=Path(source.name).name, file=sys.stderr) as bar:
        return stream(
            model,
            source,
            out,
            fill=options["fill"],
            preview=preview,
            progress=bar.update,
            **_stream_options(options),
        )


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("image", f"{plan.height:,} x {plan.width:,} px"),
        ("regions", f"{plan.rows} x {plan.cols} of {plan.region} px = {plan.regions:,}"
         + (f" ({plan.visits:,} visits)" if plan.visits != plan.regions else "")),
        ("tokens", f"{plan.tokens:,}"),
        ("chunks", f"{plan.chunks:,} of up to {plan.chunk_tokens:,} tokens"),
        ("expected time", _seconds(plan.seconds)),
        ("expected memory", f"{_bytes(plan.memory)} above the model, "
         f"{_bytes(plan.memory_available)} free"),
        ("output", f"{_bytes(plan.output_bytes)}, {_bytes(plan.disk_free)} free"),
        ("fits", "yes" if plan.fits else "no"),
    ]  # fmt: skip


def _stats_rows(stats: StreamStats) -> list[tuple[str, str]]:
    return [
        ("regions", f"{stats.regions:,}"),
        ("tokens", f"{stats.tokens:,}"),
        ("time", _seconds(stats.seconds)),
        ("speed", f"{stats.regions_per_s:.1f} regions/s"),
        ("peak memory", f"{_bytes(stats.peak_memory)}, "
         f"{_bytes(stats.peak_memory - stats.base_memory)} above the loaded model"),
        ("bytes read", _bytes(stats.bytes_read)),
    ]  # fmt: skip


def _table(rows: list[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
