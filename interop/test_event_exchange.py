"""The exchange amq.rabbitmq.event: what happens in the broker, told as messages with an empty body.

An event's properties are headers: strings as longstr, integers as long, lists as arrays. Headers of RabbitMQ 4.3 for
events that only the management interface can cause, with their types (S longstr, l long, t bool, A array, F table);
all have `timestamp_in_ms` l and `user_who_performed_action` S as well:

    vhost.created             name S, description S, tags A, default_queue_type S, metadata S, cluster_state F,
                              protected_from_deletion t, tracing t
    vhost.deleted, vhost.down name S; the latter with node S
    vhost.limits.set          name S ("limits"), vhost S, and each limit under its name, l
    vhost.limits.cleared      name S ("limits"), vhost S
    user.created, user.deleted, user.password.changed, user.password.cleared    name S
    user.tags.set             name S, tags A
    permission.created        user S, vhost S, configure S, write S, read S
    permission.deleted        user S, vhost S
    topic.permission.created  user S, vhost S, exchange S, write S, read S
    topic.permission.deleted  user S, vhost S
    policy.set                name S, vhost S, pattern S, apply-to S, priority l, definition F
    policy.cleared            name S, vhost S
    parameter.set             component S, name S, value (any), vhost S except for component "global"
    parameter.cleared         component S, name S, vhost S except for component "global"
"""

import time

import pika
import pytest

from helpers import eventually, exchange_exists
from raw import plain

EXCHANGE = "amq.rabbitmq.event"

ALWAYS = {"timestamp_in_ms": "l"}
BY_USER = {**ALWAYS, "user_who_performed_action": "S"}
PEER = {"peer_host": "S", "peer_port": "l", "host": "S", "protocol": "S", "ssl": "t", "auth_mechanism": "S"}
BINDING = {
    **BY_USER,
    "source_name": "S",
    "source_kind": "S",
    "destination_name": "S",
    "destination_kind": "S",
    "routing_key": "S",
    "arguments": "A",
    "vhost": "S",
}


@pytest.fixture(autouse=True)
def _needs_the_exchange(connection):
    if not exchange_exists(connection, EXCHANGE):
        pytest.skip(f"this server has no exchange {EXCHANGE}")


class Events:
    """A queue of events, on a connection of its own."""

    def __init__(self, client, key):
        self.client, self.seen = client, []
        self.queue = client.do(1, "queue.declare", queue="", exclusive=True).queue
        client.do(1, "queue.bind", queue=self.queue, exchange=EXCHANGE, routing_key=key)

    def find(self, key, **expected):
        """Waits for an event with these values among its headers. Other tests' events come as well."""

        def matches(event):
            headers = plain(event.properties["headers"])
            return event.routing_key == key and all(headers.get(n) == v for n, v in expected.items())

        def look():
            while (answer := self.client.get(1, self.queue)).name == "basic.get-ok":
                self.seen.append(answer)
            return [event for event in self.seen if matches(event)]

        return eventually(look, within=15)[0]


@pytest.fixture
def events(raw):
    return lambda key="#": Events(raw(1), key)


def headers(event, types):
    """The headers, which must have these types at least."""
    found = event.properties["headers"]
    tags = {name: value.tag for name, value in found.items() if name in types}
    assert tags == types, found
    return plain(found)


# ---- What all events have in common


def test_exchange_is_an_internal_durable_topic(client):
    client.do(1, "exchange.declare", exchange=EXCHANGE, type="topic", durable=True, internal=True)
    client.publish(1, EXCHANGE, "queue.created")
    closed = client.expect("channel.close")
    text = f"ACCESS_REFUSED - cannot publish to internal exchange '{EXCHANGE}' in vhost '/'"
    assert (closed.reply_code, closed.reply_text) == (403, text)


