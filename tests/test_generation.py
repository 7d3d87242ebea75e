"""The generator that comes with the library, its encoder's file, and the measurements of both, at the smallest sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from advbn_lib import encoding_bench, generator_bench, generators, records, stylegan_mixing_bench
from advbn_lib.checkpoints import CheckpointError
from advbn_lib.data.images import ImageSet
from advbn_lib.generator_bench import colour_from_class, judged, mixed_pictures, unbiased_digits
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.mixing_trials import Material
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.models.stylegan import Generator, GeneratorConfig, about_generator
from advbn_lib.provenance import state_checksum
from advbn_lib.style_encoder_file import load_encoder, save_encoder
from advbn_lib.style_encoding import StyleEncoder

CPU = torch.device("cpu")
TINY = GeneratorConfig(32, latent=8, width=2, mapping_layers=2)


def tiny_generator(seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    return Generator(TINY).eval().requires_grad_(False)


# ---- what comes with the library ------------------------------------------------------------


def record_of_the_shipped_generator() -> records.Record:
    about = about_generator(generators.FOLDER / f"{generators.COLOUR_MNIST}.safetensors")
    (record,) = (run for run in records.load("generator", "cpu_generator") if run.seed == about["seed"])
    return record


def test_the_generator_that_comes_with_the_library_is_the_one_of_its_record():
    generator, record = generators.shipped_generator(), record_of_the_shipped_generator()
    assert record.weights["sha256"] == state_checksum(generator.state_dict())
    assert record.config["config"] == dataclasses.asdict(generator.config)
    about = about_generator(generators.FOLDER / f"{generators.COLOUR_MNIST}.safetensors")
    assert about["steps"] == record.config["schedule"]["steps"]
    assert about["images_sha256"] in {images["sha256"] for images in record.data.values()}


def test_it_is_far_nearer_to_real_pictures_than_an_untrained_one():
    measured = record_of_the_shipped_generator().metrics["generator"]
    for name in ("fid", "kid"):
        assert measured["real"][name] < measured["made"][name] < measured["untrained"][name] / 10


def test_it_is_the_first_that_keeps_to_what_was_settled_before_the_training():
    """No digit is lost; a seed before the shipped one has its record, too, and was worse."""
    shipped = record_of_the_shipped_generator().seed
    runs = {run.seed: run.metrics["generator"] for run in records.load("generator", "cpu_generator")}
    assert set(range(shipped + 1)) <= runs.keys()
    good = {
        seed: all(found[kind]["rarest_class"] >= generators.RAREST for kind in ("made", "mixed"))
        and found["made"]["fid"] <= generators.WORST_FID
        for seed, found in runs.items()
    }
    assert min(seed for seed, is_good in good.items() if is_good) == shipped


def test_its_encoder_belongs_to_it_and_decodes_to_something_like_the_image():
    generator = generators.shipped_generator()
    encoder = generators.shipped_encoder(generator)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        codes = generator.wplus(generator.mapping(torch.randn(16, generator.config.latent, generator=draws)))
        pictures = generator.images(codes)
        again = generator.images(encoder(pictures))
        mean = generator.images(generator.wplus(generator.mean_w[None].expand(16, -1)))
    error, of_mean = ((each - pictures).square().mean().item() for each in (again, mean))
    assert error < 0.4 * of_mean, "the encoder's codes are hardly better than the mean picture"


def test_no_other_file_is_taken():
    with pytest.raises(CheckpointError, match="no generator file"):
        generators.shipped_generator("faces_1024")
    with pytest.raises(CheckpointError, match="another generator"):
        generators.shipped_encoder(tiny_generator())


def test_the_cut_that_is_used_is_the_one_that_the_record_proposes():
    """The fewest content styles with which swapping costs at most two points."""
    runs = records.load("encoding", "cpu_generator")
    leakage = {
        int(cut): records.aggregate(runs, f"cuts/optimised/{cut}/leakage").mean
        for cut in runs[0].metrics["cuts"]["optimised"]
    }
    proposed = min(cut for cut, lost in leakage.items() if lost <= 0.02)
    assert stylegan_mixing_bench.BENCHES["cpu_generator"].cut == proposed


# ---- the encoder's file ---------------------------------------------------------------------


def test_an_encoder_survives_its_file_up_to_half_precision(tmp_path):
    generator = tiny_generator()
    torch.manual_seed(1)
    encoder = StyleEncoder(generator, width=4)
    torch.nn.init.normal_(encoder.last.weight, std=0.05)
    save_encoder(tmp_path / "e.safetensors", encoder, generator, 4, {"why": "test"})
    again = load_encoder(tmp_path / "e.safetensors", generator)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(again(images), encoder(images), atol=5e-3)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_a_damaged_encoder_file_is_refused(tmp_path):
    generator = tiny_generator()
    path = tmp_path / "e.safetensors"
    save_encoder(path, StyleEncoder(generator, width=2), generator, 2, {})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load_encoder(path, generator)
    path.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_encoder(path, generator)
    with pytest.raises(CheckpointError, match="no encoder file"):
        load_encoder(tmp_path / "none.safetensors", generator)


# ---- the measures ---------------------------------------------------------------------------


def test_colour_from_class_is_one_where_the_class_says_the_colour_and_chance_where_it_says_nothing():
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (2000,), generator=draws)
    palette, random = torch.rand(10, 3, generator=draws), torch.rand(2000, 3, generator=draws)
    assert colour_from_class(palette[labels], labels) == pytest.approx(1, abs=1e-6)
    assert colour_from_class(random, labels) == pytest.approx(9 / 1999, abs=0.004)
    # Spread around the class's colour with the same variance as between the classes: a half.
    spread = (palette[labels] - palette.mean(0)) + palette[torch.randint(0, 10, (2000,), generator=draws)]
    assert colour_from_class(spread, labels) == pytest.approx(0.5, abs=0.05)


def test_the_judge_is_asked_what_it_says_it_is():
    digits = unbiased_digits("digits", "test").first(60)

    class Told(torch.nn.Module):
        """Sure of the class that the first pixel says."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            wanted = (x[:, 0, 0, 0] > 0).long()
            return 20 * torch.nn.functional.one_hot(wanted, 10).float()

    pictures = torch.zeros(40, 3, 32, 32)
    pictures[:10] = 1.0
    found = judged(Told(), digits.images, pictures.split(15))
    assert found["sure"] == 1 and found["rarest_class"] == 0
    assert found["given"] == {"0": 0.75, "1": 0.25} | dict.fromkeys("23456789", 0.0)
    assert found["colour_from_class"] == pytest.approx(1)


