"""Opening, flow, closing, and what a channel takes with it when it goes."""

import pytest

from helpers import (
    assert_close,
    channel_error,
    consume,
    drain,
    expect_channel_close,
    expect_connection_close,
    expect_counts,
    get_eventually,
    get_one,
    publish,
    queue_exists,
)
from raw import BODY_FRAME, HEADER_FRAME, frame, header_payload, method_frame


def test_open_is_answered_with_an_empty_id(raw):
    assert raw().do(1, "channel.open").args == {"channel_id": b""}


@pytest.mark.parametrize("number", [1, 2047, 2048, 65535])
def test_only_the_count_of_channels_is_limited_not_their_numbers(number, raw):
    client = raw(number)
    client.do(number, "basic.qos")


def test_one_channel_more_than_negotiated_closes_the_connection(raw):
    client = raw(5, 9, channel_max=2)
    client.send_method(7, "channel.open")
    text = "number of channels opened (2) has reached the negotiated channel_max (2)"
    expect_connection_close(client, 530, text)


def test_closing_a_channel_makes_room_for_another(raw):
    client = raw(5, 9, channel_max=2)
    client.do(5, "channel.close", reply_code=200)
    client.open_channel(7)
    client.do(7, "basic.qos")


def test_number_of_a_closed_channel_can_be_used_again(client):
    for _ in range(3):
        client.do(1, "channel.close", reply_code=200)
        client.open_channel(1)
    client.do(1, "basic.qos")


def test_flow_on_is_answered(client):
    assert client.do(1, "channel.flow", active=True).active is True


def test_error_on_one_channel_leaves_the_others_alone(connection, name):
    broken, healthy = connection.channel(), connection.channel()
    queue = name()
    healthy.queue_declare(queue, exclusive=True)
    missing = name("missing")
    with channel_error(404, f"no queue '{missing}' in vhost '/'"):
        broken.queue_declare(missing, passive=True)
    publish(healthy, queue, "still here")
    assert get_one(healthy, queue).body == b"still here"


def test_open_before_the_close_is_answered_closes_the_connection(client, name):
    missing = name()
    client.send_method(1, "queue.declare", queue=missing, passive=True)
    client.expect("channel.close")
    client.send_method(1, "channel.open")
    expect_connection_close(client, 504, "second 'channel.open' seen", "channel.open")


def test_close_that_crosses_the_close_of_the_server_is_answered(client, name):
    missing = name()
    client.send_method(1, "queue.declare", queue=missing, passive=True)
    client.expect("channel.close")
    client.do(1, "channel.close", reply_code=200)
    client.send_method(1, "channel.close-ok")
    client.open_channel(1)


def test_everything_after_the_failing_method_is_ignored(client, channel, queue, name):
    declared, missing = name("declared"), name("missing")
    client.do(1, "confirm.select")
    client.send_method(1, "queue.declare", queue=missing, passive=True)
    client.send_method(1, "queue.declare", queue=declared, durable=True)
    client.publish(1, "", queue, b"lost", {"delivery_mode": 2})
    client.send_method(1, "basic.qos")
    expect_channel_close(client, 404, f"no queue '{missing}' in vhost '/'", "queue.declare")
    expect_counts(channel, queue, messages=0, consumers=0)
    assert not queue_exists(channel.connection, declared)


def test_what_was_done_before_the_failing_method_stays(client, channel, queue, name):
    declared, missing = name("declared"), name("missing")
    client.send_method(1, "queue.declare", queue=declared, durable=True, nowait=True)
    client.publish(1, "", queue, b"kept")
    client.send_method(1, "queue.declare", queue=missing, passive=True)
    expect_channel_close(client, 404, f"no queue '{missing}' in vhost '/'", "queue.declare")
    assert queue_exists(channel.connection, declared)
    assert get_one(channel, queue).body == b"kept"


