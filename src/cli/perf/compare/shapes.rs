//! The built-in matrix: what brokers are usually asked for, from the cheapest message to the safest.

/// Title, and options for `leveret perf`.
pub(super) const MATRIX: &[(&str, &str)] = &[
    ("16 B, auto-ack", "--size 16"),
    ("1 KiB, auto-ack", "--size 1024"),
    ("16 KiB, auto-ack", "--size 16384"),
    ("1 MiB, auto-ack", "--size 1048576"),
    ("16 B, auto-ack, one message a write", "--size 16 --batch 1"),
    ("16 B, ack each", "--size 16 --ack-batch 1"),
    ("16 B, ack batch 100", "--size 16 --ack-batch 100"),
    ("128 B persistent, ack batch 100", "--size 128 --persistent --ack-batch 100"),
    ("128 B persistent, confirm window 1,000, ack batch 100", "--size 128 --persistent --confirm 1000 --ack-batch 100"),
    ("128 B persistent, confirm window 1, ack batch 100", "--size 128 --persistent --confirm 1 --ack-batch 100"),
    ("16 B, publish only", "--size 16 --consumers 0"),
    ("16 B, 4 publishers and 4 consumers on one queue, ack each", "--size 16 -x 4 -y 4 --ack-batch 1"),
    ("16 B, 4 pairs on 4 queues", "--size 16 -x 4 -y 4 --queues 4"),
    ("16 B at 1,000 msg/s", "--size 16 --rate 1000"),
    ("16 B at 10,000 msg/s", "--size 16 --rate 10000"),
    ("16 B at 50,000 msg/s", "--size 16 --rate 50000"),
];
