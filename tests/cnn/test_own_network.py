"""A network of one's own: found in the working folder, with options from its signature, equal on 1 and 2 ranks."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cnn.code_digest import code_digest
from cnn.config.networks import is_own
from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.own import MISSING, digests, network_files, own_network, own_packages
from cnn.networks.trial import check_network
from tests.cnn.conftest import Packed, Ranks
from tests.own_project import EXAMPLE, REPOSITORY, write

OPTIONS = """
from __future__ import annotations

from typing import Literal

from torch import nn


def net(channels: int, image_size: int, classes: int, depth: int, *, width: int = 8, dropout: float = 0,
        kernels: tuple[int, ...] = (3, 5), norm: Literal["batch", "none"] = "batch", name: str = None, bare=(1, 2),
        residual: bool = True, activation=nn.ReLU, maker: nn.Module | None = None):
    made = nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, classes))
    made.seen = (depth, width, dropout, kernels, norm, name, bare, residual, activation, maker)
    return made.eval()


def anything(channels, image_size, classes, **more):
    made = nn.Identity()
    made.seen = more
    return made
"""

ODD = """
VALUE = 3


def lacks(channels, classes): ...


def place(channels, image_size, classes, x, /): ...
"""

FAULTY = """
import random

import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, channels, image_size, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.linear = nn.Linear(4, classes)

    def forward(self, images):
        return self.linear(self.features(images))

    def features(self, images):
        return self.conv(images).mean((2, 3))


class Raises(Base):
    def __init__(self, **given):
        super().__init__(**given)
        raise ValueError("on purpose")


class Shapes(Base):
    def features(self, images):
        return self.conv(images).flatten(1) @ torch.eye(5)


class Outputs(Base):
    def forward(self, images):
        return self.features(images)


class Chance(Base):
    def features(self, images):
        return super().features(images) * random.random()


class PairsOnly(Base):
    def features(self, images):
        return super().features(images).view(2, 4)


class Branches(Base):
    def features(self, images):
        found = super().features(images)
        return found if found.sum() > 0 else -found


class Lazy(Base):
    def __init__(self, channels, image_size, classes):
        super().__init__(channels, image_size, classes)
        self.linear = nn.LazyLinear(classes)


class Spare(Base):
    def __init__(self, channels, image_size, classes):
        super().__init__(channels, image_size, classes)
        self.spare = nn.Linear(2, 2)


