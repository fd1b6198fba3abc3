"""Real handwritten digits and cues, 8 x 8 px each, and a carrier that hides them from averages."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..host import need

CLASSES, SPLIT_SEED = 10, 0


class Digits(NamedTuple):
    """Digit images `[N, 8, 8]` in [0, 1], sorted by class; class k is `starts[k]:starts[k + 1]`."""

    images: torch.Tensor
    starts: torch.Tensor


def load() -> tuple[Digits, Digits]:
    """Training and test digits: 1,797 real ones, three quarters and one quarter of each class."""
    need("digits", "sklearn", "scikit-learn", "train")
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    target = torch.from_numpy(data.target)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for digit in range(CLASSES):
        ids = torch.nonzero(target == digit).flatten()
        ids = ids[torch.randperm(len(ids), generator=generator)]
        cut = len(ids) * 3 // 4
        parts[0].append(images[ids[:cut]])
        parts[1].append(images[ids[cut:]])
    train, test = (
        Digits(torch.cat(part), torch.tensor([0, *map(len, part)]).cumsum(0)) for part in parts
    )
    return train, test


def pick(digits: Digits, classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A digit of each class, uniformly: image numbers of the shape of `classes`."""
    counts = digits.starts.diff()[classes]
    # 2^40 random values over fewer than 200 digits: their odds differ by less than 2^-32.
    random = torch.randint(1 << 40, classes.shape, generator=generator)
    return digits.starts[classes] + random % counts


def cues() -> torch.Tensor:
    """The cue for each region, `[4, 8, 8]`: a map of the image, the named quarter bright."""
    out = torch.full((4, 8, 8), 0.25)
    for region in range(4):
        row, col = region // 2 * 4, region % 2 * 4
        out[region, row : row + 4, col : col + 4] = 1
    return out


def carried(signal: torch.Tensor, times: int) -> torch.Tensor:
    """signal `[.., h, w]` enlarged by an even number of times, on the carrier (-1)^(row + column):
    the mean of each 2 x 2 block is exactly zero."""
    signal = signal.repeat_interleave(times, -2).repeat_interleave(times, -1)
    height, width = signal.shape[-2:]
    carrier = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(height // 2, width // 2)
    return signal * carrier