def test_event_is_an_empty_persistent_message_with_its_time(client, events, name):
    found, queue = events("queue.created"), name()
    before = time.time()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    event = found.find("queue.created", name=queue)
    assert (event.exchange, event.body) == (EXCHANGE, b"")
    assert set(event.properties) == {"headers", "delivery_mode", "timestamp"}
    assert event.properties["delivery_mode"] == 2
    in_ms = event.properties["headers"]["timestamp_in_ms"]
    assert in_ms.tag == "l" and before - 1 <= in_ms.value / 1000 <= time.time() + 1
    assert event.properties["timestamp"] == in_ms.value // 1000


def test_keys_are_matched_as_in_any_topic_exchange(client, events, name):
    found, queue = events("queue.*"), name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.do(1, "queue.bind", queue=queue, exchange="amq.fanout")
    client.do(1, "queue.delete", queue=queue)
    found.find("queue.created", name=queue)
    found.find("queue.deleted", name=queue)
    assert {event.routing_key.split(".")[0] for event in found.seen} == {"queue"}


# ---- Queues, exchanges, bindings


def test_queue_created(client, server, events, name):
    found, queue = events("queue.created"), name()
    arguments = {"x-max-length": 5}
    client.do(1, "queue.declare", queue=queue, durable=True, auto_delete=True, arguments=arguments)
    types = {
        **BY_USER,
        "name": "S",
        "vhost": "S",
        "durable": "t",
        "auto_delete": "t",
        "exclusive": "t",
        "arguments": "A",
        "owner_pid": "S",
    }
    if not server.is_3x:
        types |= {"type": "S", "leader": "S", "members": "A"}
    event = headers(found.find("queue.created", name=queue), types)
    assert (event["vhost"], event["user_who_performed_action"]) == ("/", "guest")
    assert (event["durable"], event["auto_delete"], event["exclusive"]) == (True, True, False)
    # Each argument is text, as Erlang shows it.
    assert '{<<"x-max-length">>,signedint,5}' in event["arguments"]
    assert event["owner_pid"] == ""
    if not server.is_3x:
        assert event["type"] == "rabbit_classic_queue"
        assert event["members"] == [event["leader"]]


def test_exclusive_queue_names_its_owner(client, events, name):
    found, queue = events("queue.created"), name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    event = headers(found.find("queue.created", name=queue), {"exclusive": "t", "owner_pid": "S"})
    assert event["exclusive"] and event["owner_pid"]


def test_queue_declared_again_is_no_event(client, events, name):
    found, queue, last = events("queue.created"), name(), name("last")
    for declared in (queue, queue, last):
        client.do(1, "queue.declare", queue=declared, exclusive=True)
    found.find("queue.created", name=last)
    assert [plain(event.properties["headers"])["name"] for event in found.seen].count(queue) == 1


def test_queue_deleted(client, server, events, name):
    found, queue = events("queue.deleted"), name()
    client.do(1, "queue.declare", queue=queue)
    client.do(1, "queue.delete", queue=queue)
    types = {**BY_USER, "name": "S", "vhost": "S"}
    event = headers(found.find("queue.deleted", name=queue), types if server.is_3x else {**types, "type": "S"})
    assert (event["vhost"], event["user_who_performed_action"]) == ("/", "guest")


def test_queue_that_goes_with_its_connection_is_deleted_by_the_broker(raw, events, name):
    found, queue = events("queue.deleted"), name()
    with raw(1) as owner:
        owner.do(1, "queue.declare", queue=queue, exclusive=True)
    event = headers(found.find("queue.deleted", name=queue), BY_USER)
    assert event["user_who_performed_action"] == "rmq-internal"


