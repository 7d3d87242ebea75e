"""AdvMix: training on images whose content is their own and whose style is the worst of other images' styles; and its controls.

Source: Gowal et al., "Achieving Robustness in the Wild via Adversarial Mixing with Disentangled Representations" (CVPR 2020,
arXiv 1912.03192). **This is a reconstruction**: there is no public code, and of the method only the outline is known to us. Our
choices, each with its reason:

- The balls are around the styles of *other* images (:mod:`advbn_lib.style_mix`), so that mixed images stay near what the decoder
  has seen. The ascent is the same as in AdvBN (:func:`advbn_lib.ascent.ascend`), with a random start and the best point kept.
- A few restarts, each around a fresh other image, the best of each sample kept: one ball is a small part of the set.
- The other image is drawn from all of the training set, whatever its class, but is never the sample itself.
- The radius is in standard deviations of the style codes, since codes have no unit of their own.
- The loss is half that of the real and half that of the mixed images: the test is on real images, and a decoder's are not quite
  that. Other weights, and a term that wants the same answer to both, are options.
- The two kinds are forwarded apart, as everywhere in this book. The ascent runs in eval mode, the update in train mode.
- The decoder is frozen. The ascent's gradient goes through it to the style and nowhere else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.ascent import Steps
from advbn_lib.dual_bn import Branch
from advbn_lib.methods.base import Losses, Method
from advbn_lib.mixing import Decoder, Encoded, Mixer, worst_style
from advbn_lib.modes import evaluating
from advbn_lib.style_mix import StyleBank


def climb_of(count: int) -> Steps:
    """The ascent's steps, in units of the radius: together 2.5 radii, so that the far side of the ball is within reach."""
    return Steps(count, 2.5 / max(count, 1), random_start=True, keep="best")


class MixedTraining(Method):
    """Training on real and on mixed images; a subclass says with which styles. ``method(batch, labels)`` takes an ``Encoded``.

    The loss is ``clean_weight`` times the real plus ``1 - clean_weight`` times the mixed cross-entropy, plus ``consistency`` times
    the Jensen-Shannon divergence of the two answers. At a clean weight of 0 and without consistency the model sees no real image;
    the clean loss that is reported is then the mixed one.

    Args:
        model: normalised images (N,3,H,W) to logits (N,K).
        decoder, bank, mean, std: see :class:`~advbn_lib.mixing.Mixer`; on the model's device.
        clean_weight: from 0 to below 1.
        consistency: 0 or more.

    Raises:
        ValueError: a weight is out of its range.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, bank: StyleBank, mean: tuple[float, ...], std: tuple[float, ...], *,
        clean_weight: float = 0.5, consistency: float = 0.0,
    ):  # fmt: skip
        if not 0 <= clean_weight < 1:
            raise ValueError(
                f"clean_weight must be from 0 to below 1, got {clean_weight}; for real images alone use PlainTraining"
            )
        if not consistency >= 0:
            raise ValueError(f"consistency must be 0 or more, got {consistency}")
        super().__init__(model)
        # No submodule: the decoder is not trained, nor saved with the model.
        self.mixer = Mixer(decoder, bank, mean, std)
        self.clean_weight, self.consistency = clean_weight, consistency

    def choose_style(self, batch: Encoded, labels: Tensor) -> Tensor:
        """A style for each sample's content; shape of ``batch.style``, no graph."""
        raise NotImplementedError(f"{type(self).__name__} must say which style it mixes with")

    def mix(self, batch: Encoded, labels: Tensor) -> Tensor:
        """Mixed images, normalised (N,3,H,W), no graph."""
        style = self.choose_style(batch, labels)
        with torch.no_grad():
            return self.mixer.images(batch.content, style)

    def forward(self, batch: Encoded, labels: Tensor) -> Losses:
        answers = self.model(self.mix(batch, labels))
        mixed = F.cross_entropy(answers, labels)
        if not self.clean_weight and not self.consistency:
            return Losses(mixed, mixed, mixed)
        clean_answers = self.model(batch.images)
        clean = F.cross_entropy(clean_answers, labels)
        total = self.clean_weight * clean + (1 - self.clean_weight) * mixed
        if self.consistency:
            total = total + self.consistency * jensen_shannon(clean_answers, answers).mean()
        return Losses(total, clean, mixed)


