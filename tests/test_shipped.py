"""What ships loads, says where its numbers come from, and divides over the machines its script asks for."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PathDistribution, distributions, version
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

from tandem.trainer import config
from tandem.trainer.config.schedule import Timeline

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = ["btlm-3b-8k", "stablelm-2-12b", "stablelm-2-1_6b"]
PROXIES = ["btlm-proxy-256", "btlm-proxy-512", "btlm-proxy-1024"]
SECTIONS = list(config.TrainConfig.__dataclass_fields__)

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def shipped(name: str) -> config.TrainConfig:
    return config.load_config(ROOT / "configs" / f"{name}.yaml")


def test_the_list_of_configs_is_the_readmes() -> None:
    table = (ROOT / "configs" / "README.md").read_text()
    for path in CONFIGS:
        assert path.stem in table or f"`{path.stem.removeprefix('btlm-proxy')}`" in table, path


@every_config
def test_loads_and_is_named_after_its_file(path: Path) -> None:
    assert config.load_config(path).run.name == path.stem


@every_config
def test_dump_and_load_give_the_same_config(path: Path, tmp_path: Path) -> None:
    loaded, copy = config.load_config(path), tmp_path / "copy.yaml"
    copy.write_text(config.dump_config(loaded))
    assert config.load_config(copy) == loaded


@every_config
def test_names_every_section_and_field_in_the_order_of_the_schema(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    assert list(tree) == SECTIONS
    loaded = config.load_config(path)
    for name in SECTIONS:
        section = getattr(loaded, name)
        if section is not None and name != "hardware":
            fields = list(type(section).__dataclass_fields__)
            assert list(tree[name]) == fields, name


@every_config
def test_the_learning_rate_ends_as_low_as_the_file_says(path: Path) -> None:
    """A decay or cooldown that outlasts the phases would silently never be reached."""
    schedule = config.load_config(path).schedule
    timeline, lr = Timeline(schedule), schedule.lr
    end = lr.cooldown_final if isinstance(lr, config.HybridLRConfig) else lr.final
    assert timeline.lr_at(timeline.total_steps) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_published_run_names_its_source(name: str) -> None:
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*(- )?\w+: +[^\s#]", line)]
    assert len(values) > 50
    bare = [line for line in values if "#" not in line and "family:" not in line]
    assert bare == []


def test_published_steps() -> None:
    steps = {name: Timeline(shipped(name).schedule).total_steps for name in PUBLISHED}
    assert steps == {"btlm-3b-8k": 159_636, "stablelm-2-12b": 635_783, "stablelm-2-1_6b": 500_000}


def test_proxies_differ_in_width_only() -> None:
    trees = [yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in PROXIES]
    for tree, name in zip(trees, PROXIES, strict=True):
        width = int(name.rsplit("-", 1)[1])
        assert tree["model"].pop("hidden_size") == width
        assert tree["model"].pop("num_heads") == width // 64
        assert tree["model"].pop("ffn_hidden_size") == 8 * width // 3
        del tree["run"]["name"]
        for phase in tree["schedule"]["phases"]:
            del phase["micro_batch_size"]
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_fit_one_node(name: str) -> None:
    config.check_world_size(shipped(name), 8)


@pytest.mark.parametrize("name", ["demo-btlm", "demo-stablelm"])
@pytest.mark.parametrize(("world_size", "tp_size"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_demos_run_on_few_ranks(name: str, world_size: int, tp_size: int) -> None:
    loaded = config.load_config(ROOT / "configs" / f"{name}.yaml", [f"parallel.tp_size={tp_size}"])
    config.check_world_size(loaded, world_size)


@pytest.mark.parametrize(("nodes", "tp_size"), [(12, 1), (15, 1), (20, 1), (16, 4)])
def test_btlm_divides_over_the_nodes_its_comment_names(nodes: int, tp_size: int) -> None:
    loaded = config.load_config(ROOT / "configs" / "btlm-3b-8k.yaml", [f"parallel.tp_size={tp_size}"])
    config.check_world_size(loaded, nodes * 8)


def test_large_whole_numbers_are_written_with_underscores() -> None:
    for path in CONFIGS:
        for number in re.findall(r": (\d{4,})\b", path.read_text()):
            pytest.fail(f"{path.name}: {number}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    """Built from a copy of the checkout in which an earlier version, whose packages had other names, was built too."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("trainer", "kernels", "data_prep", "configs"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    left = place / "build/lib/kernels/__init__.py"
    left.parent.mkdir(parents=True)
    left.touch()
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=place, capture_output=True, text=True, check=True)
    return ZipFile(place / done.stdout.splitlines()[-1])


def test_a_wheel_holds_our_packages_and_configs_and_nothing_else(wheel):
    ours = [path for name in ("trainer", "kernels", "data_prep") for path in (ROOT / name).rglob("*.py")]
    ours += [path for suffix in ("yaml", "md") for path in (ROOT / "configs").rglob(f"*.{suffix}")]
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == {f"tandem/{path.relative_to(ROOT)}" for path in ours}


def test_no_other_distribution_has_a_file_of_ours(wheel):
    """Hugging Face's `kernels`, which transformers imports, and ours once replaced each other."""
    others = [each for each in distributions() if each.name != "tandem"]
    assert len(others) > 50
    assert [each.name for each in others for file in each.files or () if file.parts[0] == "tandem"] == []


def test_an_installation_finds_its_configs_from_any_folder(wheel, tmp_path):
    """In an environment inside the repository of another project, whose commit is not that of our code."""
    wheel.extractall(tmp_path / "site")
    (info,) = (tmp_path / "site").glob("*.dist-info")
    (command,) = PathDistribution(info).entry_points.select(group="console_scripts")
    (tmp_path / "mine.yaml").write_text((ROOT / "configs/demo-btlm.yaml").read_text())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-qm", "theirs", "--allow-empty"]):
        if shutil.which("git"):
            subprocess.run([*git, *words], check=True)
    program = f"""
import sys
from pathlib import Path
from {command.module} import {command.attr}, load_config
from tandem.trainer import run_folder
shipped, mine = (load_config(name, ["hardware=h100_sxm"]) for name in ("demo-btlm", "mine.yaml"))
commit = run_folder._git_output(Path(run_folder.__file__).parents[1], "rev-parse", "HEAD")
print(run_folder.__file__, shipped == mine, mine.hardware.name, commit)
try: {command.attr}(["--help"])
finally: print("torch" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, *usage, last = done.stdout.splitlines()
    assert first == f"{tmp_path}/site/tandem/trainer/run_folder.py True H100 SXM 80 GB None"
    assert usage[0].startswith(f"usage: {command.name} ")
    assert last == "False"


def test_the_installed_packages_meet_our_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [each for each in map(Requirement, project["dependencies"]) if not each.marker or each.marker.evaluate()]
    assert [str(each) for each in ranges if not each.specifier.contains(version(each.name), prereleases=True)] == []
