"""x-max-length, x-max-length-bytes and x-overflow: what a full queue drops, refuses and confirms."""

import time

import pika.exceptions
import pytest

from helpers import (
    Confirms,
    consume,
    drain,
    eventually,
    expect_channel_close,
    expect_counts,
    get,
    get_one,
    never,
    numbers,
    publish,
)
from raw import publish_frames


@pytest.fixture
def confirming(client):
    client.do(1, "confirm.select")
    return client


@pytest.fixture
def rejecting(declare):
    """Declares a queue that refuses what does not fit."""
    return lambda **arguments: declare(overflow="reject-publish", **arguments)


# ---- drop-head


@pytest.mark.parametrize("overflow", [None, "drop-head"], ids=["default", "drop-head"])
def test_oldest_messages_make_room_for_the_newest(overflow, queue_type, channel, declare):
    arguments = {"overflow": overflow} if overflow else {}
    queue = declare(queue_type=queue_type, max_length=3, **arguments)
    channel.confirm_delivery()
    publish(channel, queue, *numbers(10))
    expect_counts(channel, queue, messages=3, consumers=0)
    assert drain(channel, queue) == [b"8", b"9", b"10"]


def test_large_messages_make_room_by_their_bytes(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, max_length_bytes=10_000)
    channel.confirm_delivery()
    bodies = [number * 4000 for number in numbers(9)]
    publish(channel, queue, *bodies)
    expect_counts(channel, queue, messages=2, consumers=0)
    assert drain(channel, queue) == bodies[-2:]


def test_bytes_of_bodies_are_counted_and_no_others(channel, declare):
    queue = declare(max_length_bytes=100)
    bodies = [number * 25 for number in numbers(6)]
    publish(channel, queue, *bodies, headers={"long": "x" * 1000}, message_id="m" * 200)
    expect_counts(channel, queue, messages=4, consumers=0)
    assert drain(channel, queue) == bodies[-4:]


def test_body_as_large_as_the_limit_fits(channel, declare):
    queue = declare(max_length_bytes=100)
    publish(channel, queue, b"a" * 60, b"b" * 100)
    expect_counts(channel, queue, messages=1, consumers=0)
    assert drain(channel, queue) == [b"b" * 100]


def test_body_larger_than_the_limit_drives_out_everything_and_itself(channel, declare):
    queue = declare(max_length_bytes=100)
    channel.confirm_delivery()
    publish(channel, queue, b"a" * 60, b"b" * 101)
    assert drain(channel, queue) == []
    publish(channel, queue, b"c")
    assert drain(channel, queue) == [b"c"]


def test_empty_bodies_take_no_bytes(channel, declare):
    queue = declare(max_length_bytes=0)
    publish(channel, queue, *[b""] * 5)
    expect_counts(channel, queue, messages=5, consumers=0)


@pytest.mark.parametrize(
    "max_length, max_length_bytes, left", [(2, 1000, 2), (10, 35, 3)], ids=["length", "bytes"]
)
def test_of_both_limits_the_one_reached_first_counts(max_length, max_length_bytes, left, channel, declare):
    queue = declare(max_length=max_length, max_length_bytes=max_length_bytes)
    publish(channel, queue, *[number * 10 for number in numbers(9)])
    expect_counts(channel, queue, messages=left, consumers=0)


def test_unacknowledged_messages_do_not_count(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, max_length=2)
    publish(channel, queue, *numbers(2))
    held = [get_one(channel, queue) for _ in range(2)]
    channel.confirm_delivery()
    publish(channel, queue, *numbers(2, start=3))
    channel.basic_ack(held[-1].tag, multiple=True)
    assert drain(channel, queue) == [b"3", b"4"]


def test_requeued_messages_are_dropped_when_the_queue_has_filled_up(queue_type, channel, declare, server):
    queue = declare(queue_type=queue_type, max_length=2)
    publish(channel, queue, *numbers(2))
    held = [get_one(channel, queue) for _ in range(2)]
    channel.confirm_delivery()
    publish(channel, queue, *numbers(2, start=3))
    channel.basic_nack(held[-1].tag, multiple=True, requeue=True)
    # Quorum queues of RabbitMQ 3.x dropped from behind the returned messages.
    spared = [b"1", b"2"] if server.is_3x and queue_type == "quorum" else [b"3", b"4"]
    assert drain(channel, queue) == spared


