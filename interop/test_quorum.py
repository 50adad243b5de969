"""Quorum queues: what they refuse, what they count, settling, limits, expiry and priorities.
Returned messages, delivery limits and timeouts are in test_quorum_redelivery.py."""

import time

import pika.exceptions
import pytest

from helpers import (
    consume,
    drain,
    eventually,
    expect_channel_close,
    expect_connection_close,
    expect_counts,
    get,
    get_one,
    numbers,
    place,
    publish,
    publish_confirmed,
    queue_exists,
)
from raw import Typed

QUORUM = {"x-queue-type": "quorum"}


@pytest.fixture
def queue(declare):
    return declare("quorum")


# ---- Declaring


@pytest.mark.parametrize(
    "properties, refused",
    [
        ({"durable": False}, "non-durable"),
        ({"durable": True, "exclusive": True}, "exclusive-owner"),
        ({"durable": True, "auto_delete": True}, "auto-delete"),
        ({"durable": False, "exclusive": True}, "exclusive-owner"),
        ({"durable": False, "auto_delete": True}, "auto-delete"),
        ({"durable": True, "exclusive": True, "auto_delete": True}, "auto-delete"),
    ],
    ids=["transient", "exclusive", "auto_delete", "transient_exclusive", "transient_auto_delete", "both"],
)
def test_property_a_quorum_queue_cannot_have_is_refused(properties, refused, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, arguments=QUORUM, **properties)
    expect_channel_close(client, 406, f"invalid property '{refused}' for {place(queue)}", "queue.declare")


def test_server_makes_up_no_names_for_quorum_queues(client):
    client.send_method(1, "queue.declare", durable=True, arguments=QUORUM)
    text = "Cannot declare a server-named queue for type rabbit_quorum_queue"
    expect_channel_close(client, 406, text, "queue.declare")


@pytest.mark.parametrize(
    "argument, value, rest",
    [
        ("x-max-priority", 5, " of queue type rabbit_quorum_queue"),
        ("x-queue-mode", "lazy", " of queue type rabbit_quorum_queue"),
        ("x-queue-version", 2, " of queue type rabbit_quorum_queue"),
        ("x-max-age", "1D", " of queue type rabbit_quorum_queue"),
        ("x-stream-max-segment-size-bytes", 1000, " of queue type rabbit_quorum_queue"),
        ("x-quorum-initial-group-size", 0, ": {value_zero,0}"),
        ("x-quorum-initial-group-size", "1", ': "expected integer, got longstr"'),
        ("x-dead-letter-strategy", "never", ": invalid_dlx_strategy"),
        ("x-overflow", "drop-tail", ": invalid_overflow"),
        ("x-queue-leader-locator", "anywhere", ": invalid_queue_locator_arg"),
        ("x-message-ttl", -1, ": {value_negative,-1}"),
        ("x-expires", 0, ": {value_zero,0}"),
        ("x-max-length", -1, ": {value_negative,-1}"),
        ("x-max-in-memory-length", -1, ": {value_negative,-1}"),
        ("x-single-active-consumer", "true", ": {unacceptable_type,longstr}"),
    ],
)
def test_invalid_argument_is_refused(argument, value, rest, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=QUORUM | {argument: value})
    expect_channel_close(client, 406, f"invalid arg '{argument}' for {place(queue)}{rest}", "queue.declare")


@pytest.mark.since("4.3", "consumer timeout of a queue")
@pytest.mark.parametrize("argument", ["x-consumer-timeout", "x-consumer-disconnected-timeout"])
@pytest.mark.parametrize(
    "value, rest", [(-1, "{value_negative,-1}"), ("1s", '"expected integer, got longstr"')]
)
def test_invalid_timeout_is_refused(argument, value, rest, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=QUORUM | {argument: value})
    expect_channel_close(client, 406, f"invalid arg '{argument}' for {place(queue)}: {rest}", "queue.declare")


def test_queue_can_be_declared_again_just_as_it_is(channel, name):
    queue = name()
    arguments = QUORUM | {
        "x-delivery-limit": 3,
        "x-quorum-initial-group-size": 1,
        "x-max-in-memory-length": 10,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "nowhere",
        "x-dead-letter-strategy": "at-most-once",
        "x-max-length": 100,
        "x-overflow": "drop-head",
    }
    for _ in range(2):
        channel.queue_declare(queue, durable=True, arguments=arguments)


