"""A mistake in a config is one line that names the field, the value, the rule and the remedy."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.config.addresses import has_hidden_part, hide_secrets

CONFIGS = Path(__file__).parents[3] / "configs"
DEMO = CONFIGS / "demo-stablelm.yaml"
DEMO_BTLM = CONFIGS / "demo-btlm.yaml"


def mistake(*overrides: str, path: Path = DEMO) -> str:
    """Load a config with `overrides`, which must fail with one line, and return that line."""
    with pytest.raises(UserError) as caught:
        config.load_config(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("parallel.zero_stage=0", ["parallel.zero_stage", "0", "run.precision bf16", "fp32", "set zero_stage to 1"]),
        ("optim.max_grad_nrom=1.0", ["optim.max_grad_nrom", "1.0", "no such field", "did you mean max_grad_norm?"]),
        ("model.ffn=384", ["model.ffn", "384", "no such field", "ffn_hidden_size"]),
        ("optim.beta1=high", ["optim.beta1", "'high' is of type str", "write a value of type float"]),
        ("model.num_layers=2.5", ["model.num_layers", "2.5 is of type float", "of type int"]),
        ("model.qk_layernorm=1", ["model.qk_layernorm", "1 is of type int", "of type bool"]),
        ("model.num_layers=true", ["model.num_layers", "True is of type bool", "of type int"]),
        ("run.precision=fp16", ["run.precision", "'fp16'", "must be one of bf16, fp32"]),
        ("model.family=llama", ["model.family", "'llama'", "stablelm, btlm"]),
        ("schedule.lr.kind=step", ["schedule.lr.kind", "'step'", "linear, cosine, hybrid"]),
        ("hardware=abacus", ["hardware", "'abacus'", "known names: h100_sxm"]),
        ("run.name=a/b", ["run.name", "'a/b'", "a single folder", "without slashes"]),
        (
            "optim.max_grad_norm=-1",
            ["optim.max_grad_norm", "-1", "not a finite number at least 0", "use a value that is"],
        ),
        ("model.init_truncation_sigmas=-1", ["model.init_truncation_sigmas", "-1", "neither 0 (no truncation)"]),
        ("model.init_truncation_sigmas=0.09", ["model.init_truncation_sigmas", "0.09", "at least 0.1"]),
        ("model.init_truncation_sigmas=.inf", ["model.init_truncation_sigmas", "inf", "neither 0 (no truncation)"]),
        (
            "model.num_heads=5",
            ["model.hidden_size", "128", "not divisible by model.num_heads 5", "use a multiple of num_heads"],
        ),
        ("model.num_kv_heads=3", ["model.num_kv_heads", "3", "does not divide model.num_heads 4", "use a divisor"]),
        ("model.partial_rotary_factor=0.2", ["model.partial_rotary_factor", "0.2", "6.4", "even whole number"]),
        ("evaluate.tokens=1000", ["evaluate.tokens", "1000", "multiple of", "seq_len"]),
        (
            "schedule.lr.warmup_steps=450",
            [
                "schedule.lr.warmup_steps",
                "450",
                "out of range",
                "use at least 0 and less than 450, the number of steps",
            ],
        ),
        ("schedule.lr.switch_fraction=0.6", ["schedule.lr.switch_fraction", "0.6", "above 0 and below 0.5"]),
        ("schedule.lr.final=1.0", ["schedule.lr.final", "1.0", "between 0 and peak"]),
        (
            "schedule.phases[0].tokens=307_201",
            ["schedule.phases[0].tokens", "307201", "multiple", "nearest multiple is 307200"],
        ),
        (
            "schedule.phases[0].global_batch_size=8",
            ["schedule.phases[0].global_batch_size", "1024", "tokens_per_step is 2048", "change global_batch_size"],
        ),
        (
            "schedule.phases[1].micro_batch_size=3",
            ["schedule.phases[1].micro_batch_size", "3", "does not divide global_batch_size 4"],
        ),
        (
            "schedule.phases[0].mixture={books: 1.0}",
            ["phases[0].mixture", "'books'", "is not in data.sources, which contains corpus"],
        ),
        ("schedule.phases[0].mixture.corpus=0.5", ["phases[0].mixture", "0.5", "must sum to 1"]),
        ("data.max_epochs={corpus: .inf}", ["data.max_epochs.corpus", "inf", "a finite number above 0"]),
        ("data.max_epochs={corpus: .nan}", ["data.max_epochs.corpus", "nan", "a finite number above 0"]),
        ("data.cache.max_size_gib=.inf", ["data.cache.max_size_gib", "inf", "a finite number above 0"]),
        ("data.cache.max_size_gib=.nan", ["data.cache.max_size_gib", "nan", "a finite number above 0"]),
        (
            "run.max_repeat_failures=-1",
            ["run.max_repeat_failures", "-1", "not a finite number at least 0", "use a value that is"],
        ),
        (
            "guard.spike_sigmas=-2",
            ["guard.spike_sigmas", "-2", "not a finite number at least 0", "use a value that is"],
        ),
        ("guard.window_steps=3", ["guard.window_steps", "3", "at least 8"]),
        (
            "watchdog.step_timeout_seconds=-1",
            ["watchdog.step_timeout_seconds", "-1", "not a finite number at least 0", "use a value that is"],
        ),
        (
            "watchdog.start_timeout_seconds=.inf",
            ["watchdog.start_timeout_seconds", "inf", "not a finite number at least 0", "use a value that is"],
        ),
        ("data.cache.timeout_seconds=.inf", ["data.cache.timeout_seconds", "inf", "a finite number above 0"]),
        (
            "data.cache.max_attempts=18",
            [
                "data.cache.max_attempts",
                "18 attempts",
                "899.531 s",
                "wait only 600 s",
                "lower max_attempts or timeout_seconds",
            ],
        ),
        ("schedule.lr.peak=.nan", ["schedule.lr.peak", "nan", "a finite number above 0"]),
        (
            "optim.weight_decay=.nan",
            ["optim.weight_decay", "nan", "not a finite number at least 0", "use a value that is"],
        ),
        ("schedule.phases[0].mixture.corpus=.nan", ["phases[0].mixture.corpus", "nan", "between 0 and 1"]),
        ("schedule.phases[0].mixture.corpus=.inf", ["phases[0].mixture.corpus", "inf", "between 0 and 1"]),
        ("schedule.phases[0].mixture.corpus=-1", ["phases[0].mixture.corpus", "-1.0", "between 0 and 1"]),
        ("schedule.phases[7].global_batch_size=8", ["schedule.phases[7].global_batch_size"]),
        ("data.prefetch_steps=1000000000000", ["data.prefetch_steps", "1000000000000", "at most 1,024"]),
        ("model.num_layers=1000000000", ["model.num_layers", "1000000000", "at most 10,000"]),
        ("data.cache.max_attempts=1000000000000", ["data.cache.max_attempts", "at most 1,000"]),
        ("data.max_epochs={corpus: 1e300}", ["data.max_epochs.corpus", "1e+300", "at most 1,000,000,000"]),
        ("watchdog.start_timeout_seconds=1e300", ["watchdog.start_timeout_seconds", "1e+300", "at most 100,000,000"]),
        ("schedule.lr.cooldown_final=.nan", ["schedule.lr.cooldown_final", "nan", "a finite number at least 0"]),
        ("run.name=-x", ["run.name", "'-x'", "a single folder", "dot or dash"]),
        ("run.name=.x", ["run.name", "'.x'", "a single folder"]),
        ("run.name=x ", ["run.name", "'x '", "without spaces at its ends"]),
        ("run.name=a\tb", ["run.name", "without control characters"]),
        (f"run.name={'é' * 150}", ["run.root", "longer than any file system permits"]),
        (f"run.init_from={'a/' * 3000}", ["run.init_from", "longer than any file system permits"]),
        ("data.sources.corpus=http://u:p w@h/x", ["data.sources.corpus", "percent-encoding"]),
        ("data.sources.demoo=/x", ["data.sources.demoo", "whose sources are corpus", "no phase reads it", "mixture"]),
        ("schedule.phases[0].tokns=3", ["schedule.phases[0].tokns", "did you mean tokens?"]),
        ("optim.max_grad_norm", ["'optim.max_grad_norm'", "section.field=value"]),
    ],
)
def test_a_mistake_is_one_line_with_field_value_rule_and_remedy(override: str, parts: list[str]) -> None:
    message = mistake(override)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "={type: linear}",
            ["factor is None and train_seq_len is None", "exactly one", "factor to interpolate all rows"],
        ),
        ("={type: linear, factor: 4.0, train_seq_len: 2}", ["factor is 4.0 and train_seq_len is 2", "exactly one"]),
        ("={type: dynamic, factor: 4.0}", [".type: 'dynamic'", "must be one of linear"]),
        ("={type: linear, factor: 1.0}", [".factor: 1.0", "above 1", "to null"]),
        ("={type: linear, factor: .inf}", [".factor: inf", "above 1"]),
        ("={type: linear, factor: .nan}", [".factor: nan", "above 1"]),
        ("={type: linear, factor: true}", [".factor: True is of type bool", "of type float"]),
        ("={type: linear, train_seq_len: 1}", [".train_seq_len: 1", "above 1", "trained on"]),
        ("={type: linear, train_seq_len: 8192.0}", [".train_seq_len: 8192.0 is of type float", "of type int"]),
        ("={type: linear, factr: 4.0}", [".factr: 4.0", "did you mean factor?"]),
        (".factor=4.0", [".type: is missing", "add model.alibi_scaling.type"]),
        ("=4.0", [": 4.0", "is not a section with fields"]),
    ],
)
def test_a_mistaken_interpolation_is_named(override: str, parts: list[str]) -> None:
    message = mistake("model.alibi_scaling" + override, path=DEMO_BTLM)
    assert [part for part in ["model.alibi_scaling", *parts] if part not in message] == [], message


def test_stablelm_has_no_interpolation() -> None:
    message = mistake("model.alibi_scaling.type=linear")
    assert "model.alibi_scaling: {'type': 'linear'} is given, but there is no such field" in message


def test_an_interpolation_is_one_override_or_two_and_survives_the_file(tmp_path: Path) -> None:
    fixed = config.load_config(DEMO_BTLM, ["model.alibi_scaling.type=linear", "model.alibi_scaling.factor=4"])
    assert fixed.model.alibi_scaling == config.AlibiScalingConfig("linear", factor=4.0)
    (tmp_path / "copy.yaml").write_text(config.dump_config(fixed))
    assert config.load_config(tmp_path / "copy.yaml") == fixed
    dynamic = config.load_config(DEMO_BTLM, ["model.alibi_scaling={type: linear, train_seq_len: 8_192}"])
    assert dynamic.model.alibi_scaling == config.AlibiScalingConfig("linear", train_seq_len=8192)


def test_a_config_from_before_interpolation_has_none(tmp_path: Path) -> None:
    older = tmp_path / "older.yaml"
    older.write_text(DEMO_BTLM.read_text().replace("  alibi_scaling: null\n", ""))
    assert config.load_config(older) == config.load_config(DEMO_BTLM)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(DEMO.read_text().replace("  weight_decay: 0.1\n", ""))
    assert "optim.weight_decay: is missing" in mistake(path=broken)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(DEMO.read_text().replace("mup: null\n", ""))
    assert "mup: is missing" in mistake(path=broken)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "mapping of sections"),
        ("", "is empty; start from"),
        ("run: {}", "model: is missing"),
    ],
)
def test_a_file_that_is_no_config_says_so(tmp_path: Path, text: str, part: str) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(text)
    assert part in mistake(path=broken)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    assert "no such config file" in mistake(path=tmp_path / "nothing.yaml")


def test_overrides_reach_sections_and_list_elements() -> None:
    changed = config.load_config(
        DEMO, ["optim.max_grad_norm=0.5", "schedule.phases[1].micro_batch_size=4", "run.stop_step=7"]
    )
    assert changed.optim.max_grad_norm == 0.5
    assert changed.schedule.phases[1].micro_batch_size == 4
    assert changed.schedule.phases[0].micro_batch_size == 8
    assert changed.run.stop_step == 7


def test_an_override_may_add_a_source_that_a_phase_reads() -> None:
    mixture = "schedule.phases[1].mixture={a.b-c: 1.0}"
    loaded = config.load_config(DEMO, ["data.sources.a.b-c=/x", mixture])
    assert loaded.data.sources == {"corpus": "data/demo", "a.b-c": "/x"}


def test_a_file_may_list_a_source_that_no_phase_reads(tmp_path: Path) -> None:
    older = tmp_path / "older.yaml"
    older.write_text(DEMO.read_text().replace("  sources:\n", "  sources:\n    old: /read/before\n"))
    assert config.load_config(older, ["data.sources.old=/moved"]).data.sources["old"] == "/moved"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://u:p@h/x?X-Amz-Signature=a%2Fb&id=7", "https://HIDDEN@h/x?X-Amz-Signature=HIDDEN&id=7"),
        ("s3://key:secret@bucket/x", "s3://HIDDEN@bucket/x"),
        ("https://token@h:80/a@2x.tar", "https://HIDDEN@h:80/a@2x.tar"),
        ("https://u:p/w@h/x", "https://HIDDEN@h/x"),
        ("https://h/x?token", "https://h/x?HIDDEN"),
        ("https://h/x#access_token=a", "https://h/x#access_token=HIDDEN"),
        ("https://h:80/x@2/y?download=true", "https://h:80/x@2/y?download=true"),
        ("s3://bucket/a@b/shard-*.tar", "s3://bucket/a@b/shard-*.tar"),
    ],
)
def test_the_secrets_of_an_address_are_hidden_in_every_text(address: str, shown: str) -> None:
    for text in ("%s", "%s: cannot be read (403, url='%s'); correct it", '{"a":"%s","n":1}', "https://u:p@h/y %s"):
        filled = text.replace("%s", address)
        expected = text.replace("u:p", "HIDDEN").replace("%s", shown)
        assert hide_secrets(filled) == expected == hide_secrets(expected)
    assert has_hidden_part(shown) == (shown != address)


def test_a_saved_config_keeps_addresses_without_their_secrets(tmp_path: Path) -> None:
    given = config.load_config(DEMO, ["data.sources.corpus=https://u:p@h/x?sig=s"])
    (tmp_path / "config.yaml").write_text(config.dump_config(given))
    assert config.load_saved_config(tmp_path / "config.yaml").data.sources == {
        "corpus": "https://HIDDEN@h/x?sig=HIDDEN"
    }


def test_the_last_of_two_overrides_wins() -> None:
    assert config.load_config(DEMO, ["run.seed=2", "run.seed=3"]).run.seed == 3


@pytest.mark.parametrize(
    ("world_size", "override", "part"),
    [
        (3, "parallel.tp_size=2", "parallel.tp_size: 2 does not divide 3, the number of ranks"),
        (4, "parallel.tp_size=4", "model.num_kv_heads: 2 is not divisible by parallel.tp_size 4"),
        (
            8,
            "parallel.tp_size=2",
            "schedule.phases[0].global_batch_size: 16 is not divisible by the data-parallel size 4",
        ),
    ],
)
def test_ranks_that_do_not_divide_are_refused(world_size: int, override: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        config.check_world_size(config.load_config(DEMO, [override]), world_size)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_looking_at_a_config_needs_no_torch() -> None:
    """Check a new interpreter, because this one has imported torch."""
    program = "import sys; from tandem.trainer.config import flops, schedule; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=CONFIGS.parent).returncode == 0


def test_loading_takes_well_under_a_second() -> None:
    start = time.perf_counter()
    config.load_config(CONFIGS / "stablelm-2-12b.yaml")
    assert time.perf_counter() - start < 0.5
