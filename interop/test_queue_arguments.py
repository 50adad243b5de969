"""Arguments of classic, quorum and stream queues: types, ranges, who knows which, and redeclaring.

Whatever is refused must be refused with RabbitMQ's own text and close the channel only.
"""

from __future__ import annotations

from typing import Any

import pytest

from helpers import Server, expect_channel_close, expect_connection_close
from raw import Typed

TEN_YEARS_MS = 315360000000

# What a field table can hold besides integers, with the name each type has in error texts.
NOT_INTEGERS = {
    "longstr": "5",
    "bool": True,
    "double": 5.0,
    "float": Typed("f", 5.0),
    "timestamp": Typed("T", 5),
    "binary": b"5",
    "decimal": Typed("D", (0, 5)),
    "table": {},
    "array": [],
    "void": None,
}
NOT_STRINGS = {kind: value for kind, value in NOT_INTEGERS.items() if kind != "longstr"} | {"signedint": 5}
NOT_BOOLS = {kind: value for kind, value in NOT_INTEGERS.items() if kind != "bool"} | {"signedint": 1}

# The arguments each queue type knows, in the order in which a redeclaration is compared with them,
# with two values that are allowed.
KNOWN: dict[str, dict[str, tuple[Any, Any]]] = {
    "classic": {
        "x-expires": (60000, 70000),
        "x-message-ttl": (60000, 70000),
        "x-dead-letter-exchange": ("a", "b"),
        "x-dead-letter-routing-key": ("a", "b"),
        "x-max-length": (10, 20),
        "x-max-length-bytes": (1000, 2000),
        "x-max-priority": (5, 6),
        "x-overflow": ("drop-head", "reject-publish"),
        "x-queue-mode": ("default", "lazy"),
        "x-single-active-consumer": (True, False),
        "x-queue-leader-locator": ("client-local", "balanced"),
    },
    "quorum": {
        "x-dead-letter-exchange": ("a", "b"),
        "x-dead-letter-routing-key": ("a", "b"),
        "x-dead-letter-strategy": ("at-most-once", "at-least-once"),
        "x-expires": (60000, 70000),
        "x-max-length": (10, 20),
        "x-max-length-bytes": (1000, 2000),
        "x-max-in-memory-length": (10, 20),
        "x-max-in-memory-bytes": (1000, 2000),
        "x-overflow": ("drop-head", "reject-publish"),
        "x-single-active-consumer": (True, False),
        "x-quorum-initial-group-size": (1, 3),
        "x-delivery-limit": (5, 6),
        "x-message-ttl": (60000, 70000),
        "x-queue-leader-locator": ("client-local", "balanced"),
        "x-consumer-disconnected-timeout": (60000, 70000),
        "x-consumer-timeout": (60000, 70000),
        "x-delayed-retry-type": ("all", "failed"),
        "x-delayed-retry-min": (10, 20),
        "x-delayed-retry-max": (1000, 2000),
    },
    "stream": {
        "x-max-length-bytes": (1000000, 2000000),
        "x-max-age": ("1h", "2h"),
        "x-stream-max-segment-size-bytes": (1000000, 2000000),
        "x-stream-filter-size-bytes": (16, 32),
        "x-initial-cluster-size": (1, 3),
        "x-queue-leader-locator": ("client-local", "balanced"),
    },
}
UNKNOWN_TO_3X = {
    "x-consumer-timeout",
    "x-consumer-disconnected-timeout",
    "x-delayed-retry-type",
    "x-delayed-retry-min",
    "x-delayed-retry-max",
    "x-stream-filter-size-bytes",
}
# Taken as they are, whatever type and value they have.
NOT_CHECKED = {"x-delivery-limit", "x-delayed-retry-min", "x-delayed-retry-max", "x-queue-mode"}

EVERY_ARGUMENT = [(queue_type, argument) for queue_type, known in KNOWN.items() for argument in known]
CHECKED_INTEGERS = [
    (queue_type, argument)
    for queue_type, argument in EVERY_ARGUMENT
    if type(KNOWN[queue_type][argument][0]) is int and argument not in NOT_CHECKED
]
FOREIGN = [
    (queue_type, argument)
    for queue_type, known in KNOWN.items()
    for argument in sorted(set().union(*KNOWN.values()) - set(known))
]


def known_to(server: Server, queue_type: str, argument: str) -> bool:
    new = argument in UNKNOWN_TO_3X or (queue_type, argument) == ("classic", "x-queue-leader-locator")
    return not (server.is_3x and new)


