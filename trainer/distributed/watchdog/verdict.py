"""Determine from all reports which rank made the others wait. The result depends only on the reports, so all ranks agree.

The first of these that applies is the cause:

1. a rank that crashed,
2. a rank without a report,
3. a rank in a later phase that skipped a collective in which the others wait,
4. a rank in an earlier phase than the others,
5. within one phase, a rank that others wait for and that waits for no other.
"""

import statistics
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from tandem.trainer.distributed.watchdog.report import HangReport, RankProcess

MAX_LISTED_HOSTS = 4


def verdict(reports: dict[int, HangReport], processes: list[RankProcess], folder: Path) -> str:
    """Return one line: the step, the limit, the missing rank, the others' collective, and the folder of the stacks."""
    culprit_ranks, words = _find_culprit(reports, processes)
    others = [report for rank, report in sorted(reports.items()) if rank not in culprit_ranks]
    step = max(report.step for report in others or reports.values())
    hung = [report for report in reports.values() if not (report.connection_error or report.crash_error)]
    cause = "a connection was lost"
    if hung and not any(report.connection_error for report in reports.values()):
        cause = f"no progress for {min(report.timeout_seconds for report in hung):g} s"
    waiting = _common_collective(others)
    while_waiting = f", while the others wait in {waiting}" if culprit_ranks and waiting else ""
    return f"step {step}: {cause}; {words}{while_waiting}; stacks: {folder}"


def peer_states(reports: dict[int, HangReport]) -> dict[int, str]:
    """Return the states of ranks as reported by other ranks of the same machine."""
    return {int(rank): state for report in reports.values() for rank, state in report.local_peer_states.items()}


def format_ranks(ranks: Iterable[int], processes: list[RankProcess]) -> str:
    """Format ranks and hosts, for example 'rank 1 on host-b' or 'ranks 0 to 5, 7 on hosts a, b'."""
    ordered = sorted(ranks)
    rank_runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    rank_list = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in rank_runs)
    return f"rank{'s' * (len(ordered) > 1)} {rank_list} on {_format_hosts(ordered, processes)}"


def _format_hosts(ranks: Iterable[int], processes: list[RankProcess]) -> str:
    hosts = list(dict.fromkeys(processes[rank].host for rank in ranks))
    more = f" and {len(hosts) - MAX_LISTED_HOSTS} more" if len(hosts) > MAX_LISTED_HOSTS else ""
    return f"hosts {', '.join(hosts[:MAX_LISTED_HOSTS])}{more}" if len(hosts) > 1 else hosts[0]


def _find_culprit(reports: dict[int, HangReport], processes: list[RankProcess]) -> tuple[list[int], str]:
    """Return the ranks that made the others wait (perhaps none), and a clause about them or about the network."""
    if crashed := [rank for rank, report in sorted(reports.items()) if report.crash_error]:
        return crashed, f"{format_ranks(crashed, processes)} crashed with {reports[crashed[0]].crash_error}"
    if silent := _find_silent_ranks(reports, processes):
        return silent
    min_phases = min(report.num_phases for report in reports.values())
    behind = {rank: report for rank, report in reports.items() if report.num_phases == min_phases}
    if ahead := _find_ranks_past_collective(reports, behind):
        return (
            ahead,
            f"{_format_subject(ahead, processes)} in phase {reports[ahead[0]].phase!r} and skipped a collective",
        )
    late = _find_late_ranks(behind)
    if len(behind) < len(reports):
        late = late or list(behind)
        return late, f"{_format_subject(late, processes)} still in phase {next(iter(behind.values())).phase!r}"
    first = reports[late[0]] if late else next(iter(reports.values()))
    place = f"phase {first.phase!r}, {first.location}"
    if late:
        return late, f"{_format_subject(late, processes)} in {first.collective or 'no collective'} ({place})"
    hosts = _format_hosts(range(len(processes)), processes)
    network = f"the network between {hosts}" if hosts.startswith("hosts ") else f"the connections on {hosts}"
    if connection_errors := [report.connection_error for report in reports.values() if report.connection_error]:
        return [], f"all ranks are alive; check {network} ({connection_errors[0]})"
    if len(processes) == 1:
        return [], f"{format_ranks(reports, processes)} is still in {place}"
    waiting = _common_collective(list(reports.values())) or place
    return [], f"all ranks are stuck in {waiting}; check {network}"


def _find_silent_ranks(reports: dict[int, HangReport], processes: list[RankProcess]) -> tuple[list[int], str] | None:
    descriptions = {
        "gone": "gone (killed, or exited without an error)",
        "stopped": "silent (stopped by a signal)",
        "unknown": "silent (frozen, dead or disconnected)",
        "running": "silent (alive but frozen)",
    }
    if any(report.connection_error for report in reports.values()):
        del descriptions["running"]  # a running rank may simply not have noticed the lost connection yet
    states_by_rank = peer_states(reports)
    missing = [rank for rank in range(len(processes)) if rank not in reports]
    for state, words in descriptions.items():
        if ranks := [rank for rank in missing if states_by_rank.get(rank, "unknown") == state]:
            return ranks, f"{_format_subject(ranks, processes)} {words}"
    return None


def _find_ranks_past_collective(reports: dict[int, HangReport], behind: dict[int, HangReport]) -> list[int]:
    """Find ranks that are in a later phase but skipped a collective in which the ranks in `behind` wait."""
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
    """Among ranks in one phase, find those that others wait for and that do not wait for any other."""
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
    """Return the collective that most ranks are in, with its number; "" if there is none."""
    collectives = []
    for report in reports:
        if report.collective:
            number = f" {report.num_collectives[report.group_keys[0]]}" if len(report.group_keys) == 1 else ""
            collectives.append(report.collective + number)
    return statistics.mode(collectives) if collectives else ""


def _format_subject(ranks: list[int], processes: list[RankProcess]) -> str:
    return f"{format_ranks(ranks, processes)} {'is' if len(ranks) == 1 else 'are'}"
