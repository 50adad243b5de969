"""Declaring, binding, purging and deleting queues; who owns them and when they go."""

import re

import pytest

from helpers import (
    EXCLUSIVE_TO_OTHER,
    channel_error,
    consume,
    drain,
    eventually,
    expect_counts,
    get,
    get_one,
    publish,
    queue_exists,
)
from raw import Typed


def test_declare_tells_name_messages_and_consumers(channel, connection, queue):
    declared = channel.queue_declare(queue, durable=True).method
    assert (declared.queue, declared.message_count, declared.consumer_count) == (queue, 0, 0)
    publish(channel, queue, "1", "2", "3")
    expect_counts(channel, queue, messages=3, consumers=0)
    get_one(channel, queue)
    expect_counts(channel, queue, messages=2, consumers=0)
    other = connection.channel()
    other.basic_qos(prefetch_count=1)
    consume(connection, other, queue).wait_for(1)
    expect_counts(channel, queue, messages=1, consumers=1)
    declared = channel.queue_declare(queue, durable=True).method
    assert (declared.message_count, declared.consumer_count) == (1, 1)


def test_server_makes_up_names(channel):
    made = {channel.queue_declare("", exclusive=True).method.queue for _ in range(20)}
    assert len(made) == 20
    assert all(re.fullmatch(r"amq\.gen-[A-Za-z0-9_-]{22}", name) for name in made)


def test_server_named_queue_can_be_redeclared_passively_only(channel):
    queue = channel.queue_declare("", exclusive=True).method.queue
    assert channel.queue_declare(queue, passive=True).method.queue == queue
    with channel_error(403, f"queue name '{queue}' contains reserved prefix 'amq.*'"):
        channel.queue_declare(queue, exclusive=True)


@pytest.mark.parametrize(
    "tail", ["-ünï-兎-🐇", "-with space", "-" + "x" * 230], ids=["unicode", "space", "long"]
)
def test_any_text_may_be_a_name(tail, channel, name):
    queue = (name() + tail)[:255]
    assert channel.queue_declare(queue, exclusive=True).method.queue == queue
    publish(channel, queue, "here")
    assert get_one(channel, queue).body == b"here"


def test_name_of_255_bytes_works_throughout(client):
    queue = "q" * 255
    assert client.do(1, "queue.declare", queue=queue, exclusive=True).queue == queue
    client.do(1, "queue.bind", queue=queue, exchange="amq.direct", routing_key=queue)
    client.publish(1, "amq.direct", queue, b"long key")
    received = client.get(1, queue)
    assert (received.routing_key, received.body) == (queue, b"long key")


def test_line_ends_are_removed_from_the_name(client, name):
    queue = name()
    sent = f"{queue[:4]}\r\n{queue[4:]}"
    assert client.do(1, "queue.declare", queue=sent, exclusive=True).queue == queue


def test_queue_can_be_declared_again_just_as_it_is(channel, name):
    queue = name()
    for _ in range(2):
        channel.queue_declare(queue, durable=True, auto_delete=True, arguments={"x-message-ttl": 60000})


def test_integer_arguments_are_compared_by_value(client, name):
    queue = name()
    for tag in "bBsuIil":
        client.do(
            1, "queue.declare", queue=queue, exclusive=True, arguments={"x-message-ttl": Typed(tag, 100)}
        )


def test_unknown_arguments_are_not_compared(channel, name):
    queue = name()
    channel.queue_declare(queue, exclusive=True, arguments={"x-note": "one"})
    channel.queue_declare(queue, exclusive=True, arguments={"x-note": 2, "x-other": True})
    channel.queue_declare(queue, exclusive=True)


def test_classic_is_the_queue_type_when_none_is_given(channel, name):
    queue = name()
    channel.queue_declare(queue, durable=True)
    channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "classic"})


def test_invalid_arguments_of_a_redeclaration_are_compared_not_validated(channel, name):
    queue = name()
    channel.queue_declare(queue, exclusive=True)
    text = (
        f"inequivalent arg 'x-max-length' for queue '{queue}' in vhost '/':"
        " received the value '-1' of type 'signedint' but current is none"
    )
    with channel_error(406, text):
        channel.queue_declare(queue, exclusive=True, arguments={"x-max-length": -1})


