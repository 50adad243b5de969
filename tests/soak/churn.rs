//! What comes and goes: queues of all kinds, exchanges, bindings, connections, channels, transactions.

use std::time::Duration;

use amq_protocol::protocol::{
    AMQPClass, basic, channel,
    queue::{self, AMQPMethod as Q},
};

use super::{
    client::{Answer, Client, ClientError, Incoming, PATIENCE, Rng, publish_frames},
    facts,
    flows::{ALL, OVER, Site, mixed_size},
};

/// Declares, binds, fills, empties and deletes queues, one after the other.
pub fn queues(site: &Site, worker: usize, mut rng: Rng) {
    site.run("declarer", || {
        let mut count = 0;
        let mut client = site.connect()?;
        while site.is(ALL) {
            count += 1;
            reopen(&mut client)?; // confirms count from 1 again
            one_queue(site, &mut client, &format!("come-and-go.{worker}.{count}"), &mut rng)?;
            if rng.one_in(20) {
                client.close()?;
                client = site.connect()?;
            }
            std::thread::sleep(Duration::from_millis(rng.range(0..30)));
        }
        client.close()
    });
}

fn one_queue(site: &Site, client: &mut Client, name: &str, rng: &mut Rng) -> Answer<()> {
    let kind = rng.range(0..4);
    let (durable, exclusive, auto_delete) = (kind == 0, kind == 2, kind == 3);
    let declare = queue::Declare { queue: name.into(), durable, exclusive, auto_delete, ..queue::Declare::default() };
    client.call(1, AMQPClass::Queue(Q::Declare(declare)), (50, 11), "queue.declare-ok")?;
    let with_exchange = rng.one_in(3);
    let exchange = if with_exchange { name } else { "topics" };
    if with_exchange {
        client.declare_exchange(name, ["direct", "fanout", "headers"][rng.range(0..3) as usize], false)?;
    }
    client.bind(name, exchange, &format!("{name}.#"))?;
    // Through the default exchange: what it is bound to is not what counts here.
    let messages = rng.range(0..40) as u32;
    publish_and_wait(site, client, name, messages, rng)?;
    let mut left = messages;
    if client.declare_queue(name, durable, true)? != left {
        site.ledger.complain(format!("queue {name} does not have {left} messages"));
    }
    match rng.range(0..4) {
        0 => {
            if client.purge_queue(name)? != left {
                site.ledger.complain(format!("a purge of queue {name} does not remove {left} messages"));
            }
            left = 0;
        }
        1 => left -= get_some(client, name, left, rng)?,
        2 if messages > 0 => {
            client.consume(name, false, 10)?;
            let Some(Incoming::Delivery(delivery)) = client.receive(PATIENCE)? else {
                site.ledger.complain(format!("queue {name} delivers nothing"));
                return Ok(());
            };
            client.queue_ack(delivery.tag, false);
            client.cancel()?;
            if auto_delete {
                return drop_deliveries(site, client, name, with_exchange);
            }
            // The rest of the prefetch is with this channel still; its end brings it back.
            reopen(client)?;
            left -= 1;
        }
        _ => {}
    }
    if exclusive && rng.one_in(2) {
        return end_of_exclusive(site, client, name, with_exchange);
    }
    let delete = queue::Delete { queue: name.into(), ..queue::Delete::default() };
    match client.call(1, AMQPClass::Queue(Q::Delete(delete)), (50, 41), "queue.delete-ok")? {
        AMQPClass::Queue(Q::DeleteOk(ok)) if ok.message_count == left => {}
        other => site.ledger.complain(format!("the deletion of {name} says {other:?} instead of {left} messages")),
    }
    after_its_end(site, client, name, with_exchange)
}

fn publish_and_wait(site: &Site, client: &mut Client, queue: &str, count: u32, rng: &mut Rng) -> Answer<()> {
    for id in 0..u64::from(count) {
        let len = mixed_size(rng).min(2_000);
        let persistent = rng.one_in(2);
        let properties = facts::properties(id, len, persistent);
        publish_frames(client.buffer(), 1, "", queue, true, &properties, &facts::body(id, len));
    }
    client.flush()?;
    // Persistent and transient ones are confirmed each in their own time.
    let mut open: Vec<u64> = (1..=u64::from(count)).collect();
    while !open.is_empty() {
        match client.receive(PATIENCE)? {
            Some(Incoming::Method(_, AMQPClass::Basic(basic::AMQPMethod::Ack(ack)))) => {
                open.retain(|&number| match ack.multiple {
                    true => number > ack.delivery_tag,
                    false => number != ack.delivery_tag,
                });
            }
            other => {
                site.ledger.complain(format!("publishes to {queue} were answered with {other:?}"));
                return Ok(());
            }
        }
    }
    Ok(())
}

fn get_some(client: &mut Client, queue: &str, there: u32, rng: &mut Rng) -> Answer<u32> {
    let wanted = rng.range(0..u64::from(there) + 1) as u32;
    for _ in 0..wanted {
        if let Some(delivery) = client.get(queue)? {
            client.queue_ack(delivery.tag, false);
        }
    }
    client.qos(0)?; // the acks were heard
    Ok(wanted)
}

fn reopen(client: &mut Client) -> Answer<()> {
    let close = channel::Close { reply_code: 200, reply_text: "done".into(), class_id: 0, method_id: 0 };
    client.call(1, AMQPClass::Channel(channel::AMQPMethod::Close(close)), (20, 41), "channel.close-ok")?;
    client.forget_backlog();
    client.open_channel(1)?;
    client.confirm_select()
}

