"""Reading streams: where a consumer starts, what it is told, credit, filters, and refusals."""

import time

import pytest

from helpers import (
    RawConsumer,
    expect_channel_close,
    expect_connection_close,
    numbers,
    place,
    publish_confirmed,
)
from raw import Typed, plain


def offsets(consumer):
    return [delivery.properties["headers"]["x-stream-offset"].value for delivery in consumer.deliveries]


@pytest.fixture
def queue(declare):
    return declare("stream")


@pytest.fixture
def read(raw, queue):
    """Starts to read the stream over a connection of its own."""

    def start(offset=None, prefetch=100, **arguments):
        given = {f"x-stream-{key.replace('_', '-')}": value for key, value in arguments.items()}
        if offset is not None:
            given["x-stream-offset"] = offset
        return RawConsumer(raw(1), queue, prefetch, arguments=given)

    return start


# ---- Where reading starts


@pytest.mark.parametrize(
    "offset, expected",
    [
        ("first", 0),
        (b"first", 0),
        ("last", 4),
        (0, 0),
        (3, 3),
        (Typed("b", 3), 3),
        (Typed("B", 3), 3),
        (Typed("s", 3), 3),
        (Typed("u", 3), 3),
        (Typed("i", 3), 3),
        (Typed("l", 3), 3),
        (-1, 0),
        (Typed("T", 0), 0),
        ("1Y", 0),
        ("2M", 0),
        ("7D", 0),
        ("1h", 0),
        ("30m", 0),
        ("600s", 0),
    ],
    ids=str,
)
def test_reading_starts_at_the_offset(offset, expected, connection, queue, read):
    # Each message is confirmed, and so on its own in a chunk.
    publish_confirmed(connection, queue, *numbers(5))
    consumer = read(offset).wait_for(5 - expected)
    assert consumer.bodies == numbers(5)[expected:]
    assert offsets(consumer) == list(range(expected, 5))
    consumer.stay_silent(0.1)


@pytest.mark.parametrize("offset", [None, "next", 5], ids=["absent", "next", "at_the_end"])
def test_reading_starts_with_what_comes_next(offset, connection, queue, read):
    publish_confirmed(connection, queue, *numbers(5))
    consumer = read(offset)
    consumer.stay_silent(0.2)
    publish_confirmed(connection, queue, "new")
    consumer.wait_for(1)
    assert (consumer.bodies, offsets(consumer)) == ([b"new"], [5])


def test_reading_beyond_the_end_waits_for_that_offset(connection, queue, read):
    publish_confirmed(connection, queue, *numbers(5))
    consumer = read(8)
    publish_confirmed(connection, queue, *numbers(5, start=6))
    consumer.wait_for(2)
    assert (consumer.bodies, offsets(consumer)) == ([b"9", b"10"], [8, 9])


def test_timestamp_means_the_first_chunk_since_then(connection, queue, read):
    publish_confirmed(connection, queue, "old")
    connection.sleep(2.1)
    since = int(time.time())
    publish_confirmed(connection, queue, "new", "newer")
    assert read(Typed("T", since)).wait_for(2).bodies == [b"new", b"newer"]
    assert read(Typed("T", since - 3600)).wait_for(3).bodies == [b"old", b"new", b"newer"]


def test_timestamp_to_come_means_what_comes_next(connection, queue, read):
    publish_confirmed(connection, queue, "old")
    consumer = read(Typed("T", int(time.time()) + 3600))
    consumer.stay_silent(0.2)
    publish_confirmed(connection, queue, "new")
    assert consumer.wait_for(1).bodies == [b"new"]


def test_interval_means_the_first_chunk_since_that_long_ago(connection, queue, read):
    publish_confirmed(connection, queue, "old")
    connection.sleep(5.5)
    publish_confirmed(connection, queue, "new")
    assert read("5s").wait_for(1).bodies == [b"new"]


@pytest.mark.parametrize("offset", ["first", "last", "next", 0, 7, "1h", Typed("T", 0)], ids=str)
def test_empty_stream_can_be_read_from_anywhere(offset, connection, queue, read):
    consumer = read(offset)
    consumer.stay_silent(0.1)
    publish_confirmed(connection, queue, *numbers(9))
    expected = numbers(9)[7:] if offset == 7 else numbers(9)
    assert consumer.wait_for(len(expected)).bodies == expected


# ---- What is delivered


