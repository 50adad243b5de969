//! The real binary, in a process of its own.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::LIMIT;

/// A running `leveret`; killed on drop.
pub struct Program {
    pub child: Child,
    pub address: SocketAddr,
    /// From the spawn to the first accepted connection.
    pub started_in: Duration,
    pub log: std::sync::Arc<std::sync::Mutex<String>>,
}

/// A port that is free now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The command that serves on `port` with `data`, under a limit of open files if one is given.
pub fn command(data: &Path, port: u16, open_files: Option<u32>) -> Command {
    let binary = env!("CARGO_BIN_EXE_leveret");
    let mut command = match open_files {
        None => Command::new(binary),
        Some(limit) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("ulimit -n {limit} && exec \"$0\" \"$@\""), binary]);
            shell
        }
    };
    command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--data-dir"]).arg(data);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LEVERET_")) {
        command.env_remove(name);
    }
    command
}

impl Program {
    /// Starts the binary and waits until it accepts connections.
    pub fn start(data: &Path, open_files: Option<u32>) -> Program {
        Self::start_with(data, open_files, |_| {})
    }

    /// [`Program::start`] with a changed command.
    pub fn start_with(data: &Path, open_files: Option<u32>, change: impl FnOnce(&mut Command)) -> Program {
        let port = free_port();
        let begun = Instant::now();
        let mut command = command(data, port, open_files);
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let log = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let outputs: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let log = log.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    log.lock().unwrap().push_str(&(line + "\n"));
                }
            });
        }
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        while std::net::TcpStream::connect(address).is_err() {
            assert!(begun.elapsed() < LIMIT, "not started: {}", log.lock().unwrap());
            assert!(child.try_wait().unwrap().is_none(), "ended: {}", log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(1));
        }
        Program { child, address, started_in: begun.elapsed(), log }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends SIGTERM; answers the exit code and how long it took.
    pub async fn terminate(mut self) -> (Option<i32>, Duration) {
        let begun = Instant::now();
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = super::eventually("the broker ends", async || self.child.try_wait().unwrap()).await;
        (status.code(), begun.elapsed())
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
