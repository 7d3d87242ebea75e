"""Task adapters: what a method needs to know of classification, detection and segmentation, and nothing else."""

from advbn_lib.tasks.base import Cut, Task
from advbn_lib.tasks.classification import Classification

__all__ = ["Classification", "Cut", "Task"]
