"""Which messages are dead-lettered, where they go, and which are not. Headers: test_x_death.py."""

import time

import pytest

from helpers import (
    Confirms,
    channel_error,
    consume,
    drain,
    expect_counts,
    get,
    get_one,
    never,
    numbers,
    publish,
)
from raw import publish_frames


def bury(channel, queue):
    """Gets a message and rejects it."""
    message = get_one(channel, queue)
    channel.basic_nack(message.tag, requeue=False)
    return message


def reason_of(message):
    return message.properties.headers["x-death"][0]["reason"]


@pytest.fixture
def dead(declare):
    return declare("dead")


@pytest.fixture
def mortal(declare, dead):
    """Declares a queue whose dead letters go to `dead`."""
    return lambda **arguments: declare(dead_letter_exchange="", dead_letter_routing_key=dead, **arguments)


@pytest.fixture
def exchange(channel, name):
    """Declares exchanges, direct ones unless told otherwise."""

    def declare_exchange(kind="direct", **options):
        exchange = name("dlx")
        channel.exchange_declare(exchange, kind, **options)
        return exchange

    return declare_exchange


# ---- What is dead-lettered


@pytest.mark.parametrize("settle", ["basic_reject", "basic_nack"])
def test_rejected_message_moves(settle, queue_type, channel, mortal, dead):
    queue = mortal(queue_type=queue_type)
    publish(channel, queue, "1")
    getattr(channel, settle)(get_one(channel, queue).tag, requeue=False)
    message = get_one(channel, dead)
    assert (message.body, reason_of(message)) == (b"1", "rejected")
    channel.close()
    assert get(channel.connection.channel(), queue) is None


def test_messages_rejected_together_keep_their_order(queue_type, channel, mortal, dead):
    queue = mortal(queue_type=queue_type)
    publish(channel, queue, *numbers(20))
    held = [get_one(channel, queue) for _ in range(20)]
    channel.basic_nack(held[-1].tag, multiple=True, requeue=False)
    expect_counts(channel, dead, messages=20, consumers=0)
    assert drain(channel, dead) == numbers(20)


def test_messages_rejected_one_by_one_come_in_order_of_rejection(channel, mortal, dead):
    queue = mortal()
    publish(channel, queue, *numbers(5))
    held = [get_one(channel, queue) for _ in range(5)]
    for message in reversed(held):
        channel.basic_reject(message.tag, requeue=False)
    expect_counts(channel, dead, messages=5, consumers=0)
    assert drain(channel, dead) == numbers(5)[::-1]


def test_rejecting_everything_reaches_over_queues(connection, channel, mortal, dead):
    queues = [mortal() for _ in range(3)]
    holder = connection.channel()
    for queue, body in zip(queues, numbers(3)):
        publish(channel, queue, body)
        get_one(holder, queue)
    holder.basic_nack(0, multiple=True, requeue=False)
    expect_counts(channel, dead, messages=3, consumers=0)
    assert sorted(drain(channel, dead)) == numbers(3)


def test_expired_messages_move_in_order(queue_type, channel, mortal, dead):
    queue = mortal(queue_type=queue_type, message_ttl=200)
    publish(channel, queue, *numbers(50))
    expect_counts(channel, dead, messages=50, consumers=0)
    assert drain(channel, dead) == numbers(50)


def test_messages_that_overflow_move_in_order(queue_type, channel, mortal, dead):
    queue = mortal(queue_type=queue_type, max_length=2)
    publish(channel, queue, *numbers(20))
    expect_counts(channel, dead, messages=18, consumers=0)
    assert drain(channel, dead) == numbers(18)
    assert drain(channel, queue) == numbers(20)[18:]


@pytest.mark.rabbitmq_only("expired messages leave wherever they stand")
def test_expired_message_behind_the_head_moves_once_it_gets_there(queue_type, channel, mortal, dead):
    queue = mortal(queue_type=queue_type)
    publish(channel, queue, "lives")
    publish(channel, queue, "expires", expiration="100")
    expect_counts(channel, queue, messages=2, consumers=0)
    never(lambda: get(channel, dead))
    get_one(channel, queue, auto_ack=True)
    assert get_one(channel, dead).body == b"expires"


