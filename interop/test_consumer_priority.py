"""Consumer priorities, exclusive consumers that make room, and consumers the server cancels, for the
types of queue that have them."""

import pytest

from helpers import (
    RawConsumer,
    consume,
    drain,
    expect_channel_close,
    expect_counts,
    numbers,
    publish,
    publish_confirmed,
)
from raw import FULL_CAPABILITIES, Typed

pytestmark = pytest.mark.parametrize("queue_type", ["classic", "quorum"])
DEAF = {"client_properties": {"capabilities": FULL_CAPABILITIES | {"consumer_cancel_notify": False}}}


@pytest.fixture
def queue(queue_type, declare):
    return declare(queue_type)


@pytest.fixture
def start(connection, queue):
    """Starts a consumer on a channel of its own, with a priority unless that is None."""

    def start_consumer(priority=None, prefetch=0, auto_ack=False):
        channel = connection.channel()
        if prefetch:
            channel.basic_qos(prefetch_count=prefetch)
        arguments = {} if priority is None else {"x-priority": priority}
        deliveries = consume(connection, channel, queue, auto_ack=auto_ack, arguments=arguments)
        deliveries.channel = channel
        return deliveries

    return start_consumer


# ---- Who is served


@pytest.mark.parametrize(
    "winner, losers",
    [
        (10, [5, None, 0, -5]),
        (1, [None, -1]),
        (None, [-1, -100]),
        (0, [-1]),
        (-1, [-2, -3]),
        (2**31 - 1, [2**31 - 2, -(2**31)]),
    ],
    ids=["many", "default_is_lower", "default_is_higher", "zero", "negative", "extremes"],
)
def test_highest_priority_gets_everything(winner, losers, start, connection, queue):
    lower = [start(priority, auto_ack=True) for priority in losers]
    highest = start(winner, auto_ack=True)
    publish_confirmed(connection, queue, *numbers(10))
    assert highest.wait_for(10).stay_at(10, during=0.1).bodies == numbers(10)
    assert not any(lower)


def test_it_does_not_matter_who_came_first(start, connection, queue):
    consumers = {priority: start(priority, auto_ack=True) for priority in (3, 7, -2, 5, 0)}
    publish_confirmed(connection, queue, *numbers(5))
    consumers[7].wait_for(5)
    assert {priority for priority, deliveries in consumers.items() if deliveries} == {7}


def test_each_priority_is_filled_before_the_next_lower_one(start, connection, queue):
    middle, high, low = start(0, prefetch=2), start(5, prefetch=1), start(-5, prefetch=10)
    publish_confirmed(connection, queue, *numbers(6))
    assert high.wait_for(1).bodies == [b"1"]
    assert middle.wait_for(2).bodies == [b"2", b"3"]
    assert low.wait_for(3).bodies == [b"4", b"5", b"6"]


def test_higher_priority_is_served_again_as_soon_as_it_has_room(start, connection, queue):
    high, low = start(1, prefetch=1), start(prefetch=1)
    publish_confirmed(connection, queue, "1", "2", "3")
    high.wait_for(1)
    low.wait_for(1)
    high.channel.basic_ack(high[0].tag)
    assert high.wait_for(2).bodies == [b"1", b"3"]
    low.stay_at(1, during=0.1)


def test_returned_message_goes_to_the_highest_priority_with_room(start, connection, queue):
    high, low = start(1, prefetch=1), start(prefetch=1)
    publish_confirmed(connection, queue, "1", "2")
    high.wait_for(1)
    low.wait_for(1)
    high.channel.basic_ack(high[0].tag)
    # What is settled on one channel has reached the queue once the channel answers again.
    high.channel.queue_declare(queue, passive=True)
    low.channel.basic_reject(low[0].tag, requeue=True)
    assert high.wait_for(2)[1].body == b"2"
    assert high[1].redelivered


def test_lower_priority_takes_over_when_the_higher_leaves(start, connection, queue):
    high, low = start(1, auto_ack=True), start(auto_ack=True)
    publish_confirmed(connection, queue, "1")
    high.wait_for(1)
    high.channel.basic_cancel(high.consumer_tag)
    publish_confirmed(connection, queue, "2")
    assert low.wait_for(1).bodies == [b"2"]


