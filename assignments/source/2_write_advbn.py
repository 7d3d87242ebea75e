# %% [markdown]
# # Assignment 2: Write AdvBN
#
# **What you will be able to do.** Write the adversary of AdvBN, the two sets of batch normalisation and the training step, each right in every detail.
# And write tests that would notice if a detail were wrong.
#
# **Before you start.** Read [chapter 2](../../notebooks/02_advbn_from_scratch.ipynb), and do assignment 1.
#
# **How long it takes.** Three to four hours. Nothing is downloaded, and all cells run in seconds on a laptop.
#
# **How it is graded.** The checks below each task answer at once. Grading adds other settings and the edges. Task 6 is graded in another way: *your* tests
# are run on wrong layers, and each wrong layer that they find counts. Keep the names and arguments of the functions.
#
# | task | minutes | points |
# |---|---|---|
# | 1 What the adversary may do | 30 | 7 |
# | 2 One step up | 30 | 3 |
# | 3 The whole ascent | 40 | 11 |
# | 4 Two sets of batch normalisation | 30 | 6 |
# | 5 The layer and a training step | 40 | 8 |
# | 6 Tests that find mistakes | 60 | 14¼ |
# | 7 To think about | 10 | not graded |

# %%
# On Colab this installs the book's small library. Elsewhere it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("advbn_lib") is None:
    book = "advbn_lib @ git+https://github.com/advbn-book/advbn-book"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", book], check=True)

# %%
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.assignments.given import small_batch, small_tail
from advbn_lib.grading import check

# %% [markdown]
# To try things you need the upper part of a network, and features that go into it. `small_tail(seed)` is a small tail with two BatchNorms, one of them inside a block, and
# with running statistics as after a training. `small_batch(seed)` gives features $(N, C, H, W)$ and labels that fit it. Both are in float64, so that rounding does not hide a mistake.

# %%
tail, (x, labels) = small_tail(seed=0), small_batch(seed=0)
print(f"features {tuple(x.shape)}, logits {tuple(tail(x).shape)}, labels {labels.tolist()}")

# %% [markdown]
# ## 1 What the adversary may do
#
# **Intuition.** The adversary has two knobs per channel: a factor for the batch mean and a factor for the batch std. Every factor stays in $[1 - \epsilon, 1 + \epsilon]$. At 1 nothing changes.
#
# $$ x'(a, b) = \max\big(0,\; b \cdot (x - \mu) + a \cdot \mu \big) $$
#
# The $\max$ is there because the features come out of a ReLU: below 0 nothing can come.
#
# With the paper's $\epsilon = 1.1$ the interval reaches a little below 0. That is meant so.


# %%
def change_statistics(x: Tensor, mean_factor: Tensor, std_factor: Tensor) -> Tensor:
    """Features with other batch means and stds, cut off at 0.

    Args:
        x: features, N,C,H,W.
        mean_factor, std_factor: 1,C,1,1.

    Returns:
        Features of the shape of x, none below 0.
    """
    ### BEGIN SOLUTION
    mean = x.mean((0, 2, 3), keepdim=True)
    return (std_factor * (x - mean) + mean_factor * mean).clamp_min(0)
    ### END SOLUTION


def project(factor: Tensor, eps: float) -> Tensor:
    """The nearest factors in [1 - eps, 1 + eps].

    Args:
        factor: any shape.
        eps: half the width of the interval, above 0.
    """
    ### BEGIN SOLUTION
    return factor.clamp(1 - eps, 1 + eps)
    ### END SOLUTION