def test_message_without_any_time_moves_at_once(channel, mortal, dead):
    queue = mortal(message_ttl=0)
    publish(channel, queue, "1")
    message = get_one(channel, dead)
    assert (message.body, reason_of(message)) == (b"1", "expired")


def test_requeued_message_that_expired_moves(queue_type, channel, mortal, dead):
    queue = mortal(queue_type=queue_type, message_ttl=1000)
    publish(channel, queue, "1")
    message = get_one(channel, queue)
    time.sleep(1.1)
    channel.basic_nack(message.tag, requeue=True)
    message = get_one(channel, dead)
    assert (message.body, reason_of(message)) == (b"1", "expired")


def test_large_message_moves_intact(channel, mortal, dead):
    queue = mortal()
    body = bytes(range(256)) * 8192
    publish(channel, queue, body, delivery_mode=2)
    bury(channel, queue)
    assert get_one(channel, dead).body == body


def test_backlog_of_dead_letters_moves_completely(connection, client, mortal, dead):
    queue = mortal(message_ttl=1000)
    client.do(1, "confirm.select")
    client.send(b"".join(publish_frames(1, "", queue, body) for body in numbers(5000)))
    Confirms(client).expect(*range(1, 5001)).wait()
    deliveries = consume(connection, connection.channel(), dead, auto_ack=True)
    assert deliveries.wait_for(5000, within=20).bodies == numbers(5000)


@pytest.mark.parametrize("delivery_mode", [1, 2], ids=["transient", "persistent"])
def test_delivery_mode_is_kept(delivery_mode, queue_type, channel, mortal, dead):
    queue = mortal(queue_type=queue_type)
    publish(channel, queue, "1", delivery_mode=delivery_mode)
    bury(channel, queue)
    assert get_one(channel, dead).properties.delivery_mode == delivery_mode


def test_dead_letter_lives_as_long_as_its_new_queue_says(channel, declare):
    dead = declare("dead", message_ttl=60000)
    queue = declare(dead_letter_exchange="", dead_letter_routing_key=dead)
    publish(channel, queue, "1", expiration="100")
    expect_counts(channel, dead, messages=1, consumers=0)
    time.sleep(0.3)
    assert drain(channel, dead) == [b"1"]


def test_dead_letter_of_an_exclusive_queue_moves(channel, name, dead):
    queue = name()
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    channel.queue_declare(queue, exclusive=True, arguments=arguments)
    publish(channel, queue, "1")
    bury(channel, queue)
    assert get_one(channel, dead).body == b"1"


# ---- What is not


def test_rejected_message_of_a_queue_without_an_exchange_is_dropped(queue_type, channel, declare):
    queue = declare(queue_type=queue_type)
    publish(channel, queue, "1")
    bury(channel, queue)
    channel.close()
    assert get(channel.connection.channel(), queue) is None


@pytest.mark.parametrize("how", ["ack", "auto_ack", "requeue", "recover", "close", "purge", "delete"])
def test_message_that_does_not_die_is_not_dead_lettered(how, queue_type, connection, channel, mortal, dead):
    queue = mortal(queue_type=queue_type)
    publish(channel, queue, "1", "2")
    other = connection.channel()
    message = get_one(other, queue, auto_ack=how == "auto_ack")
    match how:
        case "ack":
            other.basic_ack(message.tag)
        case "requeue":
            other.basic_nack(message.tag, requeue=True)
        case "recover":
            other.basic_recover(requeue=True)
        case "close":
            other.close()
        case "purge":
            assert channel.queue_purge(queue).method.message_count == 1
        case "delete":
            channel.queue_delete(queue)
    never(lambda: get(channel, dead))


def test_messages_held_when_their_queue_is_deleted_are_not_dead_lettered(connection, channel, mortal, dead):
    queue = mortal()
    publish(channel, queue, "1", "2")
    message = get_one(channel, queue)
    connection.channel().queue_delete(queue)
    channel.basic_nack(message.tag, requeue=False)
    never(lambda: get(channel, dead))