def test_newcomer_of_higher_priority_is_served_from_then_on(start, connection, queue):
    low = start(auto_ack=True)
    publish_confirmed(connection, queue, "1")
    low.wait_for(1)
    high = start(1, auto_ack=True)
    publish_confirmed(connection, queue, "2", "3")
    assert high.wait_for(2).bodies == [b"2", b"3"]
    assert low.bodies == [b"1"]


@pytest.mark.parametrize("priority", [None, 4, -4])
@pytest.mark.parametrize("count", [2, 5])
def test_equal_priorities_take_turns(count, priority, start, connection, queue):
    consumers = [start(priority, auto_ack=True) for _ in range(count)]
    publish_confirmed(connection, queue, *numbers(4 * count))
    for deliveries in consumers:
        deliveries.wait_for(4)
    for deliveries in consumers:
        assert len(deliveries) == 4
        steps = {int(b) - int(a) for a, b in zip(deliveries.bodies, deliveries.bodies[1:])}
        assert steps == {count}


def test_equal_highest_priorities_take_turns_above_the_others(start, connection, queue):
    low = start(auto_ack=True)
    highest = [start(9, auto_ack=True) for _ in range(3)]
    lower = start(8, auto_ack=True)
    publish_confirmed(connection, queue, *numbers(9))
    for deliveries in highest:
        deliveries.wait_for(3)
    assert [len(deliveries) for deliveries in highest] == [3, 3, 3]
    assert not low and not lower


def test_many_consumers_are_served_by_their_priorities(start, connection, queue):
    # Each priority from 0 to 29 once, in no particular order.
    consumers = {at * 7 % 30: start(at * 7 % 30, prefetch=1) for at in range(30)}
    publish_confirmed(connection, queue, *numbers(20))
    for priority in range(29, 9, -1):
        assert consumers[priority].wait_for(1).bodies == [str(30 - priority).encode()]
    assert not any(consumers[priority] for priority in range(10))


def test_consumer_full_of_unsettled_messages_counts_as_blocked_not_as_gone(start, connection, queue):
    high, low = start(1, prefetch=2), start()
    publish_confirmed(connection, queue, *numbers(4))
    high.wait_for(2)
    low.wait_for(2)
    for deliveries in (high, low):
        deliveries.channel.basic_ack(0, multiple=True)
        deliveries.channel.queue_declare(queue, passive=True)
    publish_confirmed(connection, queue, "5")
    assert high.wait_for(3)[2].body == b"5"


@pytest.mark.parametrize("tag", "bBsuIil")
def test_priority_may_be_any_integer_type(tag, client, connection, queue):
    client.do(1, "basic.consume", queue=queue, consumer_tag="low")
    client.do(1, "basic.consume", queue=queue, consumer_tag="high", arguments={"x-priority": Typed(tag, 5)})
    publish_confirmed(connection, queue, "1")
    assert client.expect("basic.deliver").consumer_tag == "high"


@pytest.mark.parametrize(
    "value, kind",
    [("5", "longstr"), (5.0, "double"), (True, "bool"), (None, "void"), ({}, "table"), ([], "array")],
)
def test_priority_of_another_type_is_refused(value, kind, client, queue):
    client.send_method(1, "basic.consume", queue=queue, arguments={"x-priority": value})
    text = f"invalid arg 'x-priority' for queue '{queue}' in vhost '/': \"expected integer, got {kind}\""
    expect_channel_close(client, 406, text, "basic.consume")


# ---- Exclusive consumers


@pytest.mark.parametrize("how", ["cancel", "channel_close", "connection_close", "socket_loss"])
def test_place_of_an_exclusive_consumer_is_free_when_it_leaves(how, raw, connection, channel, queue):
    first = RawConsumer(raw(1), queue, exclusive=True)
    publish_confirmed(connection, queue, "1")
    first.wait_for(1).settle("ack", 0)
    first.leave(how)
    expect_counts(channel, queue, messages=0, consumers=0)
    second = RawConsumer(raw(1), queue, exclusive=True)
    publish_confirmed(connection, queue, "2")
    assert second.wait_for(1).bodies == [b"2"]


