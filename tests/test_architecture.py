"""The arrows point down: what import-linter cannot see of it."""

import configparser
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", ["trainer.config", "trainer.timeline", "trainer.costs"])
def test_modules_that_only_look_at_a_config_never_import_torch(module):
    heavy = "{'torch', 'numpy', 'deepspeed', 'megatron', 'transformers'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_module_of_the_trainer_has_a_place_in_the_layers():
    """import-linter lets a module that no layer names import whatever it likes."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    named = set(contracts["importlinter:contract:layers"]["layers"].replace("|", " ").split())
    modules = {f"trainer.{path.stem}" for path in (ROOT / "trainer").iterdir() if path.name != "README.md"}
    assert modules - {"trainer.__init__", "trainer.__pycache__"} <= named


def test_the_name_kernels_is_ours():
    clash = "kernels" in {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    assert not clash, (
        "the Hugging Face distribution `kernels` is installed beside our package of that name: importing a "
        "transformers model then raises ImportError; remove it with `pip uninstall kernels`"
    )
    origin = importlib.util.find_spec("kernels").origin
    assert Path(origin).parent == ROOT / "kernels"


def test_kernels_claims_no_version():
    """transformers takes a `kernels` with a version for the Hugging Face distribution."""
    import kernels

    assert not hasattr(kernels, "__version__")


def test_commands_of_the_launch_folder_can_be_started():
    scripts = [*(ROOT / "launch").rglob("*.sh"), ROOT / ".ci" / "run"]
    started = [script for script in scripts if script.name != "env.sh"]  # which is sourced
    assert [script.name for script in started if not script.stat().st_mode & 0o111] == []
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("folder", [".", "trainer", "kernels", "configs", "launch", "data_prep", "tests"])
def test_paths_named_on_a_page_exist(folder):
    """Links, and code that begins with one of our folders."""
    page = ROOT / folder / "README.md"
    if not page.exists():
        pytest.skip("no page here")
    text = page.read_text()
    linked = {page.parent / path for path in re.findall(r"\]\((?!http|#)([^)#]+)", text)}
    folders = "trainer|kernels|configs|launch|data_prep|tests"
    named = {ROOT / path for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text)}
    assert sorted(str(path) for path in linked | named if not path.exists()) == []
