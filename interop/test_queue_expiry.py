"""x-expires: queues that go by themselves when nobody has used them for a while."""

import time

import pika.exceptions
import pytest

from helpers import (
    consume,
    drain,
    eventually,
    exchange_exists,
    expect_channel_close,
    get,
    get_one,
    never,
    publish,
    queue_exists,
    takes_at_least,
)

# Quorum queues look at the clock only every few seconds.
PATIENCE = 30


class Witness:
    """Tells whether a queue exists without using it: an exchange goes with its last binding."""

    def __init__(self, connection, exchange, queue):
        self.connection = connection
        self.exchange = exchange
        self.queue = queue

    def queue_exists(self):
        return exchange_exists(self.connection, self.exchange)

    def wait_until_gone(self):
        eventually(lambda: not self.queue_exists(), within=PATIENCE)
        # Its binding goes first, the queue itself a moment later.
        eventually(lambda: not queue_exists(self.connection, self.queue))


def unroutable(channel, queue):
    """Publishing tells whether a queue is there and is no use of it either."""
    try:
        channel.basic_publish("", queue, b"", mandatory=True)
    except pika.exceptions.UnroutableError:
        return True
    except pika.exceptions.NackError:
        # RabbitMQ could not hand it to a queue that is just going.
        return False
    return False


@pytest.fixture
def watched(connection, channel, name, declare):
    """Declares a queue with arguments; returns its name and its witness."""

    def declare_watched(**arguments):
        exchange = name("witness")
        channel.exchange_declare(exchange, auto_delete=True)
        queue = declare(**arguments)
        channel.queue_bind(queue, exchange)
        return queue, Witness(connection, exchange, queue)

    return declare_watched


def test_queue_nobody_uses_goes(queue_type, watched):
    with takes_at_least(500):
        _, witness = watched(queue_type=queue_type, expires=500)
        witness.wait_until_gone()


def test_queue_nobody_uses_goes_with_its_messages(queue_type, channel, watched):
    queue, witness = watched(queue_type=queue_type, expires=500)
    publish(channel, queue, "1", "2", delivery_mode=2)
    witness.wait_until_gone()
    channel.queue_declare(queue, durable=True)
    assert drain(channel, queue) == []


def test_exclusive_queue_goes_before_its_connection(channel, name):
    queue = name()
    with takes_at_least(500):
        channel.queue_declare(queue, exclusive=True, arguments={"x-expires": 500})
        channel.confirm_delivery()
        eventually(lambda: unroutable(channel, queue), within=PATIENCE)


def test_auto_delete_queue_goes_though_it_never_had_a_consumer(channel, name):
    queue = name()
    channel.queue_declare(queue, auto_delete=True, arguments={"x-expires": 500})
    channel.confirm_delivery()
    eventually(lambda: unroutable(channel, queue), within=PATIENCE)


def test_shortest_time_is_a_millisecond(channel, declare):
    queue = declare(expires=1)
    channel.confirm_delivery()
    eventually(lambda: unroutable(channel, queue), within=PATIENCE)


def test_longest_time_does_not_overflow(queue_type, watched):
    _, witness = watched(queue_type=queue_type, expires=315360000000)
    never(lambda: not witness.queue_exists(), during=0.5)


# ---- What counts as use


def test_get_keeps_the_queue(queue_type, channel, watched):
    queue, witness = watched(queue_type=queue_type, expires=1000)
    publish(channel, queue, "1")
    time.sleep(0.5)
    with takes_at_least(1000):
        get_one(channel, queue, auto_ack=True)
        witness.wait_until_gone()


def test_get_from_an_empty_queue_keeps_it(queue_type, channel, watched):
    queue, witness = watched(queue_type=queue_type, expires=1000)
    time.sleep(0.5)
    with takes_at_least(1000):
        assert get(channel, queue) is None
        witness.wait_until_gone()


@pytest.mark.parametrize("passive", [False, True], ids=["active", "passive"])
def test_declaring_again_keeps_a_classic_queue(passive, channel, watched):
    queue, witness = watched(expires=1000)
    time.sleep(0.5)
    with takes_at_least(1000):
        channel.queue_declare(queue, durable=True, passive=passive, arguments={"x-expires": 1000})
        witness.wait_until_gone()


def test_using_the_queue_again_and_again_keeps_it(queue_type, channel, watched):
    queue, witness = watched(queue_type=queue_type, expires=2000)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        get(channel, queue)
        time.sleep(0.1)
    assert witness.queue_exists()


# ---- What does not


def test_publishing_does_not_keep_the_queue(queue_type, channel, declare, server):
    if server.is_3x and queue_type == "quorum":
        pytest.skip("RabbitMQ 3.x may crash when a quorum queue goes while it is published to")
    queue = declare(queue_type=queue_type, expires=500)
    channel.confirm_delivery()
    eventually(lambda: unroutable(channel, queue), within=PATIENCE)


@pytest.mark.parametrize(
    "method, fields",
    [
        ("queue.purge", {}),
        ("queue.bind", {"exchange": "amq.direct", "routing_key": "interop"}),
        ("queue.unbind", {"exchange": "amq.direct", "routing_key": "interop"}),
    ],
    ids=["purge", "bind", "unbind"],
)
def test_other_methods_do_not_keep_the_queue(method, fields, client, watched):
    queue, witness = watched(expires=500)

    def gone():
        answer = client.call(1, method, queue=queue, **fields)
        if answer.name == "channel.close":
            client.send_method(1, "channel.close-ok")
            client.open_channel(1)
        return not witness.queue_exists()

    eventually(gone, within=PATIENCE)


