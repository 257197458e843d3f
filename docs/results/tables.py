"""The tables of docs/results.md, printed from the figures that lie beside this file.

    python docs/results/tables.py                       every table
    python docs/results/tables.py digits-15             one of them
    python docs/results/tables.py --by-guidance digits-15       against random at each guidance
    python docs/results/tables.py --add digits-15 runs/digits/report/report.json \\
        --title "Digits, SiT-T/2, 800 steps" --command "SEEDS=... bash run_all.sh"

A file NAME.json holds what report.py wrote: of every run the figures of all its seeds, each under
every judge, at every guidance. Intervals are made anew from those (models/effects.py).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from common import answers  # noqa: E402

# What a table compares: the key of the figures, and its heading.
COMPARED = {"fd": "FD, guidance 1", "best_fd": "FD, best guidance", "area": "early FD",
            "worst_three": "worst three classes"}
KEPT = ("seed", "kept", "steps", "epochs", "n", "worst_three_n", "memo", "memo_alike",
        "best_guidance", "judged", "by_guidance")
TIMES = ("seconds", "preparation")
WORST_N = 400            # samples a class, from which on the FD of the worst classes is shown


# ------------------------------------------------------------------------------------ one setting
def add(name, file, title, command, rivals, timed):
    """Write NAME.json: the rows of a report, rounded. timed: with their seconds."""
    kept = KEPT + TIMES if timed else KEPT
    made = json.loads(Path(file).read_text(encoding="utf-8"))
    rows = {run: rounded({key: row[key] for key in kept if key in row})
            for run, row in made["rows"].items()}
    text = json.dumps({"title": title, "command": command, "judge": made["judge"],
                       "rivals": dict(pair.split(":") for pair in rivals), "rows": rows})
    (HERE / f"{name}.json").write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")


def rounded(value):
    """The same with five digits a figure."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def rivals_of(run, setting):
    """Whom a run is compared with: those that were named, else random images; not with itself.

    The full run is compared with the first random row, which is what there is to gain.
    """
    rows = setting["rows"]
    named = setting["rivals"].get(run)
    found = named.split() if named else [answers.rival_of(rows, run)]
    if run == answers.FULL and found == [None]:
        found = [next((name for name in rows if answers.family(name) in answers.RANDOM), None)]
    return [rival for rival in found if rival not in (None, run)]


def compared(rows, run, rival, key):
    """'-24 % ± 18 %, better' of a run against its rival, with the report's own five outcomes."""
    e = answers.effect(rows, run, rival, run, rival, key=key)
    if e is None:
        return "-"
    if run == answers.FULL:
        e.headroom = None                # it is what there is to gain, and has no other above it
    said = answers.OUTCOMES[e.outcome].removesuffix(" in this setting")
    return f"{e.size}, {'**better**' if e.outcome == 'lower' else said}"


# ------------------------------------------------------------------------------------- the tables
def lines_of(setting):
    """One setting as the lines of a page: title, command, figures, differences."""
    rows = setting["rows"]
    first = next(iter(rows.values()))
    seeds = len(first["seed"])
    judges = len(first["judged"]["fd"][0])
    lines = [f"### {setting['title']}", "", f"`{setting['command']}`", "",
             f"{seeds} seeds, {setting['judge']} x {judges}, {first['n'][0]:,} samples a run; mean "
             "± standard deviation over seeds, ± in per cent half a 95 % interval.", ""]
    lines += table([figures_of(run, row) for run, row in rows.items()])
    pairs = [{"run": run, "against": rival, **differences(rows, run, rival)}
             for run in rows for rival in rivals_of(run, setting)]
    if pairs:
        lines += ["", *table(pairs)]
    return [*lines, ""]


