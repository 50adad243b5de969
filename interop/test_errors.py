"""Every refusal a client can provoke with a well-formed method: code, exact text, who is blamed,
and whether the channel or the whole connection goes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from helpers import expect_channel_close, expect_connection_close
from raw import Typed, content_frames, method_frame

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


EXCHANGE_CASES = [
    Case(
        "declaring an unknown exchange type",
        exchange_declare(type="no-such-type"),
        406,
        "unknown exchange type 'no-such-type'",
        in_3x=("connection", 503, "unknown exchange type 'no-such-type'"),
    ),
    Case(
        "declaring the default exchange with an unknown type",
        exchange_declare(exchange="", type="no-such-type"),
        406,
        "unknown exchange type 'no-such-type'",
        in_3x=("connection", 503, "unknown exchange type 'no-such-type'"),
    ),
    Case("declaring the default exchange", exchange_declare(exchange=""), 403, NO_DEFAULT),
    Case(
        "passively declaring the default exchange",
        exchange_declare(exchange="", passive=True),
        403,
        NO_DEFAULT,
    ),
    Case(
        "declaring a reserved exchange name",
        exchange_declare(exchange="amq.interop"),
        403,
        "exchange name 'amq.interop' contains reserved prefix 'amq.*'",
    ),
    Case(
        "passively declaring a missing exchange",
        exchange_declare(exchange="$none", passive=True),
        404,
        NO_EXCHANGE,
    ),
    Case(
        "redeclaring an exchange with another type",
        exchange_declare(type="fanout"),
        406,
        inequivalent("exchange", "type", "received 'fanout' but current is 'direct'"),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an exchange with another durability",
        exchange_declare(durable=True),
        406,
        inequivalent("exchange", "durable", "received 'true' but current is 'false'"),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an exchange as auto-delete",
        exchange_declare(auto_delete=True),
        406,
        inequivalent("exchange", "auto_delete", "received 'true' but current is 'false'"),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an internal exchange as not internal",
        exchange_declare(),
        406,
        inequivalent("exchange", "internal", "received 'false' but current is 'true'"),
        (exchange_declare(internal=True),),
    ),
    Case(
        "redeclaring an exchange with an alternate exchange it had not",
        exchange_declare(arguments={"alternate-exchange": "other"}),
        406,
        inequivalent(
            "exchange",
            "alternate-exchange",
            "received the value 'other' of type 'longstr' but current is none",
        ),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an exchange without the alternate exchange it has",
        exchange_declare(),
        406,
        inequivalent(
            "exchange",
            "alternate-exchange",
            "received none but current is the value 'other' of type 'longstr'",
        ),
        (exchange_declare(arguments={"alternate-exchange": "other"}),),
    ),
    Case(
        "redeclaring an exchange with another alternate exchange",
        exchange_declare(arguments={"alternate-exchange": "third"}),
        406,
        inequivalent("exchange", "alternate-exchange", "received 'third' but current is 'other'"),
        (exchange_declare(arguments={"alternate-exchange": "other"}),),
    ),
    Case(
        "redeclaring a predeclared exchange as transient",
        exchange_declare(exchange="amq.topic", type="topic"),
        406,
        "inequivalent arg 'durable' for exchange 'amq.topic' in vhost '/':"
        " received 'false' but current is 'true'",
    ),
    Case(
        "declaring an alternate exchange that is no string",
        exchange_declare(arguments={"alternate-exchange": 5}),
        406,
        "invalid type 'signedint' for arg 'alternate-exchange' in exchange '$x' in vhost '/'",
    ),
    Case(
        "deleting a predeclared exchange",
        ("exchange.delete", {"exchange": "amq.direct"}),
        403,
        "deletion of system exchange 'amq.direct' in vhost '/' not allowed",
    ),
    Case(
        "deleting a reserved name that does not exist",
        ("exchange.delete", {"exchange": "amq.interop"}),
        403,
        "deletion of system exchange 'amq.interop' in vhost '/' not allowed",
    ),
    Case("deleting the default exchange", ("exchange.delete", {"exchange": ""}), 403, NO_DEFAULT),
    Case(
        "deleting an exchange in use if unused",
        ("exchange.delete", {"exchange": "$x", "if_unused": True}),
        406,
        "exchange '$x' in vhost '/' in use",
        (EXCHANGE, QUEUE, ("queue.bind", {"queue": "$q", "exchange": "$x"})),
    ),
    Case(
        "binding an exchange to the default exchange",
        ("exchange.bind", {"destination": "amq.direct", "source": ""}),
        403,
        NO_DEFAULT,
    ),
    Case(
        "binding the default exchange to an exchange",
        ("exchange.bind", {"destination": "", "source": "amq.direct"}),
        403,
        NO_DEFAULT,
    ),
    Case(
        "unbinding the default exchange",
        ("exchange.unbind", {"destination": "", "source": "amq.direct"}),
        403,
        NO_DEFAULT,
    ),
    Case(
        "binding an exchange to a missing source",
        ("exchange.bind", {"destination": "amq.direct", "source": "$none"}),
        404,
        NO_EXCHANGE,
    ),
    Case(
        "binding a missing exchange",
        ("exchange.bind", {"destination": "$none", "source": "amq.direct"}),
        404,
        NO_EXCHANGE,
    ),
]

QUEUE_CASES = [
    Case(
        "declaring a reserved queue name",
        queue_declare(queue="amq.interop"),
        403,
        "queue name 'amq.interop' contains reserved prefix 'amq.*'",
    ),
    Case("passively declaring a missing queue", queue_declare(queue="$none", passive=True), 404, NO_QUEUE),
    Case(
        "passively declaring the empty queue name",
        queue_declare(queue="", passive=True),
        404,
        "no queue '' in vhost '/'",
        (QUEUE,),
    ),
    Case(
        "redeclaring an exclusive queue as not exclusive",
        queue_declare(exclusive=False),
        405,
        "cannot obtain exclusive access to locked queue '$q' in vhost '/'. It could be originally"
        " declared on another connection or the exclusive property value does not match that of the"
        " original declaration.",
        (QUEUE,),
    ),
    Case(
        "redeclaring a shared queue as exclusive",
        queue_declare(exclusive=True, durable=True),
        405,
        "cannot obtain exclusive access to locked queue '$q' in vhost '/'. It could be originally"
        " declared on another connection or the exclusive property value does not match that of the"
        " original declaration.",
        (queue_declare(exclusive=False, durable=True),),
    ),
    Case(
        "redeclaring a durable queue as transient",
        queue_declare(exclusive=False, durable=False),
        406,
        inequivalent("queue", "durable", "received 'false' but current is 'true'"),
        (queue_declare(exclusive=False, durable=True),),
    ),
    Case(
        "redeclaring a transient queue as durable",
        queue_declare(exclusive=False, durable=True),
        406,
        inequivalent("queue", "durable", "received 'true' but current is 'false'"),
        (queue_declare(exclusive=False, durable=False),),
    ),
    Case(
        "redeclaring a queue as auto-delete",
        queue_declare(auto_delete=True),
        406,
        inequivalent("queue", "auto_delete", "received 'true' but current is 'false'"),
        (QUEUE,),
    ),
    Case(
        "redeclaring a queue with an argument it had not",
        queue_declare(arguments={"x-message-ttl": 60000}),
        406,
        inequivalent(
            "queue", "x-message-ttl", "received the value '60000' of type 'signedint' but current is none"
        ),
        (QUEUE,),
    ),
    Case(
        "redeclaring a queue with a 64-bit argument it had not",
        queue_declare(arguments={"x-message-ttl": Typed("l", 60000)}),
        406,
        inequivalent(
            "queue", "x-message-ttl", "received the value '60000' of type 'long' but current is none"
        ),
        (QUEUE,),
    ),
    Case(
        "redeclaring a queue without an argument it has",
        queue_declare(),
        406,
        inequivalent("queue", "x-message-ttl", "received none but current is the value '100' of type 'byte'"),
        (queue_declare(arguments={"x-message-ttl": Typed("b", 100)}),),
    ),
    Case(
        "redeclaring a queue with another argument value",
        queue_declare(arguments={"x-message-ttl": 1000}),
        406,
        inequivalent("queue", "x-message-ttl", "received '1000' but current is '5000'"),
        (queue_declare(arguments={"x-message-ttl": 5000}),),
    ),
    Case(
        "redeclaring a queue with another dead letter exchange",
        queue_declare(arguments={"x-dead-letter-exchange": "b"}),
        406,
        inequivalent("queue", "x-dead-letter-exchange", "received 'b' but current is 'a'"),
        (queue_declare(arguments={"x-dead-letter-exchange": "a"}),),
    ),
    Case(
        "binding with no queue declared before", ("queue.bind", {"exchange": "amq.direct"}), 404, NO_PREVIOUS
    ),
    Case(
        "unbinding with no queue declared before",
        ("queue.unbind", {"exchange": "amq.direct"}),
        404,
        NO_PREVIOUS,
    ),
    Case("purging with no queue declared before", ("queue.purge", {}), 404, NO_PREVIOUS),
    Case("deleting with no queue declared before", ("queue.delete", {}), 404, NO_PREVIOUS),
    Case("getting with no queue declared before", ("basic.get", {}), 404, NO_PREVIOUS),
    Case("consuming with no queue declared before", ("basic.consume", {}), 404, NO_PREVIOUS),
    Case(
        "binding a missing queue", ("queue.bind", {"queue": "$none", "exchange": "amq.direct"}), 404, NO_QUEUE
    ),
    Case(
        "binding to a missing exchange",
        ("queue.bind", {"queue": "$q", "exchange": "$none"}),
        404,
        NO_EXCHANGE,
        (QUEUE,),
    ),
    Case(
        "binding a missing queue to a missing exchange",
        ("queue.bind", {"queue": "missing", "exchange": "$none"}),
        404,
        NO_EXCHANGE,
    ),
    Case(
        "binding a queue to the default exchange",
        ("queue.bind", {"queue": "$q", "exchange": "", "routing_key": "other"}),
        403,
        NO_DEFAULT,
        (QUEUE,),
    ),
    Case(
        "unbinding a queue from the default exchange",
        ("queue.unbind", {"queue": "$q", "exchange": "", "routing_key": "$q"}),
        403,
        NO_DEFAULT,
        (QUEUE,),
    ),
    Case(
        "binding to a headers exchange with an unknown x-match",
        ("queue.bind", {"queue": "$q", "exchange": "amq.headers", "arguments": {"x-match": "some"}}),
        406,
        'Invalid x-match field value <<"some">>; expected all, any, all-with-x, or any-with-x',
        (QUEUE,),
    ),
    Case(
        "binding to a headers exchange with an x-match that is no string",
        ("queue.bind", {"queue": "$q", "exchange": "amq.match", "arguments": {"x-match": 5}}),
        406,
        "Invalid x-match field type signedint (value 5); expected longstr",
        (QUEUE,),
    ),
    Case("purging a missing queue", ("queue.purge", {"queue": "$none"}), 404, NO_QUEUE),
    Case(
        "deleting a queue with messages if empty",
        ("queue.delete", {"queue": "$q", "if_empty": True}),
        406,
        "queue '$q' in vhost '/' not empty",
        (QUEUE, publish(routing_key="$q")),
    ),
    Case(
        "deleting a queue with consumers if unused",
        ("queue.delete", {"queue": "$q", "if_unused": True}),
        406,
        "queue '$q' in vhost '/' in use",
        (QUEUE, consume()),
    ),
]

QUEUE_ARGUMENT_CASES = [
    Case(
        f"declaring {argument} as {value!r}",
        queue_declare(arguments={argument: value}),
        406,
        invalid(argument, rest),
    )
    for argument, value, rest in [
        ("x-message-ttl", "a", ': "expected integer, got longstr"'),
        ("x-message-ttl", True, ': "expected integer, got bool"'),
        ("x-message-ttl", 1.5, ': "expected integer, got double"'),
        ("x-message-ttl", -1, ": {value_negative,-1}"),
        ("x-message-ttl", 315360000001, ": {value_too_large,315360000001}"),
        ("x-expires", "a", ': "expected integer, got longstr"'),
        ("x-expires", 0, ": {value_zero,0}"),
        ("x-expires", -1, ": {value_negative,-1}"),
        ("x-max-length", "a", ': "expected integer, got longstr"'),
        ("x-max-length", -1, ": {value_negative,-1}"),
        ("x-max-length-bytes", -1, ": {value_negative,-1}"),
        ("x-max-priority", "a", ': "expected integer, got longstr"'),
        ("x-max-priority", -1, ": {value_negative,-1}"),
        ("x-max-priority", 256, ": {max_value_exceeded,256}"),
        ("x-overflow", "spill", ": invalid_overflow"),
        ("x-overflow", 1, ": {unacceptable_type,signedint}"),
        ("x-dead-letter-routing-key", "a", ": routing_key_but_no_dlx_defined"),
        ("x-single-active-consumer", "a", ": {unacceptable_type,longstr}"),
        ("x-queue-type", "pile", ": \"unsupported queue type 'pile'\""),
        ("x-queue-type", 5, ": {unacceptable_type,signedint}"),
        ("x-queue-version", 3, ": \"unsupported queue version '3'\""),
        ("x-max-age", "1h", " of queue type rabbit_classic_queue"),
        ("x-delivery-limit", 1, " of queue type rabbit_classic_queue"),
    ]
] + [
    Case(
        "declaring a dead letter routing key that is no string",
        queue_declare(arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": 5}),
        406,
        invalid("x-dead-letter-routing-key", ": {unacceptable_type,signedint}"),
    ),
    Case(
        "declaring a dead letter exchange that is no string",
        queue_declare(arguments={"x-dead-letter-exchange": 5}),
        406,
        "invalid type 'signedint' for arg 'x-dead-letter-exchange' in queue '$q' in vhost '/'",
    ),
]

PUBLISH_CASES = (
    [
        Case("publishing to a missing exchange", publish("$none"), 404, NO_EXCHANGE),
        Case(
            "publishing to an internal exchange",
            publish("$x"),
            403,
            "cannot publish to internal exchange '$x' in vhost '/'",
            (exchange_declare(internal=True),),
        ),
        Case(
            "publishing to the predeclared internal exchange",
            publish("amq.rabbitmq.trace"),
            403,
            "cannot publish to internal exchange 'amq.rabbitmq.trace' in vhost '/'",
        ),
        Case(
            "publishing to a missing exchange with a bad expiration",
            publish("$none", properties={"expiration": "soon"}),
            404,
            NO_EXCHANGE,
        ),
        Case(
            "publishing to an internal exchange with a bad expiration",
            publish("amq.rabbitmq.trace", properties={"expiration": "soon"}),
            403,
            "cannot publish to internal exchange 'amq.rabbitmq.trace' in vhost '/'",
        ),
        Case(
            "publishing with a bad expiration and a request for direct reply",
            publish(properties={"expiration": "soon", "reply_to": "amq.rabbitmq.reply-to"}),
            406,
            "fast reply consumer does not exist",
        ),
        Case(
            "publishing with a bad CC header and a bad expiration",
            publish(properties={"expiration": "soon", "headers": {"CC": "one"}}),
            406,
            "invalid expiration 'soon': no_integer",
        ),
        Case(
            "publishing under another user's name with a bad CC header",
            publish(properties={"user_id": "somebody", "headers": {"CC": "one"}}),
            406,
            'invalid message: {unacceptable_type_in_header,"CC",longstr}',
            in_3x=("channel", 406, "user_id property set to 'somebody' but authenticated user was 'guest'"),
        ),
        Case(
            "publishing under another user's name",
            publish(properties={"user_id": "somebody"}),
            406,
            "user_id property set to 'somebody' but authenticated user was 'guest'",
        ),
        Case(
            "publishing a request for direct reply without a reply consumer",
            publish(properties={"reply_to": "amq.rabbitmq.reply-to"}),
            406,
            "fast reply consumer does not exist",
        ),
    ]
    + [
        Case(
            f"publishing with the expiration {expiration!r}",
            publish(properties={"expiration": expiration}),
            406,
            f"invalid expiration '{expiration}': {reason}",
        )
        for expiration, reason in [
            ("", "no_integer"),
            ("soon", "no_integer"),
            (" 5", "no_integer"),
            ("5ms", '{leftover_string,"ms"}'),
            ("1.5", '{leftover_string,".5"}'),
            ("-1", "{value_negative,-1}"),
            ("315360000001", "{value_too_large,315360000001}"),
        ]
    ]
    + [
        Case(
            f"publishing with the header {header} as {kind}",
            publish(properties={"headers": {header: value}}),
            406,
            f'invalid message: {{unacceptable_type_in_header,"{header}",{kind}}}',
        )
        for header, value, kind in [
            ("CC", "one", "longstr"),
            ("CC", 5, "signedint"),
            ("CC", None, "void"),
            ("BCC", "one", "longstr"),
            ("BCC", {}, "table"),
            ("BCC", True, "bool"),
        ]
    ]
)

CONSUME_CASES = [
    Case("consuming from a missing queue", consume(queue="$none"), 404, NO_QUEUE),
    Case("getting from a missing queue", ("basic.get", {"queue": "$none"}), 404, NO_QUEUE),
    Case(
        "consuming exclusively from a queue with a consumer",
        consume(exclusive=True),
        403,
        "queue '$q' in vhost '/' in exclusive use",
        (QUEUE, consume()),
    ),
    Case(
        "consuming from a queue with an exclusive consumer",
        consume(),
        403,
        "queue '$q' in vhost '/' in exclusive use",
        (QUEUE, consume(exclusive=True)),
    ),
    Case(
        "consuming with a stream offset from a classic queue",
        consume(arguments={"x-stream-offset": 1}),
        406,
        invalid("x-stream-offset", " of queue type rabbit_classic_queue"),
        (QUEUE,),
    ),
    Case(
        "consuming direct replies with acknowledgements",
        consume(queue="amq.rabbitmq.reply-to"),
        406,
        "reply consumer cannot acknowledge",
    ),
    Case(
        "consuming direct replies twice on a channel",
        consume(queue="amq.rabbitmq.reply-to", no_ack=True),
        406,
        "reply consumer already set",
        (consume(queue="amq.rabbitmq.reply-to", no_ack=True),),
    ),
] + [
    Case(
        f"consuming with the priority {value!r}",
        consume(arguments={"x-priority": value}),
        406,
        invalid("x-priority", f': "expected integer, got {kind}"'),
        (QUEUE,),
    )
    for value, kind in [("high", "longstr"), (1.5, "double"), (True, "bool"), (None, "void")]
]

SETTLE_CASES = (
    [
        Case(
            f"{method.split('.')[1]} of an unknown delivery tag",
            (method, {"delivery_tag": 9}),
            406,
            "unknown delivery tag 9",
        )
        for method in ("basic.ack", "basic.nack", "basic.reject")
    ]
    + [
        Case(
            f"{method.split('.')[1]} of the delivery tag 0 alone", (method, {}), 406, "unknown delivery tag 0"
        )
        for method in ("basic.ack", "basic.nack", "basic.reject")
    ]
    + [
        Case(
            "acknowledging up to an unknown delivery tag",
            ("basic.ack", {"delivery_tag": 2, "multiple": True}),
            406,
            "unknown delivery tag 2",
            (QUEUE, publish(routing_key="$q"), ("basic.get", {"queue": "$q"})),
        ),
        Case(
            "acknowledging twice",
            ("basic.ack", {"delivery_tag": 1}),
            406,
            "unknown delivery tag 1",
            (
                QUEUE,
                publish(routing_key="$q"),
                ("basic.get", {"queue": "$q"}),
                ("basic.ack", {"delivery_tag": 1}),
            ),
        ),
        Case(
            "acknowledging a delivery that needs none",
            ("basic.ack", {"delivery_tag": 1}),
            406,
            "unknown delivery tag 1",
            (QUEUE, publish(routing_key="$q"), ("basic.get", {"queue": "$q", "no_ack": True})),
        ),
        Case(
            "acknowledging up to a tag that was settled, with others outstanding",
            ("basic.ack", {"delivery_tag": 2, "multiple": True}),
            406,
            "unknown delivery tag 2",
            (
                QUEUE,
                *[publish(routing_key="$q")] * 3,
                *[("basic.get", {"queue": "$q"})] * 3,
                ("basic.ack", {"delivery_tag": 2}),
            ),
        ),
    ]
)

MODE_CASES = [
    Case("committing without a transaction", ("tx.commit", {}), 406, "channel is not transactional"),
    Case("rolling back without a transaction", ("tx.rollback", {}), 406, "channel is not transactional"),
    Case(
        "selecting confirms in a transaction",
        ("confirm.select", {}),
        406,
        "cannot switch from tx to confirm mode",
        (("tx.select", {}),),
    ),
    Case(
        "selecting a transaction with confirms",
        ("tx.select", {}),
        406,
        "cannot switch from confirm to tx mode",
        (("confirm.select", {}),),
    ),
]

CHANNEL_CASES = (
    EXCHANGE_CASES
    + QUEUE_CASES
    + QUEUE_ARGUMENT_CASES
    + PUBLISH_CASES
    + CONSUME_CASES
    + SETTLE_CASES
    + MODE_CASES
)

CONNECTION_CASES = [
    Case("opening a channel twice", ("channel.open", {}), 504, "second 'channel.open' seen"),
    Case("stopping the flow", ("channel.flow", {"active": False}), 540, "active=false"),
    Case("limiting the prefetch by size", ("basic.qos", {"prefetch_size": 7}), 540, "prefetch_size!=0 (7)"),
    Case("publishing immediate", publish(immediate=True), 540, "immediate=true"),
    Case("recovering without requeue", ("basic.recover", {"requeue": False}), 540, "requeue=false"),
    Case(
        "recovering asynchronously without requeue",
        ("basic.recover-async", {"requeue": False}),
        540,
        "requeue=false",
    ),
    Case(
        "reusing a consumer tag",
        consume(consumer_tag="twice"),
        530,
        "attempt to reuse consumer tag 'twice'",
        (QUEUE, consume(consumer_tag="twice")),
    ),
    Case(
        "reusing a consumer tag on a missing queue",
        consume(queue="$none", consumer_tag="twice"),
        530,
        "attempt to reuse consumer tag 'twice'",
        (QUEUE, consume(consumer_tag="twice")),
    ),
] + [
    Case(f"sending {method} on a channel", (method, {}), 503, "unimplemented method")
    for method in (
        "connection.start-ok",
        "connection.tune-ok",
        "connection.open",
        "connection.close",
        "connection.update-secret",
        "channel.open-ok",
        "channel.flow-ok",
        "channel.close-ok",
        "exchange.declare-ok",
        "queue.declare-ok",
        "basic.qos-ok",
        "basic.consume-ok",
        "basic.get-empty",
        "basic.recover-ok",
        "confirm.select-ok",
        "tx.commit-ok",
    )
]


def fill(value: Any, names: dict[str, str]) -> Any:
    """Puts real names in place of $q, $x and $none."""
    if isinstance(value, str):
        for place, real in names.items():
            value = value.replace(place, real)
        return value
    if isinstance(value, dict):
        return {key: fill(item, names) for key, item in value.items()}
    return value


def send(client, step: Step) -> str:
    method, fields = step
    if method == "basic.publish":
        client.publish(1, **fields)
    else:
        client.send_method(1, method, **fields)
    return method


ANSWERED = {"basic.get": "basic.get-ok"}
UNANSWERED = {"basic.publish", "basic.ack"}


def play(client, case: Case, names: dict[str, str]) -> str:
    """Plays a case up to its last step; returns the method to be refused."""
    for step in case.before:
        method = send(client, (step[0], fill(step[1], names)))
        if method not in UNANSWERED:
            client.expect(ANSWERED.get(method, f"{method}-ok"))
    return send(client, (case.step[0], fill(case.step[1], names)))


@pytest.fixture
def names(name) -> dict[str, str]:
    return {"$q": name("queue"), "$x": name("exchange"), "$none": name("none")}


def behaviour(case: Case) -> str:
    return case.behaviour.replace(" ", "_")


@pytest.mark.parametrize("case", CHANNEL_CASES, ids=behaviour)
def test_closes_the_channel_and_leaves_the_connection(case, client, names, server):
    failed = play(client, case, names)
    scope, code, text = case.in_3x if case.in_3x and server.is_3x else ("channel", case.code, case.text)
    expect = expect_channel_close if scope == "channel" else expect_connection_close
    expect(client, code, fill(text, names), failed)


@pytest.mark.parametrize("case", CONNECTION_CASES, ids=behaviour)
def test_closes_the_connection(case, client, names):
    failed = play(client, case, names)
    expect_connection_close(client, case.code, fill(case.text, names), failed)


@pytest.mark.parametrize(
    "method",
    [
        "channel.open",
        "channel.close",
        "exchange.declare",
        "queue.declare",
        "basic.publish",
        "confirm.select",
        "tx.select",
    ],
)
def test_channel_method_on_channel_zero_closes_the_connection(method, client):
    client.send_method(0, method)
    expect_connection_close(client, 504, "unexpected method in connection state running", method)


@pytest.mark.parametrize(
    "method",
    [
        "connection.start-ok",
        "connection.secure-ok",
        "connection.tune-ok",
        "connection.open",
        "connection.close-ok",
    ],
)
def test_handshake_method_on_a_running_connection_closes_it(method, client):
    client.send_method(0, method)
    expect_connection_close(client, 504, "unexpected method in connection state running", method)


@pytest.mark.parametrize(
    "method, fields",
    [
        ("channel.close", {}),
        ("channel.close-ok", {}),
        ("channel.flow", {}),
        ("queue.declare", {}),
        ("basic.ack", {}),
        ("basic.get", {"queue": "some"}),
        ("tx.select", {}),
    ],
)
def test_method_on_a_channel_not_open_closes_the_connection(method, fields, client):
    client.send_method(7, method, **fields)
    expect_connection_close(client, 504, "expected 'channel.open'", method)


@pytest.mark.parametrize("method", ["basic.deliver", "basic.return", "basic.get-ok"])
def test_content_only_a_server_sends_closes_the_connection(method, client):
    client.send(method_frame(1, method) + content_frames(1, b"content"))
    expect_connection_close(client, 503, "unimplemented method", method)


def test_text_longer_than_a_short_string_is_cut_and_ends_in_dots(client):
    queue = "q" * 250
    client.send_method(1, "queue.declare", queue=queue, passive=True)
    received = client.read()
    assert len(received.reply_text) == 255
    assert received.reply_text == f"NOT_FOUND - no queue '{queue}"[:252] + "..."
