use super::*;
use crate::{
    broker::extension::encode_keys,
    model::{
        headers::write_counted,
        properties::{raw_entries, raw_entry},
    },
};
use proptest::prelude::*;

/// See the head of the file.
const CAPTURED: &str = include_str!("captured.txt");

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// A message of its own.
#[derive(Clone, Debug, Default, PartialEq)]
struct Owned(DeadLetter);

impl Owned {
    fn new(exchange: &str, key: &str, properties: &[u8], hidden: &[&str]) -> Self {
        let hidden_keys = encode_keys(hidden.iter().map(|key| key.as_bytes()));
        Owned(DeadLetter {
            names: encode_names(exchange.as_bytes(), key.as_bytes()),
            properties: properties.to_vec(),
            extension: Extension { hidden_keys: &hidden_keys, ..Extension::default() }.encode(),
        })
    }

    fn message(&self) -> Message<'_> {
        self.0.message(Body::Inline(b""), true)
    }

    fn die(&mut self, queue: &str, reason: DeathReason, target: (&str, Option<&str>)) {
        let death = Death { queue, reason, at_unix_ms: 1_800_000_000_123, deliveries: 0 };
        let target = DeadLetterTarget { exchange: target.0, routing_key: target.1 };
        self.0 = DeadLetter::new(&self.message(), &death, &target);
    }

    fn header(&self, name: &str) -> Option<(u8, Vec<u8>)> {
        let view = Properties::parse(&self.0.properties).unwrap();
        raw_entry(view.raw_headers()?, name.as_bytes()).map(|entry| (entry.tag, entry.value().to_vec()))
    }
}

fn reason(word: &str) -> DeathReason {
    use DeathReason::{DeliveryLimit, Expired, MaxLen, Rejected};
    [Rejected, Expired, MaxLen, DeliveryLimit].into_iter().find(|reason| reason.as_str() == word).unwrap()
}

#[test]
fn dead_letters_are_rabbitmqs_byte_for_byte() {
    let mut message = Owned::default();
    let mut letters = 0;
    for (number, line) in CAPTURED.lines().enumerate() {
        let words: Vec<&str> = line.split(' ').map(|word| if word == "''" { "" } else { word }).collect();
        match words[..] {
            ["message", exchange, key, hidden, properties] => {
                let hidden: Vec<&str> = hidden.split(',').filter(|key| *key != "-").collect();
                message = Owned::new(exchange, key, &unhex(properties), &hidden);
            }
            ["death", queue, word, seconds, exchange, key] => {
                let at_unix_ms = seconds.parse::<u64>().unwrap() * 1000 + 999;
                let death = Death { queue, reason: reason(word), at_unix_ms, deliveries: 0 };
                let target = DeadLetterTarget { exchange, routing_key: Some(key).filter(|key| *key != "-") };
                message.0 = DeadLetter::new(&message.message(), &death, &target);
            }
            ["letter", exchange, key, properties] => {
                letters += 1;
                assert_eq!(message.message().exchange_and_key(), (exchange.as_bytes(), key.as_bytes()));
                let (got, expected) = (message.0.properties.escape_ascii(), unhex(properties));
                assert_eq!(got.to_string(), expected.escape_ascii().to_string(), "line {}", number + 1);
            }
            _ => assert!(line.is_empty() || line.starts_with('#'), "line {}", number + 1),
        }
    }
    assert_eq!(letters, 17);
}

