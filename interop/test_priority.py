"""x-max-priority: which message comes first, and how levels get on with everything else."""

import random
import time

import pika.exceptions
import pytest

from helpers import (
    consume,
    drain,
    expect_counts,
    get,
    get_one,
    publish,
    takes_at_least,
)


@pytest.fixture
def channel(channel):
    """Waits for the confirm of each publish, so that the message is in its queue by then."""
    channel.confirm_delivery()
    return channel


@pytest.fixture
def levels(declare):
    return declare(max_priority=5)


def publish_at(channel, queue, *priorities, **properties):
    """Publishes one message per priority; bodies are "priority.count", so that order within a level shows."""
    counts = {}
    for priority in priorities:
        counts[priority] = counts.get(priority, 0) + 1
        publish(channel, queue, f"{priority}.{counts[priority]}", priority=priority, **properties)


def order(bodies):
    return " ".join(body.decode() for body in bodies)


# ---- Order


def test_higher_priorities_come_first_and_in_order_of_arrival_within_a_level(channel, levels):
    publish_at(channel, levels, 1, 5, 3, 5, 1, 0, 3, 5)
    assert order(drain(channel, levels)) == "5.1 5.2 5.3 3.1 3.2 1.1 1.2 0.1"


def test_backlog_is_delivered_by_priority(connection, channel, levels):
    publish_at(channel, levels, 1, 5, 3, 5, 1, 0, 3, 5)
    deliveries = consume(connection, channel, levels)
    assert order(deliveries.wait_for(8).bodies) == "5.1 5.2 5.3 3.1 3.2 1.1 1.2 0.1"


def test_message_without_a_priority_has_the_lowest(channel, levels):
    publish_at(channel, levels, 0, None, 1, None, 0)
    assert order(drain(channel, levels)) == "1.1 0.1 None.1 None.2 0.2"


def test_priority_above_the_maximum_counts_as_the_maximum(channel, levels):
    publish_at(channel, levels, 4, 255, 5, 6, 5, 100)
    assert order(drain(channel, levels)) == "255.1 5.1 6.1 5.2 100.1 4.1"


@pytest.mark.parametrize("priority", [None, 0, 3, 5, 6, 255])
def test_priority_is_delivered_as_sent(priority, channel, levels):
    publish(channel, levels, "1", priority=priority)
    assert get_one(channel, levels).properties.priority == priority


def test_queue_without_levels_keeps_the_order_of_arrival(channel, queue):
    publish_at(channel, queue, 1, 5, 3, 255, None, 0)
    assert order(drain(channel, queue)) == "1.1 5.1 3.1 255.1 None.1 0.1"


def test_single_level_above_zero(channel, declare):
    queue = declare(max_priority=1)
    publish_at(channel, queue, 0, 1, None, 2, 1)
    assert order(drain(channel, queue)) == "1.1 2.1 1.2 0.1 None.1"


def test_maximum_of_zero_counts_as_one(channel, declare, server):
    queue = declare(max_priority=0)
    publish_at(channel, queue, 0, 1, None, 255, 0)
    got = order(drain(channel, queue))
    assert got == ("0.1 1.1 None.1 255.1 0.2" if server.is_3x else "1.1 255.1 0.1 None.1 0.2")


@pytest.mark.parametrize("maximum", [10, 255])
def test_messages_of_every_level_come_in_order(maximum, channel, declare):
    queue = declare(max_priority=maximum)
    priorities = list(range(maximum + 1)) * 2
    random.Random(5).shuffle(priorities)
    publish_at(channel, queue, *priorities)
    expected = " ".join(f"{level}.{count}" for level in range(maximum, -1, -1) for count in (1, 2))
    assert order(drain(channel, queue)) == expected


@pytest.mark.parametrize("delivery_mode", [1, 2], ids=["transient", "persistent"])
@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "large"])
def test_order_depends_on_nothing_but_priority_and_arrival(size, delivery_mode, channel, levels):
    bodies = {priority: str(priority).encode() * size for priority in (2, 5, 0, 3)}
    for priority, body in bodies.items():
        publish(channel, levels, body, priority=priority, delivery_mode=delivery_mode)
    assert drain(channel, levels) == [bodies[priority] for priority in (5, 3, 2, 0)]


def test_transaction_commits_to_all_levels(connection, channel, levels):
    tx = connection.channel()
    tx.tx_select()
    publish_at(tx, levels, 1, 5, 3)
    tx.tx_commit()
    publish_at(channel, levels, 4)
    assert order(drain(channel, levels)) == "5.1 4.1 3.1 1.1"


