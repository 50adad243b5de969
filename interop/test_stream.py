"""Streams: what they refuse, declaring, publishing, retention and deleting. Reading them is in
test_stream_consume.py."""

import pytest

from helpers import (
    RawConsumer,
    count_of,
    eventually,
    expect_channel_close,
    expect_connection_close,
    get_one,
    numbers,
    place,
    publish_confirmed,
    queue_exists,
)
from raw import FULL_CAPABILITIES, Typed

STREAM = {"x-queue-type": "stream"}
OF_STREAM = " of queue type rabbit_stream_queue"


@pytest.fixture
def queue(declare):
    return declare("stream")


@pytest.fixture
def read(raw):
    """Starts to read a stream over a connection of its own."""

    def start(queue, offset="first", prefetch=200, **options):
        options["arguments"] = {"x-stream-offset": offset} | options.get("arguments", {})
        return RawConsumer(raw(1), queue, prefetch, **options)

    return start


# ---- Declaring


@pytest.mark.parametrize(
    "properties, refused",
    [
        ({"durable": False}, "non-durable"),
        ({"durable": True, "exclusive": True}, "exclusive-owner"),
        ({"durable": True, "auto_delete": True}, "auto-delete"),
        ({"durable": False, "exclusive": True}, "exclusive-owner"),
        ({"durable": True, "exclusive": True, "auto_delete": True}, "auto-delete"),
    ],
    ids=["transient", "exclusive", "auto_delete", "transient_exclusive", "both"],
)
def test_property_a_stream_cannot_have_is_refused(properties, refused, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, arguments=STREAM, **properties)
    expect_channel_close(client, 406, f"invalid property '{refused}' for {place(queue)}", "queue.declare")


def test_server_makes_up_no_names_for_streams(client):
    client.send_method(1, "queue.declare", durable=True, arguments=STREAM)
    text = "Cannot declare a server-named queue for type rabbit_stream_queue"
    expect_channel_close(client, 406, text, "queue.declare")


@pytest.mark.parametrize(
    "argument, value",
    [
        ("x-message-ttl", 1000),
        ("x-expires", 1000),
        ("x-max-length", 10),
        ("x-overflow", "drop-head"),
        ("x-dead-letter-exchange", "amq.direct"),
        ("x-dead-letter-routing-key", "key"),
        ("x-single-active-consumer", True),
        ("x-max-priority", 5),
        ("x-delivery-limit", 5),
        ("x-queue-mode", "lazy"),
        ("x-max-in-memory-length", 5),
        ("x-quorum-initial-group-size", 1),
    ],
)
def test_argument_of_other_types_is_refused(argument, value, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=STREAM | {argument: value})
    text = f"invalid arg '{argument}' for {place(queue)}{OF_STREAM}"
    expect_channel_close(client, 406, text, "queue.declare")


NOT_AN_INTEGER = '"expected integer, got longstr"'


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("x-max-age", "5", "invalid_max_age"),
        ("x-max-age", "0s", "invalid_max_age"),
        ("x-max-age", "5x", "invalid_max_age"),
        ("x-max-age", "5S", "invalid_max_age"),
        ("x-max-age", "5 s", "invalid_max_age"),
        ("x-max-age", "1h30m", "invalid_max_age"),
        ("x-max-age", 5, "{unacceptable_type,signedint}"),
        ("x-max-length-bytes", -1, "{value_negative,-1}"),
        ("x-max-length-bytes", "1000", NOT_AN_INTEGER),
        ("x-stream-max-segment-size-bytes", -1, "{value_negative,-1}"),
        ("x-stream-max-segment-size-bytes", "1000", NOT_AN_INTEGER),
        ("x-initial-cluster-size", 0, "{value_zero,0}"),
        ("x-initial-cluster-size", "1", NOT_AN_INTEGER),
        ("x-queue-leader-locator", "anywhere", "invalid_queue_locator_arg"),
    ],
)
def test_invalid_argument_is_refused(argument, value, error, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=STREAM | {argument: value})
    text = f"invalid arg '{argument}' for {place(queue)}: {error}"
    expect_channel_close(client, 406, text, "queue.declare")


@pytest.mark.parametrize("tag, size", [("l", 3_000_000_001), ("i", 3_000_000_001), ("l", 2**40)])
def test_segments_have_a_largest_size(tag, size, client, name):
    arguments = STREAM | {"x-stream-max-segment-size-bytes": Typed(tag, size)}
    client.send_method(1, "queue.declare", queue=name(), durable=True, arguments=arguments)
    text = "Exceeded max value for x-stream-max-segment-size-bytes"
    expect_channel_close(client, 406, text, "queue.declare")


