"""Consumers: tags, deliveries, prefetch, fairness, exclusivity, priorities, cancelling."""

import re

import pytest

from helpers import (
    channel_error,
    consume,
    drain,
    expect_counts,
    get_one,
    numbers,
    publish,
    queue_exists,
)
from raw import FULL_CAPABILITIES, Typed, publish_frames


# ---- Tags and deliveries


def test_server_makes_up_consumer_tags(client, queue):
    tags = {client.do(1, "basic.consume", queue=queue).consumer_tag for _ in range(20)}
    assert len(tags) == 20
    assert all(re.fullmatch(r"amq\.ctag-[A-Za-z0-9_-]{22}", tag) for tag in tags)


def test_given_tag_is_kept(client, queue):
    assert client.do(1, "basic.consume", queue=queue, consumer_tag="ünï 🐇").consumer_tag == "ünï 🐇"


def test_consume_ok_comes_before_the_first_delivery(client, channel, queue):
    publish(channel, queue, "1")
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    delivered = client.expect("basic.deliver")
    assert delivered.args == {
        "consumer_tag": "c",
        "delivery_tag": 1,
        "redelivered": False,
        "exchange": "",
        "routing_key": queue,
    }
    assert delivered.body == b"1"


def test_consume_without_answer_delivers_under_the_given_tag(client, channel, queue):
    publish(channel, queue, "1")
    client.send_method(1, "basic.consume", queue=queue, consumer_tag="quiet", nowait=True)
    assert client.expect("basic.deliver").consumer_tag == "quiet"


def test_same_tag_may_be_used_on_different_channels(raw, queue):
    client = raw(1, 2)
    for channel in (1, 2):
        assert client.do(channel, "basic.consume", queue=queue, consumer_tag="c").consumer_tag == "c"


def test_cancelled_tag_may_be_used_again(client, queue):
    for _ in range(3):
        client.do(1, "basic.consume", queue=queue, consumer_tag="c")
        client.do(1, "basic.cancel", consumer_tag="c")


def test_delivery_tags_count_from_one_per_channel_over_consumers_and_gets(connection, channel, name):
    first, second = name("first"), name("second")
    for queue in (first, second):
        channel.queue_declare(queue, exclusive=True)
    deliveries = consume(connection, channel, first, auto_ack=True)
    publish(channel, first, "1", "2")
    deliveries.wait_for(2)
    publish(channel, second, "3")
    assert get_one(channel, second).tag == 3
    publish(channel, first, "4")
    assert [delivery.tag for delivery in deliveries.wait_for(3)] == [1, 2, 4]


def test_messages_are_delivered_in_the_order_published(connection, channel, queue):
    deliveries = consume(connection, channel, queue, auto_ack=True)
    publish(channel, queue, *numbers(500))
    assert deliveries.wait_for(500).bodies == numbers(500)


def test_backlog_is_delivered_before_what_comes_later(connection, channel, queue):
    publish(channel, queue, *numbers(50))
    deliveries = consume(connection, channel, queue, auto_ack=True)
    publish(channel, queue, *numbers(50, start=51))
    assert deliveries.wait_for(100).bodies == numbers(100)


def test_consumer_receives_what_its_own_connection_published_even_with_no_local(client, queue):
    client.do(1, "basic.consume", queue=queue, no_local=True)
    client.publish(1, "", queue, b"own")
    assert client.expect("basic.deliver").body == b"own"


def test_delivery_without_acknowledgement_is_gone_for_good(raw, channel, queue):
    client = raw(1)
    client.do(1, "basic.consume", queue=queue, no_ack=True)
    publish(channel, queue, "1")
    client.expect("basic.deliver")
    client.disconnect()
    expect_counts(channel, queue, messages=0, consumers=0)
    assert drain(channel, queue) == []


def test_unacknowledged_deliveries_are_not_counted_as_ready(connection, channel, queue):
    publish(channel, queue, *numbers(10))
    other = connection.channel()
    other.basic_qos(prefetch_count=4)
    consume(connection, other, queue).wait_for(4)
    expect_counts(channel, queue, messages=6, consumers=1)


# ---- Prefetch


def test_prefetch_limits_what_is_unacknowledged(connection, channel, queue):
    publish(channel, queue, *numbers(10))
    channel.basic_qos(prefetch_count=3)
    deliveries = consume(connection, channel, queue)
    deliveries.wait_for(3).stay_at(3)
    channel.basic_ack(deliveries[0].tag)
    deliveries.wait_for(4).stay_at(4)
    channel.basic_ack(deliveries[3].tag, multiple=True)
    assert deliveries.wait_for(7).stay_at(7).bodies == numbers(7)


