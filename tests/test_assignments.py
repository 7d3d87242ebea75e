"""The assignments: solutions pass, student editions do not, and wrong solutions are told what is wrong with them."""

import json
import re
from functools import lru_cache

import pytest
import torch
from conftest import ROOT

from advbn_lib.assignments import write_advbn
from advbn_lib.assignments.arena import Arena, Lamps, noise_as_large, train_against, under_lamps
from advbn_lib.assignments.break_it import accuracy, held_out_images
from advbn_lib.assignments.defences import KINDS, build_defence, make_defence, shown_images
from advbn_lib.assignments.mutants import MUTANTS, SHOWN
from advbn_lib.assignments.own_adversary import sure_gain
from advbn_lib.assignments.suites import run_all
from advbn_lib.assignments.telling import compare
from advbn_lib.grading.catalogue import all_assignments, find
from advbn_lib.grading.editions import instructor_edition, out_of_date, read_source, student_edition
from advbn_lib.grading.grade import examination
from advbn_lib.grading.judge import Verdict, judge
from advbn_lib.grading.local import BEING_GRADED, LocalStudent, report, verdicts_of
from advbn_lib.grading.task import Check, Task, Wrong

pytest.importorskip("sklearn", reason="assignments 3 and 4 compute with scikit-learn's digits")
torch.set_num_threads(1)

FOLDER = ROOT / "assignments"
NAMES = ("statistics_and_style", "write_advbn", "break_it", "own_adversary")


@pytest.fixture(autouse=True)
def as_in_grading(monkeypatch):
    """No pictures and no long experiments, and a short training for the result of assignment 4."""
    monkeypatch.setenv(BEING_GRADED, "1")
    monkeypatch.setenv("ADVBN_QUICK_ARENA", "1")


@lru_cache(maxsize=8)
def code_of(name: str, edition: str) -> tuple[str, ...]:
    (source,) = (FOLDER / "source").glob(f"?_{name}.py")
    cells = (instructor_edition if edition == "instructor" else student_edition)(read_source(source))
    return tuple(cell.text for cell in cells if cell.kind == "code")


def namespace(name: str, edition: str = "instructor", override: str = "") -> dict:
    """The variables of a notebook, with some code run after it."""
    variables: dict = {}
    for text in (*code_of(name, edition), override):
        exec(compile(text, "cell", "exec"), variables)
    return variables


def verdicts(
    name: str, variables: dict, tasks: tuple[str, ...] = (), variant: int = 0, only: str = ""
) -> list[Verdict]:
    """Of all checks, hidden ones too, of some tasks (all, if none is named), or of those with a name that holds ``only``."""
    student = LocalStudent(variables)
    exam = examination(find(name), FOLDER / "hidden", variant)
    chosen = [task for task in exam.assignment.tasks if not tasks or task.name in tasks]
    return [judge(check, student) for task in chosen for check in task.checks if only in check.name]


def test_the_catalogue_has_them_in_order():
    assert [assignment.name for assignment in all_assignments()] == list(NAMES)


def test_the_notebooks_are_up_to_date():
    assert not out_of_date(FOLDER), "run: python -m advbn_lib assignments build"


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes_all_checks(name):
    found = verdicts(name, namespace(name))
    assert not [(v.name, v.message) for v in found if v.state != "passed"]
    assert sum(v.points for v in found) == sum(v.of for v in found) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_student_edition_passes_none(name):
    found = verdicts(name, namespace(name, "student"))
    assert not [v.name for v in found if v.state != "not done"]


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("variant", [1, 2026])
def test_the_solution_passes_in_other_years(name, variant):
    tasks = tuple(t.name for t in find(name).tasks if t.name != "your_tests")
    assert not [(v.name, v.message) for v in verdicts(name, namespace(name), tasks, variant) if v.state != "passed"]


@pytest.mark.parametrize("name", NAMES)
def test_the_points_in_the_notebook_are_those_of_the_checks(name):
    (source,) = (FOLDER / "source").glob(f"?_{name}.py")
    stated = re.findall(r"^# \| \d .*\| \d+ \| ([\d½¼]+) \|$", source.read_text(), flags=re.M)
    exam = examination(find(name), FOLDER / "hidden")
    points = [sum(check.points for check in task.checks) for task in exam.assignment.tasks]
    fractions = {"½": 0.5, "¼": 0.25}
    assert [int(text.rstrip("½¼")) + fractions.get(text[-1], 0) for text in stated] == points


def test_no_hidden_check_is_in_the_package_or_in_a_student_edition():
    for assignment in all_assignments():
        assert not any(check.hidden for task in assignment.tasks for check in task.checks)
        for texts in (code_of(assignment.name, "student"),):
            assert "hidden" not in "\n".join(texts)


