//! A start has few syncs, so the power can be cut at each of them.

use std::{fs, io, net::SocketAddr, path::Path};

use amq_protocol::protocol::{AMQPClass, basic::AMQPMethod as B};

use super::{
    broker::Broker,
    client::{Answer, Client, Incoming, PATIENCE, Rng, publish_frames},
    disk::Disk,
    facts,
    power::{ForgetfulDisk, cut_without_luck},
};

const QUEUES: [&str; 3] = ["first", "second", "third"];
const MESSAGES: u64 = 300;
const ACKED: u64 = 100;
/// More syncs than any start has.
const MANY: u64 = 200;

/// A few flushes on the way, so that there is something to delete and to compact at the next start.
const ARGUMENTS: [&str; 2] = ["--store-write-buffer", "1MiB"];

/// Confirmed messages in every queue, the first of them acknowledged with a transaction.
fn fill(address: SocketAddr) -> Answer<()> {
    for queue in QUEUES {
        let mut client = Client::connect(address)?;
        client.declare_queue(queue, true, false)?;
        client.confirm_select()?;
        for id in 1..=MESSAGES {
            let len = (id * 97 % 5_000) as usize;
            let properties = facts::properties(id, len, true);
            publish_frames(client.buffer(), 1, "", queue, true, &properties, &facts::body(id, len));
        }
        client.flush()?;
        let mut confirmed = 0;
        while confirmed < MESSAGES {
            match client.receive(PATIENCE)? {
                Some(Incoming::Method(_, AMQPClass::Basic(B::Ack(ack)))) => confirmed = ack.delivery_tag,
                other => panic!("a publisher was told {other:?}"),
            }
        }
        client.close()?;
        let mut client = Client::connect(address)?;
        client.tx_select()?;
        let mut last = 0;
        for _ in 0..ACKED {
            last = client.get(queue)?.expect("a message").tag;
        }
        client.queue_ack(last, true);
        client.flush()?;
        client.tx_commit()?;
        client.close()?;
    }
    Ok(())
}

/// What is wrong with the queues' contents, which are put back.
fn check(address: SocketAddr) -> Answer<Vec<String>> {
    let mut errors = Vec::new();
    for queue in QUEUES {
        let mut client = Client::connect(address)?;
        for expected in ACKED + 1..=MESSAGES {
            let found = client.get(queue)?.map(|delivery| facts::read(&delivery).map(|(id, _)| id));
            if found != Some(Ok(expected)) {
                errors.push(format!("queue {queue}: {found:?} instead of message {expected}"));
                break;
            }
        }
        if errors.is_empty() && client.get(queue)?.is_some() {
            errors.push(format!("queue {queue} has more than its messages"));
        }
        client.close()?;
    }
    Ok(errors)
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&entry.path(), &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), target)?; // and no socket
        }
    }
    Ok(())
}

/// Cuts the power at each sync of a start on a copy of `original`, if there is one. Answers how many syncs a start had.
fn cut_at_each_sync(original: Option<&Path>, journal: bool, after: impl Fn(u64, SocketAddr)) -> u64 {
    let mut disk = ForgetfulDisk::new().expect("it was available a moment ago");
    for sync in 1..MANY {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("volume/data");
        if let Some(original) = original {
            copy(original, &data).unwrap();
        }
        disk.before_start(&data, &mut Rng(sync));
        disk.be(journal, 0);
        let mut environment = disk.environment(&data);
        environment.push(("POWER_CUT_AT_SYNC", sync.to_string().into()));
        let started = Broker::start_in(&data, &ARGUMENTS, &environment);
        if let Ok(broker) = started {
            broker.kill();
            return sync - 1;
        }
        cut_without_luck(&data).unwrap();
        let environment = {
            disk.before_start(&data, &mut Rng(sync));
            disk.environment(&data)
        };
        match Broker::start_in(&data, &ARGUMENTS, &environment) {
            Ok(broker) => {
                after(sync, broker.address);
                assert_eq!(broker.kill(), Vec::<String>::new(), "after a cut at sync {sync}");
            }
            Err(error) => panic!("FAILED START after a cut at sync {sync}: {error}"),
        }
    }
    panic!("a start has more than {MANY} syncs")
}

#[test]
fn the_power_may_fail_at_any_sync_of_a_start() {
    if let Err(why) = ForgetfulDisk::new() {
        println!("SKIPPED: {why}");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let original = home.path().join("data");
    let broker = Broker::start(&original, &ARGUMENTS).expect("starts");
    fill(broker.address).expect("the queues are filled");
    assert_eq!(broker.kill(), Vec::<String>::new());
    for journal in [false, true] {
        let first = cut_at_each_sync(None, journal, |_, address| {
            Client::connect(address).and_then(Client::close).expect("a broker that works");
        });
        let later = cut_at_each_sync(Some(&original), journal, |sync, address| {
            let errors = check(address).expect("the queues can be looked at");
            assert!(errors.is_empty(), "after a cut at sync {sync}: {errors:#?}");
        });
        println!(
            "a first start has {first} syncs, a later one {later}; after a cut at each of them the next one is right"
        );
    }
}
