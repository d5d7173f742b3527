"""launch/install.sh on machines that lack something: one line says what and how to go on, and the next call does.

Packages come from a folder of wheels that carry the names and versions of constraints.txt and nothing else, so that an
installation takes seconds. pip, venv and setuptools are real. ensurepip, the slowest step, runs once for each Python, and the
`python` fixture repeats its result. `launch/test.sh fresh` installs the true packages.
"""

import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.timeouts import TEST_TIMEOUT_SECONDS

ROOT = Path(__file__).parents[2]
COMMANDS = {"torch": "torchrun", "pytest": "pytest", "mypy": "mypy", "import-linter": "lint-imports"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(),
        reason="on a GPU torch is looked at, and these are none",
    ),
]


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    """A wheel of no code, with the command that install.sh looks for."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {r}\n" for r in requires
    )
    for extra in ("http", "hf"):
        metadata += f"Provides-Extra: {extra}\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        file.writestr(f"{stem}.dist-info/METADATA", metadata)
        file.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        if name in COMMANDS:
            file.writestr(
                f"{stem}.dist-info/entry_points.txt", f"[console_scripts]\n{COMMANDS[name]} = {name[:2]}_x:main\n"
            )
        file.writestr(f"{stem}.dist-info/RECORD", "")
    return folder / f"{stem}-py3-none-any.whl"


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory) -> Path:
    """A wheel for each pin; setuptools as it is installed here, since it builds Tandem."""
    folder = tmp_path_factory.mktemp("wheels")
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and name != "setuptools":
            write_wheel(folder, name, version)
    setuptools = distribution("setuptools")
    with zipfile.ZipFile(folder / f"setuptools-{setuptools.version}-py3-none-any.whl", "w") as file:
        for path in setuptools.files or ():
            if ".." not in path.parts and path.suffix != ".pyc" and path.name not in ("INSTALLER", "REQUESTED"):
                file.write(path.locate(), path)
    return folder


def copy_to(folder: Path) -> Path:
    """A copy of what install.sh needs, in a folder whose name has a space."""
    copy = folder / "a copy"
    for name in ("launch", "configs", "trainer", "kernels", "data_prep"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_to(tmp_path)


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory) -> str:
    """A PATH on which `df` reports 1.0 GB free: install.sh makes or checks .venv, then refuses before it fetches anything."""
    df = tmp_path_factory.mktemp("full-disk") / "df"
    df.write_text("#!/bin/sh\nprintf 'Filesystem 1024-blocks Used Available\\n/dev/x 5 4 1000000\\n'\n")
    df.chmod(0o755)
    return f"{df.parent}:{environment(None)['PATH']}"


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, full_disk) -> Path:
    """A copy whose .venv is there, but nothing in it. Tests that fail later than that share it, in any order."""
    copy = copy_to(tmp_path_factory.mktemp("unfinished"))
    assert "its disk has 1.0 GB free" in one_line(install(copy, None, PATH=full_disk), 2)
    (made,) = copy.glob(".venv/lib/python3*/site-packages")
    shutil.copytree(made, copy.parent / "with pip")
    return copy


@pytest.fixture(scope="module")
def python(tmp_path_factory, unfinished) -> str:
    """An installation of this Python whose ensurepip copies what the real one put into the .venv of `unfinished`.

    The entries of the standard library are links. The program is a copy, because Python follows a link to find its library.
    """
    prefix = tmp_path_factory.mktemp("python")
    library = prefix / sys.platlibdir / f"python{sys.version_info.major}.{sys.version_info.minor}"
    library.mkdir(parents=True)
    for path in Path(os.__file__).parent.iterdir():
        if path.name not in ("ensurepip", "__pycache__"):
            (library / path.name).symlink_to(path)
    (library / "ensurepip").mkdir()
    (library / "ensurepip/__init__.py").touch()
    (library / "ensurepip/__main__.py").write_text(
        "import shutil, sysconfig\n"
        f"shutil.copytree({str(unfinished.parent / 'with pip')!r}, sysconfig.get_path('purelib'), dirs_exist_ok=True)\n"
    )
    (prefix / "bin").mkdir()
    return str(shutil.copy(os.path.realpath(sys._base_executable), prefix / "bin/python3"))


def environment(wheelhouse: Path | None, **settings: str) -> dict[str, str]:
    """This process's, with the Python of the tests and no setting of pip but where its packages are."""
    ignored = (
        "PIP_",
        "PYTHON",
        "TORCH_",
        "HTTP",
        "http",
        "ALL_PROXY",
        "all_proxy",
    )  # some indexes of these tests are local
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    base = Path(sys._base_executable).parent  # not an environment's: .venv is to be made from what stays
    where = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheelhouse.as_uri()} if wheelhouse else {}
    return (
        kept
        | {"PIP_CONFIG_FILE": os.devnull, "PATH": f"{base}:/usr/bin:/bin", "PYTHON": sys._base_executable}
        | where
        | settings
    )


