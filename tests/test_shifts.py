"""The shifted test sets, and accuracy under them."""

import colorsys

import numpy as np
import pytest
import torch
from conftest import tiny_images, tiny_network
from PIL import Image

from advbn_lib import AdvBN, PlainTraining
from advbn_lib.data.corruptions import BRIGHTNESS, CONTRAST, GAUSSIAN_NOISE
from advbn_lib.data.frost import frost_available
from advbn_lib.data.shifts import CORRUPTIONS, FAMILIES, SHIFTS, STYLES, WITHOUT_SEVERITY, Shift, parse_shift
from advbn_lib.evaluation import NOISE_SEED, accuracies, accuracy, family_means, shift_means

ALL = [Shift(name, severity) for name in SHIFTS for severity in ([0] if name in WITHOUT_SEVERITY else range(1, 6))]
no_frost = pytest.mark.skipif(not frost_available(), reason="the frost pictures are not in the data folder")
every_shift = pytest.mark.parametrize(
    "shift", [pytest.param(shift, id=str(shift), marks=no_frost if shift.name == "frost" else ()) for shift in ALL]
)


def levels(images: torch.Tensor) -> np.ndarray:
    """Grey levels, N,H,W,3."""
    return (images * 255).round().permute(0, 2, 3, 1).numpy()


def some_images() -> torch.Tensor:
    """Whole grey levels in [0,1], black, white and single colours among them."""
    images = torch.randint(0, 256, (6, 3, 32, 32)) / 255
    images[0], images[1], images[2, :2] = 0, 1, 0
    return images


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", ["brightness", "contrast", "defocus_blur"])
def test_is_that_of_the_released_generator(released, name, severity):
    images = torch.from_numpy(released["clean"]).permute(0, 3, 1, 2) / 255
    difference = np.abs(levels(Shift(name, severity)(images)) - released[name][severity - 1])
    assert difference.max() <= 2 and difference.mean() < 0.5


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_is_distributed_as_the_released_generators(released, severity):
    clean = released["clean"].astype(float)
    middle = (clean > 110) & (clean < 145)  # where nothing is clipped
    own = levels(
        Shift("gaussian_noise", severity)(
            torch.from_numpy(released["clean"]).permute(0, 3, 1, 2) / 255, torch.Generator().manual_seed(0)
        )
    )
    ours, theirs = ((shifted - clean)[middle] for shifted in (own, released["gaussian_noise"][severity - 1]))
    assert ours.mean() == pytest.approx(theirs.mean(), abs=4 * theirs.std() * (2 / middle.sum()) ** 0.5)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.1)


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_is_normal_with_the_published_size(severity):
    noise = (
        Shift("gaussian_noise", severity)(torch.full((20, 3, 32, 32), 128 / 255), torch.Generator().manual_seed(0))
        * 255
        - 128
    )
    size = 255 * GAUSSIAN_NOISE[severity - 1]
    assert noise.mean().item() == pytest.approx(-0.5, abs=0.5)  # cut down to whole levels
    assert noise.std().item() == pytest.approx(size, rel=0.02)
    assert (noise.abs() < size).float().mean().item() == pytest.approx(0.683, abs=0.02)


@pytest.mark.parametrize("severity", range(1, 6))
def test_brightness_adds_to_the_value_in_hsv(severity):
    images = some_images()[:, :, :6, :6]
    expected = np.empty(levels(images).shape)
    for place in np.ndindex(expected.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*images.permute(0, 2, 3, 1)[place].tolist())
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, min(1, value + BRIGHTNESS[severity - 1]))
    assert np.abs(levels(Shift("brightness", severity)(images)) - np.floor(expected * 255 + 1e-4)).max() <= 1


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_shrinks_towards_the_mean_of_each_image_and_channel(severity):
    images = some_images().numpy()
    mean = images.mean((2, 3), keepdims=True)
    expected = np.floor(((images - mean) * CONTRAST[severity - 1] + mean).clip(0, 1) * 255 + 1e-4).transpose(0, 2, 3, 1)
    assert np.abs(levels(Shift("contrast", severity)(torch.from_numpy(images))) - expected).max() <= 1