@pytest.mark.parametrize("settle", ["ack", "nack", "reject"])
def test_each_way_of_settling_makes_room_in_the_prefetch(settle, connection, channel, queue):
    publish(channel, queue, *numbers(3))
    channel.basic_qos(prefetch_count=1)
    deliveries = consume(connection, channel, queue)
    for count in (1, 2, 3):
        tag = deliveries.wait_for(count)[-1].tag
        if settle == "ack":
            channel.basic_ack(tag)
        else:
            getattr(channel, f"basic_{settle}")(tag, requeue=False)
    assert deliveries.bodies == numbers(3)


def test_prefetch_counts_for_each_consumer_by_itself(connection, channel, name):
    channel.basic_qos(prefetch_count=2)
    queues = [channel.queue_declare(name(), exclusive=True).method.queue for _ in range(2)]
    consumers = [consume(connection, channel, queue) for queue in queues]
    for queue in queues:
        publish(channel, queue, *numbers(5))
    for deliveries in consumers:
        deliveries.wait_for(2).stay_at(2, during=0.2)


def test_prefetch_is_taken_by_consumers_started_later_only(connection, channel, name):
    first, second = (channel.queue_declare(name(), exclusive=True).method.queue for _ in range(2))
    channel.basic_qos(prefetch_count=1)
    early = consume(connection, channel, first)
    channel.basic_qos(prefetch_count=3)
    late = consume(connection, channel, second)
    for queue in (first, second):
        publish(channel, queue, *numbers(5))
    late.wait_for(3).stay_at(3, during=0.2)
    early.wait_for(1).stay_at(1, during=0.1)


def test_global_prefetch_is_shared_by_all_consumers_of_the_channel(connection, channel, name):
    first, second = (channel.queue_declare(name(), exclusive=True).method.queue for _ in range(2))
    channel.basic_qos(prefetch_count=3, global_qos=True)
    consumers = [consume(connection, channel, queue) for queue in (first, second)]
    publish(channel, first, *numbers(2))
    consumers[0].wait_for(2)
    publish(channel, second, *numbers(5))
    consumers[1].wait_for(1).stay_at(1)
    channel.basic_ack(consumers[0][0].tag)
    consumers[1].wait_for(2).stay_at(2, during=0.2)


def test_global_prefetch_holds_for_running_consumers_too(connection, channel, queue):
    deliveries = consume(connection, channel, queue)
    channel.basic_qos(prefetch_count=2, global_qos=True)
    publish(channel, queue, *numbers(5))
    deliveries.wait_for(2).stay_at(2)


def test_consumer_and_global_prefetch_hold_together(connection, channel, queue):
    channel.basic_qos(prefetch_count=4, global_qos=False)
    channel.basic_qos(prefetch_count=2, global_qos=True)
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, *numbers(6))
    deliveries.wait_for(2).stay_at(2)


def test_lifting_the_global_prefetch_lets_deliveries_flow(connection, channel, queue):
    channel.basic_qos(prefetch_count=1, global_qos=True)
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, *numbers(5))
    deliveries.wait_for(1).stay_at(1, during=0.2)
    channel.basic_qos(prefetch_count=0, global_qos=True)
    deliveries.wait_for(5)


def test_prefetch_of_zero_is_no_limit(connection, channel, queue):
    channel.basic_qos(prefetch_count=1)
    channel.basic_qos(prefetch_count=0)
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, *numbers(500))
    deliveries.wait_for(500)


def test_prefetch_does_not_hold_back_consumers_without_acknowledgement(connection, channel, queue):
    channel.basic_qos(prefetch_count=1)
    deliveries = consume(connection, channel, queue, auto_ack=True)
    publish(channel, queue, *numbers(50))
    deliveries.wait_for(50)


def test_get_is_not_held_back_by_prefetch(connection, channel, queue):
    channel.basic_qos(prefetch_count=1, global_qos=True)
    publish(channel, queue, *numbers(4))
    consume(connection, channel, queue).wait_for(1)
    assert [get_one(channel, queue).body for _ in range(3)] == numbers(4)[1:]


# ---- Several consumers


