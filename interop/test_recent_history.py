"""The exchange type x-recent-history: queues that are bound get the last messages that went through before."""

import pytest

from helpers import eventually, require_exchange_type
from raw import Typed

KIND = "x-recent-history"


@pytest.fixture(autouse=True)
def _needs_the_type(raw, server):
    require_exchange_type(raw, server, KIND)


@pytest.fixture
def exchange(client, name):
    def declare(length=None, kind=KIND, **fields):
        exchange = name(kind)
        fields.setdefault("arguments", {} if length is None else {"x-recent-history-length": length})
        client.do(1, "exchange.declare", exchange=exchange, type=kind, **fields)
        return exchange

    return declare


@pytest.fixture
def bound(client, name):
    """Declares a queue and binds it, which is when it gets the history."""

    def declare(exchange, key=""):
        queue = name()
        client.do(1, "queue.declare", queue=queue, exclusive=True)
        client.do(1, "queue.bind", queue=queue, exchange=exchange, routing_key=key)
        return queue

    return declare


def publish(client, exchange, *bodies, properties=None):
    for body in bodies:
        client.publish(1, exchange, f"key of {body.decode()}", body, properties)


def numbers(start, end):
    return [b"%d" % number for number in range(start, end)]


def bodies(client, queue, count):
    """Takes the messages once there are so many, which must be all."""
    found = take(client, queue, count)
    return [message.body for message in found]


def take(client, queue, count):
    found = []

    def take_all():
        while (answer := client.get(1, queue)).name == "basic.get-ok":
            found.append(answer)
        return len(found) >= count

    eventually(take_all)
    assert len(found) == count, [message.body for message in found]
    return found


def test_a_bound_queue_gets_the_history_oldest_first(client, exchange, bound):
    declared = exchange()
    publish(client, declared, *numbers(0, 5))
    queue = bound(declared)
    publish(client, declared, b"new")
    assert bodies(client, queue, 6) == [*numbers(0, 5), b"new"]


def test_twenty_messages_are_kept_by_default(client, exchange, bound):
    declared = exchange()
    publish(client, declared, *numbers(0, 25))
    assert bodies(client, bound(declared), 20) == numbers(5, 25)


@pytest.mark.parametrize("length", [1, 3, 50])
def test_as_many_messages_are_kept_as_the_argument_says(length, client, exchange, bound):
    declared = exchange(length)
    publish(client, declared, *numbers(0, 60))
    assert bodies(client, bound(declared), length) == numbers(60 - length, 60)


def test_every_queue_gets_the_history_and_it_stays(client, exchange, bound):
    declared = exchange(2)
    publish(client, declared, b"a", b"b")
    first, second = bound(declared), bound(declared)
    assert bodies(client, first, 2) == bodies(client, second, 2) == [b"a", b"b"]
    publish(client, declared, b"c")
    assert bodies(client, bound(declared), 2) == [b"b", b"c"]
    assert bodies(client, first, 1) == bodies(client, second, 1) == [b"c"]


def test_messages_come_as_they_were_published(client, exchange, bound):
    declared = exchange()
    properties = {
        "content_type": "text/plain",
        "headers": {"h": 1},
        "delivery_mode": 2,
        "message_id": "id",
        "timestamp": 77,
    }
    publish(client, declared, b"m", properties=properties)
    [message] = take(client, bound(declared), 1)
    assert (message.exchange, message.routing_key) == (declared, "key of m")
    assert not message.redelivered
    assert message.properties == {**properties, "headers": {"h": Typed("I", 1)}}


@pytest.mark.parametrize(
    "value, kept",
    [(True, False), (False, True), ("true", True), (1, True), (None, True)],
    ids=str,
)
def test_header_keeps_a_message_out_of_the_history(value, kept, client, exchange, bound):
    declared = exchange()
    before = bound(declared)
    publish(client, declared, b"m", properties={"headers": {"x-recent-history-no-store": value}})
    publish(client, declared, b"last")
    assert bodies(client, before, 2) == [b"m", b"last"]
    expected = [b"m", b"last"] if kept else [b"last"]
    assert bodies(client, bound(declared), len(expected)) == expected