def test_exclusive_queue_may_be_redeclared_with_any_durability(channel, name):
    queue = name()
    channel.queue_declare(queue, exclusive=True, durable=True)
    channel.queue_declare(queue, exclusive=True, durable=False)


def test_transient_queue_need_not_be_exclusive(channel, connect, name):
    queue = name()
    channel.queue_declare(queue, durable=False, exclusive=False)
    other = connect().channel()
    publish(other, queue, "shared")
    assert get_one(other, queue).body == b"shared"


def test_passive_declare_compares_nothing(client, queue):
    client.do(
        1,
        "queue.declare",
        queue=queue,
        passive=True,
        durable=False,
        auto_delete=True,
        arguments={"x-message-ttl": "bad"},
    )


def test_declare_without_answer_takes_effect(client, connection, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, durable=True, nowait=True)
    assert client.call(1, "basic.qos").name == "basic.qos-ok"
    assert queue_exists(connection, queue)


def test_refused_declare_without_answer_still_closes_the_channel(client, queue):
    client.send_method(1, "queue.declare", queue=queue, auto_delete=True, durable=True, nowait=True)
    assert client.read().reply_code == 406


# ---- The queue declared last


def test_empty_name_means_the_queue_declared_last(client, name):
    first, last = name("first"), name("last")
    client.do(1, "queue.declare", queue=first, exclusive=True)
    client.do(1, "queue.declare", queue=last, exclusive=True)
    client.do(1, "queue.bind", exchange="amq.direct", routing_key=last + "-key")
    client.publish(1, "amq.direct", last + "-key", b"1")
    client.publish(1, "", last, b"2")
    client.publish(1, "", last, b"3")
    assert client.get(1, "").body == b"1"
    assert client.do(1, "queue.purge").message_count == 2
    client.do(1, "queue.unbind", exchange="amq.direct", routing_key=last + "-key")
    client.do(1, "basic.consume", consumer_tag="c")
    assert client.do(1, "queue.declare", queue=last, passive=True).consumer_count == 1
    client.do(1, "basic.cancel", consumer_tag="c")
    client.do(1, "queue.delete")
    assert client.call(1, "queue.declare", queue=last, passive=True).reply_code == 404


def test_passive_declare_counts_as_declared_last(client, queue, name):
    client.do(1, "queue.declare", queue=name("other"), exclusive=True)
    client.do(1, "queue.declare", queue=queue, passive=True)
    client.publish(1, "", queue, b"here")
    assert client.get(1, "").body == b"here"


def test_server_named_queue_counts_as_declared_last(client):
    queue = client.do(1, "queue.declare", exclusive=True).queue
    client.publish(1, "", queue, b"here")
    assert client.get(1, "").body == b"here"


def test_declared_last_is_remembered_per_channel(raw, name):
    client = raw(1, 2)
    first, second = name("first"), name("second")
    client.do(1, "queue.declare", queue=first, exclusive=True)
    client.do(2, "queue.declare", queue=second, exclusive=True)
    client.publish(1, "", first, b"first")
    assert client.get(1, "").body == b"first"


