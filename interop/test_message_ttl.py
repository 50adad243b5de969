"""How long messages live: x-message-ttl, the expiration property, and what becomes of the expired."""

import time

import pytest

from helpers import (
    Confirms,
    consume,
    drain,
    expect_counts,
    get,
    get_eventually,
    get_one,
    never,
    publish,
    takes_at_least,
)
from raw import publish_frames

LONG = 60000


@pytest.fixture
def channel(channel):
    """Waits for the confirm of each publish, so that the message has been in its queue by then."""
    channel.confirm_delivery()
    return channel


def pass_by(milliseconds):
    """Waits a little longer than messages of this age can live."""
    time.sleep(milliseconds / 1000 + 0.1)


# ---- Expiring


def test_message_expires_after_the_ttl_of_its_queue(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=300)
    with takes_at_least(300):
        publish(channel, queue, "1")
        expect_counts(channel, queue, messages=0, consumers=0)
    assert get(channel, queue) is None


def test_message_expires_after_its_own_expiration(queue_type, channel, declare):
    queue = declare(queue_type=queue_type)
    with takes_at_least(300):
        publish(channel, queue, "1", expiration="300")
        expect_counts(channel, queue, messages=0, consumers=0)
    assert get(channel, queue) is None


@pytest.mark.parametrize("ttl, expiration", [(300, LONG), (LONG, 300)], ids=["queue", "message"])
def test_smaller_of_both_times_counts(ttl, expiration, queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=ttl)
    with takes_at_least(300):
        publish(channel, queue, "1", expiration=str(expiration))
        expect_counts(channel, queue, messages=0, consumers=0)


def test_queue_ttl_shortens_only_messages_that_would_live_longer(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=LONG)
    publish(channel, queue, "short", expiration="100")
    publish(channel, queue, "long", expiration=str(2 * LONG))
    publish(channel, queue, "none")
    expect_counts(channel, queue, messages=2, consumers=0)
    assert drain(channel, queue) == [b"long", b"none"]


@pytest.mark.parametrize("delivery_mode", [1, 2], ids=["transient", "persistent"])
@pytest.mark.parametrize("size", [10, 1_000_000], ids=["small", "large"])
def test_messages_of_every_kind_expire(size, delivery_mode, channel, declare):
    queue = declare(message_ttl=100)
    publish(channel, queue, *[bytes(size)] * 10, delivery_mode=delivery_mode)
    expect_counts(channel, queue, messages=0, consumers=0)


def test_many_messages_expire(queue_type, client, channel, declare):
    queue = declare(queue_type=queue_type)
    client.do(1, "confirm.select")
    client.send(publish_frames(1, "", queue, b"brief", {"expiration": "300"}) * 5000)
    Confirms(client).expect(*range(1, 5001)).wait()
    expect_counts(channel, queue, messages=0, consumers=0)
    publish(channel, queue, "later")
    assert drain(channel, queue) == [b"later"]


def test_each_queue_counts_from_its_own_ttl(channel, declare, name):
    exchange = name("exchange")
    channel.exchange_declare(exchange, "fanout")
    brief, lasting, endless = declare(message_ttl=100), declare(message_ttl=LONG), declare()
    for queue in (brief, lasting, endless):
        channel.queue_bind(queue, exchange)
    channel.basic_publish(exchange, "", b"1")
    expect_counts(channel, brief, messages=0, consumers=0)
    assert (drain(channel, lasting), drain(channel, endless)) == ([b"1"], [b"1"])


def test_exclusive_queue_has_a_ttl_too(channel, name):
    queue = name()
    channel.queue_declare(queue, exclusive=True, arguments={"x-message-ttl": 100})
    publish(channel, queue, "1")
    expect_counts(channel, queue, messages=0, consumers=0)


def test_time_begins_with_the_commit_of_a_transaction(channel, connection, declare):
    queue = declare(message_ttl=300)
    tx = connection.channel()
    tx.tx_select()
    publish(tx, queue, "queue's ttl")
    publish(tx, queue, "its own", expiration="300")
    tx.basic_qos()
    pass_by(300)
    with takes_at_least(300):
        tx.tx_commit()
        expect_counts(channel, queue, messages=0, consumers=0)


def test_longest_ttl_does_not_overflow(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=315360000000)
    publish(channel, queue, "1", expiration="315360000000")
    pass_by(100)
    assert drain(channel, queue) == [b"1"]


def test_confirmed_message_may_be_gone_by_then(queue_type, client, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=1)
    client.do(1, "confirm.select")
    for number in range(1, 21):
        client.publish(1, "", queue, b"brief", {"delivery_mode": 2})
        assert client.expect("basic.ack").delivery_tag == number
    expect_counts(channel, queue, messages=0, consumers=0)