@pytest.mark.since("3.13", "stream filters")
@pytest.mark.parametrize("size", [0, 15, 256, 100_000])
def test_filters_have_a_smallest_and_a_largest_size(size, client, name):
    arguments = STREAM | {"x-stream-filter-size-bytes": size}
    client.send_method(1, "queue.declare", queue=name(), durable=True, arguments=arguments)
    expect_channel_close(client, 406, "Invalid value for x-stream-filter-size-bytes", "queue.declare")


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_age": "7D", "max_length_bytes": 1_000_000, "stream_max_segment_size_bytes": 100_000},
        {"stream_filter_size_bytes": 16},
        {"stream_filter_size_bytes": 255},
        {"stream_max_segment_size_bytes": Typed("l", 3_000_000_000)},
        {"initial_cluster_size": 1, "queue_leader_locator": "client-local"},
        *({"max_age": f"1{unit}"} for unit in "YMDhms"),
        {"note": "unknown arguments are kept, not looked at"},
    ],
    ids=str,
)
def test_stream_can_be_declared_again_just_as_it_is(arguments, client, name):
    queue = name()
    given = STREAM | {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
    for _ in range(2):
        client.do(1, "queue.declare", queue=queue, durable=True, arguments=given)


@pytest.mark.parametrize(
    "argument, old, new, rest",
    [
        ("x-max-length-bytes", 1000, 2000, "received '2000' but current is '1000'"),
        (
            "x-max-length-bytes",
            None,
            2000,
            "received the value '2000' of type 'signedint' but current is none",
        ),
        ("x-stream-max-segment-size-bytes", 1000, 2000, "received '2000' but current is '1000'"),
        ("x-queue-type", "stream", "quorum", "received 'quorum' but current is 'stream'"),
        ("x-queue-type", "stream", "classic", "received 'classic' but current is 'stream'"),
    ],
)
def test_other_argument_is_not_equivalent(argument, old, new, rest, client, name):
    queue = name()

    def arguments(value):
        return STREAM | ({} if value is None else {argument: value})

    client.do(1, "queue.declare", queue=queue, durable=True, arguments=arguments(old))
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=arguments(new))
    text = f"inequivalent arg '{argument}' for {place(queue)}: {rest}"
    expect_channel_close(client, 406, text, "queue.declare")


