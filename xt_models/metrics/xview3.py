"""The measures of xView3-SAR (Paolo et al. 2022, arXiv 2206.00897, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xt_kernels._checks import fail

Array = np.ndarray[Any, np.dtype[Any]]
Objects = Mapping[str, Any]


def xview3_scores(
    predictions: Sequence[Objects],
    targets: Sequence[Objects],
    shorelines: Sequence[Any] | None = None,
    *,
    pixel_m: float = 10.0,
    tolerance_m: float = 200.0,
    shore_km: float = 2.0,
) -> dict[str, float]:
    """Each in [0, 1]: detection_f1 with its precision and recall, shore_f1, vessel_f1, fishing_f1,
    length (1 less the mean relative error), and
    aggregate = detection_f1 * (1 + length + vessel_f1 + fishing_f1 + shore_f1) / 5.

    predictions: one dict a scene, arrays `[N]`: row, col in pixels; is_vessel, is_fishing (bool, or
        scores that count from 0.5); length_m.
    targets: the same, with is_vessel, is_fishing 1, 0 or -1 and length_m NaN where unknown;
        optional shore_km, distance to the shore, and is_low, bool: labels of low confidence, which
        are left out together with the predictions that match them.
    shorelines: points `[P, 2]` of each scene's shore, row and column in pixels; shore_f1 is 0
        without.
    pixel_m: metres a pixel. tolerance_m: below which distance a prediction and an object can match;
        of all such pairs those are matched whose number is largest and total distance smallest.
    shore_km: up to which distance an object is close to the shore, and tolerance_m more for a
        prediction.

    F1 of detections is over all scenes at once; of vessels over the matched objects whose answer is
    known; of fishing over those of them that are vessels.
    Raises ValueError for lists of other lengths, columns of other lengths, and predictions that are
    not finite.
    """
    if len(predictions) != len(targets):
        rule = f"be one dict a scene = {len(targets)}"
        fail("xview3_scores", "predictions", rule, len(predictions))
    if shorelines is not None and len(shorelines) != len(targets):
        rule = f"be one array a scene = {len(targets)}"
        fail("xview3_scores", "shorelines", rule, len(shorelines))
    found, shore, vessel, fishing = (np.zeros(3, dtype=int) for _ in range(4))  # tp, fp, fn
    errors: list[float] = []
    for i, (scene, truth) in enumerate(zip(predictions, targets, strict=True)):
        _check_columns("predictions", scene, i, finite=(*_PLACE, *_ANSWERS))
        _check_columns("targets", truth, i, finite=_PLACE)
        ours, theirs = _places(scene), _places(truth)
        is_low = np.asarray(truth.get("is_low", np.zeros(len(theirs))), dtype=bool)
        pairs = _match(ours, theirs, tolerance_m / pixel_m)
        left_out = {p for p, t in pairs if is_low[t]}
        kept = np.array([p for p in range(len(ours)) if p not in left_out], dtype=int)
        pairs = [(p, t) for p, t in pairs if not is_low[t]]
        found += _counts(len(pairs), len(kept), int((~is_low).sum()))
        if shorelines is not None:
            reach = (shore_km * 1000 + tolerance_m) / pixel_m
            near = kept[_distance(ours[kept], shorelines[i]) <= reach]
            if "shore_km" in truth:
                close = np.asarray(truth["shore_km"], dtype=float) <= shore_km
            else:
                close = _distance(theirs, shorelines[i]) <= shore_km * 1000 / pixel_m
            close &= ~is_low
            matched = _match(ours[near], theirs[close], tolerance_m / pixel_m)
            shore += _counts(len(matched), len(near), int(close.sum()))
        for p, t in pairs:
            wants = {name: int(truth[name][t]) for name in ("is_vessel", "is_fishing")}
            says = {name: float(scene[name][p]) >= 0.5 for name in wants}
            vessel += _judge(says["is_vessel"], wants["is_vessel"])
            if wants["is_vessel"] == 1:
                fishing += _judge(says["is_fishing"], wants["is_fishing"])
            length = float(truth["length_m"][t])
            if length == length:
                errors.append(abs(float(scene["length_m"][p]) - length) / length)
    detection = _f1(found)
    parts = {
        "length": 1 - min(float(np.mean(errors)), 1.0) if errors else 0.0,
        "vessel_f1": _f1(vessel),
        "fishing_f1": _f1(fishing),
        "shore_f1": _f1(shore),
    }
    tp, fp, fn = (int(n) for n in found)
    return {
        "aggregate": detection * (1 + sum(parts.values())) / 5,
        "detection_f1": detection,
        "precision": tp / (tp + fp) if tp else 0.0,
        "recall": tp / (tp + fn) if tp else 0.0,
        **parts,
    }


_PLACE, _ANSWERS = ("row", "col"), ("is_vessel", "is_fishing", "length_m")


def _check_columns(what: str, objects: Objects, scene: int, finite: tuple[str, ...]) -> None:
    """Columns are as long as the first one; those of `finite` hold finite numbers."""
    count = len(objects["row"])
    for name in (*_PLACE, *_ANSWERS, *(n for n in ("shore_km", "is_low") if n in objects)):
        values = np.asarray(objects[name], dtype=float)
        if values.shape != (count,):
            rule = f"have {name} [N] = [{count}], scene {scene}"
            fail("xview3_scores", what, rule, list(values.shape))
        if name in finite and not np.isfinite(values).all():
            rule = f"have a finite {name}, scene {scene}"
            fail("xview3_scores", what, rule, float(values[~np.isfinite(values)][0]))


def _places(objects: Objects) -> Array:
    """`[N, 2]`, row and column."""
    rows, cols = (np.asarray(objects[name], dtype=float) for name in ("row", "col"))
    return np.stack([rows, cols], 1)


def _match(ours: Array, theirs: Array, limit: float) -> list[tuple[int, int]]:
    """Pairs nearer than `limit`: as many as can be, and of those the nearest in sum."""
    from scipy.optimize import linear_sum_assignment

    if not len(ours) or not len(theirs):
        return []
    distance = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    # One pair that is too far costs more than all others together.
    far = limit * (min(len(ours), len(theirs)) + 1)
    rows, cols = linear_sum_assignment(np.where(distance < limit, distance, far))
    pairs = zip(rows.tolist(), cols.tolist(), strict=True)
    return [(p, t) for p, t in pairs if distance[p, t] < limit]


def _distance(places: Array, shore: Any) -> Array:
    """To the nearest point of a shore, pixels; infinite where there is none."""
    from scipy.spatial import KDTree

    points = np.asarray(shore, dtype=float).reshape(-1, 2)
    if not len(points) or not len(places):
        return np.full(len(places), np.inf)
    return np.asarray(KDTree(points).query(places)[0])


def _counts(matched: int, ours: int, theirs: int) -> Array:
    return np.array([matched, ours - matched, theirs - matched])


def _judge(says: bool, wants: int) -> Array:
    """tp, fp, fn of one answer; nothing where it is unknown."""
    return np.array([says and wants == 1, says and wants == 0, not says and wants == 1], dtype=int)


def _f1(counts: Array) -> float:
    tp, fp, fn = (int(n) for n in counts)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0
