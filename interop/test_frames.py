"""Bytes a client library would never send: broken frames, and contents out of step."""

import re
import struct
from contextlib import suppress

import pytest

from helpers import expect_connection_close, reply_text
from raw import (
    BODY_FRAME,
    HEADER_FRAME,
    HEARTBEAT,
    HEARTBEAT_FRAME,
    METHOD_FRAME,
    Closed,
    frame,
    header_payload,
    longstr,
    method,
    method_frame,
)

NO_CONTENT_EXPECTED = "expected method frame, got non method frame instead"
NO_HEADER = "expected content header for class 60, got non content header frame instead"
NO_BODY = "expected content body, got non content body frame instead"
PUBLISH = method_frame(1, "basic.publish", routing_key="interop-nowhere")
HEADER_OF_2 = frame(HEADER_FRAME, 1, header_payload(2))


@pytest.mark.parametrize(
    "sent, text",
    [
        (
            frame(METHOD_FRAME, 1, method("tx.select"), end=0),
            "type 1, all octets = <<0,90,0,10>>: {invalid_frame_end_marker,0}",
        ),
        (
            frame(BODY_FRAME, 1, b"text", end=65),
            'type 3, all octets = <<"text">>: {invalid_frame_end_marker,65}',
        ),
    ],
    ids=["numbers", "printable"],
)
def test_frame_that_does_not_end_as_a_frame_closes_the_connection(sent, text, client):
    client.send(sent)
    expect_connection_close(client, 501, text)


@pytest.mark.parametrize(
    "payload, octets",
    [
        (b"\x00\x5a\x00\x0a" + b"\xf0" * 16, "first 16 octets = <<0,90,0,10" + ",240" * 12 + ">>"),
        (b"\x00\x55\x00\x0a" + b"\x00" * 12, "all octets = <<0,85,0,10" + ",0" * 12 + ">>"),
        (b"x" * 17, f'first 16 octets = <<"{"x" * 16}">>'),
    ],
    ids=["large_numbers", "sixteen", "printable"],
)
def test_quoted_octets_may_be_wrapped_but_are_all_there(payload, octets, client):
    client.send(frame(METHOD_FRAME, 1, payload, end=207))
    received = client.expect("connection.close")
    unwrapped = re.sub(r"\n +", "", received.reply_text)
    assert received.reply_code == 501
    assert unwrapped == f"FRAME_ERROR - type 1, {octets}: {{invalid_frame_end_marker,207}}"


@pytest.mark.parametrize(
    "frame_type, channel, payload, octets",
    [
        (4, 1, b"", "all octets = <<>>"),
        (4, 0, b"", "all octets = <<>>"),
        (0, 1, b"\x01\x02\x03", "all octets = <<1,2,3>>"),
        (9, 1, b"abc", 'all octets = <<"abc">>'),
        (255, 1, b"x" * 16, f'all octets = <<"{"x" * 16}">>'),
        (7, 1, b"x" * 17, f'first 16 octets = <<"{"x" * 16}">>'),
        (HEARTBEAT_FRAME, 0, b"abc", 'all octets = <<"abc">>'),
        (HEARTBEAT_FRAME, 1, b"\x00", "all octets = <<0>>"),
        (METHOD_FRAME, 1, b"", "all octets = <<>>"),
        (METHOD_FRAME, 1, b"\x00\x32", "all octets = <<0,50>>"),
        (HEADER_FRAME, 1, b"\x00\x3c\x00\x00", "all octets = <<0,60,0,0>>"),
    ],
)
def test_frame_of_unknown_shape_closes_the_connection(frame_type, channel, payload, octets, client):
    client.send(frame(frame_type, channel, payload))
    expect_connection_close(client, 501, f"type {frame_type}, {octets}: unknown_frame")


@pytest.mark.parametrize(
    "sent, text",
    [
        (frame(HEARTBEAT_FRAME, 1, b""), "type 8, all octets = <<>>"),
        (frame(HEARTBEAT_FRAME, 9, b""), "type 8, all octets = <<>>"),
        (frame(HEADER_FRAME, 0, header_payload(0)), "type 2, all octets = <<0,60,0,0,0,0,0,0,0,0,0,0,0,0>>"),
        (frame(BODY_FRAME, 0, b"abc"), 'type 3, all octets = <<"abc">>'),
        (frame(BODY_FRAME, 0, b"abc" * 10), 'type 3, first 16 octets = <<"abcabcabcabcabca">>'),
    ],
    ids=["heartbeat_on_a_channel", "heartbeat_on_no_channel", "header_on_0", "body_on_0", "long_body_on_0"],
)
def test_frame_on_the_wrong_channel_is_unexpected(sent, text, client):
    client.send(sent)
    expect_connection_close(client, 505, text)


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "announced_only"])
@pytest.mark.parametrize("frame_max", [8192, 131072])
def test_frame_larger_than_negotiated_closes_the_connection(complete, frame_max, raw):
    client = raw(1, frame_max=frame_max)
    size = frame_max + 1
    sent = frame(METHOD_FRAME, 1, b"x" * size)
    client.send(sent if complete else sent[:7])
    received = client.read()
    text = f"type 1, all octets = <<>>: {{frame_too_large,{size},{frame_max - 8}}}"
    assert (received.name, received.reply_code) == ("connection.close", 501)
    assert received.reply_text == reply_text(501, text)
    assert client.read_until_closed(within=8) == b""


