"""What dead-lettering writes into a message: x-death and its companions, type by type."""

from __future__ import annotations

import time
from typing import Any

import pytest

from helpers import Server, eventually, get_eventually
from raw import Method, Typed

KEY_ORDER = ["original-expiration", "count", "reason", "queue", "time", "exchange", "routing-keys"]


def text(value: str) -> Typed:
    return Typed("S", value)


def texts(*values: str) -> Typed:
    return Typed("A", [text(value) for value in values])


def death(
    queue: str,
    reason: str,
    exchange: str = "",
    keys: tuple[str, ...] | None = None,
    count: int = 1,
    expiration: str | None = None,
) -> dict[str, Typed]:
    """An entry of x-death but for its time; unless told, the message came by its queue's name."""
    entry = {
        "count": Typed("l", count),
        "reason": text(reason),
        "queue": text(queue),
        "exchange": text(exchange),
        "routing-keys": texts(*(keys or (queue,))),
    }
    return entry | ({"original-expiration": text(expiration)} if expiration else {})


def companions(first: dict[str, Typed], last: dict[str, Typed], server: Server) -> dict[str, Typed]:
    """The x-first-death- and x-last-death- headers that go with two entries."""
    out = {f"x-first-death-{key}": first[key] for key in ("exchange", "queue", "reason")}
    if not server.is_3x:
        out |= {f"x-last-death-{key}": last[key] for key in ("exchange", "queue", "reason")}
    return out


def deaths_of(message: Method) -> list[dict[str, Typed]]:
    """The entries of x-death, newest first, after a look at their times."""
    x_death = message.properties["headers"]["x-death"]
    assert x_death.tag == "A"
    entries = []
    for entry in x_death.value:
        assert entry.tag == "F"
        time_of_death = entry.value["time"]
        assert time_of_death.tag == "T"
        assert abs(time_of_death.value - time.time()) < 30
        entries.append({key: value for key, value in entry.value.items() if key != "time"})
    return entries


def assert_deaths(
    message: Method, *expected: dict[str, Typed], server: Server, first: int = -1, **headers: Any
) -> None:
    """These deaths, newest first, and these other headers: exactly, and in order of their keys.

    `first` says which of the deaths was the first of all, if it is not the last one listed.
    """
    entries = deaths_of(message)
    if server.is_3x:
        # There the newest comes first and the others in no order to rely on.
        assert entries[0] == expected[0]
        assert sorted(entries, key=place) == sorted(expected, key=place)
    else:
        assert entries == list(expected)
        for entry in message.properties["headers"]["x-death"].value:
            assert list(entry.value) == [key for key in KEY_ORDER if key in entry.value]
        keys = list(message.properties["headers"])
        assert keys == sorted(keys, key=str.encode)
    others = {key: value for key, value in message.properties["headers"].items() if key != "x-death"}
    assert others == companions(expected[first], expected[0], server) | headers


def place(entry: dict[str, Typed]) -> tuple[str, str]:
    return entry["queue"].value, entry["reason"].value


@pytest.fixture
def bury(client):
    """Gets a message and rejects it."""

    def reject(queue: str, method: str = "basic.nack") -> Method:
        message = get_eventually(client, 1, queue, no_ack=False)
        client.send_method(1, method, delivery_tag=message.delivery_tag)
        return message

    return reject


@pytest.fixture
def dead(declare) -> str:
    return declare("dead")


@pytest.fixture
def mortal(declare, dead):
    """Declares a queue whose dead letters go to `dead`."""

    def declare_mortal(**arguments: Any) -> str:
        return declare(dead_letter_exchange="", dead_letter_routing_key=dead, **arguments)

    return declare_mortal


# ---- One death


