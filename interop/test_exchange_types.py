"""Exchange types beyond AMQP's own: consistent and modulus hash, random and local random, JMS selectors."""

from collections import Counter

import pytest

from helpers import expect_channel_close, require_exchange_type
from raw import Typed

KINDS = ["x-consistent-hash", "x-random", "x-local-random", "x-modulus-hash", "x-recent-history", "x-jms-topic"]
# A binding key that each type accepts.
KEYS = {"x-consistent-hash": "1"}
ANY_SELECTOR = {"rjms_erlang_selector": "true."}


@pytest.fixture
def exchange(client, raw, server, name):
    """Declares an exchange on the raw client; skips where the type is missing."""

    def declare(kind, arguments=None, **fields):
        require_exchange_type(raw, server, kind)
        exchange = name(kind)
        client.do(1, "exchange.declare", exchange=exchange, type=kind, arguments=arguments or {}, **fields)
        return exchange

    return declare


@pytest.fixture
def queues(client, name):
    """Declares queues, and binds each with the key of the same place."""

    def declare(exchange, *keys, arguments=None):
        made = []
        for key in keys:
            queue = name()
            client.do(1, "queue.declare", queue=queue, exclusive=True)
            bind(client, exchange, queue, key, arguments)
            made.append(queue)
        return made

    return declare


def bind(client, exchange, queue, key="", arguments=None):
    client.do(1, "queue.bind", queue=queue, exchange=exchange, routing_key=key, arguments=arguments or {})


def unbind(client, exchange, queue, key="", arguments=None):
    client.do(1, "queue.unbind", queue=queue, exchange=exchange, routing_key=key, arguments=arguments or {})


def destinations(client, queues):
    """Takes all messages and tells which queues each body was in."""
    found = {}
    for place, queue in enumerate(queues):
        while (answer := client.get(1, queue)).name == "basic.get-ok":
            found.setdefault(answer.body, []).append(place)
    return found


def spread(client, exchange, queues, count=300, prefix="key"):
    """Publishes with `count` different keys; each message must be in one queue. Tells which, by body."""
    for number in range(count):
        client.publish(1, exchange, f"{prefix}-{number}", b"%d" % number)
    found = destinations(client, queues)
    assert len(found) == count
    assert all(len(places) == 1 for places in found.values())
    return {body: places[0] for body, places in found.items()}


# ---- All types


@pytest.mark.parametrize("kind", KINDS)
def test_type_can_be_declared_again_just_as_it_is(kind, client, exchange):
    declared = exchange(kind, durable=True, auto_delete=True)
    client.do(1, "exchange.declare", exchange=declared, type=kind, durable=True, auto_delete=True)
    client.do(1, "exchange.declare", exchange=declared, type=kind, passive=True)


