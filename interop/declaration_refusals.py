"""What declaring, binding and deleting exchanges and queues is refused for."""

from raw import Typed
from refusals import (
    EXCHANGE,
    NO_DEFAULT,
    NO_EXCHANGE,
    NO_PREVIOUS,
    NO_QUEUE,
    QUEUE,
    Case,
    consume,
    exchange_declare,
    inequivalent,
    invalid,
    publish,
    queue_declare,
)

EXCHANGE_CASES = [
    Case(
        "declaring an unknown exchange type",
        exchange_declare(type="no-such-type"),
        406,
        "unknown exchange type 'no-such-type'",
        in_3x=("connection", 503, "unknown exchange type 'no-such-type'"),
    ),
    Case(
        "declaring the default exchange with an unknown type",
        exchange_declare(exchange="", type="no-such-type"),
        406,
        "unknown exchange type 'no-such-type'",
        in_3x=("connection", 503, "unknown exchange type 'no-such-type'"),
    ),
    Case("declaring the default exchange", exchange_declare(exchange=""), 403, NO_DEFAULT),
    Case(
        "passively declaring the default exchange",
        exchange_declare(exchange="", passive=True),
        403,
        NO_DEFAULT,
    ),
    Case(
        "declaring a reserved exchange name",
        exchange_declare(exchange="amq.interop"),
        403,
        "exchange name 'amq.interop' contains reserved prefix 'amq.*'",
    ),
    Case(
        "passively declaring a missing exchange",
        exchange_declare(exchange="$none", passive=True),
        404,
        NO_EXCHANGE,
    ),
    Case(
        "redeclaring an exchange with another type",
        exchange_declare(type="fanout"),
        406,
        inequivalent("exchange", "type", "received 'fanout' but current is 'direct'"),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an exchange with another durability",
        exchange_declare(durable=True),
        406,
        inequivalent("exchange", "durable", "received 'true' but current is 'false'"),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an exchange as auto-delete",
        exchange_declare(auto_delete=True),
        406,
        inequivalent("exchange", "auto_delete", "received 'true' but current is 'false'"),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an internal exchange as not internal",
        exchange_declare(),
        406,
        inequivalent("exchange", "internal", "received 'false' but current is 'true'"),
        (exchange_declare(internal=True),),
    ),
    Case(
        "redeclaring an exchange with an alternate exchange it had not",
        exchange_declare(arguments={"alternate-exchange": "other"}),
        406,
        inequivalent(
            "exchange",
            "alternate-exchange",
            "received the value 'other' of type 'longstr' but current is none",
        ),
        (EXCHANGE,),
    ),
    Case(
        "redeclaring an exchange without the alternate exchange it has",
        exchange_declare(),
        406,
        inequivalent(
            "exchange",
            "alternate-exchange",
            "received none but current is the value 'other' of type 'longstr'",
        ),
        (exchange_declare(arguments={"alternate-exchange": "other"}),),
    ),
    Case(
        "redeclaring an exchange with another alternate exchange",
        exchange_declare(arguments={"alternate-exchange": "third"}),
        406,
        inequivalent("exchange", "alternate-exchange", "received 'third' but current is 'other'"),
        (exchange_declare(arguments={"alternate-exchange": "other"}),),
    ),
    Case(
        "redeclaring a predeclared exchange as transient",
        exchange_declare(exchange="amq.topic", type="topic"),
        406,
        "inequivalent arg 'durable' for exchange 'amq.topic' in vhost '/':"
        " received 'false' but current is 'true'",
    ),
    Case(
        "declaring an alternate exchange that is no string",
        exchange_declare(arguments={"alternate-exchange": 5}),
        406,
        "invalid type 'signedint' for arg 'alternate-exchange' in exchange '$x' in vhost '/'",
    ),
    Case(
        "deleting a predeclared exchange",
        ("exchange.delete", {"exchange": "amq.direct"}),
        403,
        "deletion of system exchange 'amq.direct' in vhost '/' not allowed",
    ),
    Case(
        "deleting a reserved name that does not exist",
        ("exchange.delete", {"exchange": "amq.interop"}),
        403,
        "deletion of system exchange 'amq.interop' in vhost '/' not allowed",
    ),
    Case("deleting the default exchange", ("exchange.delete", {"exchange": ""}), 403, NO_DEFAULT),
    Case(
        "deleting an exchange in use if unused",
        ("exchange.delete", {"exchange": "$x", "if_unused": True}),
        406,
        "exchange '$x' in vhost '/' in use",
        (EXCHANGE, QUEUE, ("queue.bind", {"queue": "$q", "exchange": "$x"})),
    ),
    Case(
        "binding an exchange to the default exchange",
        ("exchange.bind", {"destination": "amq.direct", "source": ""}),
        403,
        NO_DEFAULT,
    ),
    Case(
        "binding the default exchange to an exchange",
        ("exchange.bind", {"destination": "", "source": "amq.direct"}),
        403,
        NO_DEFAULT,
    ),
    Case(
        "unbinding the default exchange",
        ("exchange.unbind", {"destination": "", "source": "amq.direct"}),
        403,
        NO_DEFAULT,
    ),
    Case(
        "binding an exchange to a missing source",
        ("exchange.bind", {"destination": "amq.direct", "source": "$none"}),
        404,
        NO_EXCHANGE,
    ),
    Case(
        "binding a missing exchange",
        ("exchange.bind", {"destination": "$none", "source": "amq.direct"}),
        404,
        NO_EXCHANGE,
    ),
]