@pytest.mark.parametrize(
    "argument, old, new, rest",
    [
        ("x-delivery-limit", 3, 4, "received '4' but current is '3'"),
        ("x-delivery-limit", 3, None, "received none but current is the value '3' of type 'signedint'"),
        (
            "x-delivery-limit",
            None,
            4,
            "received the value '4' of type 'signedint' but current is none",
        ),
        (
            "x-single-active-consumer",
            None,
            True,
            "received the value 'true' of type 'bool' but current is none",
        ),
        ("x-message-ttl", 100, 200, "received '200' but current is '100'"),
        ("x-queue-type", "quorum", "classic", "received 'classic' but current is 'quorum'"),
        ("x-queue-type", "classic", "quorum", "received 'quorum' but current is 'classic'"),
    ],
)
def test_other_argument_is_not_equivalent(argument, old, new, rest, client, name):
    queue = name()

    def arguments(value):
        return QUORUM | (
            {} if value is None else {argument: Typed("I", value) if type(value) is int else value}
        )

    client.do(1, "queue.declare", queue=queue, durable=True, arguments=arguments(old))
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=arguments(new))
    text = f"inequivalent arg '{argument}' for {place(queue)}: {rest}"
    expect_channel_close(client, 406, text, "queue.declare")


def test_quorum_queue_is_no_classic_queue(client, queue, server):
    client.send_method(1, "queue.declare", queue=queue, durable=True)
    rest = (
        "received none but current is the value 'quorum' of type 'longstr'"
        if server.is_3x
        else "received 'classic' but current is 'quorum'"
    )
    text = f"inequivalent arg 'x-queue-type' for {place(queue)}: {rest}"
    expect_channel_close(client, 406, text, "queue.declare")


def test_argument_the_type_does_not_know_is_not_compared(client, queue):
    client.do(
        1, "queue.declare", queue=queue, durable=True, arguments=QUORUM | {"x-max-priority": 5, "x-note": 1}
    )


def test_declare_and_passive_declare_tell_messages_and_consumers(connection, channel, queue):
    publish_confirmed(connection, queue, *numbers(4))
    expect_counts(channel, queue, messages=4, consumers=0)
    other = connection.channel()
    other.basic_qos(prefetch_count=1)
    consume(connection, other, queue).wait_for(1)
    expect_counts(channel, queue, messages=3, consumers=1)
    declared = channel.queue_declare(queue, durable=True, arguments=QUORUM).method
    assert (declared.queue, declared.message_count, declared.consumer_count) == (queue, 3, 1)


# ---- Deleting and purging


@pytest.mark.parametrize("flag", ["if_unused", "if_empty"])
def test_conditional_delete_is_not_implemented(flag, client, connection, queue):
    client.send_method(1, "queue.delete", queue=queue, **{flag: True})
    text = (
        f"cannot delete {place(queue)}. queue.delete operations with {flag.replace('_', '-')} flag set"
        " are not supported by quorum queues"
    )
    expect_connection_close(client, 540, text, "queue.delete")
    assert queue_exists(connection, queue)


def test_conditional_delete_of_a_missing_queue_succeeds(channel, name):
    assert channel.queue_delete(name(), if_unused=True, if_empty=True).method.message_count == 0


def test_delete_counts_ready_messages_only(connection, channel, queue):
    publish_confirmed(connection, queue, *numbers(3))
    get_one(channel, queue)
    assert channel.queue_delete(queue).method.message_count == 2
    assert not queue_exists(connection, queue)


def test_messages_of_a_deleted_queue_may_still_be_settled(connection, channel, queue):
    publish_confirmed(connection, queue, "1", "2")
    first, second = get_one(channel, queue), get_one(channel, queue)
    channel.queue_delete(queue)
    channel.basic_ack(first.tag)
    channel.basic_reject(second.tag, requeue=True)
    channel.basic_qos(prefetch_count=1)