@pytest.mark.parametrize("severity", range(1, 6))
def test_blur_keeps_flat_images_and_the_total_light(severity):
    flat, point = torch.full((1, 3, 32, 32), 200 / 255), torch.zeros(1, 3, 32, 32)
    point[..., 16, 16] = 1
    shift = Shift("defocus_blur", severity)
    torch.testing.assert_close(shift(flat), flat)
    blurred = levels(shift(point))[0, :, :, 0]
    assert 255 - np.count_nonzero(blurred) <= blurred.sum() <= 255
    assert np.array_equal(blurred[1:, 1:], blurred[1:, 1:][::-1, ::-1])  # symmetric about the point
    assert np.array_equal(blurred, blurred.T)


def test_more_severe_is_further_away():
    images = some_images()[3:]
    for name in ("gaussian_noise", "brightness", "contrast", "defocus_blur"):
        distances = [
            (Shift(name, severity)(images, torch.Generator().manual_seed(0)) - images).square().mean()
            for severity in range(1, 6)
        ]
        assert distances == sorted(distances) and distances[0] > 0


def test_grey_is_pillows():
    images = some_images()
    shifted = levels(Shift("grey")(images))
    expected = np.stack([np.asarray(Image.fromarray(image.astype(np.uint8)).convert("L")) for image in levels(images)])
    assert np.abs(shifted - expected[..., None]).max() <= 1
    assert (shifted[..., :1] == shifted).all()


def test_clean_changes_nothing():
    images = some_images()
    assert torch.equal(Shift("clean")(images), images)


@every_shift
def test_stays_in_range_on_whole_grey_levels_and_keeps_its_input(shift):
    images = some_images()
    before = images.clone()
    shifted = shift(images, torch.Generator().manual_seed(0))
    assert shifted.shape == images.shape and shifted.amin() >= 0 and shifted.amax() <= 1
    torch.testing.assert_close(shifted * 255, (shifted * 255).round(), rtol=0, atol=1e-4)
    assert torch.equal(images, before)


@every_shift
def test_is_repeatable_and_its_name_can_be_read_back(shift):
    images = some_images()
    first, again = (shift(images, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert parse_shift(str(shift)) == shift


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smog-3", "no shift 'smog'.*contrast"), ("contrast", "contrast has severities.*got 0"), ("contrast-6", "got 6"), ("contrast-0", "got 0"),
        ("grey-1", r"grey has severities \[0\], got 1"), ("contrast-high", "NAME or NAME-SEVERITY, got 'contrast-high'"), ("contrast--1", "NAME-SEVERITY"),
    ],
)  # fmt: skip
def test_an_unknown_shift_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_shift(text)


def test_accuracy_is_the_share_of_right_answers_of_each_branch():
    test = tiny_images(60)
    method = AdvBN(tiny_network())
    for name, buffer in method.named_buffers():
        if name.endswith("adversarial.running_mean"):
            buffer.uniform_(-2, 2)
    method.eval()
    images = test.normalise(test.images / 255)
    expected = {
        branch: (method.predict(images, branch).argmax(1) == test.labels).float().mean().item()
        for branch in method.branches
    }
    assert accuracy(method, test, Shift("clean")) == pytest.approx(expected)
    assert expected["clean"] != expected["adversarial"]


def test_accuracy_shifts_before_it_normalises_and_counts_every_chunk():
    test = tiny_images(1100)
    method = PlainTraining(tiny_network()).eval()
    shifted = torch.cat([Shift("brightness", 5)(part / 255) for part in test.images.split(500)])
    expected = (method.predict(test.normalise(shifted)).argmax(1) == test.labels).float().mean().item()
    assert accuracy(method, test, Shift("brightness", 5)) == pytest.approx({"clean": expected})