@pytest.mark.parametrize("kind", KINDS)
def test_another_type_of_the_same_name_is_refused(kind, client, exchange):
    declared = exchange(kind)
    client.send_method(1, "exchange.declare", exchange=declared, type="direct")
    text = (
        f"inequivalent arg 'type' for exchange '{declared}' in vhost '/':"
        f" received 'direct' but current is ''{kind}''"
    )
    expect_channel_close(client, 406, text, "exchange.declare")


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_the_type_are_not_compared(kind, client, exchange):
    declared = exchange(kind)
    arguments = {"hash-property": "nonsense", "x-recent-history-length": 0, "x-note": True}
    client.do(1, "exchange.declare", exchange=declared, type=kind, arguments=arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_without_bindings_a_message_is_returned_or_goes_to_the_alternate_exchange(
    kind, client, exchange, queues
):
    declared = exchange(kind)
    client.publish(1, declared, "k", b"m", mandatory=True)
    assert client.expect("basic.return").reply_code == 312
    fanout = exchange("fanout")
    [queue] = queues(fanout, "")
    with_alternate = exchange(kind, {"alternate-exchange": fanout})
    client.publish(1, with_alternate, "k", b"m", mandatory=True)
    assert client.get(1, queue).body == b"m"


@pytest.mark.parametrize("kind", KINDS)
def test_messages_come_and_go_through_bindings_between_exchanges(kind, client, exchange, queues):
    declared, source = exchange(kind), exchange("fanout")
    client.do(1, "exchange.bind", source=source, destination=declared)
    arguments = ANY_SELECTOR if kind == "x-jms-topic" else None
    [queue] = queues(declared, KEYS.get(kind, ""), arguments=arguments)
    for number in range(3):
        client.publish(1, source, "k", b"%d" % number)
    assert sorted(destinations(client, [queue])) == [b"0", b"1", b"2"]


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"x-local-random"}))
def test_an_exchange_may_be_the_destination(kind, client, exchange, queues):
    declared, end = exchange(kind), exchange("fanout")
    arguments = ANY_SELECTOR if kind == "x-jms-topic" else {}
    client.do(
        1,
        "exchange.bind",
        source=declared,
        destination=end,
        routing_key=KEYS.get(kind, ""),
        arguments=arguments,
    )
    [queue] = queues(end, "")
    client.publish(1, declared, "k", b"m")
    assert client.get(1, queue).body == b"m"


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("x-consistent-hash", {"hash-property": "nonsense"}),
        ("x-recent-history", {"x-recent-history-length": 0}),
    ],
)
def test_alternate_exchange_is_checked_before_the_arguments_of_the_type(
    kind, arguments, client, raw, server, name
):
    require_exchange_type(raw, server, kind)
    declared = name()
    client.send_method(
        1,
        "exchange.declare",
        exchange=declared,
        type=kind,
        arguments={**arguments, "alternate-exchange": 5},
    )
    text = f"invalid type 'signedint' for arg 'alternate-exchange' in exchange '{declared}' in vhost '/'"
    expect_channel_close(client, 406, text, "exchange.declare")


# ---- x-consistent-hash


@pytest.mark.parametrize("weight", ["1", "05", "+5", "10000"])
def test_weight_of_a_binding_is_an_integer(weight, exchange, queues):
    queues(exchange("x-consistent-hash"), weight)


@pytest.mark.parametrize(
    "key, text",
    [
        ("", "The binding key must be an integer: <<>>"),
        ("a", 'The binding key must be an integer: <<"a">>'),
        (" 5", 'The binding key must be an integer: <<" 5">>'),
        ("1.0", 'The binding key must be an integer: <<"1.0">>'),
        ("0", "The binding key must be greater than 0"),
        ("-1", "The binding key must be greater than 0"),
        ("10001", "The binding key must not exceed 10000"),
    ],
)
def test_other_weights_are_refused(key, text, client, server, exchange, queue):
    if server.is_3x and key == "10001":
        pytest.skip("RabbitMQ 3.x has no upper limit")
    declared = exchange("x-consistent-hash")
    client.send_method(1, "queue.bind", queue=queue, exchange=declared, routing_key=key)
    expect_channel_close(client, 406, text, "queue.bind")


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"hash-property": "content_type"}, "Unsupported property: content_type"),
        ({"hash-property": ""}, "Unsupported property: "),
        (
            {"hash-header": "a", "hash-property": "message_id"},
            "hash-header and hash-property are mutually exclusive",
        ),
        (
            {"hash-header": "a", "hash-property": "nonsense"},
            "hash-header and hash-property are mutually exclusive",
        ),
    ],
)
def test_bad_hash_arguments_are_refused(arguments, text, client, raw, server, name):
    require_exchange_type(raw, server, "x-consistent-hash")
    client.send_method(1, "exchange.declare", exchange=name(), type="x-consistent-hash", arguments=arguments)
    expect_channel_close(client, 406, text, "exchange.declare")


