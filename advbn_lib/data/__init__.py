"""Data sets, the loader that keeps them on the device, and the shifts to test with."""

from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.data.sets import DATA_SETS, load_images

__all__ = ["DATA_SETS", "DataError", "DeviceLoader", "ImageSet", "load_images"]