def install(copy: Path, wheelhouse: Path | None, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [copy / "launch/install.sh"],
        env=environment(wheelhouse, **settings),
        capture_output=True,
        text=True,
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """What stands on stderr, after a look at its form and at the exit code."""
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (code, 1), done.stdout + done.stderr
    assert lines[0].startswith("install: ")
    return lines[0]


# --- before anything is made


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python does not start; Tandem needs Python 3.11 to 3.13"),
        ({"TORCH_BUILD": "gpu"}, "TORCH_BUILD=gpu is not valid; use cpu or cuda"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings, said, copy, wheelhouse):
    assert said in one_line(install(copy, wheelhouse, **settings), 2)
    assert not (copy / ".venv").exists()


def test_a_python_outside_the_range_is_named_with_its_version(copy, wheelhouse):
    project = copy / "pyproject.toml"
    project.write_text(re.sub(r'requires-python = "[^"]*"', 'requires-python = ">=3.97,<3.99"', project.read_text()))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    said = one_line(install(copy, wheelhouse, PYTHON=""), 2)
    assert f"python3 is Python {version}; Tandem needs Python 3.97 to 3.98; install one, or name it: PYTHON=" in said


def test_a_python_that_cannot_make_environments_is_named_with_debians_package(copy, wheelhouse, tmp_path):
    (tmp_path / "ensurepip.py").write_text("raise ImportError('as on Debian without python3-venv')\n")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys._base_executable} "$@"\n')
    python.chmod(0o755)
    assert "cannot make environments (on Debian and Ubuntu: apt install python3-venv)" in one_line(
        install(copy, wheelhouse, PYTHON=str(python)), 2
    )


def test_an_environment_of_somebody_else_is_left_alone(copy, wheelhouse):
    (copy / ".venv").mkdir()
    (copy / ".venv/work").write_text("mine")
    assert "/.venv was not made by this script; move it away" in one_line(install(copy, wheelhouse), 2)
    assert (copy / ".venv/work").read_text() == "mine"


def test_a_disk_that_is_too_small_is_found_before_anything_is_fetched(unfinished, wheelhouse, full_disk):
    said = one_line(install(unfinished, wheelhouse, PATH=full_disk), 2)
    assert re.search(
        r"needs [23]\.\d GB more and its disk has 1\.0 GB free; free some, or replace \.venv with a link to an empty folder",
        said,
    )


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can act as another user")
def test_a_folder_that_may_not_be_written_is_named(wheelhouse):
    with tempfile.TemporaryDirectory() as folder:  # the folders of pytest are closed to others
        copy = copy_to(Path(folder))
        Path(folder).chmod(0o755)
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", copy / "launch/install.sh"],
            env=environment(wheelhouse, PYTHON=""), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert f"may not write to {copy}, where .venv is made" in one_line(done, 2)


# --- where packages come from


def test_a_package_that_the_folder_lacks_is_named(unfinished, wheelhouse, tmp_path):
    fewer = shutil.copytree(wheelhouse, tmp_path / "fewer")
    next(fewer.glob("orjson-*")).unlink()
    said = one_line(install(unfinished, fewer, TORCH_BUILD="cuda"), 1)
    assert f"PIP_FIND_LINKS={fewer.as_uri()} has no file for orjson" in said
    assert said.endswith("log: .venv/install.log; run launch/install.sh again to continue")