def test_second_consumer_is_refused_beside_an_exclusive_one_of_a_classic_queue(
    queue_type, raw, client, queue
):
    first = RawConsumer(raw(1), queue, exclusive=True)
    for exclusive in (False, True):
        client.send_method(1, "basic.consume", queue=queue, exclusive=exclusive)
        if queue_type == "classic":
            text = f"queue '{queue}' in vhost '/' in exclusive use"
            expect_channel_close(client, 403, text, "basic.consume")
        else:
            client.expect("basic.consume-ok")
    first.stay_silent(0.1)


def test_exclusive_consumer_is_refused_beside_another_of_a_classic_queue(queue_type, raw, client, queue):
    RawConsumer(raw(1), queue)
    client.send_method(1, "basic.consume", queue=queue, exclusive=True)
    if queue_type == "classic":
        text = f"queue '{queue}' in vhost '/' in exclusive use"
        expect_channel_close(client, 403, text, "basic.consume")
    else:
        client.expect("basic.consume-ok")


# ---- Cancelled by the server


def test_every_consumer_is_told_when_its_queue_is_deleted(raw, channel, queue):
    clients = [raw(1, 2) for _ in range(2)]
    for client in clients:
        for number in (1, 2):
            client.do(number, "basic.consume", queue=queue, consumer_tag=f"c{number}")
    channel.queue_delete(queue)
    for client in clients:
        told = [client.expect("basic.cancel") for _ in range(2)]
        assert sorted((m.channel, m.consumer_tag, m.nowait) for m in told) == [
            (1, "c1", True),
            (2, "c2", True),
        ]


def test_consumer_that_cannot_hear_a_cancel_falls_silent(raw, channel, queue):
    client = raw(1, start_ok=DEAF)
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    channel.queue_delete(queue)
    client.expect_silence(0.3)
    client.do(1, "basic.qos")


def test_consumer_that_left_is_not_told(raw, channel, queue):
    consumer = RawConsumer(raw(1), queue)
    consumer.leave("cancel")
    channel.queue_delete(queue)
    consumer.stay_silent()


def test_tag_of_a_cancelled_consumer_is_free_again(raw, channel, declare, queue_type):
    first, second = declare(queue_type), declare(queue_type)
    client = raw(1)
    client.do(1, "basic.consume", queue=first, consumer_tag="c")
    channel.queue_delete(first)
    client.expect("basic.cancel")
    client.do(1, "basic.consume", queue=second, consumer_tag="c")


def test_deliveries_of_a_cancelled_consumer_may_be_settled_without_effect(raw, connection, channel, queue):
    consumer = RawConsumer(raw(1), queue)
    publish_confirmed(connection, queue, "1", "2", "3")
    consumer.wait_for(3)
    channel.queue_delete(queue)
    consumer.client.expect("basic.cancel")
    consumer.settle("ack", 0)
    consumer.settle("reject", 1, requeue=True)
    consumer.settle("nack", 2)
    consumer.client.do(1, "basic.qos")


def test_consumer_of_another_queue_goes_on(raw, connection, channel, declare, queue_type):
    doomed, other = declare(queue_type), declare(queue_type)
    client = raw(1)
    client.do(1, "basic.consume", queue=doomed, consumer_tag="doomed")
    client.do(1, "basic.consume", queue=other, consumer_tag="other")
    channel.queue_delete(doomed)
    assert client.expect("basic.cancel").consumer_tag == "doomed"
    publish_confirmed(connection, other, "1")
    delivered = client.expect("basic.deliver")
    assert (delivered.consumer_tag, delivered.body) == ("other", b"1")


def test_expired_queue_cancels_nobody_for_it_has_no_consumers(queue_type, raw, connection, declare):
    queue = declare(queue_type, expires=300)
    consumer = RawConsumer(raw(1), queue)
    consumer.stay_silent(1)
    publish(connection.channel(), queue, "1")
    assert consumer.wait_for(1).bodies == [b"1"]
    consumer.settle("ack", 0)
    assert drain(connection.channel(), queue) == []
