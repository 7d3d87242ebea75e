"""AdvBN and its relatives: adversarial training on feature statistics, as a small library.

>>> from advbn_lib import AdvBN
>>> method = AdvBN(model, layer="layer1")        # doctest: +SKIP
>>> losses = method(images, labels)              # doctest: +SKIP
>>> losses.total.backward()                      # doctest: +SKIP
"""

from advbn_lib.ascent import Steps, ascend
from advbn_lib.attacks import PGD
from advbn_lib.dual_bn import DualBatchNorm, add_second_batch_norm, single_branch, use_branch
from advbn_lib.feature_ball import FeatureBall
from advbn_lib.methods import AFAN, AdvBN, CleanFineTuning, Losses, PlainTraining, RandomStatistics, Site
from advbn_lib.methods.afa import AFA, EndPoints
from advbn_lib.perturbations import ChannelStatistics
from advbn_lib.pixel_ball import PixelBall
from advbn_lib.splitting import SplitError, split_at
from advbn_lib.tasks import Classification

__version__ = "0.1.0"
__all__ = [
    "AFA", "AFAN", "AdvBN", "ChannelStatistics", "Classification", "CleanFineTuning", "DualBatchNorm", "EndPoints", "FeatureBall",
    "Losses", "PGD", "PixelBall", "PlainTraining", "RandomStatistics", "Site", "SplitError", "Steps", "add_second_batch_norm", "ascend",
    "single_branch", "split_at", "use_branch",
]  # fmt: skip
