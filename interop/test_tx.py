"""Transactions: nothing before commit, everything after it, and rollback."""

import pytest

from helpers import (
    channel_error,
    drain,
    expect_channel_close,
    expect_connection_close,
    expect_counts,
    get,
    get_one,
    publish,
)
from raw import method_frame, publish_frames


@pytest.fixture
def tx(connection):
    channel = connection.channel()
    channel.tx_select()
    return channel


def test_select_may_be_repeated(tx):
    tx.tx_select()
    tx.tx_commit()


def test_published_messages_appear_with_commit_in_order(tx, channel, queue):
    publish(tx, queue, "1", "2", "3")
    tx.basic_qos()
    assert get(channel, queue) is None
    tx.tx_commit()
    assert drain(channel, queue) == [b"1", b"2", b"3"]


def test_rolled_back_messages_never_appear(tx, channel, queue):
    publish(tx, queue, "never")
    tx.tx_rollback()
    publish(tx, queue, "yes")
    tx.tx_commit()
    assert drain(channel, queue) == [b"yes"]


def test_next_transaction_begins_by_itself(tx, channel, queue):
    for number in ("1", "2"):
        publish(tx, queue, number)
        assert get(channel, queue) is None
        tx.tx_commit()
        assert drain(channel, queue) == [number.encode()]


@pytest.mark.parametrize("finish", ["tx_commit", "tx_rollback"])
def test_empty_transaction_can_be_finished(finish, tx):
    getattr(tx, finish)()
    getattr(tx, finish)()


def test_uncommitted_publishes_are_lost_with_the_channel(tx, channel, queue):
    publish(tx, queue, "never")
    tx.close()
    assert drain(channel, queue) == []


def test_uncommitted_publishes_are_lost_with_the_connection(raw, channel, queue):
    client = raw(1)
    client.do(1, "tx.select")
    client.publish(1, "", queue, b"never")
    client.close()
    assert drain(channel, queue) == []


def test_acknowledgement_counts_with_commit(tx, channel, queue):
    publish(channel, queue, "1", "2")
    first = get_one(tx, queue)
    get_one(tx, queue)
    tx.basic_ack(first.tag)
    tx.tx_commit()
    tx.close()
    assert drain(channel, queue) == [b"2"]


def test_uncommitted_acknowledgement_is_lost_with_the_channel(tx, channel, queue):
    publish(channel, queue, "1")
    tx.basic_ack(get_one(tx, queue).tag)
    tx.close()
    again = get_one(channel, queue)
    assert (again.body, again.redelivered) == (b"1", True)


def test_rolled_back_acknowledgement_leaves_the_delivery_outstanding_but_not_redelivered(tx, channel, queue):
    publish(channel, queue, "1")
    message = get_one(tx, queue)
    tx.basic_ack(message.tag)
    tx.tx_rollback()
    assert get(channel, queue) is None
    tx.basic_ack(message.tag)
    tx.tx_commit()
    tx.close()
    assert drain(channel, queue) == []


def test_acknowledging_twice_within_a_transaction_is_an_error(connection, channel, queue):
    publish(channel, queue, "1")
    tx = connection.channel()
    tx.tx_select()
    message = get_one(tx, queue)
    tx.basic_ack(message.tag)
    with channel_error(406, f"unknown delivery tag {message.tag}"):
        tx.basic_ack(message.tag)
        tx.basic_qos()


@pytest.mark.parametrize("requeue, left", [(True, [b"1"]), (False, [])], ids=["requeued", "dropped"])
@pytest.mark.parametrize("settle", ["basic_reject", "basic_nack"])
def test_rejection_counts_with_commit(settle, requeue, left, tx, channel, queue):
    publish(channel, queue, "1")
    getattr(tx, settle)(get_one(tx, queue).tag, requeue=requeue)
    tx.basic_qos()
    assert get(channel, queue) is None
    tx.tx_commit()
    expect_counts(channel, queue, messages=len(left), consumers=0)
    assert drain(channel, queue) == left


def test_rolled_back_rejection_leaves_the_delivery_outstanding(tx, channel, queue):
    publish(channel, queue, "1")
    message = get_one(tx, queue)
    tx.basic_reject(message.tag, requeue=True)
    tx.tx_rollback()
    assert get(channel, queue) is None
    tx.basic_ack(message.tag)
    tx.tx_commit()


def test_publishes_and_acknowledgements_commit_together(tx, channel, queue, name):
    target = name("target")
    channel.queue_declare(target, durable=True)
    publish(channel, queue, "in")
    message = get_one(tx, queue)
    publish(tx, target, "out", delivery_mode=2)
    tx.basic_ack(message.tag)
    tx.tx_commit()
    tx.close()
    assert drain(channel, target) == [b"out"]
    assert drain(channel, queue) == []


def test_returns_come_with_commit_before_its_answer(client, name):
    missing = name("missing")
    client.do(1, "tx.select")
    client.publish(1, "", missing, b"back", mandatory=True)
    client.do(1, "basic.qos")
    client.send_method(1, "tx.commit")
    returned = client.expect("basic.return")
    assert (returned.reply_code, returned.body) == (312, b"back")
    client.expect("tx.commit-ok")


def test_rolled_back_mandatory_message_is_not_returned(client, name):
    client.do(1, "tx.select")
    client.publish(1, "", name("missing"), b"forgotten", mandatory=True)
    client.do(1, "tx.rollback")
    client.do(1, "tx.commit")


def test_publishing_to_a_missing_exchange_fails_before_commit(client, name):
    missing = name("missing")
    client.do(1, "tx.select")
    client.publish(1, missing, "")
    expect_channel_close(client, 404, f"no exchange '{missing}' in vhost '/'", "basic.publish")


def test_routing_is_done_when_published_not_when_committed(tx, channel, queue, name):
    exchange = name("exchange")
    channel.exchange_declare(exchange, "fanout")
    tx.basic_publish(exchange, "", b"before the binding")
    tx.basic_qos()
    channel.queue_bind(queue, exchange)
    tx.tx_commit()
    assert drain(channel, queue) == []


def test_declarations_are_not_transactional(tx, channel, name):
    queue = name()
    tx.queue_declare(queue, durable=True)
    tx.tx_rollback()
    channel.queue_declare(queue, passive=True)


def test_method_sent_while_a_commit_is_pending_closes_the_connection(client, queue):
    client.do(1, "tx.select")
    client.send(
        publish_frames(1, "", queue, b"m", {"delivery_mode": 2}) * 100
        + method_frame(1, "tx.commit")
        + method_frame(1, "basic.qos", prefetch_count=1)
    )
    expect_connection_close(client, 504, "unexpected command while processing 'tx.commit'", "basic.qos")


def test_large_transaction_commits_in_order(tx, channel, queue):
    bodies = [str(number).encode() for number in range(1000)]
    publish(tx, queue, *bodies, delivery_mode=2)
    tx.tx_commit()
    assert drain(channel, queue) == bodies