@pytest.mark.parametrize("passive", [False, True], ids=["active", "passive"])
def test_declaring_again_does_not_keep_a_quorum_queue(passive, client, watched):
    queue, witness = watched(queue_type="quorum", expires=500)
    arguments = {"x-queue-type": "quorum", "x-expires": 500}

    def gone():
        if witness.queue_exists():
            client.call(1, "queue.declare", queue=queue, durable=True, passive=passive, arguments=arguments)
        return not witness.queue_exists()

    eventually(gone, within=PATIENCE)


def test_declaring_again_without_an_answer_does_not_keep_the_queue(client, watched):
    queue, witness = watched(expires=500)
    deadline = time.monotonic() + PATIENCE
    while witness.queue_exists():
        assert time.monotonic() < deadline
        client.send_method(1, "queue.declare", queue=queue, passive=True, nowait=True)
        time.sleep(0.05)
    client.send_method(1, "queue.declare", queue=queue, passive=True, nowait=True)
    expect_channel_close(client, 404, f"no queue '{queue}' in vhost '/'", "queue.declare")


def test_unacknowledged_messages_do_not_keep_a_classic_queue(channel, watched):
    queue, witness = watched(expires=500)
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    witness.wait_until_gone()
    channel.basic_ack(message.tag)
    channel.basic_qos()


def test_unacknowledged_message_of_a_get_keeps_a_quorum_queue(channel, watched):
    queue, witness = watched(queue_type="quorum", expires=500)
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    never(lambda: not witness.queue_exists(), during=8)
    channel.basic_ack(message.tag)
    witness.wait_until_gone()


# ---- Consumers


def test_consumer_keeps_the_queue_and_its_leaving_starts_the_time(queue_type, connection, channel, watched):
    queue, witness = watched(queue_type=queue_type, expires=500)
    deliveries = consume(connection, channel, queue)
    never(lambda: not witness.queue_exists(), during=8 if queue_type == "quorum" else 2)
    with takes_at_least(500):
        channel.basic_cancel(deliveries.consumer_tag)
        witness.wait_until_gone()


@pytest.mark.parametrize("leave", ["channel", "connection"])
def test_time_starts_when_the_consumer_is_lost(leave, queue_type, connect, watched):
    queue, witness = watched(queue_type=queue_type, expires=500)
    connection = connect()
    channel = connection.channel()
    consume(connection, channel, queue)
    time.sleep(1)
    with takes_at_least(500):
        (channel if leave == "channel" else connection).close()
        witness.wait_until_gone()


def test_one_of_several_consumers_is_enough(connection, channel, watched):
    queue, witness = watched(expires=500)
    first, second = (consume(connection, channel, queue) for _ in range(2))
    channel.basic_cancel(first.consumer_tag)
    never(lambda: not witness.queue_exists(), during=1.5)
    channel.basic_cancel(second.consumer_tag)
    witness.wait_until_gone()


def test_consumer_without_room_keeps_the_queue(connection, channel, watched):
    queue, witness = watched(expires=500)
    channel.basic_qos(prefetch_count=1)
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, "1", "2")
    deliveries.wait_for(1)
    never(lambda: not witness.queue_exists(), during=1.5)


# ---- The end


def test_messages_of_an_expired_queue_are_not_dead_lettered(
    queue_type, channel, connection, watched, declare
):
    dead = declare("dead")
    queue, witness = watched(
        queue_type=queue_type, expires=500, dead_letter_exchange="", dead_letter_routing_key=dead
    )
    publish(channel, queue, "ready", "held")
    if queue_type == "classic":
        get_one(channel, queue)
    witness.wait_until_gone()
    channel.close()
    never(lambda: get(connection.channel(), dead))


def test_queue_expires_before_its_messages(channel, watched, declare):
    dead = declare("dead")
    queue, witness = watched(
        expires=500, message_ttl=1500, dead_letter_exchange="", dead_letter_routing_key=dead
    )
    publish(channel, queue, "1")
    witness.wait_until_gone()
    never(lambda: get(channel, dead), during=2)


def test_messages_expire_before_their_queue(channel, watched, declare):
    dead = declare("dead")
    queue, witness = watched(
        expires=1000, message_ttl=100, dead_letter_exchange="", dead_letter_routing_key=dead
    )
    publish(channel, queue, "1")
    assert get_one(channel, dead).body == b"1"
    witness.wait_until_gone()


def test_expired_queue_can_be_declared_anew_and_expires_anew(channel, watched):
    queue, witness = watched(expires=500)
    witness.wait_until_gone()
    with takes_at_least(500):
        channel.queue_declare(queue, durable=True, arguments={"x-expires": 500})
        channel.confirm_delivery()
        eventually(lambda: unroutable(channel, queue), within=PATIENCE)


def test_method_on_an_expired_queue_finds_none(client, watched):
    queue, witness = watched(expires=500)
    witness.wait_until_gone()
    for method in ("basic.get", "basic.consume", "queue.purge"):
        client.send_method(1, method, queue=queue)
        expect_channel_close(client, 404, f"no queue '{queue}' in vhost '/'", method)