def test_mixed_pictures_have_two_styles():
    generator = tiny_generator()
    pictures = torch.cat(list(mixed_pictures(generator, 10, seed=3, batch_size=4)))
    again = torch.cat(list(mixed_pictures(generator, 10, seed=3, batch_size=4)))
    assert pictures.shape == (10, 3, 32, 32) and torch.equal(pictures, again)
    assert 0 <= pictures.min() and pictures.max() <= 1 and not pictures.requires_grad


# ---- the benches ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A smoke run of the generator's bench, and its folder."""
    folder = tmp_path_factory.mktemp("generator")
    bench = generator_bench.BENCHES["smoke_generator"]
    return generator_bench.run_generator_bench(bench, 0, CPU, folder, show_progress=False), folder, bench


def test_the_generators_bench_keeps_its_generator_and_repeats_itself(trained):
    run, folder, bench = trained
    assert about_generator(folder / "generator.safetensors")["steps"] == bench.schedule.steps
    assert set(run.metrics["generator"]) == {"made", "mixed", "real", "untrained"}
    assert run.metrics["generator"]["real"]["fid"] < run.metrics["generator"]["made"]["fid"]
    again = generator_bench.run_generator_bench(bench, 0, CPU, folder, show_progress=False)
    assert again.metrics == run.metrics and again.weights == run.weights
    assert again.cost == run.cost, "a finished training was done again"


