"""Who did not arrive, from the reports of all ranks: a pure function, so that every rank that reads them says the same.

The one idea is an order of guilt. A rank that crashed or gives no sign explains all that others do; else the one that is behind
in its phases; else, within a phase, the one that others wait for and that waits for nobody.
"""

import statistics
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from tandem.trainer.distributed.watchdog.report import HangReport, RankProcess

MAX_LISTED_HOSTS = 4


def verdict(reports: dict[int, HangReport], processes: list[RankProcess], folder: Path) -> str:
    """One sentence: the step, the limit, who did not arrive, what the others wait in, where the stacks are."""
    culprit_ranks, words = _find_culprit(reports, processes)
    others = [report for rank, report in sorted(reports.items()) if rank not in culprit_ranks]
    step = max(report.step for report in others or reports.values())
    limits = [
        report.timeout_seconds for report in reports.values() if not (report.connection_error or report.crash_error)
    ]
    lost_connection = any(report.connection_error for report in reports.values()) or not limits
    cause = "a connection was lost" if lost_connection else f"no progress for {min(limits):g} s"
    waiting = _common_collective(others)
    while_waiting = f", while the others wait in {waiting}" if culprit_ranks and waiting else ""
    return f"step {step}: {cause}: {words}{while_waiting}; stacks: {folder}"


def peer_states(reports: dict[int, HangReport]) -> dict[int, str]:
    """What ranks say of others on their hosts."""
    return {int(rank): state for report in reports.values() for rank, state in report.local_peer_states.items()}


def format_ranks(ranks: Iterable[int], processes: list[RankProcess]) -> str:
    """'rank 1 on host-b', 'ranks 0 to 5, 7 on hosts a, b'."""
    ordered = sorted(ranks)
    rank_runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    rank_list = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in rank_runs)
    return f"rank{'s' * (len(ordered) > 1)} {rank_list} on {_format_hosts(ordered, processes)}"


def _format_hosts(ranks: Iterable[int], processes: list[RankProcess]) -> str:
    hosts = list(dict.fromkeys(processes[rank].host for rank in ranks))
    more = f" and {len(hosts) - MAX_LISTED_HOSTS} more" if len(hosts) > MAX_LISTED_HOSTS else ""
    return f"hosts {', '.join(hosts[:MAX_LISTED_HOSTS])}{more}" if len(hosts) > 1 else hosts[0]


def _find_culprit(reports: dict[int, HangReport], processes: list[RankProcess]) -> tuple[list[int], str]:
    """The ranks that did not arrive, none where all have; and what is known of them."""
    if crashed := [rank for rank, report in sorted(reports.items()) if report.crash_error]:
        return crashed, f"{format_ranks(crashed, processes)} crashed with {reports[crashed[0]].crash_error}"
    if silent := _find_silent_ranks(reports, processes):
        return silent
    min_phases = min(report.num_phases for report in reports.values())
    behind = {rank: report for rank, report in reports.items() if report.num_phases == min_phases}
    if ranks_ahead := _find_ranks_past_collective(reports, behind):
        return (
            ranks_ahead,
            f"{_format_subject(ranks_ahead, processes)} in {reports[ranks_ahead[0]].phase} and left out a collective",
        )
    late_ranks = _find_late_ranks(behind)
    if len(behind) < len(reports):
        return late_ranks or list(
            behind
        ), f"{_format_subject(late_ranks or behind, processes)} still in {next(iter(behind.values())).phase}"
    if late_ranks:
        first_report = behind[late_ranks[0]]
        return (
            late_ranks,
            f"{_format_subject(late_ranks, processes)} in {first_report.collective or 'no collective'} "
            f"({first_report.phase}, {first_report.location})",
        )
    hosts = _format_hosts(range(len(processes)), processes)
    network = f"the network between {hosts}" if hosts.startswith("hosts ") else f"the connections on {hosts}"
    if connection_errors := [report.connection_error for report in reports.values() if report.connection_error]:
        return [], f"all ranks are alive: {network}: {connection_errors[0]}"
    first_report = next(iter(reports.values()))
    if len(processes) == 1:
        return [], f"{format_ranks(reports, processes)} stays in {first_report.phase}, {first_report.location}"
    waiting = _common_collective(list(reports.values()))
    location = f"in {waiting}" if waiting else f"({first_report.phase}, {first_report.location})"
    return [], f"all have arrived {location} and none got out: {network}"


def _find_silent_ranks(reports: dict[int, HangReport], processes: list[RankProcess]) -> tuple[list[int], str] | None:
    descriptions = {
        "gone": "gone: killed, or ended without a word",
        "stopped": "silent: stopped by a signal",
        "unknown": "silent: frozen, dead or cut off",
        "running": "silent: alive but frozen",
    }
    if any(report.connection_error for report in reports.values()):
        del descriptions["running"]  # has not met the loss yet
    states_by_rank = peer_states(reports)
    missing = [rank for rank in range(len(processes)) if rank not in reports]
    for state, words in descriptions.items():
        if ranks := [rank for rank in missing if states_by_rank.get(rank, "unknown") == state]:
            return ranks, f"{_format_subject(ranks, processes)} {words}"
    return None


def _find_ranks_past_collective(reports: dict[int, HangReport], behind: dict[int, HangReport]) -> list[int]:
    """Ranks that are ahead of those `behind`, who wait for them in a collective that they have not begun."""
    awaited_collectives: dict[str, int] = {}
    for report in behind.values():
        for key in report.group_keys:
            awaited_collectives[key] = max(awaited_collectives.get(key, 0), report.num_collectives[key])
    return [
        rank for rank, report in sorted(reports.items())
        if rank not in behind and any(
            report.num_collectives[key] < number or (report.num_collectives[key] == number and key in report.group_keys)
            for key, number in awaited_collectives.items() if key in report.num_collectives
        )
    ]  # fmt: skip


def _find_late_ranks(reports: dict[int, HangReport]) -> list[int]:
    """Ranks, of those in one phase, that others wait for and that wait for nobody."""
    counts_by_group: dict[str, list[int]] = {}
    for report in reports.values():
        for key, number in report.num_collectives.items():
            counts_by_group.setdefault(key, []).append(number)
    highest, lowest = ({key: of(each) for key, each in counts_by_group.items()} for of in (max, min))
    behind_ranks = [
        rank for rank, report in sorted(reports.items())
        if any(number < highest[key] for key, number in report.num_collectives.items())
        and not any(number > lowest[key] for key, number in report.num_collectives.items())
    ]  # fmt: skip
    idle = [rank for rank, report in sorted(reports.items()) if not report.collective]
    return behind_ranks or (idle if len(idle) < len(reports) else [])


def _common_collective(reports: list[HangReport]) -> str:
    """The collective that most of them stand in, with its number."""
    collectives = [
        f"{report.collective} {report.num_collectives[report.group_keys[0]]}"
        if len(report.group_keys) == 1
        else report.collective
        for report in reports
        if report.collective
    ]
    return statistics.mode(collectives) if collectives else ""


def _format_subject(ranks: Iterable[int], processes: list[RankProcess]) -> str:
    ordered = list(ranks)
    return f"{format_ranks(ordered, processes)} {'is' if len(ordered) == 1 else 'are'}"
