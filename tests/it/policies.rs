//! Policies: their effect on exchanges and queues, where they are kept, and what is refused. How they are selected and
//! merged is tested in `src/broker/policy` and `src/broker/rules`.

use lapin::{ExchangeKind, options::*, types::FieldTable};
use leveret::{
    broker::{
        PolicyError,
        policy::{Policy, PolicyKind},
        rules::QueueRules,
    },
    config::{Config, ConfiguredPolicy},
};
use serde_json::{Value, json};

use crate::support::{
    TestBroker, broker::Client, declare_durable, depth, eventually, get, persistent, publish_confirmed, table, text,
    within,
};

fn policy(kind: PolicyKind, name: &str, pattern: &str, definition: Value) -> Policy {
    Policy::from_json(kind, name, &json!({"pattern": pattern, "definition": definition})).unwrap()
}

fn user(name: &str, pattern: &str, definition: Value) -> Policy {
    policy(PolicyKind::User, name, pattern, definition)
}

fn configured(policy: Policy) -> ConfiguredPolicy {
    ConfiguredPolicy { vhost: "/".into(), policy }
}

async fn set(broker: &TestBroker, policy: Policy) {
    let broker = broker.server().broker();
    broker.durable(broker.set_policy("/", policy).unwrap()).await.unwrap();
}

async fn clear(broker: &TestBroker, kind: PolicyKind, name: &str) {
    let broker = broker.server().broker();
    broker.durable(broker.clear_policy("/", kind, name).unwrap()).await.unwrap();
}

fn names(broker: &TestBroker, kind: PolicyKind) -> Vec<String> {
    let policies = broker.server().broker().policies("/", kind).unwrap();
    policies.iter().map(|policy| policy.name.to_string()).collect()
}

fn rules(broker: &TestBroker, queue: &str) -> QueueRules {
    broker.server().broker().vhost("/").unwrap().queue(queue).unwrap().rules()
}

async fn declare_fanout(client: &Client, exchange: &str, arguments: FieldTable) {
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    client.exchange_declare(exchange.into(), ExchangeKind::Fanout, options, arguments).await.unwrap();
}

/// A fanout exchange with a queue of the same name.
async fn declare_bound(client: &Client, name: &str) {
    declare_fanout(client, name, FieldTable::default()).await;
    declare_durable(client, name).await;
    client
        .queue_bind(name.into(), name.into(), "".into(), QueueBindOptions::default(), FieldTable::default())
        .await
        .unwrap();
}

async fn publish(client: &Client, exchange: &str) {
    let options = BasicPublishOptions::default();
    let sent = client.basic_publish(exchange.into(), "key".into(), options, b"x", persistent()).await.unwrap();
    within("confirm", sent).await.unwrap();
}

