"""Quorum queues: messages that come back. Counting them, limiting how often they may fail, where
they are put and how long they wait."""

import time

import pytest

from helpers import consume, count_of, drain, eventually, get, get_one, numbers, publish_confirmed
from raw import Typed

# Ways of giving a message back that count as a failed delivery, and ways that do not.
FAILED = ["reject", "channel_close", "connection_close"]
RETURNED = ["nack", "multiple_nack", "recover"]

# Instants are taken here and by the server, which may round them to milliseconds.
ROUNDING = 0.002


def counts(message):
    """What the headers tell of earlier deliveries: (x-delivery-count, x-acquired-count)."""
    headers = message.properties.headers or {}
    return headers.get("x-delivery-count"), headers.get("x-acquired-count")


def give_back(channel, message, how):
    match how:
        case "reject":
            channel.basic_reject(message.tag, requeue=True)
        case "nack":
            channel.basic_nack(message.tag, requeue=True)
        case "multiple_nack":
            channel.basic_nack(message.tag, multiple=True, requeue=True)
        case "recover":
            channel.basic_recover(requeue=True)
        case "channel_close":
            channel.close()
        case "connection_close":
            channel.connection.close()


@pytest.fixture
def attempt(connect):
    """Gets a message and gives it back, in each of the given ways; returns what was got."""
    channels = []

    def run(queue, *ways):
        taken = []
        for how in ways:
            if not channels or channels[-1].is_closed:
                reuse = channels and channels[-1].connection.is_open
                channels.append((channels[-1].connection if reuse else connect()).channel())
            taken.append(get_one(channels[-1], queue))
            give_back(channels[-1], taken[-1], how)
        return taken

    return run


# ---- The delivery limit


@pytest.mark.since("4.0", "default delivery limit")
def test_message_may_fail_twenty_times_when_nothing_else_is_said(connection, channel, declare, attempt):
    queue = declare("quorum")
    publish_confirmed(connection, queue, "1")
    taken = attempt(queue, *["reject"] * 21)
    assert [message.redelivered for message in taken] == [False] + [True] * 20
    eventually(lambda: count_of(channel, queue) == 0)
    assert get(channel, queue) is None


@pytest.mark.parametrize("how", FAILED)
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_message_that_failed_more_often_than_the_limit_leaves(
    limit, how, connection, channel, declare, attempt
):
    queue = declare("quorum", delivery_limit=limit)
    publish_confirmed(connection, queue, "1")
    attempt(queue, *[how] * (limit + 1))
    eventually(lambda: count_of(channel, queue) == 0)
    assert get(channel, queue) is None
    publish_confirmed(connection, queue, "2")
    assert drain(channel, queue) == [b"2"]


@pytest.mark.since("4.0", "returns that do not count as failed")
@pytest.mark.parametrize("how", RETURNED)
def test_message_may_be_returned_any_number_of_times(how, connection, channel, declare, attempt):
    queue = declare("quorum", delivery_limit=1)
    publish_confirmed(connection, queue, "1")
    attempt(queue, *[how] * 5)
    assert get_one(channel, queue).body == b"1"


@pytest.mark.since("4.0", "returns that do not count as failed")
def test_only_failed_deliveries_are_held_against_the_limit(connection, channel, declare, attempt):
    queue = declare("quorum", delivery_limit=1)
    publish_confirmed(connection, queue, "1")
    attempt(queue, "nack", "reject", "nack", "recover", "reject")
    eventually(lambda: count_of(channel, queue) == 0)
    assert get(channel, queue) is None


def test_every_message_is_counted_by_itself(connection, channel, declare):
    queue = declare("quorum", delivery_limit=1)
    publish_confirmed(connection, queue, *numbers(3))
    deliveries = consume(connection, channel, queue).wait_for(3)
    for index in (2, 0):
        give_back(channel, deliveries[index], "reject")
    deliveries.wait_for(5)
    give_back(channel, deliveries[3], "reject")
    deliveries.stay_at(5)
    assert sorted(deliveries.bodies) == [b"1", b"1", b"2", b"3", b"3"]


