"""The firehose: while tracing is on, amq.rabbitmq.trace gets a copy of every message that is published or delivered.

Tracing is switched on by the server's operator: of RabbitMQ by `rabbitmqctl trace_on`, of Leveret by the setting
`tracing.vhosts`. Where it is off, these tests are skipped. `make interop` runs them against a broker of their own that
traces, and there they must not be skipped (TRACING=1).
"""

import os

import pytest

from helpers import eventually
from raw import Typed, plain

TRACE = "amq.rabbitmq.trace"


@pytest.fixture(autouse=True)
def _needs_tracing(raw):
    """A message that nobody gets is traced as well."""
    with raw(1) as client:
        queue = client.do(1, "queue.declare", queue="", exclusive=True).queue
        client.do(1, "queue.bind", queue=queue, exchange=TRACE, routing_key="#")
        client.do(1, "confirm.select")
        client.publish(1, "", queue + "-nowhere")
        client.expect("basic.ack")
        for _ in range(20):
            if client.get(1, queue).name == "basic.get-ok":
                return
            client.expect_silence(0.02)
    if os.environ.get("TRACING") == "1":
        pytest.fail("tracing is off, but TRACING says that it is on")
    pytest.skip("tracing is off on this server")


class Traces:
    """A queue of traces, on a connection of its own."""

    def __init__(self, client, key):
        self.client, self.seen = client, []
        self.queue = client.do(1, "queue.declare", queue="", exclusive=True).queue
        client.do(1, "queue.bind", queue=self.queue, exchange=TRACE, routing_key=key)

    def take(self):
        while (answer := self.client.get(1, self.queue)).name == "basic.get-ok":
            self.seen.append(answer)
        return self.seen

    def find(self, key, body, count=1):
        """Waits for so many traces of this key and body, which must be all."""

        def look():
            found = [t for t in self.take() if (t.routing_key, t.body) == (key, body)]
            return found if len(found) >= count else None

        found = eventually(look, within=15)
        assert len(found) == count
        return found


@pytest.fixture
def traces(raw):
    return lambda key="#": Traces(raw(1), key)