def test_message_for_a_ready_consumer_drops_nothing(queue_type, connection, channel, declare):
    queue = declare(queue_type=queue_type, max_length=1)
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, *numbers(20))
    assert sorted(deliveries.wait_for(20).bodies) == sorted(numbers(20))


def test_queue_of_length_zero_passes_messages_to_a_ready_consumer_only(connection, channel, declare):
    queue = declare(max_length=0)
    channel.confirm_delivery()
    publish(channel, queue, *numbers(2))
    assert get(channel, queue) is None
    deliveries = consume(connection, connection.channel(), queue, auto_ack=True)
    publish(channel, queue, *numbers(2, start=3))
    assert deliveries.wait_for(2).bodies == [b"3", b"4"]


@pytest.mark.parametrize("properties", [None, {"delivery_mode": 2}], ids=["transient", "persistent"])
def test_dropped_messages_are_confirmed(properties, queue_type, confirming, channel, declare):
    queue = declare(queue_type=queue_type, max_length=2)
    confirming.send(b"".join(publish_frames(1, "", queue, body, properties) for body in numbers(500)))
    assert not Confirms(confirming).expect(*range(1, 501)).wait().nacked
    expect_counts(channel, queue, messages=2, consumers=0)
    assert drain(channel, queue) == [b"499", b"500"]


def test_dropped_mandatory_message_is_not_returned(confirming, declare):
    queue = declare(max_length=0)
    confirming.publish(1, "", queue, b"1", mandatory=True)
    assert confirming.expect("basic.ack").delivery_tag == 1


def test_transaction_drops_what_exceeds_the_limit_with_commit(connection, channel, declare):
    queue = declare(max_length=2)
    tx = connection.channel()
    tx.tx_select()
    publish(channel, queue, "old")
    publish(tx, queue, *numbers(5))
    tx.basic_qos()
    expect_counts(channel, queue, messages=1, consumers=0)
    tx.tx_commit()
    expect_counts(channel, queue, messages=2, consumers=0)
    assert drain(channel, queue) == [b"4", b"5"]


def test_each_queue_of_a_fanout_keeps_as_much_as_fits(channel, declare, name):
    exchange = name("exchange")
    channel.exchange_declare(exchange, "fanout")
    queues = [declare(max_length=1), declare(max_length=3), declare()]
    for queue in queues:
        channel.queue_bind(queue, exchange)
    for body in numbers(5):
        channel.basic_publish(exchange, "", body)
    for queue, count in zip(queues, (1, 3, 5)):
        expect_counts(channel, queue, messages=count, consumers=0)
        assert drain(channel, queue) == numbers(5)[5 - count :]


# ---- reject-publish


@pytest.mark.parametrize("properties", [None, {"delivery_mode": 2}], ids=["transient", "persistent"])
def test_what_does_not_fit_is_refused(properties, confirming, channel, rejecting):
    queue = rejecting(max_length=3)
    for number in range(1, 6):
        confirming.publish(1, "", queue, str(number).encode(), properties)
        answer = confirming.read()
        assert (answer.name, answer.delivery_tag) == ("basic.ack" if number <= 3 else "basic.nack", number)
    assert drain(channel, queue) == numbers(3)


def test_refusal_has_its_requeue_bit_set_for_no_reason(confirming, rejecting):
    queue = rejecting(max_length=0)
    confirming.publish(1, "", queue, b"1")
    assert confirming.expect("basic.nack").requeue


def test_pipelined_publishes_are_accepted_and_refused_in_order(confirming, channel, rejecting):
    queue = rejecting(max_length=100)
    confirming.send(b"".join(publish_frames(1, "", queue, body) for body in numbers(1000)))
    confirms = Confirms(confirming).expect(*range(1, 1001)).wait()
    assert confirms.acked == set(range(1, 101))
    assert drain(channel, queue) == numbers(100)


def test_pika_raises_for_a_refused_message(channel, rejecting):
    queue = rejecting(max_length=1)
    channel.confirm_delivery()
    publish(channel, queue, "1")
    with pytest.raises(pika.exceptions.NackError):
        publish(channel, queue, "2")


def test_without_confirms_what_does_not_fit_is_dropped_without_a_word(client, channel, rejecting):
    queue = rejecting(max_length=3)
    for body in numbers(10):
        client.publish(1, "", queue, body)
    client.expect_silence(0.2)
    assert drain(channel, queue) == numbers(3)


