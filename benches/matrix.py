#!/usr/bin/env python3
"""Measures Leveret beside RabbitMQ and the floor, and writes the figures into README.md and docs/benchmarks.md.

    make bench                                      everything, which takes more than half an hour
    BENCH_QUICK=1 benches/matrix.py                 every step once, shortly; prints the figures and writes no file
    benches/matrix.py --only 'ack each'             arguments go to leveret perf compare
    benches/matrix.py --d other=amqp://127.0.0.1:5673,4711

It starts what it measures, on loopback and free ports and in directories of its own: a Leveret, the floor (leveret perf
floor), and where rabbitmq-server is installed a RabbitMQ node without plugins. All of it is gone afterwards.

  BENCH_RUNS=5        runs of each load against each broker, of which medians are shown
  BENCH_SECONDS=3     seconds of each run
  BENCH_QUEUES=20000  queues that are declared one beside the other
  BENCH_IDLE=5000     connections that do nothing
  BENCH_QUICK=1       one run of half a second, few queues and connections
  BENCH_WRITE=1       write the files even if quick (0: never)
  LEVERET_BIN         the program (default: the release build)
  TMPDIR              where the brokers' data is; a file system in memory makes every sync free
"""

import datetime
import glob
import json
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
START, END = "<!-- bench:start -->", "<!-- bench:end -->"

QUICK = os.environ.get("BENCH_QUICK", "0") not in ("", "0")
RUNS = int(os.environ.get("BENCH_RUNS", "1" if QUICK else "5"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "0.5" if QUICK else "3"))
QUEUES = int(os.environ.get("BENCH_QUEUES", "500" if QUICK else "20000"))
IDLE = int(os.environ.get("BENCH_IDLE", "200" if QUICK else "5000"))
HOLD = 1 if QUICK else 10
WRITE = os.environ.get("BENCH_WRITE", "0" if QUICK else "1") not in ("", "0")

CHURN = [
    ("connections, 1 at a time", "--what connections"),
    ("connections, 8 at a time", "--what connections --connections 8"),
    ("channels", "--what channels"),
    ("transient queues", "--what queues"),
    ("durable queues", "--what queues --durable"),
    ("durable queues, 50 channels", "--what queues --durable --channels 50"),
    ("exchanges", "--what exchanges"),
    ("bindings", "--what bindings"),
    ("consumers", "--what consumers"),
]


class Broker:
    """A process to measure, and how to reach it."""

    def __init__(self, name, port, pid):
        self.name, self.port, self.pid = name, port, pid

    @property
    def uri(self):
        return f"amqp://127.0.0.1:{self.port}"


class Started:
    """What was started, so that exactly that is ended."""

    def __init__(self):
        self.children = []  # (process, pid to ask for its end, or None for its own)

    def start(self, command, log, env=None, **more):
        with open(log, "ab") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, **more}
            process = subprocess.Popen(command, env=env, **options)
        self.children.append([process, None])
        return process

    def ask_instead(self, process, pid):
        for child in self.children:
            if child[0] is process:
                child[1] = pid

    def stop_all(self):
        for process, pid in reversed(self.children):
            if process.poll() is not None:
                continue
            try:
                os.kill(pid or process.pid, signal.SIGTERM)
                process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                kill(pid)
                process.kill()
                process.wait()
        self.children = []


def kill(pid):
    try:
        if pid:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def fail(text):
    sys.exit(f"matrix: {text}")


def say(text):
    print(text, file=sys.stderr, flush=True)


def program():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.expanduser("~/.cache/leveret-target"))
    path = os.environ.get("LEVERET_BIN", os.path.join(target, "release", "leveret"))
    if not os.access(path, os.X_OK):
        fail(f"no program at {path}; run 'make build' first, or name it with LEVERET_BIN")
    return path


def free_port():
    """Below the range that outgoing connections take theirs from."""
    for _ in range(100):
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    fail("no free port was found on 127.0.0.1")