def test_message_over_the_limit_is_dead_lettered_with_reason_delivery_limit(
    connection, channel, declare, attempt
):
    graveyard = declare("classic")
    queue = declare("quorum", delivery_limit=1, dead_letter_exchange="", dead_letter_routing_key=graveyard)
    publish_confirmed(connection, queue, "1")
    attempt(queue, "reject", "reject")
    dead = get_one(channel, graveyard)
    assert dead.body == b"1"
    headers = dead.properties.headers
    death = headers["x-death"][0]
    assert (death["queue"], death["reason"], death["count"], death["routing-keys"]) == (
        queue,
        "delivery_limit",
        1,
        [queue],
    )
    assert (headers["x-first-death-queue"], headers["x-first-death-reason"]) == (queue, "delivery_limit")
    assert count_of(channel, queue) == 0


@pytest.mark.since("4.0", "unlimited deliveries")
@pytest.mark.parametrize("how", ["reject", "nack"])
def test_negative_limit_is_none(how, connection, channel, declare, attempt):
    queue = declare("quorum", delivery_limit=-1)
    publish_confirmed(connection, queue, "1")
    taken = attempt(queue, *[how] * 30)
    assert [counts(message)[1] for message in taken] == [None, *range(1, 30)]
    assert get_one(channel, queue).body == b"1"


# ---- What a redelivered message tells


def test_message_delivered_for_the_first_time_tells_no_counts(connection, channel, declare, server):
    queue = declare("quorum")
    publish_confirmed(connection, queue, "1")
    message = get_one(channel, queue)
    assert (message.redelivered, counts(message)) == (False, (0 if server.is_3x else None, None))


@pytest.mark.parametrize("how", FAILED + RETURNED)
def test_headers_count_failed_deliveries_and_all_deliveries(
    how, connection, channel, declare, attempt, server
):
    queue = declare("quorum")
    publish_confirmed(connection, queue, "1", headers={"own": "kept"})
    attempt(queue, how, how)
    message = get_one(channel, queue)
    assert message.redelivered
    if server.is_3x:
        assert counts(message) == (2, None)
    else:
        assert counts(message) == (2 if how in FAILED else None, 2)
    assert message.properties.headers["own"] == "kept"


@pytest.mark.since("4.0", "x-acquired-count")
def test_failed_and_returned_deliveries_are_counted_apart(connection, channel, declare, attempt):
    queue = declare("quorum")
    publish_confirmed(connection, queue, "1")
    taken = attempt(queue, "nack", "reject", "recover", "channel_close", "nack")
    taken.append(get_one(channel, queue))
    assert [counts(message) for message in taken] == [
        (None, None),
        (None, 1),
        (1, 2),
        (1, 3),
        (2, 4),
        (2, 5),
    ]


@pytest.mark.parametrize("by", ["get", "deliver"])
def test_counts_are_64_bit_integers(by, client, declare, server):
    queue = declare("quorum")
    client.do(1, "confirm.select")
    client.publish(1, "", queue, b"1")
    client.expect("basic.ack")
    first = client.get(1, queue, no_ack=False)
    client.send_method(1, "basic.reject", delivery_tag=first.delivery_tag, requeue=True)
    if by == "get":
        again = eventually(lambda: (got := client.get(1, queue)).properties and got)
    else:
        client.do(1, "basic.consume", queue=queue)
        again = client.expect("basic.deliver")
    expected = {"x-delivery-count": Typed("l", 1)}
    if not server.is_3x:
        expected["x-acquired-count"] = Typed("l", 1)
    assert (again.redelivered, again.properties["headers"]) == (True, expected)


def test_consumer_sees_counts_grow(connection, channel, declare, server):
    queue = declare("quorum")
    channel.basic_qos(prefetch_count=1)
    deliveries = consume(connection, channel, queue)
    publish_confirmed(connection, queue, "1")
    for number in range(1, 4):
        give_back(channel, deliveries.wait_for(number)[-1], "reject")
    last = deliveries.wait_for(4)[-1]
    assert [delivery.redelivered for delivery in deliveries] == [False, True, True, True]
    assert counts(last) == (3, None if server.is_3x else 3)


