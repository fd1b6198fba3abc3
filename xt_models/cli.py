"""The command line, `xt`. Only click is imported at the top: `xt --help` answers at once."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    import torch

    from .manifest import Image, Manifest
    from .model import XT
    from .planning import Plan
    from .source import ImageSource
    from .streaming import StreamStats
    from .train.table import Run

_CONTEXTS = ("xl", "hyper", "mamba", "vit")  # those of .model, which takes seconds to import
STOPPED = 75
"""Exit code of a run that was asked to end (SIGTERM) and can go on; EX_TEMPFAIL
of sysexits.h."""

STOP_SECONDS = 8.0
"""How long after SIGTERM a run may stay in one call that Python cannot leave."""


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
            click.echo("\nInterrupted.", err=True)
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


def _drop(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    try:
        return value if value in (None, "nodata") else float(str(value))
    except ValueError:
        raise click.BadParameter(f"expected nodata or a number, got {value!r}.") from None


def _batch_size(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """A number, "auto", or None where nothing was said."""
    if value in (None, "auto"):
        return value
    number: int = click.IntRange(1)(value, param, ctx)
    return number


def _memory(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes of "512MB", "8GB", "8GiB"."""
    if value is None:
        return None
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    try:
        assert match is not None
        power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    except (AssertionError, ValueError):
        raise click.BadParameter(f"expected a size like 512MB or 8GB, got {value!r}.") from None


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--encoder", default="swinv2_tiny", show_default=True,
                         help="Region encoder: short name (see xt doctor) or timm model."),
            click.option("--context", default="xl", show_default=True,
                         type=click.Choice([*_CONTEXTS, "none"]),
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
            click.option("--drop", callback=_drop, metavar="VALUE",
                         help="Leave out regions of nothing but this value; nodata is the image's "
                         "own. Changes the result."),
            click.option("--on-bad-tile", type=click.Choice(["stop", "mask"]), default="stop",
                         show_default=True,
                         help="What to do about a tile that does not decode: stop, or leave its "
                         "regions out and record them."),
            click.option("--precision", default="float32", show_default=True,
                         type=click.Choice(["float32", "bfloat16", "auto"]),
                         help="Of the region encoder; auto measures whether bfloat16 is faster."),
            click.option("--compile/--no-compile", default=None,
                         help="The region encoder under torch.compile; default is on a GPU only."),
            click.option("--batch-size", callback=_batch_size, metavar="N|auto",
                         show_default="16, of SwinV2 on a CPU 8",
                         help="Regions encoded at once; auto measures which number is fastest."),
            click.option("--memory", callback=_memory, metavar="SIZE",
                         help="What a run may take above the model, e.g. 8GB: batch size auto "
                         "within it, so no number with it."),
            click.option("--readers", type=click.IntRange(1), default=2, show_default=True,
                         help="Threads that read ahead."),
            click.option("--reuse/--no-reuse", default=True, show_default=True,
                         help="Encode regions with identical pixels once; the result is the same."),
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
@click.argument("image", metavar="FILE|DIR|LIST", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--preview/--no-preview", default=True, show_default=True, help="Make preview.png.")
@click.option("--profile", "trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Print where the time went; write a Chrome trace to FILE.")  # fmt: skip
@_model_options
def embed(image: Path, out: Path, preview: bool, trace: Path | None, **options: Any) -> None:
    """Token map, embedding and preview of an image FILE of any size, or of many: those in a folder
    DIR, or in a text file LIST (.txt) of one path a line.

    Stopped in whatever way, the same command goes on where it was and gives the same bytes.
    """
    from .journal import claimed
    from .manifest import is_many
    from .profiling import Profile

    if is_many(image):
        if trace is not None:
            raise click.BadParameter("is of one image, not of many.", param_hint="--profile")
        _embed_many(image, out, options, preview)
        return

    with claimed(out), _resumable(out), _opened(image) as source:
        model = _model(source, options)
        profile = None if trace is None else Profile(next(model.parameters()).device)
        result = _run(model, source, out, options, preview=preview, heads=False, profile=profile)
    _table(_stats_rows(result.stats))
    if profile is not None and trace is not None:
        click.echo("time went to")
        _table([(f"  {n}", f"{_seconds(s)}, {share:.1%}") for n, s, share in profile.table()])
        click.echo(f"busy {profile.busy:.1%}: encode and context, of the run's time by the clock")
        profile.write_trace(trace)
        click.echo(f"wrote {trace}")
    files = "tokens.zarr, embedding.json, run.json" + ", preview.png" * preview
    click.echo(f"wrote {out}/: {files}")


def _embed_many(where: Path, out: Path, options: dict[str, Any], preview: bool) -> None:
    from .host import current_rss
    from .manifest import MANIFEST, embed_many, list_images, open_manifest

    images = list_images(where)
    with _resumable(out, out / MANIFEST), open_manifest(out) as manifest:
        model = _model_of_many(images, manifest, options, preview)

        def embed_one(image: Image, folder: Path) -> None:
            with _opened(image.path) as source:
                if model is None:
                    raise ValueError(f"{image.path} could not be opened a moment ago.")
                _run(model, source, folder, options, preview=preview, heads=False)

        sizes: list[int] = []

        def tell(image: Image, how: str) -> None:
            click.echo(f"{image.name}: {how}")
            sizes.append(current_rss())

        counts = embed_many(images, manifest, embed_one, tell)
    click.echo(
        f"{counts['done']} done, {counts['before']} done before, {counts['failed']} failed of "
        f"{len(images)}; wrote {out / MANIFEST}"
    )
    # The caches of a run take a few images to fill.
    later = sizes[len(sizes) // 4 :]
    if later:
        click.echo(
            f"memory {_bytes(later[0])} after a quarter of them, {_bytes(max(later))} at most"
        )
    if counts["failed"]:
        raise click.ClickException(
            f"{counts['failed']} of {len(images)} images failed; {out / MANIFEST} says why."
        )


def _model_of_many(
    images: list[Image], manifest: Manifest, options: dict[str, Any], preview: bool
) -> XT | None:
    """The model for the first image that can be opened, noted in the manifest with its settings;
    None if there is none. Raises ValueError if another model or setting was noted before."""
    from .journal import model_identity
    from .manifest import FAILURES
    from .source import open_image
    from .streaming import is_compiled

    for image in images:
        try:
            source = open_image(image.path)
        except FAILURES:
            continue  # says so when its turn comes
        with source:
            model = _model(source, options)
            known = manifest.identity
            _measure_options(model, source, known and known["settings"], options)
        settings = {"preview": preview, **_stream_options(options)}
        settings |= {name: options[name] for name in ("fill", "drop", "precision")}
        settings["compile"] = is_compiled(next(model.parameters()).device, options["compile"])
        del settings["readers"]
        manifest.begin(model_identity(model, settings))
        return model
    return None


@contextmanager
def _resumable(out: Path, kept: Path | None = None) -> Iterator[None]:
    """Says whether the same command can go on, however the run ends.

    kept: where the run is noted while it lasts; default `OUT.part`.
    """
    where = out.with_name(out.name + ".part") if kept is None else out

    def note() -> str:
        is_kept = (kept or where).exists() and any(where.iterdir())
        goes_on = f"{where} is kept: the same command goes on from there."
        return goes_on if is_kept else "nothing was written."

    try:
        with _stopped_in_time(note):
            yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == 143:
            click.echo(f"\nStopped: {note()}", err=True)
            raise SystemExit(STOPPED) from None
        if isinstance(error, KeyboardInterrupt):
            click.echo(f"\nInterrupted: {note()}", err=True)
            raise SystemExit(130) from None
        strange = isinstance(error, BlockingIOError | FileExistsError)
        if isinstance(error, OSError) and not strange and note().startswith(str(where)):
            click.echo(f"note: {note()}", err=True)
        raise


@contextmanager
def _stopped_in_time(note: Callable[[], str]) -> Iterator[None]:
    """Ends the process `STOP_SECONDS` after SIGTERM if the main thread is still inside one call,
    such as attention over a whole image: Python runs no handler there. What is left is what a
    `kill -9` leaves."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before, ended = signal.set_wakeup_fd(writer), threading.Event()

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and not ended.wait(STOP_SECONDS):
                sys.stderr.write(f"\nStopped: {note()}\n")
                sys.stderr.flush()
                os._exit(STOPPED)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
def verify(out: Path) -> None:
    """Whether a folder OUT is, byte for byte, what a run wrote."""
    from .journal import verify as verify_output

    wrong = verify_output(out)
    for line in wrong:
        click.echo(line)
    if wrong:
        raise click.ClickException(f"{out} is not what was written: {len(wrong)} findings.")
    click.echo(f"{out}: every byte is as it was written.")


@main.command()
@_image
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="JSON file of class scores (default is the screen); folder to make for a model "
              "with further heads.")  # fmt: skip
@click.option("--num-classes", type=click.IntRange(1), default=10, show_default=True,
              help="Classes of a new head (a saved model has its own).")  # fmt: skip
@click.option("--maps", type=click.Choice(["prediction", "logits"]), default="prediction",
              show_default=True, help="What maps hold: classes or scores, or logits.")  # fmt: skip
@click.option("--map-format", type=click.Choice(["tif", "zarr"]), default="tif",
              show_default=True, help="Tiled BigTIFF, or zarr.")  # fmt: skip
@_model_options
def predict(
    image: Path, out: Path | None, num_classes: int, maps: str, map_format: str, **options: Any
) -> None:
    """What a model says of an image FILE of any size: class scores, and for each further head of a
    saved model a map with the image's georeference, or boxes as COCO JSON and GeoJSON.

    A run that writes a folder and is stopped goes on with the same command.
    """
    import json

    from .journal import claimed
    from .output import check_output, class_scores

    with ExitStack() as stack:
        claim = stack.enter_context(ExitStack())
        if out is not None:
            claim.enter_context(claimed(out))
        source = stack.enter_context(_opened(image))
        model = _model(source, options, num_classes=num_classes)
        if len(model.heads):
            if out is None:
                raise click.UsageError("the model has further heads: name a folder with -o.")
            more = {"tokens": False, "maps": maps, "map_format": map_format}
            with _resumable(out):
                result = _run(model, source, out, options, **more)
            _table(_stats_rows(result.stats))
            click.echo(f"wrote {out}/: {', '.join(sorted(path.name for path in out.iterdir()))}")
            return
        claim.close()
        if out is not None:
            check_output(out)
        if model.head is None:
            raise click.ClickException(
                f"The model in {options['model_dir']} has no head (num_classes 0)."
            )
        result = _run(model, source, None, options)
        assert result.logits is not None
        record = {"image": source.name, "embedding": result.embedding.tolist()}
        record |= class_scores(result.logits, model.class_names.get("head", ()))
        text = json.dumps(record, indent=1)
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
    """Builds a large image from a photograph, plans and embeds it; then shows what context does for
    two small trained models. No network, no arguments."""
    from .demo import PHOTOGRAPH, show_vessels, write_scene
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
        options = _DEMO_OPTIONS
        model = _model(source, options)
        plan = _plan(model, source, out, options)
        _table(_plan_rows(plan))
        result = _run(model, source, out / "embedding", options)
    _table(_stats_rows(result.stats))
    click.echo(
        f"Look at {out}/embedding/preview.png: the scene, and its tokens' first three principal"
    )
    click.echo("components as colours. The same on your own image: xt embed FILE -o OUT")
    for title, score in show_vessels(out / "vessels").items():
        click.echo(f"vessels, {title}: F1 {score:.1f} %")
    click.echo(f"Look at {out}/vessels/comparison.png: which dots are vessels, a far coast says")


_DEMO_OPTIONS: dict[str, Any] = {
    "encoder": "convnext_atto", "context": "xl", "model_dir": None, "pretrained": False,
    "region": None, "chunk_regions": None, "memory_chunks": None, "tiling": None,
    "mean": None, "std": None, "seed": 0, "device": "auto", "batch_size": None, "memory": None,
    "precision": "float32", "compile": None, "readers": 2, "bands": None, "fill": None,
    "reuse": True, "drop": None, "on_bad_tile": "stop",
}  # fmt: skip


def _erf_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--encoder", default="convnext_atto", show_default=True,
                         help="Region encoder: short name (see xt doctor) or timm model."),
            click.option("--context", default="all", show_default=True,
                         type=click.Choice(["none", *_CONTEXTS, "all"]), help="Context encoder."),
            click.option("--size", type=click.IntRange(1, 4096), default=512, show_default=True,
                         help="Side of the inputs, pixels; memory grows with it."),
            click.option("--region", type=click.IntRange(1), default=128, show_default=True,
                         help="Side of the regions, pixels."),
            click.option("--chunk-regions", type=click.IntRange(1), default=1, show_default=True,
                         help="Regions a chunk of xl, mamba; others take the whole image."),
            click.option("--images", type=click.IntRange(1), default=4, show_default=True,
                         help="Inputs to average over."),
            click.option("--image", "photograph", type=click.Path(path_type=Path),
                         help="Take random crops of this FILE; default is normal noise."),
            click.option("--token", callback=_numbers(int, 0), metavar="ROW,COLUMN",
                         help="Which token; default is the centre of the last region."),
            click.option("--pretrained", is_flag=True,
                         help="timm's weights for the region encoder."),
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                         help="Of weights, inputs and signs."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


@main.command()
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@_erf_options
def erf(out: Path, **options: Any) -> None:
    """Effective receptive field: which pixels a token depends on, and how much."""
    from .output import OutputFolder, check_output

    check_output(out)
    if options["token"] is not None and len(options["token"]) != 2:
        raise click.BadParameter("expected two numbers like 3,5.", param_hint="--token")
    if options["size"] < options["region"]:
        raise click.BadParameter(
            f"must be at least a region, {options['region']} px, got {options['size']}.",
            param_hint="--size",
        )
    with ExitStack() as stack:
        source = None
        if options["photograph"] is not None:
            source = stack.enter_context(_opened(options["photograph"]))
        folder = stack.enter_context(OutputFolder(out))
        assert folder is not None
        numbers = _measure_fields(folder, source, options)
    click.echo("context    region    chunk  outside   50 % in   95 % in   nonzero       can see")
    for name, n in numbers.items():
        shares = "".join(f"{n[f'{part}_share']:>9.2%}" for part in ("region", "chunk", "outside"))
        click.echo(
            f"{name:<8}{shares}{n['radius_50']:>7.0f} px{n['radius_95']:>7.0f} px"
            f"{n['nonzero']:>10.2%}{n['context_px']:>11,} px"
        )
    click.echo(f"wrote {out}/: erf.png, erf.json, erf.npz")


def _measure_fields(
    folder: Path, source: ImageSource | None, options: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Measures the maps of `xt erf`, writes its three files, and returns their numbers."""
    import json
    from dataclasses import asdict

    import numpy as np
    from tqdm import tqdm

    import xt_kernels

    from .output import write_receptive_fields
    from .receptive_field import (
        centre_token,
        effective_receptive_field,
        receptive_field_numbers,
        token_region,
    )

    size, token, count = options["size"], options["token"], options["images"]
    names = ["none", *_CONTEXTS] if options["context"] == "all" else [options["context"]]
    fields: dict[str, Any] = {}
    numbers, configs = {}, {}
    with tqdm(total=len(names) * count, unit=" images", desc="erf", file=sys.stderr) as bar:
        for name in names:
            extra = {"chunk_regions": options["chunk_regions"]} if name in ("xl", "mamba") else {}
            model, notes = _create(
                options | {"context": name},
                region=options["region"],
                in_chans=3 if source is None else source.bands,
                **extra,
            )
            for note in notes if name == names[0] else []:  # the same for all
                bar.write(note, file=sys.stderr)
            token = token or centre_token(model, size, size)
            box = model.grid(size, size).box(token_region(model, size, size, token))
            fields[name] = effective_receptive_field(
                model,
                _field_images(source, options),
                token=token,
                seed=options["seed"],
                progress=bar.update,
            )
            numbers[name] = receptive_field_numbers(model, fields[name], token)
            configs[name] = asdict(model.config)
    record = {
        "image": None if source is None else source.name,
        "size": size,
        "images": count,
        "seed": options["seed"],
        "pretrained": options["pretrained"],
        "token": token,
        "region_box": box,
        "xt_kernels": xt_kernels.__version__,
        "contexts": {name: numbers[name] | {"config": configs[name]} for name in names},
    }
    (folder / "erf.json").write_text(json.dumps(record, indent=1))
    np.savez_compressed(folder / "erf.npz", **fields)
    write_receptive_fields(folder / "erf.png", fields, box)
    return numbers


def _field_images(source: ImageSource | None, options: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Square inputs by seed, `[C, size, size]`: crops of the source, or normal noise."""
    import numpy as np
    import torch

    rng, size = np.random.default_rng(options["seed"]), options["size"]
    if source is not None and min(source.height, source.width) < size:
        raise ValueError(
            f"{source.name}: expected at least {size:,} x {size:,} px (--size), found "
            f"{source.height:,} x {source.width:,}."
        )
    for _ in range(options["images"]):
        if source is None:
            yield torch.from_numpy(rng.standard_normal((3, size, size), dtype=np.float32))
            continue
        top, left = rng.integers((source.height - size + 1, source.width - size + 1)).tolist()
        pixels = source.read(top, left, size, size)
        if not np.isfinite(pixels).all():
            raise ValueError(f"{source.name}: expected finite pixels, found others in a crop.")
        yield torch.from_numpy(np.require(pixels, requirements=["C", "W"]))


class _Trainings(click.Group):
    """What is no name of a command is a CONFIG."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["CONFIG|COMMAND", "[OPTIONS]"]


def _show_recipes(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from .train.config import describe, shipped

    _table([(name, describe(path)) for name, path in shipped().items()])
    ctx.exit()


@main.group("train", cls=_Trainings)
@click.option("--list", is_flag=True, callback=_show_recipes, expose_value=False, is_eager=True,
              help="Shows the recipes in the package: names that CONFIG may be.")  # fmt: skip
def train_() -> None:
    """Trains what a recipe says: CONFIG is a TOML file or a name of `xt train --list`.

    `xt train CONFIG --help` has its options. The commands below are small examples that end in a
    table.
    """


def _changes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
    """Values by dotted key; what is no TOML value is a string."""
    import tomllib

    out: dict[str, Any] = {}
    for each in values:
        key, equal, text = each.partition("=")
        if not equal or "." not in key:
            raise click.BadParameter(f"expected TABLE.KEY=VALUE, got {each!r}.")
        try:
            out[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            out[key.strip()] = text.strip()
    return out


@train_.command("run", hidden=True)
@click.argument("config", metavar="CONFIG")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--data", "root", type=click.Path(path_type=Path),
              help="Folder of the data; replaces data.root.")  # fmt: skip
@click.option("--set", "changes", multiple=True, callback=_changes, metavar="TABLE.KEY=VALUE",
              help="Replaces a value of CONFIG: --set train.epochs=3")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True,
              help="auto takes the GPU that accelerate finds.")  # fmt: skip
def train_run(
    config: str, out: Path, root: Path | None, changes: dict[str, Any], device: str
) -> None:
    """Trains what CONFIG says, a TOML file or a name of `xt train --list`.

    Stopped in whatever way, the same command goes on where it was, with the same losses. Several
    processes: `accelerate launch -m xt_models.cli train CONFIG -o OUT`.
    """
    from tqdm import tqdm

    from .journal import part_of
    from .train.config import load
    from .train.fit import fit

    part_of(out)
    if root is not None:
        changes["data.root"] = str(root.absolute())  # not beside CONFIG
    recipe = load(config, changes)
    with (
        _resumable(out),
        tqdm(unit=" steps", desc=Path(config).stem, file=sys.stderr, disable=_is_worker()) as bar,
    ):

        def begin(step: int, steps: int) -> None:
            bar.reset(steps)
            bar.update(step)

        def stepped(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        def tell(found: dict[str, float]) -> None:
            bar.write(_numbers_line(found), file=sys.stderr)

        last = fit(recipe, out, device=device, on_start=begin, on_step=stepped, on_validation=tell)
    if not _is_worker():
        if last:
            click.echo(_numbers_line(last))
        click.echo(f"wrote {out}/: model, " + "best, " * bool(last) + "log.csv, run.json")


def _is_worker() -> bool:
    """Whether another process of the same run speaks to the user."""
    return os.environ.get("RANK", "0") != "0"


def _numbers_line(found: dict[str, float]) -> str:
    rest = (f"{name} {value:.4g}" for name, value in found.items() if name not in ("step", "epoch"))
    return f"step {found['step']}, epoch {found['epoch']:.4g}: " + ", ".join(rest)


def _table_options(steps: int | None, batch: str) -> Callable[..., Any]:
    options = [
        click.option("-o", "--out", required=True, type=click.Path(path_type=Path),
                     help="Folder to make."),
        click.option("--rows", help="Rows to train, with commas between; all."),
        click.option("--seeds", type=click.IntRange(1), default=3, show_default=True,
                     help="Runs of each row; seeds count from 0."),
        click.option("--steps", type=click.IntRange(1), default=steps, show_default=True,
                     help=f"Batches of {batch} a run."),
        click.option("--jobs", type=click.IntRange(1), default=1, show_default=True,
                     help="Runs at a time, one thread each."),
    ]  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@train_.command("cue-digits")
@_table_options(1000, "64 images")
def cue_digits(**options: Any) -> None:
    """The proof that context matters: the label is in one region, its place in another."""
    _train_table("cue-digits", **options)


@train_.command("shoreline")
@_table_options(100, "32 scenes")
@click.option("--regions", type=click.IntRange(4), default=4, show_default=True,
              help="Side of the scenes, in regions of 32 px.")  # fmt: skip
@click.option("--save", is_flag=True, help="Keep the models, in OUT/<row>-<seed>/.")
def shoreline(regions: int, **options: Any) -> None:
    """The same for maps: which bright dots are vessels, a coast that lies elsewhere says."""
    _train_table("shoreline", options={"regions": regions}, **options)


@train_.command("spanning")
@_table_options(400, "8 scenes")
def spanning(**options: Any) -> None:
    """The same for boxes: bars and rings of which no region sees enough."""
    _train_table("spanning", **options)


@train_.command("megapixel-digits")
@_table_options(1600, "32 canvases")
def megapixel_digits(**options: Any) -> None:
    """The same on canvases of 1,024 to 4,096 px: a digit there, which one counts here."""
    _train_table("megapixel-digits", **options)


@train_.command()
@click.argument("what", type=click.Choice(["encoder", "depth", "resolution", "locality"]))
@click.option("--task", type=click.Choice(["cue-digits", "shoreline"]), default="cue-digits",
              show_default=True, help="Whose images; shoreline has no resolution.")  # fmt: skip
@_table_options(None, "the task's size")
def ablate(what: str, task: str, rows: str | None, steps: int | None, **options: Any) -> None:
    """The paper's ablations (tables 5a, 5b, 5c, 6) on the images of a task."""
    from .train.table import find_task

    name = "ablate" if task == "cue-digits" else f"ablate-{task}"
    known = find_task(name)
    if what not in known.ABLATIONS:
        raise click.BadParameter(
            f"of {task} are {', '.join(known.ABLATIONS)}, got {what}.", param_hint="WHAT"
        )
    rows = rows or ",".join(known.ABLATIONS[what])
    _train_table(name, rows=rows, steps=steps or known.STEPS, **options)


def _train_table(
    name: str,
    out: Path,
    rows: str | None,
    seeds: int,
    steps: int,
    jobs: int,
    save: bool = False,
    options: dict[str, Any] | None = None,
) -> None:
    from tqdm import tqdm

    from .output import check_output
    from .train.table import check_row, find_task, format_table, write_table

    check_output(out)
    known = find_task(name)
    names = list(known.ROWS) if rows is None else list(dict.fromkeys(rows.split(",")))
    for row in names:
        check_row(name, row)
    total = len(names) * seeds * steps
    with tqdm(total=total, unit=" steps", desc=name, file=sys.stderr) as bar:

        def tell(run: Run) -> None:
            score = f"{known.METRIC} {run.points[-1].score:.1f} %"
            line = f"{run.row}, seed {run.seed}: {score} in {_seconds(run.seconds)}"
            bar.write(line, file=sys.stderr)

        # "" where it was called from Python.
        programs = {"xt": ["xt"], "cli.py": ["python", "-m", "xt_models.cli"]}
        program = programs.get(Path(sys.argv[0]).name)
        typed = shlex.join([*program, *sys.argv[1:]]) if program else ""
        table = write_table(
            out, name, names, seeds=seeds, steps=steps, jobs=jobs, save=save,
            options=options or {}, command=typed, on_steps=bar.update, on_run=tell,
        )  # fmt: skip
    click.echo(format_table(table))
    click.echo(f"wrote {out}/: curves.csv, table.json, curves.png" + ", models" * save)


@main.command("convert-checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
def convert_checkpoint_(file: Path, out: Path) -> None:
    """Makes a model folder of FILE, a checkpoint that the paper's authors released.

    Nothing in FILE is run. Then: xt predict IMAGE --model OUT.
    """
    from .released import convert_checkpoint

    found = convert_checkpoint(file, out)
    _table([
        ("model", f"SwinV2 {found.size}, context {found.context}"),
        ("classes", f"{found.num_classes:,}"),
        ("parameters", f"{found.parameters / 1e6:.2f} M"),
        ("left behind", ", ".join(found.left_behind) or "nothing"),
    ])  # fmt: skip
    click.echo(f"wrote {out}/: model.safetensors, config.json, README.md")


@main.command("report")
@click.argument("results", metavar="RESULTS", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to fill.")
@click.option("--against", type=click.Path(path_type=Path),
              help="An older JSON file, to judge RESULTS, one file, against.")  # fmt: skip
@click.option("--readme", type=click.Path(path_type=Path),
              help="A Markdown file whose table of numbers is to be replaced.")  # fmt: skip
def report_(results: Path, out: Path, against: Path | None, readme: Path | None) -> None:
    """Pages from the JSON of the benches: RESULTS is a folder of them, or one file."""
    from .report import make_report

    for line in make_report(results, out, against=against, readme=readme):
        click.echo(line)


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
    import torch

    if options["memory"] is not None and isinstance(options["batch_size"], int):
        raise click.UsageError("--memory chooses the batch size: give no number for --batch-size.")
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
        bands = options["bands"]
        extra["in_chans"] = source.bands if bands is None else len(bands)
        for name in ("region", "memory_chunks", "tiling", "mean", "std"):
            if options[name] is not None:
                extra[name] = options[name]
        if options["chunk_regions"] is not None:
            extra["chunk_regions"] = options["chunk_regions"] or None
        model, notes = _create(options, **extra)
        for note in notes:
            click.echo(note, err=True)
    return model.to(device)


def _create(options: dict[str, Any], **extra: Any) -> tuple[XT, list[str]]:
    """A new model, and what to tell of it: that its weights are random."""
    import warnings

    from .registry import RandomWeightsWarning, create_model

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RandomWeightsWarning)
        model = create_model(
            options["encoder"],
            context=None if options["context"] == "none" else options["context"],
            pretrained=options["pretrained"],
            seed=options["seed"],
            **extra,
        )
    return model, [f"note: {warning.message}" for warning in caught]


def _stream_options(options: dict[str, Any]) -> dict[str, Any]:
    bands = options["bands"]
    return {
        "batch_size": options["batch_size"],
        "readers": options["readers"],
        "bands": None if bands is None else [b - 1 for b in bands],
    }


def _plan(model: XT, source: ImageSource, out: Path, options: dict[str, Any]) -> Plan:
    from .planning import plan

    _measure_options(model, source, None, options)
    names = ("fill", "reuse", "drop", "on_bad_tile", "precision", "compile")
    more = {name: options[name] for name in names}
    return plan(model, source, out=out, heads=False, **more, **_stream_options(options))


def _run(
    model: XT, source: ImageSource, out: Path | None, options: dict[str, Any], **more: Any
) -> Any:
    from tqdm import tqdm

    from .journal import settings_of
    from .streaming import stream

    settings = None if out is None else settings_of(out)
    _measure_options(model, source, settings, options, more.get("heads", True))
    visits = sum(len(s.regions) for s in model.walk(model.grid(source.height, source.width)))
    name = Path(source.name).name
    with tqdm(total=visits, unit=" regions", desc=name, file=sys.stderr, leave=None) as bar:
        return stream(
            model,
            source,
            out,
            fill=options["fill"],
            reuse=options["reuse"],
            drop=options["drop"],
            precision=options["precision"],
            compile=options["compile"],
            on_bad_tile=options["on_bad_tile"],
            progress=bar.update,
            **more,
            **_stream_options(options),
        )


def _measure_options(
    model: XT,
    source: ImageSource,
    settings: dict[str, Any] | None,
    options: dict[str, Any],
    heads: bool = False,
) -> None:
    """Measures precision and batch size where that was asked for, and says so; a run that goes on
    with `settings` keeps its own."""
    from .planning import choose_batch_size, choose_precision
    from .streaming import default_batch_size

    if options["precision"] == "auto":
        if settings is not None:
            name, how = settings["precision"], "that of the run so far"
        else:
            name, speeds = choose_precision(model)
            how = ", ".join(f"{n}: {each:.1f}" for n, each in speeds.items()) + " regions/s"
        click.echo(f"precision {name} ({how})", err=True)
        options["precision"] = name
    if options["batch_size"] is None and options["memory"] is None:
        options["batch_size"] = default_batch_size(model)
    if isinstance(options["batch_size"], int):
        return
    if settings is not None:
        size, how = int(settings["batch_size"]), "that of the run so far"
    else:
        readers, memory = options["readers"], options["memory"]
        precision = options["precision"]
        size, tried, needed = choose_batch_size(
            model, source, readers=readers, memory=memory, precision=precision, heads=heads
        )
        how = ", ".join(f"{n}: {1 / each:.1f}" for n, each in tried.items()) + " regions/s"
        if memory is not None and needed > memory:
            click.echo(
                f"warning: --memory {_bytes(memory)} cannot be held: with batches of {size} the "
                f"run takes about {_bytes(needed)} above the model.",
                err=True,
            )
    click.echo(f"batch size {size} ({how})", err=True)
    options |= {"batch_size": size, "memory": None}


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("image", f"{plan.height:,} x {plan.width:,} px"),
        ("regions", f"{plan.rows} x {plan.cols} of {plan.region} px = {plan.regions:,}"
         + (f" ({plan.visits:,} visits)" if plan.visits != plan.regions else "")),
        *([("reused", f"about {plan.reused:.0%}: equal to others, or left out")]
          if plan.reused else []),
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
        ("regions", f"{stats.regions:,}"
         + (f", {stats.reused:,} with the pixels of another" if stats.reused else "")),
        *([("left out", f"{stats.left_out:,} regions, named in run.json")]
          if stats.left_out else []),
        ("tokens", f"{stats.tokens:,}"),
        ("time", _seconds(stats.seconds)),
        ("speed", f"{stats.regions_per_s:.1f} regions/s"),
        ("peak memory", f"{_bytes(stats.peak_memory)}, "
         f"{_bytes(stats.peak_memory - stats.base_memory)} above the loaded model"),
        ("bytes read", _bytes(stats.bytes_read)),
        *([("resumed", f"{stats.resumed} times; time and counts are of all parts")]
          if stats.resumed else []),
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


if __name__ == "__main__":
    main(prog_name="xt")
