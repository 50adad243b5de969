"""What the tests share: expected errors, polling, and short forms of common steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pika
import pika.exceptions
import pytest
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

from raw import CODE_NAMES, METHODS, Method, RawClient

EXCLUSIVE_TO_OTHER = (
    "cannot obtain exclusive access to locked queue '{queue}' in vhost '/'. It could be originally"
    " declared on another connection or the exclusive property value does not match that of the"
    " original declaration."
)


@dataclass(frozen=True)
class Server:
    """Which broker answers, so that documented differences between versions can be told apart."""

    product: str
    version: tuple[int, ...]

    @property
    def is_rabbitmq(self) -> bool:
        return self.product == "RabbitMQ"

    @property
    def is_3x(self) -> bool:
        return self.is_rabbitmq and self.version < (4,)

    @property
    def minimum_frame_max(self) -> int:
        return 4096 if self.is_3x else 8192

    @property
    def max_message_size(self) -> int:
        return 16 << 20 if self.is_rabbitmq and not self.is_3x else 128 << 20


def numbers(count: int, start: int = 1) -> list[bytes]:
    """Bodies that tell messages apart: b"1", b"2" and so on."""
    return [str(number).encode() for number in range(start, start + count)]


def place(queue: str) -> str:
    """A queue as error texts name it."""
    return f"queue '{queue}' in vhost '/'"


def count_of(channel: BlockingChannel, queue: str) -> int:
    """The ready messages."""
    return channel.queue_declare(queue, passive=True).method.message_count


def reply_text(code: int, explanation: str) -> str:
    """The text of a close as sent: named by its code and at most 255 characters long."""
    text = f"{CODE_NAMES[code]} - {explanation}" if explanation else CODE_NAMES[code]
    return text if len(text) <= 255 else text[:252] + "..."


# ---- Errors seen through pika


@contextmanager
def channel_error(code: int, explanation: str) -> Iterator[None]:
    """The body must end with the broker closing the channel, with exactly this code and text."""
    with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
        yield
    assert (caught.value.reply_code, caught.value.reply_text) == (
        code,
        reply_text(code, explanation),
    )


@contextmanager
def connection_error(code: int, explanation: str) -> Iterator[None]:
    """The body must end with the broker closing the connection, with exactly this code and text."""
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker) as caught:
        yield
    assert (caught.value.reply_code, caught.value.reply_text) == (
        code,
        reply_text(code, explanation),
    )


# ---- Errors seen through the raw client


def assert_close(
    received: Method, scope: str, channel: int, code: int, explanation: str, failed: str | None
) -> None:
    """`failed` is the method the close blames, None for a close that blames none."""
    class_id, method_id = METHODS[failed][:2] if failed else (0, 0)
    assert (received.name, received.channel) == (f"{scope}.close", channel)
    assert received.args == {
        "reply_code": code,
        "reply_text": reply_text(code, explanation),
        "class_id": class_id,
        "method_id": method_id,
    }


def expect_channel_close(
    client: RawClient, code: int, explanation: str, failed: str, channel: int = 1
) -> None:
    """The broker closes this channel only: once answered, its number can be opened again."""
    assert_close(client.read(), "channel", channel, code, explanation, failed)
    client.send_method(channel, "channel.close-ok")
    client.open_channel(channel)
    client.do(channel, "basic.qos")


def expect_connection_close(
    client: RawClient, code: int, explanation: str, failed: str | None = None
) -> None:
    """The broker closes the connection on channel 0 and hangs up once that is answered."""
    assert_close(client.read(), "connection", 0, code, explanation, failed)
    client.send_method(0, "connection.close-ok")
    assert client.read_until_closed() == b""


# ---- Waiting


def eventually(check: Callable[[], Any], within: float = 5.0) -> Any:
    """Polls until `check` returns something true, and returns that."""
    deadline = time.monotonic() + within
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < deadline, f"still {result!r} after {within} s"
        time.sleep(0.02)


def never(check: Callable[[], Any], during: float = 0.3) -> None:
    """Polls `check`, which must not return anything true this long."""
    deadline = time.monotonic() + during
    while time.monotonic() < deadline:
        result = check()
        assert not result, result
        time.sleep(0.02)


@contextmanager
def takes_at_least(milliseconds: float) -> Iterator[None]:
    """The body must not be done sooner."""
    begun = time.monotonic()
    yield
    took = (time.monotonic() - begun) * 1000
    assert took >= milliseconds, f"done after {took:.1f} ms"


# ---- Steps through pika


class Deliveries(list):
    """What a consumer got: a list of Delivery, filled by `wait_for`."""

    def __init__(self, connection: BlockingConnection):
        super().__init__()
        self.connection = connection

    def __call__(self, _channel: Any, deliver: Any, properties: Any, body: bytes) -> None:
        self.append(Delivery(deliver, properties, body))

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self]

    def wait_for(self, count: int, within: float = 5.0) -> Deliveries:
        deadline = time.monotonic() + within
        while len(self) < count:
            assert time.monotonic() < deadline, f"only {len(self)} of {count}: {self.bodies}"
            self.connection.process_data_events(0.05)
        return self

    def stay_at(self, count: int, during: float = 0.3) -> Deliveries:
        """No more than `count` deliveries come."""
        deadline = time.monotonic() + during
        while time.monotonic() < deadline:
            self.connection.process_data_events(0.05)
        assert len(self) == count, self.bodies
        return self


@dataclass
class Delivery:
    method: Any
    properties: pika.BasicProperties
    body: bytes

    @property
    def tag(self) -> int:
        return self.method.delivery_tag

    @property
    def redelivered(self) -> bool:
        return self.method.redelivered


def consume(
    connection: BlockingConnection, channel: BlockingChannel, queue: str, **options: Any
) -> Deliveries:
    """Starts a consumer; its tag is in the attribute `consumer_tag`."""
    deliveries = Deliveries(connection)
    deliveries.consumer_tag = channel.basic_consume(queue, deliveries, **options)
    return deliveries


def publish(channel: BlockingChannel, queue: str, *bodies: bytes | str, **properties: Any) -> None:
    """Publishes to a queue through the default exchange."""
    for body in bodies:
        channel.basic_publish("", queue, body, pika.BasicProperties(**properties))


def publish_confirmed(
    connection: BlockingConnection, queue: str, *bodies: bytes | str, **properties: Any
) -> None:
    """Publishes to a queue one by one; all are in it, in this order, when this returns."""
    channel = connection.channel()
    channel.confirm_delivery()
    publish(channel, queue, *bodies, **properties)
    channel.close()


def get(channel: BlockingChannel, queue: str, auto_ack: bool = False) -> Delivery | None:
    method, properties, body = channel.basic_get(queue, auto_ack=auto_ack)
    return None if method is None else Delivery(method, properties, body)


def get_one(channel: BlockingChannel, queue: str, auto_ack: bool = False) -> Delivery:
    """Gets a message that must arrive, though perhaps not at once."""
    return eventually(lambda: get(channel, queue, auto_ack))


def drain(channel: BlockingChannel, queue: str) -> list[bytes]:
    """Takes and settles all ready messages."""
    bodies = []
    while (message := get(channel, queue, auto_ack=True)) is not None:
        bodies.append(message.body)
    return bodies


def expect_counts(channel: BlockingChannel, queue: str, messages: int, consumers: int) -> None:
    """A passive declare comes to tell these numbers; they may lag behind publishes and settles."""
    expected = (messages, consumers)
    deadline = time.monotonic() + 5
    while (told := _counts(channel, queue)) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == expected


def _counts(channel: BlockingChannel, queue: str) -> tuple[int, int]:
    declared = channel.queue_declare(queue, passive=True).method
    return declared.message_count, declared.consumer_count


def queue_exists(connection: BlockingConnection, queue: str) -> bool:
    return _exists(connection, lambda channel: channel.queue_declare(queue, passive=True))


def exchange_exists(connection: BlockingConnection, exchange: str) -> bool:
    return _exists(connection, lambda channel: channel.exchange_declare(exchange, passive=True))


def _exists(connection: BlockingConnection, declare: Callable[[BlockingChannel], Any]) -> bool:
    channel = connection.channel()
    try:
        declare(channel)
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code == 404:
            return False
        raise
    channel.close()
    return True


# ---- Steps through the raw client


def get_eventually(client: RawClient, channel: int, queue: str, no_ack: bool = True) -> Method:
    """Gets a message published on another channel, where nothing orders the two."""

    def got() -> Method | None:
        answer = client.get(channel, queue, no_ack)
        return answer if answer.name == "basic.get-ok" else None

    return eventually(got)


class RawConsumer:
    """A consumer alone on channel 1 of a raw client; pika cancels consumers when a channel closes."""

    def __init__(self, client: RawClient, queue: str, prefetch: int = 0, **options: Any):
        self.client = client
        self.deliveries: list[Method] = []
        client.do(1, "basic.qos", prefetch_count=prefetch)
        self.tag = client.do(1, "basic.consume", queue=queue, **options).consumer_tag

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.deliveries]

    def wait_for(self, count: int) -> RawConsumer:
        while len(self.deliveries) < count:
            self.deliveries.append(self.client.expect("basic.deliver"))
        return self

    def stay_silent(self, seconds: float = 0.3) -> RawConsumer:
        self.client.expect_silence(seconds)
        return self

    def settle(self, method: str, index: int, **fields: Any) -> None:
        """Settles a delivery: `settle("nack", 0, requeue=True)`."""
        tag = self.deliveries[index].delivery_tag
        self.client.send_method(1, f"basic.{method}", delivery_tag=tag, **fields)

    def leave(self, how: str) -> None:
        """Leaves by "cancel", "channel_close", "connection_close" or "socket_loss"."""
        match how:
            case "cancel":
                self._call("basic.cancel", consumer_tag=self.tag)
            case "channel_close":
                self._call("channel.close")
            case "connection_close":
                self._call("connection.close", channel=0)
            case "socket_loss":
                self.client.disconnect()

    def _call(self, method: str, channel: int = 1, **fields: Any) -> None:
        """Calls a method that deliveries may come before the answer to."""
        self.client.send_method(channel, method, **fields)
        while (received := self.client.read()).name == "basic.deliver":
            self.deliveries.append(received)
        assert received.name == f"{method}-ok", received


class Confirms:
    """Which publish numbers the broker has settled; checks that none is settled twice."""

    def __init__(self, client: RawClient, channel: int = 1):
        self.client = client
        self.channel = channel
        self.outstanding: set[int] = set()
        self.acked: set[int] = set()
        self.nacked: set[int] = set()

    def expect(self, *numbers: int) -> Confirms:
        """From now on these are waited for."""
        self.outstanding |= set(numbers)
        return self

    def take(self, method: Method) -> None:
        assert method.name in ("basic.ack", "basic.nack"), method
        assert method.channel == self.channel
        tag = method.delivery_tag
        settled = {n for n in self.outstanding if n <= tag} if method.multiple else {tag}
        assert settled, f"{method} settles nothing"
        assert settled <= self.outstanding, f"{method} but waiting for {self.outstanding}"
        self.outstanding -= settled
        (self.acked if method.name == "basic.ack" else self.nacked).update(settled)

    def wait(self, within: float = 10) -> Confirms:
        deadline = time.monotonic() + within
        while self.outstanding:
            self.take(self.client.read(deadline - time.monotonic()))
        return self


# ---- What a server may lack


def require_exchange_type(raw: Callable[..., RawClient], server: Server, kind: str) -> None:
    """Skips the test on a RabbitMQ without this exchange type, because its plugin is not enabled for example."""
    with raw(1) as client:
        # The type is checked first, and nobody may declare the default exchange.
        answer = client.call(1, "exchange.declare", exchange="", type=kind)
    if (answer.name, answer.reply_code) == ("channel.close", 403):
        return
    assert answer.reply_text.endswith(f"unknown exchange type '{kind}'"), answer
    assert server.is_rabbitmq, answer
    pytest.skip(f"this RabbitMQ has no exchange type {kind}")
