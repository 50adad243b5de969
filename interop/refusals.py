"""The parts of which the cases of refusals are made."""

from __future__ import annotations

from typing import Any, NamedTuple

Step = tuple[str, dict[str, Any]]


class Case(NamedTuple):
    behaviour: str
    step: Step
    code: int
    text: str
    before: tuple[Step, ...] = ()
    # What RabbitMQ 3.x answers where it differs: (scope, code, text).
    in_3x: tuple[str, int, str] | None = None


# In names and texts, $q, $x and $none stand for a queue, an exchange and something missing.


def queue_declare(**fields: Any) -> Step:
    return "queue.declare", {"queue": "$q", "exclusive": True} | fields


def exchange_declare(**fields: Any) -> Step:
    return "exchange.declare", {"exchange": "$x", "type": "direct"} | fields


def publish(exchange: str = "", routing_key: str = "$none", **more: Any) -> Step:
    return "basic.publish", {"exchange": exchange, "routing_key": routing_key} | more


def consume(**fields: Any) -> Step:
    return "basic.consume", {"queue": "$q"} | fields


QUEUE = queue_declare()
EXCHANGE = exchange_declare()
NO_DEFAULT = "operation not permitted on the default exchange"
NO_PREVIOUS = "no previously declared queue"
NO_QUEUE = "no queue '$none' in vhost '/'"
NO_EXCHANGE = "no exchange '$none' in vhost '/'"


def inequivalent(kind: str, argument: str, rest: str) -> str:
    place = "$q" if kind == "queue" else "$x"
    return f"inequivalent arg '{argument}' for {kind} '{place}' in vhost '/': {rest}"


def invalid(argument: str, rest: str) -> str:
    return f"invalid arg '{argument}' for queue '$q' in vhost '/'{rest}"