@pytest.mark.parametrize("argument", ["hash-header", "hash-property"])
def test_hash_argument_of_a_wrong_type_is_refused(argument, client, server, name):
    if server.is_rabbitmq:
        pytest.skip("RabbitMQ's channel dies of it, with 541")
    declared = name()
    client.send_method(
        1, "exchange.declare", exchange=declared, type="x-consistent-hash", arguments={argument: 5}
    )
    text = f"invalid type 'signedint' for arg '{argument}' in exchange '{declared}' in vhost '/'"
    expect_channel_close(client, 406, text, "exchange.declare")


def test_hash_of_the_routing_key_decides(client, exchange, queues):
    declared = exchange("x-consistent-hash")
    bound = queues(declared, "1", "1", "1", "1")
    before = spread(client, declared, bound)
    assert set(before.values()) == {0, 1, 2, 3}
    assert spread(client, declared, bound) == before


def test_destinations_get_messages_in_proportion_to_their_weights(client, exchange, queues):
    declared = exchange("x-consistent-hash")
    bound = queues(declared, "10", "20", "50")
    counts = Counter(spread(client, declared, bound, 2400).values())
    for place, expected in enumerate([300, 600, 1500]):
        assert abs(counts[place] - expected) < 150, counts


def test_a_new_destination_takes_its_share_and_nothing_else_moves(client, exchange, queues):
    declared = exchange("x-consistent-hash")
    bound = queues(declared, "1", "1", "1")
    before = spread(client, declared, bound, 600)
    bound += queues(declared, "1")
    after = spread(client, declared, bound, 600)
    moved = [body for body in before if before[body] != after[body]]
    assert all(after[body] == 3 for body in moved)
    assert 90 < len(moved) < 210
    unbind(client, declared, bound[3], "1")
    assert spread(client, declared, bound, 600) == before


def test_a_destination_that_goes_leaves_only_its_share_behind(client, server, exchange, queues):
    if server.is_rabbitmq:
        pytest.skip("RabbitMQ moves what belongs to destinations that were bound later")
    declared = exchange("x-consistent-hash")
    bound = queues(declared, "1", "1", "1", "1")
    before = spread(client, declared, bound)
    client.do(1, "queue.delete", queue=bound.pop(0))
    after = spread(client, declared, bound)
    assert all(after[body] + 1 == place for body, place in before.items() if place != 0)


def test_second_binding_of_a_destination_is_ignored(client, exchange, queues):
    declared = exchange("x-consistent-hash")
    bound = queues(declared, "1", "1")
    before = spread(client, declared, bound)
    bind(client, declared, bound[0], "50")
    assert spread(client, declared, bound) == before


def test_unbinding_either_of_two_takes_the_destination_out(client, exchange, queues):
    declared = exchange("x-consistent-hash")
    bound = queues(declared, "1", "1")
    bind(client, declared, bound[0], "50")
    unbind(client, declared, bound[0], "50")
    assert set(spread(client, declared, bound).values()) == {1}


def test_copies_do_not_change_the_hash(client, exchange, queues):
    declared = exchange("x-consistent-hash")
    bound = queues(declared, "1", "1", "1")
    before = spread(client, declared, bound, 60)
    for number in range(60):
        headers = {"CC": ["other", f"key-{number + 1}"]}
        client.publish(1, declared, f"key-{number}", b"%d" % number, {"headers": headers})
    assert destinations(client, bound) == {body: [place] for body, place in before.items()}


HASHED = {
    "hash-header": ("colour", lambda value: {"headers": {"colour": value}}),
    "correlation_id": ("correlation_id", lambda value: {"correlation_id": value}),
    "message_id": ("message_id", lambda value: {"message_id": value}),
    "timestamp": ("timestamp", lambda value: {"timestamp": int(value)}),
}


