"""The arrows point down: what import-linter cannot see of it."""

import ast
import configparser
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

from tests.hostile_modules import write_hostile_modules

ROOT = Path(__file__).parent.parent
FOLDERS = ("trainer", "kernels", "configs", "launch", "data_prep", "tests")
FILES = [path for place in (ROOT.glob("*"), *((ROOT / name).rglob("*") for name in FOLDERS)) for path in place]
OUTSIDE = {
    "AlibiPositionEmbeddingLayer.py": "Cerebras modelzoo",
    "convert_config_to_mup.py": "Cerebras modelzoo",
    "params_btlm_2p7b_2k.yaml": "Cerebras modelzoo",
    "params_btlm_2p7b_8k.yaml": "Cerebras modelzoo",
}
"""Files that are named here and are not ours, and whose they are."""
NAMED = re.compile(r"(?<![\w./*{}$<-])[\w./-]+\.(?:py|sh|yaml)(?![\w*])")


@pytest.mark.parametrize(
    "module",
    [
        "tandem.trainer.config",
        "tandem.trainer.config.schedule",
        "tandem.trainer.config.flops",
        "tandem.trainer.journal",
        "tandem.trainer.metrics.progress",
    ],
)
def test_modules_that_only_look_at_a_config_never_import_torch(module):
    heavy = "{'torch', 'numpy', 'deepspeed', 'megatron', 'transformers'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_start_does_not_import_torchs_compiler():
    """It takes 2 s of every rank. Megatron and DeepSpeed would import it for functions that no run calls."""
    program = (
        "import sys, tandem.trainer.train; print('torch._inductor.lowering' in sys.modules, 'wandb' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split()[-2:] == ["False", "False"]


def test_every_module_of_the_trainer_has_a_place_in_the_layers():
    """import-linter lets a module that no layer names import whatever it likes."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    named = set(contracts["importlinter:contract:layers"]["layers"].replace("|", " ").split())
    stems = {path.stem for path in (ROOT / "trainer").iterdir()} - {"README", "__init__", "__pycache__"}
    assert {f"tandem.trainer.{stem}" for stem in stems} <= named


def test_the_trainer_can_be_looked_over():
    """A newcomer guesses the right room among few, and `trainer/train.py` is read in one sitting."""
    entries = {path.name for path in (ROOT / "trainer").iterdir()} - {"__pycache__"}
    assert len(entries) <= 22
    source = (ROOT / "trainer" / "train.py").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = [name.name for node in imports if str(node.module).startswith("tandem") for name in node.names]
    assert (len(source.splitlines()) <= 280, len(ours) <= 45) == (True, True)


def test_nothing_of_ours_is_importable_under_a_name_that_others_use(tmp_path):
    """A user's trainer.py and Hugging Face's `kernels`, which transformers imports, keep their names."""
    program = (
        "from importlib.util import find_spec; import sys; print(*(name for name in sys.argv[1:] if find_spec(name)))"
    )
    names = ["trainer", "kernels", "data_prep", "tandem.trainer", "tandem.kernels", "tandem.data_prep"]
    answer = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == names[3:]


@pytest.mark.parametrize("module", ["tandem.trainer", "tandem.kernels.bench"])
def test_modules_of_a_working_folder_replace_neither_ours_nor_pythons(module, tmp_path):
    """Except tandem.py: `python -m` searches it in the working folder before any code of ours runs."""
    write_hostile_modules(tmp_path, leave_out=("tandem",))
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_links_import_this_checkout_without_an_installation(tmp_path):
    subprocess.run([ROOT / "launch/links.sh", tmp_path / "links"], check=True)
    program = "import tandem.trainer.disk as disk; print(disk.__file__)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "links")}
    command = [sys.executable, "-S", "-c", program]  # -S: no site-packages
    answer = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(answer.stdout.strip()).resolve() == ROOT / "trainer/disk.py"


def test_every_package_is_installed():
    """An explicit list in pyproject.toml: a folder that it misses is absent from a wheel, and only from a wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [folder for name in project["package-dir"].values() for folder in (ROOT / name).rglob("__init__.py")]
    names = [".".join(("tandem", *file.relative_to(ROOT).parent.parts)) for file in folders]
    assert project["packages"] == sorted([*names, "tandem.configs"])  # which has no module


def test_commands_of_the_launch_folder_can_be_started():
    scripts = [*(ROOT / "launch").rglob("*.sh"), ROOT / ".ci" / "run"]
    started = [script for script in scripts if script.name != "env.sh"]  # which is sourced
    assert [script.name for script in started if not script.stat().st_mode & 0o111] == []
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def words(path: Path) -> list[str]:
    """What a file says to a person: a page, or docstrings and comments."""
    text = path.read_text()
    if path.suffix == ".md":
        return [re.sub(r"```.*?```", "", text, flags=re.DOTALL)]
    if path.suffix != ".py":
        return re.findall(r"(?:^|\s)#.*", text)
    lines = iter(text.splitlines(keepends=True))
    comments = [
        token.string for token in tokenize.generate_tokens(lambda: next(lines, "")) if token.type == tokenize.COMMENT
    ]
    statements = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    return comments + [
        node.value for node in statements if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def is_named_rightly(name: str, path: Path) -> bool:
    """Without a folder it is a file beside the one at `path`, or below; with one it may be anywhere, from any folder on."""
    ours = [file for file in FILES if "/" in name or path.parent in file.parents]
    return name in OUTSIDE or any(file.as_posix().endswith(f"/{name}") for file in ours)


def test_files_named_in_words_exist():
    found = [
        (path, name) for path in FILES if path.suffix in (".md", ".py", ".sh", ".sbatch", ".yaml", ".toml")
        for said in words(path) for code in re.findall(r"`([^`]+)`", said) for name in NAMED.findall(code)
    ]  # fmt: skip
    assert len(found) > 100, "none is seen"
    assert [f"{path.relative_to(ROOT)}: {name}" for path, name in found if not is_named_rightly(name, path)] == []
    assert OUTSIDE.keys() <= {name for _, name in found}


def test_functions_named_on_a_page_exist():
    """`name()` and `_name` are names of ours."""
    code = "\n".join(path.read_text() for path in FILES if path.suffix in (".py", ".sh"))
    found = [
        (path.relative_to(ROOT), name) for path in FILES if path.suffix == ".md" for text in words(path)
        for name in re.findall(r"`(_\w+|\w+\(\))`", text)
    ]  # fmt: skip
    assert len(found) > 5, "none is seen"
    assert [(str(path), name) for path, name in found if name.removesuffix("()") not in code] == []


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_paths_named_on_a_page_exist(folder):
    """Links, and code that begins with one of our folders."""
    page = ROOT / folder / "README.md"
    if not page.exists():
        pytest.skip("no page here")
    text = page.read_text()
    linked = {page.parent / path for path in re.findall(r"\]\((?!http|#)([^)#]+)", text)}
    named = {ROOT / path for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)}
    assert sorted(str(path) for path in linked | named if not path.exists()) == []
