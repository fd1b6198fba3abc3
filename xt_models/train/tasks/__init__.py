"""Tasks: what a recipe's data is trained for."""

from ..config import Recipe
from .base import Batch, InOrder, Order, Task, collate, seeded
from .classification import Classification
from .detection import Detection
from .segmentation import Segmentation
from .vessels import Vessels

__all__ = ["Batch", "InOrder", "Order", "Task", "collate", "make_tasks", "seeded"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
    "vessels": Vessels,
}
"""`Data.task` -> what trains it."""


def make_tasks(recipe: Recipe) -> dict[str, Task]:
    """The tasks of a recipe by name, their data read and checked."""
    return {name: TASKS[part.data.task](part, name) for name, part in recipe.tasks.items()}