def test_messages_of_an_exclusive_queue_go_with_its_connection(connect, channel, name, dead):
    queue = name()
    owner = connect()
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    owner.channel().queue_declare(queue, exclusive=True, arguments=arguments)
    publish(channel, queue, "1")
    owner.close()
    never(lambda: get(channel, dead))


def test_message_left_by_a_failed_publish_is_not_dead_lettered(connection, channel, mortal, dead):
    queue = mortal(message_ttl=0)
    with channel_error(406, "invalid expiration 'soon': no_integer"):
        other = connection.channel()
        publish(other, queue, "1", expiration="soon")
        other.basic_qos()
    never(lambda: get(channel, dead))


# ---- Transactions and confirms


@pytest.mark.parametrize("finish, moved", [("tx_commit", True), ("tx_rollback", False)])
def test_rejection_in_a_transaction_counts_with_commit(finish, moved, connection, channel, mortal, dead):
    queue = mortal()
    publish(channel, queue, "1")
    tx = connection.channel()
    tx.tx_select()
    bury(tx, queue)
    tx.basic_qos()
    never(lambda: get(channel, dead), during=0.2)
    getattr(tx, finish)()
    if moved:
        assert get_one(channel, dead).body == b"1"
    else:
        never(lambda: get(channel, dead), during=0.2)


@pytest.mark.parametrize("target", ["missing", "full", "queue"])
def test_message_is_confirmed_whatever_becomes_of_its_dead_letter(target, client, declare, name):
    key = {
        "missing": lambda: name("missing"),
        "full": lambda: declare("full", max_length=0, overflow="reject-publish"),
        "queue": lambda: declare("dead"),
    }[target]()
    queue = declare(max_length=0, dead_letter_exchange="", dead_letter_routing_key=key)
    client.do(1, "confirm.select")
    for number in range(1, 21):
        client.publish(1, "", queue, b"1", {"delivery_mode": 2}, mandatory=True)
        assert client.expect("basic.ack").delivery_tag == number


# ---- Where they go


def place(message):
    return message.method.exchange, message.method.routing_key


def test_dead_letter_goes_by_its_own_key_unless_told_otherwise(queue_type, channel, declare, exchange):
    dead, other, dlx = declare("dead"), declare("other"), exchange()
    queue = declare(queue_type=queue_type, dead_letter_exchange=dlx)
    channel.queue_bind(queue, "amq.topic", f"{queue}.*")
    channel.queue_bind(dead, dlx, f"{queue}.key")
    channel.queue_bind(other, dlx, queue)
    channel.basic_publish("amq.topic", f"{queue}.key", b"1")
    bury(channel, queue)
    assert place(get_one(channel, dead)) == (dlx, f"{queue}.key")
    assert drain(channel, other) == []


@pytest.mark.parametrize("key", ["told", "", "x" * 255], ids=["told", "empty", "long"])
def test_dead_letter_key_takes_the_place_of_its_own(key, queue_type, channel, declare, exchange):
    dead, other, dlx = declare("dead"), declare("other"), exchange()
    queue = declare(queue_type=queue_type, dead_letter_exchange=dlx, dead_letter_routing_key=key)
    channel.queue_bind(dead, dlx, key)
    channel.queue_bind(other, dlx, queue)
    publish(channel, queue, "1")
    bury(channel, queue)
    assert place(get_one(channel, dead)) == (dlx, key)
    assert drain(channel, other) == []


@pytest.mark.parametrize(
    "kind, key, arguments",
    [
        ("direct", "a.b.c", {}),
        ("topic", "a.#", {}),
        ("fanout", "", {}),
        ("headers", "", {"x-match": "all", "mine": 1}),
        ("headers", "", {"x-match": "any-with-x", "x-first-death-reason": "rejected"}),
    ],
    ids=["direct", "topic", "fanout", "headers", "headers_of_death"],
)
def test_exchange_of_any_type_routes_dead_letters(kind, key, arguments, channel, declare, exchange):
    dlx = exchange(kind)
    queue = declare(dead_letter_exchange=dlx, dead_letter_routing_key="a.b.c")
    dead = declare("dead")
    channel.queue_bind(dead, dlx, key, arguments)
    publish(channel, queue, "1", headers={"mine": 1})
    bury(channel, queue)
    assert place(get_one(channel, dead)) == (dlx, "a.b.c")


