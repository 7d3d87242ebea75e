# %% [markdown]
# # Assignment 3: Break it
#
# **What you will be able to do.** Attack a classifier. See that an attack failed because of the *attack*, and not because the classifier is robust. Write an attack that is made for the defence, which is called an *adaptive* attack.
#
# **Before you start.** Read [chapter 9](https://github.com/advbn-book/advbn-book/blob/HEAD/notebooks/09_pixels.ipynb), or any introduction to projected gradient descent (PGD), and do assignment 2.
#
# **How long it takes.** Two to three hours. The networks here learn scikit-learn's handwritten digits (8 by 8 pixels) in a few seconds. Nothing is downloaded.
#
# **How it is graded.** The grader gives your attack a defence and images that this notebook does not show, and counts *itself* how many answers are still right. So it is of no use to fool the count. Your images must stay within the radius and in $[0, 1]$. For grading, the defences are
# trained anew from another seed. Keep the names and arguments of the functions.
#
# | task | minutes | points |
# |---|---|---|
# | 1 A plain attack | 30 | 3 |
# | 2 Where is the gradient? | 30 | 5 |
# | 3 The confident network | 25 | 6½ |
# | 4 The rounded image | 30 | 6½ |
# | 5 The ten experts | 30 | 6½ |
# | 6 To think about | 15 | not graded |

# %%
# On Colab this installs the book's small library. Elsewhere it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("advbn_lib") is None:
    book = "advbn_lib @ git+https://github.com/advbn-book/advbn-book"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", book], check=True)

# %%
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from advbn_lib.assignments import looking
from advbn_lib.assignments.defences import KINDS, REASONS, Defence, Experts, make_defence, shown_images
from advbn_lib.grading import check

RADIUS = 0.2  # in the units of a pixel, which goes from 0 to 1

# %% [markdown]
# ## 1 A plain attack
#
# **Intuition.** Climb the loss with the pixels, by steps along the sign of the gradient. After each step come back into the ball of the radius around the image, and into $[0, 1]$.
#
# `losses` maps images (N,1,8,8) to one loss for each (N,). Your function does not know which loss that is; you will need this freedom below. Good choices for a start: 20 steps of a quarter of the radius each. The step is a quarter of the radius for any other number of steps, too. Of a network without a defence, 10 % of the answers or fewer may be left.


# %%
def pgd(losses: Callable[[Tensor], Tensor], images: Tensor, radius: float, steps: int = 20) -> Tensor:
    """Images that make the losses large.

    Args:
        losses: images (N,1,8,8) to losses (N,).
        images: in [0,1], N,1,8,8. They are not changed.
        radius: no pixel may move farther than this.

    Returns:
        Images in [0,1], of the same shape and type.
    """
    ### BEGIN SOLUTION
    delta = torch.zeros_like(images)
    for _ in range(steps):
        delta.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(losses(images + delta).sum(), delta)
        delta = (delta.detach() + radius / 4 * gradient.sign()).clamp(-radius, radius)
        delta = (images + delta).clamp(0, 1) - images
    return (images + delta).clamp(0, 1)
    ### END SOLUTION


# %%
check("break_it.pgd")

# %% [markdown]
# ## Three defences
#
# Here they are, with all their code. A defence that is only good as long as nobody reads its code is no defence.

# %%
for kind in KINDS:
    print(inspect.getsource(type(make_defence(kind)))) if looking() else None


# %%
@torch.no_grad()
def accuracy(defence: Defence, images: Tensor, labels: Tensor, draws: int = 5) -> float:
    """Share of right answers; some defences answer at random, so the mean over a few draws."""
    return sum((defence(images).argmax(1) == labels).float().mean().item() for _ in range(draws)) / draws


if looking():
    images, labels = shown_images()
    print(f"{'':10}  clean  plain attack")
    for kind in KINDS:
        defence = make_defence(kind)
        try:
            attacked = pgd(lambda x: F.cross_entropy(defence(x), labels, reduction="none"), images, RADIUS)
            print(f"{kind:10}  {accuracy(defence, images, labels):.2f}   {accuracy(defence, attacked, labels):.2f}")
        except NotImplementedError:
            print("write pgd first")

# %% [markdown]
# The last column is what somebody would publish who does not look closely. It is nearly the same as without an attack, and for a network without a defence it is near 0.
#
# ## 2 Where is the gradient?
#
# **Intuition.** When an attack fails, first look at the gradient that it followed. If it is exactly 0, the attack has not been resisted: it never moved.
#
# Write `zero_gradients`: for each image, is the gradient of the cross-entropy in its pixels exactly 0, all of it? Then say for each defence why the plain attack fails. The reasons to choose from, each with what it means. Your function returns the string before the colon, without the meaning:

