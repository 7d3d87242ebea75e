# %% [markdown]
# # Assignment 4: Your own adversary
#
# **What you will be able to do.** Invent a perturbation set, write it so that any ascent can use it, and find out, in a way that a sceptic would accept, whether training against it is better than training with noise.
#
# **Before you start.** Do assignments 2 and 3. Look at how [chapter 2](https://github.com/advbn-book/advbn-book/blob/HEAD/notebooks/02_advbn_from_scratch.ipynb) and [chapter 7](https://github.com/advbn-book/advbn-book/blob/HEAD/notebooks/07_afan_from_scratch.ipynb) use one ascent for different sets.
#
# **How long it takes.** Three to four hours, of which the computer works for less than half an hour. Nothing is downloaded.
#
# **How it is graded.** The laws of a set are checked on other images. The result is a training with five seeds, which the *grader* runs: it asks your set for values, and does the ascent, the training and the test itself. The threshold is stated below, before you begin.
# Keep the names of the classes and functions.
#
# | task | minutes | points |
# |---|---|---|
# | 1 A set that you know | 40 | 12 |
# | 2 How a result is judged | 15 | 2 |
# | 3 Your own set | 60 | 9 |
# | 4 Better than noise | 60 | 12 |
# | 5 To think about | 15 | not graded |

# %%
# On Colab this installs the book's small library. Elsewhere it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("advbn_lib") is None:
    book = "advbn_lib @ git+https://github.com/advbn-book/advbn-book"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", book], check=True)

# %%
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from advbn_lib.assignments import looking
from advbn_lib.assignments.arena import Arena, Lamps, gains, train_against, under_lamps
from advbn_lib.assignments.small_digits import small_digits
from advbn_lib.grading import check

# %% [markdown]
# ## One ascent for all sets
#
# All adversaries of this book run one loop (`advbn_lib.ascent.ascend`). What differs is the *set* in which it walks. A point of a set is a `delta`, a tuple of tensors. A set says four things:
#
# | | |
# |---|---|
# | `start(x)` | the delta that changes nothing |
# | `sample(x, generator)` | a random delta of the set |
# | `apply(x, delta)` | what the delta makes of the images |
# | `project(x, delta)` | a delta of the set for any delta; one that is in the set stays as it is, up to rounding |
#
# and `per_sample = True` says that each image has a delta of its own. The laws that follow from this are checked:
#
# - `apply(x, start(x))` is `x`, and the start is in the set;
# - projecting twice is the same as projecting once, and the set has a border;
# - a sample is in the set, and all its random numbers come from the generator;
# - `apply` keeps the shape, is a function of `x` and `delta` alone, image by image, and a gradient flows to `delta`;
# - for any delta *of the set* (so after `project`), the changed images are in $[0, 1]$. What `apply` makes of other deltas is not looked at. Either `project` sees to it, as in the pixel ball, or `apply` cuts its result.
#
# ## 1 A set that you know
#
# **Intuition.** The pixel ball: any change of the pixels, none by more than the radius. The delta is added to the image. `project` keeps to the ball *and* to images: $x + \delta$ must lie in $[0, 1]$.


# %%
class PixelBall:
    """The l-infinity ball around images in [0,1] (N,1,8,8). A delta is one tensor of their shape.

    Args:
        radius: no pixel moves farther than this.
    """

    per_sample = True

    def __init__(self, radius: float):
        self.radius = radius

    def start(self, x: Tensor) -> tuple[Tensor]:
        """No change."""
        ### BEGIN SOLUTION
        return (torch.zeros_like(x),)
        ### END SOLUTION

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor]:
        """Uniform in the ball, then cut to images."""
        ### BEGIN SOLUTION
        draw = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        return self.project(x, (self.radius * (2 * draw - 1),))
        ### END SOLUTION

    def apply(self, x: Tensor, delta: tuple[Tensor]) -> Tensor:
        """The changed images."""
        ### BEGIN SOLUTION
        return x + delta[0]
        ### END SOLUTION

    def project(self, x: Tensor, delta: tuple[Tensor]) -> tuple[Tensor]:
        """Into the ball, and to images in [0,1]."""
        ### BEGIN SOLUTION
        inside = delta[0].clamp(-self.radius, self.radius)
        return ((x + inside).clamp(0, 1) - x,)
        ### END SOLUTION


# %%
check("own_adversary.pixel_ball")

# %% [markdown]
# ## 2 How a result is judged
#
# **The test.** Somebody moves a lamp: soft light and shadow are *added* to the digits (a coarse 3 by 3 grid of brightness, made smooth, none stronger than 0.3), and the sum is cut to $[0, 1]$. The lamp stands as bad as it can be for the network at hand.
#
# **The gain.** Two networks are trained from the same weights, on the same images in the same order, clean and perturbed half and half. One sees what the *adversary* finds in your set. The other sees *noise as large*: each number of the delta goes
# as far from the start as the adversary moved it, but in a random direction, and the whole is projected. The gain is the difference of the two accuracies under the lamps. So it measures the adversary, and not the set alone.
#
# **The verdict.** One seed proves nothing. We take five, and demand that the mean less the standard deviation (the unbiased one) is **above 8 points**. On clean images each network that was trained against the adversary must still get 85 % right.
#
# Write that number.