def test_competing_consumers_take_turns(connect, channel, queue):
    connections = [connect() for _ in range(3)]
    consumers = [consume(each, each.channel(), queue, auto_ack=True) for each in connections]
    publish(channel, queue, *numbers(30))
    for deliveries in consumers:
        deliveries.wait_for(10).stay_at(10, during=0.1)
    assert sorted(sum((d.bodies for d in consumers), []), key=int) == numbers(30)
    for deliveries in consumers:
        gaps = [int(b) - int(a) for a, b in zip(deliveries.bodies, deliveries.bodies[1:])]
        assert gaps == [3] * 9


def test_consumers_of_one_channel_take_turns_too(connection, channel, queue):
    consumers = [consume(connection, channel, queue, auto_ack=True) for _ in range(2)]
    publish(channel, queue, *numbers(20))
    for deliveries in consumers:
        deliveries.wait_for(10)
    assert [len(deliveries) for deliveries in consumers] == [10, 10]


def test_busy_consumer_leaves_its_turn_to_the_others(connection, queue, channel):
    slow_channel, fast_channel = connection.channel(), connection.channel()
    slow_channel.basic_qos(prefetch_count=1)
    slow = consume(connection, slow_channel, queue)
    fast = consume(connection, fast_channel, queue, auto_ack=True)
    publish(channel, queue, *numbers(20))
    fast.wait_for(19)
    assert len(slow) == 1
    assert sorted(slow.bodies + fast.bodies, key=int) == numbers(20)


def test_messages_of_a_lost_consumer_go_to_the_others(connect, connection, channel, queue):
    lost = connect()
    lost_deliveries = consume(lost, lost.channel(), queue)
    publish(channel, queue, *numbers(3))
    lost_deliveries.wait_for(3)
    survivor = consume(connection, channel, queue)
    lost.close()
    survivor.wait_for(3)
    assert [(delivery.body, delivery.redelivered) for delivery in survivor] == [(n, True) for n in numbers(3)]


# ---- Exclusive consumers


def test_exclusive_consumer_frees_the_queue_when_cancelled(connection, channel, queue):
    exclusive = consume(connection, channel, queue, exclusive=True)
    with channel_error(403, f"queue '{queue}' in vhost '/' in exclusive use"):
        consume(connection, connection.channel(), queue)
    channel.basic_cancel(exclusive.consumer_tag)
    other = consume(connection, connection.channel(), queue)
    publish(channel, queue, "1")
    other.wait_for(1)


def test_exclusive_consumer_frees_the_queue_with_its_channel(connection, channel, queue):
    consume(connection, channel, queue, exclusive=True)
    channel.close()
    consume(connection, connection.channel(), queue, exclusive=True)


def test_get_is_allowed_beside_an_exclusive_consumer(connection, channel, queue):
    channel.basic_qos(prefetch_count=1)
    publish(channel, queue, "1", "2")
    consume(connection, channel, queue, exclusive=True).wait_for(1)
    assert get_one(connection.channel(), queue).body == b"2"


# ---- Priorities


def test_consumer_of_higher_priority_gets_everything_while_it_can(connection, channel, queue):
    low = consume(connection, connection.channel(), queue, auto_ack=True)
    high = consume(connection, connection.channel(), queue, auto_ack=True, arguments={"x-priority": 10})
    lower = consume(connection, connection.channel(), queue, auto_ack=True, arguments={"x-priority": -5})
    publish(channel, queue, *numbers(20))
    assert high.wait_for(20).bodies == numbers(20)
    low.stay_at(0, during=0.1)
    assert lower == []


def test_consumer_of_lower_priority_gets_what_the_higher_has_no_room_for(connection, channel, queue):
    busy = connection.channel()
    busy.basic_qos(prefetch_count=2)
    high = consume(connection, busy, queue, arguments={"x-priority": 1})
    low = consume(connection, connection.channel(), queue, auto_ack=True)
    publish(channel, queue, *numbers(6))
    assert low.wait_for(4).bodies == [b"3", b"4", b"5", b"6"]
    assert high.bodies == [b"1", b"2"]
    busy.basic_ack(0, multiple=True)
    publish(channel, queue, "7")
    assert high.wait_for(3).bodies[2] == b"7"


def test_consumers_of_equal_priority_take_turns(connection, channel, queue):
    arguments = {"x-priority": 3}
    consumers = [
        consume(connection, connection.channel(), queue, auto_ack=True, arguments=arguments) for _ in range(2)
    ]
    publish(channel, queue, *numbers(20))
    for deliveries in consumers:
        deliveries.wait_for(10)
    assert [len(deliveries) for deliveries in consumers] == [10, 10]


