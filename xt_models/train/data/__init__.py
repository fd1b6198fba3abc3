"""Training data in the forms that people have it. Every file is checked to exist before any work;
pixels are read through `xt_models.open_image`, window by window."""

from .base import Data, Labelled
from .coco import Boxed, Coco
from .crops import Window, middle_window, random_window, read_crop
from .labels import ImageFolder, ImageList, INaturalist, Labels
from .masks import Masked, MaskPairs
from .tiles import Tiles
from .xview3 import Scenes, XView3

FORMS: dict[str, type[Data]] = {
    "folder": ImageFolder,
    "list": ImageList,
    "inaturalist": INaturalist,
    "masks": MaskPairs,
    "coco": Coco,
    "xview3": XView3,
}
"""`data.form` of a recipe -> what reads it."""

__all__ = [
    "FORMS",
    "Boxed",
    "Coco",
    "Data",
    "INaturalist",
    "ImageFolder",
    "ImageList",
    "Labelled",
    "Labels",
    "MaskPairs",
    "Masked",
    "Scenes",
    "Tiles",
    "Window",
    "XView3",
    "middle_window",
    "random_window",
    "read_crop",
]
