"""Prints what every cell of tests/control_flow.py gives: python -m tests.control_flow_survey ENGINE [SIZE] [words]."""

import collections
import glob
import json
import os
import sys

from tests import processes

engine = sys.argv[1]
size = int(sys.argv[2]) if len(sys.argv) > 2 else 2
only = sys.argv[3] if len(sys.argv) > 3 else ""
legacy = os.environ.get("TF_USE_LEGACY_KERAS", "0")
base = f"/tmp/survey-{engine}" + ("-keras2" if legacy == "1" else "") + os.environ.get("TAG", "")
for f in glob.glob(base + ".*.jsonl"):
    os.remove(f)
cmd = [
    sys.executable,
    "-m",
    "pytest",
    "--color=no",
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    "-W",
    "ignore",
    "tests/parallel/test_control_flow.py",
    "-k",
    "survey",
]


def read():
    ranks = collections.defaultdict(dict)
    started = collections.defaultdict(set)
    for path in glob.glob(base + ".*.jsonl"):
        rank = path.rsplit(".", 2)[1]
        for line in open(path):
            d = json.loads(line)
            c = tuple(d["cell"])
            if "found" in d:
                ranks[c][rank] = d["found"]
            else:
                started[c].add(rank)
    return ranks, started


hangs = {}
n = 1 if engine in ("mirrored", "local") else size
for attempt in range(60):
    found, started = read()
    whole = {c for c, r in found.items() if len(r) == n}
    for c in set(started) - whole:
        hangs[c] = "HANGS or crashes"
    with open(base + ".skip", "w") as f:
        for c in whole | set(hangs):
            f.write(json.dumps({"cell": c}) + "\n")
    env = {
        "SYNCBN_SURVEY": base,
        "SYNCBN_SURVEY_ONLY": only,
        "TF_USE_LEGACY_KERAS": legacy,
        "SYNCBN_TEST_ENGINE": f"mirrored:{size}" if engine == "mirrored" else engine,
        "SYNCBN_TEST_LIMIT": "3000",
    }
    if engine in ("mirrored", "local"):
        cmds = [("one", cmd, {})]
    elif engine == "multiworker":
        cmds = processes.workers(size, *cmd)
    elif engine == "mpi":
        cmds = [("mpirun", processes.mpirun(size, *cmd), {})]
    else:
        cmds = [("horovodrun", processes.horovodrun(size, "gloo", *cmd), {})]
    finished = processes.run(cmds, limit=3000, env=env)
    open(base + ".log", "a").write(finished.output)
    if finished.code == 0:
        break
    print("attempt", attempt, "code", finished.code, flush=True)
    if attempt == 0 and not read()[1]:
        print(finished.output[-3000:])
        break
found, started = read()
rows = {}
for c in sorted(set(started)):
    texts = sorted(set(found[c].values())) if c not in hangs else []
    if c in hangs:
        texts = ["HANGS or crashes; seen: " + "; ".join(f"{r}: {t}" for r, t in found[c].items())]
    rows[c] = " || ".join(texts)
with open(base + ".md", "w") as f:
    for title in sorted({(c[0], c[1]) for c in rows}):
        f.write(f"\n## {engine}, {title[0]}, {title[1]}\n\n")
        names = list(
            dict.fromkeys(json.loads(l)["cell"][3] for l in open(glob.glob(base + ".*.jsonl")[0]))
        )
        kinds = [
            "outputs",
            "gradients",
            "second derivatives",
            "forward mode",
            "jacobian",
            "batch_jacobian",
        ]
        f.write("| construct | " + " | ".join(kinds) + " |\n|" + "---|" * 7 + "\n")
        for name in names:
            cells = [rows.get((*title, k, name), "-") for k in kinds]
            f.write(f"| {name} | " + " | ".join(t[:160].replace("|", "/") for t in cells) + " |\n")
    f.write("\n## The errors in full\n\n")
    counts = collections.defaultdict(list)
    for c, t in rows.items():
        if t != "right":
            counts[t].append("/".join(c))
    for t, cs in sorted(counts.items(), key=lambda p: -len(p[1])):
        f.write(f"- {len(cs)} x `{t}`\n  - {'; '.join(cs[:6])}\n")
    right = sum(t == "right" for t in rows.values())
    f.write(f"\n{right} of {len(rows)} right\n")
    print(base, right, "of", len(rows), "right")
