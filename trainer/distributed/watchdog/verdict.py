"""Who did not arrive, from the reports of all ranks: a pure function, so that every rank that reads them says the same.

The one idea is an order of guilt. A rank that crashed or gives no sign explains all that others do; else the one that is behind
in its phases; else, within a phase, the one that others wait for and that waits for nobody.
"""

import statistics
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from tandem.trainer.distributed.watchdog.report import Place, Report

SHOWN_HOSTS = 4


def verdict(reports: dict[int, Report], places: list[Place], folder: Path) -> str:
    """One sentence: the step, the limit, who did not arrive, what the others wait in, where the stacks are."""
    guilty, words = _guilt(reports, places)
    others = [report for rank, report in sorted(reports.items()) if rank not in guilty]
    step = max(report.step for report in others or reports.values())
    limits = [report.limit_seconds for report in reports.values() if not (report.lost or report.crashed)]
    failed = any(report.lost for report in reports.values()) or not limits
    cause = "a connection was lost" if failed else f"no progress for {min(limits):g} s"
    waiting = _waiting(others)
    while_waiting = f", while the others wait in {waiting}" if guilty and waiting else ""
    return f"step {step}: {cause}: {words}{while_waiting}; stacks: {folder}"


def states(reports: dict[int, Report]) -> dict[int, str]:
    """What ranks say of others on their hosts."""
    return {int(rank): state for report in reports.values() for rank, state in report.neighbours.items()}


def names(ranks: Iterable[int], places: list[Place]) -> str:
    """'rank 1 on host-b', 'ranks 0 to 5, 7 on hosts a, b'."""
    ordered = sorted(ranks)
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    shown = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"rank{'s' * (len(ordered) > 1)} {shown} on {_hosts(ordered, places)}"


def _hosts(ranks: Iterable[int], places: list[Place]) -> str:
    hosts = list(dict.fromkeys(places[rank].host for rank in ranks))
    more = f" and {len(hosts) - SHOWN_HOSTS} more" if len(hosts) > SHOWN_HOSTS else ""
    return f"hosts {', '.join(hosts[:SHOWN_HOSTS])}{more}" if len(hosts) > 1 else hosts[0]


def _guilt(reports: dict[int, Report], places: list[Place]) -> tuple[list[int], str]:
    """The ranks that did not arrive, none where all have; and what is known of them."""
    if crashed := [rank for rank, report in sorted(reports.items()) if report.crashed]:
        return crashed, f"{names(crashed, places)} crashed with {reports[crashed[0]].crashed}"
    if found := _silent(reports, places):
        return found
    least = min(report.moves for report in reports.values())
    behind = {rank: report for rank, report in reports.items() if report.moves == least}
    if early := _left_out(reports, behind):
        return early, f"{_are(early, places)} in {reports[early[0]].phase} and left out a collective"
    late = _not_arrived(behind)
    if len(behind) < len(reports):
        return late or list(behind), f"{_are(late or behind, places)} still in {next(iter(behind.values())).phase}"
    if late:
        one = behind[late[0]]
        return late, f"{_are(late, places)} in {one.collective or 'no collective'} ({one.phase}, {one.line})"
    hosts = _hosts(range(len(places)), places)
    network = f"the network between {hosts}" if hosts.startswith("hosts ") else f"the connections on {hosts}"
    if lost := [report.lost for report in reports.values() if report.lost]:
        return [], f"all ranks are alive: {network}: {lost[0]}"
    one = next(iter(reports.values()))
    if len(places) == 1:
        return [], f"{names(reports, places)} stays in {one.phase}, {one.line}"
    waiting = _waiting(list(reports.values()))
    where = f"in {waiting}" if waiting else f"({one.phase}, {one.line})"
    return [], f"all have arrived {where} and none got out: {network}"


def _silent(reports: dict[int, Report], places: list[Place]) -> tuple[list[int], str] | None:
    signs = {
        "gone": "gone: killed, or ended without a word",
        "stopped": "silent: stopped by a signal",
        "unknown": "silent: frozen, dead or cut off",
        "running": "silent: alive but frozen",
    }
    if any(report.lost for report in reports.values()):
        del signs["running"]  # has not met the loss yet
    known = states(reports)
    missing = [rank for rank in range(len(places)) if rank not in reports]
    for state, words in signs.items():
        if ranks := [rank for rank in missing if known.get(rank, "unknown") == state]:
            return ranks, f"{_are(ranks, places)} {words}"
    return None


def _left_out(reports: dict[int, Report], behind: dict[int, Report]) -> list[int]:
    """Ranks that are ahead of those `behind`, who wait for them in a collective that they have not begun."""
    waits: dict[str, int] = {}
    for report in behind.values():
        for key in report.keys:
            waits[key] = max(waits.get(key, 0), report.numbers[key])
    return [
        rank for rank, report in sorted(reports.items())
        if rank not in behind and any(
            report.numbers[key] < number or (report.numbers[key] == number and key in report.keys)
            for key, number in waits.items() if key in report.numbers
        )
    ]  # fmt: skip


def _not_arrived(reports: dict[int, Report]) -> list[int]:
    """Ranks, of those in one phase, that others wait for and that wait for nobody."""
    numbers: dict[str, list[int]] = {}
    for report in reports.values():
        for key, number in report.numbers.items():
            numbers.setdefault(key, []).append(number)
    highest, lowest = ({key: of(each) for key, each in numbers.items()} for of in (max, min))
    last = [
        rank for rank, report in sorted(reports.items())
        if any(number < highest[key] for key, number in report.numbers.items())
        and not any(number > lowest[key] for key, number in report.numbers.items())
    ]  # fmt: skip
    idle = [rank for rank, report in sorted(reports.items()) if not report.collective]
    return last or (idle if len(idle) < len(reports) else [])


def _waiting(reports: list[Report]) -> str:
    """The collective that most of them stand in, with its number."""
    stands = [
        f"{report.collective} {report.numbers[report.keys[0]]}" if len(report.keys) == 1 else report.collective
        for report in reports
        if report.collective
    ]
    return statistics.mode(stands) if stands else ""


def _are(ranks: Iterable[int], places: list[Place]) -> str:
    ordered = list(ranks)
    return f"{names(ordered, places)} {'is' if len(ordered) == 1 else 'are'}"