def random_factors(x: Tensor, eps: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A mean factor and a std factor for each channel, uniform in [1 - eps, 1 + eps].

    Args:
        x: features, N,C,H,W.
        generator: where all random numbers come from.

    Returns:
        (mean_factor, std_factor), both 1,C,1,1.
    """
    ### BEGIN SOLUTION
    shape = (2, 1, x.shape[1], 1, 1)
    draws = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
    mean_factor, std_factor = 1 + eps * (2 * draws - 1)
    return mean_factor, std_factor
    ### END SOLUTION


# %%
check("write_advbn.the_set")

# %% [markdown]
# ## 2 One step up
#
# **Intuition.** Ask in which direction each factor makes the loss larger, go a fixed distance that way, and come back into the interval.
#
# $$ a \leftarrow \text{project}\big(a + \eta \cdot \text{sign}(\partial L / \partial a)\big), \qquad b \leftarrow \text{project}\big(b + \eta \cdot \text{sign}(\partial L / \partial b)\big) $$
#
# Both gradients are taken at the *old* $a$ and $b$. Where a gradient is 0 (a dead channel, say) the factor stays.
#
# <details><summary>Hint</summary>
#
# `torch.autograd.grad(loss, (a, b))` returns the gradients of the factors and leaves no gradient in the tail's weights. For it, `a` and `b` must require a gradient: make them new with
# `a.detach().requires_grad_()`. If the caller switched gradients off, switch them on: `with torch.enable_grad():`.
#
# </details>


# %%
def ascent_step(
    tail: nn.Module, x: Tensor, labels: Tensor, mean_factor: Tensor, std_factor: Tensor, eps: float, step_size: float
) -> tuple[Tensor, Tensor]:
    """One step of projected sign-gradient ascent on the cross-entropy.

    Args:
        tail: features to logits (N,K). It is called in the mode in which it is.
        x: features, N,C,H,W.
        labels: N, int64.
        mean_factor, std_factor: where the step starts, 1,C,1,1.
        eps: half the width of the interval.
        step_size: how far a factor moves.

    Returns:
        (mean_factor, std_factor), new tensors without a gradient.
    """
    ### BEGIN SOLUTION
    factors = (mean_factor.detach().requires_grad_(), std_factor.detach().requires_grad_())
    with torch.enable_grad():
        loss = F.cross_entropy(tail(change_statistics(x, *factors)), labels)
        gradients = torch.autograd.grad(loss, factors)
    moved = [project(f.detach() + step_size * g.sign(), eps) for f, g in zip(factors, gradients)]
    return moved[0], moved[1]
    ### END SOLUTION


# %%
check("write_advbn.one_step")

# %% [markdown]
# ## 3 The whole ascent
#
# **Intuition.** Start where nothing changes, and climb. The attack only *asks* the network. So the network must be the same afterwards: its weights, its running statistics, the gradients in its parameters, and the mode of
# *each* of its modules, also if something goes wrong on the way. Torch's random numbers are left alone too.
#
# The questions are asked in eval mode, whatever the mode of the tail is when you get it.
#
# <details><summary>Hint</summary>
#
# Write down `(module, module.training)` for all of `tail.modules()` first, and put each one back in a `finally:` block. `tail.train()` is not enough: a single module may have been in eval mode.
#
# </details>


# %%
def attack(
    tail: nn.Module, x: Tensor, labels: Tensor, eps: float = 1.1, step_size: float = 0.2, steps: int = 6
) -> tuple[Tensor, Tensor]:
    """The worst factors for these features, found in some steps from 1, with the tail in eval mode.

    Args:
        tail: features to logits (N,K). It is left as it was.
        x: features, N,C,H,W. They count as constants.
        labels: N, int64.

    Returns:
        (mean_factor, std_factor), both 1,C,1,1, without a gradient.
    """
    ### BEGIN SOLUTION
    x = x.detach()
    mean_factor, std_factor = x.new_ones(1, x.shape[1], 1, 1), x.new_ones(1, x.shape[1], 1, 1)
    before = [(module, module.training) for module in tail.modules()]
    try:
        tail.eval()
        for _ in range(steps):
            mean_factor, std_factor = ascent_step(tail, x, labels, mean_factor, std_factor, eps, step_size)
    finally:
        for module, training in before:
            module.training = training
    return mean_factor, std_factor
    ### END SOLUTION


# %%
check("write_advbn.the_attack")

# %% [markdown]
# ## 4 Two sets of batch normalisation
#
# **Intuition.** Clean and perturbed features have different statistics; that is what the adversary is for. So each BatchNorm exists twice, and everything else once. The second one begins as a *copy* of the first, with its weights and its
# running statistics. From then on each learns from its own batches only.
#
# `add_second_batch_norm` changes the tail in place. It finds all BatchNorms, at any depth: look at `print(tail)`. `use_branch` chooses which set is used from now on. After `add_second_batch_norm` it is the clean one.


# %%
def add_second_batch_norm(tail: nn.Module) -> None:
    """Give every nn.BatchNorm2d in ``tail`` a second one beside it, in place."""
    ### BEGIN SOLUTION
    for name, child in list(tail.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(tail, name, TwoNorms(child))
        else:
            add_second_batch_norm(child)


class TwoNorms(nn.Module):
    """Two BatchNorms, of which one is in use."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.clean = norm
        self.adversarial = copy.deepcopy(norm)
        self.branch = "clean"
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        return self.clean(x) if self.branch == "clean" else self.adversarial(x)
    ### END SOLUTION


def use_branch(tail: nn.Module, branch: str) -> None:
    """Use one set of BatchNorms from now on.

    Args:
        branch: "clean" or "adversarial".

    Raises:
        ValueError: for any other name.
    """
    ### BEGIN SOLUTION
    if branch not in ("clean", "adversarial"):
        raise ValueError(f"branch is 'clean' or 'adversarial', got {branch!r}")
    for module in tail.modules():
        if isinstance(module, TwoNorms):
            module.branch = branch
    ### END SOLUTION


# %%
check("write_advbn.two_sets")

# %% [markdown]
# ## 5 The layer and a training step
#
# **Intuition.** Now put it together. What each pass uses:
#
# | | BatchNorm set | mode |
# |---|---|---|
# | attack | adversarial | eval |
# | adversarial loss | adversarial | as the layer is (train, in training) |
# | clean loss | clean | as the layer is |
# | predict | as asked for | eval |
#
# After each call the tail is on the clean set again. The features belong to frozen layers below: no gradient flows into them.


# %%
class AdvBNLayer(nn.Module):
    """AdvBN around the upper part of a network.

    Args:
        tail: features (N,C,H,W) to logits (N,K). It gets a second set of BatchNorms, in place.
        eps, step_size, steps: of the attack.
    """

    def __init__(self, tail: nn.Module, eps: float = 1.1, step_size: float = 0.2, steps: int = 6):
        super().__init__()
        ### BEGIN SOLUTION
        add_second_batch_norm(tail)
        self.tail, self.settings = tail, (eps, step_size, steps)
        ### END SOLUTION

    def attack(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The worst (mean_factor, std_factor) for these features, both 1,C,1,1."""
        ### BEGIN SOLUTION
        use_branch(self.tail, "adversarial")
        try:
            return attack(self.tail, features, labels, *self.settings)
        finally:
            use_branch(self.tail, "clean")
        ### END SOLUTION

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropies (clean, adversarial), scalars."""
        ### BEGIN SOLUTION
        x = features.detach()
        perturbed = change_statistics(x, *self.attack(x, labels))
        use_branch(self.tail, "adversarial")
        adversarial = F.cross_entropy(self.tail(perturbed), labels)
        use_branch(self.tail, "clean")
        return F.cross_entropy(self.tail(x), labels), adversarial
        ### END SOLUTION

    @torch.no_grad()
    def predict(self, features: Tensor, branch: str = "clean") -> Tensor:
        """Logits (N,K) through one set of BatchNorms, in eval mode; all modes are put back."""
        ### BEGIN SOLUTION
        before = [(module, module.training) for module in self.modules()]
        use_branch(self.tail, branch)
        try:
            return self.eval().tail(features)
        finally:
            use_branch(self.tail, "clean")
            for module, training in before:
                module.training = training
        ### END SOLUTION


def training_step(layer: AdvBNLayer, features: Tensor, labels: Tensor, lr: float) -> tuple[float, float]:
    """One step of plain gradient descent on the sum of the two losses, on all parameters of the layer.

    Args:
        lr: every parameter moves by ``-lr`` times its gradient. No momentum, no weight decay.

    Returns:
        The two losses (clean, adversarial) before the step, as numbers.
    """
    ### BEGIN SOLUTION
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    optimizer.zero_grad()
    clean, adversarial = layer(features, labels)
    (clean + adversarial).backward()
    optimizer.step()
    return clean.item(), adversarial.item()
    ### END SOLUTION


# %%
check("write_advbn.the_layer")

# %% [markdown]
# ## 6 Tests that find mistakes
#
# **Intuition.** Your layer is right. Will it still be right after the next change? A test suite is as good as the mistakes it finds. So we make wrong layers on purpose (*mutants*), with one small mistake each, and count how many your
# tests find.
#
# Write `tests_of_mine(Layer)`. `Layer` is a class with the interface of `AdvBNLayer` above. The function returns if all is well and raises an error (an `assert` is enough) if something is wrong. It is called with
#
# - correct layers: they must pass. There are two, *written in different ways*. A test that asks how a layer does something, and not what it does, fails on one of them.
# - many wrong layers: each that fails counts. Which mistakes there are, you see here for eight of them. For the others think of everything that can go wrong.
#
# A wrong layer counts as found only if the tests pass on a correct one that is tried beside it. So tests that always fail earn nothing.
#
# All you may rely on is the interface: `Layer(tail, eps=..., step_size=..., steps=...)`, `.attack`, calling it, `.predict`, and the `tail` that you pass in. Keep it fast: all tests together should take less than about two seconds.
#
# <details><summary>Hints</summary>
#
# - Compare with what *you* wrote: `attack(small_tail(0), x, labels, ...)` should find the same factors.
# - At a factor of exactly 0 everything is cut off, and rounding decides where the next step goes. Two correct layers may differ there. A step size of 0.23 avoids it, 0.2 does not.
# - Do not test with the default settings alone. Which settings would show that `eps` is ignored?
# - Notice what is *left behind*: modes, running statistics, gradients, `requires_grad`, the features, the branch that `tail(x)` uses, and torch's random numbers (draw one first!).
# - A tail need not be in train mode in all of its parts.
# - A test can train: after a step in which you know what each set has seen, you know what each branch must predict.
#
# </details>


# %%
def tests_of_mine(Layer: type[nn.Module]) -> None:
    """Raise an error if ``Layer`` is not a right AdvBN layer."""
    ### BEGIN SOLUTION
    for test in (test_factors, test_traces, test_after_an_error, test_two_sets, test_losses_and_gradients):
        test(Layer)


def test_factors(Layer: type[nn.Module]) -> None:
    for seed, eps, step_size, steps in ((0, 1.1, 0.23, 6), (1, 0.3, 0.25, 1), (2, 0.2, 0.15, 3), (3, 1.1, 0.7, 4)):
        x, labels = small_batch(seed)
        layer = Layer(small_tail(seed, training=True), eps=eps, step_size=step_size, steps=steps)
        found = layer.attack(x, labels)
        wanted = attack(small_tail(seed), x, labels, eps, step_size, steps)
        for have, want in zip(found, wanted, strict=True):
            assert have.shape == want.shape and not have.requires_grad
            assert torch.allclose(have, want)


def test_traces(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(4)
    tail = small_tail(4, training=True)
    layer = Layer(tail, step_size=0.23)
    tail[0].eval()
    torch.rand(3)
    random_state, x_before = torch.get_rng_state(), x.clone()
    modes = [module.training for module in layer.modules()]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.attack(x, labels)
    layer.predict(x)
    layer.predict(x, "adversarial")
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in layer.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in layer.parameters())


def test_after_an_error(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(5)
    layer = Layer(small_tail(5, training=True))
    try:
        layer.attack(x, labels[:2])
    except ValueError:
        pass
    assert all(module.training for module in layer.modules())


def test_two_sets(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(6)
    tail, fresh, seen = small_tail(6, training=True), small_tail(6), small_tail(6, training=True)
    layer = Layer(tail, step_size=0.23)
    for branch in ("clean", "adversarial"):
        assert torch.allclose(layer.predict(x, branch), fresh(x))
    layer.attack(x, labels)
    for _ in range(5):
        tail(9 * x + 3), seen(9 * x + 3)  # the clean set learns from this, and no other
    assert torch.allclose(layer.predict(x), seen.eval()(x))
    assert torch.allclose(layer.predict(x, "adversarial"), fresh(x))
    wanted = attack(fresh, x, labels, step_size=0.23)  # the attack asks the adversarial set
    assert all(torch.allclose(have, want) for have, want in zip(layer.attack(x, labels), wanted))


def test_losses_and_gradients(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(7)
    x.requires_grad_()
    tail, clean_tail, worst_tail = (small_tail(7, training=True) for _ in range(3))
    layer = Layer(tail, step_size=0.23)
    clean, adversarial = layer(x, labels)
    factors = attack(worst_tail, x, labels, step_size=0.23)
    wanted_clean = F.cross_entropy(clean_tail(x.detach()), labels)
    wanted_adversarial = F.cross_entropy(worst_tail(change_statistics(x.detach(), *factors)), labels)
    assert torch.allclose(clean, wanted_clean) and torch.allclose(adversarial, wanted_adversarial)
    (clean + adversarial).backward()
    (wanted_clean + wanted_adversarial).backward()
    assert x.grad is None
    assert torch.allclose(tail[-1].weight.grad, clean_tail[-1].weight.grad + worst_tail[-1].weight.grad)
    assert torch.allclose(layer.predict(x), clean_tail.eval()(x))
    assert torch.allclose(layer.predict(x, "adversarial"), worst_tail.eval()(x))
    ### END SOLUTION


# %%
check("write_advbn.your_tests")

# %% [markdown]
# ## 7 To think about
#
# In words. Not graded by the machine.
#
# 1. Which of your tests found the most mutants? Which found one that no other test found?
# 2. Two correct layers gave different factors for a step size of 0.2. Why is neither of them wrong?
# 3. In train mode, what would the adversary see that it should not see?
# 4. The clean loss and the adversarial loss could go through one BatchNorm set, one after the other. What would the running statistics be an average of?

# %% tags=["instructor"]
# For the instructor: 2. After five steps both factors of a channel can be 0 but for rounding; then all its values are at the kink of the
# cut, where any slope between 0 and 1 is a subgradient. 3. The statistics of the changed batch, which normalise its change away.
# 4. Of both kinds of features: right for neither.