def test_refusal_is_by_bytes_too(confirming, channel, rejecting):
    queue = rejecting(max_length_bytes=100)
    confirms = Confirms(confirming)
    sizes = [60, 41, 40, 1, 0]
    for number, size in enumerate(sizes, start=1):
        confirming.publish(1, "", queue, bytes(size))
        confirms.expect(number).wait()
    assert confirms.acked == {1, 3, 5}
    assert [len(body) for body in drain(channel, queue)] == [60, 40, 0]


@pytest.mark.parametrize("make_room", ["get", "ack", "purge", "expire"])
def test_messages_are_accepted_again_once_there_is_room(make_room, channel, rejecting):
    queue = rejecting(max_length=1)
    channel.confirm_delivery()
    publish(channel, queue, "1", expiration="500" if make_room == "expire" else None)
    with pytest.raises(pika.exceptions.NackError):
        publish(channel, queue, "2")
    if make_room == "purge":
        channel.queue_purge(queue)
    elif make_room == "expire":
        expect_counts(channel, queue, messages=0, consumers=0)
    else:
        get_one(channel, queue, auto_ack=make_room == "get")
    publish(channel, queue, "3")
    assert drain(channel, queue) == [b"3"]


def test_requeued_messages_are_not_refused(channel, rejecting):
    queue = rejecting(max_length=1)
    channel.confirm_delivery()
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    publish(channel, queue, "2")
    channel.basic_nack(message.tag, requeue=True)
    expect_counts(channel, queue, messages=2, consumers=0)
    with pytest.raises(pika.exceptions.NackError):
        publish(channel, queue, "3")
    assert drain(channel, queue) == [b"1", b"2"]


def test_queue_of_length_zero_refuses_even_with_a_ready_consumer(connection, channel, rejecting):
    queue = rejecting(max_length=0)
    deliveries = consume(connection, connection.channel(), queue, auto_ack=True)
    channel.confirm_delivery()
    with pytest.raises(pika.exceptions.NackError):
        publish(channel, queue, "1")
    deliveries.stay_at(0, during=0.2)


def test_full_queue_with_a_ready_consumer_is_soon_empty(connection, channel, rejecting):
    queue = rejecting(max_length=1)
    channel.confirm_delivery()
    deliveries = consume(connection, connection.channel(), queue, auto_ack=True)
    publish(channel, queue, *numbers(50))
    assert deliveries.wait_for(50).bodies == numbers(50)


def test_refused_mandatory_message_is_not_returned(confirming, rejecting):
    queue = rejecting(max_length=0)
    confirming.publish(1, "", queue, b"1", mandatory=True)
    assert confirming.expect("basic.nack").delivery_tag == 1
    confirming.expect_silence(0.2)


@pytest.mark.parametrize("others", [1, 3])
def test_message_for_several_queues_is_refused_if_one_of_them_refuses(
    others, confirming, channel, rejecting, declare, name
):
    exchange = name("exchange")
    channel.exchange_declare(exchange, "fanout")
    full = rejecting(max_length=0)
    taking = [declare() for _ in range(others)]
    for queue in (full, *taking):
        channel.queue_bind(queue, exchange)
    confirming.publish(1, exchange, "", b"1", {"delivery_mode": 2})
    assert confirming.expect("basic.nack").delivery_tag == 1
    confirming.expect_silence(0.2)
    assert [drain(channel, queue) for queue in taking] == [[b"1"]] * others
    assert drain(channel, full) == []


def test_refused_message_is_not_dead_lettered(channel, rejecting, declare):
    dead = declare("dead")
    queue = rejecting(max_length=0, dead_letter_exchange="", dead_letter_routing_key=dead)
    channel.confirm_delivery()
    with pytest.raises(pika.exceptions.NackError):
        publish(channel, queue, "1")
    never(lambda: get(channel, dead))


def test_commit_fails_if_a_queue_refuses(client, channel, rejecting, declare):
    full, taking = rejecting(max_length=1), declare()
    client.do(1, "tx.select")
    for queue, body in ((full, b"1"), (full, b"2"), (taking, b"3")):
        client.publish(1, "", queue, body)
    client.send_method(1, "tx.commit")
    expect_channel_close(client, 406, "partial tx completion", "tx.commit")
    assert drain(channel, full) == [b"1"]
    assert drain(channel, taking) == [b"3"]


def test_acknowledgements_of_a_failed_commit_still_count(client, channel, rejecting, declare):
    full, source = rejecting(max_length=0), declare()
    publish(channel, source, "1")
    eventually(lambda: channel.queue_declare(source, passive=True).method.message_count == 1)
    client.do(1, "tx.select")
    client.send_method(1, "basic.ack", delivery_tag=client.get(1, source, no_ack=False).delivery_tag)
    client.publish(1, "", full, b"2")
    client.send_method(1, "tx.commit")
    expect_channel_close(client, 406, "partial tx completion", "tx.commit")
    never(lambda: get(channel, source))


