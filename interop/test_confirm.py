"""Publisher confirms: numbering, order against returns, and what gets confirmed when."""

import pytest

from helpers import Confirms, drain, expect_channel_close, get_one
from raw import publish_frames

PERSISTENT = {"delivery_mode": 2}


@pytest.fixture
def confirming(client):
    client.do(1, "confirm.select")
    return client


@pytest.mark.parametrize("properties", [None, PERSISTENT], ids=["transient", "persistent"])
def test_publish_is_confirmed_under_its_number(properties, confirming, queue):
    for number in (1, 2, 3):
        confirming.publish(1, "", queue, b"m", properties)
        ack = confirming.expect("basic.ack")
        assert ack.delivery_tag == number


def test_confirm_comes_only_once_the_message_is_in_the_queue(confirming, queue, raw):
    other = raw(1)
    for number in range(10):
        confirming.publish(1, "", queue, str(number).encode(), PERSISTENT)
        confirming.expect("basic.ack")
        assert other.get(1, queue).body == str(number).encode()


def test_nothing_is_confirmed_unless_asked_for(client, queue):
    client.publish(1, "", queue, b"m", PERSISTENT)
    client.expect_silence(0.3)


def test_numbers_start_with_the_first_publish_after_select(client, queue):
    client.publish(1, "", queue, b"before")
    client.do(1, "confirm.select")
    client.publish(1, "", queue, b"after")
    assert client.expect("basic.ack").delivery_tag == 1


def test_selecting_again_does_not_restart_the_numbers(confirming, queue):
    confirming.publish(1, "", queue, b"1")
    assert confirming.expect("basic.ack").delivery_tag == 1
    confirming.do(1, "confirm.select")
    confirming.publish(1, "", queue, b"2")
    assert confirming.expect("basic.ack").delivery_tag == 2


def test_select_without_answer_takes_effect(client, queue):
    client.send_method(1, "confirm.select", nowait=True)
    client.publish(1, "", queue, b"m")
    assert client.expect("basic.ack").delivery_tag == 1


def test_numbers_are_counted_per_channel(raw, queue):
    client = raw(1, 2)
    for channel in (1, 2):
        client.do(channel, "confirm.select")
    for channel, number in ((1, 1), (1, 2), (2, 1)):
        client.publish(channel, "", queue, b"m")
        ack = client.expect("basic.ack")
        assert (ack.channel, ack.delivery_tag) == (channel, number)


def test_numbers_start_again_on_a_reopened_channel(confirming, queue):
    confirming.publish(1, "", queue, b"m")
    confirming.expect("basic.ack")
    confirming.do(1, "channel.close", reply_code=200)
    confirming.open_channel(1)
    confirming.publish(1, "", queue, b"m")
    confirming.expect_silence(0.2)
    confirming.do(1, "confirm.select")
    confirming.publish(1, "", queue, b"m")
    assert confirming.expect("basic.ack").delivery_tag == 1


@pytest.mark.parametrize("properties", [None, PERSISTENT], ids=["transient", "persistent"])
def test_every_one_of_many_pipelined_publishes_is_confirmed_once(properties, confirming, queue, channel):
    count = 2000
    bodies = [str(number).encode() for number in range(1, count + 1)]
    confirming.send(b"".join(publish_frames(1, "", queue, body, properties) for body in bodies))
    confirms = Confirms(confirming).expect(*range(1, count + 1)).wait()
    assert confirms.acked == set(range(1, count + 1))
    assert drain(channel, queue) == bodies


def test_publishes_to_different_queues_are_all_confirmed(confirming, queue, name):
    transient = name("transient")
    confirming.do(1, "queue.declare", queue=transient)
    for number in range(100):
        target = (queue, transient, name("missing"))[number % 3]
        confirming.publish(1, "", target, b"m", PERSISTENT if number % 2 else None)
    assert not Confirms(confirming).expect(*range(1, 101)).wait().nacked


