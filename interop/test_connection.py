"""Handshake, login, tuning, opening, heartbeats, update-secret and closing."""

import time
from contextlib import suppress

import pika
import pika.exceptions
import pytest

from helpers import (
    assert_close,
    eventually,
    expect_connection_close,
    expect_counts,
    get_eventually,
    get_one,
    publish,
    queue_exists,
)
from raw import (
    FULL_CAPABILITIES,
    HEARTBEAT,
    HEARTBEAT_FRAME,
    METHOD_FRAME,
    PROTOCOL_HEADER,
    Closed,
    Typed,
    frame,
    method,
    method_frame,
    table_body,
)

AMQP_0_9_1 = b"AMQP\x00\x00\x09\x01"
AMQP_1_0_WITH_SASL = b"AMQP\x03\x01\x00\x00"
CAPABILITIES = [
    "authentication_failure_close",
    "basic.nack",
    "connection.blocked",
    "consumer_cancel_notify",
    "consumer_priorities",
    "direct_reply_to",
    "exchange_exchange_bindings",
    "per_consumer_qos",
    "publisher_confirms",
]
LOGIN_REFUSED = "Login was refused using authentication mechanism {}. For details see the broker logfile."


def assert_dropped_silently_after_a_pause(client):
    """Nothing is sent, and the socket is closed some three seconds later."""
    started = time.monotonic()
    assert client.read_until_closed(within=8) == b""
    assert 2.5 < time.monotonic() - started < 6


# ---- Protocol header


def test_start_offers_version_locale_and_mechanisms(dial):
    start = dial().read_start()
    assert (start.version_major, start.version_minor) == (0, 9)
    assert start.locales == b"en_US"
    assert {b"PLAIN", b"AMQPLAIN"} <= set(start.mechanisms.split(b" "))


@pytest.mark.parametrize(
    "key", ["cluster_name", "copyright", "information", "platform", "product", "version"]
)
def test_server_property_is_a_non_empty_string(key, dial):
    tag, value = dial().read_start().server_properties[key]
    assert tag == "S"
    assert value


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_server_announces_capability(capability, dial):
    tag, capabilities = dial().read_start().server_properties["capabilities"]
    assert tag == "F"
    assert capabilities[capability] == Typed("t", True)


def test_server_announces_no_other_capabilities(dial):
    assert set(dial().read_start().server_properties["capabilities"].value) == set(CAPABILITIES)


def test_old_spelling_of_the_protocol_header_is_served(dial):
    client = dial()
    client.send(b"AMQP\x01\x01\x00\x09")
    assert client.expect("connection.start").version_minor == 9


@pytest.mark.parametrize("version", [b"\x00\x00\x09\x00", b"\x00\x00\x09\x02", b"\x00\x00\x0a\x00"])
def test_neighbouring_version_is_answered_with_the_supported_one(version, dial):
    client = dial()
    client.send(b"AMQP" + version)
    assert client.read_until_closed() == AMQP_0_9_1


@pytest.mark.parametrize(
    "header", [b"HELLO123", b"GET / HT", b"AMQP\x02\x01\x00\x00", b"\x16\x03\x01\x02\x00\x01\x00\x01"]
)
def test_foreign_protocol_is_answered_with_a_supported_header(header, dial, server):
    client = dial()
    client.send(header)
    answer = client.read_until_closed()
    if server.is_3x:
        assert answer == AMQP_0_9_1
    elif server.is_rabbitmq:
        assert answer == AMQP_1_0_WITH_SASL
    else:
        assert answer in (AMQP_0_9_1, AMQP_1_0_WITH_SASL)


@pytest.mark.parametrize("sent", [b"", b"AMQ"], ids=["nothing", "half_a_header"])
def test_socket_that_ends_within_the_header_is_closed_silently(sent, dial):
    client = dial()
    client.send(sent)
    client.socket.shutdown(1)
    assert client.read_until_closed() == b""


def test_handshake_that_arrives_byte_by_byte_is_understood(dial):
    client = dial()

    def dribble(data):
        for at in range(len(data)):
            client.send(data[at : at + 1])

    dribble(PROTOCOL_HEADER)
    client.expect("connection.start")
    dribble(
        method_frame(
            0,
            "connection.start-ok",
            client_properties={"capabilities": FULL_CAPABILITIES},
            mechanism="PLAIN",
            response=client.plain_response(),
            locale="en_US",
        )
    )
    tune = client.expect("connection.tune")
    dribble(method_frame(0, "connection.tune-ok", **tune.args))
    dribble(method_frame(0, "connection.open", virtual_host="/"))
    client.expect("connection.open-ok")