#[test]
fn all_keys_route_until_a_dead_letter_routing_key_replaces_them() {
    let mut properties = b"\x20\0".to_vec();
    write_counted(&mut properties, |out| {
        out.extend_from_slice(b"\x02CCA\0\0\0\x0dS\0\0\0\x01cVS\0\0\0\x01d");
    });
    let mut message = Owned::new("x", "k", &properties, &["h", "i"]);
    let keys = |message: &Owned| -> Vec<String> {
        message.message().routing_keys().iter().map(|key| String::from_utf8(key.to_vec()).unwrap()).collect()
    };
    assert_eq!(keys(&message), ["k", "c", "d", "h", "i"]);
    message.die("q", DeathReason::Rejected, ("x", None));
    assert_eq!(keys(&message), ["k", "c", "d", "h", "i"]);
    message.die("q", DeathReason::Rejected, ("y", Some("l")));
    assert_eq!(keys(&message), ["l"]);
    message.die("q", DeathReason::Rejected, ("x", None));
    assert_eq!(keys(&message), ["l"]);
    assert!(message.header("CC").is_some());
}

#[test]
fn deaths_clear_the_expiry_and_carry_the_failed_deliveries() {
    let properties = b"\x11\0\x02\x0212";
    let extension = Extension { expires_unix_ms: Some(1_800_000_000_000), ..Extension::default() }.encode();
    let names = encode_names(b"x", b"k");
    let message =
        Message { names: &names, properties, body: Body::Inline(b"b"), persistent: true, extension: &extension };
    let death = Death { queue: "q", reason: DeathReason::Rejected, at_unix_ms: 0, deliveries: 3 };
    let letter = DeadLetter::new(&message, &death, &DeadLetterTarget { exchange: "y", routing_key: None });
    let extension = Extension::parse(&letter.extension);
    assert_eq!(extension, Extension { died: true, deliveries: 3, ..Extension::default() });
    let view = Properties::parse(&letter.properties).unwrap();
    assert_eq!((view.expiration(), view.is_persistent()), (None, true));
    let message = letter.message(message.body, message.persistent);
    assert_eq!((message.body.as_slice(), message.persistent), (&b"b"[..], true));
}

#[test]
fn deaths_a_client_made_up_are_no_deaths() {
    let mut real = Owned::new("", "q", &[0, 0], &[]);
    real.die("q", DeathReason::Expired, ("", Some("r")));
    assert!(is_cycle(&real.message(), "q"));
    let mut forged = Owned::new("", "q", &real.0.properties, &[]);
    assert_eq!(deaths(&forged.message()).count(), 0);
    assert!(!is_cycle(&forged.message(), "q"));
    forged.die("q", DeathReason::Expired, ("", Some("r")));
    assert_eq!(deaths(&forged.message()).map(|death| death.count).collect::<Vec<_>>(), [1]);
    assert_eq!(forged.0.properties, real.0.properties);
}