/// The last consumer of an auto-delete queue was cancelled.
fn drop_deliveries(site: &Site, client: &mut Client, name: &str, with_exchange: bool) -> Answer<()> {
    reopen(client)?;
    after_its_end(site, client, name, with_exchange)
}

/// An exclusive queue ends with its connection.
fn end_of_exclusive(site: &Site, client: &mut Client, name: &str, with_exchange: bool) -> Answer<()> {
    let fresh = site.connect()?;
    site.cut(client);
    *client = fresh;
    // Until the broker has noticed, it is locked (405).
    for _ in 0..500 {
        match site.connect()?.declare_queue(name, false, true) {
            Err(ClientError::Closed { code: 405, .. }) => std::thread::sleep(Duration::from_millis(20)),
            _ => break,
        }
    }
    after_its_end(site, client, name, with_exchange)
}

fn after_its_end(site: &Site, client: &mut Client, name: &str, with_exchange: bool) -> Answer<()> {
    if with_exchange {
        client.delete_exchange(name)?;
    }
    match site.connect()?.declare_queue(name, false, true) {
        Err(ClientError::Closed { code: 404, .. }) => {}
        other => site.ledger.complain(format!("queue {name} should be gone: {other:?}")),
    }
    Ok(())
}

/// Opens and ends connections and channels, with goodbyes, errors and cuts.
pub fn connections(site: &Site, mut rng: Rng) {
    site.run("visitor", || {
        while site.is(ALL) {
            let mut client = site.connect()?;
            let channels = rng.range(2..20) as u16;
            for number in 2..channels {
                client.open_channel(number)?;
            }
            match rng.range(0..4) {
                0 => site.cut(&client),
                1 => drop(client), // the socket's end, without a word
                2 => match client.declare_queue("never declared", false, true) {
                    Err(ClientError::Closed { code: 404, .. }) => client.close()?,
                    other => site.ledger.complain(format!("a queue that is not there: {other:?}")),
                },
                _ => client.close()?,
            }
            std::thread::sleep(Duration::from_millis(rng.range(0..100)));
        }
        Ok(())
    });
}

/// Publishes to a queue in transactions and takes messages out of it in the same ones; some are rolled back, some cut off.
pub fn transactions(site: &Site, queue: &'static str, mut rng: Rng) {
    site.run("transactions", || {
        let mut next_id = site.ids();
        let mut client = site.connect()?;
        client.tx_select()?;
        while !site.is(OVER) {
            let (mut published, mut taken) = (Vec::new(), Vec::new());
            for _ in 0..if site.is(ALL) { rng.range(1..10) } else { 0 } {
                let (id, len) = (next_id(), mixed_size(&mut rng).min(5_000));
                site.ledger.sending(id);
                published.push(id);
                let properties = facts::properties(id, len, true);
                publish_frames(client.buffer(), 1, "", queue, true, &properties, &facts::body(id, len));
            }
            client.flush()?;
            for _ in 0..rng.range(1..12) {
                let Some(delivery) = client.get(queue)? else { break };
                match facts::read(&delivery) {
                    Ok((id, _)) => taken.push((id, delivery.redelivered)),
                    Err(error) => site.ledger.complain(format!("queue {queue}: {error}")),
                }
                client.queue_ack(delivery.tag, false);
            }
            client.flush()?;
            match rng.range(0..10) {
                0 => {
                    client.tx_rollback()?;
                    client.recover()?;
                    published.into_iter().for_each(|id| site.ledger.withdrawn(id));
                }
                1 => {
                    site.cut(&client);
                    published.into_iter().for_each(|id| site.ledger.withdrawn(id));
                    client = site.connect()?;
                    client.tx_select()?;
                }
                _ => {
                    client.tx_commit()?;
                    published.into_iter().for_each(|id| site.ledger.confirmed(id));
                    taken.into_iter().for_each(|(id, redelivered)| site.ledger.done(id, redelivered));
                }
            }
            std::thread::sleep(Duration::from_millis(rng.range(0..60)));
        }
        client.close()
    });
}

/// Takes messages one at a time.
pub fn gets(site: &Site, queue: &'static str) {
    site.run("getter", || {
        let mut client = site.connect()?;
        while !site.is(OVER) {
            match client.get(queue)? {
                None => std::thread::sleep(Duration::from_millis(10)),
                Some(delivery) => {
                    match facts::read(&delivery) {
                        Ok((id, _)) => site.ledger.done(id, delivery.redelivered),
                        Err(error) => site.ledger.complain(format!("queue {queue}: {error}")),
                    }
                    client.queue_ack(delivery.tag, false);
                    client.flush()?;
                }
            }
        }
        client.close()
    });
}

/// A burst of messages every now and then, more than the memory budget holds.
pub fn bursts(site: &Site, queue: &'static str, mut rng: Rng) {
    const BURST: u64 = 4_000;
    const BYTES: usize = 3_000;
    site.run("bursts", || {
        let mut next_id = site.ids();
        while site.is(ALL) {
            let mut client = site.connect()?;
            client.tx_select()?;
            for _ in 0..BURST / 100 {
                let ids: Vec<_> = (0..100).map(|_| next_id()).collect();
                for &id in &ids {
                    site.ledger.sending(id);
                    let properties = facts::properties(id, BYTES, true);
                    publish_frames(client.buffer(), 1, "", queue, true, &properties, &facts::body(id, BYTES));
                }
                client.flush()?;
                client.tx_commit()?;
                ids.into_iter().for_each(|id| site.ledger.confirmed(id));
            }
            client.close()?;
            for _ in 0..rng.range(80..160) {
                if site.is(ALL) {
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        Ok(())
    });
}
