"""Training on `accelerate`: one process or many, stopped and taken up again without a trace.

OUT.part/            locked by the run that writes it; becomes OUT at the end
  checkpoint.pt      weights, optimizer, step, lengths of the logs: what a run goes on from
  log.csv            a line a step; validation.csv a line a validation
  best/              the model with the best metric so far, as `save_pretrained` leaves it
  model/             the same at the end
  run.json           written last: recipe, results, versions, checksums of all files
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils.data import DataLoader

import xt_kernels

from ..host import need
from ..journal import RECORD, changes, locked, part_of, read_record, sync_folder, write_record
from ..model import XT
from ..registry import RandomWeightsWarning, create_model
from .config import PRECISIONS, Recipe, Train
from .tasks import Batch, InOrder, Order, Task, collate, make_tasks, seeded

CHECKPOINT = "checkpoint.pt"
NO_DECAY = ("*token*", "*pos_embed*", "*bias_table*", "*cpb_mlp*", "*logit_scale*", "*.A_log")
"""Parameters without weight decay besides vectors: tokens, position tables, and what SwinV2's and
Mamba's authors leave out."""


class NotFiniteError(ValueError):
    """The loss or the gradient of a step is infinite or not a number."""


class Objective(nn.Module):
    """Model and losses as one module, the shape in which several processes share gradients."""

    def __init__(self, model: XT, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.model, self.tasks = model, tasks

    def forward(
        self, batches: Mapping[str, Batch]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """By task: mean loss over its batch, and the output of its head."""
        losses, outputs = {}, {}
        for name, batch in batches.items():
            losses[name], outputs[name] = self.tasks[name].loss(
                self.model, batch, training=self.training
            )
        return losses, outputs


def fit(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    on_start: Callable[[int, int], object] = lambda step, steps: None,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
    on_validation: Callable[[dict[str, float]], object] = lambda metrics: None,
) -> dict[str, float]:
    """Trains what the recipe says and leaves the folder `out`; returns the last validation.

    device: "auto" takes what accelerate finds, "cpu" the processor.
    on_start: called with the steps done before and all steps; on_step: with each step done and its
        loss; on_validation: with step, epoch, loss and metrics. In the first process only.

    The same call after any end goes on from `<out>.part/checkpoint.pt` and gives the same losses
    and weights, bit for bit where the processor computes alike.

    Raises ValueError for data or a recipe that cannot work, before any work, and if `<out>.part`
    was begun with another recipe or other data; NotFiniteError, naming the step, when a loss or
    gradient is not finite: the checkpoint stays as it was. Any other end leaves a checkpoint of the
    last step, and one before the first step nothing.
    """
    need("xt train", "accelerate", "accelerate", "train")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    part_of(out)
    tasks = make_tasks(recipe)
    model = build_model(recipe, tasks)
    for task in tasks.values():
        task.in_chans = model.config.in_chans
        task.item("train", 0, None)  # the first image is one that the model takes
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=PRECISIONS[recipe.train.precision],
        # Not every parameter of every backbone and head takes part in every step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    try:
        fitter = _Fitter(recipe, tasks, model, accelerator)
        with fitter.folder(Path(out)):
            last = fitter.run(on_start, on_step, on_validation)
        accelerator.end_training()
        return last
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # device and precision were global


def build_model(recipe: Recipe, tasks: Mapping[str, Task]) -> XT:
    """The model of a recipe before its first step, with a head for each task."""
    want = recipe.model
    fields = [task.model_fields() for task in tasks.values()]
    head_fields = {
        "num_classes": max(each["num_classes"] for each in fields),
        "heads": {name: head for each in fields for name, head in each.get("heads", {}).items()},
    }
    if want.weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            model = _with_heads(XT.from_pretrained(want.weights), head_fields)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomWeightsWarning)  # they are about to be trained
            model = _new_model(recipe, head_fields)
    for task in tasks.values():
        model.class_names[task.head or "head"] = task.classes
    return model


def _new_model(recipe: Recipe, head_fields: dict[str, Any]) -> XT:
    want = recipe.model
    try:
        return create_model(
            want.name,
            context=None if want.context == "none" else want.context,
            pretrained=want.pretrained,
            seed=recipe.train.seed,
            **(dict(want.fields or {}) | head_fields),
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"{error} Random weights in a recipe: --set model.pretrained=false."
        ) from error


def _with_heads(model: XT, fields: dict[str, Any]) -> XT:
    """The same trunk and heads, with the heads of `fields`, whose weights are kept where their
    shapes are."""
    old = model.config
    heads = old.heads | fields["heads"]
    new = XT(replace(old, num_classes=fields["num_classes"] or old.num_classes, heads=heads))
    new.class_names = dict(model.class_names)
    known = model.state_dict()
    for name, tensor in new.state_dict().items():
        if name in known and known[name].shape == tensor.shape:
            tensor.copy_(known[name])
    return new


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: no weight decay for vectors (norms, biases, Mamba's D) and `NO_DECAY`."""
    from timm.optim import param_groups_weight_decay

    groups: list[dict[str, Any]] = param_groups_weight_decay(
        model, weight_decay, no_weight_decay_list=NO_DECAY
    )
    return groups


def learning_rate(train: Train, step: int, steps: int, per_epoch: float) -> float:
    """Of step `step`, counted from 0: linear warm-up, then a cosine to `min_lr` of the highest."""
    warm = round(train.warmup_epochs * per_epoch)
    if step < warm:
        return train.lr * (step + 1) / (warm + 1)
    done = (step - warm) / max(steps - 1 - warm, 1)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return train.lr * (train.min_lr + (1 - train.min_lr) * cosine)


class _Positions:
    """Batches of positions in the training order, for one process: micro-batch after micro-batch
    from a step on. The batch of a step is the same for any number of processes."""

    def __init__(self, train: Train, start: int, steps: int, rank: int, world: int) -> None:
        self.train, self.start, self.steps = train, start, steps
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        size = self.train.batch_size // self.train.accumulate // self.world
        for step in range(self.start, self.steps):
            for micro in range(self.train.accumulate):
                first = step * self.train.batch_size
                first += (micro * self.world + self.rank) * size
                yield list(range(first, first + size))

    def __len__(self) -> int:
        return (self.steps - self.start) * self.train.accumulate


class _Log:
    """A CSV file that grows; its columns are those of the first row. `length` is what a checkpoint
    keeps of it."""

    def __init__(self, path: Path, length: int) -> None:
        if length:
            os.truncate(path, length)
        self._file = path.open("a" if length else "w", newline="")
        self._has_header = length > 0

    def add(self, row: dict[str, Any]) -> None:
        writer = csv.DictWriter(self._file, list(row), lineterminator="\n")
        if not self._has_header:
            writer.writeheader()
            self._has_header = True
        writer.writerow(row)

    @property
    def length(self) -> int:
        """Bytes so far, which are on disk then."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Fitter:
    """One run: what `fit` puts together."""

    def __init__(
        self, recipe: Recipe, tasks: Mapping[str, Task], model: XT, accelerator: Any
    ) -> None:
        self.recipe, self.tasks, self.accelerator = recipe, tasks, accelerator
        train, world = recipe.train, accelerator.num_processes
        parts = train.accumulate * world
        mixes_pairs = any(task.mixes_pairs for task in tasks.values())
        if train.batch_size % (parts * (2 if mixes_pairs else 1)):
            raise ValueError(
                f"train.batch_size must be a multiple of train.accumulate x processes = "
                f"{train.accumulate} x {world}{', twice for mixup and cutmix' * mixes_pairs}, "
                f"got {train.batch_size}."
            )
        model.recompute = train.recompute or None
        self.per_epoch = max(task.length("train") for task in tasks.values()) / train.batch_size
        self.steps = max(1, math.ceil(train.epochs * self.per_epoch))
        self.validate_every = max(1, math.ceil(train.validate_every * self.per_epoch))
        self.model = model
        self.optimizer = torch.optim.AdamW(
            weight_decay_groups(model, train.weight_decay),
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
        )
        data = {name: task.identity() for name, task in tasks.items()}
        self.identity = {"recipe": recipe.to_dict(), "data": data.get("", data)}
        self.identity["recipe"]["train"].pop("workers")  # changes no result
        self.identity = json.loads(json.dumps(self.identity))
        self.step = 0
        self.is_whole = True  # weights, optimizer and logs are those of `step`
        self.best: float | None = None
        self.last: dict[str, float] = {}
        self.lengths = {"log.csv": 0, "validation.csv": 0}

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @contextmanager
    def folder(self, out: Path) -> Iterator[None]:
        """`out.part`, locked, with what an earlier run left loaded; becomes `out` at the end."""
        self.part = part_of(out)
        with ExitStack() as stack:
            if self.is_main:
                self.part.mkdir(exist_ok=True)
                stack.enter_context(locked(self.part))
            self.accelerator.wait_for_everyone()
            self._load()
            self._saved = self.step
            try:
                yield
            except BaseException:
                if self.is_main and not self.step:
                    shutil.rmtree(self.part, ignore_errors=True)
                raise
            if self.is_main:
                os.rename(self.part, out)
                sync_folder(out.absolute().parent)

    def _load(self) -> None:
        path = self.part / CHECKPOINT
        if not path.exists():
            if (self.part / RECORD).exists():  # only the renaming is left to do
                self.step = self.steps
                self.last = (read_record(self.part) or {})["validation"]
                return
            strange = [p.name for p in self.part.iterdir() if p.suffix != ".part"]
            if strange and self.is_main:
                raise FileExistsError(
                    f"{self.part} holds {strange[0]} and no {CHECKPOINT}: remove it, or name "
                    f"another output."
                )
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = list(changes(state["identity"], self.identity))
        if found:
            raise ValueError(
                f"{self.part} was begun differently: {'; '.join(found[:4])}. Repeat the command "
                f"as it was, or remove {self.part} to start again."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]
        self.last, self.lengths = state["last"], state["lengths"]

    def _save(self, logs: list[_Log]) -> None:
        """Writes the checkpoint, whole or not at all."""
        self.lengths = dict(zip(self.lengths, (log.length for log in logs), strict=True))
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "last": self.last,
            "lengths": self.lengths,
        }
        part = self.part / (CHECKPOINT + ".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.part / CHECKPOINT)
        sync_folder(self.part)
        self._saved = self.step

    def run(
        self,
        on_start: Callable[[int, int], object],
        on_step: Callable[[int, float], object],
        on_validation: Callable[[dict[str, float]], object],
    ) -> dict[str, float]:
        """All steps that are left, then the model and the record."""
        if not (self.part / CHECKPOINT).exists() and self.step:
            return self.last
        train, began = self.recipe.train, time.perf_counter()
        objective, optimizer = self.accelerator.prepare(
            Objective(self.model, self.tasks), self.optimizer
        )
        positions = _Positions(
            train, self.step, self.steps,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        batches = self._batches(positions, Order(self.tasks, train.seed))
        with ExitStack() as stack:
            logs: list[_Log] = []
            board = _Board(None)
            if self.is_main:
                on_start(self.step, self.steps)
                for name, length in self.lengths.items():
                    logs.append(stack.enter_context(_Log(self.part / name, length)))
                board = _board(self.part, self.step)
                stack.callback(board.close)
                if not self.step:
                    self._save(logs)  # a kill before the next one starts again
            try:
                # A run may have been stopped between a step and its validation.
                self._validate_if_due(objective, logs, board, on_validation)
                while self.step < self.steps:
                    loss = self._advance(objective, optimizer, batches, logs, board)
                    if self.is_main:
                        on_step(self.step, loss)
                    has_looked = self._validate_if_due(objective, logs, board, on_validation)
                    is_due = has_looked or self.step % train.checkpoint_every == 0
                    if self.is_main and (is_due or self.step == self.steps):
                        self._save(logs)
            except NotFiniteError:
                raise  # with these weights the same would come again
            except BaseException:
                if self.is_main and self.is_whole and self.step > self._saved:
                    with suppress(OSError):  # a full disk, which the checkpoint before outlives
                        self._save(logs)
                raise
        if self.is_main:
            self._keep("model")
            record = self._record() | {"seconds_since_last_start": time.perf_counter() - began}
            write_record(self.part, record, but=CHECKPOINT)
            (self.part / CHECKPOINT).unlink()
        self.accelerator.wait_for_everyone()
        return self.last

    def _record(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "steps": self.steps,
            "validation": self.last,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "versions": {
                "xt_kernels": xt_kernels.__version__,
                "torch": torch.__version__,
                "timm": version("timm"),
                "accelerate": version("accelerate"),
                "python": platform.python_version(),
            },
        }

    def _advance(
        self,
        objective: nn.Module,
        optimizer: Any,
        batches: Iterator[dict[str, Batch]],
        logs: list[_Log],
        board: _Board,
    ) -> float:
        """One step and its line in the log; its loss."""
        lr = learning_rate(self.recipe.train, self.step, self.steps, self.per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Running statistics change in the forward pass: a step that is stopped leaves them as they
        # were, and with them a whole state to save.
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            losses, norm = self._gradient(objective, batches)
        except BaseException:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise
        self.is_whole = False
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        if self.is_main:
            row = {"step": self.step, "epoch": self.step / self.per_epoch, "lr": lr}
            row |= losses | {"grad_norm": norm}
            logs[0].add(row)
            board.add(row)
        self.is_whole = True
        return losses["loss"]

    def _gradient(
        self, objective: nn.Module, batches: Iterator[dict[str, Batch]]
    ) -> tuple[dict[str, float], float]:
        """Losses and gradient norm of the next step, the gradient cut; all are finite."""
        train, accelerator = self.recipe.train, self.accelerator
        objective.train()
        total = torch.zeros(len(self.tasks), dtype=torch.float64)
        for micro in range(train.accumulate):
            batch = next(batches)
            is_last = micro + 1 == train.accumulate
            place = train.seed, self.step, micro, accelerator.process_index
            with seeded(*place), nullcontext() if is_last else accelerator.no_sync(objective):
                batch = {name: task.mix(self.model, batch[name])
                         for name, task in self.tasks.items()}  # fmt: skip
                losses, _ = objective(batch)
                loss = sum(self.recipe.tasks[name].weight * losses[name] for name in self.tasks)
                accelerator.backward(loss / train.accumulate)
            total += torch.stack([x.detach().double().cpu() for x in losses.values()])
        total = accelerator.reduce((total / train.accumulate).to(accelerator.device), "mean")
        means = self._with_sum(dict(zip(self.tasks, total.tolist(), strict=True)))
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), train.clip or math.inf))
        for name, value in [*reversed(means.items()), ("gradient", norm)]:  # tasks before their sum
            if not math.isfinite(value):
                kept = f"{self.part / CHECKPOINT} is that of step {self._saved}"
                where = kept if self.step else "no step was done before it"
                raise NotFiniteError(
                    f"Step {self.step + 1}: the {name} must be finite, got {value}; {where}."
                )
        return means, norm

    def _with_sum(self, losses: Mapping[str, float]) -> dict[str, float]:
        """ "loss", and of several tasks that of each, "TASK/loss", as they are weighted in it."""
        weights = {name: self.recipe.tasks[name].weight for name in losses}
        out = {"loss": sum(weights[name] * loss for name, loss in losses.items())}
        return out | {f"{name}/loss": loss for name, loss in losses.items() if name}

    def _validate_if_due(
        self,
        objective: nn.Module,
        logs: list[_Log],
        board: _Board,
        on_validation: Callable[[dict[str, float]], object],
    ) -> bool:
        """Validates the model of this step where that is due and not done; whether it was."""
        is_due = self.step == self.steps or self.step % self.validate_every == 0
        is_done = not self.step or self.last.get("step") == self.step
        tasks = {name: task for name, task in self.tasks.items() if task.length("val")}
        if is_done or not is_due or not tasks:
            return False
        found = {"step": self.step, "epoch": self.step / self.per_epoch}
        losses, metrics = {}, {}
        for name, task in tasks.items():
            losses[name], metrics[name] = self._validate(objective, name, task)
        found |= self._with_sum(losses)
        for name, values in metrics.items():
            found |= {f"{name}/{key}" if name else key: value for key, value in values.items()}
        score = sum(metrics[name][task.best] for name, task in tasks.items()) / len(tasks)
        is_best = self.best is None or score > self.best
        if self.is_main:
            if is_best:
                self._keep("best")
            logs[1].add(found)
            board.add(found, "validation/")
        self.last = found
        self.best = score if is_best else self.best
        if self.is_main:
            on_validation(found)
        return True

    @torch.no_grad()
    def _validate(
        self, objective: nn.Module, name: str, task: Task
    ) -> tuple[float, dict[str, float]]:
        """Loss and metrics over all validation images of a task, which the processes share."""
        from accelerate.utils import gather_object

        accelerator, train = self.accelerator, self.recipe.train
        rank, world = accelerator.process_index, accelerator.num_processes
        mine = list(range(rank, task.length("val"), world))
        size = 1 if task.whole_images else train.batch_size // train.accumulate // world
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        objective.eval()
        records: list[Any] = []
        losses: list[tuple[float, int]] = []
        for batch in self._batches(batches, InOrder(name, task)):
            loss, output = self.accelerator.unwrap_model(objective, keep_fp32_wrapper=True)(batch)
            records += task.record(self.model, output[name], batch[name])
            losses.append((float(loss[name]), len(batch[name].images)))
        records, losses = gather_object(records), gather_object(losses)
        count = sum(n for _, n in losses)
        return sum(x * n for x, n in losses) / count, task.metrics(records)

    def _batches(self, indices: Any, items: Order | InOrder) -> Iterator[dict[str, Batch]]:
        """The batches of these lists of items by task, on the device."""
        from accelerate.utils import send_to_device

        device, workers = self.accelerator.device, self.recipe.train.workers
        for batch in DataLoader(
            items,
            batch_sampler=indices,
            num_workers=workers,
            collate_fn=partial(collate, self.tasks),
            pin_memory=device.type == "cuda",
        ):
            if isinstance(batch, Exception):
                raise batch
            yield send_to_device(batch, device, non_blocking=True)

    def _keep(self, name: str) -> None:
        """Saves the model as the folder `name`, whole or not at all."""
        part = self.part / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        self.model.save_pretrained(part)
        shutil.rmtree(self.part / name, ignore_errors=True)
        os.rename(part, self.part / name)


class _Board:
    """TensorBoard's event files, where it is installed."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, row: dict[str, float], prefix: str = "") -> None:
        for name, value in row.items():
            if self._writer is not None and name != "step":
                self._writer.add_scalar(prefix + name, value, int(row["step"]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _board(folder: Path, step: int) -> _Board:
    """Of a run that has done `step` steps."""
    if find_spec("tensorboard") is None:
        return _Board(None)
    from torch.utils.tensorboard import SummaryWriter

    return _Board(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))