# %%
def sure_gain(gains: list[float]) -> float:
    """Mean minus unbiased standard deviation over the seeds.

    Args:
        gains: one number for each seed, at least two. They are shares: 8 points is 0.08.
    """
    ### BEGIN SOLUTION
    return statistics.mean(gains) - statistics.stdev(gains)
    ### END SOLUTION


# %%
check("own_adversary.the_judge")

# %% [markdown]
# What does the lamp do to a network that has never met it? And does the pixel ball help? (Less than a minute.)

# %%
if looking():
    network = train_against(PixelBall(0.1), 0.04, "clean", seed=0)
    clean, worst = under_lamps(network)
    print(f"clean training: {clean:.0%} right on clean images, {worst:.0%} under the lamps")
    try:
        more, clean = gains(PixelBall(0.1), 0.04, seeds=(0, 1))
        print(f"pixel ball: gains over noise as large {[f'{100 * gain:.1f}' for gain in more]} points")
    except NotImplementedError:
        print("write PixelBall first")

# %% [markdown]
# ## 3 Your own set
#
# **Intuition.** Which changes of an image are like those of a lamp, and which set holds them? The set need not be that of the test. It may be larger, smaller, or of another kind: on the pixels' light, on their contrast, with few numbers or with many. Think about *how many* numbers the adversary may choose, how far they may go, and
# how one number spreads over the image.
#
# `MySet()` must work without arguments. `step_size` is how far one step of the ascent goes, in the units of your delta (the ascent takes 3 steps, along the sign of the gradient). A delta of one image holds at most 4096 numbers.
#
# <details><summary>Hint</summary>
#
# `F.interpolate(grid, size=x.shape[-2:], mode="bilinear", align_corners=True)` makes a smooth image of a coarse grid, and a gradient flows through it. Cut the changed image to $[0, 1]$ at the end of `apply`.
#
# </details>


# %%
class MySet:
    """Your perturbation set, for images in [0,1] (N,1,8,8). Say here what a delta is, its shape, and its border."""

    per_sample = True
    step_size = 0.1

    ### BEGIN SOLUTION
    ### STUDENT: def __init__(self):
    ### STUDENT:     raise NotImplementedError("MySet is not written yet")
    reach, cells = 0.3, 4  # a delta is a grid of brightness N,1,4,4, none larger than 0.3; made smooth, and added

    def start(self, x: Tensor) -> tuple[Tensor]:
        return (x.new_zeros(len(x), 1, self.cells, self.cells),)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor]:
        draw = torch.rand((len(x), 1, self.cells, self.cells), generator=generator, dtype=x.dtype)
        return (self.reach * (2 * draw - 1),)

    def apply(self, x: Tensor, delta: tuple[Tensor]) -> Tensor:
        light = F.interpolate(delta[0], size=x.shape[-2:], mode="bilinear", align_corners=True)
        return (x + light).clamp(0, 1)

    def project(self, x: Tensor, delta: tuple[Tensor]) -> tuple[Tensor]:
        return (delta[0].clamp(-self.reach, self.reach),)

    ### END SOLUTION


# %%
check("own_adversary.your_set")

# %% [markdown]
# ## 4 Better than noise
#
# The check takes two seeds and a short training, for a first look. The grader takes five other seeds, the training below, and other test images.

# %%
check("own_adversary.the_result")

# %% [markdown]
# The whole thing, as in grading but with three seeds (a minute or less). Change your set, and look again. But do not look at too many versions: who tries twenty and takes the best has chosen partly by chance.

# %%
if looking():
    try:
        more, clean = gains(MySet(), MySet.step_size, seeds=(10, 11, 12), arena=Arena(), lamps=Lamps())
        print(f"gains: {[f'{100 * gain:.1f}' for gain in more]}; mean - std {100 * sure_gain(more):.1f} points")
        print(f"clean accuracy at least {min(clean):.0%}, test images {len(small_digits('test')[0])}")
    except NotImplementedError:
        print("write MySet and sure_gain first")

# %% [markdown]
# ## 5 To think about
#
# In words. Not graded by the machine.
#
# 1. Why is "better than clean training" not enough to give the credit to the adversary?
# 2. The control turns the adversary's own steps at random. Would a uniform draw from the set be a fairer control? Which of the two is easier to beat?
# 3. How would your result change if you had chosen the set *after* looking at the test with five seeds, out of twenty sets?
# 4. Mean less standard deviation does not become surer with more seeds, and an interval for the mean does. What is each of them good for?

# %% tags=["instructor"]
# For the instructor: 1. A second set of images alone, or noise, might do as much. 2. A uniform draw is shorter on average, as the
# adversary likes the border, so the network sees smaller changes; it is easier to beat. 3. It would be too good: the best of twenty noisy numbers is above its own mean.
# 4. The first says what to expect from one training, the second how well we know the mean.
