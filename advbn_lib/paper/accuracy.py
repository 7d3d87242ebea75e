"""Right answers, counted by several processes together."""

from __future__ import annotations

import torch

from advbn_lib.data.imagenet import ImageNetFolder, evaluation_batches
from advbn_lib.dual_bn import Branch
from advbn_lib.methods.base import Method
from advbn_lib.modes import evaluating
from advbn_lib.paper.distributed import Processes
from advbn_lib.progress import progress


@torch.no_grad()
def right_answers(
    method: Method, images: ImageNetFolder, processes: Processes, branches: tuple[Branch, ...], batch_size: int = 64,
    workers: int = 0, logits: tuple[int, ...] | None = None, show_progress: bool = False,
) -> dict[Branch, int]:  # fmt: skip
    """How many images each branch gets right (top-1), in float32. Each process takes its share; all learn the sum.

    Args:
        branches: some of ``method.branches``.
        logits: class indices that predictions are restricted to; None: no restriction.
    """
    allowed = None if logits is None else torch.tensor(logits, device=processes.device)
    right = torch.zeros(len(branches), dtype=torch.int64, device=processes.device)
    batches = evaluation_batches(images, batch_size, processes.device, processes.share, workers)
    mine = len(range(processes.rank, len(images), processes.count))
    with evaluating(method):
        for pixels, labels in progress(batches, images.name, show_progress, total=-(-mine // batch_size)):
            outputs = (
                method.predictions(pixels) if len(branches) > 1 else {branches[0]: method.predict(pixels, branches[0])}
            )
            for place, branch in enumerate(branches):
                right[place] += (_predicted(outputs[branch], allowed) == labels).sum()
    return dict(zip(branches, processes.sum(right).tolist(), strict=True))


def _predicted(outputs: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    return outputs.argmax(1) if allowed is None else allowed[outputs[:, allowed].argmax(1)]
