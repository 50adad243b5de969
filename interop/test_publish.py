"""Bodies, properties and header tables on their way through; returns and refusals."""

import math

import pika.exceptions
import pytest

from helpers import channel_error, connection_error, drain, expect_channel_close, get_one, publish
from raw import PROPERTIES, Typed

SIMPLE_PROPERTIES = {
    "content_type": "application/json",
    "content_encoding": "gzip",
    "delivery_mode": 2,
    "priority": 7,
    "correlation_id": "corr-1",
    "reply_to": "some.queue",
    "expiration": "60000",
    "message_id": "id-1",
    "timestamp": 1_700_000_000,
    "type": "event",
    "user_id": "guest",
    "app_id": "interop",
    "cluster_id": "old",
}


@pytest.fixture
def own_queue(client, name):
    """An exclusive queue of the raw client."""
    return client.do(1, "queue.declare", queue=name(), exclusive=True).queue


def round_trip(client, queue, body=b"", properties=None):
    client.publish(1, "", queue, body, properties)
    received = client.get(1, queue)
    assert received.name == "basic.get-ok"
    return received


# ---- Properties


@pytest.mark.parametrize("key", SIMPLE_PROPERTIES)
def test_property_arrives_alone_and_unchanged(key, client, own_queue):
    properties = {key: SIMPLE_PROPERTIES[key]}
    assert round_trip(client, own_queue, properties=properties).properties == properties


def test_all_properties_arrive_together(client, own_queue):
    properties = SIMPLE_PROPERTIES | {"headers": {"k": Typed("S", "v")}}
    assert set(properties) == {key for key, _ in PROPERTIES}
    assert round_trip(client, own_queue, properties=properties).properties == properties


def test_message_without_properties_arrives_without_any(client, own_queue):
    assert round_trip(client, own_queue, b"bare").properties == {}


def test_empty_header_table_stays_an_empty_header_table(client, own_queue):
    assert round_trip(client, own_queue, properties={"headers": {}}).properties == {"headers": {}}


@pytest.mark.parametrize(
    "key, _kind", [p for p in PROPERTIES if p[1] == "shortstr" and p[0] not in ("expiration", "user_id")]
)
@pytest.mark.parametrize("value", ["", "x" * 255, "ünï-🐇"], ids=["empty", "longest", "unicode"])
def test_string_property_of_any_length_arrives(key, _kind, value, client, own_queue):
    assert round_trip(client, own_queue, properties={key: value}).properties == {key: value}


@pytest.mark.parametrize("mode", [0, 1, 2, 255])
def test_delivery_mode_is_passed_on_as_it_is(mode, client, own_queue, server):
    if server.is_3x and mode not in (1, 2):
        client.publish(1, "", own_queue, b"", {"delivery_mode": mode})
        text = f"invalid message: {{delivery_mode_unknown,{mode}}}"
        return expect_channel_close(client, 406, text, "basic.publish")
    assert round_trip(client, own_queue, properties={"delivery_mode": mode}).properties == {
        "delivery_mode": mode
    }


@pytest.mark.parametrize("priority", [0, 9, 255])
def test_any_priority_is_passed_on(priority, client, own_queue):
    assert round_trip(client, own_queue, properties={"priority": priority}).properties == {
        "priority": priority
    }


@pytest.mark.parametrize("timestamp", [0, 1, 2**31, 2**40])
def test_timestamp_is_passed_on(timestamp, client, own_queue):
    assert round_trip(client, own_queue, properties={"timestamp": timestamp}).properties == {
        "timestamp": timestamp
    }


def test_largest_expiration_is_accepted(client, own_queue):
    properties = {"expiration": "315360000000"}
    assert round_trip(client, own_queue, properties=properties).properties == properties


def test_delivery_says_exchange_and_key_as_published(client, own_queue, name):
    exchange = name("exchange")
    client.do(1, "exchange.declare", exchange=exchange, type="topic")
    client.do(1, "queue.bind", queue=own_queue, exchange=exchange, routing_key="a.#")
    client.publish(1, exchange, "a.b.c", b"")
    received = client.get(1, own_queue)
    assert (received.exchange, received.routing_key) == (exchange, "a.b.c")


# ---- Header tables


