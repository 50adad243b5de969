"""Getting, acknowledging, rejecting, requeueing and recovering."""

import pytest

from helpers import channel_error, consume, drain, expect_counts, get, get_one, publish


def all_of(channel, queue, count):
    return [get_one(channel, queue) for _ in range(count)]


def states(messages):
    return [(message.body, message.redelivered) for message in messages]


# ---- Get


def test_get_tells_how_many_are_left(client, queue):
    for body in (b"1", b"2", b"3"):
        client.publish(1, "", queue, body)
    answers = [client.get(1, queue, no_ack=False) for _ in range(3)]
    assert [answer.args for answer in answers] == [
        {
            "delivery_tag": tag,
            "redelivered": False,
            "exchange": "",
            "routing_key": queue,
            "message_count": 3 - tag,
        }
        for tag in (1, 2, 3)
    ]
    assert [answer.body for answer in answers] == [b"1", b"2", b"3"]


def test_get_from_an_empty_queue_is_empty(client, queue):
    answer = client.get(1, queue)
    assert (answer.name, answer.args) == ("basic.get-empty", {"cluster_id": ""})


def test_get_without_acknowledgement_settles_at_once(connection, channel, queue):
    publish(channel, queue, "1")
    assert get_one(channel, queue, auto_ack=True).body == b"1"
    channel.close()
    assert get(connection.channel(), queue) is None


def test_get_with_acknowledgement_holds_the_message(connection, channel, queue):
    publish(channel, queue, "1")
    get_one(channel, queue)
    other = connection.channel()
    assert get(other, queue) is None
    channel.close()
    assert states([get_one(other, queue)]) == [(b"1", True)]


def test_pipelined_gets_are_answered_one_by_one_in_order(client, queue):
    for number in range(20):
        client.publish(1, "", queue, str(number).encode())
    for _ in range(21):
        client.send_method(1, "basic.get", queue=queue, no_ack=True)
    answers = [client.read() for _ in range(21)]
    assert [answer.body for answer in answers[:20]] == [str(number).encode() for number in range(20)]
    assert answers[20].name == "basic.get-empty"


# ---- Ack


def test_acknowledged_message_is_gone(connection, channel, queue):
    publish(channel, queue, "1")
    channel.basic_ack(get_one(channel, queue).tag)
    channel.close()
    expect_counts(connection.channel(), queue, messages=0, consumers=0)


def test_multiple_ack_settles_all_up_to_its_tag(connection, channel, queue):
    publish(channel, queue, "1", "2", "3", "4")
    messages = all_of(channel, queue, 4)
    channel.basic_ack(messages[2].tag, multiple=True)
    channel.close()
    assert drain(connection.channel(), queue) == [b"4"]


def test_multiple_ack_skips_what_was_settled_in_between(connection, channel, queue):
    publish(channel, queue, "1", "2", "3")
    messages = all_of(channel, queue, 3)
    channel.basic_ack(messages[1].tag)
    channel.basic_ack(messages[2].tag, multiple=True)
    channel.close()
    assert drain(connection.channel(), queue) == []


def test_multiple_ack_of_tag_zero_settles_everything(connection, channel, queue):
    publish(channel, queue, "1", "2", "3")
    all_of(channel, queue, 3)
    channel.basic_ack(0, multiple=True)
    channel.close()
    assert drain(connection.channel(), queue) == []


@pytest.mark.parametrize("settle", ["ack", "nack"])
def test_multiple_of_tag_zero_with_nothing_outstanding_is_no_error(settle, client):
    client.send_method(1, f"basic.{settle}", multiple=True)
    client.do(1, "basic.qos")


def test_multiple_ack_reaches_over_queues_and_consumers_of_the_channel(connection, channel, name):
    queues = [channel.queue_declare(name(), exclusive=True).method.queue for _ in range(2)]
    other = connection.channel()
    for queue in queues:
        publish(channel, queue, "1")
        get_one(other, queue)
    other.basic_ack(2, multiple=True)
    other.close()
    assert [drain(channel, queue) for queue in queues] == [[], []]


def test_acknowledging_out_of_order_leaves_the_rest(connection, channel, queue):
    publish(channel, queue, "1", "2", "3", "4", "5")
    messages = all_of(channel, queue, 5)
    for index in (3, 1):
        channel.basic_ack(messages[index].tag)
    channel.close()
    assert drain(connection.channel(), queue) == [b"1", b"3", b"5"]


def test_delivery_can_be_settled_on_its_own_channel_only(connection, channel, queue):
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    other = connection.channel()
    with channel_error(406, f"unknown delivery tag {message.tag}"):
        other.basic_ack(message.tag)
        other.basic_qos()
    channel.basic_ack(message.tag)
    channel.basic_qos()


# ---- Nack and reject


@pytest.mark.parametrize("settle", ["basic_nack", "basic_reject"])
def test_rejected_message_is_dropped(settle, connection, channel, queue):
    publish(channel, queue, "1", "2")
    getattr(channel, settle)(get_one(channel, queue).tag, requeue=False)
    channel.close()
    assert drain(connection.channel(), queue) == [b"2"]


@pytest.mark.parametrize("settle", ["basic_nack", "basic_reject"])
def test_requeued_message_returns_to_its_place_and_is_marked(settle, channel, queue):
    publish(channel, queue, "1", "2", "3")
    first, second = all_of(channel, queue, 2)
    getattr(channel, settle)(first.tag, requeue=True)
    assert states(all_of(channel, queue, 2)) == [(b"1", True), (b"3", False)]
    channel.basic_ack(second.tag)


