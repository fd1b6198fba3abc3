"""Task heads."""

from .classification import ClassificationHead, PlainHead

__all__ = ["ClassificationHead", "PlainHead"]