def test_rolled_back_message_is_not_refused(client, rejecting):
    queue = rejecting(max_length=0)
    client.do(1, "tx.select")
    client.publish(1, "", queue, b"1")
    client.do(1, "tx.rollback")
    client.do(1, "tx.commit")


def test_full_quorum_queue_refuses_in_the_end_and_accepts_again_when_drained(confirming, channel, rejecting):
    queue = rejecting(queue_type="quorum", max_length=10)
    confirms = Confirms(confirming)
    number = 0

    def published(accepted):
        nonlocal number
        number += 1
        confirming.publish(1, "", queue, str(number).encode())
        confirms.expect(number).wait()
        return number in (confirms.acked if accepted else confirms.nacked)

    eventually(lambda: published(accepted=False))
    # It learns of its limit a little late, so more may have been accepted than the limit says.
    bodies = drain(channel, queue)
    assert len(bodies) == len(confirms.acked) >= 10
    assert set(bodies) == {str(accepted).encode() for accepted in confirms.acked}
    eventually(lambda: published(accepted=True))


# ---- reject-publish-dlx


@pytest.fixture
def burying(declare):
    """Declares a queue that dead-letters what does not fit; returns it and the queue of the dead."""

    def declare_burying(**arguments):
        dead = declare("dead")
        queue = declare(
            overflow="reject-publish-dlx",
            dead_letter_exchange="",
            dead_letter_routing_key=dead,
            **arguments,
        )
        return queue, dead

    return declare_burying


def test_refused_message_is_dead_lettered_if_asked_for(confirming, channel, burying):
    queue, dead = burying(max_length=1)
    confirms = Confirms(confirming)
    for number in (1, 2, 3):
        confirming.publish(1, "", queue, str(number).encode())
        confirms.expect(number).wait()
    assert (confirms.acked, confirms.nacked) == ({1}, {2, 3})
    buried = [get_one(channel, dead) for _ in range(2)]
    assert [message.body for message in buried] == [b"2", b"3"]
    for message in buried:
        (death,) = message.properties.headers["x-death"]
        assert (death["reason"], death["queue"], death["count"]) == ("maxlen", queue, 1)
    assert drain(channel, queue) == [b"1"]


def test_refused_message_is_dead_lettered_without_confirms_too(channel, burying):
    queue, dead = burying(max_length=1)
    publish(channel, queue, "1", "2")
    assert get_one(channel, dead).body == b"2"
    assert drain(channel, queue) == [b"1"]


def test_refused_message_is_dead_lettered_by_bytes_too(channel, burying):
    queue, dead = burying(max_length_bytes=10)
    publish(channel, queue, b"small", b"large" * 2, b"small")
    assert get_one(channel, dead).body == b"large" * 2
    assert drain(channel, queue) == [b"small", b"small"]


def test_commit_fails_though_the_refused_message_is_dead_lettered(client, channel, burying):
    queue, dead = burying(max_length=0)
    client.do(1, "tx.select")
    client.publish(1, "", queue, b"1")
    client.send_method(1, "tx.commit")
    expect_channel_close(client, 406, "partial tx completion", "tx.commit")
    assert get_one(channel, dead).body == b"1"


def test_without_a_dead_letter_exchange_refused_messages_are_lost(channel, declare):
    queue = declare(overflow="reject-publish-dlx", max_length=1)
    channel.confirm_delivery()
    publish(channel, queue, "1")
    with pytest.raises(pika.exceptions.NackError):
        publish(channel, queue, "2")
    assert drain(channel, queue) == [b"1"]


def test_quorum_queue_drops_its_head_instead(channel, burying):
    queue, dead = burying(queue_type="quorum", max_length=1)
    channel.confirm_delivery()
    publish(channel, queue, "1", "2")
    assert get_one(channel, dead).body == b"1"
    assert drain(channel, queue) == [b"2"]


# ---- Limits and time


def test_limit_holds_while_messages_expire(channel, declare):
    queue = declare(max_length=2, message_ttl=300)
    for body in numbers(30):
        publish(channel, queue, body)
        assert channel.queue_declare(queue, passive=True).method.message_count <= 2
        time.sleep(0.02)
    expect_counts(channel, queue, messages=0, consumers=0)