def test_redeclared_queue_starts_empty(connection, channel, queue):
    publish_confirmed(connection, queue, "old")
    channel.queue_delete(queue)
    channel.queue_declare(queue, durable=True, arguments=QUORUM)
    assert get(channel, queue) is None


def test_purge_takes_and_counts_ready_messages_only(connection, channel, queue):
    publish_confirmed(connection, queue, *numbers(3))
    held = get_one(channel, queue)
    assert channel.queue_purge(queue).method.message_count == 2
    assert get(channel, queue) is None
    channel.basic_nack(held.tag, requeue=True)
    assert get_one(channel, queue).body == b"1"


def test_purge_takes_returned_messages_too(connection, channel, queue):
    publish_confirmed(connection, queue, *numbers(3))
    get_one(channel, queue)
    channel.basic_nack(0, multiple=True, requeue=True)
    expect_counts(channel, queue, messages=3, consumers=0)
    assert channel.queue_purge(queue).method.message_count == 3
    assert get(channel, queue) is None


# ---- Publishing, getting and consuming


@pytest.mark.parametrize("delivery_mode", [None, 1, 2])
def test_confirmed_message_is_there_whatever_its_delivery_mode(
    delivery_mode, connection, channel, queue, server
):
    publish_confirmed(connection, queue, "kept", delivery_mode=delivery_mode, headers={"h": "v"}, type="t")
    message = get_one(channel, queue)
    assert (message.body, message.redelivered) == (b"kept", False)
    headers = {"h": "v"} | ({"x-delivery-count": 0} if server.is_3x else {})
    properties = message.properties
    assert (properties.delivery_mode, properties.headers, properties.type) == (delivery_mode, headers, "t")


def test_get_tells_how_many_messages_are_left(connection, channel, queue):
    publish_confirmed(connection, queue, *numbers(3))
    assert [get_one(channel, queue).method.message_count for _ in range(3)] == [2, 1, 0]
    assert get(channel, queue) is None


def test_get_without_acknowledgement_settles_at_once(connection, channel, queue):
    publish_confirmed(connection, queue, "1", "2")
    assert get_one(channel, queue, auto_ack=True).body == b"1"
    channel.close()
    assert drain(connection.channel(), queue) == [b"2"]


def test_messages_are_delivered_in_the_order_published(connection, channel, queue):
    deliveries = consume(connection, channel, queue, auto_ack=True)
    publish(channel, queue, *numbers(200))
    assert deliveries.wait_for(200, within=20).bodies == numbers(200)
    assert not any(delivery.redelivered for delivery in deliveries)


def test_prefetch_limits_what_is_unacknowledged(connection, channel, queue):
    publish_confirmed(connection, queue, *numbers(10))
    channel.basic_qos(prefetch_count=3)
    deliveries = consume(connection, channel, queue)
    deliveries.wait_for(3).stay_at(3)
    channel.basic_ack(deliveries[0].tag)
    deliveries.wait_for(4).stay_at(4)
    channel.basic_ack(deliveries[3].tag, multiple=True)
    assert deliveries.wait_for(7).stay_at(7).bodies == numbers(7)


def test_prefetch_does_not_hold_back_consumers_without_acknowledgement(connection, channel, queue):
    channel.basic_qos(prefetch_count=1)
    deliveries = consume(connection, channel, queue, auto_ack=True)
    publish(channel, queue, *numbers(50))
    deliveries.wait_for(50, within=20)


def test_consuming_with_a_global_prefetch_is_not_implemented(client, queue):
    client.do(1, "basic.qos", prefetch_count=5, global_qos=True)
    client.send_method(1, "basic.consume", queue=queue)
    expect_connection_close(client, 540, f"{place(queue)} does not support global qos", "basic.consume")


def test_getting_with_a_global_prefetch_works(connection, channel, queue):
    publish_confirmed(connection, queue, "1")
    channel.basic_qos(prefetch_count=5, global_qos=True)
    assert get_one(channel, queue).body == b"1"


def test_exclusive_consumer_excludes_nobody(connection, channel, queue):
    first = consume(connection, connection.channel(), queue, auto_ack=True, exclusive=True)
    second = consume(connection, connection.channel(), queue, auto_ack=True, exclusive=True)
    third = consume(connection, connection.channel(), queue, auto_ack=True)
    publish(channel, queue, *numbers(30))
    for deliveries in (first, second, third):
        deliveries.wait_for(1)