def test_message_requeued_late_still_returns_to_its_place(channel, queue):
    publish(channel, queue, "1", "2", "3", "4")
    messages = all_of(channel, queue, 3)
    channel.basic_reject(messages[2].tag, requeue=True)
    channel.basic_reject(messages[0].tag, requeue=True)
    channel.basic_reject(messages[1].tag, requeue=True)
    assert states(all_of(channel, queue, 4)) == [(b"1", True), (b"2", True), (b"3", True), (b"4", False)]


def test_multiple_nack_requeues_all_up_to_its_tag_in_order(channel, queue):
    publish(channel, queue, "1", "2", "3", "4")
    messages = all_of(channel, queue, 4)
    channel.basic_nack(messages[2].tag, multiple=True, requeue=True)
    assert states(all_of(channel, queue, 3)) == [(b"1", True), (b"2", True), (b"3", True)]


def test_multiple_nack_of_tag_zero_drops_everything(connection, channel, queue):
    publish(channel, queue, "1", "2")
    all_of(channel, queue, 2)
    channel.basic_nack(0, multiple=True, requeue=False)
    channel.close()
    assert drain(connection.channel(), queue) == []


def test_multiple_nack_needs_its_own_tag_outstanding(client, queue):
    for _ in range(2):
        client.publish(1, "", queue, b"")
        client.get(1, queue, no_ack=False)
    client.send_method(1, "basic.ack", delivery_tag=2)
    client.send_method(1, "basic.nack", delivery_tag=2, multiple=True)
    assert client.read().reply_text == "PRECONDITION_FAILED - unknown delivery tag 2"


def test_requeued_message_goes_to_a_waiting_consumer(connection, channel, queue):
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    waiting = consume(connection, connection.channel(), queue)
    channel.basic_nack(message.tag, requeue=True)
    waiting.wait_for(1)
    assert states(waiting) == [(b"1", True)]


def test_requeued_message_can_return_to_the_same_consumer(connection, channel, queue):
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, "1")
    for count in (1, 2, 3):
        channel.basic_nack(deliveries.wait_for(count)[-1].tag, requeue=True)
    assert states(deliveries.wait_for(4)[:4]) == [(b"1", False), (b"1", True), (b"1", True), (b"1", True)]
    assert [delivery.tag for delivery in deliveries[:4]] == [1, 2, 3, 4]


def test_never_sent_messages_are_not_marked_as_redelivered(connection, channel, queue):
    publish(channel, queue, "1", "2", "3")
    doomed = connection.channel()
    doomed.basic_qos(prefetch_count=1)
    consume(connection, doomed, queue).wait_for(1)
    doomed.close()
    assert states(all_of(channel, queue, 3)) == [(b"1", True), (b"2", False), (b"3", False)]


def test_prefetched_messages_count_as_sent_even_when_nobody_looked(connection, channel, queue):
    publish(channel, queue, "1", "2")
    doomed = connection.channel()
    consume(connection, doomed, queue).wait_for(2)
    doomed.close()
    assert states(all_of(channel, queue, 2)) == [(b"1", True), (b"2", True)]


# ---- Recover


def test_recover_requeues_everything_unacknowledged_in_order(channel, queue):
    publish(channel, queue, "1", "2", "3")
    messages = all_of(channel, queue, 3)
    channel.basic_ack(messages[1].tag)
    channel.basic_recover(requeue=True)
    assert states(all_of(channel, queue, 2)) == [(b"1", True), (b"3", True)]


def test_recover_voids_the_old_delivery_tags(channel, queue):
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    channel.basic_recover(requeue=True)
    with channel_error(406, f"unknown delivery tag {message.tag}"):
        channel.basic_ack(message.tag)
        channel.basic_qos()


def test_recover_redelivers_to_consumers_of_the_channel(connection, channel, queue):
    publish(channel, queue, "1", "2")
    deliveries = consume(connection, channel, queue).wait_for(2)
    channel.basic_recover(requeue=True)
    deliveries.wait_for(4)
    assert states(deliveries) == [(b"1", False), (b"2", False), (b"1", True), (b"2", True)]


def test_recover_leaves_other_channels_alone(connection, channel, queue):
    publish(channel, queue, "1", "2")
    other = connection.channel()
    held = get_one(other, queue)
    get_one(channel, queue)
    channel.basic_recover(requeue=True)
    assert [get_one(channel, queue).body, get(channel, queue)] == [b"2", None]
    other.basic_ack(held.tag)
    other.basic_qos()


def test_recover_async_requeues_without_an_answer(client, queue):
    client.publish(1, "", queue, b"1")
    client.get(1, queue, no_ack=False)
    client.send_method(1, "basic.recover-async", requeue=True)
    again = client.get(1, queue)
    assert (again.name, again.body, again.redelivered, again.delivery_tag) == ("basic.get-ok", b"1", True, 2)


def test_recover_with_nothing_outstanding_is_answered(client):
    assert client.call(1, "basic.recover", requeue=True).name == "basic.recover-ok"


def test_settling_many_in_random_order_leaves_nothing(connection, channel, queue):
    count = 300
    publish(channel, queue, *[str(number) for number in range(count)])
    tags = [message.tag for message in all_of(channel, queue, count)]
    for tag in sorted(tags, key=lambda tag: tag * 7919 % 307):
        channel.basic_ack(tag)
    channel.close()
    expect_counts(connection.channel(), queue, messages=0, consumers=0)