def test_delivery_tells_the_offset_as_64_bit_integer_and_is_never_redelivered(connection, queue, read):
    publish_confirmed(connection, queue, "1", "2")
    for _ in range(2):
        consumer = read("first").wait_for(2)
        assert [delivery.properties["headers"] for delivery in consumer.deliveries] == [
            {"x-stream-offset": Typed("l", 0)},
            {"x-stream-offset": Typed("l", 1)},
        ]
        assert [delivery.redelivered for delivery in consumer.deliveries] == [False, False]
        assert [delivery.delivery_tag for delivery in consumer.deliveries] == [1, 2]
        assert consumer.deliveries[0].args["routing_key"] == queue


def test_properties_and_headers_are_kept(client, queue, read):
    properties = {
        "content_type": "text/plain",
        "content_encoding": "utf-8",
        "delivery_mode": 2,
        "priority": 5,
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "timestamp": 1_700_000_000,
        "type": "t",
        "user_id": "guest",
        "app_id": "a",
    }
    headers = {"text": "ünï", "number": Typed("l", 2**40), "flag": True, "x-own": "x", "float": 1.5}
    client.do(1, "confirm.select")
    client.publish(1, "", queue, b"body", properties | {"headers": headers})
    client.expect("basic.ack")
    delivered = read("first").wait_for(1).deliveries[0].properties
    assert plain(delivered.pop("headers")) == plain(headers) | {"x-stream-offset": 0}
    assert delivered == properties


@pytest.mark.parametrize("size", [0, 1, 131_064, 300_000])
def test_body_of_any_size_is_delivered_whole(size, connection, queue, read):
    body = bytes(index % 251 for index in range(size))
    publish_confirmed(connection, queue, body, "next")
    assert read("first").wait_for(2).bodies == [body, b"next"]


# ---- Credit


@pytest.mark.parametrize(
    "settle, fields",
    [
        ("ack", {}),
        ("nack", {"requeue": True}),
        ("nack", {"requeue": False}),
        ("reject", {"requeue": True}),
        ("reject", {"requeue": False}),
    ],
    ids=["ack", "nack_requeue", "nack", "reject_requeue", "reject"],
)
def test_settling_only_makes_room_for_the_next_message(settle, fields, connection, queue, read, server):
    if server.is_3x and settle != "ack":
        pytest.skip("RabbitMQ 3 implements nothing but basic.ack for streams")
    publish_confirmed(connection, queue, *numbers(4))
    consumer = read("first", prefetch=1)
    for index in range(4):
        consumer.wait_for(index + 1).stay_silent(0.1)
        consumer.settle(settle, index, **fields)
    consumer.stay_silent(0.1)
    assert consumer.bodies == numbers(4)
    assert not any(delivery.redelivered for delivery in consumer.deliveries)
    assert read("first").wait_for(4).bodies == numbers(4)