class Counts(Base):
    def __init__(self, channels, image_size, classes):
        super().__init__(channels, image_size, classes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        self.seen += len(images)
        return super().forward(images)


def nothing(channels, image_size, classes):
    return {}


class Twice(Base):
    def __init__(self, channels, image_size, classes):
        super().__init__(channels, image_size, classes)
        act = nn.PReLU()
        self.first, self.second = nn.Sequential(nn.Conv2d(4, 4, 1), act), nn.Sequential(nn.Conv2d(4, 4, 1), act)

    def features(self, images):
        return self.second(self.first(self.conv(images))).mean((2, 3))
"""


def refusal(model: str) -> str:
    with pytest.raises(InputError) as refused:
        own_network(model)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_options_are_those_of_the_signature_and_keep_their_types(project: Path) -> None:
    write(project, {"options.py": OPTIONS})
    own = own_network("options:net")
    resolved = own.resolved({"depth": 3, "kernels": [7]})
    assert resolved == {
        **{"depth": 3, "width": 8, "dropout": 0.0, "kernels": [7], "norm": "batch", "name": None, "bare": [1, 2]},
        **{"residual": True, "maker": None},
    }
    config = TrainConfig(model="options:net", network=resolved)  # type: ignore[arg-type]
    network: Any = build_network(config, channels=1, image_size=4, classes=3)
    assert network.seen == (3, 8, 0.0, (7,), "batch", None, (1, 2), True, torch.nn.ReLU, None)
    assert all(module.training for module in network.modules())
    assert own.resolved(resolved) == resolved


@pytest.mark.parametrize(
    ("given", "key", "kind"),
    [
        ({}, ("depth",), "missing"),
        ({"depth": 1, "widht": 3}, ("widht",), "extra_forbidden"),
        ({"depth": 1, "activation": "relu"}, ("activation",), "extra_forbidden"),
        ({"depth": 1, "channels": 3}, ("channels",), "extra_forbidden"),
        ({"depth": "deep"}, ("depth",), "int_parsing"),
        ({"depth": 2.5}, ("depth",), "int_from_float"),
        ({"depth": 1, "kernels": [3, "x"]}, ("kernels", 1), "int_parsing"),
        ({"depth": 1, "norm": "layer"}, ("norm",), "literal_error"),
        ({"depth": 1, "residual": "perhaps"}, ("residual",), "bool_parsing"),
        ({"depth": 1, "name": 5}, ("name",), "string_type"),
    ],
)
def test_option_that_does_not_fit_the_signature_is_refused(
    project: Path, given: dict[str, Any], key: tuple[str | int, ...], kind: str
) -> None:
    write(project, {"options.py": OPTIONS})
    with pytest.raises(ValidationError) as refused:
        own_network("options:net").resolved(given)
    (error,) = refused.value.errors()
    assert (error["loc"], error["type"]) == (key, kind)


def test_a_function_that_takes_anything_gets_anything_that_is_finite(project: Path) -> None:
    write(project, {"options.py": OPTIONS})
    own = own_network("options:anything")
    assert own.resolved({"what": {"ever": [1, "x"]}}) == {"what": {"ever": [1, "x"]}}
    assert own.build({"what": 1}, channels=1, image_size=4, classes=3).seen == {"what": 1}
    with pytest.raises(ValueError, match="what: give a finite number"):
        own.resolved({"what": float("inf")})


def test_options_of_a_module_that_is_gone_are_read_as_they_are() -> None:
    """As those of an earlier run, which other commands list."""
    config = TrainConfig(model="gone.nets:Net", network={"width": 3, "kernels": [1, 2]})  # type: ignore[arg-type]
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config.network.model_dump() == {"width": 3, "kernels": [1, 2]}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nets/small.py:Small", "did you mean 'nets.small:Small'?"),
        ("nets.small:", "is package.module:NAME"),
        ("nets small:Small", "is package.module:NAME"),
        ("nets.small:Small.inner", "is package.module:NAME"),
        ("nets.small.Small", "is package.module:NAME"),
    ],
)
def test_name_of_another_form_is_refused_with_the_form(name: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(hint)):
        TrainConfig(model=name)


@pytest.mark.long
def test_what_cannot_be_found_or_imported_is_refused_with_file_and_line(project: Path) -> None:
    write(
        project,
        {
            "nets/small.py": EXAMPLE,
            "nets/made.py": f"{EXAMPLE}\n\nmade = Small(channels=1, image_size=8, classes=2)\n",
            "nets/broken.py": "import nothere\n",
            "nets/uses.py": "from nets import broken\n",
            "nets/syntax.py": "x = 1\ndef f(:\n",
            "nets/ends.py": "import sys\n\nsys.exit(3)\n",
            "nets/odd.py": ODD,
        },
    )
    nowhere = f"nest.small:Small: there is no module nest in {project}"
    assert refusal("nest.small:Small") == f"{nowhere}; did you mean 'nets'?"
    assert "call convoy in the project's folder" in refusal("elsewhere:Net")
    assert refusal("nets.smal:Small") == "nets.smal:Small: ModuleNotFoundError: No module named 'nets.smal'"
    assert refusal("nets.small:Smal") == "nets.small:Smal: nets/small.py has no Smal; did you mean 'Small'?"
    lost = "ModuleNotFoundError: No module named 'nothere'"
    assert refusal("nets.broken:Net") == f"nets.broken:Net, nets/broken.py:1: {lost}"
    assert refusal("nets.uses:Net") == f"nets.uses:Net, nets/broken.py:1: {lost}"
    assert refusal("nets.syntax:Net") == "nets.syntax:Net, nets/syntax.py:2: SyntaxError: invalid syntax"
    assert refusal("nets.ends:Net") == "nets.ends:Net, nets/ends.py:3: SystemExit: 3"
    assert refusal("nets.odd:VALUE").startswith("nets.odd:VALUE is an object of type int; name a class or a function")
    assert refusal("nets.made:made").startswith("nets.made:made is an object of type Small; name a class")
    assert refusal("nets.odd:lacks") == (
        "nets.odd:lacks, nets/odd.py:5: it must take channels, image_size, classes by keyword, and lacks image_size"
    )
    assert "it must take" in refusal("nets.odd:place")
    assert "name the module that has Net" in refusal("nets:Net")


def test_module_that_prints_and_changes_the_folder_disturbs_neither_output_nor_paths(
    project: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(project, {"loud.py": f"import os\n\nprint('hello')\nos.chdir({str(elsewhere)!r})\n{EXAMPLE}"})
    assert [*network_files("loud:Small")] == ["loud.py"]
    assert Path.cwd() == project
    assert capsys.readouterr() == ("", "hello\n")


def test_module_that_is_called_like_another_is_refused_by_name(project: Path) -> None:
    write(
        project,
        {
            **dict.fromkeys(("tasks/nets.py", "yaml.py", "random.py"), EXAMPLE),
            "tasks/__init__.py": "",
            "one.py": "import yaml\n",
            "two.py": "from tasks.nets import Small\n",
            "three.py": "def f():\n    import random\n",
        },
    )
    convoys, ours = "Convoy's own package tasks", "Python does not find this folder's"
    assert refusal("tasks.nets:Small") == f"tasks.nets:Small: {ours} tasks, but {convoys}; rename yours"
    installed = f"yaml:Small: {ours} yaml, but the installed .*/yaml/__init__.py; rename yours"
    assert re.fullmatch(installed, refusal("yaml:Small"))
    assert refusal("random:Small") == f"random:Small: {ours} random, but Python's own module random; rename yours"
    assert "torchvision/__init__.py; a network of your own lies in" in refusal("torchvision.models:resnet18")
    assert "one.py:1 imports yaml, and " in refusal("one:Net")
    assert refusal("two:Small") == f"two.py:1 imports tasks, and {ours}, but {convoys}; rename yours"
    assert "three.py:2 imports random, and " in refusal("three:f")
    assert not is_own("yaml") and is_own("yaml:Small")


def test_a_package_called_like_one_of_ours_is_no_matter_if_the_network_does_not_use_it(project: Path) -> None:
    write(project, {"tasks/__init__.py": "", "tasks/nets.py": "", "small.py": EXAMPLE})
    assert network_files("small:Small") == {"small.py": code_digest([project / "small.py"])}


def test_the_files_that_the_import_loads_are_named_and_no_others(project: Path) -> None:
    write(
        project,
        {
            "nets/__init__.py": "",
            "nets/small.py": f"from .parts import half\nimport extra.deep\n{EXAMPLE}",
            "nets/parts.py": "import importlib\n\nlazy = importlib.import_module('found')\nhalf = 0.5\n",
            "extra/deep.py": "import torch\n",
            "found.py": "",
            "other.py": "import bystander",
            "bystander.py": "",
        },
    )
    sys.path.append(str(project))
    import other  # type: ignore[import-not-found]  # noqa: F401  # as the user's own script may do
    from extra import deep  # type: ignore[import-not-found]  # noqa: F401

    files = network_files("nets.small:Small")
    assert sorted(files) == ["extra/deep.py", "found.py", "nets/__init__.py", "nets/parts.py", "nets/small.py"]
    assert own_packages("nets.small:Small") == ("extra", "found", "nets")
    assert digests(project, files) == files
    (project / "nets/parts.py").write_text("# better\n" + (project / "nets/parts.py").read_text())
    assert digests(project, files) == files
    (project / "nets/parts.py").write_text("half = 0.25")
    (project / "found.py").unlink()
    changed = digests(project, files)
    assert [file for file in files if files[file] != changed[file]] == ["found.py", "nets/parts.py"]
    assert changed["found.py"] == MISSING
    assert network_files("convoy9") == {} == network_files("timm/resnet18d")


@pytest.mark.long
def test_packages_that_are_installed_below_the_folder_are_not_the_projects(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `.venv`: a process whose working folder holds all that is installed."""
    code = "from cnn.networks.own import network_files; print(*network_files('nets.small:Small'))"
    write(project, {"nets/small.py": EXAMPLE})
    (project / "lib").symlink_to(sysconfig.get_path("purelib"))
    places = [str(REPOSITORY), str(project / "lib")]
    program = f"import sys, sysconfig; sysconfig.get_path = lambda key: {places[1]!r}; sys.path[:0] = {places}; {code}"
    done = subprocess.run([sys.executable, "-S", "-P", "-c", program], cwd=project, capture_output=True, text=True)
    assert done.stdout.split() == ["nets/small.py"], done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raises", "faulty:Raises, faulty.py:24: ValueError: on purpose"),
        ("Shapes", "faulty:Shapes, faulty.py:29: RuntimeError: "),
        ("Outputs", "faulty:Outputs classifies no images: it returns 2×4 numbers for 2 images of 7 classes"),
        ("Chance", "faulty:Chance gives other outputs for the same images and seed; "),
        ("PairsOnly", "faulty:PairsOnly, faulty.py:44: RuntimeError: shape '[2, 4]' is invalid for input of size 12"),
        (
            "Branches",
            "faulty:Branches, faulty.py:50: torch.export cannot make a program of it, for any number of",
        ),
        ("Lazy", "faulty:Lazy: linear.weight gets its shape from the first images; "),
        (
            "Twice",
            "faulty:Twice has one tensor as first.1.weight and second.1.weight; give each place a layer of its own",
        ),
        ("Spare", "faulty:Spare does not use spare.weight in training, so it has no gradient"),
        ("Counts", "faulty:Counts changes seen in training; lanes can share the averages of batch norm only"),
        ("nothing", "faulty:nothing, faulty.py:75: it made a dict, not a torch.nn.Module"),
    ],
)
def test_network_that_cannot_be_trained_or_served_is_refused_with_its_line(
    project: Path, capfd: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    write(project, {"faulty.py": FAULTY})
    with pytest.raises(InputError) as refused:
        check_network(TrainConfig(model=f"faulty:{name}"), channels=3, image_size=8, classes=7)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_the_trial_accepts_the_example_and_leaves_the_default_generator_alone(project: Path) -> None:
    write(project, {"nets/small.py": EXAMPLE})
    before = torch.get_rng_state()
    check_network(TrainConfig(model="nets.small:Small"), channels=3, image_size=8, classes=7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.long
def test_the_example_gives_equal_weights_on_1_and_2_ranks(project: Path, digits: Packed) -> None:
    write(project, {"nets/small.py": EXAMPLE})
    network = {"width": 4, "dropout": 0.2}
    config = TrainConfig(model="nets.small:Small", network=network, epochs=1, batch_size=64)  # type: ignore[arg-type]
    program = subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.cnn.rank_program"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        (alone,), two = Ranks(program).train(digits, config, 1, 2)
        program.stdin.close()  # type: ignore[union-attr]
    assert alone["steps"][-1]["loss"] < alone["steps"][0]["loss"]
    assert [rank["weights"] for rank in two] == [alone["weights"]] * 2
