"""Which queues a message reaches: by exchange type, through other exchanges, by CC and BCC."""

import pytest

from helpers import drain, expect_channel_close, get, get_one
from raw import Typed


@pytest.fixture
def exchange(client, name):
    """Declares an exchange of a type on the raw client."""

    def declare(kind, **fields):
        exchange = name(kind)
        client.do(1, "exchange.declare", exchange=exchange, type=kind, **fields)
        return exchange

    return declare


@pytest.fixture
def bound(client, name):
    """Declares a queue with bindings to an exchange."""

    def declare(exchange, *keys, arguments=None):
        queue = name()
        client.do(1, "queue.declare", queue=queue, exclusive=True)
        for key in keys or ("",):
            client.do(
                1, "queue.bind", queue=queue, exchange=exchange, routing_key=key, arguments=arguments or {}
            )
        return queue

    return declare


def bodies(client, queue):
    taken = []
    while (answer := client.get(1, queue)).name == "basic.get-ok":
        taken.append(answer.body)
    return taken


# ---- Direct and fanout


def test_direct_exchange_compares_keys_byte_for_byte(client, exchange, bound):
    direct = exchange("direct")
    queue = bound(direct, "a.b", "ü")
    for key in ("a.b", "A.B", "a", "a.*", "#", "", "ü", "u"):
        client.publish(1, direct, key, key.encode())
    assert bodies(client, queue) == [b"a.b", "ü".encode()]


def test_direct_exchange_delivers_to_every_queue_with_the_key(client, exchange, bound):
    direct = exchange("direct")
    queues = [bound(direct, "k"), bound(direct, "k", "other"), bound(direct, "other")]
    client.publish(1, direct, "k", b"m")
    assert [bodies(client, queue) for queue in queues] == [[b"m"], [b"m"], []]


def test_fanout_exchange_ignores_keys_and_delivers_once(client, exchange, bound):
    fanout = exchange("fanout")
    queues = [bound(fanout, "x"), bound(fanout, "y", "z"), bound(fanout)]
    client.publish(1, fanout, "whatever", b"m")
    assert [bodies(client, queue) for queue in queues] == [[b"m"]] * 3


def test_default_exchange_knows_no_wildcards(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, exclusive=True)
    for key in ("#", "*", queue.upper(), queue + ".", queue):
        client.publish(1, "", key, key.encode())
    assert bodies(client, queue) == [queue.encode()]


# ---- Topic


@pytest.mark.parametrize(
    "pattern, matching, others",
    [
        ("a.b.c", ["a.b.c"], ["a.b", "a.b.c.d", "a.b.C", "a..c", ""]),
        ("*", ["a", "ab", "*", "#"], ["", "a.b", "."]),
        ("#", ["", "a", "a.b", "a.b.c", ".", ".."], []),
        ("a.*", ["a.b", "a."], ["a", "a.b.c", "b.a", ""]),
        ("*.b", ["a.b", ".b"], ["b", "a.b.c", "a.c"]),
        ("a.#", ["a", "a.b", "a.b.c", "a."], ["", "b", "b.a", "ab"]),
        ("#.c", ["c", "a.c", "a.b.c", ".c"], ["", "c.d", "abc"]),
        ("a.#.c", ["a.c", "a.b.c", "a.b.b.c"], ["a", "c", "a.b", "b.c"]),
        ("a.*.c", ["a.b.c", "a..c"], ["a.c", "a.b.b.c"]),
        ("*.#", ["a", "a.b", "a.b.c", "."], [""]),
        ("#.*", ["a", "a.b", "a.b.c", "."], [""]),
        ("*.*", ["a.b", "."], ["a", "", "a.b.c"]),
        ("#.a.#", ["a", "a.b", "b.a", "b.a.c"], ["", "b", "ab.c"]),
        ("a*", ["a*"], ["a", "ab", "a.b"]),
        ("a.b#", ["a.b#"], ["a.b", "a.bc", "a.b.c"]),
        ("", [""], ["a", "."]),
        ("a..c", ["a..c"], ["a.c", "a.b.c"]),
        (".", ["."], ["", "a", "a.b", ".."]),
        ("#.b.*", ["b.c", "a.b.c", "b.b.c", "a.b.b"], ["b", "a.b", "c.d"]),
    ],
)
def test_topic_pattern_matches_word_by_word(pattern, matching, others, client, exchange, bound):
    topic = exchange("topic")
    queue = bound(topic, pattern)
    for key in matching + others:
        client.publish(1, topic, key, key.encode())
    assert bodies(client, queue) == [key.encode() for key in matching]


def test_topic_exchange_delivers_once_however_many_patterns_match(client, exchange, bound):
    topic = exchange("topic")
    queue = bound(topic, "#", "a.#", "*.b", "a.b")
    client.publish(1, topic, "a.b", b"m")
    assert bodies(client, queue) == [b"m"]


