"""Task adapters: what a method needs to know of classification, detection and segmentation, and nothing else."""

from advbn_lib.tasks.base import Cut, Task
from advbn_lib.tasks.classification import Classification
from advbn_lib.tasks.detection import Detection
from advbn_lib.tasks.segmentation import Segmentation

__all__ = ["Classification", "Cut", "Detection", "Segmentation", "Task"]
