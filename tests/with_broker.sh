#!/usr/bin/env bash
# Runs a command against a broker of its own: a free loopback port, an empty data directory, both gone afterwards.
#
#   tests/with_broker.sh interop/run.sh
#
# The command sees AMQP_URL, LEVERET_PORT, LEVERET_PID and LEVERET_BIN. Its exit code is passed on, unless the broker died
# meanwhile or did not stop cleanly: that is a failure, too. LEVERET_BIN chooses the program, LEVERET_ARGS adds flags.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi

bin=${LEVERET_BIN:-${CARGO_TARGET_DIR:-$HOME/.cache/leveret-target}/release/leveret}
if [ ! -x "$bin" ]; then
    echo "with_broker: no program at $bin; run 'make build' first" >&2
    exit 2
fi
unset LEVERET_CONFIG # a developer's own file has no place in a test
work=$(mktemp -d "${TMPDIR:-/tmp}/leveret-test.XXXXXX")
log=$work/broker.log
pid=

# Ends the broker, if there is one; fails if it does not go by itself with exit code 0.
stop_broker() {
    [ -n "$pid" ] || return 0
    local stopped=$pid
    pid=
    kill -TERM "$stopped" 2>/dev/null || true
    for _ in $(seq 100); do
        kill -0 "$stopped" 2>/dev/null || break
        sleep 0.1
    done
    if kill -KILL "$stopped" 2>/dev/null; then
        wait "$stopped" 2>/dev/null || true
        echo "with_broker: the broker did not stop within 10 s" >&2
        return 1
    fi
    local code=0
    wait "$stopped" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "with_broker: the broker ended with exit code $code" >&2
        return 1
    fi
}

clean_up() {
    stop_broker || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

listening() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Ports below the range that outgoing connections take theirs from.
for _ in $(seq 20); do
    port=$((20000 + RANDOM % 12000))
    if listening "$port"; then continue; fi
    # shellcheck disable=SC2086  # LEVERET_ARGS is a list of words
    "$bin" --bind 127.0.0.1 --port "$port" --data-dir "$work/data" ${LEVERET_ARGS:-} >"$log" 2>&1 &
    pid=$!
    for _ in $(seq 300); do
        if ! kill -0 "$pid" 2>/dev/null; then break; fi
        if "$bin" ping --port "$port" --timeout 1 >/dev/null 2>&1; then break 2; fi
        sleep 0.1
    done
    stop_broker 2>/dev/null || true
    if ! grep -qi 'address already in use\|address in use' "$log"; then break; fi
done
if [ -z "$pid" ] || ! kill -0 "$pid" 2>/dev/null; then
    echo "with_broker: the broker did not start:" >&2
    cat "$log" >&2
    exit 1
fi

code=0
AMQP_URL="amqp://guest:guest@127.0.0.1:$port/%2F" LEVERET_PORT=$port LEVERET_PID=$pid LEVERET_BIN=$bin "$@" || code=$?
if ! kill -0 "$pid" 2>/dev/null; then
    echo "with_broker: the broker died while the command ran" >&2
    if [ "$code" -eq 0 ]; then code=1; fi
fi
if ! stop_broker && [ "$code" -eq 0 ]; then code=1; fi
if [ "$code" -ne 0 ]; then
    echo "with_broker: the broker's last log lines:" >&2
    tail -n "${LEVERET_LOG_LINES:-40}" "$log" >&2
fi
exit "$code"