def test_body_of_frame_max_bytes_is_within_the_grace(raw, name):
    client = raw(1, frame_max=8192)
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.send_method(1, "basic.publish", routing_key=queue)
    client.send(frame(HEADER_FRAME, 1, header_payload(8192)) + frame(BODY_FRAME, 1, b"x" * 8192))
    received = client.get(1, queue)
    assert (received.body, received.body_frame_sizes) == (b"x" * 8192, [8184, 8])


@pytest.mark.parametrize(
    "payload, undecoded, failed",
    [
        (method("queue.declare", queue="foo")[:8], "0,0,3,102", "queue.declare"),
        (method("tx.select") + b"zz", "122,122", "tx.select"),
        (method("basic.qos") + b"zz", "0,0,0,0,0,0,0,122,122", "basic.qos"),
        (method("basic.ack")[:-3], "0,0,0,0,0,0", "basic.ack"),
        (
            method("queue.declare", queue="q")[:-4] + b"\x00\x00\x00\x09",
            "0,0,1,113,0,0,0,0,9",
            "queue.declare",
        ),
        (method("channel.flow")[:4], "", "channel.flow"),
    ],
    ids=[
        "cut_off",
        "too_long_without_fields",
        "too_long",
        "cut_off_number",
        "table_longer_than_the_frame",
        "no_bits",
    ],
)
def test_method_whose_fields_do_not_fit_closes_the_connection(payload, undecoded, failed, client):
    client.send(frame(METHOD_FRAME, 1, payload))
    expect_connection_close(client, 501, f"cannot decode <<{undecoded}>>", failed)


@pytest.mark.parametrize("name_bytes", [b"\xff\xfe", b"ok\xc3"], ids=["invalid", "cut_off"])
def test_short_string_that_is_not_utf8_closes_the_connection(name_bytes, client):
    client.send_method(1, "queue.declare", queue=name_bytes)
    expect_connection_close(client, 501, "Malformed UTF-8 in shortstr")


@pytest.mark.parametrize(
    "payload, channel",
    [
        (b"\x00\x63\x00\x0a", 1),
        (b"\x00\x63\x00\x0a", 0),
        (b"\x00\x63\x00\x0a", 5),
        (b"\x00\x32\x00\x63", 1),
        (method("queue.declare", queue="q", arguments=b"\x01aZ\x00"), 1),
        (method("queue.declare", queue="q", arguments=b"\x05a"), 1),
        (method("queue.declare", queue="q", arguments=b"\x01aS\x00\x00\x00\x09x"), 1),
    ],
    ids=[
        "unknown_class",
        "unknown_class_on_0",
        "unknown_class_on_no_channel",
        "unknown_method",
        "unknown_table_tag",
        "table_key_too_long",
        "table_value_too_long",
    ],
)
def test_method_nobody_knows_or_broken_table_drops_the_connection_without_a_close(payload, channel, client):
    client.send(frame(METHOD_FRAME, channel, payload))
    assert client.read_until_closed(within=2) == b""