def test_internal_exchange_routes_dead_letters(channel, declare, exchange):
    dlx, dead = exchange("fanout", internal=True), declare("dead")
    queue = declare(dead_letter_exchange=dlx)
    channel.queue_bind(dead, dlx)
    publish(channel, queue, "1")
    bury(channel, queue)
    assert get_one(channel, dead).body == b"1"


def test_dead_letter_passes_from_exchange_to_exchange(channel, declare, exchange):
    first, second, dead = exchange("fanout"), exchange("fanout"), declare("dead")
    channel.exchange_bind(second, first)
    channel.queue_bind(dead, second)
    queue = declare(dead_letter_exchange=first)
    publish(channel, queue, "1")
    bury(channel, queue)
    assert place(get_one(channel, dead)) == (first, queue)


def test_every_queue_bound_gets_a_copy(queue_type, channel, declare, exchange):
    dlx, graves = exchange("fanout"), [declare("dead") for _ in range(3)]
    for dead in graves:
        channel.queue_bind(dead, dlx)
    queue = declare(queue_type=queue_type, dead_letter_exchange=dlx)
    publish(channel, queue, *numbers(5))
    for _ in range(5):
        bury(channel, queue)
    for dead in graves:
        expect_counts(channel, dead, messages=5, consumers=0)
        assert drain(channel, dead) == numbers(5)


def test_copies_are_routed_as_well(queue_type, channel, declare, exchange):
    dlx, graves = exchange(), {key: declare("dead") for key in ("cc", "bcc", "other")}
    for key, dead in graves.items():
        channel.queue_bind(dead, dlx, key)
    queue = declare(queue_type=queue_type, dead_letter_exchange=dlx)
    publish(channel, queue, "1", headers={"CC": ["cc"], "BCC": ["bcc"]})
    bury(channel, queue)
    for key in ("cc", "bcc"):
        assert place(get_one(channel, graves[key])) == (dlx, queue)
    assert drain(channel, graves["other"]) == []


def test_copies_are_not_routed_when_a_dead_letter_key_is_given(queue_type, channel, declare, exchange):
    dlx, graves = exchange(), {key: declare("dead") for key in ("told", "cc", "bcc")}
    for key, dead in graves.items():
        channel.queue_bind(dead, dlx, key)
    queue = declare(queue_type=queue_type, dead_letter_exchange=dlx, dead_letter_routing_key="told")
    publish(channel, queue, "1", headers={"CC": ["cc"], "BCC": ["bcc"]})
    bury(channel, queue)
    assert place(get_one(channel, graves["told"])) == (dlx, "told")
    assert (drain(channel, graves["cc"]), drain(channel, graves["bcc"])) == ([], [])


def test_missing_exchange_swallows_dead_letters(queue_type, channel, declare, name):
    missing = name("missing")
    queue = declare(queue_type=queue_type, dead_letter_exchange=missing)
    publish(channel, queue, "1", "2")
    bury(channel, queue)
    channel.basic_qos()
    # Once there is one, what dies from then on goes there.
    dead = declare("dead")
    channel.exchange_declare(missing, "fanout")
    channel.queue_bind(dead, missing)
    bury(channel, queue)
    assert get_one(channel, dead).body == b"2"
    assert drain(channel, dead) == []


def test_dead_letter_without_a_route_is_dropped(queue_type, channel, declare, exchange):
    queue = declare(queue_type=queue_type, dead_letter_exchange=exchange())
    publish(channel, queue, "1")
    bury(channel, queue)
    expect_counts(channel, queue, messages=0, consumers=0)