@pytest.mark.parametrize("hashed", HASHED)
def test_hash_of_a_header_or_property_decides(hashed, client, exchange, queues):
    value, make = HASHED[hashed]
    argument = hashed if hashed == "hash-header" else "hash-property"
    declared = exchange("x-consistent-hash", {argument: value})
    bound = queues(declared, "1", "1", "1")
    for key in ("one", "other"):
        for number in range(90):
            client.publish(1, declared, key, b"%d" % number, make(str(number)))
    found = destinations(client, bound)
    assert len(found) == 90
    assert all(len(places) == 2 and len({*places}) == 1 for places in found.values())
    assert {places[0] for places in found.values()} == {0, 1, 2}


@pytest.mark.parametrize("hashed", HASHED)
def test_messages_without_what_is_hashed_stay_together(hashed, client, exchange, queues):
    value, _ = HASHED[hashed]
    argument = hashed if hashed == "hash-header" else "hash-property"
    declared = exchange("x-consistent-hash", {argument: value})
    bound = queues(declared, "1", "1", "1")
    properties = [{}, {"headers": {}}, {"headers": {"other": 1}, "content_type": "x"}]
    for number in range(30):
        client.publish(1, declared, f"key-{number}", b"%d" % number, properties[number % 3])
    assert len({place for places in destinations(client, bound).values() for place in places}) == 1


def test_integers_of_any_width_hash_alike(client, server, exchange, queues):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x hashes the type as well")
    declared = exchange("x-consistent-hash", {"hash-header": "n"})
    bound = queues(declared, "1", "1", "1", "1", "1")
    for number in range(40):
        for tag in "bsIl":
            client.publish(1, declared, "", b"%d" % number, {"headers": {"n": Typed(tag, number)}})
    assert all(len({*places}) == 1 for places in destinations(client, bound).values())


def test_header_to_hash_can_be_named_as_lavinmq_does(client, server, exchange, queues):
    if server.is_rabbitmq:
        pytest.skip("x-hash-on is LavinMQ's argument")
    declared = exchange("x-consistent-hash", {"x-hash-on": "colour", "x-algorithm": "jump"})
    bound = queues(declared, "1", "1", "1")
    for number in range(60):
        client.publish(1, declared, f"key-{number}", b"m", {"headers": {"colour": "blue"}})
    [places] = destinations(client, bound).values()
    assert len({*places}) == 1


# ---- x-random and x-local-random


@pytest.mark.parametrize("kind", ["x-random", "x-local-random"])
def test_chance_decides_for_every_message_anew(kind, client, exchange, queues):
    declared = exchange(kind)
    bound = queues(declared, "", "", "")
    for number in range(300):
        client.publish(1, declared, "always the same", b"%d" % number)
    found = destinations(client, bound)
    assert len(found) == 300 and all(len(places) == 1 for places in found.values())
    counts = Counter(places[0] for places in found.values())
    assert all(50 < counts[place] < 150 for place in range(3)), counts


@pytest.mark.parametrize("kind", ["x-random", "x-local-random"])
def test_every_binding_has_the_same_chance(kind, client, exchange, queues):
    declared = exchange(kind)
    bound = queues(declared, "", "")
    for number in range(8):
        bind(client, declared, bound[0], arguments={"number": number})
    counts = Counter(spread(client, declared, bound, 900).values())
    assert 45 < counts[1] < 160, counts


def test_random_exchange_ignores_keys(client, exchange, queues):
    declared = exchange("x-random")
    [queue] = queues(declared, "some key")
    client.publish(1, declared, "another", b"m")
    assert client.get(1, queue).body == b"m"


def test_chance_has_what_is_left_after_unbinding(client, exchange, queues):
    declared = exchange("x-random")
    bound = queues(declared, "a", "b", "c")
    unbind(client, declared, bound[1], "b")
    client.do(1, "queue.delete", queue=bound.pop(0))
    assert set(spread(client, declared, bound, 60).values()) == {1}


def test_copies_are_for_the_same_destination(client, exchange, queues):
    declared = exchange("x-random")
    bound = queues(declared, "", "", "")
    for number in range(30):
        client.publish(1, declared, "k", b"%d" % number, {"headers": {"CC": ["a", "b", "c"]}})
    found = destinations(client, bound)
    assert len(found) == 30 and all(len(places) == 1 for places in found.values())