def test_a_cpu_build_that_was_asked_for_and_is_not_offered_is_no_cuda_build(copy, wheelhouse, python):
    said = one_line(install(copy, wheelhouse, TORCH_BUILD="cpu", PYTHON=python), 1)
    assert "TORCH_BUILD=cpu: the index has no torch==" in said


def test_versions_that_contradict_each_other_are_shown(unfinished, wheelhouse, tmp_path):
    wheels = shutil.copytree(wheelhouse, tmp_path / "wheels")
    pinned = re.search(r"^deepspeed==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    write_wheel(wheels, "deepspeed", pinned[1], "triton==99")
    said = one_line(install(unfinished, wheels, TORCH_BUILD="cuda"), 1)
    assert "versions contradict each other" in said
    assert "triton" in said


def test_a_compiler_that_is_missing_is_named(unfinished, wheelhouse, tmp_path):
    wheels = shutil.copytree(wheelhouse, tmp_path / "wheels")
    wheel = next(wheels.glob("xxhash-*"))
    name, version = wheel.name.split("-")[:2]
    wheel.unlink()
    source = tmp_path / f"{name}-{version}"
    source.mkdir()
    (source / "a.c").write_text("")
    arguments = f"name={name!r}, version={version!r}, ext_modules=[Extension('a', ['a.c'])]"
    (source / "setup.py").write_text(f"from setuptools import Extension, setup\nsetup({arguments})\n")
    with tarfile.open(wheels / f"{source.name}.tar.gz", "w:gz") as file:
        file.add(source, source.name)
    said = one_line(install(unfinished, wheels, CC="/no/such/gcc", TORCH_BUILD="cuda"), 1)
    assert "a package must be compiled: install a C compiler and Python's headers" in said


def test_an_index_that_does_not_answer_is_named(unfinished):
    said = one_line(install(unfinished, None, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0"), 1)
    assert "the package index does not answer; check the network, HTTPS_PROXY and PIP_INDEX_URL" in said


@pytest.fixture
def locked_index() -> Iterator[str]:
    """The address of an index that wants a password."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()


def test_an_index_that_refuses_access_is_named(unfinished, locked_index):
    said = one_line(install(unfinished, None, PIP_INDEX_URL=locked_index), 1)
    assert "the index or the proxy refuses access; give a name and a password" in said


# --- what the next call does


@pytest.fixture(scope="module")
def with_cpu_torch(wheelhouse, tmp_path_factory) -> Path:
    """The wheels, and a CPU build of torch."""
    folder = shutil.copytree(wheelhouse, tmp_path_factory.mktemp("with-cpu") / "wheels")
    write_wheel(folder, "torch", f"{torch_pin()}+cpu")
    return folder


def torch_pin() -> str:
    (version,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_installation_that_was_interrupted_is_continued(number, code, unfinished, full_disk):
    """While pip works: it waits for an index that accepts the connection and then is silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        with subprocess.Popen(
            [unfinished / "launch/install.sh"], env=environment(None, PIP_INDEX_URL=address),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as first:  # fmt: skip
            connection, _ = silent.accept()
            with connection:
                first.send_signal(number)
                _, said = first.communicate(timeout=TEST_TIMEOUT_SECONDS)
    assert first.returncode == code
    assert said.strip() == "install: interrupted; run launch/install.sh again to continue"
    assert "continuing the installation into .venv" in install(unfinished, None, PATH=full_disk).stdout


def test_two_installations_are_one_that_is_then_kept_and_mended(copy, with_cpu_torch, python, full_disk):
    command, wheelhouse, version = [copy / "launch/install.sh"], with_cpu_torch, torch_pin()
    with subprocess.Popen(
        command, env=environment(wheelhouse, PYTHON=python), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as second:
        path = f"{Path(python).parent}:{environment(None)['PATH']}"
        third = install(copy, wheelhouse, PYTHON="", PATH=path)
        said, errors = second.communicate(timeout=TEST_TIMEOUT_SECONDS)
    assert (second.returncode, third.returncode) == (0, 0), errors + third.stderr
    waited = sorted("another launch/install.sh is working on .venv" in output for output in (said, third.stdout))
    assert waited == [False, True]
    assert f"installed the CPU build of torch {version}" in said + third.stdout

    for name in COMMANDS.values():
        assert (copy / ".venv/bin" / name).is_file()
    assert (
        subprocess.run([copy / ".venv/bin/python", "-c", "import tandem.trainer"], cwd="/", check=False).returncode == 0
    )
    link = copy.parent / "link"
    link.symlink_to(copy)
    for place in (copy, link):
        again = install(place, wheelhouse, PYTHON="")
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    # Other versions go into the same .venv, which a failure leaves as it was.
    mine = copy / ".venv/mine"
    mine.touch()
    constraints = copy / "constraints.txt"
    constraints.write_text(constraints.read_text().replace(f"torch=={version}", "torch==2.11.98"))
    empty = copy.parent / "no wheels"
    empty.mkdir()
    failed = install(copy, empty, PYTHON=python)
    assert failed.returncode == 1
    assert "updating .venv to the versions of constraints.txt" in failed.stdout
    assert (copy / ".venv/bin/tandem").is_file()
    newer = shutil.copytree(wheelhouse, copy.parent / "newer")
    write_wheel(newer, "torch", "2.11.98+cpu")
    changed = install(copy, newer, PYTHON=python)
    assert changed.returncode == 0, changed.stderr
    assert mine.exists()
    assert len(list(copy.glob(".venv/lib/*/site-packages/torch-*"))) == 1
    assert list(copy.glob(".venv/lib/*/site-packages/torch-2.11.98+cpu.dist-info"))

    # Another build of torch is installed anew: pip sees no difference. This folder has only torch.
    write_wheel(newer, "torch", "2.11.98")
    shutil.copy(newer / "torch-2.11.98-py3-none-any.whl", empty)
    other = install(copy, empty, TORCH_BUILD="cuda", PYTHON=python)
    assert ".venv has the cpu build of torch; making it again" in other.stdout
    assert list(copy.glob(".venv/lib/*/site-packages/torch-2.11.98.dist-info"))

    (copy / ".venv/bin/python").unlink()  # as after the system's Python was replaced
    (copy / ".venv/bin/python").symlink_to("/no/such/python")
    healed = install(copy, newer, PYTHON=python)
    assert healed.returncode == 0, healed.stderr
    assert "the Python of .venv does not start; making it again" in healed.stdout
    moved = copy.rename(copy.parent / "moved")
    again = install(moved, empty, PYTHON=python, PATH=full_disk)
    assert f".venv was made in {copy}; making it again" in again.stdout


def test_constraints_of_the_machine_are_named_if_they_exclude_a_pin_and_else_change_nothing(
    unfinished, wheelhouse, tmp_path
):
    """With a constraint on torch, whichever, pip calls a build that no index offers a contradiction."""
    (tmp_path / "machine.txt").write_text("torch<9\norjson<3\n")
    done = install(unfinished, wheelhouse, PIP_CONSTRAINT=str(tmp_path / "machine.txt"))
    assert "the index has none: using the CUDA build" in done.stdout
    said = one_line(done, 1)
    assert "versions contradict each other" in said
    assert "orjson<3" in said
    assert f"pip's settings on this machine add constraints; allow these versions in {tmp_path / 'machine.txt'}" in said


def test_settings_that_lead_pip_elsewhere_are_ignored(copy, with_cpu_torch, tmp_path, python):
    """Set them in pip's file and in variables at once: both must be overruled, whichever pip prefers."""
    switches = ("user", "no-deps", "dry-run", "require-hashes")
    (tmp_path / "elsewhere/launch").mkdir(parents=True)
    (tmp_path / "torch.py").write_text("raise ImportError('of another installation')\n")
    (tmp_path / "pip.conf").write_text("\n".join(["[install]", "root =", *(f"{name} = true" for name in switches)]))
    settings = dict.fromkeys(("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "CDPATH"), str(tmp_path / "elsewhere"))
    settings |= {f"PIP_{name.upper().replace('-', '_')}": "1" for name in (*switches, "no-dependencies")}
    settings |= {"PYTHONPATH": str(tmp_path), "PIP_PYTHON": "/usr/bin/python3", "PYTHON": python}
    settings |= {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    done = subprocess.run(
        ["launch/install.sh"], cwd=copy, env=environment(with_cpu_torch, **settings),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert (copy / ".venv/bin/tandem").is_file()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["launch"]


def test_a_setting_in_a_file_that_leads_pip_elsewhere_is_refused(unfinished, wheelhouse, tmp_path):
    for setting in ("install.target", "global.prefix", "global.python"):
        section, name = setting.split(".")
        (tmp_path / "pip.conf").write_text(f"[{section}]\n{name} = /no/such\nquiet = 1\n")
        said = one_line(install(unfinished, wheelhouse, PIP_CONFIG_FILE=str(tmp_path / "pip.conf")), 2)
        assert f"set {setting}='/no/such', which would install packages outside .venv" in said
        assert "PIP_CONFIG_FILE=/dev/null launch/install.sh" in said
    empty = tmp_path / "no wheels"
    empty.mkdir()
    remedied = install(unfinished, empty, PIP_CONFIG_FILE="/dev/null")
    assert "continuing the installation into .venv" in remedied.stdout
    assert "the index has none: using the CUDA build" in remedied.stdout, "it came past the settings"


def test_a_link_to_another_disk_is_kept(copy, tmp_path, python, full_disk):
    (tmp_path / "disk").mkdir()
    (copy / ".venv").symlink_to(tmp_path / "disk")
    assert "made .venv with Python" in install(copy, None, PYTHON=python, PATH=full_disk).stdout
    assert "continuing the installation into .venv" in install(copy, None, PYTHON=python, PATH=full_disk).stdout
    assert (tmp_path / "disk/bin/python").exists()
    assert (copy / ".venv").is_symlink()
    shutil.rmtree(tmp_path / "disk")
    assert f".venv is a link to {tmp_path / 'disk'}, which is not a folder" in one_line(install(copy, None), 2)


def test_a_script_killed_while_it_empties_an_environment_knows_it_afterwards(copy, tmp_path, python, full_disk):
    """`find` stands for the kill: it removes what it is asked to and kills the script."""
    install(copy, None, PYTHON=python, PATH=full_disk)
    (copy / ".venv/bin/python").unlink()
    find = tmp_path / "find"
    find.write_text(f'#!/bin/sh\n{shutil.which("find")} "$@"\nkill -9 $PPID\n')
    find.chmod(0o755)
    killed = install(copy, None, PYTHON=python, PATH=f"{tmp_path}:{full_disk}")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (copy / ".venv").iterdir()) == [".tandem"]
    assert "made .venv with Python" in install(copy, None, PYTHON=python, PATH=full_disk).stdout


def test_a_python_is_named_from_where_the_user_stands(copy, tmp_path, python, full_disk):
    (tmp_path / "py").symlink_to(python)
    done = subprocess.run(
        [copy / "launch/install.sh"], cwd=tmp_path, env=environment(None, PYTHON="./py", PATH=full_disk),
        capture_output=True, text=True,
    )  # fmt: skip
    assert "made .venv with Python" in done.stdout


def other_python() -> str | None:
    """Another Python of this machine that Tandem runs on."""
    test = (
        "import ensurepip, os, sys; print(os.path.realpath(sys._base_executable)); "
        "raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))"
    )
    for name in ("/usr/bin/python3", "python3.11", "python3.12", "python3.13"):
        if path := shutil.which(name):
            done = subprocess.run([path, "-c", test], capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip() != os.path.realpath(sys._base_executable):
                return path
    return None


def test_the_python_that_was_chosen_is_kept_until_another_is_named(copy, python, full_disk):
    other = other_python()
    if other is None:
        pytest.skip("this machine has one Python that Tandem runs on")
    made = [install(copy, None, PYTHON=name, PATH=full_disk).stdout for name in (other, "", python)]
    assert "made .venv with Python 3" in made[0]
    assert "continuing the installation into .venv" in made[1]
    assert re.search(r"\.venv was made with \S+ 3\.\S+; making it again with", made[2])
    config = (copy / ".venv/pyvenv.cfg").read_text()
    assert f"executable = {os.path.realpath(python)}" in config
