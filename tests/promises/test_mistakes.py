"""A mistake of the user ends in exit code 2 and one line that names field or file, value, rule and remedy; nothing is
begun, nothing half-written.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from tandem.data_prep import prepare
from tandem.trainer import train
from tandem.trainer.__main__ import main
from tandem.trainer.config import DataConfig, TrainConfig, UserError, parse_dataclass
from tandem.trainer.crash_loop import STARTS_FILE
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import load_manifest
from tandem.trainer.metrics.records import Sinks
from tests import ranks
from tests.data_prep.corpus_writer import rewrite_manifest
from tests.ports import free_ports
from tests.promises.conftest import (
    TEXT_FILES,
    clean_environment,
    fork_tandem,
    run_tandem,
    two_phase_config,
    wait_for_exit,
)
from tests.timeouts import TEST_TIMEOUT_SECONDS


@dataclass(frozen=True)
class Place:
    """What the mistakes are made with: `root` holds it all, so that a look at `root` shows what one left behind."""

    root: Path
    config: Path
    """A run of 12 steps that has stopped after 2 of them in `run`."""
    run: Path
    corpus: Path
    other: Path
    """A corpus of another tokenizer, with more ids."""
    later: Path
    """A corpus of the same tokenizer and other text."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus) -> Place:
    root = tmp_path_factory.mktemp("mistakes")
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(two_phase_config("btlm", corpus, root / "runs")))
    prepared(root / "other", "--vocab-size", 600)
    prepared(root / "later", "--tokenizer", corpus / "tokenizer.json")
    prepared(root / "retrained", "--vocab-size", 500)
    for name in ("lost", "flipped", "tokenizer-changed"):
        shutil.copytree(corpus, root / name)
    (root / "lost" / "train-000001.tar").unlink()
    shutil.copy(root / "other" / "tokenizer.json", root / "tokenizer-changed")
    for shard in (root / "flipped").glob("train-*.tar"):
        flip_a_byte(shard)
    for name in ("empty", "foreign", "untexted", "runs/failing", "runs/older"):
        (root / name).mkdir(parents=True)
    starts = [{"kind": "start", "id": str(index), "time": 0.0, "reached": 0, "forgets": False} for index in range(3)]
    (root / "runs" / "failing" / STARTS_FILE).write_text("".join(json.dumps(start) + "\n" for start in starts))
    (root / "runs" / "older" / "config.yaml").write_text("model: {width: 64}\n")
    (root / "foreign" / "thesis.doc").write_text("years")
    (root / "untexted" / "empty.txt").write_text("")
    assert wait_for_exit(fork_tandem(["train", config, "run.stop_step=2"])) == 0
    return Place(root, config, root / "runs" / "tiny", corpus, root / "other", root / "later")


def prepared(output: Path, *settings: object) -> None:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    common = ["--output", output, "--held-out", 0.3, "--workers", 1, "--sample-tokens", 512]
    prepare.run(parser.parse_args(list(map(str, ["--input", *TEXT_FILES[:4], *common, *settings]))))


def flip_a_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)


def contents(root: Path) -> dict[Path, bytes]:
    """Every file below `root`, folders too; not the notes of who held a run folder last and of starts."""
    files = {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}
    return {path: data for path, data in files.items() if path.name not in (".held", "attempts.jsonl")}


def is_one_line(stderr: str, *parts: str) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("tandem: "), stderr
    assert [part for part in parts if part not in lines[0]] == [], stderr