def test_unbinding_one_topic_pattern_leaves_the_others(client, exchange, bound):
    topic = exchange("topic")
    queue = bound(topic, "a.#", "a.*", "a.b")
    client.do(1, "queue.unbind", queue=queue, exchange=topic, routing_key="a.#")
    for key in ("a", "a.b", "a.c", "a.b.c"):
        client.publish(1, topic, key, key.encode())
    assert bodies(client, queue) == [b"a.b", b"a.c"]
    client.do(1, "queue.unbind", queue=queue, exchange=topic, routing_key="a.*")
    for key in ("a.b", "a.c"):
        client.publish(1, topic, key, key.encode())
    assert bodies(client, queue) == [b"a.b"]


# ---- Headers


@pytest.mark.parametrize(
    "arguments, headers, matches",
    [
        # all is the default and needs every argument
        ({"a": 1, "b": "x"}, {"a": 1, "b": "x"}, True),
        ({"a": 1, "b": "x"}, {"a": 1, "b": "x", "c": True}, True),
        ({"a": 1, "b": "x"}, {"a": 1}, False),
        ({"x-match": "all", "a": 1, "b": "x"}, {"a": 1, "b": "y"}, False),
        ({"x-match": "all", "a": 1, "b": "x"}, {"a": 1, "b": "x"}, True),
        ({"x-match": "all"}, {"a": 1}, True),
        ({}, {}, True),
        # any needs one of them
        ({"x-match": "any", "a": 1, "b": "x"}, {"a": 1}, True),
        ({"x-match": "any", "a": 1, "b": "x"}, {"a": 2, "b": "x"}, True),
        ({"x-match": "any", "a": 1, "b": "x"}, {"a": 2, "b": "y"}, False),
        ({"x-match": "any", "a": 1}, {}, False),
        ({"x-match": "any"}, {"a": 1}, False),
        # arguments named x- count only for the -with-x kinds
        ({"x-match": "all", "x-a": 1}, {}, True),
        ({"x-match": "any", "x-a": 1}, {"x-a": 1}, False),
        ({"x-match": "all-with-x", "x-a": 1}, {"x-a": 1}, True),
        ({"x-match": "all-with-x", "x-a": 1, "b": 2}, {"b": 2}, False),
        ({"x-match": "any-with-x", "x-a": 1, "b": 2}, {"x-a": 1}, True),
        ({"x-match": "any-with-x", "x-a": 1}, {"x-a": 2}, False),
        # values are compared by kind and value
        ({"a": 1}, {"a": "1"}, False),
        ({"a": 1}, {"a": Typed("l", 1)}, True),
        ({"a": 1}, {"a": Typed("B", 1)}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": True}, {"a": True}, True),
        ({"a": True}, {"a": False}, False),
        ({"a": "x"}, {"a": "X"}, False),
        ({"a": 1.5}, {"a": 1.5}, True),
        ({"a": {"b": 1}}, {"a": {"b": 1}}, True),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, False),
        ({"a": [1, "x"]}, {"a": [1, "x"]}, True),
        ({"a": [1, "x"]}, {"a": ["x", 1]}, False),
        # void asks for the header to be there
        ({"a": None}, {"a": "anything"}, True),
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {"b": 1}, False),
        ({"A": 1}, {"a": 1}, False),
    ],
)
def test_headers_binding(arguments, headers, matches, client, exchange, bound):
    kind = exchange("headers")
    queue = bound(kind, "ignored", arguments=arguments)
    client.publish(1, kind, "any key", b"m", {"headers": headers})
    assert bodies(client, queue) == ([b"m"] if matches else [])


def test_headers_binding_tells_integers_from_floats(client, exchange, bound, server):
    kind = exchange("headers")
    queue = bound(kind, arguments={"a": 1})
    client.publish(1, kind, "", b"m", {"headers": {"a": 1.0}})
    assert bodies(client, queue) == ([b"m"] if server.is_3x else [])


def test_message_without_headers_matches_only_bindings_without_demands(client, exchange, bound):
    kind = exchange("headers")
    demanding, content, any_of_nothing = (
        bound(kind, arguments=arguments) for arguments in ({"a": 1}, {"x-match": "all"}, {"x-match": "any"})
    )
    client.publish(1, kind, "", b"m")
    assert [bodies(client, queue) for queue in (demanding, content, any_of_nothing)] == [[], [b"m"], []]


def test_headers_exchange_delivers_once_however_many_bindings_match(client, exchange, bound):
    kind = exchange("headers")
    queue = bound(kind, arguments={"a": 1})
    client.do(1, "queue.bind", queue=queue, exchange=kind, arguments={"b": 2})
    client.publish(1, kind, "", b"m", {"headers": {"a": 1, "b": 2}})
    assert bodies(client, queue) == [b"m"]