@pytest.mark.parametrize("method", ["basic.reject", "basic.nack"])
def test_rejected(method, queue_type, client, bury, mortal, dead, server):
    queue = mortal(queue_type=queue_type)
    client.publish(1, "", queue, b"1")
    bury(queue, method)
    message = get_eventually(client, 1, dead)
    assert (message.exchange, message.routing_key, message.body) == ("", dead, b"1")
    assert_deaths(message, death(queue, "rejected"), server=server)
    assert list(message.properties) == ["headers"]


def test_expired_by_the_queue(queue_type, client, mortal, dead, server):
    queue = mortal(queue_type=queue_type, message_ttl=50)
    client.publish(1, "", queue, b"1")
    assert_deaths(get_eventually(client, 1, dead), death(queue, "expired"), server=server)


@pytest.mark.parametrize("ttl", [None, 50], ids=["message", "both"])
def test_expired_by_its_own_expiration(ttl, queue_type, client, mortal, dead, server):
    queue = mortal(queue_type=queue_type, **({"message_ttl": ttl} if ttl else {}))
    client.publish(1, "", queue, b"1", {"expiration": "60"})
    message = get_eventually(client, 1, dead)
    assert_deaths(message, death(queue, "expired", expiration="60"), server=server)
    assert list(message.properties) == ["headers"]


@pytest.mark.parametrize("limit", ["max_length", "max_length_bytes"])
def test_dropped_from_the_head(limit, queue_type, client, mortal, dead, server):
    queue = mortal(queue_type=queue_type, **{limit: 1 if limit == "max_length" else 3000})
    for body in (b"1" * 2000, b"2" * 2000):
        client.publish(1, "", queue, body)
    message = get_eventually(client, 1, dead)
    assert message.body[:1] == b"1"
    assert_deaths(message, death(queue, "maxlen"), server=server)


def test_refused_at_the_tail(client, mortal, dead, server):
    queue = mortal(max_length=1, overflow="reject-publish-dlx")
    for body in (b"1", b"2"):
        client.publish(1, "", queue, body)
    message = get_eventually(client, 1, dead)
    assert message.body == b"2"
    assert_deaths(message, death(queue, "maxlen"), server=server)


def test_delivered_too_often(client, mortal, dead, server):
    queue = mortal(queue_type="quorum", delivery_limit=1)
    client.publish(1, "", queue, b"1", {"headers": {"mine": 1}})
    for _ in range(2):
        message = get_eventually(client, 1, queue, no_ack=False)
        client.send_method(1, "basic.reject", delivery_tag=message.delivery_tag, requeue=True)
    message = get_eventually(client, 1, dead)
    assert_deaths(message, death(queue, "delivery_limit"), server=server, mine=Typed("I", 1))


@pytest.mark.parametrize("reason", ["rejected", "expired", "maxlen"])
def test_original_expiration_is_told_whatever_the_reason(reason, client, bury, mortal, dead, server):
    arguments = {"rejected": {}, "expired": {"message_ttl": 50}, "maxlen": {"max_length": 0}}[reason]
    queue = mortal(**arguments)
    client.publish(1, "", queue, b"1", {"expiration": "60000"})
    if reason == "rejected":
        bury(queue)
    message = get_eventually(client, 1, dead)
    assert_deaths(message, death(queue, reason, expiration="60000"), server=server)
    assert "expiration" not in message.properties


def test_all_other_properties_are_kept(client, bury, mortal, dead, server):
    queue = mortal()
    properties = {
        "content_type": "text/plain",
        "content_encoding": "utf-8",
        "delivery_mode": 2,
        "priority": 7,
        "correlation_id": "correlation",
        "reply_to": "reply",
        "message_id": "message",
        "timestamp": 12345,
        "type": "type",
        "user_id": client.user,
        "app_id": "app",
        "cluster_id": "cluster",
    }
    client.publish(1, "", queue, b"1", properties)
    bury(queue)
    message = get_eventually(client, 1, dead)
    assert_deaths(message, death(queue, "rejected"), server=server)
    assert {key: value for key, value in message.properties.items() if key != "headers"} == properties