#[test]
fn cycles_are_those_without_a_reject() {
    use DeathReason::{Expired, MaxLen, Rejected};
    type History<'a> = &'a [(&'a str, DeathReason)];
    let cases: [(History<'_>, &str, bool); 9] = [
        (&[("a", Expired)], "a", true),
        (&[("a", Expired)], "b", false),
        (&[("a", Rejected)], "a", false),
        (&[("a", Expired), ("b", MaxLen)], "a", true),
        (&[("a", Expired), ("b", Rejected)], "a", false),
        (&[("a", Rejected), ("b", Expired)], "a", false),
        (&[("r", Rejected), ("a", Expired), ("b", Expired)], "a", true),
        // The entry of the second death in "a" comes to the front, before the rejection.
        (&[("a", Expired), ("r", Rejected), ("a", Expired)], "a", true),
        (&[("a", Expired), ("a", Rejected), ("b", Expired)], "a", false),
    ];
    for (history, target, expected) in cases {
        let mut message = Owned::new("", "k", &[0, 0], &[]);
        for &(queue, reason) in history {
            message.die(queue, reason, ("", None));
        }
        assert_eq!(is_cycle(&message.message(), target), expected, "{history:?} to {target}");
    }
}

#[test]
fn the_history_is_bounded() {
    let long = "k".repeat(255);
    let mut properties = b"\x20\0".to_vec();
    write_counted(&mut properties, |out| {
        out.extend_from_slice(b"\x02CCA");
        write_counted(out, |out| {
            for _ in 0..400 {
                crate::model::headers::write_long_string(long.as_bytes(), out);
            }
        });
    });
    let mut message = Owned::new("", "k", &properties, &[]);
    for queue in 0..30 {
        message.die(&format!("q{queue}"), DeathReason::Rejected, ("", None));
    }
    assert!(message.0.properties.len() < MAX_HISTORY_BYTES + 110_000, "{}", message.0.properties.len());
    let queues: Vec<String> =
        deaths(&message.message()).map(|death| String::from_utf8_lossy(death.queue).into_owned()).collect();
    assert_eq!(queues[..3], ["q29", "q28", "q27"]);
    assert_eq!(message.header("x-first-death-queue").unwrap().1[4..], *b"q0");
}

/// What RabbitMQ keeps beside the message: queue, reason, count, the latest first.
#[derive(Default)]
struct Model(Vec<(String, DeathReason, u64)>);

impl Model {
    fn die(&mut self, queue: &str, reason: DeathReason) {
        let place = self.0.iter().position(|death| death.0 == queue && death.1 == reason);
        let count = place.map_or(0, |place| self.0.remove(place).2);
        self.0.insert(0, (queue.to_owned(), reason, count + 1));
    }

    fn is_cycle(&self, target: &str) -> bool {
        let Some(place) = self.0.iter().position(|death| death.0 == target) else { return false };
        self.0[..=place].iter().all(|death| death.1 != DeathReason::Rejected)
    }
}

proptest! {
    #[test]
    fn histories_follow_the_model(steps in proptest::collection::vec((0usize..3, 0usize..4), 0..12)) {
        use DeathReason::{DeliveryLimit, Expired, MaxLen, Rejected};
        let mut message = Owned::new("x", "k", &[0, 0], &["h"]);
        let mut model = Model::default();
        for (queue, reason) in steps {
            let (queue, reason) = (["a", "b", "c"][queue], [Rejected, Expired, MaxLen, DeliveryLimit][reason]);
            message.die(queue, reason, ("x", None));
            model.die(queue, reason);
            let found: Vec<_> = deaths(&message.message())
                .map(|death| (String::from_utf8(death.queue.to_vec()).unwrap(), death.reason.to_vec(), death.count))
                .collect();
            let expected: Vec<_> = model.0.iter().map(|(queue, reason, count)| (queue.clone(), reason.as_str().as_bytes().to_vec(), *count)).collect();
            prop_assert_eq!(found, expected);
            for target in ["a", "b", "c", "d"] {
                prop_assert_eq!(is_cycle(&message.message(), target), model.is_cycle(target));
            }
        }
    }

    #[test]
    fn any_message_can_die(properties in proptest::collection::vec(any::<u8>(), 0..120), extension in proptest::collection::vec(any::<u8>(), 0..30), names in proptest::collection::vec(any::<u8>(), 0..12)) {
        let message = Message { names: &names, properties: &properties, body: Body::Inline(b""), persistent: false, extension: &extension };
        let death = Death { queue: "q", reason: DeathReason::Expired, at_unix_ms: u64::MAX, deliveries: u32::MAX };
        let letter = DeadLetter::new(&message, &death, &DeadLetterTarget { exchange: "", routing_key: Some("k") });
        let dead = letter.message(message.body, false);
        if let Ok(view) = Properties::parse(&properties) {
            prop_assert!(is_cycle(&dead, "q"));
            let after = Properties::parse(&letter.properties).unwrap();
            prop_assert_eq!((after.reply_to(), after.user_id(), after.priority()), (view.reply_to(), view.user_id(), view.priority()));
            let keys: Vec<_> = raw_entries(after.raw_headers().unwrap()).map(|entry| entry.key.to_vec()).collect();
            prop_assert!(keys.is_sorted_by(|a, b| a < b));
        }
    }
}