def test_content_frames_after_an_error_do_not_disturb_other_channels(raw, name):
    client = raw(1, 2)
    missing = name()
    client.send_method(1, "queue.declare", queue=missing, passive=True)
    client.send_method(1, "basic.publish", routing_key="nowhere")
    client.send(frame(HEADER_FRAME, 1, header_payload(6)) + frame(BODY_FRAME, 1, b"abc"))
    client.send(frame(BODY_FRAME, 1, b"def"))
    assert_close(client.read(), "channel", 1, 404, f"no queue '{missing}' in vhost '/'", "queue.declare")
    client.do(2, "queue.declare", exclusive=True)
    client.send_method(1, "channel.close-ok")
    client.open_channel(1)


def test_content_of_different_channels_may_interleave(raw, name):
    client = raw(1, 2)
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.send(
        method_frame(1, "basic.publish", routing_key=queue)
        + method_frame(2, "basic.publish", routing_key=queue)
        + frame(HEADER_FRAME, 1, header_payload(4))
        + frame(HEADER_FRAME, 2, header_payload(4))
        + frame(BODY_FRAME, 1, b"on")
        + frame(BODY_FRAME, 2, b"tw")
        + frame(BODY_FRAME, 1, b"e1")
        + frame(BODY_FRAME, 2, b"o2")
    )
    bodies = {get_eventually(client, 1, queue).body for _ in range(2)}
    assert bodies == {b"one1", b"two2"}


def test_closing_a_channel_requeues_in_the_old_order_and_marks_as_redelivered(connection, channel, queue):
    publish(channel, queue, "1", "2", "3")
    doomed = connection.channel()
    assert [get_one(doomed, queue).body for _ in range(2)] == [b"1", b"2"]
    doomed.close()
    returned = [get_one(channel, queue) for _ in range(3)]
    assert [(message.body, message.redelivered) for message in returned] == [
        (b"1", True),
        (b"2", True),
        (b"3", False),
    ]


def test_channel_error_requeues_what_was_unacknowledged(connection, channel, queue):
    publish(channel, queue, "1", "2")
    doomed = connection.channel()
    get_one(doomed, queue)
    with channel_error(406, "unknown delivery tag 99"):
        doomed.basic_ack(99)
        doomed.basic_qos()
    expect_counts(channel, queue, messages=2, consumers=0)
    assert drain(channel, queue) == [b"1", b"2"]


def test_closing_a_channel_removes_its_consumers(connection, channel, queue):
    doomed = connection.channel()
    consume(connection, doomed, queue)
    consume(connection, doomed, queue)
    expect_counts(channel, queue, messages=0, consumers=2)
    doomed.close()
    expect_counts(channel, queue, messages=0, consumers=0)


def test_closing_a_channel_deletes_auto_delete_queues_it_consumed_from(connection, name):
    queue = name()
    doomed = connection.channel()
    doomed.queue_declare(queue, auto_delete=True)
    consume(connection, doomed, queue)
    doomed.close()
    assert not queue_exists(connection, queue)


def test_closing_a_channel_keeps_exclusive_queues_of_the_connection(connection, name):
    queue = name()
    first = connection.channel()
    first.queue_declare(queue, exclusive=True)
    publish(first, queue, "kept")
    first.close()
    assert get_one(connection.channel(), queue).body == b"kept"


def test_messages_published_before_close_are_kept(connection, channel, queue):
    publisher = connection.channel()
    publish(publisher, queue, *[str(number) for number in range(50)])
    publisher.close()
    assert drain(channel, queue) == [str(number).encode() for number in range(50)]


def test_closing_in_the_middle_of_a_message_is_an_error_and_the_message_is_lost(raw, channel, queue):
    client = raw(1)
    client.send_method(1, "basic.publish", routing_key=queue)
    client.send(frame(HEADER_FRAME, 1, header_payload(4)) + frame(BODY_FRAME, 1, b"ha"))
    client.send_method(1, "channel.close")
    text = "expected content body, got non content body frame instead"
    expect_connection_close(client, 505, text, "basic.publish")
    expect_counts(channel, queue, messages=0, consumers=0)


def test_delivery_tags_start_again_on_a_reopened_channel(client, queue, channel):
    publish(channel, queue, "1", "2")
    assert get_eventually(client, 1, queue).delivery_tag == 1
    client.do(1, "channel.close", reply_code=200)
    client.open_channel(1)
    assert get_eventually(client, 1, queue).delivery_tag == 1
