"""What outlives the connection that made it. (Nothing here restarts the broker.)"""

import pika
import pytest

from helpers import channel_error, drain, exchange_exists, get_one, publish, queue_exists


@pytest.fixture
def gone(connect):
    """Runs steps on a channel whose connection is closed before the test goes on."""

    def run(steps):
        connection = connect()
        steps(connection.channel())
        connection.close()

    return run


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "transient"])
def test_exchange_outlives_its_connection(durable, gone, connection, name):
    exchange = name("exchange")
    gone(lambda channel: channel.exchange_declare(exchange, "topic", durable=durable))
    assert exchange_exists(connection, exchange)


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "transient"])
def test_queue_outlives_its_connection(durable, gone, connection, name):
    queue = name()
    gone(lambda channel: channel.queue_declare(queue, durable=durable))
    assert queue_exists(connection, queue)


def test_exclusive_queue_does_not_outlive_its_connection_even_if_durable(gone, connection, name):
    queue = name()
    gone(lambda channel: channel.queue_declare(queue, durable=True, exclusive=True))
    assert not queue_exists(connection, queue)


def test_flags_and_arguments_are_remembered(gone, channel, name):
    queue, exchange = name(), name("exchange")
    arguments = {"x-message-ttl": 600_000, "x-dead-letter-exchange": "somewhere"}

    def declare(theirs):
        theirs.queue_declare(queue, durable=True, auto_delete=True, arguments=arguments)
        theirs.exchange_declare(
            exchange, "headers", durable=True, arguments={"alternate-exchange": "amq.fanout"}
        )

    gone(declare)
    channel.queue_declare(queue, durable=True, auto_delete=True, arguments=arguments)
    channel.exchange_declare(
        exchange, "headers", durable=True, arguments={"alternate-exchange": "amq.fanout"}
    )
    text = (
        f"inequivalent arg 'x-message-ttl' for queue '{queue}' in vhost '/':"
        " received '1' but current is '600000'"
    )
    with channel_error(406, text):
        channel.queue_declare(
            queue, durable=True, auto_delete=True, arguments=arguments | {"x-message-ttl": 1}
        )


def test_bindings_outlive_their_connection(gone, channel, name):
    first, second, queue = name("first"), name("second"), name()

    def declare(theirs):
        theirs.exchange_declare(first, "topic", durable=True)
        theirs.exchange_declare(second, "headers", durable=True)
        theirs.queue_declare(queue, durable=True)
        theirs.exchange_bind(second, first, "a.#")
        theirs.queue_bind(queue, second, arguments={"x-match": "any", "h": 1})

    gone(declare)
    for headers in ({"h": 1}, {"h": 2}):
        channel.basic_publish(first, "a.b", str(headers["h"]).encode(), pika.BasicProperties(headers=headers))
    assert drain(channel, queue) == [b"1"]


@pytest.mark.parametrize("mode", [1, 2], ids=["transient", "persistent"])
def test_messages_outlive_the_connection_of_their_publisher(mode, gone, channel, queue):
    def send(theirs):
        theirs.confirm_delivery()
        publish(theirs, queue, "1", "2", "3", delivery_mode=mode)

    gone(send)
    message = get_one(channel, queue)
    assert (message.body, message.redelivered, message.properties.delivery_mode) == (b"1", False, mode)
    assert drain(channel, queue) == [b"2", b"3"]


def test_durable_queue_may_be_bound_to_a_transient_exchange(channel, queue, name):
    exchange = name("exchange")
    channel.exchange_declare(exchange, "fanout", durable=False)
    channel.queue_bind(queue, exchange)
    channel.basic_publish(exchange, "", b"m")
    assert drain(channel, queue) == [b"m"]


def test_deleted_definitions_stay_deleted(gone, connection, name):
    queue, exchange = name(), name("exchange")

    def declare_and_delete(theirs):
        theirs.queue_declare(queue, durable=True)
        theirs.exchange_declare(exchange, durable=True)
        theirs.queue_delete(queue)
        theirs.exchange_delete(exchange)

    gone(declare_and_delete)
    assert not queue_exists(connection, queue)
    assert not exchange_exists(connection, exchange)
