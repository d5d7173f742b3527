"""Check constraints.txt and pyproject.toml against the public package index: python launch/pins.py [constraints.txt]

uv resolves them for every Python and machine that Tandem supports, from the metadata of the public wheels. It ignores the
running Python, the installed packages, and every wheel, link or index that is configured on this machine. So it finds a pin
that breaks one Python, on a machine where pip would not notice. It checks that

* for each Python and machine the pins have a solution in which every package is pinned and has a wheel;
* the pins leave room for all extras together;
* each torch in pyproject.toml's range has a solution, with the triton that it requires;
* no pin is unused, and launch/install.sh states the sizes that the resolutions give.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALL = ROOT / "launch/install.sh"
MACHINES = ("x86_64", "aarch64")
GLIBC = "manylinux_2_28"
"""The oldest C library for which torch and megatron-core have wheels."""
NO_WHEEL = ("deepspeed",)
"""Packages that exist as source only. They contain Python alone, so that no compiler is needed."""
UNREACHABLE = r"error sending request|operation timed out"
"""uv's message if the index does not answer or its certificate is not trusted. A missing file does not match."""
SIZE_TOLERANCE = 0.15
"""launch/install.sh states two digits, and the Pythons' wheels differ by a few percent."""


class UnreachableError(ValueError):
    """The public index does not answer."""


def resolve(python: str, machine: str, *options: str) -> list[dict]:
    """The packages that `uv pip compile` chooses, as the tables of a pylock.toml.

    Raises:
        UnreachableError: the index does not answer; uv's reason.
        ValueError: there is no solution; uv's reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "pylock.toml"
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--no-config", "--quiet"]
        command += ["--format", "pylock.toml", "--output-file", str(lock)]
        command += ["--python-version", python, "--python-platform", f"{machine}-{GLIBC}", "--only-binary", ":all:"]
        command += [option for name in NO_WHEEL for option in ("--no-binary", name)]
        done = subprocess.run([*command, *options], cwd=ROOT, env=public(os.environ), capture_output=True, text=True)
        if done.returncode != 0:
            reason = " ".join(done.stderr.split())
            raise UnreachableError(reason) if re.search(UNREACHABLE, reason) else ValueError(reason)
        return tomllib.loads(lock.read_text())["packages"]


def resolve_each(targets: list[tuple[str, str]], options: list[str]) -> dict[tuple[str, str], list[dict] | str]:
    """For each Python and machine its packages, or the reason why there are none.

    The first resolution queries the index. The others find almost everything in uv's cache, and query if they do not.
    """
    found = {}
    for target in targets:
        try:
            try:
                found[target] = resolve(*target, *options, *(["--offline"] if found else []))
            except ValueError:
                found[target] = resolve(*target, *options)
        except UnreachableError:
            raise
        except ValueError as error:
            found[target] = str(error)
    return found


def public(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment without the settings that could give uv another index or local files.

    Settings for reaching an index (proxy, certificates, time limits, cache) stay.
    """
    kept = ("UV_CACHE_DIR", "UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_NATIVE_TLS", "UV_SYSTEM_CERTS")
    authorities = {"SSL_CERT_FILE": environment["PIP_CERT"]} if environment.get("PIP_CERT") else {}
    return authorities | {
        name: value for name, value in environment.items() if not name.startswith("UV_") or name in kept
    }


def supported_pythons(project: dict) -> list[str]:
    """Return every minor version that requires-python admits, oldest first."""
    first, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    return [f"3.{minor}" for minor in range(int(first), int(end))]


def supported_torches(project: dict) -> list[str]:
    """Return every minor version of torch that the dependencies admit, oldest first."""
    (requirement,) = (line for line in project["dependencies"] if line.startswith("torch>"))
    first, end = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", requirement).groups()
    return [f"2.{minor}" for minor in range(int(first), int(end))]


def read_pins(constraints: Path) -> set[str]:
    return {line.strip() for line in constraints.read_text().splitlines() if line.strip() and not line.startswith("#")}


def fetched_gb(packages: list[dict], *, cuda: bool) -> float:
    """Return the download size of an installation in 10^9 bytes; without CUDA: without torch and its own libraries."""
    with_torch = ("torch", "nvidia-", "cuda-")
    chosen = [package for package in packages if cuda or not package["name"].startswith(with_torch)]
    return sum(min(file["size"] for file in package.get("wheels") or [package["sdist"]]) for package in chosen) / 1e9


def stated_gb() -> dict[str, float]:
    """Return the sizes in launch/install.sh that the public index can confirm, in 10^9 bytes."""
    stated = re.findall(r"^(cuda_fetched|rest_fetched)=([\d.]+)", INSTALL.read_text(), re.MULTILINE)
    return {name: float(gb) for name, gb in stated}


def check(constraints: Path) -> list[str]:
    """Print a line for each resolution; return one sentence for each check that fails.

    Raises:
        UnreachableError: the index does not answer.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = supported_pythons(project)
    first_machine = [(python, MACHINES[0]) for python in pythons]
    pinned = ["--constraints", str(constraints.resolve())]
    pins, used = read_pins(constraints), set()
    problems = []
    with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as folder:
        every = [(python, machine) for machine in MACHINES for python in pythons]
        tasks = {"dev": pool.submit(resolve_each, every, [*pinned, "--extra", "dev"])}
        tasks["all extras"] = pool.submit(resolve_each, first_machine, [*pinned, "--all-extras"])
        for torch in supported_torches(project):
            only = Path(folder) / f"torch-{torch}.txt"
            only.write_text(f"torch=={torch}.*\n")
            tasks[f"torch {torch}"] = pool.submit(resolve_each, first_machine, ["--constraints", str(only)])
        for what, task in tasks.items():
            for (python, machine), packages in task.result().items():
                title = f"Python {python}, {machine}, {what}"
                if isinstance(packages, str):
                    problems.append(f"{title}: {packages}")
                    continue
                triton = next(package["version"] for package in packages if package["name"] == "triton")
                print(f"{title}: {len(packages)} packages, triton {triton}, {fetched_gb(packages, cuda=True):.2f} GB")
                if what == "dev":
                    used |= chosen(packages)
                    problems += [f"{title}: {constraints.name} lacks {pin}" for pin in sorted(chosen(packages) - pins)]
                    problems += wrong_sizes(title, packages) if machine == MACHINES[0] else []
    if not problems:
        problems += [f"no Python needs {pin} of {constraints.name}; remove it" for pin in sorted(pins - used)]
    return problems


def chosen(packages: list[dict]) -> set[str]:
    """Return the packages as lines of constraints.txt."""
    return {f"{package['name']}=={package['version']}" for package in packages}


def wrong_sizes(title: str, packages: list[dict]) -> list[str]:
    """Return a sentence for each wrong size in launch/install.sh."""
    found = {"cuda_fetched": fetched_gb(packages, cuda=True), "rest_fetched": fetched_gb(packages, cuda=False)}
    return [
        f"{title}: {name} is {gb:.2f} GB, {INSTALL.name} states {stated_gb()[name]}"
        for name, gb in found.items()
        if abs(gb / stated_gb()[name] - 1) > SIZE_TOLERANCE
    ]


def main(constraints: str = str(ROOT / "constraints.txt")) -> int:
    try:
        problems = check(Path(constraints))
    except UnreachableError as error:
        remedy = "on a machine without access to it, PIP_NO_INDEX=1 launch/test.sh skips this check"
        print(f"pins: not checked, the public index does not answer; {remedy}: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"pins: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
