"""A small AMQP 0-9-1 client on a bare socket.

It speaks frames and methods and checks nothing by itself, so a test can send what no client
library would, and see exactly what the broker answers. It shares no code with any library.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

METHOD_FRAME, HEADER_FRAME, BODY_FRAME, HEARTBEAT_FRAME = 1, 2, 3, 8
FRAME_END = 0xCE
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"

# What the AMQP reply codes are called at the front of every reply text.
CODE_NAMES = {
    312: "NO_ROUTE",
    320: "CONNECTION_FORCED",
    403: "ACCESS_REFUSED",
    404: "NOT_FOUND",
    405: "RESOURCE_LOCKED",
    406: "PRECONDITION_FAILED",
    501: "FRAME_ERROR",
    503: "COMMAND_INVALID",
    504: "CHANNEL_ERROR",
    505: "UNEXPECTED_FRAME",
    530: "NOT_ALLOWED",
    540: "NOT_IMPLEMENTED",
    541: "INTERNAL_ERROR",
}

# Name, class id, method id, fields in order. A field without a type is a bit.
_METHOD_TABLE = """
connection.start 10 10 version_major:u8 version_minor:u8 server_properties:table mechanisms:longstr locales:longstr
connection.start-ok 10 11 client_properties:table mechanism:shortstr response:longstr locale:shortstr
connection.secure 10 20 challenge:longstr
connection.secure-ok 10 21 response:longstr
connection.tune 10 30 channel_max:u16 frame_max:u32 heartbeat:u16
connection.tune-ok 10 31 channel_max:u16 frame_max:u32 heartbeat:u16
connection.open 10 40 virtual_host:shortstr capabilities:shortstr insist
connection.open-ok 10 41 known_hosts:shortstr
connection.close 10 50 reply_code:u16 reply_text:shortstr class_id:u16 method_id:u16
connection.close-ok 10 51
connection.blocked 10 60 reason:shortstr
connection.unblocked 10 61
connection.update-secret 10 70 new_secret:longstr reason:shortstr
connection.update-secret-ok 10 71
channel.open 20 10 out_of_band:shortstr
channel.open-ok 20 11 channel_id:longstr
channel.flow 20 20 active
channel.flow-ok 20 21 active
channel.close 20 40 reply_code:u16 reply_text:shortstr class_id:u16 method_id:u16
channel.close-ok 20 41
access.request 30 10 realm:shortstr exclusive passive active write read
access.request-ok 30 11 ticket:u16
exchange.declare 40 10 ticket:u16 exchange:shortstr type:shortstr passive durable auto_delete internal nowait arguments:table
exchange.declare-ok 40 11
exchange.delete 40 20 ticket:u16 exchange:shortstr if_unused nowait
exchange.delete-ok 40 21
exchange.bind 40 30 ticket:u16 destination:shortstr source:shortstr routing_key:shortstr nowait arguments:table
exchange.bind-ok 40 31
exchange.unbind 40 40 ticket:u16 destination:shortstr source:shortstr routing_key:shortstr nowait arguments:table
exchange.unbind-ok 40 51
queue.declare 50 10 ticket:u16 queue:shortstr passive durable exclusive auto_delete nowait arguments:table
queue.declare-ok 50 11 queue:shortstr message_count:u32 consumer_count:u32
queue.bind 50 20 ticket:u16 queue:shortstr exchange:shortstr routing_key:shortstr nowait arguments:table
queue.bind-ok 50 21
queue.unbind 50 50 ticket:u16 queue:shortstr exchange:shortstr routing_key:shortstr arguments:table
queue.unbind-ok 50 51
queue.purge 50 30 ticket:u16 queue:shortstr nowait
queue.purge-ok 50 31 message_count:u32
queue.delete 50 40 ticket:u16 queue:shortstr if_unused if_empty nowait
queue.delete-ok 50 41 message_count:u32
basic.qos 60 10 prefetch_size:u32 prefetch_count:u16 global_qos
basic.qos-ok 60 11
basic.consume 60 20 ticket:u16 queue:shortstr consumer_tag:shortstr no_local no_ack exclusive nowait arguments:table
basic.consume-ok 60 21 consumer_tag:shortstr
basic.cancel 60 30 consumer_tag:shortstr nowait
basic.cancel-ok 60 31 consumer_tag:shortstr
basic.publish 60 40 ticket:u16 exchange:shortstr routing_key:shortstr mandatory immediate
basic.return 60 50 reply_code:u16 reply_text:shortstr exchange:shortstr routing_key:shortstr
basic.deliver 60 60 consumer_tag:shortstr delivery_tag:u64 redelivered exchange:shortstr routing_key:shortstr
basic.get 60 70 ticket:u16 queue:shortstr no_ack
basic.get-ok 60 71 delivery_tag:u64 redelivered exchange:shortstr routing_key:shortstr message_count:u32
basic.get-empty 60 72 cluster_id:shortstr
basic.ack 60 80 delivery_tag:u64 multiple
basic.reject 60 90 delivery_tag:u64 requeue
basic.recover-async 60 100 requeue
basic.recover 60 110 requeue
basic.recover-ok 60 111
basic.nack 60 120 delivery_tag:u64 multiple requeue
confirm.select 85 10 nowait
confirm.select-ok 85 11
tx.select 90 10
tx.select-ok 90 11
tx.commit 90 20
tx.commit-ok 90 21
tx.rollback 90 30
tx.rollback-ok 90 31
"""

# name: (class id, method id, fields as (name, type))
METHODS: dict[str, tuple[int, int, list[tuple[str, str]]]] = {}
for _line in _METHOD_TABLE.strip().splitlines():
    _name, _class_id, _method_id, *_fields = _line.split()
    _typed_fields = [(field, kind or "bit") for field, _, kind in (each.partition(":") for each in _fields)]
    METHODS[_name] = (int(_class_id), int(_method_id), _typed_fields)

METHOD_NAMES = {(class_id, method_id): name for name, (class_id, method_id, _) in METHODS.items()}
CONTENT_METHODS = {"basic.deliver", "basic.get-ok", "basic.return"}

# Content properties: name, type; the first one is flag bit 15, the next bit 14, and so on.
PROPERTIES = [
    ("content_type", "shortstr"),
    ("content_encoding", "shortstr"),
    ("headers", "table"),
    ("delivery_mode", "u8"),
    ("priority", "u8"),
    ("correlation_id", "shortstr"),
    ("reply_to", "shortstr"),
    ("expiration", "shortstr"),
    ("message_id", "shortstr"),
    ("timestamp", "u64"),
    ("type", "shortstr"),
    ("user_id", "shortstr"),
    ("app_id", "shortstr"),
    ("cluster_id", "shortstr"),
]

INTEGERS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
TABLE_NUMBERS = {
    "t": "?",
    "b": "b",
    "B": "B",
    "s": "h",
    "u": "H",
    "I": "i",
    "i": "I",
    "l": "q",
    "L": "q",
    "T": "Q",
    "f": "f",
    "d": "d",
}


class Typed(NamedTuple):
    """A field table value together with its one-letter type tag."""

    tag: str
    value: Any


class Closed(Exception):
    """The broker closed the socket while more was expected."""


@dataclass
class Frame:
    type: int
    channel: int
    payload: bytes


@dataclass
class Method:
    name: str
    channel: int
    args: dict[str, Any] = field(default_factory=dict)
    # Of content: properties (headers as a table of Typed), body and its split into frames.
    properties: dict[str, Any] | None = None
    body: bytes | None = None
    body_frame_sizes: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["args"][name]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('name')} has no field {name}") from None


# ---- Encoding


def shortstr(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">B", len(raw)) + raw


def longstr(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(raw)) + raw


def typed(value: Any) -> Typed:
    """The tag a plain Python value is sent under."""
    match value:
        case Typed():
            return value
        case None:
            return Typed("V", None)
        case bool():
            return Typed("t", value)
        case int():
            return Typed("I" if -(2**31) <= value < 2**31 else "l", value)
        case float():
            return Typed("d", value)
        case str():
            return Typed("S", value)
        case bytes():
            return Typed("x", value)
        case dict():
            return Typed("F", value)
        case list():
            return Typed("A", value)
    raise TypeError(f"no field table type for {value!r}")


def table_value(value: Any) -> bytes:
    tag, content = typed(value)
    head = tag.encode()
    if tag in TABLE_NUMBERS:
        return head + struct.pack(">" + TABLE_NUMBERS[tag], content)
    if tag in "Sx":
        return head + longstr(content)
    if tag == "D":
        scale, unscaled = content
        return head + struct.pack(">BI", scale, unscaled)
    if tag == "F":
        return head + table(content)
    if tag == "A":
        return head + longstr(b"".join(table_value(item) for item in content))
    if tag == "V":
        return head
    raise TypeError(f"unknown field table tag {tag!r}")


def table_body(content: dict[str, Any] | list[tuple[str, Any]]) -> bytes:
    """A field table without its length in front (pairs may repeat a key)."""
    pairs = content.items() if isinstance(content, dict) else content
    return b"".join(shortstr(key) + table_value(value) for key, value in pairs)


def table(content: dict[str, Any] | list[tuple[str, Any]] | bytes) -> bytes:
    return longstr(content if isinstance(content, bytes) else table_body(content))


def _value(kind: str, value: Any) -> bytes:
    if kind in INTEGERS:
        return struct.pack(">" + INTEGERS[kind], value)
    return {"shortstr": shortstr, "longstr": longstr, "table": table}[kind](value)


_DEFAULTS: dict[str, Any] = {"shortstr": "", "longstr": "", "table": {}, "bit": False}


def method(name: str, **args: Any) -> bytes:
    """The payload of a method frame; fields not given are zero, empty or false."""
    class_id, method_id, fields = METHODS[name]
    out = bytearray(struct.pack(">HH", class_id, method_id))
    bits: list[bool] = []

    def flush_bits() -> None:
        for start in range(0, len(bits), 8):
            out.append(sum(bit << at for at, bit in enumerate(bits[start : start + 8])))
        bits.clear()

    for field_name, kind in fields:
        value = args.pop(field_name, _DEFAULTS.get(kind, 0))
        if kind == "bit":
            bits.append(bool(value))
        else:
            flush_bits()
            out += _value(kind, value)
    flush_bits()
    if args:
        raise TypeError(f"{name} has no {', '.join(args)}")
    return bytes(out)


def frame(frame_type: int, channel: int, payload: bytes, end: int = FRAME_END) -> bytes:
    return struct.pack(">BHI", frame_type, channel, len(payload)) + payload + bytes([end])


def method_frame(channel: int, name: str, **args: Any) -> bytes:
    return frame(METHOD_FRAME, channel, method(name, **args))


def header_payload(
    body_size: int, properties: dict[str, Any] | None = None, class_id: int = 60, weight: int = 0
) -> bytes:
    """The payload of a content header frame."""
    given = dict(properties or {})
    flags, encoded = 0, b""
    for index, (name, kind) in enumerate(PROPERTIES):
        if name in given:
            flags |= 1 << (15 - index)
            encoded += _value(kind, given.pop(name))
    if given:
        raise TypeError(f"no such properties: {', '.join(given)}")
    return struct.pack(">HHQH", class_id, weight, body_size, flags) + encoded


def content_frames(
    channel: int, body: bytes, properties: dict[str, Any] | None = None, frame_max: int = 131072
) -> bytes:
    """Header and body frames of one message."""
    step = frame_max - 8
    out = [frame(HEADER_FRAME, channel, header_payload(len(body), properties))]
    out += [frame(BODY_FRAME, channel, body[at : at + step]) for at in range(0, len(body), step)]
    return b"".join(out)


def publish_frames(
    channel: int,
    exchange: str,
    routing_key: str,
    body: bytes,
    properties: dict[str, Any] | None = None,
    mandatory: bool = False,
    immediate: bool = False,
    frame_max: int = 131072,
) -> bytes:
    publish = method_frame(
        channel,
        "basic.publish",
        exchange=exchange,
        routing_key=routing_key,
        mandatory=mandatory,
        immediate=immediate,
    )
    return publish + content_frames(channel, body, properties, frame_max)


# ---- Decoding


class Reader:
    """Takes values off the front of a payload."""

    def __init__(self, payload: bytes):
        self.payload = payload
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.payload):
            raise ValueError(f"payload ends early: {self.payload!r}")
        self.at += count
        return self.payload[self.at - count : self.at]

    def unpack(self, code: str) -> Any:
        return struct.unpack(">" + code, self.take(struct.calcsize(">" + code)))[0]

    def shortstr(self) -> str:
        return self.take(self.unpack("B")).decode()

    def longstr(self) -> bytes:
        return self.take(self.unpack("I"))

    def table(self) -> dict[str, Typed]:
        inner = Reader(self.longstr())
        out: dict[str, Typed] = {}
        while not inner.done():
            key = inner.shortstr()
            out[key] = inner.table_value()
        return out

    def table_value(self) -> Typed:
        tag = chr(self.unpack("B"))
        if tag in TABLE_NUMBERS:
            return Typed(tag, self.unpack(TABLE_NUMBERS[tag]))
        if tag == "S":
            return Typed(tag, self.longstr().decode())
        if tag == "x":
            return Typed(tag, self.longstr())
        if tag == "D":
            return Typed(tag, (self.unpack("B"), self.unpack("I")))
        if tag == "F":
            return Typed(tag, self.table())
        if tag == "A":
            inner = Reader(self.longstr())
            items = []
            while not inner.done():
                items.append(inner.table_value())
            return Typed(tag, items)
        if tag == "V":
            return Typed(tag, None)
        raise ValueError(f"unknown field table tag {tag!r}")

    def value(self, kind: str) -> Any:
        if kind in INTEGERS:
            return self.unpack(INTEGERS[kind])
        if kind == "longstr":
            return self.longstr()
        return self.shortstr() if kind == "shortstr" else self.table()

    def done(self) -> bool:
        return self.at == len(self.payload)


def decode_method(channel: int, payload: bytes) -> Method:
    reader = Reader(payload)
    name = METHOD_NAMES[reader.unpack("H"), reader.unpack("H")]
    args: dict[str, Any] = {}
    octet, bit = 0, 8
    for field_name, kind in METHODS[name][2]:
        if kind == "bit":
            if bit == 8:
                octet, bit = reader.unpack("B"), 0
            args[field_name] = bool(octet >> bit & 1)
            bit += 1
        else:
            bit = 8
            args[field_name] = reader.value(kind)
    if not reader.done():
        raise ValueError(f"bytes left over after {name}: {payload!r}")
    return Method(name, channel, args)


def decode_header(payload: bytes) -> tuple[int, dict[str, Any]]:
    """Body size and properties of a content header."""
    reader = Reader(payload)
    class_id, weight, body_size, flags = (reader.unpack(code) for code in "HHQH")
    if (class_id, weight) != (60, 0):
        raise ValueError(f"content header of class {class_id}, weight {weight}")
    properties = {}
    for index, (name, kind) in enumerate(PROPERTIES):
        if flags >> (15 - index) & 1:
            properties[name] = reader.value(kind)
    if not reader.done():
        raise ValueError(f"bytes left over in content header: {payload!r}")
    return body_size, properties


def plain(value: Any) -> Any:
    """A decoded table or value without its type tags."""
    if isinstance(value, Typed):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


# ---- The client

FULL_CAPABILITIES = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "exchange_exchange_bindings": True,
    "publisher_confirms": True,
}


class RawClient:
    """One connection. Nothing is sent before `handshake` or one of its parts is called."""

    def __init__(self, url: str, timeout: float = 10.0):
        parts = urlsplit(url)
        self.user = unquote(parts.username or "guest")
        self.password = unquote(parts.password or "guest")
        self.virtual_host = unquote(parts.path[1:]) if len(parts.path) > 1 else "/"
        self.timeout = timeout
        self.socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5672), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()
        self.tune: Method | None = None
        self.frame_max = 131072

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Closes the socket without saying goodbye."""
        self.socket.close()

    # -- Sending

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_method(self, channel: int, name: str, **args: Any) -> None:
        self.send(method_frame(channel, name, **args))

    def send_heartbeat(self) -> None:
        self.send(HEARTBEAT)

    def publish(
        self,
        channel: int,
        exchange: str,
        routing_key: str,
        body: bytes = b"",
        properties: dict[str, Any] | None = None,
        mandatory: bool = False,
        immediate: bool = False,
    ) -> None:
        self.send(
            publish_frames(
                channel, exchange, routing_key, body, properties, mandatory, immediate, self.frame_max
            )
        )

    # -- Receiving

    def _fill(self, count: int, deadline: float) -> None:
        while len(self.buffer) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"nothing more came; have {bytes(self.buffer)!r}")
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(1 << 18)
            except TimeoutError:
                continue
            except ConnectionError as error:
                raise Closed(str(error)) from None
            if not data:
                raise Closed(f"end of stream; have {bytes(self.buffer)!r}")
            self.buffer += data

    def read_bytes(self, count: int, within: float | None = None) -> bytes:
        self._fill(count, time.monotonic() + (within or self.timeout))
        out = bytes(self.buffer[:count])
        del self.buffer[:count]
        return out

    def read_frame(self, within: float | None = None) -> Frame:
        deadline = time.monotonic() + (within or self.timeout)
        self._fill(7, deadline)
        frame_type, channel, size = struct.unpack_from(">BHI", self.buffer)
        self._fill(size + 8, deadline)
        payload = bytes(self.buffer[7 : 7 + size])
        end = self.buffer[7 + size]
        del self.buffer[: size + 8]
        if end != FRAME_END:
            raise ValueError(f"frame ends with {end:#x}")
        return Frame(frame_type, channel, payload)

    def _read_frame_but_heartbeats(self, within: float | None) -> Frame:
        while True:
            received = self.read_frame(within)
            if received.type != HEARTBEAT_FRAME:
                return received

    def read(self, within: float | None = None) -> Method:
        """The next method, with its content if it carries one; heartbeats are skipped."""
        first = self._read_frame_but_heartbeats(within)
        if first.type != METHOD_FRAME:
            raise ValueError(f"expected a method, got {first}")
        received = decode_method(first.channel, first.payload)
        if received.name in CONTENT_METHODS:
            header = self._read_frame_but_heartbeats(within)
            if (header.type, header.channel) != (HEADER_FRAME, first.channel):
                raise ValueError(f"expected a content header, got {header}")
            size, received.properties = decode_header(header.payload)
            body = bytearray()
            while len(body) < size:
                part = self._read_frame_but_heartbeats(within)
                if (part.type, part.channel) != (BODY_FRAME, first.channel):
                    raise ValueError(f"expected a body, got {part}")
                received.body_frame_sizes.append(len(part.payload))
                body += part.payload
            received.body = bytes(body)
        return received

    def expect(self, name: str, within: float | None = None) -> Method:
        received = self.read(within)
        assert received.name == name, f"expected {name}, got {received}"
        return received

    def call(self, channel: int, name: str, **args: Any) -> Method:
        """Sends a method and returns the one that comes back, whatever it is."""
        self.send_method(channel, name, **args)
        return self.read()

    def do(self, channel: int, name: str, **args: Any) -> Method:
        """Sends a method and insists on its -ok."""
        self.send_method(channel, name, **args)
        return self.expect(f"{name}-ok")

    def get(self, channel: int, queue: str, no_ack: bool = True) -> Method:
        return self.call(channel, "basic.get", queue=queue, no_ack=no_ack)

    def expect_silence(self, seconds: float) -> None:
        """Nothing but heartbeats comes for this long, and the socket stays open."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                received = self.read_frame(left)
            except TimeoutError:
                return
            assert received.type == HEARTBEAT_FRAME, f"expected silence, got {received}"

    def read_until_closed(self, within: float | None = None) -> bytes:
        """Everything the broker still sends before it closes the socket."""
        deadline = time.monotonic() + (within or self.timeout)
        try:
            while True:
                self._fill(len(self.buffer) + 1, deadline)
        except Closed:
            rest = bytes(self.buffer)
            self.buffer.clear()
            return rest

    # -- Handshake, step by step

    def read_start(self) -> Method:
        self.send(PROTOCOL_HEADER)
        return self.expect("connection.start")

    def plain_response(self) -> bytes:
        return b"\x00" + self.user.encode() + b"\x00" + self.password.encode()

    def start_ok(self, **overrides: Any) -> None:
        arguments: dict[str, Any] = {
            "client_properties": {"product": "raw", "capabilities": FULL_CAPABILITIES},
            "mechanism": "PLAIN",
            "response": self.plain_response(),
            "locale": "en_US",
        }
        self.send_method(0, "connection.start-ok", **arguments | overrides)

    def login(self, **overrides: Any) -> Method:
        """Protocol header to connection.tune."""
        self.read_start()
        self.start_ok(**overrides)
        self.tune = self.expect("connection.tune")
        return self.tune

    def tune_ok(self, **overrides: int) -> None:
        assert self.tune is not None
        arguments = self.tune.args | {"heartbeat": 0} | overrides
        self.frame_max = arguments["frame_max"]
        self.send_method(0, "connection.tune-ok", **arguments)

    def handshake(
        self, start_ok: dict[str, Any] | None = None, virtual_host: str | None = None, **tune_ok: int
    ) -> RawClient:
        """Protocol header to connection.open-ok, heartbeats off unless asked for."""
        self.login(**start_ok or {})
        self.tune_ok(**tune_ok)
        self.do(
            0,
            "connection.open",
            virtual_host=self.virtual_host if virtual_host is None else virtual_host,
        )
        return self

    def open_channel(self, channel: int = 1) -> int:
        self.do(channel, "channel.open")
        return channel

    def close(self) -> None:
        """Closes the connection the polite way."""
        self.do(0, "connection.close", reply_code=200, reply_text="bye")
        self.disconnect()
