#!/bin/sh
# Counts the instructions of the hot functions under callgrind and compares them with the recorded ones.
#
#   benches/instructions.sh [--record] [NAME ...]
#   benches/instructions.sh session: "queue: append"
#   benches/instructions.sh --annotate "queue: append, deliver, ack each"
#
# NAMEs choose the functions whose names contain one of them. It fails if a function takes more than 3 % more
# instructions per message than benches/instructions.tsv says. --record writes that file anew, with all functions.
# --annotate lists instead where the instructions of those it runs go, all together.
#
# The figures depend on the compiler and on the C library, not on the machine's speed or on what else it does.
set -eu
cd "$(dirname "$0")/.."
exec python3 - "$@" <<'PYTHON'
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TABLE = pathlib.Path("benches/instructions.tsv")
TOLERANCE = 0.03
HEAD = ("# Instructions per message of the hot functions: what `make instructions` compares with, and\n"
        "# `make instructions RECORD=1` writes. Recorded with {toolchain}.\n")
CALLGRIND = ["valgrind", "--tool=callgrind", "--quiet", "--collect-atstart=no",
             "--toggle-collect=instructions::measured"]
# Totals are right in the file of each call, but what is whose is only known in the one file of all of them.
FILE_EACH = "--dump-after=instructions::measured"


def toolchain():
    rustc = subprocess.run(["rustc", "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    return f"rustc {rustc} on {os.uname().machine}, {os.confstr('CS_GNU_LIBC_VERSION')}"


def run(names, directory, *more):
    """Runs functions under callgrind; answers what the program printed."""
    runner = [*CALLGRIND, *more, f"--callgrind-out-file={directory}/callgrind.out"]
    listed = ", ".join(f"'{part}'" for part in runner)
    command = ["cargo", "--config", f"target.'cfg(all())'.runner = [{listed}]", "bench", "--locked",
               "--bench", "instructions", "--", *names]
    # What the allocator does must not depend on time, nor on the store's threads.
    environment = {**os.environ, "MALLOC_CONF": "narenas:64,dirty_decay_ms:-1,muzzy_decay_ms:-1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def annotate(names):
    with tempfile.TemporaryDirectory() as directory:
        run(names, directory)
        subprocess.run(["callgrind_annotate", "--auto=no", f"{directory}/callgrind.out"], check=True)


def count(names):
    """Instructions per message by function, in the order in which they ran."""
    with tempfile.TemporaryDirectory() as directory:
        output = run(names, directory, FILE_EACH)
        dumps = {number: pathlib.Path(directory, f"callgrind.out.{number}").read_text()
                 for number in range(1, len(output.splitlines()) + 1)}
    counts = {}
    for number, line in enumerate(output.splitlines(), start=1):
        name, messages = line.rsplit("\t", 1)
        total = int(re.search(r"^(?:totals|summary): (\d+)", dumps[number], re.MULTILINE).group(1))
        counts[name] = total / int(messages)
    if not counts or 0 in counts.values():
        sys.exit("nothing was counted: no such function, or callgrind did not find instructions::measured")
    return counts


def recorded():
    """What the table says, and with what it was made."""
    if not TABLE.exists():
        return {}, None
    text = TABLE.read_text()
    made_with = re.search(r"Recorded with (.*)\.\n", text)
    rows = (line.rsplit("\t", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(figure) for name, figure in rows}, made_with and made_with.group(1)


def change(now, before):
    return "new" if before is None else f"{(now / before - 1) * 100:+.1f} %"


def main():
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    flags = set(sys.argv[1:]) - set(names)
    record = "--record" in flags
    if unknown := flags - {"--record", "--annotate"}:
        sys.exit(f"unknown: {', '.join(unknown)}. There are --record, --annotate and names of functions.")
    if record and names:
        sys.exit("--record takes no names: the whole table is written")
    if "--annotate" in flags:
        return annotate(names)
    counts = count(names)
    before, made_with = recorded()
    width = max(map(len, counts))
    print(f"{'function':{width}} | {'instructions per message':>24} | {'recorded':>9} | {'change':>8}")
    for name, now in counts.items():
        was = before.get(name)
        shown = "-" if was is None else f"{was:,.1f}"
        print(f"{name:{width}} | {now:24,.1f} | {shown:>9} | {change(now, was):>8}")
    if record:
        rows = "".join(f"{name}\t{now:.1f}\n" for name, now in counts.items())
        TABLE.write_text(HEAD.format(toolchain=toolchain()) + rows)
        print(f"\nrecorded in {TABLE}")
        return
    if made_with and made_with != toolchain():
        print(f"\nThe record was made with {made_with}; this is {toolchain()}. Compare with a record of the commit "
              "before, made here.")
    known = {name: (now, before[name]) for name, now in counts.items() if name in before}
    more = [name for name, (now, was) in known.items() if now > was * (1 + TOLERANCE)]
    less = [name for name, (now, was) in known.items() if now < was * (1 - TOLERANCE)]
    missing = [name for name in counts if name not in before]
    gone = [] if names else [name for name in before if name not in counts]
    if less or missing or gone:
        print("\nmake instructions RECORD=1 renews the record, which is out of date for:")
        print("\n".join(f"  {name}" for name in less + missing + gone))
    if more:
        print("\nFAILED: more than 3 % more instructions than recorded:", file=sys.stderr)
        print("\n".join(f"  {name}: {change(*known[name])}" for name in more), file=sys.stderr)
        sys.exit(1)


main()
PYTHON
