"""Training data in the forms that people have it. Every file is checked to exist before any work;
pixels are read through `xt_models.open_image`, window by window."""

from .base import Data, Labelled
from .crops import Window, middle_window, random_window, read_crop
from .labels import ImageFolder, ImageList, INaturalist

FORMS: dict[str, type[Data]] = {
    "folder": ImageFolder,
    "list": ImageList,
    "inaturalist": INaturalist,
}
"""`data.form` of a recipe -> what reads it."""

__all__ = [
    "FORMS",
    "Data",
    "INaturalist",
    "ImageFolder",
    "ImageList",
    "Labelled",
    "Window",
    "middle_window",
    "random_window",
    "read_crop",
]