def test_only_a_new_binding_brings_the_history(client, exchange, bound):
    declared = exchange()
    publish(client, declared, b"m")
    queue = bound(declared)
    assert bodies(client, queue, 1) == [b"m"]
    client.do(1, "queue.bind", queue=queue, exchange=declared)
    publish(client, declared, b"n")
    assert bodies(client, queue, 1) == [b"n"]
    client.do(1, "queue.bind", queue=queue, exchange=declared, routing_key="another")
    assert bodies(client, queue, 2) == [b"m", b"n"]
    client.do(1, "queue.unbind", queue=queue, exchange=declared)
    client.do(1, "queue.bind", queue=queue, exchange=declared)
    assert bodies(client, queue, 2) == [b"m", b"n"]


def test_what_nobody_was_bound_for_is_kept_though_it_is_returned(client, exchange, bound):
    declared = exchange()
    client.publish(1, declared, "k", b"m", mandatory=True)
    assert client.expect("basic.return").reply_code == 312
    assert bodies(client, bound(declared), 1) == [b"m"]


def test_an_exchange_that_is_bound_routes_the_history(client, exchange, bound):
    declared, fanout = exchange(), exchange(kind="fanout")
    publish(client, declared, b"a", b"b", b"c")
    queues = [bound(fanout), bound(fanout)]
    client.do(1, "exchange.bind", source=declared, destination=fanout)
    for queue in queues:
        # RabbitMQ sends the newest first here.
        assert sorted(bodies(client, queue, 3)) == [b"a", b"b", b"c"]


def test_history_that_a_bound_exchange_routes_nowhere_is_no_error(client, server, exchange, bound):
    if server.is_rabbitmq:
        pytest.skip("RabbitMQ closes the connection with 541")
    declared, direct = exchange(), exchange(kind="direct")
    publish(client, declared, b"a", b"b")
    queue = bound(direct, "key of b")
    client.do(1, "exchange.bind", source=declared, destination=direct)
    assert bodies(client, queue, 1) == [b"b"]


def test_messages_from_other_exchanges_are_kept(client, exchange, bound):
    declared, source = exchange(), exchange(kind="fanout")
    client.do(1, "exchange.bind", source=source, destination=declared)
    publish(client, source, b"a", b"b")
    found = take(client, bound(declared), 2)
    assert [(message.exchange, message.body) for message in found] == [(source, b"a"), (source, b"b")]


def test_messages_are_kept_by_an_alternate_exchange(client, exchange, bound):
    declared = exchange()
    source = exchange(kind="direct", arguments={"alternate-exchange": declared})
    publish(client, source, b"m")
    assert bodies(client, bound(declared), 1) == [b"m"]


def test_history_goes_with_the_exchange(client, exchange, bound):
    declared = exchange()
    publish(client, declared, b"m")
    client.do(1, "exchange.delete", exchange=declared)
    client.do(1, "exchange.declare", exchange=declared, type=KIND)
    queue = bound(declared)
    publish(client, declared, b"n")
    assert bodies(client, queue, 1) == [b"n"]


def test_declaring_again_keeps_history_and_length(client, exchange, bound):
    declared = exchange(2)
    publish(client, declared, b"a", b"b", b"c")
    client.do(
        1, "exchange.declare", exchange=declared, type=KIND, arguments={"x-recent-history-length": 9}
    )
    publish(client, declared, b"d")
    assert bodies(client, bound(declared), 2) == [b"c", b"d"]


def test_bcc_is_not_in_the_history(client, exchange, bound):
    declared = exchange()
    publish(client, declared, b"m", properties={"headers": {"CC": ["c"], "BCC": ["b"]}})
    [message] = take(client, bound(declared), 1)
    assert set(message.properties["headers"]) == {"CC"}


def test_confirms_do_not_wait_for_the_history(client, exchange, bound):
    declared = exchange(5)
    client.do(1, "confirm.select")
    publish(client, declared, *numbers(0, 10), properties={"delivery_mode": 2})
    acked = 0
    while acked < 10:
        acked = client.expect("basic.ack").delivery_tag
    assert bodies(client, bound(declared), 5) == numbers(5, 10)


def test_history_is_delivered_to_a_consumer_that_waits(client, exchange, name):
    declared, queue = exchange(), name()
    publish(client, declared, b"a", b"b")
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.do(1, "basic.consume", queue=queue, no_ack=True)
    client.send_method(1, "queue.bind", queue=queue, exchange=declared)
    received = [client.read() for _ in range(3)]
    assert sorted(method.name for method in received) == ["basic.deliver", "basic.deliver", "queue.bind-ok"]
    assert [method.body for method in received if method.body] == [b"a", b"b"]
