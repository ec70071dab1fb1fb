"""Sections that the page of every kind of run has: its head, bytes, privacy, events, origin.

Takes plain dicts as they stand in the run's JSON files. It must not know what a run trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fellray.platform.markup import Html, join, list_facts, section, tabulate, tag
from fellray.platform.words import (
    CROSSINGS,
    HEADLINE,
    format_number,
    format_size,
    name_metric,
)

_LISTED = 20  # members of a group that are named


def show_head(
    run: str, facts: Sequence[str], lead: str, tiles: Sequence[tuple[str, float | None]]
) -> Html:
    """The run's name, what it was, its result in words, and its first numbers: (name, value)."""
    return join(
        tag("h1", run),
        tag("p", " · ".join(facts), class_="soft"),
        tag("p", lead, class_="lead"),
        tag(
            "div",
            *(
                tag("div", tag("b", format_number(value)), label, class_="tile")
                for label, value in tiles
                if value is not None
            ),
            class_="tiles",
        ),
    )


def show_traffic(
    summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], words: str = CROSSINGS
) -> Html:
    """Bytes by kind, in all and for one client in one round; `words` say what the kinds are."""
    totals: Mapping[str, int] = summary.get("bytes") or {}
    if not totals:
        return Html()
    # A client that sat a round out, or was refused, has no loss in that round's row.
    turns = sum(len(row.get("losses") or {}) for row in rows)
    kinds = sorted(totals.items(), key=lambda kind: (-kind[1], kind[0]))
    everything = sum(totals.values())
    cells = [
        [
            kind,
            format_size(count),
            f"{count:,}",
            f"{count / everything:.1%}" if everything else "–",
            format_size(count / turns) if turns else "–",
        ]
        for kind, count in [*kinds, ("all", everything)]
    ]
    per = f" A client-round is one client in one round; there were {turns:,}." if turns else ""
    return section(
        "Bytes moved",
        tag("p", f"What the clients sent and received, by kind, from the ledger.{per} {words}"),
        tabulate(["kind", "size", "bytes", "share", "per client-round"], cells),
    )


def show_groups(summary: Mapping[str, Any]) -> Html:
    """Who is in which group and how it fares; which adapters there are, and which are sent."""
    groups = summary.get("groups") or {}
    if not groups:
        return Html()
    per_client = summary.get("per_client") or {}
    rows = []
    for name, members in groups["members"].items():
        tested = [per_client[c] for c in members if HEADLINE in per_client.get(c, {})]
        users = sum(int(row["users"]) for row in tested)
        total = sum(row["users"] * row[HEADLINE] for row in tested)
        listed = ", ".join(members[:_LISTED]) + (" ..." if len(members) > _LISTED else "")
        score = format_number(total / users if users else None)
        label = name.removeprefix("=") or "(none)"
        rows.append([label, str(len(members)), str(users), score, listed])
    levels = [
        [name, f"{level['parameters']:,}", "yes" if level["sent"] else "never"]
        for name, level in groups["levels"].items()
    ]
    words = (
        "Each client has adapters of its own (user), which stay with it, and adapters that are its "
        "group's. Groups that would have been too small are together in `:other`."
    )
    return section(
        "Groups",
        tag("p", words),
        tabulate(["group", "clients", "users tested", name_metric(HEADLINE), "members"], rows),
        tabulate(["adapters", "numbers of a client", "sent"], levels),
    )


def show_privacy(summary: Mapping[str, Any]) -> Html:
    """What noise promises, and what not; nothing where nothing was noised."""
    privacy = summary.get("privacy") or {}
    if privacy.get("mechanism", "none") == "none":
        return Html()
    known = {name: value for name, value in privacy.items() if value not in (None, [])}
    statement = str(known.pop("statement"))
    return section(
        "Differential privacy",
        tag("p", statement[:1].upper() + statement[1:] + "."),
        list_facts({name.replace("_", " "): value for name, value in known.items()}),
    )


def show_events(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Html:
    """Refusals, replays, restarts."""
    events = [
        f"round {row['round']}: {client} refused: {reason}"
        for row in rows
        for client, reason in sorted((row.get("refused") or {}).items())
    ]
    events += [str(event) for event in summary.get("events") or []]
    events = list(dict.fromkeys(events))  # a refusal may stand in both
    if not events:
        return section(
            "What happened", tag("p", "No refused client, replay or restart is recorded.")
        )
    return section("What happened", tag("ul", *(tag("li", event) for event in events)))


def show_provenance(summary: Mapping[str, Any]) -> Html:
    """Data, model and environment, as far as the run names them."""
    parts = {name: summary[name] for name in ("data", "model", "environment") if summary.get(name)}
    if not parts:
        return Html()
    return section(
        "Data, model, environment",
        *(join(tag("h3", name.capitalize()), list_facts(part)) for name, part in parts.items()),
    )