def test_consumers_take_turns(connection, channel, queue):
    consumers = [consume(connection, connection.channel(), queue, auto_ack=True) for _ in range(2)]
    publish_confirmed(connection, queue, *numbers(10))
    for deliveries in consumers:
        deliveries.wait_for(5)
    assert sorted(len(deliveries) for deliveries in consumers) == [5, 5]


def test_deliveries_of_a_cancelled_consumer_may_still_be_settled(connection, channel, queue):
    deliveries = consume(connection, channel, queue)
    publish_confirmed(connection, queue, "1", "2")
    deliveries.wait_for(2)
    channel.basic_cancel(deliveries.consumer_tag)
    assert get(channel, queue) is None
    channel.basic_ack(deliveries[0].tag)
    channel.basic_nack(deliveries[1].tag, requeue=True)
    again = get_one(channel, queue)
    assert (again.body, again.redelivered) == (b"2", True)


def test_rejected_message_is_dead_lettered(connection, channel, declare, name):
    graveyard = declare("quorum")
    queue = declare("quorum", dead_letter_exchange="", dead_letter_routing_key=graveyard)
    publish_confirmed(connection, queue, "1")
    channel.basic_reject(get_one(channel, queue).tag, requeue=False)
    dead = get_one(channel, graveyard, auto_ack=True)
    assert dead.body == b"1"
    death = dead.properties.headers["x-death"][0]
    assert (death["queue"], death["reason"], death["count"]) == (queue, "rejected", 1)


def test_dead_letter_is_moved_at_least_once_on_demand(connection, channel, declare):
    graveyard = declare("quorum")
    queue = declare(
        "quorum",
        dead_letter_exchange="",
        dead_letter_routing_key=graveyard,
        dead_letter_strategy="at-least-once",
        overflow="reject-publish",
    )
    publish_confirmed(connection, queue, "1", "2")
    first, second = get_one(channel, queue), get_one(channel, queue)
    channel.basic_reject(first.tag, requeue=False)
    assert get_one(channel, graveyard, auto_ack=True).body == b"1"
    channel.basic_nack(second.tag, requeue=False)
    assert get_one(channel, graveyard, auto_ack=True).body == b"2"
    assert get(channel, queue) is None


# ---- Length limits


def test_longest_ready_messages_are_dropped_at_the_head(connection, channel, declare):
    queue = declare("quorum", max_length=3)
    publish_confirmed(connection, queue, *numbers(8))
    expect_counts(channel, queue, messages=3, consumers=0)
    assert drain(channel, queue) == numbers(3, start=6)


def test_unacknowledged_messages_do_not_count_towards_the_length(connection, channel, declare):
    queue = declare("quorum", max_length=2)
    publish_confirmed(connection, queue, *numbers(2))
    held = [get_one(channel, queue) for _ in range(2)]
    publish_confirmed(connection, queue, *numbers(2, start=3))
    assert [message.body for message in held] + drain(channel, queue) == numbers(4)


def test_dropped_messages_are_dead_lettered_with_reason_maxlen(connection, channel, declare):
    graveyard = declare("classic")
    queue = declare("quorum", max_length=1, dead_letter_exchange="", dead_letter_routing_key=graveyard)
    publish_confirmed(connection, queue, *numbers(3))
    dead = [get_one(channel, graveyard) for _ in range(2)]
    assert [message.body for message in dead] == numbers(2)
    assert {message.properties.headers["x-first-death-reason"] for message in dead} == {"maxlen"}


def test_length_in_bytes_is_limited(connection, channel, declare):
    queue = declare("quorum", max_length_bytes=10_000)
    publish_confirmed(connection, queue, *[f"{number:04}" + "x" * 996 for number in range(30)])
    kept = [int(body[:4]) for body in drain(channel, queue)]
    assert 1 <= len(kept) <= 10
    assert kept == list(range(30 - len(kept), 30))