@pytest.mark.parametrize("key", ["k", "k ü"])
def test_local_random_takes_no_keys(key, client, exchange, queue):
    declared = exchange("x-local-random")
    client.send_method(1, "queue.bind", queue=queue, exchange=declared, routing_key=key)
    # Each byte is shown as a character.
    shown = key.encode().decode("latin-1")
    expect_channel_close(client, 406, f"Non empty binding '{shown}' key not permitted", "queue.bind")


@pytest.mark.parametrize(
    "key, text",
    [("", "Destination not found"), ("k", "Non empty binding 'k' key not permitted")],
)
def test_local_random_does_not_lead_to_exchanges(key, text, client, exchange):
    declared = exchange("x-local-random")
    client.send_method(
        1, "exchange.bind", source=declared, destination="amq.fanout", routing_key=key
    )
    expect_channel_close(client, 406, text, "exchange.bind")


@pytest.mark.parametrize("queue_type", ["quorum", "stream"])
def test_local_random_takes_classic_queues_only(queue_type, client, exchange, name):
    declared, queue = exchange("x-local-random"), name()
    client.do(1, "queue.declare", queue=queue, durable=True, arguments={"x-queue-type": queue_type})
    client.send_method(1, "queue.bind", queue=queue, exchange=declared)
    text = f"Queue type rabbit_{queue_type}_queue not valid for this exchange type"
    expect_channel_close(client, 406, text, "queue.bind")


# ---- x-modulus-hash


def test_modulus_of_the_key_decides(client, exchange, queues):
    declared = exchange("x-modulus-hash")
    bound = queues(declared, "a", "b", "c")
    before = spread(client, declared, bound)
    counts = Counter(before.values())
    assert all(60 < counts[place] < 140 for place in range(3)), counts
    assert spread(client, declared, bound) == before


def test_order_of_bindings_does_not_matter(client, exchange, queues):
    declared = exchange("x-modulus-hash")
    bound = queues(declared, "", "", "", "")
    before = spread(client, declared, bound)
    for queue in bound:
        unbind(client, declared, queue)
    for queue in reversed(bound):
        bind(client, declared, queue)
    assert spread(client, declared, bound) == before


def test_every_binding_counts_for_the_modulus(client, exchange, queues):
    declared = exchange("x-modulus-hash")
    bound = queues(declared, "", "")
    for number in range(8):
        bind(client, declared, bound[0], f"key {number}")
    counts = Counter(spread(client, declared, bound, 900).values())
    assert 45 < counts[1] < 160, counts


# ---- x-recent-history


@pytest.mark.parametrize(
    "length, shown",
    [
        (0, "0"),
        (-1, "-1"),
        ("5", '<<"5">>'),
        (True, "true"),
        (None, "undefined"),
        ([1], "[{signedint,1}]"),
        (Typed("B", 5), "5"),
        (Typed("i", 5), "5"),
    ],
    ids=str,
)
def test_other_lengths_of_the_history_are_refused(length, shown, client, raw, server, name):
    require_exchange_type(raw, server, "x-recent-history")
    client.send_method(
        1,
        "exchange.declare",
        exchange=name(),
        type="x-recent-history",
        arguments={"x-recent-history-length": length},
    )
    text = f"Invalid argument {shown}, 'x-recent-history-length' must be a positive integer"
    expect_channel_close(client, 406, text, "exchange.declare")


@pytest.mark.parametrize("length", [1, Typed("b", 5), Typed("s", 5), Typed("l", 1 << 40)], ids=str)
def test_length_of_the_history_is_a_positive_integer(length, exchange):
    exchange("x-recent-history", {"x-recent-history-length": length})


def test_recent_history_routes_as_a_fanout(client, exchange, queues):
    declared = exchange("x-recent-history")
    bound = queues(declared, "a", "b")
    client.publish(1, declared, "neither", b"m")
    assert destinations(client, bound) == {b"m": [0, 1]}


