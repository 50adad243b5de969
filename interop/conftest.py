"""Fixtures: connections to the broker at AMQP_URL, and names nobody else uses."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pika
import pika.exceptions
import pytest
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

pytest.register_assert_rewrite("helpers", "raw")

from helpers import Server  # noqa: E402
from raw import RawClient, plain  # noqa: E402

DEFAULT_URL = "amqp://guest:guest@127.0.0.1:5672/%2f"


@pytest.fixture(scope="session")
def amqp_url() -> str:
    return os.environ.get("AMQP_URL", DEFAULT_URL)


@pytest.fixture(scope="session")
def server(amqp_url: str) -> Server:
    with RawClient(amqp_url) as client:
        properties = plain(client.read_start().server_properties)
    numbers = properties["version"].split("-")[0].split("+")[0].split(".")
    return Server(properties["product"], tuple(int(number) for number in numbers))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "since(version, feature): the feature came to RabbitMQ with this version; older ones are skipped",
    )
    config.addinivalue_line("markers", "rabbitmq_only(difference): Leveret differs on purpose, in this")


@pytest.fixture(autouse=True)
def _skip_where_it_is_missing(request: pytest.FixtureRequest) -> None:
    for marker in request.node.iter_markers("rabbitmq_only"):
        if not request.getfixturevalue("server").is_rabbitmq:
            pytest.skip(f"Leveret differs: {marker.args[0]}")
    for marker in request.node.iter_markers("since"):
        version, feature = marker.args
        server = request.getfixturevalue("server")
        if server.is_rabbitmq and server.version < tuple(int(number) for number in version.split(".")):
            pytest.skip(f"{feature}: since RabbitMQ {version}")


@contextmanager
def patience(connection: BlockingConnection, seconds: float) -> Iterator[None]:
    """Raises if the broker keeps the connection waiting longer; pika itself would wait for ever."""

    def give_up() -> None:
        raise TimeoutError(f"the broker did not answer within {seconds} s")

    timer = connection._impl.ioloop.call_later(seconds, give_up)
    try:
        yield
    finally:
        connection._impl.ioloop.remove_timeout(timer)


class Janitor:
    """Deletes what tests have declared, over a connection of its own."""

    def __init__(self, url: str):
        self.parameters = pika.URLParameters(url)
        self.parameters.heartbeat = 0
        self.channel: BlockingChannel | None = None

    def delete(self, name: str) -> None:
        """Deletes the queue and the exchange of this name, whichever exist."""
        for deletion in ("queue_delete", "exchange_delete"):
            channel = self._open()
            try:
                with patience(channel.connection, 10):
                    getattr(channel, deletion)(name)
            except pika.exceptions.ChannelClosedByBroker as error:
                # An exclusive queue whose connection is just being taken down goes by itself.
                if error.reply_code != 405:
                    raise

    def _open(self) -> BlockingChannel:
        if self.channel is None or self.channel.connection.is_closed:
            self.channel = pika.BlockingConnection(self.parameters).channel()
        elif self.channel.is_closed:
            self.channel = self.channel.connection.channel()
        return self.channel

    def leave(self) -> None:
        if self.channel is not None and self.channel.connection.is_open:
            with patience(self.channel.connection, 10):
                self.channel.connection.close()


@pytest.fixture(scope="session")
def janitor(amqp_url: str) -> Iterator[Janitor]:
    janitor = Janitor(amqp_url)
    yield janitor
    janitor.leave()


@pytest.fixture
def name(janitor: Janitor) -> Iterator[Callable[..., str]]:
    """Makes names for queues and exchanges; what they name is deleted after the test."""
    made: list[str] = []

    def make(label: str = "q") -> str:
        made.append(f"interop-{uuid.uuid4().hex[:12]}-{label}")
        return made[-1]

    yield make
    for each in made:
        janitor.delete(each)


@pytest.fixture
def connect(amqp_url: str, name: Any) -> Iterator[Callable[..., BlockingConnection]]:
    """Opens connections: `connect(frame_max=8192)`. None of them waits for the broker for ever."""
    opened: list[BlockingConnection] = []
    with ExitStack() as limits:

        def open_connection(**overrides: Any) -> BlockingConnection:
            parameters = pika.URLParameters(amqp_url)
            for key, value in overrides.items():
                setattr(parameters, key, value)
            opened.append(pika.BlockingConnection(parameters))
            limits.enter_context(patience(opened[-1], 40))
            return opened[-1]

        yield open_connection
    for connection in opened:
        if connection.is_open:
            with patience(connection, 5), suppress(pika.exceptions.AMQPError):
                connection.close()


@pytest.fixture
def connection(connect: Callable[..., BlockingConnection]) -> BlockingConnection:
    return connect()


@pytest.fixture
def channel(connection: BlockingConnection) -> BlockingChannel:
    return connection.channel()


@pytest.fixture
def queue(channel: BlockingChannel, name: Callable[..., str]) -> str:
    """A durable queue that other connections can use as well."""
    queue = name("queue")
    channel.queue_declare(queue, durable=True)
    return queue


@pytest.fixture
def declare(channel: BlockingChannel, name: Callable[..., str]) -> Callable[..., str]:
    """Declares durable queues: `declare(message_ttl=100)` sets `x-message-ttl`, `declare("quorum")` the type."""

    def declare_queue(label: str = "queue", **arguments: Any) -> str:
        queue = name(label)
        table = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
        if label in ("classic", "quorum", "stream"):
            table = {"x-queue-type": label} | table
        channel.queue_declare(queue, durable=True, arguments=table)
        return queue

    return declare_queue


@pytest.fixture(params=["classic", "quorum"])
def queue_type(request: pytest.FixtureRequest) -> str:
    """For what classic and quorum queues have in common."""
    return request.param


@pytest.fixture
def dial(amqp_url: str, name: Any) -> Iterator[Callable[[], RawClient]]:
    """Opens sockets on which nothing was said yet."""
    opened: list[RawClient] = []

    def open_socket() -> RawClient:
        opened.append(RawClient(amqp_url))
        return opened[-1]

    yield open_socket
    for client in opened:
        client.disconnect()


@pytest.fixture
def raw(dial: Callable[[], RawClient]) -> Callable[..., RawClient]:
    """Opens raw connections that are logged in and have the given channels open."""

    def open_client(*channels: int, **handshake: Any) -> RawClient:
        client = dial().handshake(**handshake)
        for channel in channels:
            client.open_channel(channel)
        return client

    return open_client


@pytest.fixture
def client(raw: Callable[..., RawClient]) -> RawClient:
    """A raw connection with channel 1 open."""
    return raw(1)
