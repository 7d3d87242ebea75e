# %% [markdown]
# # Assignment 2: Write AdvBN
#
# **What you will be able to do.** Write the adversary of AdvBN, the two sets of batch normalisation and the training step, each right in every detail.
# And write tests that would notice if a detail were wrong.
#
# **Before you start.** Read [chapter 2](https://github.com/advbn-book/advbn-book/blob/HEAD/notebooks/02_advbn_from_scratch.ipynb), and do assignment 1.
#
# **How long it takes.** Three to four hours. Nothing is downloaded. The cells run in seconds on a laptop; the last check alone, which runs your tests on many layers, takes up to a minute.
#
# **How it is graded.** The checks below each task answer at once. Grading adds other settings and the edges. Task 6 is graded in another way: *your* tests
# are run on wrong layers, and each wrong layer that they find counts. Keep the names and arguments of the functions.
#
# | task | minutes | points |
# |---|---|---|
# | 1 What the adversary may do | 30 | 7½ |
# | 2 One step up | 30 | 7 |
# | 3 The whole ascent | 40 | 11 |
# | 4 Two sets of batch normalisation | 30 | 7 |
# | 5 The layer and a training step | 40 | 20 |
# | 6 Tests that find mistakes | 60 | 22½ |
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
from advbn_lib.assignments.suites import run_all
from advbn_lib.grading import check

# %% [markdown]
# To try things you need the upper part of a network, and features that go into it. `small_tail(seed)` is a small tail with two BatchNorms, one of them inside a block, and
# with running statistics as after a training. It comes in eval mode; `small_tail(seed, training=True)` is in train mode. `small_batch(seed)` gives features $(N, C, H, W)$ and labels that fit it. Both are in float64, so that rounding does not hide a mistake.

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
# Here $a$ is `mean_factor`, $b$ is `std_factor`, and $\mu$ is the batch mean of each channel, over N, H and W.
#
# The $\max$ is there because in a network the features come out of a ReLU: below 0 nothing can come. (In the features of `small_batch` all values are above 0.)
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
        generator: where all random numbers come from; torch's global ones if it is None.

    Returns:
        (mean_factor, std_factor), both 1,C,1,1, of the type of x, and drawn independently.
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
# *each* of its modules. The modes come back also if something goes wrong on the way. Torch's random numbers are left alone too.
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

    It works where gradients are switched off (``torch.no_grad()``), too.

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
# `add_second_batch_norm` changes the tail in place. It finds every `nn.BatchNorm2d`, at any depth: look at `print(tail)`. It is called once for a tail, and a tail is not itself a BatchNorm; you need not think of these cases. `use_branch` chooses which set is used from now on. After `add_second_batch_norm` it is the clean one.


# %%
def add_second_batch_norm(tail: nn.Module) -> None:
    """Give every nn.BatchNorm2d in ``tail``, at any depth, a second one beside it, in place."""
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
# After each call the tail is on the clean set again, also if the call failed. After the attack and after `predict` the modes are as before, also if they failed. The features belong to frozen layers below: no gradient flows into them.


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
        try:
            adversarial = F.cross_entropy(self.tail(perturbed), labels)
        finally:
            use_branch(self.tail, "clean")
        return F.cross_entropy(self.tail(x), labels), adversarial
        ### END SOLUTION

    @torch.no_grad()
    def predict(self, features: Tensor, branch: str = "clean") -> Tensor:
        """Logits (N,K) through one set of BatchNorms, in eval mode; all modes are put back.

        Raises:
            ValueError: for a branch other than "clean" and "adversarial".
        """
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

    The layer stays in the mode in which it is. Gradients left from before do not count.

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
# - correct layers: they must pass. There are two, *written in different ways*. A test that asks how a layer does something, and not what it does, fails on one of them. Both do all that tasks 1 to 5 ask of a layer.
# - wrong layers, about sixty: each that fails counts. The check below names the mistakes of eight of them. For the others think of everything that can go wrong. Those that show only in rare cases (after an error, in other modes and settings, under `torch.no_grad()`) count three times as much as the plain ones.
#
# A wrong layer counts as found only if the tests pass on a correct one that is tried beside it. So tests that always fail earn nothing.
#
# All you may rely on is the interface: `Layer(tail, eps=..., step_size=..., steps=...)`, `.attack`, calling it, `.predict`, and the `tail` that you pass in. Keep it fast: about two seconds for all tests together are plenty. The check says how long they take; ten seconds are the most. (Grading allows two minutes for each cell of this notebook, and half an hour for all of it.)
#
# It is best to write several tests, each a function of `Layer`, and to let `run_all` run them: `run_all(Layer, test_this, test_that)`. It goes on after a failure, and its error names every test that failed and the line.
#
# <details><summary>Hints</summary>
#
# - Compare with what *you* wrote: `attack(small_tail(0), x, labels, ...)` should find the same factors.
# - At a factor of exactly 0 everything is cut off, and rounding decides where the next step goes. Two correct layers may differ there. A step size of 0.23 avoids it, 0.2 does not.
# - Do not test with the default settings alone. Which settings would show that `eps` is ignored?
# - Notice what is *left behind*: modes, running statistics, gradients, `requires_grad`, the features, the branch that `tail(x)` uses, and torch's random numbers. Draw one right before *each* look: an earlier call may have seeded already, and seeding again then changes nothing.
# - A tail need not be in train mode in all of its parts.
# - A test can train: after a step in which you know what each set has seen, you know what each branch must predict.
#
# </details>