def test_recovering_redelivers_nothing_but_makes_room(connection, queue, read, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3 fails to recover messages of streams")
    publish_confirmed(connection, queue, *numbers(5))
    consumer = read("first", prefetch=2).wait_for(2)
    consumer.client.send_method(1, "basic.recover", requeue=True)
    # The next messages may come before or after the answer.
    received = [consumer.client.read() for _ in range(3)]
    bodies = [method.body for method in received if method.name == "basic.deliver"]
    assert bodies == [b"3", b"4"]
    assert [method.name for method in received if method.body is None] == ["basic.recover-ok"]
    consumer.stay_silent(0.1)


@pytest.mark.parametrize("prefetch", [1, 3, 7])
def test_prefetch_limits_what_is_unsettled(prefetch, connection, queue, read):
    publish_confirmed(connection, queue, *numbers(10))
    consumer = read("first", prefetch=prefetch).wait_for(prefetch).stay_silent(0.2)
    consumer.settle("ack", prefetch - 1, multiple=True)
    more = min(prefetch, 10 - prefetch)
    assert consumer.wait_for(prefetch + more).stay_silent(0.2).bodies == numbers(prefetch + more)


def test_unknown_delivery_tag_is_refused(connection, queue, read):
    publish_confirmed(connection, queue, "1")
    consumer = read("first").wait_for(1)
    consumer.settle("ack", 0)
    consumer.settle("ack", 0)
    expect_channel_close(consumer.client, 406, "unknown delivery tag 1", "basic.ack")


def test_consumers_read_independently(connection, queue, read):
    publish_confirmed(connection, queue, *numbers(4))
    slow, fast, late = read("first", prefetch=1), read("first"), read(2)
    assert fast.wait_for(4).bodies == numbers(4)
    assert late.wait_for(2).bodies == [b"3", b"4"]
    assert slow.wait_for(1).stay_silent(0.1).bodies == [b"1"]


def test_consumers_of_one_channel_read_independently(client, connection, queue):
    publish_confirmed(connection, queue, *numbers(3))
    client.do(1, "basic.qos", prefetch_count=10)
    bodies = {"first": [], "last": []}
    for tag in bodies:
        client.send_method(
            1, "basic.consume", queue=queue, consumer_tag=tag, arguments={"x-stream-offset": tag}
        )
    for _ in range(2 + 4):
        received = client.read()
        if received.name == "basic.deliver":
            bodies[received.consumer_tag].append(received.body)
    assert bodies == {"first": numbers(3), "last": [b"3"]}


def test_exclusive_consumer_excludes_nobody(raw, connection, queue):
    publish_confirmed(connection, queue, "1")
    for exclusive in (True, True, False):
        consumer = RawConsumer(raw(1), queue, 10, exclusive=exclusive, arguments={"x-stream-offset": "first"})
        assert consumer.wait_for(1).bodies == [b"1"]


def test_nothing_is_delivered_after_cancel_is_answered(connection, queue, read):
    publish_confirmed(connection, queue, *numbers(3))
    consumer = read("first", prefetch=2).wait_for(2)
    consumer.leave("cancel")
    consumer.settle("ack", 1, multiple=True)
    publish_confirmed(connection, queue, "4")
    consumer.stay_silent()
    again = RawConsumer(
        consumer.client, queue, 10, consumer_tag=consumer.tag, arguments={"x-stream-offset": 2}
    )
    assert again.wait_for(2).bodies == [b"3", b"4"]


@pytest.mark.parametrize("how", ["channel_close", "connection_close", "socket_loss"])
def test_lost_consumer_leaves_the_stream_as_it_is(how, connection, queue, read):
    publish_confirmed(connection, queue, *numbers(3))
    waiting = read("next")
    read("first").wait_for(3).leave(how)
    waiting.stay_silent(0.2)
    assert read("first").wait_for(3).bodies == numbers(3)


# ---- Refusals


def test_prefetch_must_be_limited(client, queue, server):
    client.send_method(1, "basic.consume", queue=queue)
    of = f"'{place(queue)}'" if server.is_3x else f"stream {place(queue)}"
    expect_channel_close(client, 406, f"consumer prefetch count is not set for {of}", "basic.consume")


def test_lifted_prefetch_is_none(client, queue):
    client.do(1, "basic.qos", prefetch_count=10)
    client.do(1, "basic.qos", prefetch_count=0)
    assert client.call(1, "basic.consume", queue=queue).reply_code == 406


def test_consuming_without_acknowledgement_is_not_implemented(client, queue, server):
    client.do(1, "basic.qos", prefetch_count=10)
    client.send_method(1, "basic.consume", queue=queue, no_ack=True)
    of = f"stream queues {place(queue)}" if server.is_3x else f"stream {place(queue)}"
    text = f"automatic acknowledgement not supported by {of}"
    expect_connection_close(client, 540, text, "basic.consume")


def test_missing_prefetch_is_noticed_before_missing_acknowledgement(client, queue):
    assert client.call(1, "basic.consume", queue=queue, no_ack=True).reply_code == 406


def test_consuming_with_a_global_prefetch_is_not_implemented(client, queue):
    client.do(1, "basic.qos", prefetch_count=10)
    client.do(1, "basic.qos", prefetch_count=10, global_qos=True)
    client.send_method(1, "basic.consume", queue=queue)
    expect_connection_close(client, 540, f"{place(queue)} does not support global qos", "basic.consume")


@pytest.mark.since("3.11", "a refusal of such offsets that is no internal error")
@pytest.mark.parametrize("offset", ["foo", "", "0s", "-1s", "1", "First", "1h30m", "h"])
def test_offset_that_makes_no_sense_is_refused(offset, client, queue):
    client.do(1, "basic.qos", prefetch_count=10)
    client.send_method(1, "basic.consume", queue=queue, arguments={"x-stream-offset": offset})
    value = f'<<"{offset}">>' if offset else "<<>>"
    text = (
        f"invalid arg 'x-stream-offset' for {place(queue)}: {{invalid_stream_offset_arg,{{longstr,{value}}}}}"
    )
    expect_channel_close(client, 406, text, "basic.consume")


@pytest.mark.parametrize("value", [5, -1, "high"])
def test_priority_of_a_consumer_is_refused(value, client, queue):
    client.do(1, "basic.qos", prefetch_count=10)
    client.send_method(1, "basic.consume", queue=queue, arguments={"x-priority": value})
    text = f"invalid arg 'x-priority' for {place(queue)} of queue type rabbit_stream_queue"
    expect_channel_close(client, 406, text, "basic.consume")


@pytest.mark.since("4.3", "x-consumer-timeout")
def test_timeout_of_a_consumer_is_refused(client, queue):
    client.do(1, "basic.qos", prefetch_count=10)
    client.send_method(1, "basic.consume", queue=queue, arguments={"x-consumer-timeout": 1000})
    text = f"invalid arg 'x-consumer-timeout' for {place(queue)} of queue type rabbit_stream_queue"
    expect_channel_close(client, 406, text, "basic.consume")


# ---- Filters
# A filter passes whole chunks on, and some that do not match at all: what it must do is to deliver
# everything that matches, in order.


def publish_filtered(connection, queue, *values, start=0):
    """Publishes messages with these filter values, numbered; returns {value: bodies}."""
    bodies = {}
    for number, value in enumerate(values, start):
        headers = {} if value is None else {"x-stream-filter-value": value}
        body = f"{number} {value}".encode()
        publish_confirmed(connection, queue, body, headers=headers)
        bodies.setdefault(value, []).append(body)
    return bodies


def wait_for_all(consumer, expected):
    while not set(expected) <= set(consumer.bodies):
        consumer.wait_for(len(consumer.deliveries) + 1)
        consumer.settle("ack", -1)
    assert [body for body in consumer.bodies if body in expected] == expected


@pytest.mark.since("3.13", "stream filters")
@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("apple", ["apple"]),
        (["apple"], ["apple"]),
        (["apple", "cherry"], ["apple", "cherry"]),
        (["cherry", 5, True, "nothing"], ["cherry"]),
    ],
    ids=["text", "list", "several", "other_types_in_the_list"],
)
def test_everything_that_matches_is_delivered(wanted, expected, connection, queue, read):
    bodies = publish_filtered(connection, queue, *["apple", "banana", "cherry", None, "apple"] * 5)
    matching = sorted(sum((bodies[value] for value in expected), []), key=lambda body: int(body.split()[0]))
    wait_for_all(read("first", filter=wanted), matching)


