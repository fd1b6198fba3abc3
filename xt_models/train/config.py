"""A training recipe: a TOML file, checked key by key before any work.

    [model]    name, context, pretrained, weights, and any field of `XTConfig`
    [head]     kind and options, as in `XTConfig.heads`; classification needs none
    [data]     form and what that form takes (`data.FORMS`)
    [augment]  `Augment`
    [train]    `Train`

Several tasks on one trunk are tables [tasks.NAME], where NAME is also that of the head, with
`weight` and tables `head`, `data` and `augment` of their own; [data] and [augment] then hold what
these have in common.

Paths below [data] are relative to its `root`; `root` and `weights` to the file. `base`, above the
tables, names another recipe, whose values hold where this one gives none.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..model import XTConfig
from ..registry import CONTEXT_DEFAULTS
from .data import FORMS, Data

T = TypeVar("T")
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
"""Precision of a recipe -> what accelerate calls it."""
_FOLDER = Path(str(files(__package__) / "configs"))


@dataclass(frozen=True)
class Augment:
    """Random changes of training images, and of labels.

    scale: share of the image's area that a crop has, from, to. ratio: its width by height, from,
        to. Classification only: other tasks crop at `data.size`.
    flip, flip_vertical: chances of a mirror image. rotate: turns by a multiple of 90 degrees.
    randaugment: timm's string, such as "rand-m9-mstd0.5-inc1"; "" for none. uint8 RGB only, for
        classification.
    mixup, cutmix: alpha of the Beta distributions of timm's `Mixup`; 0 is off. mix_chance: share
        of batches that are mixed. Classification only.
    label_smoothing: mass of the target that all classes share. Classification only.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    flip_vertical: float = 0.0
    rotate: bool = False
    randaugment: str = ""
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_chance: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale
        _rule("augment.scale", 0 < low <= high <= 1, "two numbers, 0 < from <= to <= 1", self.scale)
        low, high = self.ratio
        _rule("augment.ratio", 0 < low <= high, "two numbers, 0 < from <= to", self.ratio)
        for name in ("flip", "flip_vertical", "mix_chance"):
            value = getattr(self, name)
            _rule(f"augment.{name}", 0 <= value <= 1, "in 0..1", value)
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            _rule(f"augment.{name}", value >= 0, "at least 0", value)
        smoothing = self.label_smoothing
        _rule("augment.label_smoothing", 0 <= smoothing < 1, "in [0, 1)", smoothing)


@dataclass(frozen=True)
class Train:
    """The optimisation: AdamW, linear warm-up, cosine.

    epochs: passes over the training images, of several tasks over those of the one that has most.
    batch_size: images a step, of each task, over all processes.
    accumulate: parts in which each process computes its share of a batch.
    lr: highest learning rate. min_lr: what the cosine ends at, as a share of lr. warmup_epochs:
        over which the rate grows from 0.
    weight_decay: of AdamW; norms, biases, tokens and tables have none. betas, eps: of AdamW.
    clip: norm that the gradient is cut to; 0 for any.
    precision: "float32", or "bfloat16" for autocast; weights stay float32.
    recompute: regions encoded at a time whose activations are computed again in the backward pass
        instead of kept; 0 keeps all.
    validate_every: epochs between validations. checkpoint_every: steps between checkpoints.
    workers: processes that read images; 0 reads in the training process.
    seed: of weights, order, augmentation, dropped paths.
    """

    epochs: float = 100.0
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-4
    min_lr: float = 0.01
    warmup_epochs: float = 0.0
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 5.0
    precision: str = "float32"
    recompute: int = 0
    validate_every: int = 1
    checkpoint_every: int = 500
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "eps"):
            value = getattr(self, name)
            _rule(f"train.{name}", value > 0, "above 0", value)
        for name in ("batch_size", "accumulate", "validate_every", "checkpoint_every"):
            value = getattr(self, name)
            _rule(f"train.{name}", value >= 1, "at least 1", value)
        for name in ("warmup_epochs", "weight_decay", "clip", "recompute", "workers", "seed"):
            value = getattr(self, name)
            _rule(f"train.{name}", value >= 0, "at least 0", value)
        _rule("train.min_lr", 0 <= self.min_lr <= 1, "in 0..1", self.min_lr)
        _rule("train.betas", all(0 <= b < 1 for b in self.betas), "in [0, 1)", self.betas)
        known = f"one of {', '.join(PRECISIONS)}"
        _rule("train.precision", self.precision in PRECISIONS, known, self.precision)
        _rule("train.batch_size", self.batch_size % self.accumulate == 0,
              f"a multiple of train.accumulate = {self.accumulate}", self.batch_size)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What is trained.

    name, context: as in `create_model`; context "none" for no context encoder. pretrained: timm's
        weights in the region encoder. weights: folder of a saved model to start from, whose fields
        then must not be given; its head is kept where its shapes are the same.
    fields: of `XTConfig`; chunk_regions 0 is the whole image.
    """

    name: str = "xt_swinv2_tiny_256"
    context: str = "xl"
    pretrained: bool = False
    weights: str = ""
    fields: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Part:
    """What one task brings: a head, what it is trained on, and the weight of its loss."""

    head: Mapping[str, Any]
    data: Data
    augment: Augment
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A whole training: what to train, on what, how.

    tasks: by name; a recipe without [tasks] has one, of the name "".
    """

    model: Model
    tasks: Mapping[str, Part]
    train: Train

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able, in the tables of a file."""
        tables = asdict(self)
        if list(self.tasks) == [""]:
            only = tables.pop("tasks")[""]
            del only["weight"]
            tables |= only
        return tables


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes in the package."""
    return {p.stem: p for p in sorted(_FOLDER.glob("*.toml")) if not p.name.startswith("_")}