def figures_of(run, row):
    by_seed = {key: np.mean(values, 1) for key, values in row["judged"].items()}
    best = answers.cell(list(by_seed.get("best_fd", [])), "{:.2f}")
    if "best_guidance" in row:
        chosen = [f"{cfg:g}" for cfg in row["best_guidance"]]
        if answers.best_is_strongest(row):
            chosen.append("the strongest")
        best += f" ({', '.join(chosen)})"
    cells = {"run": run, "images": f"{row['kept'][0]:,}", "FD, guidance 1": by_seed["fd"]}
    figures = {**cells, "best guidance": best, "of the images": by_seed.get("fd_subset", []),
               "early FD": by_seed.get("area", []), "recall": by_seed.get("recall", []),
               "copied": row.get("memo", []), "look-alikes": row.get("memo_alike", [])}
    figures["worst three classes"] = by_seed["worst_three"] if shows_classes(row) else []
    cells = {name: value if isinstance(value, str) else answers.cell(list(value), "{:.2f}")
             for name, value in figures.items()}
    for key, heading in zip(TIMES, ("train s", "prepare s")):
        cells[heading] = answers.cell(row.get(key, []), "{:.0f}")
    return cells


def shows_classes(row):
    """Whether enough samples of every class were judged alone."""
    counts = row.get("worst_three_n", [None])
    return "worst_three" in row["judged"] and (counts[0] or 0) >= WORST_N


def differences(rows, run, rival):
    return {heading: compared(rows, run, rival, key)
            if key != "worst_three" or shows_classes(rows[run]) else "-"
            for key, heading in COMPARED.items()}


def by_guidance(setting):
    """The differences where both runs take the same guidance, which is each run's own elsewhere."""
    rows = setting["rows"]
    if not all("by_guidance" in row for row in rows.values()):
        return [f"### {setting['title']}: its figures say nothing of single guidances", ""]
    found = []
    for run in rows:
        for rival in rivals_of(run, setting):
            cells = {"run": run, "against": rival}
            for cfg in rows[run]["by_guidance"]:
                # An effect reads the FD of a row; here that of one guidance.
                at_one = {name: {**rows[name], "judged": {"fd": rows[name]["by_guidance"][cfg]}}
                          for name in {run, rival, answers.FULL} & set(rows)}
                cells[f"FD, guidance {cfg}"] = compared(at_one, run, rival, "fd")
            found.append(cells)
    return [f"### {setting['title']}: at the same guidance", "", *table(found), ""]


def table(rows):
    """Rows of one set of columns as a table in Markdown, without columns that are empty."""
    columns = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows]


def gate(settings):
    """Which settings can answer: what there is to gain, and what three seeds would show of it."""
    rows = []
    for name, setting in settings.items():
        made = setting["rows"]
        for run in made:
            if answers.FULL not in made or answers.family(run) not in answers.RANDOM:
                continue
            cells = {"setting": name, "run": run, "images": f"{made[run]['kept'][0]:,}"}
            for key, heading in COMPARED.items():
                if key == "worst_three":
                    continue
                e = answers.effect(made, answers.FULL, run, answers.FULL, run, key=key)
                cells[heading] = "-"
                if e is not None and e.half is not None:
                    opens = -e.change >= 2 * e.half
                    cells[heading] = f"{e.size}{', **open**' if opens else ''}"
            rows.append(cells)
    return ["### The power gate: the full run against random images", "", *table(rows), ""]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", help="settings to print; default: all, and the power gate")
    p.add_argument("--by-guidance", action="store_true",
                   help="the differences at each guidance instead")
    p.add_argument("--add", nargs=2, metavar=("NAME", "REPORT.json"), help="keep a setting")
    p.add_argument("--title", default="", help="with --add: heading of its table")
    p.add_argument("--command", default="", help="with --add: the command that makes it")
    p.add_argument("--rivals", nargs="*", default=[], metavar="RUN:RIVALS",
                   help="with --add: whom runs are compared with, if not with random images of "
                        "their number (several: in quotes)")
    p.add_argument("--timed", action="store_true",
                   help="with --add: keep the seconds too; nothing else ran beside it")
    args = p.parse_args(argv)
    if args.add:
        return add(*args.add, args.title, args.command, args.rivals, args.timed)
    files = sorted(HERE.glob("*.json"))
    settings = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    unknown = set(args.names) - set(settings)
    if unknown:
        p.error(f"{', '.join(sorted(unknown))}: there is {', '.join(settings)}")
    if not args.names and not args.by_guidance:
        print("\n".join(gate(settings)))
    for name in args.names or settings:
        printed = by_guidance if args.by_guidance else lines_of
        print("\n".join(printed(settings[name])))


if __name__ == "__main__":
    main()