def skip_unless_known(queue_type: str, argument: str, server: Server) -> None:
    if not known_to(server, queue_type, argument):
        pytest.skip(f"{queue_type} queues of RabbitMQ 3.x have no {argument}")


def needed_by(arguments: dict[str, Any] | str) -> dict[str, Any]:
    """What must be given as well: a dead letter routing key is refused without an exchange."""
    return {"x-dead-letter-exchange": "dlx"} if "x-dead-letter-routing-key" in arguments else {}


class Declarer:
    """Declares one queue of one type, again and again."""

    def __init__(self, client, queue: str, queue_type: str):
        self.client = client
        self.queue = queue
        self.queue_type = queue_type

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        needed = needed_by(given) if self.queue_type != "stream" else {}
        return {"x-queue-type": self.queue_type} | needed | given

    def accepts(self, argument: str, value: Any) -> None:
        self.declare({argument: value})
        self.delete()

    def declare(self, arguments: dict[str, Any]) -> None:
        self.client.do(
            1, "queue.declare", queue=self.queue, durable=True, arguments=self.arguments(arguments)
        )

    def delete(self) -> None:
        self.client.do(1, "queue.delete", queue=self.queue)

    def send_declare(self, arguments: dict[str, Any]) -> None:
        self.client.send_method(
            1, "queue.declare", queue=self.queue, durable=True, arguments=self.arguments(arguments)
        )

    def refuses(self, arguments: dict[str, Any], text: str) -> None:
        self.send_declare(arguments)
        expect_channel_close(self.client, 406, text, "queue.declare")

    def finds_invalid(self, argument: str, value: Any, error: str) -> None:
        self.refuses({argument: value}, f"invalid arg '{argument}' for {self.place}: {error}")

    def finds_foreign(self, argument: str, value: Any) -> None:
        text = f"invalid arg '{argument}' for {self.place} of queue type rabbit_{self.queue_type}_queue"
        self.refuses({argument: value}, text)

    def finds_inequivalent(self, arguments: dict[str, Any], argument: str, difference: str) -> None:
        self.refuses(arguments, f"inequivalent arg '{argument}' for {self.place}: {difference}")

    @property
    def place(self) -> str:
        return f"queue '{self.queue}' in vhost '/'"


@pytest.fixture
def declarer(client, name):
    return lambda queue_type="classic": Declarer(client, name(), queue_type)


# ---- Types and ranges


@pytest.mark.parametrize("queue_type, argument", CHECKED_INTEGERS)
def test_integer_argument_takes_nothing_but_integers(queue_type, argument, declarer, server):
    skip_unless_known(queue_type, argument, server)
    queue = declarer(queue_type)
    for kind, value in NOT_INTEGERS.items():
        queue.finds_invalid(argument, value, f'"expected integer, got {kind}"')


@pytest.mark.parametrize("queue_type, argument", CHECKED_INTEGERS)
def test_integer_argument_may_have_any_width_and_is_compared_by_value(
    queue_type, argument, declarer, server
):
    skip_unless_known(queue_type, argument, server)
    queue = declarer(queue_type)
    for tag in "bBsuIil":
        queue.declare({argument: Typed(tag, 100)})
    queue.finds_inequivalent({argument: Typed("s", 101)}, argument, "received '101' but current is '100'")


@pytest.mark.parametrize("queue_type, argument", CHECKED_INTEGERS)
def test_integer_argument_may_not_be_negative(queue_type, argument, declarer, server):
    skip_unless_known(queue_type, argument, server)
    queue = declarer(queue_type)
    for value in (Typed("b", -1), Typed("s", -300), -70000, -(2**62)):
        number = value.value if isinstance(value, Typed) else value
        queue.finds_invalid(argument, value, f"{{value_negative,{number}}}")