# (assignment, task, what is written instead, a word of the message). None of these is right.
WRONG = {
    # 1
    "std over H,W in a batch": ("statistics_and_style", "batch_statistics", "def batch_statistics(x, eps=1e-5):\n    return x.mean((0, 2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + eps).sqrt()", "H,W of each image"),
    "mean over N": ("statistics_and_style", "batch_statistics", "def batch_statistics(x, eps=1e-5):\n    return x.mean(0, keepdim=True), x.std(0, keepdim=True)", "N alone"),
    "biased": ("statistics_and_style", "batch_statistics", "def batch_statistics(x, eps=1e-5):\n    return x.mean((0, 2, 3), keepdim=True), (x.var((0, 2, 3), keepdim=True, unbiased=False) + eps).sqrt()", "biased"),
    "eps outside": ("statistics_and_style", "batch_statistics", "def batch_statistics(x, eps=1e-5):\n    return x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True) + eps", "eps"),
    "no eps": ("statistics_and_style", "instance_statistics", "def instance_statistics(x, eps=1e-5):\n    return x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)", "eps"),
    "variance": ("statistics_and_style", "instance_statistics", "def instance_statistics(x, eps=1e-5):\n    return x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True) + eps", "root"),
    "axes dropped": ("statistics_and_style", "batch_statistics", "def batch_statistics(x, eps=1e-5):\n    return x.mean((0, 2, 3)), (x.var((0, 2, 3)) + eps).sqrt()", "keepdim"),
    "mean of stds": ("statistics_and_style", "batch_statistics", "def batch_statistics(x, eps=1e-5):\n    return x.mean((0, 2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + eps).sqrt().mean(0, keepdim=True)", "means lie apart"),
    "no error": ("statistics_and_style", "instance_statistics", "def instance_statistics(x, eps=1e-5):\n    return x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + eps).sqrt()", "ValueError"),
    "swapped roles": ("statistics_and_style", "adain", "def adain(content, style, eps=1e-5):\n    return renormalise(style, *instance_statistics(content))", "changed places"),
    "batch AdaIN": ("statistics_and_style", "adain", "def renormalise(x, new_mean, new_std, eps=1e-5):\n    mean, std = batch_statistics(x, eps)\n    return new_std * (x - mean) / std + new_mean", "AdaIN's are per image"),
    "divides by variance": ("statistics_and_style", "adain", "def renormalise(x, new_mean, new_std, eps=1e-5):\n    mean, std = instance_statistics(x, eps)\n    return new_std * (x - mean) / std**2 + new_mean", "variance"),
    "AdaIN in place": ("statistics_and_style", "adain", "def renormalise(x, new_mean, new_std, eps=1e-5):\n    mean, std = instance_statistics(x, eps)\n    x -= mean\n    return new_std * x / std + new_mean", "in place"),
    "mean factor added": ("statistics_and_style", "scale_statistics", "def scale_statistics(x, mean_factor, std_factor):\n    m = x.mean((0, 2, 3), keepdim=True)\n    return std_factor * (x - m) + mean_factor", "not added"),
    "per image factors": ("statistics_and_style", "scale_statistics", "def scale_statistics(x, mean_factor, std_factor):\n    m = x.mean((2, 3), keepdim=True)\n    return std_factor * (x - m) + mean_factor * m", "per image"),
    "divided and back": ("statistics_and_style", "scale_statistics", "def scale_statistics(x, mean_factor, std_factor):\n    m, s = batch_statistics(x)\n    return std_factor * s * (x - m) / s + mean_factor * m", "raised"),
    "weights swapped": ("statistics_and_style", "mix_styles", "def mix_styles(x, order, weight, eps=1e-5):\n    m, s = instance_statistics(x)\n    return renormalise(x, (1 - weight) * m + weight * m[order], (1 - weight) * s + weight * s[order])", "1 - weight"),
    "images mixed": ("statistics_and_style", "mix_styles", "def mix_styles(x, order, weight, eps=1e-5):\n    return weight * x + (1 - weight) * x[order]", "images themselves"),
    "variances mixed": ("statistics_and_style", "mix_styles", "def mix_styles(x, order, weight, eps=1e-5):\n    m, s = instance_statistics(x)\n    return renormalise(x, weight * m + (1 - weight) * m[order], (weight * s**2 + (1 - weight) * s[order]**2).sqrt())", "variances"),
    "unstandardised": ("statistics_and_style", "what_is_left_out", "def skewness(x, eps=1e-8):\n    return (x - x.mean((2, 3), keepdim=True)).pow(3).mean((2, 3), keepdim=True)", "standardised"),
    "NaN skewness": ("statistics_and_style", "what_is_left_out", "def skewness(x, eps=1e-8):\n    c = x - x.mean((2, 3), keepdim=True)\n    return c.pow(3).mean((2, 3), keepdim=True) / c.square().mean((2, 3), keepdim=True).pow(1.5)", "not a number"),
    "same as before": ("statistics_and_style", "what_is_left_out", "def same_style(x):\n    return x.clone()", "is x"),
    "batch reflected": ("statistics_and_style", "what_is_left_out", "def same_style(x):\n    return 2 * x.mean((0, 2, 3), keepdim=True) - x", "keep each image's"),
    "shuffled": ("statistics_and_style", "what_is_left_out", "def same_style(x):\n    return x.flip(-1)", "changed its sign"),
    "result detached": ("statistics_and_style", "gradients", "def normalise(x, eps=1e-5, frozen=False):\n    m, s = instance_statistics(x)\n    y = (x - m) / s\n    return y.detach() if frozen else y", "no gradient"),
    "only the std frozen": ("statistics_and_style", "gradients", "def normalise(x, eps=1e-5, frozen=False):\n    m, s = instance_statistics(x)\n    return (x - m) / (s.detach() if frozen else s)", "std is frozen"),
    "never frozen": ("statistics_and_style", "gradients", "def normalise(x, eps=1e-5, frozen=False):\n    m, s = instance_statistics(x)\n    return (x - m) / s", "detach both"),
    # 2
    "no clamp": ("write_advbn", "the_set", "def change_statistics(x, a, b):\n    m = x.mean((0, 2, 3), keepdim=True)\n    return b * (x - m) + a * m", "below 0"),
    "around zero": ("write_advbn", "the_set", "def project(factor, eps):\n    return factor.clamp(-eps, eps)", "around 1"),
    "not below zero": ("write_advbn", "the_set", "def project(factor, eps):\n    return factor.clamp(max(0, 1 - eps), 1 + eps)", "above 1"),
    "global random": ("write_advbn", "the_set", "def random_factors(x, eps, generator=None):\n    return tuple(1 + eps * (2 * torch.rand(1, x.shape[1], 1, 1) - 1) for _ in range(2))", "generator"),
    "normal factors": ("write_advbn", "the_set", "def random_factors(x, eps, generator=None):\n    return tuple(project(1 + eps * torch.randn((1, x.shape[1], 1, 1), generator=generator), eps) for _ in range(2))", "uniform"),
    "one factor twice": ("write_advbn", "the_set", "def random_factors(x, eps, generator=None):\n    f = 1 + eps * (2 * torch.rand((1, x.shape[1], 1, 1), generator=generator) - 1)\n    return f, f", "the same"),
    "descent": ("write_advbn", "one_step", "_step = ascent_step\ndef ascent_step(tail, x, labels, a, b, eps, step_size):\n    return _step(tail, x, labels, a, b, eps, -step_size)", "go down"),
    "sign of 0": ("write_advbn", "one_step", "def ascent_step(tail, x, labels, a, b, eps, step_size):\n    f = [p.detach().requires_grad_() for p in (a, b)]\n    g = torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    return tuple(project(p.detach() + step_size * torch.where(q >= 0, 1.0, -1.0), eps) for p, q in zip(f, g))", "should stay"),
    "raw gradient": ("write_advbn", "one_step", "def ascent_step(tail, x, labels, a, b, eps, step_size):\n    f = [p.detach().requires_grad_() for p in (a, b)]\n    g = torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    return tuple(project(p.detach() + step_size * q, eps) for p, q in zip(f, g))", "sign"),
    "train mode": ("write_advbn", "the_attack", "def attack(tail, x, labels, eps=1.1, step_size=0.2, steps=6):\n    a = b = x.new_ones(1, x.shape[1], 1, 1)\n    for _ in range(steps):\n        a, b = ascent_step(tail, x, labels, a, b, eps, step_size)\n    return a, b", "train mode"),
    "left in eval mode": ("write_advbn", "the_attack", "def attack(tail, x, labels, eps=1.1, step_size=0.2, steps=6):\n    a = b = x.new_ones(1, x.shape[1], 1, 1)\n    tail.eval()\n    for _ in range(steps):\n        a, b = ascent_step(tail, x, labels, a, b, eps, step_size)\n    return a, b", "mode it was in"),
    "all in train mode": ("write_advbn", "the_attack", "def attack(tail, x, labels, eps=1.1, step_size=0.2, steps=6):\n    a = b = x.new_ones(1, x.shape[1], 1, 1)\n    was = tail.training\n    tail.eval()\n    for _ in range(steps):\n        a, b = ascent_step(tail, x, labels, a, b, eps, step_size)\n    tail.train(was)\n    return a, b", "mode it was in"),
    "gradients left": ("write_advbn", "the_attack", "_attack = attack\ndef attack(tail, x, labels, *rest):\n    found = _attack(tail, x, labels, *rest)\n    F.cross_entropy(tail(x), labels).backward()\n    return found", "trace"),
    "shared statistics": ("write_advbn", "two_sets", "class TwoNorms(nn.Module):\n    def __init__(self, norm):\n        super().__init__()\n        self.clean = self.adversarial = norm\n        self.branch = 'clean'\n    def forward(self, x):\n        return self.clean(x)", "share"),
    "second set fresh": ("write_advbn", "two_sets", "class TwoNorms(TwoNorms):\n    def __init__(self, norm):\n        super().__init__(norm)\n        self.adversarial = nn.BatchNorm2d(norm.num_features).double()", "copy"),
    "top only": ("write_advbn", "two_sets", "def add_second_batch_norm(tail):\n    for name, child in list(tail.named_children()):\n        if isinstance(child, nn.BatchNorm2d):\n            setattr(tail, name, TwoNorms(child))", ""),
    "any branch": ("write_advbn", "two_sets", "def use_branch(tail, branch):\n    for module in tail.modules():\n        if isinstance(module, TwoNorms):\n            module.branch = branch", "ValueError"),
    "mean of the losses": ("write_advbn", "the_layer", "def training_step(layer, x, labels, lr):\n    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)\n    optimizer.zero_grad()\n    (sum(layer(x, labels)) / 2).backward()\n    optimizer.step()\n    return 0.0, 0.0", "sum"),
    "clean loss alone": ("write_advbn", "the_layer", "def training_step(layer, x, labels, lr):\n    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)\n    optimizer.zero_grad()\n    layer(x, labels)[0].backward()\n    optimizer.step()\n    return 0.0, 0.0", "clean loss alone"),
    "no zero_grad": ("write_advbn", "the_layer", "def training_step(layer, x, labels, lr):\n    sum(layer(x, labels)).backward()\n    torch.optim.SGD(layer.parameters(), lr=lr).step()\n    return 0.0, 0.0", "earlier steps"),
    "wrong set": ("write_advbn", "the_layer", "_use = use_branch\ndef use_branch(tail, branch):\n    _use(tail, 'clean')", "one and the same|clean BatchNorms"),
    "tests that fail always": ("write_advbn", "your_tests", "def tests_of_mine(Layer):\n    assert False", "correct layer"),
    "tests that pass always": ("write_advbn", "your_tests", "def tests_of_mine(Layer):\n    pass", "passes all your tests"),
    "tests of one way": ("write_advbn", "your_tests", "def tests_of_mine(Layer):\n    assert hasattr(Layer(small_tail(0)), 'step_size')", "another way"),
    "b at the new a": ("write_advbn", "one_step", 'def ascent_step(tail, x, labels, a, b, eps, step_size):\n    def slope(a, b):\n        f = [p.detach().requires_grad_() for p in (a, b)]\n        return torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    ga, gb = slope(a, b)\n    new = project(a + step_size * ga.sign(), eps)\n    return new, project(b + step_size * slope(new, b)[1].sign(), eps)', "new mean factor"),
    "step without projection": ("write_advbn", "one_step", 'def ascent_step(tail, x, labels, a, b, eps, step_size):\n    def slope(a, b):\n        f = [p.detach().requires_grad_() for p in (a, b)]\n        return torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    ga, gb = slope(a, b)\n    return a + step_size * ga.sign(), b + step_size * gb.sign()', "project it"),
    "std not projected": ("write_advbn", "one_step", 'def ascent_step(tail, x, labels, a, b, eps, step_size):\n    def slope(a, b):\n        f = [p.detach().requires_grad_() for p in (a, b)]\n        return torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    ga, gb = slope(a, b)\n    return project(a + step_size * ga.sign(), eps), b + step_size * gb.sign()', "mean factors are right.*project it"),
    "a by the raw gradient": ("write_advbn", "one_step", 'def ascent_step(tail, x, labels, a, b, eps, step_size):\n    def slope(a, b):\n        f = [p.detach().requires_grad_() for p in (a, b)]\n        return torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    ga, gb = slope(a, b)\n    return project(a + step_size * ga, eps), project(b + step_size * gb.sign(), eps)', "std factors are right.*take its sign"),
    "step with a gradient": ("write_advbn", "one_step", 'def ascent_step(tail, x, labels, a, b, eps, step_size):\n    def slope(a, b):\n        f = [p.detach().requires_grad_() for p in (a, b)]\n        return torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    ga, gb = slope(a, b)\n    return tuple(project(p + step_size * q.sign(), eps).requires_grad_() for p, q in ((a, ga), (b, gb)))', "require a gradient"),
    "ascent with b at the new a": ("write_advbn", "the_attack", 'def ascent_step(tail, x, labels, a, b, eps, step_size):\n    def slope(a, b):\n        f = [p.detach().requires_grad_() for p in (a, b)]\n        return torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    ga, gb = slope(a, b)\n    new = project(a + step_size * ga.sign(), eps)\n    return new, project(b + step_size * slope(new, b)[1].sign(), eps)', "new mean factor"),
    "ascent with a raw gradient": ("write_advbn", "the_attack", 'def ascent_step(tail, x, labels, a, b, eps, step_size):\n    def slope(a, b):\n        f = [p.detach().requires_grad_() for p in (a, b)]\n        return torch.autograd.grad(F.cross_entropy(tail(change_statistics(x, *f)), labels), f)\n    ga, gb = slope(a, b)\n    return project(a + step_size * ga, eps), project(b + step_size * gb.sign(), eps)', "mean factors follow"),
    "float32 factors": ("write_advbn", "the_set", 'def random_factors(x, eps, generator=None):\n    return tuple(1 + eps * (2 * torch.rand(1, x.shape[1], 1, 1, generator=generator) - 1) for _ in range(2))', "type of x"),
    "factors without a generator": ("write_advbn", "the_set", '_draw = random_factors\ndef random_factors(x, eps, generator=None):\n    return _draw(x, eps, generator or torch.Generator().manual_seed(0))', "global random numbers"),
    "features not detached": ("write_advbn", "the_layer", 'class AdvBNLayer(AdvBNLayer):\n    def forward(self, features, labels):\n        adversarial = super().forward(features, labels)[1]\n        return F.cross_entropy(self.tail(features), labels), adversarial', "belong to frozen layers"),
    "train mode in training_step": ("write_advbn", "the_layer", '_step = training_step\ndef training_step(layer, *rest):\n    return _step(layer.train(), *rest)', "stay in the mode"),
    "predict of any branch": ("write_advbn", "the_layer", "class AdvBNLayer(AdvBNLayer):\n    def predict(self, features, branch='clean'):\n        return super().predict(features, branch if branch == 'adversarial' else 'clean')", "predict.*ValueError"),
    "set left after an error": ("write_advbn", "the_layer", "class AdvBNLayer(AdvBNLayer):\n    def attack(self, features, labels):\n        use_branch(self.tail, 'adversarial')\n        found = attack(self.tail, features, labels, *self.settings)\n        use_branch(self.tail, 'clean')\n        return found", "attack has failed"),
    "slow tests": ("write_advbn", "your_tests", 'import time\ndef tests_of_mine(Layer):\n    time.sleep(0.4)', "is the most"),
    # 3
    "out of range": ("break_it", "pgd", "def pgd(losses, images, radius, steps=20):\n    return images + radius", "cut them"),
    "out of the ball": ("break_it", "pgd", "_pgd = pgd\ndef pgd(losses, images, radius, steps=20):\n    return _pgd(losses, images, 2 * radius)", "project back"),
    "no attack": ("break_it", "pgd", "def pgd(losses, images, radius, steps=20):\n    return images.clone()", "unchanged"),
    "pgd downhill": ("break_it", "pgd", "_pgd = pgd\ndef pgd(losses, images, radius, steps=20):\n    return _pgd(lambda x: -losses(x), images, radius)", "still right"),
    "all zero": ("break_it", "diagnosis", "def zero_gradients(defence, images, labels):\n    return torch.ones(len(images), dtype=torch.bool)", "is wrong on"),
    "one for all": ("break_it", "diagnosis", "def zero_gradients(defence, images, labels):\n    x = images.clone().requires_grad_()\n    g, = torch.autograd.grad(F.cross_entropy(defence(x), labels), x)\n    return (g == 0).all()", "shape"),
    "wrong reasons": ("break_it", "diagnosis", "def reason(kind):\n    return {'confident': 'a step function', 'rounded': 'a detached part', 'experts': 'the loss saturates'}[kind]", "another one"),
    **{f"plain attack on {kind}": ("break_it", kind, f"def attack_{kind}(defence, images, labels, radius):\n    return pgd(lambda x: F.cross_entropy(defence(x), labels, reduction='none'), images, radius)", "still right|or fewer") for kind in KINDS},
    "noise on rounded": ("break_it", "rounded", "def attack_rounded(defence, images, labels, radius):\n    return (images + radius * torch.randn_like(images).sign()).clamp(0, 1)", "or fewer"),
    "labels as images": ("break_it", "experts", "def attack_experts(defence, images, labels, radius):\n    return images.roll(1, 0)", "has moved"),
    # 4
    "ball without range": ("own_adversary", "pixel_ball", "PixelBall.project = lambda self, x, delta: (delta[0].clamp(-self.radius, self.radius),)", "range of the images"),
    "range without ball": ("own_adversary", "pixel_ball", "PixelBall.project = lambda self, x, delta: ((x + delta[0]).clamp(0, 1) - x,)", "ball is not"),
    "a tensor for a delta": ("own_adversary", "pixel_ball", "PixelBall.start = lambda self, x: torch.zeros_like(x)", "tuple"),
    "random start": ("own_adversary", "pixel_ball", "PixelBall.start = lambda self, x: self.sample(x)", "nothing changes"),
    "standard error": ("own_adversary", "the_judge", "def sure_gain(gains):\n    return statistics.mean(gains) - statistics.stdev(gains) / len(gains) ** 0.5", "standard error"),
    "biased std": ("own_adversary", "the_judge", "def sure_gain(gains):\n    return statistics.mean(gains) - statistics.pstdev(gains)", "biased"),
    "no gradient": ("own_adversary", "your_set", "_apply = MySet.apply\nMySet.apply = lambda self, x, delta: _apply(self, x, (delta[0].detach(),))", "gradient"),
    "rounded apply": ("own_adversary", "your_set", "_apply = MySet.apply\nMySet.apply = lambda self, x, delta: x + (4 * (_apply(self, x, delta) - x)).round() / 4 + 1e-3 * delta[0].mean()", "slope|range|go from"),
    "no border": ("own_adversary", "your_set", "MySet.project = lambda self, x, delta: delta", "border"),
    "not idempotent": ("own_adversary", "your_set", "MySet.project = lambda self, x, delta: (0.5 * delta[0].clamp(-0.3, 0.3),)", "project"),
    "random apply": ("own_adversary", "your_set", "_apply = MySet.apply\nimport random\nMySet.apply = lambda self, x, delta: (_apply(self, x, delta) + 0.1 * random.random() * (delta[0].abs().sum() > 0)).clamp(0, 1)", "apply"),
    "batch in apply": ("own_adversary", "your_set", "_apply = MySet.apply\nMySet.apply = lambda self, x, delta: _apply(self, x, (delta[0] - delta[0].mean(0, keepdim=True),))", "others in the batch"),
    "global sample": ("own_adversary", "your_set", "_sample = MySet.sample\nMySet.sample = lambda self, x, generator=None: _sample(self, x)", "generator"),
    "no-op": ("own_adversary", "the_result", "_apply = MySet.apply\nMySet.apply = lambda self, x, delta: x + 1e-7 * (_apply(self, x, delta) - x)", "must be above"),
    "spoils the noise": ("own_adversary", "the_result", """
class MySet(MySet):
    last, spoil = "", False
    def start(self, x):
        self.spoil = self.last == "project"  # so it is in the arm with the noise
        return super().start(x)
    def apply(self, x, delta):
        self.last = "apply"
        return x if self.spoil else super().apply(x, delta)
    def project(self, x, delta):
        self.last = "project"
        return super().project(x, delta)
""", "another answer to the same"),
    "one number for all": ("own_adversary", "the_result", "MySet.cells = 1", "must be above"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_solution_fails_and_is_told_why(what, monkeypatch):
    name, task, override, word = WRONG[what]
    monkeypatch.setattr(write_advbn, "MOST_SECONDS", 0.3 if what == "slow tests" else write_advbn.MOST_SECONDS)
    only = "some gain" if task == "the_result" else ""  # a training each: one is enough
    found = verdicts(name, namespace(name, override=override), (task,), only=only)
    failed = [verdict for verdict in found if verdict.state != "passed"]
    assert failed, f"{what} passes"
    assert any(verdict.of > 0 for verdict in failed)
    assert any(re.search(word, verdict.message) for verdict in failed), [verdict.message for verdict in failed]
    assert not any("could not use your answer" in verdict.message for verdict in found)


NORM_COPY = "        self.adversarial = copy.deepcopy(norm)\n"
ASCENT = "    try:\n        tail.eval()\n        for _ in range(steps):"
MODES_BACK = "            module.training = training\n    return mean_factor, std_factor"
LAYERS_ATTACK = """        try:
            return attack(self.tail, features, labels, *self.settings)
        finally:
            use_branch(self.tail, "clean")
"""
# Small changes of the solution that all other checks let through: (task, check, old and new pieces, a word of the message).
SMALL_MISTAKES = {
    "graph kept": ("the_layer", "hidden: no graph", [("project(f.detach() + step", "project(f + step")], "gradient"),
    "no enable_grad": ("the_layer", "hidden: without gradients", [("    with torch.enable_grad():\n        loss =", "    if True:\n        loss =")], "enable_grad"),
    "seeds": ("the_layer", "hidden: random numbers", [(ASCENT, "    torch.manual_seed(0)\n" + ASCENT)], "random numbers"),
    "settings lost": ("two_sets", "hidden: settings", [(NORM_COPY, "        self.adversarial = nn.BatchNorm2d(norm.num_features).to(norm.weight)\n        self.adversarial.load_state_dict(norm.state_dict())\n        self.adversarial.train(norm.training)\n")], "momentum"),
    "features not detached": ("the_layer", "hidden: constants", [("        x = features.detach()\n        perturbed", "        x = features\n        perturbed")], "frozen layers"),
    "no finally for the set": ("the_layer", "hidden: clean after an error", [(LAYERS_ATTACK, "        found = attack(self.tail, features, labels, *self.settings)\n        use_branch(self.tail, 'clean')\n        return found\n")], "clean set"),
    "the attack leaves its set": ("the_layer", "hidden: clean after attack", [(LAYERS_ATTACK, "        return attack(self.tail, features, labels, *self.settings)\n")], "clean set"),
    "a copy of the tail": ("the_layer", "hidden: the very tail", [("        add_second_batch_norm(tail)\n        self.tail", "        tail = copy.deepcopy(tail)\n        add_second_batch_norm(tail)\n        self.tail")], "not on a copy"),
    "train after predict": ("the_layer", "hidden: modes after predict", [('            use_branch(self.tail, "clean")\n            for module, training in before:\n                module.training = training', '            use_branch(self.tail, "clean")\n            self.train()')], "mode"),
    "predict leaves its set": ("the_layer", "hidden: clean after predict", [('        finally:\n            use_branch(self.tail, "clean")\n            for module', "        finally:\n            for module")], "clean set"),
    "losses swapped": ("the_layer", "hidden: returned losses", [("return clean.item(), adversarial.item()", "return adversarial.item(), clean.item()")], "comes first"),
    "begins adversarial": ("two_sets", "hidden: begins clean", [('self.branch = "clean"', 'self.branch = "adversarial"')], "clean set is in use"),
    "moves the old factors": ("one_step", "hidden: factors are kept", [("    return moved[0], moved[1]", "    with torch.no_grad():\n        mean_factor.copy_(moved[0]), std_factor.copy_(moved[1])\n    return mean_factor, std_factor")], "input in place"),
    "flags of the old factors": ("one_step", "hidden: factors are kept", [("(mean_factor.detach().requires_grad_(), std", "(mean_factor.requires_grad_(), std")], "requires_grad"),
    "x in place": ("the_set", "hidden: x is kept", [("    return (std_factor * (x - mean)", "    x -= mean\n    return (std_factor * x")], "in place"),
    "frozen after an error": ("the_layer", "hidden: flags after an error", [(ASCENT, "    flags = [p.requires_grad for p in tail.parameters()]\n    tail.requires_grad_(False)\n" + ASCENT), (MODES_BACK, MODES_BACK.replace("    return", "    for p, flag in zip(tail.parameters(), flags):\n        p.requires_grad_(flag)\n    return"))], "finally"),
    "cut above": (
        "the_set",
        "change",
        [("mean_factor * mean).clamp_min(0)", "mean_factor * mean).clamp(0, x.max().item())")],
        "lower end alone",
    ),
    "mean per image": (
        "one_step",
        "step",
        [("mean = x.mean((0, 2, 3), keepdim=True)", "mean = x.mean((2, 3), keepdim=True)")],
        "per image",
    ),
    "step by the norm": ("one_step", "step", [("step_size * g.sign()", "step_size * g / g.norm()")], "divided by its length"),
    "starts at random": ("the_attack", "factors", [("mean_factor, std_factor = x.new_ones(1, x.shape[1], 1, 1), x.new_ones(1, x.shape[1], 1, 1)", "mean_factor, std_factor = random_factors(x, eps)")], "starts at 1"),
    "weights shared": ("the_layer", "hidden: training", [(NORM_COPY, NORM_COPY + "        self.adversarial.weight, self.adversarial.bias = norm.weight, norm.bias\n")], "share their weights"),
    "losses halved": ("the_layer", "losses", [("return F.cross_entropy(self.tail(x), labels), adversarial", "return F.cross_entropy(self.tail(x), labels) / 2, adversarial / 2")], "half as large"),
    "mean not projected": ("one_step", "border", [("return moved[0], moved[1]", "return mean_factor.detach() + step_size * gradients[0].sign(), moved[1]")], "std factors are right.*project it"),
}  # fmt: skip


@pytest.mark.parametrize("what", SMALL_MISTAKES)
def test_a_small_mistake_is_found_and_named(what):
    task, check, pieces, word = SMALL_MISTAKES[what]
    text = "\n".join(code_of("write_advbn", "instructor"))
    for old, new in pieces:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    variables: dict = {}
    exec(compile(text, "cell", "exec"), variables)
    (verdict,) = [v for v in verdicts("write_advbn", variables, (task,), only=check) if v.name == check]
    assert verdict.state == "wrong" and re.search(word, verdict.message), verdict


@pytest.mark.parametrize("override", [
    "def attack(tail, x, labels, *rest):\n    return (torch.full((1, 4, 1, 1), torch.nan, dtype=x.dtype),) * 2\ndef add_second_batch_norm(tail):\n    pass\ndef use_branch(tail, branch):\n    pass",
    "def attack(*rest):\n    raise ValueError\ndef add_second_batch_norm(tail):\n    raise ValueError\ndef use_branch(tail, branch):\n    raise ValueError",
])  # fmt: skip
def test_who_does_nothing_gets_nothing(override):
    found = verdicts("write_advbn", namespace("write_advbn", override=override), ("the_attack", "two_sets"))
    assert not [v.name for v in found if v.state == "passed"]


LIKELY_STEPS = [what for what, (_, task, _, _) in WRONG.items() if task == "one_step"]


@pytest.mark.parametrize("what", LIKELY_STEPS)
def test_the_notebook_itself_finds_a_wrong_step_and_names_the_right_cause_alone(what):
    """A wrong step must not come through task 2, or the student looks for it in task 3."""
    name, task, override, word = WRONG[what]
    student = LocalStudent(namespace(name, override=override))
    said = [v.message for v in (judge(check, student) for check in find(name).task(task).checks) if v.state != "passed"]
    assert any(re.search(word, message) for message in said), said
    assert not [message for message in said if "cut at 0" in message]


def test_a_cause_is_named_alone_only_if_no_other_one_fits():
    wanted, other, third = torch.zeros(2), torch.ones(2), 2 * torch.ones(2)
    with pytest.raises(Wrong, match="^it: more$"):
        compare(other, wanted, "it", {"more": other, "less": third, "nothing": wanted})
    with pytest.raises(Wrong, match="more than one possible cause: more, or as well"):
        compare(other, wanted, "it", {"more": other, "as well": other.clone(), "less": third})


def test_a_false_alarm_is_told_once_with_all_tests_that_fail_and_the_time_is_told():
    override = """
def same(one, other):
    assert one == other
def test_one(Layer):
    same(1, 2)
def test_two(Layer):
    pass
def test_three(Layer):
    raise KeyError("three")
def tests_of_mine(Layer):
    run_all(Layer, test_one, test_two, test_three)
"""
    task = find("write_advbn").task("your_tests")
    found = verdicts_of(task, LocalStudent(namespace("write_advbn", override=override)))
    assert [v.state for v in found] == ["wrong"] + ["not tried"] * len(SHOWN)
    printed = report(task.title, found)
    assert printed.count("your tests fail on") == printed.count("test_one (line 5") == 1
    assert "test_three (line 9" in printed and "test_two" not in printed and "2 of 3 tests fail" in printed
    (first, *_) = verdicts_of(task, LocalStudent(namespace("write_advbn", override="def tests_of_mine(Layer): pass")))
    assert re.search(r"take \d+\.\d s on one layer.* 10 s is the most", first.message)
    assert "do the checks of tasks 1 to 5 hold" in printed
    for name in SHOWN:
        assert MUTANTS[name].mistake[1:] in printed


def test_a_suite_that_needs_what_is_not_written_says_so():
    def test(subject):
        raise NotImplementedError("attack is not written yet")

    with pytest.raises(NotImplementedError):
        run_all(None, test)


def test_an_error_is_told_with_the_lines_that_led_to_it():
    code = """
def same(one, other):
    assert one == other
def tests_of_mine(Layer):
    same(1, 1)
    same(1, 2)
"""
    outcome = LocalStudent(namespace("write_advbn", override=code)).attempt("tests_of_mine", None)
    assert re.fullmatch(r"line 3.*, called at line 6.*", outcome.where)


def test_a_check_can_need_only_one_before_it():
    first, second = Check("first", "", print), Check("second", "", print, needs="first")
    Task("t", "T", (first, second))
    with pytest.raises(ValueError, match="no check before it"):
        Task("t", "T", (second, first))


def test_the_name_of_an_error_tells_nothing_of_hidden_inputs():
    code = "def use_branch(tail, branch):\n    if branch not in ('clean', 'adversarial'):\n        raise type('secret', (Exception,), {})"
    found = verdicts("write_advbn", namespace("write_advbn", override=code), ("two_sets",), only="wrong name")
    assert [v.state for v in found] == ["wrong"] and "secret" not in found[0].message


def test_the_tasks_are_called_in_reports_as_in_the_notebooks():
    for assignment in all_assignments():
        (source,) = (FOLDER / "source").glob(f"?_{assignment.name}.py")
        headings = re.findall(r"^# ## \d (.*)$", source.read_text(), flags=re.M)
        assert headings == [task.title for task in assignment.tasks] + ["To think about"]


def test_a_false_alarm_under_a_hidden_check_shows_nothing_of_the_layers():
    override = "def tests_of_mine(Layer):\n    raise ValueError('secret')"
    found = verdicts("write_advbn", namespace("write_advbn", override=override), ("your_tests",), only="finds 1")
    assert found and all("secret" not in v.message and v.state == "wrong" for v in found if v.hidden)


def test_there_are_enough_wrong_ones():
    assert len(WRONG) >= 30


OTHER_WAYS = {
    "one": ("statistics_and_style", """
def batch_statistics(x, eps=1e-5):
    flat = x.transpose(0, 1).reshape(x.shape[1], -1)
    if flat.shape[1] < 2:
        raise ValueError("one number")
    mean = flat.sum(1) / flat.shape[1]
    variance = (flat - mean[:, None]).pow(2).sum(1) / (flat.shape[1] - 1)
    return [value.view(1, -1, 1, 1) for value in (mean, torch.sqrt(variance + eps))]
def instance_statistics(x, eps=1e-5):
    if x.shape[2] * x.shape[3] == 1:
        raise ValueError("one number")
    return torch.mean(x, (-1, -2), True), torch.sqrt(torch.var(x, (-1, -2), keepdim=True) + eps)
def scale_statistics(x, mean_factor, std_factor):
    return std_factor * x + (mean_factor - std_factor) * x.mean(0, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
def same_style(x):
    return x - 2 * (x - x.mean((2, 3), keepdim=True))
"""),
    "two": ("write_advbn", """
def change_statistics(x, mean_factor, std_factor):
    mean = x.mean((0, 2, 3), keepdim=True)
    return torch.relu(mean * mean_factor + (x - mean) * std_factor)
def project(factor, eps):
    return 1 + (factor - 1).clamp(-eps, eps)
def ascent_step(tail, x, labels, mean_factor, std_factor, eps, step_size):
    both = torch.stack([mean_factor, std_factor]).detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(tail(change_statistics(x, both[0], both[1])), labels, reduction="sum")
        slope = torch.autograd.grad(loss, both)[0]
    return list(project(both.detach() + step_size * torch.sign(slope), eps))
def training_step(layer, x, labels, lr):
    losses = layer(x, labels)
    parameters = list(layer.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(losses[0] + losses[1], parameters, allow_unused=True)):
        if grad is not None:
            parameter.data.sub_(grad, alpha=lr)
    return losses[0].item(), losses[1].item()
"""),
    "three": ("break_it", """
def attack_rounded(defence, images, labels, radius):
    def losses(x):
        steps = ((3 * x).round() / 3 - x).detach() + x
        return margins(defence.network(steps), labels)
    return pgd(losses, images, radius)
def attack_experts(defence, images, labels, radius):
    return pgd(lambda x: F.cross_entropy(defence.network(x) / 5, labels, reduction="none"), images, radius)
def attack_confident(defence, images, labels, radius):
    return pgd(lambda x: F.cross_entropy(1e-4 * defence(x), labels, reduction="none"), images, radius)
"""),
}  # fmt: skip


@pytest.mark.parametrize("which", OTHER_WAYS)
def test_a_right_solution_in_another_hand_passes(which):
    name, override = OTHER_WAYS[which]
    tasks = tuple(task.name for task in find(name).tasks if task.name != "your_tests")
    assert not [
        (v.name, v.message) for v in verdicts(name, namespace(name, override=override), tasks) if v.state != "passed"
    ]


def test_another_set_passes_the_laws():
    override = """
class MySet:
    per_sample, step_size = True, 0.2
    def start(self, x):
        return torch.zeros(len(x), 2), torch.ones(len(x), 1)
    def sample(self, x, generator=None):
        light = torch.rand((len(x), 2), generator=generator) - 0.5
        return light, 1 + 0.4 * (2 * torch.rand((len(x), 1), generator=generator) - 1)
    def apply(self, x, delta):
        light, contrast = delta
        slope = torch.linspace(-1, 1, x.shape[-1])
        field = light[:, :1, None, None] * slope + light[:, 1:, None, None] * slope[:, None]
        return (contrast[:, :, None, None] * x + field).clamp(0, 1)
    def project(self, x, delta):
        return delta[0].clamp(-0.5, 0.5), delta[1].clamp(0.6, 1.4)
"""
    found = verdicts("own_adversary", namespace("own_adversary", override=override), ("your_set",))
    assert not [(v.name, v.message) for v in found if v.state != "passed"]


def test_the_defences_are_right_on_clean_images_and_their_notebook_images_are_not_graded():
    shown, _ = shown_images()
    for kind in KINDS:
        images, labels = held_out_images(100, 1)
        assert accuracy(make_defence(kind, 1), images, labels) > 0.9
        assert not any(torch.equal(image, other) for image in images[:20] for other in shown)
    with pytest.raises(ValueError, match="one of confident"):
        build_defence("other", {})


def test_the_noise_is_as_large_as_the_adversary_number_by_number():
    lamps, x, generator = Lamps(strength=10.0), torch.rand(8, 1, 8, 8), torch.Generator().manual_seed(0)
    (delta,) = lamps.sample(x, generator)
    (noise,) = noise_as_large(lamps, x, (delta,), generator)
    torch.testing.assert_close(noise.abs(), delta.abs())
    assert 0.2 < (noise == delta).float().mean() < 0.8


def test_the_arms_differ_in_the_perturbation_alone_and_repeat():
    arena = Arena(images=64, epochs=1, width=4, test_images=50)
    lamps = Lamps()
    first, again, noise = (train_against(lamps, 0.1, arm, 3, arena) for arm in ("adversary", "adversary", "noise"))
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values())]
    assert all(same)
    assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), noise.state_dict().values()))
    clean, worst = under_lamps(first, arena)
    assert 0 <= worst <= clean <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_student_edition_runs_from_top_to_bottom(name, monkeypatch, capsys):
    monkeypatch.delenv(BEING_GRADED)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace(name, "student")
    printed = capsys.readouterr().out
    assert "to do" in printed and "  ok  " not in printed and "WRONG" not in printed


def guide_rows(heading: str) -> list[list[str]]:
    """The rows of the table below a heading of the instructor's guide, its head left out."""
    part = (FOLDER / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_guide_names_mutants_that_there_are():
    named = {name for row in guide_rows("Common mistakes") for name in re.findall(r"`(\w+)`", row[-1])}
    assert len(named) >= 15 and named <= set(MUTANTS)


def test_the_guides_seconds_are_those_that_were_measured():
    measured = json.loads((FOLDER / "cost.json").read_text())
    rows = guide_rows("Two hundred students")
    assert [row[0] for row in rows] == list(NAMES)
    assert [[row[1], row[2]] for row in rows] == [
        [f"{measured[name]['seconds']:.0f}", f"{200 * measured[name]['seconds'] / 3600:.1f}"] for name in NAMES
    ]


def test_the_guides_points_are_those_of_the_checks():
    rows = guide_rows("Rubric")
    sums = [
        sum(c.points for t in examination(find(name), FOLDER / "hidden").assignment.tasks for c in t.checks)
        for name in NAMES
    ]
    assert [float(row[2]) for row in rows] == sums


def test_sure_gain():
    assert sure_gain([0.1, 0.3]) == pytest.approx(0.2 - 0.02**0.5)