def test_methods_that_arrive_in_one_segment_are_all_answered_in_order(raw):
    client = raw()
    client.send(
        method_frame(1, "channel.open")
        + method_frame(1, "queue.declare", exclusive=True)
        + method_frame(1, "basic.qos", prefetch_count=1)
        + method_frame(1, "channel.close")
    )
    answers = [client.read().name for _ in range(4)]
    assert answers == ["channel.open-ok", "queue.declare-ok", "basic.qos-ok", "channel.close-ok"]


def test_handshake_that_is_not_finished_times_out_silently(dial):
    client = dial()
    started = time.monotonic()
    client.login()
    assert client.read_until_closed(within=15) == b""
    assert 8 < time.monotonic() - started < 13


# ---- Login


def test_plain_login_is_answered_with_tune_and_no_challenge(dial):
    client = dial()
    client.read_start()
    client.start_ok()
    assert client.read().name == "connection.tune"


@pytest.mark.parametrize("extra", [{}, {"REALM": "x", "NUMBER": 1}], ids=["plain", "other_keys_are_ignored"])
def test_amqplain_login_is_accepted(extra, dial):
    client = dial()
    response = table_body(extra | {"LOGIN": client.user, "PASSWORD": client.password})
    client.login(mechanism="AMQPLAIN", response=response)


def test_unknown_locale_is_accepted(dial):
    dial().login(locale="xx_XX")


def test_client_properties_of_every_type_are_accepted(dial):
    properties = {
        "connection_name": "interop",
        "nested": {"table": {"list": [1, "two", [3.0, None]]}},
        "raw": b"\x00\xff",
        "capabilities": {"something_new": True, "another": 5},
    }
    dial().login(client_properties=properties)


@pytest.mark.parametrize(
    "response",
    [b"\x00guest\x00wrong", b"\x00guest\x00", b"\x00nobody\x00guest"],
    ids=["wrong", "blank", "unknown_user"],
)
def test_refused_plain_login_is_told_to_a_client_that_can_hear_it(response, dial):
    client = dial()
    client.read_start()
    client.start_ok(response=response)
    expect_connection_close(client, 403, LOGIN_REFUSED.format("PLAIN"))


def test_refused_amqplain_login_is_told_to_a_client_that_can_hear_it(dial):
    client = dial()
    client.read_start()
    client.start_ok(mechanism="AMQPLAIN", response=table_body({"LOGIN": "guest", "PASSWORD": "wrong"}))
    expect_connection_close(client, 403, LOGIN_REFUSED.format("AMQPLAIN"))


def test_pika_reports_a_refused_login(amqp_url):
    parameters = pika.URLParameters(amqp_url)
    parameters.credentials = pika.PlainCredentials("guest", "wrong")
    with pytest.raises(pika.exceptions.ProbableAuthenticationError) as caught:
        pika.BlockingConnection(parameters)
    assert LOGIN_REFUSED.format("PLAIN") in str(caught.value)


@pytest.mark.parametrize(
    "properties",
    [{}, {"capabilities": {"authentication_failure_close": False}}],
    ids=["no_capabilities", "capability_false"],
)
def test_refused_login_without_the_capability_is_dropped_silently(properties, dial):
    client = dial()
    client.read_start()
    client.start_ok(response=b"\x00guest\x00wrong", client_properties=properties)
    assert_dropped_silently_after_a_pause(client)


@pytest.mark.parametrize(
    "overrides",
    [
        {"response": b"xx"},
        {"response": b"guest\x00guest\x00guest"},
        {"mechanism": "NOPE"},
        {"mechanism": "AMQPLAIN", "response": b"xx"},
        {"mechanism": "AMQPLAIN", "response": table_body({"LOGIN": "guest"})},
    ],
    ids=[
        "malformed",
        "with_authorisation_id",
        "unknown_mechanism",
        "amqplain_malformed",
        "amqplain_without_password",
    ],
)
def test_login_that_makes_no_sense_is_dropped_silently(overrides, dial):
    client = dial()
    client.read_start()
    client.start_ok(**overrides)
    assert_dropped_silently_after_a_pause(client)


@pytest.mark.parametrize(
    "sent",
    [
        method_frame(0, "connection.open", virtual_host="/"),
        method_frame(0, "connection.tune-ok", channel_max=1, frame_max=8192),
        frame(METHOD_FRAME, 0, method("connection.start-ok")[:4] + b"\xff\xff"),
        frame(METHOD_FRAME, 0, b"\x00\x0a\x00\x0b" + b"x" * 9000),
    ],
    ids=["open", "tune_ok", "undecodable", "larger_than_the_frame_limit_before_tuning"],
)
def test_anything_but_start_ok_after_start_is_dropped_silently(sent, dial):
    client = dial()
    client.read_start()
    client.send(sent)
    assert_dropped_silently_after_a_pause(client)


