"""Queues with a single active consumer: one consumer gets everything, the others wait for its place."""

import pytest

from helpers import (
    RawConsumer,
    consume,
    drain,
    expect_channel_close,
    expect_counts,
    numbers,
    publish_confirmed,
)

pytestmark = pytest.mark.parametrize("queue_type", ["classic", "quorum"])
LEAVING = pytest.mark.parametrize("how", ["cancel", "channel_close", "connection_close", "socket_loss"])


@pytest.fixture
def queue(queue_type, declare):
    return declare(queue_type, single_active_consumer=True)


@pytest.fixture
def start(raw, queue):
    """Starts a consumer on a connection of its own."""

    def start_consumer(prefetch=0, priority=None, **options):
        if priority is not None:
            options["arguments"] = {"x-priority": priority}
        return RawConsumer(raw(1), queue, prefetch, **options)

    return start_consumer


# ---- Who is active


def test_first_consumer_gets_everything_and_the_others_nothing(start, connection, queue):
    first, second, third = (start(no_ack=True) for _ in range(3))
    publish_confirmed(connection, queue, *numbers(20))
    assert first.wait_for(20).bodies == numbers(20)
    second.stay_silent(0.1)
    third.stay_silent(0.1)


def test_consumers_of_one_channel_wait_for_each_other_too(connection, channel, queue):
    first, second = (consume(connection, channel, queue, auto_ack=True) for _ in range(2))
    publish_confirmed(connection, queue, *numbers(10))
    assert first.wait_for(10).bodies == numbers(10)
    second.stay_at(0, during=0.1)


def test_queue_declared_without_a_single_active_consumer_is_shared(queue_type, connection, declare):
    queue = declare(queue_type, single_active_consumer=False)
    consumers = [consume(connection, connection.channel(), queue, auto_ack=True) for _ in range(2)]
    publish_confirmed(connection, queue, *numbers(10))
    for deliveries in consumers:
        deliveries.wait_for(5)


def test_backlog_goes_to_the_first_consumer(start, connection, queue):
    publish_confirmed(connection, queue, *numbers(10))
    first, second = start(), start()
    assert first.wait_for(10).bodies == numbers(10)
    second.stay_silent(0.1)


def test_waiting_consumer_gets_nothing_while_the_active_one_is_blocked(start, connection, queue):
    active, waiting = start(prefetch=2), start()
    publish_confirmed(connection, queue, *numbers(5))
    active.wait_for(2).stay_silent()
    waiting.stay_silent(0.1)
    active.settle("ack", 1, multiple=True)
    assert active.wait_for(4).bodies == numbers(4)
    waiting.stay_silent(0.1)


def test_active_consumer_is_held_to_its_prefetch(start, connection, queue):
    active = start(prefetch=3)
    publish_confirmed(connection, queue, *numbers(5))
    active.wait_for(3).stay_silent(0.2)
    active.settle("ack", 1)
    active.wait_for(4).stay_silent(0.2)
    active.settle("ack", 0)
    assert active.wait_for(5).bodies == numbers(5)


def test_active_consumer_stays_active_whenever_it_has_room_again(start, connection, queue):
    active, waiting = start(prefetch=1), start(prefetch=1)
    for number in range(5):
        publish_confirmed(connection, queue, str(number))
        active.wait_for(number + 1).settle("ack", number)
    waiting.stay_silent(0.1)


def test_waiting_consumers_are_counted_by_a_classic_queue_only(queue_type, start, channel, queue):
    for _ in range(3):
        start()
    expect_counts(channel, queue, messages=0, consumers=3 if queue_type == "classic" else 1)


# ---- Taking over


@LEAVING
def test_next_consumer_takes_over_when_the_active_one_leaves(how, start, connection, queue):
    first, second, third = (start() for _ in range(3))
    publish_confirmed(connection, queue, "1")
    first.wait_for(1).settle("ack", 0)
    first.leave(how)
    publish_confirmed(connection, queue, "2")
    second.wait_for(1).settle("ack", 0)
    third.stay_silent(0.1)
    second.leave(how)
    publish_confirmed(connection, queue, "3")
    third.wait_for(1)
    assert (first.bodies, second.bodies, third.bodies) == ([b"1"], [b"2"], [b"3"])


