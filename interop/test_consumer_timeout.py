"""Quorum queues take messages back from consumers that do not settle them in time."""

import time

import pytest

from helpers import (
    consume,
    expect_channel_close,
    expect_connection_close,
    get,
    get_one,
    publish_confirmed,
)
from raw import FULL_CAPABILITIES, plain

pytestmark = pytest.mark.since("4.3", "consumer timeout of a queue")

# Instants are taken here and by the server, which may round them to milliseconds.
ROUNDING = 0.002
# What RabbitMQ says instead of the timeout it used.
TIMED_OUT = (
    "delivery acknowledgement on channel 1 timed out. Timeout value used: -1 ms."
    " This timeout value can be configured, see consumers doc guide to learn more"
)


def counts(message):
    headers = plain(message.properties.get("headers", {}))
    return headers.get("x-delivery-count"), headers.get("x-acquired-count")


@pytest.fixture
def deaf(raw):
    """A client that does not understand a consumer cancelled by the server, with channels open."""

    def open_client(*channels):
        capabilities = FULL_CAPABILITIES | {"consumer_cancel_notify": False}
        return raw(*channels, start_ok={"client_properties": {"capabilities": capabilities}})

    return open_client


@pytest.fixture(params=["consumer", "queue"])
def timed(request, declare):
    """A queue and arguments for consuming from it, one of which say that the timeout is 1 s."""
    if request.param == "queue":
        return declare("quorum", consumer_timeout=1000), {}
    return declare("quorum"), {"x-consumer-timeout": 1000}


def test_consumer_is_cancelled_and_its_message_returned(timed, client, connection, channel):
    queue, arguments = timed
    client.do(1, "basic.consume", queue=queue, consumer_tag="slow", arguments=arguments)
    start = time.monotonic()
    publish_confirmed(connection, queue, "1")
    client.expect("basic.deliver")
    cancel = client.expect("basic.cancel", within=20)
    assert time.monotonic() - start >= 1 - ROUNDING
    assert (cancel.channel, cancel.args) == (1, {"consumer_tag": "slow", "nowait": True})
    client.do(1, "basic.qos")
    again = get_one(channel, queue)
    assert (again.body, again.redelivered) == (b"1", True)
    headers = again.properties.headers
    assert (headers.get("x-delivery-count"), headers["x-acquired-count"]) == (None, 1)


def test_channel_is_closed_when_the_client_cannot_hear_a_cancel(timed, deaf, connection, channel):
    queue, arguments = timed
    client = deaf(1)
    client.do(1, "basic.consume", queue=queue, arguments=arguments)
    start = time.monotonic()
    publish_confirmed(connection, queue, "1")
    client.expect("basic.deliver")
    closed = client.read(within=20)
    assert time.monotonic() - start >= 1 - ROUNDING
    assert (closed.name, closed.channel, closed.reply_code) == ("channel.close", 1, 406)
    assert closed.reply_text == f"PRECONDITION_FAILED - {TIMED_OUT}"
    client.send_method(1, "channel.close-ok")
    client.open_channel(1)
    assert get_one(channel, queue).body == b"1"


def test_got_message_that_times_out_closes_the_channel(client, connection, channel, declare):
    queue = declare("quorum", consumer_timeout=1000)
    publish_confirmed(connection, queue, "1")
    start = time.monotonic()
    assert client.get(1, queue, no_ack=False).body == b"1"
    closed = client.read(within=20)
    assert time.monotonic() - start >= 1 - ROUNDING
    assert (closed.name, closed.reply_code) == ("channel.close", 406)
    assert closed.reply_text == f"PRECONDITION_FAILED - {TIMED_OUT}"
    client.send_method(1, "channel.close-ok")
    assert get_one(channel, queue).body == b"1"