def test_all_other_headers_are_kept_with_their_types(client, bury, mortal, dead, server):
    queue = mortal()
    headers = {
        "zebra": Typed("S", "text"),
        "byte": Typed("b", -1),
        "short": Typed("s", -300),
        "int": Typed("I", 70000),
        "long": Typed("l", 2**40),
        "bool": Typed("t", True),
        "double": Typed("d", 1.5),
        "bytes": Typed("x", b"\x00\xff"),
        "void": Typed("V", None),
        "timestamp": Typed("T", 12345),
        "table": Typed("F", {"b": Typed("I", 1), "a": Typed("A", [Typed("S", "x"), Typed("F", {})])}),
        "Upper": Typed("S", ""),
        "ünï": Typed("S", "umlaut"),
        "y-after-x-death": Typed("I", 1),
    }
    client.publish(1, "", queue, b"1", {"headers": headers})
    bury(queue)
    assert_deaths(get_eventually(client, 1, dead), death(queue, "rejected"), server=server, **headers)


def test_empty_header_table_is_filled(client, bury, mortal, dead, server):
    queue = mortal()
    client.publish(1, "", queue, b"1", {"headers": {}})
    bury(queue)
    assert_deaths(get_eventually(client, 1, dead), death(queue, "rejected"), server=server)


def test_exchange_and_key_are_those_the_message_was_published_with(
    client, bury, declare, channel, name, server
):
    published, dlx = name("published"), name("dlx")
    for exchange in (published, dlx):
        channel.exchange_declare(exchange, "topic")
    dead, queue = declare("dead"), declare(dead_letter_exchange=dlx)
    channel.queue_bind(queue, published, "#")
    channel.queue_bind(dead, dlx, "some.*")
    client.publish(1, published, "some.key", b"1")
    bury(queue)
    message = get_eventually(client, 1, dead)
    assert (message.exchange, message.routing_key) == (dlx, "some.key")
    entry = death(queue, "rejected", exchange=published, keys=("some.key",))
    assert_deaths(message, entry, server=server)


# ---- Copies


def test_keys_of_copies_are_told_but_for_the_blind_ones(client, bury, mortal, dead, server):
    queue = mortal()
    headers = {"CC": ["one", "two"], "BCC": ["blind"]}
    client.publish(1, "", queue, b"1", {"headers": headers})
    bury(queue)
    # RabbitMQ 3.x takes CC away together with the keys it named.
    kept = {} if server.is_3x else {"CC": texts("one", "two")}
    entry = death(queue, "rejected", keys=(queue, "one", "two"))
    assert_deaths(get_eventually(client, 1, dead), entry, server=server, **kept)


def test_copies_stay_in_the_headers_when_their_keys_are_used_again(
    client, bury, declare, channel, name, server
):
    dlx = name("dlx")
    channel.exchange_declare(dlx, "direct")
    dead, queue = declare("dead"), declare(dead_letter_exchange=dlx)
    channel.queue_bind(dead, dlx, "copy")
    client.publish(1, "", queue, b"1", {"headers": {"CC": ["copy"]}})
    bury(queue)
    message = get_eventually(client, 1, dead)
    assert (message.exchange, message.routing_key) == (dlx, queue)
    entry = death(queue, "rejected", keys=(queue, "copy"))
    assert_deaths(message, entry, server=server, CC=texts("copy"))


def test_second_death_tells_the_dead_letter_key_without_the_copies(client, bury, declare, server):
    last = declare("last")
    second = declare("second", dead_letter_exchange="", dead_letter_routing_key=last)
    first = declare("first", dead_letter_exchange="", dead_letter_routing_key=second)
    client.publish(1, "", first, b"1", {"headers": {"CC": ["copy"]}})
    bury(first)
    bury(second)
    kept = {} if server.is_3x else {"CC": texts("copy")}
    assert_deaths(
        get_eventually(client, 1, last),
        death(second, "rejected"),
        death(first, "rejected", keys=(first, "copy")),
        server=server,
        **kept,
    )