QUEUE_CASES = [
    Case(
        "declaring a reserved queue name",
        queue_declare(queue="amq.interop"),
        403,
        "queue name 'amq.interop' contains reserved prefix 'amq.*'",
    ),
    Case("passively declaring a missing queue", queue_declare(queue="$none", passive=True), 404, NO_QUEUE),
    Case(
        "passively declaring the empty queue name",
        queue_declare(queue="", passive=True),
        404,
        "no queue '' in vhost '/'",
        (QUEUE,),
    ),
    Case(
        "redeclaring an exclusive queue as not exclusive",
        queue_declare(exclusive=False),
        405,
        "cannot obtain exclusive access to locked queue '$q' in vhost '/'. It could be originally"
        " declared on another connection or the exclusive property value does not match that of the"
        " original declaration.",
        (QUEUE,),
    ),
    Case(
        "redeclaring a shared queue as exclusive",
        queue_declare(exclusive=True, durable=True),
        405,
        "cannot obtain exclusive access to locked queue '$q' in vhost '/'. It could be originally"
        " declared on another connection or the exclusive property value does not match that of the"
        " original declaration.",
        (queue_declare(exclusive=False, durable=True),),
    ),
    Case(
        "redeclaring a durable queue as transient",
        queue_declare(exclusive=False, durable=False),
        406,
        inequivalent("queue", "durable", "received 'false' but current is 'true'"),
        (queue_declare(exclusive=False, durable=True),),
    ),
    Case(
        "redeclaring a transient queue as durable",
        queue_declare(exclusive=False, durable=True),
        406,
        inequivalent("queue", "durable", "received 'true' but current is 'false'"),
        (queue_declare(exclusive=False, durable=False),),
    ),
    Case(
        "redeclaring a queue as auto-delete",
        queue_declare(auto_delete=True),
        406,
        inequivalent("queue", "auto_delete", "received 'true' but current is 'false'"),
        (QUEUE,),
    ),
    Case(
        "redeclaring a queue with an argument it had not",
        queue_declare(arguments={"x-message-ttl": 60000}),
        406,
        inequivalent(
            "queue", "x-message-ttl", "received the value '60000' of type 'signedint' but current is none"
        ),
        (QUEUE,),
    ),
    Case(
        "redeclaring a queue with a 64-bit argument it had not",
        queue_declare(arguments={"x-message-ttl": Typed("l", 60000)}),
        406,
        inequivalent(
            "queue", "x-message-ttl", "received the value '60000' of type 'long' but current is none"
        ),
        (QUEUE,),
    ),
    Case(
        "redeclaring a queue without an argument it has",
        queue_declare(),
        406,
        inequivalent("queue", "x-message-ttl", "received none but current is the value '100' of type 'byte'"),
        (queue_declare(arguments={"x-message-ttl": Typed("b", 100)}),),
    ),
    Case(
        "redeclaring a queue with another argument value",
        queue_declare(arguments={"x-message-ttl": 1000}),
        406,
        inequivalent("queue", "x-message-ttl", "received '1000' but current is '5000'"),
        (queue_declare(arguments={"x-message-ttl": 5000}),),
    ),
    Case(
        "redeclaring a queue with another dead letter exchange",
        queue_declare(arguments={"x-dead-letter-exchange": "b"}),
        406,
        inequivalent("queue", "x-dead-letter-exchange", "received 'b' but current is 'a'"),
        (queue_declare(arguments={"x-dead-letter-exchange": "a"}),),
    ),
    Case(
        "binding with no queue declared before", ("queue.bind", {"exchange": "amq.direct"}), 404, NO_PREVIOUS
    ),
    Case(
        "unbinding with no queue declared before",
        ("queue.unbind", {"exchange": "amq.direct"}),
        404,
        NO_PREVIOUS,
    ),
    Case("purging with no queue declared before", ("queue.purge", {}), 404, NO_PREVIOUS),
    Case("deleting with no queue declared before", ("queue.delete", {}), 404, NO_PREVIOUS),
    Case("getting with no queue declared before", ("basic.get", {}), 404, NO_PREVIOUS),
    Case("consuming with no queue declared before", ("basic.consume", {}), 404, NO_PREVIOUS),
    Case(
        "binding a missing queue", ("queue.bind", {"queue": "$none", "exchange": "amq.direct"}), 404, NO_QUEUE
    ),
    Case(
        "binding to a missing exchange",
        ("queue.bind", {"queue": "$q", "exchange": "$none"}),
        404,
        NO_EXCHANGE,
        (QUEUE,),
    ),
    Case(
        "binding a missing queue to a missing exchange",
        ("queue.bind", {"queue": "missing", "exchange": "$none"}),
        404,
        NO_EXCHANGE,
    ),
    Case(
        "binding a queue to the default exchange",
        ("queue.bind", {"queue": "$q", "exchange": "", "routing_key": "other"}),
        403,
        NO_DEFAULT,
        (QUEUE,),
    ),
    Case(
        "unbinding a queue from the default exchange",
        ("queue.unbind", {"queue": "$q", "exchange": "", "routing_key": "$q"}),
        403,
        NO_DEFAULT,
        (QUEUE,),
    ),
    Case(
        "binding to a headers exchange with an unknown x-match",
        ("queue.bind", {"queue": "$q", "exchange": "amq.headers", "arguments": {"x-match": "some"}}),
        406,
        'Invalid x-match field value <<"some">>; expected all, any, all-with-x, or any-with-x',
        (QUEUE,),
    ),
    Case(
        "binding to a headers exchange with an x-match that is no string",
        ("queue.bind", {"queue": "$q", "exchange": "amq.match", "arguments": {"x-match": 5}}),
        406,
        "Invalid x-match field type signedint (value 5); expected longstr",
        (QUEUE,),
    ),
    Case("purging a missing queue", ("queue.purge", {"queue": "$none"}), 404, NO_QUEUE),
    Case(
        "deleting a queue with messages if empty",
        ("queue.delete", {"queue": "$q", "if_empty": True}),
        406,
        "queue '$q' in vhost '/' not empty",
        (QUEUE, publish(routing_key="$q")),
    ),
    Case(
        "deleting a queue with consumers if unused",
        ("queue.delete", {"queue": "$q", "if_unused": True}),
        406,
        "queue '$q' in vhost '/' in use",
        (QUEUE, consume()),
    ),
]

