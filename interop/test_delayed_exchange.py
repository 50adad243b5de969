"""The exchange type x-delayed-message: messages wait as long as their header x-delay says, and are routed then.

RabbitMQ's core does not have the type; what is expected here is what its community plugin does.
"""

import time

import pytest

from helpers import exchange_exists, expect_channel_close, require_exchange_type
from raw import Typed

KIND = "x-delayed-message"
# Clocks that count in milliseconds may be this much early.
EARLY = 0.002


@pytest.fixture(autouse=True)
def _needs_the_type(raw, server):
    require_exchange_type(raw, server, KIND)


@pytest.fixture
def exchange(client, name):
    """Declares an exchange, by default a delayed fanout."""

    def declare(inner="fanout", kind=KIND, arguments=None, **fields):
        exchange = name(inner)
        arguments = {"x-delayed-type": inner, **(arguments or {})} if kind == KIND else arguments or {}
        client.do(1, "exchange.declare", exchange=exchange, type=kind, arguments=arguments, **fields)
        return exchange

    return declare


@pytest.fixture
def consumed(client, name):
    """Declares a queue that is bound and consumed from."""

    def declare(*exchanges, key="", arguments=None, queue_arguments=None):
        queue = name()
        client.do(1, "queue.declare", queue=queue, exclusive=True, arguments=queue_arguments or {})
        for exchange in exchanges:
            client.do(
                1,
                "queue.bind",
                queue=queue,
                exchange=exchange,
                routing_key=key,
                arguments=arguments or {},
            )
        client.do(1, "basic.consume", queue=queue, no_ack=True, consumer_tag=queue)
        return queue

    return declare


def publish(client, exchange, delay, body=b"m", key="", headers=None, **properties):
    """Publishes with a delay in milliseconds, or any other value of the header; tells when."""
    headers = {**(headers or {}), "x-delay": delay}
    started = time.monotonic()
    client.publish(1, exchange, key, body, {"headers": headers, **properties})
    return started


def receive(client, started, delay, body=b"m"):
    """The next delivery: not before `delay` milliseconds are over."""
    delivery = client.expect("basic.deliver", within=delay / 1000 + 20)
    assert time.monotonic() - started >= delay / 1000 - EARLY
    assert delivery.body == body
    return delivery


def receive_at_once(client, body=b"m"):
    """The next delivery, of a message whose delay would be far longer than this waits."""
    delivery = client.expect("basic.deliver", within=10)
    assert delivery.body == body
    return delivery


# ---- Declaring


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({}, "Invalid argument, 'x-delayed-type' must be an existing exchange type"),
        ({"x-delayed-type": 5}, "Invalid argument, 'x-delayed-type' must be an existing exchange type"),
        ({"x-delayed-type": "no-such-type"}, "unknown exchange type 'no-such-type'"),
        ({"x-delayed-type": "Direct"}, "unknown exchange type 'Direct'"),
        ({"x-delayed-type": "queue"}, "invalid exchange type 'queue'"),
        (
            {"x-delayed-type": "x-delayed-message"},
            "Invalid argument, 'x-delayed-message' can't be used for 'x-delayed-type'",
        ),
        (
            {"x-delayed-type": "x-consistent-hash", "hash-property": "nonsense"},
            "Unsupported property: nonsense",
        ),
    ],
    ids=str,
)
def test_bad_delayed_type_is_refused(arguments, text, client, name):
    client.send_method(1, "exchange.declare", exchange=name(), type=KIND, arguments=arguments)
    expect_channel_close(client, 406, text, "exchange.declare")


def test_delayed_type_is_not_compared(client, exchange):
    declared = exchange("topic")
    client.do(1, "exchange.declare", exchange=declared, type=KIND, arguments={"x-delayed-type": "direct"})
    client.do(1, "exchange.declare", exchange=declared, type=KIND)


def test_delayed_exchange_is_none_of_its_inner_type(client, exchange):
    declared = exchange("topic")
    client.send_method(1, "exchange.declare", exchange=declared, type="topic")
    text = (
        f"inequivalent arg 'type' for exchange '{declared}' in vhost '/':"
        " received 'topic' but current is ''x-delayed-message''"
    )
    expect_channel_close(client, 406, text, "exchange.declare")


def test_inner_type_checks_bindings(client, exchange, queue):
    declared = exchange("x-consistent-hash")
    client.send_method(1, "queue.bind", queue=queue, exchange=declared, routing_key="many")
    text = 'The binding key must be an integer: <<"many">>'
    expect_channel_close(client, 406, text, "queue.bind")