#[tokio::test]
async fn a_policy_gives_exchanges_an_alternate_and_takes_it_away_again() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_bound(&client, "spare").await;
    declare_fanout(&client, "in.before", FieldTable::default()).await;
    publish(&client, "in.before").await; // the route is known now, and leads nowhere
    assert_eq!(depth(&client, "spare").await.0, 0);

    set(&broker, user("p", "^in", json!({"alternate-exchange": "spare"}))).await;
    declare_fanout(&client, "in.after", FieldTable::default()).await;
    declare_fanout(&client, "other", FieldTable::default()).await;
    for exchange in ["in.before", "in.after", "other"] {
        publish(&client, exchange).await;
    }
    assert_eq!(depth(&client, "spare").await.0, 2);

    clear(&broker, PolicyKind::User, "p").await;
    publish(&client, "in.before").await;
    assert_eq!(depth(&client, "spare").await.0, 2);
    client.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn the_argument_of_an_exchange_names_its_alternate_before_a_policy_does() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_bound(&client, "argument").await;
    declare_bound(&client, "policy").await;
    declare_fanout(&client, "in", table([("alternate-exchange", text("argument"))])).await;
    set(&broker, user("p", "^(in|amq\\.fanout)$", json!({"alternate-exchange": "policy"}))).await;
    publish(&client, "in").await;
    publish(&client, "amq.fanout").await; // the predeclared ones have policies as well
    publish(&client, "").await; // and the default exchange has none
    assert_eq!((depth(&client, "argument").await.0, depth(&client, "policy").await.0), (1, 1));
    client.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn rules_of_queues_follow_their_policies_at_once() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    let arguments = table([("x-max-length", 5.into())]);
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    client.queue_declare("q.1".into(), durable, arguments).await.unwrap();
    assert_eq!(rules(&broker, "q.1").max_length, Some(5));

    set(&broker, user("p", "^q", json!({"max-length": 3, "message-ttl": 1000}))).await;
    declare_durable(&client, "q.2").await;
    for queue in ["q.1", "q.2"] {
        let rules = rules(&broker, queue);
        assert_eq!((rules.max_length, rules.message_ttl_ms), (Some(3), Some(1000)), "{queue}");
    }

    set(&broker, policy(PolicyKind::Operator, "o", "1$", json!({"message-ttl": 10}))).await;
    set(&broker, user("p", "^q", json!({"max-length": 9}))).await;
    let first = rules(&broker, "q.1");
    assert_eq!((first.max_length, first.message_ttl_ms), (Some(5), Some(10)));
    let vhost = broker.server().broker().vhost("/").unwrap();
    let effective = vhost.queue_policy(&vhost.queue("q.1").unwrap());
    assert_eq!(effective.definition().unwrap().to_json(), json!({"max-length": 9, "message-ttl": 10}));

    clear(&broker, PolicyKind::User, "p").await;
    clear(&broker, PolicyKind::Operator, "o").await;
    assert_eq!((rules(&broker, "q.1").max_length, rules(&broker, "q.1").message_ttl_ms), (Some(5), None));
    assert_eq!(rules(&broker, "q.2"), QueueRules::default());
    client.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn policies_survive_a_restart_and_hold_from_the_start() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_bound(&client, "spare").await;
    declare_fanout(&client, "in", FieldTable::default()).await;
    client.close().await;
    set(&broker, user("p", "", json!({"max-length": 3, "alternate-exchange": "spare"}))).await;
    set(&broker, user("gone", "", json!({"max-length": 1}))).await;
    clear(&broker, PolicyKind::User, "gone").await;
    set(&broker, policy(PolicyKind::Operator, "p", "", json!({"expires": 1_000_000}))).await;

    broker.restart().await;
    assert_eq!(
        (names(&broker, PolicyKind::User), names(&broker, PolicyKind::Operator)),
        (vec!["p".into()], vec!["p".into()])
    );
    let rules = rules(&broker, "spare");
    assert_eq!((rules.max_length, rules.expires_ms), (Some(3), Some(1_000_000)));
    let client = broker.publisher().await;
    publish(&client, "in").await;
    assert_eq!(depth(&client, "spare").await.0, 1);
    client.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn policies_of_the_configuration_hide_stored_ones_and_are_not_stored() {
    let length = |number: u64| json!({"max-length": number});
    let with =
        move |number: u64| move |config: &mut Config| config.policies = vec![configured(user("p", "", length(number)))];
    let mut broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_durable(&client, "q").await;
    client.close().await;
    set(&broker, user("p", "", length(1))).await;
    set(&broker, user("stored", "^x", length(7))).await;

    broker.restart_with(with(2)).await;
    assert_eq!(rules(&broker, "q").max_length, Some(2));
    assert_eq!(names(&broker, PolicyKind::User), ["p", "stored"]);
    let inside = broker.server().broker();
    let refused = PolicyError::Configured { kind: PolicyKind::User, policy: "p".into(), vhost: "/".into() };
    assert_eq!(inside.set_policy("/", user("p", "", length(9))), Err(refused.clone()));
    assert_eq!(inside.clear_policy("/", PolicyKind::User, "p"), Err(refused.clone()));
    assert_eq!(
        refused.to_string(),
        "policy 'p' in vhost '/' comes from the configuration file and can only be changed there"
    );
    assert_eq!(rules(&broker, "q").max_length, Some(2));

    broker.restart_with(|config| config.policies.clear()).await;
    assert_eq!(rules(&broker, "q").max_length, Some(1), "the stored one is back");
    broker.stop().await;
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let broker = TestBroker::start().await;
    let inside = broker.server().broker();
    let error = inside.set_policy("nowhere", user("p", "", json!({"max-length": 1}))).unwrap_err();
    assert_eq!(error.to_string(), "no vhost 'nowhere'");
    let error = inside.clear_policy("/", PolicyKind::Operator, "p").unwrap_err();
    assert_eq!(error.to_string(), "no operator policy 'p' in vhost '/'");
    assert_eq!(inside.policies("nowhere", PolicyKind::User).unwrap_err().to_string(), "no vhost 'nowhere'");
    broker.stop().await;
}

#[tokio::test]
async fn a_lower_limit_drops_heads_at_once_and_dead_letters_them() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    for queue in ["q", "dead"] {
        declare_durable(&client, queue).await;
    }
    for body in [b"1", b"2", b"3"] {
        publish_confirmed(&client, "q", body).await;
    }
    let target = json!({"max-length": 1, "dead-letter-exchange": "", "dead-letter-routing-key": "dead"});
    set(&broker, user("p", "^q$", target)).await;
    assert_eq!((depth(&client, "q").await.0, depth(&client, "dead").await.0), (1, 2));
    for (queue, body) in [("q", b"3"), ("dead", b"1"), ("dead", b"2")] {
        let message = get(&client, queue).await;
        assert_eq!(message.data, body);
        message.ack(BasicAckOptions::default()).await.unwrap();
    }
    client.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn an_expiry_given_by_an_operator_deletes_an_unused_queue() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_durable(&client, "q").await;
    declare_durable(&client, "kept").await;
    set(&broker, policy(PolicyKind::Operator, "o", "^q$", json!({"expires": 50}))).await;
    eventually("the queue's end", async || (!broker.has_queue("q")).then_some(())).await;
    assert!(broker.has_queue("kept"));
    client.close().await;
    broker.stop().await;
}