def test_mandatory_message_that_expires_is_not_returned(client, declare):
    queue = declare(message_ttl=0)
    client.publish(1, "", queue, b"1", mandatory=True)
    client.expect_silence(0.2)


# ---- At the head of the queue


@pytest.mark.rabbitmq_only("expired messages leave wherever they stand")
def test_expired_message_stays_behind_one_that_lives(queue_type, channel, declare):
    queue = declare(queue_type=queue_type)
    publish(channel, queue, "lives")
    publish(channel, queue, "expires", expiration="100")
    pass_by(100)
    expect_counts(channel, queue, messages=2, consumers=0)


def test_expired_message_behind_one_that_lives_leaves_leveret(queue_type, channel, declare, server):
    if server.is_rabbitmq:
        pytest.skip("RabbitMQ looks at the head only")
    queue = declare(queue_type=queue_type)
    publish(channel, queue, "lives")
    publish(channel, queue, "expires", expiration="100")
    publish(channel, queue, "lives as well")
    expect_counts(channel, queue, messages=2, consumers=0)
    bodies = [get_one(channel, queue, auto_ack=True).body for _ in range(2)]
    assert bodies == [b"lives", b"lives as well"]


def test_expired_message_goes_once_it_is_at_the_head(queue_type, channel, declare):
    queue = declare(queue_type=queue_type)
    publish(channel, queue, "lives")
    publish(channel, queue, "expires", "expires as well", expiration="100")
    publish(channel, queue, "lives on")
    pass_by(100)
    assert get_one(channel, queue, auto_ack=True).body == b"lives"
    assert get_one(channel, queue, auto_ack=True).body == b"lives on"
    expect_counts(channel, queue, messages=0, consumers=0)


def test_message_of_a_shorter_life_waits_for_the_one_before_it(queue_type, channel, declare):
    queue = declare(queue_type=queue_type)
    with takes_at_least(600):
        publish(channel, queue, "first", expiration="600")
        publish(channel, queue, "second", expiration="100")
        expect_counts(channel, queue, messages=0, consumers=0)


def test_expired_message_is_never_delivered_to_a_consumer(queue_type, connection, channel, declare):
    queue = declare(queue_type=queue_type)
    publish(channel, queue, "lives")
    publish(channel, queue, *["expires"] * 100, expiration="100")
    publish(channel, queue, "lives on")
    pass_by(100)
    deliveries = consume(connection, channel, queue, auto_ack=True)
    assert deliveries.wait_for(2).stay_at(2, during=0.2).bodies == [b"lives", b"lives on"]


@pytest.mark.rabbitmq_only("expired messages leave wherever they stand")
def test_purge_counts_expired_messages_behind_the_head(channel, declare):
    queue = declare()
    publish(channel, queue, "lives")
    publish(channel, queue, "expires", "expires", expiration="100")
    pass_by(100)
    assert channel.queue_purge(queue).method.message_count == 3


def test_message_expires_while_its_consumer_has_no_room(queue_type, connection, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=300)
    busy = connection.channel()
    busy.basic_qos(prefetch_count=1)
    deliveries = consume(connection, busy, queue)
    publish(channel, queue, "held", "waits in vain")
    deliveries.wait_for(1)
    expect_counts(channel, queue, messages=0, consumers=1)
    busy.basic_ack(deliveries[0].tag)
    deliveries.stay_at(1)


# ---- A time of zero


@pytest.mark.parametrize("ttl, expiration", [(0, None), (None, "0"), (0, str(LONG))])
def test_message_without_any_time_goes_at_once(ttl, expiration, queue_type, channel, declare):
    queue = declare(queue_type=queue_type, **({} if ttl is None else {"message_ttl": ttl}))
    publish(channel, queue, *["1"] * 10, expiration=expiration)
    expect_counts(channel, queue, messages=0, consumers=0)
    assert drain(channel, queue) == []


def test_message_without_any_time_is_not_there_to_be_got(client, declare):
    queue = declare(message_ttl=0)
    for _ in range(20):
        client.publish(1, "", queue, b"1")
        assert client.get(1, queue).name == "basic.get-empty"