# ---- Several deaths


def test_three_hops_for_three_reasons(client, bury, declare, channel, name, server):
    exchanges = [name(f"dlx{hop}") for hop in range(3)]
    for exchange in exchanges:
        channel.exchange_declare(exchange, "fanout")
    queues = [
        declare("expiring", message_ttl=50, dead_letter_exchange=exchanges[0]),
        declare("rejecting", dead_letter_exchange=exchanges[1], dead_letter_routing_key="second"),
        declare("full", max_length=0, dead_letter_exchange=exchanges[2]),
        declare("last"),
    ]
    for exchange, queue in zip(exchanges, queues[1:]):
        channel.queue_bind(queue, exchange)
    client.publish(1, "", queues[0], b"1", {"expiration": "30000", "delivery_mode": 2})
    expired = death(queues[0], "expired", expiration="30000")
    assert_deaths(bury(queues[1]), expired, server=server)
    message = get_eventually(client, 1, queues[3])
    assert (message.exchange, message.routing_key) == (exchanges[2], "second")
    assert_deaths(
        message,
        death(queues[2], "maxlen", exchange=exchanges[1], keys=("second",)),
        death(queues[1], "rejected", exchange=exchanges[0], keys=(queues[0],)),
        expired,
        server=server,
    )
    assert message.properties["delivery_mode"] == 2


def test_deaths_for_the_same_reason_in_the_same_queue_are_counted(client, bury, declare, name, server):
    waiting = name("waiting")
    work = declare("work", dead_letter_exchange="", dead_letter_routing_key=waiting)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": work, "x-message-ttl": 50}
    client.do(1, "queue.declare", queue=waiting, durable=True, arguments=arguments)
    client.publish(1, "", work, b"1", {"expiration": "60000"})
    bury(work)
    for count in (1, 2, 3):
        assert_deaths(
            bury(work),
            death(waiting, "expired", count=count),
            death(work, "rejected", count=count, expiration="60000"),
            server=server,
        )


def test_time_is_that_of_the_first_of_several_deaths(client, bury, declare):
    queue = declare(dead_letter_exchange="")
    client.publish(1, "", queue, b"1")
    bury(queue)
    first = bury(queue).properties["headers"]["x-death"].value[0].value["time"]
    time.sleep(1.1)
    second = bury(queue).properties["headers"]["x-death"].value[0].value
    assert (second["time"], second["count"]) == (first, Typed("l", 2))


def test_deaths_in_one_queue_for_different_reasons_are_told_apart(client, bury, declare, name, server):
    back = name("back")
    queue = declare(max_length=1, dead_letter_exchange="", dead_letter_routing_key=back)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
    client.do(1, "queue.declare", queue=back, durable=True, arguments=arguments)
    client.publish(1, "", queue, b"1")
    bury(queue)
    bury(back)
    eventually(lambda: client.do(1, "queue.declare", queue=queue, passive=True).message_count)
    client.publish(1, "", queue, b"2")
    assert_deaths(
        get_eventually(client, 1, back),
        death(queue, "maxlen"),
        death(back, "rejected"),
        death(queue, "rejected"),
        server=server,
    )


def test_death_counted_again_comes_to_the_front(client, bury, name, server):
    # Round and round through three queues.
    names = [name(f"round{place}") for place in range(3)]
    for place, queue in enumerate(names):
        after = names[(place + 1) % 3]
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": after}
        client.do(1, "queue.declare", queue=queue, durable=True, arguments=arguments)
    client.publish(1, "", names[0], b"1")
    for step in range(5):
        bury(names[step % 3])
    message = get_eventually(client, 1, names[2])
    assert_deaths(
        message,
        death(names[1], "rejected", count=2),
        death(names[0], "rejected", count=2),
        death(names[2], "rejected"),
        server=server,
        first=1,
    )