@pytest.mark.parametrize(
    "old, new, rest",
    [
        ("1h", "2h", "received '7200000' but current is '3600000'"),
        ("1h", None, "received none but current is the value '3600000' of type 'longstr'"),
        (None, "90s", "received the value '90000' of type 'longstr' but current is none"),
    ],
)
def test_other_age_is_told_in_milliseconds(old, new, rest, client, name, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3 tells the ages as they were given")
    test_other_argument_is_not_equivalent("x-max-age", old, new, rest, client, name)


@pytest.mark.parametrize("old, new", [("1h", "60m"), ("1D", "24h"), ("1Y", "365D"), ("1M", "30D")])
def test_same_age_may_be_said_in_other_words(old, new, client, name, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3 compares the ages as they were given")
    queue = name()
    for age in (old, new):
        client.do(1, "queue.declare", queue=queue, durable=True, arguments=STREAM | {"x-max-age": age})


def test_declare_tells_all_messages_and_no_consumers(connection, channel, queue, read):
    publish_confirmed(connection, queue, *numbers(5))
    # The count may lag behind what is confirmed.
    eventually(lambda: count_of(channel, queue) == 5, within=15)
    consumer = read(queue).wait_for(5)
    consumer.settle("ack", 4, multiple=True)
    consumer.client.do(1, "basic.qos", prefetch_count=1)
    declared = channel.queue_declare(queue, durable=True, arguments=STREAM).method
    assert (declared.queue, declared.message_count, declared.consumer_count) == (queue, 5, 0)


# ---- What streams do not do


@pytest.mark.parametrize("no_ack", [True, False])
def test_getting_is_not_implemented(no_ack, client, queue):
    client.send_method(1, "basic.get", queue=queue, no_ack=no_ack)
    text = f"basic.get not supported by stream queues {place(queue)}"
    expect_connection_close(client, 540, text, "basic.get")


def test_purging_is_not_implemented(client, queue):
    client.send_method(1, "queue.purge", queue=queue)
    expect_connection_close(
        client, 540, f"queue.purge not supported by stream queues {place(queue)}", "queue.purge"
    )


def test_message_does_not_expire(connection, queue, read):
    publish_confirmed(connection, queue, "1", expiration="1")
    connection.sleep(0.1)
    delivered = read(queue).wait_for(1).deliveries[0]
    assert (delivered.body, delivered.properties["expiration"]) == (b"1", "1")


# ---- Publishing


def test_messages_come_through_bindings_and_keep_exchange_and_key(connection, channel, name, queue, read):
    exchange = name("exchange")
    channel.exchange_declare(exchange, "topic")
    channel.queue_bind(queue, exchange, "a.#")
    channel.confirm_delivery()
    channel.basic_publish(exchange, "a.b.c", b"bound", mandatory=True)
    delivered = read(queue).wait_for(1).deliveries[0]
    assert (delivered.exchange, delivered.routing_key, delivered.body) == (exchange, "a.b.c", b"bound")


def test_stream_can_take_dead_letters(connection, channel, declare, queue, read, server):
    if server.is_3x:
        pytest.skip("dead letters do not reach streams of RabbitMQ 3")
    source = declare("classic", dead_letter_exchange="", dead_letter_routing_key=queue)
    publish_confirmed(connection, source, "1")
    channel.basic_reject(get_one(channel, source).tag, requeue=False)
    dead = read(queue).wait_for(1).deliveries[0]
    assert dead.body == b"1"
    assert dead.properties["headers"]["x-first-death-reason"].value == "rejected"


def test_many_messages_are_kept_in_order(client, queue, read):
    client.do(1, "confirm.select")
    for body in numbers(1000):
        client.publish(1, "", queue, body)
    confirmed = 0
    while confirmed < 1000:
        confirmed = max(confirmed, client.expect("basic.ack").delivery_tag)
    consumer = read(queue, prefetch=100)
    for index in range(1000):
        consumer.wait_for(index + 1)
        if index % 50 == 49:
            consumer.settle("ack", index, multiple=True)
    assert consumer.bodies == numbers(1000)


# ---- Retention


def offsets(consumer):
    return [delivery.properties["headers"]["x-stream-offset"].value for delivery in consumer.deliveries]


def first_offset(read, queue):
    consumer = read(queue, prefetch=1).wait_for(1)
    consumer.leave("connection_close")
    return offsets(consumer)[0]


def test_small_segments_alone_lose_nothing(connection, declare, read):
    queue = declare("stream", stream_max_segment_size_bytes=5000)
    bodies = [f"{number:03}".encode() + b"x" * 997 for number in range(60)]
    publish_confirmed(connection, queue, *bodies)
    consumer = read(queue).wait_for(60)
    assert consumer.bodies == bodies
    # RabbitMQ uses up an offset for itself at the start of a segment.
    assert offsets(consumer) == sorted(set(offsets(consumer)))


def test_oldest_segments_are_deleted_beyond_the_length(connection, channel, declare, read):
    queue = declare("stream", max_length_bytes=20_000, stream_max_segment_size_bytes=5000)
    bodies = [f"{number:03}".encode() + b"x" * 997 for number in range(100)]
    publish_confirmed(connection, queue, *bodies)
    eventually(lambda: 0 < count_of(channel, queue) < 100, within=15)
    eventually(lambda: first_offset(read, queue), within=15)
    consumer = read(queue).wait_for(1)
    # Whole segments go, and the newest one always stays.
    left = bodies[bodies.index(consumer.bodies[0]) :]
    assert consumer.wait_for(len(left)).bodies == left


def test_offset_that_is_deleted_means_the_first_that_is_left(connection, declare, read):
    queue = declare("stream", max_length_bytes=20_000, stream_max_segment_size_bytes=5000)
    publish_confirmed(connection, queue, *["x" * 1000] * 100)
    first = eventually(lambda: first_offset(read, queue), within=15)
    assert offsets(read(queue, offset=0, prefetch=1).wait_for(1))[0] >= first


def test_oldest_segments_are_deleted_beyond_the_age(connection, declare, read):
    queue = declare("stream", max_age="1s", stream_max_segment_size_bytes=5000)
    publish_confirmed(connection, queue, *["x" * 1000] * 30)
    connection.sleep(1.5)

    def rolled():
        # Age is looked at when a segment is full.
        publish_confirmed(connection, queue, *["y" * 1000] * 10)
        return first_offset(read, queue)

    assert eventually(rolled, within=20) > 0


# ---- Deleting


@pytest.mark.parametrize("flags", [{}, {"if_unused": True}, {"if_empty": True}])
def test_delete_looks_at_no_flags_and_counts_nothing(flags, client, connection, queue, read):
    publish_confirmed(connection, queue, *numbers(3))
    consumer = read(queue).wait_for(3)
    assert client.do(1, "queue.delete", queue=queue, **flags).message_count == 0
    assert consumer.client.expect("basic.cancel").args == {"consumer_tag": consumer.tag, "nowait": True}
    assert not queue_exists(connection, queue)


def test_consumer_that_cannot_hear_a_cancel_falls_silent(raw, channel, queue):
    capabilities = FULL_CAPABILITIES | {"consumer_cancel_notify": False}
    consumer = RawConsumer(raw(1, start_ok={"client_properties": {"capabilities": capabilities}}), queue, 10)
    channel.queue_delete(queue)
    consumer.stay_silent()
    consumer.client.do(1, "basic.qos", prefetch_count=1)


def test_deliveries_of_a_deleted_stream_may_still_be_settled(connection, channel, queue, read):
    publish_confirmed(connection, queue, *numbers(2))
    consumer = read(queue).wait_for(2)
    channel.queue_delete(queue)
    consumer.client.expect("basic.cancel")
    consumer.settle("ack", 0)
    consumer.settle("nack", 1, requeue=True)
    consumer.client.do(1, "basic.qos", prefetch_count=1)


def test_redeclared_stream_starts_empty(connection, channel, queue, read):
    publish_confirmed(connection, queue, "old")
    channel.queue_delete(queue)
    channel.queue_declare(queue, durable=True, arguments=STREAM)
    publish_confirmed(connection, queue, "new")
    consumer = read(queue).wait_for(1)
    assert (consumer.bodies, offsets(consumer)) == ([b"new"], [0])
