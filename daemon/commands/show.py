"""`foldd status` and `foldd history`."""

from __future__ import annotations

import argparse
from typing import Any

from foldd.daemon.commands.common import add_config, add_json, config_of, print_json
from foldd.daemon.status import history, status


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = commands.add_parser("status", help="how things stand; works without a running daemon")
    add_config(show)
    add_json(show)
    show.set_defaults(call=_status)
    past = commands.add_parser("history", help="every generation: what was folded, how long it took, how it scored")
    add_config(past)
    add_json(past)
    past.set_defaults(call=_history)


def _status(arguments: argparse.Namespace) -> int:
    facts = status(config_of(arguments))
    if arguments.json:
        print_json(facts)
        return 0
    generation = facts["generation"]
    print(f"state        {facts['state']}{_progress(facts['folding'])}")
    print(f"generation   {'none yet' if generation is None else generation}")
    print(f"tasks        {', '.join(facts['tasks']) or '–'}")
    print(f"queue        {facts['queue_depth']} waiting, {facts['quarantined']} in quarantine")
    for held in facts["held"]:
        print(f"held         {held['id']} {held['file']}: {held['what']}")
    for item in facts["set_aside"]:
        print(f"set aside    {item['id']} {item['file']}: {item['code']}. {item['what']}")
    if facts["quarantined"] > len(facts["set_aside"]):
        print("             and more: quarantine/*/reason.json")
    if facts["conflicts"]:
        kept = ", ".join(f"{task} {share:.0%}" for task, share in facts["conflicts"].items())
        print(f"conflicts    of the last fold, decisions that stayed as they were: {kept}")
    if facts["rss_bytes"]:
        print(f"memory       {facts['rss_bytes'] / 1e6:.0f} MB (process {facts['pid']})")
    if facts["last_error"]:
        print(f"last error   {facts['last_error']}")
    print(f"directory    {facts['state_directory']}, {facts['free_bytes'] / 1e6:.0f} MB free")
    return 0


def _progress(folding: dict[str, Any] | None) -> str:
    if not folding:
        return ""
    left = "" if folding["left_seconds"] is None else f", {folding['left_seconds']:.0f} s left"
    return f" {folding['task'] or folding['file']}: {folding['stage']}, {100 * folding['fraction']:.0f} %{left}"


def _history(arguments: argparse.Namespace) -> int:
    rows = history(config_of(arguments))
    if arguments.json:
        print_json(rows)
        return 0
    if not rows:
        print("No generation yet.")
        return 0
    print(f"{'gen':>4}  {'task':<20} {'method':<16} {'seconds':>8} {'peak MB':>8}  {'artifact':<12}  created")
    for row in rows:
        seconds = sum(value for stage, value in row["seconds"].items() if stage != "settle")
        print(
            f"{row['generation']:>4}  {row['task']:<20} {row['method']:<16} {seconds:>8.2f} "
            f"{row['peak_rss_bytes'] / 1e6:>8.0f}  {row['artifact_sha256'][:12]}  {row['created']}"
        )
    return 0
