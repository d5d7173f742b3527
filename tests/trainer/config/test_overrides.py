"""An override keeps what was typed, or is refused."""

from pathlib import Path
from typing import Any

import pytest

from tandem.trainer import config
from tandem.trainer.__main__ import main
from tandem.trainer.config import UserError

DEMO = Path(__file__).parents[3] / "configs/demo-stablelm.yaml"
DEMO_BTLM = DEMO.with_name("demo-btlm.yaml")


def field(loaded: Any, key_path: str) -> Any:
    for name in key_path.split("."):
        loaded = loaded[name] if isinstance(loaded, dict) else getattr(loaded, name)
    return loaded


@pytest.mark.parametrize(
    "typed",
    ["trial #3", "0123", "1.0", "1e5", "1:30", "no", "on", "a=b", "a, b", "{x}", "[1]", "- x", "a: b", "2026-01-01", "true",
     "'", "it's", "%x", "null", "~", "ü", "a\\b", '"a" or "b"', "# x", "&a", "*a", "!!int 3", "null "],
)  # fmt: skip
def test_a_text_field_takes_what_was_typed_and_the_file_keeps_it(typed: str, tmp_path: Path) -> None:
    loaded = config.load_config(DEMO, [f"log.wandb_project={typed}", f"data.sources.corpus=/data/{typed}"])
    assert loaded.log.wandb_project == typed
    assert loaded.data.sources["corpus"] == f"/data/{typed}"
    (tmp_path / "saved.yaml").write_text(config.dump_config(loaded))
    assert config.load_saved_config(tmp_path / "saved.yaml") == loaded
    assert config.load_config(tmp_path / "saved.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "key_path", "value"),
    [
        ('run.name="x y"', "run.name", "x y"),
        ("run.name='0123'", "run.name", "0123"),
        ("run.init_from=null", "run.init_from", None),
        ("run.init_from=", "run.init_from", None),
        ("data.tokenizer=~", "data.tokenizer", None),
        ("data.tokenizer=/a=b", "data.tokenizer", "/a=b"),
        ("run.seed=1_000", "run.seed", 1000),
        ("optim.eps=3e-4", "optim.eps", 3e-4),
        ("optim.eps=.5", "optim.eps", 0.5),
        ("optim.max_grad_norm=2", "optim.max_grad_norm", 2.0),
        ("log.wandb=offline", "log.wandb", "offline"),
        ("schedule.phases.1.name=007", "schedule.phases", "007"),
        ("schedule.phases[1].name=007", "schedule.phases", "007"),
        ("hardware={name: x, peak_flops: 1, memory_gib: 1, memory_bytes_per_second: 1, devices_per_node: 1}",
         "hardware.name", "x"),
    ],
)  # fmt: skip
def test_an_override_reads_as_the_type_of_its_field(override: str, key_path: str, value: Any) -> None:
    found = field(config.load_config(DEMO, [override]), key_path)
    found = found[1].name if isinstance(found, list) else found
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.seed=1.0", ["run.seed: 1.0 is of type float", "write a value of type int: 1"]),
        ("run.seed=1e3", ["run.seed: 1000.0 is of type float", "write a value of type int: 1000"]),
        ("run.seed=0123", ["run.seed: '0123' is of type str", "type int"]),
        ("run.seed=1:30", ["run.seed: '1:30' is of type str"]),
        ("run.seed=3 # a try", ["override 'run.seed=3 # a try'", "'# a try' would be left out", "quote it"]),
        ("run.seed=3\n4", ["run.seed: '3 4' is of type str"]),
        ("run.seed=", ["run.seed: None is of type NoneType", "type int"]),
        ("model.qk_layernorm=yes", ["model.qk_layernorm: 'yes' is of type str", "true or false"]),
        ("optim.eps=1,000", ["optim.eps: '1,000' is of type str"]),
        ("optim.eps=1e-3x", ["optim.eps: '1e-3x' is of type str"]),
        ("optim.eps=" + "9" * 5000, ["optim.eps"]),
        ("run.seed=" + "9" * 5000, ["run.seed"]),
        ("run.seed=[1", ["override 'run.seed=[1'", "not valid YAML"]),
        ("run.seed=*a", ["override 'run.seed=*a'", "not valid YAML"]),
        ("run.seed=!!python/object:os.system x", ["override", "not valid YAML"]),
        ("run.seed={a: 1, a: 2}", ["lines 1 and 1", "both give a"]),
        ("schedule.phases[x].name=a", ["schedule.phases[x]", "no such field", "did you mean phases?"]),
        ("schedule.phases[2].name=a", ["schedule.phases has 2 entries"]),
        ("schedule.phases.-1.name=a", ["schedule.phases has 2 entries", "numbered from 0"]),
        ("schedule.phases[0].tokns=1", ["schedule.phases[0].tokns", "did you mean tokens?"]),
        ("schedule.phases[0].mixture.demoo=1", ["schedule.phases[0].mixture", "'demoo' is not in data.sources"]),
        ("optim.beta1.x=1", ["optim.beta1 is 0.9, not a section"]),
        ("optim=3", ["optim: 3", "is not a section with fields"]),
        ("optim..eps=3", ["'optim..eps' is not the path of a field"]),
        ("=3", ["'=3'", "section.field=value"]),
        ("run.name=${x", ["run.name: ${x is not supported"]),
        ("run.name=${oc.decode:x}", ["run.name: ${oc.decode:x}", "is not supported", "${oc.env:NAME}"]),
        ("run.name=${oc.env:${run.seed}}", ["is not supported"]),
        ("run.name=${oc.env:API_KEY}", ["run.name: ${oc.env:API_KEY}", "not a variable that the file allows"]),
        ("environment=[API_KEY]", ["environment: API_KEY", "secret"]),
        ("environment=X", ["environment", "write environment: [NAME]"]),
        ("run.name=${run.name}", ["cannot be read"]),
        ("run.name=${run.nam}", ["cannot be read", "run.nam"]),
    ],
)
def test_an_override_that_cannot_keep_its_value_is_refused(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.load_config(DEMO, [override])
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


def test_interpolations_take_fields_the_home_and_allowed_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/${run.seed}")
    overrides = [
        "environment=[SCRATCH, UNSET]", "run.root=${oc.env:SCRATCH}/r",
        "run.name=${model.family}-${schedule.phases[0].seq_len}",
        "data.sources.corpus=${HOME}/data", "data.tokenizer=${oc.env:UNSET,/else}/t", "log.wandb_project=\\${HOME}",
    ]  # fmt: skip
    loaded = config.load_config(DEMO, overrides)
    assert loaded.run.name == "stablelm-128"
    assert loaded.run.root == "/scratch/${run.seed}/r", "the value of a variable is not a config"
    assert loaded.data.sources["corpus"] == "/home/me/data"
    assert loaded.data.tokenizer == "/else/t"
    assert loaded.log.wandb_project == "${HOME}"


def test_a_saved_config_looks_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-print")
    saved = tmp_path / "config.yaml"
    text = config.dump_config(config.load_config(DEMO))
    for planted in ("${oc.env:WANDB_API_KEY}", "${run.seed}", "${HOME}", "a\\${b}"):
        saved.write_text(text.replace("wandb_project: tandem", f"wandb_project: '{planted}'"))
        assert config.load_saved_config(saved).log.wandb_project == planted
    saved.write_text(text + "environment: [USER]\n")
    with pytest.raises(UserError, match=r"environment: .* no such field"):
        config.load_saved_config(saved)


def test_the_home_folder_is_known_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    names = ("run.root", "run.init_from", "data.tokenizer", "data.sources.corpus")
    loaded = config.load_config(DEMO, [f"{name}=~/x" for name in names])
    assert [field(loaded, name) for name in names] == ["/home/me/x"] * 4
    with pytest.raises(
        UserError, match=r"data.tokenizer: '~nobody-here/x' begins with ~, but no such home folder is known"
    ):
        config.load_config(DEMO, ["data.tokenizer=~nobody-here/x"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("run: {name: ä}".encode("latin-1"), "is not UTF-8: byte 12 is 0xe4; save the file as UTF-8"),
        ("run: {}".encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        ("run: {}".encode("utf-16-be"), "contains a NUL byte"),
        (b"\xef\xbb\xbfrun: {}", "model: is missing"),
        (b"run: {}\r\nmudel: 3\r\n", "mudel: 3 is given, but there is no such field; did you mean model?"),
        (b"run: {}\n\tmodel: 3", "is not valid YAML"),
        (b"run: {a: 1}\nmodel:\n  x: 1\n  'x': 2\n", "lines 3 and 4: both give x; remove one of them"),
        (b"run: {a: 1}\nrun: {b: 1}\n", "lines 1 and 2: both give run"),
        (b"[a, b]: 1\n", "line 1: a key is a list or a mapping"),
        (b"a: &a [*a]\n", "is nested too deeply"),
        (
            DEMO.read_bytes().replace(b"name: demo-stablelm", b"name: 123"),
            "run.name: 123 is of type int; write a value of type str; quote it: '123'",
        ),
        (b"run: !!binary aGk=\n", "is not valid YAML"),
        (b"--- {}\n--- {}\n", "is not valid YAML"),
    ],
)
def test_a_file_of_another_encoding_or_with_a_doubtful_value_is_refused(
    tmp_path: Path, content: bytes, part: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load_config(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command", [["audit", "~/nothing"], ["verify", "~/nothing"], ["generate", "~/nothing", "--prompt=~"]]
)
def test_a_path_of_the_command_line_may_begin_with_the_home(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(command) == 2
    assert str(tmp_path / "nothing") in capfd.readouterr().err