# ---- Exchange to exchange


def test_message_passes_through_a_chain_of_exchanges_of_all_types(client, exchange, bound):
    direct, topic, headers, fanout = (exchange(kind) for kind in ("direct", "topic", "headers", "fanout"))
    queue = bound(fanout)
    client.do(1, "exchange.bind", source=direct, destination=topic, routing_key="a.b")
    client.do(1, "exchange.bind", source=topic, destination=headers, routing_key="a.*")
    client.do(1, "exchange.bind", source=headers, destination=fanout, arguments={"h": 1})
    client.publish(1, direct, "a.b", b"through", {"headers": {"h": 1}})
    client.publish(1, direct, "a.b", b"stopped", {"headers": {"h": 2}})
    received = client.get(1, queue)
    assert (received.exchange, received.routing_key, received.body) == (direct, "a.b", b"through")
    assert bodies(client, queue) == []


def test_queue_reached_on_two_ways_gets_one_copy(client, exchange, bound):
    first, left, right = (exchange("fanout") for _ in range(3))
    queue = bound(left)
    client.do(1, "queue.bind", queue=queue, exchange=right)
    client.do(1, "queue.bind", queue=queue, exchange=first)
    for destination in (left, right):
        client.do(1, "exchange.bind", source=first, destination=destination)
    client.publish(1, first, "", b"m")
    assert bodies(client, queue) == [b"m"]


# ---- Alternate exchange


def test_alternate_exchange_gets_only_what_nobody_else_wants(client, exchange, bound):
    alternate = exchange("fanout")
    main = exchange("direct", arguments={"alternate-exchange": alternate})
    wanted, leftover = bound(main, "k"), bound(alternate)
    client.publish(1, main, "k", b"wanted")
    client.publish(1, main, "other", b"leftover")
    assert bodies(client, wanted) == [b"wanted"]
    received = client.get(1, leftover)
    assert (received.exchange, received.routing_key, received.body) == (main, "other", b"leftover")
    assert bodies(client, leftover) == []


def test_message_that_took_the_alternate_exchange_counts_as_routed(client, exchange, bound):
    alternate = exchange("fanout")
    main = exchange("direct", arguments={"alternate-exchange": alternate})
    queue = bound(alternate)
    client.publish(1, main, "k", b"m", mandatory=True)
    assert bodies(client, queue) == [b"m"]


def test_alternate_exchanges_chain(client, exchange, bound):
    last = exchange("fanout")
    middle = exchange("direct", arguments={"alternate-exchange": last})
    first = exchange("direct", arguments={"alternate-exchange": middle})
    queue = bound(last)
    client.publish(1, first, "k", b"m")
    assert bodies(client, queue) == [b"m"]


def test_alternate_exchanges_in_a_circle_leave_the_message_unroutable(client, name):
    first, second = name("first"), name("second")
    client.do(1, "exchange.declare", exchange=first, type="direct", arguments={"alternate-exchange": second})
    client.do(1, "exchange.declare", exchange=second, type="direct", arguments={"alternate-exchange": first})
    client.publish(1, first, "k", b"m", mandatory=True)
    assert client.expect("basic.return").exchange == first


def test_missing_alternate_exchange_leaves_the_message_unroutable(client, exchange, name):
    main = exchange("direct", arguments={"alternate-exchange": name("missing")})
    client.publish(1, main, "k", b"m", mandatory=True)
    assert client.expect("basic.return").reply_code == 312


def test_internal_exchange_may_be_an_alternate_exchange(client, exchange, bound):
    alternate = exchange("fanout", internal=True)
    main = exchange("direct", arguments={"alternate-exchange": alternate})
    queue = bound(alternate)
    client.publish(1, main, "k", b"m")
    assert bodies(client, queue) == [b"m"]


# ---- CC and BCC


@pytest.mark.parametrize("header", ["CC", "BCC"])
def test_copies_go_to_the_queues_named(header, client, exchange, bound):
    direct = exchange("direct")
    queues = [bound(direct, key) for key in ("to", "copy-1", "copy-2", "none")]
    client.publish(1, direct, "to", b"m", {"headers": {header: ["copy-1", "copy-2"]}})
    assert [bodies(client, queue) for queue in queues] == [[b"m"], [b"m"], [b"m"], []]


def test_copies_work_through_the_default_exchange(client, name):
    queues = [name(str(number)) for number in range(3)]
    for queue in queues:
        client.do(1, "queue.declare", queue=queue, exclusive=True)
    client.publish(1, "", queues[0], b"m", {"headers": {"CC": [queues[1]], "BCC": [queues[2]]}})
    for queue in queues:
        received = client.get(1, queue)
        assert (received.body, received.routing_key) == (b"m", queues[0])