class AdvMix(MixedTraining):
    """The worst style: an ascent in the ball around another image's style, ``restarts`` times, the best kept for each sample.

    Args:
        model, decoder, bank, mean, std, clean_weight, consistency: see :class:`MixedTraining`.
        eps: radius of the balls, in standard deviations of the bank.
        steps: of the ascent; together they are 2.5 radii long.
        restarts: other images that are tried.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, bank: StyleBank, mean: tuple[float, ...], std: tuple[float, ...],
        eps: float = 0.3, steps: int = 5, restarts: int = 3, clean_weight: float = 0.5, consistency: float = 0.0,
    ):  # fmt: skip
        super().__init__(model, decoder, bank, mean, std, clean_weight=clean_weight, consistency=consistency)
        self.ball, self.climb, self.restarts = bank.around(eps), climb_of(steps), _at_least_one(restarts)

    def choose_style(self, batch: Encoded, labels: Tensor) -> Tensor:
        with evaluating(self.model):
            return worst_style(self.predict, self.mixer, batch, labels, self.ball, self.climb, self.restarts)


class RandMix(MixedTraining):
    """AdvMix without the ascent: a random point of the ball around another image's style. The key control.

    With several ``looks`` it keeps, of each sample, the one with the largest loss: as many other images as AdvMix tries, or any
    number; what is left to AdvMix is then the gradient.

    Args:
        model, decoder, bank, mean, std, eps, clean_weight, consistency: see :class:`AdvMix`.
        looks: points that are tried.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, bank: StyleBank, mean: tuple[float, ...], std: tuple[float, ...],
        eps: float = 0.3, looks: int = 1, clean_weight: float = 0.5, consistency: float = 0.0,
    ):  # fmt: skip
        super().__init__(model, decoder, bank, mean, std, clean_weight=clean_weight, consistency=consistency)
        self.ball, self.looks = bank.around(eps), _at_least_one(looks)

    def choose_style(self, batch: Encoded, labels: Tensor) -> Tensor:
        with evaluating(self.model):
            return worst_style(self.predict, self.mixer, batch, labels, self.ball, None, self.looks)


class Reconstruction(MixedTraining):
    """Each image decoded with its own style: what the decoder's faults do by themselves."""

    def choose_style(self, batch: Encoded, labels: Tensor) -> Tensor:
        return batch.style


class Recolour(MixedTraining):
    """The oracle on Color-MNIST: colours drawn evenly from all there are. It is told what the others must find.

    It need not be the best: test colours come from around the classes' mean colours, and so do those that the others mix with.
    """

    def choose_style(self, batch: Encoded, labels: Tensor) -> Tensor:
        return torch.rand_like(batch.style)


class OnImages(Method):
    """Another method of this library, on the images of a batch and without their codes."""

    def __init__(self, method: Method):
        super().__init__(method.model)
        self.method = method

    def forward(self, batch: Encoded, labels: Tensor) -> Losses:
        return self.method(batch.images, labels)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return self.method.trainable_parameters()

    def predict(self, images: Tensor, branch: Branch | None = None) -> Tensor:
        """Logits (N,K); without ``branch``, as the method itself chooses."""
        return self.method.predict(images) if branch is None else self.method.predict(images, branch)

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.method.branches


class Mixup(Method):
    """Training on weighted means of two images, with the same weights for their labels: the usual mixing, of pixels.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018). One weight for a batch. The model sees no
    image that is not mixed, and the loss is the mixed one alone.

    Args:
        model: normalised images (N,3,H,W) to logits (N,K).
        alpha: the weight is drawn from Beta(alpha, alpha).

    Raises:
        ValueError: alpha is not above 0.
    """

    def __init__(self, model: nn.Module, alpha: float = 1.0):
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}; for no mixing use PlainTraining")
        super().__init__(model)
        self.alpha = alpha

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        share = torch.distributions.Beta(*images.new_tensor([self.alpha, self.alpha])).sample()
        partner = torch.randperm(len(images), device=images.device)
        logits = self.model(share * images + (1 - share) * images[partner])
        loss = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[partner])
        return Losses(loss, loss)


class GreyTraining(Method):
    """Plain training of a model that sees no colour, in training and in the test: what is lost and gained without it.

    A bright colour stays brighter than a dark one, so something of the colour is left.

    Args:
        model: normalised images (N,3,H,W) to logits (N,K).
        mean, std: of each channel, in [0,1] units: what the images are normalised with.
    """

    LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: shares of red, green and blue in the lightness of a grey image

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(model)
        self.mean, self.std = mean, std

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        loss = F.cross_entropy(self.predict(images), labels)
        return Losses(loss, loss)

    def predict(self, images: Tensor, branch: Branch = "clean") -> Tensor:
        mean, std, luma = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std, self.LUMA))
        grey = ((images * std + mean) * luma).sum(1, keepdim=True)
        return super().predict((grey - mean) / std, branch)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each pair of answers (N,), in nats, from 0 to log 2; both are logits (N,K)."""
    first, second = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(first, second) - torch.log(first.new_tensor(2.0))
    return 0.5 * sum(F.kl_div(middle, each, reduction="none", log_target=True).sum(1) for each in (first, second))


def _at_least_one(restarts: int) -> int:
    if restarts < 1:
        raise ValueError(f"at least 1 other image must be tried, got {restarts}")
    return restarts
