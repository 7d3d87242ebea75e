# %% [markdown]
# # Assignment 1: Statistics and style
#
# **What you will be able to do.** Take means and standard deviations over the right axes. Move the style of one image to another.
# Say what mean and standard deviation leave out. Say where a gradient flows, and where it does not.
#
# **Before you start.** Read [chapter 1](https://github.com/advbn-book/advbn-book/blob/HEAD/notebooks/01_style_lives_in_statistics.ipynb).
#
# **How long it takes.** Two to three hours. Nothing is downloaded, and all cells run in seconds on a laptop.
#
# **How it is graded.** Each task has checks right below it. They answer at once, and say what went wrong. Grading runs the same
# checks and more: other shapes, other types, and the edges. Keep the names and arguments of the functions. Helper functions of your own are welcome.
#
# | task | minutes | points |
# |---|---|---|
# | 1 Mean and std of a batch | 20 | 9 |
# | 2 Mean and std of each image | 10 | 7 |
# | 3 AdaIN | 30 | 8 |
# | 4 Two knobs | 15 | 5 |
# | 5 Mix styles | 20 | 3 |
# | 6 What mean and std leave out | 30 | 7 |
# | 7 Gradients through statistics | 30 | 4 |
# | 8 To think about | 15 | not graded |

# %%
# On Colab this installs the book's small library. Elsewhere it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("advbn_lib") is None:
    book = "advbn_lib @ git+https://github.com/advbn-book/advbn-book"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", book], check=True)

# %%
import torch
from torch import Tensor

from advbn_lib.assignments import looking
from advbn_lib.assignments.telling import features
from advbn_lib.grading import check

# %% [markdown]
# All feature maps here have four axes: images, channels, height, width, or $(N, C, H, W)$. Below, `features` makes a small one at random, in
# which images and channels differ. Look at a number whenever you are in doubt.

# %%
x = features(seed=0)
print(tuple(x.shape))

# %% [markdown]
# ## 1 Mean and std of a batch
#
# **Intuition.** Batch statistics are *one number per channel*, for all images and all positions together.
#
# $$ \mu_c = \frac{1}{NHW} \sum_{n,h,w} x_{nchw}, \qquad \sigma_c = \sqrt{\frac{1}{NHW - 1} \sum_{n,h,w} (x_{nchw} - \mu_c)^2 + \varepsilon} $$
#
# Three things to get right: the axes; the *unbiased* variance, which divides by one fewer; and $\varepsilon$, which is under the root.
#
# The unbiased variance of a *single number* does not exist: it would divide by 0. Raise a `ValueError` there. A NaN that travels on is far harder to find.
#
# <details><summary>Hint</summary>
#
# `x.mean` and `x.var` take a tuple of axes, and `keepdim=True` keeps these axes with length 1. How many numbers there are along them, you can
# count from `x.shape`.
#
# </details>


