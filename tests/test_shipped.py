"""What ships loads, says where its numbers come from, and divides over the machines its script asks for."""

import re
from pathlib import Path

import pytest
import yaml

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