@pytest.mark.parametrize("bound", [{"max_length": 3}, {"max_length_bytes": 3000}], ids=["count", "bytes"])
def test_full_queue_refuses_publishes_until_it_is_emptied(bound, connection, channel, declare):
    queue = declare("quorum", overflow="reject-publish", **bound)
    publisher = connection.channel()
    publisher.confirm_delivery()
    accepted = 0
    # What is in flight may overshoot the limit, so how many are taken is not exact.
    with pytest.raises(pika.exceptions.NackError):
        for _ in range(200):
            publish(publisher, queue, b"x" * 1000)
            accepted += 1
    assert accepted >= 2
    assert len(drain(channel, queue)) == accepted

    def accepts():
        try:
            publish(publisher, queue, "again")
            return True
        except pika.exceptions.NackError:
            return False

    eventually(accepts)
    assert get_one(channel, queue).body == b"again"


def test_reject_publish_dlx_drops_the_head(connection, channel, declare):
    queue = declare("quorum", max_length=2, overflow="reject-publish-dlx")
    publish_confirmed(connection, queue, *numbers(4))
    assert drain(channel, queue) == numbers(2, start=3)


# ---- Expiry


@pytest.mark.parametrize(
    "queue_ttl, message_ttl", [(300, None), (None, "300"), (60_000, "300"), (300, "60000")]
)
def test_expired_message_is_gone(queue_ttl, message_ttl, connection, channel, declare):
    queue = declare("quorum", **({} if queue_ttl is None else {"message_ttl": queue_ttl}))
    publish_confirmed(connection, queue, "1", expiration=message_ttl)
    eventually(lambda: channel.queue_declare(queue, passive=True).method.message_count == 0)
    assert get(channel, queue) is None


@pytest.mark.rabbitmq_only("expired messages leave wherever they stand")
def test_message_behind_one_that_lives_longer_does_not_expire_yet(connection, channel, queue):
    publish_confirmed(connection, queue, "long")
    publish_confirmed(connection, queue, "short", expiration="100")
    time.sleep(0.5)
    expect_counts(channel, queue, messages=2, consumers=0)
    assert drain(channel, queue) == [b"long"]


def test_expired_message_is_dead_lettered_with_reason_expired(connection, channel, declare):
    graveyard = declare("quorum")
    queue = declare("quorum", message_ttl=100, dead_letter_exchange="", dead_letter_routing_key=graveyard)
    publish_confirmed(connection, queue, "1", "2")
    dead = [get_one(channel, graveyard) for _ in range(2)]
    assert [message.body for message in dead] == [b"1", b"2"]
    death = dead[0].properties.headers["x-death"][0]
    assert (death["queue"], death["reason"], death["count"]) == (queue, "expired", 1)


def test_unacknowledged_message_expires_only_once_returned(connection, channel, declare):
    queue = declare("quorum", message_ttl=300)
    publish_confirmed(connection, queue, "1")
    held = get_one(channel, queue)
    time.sleep(0.5)
    channel.basic_nack(held.tag, requeue=True)
    eventually(lambda: channel.queue_declare(queue, passive=True).method.message_count == 0)
    assert get(channel, queue) is None


def test_unused_queue_expires(connection, declare):
    queue = declare("quorum", expires=500)
    eventually(lambda: not queue_exists(connection, queue), within=30)


def test_queue_with_a_consumer_does_not_expire_until_it_is_gone(connection, channel, declare):
    queue = declare("quorum", expires=500)
    tag = consume(connection, channel, queue).consumer_tag
    connection.sleep(7)
    assert queue_exists(connection, queue)
    channel.basic_cancel(tag)
    eventually(lambda: not queue_exists(connection, queue), within=30)


def test_getting_keeps_a_queue_from_expiring(connection, channel, declare):
    queue = declare("quorum", expires=3000)
    until = time.monotonic() + 9
    while time.monotonic() < until:
        get(channel, queue)
        connection.sleep(0.2)
    assert queue_exists(connection, queue)


# ---- Priorities


@pytest.mark.since("4.3", "strict priorities")
def test_higher_priority_is_served_first(connection, channel, queue):
    for priority in (0, 31, 7, 4, 15, 5):
        publish_confirmed(connection, queue, str(priority), priority=priority)
    assert drain(channel, queue) == [b"31", b"15", b"7", b"5", b"4", b"0"]


