"""A report is complete and self-contained, and works for runs in every condition."""

import argparse
import json
import math
import os
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tandem.trainer import config as configuration
from tandem.trainer.checkpoint.layout import model_metadata, step_folder_name
from tandem.trainer.checkpoint.write import commit
from tandem.trainer.config import UserError
from tandem.trainer.metrics.history import read_history
from tandem.trainer.metrics.records import METRICS_FILE, open_sinks
from tandem.trainer.tools import report
from tandem.trainer.tools.report import compare, plots
from tests.trainer.metrics.test_records import demo_config, record, write_rollback, write_run

NAMES = {picture.name for picture in plots.PICTURES.values()}


def tandem_report(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    report.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its report."""
    folder = tmp_path_factory.mktemp("runs") / "night"
    write_run(folder, to=10, end=False)
    write_run(folder, resumed_step=8, memory_gib=1.5)
    (folder / "environment.json").write_text('{"packages": {"torch": "2.13"}, "command": ["tandem", "<train>"]}')
    with redirect_stdout(StringIO()) as output:
        tandem_report(folder)
    assert output.getvalue() == f"{folder / 'report.html'}\n"
    return folder


@pytest.fixture(scope="module")
def page(killed_and_resumed: Path) -> str:
    return (killed_and_resumed / "report.html").read_text()


def test_every_picture_is_in_the_page_and_in_the_folder(killed_and_resumed: Path, page: str) -> None:
    assert {path.stem for path in (killed_and_resumed / "report").iterdir()} == NAMES
    assert page.count('src="data:image/png;base64,') == len(NAMES)
    for path in (killed_and_resumed / "report").iterdir():
        pixels = imread(path)
        assert pixels.shape == (510, 1500, 4)
        assert len(np.unique(pixels[..., 0])) > 20, f"{path.name} is empty"


def test_the_page_fetches_nothing(page: str) -> None:
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_the_page_has_the_tables(page: str) -> None:
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert "12" in cells[0]
    for text in (
        "2.13",
        "tandem &lt;train&gt;",
        "1.43 MiB",
        "2",
        f"{8 * 2048:,}",
        "linear, peak 0.012, warm-up 20 steps",
    ):
        assert text in cells, text
    assert "ended: schedule finished" in page
    assert "ffn_hidden_size: 341" in page  # the whole config.yaml


def test_a_run_without_memory_figures_that_was_killed_within_a_line_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, to=7, end=False)
    os.truncate(tmp_path / METRICS_FILE, (tmp_path / METRICS_FILE).stat().st_size - 30)
    page = report.write_report(tmp_path).read_text()
    assert "step 6 of 12" in page
    assert "still running, or killed" in page
    assert not (tmp_path / "report" / "memory.png").exists()
    assert page.count("<img") == len(NAMES) - 1


def test_a_run_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, to=0, end=False)
    assert "none finished yet" in report.write_report(tmp_path).read_text()


def test_a_run_that_diverged_has_a_report(tmp_path: Path) -> None:
    write_run(tmp_path, loss=math.nan, grad_norm=math.inf)
    assert report.write_report(tmp_path).read_text().count("<img") == len(NAMES) - 1


def test_names_are_neither_formulas_nor_html(tmp_path: Path) -> None:
    write_run(tmp_path)
    hostile = r"$\\frac{$<script>alert(1)</script>\u001b[2J"
    lines = (tmp_path / METRICS_FILE).read_text()
    (tmp_path / METRICS_FILE).write_text(lines.replace('"short"', f'"{hostile}"').replace("schedule finished", hostile))
    page = report.write_report(tmp_path).read_text()
    assert page.count("<img") == len(NAMES) - 1
    assert "<script" not in page
    assert r"&lt;script&gt;alert(1)" in page
    _, axes = plots.token_axes(read_history(tmp_path), "loss")
    assert axes.texts[0].get_text() == r" \$\frac{\$<script>alert(1)</script>\x1b[2J"


def test_restarts_and_phases_are_drawn(killed_and_resumed: Path) -> None:
    _, axes = plots.token_axes(read_history(killed_and_resumed), "loss")
    assert [text.get_text().strip() for text in axes.texts] == ["short", "long"]
    ticks = [line for line in axes.lines if line.get_label() == "restart"]
    assert list(ticks[0].get_xdata()) == [8 * 2048]


def test_rollbacks_and_skipped_steps_are_drawn_and_in_the_tables(tmp_path: Path) -> None:
    write_rollback(tmp_path)
    history, config = read_history(tmp_path), configuration.load_config(tmp_path / "config.yaml")
    marks = {line.get_label(): line for line in plots.PICTURES["Loss"].figure(history, config).axes[0].lines}
    assert list(marks["rollback"].get_xdata()) == [8 * 2048]
    assert list(marks["skipped step"].get_xdata()) == [3 * 2048]
    assert list(marks["skipped step"].get_ydata()) == [9.0]
    assert "restart" not in marks
    cells = re.findall(r"<td>(.*?)</td>", report.write_report(tmp_path).read_text())
    for text in ("loss nan", "9.0000", "8.8 s: imports 5.2, kernels 3.5", "0.1 s"):
        assert text in cells, text
    result = report.headline_numbers(history)
    assert (result["steps repeated after rollbacks"], result["skipped steps"]) == ("2", "1")


def test_a_skipped_step_without_a_number_is_a_cross_at_the_upper_edge(tmp_path: Path) -> None:
    write_run(tmp_path, to=6)
    sinks = open_sinks(tmp_path, demo_config(), rank=0, start_step=6)
    sinks.write_start(tokens=6 * 2048, world_size=4, tp_size=2, dp_size=2, total_steps=12, total_tokens=12 * 2048)
    sinks.write_step(record(7, loss=math.nan, grad_norm=math.inf, skipped=True))
    sinks.close()
    config = configuration.load_config(tmp_path / "config.yaml")
    for title in ("Loss", "Late loss", "Gradient norm"):
        axes = plots.PICTURES[title].figure(read_history(tmp_path), config).axes[0]
        [cross] = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
        assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([7 * 2048], [1.0])
        assert cross.get_transform() == axes.get_xaxis_transform()


def test_smoothing_forgets_single_steps_and_stops_at_phases(killed_and_resumed: Path) -> None:
    steps = read_history(killed_and_resumed).steps
    values = np.array([3.0] * 8 + [7.0] * 4)
    values[2], values[5] = np.nan, 1000.0
    tokens, medians = plots.running_median(steps, values)
    np.testing.assert_array_equal(medians, [3.0] * 8 + [np.nan] + [7.0] * 4 + [np.nan])
    np.testing.assert_array_equal(tokens[:8], [2048 * step for step in range(1, 9)])


def test_equal_runs_compare_as_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", to=6)
    write_run(tmp_path / "b", to=8)
    capsys.readouterr()
    tandem_report("--compare", tmp_path / "a", tmp_path / "b")
    verdict, path = capsys.readouterr().out.splitlines()
    assert verdict == "loss identical in 6 common steps; grad_norm identical in 6 common steps"
    page = Path(path).read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r"https?://", page)


def test_the_last_bit_of_one_step_is_found(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    config = demo_config("optim.max_grad_norm=0.5")
    write_run(tmp_path / "b", to=6, end=False, config=config)
    sinks = open_sinks(tmp_path / "b", config, rank=0, start_step=6)
    sinks.write_start(tokens=6 * 2048, world_size=4, tp_size=2, dp_size=2, total_steps=12, total_tokens=12 * 2048)
    sinks.write_step(record(7, loss=float(np.nextafter(record(7).loss, 9))))
    sinks.close()
    verdict, path = compare.write_comparison(tmp_path / "a", tmp_path / "b")
    assert verdict.startswith("loss differs first at step 7 (")
    assert "in 1 of 7 common steps, by at most 4.44e-16" in verdict
    assert verdict.endswith("grad_norm identical in 7 common steps")
    assert "+  max_grad_norm: 0.5" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "report: no run folder is named"),
        (["nowhere"], "nowhere: no such folder"),
        (["--compare", "nowhere", "elsewhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tandem_report(*arguments)
    assert "\n" not in str(caught.value)


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", to=2)
    write_run(tmp_path / "b", resumed_step=4, to=6)
    with pytest.raises(UserError, match="no step in common"):
        compare.write_comparison(tmp_path / "a", tmp_path / "b")


def test_a_report_needs_the_runs_config(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml: no such config file"):
        report.write_report(tmp_path)
    assert configuration.UserError is UserError


def test_a_difference_that_is_not_finite_is_counted() -> None:
    pairs = [({"step": step, "loss": one}, {"step": step, "loss": other}) for step, one, other in (
        (1, 2.0, 2.0), (2, 2.0, 2.5), (3, 2.0, None), (4, float("inf"), 1.0),
    )]  # fmt: skip
    assert compare.first_difference(pairs, "loss") == (
        "loss differs first at step 2 (2.0 and 2.5), in 3 of 4 common steps, by at most 0.5; "
        "2 of these have a value that is not finite"
    )


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("[1]", "[1] is not a section"),
        ("7", "7 is not a section"),
        ("null", "None is not a section"),
        ("", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        ('{"packages": {"torch": [2]}}', "packages.torch: [2] is of type list"),
        ('{"command": {"a": 1}}', "is not a list"),
        ('{"host": "a"}', "no such field"),
        ('{"time": 1, "time": 2}', "given twice"),
    ],
)
def test_a_damaged_environment_is_a_note_in_the_report(tmp_path: Path, content: str | bytes, note: str) -> None:
    write_run(tmp_path)
    (tmp_path / "environment.json").write_bytes(content.encode() if isinstance(content, str) else content)
    cells = re.findall(r"<td>(.*?)</td>", report.write_report(tmp_path).read_text())
    assert [cell for cell in cells if f"cannot be read: {tmp_path}/environment.json" in cell and note in cell], cells


def test_an_environment_that_is_no_file_is_a_note_in_the_report(tmp_path: Path) -> None:
    write_run(tmp_path)
    for plant in (os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)):
        plant(tmp_path / "environment.json")
        assert "<td>cannot be read: " in report.write_report(tmp_path).read_text()
        shutil.move(tmp_path / "environment.json", tmp_path / "away")
        shutil.rmtree(tmp_path / "away") if (tmp_path / "away").is_dir() else (tmp_path / "away").unlink()
    assert "<td>not written</td>" in report.write_report(tmp_path).read_text()


def test_a_config_of_another_model_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    given = demo_config()
    for name in ("a", "b"):
        write_run(tmp_path / name, to=4)
        for step in (2, 4):
            folder = tmp_path / name / "checkpoints" / step_folder_name(step)
            folder.mkdir(parents=True)
            commit(folder, [], {"step": step, "tp_size": 1, "dp_size": 1, **model_metadata(given.model, given.mup)})
    report.write_report(tmp_path / "b")
    (tmp_path / "b" / "report.html").unlink()
    config = tmp_path / "b" / "config.yaml"
    config.write_text(config.read_text().replace("num_layers: 4", "num_layers: 5"))
    manifest = tmp_path / "b" / "checkpoints" / "step-00000004" / "manifest.json"
    message = re.escape(f"{config}: model.num_layers: 5 differs from 4 in {manifest}; both must describe one run")
    with pytest.raises(UserError, match=message):
        report.write_report(tmp_path / "b")
    for pair in ("ab", "ba"):
        with pytest.raises(UserError, match=message):
            compare.write_comparison(*(tmp_path / name for name in pair))
    assert not list(tmp_path.rglob("*.html"))
    manifest.write_text("{")  # a damaged checkpoint states nothing, but the one before it does
    with pytest.raises(UserError, match=r"step-00000002/manifest\.json"):
        report.write_report(tmp_path / "b")


def test_a_comparison_hides_secrets_and_needs_configs_that_are_text(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, to=2)
    config = tmp_path / "a" / "config.yaml"
    config.write_text(config.read_text() + "# https://me:pass-31word@host/x\n")
    _, page = compare.write_comparison(tmp_path / "a", tmp_path / "b")
    assert "https://HIDDEN@host/x" in page.read_text()
    assert "pass-31word" not in page.read_text()
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=f"{config}: is not UTF-8 .*; restore it"):
        compare.write_comparison(tmp_path / "a", tmp_path / "b")
    config.unlink()
    with pytest.raises(UserError, match=rf"{config}: cannot be read \(No such file"):
        compare.write_comparison(tmp_path / "a", tmp_path / "b")
    config.mkdir()
    with pytest.raises(UserError, match=rf"{config}: cannot be read \(Is a directory"):
        compare.write_comparison(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((kind, {"time": value}) for kind in ("start", "rollback", "checkpoint") for value in (1e300, -1, None)),
        ("start", {"start_seconds": {"imports": 10**400}}),
        ("start", {"start_seconds": {"imports": None}}),
    ],
)
def test_a_record_whose_numbers_are_no_times_is_left_out(tmp_path: Path, kind: str, fields: dict, caplog) -> None:
    write_rollback(tmp_path)
    path = tmp_path / METRICS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines += [line | fields for line in lines if line["kind"] == kind]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write_report(tmp_path)
    assert "damaged lines are left out" in caplog.text