def test_heartbeat_before_start_ok_is_ignored(dial):
    client = dial()
    client.read_start()
    client.send(HEARTBEAT)
    client.start_ok()
    client.expect("connection.tune")


# ---- Tune


def test_tune_proposes_the_documented_defaults(dial):
    assert dial().login().args == {"channel_max": 2047, "frame_max": 131072, "heartbeat": 60}


@pytest.mark.parametrize("field, change", [("frame_max", 1), ("channel_max", 1)])
def test_tune_ok_above_the_proposal_is_dropped_silently(field, change, dial):
    client = dial()
    proposed = client.login().args[field]
    client.tune_ok(**{field: proposed + change})
    assert_dropped_silently_after_a_pause(client)


@pytest.mark.parametrize("field", ["frame_max", "channel_max"])
def test_tune_ok_without_a_limit_is_dropped_silently(field, dial):
    client = dial()
    client.login()
    client.tune_ok(**{field: 0})
    assert_dropped_silently_after_a_pause(client)


def test_tune_ok_below_the_minimum_frame_size_is_dropped_silently(dial, server):
    client = dial()
    client.login()
    client.tune_ok(frame_max=server.minimum_frame_max - 1)
    assert_dropped_silently_after_a_pause(client)


@pytest.mark.parametrize("sent", ["connection.open", "connection.secure-ok"])
def test_anything_but_tune_ok_after_tune_is_dropped_silently(sent, dial):
    client = dial()
    client.login()
    client.send_method(0, sent)
    assert_dropped_silently_after_a_pause(client)


def test_smallest_limits_are_accepted(raw, server):
    client = raw(1, frame_max=server.minimum_frame_max, channel_max=1)
    client.do(1, "queue.declare", exclusive=True)


@pytest.mark.parametrize("heartbeat", [0, 1, 600, 65535])
def test_any_heartbeat_interval_is_accepted(heartbeat, raw):
    raw(1, heartbeat=heartbeat)


# ---- Open


def test_open_answers_with_an_empty_hosts_field(dial):
    client = dial()
    client.login()
    client.tune_ok()
    assert client.do(0, "connection.open", virtual_host="/").args == {"known_hosts": ""}


@pytest.mark.parametrize("virtual_host", ["no-such-host", "", "//"])
def test_unknown_virtual_host_is_refused(virtual_host, dial):
    client = dial()
    client.login()
    client.tune_ok()
    client.send_method(0, "connection.open", virtual_host=virtual_host)
    expect_connection_close(client, 530, f"vhost {virtual_host} not found", "connection.open")


def test_channel_frame_before_open_is_unexpected(dial):
    client = dial()
    client.login()
    client.tune_ok()
    client.send_method(1, "channel.open")
    expect_connection_close(client, 505, "type 1, all octets = <<0,20,0,10,0>>")


# ---- Heartbeats


def test_server_sends_heartbeats_at_the_negotiated_interval(raw):
    client = raw(heartbeat=1)
    arrived = []
    for _ in range(3):
        beat = client.read_frame(within=2)
        assert (beat.type, beat.channel, beat.payload) == (HEARTBEAT_FRAME, 0, b"")
        arrived.append(time.monotonic())
        client.send_heartbeat()
    assert 0.3 < arrived[2] - arrived[1] < 1.5


def test_server_sends_no_heartbeats_when_they_are_off(raw):
    client = raw(heartbeat=0)
    with pytest.raises(TimeoutError):
        client.read_frame(within=2.5)