ANEW = "run.name=anew"
MISTAKES: dict[str, tuple[str, list[str]]] = {
    # name: (command, what the line must say); {corpus} and its like are places
    "no config": ("train {root}/none.yaml", ["none.yaml: no such config file", "a config that ships: btlm-3b-8k, "]),
    "no verb of ours": ("trian {config}", ["'trian'", "train", "--help"]),
    "no argument": ("train", ["train", "config", "--help"]),
    "an override after an option": ("train {config} --ranks 2 optim.max_grad_nrom=1.0", ["optim.max_grad_nrom: 1.0"]),
    "an option that is none": ("train {config} --rnaks 2 run.name=x", ["unrecognized arguments: --rnaks 2 run.name=x"]),
    "unknown key": ("train {config} optim.max_grad_nrom=1.0", ["optim.max_grad_nrom: 1.0", "did you mean max_grad_norm?"]),
    "wrong type": ("train {config} model.num_layers=two", ["model.num_layers: 'two'", "of type int"]),
    "bf16 without ZeRO": (
        "train {config} parallel.zero_stage=0 run.precision=bf16",
        ["parallel.zero_stage: 0", "run.precision bf16", "fp32", "set zero_stage to 1"],
    ),
    "ranks": (
        "train {config} parallel.tp_size=2 --ranks 3",
        ["parallel.tp_size: 2 does not divide 3, the number of ranks", "change tp_size"],
    ),
    "rows": (
        "train {config} --ranks 8",
        ["schedule.phases[0].global_batch_size: 8", "data-parallel size 8", "micro_batch_size"],
    ),
    "nowhere": ("train {config} data.sources.corpus={root}/none", ["none/manifest.json", "tandem prepare"]),
    "shard lost": (
        "train {config} data.sources.corpus={root}/lost", ["lost/train-000001.tar: the shard is missing", "restore it"],
    ),
    "other tokenizer": (
        "train {config} data.tokenizer={other}/tokenizer.json",
        ["data.tokenizer: ", "other/tokenizer.json has sha256", "in the corpus folder"],
    ),
    "small vocab": ("train {config} model.vocab_size=400", ["model.vocab_size: 400", "use at least 500, its number of ids"]),
    "held-out too small": (
        "train {config} evaluate.every_steps=5 evaluate.tokens=1280000",
        ["evaluate.tokens: 1280000", "held-out tokens of", "lower evaluate.tokens", "--held-out"],
    ),
    "weights of another model": (
        "train {config} model.hidden_size=32 run.init_from={run}",
        ["model.hidden_size: 32", "differs from 64", "run.init_from"],
    ),
    "weights of another tokenizer": (
        f"train {{config}} {ANEW} run.init_from={{run}} data.sources.corpus={{root}}/retrained",
        ["run.init_from: ", "tokenizer.json has sha256", "ids that differ: ", "run.init_from_tokenizer=any"],
    ),
    "sources of two tokenizers": (
        "train {config} data.sources.x={root}/retrained schedule.phases[0].mixture.x=0.0",
        ["data.sources.x: was prepared with tokenizer", "ids that differ: ", "share one tokenizer"],
    ),
    "weights that are none": ("train {config} run.init_from={root}/empty", ["empty: has no committed checkpoint"]),
    "root is a file": ("train {config} run.root={config}", ["run.root: ", "config.yaml", "cannot be created"]),
    "evaluate another tokenizer": (
        "evaluate {run} --data {other}", ["--data: ", "600 ids", "the weights have only 500", "tokenizer of the weights"],
    ),
    "evaluate too many rows": (
        "evaluate {run} --data {corpus} --rows 9000", ["--rows: 9000", "held-out tokens", "are not available"],
    ),
    "evaluate no bins": ("evaluate {run} --data {corpus} --rows 1 --bins 0", ["--bins: 0 is less than 1"]),
    "evaluate rows of nothing": ("evaluate {run} --data {corpus} --seq-len 0", ["--seq-len 0", "numbers must be positive"]),
    "evaluate nothing": ("evaluate {root}/none --data {corpus}", ["none: no such folder", "name a run folder"]),
    "empty prompt": ("generate {run} --prompt ''", ["--prompt: a text", "has no tokens", "give some text"]),
    "generate with another tokenizer": (
        "generate {run} --prompt x --tokenizer {other}/tokenizer.json", ["--tokenizer: ", "has id 599", "have only 500 ids"],
    ),
    "export over foreign files": ("export-hf {run} {root}/foreign", ["foreign: contains files", "name a new folder"]),
    "export nothing": ("export-hf {root}/empty {root}/out", ["empty: has no committed checkpoint"]),
    "import over files": ("import-hf {root}/foreign {run}", ["tiny: exists and is not an empty folder", "choose another"]),
    "import nothing": ("import-hf {root}/foreign {root}/out", ["foreign: has no committed checkpoint"]),
    "export of no step": ("export-hf {run} {root}/out --step 99", ["--step: ", "no checkpoint of step 99", "that has one: 2"]),
    "generate nothing": ("generate {root}/none --prompt x", ["none: no such folder", "name a run folder"]),
    "no prompt": ("generate {run}", ["--prompt: is missing", "give --prompt TEXT"]),
    "temperature": ("generate {run} --prompt x --temperature -1", ["--temperature: -1.0 is out of range", "use 0 or more"]),
    "compare nothing": ("checkpoint diff {root}/none {run}", ["none: no such folder", "name a run folder"]),
    "compare no checkpoint": ("checkpoint diff {run} {root}/empty", ["empty: has no checkpoint", "name the folder of a run"]),
    "bench of no phase": ("bench {config} --phase none", ["--phase: 'none'", "short, long"]),
    "mup-check without muP": ("mup-check {config} mup=null", ["mup: null has no width rules", "use a config with muP"]),
    "mup-check without a corpus": (
        "mup-check mup-check data.sources.corpus={root}/none", ["none/manifest.json", "tandem prepare"],
    ),
    "audit nothing": ("audit {root}/none", ["none: no such folder", "name the folder of a run"]),
    "inspect nothing": ("inspect {root}/none", ["none/manifest.json", "no such file"]),
    "report on nothing": ("report {root}/empty", ["empty: has no metrics.jsonl", "has started"]),
    "verify a flipped byte": ("verify {root}/flipped", ["flipped/train-0000", "sha256", "damaged", "restore it"]),
    "no EOS": (
        "prepare --input {config} --output {root}/out --tokenizer {corpus}/tokenizer.json --eos <eos>",
        ["tokenizer.json: has no token '<eos>'", "--eos"],
    ),
    "empty corpus": (
        "prepare --input {root}/untexted --output {root}/out --vocab-size 300 --workers 1",
        ["--input: ", "--input: contains no text", "name another path"],
    ),
    "resume of a run that keeps failing": (
        "train {config} run.name=failing",
        ["run.max_repeat_failures: 3 starts in a row have failed in step 1", "start once with"],
    ),
    "resume of another version": ("train {config} run.name=older", ["older/config.yaml: does not load in this version"]),
    "tokenizer replaced": (
        "train {config} data.sources.corpus={root}/tokenizer-changed",
        ["tokenizer-changed/tokenizer.json: has sha256", "manifest.json states", "restore it"],
    ),
    "resume with another corpus": (
        "train {config} data.sources.corpus={later}",
        ["data.sources.corpus: the corpus has fingerprint", "was saved with", "start a new run"],
    ),
    "resume with another width": (
        "train {config} model.hidden_size=32", ["model.hidden_size: 32", "differs from 64", "choose another run.name"],
    ),
    "resume with another seed": (
        "train {config} run.seed=2", ["run.seed: 2 differs from 1, with which", "saved", "order of the data", "restore"],
    ),
    "resume with other blocks": (
        "train {config} data.shuffle_block_tokens=64", ["data.shuffle_block_tokens: 64", "8192", "order of the data"],
    ),
}  # fmt: skip


