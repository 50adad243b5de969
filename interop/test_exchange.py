"""Declaring, deleting, binding and the life of exchanges."""

import pytest

from helpers import channel_error, drain, exchange_exists, get_one, publish, queue_exists
from raw import Typed

PREDECLARED = {
    "amq.direct": ("direct", False),
    "amq.fanout": ("fanout", False),
    "amq.topic": ("topic", False),
    "amq.headers": ("headers", False),
    "amq.match": ("headers", False),
    "amq.rabbitmq.trace": ("topic", True),
}


@pytest.fixture
def bound(channel, name):
    """Declares an exchange of a type with a queue bound to it."""

    def declare(kind="fanout", routing_key="", **options):
        exchange, queue = name(kind), name()
        channel.exchange_declare(exchange, kind, **options)
        channel.queue_declare(queue, exclusive=True)
        channel.queue_bind(queue, exchange, routing_key)
        return exchange, queue

    return declare


@pytest.mark.parametrize("exchange", PREDECLARED)
def test_predeclared_exchange_is_durable_and_of_its_type(exchange, channel):
    kind, internal = PREDECLARED[exchange]
    channel.exchange_declare(exchange, kind, durable=True, internal=internal)


@pytest.mark.parametrize("exchange", ["amq.direct", "amq.fanout", "amq.topic", "amq.headers", "amq.match"])
def test_predeclared_exchange_is_not_of_another_type(exchange, channel):
    kind = PREDECLARED[exchange][0]
    other = "fanout" if kind != "fanout" else "direct"
    text = (
        f"inequivalent arg 'type' for exchange '{exchange}' in vhost '/':"
        f" received '{other}' but current is '{kind}'"
    )
    with channel_error(406, text):
        channel.exchange_declare(exchange, other, durable=True)


