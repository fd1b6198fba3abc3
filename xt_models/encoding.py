"""Regions to features in batches of one shape, each set of equal regions once.

Why reuse changes no bit: batches never change their shape (the last one is filled up with whatever
lies in the buffer), and in a batch of one shape a region gives the same bits in every slot. The
second is a property of the libraries below PyTorch, so it is not assumed: the first time that a
region could be reused, one batch of copies is encoded and its slots are compared. Where they
differ, nothing is reused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from operator import itemgetter
from weakref import WeakKeyDictionary

import numpy as np
import torch

from .model import XT, Encoded
from .reading import Key, Pixels, same_bytes

COMPILER = "inductor"
"""Backend of torch.compile."""

CACHE_BYTES = 16 << 20
"""Pixels and features kept of regions seen lately, in case they come again; and as much once more
of uniform regions and of those that did."""


class Features:
    """Where the features of one region will be: row `index` of the outputs of its batch.

    batch: as `XT.encode` returns it, None until the region is encoded. region: its number. keep:
    outlive the batch.
    """

    __slots__ = ("batch", "index", "keep", "region")

    def __init__(self, region: int) -> None:
        self.region, self.keep, self.index = region, False, 0
        self.batch: Encoded | None = None

    def stages(self) -> dict[int, torch.Tensor]:
        """Earlier stages of the region, `[s_i, s_i, C_i]`."""
        assert self.batch is not None
        return {i: stage[self.index] for i, stage in self.batch.stages.items()}

    def settle(self, batch: Encoded, index: int) -> None:
        """Takes the row `index` of a batch that was just encoded."""
        self.batch, self.index = batch, index
        if self.keep:
            self.outlive()

    def outlive(self) -> None:
        """Lets go of the rest of the batch."""
        self.keep = True
        if self.batch is None or len(self.batch.features) == 1:
            return
        row = slice(self.index, self.index + 1)
        self.batch, self.index = self.batch.map(lambda t: t[row].clone()), 0


class BatchEncoder:
    """`model.encode` on batches of one shape.

    regions: the buffer `[batch_size, C, s, s]` to fill. encode() may be called when only its first
    rows are new; the others hold older regions, or zeros. rows: how many are encoded at once.
    precision: dtype of the region encoder; what follows it keeps the model's. stages: of
    `model.encode`. compiled: under torch.compile, on CUDA with CUDA graphs; `warm_up` compiles.
    """

    def __init__(
        self,
        model: XT,
        batch_size: int,
        precision: torch.dtype | None = None,
        stages: bool = False,
        compiled: bool = False,
    ) -> None:
        parameter = next(model.parameters())
        precision = precision or parameter.dtype
        # A copy, so that the caller's weights stay as they are.
        self._copy = None
        if precision != parameter.dtype:
            self._copy = deepcopy(model.region_encoder).to(precision)
        side = model.config.region
        self._model, self._stages, self._compiled = model, stages, compiled
        self.rows = batch_size
        self.regions = torch.zeros(
            batch_size, model.config.in_chans, side, side,
            device=parameter.device, dtype=precision,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compiles, where that is asked for and was not done for this model and shape."""
        warm = _WARM.setdefault(self._model, set())
        if self._compiled and self._kind() not in warm:
            # On CUDA: compile, record the graph, replay it.
            for _ in range(3 if self.regions.is_cuda else 1):
                self.encode()
            warm.add(self._kind())

    def encode(self) -> Encoded:
        """What `XT.encode` gives of the buffer.

        Where the device has no memory for all rows at once, half as many are encoded at a time,
        from then on. Raises torch.OutOfMemoryError if there is none for one row.
        """
        parts = None
        while parts is None:
            try:
                parts = list(self._parts())
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows = -(-self.rows // 2)
            # Outside the handler: its traceback holds the activations of the attempt.
            if parts is None and self.regions.is_cuda:
                torch.cuda.empty_cache()
        return Encoded.cat(parts)

    def _parts(self) -> Iterator[Encoded]:
        """Outputs of the buffer, `rows` at a time; the last part overlaps the one before rather
        than have another shape."""
        for start in range(0, len(self.regions), self.rows):
            begin = min(start, len(self.regions) - self.rows)
            batch = self._encode(self.regions[begin : begin + self.rows])
            yield batch.map(itemgetter(slice(start - begin, None)))

    def _encode(self, regions: torch.Tensor) -> Encoded:
        if not self._compiled:
            return self._model.encode(regions, self._copy, stages=self._stages)
        encode = _compiled_encode(COMPILER, regions.is_cuda)
        if not regions.is_cuda:
            return encode(self._model, regions, self._copy, stages=self._stages)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # The next replay writes over what a graph returns, and features outlive their batch.
        return encode(self._model, regions, self._copy, stages=self._stages).map(torch.clone)

    def _kind(self) -> object:
        """What compiling and rounding depend on, besides the model."""
        return (
            self.rows, self.regions.shape, self.regions.dtype, self.regions.device,
            torch.get_num_threads(), self._stages, self._compiled,
        )  # fmt: skip

    def slots_agree(self) -> bool:
        """Whether a region's features do not depend on its slot, bit for bit. Encodes one batch the
        first time that it is asked for a model, shape, type and number of threads."""
        regions = self.regions[: self.rows]
        key = self._kind()
        known = _AGREE.setdefault(self._model, {})
        if key not in known:
            noise = torch.Generator().manual_seed(0)
            one = torch.randn(regions.shape[1:], generator=noise).to(regions)
            encoded = self._encode(one.expand_as(regions).contiguous())
            outputs = [encoded.features, encoded.raw, *encoded.stages.values()]
            known[key] = all(bool((o == o[:1]).all()) for o in outputs if o is not None)
        return known[key]


@lru_cache
def _compiled_encode(backend: str, is_cuda: bool) -> Callable[..., Encoded]:
    """`XT.encode`, compiled once for each kind of model and shape of batch."""
    mode = "reduce-overhead" if is_cuda and backend == "inductor" else None
    return torch.compile(XT.encode, dynamic=False, backend=backend, mode=mode)


def rows_of_a_batch(visits: int, batch_size: int, compiled: bool) -> int:
    """Regions a batch, at most `batch_size`, as even as can be: 17 regions in batches of up to 16
    are two of 9, not one full and one of 1. Where the encoder is compiled for one shape, images of
    every size have it."""
    return batch_size if compiled else -(-visits // -(-visits // batch_size))


_WARM: WeakKeyDictionary[XT, set[object]] = WeakKeyDictionary()
_AGREE: WeakKeyDictionary[XT, dict[object, bool]] = WeakKeyDictionary()


class Seen:
    """The regions seen so far that can be reused, within a budget of memory.

    region_bytes: of the pixels and features of one region.
    """

    def __init__(self, region_bytes: int) -> None:
        self._limit = max(CACHE_BYTES // region_bytes, 1)
        self._lately: OrderedDict[Key, tuple[Pixels | None, Features]] = OrderedDict()
        self._again: OrderedDict[Key, tuple[Pixels | None, Features]] = OrderedDict()

    def find(self, key: Key, pixels: Pixels) -> Features | None:
        """The features of an earlier region with the same bytes. pixels: `[C, h, w]`."""
        for entries in (self._again, self._lately):
            if key not in entries:
                continue
            known, features = entries[key]
            if known is not None and not same_bytes(pixels, known):
                continue
            if entries is self._lately:
                del entries[key]
                features.outlive()
                known = np.array(known)
            self._put(self._again, key, known, features)
            return features
        return None

    def add(self, key: Key, pixels: Pixels, features: Features) -> None:
        """Remembers a region that is about to be encoded. pixels: a view that nobody changes."""
        if key.uniform:
            features.outlive()
            self._put(self._again, key, None, features)
        else:
            self._put(self._lately, key, pixels, features)

    def _put(
        self,
        entries: OrderedDict[Key, tuple[Pixels | None, Features]],
        key: Key,
        pixels: Pixels | None,
        features: Features,
    ) -> None:
        entries[key] = pixels, features
        entries.move_to_end(key)
        if len(entries) > self._limit:
            entries.popitem(last=False)