def test_dead_letter_without_a_route_takes_the_alternate_exchange(channel, declare, exchange):
    alternate, dead = exchange("fanout"), declare("dead")
    dlx = exchange(arguments={"alternate-exchange": alternate})
    channel.queue_bind(dead, alternate)
    queue = declare(dead_letter_exchange=dlx, dead_letter_routing_key="nobody's")
    publish(channel, queue, "1")
    bury(channel, queue)
    assert place(get_one(channel, dead)) == (dlx, "nobody's")


@pytest.mark.parametrize(
    "overflow, left", [("drop-head", [b"3"]), ("reject-publish", [b"1"])], ids=["drop-head", "reject-publish"]
)
def test_full_queue_drops_or_refuses_dead_letters(overflow, left, channel, declare, exchange):
    dlx, dead, witness = exchange("fanout"), declare(max_length=1, overflow=overflow), declare("witness")
    for queue in (dead, witness):
        channel.queue_bind(queue, dlx)
    queue = declare(dead_letter_exchange=dlx)
    publish(channel, queue, *numbers(3))
    for _ in range(3):
        bury(channel, queue)
    expect_counts(channel, witness, messages=3, consumers=0)
    time.sleep(0.2)
    assert drain(channel, dead) == left


def test_dead_letter_goes_to_a_waiting_consumer(queue_type, connection, channel, mortal, dead):
    queue = mortal(queue_type=queue_type)
    deliveries = consume(connection, connection.channel(), dead, auto_ack=True)
    publish(channel, queue, *numbers(5))
    for _ in range(5):
        bury(channel, queue)
    assert deliveries.wait_for(5).bodies == numbers(5)


# ---- At least once


@pytest.fixture
def careful(declare):
    """Declares a quorum queue that keeps its dead letters until they have arrived."""
    return lambda **arguments: declare(
        queue_type="quorum", dead_letter_strategy="at-least-once", overflow="reject-publish", **arguments
    )


def test_careful_dead_letters_arrive(channel, careful, dead):
    queue = careful(dead_letter_exchange="", dead_letter_routing_key=dead, message_ttl=200)
    publish(channel, queue, *numbers(20))
    expect_counts(channel, dead, messages=20, consumers=0)
    assert drain(channel, dead) == numbers(20)
    expect_counts(channel, queue, messages=0, consumers=0)


def test_careful_dead_letters_are_not_delivered_again(channel, careful, name):
    queue = careful(dead_letter_exchange=name("missing"))
    publish(channel, queue, "1")
    bury(channel, queue)
    never(lambda: get(channel, queue))


# ---- Going round


def ring(channel, names, *arguments):
    """Declares queues, each with its own arguments, whose dead letters go to the next one."""
    for place, (queue, more) in enumerate(zip(names, arguments)):
        after = names[(place + 1) % len(names)]
        table = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": after} | more
        channel.queue_declare(queue, durable=True, arguments=table)


EXPIRING = {"x-message-ttl": 100}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_message_that_would_go_round_for_ever_is_dropped(length, channel, name):
    names = [name(f"round{place}") for place in range(length)]
    ring(channel, names, *[EXPIRING] * length)
    publish(channel, names[0], "1")
    time.sleep(0.1 * length + 0.5)
    for queue in names:
        expect_counts(channel, queue, messages=0, consumers=0)
        assert drain(channel, queue) == []