@pytest.mark.parametrize("kind", ["direct", "fanout", "topic", "headers"])
@pytest.mark.parametrize(
    "durable, auto_delete, internal", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_exchange_can_be_declared_again_just_as_it_is(kind, durable, auto_delete, internal, channel, name):
    exchange = name()
    for _ in range(2):
        channel.exchange_declare(
            exchange,
            kind,
            durable=durable,
            auto_delete=auto_delete,
            internal=internal,
            arguments={"x-note": "any"},
        )


def test_unknown_arguments_are_not_compared(channel, name):
    exchange = name()
    channel.exchange_declare(exchange, "direct", arguments={"x-note": "one"})
    channel.exchange_declare(exchange, "direct", arguments={"x-note": 2, "x-other": True})
    channel.exchange_declare(exchange, "direct")


def test_passive_declare_compares_nothing(channel, client, name):
    exchange = name()
    channel.exchange_declare(exchange, "direct", durable=True)
    client.do(1, "exchange.declare", exchange=exchange, type="no-such-type", passive=True, auto_delete=True)


def test_declare_without_answer_takes_effect(client, connection, name):
    exchange = name()
    client.send_method(1, "exchange.declare", exchange=exchange, type="fanout", nowait=True)
    assert client.call(1, "basic.qos").name == "basic.qos-ok"
    assert exchange_exists(connection, exchange)


def test_delete_without_answer_takes_effect(client, connection, channel, name):
    exchange = name()
    channel.exchange_declare(exchange)
    client.send_method(1, "exchange.delete", exchange=exchange, nowait=True)
    assert client.call(1, "basic.qos").name == "basic.qos-ok"
    assert not exchange_exists(connection, exchange)


def test_line_ends_are_removed_from_the_name(channel, connection, name):
    exchange = name()
    channel.exchange_declare(f"{exchange[:4]}\r\n{exchange[4:]}")
    assert exchange_exists(connection, exchange)


@pytest.mark.parametrize(
    "tail", ["-ünï-兎-🐇", "-with space", "-" + "x" * 220], ids=["unicode", "space", "long"]
)
def test_any_text_may_be_a_name(tail, channel, connection, name):
    exchange = name() + tail
    channel.exchange_declare(exchange, auto_delete=True)
    assert exchange_exists(connection, exchange)
    channel.exchange_delete(exchange)
    assert not exchange_exists(connection, exchange)


def test_alternate_exchange_need_not_exist(channel, name):
    exchange, missing = name(), name("missing")
    for _ in range(2):
        channel.exchange_declare(exchange, arguments={"alternate-exchange": missing})


# ---- Delete


def test_deleting_a_missing_exchange_succeeds(channel, name):
    channel.exchange_delete(name())
    channel.exchange_delete(name(), if_unused=True)


def test_deleting_an_exchange_removes_its_bindings(channel, bound):
    exchange, queue = bound("fanout")
    channel.exchange_delete(exchange)
    channel.exchange_declare(exchange, "fanout")
    channel.basic_publish(exchange, "", b"nobody listens")
    assert drain(channel, queue) == []


def test_unused_exchange_is_deleted_if_unused(channel, connection, bound):
    exchange, queue = bound("direct")
    channel.queue_unbind(queue, exchange, "")
    channel.exchange_delete(exchange, if_unused=True)
    assert not exchange_exists(connection, exchange)


def test_being_a_destination_is_not_being_used(channel, connection, name):
    source, destination = name("source"), name("destination")
    channel.exchange_declare(source)
    channel.exchange_declare(destination)
    channel.exchange_bind(destination, source)
    channel.exchange_delete(destination, if_unused=True)
    assert not exchange_exists(connection, destination)


def test_deleting_a_destination_frees_its_source(channel, connection, name):
    source, destination = name("source"), name("destination")
    channel.exchange_declare(source)
    channel.exchange_declare(destination)
    channel.exchange_bind(destination, source)
    channel.exchange_delete(destination)
    channel.exchange_delete(source, if_unused=True)
    assert not exchange_exists(connection, source)


def test_refused_delete_leaves_the_exchange(channel, connection, bound):
    exchange, _ = bound("direct")
    other = connection.channel()
    with channel_error(406, f"exchange '{exchange}' in vhost '/' in use"):
        other.exchange_delete(exchange, if_unused=True)
    assert exchange_exists(connection, exchange)


# ---- Auto-delete


def test_auto_delete_exchange_that_was_never_bound_stays(channel, connection, name):
    exchange = name()
    channel.exchange_declare(exchange, auto_delete=True)
    assert exchange_exists(connection, exchange)


def test_auto_delete_exchange_goes_with_its_last_binding(channel, connection, bound):
    exchange, queue = bound("direct", "one", auto_delete=True)
    channel.queue_bind(queue, exchange, "two")
    channel.queue_unbind(queue, exchange, "one")
    assert exchange_exists(connection, exchange)
    channel.queue_unbind(queue, exchange, "two")
    assert not exchange_exists(connection, exchange)


def test_auto_delete_exchange_goes_with_its_last_queue(channel, connection, bound):
    exchange, queue = bound("fanout", auto_delete=True)
    channel.queue_delete(queue)
    assert not exchange_exists(connection, exchange)


def test_auto_delete_goes_on_along_exchange_bindings(channel, connection, bound, name):
    last, queue = bound("fanout", auto_delete=True)
    first = name("first")
    channel.exchange_declare(first, "fanout", auto_delete=True)
    channel.exchange_bind(last, first)
    channel.queue_delete(queue)
    assert not exchange_exists(connection, last)
    assert not exchange_exists(connection, first)


def test_auto_delete_exchange_stays_when_it_is_only_unbound_as_a_destination(channel, connection, name):
    source, destination = name("source"), name("destination")
    channel.exchange_declare(source)
    channel.exchange_declare(destination, auto_delete=True)
    channel.exchange_bind(destination, source)
    channel.exchange_unbind(destination, source)
    assert exchange_exists(connection, destination)


# ---- Internal


def test_internal_exchange_passes_on_what_reaches_it_through_a_binding(channel, bound, name):
    internal, queue = bound("fanout", internal=True)
    front = name("front")
    channel.exchange_declare(front, "fanout")
    channel.exchange_bind(internal, front)
    channel.basic_publish(front, "", b"through")
    assert get_one(channel, queue).body == b"through"


# ---- Bindings between exchanges


def test_exchange_binding_routes_by_the_rules_of_its_source(channel, bound, name):
    last, queue = bound("fanout")
    first = name("first")
    channel.exchange_declare(first, "topic")
    channel.exchange_bind(last, first, "a.*")
    channel.basic_publish(first, "a.b", b"yes")
    channel.basic_publish(first, "b.a", b"no")
    assert drain(channel, queue) == [b"yes"]


def test_unbound_exchange_gets_nothing_more(channel, bound, name):
    last, queue = bound("fanout")
    first = name("first")
    channel.exchange_declare(first, "fanout")
    channel.exchange_bind(last, first, "key")
    channel.exchange_unbind(last, first, "another key")
    channel.basic_publish(first, "", b"still bound")
    channel.exchange_unbind(last, first, "key")
    channel.basic_publish(first, "", b"no more")
    assert drain(channel, queue) == [b"still bound"]


def test_unbinding_what_is_not_there_succeeds(client, name):
    client.do(1, "exchange.unbind", destination="amq.direct", source="amq.fanout", routing_key=name())
    client.do(1, "exchange.unbind", destination=name("none"), source=name("none"))


def test_exchange_bind_and_unbind_without_answer_take_effect(client, channel, bound, name):
    last, queue = bound("fanout")
    first = name("first")
    channel.exchange_declare(first, "fanout")
    client.send_method(1, "exchange.bind", destination=last, source=first, nowait=True)
    client.do(1, "basic.qos")
    channel.basic_publish(first, "", b"bound")
    assert get_one(channel, queue, auto_ack=True).body == b"bound"
    client.send_method(1, "exchange.unbind", destination=last, source=first, nowait=True)
    client.do(1, "basic.qos")
    channel.basic_publish(first, "", b"unbound")
    assert drain(channel, queue) == []


def test_same_binding_twice_is_one_binding(channel, bound, name):
    last, queue = bound("fanout")
    first = name("first")
    channel.exchange_declare(first, "direct")
    channel.exchange_bind(last, first, "key")
    channel.exchange_bind(last, first, "key")
    channel.exchange_unbind(last, first, "key")
    channel.basic_publish(first, "key", b"gone")
    assert drain(channel, queue) == []


def test_cycle_of_exchanges_delivers_once(channel, bound, name):
    last, queue = bound("fanout")
    first = name("first")
    channel.exchange_declare(first, "fanout")
    channel.exchange_bind(last, first)
    channel.exchange_bind(first, last)
    channel.exchange_bind(first, first)
    channel.basic_publish(first, "", b"once")
    channel.basic_publish(last, "", b"each")
    assert drain(channel, queue) == [b"once", b"each"]


def test_bindings_that_differ_in_the_type_of_an_argument_are_two(client, name):
    exchange, queue = name("headers"), name()
    client.do(1, "exchange.declare", exchange=exchange, type="headers")
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    for number in (Typed("I", 5), Typed("l", 5)):
        client.do(1, "queue.bind", queue=queue, exchange=exchange, arguments={"n": number})
    client.do(1, "queue.unbind", queue=queue, exchange=exchange, arguments={"n": Typed("I", 5)})
    client.publish(1, exchange, "", b"one binding is left", {"headers": {"n": 5}})
    assert client.get(1, queue).body == b"one binding is left"
    client.do(1, "queue.unbind", queue=queue, exchange=exchange, arguments={"n": Typed("l", 5)})
    client.publish(1, exchange, "", b"none is left", {"headers": {"n": 5}})
    assert client.get(1, queue).name == "basic.get-empty"


def test_default_exchange_reaches_every_queue_by_its_name(channel, connection, queue):
    publish(channel, queue, "by name")
    assert get_one(channel, queue).method.exchange == ""
    assert queue_exists(connection, queue)