# %%
def batch_statistics(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel over the whole batch.

    Args:
        x: features, N,C,H,W.
        eps: added to the unbiased variance, under the root.

    Returns:
        (mean, std), both of shape 1,C,1,1 and of the type of x.

    Raises:
        ValueError: if a channel has one number only.
    """
    ### BEGIN SOLUTION
    return moments(x, (0, 2, 3), eps)


def moments(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and std over some axes, which stay with length 1."""
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    if count < 2:
        raise ValueError(f"the unbiased variance of {count} number is undefined")
    return x.mean(axes, keepdim=True), (x.var(axes, keepdim=True) + eps).sqrt()
    ### END SOLUTION


# %%
check("statistics_and_style.batch_statistics")

# %% [markdown]
# ## 2 Mean and std of each image
#
# **Intuition.** Instance statistics are *one number per image and channel*. They can tell two images apart.


# %%
def instance_statistics(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel of each image.

    Args:
        x: features, N,C,H,W.
        eps: added to the unbiased variance, under the root.

    Returns:
        (mean, std), both of shape N,C,1,1 and of the type of x.

    Raises:
        ValueError: if a channel of an image has one number only.
    """
    ### BEGIN SOLUTION
    return moments(x, (2, 3), eps)
    ### END SOLUTION


# %%
check("statistics_and_style.instance_statistics")

# %% [markdown]
# ## 3 AdaIN
#
# **Intuition.** Strip the content of its own two numbers per channel, and give it those of the style.
#
# First the general form. With the *instance* statistics $\mu(x)$ and $\sigma(x)$ (with $\varepsilon$, as above), any new mean $m$ and std $s$:
#
# $$ \text{renormalise}(x, m, s) = s \cdot \frac{x - \mu(x)}{\sigma(x)} + m $$
#
# AdaIN (Huang and Belongie, ICCV 2017) takes $m$ and $s$ from another image. Content and style need not have the same height and width,
# and one style may serve for several contents.


# %%
def renormalise(x: Tensor, new_mean: Tensor, new_std: Tensor, eps: float = 1e-5) -> Tensor:
    """Give each channel of each image another mean and std.

    Args:
        x: features, N,C,H,W.
        new_mean, new_std: broadcastable to N,C,1,1.

    Returns:
        Features of the shape of x.
    """
    ### BEGIN SOLUTION
    mean, std = instance_statistics(x, eps)
    return new_std * (x - mean) / std + new_mean
    ### END SOLUTION


def adain(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """The content with the means and stds of the style.

    Args:
        content: features, N,C,H,W. They give the layout.
        style: features, N,C,H',W' (or one image for all). They give the statistics.

    Returns:
        Features of the shape of content.
    """
    ### BEGIN SOLUTION
    return renormalise(content, *instance_statistics(style, eps), eps)
    ### END SOLUTION


# %%
check("statistics_and_style.adain")

# %% [markdown]
# **Look at it.** The "features" here are simply the colours of two made-up pictures. Their layouts differ, and so do their colours and contrasts. Which of
# the two does AdaIN move?

# %%
def picture(seed: int, low: tuple[float, ...], high: tuple[float, ...]) -> Tensor:
    """A picture (1,3,48,48) of soft blobs, from one colour to another."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.rand((1, 1, 6, 6), generator=generator)
    blobs = torch.nn.functional.interpolate(blobs, size=48, mode="bicubic").clamp(0, 1)
    dark, bright = (torch.tensor(colour).view(1, 3, 1, 1) for colour in (low, high))
    return dark + (bright - dark) * blobs


if looking():
    import matplotlib.pyplot as plt

    day = picture(0, (0.3, 0.5, 0.9), (1.0, 1.0, 0.9))
    dusk = picture(1, (0.1, 0.0, 0.2), (0.8, 0.3, 0.1))
    shown = {"day": day, "dusk": dusk}
    try:
        shown["day in the style\nof dusk"] = adain(day, dusk)
        shown["dusk in the style\nof day"] = adain(dusk, day)
    except NotImplementedError:
        print("write adain first")
    figure, axes = plt.subplots(1, len(shown), figsize=(2 * len(shown), 2.5))
    for axis, (title, image) in zip(axes, shown.items()):
        axis.imshow(image[0].clamp(0, 1).permute(1, 2, 0))
        axis.set(title=title, xticks=[], yticks=[])
    plt.show()

# %% [markdown]
# ## 4 Two knobs
#
# **Intuition.** Multiply a batch's mean by $a$ and its std by $b$. This is what AdvBN's adversary turns. Note that nothing is divided:
#
# $$ x' = b \cdot (x - \mu) + a \cdot \mu $$
#
# Here $\mu$ is the *batch* mean. It works for a channel that is constant, and for a single number too: no std is needed.


# %%
def scale_statistics(x: Tensor, mean_factor: Tensor, std_factor: Tensor) -> Tensor:
    """Multiply the batch mean and the batch std of each channel.

    Args:
        x: features, N,C,H,W.
        mean_factor, std_factor: 1,C,1,1.

    Returns:
        Features of the shape of x.
    """
    ### BEGIN SOLUTION
    mean = x.mean((0, 2, 3), keepdim=True)
    return std_factor * (x - mean) + mean_factor * mean
    ### END SOLUTION


# %%
check("statistics_and_style.scale_statistics")

# %% [markdown]
# ## 5 Mix styles
#
# **Intuition.** Do not replace an image's style, but mix it with that of another image of the batch. This is MixStyle (Zhou et al., ICLR 2021), a way to
# make new styles for training without an adversary.
#
# Image $i$ has a partner: number `order[i]`. Its new mean is $\lambda_i \mu_i + (1 - \lambda_i)\, \mu_{\text{order}[i]}$, its new std the same mixture of
# the two *stds*. What changes are its statistics only; the layout stays its own.


# %%
def mix_styles(x: Tensor, order: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Features whose statistics are mixed with those of a partner.

    Args:
        x: features, N,C,H,W.
        order: the partner of each image, N, int64.
        weight: how much of the image's own statistics stays, N,1,1,1, in [0,1].

    Returns:
        Features of the shape of x.
    """
    ### BEGIN SOLUTION
    mean, std = instance_statistics(x, eps)
    return renormalise(x, torch.lerp(mean[order], mean, weight), torch.lerp(std[order], std, weight), eps)
    ### END SOLUTION


# %%
check("statistics_and_style.mix_styles")

# %% [markdown]
# ## 6 What mean and std leave out
#
# **Intuition.** Two numbers cannot say everything about a channel. A channel with a few bright spots on dark ground, and one with a few dark spots on
# bright ground, can have the same mean and the same std. The *third* standardised moment tells them apart: it says on which side the long tail is.
#
# $$ \text{skewness} = \frac{\frac{1}{HW} \sum_{h,w} (x_{hw} - \mu)^3}{\left(\frac{1}{HW} \sum_{h,w} (x_{hw} - \mu)^2 + \varepsilon\right)^{3/2}} $$
#
# All sums are divided by the number of elements here, as is usual for this moment. For a constant channel the result is 0.
#
# Then the other way round: write `same_style`, which takes *any* feature map and returns another one with the same instance means and stds, but with
# the opposite skewness. AdaIN cannot see the difference between the two.
#
# <details><summary>Hint</summary>
#
# Which simple change of $x$ keeps the mean where it is and turns the tail to the other side? One line is enough.
#
# </details>


# %%
def skewness(x: Tensor, eps: float = 1e-8) -> Tensor:
    """The third standardised moment of each channel of each image.

    Args:
        x: features, N,C,H,W.
        eps: added to the variance.

    Returns:
        N,C,1,1.
    """
    ### BEGIN SOLUTION
    centred = x - x.mean((2, 3), keepdim=True)
    variance = centred.square().mean((2, 3), keepdim=True)
    return centred.pow(3).mean((2, 3), keepdim=True) / (variance + eps).pow(1.5)
    ### END SOLUTION


def same_style(x: Tensor) -> Tensor:
    """Features with the instance means and stds of x and the opposite skewness.

    Args:
        x: features, N,C,H,W.

    Returns:
        Features of the shape of x.
    """
    ### BEGIN SOLUTION
    return 2 * x.mean((2, 3), keepdim=True) - x
    ### END SOLUTION


# %%
check("statistics_and_style.what_is_left_out")

# %% [markdown]
# ## 7 Gradients through statistics
#
# **Intuition.** In $(x - \mu(x)) / \sigma(x)$ the input appears three times. If you change one pixel, then mean and std change too. A gradient that knows this is not the
# same as one that takes mean and std for constants. BatchNorm in train mode has the first kind, BatchNorm in eval mode the second.
#
# Write both. The *value* is the same each time.
#
# <details><summary>Hint</summary>
#
# `tensor.detach()` has the same value and no gradient. Detach the statistics, not the result.
#
# </details>


# %%
def normalise(x: Tensor, eps: float = 1e-5, frozen: bool = False) -> Tensor:
    """Take the instance mean away and divide by the instance std.

    Args:
        x: features, N,C,H,W.
        frozen: for the gradient, mean and std count as constants.

    Returns:
        Features of the shape of x.
    """
    ### BEGIN SOLUTION
    mean, std = instance_statistics(x, eps)
    if frozen:
        mean, std = mean.detach(), std.detach()
    return (x - mean) / std
    ### END SOLUTION


# %%
check("statistics_and_style.gradients")

# %% [markdown]
# ## 8 To think about
#
# In words, a few sentences each. Not graded by the machine.
#
# 1. Add a constant to all pixels of a channel. What does `normalise(..., frozen=False)` do? So what must the sum of its gradient over the channel be? And with `frozen=True`?
# 2. Mean and std are two numbers out of many. Why do they move so much of what we call style, and the skewness so little?
# 3. For a batch of one image, how do batch statistics differ from instance statistics?
# 4. `mix_styles` mixes stds, not variances. Would it make a large difference? When?

# %% tags=["instructor"]
# For the instructor: 1. The result does not change, so the gradient sums to 0 over the channel; frozen, it sums to the sum of the
# upstream gradient divided by the std. 2. Light and contrast act on a channel much like a factor and a shift, which move exactly these
# two; the skewness does not change under either. 3. Nothing in the numbers: over N,H,W with N = 1 they are the same. What differs is
# what they are used for. 4. Only where the two stds are far apart: the mixture of variances is never the smaller one.
