"""A corpus adopted from webdataset tars of token ids is an ordinary corpus: verified, inspected, trained on and audited."""

import json

import numpy as np
import pytest
import webdataset
import yaml

from tandem.trainer.data import manifest
from tandem.trainer.data.token_stream import TokenStream
from tests.promises.conftest import fork_tandem, two_phase_config, wait_for_exit

pytestmark = [pytest.mark.dist]
SEQUENCE = 129


def test_an_adopted_corpus_is_trained_on_and_audited(corpus, tmp_path):
    facts = manifest.load_manifest(corpus)
    stream = TokenStream(corpus, facts, facts.train, source="", seed=None)
    tokens = stream.read_tokens(0, stream.epoch_tokens)
    samples = tokens[: len(tokens) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)
    (tmp_path / "tok").mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/tok/%08d.tar", maxcount=100, verbose=0) as sink:
        for number, ids in enumerate(samples.tolist()):
            sink.write({"__key__": f"{number:08}", "json.gz": json.dumps(ids)})
    output, run = tmp_path / "adopted", tmp_path / "runs" / "tiny"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(two_phase_config("btlm", output, tmp_path / "runs", steps=2)))
    prepare = ["prepare", "--input", tmp_path / "tok", "--tokens", "json.gz", "--output", output, "--held-out", 0.1]
    sizes = ["--sample-tokens", 512, "--shard-tokens", 40_000, "--workers", 1]
    commands = [
        [*prepare, *sizes, "--tokenizer", corpus / "tokenizer.json"],
        ["verify", output], ["inspect", output], ["train", tmp_path / "config.yaml"], ["audit", run, "--tokens"],
    ]  # fmt: skip
    assert wait_for_exit(fork_tandem(*commands)) == 0
    adopted = manifest.load_manifest(output)
    assert adopted.tokenizer_sha256 == facts.tokenizer_sha256
    assert adopted.counts["tokens"] == samples.size + adopted.counts["added_eos_tokens"]
    assert np.count_nonzero(samples == facts.eos_id) + adopted.counts["added_eos_tokens"] == adopted.counts["documents"]