def test_later_message_of_higher_priority_overtakes_the_backlog(connection, channel, levels):
    publish_at(channel, levels, 2, 2, 2)
    other = connection.channel()
    other.basic_qos(prefetch_count=1)
    deliveries = consume(connection, other, levels)
    deliveries.wait_for(1)
    publish_at(channel, levels, 5, 0)
    for count in range(2, 6):
        other.basic_ack(deliveries[-1].tag)
        deliveries.wait_for(count)
    assert order(deliveries.bodies) == "2.1 5.1 2.2 2.3 0.1"


def test_waiting_consumer_gets_messages_of_any_priority_at_once(connection, channel, levels):
    deliveries = consume(connection, channel, levels, auto_ack=True)
    for count, priority in enumerate((0, 5, 1, None, 3), start=1):
        publish_at(channel, levels, priority)
        deliveries.wait_for(count)
    assert order(deliveries.bodies) == "0.1 5.1 1.1 None.1 3.1"


# ---- Requeueing


@pytest.mark.parametrize("how", ["nack", "reject", "recover", "close"])
def test_requeued_messages_return_to_their_places_within_their_levels(how, connection, channel, levels):
    publish_at(channel, levels, 1, 5, 3, 5, 3)
    holder = connection.channel()
    held = [get_one(holder, levels) for _ in range(4)]
    assert order(message.body for message in held) == "5.1 5.2 3.1 3.2"
    publish_at(channel, levels, 4)
    if how == "nack":
        holder.basic_nack(0, multiple=True, requeue=True)
    elif how == "reject":
        for message in reversed(held):
            holder.basic_reject(message.tag, requeue=True)
    elif how == "recover":
        holder.basic_recover(requeue=True)
    else:
        holder.close()
    expect_counts(channel, levels, messages=6, consumers=0)
    assert order(drain(channel, levels)) == "5.1 5.2 4.1 3.1 3.2 1.1"


def test_requeued_message_is_marked_and_new_ones_are_not(channel, levels):
    publish_at(channel, levels, 3)
    channel.basic_nack(get_one(channel, levels).tag, requeue=True)
    expect_counts(channel, levels, messages=1, consumers=0)
    publish_at(channel, levels, 5, 1)
    got = [get_one(channel, levels) for _ in range(3)]
    assert [(message.body, message.redelivered) for message in got] == [
        (b"5.1", False),
        (b"3.1", True),
        (b"1.1", False),
    ]


def test_requeued_message_of_low_priority_lets_higher_ones_pass(channel, levels):
    publish_at(channel, levels, 1)
    held = get_one(channel, levels)
    publish_at(channel, levels, 2, 0)
    channel.basic_nack(held.tag, requeue=True)
    expect_counts(channel, levels, messages=3, consumers=0)
    assert order(drain(channel, levels)) == "2.1 1.1 0.1"


# ---- Counting


def test_counts_are_of_all_levels(client, channel, levels):
    publish_at(channel, levels, 5, 3, 1, None)
    expect_counts(channel, levels, messages=4, consumers=0)
    assert [client.get(1, levels).message_count for _ in range(2)] == [3, 2]


def test_purge_empties_all_levels(channel, levels):
    publish_at(channel, levels, 5, 3, 1, None)
    held = get_one(channel, levels)
    assert channel.queue_purge(levels).method.message_count == 3
    assert get(channel, levels) is None
    channel.basic_nack(held.tag, requeue=True)
    assert order([get_one(channel, levels).body]) == "5.1"


def test_delete_counts_all_levels(channel, levels):
    publish_at(channel, levels, 5, 3, 1, None)
    assert channel.queue_delete(levels).method.message_count == 4


def test_queue_with_messages_of_any_level_is_not_empty(connection, channel, levels):
    publish_at(channel, levels, 0)
    with pytest.raises(pika.exceptions.ChannelClosedByBroker):
        connection.channel().queue_delete(levels, if_empty=True)


# ---- Time


def test_message_of_a_higher_level_expires_before_those_below(channel, levels):
    publish_at(channel, levels, 5, expiration="300")
    publish_at(channel, levels, 1)
    expect_counts(channel, levels, messages=1, consumers=0)
    assert order(drain(channel, levels)) == "1.1"


def test_expired_message_of_a_lower_level_is_not_delivered(channel, levels):
    publish_at(channel, levels, 5)
    publish_at(channel, levels, 1, expiration="200")
    time.sleep(0.3)
    assert order(drain(channel, levels)) == "5.1"


@pytest.mark.rabbitmq_only("expired messages leave wherever they stand")
def test_expired_message_stays_behind_those_that_come_before_it(channel, levels):
    publish_at(channel, levels, 5)
    publish_at(channel, levels, 5, 1, expiration="200")
    time.sleep(0.3)
    expect_counts(channel, levels, messages=3, consumers=0)
    assert order([get_one(channel, levels, auto_ack=True).body]) == "5.1"
    expect_counts(channel, levels, messages=0, consumers=0)