@pytest.fixture
def queue(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    return queue


def endpoint(client):
    ours, theirs = client.socket.getsockname(), client.socket.getpeername()
    return f"{ours[0]}:{ours[1]} -> {theirs[0]}:{theirs[1]}"


def headers(trace, **expected):
    """The headers of a trace; it has no other properties."""
    assert set(trace.properties) == {"headers"}
    found = trace.properties["headers"]
    common = {
        "exchange_name": "S",
        "routing_keys": "A",
        "properties": "F",
        "node": "S",
        "vhost": "S",
        "connection": "S",
        "channel": "I",
        "user": "S",
    }
    assert {name: value.tag for name, value in found.items()} == {**common, **expected}
    return plain(found)


def test_publish_is_traced_by_the_name_of_its_exchange(client, traces, queue):
    found = traces("publish.#")
    client.do(1, "queue.bind", queue=queue, exchange="amq.fanout")
    client.publish(1, "amq.fanout", "some.key", b"published " + queue.encode())
    [trace] = found.find("publish.amq.fanout", b"published " + queue.encode())
    assert trace.exchange == TRACE
    told = headers(trace, routed_queues="A")
    assert told["exchange_name"] == "amq.fanout"
    assert told["routing_keys"] == ["some.key"]
    assert told["routed_queues"] == [queue]
    assert (told["user"], told["channel"]) == (client.user, 1)
    assert told["vhost"] == client.virtual_host
    assert told["connection"] == endpoint(client)
    assert told["node"]
    assert told["properties"] == {}


def test_publish_to_the_default_exchange_has_a_key_without_a_name(client, traces, queue):
    found = traces("publish.")
    client.publish(1, "", queue, b"m " + queue.encode())
    [trace] = found.find("publish.", b"m " + queue.encode())
    assert headers(trace, routed_queues="A")["exchange_name"] == ""


def test_properties_are_a_table(client, traces, queue):
    found, body = traces("publish.#"), queue.encode()
    properties = {
        "content_type": "text/plain",
        "content_encoding": "identity",
        "headers": {"a": 1, "f": Typed("d", 1.5), "t": Typed("T", 5), "l": Typed("l", 7)},
        "delivery_mode": 2,
        "priority": 3,
        "correlation_id": "c",
        "reply_to": "r",
        "expiration": "60000",
        "message_id": "m",
        "timestamp": 77,
        "type": "t",
        "user_id": client.user,
        "app_id": "app",
    }
    client.publish(1, "", queue, body, properties)
    [trace] = found.find("publish.", body)
    told = trace.properties["headers"]["properties"].value
    assert plain(told) == {**properties, "headers": plain(properties["headers"])}
    tags = {name: value.tag for name, value in told.items()}
    assert {name for name, tag in tags.items() if tag == "I"} == {"delivery_mode", "priority", "timestamp"}
    assert {name for name, tag in tags.items() if tag == "F"} == {"headers"}
    assert {tag for tag in tags.values()} == {"I", "F", "S"}
    assert {name: value.tag for name, value in told["headers"].value.items()} == {
        "a": "I",
        "f": "d",
        "t": "T",
        "l": "l",
    }


def test_all_keys_are_traced_and_all_queues(client, traces, queue, name):
    found, body = traces("publish.#"), queue.encode()
    others = [name(), name()]
    for other in others:
        client.do(1, "queue.declare", queue=other, exclusive=True)
    client.publish(1, "", queue, body, {"headers": {"CC": [others[0]], "BCC": [others[1]]}})
    [trace] = found.find("publish.", body)
    told = headers(trace, routed_queues="A")
    assert told["routing_keys"] == [queue, *others]
    assert sorted(told["routed_queues"]) == sorted([queue, *others])
    assert told["properties"] == {"headers": {"CC": [others[0]]}}


def test_message_that_goes_nowhere_is_traced(client, traces, queue):
    found, body = traces("publish.#"), queue.encode()
    client.publish(1, "amq.direct", queue, body, mandatory=True)
    assert client.expect("basic.return").reply_code == 312
    [trace] = found.find("publish.amq.direct", body)
    assert headers(trace, routed_queues="A")["routed_queues"] == []


def test_message_that_is_refused_is_not_traced(client, traces, queue):
    found = traces("publish.#")
    client.publish(1, queue + "-missing", "k", b"refused " + queue.encode())
    assert client.expect("channel.close").reply_code == 404
    client.send_method(1, "channel.close-ok")
    client.open_channel(1)
    client.publish(1, "", queue, b"last " + queue.encode())
    found.find("publish.", b"last " + queue.encode())
    assert b"refused " + queue.encode() not in [trace.body for trace in found.seen]


@pytest.mark.parametrize("no_ack", [True, False])
def test_delivery_is_traced_by_the_name_of_its_queue(no_ack, client, traces, queue):
    found, body = traces("deliver.#"), queue.encode()
    client.do(1, "basic.consume", queue=queue, no_ack=no_ack)
    client.publish(1, "amq.fanout", "k", b"elsewhere")
    client.publish(1, "", queue, body, {"headers": {"a": 1}})
    assert client.expect("basic.deliver").body == body
    [trace] = found.find(f"deliver.{queue}", body)
    told = headers(trace, redelivered="I")
    assert told["redelivered"] == 0
    assert (told["exchange_name"], told["routing_keys"]) == ("", [queue])
    assert told["properties"] == {"headers": {"a": 1}}
    assert (told["user"], told["channel"]) == (client.user, 1)
    assert told["connection"] == endpoint(client)


def test_delivery_to_a_get_is_traced(client, traces, queue):
    found, body = traces("deliver.#"), queue.encode()
    client.publish(1, "", queue, body)
    assert client.get(1, queue).body == body
    [trace] = found.find(f"deliver.{queue}", body)
    headers(trace, redelivered="I")


def test_redelivery_is_traced_as_one(client, traces, queue):
    found, body = traces("deliver.#"), queue.encode()
    client.publish(1, "", queue, body)
    tag = client.get(1, queue, no_ack=False).delivery_tag
    client.send_method(1, "basic.nack", delivery_tag=tag, requeue=True)
    assert client.get(1, queue).redelivered
    told = [headers(t, redelivered="I")["redelivered"] for t in found.find(f"deliver.{queue}", body, 2)]
    assert told == [0, 1]


def test_every_queue_has_its_own_trace_of_a_delivery(client, traces, queue, name):
    found, body, other = traces("deliver.#"), queue.encode(), name()
    client.do(1, "queue.declare", queue=other, exclusive=True)
    client.publish(1, "", queue, body, {"headers": {"CC": [other]}})
    for each in (queue, other):
        assert client.get(1, each).body == body
        [trace] = found.find(f"deliver.{each}", body)
        assert headers(trace, redelivered="I")["routing_keys"] == [queue, other]


def test_traces_are_not_traced(client, traces, queue):
    found, body = traces("#"), queue.encode()
    watching = traces("#")
    client.publish(1, "", queue, body)
    found.find("publish.", body)
    watching.find("publish.", body)
    client.publish(1, "", queue, body + b" last")
    found.find("publish.", body + b" last")
    ours = {f"deliver.{found.queue}", f"deliver.{watching.queue}", f"publish.{TRACE}"}
    assert ours.isdisjoint(trace.routing_key for trace in found.seen)


def test_tracing_does_not_change_the_message(client, traces, queue):
    traces("#")
    properties = {"headers": {"a": 1}, "delivery_mode": 2, "message_id": "m"}
    client.publish(1, "", queue, b"m", properties)
    message = client.get(1, queue)
    assert message.properties == {**properties, "headers": {"a": Typed("I", 1)}}
    assert not message.redelivered


def test_messages_of_a_transaction_are_traced(client, traces, queue):
    found, body = traces("publish.#"), queue.encode()
    client.do(1, "tx.select")
    client.publish(1, "", queue, body)
    client.do(1, "tx.commit")
    found.find("publish.", body)