# ---- x-jms-topic

HEADERS = {
    "JMSType": "car",
    "colour": "blue",
    "altcol": "'blue",
    "likevar": "bl_ue",
    "weight": 2501,
    "WeIgHt": 2,
    "afloat": Typed("d", 3.0e-2),
    "abool": False,
}


def ident(name):
    return "{'ident',<<\"%s\">>}" % name


MATCHING = [
    "true",
    "{'=',%s,<<\"car\">>}" % ident("JMSType"),
    "{'not',%s}" % ident("abool"),
    "{'=',%s,2501}" % ident("weight"),
    "{'=',%s,2501.0}" % ident("weight"),
    "{'=',%s,2}" % ident("WeIgHt"),
    "{'=',%s,3.0e-2}" % ident("afloat"),
    "{'<>',%s,5}" % ident("weight"),
    "{'>=',%s,2501}" % ident("weight"),
    "{'between',%s,{'range',2500,2501}}" % ident("weight"),
    "{'between',%s,2500,2501}" % ident("weight"),
    "{'not_between',16,{'range',17,18}}",
    "{'like',%s,<<\"bl%%\">>,'no_escape'}" % ident("colour"),
    "{'like',%s,<<\"b_!_ue\">>,<<\"!\">>}" % ident("likevar"),
    "{'like',%s,<<\"'bl%%\">>,'no_escape'}" % ident("altcol"),
    "{'not_like',%s,<<\"l%%\">>,'no_escape'}" % ident("colour"),
    "{'in',%s,[<<\"blue\">>,<<\"green\">>]}" % ident("colour"),
    "{'not_in',%s,[<<\"grue\">>,<<\"bleen\">>]}" % ident("colour"),
    "{'is_null',%s}" % ident("missing"),
    "{'not_null',%s}" % ident("colour"),
    "{'and',{'>',%s,12},{'=',%s,<<\"blue\">>}}" % (ident("weight"), ident("colour")),
    "{'or',{'=',%s,1},{'=',%s,<<\"blue\">>}}" % (ident("missing"), ident("colour")),
    "{'=',{'+',%s,1},{'*',2,1251}}" % ident("weight"),
    "{'<',{'-',%s},{'/',5,2}}" % ident("weight"),
]

NOT_MATCHING = [
    "false",
    "42",
    ident("abool"),
    ident("colour"),
    ident("missing"),
    "{'not',%s}" % ident("missing"),
    "{'=',%s,<<\"Blue\">>}" % ident("colour"),
    "{'=',%s,<<\"2501\">>}" % ident("weight"),
    "{'<=',%s,2500}" % ident("weight"),
    "{'<=',%s,2500}" % ident("missing"),
    "{'<>',%s,2500}" % ident("missing"),
    "{'in',%s,[<<\"bleen\">>]}" % ident("colour"),
    "{'not_in',%s,[<<\"blue\">>]}" % ident("missing"),
    "{'like',%s,<<\"lue\">>,'no_escape'}" % ident("colour"),
    "{'not_like',%s,<<\"x\">>,'no_escape'}" % ident("missing"),
    "{'between',%s,{'range',1,9}}" % ident("missing"),
    "{'and',true,%s}" % ident("missing"),
    "{'or',false,%s}" % ident("missing"),
]


@pytest.mark.parametrize(
    "selector, expected", [(s, True) for s in MATCHING] + [(s, False) for s in NOT_MATCHING]
)
def test_selector_decides_on_headers(selector, expected, client, exchange, queues):
    declared = exchange("x-jms-topic")
    [queue] = queues(declared, "", arguments={"rjms_erlang_selector": f"{selector}."})
    client.publish(1, declared, "any key", b"m", {"headers": HEADERS})
    assert (client.get(1, queue).name == "basic.get-ok") == expected


