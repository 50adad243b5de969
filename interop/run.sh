#!/bin/sh
# Runs the interoperability suite against the broker at $AMQP_URL
# (default amqp://guest:guest@127.0.0.1:5672/%2f). Arguments go to pytest, for example:
#
#   interop/run.sh -k confirm
#   AMQP_URL=amqp://guest:guest@127.0.0.1:5673/%2f interop/run.sh -n 0 -x
#
# The virtual environment lives outside the checkout; LEVERET_INTEROP_VENV says where.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
venv=${LEVERET_INTEROP_VENV:-$HOME/.cache/leveret-interop-venv}
installed=$venv/installed-requirements.txt

if [ ! -x "$venv/bin/python" ]; then
    mkdir -p "$(dirname -- "$venv")"
    python3 -m venv "$venv"
fi
if ! cmp -s "$here/requirements.txt" "$installed"; then
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$installed"
fi

cd "$here"
export PYTHONDONTWRITEBYTECODE=1
exec "$venv/bin/python" -m pytest -p no:cacheprovider "$@"
