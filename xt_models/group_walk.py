"""Heads on groups of regions, run as soon as the walk has brought all of a group.

What a group waits for stays on the model's device: with groups of one region nothing beyond the
chunk, with larger groups and row-major chunks as many rows of regions as a group is high.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from xt_kernels.regions import RegionGrid

from .heads import Group, GroupHead
from .heads.base import join_regions, one_group
from .model import XT
from .output import region_tokens

REGIONS_AT_ONCE = 16
"""Regions that a head sees in one call, over all its groups; at least one group."""

Held = dict[str, torch.Tensor]
"""What is kept of a region: "tokens" `[t, t, C]`, and stages by number, `[s_i, s_i, C_i]`."""


class Piece(NamedTuple):
    """What a head says about one group: a raw output whose first axis has one entry."""

    name: str
    group: Group
    raw: Any


class GroupWalk:
    """Takes chunks as they come and gives pieces as their groups are complete.

    names: heads to run. seen: regions of chunks before. held: what `held` was after them.
    """

    def __init__(
        self,
        model: XT,
        grid: RegionGrid,
        names: Sequence[str],
        seen: Sequence[int] = (),
        held: dict[int, Held] | None = None,
    ) -> None:
        self._grid, self._stride = grid, model.stride
        self._heads: dict[str, GroupHead] = {n: model.group_heads[n] for n in names}
        self._groups = {name: head.groups(grid) for name, head in self._heads.items()}
        self._missing = {n: [g.rows * g.cols for g in gs] for n, gs in self._groups.items()}
        self._groups_of: dict[int, list[tuple[str, int]]] = {}
        for name, groups in self._groups.items():
            for i, group in enumerate(groups):
                for region in _members(group, grid):
                    self._groups_of.setdefault(region, []).append((name, i))
        self._waiting = {region: len(users) for region, users in self._groups_of.items()}
        numbers = {i for head in self._heads.values() for i in head.stages}
        encoder, side = model.region_encoder, grid.region
        self._shapes = {"tokens": (side // model.stride,) * 2 + (model.num_features,)} | {
            str(i): (side // encoder.strides[i],) * 2 + (encoder.channels[i],) for i in numbers
        }
        self.held = {} if held is None else held
        self._let_go(self._arrive(seen))

    def add(
        self,
        regions: Sequence[int],
        tokens: torch.Tensor,
        stages: Mapping[int, Mapping[int, torch.Tensor]],
        left_out: Sequence[int],
    ) -> Iterator[Piece]:
        """tokens: `[L, C]` of `regions`, row-major over them. stages: region -> number -> map
        `[s_i, s_i, C_i]`. left_out: regions of the chunk without tokens; heads see zeros there."""
        side = self._shapes["tokens"][0]
        if regions and self._heads:
            for region, part in region_tokens(tokens, self._grid, regions, self._stride):
                edges = (0, 0, 0, side - part.shape[1], 0, side - part.shape[0])
                self.held[region] = {"tokens": F.pad(part, edges)}
                for i, stage in stages.get(region, {}).items():
                    self.held[region][str(i)] = stage
        complete = self._arrive([*regions, *left_out])
        for name, numbers in complete.items():
            head, groups = self._heads[name], [self._groups[name][i] for i in sorted(numbers)]
            size = max(REGIONS_AT_ONCE // (groups[0].rows * groups[0].cols), 1)
            for start in range(0, len(groups), size):
                some = groups[start : start + size]
                stage_maps = {i: self._maps(str(i), some, tokens) for i in head.stages}
                raw = head(self._maps("tokens", some, tokens), stage_maps)
                for k, group in enumerate(some):
                    yield Piece(name, group, one_group(raw, k))
        self._let_go(complete)

    def _arrive(self, regions: Sequence[int]) -> dict[str, list[int]]:
        """Counts regions; the groups that are complete by them, by head."""
        complete: dict[str, list[int]] = {}
        for region in regions:
            for name, i in self._groups_of.get(region, ()):
                self._missing[name][i] -= 1
                if not self._missing[name][i]:
                    complete.setdefault(name, []).append(i)
        return complete

    def _let_go(self, complete: dict[str, list[int]]) -> None:
        """Forgets regions that no group waits for any more."""
        for name, numbers in complete.items():
            for i in numbers:
                for region in _members(self._groups[name][i], self._grid):
                    self._waiting[region] -= 1
                    if not self._waiting[region]:
                        self.held.pop(region, None)

    def _maps(self, key: str, groups: list[Group], like: torch.Tensor) -> torch.Tensor:
        """Maps `[N, C, h, w]` of groups."""
        nothing: Held = {key: like.new_zeros(self._shapes[key])}
        parts = [
            self.held.get(region, nothing)[key]
            for group in groups
            for region in _members(group, self._grid)
        ]
        rows, cols = groups[0].rows, groups[0].cols
        grid = torch.stack(parts).view(len(groups), rows, cols, *self._shapes[key])
        return join_regions(grid).permute(0, 3, 1, 2)


def _members(group: Group, grid: RegionGrid) -> Iterator[int]:
    """Region numbers of a group, row-major."""
    for row in range(group.row, group.row + group.rows):
        yield from range(row * grid.cols + group.col, row * grid.cols + group.col + group.cols)