def describe(path: Path) -> str:
    """The first comment line of a recipe."""
    return path.read_text().splitlines()[0].lstrip("# ")


def load(name: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a TOML file, or of a shipped name.

    changes: values by dotted key, such as {"train.epochs": 3}, that replace those of the file;
        "model.weights" replaces all of its [model], and starts where the user stands.

    Raises ValueError for an unknown key, a value of another type or out of range;
    FileNotFoundError if there is neither such a file nor such a name.
    """
    path = _find(name)
    tables = _tables(path, [])
    for key, value in (changes or {}).items():
        *names, last = key.split(".")
        if not names or not all((*names, last)):
            raise ValueError(f"{path}: a changed key must be TABLE.KEY, got {key!r}.")
        if key == "model.weights":
            tables["model"], value = {}, str(Path(value).absolute())
        table = tables
        for name in names:
            table = table.setdefault(name, {})
            _rule(f"{path}: {name} in {key}", isinstance(table, dict), "a table", table)
        table[last] = value
    # A shipped recipe has no data beside it: there `root` starts where the user stands.
    return from_dict(tables, path, Path() if path.parent == _FOLDER else path.parent)


def _find(name: str | Path, beside: Path = Path()) -> Path:
    """The file of a recipe, by path or shipped name."""
    path = beside / name
    if path.is_file():
        return path
    path = _FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), shipped(), 1)
        hint = f" (near it: {near[0]})" if near else ""
        raise FileNotFoundError(
            f"xt train: CONFIG must be a TOML file or one of `xt train --list`, "
            f"got {str(name)!r}{hint}."
        )
    return path


def _tables(path: Path, above: list[Path]) -> dict[str, Any]:
    """The tables of a file, over those of its base."""
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML, found: {error}.") from None
    base = tables.pop("base", None)
    if base is None:
        return tables
    _rule(f"{path}: base", isinstance(base, str), "the name of a recipe", base)
    _rule(f"{path}: base", path not in above, "a recipe that is not built on this one", base)
    return _over(_tables(_find(base, path.parent), [*above, path]), tables)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, table by table."""
    out = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = _over(out[name], value) if both else value
    return out


def from_dict(tables: dict[str, Any], where: str | Path = "recipe", base: Path = Path()) -> Recipe:
    """The recipe of these tables; `base` is where a relative `data.root` starts.

    Raises as `load`.
    """
    _known(tables, ("model", "tasks", "head", "data", "augment", "train"), f"{where}")
    _check_tables(tables, f"{where}: ")
    return Recipe(
        _model(tables.get("model", {}), where, base),
        _parts(tables, where, base),
        _build(Train, tables.get("train", {}), f"{where}: train"),
    )


def _check_tables(tables: Mapping[str, Any], where: str) -> None:
    for name, table in tables.items():
        _rule(f"{where}{name}", isinstance(table, dict), "a table", table)


def _parts(tables: dict[str, Any], where: str | Path, base: Path) -> dict[str, Part]:
    """The tasks by name."""
    if "tasks" not in tables:
        return {"": _part(tables, f"{where}: ", base)}
    _rule(f"{where}: tasks", tables["tasks"], "a table for each task", tables["tasks"])
    _rule(f"{where}: head", "head" not in tables, "left out beside tasks, which have their own",
          tables.get("head"))  # fmt: skip
    out = {}
    for name, own in tables["tasks"].items():
        inner = f"{where}: tasks.{name}"
        _rule(inner, isinstance(own, dict), "a table", own)
        _known(own, ("weight", "head", "data", "augment"), inner)
        _rule(f"{inner}: its name", name.isidentifier(), "a word, which the head gets", name)
        weight = _typed(own.get("weight", 1.0), float, f"{inner}.weight")
        _rule(f"{inner}.weight", 0 < weight < math.inf, "above 0 and finite", weight)
        _check_tables({k: v for k, v in own.items() if k != "weight"}, f"{inner}.")
        common = {k: v for k, v in tables.items() if k in ("data", "augment")}
        out[name] = replace(_part(_over(common, own), f"{inner}.", base), weight=weight)
    return out


def _part(tables: dict[str, Any], where: str, base: Path) -> Part:
    data = dict(tables.get("data", {}))
    form = data.get("form", "folder")
    _rule(f"{where}data.form", form in FORMS, f"one of {', '.join(FORMS)}", form)
    data["root"] = str((base / data.get("root", ".")).absolute())
    return Part(
        tables.get("head", {}),
        _build(FORMS[form], data, f"{where}data"),
        _build(Augment, tables.get("augment", {}), f"{where}augment"),
    )


def _model(table: dict[str, Any], where: str | Path, base: Path) -> Model:
    own = [f.name for f in fields(Model) if f.name != "fields"]
    reserved = ("encoder", "num_classes", "context", "heads")
    others = [f.name for f in fields(XTConfig) if f.name not in reserved]
    _known(table, [*own, *others], f"{where}: model")
    rest = {key: value for key, value in table.items() if key not in own}
    hints = get_type_hints(XTConfig)
    for key, value in rest.items():
        rest[key] = _typed(value, hints[key], f"{where}: model.{key}")
    if rest.get("chunk_regions") == 0:
        rest["chunk_regions"] = None
    model = _build(Model, {k: v for k, v in table.items() if k in own}, f"{where}: model")
    contexts = [name or "none" for name in CONTEXT_DEFAULTS]
    known = f"one of {', '.join(contexts)}"
    _rule(f"{where}: model.context", model.context in contexts, known, model.context)
    if model.weights:
        given = [key for key in table if key != "weights"]
        _rule(f"{where}: model", not given, "weights alone, which define a model", given)
        folder = (base / model.weights).absolute()
        saved = "a folder of a saved model, with config.json"
        _rule(f"{where}: model.weights", (folder / "config.json").is_file(), saved, model.weights)
        return Model(weights=str(folder))
    return replace(model, fields=rest)


def _build(kind: type[T], table: dict[str, Any], where: str) -> T:
    hints = get_type_hints(kind)
    _known(table, [f.name for f in fields(kind)], where)  # type: ignore[arg-type]
    return kind(**{k: _typed(v, hints[k], f"{where}.{k}") for k, v in table.items()})


def _known(table: Mapping[str, Any], known: Any, where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 1)
            hint = f" Near it: {near[0]}." if near else ""
            raise ValueError(f"{where}: unknown key {key!r}.{hint}")


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` says; lists become tuples, whole numbers floats."""
    if get_origin(hint) is UnionType or type(hint).__name__ == "_UnionGenericAlias":
        options = [h for h in get_args(hint) if h is not NoneType]
        for option in options:
            try:
                return _typed(value, option, where)
            except ValueError:
                continue
    elif get_origin(hint) is tuple and isinstance(value, list | tuple):
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        if len(inner) == len(value):
            return tuple(_typed(v, h, where) for v, h in zip(value, inner, strict=True))
    elif get_origin(hint) is not None and not isinstance(hint, type):
        return value  # a Literal: the class that takes it checks it
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    raise ValueError(f"{where} must be {name}, got {value!r}.")


def _rule(name: str, holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}.")
