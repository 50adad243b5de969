#!/bin/sh
# Runs the same loads against several brokers, interleaved, and prints a Markdown table of medians.
#
#   benches/side_by_side.sh [-n RUNS] [-t SECONDS] [-a OPTIONS] NAME=URI,PID ...
#   benches/side_by_side.sh -n 3 -t 5 leveret=amqp://127.0.0.1:5672,4711 rabbitmq=amqp://127.0.0.1:5673,815
#
# OPTIONS are added to every call of leveret perf, as in -a '--batch 1' (one message per write, like a client
# that does not gather: brokers then spend most of their time in system calls).
# It starts no broker. PID is the broker's process on this machine (for RabbitMQ that of beam.smp).
# LEVERET_BIN names the binary with the load generator (default: target/release/leveret, next to this folder).
# A cell is "rate/s; broker CPU per message"; "-" where a broker cannot run the shape; "!" where messages were
# missing or unconfirmed. The reason is on standard error.
set -eu
LEVERET_BIN=${LEVERET_BIN:-$(dirname "$0")/../target/release/leveret}
export LEVERET_BIN
exec python3 - "$@" <<'PYTHON'
import argparse
import json
import os
import statistics
import subprocess
import sys

SHAPES = [
    ("16 B, auto-ack", "-s 16"),
    ("1 KiB, auto-ack", "-s 1024"),
    ("16 KiB, auto-ack", "-s 16384"),
    ("16 B, ack each", "-s 16 --ack-batch 1"),
    ("128 B persistent, confirm window 1,000, ack batch 100", "-s 128 --persistent --confirm 1000 --ack-batch 100"),
    ("128 B persistent, confirm window 1, ack batch 100", "-s 128 --persistent --confirm 1 --ack-batch 100"),
    ("16 B, publish only", "-s 16 -y 0"),
]


def broker(text):
    name, equals, rest = text.partition("=")
    uri, comma, pid = rest.rpartition(",")
    if not (name and equals and uri and comma and pid.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=URI,PID")
    return name, uri, pid


def options():
    parser = argparse.ArgumentParser(prog="side_by_side.sh")
    parser.add_argument("-n", "--runs", type=int, default=3)
    parser.add_argument("-t", "--seconds", type=float, default=5)
    parser.add_argument("-a", "--add", default="", help="more options for leveret perf")
    parser.add_argument("brokers", nargs="+", type=broker, metavar="NAME=URI,PID")
    return parser.parse_args()


def measure(uri, pid, shape_index, shape, wanted):
    """Rate, CPU per message in microseconds, and whether something went missing; None if it cannot be run."""
    command = [os.environ["LEVERET_BIN"], "perf", "--uri", uri, "--pid", pid, "--time", str(wanted.seconds),
               "--queue", f"side-by-side-{shape_index}", "--json", *shape.split(), *wanted.add.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=wanted.seconds + 240)
    except subprocess.TimeoutExpired:
        print(f"  {' '.join(command)}: no end", file=sys.stderr)
        return None
    if done.returncode != 0 or not done.stdout:
        print(f"  {' '.join(command)}: {done.stderr.strip()}", file=sys.stderr)
        return None
    report = json.loads(done.stdout)
    flow = report["delivered"] if report["shape"]["consumers"] else report["published"]
    confirms = report["confirms"]
    if confirms and not confirms["acked"]:
        print(f"  {uri}: {shape}: no confirm ever came", file=sys.stderr)
        return None
    lacking = bool(report["missing"] or report["wrong_size"] or (confirms and confirms["outstanding"]))
    if lacking:
        print(f"  {uri}: {shape}: {json.dumps(report)}", file=sys.stderr)
    cpu = (report["broker"] or {}).get("cpu_us_per_message")
    return flow["per_second"], cpu, lacking


def cell(results):
    good = [result for result in results if result]
    if not good or len(good) < len(results):
        return "-"
    rate = statistics.median(result[0] for result in good)
    costs = [result[1] for result in good if result[1] is not None]
    cost = f"{statistics.median(costs):.3g} µs" if costs else "?"
    return f"{rate:,.0f}; {cost}" + (" !" if any(result[2] for result in good) else "")


def main():
    wanted = options()
    results = {(name, index): [] for name, _, _ in wanted.brokers for index in range(len(SHAPES))}
    for run in range(wanted.runs):
        for index, (title, shape) in enumerate(SHAPES):
            for name, uri, pid in wanted.brokers:
                cells = results[name, index]
                if None in cells:
                    continue  # what failed once would only cost time again
                cells.append(measure(uri, pid, index, shape, wanted))
                print(f"run {run + 1}, {title}: {name} {cell(cells[-1:])}", file=sys.stderr)
    print("| shape (median of %d x %g s: rate/s; broker CPU per message) | %s |"
          % (wanted.runs, wanted.seconds, " | ".join(name for name, _, _ in wanted.brokers)))
    print("|---" * (len(wanted.brokers) + 1) + "|")
    for index, (title, _) in enumerate(SHAPES):
        print("| %s | %s |" % (title, " | ".join(cell(results[name, index]) for name, _, _ in wanted.brokers)))


main()
PYTHON