def test_timeout_of_the_consumer_goes_before_that_of_the_queue(client, connection, channel, declare):
    queue = declare("quorum", consumer_timeout=500)
    client.do(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": 60_000})
    publish_confirmed(connection, queue, "1")
    delivered = client.expect("basic.deliver")
    client.expect_silence(2)
    client.send_method(1, "basic.ack", delivery_tag=delivered.delivery_tag)
    client.do(1, "basic.qos")
    assert get(channel, queue) is None


def test_message_settled_in_time_does_not_time_out(timed, client, connection, channel):
    queue, arguments = timed
    client.do(1, "basic.qos", prefetch_count=1)
    client.do(1, "basic.consume", queue=queue, arguments=arguments)
    publish_confirmed(connection, queue, "1", "2", "3")
    for _ in range(3):
        delivered = client.expect("basic.deliver")
        client.send_method(1, "basic.ack", delivery_tag=delivered.delivery_tag)
    client.expect_silence(1.5)


def test_consumer_without_acknowledgement_never_times_out(timed, client, connection):
    queue, arguments = timed
    client.do(1, "basic.consume", queue=queue, no_ack=True, arguments=arguments)
    publish_confirmed(connection, queue, "1")
    client.expect("basic.deliver")
    client.expect_silence(1.5)


@pytest.mark.parametrize("settle", ["basic.ack", "basic.nack", "basic.reject"])
def test_settling_too_late_does_nothing(settle, client, connection, channel, declare):
    queue = declare("quorum")
    client.do(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": 500})
    publish_confirmed(connection, queue, "1")
    delivered = client.expect("basic.deliver")
    client.expect("basic.cancel", within=20)
    held = get_one(channel, queue)
    client.send_method(1, settle, delivery_tag=delivered.delivery_tag)
    client.do(1, "basic.qos")
    client.expect_silence(0.3)
    channel.basic_reject(held.tag, requeue=True)
    # The consumer is back once it has settled what it had held for too long.
    again = client.expect("basic.deliver")
    assert (again.body, again.redelivered, counts(again)) == (b"1", True, (1, 2))


def test_consumer_gets_nothing_until_it_has_settled_what_timed_out(client, connection, channel, declare):
    queue = declare("quorum")
    publish_confirmed(connection, queue, "1", "2")
    client.do(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": 500})
    tags = [client.expect("basic.deliver").delivery_tag for _ in range(2)]
    client.expect("basic.cancel", within=20)
    assert [get_one(channel, queue, auto_ack=True).body for _ in range(2)] == [b"1", b"2"]
    publish_confirmed(connection, queue, "3")
    client.send_method(1, "basic.ack", delivery_tag=tags[0])
    client.expect_silence(0.3)
    client.send_method(1, "basic.ack", delivery_tag=tags[1])
    assert client.expect("basic.deliver").body == b"3"


def test_tag_of_a_consumer_that_timed_out_is_still_taken(client, connection, declare):
    queue = declare("quorum")
    client.do(1, "basic.consume", queue=queue, consumer_tag="c", arguments={"x-consumer-timeout": 500})
    publish_confirmed(connection, queue, "1")
    client.expect("basic.deliver")
    client.expect("basic.cancel", within=20)
    client.send_method(1, "basic.consume", queue=queue, consumer_tag="c")
    expect_connection_close(client, 530, "attempt to reuse consumer tag 'c'", "basic.consume")


def test_tag_of_a_consumer_that_timed_out_is_free_once_the_client_cancels_it(client, connection, declare):
    queue = declare("quorum")
    client.do(1, "basic.consume", queue=queue, consumer_tag="c", arguments={"x-consumer-timeout": 500})
    publish_confirmed(connection, queue, "1")
    client.expect("basic.deliver")
    client.expect("basic.cancel", within=20)
    client.do(1, "basic.cancel", consumer_tag="c")
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    assert client.expect("basic.deliver").body == b"1"


def test_client_that_confirms_the_cancel_has_cancelled_its_consumer(client, connection, channel, declare):
    queue = declare("quorum")
    client.do(1, "basic.consume", queue=queue, consumer_tag="c", arguments={"x-consumer-timeout": 500})
    publish_confirmed(connection, queue, "1")
    delivered = client.expect("basic.deliver")
    client.expect("basic.cancel", within=20)
    client.send_method(1, "basic.cancel-ok", consumer_tag="c")
    client.send_method(1, "basic.ack", delivery_tag=delivered.delivery_tag)
    client.do(1, "basic.qos")
    publish_confirmed(connection, queue, "2")
    client.expect_silence(0.3)
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    assert [client.expect("basic.deliver").body for _ in range(2)] == [b"1", b"2"]


def test_other_consumer_gets_the_message(client, connection, channel, declare):
    queue = declare("quorum")
    client.do(1, "basic.qos", prefetch_count=1)
    client.do(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": 500})
    publish_confirmed(connection, queue, "1")
    client.expect("basic.deliver")
    other = consume(connection, channel, queue)
    assert other.wait_for(1, within=20).bodies == [b"1"]
    assert other[0].redelivered


def test_single_active_consumer_that_times_out_hands_over(client, connection, channel, declare):
    queue = declare("quorum", single_active_consumer=True)
    client.do(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": 500})
    waiting = consume(connection, channel, queue)
    publish_confirmed(connection, queue, "1")
    client.expect("basic.deliver")
    waiting.wait_for(1, within=20)
    publish_confirmed(connection, queue, "2")
    assert waiting.wait_for(2).bodies == [b"1", b"2"]


@pytest.mark.parametrize(
    "value, rest", [(-1, "{value_negative,-1}"), ("1s", '"expected integer, got longstr"')]
)
def test_invalid_timeout_of_a_consumer_is_refused(value, rest, client, declare):
    queue = declare("quorum")
    client.send_method(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": value})
    text = f"invalid arg 'x-consumer-timeout' for queue '{queue}' in vhost '/': {rest}"
    expect_channel_close(client, 406, text, "basic.consume")


def test_classic_queue_knows_no_consumer_timeout(client, declare):
    queue = declare("classic")
    client.send_method(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": 1000})
    text = f"invalid arg 'x-consumer-timeout' for queue '{queue}' in vhost '/'"
    expect_channel_close(client, 406, f"{text} of queue type rabbit_classic_queue", "basic.consume")