@pytest.mark.parametrize(
    "queue_type, argument, smallest, largest, too_small, too_large",
    [
        ("classic", "x-expires", 1, TEN_YEARS_MS, "value_zero", "value_too_large"),
        ("quorum", "x-expires", 1, TEN_YEARS_MS, "value_zero", "value_too_large"),
        ("classic", "x-message-ttl", 0, TEN_YEARS_MS, None, "value_too_large"),
        ("quorum", "x-message-ttl", 0, TEN_YEARS_MS, None, "value_too_large"),
        ("classic", "x-max-priority", 0, 255, None, "max_value_exceeded"),
        ("classic", "x-max-length", 0, 2**63 - 1, None, None),
        ("quorum", "x-max-length", 0, 2**63 - 1, None, None),
        ("classic", "x-max-length-bytes", 0, 2**63 - 1, None, None),
        ("quorum", "x-max-length-bytes", 0, 2**63 - 1, None, None),
        ("quorum", "x-quorum-initial-group-size", 1, 2**63 - 1, "value_zero", None),
        ("quorum", "x-consumer-timeout", 0, 2**63 - 1, None, None),
        ("quorum", "x-consumer-disconnected-timeout", 0, 2**63 - 1, None, None),
        ("stream", "x-initial-cluster-size", 1, 2**63 - 1, "value_zero", None),
    ],
)
def test_integer_argument_is_accepted_within_its_range_only(
    queue_type, argument, smallest, largest, too_small, too_large, declarer, server
):
    skip_unless_known(queue_type, argument, server)
    queue = declarer(queue_type)
    queue.accepts(argument, smallest)
    queue.accepts(argument, largest)
    if too_small:
        queue.finds_invalid(argument, smallest - 1, f"{{{too_small},{smallest - 1}}}")
    if too_large:
        queue.finds_invalid(argument, largest + 1, f"{{{too_large},{largest + 1}}}")


def test_stream_segments_may_not_exceed_their_maximum(declarer):
    queue = declarer("stream")
    queue.accepts("x-stream-max-segment-size-bytes", 3_000_000_000)
    queue.refuses(
        {"x-stream-max-segment-size-bytes": 3_000_000_001},
        "Exceeded max value for x-stream-max-segment-size-bytes",
    )


def test_stream_filters_have_16_to_255_bytes(declarer, server):
    skip_unless_known("stream", "x-stream-filter-size-bytes", server)
    queue = declarer("stream")
    for size in (16, 255):
        queue.accepts("x-stream-filter-size-bytes", size)
    for size in (0, 15, 256):
        queue.refuses({"x-stream-filter-size-bytes": size}, "Invalid value for x-stream-filter-size-bytes")


OVERFLOWS = ("drop-head", "reject-publish", "reject-publish-dlx")
STRATEGIES = ("at-most-once", "at-least-once")
LOCATORS = ("client-local", "balanced", "random", "least-leaders")
AGES = ("1Y", "2M", "3D", "4h", "5m", "6s", "012s")
BAD_WORDS = ("", "drop_head", "DROP-HEAD", "client-local ")
BAD_AGES = ("1", "0h", "1.5h", "1H", "1 h", "1hm")