@LEAVING
def test_waiting_consumer_that_leaves_is_passed_over(how, start, connection, queue):
    first, second, third = (start() for _ in range(3))
    second.leave(how)
    publish_confirmed(connection, queue, "1")
    first.wait_for(1).settle("ack", 0)
    first.leave("cancel")
    publish_confirmed(connection, queue, "2")
    assert third.wait_for(1).bodies == [b"2"]


@pytest.mark.parametrize("how", ["channel_close", "connection_close", "socket_loss"])
def test_unacknowledged_messages_of_the_lost_consumer_go_to_the_next(how, start, connection, queue):
    first, second = start(prefetch=3), start()
    publish_confirmed(connection, queue, *numbers(5))
    first.wait_for(3).leave(how)
    second.wait_for(5)
    assert [(delivery.body, delivery.redelivered) for delivery in second.deliveries] == [
        (b"1", True),
        (b"2", True),
        (b"3", True),
        (b"4", False),
        (b"5", False),
    ]


def test_cancelled_consumer_keeps_what_it_holds(queue_type, start, connection, queue, server):
    if server.is_3x and queue_type == "classic":
        pytest.skip("RabbitMQ 3 does not wake a classic queue when the active consumer is cancelled")
    first, second = start(prefetch=2), start()
    publish_confirmed(connection, queue, *numbers(4))
    first.wait_for(2).leave("cancel")
    assert second.wait_for(2).stay_silent(0.2).bodies == [b"3", b"4"]
    first.settle("ack", 0)
    first.settle("nack", 1, requeue=True)
    assert second.wait_for(3).bodies[2] == b"2"
    assert second.deliveries[2].redelivered


def test_returned_message_comes_back_to_the_active_consumer(start, connection, queue):
    active, waiting = start(prefetch=1), start()
    publish_confirmed(connection, queue, "1")
    active.wait_for(1).settle("reject", 0, requeue=True)
    assert active.wait_for(2).deliveries[1].redelivered
    waiting.stay_silent(0.1)


def test_consumer_that_comes_back_waits_at_the_end(start, connection, queue):
    first, second = start(no_ack=True), start(no_ack=True)
    first.leave("cancel")
    third = RawConsumer(first.client, queue, no_ack=True)
    publish_confirmed(connection, queue, "1")
    second.wait_for(1).leave("cancel")
    publish_confirmed(connection, queue, "2")
    assert third.wait_for(1).bodies == [b"2"]


def test_new_consumer_is_active_at_once_when_all_have_left(start, connection, queue):
    for how in ("cancel", "channel_close", "connection_close"):
        start().leave(how)
    publish_confirmed(connection, queue, "1")
    assert start().wait_for(1).bodies == [b"1"]


def test_order_is_kept_over_consumers_that_leave_without_settling(start, connection, queue):
    consumers = [start(prefetch=5) for _ in range(3)]
    publish_confirmed(connection, queue, *numbers(12))
    assert consumers[0].wait_for(5).bodies == numbers(5)
    consumers[0].settle("ack", 1, multiple=True)
    consumers[0].wait_for(7).leave("channel_close")
    assert consumers[1].wait_for(5).bodies == numbers(5, start=3)
    consumers[1].leave("connection_close")
    assert consumers[2].wait_for(5).bodies == numbers(5, start=3)


# ---- Priorities


@pytest.fixture
def prioritised(queue_type, server):
    if queue_type == "quorum" and server.is_3x:
        pytest.skip("priorities of the consumers of such quorum queues: since RabbitMQ 4.0")


@pytest.mark.usefixtures("prioritised")
@pytest.mark.parametrize("how", ["cancel", "channel_close", "connection_close"])
def test_consumer_of_highest_priority_takes_over(how, start, connection, queue):
    first = start(priority=10)
    low, high = start(priority=-1), start(priority=5)
    first.leave(how)
    publish_confirmed(connection, queue, "1")
    assert high.wait_for(1).bodies == [b"1"]
    low.stay_silent(0.1)