@pytest.mark.since("4.3", "strict priorities")
def test_consumer_is_sent_higher_priorities_first(connection, channel, queue):
    for priority in (0, 31, 7, 4):
        publish_confirmed(connection, queue, str(priority), priority=priority)
    channel.basic_qos(prefetch_count=1)
    deliveries = consume(connection, channel, queue)
    for count, priority in [(1, 20), (2, 2), (3, 30)]:
        deliveries.wait_for(count)
        publish_confirmed(connection, queue, str(priority), priority=priority)
        channel.basic_ack(deliveries[-1].tag)
    for count in (4, 5, 6):
        channel.basic_ack(deliveries.wait_for(count)[-1].tag)
    assert deliveries.wait_for(7).bodies == [b"31", b"20", b"7", b"30", b"4", b"2", b"0"]


@pytest.mark.since("4.3", "strict priorities")
def test_equal_priorities_keep_their_order(connection, channel, queue):
    for body, priority in [("a1", 1), ("b1", 9), ("a2", 1), ("b2", 9), ("a3", 1)]:
        publish_confirmed(connection, queue, body, priority=priority)
    assert drain(channel, queue) == [b"b1", b"b2", b"a1", b"a2", b"a3"]


@pytest.mark.since("4.3", "strict priorities")
def test_message_without_priority_counts_as_four(connection, channel, queue):
    for body, priority in [("three", 3), ("none", None), ("four", 4), ("five", 5)]:
        publish_confirmed(connection, queue, body, priority=priority)
    assert drain(channel, queue) == [b"five", b"none", b"four", b"three"]


@pytest.mark.since("4.3", "strict priorities")
def test_priority_above_the_highest_counts_as_the_highest_and_is_passed_on(connection, channel, queue):
    for priority in (31, 255, 32, 30):
        publish_confirmed(connection, queue, str(priority), priority=priority)
    messages = [get_one(channel, queue) for _ in range(4)]
    assert [message.body for message in messages] == [b"31", b"255", b"32", b"30"]
    assert [message.properties.priority for message in messages] == [31, 255, 32, 30]


@pytest.mark.since("4.3", "strict priorities")
def test_returned_message_goes_before_any_priority(connection, channel, queue):
    publish_confirmed(connection, queue, "low", priority=0)
    held = get_one(channel, queue)
    publish_confirmed(connection, queue, "high", priority=31)
    channel.basic_nack(held.tag, requeue=True)
    assert [get_one(channel, queue).body for _ in range(2)] == [b"low", b"high"]


@pytest.mark.since("4.3", "strict priorities")
def test_message_of_highest_priority_is_dropped_first(connection, channel, declare):
    queue = declare("quorum", max_length=2)
    for body, priority in [("low", 1), ("high", 9), ("middle", 5)]:
        publish_confirmed(connection, queue, body, priority=priority)
    assert drain(channel, queue) == [b"middle", b"low"]


@pytest.mark.since("4.3", "strict priorities")
def test_each_priority_expires_at_its_own_head(connection, channel, queue):
    publish_confirmed(connection, queue, "high", priority=9)
    publish_confirmed(connection, queue, "low", priority=1, expiration="100")
    expect_counts(channel, queue, messages=1, consumers=0)
    assert drain(channel, queue) == [b"high"]


# ---- Consumers that are refused


def test_invalid_priority_of_a_consumer_is_refused(client, queue):
    client.send_method(1, "basic.consume", queue=queue, arguments={"x-priority": "high"})
    text = f"invalid arg 'x-priority' for {place(queue)}: \"expected integer, got longstr\""
    expect_channel_close(client, 406, text, "basic.consume")


@pytest.mark.parametrize("argument", ["x-stream-offset", "x-stream-filter", "x-stream-match-unfiltered"])
def test_stream_argument_of_a_consumer_is_refused(argument, client, queue, server):
    if server.is_3x and argument != "x-stream-offset":
        pytest.skip("stream filters came to RabbitMQ later")
    client.send_method(1, "basic.consume", queue=queue, arguments={argument: "first"})
    text = f"invalid arg '{argument}' for {place(queue)} of queue type rabbit_quorum_queue"
    expect_channel_close(client, 406, text, "basic.consume")