@pytest.mark.since("4.0", "x-acquired-count")
def test_counts_a_publisher_claims_are_passed_on_and_then_replaced(connection, channel, declare, attempt):
    queue = declare("quorum", delivery_limit=1)
    claimed = {"x-delivery-count": 7, "x-acquired-count": 9}
    publish_confirmed(connection, queue, "1", headers=claimed)
    first = attempt(queue, "reject")[0]
    assert (first.redelivered, first.properties.headers) == (False, claimed)
    assert counts(get_one(channel, queue)) == (1, 1)


@pytest.mark.since("4.3", "counts that go along with dead letters")
def test_dead_letter_brings_its_count_of_failed_deliveries_along(connection, channel, declare, attempt):
    graveyard = declare("quorum", delivery_limit=4)
    queue = declare("quorum", delivery_limit=2, dead_letter_exchange="", dead_letter_routing_key=graveyard)
    publish_confirmed(connection, queue, "1")
    attempt(queue, *["reject"] * 3)
    dead = attempt(graveyard, "reject", "reject")
    assert [(message.redelivered, counts(message)[0]) for message in dead] == [(True, 3), (True, 4)]
    eventually(lambda: count_of(channel, graveyard) == 0)
    assert get(channel, graveyard) is None


@pytest.mark.since("4.3", "counts that go along with dead letters")
@pytest.mark.parametrize("target", ["quorum", "classic"])
def test_rejected_message_is_redelivered_wherever_it_is_dead_lettered(target, connection, channel, declare):
    graveyard = declare(target)
    queue = declare("quorum", dead_letter_exchange="", dead_letter_routing_key=graveyard)
    publish_confirmed(connection, queue, "1")
    channel.basic_reject(get_one(channel, queue).tag, requeue=False)
    dead = get_one(channel, graveyard)
    assert (dead.redelivered, counts(dead)[0]) == (True, 1 if target == "quorum" else None)


@pytest.mark.parametrize("target", ["quorum", "classic"])
def test_expired_message_is_not_redelivered_where_it_is_dead_lettered(
    target, connection, channel, declare, server
):
    graveyard = declare(target)
    queue = declare("quorum", message_ttl=1, dead_letter_exchange="", dead_letter_routing_key=graveyard)
    publish_confirmed(connection, queue, "1")
    dead = get_one(channel, graveyard)
    told = 0 if server.is_3x and target == "quorum" else None
    assert (dead.redelivered, counts(dead)) == (False, (told, None))


# ---- Where a returned message is put


@pytest.mark.parametrize("how", ["nack", "reject"])
def test_returned_messages_go_to_the_front_in_the_order_of_return(how, connection, channel, declare):
    queue = declare("quorum", delivery_limit=20)
    publish_confirmed(connection, queue, *numbers(5))
    held = [get_one(channel, queue) for _ in range(3)]
    for index in (1, 0):
        give_back(channel, held[index], how)
    eventually(lambda: count_of(channel, queue) == 4)
    order = [get_one(channel, queue).body for _ in range(4)]
    assert order == [b"2", b"1", b"4", b"5"]


@pytest.mark.parametrize("how", ["multiple_nack", "recover", "channel_close"])
def test_messages_returned_together_keep_their_order(how, connection, declare):
    queue = declare("quorum", delivery_limit=20)
    publish_confirmed(connection, queue, *numbers(5))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=3)
    deliveries = consume(connection, channel, queue).wait_for(3)
    channel.basic_cancel(deliveries.consumer_tag)
    give_back(channel, deliveries[-1], how)
    other = connection.channel()
    eventually(lambda: count_of(other, queue) == 5)
    assert [get_one(other, queue).body for _ in range(5)] == numbers(5)


@pytest.mark.since("4.3", "returning to the front without a delivery limit")
@pytest.mark.parametrize("how", FAILED + RETURNED)
def test_returned_messages_go_to_the_front_without_a_limit_too(how, connection, channel, declare, attempt):
    queue = declare("quorum", delivery_limit=-1)
    publish_confirmed(connection, queue, *numbers(3))
    attempt(queue, how)
    eventually(lambda: count_of(channel, queue) == 3)
    assert drain(channel, queue) == numbers(3)


# ---- Delayed retry