def test_copies_work_through_a_topic_exchange(client, exchange, bound):
    topic = exchange("topic")
    queue = bound(topic, "copy.*")
    client.publish(1, topic, "to", b"m", {"headers": {"CC": ["copy.1", "copy.2"]}})
    assert bodies(client, queue) == [b"m"]


def test_copies_alone_make_a_message_routable(client, exchange, bound):
    direct = exchange("direct")
    queue = bound(direct, "copy")
    client.publish(1, direct, "nobody", b"m", {"headers": {"BCC": ["copy"]}}, mandatory=True)
    assert bodies(client, queue) == [b"m"]


def test_cc_is_delivered_and_bcc_is_not(client, exchange, bound):
    direct = exchange("direct")
    queues = [bound(direct, key) for key in ("to", "open", "hidden")]
    headers = {"CC": ["open"], "BCC": ["hidden"], "other": 1}
    client.publish(1, direct, "to", b"m", {"headers": headers})
    for queue in queues:
        assert client.get(1, queue).properties["headers"] == {
            "CC": Typed("A", [Typed("S", "open")]),
            "other": Typed("I", 1),
        }


def test_returned_message_does_not_show_bcc(client, name):
    headers = {"CC": [name("cc")], "BCC": [name("bcc")]}
    client.publish(1, "", name("missing"), b"m", {"headers": headers}, mandatory=True)
    assert set(client.expect("basic.return").properties["headers"]) == {"CC"}


@pytest.mark.parametrize("header", ["CC", "BCC"])
def test_elements_that_are_no_strings_are_ignored(header, client, exchange, bound):
    direct = exchange("direct")
    queue = bound(direct, "copy")
    client.publish(1, direct, "to", b"m", {"headers": {header: [5, True, "copy", None]}})
    assert bodies(client, queue) == [b"m"]


def test_header_names_of_copies_are_case_sensitive(client, exchange, bound):
    direct = exchange("direct")
    queue = bound(direct, "copy")
    client.publish(1, direct, "to", b"m", {"headers": {"cc": ["copy"], "Bcc": "not even a list"}})
    assert bodies(client, queue) == []


def test_queue_named_twice_gets_one_copy(client, exchange, bound):
    direct = exchange("direct")
    queue = bound(direct, "to", "copy")
    client.publish(1, direct, "to", b"m", {"headers": {"CC": ["copy", "to"], "BCC": ["copy"]}})
    assert bodies(client, queue) == [b"m"]


# ---- Routing follows changes at once


def test_route_changes_take_effect_for_the_very_next_message(client, exchange, bound):
    direct = exchange("direct")
    first = bound(direct, "k")
    client.publish(1, direct, "k", b"1")
    second = bound(direct, "k")
    client.publish(1, direct, "k", b"2")
    client.do(1, "queue.unbind", queue=first, exchange=direct, routing_key="k")
    client.publish(1, direct, "k", b"3")
    client.do(1, "queue.delete", queue=second)
    client.publish(1, direct, "k", b"4", mandatory=True)
    assert client.expect("basic.return").body == b"4"
    assert bodies(client, first) == [b"1", b"2"]


def test_deleted_exchange_is_missed_by_the_very_next_message(client, exchange, bound):
    direct = exchange("direct")
    bound(direct, "k")
    client.publish(1, direct, "k", b"1")
    client.do(1, "exchange.delete", exchange=direct)
    client.publish(1, direct, "k", b"2")
    expect_channel_close(client, 404, f"no exchange '{direct}' in vhost '/'", "basic.publish")


def test_redeclared_queue_is_found_again(client, name):
    queue = name()
    for body in (b"1", b"2"):
        client.do(1, "queue.declare", queue=queue, exclusive=True)
        client.publish(1, "", queue, body)
        assert bodies(client, queue) == [body]
        client.do(1, "queue.delete", queue=queue)
        client.publish(1, "", queue, b"lost")


def test_changes_on_one_connection_are_seen_by_another(channel, connect, queue, name):
    exchange = name("exchange")
    channel.exchange_declare(exchange, "direct")
    publisher = connect().channel()
    publisher.confirm_delivery()
    for round_number in range(5):
        channel.queue_bind(queue, exchange, "k")
        publisher.basic_publish(exchange, "k", str(round_number).encode())
        assert get_one(channel, queue, auto_ack=True).body == str(round_number).encode()
        channel.queue_unbind(queue, exchange, "k")
        publisher.basic_publish(exchange, "k", b"nobody wants it")
        assert get(channel, queue) is None
    assert drain(channel, queue) == []
