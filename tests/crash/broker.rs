//! The broker's process: started on a data directory, timed, killed, stopped, and its log watched for what must not be
//! there.

#![allow(dead_code, reason = "several test programs share it, and each uses a part")]

use std::{
    ffi::OsString,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

/// How long a start may take before it counts as failed.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// Warnings that are kept of a broker.
const MOST_WARNINGS: usize = 10_000;

pub struct Broker {
    child: Child,
    pub address: SocketAddr,
    pub started_in: Duration,
    complaints: Arc<Mutex<Vec<String>>>,
    warnings: Arc<Mutex<Vec<serde_json::Value>>>,
}

/// Variables of a broker's environment.
pub type Environment = Vec<(&'static str, OsString)>;

fn spawn(data_dir: &Path, arguments: &[&str], environment: &Environment) -> Child {
    // Another build can be put to the test.
    let program = std::env::var_os("LEVERET_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_leveret").into());
    Command::new(program)
        .args(["--bind", "127.0.0.1", "--port", "0", "--log-format", "json", "--data-dir"])
        .arg(data_dir)
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the broker's program runs")
}

impl Broker {
    /// Starts a broker and waits for it to be ready.
    ///
    /// # Errors
    /// What it logged, when it did not come up.
    pub fn start(data_dir: &Path, arguments: &[&str]) -> Result<Broker, String> {
        Broker::start_in(data_dir, arguments, &Environment::new())
    }

    /// [`Broker::start`] with more variables in its environment.
    ///
    /// # Errors
    /// As there.
    pub fn start_in(data_dir: &Path, arguments: &[&str], environment: &Environment) -> Result<Broker, String> {
        let began = Instant::now();
        let mut child = spawn(data_dir, arguments, environment);
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let complaints = Arc::new(Mutex::new(Vec::new()));
        let (ready, is_ready) = mpsc::channel();
        let log = complaints.clone();
        let warnings = Arc::new(Mutex::new(Vec::new()));
        let warned = warnings.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let entry: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                if entry["message"] == "leveret is ready" {
                    let address = entry["address"].as_str().and_then(|address| address.parse::<SocketAddr>().ok());
                    let _ = ready.send((address, began.elapsed()));
                }
                if entry["level"] == "WARN" {
                    let mut warned = warned.lock().unwrap();
                    if warned.len() < MOST_WARNINGS {
                        warned.push(entry.clone());
                    }
                }
                // Anything that is no log line is a panic, or worse.
                if entry["level"] == "ERROR" || entry["level"].is_null() {
                    log.lock().unwrap().push(line);
                }
            }
        });
        match is_ready.recv_timeout(START_PATIENCE) {
            Ok((Some(address), started_in)) => Ok(Broker { child, address, started_in, complaints, warnings }),
            _ => {
                let _ = child.kill();
                let status = child.wait();
                let log = complaints.lock().unwrap().join("\n");
                Err(format!("the broker did not start ({status:?}):\n{log}"))
            }
        }
    }

    /// `kill -9`.
    pub fn kill(mut self) -> Vec<String> {
        self.kill_and_wait();
        std::mem::take(&mut *self.complaints.lock().unwrap())
    }

    /// [`Broker::kill`] of a broker that somebody else holds.
    pub fn kill_and_wait(&mut self) {
        self.child.kill().expect("the broker was running");
        self.child.wait().expect("it was our child");
    }

    /// Whether the process has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The warnings since the last call.
    pub fn take_warnings(&self) -> Vec<serde_json::Value> {
        std::mem::take(&mut *self.warnings.lock().unwrap())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    }

    /// SIGTERM, and what came of it; `None` if it took longer than 5 s.
    pub fn terminate(mut self) -> (Option<ExitStatus>, Duration, Vec<String>) {
        let began = Instant::now();
        // SAFETY: a signal to our own child, which was not waited for yet.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let mut status = None;
        while status.is_none() && began.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(2));
            status = self.child.try_wait().expect("it was our child");
        }
        let took = began.elapsed();
        if status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        (status, took, std::mem::take(&mut *self.complaints.lock().unwrap()))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a broker and kills it after `delay`, ready or not.
pub fn start_and_kill(data_dir: &Path, arguments: &[&str], environment: &Environment, delay: Duration) {
    let mut child = spawn(data_dir, arguments, environment);
    std::thread::sleep(delay);
    child.kill().expect("the broker was running");
    child.wait().expect("it was our child");
}