def test_binding_without_queue_and_key_uses_the_name_as_key(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.do(1, "queue.bind", exchange="amq.direct")
    client.publish(1, "amq.direct", queue, b"by name")
    assert client.get(1, queue).body == b"by name"


def test_binding_a_named_queue_without_key_keeps_the_key_empty(client, name):
    exchange, queue = name("exchange"), name()
    client.do(1, "exchange.declare", exchange=exchange, type="direct")
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.do(1, "queue.bind", queue=queue, exchange=exchange)
    client.publish(1, exchange, queue, b"by name")
    client.publish(1, exchange, "", b"by empty key")
    assert client.get(1, queue).body == b"by empty key"


# ---- Bindings


def test_binding_twice_delivers_once(channel, name):
    exchange, queue = name("exchange"), name()
    channel.exchange_declare(exchange, "topic")
    channel.queue_declare(queue, exclusive=True)
    for key in ("a.b", "a.b", "a.*", "#"):
        channel.queue_bind(queue, exchange, key)
    channel.basic_publish(exchange, "a.b", b"once")
    assert drain(channel, queue) == [b"once"]


def test_unbinding_removes_just_that_binding(channel, name):
    exchange, queue = name("exchange"), name()
    channel.exchange_declare(exchange)
    channel.queue_declare(queue, exclusive=True)
    channel.queue_bind(queue, exchange, "a")
    channel.queue_bind(queue, exchange, "b")
    channel.queue_unbind(queue, exchange, "a")
    channel.basic_publish(exchange, "a", b"a")
    channel.basic_publish(exchange, "b", b"b")
    assert drain(channel, queue) == [b"b"]


def test_unbinding_what_is_not_there_succeeds(channel, queue, name):
    channel.queue_unbind(queue, "amq.direct", "never bound")
    channel.queue_unbind(name("none"), name("none"), "key")


def test_bind_without_answer_takes_effect(client, name):
    exchange, queue = name("exchange"), name()
    client.do(1, "exchange.declare", exchange=exchange, type="direct")
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.send_method(1, "queue.bind", queue=queue, exchange=exchange, routing_key="k", nowait=True)
    client.publish(1, exchange, "k", b"bound")
    assert client.get(1, queue).body == b"bound"


def test_deleting_a_queue_removes_its_bindings(channel, connection, name):
    exchange, queue = name("exchange"), name()
    channel.exchange_declare(exchange, "fanout")
    channel.queue_declare(queue, durable=True)
    channel.queue_bind(queue, exchange)
    channel.queue_delete(queue)
    channel.queue_declare(queue, durable=True)
    channel.basic_publish(exchange, "", b"nobody listens")
    assert drain(channel, queue) == []
    channel.exchange_delete(exchange, if_unused=True)


# ---- Purge and delete


def test_purge_takes_and_counts_ready_messages_only(connection, channel, queue):
    publish(channel, queue, "1", "2", "3")
    held = get_one(channel, queue)
    assert channel.queue_purge(queue).method.message_count == 2
    expect_counts(channel, queue, messages=0, consumers=0)
    channel.basic_nack(held.tag, requeue=True)
    assert get_one(channel, queue).body == b"1"


def test_purging_an_empty_queue_counts_nothing(channel, queue):
    assert channel.queue_purge(queue).method.message_count == 0


def test_purge_without_answer_takes_effect(client, queue):
    client.publish(1, "", queue, b"1")
    client.send_method(1, "queue.purge", queue=queue, nowait=True)
    assert client.get(1, queue).name == "basic.get-empty"


def test_delete_counts_ready_messages_only(channel, queue):
    publish(channel, queue, "1", "2", "3")
    get_one(channel, queue)
    assert channel.queue_delete(queue).method.message_count == 2


def test_deleting_a_missing_queue_succeeds_and_counts_nothing(channel, name):
    assert channel.queue_delete(name()).method.message_count == 0
    assert channel.queue_delete(name(), if_unused=True, if_empty=True).method.message_count == 0


def test_deleted_queue_is_gone(channel, connection, queue):
    channel.queue_delete(queue)
    assert not queue_exists(connection, queue)


def test_delete_without_answer_takes_effect(client, connection, queue):
    client.send_method(1, "queue.delete", queue=queue, nowait=True)
    client.do(1, "basic.qos")
    assert not queue_exists(connection, queue)


def test_queue_is_deleted_if_unused_and_empty(channel, connection, queue):
    publish(channel, queue, "1")
    drain(channel, queue)
    channel.queue_delete(queue, if_unused=True, if_empty=True)
    assert not queue_exists(connection, queue)


def test_unused_queue_with_messages_is_deleted_if_unused(channel, connection, queue):
    publish(channel, queue, "1")
    assert channel.queue_delete(queue, if_unused=True).method.message_count == 1
    assert not queue_exists(connection, queue)


def test_queue_with_only_unacknowledged_messages_is_empty(channel, connection, queue):
    publish(channel, queue, "1")
    get_one(channel, queue)
    channel.queue_delete(queue, if_empty=True)
    assert not queue_exists(connection, queue)


def test_refused_delete_leaves_queue_and_messages(connection, channel, queue):
    publish(channel, queue, "kept")
    other = connection.channel()
    with channel_error(406, f"queue '{queue}' in vhost '/' not empty"):
        other.queue_delete(queue, if_empty=True)
    assert drain(channel, queue) == [b"kept"]


def test_messages_of_a_deleted_queue_may_still_be_acknowledged(channel, queue):
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    channel.queue_delete(queue)
    channel.basic_ack(message.tag)
    channel.basic_qos(prefetch_count=1)


def test_redeclared_queue_starts_empty(channel, queue):
    publish(channel, queue, "old")
    channel.queue_delete(queue)
    assert channel.queue_declare(queue, durable=True).method.message_count == 0


# ---- Exclusive queues


@pytest.mark.parametrize(
    "method, fields",
    [
        ("queue.declare", {"exclusive": True}),
        ("queue.declare", {}),
        ("queue.declare", {"passive": True}),
        ("queue.bind", {"exchange": "amq.direct", "routing_key": "interop"}),
        ("queue.unbind", {"exchange": "amq.direct", "routing_key": "interop"}),
        ("queue.purge", {}),
        ("queue.delete", {}),
        ("basic.consume", {}),
        ("basic.get", {}),
    ],
    ids=[
        "declare",
        "declare_shared",
        "declare_passive",
        "bind",
        "unbind",
        "purge",
        "delete",
        "consume",
        "get",
    ],
)
def test_exclusive_queue_is_locked_to_other_connections(method, fields, client, channel, name):
    queue = name()
    channel.queue_declare(queue, exclusive=True)
    channel.queue_bind(queue, "amq.direct", "interop")
    received = client.call(1, method, queue=queue, **fields)
    assert (received.name, received.reply_code) == ("channel.close", 405)
    text = "RESOURCE_LOCKED - " + EXCLUSIVE_TO_OTHER.format(queue=queue)
    assert received.reply_text == (text if len(text) <= 255 else text[:252] + "...")


def test_anybody_may_publish_to_an_exclusive_queue(channel, connect, name):
    queue = name()
    channel.queue_declare(queue, exclusive=True)
    publish(connect().channel(), queue, "from outside")
    assert get_one(channel, queue).body == b"from outside"


def test_exclusive_queue_belongs_to_the_connection_not_the_channel(connection, name):
    queue = name()
    connection.channel().queue_declare(queue, exclusive=True)
    second = connection.channel()
    publish(second, queue, "shared by channels")
    assert get_one(second, queue).body == b"shared by channels"
    second.queue_delete(queue)


def test_exclusive_queue_goes_with_its_connection_and_its_bindings_too(connect, channel, name):
    exchange, queue = name("exchange"), name()
    owner = connect()
    theirs = owner.channel()
    channel.exchange_declare(exchange, auto_delete=True)
    theirs.queue_declare(queue, exclusive=True)
    theirs.queue_bind(queue, exchange, "k")
    owner.close()
    assert not queue_exists(channel.connection, queue)
    with channel_error(404, f"no exchange '{exchange}' in vhost '/'"):
        channel.exchange_declare(exchange, passive=True)


# ---- Auto-delete


def test_auto_delete_queue_without_consumers_stays(channel, connection, name):
    queue = name()
    channel.queue_declare(queue, auto_delete=True)
    publish(channel, queue, "kept")
    assert get(channel, queue).body == b"kept"
    assert queue_exists(connection, queue)


def test_auto_delete_queue_goes_with_its_last_consumer(channel, connection, name):
    queue = name()
    channel.queue_declare(queue, auto_delete=True)
    first, second = (consume(connection, channel, queue).consumer_tag for _ in range(2))
    channel.basic_cancel(first)
    assert queue_exists(connection, queue)
    channel.basic_cancel(second)
    assert not queue_exists(connection, queue)


def test_auto_delete_queue_goes_with_the_connection_of_its_last_consumer(connect, channel, connection, name):
    queue = name()
    channel.queue_declare(queue, auto_delete=True)
    other = connect()
    consume(other, other.channel(), queue)
    other.close()
    eventually(lambda: not queue_exists(connection, queue))


def test_unacknowledged_messages_do_not_keep_an_auto_delete_queue(channel, connection, name):
    queue = name()
    channel.queue_declare(queue, auto_delete=True)
    publish(channel, queue, "1")
    deliveries = consume(connection, channel, queue).wait_for(1)
    channel.basic_cancel(deliveries.consumer_tag)
    assert not queue_exists(connection, queue)
    channel.basic_ack(deliveries[0].tag)
    channel.basic_qos(prefetch_count=1)
