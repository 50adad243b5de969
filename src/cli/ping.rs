//! `leveret ping`: does a broker speak AMQP at this address? Made for health checks: no login, no runtime.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use clap::Args;

const PROTOCOL_HEADER: &[u8] = b"AMQP\0\0\x09\x01";
/// Frame type 1 (method), channel 0; the length follows.
const METHOD_ON_CHANNEL_0: &[u8] = &[1, 0, 0];
/// Class 10, method 10.
const CONNECTION_START: &[u8] = &[0, 10, 0, 10];
const DEFAULT_PORT: u16 = 5672;

#[derive(Args)]
pub(super) struct PingArgs {
    /// Host to ask
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to ask; the default is `LEVERET_PORT`, or else 5672
    #[arg(long)]
    port: Option<u16>,
    /// Host and port as amqp://host:port; user, password and virtual host are not used
    #[arg(long, value_name = "URI", conflicts_with_all = ["host", "port"])]
    uri: Option<String>,
    /// Seconds to wait for an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum PingError {
    #[error("'{uri}' is not of the form amqp://host:port")]
    Uri { uri: String },
    #[error("no broker at {address}: {source}")]
    Unreachable { address: String, source: io::Error },
    #[error("{address} answers, but not as an AMQP 0-9-1 broker")]
    NotABroker { address: String },
}

/// Sends the protocol header and waits for `connection.start`.
pub(super) fn run(args: &PingArgs) -> Result<(), PingError> {
    let (host, port) = match &args.uri {
        Some(uri) => host_and_port(uri).ok_or_else(|| PingError::Uri { uri: uri.clone() })?,
        None => (args.host.clone(), args.port.unwrap_or_else(configured_port)),
    };
    let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    match ask(&host, port, Duration::from_secs(args.timeout)) {
        Ok(true) => {
            println!("{address} answers");
            Ok(())
        }
        Ok(false) => Err(PingError::NotABroker { address }),
        Err(source) => Err(PingError::Unreachable { address, source }),
    }
}

/// A health check runs in the broker's own environment.
fn configured_port() -> u16 {
    let variable = std::env::var("LEVERET_PORT").ok();
    variable.and_then(|port| port.trim().parse().ok()).unwrap_or(DEFAULT_PORT)
}

fn host_and_port(uri: &str) -> Option<(String, u16)> {
    let rest = uri.strip_prefix("amqp://")?;
    let authority = rest.split(['/', '?']).next()?;
    let host_port = authority.rsplit('@').next()?;
    let (host, port) = match host_port.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (host_port, DEFAULT_PORT),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

/// Whether `connection.start` came. Every address of the name is tried until one accepts.
fn ask(host: &str, port: u16, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    let mut stream = connect(host, port, deadline)?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(PROTOCOL_HEADER)?;
    let mut answer = [0; 11];
    let mut read = 0;
    while read < answer.len() {
        stream.set_read_timeout(Some(remaining(deadline)?))?;
        match stream.read(&mut answer[read..]) {
            Ok(0) => return Ok(false),
            Ok(bytes) => read += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(timed_out()),
            Err(error) => return Err(error),
        }
    }
    Ok(answer.starts_with(METHOD_ON_CHANNEL_0) && answer.ends_with(CONNECTION_START))
}

fn connect(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, remaining(deadline)?) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(timed_out()) } else { Ok(left) }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Asks a listener that reads the header and answers with these bytes.
    fn answer_to(reply: &'static [u8]) -> io::Result<bool> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut header = [0; 8];
            stream.read_exact(&mut header).unwrap();
            assert_eq!(header, PROTOCOL_HEADER);
            stream.write_all(reply).unwrap();
        });
        let answer = ask("127.0.0.1", port, Duration::from_secs(10));
        peer.join().unwrap();
        answer
    }

    #[test]
    fn connection_start_is_a_broker_and_anything_else_is_not() {
        assert!(answer_to(&[1, 0, 0, 0, 0, 1, 200, 0, 10, 0, 10, 0, 9]).unwrap());
        assert!(!answer_to(b"AMQP\x03\x01\0\0").unwrap());
        assert!(!answer_to(b"HTTP/1.1 400 Bad Request\r\n").unwrap());
        assert!(!answer_to(b"").unwrap());
    }

    #[test]
    fn nobody_listening_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        assert!(ask("127.0.0.1", port, Duration::from_secs(10)).is_err());
    }

    #[test]
    fn uris_give_host_and_port() {
        let pair = |host: &str, port| Some((host.to_owned(), port));
        assert_eq!(host_and_port("amqp://localhost"), pair("localhost", 5672));
        assert_eq!(host_and_port("amqp://guest:guest@10.0.0.1:5673/%2F"), pair("10.0.0.1", 5673));
        assert_eq!(host_and_port("amqp://[::1]:5673/?heartbeat=5"), pair("::1", 5673));
        assert_eq!(host_and_port("amqp://[::1]"), pair("::1", 5672));
        for uri in ["localhost", "amqps://localhost", "amqp://", "amqp://h:port", "amqp://h:70000"] {
            assert_eq!(host_and_port(uri), None, "{uri}");
        }
    }
}