@pytest.mark.parametrize("tag", "bBsuIil")
def test_priority_may_be_any_integer_type(tag, client, queue):
    client.do(1, "basic.consume", queue=queue, arguments={"x-priority": Typed(tag, 5)})


def test_unknown_consumer_arguments_are_ignored(client, queue):
    client.do(1, "basic.consume", queue=queue, arguments={"x-cancel-on-ha-failover": True, "x-note": 5})


# ---- Cancelling


def test_nothing_is_delivered_after_cancel_is_answered(client, channel, queue):
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    assert client.do(1, "basic.cancel", consumer_tag="c").consumer_tag == "c"
    publish(channel, queue, "1")
    client.expect_silence(0.2)
    assert get_one(channel, queue).body == b"1"


def test_cancelling_an_unknown_tag_succeeds(client):
    assert client.do(1, "basic.cancel", consumer_tag="nobody").consumer_tag == "nobody"


def test_cancel_without_answer_takes_effect(client, channel, queue):
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    client.send_method(1, "basic.cancel", consumer_tag="c", nowait=True)
    client.do(1, "basic.qos")
    expect_counts(channel, queue, messages=0, consumers=0)


def test_deliveries_of_a_cancelled_consumer_may_still_be_settled(connection, channel, queue):
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, "1", "2")
    deliveries.wait_for(2)
    channel.basic_cancel(deliveries.consumer_tag)
    expect_counts(channel, queue, messages=0, consumers=0)
    channel.basic_ack(deliveries[0].tag)
    channel.basic_nack(deliveries[1].tag, requeue=True)
    again = get_one(channel, queue)
    assert (again.body, again.redelivered) == (b"2", True)


def test_consumer_is_told_when_its_queue_is_deleted(raw, queue):
    client = raw(1, 2)
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    client.send_method(2, "queue.delete", queue=queue)
    answers = {(m.name, m.channel): m.args for m in (client.read(), client.read())}
    assert answers[("basic.cancel", 1)] == {"consumer_tag": "c", "nowait": True}
    assert answers[("queue.delete-ok", 2)] == {"message_count": 0}
    client.do(1, "basic.qos")


def test_every_consumer_of_a_deleted_queue_is_told(connect, channel, queue):
    told = []
    connections = [connect() for _ in range(2)]
    for each in connections:
        theirs = each.channel()
        theirs.add_on_cancel_callback(lambda frame: told.append(frame.method.consumer_tag))
        for tag in ("a", "b"):
            theirs.basic_consume(queue, lambda *_: None, consumer_tag=tag)
    channel.queue_delete(queue)
    for _ in range(50):
        for each in connections:
            each.process_data_events(0.05)
        if len(told) == 4:
            break
    assert sorted(told) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    "capabilities",
    [{}, FULL_CAPABILITIES | {"consumer_cancel_notify": False}],
    ids=["none", "without_this_one"],
)
def test_consumer_that_cannot_hear_a_cancel_falls_silent(capabilities, raw, channel, queue):
    client = raw(1, start_ok={"client_properties": {"capabilities": capabilities}})
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    channel.queue_delete(queue)
    client.expect_silence(0.3)
    client.do(1, "basic.qos")


def test_tag_of_a_consumer_the_server_cancelled_is_free_again(raw, channel, queue, name):
    client = raw(1)
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    channel.queue_delete(queue)
    client.expect("basic.cancel")
    other = name()
    client.do(1, "queue.declare", queue=other, exclusive=True)
    client.do(1, "basic.consume", queue=other, consumer_tag="c")


def test_cancelling_the_last_consumer_of_an_auto_delete_queue_is_answered(client, connection, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, auto_delete=True)
    client.do(1, "basic.consume", queue=queue, consumer_tag="c")
    client.do(1, "basic.cancel", consumer_tag="c")
    assert not queue_exists(connection, queue)


def test_consumer_count_follows_consumers(connection, channel, queue):
    other = connection.channel()
    tags = []
    for count in (1, 2, 3):
        tags.append(consume(connection, other, queue).consumer_tag)
        expect_counts(channel, queue, messages=0, consumers=count)
    for count in (2, 1, 0):
        other.basic_cancel(tags.pop())
        expect_counts(channel, queue, messages=0, consumers=count)


def test_large_backlog_and_consumer_on_one_connection_do_not_block_each_other(client, queue):
    client.do(1, "basic.consume", queue=queue, no_ack=True)
    client.send(publish_frames(1, "", queue, b"x" * 1000) * 2000)
    for _ in range(2000):
        assert client.expect("basic.deliver").body == b"x" * 1000