HEADER_VALUES = {
    "true": Typed("t", True),
    "false": Typed("t", False),
    "int8": Typed("b", -128),
    "uint8": Typed("B", 255),
    "int16": Typed("s", -32768),
    "uint16": Typed("u", 65535),
    "int32": Typed("I", -(2**31)),
    "uint32": Typed("i", 2**32 - 1),
    "int64": Typed("l", -(2**63)),
    "largest_int64": Typed("l", 2**63 - 1),
    "float": Typed("f", 1.5),
    "double": Typed("d", math.pi),
    "decimal": Typed("D", (2, 314)),
    "string": Typed("S", "ünï-🐇"),
    "empty_string": Typed("S", ""),
    "long_string": Typed("S", "x" * 70_000),
    "bytes": Typed("x", b"\x00\xff\xfe"),
    "timestamp": Typed("T", 1_700_000_000),
    "void": Typed("V", None),
    "table": Typed("F", {"inner": Typed("I", 1), "other": Typed("F", {"deep": Typed("t", True)})}),
    "empty_table": Typed("F", {}),
    "array": Typed("A", [Typed("I", 1), Typed("S", "two"), Typed("A", [Typed("V", None)]), Typed("F", {})]),
    "empty_array": Typed("A", []),
}


@pytest.mark.parametrize("value", HEADER_VALUES.values(), ids=HEADER_VALUES)
def test_header_value_keeps_type_and_value(value, client, own_queue):
    properties = {"headers": {"key": value}}
    assert round_trip(client, own_queue, properties=properties).properties == properties


def test_all_header_values_arrive_in_one_table(client, own_queue):
    properties = {"headers": HEADER_VALUES}
    assert round_trip(client, own_queue, properties=properties).properties == properties


def test_header_keys_may_be_any_text(client, own_queue):
    headers = {key: Typed("I", 1) for key in ("", "x" * 255, "ünï-🐇", "with space")}
    assert round_trip(client, own_queue, properties={"headers": headers}).properties["headers"] == headers


def test_second_64_bit_tag_arrives_as_a_64_bit_integer(client, own_queue):
    received = round_trip(client, own_queue, properties={"headers": {"n": Typed("L", 2**40)}})
    tag, number = received.properties["headers"]["n"]
    assert tag in "lL"
    assert number == 2**40


def test_header_table_larger_than_small_frames_arrives(raw, name):
    client = raw(1)
    queue = client.do(1, "queue.declare", queue=name(), exclusive=True).queue
    headers = {f"key-{number}": Typed("S", "v" * 100) for number in range(500)}
    client.publish(1, "", queue, b"", {"headers": headers})
    assert client.get(1, queue).properties["headers"] == headers


def test_pika_headers_arrive_unchanged(channel, queue):
    headers = {
        "string": "ü",
        "int": 5,
        "big": 2**40,
        "bool": True,
        "none": None,
        "list": [1, "a", {"b": 2}],
        "table": {"x": {"y": "z"}},
    }
    publish(channel, queue, "m", headers=headers)
    assert get_one(channel, queue).properties.headers == headers


# ---- Bodies