def retried_after(channel, queue, how):
    """Gives the next message back and tells after how many seconds it can be had again."""
    message = get_one(channel, queue)
    start = time.monotonic()
    give_back(channel, message, how)
    again = eventually(lambda: get(channel, queue), within=15)
    waited = time.monotonic() - start
    assert again.body == message.body
    channel.basic_ack(again.tag)
    return waited


@pytest.mark.since("4.3", "delayed retry")
@pytest.mark.parametrize(
    "kind, how",
    [
        ("all", "reject"),
        ("all", "nack"),
        ("all", "recover"),
        ("failed", "reject"),
        ("returned", "nack"),
        ("returned", "recover"),
    ],
)
def test_message_of_that_kind_waits_before_it_is_retried(kind, how, connection, channel, declare):
    queue = declare("quorum", delayed_retry_type=kind, delayed_retry_min=800, delayed_retry_max=5000)
    publish_confirmed(connection, queue, "1")
    assert retried_after(channel, queue, how) >= 0.8 - ROUNDING


@pytest.mark.since("4.3", "delayed retry")
@pytest.mark.parametrize(
    "kind, how",
    [("failed", "nack"), ("returned", "reject"), ("disabled", "reject"), ("never", "nack")],
)
def test_message_of_another_kind_is_retried_at_once(kind, how, connection, channel, declare):
    queue = declare("quorum", delayed_retry_type=kind, delayed_retry_min=30_000, delayed_retry_max=60_000)
    publish_confirmed(connection, queue, "1")
    assert retried_after(channel, queue, how) < 15


@pytest.mark.since("4.3", "delayed retry")
def test_nothing_is_delayed_without_a_least_delay(connection, channel, declare):
    queue = declare("quorum", delayed_retry_type="all", delayed_retry_max=60_000)
    publish_confirmed(connection, queue, "1")
    assert retried_after(channel, queue, "reject") < 15


@pytest.mark.since("4.3", "delayed retry")
def test_delay_grows_with_the_failed_deliveries_up_to_the_longest(connection, channel, declare):
    queue = declare("quorum", delayed_retry_type="failed", delayed_retry_min=300, delayed_retry_max=700)
    publish_confirmed(connection, queue, "1")
    deliveries = consume(connection, channel, queue)
    waited = []
    for number in range(1, 5):
        deliveries.wait_for(number)
        start = time.monotonic()
        give_back(channel, deliveries[-1], "reject")
        deliveries.wait_for(number + 1, within=15)
        waited.append(time.monotonic() - start)
    for actual, least in zip(waited, [0.3, 0.6, 0.7, 0.7]):
        assert actual >= least - ROUNDING
    assert [counts(delivery)[0] for delivery in deliveries] == [None, 1, 2, 3, 4]


@pytest.mark.since("4.3", "delayed retry")
def test_least_delay_is_used_when_no_longest_is_given(connection, channel, declare):
    queue = declare("quorum", delayed_retry_type="all", delayed_retry_min=500)
    publish_confirmed(connection, queue, "1")
    assert retried_after(channel, queue, "nack") >= 0.5 - ROUNDING


@pytest.mark.since("4.3", "delayed retry")
def test_others_are_served_while_a_message_waits(connection, channel, declare):
    queue = declare("quorum", delayed_retry_type="all", delayed_retry_min=1000)
    publish_confirmed(connection, queue, *numbers(3))
    deliveries = consume(connection, channel, queue)
    deliveries.wait_for(3)
    give_back(channel, deliveries[0], "reject")
    publish_confirmed(connection, queue, "4")
    assert deliveries.wait_for(5, within=15).bodies == [b"1", b"2", b"3", b"4", b"1"]


@pytest.mark.since("4.3", "delayed retry")
def test_purge_takes_waiting_messages_too(connection, channel, declare):
    queue = declare("quorum", delayed_retry_type="all", delayed_retry_min=1000)
    publish_confirmed(connection, queue, *numbers(2))
    give_back(channel, get_one(channel, queue), "reject")
    eventually(lambda: count_of(channel, queue) == 1)
    assert channel.queue_purge(queue).method.message_count == 2
    connection.sleep(1.5)
    assert get(channel, queue) is None
