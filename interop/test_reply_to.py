"""Direct reply-to: requests whose answers need no queue."""

import re

import pika
import pytest

from helpers import (
    assert_close,
    consume,
    expect_channel_close,
    expect_connection_close,
    get_eventually,
    get_one,
)
from raw import RawClient

REPLY_TO = "amq.rabbitmq.reply-to"


class Conversation:
    """A requester on channel 1 of one connection, a responder on channel 1 of another."""

    def __init__(self, requester: RawClient, responder: RawClient, queue: str):
        self.requester, self.responder = requester, responder
        requester.do(1, "basic.consume", queue=REPLY_TO, no_ack=True, consumer_tag="replies")
        responder.do(1, "queue.declare", queue=queue, exclusive=True)
        requester.publish(1, "", queue, b"request", {"reply_to": REPLY_TO, "correlation_id": "7"})
        self.request = get_eventually(responder, 1, queue)
        self.reply_to = self.request.properties["reply_to"]


@pytest.fixture
def conversation(raw, name) -> Conversation:
    return Conversation(raw(1), raw(1, 2), name())


def test_request_carries_a_generated_name_and_all_else_unchanged(conversation):
    assert re.fullmatch(r"amq\.rabbitmq\.reply-to\.[A-Za-z0-9+/=_.-]+", conversation.reply_to)
    assert conversation.request.properties["correlation_id"] == "7"
    assert conversation.request.body == b"request"


def test_reply_comes_to_the_consumer_of_the_requester(conversation):
    conversation.responder.publish(1, "", conversation.reply_to, b"reply", {"correlation_id": "7"})
    reply = conversation.requester.expect("basic.deliver")
    assert reply.args == {
        "consumer_tag": "replies",
        "delivery_tag": 1,
        "redelivered": False,
        "exchange": "",
        "routing_key": conversation.reply_to,
    }
    assert (reply.properties, reply.body) == ({"correlation_id": "7"}, b"reply")


def test_several_replies_arrive_in_order(conversation, server):
    for number in range(10):
        conversation.responder.publish(1, "", conversation.reply_to, str(number).encode())
    replies = [conversation.requester.expect("basic.deliver") for _ in range(10)]
    assert [reply.body for reply in replies] == [str(number).encode() for number in range(10)]
    tags = [1] * 10 if server.is_3x else list(range(1, 11))
    assert [reply.delivery_tag for reply in replies] == tags


def test_name_stays_the_same_for_later_requests(conversation, name):
    queue = name()
    conversation.responder.do(1, "queue.declare", queue=queue, exclusive=True)
    conversation.requester.publish(1, "", queue, b"again", {"reply_to": REPLY_TO})
    again = get_eventually(conversation.responder, 1, queue)
    conversation.responder.publish(1, "", again.properties["reply_to"], b"reply")
    assert conversation.requester.expect("basic.deliver").body == b"reply"


def test_large_reply_arrives_in_frames_that_fit(raw, name):
    conversation = Conversation(raw(1, frame_max=8192), raw(1), name())
    conversation.responder.publish(1, "", conversation.reply_to, bytes(100_000))
    reply = conversation.requester.expect("basic.deliver")
    assert reply.body == bytes(100_000)
    assert max(reply.body_frame_sizes) <= 8184


def test_mandatory_reply_is_confirmed_and_not_returned(conversation, server):
    responder = conversation.responder
    responder.do(1, "confirm.select")
    responder.publish(1, "", conversation.reply_to, b"reply", mandatory=True)
    if server.is_3x:  # returned although it arrives
        assert responder.expect("basic.return").body == b"reply"
    assert responder.expect("basic.ack").delivery_tag == 1
    assert conversation.requester.expect("basic.deliver").body == b"reply"


def test_reply_to_a_requester_that_is_gone_is_dropped_silently(conversation):
    conversation.requester.close()
    conversation.responder.publish(1, "", conversation.reply_to, b"too late")
    conversation.responder.do(1, "basic.qos")


def test_message_to_the_unspecific_name_is_unroutable(client):
    client.publish(1, "", REPLY_TO, b"lost", mandatory=True)
    returned = client.expect("basic.return")
    assert (returned.reply_code, returned.routing_key, returned.body) == (312, REPLY_TO, b"lost")


