"""No password, signature or key of the user is in a file or a line that a command writes."""

import base64
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests.promises.conftest import fork_tandem, two_phase_config, wait_for_exit

USER, PASSWORD, SIGNATURE = "reader-5e1f", "pass-9c04word", "sig-77ab-c41e%2Fend"
ENVIRONMENT = {
    "HTTPS_PROXY": "http://proxy-user:proxy-31pass@127.0.0.1:9", "WANDB_API_KEY": "0f" * 20, "HF_TOKEN": "hf_71e2token",
    "AWS_SECRET_ACCESS_KEY": "aws-8d3fkey", "NO_PROXY": "127.0.0.1", "WANDB_MODE": "offline",
}  # fmt: skip
SECRETS = [USER, PASSWORD, "77ab-c41e", "proxy-31pass", "0f" * 20, "hf_71e2token", "aws-8d3fkey"]


class PrivateHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to requests with the password and the signature."""

    def do_GET(self) -> None:
        self._check(super().do_GET)

    def do_HEAD(self) -> None:
        self._check(super().do_HEAD)

    def _check(self, serve) -> None:
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        signed = parse_qs(urlsplit(self.path).query).get("sig") == ["sig-77ab-c41e/end"]
        if self.headers.get("Authorization") == f"Basic {login}" and signed:
            serve()
        else:
            self.send_error(403)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server_port(tmp_path: Path, corpus: Path) -> Iterator[int]:
    """The port of a server of `corpus` and `texts.jsonl` that wants a password and a signature."""
    served = tmp_path / "served"
    shutil.copytree(corpus, served / "corpus")
    (served / "texts.jsonl").write_text('{"text": "one document of text"}\n' * 400)
    handler = partial(PrivateHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_secrets_reach_no_file_and_no_stream(tmp_path: Path, corpus: Path, server_port: int) -> None:
    def address(name: str, password: str = PASSWORD) -> str:
        return f"http://{USER}:{password}@127.0.0.1:{server_port}/{name}?sig={SIGNATURE}&id=7"

    run, log, written = tmp_path / "runs" / "tiny", tmp_path / "log", tmp_path / "prepared"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(two_phase_config("btlm", corpus, tmp_path / "runs")))
    source = f"data.sources.corpus={address('corpus')}"
    cache = [f"data.cache.folder={tmp_path / 'cache'}", "data.cache.max_attempts=2", "data.cache.timeout_seconds=1"]
    options = [
        "--tokenizer",
        corpus / "tokenizer.json",
        "--eos",
        "<|endoftext|>",
        "--sample-tokens",
        512,
        "--workers",
        1,
    ]
    succeeding = [
        ["prepare", "--input", address("texts.jsonl"), "--output", written, *options],
        ["train", config, source, *cache, "log.wandb=offline", "run.stop_step=2"],
        ["train", config, source, *cache, "log.wandb=offline", "run.stop_step=3"],  # resumes
        ["report", run],
        ["audit", run],
        ["export-hf", run, tmp_path / "exported"],
        ["inspect", address("corpus"), "--json"],
    ]
    failing = [
        ["train", config, source, *cache, "data.sources.corpus.x=1"],
        ["train", config, f"data.sources.corpus={address('corpus', f'{PASSWORD}-old')}", *cache, "run.name=denied"],
        ["train", config, f"data.sources.corpus={address('nothing')}", *cache, "run.name=missing"],
        ["train", run / "config.yaml", *cache],
        ["prepare", "--input", address("none.jsonl"), "--output", tmp_path / "none", *options],
        ["prepare", "--input", address("texts.xyz"), "--output", tmp_path / "none", *options],
        ["audit", run, "--tokens"],
    ]
    assert wait_for_exit(fork_tandem(*succeeding, log=log, environment=ENVIRONMENT)) == 0, log.read_text()
    for command in failing:
        assert wait_for_exit(fork_tandem(command, log=log, environment=ENVIRONMENT)) == 2, log.read_text()
    assert "Traceback" not in log.read_text()
    hidden = f"http://HIDDEN@127.0.0.1:{server_port}/corpus?sig=HIDDEN&id=7"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["sources"]["corpus"] == hidden
    assert f"{hidden.replace('corpus?', 'corpus/manifest.json?')}: was written by Tandem" in log.read_text()
    assert f"data.sources.corpus={hidden}" in (run / "environment.json").read_text()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != config and tmp_path / "served" not in path.parents:
            content = path.read_bytes()
            assert not [secret for secret in SECRETS if re.search(re.escape(secret.encode()), content)], path