def test_ttl_of_the_queue_holds_for_every_level(channel, declare):
    queue = declare(max_priority=5, message_ttl=200)
    with takes_at_least(200):
        publish_at(channel, queue, 5, 3, 1, None, 5)
        expect_counts(channel, queue, messages=0, consumers=0)


# ---- Length limits


def test_full_queue_drops_what_would_be_delivered_next(channel, declare):
    queue = declare(max_priority=5, max_length=3)
    publish_at(channel, queue, 1, 3, 5, 3)
    assert order(drain(channel, queue)) == "3.1 3.2 1.1"


def test_full_queue_drops_the_newest_message_if_it_has_the_highest_priority(channel, declare):
    queue = declare(max_priority=5, max_length=2)
    publish_at(channel, queue, 1, 1, 5)
    assert order(drain(channel, queue)) == "1.1 1.2"


def test_limit_in_bytes_is_for_all_levels_together(channel, declare):
    queue = declare(max_priority=5, max_length_bytes=100)
    for priority in (1, 5, 3):
        publish(channel, queue, str(priority) * 40, priority=priority)
    assert drain(channel, queue) == [b"3" * 40, b"1" * 40]


def test_full_queue_refuses_whatever_the_priority(channel, declare):
    queue = declare(max_priority=5, max_length=2, overflow="reject-publish")
    publish_at(channel, queue, 1, 0)
    for priority in (5, 0, None):
        with pytest.raises(pika.exceptions.NackError):
            publish_at(channel, queue, priority)
    assert order(drain(channel, queue)) == "1.1 0.1"


# ---- Dead letters


def test_dead_letter_keeps_its_priority(channel, declare):
    dead = declare("dead", max_priority=5)
    queue = declare(max_priority=5, dead_letter_exchange="", dead_letter_routing_key=dead)
    publish_at(channel, queue, 1, 4, 2)
    for _ in range(3):
        channel.basic_reject(get_one(channel, queue).tag, requeue=False)
    expect_counts(channel, dead, messages=3, consumers=0)
    got = [get_one(channel, dead) for _ in range(3)]
    assert [message.properties.priority for message in got] == [4, 2, 1]


def test_expired_messages_of_all_levels_are_dead_lettered(channel, declare):
    dead = declare("dead")
    queue = declare(max_priority=5, message_ttl=100, dead_letter_exchange="", dead_letter_routing_key=dead)
    publish_at(channel, queue, 1, 5, None, 3)
    expect_counts(channel, dead, messages=4, consumers=0)
    assert sorted(drain(channel, dead)) == [b"1.1", b"3.1", b"5.1", b"None.1"]


def test_consumer_and_message_priorities_do_not_mix(connection, channel, levels):
    low = consume(connection, connection.channel(), levels, auto_ack=True)
    high = consume(connection, connection.channel(), levels, auto_ack=True, arguments={"x-priority": 5})
    publish_at(channel, levels, 0, 5, 0, 5)
    assert order(high.wait_for(4).bodies) == "0.1 5.1 0.2 5.2"
    low.stay_at(0, during=0.1)


# ---- Quorum queues


@pytest.fixture
def quorum(declare, server):
    if server.is_3x:
        pytest.skip("quorum queues of RabbitMQ 3.x know no priorities")
    return declare(queue_type="quorum")


def test_quorum_queue_has_32_levels_without_asking(channel, quorum):
    priorities = list(range(32))
    random.Random(5).shuffle(priorities)
    publish_at(channel, quorum, *priorities)
    assert order(drain(channel, quorum)) == " ".join(f"{level}.1" for level in range(31, -1, -1))


def test_priority_above_31_counts_as_31_in_a_quorum_queue(channel, quorum):
    publish_at(channel, quorum, 30, 255, 31, 32)
    assert order(drain(channel, quorum)) == "255.1 31.1 32.1 30.1"


def test_message_without_a_priority_is_in_level_4_of_a_quorum_queue(channel, quorum):
    publish_at(channel, quorum, 3, None, 4, 5, None)
    assert order(drain(channel, quorum)) == "5.1 None.1 4.1 None.2 3.1"


def test_returned_messages_of_a_quorum_queue_come_before_all_others(channel, quorum):
    publish_at(channel, quorum, 1)
    held = get_one(channel, quorum)
    publish_at(channel, quorum, 9)
    channel.basic_nack(held.tag, requeue=True)
    assert order(drain(channel, quorum)) == "1.1 9.1"