@pytest.mark.since("3.13", "stream filters")
def test_filter_holds_back_what_cannot_match(connection, queue, read):
    publish_filtered(connection, queue, *["banana"] * 30, None)
    bodies = publish_filtered(connection, queue, "apple", start=100)
    consumer = read("first", filter="apple")
    wait_for_all(consumer, bodies["apple"])
    assert len(consumer.deliveries) < 31


@pytest.mark.since("3.13", "stream filters")
def test_messages_without_a_value_match_on_demand(connection, queue, read):
    bodies = publish_filtered(connection, queue, *["apple", None, "banana"] * 4)
    matching = sorted(bodies["apple"] + bodies[None], key=lambda body: int(body.split()[0]))
    wait_for_all(read("first", filter="apple", match_unfiltered=True), matching)


@pytest.mark.since("3.13", "stream filters")
def test_filter_holds_for_messages_to_come(connection, queue, read):
    consumer = read("next", filter=["banana"])
    bodies = publish_filtered(connection, queue, *["apple", "banana", None] * 4)
    wait_for_all(consumer, bodies["banana"])


@pytest.mark.since("3.13", "stream filters")
def test_filter_goes_with_an_offset(connection, queue, read):
    bodies = publish_filtered(connection, queue, *["apple", "banana"] * 5)
    consumer = read(4, filter="apple")
    wait_for_all(consumer, bodies["apple"][2:])
    assert min(offsets(consumer)) >= 4


@pytest.mark.since("3.13", "stream filters")
@pytest.mark.parametrize(
    "value",
    [
        5,
        True,
        pytest.param({"a": "b"}, marks=pytest.mark.rabbitmq_only("a table filters by headers")),
    ],
    ids=["number", "bool", "table"],
)
def test_filter_of_another_type_is_none(value, connection, queue, read, server):
    if isinstance(value, dict) and not server.is_rabbitmq:
        pytest.skip("a table filters by headers, as in LavinMQ")
    bodies = publish_filtered(connection, queue, "apple", None, "banana")
    everything = [*bodies["apple"], *bodies[None], *bodies["banana"]]
    assert read("first", filter=value).wait_for(3).bodies == everything


@pytest.mark.since("3.13", "stream filters")
def test_filter_value_stays_in_the_headers(connection, queue, read):
    publish_filtered(connection, queue, "apple")
    headers = read("first").wait_for(1).deliveries[0].properties["headers"]
    assert headers == {"x-stream-filter-value": Typed("S", "apple"), "x-stream-offset": Typed("l", 0)}