@pytest.mark.usefixtures("prioritised")
def test_oldest_of_equal_priority_takes_over(start, connection, queue):
    first, older, younger = start(priority=10), start(priority=5), start(priority=5)
    first.leave("cancel")
    publish_confirmed(connection, queue, "1")
    assert older.wait_for(1).bodies == [b"1"]
    younger.stay_silent(0.1)


@pytest.mark.usefixtures("prioritised")
def test_higher_priority_takes_over_a_quorum_queue_but_waits_at_a_classic_one(
    queue_type, start, connection, queue
):
    low, high = start(), start(priority=5)
    publish_confirmed(connection, queue, *numbers(3))
    served, waiting = (high, low) if queue_type == "quorum" else (low, high)
    assert served.wait_for(3).bodies == numbers(3)
    waiting.stay_silent(0.1)


@pytest.mark.usefixtures("prioritised")
def test_higher_priority_waits_for_the_deliveries_of_the_active_consumer(
    queue_type, start, connection, queue
):
    low = start(prefetch=2)
    publish_confirmed(connection, queue, *numbers(4))
    low.wait_for(2)
    high = start(priority=5)
    high.stay_silent()
    low.settle("ack", 0)
    if queue_type == "classic":
        assert low.wait_for(3).bodies == numbers(3)
        return
    # A quorum queue gives nothing more to the one that is to be replaced.
    low.stay_silent()
    high.stay_silent(0.1)
    low.settle("ack", 1)
    assert high.wait_for(2).bodies == [b"3", b"4"]
    high.leave("channel_close")
    assert low.wait_for(4).bodies == numbers(4)


# ---- Beside the consumers


def test_exclusive_consumer_is_refused_by_a_classic_queue_only(queue_type, client, queue):
    client.send_method(1, "basic.consume", queue=queue, exclusive=True)
    if queue_type == "classic":
        expect_channel_close(client, 403, f"queue '{queue}' in vhost '/' in exclusive use", "basic.consume")
    else:
        client.expect("basic.consume-ok")


def test_exclusive_consumer_is_refused_beside_an_active_one(queue_type, client, start, queue):
    start()
    test_exclusive_consumer_is_refused_by_a_classic_queue_only(queue_type, client, queue)


def test_get_takes_a_message_from_a_classic_queue_only(queue_type, client, start, connection, queue):
    active = start(prefetch=1)
    publish_confirmed(connection, queue, "1", "2")
    active.wait_for(1)
    received = client.get(1, queue)
    if queue_type == "classic":
        assert (received.name, received.body) == ("basic.get-ok", b"2")
        return
    assert (received.name, received.reply_code) == ("channel.close", 405)
    # RabbitMQ 4 names the type in the brackets of an Erlang string.
    assert received.reply_text.replace('<<"quorum">>', "quorum") == (
        f"RESOURCE_LOCKED - cannot obtain access to locked queue '{queue}' in vhost '/'. basic.get"
        " operations are not supported by quorum queues with single active consumer"
    )


def test_argument_must_be_the_same_when_declared_again(queue_type, client, queue):
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments={"x-queue-type": queue_type})
    text = (
        f"inequivalent arg 'x-single-active-consumer' for queue '{queue}' in vhost '/':"
        " received none but current is the value 'true' of type 'bool'"
    )
    expect_channel_close(client, 406, text, "queue.declare")


def test_every_consumer_is_told_when_the_queue_is_deleted(start, channel, queue):
    consumers = [start() for _ in range(3)]
    channel.queue_delete(queue)
    for consumer in consumers:
        told = consumer.client.expect("basic.cancel")
        assert told.args == {"consumer_tag": consumer.tag, "nowait": True}


def test_messages_of_a_consumer_that_left_can_be_got(queue_type, start, connection, channel, queue):
    if queue_type == "quorum":
        pytest.skip("quorum queues with a single active consumer refuse basic.get")
    publish_confirmed(connection, queue, *numbers(3))
    start(prefetch=2).wait_for(2).leave("connection_close")
    expect_counts(channel, queue, messages=3, consumers=0)
    assert drain(channel, queue) == numbers(3)