def test_exchange_created_and_deleted(client, events, name):
    found, exchange = events("exchange.*"), name()
    arguments = {"alternate-exchange": "ae"}
    client.do(1, "exchange.declare", exchange=exchange, type="topic", durable=True, arguments=arguments)
    client.do(1, "exchange.delete", exchange=exchange)
    types = {
        **BY_USER,
        "name": "S",
        "vhost": "S",
        "type": "S",
        "durable": "t",
        "auto_delete": "t",
        "internal": "t",
        "arguments": "A",
        "policy": "S",
    }
    event = headers(found.find("exchange.created", name=exchange), types)
    assert (event["type"], event["durable"], event["auto_delete"], event["internal"]) == (
        "topic",
        True,
        False,
        False,
    )
    assert event["arguments"] == ['{<<"alternate-exchange">>,longstr,<<"ae">>}']
    assert (event["policy"], event["vhost"]) == ("", "/")
    headers(found.find("exchange.deleted", name=exchange), {**BY_USER, "name": "S", "vhost": "S"})


def test_binding_created_and_deleted(client, events, name):
    found, queue = events("binding.*"), name()
    client.do(1, "queue.declare", queue=queue)
    binding = {"queue": queue, "exchange": "amq.topic", "routing_key": "a.#", "arguments": {"b": "c"}}
    client.do(1, "queue.bind", **binding)
    client.do(1, "queue.unbind", **binding)
    for key in ("binding.created", "binding.deleted"):
        event = headers(found.find(key, destination_name=queue), BINDING)
        assert (event["source_name"], event["source_kind"]) == ("amq.topic", "exchange")
        assert (event["destination_kind"], event["routing_key"]) == ("queue", "a.#")
        assert event["arguments"] == ['{<<"b">>,longstr,<<"c">>}']
        assert (event["vhost"], event["user_who_performed_action"]) == ("/", "guest")


def test_binding_between_exchanges_is_an_event_like_any_other(client, events, name):
    found, exchange = events("binding.created"), name()
    client.do(1, "exchange.declare", exchange=exchange, type="fanout")
    client.do(1, "exchange.bind", source="amq.fanout", destination=exchange)
    event = headers(found.find("binding.created", destination_name=exchange), BINDING)
    assert (event["destination_kind"], event["arguments"]) == ("exchange", [])


def test_bindings_of_a_deleted_queue_are_deleted(client, events, name):
    found, queue = events("binding.deleted"), name()
    client.do(1, "queue.declare", queue=queue)
    client.do(1, "queue.bind", queue=queue, exchange="amq.fanout", routing_key="k")
    client.do(1, "queue.delete", queue=queue)
    headers(found.find("binding.deleted", destination_name=queue, routing_key="k"), BINDING)


# ---- Connections, channels, consumers


def test_connection_created_and_closed(connect, events, amqp_url):
    found = events("connection.*")
    connection = connect()
    peer_port = connection._impl._transport._sock.getsockname()[1]
    types = {
        **BY_USER,
        **PEER,
        "name": "S",
        "pid": "S",
        "node": "S",
        "port": "l",
        "user": "S",
        "vhost": "S",
        "timeout": "l",
        "frame_max": "l",
        "channel_max": "l",
        "client_properties": "A",
        "connected_at": "l",
        "type": "S",
    }
    created = headers(found.find("connection.created", peer_port=peer_port), types)
    port = pika.URLParameters(amqp_url).port
    assert created["name"] == f"127.0.0.1:{peer_port} -> 127.0.0.1:{port}"
    assert (created["user"], created["vhost"], created["type"]) == ("guest", "/", "network")
    assert (created["auth_mechanism"], created["ssl"], created["port"]) == ("PLAIN", False, port)
    assert created["protocol"] == "{0,9,1}"
    assert created["peer_host"] == "{127,0,0,1}"
    assert '{<<"product">>,longstr,<<"Pika Python Client Library">>}' in created["client_properties"]
    connection.close()
    types = {**ALWAYS, "name": "S", "pid": "S", "node": "S", "client_properties": "A"}
    closed = headers(found.find("connection.closed", name=created["name"]), types)
    assert closed["pid"] == created["pid"]