QUEUE_ARGUMENT_CASES = [
    Case(
        f"declaring {argument} as {value!r}",
        queue_declare(arguments={argument: value}),
        406,
        invalid(argument, rest),
    )
    for argument, value, rest in [
        ("x-message-ttl", "a", ': "expected integer, got longstr"'),
        ("x-message-ttl", True, ': "expected integer, got bool"'),
        ("x-message-ttl", 1.5, ': "expected integer, got double"'),
        ("x-message-ttl", -1, ": {value_negative,-1}"),
        ("x-message-ttl", 315360000001, ": {value_too_large,315360000001}"),
        ("x-expires", "a", ': "expected integer, got longstr"'),
        ("x-expires", 0, ": {value_zero,0}"),
        ("x-expires", -1, ": {value_negative,-1}"),
        ("x-max-length", "a", ': "expected integer, got longstr"'),
        ("x-max-length", -1, ": {value_negative,-1}"),
        ("x-max-length-bytes", -1, ": {value_negative,-1}"),
        ("x-max-priority", "a", ': "expected integer, got longstr"'),
        ("x-max-priority", -1, ": {value_negative,-1}"),
        ("x-max-priority", 256, ": {max_value_exceeded,256}"),
        ("x-overflow", "spill", ": invalid_overflow"),
        ("x-overflow", 1, ": {unacceptable_type,signedint}"),
        ("x-dead-letter-routing-key", "a", ": routing_key_but_no_dlx_defined"),
        ("x-single-active-consumer", "a", ": {unacceptable_type,longstr}"),
        ("x-queue-type", "pile", ": \"unsupported queue type 'pile'\""),
        ("x-queue-type", 5, ": {unacceptable_type,signedint}"),
        ("x-queue-version", 3, ": \"unsupported queue version '3'\""),
        ("x-max-age", "1h", " of queue type rabbit_classic_queue"),
        ("x-delivery-limit", 1, " of queue type rabbit_classic_queue"),
    ]
] + [
    Case(
        "declaring a dead letter routing key that is no string",
        queue_declare(arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": 5}),
        406,
        invalid("x-dead-letter-routing-key", ": {unacceptable_type,signedint}"),
    ),
    Case(
        "declaring a dead letter exchange that is no string",
        queue_declare(arguments={"x-dead-letter-exchange": 5}),
        406,
        "invalid type 'signedint' for arg 'x-dead-letter-exchange' in queue '$q' in vhost '/'",
    ),
]