@pytest.mark.parametrize("size", [0, 1, 131063, 131064, 131065, 262128, 1 << 20, 5 << 20])
def test_body_of_any_size_arrives_in_frames_that_fit(size, client, own_queue):
    body = bytes(range(256)) * (size // 256) + b"\xce" * (size % 256)
    received = round_trip(client, own_queue, body)
    assert received.body == body
    assert all(0 < part <= client.frame_max - 8 for part in received.body_frame_sizes)
    assert len(received.body_frame_sizes) == math.ceil(size / (client.frame_max - 8))


def test_large_body_is_split_by_the_limit_of_the_receiver(raw, channel, queue):
    body = bytes(range(256)) * 4096
    publish(channel, queue, body)
    receiver = raw(1, frame_max=8192)
    receiver.do(1, "basic.consume", queue=queue, no_ack=True)
    received = receiver.expect("basic.deliver")
    assert received.body == body
    assert received.body_frame_sizes[:-1] == [8184] * (len(body) // 8184)


def test_body_sent_in_many_small_frames_arrives_in_large_ones(raw, channel, queue):
    sender = raw(1, frame_max=8192)
    body = bytes(1 << 20)
    sender.publish(1, "", queue, body)
    assert get_one(channel, queue).body == body


def test_one_large_message_reaches_several_queues(connection, channel, name):
    exchange = name("exchange")
    queues = [name(str(number)) for number in range(3)]
    channel.exchange_declare(exchange, "fanout")
    for queue in queues:
        channel.queue_declare(queue, exclusive=True)
        channel.queue_bind(queue, exchange)
    body = b"abcdefgh" * (1 << 17)
    channel.basic_publish(exchange, "", body)
    assert all(drain(channel, queue) == [body] for queue in queues)


def test_message_larger_than_the_limit_closes_the_channel(client, own_queue, server):
    limit = server.max_message_size
    client.publish(1, "", own_queue, bytes(limit + 1))
    text = f"message size {limit + 1} is larger than configured max size {limit}"
    expect_channel_close(client, 406, text, "basic.publish")
    assert client.get(1, own_queue).name == "basic.get-empty"


def test_many_messages_keep_their_order(channel, queue):
    bodies = [str(number).encode() for number in range(2000)]
    publish(channel, queue, *bodies)
    assert drain(channel, queue) == bodies


# ---- Mandatory


def test_mandatory_message_without_a_queue_is_returned_as_it_was(client, name):
    missing = name("missing")
    properties = {"content_type": "text/plain", "delivery_mode": 2, "headers": {"k": Typed("I", 5)}}
    client.publish(1, "", missing, b"return me", properties, mandatory=True)
    returned = client.expect("basic.return")
    assert returned.args == {
        "reply_code": 312,
        "reply_text": "NO_ROUTE",
        "exchange": "",
        "routing_key": missing,
    }
    assert (returned.properties, returned.body) == (properties, b"return me")


def test_mandatory_message_without_a_binding_is_returned(client, name):
    exchange = name("exchange")
    client.do(1, "exchange.declare", exchange=exchange, type="topic")
    client.publish(1, exchange, "a.b", b"", mandatory=True)
    returned = client.expect("basic.return")
    assert (returned.reply_code, returned.exchange, returned.routing_key) == (312, exchange, "a.b")


def test_large_mandatory_message_is_returned_in_frames_that_fit(raw, name):
    client = raw(1, frame_max=8192)
    client.publish(1, "", name("missing"), bytes(100_000), mandatory=True)
    returned = client.expect("basic.return")
    assert returned.body == bytes(100_000)
    assert max(returned.body_frame_sizes) <= 8184


def test_mandatory_message_with_a_queue_is_not_returned(client, own_queue):
    client.publish(1, "", own_queue, b"kept", mandatory=True)
    assert client.get(1, own_queue).body == b"kept"


def test_message_nobody_wants_is_dropped_without_a_word(client, name):
    client.publish(1, "", name("missing"), b"dropped")
    client.do(1, "basic.qos")


def test_pika_raises_for_a_returned_message(channel, name):
    channel.confirm_delivery()
    with pytest.raises(pika.exceptions.UnroutableError) as caught:
        channel.basic_publish("", name("missing"), b"back", mandatory=True)
    (returned,) = caught.value.messages
    assert (returned.method.reply_code, returned.body) == (312, b"back")


# ---- Refusals as pika sees them


def test_pika_sees_a_missing_exchange_as_a_closed_channel(channel, name):
    missing = name("missing")
    with channel_error(404, f"no exchange '{missing}' in vhost '/'"):
        channel.basic_publish(missing, "", b"")
        channel.basic_qos()


def test_pika_sees_not_implemented_as_a_closed_connection(connection):
    channel = connection.channel()
    with connection_error(540, "prefetch_size!=0 (10)"):
        channel.basic_qos(prefetch_size=10)


def test_refused_publish_leaves_nothing_behind(client, channel, queue):
    client.publish(1, "", queue, b"never", {"expiration": "soon"})
    expect_channel_close(client, 406, "invalid expiration 'soon': no_integer", "basic.publish")
    assert drain(channel, queue) == []


def test_own_user_id_is_accepted_and_delivered(client, own_queue):
    assert round_trip(client, own_queue, properties={"user_id": client.user}).properties == {
        "user_id": client.user
    }