@pytest.mark.parametrize("auto_ack", [True, False], ids=["auto_ack", "ack"])
@pytest.mark.parametrize("expiration", [None, "0"], ids=["queue", "message"])
def test_message_without_any_time_reaches_a_consumer_that_is_ready(
    expiration, auto_ack, queue_type, connection, channel, declare
):
    queue = declare(queue_type=queue_type, **({} if expiration else {"message_ttl": 0}))
    deliveries = consume(connection, channel, queue, auto_ack=auto_ack)
    for number in range(1, 21):
        publish(channel, queue, str(number), expiration=expiration)
        assert deliveries.wait_for(number)[-1].body == str(number).encode()


def test_message_without_any_time_passes_a_consumer_that_has_no_room(connection, channel, declare):
    queue = declare(message_ttl=0)
    channel.basic_qos(prefetch_count=1)
    deliveries = consume(connection, channel, queue)
    publish(channel, queue, "1", "2", "3")
    deliveries.wait_for(1)
    expect_counts(channel, queue, messages=0, consumers=1)
    channel.basic_ack(deliveries[0].tag)
    deliveries.stay_at(1)
    publish(channel, queue, "4")
    assert deliveries.wait_for(2).bodies == [b"1", b"4"]


# ---- Unacknowledged and requeued


def test_unacknowledged_message_does_not_expire(queue_type, channel, declare):
    dead = declare("dead")
    queue = declare(
        queue_type=queue_type, message_ttl=200, dead_letter_exchange="", dead_letter_routing_key=dead
    )
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    pass_by(300)
    assert get(channel, dead) is None
    channel.basic_ack(message.tag)
    channel.close()
    assert get(channel.connection.channel(), dead) is None


@pytest.mark.parametrize("how", ["nack", "reject", "recover", "close"])
def test_requeued_message_keeps_the_instant_it_expires_at(how, queue_type, connection, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=1000)
    holder = connection.channel()
    publish(channel, queue, "1")
    message = get_one(holder, queue)
    pass_by(1000)
    if how == "recover":
        holder.basic_recover(requeue=True)
    elif how == "close":
        holder.close()
    else:
        getattr(holder, f"basic_{how}")(message.tag, requeue=True)
        holder.basic_qos()
    never(lambda: get(channel, queue))


def test_message_requeued_in_time_is_delivered_again(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=LONG)
    publish(channel, queue, "1")
    channel.basic_nack(get_one(channel, queue).tag, requeue=True)
    again = get_one(channel, queue)
    assert (again.body, again.redelivered) == (b"1", True)


def test_message_requeued_in_time_expires_at_its_first_instant(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=1000)
    with takes_at_least(1000):
        publish(channel, queue, "1")
        channel.basic_nack(get_one(channel, queue).tag, requeue=True)
        expect_counts(channel, queue, messages=1, consumers=0)
        expect_counts(channel, queue, messages=0, consumers=0)


def test_requeued_message_that_expired_is_not_delivered_to_another_consumer(
    queue_type, connection, channel, declare
):
    queue = declare(queue_type=queue_type, message_ttl=300)
    holder, other = connection.channel(), connection.channel()
    held = consume(connection, holder, queue)
    publish(channel, queue, "1")
    held.wait_for(1)
    pass_by(300)
    deliveries = consume(connection, other, queue)
    holder.close()
    deliveries.stay_at(0)


# ---- What consumers see


@pytest.mark.parametrize("expiration", ["60000", "315360000000"])
def test_expiration_is_delivered_as_sent(expiration, queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=LONG)
    publish(channel, queue, "1", expiration=expiration)
    assert get_one(channel, queue).properties.expiration == expiration


@pytest.mark.parametrize("sent", ["+60000", "0060000", "+0060000"])
def test_expiration_is_delivered_in_plain_digits(sent, client, queue, server):
    client.publish(1, "", queue, b"1", {"expiration": sent})
    delivered = sent if server.is_3x else "60000"
    assert get_eventually(client, 1, queue).properties == {"expiration": delivered}


def test_ttl_of_the_queue_does_not_show_in_the_message(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, message_ttl=LONG)
    publish(channel, queue, "1")
    assert get_one(channel, queue).properties.expiration is None


def test_expiration_says_nothing_about_the_time_left(channel, declare):
    queue = declare(message_ttl=LONG)
    publish(channel, queue, "1", expiration="50000")
    pass_by(200)
    channel.basic_nack(get_one(channel, queue).tag, requeue=True)
    assert get_one(channel, queue).properties.expiration == "50000"


@pytest.mark.rabbitmq_only("expired messages leave wherever they stand")
def test_message_count_of_get_includes_the_expired_behind_the_head(client, declare):
    queue = declare()
    for expiration in (None, None, "100"):
        client.publish(1, "", queue, b"1", {"expiration": expiration} if expiration else None)
    pass_by(100)
    assert get_eventually(client, 1, queue).message_count == 2