# %%
def tests_of_mine(Layer: type[nn.Module]) -> None:
    """Raise an error if ``Layer`` is not a right AdvBN layer."""
    ### BEGIN SOLUTION
    run_all(
        Layer, test_factors, test_traces, test_dead_channel, test_after_errors, test_branches, test_two_sets,
        test_losses_and_gradients, test_eval_mode,
    )  # fmt: skip


def test_factors(Layer: type[nn.Module]) -> None:
    for seed, eps, step_size, steps in ((0, 1.1, 0.23, 6), (1, 0.3, 0.25, 1), (2, 0.2, 0.15, 3), (3, 1.1, 0.7, 4)):
        layer = Layer(small_tail(seed, training=True), eps=eps, step_size=step_size, steps=steps)
        for batch in (seed, seed + 20):  # what was found for one batch is nothing for the next
            x, labels = small_batch(batch)
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
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    x_before = x.clone()
    modes = [module.training for module in layer.modules()]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        without_gradients = layer.attack(x, labels)
    for call in (lambda: layer.attack(x, labels), lambda: layer.predict(x), lambda: layer.predict(x, "adversarial")):
        torch.rand(3)
        random_state = torch.get_rng_state()
        call()
        assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(one, other) for one, other in zip(without_gradients, layer.attack(x, labels)))
    assert torch.equal(x, x_before)
    assert [module.training for module in layer.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    for parameter in layer.parameters():
        assert parameter.requires_grad and torch.equal(parameter.grad, torch.ones_like(parameter))


def test_dead_channel(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(8)
    x[:, 1] = 0
    for factor in Layer(small_tail(8), step_size=0.23).attack(x, labels):
        assert (factor[0, 1] == 1).all()


def trained(Layer: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A layer whose two sets of BatchNorms differ, and its tail; in eval mode."""
    tail = small_tail(5, training=True)
    layer = Layer(tail, step_size=0.23, steps=2)
    for seed in (5, 6):
        layer(*small_batch(seed))
    return layer.eval(), tail


class Fails(nn.Module):
    """Raises an error when it is called for the n-th time, so that any part of a call can fail."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("on purpose")
        return x


def test_after_errors(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(5)
    calls = (lambda layer: layer.attack(x, labels), lambda layer: layer(x, labels), lambda layer: layer.predict(x, "adversarial"))
    for call, most in zip(calls, (2, 4, 1)):
        for at in range(1, most + 1):
            layer, tail = trained(Layer)
            wanted = tail(x)
            layer.train()
            tail[3].eval()
            modes = [module.training for module in tail.modules()]
            failing = Fails(at)
            hook = tail[-1].register_forward_hook(lambda module, inputs, output: failing(output))
            try:
                call(layer)
            except RuntimeError:
                pass
            else:
                raise AssertionError("the error is lost")
            hook.remove()
            assert [module.training for module in tail.modules()] == modes
            if at == 1:  # the running statistics have not moved yet
                layer.eval()
                assert torch.equal(tail(x), wanted)
            layer.eval()
            assert torch.allclose(tail(x), layer.predict(x)), "the tail is not on the clean set"


def test_branches(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(5)
    layer, tail = trained(Layer)
    clean, adversarial = layer.predict(x), layer.predict(x, "adversarial")
    assert not torch.allclose(clean, adversarial)
    for call in (
        lambda: layer.attack(x, labels), lambda: layer(x, labels), lambda: layer.predict(x), lambda: layer.predict(x, "adversarial"),
    ):  # fmt: skip
        call()
        assert torch.allclose(tail(x), clean), "the tail is not on the clean set"
    try:
        layer.predict(x, "other")
    except ValueError:
        return
    raise AssertionError("there is no such branch")


def test_two_sets(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(6)
    tail, fresh, seen = small_tail(6, training=True), small_tail(6), small_tail(6, training=True)
    for one in (tail, seen):
        one[2].momentum = 0.3
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
    for one in (tail, clean_tail, worst_tail):
        one[2].momentum = 0.3
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


def test_eval_mode(Layer: type[nn.Module]) -> None:
    x, labels = small_batch(9)
    layer = Layer(small_tail(9), step_size=0.23).eval()
    clean, adversarial = layer(x, labels)
    fresh = small_tail(9)
    worst = change_statistics(x, *attack(fresh, x, labels, step_size=0.23))
    assert torch.allclose(clean, F.cross_entropy(fresh(x), labels))
    assert torch.allclose(adversarial, F.cross_entropy(fresh(worst), labels))
    assert not any(module.training for module in layer.modules())
    assert torch.allclose(layer.predict(x), fresh(x))
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