def command_of(name: str, place: Place) -> list[str]:
    """The words of a command. It trains a run that does not exist yet, unless the mistake is about one that does."""
    text, _ = MISTAKES[name]
    words = [word.format(**vars(place)) for word in shlex.split(text)]
    return [*words[:2], ANEW, *words[2:]] if words[0] == "train" and not name.startswith(("resume", "no ")) else words


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, place, capfd):
    """In this process, since each command would spend seconds on imports; some run as commands below."""
    before = contents(place.root)
    assert main(command_of(name, place)) == 2
    is_one_line(capfd.readouterr().err, *MISTAKES[name][1])
    assert contents(place.root) == before


@pytest.mark.dist
@pytest.mark.parametrize("name", ["empty prompt", "resume with another width"])
def test_the_command_itself_says_the_same(name, place):
    before = contents(place.root)
    done = run_tandem(*command_of(name, place))
    assert done.returncode == 2
    is_one_line(done.stderr, *MISTAKES[name][1])
    assert contents(place.root) == before


EARLY_MISTAKES = {
    # what the line must say: the overrides
    "none/manifest.json: no such file": ["data.sources.corpus={root}/none", ANEW],
    "config.yaml/manifest.json: no such file": ["data.sources.corpus={config}", ANEW],
    "train-000001.tar: the shard is missing": ["data.sources.corpus={root}/lost", ANEW],
    "data.tokenizer: ": ["data.tokenizer={other}/tokenizer.json", ANEW],
    "model.vocab_size: 100 is too small": ["model.vocab_size=100", ANEW],
    "data.max_epochs.corpus: the schedule reads": ["data.max_epochs.corpus=0.001", ANEW],
    "evaluate.tokens: ": ["evaluate.tokens=1280000", "evaluate.every_steps=1", ANEW],
    "run.root: ": ["run.root={config}", ANEW],
    "empty: has no committed checkpoint": ["run.init_from={root}/empty", ANEW],
    "in run.init_from": ["run.init_from={run}", "model.ffn_hidden_size=48", ANEW],
    "a run cannot change its model": ["model.ffn_hidden_size=48"],
    "data.sources.corpus: the corpus has fingerprint": ["data.sources.corpus={later}"],
    "run.seed: ": ["run.seed=99"],
    "past steps cannot change": ["schedule.phases.0.tokens=256"],
    "parallel.tp_size": ["parallel.tp_size=3", ANEW],
}