def test_connection_that_breaks_is_closed(raw, events):
    found, broken = events("connection.*"), raw(1)
    peer_port = broken.socket.getsockname()[1]
    created = plain(found.find("connection.created", peer_port=peer_port).properties["headers"])
    broken.disconnect()
    found.find("connection.closed", name=created["name"])


def test_channel_created_and_closed(raw, events):
    found, other = events("#"), raw(1)
    peer_port = other.socket.getsockname()[1]
    connection = plain(found.find("connection.created", peer_port=peer_port).properties["headers"])
    other.open_channel(7)
    types = {**BY_USER, "name": "S", "number": "l", "connection": "S", "pid": "S", "user": "S", "vhost": "S"}
    created = found.find("channel.created", connection=connection["pid"], number=7)
    created = headers(created, types)
    assert created["name"] == f"{connection['name']} (7)"
    assert (created["user"], created["vhost"]) == ("guest", "/")
    other.do(7, "channel.close", reply_code=200, reply_text="bye", class_id=0, method_id=0)
    headers(found.find("channel.closed", pid=created["pid"]), {**BY_USER, "pid": "S"})


def test_consumer_created_and_deleted(client, events, name):
    found, queue = events("consumer.*"), name()
    client.do(1, "queue.declare", queue=queue)
    client.do(1, "basic.qos", prefetch_count=7)
    client.do(1, "basic.consume", queue=queue, consumer_tag="tag", arguments={"x-priority": 1})
    client.do(1, "basic.cancel", consumer_tag="tag")
    types = {
        **BY_USER,
        "queue": "S",
        "vhost": "S",
        "consumer_tag": "S",
        "channel": "S",
        "ack_required": "t",
        "exclusive": "t",
        "prefetch_count": "l",
        "arguments": "A",
    }
    created = headers(found.find("consumer.created", queue=queue), types)
    assert (created["consumer_tag"], created["ack_required"], created["exclusive"]) == ("tag", True, False)
    assert (created["prefetch_count"], created["vhost"]) == (7, "/")
    assert created["arguments"] == ['{<<"x-priority">>,signedint,1}']
    types = {**BY_USER, "queue": "S", "vhost": "S", "consumer_tag": "S", "channel": "S"}
    deleted = headers(found.find("consumer.deleted", queue=queue), types)
    assert (deleted["consumer_tag"], deleted["channel"]) == ("tag", created["channel"])


def test_consumer_is_deleted_with_its_queue(raw, client, events, name):
    # RabbitMQ 4.3 has no such event for a consumer that goes with its channel or connection.
    found, queue, other = events("consumer.deleted"), name(), raw(1)
    client.do(1, "queue.declare", queue=queue)
    other.do(1, "basic.consume", queue=queue, consumer_tag="tag")
    client.do(1, "queue.delete", queue=queue)
    found.find("consumer.deleted", queue=queue, consumer_tag="tag")


# ---- Logins


LOGIN = {**ALWAYS, **PEER, "name": "S", "connection_name": "S", "connection_type": "S"}


def test_login(raw, events):
    found, other = events("user.authentication.success"), raw(1)
    peer_port = other.socket.getsockname()[1]
    event = headers(found.find("user.authentication.success", peer_port=peer_port), LOGIN)
    assert (event["name"], event["auth_mechanism"], event["connection_type"]) == ("guest", "PLAIN", "network")


def test_login_that_fails(dial, events):
    found, other = events("user.authentication.failure"), dial()
    other.password = "wrong"
    other.read_start()
    other.start_ok()
    assert other.read().name == "connection.close"
    peer_port = other.socket.getsockname()[1]
    event = headers(found.find("user.authentication.failure", peer_port=peer_port), {**LOGIN, "error": "A"})
    # An Erlang string is a list of its characters.
    assert bytes(event["error"]) == b"user 'guest' - invalid credentials"
    assert event["name"] == "guest"