def test_silent_client_is_dropped_without_a_close_after_two_to_three_intervals(raw):
    client = raw(heartbeat=1)
    started = time.monotonic()
    received = client.read_until_closed(within=8)
    assert received == HEARTBEAT * (len(received) // len(HEARTBEAT))
    assert 1.5 < time.monotonic() - started < 4.5


def beat(client):
    client.send_heartbeat()


def work(client):
    client.do(1, "basic.qos", prefetch_count=1)


@pytest.mark.parametrize("sign_of_life", [beat, work])
def test_client_that_sends_anything_stays_connected(sign_of_life, raw):
    client = raw(1, heartbeat=1)
    until = time.monotonic() + 4
    while time.monotonic() < until:
        sign_of_life(client)
        time.sleep(0.4)
    client.do(1, "queue.declare", exclusive=True)


def test_exclusive_queue_goes_with_a_client_that_falls_silent(raw, connection, name):
    queue = name()
    client = raw(1, heartbeat=1)
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.read_until_closed(within=8)
    eventually(lambda: not queue_exists_or_is_locked(connection, queue))


# ---- While running


def test_update_secret_is_accepted(connection, queue, channel):
    connection.update_secret("new-secret", "rotation")
    publish(channel, queue, "still works")
    assert get_one(channel, queue).body == b"still works"


def test_publisher_is_not_told_to_block_when_there_is_no_alarm(raw, queue):
    client = raw(1)
    client.publish(1, "", queue, b"payload")
    client.expect_silence(0.3)
    client.do(1, "basic.qos")


def test_access_request_of_old_clients_gets_a_ticket(client):
    assert client.do(1, "access.request", realm="/data", active=True, read=True).ticket == 1


# ---- Close


def test_nothing_comes_after_the_answer_to_close(raw, queue, channel):
    client = raw(1)
    client.do(1, "basic.consume", queue=queue, no_ack=True)
    client.do(0, "connection.close", reply_code=200, reply_text="bye")
    publish(channel, queue, "too late")
    with suppress(Closed):
        client.expect_silence(0.3)
    assert get_one(channel, queue).body == b"too late"


def test_close_is_answered_while_a_message_is_half_sent(raw, queue):
    client = raw(1)
    client.send_method(1, "basic.publish", routing_key=queue)
    client.do(0, "connection.close", reply_code=200)


def test_what_is_pipelined_after_close_is_ignored(raw, connection, name):
    queue = name()
    client = raw(1)
    client.send(
        method_frame(0, "connection.close", reply_code=200)
        + method_frame(1, "queue.declare", queue=queue, durable=True)
    )
    client.expect("connection.close-ok")
    assert not queue_exists(connection, queue)


def test_close_of_the_client_is_answered_after_the_close_of_the_server(client):
    client.publish(1, "", "x", immediate=True)
    assert_close(client.read(), "connection", 0, 540, "immediate=true", "basic.publish")
    client.do(0, "connection.close", reply_code=200)


def test_everything_but_close_is_ignored_after_the_close_of_the_server(client, connection, name):
    queue = name()
    client.publish(1, "", "x", immediate=True)
    client.expect("connection.close")
    client.send_method(1, "queue.declare", queue=queue, durable=True)
    client.send_method(2, "channel.open")
    client.expect_silence(0.3)
    client.send_method(0, "connection.close-ok")
    assert client.read_until_closed() == b""
    assert not queue_exists(connection, queue)


def test_exclusive_queues_are_gone_before_close_is_answered(raw, connect, name):
    queue = name()
    other = connect()
    for _ in range(5):
        client = raw(1)
        client.do(1, "queue.declare", queue=queue, exclusive=True)
        client.do(0, "connection.close", reply_code=200)
        assert not queue_exists(other, queue)


@pytest.mark.parametrize("end", ["close", "disconnect"])
def test_unacknowledged_messages_come_back_in_order_when_the_connection_ends(end, raw, channel, queue):
    publish(channel, queue, "1", "2", "3", "4")
    client = raw(1)
    for _ in range(3):
        get_eventually(client, 1, queue, no_ack=False)
    getattr(client, end)()
    expect_counts(channel, queue, messages=4, consumers=0)
    returned = [get_one(channel, queue) for _ in range(4)]
    assert [(message.body, message.redelivered) for message in returned] == [
        (b"1", True),
        (b"2", True),
        (b"3", True),
        (b"4", False),
    ]


@pytest.mark.parametrize("end", ["close", "disconnect"])
def test_consumers_are_gone_when_the_connection_ends(end, raw, channel, queue):
    client = raw(1, 2)
    client.do(1, "basic.consume", queue=queue)
    client.do(2, "basic.consume", queue=queue)
    expect_counts(channel, queue, messages=0, consumers=2)
    getattr(client, end)()
    expect_counts(channel, queue, messages=0, consumers=0)


def test_exclusive_and_auto_delete_queues_go_when_the_socket_breaks(raw, connection, name):
    exclusive, auto_delete = name("exclusive"), name("auto-delete")
    client = raw(1)
    client.do(1, "queue.declare", queue=exclusive, exclusive=True)
    client.do(1, "queue.declare", queue=auto_delete, auto_delete=True)
    client.do(1, "basic.consume", queue=auto_delete)
    client.disconnect()
    eventually(lambda: not queue_exists(connection, auto_delete))
    eventually(lambda: not queue_exists_or_is_locked(connection, exclusive))


def queue_exists_or_is_locked(connection, queue):
    try:
        return queue_exists(connection, queue)
    except pika.exceptions.ChannelClosedByBroker as error:
        assert error.reply_code == 405
        return True


def test_many_connections_are_open_at_once(connect):
    connections = [connect() for _ in range(30)]
    assert all(connection.channel().is_open for connection in connections)