@pytest.mark.parametrize("options", [[], ["--ranks", "8"]], ids=["one rank", "eight ranks"])
def test_what_files_show_is_refused_before_torch_is_imported(options, place):
    """Also before the launcher of ranks, which needs torch."""
    common = ["train", place.config, *options]
    if options:  # a config that eight ranks can train
        common += [f"schedule.phases.{index}.micro_batch_size=1" for index in (0, 1)]
        common += ["schedule.phases.1.global_batch_size=8", "schedule.phases.1.seq_len=32"]
    commands = [
        [str(word).format(**vars(place)) for word in [*common, *overrides]] for overrides in EARLY_MISTAKES.values()
    ]
    are_refused_without_torch(place, commands, [[part] for part in EARLY_MISTAKES])


def test_every_verb_refuses_before_torch_is_imported(place):
    lines = [parts for _, parts in MISTAKES.values()]
    are_refused_without_torch(place, [command_of(name, place) for name in MISTAKES], lines)


def are_refused_without_torch(place: Place, commands: list[list[str]], lines: list[list[str]]) -> None:
    """Run the commands in one process that has no torch. Each must write one line that has all its parts."""
    before = contents(place.root)
    program = (
        "import json, sys; sys.modules['torch'] = None; from tandem.trainer.__main__ import main; "
        "print([main(command) for command in json.loads(sys.argv[1])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)], capture_output=True, text=True, env=clean_environment()
    )
    found = done.stderr.splitlines()
    assert (done.stdout, len(found)) == (f"{[2] * len(commands)}\n", len(commands)), done.stderr
    for line, parts in zip(found, lines, strict=True):
        is_one_line(line, *parts)
    assert contents(place.root) == before