def test_accuracy_is_on_the_same_noise_every_time_and_leaves_no_trace():
    method, test = PlainTraining(tiny_network()).train(), tiny_images(50)
    seen = []
    method.model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    before = torch.get_rng_state()
    for _ in range(2):
        torch.rand(3)
        accuracy(method, test, Shift("gaussian_noise", 3))
    torch.set_rng_state(before)
    assert torch.equal(seen[0], seen[1])
    expected = Shift("gaussian_noise", 3)(test.images / 255, torch.Generator().manual_seed(NOISE_SEED))
    torch.testing.assert_close(seen[0], test.normalise(expected))
    assert method.training and method.model.bn1.num_batches_tracked == 0


def test_accuracies_are_a_table_by_branch_and_shift():
    shifts = [Shift("clean"), Shift("contrast", 3)]
    method = AdvBN(tiny_network())
    table = accuracies(method, tiny_images(50), shifts, show_progress=False)
    assert {branch: list(row) for branch, row in table.items()} == {
        branch: ["clean", "contrast-3"] for branch in ("clean", "adversarial")
    }


def test_a_family_mean_counts_each_shift_once_however_many_severities():
    table = {"clean": 0.9, "grey": 0.5, "contrast-1": 0.8, "contrast-3": 0.4, "brightness-3": 0.7}
    assert family_means(table) == pytest.approx(
        {"corruptions": (0.6 + 0.7) / 2, "weather": 0.7, "digital": 0.6, "style": 0.5, "colour": 0.5}
    )
    assert shift_means(table) == pytest.approx({"clean": 0.9, "grey": 0.5, "contrast": 0.6, "brightness": 0.7})
    assert family_means({"clean": 0.9}) == {}


def test_every_corruption_and_style_is_in_the_families_and_the_groups_share_the_corruptions_out():
    groups = [name for family in ("noise", "blur", "weather", "digital") for name in FAMILIES[family]]
    assert sorted(groups) == sorted(FAMILIES["corruptions"]) == sorted(CORRUPTIONS) and len(groups) == 15
    styles = [name for family in ("colour", "filters", "paintings") for name in FAMILIES[family]]
    assert sorted(styles) == sorted(FAMILIES["style"]) == sorted(STYLES)


def test_parts_share_the_images_out_by_severity_and_in_turn():
    shifts = [
        Shift("clean"),
        *(Shift("contrast", s) for s in range(1, 6)),
        Shift("grey"),
        Shift("inverted"),
        Shift("hue", 2),
    ]
    method, test = PlainTraining(tiny_network()), tiny_images(50)
    table = accuracies(method, test, shifts, show_progress=False, parts=5)["clean"]
    parts = {**{f"contrast-{s}": s - 1 for s in range(1, 6)}, "grey": 0, "inverted": 1, "hue-2": 1}
    for name, part in parts.items():
        assert table[name] == accuracy(method, test.part(part, 5), parse_shift(name))["clean"], name
    assert table["clean"] == accuracy(method, test, Shift("clean"))["clean"]


def test_stored_corruptions_are_taken_as_they_are_and_styles_computed():
    asked, method, test = [], PlainTraining(tiny_network()), tiny_images(50)
    held = tiny_images(60, seed=5, name="stored")

    def stored(name, severity):
        asked.append((name, severity))
        return held

    table = accuracies(method, test, [Shift("contrast", 3), Shift("grey")], show_progress=False, stored=stored)["clean"]
    assert asked == [("contrast", 3)]
    assert table["contrast-3"] == accuracy(method, held.first(50), Shift("clean"))["clean"]
    assert table["grey"] == accuracy(method, test, Shift("grey"))["clean"]


def test_half_precision_is_for_the_network_and_not_for_the_shift():
    method, test = PlainTraining(tiny_network()), tiny_images(50)
    seen = []
    method.model.conv1.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output.dtype)))
    for precision in (torch.float32, torch.bfloat16):
        accuracy(method, test, Shift("zoom_blur", 3), precision)
    assert torch.equal(seen[0][0], seen[1][0]) and seen[0][0].dtype == torch.float32
    assert [dtype for _, dtype in seen] == [torch.float32, torch.bfloat16]