# %%
for name, meaning in REASONS.items():
    print(f"{name!r}: {meaning}")


# %%
def zero_gradients(defence: Defence, images: Tensor, labels: Tensor) -> Tensor:
    """For which images the gradient of the cross-entropy in the pixels is exactly 0.

    Args:
        defence: images (N,1,8,8) to logits (N,10).
        images: in [0,1], N,1,8,8.
        labels: N, int64.

    Returns:
        N, bool.
    """
    ### BEGIN SOLUTION
    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(defence(pixels), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
    return (gradient == 0).flatten(1).all(1)
    ### END SOLUTION


def reason(kind: str) -> str:
    """Why the plain attack fails on this defence.

    Args:
        kind: "confident", "rounded" or "experts".

    Returns:
        One of the keys of REASONS, such as "a smaller radius".
    """
    ### BEGIN SOLUTION
    reasons = {"confident": "the loss saturates", "rounded": "a step function", "experts": "a detached part"}
    return reasons[kind]
    ### END SOLUTION


# %%
check("break_it.diagnosis")

# %%
if looking():
    for kind in KINDS:
        try:
            share = zero_gradients(make_defence(kind), images, labels).float().mean().item()
            print(f"{kind:10}  gradient exactly 0 for {share:.0%} of the images")
        except NotImplementedError:
            print("write zero_gradients first")

# %% [markdown]
# Beware of the third one. Its gradient is not 0, and it is still of no use. A gradient can also point the wrong way.
#
# ## 3 The confident network
#
# Now attack. The attack gets the defence itself. You may call it and take it apart (`defence.network`, and so on). After your attack the defence should be right on 50 % of the images or fewer (a first success), and on 15 % or fewer (it is broken). This holds for all three. What counts are the defence's own answers to your images.
#
# <details><summary>Hint</summary>
#
# Nobody obliges you to climb the cross-entropy. Which other loss is large when the answer is wrong, and has a gradient however sure the network is? Look at the logits.
#
# </details>


# %%
def attack_confident(defence: Defence, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Images within the radius that the defence gets wrong; same shape, in [0,1]."""
    ### BEGIN SOLUTION
    return pgd(lambda x: margins(defence(x), labels), images, radius)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the best wrong logit is above the right one (N,)."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]
    ### END SOLUTION


# %%
check("break_it.confident")

# %% [markdown]
# ## 4 The rounded image
#
# <details><summary>Hint</summary>
#
# Rounding has a gradient of 0 almost everywhere, and the noise makes each answer another one. But a rounded image is *nearly the same image*. Use the defence in the forward pass and pretend in the backward pass that the rounding were not there (Athalye et al.,
# ICML 2018, call it BPDA), or leave it out altogether. Against noise, take the mean of several gradients.
#
# </details>


# %%
def attack_rounded(defence: Defence, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Images within the radius that the defence gets wrong; same shape, in [0,1]."""
    ### BEGIN SOLUTION
    return pgd(lambda x: margins(defence.network(x), labels), images, radius)
    ### END SOLUTION


# %%
check("break_it.rounded")

# %% [markdown]
# ## 5 The ten experts
#
# <details><summary>Hint</summary>
#
# Which part of the code decides which digit wins? Does a gradient flow through it? If not, write the same computation again, so that one does. Mind task 3 while you do it.
#
# </details>


# %%
def attack_experts(defence: Experts, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Images within the radius that the defence gets wrong; same shape, in [0,1]."""
    ### BEGIN SOLUTION
    return pgd(lambda x: margins(defence.network(x), labels), images, radius)
    ### END SOLUTION


# %%
check("break_it.experts")

# %% [markdown]
# ## 6 To think about
#
# In words. Not graded by the machine.
#
# 1. Before you believe that a defence is robust, which three things would you look at?
# 2. Accuracy should never rise when the radius grows, and a random start should not be better than a gradient. Why are these useful checks on an *attack*?
# 3. The predictor of [chapter 10](https://github.com/advbn-book/advbn-book/blob/HEAD/notebooks/10_afa.ipynb) says for each image how to mix two sets of BatchNorm. In an attack on it, must the gradient flow through the predictor? What does this book's evaluation do about it?
# 4. Is a defence whose code is secret robust? How would you attack it?

# %% tags=["instructor"]
# For the instructor: 1. For example: is the gradient 0 or useless; does a larger radius bring accuracy to 0; does an attack with another
# loss, from another network or without gradients do better? 2. Both hold for a perfect attack, so where they fail, the attack is at
# fault. 3. Both attacks should be tried, with the gradient through the predictor and without, and the worse one of each image counts.
# 4. No: images made for a network that one trains oneself often carry over, and answers alone are enough to climb.
