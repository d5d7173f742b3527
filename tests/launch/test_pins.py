"""launch/pins.py finds pins that the public index cannot satisfy, whatever this machine has been given."""

import os
import re
import zipfile
from pathlib import Path

import pytest

from launch import pins


@pytest.fixture
def index() -> None:
    """The public index, which a machine behind a mirror cannot ask."""
    if "PIP_NO_INDEX" in os.environ:
        pytest.skip("PIP_NO_INDEX is set: there is no index to ask")
    try:
        pins.resolve("3.11", "x86_64", "--no-deps", "--constraints", str(pins.ROOT / "constraints.txt"))
    except pins.UnreachableError as error:
        pytest.skip(f"the public index does not answer: {error}")


def test_a_pin_that_the_pinned_torch_excludes_is_refused_in_spite_of_a_local_wheel(tmp_path, monkeypatch, index):
    wheel = tmp_path / "torch-2.13.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:  # a torch that asks for no triton
        file.writestr("torch-2.13.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
        file.writestr("torch-2.13.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("torch-2.13.0.dist-info/RECORD", "")
    for name in ("UV_FIND_LINKS", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("UV_OVERRIDE", str(Path(os.devnull)))
    old = tmp_path / "constraints.txt"
    old.write_text((pins.ROOT / "constraints.txt").read_text().replace("triton==3.7.1", "triton==3.6.0"))
    assert "triton==3.6.0" in old.read_text()
    with pytest.raises(ValueError, match=r"torch==2\.13\.0 depends on triton"):
        pins.resolve("3.12", "x86_64", "--constraints", str(old))


def test_every_python_and_torch_of_the_ranges_is_checked():
    project = {"requires-python": ">=3.11,<3.14", "dependencies": ["numpy>=2.0", "torch>=2.11,<2.14"]}
    assert pins.supported_pythons(project) == ["3.11", "3.12", "3.13"]
    assert pins.supported_torches(project) == ["2.11", "2.12", "2.13"]


PACKAGES = [
    {"name": "torch", "version": "2", "wheels": [{"size": 600}]},
    {"name": "triton", "version": "3", "wheels": [{"size": 90}, {"size": 80}]},
    {"name": "nvidia-nccl-cu13", "version": "2", "wheels": [{"size": 1000}]},
    {"name": "deepspeed", "version": "0", "sdist": {"size": 20}},
]


def test_sizes_are_counted_with_and_without_cuda():
    assert pins.fetched_gb(PACKAGES, cuda=True) == pytest.approx(1700e-9)
    assert pins.fetched_gb(PACKAGES, cuda=False) == pytest.approx(100e-9)


def test_a_size_that_the_installer_states_wrongly_is_named():
    assert set(pins.stated_gb()) == {"cuda_fetched", "rest_fetched"}
    wrong = pins.wrong_sizes("Python 3.12", PACKAGES)
    assert [sentence.split(":")[1].split()[0] for sentence in wrong] == ["cuda_fetched", "rest_fetched"]


def test_every_package_is_pinned_on_the_oldest_python(index):
    real = pins.ROOT / "constraints.txt"
    packages = pins.resolve("3.11", "x86_64", "--constraints", str(real), "--extra", "dev")
    assert len(packages) > 100
    assert pins.chosen(packages) <= pins.read_pins(real)


def test_an_index_that_lacks_a_file_answers():
    """uv's words for both, of which only the second leaves the pins unchecked."""
    lacking = "Failed to fetch: https://index/x.whl cause: HTTP status client error (404 Not Found) for url (https://index/x.whl)"
    silent = "Failed to fetch: https://index/x/ cause: error sending request for url (https://index/x/)"
    assert [bool(re.search(pins.UNREACHABLE, words)) for words in (lacking, silent)] == [False, True]


def test_an_index_that_does_not_answer_passes_no_pins(monkeypatch, capsys, tmp_path):
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    assert pins.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("pins: not checked, the public index does not answer; on a machine")
    assert len(said.splitlines()) == 1