def test_unroutable_message_is_confirmed(confirming, name):
    confirming.publish(1, "", name("missing"), b"m")
    assert confirming.expect("basic.ack").delivery_tag == 1


def test_returned_message_is_confirmed_after_its_return(confirming, name):
    missing = name("missing")
    for number in (1, 2, 3):
        confirming.publish(1, "", missing, str(number).encode(), mandatory=True)
        assert confirming.expect("basic.return").body == str(number).encode()
        assert confirming.expect("basic.ack").delivery_tag == number


def test_return_precedes_confirm_among_pipelined_publishes(confirming, queue, name):
    missing = name("missing")
    count = 50
    confirming.send(
        b"".join(
            publish_frames(
                1, "", queue if number % 2 else missing, str(number).encode(), PERSISTENT, mandatory=True
            )
            for number in range(1, count + 1)
        )
    )
    confirms, returned = Confirms(confirming).expect(*range(1, count + 1)), []
    while confirms.outstanding:
        received = confirming.read()
        if received.name == "basic.return":
            number = int(received.body)
            assert number in confirms.outstanding, "confirmed before it was returned"
            returned.append(number)
        else:
            confirms.take(received)
    assert returned == list(range(2, count + 1, 2))


def test_message_for_several_queues_is_confirmed_once(confirming, name):
    exchange = name("exchange")
    confirming.do(1, "exchange.declare", exchange=exchange, type="fanout")
    for durable in (True, True, False):
        target = name()
        confirming.do(1, "queue.declare", queue=target, durable=durable)
        confirming.do(1, "queue.bind", queue=target, exchange=exchange)
    confirming.publish(1, exchange, "", b"m", PERSISTENT)
    assert confirming.expect("basic.ack").delivery_tag == 1
    confirming.expect_silence(0.2)


def test_message_consumed_at_once_is_confirmed(raw, queue):
    client = raw(1, 2)
    client.do(2, "basic.consume", queue=queue, no_ack=True)
    client.do(1, "confirm.select")
    client.publish(1, "", queue, b"m", PERSISTENT)
    received = {client.read().name for _ in range(2)}
    assert received == {"basic.ack", "basic.deliver"}


def test_messages_of_a_deleted_queue_are_confirmed(raw, queue):
    client = raw(1, 2)
    client.do(1, "confirm.select")
    client.send(publish_frames(1, "", queue, b"m", PERSISTENT) * 50)
    client.send_method(2, "queue.delete", queue=queue)
    confirms = Confirms(client).expect(*range(1, 51))
    while confirms.outstanding:
        received = client.read()
        if received.name != "queue.delete-ok":
            confirms.take(received)
    assert confirms.acked == set(range(1, 51))


def test_large_message_is_confirmed(confirming, queue, channel):
    body = bytes(5 << 20)
    confirming.publish(1, "", queue, body, PERSISTENT)
    assert confirming.expect("basic.ack").delivery_tag == 1
    assert get_one(channel, queue).body == body


def test_refused_publish_is_not_confirmed(confirming, name):
    missing = name("missing")
    confirming.publish(1, missing, "", b"m")
    expect_channel_close(confirming, 404, f"no exchange '{missing}' in vhost '/'", "basic.publish")


def test_pika_waits_for_each_confirm(channel, queue):
    channel.confirm_delivery()
    for number in range(20):
        channel.basic_publish("", queue, str(number).encode(), mandatory=True)
    assert len(drain(channel, queue)) == 20


def test_acks_of_consumer_and_publisher_on_one_channel_do_not_mix(confirming, queue):
    confirming.do(1, "basic.consume", queue=queue)
    for number in (1, 2, 3):
        confirming.publish(1, "", queue, b"m", PERSISTENT)
        received = {m.name: m for m in (confirming.read(), confirming.read())}
        assert received["basic.deliver"].delivery_tag == number
        assert received["basic.ack"].delivery_tag == number
        confirming.send_method(1, "basic.ack", delivery_tag=number)
    confirming.do(1, "basic.qos")