@pytest.mark.parametrize(
    "sent, text, failed",
    [
        (frame(HEADER_FRAME, 1, header_payload(0)), NO_CONTENT_EXPECTED, None),
        (frame(BODY_FRAME, 1, b"abc"), NO_CONTENT_EXPECTED, None),
        (frame(HEADER_FRAME, 5, header_payload(0)), NO_CONTENT_EXPECTED, None),
        (
            PUBLISH + frame(HEADER_FRAME, 1, header_payload(0)) + frame(BODY_FRAME, 1, b""),
            NO_CONTENT_EXPECTED,
            None,
        ),
        (PUBLISH + method_frame(1, "tx.select"), NO_HEADER, "basic.publish"),
        (PUBLISH + method_frame(1, "channel.close"), NO_HEADER, "basic.publish"),
        (PUBLISH + frame(BODY_FRAME, 1, b"abc"), NO_HEADER, "basic.publish"),
        (PUBLISH + frame(HEADER_FRAME, 1, header_payload(0, weight=1)), NO_HEADER, "basic.publish"),
        (
            PUBLISH + frame(HEADER_FRAME, 1, header_payload(0, class_id=50)),
            "expected content header for class 60, got one for class 50 instead",
            "basic.publish",
        ),
        (PUBLISH + HEADER_OF_2 + method_frame(1, "tx.select"), NO_BODY, "basic.publish"),
        (PUBLISH + HEADER_OF_2 + HEADER_OF_2, NO_BODY, "basic.publish"),
    ],
    ids=[
        "header_alone",
        "body_alone",
        "header_on_a_channel_not_open",
        "body_after_an_empty_message",
        "method_for_header",
        "close_for_header",
        "body_for_header",
        "header_with_weight",
        "header_of_another_class",
        "method_for_body",
        "header_for_body",
    ],
)
def test_content_out_of_step_closes_the_connection(sent, text, failed, client):
    client.send(sent)
    expect_connection_close(client, 505, text, failed)


@pytest.mark.parametrize(
    "sent, text",
    [
        (
            PUBLISH + frame(HEADER_FRAME, 1, header_payload((512 << 20) + 1)),
            "content body size 536870913 exceeds maximum allowed size 536870912",
        ),
        (
            PUBLISH + frame(HEADER_FRAME, 1, header_payload(2**63)),
            "content body size 9223372036854775808 exceeds maximum allowed size 536870912",
        ),
        (
            PUBLISH + HEADER_OF_2 + frame(BODY_FRAME, 1, b"abc"),
            "content body frame exceeds remaining content size",
        ),
        (
            PUBLISH + HEADER_OF_2 + frame(BODY_FRAME, 1, b"a") + frame(BODY_FRAME, 1, b"bc"),
            "content body frame exceeds remaining content size",
        ),
    ],
    ids=["absurd_size", "negative_size", "body_too_long", "second_body_too_long"],
)
def test_content_of_impossible_size_closes_the_connection(sent, text, client, server):
    if server.is_3x:
        pytest.skip("3.x does not check this and waits for ever")
    client.send(sent)
    expect_connection_close(client, 501, text, "basic.publish")


@pytest.mark.parametrize(
    "properties",
    [
        header_payload(0) + b"zz",
        struct.pack(">HHQH", 60, 0, 0, 1 << 15),
        struct.pack(">HHQH", 60, 0, 0, 1 << 13) + longstr(b"\x01aZ\x00"),
    ],
    ids=["left_over_bytes", "missing_property", "broken_header_table"],
)
def test_properties_that_cannot_be_decoded_are_an_internal_error(properties, client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.send_method(1, "basic.publish", routing_key=queue)
    client.send(frame(HEADER_FRAME, 1, properties))
    expect_connection_close(client, 541, "")


def test_empty_body_frames_within_a_body_are_accepted(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.send_method(1, "basic.publish", routing_key=queue)
    client.send(frame(HEADER_FRAME, 1, header_payload(2)))
    for part in (b"", b"a", b"", b"b"):
        client.send(frame(BODY_FRAME, 1, part))
    assert client.get(1, queue).body == b"ab"


def test_heartbeats_between_the_frames_of_a_message_are_accepted(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.send(
        method_frame(1, "basic.publish", routing_key=queue)
        + HEARTBEAT
        + frame(HEADER_FRAME, 1, header_payload(2))
        + HEARTBEAT
        + frame(BODY_FRAME, 1, b"a")
        + HEARTBEAT
        + frame(BODY_FRAME, 1, b"b")
    )
    assert client.get(1, queue).body == b"ab"


def test_message_that_arrives_byte_by_byte_is_understood(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    sent = (
        method_frame(1, "basic.publish", routing_key=queue)
        + frame(HEADER_FRAME, 1, header_payload(5, {"content_type": "text/plain"}))
        + frame(BODY_FRAME, 1, b"piece")
    )
    for at in range(len(sent)):
        client.send(sent[at : at + 1])
    received = client.get(1, queue)
    assert (received.body, received.properties) == (b"piece", {"content_type": "text/plain"})


def test_deeply_nested_table_does_not_bring_the_broker_down(dial, raw):
    client = dial()
    client.read_start()
    nested = b""
    while len(nested) < 7000:
        nested = b"\x01aF" + longstr(nested)
    client.send(
        frame(
            METHOD_FRAME,
            0,
            method(
                "connection.start-ok",
                client_properties=nested,
                mechanism="PLAIN",
                response=client.plain_response(),
                locale="en_US",
            ),
        )
    )
    with suppress(Closed, TimeoutError):
        client.read(within=1)
    raw(1).do(1, "basic.qos")