def wait_until_ready(leveret, port, process, log, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        ping = [leveret, "ping", "--port", str(port), "--timeout", "1"]
        if subprocess.run(ping, capture_output=True).returncode == 0:
            return True
        time.sleep(0.2)
    last = "".join(open(log, errors="replace").readlines()[-20:])
    say(f"matrix: no broker on port {port}; the end of its log:\n{last}")
    return False


def start_leveret(started, leveret, work):
    port, log = free_port(), work / "leveret.log"
    env = {name: value for name, value in os.environ.items() if not name.startswith("LEVERET_")}
    command = [leveret, "--bind", "127.0.0.1", "--port", str(port), "--data-dir", str(work / "leveret")]
    process = started.start(command, log, env)
    if not wait_until_ready(leveret, port, process, log, 30):
        fail("Leveret did not start")
    return Broker("leveret", port, process.pid)


def start_floor(started, leveret, work):
    command = [leveret, "perf", "floor", "--listen", "127.0.0.1:0"]
    process = started.start(command, work / "floor.log", stdout=subprocess.PIPE, text=True)
    found = re.search(r":(\d+),", process.stdout.readline())
    if not found:
        fail("the floor did not start")
    return Broker("floor", int(found[1]), process.pid)


def rabbitmq_script():
    """The script itself; Debian's on the PATH changes user and forgets the environment."""
    inner = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    return inner if os.access(inner, os.X_OK) else shutil.which("rabbitmq-server")


def start_rabbitmq(started, leveret, work):
    """A node of its own; None where RabbitMQ is not installed or does not start."""
    script = rabbitmq_script()
    epmd = shutil.which("epmd") or next(iter(glob.glob("/usr/lib/erlang/erts-*/bin/epmd")), None)
    if not script or not epmd:
        say("matrix: RabbitMQ is not installed, so there is nothing to compare with")
        return None
    home = work / "rabbitmq"
    home.mkdir()
    (home / "rabbitmq.conf").write_text("disk_free_limit.absolute = 50MB\nlog.file.level = warning\n")
    (home / "enabled_plugins").write_text("[].\n")
    port, epmd_port = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")}
    env |= {
        "HOME": str(home),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"leveret-bench-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_BASE": str(home),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_PID_FILE": str(home / "pid"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": str(home / "no-such-file"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
    }
    # In the foreground, or the node would start one that stays.
    started.start([epmd, "-port", str(epmd_port), "-address", "127.0.0.1"], work / "epmd.log", env)
    log = work / "rabbitmq.log"
    process = started.start([script], log, env)
    ready = wait_until_ready(leveret, port, process, log, 120)
    pid = descendant(process.pid, "beam.smp")
    started.ask_instead(process, pid)
    return Broker("rabbitmq", port, pid) if ready and pid else None


def descendant(pid, command):
    """The process of that name which comes from `pid`, or is it."""
    parents, names = {}, {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            before, after = open(stat).read().rsplit(")", 1)
        except OSError:
            continue  # gone meanwhile
        number, name = before.split(" (", 1)
        parents[int(number)], names[int(number)] = int(after.split()[1]), name
    for candidate in (number for number, name in names.items() if name == command):
        ancestor = candidate
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor]
        if ancestor == pid:
            return candidate
    return None


def compare(leveret, brokers, extra):
    """The Markdown table, and the command that made it."""
    options = ["--runs", str(RUNS), "--time", f"{SECONDS:g}", *extra, "--markdown"]
    named = [f"--{letter}={broker.name}={broker.uri},{broker.pid}" for letter, broker in zip("abc", brokers)]
    say("\n== messages")
    done = subprocess.run([leveret, "perf", "compare", *named, *options], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        fail("leveret perf compare failed")
    shown = " ".join(f"--{letter} {broker.name}=…" for letter, broker in zip("abc", brokers))
    return done.stdout, f"leveret perf compare {shown} {shlex.join(options[:-1])}"


def measure(leveret, broker, kind, options):
    """The report of one run of a subcommand; None if it failed, which is told."""
    command = [leveret, "perf", kind, "--uri", broker.uri, "--pid", str(broker.pid), "--json", *options.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        say(f"  {broker.name}, {kind} {options}: no end")
        return None
    if done.returncode != 0:
        say(f"  {broker.name}, {kind} {options}: {done.stderr.strip()}")
        return None
    return json.loads(done.stdout)


def medians(leveret, brokers, kind, options, figures):
    """For each broker the median of each figure over all runs; None where a run failed."""
    reports = {broker.name: [] for broker in brokers}
    for _ in range(RUNS):
        for broker in brokers:
            if None not in reports[broker.name]:
                reports[broker.name].append(measure(leveret, broker, kind, options))
    result = []
    for broker in brokers:
        of = reports[broker.name]
        middle = lambda figure: statistics.median(figure(report) for report in of)
        result.append(None if None in of else [middle(figure) for figure in figures])
    return result


def significant(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def latency(us):
    return f"{significant(us)} µs" if us < 1000 else f"{significant(us / 1000)} ms"


def size(count):
    return f"{significant(count / 1024)} KiB" if abs(count) < 1 << 20 else f"{significant(count / (1 << 20))} MiB"


def table(heading, brokers, rows):
    line = lambda cells: "| " + " | ".join(cells) + " |\n"
    head = line([heading, *(broker.name for broker in brokers)]) + "|---" * (len(brokers) + 1) + "|\n"
    return head + "".join(line([title, *(cell or "-" for cell in cells)]) for title, cells in rows)


def churn(leveret, brokers):
    say("\n== churn")
    rows, commands = [], []
    longest = lambda report: max(report[request]["p99_us"] for request in ("make", "undo") if report[request])
    figures = [lambda report: report["per_second"], longest, lambda report: report["broker"]["cpu_us_per_operation"]]
    cell = lambda values: values and f"{values[0]:,.0f}/s; p99 {latency(values[1])}; CPU {significant(values[2])} µs"
    for title, options in CHURN:
        options += f" --time {SECONDS:g}"
        rows.append((title, [cell(values) for values in medians(leveret, brokers, "churn", options, figures)]))
        commands.append(f"leveret perf churn {options}")
        say(f"{title}: {rows[-1][1]}")
    options = f"--what queues --durable --no-delete --count {QUEUES} --channels 50"
    grown = lambda report: report["broker"]["resident_bytes_after"] - report["broker"]["resident_bytes_before"]
    figures.append(lambda report: grown(report) / report["operations"])
    kept = lambda values: values and f"{cell(values)}; {size(values[3])} each"
    declared = [kept(values) for values in medians(leveret, brokers, "churn", options, figures)]
    rows.append((f"{QUEUES:,} durable queues declared, 50 channels", declared))
    commands.append(f"leveret perf churn {options}")
    say(f"{rows[-1][0]}: {rows[-1][1]}")
    heading = f"made and taken away (median of {RUNS}: operations; slower request; broker's CPU per operation)"
    return table(heading, brokers, rows), commands


def idle(leveret, brokers):
    say("\n== idle connections")
    options = f"--connections {IDLE} --hold {HOLD}"
    figures = [
        lambda report: report["opened_per_second"],
        lambda report: report["broker"]["resident_bytes_per_connection"],
        lambda report: report["broker"]["idle_cpu_percent"],
    ]
    found = medians(leveret, brokers, "idle", options, figures)
    rows = [
        ("opened", [values and f"{values[0]:,.0f}/s" for values in found]),
        ("resident memory for each", [values and size(values[1]) for values in found]),
        ("CPU while idle", [values and f"{values[2]:.2f} % of a core" for values in found]),
    ]
    say(str(rows))
    heading = f"{IDLE:,} connections with a channel and a consumer each (median of {RUNS})"
    return table(heading, brokers, rows), [f"leveret perf idle {options}"]


def first_match(pattern, path):
    found = re.search(pattern, path.read_text(errors="replace")) if path.exists() else None
    return found[1].strip('"') if found else "unknown"


def setting(leveret, work, brokers):
    """One paragraph: the machine and the versions; no names of either."""
    memory = int(first_match(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo"))) / (1 << 20)
    system = first_match(r'PRETTY_NAME=(.*)', pathlib.Path("/etc/os-release"))
    version = subprocess.run([leveret, "--version"], capture_output=True, text=True).stdout.split()[-1]
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(work)], capture_output=True, text=True).stdout.strip()
    others = ""
    if any(broker.name == "rabbitmq" for broker in brokers):
        others = f", RabbitMQ {rabbitmq_release(work)} with default settings (its confirms are not synced)"
    quick = " **A quick run, which only shows that everything works.**" if QUICK else ""
    text = (
        f"Made by `make bench` on {datetime.date.today()}, on {os.cpu_count()} cores, {memory:.0f} GiB, {system}, "
        f"data on {kind}; generator and brokers share the cores. Leveret {version} with default settings (its confirms "
        f"are synced){others}, and the floor, which is no broker.{quick}"
    )
    return textwrap.fill(text, width=120) + "\n"


def rabbitmq_release(work):
    """From what the node said when it started."""
    logs = [work / "rabbitmq.log", *(work / "rabbitmq" / "log").glob("*")]
    found = re.search(r"RabbitMQ (\d[\d.]*)", "".join(path.read_text(errors="replace") for path in logs))
    return found[1] if found else "of unknown version"


def put(path, text):
    """Replaces what stands between the markers."""
    page = path.read_text()
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        fail(f"{path.name} has no {START} … {END}")
    path.write_text(f"{before}{START}\n{text}{END}{after}")


def main():
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        print(__doc__.strip())
        return
    leveret = program()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # brokers inherit it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = Started()
    with tempfile.TemporaryDirectory(prefix="leveret-bench.", ignore_cleanup_errors=True) as directory:
        work = pathlib.Path(directory)
        try:
            real = [start_leveret(started, leveret, work), start_rabbitmq(started, leveret, work)]
            real = [broker for broker in real if broker]
            everybody = [*real, start_floor(started, leveret, work)]
            messages, command = compare(leveret, everybody, sys.argv[1:])
            churned, churn_commands = churn(leveret, real)
            idled, idle_commands = idle(leveret, real)
            described = setting(leveret, work, real)
        finally:
            started.stop_all()
    commands = "\n".join([command, *churn_commands, *idle_commands])
    full = f"{described}\n```sh\n{commands}\n```\n\n{messages}\n{churned}\n{idled}"
    print(full)
    if WRITE:
        put(ROOT / "README.md", messages)
        put(ROOT / "docs" / "benchmarks.md", full)
        say("README.md and docs/benchmarks.md have the new figures")


main()