def test_every_message_is_looked_at(client, exchange, queues):
    declared = exchange("x-jms-topic")
    selectors = ["{'>',%s,1}." % ident("n"), "{'<',%s,3}." % ident("n"), "{'is_null',%s}." % ident("n")]
    bound = [queues(declared, "", arguments={"rjms_erlang_selector": s})[0] for s in selectors]
    for number in range(5):
        client.publish(1, declared, "k", b"%d" % number, {"headers": {"n": number}})
    client.publish(1, declared, "k", b"none")
    assert destinations(client, bound) == {
        b"0": [1],
        b"1": [1],
        b"2": [0, 1],
        b"3": [0],
        b"4": [0],
        b"none": [2],
    }


def test_selector_goes_with_its_binding(client, exchange, queues):
    declared = exchange("x-jms-topic")
    arguments = {"rjms_erlang_selector": "{'=',%s,1}." % ident("n")}
    bound = [*queues(declared, "", arguments=arguments), *queues(declared, "", arguments=ANY_SELECTOR)]
    unbind(client, declared, bound[0], arguments=arguments)
    client.publish(1, declared, "", b"m", {"headers": {"n": 1}})
    assert destinations(client, bound) == {b"m": [1]}


@pytest.mark.parametrize(
    "selector, reason",
    [
        ("", ": unexpected_end"),
        ("queue", ': {disallowed_atom,"queue"}'),
        ("zk4m_w8ntp2v", ': {unknown_atom,"zk4m_w8ntp2v"}'),
        ("{true", ": expected_comma_or_closing_brace"),
        ("[true", ": expected_comma_or_closing_bracket"),
        ("true. x", ": trailing_characters"),
        ("- x", ": unexpected_character"),
        ("1.0e999", ": invalid_term"),
        ("<<5>>", ": invalid_binary"),
        ('<<"a"', ": expected_closing_binary"),
        ('"abc', ": unterminated_string"),
        ("'abc", ": unterminated_quoted_atom"),
        ("[" * 17 + "1" + "]" * 17, ": max_depth_exceeded"),
        ("{like,1,<<\"x\">>,<<\"ab\">>}", " pattern: {invalid_like_pattern,invalid_escape}"),
        ("{like,1,<<\"%s\">>,no_escape}" % ("x" * 1025), " pattern: {invalid_like_pattern,pattern_too_long}"),
        ("{like,1,regex,5}", " pattern: {invalid_regex,badarg}"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_selector_is_refused(selector, reason, client, server, exchange, queue):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x dies of it, with 541")
    declared = exchange("x-jms-topic")
    client.send_method(
        1,
        "queue.bind",
        queue=queue,
        exchange=declared,
        arguments={"rjms_erlang_selector": selector},
    )
    expect_channel_close(client, 406, f"invalid JMS selector{reason}", "queue.bind")


@pytest.mark.parametrize("arguments", [{}, {"rjms_selector": "a = 1"}, {"rjms_erlang_selector": 5}], ids=str)
def test_binding_without_a_selector_is_refused(arguments, client, server, exchange, queue):
    declared = exchange("x-jms-topic")
    if server.is_rabbitmq:
        pytest.skip("RabbitMQ's channel dies of it, with 541")
    client.send_method(1, "queue.bind", queue=queue, exchange=declared, arguments=arguments)
    text = "invalid JMS selector: argument 'rjms_erlang_selector' must be a longstr"
    expect_channel_close(client, 406, text, "queue.bind")


# ---- Confirms


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_confirmed(kind, client, exchange, queues):
    declared = exchange(kind)
    arguments = ANY_SELECTOR if kind == "x-jms-topic" else None
    [queue] = queues(declared, KEYS.get(kind, ""), arguments=arguments)
    client.do(1, "confirm.select")
    for number in range(10):
        client.publish(1, declared, "k", b"m", {"delivery_mode": 2})
    acked = 0
    while acked < 10:
        acked = client.expect("basic.ack").delivery_tag
    assert client.do(1, "queue.purge", queue=queue).message_count == 10
