"""The copy of the corpora's tokenizer in the run folder."""

import pytest

from tandem.trainer.config import DataConfig, ShardCacheConfig
from tandem.trainer.startup import copy_tokenizer


@pytest.mark.parametrize("content", [b'{"a":\r\n1}\n', b"\xff\x00"], ids=["line ends", "no text"])
def test_the_run_folder_has_the_very_bytes_of_the_tokenizer(tmp_path, content):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "tokenizer.json").write_bytes(content)
    copy_tokenizer(tmp_path, DataConfig({"corpus": str(tmp_path / "corpus")}))
    assert (tmp_path / "tokenizer.json").read_bytes() == content


@pytest.mark.parametrize("corpus", ["nothing-there", "http://127.0.0.1:9/corpus"])
def test_a_corpus_without_tokenizer_costs_a_run_one_line(tmp_path, caplog, monkeypatch, corpus):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    copy_tokenizer(
        tmp_path, DataConfig({"corpus": corpus}, cache=ShardCacheConfig(max_attempts=1, timeout_seconds=0.5))
    )
    [said] = caplog.records
    assert f"{corpus}/tokenizer.json: cannot be read (" in said.getMessage()
    assert "\n" not in said.getMessage()
    assert not list(tmp_path.iterdir())