@pytest.mark.parametrize(
    "length, rejecting", [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
)
def test_one_rejection_on_the_way_keeps_it_going(length, rejecting, channel, name, server):
    if server.is_3x and length > 2:
        pytest.skip("RabbitMQ 3.x does not keep a longer history in order, and finds a cycle")
    names = [name(f"round{place}") for place in range(length)]
    ring(channel, names, *({} if place == rejecting else EXPIRING for place in range(length)))
    publish(channel, names[0], "1")
    for turn in range(3):
        headers = bury(channel, names[rejecting]).properties.headers or {}
        counts = {death["queue"]: death["count"] for death in headers.get("x-death", [])}
        expected = {queue: turn + (place < rejecting) for place, queue in enumerate(names)}
        assert counts == {queue: count for queue, count in expected.items() if count}


def test_rejected_message_may_return_to_its_own_queue_for_ever(queue_type, channel, declare):
    queue = declare(queue_type=queue_type, dead_letter_exchange="")
    publish(channel, queue, "1")
    for _ in range(5):
        assert bury(channel, queue).body == b"1"
    (death,) = get_one(channel, queue).properties.headers["x-death"]
    assert (death["count"], death["reason"]) == (5, "rejected")


def test_rejection_before_the_round_does_not_keep_it_going(channel, declare, name, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x does not keep a longer history in order, and misses the cycle")
    names = [name(f"round{place}") for place in range(2)]
    ring(channel, names, EXPIRING, EXPIRING)
    queue = declare(dead_letter_exchange="", dead_letter_routing_key=names[0])
    publish(channel, queue, "1")
    bury(channel, queue)
    time.sleep(0.7)
    assert [drain(channel, each) for each in names] == [[], []]


def test_only_the_way_back_is_closed(channel, declare, exchange):
    dlx, dead = exchange("fanout"), declare("dead")
    queue = declare(message_ttl=100, dead_letter_exchange=dlx)
    channel.queue_bind(queue, dlx)
    channel.queue_bind(dead, dlx)
    publish(channel, queue, "1")
    assert get_one(channel, dead).body == b"1"
    never(lambda: get(channel, queue))
    assert drain(channel, dead) == []


def test_message_that_overflows_does_not_return_to_the_full_queue(channel, declare):
    queue = declare(max_length=1, dead_letter_exchange="")
    publish(channel, queue, "1", "2", "3")
    expect_counts(channel, queue, messages=1, consumers=0)
    assert drain(channel, queue) == [b"3"]


def test_message_published_again_by_a_client_may_go_round_again(channel, name, dead):
    queue = name()
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead, "x-message-ttl": 50}
    channel.queue_declare(queue, durable=True, arguments=arguments)
    publish(channel, queue, "1")
    for _ in range(3):
        message = get_one(channel, dead, auto_ack=True)
        publish(channel, queue, message.body, headers=message.properties.headers)
    assert get_one(channel, dead).body == b"1"


# ---- Delivery limit of quorum queues


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_message_dies_when_it_has_failed_more_often_than_the_limit(limit, channel, mortal, dead):
    queue = mortal(queue_type="quorum", delivery_limit=limit)
    publish(channel, queue, "1")
    for _ in range(limit + 1):
        channel.basic_reject(get_one(channel, queue).tag, requeue=True)
    message = get_one(channel, dead)
    assert (message.body, reason_of(message)) == (b"1", "delivery_limit")


def test_lost_consumers_count_towards_the_limit(connection, channel, mortal, dead):
    queue = mortal(queue_type="quorum", delivery_limit=2)
    publish(channel, queue, "1")
    for _ in range(3):
        other = connection.channel()
        get_one(other, queue)
        other.close()
    assert reason_of(get_one(channel, dead)) == "delivery_limit"


@pytest.mark.parametrize("how", ["nack", "recover"])
def test_messages_handed_back_do_not_count_towards_the_limit(how, channel, mortal, dead, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x counts every return")
    queue = mortal(queue_type="quorum", delivery_limit=1)
    publish(channel, queue, "1")
    for _ in range(5):
        message = get_one(channel, queue)
        if how == "nack":
            channel.basic_nack(message.tag, requeue=True)
        else:
            channel.basic_recover(requeue=True)
    assert get_one(channel, queue).body == b"1"
    never(lambda: get(channel, dead), during=0.2)


def test_limit_is_20_unless_told_otherwise(channel, mortal, dead, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x has no limit unless told")
    queue = mortal(queue_type="quorum")
    publish(channel, queue, "1")
    for _ in range(21):
        channel.basic_reject(get_one(channel, queue).tag, requeue=True)
    assert reason_of(get_one(channel, dead)) == "delivery_limit"


def test_message_over_the_limit_is_dropped_without_an_exchange(channel, declare):
    queue = declare(queue_type="quorum", delivery_limit=0)
    publish(channel, queue, "1")
    channel.basic_reject(get_one(channel, queue).tag, requeue=True)
    never(lambda: get(channel, queue))