# ---- What clients send


FORGED = Typed("F", death("elsewhere", "rejected", count=7) | {"time": Typed("T", 1)})


@pytest.mark.parametrize(
    "forged",
    [
        {"x-death": [FORGED]},
        {"x-death": "no array"},
        {"x-death": []},
        {"x-death": [1, "x"]},
        {f"x-first-death-{key}": "forged" for key in ("queue", "reason", "exchange")},
        {f"x-last-death-{key}": "forged" for key in ("queue", "reason", "exchange")},
    ],
    ids=["entry", "text", "empty", "junk", "first", "last"],
)
def test_deaths_claimed_by_a_client_are_replaced(forged, client, bury, mortal, dead, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x believes what clients claim")
    queue = mortal()
    client.publish(1, "", queue, b"1", {"headers": forged})
    bury(queue)
    assert_deaths(get_eventually(client, 1, dead), death(queue, "rejected"), server=server)


@pytest.mark.parametrize("claim", [Typed("A", [FORGED]), text("no array")], ids=["entry", "text"])
def test_deaths_claimed_by_a_client_are_delivered_as_sent(claim, client, queue):
    client.publish(1, "", queue, b"1", {"headers": {"x-death": claim}})
    assert get_eventually(client, 1, queue).properties == {"headers": {"x-death": claim}}


def test_history_begins_anew_when_a_dead_letter_is_published_again(client, bury, mortal, dead, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x keeps the history in the header, whoever sends it")
    queue = mortal()
    client.publish(1, "", queue, b"1")
    bury(queue)
    headers = get_eventually(client, 1, dead).properties["headers"]
    client.publish(1, "", queue, b"1", {"headers": headers})
    bury(queue)
    assert_deaths(get_eventually(client, 1, dead), death(queue, "rejected"), server=server)


# ---- Failed deliveries travel along


@pytest.mark.parametrize(
    "history, failed",
    [
        (["nack"], 0),
        (["reject"], 1),
        (["requeue by nack", "nack"], 0),
        (["requeue by reject", "nack"], 1),
        (["requeue by reject", "reject"], 2),
        (["recover", "nack"], 0),
        (["close", "nack"], 1),
        (["close", "close", "expire"], 2),
        (["expire"], 0),
    ],
    ids=lambda value: "+".join(value).replace(" ", "_") if isinstance(value, list) else "",
)
@pytest.mark.parametrize("dead_type", ["classic", "quorum"])
def test_dead_letter_is_redelivered_if_a_delivery_had_failed(
    dead_type, history, failed, queue_type, client, declare, server
):
    dead = declare("dead", queue_type=dead_type)
    queue = declare(
        queue_type=queue_type,
        dead_letter_exchange="",
        dead_letter_routing_key=dead,
        **({"message_ttl": 1000} if "expire" in history else {}),
    )
    client.publish(1, "", queue, b"1")
    for step in history:
        if step == "expire":
            break
        tag = get_eventually(client, 1, queue, no_ack=False).delivery_tag
        if step == "recover":
            client.do(1, "basic.recover", requeue=True)
        elif step == "close":
            client.do(1, "channel.close", reply_code=200)
            client.open_channel(1)
        else:
            method = "basic.reject" if step.endswith("reject") else "basic.nack"
            client.send_method(1, method, delivery_tag=tag, requeue=step.startswith("requeue"))
    message = get_eventually(client, 1, dead, no_ack=False)
    counted = {key: value.value for key, value in message.properties["headers"].items() if "count" in key}
    if server.is_3x:
        # Dead letters begin as if they had never been delivered; quorum queues always show a count.
        assert not message.redelivered
        assert counted == ({"x-delivery-count": 0} if dead_type == "quorum" else {})
        return
    assert message.redelivered == (failed > 0)
    expected = {"x-acquired-count": failed, "x-delivery-count": failed}
    assert counted == (expected if failed and dead_type == "quorum" else {})
