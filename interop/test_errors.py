"""Every refusal a client can provoke with a well-formed method: code, exact text, who is blamed,
and whether the channel or the whole connection goes."""

from __future__ import annotations

from typing import Any

import pytest

from declaration_refusals import EXCHANGE_CASES, QUEUE_ARGUMENT_CASES, QUEUE_CASES
from helpers import expect_channel_close, expect_connection_close
from raw import content_frames, method_frame
from refusals import (
    NO_EXCHANGE,
    NO_QUEUE,
    QUEUE,
    Case,
    Step,
    consume,
    exchange_declare,
    invalid,
    publish,
)

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