def test_other_reply_to_values_are_left_alone(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.publish(1, "", queue, b"", {"reply_to": "my.own.queue"})
    assert client.get(1, queue).properties == {"reply_to": "my.own.queue"}


def test_request_must_be_published_on_the_channel_of_the_reply_consumer(raw, name):
    client = raw(1, 2)
    client.do(1, "basic.consume", queue=REPLY_TO, no_ack=True)
    client.publish(2, "", name(), b"", {"reply_to": REPLY_TO})
    expect_channel_close(client, 406, "fast reply consumer does not exist", "basic.publish", channel=2)


def test_no_more_requests_after_the_reply_consumer_was_cancelled(conversation):
    requester = conversation.requester
    requester.do(1, "basic.cancel", consumer_tag="replies")
    requester.publish(1, "", "anywhere", b"", {"reply_to": REPLY_TO})
    expect_channel_close(requester, 406, "fast reply consumer does not exist", "basic.publish")


def test_cancelled_reply_consumer_may_be_replaced(conversation):
    requester = conversation.requester
    requester.do(1, "basic.cancel", consumer_tag="replies")
    requester.do(1, "basic.consume", queue=REPLY_TO, no_ack=True, consumer_tag="new")


def test_each_channel_may_have_a_reply_consumer(raw):
    client = raw(1, 2)
    for channel in (1, 2):
        client.do(channel, "basic.consume", queue=REPLY_TO, no_ack=True)


def test_server_makes_up_the_tag_of_a_reply_consumer(client):
    tag = client.do(1, "basic.consume", queue=REPLY_TO, no_ack=True).consumer_tag
    assert re.fullmatch(r"amq\.ctag-[A-Za-z0-9_-]{22}", tag)


@pytest.mark.parametrize("passive", [False, True], ids=["active", "passive"])
def test_declaring_the_generated_name_tells_that_the_requester_lives(passive, conversation):
    declared = conversation.responder.do(1, "queue.declare", queue=conversation.reply_to, passive=passive)
    assert declared.args == {"queue": conversation.reply_to, "message_count": 0, "consumer_count": 1}


def test_declaring_the_generated_name_tells_that_the_requester_is_gone(conversation):
    conversation.requester.do(1, "channel.close", reply_code=200)
    conversation.responder.send_method(1, "queue.declare", queue=conversation.reply_to, passive=True)
    text = f"no queue '{conversation.reply_to}' in vhost '/'"
    expect_channel_close(conversation.responder, 404, text, "queue.declare")


@pytest.mark.parametrize("passive", [False, True], ids=["active", "passive"])
def test_declaring_the_unspecific_name_always_succeeds(passive, client):
    declared = client.do(1, "queue.declare", queue=REPLY_TO, passive=passive)
    assert declared.args == {"queue": REPLY_TO, "message_count": 0, "consumer_count": 1}


def test_generated_name_cannot_be_bound(conversation, server):
    responder = conversation.responder
    responder.send_method(1, "queue.bind", queue=conversation.reply_to, exchange="amq.direct")
    if server.is_3x:
        expect_channel_close(responder, 404, f"no queue '{conversation.reply_to}' in vhost '/'", "queue.bind")
    else:
        text = "cannot bind or unbind to a volatile (direct reply-to) queue"
        expect_channel_close(responder, 403, text, "queue.bind")


def test_generated_name_cannot_be_got_from(conversation, server):
    responder = conversation.responder
    responder.send_method(1, "basic.get", queue=conversation.reply_to)
    if server.is_3x:
        expect_channel_close(responder, 404, f"no queue '{conversation.reply_to}' in vhost '/'", "basic.get")
    else:
        text = f"basic.get not supported by volatile queue '{conversation.reply_to}' in vhost '/'"
        expect_connection_close(responder, 540, text, "basic.get")


def test_generated_name_cannot_be_consumed_from(conversation, server):
    responder = conversation.responder
    responder.send_method(1, "basic.consume", queue=conversation.reply_to, no_ack=True)
    if server.is_3x:
        expect_channel_close(
            responder, 404, f"no queue '{conversation.reply_to}' in vhost '/'", "basic.consume"
        )
    else:
        text = f"only creator channel may consume from queue '{conversation.reply_to}' in vhost '/'"
        expect_channel_close(responder, 406, text, "basic.consume")


@pytest.mark.parametrize("suffix", ["", ".made-up"], ids=["unspecific", "made_up"])
def test_name_nobody_generated_cannot_be_got_from(suffix, client):
    client.send_method(1, "basic.get", queue=REPLY_TO + suffix)
    expect_channel_close(client, 404, f"no queue '{REPLY_TO}{suffix}' in vhost '/'", "basic.get")


def test_second_reply_consumer_on_a_channel_is_refused_and_the_first_goes_with_the_channel(conversation):
    requester = conversation.requester
    requester.send_method(1, "basic.consume", queue=REPLY_TO, no_ack=True, consumer_tag="second")
    assert_close(requester.read(), "channel", 1, 406, "reply consumer already set", "basic.consume")
    requester.send_method(1, "channel.close-ok")
    responder = conversation.responder
    responder.send_method(1, "queue.declare", queue=conversation.reply_to, passive=True)
    assert responder.read().reply_code == 404


def test_pika_can_ask_and_answer(connect, name):
    server, client = connect(), connect()
    queue = name()
    answering, asking = server.channel(), client.channel()
    answering.queue_declare(queue)
    replies = consume(client, asking, REPLY_TO, auto_ack=True)
    asking.basic_publish("", queue, b"ping", pika.BasicProperties(reply_to=REPLY_TO))
    request = get_one(answering, queue, auto_ack=True)
    answering.basic_publish("", request.properties.reply_to, b"pong")
    assert replies.wait_for(1).bodies == [b"pong"]
