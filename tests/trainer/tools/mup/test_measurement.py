"""Fitted exponents, numbers and their intervals, and the messages about them."""

import json
from math import inf, nan

import pytest

from tandem.trainer.models.mup import parameter_rules
from tandem.trainer.tools.mup import coordinates
from tandem.trainer.tools.mup.coordinates import LAWS, fit_exponent, judge
from tandem.trainer.tools.mup.measurement import Measurement, first_failure, format_table, measurements_to_json
from tandem.trainer.tools.mup.weight_decay import LR_EXPONENTS, _compare
from tests import tiny_configs


def finding(value: float, what: str = "size of logits", case: str = "tp 1 fp32", high: float = 0.15) -> Measurement:
    return Measurement("coordinates", what, case, value, -0.15, high, "the output multiplier")


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_the_slope_is_the_exponent_of_the_width(exponent):
    widths = [64, 128, 256, 512]
    assert fit_exponent(widths, [3.7 * width**exponent for width in widths]) == pytest.approx(exponent, abs=1e-12)


def test_nan_is_out_of_bounds():
    assert not finding(nan).is_within_bounds
    assert not finding(0.2).is_within_bounds
    assert finding(0.1).is_within_bounds
    assert first_failure([finding(0.1), finding(nan), finding(0.3)]).value != 0.3


def test_a_failure_names_quantity_value_interval_and_rule_in_one_line():
    sentence = finding(0.5).failure_message()
    assert "\n" not in sentence
    for part in ("coordinates", "size of logits", "tp 1 fp32", "+0.5", "-0.15 to +0.15", "the output multiplier"):
        assert part in sentence


def test_the_table_has_a_row_for_each_quantity_and_marks_what_fails():
    lines = format_table(
        [finding(0.0), finding(0.5, case="tp 2 fp32"), finding(0.1, what="size of scores")]
    ).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[-3:] == ["+0", "+0.5", "!"]
    assert "!" not in lines[2]


def test_the_json_is_plain():
    (row,) = json.loads(json.dumps(measurements_to_json([finding(0.3, high=inf)]), allow_nan=False))
    assert (row["value"], row["high"], row["is_within_bounds"]) == (0.3, None, True)


def records(exponents: dict[str, float]) -> list[coordinates.CoordinateRecord]:
    """Records of proxies whose sizes and changes follow these exponents."""
    return [
        {"tp_size": 1, "precision": "fp32", "width": width, "seed": 1, "step": step,
         "size": {name: width**e for name, e in exponents.items()},
         "change": {name: step * width**e for name, e in exponents.items()}}
        for width in (64, 128, 256) for step in (0, 1)
    ]  # fmt: skip


def test_records_that_follow_the_laws_pass_and_those_that_grow_fail():
    lawful = {name: law["size"][0] for name, law in LAWS.items()}
    assert first_failure(judge(records(lawful))) is None
    for name in LAWS:
        failure = first_failure(judge(records(lawful | {name: lawful[name] + 0.5})))
        assert failure is not None
        assert failure.quantity == f"size of {name}"


def test_sizes_are_judged_before_changes():
    """Lower layers and the start come first, because a fault there affects everything after it."""
    found = [finding.quantity for finding in judge(records(dict.fromkeys(LAWS, 0.0)))]
    assert found == [f"size of {name}" for name in LAWS] + [f"change of {name}" for name in LAWS]


def test_laws_name_every_role_of_the_table():
    config = tiny_configs.make_config("btlm")
    assert LR_EXPONENTS.keys() == parameter_rules(config.model, config.mup).keys()


@pytest.mark.parametrize("values", [[1.0, nan], [nan, 1.0], [1.0, inf]])
def test_a_tensor_without_a_finite_decay_is_never_passed_over(values: list[float]) -> None:
    assert not _compare("decay", "hidden", 64, values, 1.0, 1.0).is_within_bounds
    assert _compare("decay", "hidden", 64, [1.0, 1.0], 1.0, 1.0).is_within_bounds