def test_a_launch_of_ranks_that_do_not_divide_is_refused(place, capfd, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "::1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(place.config), "parallel.tp_size=2", ANEW]) == 2
    is_one_line(capfd.readouterr().err, "parallel.tp_size: 2 does not divide 3, the number of ranks")
    assert not (place.root / "runs" / "anew").exists()


def test_a_shard_damaged_since_is_named_by_the_run_that_reads_it(place, capfd, tmp_path):
    code = main(["train", str(place.config), f"data.sources.corpus={place.root}/flipped", f"run.root={tmp_path}"])
    assert code == 2
    captured = capfd.readouterr().err
    assert "Traceback" not in captured
    last = captured.splitlines()[-1]
    assert last.startswith("tandem: ")
    assert "flipped/train-0000" in last
    assert "the shard is damaged: " in last
    assert "; restore it" in last
    assert not list(tmp_path.rglob("COMMITTED")), "nothing was trained, nothing is saved"


@pytest.mark.dist
def test_a_mistake_that_both_ranks_meet_is_said_once(place):
    done = torchrun(place.config, f"data.sources.corpus={place.root}/lost", ANEW)
    assert done.stderr.startswith("tandem: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.returncode == 2
    assert not (place.root / "runs" / "anew").exists()


@pytest.fixture(scope="module")
def broken(place, tmp_path_factory) -> Path:
    """A corpus with a damaged shard that in the first step only data-parallel rank 1 reads."""
    root = tmp_path_factory.mktemp("broken")
    shards = sorted(path.name for path in place.corpus.glob("train-*.tar"))
    return next(folder for folder in (copy_with_flipped(place.corpus, root / shard, shard) for shard in shards)
                if [reads_first_step(folder, rank) for rank in (0, 1)] == [True, False])  # fmt: skip


def of_two_ranks(broken: Path, root: Path) -> list[str]:
    return [
        f"data.sources.corpus={broken}",
        "data.shuffle_block_tokens=32",
        "data.prefetch_steps=0",
        f"run.root={root / 'runs'}",
    ]


@pytest.mark.dist
def test_a_mistake_that_only_the_second_rank_meets_is_printed_and_ends_the_launch(place, broken, tmp_path):
    done = torchrun(place.config, *of_two_ranks(broken, tmp_path))
    assert done.returncode == 2
    # If torchrun needs more than eight seconds to end the ranks, the second one repeats the line.
    said = list({line for line in done.stderr.splitlines() if line.startswith("tandem: ")})
    assert len(said) == 1, done.stderr
    assert f"{broken.name}: the shard is damaged: its xxh3_128 is " in said[0]
    assert not list(tmp_path.rglob("COMMITTED"))


@pytest.mark.dist
def test_a_mistake_that_only_one_rank_meets_is_the_end_of_all_and_no_rank_is_taken_for_lost(place, broken, tmp_path):
    """The launcher of each machine sees its own ranks alone, and would start them again."""
    command = ["train", place.config, *of_two_ranks(broken, tmp_path)]
    [port] = free_ports(1)
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [tmp_path / f"rank-{rank}.log" for rank in (0, 1)]
    processes = [
        fork_tandem(command, log=log, environment={**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    codes = [wait_for_exit(process) for process in processes]
    said = [log.read_text() for log in logs]
    assert codes == [2, 2], said
    for words in said:
        [line] = [line for line in words.splitlines() if line.startswith("tandem: ")]
        assert f"{broken.name}: the shard is damaged: its xxh3_128 is " in line
        assert "Traceback" not in words
    assert not list(tmp_path.rglob("hangs"))
    assert not list(tmp_path.rglob("COMMITTED"))
    [attempts] = tmp_path.rglob("attempts.jsonl")
    assert json.loads(attempts.read_text().splitlines()[-1])["code"] == 2


GOODBYE_SECONDS = 8.0
LATER = {"shuffle_block_tokens": 256, "prefetch_steps": 0}
"""A block to a step: a damaged shard is then met when the run is under way."""


def met_by_rank_1(tree: dict, broken: Path) -> str:
    """How a run ends in which rank 1 alone meets the damaged shard, and rank 0's records are taken by a slow server."""
    rank, close = dist.get_rank(), Sinks.close

    def slowly(sinks: Sinks) -> None:
        time.sleep(GOODBYE_SECONDS if rank == 0 else 0)
        close(sinks)

    Sinks.close = slowly  # type: ignore[method-assign]
    if rank == 1:
        tree["data"]["sources"] = {"corpus": str(broken)}
    try:
        return f"code {train.run(parse_dataclass(TrainConfig, tree, ''))}"
    except UserError as mistake:
        dist.destroy_process_group()  # as the end of a process does
        return str(mistake)


@pytest.mark.dist
def test_a_mistake_that_one_rank_meets_is_that_also_where_the_last_records_are_taken_slowly(place, tmp_path):
    """The other has lost its connection by it, and is longer about its end than a step may take."""
    shards = sorted(path.name for path in place.corpus.glob("train-*.tar"))
    copies = (copy_with_flipped(place.corpus, tmp_path / shard, shard) for shard in shards)
    broken = next(copy for copy in copies if 2 <= steps_fed(copy) < 6)
    limit_seconds = GOODBYE_SECONDS / 2
    tree = two_phase_config("btlm", place.corpus, tmp_path / "runs", watchdog={"step_timeout_seconds": limit_seconds})
    tree["data"] |= LATER
    said = ranks.run(met_by_rank_1, 2, tmp_path, tree, broken)
    assert all(f"{broken.name}: the shard is damaged: its xxh3_128 is " in words for words in said), said
    assert not list(tmp_path.rglob("hangs"))


def refusal(tree: dict) -> str:
    try:
        return f"code {train.run(parse_dataclass(TrainConfig, tree, ''))}"
    except UserError as mistake:
        dist.destroy_process_group()  # as the end of a process does
        return str(mistake)


@pytest.mark.dist
@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_id_beyond_the_vocabulary_is_refused_by_every_rank(place, tmp_path, tp_size):
    """Its rows would be zeros at tensor parallel 2, and the last of the padding at tensor parallel 1."""
    shutil.copytree(place.corpus, tmp_path / "corpus")
    rewrite_manifest(tmp_path / "corpus", load_manifest(place.corpus), vocab=300)
    tree = two_phase_config("btlm", tmp_path / "corpus", tmp_path / "runs", parallel={"tp_size": tp_size})
    tree["model"]["vocab_size"] = 300
    said = ranks.run(refusal, tp_size, tmp_path, tree)
    assert all(
        re.search(r"corpus/train-\d+.tar: contains id \d+, but manifest.json states vocab 300", one) for one in said
    )
    assert not list(tmp_path.rglob("COMMITTED"))


def steps_fed(corpus: Path) -> int:
    """Steps that are made before the damaged shard is met."""
    config: TrainConfig = parse_dataclass(TrainConfig, two_phase_config("btlm", corpus, corpus), "")
    data = DataConfig({"corpus": str(corpus)}, **LATER)
    loader = Loader(
        data, config.schedule, seed=config.run.seed, vocab_size=config.model.vocab_size, dp_rank=0, dp_size=1
    )
    steps = 0
    with suppress(UserError):
        for _ in loader.batches(0, None):
            steps += 1
    return steps


def torchrun(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Two data-parallel ranks."""
    command = [sys.executable, "-m", "tandem.trainer", "train", "--ranks=2"]
    return subprocess.run(
        [*command, str(config), *overrides],
        capture_output=True,
        text=True,
        timeout=TEST_TIMEOUT_SECONDS,
        env=clean_environment(),
        check=False,
    )


def copy_with_flipped(corpus: Path, target: Path, shard: str) -> Path:
    shutil.copytree(corpus, target)
    flip_a_byte(target / shard)
    return target


def reads_first_step(corpus: Path, dp_rank: int) -> bool:
    """Whether data-parallel rank `dp_rank` of 2 gets its rows of the first step out of the corpus."""
    config: TrainConfig = parse_dataclass(TrainConfig, two_phase_config("btlm", corpus, corpus), "")
    data = DataConfig({"corpus": str(corpus)}, shuffle_block_tokens=32, prefetch_steps=0)
    loader = Loader(
        data, config.schedule, seed=config.run.seed, vocab_size=config.model.vocab_size, dp_rank=dp_rank, dp_size=2
    )
    try:
        next(loader.batches(0, None))
    except UserError:
        return False
    return True