# ---- Delays


@pytest.mark.parametrize(
    "header, delay",
    [
        (300, 300),
        (Typed("l", 300), 300),
        (Typed("s", 300), 300),
        (Typed("u", 300), 300),
        (Typed("i", 300), 300),
        (Typed("b", 100), 100),
        (Typed("B", 200), 200),
        ("300", 300),
        (Typed("d", 300.75), 300),
        (Typed("f", 300.75), 300),
    ],
    ids=str,
)
def test_message_waits_and_comes_with_its_delay_negated(header, delay, client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    started = publish(client, declared, header, headers={"other": "kept"}, delivery_mode=2)
    delivery = receive(client, started, delay)
    headers = {key: value.value for key, value in delivery.properties["headers"].items()}
    assert headers == {"other": "kept", "x-delay": -delay}
    assert delivery.properties["delivery_mode"] == 2
    assert (delivery.exchange, delivery.redelivered) == (declared, False)


@pytest.mark.parametrize(
    "header",
    [0, -5000, Typed("l", 4294967296), True, None, Typed("F", {}), "soon", "", Typed("d", 0.5), "-9"],
    ids=str,
)
def test_other_values_are_no_delay(header, client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    publish(client, declared, header)
    receive_at_once(client)


def test_message_without_the_header_is_routed_at_once(client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    client.publish(1, declared, "k", b"none")
    receive_at_once(client, b"none")
    client.publish(1, declared, "k", b"other", {"headers": {"delay": 60000}})
    delivery = receive_at_once(client, b"other")
    assert set(delivery.properties["headers"]) == {"delay"}


@pytest.mark.parametrize("delay", [60_000, Typed("l", 4294967295)], ids=str)
def test_long_delays_last(delay, client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    publish(client, declared, delay)
    client.expect_silence(0.5)
    # Others overtake it.
    started = publish(client, declared, 100, b"short")
    receive(client, started, 100, b"short")


def test_messages_come_in_the_order_of_their_time(client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    started = publish(client, declared, 1200, b"last")
    publish(client, declared, 400, b"first")
    publish(client, declared, 800, b"middle")
    for body, delay in [(b"first", 400), (b"middle", 800), (b"last", 1200)]:
        receive(client, started, delay, body)


def test_messages_of_the_same_delay_keep_their_order(client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    bodies = [b"%d" % number for number in range(100)]
    for body in bodies:
        publish(client, declared, 300, body)
    assert [client.expect("basic.deliver", within=20).body for _ in bodies] == bodies


def test_many_messages_come_once_each(client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    delays = [1 + (number * 7919) % 1000 for number in range(1000)]
    for number, delay in enumerate(delays):
        publish(client, declared, delay, b"%d" % number)
    found = [int(client.expect("basic.deliver", within=30).body) for _ in delays]
    assert sorted(found) == list(range(1000))
    client.expect_silence(0.3)


def test_published_again_a_message_does_not_wait_again(client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    delivery = receive(client, publish(client, declared, 200), 200)
    client.publish(1, declared, "", b"again", delivery.properties)
    again = receive_at_once(client, b"again")
    assert again.properties["headers"]["x-delay"].value == -200


# ---- Routing


@pytest.mark.parametrize(
    "inner, binding, key, other",
    [("direct", "a.b", "a.b", "a.c"), ("topic", "a.*", "a.b", "b.a")],
)
def test_inner_type_routes_by_key(inner, binding, key, other, client, exchange, consumed):
    declared = exchange(inner)
    consumed(declared, key=binding)
    publish(client, declared, 100, b"other", other)
    started = publish(client, declared, 200, b"m", key)
    assert receive(client, started, 200).routing_key == key
    client.publish(1, declared, other, b"other")
    client.publish(1, declared, key, b"at once")
    receive_at_once(client, b"at once")


def test_inner_headers_exchange_routes_by_the_other_headers(client, exchange, consumed):
    declared = exchange("headers")
    # A headers exchange of the plain modes passes over names with x-.
    consumed(declared, arguments={"kind": "a"})
    publish(client, declared, 100, b"b", headers={"kind": "b"})
    started = publish(client, declared, 200, b"a", headers={"kind": "a"})
    receive(client, started, 200, b"a")


def test_inner_consistent_hash_gives_each_message_to_one_queue(client, exchange, consumed):
    declared = exchange("x-consistent-hash")
    queues = [consumed(declared, key="1"), consumed(declared, key="1")]
    for number in range(40):
        publish(client, declared, 100, b"%d" % number, f"key-{number}")
    found = [client.expect("basic.deliver", within=20) for _ in range(40)]
    assert {int(delivery.body) for delivery in found} == set(range(40))
    assert {delivery.consumer_tag for delivery in found} == {*queues}


def test_bindings_count_that_are_there_when_the_delay_ends(client, exchange, consumed):
    declared = exchange()
    gone = consumed(declared)
    started = publish(client, declared, 1500)
    client.do(1, "queue.unbind", queue=gone, exchange=declared)
    late = consumed(declared)
    assert receive(client, started, 1500).consumer_tag == late
    client.expect_silence(0.2)


def test_copies_are_routed_with_the_message(client, exchange, consumed):
    declared = exchange("direct")
    first, second = consumed(declared, key="a"), consumed(declared, key="b")
    started = publish(client, declared, 200, key="a", headers={"CC": ["b"]})
    found = [receive(client, started, 200) for _ in range(2)]
    assert {delivery.consumer_tag for delivery in found} == {first, second}
    assert {delivery.routing_key for delivery in found} == {"a"}


def test_delay_passes_through_bindings_between_exchanges(client, exchange, consumed):
    source, delayed, end = exchange(kind="fanout"), exchange(), exchange(kind="fanout")
    client.do(1, "exchange.bind", source=source, destination=delayed)
    client.do(1, "exchange.bind", source=delayed, destination=end)
    consumed(end)
    started = publish(client, source, 300)
    delivery = receive(client, started, 300)
    assert (delivery.exchange, delivery.properties["headers"]["x-delay"].value) == (source, -300)


def test_what_waits_goes_nowhere_when_its_exchange_is_deleted(client, connection, exchange, consumed):
    declared, other = exchange(), exchange()
    consumed(declared, other)
    publish(client, declared, 200, b"gone")
    client.do(1, "exchange.delete", exchange=declared)
    started = publish(client, other, 400, b"other")
    receive(client, started, 400, b"other")
    assert not exchange_exists(connection, declared)


def test_expiration_begins_when_the_delay_ends(client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    started = publish(client, declared, 300, expiration="100")
    receive(client, started, 300)


# ---- Publishers


def test_mandatory_message_that_waits_is_returned_and_comes_all_the_same(client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    headers = {"x-delay": 300}
    started = time.monotonic()
    client.publish(1, declared, "", b"m", {"headers": headers}, mandatory=True)
    returned = client.expect("basic.return")
    assert (returned.reply_code, returned.reply_text) == (312, "NO_ROUTE")
    assert returned.properties["headers"]["x-delay"].value == 300
    receive(client, started, 300)


def test_mandatory_message_that_does_not_wait_is_returned_only_without_a_queue(client, exchange, consumed):
    declared = exchange("direct")
    consumed(declared, key="k")
    client.publish(1, declared, "k", b"m", mandatory=True)
    receive_at_once(client)
    client.publish(1, declared, "nowhere", b"m", mandatory=True)
    assert client.expect("basic.return").reply_code == 312


@pytest.mark.parametrize("delivery_mode", [1, 2])
def test_confirm_does_not_wait_for_the_delay(delivery_mode, client, exchange, consumed):
    declared = exchange()
    consumed(declared)
    client.do(1, "confirm.select")
    started = publish(client, declared, 1500, delivery_mode=delivery_mode)
    assert client.expect("basic.ack").delivery_tag == 1
    receive(client, started, 1500)


def test_message_of_a_closed_connection_still_comes(client, raw, exchange, consumed):
    declared = exchange()
    consumed(declared)
    publisher = raw(1)
    started = publish(publisher, declared, 700)
    publisher.do(1, "basic.qos")
    publisher.disconnect()
    receive(client, started, 700)


# ---- LavinMQ's form


@pytest.mark.parametrize("kind, key", [("fanout", ""), ("direct", "k"), ("topic", "#")])
def test_argument_makes_an_ordinary_exchange_delayed(kind, key, client, exchange, consumed):
    declared = exchange(kind, kind, {"x-delayed-exchange": True})
    consumed(declared, key=key)
    started = publish(client, declared, 300, key="k")
    receive(client, started, 300)
    client.publish(1, declared, "k", b"at once")
    receive_at_once(client, b"at once")


@pytest.mark.parametrize("value", [False, "true", None], ids=str)
def test_other_values_of_the_argument_do_not(value, client, exchange, consumed):
    declared = exchange("fanout", "fanout", {"x-delayed-exchange": value})
    consumed(declared)
    publish(client, declared, 60_000)
    delivery = receive_at_once(client)
    assert delivery.properties["headers"]["x-delay"].value == 60_000