@pytest.mark.parametrize(
    "queue_type, argument, allowed, refused, error",
    [
        ("classic", "x-overflow", OVERFLOWS, BAD_WORDS, "invalid_overflow"),
        ("quorum", "x-overflow", OVERFLOWS, BAD_WORDS, "invalid_overflow"),
        ("quorum", "x-dead-letter-strategy", STRATEGIES, BAD_WORDS, "invalid_dlx_strategy"),
        ("classic", "x-queue-leader-locator", LOCATORS, BAD_WORDS, "invalid_queue_locator_arg"),
        ("quorum", "x-queue-leader-locator", LOCATORS, BAD_WORDS, "invalid_queue_locator_arg"),
        ("stream", "x-queue-leader-locator", LOCATORS, BAD_WORDS, "invalid_queue_locator_arg"),
        ("stream", "x-max-age", AGES, BAD_AGES, "invalid_max_age"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_text_argument_takes_certain_words_only(
    queue_type, argument, allowed, refused, error, declarer, server
):
    skip_unless_known(queue_type, argument, server)
    queue = declarer(queue_type)
    for word in allowed:
        queue.accepts(argument, word)
    for word in refused:
        queue.finds_invalid(argument, word, error)
    for kind, value in NOT_STRINGS.items():
        queue.finds_invalid(argument, value, f"{{unacceptable_type,{kind}}}")


@pytest.mark.parametrize("age", ["", "h", "one h", "-1h"])
def test_stream_age_needs_a_number(age, declarer, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x ends the connection with an internal error")
    declarer("stream").finds_invalid("x-max-age", age, "invalid_max_age")


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_single_active_consumer_takes_bools_only(queue_type, declarer):
    queue = declarer(queue_type)
    for value in (True, False):
        queue.accepts("x-single-active-consumer", value)
    for kind, value in NOT_BOOLS.items():
        queue.finds_invalid("x-single-active-consumer", value, f"{{unacceptable_type,{kind}}}")


@pytest.mark.parametrize("queue_type", ["classic", "quorum", "stream"])
def test_dead_letter_exchange_takes_strings_only_whatever_the_queue_type(queue_type, declarer):
    queue = declarer(queue_type)
    for kind, value in NOT_STRINGS.items():
        queue.refuses(
            {"x-dead-letter-exchange": value},
            f"invalid type '{kind}' for arg 'x-dead-letter-exchange' in {queue.place}",
        )


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_dead_letter_routing_key_takes_strings_only(queue_type, declarer):
    queue = declarer(queue_type)
    queue.accepts("x-dead-letter-routing-key", "")
    for kind, value in NOT_STRINGS.items():
        queue.finds_invalid("x-dead-letter-routing-key", value, f"{{unacceptable_type,{kind}}}")


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_dead_letter_routing_key_needs_an_exchange(queue_type, client, name):
    queue = name()
    for key in ("", "key"):
        arguments = {"x-queue-type": queue_type, "x-dead-letter-routing-key": key}
        client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=arguments)
        text = f"invalid arg 'x-dead-letter-routing-key' for queue '{queue}' in vhost '/':"
        expect_channel_close(client, 406, f"{text} routing_key_but_no_dlx_defined", "queue.declare")


def test_queue_version_is_2(declarer, server):
    queue = declarer()
    queue.accepts("x-queue-version", 2)
    for kind, value in NOT_INTEGERS.items():
        queue.finds_invalid("x-queue-version", value, f'"expected integer, got {kind}"')
    for version in (0, 3) if server.is_3x else (0, 1, 3):
        queue.finds_invalid("x-queue-version", version, f"\"unsupported queue version '{version}'\"")


@pytest.mark.parametrize(
    "argument", ["x-delivery-limit", "x-delayed-retry-type", "x-delayed-retry-min", "x-delayed-retry-max"]
)
def test_some_arguments_of_quorum_queues_are_not_checked(argument, declarer):
    queue = declarer("quorum")
    for value in ("many", True, -1, 1.5, None):
        queue.accepts(argument, value)


def test_queue_mode_is_not_checked(declarer, server):
    queue = declarer()
    queue.accepts("x-queue-mode", "lazy")
    if server.is_3x:
        queue.finds_invalid("x-queue-mode", "hasty", "\"unsupported queue mode 'hasty'\"")
    else:
        queue.accepts("x-queue-mode", "hasty")


@pytest.mark.rabbitmq_only("the argument is accepted, without effect")
def test_master_locator_is_no_longer_permitted(client, name, server):
    if server.is_3x:
        pytest.skip("deprecated since RabbitMQ 4")
    arguments = {"x-queue-master-locator": "client-local"}
    client.send_method(1, "queue.declare", queue=name(), durable=True, arguments=arguments)
    text = (
        "Feature `queue_master_locator` is deprecated.\nBy default, this feature is not permitted"
        " anymore.\nThe feature will be removed from a future major RabbitMQ version, regardless of the"
        " configuration; actual version to be determined.\nTo continue using this feature"
    )
    expect_connection_close(client, 541, text, "queue.declare")


# ---- Arguments of other queue types


@pytest.mark.parametrize("queue_type, argument", FOREIGN)
def test_argument_of_another_queue_type_is_refused_unread(queue_type, argument, declarer, server):
    skip_unless_known(queue_type, argument, server)
    queue = declarer(queue_type)
    for value in next(known[argument] for known in KNOWN.values() if argument in known):
        queue.finds_foreign(argument, value)
    # A dead letter exchange of the wrong type is refused before anybody looks at the queue type.
    if argument != "x-dead-letter-exchange":
        queue.finds_foreign(argument, Typed("f", -1.0))


def test_arguments_nobody_knows_are_accepted_for_every_queue_type(declarer):
    for queue_type in KNOWN:
        for value in NOT_INTEGERS.values():
            declarer(queue_type).accepts("x-interop", value)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"x-message-ttl": -1, "x-expires": 0}, "x-expires"),
        ({"x-dead-letter-routing-key": "k", "x-message-ttl": -1}, "x-message-ttl"),
        ({"x-max-length": -1, "x-dead-letter-routing-key": "k"}, "x-dead-letter-routing-key"),
        ({"x-max-length-bytes": -1, "x-max-length": -1}, "x-max-length"),
        ({"x-max-priority": 256, "x-max-length-bytes": -1}, "x-max-length-bytes"),
        ({"x-overflow": "spill", "x-max-priority": 256}, "x-max-priority"),
        ({"x-queue-version": 5, "x-overflow": "spill"}, "x-overflow"),
        ({"x-single-active-consumer": 1, "x-queue-version": 5}, "x-queue-version"),
        ({"x-message-ttl": -1, "x-queue-type": "pile"}, "x-queue-type"),
        # Arguments of other queue types come after all of the queue's own.
        ({"x-delivery-limit": 5, "x-single-active-consumer": 1}, "x-single-active-consumer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_of_several_wrong_arguments_is_named(arguments, named, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, durable=True, arguments=arguments)
    text = client.expect("channel.close").reply_text
    assert text.startswith(f"PRECONDITION_FAILED - invalid arg '{named}' for queue '{queue}' in vhost '/'")


def test_refused_declaration_leaves_no_queue(declarer):
    queue = declarer()
    queue.finds_invalid("x-max-length", -1, "{value_negative,-1}")
    queue.client.send_method(1, "queue.declare", queue=queue.queue, passive=True)
    expect_channel_close(queue.client, 404, f"no {queue.place}", "queue.declare")


# ---- Redeclaring


@pytest.mark.parametrize("queue_type, argument", EVERY_ARGUMENT)
def test_redeclaration_must_repeat_the_argument(queue_type, argument, declarer, server):
    skip_unless_known(queue_type, argument, server)
    value, other = KNOWN[queue_type][argument]
    kind = {bool: "bool", int: "signedint", str: "longstr"}[type(value)]
    without = needed_by(argument)

    def shown(value: Any) -> str:
        if argument == "x-max-age" and not server.is_3x:
            return str(int(value[:-1]) * 3_600_000)
        return str(value).lower() if isinstance(value, bool) else str(value)

    queue = declarer(queue_type)
    queue.declare({argument: value})
    queue.declare({argument: value})
    queue.finds_inequivalent(
        {argument: other}, argument, f"received '{shown(other)}' but current is '{shown(value)}'"
    )
    queue.finds_inequivalent(
        without,
        argument,
        f"received none but current is the value '{shown(value)}' of type '{kind}'",
    )
    queue.delete()
    queue.declare(without)
    queue.finds_inequivalent(
        {argument: value},
        argument,
        f"received the value '{shown(value)}' of type '{kind}' but current is none",
    )


@pytest.mark.parametrize("queue_type", ["classic", "quorum", "stream"])
def test_of_several_differences_the_first_is_named(queue_type, declarer, server):
    known = {
        argument: values
        for argument, values in KNOWN[queue_type].items()
        if known_to(server, queue_type, argument)
    }
    queue = declarer(queue_type)
    queue.declare({argument: value for argument, (value, _) in known.items()})
    for same, first in enumerate(known):
        queue.send_declare(
            {argument: values[index >= same] for index, (argument, values) in enumerate(known.items())}
        )
        text = queue.client.expect("channel.close").reply_text
        assert text.startswith(f"PRECONDITION_FAILED - inequivalent arg '{first}' for {queue.place}: ")
        queue.client.send_method(1, "channel.close-ok")
        queue.client.open_channel(1)


def test_most_arguments_are_compared_before_the_queue_type(declarer):
    queue = declarer()
    queue.declare({"x-single-active-consumer": True})
    queue.finds_inequivalent(
        {"x-queue-type": "quorum", "x-single-active-consumer": False},
        "x-single-active-consumer",
        "received 'false' but current is 'true'",
    )


def test_flags_are_compared_before_arguments(client, name):
    queue = name()
    client.do(1, "queue.declare", queue=queue, durable=True, arguments={"x-max-length": 5})
    for fields, difference in [
        ({"auto_delete": True}, "'durable' for $q: received 'false' but current is 'true'"),
        (
            {"durable": True, "auto_delete": True},
            "'auto_delete' for $q: received 'true' but current is 'false'",
        ),
    ]:
        client.send_method(1, "queue.declare", queue=queue, **fields)
        text = f"inequivalent arg {difference}".replace("$q", f"queue '{queue}' in vhost '/'")
        expect_channel_close(client, 406, text, "queue.declare")


def test_timestamp_equals_an_integer_of_the_same_value(declarer):
    queue = declarer()
    queue.declare({"x-max-length": 5})
    queue.declare({"x-max-length": Typed("T", 5)})


@pytest.mark.parametrize(
    "value, shown", [(5.0, "5.0"), ("5", "5"), (True, "true")], ids=["double", "longstr", "bool"]
)
def test_value_of_another_kind_never_equals_an_integer(value, shown, declarer):
    queue = declarer()
    queue.declare({"x-max-length": 5})
    difference = f"received '{shown}' but current is '5'"
    queue.finds_inequivalent({"x-max-length": value}, "x-max-length", difference)


def test_byte_array_equals_a_string_of_the_same_bytes(declarer):
    queue = declarer()
    queue.declare({"x-dead-letter-exchange": "x", "x-dead-letter-routing-key": "key"})
    queue.declare({"x-dead-letter-exchange": "x", "x-dead-letter-routing-key": b"key"})


@pytest.mark.parametrize(
    "ages", [("1h", "60m", "3600s"), ("1D", "24h"), ("1M", "30D"), ("1Y", "365D")], ids=lambda ages: ages[0]
)
def test_stream_ages_are_compared_by_duration(ages, declarer, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x compares the texts")
    queue = declarer("stream")
    for age in ages:
        queue.declare({"x-max-age": age})


# ---- The queue type


@pytest.mark.parametrize("queue_type", ["pile", "CLASSIC", "rabbit", "x-max-length"])
def test_unknown_queue_type_is_refused(queue_type, declarer):
    queue = declarer(queue_type)
    queue.finds_invalid("x-queue-type", queue_type, f"\"unsupported queue type '{queue_type}'\"")


def test_queue_type_takes_strings_only(declarer):
    queue = declarer()
    for kind, value in NOT_STRINGS.items():
        queue.finds_invalid("x-queue-type", value, f"{{unacceptable_type,{kind}}}")


@pytest.mark.parametrize("word", ["", "undefined"])
def test_empty_queue_type_means_the_default_but_is_kept_as_it_is(word, declarer, server):
    if server.is_3x:
        pytest.skip("RabbitMQ 3.x takes it for a type it does not know")
    queue = declarer(word)
    queue.declare({"x-max-priority": 5})
    queue.declare({"x-max-priority": 5})
    queue.finds_inequivalent(
        {"x-max-priority": 5, "x-queue-type": "classic"},
        "x-queue-type",
        f"received 'classic' but current is '{word}'",
    )


@pytest.mark.parametrize("queue_type", ["quorum", "stream"])
@pytest.mark.parametrize("other", ["classic", "quorum", "stream", "pile", ""])
def test_redeclaration_must_repeat_the_queue_type(other, queue_type, declarer):
    queue = declarer(queue_type)
    queue.declare({})
    if other == queue_type:
        queue.declare({})
    else:
        queue.finds_inequivalent(
            {"x-queue-type": other}, "x-queue-type", f"received '{other}' but current is '{queue_type}'"
        )


@pytest.mark.parametrize("queue_type", ["quorum", "stream"])
def test_redeclaration_without_a_type_means_classic(queue_type, declarer, server):
    queue = declarer(queue_type)
    queue.declare({})
    queue.client.send_method(1, "queue.declare", queue=queue.queue, durable=True)
    difference = (
        f"received none but current is the value '{queue_type}' of type 'longstr'"
        if server.is_3x
        else f"received 'classic' but current is '{queue_type}'"
    )
    text = f"inequivalent arg 'x-queue-type' for {queue.place}: {difference}"
    expect_channel_close(queue.client, 406, text, "queue.declare")


@pytest.mark.parametrize("queue_type", ["quorum", "stream"])
@pytest.mark.parametrize(
    "fields, property_name",
    [
        ({"durable": False}, "non-durable"),
        ({"durable": True, "auto_delete": True}, "auto-delete"),
        ({"durable": True, "exclusive": True}, "exclusive-owner"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_replicated_queue_is_durable_and_shared(fields, property_name, queue_type, client, name):
    queue = name()
    client.send_method(1, "queue.declare", queue=queue, arguments={"x-queue-type": queue_type}, **fields)
    text = f"invalid property '{property_name}' for queue '{queue}' in vhost '/'"
    expect_channel_close(client, 406, text, "queue.declare")


@pytest.mark.parametrize("queue_type", ["quorum", "stream"])
def test_replicated_queue_needs_a_name(queue_type, client):
    client.send_method(1, "queue.declare", durable=True, arguments={"x-queue-type": queue_type})
    text = f"Cannot declare a server-named queue for type rabbit_{queue_type}_queue"
    expect_channel_close(client, 406, text, "queue.declare")