def test_the_encoders_bench_measures_every_cut(trained, tmp_path):
    _, folder, _ = trained
    bench = encoding_bench.BENCHES["smoke_generator"]
    run = encoding_bench.run_encoding_bench(bench, 0, CPU, folder, show_progress=False)
    for codes in ("encoder", "optimised"):
        assert list(run.metrics["cuts"][codes]) == [str(cut) for cut in range(1, 8)]
    encoding = run.metrics["encoding"]
    assert encoding["optimised"]["perceptual"] <= encoding["encoder"]["perceptual"]
    # The exact decoder transfers the whole colour and nothing of the digit.
    assert run.metrics["ideal"]["colour"] > 0.95 and abs(run.metrics["ideal"]["colour_kept"]) < 0.5
    generator = generator_bench.train_generator(generator_bench.BENCHES["smoke_generator"], 0, CPU, folder, False)[0]
    load_encoder(folder / "encoder.safetensors", generator)


@pytest.mark.parametrize("method", ["advmix", "recolour"])
def test_mixing_with_a_generator_resumes_level_by_level(trained, method, tmp_path):
    shared = trained[1]
    bench = stylegan_mixing_bench.BENCHES["smoke_generator"]
    run = stylegan_mixing_bench.run_stylegan_mixing_bench(
        bench, method, 0, CPU, "code", tmp_path, shared, show_progress=False
    )
    assert set(run.metrics["mixing"]["accuracy"]) == {"0.02", "unbiased", "mean_biased"}
    assert set(run.metrics["label_kept"]) == {"0.02", "unbiased"}
    again = stylegan_mixing_bench.run_stylegan_mixing_bench(
        bench, method, 0, CPU, "code", tmp_path, shared, show_progress=False
    )
    assert again.metrics == run.metrics and again.cost == run.cost, "a finished level was done again"


def test_only_its_own_methods_are_known():
    bench = stylegan_mixing_bench.BENCHES["smoke_generator"]
    with pytest.raises(ValueError, match="nominal"):
        stylegan_mixing_bench.run_stylegan_mixing_bench(bench, "grey", 0, CPU, "code")


@pytest.mark.parametrize("from_style", [False, True])
def test_a_mixture_that_shows_another_label_is_noticed(from_style):
    """Pictures of which one pixel in the first row says the label; the label is in the content, or, wrongly, in the style."""

    class Decoder:
        def decode(self, content, style):
            code = style + 0 * content if from_style else content + 0 * style
            return code[:, None, None, :].expand(-1, 3, 8, 8)

    class Judge(torch.nn.Module):
        def forward(self, x):
            return x[:, 0, 0]

    labels = torch.arange(40) % 8
    codes = torch.eye(8)[labels]
    images = ImageSet(
        "codes",
        (codes[:, None, None, :] * 255).byte().expand(-1, 3, 8, 8),
        labels,
        tuple("01234567"),
        (0.0,) * 3,
        (1.0,) * 3,
    )
    attacked, others = (
        Material(images.first(20, start), codes[start : start + 20], codes[start : start + 20], Decoder())
        for start in (0, 20)
    )
    sizes = stylegan_mixing_bench.BENCHES["smoke_generator"]
    kept = stylegan_mixing_bench.label_kept(sizes, PlainTraining(Judge()), Judge(), attacked, others)
    assert kept["real"] == kept["own"] == 1
    swapped = {kept[name] for name in ("swapped", "worst", "for_judge")}
    assert max(swapped) < 0.5 if from_style else swapped == {1.0}


def test_the_network_of_digits_refuses_other_sizes_and_can_be_cut():
    from advbn_lib.splitting import split_at

    network, images = DigitCNN(4).eval(), torch.rand(2, 3, 32, 32)
    split = split_at(network, "layer2", images)
    assert torch.equal(split.tail(split.features(images)), network(images))
    with pytest.raises(ValueError, match="resize or pad"):
        network(torch.rand(2, 3, 28, 28))
